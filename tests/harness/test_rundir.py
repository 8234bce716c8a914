"""The run directory: what is marked is done, what is not never happened."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from harness.errors import LoopError
from harness.rundir import RunDir, combine, digest, digests


def break_off(run: RunDir, folder: Path) -> None:
    with run.working(folder):
        (folder / "log.txt").write_text("so far")
        raise ValueError("broke")


def test_a_stage_is_done_only_once_its_body_ended(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    folder = run.stage(1, "distill")
    with pytest.raises(ValueError, match="broke"):
        break_off(run, folder)
    assert run.finished(folder) is None
    assert (folder / "log.txt").read_text() == "so far"  # to look at
    with run.working(folder) as facts:
        assert not (folder / "log.txt").exists()  # begun anew
        (folder / "out").mkdir()
        (folder / "out" / "weights").write_bytes(b"w")
        facts["wall_s"] = 1.5
    done = run.finished(folder)
    assert done is not None
    assert done["wall_s"] == 1.5
    assert done["outputs"] == {"out/weights": digest(folder / "out" / "weights")}


def test_a_fingerprint_is_of_the_content_wherever_it_comes_from(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    folder = run.stage(1, "distill")
    with run.working(folder):
        (folder / "instruct").mkdir()
        (folder / "instruct" / "a").write_bytes(b"1")
        (folder / "log.txt").write_text("not part of it")
    elsewhere = tmp_path / "copy"
    elsewhere.mkdir()
    (elsewhere / "a").write_bytes(b"1")
    assert run.fingerprint(folder / "instruct") == run.fingerprint(elsewhere) == combine(digests(elsewhere))
    (elsewhere / "a").write_bytes(b"2")
    assert digest(elsewhere) != run.fingerprint(folder / "instruct")


def test_the_same_run_continues_and_another_is_refused(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    asked = {"t": 0.5, "iterations": 1, "inputs": {"instruct": "abc"}}
    assert run.open(asked) is False
    run.note(versions={"torch": "2"})
    assert run.open({**asked, "iterations": 3}) is True
    assert run.noted()["versions"] == {"torch": "2"}
    with pytest.raises(LoopError, match=r"another t \(0.5, now 0.7\)"):
        run.open({**asked, "t": 0.7})
    with pytest.raises(LoopError, match="another inputs"):
        run.open({**asked, "inputs": {"instruct": "def"}})


def test_a_damaged_record_is_reported_not_overwritten(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    (tmp_path / "run.json").write_text('{"asked": ')
    with pytest.raises(LoopError, match=r"run\.json: cannot be read"):
        run.open({})
    assert (tmp_path / "run.json").read_text() == '{"asked": '


@pytest.mark.parametrize(
    ("number", "says"), [(errno.ENOSPC, "no disk space left"), (errno.EROFS, "choose another folder by --out")]
)
def test_a_full_or_closed_disk_costs_nothing_already_done(tmp_path: Path, number: int, says: str) -> None:
    run = RunDir(tmp_path)
    with run.working(run.stage(0, "evaluate")):
        pass
    with pytest.raises(LoopError, match=says), run.working(run.stage(1, "generate")):
        raise OSError(number, "refused")
    assert run.finished(run.stage(0, "evaluate")) is not None
    assert run.finished(run.stage(1, "generate")) is None


def test_json_is_replaced_in_one_step(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.open({"t": 0.5})
    assert json.loads((tmp_path / "run.json").read_text())["asked"] == {"t": 0.5}
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]
