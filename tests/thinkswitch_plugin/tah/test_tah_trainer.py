"""The trainer in this process: what a step's loss is divided by, and that a run taken up goes on as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from slow_tah import backbone, padded_batch
from torch import Tensor

from thinkswitch_plugin.tah import TaHForCausalLM


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


def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path: Path) -> None:
    """A bfloat16 backbone, trained in float32 at the paper's rate; what it leaves at the end is bfloat16 again."""
    from axolotl.core.training_args import AxolotlTrainingArguments

    from thinkswitch_plugin.tah.trainer import TaHTrainer

    batch = padded_batch()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    torch.manual_seed(3)
    rows = {**batch, "labels": labels, "target_depth": torch.randint(1, 3, labels.shape)}

    def trained(folder: str, resume: Path | None, **settings: Any) -> Any:
        wrapped = {"mix_top_k": 7, "lora_r": 3, "lora_alpha": 6.0, "lora_dropout": 0.1, "decider": "oracle"}
        model = TaHForCausalLM.from_backbone(backbone().to(torch.bfloat16), **wrapped)
        model.begin_backbone()
        trainer = TaHTrainer(
            model=model,
            args=AxolotlTrainingArguments(
                output_dir=str(tmp_path / folder),
                use_cpu=True,
                bf16=True,
                report_to=[],
                disable_tqdm=True,
                remove_unused_columns=False,
                per_device_train_batch_size=len(labels),
                max_steps=2,
                learning_rate=4e-5,
                lr_scheduler_type="constant",
                save_steps=1,
                seed=1,
                **settings,
            ),
            train_dataset=Dataset.from_dict({key: value.tolist() for key, value in rows.items()}),
            data_collator=lambda found: {key: torch.tensor([row[key] for row in found]) for key in found[0]},
        )
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        trainer.save_model(str(tmp_path / folder))
        return model

    whole = trained("whole", None)
    resumed = trained("resumed", tmp_path / "whole/checkpoint-1")
    first = load_file(tmp_path / "whole/checkpoint-1/model.safetensors")
    for name, parameter in whole.named_parameters():
        assert first[name].dtype == torch.float32
        assert not torch.equal(first[name], parameter.detach()), name  # it learnt after that checkpoint
        assert torch.equal(resumed.get_parameter(name), parameter), name
    for folder in ("whole", "resumed"):
        saved = load_file(tmp_path / folder / "model.safetensors")
        assert {value.dtype for value in saved.values()} == {torch.bfloat16}
