"""Wall time of whole on-policy steps (rollout, teacher, update) against TRL's DistillationTrainer, in one run.

    python benchmarks/on_policy_step.py [--steps 18 --batch 64 --accumulation 4]

Same student, teacher, prompts, LoRA, batch, sampling and longest answer, in float32; the teacher reads what the student
reads, since TRL's can do nothing else. What is timed is the trainers' own `train_runtime`: no imports, no loading.
Floor: a decoding step per token of the longest rollout, two forwards and a backward. Rounds alternate; the ratio is
that of the medians. Ends with one line of JSON; the bound is 0.8.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from mini_lab import INSTRUCT, LORA, RECIPES, ROOT, THINKING

MAX_NEW_TOKENS, RATE, SEED = 16, 1e-4, 42
os.environ.update(AXOLOTL_DO_NOT_TRACK="1", HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1")


def prompts(count: int) -> list[str]:
    """The shipped training prompts, arithmetic only, so that answers are of one kind."""
    rows = (ROOT / "tasks/mini_math/prompts.jsonl").open(encoding="utf-8")
    return [json.loads(line)["question"] for line in rows][:count]


def ours(folder: Path, steps: int, batch: int, accumulation: int) -> dict[str, float]:
    """`axolotl train` with the plugin; seconds of training, and tokens a rollout."""
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"problem": p}) + "\n" for p in prompts(steps * batch)))
    recipe = yaml.safe_load((RECIPES / "on_policy_kl.yml").read_text())
    recipe.update(
        LORA,
        base_model=str(INSTRUCT),
        datasets=[{"path": str(folder / "prompts.jsonl"), "type": "thinkswitch_plugin.on_policy_kl"}],
        dataset_prepared_path=str(folder / "prepared"),
        output_dir=str(folder / "ours"),
        micro_batch_size=batch // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        learning_rate=RATE,
        logging_steps=steps,
        seed=SEED,
    )
    recipe["on_policy_kl"].update(
        teacher=str(THINKING), context="prompt", divergence="reverse_kl", max_new_tokens=MAX_NEW_TOKENS, show_every=0
    )
    (folder / "ours.yml").write_text(yaml.safe_dump(recipe))
    command = [Path(sys.executable).with_name("axolotl"), "train", folder / "ours.yml", "--launcher", "python"]
    said = subprocess.run(command, check=True, capture_output=True, text=True)
    logs = [ast.literal_eval(line) for line in said.stdout.splitlines() if line.startswith("{'")]
    runtime = next(float(log["train_runtime"]) for log in logs if "train_runtime" in log)
    return {"s": runtime, "length": next(float(log["opd/length"]) for log in logs if "opd/length" in log)}


def trl(folder: Path, steps: int, batch: int, accumulation: int) -> dict[str, float]:
    """TRL's trainer on the same."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.distillation import DistillationConfig, DistillationTrainer

    student, teacher = (AutoModelForCausalLM.from_pretrained(folder) for folder in (INSTRUCT, THINKING))
    rows = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in prompts(steps * batch)]
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=DistillationConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=batch // accumulation,
            gradient_accumulation_steps=accumulation,
            max_steps=steps,
            learning_rate=RATE,
            max_length=256,
            max_completion_length=MAX_NEW_TOKENS,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            beta=1.0,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_steps=steps,
            dataloader_num_workers=0,
            seed=SEED,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(INSTRUCT),
        peft_config=LoraConfig(
            r=LORA["lora_r"],
            lora_alpha=LORA["lora_alpha"],
            lora_dropout=LORA["lora_dropout"],
            target_modules="all-linear",
        ),
    )
    metrics = trainer.train().metrics
    lengths = [log["completions/mean_length"] for log in trainer.state.log_history if "completions/mean_length" in log]
    return {"s": metrics["train_runtime"], "length": lengths[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--batch", type=int, default=64, help="prompts a step")
    parser.add_argument("--accumulation", type=int, default=4, help="micro-batches a step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("trl",), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if asked.only:
            print(json.dumps(trl(folder, asked.steps, asked.batch, asked.accumulation)))
            return
        found: dict[str, list[dict[str, float]]] = {"ours": [], "trl": []}
        for _ in range(asked.rounds):
            found["ours"].append(ours(folder, asked.steps, asked.batch, asked.accumulation))
            command = [sys.executable, *sys.argv, "--only", "trl"]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            found["trl"].append(json.loads(said.stdout.splitlines()[-1]))
            print(f"ours {found['ours'][-1]['s']:.1f} s, TRL {found['trl'][-1]['s']:.1f} s")
    middle = {name: statistics.median(run["s"] for run in runs) for name, runs in found.items()}
    print(
        json.dumps(
            {
                "ratio": round(middle["ours"] / middle["trl"], 3),
                "steps": asked.steps,
                "batch": asked.batch,
                "accumulation": asked.accumulation,
                **{f"{name}_s": [round(run["s"], 2) for run in runs] for name, runs in found.items()},
                **{f"{name}_length": [round(run["length"], 2) for run in runs] for name, runs in found.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
