"""The process under which every command of one `ts-loop` runs: none outlives it, and it does not outlive `ts-loop`.

Knows Linux processes and nothing of stages. `runner` starts it and speaks with it in lines of JSON over a socket:

    → {"run": id, "command": […], "environment": {…}, "log": path, "hold": path or null}
    → {"stop": id}
    ← {"ready": true}
    ← {"started": id, "pid": …}
    ← {"ended": id, "code": exit code or -signal, "cpu_s": …, "peak_mb": …}
    ← {"ended": id, "refused": errno, "path": …}

Facts of Linux make it sure. Each command has a leader, a *child subreaper*: whatever the command starts and abandons,
in a session of its own or not, becomes the leader's child, and what of it is still alive when the command has ended is
killed before the end is reported. The keeper gets a signal when `ts-loop` dies, even of SIGKILL, the leaders when the
keeper does, and both kill all they have. Until nothing of a command is alive the lock file `hold` is held, so that
nobody else writes where a dying command still might.

With `--preload` it imports the tools once and every command is then a fork of it, with a process's isolation and none
of its ten seconds of imports. That is for machines without an accelerator: importing bitsandbytes and torchao
initialises CUDA, and a fork of a process that has done so cannot use it. Without `--preload` it imports nothing and a
command is a program like any other.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import functools
import importlib
import json
import os
import resource
import runpy
import select
import shutil
import signal
import socket
import sys
import time
import traceback
import types
from importlib.metadata import entry_points
from typing import Any

import psutil

# What a bare command imports before its first useful line. One that cannot be imported is the command's to complain of.
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
]
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
PATIENCE_S = 3.0  # between asking a command to end and killing it
MIB = 2**20


class Command:
    """One command that runs."""

    def __init__(self, number: int, pid: int, hold: int | None):
        """`pid` is its leader's; `hold`, a locked file's descriptor, is let go once nothing of the command is alive."""
        self.number, self.pid, self.hold = number, pid, hold
        self.kill_at: float | None = None


class Keeper:
    """Runs commands as it is told, until the other side of its socket is gone."""

    def __init__(self, link: socket.socket, preloaded: bool):
        """`link` is a connected stream socket."""
        self.link, self.preloaded = link, preloaded
        self.running: dict[int, Command] = {}  # by pid
        self.pending = b""

    def serve(self) -> None:
        """Take orders and report ends."""
        wake, wake_writer = os.pipe()
        os.set_blocking(wake, False)
        os.set_blocking(wake_writer, False)
        signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        while True:
            deadlines = [command.kill_at for command in self.running.values() if command.kill_at]
            wait = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
            readable, _, _ = select.select([self.link.fileno(), wake], [], [], wait)
            if wake in readable:
                with contextlib.suppress(BlockingIOError):
                    os.read(wake, 65536)
            self.reap()
            self.kill_the_stubborn()
            if self.link.fileno() in readable and not self.take_orders():
                return

    def take_orders(self) -> bool:
        """Carry out what was sent; False once there is nobody to send anything."""
        try:
            received = self.link.recv(1 << 16)
        except ConnectionError:
            return False
        if not received:
            return False
        *lines, self.pending = (self.pending + received).split(b"\n")
        for line in lines:
            order = json.loads(line)
            if "run" in order:
                self.start(order)
            else:
                for command in self.running.values():
                    if command.number == order["stop"]:
                        self.stop(command)
        return True

    def say(self, **facts: Any) -> None:
        """Tell the other side; if it is gone, the next order says so."""
        with contextlib.suppress(OSError):
            self.link.sendall(json.dumps(facts).encode() + b"\n")

    def start(self, order: dict[str, Any]) -> None:
        """Fork a leader for the command."""
        hold = sink = None
        try:
            if order.get("hold"):
                # A plain lock, which forks share: it is held as long as one of them lives, whoever dies first.
                hold = os.open(order["hold"], os.O_RDWR | os.O_CREAT, 0o644)
                fcntl.flock(hold, fcntl.LOCK_EX)
            sink = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            pid = os.fork()
        except OSError as error:  # a disk that is full, say; that ends a command, and not whoever runs the others
            for opened in (hold, sink):
                if opened is not None:
                    os.close(opened)
            self.say(ended=order["run"], refused=error.errno, path=error.filename)
            return
        if pid == 0:
            self.link.close()
            lead(order["command"], order["environment"], sink, self.preloaded)
        os.close(sink)
        self.running[pid] = Command(order["run"], pid, hold)
        self.say(started=order["run"], pid=pid)

    def stop(self, command: Command) -> None:
        """Ask all of a command to end; `kill_the_stubborn` follows up."""
        if command.kill_at is None:
            command.kill_at = time.monotonic() + PATIENCE_S
            send(signal.SIGTERM, tree(command.pid)[1:])

    def kill_the_stubborn(self) -> None:
        """Kill what was asked to end and has not."""
        for command in self.running.values():
            if command.kill_at and command.kill_at <= time.monotonic():
                command.kill_at = time.monotonic() + PATIENCE_S
                send(signal.SIGKILL, tree(command.pid)[1:])

    def reap(self) -> None:
        """Take note of every child that has ended: leaders, and what a leader that was killed has left."""
        while True:
            try:
                pid, status, used = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if command := self.running.pop(pid, None):
                self.clear()
                if command.hold is not None:
                    fcntl.flock(command.hold, fcntl.LOCK_UN)
                    os.close(command.hold)
                code = os.waitstatus_to_exitcode(status)
                if command.kill_at and code == 0:
                    code = -signal.SIGTERM  # what was told to end has not done what it was to do
                cpu_s = used.ru_utime + used.ru_stime
                self.say(ended=command.number, code=code, cpu_s=cpu_s, peak_mb=used.ru_maxrss * 1024 / MIB)

    def clear(self) -> None:
        """Kill what a leader that was itself killed has left: it is the keeper's now."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            left = [p for p in psutil.Process().children() if p.pid not in self.running]
            if not left:
                return
            send(signal.SIGKILL, [process for orphan in left for process in tree(orphan.pid)])
            for orphan in left:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(orphan.pid, os.WNOHANG)
            time.sleep(0.01)


def send(number: int, processes: list[psutil.Process]) -> None:
    """Signal processes, of which some may be gone."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


def tree(pid: int) -> list[psutil.Process]:
    """A process and everything it has started that has not lost its parent since; empty if it is gone."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def end_everything() -> None:
    """Kill all descendants, adopted ones too, until there are none: nobody is left to wait for them."""
    deadline = time.monotonic() + 5.0
    while (left := tree(os.getpid())[1:]) and time.monotonic() < deadline:
        send(signal.SIGKILL, left)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.01)


def lead(command: list[str], environment: dict[str, str], sink: int, preloaded: bool) -> None:
    """In a fork of the keeper: start the command, see that nothing of it is left, and end as it did. Never returns."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # whose handler is still the keeper's own
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        become(command, environment, sink, preloaded)
    os.close(sink)
    while True:
        ended, status = os.waitpid(-1, 0)
        if ended == pid:
            break
    end_everything()
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the command has left one already, if it was to
        with contextlib.suppress(OSError, ValueError):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def become(command: list[str], environment: dict[str, str], sink: int, preloaded: bool) -> None:
    """In a fork of the leader: a group of its own, output to `sink`, and then the command. Never returns."""
    code = 1
    try:
        os.setsid()
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        os.close(sink)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(environment)
        if os.sep in command[0]:  # another environment's, whose own tools come first as if it were activated
            os.environ["PATH"] = f"{os.path.dirname(command[0])}{os.pathsep}{os.environ.get('PATH', '')}"
            os.execv(command[0], command)
        elif preloaded:
            code = in_process(command)
        elif program := sys.executable if command[0] == "python" else shutil.which(command[0]):
            os.execv(program, command)
        else:
            os.write(2, missing(command[0]).encode() + b"\n")
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # not sys.exit: a tool's atexit handlers and threads must not keep a finished command alive


def missing(name: str) -> str:
    """What to say of a command that is not there."""
    return f"{name}: command not found; install thinkswitch again"


def in_process(command: list[str]) -> int:
    """Call a console script as a shell's launcher does, or a module as `python -m` does; returns the exit code."""
    if (threads := os.environ.get("OMP_NUM_THREADS")) and (torch := sys.modules.get("torch")):
        torch.set_num_threads(int(threads))  # it read the variable when it was imported
    sys.argv = list(command)
    code: object = 0
    try:
        sys.modules["__main__"] = types.ModuleType("__main__")  # what runs is not the keeper's program
        if command[:2] == ["python", "-m"]:
            sys.argv = command[2:]
            runpy.run_module(command[2], run_name="__main__", alter_sys=True)
        else:
            found = [script for script in entry_points(group="console_scripts") if script.name == command[0]]
            code = found[0].load()() if found else missing(command[0])
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        return 1
    return code if isinstance(code, int) else 0


def preload() -> None:
    """Import the tools, and read lm-eval's task files once: it reads all 13,000 of them in every call."""
    for name in PRELOAD:
        try:
            importlib.import_module(name)
        except Exception:
            traceback.print_exc()
    try:
        from lm_eval.tasks import TaskManager

        # There is no hook: a TaskManager always indexes lm-eval's own folder, and so twice is the same.
        reader = TaskManager.__new__(TaskManager)
        index = functools.cache(functools.partial(TaskManager._get_task_and_group, reader))
        TaskManager._get_task_and_group = staticmethod(index)
        TaskManager()
    except Exception:
        traceback.print_exc()


def prctl(option: int, value: int) -> None:
    """Linux's prctl(2)."""
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def main() -> None:
    """The process: see the module."""
    parser = argparse.ArgumentParser(description="The process under which ts-loop's commands run.")
    parser.add_argument("fd", type=int)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--preload", action="store_true")
    options = parser.parse_args()

    def leave(*_: object) -> None:
        end_everything()
        os._exit(1)  # a leader leaves so, too, and its command has not ended well then

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != options.parent:  # it died before it could be watched
        os._exit(0)
    link = socket.socket(fileno=options.fd)
    link.set_inheritable(False)
    keeper = Keeper(link, options.preload)
    if options.preload:
        preload()  # which a signal ends at once: a handler would wait for the import of a library of half a gigabyte
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    keeper.say(ready=True)
    try:
        keeper.serve()
    finally:
        leave()
