"""What was planned of a run, kept beside it, and what of that was used.

Knows the file and how a planned stage is known again in `run.json`: by its work, whatever arm, seed, t or iteration it
is of. Leaves the arithmetic to `estimate`. Nothing is planned here: a page that asks costs no more than reading a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness.card import Card
from harness.costs.estimate import Estimate
from harness.costs.forecast import work
from harness.errors import LoopError
from harness.files import disk_errors, read_json, write_json
from harness.stages import RECIPE, placed


class Against(NamedTuple):
    """Stages of one kind, as they were planned and as they went.

    Attributes:
        kind: of stage.
        runs: how many of them were planned.
        seconds: of all of those: planned, None where nobody knew; used by their commands.
        memory: bytes at the peak of the largest: planned, used.
    """

    kind: str
    runs: int
    seconds: tuple[float | None, float]
    memory: tuple[float, float]


def keep(lines: Sequence[Estimate], card: Card, file: Path) -> None:
    """Keep a plan: of each stage's work bytes at its peak, whether they are a GPU's, and seconds, null where unknown.

    Args:
        lines: of a run.
        card: this machine's: what is planned for another one cannot be held against what is used here.
        file: is written anew.
    """
    stages = {
        line.work: {
            "name": line.label,
            "memory": line.memory or line.main,
            "gpu": card.gpu and line.memory > 0,
            "seconds": None if line.seconds is None else line.seconds / len(line.iterations),
        }
        for line in lines
    }
    with disk_errors(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"device": card.name, "stages": stages})


def against(file: Path, done: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> tuple[str, list[Against]]:
    """A plan that was kept beside what was used: the device it was made for, and a row a kind; nothing where none was.

    Args:
        file: what `keep` wrote.
        done: steps as `run.json` has them, each with the record of its stage. One that was planned otherwise, by
            another recipe say, is left out.
    """
    try:
        kept = read_json(file) or {}
        device, stages = str(kept["device"]), dict(kept["stages"])
    except (LoopError, KeyError, TypeError, ValueError):
        return "", []  # nobody planned
    found: dict[str, dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    for step, record in done:
        recipes = step.get("reads", {}).get("recipes", {})
        if RECIPE in recipes:
            # A recipe's own files are inputs of a run, and of a plan their paths.
            files = {name: path for name, path in step.get("paths", {}).items() if name.startswith("file_")}
            if plan := stages.get(work(step["name"], record["kind"], placed(recipes[RECIPE], files))):
                found.setdefault(record["kind"], {})[step["key"]] = (plan, record)
    return device, [_row(kind, list(both.values())) for kind, both in found.items()]


def _row(kind: str, both: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> Against:
    seconds = [plan["seconds"] for plan, _ in both]
    peaks = [record["peak_gpu_memory_mb" if plan["gpu"] else "peak_memory_mb"] for plan, record in both]
    return Against(
        kind,
        len(both),
        (None if None in seconds else sum(seconds), sum(record["body_s"] for _, record in both)),
        (max(plan["memory"] for plan, _ in both), max(peaks) * 2**20),
    )
