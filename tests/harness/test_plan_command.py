"""`ts-loop plan` as a command: one recipe alone, by a folder with a config.json and nothing else."""

import json
from pathlib import Path

import pytest
import yaml
from qwen3 import QWEN3_4B

from harness.config import read_yaml
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


def test_speed_is_two_numbers(tmp_path: Path):
    said = ts_loop("plan", "--speed", "fast", code=2)
    assert "write two numbers above 0" in said.stderr
