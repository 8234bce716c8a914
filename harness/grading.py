"""Grade an evaluation's answers again, on what follows their traces and each answer by itself.

    python -m harness.grading FOLDER --recipe recipe.yml --out graded.jsonl TASK …

lm-eval hands a task the whole text: a task that is not ours compares "<think> … </think> 78" with "78", and of several
answers to a question only the first counts. Here lm-eval's own task object, with its own filters and metrics, is given
each answer without its trace. Knows lm-eval's task objects. Writes a line a question:
`{"task", "doc_id", "metric", "scores": [one an answer]}`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from pathlib import Path
from typing import Any

import yaml

from harness.asking import samples, texts
from harness.outcomes import opened_trace
from thinkswitch_plugin.trace_stripping import split_trace


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
    docs = task.eval_docs
    written = [[_after_trace(text, opened_trace(row)) for text in texts(row, name)] for row in rows]
    lines = [{"task": name, "doc_id": row["doc_id"], "metric": "", "scores": []} for row in rows]
    for turn in range(max(map(len, written), default=0)):
        asked = [i for i, answers in enumerate(written) if turn < len(answers)]
        instances = [
            Instance("generate_until", docs[rows[i]["doc_id"]], ("", {}), 0, resps=[written[i][turn]]) for i in asked
        ]
        filters.apply(instances)
        for i, instance in zip(asked, instances, strict=True):
            doc = copy.deepcopy(docs[rows[i]["doc_id"]])
            metrics = task.process_results(doc, [instance.filtered_resps[filters.name]])
            metric, value = next(iter(metrics.items()))
            lines[i]["metric"] = metric
            lines[i]["scores"].append(value.item() if hasattr(value, "item") else value)
    return lines


def _after_trace(text: str, opened: bool) -> str:
    return split_trace(text, opened).answer or ""


def main() -> None:
    """The command: see the module."""
    parser = argparse.ArgumentParser(description="Grade an evaluation's answers on what follows their traces.")
    parser.add_argument("folder", type=Path, help="what lm-eval filled")
    parser.add_argument("tasks", nargs="+", help="lm-eval tasks that were asked")
    parser.add_argument("--recipe", type=Path, required=True, help="the lm-eval config they were asked with")
    parser.add_argument("--out", type=Path, required=True, help="the .jsonl to write")
    options = parser.parse_args()
    from lm_eval.tasks import TaskManager

    recipe = yaml.safe_load(options.recipe.read_text(encoding="utf-8"))
    metadata = {**recipe.get("model_args", {}), **recipe.get("metadata", {})}
    manager = TaskManager(include_path=recipe.get("include_path"), metadata=metadata)
    lines = []
    for name in options.tasks:
        task = manager.load_task_or_group(name)[name]
        lines += grade(task, name, list(samples(options.folder, name)))
    beside = options.out.with_suffix(".new")
    beside.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    os.replace(beside, options.out)


if __name__ == "__main__":
    main()
