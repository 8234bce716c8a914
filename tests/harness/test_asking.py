"""The config that a checkpoint is asked with, and the files that lm-eval leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from logged import DATE, lm_eval_output, sample

from harness.asking import (
    Settings,
    asked_tasks,
    commands_for,
    device_of,
    generation,
    is_wide,
    prompt_of,
    recipe_for,
    samples,
    texts,
)
from harness.errors import LoopError, StageError
from harness.stages import External, Kind, Output, Stage

RECIPE: dict[str, Any] = {"model": "hf", "model_args": {"pretrained": "a/b", "dtype": "float32"}, "tasks": ["theirs"]}

CAME = External("/came", "what came")


def test_a_recipe_is_kept_but_for_what_the_loop_decides() -> None:
    resolved, inputs = recipe_for({**RECIPE, "batch_size": 8, "limit": 5}, Settings(seed=7), ["mine"], CAME)
    assert resolved == {
        "model": "hf",
        "model_args": {"pretrained": "<<checkpoint>>", "dtype": "float32"},
        "tasks": ["mine"],
        "batch_size": 8,
        "limit": 5,
        "output_path": "<<stage>>/answers/results.json",
        "log_samples": True,
        "seed": [7, 7, 7, 7],
    }
    assert inputs == {"checkpoint": CAME}
    assert RECIPE["model_args"]["pretrained"] == "a/b"


def test_a_smoke_run_s_limit_and_the_user_s_tasks(tmp_path: Path) -> None:
    resolved, inputs = recipe_for({**RECIPE, "limit": 5}, Settings(7, limit=2, include_path=tmp_path), ["mine"], CAME)
    assert resolved["limit"] == 2
    assert resolved["include_path"] == "<<include_path>>"
    # Where they lie is not what they are: the definitions of the tasks are in the key.
    assert [(source.path, source.identity) for source in list(inputs.values())[1:]] == [(str(tmp_path), "tasks")]  # type: ignore[union-attr]


@pytest.mark.parametrize("arguments", [None, {}])
def test_a_recipe_need_not_have_model_args(arguments: Any) -> None:
    resolved, _ = recipe_for({"model_args": arguments}, Settings(7), ["mine"], CAME)
    assert resolved["model_args"] == {"pretrained": "<<checkpoint>>"}


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"use_cache": "answers.db"}, "use_cache: lm-eval would give one checkpoint's answers for another's"),
        ({"cache_requests": "true"}, "cache_requests: lm-eval would ask as it did"),
        ({"samples": {"mine": [1]}}, "samples: --limit asks fewer"),
        ({"model_args": {"think_end_token": "</think>"}}, "model_args: think_end_token: nobody could tell"),
        ({"model_args": "pretrained=a/b,dtype=float32"}, "model_args: must be a mapping"),
    ],
)
def test_settings_with_which_a_loop_cannot_go_on_are_a_line(setting: dict[str, Any], said: str) -> None:
    with pytest.raises(LoopError) as error:
        recipe_for({**RECIPE, **setting}, Settings(7), ["mine"], CAME)
    assert str(error.value).startswith(f"lm-eval recipe: {said}")
    assert len(str(error.value).splitlines()) == 1


def test_settings_that_are_off_are_left_alone() -> None:
    recipe_for(
        {**RECIPE, "use_cache": None, "samples": {}, "model_args": {"think_end_token": None}}, Settings(7), [], CAME
    )


def test_the_commands_are_what_a_person_would_type() -> None:
    resolved, _ = recipe_for(RECIPE, Settings(7), ["mine"], CAME)
    ask = ("python", "-m", "thinkswitch_plugin.kept_answers", "<<stage>>/recipe.yml", "--keep")
    assert commands_for(resolved, Settings(7)) == [ask]
    assert resolved["model_args"]["pretrained"] == "<<checkpoint>>"
    assert commands_for(resolved, Settings(7, nf4=True)) == [("axolotl", "nf4", "<<checkpoint>>", "<<stage>>/nf4"), ask]
    assert resolved["model_args"]["pretrained"] == "<<stage>>/nf4"


def test_a_recipe_for_a_cpu_wants_no_accelerator() -> None:
    assert device_of({"device": "cpu"}) == "cpu"
    assert device_of({"device": "cuda:1"}) == device_of({}) == "gpu"


# --- what lm-eval left ---


def test_the_last_results_say_what_was_asked(tmp_path: Path) -> None:
    lm_eval_output(tmp_path, mine=[sample("4")], other=[sample("4"), sample("5")])
    assert asked_tasks(tmp_path) == {"mine": 1, "other": 2}
    later = {"configs": {"mine": {}}}  # of a version that counts nothing
    (tmp_path / "results_2026-02-01T00-00-00.json").write_text(json.dumps(later))
    assert asked_tasks(tmp_path) == {"mine": -1}


@pytest.mark.parametrize("text", ['{"configs": {"mi', "[]", "null", '{"n-samples": {}}', '{"configs": 3}'])
def test_results_that_are_not_whole(tmp_path: Path, text: str) -> None:
    (tmp_path / f"results_{DATE}.json").write_text(text)
    with pytest.raises(StageError, match=r"results_.*\.json: not whole; remove that folder and run the same command"):
        asked_tasks(tmp_path)


def test_a_task_named_as_another_s_beginning_or_like_a_pattern(tmp_path: Path) -> None:
    rows = {"mini": [sample("a"), sample("b")], "mini_prompts": [sample("c")], "m[i]ni": [sample("d")]}
    lm_eval_output(tmp_path, **rows)
    found = {
        task: [text for row in samples(tmp_path, task, len(rows[task])) for text in texts(row, task)] for task in rows
    }
    assert found == {"mini": ["a", "b"], "mini_prompts": ["c"], "m[i]ni": ["d"]}


def test_the_first_filter_s_samples_in_the_order_of_the_questions(tmp_path: Path) -> None:
    strict = [sample(str(i), filter="strict") for i in range(3)]
    lm_eval_output(tmp_path, counts={"mine": 3}, mine=strict + [sample(str(i), filter="loose") for i in range(3)])
    found = list(samples(tmp_path, "mine", 3))
    assert [(row["filter"], *texts(row, "mine")) for row in found] == [("strict", str(i)) for i in range(3)]


@pytest.mark.parametrize("line", ['{"doc_id": 1, "re', "null", "[]"])
def test_a_line_that_is_not_whole(tmp_path: Path, line: str) -> None:
    lm_eval_output(tmp_path, mine=[sample("4")])
    (file,) = tmp_path.glob("samples_*")
    with file.open("a") as more:
        more.write(line)
    with pytest.raises(StageError, match=r"samples_mine_.*:2: not whole; remove that folder") as error:
        list(samples(tmp_path, "mine"))
    assert len(str(error.value).splitlines()) == 1


def test_more_samples_than_were_asked_are_as_wrong_as_fewer(tmp_path: Path) -> None:
    lm_eval_output(tmp_path, counts={"mine": 1}, mine=[sample("4"), sample("5")])
    with pytest.raises(StageError, match="has 2 of the 1 questions that were asked"):
        list(samples(tmp_path, "mine", 1))
    assert len(list(samples(tmp_path, "mine"))) == 2  # nobody says how many


def test_what_was_asked_and_what_was_written() -> None:
    row = sample("4", "5", prompt="2+2=")
    assert (prompt_of(row), texts(row, "mine")) == ("2+2=", ["4", "5"])
    for nothing in (sample(None), sample(), {**row, "resps": []}, sample("4", None)):
        with pytest.raises(StageError, match=r"mine: question 0: the model gave no answer \(null\)"):
            texts(nothing, "mine")


def test_a_server_answers_only_for_the_pair_as_it_came() -> None:
    served = {"model": "local-chat-completions", "model_args": {"base_url": "http://127.0.0.1:8000/v1", "model": "x"}}
    recipe_for(served, Settings(7), ["mine"], CAME)
    made = Output(Stage(Kind("toy", "toys", ()), {}, (), {}), "instruct")
    with pytest.raises(LoopError, match="a server answers with the checkpoint it was started with"):
        recipe_for(served, Settings(7), ["mine"], made)


def test_an_engine_with_a_seed_of_its_own_gets_the_run_s_and_all_devices_it_spreads_over() -> None:
    resolved, _ = recipe_for({"model": "vllm", "model_args": {"tensor_parallel_size": 2}}, Settings(7), ["mine"], CAME)
    assert resolved["model_args"] == {"seed": 7, "tensor_parallel_size": 2, "pretrained": "<<checkpoint>>"}
    assert is_wide(resolved)
    assert not is_wide(recipe_for(RECIPE, Settings(7), ["mine"], CAME)[0])


@pytest.mark.parametrize("key", ["model_args", "metadata", "gen_kwargs"])
@pytest.mark.parametrize("value", [[1], 3.5, True])
def test_what_must_be_a_mapping_and_is_none(key: str, value: object) -> None:
    with pytest.raises(LoopError, match=rf"^lm-eval recipe: {key}: must be a mapping"):
        recipe_for({**RECIPE, key: value}, Settings(7), ["mine"], CAME)


def test_gen_kwargs_that_are_a_text_are_read_as_lm_eval_does() -> None:
    assert generation({"gen_kwargs": "do_sample=true,temperature=0.6"}) == {"do_sample": True, "temperature": 0.6}
    with pytest.raises(LoopError, match=r"^lm-eval recipe: gen_kwargs: must be a mapping"):
        generation({"gen_kwargs": "until={"})


def test_a_share_that_is_no_number_is_left_to_the_engine() -> None:
    assert is_wide({"model_args": {"tensor_parallel_size": "auto"}})
    assert not is_wide({"model_args": {"tensor_parallel_size": "1", "data_parallel_size": None}})
