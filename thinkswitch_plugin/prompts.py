"""Read prompts: a file or a data set of the hub, each row a conversation for a checkpoint to answer.

Knows the formats and says where one is broken. Knows nothing of models, chat templates or tasks, and imports nothing
heavy before it is needed, so that a bad file is reported before anything loads.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any

from thinkswitch_plugin.cli import on_one_line

Message = dict[str, str]

FILES = (".jsonl", ".csv", ".parquet")
KEYS = ("prompt", "problem", "question")
_SHAPE = "write one JSON object with `problem` or `prompt` (text) or `messages` (a list of role and content)"
_COLUMN = "name the column `prompt`, `problem` or `question` (text)"


def is_source(name: str) -> bool:
    """Say whether a name is that of prompts to be read here: a file, or a data set of the hub (owner/name)."""
    return name.endswith(FILES) or is_on_hub(name)


def is_on_hub(name: str) -> bool:
    """Say whether a name is written as a data set of the hub is: owner/name, owner/name:config, owner/name@revision."""
    return name.count("/") == 1 and not name.endswith(FILES) and not name.startswith((".", "/", "~"))


def read_prompts(source: str | Path) -> list[dict[str, Any]]:
    """Read and check every row of a prompts file, or of a hub data set's split `train`.

    A row holds `messages`, or else `prompt`, `problem` or `question`; a string is the whole user message. All other
    columns are left out, above all gold answers: labels are the model's own.

    Args:
        source: a `.jsonl`, `.csv` (UTF-8, with a header) or `.parquet` file, or `owner/name`, `owner/name:config`,
            `owner/name@revision` of the hub.

    Returns:
        One `{"id": str, "messages": [{"role": str, "content": str}, …]}` a row, in order. `id` is the row's own `id`,
        else its number from 1 (of a .jsonl or .csv file: its line).

    Raises:
        ValueError: the source cannot be read, holds no row, or one row is broken or empty. The message is one line,
            "SOURCE:ROW: what is wrong; what to do".
    """
    name = str(source)
    if name.endswith(".parquet"):
        rows = _parquet(Path(name))
    elif is_on_hub(name):
        rows = _hub(name)
    else:
        content = _content(Path(name))
        rows = _csv(name, content) if name.endswith(".csv") else _jsonl(name, content)
    prompts = []
    try:
        for number, row in rows:
            try:
                kept = {"id": str(number if row.get("id") in (None, "") else row["id"]), "messages": conversation(row)}
            except ValueError as error:
                raise ValueError(f"{name}:{number}: {error}") from error
            prompts.append(kept)
    finally:
        rows.close()
    if not prompts:
        raise ValueError(f"{name}: there are no rows in it; {_SHAPE if name.endswith('.jsonl') else _COLUMN}")
    return prompts


Rows = Generator[tuple[int, Mapping[str, Any]], None, None]


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        kinds = ", ".join(FILES)
        raise ValueError(f"{path}: cannot be read ({error.strerror}); name a file of prompts ({kinds})") from error


def _jsonl(name: str, content: bytes) -> Rows:
    lines = content.splitlines()
    if not lines:
        raise ValueError(f"{name}:1: the file is empty; {_SHAPE} on each line")
    for number, line in enumerate(lines, start=1):
        try:
            row = _object(line)
        except ValueError as error:
            raise ValueError(f"{name}:{number}: {error}") from error
        yield number, row


def _object(line: bytes) -> dict[str, Any]:
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
    return row


def _csv(name: str, content: bytes) -> Rows:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{name}:{line}: the row is not UTF-8; save the file as UTF-8") from error
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            yield reader.line_num, {key: value for key, value in row.items() if key is not None}
    except csv.Error as error:
        raise ValueError(
            f"{name}:{reader.reader.line_num}: not CSV ({error}); quote texts that hold commas or quotes"
        ) from error


def _columns(name: str, names: list[str]) -> list[str]:
    """Those of a table's columns that are read; `ValueError` if none of them holds prompts."""
    if not {"messages", *KEYS} & set(names):
        raise ValueError(f"{name}: has no column of prompts (it has {_shown(names)}); {_COLUMN}")
    return [column for column in names if column in ("id", "messages", *KEYS)]


def _parquet(path: Path) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        columns = _columns(str(path), file.schema_arrow.names)
        number = 0
        for batch in file.iter_batches(columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be read as Parquet ({why}); write it again") from error


def _hub(name: str) -> Rows:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError

    place, _, revision = name.partition("@")
    repository, _, config = place.partition(":")
    try:
        rows = load_dataset(repository, config or None, revision=revision or None, split="train")
    except (DatasetNotFoundError, HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{name}: the hub gave no split `train` of it ({why}); check the name (owner/name, owner/name:config), "
            "the network and HF_TOKEN, or name a file"
        ) from error
    columns = _columns(name, rows.column_names)
    yield from enumerate(rows.select_columns(columns), start=1)


def conversation(row: Mapping[str, Any]) -> list[Message]:
    """The messages of one row: its `messages`, or else what it asks as the user's; one-line ValueError."""
    if "messages" in row:
        return _checked_messages(row["messages"])
    key = next((key for key in KEYS if key in row), None)
    if key is None:
        raise ValueError(f"the row has no prompt (its keys: {_shown(row) or 'none'}); {_SHAPE}")
    return [{"role": "user", "content": _checked_text(row[key], f"`{key}`")}]


def _shown(names: Iterable[Any]) -> str:
    """Some names of a file's own, on one line."""
    every = [on_one_line(str(name))[:40] for name in names]
    return ", ".join(every[:10]) + (f" and {len(every) - 10} more" if len(every) > 10 else "")


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
                f"{name} has role {_shown([repr(role)])} where {expected!r} belongs; "
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
