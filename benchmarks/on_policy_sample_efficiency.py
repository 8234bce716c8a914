r"""How many updates and prompts each way of teaching the instruct checkpoint needs, on `mini_math`, over several seeds.

    python benchmarks/on_policy_sample_efficiency.py [--seeds 3 --updates 150 --prompts 1200 --out FOLDER] [--record]
    python benchmarks/on_policy_sample_efficiency.py --methods answer_only,on_policy_jsd --updates 16 --rate 1.4e-3 \
        --warmup 8 --beside-grpo
    python benchmarks/on_policy_sample_efficiency.py --methods answer_only,on_policy_jsd --prompts 256
    python benchmarks/on_policy_sample_efficiency.py --methods on_policy_jsd,on_policy_forward,on_policy_trace --seeds 1

    answer_only      the thinking checkpoint's answers, traces removed (instruct_distill.yml)
    on_policy_plain  reverse KL on the student's rollouts; the thinking checkpoint judges, on the student's prompt
    on_policy_trace  the same, the teacher reading its own trace first (on_policy_kl.yml)
    on_policy_jsd    as on_policy_trace, minimising JSD (β = 0.5) instead of reverse KL; on_policy_forward, forward KL
    warm_jsd         a third of the updates answer-only, the rest on_policy_jsd
    grpo             Axolotl's GRPO, exact-match reward on the gold answer, 8 completions a prompt

Every method trains the same LoRA in float32 on the same prompts, 64 sequences an update; learning rates are
each method's best of a search (`RATES`, docs/results.md). Accuracy is greedy, on the 200 held-out questions, graded as
the lm-eval task does. Finished runs are kept in --out, by all they read, and not run again. Ends with one line of JSON:
the curves; `updates_to_target`, to the worst seed's best of GRPO; with `--beside-grpo`, the updates after which GRPO's
curve of 150 is where each method ends on average, seed by seed, and `ratio`, how many of the method's updates are one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
from pathlib import Path
from typing import Any

from mini_lab import INSTRUCT, MERGED, Lab, mean_and_interval, start_runner
from record import Recorder

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
    "on_policy_forward": 2e-3,
    "warm_jsd": 2e-3,
    "grpo": 2e-4,
}
BLOCKS = {
    "on_policy_plain": {"context": "prompt", "divergence": "reverse_kl"},
    "on_policy_trace": {"divergence": "reverse_kl"},
    "on_policy_jsd": {"divergence": "jsd"},
    "on_policy_forward": {"divergence": "forward_kl"},
}
METHODS = ("answer_only", "on_policy_plain", "on_policy_trace", "on_policy_jsd", "warm_jsd", "grpo")
LONG = 150  # updates of the curves that short schedules are held against


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


def first_prompts(labels: Path, count: int, out: Path) -> Path:
    """The first prompts of a file, with their labels, as a file in `out`."""
    lines = labels.read_text(encoding="utf-8").splitlines(keepends=True)
    if count >= len(lines):
        return labels
    some = out / f"first_{count}.jsonl"
    some.write_text("".join(lines[:count]), encoding="utf-8")
    return some


def curve(lab: Lab, method: str, updates: int, prompts: int, seed: int, **changes: Any) -> dict[int, float]:
    """Held-out accuracy by update of one run."""
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
    labels = first_prompts(lab.labels(TASK), prompts, lab.out)
    if method == "grpo":
        asked = lab.out / f"grpo_{prompts}.jsonl"
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
        constant = {**settings, "max_steps": first, "lr_scheduler": "constant", "learning_rate": RATES["answer_only"]}
        begun = lab.train("instruct_distill", INSTRUCT, [labels], seed, merge=True, **constant)
        warm = begun / MERGED
        settings.update(max_steps=updates - first, on_policy_kl=BLOCKS["on_policy_jsd"])
        folder = lab.train("on_policy_kl", warm, [labels], seed, **settings)
        found = lab.curve(INSTRUCT, begun, TASK)
        return {**found, **{step + first: value for step, value in lab.curve(warm, folder, TASK).items() if step}}
    if method in BLOCKS:
        settings["on_policy_kl"] = {**BLOCKS[method], **settings.get("on_policy_kl", {})}
    recipe = "on_policy_kl" if method in BLOCKS else "instruct_distill"
    return lab.curve(INSTRUCT, lab.train(recipe, INSTRUCT, [labels], seed, **settings), TASK)


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


def band(runs: list[dict[int, float]]) -> dict[int, list[float]]:
    """Mean, least and most over seeds, by update."""
    steps = sorted(set.intersection(*(set(run) for run in runs)))
    values = {step: [run[step] for run in runs] for step in steps}
    return {step: [statistics.fmean(found), min(found), max(found)] for step, found in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=150)
    parser.add_argument("--prompts", type=int, default=1200)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--rate", type=float, help="learning rate instead of each method's own")
    parser.add_argument("--warmup", type=int, help="updates of warm-up instead of the recipe's")
    parser.add_argument("--beside-grpo", action="store_true", help=f"hold them against GRPO's curve of {LONG} updates")
    parser.add_argument("--out", type=Path, default=Path("runs/sample_efficiency"))
    recorder = Recorder(parser)
    asked = parser.parse_args()
    curves: dict[str, list[dict[int, float]]] = {}
    grpo: list[dict[int, float]] = []
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
            if asked.beside_grpo:
                grpo.append(curve(lab, "grpo", LONG, asked.prompts, seed))
    summary: dict[str, Any] = {"updates": asked.updates, "prompts": asked.prompts, "seeds": asked.seeds}
    summary["final"] = {name: mean_and_interval([run[max(run)] for run in runs]) for name, runs in curves.items()}
    summary["mean_low_high"] = {name: band(runs) for name, runs in curves.items()}
    if "grpo" in curves:
        target = min(max(run.values()) for run in curves["grpo"])
        to_target = {name: [reached(run, target) for run in runs] for name, runs in curves.items()}
        summary.update(target=target, updates_to_target=to_target)
    if grpo:
        needs = {name: [reached(run, mean) for run in grpo] for name, (mean, _) in summary["final"].items()}
        ratio = {name: statistics.fmean(found) / asked.updates for name, found in needs.items()}
        summary.update(grpo=grpo, grpo_is_there_after=needs, ratio=ratio)
    name = f"sample_efficiency_{asked.updates}_{asked.prompts}" + ("" if asked.seeds > 1 else "_one_seed")
    recorder.keep(asked, name, {**summary, "curves": curves})


if __name__ == "__main__":
    main()
