"""Reading a prompts file: what it may hold, and the one line that says what is wrong and where."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkswitch_plugin.prompts import is_source, read_prompts


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"problem": "1+1?"}, [user("1+1?")]),
        ({"prompt": "Why?"}, [user("Why?")]),
        ({"prompt": " two\nlines \u2028"}, [user(" two\nlines \u2028")]),
        ({"prompt": "first", "problem": "second"}, [user("first")]),
        ({"question": "How many?", "answer": "4"}, [user("How many?")]),
        ({"messages": [user("a")], "prompt": "b"}, [user("a")]),
        ({"messages": [system("s"), user("a")]}, [system("s"), user("a")]),
        ({"messages": [user("a"), assistant("b"), user("c")]}, [user("a"), assistant("b"), user("c")]),
        ({"messages": [{**user("a"), "name": "Ann"}]}, [user("a")]),
        ({"problem": "1+1?", "answer": "2", "solution": "count"}, [user("1+1?")]),
    ],
)
def test_a_row_becomes_a_conversation_without_its_answer(tmp_path: Path, row: dict, messages: list) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_prompts(file) == [{"id": "1", "messages": messages}]


def test_rows_keep_their_order_and_ids(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b", "id": "x"}\r\n{"prompt": "c", "id": null}')
    assert [(row["id"], row["messages"][0]["content"]) for row in read_prompts(str(file))] == [
        ("1", "a"),
        ("x", "b"),
        ("3", "c"),
    ]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "the row is empty"),
        ("   ", "the row is empty"),
        ("{}", "no prompt (its keys: none)"),
        ('{"text": "a"}', "no prompt (its keys: text)"),
        ("not json", "not JSON"),
        ('{"prompt": "a"', "not JSON"),
        ('{"prompt": "a"} {"prompt": "b"}', "not JSON"),
        ("9" * 5000, "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('"a"', "is a str, not an object"),
        ("[]", "is a list, not an object"),
        ("null", "is a NoneType, not an object"),
        ('{"prompt": ""}', "`prompt` is empty"),
        ('{"problem": " \\n"}', "`problem` is empty"),
        ('{"prompt": null}', "`prompt` is a NoneType, not text"),
        ('{"prompt": ["a"]}', "`prompt` is a list, not text"),
        ('{"prompt": "\\ud800"}', "half a surrogate pair"),
        ('{"messages": []}', "`messages` is not a list with messages"),
        ('{"messages": "a"}', "`messages` is not a list with messages"),
        ('{"messages": null, "prompt": "a"}', "`messages` is not a list with messages"),
        ('{"messages": ["a"]}', "message 1 is a str"),
        ('{"messages": [{"role": "user"}]}', "the content of message 1 is a NoneType"),
        ('{"messages": [{"role": "user", "content": ""}]}', "the content of message 1 is empty"),
        ('{"messages": [{"content": "a"}]}', "message 1 has role None"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "message 1 has role 'assistant' where 'user'"),
        ('{"messages": [{"role": "tool", "content": "a"}]}', "message 1 has role 'tool' where 'user'"),
        ('{"messages": [{"role": [], "content": "a"}]}', "message 1 has role [] where 'user'"),
        (json.dumps({"messages": [system("s")]}), "the last message is the system's"),
        (json.dumps({"messages": [system("s"), system("s")]}), "message 2 has role 'system' where 'user'"),
        (json.dumps({"messages": [user("a"), user("b")]}), "message 2 has role 'user' where 'assistant'"),
        (json.dumps({"messages": [user("a"), assistant("b")]}), "the last message is the assistant's"),
    ],
)
def test_a_broken_row_is_one_line_that_says_where(tmp_path: Path, line: str, says: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + '\n{"prompt": "fine"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}:2: ") as error:
        read_prompts(file)
    message = str(error.value)
    assert says in message
    assert ";" in message, "it says what to do"
    assert "\n" not in message


def test_bytes_that_are_not_utf8_are_located(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xe4"}\n')
    with pytest.raises(ValueError, match=r"prompts.jsonl:2: the row is not UTF-8 \(byte 13\)"):
        read_prompts(file)


def test_no_file_a_folder_and_an_empty_file_are_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing.jsonl: cannot be read \(No such file or directory\)"):
        read_prompts(tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match=r"cannot be read \(Is a directory\)"):
        read_prompts(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty.jsonl:1: the file is empty"):
        read_prompts(tmp_path / "empty.jsonl")


@given(texts=st.lists(st.text(st.characters(codec="utf-8")).filter(str.strip), min_size=1), ascii_only=st.booleans())
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, texts: list[str], ascii_only: bool) -> None:
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [json.dumps({"prompt": text}, ensure_ascii=ascii_only) + "\n" for text in texts]
    file.write_text("".join(lines), encoding="utf-8", newline="")
    assert [row["messages"][0]["content"] for row in read_prompts(file)] == texts


def test_a_csv_has_a_column_of_prompts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.csv"
    file.write_text('\ufeffanswer,problem,id\n4,"two, and\ntwo?",a\n,three?,\n', encoding="utf-8")
    assert read_prompts(file) == [
        {"id": "a", "messages": [user("two, and\ntwo?")]},
        {"id": "4", "messages": [user("three?")]},
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "there are no rows"),
        (b"problem\n", "there are no rows"),
        (b"text\na\n", "2: the row has no prompt (its keys: text)"),
        (b"problem\na\n\xe4\n", "3: the row is not UTF-8"),
        (b'problem\na\n"b\n', "3: not CSV"),
        (b"problem,answer\n,4\n", "2: `problem` is empty"),
    ],
)
def test_a_broken_csv_is_one_line_that_says_where(tmp_path: Path, text: bytes, says: str) -> None:
    file = tmp_path / "prompts.csv"
    file.write_bytes(text)
    with pytest.raises(ValueError, match="^" + re.escape(str(file))) as error:
        read_prompts(file)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def table(folder: Path, rows: list[dict[str, Any]], name: str = "train.parquet") -> Path:
    pq.write_table(pa.Table.from_pylist(rows), folder / name)
    return folder / name


def test_a_parquet_file_is_read_without_its_answers(tmp_path: Path) -> None:
    conversations = [{"messages": [user("a"), assistant("b"), user("c")], "answer": "d", "id": 7}]
    assert read_prompts(table(tmp_path, conversations)) == [{"id": "7", "messages": conversations[0]["messages"]}]
    with pytest.raises(ValueError, match=r"has no column of prompts \(it has text\)"):
        read_prompts(table(tmp_path, [{"text": "a"}]))
    with pytest.raises(ValueError, match=r"parquet:2: `prompt` is empty"):
        read_prompts(table(tmp_path, [{"prompt": "a"}, {"prompt": ""}]))
    (tmp_path / "none.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        read_prompts(tmp_path / "none.parquet")


def test_a_data_set_of_the_hub_is_asked_for_its_training_split_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A folder of the data set's name is what the library reads where no hub is.
    folder = tmp_path / "someone" / "sums" / "data"
    folder.mkdir(parents=True)
    table(folder, [{"question": "1+1?", "answer": "2"}, {"question": "1+2?", "answer": "3"}], "train-0.parquet")
    table(folder, [{"question": "9+9?", "answer": "18"}], "test-0.parquet")
    monkeypatch.chdir(tmp_path)
    assert [row["messages"] for row in read_prompts("someone/sums")] == [[user("1+1?")], [user("1+2?")]]
    (folder / "train-0.parquet").unlink()
    with pytest.raises(ValueError, match=r"^someone/sums: the hub gave no split `train`"):
        read_prompts("someone/sums")
    with pytest.raises(ValueError, match=r"^nobody/nothing@v1: .*HF_TOKEN") as error:
        read_prompts("nobody/nothing@v1")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mine.jsonl", True),
        ("./some/where/mine.csv", True),
        ("owner/name", True),
        ("owner/name:main@v1", True),
        ("mini_math_prompts", False),
        ("my_tasks/../x", False),
    ],
)
def test_a_source_is_told_from_a_task(name: str, said: bool) -> None:
    assert is_source(name) == said


def test_reading_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'datasets', 'transformers', 'lm_eval'}"
    code = f"import sys, thinkswitch_plugin.prompts; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
