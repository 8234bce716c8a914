"""The embedded loop as it runs where there is a card: a process for each command, the training on the card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from card_or_cpu import ON_A_CARD
from small import run_here, small_loop

from harness import schedule
from harness.runner import LocalRunner, devices, has_accelerator


@pytest.mark.parametrize("distill", ["answers", "on-policy"])
def test_the_embedded_loop(recipes: Path, tmp_path: Path, distill: str) -> None:
    assert has_accelerator() == ON_A_CARD
    with LocalRunner(tmp_path / "keeper.log", preloaded=False) as runner:
        ran = run_here(small_loop(recipes, tmp_path / "loop"), tmp_path / "runs", runner, distill=distill)
    assert len(ran.results["rows"]) == 4
    (thinking,) = [r for r in ran.results["rows"] if (r["iteration"], r["checkpoint"]) == (1, "thinking")]
    assert thinking["closed_traces"] > 0.9
    record: dict[str, Any] = json.loads((ran.folder / "iter_01/distill/stage.json").read_text())
    asked = json.loads((ran.folder / "iter_01/evaluate_instruct/stage.json").read_text())
    if ON_A_CARD:
        slots = schedule.slots(devices(), 1)
        assert record["environment"] == slots[0].environment  # the training has the first card for itself
        assert asked["environment"]["CUDA_VISIBLE_DEVICES"] == ""  # its recipe says device: cpu
