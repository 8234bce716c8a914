"""What the recipes for 8 GB take at Qwen3-4B's true shape, random weights, sequences of 4,096: at most 8 GiB."""

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

from harness.runner import LocalRunner

GIB = 2**30
SEQUENCE = 4096 if ON_A_CARD else 256
# What a CPU cannot do, and nothing else.
ON_A_CPU = {
    "bf16": False,
    "tf32": False,
    "optimizer": "adamw_torch",
    "liger_fused_linear_cross_entropy": False,
    "liger_rms_norm": False,
    "lora_mlp_kernel": False,
    "lora_qkv_kernel": False,
    "lora_o_kernel": False,
}


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


def rows(file: Path, length: int) -> Path:
    """Two answers of about so many tokens after traces: a digit is a token of the embedded pair's."""
    row = {
        "doc": {"messages": [{"role": "user", "content": "Count."}], "trace_opened": True},
        "resps": [["12\n</think>\n\n" + "1234567890" * (length // 10)]],
    }
    file.write_text("".join(json.dumps({**row, "doc": {**row["doc"], "id": str(n)}}) + "\n" for n in range(2)))
    return file


@pytest.mark.parametrize("name", ["instruct_distill", "on_policy_kl"])
def test_a_training_step_at_4096_tokens(
    random_4b: Path, recipes: Path, run: Callable[..., str], tmp_path: Path, name: str
) -> None:
    recipe = yaml.safe_load((recipes / f"qwen3_4b/{name}.yml").read_text())
    data = rows(tmp_path / "rows.jsonl", SEQUENCE - 64 if name == "instruct_distill" else 64)
    recipe.update(
        base_model=str(random_4b),
        datasets=[{"path": str(data), "type": recipe["datasets"][0]["type"]}],
        dataset_prepared_path=str(tmp_path / "prepared"),
        output_dir=str(tmp_path / "left"),
        sequence_len=SEQUENCE,
        gradient_accumulation_steps=1,
        num_epochs=2,
        max_steps=2,
        dataset_num_proc=1,
        **({} if ON_A_CARD else ON_A_CPU),
    )
    if "on_policy_kl" in recipe:
        recipe["on_policy_kl"]["teacher"] = str(random_4b)
        if not ON_A_CARD:
            recipe["on_policy_kl"]["max_new_tokens"] = 8
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    said = run("axolotl", "train", tmp_path / "recipe.yml", "--launcher", "python")
    assert (tmp_path / "left/adapter_model.safetensors").is_file()
    if ON_A_CARD:
        peaks = [float(value) for value in re.findall(r"'memory/max_allocated \(GiB\)': '?([\d.]+)", said)]
        assert peaks
        assert max(peaks) <= 8.0
