"""The run directory: the only state a run has.

    run.json                 what was asked, resolved: settings, versions, fingerprints of every input
    results.json             one row per iteration × checkpoint × task
    report.html              the same to look at
    iter_NN/STAGE/           a stage's recipes, log and outputs
    iter_NN/STAGE/stage.json written last, in one step: what has one is done, what has none never happened

A stage works in its final place, so that the commands and paths in its recipes stay true afterwards; one that did not
finish is cleared away before it runs again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.errors import LoopError

CHUNK = 1 << 20


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one step: a reader, or a crash, sees the old file or the new one, never half of one."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    os.replace(beside, path)


def read_json(path: Path) -> Any:
    """A JSON file's value, None if the file is missing.

    Raises:
        LoopError: if it is there and cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise LoopError(f"{path}: cannot be read ({error}); restore it, or start anew with another --name") from None


def digest(path: Path) -> str:
    """SHA-256 of a file's content, or of a folder's file names and contents, in hexadecimal."""
    if path.is_dir():
        return combine(digests(path))
    total = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            total.update(chunk)
    return total.hexdigest()


def combine(values: dict[str, str]) -> str:
    """One digest for a folder, from the digests of its files."""
    return hashlib.sha256("".join(f"{name}\0{value}\n" for name, value in sorted(values.items())).encode()).hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """The digest of every file below a folder, by its path inside the folder."""
    return {str(p.relative_to(folder)): digest(p) for p in sorted(folder.rglob("*")) if p.is_file()}


class RunDir:
    """One run's folder."""

    def __init__(self, root: Path):
        """`root` need not exist yet."""
        self.root = root
        self._known: dict[str, str] = {}

    @property
    def results(self) -> Path:
        """The scores, schema in the docs."""
        return self.root / "results.json"

    @property
    def report(self) -> Path:
        """The page to look at."""
        return self.root / "report.html"

    @property
    def logs(self) -> Path:
        """Logs of what belongs to no stage."""
        return self.root / "logs"

    def stage(self, iteration: int, name: str) -> Path:
        """The folder of one stage."""
        return self.root / f"iter_{iteration:02d}" / name

    def finished(self, folder: Path) -> dict[str, Any] | None:
        """A finished stage's `stage.json`, None if it has not finished."""
        done: dict[str, Any] | None = read_json(folder / "stage.json")
        return done

    def open(self, asked: dict[str, Any]) -> bool:
        """Begin the run, or continue one that was asked the same; True if it continues.

        More iterations than before are a continuation; anything else that differs is another run.

        Raises:
            LoopError: if the folder holds a run that was asked something else, or cannot be written.
        """
        before = read_json(self.root / "run.json")
        if before is not None:
            old, new = before["asked"], json.loads(json.dumps(asked, default=str))
            for key in sorted({*old, *new} - {"iterations"}):
                if old.get(key) != new.get(key):
                    was, now = _short(old.get(key)), _short(new.get(key))
                    raise LoopError(
                        f"{self.root} holds a run with another {key} ({was}, now {now})"
                        "\ngive this one another --name, or remove that folder"
                    )
        with disk_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            write_json(self.root / "run.json", {**(before or {}), "asked": asked})
        return before is not None

    def note(self, **facts: Any) -> None:
        """Add facts to `run.json` beside what was asked."""
        with disk_errors(self.root):
            write_json(self.root / "run.json", {**self.noted(), **facts})

    def noted(self) -> dict[str, Any]:
        """Everything `run.json` holds."""
        return read_json(self.root / "run.json") or {}

    def fingerprint(self, path: Path) -> str:
        """The digest of an input; a finished stage's output is not read again, its `stage.json` has the hashes."""
        for folder in path.parents:
            if folder.parent.parent == self.root and (done := self.finished(folder)):
                prefix = f"{path.relative_to(folder)}/"
                return combine({k.removeprefix(prefix): v for k, v in done["outputs"].items() if k.startswith(prefix)})
        if str(path) not in self._known:
            self._known[str(path)] = digest(path)
        return self._known[str(path)]

    @contextmanager
    def working(self, folder: Path) -> Iterator[dict[str, Any]]:
        """Clear a stage's folder, let the body fill it, and mark it done with the facts the body noted.

        The facts get the hashes of everything the stage left. If the body raises, the folder stays, unmarked, with
        its log.
        """
        facts: dict[str, Any] = {}
        with disk_errors(folder):
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
            yield facts
            facts["outputs"] = digests(folder)
            write_json(folder / "stage.json", facts)


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn the file system's refusals into one line that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise LoopError(
                f"no disk space left while writing {where}\nfree some and run the same command again: it continues"
            ) from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise LoopError(f"{where}: cannot be written ({error.strerror}); choose another folder by --out") from None
        raise


def _short(value: Any) -> str:
    """A value as an error line can bear it."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
