"""`ts-loop compare`: the paired test at the terminal."""

from __future__ import annotations

import json
from pathlib import Path

import click

from harness.cli.status import OUT
from harness.errors import LoopError

EXAMPLES = """\b
Examples:
  ts-loop compare mine                           the last iteration against the pair as it came
  ts-loop compare mine other                     instruct of two runs, their last iterations
  ts-loop compare mine:instruct@3 mine:thinking@0
"""


@click.command("compare", epilog=EXAMPLES)
@click.argument("before", metavar="RUN[:CHECKPOINT][@ITERATION]")
@click.argument("after", metavar="[RUN[:CHECKPOINT][@ITERATION]]", required=False)
@OUT
@click.option("--json", "as_json", is_flag=True, help="For a program to read.")
def command(before: str, after: str | None, out: Path, as_json: bool) -> None:
    """Say whether one checkpoint is better than another, question by question.

    The test is McNemar's exact one; p-values of several tasks are corrected (Holm). Where a run's questions were asked
    k times, pass@k and maj@k are tested too, corrected among themselves. CHECKPOINT is instruct or thinking, ITERATION
    a number; left out, instruct and the last one.
    """
    from harness import evidence, view

    found = (
        evidence.between(evidence.chosen(out, before), evidence.chosen(out, after))
        if after
        else evidence.gains(evidence.read(out / before))
    )
    if not found:
        raise LoopError(f"{before}: only the pair as it came was evaluated; there is nothing to compare it with yet")
    if as_json:
        click.echo(json.dumps([evidence.as_json(one) for one in found], indent=2))
        return
    shown = view.View()
    shown.console.print(view.comparison_table(found))
    if not after and (several := evidence.gains(evidence.of_several(evidence.read(out / before)))):
        shown.console.print(view.comparison_table(several))
    for line in evidence.verdict(found):
        shown.say(line)
