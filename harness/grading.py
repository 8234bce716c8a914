"""Grade an evaluation's answers again, on what follows their traces and each answer by itself, and read what each says.

    python -m harness.grading FOLDER --recipe recipe.yml --out graded.jsonl TASK …

lm-eval hands a task the whole text: a task that is not ours compares "<think> … </think> 78" with "78", and of several
answers to a question only the first counts. Here lm-eval's own task object, with its own filters and metrics, is given
each answer without its trace; a text without one gets what lm-eval gave it, and so does a task that takes traces away
itself. What an answer says, by which answers to one question agree or not, is what the task's filters leave of it; or
what its grader's own `reads` does, a function of the answer without its trace (our tasks', see `tasks/answers.py`).

Knows lm-eval's task objects. Leaves to `outcomes` what a score means and who wins a vote. Writes a line a question:
`{"task", "doc_id", "metric", "scores": [one an answer], "said": [one an answer, null where it says nothing]}`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from harness.asking import after_trace, asked_tasks, opened_trace, samples, texts
from harness.errors import LoopError
from thinkswitch_plugin.trace_stripping import split_trace

UNREAD = ("", "[invalid]")  # what lm-eval's filters leave where they find nothing
EXAMPLE = """\
a line a question is written: {"task": …, "doc_id": …, "metric": …, "scores": [one an answer], "said": [the same]}

for example, after `lm_eval run --config recipe.yml` with `output_path: answers/results.json` and `log_samples: true`:
  python -m harness.grading answers --recipe recipe.yml --out graded.jsonl gsm8k
"""


def grade(task: Any, name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Score every answer of one task's logged samples.

    Args:
        task: lm-eval's task object.
        name: its name.
        rows: the samples.

    Returns:
        A line a question, as the module says.
    """
    from lm_eval.api.instance import Instance

    (filters, *_) = task._filters
    docs = asked(task, rows)
    reads = getattr(task.config.process_results, "reads", None)
    written = [[graded_text(text, row) for text in texts(row, name)] for row in rows]
    lines: list[dict[str, Any]] = [
        {"task": name, "doc_id": row["doc_id"], "metric": "", "scores": [], "said": []} for row in rows
    ]
    for turn in range(max(map(len, written), default=0)):
        having = [i for i, answers in enumerate(written) if turn < len(answers)]
        # As often as the question was asked: a filter that takes the first k or a vote finds k that agree.
        instances = [
            Instance("generate_until", docs[i], ("", {}), 0, resps=[written[i][turn]] * len(written[i])) for i in having
        ]
        filters.apply(instances)
        for i, instance in zip(having, instances, strict=True):
            left = instance.filtered_resps[filters.name]
            metrics = task.process_results(copy.deepcopy(docs[i]), [left])
            metric, value = next(iter(metrics.items()))
            lines[i]["metric"] = metric
            lines[i]["scores"].append(value.item() if hasattr(value, "item") else value)
            answer = without_trace(texts(rows[i], name)[turn], rows[i])
            lines[i]["said"].append(said(reads(answer) if reads else left))
    return lines


def said(value: Any) -> str | None:
    """What was read of an answer as a text that another's can be compared with; None where it says nothing."""
    while isinstance(value, list | tuple) and value:  # a filter that takes the first k leaves k that are alike
        value = value[0]
    text = "" if value is None or isinstance(value, list | tuple) else str(value).strip()
    return None if text in UNREAD else text


def asked(task: Any, rows: list[dict[str, Any]]) -> list[Any]:
    """The questions as they were asked: the task's own, or as they were logged where it makes others each time.

    A task that shuffles the choices of its questions has them in another order here than when it was asked.
    """
    docs = task.eval_docs
    found = []
    for row in rows:
        doc = docs[row["doc_id"]] if row["doc_id"] < len(docs) else None
        found.append(doc if hash_of(doc) == row["doc_hash"] else row["doc"])
    return found


def hash_of(doc: Any) -> str:
    """lm-eval's hash of a question, as it logs it."""
    from lm_eval.utils import handle_non_serializable, hash_string

    return hash_string(json.dumps(doc, indent=2, default=handle_non_serializable, ensure_ascii=False))


def graded_text(text: str, row: dict[str, Any]) -> str:
    """What a task is given of an answer: what follows the trace, or all of it if its rows speak of traces."""
    return text if "trace_opened" in row["doc"] else without_trace(text, row)


def without_trace(text: str, row: dict[str, Any]) -> str:
    """What follows the trace; nothing where it never closed."""
    return after_trace(text, split_trace(text, opened_trace(row)))


def manager_of(recipe: Mapping[str, Any]) -> Any:
    """lm-eval's tasks as they were when a recipe asked them."""
    from lm_eval.tasks import TaskManager

    metadata = {**(recipe.get("model_args") or {}), **(recipe.get("metadata") or {})}  # as lm-eval puts them together
    return TaskManager(include_path=recipe.get("include_path"), metadata=metadata)


def grade_all(folder: Path, recipe: dict[str, Any], names: list[str]) -> list[dict[str, Any]]:
    """Score every answer to the questions of these tasks, which were asked as a recipe says.

    Raises:
        StageError: if the answers are missing or not whole.
        LoopError: if lm-eval knows no such task.
    """
    manager = manager_of(recipe)
    counts = asked_tasks(folder)
    lines = []
    for name in names:
        if name not in counts or name not in manager.all_subtasks:
            raise LoopError(f"{folder}: no task {name} was asked there; there are {', '.join(counts)}")
        rows = list(samples(folder, name, counts[name]))
        lines += grade(manager.load_task_or_group(name)[name], name, rows)
    return lines


def main() -> None:
    """The command: see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.grading",
        description="Grade an evaluation's answers with lm-eval's own tasks, each by itself and without its trace.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="what lm-eval filled: results and logged samples")
    parser.add_argument("tasks", nargs="+", metavar="TASK", help="a task that was asked, not a group")
    parser.add_argument("--recipe", type=Path, required=True, help="the lm-eval config it was asked with")
    parser.add_argument("--out", type=Path, required=True, help="the .jsonl to write")
    options = parser.parse_args()
    try:
        recipe = yaml.safe_load(options.recipe.read_text(encoding="utf-8"))
        lines = grade_all(options.folder, recipe, options.tasks)
    except (LoopError, OSError) as error:
        raise SystemExit(f"harness.grading: {error}") from None
    beside = options.out.with_suffix(".new")
    beside.write_text("".join(json.dumps(line, default=str) + "\n" for line in lines), encoding="utf-8")
    os.replace(beside, options.out)


if __name__ == "__main__":
    main()
