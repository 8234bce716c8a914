"""The doctor: what is wrong with a machine is said with what mends it, and a report names nobody."""

from __future__ import annotations

import getpass
import json
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st
from small import small_loop, ts_loop

from harness import doctor
from harness.card import Card
from harness.doctor import scrubbed
from harness.view import View


def test_what_is_installed_is_held_against_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {one.what: one for one in doctor.packages()}
    assert {one.state for one in found.values()} == {"ok"}
    assert f"torch {version('torch')}" in found["thinkswitch"].said
    wanted = ["click>=999", "no-such-package==1.0", "rich>=1", 'gone==1; extra == "dev"']
    monkeypatch.setattr(doctor, "requires", lambda name: wanted)
    failing = {one.what: one for one in doctor.packages() if one.state == "failing"}
    assert failing.keys() == {"click", "no-such-package"}
    assert failing["click"].mend == "pip install 'click>=999'"
    assert failing["no-such-package"].said == "not installed"


@pytest.mark.parametrize(
    ("torch", "driver", "cuda", "state"),
    [
        ("2.13.0+cpu", 12080, None, "failing"),
        ("2.13.0", 12080, "12.8", "ok"),
        ("2.13.0", 12040, "12.8", "warning"),
        ("2.13.0", 11080, "12.8", "failing"),
    ],
)
def test_a_gpu_wants_its_torch_and_its_driver(
    monkeypatch: pytest.MonkeyPatch, torch: str, driver: int, cuda: str | None, state: str
) -> None:
    """What a driver would say stands in for a GPU, which is not here."""
    import pynvml

    monkeypatch.setattr(doctor, "version", lambda name: torch)
    monkeypatch.setattr("torch.version.cuda", cuda)
    monkeypatch.setattr(doctor, "driver_says", lambda: "")
    monkeypatch.setattr(doctor.card, "at_hand", lambda: Card("one GPU", int(8e9), True, False))
    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "570.1")
    monkeypatch.setattr(pynvml, "nvmlSystemGetCudaDriverVersion", lambda: driver)
    found = list(doctor.device())
    assert found[0].state == state
    assert bool(found[0].mend) == (state != "ok")
    assert [one.what for one in found[1:]] == ([] if cuda is None else ["bfloat16"])


@pytest.mark.parametrize(("seconds", "state"), [(0, "ok"), (3600, "warning")])
def test_a_clock_that_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch, seconds: int, state: str) -> None:
    from datetime import datetime, timedelta, timezone
    from email.utils import format_datetime

    at = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=seconds))
    monkeypatch.setattr(requests, "head", lambda *_, **__: SimpleNamespace(headers={"Date": at}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert [(one.what, one.state) for one in doctor.hub()] == [("hub", "ok"), ("clock", state)]


def test_a_hub_that_does_not_answer_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise requests.ConnectionError("https://user:secret@proxy")

    monkeypatch.setattr(requests, "head", refuses)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    (found,) = doctor.hub()
    assert found.state == "warning"
    assert "secret" not in "".join(found)


def test_a_run_that_would_be_refused_is_a_finding(recipes: Path, tmp_path: Path) -> None:
    config = small_loop(recipes, tmp_path / "mine", tasks=["no_such_task"])
    (found,) = doctor.asked(config, tmp_path / "runs", View(quiet=True))
    assert (found.what, found.state) == ("loop.yml", "failing")
    assert "no_such_task" in found.said
    assert [one.state for one in doctor.asked(tmp_path / "none.yml", tmp_path, View(quiet=True))] == ["failing"]


def test_a_full_disk_is_a_warning(tmp_path: Path) -> None:
    assert doctor.disk(tmp_path / "not/yet", 0).state == "ok"
    assert doctor.disk(tmp_path, 1e18) == ("disk", "warning", doctor.disk(tmp_path).said, "another disk by --out")


@given(st.lists(st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,12}", fullmatch=True), min_size=1, max_size=5))
def test_a_report_has_no_path(parts: list[str]) -> None:
    for path in ("/" + "/".join(parts), "~/" + "/".join(parts)):
        assert scrubbed(f"{path}: no such file ({path}, '{path}')") == "PATH: no such file (PATH, …)"


def test_a_report_names_nobody() -> None:
    said = f"{getpass.getuser()}xyz/model and secret-task" if len(getpass.getuser()) > 2 else "secret-task"
    assert "secret-task" not in scrubbed(said, ["secret-task"])
    assert scrubbed("3 of 5 stages; 24 GB, torch 2.13.0+cpu") == "3 of 5 stages; 24 GB, torch 2.13.0+cpu"
    told = scrubbed("t: wrong (got 'acme/secret-4b'); see https://bob:hunter2@host/x and data/acme.jsonl")
    assert told == "t: wrong (got …); see URL and PATH"


def test_a_driver_that_does_not_answer_is_no_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    def refuses() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)

    monkeypatch.setattr(pynvml, "nvmlInit", refuses)
    (found,) = doctor.device()
    assert found.state == "failing"
    assert "does not answer" in found.said


def test_what_cannot_be_looked_at_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def breaks() -> None:
        raise RuntimeError("broken install")

    for name in ("packages", "device", "memory", "hub"):
        monkeypatch.setattr(doctor, name, breaks)
    monkeypatch.setattr(doctor, "trial", lambda view: iter([]))
    found = list(doctor.look(None, tmp_path, View(quiet=True)))
    assert [one.state for one in found] == ["failing"] * 4 + [found[4].state]
    assert found[0].said == "RuntimeError: broken install"


def test_every_name_of_a_loop_is_known_even_if_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop.yml").write_text("instruct: acme/secret-4b\nt: 7\nrecipes: {generate: g.yml}\n")
    (tmp_path / "g.yml").write_text("tasks: [acme_task]\n")
    assert {"acme/secret-4b", "acme_task", "g.yml"} <= set(doctor.names_of(tmp_path / "loop.yml"))


@pytest.mark.slow
def test_the_tools_are_tried(recipes: Path, tmp_path: Path) -> None:
    config = small_loop(recipes, tmp_path / "mine", name="confidential")
    said = ts_loop("doctor", "--json", "--config", config, "--out", tmp_path / "runs")
    found = {one["what"]: one for one in json.loads(said.stdout)["findings"]}
    assert {"evaluate", "generate", "distill", "reconstruct", "loop.yml", "disk"} <= found.keys()
    assert not [one for one in found.values() if one["state"] == "failing"]
    assert "confidential" not in said.stdout
    assert str(tmp_path) not in said.stdout
