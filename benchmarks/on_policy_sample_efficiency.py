r"""How many updates and prompts each way of teaching the instruct checkpoint needs, on `mini_math`, over several seeds.

    python benchmarks/on_policy_sample_efficiency.py [--seeds 3 --updates 150 --prompts 1200 --out FOLDER]
    python benchmarks/on_policy_sample_efficiency.py --methods answer_only,on_policy_jsd --updates 16 --rate 1.4e-3 \
        --warmup 8

    answer_only      the thinking checkpoint's answers, traces removed (instruct_distill.yml)
    on_policy_plain  reverse KL on the student's rollouts; the thinking checkpoint judges, on the student's prompt
    on_policy_trace  the same, the teacher reading its own trace first (on_policy_kl.yml)
    on_policy_jsd    as on_policy_trace, minimising JSD (β = 0.5) instead of reverse KL
    warm_jsd         a third of the updates answer-only, the rest on_policy_jsd
    grpo             Axolotl's GRPO, exact-match reward on the gold answer, 8 completions a prompt

Every method trains the same LoRA in float32 on the same prompts, 64 sequences an update; learning rates are
each method's best of a search (`RATES`, docs/results.md). Accuracy is greedy, on the 200 held-out questions, graded as
the lm-eval task does. Finished runs are kept in --out and not run again. Writes the curves as JSON and SVG there, and
ends with one line of JSON: `updates_to_target` counts to the worst seed's best of GRPO.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
from pathlib import Path
from typing import Any

from mini_lab import INSTRUCT, Lab, mean_and_interval, start_runner

HERE = Path(__file__).stem
os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # GRPO finds its reward here
TASK = "mini_math"
BATCH = 64  # sequences an update
EVERY = 25  # updates between two scores
RATES = {
    "answer_only": 2e-3,
    "on_policy_plain": 2e-3,
    "on_policy_trace": 2e-3,
    "on_policy_jsd": 2e-3,
    "warm_jsd": 2e-3,
    "grpo": 2e-4,
}
BLOCKS = {
    "on_policy_plain": {"context": "prompt", "divergence": "reverse_kl"},
    "on_policy_trace": {"divergence": "reverse_kl"},
    "on_policy_jsd": {"divergence": "jsd"},
}


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


def first_prompts(labels: Path, count: int) -> Path:
    """The first prompts of a file, with their labels, as a file."""
    lines = labels.read_text(encoding="utf-8").splitlines(keepends=True)
    if count >= len(lines):
        return labels
    some = labels.with_name(f"{labels.stem}_{count}.jsonl")
    some.write_text("".join(lines[:count]), encoding="utf-8")
    return some


def curve(lab: Lab, method: str, updates: int, prompts: int, seed: int, **changes: Any) -> dict[int, float]:
    """Held-out accuracy by update of one run."""
    name = f"{method}_{prompts}_{updates}_{seed}" + "".join(f"_{key}_{value}" for key, value in changes.items())
    name = re.sub(r"[^\w.-]+", "_", name)
    settings: dict[str, Any] = {
        "micro_batch_size": BATCH,
        "max_steps": updates,
        "num_epochs": 1000,
        "learning_rate": RATES[method],
        "save_strategy": "steps",
        "save_steps": min(EVERY, updates),
        "logging_steps": min(EVERY, updates),
        **changes,
    }
    labels = first_prompts(lab.labels(TASK), prompts)
    if method == "grpo":
        asked = labels.with_name(f"grpo_{prompts}.jsonl")
        rows = [json.loads(line)["doc"]["messages"] for line in labels.open(encoding="utf-8")]
        asked.write_text(
            "".join(json.dumps({"messages": row, "answer": gold(row[-1]["content"])}) + "\n" for row in rows)
        )
        reward = {
            "num_generations": 8,
            "max_completion_length": 16,
            "reward_funcs": [f"{HERE}.exact_match"],
            "use_vllm": False,
            "beta": 0.0,
            "temperature": 1.0,
        }
        data = [{"path": str(asked), "ds_type": "json", "split": "train", "type": f"{HERE}.as_prompt"}]
        settings.update(plugins=None, trace_stripping=None, rl="grpo", trl=reward, datasets=data)
    if method == "warm_jsd":
        if updates < 3 * EVERY:
            raise SystemExit(f"warm_jsd: {updates} updates cannot be parted; give at least {3 * EVERY}")
        first = updates // 3 // EVERY * EVERY
        begun = curve(lab, "answer_only", first, prompts, seed, lr_scheduler="constant")
        warm = lab.merge(lab.out / f"answer_only_{prompts}_{first}_{seed}_lr_scheduler_constant")
        settings.update(max_steps=updates - first, on_policy_kl=BLOCKS["on_policy_jsd"])
        folder = lab.train(name, "on_policy_kl", warm, [labels], seed, **settings)
        return {**begun, **{step + first: value for step, value in lab.curve(warm, folder, TASK).items() if step}}
    if method in BLOCKS:
        settings["on_policy_kl"] = {**BLOCKS[method], **settings.get("on_policy_kl", {})}
    recipe = "on_policy_kl" if method in BLOCKS else "instruct_distill"
    return lab.curve(INSTRUCT, lab.train(name, recipe, INSTRUCT, [labels], seed, **settings), TASK)


def reached(found: dict[int, float], target: float) -> float:
    """The first update at which a curve reaches the target, between evaluations by a straight line; inf if none."""
    before: tuple[int, float] | None = None
    for step, value in sorted(found.items()):
        if value >= target:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (target - before[1]) / max(value - before[1], 1e-9)
        before = (step, value)
    return float("inf")


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
        low, high = [min(v) for v in values], [max(v) for v in values]
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15)
    axes.set(xlabel=f"updates of {BATCH} sequences", ylabel="accuracy on mini_math, held out")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=150)
    parser.add_argument("--prompts", type=int, default=1200)
    parser.add_argument("--methods", default=",".join(RATES))
    parser.add_argument("--rate", type=float, help="learning rate instead of each method's own")
    parser.add_argument("--warmup", type=int, help="updates of warm-up instead of the recipe's")
    parser.add_argument("--out", type=Path, default=Path("runs/sample_efficiency"))
    asked = parser.parse_args()
    curves: dict[str, list[dict[int, float]]] = {}
    changes = {"learning_rate": asked.rate, "warmup_steps": asked.warmup}
    changes = {key: value for key, value in changes.items() if value is not None}
    with start_runner(asked.out) as runner:
        lab = Lab(asked.out, runner)
        for seed in range(asked.seeds):
            for method in asked.methods.split(","):
                found = curve(lab, method, asked.updates, asked.prompts, seed, **changes)
                curves.setdefault(method, []).append(found)
                line = " ".join(f"{value:.3f}" for _, value in sorted(found.items()))
                print(f"seed {seed}  {method:16} {line}", flush=True)
    curves_file = asked.out / f"curves_{asked.prompts}_{asked.updates}.json"
    curves_file.write_text(json.dumps(curves, indent=1))
    draw(curves, curves_file.with_suffix(".svg"))
    summary: dict[str, Any] = {"updates": asked.updates, "prompts": asked.prompts, "seeds": asked.seeds}
    summary["final"] = {name: mean_and_interval([run[max(run)] for run in runs]) for name, runs in curves.items()}
    if "grpo" in curves:
        target = min(max(run.values()) for run in curves["grpo"])
        to_target = {name: [round(reached(run, target), 1) for run in runs] for name, runs in curves.items()}
        summary.update(target=target, updates_to_target=to_target)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
