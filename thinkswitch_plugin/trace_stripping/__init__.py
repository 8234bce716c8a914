"""Answer-only training pairs from traced answers, as an Axolotl plugin and dataset type.

ThinkSwitch (arXiv 2606.01080, trace removal): the trace is removed, answer-only pairs are distilled. README.md beside
this file has the recipe. `split_trace` costs a regular expression to import; what needs Axolotl is loaded when Axolotl
asks for it by name: `TraceStrippingPlugin` for `plugins:` and `load` for a dataset's `type:`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from thinkswitch_plugin.lazy import attributes
from thinkswitch_plugin.trace_stripping.trace import DEFAULT_TAGS, Trace, split_trace, template_opens_trace, trace_end

if TYPE_CHECKING:
    from thinkswitch_plugin.trace_stripping.args import TraceStrippingArgs, TraceStrippingConfig
    from thinkswitch_plugin.trace_stripping.plugin import TraceStrippingPlugin
    from thinkswitch_plugin.trace_stripping.strategy import load

__all__ = [
    "DEFAULT_TAGS",
    "Trace",
    "TraceStrippingArgs",
    "TraceStrippingConfig",
    "TraceStrippingPlugin",
    "load",
    "split_trace",
    "template_opens_trace",
    "trace_end",
]

__getattr__ = attributes(
    __name__,
    {
        "TraceStrippingArgs": "args",
        "TraceStrippingConfig": "args",
        "TraceStrippingPlugin": "plugin",
        "load": "strategy",
    },
)
