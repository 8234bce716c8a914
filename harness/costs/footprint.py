"""What a training recipe takes: the most bytes that are alive in its step, and what its weights and optimizer take.

The recipe's own step is run on fake tensors (`traces`) at two numbers of layers, and each figure goes on linearly to as
many as the checkpoint has: layers are alike. That is done in a process of its own, as what is traced takes seconds to
import; the answer is kept.

Leaves to others how long rows are (`estimate`) and how a step is traced (`traces`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.costs import aside

DEPTHS = (2, 4)  # layers of the two traces


@dataclass(frozen=True)
class Question:
    """What is to be traced.

    Attributes:
        recipe: Axolotl's, resolved.
        student: a checkpoint's config.json, read.
        teacher: the same of the teacher of an on-policy recipe; None where it has none of its own.
        rows: rows of a micro-batch.
        prompt: tokens that the student reads, and `answer` those it learns from, of one row.
        answer: see above.
        context: tokens that the teacher reads before the answer.
        hard: share of answer tokens that Think-at-Hard reads twice.
        gpu: it runs on a GPU.
    """

    recipe: dict[str, Any]
    student: dict[str, Any]
    teacher: dict[str, Any] | None
    rows: int
    prompt: int
    answer: int
    context: int = 0
    hard: float = 1.0
    gpu: bool = True


@dataclass(frozen=True)
class Footprint:
    """Bytes, of a whole checkpoint; each figure is linear in its layers.

    Attributes:
        weights: of all models, scales of NF4 among them, with the adapter or whatever else is trained.
        states: of the optimizer.
        trained: numbers that are trained.
        ragged: at most in small blocks that come and go, of which a CPU's heap keeps some.
        step: most alive in forward and backward, weights and gradients among them, states not.
        loss: the same while an on-policy loss works; 0 elsewhere.
        reading: the same while the student reads its prompts; 0 where it writes no answers.
        answering: the same when its answers are as long as they may be.
    """

    weights: int
    states: int
    trained: int
    ragged: int
    step: int
    loss: int = 0
    reading: int = 0
    answering: int = 0

    @property
    def peak(self) -> int:
        """The most that is alive at once."""
        return self.states + max(self.step, self.loss, self.reading, self.answering)


def extrapolated(low: Footprint, high: Footprint, layers: int) -> Footprint:
    """From footprints at the two `DEPTHS` to one at so many layers, each figure along a straight line."""
    few, more = DEPTHS
    start, end = asdict(low), asdict(high)
    return Footprint(
        **{name: round(start[name] + (end[name] - start[name]) / (more - few) * (layers - few)) for name in start}
    )


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A checkpoint's config, of a Think-at-Hard one its backbone's."""
    inner = config.get("text_config")
    return inner if config.get("model_type") == "tah" and isinstance(inner, dict) else config


def ask(questions: Sequence[Question], cache: Path) -> list[Footprint]:
    """The footprint of each question's step, from the cache or traced, which takes seconds.

    Raises:
        LoopError: a recipe or checkpoint cannot be traced; one line.
    """
    return [Footprint(**found) for found in aside.ask("traces", [asdict(question) for question in questions], cache)]
