"""What stripping did to datasets, in numbers and in one line.

Knows: counts. Leaves to others: where they come from (`strategy`) and where they go (`facts`). Imports nothing but the
standard library, so that whoever finds a `trace_stripping.json` can say what it says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# Opens every line of a log and every error.
PREFIX = "trace stripping"


@dataclass(frozen=True)
class Report:
    """Counts of one dataset; as a dictionary, an entry of `datasets` in `trace_stripping.json`.

    Attributes:
        path: the dataset, as the recipe names it.
        rows: conversations read.
        kept: conversations that are trained on.
        dropped: conversations by the reason why they are not, the most frequent first.
        tokens_read: tokens of all assistant turns as they came, reasoning and dropped rows included.
        tokens_kept: tokens of the assistant turns of the conversations that are trained on.
    """

    path: str
    rows: int
    kept: int
    dropped: dict[str, int]
    tokens_read: int
    tokens_kept: int

    def line(self) -> str:
        """The counts in one line, without the dataset's name."""
        removed = self.tokens_read - self.tokens_kept
        share = removed / self.tokens_read if self.tokens_read else 0.0
        return f"{self._rows()}; removed {share:.1%} of the assistant tokens ({removed} of {self.tokens_read})"

    def check(self, max_dropped_fraction: float) -> None:
        """Refuse a dataset of which too little is left.

        Args:
            max_dropped_fraction: the largest share of conversations that may be dropped.

        Raises:
            ValueError: nothing is left, or more than that share was dropped; one line with the counts.
        """
        if not self.kept:
            raise ValueError(
                f"{PREFIX}: {self.path}: {self._rows()}: nothing is left to train on; "
                "give the model more tokens to close its traces, or check tags: and trace_opened"
            )
        if self.rows - self.kept > max_dropped_fraction * self.rows:
            raise ValueError(
                f"{PREFIX}: {self.path}: {self._rows()}, over max_dropped_fraction {max_dropped_fraction:g}; "
                "give the model more tokens to close its traces, or raise trace_stripping: max_dropped_fraction"
            )

    def _rows(self) -> str:
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.dropped.items())
        dropped = f"dropped {self.rows - self.kept}" + (f" ({reasons})" if reasons else "")
        return f"kept {self.kept} of {self.rows} rows, {dropped}"


def count(path: str, reasons: Iterable[str | None], tokens_read: Iterable[int], tokens_kept: Iterable[int]) -> Report:
    """Add up the rows of one dataset.

    Args:
        path: the dataset, as the recipe names it.
        reasons: for each conversation why it was dropped, None where it was not.
        tokens_read: for each conversation the tokens of its assistant turns as they came.
        tokens_kept: for each conversation the tokens that are left of them.

    Returns:
        The counts; tokens left in a dropped conversation do not count as kept.
    """
    why = list(reasons)
    return Report(
        path=path,
        rows=len(why),
        kept=why.count(None),
        dropped=_by_frequency(Counter(reason for reason in why if reason is not None)),
        tokens_read=sum(tokens_read),
        tokens_kept=sum(tokens for tokens, reason in zip(tokens_kept, why, strict=True) if reason is None),
    )


def sentence(facts: Mapping[str, Any]) -> str:
    """What a `trace_stripping.json` says, all its datasets together, in one line.

    Args:
        facts: the file's content, `{"datasets": [a Report each]}`.
    """
    reports = [Report(**entry) for entry in facts["datasets"]]
    dropped: Counter[str] = Counter()
    for report in reports:
        dropped.update(report.dropped)
    return Report(
        path="",
        rows=sum(report.rows for report in reports),
        kept=sum(report.kept for report in reports),
        dropped=_by_frequency(dropped),
        tokens_read=sum(report.tokens_read for report in reports),
        tokens_kept=sum(report.tokens_kept for report in reports),
    ).line()


def _by_frequency(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
