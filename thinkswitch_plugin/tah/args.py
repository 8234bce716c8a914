"""What a recipe may say under `tah:`, and nothing else.

Knows: the plugin's names, keys, defaults and their limits. Leaves to others: what the keys do, and whether they fit the
backbone (`TaHConfig`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from thinkswitch_plugin.recipe import checked
from thinkswitch_plugin.tah import LOADER as LOADER

PLUGIN = "thinkswitch_plugin.tah.TaHPlugin"
ADAPTER = "tah"


class TaHBlock(BaseModel):
    """The `tah:` block of a recipe; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid")

    stage: Literal["backbone", "decider"] = Field(
        description="What is trained: the backbone with its adapter, or the decider of such a checkpoint."
    )
    reference: str | None = Field(
        default=None,
        description="The frozen checkpoint that says which tokens are hard: those it predicts wrong. Needed at stage "
        "backbone; stage decider reads it from the checkpoint that stage left.",
    )
    unsure_below: float | None = Field(
        default=None,
        gt=0.0,
        le=1.0,
        description="A token is hard if the reference's first choice has less than this probability, right or wrong, "
        "instead of if it is wrong. Stage decider keeps what stage backbone had.",
    )
    max_depth: int = Field(default=2, ge=1, description="Passes of a hard token.")
    mix_top_k: int = Field(
        default=100,
        ge=1,
        description="Predictions mixed into the next pass's input, and read by the decider.",
    )
    lora_r: int = Field(default=32, ge=1, description="Rank of the adapter that is on from depth 2.")
    lora_alpha: float = Field(default=64.0, gt=0.0, description="Its scale is lora_alpha / lora_r.")
    lora_dropout: float = Field(default=0.1, ge=0.0, lt=1.0, description="Dropout before the adapter.")
    policy: Literal["oracle", "always"] = Field(
        default="oracle",
        description="Which tokens continue at stage backbone: the hard ones, or all (a baseline).",
    )
    decider_layers: list[int] = Field(
        default_factory=list,
        description="Hidden states the decider reads: 0 is the embedding, i what layer i leaves.",
    )
    decider_hidden: list[int] = Field(default_factory=list, description="Widths of the decider's blocks.")
    decider_expansion: int = Field(default=4, ge=1, description="Inner width of a block over its width.")
    decider_dropout: float = Field(default=0.1, ge=0.0, lt=1.0, description="Dropout in its blocks.")
    threshold: float = Field(default=0.9, ge=0.0, le=1.0, description="Probability above which a token continues.")
    pos_weight: float = Field(default=5.4, gt=0.0, description="Weight of hard tokens in the decider's loss.")
    label_tokens: int = Field(default=16384, ge=1, description="Tokens the reference reads at once, padding included.")

    @model_validator(mode="after")
    def _fits_its_stage(self) -> TaHBlock:
        if self.stage == "backbone":
            if not self.reference:
                raise ValueError("stage backbone needs reference: the checkpoint whose mistakes are the hard tokens")
            theirs = {"decider_layers", "decider_hidden", "decider_expansion", "decider_dropout", "pos_weight"}
        else:
            if not self.decider_layers or not self.decider_hidden:
                raise ValueError("stage decider needs decider_layers and decider_hidden")
            theirs = {"unsure_below", "max_depth", "mix_top_k", "lora_r", "lora_alpha", "lora_dropout", "policy"}
        # Axolotl hands the block on with its defaults filled in, which say nothing.
        fields = type(self).model_fields
        wrong = sorted(
            key for key in theirs if getattr(self, key) != fields[key].get_default(call_default_factory=True)
        )
        if wrong:
            other = "decider" if self.stage == "backbone" else "backbone"
            raise ValueError(f"{wrong[0]} belongs to stage {other}; remove it")
        return self

    @property
    def of_config(self) -> dict[str, Any]:
        """What this stage decides of a `TaHConfig`."""
        backbone = ("max_depth", "mix_top_k", "lora_r", "lora_alpha", "lora_dropout", "reference", "unsure_below")
        decider = ("decider_layers", "decider_hidden", "decider_expansion", "decider_dropout")
        keys = backbone if self.stage == "backbone" else decider
        settings = {key: getattr(self, key) for key in (*keys, "threshold")}
        return {**settings, "decider": self.policy if self.stage == "backbone" else "learned"}


class TaHArgs(BaseModel):
    """What the plugin adds to Axolotl's own config model."""

    tah: TaHBlock | None = Field(
        default=None, description="Think-at-Hard: a second latent pass for the tokens that need it."
    )


def read_block(block: Mapping[str, Any] | None) -> TaHBlock:
    """Read a recipe's `tah:` block; raises `ValueError` with one line, as `checked` does."""
    return checked("tah", TaHBlock, block)
