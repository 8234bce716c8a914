"""`ts-loop logs`: what a stage's tools say."""

from __future__ import annotations

import time
from pathlib import Path

import click

from harness.cli.status import OUT
from thinkswitch_plugin.cli import visible


@click.command("logs")
@click.argument("name", required=False)
@click.argument("stage", required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on as it is written, to the stage that runs next, until Ctrl-C.")
@click.option("-n", "--lines", type=click.IntRange(min=1), default=40, show_default=True, help="How many of its last.")
@OUT
def command(name: str | None, stage: str | None, follow: bool, lines: int, out: Path) -> None:
    """Read a stage's log: of the stage that runs, or else the last one that ran.

    NAME is a run (the newest one by default), STAGE one of its stages, such as iter_02/distill.
    """
    from harness.records import log_of

    log = log_of(out, name, stage)
    click.echo(f"==> {log}", err=True)
    with log.open(encoding="utf-8", errors="replace") as file:
        said = file.read().replace("\r", "\n").splitlines(keepends=True)[-lines:]
        click.echo(visible("".join(said), coloured=True), nl=False)
        while follow:
            if more := file.read():
                click.echo(visible(more.replace("\r", "\n"), coloured=True), nl=False)
                continue
            if not stage and log_of(out, name, None) != log:
                context = click.get_current_context()
                context.invoke(command, name=name, stage=None, follow=True, lines=lines, out=out)
                return
            time.sleep(0.2)
