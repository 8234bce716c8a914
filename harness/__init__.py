"""The `ts-loop` orchestrator: a run is a plan of stages over native recipes.

`config` what is asked · `checks` whether it can work · `plan` which stages · `stages/` what a stage is, a kind a module
· `tasks`, `asking`, `grading` lm-eval's side of it · `store` what is done · `schedule` ready stages onto slots ·
`runner`, `keeper` commands as processes · `outcomes`, `stats` rows of questions · `rundir`, `records` a run's folder ·
`view`, `page` show it · `cli/` the command · `loop` alone knows the order.
"""
