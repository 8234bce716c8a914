"""Peak memory on the CPU as the plan predicts it, beside what the command then used, step by step.

    python benchmarks/plan_memory.py [--only embedded] [--record]

The shipped recipes on the embedded pair, eight steps each, and the same on two random checkpoints of Qwen3-0.6B's
shape, two steps of four rows. These are made in a temporary folder, 2.4 GB; Think-at-Hard then takes 12 GB of memory.
Predicted is what `ts-loop plan` asks for; the rows are here and so are measured, and `axolotl tah-label` has counted
the hard tokens. Of an evaluation prompts and answers are as long as they were, not as the plan's ceiling has them.
Used is the peak resident memory that the loop notes of a command, a fork of a process that has imported the tools; the
embedded pair's is the median of three runs. Ends with one line of JSON: MiB by checkpoint and step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from mini_lab import INSTRUCT, RECIPES, ROOT, THINKING, module
from record import Recorder

from harness import asking, card
from harness.config import read_yaml
from harness.costs import forecast
from harness.costs.estimate import asking_memory, merging_memory
from harness.costs.forecast import Device
from harness.costs.shape import read_shape
from harness.runner import LocalRunner

MIB = 2**20
ANSWER = 96  # tokens, all of which each answer of an evaluation takes
os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1")


@dataclass(frozen=True)
class Size:
    """A pair, what its recipes are changed by, and how often each command is run."""

    instruct: Path
    thinking: Path
    data: Path
    times: int
    training: dict[str, Any]
    on_policy: dict[str, Any]
    questions: int
    dtype: str


def embedded() -> Size:
    """The pair that comes with the recipes."""
    return Size(INSTRUCT, THINKING, RECIPES / "mini/labels.jsonl", 3, {"max_steps": 8}, {}, 200, "float32")


def true_shape(folder: Path) -> Size:
    """A random one, and as many rows as its two steps learn from."""
    pair = module(ROOT / "tests/harness/true_shape.py").pair(RECIPES, folder)
    data = folder / "labels.jsonl"
    data.write_text("".join((RECIPES / "mini/labels.jsonl").read_text().splitlines(keepends=True)[:8]))
    training = {"micro_batch_size": 4, "max_steps": 2}
    return Size(**pair, data=data, times=1, training=training, on_policy={"teacher_load_in_4bit": True}, questions=16,
                dtype="bfloat16")  # fmt: skip


class Bench:
    """Runs a size's steps in a folder."""

    def __init__(self, size: Size, folder: Path, runner: LocalRunner, on: Device):
        """`folder` is empty; `on` is the device that is planned for."""
        self.size, self.folder, self.runner, self.on = size, folder, runner, on

    def steps(self) -> Iterator[tuple[str, float, list[float]]]:
        """Each step with its bytes predicted and used."""
        for title, name in (("distil", "instruct_distill"), ("on-policy", "on_policy_kl"), ("TaH", "tah_backbone")):
            recipe = self.recipe(name)
            file = self.written(name, recipe)
            if name == "tah_backbone":
                self.used("axolotl", "tah-label", file)
            yield (
                title,
                forecast.training("", recipe, (1,), self.on).memory,
                self.measured("axolotl", "train", file, "--launcher", "python"),
            )
            if name == "instruct_distill":
                predicted = sum(merging_memory(self.size.instruct, self.on.floor).values())
                yield (
                    "merge",
                    predicted,
                    self.measured("axolotl", "merge-lora", file, "--lora-model-dir", recipe["output_dir"]),
                )
        yield "evaluate", *self.evaluation()

    def recipe(self, name: str) -> dict[str, Any]:
        """A shipped recipe on this pair."""
        recipe = read_yaml(RECIPES / f"{name}.yml") | self.size.training
        recipe["datasets"] = [{**recipe["datasets"][0], "path": str(self.size.data)}]
        recipe |= {"base_model": str(self.size.instruct), "output_dir": str(self.folder / name)}
        recipe["dataset_prepared_path"] = str(self.folder / f"{name}-prepared")
        if block := recipe.get("on_policy_kl"):
            recipe["on_policy_kl"] = {**block, "teacher": str(self.size.thinking), **self.size.on_policy}
        if block := recipe.get("tah"):
            recipe["tah"] = {**block, "reference": str(self.size.instruct)}
        return recipe

    def evaluation(self) -> tuple[float, list[float]]:
        """The thinking checkpoint answers questions, all at once and each to its last token."""
        from transformers import AutoTokenizer

        answers, rows = self.folder / "answers", self.size.questions
        recipe = read_yaml(RECIPES / "evaluate.yml") | {"tasks": ["mini_qa"], "batch_size": rows, "limit": rows}
        recipe["model_args"] = {"pretrained": str(self.size.thinking), "dtype": self.size.dtype}
        recipe |= {"output_path": f"{answers}/results.json", "gen_kwargs": {"min_new_tokens": ANSWER}}
        used = self.measured("lm_eval", "run", "--config", self.written("evaluate", recipe))
        tokenizer = AutoTokenizer.from_pretrained(self.size.thinking)
        prompts = [asking.prompt_of(sample) for sample in asking.samples(answers, "mini_qa")]
        width = ANSWER + max(len(tokenizer(prompt).input_ids) for prompt in prompts)
        shape = read_shape(self.size.thinking)
        return sum(asking_memory(recipe, shape, width, False, self.on.card, self.on.floor).values()), used

    def written(self, name: str, recipe: dict[str, Any]) -> Path:
        """The recipe's file."""
        file = self.folder / f"{name}.yml"
        file.write_text(yaml.safe_dump(recipe))
        return file

    def measured(self, *command: object) -> list[float]:
        """Bytes that a command used at its peak, each time."""
        return [self.used(*command) for _ in range(self.size.times)]

    def used(self, *command: object) -> float:
        """Bytes that a command used at its peak."""
        return self.runner.run([str(word) for word in command], {}, self.folder / "log.txt").peak_mb * MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["embedded", "0.6B"])
    recorder = Recorder(parser)
    asked = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as name:
        on = forecast.device(card.at_hand(), False, None, Path(name) / "plan.json")
        for size in [asked.only] if asked.only else ["embedded", "0.6B"]:
            folder = Path(name) / size
            folder.mkdir()
            pair = embedded() if size == "embedded" else true_shape(folder)
            with LocalRunner(folder / "preload.log", preloaded=True) as runner:
                for step, predicted, used in Bench(pair, folder, runner, on).steps():
                    print(size, step, round(predicted / MIB), [round(one / MIB) for one in used], flush=True)
                    found[size, step] = predicted / MIB, [one / MIB for one in used]
    rows = [
        {"checkpoint": size, "step": step, "predicted": predicted, "used": used, "off": predicted / middle - 1}
        for (size, step), (predicted, used) in found.items()
        for middle in [statistics.median(used)]
    ]
    recorder.keep(asked, "plan_memory", {"unit": "MiB", "floor": on.floor / MIB, "rows": rows})


if __name__ == "__main__":
    main()
