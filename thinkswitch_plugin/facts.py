"""What a plugin found in a training's datasets: from where it was counted to a JSON file beside the checkpoint.

Knows the way of the facts, not what they say. Rows are counted while a dataset is prepared, which may be long before
the training, in another command: Axolotl keeps prepared sets. So the facts travel with the rows, as a line of the
dataset's own description, which is saved with it and joined line by line where datasets are merged.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def attach(dataset: Any, plugin: str, facts: Mapping[str, Any]) -> None:
    """Put facts into the description of a prepared `datasets.Dataset`.

    Args:
        dataset: as the plugin's dataset type leaves it.
        plugin: the name of the plugin's block.
        facts: of one dataset, as JSON takes it.
    """
    dataset.info.description = f"{plugin}: {json.dumps(facts)}"


def attached(dataset: Any, plugin: str) -> list[dict[str, Any]]:
    """The facts that `attach` put into a dataset, or into those it was merged from, in their order."""
    prefix = f"{plugin}: "
    lines = (dataset.info.description or "").splitlines()
    return [json.loads(line.removeprefix(prefix)) for line in lines if line.startswith(prefix)]


def publish(trainer: Any, plugin: str, output_dir: str | Path) -> None:
    """Write `OUTPUT_DIR/PLUGIN.json`, `{"datasets": [facts of each]}`, of what a trainer trains on.

    Every process may call it; the first one writes.
    """
    if trainer.is_world_process_zero():
        write_json(Path(output_dir) / f"{plugin}.json", {"datasets": attached(trainer.train_dataset, plugin)})


def write_json(file: Path, value: Any) -> None:
    """Write a JSON file in one step: who reads it finds all of it or what was there before."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f"{file.name}.{os.getpid()}")
    beside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, file)
