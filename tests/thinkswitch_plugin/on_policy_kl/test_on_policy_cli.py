"""The plugin through `axolotl train`: what it trains, what it logs, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

GREEDY = {"temperature": 0.0}


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def logged(said: Any, key: str) -> list[float]:
    return [float(value) for value in re.findall(rf"'opd/{key}': '?([-\d.e]+)'?", said.stdout + said.stderr)]


def test_it_learns_logs_and_shows(train: Any, tmp_path: Path) -> None:
    said = train(block={"show_every": 2}, micro_batch_size=16, max_steps=4, adapter="qlora", load_in_4bit=True)
    for key in (
        "kl",
        "student_entropy",
        "teacher_entropy",
        "truncated",
        "length",
        "rollout_s",
        "teacher_s",
        "update_s",
    ):
        values = logged(said, key)
        assert len(values) == 4, key
        assert all(value >= 0 for value in values)
    assert all(0 < value < 20 for value in logged(said, "kl"))
    assert "KL(student ‖ teacher) of a token" in said.stdout
    pages = sorted(file.name for file in (tmp_path / "on_policy/rollouts").iterdir())
    assert pages == ["step_000002.html", "step_000004.html"]
    weights = adapter(tmp_path / "on_policy")
    assert all(bool(value.abs().sum() > 0) for name, value in weights.items() if "lora_B" in name)


def test_accumulation_and_two_processes_train_as_one_batch_does(train: Any, recipes: Path, tmp_path: Path) -> None:
    """Greedy rollouts of the same eight prompts a step, split three ways: the same weights after two steps."""
    # Adam would turn rounding errors of vanishing gradients into whole steps.
    same = {"block": GREEDY, "adapter": None, "optimizer": "sgd", "learning_rate": 0.3}
    train("whole", **same, micro_batch_size=8)
    train("parts", **same, micro_batch_size=2, gradient_accumulation_steps=4)
    train("ranks", **same, micro_batch_size=4, processes=2)
    before, whole, *others = (
        load_file(folder / "model.safetensors")
        for folder in (recipes / "mini/instruct", *(tmp_path / name for name in ("whole", "parts", "ranks")))
    )
    for key, value in whole.items():
        moved = (value - before[key]).norm()
        for other in others:
            assert (other[key] - value).norm() < 1e-3 * moved, key


def test_full_finetuning_with_gradient_checkpointing_and_the_sampled_estimator(train: Any, tmp_path: Path) -> None:
    said = train(
        block={"divergence": "reverse_kl", "estimator": "sampled", "context": "prompt", "rollouts_per_prompt": 2},
        adapter=None,
        gradient_checkpointing=True,
        learning_rate=1e-4,
    )
    assert len(logged(said, "kl")) == 2
    assert (tmp_path / "on_policy/model.safetensors").is_file()


def test_self_with_lora_and_checkpointing_in_two_processes_starts_at_no_divergence(train: Any) -> None:
    said = train(
        block={"teacher": "self", "context": "prompt"},
        processes=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        max_steps=1,
    )
    assert len(logged(said, "kl")) == 1
    assert abs(logged(said, "kl")[0]) < 1e-5  # a new adapter changes nothing yet
    assert logged(said, "student_entropy") == logged(said, "teacher_entropy")


def test_prompts_alone_do_and_the_teacher_thinks_for_itself(train: Any, recipes: Path, tmp_path: Path) -> None:
    rows = [{"problem": f"Compute {n}+26-13.", "answer": "gold, not read"} for n in range(20, 36)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = train(
        block={"trace_max_new_tokens": 96},
        datasets=[{"path": str(tmp_path / "mine.jsonl"), "type": "thinkswitch_plugin.on_policy_kl"}],
    )
    assert "16 prompts" in said.stdout + said.stderr
    (counts,) = json.loads((tmp_path / "on_policy/on_policy_kl.json").read_text())["datasets"]
    assert counts == {"path": str(tmp_path / "mine.jsonl"), "prompts": 16, "with_trace": 0, "unclosed": 0}
    assert len(logged(said, "kl")) == 2
    assert all(value > 0 for value in logged(said, "kl"))


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ({"optimizer": "adamw_torch", "learning_rate": 1e18}, "the student's weights are not numbers"),
        ({"optimizer": "sgd", "learning_rate": 1e24}, "the loss is not a number"),
    ],
)
def test_what_is_not_a_number_stops_the_run_and_keeps_the_batch(train: Any, how: dict[str, Any], what: str) -> None:
    said = train(ok=False, block=GREEDY, max_steps=8, **how)
    (line,) = [line for line in said.stderr.splitlines() if line.startswith("ValueError: on_policy_kl")]
    found = re.search(rf"on_policy_kl: {what} at step \d; its batch is in (\S+)$", line)
    assert found, line
    batch = load_file(found.group(1))
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert len(batch["input_ids"]) == 8
