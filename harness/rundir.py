"""One run's folder: what was asked of it, which stages it has, and how it went.

    run.json        what was asked, resolved: settings, the stages with what each reads, versions, sittings
    outcomes.jsonl  one row a question
    results.json    one row per iteration × checkpoint × task, summed up from those
    report.html     the same to look at
    plan.json       what `ts-loop plan` said of it, if it was asked
    iter_NN/NAME    a link to the stage in the store

Knows this folder. What is done is the store's to know: a run that is taken away takes no stage with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from filelock import FileLock

from harness.errors import LoopError
from harness.files import disk_errors, read_json, write_json
from harness.stages import differences
from harness.store import held, link

BEAT_S = 5.0  # between two notes of how long this sitting has lasted


class RunDir:
    """One run's folder, which need not exist yet."""

    def __init__(self, root: Path):
        """`root` is OUT/NAME."""
        self.root = root
        self._sitting = f"{os.getpid()}-{time.time_ns()}"
        self._begun: float | None = None
        self._beat = 0.0

    @property
    def results(self) -> Path:
        """The scores, schema in the docs."""
        return self.root / "results.json"

    @property
    def outcomes(self) -> Path:
        """One row a question."""
        return self.root / "outcomes.jsonl"

    @property
    def report(self) -> Path:
        """The page to look at."""
        return self.root / "report.html"

    @property
    def plan(self) -> Path:
        """What it was planned to take."""
        return self.root / "plan.json"

    @property
    def logs(self) -> Path:
        """Logs of what belongs to no stage."""
        return self.root / "logs"

    def noted(self) -> dict[str, Any]:
        """Everything `run.json` holds.

        Raises:
            LoopError: if it cannot be read, or is of a version whose stages lay elsewhere.
        """
        noted: dict[str, Any] | None = read_json(self.root / "run.json")
        if noted is None:
            return {}
        if not isinstance(noted, dict) or "steps" not in noted:
            raise LoopError(
                f"{self.root} was made by an earlier version, whose stages lay in the run itself\n"
                "give this run another --name"
            )
        return noted

    def note(self, **facts: Any) -> None:
        """Add facts to `run.json`."""
        self._change(lambda noted: {**noted, **facts})

    def _change(self, changed: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        with disk_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / ".run.lock"):
                write_json(self.root / "run.json", {"steps": [], **changed(self.noted())}, durable=True)

    def begin(self) -> None:
        """Work begins: from here on time counts."""
        self._begun = time.monotonic()
        self.tick(at_once=True)

    def tick(self, at_once: bool = False) -> None:
        """Note how long this sitting has lasted, now and then: what kills it does not take its time away."""
        if self._begun is None or not (at_once or time.monotonic() >= self._beat):
            return
        self._beat = time.monotonic() + BEAT_S
        lasted = round(time.monotonic() - self._begun, 3)
        with contextlib.suppress(LoopError, OSError):  # no reason to end what runs: the next one makes good
            self._change(lambda noted: {**noted, "sittings": {**noted.get("sittings", {}), self._sitting: lasted}})

    def wall_s(self) -> float:
        """Wall seconds of all sittings in which this run did something."""
        return float(sum(self.noted().get("sittings", {}).values()))

    def alive(self) -> IO[str]:
        """Say, for as long as what this returns is open, that a process is at this run, between its stages too."""
        with disk_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            file = (self.root / ".alive").open("a")
        fcntl.flock(file, fcntl.LOCK_SH)
        return file

    def is_alive(self) -> bool:
        """Whether a process is at this run."""
        return held(self.root / ".alive", fcntl.LOCK_EX)

    def link(self, place: str, folder: Path) -> None:
        """Let a stage be found where a step of this run has it: "iter_01/distill"."""
        with disk_errors(self.root):
            link(self.root / place, folder)

    def unlink_others(self, kept: set[str]) -> None:
        """Drop the links of steps that this run no longer has."""
        for path in (*self.root.glob("iter_*/*"), *self.root.glob("*/iter_*/*")):
            number = path.parent.name.removeprefix("iter_")
            if path.is_symlink() and number.isdecimal() and str(path.relative_to(self.root)) not in kept:
                path.unlink(missing_ok=True)
                for folder in (path.parent, path.parent.parent):
                    with contextlib.suppress(OSError):  # it is not empty
                        folder.rmdir()


def why(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why a run's stages are other ones than they were, a line a cause: "distill: learning_rate 0.002 → 0.001".

    Args:
        old: the steps of `run.json` as they were: iteration, name, key, reads.
        new: as they are.

    Returns:
        A line a cause, the same of several iterations once. What changed only because of an earlier stage is none.
    """
    before = {place_of(step): step for step in old}
    renamed: dict[str, str] = {}
    lines: list[str] = []
    for step in new:
        was = before.get(place_of(step))
        if was is None or was["key"] == step["key"]:
            continue
        renamed[was["key"]] = step["key"]
        lines += [f"{step['name']}: {line}" for line in _causes(was["reads"], step["reads"], renamed)]
    return list(dict.fromkeys(lines))


def place_of(step: Mapping[str, Any]) -> str:
    """Where a step of `run.json` has its link; those of an earlier version do not say."""
    return str(step.get("place") or f"iter_{step['iteration']:02d}/{step['name']}")


def _causes(old: Mapping[str, Any], new: Mapping[str, Any], renamed: Mapping[str, str]) -> list[str]:
    lines = []
    for file in dict.fromkeys([*old["recipes"], *new["recipes"]]):
        lines += differences(old["recipes"].get(file, {}), new["recipes"].get(file, {}))
    for name in dict.fromkeys([*old["inputs"], *new["inputs"]]):
        was, now = old["inputs"].get(name), new["inputs"].get(name)
        stage, _, inside = str(was).partition("/")
        if was != now and f"{renamed.get(stage)}/{inside}" != now:
            lines.append(f"{name} is another one" if was and now else f"reads {name} {'now' if now else 'no more'}")
    for name, group in (("files", "other prompts"), ("tasks", "its definition changed"), ("tools", "")):
        for item in dict.fromkeys([*old[name], *new[name]]):
            was, now = old[name].get(item), new[name].get(item)
            if was != now:
                lines.append(f"{item} {was} → {now}" if name == "tools" else f"{item}: {group}")
    if old["commands"] != new["commands"] and not lines:
        lines.append("its commands changed")
    return lines
