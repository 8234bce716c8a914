"""A run's figures as trackers have them: TensorBoard's files here, the others in processes of their own."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from made_runs import a_run, row
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from harness import loop, trackers
from harness.config import LoopConfig, load, read_recipes, recipes_folder
from harness.errors import LoopError
from harness.loop import Published
from harness.view import View

LINE = "thinkswitch-42"
ROWS = [
    {**row(iteration, who, "sums", correct), "arm": "thinkswitch", "seed": 42}
    for iteration, who, correct in (
        (0, "instruct", 60),
        (0, "thinking", 180),
        (1, "instruct", 100),
        (2, "instruct", 120),
    )
]
ACCURACY = "eval/sums/instruct/accuracy"


@pytest.fixture
def make(shipped: LoopConfig, tmp_path: Path) -> Callable[..., tuple[trackers.Trackers, list[str]]]:
    """Trackers of a run in the test's folder, and what they say."""

    def make(*names: str, **recipe: Any) -> tuple[trackers.Trackers, list[str]]:
        said: list[str] = []
        config = shipped.model_copy(update={"report_to": list(names)})
        return trackers.Trackers(config, tmp_path, {"distill": {"learning_rate": 1e-3, **recipe}}, said.append), said

    return make


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    """The points of a figure as TensorBoard reads them."""
    read = EventAccumulator(str(folder))
    read.Reload()
    return [(event.step, pytest.approx(event.value)) for event in read.Scalars(name)]  # type: ignore[misc]


def test_figures_are_results_by_iteration() -> None:
    found = trackers.figures([*ROWS, {**ROWS[0], "arm": "gold", "seed": 1, "t": 0.2}], 60.0, 0.5)
    assert found.keys() == {LINE, "gold-1"}
    assert found[LINE][ACCURACY] == {0: 0.3, 1: 0.5, 2: 0.6}
    assert found[LINE]["eval/sums/thinking/closed_traces"] == {0: 0.985}
    assert "eval/sums/thinking/tokens_per_answer" not in found[LINE]  # nobody counted
    assert (found[LINE]["run/wall_s"], found[LINE]["run/cost_usd"]) == ({2: 60.0}, {2: 0.5})
    assert found["gold-1"]["reconstruct/t"] == {0: 0.2}
    assert "run/wall_s" not in trackers.figures(ROWS, 0.0, None)[LINE]


def test_settings_hold_no_path_and_no_secret(shipped: LoopConfig) -> None:
    recipe = {
        "learning_rate": 1e-3,
        "hub_token": "hf_x",
        "pad_token": "x",
        "output_dir": "<<stage>>/a",
        "deepspeed": "/home/a/z.json",
    }
    found = trackers.settings(shipped, {"distill": recipe})
    assert found["distill.learning_rate"] == 1e-3
    assert (found["distill.pad_token"], found["distill.deepspeed"], found["instruct"]) == ("x", "z.json", "instruct")
    assert (found["tasks"], found["iterations"], found["nf4"]) == ("mini_math, mini_qa", 2, False)
    assert not [name for name in found if "hub_token" in name or "output_dir" in name]
    assert not [value for value in found.values() if str(value).startswith("/")]


def test_tensorboard_has_each_point_once_however_often_it_is_told(make: Any, tmp_path: Path) -> None:
    for until in (0, 1, 1, 2):
        mine, said = make("tensorboard")
        for _ in range(2):
            mine.write(trackers.figures([r for r in ROWS if r["iteration"] <= until], 0.0, None), at_end=until == 2)
        assert said == []
    folder = tmp_path / "tensorboard" / LINE
    assert scalars(folder, ACCURACY) == [(0, 0.3), (1, 0.5), (2, 0.6)]
    read = EventAccumulator(str(folder))
    read.Reload()
    assert read.PluginTagToContent("hparams").keys() == {"_hparams_/session_start_info"}


def test_one_that_was_stopped_while_it_was_told_has_each_point_once(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The events are written and the note of them is not: the disk is full, or somebody pulls the plug."""
    points = trackers.figures(ROWS, 0.0, None)
    mine, _ = make("tensorboard")

    def stops(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trackers, "_both", stops)
        with pytest.raises(KeyboardInterrupt):
            mine.write(points, at_end=True)
    folder = tmp_path / "tensorboard" / LINE
    assert scalars(folder, ACCURACY) == [(0, 0.3), (1, 0.5), (2, 0.6)]
    make("tensorboard")[0].write(points, at_end=True)
    assert scalars(folder, ACCURACY) == [(0, 0.3), (1, 0.5), (2, 0.6)]


def test_a_run_whose_figures_changed_begins_anew(make: Any, tmp_path: Path) -> None:
    make("tensorboard")[0].write(trackers.figures(ROWS, 60.0, None), at_end=True)
    changed = [{**one, "accuracy": 0.9} if one["iteration"] == 1 else one for one in ROWS]
    make("tensorboard")[0].write(trackers.figures(changed, 70.0, None), at_end=True)
    folder = tmp_path / "tensorboard" / LINE
    assert scalars(folder, ACCURACY) == [(0, 0.3), (1, 0.9), (2, 0.6)]
    assert scalars(folder, "run/wall_s") == [(2, 70.0)]
    (tmp_path / "trackers.json").write_text("{")  # a crash left half a note
    make("tensorboard")[0].write(trackers.figures(changed, 70.0, None), at_end=True)
    assert scalars(folder, ACCURACY) == [(0, 0.3), (1, 0.9), (2, 0.6)]
    shutil.rmtree(tmp_path / "tensorboard")
    make("tensorboard")[0].write(trackers.figures(changed, 70.0, None), at_end=True)
    assert scalars(folder, ACCURACY) == [(0, 0.3), (1, 0.9), (2, 0.6)]


def test_a_tracker_that_cannot_be_told_is_said_once_and_ends_nothing(make: Any, tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file is in its place")
    mine, said = make("tensorboard")
    for _ in range(3):
        mine.write(trackers.figures(ROWS, 0.0, None), at_end=False)
    (line,) = said
    assert line.startswith("tensorboard was not told how it went (")


def test_one_in_a_process_of_its_own_that_fails_is_said_with_its_log(
    make: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    mine, said = make("wandb")
    mine.write(trackers.figures(ROWS, 0.0, None), at_end=False)
    assert said == []  # it is told at the end
    mine.write(trackers.figures(ROWS, 0.0, None), at_end=True)
    (line,) = said
    assert line.startswith("wandb was not told how it went (")
    assert "trackers.log" in line
    assert "nonsense" in (tmp_path / "logs" / "trackers.log").read_text()


@pytest.mark.slow
def test_trackio_has_each_point_once(make: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for until in (1, 2):
        mine, said = make("trackio", trackio_project_name="sums")
        mine.write(trackers.figures([r for r in ROWS if r["iteration"] <= until], 60.0, None), at_end=True)
        assert said == []
    with sqlite3.connect(tmp_path / "trackio" / "sums.db") as database:
        logged = database.execute("select run_name, step, metrics from metrics order by step, id").fetchall()
    assert len({run for run, _, _ in logged}) == 1
    found = [(step, json.loads(metrics)[ACCURACY]) for _, step, metrics in logged if ACCURACY in json.loads(metrics)]
    assert found == [(0, 0.3), (1, 0.5), (2, 0.6)]


@pytest.mark.slow
def test_wandb_without_a_key_writes_files_and_asks_no_network(make: Any, tmp_path: Path, monkeypatch: Any) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    mine, said = make("wandb", wandb_project="sums")
    mine.write(trackers.figures(ROWS, 60.0, None), at_end=True)
    assert said == []
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert ACCURACY.encode() in content
    assert b"sums" in content


@pytest.mark.slow
def test_mlflow_has_each_point_once(make: Any, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    for until in (1, 2):
        mine, said = make("mlflow", mlflow_experiment_name="sums")
        mine.write(trackers.figures([r for r in ROWS if r["iteration"] <= until], 60.0, None), at_end=True)
        assert said == []
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = mlflow.search_runs(experiment_names=["sums"], output_format="list")
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, ACCURACY)
    assert [(point.step, point.value) for point in history] == [(0, 0.3), (1, 0.5), (2, 0.6)]


def test_what_is_not_installed_is_said_before_anything_runs(monkeypatch: Any) -> None:
    trackers.check(["tensorboard", "trackio", "wandb"])
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(LoopError, match="report_to: mlflow: is not installed: pip install mlflow"):
        trackers.check(["mlflow"])


@pytest.mark.parametrize(
    ("said", "names"), [("none", []), ("wandb", ["wandb"]), ("[tensorboard, trackio]", ["tensorboard", "trackio"])]
)
def test_report_to_in_loop_yml(said: str, names: list[str]) -> None:
    assert load(recipes_folder() / "loop.yml", {}).report_to == ["tensorboard"]
    assert load(recipes_folder() / "loop.yml", {}, [f"report_to={said}"]).report_to == names
    with pytest.raises(LoopError, match="report_to"):
        load(recipes_folder() / "loop.yml", {}, ["report_to=[comet]"])


def test_a_run_is_published_to_them(shipped: LoopConfig, tmp_path: Path) -> None:
    run = a_run(shipped, tmp_path)
    run.folder.note(steps=[])
    published = Published(run, View(quiet=True), [])
    assert published.trackers.settings["distill.learning_rate"] == 2e-3
    assert published.trackers.settings["reconstruct.parameters.t"] == 0.1


def test_where_a_trainer_reports_to_names_no_other_stage(shipped: LoopConfig, tmp_path: Path) -> None:
    recipes = read_recipes(shipped)
    more = {"use_tensorboard": True, "wandb_project": "sums"}
    runs = [
        a_run(shipped, tmp_path, recipes={**recipes, "distill": {**recipes["distill"], **added}})
        for added in ({}, more)
    ]
    keys = [[run.keys[step.stage] for step in run.steps] for run in runs]
    assert keys[0] == keys[1]
    stage = next(step.stage for step in runs[1].steps if step.name == "distill")
    loop.write_recipes(runs[1], stage)
    written = yaml.safe_load((runs[1].store.folder(runs[1].keys[stage]) / "recipe.yml").read_text())
    assert more.items() <= written.items()
    runs[1].folder.note(steps=[])
    published = Published(runs[1], View(quiet=True), [])
    assert trackers.told(published.trackers.recipe, "wandb") == {"project": "sums"}
    assert trackers.told(published.trackers.recipe, "trackio") == {"project": "thinkswitch"}


def test_the_command_imports_none_of_them() -> None:
    code = "import sys; from harness import cli, loop, trackers; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"tensorboard", "wandb", "trackio", "torch", "accelerate"} & set(loaded)
