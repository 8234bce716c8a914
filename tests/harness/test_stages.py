"""The stages as native commands: what each recipe becomes in an iteration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness import stages
from harness.config import LoopConfig, load, recipes_folder
from harness.errors import LoopError
from harness.loop import plan, read_recipes
from harness.rundir import RunDir


@pytest.fixture
def config() -> LoopConfig:
    return load(recipes_folder() / "loop.yml", {"iterations": 2})


def by_key(config: LoopConfig, folder: Path) -> dict[tuple[int, str], stages.Stage]:
    return {(s.iteration, s.name): s for s in plan(config, read_recipes(config), RunDir(folder))}


def test_the_order_of_a_run(config: LoopConfig, tmp_path: Path) -> None:
    assert list(by_key(config, tmp_path)) == [
        (0, "evaluate"),
        *[(k, name) for k in (1, 2) for name in ("generate", "distill", "reconstruct", "evaluate")],
    ]


def test_each_iteration_builds_on_the_last(config: LoopConfig, tmp_path: Path) -> None:
    planned = by_key(config, tmp_path)
    first, second = planned[1, "distill"], planned[2, "distill"]
    assert first.inputs["instruct"] == config.instruct
    assert second.inputs["instruct"] == str(first.folder / "instruct")
    assert planned[1, "generate"].inputs["thinking"] == config.thinking
    assert planned[2, "generate"].inputs["thinking"] == str(planned[1, "reconstruct"].folder / "thinking")
    assert planned[2, "evaluate"].inputs == {
        "instruct": str(second.folder / "instruct"),
        "thinking": str(planned[2, "reconstruct"].folder / "thinking"),
    }


@pytest.mark.parametrize("anchor", ["original", "previous"])
def test_the_anchor_of_the_second_reconstruction(config: LoopConfig, tmp_path: Path, anchor: str) -> None:
    planned = by_key(config.model_copy(update={"anchor": anchor}), tmp_path)
    previous = str(planned[1, "reconstruct"].folder / "thinking")
    expected = config.thinking if anchor == "original" else previous
    assert planned[2, "reconstruct"].inputs["anchor"] == expected


def test_reconstruction_keeps_the_thinking_side_as_its_base(config: LoopConfig, tmp_path: Path) -> None:
    recipe: dict[str, Any] = {
        "merge_method": "slerp",
        "base_model": "T",
        "slices": [
            {"sources": [{"model": "T", "layer_range": [0, 4]}, {"model": "I", "layer_range": [0, 4]}]},
        ],
        "parameters": {"t": 0.1},
        "dtype": "bfloat16",
    }
    stage = stages.reconstruct(config.model_copy(update={"t": 0.25}), recipe, 1, tmp_path, "/new/T", "/new/I")
    resolved = stage.recipes["recipe.yml"]
    assert resolved["base_model"] == "/new/T"
    assert [source["model"] for source in resolved["slices"][0]["sources"]] == ["/new/T", "/new/I"]
    assert resolved["parameters"]["t"] == 0.25
    assert resolved["dtype"] == "bfloat16"
    assert recipe["base_model"] == "T"  # the recipe as read is not changed


def test_stages_side_by_side_read_nothing_of_one_another(config: LoopConfig, tmp_path: Path) -> None:
    planned = list(by_key(config, tmp_path).values())
    assert [[(s.iteration, s.name) for s in wave] for wave in stages.waves(planned, 2)] == [
        [(0, "evaluate"), (1, "generate")],
        [(1, "distill")],
        [(1, "reconstruct")],
        [(1, "evaluate"), (2, "generate")],
        [(2, "distill")],
        [(2, "reconstruct")],
        [(2, "evaluate")],
    ]
    assert list(stages.waves(planned, 1)) == [[stage] for stage in planned]
    assert list(stages.waves([], 2)) == []


def test_what_the_author_wrote_in_a_recipe_stays(config: LoopConfig, tmp_path: Path) -> None:
    written = read_recipes(config)
    for (_, name), stage in by_key(config, tmp_path).items():
        for resolved in stage.recipes.values():
            for key, value in written[name].items():
                ours = {"output_path", "output_dir", "dataset_prepared_path", "datasets", "model_args", "tasks", "seed"}
                if key not in ours | {"base_model", "models", "parameters"}:
                    assert resolved[key] == value, (name, key)


def test_own_prompts_and_tasks_reach_the_recipes(config: LoopConfig, tmp_path: Path) -> None:
    own = config.model_copy(
        update={"prompts": [str(tmp_path / "p.jsonl")], "tasks": ["mine"], "include_path": tmp_path / "tasks"}
    )
    planned = by_key(own, tmp_path / "run")
    generate = planned[1, "generate"].recipes["recipe.yml"]
    assert generate["tasks"] == ["prompts_file"]
    assert generate["metadata"]["prompts_file"] == str(tmp_path / "p.jsonl")
    assert generate["include_path"] == str(tmp_path / "tasks")
    (dataset,) = planned[1, "distill"].recipes["recipe.yml"]["datasets"]
    assert "samples_prompts_file_" in dataset["data_files"][0]
    assert dataset["type"] == "thinkswitch_plugin.trace_stripping"
    assert planned[0, "evaluate"].recipes["thinking.yml"]["tasks"] == ["mine"]


def test_on_policy_takes_the_place_of_distillation_with_this_iteration_s_teacher(tmp_path: Path) -> None:
    config = load(recipes_folder() / "loop.yml", {"iterations": 2, "distill": "on-policy"})
    planned = by_key(config, tmp_path)
    recipe = planned[2, "distill"].recipes["recipe.yml"]
    assert recipe["plugins"] == ["thinkswitch_plugin.on_policy_kl.OnPolicyKLPlugin"]
    assert recipe["on_policy_kl"]["teacher"] == planned[1, "reconstruct"].folder.as_posix() + "/thinking"
    assert recipe["base_model"] == str(planned[1, "distill"].folder / "instruct")
    assert {entry["type"] for entry in recipe["datasets"]} == {"thinkswitch_plugin.on_policy_kl"}
    assert all("samples_mini_" in entry["data_files"][0] for entry in recipe["datasets"])


def test_on_policy_needs_its_recipe() -> None:
    config = load(recipes_folder() / "loop.yml", {"distill": "on-policy"})
    lacking = config.model_copy(update={"recipes": config.recipes.model_copy(update={"on_policy": None})})
    with pytest.raises(LoopError, match="add on_policy: under recipes"):
        read_recipes(lacking)


def test_every_seed_is_the_run_s(config: LoopConfig, tmp_path: Path) -> None:
    planned = by_key(config.model_copy(update={"seed": 7}), tmp_path)
    assert planned[1, "distill"].recipes["recipe.yml"]["seed"] == 7
    assert planned[1, "generate"].recipes["recipe.yml"]["seed"] == [7, 7, 7, 7]
