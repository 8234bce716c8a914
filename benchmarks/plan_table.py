"""What fits which card: the plan's peak memory of Qwen3's sizes with the recipes of qwen3_4b, as a table.

    python benchmarks/plan_table.py [--record]

Nothing is downloaded: the shapes are those of the public configs. A size is planned with the 4B's recipes as they are
(NF4 where they say so, answers of 16,384 tokens, rows as long as they may be); `bf16` is answering without NF4. Ends
with one line of JSON: each stage's peak in bytes, the bytes that a card gives, and what `ts-loop plan` says of the
paper's setting at 25 tokens a second.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import Recorder

from harness.card import of_size
from harness.config import read_yaml, recipes_folder
from harness.costs.estimate import PROMPT, answer_tokens, asking_memory, ceilings, question, training_memory
from harness.costs.footprint import ask
from harness.costs.shape import read_shape

CARDS = (8, 12, 16, 24, 48, 80)  # GB
COMMON = {
    "model_type": "qwen3",
    "head_dim": 128,
    "num_key_value_heads": 8,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "dtype": "bfloat16",
}
SIZES: dict[str, dict[str, Any]] = {  # hidden, intermediate, layers, heads, tied
    name: dict(
        zip(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), sizes, strict=True)
    )
    | {"tie_word_embeddings": tied}
    for name, sizes, tied in (
        ("0.6B", (1024, 3072, 28, 16), True),
        ("1.7B", (2048, 6144, 28, 16), True),
        ("4B", (2560, 9728, 36, 32), True),
        ("8B", (4096, 12288, 36, 32), False),
        ("14B", (5120, 17408, 40, 40), False),
    )
}
RECIPES = recipes_folder() / "qwen3_4b"


def peaks(folder: Path) -> dict[str, float]:
    """Bytes at the peak of each stage on a GPU, of the checkpoint whose config.json lies in a folder."""
    card, shape = of_size(CARDS[-1]), read_shape(folder)
    asks = read_yaml(RECIPES / "generate_labels.yml")
    width = answer_tokens(asks, None) + PROMPT
    found = {
        "answer, NF4": sum(asking_memory(asks, shape, width, True, card, 0.0).values()),
        "answer, bf16": sum(asking_memory(asks, shape, width, False, card, 0.0).values()),
    }
    for name, file in (("distil", "instruct_distill.yml"), ("on-policy", "on_policy_kl.yml")):
        recipe = {**read_yaml(RECIPES / file), "base_model": str(folder)}
        if block := recipe.get("on_policy_kl"):
            teacher = folder.with_name(f"{folder.name}-teacher")  # another checkpoint of the same shape
            recipe["on_policy_kl"] = {**block, "teacher": str(teacher)}
        (trace,) = ask([question(recipe, ceilings(recipe), True)], folder.parent / "cache.json")
        found[name] = sum(training_memory(recipe, trace, card, 0.0).values())
    return found


def papers_setting(folder: Path) -> dict[str, Any]:
    """What `ts-loop plan` says of three iterations with the 4B pair on a card of 8 GB."""
    pair = ["--instruct", str(folder), "--thinking", f"{folder}-teacher"]
    command = ["ts-loop", "plan", "--config", str(RECIPES / "loop.yml"), "--vram", "8", "--speed", "25,900", "--json"]
    where = Path(sys.executable).with_name(command[0])
    said = json.loads(subprocess.run([where, *command[1:], *pair], check=True, stdout=subprocess.PIPE).stdout)
    kept = ("name", "memory", "tokens", "seconds", "leaves", "notes")
    total = {key: said["total"][key] for key in ("tokens", "seconds", "disk")}
    return {"stages": [{key: stage[key] for key in kept} for stage in said["stages"]], "total": total}


def main() -> None:
    """The peaks, then the paper's setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    recorder = Recorder(parser)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        rows = {}
        for size, config in SIZES.items():
            for folder in (Path(name) / size, Path(name) / f"{size}-teacher"):
                folder.mkdir()
                (folder / "config.json").write_text(json.dumps(COMMON | config))
            rows[size] = peaks(Path(name) / size)
            print(size, *(f"{stage} {peak / 1e9:.1f}" for stage, peak in rows[size].items()), sep="  ", flush=True)
        planned = papers_setting(Path(name) / "4B")
    cards = {str(card): of_size(card).memory for card in CARDS}
    recorder.keep(asked, "plan_table", {"peaks": rows, "cards": cards, "plan": planned})


if __name__ == "__main__":
    main()
