"""Wall time of `ts-loop` over the same stages chained as bare command lines, in one run.

    python benchmarks/loop_overhead.py [--iters 3]

Floor: a bare command imports its tool anew (6 commands an iteration and 2 at the start, five to fifteen seconds each)
and lm-eval reads its 13,000 task files; `ts-loop` does both once. What is left is the work itself, which is the same
commands on the same recipes. Ends with one line of JSON: `ratio` is ts-loop / bare (the bound is 0.35), and
`orchestration_s_per_iteration` is everything `ts-loop` does outside the commands once the preloading is done.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness.config import load, read_recipes, recipes_folder
from harness.loop import prepare, write_recipes
from harness.plan import commands
from harness.view import View

BIN = Path(sys.executable).parent


def looped(folder: Path, iterations: int) -> tuple[float, dict[str, float]]:
    """Wall seconds of `ts-loop`, and what it says of where they went."""
    begun = time.monotonic()
    subprocess.run(
        [BIN / "ts-loop", "--iters", str(iterations), "--name", "looped", "--out", folder],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    wall = time.monotonic() - begun
    run = json.loads((folder / "looped" / "run.json").read_text())
    (inside,) = run["sittings"].values()
    return wall, {"preload_s": run["preload_s"], "body_s": run["busy_s"], "inside_s": inside}


def chained(folder: Path, iterations: int) -> float:
    """Wall seconds of the same commands, one process each; their recipes are written beforehand."""
    config = load(recipes_folder() / "loop.yml", {"iterations": iterations})
    run = prepare(config, read_recipes(config), folder / "chained", View())
    stages = [(step.stage, write_recipes(run, step.stage)) for step in run.steps]
    environment = {**os.environ, "AXOLOTL_DO_NOT_TRACK": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    begun = time.monotonic()
    for stage, paths in stages:
        own = Path(paths["stage"])
        for command in commands(stage, paths):
            with (own / "log.txt").open("ab") as log:
                subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)
        for source, target in stage.renames:
            (own / source).rename(own / target)
    return time.monotonic() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iters", type=int, default=3)
    iterations = parser.parse_args().iters
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        loop_s, parts = looped(folder, iterations)
        bare_s = chained(folder, iterations)
    orchestration = loop_s - parts["preload_s"] - parts["body_s"]
    print(
        json.dumps(
            {
                "ratio": round(loop_s / bare_s, 3),
                "ts_loop_s": round(loop_s, 1),
                "bare_s": round(bare_s, 1),
                "iterations": iterations,
                "orchestration_s_per_iteration": round(orchestration / iterations, 2),
                **{key: round(value, 1) for key, value in parts.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
