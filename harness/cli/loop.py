"""`ts-loop`, the loop itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from harness.card import Card
    from harness.config import LoopConfig
    from harness.stages import Recipe

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
        ["--prompts"],
        help="Your prompts: a file (.jsonl, .csv, .parquet) or hub data set (owner/name) with a column `problem`, "
        "`prompt`, `question` or `messages`; or lm-eval tasks.",
    ),
    click.Option(["--tasks"], help="What to score: lm-eval tasks, groups or patterns, separated by commas."),
    click.Option(["--include-path"], type=click.Path(path_type=Path), help="A folder with your own lm-eval tasks."),
    click.Option(
        ["--t"],
        metavar="NUMBER|auto",
        help="Weight of instruct in the rebuilt thinking checkpoint, 0 to 1; `auto`: in each iteration the largest of "
        "0.1 to 0.9 that answers the prompts as thinking did, for nine checkpoints and ten times 200 answers (see "
        "ts-loop plan).  [default: the recipe's]",
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
    click.Option(
        ["--arms"],
        help="Baselines beside the run, separated by commas: thinkswitch (itself), merge_only, untouched (traces are "
        "learnt too), gold (right answers: `gold:` in loop.yml), on_policy. What they share is done once.",
    ),
    click.Option(["--seed"], type=int, help="Seed of generation, training and evaluation.  [default: 42]"),
    click.Option(["--seeds"], help="Several, separated by commas: all of it once with each."),
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
    from harness.view import View

    console = Console(highlight=False, stderr=as_json or dry_run)
    view = View(console, quiet=quiet or dry_run, verbose=verbose)
    settings, recipes, said = asked_for(config, overrides, changes)
    if not quiet:
        click.echo("".join(f"{line}\n" for line in said), err=True, nl=False)
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


def asked_for(
    config: Path | None, options: Mapping[str, Any], changes: Sequence[str], card: Card | None = None
) -> tuple[LoopConfig, dict[str, Recipe], list[str]]:
    """What the command line asks for: the run, its recipes, and what is to be said of them.

    Without a `loop.yml` the shipped one is meant; for a pair that its recipes are not made for, what `ts-loop init`
    would write.

    Args:
        config: a loop.yml.
        options: of the command line, by their fields' names, as they were typed.
        changes: what `--set` says.
        card: what recipes are made for; None for the device at hand.

    Raises:
        LoopError: with the first thing that is wrong.
    """
    from harness.config import load, local_or_hub, read_recipes, recipes_folder

    found = dict(options)
    for key in ("arms", "seeds"):
        if found.get(key) is not None:
            found[key] = [part.strip() for part in found[key].split(",") if part.strip()]
    for key in ("prompts", "tasks"):
        if found.get(key) is not None:
            found[key] = listed(found[key])
    if found.get("include_path"):
        found["include_path"] = found["include_path"].resolve()
    path, texts, said = config or recipes_folder() / "loop.yml", {}, []
    pair = {role: local_or_hub(found[role], Path.cwd()) for role in ("instruct", "thinking") if found.get(role)}
    if config is None and len(pair) == 2:
        from harness import own

        if not own.is_embedded(pair):
            wanted = own.Wanted(
                folder=Path(pair["instruct"]).name,
                instruct=pair["instruct"],
                thinking=pair["thinking"],
                name=found.get("name"),
                prompts=found.get("prompts"),
                tasks=found.get("tasks"),
                include_path=found.get("include_path"),
            )
            written = own.prepared(wanted, card)
            path = Path.cwd() / "ts-loop init" / "loop.yml"  # nothing lies there
            texts = {path.parent / name: text for name, text in written.texts.items()}
            said = ["no --config: recipes are made for this pair, as `ts-loop init FOLDER …` would write them to edit"]
            said += [f"  {what}: {value}" for what, value in written.facts]
    settings = load(path, found, changes, texts)
    return settings, read_recipes(settings, changes, texts), said


def listed(text: str) -> list[str]:
    """What an option names: one file or hub data set, whose name may hold commas, or names with commas between them."""
    from harness.config import source
    from thinkswitch_plugin.prompts import is_source

    if is_source(text):
        return [source(text, Path.cwd())]
    return [part.strip() for part in text.split(",") if part.strip()]
