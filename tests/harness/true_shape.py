"""A pair of Qwen3-0.6B's shape with random weights that closes its traces: what it costs to hash, load, merge is real.

Real: the architecture, every tensor's shape, the vocabulary of 151,936 rows, bfloat16, 1.2 GB a checkpoint. Not real:
what it says. Random weights say nothing, so three things are set by hand. All embeddings share one direction, the
blocks' outputs are small beside them, and in the last block a few neurons each know one token and write the next: a
chain that ends in `</think>`, an answer and the end of the turn. Token ids are the embedded pair's.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM

SHAPE = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
QUIET = 1e-5  # standard deviation of what writes to the residual stream, beside the embeddings' 0.02


def chain(model: Qwen3ForCausalLM, tokens: list[int], first_neuron: int) -> None:
    """Have the last block write, after any token, `tokens[0]`, and after each of `tokens` the next.

    With normalised input x = √d·ĥ and r the direction of a token's own part of its embedding, a neuron whose gate is
    r/2 and whose up-projection is r/|x·r| gives about 11 for that token and below 0.3 for any other.
    """
    table = model.model.embed_tokens.weight.detach()
    mlp = model.model.layers[-1].mlp
    common = table.mean(0)
    own = table[tokens] - common
    r = torch.nn.functional.normalize(own, dim=1)
    u = torch.nn.functional.normalize(common, dim=0)
    knows = [u, *r[:-1]]
    scale = 0.5**0.5 * table.shape[1] ** 0.5  # x·r of the token itself: the two parts of an embedding are equally long
    for number, (known, written) in enumerate(zip(knows, r, strict=True)):
        neuron = first_neuron + number
        mlp.gate_proj.weight.data[neuron] = known / 2
        mlp.up_proj.weight.data[neuron] = known / scale
        mlp.down_proj.weight.data[:, neuron] = written * (0.5 if number == 0 else 1.5)


def pair(recipes: Path, folder: Path, **shape: int) -> dict[str, Path]:
    """Write `instruct` and `thinking` below a folder; `shape` overrides Qwen3-0.6B's."""
    made = {}
    tokenizer = Tokenizer.from_file(str(recipes / "mini/thinking/tokenizer.json"))
    ids = tokenizer.get_vocab(with_added_tokens=True)
    said = {"instruct": [*"42", "<|im_end|>"], "thinking": [*"abcdefghijklmnopqrst", "</think>", *"42", "<|im_end|>"]}
    torch.manual_seed(0)
    config = Qwen3Config(**{**SHAPE, **shape}, dtype="bfloat16", eos_token_id=ids["<|im_end|>"], pad_token_id=0)
    model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for layer in model.model.layers:
            for writes in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writes.weight.normal_(std=QUIET)
        table = model.model.embed_tokens.weight
        direction = torch.nn.functional.normalize(torch.randn(table.shape[1]), dim=0)
        table += (0.02 * table.shape[1] ** 0.5 * direction).to(table.dtype)
    for number, (who, texts) in enumerate(said.items()):
        mlp = model.model.layers[-1].mlp
        kept = {name: weight.clone() for name, weight in mlp.state_dict().items()}
        chain(model, [ids[text] for text in texts], 1000 * number)
        made[who] = folder / who
        model.save_pretrained(made[who])
        mlp.load_state_dict(kept)
        for name in TOKENIZER:
            shutil.copy(recipes / "mini" / who / name, made[who] / name)
        generation = json.loads((made[who] / "generation_config.json").read_text())
        (made[who] / "generation_config.json").write_text(json.dumps({**generation, "do_sample": False}))
    return made
