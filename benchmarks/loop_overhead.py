"""Wall time of `ts-loop` over the same stages chained as bare command lines, in one run.

    python benchmarks/loop_overhead.py [--iters 3 --rounds 3] [--record]

Floor: a bare command imports its tool anew (6 commands an iteration and 2 at the start, five to fifteen seconds each)
and lm-eval reads its 13,000 task files; `ts-loop` does both once. What is left is the work itself, which is the same
commands on the same recipes. In a round both run, each from nothing, and which is first changes from round to round.
Ends with one line of JSON: `ratio` is the median over rounds of ts-loop / bare (the bound is 0.35), and
`orchestration_s_per_iteration` is everything `ts-loop` does outside the commands once the preloading is done.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import Recorder

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


def one_round(iterations: int, bare_first: bool) -> dict[str, float]:
    """Seconds of both and their ratio."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if bare_first:
            bare_s = chained(folder, iterations)
        loop_s, parts = looped(folder / "out", iterations)
        if not bare_first:
            bare_s = chained(folder, iterations)
    orchestration = (loop_s - parts["preload_s"] - parts["body_s"]) / iterations
    found = {"ratio": loop_s / bare_s, "ts_loop_s": loop_s, "bare_s": bare_s}
    return {**found, "orchestration_s_per_iteration": orchestration, **parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iters", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    recorder = Recorder(parser)
    asked = parser.parse_args()
    rounds = []
    for number in range(asked.rounds):
        rounds.append(one_round(asked.iters, bare_first=bool(number % 2)))
        print(*(f"{key} {value:.3f}" for key, value in rounds[-1].items()), flush=True)
    each = {key: [found[key] for found in rounds] for key in rounds[0]}
    medians = {key: statistics.median(values) for key, values in each.items()}
    recorder.keep(asked, "loop_overhead", {**medians, "rounds": each, "iterations": asked.iters})


if __name__ == "__main__":
    main()
