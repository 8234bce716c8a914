"""Files of prompts as disks, editors and spreadsheets leave them: one line that says where, or rows to be asked."""

from __future__ import annotations

import csv
import io
import json
import random
import re
from pathlib import Path

import mutation
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from thinkswitch_plugin.prompts import read_prompts

ROWS = [
    {"problem": "What is 2+2?", "answer": "4"},
    {"prompt": "Wie viel ist 3−1? Schöne Grüße", "id": 7},
    {"question": 'a, "b"\nc'},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]},
    {"messages": [{"role": who, "content": who} for who in ("user", "assistant", "user")]},
]


def whole(chance: random.Random, kind: str) -> bytes:
    """A file of prompts, its rows already bent now and then."""
    rows = [mutation.bent(chance, row) if chance.random() < 0.05 else row for row in ROWS * chance.choice((1, 1, 40))]
    if kind == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=chance.random() < 0.9) + "\n" for row in rows).encode(
            errors="replace"
        )
    plain = [{"id": str(number), "prompt": f"Question {number}, {row}"[:300]} for number, row in enumerate(rows)]
    if kind == "csv":
        quoted = (",".join('"' + value.replace('"', '""') + '"' for value in row.values()) for row in plain)
        return ("id,prompt\n" + "".join(f"{line}\n" for line in quoted)).encode(errors="replace")
    sink = io.BytesIO()
    clean = [{key: value.encode(errors="replace").decode() for key, value in row.items()} for row in plain]
    pq.write_table(pa.Table.from_pylist(clean), sink)
    return sink.getvalue()


def rows_in(kind: str, content: bytes) -> int:
    """How many rows a whole file has, counted by others than those who read it."""
    body = content.removeprefix(b"\xef\xbb\xbf")
    if kind == "jsonl":
        lines = re.split(rb"\r\n|\r|\n", body)
        return len(lines) - (not lines[-1])
    if kind == "csv":
        return sum(map(bool, csv.reader(io.StringIO(body.decode(), newline="")))) - 1
    return int(pq.ParquetFile(io.BytesIO(content)).metadata.num_rows)


def read(file: Path, number: int, kind: str) -> int:
    """Rows of one mutated file; 0 if it was refused in one line that names it."""
    chance = random.Random(number)
    content = whole(chance, kind)
    if chance.random() < 0.7:
        content = mutation.some_bytes(chance, content)
    file.write_bytes(content)
    where = f"{kind} {number}: {content!r:.1500}"
    with mutation.in_time(where):
        try:
            rows = read_prompts(file)
        except ValueError as error:
            said = str(error)
            assert said.startswith(str(file)), where
            assert len(said.splitlines()) == 1, where
            return 0
    assert 0 < len(rows) == rows_in(kind, content), where
    for row in rows:
        assert set(row) == {"id", "messages"}, where
        assert row["messages"][-1]["role"] == "user", where
        for message in row["messages"]:
            assert message["content"].strip(), where
            assert message["content"].encode(), where
    return len(rows)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("count", [30, pytest.param(3_400, marks=pytest.mark.slow)])
def test_files_of_prompts(tmp_path: Path, kind: str, count: int) -> None:
    found = [read(tmp_path / f"mine.{kind}", number, kind) for number in range(count)]
    assert 0 < sum(map(bool, found)) < count, "some are whole, some are not"
