"""One row a question, from what lm-eval left of an evaluation; and the rows of `results.json`, summed up from those.

Knows the one rule every task is held to whoever wrote it: what follows the trace is graded, and an answer whose prompt
opened a trace that never closed is wrong. Leaves grading to the tasks, and to `grading` where a task cannot know of
traces.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from harness.asking import after_trace, asked_tasks, opened_trace, samples, texts, token_budget
from harness.errors import StageError
from harness.stages import RECIPE, Stage
from harness.stats import interval, mean, pass_at
from thinkswitch_plugin.trace_stripping import split_trace

AGAIN = "remove its folder and run the same command again"
NEARLY = 0.99  # of its tokens: an answer of so many was cut off
QUESTION_HEX = 16  # of SHA-256: 64 bits, of which no two of a million questions share all
Row = dict[str, Any]
Counter = Callable[[str], int]


@dataclass(frozen=True)
class Outcome:
    """How one question of one task went.

    Attributes:
        task: its name.
        question: a hash of the question, the same for every checkpoint and in every run that asks it.
        score: in [0, 1]; the mean over the answers where a question was asked more than once.
        answers: how many answers there are; the four below are sums over them.
        closed: traces that closed with an answer after them.
        truncated: traces that never closed.
        trace_tokens: of the traces, by the checkpoint's own tokenizer; None where it has none to read.
        answer_tokens: of what follows them.
        pass_at: where a question was asked k times: j → pass@j, in [0, 1], for j = 1, 2, 4, … and k, as texts; an
            answer is right if its score is 1. None where it was asked once.
        majority: maj@k: the score of what most of the k answers say; None where it was asked once.
    """

    task: str
    question: str
    score: float
    answers: int
    closed: int
    truncated: int
    trace_tokens: int | None
    answer_tokens: int | None
    pass_at: dict[str, float] | None = None
    majority: float | None = None


class Graded(NamedTuple):
    """What `grading` found of the answers to one question, one each: scores in [0, 1], and what they say."""

    scores: list[float]
    said: list[str | None]


def question(sample: Mapping[str, Any]) -> str:
    """A hash of the question's row without what our tasks note there of the model that is asked."""
    row = {name: value for name, value in sample["doc"].items() if name != "trace_opened"}
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:QUESTION_HEX]


def closed_share(folder: Path, tasks: Iterable[str]) -> tuple[int, int]:
    """How many answers to the training prompts closed their trace, and how many there are."""
    closed = total = 0
    counts = asked_tasks(folder)
    for task in tasks:
        for sample in samples(folder, task, counts.get(task, -1)):
            opened = opened_trace(sample)
            statuses = [split_trace(text, opened).status for text in texts(sample, task)]
            closed += statuses.count("closed")
            total += len(statuses)
    return closed, total


def cut_off(folder: Path, stage: Stage, tokenizer: Path | None) -> dict[str, Any]:
    """How many answers used up their tokens: `{"cut": …, "answers": …, "budget": tokens}`, `budget` the largest.

    lm-eval does not log why an answer ended. Counted are answers of at least 99 % of what they could have: a sampled
    text, read by its tokenizer again, may have a few tokens fewer.

    Returns:
        Those facts under `cut_off`; nothing where none was cut, or no tokenizer counts.
    """
    count = token_counter(tokenizer) if tokenizer else None
    if count is None:
        return {}
    cut = answers = largest = 0
    recipe = stage.recipes[RECIPE]
    for task, n in asked_tasks(folder).items():
        for sample in samples(folder, task, n):
            budget = token_budget(sample, recipe)
            largest = max(largest, budget)
            written = texts(sample, task)
            answers += len(written)
            # A token has a byte or more: what is too short for it need not be counted.
            cut += sum(len(text.encode()) >= NEARLY * budget and count(text) >= NEARLY * budget for text in written)
    return {"cut_off": {"cut": cut, "answers": answers, "budget": largest}} if cut else {}


def cut_note(facts: Mapping[str, Any]) -> str:
    """How many answers used up their tokens, where any did."""
    if not (found := facts.get("cut_off")):
        return ""
    return f"{found['cut']} of {found['answers']} answers were cut off at {found['budget']:,} tokens (max_gen_toks)"


def read(folder: Path, checkpoint: Path | None, graded: Path | None = None) -> list[Outcome]:
    """The outcomes of one checkpoint's evaluation, in the order of the tasks and their questions.

    Args:
        folder: what lm-eval filled.
        checkpoint: whose tokenizer counts; None if nothing is to be counted.
        graded: what `grading` left, for the tasks it was asked for.

    Raises:
        StageError: if lm-eval's output is missing or not whole, or a score is no number from 0 to 1.
    """
    count = token_counter(checkpoint) if checkpoint else None
    again = read_grades(graded) if graded else {}
    found = []
    for task, n in asked_tasks(folder).items():
        for sample in samples(folder, task, n):
            grades = again[task].get(sample["doc_id"], Graded([], [])) if task in again else None
            if grades is not None and {len(grades.scores), len(grades.said)} != {len(texts(sample, task))}:
                raise StageError(f"{graded}: does not fit the answers of {task}; {AGAIN}")
            found.append(outcome(task, sample, grades, count))
    return found


def outcome(task: str, sample: Mapping[str, Any], grades: Graded | None, count: Counter | None) -> Outcome:
    """One question's; `grades` are its answers', None where lm-eval's own score of the first one counts."""
    opened = opened_trace(sample)
    answers = texts(sample, task)
    traces = [split_trace(text, opened) for text in answers]
    unclosed = [trace.status == "unclosed" for trace in traces]
    scores = grades.scores if grades else [own_score(task, sample)] * len(answers)
    # Whatever number unfinished reasoning holds.
    scores = [0.0 if never else score for never, score in zip(unclosed, scores, strict=True)]
    passes = agreed = None
    if grades and len(answers) > 1:
        passes = passes_at(scores)
        agreed = majority(scores, [None if never else say for never, say in zip(unclosed, grades.said, strict=True)])
    traced = rest = None
    if count:
        rest = sum(map(count, map(after_trace, answers, traces)))
        traced = max(0, sum(map(count, answers)) - rest)
    return Outcome(
        task=task,
        question=question(sample),
        score=math.fsum(scores) / len(scores),
        answers=len(answers),
        closed=sum(trace.status == "closed" for trace in traces),
        truncated=sum(unclosed),
        trace_tokens=traced,
        answer_tokens=rest,
        pass_at=passes,
        majority=agreed,
    )


def passes_at(scores: Sequence[float]) -> dict[str, float]:
    """j → pass@j of the answers to one question, for j = 1, 2, 4, … and all of them; right is what scores 1."""
    n, right = len(scores), sum(score == 1 for score in scores)
    doubled = [2**power for power in range(n.bit_length())]
    return {str(j): pass_at(n, right, j) for j in (*doubled, n)}


def majority(scores: Sequence[float], said: Sequence[str | None]) -> float:
    """The score of what most answers to one question say: self-consistency (Wang et al., arXiv 2203.11171).

    Of several that as many say, the one that was the first to have so many: answers are drawn alike, so their order is
    chance, and the result is one answer's score and no mean. An answer that says nothing (None) has no vote; where none
    has one, it is 0.

    Args:
        scores: one an answer, in [0, 1].
        said: what each says.
    """
    votes: Tally[str] = Tally()
    ahead: str | None = None
    for one in said:
        if one is not None:
            votes[one] += 1
            if ahead is None or votes[one] > votes[ahead]:
                ahead = one
    return 0.0 if ahead is None else scores[list(said).index(ahead)]


def own_score(task: str, sample: Mapping[str, Any]) -> float:
    """The first metric that a task names, of one question.

    Raises:
        StageError: if it is no number from 0 to 1.
    """
    metric = sample["metrics"][0]
    return checked_score(task, metric, sample[metric])


def checked_score(task: str, metric: str, value: Any) -> float:
    """A metric's value of one question, which must be a number from 0 to 1 (`StageError` else)."""
    if not isinstance(value, int | float):
        raise StageError(f"{task}: its first metric, {metric}, is not a number per question; name one that is first")
    if not 0 <= value <= 1:
        raise StageError(
            f"{task}: its first metric, {metric}, is {value:g} on a question, outside 0 to 1: "
            "it is no share of right answers; name one that is first"
        )
    return float(value)


def read_grades(file: Path) -> dict[str, dict[int, Graded]]:
    """What `grading` left, by task and number of the question.

    Raises:
        StageError: if the file is missing or not whole.
    """
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        grades: dict[str, dict[int, Graded]] = {}
        for row in rows:
            scores = [checked_score(row["task"], row["metric"], score) for score in row["scores"]]
            grades.setdefault(row["task"], {})[row["doc_id"]] = Graded(scores, list(row["said"]))
        return grades
    except (OSError, ValueError, KeyError, TypeError):
        raise StageError(f"{file}: missing or not whole; {AGAIN}") from None


def summary(outcomes: Iterable[Outcome]) -> list[Row]:
    """The rows of `results.json` for one checkpoint of one iteration, one a task, without where they belong.

    `tokens_per_answer` counts the whole text the model wrote, trace included; `trace_tokens` of it are the trace's.
    Where questions were asked k times, `accuracy` is avg@k, and `repeats` (k), `pass_at_k` and `maj_at_k` stand beside
    it with their intervals over questions, and every pass@j in `pass_at`.
    """
    by_task: dict[str, list[Outcome]] = {}
    for one in outcomes:
        by_task.setdefault(one.task, []).append(one)
    rows = []
    for task, mine in by_task.items():
        n, answers = len(mine), sum(one.answers for one in mine)
        correct = math.fsum(one.score for one in mine)
        low, high = interval([one.score for one in mine])
        counted = all(one.answer_tokens is not None for one in mine)
        trace = sum(one.trace_tokens or 0 for one in mine)
        rest = sum(one.answer_tokens or 0 for one in mine)
        rows.append(
            {
                "task": task,
                "n": n,
                "correct": int(correct) if correct == int(correct) else correct,
                "accuracy": correct / n,
                "ci95": [low, high],
                "tokens_per_answer": (trace + rest) / answers if counted else None,
                "trace_tokens": trace / answers if counted else None,
                "closed_traces": sum(one.closed for one in mine) / answers,
                "truncated": sum(one.truncated for one in mine) / answers,
                **several(mine),
            }
        )
    return rows


def several(outcomes: Sequence[Outcome]) -> Row:
    """What a row says of one task's questions that were asked k times each; empty where they were asked once."""
    passes = [one.pass_at for one in outcomes if one.pass_at]
    votes = [one.majority for one in outcomes if one.majority is not None]
    if not len(passes) == len(votes) == len(outcomes):
        return {}
    columns = {j: [each[j] for each in passes] for j in passes[0]}
    found = {j: {"value": mean(shares), "ci95": list(interval(shares))} for j, shares in columns.items()}
    k = max(found, key=int)
    return {
        "repeats": int(k),
        "pass_at_k": found[k]["value"],
        "pass_at_k_ci95": found[k]["ci95"],
        "maj_at_k": mean(votes),
        "maj_at_k_ci95": list(interval(votes)),
        "pass_at": found,
    }


def token_counter(checkpoint: Path) -> Counter | None:
    """Counts tokens with a checkpoint's own tokenizer; None where it has no tokenizer.json to read."""
    from tokenizers import Tokenizer

    file = checkpoint / "tokenizer.json"
    if not file.is_file():
        return None
    tokenizer = Tokenizer.from_file(str(file))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)
