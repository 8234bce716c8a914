"""What a run's outcomes show: which checkpoint is better than which, how sure that is, and what it costs in tokens.

Reads rows of `outcomes.jsonl`, one a question. The statistics are `stats`'; how they are shown is `view`'s and
`page`'s. Iterations are not chosen by what they score on the test: the last one is judged.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from harness import stats
from harness.errors import LoopError
from harness.stats import Estimate, Paired

Row = Mapping[str, Any]
SURE = 1 - stats.LEVEL
CLIFF = 0.3  # of closed traces, lost between one t and the next


class Who(NamedTuple):
    """A checkpoint in a run, or those of several seeds that differ in nothing else."""

    run: str
    arm: str
    iteration: int
    checkpoint: str

    def __str__(self) -> str:
        return f"{self.run}:{self.checkpoint}@{self.iteration}"


class Comparison(NamedTuple):
    """Two checkpoints on one task's questions.

    Attributes:
        task: its name.
        before: one checkpoint.
        after: the other.
        scores: their accuracies, in [0, 1].
        gain: of `after` over `before`, in [-1, 1], with its interval.
        test: the paired test.
        p: its p-value corrected for all comparisons that were made with it (Holm).
        tokens: of an answer, `after`'s for one of `before`'s; NaN where tokens were not counted.
        least: the gain that so many questions would show four times out of five, in [0, 1], as many being lost as here.
    """

    task: str
    before: Who
    after: Who
    scores: tuple[float, float]
    gain: Estimate
    test: Paired
    p: float
    tokens: Estimate
    least: float


class Figures(NamedTuple):
    """One checkpoint on one task.

    Attributes:
        who: the checkpoint.
        task: its name.
        transferred: the share of thinking's lead over instruct, as they came, that it has; of instruct ones alone.
        per_correct: tokens written for each right answer; NaN where they were not counted.
    """

    who: Who
    task: str
    transferred: Estimate | None
    per_correct: Estimate


def read(folder: Path) -> list[Row]:
    """The outcomes of a run.

    Raises:
        LoopError: if there are none, or a line is not whole.
    """
    file = folder / "outcomes.jsonl"
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise LoopError(f"{file}: no such file; name a run that has evaluated something") from None
    except (OSError, ValueError):
        raise LoopError(f"{file}: not whole; run its command again, which writes it anew") from None
    if not rows:
        raise LoopError(f"{file}: nothing was evaluated yet")
    return rows


def by_checkpoint(rows: Iterable[Row]) -> dict[tuple[Who, str], dict[str, Row]]:
    """Rows by checkpoint and task, each by its question; those of several seeds are one, their scores' mean.

    A question is what is drawn and tested, however many seeds answered it: more seeds are no more questions.
    """
    found: dict[tuple[Who, str], dict[str, list[Row]]] = {}
    for row in rows:
        who = Who(row["run"], row["arm"], row["iteration"], row["checkpoint"])
        found.setdefault((who, row["task"]), {}).setdefault(row["question"], []).append(row)
    return {place: {question: _merged(mine) for question, mine in by.items()} for place, by in found.items()}


def _merged(rows: Sequence[Row]) -> Row:
    if len(rows) == 1:
        return rows[0]

    def total(key: str) -> int | None:
        counts = [row[key] for row in rows]
        return None if None in counts else sum(counts)

    summed = {key: total(key) for key in ("answers", "trace_tokens", "answer_tokens")}
    return {**rows[0], **summed, "score": math.fsum(row["score"] for row in rows) / len(rows)}


def compare(sides: Sequence[tuple[str, Who, Mapping[str, Row], Who, Mapping[str, Row]]]) -> list[Comparison]:
    """Compare checkpoints task by task; all comparisons of one call are corrected together.

    Args:
        sides: (task, one checkpoint, its rows by question, the other, its rows).

    Raises:
        LoopError: two sides were not asked the same questions.
    """
    found = []
    for task, before, ours, after, theirs in sides:
        if ours.keys() != theirs.keys():
            alike = f"{len(ours)} and {len(theirs)}, {len(ours.keys() & theirs.keys())} of them alike"
            raise LoopError(
                f"{task}: {before} and {after} were not asked the same questions ({alike})"
                "\ncompare runs with the same tasks and the same --limit"
            )
        one, other = ([row["score"] for row in scores] for scores in (ours.values(), [theirs[q] for q in ours]))
        test = stats.paired(one, other)
        found.append(
            Comparison(
                task,
                before,
                after,
                (stats.mean(one), stats.mean(other)),
                stats.difference(one, other),
                test,
                test.p,
                _ratio(tokens(ours.values()), tokens([theirs[question] for question in ours])),
                stats.least_gain(test.n, min(test.gained, test.lost) / test.n),
            )
        )
    corrected = stats.holm([comparison.p for comparison in found])
    return [comparison._replace(p=p) for comparison, p in zip(found, corrected, strict=True)]


NAMED = re.compile(r"(?P<run>[^:@]+)(:(?P<checkpoint>instruct|thinking))?(@(?P<iteration>\d+))?$")


def chosen(out: Path, name: str) -> dict[str, tuple[Who, dict[str, Row]]]:
    """The rows of a checkpoint by task, with whose they are.

    Args:
        out: where runs are.
        name: RUN, RUN:CHECKPOINT, RUN@ITERATION or RUN:CHECKPOINT@ITERATION; else instruct of the last iteration.

    Raises:
        LoopError: there is no such run, or it has not evaluated that.
    """
    if not (said := NAMED.match(name)):
        raise LoopError(f"{name}: write RUN, RUN:instruct, RUN:thinking@2")
    groups = by_checkpoint(read(out / said["run"]))
    checkpoint = said["checkpoint"] or "instruct"
    there = sorted({who.iteration for who, _ in groups if who.checkpoint == checkpoint})
    iteration = int(said["iteration"]) if said["iteration"] else there[-1] if there else 0
    found = {
        task: (who, rows)
        for (who, task), rows in groups.items()
        if (who.checkpoint, who.iteration) == (checkpoint, iteration)
    }
    if not found:
        has = ", ".join(map(str, there)) or "none"
        raise LoopError(f"{name}: {checkpoint} was not evaluated in iteration {iteration}; evaluated iterations: {has}")
    return found


def between(
    before: Mapping[str, tuple[Who, dict[str, Row]]], after: Mapping[str, tuple[Who, dict[str, Row]]]
) -> list[Comparison]:
    """Compare two checkpoints on every task that both were asked.

    Raises:
        LoopError: there is none, or the questions differ.
    """
    if not (shared := [task for task in before if task in after]):
        raise LoopError(f"no task in common: {', '.join(before)} and {', '.join(after)}")
    return compare([(task, *before[task], *after[task]) for task in shared])


def gains(rows: Sequence[Row]) -> list[Comparison]:
    """The last iteration against the pair as it came: each checkpoint and task of each run, of its first arm."""
    groups = by_checkpoint(first_arm(rows))
    sides = []
    for (who, task), mine in groups.items():
        first = who._replace(iteration=0)
        last = max(w.iteration for w, t in groups if t == task and w._replace(iteration=0) == first)
        if who.iteration == last > 0 and (first, task) in groups:
            sides.append((task, first, groups[first, task], who, mine))
    return compare(sorted(sides, key=lambda side: (side[3].checkpoint, side[0])))


def first_arm(rows: Sequence[Row]) -> list[Row]:
    """The rows of the arm that each run is about, which is the first of its rows."""
    about: dict[str, str] = {}
    for row in rows:
        about.setdefault(row["run"], row["arm"])
    return [row for row in rows if row["arm"] == about[row["run"]]]


def first_seed(rows: Sequence[Row]) -> list[Row]:
    """The rows of each run's first arm and seed."""
    about: dict[str, int] = {}
    for row in (mine := first_arm(rows)):
        about.setdefault(row["run"], row["seed"])
    return [row for row in mine if row["seed"] == about[row["run"]]]


class Arm(NamedTuple):
    """What came of one way to do it.

    Attributes:
        who: the last iteration's checkpoint.
        task: its name.
        accuracy: over all seeds, with Student's interval over them (NaN for a single one).
        gain: against the pair as it came; None where that was not evaluated.
        beside: against the run's first arm; None for itself.
    """

    who: Who
    task: str
    accuracy: Estimate
    gain: Comparison | None
    beside: Comparison | None


def arms(rows: Sequence[Row]) -> list[Arm]:
    """Every arm of a run at its last iteration, the first arm first; empty if there is but one arm and one seed.

    The comparisons with the pair as it came are corrected together, and so are those with the first arm.
    """
    groups = by_checkpoint(rows)
    if len({(row["arm"], row["seed"]) for row in rows}) < 2:
        return []
    about = rows[0]["arm"]
    last: dict[tuple[str, str, str], Who] = {}
    for who, task in groups:
        place = (who.checkpoint, task, who.arm)
        last[place] = max(last.get(place, who), who)
    per_seed: dict[tuple[Who, str, int], list[float]] = {}
    for row in rows:
        who = Who(row["run"], row["arm"], row["iteration"], row["checkpoint"])
        per_seed.setdefault((who, row["task"], row["seed"]), []).append(row["score"])
    gains, beside = [], []
    for (checkpoint, task, arm), who in last.items():
        first, main = who._replace(iteration=0), last.get((checkpoint, task, about))
        if who.iteration and (first, task) in groups:
            gains.append((task, first, groups[first, task], who, groups[who, task]))
        if main and arm != about:
            beside.append((task, main, groups[main, task], who, groups[who, task]))
    gained = {(one.after, one.task): one for one in compare(gains)}
    compared = {(one.after, one.task): one for one in compare(beside)}
    found = []
    for (_, task, _), who in sorted(last.items(), key=lambda item: (item[0][1], item[0][0])):
        means = [stats.mean(scores) for (w, t, _), scores in per_seed.items() if (w, t) == (who, task)]
        found.append(Arm(who, task, stats.over_runs(means), gained.get((who, task)), compared.get((who, task))))
    return found


def figures(rows: Sequence[Row]) -> list[Figures]:
    """The derived figures of every checkpoint and task, of the run's first arm."""
    groups = by_checkpoint(first_arm(rows))
    found = []
    for (who, task), mine in groups.items():
        moved = None
        first = who._replace(iteration=0, checkpoint="instruct")
        lead = who._replace(iteration=0, checkpoint="thinking")
        if who.checkpoint == "instruct" and who.iteration and (first, task) in groups and (lead, task) in groups:
            sides = [groups[first, task], mine, groups[lead, task]]
            if sides[0].keys() == sides[1].keys() == sides[2].keys():
                moved = stats.transferred(*([side[question]["score"] for question in mine] for side in sides))
        written = tokens(mine.values())
        scores = [row["score"] * row["answers"] for row in mine.values()]
        each = stats.per_correct(written, scores) if written else Estimate(math.nan, math.nan, math.nan)
        found.append(Figures(who, task, moved, each))
    return found


class Point(NamedTuple):
    """One task at one t.

    Attributes:
        t: weight of the instruct checkpoint.
        task: its name.
        accuracy: with its interval.
        closed: share of answers that closed their trace.
        tokens: of an answer; None where they were not counted.
        agreement: share of questions with the score that the anchor has.
    """

    t: float
    task: str
    accuracy: Estimate
    closed: float
    tokens: float | None
    agreement: float


def dial(rows: Sequence[Row], anchor: Sequence[Row]) -> list[Point]:
    """What each t came to.

    Args:
        rows: outcomes of the dial.
        anchor: outcomes of the run it belongs to; its thinking checkpoint of iteration 0 is the anchor.
    """
    came = {
        (row["task"], row["question"]): row["score"]
        for row in first_seed(anchor)
        if (row["iteration"], row["checkpoint"]) == (0, "thinking")
    }
    found = []
    for (who, task), by_question in by_checkpoint(rows).items():
        mine = list(by_question.values())
        scores = [row["score"] for row in mine]
        low, high = stats.interval(scores)
        answers = sum(row["answers"] for row in mine)
        written = tokens(mine)
        alike = [
            row["score"] == came[task, question] for question, row in by_question.items() if (task, question) in came
        ]
        found.append(
            Point(
                float(who.arm.removeprefix("t=")),
                task,
                Estimate(stats.mean(scores), low, high),
                sum(row["closed"] for row in mine) / answers,
                sum(written) / answers if written else None,
                stats.mean(alike) if alike else float("nan"),
            )
        )
    return sorted(found, key=lambda point: (point.task, point.t))


def cliffs(found: Sequence[Point]) -> list[str]:
    """Where closing stops, a sentence a task."""
    said = []
    for task in dict.fromkeys(point.task for point in found):
        mine = [point for point in found if point.task == task]
        falls = [(before.closed - after.closed, before, after) for before, after in pairwise(mine)]
        steepest = max(falls, default=None, key=lambda fall: fall[0])
        if steepest and steepest[0] >= CLIFF:
            _, before, after = steepest
            said.append(
                f"{task}: the cliff lies between t = {before.t:g}, where {before.closed:.0%} of the traces close, and "
                f"t = {after.t:g}, where {after.closed:.0%} do"
            )
        else:
            least = min(mine, key=lambda point: point.closed)
            said.append(f"{task}: no cliff; the fewest traces close at t = {least.t:g}, {least.closed:.0%}")
    return said


def tokens(rows: Iterable[Row]) -> list[float]:
    """Tokens written to each question, all its answers' traces among them; empty where they were not counted."""
    counted = [(row["trace_tokens"], row["answer_tokens"]) for row in rows]
    return [] if any(None in pair for pair in counted) else [float(trace + answer) for trace, answer in counted]


def _ratio(before: list[float], after: list[float]) -> Estimate:
    return stats.ratio(before, after) if before and after else Estimate(math.nan, math.nan, math.nan)


def verdict(found: Sequence[Comparison]) -> list[str]:
    """A sentence a comparison: what changed and whether that is sure.

    `found` are comparisons that were corrected together.
    """
    said = []
    for one in found:
        test, (before, after) = one.test, one.scores
        change = f"{before:.1%} → {after:.1%} of {test.n} questions"
        counts = f"{test.gained} gained, {test.lost} lost"
        p = f"p = {one.p:.2g}" + (f", corrected for {len(found)} comparisons" if len(found) > 1 else "")
        if one.p <= SURE:
            what = f"{one.after.checkpoint} is {'better' if one.gain.value > 0 else 'worse'} on {one.task}"
            said.append(f"{what}: {change} ({counts}; {p})")
        else:
            needed = (
                "more questions than these" if math.isnan(one.least) else f"a change of {100 * one.least:.0f} points"
            )
            what = f"no sure change of {one.after.checkpoint} on {one.task}"
            said.append(f"{what}: {change} ({counts}; {p}; these questions would show {needed})")
    return said


def known(value: float) -> float | None:
    """A number for JSON, which has no NaN."""
    return value if math.isfinite(value) else None


def arm_json(arm: Arm) -> dict[str, Any]:
    """An arm for a program; what is not known is null."""
    return {
        **arm.who._asdict(),
        "task": arm.task,
        "accuracy": {key: known(value) for key, value in arm.accuracy._asdict().items()},
        "gain": as_json(arm.gain) if arm.gain else None,
        "beside": as_json(arm.beside) if arm.beside else None,
    }


def as_json(one: Comparison) -> dict[str, Any]:
    """A comparison for a program; what is not known is null."""
    return {
        "task": one.task,
        "before": one.before._asdict(),
        "after": one.after._asdict(),
        "n": one.test.n,
        "accuracy": list(one.scores),
        "gain": {key: known(value) for key, value in one.gain._asdict().items()},
        "gained": one.test.gained,
        "lost": one.test.lost,
        "p": one.test.p,
        "p_holm": one.p,
        "tokens_ratio": {key: known(value) for key, value in one.tokens._asdict().items()},
        "least_gain": known(one.least),
    }
