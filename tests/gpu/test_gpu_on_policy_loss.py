"""The on-policy loss on a card: the same values and gradients, in the memory and time that were planned.

Needs torch alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from card_or_cpu import DEVICE, ON_A_CARD
from torch import Tensor

from thinkswitch_plugin.on_policy_kl.loss import Samples, token_loss

KINDS = ("reverse_kl", "forward_kl", "jsd", "sampled")


def tensors(tokens: int, vocabulary: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Student's states and head, teacher's states and head: two models that nearly agree, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn((tokens, width), generator=generator)
    head = torch.randn((vocabulary, width), generator=generator) * (8 / width**0.5)
    moved = states + 0.02 * torch.randn(states.shape, generator=generator)
    return [tensor.to(dtype) for tensor in (states, head, moved, head)]


def scored(kind: Any, parts: list[Tensor], chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """Each token's loss and the gradient of the student's states."""
    states = parts[0].clone().requires_grad_()
    tokens = torch.arange(len(states), device=states.device)
    samples = (
        Samples(tokens, torch.full((len(states),), -3.0, device=states.device), 2.0) if kind == "sampled" else None
    )
    how = {"samples": samples} if samples else {"divergence": kind}
    loss = token_loss(states, *parts[1:], chunk=chunk, **how)  # type: ignore[arg-type]
    loss.total.backward()
    assert states.grad is not None
    return loss.divergence, states.grad


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.cpu().double() - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_card_says_what_float64_on_the_cpu_says(kind: str, dtype: torch.dtype) -> None:
    parts = tensors(96, 5000, 256, dtype)
    value, gradient = scored(kind, [part.double() for part in parts])
    for chunk in (None, 40):
        ours, grad = scored(kind, [part.to(DEVICE) for part in parts], chunk)
        assert ours.dtype == torch.float32
        assert relative(ours, value) < 1e-3  # the logits are not rounded, whatever the weights are held in
        assert relative(grad, gradient) < (1e-3 if dtype == torch.float32 else 2e-2)


@pytest.mark.skipif(not ON_A_CARD, reason="needs a card's allocator")
def test_memory_is_that_of_a_chunk() -> None:
    """4,096 tokens over a vocabulary of 152k: whole logits of one model alone would take 2.5 GB."""
    parts = [part.to(DEVICE) for part in tensors(4096, 151_936, 1024, torch.bfloat16)]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    scored("jsd", parts)
    assert torch.cuda.max_memory_allocated() - before < 1.1e9
    torch.cuda.reset_peak_memory_stats()
    scored("jsd", parts, chunk=128)
    assert torch.cuda.max_memory_allocated() - before < 0.55e9
