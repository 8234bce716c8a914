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
        too_long: traces left out because they have more than `trace_max_new_tokens` tokens.
    """

    path: str
    prompts: int
    with_trace: int
    unclosed: int
    too_long: int = 0  # not in the files of earlier versions

    def check(self, max_dropped_fraction: float, trace_max_new_tokens: int) -> None:
        """Refuse a dataset of which too little is left.

        Args:
            max_dropped_fraction: the largest share of traces that may be left out.
            trace_max_new_tokens: of the recipe, for the message.

        Raises:
            ValueError: nothing is left, or more than that share was left out; one line with the counts.
        """
        dropped = self.unclosed + self.too_long
        if self.prompts and dropped <= max_dropped_fraction * (self.prompts + dropped):
            return
        mend = "give the model more tokens to close its traces" if dropped else "was the dataset generated?"
        if self.too_long > self.unclosed:
            mend = f"{self.too_long} traces have more than {trace_max_new_tokens} tokens: raise trace_max_new_tokens"
        if not self.prompts:
            raise ValueError(f"on_policy_kl: {self.path}: no prompt is left; {mend}")
        raise ValueError(
            f"on_policy_kl: {self.path}: {self.line()}, over max_dropped_fraction {max_dropped_fraction:g}; {mend}, or "
            "raise on_policy_kl: max_dropped_fraction"
        )

    def line(self) -> str:
        """The counts in one line, without the dataset's name."""
        traced = f", {self.with_trace} with a trace for the teacher" if self.with_trace else ""
        left = [f"{self.unclosed} whose trace never closed"] if self.unclosed else []
        left += [f"{self.too_long} whose trace has more than trace_max_new_tokens"] if self.too_long else []
        return f"{self.prompts} prompts{traced}{'; left out ' if left else ''}{' and '.join(left)}"


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
        too_long=sum(report.too_long for report in reports),
    ).line()
