"""The Axolotl plugin: checks the recipe, and gives Axolotl the trainer, the collator and the teacher.

Knows: Axolotl's hooks. Leaves to others: everything they call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil
from typing import Any

import torch
from axolotl.integrations.base import BasePlugin
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger

from thinkswitch_plugin.facts import publish
from thinkswitch_plugin.on_policy_kl.args import BLOCK, DATASET_TYPE, PLUGIN, SELF, OnPolicyKLConfig, read_block
from thinkswitch_plugin.on_policy_kl.checks import check_devices, check_recipe, check_teacher, is_own_base
from thinkswitch_plugin.recipe import (
    entries_of,
    fingerprint,
    is_listed,
    leave_lora_kernels_off,
    name_the_cpu,
    seed_adapter,
    send_no_reports,
)

LOG = get_logger("axolotl.thinkswitch.on_policy_kl")

# Part of every fingerprint: raise it when the same rows come out differently, so that no prepared set outlives that.
OUTCOME_VERSION = 3

USUAL_TIMEOUT_S = 1800  # of torch's groups of processes, for all that is not decoding
SLOWEST_TOKENS_S = 10  # of one decode; Hugging Face's on a slow card with NF4 weights has some 25


class OnPolicyKLPlugin(BasePlugin):
    """On-policy distillation for `plugins:` (GKD, arXiv 2306.13649)."""

    def register(self, cfg: dict) -> None:
        """Check what the recipe alone can tell, and put a fingerprint into each dataset entry of our type.

        Args:
            cfg: the recipe, not yet validated.

        Raises:
            ValueError: the `on_policy_kl:` block is wrong or does not go with another setting; one line.
        """
        # The manager is shared by all recipes of a process, and this one may not be ours.
        if not is_listed(cfg, PLUGIN):
            return
        send_no_reports()
        config = read_block(cfg.get(BLOCK))
        entries = entries_of(cfg, DATASET_TYPE)
        check_recipe(cfg, len(entries), DATASET_TYPE)
        # They patch the attention class itself, which the teacher's layers are of too.
        leave_lora_kernels_off(cfg)
        if cfg.get("ddp_timeout") is None:  # here, as Axolotl takes it when it starts the group of processes
            cfg["ddp_timeout"] = patience(config, prompts_of(cfg))
        for entry in entries:
            entry["input_transform"] = f"{BLOCK} {fingerprint(entry, config, OUTCOME_VERSION)}"

    def get_input_args(self) -> str:
        """The model of the `on_policy_kl:` block, by its import path."""
        return "thinkswitch_plugin.on_policy_kl.args.OnPolicyKLArgs"

    def load_datasets(self, cfg: DictDefault, preprocess: bool = False) -> None:
        """Before anything is loaded: the teacher must fit, and a CPU must be called one."""
        if not is_listed(cfg, PLUGIN):
            return
        check_teacher(read_block(cfg.on_policy_kl), str(cfg.base_model))
        name_the_cpu(cfg)
        check_devices(cfg.device_map, torch.accelerator.device_count())

    def pre_lora_load(self, cfg: DictDefault, model: Any) -> None:
        """Set the recipe's seed before an adapter is drawn."""
        seed_adapter(cfg, PLUGIN)

    def get_trainer_cls(self, cfg: DictDefault) -> type | None:
        """Axolotl's trainer with rollouts."""
        if not is_listed(cfg, PLUGIN):
            return None
        from thinkswitch_plugin.on_policy_kl.trainer import OnPolicyKLTrainer

        return OnPolicyKLTrainer

    def get_training_args(self, cfg: DictDefault) -> dict[str, Any] | None:
        """Keep the columns that are the teacher's, and let a CPU train in bfloat16, which it has to be told to."""
        if not is_listed(cfg, PLUGIN):
            return None
        return {"remove_unused_columns": False, "use_cpu": not torch.accelerator.is_available()}

    def get_collator_cls_and_kwargs(
        self, cfg: DictDefault, is_eval: bool = False
    ) -> tuple[Callable[..., Any], dict[str, Any]] | None:
        """Prompts stay lists until their answers are there."""
        if not is_listed(cfg, PLUGIN):
            return None
        from thinkswitch_plugin.on_policy_kl.trainer import collate

        return (lambda *_, **__: collate), {}

    def post_trainer_create(self, cfg: DictDefault, trainer: Any) -> None:
        """Write `OUTPUT_DIR/on_policy_kl.json`, load the teacher and hand it to the trainer."""
        if not is_listed(cfg, PLUGIN):
            return
        publish(trainer, BLOCK, cfg.output_dir)
        from thinkswitch_plugin.on_policy_kl.scoring import Teacher

        config = read_block(cfg.on_policy_kl)
        if is_own_base(config, cfg):
            LOG.info(f"on_policy_kl: teacher {config.teacher} is the student's own base: no second copy is loaded")
            config = config.model_copy(update={"teacher": SELF, "teacher_load_in_4bit": False})
        student = trainer.accelerator.unwrap_model(trainer.model)
        teacher = Teacher(config, student, trainer.processing_class, cfg.torch_dtype or torch.float32)
        trainer.begin(config, teacher, trainer.processing_class)


def prompts_of(cfg: Mapping[str, Any]) -> int:
    """How many prompts a process has in a step of a recipe that is not validated yet."""
    micro = int(cfg.get("micro_batch_size") or 1)
    return max(micro * int(cfg.get("gradient_accumulation_steps") or 1), int(cfg.get("batch_size") or 1))


def patience(config: OnPolicyKLConfig, prompts: int) -> int:
    """For how many seconds a process waits for the others: for the longest traces and answers, at a slow pace.

    One that draws none, or whose answers end at once, comes to the exchange that much before the others. A process that
    dies needs no timeout: torchrun ends the others.

    Args:
        config: the recipe's block.
        prompts: of a process and step.
    """
    return USUAL_TIMEOUT_S + ceil(config.longest_wait(prompts) / SLOWEST_TOKENS_S)
