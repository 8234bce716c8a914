"""What a recipe may say, and what it hears when it says something else: one line, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from thinkswitch_plugin.tah import TaHConfig, TaHForCausalLM, TaHPlugin
from thinkswitch_plugin.tah.args import read_block

BACKBONE = {"stage": "backbone", "reference": "recipes/mini/instruct"}
DECIDER = {"stage": "decider", "decider_layers": [1], "decider_hidden": [8]}


def recipe(recipes: Path, block: dict[str, Any], **changes: Any) -> dict[str, Any]:
    base = str(recipes / "mini/instruct")
    block = {**block, "reference": base} if block.get("reference") == BACKBONE["reference"] else block
    return {
        "base_model": base,
        "plugins": ["thinkswitch_plugin.tah.TaHPlugin"],
        "adapter": "tah",
        "tah": block,
        **changes,
    }


@pytest.mark.parametrize(
    ("block", "line"),
    [
        ({}, "tah.stage: Field required"),
        ({"stage": "both"}, "tah.stage: Input should be 'backbone' or 'decider'"),
        ({**BACKBONE, "treshold": 0.5}, "tah.treshold: Extra inputs are not permitted"),
        ({"stage": "backbone"}, "stage backbone needs reference"),
        ({**BACKBONE, "decider_hidden": [8]}, "decider_hidden belongs to stage decider; remove it"),
        ({**BACKBONE, "max_depth": 0}, "tah.max_depth"),
        ({"stage": "decider"}, "stage decider needs decider_layers and decider_hidden"),
        ({**BACKBONE, "unsure_below": 60}, "tah.unsure_below"),
        ({**DECIDER, "unsure_below": 0.6}, "unsure_below belongs to stage backbone; remove it"),
        ({**DECIDER, "lora_r": 8}, "lora_r belongs to stage backbone; remove it"),
        ({**DECIDER, "threshold": 1.5}, "tah.threshold"),
    ],
)
def test_a_wrong_block_is_one_line_that_names_the_key(block: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match="tah") as error:
        read_block(block)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"sample_packing": True}, "tah: sample_packing is set"),
        ({"load_in_4bit": True}, "tah: load_in_4bit is set"),
        ({"rl": "grpo"}, "tah: rl is set"),
        ({"lora_mlp_kernel": True}, "tah: lora_mlp_kernel is set: layers run one by one"),
        ({"flash_attention": True}, "tah: flash_attention is set"),
        ({"attn_implementation": "flex_attention"}, "attn_implementation is flex_attention"),
        ({"inference": True}, "use lm_eval, or ts-loop think-map"),
        ({"merge_lora": True}, "cannot be merged"),
        (
            {"deepspeed": "zero3.json"},
            "tah: deepspeed is set: its hooks expect one pass; remove it: several GPUs train by",
        ),
        ({"fsdp_config": {"reshard_after_forward": True}}, "tah: fsdp_config is set"),
        ({"fsdp": ["full_shard"]}, "tah: fsdp is set"),
        ({"tensor_parallel_size": 2}, "tah: tensor_parallel_size is set: deeper passes are not split over devices"),
        ({"context_parallel_size": 2}, "tah: context_parallel_size is set"),
        ({"dp_shard_size": 2}, "tah: dp_shard_size is set"),
        ({"torch_compile": "auto"}, "tah: torch_compile is set"),
        ({"device_map": "auto"}, "tah: device_map is auto: a model's layers stay on one device"),
        ({"device_map": "balanced_low_0"}, "tah: device_map is balanced_low_0: a model's layers stay on one device"),
        ({"device_map": "sequential"}, "tah: device_map is sequential: a model's layers stay on one device"),
        ({"device_map": {"backbone.model": 0, "backbone.lm_head": 1}}, "stay on one device; name one, or remove it"),
        ({"device_map": {"backbone.model": 0, "backbone.lm_head": "cpu"}}, "stay on one device; name one, or remove"),
        ({"adapter": "lora"}, "write `adapter: tah`"),
        ({"base_model": "nowhere/at/all"}, "base_model nowhere/at/all: no such folder"),
        ({"tah": {**BACKBONE, "reference": "./nowhere"}}, "tah.reference ./nowhere: no such folder"),
        ({"tah": {**BACKBONE, "mix_top_k": 400}}, "mix_top_k is 400; the backbone's vocabulary has 328 tokens"),
        ({"tah": DECIDER}, "is a plain qwen3 checkpoint; stage decider starts from what stage backbone left"),
    ],
)
def test_what_does_not_go_together_is_refused_before_any_weight(
    recipes: Path, changes: dict[str, Any], line: str
) -> None:
    cfg = recipe(recipes, BACKBONE)
    if "tah" in changes and changes["tah"].get("reference") == BACKBONE["reference"]:
        changes = {"tah": {**changes["tah"], "reference": cfg["base_model"]}}
    with pytest.raises(ValueError, match="tah") as error:
        TaHPlugin().register({**cfg, **changes})
    assert line in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("device_map", ["cuda:0", "cpu", {"": 0}, {"": "cuda:1"}, {"model": 0, "lm_head": "cuda:0"}])
def test_one_device_may_be_named(recipes: Path, device_map: Any) -> None:
    TaHPlugin().register(recipe(recipes, BACKBONE, device_map=device_map))


def test_what_accelerate_was_told_is_refused_too(recipes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TaHPlugin().register(recipe(recipes, BACKBONE, tensor_parallel_size=1, context_parallel_size=1))  # splits nothing
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"^tah: accelerate is told to use FSDP, .*torchrun\)$"):
        TaHPlugin().register(recipe(recipes, BACKBONE))


def test_stage_decider_checks_its_checkpoint(recipes: Path, build: Callable[..., Any], tmp_path: Path) -> None:
    model = build(decider="oracle", decider_hidden=[], decider_layers=[], reference=str(recipes / "mini/instruct"))
    model.save_pretrained(tmp_path)
    good = recipe(recipes, DECIDER, base_model=str(tmp_path))
    registered = dict(good)
    TaHPlugin().register(registered)
    assert registered["lora_qkv_kernel"] is False  # Axolotl would turn it on by itself
    for block, line in (
        ({**DECIDER, "decider_layers": [9]}, "decider_layers has 9; the backbone has 3 layers"),
        (BACKBONE, "went through stage backbone already"),
    ):
        with pytest.raises(ValueError, match=line):
            TaHPlugin().register(recipe(recipes, block, base_model=str(tmp_path)))
    (tmp_path / "iter_decider.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"iter_decider\.bin is a pickle"):
        TaHPlugin().register(dict(good))


def test_another_recipe_is_left_alone() -> None:
    TaHPlugin().register({"plugins": ["some.Other"], "base_model": "x"})


@pytest.mark.parametrize("size", ["0.6b", "1.7b"])
def test_the_real_recipes_add_less_than_three_per_cent(recipes: Path, size: str) -> None:
    """The shapes of Qwen3-0.6B and 1.7B (their config.json), on the meta device."""
    shapes = {
        "0.6b": {"hidden_size": 1024, "intermediate_size": 3072},
        "1.7b": {"hidden_size": 2048, "intermediate_size": 6144},
    }
    config = AutoConfig.for_model(
        "qwen3",
        **shapes[size],
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=True,
    )
    stages = [
        read_block(yaml.safe_load((recipes / f"qwen3_{size}/tah_{s}.yml").read_text())["tah"])
        for s in ("backbone", "decider")
    ]
    with torch.device("meta"):
        backbone = AutoModelForCausalLM.from_config(config)
        before = sum(p.numel() for p in backbone.parameters())
        model = TaHForCausalLM.from_backbone(backbone, **stages[0].of_config)
        model.begin_decider(stages[1].pos_weight, **stages[1].of_config)
    after = sum(p.numel() for p in model.parameters())
    assert after - before == model.added_parameters()
    assert 0.005 < model.added_parameters() / before < 0.03
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"decider"}
    assert isinstance(model.config, TaHConfig)
