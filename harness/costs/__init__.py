"""What a run will take, before it runs: memory, time, tokens, disk, dollars.

    forecast      a run's stages as estimates, and afterwards beside what was used
    estimate      the arithmetic
    footprint     what a training step holds: the recipe's own, traced (`traces`) on tensors without numbers (`fake`)
    shape         the sizes of a checkpoint, by its config.json alone
    calibrate, floor, rows, questions     what is measured, each in a process of its own (`aside`), as it imports much

Reads recipes and the plan of their stages; nothing of a run reads it, but `own`, which asks for shapes.
"""
