"""What PubMedQA asks: the wording of a question, and which of the labeled rows are the test and the training prompts.

The two id files beside this module are the choice; `choose_ids.py` says how it was made.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

INSTRUCTION = (
    "Answer the question from the abstract alone. "
    'End with one line that says "Answer: yes", "Answer: no" or "Answer: maybe".'
)


def question(row: Mapping[str, Any]) -> str:
    """The whole user message for one row; the rows' abstracts come without their conclusion, which would answer it."""
    abstract = "\n".join(row["context"]["contexts"])
    return f"Abstract:\n{abstract}\n\nQuestion: {row['question']}\n\n{INSTRUCTION}"


def official_test_rows(rows: Dataset) -> Dataset:
    """The thirty test rows, in the order of `test_ids.txt`, with the official decision as `answer`."""
    return _by_id(rows, "test_ids.txt").rename_column("final_decision", "answer")


def training_prompts(rows: Dataset) -> Dataset:
    """The fifteen training prompts, in the order of `prompt_ids.txt`, as conversations without answers.

    Returns:
        The columns `id`, `messages` and `trace_opened`.
    """
    return Dataset.from_list(
        [
            {
                "id": str(row["pubid"]),
                "messages": [{"role": "user", "content": question(row)}],
                "trace_opened": row["trace_opened"],
            }
            for row in _by_id(rows, "prompt_ids.txt")
        ]
    )


def _by_id(rows: Dataset, file: str) -> Dataset:
    index = {str(pubmed_id): position for position, pubmed_id in enumerate(rows["pubid"])}
    wanted = (Path(__file__).parent / file).read_text(encoding="utf-8").split()
    return rows.select([index[pubmed_id] for pubmed_id in wanted])
