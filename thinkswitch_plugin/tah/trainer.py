"""Axolotl's trainer, with depths in its log, and how often the decider is right while it learns.

Knows the trainer's hooks. Leaves the passes and the losses to `model`.
"""

from __future__ import annotations

from typing import Any

from axolotl.core.trainers.base import AxolotlTrainer
from torch import Tensor

from thinkswitch_plugin.tah.oracle import IGNORED


class TaHTrainer(AxolotlTrainer):
    """Logs `mean_depth` over the tokens that carry a loss, and `decider_accuracy` where the decider learns."""

    def __init__(self, *args: Any, **kwargs: Any):
        """As Axolotl builds it."""
        super().__init__(*args, **kwargs)
        # Axolotl looks for `num_items_in_batch` in the decoder's signature; it is the whole model that reads it.
        self.model_accepts_loss_kwargs = True
        self._sums: dict[str, Tensor] = {}  # on the device: reading one waits for it, so that is done to log

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's own loss."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            counted = inputs["labels"][:, 1:] != IGNORED
            self._add("depth", (outputs.depth[:, :-1] * counted).sum(), counted.sum())
            if outputs.decided is not None:
                self._add("right", outputs.right, outputs.decided)
        return (loss, outputs) if return_outputs else loss

    def _add(self, name: str, value: Tensor, count: Tensor) -> None:
        for key, new in ((name, value), (f"{name}_of", count)):
            self._sums[key] = self._sums[key] + new if key in self._sums else new.detach()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add what was gathered since the last log."""
        if "loss" in logs:
            sums = {key: float(value) for key, value in self._sums.items()}
            for shown, key in (("mean_depth", "depth"), ("decider_accuracy", "right")):
                if sums.get(f"{key}_of"):
                    logs[shown] = round(sums[key] / sums[f"{key}_of"], 4)
            self._sums = {}
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """In float32 what is trained so, unlike the last save: a run is taken up, and its best model read, from it."""
        with self.accelerator.unwrap_model(self.model).as_trained():
            super()._save_checkpoint(*args, **kwargs)
