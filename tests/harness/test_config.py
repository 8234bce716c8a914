"""loop.yml and `--set`: what they may say, and what each mistake is answered with."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.checks import local_checkpoint
from harness.config import LoopConfig, assignment, load, located, put, read_recipes, read_yaml, recipes_folder
from harness.errors import LoopError

NAMES = ("generate", "distill", "reconstruct", "evaluate")
TOOLS: dict[str, dict[str, Any]] = {
    "generate": {"model": "hf", "gen_kwargs": {"temperature": 0.6}},
    "distill": {"datasets": [{"path": "x", "type": "y"}], "learning_rate": 0.002, "adapter": "qlora"},
    "reconstruct": {"merge_method": "slerp", "base_model": "T", "parameters": {"t": 0.1}},
    "evaluate": {"model": "hf", "batch_size": 200},
    "on_policy": {"datasets": [{"path": "x"}], "on_policy_kl": {"teacher": "T"}},
}


def written(folder: Path, **changes: object) -> Path:
    """A loop.yml; a setting that is None is left out."""
    settings: dict[str, object] = {
        "instruct": "a",
        "thinking": "b",
        "prompts": ["p"],
        "tasks": ["q"],
        "recipes": {name: f"{name}.yml" for name in NAMES},
    }
    settings.update(changes)
    file = folder / "loop.yml"
    file.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
    return file


def with_recipes(folder: Path, **changes: object) -> Path:
    """A loop.yml with all its recipes beside it, on_policy.yml among them."""
    for name, recipe in TOOLS.items():
        (folder / f"{name}.yml").write_text(yaml.safe_dump(recipe))
    return written(folder, **changes)


# --- the file ---


def test_the_shipped_loop_names_files_that_are_there() -> None:
    config = load(recipes_folder() / "loop.yml", {})
    assert config.iterations == 3
    for name in NAMES:
        assert getattr(config.recipes, name).is_file()
    assert config.recipes.on_policy is not None
    assert config.recipes.on_policy.is_file()
    assert Path(config.instruct).is_dir()
    assert Path(config.thinking).is_dir()


def test_what_is_left_out_has_a_default(tmp_path: Path) -> None:
    config = load(written(tmp_path), {})
    assert (config.name, config.iterations, config.seed, config.jobs) == ("loop", 3, 42, 1)
    assert (config.anchor, config.distill, config.launcher) == ("original", "answers", "python")
    assert config.t is None  # the recipe's own
    assert (config.limit, config.include_path, config.usd_per_hour, config.nf4) == (None, None, None, False)


def test_paths_in_the_file_are_relative_to_it_and_options_to_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there" / "a").mkdir(parents=True)
    (tmp_path / "here" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    file = written(tmp_path / "there", prompts=["own.jsonl"], include_path="tasks")
    config = load(file, {"thinking": "mine", "t": None})
    assert config.instruct == str(tmp_path / "there" / "a")
    assert config.thinking == str(tmp_path / "here" / "mine")
    assert config.own_prompts == str(tmp_path / "there" / "own.jsonl")
    assert config.include_path == tmp_path / "there" / "tasks"
    assert config.recipes.distill == tmp_path / "there" / "distill.yml"
    assert load(Path("../there/loop.yml"), {}).recipes.distill == tmp_path / "there" / "distill.yml"


def test_a_hub_id_stays_as_it_is(tmp_path: Path) -> None:
    assert load(written(tmp_path, instruct="owner/name"), {}).instruct == "owner/name"
    assert load(written(tmp_path), {"instruct": "owner/name@v1"}).instruct == "owner/name@v1"


def test_a_checkpoint_in_the_home_folder_may_be_written_with_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home/models/a").mkdir(parents=True)
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = load(written(tmp_path / "work", instruct="~/models/a"), {"thinking": "~/models/a"})
    assert config.instruct == config.thinking == str(tmp_path / "home/models/a")


def test_the_pair_as_it_is_written_is_kept_beside_the_one_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    config = load(written(tmp_path), {"instruct": "owner/other", "thinking": "owner/another"})
    assert (config.instruct, config.thinking) == ("owner/other", "owner/another")
    assert config.written_pair == ("a", str(tmp_path / "b"))
    assert "written_pair" not in config.model_dump()  # what a run notes of itself


@pytest.mark.parametrize("prompts", [["mine.jsonl"], ["a,b.jsonl"]])
def test_one_jsonl_file_is_the_user_s_own_prompts(tmp_path: Path, prompts: list[str]) -> None:
    config = load(written(tmp_path, prompts=prompts), {})
    assert config.own_prompts == str(tmp_path / prompts[0])  # a comma is part of its name
    assert config.prompt_tasks == ["prompts_file"]


def test_tasks_that_bring_prompts_are_named(tmp_path: Path) -> None:
    config = load(written(tmp_path, prompts=["p", "q"]), {})
    assert config.own_prompts is None
    assert config.prompt_tasks == ["p", "q"]


@pytest.mark.parametrize("t", [-0.01, 1.01, float("nan")])
def test_t_outside_its_range(tmp_path: Path, t: float) -> None:
    with pytest.raises(LoopError, match=r"^--t"):
        load(written(tmp_path), {"t": t})


@pytest.mark.parametrize("t", [0.0, 0.5, 1.0, None])
def test_t_within_its_range_or_left_out(tmp_path: Path, t: float | None) -> None:
    assert load(written(tmp_path, t=t), {}).t == t
    assert load(written(tmp_path, t=0.2), {"t": t}).t == (0.2 if t is None else t)


def test_t_may_be_found_out_if_anything_is_rebuilt(tmp_path: Path) -> None:
    assert load(written(tmp_path), {"t": "auto"}).t == "auto"
    assert load(written(tmp_path, t="auto"), {"t": "0.25"}).t == 0.25
    held_out = load(written(tmp_path, t="auto", validate=["mine"]), {})
    assert (held_out.t, held_out.validate_by) == ("auto", ["mine"])
    assert LoopConfig.model_validate(held_out.model_dump(mode="json")).validate_by == ["mine"]  # as run.json has it
    for asked in ({"t": "auto", "iterations": 0}, {"iterations": 0}):
        with pytest.raises(LoopError, match=r"^--t auto: with 0 iterations nothing is rebuilt"):
            load(written(tmp_path, t="auto"), asked)


@pytest.mark.parametrize("t", ["automatic", "0,5", "", True, [0.5], "2", "-1", "nan"])
def test_what_is_no_t_is_answered_with_what_is(tmp_path: Path, t: object) -> None:
    with pytest.raises(LoopError, match=r"^--t: .*must be from 0 .* to 1 .*, or auto") as refused:
        load(written(tmp_path), {"t": t})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "launcher", ["python", "torchrun", "torchrun --nproc_per_node=2", "accelerate --config_file 'a b.yml'"]
)
def test_a_launcher_may_be_given_what_it_takes(tmp_path: Path, launcher: str) -> None:
    assert load(written(tmp_path, launcher=launcher), {}).launcher == launcher


@pytest.mark.parametrize("launcher", ["", "  ", "deepspeed", "mpirun -n 2 python", "torchrun2"])
def test_an_unknown_launcher_is_answered_with_the_known_ones(tmp_path: Path, launcher: str) -> None:
    with pytest.raises(LoopError, match=r"loop\.yml: launcher: .*must begin with one of python, accelerate, torchrun"):
        load(written(tmp_path, launcher=launcher), {})


@pytest.mark.parametrize("launcher", ["torchrun 'unfinished", 'accelerate "'])
def test_a_launcher_with_a_quotation_that_does_not_end_is_refused(tmp_path: Path, launcher: str) -> None:
    with pytest.raises(LoopError, match=r"loop\.yml: launcher: "):
        load(written(tmp_path, launcher=launcher), {})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": 3}, "steps: extra inputs are not permitted"),
        ({"instruct": None}, "instruct: field required"),
        ({"instruct": 3}, "instruct: "),
        ({"iterations": -1}, "iterations: "),
        ({"iterations": "many"}, "iterations: "),
        ({"anchor": "last"}, "anchor: "),
        ({"distill": "both"}, "distill: "),
        ({"name": "../up"}, "name: "),
        ({"tasks": []}, "tasks: "),
        ({"tasks": "one"}, "tasks: "),
        ({"jobs": 0}, "jobs: "),
        ({"limit": 0}, "limit: "),
        ({"prompts": ["a.jsonl", "b"]}, "prompts: "),
        ({"recipes": {"generate": "g.yml"}}, "recipes.distill: field required"),
        ({"recipes": "g.yml"}, "recipes: "),
    ],
)
def test_a_wrong_setting_is_named_with_its_file(tmp_path: Path, changes: dict[str, object], says: str) -> None:
    file = written(tmp_path, **changes)
    with pytest.raises(LoopError) as caught:
        load(file, {})
    assert str(caught.value).startswith(f"{file}: {says}")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("overrides", "says"),
    [({"iterations": -1}, "--iters: "), ({"seed": -1}, "--seed: "), ({"limit": 0}, "--limit: ")],
)
def test_a_wrong_option_is_named_as_it_was_given(tmp_path: Path, overrides: dict[str, object], says: str) -> None:
    with pytest.raises(LoopError) as caught:
        load(written(tmp_path), overrides)
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize(
    ("text", "says"),
    [("a: [", "not valid YAML"), ("- a\n", "must be a mapping"), ("", "must be a mapping"), ("\xff", "cannot be read")],
)
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "x.yml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(LoopError, match=says) as caught:
        read_yaml(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LoopError, match="no such file"):
        read_yaml(tmp_path / "missing.yml")
    with pytest.raises(LoopError, match="cannot be read"):
        read_yaml(tmp_path)


# --- --set, of the loop ---


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ("jobs=4", "jobs", 4),
        ("t=0.25", "t", 0.25),
        ("t=2e-1", "t", 0.2),
        ("t=", "t", None),
        ("nf4=true", "nf4", True),
        ("anchor=previous", "anchor", "previous"),
        ("distill=on-policy", "distill", "on-policy"),
        ("tasks=[one, two]", "tasks", ["one", "two"]),
        ("tasks.0=other", "tasks", ["other"]),
        ("usd_per_hour=1.5", "usd_per_hour", 1.5),
        ("launcher=torchrun --nproc_per_node=2", "launcher", "torchrun --nproc_per_node=2"),
        (" jobs = 4 ", "jobs", 4),
    ],
)
def test_a_setting_of_the_loop_is_set(tmp_path: Path, change: str, field: str, value: object) -> None:
    assert getattr(load(written(tmp_path, t=0.5), {}, [change]), field) == value


def test_later_changes_win_and_options_win_over_them(tmp_path: Path) -> None:
    assert load(written(tmp_path), {}, ["jobs=2", "jobs=3"]).jobs == 3
    assert load(written(tmp_path), {"iterations": 1}, ["iterations=9"]).iterations == 1


def test_what_is_set_of_a_recipe_is_not_the_loop_s(tmp_path: Path) -> None:
    plain = load(written(tmp_path), {})
    assert load(written(tmp_path), {}, ["distill.learning_rate=1", "evaluate.batch_size=2"]) == plain


def test_another_recipe_may_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with_recipes(tmp_path)
    (tmp_path / "other.yml").write_text(yaml.safe_dump({**TOOLS["distill"], "lora_r": 8}))
    changes = ["recipes.distill=other.yml"]
    assert read_recipes(load(Path("loop.yml"), {}, changes), changes)["distill"]["lora_r"] == 8


def test_paths_that_are_set_are_of_the_working_folder_as_options_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "here/mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    changes = ["instruct=mine", "include_path=mine", "prompts=[own.jsonl]", "recipes.distill=d.yml"]
    config = load(written(tmp_path / "there"), {}, changes)
    found = [config.instruct, str(config.include_path), str(config.own_prompts), str(config.recipes.distill)]
    assert found == [str(tmp_path / "here" / name) for name in ("mine", "mine", "own.jsonl", "d.yml")]


@pytest.mark.parametrize(
    "change", ["jobz=1", "jobs=many", "jobs=0", "anchor=last", "recipes.distil=d.yml", "name=../up", "launcher=mpirun"]
)
def test_a_change_that_does_not_fit_is_named_as_it_was_given(tmp_path: Path, change: str) -> None:
    with pytest.raises(LoopError) as caught:
        load(written(tmp_path), {}, [change])
    assert str(caught.value).startswith(f"--set {change.partition('=')[0]}")  # the file has no such mistake
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("change", ["jobs", "", "=1", ".=1", "distill.=1", "distill..x=1", ".jobs=1", "jobs: 1"])
def test_what_is_no_assignment_is_answered_with_one(tmp_path: Path, change: str) -> None:
    with pytest.raises(LoopError, match=r"^--set .*: write KEY=VALUE, such as --set distill\.learning_rate=1e-4$"):
        load(written(tmp_path), {}, [change])


@pytest.mark.parametrize("change", ["tasks=[one", "name={", "name='"])
def test_a_value_that_is_no_yaml(tmp_path: Path, change: str) -> None:
    with pytest.raises(LoopError, match="the value is not valid YAML") as caught:
        load(written(tmp_path), {}, [change])
    assert str(caught.value).startswith(f"--set {change}: ")


@pytest.mark.parametrize("url", ["https://me:word@host/v1", "http://token@host", "postgres://a:b@c"])
def test_a_password_in_a_url_is_refused_and_not_said(tmp_path: Path, url: str) -> None:
    config = load(with_recipes(tmp_path), {})
    (tmp_path / "evaluate.yml").write_text(yaml.safe_dump({"model_args": {"base_url": url}}))
    for changes in ([], [f"generate.model_args.base_url={url}"]):
        with pytest.raises(LoopError, match="has a user or password in its URL") as caught:
            read_recipes(config, changes)
        assert url not in str(caught.value)


PLANTED = "hf_" + "AbCd0123" * 4


@pytest.mark.parametrize(
    "recipe",
    [
        {"hub_token": "word"},
        {"model_args": {"token": "word"}},
        {"model_args": "pretrained=here,token=word"},
        {"model_args": {"header": {"Authorization": "Bearer word"}}},
        {"env": [{"WANDB_API_KEY": "word"}]},
        {"anything": f"see {PLANTED}"},
        {"x-api-key": "word"},
    ],
)
def test_a_secret_is_refused_wherever_it_is_written_and_not_said(tmp_path: Path, recipe: dict[str, Any]) -> None:
    config = load(with_recipes(tmp_path), {})
    (key, value), *_ = recipe.items()
    with pytest.raises(LoopError, match=r"^--set generate: .* has a secret in it; take it out") as caught:
        read_recipes(config, [f"generate.{key}={json.dumps(value)}"])
    assert "word" not in str(caught.value)
    assert PLANTED not in str(caught.value)
    (tmp_path / "evaluate.yml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(LoopError, match=f"^evaluate recipe: {key}.* has a secret in it"):
        read_recipes(config)


@pytest.mark.parametrize(
    "recipe",
    [
        {"special_tokens": {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}},
        {"model_args": "pretrained=here,use_auth_token=true,think_end_token=</think>,max_tokens=5"},
        {"model_args": {"token": True, "api_key": None}},
        {"chat_template": "{% if secret %}the password is: a = b{% endif %}"},
        {"wandb_project": "sk-learning"},
    ],
)
def test_what_only_sounds_like_a_secret_is_none(tmp_path: Path, recipe: dict[str, Any]) -> None:
    config = load(with_recipes(tmp_path), {})
    (tmp_path / "evaluate.yml").write_text(yaml.safe_dump(recipe))
    assert read_recipes(config)["evaluate"] == recipe


@pytest.mark.parametrize(
    "settings", [{"instruct": "https://me:w0rd@host"}, {"name": "sk-" + "w0rd" * 5}, {"token": "w0rd"}]
)
def test_a_secret_in_loop_yml_is_refused_and_not_said(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(LoopError, match="take it out") as caught:
        load(written(tmp_path, **settings), {})
    assert "w0rd" not in str(caught.value)


# --- --set, of a recipe ---


def changed(folder: Path, *changes: str, **settings: object) -> dict[str, Any]:
    return read_recipes(load(with_recipes(folder, **settings), {}, changes), changes)


@pytest.mark.parametrize(
    ("said", "value"),
    [
        ("1e-4", 0.0001),
        ("1E-4", 0.0001),
        ("-2.5e+3", -2500.0),
        ("1.e-4", 0.0001),
        (".5e-3", 0.0005),
        ("16", 16),
        ("0.5", 0.5),
        ("true", True),
        ("null", None),
        ("", None),
        ("cosine", "cosine"),
        ("'16'", "16"),
        ("a=b", "a=b"),
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("[1e-4, 2e-4]", [0.0001, 0.0002]),
        ("{a: 1, b: 1e-4}", {"a": 1, "b": 0.0001}),
    ],
)
def test_a_value_has_the_type_a_person_means(tmp_path: Path, said: str, value: object) -> None:
    found = changed(tmp_path, f"distill.x={said}")["distill"]["x"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("change", "recipe", "place", "value"),
    [
        ("distill.learning_rate=1e-4", "distill", ["learning_rate"], 0.0001),
        ("generate.gen_kwargs.temperature=0", "generate", ["gen_kwargs", "temperature"], 0),
        ("generate.gen_kwargs.top_p=0.9", "generate", ["gen_kwargs", "top_p"], 0.9),
        ("distill.trace_stripping.max_dropped_fraction=1", "distill", ["trace_stripping", "max_dropped_fraction"], 1),
        ("distill.datasets.0.type=z", "distill", ["datasets", 0, "type"], "z"),
        ("distill.datasets.0.field.deep=z", "distill", ["datasets", 0, "field", "deep"], "z"),
        ("reconstruct.parameters.t=[0, 1]", "reconstruct", ["parameters", "t"], [0, 1]),
        ("evaluate.gen_kwargs={a: 1}", "evaluate", ["gen_kwargs"], {"a": 1}),
    ],
)
def test_a_setting_of_a_recipe_is_set_where_it_says_and_nowhere_else(
    tmp_path: Path, change: str, recipe: str, place: Sequence[Any], value: object
) -> None:
    plain, found = changed(tmp_path), changed(tmp_path, change)
    inner: Any = found[recipe]
    for name in place:
        inner = inner[name]
    assert inner == value
    assert {name: found[name] for name in found if name != recipe} == {
        name: plain[name] for name in plain if name != recipe
    }
    for key in plain[recipe]:
        if key != place[0]:
            assert found[recipe][key] == plain[recipe][key]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("distill.learning_rate.x=1", "there is no"),
        ("distill.datasets.1.type=z", "there is no 1 to set something in"),
        ("distill.datasets.first.type=z", "there is no first to set something in"),
        ("distill.datasets.3=z", "there is no 3 to set"),
        ("distill.adapter.0=z", "there is no 0 to set"),
        ("reconstruct.base_model.deep.er=1", "there is no deep to set something in"),
        ("evaluate_thinking.batch_size=1", "this run has no recipe evaluate_thinking; it has generate, distill"),
    ],
)
def test_a_place_that_is_not_there_is_said(tmp_path: Path, change: str, says: str) -> None:
    with pytest.raises(LoopError, match=says) as caught:
        changed(tmp_path, change)
    assert str(caught.value).startswith("--set ")


def test_setting_something_of_a_recipe_does_not_touch_its_file(tmp_path: Path) -> None:
    changed(tmp_path, "distill.learning_rate=1e-4")
    assert read_yaml(tmp_path / "distill.yml") == TOOLS["distill"]


def test_a_value_is_put_deep_into_lists_and_mappings() -> None:
    settings: dict[str, Any] = {"a": [{"b": 1}], "n": None}
    put(settings, ["a", "0", "b"], 2)
    put(settings, ["n", "x"], 3)
    put(settings, ["new", "deep"], 4)
    assert settings == {"a": [{"b": 2}], "n": {"x": 3}, "new": {"deep": 4}}
    assert assignment("a.0.b = 1e-4") == (["a", "0", "b"], 0.0001)


# --- recipes ---


def test_the_recipes_of_a_run_by_the_stage_they_are_for(tmp_path: Path) -> None:
    config = load(with_recipes(tmp_path), {})
    assert read_recipes(config) == {name: TOOLS[name] for name in NAMES}


def test_on_policy_is_the_distill_recipe_where_the_run_asks_for_it(tmp_path: Path) -> None:
    recipes = {name: f"{name}.yml" for name in TOOLS}
    found = changed(tmp_path, "on_policy.on_policy_kl.x=1", recipes=recipes, distill="on-policy")
    assert found["distill"] == {**TOOLS["on_policy"], "on_policy_kl": {"teacher": "T", "x": 1}}
    assert set(found) == set(NAMES)
    found = changed(tmp_path, "distill.x=1", recipes=recipes, distill="on-policy")
    assert found["distill"]["x"] == 1
    assert changed(tmp_path, recipes=recipes)["distill"] == TOOLS["distill"]


def test_what_is_set_of_a_recipe_that_the_run_does_not_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoopError, match=r"^--set on_policy\.x: this run has no recipe on_policy"):
        changed(tmp_path, "on_policy.x=1", recipes={name: f"{name}.yml" for name in TOOLS})


def test_on_policy_needs_its_recipe(tmp_path: Path) -> None:
    with pytest.raises(LoopError, match="add on_policy: under recipes"):
        changed(tmp_path, distill="on-policy")


def test_a_recipe_that_is_not_there_is_named(tmp_path: Path) -> None:
    config = load(with_recipes(tmp_path), {})
    (tmp_path / "reconstruct.yml").unlink()
    with pytest.raises(LoopError, match=r"reconstruct\.yml: no such file"):
        read_recipes(config)


# --- local files that a recipe names ---


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe's folder, which is not the working folder."""
    (tmp_path / "work").mkdir()
    (tmp_path / "recipes/data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    for name in ("replay.jsonl", "data/a.jsonl", "plain"):
        (tmp_path / "recipes" / name).write_text("the recipe's")
    return tmp_path / "recipes"


@pytest.mark.parametrize("name", ["replay.jsonl", "./replay.jsonl", "data/a.jsonl", "./data"])
def test_a_file_beside_the_recipe_is_found_from_anywhere(elsewhere: Path, name: str) -> None:
    assert located({"datasets": [{"path": name}]}, elsewhere) == {
        "datasets": [{"path": str((elsewhere / name).resolve())}]
    }


def test_a_file_of_the_working_folder_comes_first_as_for_the_tool_itself(elsewhere: Path) -> None:
    Path("replay.jsonl").write_text("the working folder's")
    assert located(["replay.jsonl"], elsewhere) == [os.path.realpath("replay.jsonl")]


@pytest.mark.parametrize(
    "value",
    [
        "owner/name",
        "missing.jsonl",
        "thinkswitch_plugin.trace_stripping",
        "plain",
        "x",
        "",
        1.5,
        None,
        True,
        "a/\n",
        ".",
    ],
)
def test_what_is_no_file_stays_as_it_is(elsewhere: Path, value: object) -> None:
    assert located({"key": value}, elsewhere) == {"key": value}


def test_a_recipe_in_a_loop_is_located(elsewhere: Path) -> None:
    file = with_recipes(elsewhere)
    recipe = {**TOOLS["distill"], "datasets": [{"path": "x"}, {"path": "replay.jsonl"}]}
    (elsewhere / "distill.yml").write_text(yaml.safe_dump(recipe))
    found: LoopConfig = load(file, {})
    assert read_recipes(found)["distill"]["datasets"] == [{"path": "x"}, {"path": str(elsewhere / "replay.jsonl")}]


# --- what YAML can say and no person would ---

BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "more than 20,000 values, 1,000,000 characters, or 100 within one another"),
        ("x: &x [*x, *x]\n", "more than 20,000 values, 1,000,000 characters, or 100 within one another"),
        (f"x: {'[' * 150}{']' * 150}\n", "more than 20,000 values, 1,000,000 characters, or 100 within"),
        (f"x: {'[' * 5000}{']' * 5000}\n", "not valid YAML: maximum recursion depth exceeded"),
        ('x: {y: "\\ud800"}\n', "\\ud800 holds half a surrogate pair; write the whole character"),
        ('x: {"\\ud800": 1}\n', "\\ud800 holds half a surrogate pair; write the whole character"),
        (f"x: &x {'a' * 1000}\ny: [{', '.join(['*x'] * 1001)}]\n", "more than 20,000 values, 1,000,000 characters, or"),
        (f"x: {'a' * 1_000_001}\n", "is longer than 1,000,000 characters; is it a file of settings?"),
        ("null: 3\n", "None: is no name of a setting; put it in quotes if it is meant"),
        ("? [a, b]\n: 3\n", "not valid YAML: while constructing a mapping"),
        ("x: 2024-13-45\n", "cannot be read: month must be in 1..12"),
        ("x: !!set {a, b}\n", "is set; write text, numbers, lists and mappings"),
        ("x: !!binary aGVsbG8=\n", "b'hello' is bytes; write text, numbers, lists and mappings"),
    ],
    ids=[
        "bomb",
        "itself",
        "deep",
        "deeper",
        "surrogate",
        "surrogate key",
        "letters",
        "long",
        "key",
        "list key",
        "date",
        "set",
        "bytes",
    ],
)
def test_yaml_that_no_tool_could_read_is_refused_in_a_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "x.yml"
    file.write_text(text)
    with pytest.raises(LoopError) as refused:
        read_yaml(file)
    assert str(refused.value).startswith(f"{file}: ")
    assert said in str(refused.value)
    assert len(str(refused.value)) < 600
    assert "\n" not in str(refused.value)


def test_what_a_person_writes_in_yaml_is_read(tmp_path: Path) -> None:
    file = tmp_path / "x.yml"
    file.write_text("a: &a {t: 0.1}\nb: *a\nc: {0: 20GiB, cpu: 10GiB}\nd: 2024-01-02\ne: é😀\nf: .inf\n")
    assert list(read_yaml(file)) == list("abcdef")


@pytest.mark.parametrize("value", ['"\\ud800"', "&x [*x]", "2024-13-45", "[" * 5000])
def test_a_setting_of_the_command_line_that_no_tool_could_read(value: str) -> None:
    with pytest.raises(LoopError, match=r"^--set ") as refused:
        assignment(f"distill.x={value}")
    assert len(str(refused.value)) < 500


def test_a_recipe_whose_name_no_file_can_have(tmp_path: Path) -> None:
    recipes = {name: f"{name}.yml" for name in NAMES}
    for name in ("a\0b", "x" * 5000):
        with pytest.raises(LoopError, match="cannot be read") as refused:
            read_recipes(load(written(tmp_path, recipes={**recipes, "generate": name}), {}))
        assert len(str(refused.value)) < 800


def test_a_recipe_that_would_never_end_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/zero"), tmp_path / "pipe", tmp_path):
        with pytest.raises(
            LoopError, match=rf"^{path}: cannot be read: it is no file; check the path in --config or in loop.yml$"
        ):
            read_yaml(path)


def test_a_long_value_that_is_wrong_is_shown_in_part(tmp_path: Path) -> None:
    with pytest.raises(LoopError, match=r"tasks\.0: input should be a valid string \(got \['mini_qa', ") as refused:
        load(written(tmp_path, tasks=[["mini_qa"] * 1000]), {})
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody_has_this_name/x", "a\0b"])
def test_a_checkpoint_s_name_that_no_folder_can_have(tmp_path: Path, name: str) -> None:
    config = load(written(tmp_path, instruct=name), {})
    assert config.instruct == name
    with pytest.raises(LoopError, match=r"^--instruct .*no such folder") as refused:
        local_checkpoint(config.instruct, "instruct")
    assert len(str(refused.value)) < 600


def test_a_name_that_no_folder_can_have_and_a_key_of_many_lines(tmp_path: Path) -> None:
    with pytest.raises(LoopError, match="name: string should have at most 100 characters") as refused:
        load(written(tmp_path, name="x" * 5000), {})
    assert len(str(refused.value)) < 600
    with pytest.raises(LoopError, match="extra inputs are not permitted") as refused:
        load(written(tmp_path, **{"a\u2028b\nc" * 500: 1}), {})
    assert len(str(refused.value).splitlines()) == 1
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize("asked", [{"iterations": 2**63}, {"seeds": list(range(101))}])
def test_more_than_anybody_could_wait_for_is_refused(tmp_path: Path, asked: dict[str, Any]) -> None:
    with pytest.raises(LoopError, match=r"should (be less than or equal to 1000|have at most 100 items)"):
        load(written(tmp_path, **asked), {})
