"""Where a reasoning trace ends and the answer begins, for one text.

Knows: tags, nesting, and what a text is worth once its trace is gone. Leaves to others: rows, roles, counting and
tokens (`rows`, `strategy`), and what to do with a text that has no answer. Imports nothing but the standard library,
so that a grader or a report can read an answer the way training does.

ThinkSwitch (arXiv 2606.01080, trace removal): the trace is removed, answer-only pairs are distilled. One token of
reasoning that slips into a label teaches the instruct checkpoint to think aloud, so **whatever may be reasoning is
reasoning**:

- Text between an opening tag and the closing tag that balances it is reasoning, nested tags included. Text before,
  between and after such blocks is the answer, put together in its order.
- A closing tag that nothing in the text opened was opened by the prompt's template: *all* text before it is reasoning.
- An opening tag that is never closed, or closed too few times, leaves no answer at all, not even the text before it.
- `opened=True` says that the template opened the trace, so all text up to the closing tag that ends it is reasoning.
  One opening tag at the very start of such a text is the model repeating the template's, not a nested one.
- Tags are read in any case and with any attributes. One that is cut off before its `>` cannot end a trace, only begin
  or prolong it.
- Each pair of tags balances itself: `</reasoning>` does not close `<think>`.
- Where removing a block would join its neighbours into a new tag, no answer can be trusted and there is none.

An answer therefore holds no tag, and splitting it again changes nothing. Reading is one pass: time and memory are
linear in the text, whatever it repeats.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any, Literal, NamedTuple

Status = Literal["closed", "no_trace", "unclosed", "empty_answer"]
TagPairs = Sequence[Sequence[str]]

DEFAULT_TAGS: tuple[tuple[str, str], ...] = (("<think>", "</think>"),)


@dataclass(frozen=True)
class Trace:
    """A text taken apart.

    Attributes:
        reasoning: what the trace said, for counting and reading; None where there was no trace.
        answer: what is left, without white space around it; None unless `status` is "closed" or "no_trace".
        status: "closed" (a trace, then an answer), "no_trace" (all of it is the answer), "unclosed" (cut off inside
            the trace) or "empty_answer" (nothing but white space is left).
    """

    reasoning: str | None
    answer: str | None
    status: Status


def split_trace(text: str, opened: bool = False, tags: TagPairs = DEFAULT_TAGS) -> Trace:
    """Separate the reasoning in `text` from the answer; the module's docstring has the rules.

    Args:
        text: what the model wrote.
        opened: the prompt's template had already opened the trace (see `template_opens_trace`), so a text without
            any closing tag is "unclosed", not an answer.
        tags: pairs of opening and closing tag, as they are written: `[["<think>", "</think>"]]`.

    Returns:
        The reasoning, the answer and how the text ended.

    Raises:
        ValueError: `tags` holds something else than pairs of two different, non-empty tags.
    """
    tag_set = _compile(_checked(tags))
    parts = tag_set.pattern.split(text)
    texts, found = parts[0::2], parts[1::2]
    # A text may repeat one tag a million times: each spelling is read once, and a run of them is one step.
    meanings = {tag: tag_set.read(tag) for tag in set(found)}

    repeats_template = opened and bool(found) and meanings[found[0]].kind == "open" and not texts[0].strip()
    template_open = opened and not repeats_template
    depths = [0] * tag_set.pairs
    outside: list[int] = []
    index = 0
    for tag, run in groupby(found):
        if not template_open and not any(depths):
            outside.append(index)
        times = len(list(run))
        index += times
        pair, kind = meanings[tag]
        if kind == "open":
            depths[pair] += times
        elif kind == "close":
            if times > depths[pair]:
                outside.clear()
                template_open = False
            depths[pair] = max(0, depths[pair] - times)
        elif not depths[pair]:
            outside.clear()
            template_open = True
    unclosed = template_open or any(depths)
    if not unclosed:
        outside.append(index)

    answer = "".join(texts[index] for index in outside).strip()
    reasoning = _join_reasoning(texts, outside) if found or opened else None
    if unclosed or tag_set.pattern.search(answer):
        return Trace(reasoning, None, "unclosed")
    if not answer:
        return Trace(reasoning, None, "empty_answer")
    return Trace(reasoning, answer, "closed" if found else "no_trace")


def trace_end(text: str, opened: bool = False, tags: TagPairs = DEFAULT_TAGS) -> int | None:
    """Say where the trace in `text` is over, by the same rules: behind the last tag.

    Args:
        text: what the model wrote.
        opened: as for `split_trace`.
        tags: as for `split_trace`.

    Returns:
        An index: all reasoning is before it, and no tag behind it. None where the text has no tag, or ends inside a
        trace.

    Raises:
        ValueError: `tags` as for `split_trace`.
    """
    parts = _compile(_checked(tags)).pattern.split(text)
    over = len(parts) > 1 and split_trace(text, opened, tags).status != "unclosed"
    return len(text) - len(parts[-1]) if over else None


def template_opens_trace(tokenizer: Any, tags: TagPairs = DEFAULT_TAGS) -> bool:
    """Say whether a prompt rendered by the tokenizer's chat template ends inside an opened trace.

    Only what the template adds for the coming answer is read: a system prompt that explains the tags opens nothing.

    Args:
        tokenizer: a transformers tokenizer; one without a chat template opens nothing.
        tags: as for `split_trace`.

    Returns:
        True where every answer to this template begins inside a trace.

    Raises:
        ValueError: `tags` as for `split_trace`.
    """
    if not getattr(tokenizer, "chat_template", None):
        return False
    messages = [{"role": "user", "content": "Hello"}]
    asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return split_trace(prompt.removeprefix(asked), tags=tags).status == "unclosed"


class _Meaning(NamedTuple):
    pair: int
    kind: Literal["open", "close", "cut_close"]


@dataclass(frozen=True)
class _TagSet:
    """All tags as one pattern with one group, so that `split` returns texts and tags in turn."""

    pattern: re.Pattern[str]
    spellings: tuple[tuple[re.Pattern[str], re.Pattern[str]], ...]

    @property
    def pairs(self) -> int:
        return len(self.spellings)

    def read(self, tag: str) -> _Meaning:
        for pair, (opening, closing) in enumerate(self.spellings):
            if opening.fullmatch(tag):
                return _Meaning(pair, "open")
            if closing.fullmatch(tag):
                cut = closing.pattern.endswith(">?") and not tag.endswith(">")
                return _Meaning(pair, "cut_close" if cut else "close")
        raise AssertionError(f"{tag!r} was found by none of its own patterns")


def _checked(tags: TagPairs) -> tuple[tuple[str, str], ...]:
    if isinstance(tags, str) or not tags:
        raise ValueError(_bad_tags(tags))
    pairs = []
    for pair in tags:
        if isinstance(pair, str) or len(pair) != 2:
            raise ValueError(_bad_tags(pair))
        opening, closing = pair
        if not (isinstance(opening, str) and isinstance(closing, str)) or opening.lower() == closing.lower():
            raise ValueError(_bad_tags(pair))
        if not opening.strip() or not closing.strip():
            raise ValueError(_bad_tags(pair))
        pairs.append((opening, closing))
    return tuple(pairs)


def _bad_tags(found: object) -> str:
    return f'tags: {found!r} is not a pair of different tags; write them as [["<think>", "</think>"]]'


@lru_cache(maxsize=64)
def _compile(tags: tuple[tuple[str, str], ...]) -> _TagSet:
    spellings = tuple((_spelling(opening), _spelling(closing)) for opening, closing in tags)
    # Longest first: of two literal tags where one begins the other, the longer is meant.
    every = sorted((tag for pair in tags for tag in pair), key=len, reverse=True)
    pattern = re.compile(f"({'|'.join(_spelling(tag).pattern for tag in every)})", re.IGNORECASE)
    return _TagSet(pattern, spellings)


def _spelling(tag: str) -> re.Pattern[str]:
    # `[^<>]*` stops at the next tag, so no character is read twice: "<think" repeated stays linear.
    name = re.fullmatch(r"<(/?[\w:.-]+)>", tag)
    source = rf"<{re.escape(name[1])}(?![\w:.-])[^<>]*>?" if name else re.escape(tag)
    return re.compile(source, re.IGNORECASE)


def _join_reasoning(texts: list[str], outside: list[int]) -> str:
    inside = list(texts)
    for index in outside:
        inside[index] = ""
    return "\n".join(filter(None, map(str.strip, inside)))
