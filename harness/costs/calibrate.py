"""Seconds on the device at hand: a few real layers of a checkpoint's shape, trained and asked for a moment.

    python -m harness.costs.calibrate < QUESTIONS.json

A question is {"config", "dtype", "nf4", "batch", "tokens"}, the answer seconds of the whole checkpoint: `step` (forward
and backward of `SHORT` tokens), `token` (each further token of them), `decode` (one more token of `batch` answers that
have `tokens` already). Weights are drawn at random, at two numbers of layers; what the others take goes on along a
straight line, and so do answers whose cache is larger than `MOST`. Each figure is the least of three: what else the
machine does is not the plan's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from harness.costs.aside import answer_all
from harness.costs.fake import config_of
from harness.costs.footprint import text_config

LAYERS = (1, 2)
SHORT, LONG, BEFORE = 64, 256, 64  # tokens
MOST = 2**16  # tokens in the cache of all answers
TRIALS = 3


def seconds(question: dict[str, Any]) -> dict[str, float]:
    """What a question's checkpoint takes."""
    config = text_config(question["config"])
    layers = int(config["num_hidden_layers"])
    few, more = (_of(question, config, count) for count in LAYERS)
    whole = {name: few[name] + max(0.0, more[name] - few[name]) * (layers - LAYERS[0]) for name in few}
    return {
        "step": whole["short"],
        "token": max(0.0, whole["long"] - whole["short"]) / (LONG - SHORT),
        "decode": straight(whole["early"], whole["late"], timed(question), question["tokens"]),
    }


def timed(question: dict[str, Any]) -> int:
    """Tokens of an answer that are in the cache while its next one is timed."""
    return max(BEFORE, min(int(question["tokens"]), MOST // int(question["batch"])))


def straight(early: float, late: float, at: int, tokens: int) -> float:
    """From the seconds at `BEFORE` and at `at` tokens to those at `tokens`; they never fall."""
    slope = max(0.0, late - early) / (at - BEFORE) if at > BEFORE else 0.0
    return early + slope * max(0, tokens - BEFORE)


def _of(question: dict[str, Any], config: Any, layers: int) -> dict[str, float]:
    from transformers import AutoModelForCausalLM

    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    dtype = getattr(torch, question["dtype"])
    model: Any = AutoModelForCausalLM.from_config(config_of(config, layers), dtype=dtype)
    if question["nf4"]:
        _pack(model, dtype)
    model.to(device)
    model.requires_grad_(False)
    model.enable_input_require_grads()

    def learn(width: int) -> None:
        ids = torch.ones(1, width, dtype=torch.int64, device=device)
        model(input_ids=ids, labels=ids).loss.backward()

    @torch.no_grad()
    def write() -> None:
        model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)

    found = {"short": _least(lambda: learn(SHORT), device), "long": _least(lambda: learn(LONG), device)}
    ids = torch.ones(question["batch"], BEFORE, dtype=torch.int64, device=device)
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    found["early"] = _least(write, device)
    grow(cache, timed(question))
    return {**found, "late": _least(write, device)}


def grow(cache: Any, tokens: int) -> None:
    """Have a cache hold so many tokens: what it holds, again and again."""
    from transformers.cache_utils import DynamicLayer

    for layer in cache.layers:
        if isinstance(layer, DynamicLayer) and (there := layer.get_seq_length()):
            width = min(tokens, layer.sliding_window - 1) if layer.is_sliding else tokens  # type: ignore[attr-defined]
            for name in ("keys", "values"):
                part = getattr(layer, name)
                setattr(layer, name, part.repeat(1, 1, -(-width // there), 1)[:, :, :width].contiguous())
            if layer.is_sliding:
                layer.cumulative_length = tokens


def _pack(model: Any, dtype: torch.dtype) -> None:
    """Put the linear layers in NF4."""
    from bitsandbytes.nn import Linear4bit

    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and module is not head:
            packed = Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
            )
            packed.load_state_dict({"weight": module.weight})
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, packed)


def _least(run: Callable[[], None], device: torch.device) -> float:
    """The least seconds of a few trials, after one that is not counted."""
    took = []
    for _ in range(TRIALS + 1):
        begun = time.monotonic()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        took.append(time.monotonic() - begun)
    return min(took[1:])


if __name__ == "__main__":
    answer_all(seconds)
