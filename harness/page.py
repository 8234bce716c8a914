"""The run as one self-contained page. Knows HTML; is given rows, records and settings."""

from __future__ import annotations

import html
from typing import Any

from harness.outcomes import Row
from harness.plan import Step
from harness.view import KIND_HEADS, PASS_HEADS, change, clock, in_order, kind_cells, pass_cells

COLOURS = {"instruct": "#2563eb", "thinking": "#d97706"}
HEADS = ("iteration", "checkpoint", "task", "correct", "accuracy", "95 % interval", "tokens", "closed", "change")


def cells(row: Row, rows: list[Row]) -> list[str]:
    """One row of `results.json` as the page shows it."""
    low, high = row["ci95"]
    gain = change(row, rows)
    tokens = row["tokens_per_answer"]
    return [
        str(row["iteration"]),
        row["checkpoint"],
        row["task"],
        f"{row['correct']:g}/{row['n']}",
        f"{row['accuracy']:.1%}",
        f"{100 * low:.1f}–{100 * high:.1f}",
        "" if tokens is None else f"{tokens:.1f}",
        f"{row['closed_traces']:.0%}",
        "" if gain is None else f"{gain:+.1f}",
    ]


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
    name: str,
    rows: list[Row],
    done: list[tuple[Step, dict[str, Any]]],
    results: dict[str, Any],
    noted: dict[str, Any],
) -> str:
    """The run as one HTML page with nothing outside it.

    Args:
        name: of the run.
        rows: of `results.json`.
        done: the steps that are done, each with its stage's record.
        results: what `results.json` holds beside its rows.
        noted: what `run.json` holds.
    """
    ordered = in_order(rows)
    legend = " ".join(f'<b style="color:{colour}">{who}</b>' for who, colour in COLOURS.items())
    cost = "" if results["cost_usd"] is None else f", {results['cost_usd']:.2f} US dollars"
    asked = noted.get("asked", {})
    settings = {key: asked[key] for key in asked if key != "recipes"}
    commands = "\n".join(" ".join(command) for _, record in done for command in record["commands"])
    charts = "".join(
        f"<figure><figcaption>{html.escape(task)}</figcaption>{chart(task, rows)}</figure>"
        for task in sorted({row["task"] for row in rows})
    )
    passes = pass_cells(rows)
    passes_part = f"<h2>Passes of TaH checkpoints</h2>{_html_table(PASS_HEADS, passes)}" if passes else ""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(name)} – ThinkSwitch</title>'
        f"<style>{STYLE}</style><h1>{html.escape(name)}</h1>"
        f"<p>Accuracy by iteration: {legend}, with 95 % intervals. {clock(results['wall_s'])}{cost}.</p>"
        f'<div class="charts">{charts}</div><h2>Scores</h2>{_html_table(HEADS, [cells(r, rows) for r in ordered])}'
        f"{passes_part}<h2>Time by stage</h2>{_html_table(KIND_HEADS, kind_cells(done))}"
        f"<h2>Settings</h2><pre>{html.escape(_lines({**settings, **noted.get('versions', {})}))}</pre>"
        f"<h2>Commands</h2><pre>{html.escape(commands)}</pre></html>\n"
    )


def _html_table(heads: Any, rows: list[Any]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _lines(values: dict[str, Any]) -> str:
    return "\n".join(f"{key}: {value}" for key, value in values.items())
