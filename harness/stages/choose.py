"""Choose: of thinking checkpoints rebuilt at several t, the one that goes on (`t: auto`).

By which rule, `harness.choosing` says, which is its command.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from harness.asking import ANSWERS
from harness.files import read_json
from harness.stages import OWN, RECIPE, Facts, Kind, Output, Recipe, Source, Stage, slot

CHECKPOINT, CHOICE = "thinking", "choice.json"
TOOLS = ("lm_eval", "thinkswitch_plugin", "grading", "choosing")


class Tried(NamedTuple):
    """A t that is tried.

    Attributes:
        t: weight of the instruct checkpoint; 0 for the anchor itself.
        checkpoint: rebuilt at it.
        answers: the stage in which it answered.
        graded: what that stage left of grades, inside its folder; empty for none.
    """

    t: float
    checkpoint: Source
    answers: Stage
    graded: str = ""


def build(tried: Sequence[Tried], tasks: Sequence[str], labels: Stage | None = None) -> Stage:
    """The stage.

    Args:
        tried: what there is to choose from, the anchor (t = 0) first.
        tasks: that they answered.
        labels: the anchor's first answers, with which all are compared; None where the best score is taken.
    """
    inputs: dict[str, Source] = {}
    recipe: Recipe = {"tasks": list(tasks)}
    if labels:
        inputs["labels"], inputs["asked"] = Output(labels, ANSWERS), Output(labels, RECIPE)
        recipe |= {"labels": slot("labels"), "asked": slot("asked")}
    recipe["tried"] = []
    for number, one in enumerate(tried):
        line: Recipe = {"t": one.t}
        sources: dict[str, Source] = {"checkpoint": one.checkpoint, "answers": Output(one.answers, ANSWERS)}
        if one.graded:
            sources["graded"] = Output(one.answers, one.graded)
        for what, source in sources.items():
            inputs[f"{what}_{number}"] = source
            line[what] = slot(f"{what}_{number}")
        recipe["tried"].append(line)
    command = ("python", "-m", "harness.choosing", f"{OWN}/{RECIPE}", OWN)
    return Stage(KIND, {RECIPE: recipe}, (command,), inputs, device="cpu")


def read(folder: Path, stage: Stage, tokenizer: Path | None = None) -> Facts:
    """Which t, why, and what each came to."""
    return dict(read_json(folder / CHOICE) or {})


def note(facts: Facts) -> str:
    """Which t, and why."""
    return str(facts["why"])


KIND = Kind("choose", "t is chosen", TOOLS, {}, read, note, checkpoint=CHECKPOINT, limited_as="reconstruct")
