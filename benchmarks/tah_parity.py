"""Is it the method? Logits, depths, losses and gradients beside the authors' own code, on the same weights.

    python benchmarks/tah_parity.py --reference-python VENV/bin/python --reference-source CHECKOUT [--record]

The reference (a clone of thu-nics/TaH) needs transformers 4.52.4 and peft 0.15.2, so it runs in an environment of its
own, with this torch: `pip install torch==2.13.0 transformers==4.52.4 peft==0.15.2 accelerate datasets`. Every
case is a random backbone with a random adapter and decider, in float32; an error is the largest difference over the
largest value of its tensor. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from record import Recorder, git
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from thinkswitch_plugin.tah import TaHForCausalLM

HERE = Path(__file__).resolve().parent


class Reference:
    """The authors' code, asked in a process of its own."""

    def __init__(self, python: str, source: Path, scratch: Path):
        """`python` of their environment, `source` their checkout; jobs and results go to `scratch`."""
        self.python, self.source, self.scratch = python, source.resolve(), scratch

    def ask(self, **job: Any) -> dict[str, Tensor]:
        """Run one job of `tah_reference.py`."""
        file, result = self.scratch / "job.json", self.scratch / "result.safetensors"
        file.write_text(json.dumps({"changes": {}, "device": "cpu", **job, "result": str(result)}))
        environment = {**os.environ, "PYTHONPATH": str(self.source), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [self.python, str(HERE / "tah_reference.py"), str(file)], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"the reference failed:\n{done.stderr[-2000:]}")
        return load_file(result)

    def versions(self) -> dict[str, Any]:
        """Its commit and what it runs on, for the record."""
        names = ("torch", "transformers", "peft")
        code = f"from importlib.metadata import version; print(*map(version, {names}))"
        said = subprocess.run([self.python, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout.split()
        on = dict(zip(names, said, strict=True))
        return {"reference": {"thu-nics/TaH": git(self.source, "rev-parse", "HEAD"), **on}}


def random_checkpoint(
    folder: Path, seed: int = 0, shape: dict[str, Any] | None = None, **settings: Any
) -> TaHForCausalLM:
    """A random backbone, of 4 layers × 128 if not of `shape`, with an adapter that is not zero, saved to `folder`."""
    torch.manual_seed(seed)
    small = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 328,
        "initializer_range": 0.15,
    }
    config = AutoConfig.for_model("qwen3", tie_word_embeddings=True, eos_token_id=None, **{**small, **(shape or {})})
    asked = {
        "max_depth": 2,
        "lora_r": 8,
        "lora_alpha": 16.0,
        "lora_dropout": 0.0,
        "decider_layers": [1, 2, 4],
        "decider_hidden": [64, 32],
        "decider_dropout": 0.0,
        "threshold": 0.5,
        **settings,
    }
    model = TaHForCausalLM.from_backbone(AutoModelForCausalLM.from_config(config), **asked)
    for name, parameter in model.named_parameters():
        if name.endswith(".lora_B"):
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    return model.eval()


def batch(side: str) -> dict[str, Tensor]:
    """Four rows of different lengths, with labels from the fourth token on and depths drawn at random."""
    generator = torch.Generator().manual_seed(7)
    lengths, width = (24, 9, 17, 24), 24
    ids = torch.zeros(4, width, dtype=torch.int64)
    mask = torch.zeros(4, width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        where = slice(width - length, None) if side == "left" else slice(length)
        ids[row, where] = torch.randint(1, 328, (length,), generator=generator)
        mask[row, where] = 1
    labels = ids.masked_fill((mask == 0) | (mask.cumsum(1) < 4), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def error(ours: Tensor, their: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((ours - their).abs().max() / their.abs().max().clamp(min=1e-12))


def decider_loss_of_theirs(model: TaHForCausalLM, given: dict[str, Tensor], pos_weight: float) -> Tensor:
    """Their sum of our decisions.

    Ours is the mean over all decisions. Theirs is the mean within each depth, added up over depths and divided once
    more by the number of tokens, padding included: the same decisions, weighted otherwise.
    """
    said: list[Tensor] = []
    hook = model.decider.register_forward_hook(lambda _m, _i, out: said.append(out))  # type: ignore[union-attr]
    out = model(**given)
    hook.remove()
    targets = given["target_depth"][given["attention_mask"].bool()]
    taken = out.depth[given["attention_mask"].bool()]
    total = torch.zeros(())
    for d, odds in enumerate(said, start=1):
        wanted = (targets[taken >= d] > d).float()
        total = total + torch.nn.functional.binary_cross_entropy_with_logits(
            odds, wanted, pos_weight=torch.tensor(pos_weight)
        )
    return total / given["labels"].numel()


def main() -> None:
    """Every case, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference-python", required=True)
    parser.add_argument("--reference-source", required=True, type=Path)
    recorder = Recorder(parser)
    asked = parser.parse_args()
    worst: dict[str, float] = {}
    depths_differ = cases = 0

    def note(kind: str, value: float) -> None:
        worst[kind] = max(worst.get(kind, 0.0), value)

    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        reference = Reference(asked.reference_python, asked.reference_source, scratch)
        inputs = scratch / "inputs.safetensors"
        for depth in (1, 2, 3):
            for side in ("right", "left"):
                given = batch(side)
                drawn = torch.randint(
                    1, depth + 1, given["labels"].shape, generator=torch.Generator().manual_seed(depth)
                )
                given["target_depth"] = drawn.masked_fill(given["attention_mask"] == 0, -100)
                plain = {key: given[key] for key in ("input_ids", "attention_mask")}
                real = given["attention_mask"].bool()

                # As it runs: the learned decider decides.
                folder = scratch / f"learned_{depth}_{side}"
                model = random_checkpoint(folder, max_depth=depth)
                save_file(plain, inputs)
                their = reference.ask(do="forward", checkpoint=str(folder), inputs=str(inputs), train=False)
                with torch.no_grad():
                    out = model(**plain)
                note("logits", error(out.logits[real], their["logits"][real]))
                depths_differ += int((out.depth[real] != their["depth"][real]).sum())

                # Decoding, token by token, against their full forward.
                if side == "left":
                    cache, last = None, []
                    for at in range(plain["input_ids"].shape[1]):
                        with torch.no_grad():
                            out = model(
                                plain["input_ids"][:, at : at + 1],
                                attention_mask=plain["attention_mask"][:, : at + 1],
                                past_key_values=cache,
                                use_cache=True,
                            )
                        cache = out.past_key_values
                        last.append(out.logits)
                    note("cached logits", error(torch.cat(last, 1)[real], their["logits"][real]))

                # Stage 1: the oracle's depths, the loss of the summed logits.
                folder = scratch / f"oracle_{depth}_{side}"
                model = random_checkpoint(
                    folder, max_depth=depth, decider="oracle", decider_layers=[], decider_hidden=[]
                )
                save_file(given, inputs)
                their = reference.ask(do="forward", checkpoint=str(folder), inputs=str(inputs), train=True)
                model.train()
                loss = model(**given).loss
                loss.backward()
                note("stage 1 loss", error(loss.detach(), their["loss"]))
                for key, parameter in model.named_parameters():
                    if f"grad.{key}" in their and parameter.grad is not None:
                        note("stage 1 gradients", error(parameter.grad, their[f"grad.{key}"]))

                # Stage 2: only the decider learns.
                if depth > 1:
                    folder = scratch / f"decider_{depth}_{side}"
                    model = random_checkpoint(folder, max_depth=depth)
                    their = reference.ask(
                        do="forward",
                        checkpoint=str(folder),
                        inputs=str(inputs),
                        train=True,
                        changes={"pos_weight": 5.4},
                    )
                    model.objective, model.pos_weight = "decider", 5.4
                    model.train()
                    loss = decider_loss_of_theirs(model, given, 5.4)
                    loss.backward()
                    note("stage 2 loss", error(loss.detach(), their["loss"]))
                    for key, parameter in model.decider.named_parameters():  # type: ignore[union-attr]
                        note("stage 2 gradients", error(parameter.grad, their[f"grad.decider.{key}"]))
                cases += 1
    figures = {key: float(f"{value:.1e}") for key, value in worst.items()}
    figures = {"cases": cases, "depths_that_differ": depths_differ, **figures, "bound": 1e-4}
    recorder.keep(asked, "tah_parity", figures, **reference.versions())


if __name__ == "__main__":
    main()
