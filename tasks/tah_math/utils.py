"""What the five benchmarks ask, in one wording, and where each keeps its reference answer.

Knows the columns of the hub's data sets, the same ones that lm-eval's gsm8k, hendrycks_math500 and aime25 read. Leaves
grading to `grading.py`.

Rows come out with `problem`, `answer` (a number or LaTeX, as a string) and `trace_opened`; those of OlympiadBench also
say what they accept, in `is_multiple_answer` and `error`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset

# The instruction that the Qwen3 model cards recommend for mathematics.
INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
# OlympiadBench tells which questions have several answers. Only the last box counts, so they have to share one.
SEVERAL = r"Please reason step by step, and put all the final answers within one \boxed{}, separated by commas."


def question(row: Mapping[str, Any]) -> str:
    """The whole user message for one problem."""
    return f"{row['problem']}\n\n{SEVERAL if row.get('is_multiple_answer') else INSTRUCTION}"


def gsm8k_rows(rows: Dataset) -> Dataset:
    """GSM8K: `question`, and an `answer` that is a solution with the number after its last `####`."""
    return _rows(rows, lambda row: {"problem": row["question"], "answer": row["answer"].rpartition("####")[2].strip()})


def amc23_rows(rows: Dataset) -> Dataset:
    """AMC 2023: `question`, and an integer as `answer`; some copies write it as a float."""
    return _rows(
        rows, lambda row: {"problem": row["question"], "answer": str(row["answer"]).strip().removesuffix(".0")}
    )


def olympiadbench_rows(rows: Dataset) -> Dataset:
    """OlympiadBench: `final_answer` is a list of one string, in which several answers stand with commas between them.

    Returns:
        Besides the columns that all have, `is_multiple_answer` (bool) and `error` (the tolerance as a string, "" for
        none).
    """
    return _rows(
        rows,
        lambda row: {
            "problem": "\n".join(filter(None, [row.get("context"), row["question"]])),
            "answer": ", ".join(row["final_answer"]),
            "is_multiple_answer": bool(row["is_multiple_answer"]),
            "error": row["error"] or "",
        },
    )


def _rows(rows: Dataset, read: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Dataset:
    return Dataset.from_list([{**read(row), "trace_opened": row["trace_opened"]} for row in rows])
