"""Memory and time of the on-policy loss against TRL's and Liger's, on the same tensors, in one run.

    python benchmarks/on_policy_loss.py [--tokens 512 --vocabulary 151936 --width 2560] [--device cpu]

Floor with a frozen head: three matrix products (student's logits, teacher's logits, gradient of the student's states),
2 · tokens · vocabulary · width operations each; a fourth for a trained head. Memory: TRL's non-fused path holds whole
[tokens × vocabulary] logits, log-probabilities and gradients; ours a few chunks of them.

Each contender runs in a process of its own: what is counted is the rise of its peak resident memory (of the device's
allocated memory on a GPU) over what the tensors themselves take, for loss and backward. Ends with one line of JSON;
the bounds are memory ≤ 1/12 and time ≤ 1.0 of TRL's with a frozen head, and no more than Liger's of either with a
trained one.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from torch import Tensor
from torch.nn import functional as F

CONTENDERS = ("ours", "trl", "liger")


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


def liger(student: Tensor, head: Tensor, teacher: Tensor, other: Tensor) -> Tensor:
    """Liger's chunked loss, which always computes the head's gradient."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(beta=1.0, compiled=False, weight_hard_loss=0.0, weight_soft_loss=1.0)
    labels = torch.zeros(len(student), dtype=torch.int64, device=student.device)
    total: Tensor = loss(student, head, teacher, other, labels)
    return total


def measure(name: str, sizes: tuple[int, int, int], device: str, trained: bool, repeats: int) -> dict[str, float]:
    """One contender in this process: peak extra MB, and the least seconds of a few runs."""
    contender: Callable[..., Tensor] = {"ours": ours, "trl": trl, "liger": liger}[name]
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
    for number in range(repeats):
        student.grad = heads[0].grad = None
        begun = time.monotonic()
        loss = contender(student, heads[0], teacher, heads[1])
        loss.backward()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - begun)
        if number == 0:
            peak = memory(device) - before
    return {"mb": peak / 1e6, "s": min(seconds), "loss": float(loss.detach())}


def memory(device: str) -> float:
    """Peak bytes so far: resident on a CPU, allocated on a GPU."""
    if device != "cpu":
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=2_560)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--trained", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.only:
        sizes = (asked.tokens, asked.vocabulary, asked.width)
        print(json.dumps(measure(asked.only, sizes, asked.device, asked.trained, asked.repeats)))
        return
    found: dict[str, dict[str, float]] = {}
    for trained in (False, True):
        for name in CONTENDERS:
            command = [sys.executable, *sys.argv, "--only", name, *(["--trained"] if trained else [])]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[f"{name}_{'trained' if trained else 'frozen'}"] = result = json.loads(said.stdout.splitlines()[-1])
            print(f"{name:6} {'trained' if trained else 'frozen '} head: {result['mb']:7.0f} MB {result['s']:6.1f} s")
    print(
        json.dumps(
            {
                "memory_ratio_to_trl": round(found["ours_frozen"]["mb"] / found["trl_frozen"]["mb"], 4),
                "time_ratio_to_trl": round(found["ours_frozen"]["s"] / found["trl_frozen"]["s"], 3),
                "trained_memory_ratio_to_liger": round(found["ours_trained"]["mb"] / found["liger_trained"]["mb"], 3),
                "trained_time_ratio_to_liger": round(found["ours_trained"]["s"] / found["liger_trained"]["s"], 3),
                **{name: {key: round(value, 3) for key, value in values.items()} for name, values in found.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
