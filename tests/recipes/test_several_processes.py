"""Distillation in two processes (gloo, on a CPU): what one process computes, and an end for all where one ends."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from safetensors.torch import load_file

from harness.runner import LocalRunner, ToolError

TOGETHER = ("--launcher", "torchrun", "--", "--nproc_per_node=2")
# Adam would turn rounding errors of vanishing gradients into whole steps.
PLAIN = {"optimizer": "sgd", "learning_rate": 0.1, "lr_scheduler": "constant", "warmup_steps": 0, "logging_steps": 1}


def recipe(recipes: Path, folder: Path, name: str, **changes: Any) -> Path:
    """The shipped distillation, of its own rows, made short."""
    written = yaml.safe_load((recipes / "instruct_distill.yml").read_text())
    written["base_model"] = str(recipes / "mini/instruct")
    written["datasets"][0]["path"] = str(recipes / "mini/labels.jsonl")
    places = {"output_dir": str(folder / name), "dataset_prepared_path": str(folder / f"prepared_{name}")}
    (folder / f"{name}.yml").write_text(yaml.safe_dump({**written, **places, **PLAIN, **changes}))
    return folder / f"{name}.yml"


def losses(said: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"'loss': '?([-\d.e]+)'?", said)]


@pytest.mark.slow
def test_two_processes_train_as_one_does(recipes: Path, tool: Callable[..., str], tmp_path: Path) -> None:
    """Though the two get answers of other lengths, and each in two parts: every token counts the same."""
    one = recipe(recipes, tmp_path, "one", micro_batch_size=16, max_steps=4)
    two = recipe(recipes, tmp_path, "two", micro_batch_size=4, gradient_accumulation_steps=2, max_steps=4)
    alone = losses(tool("axolotl", "train", one, "--launcher", "python"))
    together = losses(tool("axolotl", "train", two, *TOGETHER, ACCELERATE_USE_CPU="true"))
    assert len(alone) == 4
    assert together == pytest.approx(alone, rel=1e-4)
    mine, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    for key in (key for key in mine if "lora_B" in key):  # zero before the first step
        assert mine[key].norm() > 1e-4, key
        assert (theirs[key] - mine[key]).norm() < 1e-4 * mine[key].norm(), key


@pytest.mark.slow
def test_a_rank_that_is_killed_takes_the_other_down_at_once(recipes: Path, runner: LocalRunner, tmp_path: Path) -> None:
    endless = recipe(recipes, tmp_path, "endless", micro_batch_size=8, max_steps=100_000, num_epochs=100_000)
    log = tmp_path / "log.txt"
    ended: dict[str, Any] = {}

    def train() -> None:
        command = ["axolotl", "train", str(endless), *TOGETHER]
        try:
            runner.run(command, {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}, log)
        except ToolError as error:
            ended.update(said=str(error), at=time.monotonic())

    thread = threading.Thread(target=train)
    thread.start()
    deadline = time.monotonic() + 300
    while not (log.exists() and "'loss'" in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    below = psutil.Process(os.getpid()).children(recursive=True)
    ranks = [process for process in below if "axolotl.cli.train" in process.cmdline()]
    (second,) = (process for process in ranks if process.environ().get("LOCAL_RANK") == "1")
    second.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    thread.join(60)
    assert not thread.is_alive()
    assert ended["at"] - killed < 15  # a collective's own timeout is 30 minutes
    assert "rank 1 was killed by SIGKILL (out of memory?), and with it the others" in ended["said"]
    assert not any(process.is_running() for process in ranks)
