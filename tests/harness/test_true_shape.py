"""The whole loop on files of a real size: two checkpoints of 1.2 GB of Qwen3-0.6B's shape, on the CPU.

What they say is made up (`true_shape`); disk, hashing, merges, memory and time are those of real files.
"""

from __future__ import annotations

import io
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from small import prepared, small_loop
from true_shape import SHAPE, pair

from harness import loop
from harness.runner import LocalRunner
from harness.view import View

GB = 1e9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Seven gigabytes are in here at the end, and none afterwards."""
    made = tmp_path_factory.mktemp("true")
    yield made
    shutil.rmtree(made)


def size(folder: Path) -> int:
    """Bytes of what lies below a folder, each inode once."""
    seen = {}
    for path in folder.rglob("*"):
        try:
            stat = path.lstat()
        except FileNotFoundError:  # a stage is at work
            continue
        seen[stat.st_ino] = stat.st_blocks * 512
    return sum(seen.values())


def written(recipes: Path, folder: Path) -> Path:
    """The shipped loop, with four prompts and questions, and the dtype of the checkpoints."""
    made = pair(recipes, folder / "pair")
    file = small_loop(recipes, folder / "loop", **{who: str(path) for who, path in made.items()}, limit=4, jobs=1)
    changes: dict[str, dict[str, Any]] = {
        "generate_labels.yml": {"model_args": {"dtype": "bfloat16"}, "batch_size": 4},
        "evaluate.yml": {"model_args": {"dtype": "bfloat16"}, "batch_size": 4},
        "instruct_distill.yml": {"micro_batch_size": 2, "learning_rate": 1e-4},
        "slerp_thinking.yml": {"dtype": "bfloat16"},
    }
    for name, change in changes.items():
        recipe = yaml.safe_load((file.parent / name).read_text())
        (file.parent / name).write_text(yaml.safe_dump({**recipe, **change}))
    return file


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_loop_over_files_of_a_real_size(recipes: Path, runner: LocalRunner, folder: Path) -> None:
    file = written(recipes, folder)
    weights = (folder / "pair/instruct/model.safetensors").stat().st_size
    assert weights / GB == pytest.approx(1.19, abs=0.01)
    assert json.loads((folder / "pair/thinking/config.json").read_text())["vocab_size"] == SHAPE["vocab_size"]

    most, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            most[0] = max(most[0], size(folder / "runs"))

    watching = threading.Thread(target=watch)
    watching.start()
    hashed: dict[str, int] = {}
    view = View(Console(file=io.StringIO()))
    view.hashing = lambda name, done, size: hashed.update({name: hashed.get(name, 0) + (done == size)})  # type: ignore[method-assign]
    try:
        run = prepared(file, folder / "runs", view=view)
        assert hashed["model.safetensors"] == 2  # each of the pair once
        results = loop.go(run, View(Console(file=io.StringIO())), runner)
    finally:
        done.set()
        watching.join()

    records = {step.stage.kind.name: run.record(step) or {} for step in run.steps}
    assert records["generate"]["facts"]["labels"] == {"closed": 4, "total": 4}
    thinking = [row for row in results["rows"] if row["checkpoint"] == "thinking"]
    assert [row["closed_traces"] for row in thinking] == [1.0, 1.0]  # the rebuilt one closes its traces, too
    # Two checkpoints are left and no copy of either; at its peak a run has no more than what check_disk asks for.
    assert size(folder / "runs") < 2.2 * weights
    assert most[0] < 3 * 1.05 * weights
    # A checkpoint is mapped, not copied: what answers takes its weights once, and imports.
    assert records["evaluate"]["peak_memory_mb"] * 2**20 < weights + 1.0 * GB
    assert records["distill"]["peak_memory_mb"] * 2**20 < 3.5 * weights
    assert records["reconstruct"]["peak_memory_mb"] * 2**20 < 3.7 * weights
    for name, record in records.items():
        print(f"{name}: {record['wall_s']:.0f} s, {record['cpu_s']:.0f} CPU s, {record['peak_memory_mb']:.0f} MiB")
    print(f"disk: {most[0] / GB:.2f} GB at its peak, {size(folder / 'runs') / GB:.2f} GB left")

    # Asked again, nothing is read again: sizes and times are enough.
    hashed.clear()
    again = prepared(file, folder / "runs", view=view)
    assert not hashed
    assert not loop.pending(again)
