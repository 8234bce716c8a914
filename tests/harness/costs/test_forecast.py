"""A run's stages as estimates: what is judged against what, and how often each stage is done."""

import json
from pathlib import Path

import pytest
from qwen3 import QWEN3_4B

from harness.card import of_size
from harness.config import read_yaml
from harness.costs.forecast import Device, Pair, Questions, asking


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """Two folders with the 4B's config and nothing else."""
    for name in Pair._fields:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(QWEN3_4B))
    return Pair(tmp_path / "instruct", tmp_path / "thinking")


def on(size: float, tmp_path: Path) -> Device:
    """A card that is not here, at 25 and 900 tokens a second."""
    return Device(of_size(size), 0.0, (25, 900), False, tmp_path / "plan.json")


def test_a_server_that_reserves_too_little_does_not_fit_and_its_time_is_of_what_it_holds_at_once(
    pair: Pair, tmp_path: Path, recipes: Path
):
    recipe = read_yaml(recipes / "qwen3_4b" / "vllm" / "generate_labels.yml")
    asked = [Questions(30, None, True)]
    small, large = (asking("generate", recipe, (1,), pair, False, asked, None, on(size, tmp_path)) for size in (8, 24))
    assert not small.fits
    assert small.memory > small.room
    assert "generate.model_args.max_model_len=" in small.mend
    assert large.fits
    assert large.seconds == pytest.approx(15 * 32_768 / 25)  # two at once
