"""The shape of a checkpoint, by its config.json alone: what its weights and its key-value cache take.

The architecture is built by transformers on the meta device, which holds no numbers, and counted: whatever transformers
knows can be read, not one family's formula. Weights need not be there.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import LoopError
from harness.files import read_json

BYTES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
# A weight in NF4 with double quantisation: half a byte, one for each 64, and a float32 for each 256 of those.
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Shape:
    """Sizes of a checkpoint.

    Attributes:
        linear: parameters in linear layers, the output head not among them: what NF4 packs.
        embedding: parameters of the input embedding.
        head: parameters of an output head of its own; 0 where it is the embedding.
        other: parameters of all else (norms, biases).
        layers: decoder layers.
        cached_layers: those of them that have a key-value cache growing with each token.
        hidden: width.
        vocabulary: tokens.
        kv_heads: key-value heads a layer.
        head_dim: width of a head.
        positions: the most tokens it was made for; 0 where its config does not say.
        dtype: of its weights: float32, bfloat16, float16.
    """

    linear: int
    embedding: int
    head: int
    other: int
    layers: int
    cached_layers: int
    hidden: int
    vocabulary: int
    kv_heads: int
    head_dim: int
    positions: int
    dtype: str

    @property
    def tied(self) -> bool:
        """Whether the output head is the input embedding."""
        return self.head == 0

    @property
    def parameters(self) -> int:
        """All of them, tied ones once."""
        return self.linear + self.embedding + self.head + self.other

    def weights_bytes(self, nf4: bool, dtype: str | None = None) -> int:
        """What the weights take, in bytes.

        Args:
            nf4: linear layers in NF4 with double quantisation, the rest (embedding, head, norms) in `dtype`.
            dtype: float32, bfloat16 or float16; the checkpoint's own if None.
        """
        each = BYTES[dtype or self.dtype]
        rest = self.embedding + self.head + self.other
        return round(self.linear * (NF4_BYTES if nf4 else each)) + rest * each

    def kv_bytes(self, dtype: str | None = None) -> int:
        """What one token of one sequence takes in the key-value cache, in bytes; `dtype` as in `weights_bytes`."""
        return 2 * self.cached_layers * self.kv_heads * self.head_dim * BYTES[dtype or self.dtype]


def read_shape(folder: Path) -> Shape:
    """The shape of the checkpoint whose config.json lies in a folder; of a TaH checkpoint its backbone's.

    Raises:
        LoopError: if there is none, or transformers knows no such causal language model.
    """
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise LoopError(f"{folder}: has no config.json that can be read; name the folder of a checkpoint")
    try:
        return of_config(config["text_config"] if config.get("model_type") == "tah" else config)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        why = " ".join(str(error).split())[:200]
        raise LoopError(f"{folder}/config.json: not a causal language model that transformers knows ({why})") from None


def of_config(values: Mapping[str, Any]) -> Shape:
    """The shape that a config.json describes; nothing is loaded or downloaded."""
    logging.disable(logging.WARNING)  # what the libraries say as they are imported is no reader's concern
    try:
        return _of_config(dict(values))
    finally:
        logging.disable(logging.NOTSET)


def _of_config(values: dict[str, Any]) -> Shape:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config(decoder=True)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is None or head.weight is embedding.weight
    within = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    linear = sum(module.weight.numel() for module in within)
    total = sum(parameter.numel() for parameter in model.parameters())  # tied ones once
    embeds = embedding.weight.numel()
    heads = 0 if tied else head.weight.numel()
    queries = text.num_attention_heads
    layers = text.num_hidden_layers
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * layers
    return Shape(
        linear=linear,
        embedding=embeds,
        head=heads,
        other=total - linear - embeds - heads,
        layers=layers,
        cached_layers=sum("attention" in kind and "linear" not in kind for kind in kinds),
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        kv_heads=getattr(text, "num_key_value_heads", None) or queries,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // queries,
        positions=getattr(text, "max_position_embeddings", None) or 0,
        dtype=str(config.dtype or "float32").removeprefix("torch."),
    )
