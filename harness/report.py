"""Shows a run: live at the terminal, as the closing table, and as one self-contained page.

Knows Rich and HTML. Is told what happens by `loop` and never asks: on a terminal one live view, elsewhere plain lines.
"""

from __future__ import annotations

import html
import time
from pathlib import Path
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

from harness.scores import Row
from harness.stages import Stage

WHAT = {
    "generate": "thinking answers the prompts",
    "distill": "instruct learns the answers",
    "reconstruct": "thinking is rebuilt",
    "evaluate": "both are tested",
}
PLAIN_WIDTH = 110  # of a log or a pipe, where Rich would cut cells to fit 80 columns
COLOURS = {"instruct": "#2563eb", "thinking": "#d97706"}


class View:
    """One run as it goes. On a terminal a live view; elsewhere a line per event."""

    def __init__(self, console: Console | None = None):
        """`console` defaults to standard output."""
        self.console = console or Console(highlight=False)
        if not self.console.is_terminal:
            self.console.width = max(self.console.width, PLAIN_WIDTH)
        self.live: Live | None = None
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.running: dict[Path | None, TaskID] = {}  # by the stage's folder; None for the imports
        self.rows: list[Row] = []
        self.iterations = self.stages = self.done = 0
        self.begun = time.monotonic()

    def begin(self, root: Path, iterations: int, stages: int, done: int, continued: bool) -> None:
        """The run is about to start, or to go on."""
        self.iterations, self.stages, self.done = iterations, stages, done
        what = f"continuing {root}: {done} of {stages} stages are done" if continued else f"new run in {root}"
        self.console.print(what, soft_wrap=True)
        if self.console.is_terminal and done < stages:
            self.live = Live(self._picture(), console=self.console, refresh_per_second=4, transient=True)
            self.live.start()

    def preloading(self) -> None:
        """The tools are being imported."""
        self._task(None, "importing axolotl, lm-eval and mergekit, once")

    def command(self, stage: Stage, number: int, command: list[str]) -> None:
        """A stage runs its next command."""
        part = f" ({number + 1}/{len(stage.commands)})" if len(stage.commands) > 1 else ""
        where = f"iteration {stage.iteration}/{self.iterations}  {stage.name}{part}"
        self._task(stage.folder, f"{where}: {WHAT[stage.name]}  [dim]{command[0]}[/dim]")

    def counting(self, stage: Stage) -> None:
        """A stage counts the passes of a TaH checkpoint's answers."""
        self._task(stage.folder, f"iteration {stage.iteration}/{self.iterations}  {stage.name}: passes are counted")

    def progress(self, stage: Stage, done: int, total: int) -> None:
        """The progress bar of the command that a stage runs has moved."""
        self.bar.update(self.running[stage.folder], completed=done, total=total)

    def finished(self, stage: Stage, facts: dict[str, Any]) -> None:
        """A stage is done."""
        self._drop(stage.folder)
        self.done += 1
        self.rows += facts.get("rows", [])
        line = f"iteration {stage.iteration}/{self.iterations}  {stage.name:<11} {facts['wall_s']:7.1f} s"
        if note := _note(facts):
            line += f"  {note}"
        self.console.print(line, soft_wrap=True)
        self._refresh()

    def end(self, rows: list[Row], stages: list[dict[str, Any]], run: Any) -> None:
        """The run is over: the table, where the time went, and where everything lies."""
        self.close()
        self.console.print(table(rows))
        if cells := pass_cells(rows):
            passes = Table(*PASS_HEADS, title="passes of TaH checkpoints", title_justify="left")
            for line in cells:
                passes.add_row(*line)
            self.console.print(passes)
        self.console.print(stage_table(stages))
        self.console.print(f"checkpoints, logs and scores: {run.root}\nto look at: {run.report}", soft_wrap=True)

    def close(self) -> None:
        """Take the live view off the screen."""
        if self.live:
            self.live.stop()
            self.live = None

    def _drop(self, key: Path | None) -> None:
        if (task := self.running.pop(key, None)) is not None:
            self.bar.remove_task(task)

    def _task(self, key: Path | None, text: str) -> None:
        for old in (None, key):
            self._drop(old)
        self.running[key] = self.bar.add_task(text, total=None)
        if not self.live:
            self.console.print(Text.from_markup(text), style="dim", soft_wrap=True)
        self._refresh()

    def _picture(self) -> Group:
        elapsed = time.monotonic() - self.begun
        head = Text(f"stage {min(self.done + 1, self.stages)} of {self.stages}, {_clock(elapsed)} so far", style="bold")
        parts: list[Any] = [head, self.bar]
        if self.rows:
            newest = max(row["iteration"] for row in self.rows)
            parts.append(table([row for row in self.rows if row["iteration"] in (0, newest)], "last scores"))
        return Group(*parts)

    def _refresh(self) -> None:
        if self.live:
            self.live.update(self._picture())


def _note(facts: dict[str, Any]) -> str:
    """What a stage did, in a few words."""
    if facts["stage"] == "generate":
        labels = facts["labels"]
        return f"{labels['closed']} of {labels['total']} answers closed their trace"
    if facts["stage"] == "distill":
        return "; ".join(line.split(": ", 1)[-1] for line in facts["prepared"])
    if facts["stage"] == "evaluate":
        return "  ".join(f"{r['checkpoint']} {r['task']} {r['accuracy']:.1%}" for r in facts["rows"])
    return ""


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def change(row: Row, rows: list[Row]) -> float | None:
    """Points of accuracy gained since iteration 0, None for iteration 0 itself."""
    for first in rows:
        if first["iteration"] == 0 and (first["checkpoint"], first["task"]) == (row["checkpoint"], row["task"]):
            return None if row is first else 100 * (row["accuracy"] - first["accuracy"])
    return None


def _cells(row: Row, rows: list[Row]) -> list[str]:
    """One row as the table and the page show it."""
    low, high = row["ci95"]
    gain = change(row, rows)
    tokens = row["tokens_per_answer"]
    return [
        str(row["iteration"]),
        row["checkpoint"],
        row["task"],
        f"{row['correct']}/{row['n']}",
        f"{row['accuracy']:.1%}",
        f"{100 * low:.1f}–{100 * high:.1f}",
        "" if tokens is None else f"{tokens:.1f}",
        f"{row['closed_traces']:.0%}",
        "" if gain is None else f"{gain:+.1f}",
    ]


HEADS = ("iteration", "checkpoint", "task", "correct", "accuracy", "95 % interval", "tokens", "closed", "change")


def in_order(rows: list[Row]) -> list[Row]:
    """Rows as they are shown: by task, checkpoint and iteration."""
    return sorted(rows, key=lambda row: (row["task"], row["checkpoint"], row["iteration"]))


def table(rows: list[Row], title: str = "scores") -> Table:
    """Iteration × checkpoint × task with intervals and the change from iteration 0, in points."""
    result = Table(title=title, title_justify="left")
    for head in HEADS:
        result.add_column(head, justify="left" if head in ("checkpoint", "task") else "right")
    for row in in_order(rows):
        cells = _cells(row, rows)
        if cells[-1]:
            cells[-1] = f"[{'green' if cells[-1][0] == '+' else 'red'}]{cells[-1]}[/]"
        result.add_row(*cells, end_section=row["iteration"] == max(r["iteration"] for r in rows))
    return result


PASS_HEADS = ("iteration", "checkpoint", "task", "mean depth", "skipped", "MFLOPs a token", "× single", "× always")


def pass_cells(rows: list[Row]) -> list[list[str]]:
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


def by_stage(stages: list[dict[str, Any]]) -> list[tuple[str, int, float, float, float]]:
    """(name, runs, wall seconds, CPU seconds, peak MiB) for each kind of stage that is done."""
    done = [facts for facts in stages if facts]
    result = []
    for name in WHAT:
        mine = [facts for facts in done if facts["stage"] == name]
        if mine:
            peak = max(facts["peak_memory_mb"] for facts in mine)
            result.append((name, len(mine), sum(f["wall_s"] for f in mine), sum(f["cpu_s"] for f in mine), peak))
    return result


def stage_table(stages: list[dict[str, Any]]) -> Table:
    """Where the time went."""
    result = Table(title="time by stage", title_justify="left")
    for head in ("stage", "runs", "wall s", "CPU s", "peak MiB"):
        result.add_column(head, justify="left" if head == "stage" else "right")
    for name, runs, wall, cpu, peak in by_stage(stages):
        result.add_row(name, str(runs), f"{wall:.1f}", f"{cpu:.1f}", f"{peak:.0f}")
    return result


def chart(task: str, rows: list[Row]) -> str:
    """Accuracy by iteration of one task as inline SVG, with the 95 % intervals."""
    width, height, left, top, bottom = 420, 240, 44, 16, 30
    mine = [row for row in rows if row["task"] == task]
    last = max(1, *(row["iteration"] for row in mine))

    def x(iteration: int) -> float:
        return left + (width - left - 16) * iteration / last

    def y(share: float) -> float:
        return top + (height - top - bottom) * (1 - share)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="accuracy on {html.escape(task)}">']
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 16}" y1="{y(share):.1f}" y2="{y(share):.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y(share) + 4:.1f}" text-anchor="end">{share:.0%}</text>')
    for iteration in range(last + 1):
        parts.append(f'<text x="{x(iteration):.1f}" y="{height - 8}" text-anchor="middle">{iteration}</text>')
    for who, colour in COLOURS.items():
        line = sorted((row for row in mine if row["checkpoint"] == who), key=lambda row: row["iteration"])
        points = " ".join(f"{x(row['iteration']):.1f},{y(row['accuracy']):.1f}" for row in line)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for row in line:
            at, (low, high) = x(row["iteration"]), row["ci95"]
            span = f'x1="{at:.1f}" x2="{at:.1f}" y1="{y(low):.1f}" y2="{y(high):.1f}"'
            parts.append(
                f'<line {span} stroke="{colour}" opacity=".45"/>'
                f'<circle cx="{at:.1f}" cy="{y(row["accuracy"]):.1f}" r="3.5" fill="{colour}">'
                f"<title>{who}, iteration {row['iteration']}: {row['correct']}/{row['n']}</title></circle>"
            )
    return "".join([*parts, "</svg>"])


STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1f2937}
table{border-collapse:collapse;margin:1rem 0}
td,th{padding:.25rem .7rem;border-bottom:1px solid #e5e7eb;text-align:right}
td:nth-child(-n+3),th:nth-child(-n+3){text-align:left}.charts{display:flex;flex-wrap:wrap;gap:1.5rem}figure{margin:0}
svg{width:26rem;max-width:100%}svg text{font-size:11px;fill:#6b7280}.grid{stroke:#e5e7eb}
pre{background:#f3f4f6;padding:.7rem;overflow-x:auto}
"""


def page(
    name: str, rows: list[Row], stages: list[dict[str, Any]], results: dict[str, Any], noted: dict[str, Any]
) -> str:
    """The run as one HTML page with nothing outside it."""
    ordered = in_order(rows)
    legend = " ".join(f'<b style="color:{colour}">{who}</b>' for who, colour in COLOURS.items())
    cost = "" if results["cost_usd"] is None else f", {results['cost_usd']:.2f} US dollars"
    asked = noted.get("asked", {})
    settings = {key: asked[key] for key in asked if key not in ("recipes", "inputs")}
    commands = "\n".join(" ".join(command) for facts in stages for command in facts["commands"])
    charts = "".join(
        f"<figure><figcaption>{html.escape(task)}</figcaption>{chart(task, rows)}</figure>"
        for task in sorted({row["task"] for row in rows})
    )
    passes = pass_cells(rows)
    passes_part = f"<h2>Passes of TaH checkpoints</h2>{_html_table(PASS_HEADS, passes)}" if passes else ""
    times = [(n, str(k), f"{wall:.1f}", f"{cpu:.1f}", f"{peak:.0f}") for n, k, wall, cpu, peak in by_stage(stages)]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(name)} – ThinkSwitch</title>'
        f"<style>{STYLE}</style><h1>{html.escape(name)}</h1>"
        f"<p>Accuracy by iteration: {legend}, with 95 % Wilson intervals. {_clock(results['wall_s'])}{cost}.</p>"
        f'<div class="charts">{charts}</div><h2>Scores</h2>{_html_table(HEADS, [_cells(r, rows) for r in ordered])}'
        f"{passes_part}<h2>Time by stage</h2>{_html_table(('stage', 'runs', 'wall s', 'CPU s', 'peak MiB'), times)}"
        f"<h2>Settings</h2><pre>{html.escape(_lines({**settings, **noted.get('versions', {})}))}</pre>"
        f"<h2>Commands</h2><pre>{html.escape(commands)}</pre></html>\n"
    )


def _html_table(heads: Any, rows: list[Any]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _lines(values: dict[str, Any]) -> str:
    return "\n".join(f"{key}: {value}" for key, value in values.items())
