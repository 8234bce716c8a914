"""How many updates and prompts each way of teaching the instruct checkpoint needs, on `mini_math`, over several seeds.

    python benchmarks/on_policy_sample_efficiency.py [--seeds 3 --updates 150 --out runs/sample_efficiency]

    answer_only     the thinking checkpoint's answers, traces removed (instruct_distill.yml)
    on_policy_plain reverse KL on the student's rollouts; the teacher is the thinking checkpoint on the student's prompt
    on_policy_trace the same, the teacher reading its own trace first (on_policy_kl.yml)
    on_policy_jsd   as on_policy_trace, minimising JSD(β = 0.5)
    warm_trace      a third of the updates answer-only, the rest on_policy_trace
    grpo            Axolotl's GRPO, exact-match reward on the gold answer, 8 completions a prompt

Every method trains the same LoRA in float32 on the same 1,200 prompts, 64 sequences an update; learning rates are
each method's best of a search (`LEARNING_RATES`, docs/results.md). Accuracy is greedy, on the 200 held-out
questions, graded as the lm-eval task does. Finished runs are kept in --out and not run again. Writes the curves as
JSON and SVG there, and ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import yaml

from harness.tools import Tools

ROOT = Path(__file__).resolve().parent.parent
RECIPES, TASK = ROOT / "recipes", ROOT / "tasks" / "mini_math"
HERE = Path(__file__).stem
os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # GRPO finds its reward here
BATCH, EVERY = 64, 25
LEARNING_RATES = {
    "answer_only": 2e-3,
    "on_policy_plain": 2e-3,
    "on_policy_trace": 2e-3,
    "on_policy_jsd": 2e-3,
    "warm_trace": 2e-3,
    "grpo": 5e-4,
}
LORA = {"adapter": "lora", "load_in_4bit": False, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0}


def gold(question: str) -> int:
    """The answer to "Compute 24+26-13.": only GRPO's reward looks at it."""
    return sum(int(term) for term in re.findall(r"[+-]?\d+", question))


def exact_match(prompts: list[Any], completions: list[Any], answer: list[int], **_: Any) -> list[float]:
    """GRPO's reward: 1 where the boxed integer is the gold one."""
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    found = [re.search(r"\\boxed\{(-?\d+)\}", text) for text in texts]
    return [float(bool(box) and int(box.group(1)) == right) for box, right in zip(found, answer, strict=True)]


def as_prompt(cfg: Any, *_: Any, **__: Any) -> Any:
    """GRPO's dataset: a row as Axolotl's `rl: grpo` wants it."""
    return lambda row, tokenizer=None: {"prompt": row["messages"], "answer": row["answer"]}, {
        "remove_columns": ["messages"]
    }


def recipe(method: str, start: Path, labels: Path, folder: Path, updates: int, seed: int, **changes: Any) -> Path:
    """One method as a native recipe; a block of `changes` is laid over the recipe's."""
    on_policy = method not in ("answer_only", "grpo")
    settings = yaml.safe_load((RECIPES / ("on_policy_kl.yml" if on_policy else "instruct_distill.yml")).read_text())
    settings.update(
        LORA,
        base_model=str(start),
        output_dir=str(folder),
        dataset_prepared_path=str(folder / "prepared"),
        seed=seed,
        micro_batch_size=BATCH,
        gradient_accumulation_steps=1,
        max_steps=updates,
        num_epochs=1000,
        learning_rate=LEARNING_RATES[method],
        save_strategy="steps",
        save_steps=EVERY,
        save_only_model=True,
        logging_steps=EVERY,
    )
    settings["datasets"][0]["path"] = str(labels)
    if on_policy:
        block = settings["on_policy_kl"]
        block.update(teacher=str(RECIPES / "mini/thinking"), show_every=0)
        block.update({"on_policy_plain": {"context": "prompt"}, "on_policy_jsd": {"divergence": "jsd"}}.get(method, {}))
    if method == "grpo":
        for key in ("plugins", "trace_stripping"):
            settings.pop(key)
        settings["datasets"] = [
            {
                "path": str(labels.with_name("grpo.jsonl")),
                "ds_type": "json",
                "split": "train",
                "type": f"{HERE}.as_prompt",
            }
        ]
        settings.update(
            rl="grpo",
            trl={
                "num_generations": 8,
                "max_completion_length": 16,
                "reward_funcs": [f"{HERE}.exact_match"],
                "use_vllm": False,
                "beta": 0.0,
                "temperature": 1.0,
            },
        )
    for key, value in changes.items():
        settings[key] = {**settings[key], **value} if isinstance(value, dict) else value
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yml").write_text(yaml.safe_dump(settings))
    return folder / "recipe.yml"


def evaluate(start: str, folder: str) -> None:
    """In a child: the greedy accuracy of every checkpoint of a run, as `curve.json` in its folder."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.spec_from_file_location("answers", ROOT / "tasks" / "answers.py")
    assert spec is not None
    assert spec.loader is not None
    answers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(answers)
    tokenizer = AutoTokenizer.from_pretrained(start, padding_side="left")
    docs = [json.loads(line) for line in (TASK / "test.jsonl").open(encoding="utf-8")]
    chats = [[{"role": "user", "content": doc["question"]}] for doc in docs]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    curve = {}
    checkpoints = sorted(Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for checkpoint in [None, *checkpoints]:
        model = AutoModelForCausalLM.from_pretrained(start)
        if checkpoint:
            model = PeftModel.from_pretrained(model, checkpoint).merge_and_unload()
        with torch.no_grad():
            out = model.eval().generate(**batch, max_new_tokens=24, do_sample=False)
        texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        right = [
            answers.grade_integer({**doc, "trace_opened": False}, [text])["exact_match"]
            for doc, text in zip(docs, texts, strict=True)
        ]
        step = int(checkpoint.name.split("-")[1]) if checkpoint else 0
        curve[step] = sum(right) / len(right)
    (Path(folder) / "curve.json").write_text(json.dumps(curve))


class Lab:
    """Runs methods, each once; finished ones are read back."""

    def __init__(self, out: Path, tools: Tools):
        """`out` keeps every run."""
        self.out, self.tools = out.resolve(), tools
        self.labels = self.out / "labels" / "labels.jsonl"
        if not self.labels.exists():
            self._label()

    def _label(self) -> None:
        """The thinking checkpoint answers the prompts, once for all methods."""
        folder = self.labels.parent
        settings = yaml.safe_load((RECIPES / "generate_labels.yml").read_text())
        settings["model_args"]["pretrained"] = str(RECIPES / "mini/thinking")
        settings.update(tasks=["mini_math_prompts"], output_path=str(folder / "results.json"))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yml").write_text(yaml.safe_dump(settings))
        self.tools.run(["lm_eval", "run", "--config", str(folder / "recipe.yml")], folder / "log.txt")
        (samples,) = folder.glob("samples_mini_math_prompts_*.jsonl")
        rows = [json.loads(line) for line in samples.open(encoding="utf-8")]
        with (folder / "grpo.jsonl").open("w") as file:
            for row in rows:
                messages = row["doc"]["messages"]
                file.write(json.dumps({"messages": messages, "answer": gold(messages[-1]["content"])}) + "\n")
        shutil.move(samples, self.labels)

    def curve(self, name: str, method: str, updates: int, seed: int, **changes: Any) -> dict[int, float]:
        """Held-out accuracy by update of one run."""
        folder = self.out / name
        start, first = RECIPES / "mini/instruct", 0
        if method == "warm_trace":
            first = updates // 3 // EVERY * EVERY
            warm = self.out / f"{name}_warm"
            begun = self.curve(warm.name, "answer_only", first, seed)
            start = warm / "merged"
            if not start.exists():
                recipe_file = str(warm / "recipe.yml")
                command = ["axolotl", "merge-lora", recipe_file, "--lora-model-dir", str(warm)]
                self.tools.run(command, warm / "log.txt")
        if not (folder / "curve.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            file = recipe(method, start, self.labels, folder, updates - first, seed, **changes)
            self.tools.run(["axolotl", "train", str(file), "--launcher", "python"], folder / "log.txt")
            self.tools.call(evaluate, str(start), str(folder), log=folder / "log.txt")
            for checkpoint in folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
        curve = {int(step) + first: value for step, value in json.loads((folder / "curve.json").read_text()).items()}
        return {**begun, **curve} if first else curve


def reached(curve: dict[int, float], target: float) -> float:
    """The first update at which a curve reaches the target, between evaluations by a straight line; inf if none."""
    before: tuple[int, float] | None = None
    for step, value in sorted(curve.items()):
        if value >= target:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (target - before[1]) / max(value - before[1], 1e-9)
        before = (step, value)
    return float("inf")


def interval(values: list[float]) -> list[float]:
    """Mean and the 95 % half-width by Student's t over seeds (nan of one)."""
    from scipy.stats import t

    mean = statistics.fmean(values)
    if len(values) < 2:
        return [round(mean, 4), float("nan")]
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return [round(mean, 4), round(float(half), 4)]


def draw(curves: dict[str, list[dict[int, float]]], path: Path) -> None:
    """The mean curves with the range over seeds, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    for name, runs in curves.items():
        steps = sorted(set.intersection(*(set(run) for run in runs)))
        values = [[run[step] for run in runs] for step in steps]
        (line,) = axes.plot(steps, [statistics.fmean(v) for v in values], marker="o", ms=3, label=name)
        axes.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=line.get_color(), alpha=0.15)
    axes.set(xlabel=f"updates of {BATCH} sequences", ylabel="accuracy on mini_math, held out")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=150)
    parser.add_argument("--methods", default=",".join(LEARNING_RATES))
    parser.add_argument("--out", type=Path, default=Path("runs/sample_efficiency"))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    curves: dict[str, list[dict[int, float]]] = {}
    with Tools(asked.out / "preload.log") as tools:
        tools.wait()
        lab = Lab(asked.out, tools)
        for seed in range(asked.seeds):
            for method in asked.methods.split(","):
                curve = lab.curve(f"{method}_{seed}", method, asked.updates, seed)
                curves.setdefault(method, []).append(curve)
                print(
                    f"seed {seed}  {method:16}",
                    " ".join(f"{value:.3f}" for _, value in sorted(curve.items())),
                    flush=True,
                )
    (asked.out / "curves.json").write_text(json.dumps(curves, indent=1))
    draw(curves, asked.out / "curves.svg")
    last = {name: interval([run[max(run)] for run in runs]) for name, runs in curves.items()}
    best = {name: interval([max(run.values()) for run in runs]) for name, runs in curves.items()}
    summary: dict[str, Any] = {"updates": asked.updates, "seeds": asked.seeds, "final": last, "best": best}
    if "grpo" in curves:
        target = min(max(run.values()) for run in curves["grpo"])
        summary["target"] = target
        summary["updates_to_target"] = {
            name: [round(reached(run, target), 1) for run in runs] for name, runs in curves.items()
        }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
