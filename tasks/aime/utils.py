"""What AIME asks: the wording of a question, and which problems are training prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset

# The instruction that the Qwen3 model cards recommend for mathematics.
INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."


def question(row: Mapping[str, Any]) -> str:
    """The whole user message for one problem."""
    return f"{row['problem']}\n\n{INSTRUCTION}"


def aime_2025_i(rows: Dataset) -> Dataset:
    """The fifteen problems of AIME I 2025, the first of the two exams in the rows, as conversations without answers.

    Args:
        rows: AIME 2025 with its exams one after the other; the column `id` counts the problems from 0.

    Returns:
        The columns `id`, `messages` and `trace_opened`.
    """
    return Dataset.from_list(
        [
            {
                "id": f"aime_2025_i_{int(row['id']) + 1}",
                "messages": [{"role": "user", "content": question(row)}],
                "trace_opened": row["trace_opened"],
            }
            for row in rows
            if int(row["id"]) < 15
        ]
    )
