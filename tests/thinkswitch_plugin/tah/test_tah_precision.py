"""What is trained is float32, products are bfloat16 under autocast, and what is saved is as large as before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from slow_tah import backbone, padded_batch
from torch import Tensor
from transformers import AutoModelForCausalLM

from thinkswitch_plugin.tah import TaHForCausalLM

Build = Callable[..., Any]
RATE = 4e-5  # the paper's


def stage_one(tied: bool = True) -> Any:
    """A bfloat16 backbone, wrapped, before stage 1 begins."""
    return TaHForCausalLM.from_backbone(
        backbone(tied).to(torch.bfloat16), mix_top_k=61, lora_r=3, lora_alpha=6.0, lora_dropout=0.0, decider="oracle"
    )


def stage_two() -> Any:
    """What that leaves, frozen, with a new decider."""
    model = stage_one()
    model.begin_decider(
        2.5, decider="learned", decider_layers=[1, 3], decider_hidden=[12], decider_dropout=0.0, threshold=0.5
    )
    return model


def rows() -> dict[str, Tensor]:
    batch = padded_batch()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    torch.manual_seed(4)
    wanted = torch.randint(1, 3, labels.shape).masked_fill(batch["attention_mask"] == 0, -100)
    return {**batch, "labels": labels, "target_depth": wanted}


def large_weights_that_moved(model: Any, autocast: bool) -> tuple[int, int]:
    """Of the weights above 2⁻⁶: how many one update at the paper's rate moves, and how many there are."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**rows()).loss
    loss.backward()
    moved = count = 0
    # Adam's first update is the rate itself, whatever the gradient, where there is one.
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    for name, old in before.items():
        parameter = model.get_parameter(name)
        asked = (old.abs() > 2**-6) & (parameter.grad.abs() > 1e-6)
        moved += int((parameter[asked] != old[asked]).sum())
        count += int(asked.sum())
    return moved, count


def test_weights_move_at_the_papers_rate() -> None:
    model = stage_one()
    model.requires_grad_(True)
    moved, count = large_weights_that_moved(model, autocast=False)  # pure bfloat16
    assert moved == 0 < count
    model = stage_one()
    model.begin_backbone()
    moved, count = large_weights_that_moved(model, autocast=True)
    assert moved == count > 1000


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_under_autocast_is_near_that_in_float32(stage: int) -> None:
    losses, gradients = [], []
    for autocast in (False, True):
        model = stage_one()
        if stage == 1:
            model.begin_backbone()
        else:
            if not autocast:
                model.float()
            torch.manual_seed(5)
            model.begin_decider(2.5, decider="learned", decider_layers=[1, 3], decider_hidden=[12], decider_dropout=0.0)
        trained = [p for p in model.parameters() if p.requires_grad]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model.train()(**rows()).loss
        loss.backward()
        assert loss.dtype == torch.float32
        assert {p.grad.dtype for p in trained if p.grad is not None} == {torch.float32}
        losses.append(float(loss.detach()))
        gradients.append(torch.cat([p.grad.flatten() for p in trained if p.grad is not None]))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.95


def test_the_decider_decides_by_the_same_digits_under_autocast() -> None:
    model = stage_two()
    states, logits = [torch.randn(5, 32, dtype=torch.bfloat16) for _ in range(2)], torch.randn(5, 61)
    plain = model.decider(states, logits)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.decider(states, logits), plain)


@pytest.mark.parametrize("tied", [True, False])
def test_what_stage_one_leaves_is_as_large_as_what_it_began_with(tied: bool, tmp_path: Path) -> None:
    model = stage_one(tied)
    model.begin_backbone()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert len([name for name in weights if "lm_head" in name]) == int(not tied)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name).to(torch.bfloat16)), name
    assert {p.dtype for p in model.parameters()} == {torch.float32}  # and training goes on


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16])
def test_the_decider_is_float32_on_disk_and_in_memory(dtype: Any, tmp_path: Path) -> None:
    model = stage_two()
    with torch.no_grad():
        for parameter in model.decider.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    for folder in (tmp_path / "once", tmp_path / "twice"):
        model.save_pretrained(folder)
        saved = load_file(folder / "model.safetensors")
        assert {value.dtype for name, value in saved.items() if name.startswith("decider.")} == {torch.float32}
        assert {value.dtype for name, value in saved.items() if name.startswith("backbone.")} == {torch.bfloat16}
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        for name, parameter in model.named_parameters():
            assert torch.equal(again.get_parameter(name), parameter), name
        assert again.dtype == torch.bfloat16
        model = again
    ids = padded_batch()["input_ids"][2:]
    with torch.no_grad():
        assert model(ids).continue_logits.dtype == torch.float32
