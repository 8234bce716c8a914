"""Runs the tools' own commands, each in a child of one preloaded server process.

Knows processes: a `multiprocessing` forkserver imports axolotl, lm_eval and mergekit once, and every command is then a
fork of it, with a process's isolation and none of its ten seconds of imports. Knows nothing of stages or recipes: a
command is what a person would type, and its console script is found as a shell would find it.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import NamedTuple

from harness.errors import LoopError

# What a bare command imports before its first useful line. A module that is not installed is skipped.
PRELOAD = [
    "axolotl.cli.main",
    "axolotl.cli.train",
    "axolotl.cli.merge_lora",
    "axolotl.core.builders.causal",
    "axolotl.prompt_strategies.chat_template",
    "axolotl.utils.schemas.config",
    "thinkswitch_plugin.trace_stripping.plugin",
    "thinkswitch_plugin.trace_stripping.strategy",
    "thinkswitch_plugin.on_policy_kl.plugin",
    "thinkswitch_plugin.on_policy_kl.strategy",
    "thinkswitch_plugin.on_policy_kl.trainer",
    "bitsandbytes",
    "peft",
    "transformers.models.qwen3.modeling_qwen3",
    "lm_eval.__main__",
    "lm_eval._cli.run",
    "lm_eval.evaluator",
    "lm_eval.models.huggingface",
    "lm_eval.loggers",
    "mergekit.scripts.run_yaml",
    "mergekit.merge",
    "harness.tools",
]
QUIET = {
    "AXOLOTL_DO_NOT_TRACK": "1",  # no usage report leaves the machine unless the user sets this to 0
    "DO_NOT_TRACK": "1",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # a server that initialised CUDA could not fork children that use it
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}
PROGRESS = re.compile(rb"(\d+)/(\d+) \[")
NOISE = re.compile(r"^\s|^Traceback|^\s*$|it/s|s/it|━|╭|╰|│|\bWARNING\b|\bDEBUG\b|Warning:")


class Usage(NamedTuple):
    """What one command cost: wall and CPU seconds, peak resident memory in MiB."""

    wall_s: float
    cpu_s: float
    peak_mb: float


class ToolError(LoopError):
    """A command that ended badly."""


class Tools:
    """The preloaded server. One at a time; close it, or use it as a context manager.

    Commands may be run from several threads at once. `preload_s` is how long the imports took, `busy_s` for how long
    at least one command was running since, in wall seconds.
    """

    def __init__(self, log: Path):
        """Start preloading in the background; the server's own output goes to `log`."""
        for key, value in QUIET.items():
            os.environ.setdefault(key, value)
        self._begun = time.monotonic()
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)
        with _output_to(log):
            forkserver.ensure_running()
        self.preload_s = self.busy_s = 0.0
        self._lock = threading.Lock()  # `multiprocessing` looks after its children from one thread at a time
        self._running: set[multiprocessing.process.BaseProcess] = set()
        self._stopped = False
        self._busy_since = 0.0

    def wait(self) -> None:
        """Block until the tools are imported, and note in `preload_s` how long that took from the start."""
        child = self._context.Process(target=_ready)
        child.start()
        child.join()
        self.preload_s, self.busy_s = time.monotonic() - self._begun, 0.0

    def run(
        self,
        command: list[str],
        log: Path,
        on_progress: Callable[[int, int], None] | None = None,
        threads: int | None = None,
    ) -> Usage:
        """Run one command to its end, its output appended to `log`.

        `on_progress(done, total)` is called as the tool's own progress bar moves. `threads` is how many threads its
        arithmetic gets (None: as many as the tool takes); two commands that take every core wait for one another.

        Raises:
            ToolError: if it exits with anything but 0; the text names the command, the log and the log's last line.
        """
        title = " ".join(command[:2])
        return self._run(self._context, _console_script, (command,), title, log, on_progress, threads)

    def call(
        self,
        function: Callable[..., None],
        *args: object,
        log: Path,
        preloaded: bool = False,
        threads: int | None = None,
    ) -> Usage:
        """Run a module-level function in a process of its own, its output appended to `log`.

        It need not wait for the preloading, unless it is to be a fork of the `preloaded` server; `threads` as in `run`.
        """
        context = self._context if preloaded else multiprocessing.get_context("spawn")
        return self._run(context, function, args, function.__name__, log, None, threads)

    def stop(self) -> None:
        """End every command that is running, and let no other begin. The threads that ran them get a `ToolError`."""
        with self._lock:
            self._stopped = True
            for child in self._running:
                _stop(child)

    def _run(
        self,
        context: multiprocessing.context.BaseContext,
        target: Callable[..., None],
        args: tuple[object, ...],
        title: str,
        log: Path,
        on_progress: Callable[[int, int], None] | None,
        threads: int | None,
    ) -> Usage:
        log.parent.mkdir(parents=True, exist_ok=True)
        usage_file = log.with_suffix(".usage")
        begun, start = time.monotonic(), log.stat().st_size if log.exists() else 0
        child = context.Process(target=_child, args=(target, args, str(log), str(usage_file), threads), name=title)  # type: ignore[attr-defined]
        try:
            with self._lock:
                if self._stopped:
                    raise ToolError(f"{title}: stopped before it began")
                child.start()
                if not self._running:
                    self._busy_since = begun
                self._running.add(child)
            last = None
            while not connection.wait([child.sentinel], 0.1):
                if on_progress and (seen := _progress(log, start)) != last and seen:
                    on_progress(*seen)
                    last = seen
        finally:
            with self._lock:
                if child.pid is not None:
                    _stop(child)
                    self._running.discard(child)
                    if not self._running:
                        self.busy_s += time.monotonic() - self._busy_since
        wall = time.monotonic() - begun
        if child.exitcode != 0:
            usage_file.unlink(missing_ok=True)
            raise ToolError(_obituary(title, child.exitcode or 1, log, start))
        cpu_s, peak_mb = json.loads(usage_file.read_text())
        usage_file.unlink()
        return Usage(wall, cpu_s, peak_mb)

    def close(self) -> None:
        """Let the server go; children still running are not touched (there are none between two `run`s)."""
        forkserver._forkserver._stop()  # type: ignore[attr-defined]

    def __enter__(self) -> Tools:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error:
            self.stop()
        self.close()


def _ready() -> None:
    """What the first child does: nothing, once there is a server to fork it."""


def _console_script(command: list[str]) -> None:
    """Call the console script `command[0]` with the rest as its arguments, as the shell's launcher does."""
    found = [script for script in entry_points(group="console_scripts") if script.name == command[0]]
    if not found:
        raise SystemExit(f"{command[0]}: command not found; install thinkswitch again")
    sys.argv = list(command)
    sys.exit(found[0].load()())


def _child(
    target: Callable[..., None], args: tuple[object, ...], log: str, usage_file: str, threads: int | None
) -> None:
    """In the fork: own process group, output to the log, and a note of what it cost at the end."""
    os.setsid()  # Ctrl-C reaches the orchestrator alone, which then stops the whole group
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    code: object = 0
    if threads and (torch := sys.modules.get("torch")):
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        target(*args)
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    own, below = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = own.ru_utime + own.ru_stime + below.ru_utime + below.ru_stime
    unit = 1 if sys.platform == "darwin" else 1024
    with contextlib.suppress(OSError):
        Path(usage_file).write_text(json.dumps([cpu, max(own.ru_maxrss, below.ru_maxrss) * unit / 2**20]))
    # Not sys.exit: a tool's atexit handlers and threads must not keep a finished command alive.
    os._exit(int(code) if isinstance(code, int) else 0)


def _stop(child: multiprocessing.process.BaseProcess) -> None:
    """End a child and all it started: asked first, then killed."""
    if child.pid is None:
        return
    for number, patience in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 3.0)):
        if child.exitcode is not None:
            break
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:  # it is so young that it has no group of its own yet
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, number)
        child.join(patience)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # what it started may outlive it


@contextlib.contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Let what is started inside write to `log`: the server keeps these descriptors for its whole life."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        for descriptor in (*saved, sink):
            os.close(descriptor)


def _progress(log: Path, start: int) -> tuple[int, int] | None:
    """The last `done/total [` of the tqdm bars a command wrote since byte `start`."""
    try:
        with log.open("rb") as file:
            file.seek(max(start, log.stat().st_size - 4096))
            found = PROGRESS.findall(file.read())
    except OSError:
        return None
    return (int(found[-1][0]), int(found[-1][1])) if found else None


def last_words(log: Path, start: int = 0) -> list[str]:
    """The last line of a log that says something, if any: no progress bars, no frames of a traceback."""
    try:
        with log.open("rb") as file:
            file.seek(max(start, log.stat().st_size - 65536))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = [line.rstrip() for line in text.replace("\r", "\n").splitlines() if not NOISE.search(line)]
    return lines[-1:]


def _obituary(title: str, exitcode: int, log: Path, start: int) -> str:
    """One or two lines about a command that died."""
    if exitcode < 0:
        name = signal.Signals(-exitcode).name
        reason = f"killed by {name}" + (" (out of memory?)" if exitcode == -signal.SIGKILL else "")
    else:
        reason = " ".join(last_words(log, start)) or f"exit code {exitcode}"
    return f"{title} failed: {reason}\nthe whole log: {log}"
