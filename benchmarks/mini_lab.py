"""What the experiments on the embedded pair share: labels, a training, a score.

Knows the recipes, the two domains and `harness.runner`, whose forks save the imports. Every result is kept in the
lab's folder and not made again.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from harness.runner import LocalRunner, has_accelerator

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"
INSTRUCT, THINKING = RECIPES / "mini/instruct", RECIPES / "mini/thinking"
LORA = {"adapter": "lora", "load_in_4bit": False, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
QUESTIONS_AT_ONCE = 200
GRADERS = {"mini_math": "grade_integer", "mini_qa": "grade_decision"}


def module(file: Path) -> ModuleType:
    """A module that is no part of a package."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    loaded = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


world = module(RECIPES / "mini/world.py")


def start_runner(out: Path) -> LocalRunner:
    """What the tools' commands run on, preloaded where that can be; a context manager."""
    out.mkdir(parents=True, exist_ok=True)
    return LocalRunner(out / "preload.log", preloaded=not has_accelerator())


def trained(
    folder: Path, recipe: str, data: list[Path], runner: LocalRunner, threads: int | None = None, **changes: Any
) -> Path:
    """What `axolotl train` leaves of a shipped recipe, trained once: a folder that is done is left as it is.

    Args:
        folder: the `output_dir`.
        recipe: its name, without `.yml`.
        data: files for the recipe's first dataset entry.
        runner: runs the command.
        threads: of its arithmetic; None for as many as the tool takes.
        changes: keys of the recipe; a mapping is laid over the recipe's own, None takes a key out.
    """
    if (folder / "done").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    settings = yaml.safe_load((RECIPES / f"{recipe}.yml").read_text())
    settings.update(output_dir=str(folder), datasets=[{**settings["datasets"][0], "path": str(file)} for file in data])
    for key, value in changes.items():
        settings[key] = {**settings.get(key, {}), **value} if isinstance(value, Mapping) else value
    file = folder / "recipe.yml"
    file.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
    environment = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    runner.run(["axolotl", "train", str(file), "--launcher", "python"], environment, folder / "log.txt")
    (folder / "done").touch()
    return folder


class Lab:
    """Labels, trainings and scores, each made once."""

    def __init__(self, out: Path, runner: LocalRunner):
        """`out` keeps everything."""
        self.out, self.runner = out.resolve(), runner

    def labels(self, task: str) -> Path:
        """The thinking checkpoint's answers to a domain's training prompts, as lm-eval logs them."""
        file = self.out / "labels" / f"{task}.jsonl"
        if not file.exists():
            folder = file.with_suffix("")
            folder.mkdir(parents=True, exist_ok=True)
            settings = yaml.safe_load((RECIPES / "generate_labels.yml").read_text())
            settings["model_args"]["pretrained"] = str(THINKING)
            settings.update(tasks=[f"{task}_prompts"], output_path=str(folder / "results.json"))
            (folder / "recipe.yml").write_text(yaml.safe_dump(settings))
            self.runner.run(["lm_eval", "run", "--config", str(folder / "recipe.yml")], {}, folder / "log.txt")
            (samples,) = folder.glob(f"samples_{task}_prompts_*.jsonl")
            shutil.move(samples, file)
        return file

    def train(self, name: str, recipe: str, start: Path, data: list[Path], seed: int, **changes: Any) -> Path:
        """`trained`, in float32 LoRA; on-policy, the thinking checkpoint is the teacher if `changes` name no other."""
        folder = self.out / name
        same = {
            **LORA,
            "base_model": str(start),
            "dataset_prepared_path": str(folder / "prepared"),
            "seed": seed,
            "save_only_model": True,
            "save_total_limit": 1000,
        }
        if recipe == "on_policy_kl":
            block = {"teacher": str(THINKING), "show_every": 0, **changes.pop("on_policy_kl", {})}
            changes["on_policy_kl"] = block
        trained(folder, recipe, data, self.runner, **{**same, **changes})
        shutil.rmtree(folder / "prepared", ignore_errors=True)
        return folder

    def merge(self, folder: Path) -> Path:
        """The trained adapter merged into its base."""
        if not (folder / "merged").exists():
            command = ["axolotl", "merge-lora", str(folder / "recipe.yml"), "--lora-model-dir", str(folder)]
            self.runner.run(command, {}, folder / "log.txt")
        return folder / "merged"

    def curve(self, start: Path, folder: Path, task: str, questions: int = world.TEST) -> dict[int, float]:
        """Greedy held-out accuracy by update: of `start`, at 0, and of every adapter that a training saved."""
        file = folder / f"curve_{task}.json"
        if not file.exists():
            file.write_text(json.dumps(score_checkpoints(start, folder, task, questions)))
        return {int(step): value for step, value in json.loads(file.read_text()).items()}

    def score(self, checkpoint: Path, task: str, questions: int = world.TEST) -> float:
        """Greedy held-out accuracy of one checkpoint."""
        folder = self.out / "scores" / f"{'_'.join(checkpoint.parts[-2:])}_{questions}"
        folder.mkdir(parents=True, exist_ok=True)
        return self.curve(checkpoint, folder, task, questions)[0]


def score_checkpoints(start: Path, folder: Path, task: str, questions: int) -> dict[int, float]:
    """Accuracy of `start`, at 0, and of every `checkpoint-N` adapter in a folder, at N.

    The questions are the first of the domain's test split; 200 of them are the task's.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    grade = getattr(module(ROOT / "tasks/answers.py"), GRADERS[task])
    tokenizer = AutoTokenizer.from_pretrained(start, padding_side="left")
    docs = world.test_rows(task, questions)
    saved = {int(path.name.split("-")[1]): path for path in folder.glob("checkpoint-*")}
    curve = {}
    for step in (0, *sorted(saved)):
        model = AutoModelForCausalLM.from_pretrained(start)
        if step:
            model = PeftModel.from_pretrained(model, saved[step]).merge_and_unload()
        model.eval()
        right = 0.0
        for at in range(0, len(docs), QUESTIONS_AT_ONCE):
            part = docs[at : at + QUESTIONS_AT_ONCE]
            batch = tokenizer.apply_chat_template(
                [[{"role": "user", "content": doc["question"]}] for doc in part],
                add_generation_prompt=True,
                padding=True,
                return_dict=True,
                return_tensors="pt",
            )
            with torch.no_grad():
                out = model.generate(**batch, max_new_tokens=24, do_sample=False)
            texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            for doc, text in zip(part, texts, strict=True):
                right += grade({**doc, "trace_opened": False}, [text])["exact_match"]
        curve[step] = right / len(docs)
    return curve


def mean_and_interval(values: list[float]) -> list[float]:
    """Mean and the 95 % half-width by Student's t over seeds (0 of a single one)."""
    from scipy.stats import t

    mean = statistics.fmean(values)
    if len(values) < 2:
        return [round(mean, 4), 0.0]
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return [round(mean, 4), round(float(half), 4)]
