"""Seconds on the device at hand: answers are timed at the length asked for."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from harness.costs.calibrate import BEFORE, MOST, grow, seconds, straight, timed
from harness.costs.fake import config_of


@pytest.fixture
def config(recipes: Path) -> dict:
    return json.loads((recipes / "mini" / "instruct" / "config.json").read_text())


@pytest.mark.parametrize("window", [None, 80])
def test_a_cache_that_is_grown_is_one_of_so_many_tokens(config: dict, window: int | None):
    if window:
        sliding = {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True}
        config = {**config, **sliding, "sliding_window": window, "num_hidden_layers": 2}
    model = AutoModelForCausalLM.from_config(config_of(config, 2)).eval()
    ids = torch.randint(0, 300, (2, 64))
    with torch.no_grad():
        grown = model(input_ids=ids, use_cache=True).past_key_values
        grow(grown, 150)
        real = model(input_ids=ids.repeat(1, 3)[:, :150], use_cache=True).past_key_values
        model(input_ids=ids[:, :1], past_key_values=grown, use_cache=True)
        model(input_ids=ids[:, :1], past_key_values=real, use_cache=True)
    assert grown.get_seq_length() == real.get_seq_length() == 151
    assert [layer.keys.shape for layer in grown.layers] == [layer.keys.shape for layer in real.layers]


def test_a_cache_larger_than_is_timed_goes_on_along_a_straight_line():
    assert timed({"tokens": 16_384, "batch": 1}) == 16_384
    assert timed({"tokens": 16_384, "batch": 64}) == MOST // 64
    assert timed({"tokens": 10, "batch": 4}) == BEFORE
    assert straight(1.0, 2.0, BEFORE + 100, BEFORE + 300) == 4.0
    assert straight(1.0, 0.9, BEFORE + 100, BEFORE + 300) == 1.0
    assert straight(1.0, 2.0, BEFORE, BEFORE) == 1.0


def test_a_token_after_many_takes_longer_than_one_after_few(config: dict):
    asked = {"config": config, "dtype": "float32", "nf4": False, "batch": 4}
    few, many = (seconds({**asked, "tokens": tokens})["decode"] for tokens in (BEFORE, 16_384))
    assert many > 1.5 * few
