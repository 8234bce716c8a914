"""Numbers from rows of questions: intervals, paired tests, what so many questions can show at all.

Pure: lists of numbers, one a question, in the same order for everything that is compared. What a row is, is `outcomes`'
to know. Two checkpoints are asked the same questions, so they are compared question by question: what both get right or
both get wrong says nothing of which is better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

LEVEL = 0.95
POWER = 0.8
RESAMPLES = 4999
BATCH = 500  # of them at once, in memory
ENOUGH = 5  # questions right, and wrong, from which on a mean of shares is as good as normal


class Estimate(NamedTuple):
    """A figure and the bounds of its 95 % interval, in the figure's unit; NaN where there is none."""

    value: float
    low: float
    high: float


class Paired(NamedTuple):
    """Two checkpoints on the same questions.

    Attributes:
        n: questions.
        gained: questions that the second does better.
        lost: questions that it does worse.
        p: two-sided p-value of "neither is better".
    """

    n: int
    gained: int
    lost: int
    p: float


def interval(scores: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean score, one score a question.

    Right or wrong: Wilson's (JASA 22, 1927). Shares of several answers to a question: Student's over the questions, as
    the answers to one are not independent; near 0 and 1 Wilson's, as if each question had one answer, which is never
    too narrow.

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
    if min(mean, 1 - mean) * n < ENOUGH or min(scores) == max(scores):
        z = float(stats.norm.ppf((1 + LEVEL) / 2))
        centre, half = mean + z * z / (2 * n), z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
        return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    # With enough right and wrong it ends before 0 and 1, as t² · mean · n / (n - 1) is less than five.
    half = float(stats.sem(scores)) * float(stats.t.ppf((1 + LEVEL) / 2, n - 1))
    return mean - half, mean + half


def paired(before: Sequence[float], after: Sequence[float]) -> Paired:
    """Whether one checkpoint is better than another, on the same questions.

    Right or wrong: McNemar's test, exact (Psychometrika 12, 1947): of the questions on which they differ, half would be
    gained by chance. Shares of several answers a question: the signs of the differences are turned at random.

    Args:
        before: one checkpoint's scores, each in [0, 1].
        after: the other's, in the same order.

    Raises:
        ValueError: they are not of the same questions.
    """
    from scipy import stats

    differences = [later - earlier for earlier, later in zip(before, after, strict=True)]
    gained, lost = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    if not gained + lost:
        return Paired(len(differences), 0, 0, 1.0)
    if all(score in (0, 1) for score in (*before, *after)):
        p = stats.binomtest(gained, gained + lost).pvalue
    else:
        turned: Any = stats.permutation_test(
            ([d for d in differences if d],),
            _mean,
            permutation_type="samples",
            n_resamples=RESAMPLES,
            batch=BATCH,
            rng=0,
        )
        p = turned.pvalue
    return Paired(len(differences), gained, lost, float(p))


def pass_at(answers: int, right: int, j: int) -> float:
    """pass@j of one question: how likely one at least of j answers is right.

    1 − C(n − c, j) / C(n, j), unbiased for j new answers (Chen et al., arXiv 2107.03374, eq. 1): j of the n that there
    are, drawn without putting back. With j = n it is 0 or 1.

    Args:
        answers: n, to the question.
        right: c of them, 0 to n.
        j: 1 to n.

    Raises:
        ValueError: j, or c, is outside.
    """
    if not 1 <= j <= answers or not 0 <= right <= answers:
        raise ValueError(f"pass@{j} of {right} right answers of {answers}: j is 1 to n, and c 0 to n")
    return 1 - math.comb(answers - right, j) / math.comb(answers, j)


def holm(ps: Sequence[float]) -> list[float]:
    """The p-values of several comparisons, corrected for there being several (Holm, Scand. J. Statist. 6, 1979)."""
    order = sorted(range(len(ps)), key=lambda index: ps[index])
    corrected, least = list(ps), 0.0
    for rank, index in enumerate(order):
        least = max(least, min(1.0, (len(ps) - rank) * ps[index]))
        corrected[index] = least
    return corrected


def least_gain(before: Sequence[float], after: Sequence[float]) -> float:
    """The least gain that one test of these questions would show at 5 %, four times out of five.

    Args:
        before: one checkpoint's scores.
        after: the other's.

    Returns:
        As a share of the questions; NaN where even all of them gained would not show. Right or wrong: by the exact
        test's power, as many questions being lost as the one of the two that loses less here. Shares: by the normal
        approximation, with the standard deviation of these differences.
    """
    n = len(before)
    if all(score in (0, 1) for score in (*before, *after)):
        test = paired(before, after)
        return _least(n, min(test.gained, test.lost) / n)
    import numpy as np
    from scipy import stats

    if n < 2:
        return math.nan
    needed = stats.norm.ppf((1 + LEVEL) / 2) + stats.norm.ppf(POWER)
    least = float(needed * np.std(np.subtract(after, before), ddof=1) / math.sqrt(n))
    return least if least <= 1 else math.nan


def _least(n: int, lost: float) -> float:
    from scipy import optimize

    if power(n, 1 - lost, lost) < POWER:
        return math.nan
    found = optimize.brentq(lambda gained: power(n, gained, lost) - POWER, lost, 1 - lost)
    return float(found) - lost


def power(n: int, gained: float, lost: float) -> float:
    """How often McNemar's exact test finds p <= 0.05 if each question is gained or lost with these probabilities."""
    import numpy as np
    from scipy import stats

    differ = gained + lost
    if not differ:
        return 0.0
    counts = np.arange(n + 1)  # of questions that differ
    # So few of them lost, or so few gained, that chance does it less than once in twenty: no count's tail is just that.
    few = stats.binom.ppf((1 - LEVEL) / 2, counts, 0.5) - 1
    share = gained / differ
    found = stats.binom.cdf(few, counts, 1 - share) + stats.binom.cdf(few, counts, share)
    return float(np.sum(stats.binom.pmf(counts, n, differ) * np.where(few >= 0, found, 0.0)))


def difference(before: Sequence[float], after: Sequence[float]) -> Estimate:
    """How much higher the second one's mean score is, on the same questions.

    Right or wrong: Newcombe's interval for paired proportions (Stat. Med. 17, 1998, method 10), from Wilson's of each
    and their correlation. Shares: the bootstrap over questions. Where `paired` does not find a difference, the interval
    reaches 0: it says no more than the test.
    """
    n, test = len(before), paired(before, after)
    if all(score in (0, 1) for score in (*before, *after)):
        p, q = mean(before), mean(after)
        (low_p, high_p), (low_q, high_q) = interval(before), interval(after)
        # Those that both get right are what the first does, but those that it loses.
        scale, alike = math.sqrt(p * (1 - p) * q * (1 - q)), p - test.lost / n - p * q
        alike = max(alike - 1 / (2 * n), 0.0) if alike > 0 else alike  # Newcombe's correction for continuity
        phi = alike / scale if scale else 0.0

        def reach(mine: float, other: float) -> float:
            return math.sqrt(max(0.0, mine**2 - 2 * phi * mine * other + other**2))

        found = Estimate(q - p, q - p - reach(q - low_q, high_p - p), q - p + reach(high_q - q, p - low_p))
    else:
        found = bootstrap(lambda b, a: _mean(a) - _mean(b), before, after)
    if not math.isnan(found.low) and test.p > 1 - LEVEL:
        found = found._replace(low=min(found.low, 0.0), high=max(found.high, 0.0))
    return found


def ratio(before: Sequence[float], after: Sequence[float]) -> Estimate:
    """The second one's sum over the first's: of tokens, say."""
    return bootstrap(lambda b, a: _mean(a) / _mean(b), before, after)


def per_correct(tokens: Sequence[float], scores: Sequence[float]) -> Estimate:
    """Tokens written for each question answered right; infinite where none is."""
    return bootstrap(lambda t, s: _mean(t) / _mean(s), tokens, scores)


def transferred(instruct: Sequence[float], learnt: Sequence[float], thinking: Sequence[float]) -> Estimate:
    """The share of thinking's lead over instruct that the distilled checkpoint has: 0 none, 1 all of it.

    Args:
        instruct: scores of the instruct checkpoint as it came, one a question.
        learnt: of the distilled one.
        thinking: of the thinking one as it came.

    Returns:
        NaN throughout where thinking leads by nothing that these questions show (p > 0.05).
    """
    lead = paired(instruct, thinking)
    if lead.p > 1 - LEVEL or mean(thinking) < mean(instruct):
        return Estimate(math.nan, math.nan, math.nan)
    return bootstrap(lambda i, k, t: (_mean(k) - _mean(i)) / (_mean(t) - _mean(i)), instruct, learnt, thinking)


def bootstrap(statistic: Callable[..., Any], *columns: Sequence[float]) -> Estimate:
    """A figure of questions with its interval: the questions are drawn again, with all that is known of each.

    Args:
        statistic: of arrays [..., n], over the last axis.
        columns: numbers of the same n questions.

    Returns:
        The 95 % interval is the bias-corrected and accelerated one (Efron, JASA 82, 1987); where every draw gives the
        same there is none, nor where the figure is infinite or there is one question.

    Raises:
        ValueError: the columns are not of the same questions, or of none.
    """
    import warnings

    import numpy as np
    from scipy import stats

    if not columns[0] or len({len(column) for column in columns}) > 1:
        raise ValueError("a bootstrap needs the same questions in every column, one at least")
    data = [np.asarray(column) for column in columns]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a draw without a right answer has no tokens for each
        value = float(statistic(*data))
        if len(data[0]) == 1 or not math.isfinite(value):
            return Estimate(value, math.nan, math.nan)
        found: Any = stats.bootstrap(
            data, lambda *drawn, axis: statistic(*drawn), paired=True, n_resamples=RESAMPLES, rng=0, batch=BATCH
        )
        if found.standard_error == 0:  # all questions alike: that says nothing of others
            return Estimate(value, math.nan, math.nan)
        if np.isnan(found.confidence_interval.low):  # its acceleration is not known
            # Draws as they are: between one that is finite and one that is not there is no number.
            ends = (1 - LEVEL) / 2, (1 + LEVEL) / 2
            low, high = np.nanquantile(found.bootstrap_distribution, ends, method="inverted_cdf")
            return Estimate(value, float(low), float(high))
    return Estimate(value, float(found.confidence_interval.low), float(found.confidence_interval.high))


def mean(values: Sequence[float]) -> float:
    """Of one number at least."""
    return math.fsum(values) / len(values)


def over_runs(values: Sequence[float]) -> Estimate:
    """The mean of several runs with Student's 95 % interval; without bounds for a single one, or if all are alike."""
    from scipy import stats

    middle = mean(values)
    if len(values) < 2 or min(values) == max(values):
        return Estimate(middle, math.nan, math.nan)
    half = float(stats.sem(values)) * float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1))
    return Estimate(middle, middle - half, middle + half)


def _mean(values: Any, axis: int = -1) -> Any:
    import numpy as np

    return np.mean(values, axis=axis)
