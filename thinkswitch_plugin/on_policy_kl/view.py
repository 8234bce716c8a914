"""Rollouts to look at: each token in a colour that says how far student and teacher are apart on it.

Knows Rich. One picture a call: to the terminal (or the log, without colour), and as a page beside the checkpoints.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from torch import Tensor

from thinkswitch_plugin.cli import visible
from thinkswitch_plugin.on_policy_kl.rollouts import Sequences

# Nats of reverse KL up to which a colour holds: a tenth of a nat is a slight preference, a nat a different mind.
COLOURS = ((0.1, "default"), (0.3, "yellow"), (1.0, "dark_orange"), (float("inf"), "bold white on red"))


def coloured(tokens: list[str], kl: list[float]) -> Text:
    """An answer as text, each token styled by its KL in nats."""
    text = Text()
    for token, value in zip(tokens, kl, strict=True):
        text.append(token, next(style for limit, style in COLOURS if not value > limit))
    return text


def show(tokenizer: Any, scored: Sequence[tuple[Sequences, Tensor]], step: int, folder: Path, most: int) -> None:
    """Print the first rollouts and save them as `rollouts/step_N.html`.

    Args:
        tokenizer: turns ids into text.
        scored: prompts and answers, and their tokens' KL [N] in nats, in the order of `places`.
        step: for the title.
        folder: where `rollouts/` goes.
        most: how many rollouts.
    """
    values = iter([value for _, kl in scored for value in kl.tolist()])
    rows = [
        row for batch, _ in scored for row in zip(*(part.tolist() for part in (*batch[:2], batch.answers)), strict=True)
    ]
    panels = []
    for ids, real, answer in rows[:most]:
        prompt = tokenizer.decode([i for i, there, mine in zip(ids, real, answer, strict=True) if there and not mine])
        written = [i for i, mine in zip(ids, answer, strict=True) if mine]
        theirs = [next(values) for _ in written]
        body = coloured([visible(tokenizer.decode([i])) for i in written], theirs)
        mean = sum(theirs) / max(1, len(theirs))
        panels.append(
            Panel(
                Text(visible(prompt), "dim") + body, title=f"step {step}: {mean:.3f} nats a token", title_align="left"
            )
        )
    scale = Text("KL(student ‖ teacher) of a token: ", "dim")
    for limit, style in COLOURS:
        scale.append(f" ≤ {limit} " if limit < float("inf") else " more ", style)
    for console in (Console(file=sys.stdout), Console(file=io.StringIO(), record=True, width=110)):
        console.print(*panels, scale, sep="\n")
    page = folder / "rollouts" / f"step_{step:06d}.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    console.save_html(str(page))
