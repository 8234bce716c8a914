"""Think-at-Hard for Axolotl: a second latent pass for the tokens that need it (arXiv 2511.08577).

README.md beside this file has the recipes. `TaHPlugin` is for `plugins:`; `TaHForCausalLM` and `TaHConfig` are the
model. Each is loaded when it is asked for by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from thinkswitch_plugin.lazy import attributes

if TYPE_CHECKING:
    from thinkswitch_plugin.tah.args import TaHArgs, TaHBlock
    from thinkswitch_plugin.tah.config import TaHConfig
    from thinkswitch_plugin.tah.model import TaHForCausalLM
    from thinkswitch_plugin.tah.plugin import TaHPlugin

LOADER = "tah_auto.py"  # of a checkpoint: the one file of code there

__all__ = ["LOADER", "TaHArgs", "TaHBlock", "TaHConfig", "TaHForCausalLM", "TaHPlugin"]

__getattr__ = attributes(
    __name__,
    {
        "TaHArgs": "args",
        "TaHBlock": "args",
        "TaHConfig": "config",
        "TaHForCausalLM": "model",
        "TaHPlugin": "plugin",
    },
)
