"""`axolotl nf4 CHECKPOINT OUT`: a checkpoint with its linear layers in NF4, as stock loaders read it.

A 4B checkpoint in bfloat16 does not fit a GPU of 8 GB for generation. lm-eval 0.4.11 hands `load_in_4bit` to a
transformers that no longer takes it, but loads a checkpoint that is quantised already: this makes one. It knows
nothing of training, which quantises for itself from the bfloat16 weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from thinkswitch_plugin.cli import one_line
from thinkswitch_plugin.recipe import is_there


@click.command("nf4")
@click.argument("checkpoint")
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
def command(checkpoint: str, out: Path) -> None:
    """Write CHECKPOINT (a folder or a hub id) to OUT with its linear layers in NF4.

    NF4 with double quantisation (QLoRA, arXiv 2305.14314, section 3): about 0.52 bytes a weight. Embeddings and norms
    stay as they are. OUT holds safetensors, tokenizer, chat template and generation config.
    """
    with one_line():
        quantize(checkpoint, out)


def quantize(checkpoint: str, out: Path) -> None:
    """Load `checkpoint` in NF4, compute in its own dtype, and save it to `out`.

    Raises:
        ValueError: the checkpoint is no folder and cannot be a hub id.
        OSError: it cannot be read or `out` cannot be written.
    """
    if not is_there(checkpoint):
        raise ValueError(f"nf4: checkpoint {checkpoint}: no such folder, and not a hub id (owner/name) either")

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    dtype: Any = AutoConfig.from_pretrained(checkpoint).dtype or torch.bfloat16
    device = {"": 0} if torch.cuda.is_available() else {"": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=nf4(dtype), dtype=dtype, device_map=device, use_safetensors=True
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(out)


def nf4(compute_dtype: Any) -> Any:
    """The `BitsAndBytesConfig` of NF4 with double quantisation, that computes in a `torch.dtype`."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
