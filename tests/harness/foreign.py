"""Two pairs that are not the embedded one, as a user's is not: what the tests of other pairs share.

`trained`: another family, shape, vocabulary and chat template, made as the embedded pair is, from random weights by
native recipes. `grown`: the embedded pair in another shape, without a step of training. Both have what a user's pair
has and the embedded one has not: weights in bfloat16, a head of its own, a card, sampling in the generation config.
"""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

TURNS = """{%- for message in messages %}
{{- '[' + message.role + ']' + message.content + '[end]' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '[assistant]' }}{%- endif %}"""
# The last answer of a conversation gets its trace back, or an empty one; a question is followed by an open trace.
OPENED = """{%- for message in messages %}
{%- set content = message.content %}
{%- set trace = message.reasoning_content | default('', true) %}
{%- if message.role == 'assistant' and '</think>' in content %}
{%- set trace = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '[' + message.role + ']' }}
{%- if message.role == 'assistant' and loop.last %}{{- '<think>\\n' + trace + '\\n</think>\\n\\n' }}{%- endif %}
{{- content + '[end]' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '[assistant]<think>\\n' }}{%- endif %}"""
CARD = """# A card
We recommend **Temperature=0.6** and an output length of 320 tokens for most queries, 400 for hard ones.
"""
STEPS = {"base": 800, "instruct": 150, "thinking": 150}
SAMPLING = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}


def world(recipes: Path) -> Any:
    """The module that draws the embedded pair's questions."""
    spec = importlib.util.spec_from_file_location("world", recipes / "mini" / "world.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def untrained(folder: Path, corpus: list[str]) -> None:
    """A Llama of 5 layers × 160 with random weights, and a byte-level tokenizer of 420 tokens."""
    core = Tokenizer(models.BPE())
    words = Regex(r"\p{N}|\[[a-z]+\]| ?\p{L}+|[^\s\p{L}\p{N}]+|\s+")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    tokens = ["[pad]", "[end]", "[user]", "[assistant]", "[system]"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="[end]", pad_token="[pad]", model_max_length=768
    )
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = TURNS
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=400,
        num_hidden_layers=5,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=768,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    torch.manual_seed(1)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True, **SAMPLING
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def grown(recipes: Path, folder: Path) -> dict[str, Path]:
    """The embedded pair, deeper and wider by what changes nothing: layers that add zero, units that nobody reads.

    Weights are rounded to bfloat16, the head is a copy of the embedding.
    """
    found = {}
    for who in ("instruct", "thinking"):
        source, target = recipes / "mini" / who, folder / who
        target.mkdir(parents=True)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(source / file, target)
        config = json.loads((source / "config.json").read_text())
        deep, wide = config["num_hidden_layers"] + 2, config["intermediate_size"] + 128
        new = {"num_hidden_layers": deep, "intermediate_size": wide, "tie_word_embeddings": False, "dtype": "bfloat16"}
        config |= {**new, "layer_types": ["full_attention"] * deep, "max_position_embeddings": 768}
        (target / "config.json").write_text(json.dumps(config))
        weights = load_file(source / "model.safetensors")
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        for name in [name for name in weights if name.startswith(("model.layers.0.", "model.layers.1."))]:
            copied = name.replace("layers.0.", f"layers.{deep - 2}.").replace("layers.1.", f"layers.{deep - 1}.")
            silent = name.endswith(("o_proj.weight", "down_proj.weight"))
            weights[copied] = torch.zeros_like(weights[name]) if silent else weights[name].clone()
        for name, weight in weights.items():
            if name.endswith(("gate_proj.weight", "up_proj.weight")):
                weight = torch.cat([weight, torch.zeros(128, weight.shape[1])])
            elif name.endswith("down_proj.weight"):
                weight = torch.cat([weight, torch.zeros(weight.shape[0], 128)], dim=1)
            weights[name] = weight.bfloat16().contiguous()
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
        described(target, source)
        found[who] = target
    return found


def described(target: Path, source: Path) -> None:
    """A card and sampling, as a user's checkpoint has them."""
    generation = json.loads((source / "generation_config.json").read_text())
    (target / "generation_config.json").write_text(json.dumps({**generation, "do_sample": True, **SAMPLING}))
    (target / "README.md").write_text(CARD)


def trained(recipes: Path, folder: Path, train: Callable[[Path], None]) -> None:
    """Write `instruct` and `thinking` under a folder.

    Args:
        recipes: the shipped ones, whose training this is, with other paths.
        folder: where everything goes.
        train: runs an Axolotl recipe.
    """
    made = world(recipes)
    rows = {domain: made.take(domain, "train", 40_000, seed=11, asked=made.EVENLY) for domain in made.DOMAINS}
    rng = random.Random(11)
    base = [made.chat(item, rng.random() >= made.DIRECT[domain]) for domain in rows for item in rows[domain]]
    data = {"base": base}
    shares = {"instruct": {"mini_math": 16_000, "mini_qa": 800}, "thinking": {"mini_math": 2_500, "mini_qa": 7_500}}
    for who, counts in shares.items():
        drawn = [item for domain, n in counts.items() for item in made.take(domain, "train", n, seed=12)]
        data[who] = [made.chat(item, who == "thinking") for item in drawn]
    for name, content in data.items():
        made.write_jsonl(folder / "data" / f"{name}.jsonl", content)
    turns = [message["content"] for row in base[:10_000] for message in row["messages"]]
    untrained(folder / "untrained", turns)
    (folder / "turns.jinja").write_text(TURNS)
    (folder / "opened.jinja").write_text(OPENED)
    for name, begin in (("base", "untrained"), ("instruct", "base"), ("thinking", "base")):
        recipe = yaml.safe_load((recipes / "mini" / f"{name}.yml").read_text())
        recipe |= {
            "base_model": str(folder / begin),
            "dataset_prepared_path": str(folder / "prepared"),
            "output_dir": str(folder / f"{name}_32" if name != "base" else folder / name),
            "save_strategy": "no",
            "pad_to_sequence_len": False,
            "chat_template": "jinja",
            "chat_template_jinja": str(folder / ("opened.jinja" if name == "thinking" else "turns.jinja")),
        }
        recipe["datasets"] = [
            {
                "path": str(folder / "data" / f"{name}.jsonl"),
                "type": "chat_template",
                "chat_template": "jinja",
                "chat_template_jinja": str(folder / "turns.jinja"),
            }
        ]
        for key in ("save_steps", "save_total_limit"):
            recipe.pop(key, None)
        recipe["max_steps"] = STEPS[name]
        file = folder / f"{name}.yml"
        file.write_text(yaml.safe_dump(recipe))
        train(file)
    for who in ("instruct", "thinking"):
        source, target = folder / f"{who}_32", folder / who
        target.mkdir()
        for file in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(source / file, target)
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(target)
        described(target, source)
