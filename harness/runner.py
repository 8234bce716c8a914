"""Runs commands and says what each cost: one protocol, `run(command, environment, log) → Usage`.

Knows the keeper, the process in which commands run and which sees that none is left over; sums up memory over all the
processes a command has, as `accelerate` and `torchrun` exec away the child that could have told. A command is what a
person would type. Knows nothing of stages or recipes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import psutil

from harness.errors import StageError
from harness.files import FULL, disk_errors, free_disk, no_room, refusal
from harness.keeper import MIB, PATIENCE_S, tree
from thinkswitch_plugin.cli import visible

QUIET = {
    "AXOLOTL_DO_NOT_TRACK": "1",  # no usage report leaves the machine unless the user sets this to 0
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    # glibc keeps freed blocks below 32 MiB, here and there as threads come: putting 0.6 B weights into NF4 on a CPU
    # then peaks up to a fifth above what is alive, another time not. It costs a training there some 4 % of its time.
    "MALLOC_MMAP_THRESHOLD_": str(4 << 20),
}
BAR = re.compile(rb"([^\r\n|]*?):?[ \t]*\d+%\|[^|]*\|\s*([\d.]+[kMG]?)/([\d.]+[kMG]?) \[")
UNITS = {"k": 1e3, "M": 1e6, "G": 1e9}
RAISED = re.compile(r"(?:\[rank\d+\]: ?)?((?:\w+\.)*\w*(?:Error|Exception)\b: .*)")
# What torchrun says at its end: which of several processes failed first.
FIRST = re.compile(r"Root Cause \(first observed failure\):.*?\brank\s*: (\d+).*?\bexitcode\s*: (-?\d+)", re.DOTALL)
NOISE = re.compile(r"^\s|^Traceback|^\s*$|it/s|s/it|━|╭|╰|│|\bWARNING\b|\bDEBUG\b|Warning:")
# Not `-m harness.keeper`: what a command is named, and what its own children import, follows from the main module.
START = "from harness.keeper import main; main()"
NO_ROOM = 1 << 16  # bytes of a disk, fewer than a tool's last words and what it was writing take
SAMPLE_S = 0.5  # between two looks at a command's memory, at least
LOOKING = 0.05  # the share of a core that looking takes at most: a large process has many pages to ask about


class Usage(NamedTuple):
    """What one command cost: wall and CPU seconds, peak memory of all its processes and of its GPU, in MiB."""

    wall_s: float
    cpu_s: float
    peak_mb: float
    gpu_peak_mb: float = 0.0


class Progress(NamedTuple):
    """A tool's own progress bar: what it calls it, and how far it is."""

    phase: str
    done: int
    total: int


class ToolError(StageError):
    """A command that ended badly."""


class Runner(Protocol):
    """Whatever runs commands to their ends, several at once from as many threads.

    Attributes:
        preloaded: whether it has imported the tools, so that a command need not.
        stopped: whether it was told to end everything.
        preload_s: how long that took, in seconds.
        busy_s: for how long at least one command was running since.
    """

    preloaded: bool
    stopped: bool
    preload_s: float
    busy_s: float

    def wait(self) -> None:
        """Block until commands can be run."""

    def stop(self) -> None:
        """End every command that is running, and let no other begin. The threads that ran them get a `ToolError`."""

    def close(self) -> None:
        """Let everything go."""

    def run(
        self,
        command: list[str],
        environment: Mapping[str, str],
        log: Path,
        hold: Path | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        within_s: float | None = None,
    ) -> Usage:
        """Run one command to its end, its output appended to `log`.

        Args:
            command: as a person would type it.
            environment: beside what is set already.
            log: a file.
            hold: a lock file that is held for as long as anything of the command is alive.
            on_progress: called as the tool's own progress bar moves.
            within_s: seconds after which it is ended; None: it may take as long as it likes.

        Raises:
            ToolError: if it exits with anything but 0, or too late; the text names the command, the log and the log's
                last line.
            StageError: if the disk is full, which another try does not mend.
        """


class LocalRunner:
    """Commands as processes of this machine, under a keeper. Close it, or use it as a context manager.

    Start it from the main thread: the keeper watches the thread that started it. `preload_s` is how long the imports
    took, `busy_s` for how long at least one command was running since, in wall seconds.
    """

    def __init__(self, log: Path, preloaded: bool):
        """Start the keeper, which goes on to import the tools if `preloaded`; its own output goes to `log`."""
        self.preloaded = preloaded
        self.preload_s = self.busy_s = 0.0
        self._begun = time.monotonic()
        self._lock = threading.Lock()
        self._replies: dict[int, dict[str, Any]] = {}  # what the keeper said of a command
        self._events: dict[int, threading.Event] = {}
        self._ready = threading.Event()
        self._number = 0
        self.stopped = self._gone = False
        self._busy_since: float | None = None
        self._link, theirs = socket.socketpair()
        self.log = log
        with disk_errors(log.parent):
            log.parent.mkdir(parents=True, exist_ok=True)
            log.touch()
        # This environment's own tools first, whatever stands in PATH.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        environment = {**QUIET, **os.environ, "PATH": path}
        options = ["--parent", str(os.getpid()), *(["--preload"] if preloaded else [])]
        with log.open("ab") as sink:
            self._keeper = subprocess.Popen(
                [sys.executable, "-c", START, str(theirs.fileno()), *options],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C reaches the orchestrator alone
            )
        theirs.close()
        threading.Thread(target=self._listen, daemon=True).start()

    def wait(self) -> None:
        """Block until the keeper takes commands, and note in `preload_s` how long that took from the start."""
        self._ready.wait()
        self.preload_s = self.preload_s or time.monotonic() - self._begun

    def run(
        self,
        command: list[str],
        environment: Mapping[str, str],
        log: Path,
        hold: Path | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        within_s: float | None = None,
    ) -> Usage:
        """As `Runner.run`."""
        title = " ".join([Path(command[0]).name, *command[1 : 3 if command[1:2] == ["-m"] else 2]])
        log.parent.mkdir(parents=True, exist_ok=True)
        start = log.stat().st_size if log.exists() else 0
        self.wait()
        begun = time.monotonic()
        number, done = self._begin(title, command, environment, log, hold)
        memory = Memory()
        seen: Progress | None = None
        late = False
        try:
            while not done.wait(0.1):
                memory.look(self._replies[number].get("pid"))
                if within_s is not None and not late and time.monotonic() - begun > within_s:
                    late = True
                    self._order(stop=number)
                if on_progress and (now := progress(log, start)) and now != seen:
                    on_progress(now)
                    seen = now
        except BaseException:
            self._order(stop=number)
            raise
        finally:
            self._end()
        said = self._replies.pop(number)
        if "refused" in said:
            raise refusal(OSError(said["refused"], os.strerror(said["refused"]), said["path"]), log.parent)
        if within_s is not None and late and said.get("code") != 0:
            raise ToolError(f"{title} was ended: it took longer than {within_s / 3600:.2g} h\nits log so far: {log}")
        if said.get("code") != 0:
            if is_full(log, start):
                raise StageError(f"{title} failed: {no_room(log.parent)}\nthe whole log: {log}")
            raise ToolError(obituary(title, said.get("code"), log, start))
        peak = max(memory.peak_mb, said["peak_mb"])
        return Usage(time.monotonic() - begun, said["cpu_s"], peak, memory.gpu_peak_mb)

    def stop(self) -> None:
        """End every command that is running, and let no other begin. The threads that ran them get a `ToolError`."""
        with self._lock:
            self.stopped = True
            running = list(self._events)
        for number in running:
            self._order(stop=number)

    def close(self) -> None:
        """Let the keeper go, and with it everything that still runs; what was told to stop gets its time to."""
        deadline = time.monotonic() + PATIENCE_S
        for event in list(self._events.values()) if self.stopped else []:
            event.wait(max(0.0, deadline - time.monotonic()))
        if not self._ready.is_set():
            self._keeper.terminate()  # it is importing and does not listen
        with contextlib.suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)
        try:
            self._keeper.wait(5)
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            self._keeper.wait()
        self._link.close()

    def __enter__(self) -> LocalRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(
        self, title: str, command: list[str], environment: Mapping[str, str], log: Path, hold: Path | None
    ) -> tuple[int, threading.Event]:
        with self._lock:
            if self._gone and not self.stopped:
                raise ToolError(f"{title} failed: the process that runs commands was killed\nits log: {self.log}")
            if self.stopped:
                raise ToolError(f"{title}: stopped before it began")
            self._number += 1
            number, done = self._number, threading.Event()
            self._events[number], self._replies[number] = done, {}
            if self._busy_since is None:
                self._busy_since = time.monotonic()
        order = {"command": command, "environment": dict(environment), "log": str(log)}
        self._order(run=number, hold=str(hold) if hold else None, **order)
        return number, done

    def _end(self) -> None:
        with self._lock:
            running = [event for event in self._events.values() if not event.is_set()]
            if not running and self._busy_since is not None:
                self.busy_s += time.monotonic() - self._busy_since
                self._busy_since = None

    def _order(self, **order: Any) -> None:
        with contextlib.suppress(OSError), self._lock:
            self._link.sendall(json.dumps(order).encode() + b"\n")

    def _listen(self) -> None:
        """Hear the keeper out, in a thread of its own; when it is gone, so is all it ran."""
        with contextlib.suppress(OSError), self._link.makefile("rb") as lines:
            for line in lines:
                said = json.loads(line)
                if "ready" in said:
                    self._ready.set()
                elif "started" in said:
                    self._replies[said["started"]].update(pid=said["pid"])
                else:
                    self._replies[said["ended"]].update(said)
                    self._events.pop(said["ended"]).set()
        with self._lock:
            self._gone = True
            left = list(self._events.values())
        self._ready.set()
        for event in left:
            event.set()


def start(log: Path) -> LocalRunner:
    """The runner for this machine: preloaded where no accelerator is, as a fork cannot use one."""
    return LocalRunner(log, preloaded=not has_accelerator())


class Memory:
    """The peak memory of a process and all below it, by looking now and then."""

    def __init__(self) -> None:
        """Nothing seen yet."""
        self.peak_mb = self.gpu_peak_mb = 0.0
        self._next = 0.0

    def look(self, pid: int | None) -> None:
        """Look, if it is time to."""
        if pid is None or time.monotonic() < self._next:
            return
        begun, used = time.monotonic(), time.thread_time()
        processes = tree(pid)
        total = 0
        for process in processes:
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss  # forks share what they do not write to
        self.peak_mb = max(self.peak_mb, total / MIB)
        self.gpu_peak_mb = max(self.gpu_peak_mb, gpu_memory_mb({process.pid for process in processes}))
        self._next = begun + max(SAMPLE_S, (time.thread_time() - used) / LOOKING)


def gpus() -> list[str]:
    """The NVIDIA GPUs that commands may use, as CUDA_VISIBLE_DEVICES names them; CUDA itself is not touched.

    Returns:
        What that variable lists, else an index for each GPU the driver knows; empty where there is no driver.
    """
    count = sum(1 for _ in nvml_handles())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not count:
        return [str(index) for index in range(count)]
    return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]


def has_accelerator() -> bool:
    """Whether a tool may find one: an NVIDIA GPU, or AMD's driver."""
    return bool(gpus()) or Path("/dev/kfd").exists()


def devices() -> list[str]:
    """What `gpus` finds, or one for all of another maker's, which are not told apart."""
    return gpus() or (["0"] if has_accelerator() else [])


def nvml_handles() -> list[Any]:
    """NVML's handle of each GPU; none without a driver that answers."""
    import pynvml

    try:
        return opened_gpus()
    except pynvml.NVMLError:
        return []


def opened_gpus() -> list[Any]:
    """NVML's handle of each GPU, which opens the driver; raises what NVML does."""
    import pynvml

    pynvml.nvmlInit()
    return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]


def has_bf16() -> bool:
    """Whether every NVIDIA GPU here computes in bfloat16, as they do since Ampere; others do not tell."""
    import pynvml

    return all(pynvml.nvmlDeviceGetCudaComputeCapability(handle)[0] >= 8 for handle in nvml_handles())


def gpu_memory_mb(pids: set[int]) -> float:
    """What these processes hold on all GPUs, in MiB."""
    import pynvml

    used = 0
    for handle in nvml_handles():
        with contextlib.suppress(pynvml.NVMLError):
            running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
            used += sum(process.usedGpuMemory or 0 for process in running if process.pid in pids)
    return used / MIB


def progress(log: Path, start: int) -> Progress | None:
    """The last tqdm bar that a command wrote since byte `start`, None if it wrote none."""
    try:
        with log.open("rb") as file:
            file.seek(max(start, log.stat().st_size - 4096))
            found = BAR.findall(file.read())
    except OSError:
        return None
    if not found:
        return None
    phase, done, total = found[-1]
    return Progress(phase.decode(errors="replace").strip(), _count(done), _count(total))


def _count(text: bytes) -> int:
    """12, or 1.2k, as tqdm writes a number."""
    plain = text.decode()
    return int(float(plain.rstrip("kMG")) * UNITS.get(plain[-1], 1))


def last_words(log: Path, start: int = 0) -> list[str]:
    """The line of a log that says why, if any: the last exception's, or else the last that is no noise."""
    try:
        with log.open("rb") as file:
            file.seek(max(start, log.stat().st_size - 65536))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = [line.rstrip() for line in text.replace("\r", "\n").splitlines() if not NOISE.search(line)]
    of_first = lines
    if first := FIRST.search(text):
        rank, code = first[1], int(first[2])
        if code < 0:
            return [f"rank {rank} was {killed_by(-code)}, and with it the others"]
        of_first = [line for line in lines if line.startswith(f"[rank{rank}]:")] or lines
    raised = [found[1] for line in of_first if (found := RAISED.match(line)) and "ChildFailedError" not in line]
    return raised[-1:] or lines[-1:]


def is_full(log: Path, start: int = 0) -> bool:
    """Whether a command failed because its disk is full: it said so, or there is no room to say so."""
    said = " ".join(last_words(log, start))
    return any(os.strerror(number) in said for number in FULL) or free_disk(log)[1] < NO_ROOM


def killed_by(number: int) -> str:
    """A process's end by a signal, and what that often means."""
    return f"killed by {signal.Signals(number).name}" + (" (out of memory?)" if number == signal.SIGKILL else "")


def obituary(title: str, code: int | None, log: Path, start: int) -> str:
    """One or two lines about a command that died; `code` is None if nobody knows how."""
    if code is None:
        reason = "the process that ran it was killed (out of memory?)"
    elif code < 0:
        reason = killed_by(-code)
    else:
        reason = visible(" ".join(last_words(log, start))) or f"exit code {code}"
    return f"{title} failed: {reason}\nthe whole log: {log}"
