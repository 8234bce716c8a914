"""Stages, stores and plans made for tests: small, and as the harness itself would leave them."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from harness.config import LoopConfig, read_recipes
from harness.loop import Run
from harness.plan import Inputs, Step, plan
from harness.rundir import RunDir
from harness.stages import External, Facts, Keys, Kind, Output, Stage
from harness.stats import interval
from harness.store import Store
from harness.tasks import Task

VERSIONS = {
    "axolotl": "0.19.0",
    "bitsandbytes": "0.50.2",
    "datasets": "4.8.4",
    "lm_eval": "0.4.11",
    "mergekit": "0.1.5",
    "peft": "0.20.0",
    "thinkswitch_plugin": "c0de",
    "torch": "2.13.0",
    "transformers": "5.16.1",
    "trl": "1.9.0",
}


def note(facts: Facts) -> str:
    return str(facts.get("said", ""))


TOY = Kind("toy", "plays", ("torch",), {"Rolling": "dice rolled", "": "moves made"}, note=note, checkpoint="weights")


def toy(name: str, *needs: Stage, **changes: Any) -> Stage:
    """A stage that reads what others leave in `out`."""
    inputs = {f"input_{number}": Output(needed, "out") for number, needed in enumerate(needs)}
    command = ("toy", "play", "<<stage>>/recipe.yml")
    return replace(Stage(TOY, {"recipe.yml": {"name": name}}, (command,), inputs), **changes)


def task(name: str, **changes: Any) -> Task:
    """A task of ours, asked once, unless `changes` says otherwise."""
    return replace(Task(name, f"definition of {name}", "generate_until", 1, True, "prompts" in name), **changes)


def finished(store: Store, key: str, files: Mapping[str, bytes], **facts: Any) -> Path:
    """A finished stage of a store, with these files in its folder."""
    folder = store.clear(key)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    known = {"kind": key.partition("-")[0], "checkpoint": None, "made_by": "test", "commands": [], "facts": {}}
    cost = {"wall_s": 1.0, "cpu_s": 2.0, "peak_memory_mb": 300.0}
    store.finish(key, {**known, **cost, **facts})
    return folder


def inputs_for(config: LoopConfig, **changes: Any) -> Inputs:
    """What a run of `config` reads, nothing of which needs to be there but its recipes."""
    return Inputs(
        recipes=read_recipes(config),
        instruct=External("/came/instruct", "identity of instruct"),
        thinking=External("/came/thinking", "identity of thinking"),
        tah=frozenset(),
        prompt_tasks=[task(name, conversations=True) for name in config.prompt_tasks],
        test_tasks=[task(name) for name in config.tasks],
        prompts=None,
        identify=lambda key, text: None,
    )._replace(**changes)


def planned(config: LoopConfig, **changes: Any) -> dict[tuple[int, str], Step]:
    """The steps of a run by their places, in order."""
    steps = plan(config, inputs_for(config, **changes), config.iterations)
    found = {(step.iteration, step.name): step for step in steps}
    assert len(found) == len(steps)
    return found


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What goes to the disk from here on, in order: ("sync", path) and ("replace", the path that is new)."""
    seen: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def sync_too(descriptor: int) -> None:
        seen.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def replace_too(source: Path, target: Path) -> None:
        seen.append(("replace", f"{source} → {target}"))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", sync_too)
    monkeypatch.setattr(os, "replace", replace_too)
    return seen


def row(iteration: int, who: str, task_name: str, correct: float, n: int = 200, **more: Any) -> dict[str, Any]:
    """A row of results.json."""
    return {
        "iteration": iteration,
        "checkpoint": who,
        "task": task_name,
        "n": n,
        "correct": correct,
        "accuracy": correct / n,
        "ci95": list(interval([1.0] * int(correct) + [0.0] * (n - int(correct)))),
        "tokens_per_answer": 9.5 if who == "instruct" else None,
        "closed_traces": 0.0 if who == "instruct" else 0.985,
        "truncated": 0.0,
        **more,
    }


def a_run(config: LoopConfig, out: Path, **changes: Any) -> Run:
    """A run as `loop.prepare` would plan it, on a pair that need not be there."""
    steps = list(planned(config, **changes).values())
    pair = {"instruct": Path("/came/instruct"), "thinking": Path("/came/thinking")}
    return Run(config, RunDir(out / config.name), Store(out / "stages"), steps, steps, Keys(VERSIONS), pair)


def printed(thing: object, width: int = 160) -> str:
    """What a terminal of that width would show, without colours."""
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(thing)
    return console.file.getvalue()  # type: ignore[attr-defined]
