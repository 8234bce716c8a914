"""Tokens a second of labels: lm-eval's `vllm` from an environment of its own beside `hf` from this one.

    python benchmarks/gpu/labels_speed.py --checkpoint Qwen/Qwen3-4B-Thinking-2507 --other-python .venv-vllm/bin/python
    python benchmarks/gpu/labels_speed.py --checkpoint recipes/mini/thinking --device cpu --dtype float32 \\
        --other-python .venv/bin/python --other-model hf --tokens 8 64 --batch 1    # that it runs, without a card

Each is started as the loop starts it, `lm_eval run --config`, on the same prompts with the same checkpoint, once for
short answers and once for long ones: tokens a second is the difference in tokens over the difference in seconds, so
that imports, loading and CUDA graphs are in neither. The two take turns, and both know how long the long answers may
get: `hf` writes as many at once as `ts-loop init` gives a card for that length, vLLM as many as it sees fit. Ends with
one line of JSON: `speedup` is the median over rounds of the other's tokens a second over `hf`'s, `batch` how many
answers each was told to write at once, `device` the card's name.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from record import Recorder

from harness.card import at_hand
from harness.checks import described_checkpoint
from harness.costs.shape import read_shape
from harness.files import read_json
from harness.own import OVERHEAD, answers_at_once

ROOT = Path(__file__).resolve().parent.parent.parent
PROMPT = 2048  # tokens, beside an answer's
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def recipe(model: str, asked: argparse.Namespace, prompts: Path, tokens: int, out: Path) -> dict[str, Any]:
    """A generate recipe, as `recipes/qwen3_4b` has it."""
    arguments: dict[str, Any] = {"pretrained": asked.checkpoint, "dtype": asked.dtype}
    if model == "vllm":
        arguments |= {"gpu_memory_utilization": 0.9, "max_model_len": max(asked.tokens) + PROMPT}
    return {
        "model": model,
        "model_args": arguments,
        "tasks": ["prompts_file"],
        "metadata": {"prompts_file": str(prompts)},
        "device": asked.device,
        "batch_size": batch_of(model, asked),
        "apply_chat_template": True,
        "predict_only": True,
        "log_samples": True,
        "output_path": str(out / "results.json"),
        "gen_kwargs": {"do_sample": False, "max_gen_toks": tokens},
    }


def batch_of(model: str, asked: argparse.Namespace) -> Any:
    """How many answers a model is told to write at once."""
    return "auto" if model == "vllm" else asked.batch


def planned(asked: argparse.Namespace) -> int:
    """As many answers at once as `ts-loop init` gives the card, were no answer longer than the longest here."""
    folder = described_checkpoint(asked.checkpoint, "checkpoint")
    shape = read_shape(folder)
    config = read_json(folder / "config.json")
    packed = isinstance(config, dict) and "quantization_config" in config  # as `axolotl nf4` leaves it
    room = int(at_hand().memory - shape.weights_bytes(packed, asked.dtype) - OVERHEAD)
    return answers_at_once(shape, room, asked.dtype, max(asked.tokens) + PROMPT)


def run(python: str, settings: dict[str, Any], folder: Path) -> tuple[float, int]:
    """Seconds of one run, and the tokens it wrote."""
    from transformers import AutoTokenizer

    file = folder / "recipe.yml"
    file.write_text(yaml.safe_dump(settings))
    begun = time.monotonic()
    command = [python, "-m", "lm_eval", "run", "--config", str(file)]
    said = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seconds = time.monotonic() - begun
    if said.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{said.stdout[-2000:]}")
    (samples,) = folder.glob("samples_*.jsonl")
    count = AutoTokenizer.from_pretrained(settings["model_args"]["pretrained"])
    texts = [json.loads(line)["resps"][0][0] for line in samples.open(encoding="utf-8")]
    samples.unlink()
    return seconds, sum(len(count(text, add_special_tokens=False).input_ids) for text in texts)


def main() -> None:
    """Both, in turns, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--other-python", required=True)
    parser.add_argument("--other-model", default="vllm")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--batch", type=int, help="answers hf writes at once, if not as init plans it; the recipes for 8 GB have 1"
    )
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, nargs=2, default=(256, 2048), help="of short and of long answers")
    parser.add_argument("--rounds", type=int, default=3)
    recorder = Recorder(parser)
    asked = parser.parse_args()
    asked.batch = asked.batch or planned(asked)
    questions = (ROOT / "tasks/mini_math/prompts.jsonl").read_text(encoding="utf-8").splitlines()[: asked.prompts]
    sides = {"hf": (sys.executable, "hf"), "other": (asked.other_python, asked.other_model)}
    rates: dict[str, list[float]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prompts = folder / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"problem": json.loads(row)["question"]}) + "\n" for row in questions))
        for _ in range(asked.rounds):
            for side, (python, model) in sides.items():
                short, long = (
                    run(python, recipe(model, asked, prompts, tokens, folder), folder) for tokens in asked.tokens
                )
                if long[0] <= short[0]:
                    raise SystemExit(f"{side}: long answers took no longer than short: give --tokens further apart")
                rates[side].append((long[1] - short[1]) / (long[0] - short[0]))
                print(f"{side}: {rates[side][-1]:.1f} tokens a second ({long[1]} tokens in {long[0]:.1f} s)")
    found = {
        "speedup": round(statistics.median(b / a for a, b in zip(rates["hf"], rates["other"], strict=True)), 2),
        "tokens_per_s": {side: round(statistics.median(values), 1) for side, values in rates.items()},
        "rounds": {side: [round(value, 1) for value in values] for side, values in rates.items()},
        "batch": {side: batch_of(model, asked) for side, (_, model) in sides.items()},
        "device": device_name(asked.device),
    }
    recorder.keep(asked, "labels_speed", found)


def device_name(device: str) -> str:
    """The card's, as results are to be recorded with it."""
    import torch

    return torch.cuda.get_device_name(device) if device != "cpu" else "cpu"


if __name__ == "__main__":
    main()
