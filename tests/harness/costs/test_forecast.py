"""A run's stages as estimates: what is judged against what, and how often each stage is done."""

import json
from pathlib import Path

import pytest
import torch
from made_runs import inputs_for, task
from qwen3 import QWEN3_4B

from harness.card import of_size
from harness.config import LoopConfig, read_yaml
from harness.costs.forecast import (
    Device,
    Pair,
    Questions,
    alike,
    asking,
    compared,
    mean_answers,
    merging,
    recipe_name,
    trained_in,
    training,
)
from harness.costs.traces import dtype_of
from harness.errors import LoopError
from harness.plan import plan, untried
from harness.stages import External


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """Two folders with the 4B's config and nothing else."""
    for name in Pair._fields:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(QWEN3_4B))
    return Pair(tmp_path / "instruct", tmp_path / "thinking")


def on(size: float, tmp_path: Path, main: float | None = None) -> Device:
    """A card at 25 and 900 tokens a second; it is here where its machine's main memory is known."""
    return Device(of_size(size), 0.0, (25, 900), main is not None, tmp_path / "plan.json", main)


def test_a_server_that_reserves_too_little_does_not_fit_and_its_time_is_of_what_it_holds_at_once(
    pair: Pair, tmp_path: Path, recipes: Path
):
    recipe = read_yaml(recipes / "qwen3_4b" / "vllm" / "generate_labels.yml")
    asked = [Questions(30, None, True)]
    small, large = (asking("generate", recipe, (1,), pair, False, asked, None, on(size, tmp_path)) for size in (8, 24))
    assert not small.fits
    assert small.memory > small.room
    assert "generate.model_args.max_model_len=" in small.mend
    assert large.fits
    assert large.seconds == pytest.approx(15 * 32_768 / 25 + 30 * 512 / 900 / 3)  # two at once


def test_a_rebuilding_is_judged_by_main_memory_and_by_none_where_nobody_knows_it(pair: Pair, tmp_path: Path):
    elsewhere, here, small = (
        merging("reconstruct", {"dtype": "bfloat16"}, (1,), pair, on(4, tmp_path, main)) for main in (None, 16e9, 5e9)
    )
    assert [line.fits for line in (elsewhere, here, small)] == [None, True, False]
    assert {(line.memory, line.main) for line in (elsewhere, here, small)} == {(0.0, 6e9)}
    cpu = on(4, tmp_path)
    cpu = Device(cpu.card._replace(gpu=False, memory=int(5e9)), 0.0, cpu.given, True, cpu.cache)
    assert merging("reconstruct", {"dtype": "bfloat16"}, (1,), pair, cpu).fits is False


@pytest.mark.slow
def test_an_adapters_merge_is_counted_in_main_memory_beside_a_gpu(pair: Pair, tmp_path: Path, recipes: Path):
    recipe = {**read_yaml(recipes / "qwen3_4b" / "instruct_distill.yml"), "base_model": str(pair.instruct)}
    elsewhere, small = (
        training("distill", recipe, (1,), on(24, tmp_path, main), 30, merges=True) for main in (None, 8e9)
    )
    assert elsewhere.fits is True
    assert small.fits is False
    assert small.main == pytest.approx(2 * 5e9 + 4 * 151936 * 2560)
    assert small.memory < small.room


@pytest.mark.parametrize("said", [{}, {"bf16": True}, {"bf16": "auto"}, {"fp16": True}, {"bf16": False, "fp16": True}])
def test_a_training_is_timed_in_what_it_computes_in(said: dict):
    assert getattr(torch, trained_in(said)) == dtype_of(said)


def test_answers_that_nobody_counted_have_no_mean(tmp_path: Path):
    rows = [("instruct", 10.0), ("instruct", None), ("instruct", 30.0), ("thinking", None)]
    said = [{"checkpoint": who, "tokens_per_answer": tokens} for who, tokens in rows]
    (tmp_path / "results.json").write_text(json.dumps({"rows": said}))
    assert mean_answers(tmp_path / "results.json") == {"instruct": 20.0}
    assert mean_answers(tmp_path / "none.json") == {}


def grouped(shipped: LoopConfig, *arms: str, seeds: tuple[int, ...] = ()) -> dict[tuple[str, str], list[int]]:
    """The iterations of each group of steps, by its step and the arms that it is of."""
    config = shipped.model_copy(update={"arms": list(arms), "seeds": list(seeds)})
    groups = alike(plan(config, inputs_for(config, gold=External("/came/gold.jsonl", "right")), 2))
    named = {(untried(like[0].name), " ".join(dict.fromkeys(step.arm for step in like))): like for like in groups}
    assert len(named) == len(groups)
    return {name: [step.iteration for step in like] for name, like in named.items()}


def test_arms_that_share_a_stage_pay_for_it_once_and_what_they_do_otherwise_has_a_line(shipped: LoopConfig):
    assert grouped(shipped) == {
        ("evaluate_instruct", "thinkswitch"): [0, 1, 2],
        ("evaluate_thinking", "thinkswitch"): [0, 1, 2],
        ("generate", "thinkswitch"): [1, 2],
        ("distill", "thinkswitch"): [1, 2],
        ("reconstruct", "thinkswitch"): [1, 2],
    }
    found = grouped(shipped, "thinkswitch", "merge_only", "untouched", "gold", "on_policy")
    # Instruct as it came is tested once, of merge_only, too; its thinking one is another.
    assert found["evaluate_instruct", "thinkswitch untouched gold on_policy"] == [0, 1, 2, 1, 2, 1, 2, 1, 2]
    assert found["evaluate_thinking", "thinkswitch merge_only untouched gold on_policy"] == [
        0,
        1,
        2,
        1,
        1,
        2,
        1,
        2,
        1,
        2,
    ]
    assert found["generate", "thinkswitch untouched on_policy"] == [1, 2, 2, 2]
    for arm in ("thinkswitch", "untouched", "gold", "on_policy"):
        assert found["distill", arm] == [1, 2]


def test_what_is_tried_at_several_t_is_one_line_and_the_choice_none(shipped: LoopConfig):
    found = grouped(shipped.model_copy(update={"t": "auto"}))
    assert found["reconstruct", "thinkswitch"] == [1] * 9 + [2] * 9
    assert found["answer", "thinkswitch"] == [1] * 10 + [2] * 9  # the anchor's second answers are the first iteration's
    assert {name for name, _ in found} == {
        *("evaluate_instruct", "evaluate_thinking", "generate", "distill", "reconstruct", "answer")
    }


def test_seeds_are_done_once_each_on_one_line(shipped: LoopConfig):
    assert grouped(shipped, seeds=(1, 2, 3))["distill", "thinkswitch"] == [1, 2] * 3


def test_a_mend_names_the_recipe_that_it_changes(shipped: LoopConfig):
    config = shipped.model_copy(update={"arms": ["thinkswitch", "on_policy"]})
    inputs = inputs_for(config)
    two = {**inputs.recipes, "evaluate_thinking": inputs.recipes["evaluate"]}
    steps = plan(config, inputs, 1)
    assert {recipe_name(step, inputs.recipes) for step in steps} == set(inputs.recipes)
    assert {recipe_name(step, two) for step in steps if step.name == "evaluate_thinking"} == {"evaluate_thinking"}
    auto = shipped.model_copy(update={"t": "auto"})
    names = {step.name: recipe_name(step, two) for step in plan(auto, inputs, 1)}
    assert (names["answer_t0.3"], names["reconstruct_t0.3"]) == ("generate", "reconstruct")
    names = {
        step.name: recipe_name(step, two) for step in plan(auto, inputs._replace(validate_tasks=[task("mine")]), 1)
    }
    assert names["validate_t0.3"] == "evaluate_thinking"


@pytest.mark.parametrize("noted", [{}, {"asked": None}, {"asked": {"instruct": "somewhere"}}])
def test_a_run_that_does_not_say_what_was_asked_is_refused_in_a_line(tmp_path: Path, noted: dict):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.json").write_text(json.dumps({"steps": [], **noted}))
    with pytest.raises(LoopError, match=r"--compare mine: .*does not say of which pair") as refused:
        compared(tmp_path, "mine", on(8, tmp_path))
    assert "\n" not in str(refused.value)
