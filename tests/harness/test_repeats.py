"""Questions asked several times, by lm-eval itself: avg@k, pass@k, maj@k against a slow reading of its samples.

The task is a user's: three lines that include one of ours.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from small import Ran, prepared, run_here, small_loop

from harness.errors import LoopError
from harness.runner import LocalRunner

K, QUESTIONS = 4, 12
SAMPLED = ("evaluate.gen_kwargs.do_sample=true", "evaluate.gen_kwargs.temperature=1.0")


@pytest.fixture(scope="module")
def asked(recipes: Path, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A loop that asks the pair as it came, each question four times."""
    folder = tmp_path_factory.mktemp("repeats")
    (folder / "tasks").mkdir()
    included = {"include": str(repository / "tasks/mini_math/mini_math.yaml"), "task": "mini_math_x4", "repeats": K}
    (folder / "tasks" / "mini_math_x4.yaml").write_text(yaml.safe_dump(included))
    changes = {"tasks": ["mini_math_x4"], "include_path": "tasks", "iterations": 0, "limit": QUESTIONS}
    return small_loop(recipes, folder, **changes)


@pytest.fixture(scope="module")
def ran(asked: Path, runner: LocalRunner) -> Ran:
    return run_here(asked, asked.parent / "runs", runner, SAMPLED)


def left(ran: Ran, checkpoint: str) -> list[dict[str, Any]]:
    (file,) = (ran.folder / "iter_00" / f"evaluate_{checkpoint}" / "answers").glob("samples_mini_math_x4_*.jsonl")
    return [json.loads(line) for line in file.open()]


def says(text: str, opened: bool, repository: Path) -> int | None:
    """What an answer says: the number in its last box after the trace; a text without one as the task reads it."""
    _before, closed, after = text.rpartition("</think>")
    if (opened or "<think>" in text) and not closed:
        return None
    if boxes := re.findall(r"\\boxed\{(-?\d+)\}", after):
        return int(boxes[-1])
    spec = importlib.util.spec_from_file_location("answers", repository / "tasks/answers.py")
    assert spec
    assert spec.loader
    answers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(answers)
    read: int | None = answers.read_integer(after)
    return read


def most(said: list[int | None]) -> int | None:
    """What the first to have as many votes as anyone gets says."""
    votes = [one for one in said if one is not None]
    best = max(Counter(votes).values(), default=0)
    for end in range(1, len(votes) + 1):
        if votes[:end].count(votes[end - 1]) == best:
            return votes[end - 1]
    return None


@pytest.mark.parametrize("checkpoint", ["instruct", "thinking"])
def test_the_figures_are_those_of_the_answers_that_lm_eval_logged(ran: Ran, repository: Path, checkpoint: str) -> None:
    samples = left(ran, checkpoint)
    assert len(samples) == QUESTIONS
    rights, majorities = [], []
    for sample in samples:
        (answers,) = sample["resps"]
        assert len(answers) == K
        gold = int(sample["doc"]["answer"])
        said = [says(answer, sample["doc"]["trace_opened"], repository) for answer in answers]
        rights.append([one == gold for one in said])
        majorities.append(most(said) == gold)
    (row,) = (row for row in ran.results["rows"] if row["checkpoint"] == checkpoint)
    assert (row["task"], row["n"], row["repeats"]) == ("mini_math_x4", QUESTIONS, K)
    assert row["accuracy"] == pytest.approx(sum(map(sum, rights)) / (K * QUESTIONS))
    for j in (1, 2, 4):
        draws = [any(drawn) for mine in rights for drawn in itertools.combinations(mine, j)]
        assert row["pass_at"][str(j)]["value"] == pytest.approx(sum(draws) / len(draws))
    assert row["pass_at_k"] == sum(map(any, rights)) / QUESTIONS
    assert row["maj_at_k"] == sum(majorities) / QUESTIONS
    outcomes = [json.loads(line) for line in (ran.folder / "outcomes.jsonl").open()]
    mine = [one for one in outcomes if one["checkpoint"] == checkpoint]
    assert [one["majority"] for one in mine] == majorities
    assert [one["pass_at"]["4"] for one in mine] == [any(right) for right in rights]


def test_answers_to_one_question_differ_or_nothing_above_was_tried(ran: Ran) -> None:
    several = [set(sample["resps"][0]) for sample in left(ran, "instruct")]
    assert sum(len(texts) > 1 for texts in several) > QUESTIONS / 2


def test_the_table_and_the_page_show_them(ran: Ran) -> None:
    (row,) = (row for row in ran.results["rows"] if row["checkpoint"] == "instruct")
    shown = f"{row['maj_at_k']:.1%} ({100 * row['maj_at_k_ci95'][0]:.1f}–{100 * row['maj_at_k_ci95'][1]:.1f})"
    assert "questions asked k times" in ran.said
    assert shown in ran.said
    assert shown in (ran.folder / "report.html").read_text()


def test_nothing_runs_where_each_answer_would_be_the_same(asked: Path) -> None:
    with pytest.raises(LoopError, match=r"mini_math_x4 asks each question 4 times \(repeats\), and greedy decoding"):
        prepared(asked, asked.parent / "greedy")
    assert not list((asked.parent / "greedy").glob("small"))
