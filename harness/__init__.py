"""The `ts-loop` orchestrator: a loop over native recipes.

`config` says what to do, `checks` whether it can be done, `stages` which native commands do it, `tools` runs them,
`rundir` remembers what is done, `scores` reads how it went, `report` shows it, and `loop` alone knows the order.
"""
