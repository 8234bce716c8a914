"""Two hundred loops in a row, commands of theirs killed at random: nothing grows in who runs them."""

from __future__ import annotations

import fcntl
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from small import run_here, small_loop

from harness.errors import StageError
from harness.runner import LocalRunner
from harness.store import held

LOOPS = int(os.environ.get("SOAK_LOOPS", "200"))
WARM_UP = 20  # loops after which caches are filled
MIB = 1 << 20


def keeper_of(runner: LocalRunner) -> psutil.Process:
    """The process under which commands run."""
    return psutil.Process(runner._keeper.pid)


def held_now(process: psutil.Process) -> tuple[float, int, int]:
    """MiB, descriptors and threads of a process."""
    return process.memory_full_info().uss / MIB, process.num_fds(), process.num_threads()


@contextmanager
def killer(keeper: psutil.Process, after_s: float, chance: random.Random) -> Iterator[None]:
    """Kill one of the processes that run commands some seconds from now, if there is one then."""
    over = threading.Event()

    def kill() -> None:
        if not over.wait(after_s) and (running := keeper.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                chance.choice(running).kill()

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.timeout(14400)
def test_two_hundred_loops_in_a_row(recipes: Path, tmp_path: Path, runner: LocalRunner) -> None:
    """Each with a seed of its own, so that each has work to do; one in three loses a command on its way."""
    config = small_loop(recipes, tmp_path / "mine", limit=8)
    runner.wait()
    here, keeper = psutil.Process(), keeper_of(runner)
    chance, lost = random.Random(0), 0
    seen: list[tuple[tuple[float, int, int], tuple[float, int, int]]] = []
    lasts = 10.0
    for seed in range(LOOPS):
        wanted = {"seed": seed, "name": f"loop-{seed}"}
        begun = time.monotonic()
        with killer(keeper, chance.uniform(0.0, lasts) if seed % 3 == 2 else 1e6, chance):
            try:
                ran = run_here(config, tmp_path / "runs", runner, **wanted)
            except StageError as error:
                lost += "killed" in str(error)
                ran = run_here(config, tmp_path / "runs", runner, **wanted)
        if seed % 3 != 2:
            lasts = time.monotonic() - begun
        assert len(ran.results["rows"]) == 4
        seen.append((held_now(here), held_now(keeper)))
        for lock in (tmp_path / "runs/stages/.locks").iterdir():
            assert not held(lock, fcntl.LOCK_SH), lock
    assert lost >= LOOPS // 10
    assert not [child for child in keeper.children(recursive=True) if child.status() == psutil.STATUS_ZOMBIE]
    for who, of_process in zip(("this process", "the keeper"), zip(*seen, strict=True), strict=True):
        memory, descriptors, threads = zip(*of_process, strict=True)
        first, last = memory[WARM_UP : WARM_UP + 10], memory[-10:]
        grown = (sorted(last)[5] - sorted(first)[5]) / (LOOPS - WARM_UP - 10)
        print(
            f"{who}: {memory[-1]:.0f} MiB, {grown * 1024:.1f} KiB a loop, {descriptors[-1]} descriptors; {lost} kills"
        )
        assert grown < 0.1, f"{who} grows by {grown:.2f} MiB a loop"
        assert max(descriptors[WARM_UP:]) <= max(descriptors[:WARM_UP]), descriptors
        assert max(threads[WARM_UP:]) <= max(threads[:WARM_UP]), threads
