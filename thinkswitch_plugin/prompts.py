"""Read a prompts file: one JSON object a line, each a conversation for a checkpoint to answer.

Knows the file's format and says where a file breaks it. Knows nothing of models, chat templates or datasets, and
imports nothing heavy, so that a bad file is reported before anything loads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Message = dict[str, str]

_SHAPE = "write one JSON object with `problem` or `prompt` (text) or `messages` (a list of role and content)"


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """Read and check every row of a prompts file.

    A row holds `messages`, or else `prompt`, or else `problem`; a string is the whole user message. All other columns
    are left out, above all gold answers: labels are the model's own.

    Args:
        path: A `.jsonl` file in UTF-8.

    Returns:
        One `{"id": str, "messages": [{"role": str, "content": str}, …]}` a row, in the file's order. `id` is the row's
        own `id`, else its line number.

    Raises:
        ValueError: The file cannot be read, holds no row, or one row is broken or empty. The message is one line,
            "FILE:LINE: what is wrong; what to do".
    """
    path = Path(path)
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); name a .jsonl file of prompts") from error
    if not lines:
        raise ValueError(f"{path}:1: the file is empty; {_SHAPE} on each line")
    prompts = []
    for number, line in enumerate(lines, start=1):
        try:
            prompts.append(_read_row(line, number))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
    return prompts


def _read_row(line: bytes, number: int) -> dict[str, Any]:
    if not line.strip():
        raise ValueError(f"the row is empty; delete the line or {_SHAPE}")
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"the row is not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "unreadable")
        raise ValueError(f"the row is not JSON ({reason}, column {getattr(error, 'colno', 1)}); {_SHAPE}") from error
    if not isinstance(row, dict):
        raise ValueError(f"the row is a {type(row).__name__}, not an object; {_SHAPE}")
    return {"id": str(number if row.get("id") is None else row["id"]), "messages": conversation(row)}


def conversation(row: Mapping[str, Any]) -> list[Message]:
    """The messages of one row: its `messages`, or else its `prompt` or `problem` as the user's; one-line ValueError."""
    if "messages" in row:
        return _checked_messages(row["messages"])
    key = next((key for key in ("prompt", "problem") if key in row), None)
    if key is None:
        raise ValueError(f"the row has no prompt (its keys: {', '.join(row) or 'none'}); {_SHAPE}")
    return [{"role": "user", "content": _checked_text(row[key], f"`{key}`")}]


def _checked_messages(messages: Any) -> list[Message]:
    """A system message or none, then user and assistant in turn, the user's last: what every chat template renders."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("`messages` is not a list with messages in it; give at least one user message")
    checked: list[Message] = []
    for position, message in enumerate(messages, start=1):
        name = f"message {position}"
        if not isinstance(message, dict):
            raise ValueError(f"{name} is a {type(message).__name__}, not an object; give it a role and content")
        turns = [earlier for earlier in checked if earlier["role"] != "system"]
        expected = "assistant" if len(turns) % 2 else "user"
        role = message.get("role")
        if role != expected and not (role == "system" and position == 1):
            raise ValueError(
                f"{name} has role {role!r} where {expected!r} belongs; "
                "write a system message or none, then user and assistant in turn"
            )
        checked.append({"role": role, "content": _checked_text(message.get("content"), f"the content of {name}")})
    if checked[-1]["role"] != "user":
        raise ValueError(
            f"the last message is the {checked[-1]['role']}'s; end with the user's, the answer is the model's to write"
        )
    return checked


def _checked_text(text: Any, name: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{name} is a {type(text).__name__}, not text; write a string")
    if not text.strip():
        raise ValueError(f"{name} is empty; write a prompt or delete the line")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds half a surrogate pair; write the whole character") from error
    return text
