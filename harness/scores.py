"""Reads what lm-eval left of an evaluation into the rows of `results.json`.

Knows lm-eval's output files, and the one rule every task is held to whoever wrote it: an answer whose prompt opened a
trace that never closed is wrong. Leaves grading to the tasks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harness.errors import LoopError
from harness.rundir import write_json
from thinkswitch_plugin.trace_stripping import DEFAULT_TAGS, split_trace

Row = dict[str, Any]
TAH_SETTINGS = ("dtype", "max_depth", "mix_top_k", "decider", "threshold")  # that model_args may set for the model
DATE = "[0-9][0-9][0-9][0-9]-*"  # how lm-eval ends its file names; a task may be named as another's beginning


def wilson(correct: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % score interval of a proportion (E. B. Wilson, JASA 22, 1927, eq. 7), as (low, high) in [0, 1].

    Raises:
        ValueError: if n < 1.
    """
    if n < 1:
        raise ValueError("an interval needs at least one answer")
    p, zz = correct / n, z * z
    centre, half = p + zz / (2 * n), z * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    # At 0 and 1 the bound is the share itself, which rounding may miss by an epsilon.
    return max(0.0, min(p, (centre - half) / (1 + zz / n))), min(1.0, max(p, (centre + half) / (1 + zz / n)))


def asked_tasks(folder: Path) -> list[str]:
    """The tasks whose questions were asked: a group counts as its members.

    Raises:
        LoopError: if lm-eval left no results.
    """
    files = sorted(folder.glob("results_*.json"))
    if not files:
        raise LoopError(f"{folder}: lm-eval left no results; its log is beside that folder")
    return list(json.loads(files[-1].read_text(encoding="utf-8"))["configs"])


def samples(folder: Path, task: str) -> Iterator[dict[str, Any]]:
    """The logged samples of one task, first filter only, in the order of the questions.

    Raises:
        LoopError: if lm-eval left none.
    """
    files = sorted(folder.glob(f"samples_{task}_{DATE}.jsonl"))
    if not files:
        raise LoopError(f"{folder}: lm-eval left no samples of {task}; its log is beside that folder")
    first = None
    with files[-1].open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            first = first or row.get("filter")
            if row.get("filter") == first:
                yield row


def answers(sample: dict[str, Any]) -> list[tuple[str, bool]]:
    """Each answer the model wrote to one question, with whether the prompt had opened its trace."""
    prompt = sample["arguments"]["gen_args_0"]["arg_0"]
    # A task that is not ours says nothing of the trace, but the prompt it was asked with is logged.
    ends_open = isinstance(prompt, str) and prompt.rstrip().endswith(tuple(opening for opening, _ in DEFAULT_TAGS))
    opened = sample["doc"].get("trace_opened", ends_open)
    return [(text, bool(opened)) for text in sample["resps"][0]]


def closed_share(folder: Path, tasks: list[str]) -> tuple[int, int]:
    """How many answers to the training prompts closed their trace, and how many there are."""
    statuses = [split_trace(*a).status for task in tasks for sample in samples(folder, task) for a in answers(sample)]
    return sum(status == "closed" for status in statuses), len(statuses)


def read(folder: Path, iteration: int, who: str, checkpoint: str) -> list[Row]:
    """The rows of one checkpoint's evaluation, one a task.

    `tokens_per_answer` counts the whole text the model wrote, trace included, with the checkpoint's own tokenizer;
    None where that is not a local folder with a `tokenizer.json`. The score is the first metric the task names.

    Raises:
        LoopError: if lm-eval's output is missing, or a task's first metric is not a number per question.
    """
    count = _token_counter(Path(checkpoint))
    rows = []
    for task in asked_tasks(folder):
        n = closed = truncated = tokens = 0
        correct = 0.0
        for sample in samples(folder, task):
            text, opened = answers(sample)[0]
            status = split_trace(text, opened).status
            metric = sample["metrics"][0]
            try:
                score = float(sample[metric])
            except (TypeError, ValueError):
                raise LoopError(f"{task}: its first metric, {metric}, is not a number per question") from None
            n += 1
            closed += status == "closed"
            truncated += status == "unclosed"
            correct += 0.0 if status == "unclosed" else score
            tokens += count(text) if count else 0
        low, high = wilson(correct, n)
        rows.append(
            {
                "iteration": iteration,
                "checkpoint": who,
                "task": task,
                "n": n,
                "correct": int(correct) if correct == int(correct) else correct,
                "accuracy": correct / n,
                "ci95": [low, high],
                "tokens_per_answer": tokens / n if count else None,
                "closed_traces": closed / n,
                "truncated": truncated / n,
            }
        )
    return rows


def count_passes(recipe: dict[str, Any], folder: str, output: str) -> None:
    """Count the passes of a TaH checkpoint's answers, task by task, into the JSON file `output`. Runs in a child.

    Args:
        recipe: the lm-eval config that asked it, whose model and settings are loaded again.
        folder: what lm-eval left.
        output: `{task: {"mean_depth": …}}`; the keys of a row of `results.json`.
    """
    from thinkswitch_plugin.tah import cost, think_map

    given = recipe["model_args"]
    settings = {key: given[key] for key in TAH_SETTINGS if key in given}
    model, tokenizer = think_map.load(given["pretrained"], recipe.get("device"), **settings)
    counted = {}
    for task in asked_tasks(Path(folder)):
        pairs = [(s["arguments"]["gen_args_0"]["arg_0"], answers(s)[0][0]) for s in samples(Path(folder), task)]
        counted[task] = cost.summary(model.config, cost.count(model, tokenizer, pairs))
    write_json(Path(output), counted)


def _token_counter(checkpoint: Path) -> Callable[[str], int] | None:
    """Counts tokens with a checkpoint's own tokenizer; None where it has no tokenizer.json to read."""
    from tokenizers import Tokenizer

    file = checkpoint / "tokenizer.json"
    if not file.is_file():
        return None
    tokenizer = Tokenizer.from_file(str(file))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)
