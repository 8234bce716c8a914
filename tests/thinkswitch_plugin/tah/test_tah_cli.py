"""The two stages through `axolotl train`, `axolotl tah-label`, and what they leave inside stock lm-eval."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from thinkswitch_plugin.tah.plugin import command as label_command

CPU = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
PYTHON = ("--launcher", "python")


@pytest.fixture(scope="module")
def recipe(recipes: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a shipped recipe, made short, with changes; a change of None takes a key out."""
    folder = tmp_path_factory.mktemp("tah")

    def write(stage: str, name: str | None = None, block: dict[str, Any] | None = None, **changes: Any) -> Path:
        settings = yaml.safe_load((recipes / f"tah_{stage}.yml").read_text())
        if stage == "backbone":
            settings["base_model"] = settings["tah"]["reference"] = str(recipes / "mini/instruct")
        settings["tah"].update(block or {})
        settings["datasets"][0]["path"] = str(recipes / "mini/labels.jsonl")
        settings.update(
            {
                "dataset_prepared_path": str(folder / "prepared"),
                "output_dir": str(folder / (name or stage)),
                "micro_batch_size": 16,
                "max_steps": 3,
                "warmup_steps": 0,
                "logging_steps": 1,
                **changes,
            }
        )
        file = folder / f"{name or stage}.yml"
        file.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
        return file

    return write


def left_by(file: Path) -> Path:
    return Path(yaml.safe_load(file.read_text())["output_dir"])


@pytest.fixture(scope="module")
def stage_one(runner: Any, recipe: Callable[..., Path]) -> tuple[str, Path]:
    """What `axolotl train` said of stage one, after `axolotl tah-label`, and the checkpoint it left."""
    file = recipe("backbone", block={"unsure_below": 0.9})
    labelled, trained = file.with_suffix(".labelled"), file.with_suffix(".trained")
    runner.run(["axolotl", "tah-label", str(file)], CPU, labelled)
    share = re.search(r"tah: train: ([\d,]+) of ([\d,]+) tokens \(([\d.]+)%\) are hard", labelled.read_text())
    assert share
    assert 0 < float(share[3]) < 50
    runner.run(["axolotl", "train", str(file), *PYTHON], CPU, trained)
    return trained.read_text(), left_by(file)


def test_stage_one_trains_the_backbone_and_its_adapter(stage_one: tuple[str, Path], recipes: Path) -> None:
    text, left = stage_one
    assert "are hard for" in text
    assert "(kept from before)" in text
    depths = [float(value) for value in re.findall(r"'mean_depth': '?([\d.]+)", text)]
    assert len(depths) == 3
    assert all(1 < depth < 2 for depth in depths)
    assert not list(left.glob("*.bin"))
    before, after = load_file(recipes / "mini/instruct/model.safetensors"), load_file(left / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(before[name], after[f"backbone.{name}"])
    assert all(bool(value.abs().sum() > 0) for key, value in after.items() if key.endswith(".lora_B"))


def test_stage_two_trains_the_decider_alone_and_lm_eval_scores_it(
    stage_one: tuple[str, Path], recipe: Callable[..., Path], tool: Callable[..., str], tmp_path: Path
) -> None:
    file = recipe("decider", base_model=str(stage_one[1]))
    text, left = tool("axolotl", "train", file, *PYTHON, **CPU), left_by(file)
    assert len(re.findall(r"'decider_accuracy'", text)) == 3
    assert "(kept from before)" in text  # what hard meant is in the checkpoint, as the reference is
    before, after = load_file(stage_one[1] / "model.safetensors"), load_file(left / "model.safetensors")
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert {key.split(".")[0] for key in set(after) - set(before)} == {"decider"}
    tool(
        "lm_eval",
        *("--tasks", "mini_math", "--model", "hf", "--apply_chat_template", "--batch_size", "8", "--limit", "8"),
        *("--model_args", f"pretrained={left},trust_remote_code=True,threshold=0.5"),
        *("--output_path", tmp_path / "out"),
    )
    (file,) = (tmp_path / "out").glob("**/results_*.json")
    assert "exact_match,none" in json.loads(file.read_text())["results"]["mini_math"]


def test_both_stages_train_and_evaluate_in_bfloat16(
    recipe: Callable[..., Path], tool: Callable[..., str], recipes: Path
) -> None:
    mixed = {"bf16": True, "max_steps": 1, "val_set_size": 0.1, "eval_steps": 1}
    before, left = recipes / "mini/instruct", []
    for stage in ("backbone", "decider"):
        start = {} if stage == "backbone" else {"base_model": str(left[-1])}
        file = recipe(stage, f"{stage}_bf16", **mixed, **start)
        said = tool("axolotl", "train", file, *PYTHON, **CPU)
        losses = [float(value) for value in re.findall(r"'(?:loss|eval_loss)': '?([\d.]+)", said)]
        assert len(losses) >= 2
        assert all(0 < loss < float("inf") for loss in losses)
        left.append(left_by(file))
    weights = [load_file(folder / "model.safetensors") for folder in (before, *left)]
    assert {value.dtype for value in weights[1].values()} == {torch.bfloat16}
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(weights[0][name].to(torch.bfloat16), weights[1][f"backbone.{name}"])
    for key, value in weights[2].items():
        assert value.dtype == (torch.float32 if key.startswith("decider.") else torch.bfloat16)
        assert key.startswith("decider.") or torch.equal(value, weights[1][key])


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_single_rows_checkpointed_and_padded_train_as_one_batch_does(
    recipe: Callable[..., Path], recipes: Path, tool: Callable[..., str], processes: int
) -> None:
    # Adam would turn rounding errors of vanishing gradients into whole steps, and dropout is drawn anew.
    # One step: later ones read other rows in two processes, as Axolotl's do.
    same = {
        "optimizer": "sgd",
        "learning_rate": 0.01,
        "max_grad_norm": 0.0,
        "max_steps": 1,
        "block": {"lora_dropout": 0.0},
    }
    # Some of the single rows have no hard token.
    single = {"micro_batch_size": 1, "gradient_accumulation_steps": 16 // processes}
    otherwise = {"gradient_checkpointing": True, "pad_to_sequence_len": True}
    launcher = PYTHON if processes == 1 else ("--launcher", "torchrun", "--", f"--nproc_per_node={processes}")
    files = [recipe("backbone", "whole", **same), recipe("backbone", "single", **same, **single, **otherwise)]
    for file, how in zip(files, (PYTHON, launcher), strict=True):
        tool("axolotl", "train", file, *how, **CPU)
    whole, apart = (load_file(left_by(file) / "model.safetensors") for file in files)
    for key, value in load_file(recipes / "mini/instruct/model.safetensors").items():
        moved = (whole[f"backbone.{key}"] - value).norm()
        assert moved > 0, key
        assert (apart[f"backbone.{key}"] - whole[f"backbone.{key}"]).norm() < 1e-3 * moved, key


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(recipe: Callable[..., Path], tool: Callable[..., str]) -> None:
    """Both stages by torchrun and gloo, several steps of the same rows, without dropout."""
    same = {"optimizer": "sgd", "max_grad_norm": 0.0, "curriculum_sampling": True, "max_steps": 3}
    kept = {"save_strategy": "steps", "save_steps": 3}  # for the losses with all their digits
    launcher = ("--launcher", "torchrun", "--", "--nproc_per_node=2")
    left = ""
    for stage, block, rate in (
        ("backbone", {"lora_dropout": 0.0, "unsure_below": 0.8}, 0.005),
        ("decider", {"decider_dropout": 0.0}, 0.002),
    ):
        losses = []
        for name, rows, how in (("two", 8, launcher), ("one", 16, PYTHON)):
            changes = {"base_model": left} if left else {}
            changes |= {"micro_batch_size": rows, "learning_rate": rate}
            file = recipe(stage, f"{stage}_{name}", block, **same, **kept, **changes)
            tool("axolotl", "train", file, *how, **CPU)
            state = json.loads((left_by(file) / "checkpoint-3/trainer_state.json").read_text())
            losses.append([entry["loss"] for entry in state["log_history"] if "loss" in entry])
        two, one = losses
        assert len(one) == 3
        assert two == pytest.approx(one, rel=1e-4), stage
        left = str(left_by(file))


def test_a_recipe_that_cannot_be_labelled_is_one_line(recipe: Callable[..., Path]) -> None:
    said = CliRunner().invoke(label_command, [str(recipe("decider", "lost", base_model="runs/none/at/all"))])
    assert said.exit_code == 1
    assert said.output.splitlines()[-1].startswith("Error: tah: base_model runs/none/at/all: no such folder")
