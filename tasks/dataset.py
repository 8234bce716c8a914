"""Load the rows of a task and tell each row whether the model's chat template opens the trace.

Knows where rows come from and which model was named to lm-eval. Leaves what a row asks to the task's own folder and the
grading to `answers.py`.

lm-eval hands a grader the row and the text, never who wrote it, and the text alone cannot say what a missing closing
tag means: a whole answer from an instruct checkpoint, a cut-off trace from one whose template had opened it. The one
hook that sees the model is `custom_dataset`, which lm-eval calls with the task's metadata and the model arguments in
one. So that is where the column `trace_opened` is made.
"""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from datasets import Dataset, load_dataset

from thinkswitch_plugin.prompts import read_prompts
from thinkswitch_plugin.trace_stripping import template_opens_trace

logger = logging.getLogger(__name__)


def from_hub(*, hub: dict[str, Any], **metadata: Any) -> dict[str, Dataset]:
    """Rows of one split of a hub dataset.

    Args:
        hub: The arguments of `datasets.load_dataset`, `split` among them.
        metadata: What lm-eval knows of the task and the model, see `trace_opened`.

    Returns:
        The rows as the split `test`, with the column `trace_opened`.

    Raises:
        ValueError: See `trace_opened`.
    """
    return _as_test_split(load_dataset(**hub), metadata)


def from_task_file(*, file: str, **metadata: Any) -> dict[str, Dataset]:
    """Rows of a `.jsonl` file that ships with the tasks.

    Args:
        file: Its path, relative to the folder of this module.
        metadata: As for `from_hub`.

    Returns:
        As `from_hub`.

    Raises:
        ValueError: See `trace_opened`.
    """
    with (Path(__file__).parent / file).open(encoding="utf-8") as lines:
        return _as_test_split(Dataset.from_list([json.loads(line) for line in lines]), metadata)


def from_prompts_file(*, prompts_file: str | None = None, **metadata: Any) -> dict[str, Dataset]:
    """Rows of the user's own prompts file.

    Args:
        prompts_file: A path as `thinkswitch_plugin.prompts.read_prompts` takes it.
        metadata: As for `from_hub`.

    Returns:
        As `from_hub`, with the columns `id` and `messages`.

    Raises:
        ValueError: No file was named, or it is broken, or see `trace_opened`.
    """
    if not prompts_file:
        raise ValueError('no prompts file was named; add --metadata \'{"prompts_file": "my_prompts.jsonl"}\'')
    return _as_test_split(Dataset.from_list(read_prompts(prompts_file)), metadata)


def trace_opened(metadata: dict[str, Any]) -> bool:
    """Whether the model's prompts end inside a trace that the chat template opened.

    The key `trace_opened` decides where it is given. Else the chat template of the first of `tokenizer`, `pretrained`
    and `model` does. Else, as for a server of which only a name is known, the answer is no, with a warning.

    Args:
        metadata: The task's metadata with the model arguments merged in by lm-eval.

    Returns:
        True for a thinking checkpoint like Qwen3-4B-Thinking-2507.

    Raises:
        ValueError: The named tokenizer cannot be loaded, or `think_end_token` is set on a model whose template opens
            the trace: lm-eval then cuts closed traces off and leaves unclosed ones, and what remains looks alike.
    """
    opened = metadata.get("trace_opened")
    if opened is None:
        opened = _template_opens(metadata)
    if not isinstance(opened, bool):
        raise ValueError(f"trace_opened is {opened!r}; write true or false")
    if opened and metadata.get("think_end_token") is not None:
        raise ValueError(
            "think_end_token hides from these tasks which traces closed; "
            "take it out of the model arguments, the tasks strip the trace themselves"
        )
    return opened


def _template_opens(metadata: dict[str, Any]) -> bool:
    key = next((key for key in ("tokenizer", "pretrained", "model") if metadata.get(key)), None)
    source = metadata.get(key) if key else None
    if hasattr(source, "apply_chat_template"):
        return template_opens_trace(_with_template_args(source, metadata))
    if not isinstance(source, (str, Path)):
        logger.warning("Which model answers is not known, so a text without tags counts as an answer; %s", _SAY_IT)
        return False
    loading = {name: metadata[name] for name in ("revision", "subfolder", "trust_remote_code") if metadata.get(name)}
    try:
        return template_opens_trace(_with_template_args(_tokenizer(str(source), **loading), metadata))
    except (OSError, ValueError) as error:
        if key == "model":
            logger.warning("%s names no tokenizer, so a text without tags counts as an answer; %s", source, _SAY_IT)
            return False
        raise ValueError(f"{key}={source} has no tokenizer to see if its template opens a trace; {_SAY_IT}") from error


_SAY_IT = "if it thinks, say so: --metadata '{\"trace_opened\": true}'"


def _with_template_args(tokenizer: Any, metadata: dict[str, Any]) -> Any:
    """The tokenizer as lm-eval will use it: a template may open the trace or not by `enable_thinking`."""
    switch = {"enable_thinking": metadata["enable_thinking"]} if metadata.get("enable_thinking") is not None else {}
    arguments = {**switch, **(metadata.get("chat_template_args") or {})}
    return SimpleNamespace(
        chat_template=tokenizer.chat_template,
        apply_chat_template=partial(tokenizer.apply_chat_template, **arguments),
    )


def _tokenizer(source: str, **loading: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source, **loading)


def _as_test_split(rows: Dataset, metadata: dict[str, Any]) -> dict[str, Dataset]:
    return {"test": rows.add_column("trace_opened", [trace_opened(metadata)] * len(rows))}
