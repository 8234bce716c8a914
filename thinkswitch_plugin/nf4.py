"""`axolotl nf4 CHECKPOINT OUT`: a checkpoint with its linear layers in NF4, as stock loaders read it.

A 4B checkpoint in bfloat16 does not fit a GPU of 8 GB for generation. lm-eval 0.4.11 hands `load_in_4bit` to a
transformers that no longer takes it, but loads a checkpoint that is quantised already: this makes one. It knows
nothing of training, which quantises for itself from the bfloat16 weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command("nf4")
@click.argument("checkpoint")
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
def command(checkpoint: str, out: Path) -> None:
    """Write CHECKPOINT (a folder or a hub id) to OUT with its linear layers in NF4.

    NF4 with double quantisation (QLoRA, arXiv 2305.14314, section 3): about 0.52 bytes a weight. Embeddings and norms
    stay as they are. OUT holds safetensors, tokenizer, chat template and generation config.
    """
    quantize(checkpoint, out)


def quantize(checkpoint: str, out: Path) -> None:
    """Load `checkpoint` in NF4, compute in its own dtype, and save it to `out`.

    Raises:
        OSError: if the checkpoint cannot be found or `out` cannot be written.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    dtype: Any = AutoConfig.from_pretrained(checkpoint).dtype or torch.bfloat16
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    device = {"": 0} if torch.cuda.is_available() else {"": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=config, dtype=dtype, device_map=device, use_safetensors=True
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(out)
