"""What the rows of a dataset gave student and teacher, in numbers and in one line.

Knows: counts. Leaves to others: where they come from (`strategy`) and where they go (`facts`). Imports nothing but the
standard library, so that whoever finds an `on_policy_kl.json` can say what it says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Report:
    """Counts of one dataset; as a dictionary, an entry of `datasets` in `on_policy_kl.json`.

    Attributes:
        path: the dataset, as the recipe names it.
        prompts: what the student is asked; a prompt with several traces counts once for each.
        with_trace: prompts whose row brings the trace that the teacher reads.
        unclosed: rows left out because none of their traces ever closed.
    """

    path: str
    prompts: int
    with_trace: int
    unclosed: int

    def line(self) -> str:
        """The counts in one line, without the dataset's name."""
        traced = f", {self.with_trace} with a trace for the teacher" if self.with_trace else ""
        unclosed = f"; left out {self.unclosed} whose trace never closed" if self.unclosed else ""
        return f"{self.prompts} prompts{traced}{unclosed}"


def sentence(facts: Mapping[str, Any]) -> str:
    """What an `on_policy_kl.json` says, all its datasets together, in one line.

    Args:
        facts: the file's content, `{"datasets": [a Report each]}`.
    """
    reports = [Report(**entry) for entry in facts["datasets"]]
    return Report(
        path="",
        prompts=sum(report.prompts for report in reports),
        with_trace=sum(report.with_trace for report in reports),
        unclosed=sum(report.unclosed for report in reports),
    ).line()
