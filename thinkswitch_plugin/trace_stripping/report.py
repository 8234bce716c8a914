"""What stripping did to one dataset, in numbers and in one line.

Knows: counts. Leaves to others: where they come from (`strategy`) and where the line goes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

# Opens every line, so that a reader of a log finds it: ts-loop does.
PREFIX = "trace stripping"


@dataclass(frozen=True)
class Report:
    """Counts of one dataset.

    Attributes:
        path: the dataset, as the recipe names it.
        kept: conversations that are trained on.
        dropped: (reason, conversations) pairs, the most frequent first.
        tokens_read: tokens of all assistant turns as they came, reasoning and dropped rows included.
        tokens_kept: tokens of the assistant turns of the conversations that are trained on.
    """

    path: str
    kept: int
    dropped: tuple[tuple[str, int], ...]
    tokens_read: int
    tokens_kept: int

    @property
    def dropped_rows(self) -> int:
        """Conversations dropped, for whatever reason."""
        return sum(count for _, count in self.dropped)

    def line(self) -> str:
        """The one line that ends the log of a dataset."""
        removed = self.tokens_read - self.tokens_kept
        share = removed / self.tokens_read if self.tokens_read else 0.0
        return (
            f"{PREFIX}: {self.path}: {self._rows()}; removed {share:.1%} of the assistant tokens "
            f"({removed} of {self.tokens_read})"
        )

    def check(self, max_dropped_fraction: float) -> None:
        """Refuse a dataset of which too little is left.

        Args:
            max_dropped_fraction: the largest share of conversations that may be dropped.

        Raises:
            ValueError: nothing is left, or more than that share was dropped; one line with the counts.
        """
        total = self.kept + self.dropped_rows
        if not self.kept:
            raise ValueError(
                f"{PREFIX}: {self.path}: {self._rows()}: nothing is left to train on; "
                "give the model more tokens to close its traces, or check tags: and trace_opened"
            )
        if self.dropped_rows > max_dropped_fraction * total:
            raise ValueError(
                f"{PREFIX}: {self.path}: {self._rows()}, over max_dropped_fraction {max_dropped_fraction:g}; "
                "give the model more tokens to close its traces, or raise trace_stripping: max_dropped_fraction"
            )

    def _rows(self) -> str:
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.dropped)
        total = self.kept + self.dropped_rows
        return f"kept {self.kept} of {total} rows, dropped {self.dropped_rows}" + (f" ({reasons})" if reasons else "")


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
    dropped = Counter(reason for reason in why if reason is not None)
    return Report(
        path=path,
        kept=why.count(None),
        dropped=tuple(sorted(dropped.items(), key=lambda item: (-item[1], item[0]))),
        tokens_read=sum(tokens_read),
        tokens_kept=sum(tokens for tokens, reason in zip(tokens_kept, why, strict=True) if reason is None),
    )
