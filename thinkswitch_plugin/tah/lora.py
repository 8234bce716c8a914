"""The depth-specific adapter: low-rank updates of linear layers that are off at depth 1 and on from depth 2.

Knows one linear layer and the depth of the pass that runs. Peft's own adapters are switched by walking the whole model
and turning `requires_grad` on and off with it, which a forward pass of several depths cannot do while its graph is
kept; here a pass sets one number that all adapters of a model read. TaH, arXiv 2511.08577; LoRA, arXiv 2106.09685.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Depth:
    """The depth of the pass that runs, 1 first; one object for all adapters of a model."""

    def __init__(self) -> None:
        self.now = 1


class DepthLinear(nn.Linear):
    """`W x + b + (alpha / r) · lora_B lora_A dropout(x)` from depth 2, and `W x + b` alone, bit for bit, at depth 1."""

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float, depth: Depth):
        """Take the place of `base`, with its parameters, in their dtype: lora_A is [r, in], lora_B [out, r], zero."""
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.lora_A = nn.Parameter(base.weight.new_empty(r, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_empty(base.out_features, r))
        self.scale, self.dropout, self.depth = alpha / r, dropout, depth
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """Draw lora_A as a linear layer its weights; lora_B is zero, so an untrained adapter changes nothing."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] to [..., out]."""
        out = F.linear(x, self.weight, self.bias)
        if self.depth.now == 1:
            return out
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        # One call for the second product, its scale and the sum.
        low = F.linear(x, self.lora_A).flatten(0, -2)
        return torch.addmm(out.flatten(0, -2), low, self.lora_B.t(), alpha=self.scale).view_as(out)


def add_adapters(layers: nn.Module, r: int, alpha: float, dropout: float) -> Depth:
    """Put an adapter on every linear layer under `layers`; what is returned is what switches them."""
    depth = Depth()
    for name, module in list(layers.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(layers.get_submodule(parent), child, DepthLinear(module, r, alpha, dropout, depth))
    return depth
