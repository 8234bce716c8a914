"""For whoever has a card: `pytest tests/gpu`. Without one everything here is skipped.

`THINKSWITCH_TEST_DEVICE=cpu` has it run on a CPU as far as that goes, on two layers and without the bounds of memory.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from card_or_cpu import ON_A_CARD
from qwen3 import QWEN3_4B

sys.path.append(str(Path(__file__).parent.parent / "harness"))  # `small`, the loop made short


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a card where there is none."""
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    if ON_A_CARD and not torch.cuda.is_available():
        for item in here:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    if not ON_A_CARD:
        for item in here:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def random_4b(recipes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of Qwen3-4B's shape in bfloat16 (8 GB; two layers on a CPU), the embedded pair's tokenizer."""
    return random_weights(recipes / "mini/instruct", tmp_path_factory.mktemp("random_4b"))


@pytest.fixture(scope="session")
def another_4b(recipes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Others, as a thinking checkpoint is beside its instruct one: a teacher that is not the student's own base."""
    return random_weights(recipes / "mini/thinking", tmp_path_factory.mktemp("another_4b"))


def random_weights(like: Path, folder: Path) -> Path:
    """A checkpoint with the tokenizer and the chat template of `like`, in `folder`."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    layers = QWEN3_4B["num_hidden_layers"] if ON_A_CARD else 2
    shape = {**QWEN3_4B, "num_hidden_layers": layers, "max_position_embeddings": 40960, "rope_theta": 5000000}
    config = Qwen3Config(**shape, eos_token_id=2, pad_token_id=0)
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.fill_(1.0) if tensor.ndim < 2 else tensor.normal_(0, 0.02)
    model.save_pretrained(folder, max_shard_size="2GB")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(like / name, folder)
    return folder
