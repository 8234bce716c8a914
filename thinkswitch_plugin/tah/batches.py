"""Rows of different lengths, put together so that little of a batch is padding. Knows lengths and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def batches(lengths: Sequence[int], tokens_at_once: int) -> Iterator[list[int]]:
    """Indices of rows, the shortest first, that make batches of so many tokens at most, padding included.

    Args:
        lengths: of each row, in tokens.
        tokens_at_once: of a batch; a longer row is a batch of its own.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[index] > tokens_at_once:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
