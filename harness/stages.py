"""The four stages as native commands.

Pure: from a recipe as it is written, the paths of this iteration and the run's settings to the recipe as this
iteration runs it, and the command a person would type. Knows the keys of each tool's config; runs nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from harness.config import LoopConfig
from harness.scores import DATE

Recipe = dict[str, Any]


class Stage(NamedTuple):
    """One stage of one iteration."""

    iteration: int
    name: str
    folder: Path
    recipes: dict[str, Recipe]  # file name inside the folder -> what it says
    commands: list[list[str]]
    inputs: dict[str, str]  # what it reads -> a path or a hub id
    renames: tuple[tuple[str, str], ...] = ()  # inside the folder, once the commands are done: from, to
    scratch: tuple[str, ...] = ()  # inside the folder, removed once the commands are done


def _lm_eval(recipe: Recipe, config: LoopConfig, checkpoint: str, tasks: list[str], output: Path) -> Recipe:
    """An lm-eval config for this checkpoint and these tasks."""
    result = copy.deepcopy(recipe)
    result["model_args"] = {**result.get("model_args", {}), "pretrained": checkpoint}
    result["tasks"] = tasks
    result["output_path"] = str(output / "results.json")  # a .json: no further folder named after the model
    result["log_samples"] = True
    result["seed"] = [config.seed] * 4
    if config.include_path:
        result["include_path"] = str(config.include_path)
    return result


def trusting(recipe: Recipe) -> Recipe:
    """An lm-eval config that loads the classes a checkpoint names; for one whose code was looked at."""
    return {**recipe, "model_args": {**recipe.get("model_args", {}), "trust_remote_code": True}}


def _asked(config: LoopConfig, resolved: Recipe, folder: Path, file: str, copy_name: str) -> list[list[str]]:
    """The commands that ask a checkpoint its tasks: of an NF4 copy, made first, if the run says so."""
    ask = ["lm_eval", "run", "--config", str(folder / file)]
    if not config.nf4:
        return [ask]
    quantize = ["axolotl", "nf4", resolved["model_args"]["pretrained"], str(folder / copy_name)]
    resolved["model_args"]["pretrained"] = str(folder / copy_name)
    return [quantize, ask]


def generate(config: LoopConfig, recipe: Recipe, iteration: int, folder: Path, thinking: str) -> Stage:
    """The thinking checkpoint answers the training prompts (lm-eval, predict-only)."""
    resolved = _lm_eval(recipe, config, thinking, config.prompt_tasks, folder / "samples")
    resolved["predict_only"] = True
    inputs = {"thinking": thinking}
    if config.prompts_file:
        resolved["metadata"] = {**resolved.get("metadata", {}), "prompts_file": str(config.prompts_file)}
        inputs["prompts"] = str(config.prompts_file)
    commands = _asked(config, resolved, folder, "recipe.yml", "thinking_nf4")
    return Stage(iteration, "generate", folder, {"recipe.yml": resolved}, commands, inputs, scratch=("thinking_nf4",))


def distill(
    config: LoopConfig, recipe: Recipe, iteration: int, folder: Path, instruct: str, thinking: str, samples: Path
) -> Stage:
    """The answers without their traces are distilled into the instruct checkpoint (Axolotl), and the adapter merged.

    With an on-policy recipe the instruct checkpoint answers for itself, and the thinking one, its traces read, judges.
    `samples` is the folder the generate stage filled; one dataset for each of its tasks.
    """
    resolved = copy.deepcopy(recipe)
    like = dict(resolved["datasets"][0])
    for key in ("path", "data_files", "ds_type", "split"):
        like.pop(key, None)
    resolved["datasets"] = [
        {
            "path": str(samples),
            "ds_type": "json",
            "data_files": [str(samples / f"samples_{task}_{DATE}.jsonl")],
            "split": "train",
            **like,
        }
        for task in config.prompt_tasks
    ]
    resolved["base_model"] = instruct
    if "on_policy_kl" in resolved:
        resolved["on_policy_kl"] = {**resolved["on_policy_kl"], "teacher": thinking}
    resolved["output_dir"] = str(folder / "adapter")
    resolved["dataset_prepared_path"] = str(folder / "prepared")
    resolved["seed"] = config.seed
    file = str(folder / "recipe.yml")
    return Stage(
        iteration,
        "distill",
        folder,
        {"recipe.yml": resolved},
        [
            ["axolotl", "train", file, "--launcher", "python"],
            ["axolotl", "merge-lora", file, "--lora-model-dir", str(folder / "adapter")],
        ],
        {"instruct": instruct, "thinking": thinking, "samples": str(samples)},
        renames=(("adapter/merged", "instruct"),),
        scratch=("prepared",),
    )


def reconstruct(config: LoopConfig, recipe: Recipe, iteration: int, folder: Path, anchor: str, instruct: str) -> Stage:
    """A thinking checkpoint is rebuilt between the anchor and the distilled instruct checkpoint (mergekit slerp).

    The recipe's `base_model` stands for the anchor wherever it is named, every other model for the instruct one, so
    that tokenizer, chat template and generation config come from the thinking side.
    """
    own = recipe["base_model"]

    def place(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: (anchor if inner == own else instruct) if key in ("model", "base_model") else place(inner)
                for key, inner in value.items()
            }
        return [place(inner) for inner in value] if isinstance(value, list) else value

    resolved: Recipe = place(copy.deepcopy(recipe))
    resolved["parameters"] = {**resolved.get("parameters", {}), "t": config.t}
    command = ["mergekit-yaml", str(folder / "recipe.yml"), str(folder / "thinking")]
    inputs = {"anchor": anchor, "instruct": instruct}
    return Stage(iteration, "reconstruct", folder, {"recipe.yml": resolved}, [command], inputs)


def evaluate(
    config: LoopConfig, written: dict[str, Recipe], iteration: int, folder: Path, instruct: str, thinking: str
) -> Stage:
    """Both checkpoints answer the test questions (lm-eval); `written` has the recipe of each."""
    pair = {"instruct": instruct, "thinking": thinking}
    recipes = {
        f"{who}.yml": _lm_eval(written[who], config, checkpoint, config.tasks, folder / who)
        for who, checkpoint in pair.items()
    }
    commands = [c for who in pair for c in _asked(config, recipes[f"{who}.yml"], folder, f"{who}.yml", f"{who}_nf4")]
    return Stage(iteration, "evaluate", folder, recipes, commands, pair, scratch=("instruct_nf4", "thinking_nf4"))


def waves(stages: Iterable[Stage], most: int) -> Iterator[list[Stage]]:
    """The stages in order, cut into groups of up to `most` neighbours none of which reads what another one writes."""
    wave: list[Stage] = []
    for stage in stages:
        reads = [Path(path) for path in stage.inputs.values()]
        if len(wave) == most or any(path.is_relative_to(other.folder) for path in reads for other in wave):
            yield wave
            wave = []
        wave.append(stage)
    if wave:
        yield wave


def dump(recipe: Recipe) -> str:
    """A recipe as YAML, keys in the order the author wrote them."""
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=120)
