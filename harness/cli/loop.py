"""`ts-loop`, the loop itself."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

HELP = """Move a thinking checkpoint's skill into its instruct twin.

In each iteration the thinking checkpoint answers the prompts (lm-eval), its traces are removed and the answers
distilled into the instruct checkpoint (Axolotl, QLoRA), the thinking checkpoint is rebuilt by spherical interpolation
(mergekit), and both are tested (lm-eval). Only prompts come from you: no gold answer is ever used."""

PARAMETERS: list[click.Parameter] = [
    click.Option(["--iters", "iterations"], type=int, help="How many iterations.  [default: 3]"),
    click.Option(["--config"], type=click.Path(path_type=Path), help="A loop.yml.  [default: the shipped one]"),
    click.Option(["--name"], help="Name of the run, and of its folder under --out."),
    click.Option(["--instruct"], help="The instruct checkpoint: a folder or a hub id (owner/name@revision)."),
    click.Option(["--thinking"], help="The thinking checkpoint: a folder or a hub id."),
    click.Option(
        ["--prompts"], help="Your prompts: a .jsonl of `problem`, `prompt` or `messages` rows; or lm-eval tasks."
    ),
    click.Option(["--tasks"], help="What to score: lm-eval tasks, groups or patterns, separated by commas."),
    click.Option(["--include-path"], type=click.Path(path_type=Path), help="A folder with your own lm-eval tasks."),
    click.Option(
        ["--t"],
        type=float,
        help="Weight of instruct in the rebuilt thinking checkpoint, 0 to 1.  [default: the recipe's]",
    ),
    click.Option(
        ["--anchor"],
        help="What thinking is rebuilt from in each iteration: `original`, the checkpoint the run began with, or "
        "`previous`, the last rebuilt one.  [default: original]",
    ),
    click.Option(
        ["--distill"],
        help="What instruct learns from: `answers` of the thinking checkpoint, or `on-policy`, answers of its own that "
        "the thinking checkpoint judges token by token.  [default: answers]",
    ),
    click.Option(["--seed"], type=int, help="Seed of generation, training and evaluation.  [default: 42]"),
    click.Option(["--limit"], type=int, help="Ask only so many questions and prompts a task: a smoke run."),
    click.Option(
        ["--set", "changes"],
        multiple=True,
        metavar="KEY=VALUE",
        help="Change a setting of loop.yml (jobs=1) or of a recipe (distill.learning_rate=1e-4); may be repeated.",
    ),
    click.Option(
        ["--from", "again_from"],
        metavar="STAGE",
        help="Do a stage again (distill, iter_02/distill), and all that reads what it leaves.",
    ),
    click.Option(["--verify"], is_flag=True, help="Compare the hash of everything that counts as done."),
    click.Option(
        ["--out"],
        type=click.Path(path_type=Path),
        default=Path("runs"),
        show_default=True,
        help="Where run folders go, and stages/, which they share.",
    ),
    click.Option(["--dry-run"], is_flag=True, help="Check everything, write the recipes, print the native commands."),
    click.Option(
        ["--json", "as_json"], is_flag=True, help="Print results.json at the end, the rest to standard error."
    ),
    click.Option(["-q", "--quiet"], is_flag=True, help="Nothing but the scores."),
    click.Option(["-v", "--verbose"], is_flag=True, help="Each native command, too."),
    *click.version_option(package_name="thinkswitch")(click.Command("ts-loop")).params,
]


@click.pass_context
def callback(
    context: click.Context,
    config: Path | None,
    out: Path,
    dry_run: bool,
    changes: tuple[str, ...],
    again_from: str | None,
    verify: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **overrides: Any,
) -> None:
    """Run the loop, unless another command is meant."""
    if other := context.invoked_subcommand:
        for parameter in context.command.params:
            if context.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE:
                raise click.UsageError(f"{parameter.opts[0]} is the loop's, not an option of {other}")
        return
    from rich.console import Console

    from harness import loop, runner
    from harness.config import load, read_recipes, recipes_folder
    from harness.view import View

    for key in ("prompts", "tasks"):
        if overrides[key] is not None:
            overrides[key] = listed(overrides[key])
    if overrides["include_path"]:
        overrides["include_path"] = overrides["include_path"].resolve()
    settings = load(config or recipes_folder() / "loop.yml", overrides, changes)
    recipes = read_recipes(settings, changes)
    console = Console(highlight=False, stderr=as_json or dry_run)
    view = View(console, quiet=quiet or dry_run, verbose=verbose)
    wishes = loop.Wishes(again_from, verify)
    out = out.resolve()
    with ExitStack() as stack:
        stack.callback(view.close)
        begun = None
        if not dry_run and not (out / "stages").exists():
            loop.check_pair(settings)
            # Nothing can be done yet: what takes longest begins at once.
            begun = runner.start(out / settings.name / "logs" / "preload.log")
            stack.callback(begun.close)
        run = loop.prepare(settings, recipes, out, view, wishes)
        if dry_run:
            click.echo("\n".join(loop.dry(run)))
            return
        results = loop.go(run, view, begun)
    if as_json:
        click.echo(json.dumps(results, indent=2))


def listed(text: str) -> list[str]:
    """What an option names: one .jsonl file, whose path may hold commas, or names with commas between them."""
    if text.endswith(".jsonl"):
        return [str(Path(text).resolve())]
    return [part.strip() for part in text.split(",") if part.strip()]
