"""The chunked loss against the naive full-vocabulary form, TRL's, and itself sampled; in half precision, and in ops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from thinkswitch_plugin.on_policy_kl.loss import BLOCK_ROWS, Divergence, Samples, TokenLoss, _logits, sizes, token_loss

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
    trainer = pytest.importorskip("trl.experimental.distillation.distillation_trainer")
    student, head, teacher, other = tensors(40, 2500, 16, 2, torch.float32)
    logits, others = student @ head.t(), teacher @ other.t()
    theirs = trainer._jsd_divergence(F.log_softmax(logits, -1), F.log_softmax(others, -1), beta).sum()
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


def test_a_cap_bounds_what_a_token_weighs_in_value_and_gradient() -> None:
    student, head, teacher, other = tensors(1, 12, 4, 3)
    p, q = (student @ head.t()).log_softmax(-1)[0], (teacher @ other.t()).log_softmax(-1)[0]
    ratios = torch.tensor([0.1, 0.9, 1.9, 2.1, 50.0, 1e30], dtype=torch.float64)
    tokens = torch.tensor([0, 3, 5, 7, 8, 11])
    expected = ratios.clamp(max=2.0) * (p - q).detach()[tokens]
    samples = Samples(tokens, p.detach()[tokens] - ratios.log(), cap=2.0)
    states = student.detach().repeat(6, 1).requires_grad_()
    loss = token_loss(states, head.detach(), teacher.repeat(6, 1), other, samples=samples)
    loss.total.backward()
    torch.testing.assert_close(loss.divergence, expected)
    (expected * p[tokens]).sum().backward()  # the weight is a factor, not a function to be learnt
    torch.testing.assert_close(states.grad.sum(0, keepdim=True), student.grad)


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


def near(tokens: int = 64, vocabulary: int = 3000, width: int = 128) -> list[Tensor]:
    """Two models that nearly agree, in bfloat16: what a student is some updates before its teacher."""
    generator = torch.Generator().manual_seed(8)
    states = torch.randn((tokens, width), generator=generator)
    head = torch.randn((vocabulary, width), generator=generator) * 0.6  # logits of up to some 25, as real ones
    moved = states + 0.01 * torch.randn(states.shape, generator=generator)
    return [tensor.to(torch.bfloat16) for tensor in (states, head, moved, head)]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_not_rounded_to_the_dtype_of_the_weights(kind: Divergence) -> None:
    """Against float64 on the same bfloat16 tensors: the error of logits in bfloat16 is as large as the divergence."""
    student, head, teacher, other = near()
    exact = naive(*((a.double() @ b.double().t()) for a, b in ((student, head), (teacher, other))), kind, 0.5)
    rounded = naive(*((a @ b.t()).double() for a, b in ((student, head), (teacher, other))), kind, 0.5)
    with torch.autocast("cpu", torch.bfloat16):  # as a trainer has it
        ours = token_loss(student, head, teacher, other, kind).divergence.double()
    assert relative(rounded, exact) > 0.3
    assert relative(ours, exact) < 1e-3


# --- on an accelerator ---


class Ops(TorchDispatchMode):
    """Counts what is launched, and the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        self.count += func.namespace == "aten" and not view and "empty" not in func.name()
        self.largest = max(self.largest, out.nbytes if isinstance(out, Tensor) and not view else 0)
        return out


@pytest.mark.parametrize("kind", [*KINDS, "sampled"])
def test_a_card_gets_few_large_chunks(kind: Any) -> None:
    """4,096 tokens over a vocabulary of 152k, on tensors without data: launches, and memory."""
    with Ops() as seen:
        states, head = torch.empty(4096, 2560, device="meta"), torch.empty(151_936, 2560, device="meta")
        samples = Samples(torch.empty(4096, dtype=torch.int64, device="meta"), torch.empty(4096, device="meta"), 2.0)
        seen.count = seen.largest = 0
        how = {"samples": samples} if kind == "sampled" else {"divergence": kind}
        token_loss(states.requires_grad_(), head, states.detach(), head, **how).total.backward()
    assert 16 * 3 < seen.count < 800  # in strips of a CPU's size: 17,000
    assert seen.largest == 2 * 263 * 151_936 * 4  # both models' logits of a chunk


def test_a_card_multiplies_in_half_precision_into_float32() -> None:
    with FakeTensorMode(), Ops() as seen:
        hidden, head = (torch.empty(n, 64, dtype=torch.bfloat16, device="cuda") for n in (263, 5000))
        out = torch.empty(263, 5000, device="cuda")
        seen.count = 0
        _logits(hidden, head, out)
    assert seen.count == 1  # no copy of the head, none of the product


def test_a_cpu_works_in_strips_that_its_cache_holds() -> None:
    assert sizes(torch.device("cpu"), 151_936, 4096) == (131, 7)
    assert sizes(torch.device("cuda"), 151_936, 4096) == (263, 263)
    assert sizes(torch.device("cuda"), 151_936, 4096, chunk=64) == (64, 64)
    assert sizes(torch.device("cpu"), 328, 100) == (100, 100)


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
