"""What fits which card: the plan's peak memory of Qwen3's sizes with the recipes of qwen3_4b, as a table.

    python benchmarks/plan_table.py

Nothing is downloaded: the shapes are those of the public configs. A size is planned with the 4B's recipes as they are
(NF4 where they say so, answers of 16,384 tokens, rows as long as they may be); `bf16` is answering without NF4. Prints
Markdown: each stage's peak in GB, and which of them fit a card.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

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


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as name:
        rows = {}
        for size, config in SIZES.items():
            for folder in (Path(name) / size, Path(name) / f"{size}-teacher"):
                folder.mkdir()
                (folder / "config.json").write_text(json.dumps(COMMON | config))
            rows[size] = peaks(Path(name) / size)
    stages = list(rows["4B"])
    print(f"| Qwen3 | {' | '.join(stages)} |\n|{'---|' * (len(stages) + 1)}")
    for size, found in rows.items():
        print(f"| {size} | {' | '.join(f'{peak / 1e9:.1f}' for peak in found.values())} |")
    print(f"\n| Qwen3 | {' | '.join(f'{card} GB' for card in CARDS)} |\n|{'---|' * (len(CARDS) + 1)}")
    for size, found in rows.items():
        cells = ("; ".join(stage for stage, peak in found.items() if peak <= of_size(card).memory) for card in CARDS)
        print(f"| {size} | {' | '.join(cell if cell else 'none' for cell in cells)} |")


if __name__ == "__main__":
    main()
