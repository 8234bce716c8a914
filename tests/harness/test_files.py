"""Files that a crash cannot halve, and what is said when the disk refuses."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from made_runs import watched

from harness import files
from harness.errors import LoopError, StageError

OLD, NEW = {"value": "old" * 20_000}, {"value": "new" * 30_000}


# --- JSON in one step ---


def test_what_is_written_is_read_again_and_a_person_can_read_it_too(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    files.write_json(file, {"t": 0.1, "iterations": [1, None], "name": "é → ü", "path": Path("/a/b")})
    assert files.read_json(file) == {"t": 0.1, "iterations": [1, None], "name": "é → ü", "path": "/a/b"}
    text = file.read_text(encoding="utf-8")
    assert "é → ü" in text
    assert text.endswith("}\n")
    assert len(text.splitlines()) > 5


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    files.write_json(file, OLD)
    enough, seen, wrong = threading.Event(), [0], []

    def read() -> None:
        while not enough.is_set():
            try:
                value = json.loads(file.read_text())
            except (OSError, ValueError) as error:
                wrong.append(str(error))
                break
            if value not in (OLD, NEW):
                wrong.append("a mixture")
            seen[0] += 1

    reader = threading.Thread(target=read)
    reader.start()
    try:
        written = 0
        while not wrong and (written < 100 or (seen[0] < 20 and reader.is_alive())):
            files.write_json(file, NEW if written % 2 else OLD)
            written += 1
    finally:
        enough.set()
        reader.join()
    assert wrong == []


def refuse(*_: object) -> None:
    raise OSError(errno.EIO, "refused")


def test_a_file_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_json(tmp_path / "x.json", OLD)
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="refused"):
        files.write_json(tmp_path / "x.json", NEW)
    assert files.read_json(tmp_path / "x.json") == OLD


def test_what_could_not_be_written_leaves_nothing_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="refused"):
        files.write_json(tmp_path / "x.json", NEW)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("moment", "by"),
    [
        ("os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)", signal.SIGKILL),
        # The kernel ends it in the middle of the writing, at the 999th byte.
        ("signal.signal(signal.SIGXFSZ, signal.SIG_DFL); resource.setrlimit(RLIMIT_FSIZE, (999, 999))", signal.SIGXFSZ),
    ],
    ids=["before it is in place", "half written"],
)
def test_a_crash_leaves_the_old_file_whole_and_the_next_write_goes_through(
    tmp_path: Path, moment: str, by: signal.Signals
) -> None:
    file = tmp_path / "x.json"
    files.write_json(file, OLD)
    code = (
        "import os, resource, signal, sys\n"
        "from pathlib import Path\n"
        "from resource import RLIMIT_FSIZE\n"
        "from harness import files\n"
        f"{moment}\n"
        "files.write_json(Path(sys.argv[1]), {'value': 'new' * 30_000})\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, check=False)
    assert ended.returncode == -by, ended.stderr
    assert files.read_json(file) == OLD
    files.write_json(file, NEW)
    assert files.read_json(file) == NEW


def test_durable_is_on_the_disk_before_it_is_in_place_and_its_place_is_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watched(monkeypatch)
    files.write_json(tmp_path / "x.json", NEW, durable=True)
    (first, beside), (second, change), (third, folder) = seen
    assert (first, second, third) == ("sync", "replace", "sync")
    assert change == f"{beside} → {tmp_path / 'x.json'}"
    assert folder == str(tmp_path)


def test_what_need_not_be_durable_waits_for_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watched(monkeypatch)
    files.write_json(tmp_path / "x.json", NEW)
    assert [what for what, _ in seen] == ["replace"]


# --- reading ---


def test_a_missing_file_has_no_value(tmp_path: Path) -> None:
    assert files.read_json(tmp_path / "none.json") is None


@pytest.mark.parametrize("content", [b"", b'{"asked": ', b"\xff\xfe", b"[1, 2"])
def test_a_broken_file_is_reported_and_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "run.json"
    file.write_bytes(content)
    with pytest.raises(LoopError, match="cannot be read") as caught:
        files.read_json(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert file.read_bytes() == content


@pytest.mark.parametrize("size", [0, 1, files.CHUNK_BYTES, files.CHUNK_BYTES + 1])
def test_a_digest_is_sha256_whatever_the_size(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "x").write_bytes(content)
    assert files.digest(tmp_path / "x") == hashlib.sha256(content).hexdigest()


def test_below_a_folder_are_its_files_in_order_at_any_depth(tmp_path: Path) -> None:
    for name in ("b/c/deep", "a", "b/file", ".hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    assert [str(path.relative_to(tmp_path)) for path in files.below(tmp_path)] == [".hidden", "a", "b/c/deep", "b/file"]


# --- refusals ---


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_fails_the_stage_and_says_how_to_go_on(number: int) -> None:
    said = r"^no disk space left while writing /out\n.*run the same command again"
    with pytest.raises(StageError, match=said), files.disk_errors(Path("/out")):
        raise OSError(number, "refused")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST])
def test_a_folder_that_cannot_be_written_is_refused_with_the_option_that_helps(number: int) -> None:
    said = r"^/out: cannot be written \(refused\); .* --out$"
    with pytest.raises(LoopError, match=said) as caught, files.disk_errors(Path("/out")):
        raise OSError(number, "refused")
    assert not isinstance(caught.value, StageError)


def test_a_real_refusal_is_one_of_them(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LoopError, match="cannot be written"), files.disk_errors(tmp_path):
        (tmp_path / "file" / "below").mkdir()


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt()])
def test_what_the_disk_did_not_refuse_stays_what_it_is(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, files.disk_errors(Path("/out")):
        raise error
    assert caught.value is error


def test_a_broken_disk_is_named_and_the_run_goes_on_once_it_is_mended() -> None:
    said = r"^/out: broken disk\nsee what is wrong with its disk, then run the same command again: it continues$"
    with pytest.raises(StageError, match=said), files.disk_errors(Path("/out")):
        raise OSError(errno.EIO, "broken disk")
    with pytest.raises(StageError, match=r"^/out/deep/file: broken disk\n"), files.disk_errors(Path("/out")):
        raise OSError(errno.EIO, "broken disk", "/out/deep/file")


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC])
def test_a_refusal_elsewhere_names_that_place_and_no_option_of_ours(number: int) -> None:
    with pytest.raises(LoopError, match="/home/hub/blobs") as caught, files.disk_errors(Path("/out")):
        raise OSError(number, "refused", "/home/hub/blobs")
    assert "/out" not in str(caught.value)
    assert "--" not in str(caught.value)
    assert "run the same command again" in str(caught.value)


def test_a_folder_that_another_option_names_is_chosen_by_that() -> None:
    with pytest.raises(LoopError, match=r" --to$"), files.disk_errors(Path("/there"), "--to"):
        raise OSError(errno.EACCES, "refused", "/there/config.json")


@pytest.mark.parametrize("read", [files.digest, files.read_json, files.read_json_if_whole])
def test_what_a_disk_does_not_give_is_a_line_and_nobody_is_told_to_remove_it(
    tmp_path: Path, read: Callable[[Path], object]
) -> None:
    (tmp_path / "run.json").symlink_to("/proc/self/mem")  # whose first byte is an input/output error
    said = r"^.*run.json: cannot be read \(Input/output error\)\nsee what is wrong with its disk, then run the same"
    with pytest.raises(StageError, match=said):
        read(tmp_path / "run.json")


def test_what_is_not_whole_can_be_taken_for_none(tmp_path: Path) -> None:
    (tmp_path / "half.json").write_text('{"a": ')
    assert files.read_json_if_whole(tmp_path / "half.json") is None
    assert files.read_json_if_whole(tmp_path / "none.json") is None
    (tmp_path / "half.json").write_text('{"a": 1}')
    assert files.read_json_if_whole(tmp_path / "half.json") == {"a": 1}


def test_json_nested_too_deep_is_not_whole(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(LoopError, match="cannot be read"):
        files.read_json(tmp_path / "deep.json")
    assert files.read_json_if_whole(tmp_path / "deep.json") is None
