"""The command `ts-loop`: options in, exit code out.

Knows Click. Turns options into overrides of `loop.yml`, errors into one or two lines, and leaves the run to `loop`. Its
one subcommand, `think-map`, shows how one TaH checkpoint answers one prompt, and leaves that to the plugin.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from harness.errors import LoopError

EPILOG = """\b
Examples:
  ts-loop --iters 3                              the embedded pair, about two minutes on a CPU
  ts-loop --dry-run                              the native commands, and nothing run
  ts-loop --instruct Qwen/Qwen3-4B-Instruct-2507 --thinking Qwen/Qwen3-4B-Thinking-2507
          --config recipes/qwen3_4b/loop.yml     the paper's pair, on one GPU
  ts-loop --prompts mine.jsonl --tasks my_task --include-path my_tasks/

Run again with the same --name and it continues where it stopped.
"""


@click.group(
    invoke_without_command=True,
    subcommand_metavar="",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=EPILOG,
)
@click.option("--iters", "iterations", type=int, help="How many iterations.  [default: 3]")
@click.option("--config", type=click.Path(path_type=Path), help="A loop.yml.  [default: the shipped one]")
@click.option("--name", help="Name of the run, and of its folder under --out.")
@click.option("--instruct", help="The instruct checkpoint: a folder or a hub id.")
@click.option("--thinking", help="The thinking checkpoint: a folder or a hub id.")
@click.option("--prompts", help="Your prompts: a .jsonl of `problem`, `prompt` or `messages` rows; or lm-eval tasks.")
@click.option("--tasks", help="What to score: lm-eval tasks, separated by commas.")
@click.option("--include-path", type=click.Path(path_type=Path), help="A folder with your own lm-eval tasks.")
@click.option("--t", type=float, help="Weight of instruct in the rebuilt thinking checkpoint, 0 to 1.  [default: 0.1]")
@click.option(
    "--anchor",
    help="What thinking is rebuilt from in each iteration: `original`, the checkpoint the run began with, or "
    "`previous`, the last rebuilt one.  [default: original]",
)
@click.option(
    "--distill",
    help="What instruct learns from: `answers` of the thinking checkpoint, or `on-policy`, answers of its own that the "
    "thinking checkpoint judges token by token.  [default: answers]",
)
@click.option("--seed", type=int, help="Seed of generation, training and evaluation.  [default: 42]")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Where run folders go."
)
@click.option("--dry-run", is_flag=True, help="Print each stage's native command, run nothing.")
@click.version_option(package_name="thinkswitch")
@click.pass_context
def command(context: click.Context, config: Path | None, out: Path, dry_run: bool, **overrides: Any) -> None:
    """Move a thinking checkpoint's skill into its instruct twin.

    In each iteration the thinking checkpoint answers the prompts (lm-eval), its traces are removed and the answers
    distilled into the instruct checkpoint (Axolotl, QLoRA), the thinking checkpoint is rebuilt by spherical
    interpolation (mergekit), and both are tested (lm-eval). Only prompts come from you: no gold answer is ever used.
    """
    if other := context.invoked_subcommand:
        for parameter in context.command.params:
            if context.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE:
                raise click.UsageError(f"{parameter.opts[0]} is the loop's, not an option of {other}")
        return
    from harness import loop
    from harness.config import load, recipes_folder
    from harness.report import View
    from harness.rundir import RunDir

    for key in ("prompts", "tasks"):
        if overrides[key] is not None:
            overrides[key] = [part.strip() for part in overrides[key].split(",") if part.strip()]
    if overrides["prompts"] and overrides["prompts"][0].endswith(".jsonl"):
        overrides["prompts"] = [str(Path(part).resolve()) for part in overrides["prompts"]]
    if overrides["include_path"]:
        overrides["include_path"] = overrides["include_path"].resolve()
    settings = load(config or recipes_folder() / "loop.yml", overrides)
    recipes = loop.read_recipes(settings)
    folder = RunDir((out / settings.name).resolve())
    if dry_run:
        for stage in loop.plan(settings, recipes, folder):
            click.echo(f"# iteration {stage.iteration}, {stage.name}")
            for native in stage.commands:
                click.echo(shlex.join(native))
        return
    view = View()
    try:
        loop.run(settings, recipes, folder, view)
    finally:
        view.close()


def quiet() -> None:
    """Keep what the stack says while it loads off the terminal; before it is imported."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


@command.command("think-map")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="What to ask it; in the checkpoint's chat template, answered greedily.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="When to stop.")
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    help="Probability above which a token continues.  [default: the checkpoint's]",
)
@click.option(
    "--decider",
    type=click.Choice(["learned", "always", "never"]),
    help="Who says that a token continues.  [default: the checkpoint's]",
)
@click.option("--html", type=click.Path(path_type=Path), help="Also write the map to this file, as a page.")
def think_map(
    checkpoint: Path, prompt: str, max_new_tokens: int, threshold: float | None, decider: str | None, html: Path | None
) -> None:
    """See a Think-at-Hard checkpoint think.

    Prints its answer with each token coloured by the decider's probability, those that took a deeper pass underlined,
    the mean depth and the share that iterated. CHECKPOINT is a folder.
    """
    from rich.console import Console

    from harness.checks import check_think_map

    check_think_map(checkpoint, prompt, decider, html)
    given = {"threshold": threshold, "decider": decider}
    settings: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    console, aside = Console(highlight=False), Console(stderr=True)
    status: Any = aside.status(f"loading {checkpoint.name}") if aside.is_terminal else contextlib.nullcontext()
    quiet()
    with status:
        try:
            from thinkswitch_plugin.tah import think_map as maps

            model, tokenizer = maps.load(str(checkpoint), **settings)
            if aside.is_terminal:
                status.update("answering")
            asked, answered = maps.answer(model, tokenizer, prompt, max_new_tokens)
            shown = maps.think_map(model, tokenizer, asked, answered)
        except (OSError, RuntimeError, ValueError) as error:
            raise LoopError(f"{checkpoint}: {' '.join(str(error).split())}") from None
        except KeyboardInterrupt:
            click.echo("ts-loop: stopped", err=True)
            sys.exit(130)
    console.print(maps.text_of(shown, styled=console.color_system is not None), soft_wrap=True)
    console.print(maps.facts(shown), soft_wrap=True)
    if html:
        try:
            html.write_text(maps.page(shown, prompt, checkpoint.resolve().name), encoding="utf-8")
        except OSError as error:
            raise LoopError(f"--html {html}: cannot be written ({error.strerror})") from None
        console.print(f"to look at: {html}", soft_wrap=True)


def main() -> None:
    """Entry point: every expected failure is one or two lines on standard error and a non-zero exit."""
    try:
        code = command.main(standalone_mode=False)
    except LoopError as error:
        click.echo(f"ts-loop: {error}", err=True)
        sys.exit(1)
    except (KeyboardInterrupt, click.Abort):
        click.echo("ts-loop: stopped; what is finished is kept, run the same command again to continue", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    sys.exit(code if isinstance(code, int) else 0)
