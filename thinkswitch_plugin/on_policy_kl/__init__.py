"""On-policy distillation for Axolotl: per-token KL against a teacher on the student's own rollouts.

GKD (arXiv 2306.13649). README.md beside this file has the recipe. `token_loss` is the loss by itself; what needs
Axolotl is loaded when Axolotl asks for it by name: `OnPolicyKLPlugin` for `plugins:`, `load` for a dataset's `type:`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from thinkswitch_plugin.lazy import attributes

if TYPE_CHECKING:
    from thinkswitch_plugin.on_policy_kl.args import OnPolicyKLArgs, OnPolicyKLConfig
    from thinkswitch_plugin.on_policy_kl.loss import token_loss
    from thinkswitch_plugin.on_policy_kl.plugin import OnPolicyKLPlugin
    from thinkswitch_plugin.on_policy_kl.strategy import load

__all__ = ["OnPolicyKLArgs", "OnPolicyKLConfig", "OnPolicyKLPlugin", "load", "token_loss"]

__getattr__ = attributes(
    __name__,
    {
        "OnPolicyKLArgs": "args",
        "OnPolicyKLConfig": "args",
        "OnPolicyKLPlugin": "plugin",
        "load": "strategy",
        "token_loss": "loss",
    },
)
