"""How fast is a token that is sometimes read twice? Beside the authors' own code and beside the plain backbone.

    python benchmarks/tah_speed.py --reference-python VENV/bin/python --reference-source CHECKOUT [--only decode,step]

On the same weights and machine, in one run, each side's best of several: greedy decoding on a backbone of 4 layers ×
128 at batch 1 and 8 and on one of Qwen3-0.6B's shape, with a threshold at which about 6 % of tokens continue; a
training step of stage 1 on two layers with Qwen3-0.6B's width and vocabulary; and the cost of a token against the share
of tokens that continue, as a plot (docs/tah_cost.svg), there the median over rounds in which all take turns. All
float32, on a CPU or by `--device cuda:0` on a card, where a time is taken when the card is done. Ends with one line of
JSON: `speedup` is our tokens a second over the reference's, `over_…` our time over another's.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from tah_parity import Reference, random_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM

from thinkswitch_plugin.tah import TaHForCausalLM

ROOT = Path(__file__).resolve().parent.parent
PROMPT_TOKENS = 16
SHARES = (0.0, 0.06, 0.25, 1.0)
SMALL = {"decider_layers": [1, 2, 3], "decider_hidden": [64, 64]}
BIG = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "initializer_range": 0.02,
}
# As the authors' recipe for Qwen3-0.6B has it.
BIG_TAH = {
    "lora_r": 16,
    "lora_alpha": 32.0,
    "decider_layers": [0, 7, 13, 20, 26],
    "decider_hidden": [256] * 6,
}


def seconds(run: Callable[[], Any]) -> float:
    """How long it takes."""
    begun = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def best(run: Callable[[], Any], runs: int) -> float:
    """Seconds of the fastest of some runs, after one to warm up."""
    run()
    return min(seconds(run) for _ in range(runs))


def greedy(model: Any, ids: Tensor, tokens: int) -> Tensor:
    """`tokens` new tokens by Hugging Face generation, no end token, int64 [B, tokens]."""
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens)
    return out[:, ids.shape[1] :]


def at_share(model: TaHForCausalLM, ids: Tensor, tokens: int, share: float) -> float:
    """Set the threshold so that about `share` of the generated tokens continue; what share did."""

    def read() -> Any:
        return model(torch.cat([ids, greedy(model, ids, tokens)], dim=1))

    model.config.threshold = 1.0
    odds = torch.sigmoid(read().continue_logits[:, ids.shape[1] :]).flatten()
    # Another threshold is another text, so some are tried, until one will do.
    found: dict[float, float] = {}
    for part in (1.0, 0.5, 1.5, 0.75, 0.25, 2.0):
        if found and min(abs(value - share) for value in found.values()) < 0.02:
            break
        threshold = model.config.threshold = float(odds.quantile(max(0.0, 1 - part * share)))
        found[threshold] = float((read().depth[:, ids.shape[1] :] > 1).float().mean())
    model.config.threshold = min(found, key=lambda threshold: abs(found[threshold] - share))
    return found[model.config.threshold]


def plain_of(model: TaHForCausalLM) -> Any:
    """A backbone of the same shape by itself; its answers do not matter."""
    torch.manual_seed(0)
    config = copy.deepcopy(model.config.text_config)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval().to(model.device)


@torch.no_grad()
def decoding(
    reference: Reference | None,
    scratch: Path,
    batch: int,
    tokens: int,
    runs: int,
    shape: dict[str, Any],
    tah: Any,
    device: str,
) -> dict[str, float]:
    """Tokens a second at 6 %, ours over theirs, and our time over the plain backbone's."""
    folder = scratch / "decode"
    model = random_checkpoint(folder, shape=shape, **tah).to(device)
    ids = torch.randint(1, model.config.text_config.vocab_size, (batch, PROMPT_TOKENS)).to(device)
    share = at_share(model, ids, tokens, 0.06)
    plain = plain_of(model)
    found = {"share": round(share, 4)}
    ours = best(lambda: greedy(model, ids, tokens), runs)
    backbone = best(lambda: greedy(plain, ids, tokens), runs)
    ours = min(ours, best(lambda: greedy(model, ids, tokens), runs))
    found["over_backbone"] = round(ours / backbone, 3)
    if reference:
        inputs = scratch / "ids.safetensors"
        save_file({"input_ids": ids.cpu()}, inputs)
        their = reference.ask(
            do="decode",
            checkpoint=str(folder),
            inputs=str(inputs),
            new_tokens=tokens,
            runs=runs,
            threads=torch.get_num_threads(),
            changes={"threshold": model.config.threshold},
            device=device,
        )
        found["same_tokens"] = round(float((their["tokens"] == greedy(model, ids, tokens).cpu()).float().mean()), 4)
        found["speedup"] = round(float(their["seconds"].min()) / ours, 3)
    return found


def training_step(reference: Reference, scratch: Path, runs: int, device: str) -> dict[str, float]:
    """Forward and backward of stage 1: our time over theirs, at 6 % hard tokens of 2 × 256, half of them a prompt."""
    folder = scratch / "step"
    model = random_checkpoint(
        folder, shape={**BIG, "num_hidden_layers": 2}, lora_r=16, decider="oracle", decider_layers=[], decider_hidden=[]
    ).to(device)
    ids = torch.randint(1, BIG["vocab_size"], (2, 256))
    labels = ids.clone()
    labels[:, :128] = -100
    hard = torch.rand(ids.shape) < 0.06
    target = 1 + (hard & (labels != -100)).long()
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "target_depth": target}
    inputs = scratch / "step.safetensors"
    save_file(given, inputs)
    their = reference.ask(
        do="step", checkpoint=str(folder), inputs=str(inputs), runs=runs, threads=torch.get_num_threads(), device=device
    )
    given = {name: value.to(device) for name, value in given.items()}
    model.train()
    losses = []

    def step() -> None:
        loss = model(**given).loss
        loss.backward()
        losses.append(float(loss.detach()))
        model.zero_grad()

    ours = best(step, runs)
    return {
        "over_reference": round(ours / float(their["seconds"].min()), 3),
        "loss_error": float(f"{abs(losses[-1] / float(their['loss']) - 1):.1e}"),
    }


class Every:
    """A hook on the decider, which is computed as ever: of the tokens it is asked about, a share continues, evenly."""

    def __init__(self, share: float):
        self.share, self.seen, self.sent = share, 0, 0

    def __call__(self, decider: Any, given: Any, odds: Tensor) -> Tensor:
        """Log-odds of +-100 instead of `odds`, [N]."""
        until = ((self.seen + torch.arange(len(odds) + 1, device=odds.device)) * self.share).round().long()
        self.seen, self.sent = self.seen + len(odds), int(until[-1])
        return (until.diff() * 200.0 - 100.0).to(odds)


@torch.no_grad()
def cost_by_share(scratch: Path, tokens: int, runs: int, device: str) -> dict[str, list[float]]:
    """Our time over the backbone's at batch 1, by the share of tokens that continue, and the plot."""
    model = random_checkpoint(scratch / "cost", shape=BIG, **BIG_TAH).to(device)
    plain = plain_of(model)
    ids = torch.randint(1, BIG["vocab_size"], (1, PROMPT_TOKENS)).to(device)
    assert model.decider is not None
    rounds, shares = [], list(SHARES)
    for _ in range(runs + 1):
        # In turn, so that a slow minute of the machine is everybody's.
        row = [seconds(lambda: greedy(plain, ids, tokens))]
        for at, share in enumerate(SHARES):
            every = Every(share)
            hook = model.decider.register_forward_hook(every)
            row.append(seconds(lambda: greedy(model, ids, tokens)))
            hook.remove()
            shares[at] = every.sent / every.seen
        rounds.append(row)
    ratios = ([time / backbone for time in times] for backbone, *times in rounds[1:])
    found = {
        "share": [round(share, 3) for share in shares],
        "over_backbone": [round(median(column), 3) for column in zip(*ratios, strict=True)],
    }
    if device == "cpu":
        draw(found)  # the plot in docs/ is the CPU's
    return found


def draw(found: dict[str, list[float]]) -> None:
    """The cost against the share, with the line that counts passes."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.4))
    axes.plot([0, 1], [1, 2], color="0.7", label="1 + share: one backbone pass each")
    axes.plot(found["share"], found["over_backbone"], "o-", label="measured")
    axes.set_xlabel("share of tokens that continue")
    axes.set_ylabel("time a token over the backbone's")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(ROOT / "docs/tah_cost.svg", metadata={"Date": None})


def main() -> None:
    """What was asked for, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference-python", required=True)
    parser.add_argument("--reference-source", required=True, type=Path)
    parser.add_argument("--only", default="decode,step,big,cost")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    on = asked.device
    name_of = torch.cuda.get_device_name(on) if on != "cpu" else "cpu"
    found: dict[str, Any] = {"device": name_of, "threads": torch.get_num_threads()}
    torch.manual_seed(1)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        reference = Reference(asked.reference_python, asked.reference_source, scratch)
        if "decode" in asked.only:
            for batch in (1, 8):
                found[f"decode_batch_{batch}"] = decoding(reference, scratch, batch, 200, asked.runs, {}, SMALL, on)
        if "step" in asked.only:
            found["training_step"] = training_step(reference, scratch, asked.runs, on)
        if "big" in asked.only:
            found["decode_0.6b"] = decoding(reference, scratch, 1, 64, 2, BIG, BIG_TAH, on)
        if "cost" in asked.only:
            found["cost_by_share"] = cost_by_share(scratch, 34, 5, on)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
