"""The chunked loss against the naive full-vocabulary form, TRL's, and itself sampled."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from trl.experimental.distillation.distillation_trainer import _jsd_divergence

from thinkswitch_plugin.on_policy_kl.loss import BLOCK_ROWS, Divergence, Samples, TokenLoss, token_loss

KINDS: tuple[Divergence, ...] = ("reverse_kl", "forward_kl", "jsd")


def naive(student: Tensor, teacher: Tensor, kind: str, beta: float) -> Tensor:
    """Each token's divergence [N] from whole logits [N, V], term by term from the definitions."""
    p, q = student.softmax(-1), teacher.softmax(-1)
    if kind == "reverse_kl":
        return (p * (p.log() - q.log())).sum(-1)
    if kind == "forward_kl":
        return (q * (q.log() - p.log())).sum(-1)
    m = beta * q + (1 - beta) * p
    return (beta * q * (q.log() - m.log()) + (1 - beta) * p * (p.log() - m.log())).sum(-1)


def tensors(tokens: int, vocabulary: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Student's states and head, teacher's states and head."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((tokens, width), (vocabulary, width), (tokens, width + 3), (vocabulary, width + 3))
    return [torch.randn(size, generator=generator, dtype=dtype).requires_grad_(i < 2) for i, size in enumerate(sizes)]


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-300))


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 23),
    vocabulary=st.integers(2, 50) | st.integers(BLOCK_ROWS - 1, 2 * BLOCK_ROWS + 1),
    chunk=st.integers(1, 30),
    kind=st.sampled_from(KINDS),
    beta=st.floats(0.05, 0.95),
    seed=st.integers(0, 2**31),
)
def test_value_and_gradients_are_those_of_the_naive_form(
    tokens: int, vocabulary: int, chunk: int, kind: Divergence, beta: float, seed: int
) -> None:
    student, head, teacher, other = tensors(tokens, vocabulary, 7, seed)
    expected = naive(student @ head.t(), teacher @ other.t(), kind, beta)
    expected.sum().backward()
    states, weights = (tensor.detach().clone().requires_grad_() for tensor in (student, head))
    loss = token_loss(states, weights, teacher, other, kind, beta, chunk=chunk)
    (loss.total * 3.0).backward()
    torch.testing.assert_close(loss.divergence, expected.detach(), rtol=1e-6, atol=1e-12)
    assert relative(loss.total.detach(), expected.sum().detach()) < 1e-6
    for ours, theirs in ((states, student), (weights, head)):
        torch.testing.assert_close(ours.grad, 3.0 * theirs.grad, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_told_of_each_token(kind: Divergence) -> None:
    student, head, teacher, other = tensors(9, 31, 5, 1)
    loss = token_loss(student, head, teacher, other, kind, chunk=4)
    p, q = (student @ head.t()).softmax(-1), (teacher @ other.t()).softmax(-1)
    torch.testing.assert_close(loss.reverse_kl, (p * (p / q).log()).sum(-1).detach())
    torch.testing.assert_close(loss.student_entropy, -(p * p.log()).sum(-1).detach())
    torch.testing.assert_close(loss.teacher_entropy, -(q * q.log()).sum(-1).detach())
    assert not any(part.requires_grad for part in loss[1:])


@pytest.mark.parametrize(("kind", "beta"), [("reverse_kl", 1.0), ("forward_kl", 0.0), ("jsd", 0.3)])
def test_trl_says_the_same(kind: Divergence, beta: float) -> None:
    student, head, teacher, other = tensors(40, 2500, 16, 2, torch.float32)
    logits, others = student @ head.t(), teacher @ other.t()
    theirs = _jsd_divergence(F.log_softmax(logits, -1), F.log_softmax(others, -1), beta).sum()
    theirs.backward()
    expected, student.grad = student.grad.clone(), None
    loss = token_loss(student, head, teacher, other, kind, beta if kind == "jsd" else 0.5, chunk=16)
    loss.total.backward()
    assert relative(loss.total.detach(), theirs.detach()) < 1e-5
    assert relative(student.grad, expected) < 1e-5


def draws(count: int) -> tuple[TokenLoss, Tensor, Tensor, Tensor]:
    """The exact loss of one token; and of that token drawn `count` times from another sampler: values, gradients."""
    student, head, teacher, other = tensors(1, 12, 4, 3)
    exact = token_loss(student, head.detach(), teacher, other)
    exact.total.backward()
    sampler = ((student @ head.t()) * 0.7).softmax(-1).detach()
    tokens = torch.multinomial(sampler[0], count, replacement=True, generator=torch.Generator().manual_seed(0))
    states = student.detach().repeat(count, 1).requires_grad_()
    samples = Samples(tokens, sampler[0, tokens].log())
    sampled = token_loss(states, head.detach(), teacher.repeat(count, 1), other, samples=samples)
    sampled.total.backward()
    assert states.grad is not None
    assert student.grad is not None
    return exact, sampled.divergence, states.grad, student.grad


def test_the_sampled_estimator_is_unbiased_in_value_and_gradient() -> None:
    exact, values, gradients, expected = draws(200_000)
    error = values.std() / len(values) ** 0.5
    assert abs(values.mean() - exact.total.detach()) < 3 * error
    errors = gradients.std(0) / len(values) ** 0.5
    assert bool(((gradients.mean(0) - expected[0]).abs() < 4 * errors).all())
    assert float(errors.max()) < 0.02  # the bounds above mean something


def test_unknown_sampler_probabilities_are_the_student_s_own() -> None:
    student, head, teacher, other = tensors(6, 12, 4, 4)
    tokens = torch.arange(6)
    own = (student @ head.t()).log_softmax(-1).detach()[torch.arange(6), tokens]
    unknown = torch.full_like(own, float("nan"))
    losses = [token_loss(student, head, teacher, other, samples=Samples(tokens, known)) for known in (own, unknown)]
    torch.testing.assert_close(losses[0].divergence, losses[1].divergence)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_hidden_states_and_frozen_heads(kind: Divergence) -> None:
    student, head, teacher, other = tensors(30, 200, 16, 5, torch.float32)
    half = [tensor.detach().to(torch.bfloat16) for tensor in (student, head, teacher, other)]
    states = half[0].clone().requires_grad_()
    loss = token_loss(states, *half[1:], kind, chunk=8)
    loss.total.backward()
    assert loss.total.dtype == torch.float32
    assert states.grad.dtype == torch.bfloat16
    reference = naive(half[0].float() @ half[1].float().t(), half[2].float() @ half[3].float().t(), kind, 0.5)
    assert relative(loss.divergence, reference) < 0.03


def test_no_tokens_at_all_is_a_loss_of_zero_with_a_gradient() -> None:
    student, head, teacher, other = tensors(0, 12, 4, 6)
    loss = token_loss(student, head, teacher, other)
    loss.total.backward()
    assert float(loss.total) == 0.0
    assert student.grad.shape == (0, 4)
    assert bool((head.grad == 0).all())


def test_what_cannot_be_compared_is_refused() -> None:
    student, head, teacher, other = tensors(4, 12, 4, 7)
    with pytest.raises(ValueError, match="vocabulary has 12 tokens and the teacher's 11"):
        token_loss(student, head, teacher, other[:11])
    with pytest.raises(ValueError, match="4 tokens of the student against 3"):
        token_loss(student, head, teacher[:3], other)
    with pytest.raises(ValueError, match="0 < beta < 1"):
        token_loss(student, head, teacher, other, "jsd", 1.0)
