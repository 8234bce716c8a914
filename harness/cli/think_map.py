"""`ts-loop think-map`: how one TaH checkpoint answers one prompt. Leaves that to the plugin."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import click

from harness.errors import LoopError


def quiet() -> None:
    """Keep what the stack says while it loads off the terminal; before it is imported."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


@click.command("think-map")
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
def command(
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
    console.print(maps.text_of(shown, styled=console.color_system is not None), soft_wrap=True)
    console.print(maps.facts(shown), soft_wrap=True)
    if html:
        try:
            html.write_text(maps.page(shown, prompt, checkpoint.resolve().name), encoding="utf-8")
        except OSError as error:
            raise LoopError(f"--html {html}: cannot be written ({error.strerror})") from None
        console.print(f"to look at: {html}", soft_wrap=True)
