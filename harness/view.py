"""Shows a run at the terminal: live as it goes, as plain lines where nobody watches, and as the closing tables.

Knows Rich. Is told what happens by `loop`.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from harness import runner
from harness.angles import Summary
from harness.costs.kept import Against
from harness.evidence import Arm, Comparison, Point, in_points
from harness.outcomes import Row
from harness.plan import Step
from harness.stages import Stage

PLAIN_WIDTH = 110  # of a log or a pipe, where Rich would cut cells to fit 80 columns
SLOW_BYTES = 1 << 28  # a file whose reading is worth a bar


class View:
    """One run as it goes. On a terminal a live view; elsewhere a line per event.

    `quiet` shows nothing but the closing table, `verbose` every native command. Stages end in threads of their own, so
    what is shown is changed by one at a time.
    """

    def __init__(self, console: Console | None = None, quiet: bool = False, verbose: bool = False):
        """`console` defaults to standard output."""
        self.console = console or Console(highlight=False)
        if not self.console.is_terminal:
            self.console.width = max(self.console.width, PLAIN_WIDTH)
        self.quiet, self.verbose = quiet, verbose
        self.live: Live | None = None
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[phase]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.running: dict[str, TaskID] = {}  # by the stage's key, or by what is done before there are any
        self.rows: list[Row] = []
        self.steps: list[Step] = []
        self.places: dict[str, Step] = {}
        self.todo: set[str] = set()
        self.waiting: set[str] = set()
        self.run_name = ""
        self.iterations = self.stages = self.done = 0
        self.begun = time.monotonic()
        self.lock = threading.RLock()

    def say(self, text: str, style: str = "") -> None:
        """A line."""
        if not self.quiet:
            self._print(text, soft_wrap=True, style=style, markup=False)

    def _print(self, *what: Any, **how: Any) -> None:
        """Print, if somebody is there: a terminal that has gone away ends no run."""
        try:
            self.console.print(*what, **how)
        except (OSError, SystemExit):  # Rich ends the program where a pipe is broken
            self.console.file = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115

    def hashing(self, name: str, done: int, size: int) -> None:
        """A file of an input is being read to know what it is."""
        if size >= SLOW_BYTES:
            self._bar(f"reading {name}", name, done >> 20, size >> 20, "MiB")
            if done >= size:
                self._drop(name)

    def verifying(self, key: str) -> None:
        """A stage's files are compared with their hashes."""
        if self.verbose:
            self.say(f"comparing {key}", "dim")

    def begin(self, run: Any, todo: Mapping[str, Stage]) -> None:
        """The run is about to start, or to go on."""
        self.run_name, self.todo = run.config.name, set(todo)
        self.places = {run.keys[step.stage]: step for step in reversed(run.wanted)}
        self.iterations = run.config.iterations
        self.stages = len({run.keys[step.stage] for step in run.wanted})
        self.done = self.stages - len(todo)
        root = run.folder.root
        if run.causes:
            for cause in run.causes:
                self.say(cause)
            self.say(f"{len(todo)} of {self.stages} stages are to be run")
        elif self.done:
            self.say(f"continuing {root}: {self.done} of {self.stages} stages are done")
        else:
            self.say(f"new run in {root}")
        self._go_live(bool(todo))

    def begin_many(self, runs: Sequence[Any], todo: Mapping[str, Stage]) -> None:
        """Several runs are about to start, or to go on, as one plan."""
        self.todo = set(todo)
        self.places = {run.keys[step.stage]: step for run in runs for step in reversed(run.wanted)}
        self.iterations = max(run.config.iterations for run in runs)
        self.stages = len(self.places)
        self.done = self.stages - len(todo)
        asked = sum(len(run.wanted) for run in runs)
        shared = f"{asked - self.stages} more are shared, " if asked > self.stages else ""
        self.say(f"{len(runs)} runs have {self.stages} stages, {shared}{self.done} are done")
        self._go_live(bool(todo))

    def made(self, key: str, record: Mapping[str, Any]) -> None:
        """A stage of several runs' plan is done."""
        with self.lock:
            self._drop(key)
            self.todo.discard(key)
            self.done += 1
            note = self.places[key].stage.kind.note(record["facts"])
            said = f"{self.done:>4} of {self.stages}  {record['made_by']}: {self._where(key)}"
            self.say(f"{said} {record['wall_s']:7.1f} s  {note}".rstrip())
            self._refresh()

    def failed(self, key: str, why: str) -> None:
        """A stage of several runs' plan has failed; what does not read it goes on."""
        with self.lock:
            self._drop(key)
            self.say(f"failed: {self._where(key)}: {why}", "red")
            self._refresh()

    def _where(self, key: str) -> str:
        step = self.places[key]
        return f"iteration {step.iteration}, {_name(step)}"

    def _go_live(self, anything: bool) -> None:
        if self.console.is_terminal and anything and not self.quiet:
            self.live = Live(get_renderable=self._picture, console=self.console, refresh_per_second=4, transient=True)
            self.live.start()

    def preloading(self, preloaded: bool) -> None:
        """The tools are being imported, once or for each command."""
        if preloaded:
            self._bar("importing axolotl, lm-eval and mergekit, once", "imports", 0, None, "")

    def command(self, key: str, stage: Stage, number: int, command: Sequence[str]) -> None:
        """A stage runs its next command."""
        with self.lock:
            self._drop("imports")
            self.waiting.discard(key)
            part = f" ({number + 1}/{len(stage.commands)})" if len(stage.commands) > 1 else ""
            step = self.places[key]
            title = f"{step.checkpoint} {stage.kind.title}".strip()
            tool = " ".join(command[:3]) if command[1:2] == ["-m"] else command[0]
            where = f"iteration {step.iteration}/{self.iterations}  {_name(step)}{part}: {title}  {tool}"
            self._drop(key)
            self._bar(where, key, 0, None, "")
            if self.verbose:
                self.say(f"$ {' '.join(command)}", "dim")

    def progress(self, key: str, stage: Stage, now: runner.Progress) -> None:
        """The progress bar of the command that a stage runs has moved."""
        called = [said for begin, said in stage.kind.phases.items() if begin and now.phase.startswith(begin)]
        phase = called[0] if called else now.phase or stage.kind.phases.get("", "")
        with self.lock:
            if key in self.running:
                self.bar.update(self.running[key], completed=now.done, total=now.total, phase=phase)

    def resumed(self, key: str, stage: Stage) -> None:
        """A stage goes on from what one that was stopped has left."""
        self.say(f"{_name(self.places[key])}: goes on where it was stopped", "dim")

    def elsewhere(self, key: str) -> None:
        """Another process works on a stage."""
        with self.lock:
            if key not in self.waiting:
                self.waiting.add(key)
                self.say(f"{_name(self.places[key])}: another ts-loop is at it; waiting for what it leaves", "dim")

    def finished(self, step: Step, record: Mapping[str, Any], rows: Sequence[Row]) -> None:
        """A stage is done, now or before."""
        with self.lock:
            key = record["key"]
            self._drop(key)
            self.rows += rows
            where = f"iteration {step.iteration}/{self.iterations}  {_name(step):<17}"
            scores = [f"{row['task']} {row['accuracy']:.1%}" for row in rows]
            note = "  ".join(filter(None, [*scores, step.stage.kind.note(record["facts"])]))
            if key in self.todo:
                self.todo.discard(key)
                self.done += 1
                if record["made_by"] == self.run_name:
                    self.say(f"{where} {record['wall_s']:7.1f} s  {note}".rstrip())
                else:
                    self.say(f"{where}   reused  {note}  (made by {record['made_by']})")
            elif record["made_by"] != self.run_name:
                self.say(f"{where}   reused  {note}  (made by {record['made_by']})")
            self._refresh()

    def end(self, run: Any, results: Mapping[str, Any], arms: Sequence[Arm] = ()) -> None:
        """The run is over: the table, what is sure of it, where the time went, and where everything lies."""
        self.close()
        rows = results["rows"]
        several = results.get("pooled")
        self._print(table(several, "scores, the mean of all seeds") if several else table(rows))
        if arms:
            self._print(arm_table(arms))
        for line in results["verdict"]:
            self.say(line)
        for line in choices(results.get("chosen", [])):
            self.say(line)
        if self.quiet:
            return
        if cells := repeat_cells(of_first(several or rows)):
            self._print(_lines("questions asked k times", REPEAT_HEADS[:-1], [line[:-1] for line in cells], 2))
        if cells := pass_cells(rows):
            self._print(_lines("passes of TaH checkpoints", PASS_HEADS, cells, 3))
        self._print(kind_table([record for step in run.steps if (record := run.record(step))]))
        cost = "" if results["cost_usd"] is None else f", {results['cost_usd']:.2f} US dollars"
        self.say(f"{clock(results['wall_s'])}{cost} in all")
        self.say(f"checkpoints, logs and scores: {run.folder.root}\nto look at: {run.folder.report}")

    def close(self) -> None:
        """Take the live view off the screen."""
        if self.live:
            with contextlib.suppress(OSError, SystemExit):
                self.live.stop()
            self.live = None

    def _drop(self, key: str) -> None:
        if (task := self.running.pop(key, None)) is not None:
            self.bar.remove_task(task)

    def _bar(self, text: str, key: str, done: int, total: int | None, phase: str) -> None:
        with self.lock:
            if key in self.running:
                self.bar.update(self.running[key], completed=done, total=total, phase=phase)
            else:
                self.running[key] = self.bar.add_task(text, total=total, completed=done, phase=phase)
                if not self.live:
                    self.say(text, "dim")
            self._refresh()

    def _picture(self) -> Group:
        elapsed = time.monotonic() - self.begun
        head = Text(f"stage {min(self.done + 1, self.stages)} of {self.stages}, {clock(elapsed)} so far", style="bold")
        parts: list[Any] = [head, self.bar]
        if self.rows:
            parts.append(table(self.rows, "scores so far"))
        return Group(*parts)

    def _refresh(self) -> None:
        if self.live:
            with contextlib.suppress(OSError, SystemExit):
                self.live.refresh()


def _name(step: Step) -> str:
    name = step.name.replace("_", " ")
    return f"{name} ({step.part})" if step.part else name


def clock(seconds: float) -> str:
    """A time as a person says it."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def change(row: Row, rows: Sequence[Row]) -> float | None:
    """Points of accuracy gained since iteration 0, None for iteration 0 itself."""
    for first in rows:
        if first["iteration"] == 0 and (first["checkpoint"], first["task"]) == (row["checkpoint"], row["task"]):
            return None if row is first else 100 * (row["accuracy"] - first["accuracy"])
    return None


def of_first(rows: Sequence[Row]) -> list[Row]:
    """The rows of the first arm and seed, which the run is about."""
    return [row for row in rows if all(row.get(key) == rows[0].get(key) for key in ("arm", "seed"))]


def in_order(rows: Sequence[Row]) -> list[Row]:
    """Rows as they are shown: by task, checkpoint and iteration."""
    return sorted(rows, key=lambda row: (row["task"], row["checkpoint"], row["iteration"]))


def table(rows: Sequence[Row], title: str = "scores") -> Table:
    """A row a checkpoint and task, a column an iteration, the change at its end in points, then the last one's rest."""
    rows = of_first(rows)
    iterations = sorted({row["iteration"] for row in rows})
    result = Table(title=title, title_justify="left")
    heads = ["task", "checkpoint", "questions", *map(str, iterations), "change", "95 % interval", "tokens", "closed"]
    for head in heads:
        result.add_column(head, justify="left" if head in ("task", "checkpoint") else "right")
    lines: dict[tuple[str, str], dict[int, Row]] = {}
    for row in in_order(rows):
        lines.setdefault((row["task"], row["checkpoint"]), {})[row["iteration"]] = row
    places = list(lines)
    for place, line in lines.items():
        last = line[max(line)]
        low, high = last["ci95"]
        gain = change(last, rows)
        colour = "" if not gain else "green" if gain > 0 else "red"
        tokens = last["tokens_per_answer"]
        result.add_row(
            place[0],
            place[1],
            str(last["n"]),
            *(f"{line[k]['accuracy']:.1%}" if k in line else "" for k in iterations),
            "" if gain is None else Text(f"{gain:+.1f}", style=colour),
            f"{100 * low:.1f}–{100 * high:.1f}",
            "" if tokens is None else f"{tokens:.1f}",
            f"{last['closed_traces']:.0%}",
            end_section=place != places[-1] and places[places.index(place) + 1][0] != place[0],
        )
    return result


def choices(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which t each iteration went on with, and why: a line each; of several arms or seeds, by their names."""
    several = len({(one["arm"], one["seed"]) for one in found}) > 1
    whose = [f" ({one['arm']}, seed {one['seed']})" if several else "" for one in found]
    return [f"iteration {one['iteration']}{who}: {one['why']}" for one, who in zip(found, whose, strict=True)]


CHOICE_HEADS = ("iteration", "t", "closed", "as the anchor", "score", "")


def choice_cells(found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """What each t came to that was tried, for the page; `found` as `results.json` has it under `chosen`."""
    return [
        [
            str(choice["iteration"]),
            f"{one['t']:g}",
            f"{one['closed']:.1%}" if "closed" in one else "",
            f"{one['agreement']:.1%}" if "agreement" in one else "",
            ", ".join(f"{task} {accuracy:.1%}" for task, accuracy in one.get("accuracy", {}).items()),
            "chosen" if one["t"] == choice["t"] else "" if one["passes"] else "falls short",
        ]
        for choice in found
        for one in choice["candidates"]
    ]


APART_HEADS = ("weights", "part", "tensors", "least °", "median °", "most °", "as lerp", "slerp from lerp", "at t")


def apart_cells(found: Mapping[str, Sequence[Summary]]) -> list[list[str]]:
    """The angles between two checkpoints' weights by part, for the table and the page; `found` by whose they are."""
    return [
        [
            whose,
            one.part,
            str(one.tensors),
            *(f"{angle:.2f}" for angle in (one.least, one.median, one.most)),
            f"{one.straight:.0%}",
            f"{one.differ:.1%}",
            f"{one.at:g}" if one.differ else "",
        ]
        for whose, by_part in found.items()
        for one in by_part
    ]


def apart_table(found: Mapping[str, Sequence[Summary]]) -> Table:
    """The angles between two checkpoints' weights; the last figures are shares of the way between the two."""
    return _lines("angles between the weights", APART_HEADS, apart_cells(found), 2)


DIAL_HEADS = ("task", "t", "accuracy", "95 % interval", "closed", "tokens", "as the anchor")


def dial_cells(found: Sequence[Point]) -> list[list[str]]:
    """What each t came to, for the table and the page."""
    return [
        [
            point.task,
            f"{point.t:g}",
            f"{point.accuracy.value:.1%}",
            f"{100 * point.accuracy.low:.1f}–{100 * point.accuracy.high:.1f}",
            f"{point.closed:.0%}",
            "" if point.tokens is None else f"{point.tokens:,.1f}",
            "" if math.isnan(point.agreement) else f"{point.agreement:.0%}",
        ]
        for point in found
    ]


def dial_table(found: Sequence[Point]) -> Table:
    """The thinking checkpoint at each t."""
    return _lines("the dial", DIAL_HEADS, dial_cells(found), 1)


ARM_HEADS = (
    "task",
    "checkpoint",
    "arm",
    "iteration",
    "accuracy",
    "tokens",
    "over the pair, points",
    "over the first arm",
    "p",
    "over seeds",
)


def arm_cells(found: Sequence[Arm]) -> list[list[str]]:
    """What came of each arm, for the table and the page."""
    width = len(arm_heads(found))
    return [
        [
            one.task,
            one.who.checkpoint,
            one.who.arm,
            str(one.who.iteration),
            f"{one.accuracy.value:.1%}"
            + ("" if math.isnan(one.accuracy.low) else f" ({one.accuracy.low:.1%} to {one.accuracy.high:.1%})"),
            "" if math.isnan(one.tokens) else f"{one.tokens:,.1f}",
            in_points(one.gain.gain) if one.gain else "",
            in_points(one.beside.gain) if one.beside else "",
            f"{one.beside.p:.2g}" if one.beside else "",
            in_points(one.beside.seeds) if one.beside and one.beside.seeds else "",
        ][:width]
        for one in found
    ]


def arm_heads(found: Sequence[Arm]) -> tuple[str, ...]:
    """The heads of those cells: the last says something of several seeds alone."""
    return ARM_HEADS if any(one.beside and one.beside.seeds for one in found) else ARM_HEADS[:-1]


def arm_table(found: Sequence[Arm]) -> Table:
    """What came of each arm; p-values are corrected for there being several."""
    return _lines("arms, at their last iteration", arm_heads(found), arm_cells(found), 3)


COMPARISON_HEADS = ("task", "checkpoint", "before", "after", "points (95 %)", "gained", "lost", "p", "tokens")


def comparison_cells(found: Sequence[Comparison]) -> list[list[str]]:
    """Paired comparisons, for the table and the page."""
    return [
        [
            one.task,
            one.after.checkpoint if one.before.checkpoint == one.after.checkpoint else "",
            f"{one.scores[0]:.1%}",
            f"{one.scores[1]:.1%}",
            in_points(one.gain),
            str(one.test.gained),
            str(one.test.lost),
            f"{one.p:.2g}",
            "" if math.isnan(one.tokens.value) else f"× {one.tokens.value:.2f}",
        ]
        for one in found
    ]


def comparison_table(found: Sequence[Comparison]) -> Table:
    """Paired comparisons; p-values are corrected for there being several."""
    sides = dict.fromkeys(f"{one.before} → {one.after}" for one in found)
    return _lines(f"question by question: {', '.join(sides)}", COMPARISON_HEADS, comparison_cells(found), 2)


def _lines(title: str, heads: Sequence[str], cells: Sequence[Sequence[str]], texts: int) -> Table:
    """A table whose first so many columns are text, the rest numbers."""
    result = Table(title=title, title_justify="left")
    for place, head in enumerate(heads):
        result.add_column(head, justify="left" if place < texts else "right")
    for line in cells:
        result.add_row(*line)
    return result


PASS_HEADS = ("iteration", "checkpoint", "task", "mean depth", "skipped", "MFLOPs a token", "× single", "× always")


def pass_cells(rows: Sequence[Row]) -> list[list[str]]:
    """What TaH checkpoints' answers cost, for the table and the page: beside a single pass, and every pass always."""
    return [
        [
            str(row["iteration"]),
            row["checkpoint"],
            row["task"],
            f"{row['mean_depth']:.3f}",
            f"{row['skip_rate']:.1%}",
            f"{row['flops_per_token'] / 1e6:,.2f}",
            f"{row['flops_per_token'] / row['flops_per_token_single']:.2f}",
            f"{row['flops_per_token'] / row['flops_per_token_always']:.2f}",
        ]
        for row in in_order(rows)
        if row.get("mean_depth") is not None
    ]


REPEAT_HEADS = ("task", "checkpoint", "iteration", "k", "avg@k (95 %)", "pass@k (95 %)", "maj@k (95 %)", "pass@j")


def repeat_cells(rows: Sequence[Row]) -> list[list[str]]:
    """What came of questions that were asked k times each, for the table and the page."""
    return [
        [
            row["task"],
            row["checkpoint"],
            str(row["iteration"]),
            str(row["repeats"]),
            *(
                f"{value:.1%} ({100 * low:.1f}–{100 * high:.1f})"
                for value, (low, high) in (
                    (row["accuracy"], row["ci95"]),
                    (row["pass_at_k"], row["pass_at_k_ci95"]),
                    (row["maj_at_k"], row["maj_at_k_ci95"]),
                )
            ),
            ", ".join(f"{j}: {share['value']:.1%}" for j, share in row["pass_at"].items()),
        ]
        for row in in_order(rows)
        if row.get("repeats")
    ]


PLAN_HEADS = (
    *("stage", "runs", "planned s", "used s", "used / planned"),
    *("planned MiB", "used MiB", "used / planned"),
)


def plan_cells(found: Sequence[Against], per_hour: float | None = None) -> list[list[str]]:
    """What was planned and used, for the page; with dollars, planned and used, where an hour has a price."""

    def of(planned: float | None, used: float) -> str:
        return f"{used / planned:.0%}" if planned else ""

    lines = []
    for one in found:
        (seconds, took), (memory, peak) = one.seconds, one.memory
        dollars = [] if per_hour is None else [f"{(s or 0) / 3600 * per_hour:.4f}" for s in one.seconds]
        if dollars and seconds is None:
            dollars[0] = ""
        planned = "" if seconds is None else f"{seconds:,.1f}"
        mib = [f"{size / 2**20:,.0f}" for size in one.memory]
        lines.append(
            [one.kind, str(one.runs), planned, f"{took:,.1f}", of(seconds, took), *mib, of(memory, peak), *dollars]
        )
    return lines


def by_kind(done: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, float, float, float]]:
    """(kind, runs, wall seconds, CPU seconds, peak MiB) of each kind of stage, from the records of what is done."""
    records = {record["key"]: record for record in done}
    result = []
    for name in dict.fromkeys(record["kind"] for record in records.values()):
        mine = [record for record in records.values() if record["kind"] == name]
        peak = max(record["peak_memory_mb"] for record in mine)
        wall, cpu = (sum(record[what] for record in mine) for what in ("wall_s", "cpu_s"))
        result.append((name, len(mine), wall, cpu, peak))
    return result


KIND_HEADS = ("stage", "runs", "wall s", "CPU s", "peak MiB")


def kind_cells(done: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Where the time went, for the table and the page."""
    return [[n, str(k), f"{wall:.1f}", f"{cpu:.1f}", f"{peak:.0f}"] for n, k, wall, cpu, peak in by_kind(done)]


def kind_table(done: Sequence[Mapping[str, Any]]) -> Table:
    """Where the time went."""
    return _lines("time by stage", KIND_HEADS, kind_cells(done), 1)


SWEEP_HEADS = ("run", "task", "checkpoint", "questions", "at first", "at last", "tokens")


def sweep_table(cells: Sequence[Sequence[str]]) -> Table:
    """What each run of a sweep came to."""
    return _lines("runs", SWEEP_HEADS, [list(line) for line in cells], 3)
