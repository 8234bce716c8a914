"""What a folder of runs says of itself, and what is taken away of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from made_runs import finished

from harness.errors import LoopError
from harness.files import below, write_json
from harness.records import collect, log_of, read_run, runs
from harness.rundir import RunDir
from harness.store import Store

WEIGHTS = bytes(1000)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder of runs; its store is that of the fixture `store`."""
    return tmp_path


def step(iteration: int, name: str, key: str) -> dict[str, Any]:
    return {"iteration": iteration, "name": name, "checkpoint": "", "key": key, "reads": {}}


def noted(out: Path, name: str, *steps: dict[str, Any], age: float = 0.0) -> RunDir:
    """A run that was asked for so many seconds ago."""
    run = RunDir(out / name)
    run.note(steps=list(steps))
    then = (run.root / "run.json").stat().st_mtime - age
    os.utime(run.root / "run.json", (then, then))
    return run


def learnt(store: Store, key: str, log: str = "", age: float = 0.0) -> Path:
    """A finished distillation: a checkpoint, the adapter it was merged from, and a log."""
    files = {"instruct/model.safetensors": WEIGHTS, "adapter/adapter_model.safetensors": b"small", "log.txt": b""}
    folder = finished(store, key, {**files, "log.txt": log.encode()}, checkpoint="instruct")
    then = (folder / "log.txt").stat().st_mtime - age
    os.utime(folder / "log.txt", (then, then))
    return folder


# --- runs ---


def test_runs_are_the_folders_that_hold_one_the_newest_last(out: Path, store: Store) -> None:
    assert runs(out) == []
    assert runs(out / "none") == []
    noted(out, "a_newer", age=10)
    noted(out, "b_older", age=20)
    noted(out, "c_newest")
    (out / "not a run").mkdir()
    finished(store, "distill-01", {})
    assert runs(out) == ["b_older", "a_newer", "c_newest"]


def test_a_run_says_how_far_each_step_is(out: Path, store: Store) -> None:
    finished(store, "evaluate-01", {})
    keys = {(0, "evaluate_instruct"): "evaluate-01", (1, "generate"): "generate-01", (1, "distill"): "distill-01"}
    run = noted(out, "mini", *[step(k, name, key) for (k, name), key in keys.items()])
    rows = [
        {"iteration": 0, "checkpoint": "instruct", "task": "mini_math", "accuracy": 0.35},
        {"iteration": 1, "checkpoint": "instruct", "task": "mini_math", "accuracy": 0.605},
        {"iteration": 1, "checkpoint": "thinking", "task": "mini_math", "accuracy": 0.9},
    ]
    write_json(run.results, {"rows": rows})
    run.note(sittings={"a": 60.0, "b": 5.0})
    with store.writing("generate-01"):
        seen = read_run(out, "mini")
    assert [(s["iteration"], s["name"], s["state"]) for s in seen.steps] == [
        (0, "evaluate_instruct", "done"),
        (1, "generate", "running"),
        (1, "distill", "waiting"),
    ]
    assert seen.done == 1
    assert seen.now == "iter_01/generate"
    assert seen.clock == "1 min 05 s"
    assert seen.scores == "mini_math 60.5%"
    assert seen.as_json() == {"name": "mini", "done": 1, "steps": seen.steps, "wall_s": 65.0, "rows": rows}
    assert read_run(out, "mini").now == ""


def test_a_run_that_has_not_begun_has_no_scores(out: Path, store: Store) -> None:
    noted(out, "mini", step(0, "evaluate_instruct", "evaluate-01"))
    seen = read_run(out, "mini")
    assert (seen.done, seen.now, seen.scores, seen.clock) == (0, "", "", "0 s")


def test_a_run_that_is_not_there_is_answered_with_those_that_are(out: Path, store: Store) -> None:
    with pytest.raises(LoopError, match=r"no such run; there are none in "):
        read_run(out, "mini")
    noted(out, "mini")
    with pytest.raises(LoopError, match=r"/mine: no such run; there are mini in "):
        read_run(out, "mine")


# --- logs ---


def test_the_log_to_read_is_of_what_runs_or_else_the_last_written_one(out: Path, store: Store) -> None:
    learnt(store, "distill-01", age=30)
    learnt(store, "distill-02", age=20)
    (store.clear("generate-03") / "log.txt").touch()
    os.utime(store.folder("generate-03") / "log.txt", (1, 1))
    steps = [(1, "distill", "distill-01"), (2, "distill", "distill-02"), (3, "generate", "generate-03")]
    noted(out, "mini", *[step(*each) for each in steps])
    assert log_of(out, None, None) == store.folder("distill-02") / "log.txt"
    with store.writing("generate-03"):
        assert log_of(out, "mini", None) == store.folder("generate-03") / "log.txt"
    assert log_of(out, "mini", "distill") == store.folder("distill-02") / "log.txt"
    assert log_of(out, "mini", "iter_01/distill") == store.folder("distill-01") / "log.txt"


def test_without_a_name_the_newest_run_is_meant(out: Path, store: Store) -> None:
    learnt(store, "distill-01")
    learnt(store, "distill-02", age=30)
    noted(out, "older", step(1, "distill", "distill-01"), age=20)
    noted(out, "newer", step(1, "distill", "distill-02"))
    assert log_of(out, None, None) == store.folder("distill-02") / "log.txt"
    assert log_of(out, "older", None) == store.folder("distill-01") / "log.txt"


def test_no_log_is_a_line(out: Path, store: Store) -> None:
    with pytest.raises(LoopError, match=r"^no runs in "):
        log_of(out, None, None)
    noted(out, "mini", step(1, "distill", "distill-01"))
    with pytest.raises(LoopError, match=r"^mini: no log of any stage yet$"):
        log_of(out, None, None)
    with pytest.raises(LoopError, match=r"^mini: no log of iter_09/distill yet$"):
        log_of(out, "mini", "iter_09/distill")


# --- giving space back ---


@pytest.fixture
def full(out: Path, store: Store) -> dict[str, Path]:
    """Two runs that share their first iteration, a stage of neither, and one that never finished; by key."""
    folders = {key: learnt(store, key) for key in ("distill-01", "distill-02", "distill-03", "distill-99")}
    finished(store, "evaluate-01", {"answers/x.jsonl": b"{}"})
    (store.clear("generate-98") / "log.txt").write_text("so far")
    first = step(1, "distill", "distill-01"), step(1, "evaluate_instruct", "evaluate-01")
    noted(out, "long", *first, step(2, "distill", "distill-02"), step(3, "distill", "distill-03"))
    noted(out, "short", *first)
    return folders


def everything(out: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in below(out) if ".lock" not in path.name}


def test_what_no_run_refers_to_goes_and_what_never_finished(out: Path, store: Store, full: dict[str, Path]) -> None:
    sizes = {key: sum(path.stat().st_size for path in below(store.folder(key))) for key in store.every()}
    gone = dict(collect(out, "all"))
    assert gone == {
        "distill-99: not referred to by any run": sizes["distill-99"],
        "generate-98: not referred to by any run": sizes["generate-98"],
    }
    assert store.every() == ["distill-01", "distill-02", "distill-03", "evaluate-01"]
    assert not any(store.lacks(key) for key in store.every())
    assert collect(out, "all") == []


def test_a_stage_of_a_run_that_never_finished_goes_too(out: Path, store: Store) -> None:
    (store.clear("distill-01") / "log.txt").write_text("so far")
    noted(out, "mini", step(1, "distill", "distill-01"))
    assert collect(out, "all") == [("distill-01: never finished", 6)]
    assert store.every() == []


def test_of_a_stage_that_never_finished_stays_what_it_goes_on_from(out: Path, store: Store) -> None:
    folder = store.clear("generate-01")
    (folder / "recipe.0.answered.jsonl").write_text("kept")
    (folder / "begun.json").write_text("{}")
    (folder / "log.txt").write_text("so far")
    noted(out, "mini", step(1, "generate", "generate-01"))
    said = [("generate-01: what it does not go on from", 8)]
    assert collect(out, "last", dry_run=True) == said
    assert (folder / "log.txt").exists()
    assert collect(out, "last") == said
    assert sorted(path.name for path in folder.iterdir()) == ["begun.json", "recipe.0.answered.jsonl"]


def test_only_the_last_iteration_of_each_run_keeps_its_checkpoint(
    out: Path, store: Store, full: dict[str, Path]
) -> None:
    gone = [what for what, size in collect(out, "last") if size == len(WEIGHTS)]
    # The first is the short run's last.
    assert gone == ["distill-02/instruct"]
    assert store.lacks("distill-02")
    assert (full["distill-02"] / "adapter/adapter_model.safetensors").is_file()
    assert not any(store.lacks(key) for key in ("distill-01", "distill-03"))


def test_of_what_t_was_chosen_from_the_chosen_checkpoint_alone_is_kept(out: Path, store: Store) -> None:
    rebuilt = {f"reconstruct_t{t}": f"reconstruct-{t}" for t in ("0.1", "0.2")}
    for key in (*rebuilt.values(), "choose-1"):
        finished(store, key, {"thinking/model.safetensors": WEIGHTS}, checkpoint="thinking")
    noted(out, "auto", *(step(1, *named) for named in rebuilt.items()), step(1, "choose", "choose-1"))
    assert [what for what, _ in collect(out, "last")] == [f"{key}/thinking" for key in rebuilt.values()]
    assert not store.lacks("choose-1")


def test_adapters_alone_are_enough_to_make_the_rest_again(out: Path, store: Store, full: dict[str, Path]) -> None:
    gone = [what for what, size in collect(out, "adapters") if size == len(WEIGHTS)]
    assert gone == ["distill-01/instruct", "distill-02/instruct", "distill-03/instruct"]
    for key in ("distill-01", "distill-02", "distill-03", "evaluate-01"):
        assert store.record(key) is not None
    assert (store.folder("evaluate-01") / "answers/x.jsonl").is_file()
    assert collect(out, "adapters") == []


@pytest.mark.parametrize("keep", ["all", "last", "adapters"])
def test_a_dry_run_says_the_same_and_takes_nothing(out: Path, store: Store, full: dict[str, Path], keep: str) -> None:
    before = everything(out)
    said = collect(out, keep, dry_run=True)
    assert everything(out) == before
    assert collect(out, keep) == said


def test_a_stage_that_a_process_works_on_is_left_alone(out: Path, store: Store, full: dict[str, Path]) -> None:
    with store.writing("distill-99"), store.writing("distill-02"):
        said = [what for what, _ in collect(out, "adapters")]
    assert not [what for what in said if what.startswith(("distill-99", "distill-02"))]
    assert store.record("distill-99")
    assert not store.lacks("distill-02")


@pytest.mark.parametrize("content", ['{"steps": ', "[]", "{}", '{"asked": {}}'])
@pytest.mark.parametrize("keep", ["all", "adapters"])
def test_a_run_that_cannot_be_read_stops_it_before_anything_is_gone(
    out: Path, store: Store, full: dict[str, Path], content: str, keep: str
) -> None:
    (out / "broken").mkdir()
    (out / "broken/run.json").write_text(content)
    before = everything(out)
    with pytest.raises(LoopError):
        collect(out, keep)
    assert everything(out) == before


def test_stages_of_a_run_whose_folder_is_gone_are_nobody_s(out: Path, store: Store) -> None:
    learnt(store, "distill-01")
    noted(out, "mini", step(1, "distill", "distill-01"))
    assert collect(out, "all") == []
    (out / "mini/run.json").unlink()
    assert [what for what, _ in collect(out, "all")] == ["distill-01: not referred to by any run"]


def test_nothing_at_all_is_nothing_to_take(out: Path) -> None:
    assert collect(out, "adapters") == []
