"""`ts-loop export`: one checkpoint as a folder to publish."""

from __future__ import annotations

from pathlib import Path

import click

from harness.cli.status import OUT
from harness.errors import LoopError

EXAMPLES = """\b
Examples:
  ts-loop export mine --checkpoint instruct@3 --to mine_instruct
  ts-loop export mine/untouched --checkpoint instruct --to other     an arm's; its last iteration
  ts-loop export mine --to adapter --adapter-only                    what was learnt, without the weights
  ts-loop export mine --checkpoint thinking@3 --to there --push ORG/NAME --private
"""


@click.command("export", epilog=EXAMPLES)
@click.argument("run", metavar="RUN[/ARM]")
@click.option("--checkpoint", metavar="CHECKPOINT[@ITERATION]", help="instruct or thinking.  [default: instruct, last]")
@click.option("--to", required=True, type=click.Path(path_type=Path), metavar="DIR", help="A new or empty folder.")
@click.option("--push", metavar="ORG/NAME", help="Put it on the hub as a new model, too.")
@click.option("--private", is_flag=True, help="There, for you alone.")
@click.option("--adapter-only", is_flag=True, help="The adapter in place of the whole weights.")
@click.option("--license", "licensed", metavar="ID", help="The hub's name of a licence.  [default: the parents']")
@OUT
def command(
    run: str,
    checkpoint: str | None,
    to: Path,
    push: str | None,
    private: bool,
    adapter_only: bool,
    licensed: str | None,
    out: Path,
) -> None:
    """Write a run's checkpoint as a folder to publish: weights, tokenizer, a card, the recipes that make it again.

    The card is written from the run's record: parents, decoding, prompts, what was dropped, settings, scores with their
    intervals and tests. Nothing in the folder names a place on this machine.
    """
    from harness import export, lineage

    if push:
        export.check_push(push)
    elif private:
        raise LoopError("--private: goes with --push ORG/NAME")
    chosen = lineage.choose(out, f"{run}:{checkpoint}" if checkpoint else run)
    parents = [chosen.parent(role) for role in ("instruct", "thinking")]
    export.write(chosen, to, export.licence(parents, licensed), push or to.resolve().name, adapter_only)
    click.echo(f"{chosen.who}: {to}")
    if push:
        click.echo(export.push(to, push, private))
