"""What a TaH model's answers cost: passes counted on answers it gave, and operations a token by a formula.

Knows a model, a tokenizer and (prompt, answer) pairs. Leaves to others: where answers are kept, and what is shown of
them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from thinkswitch_plugin.tah.batches import batches
from thinkswitch_plugin.tah.config import Policy, TaHConfig
from thinkswitch_plugin.tah.lora import DepthLinear
from thinkswitch_plugin.tah.model import TaHForCausalLM


class Passes(NamedTuple):
    """What was counted over the tokens of some answers.

    Attributes:
        tokens: how many.
        mean_depth: passes a token.
        skip_rate: share of tokens that took one pass.
        context: mean number of tokens, itself included, that the position which predicts a token has before it.
    """

    tokens: int
    mean_depth: float
    skip_rate: float
    context: float


def flops_per_token(config: TaHConfig, context: float, mean_depth: float, policy: Policy | None = None) -> float:
    """Operations of one decoding step, a multiplication and an addition counted as two.

    With L layers of h heads, w wide each, H the hidden width, V the vocabulary's size, W the weights of the backbone's
    linear layers, A = Σ r·(in + out) those of the adapter, Q those of the decider's linear layers, k = mix_top_k, c the
    context and D = max_depth; s = (mean_depth − 1) / (D − 1) is the share of tokens that go deeper:

        depth 1             2·W + 4·c·h·w·L + 2·H·V
        depth d, 2 to D     s · [2·(W + A) + 4·c·(1 + (d − 1)·s)·h·w·L + 2·H·V + 2·k·H]
        deciding            (1 + (D − 2)·s) · 2·Q, of a learned decider

    4·c·h·w is attention's scores and values; a deeper pass also sees the deeper keys of earlier tokens, of which a
    share s is taken to have any. Beyond D = 2 a token that goes deeper is taken to go all the way, as the oracle's do.
    Left out is what is no product of matrices (norms, activations, softmax, top-k), the rotary angles, and keys that
    are read only to be masked.

    Args:
        config: of the model.
        context: tokens that depth 1 sees, the newest included.
        mean_depth: passes a token, from 1 to `max_depth`.
        policy: who decides, in place of the config's.

    Raises:
        ValueError: if `mean_depth` or `context` is outside its limits.
    """
    most = config.max_depth
    if not 1 <= mean_depth <= most or context < 0:
        raise ValueError(f"tah: mean depth {mean_depth} (1 to {most}) or context {context} (0 or more) cannot be")
    with torch.device("meta"):  # sizes without weights
        model = TaHForCausalLM(copy.deepcopy(config))
    linears = [module for module in model.modules() if isinstance(module, DepthLinear)]
    weights = sum(linear.weight.numel() for linear in linears)
    adapter = sum(linear.lora_A.numel() + linear.lora_B.numel() for linear in linears)
    decider = sum(m.weight.numel() for m in (model.decider or nn.Module()).modules() if isinstance(m, nn.Linear))
    text = config.text_config
    heads = text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    head = 2 * text.hidden_size * text.vocab_size
    attention = 4 * context * width * text.num_hidden_layers

    total = 2 * weights + attention + head
    if most == 1:
        return total
    share = (mean_depth - 1) / (most - 1)
    for depth in range(2, most + 1):
        seen = attention * (1 + (depth - 1) * share)
        total += share * (2 * (weights + adapter) + seen + head + 2 * config.mix_top_k * text.hidden_size)
    if (policy or config.decider) == "learned":
        total += (1 + (most - 2) * share) * 2 * decider
    return total


def summary(config: TaHConfig, passes: Passes | None) -> dict[str, float | None]:
    """What was counted, with the operations a token beside those of a single pass and of all passes for every token.

    The keys are those of a row of `results.json`; every value is None where there was nothing to count.
    """
    names = ("mean_depth", "skip_rate", "flops_per_token", "flops_per_token_single", "flops_per_token_always")
    if passes is None:
        return dict.fromkeys(names)
    flops = (
        flops_per_token(config, passes.context, passes.mean_depth),
        flops_per_token(config, passes.context, 1, "never"),
        flops_per_token(config, passes.context, config.max_depth, "always"),
    )
    return dict(zip(names, (passes.mean_depth, passes.skip_rate, *flops), strict=True))


@torch.no_grad()
def count(
    model: TaHForCausalLM, tokenizer: Any, pairs: Sequence[tuple[str, str]], tokens_at_once: int = 16384
) -> Passes | None:
    """How many passes the tokens of answers took, from one forward over each prompt and its answer.

    The token that ended an answer is not part of its text and is not counted; nor are the prompt's tokens.

    Args:
        model: in evaluation mode, whose decider needs no labels.
        tokenizer: its own.
        pairs: each prompt as the model saw it, chat template included, and the answer it gave.
        tokens_at_once: how many tokens a batch may have, padding included; one pair at least.

    Returns:
        `Passes`, or None if no answer has a token.

    Raises:
        ValueError: the checkpoint has no trained decider.
    """
    rows = [_encoded(tokenizer, *pair) for pair in pairs]
    depths: list[int] = []
    contexts: list[int] = []
    for indices in batches([len(tokens) for tokens, _ in rows], tokens_at_once):
        batch = [rows[index] for index in indices]
        width = len(batch[-1][0])
        ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens, _ in batch], device=model.device)
        lengths = torch.tensor([len(tokens) for tokens, _ in batch], device=model.device)
        mask = (torch.arange(width, device=model.device) < lengths[:, None]).long()
        took = model(ids, attention_mask=mask, logits_to_keep=1).depth.tolist()
        for (tokens, start), row_took in zip(batch, took, strict=True):
            # A position's depth is that of the prediction it makes, of the token after it.
            depths += row_took[start - 1 : len(tokens) - 1]
            contexts += range(start, len(tokens))
    if not depths:
        return None
    n = len(depths)
    return Passes(n, sum(depths) / n, sum(depth == 1 for depth in depths) / n, sum(contexts) / n)


def _encoded(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], int]:
    """A prompt's tokens, as lm-eval makes them, with the answer's behind them; and the first of those predicted."""
    begun = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
    before = tokenizer(prompt, **({"add_special_tokens": False} if begun else {}))["input_ids"]
    return before + tokenizer(answer, add_special_tokens=False)["input_ids"], max(1, len(before))
