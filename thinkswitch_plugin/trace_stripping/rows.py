"""From one row of a dataset to answer-only conversations.

Knows: the two shapes a row may have, and which turns are the model's. Leaves to others: reading one text (`trace`),
tokens and files (`strategy`), whether too many rows were dropped (`report`).

- A *sample row* is a line that lm-eval writes with `log_samples`: `doc.messages` is the conversation so far,
  `doc.trace_opened` says whether the prompt's template had opened the trace, and every text in `resps` makes one
  conversation. Labels are the model's own: no other field is read, and assistant turns that came with the prompt are
  stripped like all others but not trained on.
- A *chat row* holds a whole conversation, traces inline or in a field of their own, and may say `trace_opened` for all
  of its assistant turns. A turn whose trace has its own field was split by whoever wrote the row, so its content is
  read as if the template had opened nothing.

Only assistant turns are ever changed, and of those only role, content, tool calls and the recipe's own training flag
are kept: whatever else such a turn carries may be reasoning under another name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from thinkswitch_plugin.trace_stripping.trace import DEFAULT_TAGS, TagPairs, split_trace

# On messages of sample rows: Axolotl's `message_field_training`, under a name no dataset uses.
TRAIN_FLAG = "thinkswitch_train"

NO_RESPONSE = "no_response"


@dataclass(frozen=True)
class Layout:
    """The names under which messages keep their parts; the defaults are Axolotl's."""

    messages: str = "messages"
    role: str = "role"
    content: str = "content"
    thinking: tuple[str, ...] = ("reasoning_content",)
    train_flag: str = TRAIN_FLAG
    assistants: frozenset[str] = frozenset({"assistant", "gpt"})


@dataclass(frozen=True)
class StrippedRow:
    """One conversation after stripping.

    Attributes:
        messages: the turns, complete only where `dropped` is None.
        dropped: why the conversation cannot be trained on, the first reason found; None where it can.
        read: the texts of the turns to train on as they came, reasoning included.
        kept: what is left of them.
    """

    messages: list[dict[str, Any]]
    dropped: str | None
    read: list[str]
    kept: list[str]


def strip_sample_row(
    row: Mapping[str, Any], layout: Layout, tags: TagPairs = DEFAULT_TAGS, strip: bool = True
) -> Iterator[StrippedRow]:
    """Make one answer-only conversation of each text that lm-eval logged for a prompt.

    Args:
        row: has `doc` (with `messages` and `trace_opened`) and `resps`, a list of lists of texts.
        layout: the names to write the messages with; the row's own are `role` and `content`.
        tags: as for `split_trace`.
        strip: False leaves the answer as it came, after the opening tag that the prompt had given it; what has no
            answer is dropped all the same.

    Yields:
        A conversation a text, in their order; one dropped as "no_response" where the row has no text at all.

    Raises:
        ValueError: a field that is needed is missing or of the wrong kind.
    """
    doc = row["doc"]
    if not isinstance(doc, Mapping) or not doc.get("messages"):
        raise ValueError("doc.messages is missing or empty; log samples of a task whose documents carry the messages")
    opened = doc.get("trace_opened")
    if not isinstance(opened, bool):
        raise ValueError(f"doc.trace_opened is {opened!r}; say true or false: had the template opened the trace?")
    prompt = _strip([_prompt_turn(turn, layout) for turn in doc["messages"]], layout, False, tags)
    texts = [text for texts in row["resps"] or [] for text in texts or []]
    for text in texts:
        answer = _strip([{layout.role: "assistant", layout.content: text}], layout, opened, tags)
        if not strip and not answer.dropped:
            whole = text if not opened or text.lstrip().startswith(tags[0][0]) else f"{tags[0][0]}\n{text}"
            answer = replace(answer, messages=[{layout.role: "assistant", layout.content: whole}], kept=answer.read)
        yield StrippedRow(
            prompt.messages + answer.messages,
            prompt.dropped or answer.dropped,
            answer.read,
            answer.kept,
        )
    if not texts:
        yield StrippedRow(prompt.messages, NO_RESPONSE, [], [])


def strip_chat_row(
    row: Mapping[str, Any], layout: Layout, tags: TagPairs = DEFAULT_TAGS, strip: bool = True
) -> StrippedRow:
    """Strip every assistant turn of one conversation.

    Args:
        row: has a list of messages under `layout.messages`, and maybe `trace_opened`.
        layout: the names of the messages' parts.
        tags: as for `split_trace`.
        strip: False leaves the turns as they came; what has no answer is dropped all the same.

    Returns:
        The conversation; dropped as "no_response" where it has no assistant turn at all.

    Raises:
        ValueError: a field that is needed is missing or of the wrong kind.
    """
    messages = row[layout.messages]
    if not isinstance(messages, list) or not all(isinstance(turn, Mapping) for turn in messages):
        raise ValueError(f"{layout.messages} is not a list of messages; write it as [{{role, content}}, ...]")
    opened = row.get("trace_opened")
    if not isinstance(opened, bool | None):
        raise ValueError(f"trace_opened is {opened!r}; say true or false, or leave it out")
    stripped = _strip(messages, layout, bool(opened), tags)
    if not strip:
        stripped = replace(stripped, messages=[dict(turn) for turn in messages], kept=stripped.read)
    if any(turn.get(layout.role) in layout.assistants for turn in messages):
        return stripped
    return StrippedRow(stripped.messages, NO_RESPONSE, [], [])


def _prompt_turn(turn: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    named = {layout.role: turn.get("role"), layout.content: turn.get("content")}
    return {**named, layout.train_flag: False} if turn.get("role") in layout.assistants else named


def _strip(turns: list[Any], layout: Layout, opened: bool, tags: TagPairs) -> StrippedRow:
    messages: list[dict[str, Any]] = []
    dropped: str | None = None
    read: list[str] = []
    kept: list[str] = []
    for turn in turns:
        if turn.get(layout.role) not in layout.assistants:
            messages.append(dict(turn))
            continue
        reasoning = _text(turn, [name for name in layout.thinking if turn.get(name)][:1])
        content = _text(turn, [layout.content])
        trace = split_trace(content, opened and not reasoning, tags)
        # A turn may answer with a call alone.
        calls_only = trace.status == "empty_answer" and bool(turn.get("tool_calls"))
        answer = "" if calls_only else trace.answer
        if answer is None:
            dropped = dropped or trace.status
        read.extend(text for text in (reasoning, content) if text)
        kept.append(answer or "")
        messages.append(_answer_turn(turn, answer or "", layout))
    return StrippedRow(messages, dropped, read, kept)


def _text(turn: Mapping[str, Any], names: list[str]) -> str:
    for name in names:
        value = turn.get(name)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise ValueError(f"an assistant turn's {name} is a {type(value).__name__}, not text; join its parts first")
        return value
    return ""


def _answer_turn(turn: Mapping[str, Any], answer: str, layout: Layout) -> dict[str, Any]:
    kept = {name: turn[name] for name in ("tool_calls", layout.train_flag) if turn.get(name) is not None}
    return {layout.role: turn[layout.role], layout.content: answer, **kept}
