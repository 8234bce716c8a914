"""The recipe's block, and what does not go with it: one line each, before anything is loaded."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from thinkswitch_plugin.on_policy_kl.args import OnPolicyKLConfig, read_block
from thinkswitch_plugin.on_policy_kl.checks import check_devices, check_recipe, check_teacher, is_own_base
from thinkswitch_plugin.on_policy_kl.plugin import OnPolicyKLPlugin

PLUGIN = "thinkswitch_plugin.on_policy_kl.OnPolicyKLPlugin"
ENTRY = {"path": "prompts.jsonl", "type": "thinkswitch_plugin.on_policy_kl"}


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (None, "on_policy_kl.teacher: Field required"),
        ({"teacher": "self", "techer": 1}, "on_policy_kl.techer: Extra inputs are not permitted"),
        (
            {"teacher": "self", "temperature": -0.5},
            "on_policy_kl.temperature: Input should be greater than or equal to 0",
        ),
        ({"teacher": "self", "temperature": 0, "top_p": 0.9}, "temperature 0 is greedy decoding"),
        ({"teacher": "self", "temperature": 0, "rollouts_per_prompt": 2}, "temperature 0 is greedy decoding"),
        ({"teacher": "self", "divergence": "jsd", "beta": 1.0}, "on_policy_kl.beta: Input should be less than 1"),
        ({"teacher": "self", "divergence": "kl"}, "'reverse_kl', 'forward_kl' or 'jsd'"),
        ({"teacher": "self", "estimator": "sampled", "temperature": 0}, "set temperature 1, top_p 1 and top_k 0"),
        ({"teacher": "self", "estimator": "sampled", "top_k": 20}, "set temperature 1, top_p 1 and top_k 0"),
        ({"teacher": "self", "estimator": "sampled", "divergence": "jsd"}, "estimates reverse_kl only"),
        ({"teacher": "self", "teacher_load_in_4bit": True}, "teacher self has no weights of its own"),
        ({"teacher": "self", "importance_cap": 0.5}, "on_policy_kl.importance_cap: Input should be greater than or"),
        (
            {"teacher": "self", "update_batch_size": 0},
            "on_policy_kl.update_batch_size: Input should be greater than or",
        ),
        ({"teacher": "self", "rollouts_per_prompt": 8, "rollout_batch_size": 4}, "rollout_batch_size is less than"),
        ({"teacher": "self", "server": "http://localhost:8000"}, "server needs server_model"),
        ({"teacher": "self", "server": "localhost:8000", "server_model": "m"}, "on_policy_kl.server"),
        ({"teacher": "self", "server": "https://me:word@host", "server_model": "m"}, "key by ON_POLICY_KL_API_KEY"),
        ({"teacher": "self", "server": "http://10.0.0.7:8000", "server_model": "m"}, "use https, or say"),
        ({"teacher": "self", "tags": "</think>"}, "on_policy_kl.tags: Input should be a valid list"),
        ({"teacher": "self", "tags": []}, "on_policy_kl.tags"),
        ({"teacher": "self", "tags": 1}, "on_policy_kl.tags: Input should be a valid list"),
    ],
)
def test_a_wrong_block_is_one_line_that_names_the_key(block: dict[str, Any] | None, said: str) -> None:
    with pytest.raises(ValueError, match="on_policy_kl") as caught:
        read_block(block)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "keys: teacher, " in str(caught.value)


def test_tags_are_pairs_of_which_one_may_stand_by_itself() -> None:
    pairs = [("<a>", "</a>"), ("<b>", "</b>")]
    assert OnPolicyKLConfig(teacher="self", tags=pairs).tags == pairs
    assert OnPolicyKLConfig(teacher="self", tags=["<a>", "</a>"]).tags == pairs[:1]
    with pytest.raises(ValueError, match=r"on_policy_kl\.tags: .* is not a pair of different tags"):
        read_block({"teacher": "self", "tags": ["<a>", "<A>"]})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sample_packing": True}, "sample_packing is set"),
        ({"rl": "grpo"}, "rl is set"),
        ({"fsdp_config": {"fsdp_version": 2}}, "fsdp_config is set"),
        ({"deepspeed": "zero2.json"}, "deepspeed is set"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size is set"),
        ({"torch_compile": "auto"}, "torch_compile is set"),
        ({"val_set_size": 0.1}, "val_set_size is set"),
        ({"test_datasets": [ENTRY]}, "test_datasets is set"),
        ({"datasets": [ENTRY, {"path": "x", "type": "alpaca"}]}, "every dataset needs `type:"),
        ({"datasets": []}, "every dataset needs `type:"),
    ],
)
def test_settings_that_rollouts_rule_out(changes: dict[str, Any], said: str) -> None:
    recipe = {"plugins": [PLUGIN], "on_policy_kl": {"teacher": "self"}, "datasets": [dict(ENTRY)], **changes}
    with pytest.raises(ValueError, match=r"^on_policy_kl: ") as caught:
        OnPolicyKLPlugin().register(recipe)
    assert said in str(caught.value)


def test_one_device_of_a_kind_is_no_parallelism() -> None:
    recipe = {"plugins": [PLUGIN], "on_policy_kl": {"teacher": "self"}, "datasets": [dict(ENTRY)]}
    OnPolicyKLPlugin().register({**recipe, "tensor_parallel_size": 1, "context_parallel_size": 1})


@pytest.mark.parametrize(
    ("block", "settings", "seconds"),
    [
        ({}, {}, 1800 + 512 / 10),
        ({"context": "trace"}, {"micro_batch_size": 64}, 1800 + (512 + 2048) / 10),  # all of a step at once
        # The 4B recipe's: each of four prompts' traces and answers after the other.
        (
            {"context": "trace", "trace_max_new_tokens": 16384, "rollouts_per_prompt": 4, "max_new_tokens": 1024}
            | {"rollout_batch_size": 4},
            {"gradient_accumulation_steps": 4},
            1800 + 4 * (1024 + 16384) / 10,
        ),
        # Five prompts, by twos; their traces by threes.
        (
            {"context": "trace", "rollout_batch_size": 2, "max_new_tokens": 30, "trace_max_new_tokens": 20},
            {"batch_size": 5},
            1800 + (3 * 30 + 2 * 20) / 10,
        ),
        ({}, {"ddp_timeout": 60}, 60),
    ],
)
def test_a_process_waits_for_the_longest_that_another_may_decode(
    block: dict[str, Any], settings: dict[str, Any], seconds: float
) -> None:
    block = {"teacher": "self", **block}
    recipe = {"plugins": [PLUGIN], "on_policy_kl": block, "datasets": [dict(ENTRY)], **settings}
    OnPolicyKLPlugin().register(recipe)
    assert recipe["ddp_timeout"] == math.ceil(seconds)


def test_a_student_is_not_spread_over_cards() -> None:
    for device_map, cards in (("auto", 1), ({"": 1}, 2), (None, 2), ("cuda:0", 2), ({"a": 0, "b": "cuda:0"}, 2)):
        check_devices(device_map, cards)
    with pytest.raises(
        ValueError, match=r"^on_policy_kl: device_map auto spreads the student over 2 cards, .*torchrun"
    ):
        check_devices("auto", 2)
    for spread in ({"model": 0, "lm_head": 1}, {"model": "cuda:0", "lm_head": "cpu"}):
        with pytest.raises(
            ValueError, match=r"^on_policy_kl: device_map \{.*\} spreads the student over several devices"
        ):
            check_devices(spread, 1)


@pytest.mark.parametrize(
    ("changes", "own"),
    [
        ({}, True),
        ({"base_model": "{base}/../instruct"}, True),
        ({"base_model": "owner/base"}, False),
        ({"adapter": None}, False),  # the base itself is trained
        ({"adapter": "qlora", "load_in_4bit": True}, False),  # its weights are NF4's, the teacher's are not
        ({"adapter": "qlora", "load_in_4bit": True, "four_bits": True}, True),
        ({"four_bits": True}, False),
        ({"load_in_8bit": True}, False),
        ({"revision_of_model": "main~3"}, False),
        ({"relora": True}, False),
    ],
    ids=str,
)
def test_a_teacher_that_is_the_student_s_base(recipes: Path, changes: dict[str, Any], own: bool) -> None:
    base = str(recipes / "mini/instruct")
    config = OnPolicyKLConfig(teacher=base, teacher_load_in_4bit=changes.get("four_bits", False))
    cfg = {"base_model": base, "adapter": "lora", **changes}
    cfg["base_model"] = cfg["base_model"].replace("{base}", base)
    assert is_own_base(config, cfg) == own
    hub = OnPolicyKLConfig(teacher="owner/base")
    assert is_own_base(hub, {"base_model": "owner/base", "adapter": "lora"})


def test_a_recipe_without_the_plugin_is_left_alone() -> None:
    recipe = {"plugins": ["other.Plugin"], "datasets": [{"path": "x", "type": "alpaca"}]}
    OnPolicyKLPlugin().register(recipe)
    assert recipe["datasets"] == [{"path": "x", "type": "alpaca"}]


def test_another_content_is_another_prepared_set(tmp_path: Path) -> None:
    marks = []
    for text in ("one", "two"):
        (tmp_path / "prompts.jsonl").write_text(text)
        entry = {**ENTRY, "path": str(tmp_path / "prompts.jsonl")}
        OnPolicyKLPlugin().register({"plugins": [PLUGIN], "on_policy_kl": {"teacher": "self"}, "datasets": [entry]})
        marks.append(entry["input_transform"])
    assert marks[0] != marks[1]
    check_recipe({"datasets": [entry]}, 1, ENTRY["type"])


@pytest.fixture
def other(recipes: Path, tmp_path: Path) -> Path:
    """The thinking checkpoint's small files, to be spoilt."""
    for file in (recipes / "mini/thinking").iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path)
    return tmp_path


def test_a_teacher_that_fits(recipes: Path, other: Path) -> None:
    student = str(recipes / "mini/instruct")
    check_teacher(
        OnPolicyKLConfig(teacher=str(other), context="trace"), student
    )  # no weights are there to be looked at
    check_teacher(OnPolicyKLConfig(teacher="self"), student)


def test_padded_logits_of_another_width(recipes: Path, other: Path) -> None:
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": 384}))
    with pytest.raises(ValueError, match=r"vocabulary of 328 tokens and the teacher .* of 384: use a teacher of"):
        check_teacher(OnPolicyKLConfig(teacher=str(other)), str(recipes / "mini/instruct"))


def test_another_vocabulary(recipes: Path, other: Path) -> None:
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace("</think>", "</thought>"))
    with pytest.raises(ValueError, match=r"the tokenizers of .* differ, in '</th"):
        check_teacher(OnPolicyKLConfig(teacher=str(other)), str(recipes / "mini/instruct"))


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "nobody", "nobody/such-a-model"])
def test_a_teacher_that_is_missing(recipes: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"on_policy_kl: teacher {name}: ") as caught:
        check_teacher(OnPolicyKLConfig(teacher=name), str(recipes / "mini/instruct"))
    assert "\n" not in str(caught.value)
