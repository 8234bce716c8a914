"""Think-at-Hard for Axolotl: a second latent pass for the tokens that need it (arXiv 2511.08577).

README.md beside this file has the recipes. `TaHPlugin` is for `plugins:`; `TaHForCausalLM` and `TaHConfig` are the
model. Each is loaded when it is asked for by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thinkswitch_plugin.tah.args import TaHArgs, TaHBlock
    from thinkswitch_plugin.tah.config import TaHConfig
    from thinkswitch_plugin.tah.model import TaHForCausalLM
    from thinkswitch_plugin.tah.plugin import TaHPlugin

__all__ = ["TaHArgs", "TaHBlock", "TaHConfig", "TaHForCausalLM", "TaHPlugin"]

_HEAVY = {
    "TaHArgs": "args",
    "TaHBlock": "args",
    "TaHConfig": "config",
    "TaHForCausalLM": "model",
    "TaHPlugin": "plugin",
}


def __getattr__(name: str) -> Any:
    if name not in _HEAVY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HEAVY[name]}"), name)
