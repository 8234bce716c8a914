"""The authors' filter, on rows of OpenR1-Math-220k's columns that are made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from datasets import Dataset

from thinkswitch_plugin.tah.data import command

# The embedded pair's tokenizer has a token a byte: lengths are those of the texts.
ROWS = [
    ("two right", ["aaaaaa", "bbb", "c"], [True, True, False], None),
    ("none verified, one judged", ["aaaaaa", "bbb"], [False, False], [True, False]),
    ("nobody verified", ["aa", "bbb"], None, [False, True]),
    ("verified counts more than judged", ["aaaa", "b"], [True, False], [False, True]),
    ("none right", ["a"], [False], [False]),
    ("none short", ["aaaaaaaa"], [True], None),
    ("as long as the limit", ["aaaaaaa"], [True], None),
]
KEPT = ["bbb", "aaaaaa", "bbb", "aaaa"]


def asked(recipes: Path, out: Path, dataset: Path, *more: str) -> Any:
    given = [str(out), "--dataset", str(dataset), "--tokenizer", str(recipes / "mini/instruct"), *more]
    return CliRunner().invoke(command, given)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_each_problem_has_its_shortest_right_solution(recipes: Path, tmp_path: Path, kind: str) -> None:
    names = ("problem", "generations", "correctness_math_verify", "correctness_llama")
    rows = Dataset.from_list([dict(zip(names, row, strict=True)) for row in ROWS])
    file, out = tmp_path / f"rows.{kind}", tmp_path / "new/out.jsonl"
    rows.to_parquet(file) if kind == "parquet" else rows.to_json(file)
    said = asked(recipes, out, file, "--below", "7")
    assert said.exit_code == 0, said.output
    assert said.stdout.strip().endswith("4 of 7 problems; 1 have no right solution, 2 none below 7 tokens")
    messages = [json.loads(line)["messages"] for line in out.read_text().splitlines()]
    assert [(user["content"], answer["content"]) for user, answer in messages] == [
        (row[0], text) for row, text in zip(ROWS, KEPT, strict=False)
    ]
    assert {(user["role"], answer["role"]) for user, answer in messages} == {("user", "assistant")}
    assert [file.name for file in out.parent.iterdir()] == ["out.jsonl"]


def test_what_cannot_be_filtered_is_one_line(recipes: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    for row, line in (
        ({"question": "q"}, "has no column problem"),
        ({"problem": "q", "generations": ["a"]}, "none of 1 problems has a right solution below 8192 tokens"),
    ):
        file.write_text(json.dumps(row) + "\n")
        said = asked(recipes, out, file)
        assert said.exit_code == 1
        assert line in said.output.splitlines()[-1]
    said = asked(recipes, out, tmp_path / "none.jsonl")
    assert said.output.splitlines()[-1].endswith("none.jsonl: no such file")
    assert not out.exists()
