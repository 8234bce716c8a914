"""Angles: how far two checkpoints' weights point apart, tensor by tensor, which says what a merge of them can do.

`harness.angles` is its command and has the math. What it leaves holds for every t.
"""

from __future__ import annotations

from pathlib import Path

from harness import angles
from harness.files import read_json
from harness.stages import OWN, Facts, Kind, Source, Stage, slot

LEFT = "angles.json"


def build(thinking: Source, instruct: Source) -> Stage:
    """The stage.

    Args:
        thinking: the anchor of a merge.
        instruct: the other.
    """
    command = ("python", "-m", "harness.angles", slot("thinking"), slot("instruct"), "--out", f"{OWN}/{LEFT}")
    return Stage(KIND, {}, (command,), {"thinking": thinking, "instruct": instruct}, device="cpu")


def read(folder: Path, stage: Stage, tokenizer: Path | None = None) -> Facts:
    """The whole of it: three numbers a tensor."""
    return dict(read_json(folder / LEFT) or {})


def note(facts: Facts) -> str:
    """The range of angles."""
    every, *_ = angles.summed_up(angles.of_json(facts), [0.5])
    return f"{every.least:.2f}° to {every.most:.2f}° over {every.tensors} tensors"


KIND = Kind("angles", "weights are compared", ("torch", "angles"), {}, read, note, limited_as="reconstruct")
