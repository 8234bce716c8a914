"""A loop made short, on the embedded pair: what the tests of the loop share."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from harness import cli, loop
from harness.config import load, read_recipes
from harness.runner import LocalRunner
from harness.view import View

KNOWN: dict[str, Any] = {}  # what lm-eval said so far
TAKEN: set[str] = set()  # recipes that their tools took so far
TS_LOOP = str(Path(sys.executable).with_name("ts-loop"))


def small_loop(recipes: Path, folder: Path, **changes: Any) -> Path:
    """The shipped loop with its own recipes, made short: few prompts of one's own, one epoch, 20 questions."""
    folder.mkdir(exist_ok=True)
    for file in recipes.glob("*.yml"):
        shutil.copy(file, folder)
    for name in ("instruct_distill.yml", "on_policy_kl.yml"):
        written = yaml.safe_load((folder / name).read_text())
        short = {"num_epochs": 1, "micro_batch_size": 16, "datasets": [{"type": written["datasets"][0]["type"]}]}
        (folder / name).write_text(yaml.safe_dump({**written, **short}))
    questions = [json.loads(line) for line in (recipes.parent / "tasks/mini_math/prompts.jsonl").open()][:32]
    rows = [{"problem": question["question"], "answer": "0"} for question in questions]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    written = yaml.safe_load((folder / "loop.yml").read_text())
    pair = {who: str(recipes / written[who]) for who in ("instruct", "thinking")}
    asked = {"name": "small", "prompts": ["mine.jsonl"], "tasks": ["mini_qa"], "iterations": 1, "limit": 20}
    (folder / "loop.yml").write_text(yaml.safe_dump({**written, **pair, **asked, **changes}))
    return folder / "loop.yml"


def ts_loop(*options: object, code: int = 0, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command itself, to its end."""
    said = subprocess.run(
        [TS_LOOP, *map(str, options)], cwd=cwd, capture_output=True, text=True, timeout=600, check=False
    )
    assert "Traceback" not in said.stderr, said.stderr
    assert said.returncode == code, said.stdout + said.stderr
    return said


def command_here(monkeypatch: pytest.MonkeyPatch, *options: object) -> int:
    """The command in this process; its exit code. Its signal handlers are for a process that ends, and go again."""
    monkeypatch.setattr(sys, "argv", ["ts-loop", *map(str, options)])
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with pytest.raises(SystemExit) as ended:
        cli.main()
    for number, handler in kept.items():
        signal.signal(number, handler)
    return int(ended.value.code or 0)


class Ran:
    """What a run in this process printed, did and left."""

    def __init__(self, run: loop.Run, said: str, results: dict[str, Any]):
        """`run` is over."""
        self.run, self.said, self.results = run, said, results
        self.folder = run.folder.root

    @property
    def keys(self) -> dict[str, str]:
        """Each step's key, by "iteration/name"."""
        return {f"{step.iteration}/{step.name}": self.run.keys[step.stage] for step in self.run.steps}

    def made(self) -> dict[str, int]:
        """When each stage was marked done, by key: a stage that ran again has another time."""
        marks = {key: self.run.store.folder(key) / "stage.json" for key in self.keys.values()}
        return {key: mark.stat().st_mtime_ns for key, mark in marks.items() if mark.exists()}


def prepared(
    config: Path,
    out: Path,
    changes: tuple[str, ...] = (),
    wishes: loop.Wishes = loop.Wishes(),  # noqa: B008
    view: View | None = None,
    **overrides: Any,
) -> loop.Run:
    """A run as it is planned; what lm-eval knows of its tasks is asked for once, not for each folder of runs."""
    settings = load(config, overrides, changes)
    cache = out / "stages" / ".tasks.json"
    if KNOWN and not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_text(json.dumps(KNOWN))
    run = loop.prepare(settings, read_recipes(settings, changes), out.resolve(), view or View(), wishes)
    KNOWN.update(json.loads(cache.read_text()))
    if TAKEN:
        (out / "stages" / ".recipes.json").write_text(json.dumps(sorted(TAKEN)))
    return run


def run_here(
    config: Path,
    out: Path,
    runner: LocalRunner,
    changes: tuple[str, ...] = (),
    wishes: loop.Wishes = loop.Wishes(),  # noqa: B008
    **overrides: Any,
) -> Ran:
    """The loop as the command runs it, in this process and on a runner that is there already."""
    console = Console(file=io.StringIO(), width=200, highlight=False)
    run = prepared(config, out, changes, wishes, View(console), **overrides)
    results = loop.go(run, View(console), runner)
    if (taken := out / "stages" / ".recipes.json").exists():
        TAKEN.update(json.loads(taken.read_text()))
    return Ran(run, console.file.getvalue(), results)  # type: ignore[attr-defined]
