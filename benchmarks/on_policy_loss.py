"""Memory and time of the on-policy loss against TRL's and Liger's, on the same tensors, in one run.

    python benchmarks/on_policy_loss.py [--tokens 512 --vocabulary 151936 --width 2560] [--device cpu] [--record]

Floor with a frozen head: three matrix products (student's logits, teacher's logits, gradient of the student's states),
2 · tokens · vocabulary · width operations each; a fourth for a trained head. Memory: TRL's non-fused path holds whole
[tokens × vocabulary] logits, log-probabilities and gradients; ours a few chunks of them.

TRL's is run as its trainer does without a fused loss. Liger's is run twice, compiled (its own default) and not, in
chunks of as many tokens as ours (its default of 1,024 would be one chunk): of the two the better figure is Liger's.

Rounds: in each, all contenders take turns, each in a process of its own, in an order that is turned from round to
round. A process calls loss and backward once, which gives the rise of its peak resident memory (of the device's
allocated memory on a GPU) over what the tensors themselves take, or a compiler; then `--repeats` times for the time,
their median. A round's ratio is of what was measured in it. Ends with one line of JSON: medians and every round's; the
bounds are memory ≤ 1/12 and time ≤ 1.0 of TRL's with a frozen head, and no more than Liger's of either with a trained
one.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from record import Recorder
from torch import Tensor
from torch.nn import functional as F

CONTENDERS = ("ours", "trl", "liger", "liger_compiled")


def ours(student: Tensor, head: Tensor, teacher: Tensor, other: Tensor) -> Tensor:
    """The plugin's."""
    from thinkswitch_plugin.on_policy_kl.loss import token_loss

    return token_loss(student, head, teacher, other).total / len(student)


def trl(student: Tensor, head: Tensor, teacher: Tensor, other: Tensor) -> Tensor:
    """TRL's DistillationTrainer without the fused loss: what its models return, and what it makes of it."""
    from trl.experimental.distillation.distillation_trainer import DistillationTrainer

    logits = F.linear(student, head)
    with torch.no_grad():
        others = F.linear(teacher, other)
    labels = torch.zeros(1, len(student), dtype=torch.int64, device=student.device)
    return DistillationTrainer.generalized_jsd_loss(logits[None], others[None], labels, beta=1.0)


def liger(student: Tensor, head: Tensor, teacher: Tensor, other: Tensor, compiled: bool = False) -> Tensor:
    """Liger's chunked loss, which always computes the head's gradient."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    from thinkswitch_plugin.on_policy_kl.loss import sizes

    chunk, _ = sizes(student.device, len(head), len(student))
    loss = LigerFusedLinearJSDLoss(
        beta=1.0, compiled=compiled, chunk_size=chunk, weight_hard_loss=0.0, weight_soft_loss=1.0
    )
    labels = torch.zeros(len(student), dtype=torch.int64, device=student.device)
    total: Tensor = loss(student, head, teacher, other, labels)
    return total


def measure(name: str, sizes: tuple[int, int, int], device: str, trained: bool, repeats: int) -> dict[str, float]:
    """One contender in this process: peak extra MB of the first call, and the median seconds of those after it."""
    contender: Callable[..., Tensor] = {
        "ours": ours,
        "trl": trl,
        "liger": liger,
        "liger_compiled": partial(liger, compiled=True),
    }[name]
    tokens, vocabulary, width = sizes
    torch.manual_seed(0)
    small = torch.randn(8, 16, device=device)
    contender(small.clone().requires_grad_(), small, small, small).backward()  # imports, once
    student = torch.randn(tokens, width, device=device, requires_grad=True)
    teacher = torch.randn(tokens, width, device=device)
    heads = [torch.randn(vocabulary, width, device=device).mul_(width**-0.5) for _ in range(2)]
    heads[0].requires_grad_(trained)
    F.linear(student[:1].detach(), heads[0].detach())  # matrix products bring their own buffers
    before, seconds, peak = memory(device), [], 0.0
    for number in range(1 + repeats):
        student.grad = heads[0].grad = None
        begun = time.monotonic()
        loss = contender(student, heads[0], teacher, heads[1])
        loss.backward()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - begun)
        if number == 0:
            peak = memory(device) - before
    return {"mb": peak / 1e6, "s": statistics.median(seconds[1:]), "loss": float(loss.detach())}


def memory(device: str) -> float:
    """Peak bytes so far: resident on a CPU, allocated on a GPU."""
    if device != "cpu":
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def one_round(asked: argparse.Namespace, trained: bool, first: int) -> dict[str, dict[str, float]]:
    """What each contender took, in an order that begins with the one of a number."""
    found = {}
    for name in (*CONTENDERS[first:], *CONTENDERS[:first]):
        command = [sys.executable, *sys.argv, "--only", name, *(["--trained"] if trained else [])]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[name] = result = json.loads(said.stdout.splitlines()[-1])
        head = "trained" if trained else "frozen "
        print(f"{name:14} {head} head: {result['mb']:7.0f} MB {result['s']:6.1f} s", flush=True)
    return found


def ratios(rounds: list[dict[str, dict[str, float]]], of: str, *peers: str) -> list[float]:
    """Ours over the better peer's, round by round."""
    return [found["ours"][of] / min(found[peer][of] for peer in peers) for found in rounds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=2_560)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2, help="calls a process times, after the first")
    parser.add_argument("--only", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--trained", action="store_true", help=argparse.SUPPRESS)
    recorder = Recorder(parser)
    asked = parser.parse_args()
    if asked.only:
        sizes = (asked.tokens, asked.vocabulary, asked.width)
        print(json.dumps(measure(asked.only, sizes, asked.device, asked.trained, asked.repeats)))
        return
    rounds: dict[str, list[dict[str, dict[str, float]]]] = {"frozen": [], "trained": []}
    for number in range(asked.rounds):
        for head, found in rounds.items():
            found.append(one_round(asked, head == "trained", number % len(CONTENDERS)))
    each: dict[str, list[float]] = {}
    for head, found in rounds.items():
        for of in ("mb", "s"):
            each[f"{head}_{of}_over_trl"] = ratios(found, of, "trl")
            each[f"{head}_{of}_over_liger"] = ratios(found, of, "liger", "liger_compiled")
    figures: dict[str, Any] = {
        "median": {name: statistics.median(values) for name, values in each.items()},
        "ratios": each,
        "rounds": rounds,
        "tokens": asked.tokens,
        "vocabulary": asked.vocabulary,
        "width": asked.width,
    }
    recorder.keep(asked, "on_policy_loss", figures)


if __name__ == "__main__":
    main()
