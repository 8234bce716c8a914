"""Conversations in lm-eval's terms: rows of `messages`, and earlier turns as the few-shot block that it renders.

Knows the shape of a conversation, which `thinkswitch_plugin.prompts` has checked. Leaves the chat template to lm-eval,
so that local checkpoints and chat-completion servers get the same messages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from lm_eval.api.samplers import ContextSampler


def from_questions(rows: Dataset) -> Dataset:
    """Turn rows whose `question` is a whole user message into conversations.

    Returns:
        The columns `id` (the row's number from 0), `messages` and `trace_opened`; no other column is kept.
    """
    return Dataset.from_list(
        [
            {
                "id": str(number),
                "messages": [{"role": "user", "content": row["question"]}],
                "trace_opened": row["trace_opened"],
            }
            for number, row in enumerate(rows)
        ]
    )


class EarlierTurns(ContextSampler):
    """A few-shot sampler that gives a conversation its own earlier exchanges, whatever number was asked for."""

    def sample(
        self,
        n: int,
        eval_doc: Mapping[str, Any] | None = None,
        df: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> list[dict[str, Any]]:
        """The exchanges before the last user message, each as `{"user": str, "assistant": str}`."""
        turns = [message["content"] for message in eval_doc["messages"] if message["role"] != "system"]
        return [
            {"user": user, "assistant": assistant} for user, assistant in zip(turns[:-1:2], turns[1::2], strict=True)
        ]


def user_turn(exchange: Mapping[str, str]) -> str:
    """The user's half of an exchange, as it stands."""
    return exchange["user"]


def assistant_turn(exchange: Mapping[str, str]) -> str:
    """The assistant's half of an exchange, as it stands: lm-eval would read a template's "[1, 2]" as a list."""
    return exchange["assistant"]
