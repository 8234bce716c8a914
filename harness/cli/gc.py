"""`ts-loop gc`: gives disk space back."""

from __future__ import annotations

from pathlib import Path

import click

from harness.cli.status import OUT


@click.command("gc")
@OUT
@click.option(
    "--keep",
    type=click.Choice(["all", "last", "adapters"]),
    default="all",
    show_default=True,
    help="Which checkpoints stay of the stages that runs refer to: all; those of each run's last iteration; "
    "or none, adapters alone. One that is gone is made again when a stage needs it.",
)
@click.option("--dry-run", is_flag=True, help="Say what would go, take nothing away.")
def command(out: Path, keep: str, dry_run: bool) -> None:
    """Take away stages that no run refers to, and stages that never finished.

    Delete a run's folder first if you want its stages gone.
    """
    from harness.records import collect

    gone = collect(out, keep, dry_run)
    for what, size in gone:
        click.echo(f"{size / 1e6:10.1f} MB  {what}")
    total = sum(size for _, size in gone)
    click.echo(f"{total / 1e6:10.1f} MB  {'would be' if dry_run else 'are'} free")
