"""What a run's outcomes show: which checkpoint is better than which, how sure that is, and what it costs in tokens.

Reads rows of `outcomes.jsonl`, one a question. The statistics are `stats`'; how they are shown is `view`'s and
`page`'s. Iterations are not chosen by what they score on the test: the last one is judged.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from harness import stats
from harness.config import ARMS
from harness.errors import LoopError
from harness.outcomes import Outcome, summary
from harness.stats import Estimate, Paired

Row = Mapping[str, Any]
SURE = 1 - stats.LEVEL
UNKNOWN = Estimate(math.nan, math.nan, math.nan)
CLIFF = 0.3  # of closed traces, lost between one t and the next
FALL = 0.1  # of accuracy, beyond which traces that all close hide it


class Who(NamedTuple):
    """A checkpoint in a run, or those of several seeds that differ in nothing else."""

    run: str
    arm: str
    iteration: int
    checkpoint: str

    def __str__(self) -> str:
        arm = "" if self.arm == ARMS[0] else f"/{self.arm}"
        return f"{self.run}{arm}:{self.checkpoint}@{self.iteration}"


class Comparison(NamedTuple):
    """Two checkpoints on one task's questions.

    Attributes:
        task: its name.
        before: one checkpoint.
        after: the other.
        scores: their accuracies, in [0, 1].
        gain: of `after` over `before`, in [-1, 1], with its interval over questions.
        test: the paired test, over questions.
        p: its p-value corrected for all comparisons that were made with it (Holm).
        seeds: the gain's mean and Student's interval over seeds; None where both have but one.
        tokens: of an answer, `after`'s for one of `before`'s; NaN where tokens were not counted.
        least: the gain that one test of these questions would show four times out of five, in [0, 1].
    """

    task: str
    before: Who
    after: Who
    scores: tuple[float, float]
    gain: Estimate
    test: Paired
    p: float
    seeds: Estimate | None
    tokens: Estimate
    least: float

    @property
    def sure(self) -> bool:
        """Whether the questions show a difference and, where there are several seeds, these do too."""
        return self.p <= SURE and (self.seeds is None or differs(self.seeds))


def differs(seeds: Estimate) -> bool:
    """Whether a mean over seeds is not 0: by its interval or, where all seeds came to the same, by itself."""
    return seeds.value != 0 if math.isnan(seeds.low) else seeds.low > 0 or seeds.high < 0


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
        rows: list[Row] = [{**json.loads(line)} for line in file.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise LoopError(f"{file}: no such file; name a run that has evaluated something") from None
    except (OSError, ValueError, TypeError):
        raise LoopError(f"{file}: not whole; run its command again, which writes it anew") from None
    if not rows:
        raise LoopError(f"{file}: nothing was evaluated yet")
    return rows


def by_checkpoint(rows: Iterable[Row]) -> dict[tuple[Who, str], dict[str, Row]]:
    """Rows by checkpoint and task, each by its question; those of several seeds are one, their scores' mean.

    A question is what is drawn and tested, however many seeds answered it: more seeds are no more questions. One that a
    task asks twice is two.
    """
    found: dict[tuple[Who, str], dict[str, list[Row]]] = {}
    seen: Counter[tuple[Who, str, int, str]] = Counter()
    for row in rows:
        who = Who(row["run"], row["arm"], row["iteration"], row["checkpoint"])
        question = (who, row["task"], row["seed"], row["question"])
        name = f"{row['question']}#{seen[question]}" if seen[question] else row["question"]
        seen[question] += 1
        found.setdefault((who, row["task"]), {}).setdefault(name, []).append(row)
    return {place: {name: _merged(mine) for name, mine in by.items()} for place, by in found.items()}


def _merged(rows: Sequence[Row]) -> Row:
    def total(key: str) -> int | None:
        counts = [row[key] for row in rows]
        return None if None in counts else sum(counts)

    summed: dict[str, Any] = {
        key: total(key) for key in ("answers", "closed", "truncated", "trace_tokens", "answer_tokens")
    }
    by_seed = {row["seed"]: row["score"] for row in rows}
    if all(row.get("pass_at") for row in rows):
        summed["pass_at"] = {j: stats.mean([row["pass_at"][j] for row in rows]) for j in rows[0]["pass_at"]}
        summed["majority"] = stats.mean([row["majority"] for row in rows])
    return {**rows[0], **summed, "score": stats.mean(list(by_seed.values())), "by_seed": by_seed}


def compare(sides: Sequence[tuple[str, Who, Mapping[str, Row], Who, Mapping[str, Row]]]) -> list[Comparison]:
    """Compare checkpoints task by task; all comparisons of one call are corrected together.

    Of several seeds those count that both sides have: a run that was stopped has more of one than of the other.

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
        both = _alike([(ours[question], theirs[question]) for question in ours])
        one, other = [row["score"] for row, _ in both], [row["score"] for _, row in both]
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
                _over_seeds(both),
                _ratio(tokens_each([row for row, _ in both]), tokens_each([row for _, row in both])),
                stats.least_gain(one, other),
            )
        )
    # Two checkpoints that differ on no question are not tested, and make no other test one of more.
    tested = [place for place, one in enumerate(found) if one.test.gained + one.test.lost]
    for place, p in zip(tested, stats.holm([found[place].p for place in tested]), strict=True):
        found[place] = found[place]._replace(p=p)
    return found


def seeds_of(rows: Mapping[str, Row]) -> set[int]:
    """The seeds in which every question was answered."""
    return set.intersection(*(set(row["by_seed"]) for row in rows.values()))


def _alike(both: list[tuple[Row, Row]]) -> list[tuple[Row, Row]]:
    """Rows whose scores are means over the same seeds; as they are where no seed is on both sides."""
    shared = set.intersection(*(set(row["by_seed"]) for pair in both for row in pair))
    if not shared or all(set(row["by_seed"]) == shared for pair in both for row in pair):
        return both

    def of(row: Row) -> Row:
        by_seed = {seed: score for seed, score in row["by_seed"].items() if seed in shared}
        return {**row, "score": stats.mean(list(by_seed.values())), "by_seed": by_seed}

    return [(of(before), of(after)) for before, after in both]


def _over_seeds(both: Sequence[tuple[Row, Row]]) -> Estimate | None:
    """The gain of each seed that both sides have, as one figure; None for fewer than two."""
    seeds = [seed for seed in both[0][0]["by_seed"] if all(seed in row["by_seed"] for pair in both for row in pair)]
    if len(seeds) < 2:
        return None
    return stats.over_runs([stats.mean([b["by_seed"][s] - a["by_seed"][s] for a, b in both]) for s in seeds])


NAMED = re.compile(r"(?P<run>[^:@/]+)(/(?P<arm>[^:@]+))?(:(?P<checkpoint>instruct|thinking))?(@(?P<iteration>\d+))?$")


def chosen(out: Path, name: str) -> dict[str, tuple[Who, dict[str, Row]]]:
    """The rows of a checkpoint by task, with whose they are.

    Args:
        out: where runs are.
        name: RUN[/ARM][:CHECKPOINT][@ITERATION]; else the run's first arm, instruct, its last iteration.

    Raises:
        LoopError: there is no such run, or it has not evaluated that.
    """
    if not (said := NAMED.match(name)):
        raise LoopError(f"{name}: write RUN, RUN:instruct, RUN:thinking@2, RUN/untouched:instruct")
    rows = read(out / said["run"])
    every = list(dict.fromkeys(row["arm"] for row in rows))
    arm = said["arm"] or every[0]
    if arm not in every or (arm.startswith("t=") and not said["arm"]):
        raise LoopError(f"{name}: name one of its arms, as in {said['run']}/{every[-1]}; it has {', '.join(every)}")
    groups = by_checkpoint(row for row in rows if row["arm"] == arm)
    checkpoint = said["checkpoint"] or ("thinking" if arm.startswith("t=") else "instruct")
    there = sorted({who.iteration for who, _ in groups if who.checkpoint == checkpoint})
    iteration = int(said["iteration"]) if said["iteration"] else there[-1] if there else 0
    found = {
        task: (who, mine)
        for (who, task), mine in groups.items()
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
        if who == last_of(groups, who, task) and who.iteration and (first, task) in groups:
            sides.append((task, first, groups[first, task], who, mine))
    return compare(sorted(sides, key=lambda side: (side[3].checkpoint, side[0])))


def last_of(groups: Mapping[tuple[Who, str], dict[str, Row]], who: Who, task: str) -> Who:
    """A checkpoint at its last iteration of those that most seeds have come to; some may not be as far as others."""
    first = who._replace(iteration=0)
    every = [one for one, of in groups if of == task and one._replace(iteration=0) == first]
    return max(every, key=lambda one: (one.iteration > 0, len(seeds_of(groups[one, task])), one.iteration))


def of_several(rows: Sequence[Row]) -> list[Row]:
    """The questions that were asked k times, each as two: scored by pass@k, and by maj@k. One seed's are 0 or 1."""
    found: list[Row] = []
    for row in rows:
        if passes := row.get("pass_at"):
            k = max(passes, key=int)
            found.append({**row, "task": f"{row['task']} pass@{k}", "score": passes[k]})
            found.append({**row, "task": f"{row['task']} maj@{k}", "score": row["majority"]})
    return found


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
        tokens: of an answer; NaN where they were not counted.
        gain: against the pair as it came; None where that was not evaluated.
        beside: against the run's first arm at its last iteration; None for itself, and for an arm that is not as far.
    """

    who: Who
    task: str
    accuracy: Estimate
    tokens: float
    gain: Comparison | None
    beside: Comparison | None


def arms(rows: Sequence[Row]) -> list[Arm]:
    """Every arm of a run at its last iteration, the first arm first; empty if there is but one arm and one seed.

    The comparisons with the first arm are corrected together.
    """
    if len({(row["arm"], row["seed"]) for row in rows}) < 2:
        return []
    groups, about = by_checkpoint(rows), rows[0]["arm"]
    last: dict[tuple[str, str, str], Who] = {}
    for who, task in groups:
        last[who.checkpoint, task, who.arm] = last_of(groups, who, task)
    gains, beside = [], []
    for (checkpoint, task, arm), who in last.items():
        first, main = who._replace(iteration=0), last.get((checkpoint, task, about))
        if who.iteration and (first, task) in groups:
            gains.append((task, first, groups[first, task], who, groups[who, task]))
        # What is only merged is so once: further iterations would be the same.
        if main and arm != about and (who.iteration == main.iteration or (arm == "merge_only" and who.iteration)):
            beside.append((task, main, groups[main, task], who, groups[who, task]))
    gained = {(one.after, one.task): one for one in compare(gains)}
    compared = {(one.after, one.task): one for one in compare(beside)}
    found = []
    for (_, task, _), who in sorted(last.items(), key=lambda item: (item[0][1], item[0][0])):
        mine = list(groups[who, task].values())
        means = [stats.mean([row["by_seed"][s] for row in mine if s in row["by_seed"]]) for s in mine[0]["by_seed"]]
        accuracy = stats.over_runs(means)
        if not math.isnan(accuracy.low):
            accuracy = accuracy._replace(low=max(0.0, accuracy.low), high=min(1.0, accuracy.high))
        each = summed_up(mine)["tokens_per_answer"]
        each = math.nan if each is None else each
        found.append(Arm(who, task, accuracy, each, gained.get((who, task)), compared.get((who, task))))
    return found


def summed_up(rows: Iterable[Row]) -> dict[str, Any]:
    """One checkpoint's questions of one task as a row of `results.json`."""
    # What is not there an earlier version did not write.
    (row,) = summary(Outcome(**{field.name: row.get(field.name) for field in fields(Outcome)}) for row in rows)  # type: ignore[arg-type]
    return row


def pooled(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The scores of a run's first arm as rows of `results.json`, seeds taken together: their mean."""
    return by_arm(first_arm(rows))


def by_arm(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The scores of every arm and iteration, as `pooled`."""
    return [
        {"arm": who.arm, "iteration": who.iteration, "checkpoint": who.checkpoint, **summed_up(by_question.values())}
        for (who, _), by_question in by_checkpoint(rows).items()
    ]


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
        each = stats.per_correct(written, scores) if written else UNKNOWN
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
    for (who, task), by_question in by_checkpoint(row for row in rows if row["arm"].startswith("t=")).items():
        row = summed_up(by_question.values())
        alike = [
            mine["score"] == came[task, question] for question, mine in by_question.items() if (task, question) in came
        ]
        found.append(
            Point(
                float(who.arm.removeprefix("t=")),
                task,
                Estimate(row["accuracy"], *row["ci95"]),
                row["closed_traces"],
                row["tokens_per_answer"],
                stats.mean(alike) if alike else math.nan,
            )
        )
    return sorted(found, key=lambda point: (point.task, point.t))


def cliffs(found: Sequence[Point]) -> list[str]:
    """Where closing stops, or else where most right answers are lost; a sentence a task."""
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
            line = f"{task}: no cliff; the fewest traces close at t = {least.t:g}, {least.closed:.0%}"
            drops = [(before.accuracy.value - after.accuracy.value, before, after) for before, after in pairwise(mine)]
            drop = max(drops, default=None, key=lambda fall: fall[0])
            if drop and drop[0] > FALL:
                _, before, after = drop
                line += (
                    f"; right answers are lost all the same, most between t = {before.t:g}, "
                    f"{before.accuracy.value:.0%}, and t = {after.t:g}, {after.accuracy.value:.0%}"
                )
            said.append(line)
    return said


def tokens(rows: Iterable[Row]) -> list[float]:
    """Tokens written to each question, all its answers' traces among them; empty where they were not counted."""
    counted = [(row["trace_tokens"], row["answer_tokens"]) for row in rows]
    return [] if any(None in pair for pair in counted) else [float(trace + answer) for trace, answer in counted]


def tokens_each(rows: Sequence[Row]) -> list[float]:
    """Tokens of one answer to each question; empty where they were not counted."""
    return [total / row["answers"] for total, row in zip(tokens(rows), rows, strict=False)]


def _ratio(before: list[float], after: list[float]) -> Estimate:
    return stats.ratio(before, after) if before and after else UNKNOWN


def verdict(found: Sequence[Comparison]) -> list[str]:
    """A sentence a comparison: what changed and whether that is sure.

    `found` are comparisons that were corrected together.
    """
    tested = sum(one.test.gained + one.test.lost > 0 for one in found)
    said = []
    for one in found:
        test, (before, after) = one.test, one.scores
        change = f"{before:.1%} → {after:.1%} of {test.n} questions"
        p = f"p = {one.p:.2g}" + (f", corrected for {tested} comparisons" if tested > 1 else "")
        counts = f"{test.gained} gained, {test.lost} lost; {p}"
        if one.seeds:
            counts += f"; over seeds {in_points(one.seeds)}"
        who = (
            one.after.checkpoint if one.before._replace(iteration=one.after.iteration) == one.after else str(one.after)
        )
        if one.sure:
            said.append(f"{who} is {'better' if one.gain.value > 0 else 'worse'} on {one.task}: {change} ({counts})")
            continue
        if one.p <= SURE:
            said.append(
                f"{who} may be another on {one.task}: {change} ({counts}): the questions show it, the seeds do not"
            )
            continue
        least = f"would show a change of {100 * one.least:.0f} points"
        least = "can show no change at all" if math.isnan(one.least) else least
        said.append(f"no sure change of {who} on {one.task}: {change} ({counts}; one test of these questions {least})")
    return said


def in_points(estimate: Estimate) -> str:
    """A gain in points, with its interval where there is one."""
    middle = f"{100 * estimate.value:+.1f}"
    return middle if math.isnan(estimate.low) else f"{middle} ({100 * estimate.low:+.1f} to {100 * estimate.high:+.1f})"


def known(value: float) -> float | None:
    """A number for JSON, which has no NaN."""
    return value if math.isfinite(value) else None


def arm_json(arm: Arm) -> dict[str, Any]:
    """An arm for a program; what is not known is null."""
    return {
        **arm.who._asdict(),
        "task": arm.task,
        "accuracy": {key: known(value) for key, value in arm.accuracy._asdict().items()},
        "tokens_per_answer": known(arm.tokens),
        "gain": as_json(arm.gain) if arm.gain else None,
        "beside": as_json(arm.beside) if arm.beside else None,
    }


def figure_json(figure: Figures) -> dict[str, Any]:
    """A checkpoint's derived figures for a program; what is not known is null."""
    return {
        **figure.who._asdict(),
        "task": figure.task,
        "transferred": {k: known(v) for k, v in figure.transferred._asdict().items()} if figure.transferred else None,
        "tokens_per_correct": {key: known(value) for key, value in figure.per_correct._asdict().items()},
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
        "sure": one.sure,
        "seeds": {key: known(value) for key, value in one.seeds._asdict().items()} if one.seeds else None,
        "tokens_ratio": {key: known(value) for key, value in one.tokens._asdict().items()},
        "least_gain": known(one.least),
    }
