"""What outcomes show: who is compared with whom, on which questions, and what is said of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from small import command_here

from harness import evidence
from harness.errors import LoopError


def asked(scores: str, **where: Any) -> list[dict[str, Any]]:
    """Outcomes of one checkpoint, a question a character: 1 right, 0 wrong."""
    place = {"run": "mine", "arm": "thinkswitch", "seed": 42, "iteration": 0, "checkpoint": "instruct", "task": "sums"}
    counted = {"answers": 1, "closed": 0, "truncated": 0, "trace_tokens": 0, "answer_tokens": 10}
    return [
        {**place, "question": f"q{number}", "score": float(score), **counted, **where}
        for number, score in enumerate(scores)
    ]


def lasting(rows: list[dict[str, Any]], folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "outcomes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


RUN = [
    *asked("0" * 20 + "1" * 10),
    *asked("1" * 30, checkpoint="thinking", trace_tokens=90),
    *asked("0" * 15 + "1" * 15, iteration=1),
    *asked("0" * 10 + "1" * 20, iteration=2),
    *asked("0" + "1" * 29, checkpoint="thinking", iteration=2, trace_tokens=90),
]


def test_the_last_iteration_is_held_against_the_pair_as_it_came() -> None:
    instruct, thinking = evidence.gains(RUN)
    assert (instruct.before.iteration, instruct.after.iteration) == (0, 2)
    assert instruct.scores == pytest.approx((1 / 3, 2 / 3))
    assert (instruct.test.gained, instruct.test.lost, instruct.test.p) == (10, 0, pytest.approx(2 / 1024))
    assert instruct.p == pytest.approx(4 / 1024), "corrected for two comparisons"
    assert instruct.tokens.value == 1.0
    assert (thinking.test.gained, thinking.test.lost, thinking.p) == (0, 1, 1.0)


def test_the_verdict_says_what_is_sure_and_what_these_questions_could_show() -> None:
    sure, unsure = evidence.verdict(evidence.gains(RUN))
    assert sure.startswith("instruct is better on sums: 33.3% → 66.7% of 30 questions (10 gained, 0 lost; p = 0.0039")
    assert unsure.startswith("no sure change of thinking on sums: 100.0% → 96.7%")
    assert "these questions would show a change of 25 points" in unsure
    worse = evidence.verdict(evidence.gains([*asked("1" * 30), *asked("0" * 15 + "1" * 15, iteration=1)]))
    assert worse[0].startswith("instruct is worse on sums")


def test_tasks_runs_and_seeds_are_not_mixed() -> None:
    other = [{**row, "run": "other", "seed": 1} for row in RUN]
    more = [{**row, "task": "words"} for row in RUN]
    found = evidence.gains([*RUN, *other, *more])
    assert len(found) == 6
    assert all(one.before.run == one.after.run for one in found)
    assert {one.test.n for one in found} == {30}


def test_a_run_of_iteration_0_alone_has_nothing_to_compare() -> None:
    assert evidence.gains(asked("0101")) == []


def test_figures_of_each_checkpoint() -> None:
    found = {(str(one.who), one.task): one for one in evidence.figures(RUN)}
    assert found["mine:instruct@2", "sums"].transferred == pytest.approx((0.5, 0.3, 0.7), abs=0.06)
    assert found["mine:instruct@0", "sums"].transferred is None
    assert found["mine:instruct@0", "sums"].per_correct.value == 30.0
    assert found["mine:thinking@0", "sums"].per_correct.value == 100.0
    uncounted = evidence.figures(asked("01", trace_tokens=None, answer_tokens=None))
    assert math.isnan(uncounted[0].per_correct.value)


def test_seeds_are_one_checkpoint_whose_questions_are_not_counted_twice() -> None:
    seeds = [*asked("0011"), *asked("0101", seed=1), *asked("1111", iteration=1), *asked("1101", seed=1, iteration=1)]
    (gain,) = evidence.gains(seeds)
    assert gain.test.n == 4
    assert gain.scores == pytest.approx((0.5, 0.875))
    assert gain.tokens.value == 1.0


def test_arms_are_held_against_the_pair_and_against_the_first() -> None:
    first = {"arm": "thinkswitch"}
    rows = [
        *asked("0" * 20 + "1" * 10, **first),
        *asked("0" * 5 + "1" * 25, **first, iteration=2),
        *asked("0" * 20 + "1" * 10, arm="merge_only"),
        *asked("0" * 20 + "1" * 10, arm="merge_only", iteration=1),
    ]
    assert [one.after.arm for one in evidence.gains(rows)] == ["thinkswitch"]
    ours, merged = evidence.arms(rows)
    assert (ours.who.iteration, ours.beside) == (2, None)
    assert ours.gain
    assert (ours.gain.test.gained, ours.gain.p) == (15, pytest.approx(2 * 2**-15))
    assert merged.gain
    assert merged.beside
    assert (merged.gain.p, merged.beside.test.lost) == (1.0, 15)
    assert ours.tokens == 10.0
    assert math.isnan(ours.accuracy.low), "one seed has no interval over seeds"
    seeds = [*rows, *[{**row, "seed": 1, "score": 1.0} for row in rows]]
    assert evidence.arms(seeds)[0].accuracy.low < evidence.arms(seeds)[0].accuracy.value
    assert evidence.arms(asked("01")) == []


def test_every_arm_has_its_scores_at_every_iteration() -> None:
    rows = [*asked("0011"), *asked("0111", iteration=1), *asked("1111", iteration=2)]
    rows += [*asked("0011", arm="merge_only"), *asked("0011", arm="merge_only", iteration=1)]
    rows += [{**row, "seed": 1, "score": 1.0} for row in rows if row["iteration"] == 2]
    found = [(row["arm"], row["iteration"], row["accuracy"], row["n"]) for row in evidence.by_arm(rows)]
    assert found == [
        ("thinkswitch", 0, 0.5, 4),
        ("thinkswitch", 1, 0.75, 4),
        ("thinkswitch", 2, 1.0, 4),
        ("merge_only", 0, 0.5, 4),
        ("merge_only", 1, 0.5, 4),
    ]


def several(scores: list[tuple[str, float, float]], **where: Any) -> list[dict[str, Any]]:
    """Outcomes of questions that were asked four times: (right answers, pass@4, maj@4) each."""
    rows = asked("0" * len(scores), answers=4, **where)
    return [
        {**row, "score": right.count("1") / 4, "pass_at": {"1": right.count("1") / 4, "4": passed}, "majority": most}
        for row, (right, passed, most) in zip(rows, scores, strict=True)
    ]


def test_pass_and_maj_are_right_or_wrong_and_have_mcnemar_s_test() -> None:
    """Avg@4 rises on ten questions; pass@4 on none; maj@4 on eight."""
    before = several([("1000", 1.0, 0.0)] * 10 + [("0000", 0.0, 0.0)] * 5)
    after = several([("1110", 1.0, 1.0)] * 8 + [("1100", 1.0, 0.0)] * 2 + [("0000", 0.0, 0.0)] * 5, iteration=1)
    found = {one.task: one for one in evidence.gains(evidence.of_several([*before, *after]))}
    assert set(found) == {"sums pass@4", "sums maj@4"}
    assert found["sums maj@4"].test[1:] == (8, 0, pytest.approx(2 / 2**8))
    assert found["sums maj@4"].p == pytest.approx(2 / 2**8), "the other one differs on no question"
    assert found["sums pass@4"].test[1:] == (0, 0, 1.0)
    (mean,) = evidence.gains([*before, *after])
    assert mean.test.gained == 10
    assert evidence.of_several(RUN) == []


def test_pass_and_maj_are_compared_at_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    one, other = [("1000", 1.0, 0.0)] * 10, [("1110", 1.0, 1.0)] * 10
    lasting([*several(one), *several(other, iteration=1)], tmp_path / "mine")
    assert command_here(monkeypatch, "compare", "mine", "--out", tmp_path) == 0
    said = capsys.readouterr().out
    assert said.index("instruct is better on sums") > said.index("sums maj@4") > said.index("25.0%")


def test_several_answers_of_several_seeds_are_their_mean() -> None:
    one = several([("1100", 1.0, 1.0), ("0000", 0.0, 0.0), ("1111", 1.0, 1.0)])
    other = several([("0000", 0.0, 0.0), ("0000", 0.0, 0.0), ("1000", 1.0, 0.0)], seed=1)
    (row,) = evidence.pooled([*one, *other])
    assert (row["repeats"], row["n"]) == (4, 3)
    assert row["pass_at_k"] == pytest.approx((0.5 + 0 + 1) / 3)
    assert row["maj_at_k"] == pytest.approx((0.5 + 0 + 0.5) / 3)
    assert row["maj_at_k_ci95"][0] < row["maj_at_k"] < row["maj_at_k_ci95"][1]


def turned(t: float, scores: str, closed: int, task: str = "sums") -> list[dict[str, Any]]:
    rows = asked(scores, run="mine.dial", arm=f"t={t:g}", iteration=1, checkpoint="thinking", task=task)
    return [{**row, "closed": int(at < closed)} for at, row in enumerate(rows)]


def test_the_dial_names_the_cliff() -> None:
    anchor = asked("1" * 9 + "0", checkpoint="thinking")
    rows = [*turned(0.5, "0" * 10, 1), *turned(0.0, "1" * 9 + "0", 10), *turned(0.25, "1" * 8 + "00", 9)]
    points = evidence.dial(rows, anchor)
    assert [(point.t, point.closed, point.agreement) for point in points] == [
        (0.0, 1.0, 1.0),
        (0.25, 0.9, 0.9),
        (0.5, 0.1, 0.1),
    ]
    assert points[0].accuracy.value == 0.9
    says = "sums: the cliff lies between t = 0.25, where 90% of the traces close, and t = 0.5, where 10% do"
    assert evidence.cliffs(points) == [says]
    assert evidence.cliffs(points[:2]) == ["sums: no cliff; the fewest traces close at t = 0.25, 90%"]
    assert evidence.cliffs([]) == []
    closing = evidence.dial([*turned(0.0, "1" * 10, 10), *turned(0.5, "1" * 9 + "0", 9), *turned(1.0, "1" * 7, 7)], [])
    assert evidence.cliffs(closing)[0].endswith("no cliff; the fewest traces close at t = 0.5, 90%")
    falling = evidence.dial([*turned(0.0, "1" * 9 + "0", 10), *turned(0.5, "1" * 7 + "000", 10)], [])
    assert evidence.cliffs(falling) == [
        "sums: no cliff; the fewest traces close at t = 0, 100%; right answers are lost all the same, most between "
        "t = 0, 90%, and t = 0.5, 70%"
    ]


def test_a_question_that_a_task_asks_twice_is_two() -> None:
    rows = asked("01")
    twice = [*rows, *rows, *[{**row, "iteration": 1, "score": 1.0, "closed": 1} for row in [*rows, *rows]]]
    (gain,) = evidence.gains(twice)
    assert (gain.test.n, gain.test.gained) == (4, 2)
    points = evidence.dial([{**row, "arm": "t=0", "closed": 1} for row in [*rows, *rows]], [])
    assert points[0].closed == 1.0


def test_a_gain_that_the_seeds_do_not_show_is_not_sure() -> None:
    before = [row for seed in (0, 1, 2) for row in asked("0" * 40 + "1" * 20, seed=seed)]
    steady = [row for seed in (0, 1, 2) for row in asked("0" * (19 + seed) + "1" * (41 - seed), seed=seed, iteration=1)]
    (sure,) = evidence.gains([*before, *steady])
    assert sure.sure
    assert sure.seeds
    assert sure.seeds.low > 0
    apart = [
        row
        for seed, right in ((0, 60), (1, 21), (2, 19))
        for row in asked("0" * (60 - right) + "1" * right, seed=seed, iteration=1)
    ]
    (unsure,) = evidence.gains([*before, *apart])
    assert unsure.p < 0.05
    assert not unsure.sure
    assert "the questions show it, the seeds do not" in evidence.verdict([unsure])[0]


def test_seeds_that_all_come_to_the_same_show_it() -> None:
    before = [row for seed in (0, 1, 2) for row in asked("0" * 40 + "1" * 20, seed=seed)]
    alike = [row for seed in (0, 1, 2) for row in asked("0" * 20 + "1" * 40, seed=seed, iteration=1)]
    (gain,) = evidence.gains([*before, *alike])
    assert gain.seeds
    assert math.isnan(gain.seeds.low)
    assert gain.sure
    assert not evidence.gains([*before, *[{**row, "iteration": 1} for row in before]])[0].sure


def test_a_run_whose_seeds_are_not_all_as_far_is_judged_where_they_are() -> None:
    rows = [row for seed in (0, 1) for row in asked("0" * 40 + "1" * 20, seed=seed)]
    rows += [row for seed in (0, 1) for row in asked("0" * 39 + "1" * 21, seed=seed, iteration=1)]
    rows += asked("1" * 60, seed=0, iteration=2)
    (gain,) = evidence.gains(rows)
    assert gain.after.iteration == 1
    assert gain.test.gained == 1
    (arm,) = evidence.arms(rows)
    assert arm.who.iteration == 1


def test_what_only_one_side_has_of_a_seed_is_left_out() -> None:
    before = [*asked("0000", seed=0), *asked("1111", seed=1)]
    (gain,) = evidence.gains([*before, *asked("1111", seed=0, iteration=1)])
    assert gain.scores == (0.0, 1.0)
    assert gain.seeds is None


def test_tokens_are_of_an_answer_however_many_there_are() -> None:
    more = [{**row, "iteration": 1, "answers": 4, "answer_tokens": 40} for row in asked("0101")]
    (gain,) = evidence.gains([*asked("0101"), *more])
    assert gain.tokens.value == 1.0


def test_seeds_taken_together_are_one_row() -> None:
    (row,) = evidence.pooled([*asked("0011"), *asked("0111", seed=1)])
    assert (row["n"], row["accuracy"], row["correct"]) == (4, 0.625, 2.5)
    assert row["tokens_per_answer"] == 10.0


def test_an_arm_is_named_and_never_taken_for_another(tmp_path: Path) -> None:
    arms = [*RUN, *[{**row, "arm": "untouched", "score": 0.0} for row in RUN]]
    lasting(arms, tmp_path / "mine")
    assert evidence.chosen(tmp_path, "mine")["sums"][0].arm == "thinkswitch"
    who, rows = evidence.chosen(tmp_path, "mine/untouched:instruct@2")["sums"]
    assert (who.arm, str(who)) == ("untouched", "mine/untouched:instruct@2")
    assert {row["score"] for row in rows.values()} == {0.0}
    lasting(turned(0.5, "01", 2), tmp_path / "mine.dial")
    with pytest.raises(LoopError, match=r"mine.dial: name one of its arms, as in mine.dial/t=0.5"):
        evidence.chosen(tmp_path, "mine.dial")
    assert evidence.chosen(tmp_path, "mine.dial/t=0.5")["sums"][0].checkpoint == "thinking"
    with pytest.raises(LoopError, match="mine/gold: name one of its arms"):
        evidence.chosen(tmp_path, "mine/gold")


def test_a_checkpoint_is_named_by_run_kind_and_iteration(tmp_path: Path) -> None:
    lasting(RUN, tmp_path / "mine")
    names = {"mine": (2, "instruct"), "mine@1": (1, "instruct"), "mine:thinking": (2, "thinking")}
    for name, (iteration, checkpoint) in {**names, "mine:thinking@0": (0, "thinking")}.items():
        who, rows = evidence.chosen(tmp_path, name)["sums"]
        assert (who.iteration, who.checkpoint, len(rows)) == (iteration, checkpoint, 30)
    for name, says in {
        "mine:thinking@1": "thinking was not evaluated in iteration 1; evaluated iterations: 0, 2",
        "mine:teacher": "write RUN, RUN:instruct",
        "nobody": "no such file",
    }.items():
        with pytest.raises(LoopError, match=says):
            evidence.chosen(tmp_path, name)


def test_other_questions_are_not_compared(tmp_path: Path) -> None:
    lasting(RUN, tmp_path / "mine")
    lasting(asked("0101", run="few"), tmp_path / "few")
    lasting(asked("0101", run="words", task="words"), tmp_path / "words")
    with pytest.raises(
        LoopError, match=r"few:instruct@0 were not asked the same questions \(30 and 4, 4 of them alike"
    ):
        evidence.between(evidence.chosen(tmp_path, "mine"), evidence.chosen(tmp_path, "few"))
    with pytest.raises(LoopError, match="no task in common: sums and words"):
        evidence.between(evidence.chosen(tmp_path, "mine"), evidence.chosen(tmp_path, "words"))


@pytest.mark.parametrize(("text", "says"), [("", "nothing was evaluated"), ('{"run": ', "not whole")])
def test_outcomes_that_cannot_be_read(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "outcomes.jsonl").write_text(text)
    with pytest.raises(LoopError, match=says):
        evidence.read(tmp_path)


def test_compare_at_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    lasting(RUN, tmp_path / "mine")
    lasting(asked("0101", run="new"), tmp_path / "new")
    assert command_here(monkeypatch, "compare", "mine", "--out", tmp_path) == 0
    assert "instruct is better on sums" in capsys.readouterr().out
    assert command_here(monkeypatch, "compare", "mine@0", "mine:thinking@0", "--out", tmp_path, "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["gained"], found["lost"], found["tokens_ratio"]["value"]) == (20, 0, 10.0)
    assert command_here(monkeypatch, "compare", "new", "--out", tmp_path) == 2
    assert "only the pair as it came" in capsys.readouterr().err
