"""The authors' own Think-at-Hard (thu-nics/TaH), asked by `tah_parity.py` and `tah_speed.py` in its own environment.

Knows the reference's classes and how our checkpoints map onto them; imports nothing of ours. Run by the reference's
Python with its source on the path: `python tah_reference.py JOB.json`. A job names a checkpoint of ours, what to do and
where to put the result; tensors travel as safetensors.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file

BLOCK = {"norm": "layer_norm", "up": "mlp.0", "down": "mlp.3", "skip": "dim_change"}
DECIDER = {
    "read_logits": "logits_projection",
    "combine": "combined_projection",
    "project": "backbone.input_projection",
    "norm": "backbone.output_layer.0",
    "out": "backbone.output_layer.1",
}


def theirs(name: str) -> str:
    """The reference's name of one of our parameters."""
    part, _, rest = name.partition(".")
    if part == "decider":
        if rest.startswith("blocks."):
            _, index, inner, kind = rest.split(".")
            return f"iter_decider.backbone.blocks.{index}.{BLOCK[inner]}.{kind}"
        inner, _, kind = rest.rpartition(".")
        return f"iter_decider.{DECIDER[inner]}.{kind}"
    path, _, kind = rest.rpartition(".")
    if kind in ("lora_A", "lora_B"):
        return f"simple_base_model.base_model.model.{path}.{kind}.default.weight"
    adapted = kind in ("weight", "bias") and path.endswith("_proj")
    return f"simple_base_model.base_model.model.{path}.{'base_layer.' if adapted else ''}{kind}"


def build(folder: Path, **changes: Any) -> Any:
    """Their model with the weights and settings of our checkpoint."""
    from tah.model import TaHForCausalLM
    from tah.model.tah_config import TaHConfig
    from transformers import AutoConfig, AutoModelForCausalLM

    ours = json.loads((folder / "config.json").read_text())
    ours.update(changes)
    text = dict(ours["text_config"])
    text.update(text.pop("rope_parameters", {}))
    config = AutoConfig.for_model(text.pop("model_type"), **text)
    config.torch_dtype = torch.float32
    base = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    learned = ours["decider"] == "learned"
    decider = {
        "topk": ours["mix_top_k"],
        "hidden_states_size": text["hidden_size"],
        "hidden_states_layer_nums": ours["decider_layers"],
        "hidden_dims": ours["decider_hidden"],
        "expansion_factor": ours["decider_expansion"],
        "dropout_rate": 0.0,
        "threshold": ours["threshold"],
        "dtype": torch.float32,
    }
    settings = TaHConfig(
        max_iter=ours["max_depth"],
        iter_decider="MLPIterDecider" if learned else "IterLabelDecider",
        iter_decider_kwargs=decider if learned else {},
        eval_iter_decider="iter_decider",
        input_updater_kwargs={"topk": ours["mix_top_k"]},
        adapter_kwargs={
            "r": ours["lora_r"],
            "lora_alpha": ours["lora_alpha"],
            "lora_dropout": 0.0,
            "target_modules": "all-linear",
            "bias": "none",
        },
        train_loss="IterDeciderLoss" if learned else "NextTokenPredLoss",
        train_loss_kwargs={"pos_weight": ours.get("pos_weight", 1.0)} if learned else {},
        eval_loss="NextTokenPredLoss",
    )
    model = TaHForCausalLM(base, settings)
    weights = {theirs(name): value for name, value in load_file(folder / "model.safetensors").items()}
    if not learned:
        weights = {name: value for name, value in weights.items() if not name.startswith("iter_decider")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    # The head is tied, the threshold is a setting, and their decider for evaluation is the same module by another name.
    left = [
        name
        for name in missing
        if not name.endswith(("lm_head.weight", "threshold")) and not name.startswith("eval_iter_decider")
    ]
    if left or unexpected:
        raise SystemExit(f"weights do not map: {left[:3]} {unexpected[:3]}")
    base.tie_weights()
    # With labels and no token that continues, theirs sends one on by chance; the methods do not say so.
    model._force_one_continuation = lambda decision, *_: decision
    return model


def forward(job: dict[str, Any]) -> None:
    """Logits, depths, and with labels the loss and its gradients under our names."""
    given = load_file(job["inputs"])
    model = build(Path(job["checkpoint"]), **job["changes"])
    model.train(job["train"])
    labels = given.get("labels")
    out = model(
        given["input_ids"],
        attention_mask=given["attention_mask"],
        labels=labels,
        iter_count_labels=given.get("target_depth"),
    )
    result = {"logits": out.logits.detach().contiguous(), "depth": out.iter_count}
    if job["train"]:
        out.loss.backward()
        result["loss"] = out.loss.detach()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        for name in load_file(Path(job["checkpoint"]) / "model.safetensors"):
            if theirs(name) in gradients:
                result[f"grad.{name}"] = gradients[theirs(name)].contiguous()
    save_file(result, job["result"])


def decode(job: dict[str, Any]) -> None:
    """Greedy decoding in inference mode, as ours: the tokens, and seconds of each run."""
    from tah.model.utils import TaHForCasualLM_generate

    torch.set_num_threads(job["threads"])
    model = build(Path(job["checkpoint"]), **job["changes"]).eval().to(job["device"])
    ids = load_file(job["inputs"])["input_ids"].to(job["device"])
    tokenizer = SimpleNamespace(eos_token_id=None, decode=lambda _: "")
    seconds = []
    for _ in range(job["runs"] + 1):
        begun = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()), torch.inference_mode():
            tokens, _ = TaHForCasualLM_generate(
                model,
                tokenizer,
                {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
                max_new_tokens=job["new_tokens"],
                do_sample=False,
                verbose=False,
            )
        wait(job)
        seconds.append(time.perf_counter() - begun)
    save_file({"tokens": torch.tensor(tokens), "seconds": torch.tensor(seconds[1:])}, job["result"])


def wait(job: dict[str, Any]) -> None:
    """A card computes on when Python goes on: a time is taken when it is done."""
    if job["device"] != "cpu":
        torch.cuda.synchronize()


def step(job: dict[str, Any]) -> None:
    """Forward and backward of stage 1: seconds of each run."""
    torch.set_num_threads(job["threads"])
    model = build(Path(job["checkpoint"]), **job["changes"]).train().to(job["device"])
    given = {name: value.to(job["device"]) for name, value in load_file(job["inputs"]).items()}
    seconds = []
    for _ in range(job["runs"] + 1):
        begun = time.perf_counter()
        out = model(
            given["input_ids"],
            attention_mask=given["attention_mask"],
            labels=given["labels"],
            iter_count_labels=given["target_depth"],
        )
        out.loss.backward()
        wait(job)
        seconds.append(time.perf_counter() - begun)
        loss = out.loss.detach().cpu()
        del out
        model.zero_grad()
    save_file({"seconds": torch.tensor(seconds[1:]), "loss": loss}, job["result"])


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text())
    {"forward": forward, "decode": decode, "step": step}[asked["do"]](asked)
