"""The Axolotl plugin: checks the recipe, keeps the cache honest, writes down the counts when training starts.

Knows: Axolotl's hooks. Leaves to others: stripping itself, which is the dataset type (`strategy`).

Axolotl keeps prepared datasets under a hash of the recipe's dataset entries, by name: neither a file's content nor the
`trace_stripping:` block is part of it, so a changed one would silently train on the old set. `register` therefore
writes a fingerprint of both into the entry's `input_transform`, a key that is in that hash and that only Axolotl's
`messages` type reads. Same content, same set; anything else is prepared anew. Not covered: a dataset that is not on
this machine (pin it with `revision:`), and the tokenizer's files (Axolotl goes by the tokenizer's name).
"""

from __future__ import annotations

from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from axolotl.common.const import DEFAULT_DATASET_PREPARED_PATH
from axolotl.integrations.base import BasePlugin
from axolotl.utils.dict import DictDefault
from transformers.trainer_utils import unwrap_peft_model

from thinkswitch_plugin.facts import attached, publish
from thinkswitch_plugin.recipe import entries_of, fingerprint, is_listed, name_the_cpu, seed_adapter, send_no_reports
from thinkswitch_plugin.trace_stripping.args import BLOCK, DATASET_TYPE, PLUGIN, read_block
from thinkswitch_plugin.trace_stripping.report import PREFIX, Report
from thinkswitch_plugin.trace_stripping.strategy import LOG

# Part of every fingerprint: raise it when the same rows come out differently, so that no prepared set outlives that.
OUTCOME_VERSION = 2


class TraceStrippingPlugin(BasePlugin):
    """Trace stripping for `plugins:` (ThinkSwitch, arXiv 2606.01080: answer-only pairs are distilled)."""

    def register(self, cfg: dict) -> None:
        """Check the recipe and put a fingerprint into each dataset entry of our type.

        Args:
            cfg: the recipe, not yet validated.

        Raises:
            ValueError: no dataset has our type, or the `trace_stripping:` block is wrong; one line.
        """
        # The manager is shared by all recipes of a process, and this one may not be ours.
        if not is_listed(cfg, PLUGIN):
            return
        send_no_reports()
        config = read_block(cfg.get(BLOCK))
        entries = entries_of(cfg, DATASET_TYPE)
        if not entries:
            raise ValueError(
                f"{PREFIX}: the plugin is listed but no dataset uses it; set `type: {DATASET_TYPE}` on a dataset "
                "or remove the plugin"
            )
        for entry in entries:
            entry["input_transform"] = f"{PREFIX} {fingerprint(entry, config, OUTCOME_VERSION)}"

    def get_input_args(self) -> str:
        """The model of the `trace_stripping:` block, by its import path."""
        return "thinkswitch_plugin.trace_stripping.args.TraceStrippingArgs"

    def load_datasets(self, cfg: DictDefault, preprocess: bool = False) -> None:
        """Before anything is loaded: a CPU must be called one, in each of a training's processes."""
        if is_listed(cfg, PLUGIN):
            name_the_cpu(cfg)

    def pre_lora_load(self, cfg: DictDefault, model: Any) -> None:
        """Set the recipe's seed before an adapter is drawn."""
        seed_adapter(cfg, PLUGIN)

    def post_trainer_create(self, cfg: DictDefault, trainer: Any) -> None:
        """Write the training set's counts to `OUTPUT_DIR/trace_stripping.json`; say those of one prepared before.

        And have a step's loss be the mean over all its tokens, on however many devices and in however many parts.

        Args:
            cfg: the recipe.
            trainer: holds the training set, to which the counts are attached.
        """
        if not is_listed(cfg, PLUGIN):
            return
        weigh_tokens(trainer)
        publish(trainer, BLOCK, cfg.output_dir)
        reports = [Report(**counts) for counts in attached(trainer.train_dataset, BLOCK)]
        # A set prepared in this run has shown its counts already.
        if reports and _is_read_back(trainer.train_dataset, cfg.dataset_prepared_path):
            for report in reports:
                LOG.info(f"{PREFIX}: {report.path}: {report.line()}")


def weigh_tokens(trainer: Any) -> None:
    """Have every answer's token count the same in a step, in one process as in several.

    Axolotl 0.19 turns this off, and then a device, or a part of an accumulated step, counts the same however few tokens
    its answers have: two processes moved an adapter by 4 to 9 % another way than one did with the same rows.

    A model that does not divide by the step's tokens is left as it is: the trainer would no longer divide by the parts
    either, and the gradient would be as many times too large as there are.
    """
    if trainer.args.world_size == 1 and trainer.args.gradient_accumulation_steps == 1:
        return
    model = unwrap_peft_model(trainer.accelerator.unwrap_model(trainer.model))
    if not _divides_by_the_step(model):
        LOG.warning(
            f"{PREFIX}: {type(model).__name__} takes the mean over each device's micro-batch: those with few answer "
            "tokens count as much as others; gradient_accumulation_steps: 1 in one process has one mean"
        )
        return
    trainer.args.average_tokens_across_devices = True
    # Axolotl looks for `num_items_in_batch` in the decoder's signature; the whole model reads it from its kwargs.
    trainer.model_accepts_loss_kwargs = True


def _divides_by_the_step(model: Any) -> bool:
    """What a model without its adapter says of `num_items_in_batch`, by its class or by its signature."""
    said = getattr(model, "accepts_loss_kwargs", None)
    kinds = {parameter.kind for parameter in signature(model.forward).parameters.values()}
    return Parameter.VAR_KEYWORD in kinds if said is None else bool(said)


def _is_read_back(dataset: Any, prepared_path: str | None) -> bool:
    prepared = Path(prepared_path or DEFAULT_DATASET_PREPARED_PATH).resolve()
    return any(prepared in Path(file["filename"]).resolve().parents for file in dataset.cache_files)
