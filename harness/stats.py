"""Numbers from rows of questions. Pure; what a row is, is `outcomes`' to know."""

from __future__ import annotations

import math
from collections.abc import Sequence

LEVEL = 0.95


def interval(scores: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean score, one score a question.

    Right or wrong: Wilson's (JASA 22, 1927). Shares of several answers to a question: Student's over the questions, as
    the answers to one are not independent.

    Args:
        scores: each in [0, 1].

    Returns:
        (low, high), in [0, 1].

    Raises:
        ValueError: if there is no score.
    """
    from scipy import stats  # a second to import, which `--help` need not wait for

    n = len(scores)
    if n < 1:
        raise ValueError("an interval needs at least one answer")
    mean = math.fsum(scores) / n
    if all(score in (0, 1) for score in scores):
        found = stats.binomtest(round(math.fsum(scores)), n).proportion_ci(LEVEL, method="wilson")
        # At 0 and 1 the bound is the share itself, which rounding may miss by an epsilon.
        return min(mean, float(found.low)), max(mean, float(found.high))
    if n == 1:
        return 0.0, 1.0
    if min(scores) == max(scores):  # alike by chance: Wilson's, as if each were right or wrong
        z = float(stats.norm.ppf((1 + LEVEL) / 2))
        centre, half = mean + z * z / (2 * n), z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
        return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    error = float(stats.sem(scores))
    half = error * float(stats.t.ppf((1 + LEVEL) / 2, n - 1))
    return max(0.0, mean - half), min(1.0, mean + half)
