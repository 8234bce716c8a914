"""Whole on-policy steps (rollout, teacher, update) against TRL's DistillationTrainer, step by step in turns.

    python benchmarks/on_policy_step.py [--rounds 5 --steps 20 --batch 64 --accumulation 4 --threads 1]
        [--adapter lora] [--record]

Same student, teacher, prompts, adapter, batch, sampling and longest answer, in float32, but for the student's linear
layers, which are in NF4 as the shipped recipe has them (`--adapter lora`: in float32 as well); the teacher reads what
the student reads, since TRL's can do nothing else. TRL's trainer is run as its documentation does, on its own defaults
where they are not named here. Floor: a decoding step per token of the longest rollout, two forwards and a backward.

A round is two processes, `axolotl train` with the plugin and a script with TRL's trainer, which take turns: one step of
the one, one step of the other, with the other asleep meanwhile, so that what else the machine does falls on both;
which goes first changes from step to step. A
callback of either trainer waits for its turn and takes the time from there to its next step's end, by the clock and by
the processor (all threads of the process). The first steps of a round do not count. A round's ratio is the median over
its pairs of steps. One thread each by default: two that wait for one another measure a shared machine's other work.
Ends with one line of JSON: the median of the rounds' ratios; the bound is 0.8.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from mini_lab import INSTRUCT, LORA, RECIPES, ROOT, THINKING
from record import Recorder
from transformers import TrainerCallback

MAX_NEW_TOKENS, RATE, SEED = 16, 1e-4, 42
WARM_UP_STEPS = 3
TURNS = "ON_POLICY_STEP_TURNS"  # the folder of the two pipes, for the callback
os.environ.update(
    AXOLOTL_DO_NOT_TRACK="1", HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1", HF_HUB_DISABLE_TELEMETRY="1"
)


class Turns(TrainerCallback):
    """Lets one step pass a turn: says how long the last one took, and waits until it is called again."""

    def __init__(self, folder: Path) -> None:
        self.out = (folder / "times").open("w", encoding="utf-8")
        self.turn = (folder / "turn").open(encoding="utf-8")
        self.begun = (0.0, 0.0)

    def wait(self) -> None:
        """Asleep until it is our turn; from then on it is our time."""
        self.turn.readline()
        self.begun = (time.monotonic(), time.process_time())

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """All is loaded."""
        print("ready", file=self.out, flush=True)
        self.wait()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """A step, from the turn to here: what is logged of the step before is in it."""
        wall, cpu = (now - then for now, then in zip((time.monotonic(), time.process_time()), self.begun, strict=True))
        print(wall, cpu, file=self.out, flush=True)
        self.wait()


class TurnsPlugin:
    """The callback for `plugins:` of a recipe; made when Axolotl asks for it."""

    def __new__(cls) -> Any:
        """An Axolotl plugin."""
        from axolotl.integrations.base import BasePlugin

        class Plugin(BasePlugin):
            def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[TrainerCallback]:
                return [Turns(Path(os.environ[TURNS]))]

        return Plugin()


def prompts(count: int) -> list[str]:
    """The shipped training prompts, arithmetic only, so that answers are of one kind."""
    rows = (ROOT / "tasks/mini_math/prompts.jsonl").open(encoding="utf-8")
    some = [json.loads(line)["question"] for line in rows]
    return [some[number % len(some)] for number in range(count)]


def recipe(folder: Path, steps: int, batch: int, accumulation: int, adapter: str) -> Path:
    """The shipped recipe on TRL's terms."""
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"problem": p}) + "\n" for p in prompts(steps * batch)))
    settings = yaml.safe_load((RECIPES / "on_policy_kl.yml").read_text())
    settings.update(
        LORA if adapter == "lora" else {},
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
        plugins=[*settings["plugins"], "on_policy_step.TurnsPlugin"],
    )
    settings["on_policy_kl"].update(
        teacher=str(THINKING), context="prompt", divergence="reverse_kl", max_new_tokens=MAX_NEW_TOKENS, show_every=0
    )
    file = folder / "ours.yml"
    file.write_text(yaml.safe_dump(settings))
    return file


def trl(folder: Path, steps: int, batch: int, accumulation: int, adapter: str) -> None:
    """TRL's trainer on the same."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.distillation import DistillationConfig, DistillationTrainer

    from thinkswitch_plugin.nf4 import nf4

    packed = nf4(torch.float32) if adapter == "qlora" else None  # the numbers that Axolotl has
    student = AutoModelForCausalLM.from_pretrained(INSTRUCT, quantization_config=packed)
    teacher = AutoModelForCausalLM.from_pretrained(THINKING)
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
        callbacks=[Turns(folder)],
    )
    trainer.train()
    lengths = [log["completions/mean_length"] for log in trainer.state.log_history if "completions/mean_length" in log]
    print(f"'opd/length': {lengths[-1]}")


class Side:
    """One of the two processes, and what it has told of its steps."""

    def __init__(self, name: str, folder: Path, command: list[str], threads: int) -> None:
        self.folder, self.times = folder / f"{name}_turns", list[tuple[float, float]]()
        self.folder.mkdir()
        for pipe in ("times", "turn"):
            os.mkfifo(self.folder / pipe)
        environment = {**os.environ, TURNS: str(self.folder), "PYTHONPATH": str(Path(__file__).parent)}
        environment["OMP_NUM_THREADS"] = str(threads)
        self.log = (self.folder / "log.txt").open("w")
        self.process = subprocess.Popen(command, env=environment, stdout=self.log, stderr=subprocess.STDOUT)

    def connect(self) -> None:
        """Wait until it is loaded."""
        self.reader = (self.folder / "times").open(encoding="utf-8")
        self.writer = (self.folder / "turn").open("w", encoding="utf-8")
        self.reader.readline()

    def step(self) -> None:
        """One step of it."""
        print("go", file=self.writer, flush=True)
        wall, cpu = map(float, self.reader.readline().split())
        self.times.append((wall, cpu))

    def finish(self) -> float:
        """The rest of its training; tokens a rollout."""
        self.writer.close()
        if self.process.wait():
            raise SystemExit((self.folder / "log.txt").read_text())
        said = (self.folder / "log.txt").read_text()
        return float(said.rpartition("'opd/length': ")[2].lstrip("'").split("'")[0].split(",")[0].split()[0])


def one_round(folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """The two in turns; medians of their steps in ms, and of the pairs' ratios."""
    sizes = (asked.steps, asked.batch, asked.accumulation, asked.adapter)
    axolotl = str(Path(sys.executable).with_name("axolotl"))
    commands = {
        "ours": [axolotl, "train", str(recipe(folder, *sizes)), "--launcher", "python"],
        "trl": [sys.executable, *sys.argv, "--only-trl-in", str(folder / "trl_turns")],
    }
    sides = {name: Side(name, folder, command, asked.threads) for name, command in commands.items()}
    for side in sides.values():
        side.connect()
    for number in range(asked.steps):
        order = list(sides.values())
        for side in reversed(order) if number % 2 else order:
            side.step()
    lengths = {name: side.finish() for name, side in sides.items()}
    found: dict[str, Any] = {f"{name}_length": round(length, 2) for name, length in lengths.items()}
    for at, kind in enumerate(("wall", "cpu")):
        ours, theirs = ([times[at] for times in side.times[WARM_UP_STEPS:]] for side in sides.values())
        found[f"{kind}_ratio"] = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        found[f"ours_{kind}_ms"], found[f"trl_{kind}_ms"] = (statistics.median(x) * 1e3 for x in (ours, theirs))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help=f"a round; the first {WARM_UP_STEPS} do not count")
    parser.add_argument("--batch", type=int, default=64, help="prompts a step")
    parser.add_argument("--accumulation", type=int, default=4, help="micro-batches a step")
    parser.add_argument("--threads", type=int, default=1, help="of each side's arithmetic")
    parser.add_argument("--adapter", choices=("qlora", "lora"), default="qlora", help="of the student")
    parser.add_argument("--only-trl-in", type=Path, help=argparse.SUPPRESS)
    recorder = Recorder(parser)
    asked = parser.parse_args()
    if asked.only_trl_in:
        trl(asked.only_trl_in, asked.steps, asked.batch, asked.accumulation, asked.adapter)
        return
    rounds = []
    for _ in range(asked.rounds):
        with tempfile.TemporaryDirectory() as scratch:
            rounds.append(one_round(Path(scratch), asked))
        last = rounds[-1]
        print(
            f"ours {last['ours_wall_ms']:.0f} ms a step, TRL {last['trl_wall_ms']:.0f}: {last['wall_ratio']:.3f}; "
            f"of processors {last['ours_cpu_ms']:.0f} and {last['trl_cpu_ms']:.0f}: {last['cpu_ratio']:.3f}"
        )
    sizes = {name: getattr(asked, name) for name in ("steps", "batch", "accumulation", "threads", "adapter")}
    each = {key: [found[key] for found in rounds] for key in rounds[0]}
    medians = {"ratio": statistics.median(each["wall_ratio"]), "cpu_ratio": statistics.median(each["cpu_ratio"])}
    name = f"on_policy_step_{asked.adapter}_{asked.accumulation}"
    recorder.keep(asked, name, {**medians, **sizes, "rounds": each})


if __name__ == "__main__":
    main()
