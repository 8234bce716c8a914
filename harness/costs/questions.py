"""How many questions lm-eval's tasks have, and how long an answer may be, where that is known without the network.

    python -m harness.costs.questions < QUESTIONS.json

A question is {"task", "include_path"}, the answer {"questions", "tokens"}, null where nobody can tell: data that is not
here is not fetched. In a process of its own, which takes what lm-eval's imports take.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

from harness.asking import BUDGETS
from harness.costs.aside import answer_all


def facts(question: dict[str, Any]) -> dict[str, Any]:
    """What is known of a task."""
    try:
        task = _loaded(question["task"], question.get("include_path"))
        documents = task.test_docs() if task.has_test_docs() else task.validation_docs()
        count = len(documents) * int(task.config.repeats or 1)
        said = task.config.generation_kwargs or {}
    except Exception:  # what lm-eval and a task's own code raise has no common name
        return {"questions": None, "tokens": None}
    return {"questions": count, "tokens": next((int(said[key]) for key in BUDGETS if said.get(key)), None)}


def _loaded(name: str, include_path: str | None) -> Any:
    loaded = _manager(include_path).load_task_or_group([name])
    return next(iter(loaded.values()))


@cache
def _manager(include_path: str | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    answer_all(facts)
