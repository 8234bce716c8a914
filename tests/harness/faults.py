"""A disk that refuses and commands that die, where and when a test says: the Python side of `faults.c`.

A `Fault` says what is to go wrong; `Faults` builds the library and arms it; `Sittings` is a process with the library in
it that starts a run again and again, on one preloaded keeper, and tells how each sitting ended.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

LAYOUT = struct.Struct("6q4qq1024s512s1024s")  # of `struct control`
BELOW = struct.calcsize("6q4qq")  # where the folder stands in it; without one nothing fails
EXIT_3, HANG, NO_MEMORY = -1001, -1002, -1003  # as in faults.c; other negative numbers are signals
REFUSALS = (errno.ENOSPC, errno.EIO, errno.EACCES)


@dataclass(frozen=True)
class Fault:
    """What goes wrong.

    Attributes:
        error: an errno, a signal as a negative number, or one of those above.
        first: the number of the call, from 1, of those that fit; 0: none, calls are only counted.
        ever: every call after it fails, too, whoever makes it, as of a disk that is full.
        like: a pattern that the path below the folder fits; empty: any.
        who: "ours", the processes of `ts-loop` itself, or "theirs", all others; empty: both.
        reads: calls that read count, too.
    """

    error: int = 0
    first: int = 0
    ever: bool = False
    like: str = ""
    who: str = ""
    reads: bool = False


NONE = Fault()


class Call(NamedTuple):
    """One call that was seen: number, process, what it does, path below the folder (`/` in front)."""

    number: int
    pid: int
    what: str
    path: str


class Faults:
    """The library, and what it is told."""

    def __init__(self, folder: Path):
        """`folder` gets library, control file and log."""
        self.library, self.control, self.log = (folder / name for name in ("faults.so", "control", "calls"))
        source = Path(__file__).with_name("faults.c")
        command = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(self.library), str(source), "-ldl"]
        subprocess.run(command, check=True)
        self.disarm()

    @property
    def environment(self) -> dict[str, str]:
        """Of a process that is to have the library."""
        return {**os.environ, "LD_PRELOAD": str(self.library), "FAULTS": str(self.control)}

    def arm(self, fault: Fault, below: Path, ours: Sequence[int] = (), logged: bool = False) -> None:
        """Count from here on, and let go wrong what `fault` says; `ours` are the pids of `ts-loop` itself."""
        pids = [*(ours if fault.who else ()), 0, 0, 0, 0][:4]
        texts = [str(below.resolve()), fault.like, str(self.log) if logged else ""]
        self.log.unlink(missing_ok=True)
        numbers = (0, 0, fault.first, fault.ever, fault.error, fault.reads, *pids, fault.who == "theirs")
        self._write(LAYOUT.pack(*numbers, *(text.encode() for text in texts)))

    def disarm(self) -> None:
        """Let nothing go wrong."""
        self._write(bytes(LAYOUT.size))

    def _write(self, content: bytes) -> None:
        # In place: who has mapped it sees it.
        with self.control.open("r+b" if self.control.exists() else "wb") as file:
            file.write(content)

    def counted(self) -> tuple[int, int]:
        """How many calls fitted since it was armed, and how many of them went wrong."""
        count, failed, *_ = LAYOUT.unpack(self.control.read_bytes())
        return count, failed

    def calls(self) -> list[Call]:
        """What was logged since it was armed, in order."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        split = [line.split("\t") for line in lines]
        return sorted(Call(int(number), int(pid), what, path) for number, pid, what, path in split)


class Ended(NamedTuple):
    """How a sitting ended: exit code, what it said as its last word (empty: all is well), traceback of what was no
    expected failure, calls that fitted, calls that went wrong, all it printed."""

    code: int
    said: str
    raised: str
    count: int
    failed: int
    printed: str


class Sittings:
    """A process that starts commands as `ts-loop` does, one after another; use it as a context manager."""

    def __init__(self, faults: Faults, log: Path, preloaded: bool = True):
        """`log` gets what the process itself says; without `preloaded` it has no keeper, and can run no loop."""
        self.faults = faults
        self._log = log.open("w")
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), str(log) if preloaded else ""],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=faults.environment,
        )
        self.pids: list[int] = self._read()

    def _read(self) -> Any:
        assert self._process.stdout
        return json.loads(self._process.stdout.readline())

    def _sit(self, below: Path, fault: Fault, logged: bool, **order: Any) -> Ended:
        assert self._process.stdin
        self.faults.arm(fault, below, self.pids, logged)
        self._process.stdin.write(json.dumps(order, default=str) + "\n")
        self._process.stdin.flush()
        try:
            code, said, raised, printed, self.pids = self._read()
        except ValueError:  # it is no more
            code, said, raised, printed = self._process.wait(), "", "", ""
        count, failed = self.faults.counted()
        self.faults.disarm()
        return Ended(code, said, raised, count, failed, printed)

    def run(
        self,
        config: Path,
        out: Path,
        fault: Fault = NONE,
        logged: bool = False,
        changes: Sequence[str] = (),
        below: Path | None = None,
        **wishes: Any,
    ) -> Ended:
        """Do what is left of a run, with a fault below `out` or another folder; `changes` as `--set` takes them."""
        return self._sit(below or out, fault, logged, config=config, out=out, changes=changes, wishes=wishes)

    def dial(self, out: Path, name: str, t: float, fault: Fault = NONE) -> Ended:
        """Turn the dial of a run to one value, with a fault below `out`."""
        return self._sit(out, fault, False, out=out, dial=name, t=t)

    def export(self, out: Path, name: str, to: Path, fault: Fault = NONE, logged: bool = False) -> Ended:
        """Export a checkpoint, with a fault below the folder that `to` is in."""
        return self._sit(to.parent, fault, logged, out=out, name=name, to=to)

    def __enter__(self) -> Sittings:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait(20)
        self._process.stdout.close()
        self._log.close()


def serve(log: str) -> None:
    """The process itself: a line in, a sitting, a line out."""
    from rich.console import Console

    from harness import dial, export, lineage, loop
    from harness.config import load, read_recipes
    from harness.errors import LoopError
    from harness.files import refusal
    from harness.model_card import Licence
    from harness.runner import LocalRunner
    from harness.view import View

    def keeper() -> LocalRunner | None:
        started = LocalRunner(Path(log), preloaded=True) if log else None
        if started:
            started.wait()
        return started

    def sitting(order: Mapping[str, Any], console: Console) -> None:
        out = Path(order["out"])
        if to := order.get("to"):
            export.write(lineage.choose(out, order["name"]), Path(to), Licence("apache-2.0"), "me/mine")
            return
        if name := order.get("dial"):
            loop.go(dial.prepare(out, name, [order["t"]], View(console)), View(console), runner, told=False)
            return
        settings = load(Path(order["config"]), {}, order["changes"])
        recipes, wishes = read_recipes(settings, order["changes"]), loop.Wishes(**order["wishes"])
        loop.go(loop.prepare(settings, recipes, out, View(console), wishes), View(console), runner)

    said, sys.stdout = sys.stdout, sys.stderr
    runner = keeper()
    pids = [os.getpid(), *([runner._keeper.pid] if runner else [])]
    print(json.dumps(pids), file=said, flush=True)
    for line in sys.stdin:
        console = Console(file=io.StringIO(), width=200, highlight=False)
        code, word, raised = 0, "", ""
        try:  # as harness.cli does
            sitting(json.loads(line), console)
        except LoopError as error:
            code, word = error.code, str(error)
        except OSError as error:
            code, word = (refused := refusal(error, Path.cwd())).code, str(refused)
        except Exception:
            code, raised = 1, traceback.format_exc()
        if runner and (runner._gone or runner.stopped):
            with Path(os.environ["FAULTS"]).open("r+b") as control:  # a new one is not to fail; what was counted stays
                control.seek(BELOW)
                control.write(b"\0")
            runner.close()
            runner = keeper()
            pids = [os.getpid(), *([runner._keeper.pid] if runner else [])]
        printed = console.file.getvalue()  # type: ignore[attr-defined]
        print(json.dumps([code, word, raised, printed, pids]), file=said, flush=True)
    if runner:
        runner.close()


def copied(source: Path, target: Path, but: str = "") -> None:
    """Put a store and its runs in a place anew, without the stage whose key is `but`."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True, ignore=lambda folder, names: [but] if but in names else [])


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    serve(sys.argv[1])
