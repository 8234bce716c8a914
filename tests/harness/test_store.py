"""The store: what is marked is done, what is not never happened, and one process at a time works on a stage."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from made_runs import finished, watched

from harness.errors import LoopError, StageError
from harness.files import digest
from harness.store import Known, Store, link, stamp

KEY = "distill-0a1b"


# --- done, or never happened ---


def test_a_finished_stage_has_its_record_and_every_file_in_it(store: Store) -> None:
    folder = finished(store, KEY, {"log.txt": b"said", "instruct/model.safetensors": b"w"}, wall_s=1.5)
    record = store.record(KEY)
    assert record is not None
    assert record["key"] == KEY
    assert record["wall_s"] == 1.5
    assert record["outputs"] == {
        "log.txt": [4, digest(folder / "log.txt")],
        "instruct/model.safetensors": [1, digest(folder / "instruct/model.safetensors")],
    }


def test_another_process_reads_the_same_record(store: Store) -> None:
    finished(store, KEY, {"log.txt": b"said"})
    assert Store(store.root).record(KEY) == store.record(KEY)


def test_a_stage_that_was_begun_and_not_finished_never_happened(store: Store) -> None:
    assert store.record(KEY) is None
    (store.clear(KEY) / "log.txt").write_text("so far")
    assert store.record(KEY) is None
    assert store.every() == [KEY]


def test_a_marker_that_the_disk_does_not_give_is_no_reason_to_begin_anew(store: Store) -> None:
    """It may be whole, and hours of work with it."""
    marker = finished(store, KEY, {"log.txt": b"said"}) / "stage.json"
    marker.unlink()
    marker.symlink_to("/proc/self/mem")  # whose first byte is an input/output error
    with pytest.raises(StageError, match=r"stage.json: cannot be read \(Input/output error\)\nsee what is wrong"):
        store.record(KEY)


def change_key(folder: Path) -> None:
    marker = json.loads((folder / "stage.json").read_text())
    (folder / "stage.json").write_text(json.dumps({**marker, "key": "distill-ffff"}))


def halve_marker(folder: Path) -> None:
    whole = (folder / "stage.json").read_bytes()
    (folder / "stage.json").write_bytes(whole[: len(whole) // 2])


def empty_marker(folder: Path) -> None:
    (folder / "stage.json").write_text("")


def change_marker(folder: Path) -> None:
    marker = (folder / "stage.json").read_text()
    (folder / "stage.json").write_text(marker.replace('"made_by": "test"', '"made_by": "tes"'))


def take_digest(folder: Path) -> None:
    marker = json.loads((folder / "stage.json").read_text())
    del marker["digest"]
    (folder / "stage.json").write_text(json.dumps(marker))


def other_value(folder: Path) -> None:
    (folder / "stage.json").write_text("[]")


def take_output(folder: Path) -> None:
    (folder / "answers/x.jsonl").unlink()


def grow_output(folder: Path) -> None:
    with (folder / "answers/x.jsonl").open("a") as file:
        file.write("more")


def truncate_output(folder: Path) -> None:
    (folder / "answers/x.jsonl").write_bytes(b"")


@pytest.mark.parametrize(
    "harm",
    [
        change_key,
        change_marker,
        take_digest,
        halve_marker,
        empty_marker,
        other_value,
        take_output,
        grow_output,
        truncate_output,
    ],
)
def test_what_is_not_there_as_it_was_left_does_not_count(store: Store, harm: Callable[[Path], None]) -> None:
    folder = finished(store, KEY, {"answers/x.jsonl": b"{}\n"})
    assert store.record(KEY)
    harm(folder)
    assert store.record(KEY) is None
    output = harm in (take_output, grow_output, truncate_output)
    assert store.damaged(KEY) == ["answers/x.jsonl" if output else "stage.json"]


def test_a_marker_with_its_lines_in_another_order_is_the_same(store: Store) -> None:
    folder = finished(store, KEY, {"b": b"1", "a": b"2"})
    was = store.record(KEY)
    marker = json.loads((folder / "stage.json").read_text())
    (folder / "stage.json").write_text(json.dumps(dict(sorted(marker.items(), reverse=True))))
    assert store.record(KEY) == was is not None


def test_a_fact_that_json_has_no_word_for_is_kept_as_its_text(store: Store, tmp_path: Path) -> None:
    finished(store, KEY, {}, facts={"from": tmp_path})
    assert (store.record(KEY) or {})["facts"] == {"from": str(tmp_path)}


def test_a_stage_s_mark_is_another_after_another_making(store: Store) -> None:
    assert store.mark(KEY) is None
    finished(store, KEY, {"log.txt": b"said"}, wall_s=1.0)
    first = store.mark(KEY)
    assert first == Store(store.root).mark(KEY) == digest(store.folder(KEY) / "stage.json")
    finished(store, KEY, {"log.txt": b"said"}, wall_s=2.0)
    assert store.mark(KEY) != first


def test_a_stage_under_another_s_name_does_not_count(store: Store) -> None:
    folder = finished(store, KEY, {"log.txt": b"said"})
    shutil.copytree(folder, store.folder("distill-ffff"))
    assert store.record("distill-ffff") is None


def test_a_stage_that_is_forgotten_never_happened_and_is_still_there_to_look_at(store: Store) -> None:
    folder = finished(store, KEY, {"log.txt": b"said"})
    store.forget(KEY)
    assert store.record(KEY) is None
    assert (folder / "log.txt").read_bytes() == b"said"
    store.forget(KEY)
    store.forget("distill-ffff")


def test_a_cleared_folder_keeps_what_can_be_gone_on_from(store: Store) -> None:
    folder = store.clear(KEY)
    for name in ("a/b/kept", "a/b/also", "a/c/lost", "a/lost", "kept.jsonl", "lost.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "stage.json").write_text("{}")
    (folder / "link").symlink_to(folder / "a")
    store.clear(KEY, [folder / "a/b", folder / "kept.jsonl", folder / "is not there"])
    left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    assert left == ["a", "a/b", "a/b/also", "a/b/kept", "kept.jsonl"]


def test_a_cleared_folder_is_empty_and_marked_by_nothing(store: Store) -> None:
    folder = finished(store, KEY, {"deep/er/x": b"1"})
    assert store.clear(KEY) == folder
    assert os.listdir(folder) == []


def test_only_stages_are_listed(store: Store) -> None:
    assert store.every() == []
    for key in ("evaluate-02", "distill-01"):
        finished(store, key, {})
    with store.writing("distill-01"):
        store.hold("distill-01").touch()
        Known(store.root / ".known.json").save()
        assert store.every() == ["distill-01", "evaluate-02"]


def test_a_root_that_cannot_be_made_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(LoopError, match="choose another folder by --out"), Store(tmp_path / "out").writing(KEY):
        pytest.fail("there is no folder to write in")


# --- on the disk before it is marked ---


def test_everything_is_on_the_disk_before_the_marker_is(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = store.clear(KEY)
    for name in ("recipe.yml", "answers/x.jsonl", "adapter/deep/er/model.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    seen = watched(monkeypatch)
    store.finish(KEY, {"facts": {}})
    (marked,) = [number for number, (what, _) in enumerate(seen) if what == "replace"]
    beside, marker = seen[marked][1].split(" → ")
    assert marker == str(folder / "stage.json")
    before = {path for _, path in seen[:marked]}
    everything = [str(path) for path in folder.rglob("*") if path.name != "stage.json"]
    assert {*everything, str(folder), str(store.root), beside} - before == set()
    assert ("sync", str(folder)) in seen[marked:]  # and then its own name


def test_a_marker_says_nothing_of_itself(store: Store) -> None:
    folder = finished(store, KEY, {"log.txt": b"said"})
    assert sorted(os.listdir(folder)) == ["log.txt", "stage.json"]
    assert set(store.record(KEY)["outputs"]) == {"log.txt"}  # type: ignore[index]


@pytest.mark.parametrize("bit", [0, 7, 8 * 4999 + 3])
def test_one_flipped_bit_is_found(store: Store, bit: int) -> None:
    folder = finished(store, KEY, {"a/weights": bytes(5000), "a/config.json": b"{}"})
    assert store.damaged(KEY) == []
    content = bytearray(5000)
    content[bit // 8] ^= 1 << (bit % 8)
    (folder / "a/weights").write_bytes(content)
    assert store.record(KEY) is not None  # by its size nobody can tell
    assert store.damaged(KEY) == ["a/weights"]


def test_a_part_of_a_stage_is_looked_at_alone(store: Store) -> None:
    folder = finished(store, KEY, {"a/x": b"1", "ab/x": b"3"})
    for name in ("a/x", "ab/x"):
        (folder / name).write_bytes(b"2")
    assert store.damaged(KEY, "a") == ["a/x"]
    assert store.damaged(KEY, "a/x") == ["a/x"]
    assert store.damaged(KEY) == ["a/x", "ab/x"]


def test_what_never_happened_is_not_damaged(store: Store) -> None:
    assert store.damaged(KEY) == []
    store.clear(KEY)
    assert store.damaged(KEY) == []


def test_a_stage_is_what_it_left_but_what_is_to_go(store: Store) -> None:
    folder = store.clear(KEY)
    for name in ("a/state", "b/deep/state", "c.txt", "log.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    store.finish(KEY, {}, [folder / "a", folder / "c.txt"])
    assert sorted((store.record(KEY) or {})["outputs"]) == ["b/deep/state", "log.txt"]


def test_a_stage_s_place_that_is_a_file_is_refused_in_words(store: Store) -> None:
    store.root.mkdir(parents=True, exist_ok=True)
    store.folder(KEY).touch()
    with pytest.raises(LoopError, match="choose another folder by --out"):
        store.clear(KEY)


def refused(monkeypatch: pytest.MonkeyPatch, name: str, number: int, when: Callable[[], bool] = lambda: True) -> None:
    """Have a call of `os` fail as a disk does, while `when` holds."""
    real = getattr(os, name)

    def call(*given: Any, **named: Any) -> Any:
        if when():
            raise OSError(number, os.strerror(number))
        return real(*given, **named)

    monkeypatch.setattr(os, name, call)


def test_a_full_disk_is_told_with_its_place(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = store.clear(KEY)
    (folder / "log.txt").write_text("said")
    refused(monkeypatch, "fsync", errno.ENOSPC)
    with pytest.raises(StageError, match=f"no disk space left while writing {folder}"):
        store.finish(KEY, {})
    assert store.record(KEY) is None


# --- one at a time ---


def hold_stage(root: Path, key: str, said: Connection) -> None:
    with Store(root).writing(key) as folder:
        said.send(folder)
        time.sleep(60)


def hold_busy(root: Path, key: str, said: Connection) -> None:
    lock = Store(root).hold(key)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        said.send(None)
        time.sleep(60)


@pytest.fixture
def other_process(store: Store) -> Iterator[Callable[[Callable[..., None]], Any]]:
    """Start a process that holds something of the stage KEY; it is there when this returns."""
    context = multiprocessing.get_context("fork")
    started = []

    def start(hold: Callable[..., None]) -> Any:
        ours, theirs = context.Pipe()
        process = context.Process(target=hold, args=(store.root, KEY, theirs), daemon=True)
        process.start()
        started.append(process)
        assert ours.poll(20)
        ours.recv()
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def test_one_process_at_a_time_works_on_a_stage(store: Store, other_process: Callable[..., Any]) -> None:
    other_process(hold_stage)
    with store.writing(KEY) as folder:
        assert folder is None
    assert store.busy(KEY)
    with store.writing("distill-ffff") as folder:  # another stage is nobody's
        assert folder == store.folder("distill-ffff")
    assert not store.busy("distill-ffff")


def test_a_stage_is_free_once_its_worker_is_killed(store: Store, other_process: Callable[..., Any]) -> None:
    worker = other_process(hold_stage)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    assert not store.busy(KEY)
    with store.writing(KEY) as folder:
        assert folder == store.folder(KEY)
        assert store.busy(KEY)
    assert not store.busy(KEY)


def test_a_stage_is_free_once_its_work_failed(store: Store) -> None:
    with pytest.raises(ValueError, match="broke"), store.writing(KEY):
        raise ValueError("broke")
    assert not store.busy(KEY)


def test_a_stage_waits_for_what_a_killed_worker_left_running(store: Store, other_process: Callable[..., Any]) -> None:
    left = other_process(hold_busy)
    with store.writing(KEY) as folder:
        assert folder is None
    os.kill(left.pid, signal.SIGKILL)
    left.join()
    with store.writing(KEY) as folder:
        assert folder == store.folder(KEY)


# --- giving space back ---


def test_a_pruned_stage_still_counts_and_lacks_its_checkpoint(store: Store) -> None:
    files = {"instruct/model.safetensors": bytes(1000), "instruct/config.json": b"{}", "adapter/model": b"small"}
    folder = finished(store, KEY, files, checkpoint="instruct")
    assert not store.lacks(KEY)
    assert store.prune(KEY, "instruct") == 1002
    assert not (folder / "instruct").exists()
    assert (folder / "adapter/model").read_bytes() == b"small"
    assert store.record(KEY) is not None
    assert store.lacks(KEY)
    assert store.damaged(KEY) == []
    assert store.prune(KEY, "instruct") == 0
    assert store.lacks(KEY)


def test_what_is_left_of_a_pruned_stage_must_still_be_there(store: Store) -> None:
    folder = finished(store, KEY, {"instruct/w": b"1", "adapter/w": b"2"})
    store.prune(KEY, "instruct")
    (folder / "adapter/w").unlink()
    assert store.record(KEY) is None
    assert not store.lacks(KEY)  # what never happened lacks nothing


def test_a_crash_while_pruning_leaves_a_stage_that_lacks_its_checkpoint(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished(store, KEY, {"instruct/w": b"1", "instruct/x": b"2", "log.txt": b""})

    def crash(_: Path) -> None:
        (folder / "instruct/w").unlink()
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", crash)
        with pytest.raises(SystemExit):
            store.prune(KEY, "instruct")
    assert store.record(KEY) is not None
    assert store.lacks(KEY)
    store.prune(KEY, "instruct")
    assert not (folder / "instruct").exists()


def test_a_stage_that_a_process_works_on_is_not_pruned(store: Store, other_process: Callable[..., Any]) -> None:
    folder = finished(store, KEY, {"instruct/w": b"1"})
    other_process(hold_stage)
    assert store.prune(KEY, "instruct") == 0
    assert (folder / "instruct/w").read_bytes() == b"1"


def test_on_a_full_disk_the_largest_file_makes_room_for_the_marker(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"instruct/a": 10, "instruct/weights": 1000, "instruct/z": 20, "log.txt": 2000}
    folder = finished(store, KEY, {name: bytes(size) for name, size in sizes.items()})
    refused(monkeypatch, "fsync", errno.ENOSPC, (folder / "instruct/weights").exists)
    assert store.prune(KEY, "instruct") == 1030
    assert store.lacks(KEY)
    assert store.damaged(KEY) == []
    assert sorted(os.listdir(folder)) == ["log.txt", "stage.json"]


def test_a_disk_that_fails_while_pruning_takes_nothing_away(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = finished(store, KEY, {"instruct/w": b"1"})
    refused(monkeypatch, "fsync", errno.EIO)
    with pytest.raises(StageError, match=f"^{folder}: Input/output error"):
        store.prune(KEY, "instruct")
    assert (folder / "instruct/w").read_bytes() == b"1"
    assert not store.lacks(KEY)


def test_a_disk_that_fails_while_a_stage_is_removed_is_told_with_its_place(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished(store, KEY, {"instruct/w": b"1"})
    refused(monkeypatch, "rmdir", errno.EIO)
    with pytest.raises(StageError, match=f"^{folder}.*: Input/output error"):
        store.remove(KEY)
    assert store.record(KEY) is None


def test_a_removed_stage_is_gone_with_its_bytes_counted(store: Store) -> None:
    folder = finished(store, KEY, {"instruct/w": bytes(1000)})
    marker = (folder / "stage.json").stat().st_size
    assert store.remove(KEY) == 1000 + marker
    assert not folder.exists()
    assert store.remove(KEY) == 0


def test_a_stage_that_a_process_works_on_is_not_removed(store: Store, other_process: Callable[..., Any]) -> None:
    folder = finished(store, KEY, {"instruct/w": b"1"})
    other_process(hold_stage)
    assert store.remove(KEY) == 0
    assert (folder / "instruct/w").read_bytes() == b"1"


# --- what a checkpoint is ---


class Counting(Known):
    """Known, with what it read."""

    def __init__(self, file: Path):
        self.reads: list[str] = []
        self.told: list[tuple[str, int, int]] = []
        super().__init__(file, self.read)

    def read(self, name: str, done: int, size: int) -> None:
        self.reads.append(name)
        self.told.append((name, done, size))


WHOLE = {
    "config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 10,
    "tokenizer.json": b"[]",
    "chat_template.jinja": b"{{ messages }}",
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The files of one; what is in them does not matter here."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name, content in WHOLE.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Where digests are kept."""
    return tmp_path / "stages" / ".known.json"


def test_a_checkpoint_is_the_same_wherever_it_lies(checkpoint: Path, cache: Path, tmp_path: Path) -> None:
    elsewhere = Path(shutil.copytree(checkpoint, tmp_path / "of another name"))
    (tmp_path / "linked").symlink_to(elsewhere)
    known = Known(cache)
    assert known.checkpoint(checkpoint) == known.checkpoint(elsewhere) == known.checkpoint(tmp_path / "linked")


@pytest.mark.parametrize(
    "name", [".DS_Store", "README.md", "LICENSE", "optimizer.pt", "._config.json", "._model.safetensors"]
)
def test_what_no_loader_reads_changes_nothing(checkpoint: Path, cache: Path, name: str) -> None:
    known = Known(cache)
    before, stamped = known.checkpoint(checkpoint), stamp(checkpoint)
    (checkpoint / name).write_bytes(b"droppings")
    (checkpoint / "original").mkdir()
    (checkpoint / "original" / "model.safetensors").write_bytes(b"another format")
    assert known.checkpoint(checkpoint) == before
    assert stamp(checkpoint) == stamped


@pytest.mark.parametrize("name", list(WHOLE))
def test_one_changed_byte_is_another_checkpoint(checkpoint: Path, cache: Path, name: str) -> None:
    before = Known(cache).checkpoint(checkpoint)
    content = bytearray(WHOLE[name])
    content[-1] ^= 1
    (checkpoint / name).write_bytes(content)
    assert Known(cache).checkpoint(checkpoint) != before


@pytest.mark.parametrize("name", ["generation_config.json", "vocab.txt", "model-00002-of-00002.safetensors"])
def test_one_more_file_that_a_loader_reads_is_another_checkpoint(checkpoint: Path, cache: Path, name: str) -> None:
    before = Known(cache).checkpoint(checkpoint)
    (checkpoint / name).write_bytes(b"")
    assert Known(cache).checkpoint(checkpoint) != before


def test_files_that_change_places_are_another_checkpoint(checkpoint: Path, cache: Path) -> None:
    before = Known(cache).checkpoint(checkpoint)
    (checkpoint / "config.json").write_bytes(WHOLE["tokenizer.json"])
    (checkpoint / "tokenizer.json").write_bytes(WHOLE["config.json"])
    assert Known(cache).checkpoint(checkpoint) != before


def test_what_did_not_change_is_not_read_again(checkpoint: Path, cache: Path) -> None:
    first = Counting(cache)
    value = first.checkpoint(checkpoint)
    assert sorted(first.told) == sorted((name, len(content), len(content)) for name, content in WHOLE.items())
    assert first.checkpoint(checkpoint) == value
    first.save()
    assert len(first.reads) == len(WHOLE)
    later = Counting(cache)
    assert later.checkpoint(checkpoint) == value
    assert later.reads == []


def test_a_rewrite_of_the_same_size_is_read_again(checkpoint: Path, cache: Path) -> None:
    first = Counting(cache)
    before = first.checkpoint(checkpoint)
    first.save()
    weights = checkpoint / "model.safetensors"
    stat = weights.stat()
    weights.write_bytes(bytes(reversed(WHOLE["model.safetensors"])))
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))  # whatever the clock's resolution
    later = Counting(cache)
    assert later.checkpoint(checkpoint) != before
    assert later.reads == ["model.safetensors"]


def test_another_file_in_its_place_with_its_size_and_time_is_read_again(checkpoint: Path, cache: Path) -> None:
    known = Counting(cache)
    before = known.checkpoint(checkpoint)
    weights, other = checkpoint / "model.safetensors", checkpoint / "other"
    other.write_bytes(bytes(reversed(WHOLE["model.safetensors"])))
    stat = weights.stat()
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(other, weights)
    assert known.checkpoint(checkpoint) != before


@pytest.mark.parametrize("content", [b"", b'{"/x": [', b"[]", b"\xff", b"null"])
def test_a_cache_that_cannot_be_read_only_costs_time(checkpoint: Path, cache: Path, content: bytes) -> None:
    first = Counting(cache)
    value = first.checkpoint(checkpoint)
    cache.parent.mkdir(exist_ok=True)
    cache.write_bytes(content)
    later = Counting(cache)
    assert later.checkpoint(checkpoint) == value
    assert sorted(later.reads) == sorted(WHOLE)
    later.save()
    assert Counting(cache).checkpoint(checkpoint) == value


def test_digests_are_kept_in_a_folder_that_is_not_there_yet(checkpoint: Path, tmp_path: Path) -> None:
    known = Known(tmp_path / "out/stages/.known.json")
    value = known.checkpoint(checkpoint)
    known.save()
    later = Counting(known.file)
    assert later.checkpoint(checkpoint) == value
    assert later.reads == []


def test_without_room_for_digests_they_are_not_kept(
    checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Known(cache)
    known.checkpoint(checkpoint)
    refused(monkeypatch, "replace", errno.ENOSPC)
    known.save()
    assert os.listdir(cache.parent) == []


def test_a_place_for_digests_that_cannot_be_used_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(LoopError, match="choose another folder by --out"):
        Known(tmp_path / "out/.known.json").save()


@pytest.mark.parametrize("kept", [None, [], "x", [1, 2, 3], [1, 2, 3, 4, 5], {}])
def test_an_entry_of_another_shape_is_read_again(checkpoint: Path, cache: Path, kept: object) -> None:
    value = Known(cache).checkpoint(checkpoint)
    cache.parent.mkdir(exist_ok=True)
    cache.write_text(json.dumps({str(checkpoint / name): kept for name in WHOLE}))
    assert Known(cache).checkpoint(checkpoint) == value


def test_all_is_read_again_when_it_is_told_to_forget(checkpoint: Path, cache: Path) -> None:
    known = Counting(cache)
    known.checkpoint(checkpoint)
    known.forget()
    known.checkpoint(checkpoint)
    assert len(known.reads) == 2 * len(WHOLE)


def test_a_path_is_a_file_s_content_or_all_that_is_below_a_folder(tmp_path: Path, cache: Path) -> None:
    known = Known(cache)
    (tmp_path / "data/deep").mkdir(parents=True)
    (tmp_path / "data/deep/a.txt").write_text("1")
    assert known.path(tmp_path / "data/deep/a.txt") == digest(tmp_path / "data/deep/a.txt")
    before = known.path(tmp_path / "data")
    assert Known(cache).path(Path(shutil.copytree(tmp_path / "data", tmp_path / "copy"))) == before
    (tmp_path / "data/README.md").write_text("data too")
    assert known.path(tmp_path / "data") != before


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json", "tokenizer_config.json"])
def test_a_folder_with_what_a_loader_looks_for_is_a_checkpoint(tmp_path: Path, cache: Path, name: str) -> None:
    known = Known(cache)
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / name).write_text("{}")
    before, stamped = known.path(tmp_path / "it"), stamp(tmp_path / "it")
    assert before == known.checkpoint(tmp_path / "it")
    (tmp_path / "it/README.md").write_text("what no loader reads")
    assert known.path(tmp_path / "it") == before
    assert stamp(tmp_path / "it") == stamped


def test_a_stamp_of_data_is_of_all_that_is_below_and_of_its_names(tmp_path: Path) -> None:
    (tmp_path / "data/deep").mkdir(parents=True)
    (tmp_path / "data/deep/README.md").write_text("data too")
    first = stamp(tmp_path / "data")
    (tmp_path / "data/deep/README.md").rename(tmp_path / "data/deep/other")
    second = stamp(tmp_path / "data")
    (tmp_path / "data/deep/other").write_text("other data")
    assert len({first, second, stamp(tmp_path / "data")}) == 3


def test_a_stamp_changes_with_every_write(checkpoint: Path) -> None:
    file = checkpoint / "config.json"
    folder, single = stamp(checkpoint), stamp(file)
    assert (stamp(checkpoint), stamp(file)) == (folder, single)
    stat = file.stat()
    file.write_bytes(b"[]")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert stamp(checkpoint) != folder
    assert stamp(file) != single


# --- links ---


def test_a_link_is_relative_and_holds_when_the_whole_folder_moves(tmp_path: Path) -> None:
    (tmp_path / "out/stages/distill-01").mkdir(parents=True)
    (tmp_path / "out/stages/distill-01/log.txt").write_text("said")
    link(tmp_path / "out/run/iter_01/distill", tmp_path / "out/stages/distill-01")
    assert os.readlink(tmp_path / "out/run/iter_01/distill") == "../../stages/distill-01"
    (tmp_path / "out").rename(tmp_path / "moved")
    assert (tmp_path / "moved/run/iter_01/distill/log.txt").read_text() == "said"


def test_a_link_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "iter_01/distill"
    for key in ("distill-01", "distill-02"):
        (tmp_path / key).mkdir()
    link(place, tmp_path / "distill-01")
    replace, seen = os.replace, []

    def look(source: Path, target: Path) -> None:
        seen.append(os.readlink(target))
        replace(source, target)
        seen.append(os.readlink(target))

    monkeypatch.setattr(os, "replace", look)
    link(place, tmp_path / "distill-02")
    assert seen == ["../distill-01", "../distill-02"]
    link(place, tmp_path / "distill-02")
    assert len(seen) == 2  # there already
    assert os.listdir(place.parent) == ["distill"]


@pytest.mark.parametrize("times", [1, 2])
def test_a_link_s_folder_may_go_once_while_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Another run of the name takes the folder away, as it is empty; twice is no run."""
    place, real, left = tmp_path / "run/iter_01", os.symlink, [None] * times

    def go(*given: Any, **named: Any) -> None:
        if left:
            left.pop()
            place.parent.rmdir()
        real(*given, **named)

    (tmp_path / "stage").mkdir()
    monkeypatch.setattr(os, "symlink", go)
    with pytest.raises(FileNotFoundError) if times > 1 else nullcontext():
        link(place, tmp_path / "stage")
    assert place.is_symlink() == (times == 1)
