"""The `ts-loop` orchestrator: a run is a plan of stages over native recipes.

`config` what is asked · `checks` whether it can work · `plan` which stages · `stages/` what a stage is, a kind a module
· `tasks`, `asking`, `grading` lm-eval's side of it · `choosing`, `angles` what t goes on · `store` what is done ·
`schedule` ready stages onto slots · `runner`, `keeper` commands as processes · `outcomes`, `stats`, `evidence` rows of
questions · `rundir`, `records` a run's folder · `view`, `page`, `trackers` show it · `lineage`, `model_card`, `export`
publish a checkpoint · `doctor` the machine · `cli/` the command · `loop` alone knows the order.
"""
