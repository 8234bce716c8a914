"""The trainer in this process: what a step's loss is divided by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from slow_tah import padded_batch
from torch import Tensor


def test_two_ranks_mean_gradient_is_that_of_one_process(
    build: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes' rows, one after the other: their sums are divided by both's tokens, and DDP takes the mean."""
    from axolotl.core.training_args import AxolotlTrainingArguments

    from thinkswitch_plugin.tah.trainer import TaHTrainer

    model, batch = build(decider="oracle"), padded_batch()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    torch.manual_seed(3)
    rows = {**batch, "labels": labels, "target_depth": torch.randint(1, 3, labels.shape)}
    trainer = TaHTrainer(
        model=model,
        args=AxolotlTrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[]),
        train_dataset=Dataset.from_dict({"input_ids": [[1]]}),
    )

    def share(which: slice) -> dict[str, Tensor]:
        model.zero_grad()
        mine = {key: value[which] for key, value in rows.items()}
        # Counted as it counts a step's tokens, which it gathers from all processes.
        _, count = trainer.get_batch_samples(iter([rows]), 1, torch.device("cpu"))
        trainer.compute_loss(model, mine, num_items_in_batch=count).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    whole = share(slice(None))
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", property(lambda _: 2))
    first, second = share(slice(1)), share(slice(1, None))
    assert any(name.endswith(".lora_B") for name in whole)
    for name, grad in whole.items():
        assert ((first[name] + second[name]) / 2 - grad).norm() < 1e-3 * grad.norm() + 1e-7, name
