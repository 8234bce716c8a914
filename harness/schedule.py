"""Runs what is ready on what is free. Knows stages' needs and slots; leaves the work itself to who asks for it.

A slot is a share of the machine: `gpu:0`, … and `cpu:0`, …; a stage gets the slot's environment, so that each GPU stage
sees its own device alone and each has the same number of threads whatever runs beside it: a continued run computes what
an undisturbed one does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from graphlib import TopologicalSorter
from typing import NamedTuple

from harness.errors import LoopError
from harness.stages import Stage

RETRY_S = 0.5  # until a stage is looked at again that another process works on
TICK_S = 1.0


class Slot(NamedTuple):
    """A share of the machine.

    Attributes:
        name: "cpu:0", "gpu:1".
        environment: what a command on it is told.
    """

    name: str
    environment: dict[str, str]

    @property
    def device(self) -> str:
        """ "cpu" or "gpu"."""
        return self.name.partition(":")[0]


def slots(gpus: Sequence[str], jobs: int) -> list[Slot]:
    """The machine in shares.

    Args:
        gpus: as CUDA_VISIBLE_DEVICES names them.
        jobs: how many stages run side by side on the CPU where there is no GPU; beside GPUs there is one.

    Returns:
        One slot a GPU, and `jobs` (or one) for the CPU.
    """
    count = 1 if gpus else jobs
    threads = str(max(1, len(os.sched_getaffinity(0)) // (len(gpus) + count)))
    base = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    on_gpu = [Slot(f"gpu:{i}", {**base, "CUDA_VISIBLE_DEVICES": name}) for i, name in enumerate(gpus)]
    # Without a GPU several processes of one training (torchrun) must be told that they are to meet on the CPU.
    without = {"CUDA_VISIBLE_DEVICES": ""} if gpus else {"ACCELERATE_USE_CPU": "true"}
    return on_gpu + [Slot(f"cpu:{i}", {**base, **without}) for i in range(count)]


def together(taken: Sequence[Slot]) -> dict[str, str]:
    """The environment of a stage that has several slots at once."""
    environment = dict(taken[0].environment)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        environment[name] = str(sum(int(slot.environment[name]) for slot in taken))
    if "CUDA_VISIBLE_DEVICES" in environment:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(slot.environment["CUDA_VISIBLE_DEVICES"] for slot in taken)
    return environment


def run(
    stages: Mapping[str, Stage],
    needs: Mapping[str, Sequence[str]],
    free: Sequence[Slot],
    work: Callable[[str, dict[str, str]], bool],
    tick: Callable[[], None] = lambda: None,
) -> Iterator[str]:
    """Run stages, each once what it needs is there, as many at once as there are slots.

    Args:
        stages: by key.
        needs: key → the keys, of these stages, whose outputs it reads.
        free: the slots.
        work: does a stage by its key in an environment; False if another process is at it: it is asked again later.
        tick: called about once a second.

    Yields:
        The keys of stages as they end.

    Raises:
        LoopError: of the first stage that failed, once those beside it have ended; none begins after it. Anything else,
            a stop above all, is raised at once: ending the commands that run is the caller's.
    """
    sorter = TopologicalSorter(needs)
    sorter.prepare()
    depth = depths(needs)
    every, idle = list(free), list(free)
    ready: list[str] = []
    not_before: dict[str, float] = {}
    running: dict[Future[bool], tuple[str, list[Slot]]] = {}
    failed: LoopError | None = None
    pool = ThreadPoolExecutor(len(every))
    try:
        while (sorter.is_active() and not failed) or running:
            ready = sorted([*ready, *sorter.get_ready()], key=lambda key: -depth[key])
            awaited: set[str] = set()  # devices that a wide stage waits for: narrow ones would keep it waiting for ever
            for key in [] if failed else list(ready):
                device = device_for(stages[key], every)
                if device in awaited or not_before.get(key, 0.0) > time.monotonic():
                    continue
                taken = fitting(stages[key], idle, every)
                if not taken:
                    if is_wide(stages[key], every):
                        awaited.add(device)
                    continue
                idle = [slot for slot in idle if slot not in taken]
                ready.remove(key)
                running[pool.submit(work, key, together(taken))] = key, taken
            if not running:
                time.sleep(RETRY_S)
                tick()
                continue
            ended, _ = wait(running, TICK_S if not ready else RETRY_S, FIRST_COMPLETED)
            tick()
            for future in ended:
                key, taken = running.pop(future)
                idle = [slot for slot in every if slot in idle or slot in taken]
                try:
                    if future.result():
                        sorter.done(key)
                        yield key
                    else:
                        not_before[key] = time.monotonic() + RETRY_S
                        ready.append(key)
                except LoopError as error:
                    failed = failed or error
    finally:
        pool.shutdown(wait=False)  # `with` would wait for what whoever leaves early is to end
    if failed:
        raise failed


def device_for(stage: Stage, every: Sequence[Slot]) -> str:
    """Whether a stage runs on "gpu" or "cpu" slots."""
    return "gpu" if stage.device == "gpu" and any(slot.device == "gpu" for slot in every) else "cpu"


def is_wide(stage: Stage, every: Sequence[Slot]) -> bool:
    """Whether a stage takes all slots of its device at once."""
    return stage.wide or (stage.whole_cpu and device_for(stage, every) == "cpu")


def fitting(stage: Stage, idle: Sequence[Slot], every: Sequence[Slot]) -> list[Slot]:
    """The idle slots that a stage would take, none if it has to wait."""
    wanted = device_for(stage, every)
    mine = [slot for slot in idle if slot.device == wanted]
    if not is_wide(stage, every):
        return mine[:1]
    return mine if len(mine) == sum(slot.device == wanted for slot in every) else []


def depths(needs: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """How long a chain of stages waits for each: what is on the longest goes first."""
    depth = dict.fromkeys(needs, 0)
    for key in reversed(list(TopologicalSorter(needs).static_order())):
        for needed in needs[key]:
            depth[needed] = max(depth[needed], depth[key] + 1)
    return depth
