"""The tasks on the hub's own questions, third-party data that may lie beside the checkout; not collected elsewhere."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

TASKS = {"aime26": 30, "pubmedqa30": 30, "tah_gsm8k": 1319, "tah_math500": 500, "tah_aime25": 30}


@pytest.fixture
def real_hub(repository: Path, enter_hub: Callable[[Path], None]) -> Path:
    folder = repository.parent / "shared" / "data" / "hub"
    enter_hub(folder)
    return folder


def test_reference_answers_are_right_for_their_own_question_only(real_hub, load_task, task_module) -> None:
    for task, count in TASKS.items():
        loaded = load_task(task)
        rows = list(loaded.eval_docs)
        assert len(rows) == count
        # One row an answer: GSM8K has few different ones.
        rows = list({row["answer"]: row for row in rows}.values())
        for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
            asked = loaded.doc_to_text(row)
            assert row.get("problem", row.get("question")) in asked
            assert row.get("long_answer", "####") not in asked
            assert loaded.process_results(row, [rf"So $\boxed{{{row['answer']}}}$."])["exact_match"] == 1, row["answer"]
            wrong = loaded.process_results(row, [rf"So $\boxed{{{other['answer']}}}$."])["exact_match"]
            # Two questions of MATH-500 have the same answer, one with the name of the variable.
            assert not wrong or {row["answer"], other["answer"]} == {"5", "x=5"}
    # Written another way, so that no comparison of strings can tell.
    same = task_module("tah_math/verifier.py").same
    for task in ("tah_gsm8k", "tah_math500", "tah_aime25"):
        golds = {row["answer"] for row in load_task(task).eval_docs}
        values = {
            gold for gold in golds if not re.search(r"[,=_$]|\\(?:text|mbox|in|pm|cup|circ|begin)(?![a-z])", gold)
        }
        assert len(values) > 0.7 * len(golds)
        assert sum(same(gold, rf"\frac{{2({gold})}}{{2}}") for gold in values) >= 0.99 * len(values)


def test_pubmed_ids_follow_the_documented_rule(real_hub, load_task, tasks_folder, task_module) -> None:
    from datasets import load_dataset

    choice = task_module("pubmedqa/choose_ids.py")
    official = json.loads((real_hub.parent / "pubmedqa_test_ground_truth.json").read_text(encoding="utf-8"))
    labeled = [str(pubid) for pubid in load_dataset("qiaojin/PubMedQA", "pqa_labeled", split="train")["pubid"]]
    test, prompts = (
        (tasks_folder / "pubmedqa" / f"{kind}_ids.txt").read_text(encoding="utf-8").split()
        for kind in ("test", "prompt")
    )
    assert choice.choose_test_ids(official) == test
    assert choice.choose_prompt_ids(labeled, official) == prompts
    assert Counter(official[pubmed_id] for pubmed_id in test) == {"yes": 17, "no": 10, "maybe": 3}
    assert {row["answer"] == official[str(row["pubid"])] for row in load_task("pubmedqa30").eval_docs} == {True}


def test_no_test_question_is_a_training_prompt(real_hub, load_task) -> None:
    for test, prompts, column in (
        ("aime26", "aime_prompts15", "problem"),
        ("pubmedqa30", "pubmedqa_prompts15", "question"),
    ):
        asked = [row["messages"][0]["content"] for row in load_task(prompts).eval_docs]
        assert len(asked) == 15
        assert not any(row[column] in text for row in load_task(test).eval_docs for text in asked)
