"""Stages onto slots: what is needed first, who gets what of the machine, and how it ends. The work is pretended."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import toy

from harness import schedule
from harness.errors import LoopError, StageError
from harness.schedule import Slot, depths, fitting, slots, together
from harness.stages import Stage

Work = Callable[[str, dict[str, str]], bool]
PATIENCE_S = 10.0  # until a test gives up that waits for something


@pytest.fixture(autouse=True)
def at_a_quick_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second between two looks is for machines that work for hours."""
    monkeypatch.setattr(schedule, "RETRY_S", 0.05)
    monkeypatch.setattr(schedule, "TICK_S", 0.05)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C as it is in a terminal: a job in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def stages_of(needs: Mapping[str, Sequence[str]], **unlike: dict[str, Any]) -> dict[str, Stage]:
    """A stage a key; GPU stages, unless `unlike` says otherwise of one."""
    return {key: toy(key, **unlike.get(key, {})) for key in needs}


def run(needs: Mapping[str, Sequence[str]], free: Sequence[Slot], work: Work, **unlike: dict[str, Any]) -> list[str]:
    return list(schedule.run(stages_of(needs, **unlike), needs, free, work))


class Meeting:
    """Work that notes what it got, and can be held until it is let go."""

    def __init__(self, *held: str):
        self.begun: list[str] = []
        self.ended: list[str] = []
        self.environments: dict[str, dict[str, str]] = {}
        self.beside: dict[str, set[str]] = {}
        self.gates = {key: threading.Event() for key in held}
        self.lock = threading.Condition()

    def __call__(self, key: str, environment: dict[str, str]) -> bool:
        with self.lock:
            now = set(self.begun) - set(self.ended)
            self.beside[key] = now
            for other in now:
                self.beside[other].add(key)
            self.begun.append(key)
            self.environments[key] = dict(environment)
            self.lock.notify_all()
        if key in self.gates:
            assert self.gates[key].wait(PATIENCE_S)
        with self.lock:
            self.ended.append(key)
            self.lock.notify_all()
        return True

    def wait_for(self, *keys: str) -> None:
        with self.lock:
            assert self.lock.wait_for(lambda: set(keys) <= set(self.begun), PATIENCE_S)

    def let_go(self) -> None:
        for gate in self.gates.values():
            gate.set()


def in_the_background(needs: Mapping[str, Sequence[str]], free: Sequence[Slot], work: Work, **unlike: Any) -> Any:
    """Run in a thread; `join` gives what was yielded."""
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.extend(run(needs, free, work, **unlike)), daemon=True)
    thread.start()

    def join() -> list[str]:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
        return found

    return join


# --- the machine in shares ---


def test_a_cpu_is_shared_by_as_many_jobs_as_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    found = slots([], 3)
    assert [slot.name for slot in found] == ["cpu:0", "cpu:1", "cpu:2"]
    assert [slot.device for slot in found] == ["cpu"] * 3
    assert all(
        slot.environment == {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "ACCELERATE_USE_CPU": "true"}
        for slot in found
    )


def test_beside_gpus_there_is_one_slot_for_the_cpu_whatever_jobs_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    found = slots(["0", "GPU-1a"], 5)
    assert [slot.name for slot in found] == ["gpu:0", "gpu:1", "cpu:0"]
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in found] == ["0", "GPU-1a", ""]
    assert {slot.environment["OMP_NUM_THREADS"] for slot in found} == {"4"}


def test_more_jobs_than_cores_still_get_a_thread_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert {slot.environment["OMP_NUM_THREADS"] for slot in slots([], 3)} == {"1"}


def test_several_slots_together_have_all_their_devices_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    first, second, cpu = slots(["2", "5"], 1)
    both = together([first, second])
    assert both == {"CUDA_VISIBLE_DEVICES": "2,5", "OMP_NUM_THREADS": "8", "MKL_NUM_THREADS": "8"}
    assert together([cpu]) == cpu.environment
    assert first.environment["OMP_NUM_THREADS"] == "4"  # what a slot has does not change
    assert "CUDA_VISIBLE_DEVICES" not in together(slots([], 2))


def test_a_stage_takes_the_slots_of_its_kind() -> None:
    every = slots(["0", "1"], 1)
    first, second, cpu = every
    narrow, wide, on_cpu = toy("a"), toy("b", wide=True), toy("c", device="cpu")
    assert fitting(narrow, every, every) == [first]
    assert fitting(narrow, [second, cpu], every) == [second]
    assert fitting(narrow, [cpu], every) == []
    assert fitting(on_cpu, every, every) == [cpu]
    assert fitting(on_cpu, [first, second], every) == []
    assert fitting(wide, every, every) == [first, second]
    assert fitting(wide, [second, cpu], every) == []
    without = slots([], 2)
    assert fitting(narrow, without, without) == without[:1]
    assert fitting(wide, without, without) == without
    assert fitting(wide, without[:1], without) == []


def test_how_long_a_chain_waits_for_each() -> None:
    needs = {"long": ["middle"], "middle": ["first"], "first": [], "other": ["first"], "alone": []}
    assert depths(needs) == {"first": 2, "middle": 1, "long": 0, "other": 0, "alone": 0}


# --- order ---

DIAMOND = {"top": [], "left": ["top"], "right": ["top"], "bottom": ["left", "right"]}


def test_what_a_stage_needs_is_done_before_it_begins() -> None:
    meeting = Meeting()
    ended = run(DIAMOND, slots([], 2), meeting)
    assert sorted(ended) == sorted(DIAMOND)
    for key, needed in DIAMOND.items():
        for other in needed:
            assert meeting.ended.index(other) < meeting.begun.index(key)
    assert (ended[0], ended[-1]) == ("top", "bottom")


def test_what_can_be_done_side_by_side_is() -> None:
    meeting = Meeting("left", "right")
    join = in_the_background(DIAMOND, slots([], 2), meeting)
    meeting.wait_for("left", "right")  # neither ends before the other has begun
    assert "bottom" not in meeting.begun
    meeting.let_go()
    assert len(join()) == 4


def test_as_many_stages_run_at_once_as_there_are_slots_whatever_the_cores() -> None:
    names = [f"stage_{n}" for n in range(40)]
    meeting = Meeting(*names)
    join = in_the_background({name: [] for name in names}, slots([], 40), meeting)
    try:
        meeting.wait_for(*names)
    finally:
        meeting.let_go()
    assert len(join()) == 40


def test_one_slot_does_one_thing_at_a_time() -> None:
    meeting = Meeting()
    run({key: [] for key in "abcdef"}, slots([], 1), meeting)
    assert all(beside == set() for beside in meeting.beside.values())


def test_the_longest_chain_goes_first() -> None:
    needs = {"short": [], "test_1": [], "first": [], "second": ["first"], "third": ["second"], "test_2": []}
    meeting = Meeting()
    run(needs, slots([], 1), meeting)
    assert meeting.begun[:2] == ["first", "second"]
    assert run({}, slots([], 1), meeting) == []


def test_a_stage_is_known_to_have_ended_while_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "TICK_S", 3 * PATIENCE_S)  # at once, and not at the next tick
    meeting = Meeting("slow")
    needs: dict[str, list[str]] = {"slow": [], "quick": []}
    ends = schedule.run(stages_of(needs), needs, slots([], 2), meeting)
    assert next(ends) == "quick"
    assert "slow" not in meeting.ended
    meeting.let_go()
    assert list(ends) == ["slow"]


def test_somebody_is_told_about_once_a_tick_while_work_goes_on() -> None:
    ticks = []
    meeting = Meeting("a")

    def tick() -> None:
        ticks.append(time.monotonic())
        if len(ticks) == 3:
            meeting.let_go()

    list(schedule.run(stages_of({"a": []}), {"a": []}, slots([], 1), meeting, tick))
    assert len(ticks) >= 3
    assert ticks[2] - ticks[0] > 0.05


# --- slots ---


def test_each_gpu_has_a_stage_of_its_own_and_the_cpu_one_beside() -> None:
    needs: dict[str, list[str]] = {"a": [], "b": [], "c": [], "merge": [], "merge_too": []}
    on_cpu = {"merge": {"device": "cpu"}, "merge_too": {"device": "cpu"}}
    meeting = Meeting("a", "b", "merge")
    join = in_the_background(needs, slots(["4", "7"], 3), meeting, **on_cpu)
    meeting.wait_for("a", "b", "merge")
    time.sleep(0.15)
    assert sorted(meeting.begun) == ["a", "b", "merge"]  # the third and the second merge find no slot
    seen = {key: meeting.environments[key]["CUDA_VISIBLE_DEVICES"] for key in meeting.begun}
    assert sorted([seen["a"], seen["b"]]) == ["4", "7"]
    assert seen["merge"] == ""
    meeting.let_go()
    assert sorted(join()) == sorted(needs)
    assert meeting.environments["c"]["CUDA_VISIBLE_DEVICES"] in ("4", "7")
    assert meeting.environments["merge_too"]["CUDA_VISIBLE_DEVICES"] == ""


def test_what_a_stage_is_told_does_not_depend_on_what_runs_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    crowd, alone = Meeting(), Meeting()
    run({key: [] for key in "abc"}, slots(["0"], 1), crowd)
    run({"a": []}, slots(["0"], 1), alone)
    assert crowd.environments["a"] == crowd.environments["c"] == alone.environments["a"]
    assert alone.environments["a"] == {"OMP_NUM_THREADS": "6", "MKL_NUM_THREADS": "6", "CUDA_VISIBLE_DEVICES": "0"}


def test_a_wide_stage_has_all_gpus_and_nothing_beside_it_on_one() -> None:
    needs: dict[str, list[str]] = {"a": [], "wide": [], "b": [], "c": []}
    meeting = Meeting()
    run(needs, slots(["0", "1"], 1), meeting, wide={"wide": True})
    assert meeting.environments["wide"]["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert meeting.beside["wide"] == set()


def test_a_wide_stage_without_gpus_has_all_jobs() -> None:
    needs: dict[str, list[str]] = {"a": [], "wide": [], "b": []}
    meeting = Meeting()
    run(needs, slots([], 2), meeting, wide={"wide": True})
    assert meeting.beside["wide"] == set()


def test_narrow_stages_do_not_keep_a_wide_one_waiting_for_ever() -> None:
    needs = {
        "slow": [],
        "first": [],
        "wide": ["first"],
        **{f"narrow_{n}": ["first"] for n in range(4)},
        "after": ["wide"],
    }
    meeting = Meeting("slow")
    join = in_the_background(needs, slots(["0", "1"], 1), meeting, wide={"wide": True})
    meeting.wait_for("slow", "first")
    time.sleep(0.15)  # one GPU is free, and narrow ones would fit
    assert meeting.begun[2:] == []
    meeting.let_go()
    assert len(join()) == len(needs)
    assert meeting.begun[2] == "wide"


def test_narrow_stages_do_not_keep_one_waiting_that_takes_all_cores() -> None:
    needs: dict[str, list[str]] = {
        "slow": [],
        "first": [],
        "trains": ["first"],
        "narrow": ["first"],
        "after": ["trains"],
    }
    meeting = Meeting("slow")
    join = in_the_background(needs, slots([], 2), meeting, trains={"whole_cpu": True})
    meeting.wait_for("slow", "first")
    time.sleep(0.15)
    assert meeting.begun[2:] == []
    meeting.let_go()
    join()
    assert meeting.begun[2] == "trains"


def test_the_cpu_does_not_wait_for_a_wide_stage_that_waits_for_gpus() -> None:
    needs = {"slow": [], "first": [], "wide": ["first"], "merge": ["first"], "after": ["wide"]}
    meeting = Meeting("slow")
    join = in_the_background(needs, slots(["0", "1"], 1), meeting, wide={"wide": True}, merge={"device": "cpu"})
    try:
        meeting.wait_for("slow", "first", "merge")
    finally:
        meeting.let_go()
        join()


# --- another process is at it ---


def test_a_stage_that_another_process_works_on_is_asked_for_again_and_the_others_go_on() -> None:
    asked: list[tuple[str, float]] = []

    def work(key: str, environment: dict[str, str]) -> bool:
        asked.append((key, time.monotonic()))
        return key != "elsewhere" or sum(name == key for name, _ in asked) == 3

    needs = {"elsewhere": [], "reads_it": ["elsewhere"], "other": [], "another": ["other"]}
    ended = run(needs, slots([], 1), work)
    assert sorted(ended) == sorted(needs)
    names = [name for name, _ in asked]
    assert names.count("elsewhere") == 3
    assert names.index("another") < len(names) - 1 - names[::-1].index("elsewhere")
    times = [at for name, at in asked if name == "elsewhere"]
    assert all(later - sooner >= schedule.RETRY_S for sooner, later in pairwise(times))


def test_a_stage_of_another_process_is_asked_for_again_long_before_the_next_tick(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(schedule, "TICK_S", 3 * PATIENCE_S)
    meeting, tries = Meeting("slow"), []

    def work(key: str, environment: dict[str, str]) -> bool:
        if key == "slow":
            return meeting(key, environment)
        tries.append(key)
        if len(tries) == 3:
            meeting.let_go()
        return len(tries) == 3

    assert sorted(run({"slow": [], "elsewhere": []}, slots([], 2), work)) == ["elsewhere", "slow"]
    assert len(tries) == 3


def test_a_slot_is_free_while_another_process_works() -> None:
    tries = []

    def work(key: str, environment: dict[str, str]) -> bool:
        if key == "elsewhere":
            tries.append(key)
            return len(tries) > 2
        return True

    assert run({"elsewhere": [], "other": []}, slots([], 1), work) == ["other", "elsewhere"]


# --- how it ends ---


def test_the_first_failure_is_raised_once_those_beside_it_ended_and_nothing_begins_after_it() -> None:
    meeting = Meeting("beside")

    def work(key: str, environment: dict[str, str]) -> bool:
        if key == "fails":
            meeting.wait_for("beside")
            threading.Timer(0.2, meeting.let_go).start()
            raise StageError("broke")
        return meeting(key, environment)

    needs: dict[str, list[str]] = {"fails": [], "beside": [], "later": [], "after": ["beside"]}
    ended: list[str] = []
    with pytest.raises(StageError, match="broke"):
        ended.extend(schedule.run(stages_of(needs), needs, slots([], 2), work))
    assert meeting.ended == meeting.begun == ["beside"]
    assert ended == ["beside"]  # it is done, and is published


def test_of_several_failures_the_first_is_raised() -> None:
    second = threading.Event()

    def work(key: str, environment: dict[str, str]) -> bool:
        if key == "one":
            threading.Timer(0.1, second.set).start()
        else:
            assert second.wait(PATIENCE_S)
        raise LoopError(key)

    with pytest.raises(LoopError, match=r"^one$"):
        run({"one": [], "two": []}, slots([], 2), work)


def test_a_mistake_in_the_work_is_not_hidden() -> None:
    def work(key: str, environment: dict[str, str]) -> bool:
        raise ZeroDivisionError(key)

    with pytest.raises(ZeroDivisionError):
        run({"a": [], "b": ["a"]}, slots([], 1), work)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def held() -> Iterator[Meeting]:
    """Two stages that do not end by themselves, and a quick one."""
    meeting = Meeting("held", "also")
    yield meeting
    meeting.let_go()


NEEDS: dict[str, list[str]] = {"held": [], "also": [], "quick": ["also"]}


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_leaves_at_once_though_work_goes_on(held: Meeting) -> None:
    def tick() -> None:
        held.wait_for("held", "also")
        interrupt()

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(schedule.run(stages_of(NEEDS), NEEDS, slots([], 2), held, tick))
    assert time.monotonic() - begun < PATIENCE_S / 2
    assert held.ended == []  # ending them is the caller's


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_while_an_end_is_looked_at_leaves_at_once_too(held: Meeting) -> None:
    def look(ends: Iterator[str]) -> None:
        for _ in ends:
            interrupt()

    held.gates["also"].set()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        look(schedule.run(stages_of(NEEDS), NEEDS, slots([], 2), held))
    assert time.monotonic() - begun < PATIENCE_S / 2
    assert "held" not in held.ended


@pytest.mark.usefixtures("ctrl_c")
def test_nothing_begins_after_ctrl_c(held: Meeting) -> None:
    def tick() -> None:
        held.wait_for("held", "also")
        threading.Timer(0.1, held.let_go).start()
        interrupt()

    with pytest.raises(KeyboardInterrupt):
        list(schedule.run(stages_of(NEEDS), NEEDS, slots([], 2), held, tick))
    time.sleep(0.3)
    assert sorted(held.ended) == sorted(held.begun) == ["also", "held"]


# --- whatever the graph ---


@st.composite
def graphs(draw: st.DrawFn) -> tuple[dict[str, list[str]], dict[str, dict[str, Any]], list[Slot]]:
    names = [f"stage_{number}" for number in range(draw(st.integers(0, 9)))]
    needs = {
        name: draw(st.lists(st.sampled_from(names[:place]), unique=True, max_size=3)) if place else []
        for place, name in enumerate(names)
    }
    order = draw(st.permutations(names))
    device = st.sampled_from(["gpu", "cpu"])
    unlike = {name: {"device": draw(device), "wide": draw(st.booleans())} for name in names}
    free = slots([str(number) for number in range(draw(st.integers(0, 3)))], draw(st.integers(1, 3)))
    return {name: needs[name] for name in order}, unlike, free


@settings(max_examples=50)
@given(graphs(), st.sets(st.integers(0, 9), max_size=2))
def test_every_stage_is_done_once_after_its_needs_and_on_slots_of_its_own(
    graph: tuple[dict[str, list[str]], dict[str, dict[str, Any]], list[Slot]], elsewhere: set[int]
) -> None:
    needs, unlike, free = graph
    meeting = Meeting()
    busy = {f"stage_{number}" for number in elsewhere}

    def work(key: str, environment: dict[str, str]) -> bool:
        if key in busy:
            busy.discard(key)  # another process is at it, once
            return False
        return meeting(key, environment)

    ended = run(needs, free, work, **unlike)
    assert sorted(ended) == sorted(needs)
    assert sorted(meeting.begun) == sorted(needs)
    for key, needed in needs.items():
        assert all(meeting.ended.index(other) < meeting.begun.index(key) for other in needed)
    gpus = any(slot.device == "gpu" for slot in free)
    for key, beside in meeting.beside.items():
        mine = meeting.environments[key].get("CUDA_VISIBLE_DEVICES", "")
        on_gpu = gpus and unlike[key]["device"] == "gpu"
        assert bool(mine) == on_gpu
        if on_gpu:
            for other in beside:
                theirs = meeting.environments[other].get("CUDA_VISIBLE_DEVICES", "")
                assert not set(mine.split(",")) & set(theirs.split(","))
        if unlike[key]["wide"]:
            assert all(gpus and unlike[other]["device"] != unlike[key]["device"] for other in beside)


def test_what_takes_all_cores_takes_one_gpu_where_there_are_some() -> None:
    trains = toy("x", whole_cpu=True)
    on_cpu, on_gpu = slots([], 2), slots(["0", "1"], 2)
    assert fitting(trains, on_cpu, on_cpu) == on_cpu
    assert fitting(trains, on_cpu[:1], on_cpu) == []
    assert [slot.name for slot in fitting(trains, on_gpu, on_gpu)] == ["gpu:0"]
