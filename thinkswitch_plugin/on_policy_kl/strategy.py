"""The dataset type `thinkswitch_plugin.on_policy_kl`: the student's prompts, and what the teacher reads first.

Knows Axolotl's dataset strategies, chat templates, and the two shapes of rows. Leaves to others: answering (`rollouts`)
and thinking where a row brings no trace (`scoring`).

- A *prompt row* has `messages`, `prompt` or `problem`, as in a prompts file (`thinkswitch_plugin.prompts`). Other
  columns, gold answers above all, are not read.
- A *sample row* is a line that lm-eval writes with `log_samples`: `doc.messages` is the prompt, and with `context:
  trace` each text in `resps` that closes its trace gives the teacher that trace, if it has no more tokens than the
  teacher may write itself (`trace_max_new_tokens`): what the teacher reads at once is what its memory is planned for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from axolotl.prompt_tokenizers import DatasetWrappingStrategy
from axolotl.utils.chat_templates import get_chat_template_from_config
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from datasets import Dataset, Features, List, Value
from transformers import AutoTokenizer

from thinkswitch_plugin.facts import attach
from thinkswitch_plugin.on_policy_kl.args import BLOCK, DATASET_TYPE, PLUGIN, SELF, OnPolicyKLConfig, read_block
from thinkswitch_plugin.on_policy_kl.report import Report
from thinkswitch_plugin.prompts import conversation
from thinkswitch_plugin.recipe import is_listed
from thinkswitch_plugin.trace_stripping.trace import TagPairs, trace_end

LOG = get_logger("axolotl.thinkswitch.on_policy_kl")

IDS = List(Value("int64"))
FEATURES = Features(input_ids=IDS, attention_mask=IDS, labels=IDS, teacher_input_ids=IDS, teacher_thinks=Value("bool"))


class OnPolicyKLStrategy(DatasetWrappingStrategy):
    """Turns rows into prompts as student and teacher read them; `load` makes one from a recipe.

    Args:
        student: renders a conversation with the student's template: messages to token ids.
        teacher: the same for what the teacher reads; it takes the trace to follow, or None.
        config: the recipe's `on_policy_kl:` block.
        longest: the recipe's `sequence_len`.
        path: the dataset, as the recipe names it.
    """

    def __init__(self, student: Any, teacher: Any, config: OnPolicyKLConfig, longest: int, path: str) -> None:
        self.student, self.teacher, self.config, self.longest, self.path = student, teacher, config, longest, path

    def wrap_dataset(
        self, dataset: Any, process_count: int | None = None, keep_in_memory: bool | None = False, **kwargs: Any
    ) -> Dataset:
        """Tokenise every prompt.

        Args:
            dataset: prompt rows or sample rows.
            process_count: not used: rendering prompts takes no time worth a process.
            keep_in_memory: not used.
            kwargs: not used.

        Returns:
            Rows of `input_ids` (the student's prompt), `teacher_input_ids` (with the trace where the row brings one)
            and `teacher_thinks` (the trace is still to be written). `labels` are a copy of `input_ids` that no loss
            reads: Axolotl drops rows without labels.

        Raises:
            ValueError: a row has no prompt, or one too long for `sequence_len`, one line with the row's number; or too
                little is left, one line with the counts.
        """
        rows: list[dict[str, Any]] = []
        unclosed = too_long = 0
        for number, row in enumerate(dataset, start=1):
            try:
                messages, traces = self._read(row)
            except ValueError as error:
                raise ValueError(f"on_policy_kl: {self.path}: row {number}: {error}") from None
            unclosed += not traces
            for trace in traces:
                prompt = self._prompt(messages, trace, number)
                rows += [prompt] if prompt else []
                too_long += not prompt
        with_trace = 0 if self.config.context == "prompt" else sum(not row["teacher_thinks"] for row in rows)
        report = Report(self.path, len(rows), with_trace, unclosed, too_long)
        report.check(self.config.max_dropped_fraction, self.config.trace_max_new_tokens)
        prepared = Dataset.from_list(rows, features=FEATURES)
        attach(prepared, BLOCK, asdict(report))
        LOG.info(f"on_policy_kl: {self.path}: {report.line()}")
        return prepared

    def _read(self, row: Mapping[str, Any]) -> tuple[list[dict[str, str]], list[str | None]]:
        """A row's conversation, and the traces it brings: [None] where there are none to bring."""
        doc = row.get("doc")
        if not isinstance(doc, Mapping):
            named = {key: value for key, value in row.items() if value is not None}
            return conversation(named), [None]
        messages = conversation({"messages": doc.get("messages")})
        if self.config.context == "prompt":
            return messages, [None]
        texts = [text for texts in row.get("resps") or [] for text in texts or []]
        traces = [trace_of(text, bool(doc.get("trace_opened")), self.config.tags) for text in texts]
        return messages, [trace for trace in traces if trace is not None]

    def _prompt(self, messages: list[dict[str, str]], trace: str | None, number: int) -> dict[str, Any] | None:
        """A row, or None where its trace is too long."""
        ids = self.student(messages)
        theirs = ids if self.config.context == "prompt" else self.teacher(messages, trace)
        writes = trace is None and self.config.context == "trace"
        if trace is not None and len(theirs) > len(self.teacher(messages, None)) + self.config.trace_max_new_tokens:
            return None
        answer = self.config.max_new_tokens
        if len(ids) + answer > self.longest:
            raise ValueError(
                f"on_policy_kl: {self.path}: row {number}: the prompt has {len(ids)} tokens and the answer may have "
                f"{answer}: raise sequence_len from {self.longest} to {len(ids) + answer}, or lower max_new_tokens"
            )
        return {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "labels": ids,
            "teacher_input_ids": theirs,
            "teacher_thinks": writes,
        }


def trace_of(text: str, opened: bool, tags: TagPairs) -> str | None:
    """A text up to where its trace is over, with the white space that follows; None where it is not.

    Args:
        text: what the teacher wrote.
        opened: its prompt had opened the trace.
        tags: as for `trace_end`.
    """
    end = trace_end(text, opened, tags)
    return None if end is None else text[: len(text) - len(text[end:].lstrip())]


def load(tokenizer: Any, cfg: DictDefault, ds_cfg: Mapping[str, Any] | None = None) -> OnPolicyKLStrategy:
    """Make the strategy for one dataset entry; Axolotl calls this for the dataset's `type:`.

    Args:
        tokenizer: the student's.
        cfg: the whole recipe.
        ds_cfg: the dataset's entry; of its keys `chat_template` and `chat_template_jinja` are looked at.

    Returns:
        The strategy.

    Raises:
        ValueError: the recipe does not list the plugin; one line.
    """
    entry = dict(ds_cfg or {})
    path = str(entry.get("path", "dataset"))
    if not is_listed(cfg, PLUGIN):
        raise ValueError(f"on_policy_kl: {path}: type {DATASET_TYPE} needs `plugins: [{PLUGIN}]` in the recipe")
    config = read_block(cfg.get(BLOCK))
    template = get_chat_template_from_config(cfg=cfg, ds_cfg=entry, tokenizer=tokenizer)
    options = dict(cfg.get("chat_template_kwargs") or {})

    def student(messages: list[dict[str, str]]) -> list[int]:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, tokenize=False, **options
        )
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    other = tokenizer if config.teacher == SELF else AutoTokenizer.from_pretrained(config.teacher)

    def teacher(messages: list[dict[str, str]], trace: str | None) -> list[int]:
        text = str(other.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        ids: list[int] = other(text + (trace or ""), add_special_tokens=False)["input_ids"]
        return ids

    return OnPolicyKLStrategy(student, teacher, config, cfg.sequence_len, path)
