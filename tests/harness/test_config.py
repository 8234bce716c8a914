"""loop.yml: what it may say, and what each mistake is answered with."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from harness.config import load, read_yaml, recipes_folder
from harness.errors import LoopError


def written(folder: Path, **changes: object) -> Path:
    settings: dict[str, object] = {
        "instruct": "a",
        "thinking": "b",
        "prompts": ["p"],
        "tasks": ["q"],
        "recipes": {name: f"{name}.yml" for name in ("generate", "distill", "reconstruct", "evaluate")},
    }
    settings.update(changes)
    file = folder / "loop.yml"
    file.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
    return file


def test_the_shipped_loop_names_files_that_are_there() -> None:
    config = load(recipes_folder() / "loop.yml", {})
    assert config.iterations == 3
    for recipe in (
        config.recipes.generate,
        config.recipes.distill,
        config.recipes.reconstruct,
        config.recipes.evaluate,
    ):
        assert recipe.is_file()
    assert Path(config.instruct).is_dir()
    assert Path(config.thinking).is_dir()


def test_paths_in_the_file_are_relative_to_it_and_options_to_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there" / "a").mkdir(parents=True)
    (tmp_path / "here" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    config = load(written(tmp_path / "there", prompts=["own.jsonl"]), {"thinking": "mine", "t": None})
    assert config.instruct == str(tmp_path / "there" / "a")
    assert config.thinking == str(tmp_path / "here" / "mine")
    assert config.prompts_file == tmp_path / "there" / "own.jsonl"
    assert config.recipes.distill == tmp_path / "there" / "distill.yml"


def test_a_hub_id_stays_as_it_is(tmp_path: Path) -> None:
    assert load(written(tmp_path, instruct="owner/name"), {}).instruct == "owner/name"


@pytest.mark.parametrize("t", [-0.01, 1.01, float("nan")])
def test_t_outside_its_range(tmp_path: Path, t: float) -> None:
    with pytest.raises(LoopError, match=r"^--t"):
        load(written(tmp_path), {"t": t})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": 3}, "steps: extra inputs are not permitted"),
        ({"instruct": None}, "instruct: field required"),
        ({"iterations": -1}, "iterations: "),
        ({"anchor": "last"}, "anchor: "),
        ({"name": "../up"}, "name: "),
        ({"tasks": []}, "tasks: "),
        ({"prompts": ["a.jsonl", "b"]}, "prompts: "),
        ({"recipes": {"generate": "g.yml"}}, "recipes.distill: field required"),
    ],
)
def test_a_wrong_setting_is_named_with_its_file(tmp_path: Path, changes: dict[str, object], says: str) -> None:
    file = written(tmp_path, **changes)
    with pytest.raises(LoopError) as caught:
        load(file, {})
    assert str(caught.value).startswith(f"{file}: {says}")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "says"), [("a: [", "not valid YAML"), ("- a\n", "must be a mapping"), ("\xff", "cannot be read")]
)
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "x.yml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(LoopError, match=says):
        read_yaml(file)
    with pytest.raises(LoopError, match="no such file"):
        read_yaml(tmp_path / "missing.yml")
