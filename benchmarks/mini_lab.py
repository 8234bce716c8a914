"""What the experiments on the embedded pair share: labels, a training, a score.

Knows the recipes, the two domains, `harness.runner`, whose forks save the imports, and `harness.store`: labels,
trainings and scores are kept under the hash of all they read, as the loop's stages are, and not made again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from harness import asking, tasks
from harness.files import write_json
from harness.loop import code_of, versions
from harness.runner import LocalRunner, has_accelerator
from harness.stages import OWN, RECIPE, External, Keys, Kind, Source, Stage, distill, dump, placed, slot
from harness.store import Known, Store, is_checkpoint

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


ASK = Kind("labels", "thinking answers", asking.TOOLS)
TRAIN = Kind("trained", "a checkpoint learns", distill.TOOLS)
LEFT, MERGED = "left", "left/merged"  # what a training leaves, in its stage's folder


class Lab:
    """Labels, trainings and scores, each made once."""

    def __init__(self, out: Path, runner: LocalRunner):
        """`out` keeps everything."""
        self.out, self.runner = out.resolve(), runner
        self.store, self.known = Store(self.out / "stages"), Known(self.out / ".known.json")
        self.keys = Keys(versions(tuple(dict.fromkeys((*ASK.tools, *TRAIN.tools)))))

    def labels(self, task: str) -> Path:
        """The thinking checkpoint's answers to a domain's training prompts, as lm-eval logs them."""
        name = f"{task}_prompts"
        settings = yaml.safe_load((RECIPES / "generate_labels.yml").read_text())
        settings["model_args"]["pretrained"] = slot("thinking")
        settings.update(tasks=[name], output_path=f"{OWN}/results.json")
        (asked,) = tasks.find([name], None, self.out / ".tasks.json")[name]
        command = ("lm_eval", "run", "--config", f"{OWN}/{RECIPE}")
        inputs = {"thinking": External(str(THINKING), self.known.checkpoint(THINKING))}
        folder = self.made(Stage(ASK, {RECIPE: settings}, (command,), inputs, tasks={name: asked.definition}))
        (samples,) = folder.glob(f"samples_{name}_*.jsonl")
        return samples

    def train(self, recipe: str, start: Path, data: list[Path], seed: int, merge: bool = False, **changes: Any) -> Path:
        """`trained`, in float32 LoRA; on-policy, the thinking checkpoint is the teacher if `changes` name no other."""
        same = {**LORA, "base_model": str(start), "seed": seed, "save_only_model": True, "save_total_limit": 1000}
        if recipe == "on_policy_kl":
            changes["on_policy_kl"] = {"teacher": str(THINKING), "show_every": 0, **changes.pop("on_policy_kl", {})}
        return self.trained(recipe, data, merge, **{**same, **changes})

    def trained(
        self, recipe: str, data: list[Path], merge: bool = False, threads: int | None = None, **changes: Any
    ) -> Path:
        """The folder of a shipped recipe's training, made once: `left/` in it is an adapter, or a whole checkpoint.

        Args:
            recipe: its name, without `.yml`.
            data: files for the recipe's first dataset entry.
            merge: merge the adapter, into `left/merged/`.
            threads: of its arithmetic; None for as many as the tool takes.
            changes: keys of the recipe; a mapping is laid over the recipe's own, None takes a key out. A path in them
                is known by what lies there.
        """
        settings = yaml.safe_load((RECIPES / f"{recipe}.yml").read_text())
        settings["datasets"] = [{**settings["datasets"][0], "path": str(file)} for file in data]
        for key, value in changes.items():
            settings[key] = {**settings.get(key, {}), **value} if isinstance(value, Mapping) else value
        settings.update(output_dir=f"{OWN}/{LEFT}", dataset_prepared_path=f"{OWN}/prepared")
        settings = {key: value for key, value in settings.items() if value is not None}
        inputs: dict[str, Source] = {}
        file = f"{OWN}/{RECIPE}"
        commands = [("axolotl", "train", file, "--launcher", "python")]
        if merge:
            commands.append(("axolotl", "merge-lora", file, "--lora-model-dir", f"{OWN}/{LEFT}"))
        stage = Stage(TRAIN, {RECIPE: self.reading(settings, inputs)}, tuple(commands), inputs)
        return self.made(stage, {} if threads is None else {"OMP_NUM_THREADS": str(threads)})

    def reading(self, value: Any, inputs: dict[str, Source]) -> Any:
        """A recipe with a stand-in for every file and checkpoint it names, which goes to `inputs` with what it is."""
        if isinstance(value, dict):
            return {key: self.reading(inner, inputs) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.reading(inner, inputs) for inner in value]
        if isinstance(value, str) and value.startswith("/"):
            path = Path(value)
            if path.is_file() or (path.is_dir() and is_checkpoint(path)):
                name = f"input{len(inputs)}"
                inputs[name] = External(value, self.known.path(path))
                return slot(name)
        return value

    def made(self, stage: Stage, environment: Mapping[str, str] = {}) -> Path:
        """A stage's folder, done now or before."""
        key = self.keys[stage]
        folder = self.store.folder(key)
        if self.store.record(key) is None:
            self.store.clear(key)
            paths = {"stage": str(folder)}
            paths |= {name: source.path for name, source in stage.inputs.items() if isinstance(source, External)}
            for name, recipe in stage.recipes.items():
                (folder / name).write_text(dump(placed(recipe, paths)), encoding="utf-8")
            for command in placed(stage.commands, paths):
                self.runner.run(command, environment, folder / "log.txt")
            shutil.rmtree(folder / "prepared", ignore_errors=True)
            self.store.finish(key, {"reads": self.keys.material(stage)})
            self.known.save()
        return folder

    def scored(self, reads: Mapping[str, Any], score: Callable[[], Any]) -> Any:
        """What `score` returns, plain data, kept under the hash of what it reads and of the code that scores."""
        code = code_of([Path(score.__code__.co_filename), ROOT / "tasks/answers.py", RECIPES / "mini/world.py"])
        said = {**reads, "code": code, "tools": self.keys.versions}
        name = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:20]
        file = self.out / "scores" / f"{name}.json"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, {"reads": said, "found": score()})
        return json.loads(file.read_text(encoding="utf-8"))["found"]

    def curve(self, start: Path, folder: Path | None, task: str, questions: int = world.TEST) -> dict[int, float]:
        """Greedy held-out accuracy by update: of `start`, at 0, and of every adapter that a training saved."""
        reads = {"start": self.known.checkpoint(start), "trained": folder and folder.name, "task": task, "n": questions}
        found = self.scored(reads, lambda: score_checkpoints(start, folder and folder / LEFT, task, questions))
        return {int(step): value for step, value in found.items()}

    def score(self, checkpoint: Path, task: str, questions: int = world.TEST) -> float:
        """Greedy held-out accuracy of one checkpoint."""
        return self.curve(checkpoint, None, task, questions)[0]


def score_checkpoints(start: Path, folder: Path | None, task: str, questions: int) -> dict[int, float]:
    """Accuracy of `start`, at 0, and of every `checkpoint-N` adapter in a folder, if there is one, at N.

    The questions are the first of the domain's test split; 200 of them are the task's.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    grade = getattr(module(ROOT / "tasks/answers.py"), GRADERS[task])
    tokenizer = AutoTokenizer.from_pretrained(start, padding_side="left")
    docs = world.test_rows(task, questions)
    saved = {int(path.name.split("-")[1]): path for path in (folder.glob("checkpoint-*") if folder else ())}
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
