"""Rollouts to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from thinkswitch_plugin.on_policy_kl.rollouts import sequences
from thinkswitch_plugin.on_policy_kl.view import coloured, show


def test_a_page_has_prompts_answers_and_colours(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [tokenizer(f"Compute 1+{n}.")["input_ids"] for n in (1, 2, 3)]
    answers = [tokenizer(f"{n}")["input_ids"] for n in (41, 52, 63)]
    batch = sequences(asked, answers, pad=0)
    parts = batch.cut(1)  # as learnt from one by one
    kl = torch.linspace(0, 2, len(batch.places)).split([len(part.places) for part in parts])
    show(tokenizer, list(zip(parts, kl, strict=True)), step=7, folder=tmp_path, most=2)
    page = (tmp_path / "rollouts/step_000007.html").read_text()
    printed = capsys.readouterr().out
    for text in (page, printed):
        assert "Compute 1+2." in text
        assert "Compute 1+3." not in text
        assert "step 7: " in text
    assert "\x1b" not in printed  # not a terminal


def test_a_colour_says_how_far_apart() -> None:
    text = coloured(["a", "b", "c", "d", "e"], [0.0, 0.2, 0.9, 3.0, float("nan")])
    styles = [str(span.style) for span in text.spans]
    assert styles == ["default", "yellow", "dark_orange", "bold white on red", "default"]
    assert text.plain == "abcde"
