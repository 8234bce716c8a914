"""What a recipe may say under `trace_stripping:`, and nothing else.

Knows: the plugin's names, keys, defaults and their limits. Leaves to others: what the keys do (`trace`, `report`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from thinkswitch_plugin.recipe import checked
from thinkswitch_plugin.trace_stripping.trace import DEFAULT_TAGS, split_trace

BLOCK = "trace_stripping"  # the key in a recipe, and the name of the file of facts
DATASET_TYPE = "thinkswitch_plugin.trace_stripping"
PLUGIN = f"{DATASET_TYPE}.TraceStrippingPlugin"


def _readable(tags: list[tuple[str, str]]) -> list[tuple[str, str]]:
    split_trace("", tags=tags)  # raises where it cannot work with them
    return tags


# Of any plugin's block: what opens and what closes a trace, in pairs.
Tags = Annotated[list[tuple[str, str]], AfterValidator(_readable)]


class TraceStrippingConfig(BaseModel):
    """The `trace_stripping:` block of a recipe; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid")

    tags: Tags = Field(
        default=list(DEFAULT_TAGS),
        description="Pairs of opening and closing tag, as they are written in the answers.",
    )
    max_dropped_fraction: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Stop with an error if a larger share of a dataset's rows has no answer.",
    )
    strip: bool = Field(
        default=True,
        description="False keeps the traces of the answers that have one, for a baseline: what is stripping worth?",
    )


class TraceStrippingArgs(BaseModel):
    """What the plugin adds to Axolotl's own config model."""

    trace_stripping: TraceStrippingConfig | None = Field(
        default_factory=TraceStrippingConfig,
        description="How reasoning traces are taken out of the training answers.",
    )


def read_block(block: Mapping[str, Any] | None) -> TraceStrippingConfig:
    """Read a recipe's `trace_stripping:` block; raises `ValueError` with one line, as `checked` does."""
    return checked(BLOCK, TraceStrippingConfig, block)
