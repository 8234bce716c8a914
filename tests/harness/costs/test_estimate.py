"""What stages take, by arithmetic: ceilings of rows, what mends a recipe, what an answer's cache takes."""

import json
from pathlib import Path
from typing import Any

import pytest
from qwen3 import QWEN3_4B

from harness.card import of_size
from harness.config import read_yaml
from harness.costs.estimate import (
    PROMPT,
    Speed,
    answer_tokens,
    asking_memory,
    asking_mend,
    asking_seconds,
    ceilings,
    mended,
    mends,
    served,
    training_memory,
    training_seconds,
)
from harness.costs.footprint import DEPTHS, Footprint, extrapolated
from harness.costs.shape import of_config
from harness.errors import LoopError

CARD = of_size(8)


def test_rows_are_as_long_as_the_recipe_lets_them_be(recipes: Path):
    distil = ceilings(read_yaml(recipes / "instruct_distill.yml"))
    assert (distil.prompt + distil.answer, distil.measured) == (256, False)
    on_policy = ceilings({"sequence_len": 3072, "on_policy_kl": {"max_new_tokens": 1024, "context": "trace"}})
    assert (on_policy.prompt, on_policy.answer, on_policy.context) == (2048, 1024, 2048 + 2048)


def test_an_answer_that_leaves_no_room_for_a_prompt_is_refused_in_a_line():
    for new in (1024, 4096):
        with pytest.raises(LoopError, match=f"max_new_tokens: {new} leaves no room .* sequence_len: 1024"):
            ceilings({"sequence_len": 1024, "on_policy_kl": {"max_new_tokens": new}})


def test_figures_go_on_along_a_straight_line_over_layers():
    low, high = (Footprint(10 + n, 2 * n, 3 * n, 0, 100 + 7 * n) for n in DEPTHS)
    assert extrapolated(low, high, 36) == Footprint(10 + 36, 72, 108, 0, 100 + 7 * 36)


def test_an_answer_of_the_4b_takes_its_weights_and_its_cache():
    parts = asking_memory({"batch_size": 1}, of_config(QWEN3_4B), 16_384, True, CARD, 0.0)
    assert parts["weights"] == pytest.approx(2.65e9, rel=0.01)
    assert parts["cache"] == pytest.approx(16_384 * 147_456 * (1 + 2 / 36))
    assert sum(parts.values()) < CARD.memory


def test_what_does_not_fit_is_mended_by_what_then_fits():
    shape, recipe = of_config(QWEN3_4B), {"batch_size": 4, "model_args": {"dtype": "bfloat16"}}
    assert sum(asking_memory(recipe, shape, 16_384, False, CARD, 0.0).values()) > CARD.memory
    assert asking_mend(recipe, shape, 16_384, False, CARD, 0.0) == "nf4=true batch_size=1"
    assert asking_mend(recipe, shape, 16_384, False, of_size(1), 0.0) == ""


def test_a_server_needs_room_for_one_whole_sequence_and_the_rest_of_its_share_is_for_more(recipes: Path):
    shape, width = of_config(QWEN3_4B), 32_768 + PROMPT
    recipe = read_yaml(recipes / "qwen3_4b" / "vllm" / "generate_labels.yml")
    fits = served(recipe, shape, width, False, of_size(24))
    assert sum(fits.parts.values()) <= fits.room == pytest.approx(0.9 * of_size(24).memory + 0.5e9)
    assert fits.rows == int(fits.parts["cache"] // (width * shape.kv_bytes())) == 2
    assert fits.parts["cache"] / shape.kv_bytes() == pytest.approx(90_000, rel=0.05)  # what the recipe says
    for card, nf4 in ((8, False), (8, True), (12, False)):  # one sequence of 34,816 tokens takes 5.1 GB
        small = served(recipe, shape, width, nf4, of_size(card))
        assert sum(small.parts.values()) > small.room
    few = {**recipe, "model_args": {**recipe["model_args"], "max_num_seqs": 1}}
    assert served(few, shape, width, False, of_size(80)).rows == 1


def test_vllms_own_recipes_for_a_card_fit_it(recipes: Path):
    for folder, nf4, size in (("vllm", False, 24), ("vllm_8gb", True, 8)):
        for name in ("generate_labels", "evaluate_thinking", "evaluate_instruct"):
            recipe = read_yaml(recipes / "qwen3_4b" / folder / f"{name}.yml")
            found = served(recipe, of_config(QWEN3_4B), answer_tokens(recipe, None) + PROMPT, nf4, of_size(size))
            assert sum(found.parts.values()) <= found.room


def test_what_a_server_has_no_room_for_is_mended_by_what_then_fits(recipes: Path):
    shape, width = of_config(QWEN3_4B), 32_768 + PROMPT
    recipe = read_yaml(recipes / "qwen3_4b" / "vllm" / "generate_labels.yml")
    mend = asking_mend(recipe, shape, width, False, CARD, 0.0)
    assert mend.split() == [
        "nf4=true",
        f"model_args.max_model_len={width // 2}",
        f"gen_kwargs.max_gen_toks={width // 2 - PROMPT}",
    ]
    changed = {**recipe["model_args"], "max_model_len": width // 2}
    then = served({**recipe, "model_args": changed}, shape, width // 2, True, CARD)
    assert sum(then.parts.values()) <= then.room
    unsaid = {"model": "vllm", "model_args": {"dtype": "bfloat16"}}  # all 262,144 positions, then
    assert asking_mend(unsaid, shape, 16_384, False, of_size(24), 0.0) == "model_args.max_model_len=16384"
    assert asking_mend(recipe, shape, width, False, of_size(2), 0.0) == ""
    whole = {**recipe, "model_args": {**recipe["model_args"], "gpu_memory_utilization": 0.97}}  # CUDA graphs lie beside
    assert asking_mend(whole, shape, 8192, True, CARD, 0.0).split()[0] == "model_args.enforce_eager=true"


def test_a_training_is_mended_mildest_first_and_by_nothing_that_it_says_already(recipes: Path):
    found = list(mends(read_yaml(recipes / "qwen3_4b" / "on_policy_kl.yml")))
    first, changed = found[0]
    assert first.startswith("sequence_len=")
    assert changed["sequence_len"] < read_yaml(recipes / "qwen3_4b" / "on_policy_kl.yml")["sequence_len"]
    plain = [typed for typed, _ in mends({"adapter": "lora", "micro_batch_size": 4, "sequence_len": 800})]
    assert plain[:3] == [
        "micro_batch_size=1",
        "micro_batch_size=1 gradient_checkpointing=true",
        "micro_batch_size=1 gradient_checkpointing=true load_in_4bit=true",
    ]
    assert plain[-1].endswith("sequence_len=100")


@pytest.mark.parametrize(("peak", "holds"), [(30, "the file they are read from"), (300, "kept by the heap")])
def test_on_a_cpu_the_peak_is_the_larger_of_loading_and_training(tmp_path: Path, peak: int, holds: str):
    (tmp_path / "model.safetensors").write_bytes(b"0" * 40)
    found = Footprint(weights=20, states=4, trained=1, ragged=8, step=peak)
    parts = training_memory({"base_model": str(tmp_path)}, found, CARD._replace(gpu=False), floor=1000)
    expected = {"the file they are read from": 20 + 40, "kept by the heap": 4 + peak + 0.75 * 8}[holds]
    assert sum(parts.values()) == pytest.approx(1000 + expected)
    assert holds in parts


def test_time_and_tokens_are_those_of_rows_and_answers_as_long_as_they_may_be():
    speed = Speed(step=1.0, token=0.01, decode=0.5)
    row = ceilings({"sequence_len": 100})
    seconds, tokens = training_seconds({"micro_batch_size": 2, "num_epochs": 3}, row, 10, speed)
    assert (seconds, tokens) == (pytest.approx(15 * (1 + 2 * 100 * 0.01)), 15 * 200)
    capped, _ = training_seconds({"micro_batch_size": 2, "max_steps": 1}, row, 10, speed)
    assert capped == pytest.approx(1 + 2 * 100 * 0.01)
    reading = 13 * PROMPT * 0.01 / 3
    assert asking_seconds([(10, 100), (3, 50)], 4, speed) == (pytest.approx(reading + (3 * 100 + 50) * 0.5), 1150)


def test_an_answers_length_is_the_recipes_else_the_tasks_else_lm_evals():
    said: dict[str, Any] = {"gen_kwargs": {"max_gen_toks": 7}}
    assert [answer_tokens(said, 5), answer_tokens({}, 5), answer_tokens({}, None)] == [7, 5, 256]


def test_a_folder_with_a_config_alone_is_enough(tmp_path: Path):
    from harness.costs.estimate import file_bytes

    (tmp_path / "config.json").write_text(json.dumps(QWEN3_4B))
    assert file_bytes(tmp_path) == of_config(QWEN3_4B).weights_bytes(nf4=False)


@pytest.mark.slow
def test_all_that_might_mend_a_training_is_traced_at_once(tmp_path: Path, recipes: Path):
    cache = tmp_path / "plan.json"
    recipe = read_yaml(recipes / "instruct_distill.yml") | {"base_model": str(recipes / "mini" / "instruct")}
    recipe |= {"micro_batch_size": 1, "gradient_checkpointing": True, "load_in_4bit": True}  # shorter rows are left
    tries = [typed for typed, _ in mends(recipe)]
    assert mended(recipe, ceilings(recipe), CARD, 0.0, cache) == tries[0]
    assert len(json.loads(cache.read_text())) == len(tries)
