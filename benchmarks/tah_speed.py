"""How fast is a token that is sometimes read twice? Beside the authors' own code and beside the plain backbone.

    python benchmarks/tah_speed.py --reference-python VENV/bin/python --reference-source CHECKOUT
        [--only decode,step,big,cost --runs 5] [--record]

On the same weights and machine: greedy decoding on a backbone of 4 layers × 128 at batch 1 and 8 and on one of
Qwen3-0.6B's shape, with a threshold at which about 6 % of tokens continue; a training step of stage 1 on two layers
with Qwen3-0.6B's width and vocabulary; and the cost of a token against the share of tokens that continue. All float32,
on a CPU or by `--device cuda:0` on a card, where a time is taken when the card is done; whatever decodes does so in
inference mode. Rounds: in each, all sides take turns with the same threads, an untimed call before each timed one; a
round's ratio is of what was measured in it. Ends with one line of JSON: `speedup` is our tokens a second over the
reference's, `over_…` our time over another's, each the median over rounds with every round's beside it.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from record import Recorder
from safetensors.torch import save_file
from tah_parity import Reference, random_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM

from thinkswitch_plugin.tah import TaHForCausalLM

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


def warm(run: Callable[[], Any]) -> float:
    """Seconds of a second call."""
    run()
    return seconds(run)


def over(name: str, ours: list[float], others: list[float]) -> dict[str, Any]:
    """Ours over another's round by round, and the median."""
    each = [mine / theirs for mine, theirs in zip(ours, others, strict=True)]
    return {name: median(each), f"{name}_rounds": each}


@torch.inference_mode()
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
    reference: Reference,
    scratch: Path,
    batch: int,
    tokens: int,
    rounds: int,
    shape: dict[str, Any],
    tah: Any,
    device: str,
) -> dict[str, Any]:
    """Tokens a second at 6 %, ours over theirs, and our time over the plain backbone's."""
    folder = scratch / "decode"
    model = random_checkpoint(folder, shape=shape, **tah).to(device)
    ids = torch.randint(1, model.config.text_config.vocab_size, (batch, PROMPT_TOKENS)).to(device)
    share = at_share(model, ids, tokens, 0.06)
    plain = plain_of(model)
    inputs = scratch / "ids.safetensors"
    save_file({"input_ids": ids.cpu()}, inputs)
    mine = greedy(model, ids, tokens).cpu()
    ours, backbone, theirs, alike = [], [], [], []
    for _ in range(rounds):
        ours.append(warm(lambda: greedy(model, ids, tokens)))
        backbone.append(warm(lambda: greedy(plain, ids, tokens)))
        their = reference.ask(
            do="decode",
            checkpoint=str(folder),
            inputs=str(inputs),
            new_tokens=tokens,
            runs=1,
            threads=torch.get_num_threads(),
            changes={"threshold": model.config.threshold},
            device=device,
        )
        theirs.append(float(their["seconds"].min()))
        alike.append(float((their["tokens"] == mine).float().mean()))
    return {
        "share": share,
        "same_tokens": min(alike),
        **over("speedup", theirs, ours),
        **over("over_backbone", ours, backbone),
        "seconds": {"ours": ours, "backbone": backbone, "reference": theirs},
    }


def training_step(reference: Reference, scratch: Path, rounds: int, device: str) -> dict[str, Any]:
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
    given = {name: value.to(device) for name, value in given.items()}
    model.train()
    losses = []

    def step() -> None:
        loss = model(**given).loss
        loss.backward()
        losses.append(float(loss.detach()))
        model.zero_grad()

    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(warm(step))
        their = reference.ask(
            do="step",
            checkpoint=str(folder),
            inputs=str(inputs),
            runs=1,
            threads=torch.get_num_threads(),
            device=device,
        )
        theirs.append(float(their["seconds"].min()))
    return {
        **over("over_reference", ours, theirs),
        "loss_error": abs(losses[-1] / float(their["loss"]) - 1),
        "seconds": {"ours": ours, "reference": theirs},
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
def cost_by_share(scratch: Path, tokens: int, rounds: int, device: str) -> dict[str, Any]:
    """Our time over the backbone's at batch 1, by the share of tokens that continue."""
    model = random_checkpoint(scratch / "cost", shape=BIG, **BIG_TAH).to(device)
    plain = plain_of(model)
    ids = torch.randint(1, BIG["vocab_size"], (1, PROMPT_TOKENS)).to(device)
    assert model.decider is not None
    ratios, shares = [], list(SHARES)
    for _ in range(rounds + 1):  # the first is to warm up
        backbone = seconds(lambda: greedy(plain, ids, tokens))
        row = []
        for at, share in enumerate(SHARES):
            every = Every(share)
            hook = model.decider.register_forward_hook(every)
            row.append(seconds(lambda: greedy(model, ids, tokens)) / backbone)
            hook.remove()
            shares[at] = every.sent / every.seen
        ratios.append(row)
    columns = list(zip(*ratios[1:], strict=True))
    return {"share": shares, "over_backbone": [median(column) for column in columns], "rounds": columns}


def main() -> None:
    """What was asked for, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference-python", required=True)
    parser.add_argument("--reference-source", required=True, type=Path)
    parser.add_argument("--only", default="decode,step,big,cost")
    parser.add_argument("--runs", type=int, default=5, help="rounds")
    parser.add_argument("--device", default="cpu")
    recorder = Recorder(parser)
    asked = parser.parse_args()
    on, rounds = asked.device, asked.runs
    found: dict[str, Any] = {"device": on.partition(":")[0], "threads": torch.get_num_threads()}
    torch.manual_seed(1)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        reference = Reference(asked.reference_python, asked.reference_source, scratch)
        if "decode" in asked.only:
            for batch in (1, 8):
                found[f"decode_batch_{batch}"] = decoding(reference, scratch, batch, 200, rounds, {}, SMALL, on)
        if "step" in asked.only:
            found["training_step"] = training_step(reference, scratch, rounds, on)
        if "big" in asked.only:
            found["decode_0.6b"] = decoding(reference, scratch, 1, 64, rounds, BIG, BIG_TAH, on)
        if "cost" in asked.only:
            found["cost_by_share"] = cost_by_share(scratch, 34, rounds, on)
    recorder.keep(asked, "tah_speed", found, **reference.versions())


if __name__ == "__main__":
    main()
