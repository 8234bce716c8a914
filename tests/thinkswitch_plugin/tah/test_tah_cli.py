"""The two stages through `axolotl train`, `axolotl tah-label`, and what they leave inside stock lm-eval."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from thinkswitch_plugin.tah.plugin import command as label_command

BIN = Path(sys.executable).parent
Said = subprocess.CompletedProcess[str]


def command(*words: Any, cwd: Path | None = None) -> Said:
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "ACCELERATE_USE_CPU": "true",
    }
    said = subprocess.run(
        [BIN / words[0], *map(str, words[1:])],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        cwd=cwd,
        check=False,
    )
    assert said.returncode == 0, (said.stdout + said.stderr)[-4000:]
    return said


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


def train(file: Path, processes: int = 1) -> tuple[Said, Path]:
    launcher = ["torchrun", "--", f"--nproc_per_node={processes}"] if processes > 1 else ["python"]
    said = command("axolotl", "train", file, "--launcher", *launcher)
    return said, Path(yaml.safe_load(file.read_text())["output_dir"])


@pytest.fixture(scope="module")
def stage_one(recipe: Callable[..., Path]) -> tuple[Said, Path]:
    file = recipe("backbone", block={"unsure_below": 0.9})
    labelled = command("axolotl", "tah-label", file)
    share = re.search(
        r"tah: train: ([\d,]+) of ([\d,]+) tokens \(([\d.]+)%\) are hard", labelled.stdout + labelled.stderr
    )
    assert share
    assert 0 < float(share[3]) < 50
    return train(file)


def test_stage_one_trains_the_backbone_and_its_adapter(stage_one: tuple[Said, Path], recipes: Path) -> None:
    said, left = stage_one
    text = said.stdout + said.stderr
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
    stage_one: tuple[Said, Path], recipe: Callable[..., Path], tmp_path: Path
) -> None:
    said, left = train(recipe("decider", base_model=str(stage_one[1])))
    text = said.stdout + said.stderr
    assert len(re.findall(r"'decider_accuracy'", text)) == 3
    assert "(kept from before)" in text  # what hard meant is in the checkpoint, as the reference is
    before, after = load_file(stage_one[1] / "model.safetensors"), load_file(left / "model.safetensors")
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert {key.split(".")[0] for key in set(after) - set(before)} == {"decider"}
    command(
        "lm_eval",
        *("--tasks", "mini_math", "--model", "hf", "--apply_chat_template", "--batch_size", "8", "--limit", "8"),
        *("--model_args", f"pretrained={left},trust_remote_code=True,threshold=0.5"),
        *("--output_path", tmp_path / "out"),
        cwd=tmp_path,
    )
    (file,) = (tmp_path / "out").glob("**/results_*.json")
    assert "exact_match,none" in json.loads(file.read_text())["results"]["mini_math"]


def test_two_processes_of_single_rows_checkpointed_and_padded_train_as_one_batch_does(
    recipe: Callable[..., Path], recipes: Path
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
    single = {"micro_batch_size": 1, "gradient_accumulation_steps": 8}
    otherwise = {"gradient_checkpointing": True, "pad_to_sequence_len": True}
    whole, two = (
        load_file(train(recipe("backbone", name, **same, **more), processes)[1] / "model.safetensors")
        for name, more, processes in (("whole", {}, 1), ("two", {**single, **otherwise}, 2))
    )
    for key, value in load_file(recipes / "mini/instruct/model.safetensors").items():
        moved = (whole[f"backbone.{key}"] - value).norm()
        assert (two[f"backbone.{key}"] - whole[f"backbone.{key}"]).norm() < 1e-3 * moved, key


def test_a_recipe_that_cannot_be_labelled_is_one_line(recipe: Callable[..., Path]) -> None:
    said = CliRunner().invoke(label_command, [str(recipe("decider", "lost", base_model="runs/none/at/all"))])
    assert said.exit_code == 1
    assert said.output.splitlines()[-1].startswith("Error: tah: base_model runs/none/at/all: no such folder")
