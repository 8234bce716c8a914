"""The Axolotl plugin: checks the recipe, labels the rows, wraps the backbone, and chooses what is trained.

Knows: Axolotl's hooks. Leaves to others: everything they call.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from axolotl.common.datasets import TrainDatasetMeta
from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from transformers import AutoConfig

from thinkswitch_plugin.cli import one_line
from thinkswitch_plugin.recipe import (
    is_listed,
    is_there,
    leave_lora_kernels_off,
    name_the_cpu,
    refuse,
    seed_adapter,
    send_no_reports,
    spreads,
)
from thinkswitch_plugin.tah.args import ADAPTER, PLUGIN, TaHBlock, read_block
from thinkswitch_plugin.tah.config import TaHConfig

LOG = get_logger("axolotl.thinkswitch.tah")

DATA_PARALLEL = "remove it: several GPUs train by plain data parallelism (torchrun)"
OTHER_ATTENTION = "duo-causal attention has no such kernel here; use attn_implementation: sdpa"
# What passes of several depths rule out, and what to do about it.
REFUSED = {
    "sample_packing": "rows that share a sequence would share their deeper passes; remove it",
    "rl": "the stages are supervised; remove it",
    "load_in_4bit": "stage backbone trains the backbone itself; remove it",
    "load_in_8bit": "stage backbone trains the backbone itself; remove it",
    "unfrozen_parameters": "the stage says what is trained; remove it",
    "activation_offloading": "its checkpoints lose the gradient between depths; use gradient_checkpointing",
    "inference": "what a stage leaves is a whole model; use lm_eval, or ts-loop think-map",
    "merge_lora": "the adapter belongs to depths from 2 on and cannot be merged; use the checkpoint as it is",
    "streaming": "hard tokens are marked beforehand; remove it",
    "torch_compile": "how many tokens go deeper differs from batch to batch; remove it",
    "do_bench_eval": "it reads logits, of which an evaluation here makes none; use lm_eval",
    **dict.fromkeys(
        ("context_parallel_size", "tensor_parallel_size", "dp_shard_size"),
        f"deeper passes are not split over devices; {DATA_PARALLEL}",
    ),
    **dict.fromkeys(("fsdp", "fsdp_config"), f"its wrapped layers cannot be run one by one; {DATA_PARALLEL}"),
    "deepspeed": f"its hooks expect one pass; {DATA_PARALLEL}",
    "cut_cross_entropy": "the loss is made from several depths; remove it",
    "liger_fused_linear_cross_entropy": "the loss is made from several depths; remove it",
    **dict.fromkeys(
        ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel"),
        "layers run one by one, with linear layers of their own; remove it",
    ),
    **dict.fromkeys(
        ("flash_attention", "flex_attention", "xformers_attention", "sage_attention", "eager_attention"),
        OTHER_ATTENTION,
    ),
}


# What `accelerate launch` hands on, of a config file that the recipe knows nothing of.
SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
}


class TaHPlugin(BasePlugin):
    """Think-at-Hard for `plugins:`, with `adapter: tah` (arXiv 2511.08577)."""

    def register(self, cfg: dict) -> None:
        """Check what the recipe alone can tell.

        Args:
            cfg: the recipe, not yet validated.

        Raises:
            ValueError: the `tah:` block is wrong, or does not go with another setting or with the checkpoint; one line.
        """
        if not is_listed(cfg, PLUGIN):
            return
        send_no_reports()
        block = read_block(cfg.get("tah"))
        if cfg.get("adapter") != ADAPTER:
            raise ValueError(f"tah: adapter is {cfg.get('adapter')!r}; write `adapter: {ADAPTER}`")
        refuse(ADAPTER, cfg, REFUSED)
        if spreads(cfg.get("device_map")):
            raise ValueError(
                f"tah: device_map is {cfg['device_map']}: a model's layers stay on one device; name one, or remove it "
                "and start a process for each GPU (torchrun)"
            )
        for name, what in SHARDING.items():
            if os.environ.get(name, "false").lower() in ("1", "true"):
                raise ValueError(f"tah: accelerate is told to use {what}, which shards the model; {DATA_PARALLEL}")
        if cfg.get("attn_implementation") not in (None, "sdpa"):
            raise ValueError(f"tah: attn_implementation is {cfg['attn_implementation']}: {OTHER_ATTENTION}")
        check_checkpoint(block, str(cfg.get("base_model")))
        leave_lora_kernels_off(cfg)

    def get_input_args(self) -> str:
        """The model of the `tah:` block, by its import path."""
        return "thinkswitch_plugin.tah.args.TaHArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """`adapter: tah` is ours to load."""
        return [AdapterCapabilities(name=ADAPTER)]

    def load_datasets(self, cfg: DictDefault, preprocess: bool = False) -> TrainDatasetMeta | None:
        """Axolotl's own datasets, each token labelled easy or hard."""
        return labelled(cfg) if is_listed(cfg, PLUGIN) else None

    def pre_lora_load(self, cfg: DictDefault, model: Any) -> None:
        """Set the recipe's seed before the adapter and the decider are drawn."""
        seed_adapter(cfg, PLUGIN)

    def load_adapter(
        self, model: Any, cfg: DictDefault, inference: bool = False, config_only: bool = False
    ) -> tuple[Any, None] | None:
        """Wrap the backbone (stage backbone), or put a new decider on what that stage left (stage decider)."""
        if not is_listed(cfg, PLUGIN) or cfg.adapter != ADAPTER:
            return None
        from thinkswitch_plugin.tah.model import TaHForCausalLM

        block = read_block(cfg.tah)
        if block.stage == "backbone":
            settings = block.of_config
            if Path(settings["reference"]).is_dir():  # stage decider may run elsewhere
                settings["reference"] = str(Path(settings["reference"]).resolve())
            model = TaHForCausalLM.from_backbone(model, **settings)
            model.begin_backbone()
        else:
            model.begin_decider(block.pos_weight, **block.of_config)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        added, total = model.added_parameters(), sum(p.numel() for p in model.parameters())
        LOG.info(f"tah: {trained:,} parameters are trained; {added:,} ({added / (total - added):.2%}) were added")
        return model, None

    def get_training_args(self, cfg: DictDefault) -> dict[str, Any] | None:
        """Name the CPU where there is nothing else: unnamed, it is not let train in bfloat16."""
        return {"use_cpu": not torch.accelerator.is_available()} if is_listed(cfg, PLUGIN) else None

    def get_trainer_cls(self, cfg: DictDefault) -> type | None:
        """Axolotl's trainer, which also logs depths."""
        if not is_listed(cfg, PLUGIN):
            return None
        from thinkswitch_plugin.tah.trainer import TaHTrainer

        return TaHTrainer

    def get_collator_cls_and_kwargs(
        self, cfg: DictDefault, is_eval: bool = False
    ) -> tuple[Callable[..., Any], dict[str, Any]] | None:
        """Pad the labels of depth along with the rest."""
        if not is_listed(cfg, PLUGIN):
            return None
        from thinkswitch_plugin.tah.oracle import collate

        # The model's depth, which the recipe of stage decider does not say.
        config: Any = AutoConfig.from_pretrained(cfg.base_model)
        return collate, {"max_depth": getattr(config, "max_depth", read_block(cfg.tah).max_depth)}


def check_checkpoint(block: TaHBlock, base_model: str) -> None:
    """Whether the recipe's stage can start from its `base_model`, before any weight is loaded.

    Raises:
        ValueError: it is missing, of the wrong kind for the stage, or does not fit the block; one line.
    """
    for key, name in (("base_model", base_model), ("tah.reference", block.reference)):
        if name and not is_there(name):
            raise ValueError(f"tah: {key} {name}: no such folder, and not a hub id (owner/name) either")
    # Registers the kind with transformers' Auto classes, which Axolotl loads by.
    from thinkswitch_plugin.tah.model import refuse_pickles

    try:
        config = AutoConfig.from_pretrained(base_model)
    except (OSError, ValueError) as error:
        raise ValueError(f"tah: base_model {base_model}: cannot be read: {str(error).splitlines()[0]}") from None
    if block.stage == "backbone":
        if isinstance(config, TaHConfig):
            raise ValueError(f"tah: base_model {base_model} went through stage backbone already; use stage: decider")
        TaHConfig(text_config=config, **block.of_config)
        theirs = AutoConfig.from_pretrained(str(block.reference)).get_text_config()
        if theirs.vocab_size != config.get_text_config().vocab_size:
            raise ValueError(
                f"tah: the reference {block.reference} has a vocabulary of {theirs.vocab_size} tokens and {base_model} "
                f"of {config.get_text_config().vocab_size}: use one of the same family"
            )
    else:
        if not isinstance(config, TaHConfig):
            raise ValueError(
                f"tah: base_model {base_model} is a plain {config.model_type} checkpoint; stage decider starts from "
                "what stage backbone left: name that recipe's output_dir"
            )
        reference = block.reference or getattr(config, "reference", None)
        if not reference or not is_there(reference):
            raise ValueError(
                f"tah: reference {reference}, of {base_model}, is not there; say `reference:` in the recipe"
            )
        if config.max_depth == 1:
            raise ValueError(f"tah: base_model {base_model} has max_depth 1: there is nothing to decide")
        refuse_pickles(Path(base_model))
        TaHConfig(**{**config.to_dict(), **block.of_config})


def labelled(cfg: Any) -> TrainDatasetMeta:
    """Load a recipe's datasets as Axolotl does and add `target_depth`; prints the share of hard tokens.

    Args:
        cfg: the validated recipe.
    """
    from axolotl.common.datasets import load_datasets

    from thinkswitch_plugin.tah.oracle import label

    block = read_block(cfg["tah"])
    reference, max_depth, unsure_below = block.reference, block.max_depth, block.unsure_below
    if block.stage == "decider":
        config: Any = AutoConfig.from_pretrained(cfg["base_model"])
        reference, max_depth = block.reference or config.reference, config.max_depth
        unsure_below = getattr(config, "unsure_below", None)
    assert reference
    name_the_cpu(cfg)
    if cfg.get("device_map") == "auto":  # Axolotl's own choice: over all GPUs there are
        cfg.device_map = {"": torch.accelerator.current_device_index()}
    meta = load_datasets(cfg=cfg)
    folder = Path(cfg.get("dataset_prepared_path") or "last_run_prepared") / "tah_labels"
    for name in ("train_dataset", "eval_dataset"):
        dataset = getattr(meta, name)
        if dataset is not None:
            dataset, found = label(dataset, reference, max_depth, block.label_tokens, folder, unsure_below)
            setattr(meta, name, dataset)
            LOG.info(
                f"tah: {name.partition('_')[0]}: {found['hard']:,} of {found['tokens']:,} tokens "
                f"({found['share']:.1%}) are hard for {reference}{' (kept from before)' if found['cached'] else ''}"
            )
    return meta


@click.command("tah-label")
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def command(config: Path) -> None:
    """Mark the hard tokens of CONFIG's datasets and keep the labels.

    CONFIG is a recipe with a `tah:` block. A token is hard if its frozen `reference` predicts it wrong, or is unsure of
    it if the recipe says `unsure_below`. `axolotl train` does this by itself; with this command it can be done before,
    or on another machine, and the share of hard tokens seen: it should be a few per cent to a few tens.
    """
    from axolotl.cli.config import load_cfg

    with one_line():
        cfg = load_cfg(str(config))
        if not is_listed(cfg, PLUGIN):
            raise ValueError(f"{config}: does not list {PLUGIN} under `plugins:`")
        labelled(cfg)
