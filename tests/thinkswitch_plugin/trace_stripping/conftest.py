"""A tiny instruct checkpoint with a Qwen-like chat template, and recipes on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' }}"
    # As Qwen's templates do: a trace in a field of its own comes back inline.
    "{%- if message.reasoning_content %}"
    "{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}"
    "{%- endif %}"
    "{{- message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
CORPUS = [
    "What is 12 + 30? The answer is 42.",
    "Let me think, step by step: yes, no or maybe.",
    "user assistant system\n",
]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level BPE tokenizer with a few merges and Qwen's chat tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


@pytest.fixture(scope="session")
def checkpoint(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 checkpoint of random weights with that tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("pair") / "instruct"
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as JSON lines into this test's folder."""

    def write(rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def recipe(checkpoint: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The recipe of the plugin's README on the tiny checkpoint, small enough for a test."""

    def recipe(rows: Path, **changes: Any) -> dict[str, Any]:
        return {
            "base_model": str(checkpoint),
            "plugins": ["thinkswitch_plugin.trace_stripping.TraceStrippingPlugin"],
            "datasets": [{"path": str(rows), "type": "thinkswitch_plugin.trace_stripping"}],
            "dataset_prepared_path": str(tmp_path / "prepared"),
            "dataset_num_proc": 1,
            "output_dir": str(tmp_path / "out"),
            "sequence_len": 512,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "max_steps": 1,
            "learning_rate": 1e-3,
            "optimizer": "adamw_torch",
            "save_strategy": "no",
            "bf16": False,
            "fp16": False,
            "tf32": False,
            "sdp_attention": True,
            **changes,
        }

    return recipe
