"""Questions made up for these tests, in the columns and types of the hub's data sets, and a folder to read them from.

`datasets.load_dataset` takes a folder of the working directory for a data set of that name, so tasks run in the folder
that `write` leaves read these rows in the place of the hub's. None of their text is anyone else's.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

PUBMEDQA = Path(__file__).resolve().parents[2] / "tasks" / "pubmedqa"


def aime_2026(size: int = 30) -> pa.Table:
    """MathArena/aime_2026: answers are integers from 0 to 999, so some have leading zeros in a box."""
    schema = pa.schema({"problem_idx": pa.int64(), "answer": pa.int64(), "problem": pa.string()})
    return _table(
        (
            {
                "problem_idx": number,
                "answer": number**3 % 1000,
                "problem": f"Find the remainder when the volume of a cube of side ${number}$ is divided by $1000$.",
            }
            for number in range(1, size + 1)
        ),
        schema,
    )


def aime_2025() -> pa.Table:
    """math-ai/aime25: two exams of fifteen, one after the other, with answers and ids as strings."""
    schema = pa.schema({"problem": pa.string(), "answer": pa.string(), "id": pa.string()})
    return _table(
        (
            {"problem": f"Find ${number} + 3$ in base ten.", "answer": str(number + 3), "id": str(number)}
            for number in range(30)
        ),
        schema,
    )


def pubmedqa() -> pa.Table:
    """qiaojin/PubMedQA, pqa_labeled: the ids that the tasks choose and some that they do not, in no order of theirs.

    The decisions are made up as well: an id says nothing of what the paper by that number found.
    """
    chosen = [*_ids("test_ids.txt"), *_ids("prompt_ids.txt")]
    ids = [*chosen, *(1000 + number for number in range(20))]
    random.Random(0).shuffle(ids)
    strings = pa.list_(pa.string())
    keys = ("contexts", "labels", "meshes", "reasoning_required_pred", "reasoning_free_pred")
    schema = pa.schema(
        {
            "pubid": pa.int32(),
            "question": pa.string(),
            "context": pa.struct(dict.fromkeys(keys, strings)),
            "long_answer": pa.string(),
            "final_decision": pa.string(),
        }
    )
    return _table(
        (
            {
                "pubid": pubmed_id,
                "question": f"Does drug {pubmed_id} help?",
                "context": {
                    "contexts": [f"Drug {pubmed_id} was given to {place} patients.", f"Of them {place} got better."],
                    "labels": ["METHODS", "RESULTS"],
                    "meshes": ["Humans"],
                    "reasoning_required_pred": ["maybe"],
                    "reasoning_free_pred": ["maybe"],
                },
                "long_answer": f"We conclude that drug {pubmed_id} is what it is.",
                "final_decision": ("yes", "no", "maybe")[place % 3],
            }
            for place, pubmed_id in enumerate(ids)
        ),
        schema,
    )


GSM8K = [
    {"question": "Two pens at 600 each?", "answer": "Two times 600 is <<2*600=1200>>1200.\n#### 1,200"},
    {"question": "Three pens at 2 each?", "answer": "3 * 2 = <<3*2=6>>6\n#### 6"},
    {"question": "No pen?", "answer": "None.\n#### 0"},
]
MATH_500 = [
    {"problem": "Solve $|x| < 1$.", "solution": "Obvious.", "answer": "(-1,1)", "subject": "Algebra", "level": 1},
    {"problem": "Halve $1$.", "solution": "Obvious.", "answer": r"\frac{1}{2}", "subject": "Algebra", "level": 1},
]
AMC23 = [{"id": 0, "answer": "27.0", "question": "What is $3^3$?", "url": "nowhere"}]
OLYMPIADBENCH = [
    {
        "id": number,
        "subfield": "Algebra",
        "context": context,
        "question": question,
        "solution": ["Obvious."],
        "final_answer": [answer],
        "is_multiple_answer": several,
        "unit": unit,
        "answer_type": "Numerical",
        "error": error,
    }
    for number, (context, question, answer, several, unit, error) in enumerate(
        [
            (None, "Solve $x^2=4$.", "$-2$,$2$", True, None, None),
            (None, "What share is $1/24$?", "4.2", False, "%", "1e-1"),
            ("Let $n$ be even.", "What is half of $n$?", r"$\frac{n}{2}$", False, None, None),
            (None, "How far?", r"$\frac{41}{12}$", False, "km", None),
        ]
    )
]


def write(folder: Path, aime_2026_size: int = 30) -> Path:
    """Lay the data sets out under `folder` as the hub's repositories are, and return it."""
    for name, config, split, rows in (
        ("MathArena/aime_2026", "default", "train", aime_2026(aime_2026_size)),
        ("math-ai/aime25", "default", "test", aime_2025()),
        ("qiaojin/PubMedQA", "pqa_labeled", "train", pubmedqa()),
        ("openai/gsm8k", "main", "test", _table(GSM8K)),
        ("HuggingFaceH4/MATH-500", "default", "test", _table(MATH_500)),
        ("math-ai/amc23", "default", "test", _table(AMC23)),
        ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", _table(OLYMPIADBENCH)),
    ):
        data = "data" if config == "default" else config
        file = folder / name / data / f"{split}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True)
        pq.write_table(rows, file)
        files = f"configs:\n- config_name: {config}\n  data_files:\n  - {{split: {split}, path: {data}/{split}-*}}\n"
        (folder / name / "README.md").write_text(f"---\n{files}---\n", encoding="utf-8")
    return folder


def _table(rows: Iterable[dict[str, Any]], schema: pa.Schema | None = None) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema)


def _ids(file: str) -> list[int]:
    return [int(pubmed_id) for pubmed_id in (PUBMEDQA / file).read_text(encoding="utf-8").split()]
