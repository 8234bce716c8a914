"""The dataset type `thinkswitch_plugin.trace_stripping`: strip, count, then let Axolotl tokenise.

Knows: Axolotl's dataset strategies and how to feed one to another. Leaves to others: what is reasoning (`trace`), the
shapes of rows (`rows`), the numbers (`report`), the recipe's block (`args`), and keeping Axolotl's cache honest
(`plugin`).

There is no second tokeniser here. Stripped conversations go to Axolotl's own `chat_template` strategy, configured by
the same dataset entry: chat template, `roles_to_train`, `train_on_eos` and label masking are what they would be for
`type: chat_template` with the traces gone (ThinkSwitch, arXiv 2606.01080, trace removal: the trace is removed,
answer-only pairs are distilled).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from axolotl.datasets import wrap_dataset_for_tokenized_prompt
from axolotl.prompt_strategies.chat_template import ChatTemplateStrategy
from axolotl.prompt_strategies.chat_template import load as load_chat_template
from axolotl.prompt_tokenizers import DatasetWrappingStrategy
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from datasets import Dataset, Features, List, Value

from thinkswitch_plugin.facts import attach
from thinkswitch_plugin.recipe import is_listed
from thinkswitch_plugin.trace_stripping.args import BLOCK, PLUGIN, TraceStrippingConfig, read_block
from thinkswitch_plugin.trace_stripping.report import PREFIX, count
from thinkswitch_plugin.trace_stripping.rows import TRAIN_FLAG, Layout, StrippedRow, strip_chat_row, strip_sample_row

# Axolotl shows INFO of loggers under its own name only.
LOG = get_logger("axolotl.thinkswitch.trace_stripping")

# Traces run to tens of thousands of tokens, and a batch is tokenised whole to be counted.
ROWS_PER_BATCH = 64

_COUNTS = {"dropped": Value("string"), "tokens_read": Value("int64"), "tokens_kept": Value("int64")}


class TraceStrippingStrategy(DatasetWrappingStrategy):
    """Turns traced answers into tokenised answer-only conversations; `load` makes one from a recipe.

    Args:
        chat: Axolotl's strategy for the stripped conversations.
        config: the recipe's `trace_stripping:` block.
        path: the dataset, as the recipe names it.
    """

    def __init__(self, chat: ChatTemplateStrategy, config: TraceStrippingConfig, path: str) -> None:
        self.chat = chat
        self.config = config
        self.path = path

    def wrap_dataset(
        self, dataset: Any, process_count: int | None = None, keep_in_memory: bool | None = False, **kwargs: Any
    ) -> Dataset:
        """Strip, count and tokenise a whole dataset.

        Args:
            dataset: sample rows of lm-eval or chat rows, see `rows`.
            process_count: the recipe's `dataset_num_proc`; 1 is this process.
            keep_in_memory: the recipe's `dataset_keep_in_memory`.
            kwargs: what later versions of Axolotl may pass on; not used.

        Returns:
            Rows of `input_ids`, `attention_mask` and `labels` in the order of the dataset, with the counts attached.

        Raises:
            ValueError: the rows are of neither shape, or too few have an answer; one line.
        """
        if not isinstance(dataset, Dataset):
            raise ValueError(f"{PREFIX}: {self.path}: a stream cannot be counted; remove `streaming: true`")
        if not len(dataset):
            raise ValueError(f"{PREFIX}: {self.path}: the dataset has no rows; was it generated?")
        # `datasets` would fork a pool even for one process.
        processes = process_count if process_count and process_count > 1 else None
        stripped = self._strip(dataset, {"num_proc": processes, "keep_in_memory": bool(keep_in_memory)})
        report = count(self.path, stripped["dropped"], stripped["tokens_read"], stripped["tokens_kept"])
        report.check(self.config.max_dropped_fraction)
        kept = [index for index, dropped in enumerate(stripped["dropped"]) if dropped is None]
        pairs = stripped.select(kept).remove_columns(list(_COUNTS))
        tokenized = wrap_dataset_for_tokenized_prompt(
            self.chat, pairs, process_count=processes, keep_in_memory=keep_in_memory
        )
        attach(tokenized, BLOCK, asdict(report))
        LOG.info(f"{PREFIX}: {self.path}: {report.line()}")
        return tokenized

    def _strip(self, dataset: Dataset, how: dict[str, Any]) -> Dataset:
        layout = _layout(self.chat)
        columns = dataset.column_names
        if {"doc", "resps"} <= set(columns):
            needed = ["doc", "resps"]
            turn = dict.fromkeys((layout.role, layout.content), Value("string")) | {layout.train_flag: Value("bool")}
            features = {layout.messages: List(turn)}
        elif layout.messages in columns:
            passed_on = [layout.messages, self.chat.prompter.field_tools, self.chat.prompter.field_system]
            passed_on = [name for name in passed_on if name in columns]
            needed = [*passed_on, *({"trace_opened"} & set(columns))]
            features = {name: dataset.features[name] for name in passed_on}
        else:
            raise ValueError(
                f"{PREFIX}: {self.path}: no column doc and resps (samples logged by lm-eval) and no column "
                f"{layout.messages} (chat rows), only {', '.join(columns)}; set field_messages or log samples"
            )
        strip = partial(
            _strip_batch,
            layout=layout,
            config=self.config,
            tokenizer=self.chat.tokenizer,
            path=self.path,
        )
        # A cached map is found again by the code's name, not by what the code does.
        return dataset.select_columns(needed).map(
            strip,
            batched=True,
            batch_size=ROWS_PER_BATCH,
            with_indices=True,
            remove_columns=needed,
            features=Features({**features, **_COUNTS}),
            load_from_cache_file=False,
            desc="Stripping traces",
            **how,
        )


def load(tokenizer: Any, cfg: DictDefault, ds_cfg: Mapping[str, Any] | None = None) -> TraceStrippingStrategy:
    """Make the strategy for one dataset entry; Axolotl calls this for the dataset's `type:`.

    Args:
        tokenizer: the tokenizer of the model that is trained.
        cfg: the whole recipe.
        ds_cfg: the dataset's entry, with the keys of `type: chat_template`.

    Returns:
        The strategy.

    Raises:
        ValueError: the recipe does not list the plugin, or the entry asks for what stripping rules out; one line.
    """
    entry = {key: value for key, value in (ds_cfg or {}).items() if value is not None}
    path = str(entry.get("path", "dataset"))
    if not is_listed(cfg, PLUGIN):
        raise ValueError(
            f"{PREFIX}: {path}: the recipe uses the dataset type but not the plugin, so its trace_stripping: block "
            f"would not be read; add `plugins: [{PLUGIN}]`"
        )
    if entry.get("message_field_training_detail"):
        raise ValueError(
            f"{PREFIX}: {path}: message_field_training_detail counts characters of the text before stripping; remove it"
        )
    entry.setdefault("message_field_training", TRAIN_FLAG)
    return TraceStrippingStrategy(
        chat=load_chat_template(tokenizer, cfg, entry), config=read_block(cfg.get(BLOCK)), path=path
    )


def _layout(chat: ChatTemplateStrategy) -> Layout:
    prompter = chat.prompter
    names = prompter.message_property_mappings
    # Whatever role is trained on must be stripped, under any name the recipe gives it.
    trained = ({"assistant"} | set(chat.roles_to_train)) - {"user", "system", "tool"}
    thinking = dict.fromkeys(
        [prompter.field_thinking, names.get(prompter.template_thinking_key), prompter.template_thinking_key]
    )
    return Layout(
        messages=prompter.field_messages,
        role=names.get("role", "role"),
        content=names.get("content", "content"),
        thinking=tuple(name for name in (*thinking, "reasoning_content") if name),
        train_flag=prompter.message_field_training or TRAIN_FLAG,
        assistants=frozenset(trained | {source for source, target in prompter.roles.items() if target in trained}),
    )


def _strip_batch(
    batch: dict[str, list[Any]],
    indices: list[int],
    layout: Layout,
    config: TraceStrippingConfig,
    tokenizer: Any,
    path: str,
) -> dict[str, list[Any]]:
    names = list(batch)
    stripped: list[StrippedRow] = []
    passed_on: list[dict[str, Any]] = []
    for index, values in zip(indices, zip(*batch.values(), strict=True), strict=True):
        row = dict(zip(names, values, strict=True))
        try:
            if "resps" in row:
                new = list(strip_sample_row(row, layout, config.tags, config.strip))
            else:
                new = [strip_chat_row(row, layout, config.tags, config.strip)]
        except ValueError as error:
            raise ValueError(f"{PREFIX}: {path}: row {index + 1}: {error}") from None
        stripped += new
        passed_on += [row] * len(new)
    others = [name for name in names if name not in ("doc", "resps", "trace_opened", layout.messages)]
    return {
        layout.messages: [row.messages for row in stripped],
        **{name: [row[name] for row in passed_on] for name in others},
        "dropped": [row.dropped for row in stripped],
        "tokens_read": _tokens(tokenizer, [row.read for row in stripped]),
        "tokens_kept": _tokens(tokenizer, [row.kept for row in stripped]),
    }


def _tokens(tokenizer: Any, rows: list[list[str]]) -> list[int]:
    """Tokens of each row's texts, in one call: a fast tokenizer takes a batch on all cores."""
    texts = [text for row in rows for text in row]
    if not texts:
        return [0] * len(rows)
    lengths = iter([len(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]])
    return [sum(next(lengths) for _ in row) for row in rows]
