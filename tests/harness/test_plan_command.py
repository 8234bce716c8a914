"""`ts-loop plan` as a command: one recipe alone, by a folder with a config.json and nothing else."""

import io
import json
from pathlib import Path

import pytest
import yaml
from qwen3 import QWEN3_4B
from rich.console import Console

from harness.card import of_size
from harness.cli.plan import PARAMETERS, as_data, made_for_a_gpu, show
from harness.config import read_yaml
from harness.costs.estimate import Estimate
from tests.harness.small import ts_loop


@pytest.mark.slow
def test_the_4bs_recipe_is_planned_from_a_config_alone_and_what_is_too_large_is_mended(tmp_path: Path, recipes: Path):
    (tmp_path / "4b").mkdir()
    (tmp_path / "4b" / "config.json").write_text(json.dumps(QWEN3_4B))
    recipe = {**read_yaml(recipes / "qwen3_4b" / "instruct_distill.yml"), "base_model": str(tmp_path / "4b")}
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    planned = ("plan", tmp_path / "recipe.yml", "--out", tmp_path / "runs", "--json", "--speed", "25,900")
    (stage,) = json.loads(ts_loop(*planned, "--vram", 8).stdout)["stages"]
    assert stage["fits"]
    assert 3.5e9 < stage["memory"] < 5.5e9
    assert stage["notes"] == ["rows of 2,048 tokens (the recipe's longest, so at most)"]
    (stage,) = json.loads(ts_loop(*planned, "--vram", 4, "--set", "micro_batch_size=8").stdout)["stages"]
    assert not stage["fits"]
    assert "micro_batch_size=1" in stage["mend"]


def test_recipes_for_a_gpu_on_a_cpu_are_said_with_the_option_that_plans_for_one():
    cpu = of_size(8)._replace(gpu=False, name="a CPU")
    recipes = {
        "generate": {"device": "cuda:0"},
        "evaluate": {"model": "vllm"},
        "distill": {},
        "other": {"device": "cpu"},
    }
    (line,) = made_for_a_gpu(recipes, cpu)
    assert line.startswith("generate (cuda:0), evaluate (model: vllm): made for a GPU")
    assert "--vram" in line
    assert made_for_a_gpu(recipes, of_size(8)) == made_for_a_gpu({"evaluate": {"device": "cpu"}}, cpu) == []


def test_arms_and_seeds_are_options_as_of_the_loop():
    assert {"arms", "seeds"} <= {str(parameter.name) for parameter in PARAMETERS}


def test_speed_is_two_numbers(tmp_path: Path):
    said = ts_loop("plan", "--speed", "fast", code=2)
    assert "write two numbers above 0" in said.stderr


def test_what_memory_main_memory_or_disk_cannot_hold_is_said_with_what_mends_it():
    lines = [
        Estimate("generate", "", (1,), 5e9, room=4e9, fits=False, mend="--set nf4=true"),
        Estimate(
            "distill", "", (1, 2), 3e9, room=4e9, main=9e9, main_room=6e9, fits=False, leaves=80e9, arms=("gold",)
        ),
        Estimate("reconstruct", "", (1, 2), 0.0, main=6e9, fits=None, leaves=20e9),
    ]
    console = Console(file=io.StringIO(), width=200)
    show(lines, of_size(4), None, 0.0, 59e9, console)
    said = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert said[-3:] == [
        "generate needs 1.00 GB more: mend it by --set nf4=true",
        "distill (gold) needs 3.00 GB more of main memory: a machine with more, a smaller pair",
        "the disk needs 88.00 GB more: ts-loop gc, fewer iterations with --iters, or another disk with --out",
    ]
    assert any("reconstruct" in line and "main memory" in line and "fits" not in line for line in said)
    whole = as_data(lines, of_size(4), None, 0.0, 59e9)
    assert whole["total"]["disk_fits"] is False
    assert [stage["fits"] for stage in whole["stages"]] == [False, False, None]
    assert json.loads(json.dumps(whole, allow_nan=False)) == json.loads(json.dumps(whole))
