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


class Spread(NamedTuple):
    """A mean over runs and questions, and what makes it uncertain.

    Attributes:
        mean: over all.
        over_runs: its 95 % interval if other seeds were run on these questions (Student's, over runs).
        over_questions: if these runs were asked other questions (bootstrap, over questions).
    """

    mean: float
    over_runs: tuple[float, float]
    over_questions: tuple[float, float]


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
            ([d for d in differences if d],), _mean, permutation_type="samples", n_resamples=RESAMPLES, rng=0
        )
        p = turned.pvalue
    return Paired(len(differences), gained, lost, float(p))


def holm(ps: Sequence[float]) -> list[float]:
    """The p-values of several comparisons, corrected for there being several (Holm, Scand. J. Statist. 6, 1979)."""
    order = sorted(range(len(ps)), key=lambda index: ps[index])
    corrected, least = [0.0] * len(ps), 0.0
    for rank, index in enumerate(order):
        least = max(least, min(1.0, (len(ps) - rank) * ps[index]))
        corrected[index] = least
    return corrected


def least_gain(n: int, lost: float = 0.0) -> float:
    """The least gain that so many questions show at 5 %, four times out of five.

    Args:
        n: questions.
        lost: the share of them that the better checkpoint loses; none, at best.

    Returns:
        Gained less lost questions, as a share of all, at which `paired` finds p <= 0.05 with 80 % power; NaN where even
        gaining all the others would not.
    """
    from scipy import optimize

    if power(n, 1 - lost, lost) < POWER:
        return math.nan
    found = optimize.brentq(lambda gained: power(n, gained, lost) - POWER, lost, 1 - lost, xtol=1e-4)
    return float(found) - lost


def power(n: int, gained: float, lost: float) -> float:
    """How often McNemar's exact test finds p <= 0.05 if each question is gained or lost with these probabilities."""
    from scipy import stats

    differ = gained + lost
    if not differ:
        return 0.0
    found = 0.0
    for count, chance in enumerate(stats.binom.pmf(range(n + 1), n, differ)):
        # Of `count` questions that differ, so few lost, or so few gained, that chance does it once in twenty.
        few = stats.binom.ppf((1 - LEVEL) / 2, count, 0.5)
        while few >= 0 and 2 * stats.binom.cdf(few, count, 0.5) > 1 - LEVEL:
            few -= 1
        if few >= 0:
            share = gained / differ
            found += chance * (stats.binom.cdf(few, count, 1 - share) + stats.binom.cdf(few, count, share))
    return float(found)


def difference(before: Sequence[float], after: Sequence[float]) -> Estimate:
    """How much higher the second one's mean is, in the unit of the numbers."""
    return bootstrap(lambda b, a: _mean(a) - _mean(b), before, after)


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
    if lead.p > 1 - LEVEL or lead.gained < lead.lost:
        return Estimate(math.nan, math.nan, math.nan)
    return bootstrap(lambda i, k, t: (_mean(k) - _mean(i)) / (_mean(t) - _mean(i)), instruct, learnt, thinking)


def bootstrap(statistic: Callable[..., Any], *columns: Sequence[float]) -> Estimate:
    """A figure of questions with its interval: the questions are drawn again, with all that is known of each.

    Args:
        statistic: of arrays [..., n], over the last axis.
        columns: numbers of the same n questions.

    Returns:
        The 95 % interval is the bias-corrected and accelerated one (Efron, JASA 82, 1987); where every draw gives the
        same it is the figure itself, and NaN where the figure is infinite or there is one question.

    Raises:
        ValueError: the columns are not of the same questions, or of none.
    """
    import warnings

    import numpy as np
    from scipy import stats

    if not columns[0] or len({len(column) for column in columns}) > 1:
        raise ValueError("a bootstrap needs the same questions in every column, one at least")
    data = [np.asarray(column, dtype=np.float64) for column in columns]
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a draw without a right answer has no tokens for each
        value = float(statistic(*data))
        if len(data[0]) == 1 or not math.isfinite(value):
            return Estimate(value, math.nan, math.nan)
        found: Any = stats.bootstrap(
            data, lambda *drawn, axis: statistic(*drawn), paired=True, n_resamples=RESAMPLES, rng=0, batch=500
        )
        if found.standard_error == 0:
            return Estimate(value, value, value)
        if np.isnan(found.confidence_interval.low):  # its acceleration is not known
            low, high = np.nanquantile(found.bootstrap_distribution, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
            return Estimate(value, float(low), float(high))
    return Estimate(value, float(found.confidence_interval.low), float(found.confidence_interval.high))


def mean(values: Sequence[float]) -> float:
    """Of one number at least."""
    return math.fsum(values) / len(values)


def over_runs(values: Sequence[float]) -> Estimate:
    """The mean of several runs with Student's 95 % interval; without bounds for a single one."""
    from scipy import stats

    middle = mean(values)
    if len(values) < 2:
        return Estimate(middle, math.nan, math.nan)
    half = float(stats.sem(values)) * float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1))
    return Estimate(middle, middle - half, middle + half)


def spread(runs: Sequence[Sequence[float]]) -> Spread:
    """What seeds and what questions add to the uncertainty of a mean.

    Args:
        runs: [seeds, questions], scores.
    """
    each = over_runs([mean(scores) for scores in runs])
    by_question = [mean(scores) for scores in zip(*runs, strict=True)]
    questions = bootstrap(_mean, by_question)
    return Spread(each.value, (each.low, each.high), (questions.low, questions.high))


def pass_at(k: int, right: int, answers: int) -> float:
    """The chance that one of k answers is right, where `right` of more were (Chen et al., arXiv 2107.03374, eq. 1).

    Raises:
        ValueError: k is not between 1 and the number of answers.
    """
    if not 1 <= k <= answers:
        raise ValueError(f"pass@{k} of {answers} answers: k must be from 1 to {answers}")
    return 1.0 - math.comb(answers - right, k) / math.comb(answers, k)


def _mean(values: Any, axis: int = -1) -> Any:
    import numpy as np

    return np.mean(values, axis=axis)
