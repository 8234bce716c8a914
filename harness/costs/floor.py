"""What a training holds on a CPU before it holds a model: the imports, and what they lay out for themselves.

    python -m harness.costs.floor < QUESTIONS.json

Seen, not reckoned: a step of one row on the embedded pair, run as `ts-loop` runs commands where no accelerator is, a
fork of a process that has imported the tools. A question is {} and the answer {"bytes"}.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import yaml

from harness.config import recipes_folder
from harness.costs.aside import answer_all
from harness.runner import LocalRunner


def seen(question: dict[str, Any]) -> dict[str, Any]:
    """Run such a step."""
    recipes = recipes_folder()
    recipe = yaml.safe_load((recipes / "instruct_distill.yml").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe |= {"base_model": str(recipes / "mini" / "instruct"), "micro_batch_size": 1, "max_steps": 1}
        recipe["datasets"][0]["path"] = str(recipes / "mini" / "labels.jsonl")
        recipe |= {"dataset_prepared_path": f"{folder}/prepared", "output_dir": f"{folder}/out"}
        (folder / "recipe.yml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        with LocalRunner(folder / "preload.log", preloaded=True) as runner:
            command = ["axolotl", "train", str(folder / "recipe.yml"), "--launcher", "python"]
            used = runner.run(command, {"HF_HUB_OFFLINE": "1"}, folder / "log.txt")
    return {"bytes": used.peak_mb * 2**20}


if __name__ == "__main__":
    answer_all(seen)
