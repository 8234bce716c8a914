"""A checkpoint's shape by its config.json: parameters, weights in NF4, the key-value cache."""

import json
from pathlib import Path

import pytest
from qwen3 import QWEN3_4B
from safetensors import safe_open

from harness.config import recipes_folder
from harness.costs.shape import of_config, read_shape
from harness.errors import LoopError


def test_the_counts_are_those_of_the_weights_themselves():
    folder = recipes_folder() / "mini" / "instruct"
    shape = read_shape(folder)
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        sizes = {name: weights.get_tensor(name).numel() for name in weights.keys()}  # noqa: SIM118
        held = sum(weights.get_tensor(name).nbytes for name in weights.keys())  # noqa: SIM118
    assert shape.parameters == sum(sizes.values())
    assert shape.linear == sum(size for name, size in sizes.items() if "proj" in name)
    assert shape.tied
    assert shape.weights_bytes(nf4=False) == held
    assert (shape.layers, shape.hidden, shape.vocabulary, shape.kv_heads, shape.head_dim) == (4, 128, 328, 2, 32)


def test_qwen3_4b_is_as_large_as_it_is_known_to_be():
    shape = of_config(QWEN3_4B)
    assert shape.linear == pytest.approx(3.63e9, rel=0.01)
    assert shape.embedding == 151936 * 2560
    assert shape.kv_bytes() == 147_456
    assert shape.weights_bytes(nf4=True) == pytest.approx(2.65e9, rel=0.01)
    assert shape.weights_bytes(nf4=False) == pytest.approx(8.04e9, rel=0.01)
    assert shape.positions == 262144


def test_another_architecture_with_a_head_and_biases_of_its_own():
    shape = of_config(
        {
            "model_type": "qwen2",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 50,
            "tie_word_embeddings": False,
        }
    )
    attention = 64 * 64 * 2 + 64 * 32 * 2
    assert not shape.tied
    assert shape.head == 50 * 64
    assert shape.linear == 2 * (attention + 3 * 64 * 96)
    assert shape.other == 2 * (64 + 32 + 32 + 2 * 64) + 64  # biases of q, k and v; norms
    assert shape.head_dim == 16
    assert shape.dtype == "float32"


@pytest.mark.parametrize("said", [None, {}, {"model_type": "no_such_model"}, {"model_type": "t5"}])
def test_what_is_no_language_model_is_refused_in_a_line(tmp_path: Path, said: dict[str, str] | None):
    if said is not None:
        (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(LoopError, match=r"config\.json") as refused:
        read_shape(tmp_path)
    assert "\n" not in str(refused.value)
