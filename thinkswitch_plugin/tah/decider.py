"""The iteration decider: from what one pass knows of a token to the log-odds that it needs another.

Knows tensors of tokens. Leaves to others: which tokens and which hidden states (`model`), and the labels it learns
from (`oracle`). TaH, arXiv 2511.08577, section 3.3: some layers' hidden states and the largest logits, an MLP with
residual blocks, a sigmoid and a threshold.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Block(nn.Module):
    """`skip(x) + MLP(LayerNorm(x))`, [N, in] to [N, out]."""

    def __init__(self, width: int, out: int, expansion: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, expansion * width)
        self.down = nn.Linear(expansion * width, out)
        self.skip = nn.Linear(width, out) if width != out else nn.Identity()
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        inner = F.gelu(self.up(self.norm(x)))
        if self.training and self.dropout:
            inner = self.down(F.dropout(inner, self.dropout))
            return self.skip(x) + F.dropout(inner, self.dropout)
        return self.skip(x) + self.down(inner)


class Decider(nn.Module):
    """An MLP over hidden states and logits of N tokens."""

    def __init__(
        self, width: int, states: int, top_k: int, hidden: Sequence[int], expansion: int = 4, dropout: float = 0.1
    ):
        """`states` hidden states of `width` each and `top_k` logits a token; `hidden` are the widths of the blocks."""
        super().__init__()
        self.read_logits = nn.Linear(top_k, width)
        self.combine = nn.Linear((states + 1) * width, hidden[0])
        self.project = nn.Linear(hidden[0], hidden[0])
        self.blocks = nn.Sequential(
            *(_Block(a, b, expansion, dropout) for a, b in zip(hidden, [*hidden[1:], hidden[-1]], strict=True))
        )
        self.norm = nn.LayerNorm(hidden[-1])
        self.out = nn.Linear(hidden[-1], 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-normal weights, zero biases."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, states: Sequence[Tensor], logits: Tensor) -> Tensor:
        """Log-odds of continuing.

        Args:
            states: hidden states of the configured layers, [N, width] each.
            logits: the `top_k` largest logits of the sum over depths so far, largest first, [N, top_k].

        Returns:
            [N]; a token continues where their sigmoid is above the threshold.
        """
        device = logits.device.type
        if torch.is_autocast_enabled(device):  # it would learn to decide by fewer digits than it is asked with
            with torch.autocast(device, enabled=False):
                return self(states, logits)
        dtype = self.out.weight.dtype  # of its own: at the paper's learning rate bfloat16 loses most updates
        x = self.combine(torch.cat([*(s.to(dtype) for s in states), self.read_logits(logits.to(dtype))], dim=-1))
        return self.out(self.norm(self.blocks(self.project(x)))).squeeze(-1)
