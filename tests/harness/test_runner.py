"""Commands under the keeper: real console scripts, real deaths, and nothing left of either."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from harness import keeper, runner
from harness.errors import LoopError, StageError
from harness.runner import LocalRunner, Progress, ToolError

# Programs to run, under the names that `python -m` finds them by.
PROGRAMS = {
    "speaks": "import sys\nprint('hello')\nprint('and to standard error', file=sys.stderr)\n",
    "dies": "import os\nos.kill(os.getpid(), 9)\n",
    "refuses": "raise SystemExit('no: because of this')\n",
    "breaks": "print('so far')\nraise ValueError('the reason')\n",
    "sleeps": "import time\ntime.sleep(60)\n",
    "fills": "open('/dev/full', 'wb', 0).write(bytes(1))\n",
    "naps": "import time\ntime.sleep(1)\n",
    "ticks": "import sys, time\nfor i in (1, 2, 3):\n"
    "    print(f'Tokenizing: {i * 33}%|###| {i}/3 [00:00<00:00]', end='\\r')\n"
    "    sys.stdout.flush()\n    time.sleep(0.25)\n",
    "counts_threads": "import torch\nprint('threads', torch.get_num_threads())\n",
    "ignores_sigterm": "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('deaf', flush=True)\n"
    "time.sleep(60)\n",
    # What torchrun's workers are: a session of their own, and a parent that goes away.
    "abandons": "import os, subprocess, sys, time\n"
    "subprocess.Popen(['sleep', '61'], start_new_session=True)\n"
    "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(62)\n    os._exit(0)\n"
    "os.wait()\nprint('left them', flush=True)\n",
    "abandons_and_sleeps": "import runpy, time\nrunpy.run_module('abandons')\ntime.sleep(60)\n",
    "execs_away": "import os\nos.execvp('sh', ['sh', '-c', 'x=$(head -c 90000000 /dev/zero | tr \"\\\\0\" a); "
    "echo $OMP_NUM_THREADS; sleep 1.2; i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done'])\n",
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    for name, text in PROGRAMS.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def started(programs: Path, folder: Path, preloaded: bool) -> LocalRunner:
    """A runner whose commands find the programs."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(programs)
    try:
        return LocalRunner(folder / "preload.log", preloaded)
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def processes(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRunner]:
    """The process runner."""
    with started(programs, tmp_path_factory.mktemp("processes"), preloaded=False) as running:
        yield running


@pytest.fixture(scope="module")
def preloaded(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRunner]:
    """The preloaded one, with nothing but torch preloaded in its place: what is imported is not what is tested."""
    kept = keeper.PRELOAD[:]
    (programs / "sitecustomize.py").write_text("import harness.keeper\nharness.keeper.PRELOAD[:] = ['torch']\n")
    with started(programs, tmp_path_factory.mktemp("preloaded"), preloaded=True) as running:
        running.wait()
        (programs / "sitecustomize.py").unlink()
        assert kept == keeper.PRELOAD
        yield running


@pytest.fixture(params=["processes", "preloaded"])
def either(request: pytest.FixtureRequest) -> LocalRunner:
    """Each of the two."""
    running: LocalRunner = request.getfixturevalue(request.param)
    return running


def python(name: str) -> list[str]:
    return ["python", "-m", name]


def descendants(running: LocalRunner) -> list[psutil.Process]:
    return keeper.tree(running._keeper.pid)[1:]


def gone_within(seconds: float, look: Callable[[], object]) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not look():
            return True
        time.sleep(0.05)
    return False


def test_a_console_script_runs_as_typed(runner: LocalRunner, tmp_path: Path) -> None:
    usage = runner.run(["mergekit-yaml", "--help"], {}, tmp_path / "log.txt")
    assert "Usage: mergekit-yaml" in (tmp_path / "log.txt").read_text()
    assert usage.wall_s < 30
    assert usage.peak_mb > 50
    assert [file.name for file in tmp_path.iterdir()] == ["log.txt"]


def test_a_disk_that_refuses_the_keeper_ends_that_command_alone(either: LocalRunner, tmp_path: Path) -> None:
    """Its lock, or its log; an hour's training beside it goes on."""
    (tmp_path / "file").touch()
    (tmp_path / "log.txt").touch()
    for log, hold in ((tmp_path / "log.txt", tmp_path / "file/x.busy"), (tmp_path, tmp_path / "x.busy")):
        with pytest.raises(
            LoopError, match=r"cannot be written \(Not a directory\)|: Is a directory\nsee what is wrong"
        ):
            either.run(python("speaks"), {}, log, hold)
    either.run(python("speaks"), {}, tmp_path / "log.txt", tmp_path / "x.busy")  # nobody has it


def test_a_command_that_filled_the_disk_is_not_tried_again(either: LocalRunner, tmp_path: Path) -> None:
    said = r"^python -m fills failed: no disk space left while writing .*\nfree some .*\nthe whole log: .*log.txt$"
    with pytest.raises(StageError, match=said) as caught:
        either.run(python("fills"), {}, tmp_path / "log.txt")
    assert not isinstance(caught.value, ToolError)


def test_nothing_reaches_the_terminal(either: LocalRunner, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    either.run(python("speaks"), {}, tmp_path / "log.txt")
    assert sorted((tmp_path / "log.txt").read_text().splitlines()) == ["and to standard error", "hello"]
    assert capfd.readouterr() == ("", "")


def test_a_command_that_takes_too_long_is_ended_with_all_it_started(either: LocalRunner, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    with pytest.raises(ToolError, match=r"sleeps.* was ended: it took longer than 0.00028 h\n.*log.txt$"):
        either.run(python("abandons_and_sleeps"), {}, log, within_s=1.0)
    assert gone_within(2, lambda: [p for p in descendants(either) if "sleeps" in " ".join(p.cmdline())])
    assert either.run(python("speaks"), {}, log, within_s=60.0).wall_s < 60  # the runner goes on


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("dies", r"^python -m dies failed: killed by SIGKILL \(out of memory\?\)\n"),
        ("refuses", "^python -m refuses failed: no: because of this\n"),
        ("breaks", "^python -m breaks failed: ValueError: the reason\n"),
        ("missing", "^python -m missing failed: .*No module named"),
    ],
)
def test_a_failure_says_why_and_where(either: LocalRunner, tmp_path: Path, program: str, says: str) -> None:
    log = tmp_path / "log.txt"
    log.write_text("ValueError: of an earlier command\n")
    with pytest.raises(ToolError, match=says) as caught:
        either.run(python(program), {}, log)
    assert str(caught.value).splitlines()[1:] == [f"the whole log: {log}"]
    either.run(python("speaks"), {}, tmp_path / "after.txt")  # it takes nothing with it


def test_a_command_that_is_not_there(either: LocalRunner, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="nosuchtool: command not found; install"):
        either.run(["nosuchtool"], {}, tmp_path / "log.txt")


def test_what_a_command_abandons_ends_with_it(either: LocalRunner, tmp_path: Path) -> None:
    either.run(python("abandons"), {}, tmp_path / "log.txt")
    assert "left them" in (tmp_path / "log.txt").read_text()
    assert not [p for p in descendants(either) if p.status() != psutil.STATUS_ZOMBIE]


def test_usage_is_of_all_its_processes_even_if_the_first_execs_away(either: LocalRunner, tmp_path: Path) -> None:
    usage = either.run(python("execs_away"), {"OMP_NUM_THREADS": "3"}, tmp_path / "log.txt")
    assert (tmp_path / "log.txt").read_text() == "3\n"
    assert usage.peak_mb > 80
    assert usage.cpu_s > 0.1
    assert usage.wall_s > 1


def test_the_lock_is_held_while_anything_of_a_command_lives(either: LocalRunner, tmp_path: Path) -> None:
    from filelock import FileLock, Timeout

    hold, seen = tmp_path / "busy", []

    def look(_: Progress) -> None:
        try:
            with FileLock(hold, timeout=0):
                seen.append("free")
        except Timeout:
            seen.append("held")

    either.run(python("ticks"), {}, tmp_path / "log.txt", hold, look)
    assert set(seen) == {"held"}
    with FileLock(hold, timeout=0):
        pass


def test_the_threads_of_a_command_are_what_was_asked(preloaded: LocalRunner, tmp_path: Path) -> None:
    preloaded.run(python("counts_threads"), {"OMP_NUM_THREADS": "1"}, tmp_path / "log.txt")
    preloaded.run(python("counts_threads"), {"OMP_NUM_THREADS": "2"}, tmp_path / "log.txt")
    assert (tmp_path / "log.txt").read_text() == "threads 1\nthreads 2\n"


def test_progress_is_read_from_the_tool_s_own_bar(either: LocalRunner, tmp_path: Path) -> None:
    seen: list[Progress] = []
    log = tmp_path / "log.txt"
    log.write_bytes(b"Earlier:  3%|#   | 3/100 [00:01<00:30]\r")
    assert runner.progress(log, log.stat().st_size) is None  # an earlier command's bar is not this one's
    either.run(python("ticks"), {}, log, on_progress=seen.append)
    assert seen[-1] == Progress("Tokenizing", 3, 3)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            b"Running generate_until requests:  10%|#  | 40/400 [00:01<00:09, 40it/s]",
            ("Running generate_until requests", 40, 400),
        ),
        (b"  3%|#   | 3/100 [00:01<00:30]", ("", 3, 100)),
        (b" 50%|##  | 1.2k/2.40k [00:01<00:30]", ("", 1200, 2400)),
        (
            b"Tokenizing Prompts (num_proc=2): 100%|####| 80/80 [00:01<00:00]",
            ("Tokenizing Prompts (num_proc=2)", 80, 80),
        ),
    ],
)
def test_bars_as_tools_draw_them(tmp_path: Path, line: bytes, says: tuple[str, int, int]) -> None:
    (tmp_path / "log.txt").write_bytes(b"other words\n" + line + b"\r")
    assert runner.progress(tmp_path / "log.txt", 0) == says


def test_commands_run_side_by_side_and_stop_at_once(programs: Path, tmp_path: Path) -> None:
    with started(programs, tmp_path, preloaded=False) as running, ThreadPoolExecutor(3) as pool:
        begun = time.monotonic()
        walls = [u.wall_s for u in pool.map(lambda i: running.run(python("naps"), {}, tmp_path / f"{i}"), range(3))]
        assert sum(walls) > 2.9 > time.monotonic() - begun
        assert running.busy_s <= time.monotonic() - begun
        names = ["sleeps", "abandons_and_sleeps", "ignores_sigterm"]
        ended = [pool.submit(running.run, python(name), {}, tmp_path / name) for name in names]
        logs = [tmp_path / "abandons_and_sleeps", tmp_path / "ignores_sigterm"]
        assert gone_within(20, lambda: not all(log.exists() and log.read_text() for log in logs))
        assert len(descendants(running)) >= 5
        running.stop()
        for future in ended:
            with pytest.raises(ToolError, match="killed by SIG"):
                future.result(10)
        with pytest.raises(ToolError, match="stopped before it began"):
            running.run(python("speaks"), {}, tmp_path / "log.txt")
        assert gone_within(1, lambda: descendants(running))


def test_closing_ends_what_runs_and_the_keeper(programs: Path, tmp_path: Path) -> None:
    running = started(programs, tmp_path, preloaded=False)
    waiting = threading.Thread(
        target=pytest.raises, args=(ToolError, running.run, python("sleeps"), {}, tmp_path / "l")
    )
    waiting.start()
    assert gone_within(20, lambda: not descendants(running))
    family = [running._keeper.pid, *(p.pid for p in descendants(running))]
    running.close()
    waiting.join(5)
    assert not waiting.is_alive()
    assert not any(map(psutil.pid_exists, family))


def test_a_keeper_that_is_killed_takes_its_commands_along_and_is_reported(programs: Path, tmp_path: Path) -> None:
    with started(programs, tmp_path, preloaded=False) as running, ThreadPoolExecutor(1) as pool:
        ended = pool.submit(running.run, python("sleeps"), {}, tmp_path / "log.txt")
        assert gone_within(20, lambda: not descendants(running))
        children = descendants(running)
        running._keeper.kill()
        with pytest.raises(ToolError, match="the process that ran it was killed"):
            ended.result(10)
        assert not psutil.wait_procs(children, 5)[1]


def test_a_module_that_cannot_be_imported_does_not_stop_the_preloading(programs: Path, tmp_path: Path) -> None:
    (programs / "sitecustomize.py").write_text(
        "import harness.keeper\nharness.keeper.PRELOAD[:] = ['no_such_module', 'breaks', 'speaks']\n"
    )
    try:
        with started(programs, tmp_path, preloaded=True) as running:
            running.run(python("speaks"), {}, tmp_path / "log.txt")
    finally:
        (programs / "sitecustomize.py").unlink()
    assert "ValueError: the reason" in (tmp_path / "preload.log").read_text()


def test_a_keeper_that_imports_is_ended_at_once(tmp_path: Path) -> None:
    running = LocalRunner(tmp_path / "preload.log", preloaded=True)
    time.sleep(1)
    began = time.monotonic()
    running.close()
    assert time.monotonic() - began < 2
    assert running._keeper.returncode == -signal.SIGTERM


def test_last_words_skip_the_noise(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text(
        "Traceback (most recent call last):\n"
        '  File "x.py", line 1, in f\n    g()\n'
        "ValueError: sequence_len must be positive\n"
        "  7%|7    | 7/100 [00:01<00:30, 3.0it/s]\r\n"
    )
    assert runner.last_words(log) == ["ValueError: sequence_len must be positive"]
    log.write_text(
        "[rank1]: RuntimeError: out of it\n"
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
        "====\ntrain.py FAILED\n  error_file: <N/A>\n====\n"
    )
    assert runner.last_words(log) == ["RuntimeError: out of it"]
    log.write_text("Error: No such option\n")
    assert runner.last_words(log) == ["Error: No such option"]
    assert runner.last_words(tmp_path / "none") == []


ENDED_BY_TORCHRUN = """\
[rank0]: RuntimeError: Read error [127.0.0.1]:24994: Connection reset by peer
[rank1]: ValueError: the reason
[rank0]: RuntimeError: Read error [127.0.0.1]:24994: Connection reset by peer
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
=====
Failures:
[1]:
  rank      : 0 (local_rank: 0)
  exitcode  : 1 (pid: 25015)
-----
Root Cause (first observed failure):
[0]:
  time      : 2026-11-25_00:16:31
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : {code} (pid: 25016)
"""


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (1, "ValueError: the reason"),
        (-9, "rank 1 was killed by SIGKILL (out of memory?), and with it the others"),
        (-15, "rank 1 was killed by SIGTERM, and with it the others"),
    ],
)
def test_of_several_processes_the_one_that_failed_first_is_told_of(tmp_path: Path, code: int, said: str) -> None:
    log = tmp_path / "log.txt"
    log.write_text(ENDED_BY_TORCHRUN.format(code=code))
    assert runner.last_words(log) == [said]


# --- accelerators ---

TRAP = """
import importlib, sys
names = %r
if %r:
    import torch
    calls = []
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda._lazy_init = lambda: calls.append(1)
for name in names:
    try:
        importlib.import_module(name)
    except Exception:
        if not %r:
            raise  # else a library finds that the GPU of the trap is none
print("torch" in sys.modules, len(calls) if %r else 0)
"""


def under_the_trap(names: list[str], torch_first: bool) -> tuple[str, int]:
    """Import modules where a GPU seems to be there: was torch imported, and how often was CUDA initialised?"""
    script = TRAP % (names, torch_first, torch_first, torch_first)
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    imported, count = said.stdout.split()[-2:]
    return imported, int(count)


def test_nothing_that_a_gpu_s_commands_come_from_touches_cuda() -> None:
    ours = ["harness.cli", "harness.loop", "harness.keeper", "harness.runner", "harness.plan", "harness.view"]
    assert under_the_trap(ours, torch_first=False) == ("False", 0)
    assert under_the_trap(ours, torch_first=True) == ("True", 0)


def test_the_trap_springs_where_the_tools_are_preloaded() -> None:
    """Why the preloaded runner is for machines without an accelerator only."""
    assert under_the_trap(["bitsandbytes", "axolotl.core.builders.causal"], torch_first=True)[1] > 0


@pytest.mark.parametrize("accelerator", [True, False])
def test_the_runner_fits_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, accelerator: bool) -> None:
    monkeypatch.setattr(runner, "has_accelerator", lambda: accelerator)
    with runner.start(tmp_path / "preload.log") as running:
        assert running.preloaded is not accelerator
        if accelerator:
            running.wait()
            assert "torch" not in Path(f"/proc/{running._keeper.pid}/maps").read_text()


def test_gpus_are_counted_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "nvml_handles", lambda: ["a", "b"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert runner.gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,GPU-5f")
    assert runner.gpus() == ["1", "GPU-5f"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert runner.gpus() == []
    monkeypatch.setattr(runner, "nvml_handles", list)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert runner.gpus() == []
