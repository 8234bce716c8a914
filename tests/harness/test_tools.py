"""Commands in children of the preloaded server: real console scripts, real deaths."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from harness import tools


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tools.Tools]:
    with tools.Tools(tmp_path_factory.mktemp("tools") / "preload.log") as running:
        running.wait()
        yield running


def speak(*words: str) -> None:
    print(*words)
    print("and to standard error", file=sys.stderr)


def die_of(number: int) -> None:
    os.kill(os.getpid(), number)


def sleep_with_a_child(note: str) -> None:
    child = os.fork()
    if child == 0:
        time.sleep(60)
    Path(note).write_text(f"{os.getpid()} {child}")
    time.sleep(60)


def report_modules(note: str) -> None:
    import torch

    names = [name for name in ("axolotl.cli.main", "lm_eval.evaluator", "mergekit.merge") if name in sys.modules]
    Path(note).write_text(f"{' '.join(names)} {torch.cuda.is_initialized()} {os.environ['AXOLOTL_DO_NOT_TRACK']}")


def forked(server: tools.Tools, function: Callable[..., None], *args: object, log: Path, **options: Any) -> tools.Usage:
    """Run a function where a console script would be: in a fork of the preloaded server."""
    settings = {"on_progress": None, "threads": None, **options}
    return server._run(server._context, function, args, function.__name__, log, **settings)


def test_a_console_script_runs_as_typed(server: tools.Tools, tmp_path: Path) -> None:
    usage = server.run(["mergekit-yaml", "--help"], tmp_path / "log.txt")
    assert "Usage: mergekit-yaml" in (tmp_path / "log.txt").read_text()
    assert usage.wall_s < 30
    assert usage.peak_mb > 50
    assert [file.name for file in tmp_path.iterdir()] == ["log.txt"]


def test_nothing_reaches_the_terminal(server: tools.Tools, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    server.call(speak, "hello", log=tmp_path / "log.txt")
    assert (tmp_path / "log.txt").read_text() == "hello\nand to standard error\n"
    assert capfd.readouterr() == ("", "")


def test_the_tools_are_preloaded_quiet_and_off_the_gpu(server: tools.Tools, tmp_path: Path) -> None:
    forked(server, report_modules, str(tmp_path / "note"), log=tmp_path / "log.txt")
    assert (tmp_path / "note").read_text() == "axolotl.cli.main lm_eval.evaluator mergekit.merge False 1"


def test_a_failure_says_why_and_where(server: tools.Tools, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("from an earlier command: not this\n")
    with pytest.raises(tools.ToolError) as caught:
        server.run(["axolotl", "train", str(tmp_path / "none.yml")], log)
    said = str(caught.value).splitlines()
    assert said[0].startswith("axolotl train failed: ")
    assert "does not exist" in said[0]
    assert said[1].endswith(str(log))
    with pytest.raises(tools.ToolError, match="nosuchtool: command not found"):
        server.run(["nosuchtool"], log)


def test_a_killed_child_takes_nothing_with_it(server: tools.Tools, tmp_path: Path) -> None:
    with pytest.raises(tools.ToolError, match=r"killed by SIGKILL \(out of memory\?\)"):
        forked(server, die_of, int(signal.SIGKILL), log=tmp_path / "log.txt")
    server.call(speak, "still here", log=tmp_path / "log.txt")


def test_an_interrupt_ends_the_child_and_all_it_started(server: tools.Tools, tmp_path: Path) -> None:
    note = tmp_path / "pids"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        with pytest.raises(KeyboardInterrupt):
            forked(server, sleep_with_a_child, str(note), log=tmp_path / "log.txt")
    finally:
        signal.signal(signal.SIGALRM, before)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and any(map(alive, note.read_text().split())):
        time.sleep(0.05)
    assert not any(map(alive, note.read_text().split()))


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_progress_is_read_from_the_tool_s_own_bar(server: tools.Tools, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    log = tmp_path / "log.txt"
    log.write_bytes(b"  3%|#   | 3/100 [00:01<00:30]\r  4%|#   | 4/100 [00:01<00:30]\r")
    assert tools._progress(log, 0) == (4, 100)
    assert tools._progress(log, log.stat().st_size) is None  # an earlier command's bar is not this one's
    forked(server, tick, log=log, on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (3, 3)


def note_threads(note: str) -> None:
    import torch

    Path(note).write_text(str(torch.get_num_threads()))


def test_the_threads_of_a_command_are_what_was_asked(server: tools.Tools, tmp_path: Path) -> None:
    forked(server, note_threads, str(tmp_path / "note"), log=tmp_path / "log.txt", threads=1)
    assert (tmp_path / "note").read_text() == "1"


def test_commands_from_several_threads_run_at_once_and_stop_at_once(server: tools.Tools, tmp_path: Path) -> None:
    def nap(number: int) -> tools.Usage:
        return forked(server, time.sleep, 1.0, log=tmp_path / f"{number}.txt")

    begun, before = time.monotonic(), server.busy_s
    with ThreadPoolExecutor(4) as pool:
        walls = [usage.wall_s for usage in pool.map(nap, range(4))]
    assert sum(walls) > 3.9
    assert server.busy_s - before <= time.monotonic() - begun < sum(walls)


def test_stop_ends_what_runs_and_lets_nothing_begin(tmp_path: Path) -> None:
    with tools.Tools(tmp_path / "preload.log") as running, ThreadPoolExecutor(2) as pool:
        pids = [tmp_path / "a", tmp_path / "b"]
        ended = [
            pool.submit(forked, running, sleep_with_a_child, str(note), log=note.with_suffix(".log")) for note in pids
        ]
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not all(note.exists() and note.read_text() for note in pids):
            time.sleep(0.05)
        running.stop()
        for future in ended:
            with pytest.raises(tools.ToolError):
                future.result()
        with pytest.raises(tools.ToolError, match="stopped before it began"):
            running.run(["mergekit-yaml", "--help"], tmp_path / "log.txt")
        deadline = time.monotonic() + 5  # a killed process is gone when the kernel gets to it
        started = [pid for note in pids for pid in note.read_text().split()]
        while time.monotonic() < deadline and any(alive(pid) for pid in started):
            time.sleep(0.05)
        assert not any(alive(pid) for pid in started)


def tick() -> None:
    for i in (1, 2, 3):
        print(f"{i}/3 [00:00<00:00]", end="\r")
        sys.stdout.flush()
        time.sleep(0.25)


def test_last_words_skip_the_noise(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text(
        "Traceback (most recent call last):\n"
        '  File "x.py", line 1, in f\n    g()\n'
        "ValueError: sequence_len must be positive\n"
        "  7%|7    | 7/100 [00:01<00:30, 3.0it/s]\r\n"
    )
    assert tools.last_words(log) == ["ValueError: sequence_len must be positive"]
    assert tools.last_words(tmp_path / "none") == []
