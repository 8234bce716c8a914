"""From lm-eval's files to one row a question, and from those to the rows of results.json."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from logged import OPENED, lm_eval_output, sample
from made_runs import toy

from harness.errors import StageError
from harness.outcomes import (
    Graded,
    Outcome,
    closed_share,
    cut_note,
    cut_off,
    majority,
    outcome,
    passes_at,
    question,
    read,
    read_grades,
    summary,
    token_counter,
)
from harness.stages import Stage
from harness.stats import interval


def refused(error: pytest.ExceptionInfo[StageError], *parts: str) -> None:
    """One line, two at most, that says all of these."""
    said = str(error.value)
    assert len(said.splitlines()) <= 2
    assert all(part in said for part in parts), said


def graded(file: Path, *scores: list[Any], task: str = "mine", said: list[list[str | None]] | None = None) -> Path:
    """What grading leaves; without `said` every answer says that it is right or wrong."""
    says = said or [["right" if score else "wrong" for score in each] for each in scores]
    rows = [
        {"task": task, "doc_id": i, "metric": "exact_match", "scores": each, "said": say}
        for i, (each, say) in enumerate(zip(scores, says, strict=True))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


# --- the trace decides first ---


def test_an_unclosed_trace_is_wrong_whatever_the_task_says(tmp_path: Path) -> None:
    lm_eval_output(
        tmp_path,
        mine=[
            sample("2+2=4\n</think>\n\n4", prompt=OPENED),
            sample("2+2=4, so the answer is 4", prompt=OPENED),  # right number, unfinished reasoning
            sample("4"),  # an instruct checkpoint's whole answer
            sample("<think>it is 4"),  # opened by the model itself
            sample("5", score=0.0),
        ],
    )
    found = read(tmp_path, None)
    assert [one.score for one in found] == [1, 0, 1, 0, 0]
    assert [one.closed for one in found] == [1, 0, 0, 0, 0]
    assert [one.truncated for one in found] == [0, 1, 0, 1, 0]
    (row,) = summary(found)
    assert (row["task"], row["n"], row["correct"], row["accuracy"]) == ("mine", 5, 2, 0.4)
    assert (row["closed_traces"], row["truncated"]) == (0.2, 0.4)


def test_nor_do_grades_save_an_unclosed_trace(tmp_path: Path) -> None:
    lm_eval_output(tmp_path / "answers", mine=[sample("it is 4", prompt=OPENED)])
    (one,) = read(tmp_path / "answers", None, graded(tmp_path / "graded.jsonl", [1.0]))
    assert one.score == 0


def test_the_task_s_own_word_on_an_opened_trace_counts_first(tmp_path: Path) -> None:
    says_open, says_shut = {"trace_opened": True}, {"trace_opened": False}
    lm_eval_output(tmp_path, mine=[sample("4", doc=says_open), sample("4", doc=says_shut, prompt=OPENED)])
    assert [one.score for one in read(tmp_path, None)] == [0, 1]


def test_messages_of_a_server_open_no_trace(tmp_path: Path) -> None:
    lm_eval_output(tmp_path, mine=[sample("4", prompt=[{"role": "user", "content": "<think>"}])])
    assert read(tmp_path, None)[0].score == 1


def test_traces_of_training_prompts_are_counted_over_all_tasks(tmp_path: Path) -> None:
    lm_eval_output(tmp_path, mini=[sample("</think>x"), sample("y")], mini_prompts=[sample("a</think>x", "<think>")])
    assert closed_share(tmp_path, ["mini", "mini_prompts"]) == (2, 4)


def test_a_trace_that_the_prompt_opened_is_closed_by_a_tag_of_its_own(tmp_path: Path) -> None:
    lm_eval_output(tmp_path, mini=[sample(text, prompt=OPENED) for text in ("a<think>b</think>c", "a</think>c")])
    assert closed_share(tmp_path, ["mini"]) == (1, 2)


def test_traces_of_a_task_that_lm_eval_did_not_count_are_counted(tmp_path: Path) -> None:
    lm_eval_output(tmp_path, mini=[sample("a</think>x"), sample("y")])
    (file,) = tmp_path.glob("samples_mini_*")
    file.rename(tmp_path / file.name.replace("mini", "part"))
    assert closed_share(tmp_path, ["part"]) == (1, 2)


# --- answers that ran out of tokens ---


def test_answers_of_nearly_all_their_tokens_were_cut_off(tmp_path: Path, recipes: Path) -> None:
    """A digit is a token of this tokenizer, and a tag is one, too, of many bytes."""
    budget = {"gen_args_0": {"arg_0": "", "arg_1": {"max_gen_toks": 20}}}
    few = [sample("1" * 20, "1" * 5, arguments=budget), sample("1" * 19, arguments=budget)]  # 95 %
    many = [sample("1" * 99, "1" * 98, "1" * 100), sample("</think>" * 20)]
    lm_eval_output(tmp_path, few=few, many=many)
    tokenizer = recipes / "mini/thinking"
    facts = cut_off(tmp_path, asked_for(100), tokenizer)
    assert facts == {"cut_off": {"cut": 3, "answers": 7, "budget": 100}}
    assert cut_note(facts) == "3 of 7 answers were cut off at 100 tokens (max_gen_toks)"
    assert cut_off(tmp_path, asked_for(9000), tokenizer) == {"cut_off": {"cut": 1, "answers": 7, "budget": 9000}}


def asked_for(tokens: int) -> Stage:
    """A stage whose recipe lets an answer have so many."""
    return toy("x", recipes={"recipe.yml": {"model_args": {"max_gen_toks": tokens}}})


def test_where_none_was_cut_off_or_nobody_counts_nothing_is_said(tmp_path: Path, recipes: Path) -> None:
    lm_eval_output(tmp_path, mine=[sample("four")])
    assert cut_off(tmp_path, asked_for(1), recipes / "mini/thinking")
    for tokenizer in (None, tmp_path):
        assert cut_off(tmp_path, asked_for(1), tokenizer) == {}
    assert cut_off(tmp_path, asked_for(100), recipes / "mini/thinking") == {}
    assert cut_note({}) == ""


def test_an_answer_that_is_none_is_named_whatever_is_counted(tmp_path: Path, recipes: Path) -> None:
    lm_eval_output(tmp_path, mine=[sample("4"), sample(None)])
    said = "mine: question 1: the model gave no answer"
    with pytest.raises(StageError, match=said):
        closed_share(tmp_path, ["mine"])
    with pytest.raises(StageError, match=said):
        cut_off(tmp_path, asked_for(9), recipes / "mini/thinking")


# --- several answers to a question ---


def test_every_answer_counts_and_not_the_first_alone(tmp_path: Path) -> None:
    texts = ("a</think>4", "b</think>4", "c</think>5", "never done")
    lm_eval_output(tmp_path / "answers", mine=[sample(*texts, prompt=OPENED), sample("a</think>4", prompt=OPENED)])
    found = read(tmp_path / "answers", None, graded(tmp_path / "graded.jsonl", [1, 1, 0, 1], [0.5]))
    assert [one.score for one in found] == [0.5, 0.5]  # the fourth never closed
    assert [(one.answers, one.closed, one.truncated) for one in found] == [(4, 3, 1), (1, 1, 0)]
    (row,) = summary(found)
    assert (row["n"], row["correct"], row["accuracy"]) == (2, 1, 0.5)
    assert (row["closed_traces"], row["truncated"]) == (0.8, 0.2)  # shares of answers


def test_several_answers_are_passed_if_one_is_right_and_voted_on(tmp_path: Path) -> None:
    """Of four answers: the vote of what never closed is lost, whatever it says."""
    asked = [
        sample("a</think>4", "b</think>4", "c</think>5", "never: 5", prompt=OPENED),  # 4 wins, 2 to 1
        sample("a</think>5", "b</think>5", "c</think>4", "d</think>4", prompt=OPENED),  # 5 is the first to have two
        sample("a</think>", "never", "b</think>", "c</think>", prompt=OPENED),  # nobody says anything
    ]
    lm_eval_output(tmp_path / "answers", mine=asked)
    scores = [[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]]
    said = [["4", "4", "5", "5"], ["5", "5", "4", "4"], [None, "4", None, None]]
    found = read(tmp_path / "answers", None, graded(tmp_path / "graded.jsonl", *scores, said=said))
    assert [one.majority for one in found] == [1, 0, 0]
    assert found[0].pass_at == {"1": 0.5, "2": pytest.approx(1 - 1 / 6), "4": 1.0}
    (row,) = summary(found)
    assert (row["repeats"], row["accuracy"]) == (4, pytest.approx(1 / 3))
    assert row["pass_at_k"] == row["pass_at"]["4"]["value"] == pytest.approx(2 / 3)
    assert row["pass_at"]["1"]["value"] == row["accuracy"], "one answer passes as often as it is right"
    assert row["maj_at_k"] == pytest.approx(1 / 3)
    asked_once = summary(
        [Outcome("mine", str(i), score, 1, 0, 0, None, None) for i, score in enumerate((1.0, 1.0, 0.0))]
    )
    assert row["pass_at_k_ci95"] == asked_once[0]["ci95"], "Wilson's, as of any three questions"
    assert row["maj_at_k_ci95"] == list(interval([1.0, 0.0, 0.0]))
    assert not {"repeats", "pass_at", "maj_at_k"} & asked_once[0].keys()


def test_what_never_closed_does_not_outvote_an_answer(tmp_path: Path) -> None:
    lm_eval_output(tmp_path / "answers", mine=[sample("a</think>4", "never: 5", "never: 5", prompt=OPENED)])
    (one,) = read(tmp_path / "answers", None, graded(tmp_path / "graded.jsonl", [1, 0, 0], said=[["4", "5", "5"]]))
    assert one.majority == 1


def test_two_answers_are_several_and_twelve_are_more_than_eight(tmp_path: Path) -> None:
    lm_eval_output(tmp_path / "answers", two=[sample("4", "5")], twelve=[sample(*["4"] * 12)])
    graded(tmp_path / "two", [1, 0], task="two")
    graded(tmp_path / "twelve", [1] * 12, task="twelve")
    (tmp_path / "graded.jsonl").write_text((tmp_path / "two").read_text() + (tmp_path / "twelve").read_text())
    found = summary(read(tmp_path / "answers", None, tmp_path / "graded.jsonl"))
    assert [row["repeats"] for row in found] == [2, 12]
    assert found[0]["pass_at"]["2"]["value"] == 1


def test_answers_that_say_nothing_elect_none() -> None:
    assert majority([1.0, 1.0], [None, None]) == 0
    assert majority([], []) == 0


def test_a_question_asked_once_is_neither_passed_nor_voted_on(tmp_path: Path) -> None:
    lm_eval_output(tmp_path / "answers", mine=[sample("4")])
    (one,) = read(tmp_path / "answers", None, graded(tmp_path / "graded.jsonl", [1]))
    assert (one.pass_at, one.majority) == (None, None)


ANSWERS = st.lists(st.tuples(st.sampled_from(["4", "5", "6", None]), st.booleans()), min_size=1, max_size=7)


@given(ANSWERS)
def test_pass_at_j_is_the_share_of_all_j_answers_of_which_one_is_right(answers: list[tuple[str | None, bool]]) -> None:
    scores = [float(right) for _, right in answers]
    found = passes_at(scores)
    assert set(found) >= {"1", str(len(scores))}
    for j, share in found.items():
        drawn = list(itertools.combinations(scores, int(j)))
        assert share == pytest.approx(sum(map(any, drawn)) / len(drawn), abs=1e-12)


def test_only_a_whole_score_is_right() -> None:
    assert passes_at([0.5, 0.5, 1.0])["1"] == pytest.approx(1 / 3)
    assert list(passes_at([0.0] * 12)) == ["1", "2", "4", "8", "12"]


@given(ANSWERS)
def test_the_majority_is_found_by_counting_anew_after_every_answer(answers: list[tuple[str | None, bool]]) -> None:
    said = [say for say, _ in answers]
    scores = [float(say == "4") for say in said]
    most = max((said.count(say) for say in said if say is not None), default=0)
    expected = 0.0
    for count in range(1, len(said) + 1):  # the first moment at which one has as many votes as anyone will ever have
        so_far = [say for say in said[:count] if say is not None]
        if winners := [say for say in so_far if so_far.count(say) == most]:
            expected = float(winners[0] == "4")
            break
    assert majority(scores, said) == expected


def test_grades_that_do_not_fit_the_answers(tmp_path: Path) -> None:
    lm_eval_output(tmp_path / "answers", mine=[sample("4"), sample("5")])
    for scores in ([[1]], [[1], [1, 1]]):
        with pytest.raises(StageError) as error:
            read(tmp_path / "answers", None, graded(tmp_path / "graded.jsonl", *scores))
        refused(error, "graded.jsonl", "does not fit the answers of mine", "run the same command again")


@pytest.mark.parametrize("grades", [Graded([1.0], ["4", "5"]), Graded([1.0, 0.0], ["4"])])
def test_an_outcome_is_of_as_many_grades_as_answers(grades: Graded) -> None:
    with pytest.raises(ValueError, match="zip"):
        outcome("mine", sample("4", "5"), grades, None)


def test_grades_that_are_missing_or_not_whole(tmp_path: Path) -> None:
    whole = {"task": "mine", "doc_id": 0, "metric": "exact_match", "scores": [1], "said": ["4"]}
    without = [json.dumps({key: value for key, value in whole.items() if key != name}) + "\n" for name in whole]
    for text in (None, '{"task": "mine", "doc_id"', "[]\n", *without):
        if text:
            (tmp_path / "graded.jsonl").write_text(text)
        with pytest.raises(StageError) as error:
            read_grades(tmp_path / "graded.jsonl")
        refused(error, "graded.jsonl: missing or not whole", "run the same command again")


# --- tokens ---


def test_tokens_of_traces_and_answers_by_the_checkpoint_s_own_tokenizer(tmp_path: Path, recipes: Path) -> None:
    thinking = recipes / "mini" / "thinking"
    count = token_counter(thinking)
    assert count is not None
    lm_eval_output(
        tmp_path,
        mine=[
            sample("2+2=4\n</think>\n\n4", prompt=OPENED),
            sample("2+2=4", prompt=OPENED),
            sample("four"),
            sample("a</think>\n", prompt=OPENED),
        ],
    )
    closed, unclosed, plain, empty = read(tmp_path, thinking)
    assert (closed.trace_tokens, closed.answer_tokens) == (count("2+2=4\n</think>\n\n4") - count("4"), count("4"))
    assert (unclosed.trace_tokens, unclosed.answer_tokens) == (count("2+2=4"), 0)
    assert (plain.trace_tokens, plain.answer_tokens) == (0, count("four"))
    assert (empty.trace_tokens, empty.answer_tokens) == (count("a</think>\n"), 0)
    (row,) = summary([closed, plain])
    assert row["tokens_per_answer"] == (count("2+2=4\n</think>\n\n4") + count("four")) / 2
    assert row["trace_tokens"] == closed.trace_tokens / 2
    (row,) = summary([unclosed, empty])
    assert row["tokens_per_answer"] == row["trace_tokens"] == (count("2+2=4") + count("a</think>\n")) / 2


def test_tokens_are_sums_over_answers_and_means_in_a_row(tmp_path: Path, recipes: Path) -> None:
    lm_eval_output(tmp_path / "answers", mine=[sample("four", "four", "four")])
    (one,) = read(tmp_path / "answers", recipes / "mini/instruct", graded(tmp_path / "graded.jsonl", [1, 1, 1]))
    count = token_counter(recipes / "mini/instruct")
    assert count is not None
    assert one.answer_tokens == 3 * count("four")
    assert summary([one])[0]["tokens_per_answer"] == count("four")


def test_without_a_tokenizer_nothing_is_counted(tmp_path: Path) -> None:
    lm_eval_output(tmp_path, mine=[sample("4")])
    for checkpoint in (None, tmp_path / "no_checkpoint"):
        found = read(tmp_path, checkpoint)
        assert (found[0].trace_tokens, found[0].answer_tokens) == (None, None)
        assert summary(found)[0]["tokens_per_answer"] is None
        assert summary(found)[0]["trace_tokens"] is None


# --- which question ---


def test_a_question_is_the_same_for_both_checkpoints_in_every_run_and_another_one_is_not() -> None:
    row = {"question": "2+2", "answer": "4"}
    asked = [
        sample("4", doc={**row, "trace_opened": False}, doc_hash="1"),
        sample("it is 4", doc={"trace_opened": True, **row}, prompt=OPENED, doc_hash="2"),
        sample("5", doc=row, score=0.0, doc_hash="3", doc_id=7),
        sample("4", doc={"answer": "4", "question": "2+2"}),
    ]
    assert len(set(map(question, asked))) == 1
    assert question(sample("4", doc={**row, "answer": "5"})) != question(asked[0])


def test_questions_keep_their_order_and_tasks_theirs(tmp_path: Path) -> None:
    rows = [sample("4", doc={"question": str(i)}) for i in range(3)]
    lm_eval_output(tmp_path, b=rows, a=rows[:2])
    found = read(tmp_path, None)
    assert [one.task for one in found] == ["b", "b", "b", "a", "a"]
    assert [one.question for one in found] == [*map(question, rows), *map(question, rows[:2])]
    assert [(row["task"], row["n"]) for row in summary(found)] == [("b", 3), ("a", 2)]


def test_one_filter_counts_once(tmp_path: Path) -> None:
    lm_eval_output(tmp_path, counts={"mine": 1}, mine=[sample("4"), sample("4", score=0.0, filter="other")])
    assert [one.score for one in read(tmp_path, None)] == [1]


# --- what cannot be read ---


def test_an_answer_that_is_none(tmp_path: Path) -> None:
    for rows in ([sample("4"), sample(None)], [sample("4"), sample()]):
        lm_eval_output(tmp_path, mine=rows)
        with pytest.raises(StageError) as error:
            read(tmp_path, None)
        refused(error, "mine: question 1: the model gave no answer", "log")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (1.5, "is 1.5 on a question, outside 0 to 1: it is no share of right answers; name one that is first"),
        (-0.1, "is -0.1 on a question"),
        (float("nan"), "is nan on a question"),
        ([1, 2], "is not a number per question"),
        ("1.0", "is not a number per question"),
        (None, "is not a number per question"),
    ],
)
def test_a_metric_that_is_no_share_of_right_answers(tmp_path: Path, value: Any, said: str) -> None:
    lm_eval_output(tmp_path / "answers", mine=[sample("4", score=value)])
    for grades in (None, graded(tmp_path / "graded.jsonl", [value])):
        with pytest.raises(StageError) as error:
            read(tmp_path / "answers", None, grades)
        refused(error, "mine: its first metric, exact_match", said, "name one that is first")


def test_fewer_samples_than_were_asked(tmp_path: Path, recipes: Path) -> None:
    lm_eval_output(tmp_path, counts={"mine": 3}, mine=[sample("4"), sample("5")])
    with pytest.raises(StageError) as error:
        read(tmp_path, None)
    refused(error, "samples_mine_", "has 2 of the 3 questions", "disk full", "run the same command again")
    with pytest.raises(StageError, match="2 of the 3"):
        closed_share(tmp_path, ["mine"])
    with pytest.raises(StageError, match="2 of the 3"):
        cut_off(tmp_path, asked_for(9), recipes / "mini/thinking")


def test_a_truncated_samples_file(tmp_path: Path) -> None:
    lm_eval_output(tmp_path, mine=[sample("4"), sample("5")])
    (file,) = tmp_path.glob("samples_*")
    file.write_text(file.read_text()[:-20])
    with pytest.raises(StageError) as error:
        read(tmp_path, None)
    refused(error, f"{file}:2: not whole", "run the same command again")


def test_missing_output_is_named(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="left no results; its log is beside that folder"):
        read(tmp_path, None)
    lm_eval_output(tmp_path, mine=[sample("4")])
    next(tmp_path.glob("samples_*")).unlink()
    with pytest.raises(StageError, match="left no samples of mine"):
        read(tmp_path, None)


# --- rows ---

SCORES = st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=300)


@given(SCORES)
def test_the_interval_of_a_row_holds_the_share_and_solves_wilson_s_equation(scores: list[float]) -> None:
    found = [Outcome("mine", str(i), score, 1, 0, 0, None, None) for i, score in enumerate(scores)]
    (row,) = summary(found)
    (low, high), n = row["ci95"], len(scores)
    assert 0 <= low <= row["accuracy"] <= high <= 1
    assert isinstance(row["correct"], int)
    for bound in (low, high):  # the two shares whose own standard error puts p at z: (p - b)^2 = z^2 b (1 - b) / n
        assert (row["accuracy"] - bound) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / n, abs=1e-7)


def test_no_outcomes_are_no_rows() -> None:
    assert summary([]) == []


def test_shares_of_answers_are_summed_as_they_are() -> None:
    rows = [Outcome("mine", str(i), score, 4, 4, 0, None, None) for i, score in enumerate((0.25, 0.5, 0.75, 0.75))]
    assert [(row["correct"], row["accuracy"]) for row in summary(rows)] == [(2.25, 0.5625)]
