"""TaH models around a small random backbone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from slow_tah import backbone

Build = Callable[..., Any]


@pytest.fixture
def build() -> Build:
    """A TaH model with an adapter that is not zero and a decider about half of whose verdicts are to continue."""

    def make(tied: bool = True, kind: str = "qwen3", **settings: Any) -> Any:
        from thinkswitch_plugin.tah import TaHForCausalLM

        asked = {
            "mix_top_k": 7,
            "lora_r": 3,
            "lora_alpha": 6.0,
            "lora_dropout": 0.0,
            "decider_layers": [0, 2, 3],
            "decider_hidden": [16, 24],
            "decider_dropout": 0.0,
            "threshold": 0.5,
            **settings,
        }
        model = TaHForCausalLM.from_backbone(backbone(tied, kind), **asked)
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if name.endswith(".lora_B"):
                torch.nn.init.normal_(parameter, std=0.3)
        return model.eval()

    return make
