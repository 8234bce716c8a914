"""`ts-loop sweep`: many runs as one plan."""

from __future__ import annotations

from pathlib import Path

import click

from harness.cli.status import OUT

EPILOG = """\b
A sweep.yml:
  name: rates
  config: loop.yml                          beside it; the shipped loop where this is left out
  grid:                                     every combination, by the keys that --set takes
    seed: [0, 1, 2]
    distill.learning_rate: [1e-3, 2e-3]
  runs:                                     or one by one
    - {t: 0.3, anchor: previous}
"""


@click.command("sweep", epilog=EPILOG)
@click.argument("file", metavar="SWEEP.yml", type=click.Path(path_type=Path))
@click.option(
    "--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change a setting of all runs; may be repeated."
)
@OUT
@click.option("--dry-run", is_flag=True, help="Check everything, say which runs and stages there are; run nothing.")
@click.option("-q", "--quiet", is_flag=True, help="Nothing but the closing table.")
def command(file: Path, changes: tuple[str, ...], out: Path, dry_run: bool, quiet: bool) -> None:
    """Do many runs as one plan: what they share is done once, on all GPUs at once.

    Each is a run like any other, by its own name. One that fails costs the others nothing; the same command again goes
    on. At the end there is one table, OUT/NAME/sweep.json, and one page, OUT/NAME/report.html.
    """
    from rich.console import Console

    from harness import loop, report, sweep
    from harness.view import View, sweep_table

    console = Console(highlight=False)
    view, out = View(console, quiet=quiet), out.resolve()
    asked, planned = sweep.prepare(file, out, view, changes)
    if dry_run:
        todo = sweep.together(planned)
        loop.check_recipes(todo.values())
        for one in planned:
            click.echo(f"{one.name}: {sum(owner is one.run for owner, _ in todo.values())} stages to do")
        click.echo(f"{len(planned)} runs, {len(todo)} stages to do")
        return
    try:
        found = sweep.go(asked, planned, out, view)
    finally:
        view.close()
    console.print(sweep_table(list(sweep.table_rows(found))))
    if shown := [one.name for one in found if one.rows]:
        click.echo(f"to look at: {report.write(out, shown, out / asked.name / 'report.html')}")
    sweep.check(found)
