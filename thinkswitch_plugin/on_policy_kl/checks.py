"""Whether a recipe and its teacher can work, found out before any weight is loaded.

Knows configs and tokenizers. Each check raises `ValueError` with one line: what, where, what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from thinkswitch_plugin.on_policy_kl.args import SELF, OnPolicyKLConfig
from thinkswitch_plugin.recipe import is_there, refuse, spreads

# What the rollouts rule out, and what to do about it.
REFUSED = {
    "sample_packing": "rollouts are not packed; remove it",
    "rl": "this plugin is the trainer; remove it",
    "test_datasets": "there are no labels to evaluate against; score the checkpoint with lm_eval",
    "streaming": "prompts are tokenised beforehand; remove it",
    "context_parallel_size": "rollouts are not split over devices; remove it",
    "lora_qkv_kernel": "it patches the teacher's layers too; set it to false",
    "lora_o_kernel": "it patches the teacher's layers too; set it to false",
    "torch_compile": "rollouts have other shapes at every step, and each would be compiled anew; remove it",
    "tensor_parallel_size": "rollouts need whole weights on each device; use plain data parallel training",
    "dp_shard_size": "rollouts need whole weights on each device; use plain data parallel training",
    "fsdp": "rollouts need whole weights on each device; use plain data parallel training",
    "fsdp_config": "rollouts need whole weights on each device; use plain data parallel training",
    "deepspeed": "rollouts need whole weights on each device; use plain data parallel training",
}


def check_recipe(cfg: Mapping[str, Any], entries: int, dataset_type: str) -> None:
    """What the rest of a recipe must be like.

    Args:
        cfg: the recipe, not yet validated.
        entries: how many of its datasets have our type.
        dataset_type: that type.

    Raises:
        ValueError: a setting that does not go with rollouts, or a dataset of another type.
    """
    refuse("on_policy_kl", cfg, REFUSED)
    if cfg.get("val_set_size"):
        raise ValueError(f"on_policy_kl: val_set_size is set: {REFUSED['test_datasets']}")
    if entries != len(cfg.get("datasets") or []) or not entries:
        raise ValueError(f"on_policy_kl: every dataset needs `type: {dataset_type}`, and there must be one")


def check_devices(device_map: Any, cards: int) -> None:
    """A student on one card: where a recipe says nothing, Axolotl spreads it over all that one process sees.

    Args:
        device_map: the recipe's, after Axolotl has filled it in.
        cards: accelerators that this process sees.

    Raises:
        ValueError: the student would be spread.
    """
    if spreads(device_map) and (cards > 1 or isinstance(device_map, Mapping)):
        over = "several devices" if isinstance(device_map, Mapping) else f"{cards} cards"
        raise ValueError(
            f"on_policy_kl: device_map {device_map} spreads the student over {over}, away from its teacher: "
            "start a process a card (--launcher torchrun), or let CUDA_VISIBLE_DEVICES name one card"
        )


def check_teacher(config: OnPolicyKLConfig, student: str) -> None:
    """A teacher that is there and has the student's vocabulary.

    Args:
        config: the recipe's block.
        student: the recipe's `base_model`.

    Raises:
        ValueError: the teacher is missing, or its vocabulary or its logits' width is another.
    """
    if config.teacher == SELF:
        return
    name = config.teacher
    if not is_there(name):
        raise ValueError(f"on_policy_kl: teacher {name}: no such folder, and not a hub id (owner/name) either")
    try:
        theirs = AutoConfig.from_pretrained(name).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"on_policy_kl: teacher {name}: cannot be read: {str(error).splitlines()[0]}") from None
    ours = AutoConfig.from_pretrained(student).get_text_config()
    if ours.vocab_size != theirs.vocab_size:
        raise ValueError(
            f"on_policy_kl: the student {student} has a vocabulary of {ours.vocab_size} tokens and the teacher {name} "
            f"of {theirs.vocab_size}: use a teacher of the same family and size of vocabulary, padding included"
        )
    mine, other = AutoTokenizer.from_pretrained(student).get_vocab(), tokenizer.get_vocab()
    if mine != other:
        token = sorted(mine.items() ^ other.items())[0][0]
        raise ValueError(
            f"on_policy_kl: the tokenizers of {student} and the teacher {name} differ, in {token!r} for one: "
            "token by token they cannot be compared; use a teacher of the same family"
        )
    if config.context == "trace" and tokenizer.pad_token_id is None:
        raise ValueError(
            f"on_policy_kl: teacher {name}: its tokenizer has no padding token, needed to think in batches"
        )


def is_own_base(config: OnPolicyKLConfig, cfg: Mapping[str, Any]) -> bool:
    """Say whether the teacher is what the student is without its adapter, so that no second copy need be loaded.

    Weights in NF4 are not the checkpoint's: both sides must hold them alike.

    Args:
        config: the recipe's block.
        cfg: the recipe.
    """
    base = str(cfg.get("base_model"))
    folders = Path(base), Path(config.teacher)
    same = base == config.teacher or (all(f.is_dir() for f in folders) and folders[0].samefile(folders[1]))
    in_4bit = bool(cfg.get("load_in_4bit"))
    moves = cfg.get("adapter") not in ("lora", "qlora") or cfg.get("relora")  # the base itself is trained
    other = cfg.get("load_in_8bit") or cfg.get("revision_of_model") or in_4bit != config.teacher_load_in_4bit
    return same and not moves and not other
