"""Files that a crash cannot halve: JSON and text in one step, and bytes that are on the disk before anyone says so.

Knows the file system and its refusals. Knows nothing of what is in a file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.errors import LoopError, StageError

CHUNK_BYTES = 1 << 22
FULL = (errno.ENOSPC, errno.EDQUOT)
SEE = "see what is wrong with its disk, then run the same command again: it continues"


def write_json(path: Path, value: Any, durable: bool = False) -> None:
    """Write JSON as `write_text` does."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", durable)


def write_text(path: Path, text: str, durable: bool = False) -> None:
    """Write text in one step: a reader, or a crash, sees the old file or the new one, never half of one.

    What is no Unicode (half a surrogate pair, as a model may write) becomes a question mark. `durable`: it is on the
    disk when this returns.
    """
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.new")
    try:
        beside.write_text(text, encoding="utf-8", errors="replace")
        if durable:
            sync(beside)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def read_json(path: Path) -> Any:
    """A JSON file's value, None if the file is missing.

    Raises:
        StageError: if it is there and the disk does not give it.
        LoopError: if it is not whole.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StageError(f"{path}: cannot be read ({error.strerror or error})\n{SEE}") from None
    except (ValueError, RecursionError) as error:
        raise LoopError(f"{path}: cannot be read ({error}); restore or remove it") from None


def read_json_if_whole(path: Path) -> Any:
    """As `read_json`; None for what is not whole, too. What a disk does not give may be whole, and is no reason to
    begin anew."""
    try:
        return read_json(path)
    except StageError:
        raise
    except LoopError:
        return None


def read_json_or_none(path: Path) -> Any:
    """As `read_json`; None for what cannot be read, too."""
    try:
        return read_json(path)
    except LoopError:
        return None


def sync(path: Path) -> None:
    """Have a file's bytes, or a folder's list of names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path, on_piece: Callable[[int], None] = lambda done: None) -> str:
    """SHA-256 of a file's content, in hexadecimal; `on_piece` is told the bytes read so far.

    Raises:
        StageError: it cannot be read.
    """
    total, done = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                total.update(chunk)
                done += len(chunk)
                on_piece(done)
    except OSError as error:
        raise StageError(f"{path}: cannot be read ({error.strerror or error})\n{SEE}") from None
    return total.hexdigest()


def below(folder: Path) -> list[Path]:
    """Every file below a folder, in order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def free_disk(place: Path) -> tuple[Path, int]:
    """The folder, which is there, that something at `place` would lie in, and the bytes that are free there."""
    there = next(folder for folder in (place, *place.resolve().parents) if folder.exists())
    return there, shutil.disk_usage(there).free


@contextmanager
def disk_errors(where: Path, option: str = "--out") -> Iterator[None]:
    """Turn the file system's refusals into one line that says what to do; `option` names another place than `where`."""
    try:
        yield
    except OSError as error:
        raise refusal(error, where, option) from None


def refusal(error: OSError, where: Path, option: str = "--out") -> LoopError:
    """What the file system refused, where, and what to do now.

    Args:
        error: what it said. A file that it names, and that has nothing to do with `where`, is what is spoken of.
        where: what was being written.
        option: of the command line, which names another place.
    """
    named = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes | os.PathLike) else where
    elsewhere = named != where and where not in named.parents and named not in where.parents
    place, why = named if elsewhere else where, error.strerror or error
    if error.errno in FULL:
        return StageError(no_room(place))
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
        mend = "let this user use it, then run the same command again"
        if not elsewhere:
            mend = f"choose another folder by {option}"
        return LoopError(f"{place}: cannot be {'used' if elsewhere else 'written'} ({why}); {mend}")
    return StageError(f"{named}: {why}\n{SEE}")


def no_room(where: Path) -> str:
    """What to say where the disk is full."""
    return f"no disk space left while writing {where}\nfree some and run the same command again: it continues"
