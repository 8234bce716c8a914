"""`axolotl nf4`: a checkpoint that stock loaders read, smaller, and that answers as before."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from thinkswitch_plugin.nf4 import command

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def source(recipes: Path) -> Path:
    return recipes / "mini" / "thinking"


@pytest.fixture(scope="module")
def copy(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded thinking checkpoint in NF4, by the command as a person starts it: the suite's one bare `nf4`."""
    folder = tmp_path_factory.mktemp("nf4") / "copy"
    subprocess.run([BIN / "axolotl", "nf4", source, folder], check=True, capture_output=True, timeout=300)
    return folder


def loaded(folder: Path, **how: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how).eval()


def answers(model: Any, folder: Path, questions: list[str]) -> list[str]:
    """What a model answers greedily, trace included."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    batch = tokenizer.apply_chat_template(
        [[{"role": "user", "content": question}] for question in questions],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    )
    out = model.generate(**batch, max_new_tokens=160, do_sample=False)
    texts: list[str] = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


@pytest.fixture(scope="module")
def questions(repository: Path) -> list[dict[str, Any]]:
    lines = (repository / "tasks/mini_math/test.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[:60]]


def test_linear_layers_are_small_and_the_rest_is_as_it_was(source: Path, copy: Path) -> None:
    assert (copy / "chat_template.jinja").read_text() == (source / "chat_template.jinja").read_text()
    assert not list(copy.glob("*.bin"))
    with (
        safe_open(copy / "model.safetensors", "pt") as weights,
        safe_open(source / "model.safetensors", "pt") as before,
    ):
        assert str(weights.get_tensor("model.layers.0.mlp.up_proj.weight").dtype) == "torch.uint8"
        assert "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4" in weights.keys()  # noqa: SIM118
        for kept in ("model.embed_tokens.weight", "model.norm.weight"):
            assert torch.equal(weights.get_tensor(kept), before.get_tensor(kept))


def test_it_is_the_model_that_loading_in_nf4_gives(source: Path, copy: Path) -> None:
    qlora = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    ids = torch.arange(3, 300)[None]
    with torch.no_grad():
        ours, theirs = (model(ids).logits for model in (loaded(copy), loaded(source, quantization_config=qlora)))
    assert torch.equal(ours, theirs)


def test_it_answers_as_before(source: Path, copy: Path, questions: list[dict[str, Any]]) -> None:
    asked = [row["question"] for row in questions]
    before, after = answers(loaded(source), source, asked), answers(loaded(copy), copy, asked)
    # Measured: 59 of 60, traces included; the other one is as right or wrong.
    assert sum(a == b for a, b in zip(before, after, strict=True)) >= 57


def test_stock_lm_eval_scores_it_as_the_source(
    source: Path, copy: Path, questions: list[dict[str, Any]], tool: Callable[..., str]
) -> None:
    some = questions[:20]
    texts = answers(loaded(source), source, [row["question"] for row in some])
    boxed = [re.findall(r"\\boxed\{(-?\d+)\}", text)[-1:] for text in texts]
    right = sum(found == [str(row["answer"])] for found, row in zip(boxed, some, strict=True))
    assert right >= 15  # else being near it would mean nothing
    model = ["--model", "hf", "--model_args", f"pretrained={copy},dtype=float32", "--device", "cpu"]
    task = ["--tasks", "mini_math", "--limit", "20", "--batch_size", "20", "--apply_chat_template"]
    said = tool("lm_eval", *model, *task)
    score = next(float(line.split("|")[7]) for line in said.splitlines() if "exact_match" in line)
    assert abs(score - right / 20) <= 0.05  # a question


def test_a_checkpoint_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    said = CliRunner().invoke(command, [str(tmp_path / "none"), str(tmp_path / "out")])
    assert said.exit_code == 1
    assert said.output == (
        f"Error: nf4: checkpoint {tmp_path / 'none'}: no such folder, and not a hub id (owner/name) either\n"
    )
