"""Grading again through lm-eval's own task objects: what follows the trace, each answer by itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness import grading
from harness.grading import asked, grade, grade_all, main
from harness.outcomes import read

# As a person writes one who knows nothing of traces.
PLAIN = {
    "task": "mine",
    "dataset_path": "json",
    "test_split": "train",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": [], "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
FILTERED = {
    "name": "boxed",
    "filter": [{"function": "regex", "regex_pattern": r"boxed\{(-?\d+)\}"}, {"function": "take_first"}],
}
GRADER = """
def near(doc, results):
    gold, text = int(doc["answer"]), results[0].strip()
    doc["answer"] = "0"
    if not text:
        return {"near": 0.25, "exact_match": 1}
    off = abs(int(text.rpartition(">")[2] or 0) - gold)
    return {"near": {0: 1.0, 1: 0.5}.get(off, 0.0), "exact_match": int(off == 0)}
"""
SHUFFLED = """
import random
from datasets import Dataset

def docs(rows):
    return Dataset.from_list([{**row, "answer": random.random()} for row in rows])

def agrees(doc, results):
    return {"exact_match": int(float(results[0]) == doc["answer"])}
"""
AGREEING = [
    ("mini_math", [r"\boxed{78}", "The answer is 78.", r"so $70+8=78$, \boxed{078}"], r"\boxed{79}", "no idea"),
    ("mini_qa", ["yes", r"\boxed{Yes}", "The answer is yes."], "no", "unclear"),
]
QUESTIONS = [{"question": "70+8=", "answer": "78"}, {"question": "2+2=", "answer": "4"}]


@pytest.fixture(scope="module", autouse=True)
def quick_and_clean(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No index of lm-eval's own 13,000 task files, and tables that are not left in the user's cache."""
    import datasets
    import lm_eval.tasks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))
        yield


class Evaluation:
    """A task in a folder of its own, asked by lm-eval of a model that writes what it is told."""

    def __init__(self, folder: Path, include_path: Path, name: str, metadata: dict[str, Any] | None = None):
        self.folder, self.name = folder / "answers", name
        self.recipe = {"include_path": str(include_path), "metadata": metadata}

    def task(self) -> Any:
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=self.recipe["include_path"], metadata=self.recipe["metadata"] or {})
        return manager.load_task_or_group(self.name)[self.name]

    def ask(self, *written: str, limit: int | None = None) -> list[float]:
        """Have the answers given, one after the other, and logged; returns lm-eval's own scores."""
        from lm_eval.api.model import LM
        from lm_eval.evaluator import evaluate
        from lm_eval.loggers import EvaluationTracker

        class Told(LM):
            def generate_until(self, requests: list[Any]) -> list[str]:
                assert len(requests) == len(written)
                return list(written)

            def loglikelihood(self, requests: list[Any]) -> list[Any]:
                raise AssertionError

            loglikelihood_rolling = loglikelihood

        found = evaluate(Told(), {self.name: self.task()}, limit=limit, bootstrap_iters=0)
        rows = found.pop("samples")[self.name]
        first = [row[row["metrics"][0]] for row in rows if row["filter"] == rows[0]["filter"]]
        tracker = EvaluationTracker(output_path=str(self.folder / "results.json"))
        tracker.save_results_aggregated(results=found, samples={self.name: rows})
        tracker.save_results_samples(task_name=self.name, samples=rows)
        return first

    def graded(self, what: str) -> list[Any]:
        """What grading makes of it."""
        return [line[what] for line in grade_all(self.folder, self.recipe, [self.name])]

    def scores(self) -> list[list[float]]:
        """One an answer."""
        return self.graded("scores")

    def said(self) -> list[list[str | None]]:
        """One an answer."""
        return self.graded("said")


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Evaluation]:
    """A task of the user's: `made(process_results=…)` changes what PLAIN says; `code` is its utils.py."""

    def make(code: str = "", **changes: Any) -> Evaluation:
        folder = tmp_path / "tasks"
        folder.mkdir()
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
        (folder / "utils.py").write_text(code)
        written = {**PLAIN, "dataset_kwargs": {"data_files": str(folder / "data.jsonl")}, **changes}
        text = re.sub(r"'(!function [\w.]+)'", r"\1", yaml.safe_dump(written))
        (folder / "mine.yaml").write_text(text)
        return Evaluation(tmp_path, folder, "mine")

    return make


def test_a_task_that_knows_nothing_of_traces_grades_what_follows_them(made: Callable[..., Evaluation]) -> None:
    mine = made()
    assert mine.ask("<think>70+8 is 78</think>\n\n78", "<think>\n4?\n</think>\n\n5\n") == [0, 0]
    assert mine.scores() == [[1], [0]]


def test_the_prompt_may_have_opened_the_trace(made: Callable[..., Evaluation]) -> None:
    mine = made(doc_to_text="{{question}}\n<think>\n")
    assert mine.ask("70+8 is 78</think>\n78", "4") == [0, 1]
    assert mine.scores() == [[1], [0]]  # the second trace never closed, and nothing follows it


def test_a_text_without_a_trace_gets_what_lm_eval_gave_it(made: Callable[..., Evaluation]) -> None:
    mine = made()
    own = mine.ask("78", " 4")  # which lm-eval does not call a match
    assert own == [1, 0]
    assert mine.scores() == [[score] for score in own]


def test_filters_see_the_answer_alone(made: Callable[..., Evaluation]) -> None:
    mine = made(filter_list=[FILTERED, {"name": "last", "filter": [{"function": "take_first"}]}])
    own = mine.ask(r"<think>\boxed{1}? no</think>It is \boxed{78}.", r"<think>\boxed{4}</think>It is \boxed{5}.")
    assert own == [0, 1]
    assert mine.scores() == [[1], [0]]
    assert mine.said() == [["78"], ["5"]]


def test_every_repeat_is_graded(made: Callable[..., Evaluation]) -> None:
    mine = made(repeats=3)
    own = mine.ask("<think></think>78", "77", "<think>a</think>78", "5", "4", "<think>4")
    assert own == [0, 0]  # of the first answer alone
    assert mine.scores() == [[1, 0, 1], [0, 1, 0]]
    assert mine.said() == [["78", "77", "78"], ["5", "4", None]]  # the last trace never closed: nothing follows it


def test_what_answers_say_is_what_the_task_s_filters_leave(made: Callable[..., Evaluation]) -> None:
    mine = made(repeats=3, filter_list=[FILTERED])
    mine.ask(r"So \boxed{78}.", r"<think>\boxed{1}?</think>\boxed{78}, I say.", "I do not know.", *[r"\boxed{4}"] * 3)
    assert mine.scores() == [[1, 1, 0], [1, 1, 1]]
    assert mine.said() == [["78", "78", None], ["4"] * 3]


@pytest.mark.parametrize(("task", "right", "wrong", "unread"), AGREEING)
def test_answers_to_our_own_tasks_agree_if_they_read_the_same(
    repository: Path, tmp_path: Path, task: str, right: list[str], wrong: str, unread: str
) -> None:
    mine = Evaluation(tmp_path, repository / "tasks", task, {"trace_opened": False})
    row = {
        "doc_id": 0,
        "doc": {"question": "?", "answer": "78" if task == "mini_math" else "yes", "trace_opened": False},
        "doc_hash": "",
        "arguments": {"gen_args_0": {"arg_0": ""}},
        "resps": [[*right, f"<think>\\boxed{{1}}</think>{wrong}", unread]],
    }
    (line,) = grade(mine.task(), task, [row])
    assert line["scores"] == [1] * len(right) + [0, 0]
    first = line["said"][0]
    assert line["said"][:-2] == [first] * len(right)
    assert line["said"][-2] not in (first, None)
    assert line["said"][-1] is None


@pytest.mark.parametrize("vote", [{"function": "take_first_k", "k": 3}, {"function": "majority_vote"}])
def test_a_filter_that_votes_finds_one_answer_at_a_time(made: Callable[..., Evaluation], vote: dict[str, Any]) -> None:
    mine = made(repeats=3, filter_list=[{"name": "vote", "filter": [vote, {"function": "take_first"}]}])
    mine.ask("78", "<think>a</think>78", "5", "4", "5", "5")
    assert mine.scores() == [[1, 1, 0], [1, 0, 0]]


def test_a_grader_of_the_task_s_own_gets_the_first_metric_and_a_copy_of_the_row(
    made: Callable[..., Evaluation],
) -> None:
    mine = made(GRADER, process_results="!function utils.near", repeats=2)
    mine.ask("<think>a</think>78", "<think>b</think>77", "3", "<think>c</think> ")
    lines = grade_all(mine.folder, mine.recipe, ["mine"])
    assert [(line["doc_id"], line["metric"]) for line in lines] == [(0, "near"), (1, "near")]
    assert [line["scores"] for line in lines] == [[1.0, 0.5], [0.5, 0.25]]  # nothing follows the last trace


def test_a_task_that_makes_other_questions_each_time_grades_those_that_were_asked(
    made: Callable[..., Evaluation],
) -> None:
    mine = made(SHUFFLED, process_docs="!function utils.docs", process_results="!function utils.agrees")
    mine.ask("0", "0")
    (file,) = mine.folder.glob("samples_*")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        row["resps"] = [[f"<think>a</think>{row['doc']['answer']!r}"]]
    task = mine.task()
    assert asked(task, rows) == [row["doc"] for row in rows] != list(task.eval_docs)
    assert [line["scores"] for line in grade(task, "mine", rows)] == [[1], [1]]


def test_a_smoke_run_s_few_questions(made: Callable[..., Evaluation]) -> None:
    mine = made()
    mine.ask("<think></think>78", limit=1)
    assert mine.scores() == [[1]]


def test_nothing_asked_is_nothing_graded(made: Callable[..., Evaluation]) -> None:
    assert grade(made().task(), "mine", []) == []


@pytest.mark.parametrize("opened", [False, True])
def test_our_own_tasks_say_the_same_again(repository: Path, tmp_path: Path, opened: bool) -> None:
    mini = Evaluation(tmp_path, repository / "tasks", "mini_math", {"trace_opened": opened})
    golds = [int(row["answer"]) for row in mini.task().eval_docs][:6]
    begin = "" if opened else "<think>"
    own = mini.ask(*(f"{begin}it is {gold}</think>\n{gold + i % 2}" for i, gold in enumerate(golds)), limit=6)
    assert own == [1, 0] * 3
    assert mini.scores() == [[score] for score in own]
    assert [one.score for one in read(mini.folder, None)] == own


# --- the command ---


def test_the_command_writes_what_outcomes_reads(
    made: Callable[..., Evaluation], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = made(repeats=2)
    mine.ask("<think></think>78", "77", "4", "<think>4")
    recipe, out = mine.folder.parent / "recipe.yml", mine.folder.parent / "graded.jsonl"
    recipe.write_text(yaml.safe_dump({"model_args": None, **mine.recipe}))
    words = ["grading", str(mine.folder), "--recipe", str(recipe), "--out", str(out), "mine"]
    monkeypatch.setattr(sys, "argv", words)
    main()
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {"task": "mine", "doc_id": 0, "metric": "exact_match", "scores": [1, 0], "said": ["78", "77"]},
        {"task": "mine", "doc_id": 1, "metric": "exact_match", "scores": [1, 0], "said": ["4", None]},
    ]
    assert [one.score for one in read(mine.folder, None, out)] == [0.5, 0.5]
    assert not list(out.parent.glob("*.new"))

    def refused(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["grading", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        said = str(ended.value.code)
        assert len(said.splitlines()) == 1
        return said

    assert "no task other was asked there; there are mine" in refused(*words[1:-1], "other")
    assert "left no results" in refused(str(recipe.parent), *words[2:])
    assert "No such file" in refused(words[1], "--recipe", "nowhere.yml", *words[4:])
    (file,) = mine.folder.glob("samples_*")
    file.write_text(file.read_text().splitlines(keepends=True)[0])
    assert "has 1 of the 2 questions" in refused(*words[1:])
    assert len(out.read_text().splitlines()) == 2  # the last whole one stays


def test_a_score_that_json_does_not_know_is_said_when_it_is_read(
    made: Callable[..., Evaluation], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = made()
    mine.ask("78", "4")
    (mine.folder.parent / "recipe.yml").write_text(yaml.safe_dump(mine.recipe))
    monkeypatch.setattr(
        grading, "grade_all", lambda *_: [{"task": "mine", "doc_id": 0, "metric": "f1", "scores": [1j], "said": ["4"]}]
    )
    words = ["--recipe", str(mine.folder.parent / "recipe.yml"), "--out", str(mine.folder.parent / "graded.jsonl")]
    monkeypatch.setattr(sys, "argv", ["grading", str(mine.folder), *words, "mine"])
    main()
    with pytest.raises(Exception, match="mine: its first metric, f1, is not a number per question"):
        read(mine.folder, None, mine.folder.parent / "graded.jsonl")


def test_its_help_teaches() -> None:
    said = subprocess.run(
        [sys.executable, "-m", "harness.grading", "--help"], capture_output=True, text=True, check=True
    )
    for word in ("python -m harness.grading answers --recipe recipe.yml --out graded.jsonl", "log_samples", "scores"):
        assert word in said.stdout
    assert max(map(len, said.stdout.splitlines())) <= 120
