"""`ts-loop report`: the page of one run or several."""

from __future__ import annotations

from pathlib import Path

import click

from harness.cli.status import OUT


@click.command("report")
@click.argument("runs", nargs=-1, required=True, metavar="RUN…")
@OUT
@click.option(
    "--to",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The page.  [default: RUN/report.html; OUT/report.html]",
)
def command(runs: tuple[str, ...], out: Path, to: Path | None) -> None:
    """Write what runs show as one page, with nothing outside it: verdict, charts, tests, cost, answers side by side.

    A run that is over has its page already; of one that goes on or was stopped, this shows what there is.
    """
    from harness.report import write

    click.echo(write(out, runs, to))
