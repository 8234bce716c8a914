"""What a folder of runs says of itself: how far each is, where its logs lie, and what none refers to any more.

Reads `run.json` and the store; runs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import asking
from harness.errors import LoopError
from harness.files import below, read_json
from harness.rundir import RunDir, place_of
from harness.stages import distill
from harness.store import BEGUN, Store
from harness.view import clock, of_first


@dataclass(frozen=True)
class Seen:
    """A run as its folder says.

    Attributes:
        name: of the run.
        steps: iteration, name, key and state (done, running, waiting) of each.
        wall_s: of all sittings.
        rows: of `results.json`.
    """

    name: str
    steps: list[dict[str, Any]]
    wall_s: float
    rows: list[dict[str, Any]]

    @property
    def done(self) -> int:
        """How many steps are done."""
        return sum(step["state"] == "done" for step in self.steps)

    @property
    def now(self) -> str:
        """What runs."""
        return ", ".join(dict.fromkeys(s["place"] for s in self.steps if s["state"] == "running"))

    @property
    def clock(self) -> str:
        """The wall time as a person says it."""
        return clock(self.wall_s)

    @property
    def scores(self) -> str:
        """The last instruct scores."""
        mine = [row for row in of_first(self.rows) if row["checkpoint"] == "instruct"]
        last = max((row["iteration"] for row in mine), default=0)
        return "  ".join(f"{row['task']} {row['accuracy']:.1%}" for row in mine if row["iteration"] == last)

    def as_json(self) -> dict[str, Any]:
        """For a program."""
        return {"name": self.name, "done": self.done, "steps": self.steps, "wall_s": self.wall_s, "rows": self.rows}


def runs(out: Path) -> list[str]:
    """The names of the runs in a folder, the newest last."""
    return [path.parent.name for path in sorted(out.glob("*/run.json"), key=lambda path: path.stat().st_mtime)]


def read_run(out: Path, name: str) -> Seen:
    """One run.

    Raises:
        LoopError: if there is none of that name.
    """
    folder, store = RunDir(out / name), Store(out / "stages")
    noted = folder.noted()
    if not noted:
        raise LoopError(f"{out / name}: no such run; there are {', '.join(runs(out)) or 'none'} in {out}")
    steps = []
    for step in noted["steps"]:
        key = step["key"]
        state = "done" if store.record(key) else "running" if store.busy(key) else "waiting"
        kept = {"iteration": step["iteration"], "name": step["name"], "place": place_of(step)}
        steps.append({**kept, "key": key, "state": state})
    results = read_json(folder.results)
    rows = results.get("rows", []) if isinstance(results, dict) else []
    return Seen(name, steps, folder.wall_s(), rows)


def log_of(out: Path, name: str | None, stage: str | None) -> Path:
    """The log to read: of a stage that is named, of one that runs, or the one written to last.

    Raises:
        LoopError: if there is no such run, stage or log.
    """
    names = runs(out)
    if not names:
        raise LoopError(f"no runs in {out}")
    seen, store = read_run(out, name or names[-1]), Store(out / "stages")
    steps = [s for s in seen.steps if stage in (None, s["name"], s["place"])]
    logs = [(s["state"] == "running", store.folder(s["key"]) / "log.txt") for s in steps]
    there = [(running, log.stat().st_mtime, log) for running, log in logs if log.is_file()]
    if not there:
        raise LoopError(f"{seen.name}: no log of {stage or 'any stage'} yet")
    return max(there)[2]


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else below(path)))


def collect(out: Path, keep: str, dry_run: bool = False) -> list[tuple[str, int]]:
    """Take away what no run refers to; of what is referred to, the checkpoints that `keep` does not name.

    Args:
        out: the folder of runs.
        keep: "all", "last" or "adapters".
        dry_run: only say.

    Returns:
        What is gone, with its bytes.

    Raises:
        LoopError: if a run's record cannot be read: what it refers to is not known then.
    """
    store = Store(out / "stages")
    referred: dict[str, bool] = {}  # key -> whether its checkpoint may be needed whatever `keep` says
    for name in runs(out):
        run = RunDir(out / name)
        steps, working = run.noted()["steps"], run.is_alive()
        last = max((step["iteration"] for step in steps), default=0)
        for step in steps:
            # A dial's, or tried before t was chosen: each is as good as made again.
            turned = place_of(step).startswith("t_") or step["name"].startswith("reconstruct_t")
            needed = working or (keep == "last" and step["iteration"] == last and not turned)
            referred[step["key"]] = referred.get(step["key"], False) or needed
            for identity in step.get("reads", {}).get("inputs", {}).values():  # of another run's stage, for a dial
                key = str(identity).partition("/")[0]
                referred[key] = referred.get(key, False) or working
    gone = []
    # What goes as a whole first: where the disk is full, what is pruned needs room for its marker.
    for key in sorted(store.every(), key=referred.__contains__):
        folder = store.folder(key)
        if store.busy(key):
            continue
        record = store.record(key)
        begun = [*asking.resumes(folder), *distill.resumes(folder)] if key in referred and record is None else []
        if begun:  # a run that was stopped goes on from these
            rest = sum(path.stat().st_size for path in below(folder)) - sum(_size(path) for path in begun)
            if not dry_run:
                with store.writing(key) as mine:
                    if mine is None:
                        continue
                    store.clear(key, [*begun, folder / BEGUN])
            gone.append((f"{key}: what it does not go on from", rest))
            continue
        if key not in referred or record is None:
            size = sum(path.stat().st_size for path in below(folder)) if dry_run else store.remove(key)
            gone.append((f"{key}: {'not referred to by any run' if key not in referred else 'never finished'}", size))
            continue
        inside = record["checkpoint"]
        if inside and keep != "all" and not referred[key] and (folder / inside).is_dir():
            size = sum(p.stat().st_size for p in below(folder / inside)) if dry_run else store.prune(key, inside)
            gone.append((f"{key}/{inside}", size))
    return gone
