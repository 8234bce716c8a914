"""`ts-loop plan`: what a run will take, before anything runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import isinf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.cli import loop
from harness.errors import LoopError

if TYPE_CHECKING:
    from harness.card import Card
    from harness.costs.estimate import Estimate
    from harness.costs.forecast import Compared, Device
    from harness.stages import Recipe

HELP = """What each stage will take, before anything runs: memory, time, tokens, disk, downloads, dollars.

Takes the loop's own options. Memory is that of the recipe's own training step, run on tensors without numbers for the
checkpoint's shape: only its config.json is needed, no weights. What cannot be known is counted as at most: answers and
rows as long as the recipes let them be. What will not fit is said with the setting that mends it.

RECIPE is one Axolotl recipe by itself (Think-at-Hard's, say), its rows measured where its data is here. A plan for this
machine is kept beside its run, whose page shows what was used against it (ts-loop report). --compare puts a prediction
made afterwards, rows as long as they were, beside what each stage has used."""
EPILOG = """\b
Examples:
  ts-loop plan                                              the embedded pair on this machine
  ts-loop plan --config recipes/qwen3_4b/loop.yml --vram 8  the paper's pair on a card that is not here
  ts-loop plan --config mine/loop.yml --distill on-policy --set on_policy.micro_batch_size=1
  ts-loop plan --config mine/loop.yml --vram 24 --speed 30,900     with tokens a second that you know
  ts-loop plan recipes/qwen3_1.7b/tah_backbone.yml --vram 24       a recipe alone
  ts-loop plan --compare mine                               after a run
"""
SHARED = (
    "iterations", "config", "name", "instruct", "thinking", "prompts", "tasks", "include_path", "t", "anchor",
    "distill", "arms", "seed", "seeds", "limit", "changes", "out",
)  # fmt: skip
GB = 1e9
FITS = {True: "[green]fits[/]", False: "[bold red]does not fit[/]", None: "[dim]main memory[/]"}


def _speed(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        decode, train = (float(part) for part in text.split(","))
        if min(decode, train) <= 0:
            raise ValueError
    except ValueError:
        raise click.BadParameter("write two numbers above 0, such as 30,900") from None
    return decode, train


PARAMETERS: list[click.Parameter] = [
    click.Argument(["recipe"], required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path)),
    *(option for option in loop.PARAMETERS if option.name in SHARED),
    click.Option(
        ["--vram"],
        type=click.FloatRange(min=1),
        metavar="GB",
        help="Plan for a GPU of so many GB (8, 12, 16, 24, 48, 80), here or elsewhere.  [default: this machine's]",
    ),
    click.Option(
        ["--speed"],
        callback=_speed,
        metavar="WRITE,LEARN",
        help="Tokens a second that one answer is written at, and that are learnt from.  [default: timed on this "
        "machine in seconds; unknown for another card]",
    ),
    click.Option(["--compare"], metavar="RUN", help="Put prediction beside what each stage of a run has used."),
    click.Option(["--json", "as_json"], is_flag=True, help="For a program to read."),
]


def callback(
    recipe: Path | None,
    config: Path | None,
    out: Path,
    changes: tuple[str, ...],
    vram: float | None,
    speed: tuple[float, float] | None,
    compare: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Plan, and print it."""
    from rich.console import Console

    from harness import card as cards
    from harness.costs import forecast, kept
    from harness.files import free_disk
    from harness.rundir import RunDir

    out = out.resolve()
    card = cards.of_size(vram) if vram else cards.at_hand()
    cache = out / "stages" / ".plan.json"

    def on() -> Device:
        return forecast.device(card, vram is None, speed, cache)

    if compare:
        rows = forecast.compared(out, compare, on())
        if as_json:
            click.echo(json.dumps([row._asdict() for row in rows], indent=2))
        else:
            show_compared(rows, Console(highlight=False))
        return
    said: list[str] = []
    per_hour, to_fetch = None, 0.0
    if recipe:
        from harness.config import assignment, located, put, read_yaml

        settings = located(read_yaml(recipe), recipe.resolve().parent)
        for place, value in map(assignment, changes):
            put(settings, place, value)
        if not settings.get("base_model"):
            raise LoopError(f"{recipe}: has no base_model: name a training recipe of Axolotl's, or leave RECIPE out")
        lines = [forecast.training("", settings, (1,), on())]
    else:
        asked, recipes, said = loop.asked_for(config, options, changes, card)
        lines = forecast.of_run(asked, recipes, on(), out)
        if vram is None:
            kept.keep(lines, card, RunDir(out / asked.name).plan)
        per_hour, to_fetch = asked.usd_per_hour, forecast.downloads(asked)
        said += made_for_a_gpu(recipes, card)
    if as_json:
        click.echo(json.dumps(as_data(lines, card, per_hour, to_fetch, free_disk(out)[1]), indent=2))
        return
    console = Console(highlight=False)
    for line in said:
        console.print(line, markup=False, soft_wrap=True)
    show(lines, card, per_hour, to_fetch, free_disk(out)[1], console)


def made_for_a_gpu(recipes: Mapping[str, Recipe], card: Card) -> list[str]:
    """A line that says so where recipes name a GPU and a CPU is planned for."""
    from harness.asking import SERVED

    wants = {
        name: recipe.get("device") or f"model: {recipe['model']}"
        for name, recipe in recipes.items()
        if str(recipe.get("device")).startswith("cuda") or recipe.get("model") in SERVED
    }
    if card.gpu or not wants:
        return []
    named = ", ".join(f"{name} ({what})" for name, what in wants.items())
    return [f"{named}: made for a GPU, and this is planned for {card.name}; --vram GB plans for a card"]


def totals(lines: list[Estimate], per_hour: float | None) -> dict[str, float | None]:
    """Of the whole run: tokens at most, seconds and dollars about (None where a part is unknown), bytes of disk."""
    from harness.checks import disk_needed

    seconds = None if any(line.seconds is None and line.tokens for line in lines) else 0.0
    if seconds is not None:
        seconds = sum(line.seconds or 0.0 for line in lines)
    leaves = sum(line.leaves for line in lines)
    largest = max((max(line.beside, line.leaves / len(line.iterations)) for line in lines), default=0.0)
    return {
        "tokens": sum(line.tokens or 0.0 for line in lines),
        "seconds": seconds,
        "usd": None if seconds is None or per_hour is None else seconds / 3600 * per_hour,
        "disk": leaves,
        "disk_peak": disk_needed(leaves, largest),
    }


def as_data(lines: list[Estimate], card: Card, per_hour: float | None, to_fetch: float, room: float) -> dict[str, Any]:
    """What `--json` prints; sizes in bytes, times in seconds, what nobody limits or knows null."""
    from dataclasses import asdict

    whole = totals(lines, per_hour)
    return {
        "device": {"name": card.name, "memory": card.memory, "gpu": card.gpu},
        "stages": [{**asdict(line), "room": None if isinf(line.room) else line.room} for line in lines],
        "total": {**whole, "download": to_fetch, "disk_free": room, "disk_fits": (whole["disk_peak"] or 0.0) <= room},
    }


def show(lines: list[Estimate], card: Card, per_hour: float | None, to_fetch: float, room: float, console: Any) -> None:
    """Print the plan as a table, and under it what does not fit; `room` is what the disk has free, in bytes."""
    from rich.table import Table

    table = Table(title=f"on {card.name}: {card.memory / GB:.1f} GB", title_justify="left")
    table.add_column("stage", overflow="fold")
    for head in ("times", "memory", "", "tokens ≤", "time ~", "disk"):
        table.add_column(head, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(
            line.label,
            str(len(line.iterations)),
            f"{(line.memory or line.main) / GB:.2f} GB",
            FITS[line.fits],
            f"{line.tokens:,.0f}" if line.tokens else "",
            clock(line.seconds) if line.tokens else "",
            f"{line.leaves / GB:.2f} GB" if line.leaves else "",
        )
    console.print(table)
    whole = totals(lines, per_hour)
    said = [f"{whole['tokens']:,.0f} tokens at most"]
    said += [f"about {clock(whole['seconds'])}, one stage after the other"] if whole["seconds"] is not None else []
    said += [f"about ${whole['usd']:.2f}"] if whole["usd"] is not None else []
    leaves, most = ((whole[key] or 0.0) / GB for key in ("disk", "disk_peak"))
    said += [f"disk {leaves:.2f} GB, at its peak {most:.2f} of {room / GB:.0f} free"]
    said += [f"{to_fetch / GB:.2f} GB to download"] if to_fetch else []
    console.print(" · ".join(said), soft_wrap=True)
    if whole["seconds"] is None:
        console.print("time: that card is not here; give --speed WRITE,LEARN in tokens a second", soft_wrap=True)
    elif whole["seconds"]:
        console.print("time: of writing and learning, without loading, merges and NF4 copies", soft_wrap=True)
    if whole["seconds"] is not None and per_hour is None and card.gpu:
        console.print("dollars: give --set usd_per_hour=…, or say it in loop.yml", soft_wrap=True)
    for line in lines:
        parts = " + ".join(f"{what} {size / GB:.2f}" for what, size in line.parts.items() if size >= 5e6)
        told = "; ".join([*line.notes, *([f"{parts} GB"] if parts else [])])
        if told:
            console.print(f"{line.label}: {told}", style="dim", soft_wrap=True)
    for what, needs, mend in lacking(lines, whole["disk_peak"] or 0.0, room):
        console.print(f"[bold red]{what}[/] needs {needs}: {mend}", soft_wrap=True)


def lacking(lines: list[Estimate], most: float, room: float) -> list[tuple[str, str, str]]:
    """What does not fit: whose it is, how much is lacking, and what mends it; `most` bytes go on a disk with `room`."""
    found = []
    for line in lines:
        if line.memory > line.room:
            mend = f"mend it by {line.mend}" if line.mend else "no setting mends it: a larger card, a smaller pair"
            found.append((line.label, f"{(line.memory - line.room) / GB:.2f} GB more", mend))
        if line.main_room is not None and line.main > line.main_room:
            more = f"{(line.main - line.main_room) / GB:.2f} GB more of main memory"
            found.append((line.label, more, "a machine with more, a smaller pair"))
    if most > room:
        more = f"{(most - room) / GB:.2f} GB more"
        found.append(("the disk", more, "ts-loop gc, fewer iterations with --iters, or another disk with --out"))
    return found


def show_compared(rows: list[Compared], console: Any) -> None:
    """Print prediction beside use."""
    from rich.table import Table

    table = Table()
    for head in ("iteration", "stage", "memory", "used", "", "time ~", "used", "disk", "used"):
        table.add_column(head, justify="left" if head == "stage" else "right")
    for row in rows:
        (memory, used), (seconds, took), (disk, lies) = row.memory, row.seconds, row.disk
        table.add_row(
            str(row.iteration),
            row.name,
            f"{memory / GB:.2f} GB",
            f"{used / GB:.2f} GB",
            f"{memory / used - 1:+.0%}" if used else "",
            clock(seconds),
            clock(took),
            f"{disk / GB:.2f} GB",
            f"{lies / GB:.2f} GB",
        )
    console.print(table)


def clock(seconds: float | None) -> str:
    """12 s, 3 min, 4.5 h; a question mark where nobody knows."""
    if seconds is None:
        return "?"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"


command = click.Command("plan", params=PARAMETERS, callback=callback, help=HELP, epilog=EPILOG)
