"""What a step's gradient is divided by, where a model goes by the step's tokens and where it goes by its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, LlamaConfig, LlamaForCausalLM

from thinkswitch_plugin.trace_stripping.plugin import weigh_tokens

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
ANSWERS = (3, 12, 5, 9)  # tokens; one a micro-batch


def gemma3() -> Any:
    """The mean over the tokens of the batch at hand, whatever is said of the step; its class says so."""
    vision = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"image_size": 8, "patch_size": 4}
    tokens = {"image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62}
    text = {**SIZES, **HEADS, "layer_types": ["full_attention"]}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)
    )


def llama() -> Any:
    """The sum over the tokens of the batch at hand, divided by those of the step."""
    return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS))


def batches() -> list[dict[str, Tensor]]:
    ids = torch.arange(2, 50)
    labels = ids.masked_fill(torch.arange(len(ids)) < 3, -100)
    return [{"input_ids": ids[None, : 3 + n], "labels": labels[None, : 3 + n]} for n in ANSWERS]


def gradient(model: Any) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def trained(model: Any, folder: Path) -> Tensor:
    """The gradient of one step, all micro-batches added up, under Axolotl's trainer and its settings."""
    from axolotl.core.trainers.base import AxolotlTrainer
    from axolotl.core.training_args import AxolotlTrainingArguments

    args = AxolotlTrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to=[],
        gradient_accumulation_steps=len(ANSWERS),
        average_tokens_across_devices=False,
    )
    trainer = AxolotlTrainer(model=model, args=args, train_dataset=Dataset.from_dict({"input_ids": [[1]]}))
    weigh_tokens(trainer)
    trainer.create_optimizer()
    model.zero_grad()
    trainer.current_gradient_accumulation_steps = len(ANSWERS)
    samples, count = trainer.get_batch_samples(iter(batches()), len(ANSWERS), torch.device("cpu"))
    for batch in samples:
        trainer.training_step(model, batch, count)
    return gradient(model)


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("build", [gemma3, llama])
def test_a_step_s_gradient_is_a_mean_and_no_multiple_of_one(
    build: Callable[[], Any], adapter: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = build()
    if adapter:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    found = trained(model.train(), tmp_path)

    model.zero_grad()
    # All tokens alike, or, where the model will not have it, all micro-batches.
    shares = [n / sum(ANSWERS) if build is llama else 1 / len(ANSWERS) for n in ANSWERS]
    torch.stack([share * model(**batch).loss for share, batch in zip(shares, batches(), strict=True)]).sum().backward()
    expected = gradient(model)
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert expected.norm() > 1e-3
