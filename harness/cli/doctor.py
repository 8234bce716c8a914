"""`ts-loop doctor`: can this machine do it?"""

from __future__ import annotations

import json
from pathlib import Path

import click

from harness.cli.status import OUT

COLOURS = {"ok": "green", "warning": "yellow", "failing": "bold red"}


@click.command("doctor")
@click.option("--config", type=click.Path(path_type=Path), help="A loop.yml that is to be run here, looked at as well.")
@OUT
@click.option("--json", "as_json", is_flag=True, help="For a bug report: no paths, no names of yours.")
def command(config: Path | None, out: Path, as_json: bool) -> None:
    """See whether this machine can do what a run asks, and what to mend where it cannot.

    Looks at versions, device and driver, memory, disk, the hub and the clock, then tries the tools: a whole loop on the
    embedded pair with two prompts and two questions, by recipes for this device, in half a minute to two. Exit code 1
    if something is failing.
    """
    from rich.console import Console
    from rich.markup import escape

    from harness import doctor
    from harness.view import View

    console = Console(highlight=False)
    found = []
    for finding in doctor.look(config, out.resolve(), View(Console(highlight=False, stderr=True), quiet=as_json)):
        found.append(finding)
        if not as_json:
            mend = f"\n         [dim]mend it: {escape(finding.mend)}[/]" if finding.mend else ""
            state = f"[{COLOURS[finding.state]}]{finding.state:<8}[/]"
            console.print(f"{state} {escape(finding.what)}: {escape(finding.said)}{mend}", soft_wrap=True)
    if as_json:
        names = doctor.names_of(config)
        rows = [{key: doctor.scrubbed(value, names) for key, value in one._asdict().items()} for one in found]
        click.echo(json.dumps({"at": doctor.stamp(), "findings": rows}, indent=2, ensure_ascii=False))
    if any(finding.state == "failing" for finding in found):
        raise SystemExit(1)
