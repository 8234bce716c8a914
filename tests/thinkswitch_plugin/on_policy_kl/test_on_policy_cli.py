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


def logged(said: str, key: str) -> list[float]:
    return [float(value) for value in re.findall(rf"'opd/{key}': '?([-\d.e]+)'?", said)]


def test_it_learns_logs_and_shows(train: Any, recipes: Path, tmp_path: Path) -> None:
    some = (recipes / "mini/labels.jsonl").read_text().splitlines(keepends=True)[:16]
    (tmp_path / "some.jsonl").write_text("".join(some))
    said = train(
        block={"show_every": 8},
        datasets=[{"path": str(tmp_path / "some.jsonl"), "type": "thinkswitch_plugin.on_policy_kl"}],
        micro_batch_size=16,
        max_steps=16,
        num_epochs=16,
        learning_rate=1e-3,
        adapter="qlora",
        load_in_4bit=True,
    )
    shares, times = ("truncated",), ("rollout_s", "teacher_s", "update_s")
    for key in ("kl", "loss", "student_entropy", "teacher_entropy", "length", *shares, *times):
        values = logged(said, key)
        assert len(values) == 16, key
        assert all(value >= 0 for value in values), key
        assert key not in shares or all(value <= 1 for value in values)
    # The same 16 prompts at every step, in NF4: a third and more is won, of the divergence and of the reverse KL.
    for key in ("kl", "loss"):
        values = logged(said, key)
        assert sum(values[-3:]) / 3 < 0.65 * values[0], (key, values)
    assert "KL(student ‖ teacher) of a token" in said
    pages = sorted(file.name for file in (tmp_path / "on_policy/rollouts").iterdir())
    assert pages == ["step_000008.html", "step_000016.html"]
    weights = adapter(tmp_path / "on_policy")
    assert all(bool(value.abs().sum() > 0) for name, value in weights.items() if "lora_B" in name)
    (counts,) = json.loads((tmp_path / "on_policy/on_policy_kl.json").read_text())["datasets"]
    assert counts == {
        "path": str(tmp_path / "some.jsonl"),
        "prompts": 16,
        "with_trace": 16,
        "unclosed": 0,
        "too_long": 0,
    }


@pytest.mark.slow
def test_two_processes_train_as_one_does(train: Any, tmp_path: Path) -> None:
    """Greedy rollouts of the same eight prompts a step: the same losses and the same adapter after two steps.

    In two processes with layers checkpointed, and each rollout with a backward of its own.
    """
    # Adam would turn rounding errors of vanishing gradients into whole steps.
    same = {"block": GREEDY, "optimizer": "sgd", "learning_rate": 3.0}
    one = train("whole", **same, micro_batch_size=8)
    same["block"] = {**GREEDY, "update_batch_size": 1}
    two = train(
        "ranks",
        **same,
        micro_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        processes=2,
    )
    losses = [[float(loss) for loss in re.findall(r"'loss': '?([-\d.e]+)'?", said)] for said in (one, two)]
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    whole, ranks = (adapter(tmp_path / name) for name in ("whole", "ranks"))
    assert set(whole) == set(ranks)
    for key, value in whole.items():
        if "lora_B" in key:  # zero before the first step
            assert value.norm() > 1e-4, key
            assert (ranks[key] - value).norm() < 1e-3 * value.norm(), key


def test_prompts_alone_do_and_the_teacher_thinks_for_itself(train: Any, recipes: Path, tmp_path: Path) -> None:
    rows = [{"problem": f"Compute {n}+26-13.", "answer": "gold, not read"} for n in range(20, 36)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = train(
        block={"trace_max_new_tokens": 96, "update_batch_size": 3, "show_every": 1},
        datasets=[{"path": str(tmp_path / "mine.jsonl"), "type": "thinkswitch_plugin.on_policy_kl"}],
    )
    assert "16 prompts" in said
    (counts,) = json.loads((tmp_path / "on_policy/on_policy_kl.json").read_text())["datasets"]
    assert (counts["prompts"], counts["with_trace"]) == (16, 0)
    assert len(logged(said, "kl")) == 2
    assert all(value > 0 for value in logged(said, "kl"))
    for page in ("step_000001.html", "step_000002.html"):
        assert (tmp_path / "on_policy/rollouts" / page).read_text().count("nats a token") == 3


def test_a_teacher_that_is_the_base_is_no_second_copy_and_bf16_trains_on_a_cpu(
    train: Any, recipes: Path, tmp_path: Path
) -> None:
    """Both at once: a base in bfloat16 under an adapter in float32 learns what it would say itself after the trace."""
    base = str(recipes / "mini/instruct")
    some = (recipes / "mini/labels.jsonl").read_text().splitlines(keepends=True)[:8]
    (tmp_path / "some.jsonl").write_text("".join(some))
    said = train(
        block={"teacher": base, **GREEDY},
        datasets=[{"path": str(tmp_path / "some.jsonl"), "type": "thinkswitch_plugin.on_policy_kl"}],
        bf16=True,
        learning_rate=1e-3,
        max_steps=12,
        num_epochs=12,
    )
    assert f"teacher {base} is the student's own base: no second copy is loaded" in said
    values = logged(said, "loss")
    assert len(values) == 12
    assert sum(values[-3:]) < 0.8 * sum(values[:3]), values
    weights = adapter(tmp_path / "on_policy")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert all(bool(value.abs().sum() > 0) for value in weights.values())
