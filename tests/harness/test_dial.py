"""The dial's values, and what it refuses; that it turns a real run is seen in `test_loop`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made_runs import a_run
from small import command_here

from harness import dial, loop
from harness.config import LoopConfig
from harness.errors import LoopError
from harness.view import View


@pytest.mark.parametrize(
    ("text", "ts"),
    [
        ("0:1:0.25", [0.0, 0.25, 0.5, 0.75, 1.0]),
        ("0:1:0.1", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        ("0.3", [0.3]),
        ("0.1,0.5,0.1", [0.1, 0.5]),
    ],
)
def test_values_of_t(text: str, ts: list[float]) -> None:
    assert dial.values(text) == ts


@pytest.mark.parametrize(
    "text", ["", "a", "0:1", "0:1:0", "1:0:0.1", "0:1:0.3", "0:1:1e-9", "0:inf:1", "1.5", "-0.1,0", "nan"]
)
def test_what_is_no_t(text: str) -> None:
    with pytest.raises(LoopError, match="--t"):
        dial.values(text)


def test_a_run_that_rebuilt_nothing_has_no_dial(
    shipped: LoopConfig, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    with pytest.raises(LoopError, match="no such run"):
        dial.prepare(tmp_path, "mine", [0.5], View(quiet=True))
    run = a_run(shipped, tmp_path)
    run.folder.note(asked=run.config.model_dump(mode="json"), steps=loop.described(run))
    with pytest.raises(LoopError, match="no iteration of it is whole yet"):
        dial.prepare(tmp_path, run.config.name, [0.5], View(quiet=True))
    assert command_here(monkeypatch, "dial", "mine", "--t", "2", "--out", tmp_path) == 2
    assert "outside 0 (thinking) to 1" in capsys.readouterr().err
