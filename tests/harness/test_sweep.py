"""Many runs as one plan: which there are, what they share, and what one that fails costs the others."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from small import run_here, small_loop

from harness import sweep
from harness.errors import LoopError, StageError
from harness.runner import LocalRunner
from harness.sweep import SweepConfig, combinations, names
from harness.view import View


def written(folder: Path, **said: Any) -> Path:
    (folder / "sweep.yml").write_text(yaml.safe_dump(said))
    return folder / "sweep.yml"


def test_a_grid_is_every_combination_and_runs_come_after() -> None:
    asked = SweepConfig(name="s", grid={"seed": [0, 1], "distill.learning_rate": [1e-3, 2e-3]}, runs=[{"t": 0.3}])
    every = combinations(asked)
    assert every == [
        {"seed": 0, "distill.learning_rate": 0.001},
        {"seed": 0, "distill.learning_rate": 0.002},
        {"seed": 1, "distill.learning_rate": 0.001},
        {"seed": 1, "distill.learning_rate": 0.002},
        {"t": 0.3},
    ]
    assert names(asked, every) == [
        "s-seed0-learning_rate0.001",
        "s-seed0-learning_rate0.002",
        "s-seed1-learning_rate0.001",
        "s-seed1-learning_rate0.002",
        "s-t0.3",
    ]


def test_names_are_told_apart_and_are_names_of_folders() -> None:
    asked = SweepConfig(
        name="s", runs=[{"generate.gen_kwargs": {"a": "/x y"}}, {"a.t": 1}, {"b.t": 1}, {"t": "x" * 300}]
    )
    found = names(asked, combinations(asked))
    assert len(set(found)) == 4
    for name in found:
        assert SweepConfig(name=name[:60]).name == name[:60]
        assert len(name) < 120


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ({}, "has no runs"),
        ({"grid": {}}, "has no runs"),
        ({"grid": {"seed": []}}, "grid: seed: has no values"),
        ({"grid": {"seed": 3}}, "grid.seed: "),
        ({"grids": {"seed": [3]}}, "grids: "),
        ({"name": "../x", "grid": {"seed": [1]}}, "name: "),
        ({"grid": {"seed": [1, 1]}}, "twice"),
        ({"grid": {"a": list(range(101)), "b": list(range(101))}}, "has 10201 runs, more than 10000"),
        ({"grid": {"seed": [1]}, "config": "none.yml"}, "sweep-seed1: .*none.yml: no such file"),
        ({"grid": {"sed": [1]}}, "sweep-sed1: --set sed: "),
        ({"grid": {"t": [2]}}, "sweep-t2: --set t: .*must be from 0"),
    ],
)
def test_a_sweep_that_is_none(tmp_path: Path, said: dict[str, Any], error: str) -> None:
    with pytest.raises(LoopError, match=error):
        sweep.prepare(written(tmp_path, **said), tmp_path / "runs", View(quiet=True))
    assert not (tmp_path / "runs/stages").exists()


def swept(file: Path, out: Path, runner: LocalRunner) -> tuple[list[sweep.Came], str, int]:
    """What each run came to, what was said, and how many stages the plan had."""
    console = Console(file=io.StringIO(), width=200, highlight=False)
    view = View(console)
    asked, planned = sweep.prepare(file, out, view)
    todo = len(sweep.together(planned))
    return sweep.go(asked, planned, out, view, runner), console.file.getvalue(), todo  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_sweep_comes_to_what_its_runs_do_and_what_they_share_is_done_once(
    recipes: Path, tmp_path: Path, runner: LocalRunner
) -> None:
    config = small_loop(recipes, tmp_path / "mine", limit=8)
    file = written(tmp_path, name="s", config=str(config), grid={"t": [0.3, 0.6]})
    found, said, todo = swept(file, tmp_path / "runs", runner)
    assert todo == 9, "two of seven stages are not shared"
    assert "2 runs have 9 stages, 5 more are shared, 0 are done" in said
    for one, t in zip(found, ("0.3", "0.6"), strict=True):
        alone = run_here(config, tmp_path / f"alone{t}", runner, (f"t={t}",))
        assert one.rows == alone.results["rows"]
        kept = json.loads((tmp_path / "runs" / one.name / "results.json").read_text())
        assert kept["rows"] == one.rows
        assert kept["verdict"] == alone.results["verdict"]
    again, said, todo = swept(file, tmp_path / "runs", runner)
    assert (todo, again) == (0, found)


@pytest.mark.slow
def test_a_run_that_fails_costs_the_others_nothing(recipes: Path, tmp_path: Path, runner: LocalRunner) -> None:
    config = small_loop(recipes, tmp_path / "mine", limit=8)
    file = written(
        tmp_path,
        config=str(config),
        runs=[{"distill.sequence_len": 2}, {"t": 0.3}, {"generate.model_args.dtype": "none_such"}],
    )
    found, said, _ = swept(file, tmp_path / "runs", runner)
    assert [bool(one.failed) for one in found] == [True, False, True]
    assert said.count("\nfailed: iteration 1, ") == 2
    assert len(found[1].rows) == 4
    assert [row["iteration"] for row in found[0].rows] == [0, 0], "what does not read it was done"
    with pytest.raises(StageError, match="2 of 3 runs failed, the first: sweep-sequence_len2: "):
        sweep.check(found)
    assert "failed" in [line[1] for line in sweep.table_rows(found)]


@pytest.mark.slow
def test_a_recipe_that_its_tool_refuses_ends_a_sweep_before_anything_runs(
    recipes: Path, tmp_path: Path, runner: LocalRunner
) -> None:
    config = small_loop(recipes, tmp_path / "mine", limit=8)
    file = written(tmp_path, config=str(config), runs=[{"t": 0.3}, {"reconstruct.dtype": "none_such"}])
    with pytest.raises(LoopError, match=r"mergekit refuses it: .*none_such"):
        swept(file, tmp_path / "runs", runner)
    assert not list((tmp_path / "runs/stages").glob("*/stage.json"))
