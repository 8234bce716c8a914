"""`ts-loop dial`: a run's thinking checkpoint at other t."""

from __future__ import annotations

from pathlib import Path

import click

from harness.cli.status import OUT


@click.command("dial")
@click.argument("run")
@click.option("--t", "ts", default="0:1:0.1", show_default=True, metavar="FROM:TO:STEP", help="Or values: 0.1,0.2,0.3.")
@OUT
@click.option("--dry-run", is_flag=True, help="Check everything, write the recipes, print the native commands.")
def command(run: str, ts: str, out: Path, dry_run: bool) -> None:
    """Rebuild a run's last thinking checkpoint at other t, without training, and test each: where is the cliff?

    t is the weight of the distilled instruct checkpoint in the rebuilt thinking one, 0 to 1. The run is to be over; the
    dial is a run of its own beside it, RUN.dial, and continues as any other.
    """
    from rich.console import Console

    from harness import angles, dial, evidence, loop, report, view

    out = out.resolve()
    console = Console(highlight=False, stderr=dry_run)
    shown = view.View(console)
    planned = dial.prepare(out, run, dial.values(ts), shown)
    if dry_run:
        shown.close()
        click.echo("\n".join(loop.dry(planned)))
        return
    try:
        loop.go(planned, shown, told=False)
    finally:
        shown.close()
    found = evidence.dial(evidence.read(planned.folder.root), evidence.read(out / run))
    console.print(view.dial_table(found))
    for line in evidence.cliffs(found):
        console.print(line, markup=False, soft_wrap=True)
    turned = sorted({point.t for point in found})
    apart = {whose: angles.summed_up(mine, turned) for whose, mine in report.apart_of(out, run).items()}
    console.print(view.apart_table(apart))
    for line in angles.sentences(apart):
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"in the run's page: {report.write(out, [run])}", markup=False, soft_wrap=True)
