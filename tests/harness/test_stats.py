"""Intervals of scores, against the equations they come from."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize

from harness.stats import interval

Z = statistics.NormalDist().inv_cdf(0.975)
COUNTS = st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
SHARES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=2, max_size=60)


def answers(correct: int, n: int) -> list[float]:
    return [1.0] * correct + [0.0] * (n - correct)


@settings(max_examples=50)
@given(COUNTS)
def test_an_interval_of_right_and_wrong_solves_wilson_s_equation(counts: tuple[int, int]) -> None:
    correct, n = counts
    low, high = interval(answers(correct, n))
    p = correct / n
    assert 0 <= low <= p <= high <= 1
    assert low < high
    for bound in (low, high):  # the two shares whose own standard error puts p at z: (p - b)² = z² b (1 - b) / n
        assert (p - bound) ** 2 == pytest.approx(Z * Z * bound * (1 - bound) / n, abs=1e-9)


@pytest.mark.parametrize("n", [1, 30, 200, 2999])
def test_none_and_all_of_the_answers_right(n: int) -> None:
    assert interval(answers(0, n)) == (0.0, pytest.approx(Z * Z / (n + Z * Z)))
    assert interval(answers(n, n)) == (pytest.approx(n / (n + Z * Z)), 1.0)


@settings(max_examples=50)
@given(COUNTS)
def test_right_and_wrong_are_alike(counts: tuple[int, int]) -> None:
    correct, n = counts
    low, high = interval(answers(correct, n))
    assert interval(answers(n - correct, n)) == pytest.approx((1 - high, 1 - low))


@settings(max_examples=50)
@given(st.lists(st.sampled_from([0, 1, 0.0, 1.0, False, True]), min_size=1, max_size=80), st.randoms())
def test_order_and_type_of_scores_do_not_matter(scores: list[float], random: object) -> None:
    mixed = list(scores)
    random.shuffle(mixed)  # type: ignore[attr-defined]
    assert interval(mixed) == interval(answers(sum(map(int, scores)), len(scores)))


def test_the_paper_s_table() -> None:
    """Of 30 questions, 13 and 18 right: the intervals overlap widely, which a reader has to see."""
    assert interval(answers(13, 30)) == pytest.approx((0.2738, 0.6080), abs=5e-5)
    assert interval(answers(18, 30)) == pytest.approx((0.4232, 0.7541), abs=5e-5)


def student(nu: int) -> float:
    """The two-sided 95 % point of Student's t, from its density."""

    def density(x: float) -> float:
        scale = math.lgamma((nu + 1) / 2) - math.lgamma(nu / 2) - math.log(nu * math.pi) / 2
        return math.exp(scale - (nu + 1) / 2 * math.log1p(x * x / nu))

    return float(optimize.brentq(lambda x: integrate.quad(density, -x, x)[0] - 0.95, 1, 50))


@pytest.mark.parametrize("scores", [[0.5, 0.75], [0.0, 0.25, 1.0, 0.5, 0.5, 0.75], [0.25, 0.5] * 20])
def test_shares_of_several_answers_are_student_s_over_the_questions(scores: list[float]) -> None:
    mean, n = statistics.mean(scores), len(scores)
    half = student(n - 1) * statistics.stdev(scores) / math.sqrt(n)
    assert interval(scores) == pytest.approx((max(0.0, mean - half), min(1.0, mean + half)), abs=1e-6)


@settings(max_examples=50)
@given(SHARES)
def test_an_interval_holds_the_mean_and_stays_between_0_and_1(scores: list[float]) -> None:
    low, high = interval(scores)
    assert 0 <= low <= statistics.fmean(scores) + 1e-12
    assert statistics.fmean(scores) - 1e-12 <= high <= 1


@settings(max_examples=50)
@given(SHARES)
def test_few_questions_are_never_certain(scores: list[float]) -> None:
    """Alike by chance is not alike for ever: two questions that scored 0.5 each say little of a third."""
    low, high = interval(scores)
    assert high - low > 0


def test_one_question_of_which_some_answers_are_right_says_nothing() -> None:
    assert interval([0.25]) == (0.0, 1.0)


def test_more_questions_say_more() -> None:
    widths = [high - low for low, high in (interval([0.25, 0.5, 1.0] * n) for n in (2, 10, 50))]
    assert widths == sorted(widths, reverse=True)


def test_there_is_no_interval_of_nothing() -> None:
    with pytest.raises(ValueError, match="at least one"):
        interval([])
