"""The whole loop through its command: real labels, real QLoRA, real merges, real scores, on the embedded pair."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from datasets import load_from_disk

from harness import loop as orchestrator
from harness.rundir import digests

TS_LOOP = str(Path(sys.executable).with_name("ts-loop"))


def small_loop(recipes: Path, folder: Path, **changes: Any) -> Path:
    """The shipped loop with its own recipes, made short: few prompts of one's own, one epoch."""
    folder.mkdir(exist_ok=True)
    for file in recipes.glob("*.yml"):
        shutil.copy(file, folder)
    for name in ("instruct_distill.yml", "on_policy_kl.yml"):
        written = yaml.safe_load((folder / name).read_text())
        (folder / name).write_text(yaml.safe_dump({**written, "num_epochs": 1, "micro_batch_size": 16}))
    questions = [json.loads(line) for line in (recipes.parent / "tasks/mini_math/prompts.jsonl").open()][:32]
    rows = [{"problem": question["question"], "answer": "0"} for question in questions]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loop = yaml.safe_load((folder / "loop.yml").read_text())
    pair = {who: str(recipes / loop[who]) for who in ("instruct", "thinking")}
    settings = {**loop, **pair, "name": "small", "prompts": ["mine.jsonl"], "tasks": ["mini_qa"], "iterations": 1}
    (folder / "loop.yml").write_text(yaml.safe_dump({**settings, **changes}))
    return folder / "loop.yml"


def ts_loop(*options: object, ok: bool = True) -> subprocess.CompletedProcess[str]:
    said = subprocess.run([TS_LOOP, *map(str, options)], capture_output=True, text=True, timeout=600, check=False)
    assert "Traceback" not in said.stderr
    assert (said.returncode == 0) == ok, said.stdout + said.stderr
    return said


@pytest.fixture(scope="module")
def finished(recipes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A run of one iteration: its folder, its loop.yml and what it printed."""
    folder = tmp_path_factory.mktemp("loop")
    config = small_loop(recipes, folder / "mine")
    said = ts_loop("--config", config, "--out", folder / "runs")
    return folder / "runs" / "small", config, said.stdout + said.stderr


def test_results_have_the_documented_schema(finished: tuple[Path, Path, str]) -> None:
    results = json.loads((finished[0] / "results.json").read_text())
    assert {"rows", "wall_s", "cost_usd"} <= set(results)
    seen = [(row["iteration"], row["checkpoint"], row["task"]) for row in results["rows"]]
    assert seen == [(k, who, "mini_qa") for k in (0, 1) for who in ("instruct", "thinking")]
    for row in results["rows"]:
        assert row["n"] >= 200
        assert row["accuracy"] == row["correct"] / row["n"]
        assert row["ci95"][0] <= row["accuracy"] <= row["ci95"][1]
        assert row["tokens_per_answer"] > 0
        assert (row["closed_traces"] > 0.9) == (row["checkpoint"] == "thinking")


def test_only_our_own_lines_reach_the_terminal(finished: tuple[Path, Path, str]) -> None:
    folder, _, printed = finished
    for noise in ("Warning", "WARNING", "it/s", "Loading weights", "dtype", "[INFO]"):
        assert noise not in printed
    assert "32 of 32 answers closed their trace" in printed
    assert "kept 32 of 32 rows" in printed
    assert str(folder / "report.html") in printed


def test_the_rebuilt_thinking_checkpoint_still_thinks(finished: tuple[Path, Path, str], recipes: Path) -> None:
    rebuilt, original = finished[0] / "iter_01/reconstruct/thinking", recipes / "mini/thinking"
    assert (rebuilt / "chat_template.jinja").read_text() == (original / "chat_template.jinja").read_text()
    ours, theirs = (json.loads((f / "generation_config.json").read_text()) for f in (rebuilt, original))
    for key in ("eos_token_id", "pad_token_id", "do_sample"):
        assert ours.get(key) == theirs.get(key)
    assert json.loads((rebuilt / "tokenizer.json").read_text()) == json.loads((original / "tokenizer.json").read_text())


def test_each_stage_notes_what_it_read_and_left(finished: tuple[Path, Path, str]) -> None:
    folder = finished[0]
    for file in folder.glob("iter_*/*/stage.json"):
        stage = json.loads(file.read_text())
        on_disk = {name: value for name, value in digests(file.parent).items() if name != "stage.json"}
        assert stage["outputs"] == on_disk
        assert stage["wall_s"] >= stage["body_s"] > 0
        assert stage["cpu_s"] > 0
        assert stage["peak_memory_mb"] > 100
        assert stage["inputs"]
    noted = json.loads((folder / "run.json").read_text())
    assert noted["asked"]["inputs"].keys() == {"instruct", "thinking", "prompts"}
    assert {"python", "axolotl", "torch", "mergekit", "lm_eval"} <= noted["versions"].keys()


def test_a_finished_run_is_shown_again_at_once_and_not_touched(finished: tuple[Path, Path, str]) -> None:
    folder, config, _ = finished
    before = {name: value for name, value in digests(folder).items() if name.startswith("iter_")}
    said = ts_loop("--config", config, "--out", folder.parent)
    assert "5 of 5 stages are done" in said.stdout
    assert {name: value for name, value in digests(folder).items() if name.startswith("iter_")} == before


def test_other_settings_under_the_same_name_are_refused(finished: tuple[Path, Path, str]) -> None:
    folder, config, _ = finished
    said = ts_loop("--config", config, "--out", folder.parent, "--t", "0.9", ok=False)
    assert "another t (0.1, now 0.9)" in said.stderr


def test_labels_are_the_model_s_own(finished: tuple[Path, Path, str], recipes: Path, tmp_path: Path) -> None:
    """Every gold answer swapped for other garbage: the samples and the tokenised training set are the same."""
    config = small_loop(recipes, tmp_path / "mine")
    prompts = config.parent / "mine.jsonl"
    swapped = [{**json.loads(line), "answer": f"garbage {n}"} for n, line in enumerate(prompts.open())]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in swapped))
    ts_loop("--config", config, "--out", tmp_path / "runs")
    ours = tmp_path / "runs" / "small" / "iter_01"
    theirs = finished[0] / "iter_01"
    assert answers(ours) == answers(theirs)
    assert training_set(ours) == training_set(theirs)


def test_on_policy_takes_the_place_of_the_answers(recipes: Path, tmp_path: Path) -> None:
    config = small_loop(recipes, tmp_path / "mine")
    said = ts_loop("--config", config, "--out", tmp_path / "runs", "--distill", "on-policy")
    assert "distill" in said.stdout
    assert "32 prompts" in said.stdout
    run = tmp_path / "runs" / "small"
    recipe = yaml.safe_load((run / "iter_01/distill/recipe.yml").read_text())
    assert recipe["on_policy_kl"]["teacher"] == str(recipes / "mini/thinking")
    assert (run / "iter_01/distill/instruct/model.safetensors").is_file()
    rows = json.loads((run / "results.json").read_text())["rows"]
    assert [row["iteration"] for row in rows] == [0, 0, 1, 1]


def training_set(iteration: Path) -> bytes:
    """What Axolotl trains on, to the byte, prepared again from the stage's own recipe."""
    recipe = iteration / "distill" / "recipe.yml"
    subprocess.run(
        [Path(TS_LOOP).with_name("axolotl"), "preprocess", recipe], check=True, capture_output=True, timeout=300
    )
    prepared = yaml.safe_load(recipe.read_text())["dataset_prepared_path"]
    (state,) = Path(prepared).glob("*/state.json")
    rows = load_from_disk(str(state.parent)).to_list()
    shutil.rmtree(prepared)
    assert len(rows) == 32
    return json.dumps(rows, sort_keys=True).encode()


def answers(iteration: Path) -> list[Any]:
    (file,) = (iteration / "generate" / "samples").glob("samples_prompts_file_*.jsonl")
    return [(row["doc"]["messages"], row["resps"]) for row in map(json.loads, file.open())]


def test_a_broken_off_stage_is_done_again_with_the_same_outcome(
    finished: tuple[Path, Path, str], tmp_path: Path
) -> None:
    folder, config, _ = finished
    shutil.copytree(folder, tmp_path / "runs" / "small")
    again = tmp_path / "runs" / "small"
    for stage in ("reconstruct", "evaluate"):
        (again / "iter_01" / stage / "stage.json").unlink()
    (again / "iter_01" / "reconstruct" / "thinking" / "model.safetensors").write_bytes(b"half of it")
    said = ts_loop("--config", config, "--out", tmp_path / "runs")
    assert "3 of 5 stages are done" in said.stdout
    for name in ("distill/instruct", "reconstruct/thinking"):
        weights = f"iter_01/{name}/model.safetensors"
        assert (again / weights).read_bytes() == (folder / weights).read_bytes()
    rows, same = (json.loads((f / "results.json").read_text())["rows"] for f in (again, folder))
    assert rows == same


def test_an_interrupt_while_stages_begin_ends_those_that_did(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = threading.Event()

    class Interrupted(ThreadPoolExecutor):
        def submit(self, *args: Any, **kwargs: Any) -> Any:
            super().submit(*args, **kwargs)
            raise KeyboardInterrupt

    monkeypatch.setattr(orchestrator, "ThreadPoolExecutor", Interrupted)
    monkeypatch.setattr(orchestrator, "perform", lambda *_: stopped.wait(60))
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(orchestrator.side_by_side([None], None, SimpleNamespace(stop=stopped.set), None))  # type: ignore
    assert stopped.is_set()
    assert time.monotonic() - begun < 30
