"""Distill: the instruct checkpoint learns (Axolotl), from the answers without their traces or on its own ones.

An adapter is trained and merged; a recipe without one trains the whole checkpoint.
"""

from __future__ import annotations

import copy
import re
import shlex
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.asking import ANSWERS, DATE
from harness.errors import LoopError
from harness.files import read_json, read_json_or_none
from harness.stages import OWN, RECIPE, External, Facts, Kind, Output, Recipe, Source, Stage, short, slot
from thinkswitch_plugin.on_policy_kl import report as on_policy_kl
from thinkswitch_plugin.trace_stripping import report as trace_stripping

CHECKPOINT = "instruct"
ADAPTER = "adapter"
MERGED = ("lora", "qlora")  # adapters that can be merged into the checkpoint
TOOLS = ("axolotl", "torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "thinkswitch_plugin")
PHASES = {
    "Stripping traces": "rows stripped",
    "Tokenizing": "rows tokenised",
    "Dropping": "rows filtered",
    "Saving": "rows saved",
    "Add position_id": "rows laid out",
    "Loading": "weights loaded",
    "Merging": "shards merged",
    "": "steps trained",
}
# A training that is stopped loses a tenth at most, unless the recipe says how it is to be saved.
SAVED: Recipe = {"save_strategy": "steps", "save_steps": 0.1, "save_total_limit": 1}
# Axolotl's keys of trackers, for the trainer's own curves.
REPORTS = re.compile(r"use_(tensorboard|wandb|trackio|mlflow|comet)$|(wandb|trackio|mlflow|hf_mlflow|comet)_")
SAID = {"trace_stripping": trace_stripping.sentence, "on_policy_kl": on_policy_kl.sentence}  # by a plugin's facts file


def build(
    recipe: Recipe,
    seed: int,
    launcher: str,
    instruct: Source,
    thinking: Source,
    labels: Stage | External,
    tasks: Sequence[str],
) -> Stage:
    """The stage.

    Args:
        recipe: Axolotl's config as it is written. The first entry of `datasets` stands for the labels, whatever it
            names; further ones (replay data, say) stay as they are.
        seed: of the training.
        launcher: Axolotl's, with what it is given: "python", "torchrun --nproc_per_node=2".
        instruct: the checkpoint that learns.
        thinking: the teacher, where the recipe has one that is not the student itself.
        labels: the stage whose answers are learnt; or a file of conversations, for the baseline of right answers.
        tasks: whose answers these are.

    Raises:
        LoopError: if it has no data sets, or its adapter is one that cannot be merged.
    """
    entries = recipe.get("datasets")
    if not isinstance(entries, list) or not entries or not isinstance(entries[0], dict):
        raise LoopError("distill recipe: datasets: must be a list, whose first entry stands for the labels")
    resolved = copy.deepcopy(recipe)
    inputs: dict[str, Source] = {"instruct": instruct}
    if isinstance(labels, External):
        inputs["labels"], files = labels, [slot("labels")]
    else:
        inputs["labels"] = Output(labels, ANSWERS)
        files = [f"{slot('labels')}/samples_{task}_{DATE}.jsonl" for task in tasks]
    like, *further = resolved["datasets"]
    like = {key: value for key, value in like.items() if key not in ("path", "data_files", "ds_type", "split")}
    learnt = [
        {
            "path": slot("labels"),
            "ds_type": "json",
            "data_files": [file],
            "split": "train",
            **like,
        }
        for file in files
    ]
    resolved["datasets"] = learnt + further
    resolved["base_model"] = slot("instruct")
    for name in SAID:
        if not isinstance(resolved.get(name) or {}, dict):
            raise LoopError(f"distill recipe: {name}: must be a mapping of that plugin's settings")
    if (resolved.get("on_policy_kl") or {}).get("teacher", "self") != "self":
        resolved["on_policy_kl"]["teacher"] = slot("thinking")
        inputs["thinking"] = thinking
    adapter = resolved.get("adapter")
    if adapter and adapter not in MERGED:
        raise LoopError(f"distill: adapter: {short(adapter)} cannot be merged; use one of {', '.join(MERGED)}, or none")
    resolved["output_dir"] = f"{OWN}/{ADAPTER if adapter else CHECKPOINT}"
    resolved["dataset_prepared_path"] = f"{OWN}/prepared"
    resolved["seed"] = seed
    own = ("save_steps", "saves_per_epoch")
    said = resolved.get("save_strategy") not in (None, "no") or any(resolved.get(key) for key in own)
    ours = bool(adapter) and not said  # of a whole checkpoint each is four times its size
    if ours:
        resolved |= SAVED
    resolved["auto_resume_from_checkpoints"] = True
    reports = {key: resolved.pop(key) for key in list(resolved) if REPORTS.match(key)}
    name, *given = shlex.split(launcher)
    file = f"{OWN}/{RECIPE}"
    train = ("axolotl", "train", file, "--launcher", name, *(["--", *given] if given else []))
    merge = ("axolotl", "merge-lora", file, "--lora-model-dir", f"{OWN}/{ADAPTER}")
    return Stage(
        KIND,
        {RECIPE: resolved},
        (train, merge) if adapter else (train,),
        inputs,
        renames=((f"{ADAPTER}/merged", CHECKPOINT),) if adapter else (),
        scratch=("prepared", *([f"{ADAPTER if adapter else CHECKPOINT}/checkpoint-*"] if ours or not adapter else [])),
        wide=name != "python",
        whole_cpu=True,  # the loop waits for it, and what could run beside it is short
        reports=reports,
    )


def untouched(recipe: Recipe) -> Recipe:
    """A recipe that learns the answers with their traces: the baseline that shows what stripping them is worth."""
    changed = copy.deepcopy(recipe)
    own = changed.get("trace_stripping") or {}
    if isinstance(own, dict):  # else it is refused when the stage is built
        changed["trace_stripping"] = {**own, "strip": False}
    return changed


def resumes(folder: Path) -> list[Path]:
    """The trainer's checkpoints that are whole, as far as looks tell: each file of theirs opens, and none is missing.

    A machine that loses power may have the names of files and not what is in them; a training that went on without its
    optimizer would begin its schedule anew.
    """
    states = folder.glob("*/checkpoint-*/trainer_state.json")
    return [state.parent for state in states if read_json_or_none(state) and _opens(state.parent)]


def _opens(checkpoint: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    weights, rest = list(checkpoint.glob("*.safetensors")), [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]
    try:
        for file in weights:
            with safe_open(file, "pt"):
                pass
    except (OSError, SafetensorError):
        return False
    named = {file.name for file in rest}
    whole = {"optimizer.pt", "scheduler.pt"} <= named and any(name.startswith("rng_state") for name in named)
    return bool(weights) and whole and all(zipfile.is_zipfile(file) for file in rest)


def read(folder: Path, stage: Stage, tokenizer: Path | None = None) -> Facts:
    """What the plugins say of the data."""
    left = Path(stage.recipes[RECIPE]["output_dir"].replace(OWN, str(folder)))
    facts: dict[str, Any] = {name: read_json(left / f"{name}.json") for name in SAID}
    return {name: value for name, value in facts.items() if value}


def note(facts: Facts) -> str:
    """What was learnt from, in a sentence."""
    return "; ".join(say(facts[name]) for name, say in SAID.items() if name in facts)


KIND = Kind("distill", "instruct learns the answers", TOOLS, PHASES, read, note, checkpoint=CHECKPOINT, resumes=resumes)
