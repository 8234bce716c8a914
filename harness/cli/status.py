"""`ts-loop status`: how far each run is."""

from __future__ import annotations

import json
from pathlib import Path

import click

from harness.errors import LoopError

OUT = click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Where the runs are."
)


@click.command("status")
@click.argument("name", required=False)
@OUT
@click.option("--json", "as_json", is_flag=True, help="For a program to read.")
def command(name: str | None, out: Path, as_json: bool) -> None:
    """See how far each run is, and what runs now. NAME shows one run's stages."""
    from rich.console import Console
    from rich.table import Table

    from harness.records import read_run, runs

    found = []
    for each in [name] if name else runs(out):
        try:
            found.append(read_run(out, each))
        except LoopError as error:
            if name:
                raise
            click.echo(f"ts-loop: {error}", err=True)  # the others can be read
    if as_json:
        click.echo(json.dumps([run.as_json() for run in found], indent=2))
        return
    console = Console(highlight=False)
    if not found:
        console.print(f"no runs in {out}", soft_wrap=True)
        return
    table = Table()
    if name:
        for head in ("stage", "is", "key"):
            table.add_column(head)
        for step in found[0].steps:
            table.add_row(step["place"], step["state"], step["key"])
    else:
        for head in ("run", "stages done", "now", "wall time", "scores"):
            table.add_column(head)
        for run in found:
            table.add_row(run.name, f"{run.done} of {len(run.steps)}", run.now, run.clock, run.scores)
    console.print(table)
