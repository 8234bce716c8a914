"""What an answer costs: the formula against PyTorch's own counter, the passes against one forward a pair."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from thinkswitch_plugin.tah import cost

Build = Callable[..., Any]

# The counter leaves out attention's kernel for a CPU.
ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
}


class Letters:
    """A tokenizer of one token a letter, that begins a text with 60 unless told not to, as ^ says it has."""

    bos_token = "^"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [60 if letter == "^" else ord(letter) - 96 for letter in text]
        return {"input_ids": [60, *ids] if add_special_tokens else ids}


@pytest.mark.parametrize(
    "settings",
    [
        {"decider": "never"},
        {"decider": "always"},
        {"decider": "always", "max_depth": 3, "tied": False},
        {"decider": "always", "kind": "llama"},
        {"decider": "learned", "threshold": 0.0},
        {"decider": "learned", "threshold": 1.0},
        {"decider": "learned", "threshold": 0.0, "max_depth": 3},
        {"max_depth": 1},
    ],
    ids=str,
)
def test_the_formula_is_what_a_decoding_step_computes(build: Build, settings: dict[str, Any]) -> None:
    model = build(**settings)
    ids = torch.arange(1, 14)[None]
    with torch.no_grad():
        cache = model(ids[:, :11], use_cache=True).past_key_values
        model(ids[:, 11:12], past_key_values=cache, use_cache=True)
        with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
            depth = int(model(ids[:, 12:], past_key_values=cache, use_cache=True).depth)
    assert depth == {"never": 1, "always": model.config.max_depth}.get(model.config.decider, depth)
    # Products that the formula leaves out: the angles of the rotary positions, in every pass, and, in the second of
    # three, the keys of the third, which a mask hides.
    angles, hidden = 8 * depth, 4 * 32 * 3 * 12 if depth == 3 else 0
    assert counter.get_total_flops() - angles - hidden == cost.flops_per_token(model.config, 13, depth)


def test_between_its_ends_the_cost_is_weighted_by_the_share_that_goes_deeper(build: Build) -> None:
    config = build().config
    decided = cost.flops_per_token(config, 0, 1) - cost.flops_per_token(config, 0, 1, "never")
    assert decided > 0
    none, some, every = (cost.flops_per_token(config, 0, depth, "always") for depth in (1, 1.25, 2))
    assert some == pytest.approx(none + 0.25 * (every - none))
    # Scores and values of a quarter of the tokens over 100 tokens and the 25 deeper keys among them.
    seen = cost.flops_per_token(config, 100, 1.25, "always") - some
    assert seen == pytest.approx(4 * 32 * 3 * (100 + 0.25 * 125))


def test_counting_sizes_leaves_the_config_as_it_is(build: Build) -> None:
    config = build().config
    before = config.to_dict()
    cost.flops_per_token(config, 5, 1.5)
    assert config.to_dict() == before


@pytest.mark.parametrize(("context", "depth"), [(5, 0.9), (5, 2.1), (-1, 1), (5, float("nan"))])
def test_a_depth_or_context_that_cannot_be(build: Build, context: float, depth: float) -> None:
    with pytest.raises(ValueError, match="cannot be"):
        cost.flops_per_token(build().config, context, depth)


@pytest.mark.parametrize("at_once", [1, 30, 10_000])
@pytest.mark.parametrize("depth", [2, 3])
def test_passes_are_those_of_each_answer_by_itself(build: Build, at_once: int, depth: int) -> None:
    model = build(max_depth=depth)
    pairs = [("abc", "defghij"), ("^zyxwv", "u"), ("m", ""), ("hello", "worldandmore"), ("^q", "rstu")]
    took: list[int] = []
    seen: list[int] = []
    for prompt, answer in pairs:
        ids = [60, *(ord(letter) - 96 for letter in prompt.lstrip("^") + answer)]
        with torch.no_grad():
            depths = model(torch.tensor([ids])).depth[0].tolist()
        start = len(ids) - len(answer)
        took += depths[start - 1 : len(ids) - 1]
        seen += range(start, len(ids))
    assert len(set(took)) > 1
    counted = cost.count(model, Letters(), pairs, at_once)
    assert counted is not None
    assert counted.tokens == len(took) == sum(len(answer) for _, answer in pairs)
    assert counted.mean_depth == pytest.approx(sum(took) / len(took))
    assert counted.skip_rate == pytest.approx(took.count(1) / len(took))
    assert counted.context == pytest.approx(sum(seen) / len(seen))


def test_a_summary_holds_the_price_between_a_single_pass_and_every_pass(build: Build) -> None:
    model = build()
    said = cost.summary(model.config, cost.Passes(100, 1.06, 0.94, 50.0))
    assert (said["mean_depth"], said["skip_rate"]) == (1.06, 0.94)
    assert said["flops_per_token_single"] < said["flops_per_token"] < said["flops_per_token_always"]  # type: ignore[operator]
    nothing = cost.summary(model.config, cost.count(model, Letters(), [("abc", "")]))
    assert nothing == dict.fromkeys(said)
