"""One or several runs as one self-contained page: no script, nothing fetched. Knows HTML by its template alone.

`page.html.j2` beside this module is the look; everything a model or a user wrote reaches it escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import charts, evidence
from harness.angles import Summary, by_layer, summed_up
from harness.evidence import Figures
from harness.outcomes import Row
from harness.report import Report
from harness.stats import Estimate
from harness.view import (
    APART_HEADS,
    CHOICE_HEADS,
    COMPARISON_HEADS,
    DIAL_HEADS,
    KIND_HEADS,
    PASS_HEADS,
    PLAN_HEADS,
    REPEAT_HEADS,
    apart_cells,
    arm_cells,
    arm_heads,
    change,
    choice_cells,
    choices,
    clock,
    comparison_cells,
    dial_cells,
    in_order,
    kind_cells,
    of_first,
    pass_cells,
    plan_cells,
    repeat_cells,
)

HEADS = ("task", "checkpoint", "iteration", "correct", "accuracy", "95 % interval", "change", "tokens", "closed")
UNPLANNED = (
    "Nothing was planned: ts-loop plan, with this run's options, keeps what it says for this page (ts-loop report)."
)
FIGURE_HEADS = (
    "task",
    "checkpoint",
    "iteration",
    "of the lead",
    "95 % interval",
    "tokens a right answer",
    "95 % interval",
)


def page(reports: Sequence[Report]) -> str:
    """The page of some runs."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, autoescape=True, trim_blocks=True
    )
    shown = []
    for report in reports:
        whole = picture(report)
        for kind in ("by_iteration", "frontier", "by_arm", "dial", "apart", "curves"):
            whole[kind] = [Markup(drawn) for drawn in whole[kind]]  # Vega escapes what it draws
        shown.append(whole)
    title = ", ".join(report.name for report in reports)
    return environment.get_template("page.html.j2").render(title=title, reports=shown)


def picture(report: Report) -> dict[str, Any]:
    """What the template shows of a run."""
    rows = in_order(of_first(report.rows))
    lines = evidence.verdict(report.comparisons)
    kinds = ["" if not one.sure else "better" if one.gain.value > 0 else "worse" for one in report.comparisons]
    last = max(row["iteration"] for row in rows)
    points = [
        {
            "iteration": row["iteration"],
            "checkpoint": row["checkpoint"],
            "task": row["task"],
            "accuracy": row["accuracy"],
            "low": row["ci95"][0],
            "high": row["ci95"][1],
            "tokens": row["tokens_per_answer"],
        }
        for row in rows
    ]
    by_task: dict[str, list[dict[str, Any]]] = {}
    for point in points:
        by_task.setdefault(point["task"], []).append(point)
    counted = {task: [p for p in mine if p["tokens"]] for task, mine in by_task.items()}
    asked = report.noted.get("asked", {})
    settings = {key: value for key, value in {**asked, **report.noted.get("versions", {})}.items() if key != "recipes"}
    return {
        "name": report.name,
        "missing": report.missing,
        "of": len(report.stages) + len(report.missing),
        "verdict": [{"text": text, "kind": kind} for text, kind in zip(lines, kinds, strict=True)],
        "cards": cards(report, last),
        "ship": ship(report, last),
        "seeds": report.seeds,
        "by_iteration": [charts.by_iteration(task, mine) for task, mine in by_task.items()],
        "frontier": [charts.frontier(task, mine) for task, mine in counted.items() if mine],
        "by_arm": [charts.arms(title, mine) for title, mine in arm_lines(report).items()],
        "tables": list(tables(report, rows)),
        "dial": [charts.dial(task, mine) for task, mine in by_t(report).items()],
        "apart": [charts.angles(f"angles: {whose}", rows) for whose, rows in layers(report).items() if rows],
        "curves": [charts.curve(title, logged) for title, logged in report.curves.items()],
        "questions": report.questions,
        "settings": "\n".join(f"{key}: {value}" for key, value in settings.items()),
        "commands": "\n".join(" ".join(command) for _, _, record in report.stages for command in record["commands"]),
    }


def ship(report: Report, last: int) -> str:
    """Which instruct checkpoint to use, as far as the questions say."""
    learnt = [one for one in report.comparisons if one.after.checkpoint == "instruct"]
    better, worse = ([one for one in learnt if one.sure and (one.gain.value > 0) == up] for up in (True, False))
    distilled = f"{report.name}/iter_{last:02d}/distill/instruct"
    if report.missing or not any(name == "distill" for _, name, _ in report.stages):
        return ""
    if better and not worse:
        return f"Use {distilled}, the last iteration's: none was chosen by these scores."
    if worse and not better:
        return "Keep the instruct checkpoint as it came."
    if worse:
        return f"{distilled} is better on some tasks and worse on others: it depends on what you need."
    return "Nothing here says that the distilled checkpoint is better than the one it came from."


def cards(report: Report, last: int) -> list[dict[str, str]]:
    """The few figures a reader looks for first."""
    found = []
    for one in report.comparisons:
        if one.after.checkpoint == "instruct":
            before, after = one.scores
            more = f"{before:.1%} → {after:.1%}, p = {one.p:.2g}"
            found.append(
                {"what": f"instruct, {one.task}", "value": f"{100 * (after - before):+.1f} points", "more": more}
            )
    for figure in report.figures:
        if figure.transferred and not math.isnan(figure.transferred.value) and figure.who.iteration == last:
            value = f"{figure.transferred.value:.0%}"
            found.append(
                {"what": f"of thinking's lead, {figure.task}", "value": value, "more": between(figure.transferred)}
            )
    cost = "" if report.cost_usd is None else f"{report.cost_usd:.2f} US dollars"
    peak = max((record["peak_memory_mb"] for _, _, record in report.stages), default=0)
    gpu = max((record.get("peak_gpu_memory_mb", 0) for _, _, record in report.stages), default=0)
    memory = f"{gpu / 1024:.1f} GiB of GPU memory" if gpu else f"{peak / 1024:.1f} GiB of memory"
    found.append({"what": "time", "value": clock(report.wall_s), "more": cost or memory})
    if cost:
        found.append({"what": "memory", "value": memory, "more": "at its peak"})
    return found


def by_t(report: Report) -> dict[str, list[dict[str, Any]]]:
    """What the dial's chart shows, by task: accuracy and closed traces at each t."""
    found: dict[str, list[dict[str, Any]]] = {}
    for point in report.dial:
        for what, share in (("accuracy", point.accuracy.value), ("closed traces", point.closed)):
            found.setdefault(point.task, []).append({"t": point.t, "share": share, "what": what})
    return found


def arm_lines(report: Report) -> dict[str, list[Row]]:
    """What the charts of the arms show, by task and checkpoint; none where there is one arm."""
    found: dict[str, list[Row]] = {}
    if len({row["arm"] for row in report.by_arm}) > 1:
        for row in sorted(report.by_arm, key=lambda row: (row["task"], row["checkpoint"])):
            found.setdefault(f"{row['task']}, {row['checkpoint']}: arms", []).append(row)
    return found


def summaries(report: Report) -> dict[str, list[Summary]]:
    """The angles between weights by part, at every t of the dial; by whose they are."""
    ts = sorted({point.t for point in report.dial})
    return {whose: summed_up(found, ts) for whose, found in report.apart.items()}


def layers(report: Report) -> dict[str, list[dict[str, Any]]]:
    """What the chart of angles shows, by whose they are."""
    return {whose: by_layer(found) for whose, found in report.apart.items()}


def between(estimate: Estimate, scale: str = "percent") -> str:
    """An interval: "17 % to 38 %", or plain numbers; empty where there is none."""
    if math.isnan(estimate.low):
        return ""
    if not math.isfinite(estimate.high):
        return f"{estimate.low:,.1f} or more"
    if scale == "percent":
        return f"{estimate.low:.0%} to {estimate.high:.0%}"
    return f"{estimate.low:,.1f}–{estimate.high:,.1f}"


def tables(report: Report, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The tables, each with its head, its rows of texts, and how many columns are text."""
    per_hour = report.noted.get("asked", {}).get("usd_per_hour")
    found: list[dict[str, Any]] = [
        {
            "id": "comparisons",
            "title": "Question by question",
            "note": "The last iteration against the pair as it came: McNemar's exact test (shares of several answers: "
            "signs turned at random), corrected for there being several (Holm); points with 95 % intervals.",
            "heads": COMPARISON_HEADS,
            "rows": comparison_cells(report.comparisons),
            "texts": 2,
        },
        {
            "id": "arms",
            "title": "Arms",
            "note": "At their last iteration (merge_only has one: further ones would be the same); points and p-values "
            "over questions, corrected for there being several arms and tasks (Holm)"
            + ("; accuracy over all seeds; over seeds: Student's interval." if report.seeds > 1 else "."),
            "heads": arm_heads(report.arms),
            "rows": arm_cells(report.arms),
            "texts": 3,
        },
        {
            "id": "chosen",
            "title": "How t was chosen",
            "note": " ".join(f"{line[:1].upper()}{line[1:]}." for line in choices(report.chosen)),
            "heads": CHOICE_HEADS,
            "rows": choice_cells(report.chosen),
            "texts": 0,
        },
        {
            "id": "dial",
            "title": "The dial",
            "note": " ".join(f"{line}." for line in evidence.cliffs(report.dial))
            + " A t that is chosen by these scores is chosen on the test: other questions have to confirm it.",
            "heads": DIAL_HEADS,
            "rows": dial_cells(report.dial),
            "texts": 1,
        },
        {
            "id": "apart",
            "title": "Angles between the weights",
            "note": "As mergekit's slerp takes them, a tensor as one vector; below 1.81° it interpolates linearly. "
            "At the end: where slerp and lerp are farthest apart, as a share of the way between the two checkpoints.",
            "heads": APART_HEADS,
            "rows": apart_cells(summaries(report)),
            "texts": 2,
        },
        {
            "id": "scores",
            "title": "Scores",
            "note": f"The mean of {report.seeds} seeds." if report.seeds > 1 else "",
            "heads": HEADS,
            "rows": [cells(row, rows) for row in rows],
            "texts": 2,
        },
        {
            "id": "repeats",
            "title": "Questions asked k times",
            "note": "avg@k: the mean of a question's answers, as in the table above. pass@j: how likely one at least "
            "of j is right, unbiased (arXiv 2107.03374). maj@k: whether what most of them say is right (2203.11171); "
            "of several that as many say, the first to have so many; a trace that never closed has no vote.",
            "heads": REPEAT_HEADS,
            "rows": repeat_cells(rows),
            "texts": 2,
        },
        {
            "id": "at_k",
            "title": "pass@k and maj@k, question by question",
            "note": "As above: a question is right or wrong by all its answers together; corrected for there being "
            "several (Holm), apart from the table above.",
            "heads": COMPARISON_HEADS,
            "rows": comparison_cells(report.at_k),
            "texts": 2,
        },
        {
            "id": "figures",
            "title": "What moved, and what a right answer costs",
            "note": "The share of thinking's lead over instruct that has moved; tokens written for a right answer.",
            "heads": FIGURE_HEADS,
            "rows": [figure_cells(figure) for figure in report.figures],
            "texts": 2,
        },
        {
            "id": "passes",
            "title": "Passes of TaH checkpoints",
            "note": "",
            "heads": PASS_HEADS,
            "rows": pass_cells(rows),
        },
        {
            "id": "stages",
            "title": "Time and memory by stage",
            "note": "" if report.planned[1] else UNPLANNED,
            "heads": KIND_HEADS,
            "rows": kind_cells([record for _, _, record in report.stages]),
            "texts": 1,
        },
        {
            "id": "plan",
            "title": "Against the plan",
            "note": f"As ts-loop plan said of {report.planned[0]}, of the stages it was asked about: rows and answers "
            "as long as they may be, time of writing and learning without loading and merges.",
            "heads": (*PLAN_HEADS, *(() if per_hour is None else ("planned $", "used $"))),
            "rows": plan_cells(report.planned[1], per_hour),
            "texts": 1,
        },
    ]
    return [{"texts": 3, **table} for table in found if table["rows"]]


def cells(row: Row, rows: Sequence[Row]) -> list[str]:
    """One row of `results.json` as the page shows it."""
    low, high = row["ci95"]
    gain, tokens = change(row, rows), row["tokens_per_answer"]
    return [
        row["task"],
        row["checkpoint"],
        str(row["iteration"]),
        f"{row['correct']:g}/{row['n']}",
        f"{row['accuracy']:.1%}",
        f"{100 * low:.1f}–{100 * high:.1f}",
        "" if gain is None else f"{gain:+.1f}",
        "" if tokens is None else f"{tokens:,.1f}",
        f"{row['closed_traces']:.0%}",
    ]


def figure_cells(figure: Figures) -> list[str]:
    """The derived figures of one checkpoint and task."""
    moved, each = figure.transferred, figure.per_correct
    known = moved is not None and not math.isnan(moved.value)
    return [
        figure.task,
        figure.who.checkpoint,
        str(figure.who.iteration),
        f"{moved.value:.0%}" if moved is not None and known else "",
        between(moved) if moved is not None and known else "",
        f"{each.value:,.1f}" if math.isfinite(each.value) else "",
        between(each, "plain"),
    ]
