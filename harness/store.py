"""What is done: every stage ever finished under one `--out`, by its key.

    stages/KEY/            one stage: recipes, log.txt, outputs
    stages/KEY/stage.json  written last: what has one whose key fits is done, what has none never happened
    stages/.locks/         KEY.lock is held by the `ts-loop` that works on it, KEY.busy by what it started
    stages/.known.json     digests of files that were here before, by path, size, time and inode

A stage works in its final place, so that the commands and paths in its recipes stay true afterwards; of one that did
not finish, all is cleared away before it runs again but what it can go on from. Knows keys and files; what a key is
made of is `stages`' to know.
"""

from __future__ import annotations

import fcntl
import fnmatch
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from harness.errors import StageError
from harness.files import (
    FULL,
    below,
    digest,
    disk_errors,
    read_json_if_whole,
    read_json_or_none,
    sync,
    write_json,
)
from thinkswitch_plugin.tah.args import LOADER

MARKER = "stage.json"
BEGUN = "begun.json"  # while it is not done: what it began to read, by the marks of who left that
# What a loader reads of a checkpoint's folder: a note beside the weights, or a desktop's droppings, change nothing.
READ = ("*.json", "*.safetensors", "*.jinja", "*.model", "vocab.txt", "merges.txt", LOADER)
OnHash = Callable[[str, int, int], None]  # file name, bytes done, bytes in all


class Store:
    """The stages under one folder."""

    def __init__(self, root: Path):
        """`root` need not exist yet."""
        self.root = root

    def folder(self, key: str) -> Path:
        """Where a stage lies, done or not."""
        return self.root / key

    def every(self) -> list[str]:
        """The key of every stage that has a folder."""
        return sorted(p.name for p in self.root.glob("*-*") if p.is_dir())

    def record(self, key: str) -> dict[str, Any] | None:
        """A finished stage's record; None if it never finished, or what it left is not there at its size.

        A checkpoint that `gc` took away is not missed here; who needs one asks `lacks`.
        """
        record = self._marked(key)
        if record is None or any(_size(self.folder(key) / name) != size for name, (size, _) in _here(record)):
            return None
        return record

    def _marked(self, key: str) -> dict[str, Any] | None:
        """What a stage's marker says; half a marker, or one that was written to, marks nothing."""
        record: Any = read_json_if_whole(self.folder(key) / MARKER)
        if not isinstance(record, dict) or record.get("key") != key:
            return None
        return record if record.pop("digest", None) == _digest_of(record) else None

    def _mark(self, key: str, record: dict[str, Any]) -> None:
        value = json.loads(json.dumps(record, default=str))  # as it will be read
        write_json(self.folder(key) / MARKER, {**value, "digest": _digest_of(value)}, durable=True)

    def lacks(self, key: str) -> bool:
        """Whether a finished stage's checkpoint was taken away to save space."""
        return bool((self.record(key) or {}).get("pruned"))

    def damaged(self, key: str, inside: str = "") -> list[str]:
        """The files of a finished stage that are not what they were, by their hashes; of all, or those `inside` it."""
        folder, record = self.folder(key), self._marked(key)
        if record is None:
            return [MARKER] if (folder / MARKER).exists() else []
        looked = [(name, was) for name, was in _here(record) if not inside or f"{name}/".startswith(f"{inside}/")]
        return [name for name, (size, was) in looked if _size(folder / name) != size or digest(folder / name) != was]

    def forget(self, key: str) -> None:
        """Let a stage count as never done."""
        (self.folder(key) / MARKER).unlink(missing_ok=True)

    @contextmanager
    def writing(self, key: str) -> Iterator[Path | None]:
        """Be the one who works on a stage: its folder; None if another process does, or is dying over it still."""
        lock = FileLock(self.root / ".locks" / f"{key}.lock")
        with disk_errors(self.root):
            (self.root / ".locks").mkdir(parents=True, exist_ok=True)
            with suppress(Timeout):
                lock.acquire(timeout=0)
        if not lock.is_locked:
            yield None
            return
        try:
            free = held(self.hold(key), fcntl.LOCK_EX) is False
            yield self.folder(key) if free else None
        finally:
            lock.release()

    def hold(self, key: str) -> Path:
        """The lock file that the runner holds while anything of the stage's commands is alive."""
        return self.root / ".locks" / f"{key}.busy"

    def clear(self, key: str, but: Iterable[Path] = ()) -> Path:
        """A folder for a stage, empty `but` for these files and folders inside it."""
        folder = self.folder(key)
        with disk_errors(folder):
            if folder.exists():
                self.forget(key)
                _emptied(folder, set(but))
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def busy(self, key: str) -> bool:
        """Whether a process works on a stage now."""
        return held(self.root / ".locks" / f"{key}.lock", fcntl.LOCK_SH)

    def mark(self, key: str) -> str | None:
        """The hash of a stage's marker, which another making of the same stage has not; None where it is not done."""
        file = self.folder(key) / MARKER
        return digest(file) if file.is_file() else None

    def finish(self, key: str, facts: dict[str, Any], but: Iterable[Path] = ()) -> None:
        """Mark a stage done: all it left `but` these is hashed and on the disk before the marker is."""
        folder = self.folder(key)
        with disk_errors(folder):
            outputs, left_out = {}, set(but)
            for path in below(folder):
                if left_out.intersection([path, *path.parents]):
                    continue
                outputs[str(path.relative_to(folder))] = (path.stat().st_size, digest(path))
                sync(path)
            for inner in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
                sync(inner)
            sync(self.root)
            self._mark(key, {"key": key, **facts, "outputs": outputs})

    def prune(self, key: str, inside: str) -> int:
        """Take a finished stage's checkpoint away; returns the bytes that are free now, 0 if a process works on it."""
        with self.writing(key) as folder:
            record = self.record(key)
            if folder is None or record is None or not (folder / inside).is_dir():
                return 0
            files = below(folder / inside)
            size = sum(path.stat().st_size for path in files)
            names = [name for name in record["outputs"] if name.startswith(f"{inside}/")]
            with disk_errors(folder):
                try:
                    self._mark(key, {**record, "pruned": names})
                except OSError as error:
                    if error.errno not in FULL:
                        raise
                    # Room for the marker itself; were this to end here, the stage would count as not done.
                    max(files, key=lambda path: path.stat().st_size).unlink()
                    self._mark(key, {**record, "pruned": names})
                shutil.rmtree(folder / inside)
            return size

    def remove(self, key: str) -> int:
        """Take a whole stage away; returns the bytes that are free now, 0 if a process works on it."""
        with self.writing(key) as folder:
            if folder is None or not folder.is_dir():
                return 0
            with disk_errors(folder):
                size = sum(path.stat().st_size for path in below(folder))
                self.forget(key)
                shutil.rmtree(folder)
            return size


class Known:
    """Digests of files that were here before, kept by path, size, time and inode: 8 GB are read once."""

    def __init__(self, file: Path, on_hash: OnHash | None = None):
        """`file` keeps them; `on_hash` is told of every piece read."""
        self.file, self.on_hash = file, on_hash
        kept = read_json_or_none(file)  # it only saves time
        self._kept: dict[str, list[Any]] = kept if isinstance(kept, dict) else {}

    def checkpoint(self, folder: Path) -> str:
        """What a checkpoint is: a digest over what a loader reads of it, the same wherever it lies."""
        return self._combined(folder, loaded(folder))

    def path(self, path: Path) -> str:
        """What a file is, a checkpoint, or all that is below another folder."""
        if path.is_file():
            return self.digest(path)
        return self.checkpoint(path) if is_checkpoint(path) else self._combined(path, below(path))

    def digest(self, path: Path) -> str:
        """As `files.digest`, of a file that may have been read before."""
        real = path.resolve()
        stat = real.stat()
        seen = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        kept = self._kept.get(str(real))
        if not (isinstance(kept, list) and kept[:3] == seen and len(kept) == 4):
            told = self.on_hash or (lambda name, done, size: None)
            kept = self._kept[str(real)] = [*seen, digest(real, lambda done: told(real.name, done, stat.st_size))]
        return str(kept[3])

    def save(self) -> None:
        """Keep what was read for the next time; that there is no room for it costs time alone."""
        with suppress(StageError), disk_errors(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.file, self._kept)

    def forget(self) -> None:
        """Read everything again, whatever its size and time say."""
        self._kept = {}

    def _combined(self, folder: Path, files: list[Path]) -> str:
        lines = [f"{path.relative_to(folder)}\0{self.digest(path)}\n" for path in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def _here(record: dict[str, Any]) -> list[tuple[str, list[Any]]]:
    """Name, size and hash of every file that a stage left and nobody took away."""
    gone = set(record.get("pruned", []))
    return [(name, was) for name, was in record["outputs"].items() if name not in gone]


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


def _digest_of(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _emptied(folder: Path, but: set[Path]) -> None:
    for path in folder.iterdir():
        if path in but:
            continue
        if path.is_dir() and not path.is_symlink():
            if any(path in kept.parents for kept in but):
                _emptied(path, but)
            else:
                shutil.rmtree(path)
        else:
            path.unlink()


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a model, an adapter or a tokenizer to its loader."""
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json", "tokenizer_config.json"))


def loaded(folder: Path) -> list[Path]:
    """The files of a checkpoint that a loader reads."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return [path for path in files if any(fnmatch.fnmatch(path.name, like) for like in READ)]


def held(lock: Path, how: int) -> bool:
    """Whether another process has a lock; asked with `fcntl.LOCK_SH` it is not in the way of who asks the same."""
    try:
        descriptor = os.open(lock, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def stamp(path: Path) -> str:
    """Size, time and inode of a file, a checkpoint's files or a folder's: if this is the same, nobody wrote to it."""
    files = [path] if path.is_file() else loaded(path) if is_checkpoint(path) else below(path)
    stats = [(str(file), file.stat()) for file in files]
    return json.dumps([(name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats])


def link(place: Path, target: Path) -> None:
    """A relative link, made in one step."""
    to = os.path.relpath(target, place.parent)
    if place.is_symlink() and os.readlink(place) == to:
        return
    beside = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}.new")
    for last in (False, True):
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.symlink_to(to)
            break
        except FileNotFoundError:  # another run of this name took the folder away, as it was empty
            if last:
                raise
    os.replace(beside, place)
