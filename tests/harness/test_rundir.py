"""One run's folder: what it notes, how long it took, why its stages are other ones, and where they are found."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from made_runs import VERSIONS, planned, task

from harness import rundir
from harness.config import LoopConfig, read_recipes
from harness.errors import LoopError
from harness.plan import Step
from harness.rundir import RunDir, why
from harness.stages import External, Keys

# --- notes ---


def test_a_run_that_never_was_has_noted_nothing(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    assert run.noted() == {}
    assert run.wall_s() == 0
    assert not run.root.exists()


def test_notes_add_up(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.note(asked={"t": 0.5}, versions={"torch": "2"})
    run.note(asked={"t": 0.7}, steps=[])
    assert RunDir(tmp_path / "run").noted() == {"steps": [], "asked": {"t": 0.7}, "versions": {"torch": "2"}}


def test_a_damaged_record_is_reported_and_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"asked": ')
    run = RunDir(tmp_path)
    for use in (run.noted, lambda: run.note(asked={})):
        with pytest.raises(LoopError, match=r"run\.json: cannot be read"):
            use()
    run.begin()  # a beat that cannot be noted ends nothing
    assert (tmp_path / "run.json").read_text() == '{"asked": '


def test_an_earlier_version_s_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    old = json.dumps({"asked": {"t": 0.1}, "versions": {}})
    (tmp_path / "run.json").write_text(old)
    with pytest.raises(LoopError, match=r"made by an earlier version.*\ngive this run another --name"):
        RunDir(tmp_path).noted()
    with pytest.raises(LoopError, match="earlier version"):
        RunDir(tmp_path).note(asked={})
    assert (tmp_path / "run.json").read_text() == old


def test_a_folder_that_cannot_be_written_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(LoopError, match="choose another folder by --out"):
        RunDir(tmp_path / "run").note(asked={})


# --- sittings ---


def test_a_look_adds_nothing(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.note(steps=[])
    before = (tmp_path / "run.json").read_bytes()
    run.tick()
    run.tick(at_once=True)
    assert run.wall_s() == 0
    assert (tmp_path / "run.json").read_bytes() == before


def test_a_sitting_lasts_from_its_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    run = RunDir(tmp_path)
    now[0] += 50  # looking at what there is
    run.begin()
    assert run.wall_s() == 0
    now[0] += 1
    run.tick()
    assert run.wall_s() == 0  # now and then is often enough
    now[0] += rundir.BEAT_S
    run.tick()
    assert run.wall_s() == 1 + rundir.BEAT_S
    now[0] += 0.25
    run.tick(at_once=True)
    assert run.wall_s() == 1.25 + rundir.BEAT_S


def test_sittings_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for lasted in (3.0, 4.0):
        run = RunDir(tmp_path)
        run.begin()
        now[0] += lasted
        run.tick(at_once=True)
        now[0] += 1000
    assert RunDir(tmp_path).wall_s() == 7


def sit(root: Path, said: Connection) -> None:
    run = RunDir(root)
    run.begin()
    while True:
        time.sleep(0.05)
        run.tick(at_once=True)
        said.send(run.wall_s())


def test_an_interrupted_sitting_is_kept(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=sit, args=(tmp_path, theirs), daemon=True)
    process.start()
    assert ours.poll(20)
    lasted = ours.recv()
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert RunDir(tmp_path).wall_s() >= lasted > 0
    again = RunDir(tmp_path)
    again.begin()
    again.tick(at_once=True)
    assert again.wall_s() > lasted
    assert len(again.noted()["sittings"]) == 2


def note_often(root: Path, name: str) -> None:
    run = RunDir(root)
    for number in range(30):
        run.note(**{name: number})


def test_two_processes_notes_do_not_overwrite_each_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    names = ["one", "two"]
    processes = [context.Process(target=note_often, args=(tmp_path, name)) for name in names]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert {name: RunDir(tmp_path).noted()[name] for name in names} == {"one": 29, "two": 29}


def test_two_sittings_at_once_do_not_overwrite_each_other(tmp_path: Path) -> None:
    """One ticks; before it has its turn to write, the other has noted its own time."""
    one, two = RunDir(tmp_path), RunDir(tmp_path)
    one.begin()
    with FileLock(tmp_path / ".run.lock"):
        ticking = threading.Thread(target=lambda: one.tick(at_once=True))
        ticking.start()
        ticking.join(0.3)  # it waits for the lock
        noted = json.loads((tmp_path / "run.json").read_text())
        noted["sittings"]["the other's"] = 60.0
        (tmp_path / "run.json").write_text(json.dumps(noted))
    ticking.join()
    assert two.noted()["sittings"]["the other's"] == 60.0
    assert len(two.noted()["sittings"]) == 2


# --- links ---


def test_a_stage_is_found_in_its_iteration_by_a_relative_link(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "runs/mini")
    for key in ("distill-01", "distill-02"):
        (tmp_path / "runs/stages" / key).mkdir(parents=True)
        (tmp_path / "runs/stages" / key / "log.txt").write_text(key)
        run.link("iter_02/distill", tmp_path / "runs/stages" / key)
    place = tmp_path / "runs/mini/iter_02/distill"
    assert os.readlink(place) == "../../stages/distill-02"
    assert (place / "log.txt").read_text() == "distill-02"
    assert os.listdir(place.parent) == ["distill"]


def test_links_of_steps_that_are_no_more_are_dropped_and_nothing_else(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "mini")
    stage = tmp_path / "stages/x-01"
    stage.mkdir(parents=True)
    (stage / "log.txt").write_text("said")
    places = ["iter_01/distill", "iter_01/generate", "iter_02/distill", "gold-1/iter_01/distill"]
    for place in places:
        run.link(place, stage)
    (tmp_path / "mini/iter_01/mine.txt").write_text("a person's own")
    run.unlink_others({"iter_01/generate"})
    assert sorted(os.listdir(tmp_path / "mini/iter_01")) == ["generate", "mine.txt"]
    assert not (tmp_path / "mini/iter_02").exists()
    assert not (tmp_path / "mini/gold-1").exists()
    assert (stage / "log.txt").read_text() == "said"


def test_a_folder_that_a_person_made_beside_the_iterations_is_left_alone(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.link("iter_01/distill", tmp_path)
    (tmp_path / "iter_01").rename(tmp_path / "iter_01_before")
    run.unlink_others(set())
    assert os.listdir(tmp_path / "iter_01_before") == ["distill"]


# --- why stages are other ones ---


def described(config: LoopConfig, versions: dict[str, str] = VERSIONS, **changes: Any) -> list[dict[str, Any]]:
    """The steps as run.json keeps them, read back from there."""
    keys = Keys(versions)

    def entry(step: Step) -> dict[str, Any]:
        reads = keys.material(step.stage)
        return {"iteration": step.iteration, "name": step.name, "key": keys[step.stage], "reads": reads}

    return json.loads(json.dumps([entry(step) for step in planned(config, **changes).values()]))


def with_setting(config: LoopConfig, recipe: str, **changed: Any) -> dict[str, Any]:
    recipes = read_recipes(config)
    return {**recipes, recipe: {**recipes[recipe], **changed}}


def test_the_same_run_again_has_no_cause(shipped: LoopConfig) -> None:
    assert why(described(shipped), described(shipped)) == []
    assert why([], described(shipped)) == []  # a new run
    assert why(described(shipped.model_copy(update={"iterations": 1})), described(shipped)) == []
    assert why(described(shipped), described(shipped.model_copy(update={"iterations": 0}))) == []


def test_a_changed_setting_is_said_once_for_all_iterations_and_not_again_downstream(shipped: LoopConfig) -> None:
    after = described(shipped, recipes=with_setting(shipped, "distill", learning_rate=0.001))
    assert why(described(shipped), after) == ["distill: learning_rate 0.002 → 0.001"]


def test_two_changes_are_two_lines(shipped: LoopConfig) -> None:
    after = described(shipped.model_copy(update={"t": 0.3}), recipes=with_setting(shipped, "distill", lora_r=8))
    assert why(described(shipped), after) == ["distill: lora_r 16 → 8", "reconstruct: parameters.t 0.1 → 0.3"]


def test_a_setting_of_every_stage_is_said_of_each(shipped: LoopConfig) -> None:
    lines = why(described(shipped), described(shipped.model_copy(update={"seed": 7})))
    assert "distill: seed 42 → 7" in lines
    assert "generate: seed.0 42 → 7" in lines
    assert not [line for line in lines if line.startswith("reconstruct")]


def test_another_setting_that_compares_equal_has_its_line_too(shipped: LoopConfig) -> None:
    after = described(shipped, recipes=with_setting(shipped, "distill", lora_dropout=0))
    before = described(shipped)
    stale = [a["name"] for a, b in zip(after, before, strict=True) if a["key"] != b["key"]]
    assert why(before, after) == (["distill: lora_dropout 0.0 → 0"] if stale else [])


def test_other_prompts_are_said_to_be_that(shipped: LoopConfig) -> None:
    own = shipped.model_copy(update={"prompts": ["/mine/p.jsonl"]})
    before, after = (described(own, prompts=[{"id": str(n), "messages": []}]) for n in (1, 2))
    assert why(before, after) == ["generate: prompts.jsonl: other prompts"]


def test_other_weights_are_said_of_all_that_read_them_as_they_came(shipped: LoopConfig) -> None:
    after = described(shipped, thinking=External("/came/thinking", "another"))
    assert why(described(shipped), after) == [
        "evaluate_thinking: checkpoint is another one",
        "generate: checkpoint is another one",
        "reconstruct: anchor is another one",
    ]


def test_another_anchor_is_another_input(shipped: LoopConfig) -> None:
    after = described(shipped.model_copy(update={"anchor": "previous"}))
    assert why(described(shipped), after) == ["reconstruct: anchor is another one"]


def test_a_stage_that_reads_more_or_less_says_so(shipped: LoopConfig) -> None:
    recipe = with_setting(shipped, "distill", on_policy_kl={"teacher": "somewhere"})
    alone, taught = described(shipped), described(shipped, recipes=recipe)
    assert "distill: reads thinking now" in why(alone, taught)
    assert "distill: reads thinking no more" in why(taught, alone)


def test_another_version_of_a_tool_is_said_with_both(shipped: LoopConfig) -> None:
    lines = why(described(shipped), described(shipped, {**VERSIONS, "mergekit": "0.1.6"}))
    assert lines == ["reconstruct: mergekit 0.1.5 → 0.1.6"]
    lines = why(described(shipped), described(shipped, {**VERSIONS, "torch": "2.14.0"}))
    assert {line.partition(": ")[2] for line in lines} == {"torch 2.13.0 → 2.14.0"}


def test_a_task_that_is_defined_otherwise_is_named(shipped: LoopConfig) -> None:
    changed = [task(shipped.tasks[0], definition="another"), *map(task, shipped.tasks[1:])]
    lines = why(described(shipped), described(shipped, test_tasks=changed))
    said = f"{shipped.tasks[0]}: its definition changed"
    assert lines == [f"evaluate_instruct: {said}", f"evaluate_thinking: {said}"]


def test_another_launcher_changes_commands_and_nothing_else(shipped: LoopConfig) -> None:
    after = described(shipped.model_copy(update={"launcher": "accelerate"}))
    assert why(described(shipped), after) == ["distill: its commands changed"]


def test_whatever_changes_a_key_has_a_cause(shipped: LoopConfig) -> None:
    before = described(shipped)
    for changes in (
        {"seed": 1},
        {"limit": 3},
        {"nf4": True},
        {"t": 0.2},
        {"tasks": ["other"]},
        {"prompts": ["a", "b"]},
    ):
        after = described(shipped.model_copy(update=changes))
        assert why(before, after), changes
        assert why(after, before), changes
