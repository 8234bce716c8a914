"""What `ts-loop` comes to on the embedded pair: the tables of the loop's own, from runs as a person types them.

    python benchmarks/embedded.py gains        ts-loop --iters 3 --seed S, for each of --seeds 42,43,44
    python benchmarks/embedded.py on_policy    the same with --distill on-policy
    python benchmarks/embedded.py arms         ts-loop --iters 1 --arms …, all of them, --seeds 0,1,2
    python benchmarks/embedded.py other        the pair in another shape, as a user's: ts-loop init, then one iteration

What the store under `--out` has of a stage is not run again: each run's seconds stand beside how many stages it made.
Ends with one line of JSON: of each run the rows of `results.json`, the paired tests and the verdict.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mini_lab import RECIPES, ROOT, module
from record import Recorder, shown

from harness import evidence
from harness.config import ARMS
from harness.files import read_json
from harness.store import Store

TS_LOOP = Path(sys.executable).with_name("ts-loop")
KEPT = ("arm", "seed", "iteration", "checkpoint", "task", "n", "correct", "accuracy", "ci95", "tokens_per_answer")
SEEDS = {"gains": "42,43,44", "on_policy": "42,43,44", "arms": "0,1,2", "other": "42,43,44"}


def made(out: Path) -> int:
    """How many stages are done."""
    store = Store(out / "stages")
    return sum(store.record(key) is not None for key in store.every())


def run(out: Path, name: str, *options: str) -> dict[str, Any]:
    """One run to its end: what was typed, seconds, stages, scores, tests."""
    command = ["ts-loop", *options, "--name", name]
    before, begun = made(out), time.monotonic()
    subprocess.run([TS_LOOP, *command[1:], "--out", out, "-q"], check=True)
    seconds = time.monotonic() - begun
    noted, results = read_json(out / name / "run.json"), read_json(out / name / "results.json")
    asked = evidence.read(out / name)
    gains = evidence.gains(asked)
    return {
        "command": " ".join(shown(command)),
        "seconds": seconds,
        "stages": len({step["key"] for step in noted["steps"]}),
        "steps": len(noted["steps"]),
        "made": made(out) - before,
        "rows": [{key: row[key] for key in (*KEPT, "closed_traces")} for row in results["rows"]],
        "gains": [evidence.as_json(one) for one in gains],
        "arms": [evidence.arm_json(one) for one in evidence.arms(asked)],
        "verdict": evidence.verdict(gains),
    }


def init(folder: Path) -> Path:
    """A loop of its own for a pair of another shape, dtype and sampling; the tests' pair. Its loop.yml."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "mine/loop.yml").exists():
        made = module(ROOT / "tests/harness/foreign.py").grown(RECIPES, folder.resolve())
        pair = [word for who in ("instruct", "thinking") for word in (f"--{who}", made[who])]
        asks = ["--prompts", ROOT / "tasks/mini_math/prompts.jsonl", "--tasks", "mini_math"]
        subprocess.run([TS_LOOP, "init", "mine", *pair, *asks], check=True, cwd=folder, stdout=subprocess.DEVNULL)
    return folder.resolve() / "mine/loop.yml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=SEEDS)
    parser.add_argument("--seeds", help="; ".join(f"{what}: {seeds}" for what, seeds in SEEDS.items()))
    parser.add_argument("--iters", type=int, help="3; of arms and other, 1")
    parser.add_argument("--limit", type=int, help="of prompts and questions: to see that it works")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    recorder = Recorder(parser)
    asked = parser.parse_args()
    seeds = asked.seeds or SEEDS[asked.what]
    options = ["--iters", str(asked.iters or (1 if asked.what in ("arms", "other") else 3))]
    options += ["--limit", str(asked.limit)] if asked.limit else []
    figures: dict[str, Any] = {}
    if asked.what == "arms":
        figures["arms"] = run(asked.out, "arms", *options, "--arms", ",".join(ARMS), "--seeds", seeds)
    else:
        options += ["--distill", "on-policy"] if asked.what == "on_policy" else []
        options += ["--config", str(init(asked.out / "pair"))] if asked.what == "other" else []
        for seed in seeds.split(","):
            figures[seed] = run(asked.out, f"{asked.what}-{seed}", *options, "--seed", seed)
            print(seed, *figures[seed]["verdict"], sep="\n", flush=True)
        first = seeds.split(",")[0]
        again = run(asked.out, f"{asked.what}-again", *options, "--seed", first)
        figures["again"] = {key: again[key] for key in ("command", "seconds", "stages", "made")}
    recorder.keep(asked, f"embedded_{asked.what}", figures)


if __name__ == "__main__":
    main()
