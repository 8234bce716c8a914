"""The divergence between student and teacher, token by token, over the whole vocabulary, in little memory.

Knows tensors: hidden states, heads, the three divergences with their gradients, and the sampled estimator. Leaves to
others: where hidden states come from (`scoring`), which tokens count and what the sum is divided by (`trainer`).

Logits of N tokens over a vocabulary of V are N × V floats, for student and teacher, and autograd keeps several such
tensors. Here a chunk of tokens is taken to logits, its divergence and the gradient of that with respect to the
*student's hidden states* are computed at once, and the buffers are used again for the next chunk: two of chunk × V
floats, and scratch for a strip of few tokens, whatever N is. Floor: three matrix products a token (student's logits,
teacher's logits, gradient), 2·H·V operations each; a fourth only if the head is trained. Large chunks because a matrix
product reads the whole head, narrow strips because what lies between the products is bound by memory: on a CPU by its
cache, which a strip fits. An accelerator has no such cache and pays for every launch: there a strip is the whole chunk.

Logits are float32 out of the product, whatever the weights are held in: rounded to bfloat16, a logit of 20 is off by up
to 0.06, and what student and teacher differ by is no more than that.

With z the student's logits, p = softmax(z), q the teacher's distribution, m = βq + (1-β)p (GKD, arXiv 2306.13649, §2):

    reverse_kl   KL(p ‖ q) = Σ p (log p - log q)              d/dz = p ⊙ (g - Σ p g), g = log p - log q
    forward_kl   KL(q ‖ p) = Σ q (log q - log p)              d/dz = p - q
    jsd          β KL(q ‖ m) + (1-β) KL(p ‖ m)                d/dz = p ⊙ (g - Σ p g), g = (1-β) (log p - log m)
    sampled      w (log p_a - log q_a) for the sampled a      d/dz = w (log p_a - log q_a) (1_a - p)

`sampled` is the policy-gradient estimator of reverse KL: its value and its gradient have those of `reverse_kl` as
their expectation over a ~ μ when w = p_a / μ_a, μ being what the sampler drew from. With a cap C, w = min(p_a / μ_a,
C): truncated importance sampling (Ionides 2008, J. Comput. Graph. Stat. 17), a bounded variance for a little bias.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Divergence = Literal["reverse_kl", "forward_kl", "jsd"]
CHUNK_LOGITS = 20_000_000  # of either model at once: 131 tokens over a vocabulary of 152k, 2 × 80 MB in float32
STRIP_LOGITS = 1_200_000  # a CPU turns into gradients at once: 7 such tokens, 2 × 5 MB of scratch
DEVICE_LOGITS = 40_000_000  # of either model at once on an accelerator, in one strip: 263 tokens, six times 160 MB
BLOCK_ROWS = 1024  # of a head, that a CPU multiplies at once: its BLAS copies that side first, and 10 MB stay cached


class Samples(NamedTuple):
    """What the sampled estimator needs to know of N tokens.

    Attributes:
        tokens: int64 [N], the sampled token ids.
        log_probs: float32 [N], the sampler's log μ(a), in nats; NaN where unknown, which counts as the student's own.
        cap: C, the most that a token weighs; infinite for the unbiased estimator.
    """

    tokens: Tensor
    log_probs: Tensor
    cap: float = math.inf


class TokenLoss(NamedTuple):
    """The sum to minimise and what is known of each token.

    Attributes:
        total: scalar with a gradient, the sum of the chosen divergence over the N tokens, in nats.
        divergence: [N], no gradient: its summands.
        reverse_kl: [N], no gradient: KL(student ‖ teacher), whatever is minimised.
        student_entropy: [N], no gradient, in nats.
        teacher_entropy: [N], no gradient, in nats.
    """

    total: Tensor
    divergence: Tensor
    reverse_kl: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor


def token_loss(
    student: Tensor,
    student_head: Tensor,
    teacher: Tensor,
    teacher_head: Tensor,
    divergence: Divergence = "reverse_kl",
    beta: float = 0.5,
    samples: Samples | None = None,
    chunk: int | None = None,
) -> TokenLoss:
    """Sum a divergence over tokens, exactly, in chunks.

    Args:
        student: [N, H], the student's last hidden states at the positions that predict the N tokens; gets a gradient.
        student_head: [V, H], the student's output weights; get a gradient only if they require one.
        teacher: [N, K], the teacher's last hidden states; no gradient.
        teacher_head: [V, K]; no gradient.
        divergence: which one, see above.
        beta: weight of the teacher in the mixture of `jsd`, strictly between 0 and 1.
        samples: with it, the sampled estimator of reverse KL; `divergence` and `beta` are then not looked at.
        chunk: tokens taken to logits at once; None for as many as make 160 MB of float32, on an accelerator 320 MB.

    Returns:
        The sum and its parts, in float32 (float64 if `student` is).

    Raises:
        ValueError: the vocabularies differ, or the tensors do not fit.
    """
    if student_head.shape[0] != teacher_head.shape[0]:
        raise ValueError(
            f"the student's vocabulary has {student_head.shape[0]} tokens and the teacher's {teacher_head.shape[0]}: "
            "their logits cannot be compared"
        )
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(f"{student.shape[0]} tokens of the student against {teacher.shape[0]} of the teacher")
    if divergence == "jsd" and not 0.0 < beta < 1.0:
        raise ValueError(f"beta is {beta}: the mixture needs 0 < beta < 1; its ends are forward_kl and reverse_kl")
    kind = "sampled" if samples is not None else divergence
    device = student.device.type
    # Autocast would round the products again.
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        parts = _ChunkedLoss.apply(
            student, student_head, teacher.detach(), teacher_head.detach(), samples, kind, beta, chunk
        )
    return TokenLoss(*parts)


def sizes(device: torch.device, width: int, total: int, chunk: int | None = None) -> tuple[int, int]:
    """How many tokens are taken to logits at once, and how many of these are turned into gradients at once.

    Args:
        device: where the tensors are.
        width: V, words of the vocabulary.
        total: N, tokens there are.
        chunk: the first, where it was asked for.
    """
    on_cpu = device.type == "cpu"
    rows = min(chunk or max(1, (CHUNK_LOGITS if on_cpu else DEVICE_LOGITS) // width), total)
    return rows, min(max(1, STRIP_LOGITS // width), max(1, rows)) if on_cpu else max(1, rows)


class _ChunkedLoss(torch.autograd.Function):
    """Value and gradient in one pass; `backward` only scales what `forward` found."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        student_head: Tensor,
        teacher: Tensor,
        teacher_head: Tensor,
        samples: Samples | None,
        kind: str,
        beta: float,
        chunk: int | None,
    ) -> tuple[Tensor, ...]:
        total, width = student.shape[0], student_head.shape[0]
        exact = torch.float64 if student.dtype == torch.float64 else torch.float32
        rows, step = sizes(student.device, width, total, chunk)
        buffers = torch.empty((2, rows, width), dtype=exact, device=student.device)
        scratch = torch.empty((2, step, width), dtype=exact, device=student.device)
        parts = torch.empty((4, total), dtype=exact, device=student.device)
        want_student, want_head = ctx.needs_input_grad[:2]
        grad_student = torch.empty_like(student) if want_student else None
        grad_head = torch.zeros_like(student_head, dtype=exact) if want_head else None
        for start in range(0, total, rows or 1):
            end = min(start + rows, total)
            ours, theirs = buffers[0, : end - start], buffers[1, : end - start]
            _logits(student[start:end], student_head, ours)
            _logits(teacher[start:end], teacher_head, theirs)
            for top in range(start, end, step):
                strip = slice(top, min(top + step, end))
                here = slice(strip.start - start, strip.stop - start)
                free = scratch[:, : strip.stop - strip.start]
                work = (ours[here], theirs[here], free[0], free[1])
                if samples is not None:
                    found = _sampled(*work, samples.tokens[strip], samples.log_probs[strip], samples.cap)
                elif kind == "jsd":
                    found = _jsd(*work, beta)
                else:
                    found = (_reverse_kl if kind == "reverse_kl" else _forward_kl)(*work)
                parts[:, strip] = torch.stack(found)
            gradient = theirs
            if grad_student is not None:
                if student_head.dtype == grad_student.dtype == exact:
                    torch.mm(gradient, student_head, out=grad_student[start:end])
                else:
                    grad_student[start:end] = gradient.to(student_head.dtype) @ student_head
            if grad_head is not None:
                grad_head.addmm_(gradient.t(), student[start:end].to(exact))
        values = parts.unbind()
        ctx.grad_student, ctx.grad_head = grad_student, grad_head
        ctx.head_dtype = student_head.dtype
        ctx.mark_non_differentiable(*values)
        return (parts[0].sum(), *values)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        scale = upstream[0]
        grad_student = None if ctx.grad_student is None else ctx.grad_student.to(scale.dtype).mul_(scale)
        grad_student = None if grad_student is None else grad_student.to(ctx.grad_student.dtype)
        grad_head = None if ctx.grad_head is None else ctx.grad_head.mul_(scale).to(ctx.head_dtype)
        ctx.grad_student = ctx.grad_head = None  # scaled in place, so good for one backward only
        return (grad_student, grad_head, *[None] * 6)


def _logits(hidden: Tensor, head: Tensor, out: Tensor) -> None:
    """Hidden states [C, H] times a head [V, H], transposed, into `out` [C, V], without rounding to less than `out`."""
    if head.dtype != out.dtype and out.device.type == "cuda":  # half-precision factors, a float32 product
        torch.mm(hidden.to(head.dtype), head.t(), out_dtype=out.dtype, out=out)
        return
    rows = BLOCK_ROWS if head.dtype != out.dtype or out.device.type == "cpu" else len(head)
    hidden = hidden.to(out.dtype)
    for part, into in zip(head.split(rows), out.split(rows, dim=1), strict=True):
        torch.mm(hidden, part.to(out.dtype).t(), out=into)


def _log_softmax_(logits: Tensor, probs: Tensor) -> None:
    """Turn logits [C, V] into log-probabilities in place and leave the probabilities in `probs`."""
    logits.sub_(logits.amax(-1, keepdim=True))
    total = torch.exp(logits, out=probs).sum(-1, keepdim=True)
    probs.div_(total)
    logits.sub_(total.log_())


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Row by row inner products [C] of two [C, V]."""
    return (left * right).sum(-1)  # four times as fast as a batched matrix product, and a strip is small


# Each of the following takes student's and teacher's logits [C, V] and two such buffers to work in, leaves the gradient
# with respect to the student's logits where the teacher's logits were, and gives [C] each: divergence, reverse KL,
# entropy of the student, of the teacher.


def _reverse_kl(student: Tensor, teacher: Tensor, probs: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    _log_softmax_(teacher, probs)
    teacher_entropy = _dot(probs, teacher).neg_()
    _log_softmax_(student, probs)
    student_entropy = _dot(probs, student).neg_()
    gap = torch.sub(student, teacher, out=teacher)
    value = _dot(probs, gap)
    gap.sub_(value.unsqueeze(1)).mul_(probs)
    return value, value, student_entropy, teacher_entropy


def _forward_kl(student: Tensor, teacher: Tensor, probs: Tensor, others: Tensor) -> tuple[Tensor, ...]:
    _log_softmax_(teacher, others)
    teacher_entropy = _dot(others, teacher).neg_()
    _log_softmax_(student, probs)
    student_entropy = _dot(probs, student).neg_()
    gap = torch.sub(student, teacher, out=teacher)
    value, reverse = _dot(others, gap).neg_(), _dot(probs, gap)
    torch.sub(probs, others, out=teacher)
    return value, reverse, student_entropy, teacher_entropy


def _jsd(student: Tensor, teacher: Tensor, probs: Tensor, mixture: Tensor, beta: float) -> tuple[Tensor, ...]:
    _log_softmax_(teacher, probs)
    teacher_entropy = _dot(probs, teacher).neg_()
    _log_softmax_(student, mixture)  # its probabilities are made again below: the buffer is needed for the mixture
    torch.add(student, math.log1p(-beta), out=mixture)
    torch.logaddexp(mixture, teacher.add_(math.log(beta)), out=mixture)
    teacher.sub_(math.log(beta))
    of_teacher = beta * (_dot(probs, teacher) - _dot(probs, mixture))
    torch.exp(student, out=probs)
    student_entropy = _dot(probs, student).neg_()
    reverse = -student_entropy - _dot(probs, teacher)
    gap = torch.sub(student, mixture, out=mixture)
    of_student = _dot(probs, gap)
    torch.mul(gap.sub_(of_student.unsqueeze(1)), probs.mul_(1 - beta), out=teacher)
    return of_teacher + (1 - beta) * of_student, reverse, student_entropy, teacher_entropy


def _sampled(
    student: Tensor, teacher: Tensor, probs: Tensor, _: Tensor, tokens: Tensor, log_probs: Tensor, cap: float
) -> tuple[Tensor, ...]:
    _log_softmax_(teacher, probs)
    teacher_entropy = _dot(probs, teacher).neg_()
    _log_softmax_(student, probs)
    student_entropy = _dot(probs, student).neg_()
    chosen = tokens.unsqueeze(1)
    ours, theirs = student.gather(1, chosen).squeeze(1), teacher.gather(1, chosen).squeeze(1)
    weight = torch.exp(ours - log_probs.to(ours.dtype)).clamp(max=cap).nan_to_num(nan=1.0)
    value = weight * (ours - theirs)
    reverse = -student_entropy - _dot(probs, teacher)
    torch.mul(probs, -value.unsqueeze(1), out=teacher).scatter_add_(1, chosen, value.unsqueeze(1))
    return value, reverse, student_entropy, teacher_entropy
