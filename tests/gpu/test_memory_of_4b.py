"""What the recipes for 8 GB take at Qwen3-4B's true shape, random weights, at their longest: at most 8 GiB."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from card_or_cpu import DEVICE, ON_A_CARD
from qwen3 import ON_A_CPU

from harness.costs.shape import read_shape
from harness.runner import LocalRunner

GIB = 2**30
SEQUENCE = 4096 if ON_A_CARD else 256


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run a command in a process of its own, as the loop does where there is a card; what it printed."""
    folder = tmp_path_factory.mktemp("runs")
    with LocalRunner(folder / "keeper.log", preloaded=False) as runner:

        def started(*command: object) -> str:
            log = folder / "log.txt"
            log.unlink(missing_ok=True)
            try:
                runner.run([str(word) for word in command], {}, log)
            except Exception as error:
                raise AssertionError(f"{error}\n{log.read_text()[-3000:]}") from None
            return log.read_text()

        yield started


@pytest.fixture(scope="module")
def nf4_copy(random_4b: Path, run: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the loop's `nf4: true` has answer."""
    copy = tmp_path_factory.mktemp("nf4") / "copy"
    run("axolotl", "nf4", random_4b, copy)
    return copy


def test_an_answer_in_nf4_after_a_prompt_of_4096_tokens(nf4_copy: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(nf4_copy, dtype=torch.bfloat16, device_map={"": DEVICE})
    prompt = torch.randint(3, 300, (1, SEQUENCE), device=DEVICE)
    if ON_A_CARD:
        torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=32, min_new_tokens=32, do_sample=False
        )
    assert out.shape == (1, SEQUENCE + 32)
    if ON_A_CARD:
        assert torch.cuda.max_memory_allocated() <= 8 * GIB
        # And the rest of a cache of 16,384 answer tokens beside it.
        more = 147_456 * (16_384 - 32)
        assert torch.cuda.max_memory_allocated() + more <= 8 * GIB


TAGS = 64  # tokens, at most, that a chat template puts around a text


def rows(file: Path, prompt: int, trace: int, answer: int) -> Path:
    """Two questions of about so many tokens, with traces and answers: a digit is a token of the embedded pair's."""
    doc = {"messages": [{"role": "user", "content": digits(prompt)}], "trace_opened": True}
    row = {"doc": doc, "resps": [[f"{digits(trace)}\n</think>\n\n{digits(answer)}"]]}
    file.write_text("".join(json.dumps({**row, "doc": {**doc, "id": str(n)}}) + "\n" for n in range(2)))
    return file


def digits(count: int) -> str:
    return ("1234567890" * (count // 10 + 1))[:count]


def trained(run: Callable[..., str], recipe: dict[str, Any], base: Path, data: Path, folder: Path) -> str:
    """Two steps of a recipe on these rows; what was printed."""
    recipe = {
        **recipe,
        "base_model": str(base),
        "datasets": [{"path": str(data), "type": recipe["datasets"][0]["type"]}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "left"),
        "gradient_accumulation_steps": 1,
        "num_epochs": 2,
        "max_steps": 2,
        "dataset_num_proc": 1,
        **({} if ON_A_CARD else ON_A_CPU),
    }
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe))
    said = run("axolotl", "train", folder / "recipe.yml", "--launcher", "python")
    assert (folder / "left/adapter_model.safetensors").is_file()
    return said


def peak(said: str) -> float:
    """The most bytes that lay on the card, as Axolotl logs them."""
    return GIB * max(float(value) for value in re.findall(r"'memory/max_allocated \(GiB\)': '?([\d.]+)", said))


def test_a_distilling_step_at_4096_tokens(
    random_4b: Path, recipes: Path, run: Callable[..., str], tmp_path: Path
) -> None:
    recipe = yaml.safe_load((recipes / "qwen3_4b/instruct_distill.yml").read_text())
    recipe["sequence_len"] = SEQUENCE
    data = rows(tmp_path / "rows.jsonl", 6, 2, SEQUENCE - TAGS)
    said = trained(run, recipe, random_4b, data, tmp_path)
    if ON_A_CARD:
        assert peak(said) <= 8 * GIB


def test_an_on_policy_step_at_the_recipe_s_ceiling(
    random_4b: Path, another_4b: Path, recipes: Path, run: Callable[..., str], tmp_path: Path
) -> None:
    """The longest prompt, trace and answers that the recipe lets pass, and two models."""
    recipe = yaml.safe_load((recipes / "qwen3_4b/on_policy_kl.yml").read_text())
    block = recipe["on_policy_kl"]
    block["teacher"] = str(another_4b)
    if not ON_A_CARD:
        recipe["sequence_len"] = SEQUENCE
        block |= {"trace_max_new_tokens": SEQUENCE, "max_new_tokens": 8}
    prompt = recipe["sequence_len"] - block["max_new_tokens"] - TAGS
    data = rows(tmp_path / "rows.jsonl", prompt, block["trace_max_new_tokens"] - TAGS, 64)
    said = trained(run, recipe, random_4b, data, tmp_path)
    (facts,) = json.loads((tmp_path / "left/on_policy_kl.json").read_text())["datasets"]
    assert (facts["prompts"], facts["with_trace"]) == (2, 2)  # none is over the limits
    assert "no second copy is loaded" not in said
    if ON_A_CARD:
        models = sum(read_shape(of).weights_bytes(True, "bfloat16") for of in (random_4b, another_4b))
        assert models < peak(said) <= 8 * GIB
