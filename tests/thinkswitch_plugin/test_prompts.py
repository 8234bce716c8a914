"""Reading a prompts file: what it may hold, and the one line that says what is wrong and where."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkswitch_plugin.prompts import read_prompts


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
        ('{"question": "a"}', "no prompt (its keys: question)"),
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


def test_reading_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'datasets', 'transformers', 'lm_eval'}"
    code = f"import sys, thinkswitch_plugin.prompts; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
