"""Think-at-Hard on a card: what a step and a decoding are on a CPU, waits that are decisions, and the cache's memory.

Imports torch and transformers alone, beside the model.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from card_or_cpu import DEVICE, ON_A_CARD
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from thinkswitch_plugin.tah.attention import TaHCache
from thinkswitch_plugin.tah.model import TaHForCausalLM, count


def made(**settings: Any) -> Any:
    """A random TaH model of 4 layers × 128 on the CPU, its adapter not zero."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3",
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=328,
        tie_word_embeddings=True,
        initializer_range=0.15,
        eos_token_id=None,
        pad_token_id=0,
    )
    asked = {"mix_top_k": 328, "lora_r": 8, "lora_alpha": 16.0, "lora_dropout": 0.0, **settings}
    model = TaHForCausalLM.from_backbone(AutoModelForCausalLM.from_config(config), **asked)
    for name, parameter in model.named_parameters():
        if name.endswith(".lora_B"):
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def rows(side: str) -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids, mask = torch.randint(1, 328, (3, 40)), torch.ones(3, 40, dtype=torch.int64)
    mask[0, slice(0, 9) if side == "left" else slice(31, None)] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "target_depth": torch.randint(1, 3, ids.shape)}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_step_is_the_cpus(stage: int, side: str) -> None:
    model, batch, found = made(decider="oracle"), rows(side), []
    if stage == 1:
        model.begin_backbone()
    else:
        model.begin_decider(
            2.5, decider="learned", decider_layers=[1, 4], decider_hidden=[32], decider_dropout=0.0, threshold=0.5
        )
    for device in ("cpu", DEVICE):
        there = copy.deepcopy(model).to(device).train()
        counts = count(batch["labels"].shape, batch["attention_mask"], batch["labels"], batch["target_depth"], 2)
        loss = there(**{name: value.to(device) for name, value in batch.items()}, counts=counts).loss
        loss.backward()
        found.append([loss.detach().cpu(), *(p.grad.cpu() for p in there.parameters() if p.grad is not None)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()) + 1e-7)


@pytest.mark.parametrize("decider", ["learned", "always", "never"])
def test_decoding_is_the_cpus(decider: str) -> None:
    model = made(decider=decider, decider_layers=[1, 4], decider_hidden=[32], threshold=0.5).eval()
    batch, found = rows("left"), []
    for device in ("cpu", DEVICE):
        given = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        there = copy.deepcopy(model).to(device)
        how = {"max_new_tokens": 24, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        out = there.generate(**given, **how)
        found.append((out.sequences.cpu(), torch.stack(out.logits).float().cpu()))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not ON_A_CARD, reason="a CPU's allocator keeps no count")
def test_the_cache_takes_little_more_than_stock() -> None:
    def keys(tokens: int) -> Tensor:
        return torch.zeros(1, 8, tokens, 128, dtype=torch.bfloat16, device=DEVICE)

    def most(ours: bool) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(DEVICE)
        held, before = (TaHCache() if ours else DynamicCache()), torch.cuda.memory_allocated(DEVICE)
        with torch.inference_mode():
            for at in range(200):
                tokens = 1 if at else 30_000
                run = held.first(torch.ones(1, tokens, dtype=torch.bool, device=DEVICE), "none") if ours else None
                for layer in range(28):
                    new = (keys(tokens), keys(tokens))
                    held.update(*new, layer) if run is None else run.extend(layer, *new)
        return torch.cuda.max_memory_allocated(DEVICE) - before

    assert most(ours=True) < 1.2 * most(ours=False)
