"""The whole loop: real labels, real QLoRA, real merges, real scores, on the embedded pair.

Once through its command, from outside; the rest in this process, on a runner that has the tools already.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from small import Ran, prepared, run_here, small_loop, ts_loop
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from harness import asking, dial, evidence, export, lineage, loop, report
from harness import plan as plans
from harness.errors import LoopError, StageError
from harness.files import below, digest
from harness.model_card import AGAIN, Licence
from harness.plan import Step, plan
from harness.runner import LocalRunner
from harness.stages import OWN, Kind, Output, Stage, slot
from harness.view import View


@pytest.fixture(scope="module")
def finished(recipes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A run of one iteration by the command: its folder, its loop.yml and what it printed."""
    folder = tmp_path_factory.mktemp("loop")
    config = small_loop(recipes, folder / "mine")
    said = ts_loop("--config", config, "--out", folder / "runs")
    return folder / "runs" / "small", config, said.stdout + said.stderr


@pytest.fixture
def copied(finished: tuple[Path, Path, str], tmp_path: Path) -> tuple[Path, Path]:
    """The finished run to go on from: its folder of runs, and its loop.yml."""
    shutil.copytree(finished[0].parent, tmp_path / "runs", symlinks=True)
    return tmp_path / "runs", finished[1]


def rows_of(run: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((run / "results.json").read_text())["rows"]
    return rows


# --- what a finished run is asked afterwards ---


def test_the_dial_turns_the_last_iteration_s_t_and_trains_nothing(
    copied: tuple[Path, Path], runner: LocalRunner
) -> None:
    out, _ = copied
    before = {path.name for path in (out / "stages").iterdir()}
    turned = dial.prepare(out, "small", [0.0, 0.1], View(quiet=True))
    loop.go(turned, View(quiet=True), runner, told=False)
    made = {path.name.partition("-")[0] for path in (out / "stages").iterdir() if path.name not in before}
    assert made == {"reconstruct", "evaluate", "angles"}
    run = out / "small"
    found = {point.t: point for point in evidence.dial(evidence.read(out / "small.dial"), evidence.read(run))}
    assert set(found) == {0.0, 0.1}
    assert found[0.0].agreement == 1.0, "at t = 0 it is the anchor"
    # The run's own t is 0.1: what it rebuilt and tested is found again, not done again.
    (again,) = [step for step in turned.steps if step.arm == "t=0.1" and step.checkpoint]
    noted = json.loads((run / "run.json").read_text())["steps"]
    assert turned.keys[again.stage] in {step["key"] for step in noted}
    assert "the dial" in (report.write(out, ["small"])).read_text().lower()
    # The weights that it turns between, and the pair's as it came: what was learnt lies nearer to instruct.
    apart = report.apart_of(out, "small")
    learnt, came = (sum(one.apart for one in apart[whose]) for whose in ("what is merged", "the pair at first"))
    assert 0 < abs(learnt - came) < 0.5 * came


def test_t_is_chosen_among_what_is_rebuilt_and_tried(
    copied: tuple[Path, Path], runner: LocalRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, config = copied
    monkeypatch.setattr(plans, "GRID", (0.1, 1.0))
    before = {path.name for path in (out / "stages").iterdir()}
    ran = run_here(config, out, runner, name="auto", t="auto")
    made = [path.name.partition("-")[0] for path in (out / "stages").iterdir() if path.name not in before]
    # The rebuilding at 0.1 is the finished run's own; at 1 it is the instruct checkpoint, which thinks no more.
    assert sorted(made) == ["answer", "answer", "answer", "choose", "evaluate", "reconstruct"]
    (choice,) = ran.results["chosen"]
    assert choice["candidates"][-1]["passes"] is False
    assert choice["t"] in (0.0, 0.1)
    assert f"iteration 1: {choice['why']}" in ran.said
    rows = [row for row in ran.results["rows"] if (row["checkpoint"], row["iteration"]) == ("thinking", 1)]
    assert [row["t"] for row in rows] == [choice["t"]]
    assert {row["t"] for row in rows_of(out / "small") if "t" in row} == {0.1}
    taken = ran.folder / "iter_01/choose/thinking/model.safetensors"
    source = ran.folder / "iter_01/reconstruct_t0.1/thinking" if choice["t"] else ran.run.pair["thinking"]
    weights = next(source.glob("*.safetensors"))
    assert digest(next(taken.parent.glob("*.safetensors"))) == digest(weights)
    assert "How t was chosen" in (ran.folder / "report.html").read_text()
    # A dial of it turns the same weights.
    turned = dial.prepare(out, "auto", [0.1], View(quiet=True))
    rebuilt = [step for step in turned.steps if step.name == "reconstruct"]
    assert [turned.keys[step.stage] for step in rebuilt] == [ran.keys["1/reconstruct_t0.1"]]


@pytest.mark.parametrize("name", ["instruct", "thinking"])
def test_what_is_exported_loads_as_any_model_and_lm_eval_scores_it_the_same(
    name: str, finished: tuple[Path, Path, str], recipes: Path, tool: Callable[..., str], tmp_path: Path
) -> None:
    run = finished[0]
    to = tmp_path / "there"
    export.write(lineage.choose(run.parent, f"small:{name}@1"), to, Licence("apache-2.0"), "me/mine")
    stage = run / "iter_01" / f"evaluate_{name}"
    recipe = yaml.safe_load((stage / "recipe.yml").read_text())
    model = {**recipe["model_args"], "pretrained": str(to)}
    recipe |= {"model_args": model, "output_path": str(tmp_path / "answers/results.json")}
    (tmp_path / "evaluate.yml").write_text(yaml.safe_dump(recipe))
    tool("lm_eval", "run", "--config", tmp_path / "evaluate.yml")
    ours, theirs = (
        [(row["resps"], row["exact_match"]) for row in asking.samples(place / "answers", "mini_qa")]
        for place in (stage, tmp_path)
    )
    assert len(ours) == 20
    assert ours == theirs
    for file in below(to):
        for place in (run.parent, finished[1].parent, tmp_path, recipes, Path.home(), "/tmp/"):
            assert str(place).encode() not in file.read_bytes(), file


def test_an_exported_adapter_is_what_the_checkpoint_learnt(
    finished: tuple[Path, Path, str], recipes: Path, tmp_path: Path
) -> None:
    """Axolotl merges W to Q(W) + α/r BA, Q what NF4, its scales in float32, makes of a matrix (arXiv 2305.14314)."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from safetensors.torch import load_file

    to = tmp_path / "there"
    export.write(lineage.choose(finished[0].parent, "small"), to, Licence("mit"), "me/mine", adapter_only=True)
    config = json.loads((to / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "instruct"
    learnt = load_file(to / "adapter_model.safetensors")
    came = load_file(recipes / "mini/instruct/model.safetensors")
    merged = load_file(finished[0] / "iter_01/distill/instruct/model.safetensors")
    places = sorted(name.removesuffix(".lora_A.weight") for name in learnt if name.endswith(".lora_A.weight"))
    assert len(places) == 7 * 4
    for place in places:
        name = place.removeprefix("base_model.model.") + ".weight"
        rounded = dequantize_4bit(*quantize_4bit(came[name].flatten(), quant_type="nf4"))
        a, b = learnt[f"{place}.lora_A.weight"], learnt[f"{place}.lora_B.weight"]
        added = config["lora_alpha"] / config["r"] * b @ a
        torch.testing.assert_close(rounded.view_as(came[name]) + added, merged[name], rtol=0, atol=1e-6)
        assert added.abs().max() > 1e-4


def test_what_is_exported_is_made_again_by_its_own_recipes(
    finished: tuple[Path, Path, str], recipes: Path, tmp_path: Path
) -> None:
    run, config, _ = finished
    export.write(lineage.choose(run.parent, "small:thinking@1"), tmp_path / "there", Licence("mit"), "mine")
    beside = tmp_path / "there" / AGAIN
    for who in ("instruct", "thinking"):
        shutil.copytree(recipes / "mini" / who, beside / who)
    shutil.copy(config.parent / "mine.jsonl", beside)
    again = prepared(beside / "loop.yml", tmp_path / "runs")
    noted = json.loads((run / "run.json").read_text())["steps"]
    assert {step.place: again.keys[step.stage] for step in again.steps} == {s["place"]: s["key"] for s in noted}


def test_a_run_s_figures_are_tensorboard_s_too(copied: tuple[Path, Path], runner: LocalRunner) -> None:
    out, config = copied

    def read() -> dict[str, list[tuple[int, float]]]:
        files = EventAccumulator(str(out / "small" / "tensorboard" / "thinkswitch-42"))
        files.Reload()
        return {tag: [(point.step, point.value) for point in files.Scalars(tag)] for tag in files.Tags()["scalars"]}

    def results() -> dict[str, list[tuple[int, float]]]:
        found: dict[str, list[tuple[int, float]]] = {}
        for row in rows_of(out / "small"):
            place = f"eval/{row['task']}/{row['checkpoint']}"
            for what in ("accuracy", "tokens_per_answer", "closed_traces"):
                found.setdefault(f"{place}/{what}", []).append((row["iteration"], pytest.approx(row[what])))
            if row.get("t") is not None:
                found.setdefault("reconstruct/t", []).append((row["iteration"], pytest.approx(row["t"])))
        return found

    first = read()
    assert {tag: points for tag, points in first.items() if tag != "run/wall_s"} == results()
    ((step, seconds),) = first["run/wall_s"]
    assert (step, seconds) == (1, pytest.approx(json.loads((out / "small/results.json").read_text())["wall_s"]))
    run_here(config, out, runner)  # nothing is left to do, and no point shows twice
    assert read() == first


@pytest.mark.slow
def test_what_t_is_chosen_by_is_published_as_no_score(
    copied: tuple[Path, Path], runner: LocalRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, config = copied
    monkeypatch.setattr(plans, "GRID", (0.1,))
    ran = run_here(config, out, runner, ("validate=[mini_math]",), name="held_out", t="auto")
    (choice,) = ran.results["chosen"]
    assert [set(one["accuracy"]) for one in choice["candidates"]] == [{"mini_math"}] * 2
    assert {(row["checkpoint"], row["task"]) for row in ran.results["rows"]} == {
        ("instruct", "mini_qa"),
        ("thinking", "mini_qa"),
    }
    assert {row["task"] for row in evidence.read(ran.folder)} == {"mini_qa"}
    assert "met" not in choice


@pytest.mark.slow
def test_that_t_was_chosen_by_the_test_under_another_name_is_said(
    copied: tuple[Path, Path], runner: LocalRunner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, repository: Path
) -> None:
    out, config = copied
    (tmp_path / "tasks").mkdir()
    asked = {"include": str(repository / "tasks/mini_qa/mini_qa.yaml"), "task": "held_out"}
    (tmp_path / "tasks/held_out.yaml").write_text(yaml.safe_dump(asked))
    monkeypatch.setattr(plans, "GRID", (0.1,))
    ran = run_here(
        config, out, runner, ("validate=[held_out]",), name="peeked", t="auto", include_path=tmp_path / "tasks"
    )
    (choice,) = ran.results["chosen"]
    assert choice["met"] == choice_count(ran, "mini_qa") == 20
    assert "20 of the 20 questions it was chosen by are scored, too" in ran.said


def choice_count(ran: Ran, task: str) -> int:
    """How many questions of a task were scored."""
    return int(next(row["n"] for row in ran.results["rows"] if row["task"] == task))


# --- from outside ---


def test_results_have_the_documented_schema(finished: tuple[Path, Path, str]) -> None:
    results = json.loads((finished[0] / "results.json").read_text())
    assert {"rows", "wall_s", "cost_usd"} <= set(results)
    seen = [(row["iteration"], row["checkpoint"], row["task"]) for row in results["rows"]]
    assert seen == [(k, who, "mini_qa") for k in (0, 1) for who in ("instruct", "thinking")]
    for row in results["rows"]:
        assert row["n"] == 20
        assert row["accuracy"] == row["correct"] / row["n"]
        assert row["ci95"][0] <= row["accuracy"] <= row["ci95"][1]
        assert row["tokens_per_answer"] > 0
        assert (row["closed_traces"] > 0.9) == (row["checkpoint"] == "thinking") == (row["trace_tokens"] > 0)


def test_results_are_summed_up_from_one_row_a_question(finished: tuple[Path, Path, str]) -> None:
    questions = [json.loads(line) for line in (finished[0] / "outcomes.jsonl").open()]
    for row in rows_of(finished[0]):
        mine = [q for q in questions if all(q[key] == row[key] for key in ("iteration", "checkpoint", "task"))]
        assert len({q["question"] for q in mine}) == len(mine) == row["n"]
        assert sum(q["score"] for q in mine) == row["correct"]
        assert {(q["run"], q["arm"], q["seed"]) for q in mine} == {("small", "thinkswitch", 42)}
    # The same questions are asked of both checkpoints, before and after: they can be paired.
    asked = {(q["iteration"], q["checkpoint"]): set() for q in questions}
    for q in questions:
        asked[q["iteration"], q["checkpoint"]].add(q["question"])
    assert len({frozenset(found) for found in asked.values()}) == 1


def test_only_our_own_lines_reach_the_terminal(finished: tuple[Path, Path, str]) -> None:
    folder, _, printed = finished
    for noise in ("Warning", "WARNING", "it/s", "Loading weights", "dtype", "[INFO]"):
        assert noise not in printed
    assert "20 of 20 answers closed their trace" in printed
    assert "kept 20 of 20 rows" in printed
    assert str(folder / "report.html") in printed


def test_the_run_s_folder_links_to_its_stages(finished: tuple[Path, Path, str]) -> None:
    folder = finished[0]
    names = {str(p.relative_to(folder)) for p in folder.glob("iter_*/*")}
    assert names == {
        *(f"iter_0{k}/evaluate_{who}" for k in (0, 1) for who in ("instruct", "thinking")),
        *(f"iter_01/{name}" for name in ("generate", "distill", "reconstruct")),
    }
    for name in names:
        assert not os.path.isabs(os.readlink(folder / name))
        assert (folder / name / "stage.json").is_file()
    assert (folder / "iter_01/distill/instruct/model.safetensors").is_file()


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
        left = {
            str(p.relative_to(file.parent)): [p.stat().st_size, digest(p)]
            for p in file.parent.rglob("*")
            if p.is_file()
        }
        assert stage["outputs"] == {name: value for name, value in left.items() if name != "stage.json"}
        assert stage["key"] == Path(os.readlink(file.parent)).name
        assert stage["wall_s"] >= stage["body_s"] > 0
        assert stage["cpu_s"] > 0
        assert stage["peak_memory_mb"] > 100
        assert stage["reads"]["inputs"]
    noted = json.loads((folder / "run.json").read_text())
    assert {"axolotl", "torch", "mergekit", "lm_eval"} <= noted["versions"].keys()


def test_the_same_run_under_another_name_runs_nothing(finished: tuple[Path, Path, str]) -> None:
    folder, config, _ = finished
    marks = {path: path.stat().st_mtime_ns for path in (folder.parent / "stages").glob("*/stage.json")}
    said = ts_loop("--config", config, "--out", folder.parent, "--name", "other", "--json")
    assert said.stderr.count("(made by small)") == 7
    assert {path: path.stat().st_mtime_ns for path in (folder.parent / "stages").glob("*/stage.json")} == marks
    assert json.loads(said.stdout)["rows"] == rows_of(folder.parent / "other") == rows_of(folder)
    shutil.rmtree(folder.parent / "other")


def test_a_look_at_a_finished_run_adds_no_time(finished: tuple[Path, Path, str]) -> None:
    folder, config, _ = finished
    before = json.loads((folder / "results.json").read_text())
    said = ts_loop("--config", config, "--out", folder.parent, "-q")
    assert "mini_qa" in said.stdout
    assert "time by stage" not in said.stdout
    after = json.loads((folder / "results.json").read_text())
    assert after == before
    assert after["wall_s"] >= max(json.loads(p.read_text())["wall_s"] for p in folder.glob("iter_*/*/stage.json"))


# --- what a change makes stale ---


def test_more_iterations_go_on_and_fewer_take_nothing_away(copied: tuple[Path, Path], runner: LocalRunner) -> None:
    out, config = copied
    more = run_here(config, out, runner, iterations=2)
    assert "continuing" in more.said
    assert "7 of 12 stages are done" in more.said
    assert [row["iteration"] for row in more.results["rows"]] == [0, 0, 1, 1, 2, 2]
    made = more.made()
    fewer = run_here(config, out, runner, iterations=1)
    assert fewer.results["rows"] == more.results["rows"]
    assert fewer.made() == made
    assert (fewer.folder / "iter_02/distill").is_symlink()


def test_a_changed_setting_runs_what_depends_on_it_and_says_why(copied: tuple[Path, Path], runner: LocalRunner) -> None:
    out, config = copied
    before = run_here(config, out, runner)
    made = before.made()
    after = run_here(config, out, runner, changes=("distill.learning_rate=1e-3",))
    assert "distill: learning_rate 0.002 → 0.001\n" in after.said
    steps = {f"{step.iteration}/{step.name}": step.stage for step in after.run.steps}
    stale = {"1/distill"}  # and what reads it, by the graph
    for name, stage in steps.items():
        if any(steps[other] is needed for other in stale for needed in stage.needs()):
            stale.add(name)
    assert {name for name in steps if after.keys[name] != before.keys[name]} == stale
    assert stale == {"1/distill", "1/reconstruct", "1/evaluate_instruct", "1/evaluate_thinking"}
    now = after.made()
    assert all(now[after.keys[name]] == made[before.keys[name]] for name in steps if name not in stale)
    back = run_here(config, out, runner)  # nothing was lost
    assert back.made() == made
    assert back.results["rows"] == before.results["rows"]


def test_a_stage_is_done_again_where_it_is_asked_for(copied: tuple[Path, Path], runner: LocalRunner) -> None:
    out, config = copied
    before = run_here(config, out, runner)
    made = before.made()
    after = run_here(config, out, runner, wishes=loop.Wishes(again_from="iter_01/reconstruct"))
    again = {name for name, key in after.keys.items() if after.made()[key] != made[key]}
    assert again == {"1/reconstruct", "1/evaluate_thinking"}
    assert after.results["rows"] == before.results["rows"]
    with pytest.raises(LoopError, match="--from rebuild: this run has no such stage"):
        run_here(config, out, runner, wishes=loop.Wishes(again_from="rebuild"))


def test_a_broken_off_stage_is_done_again_with_the_same_outcome(copied: tuple[Path, Path], runner: LocalRunner) -> None:
    out, config = copied
    before = run_here(config, out, runner)
    checkpoints = ("distill/instruct", "reconstruct/thinking")
    kept = {name: digest(before.folder / f"iter_01/{name}/model.safetensors") for name in checkpoints}
    for name in ("1/distill", "1/evaluate_thinking"):
        (before.run.store.folder(before.keys[name]) / "stage.json").unlink()
    (before.folder / "iter_01/distill/instruct/model.safetensors").write_bytes(b"half of it")
    after = run_here(config, out, runner)
    assert "5 of 7 stages are done" in after.said
    assert kept == {name: digest(after.folder / f"iter_01/{name}/model.safetensors") for name in kept}
    assert after.results["rows"] == before.results["rows"]


def test_overwritten_weights_are_noticed(copied: tuple[Path, Path], runner: LocalRunner) -> None:
    out, config = copied
    before = run_here(config, out, runner)
    weights = before.folder / "iter_01/reconstruct/thinking/model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    unseen = run_here(config, out, runner)  # the size is right
    assert unseen.made() == before.made()
    seen = run_here(config, out, runner, wishes=loop.Wishes(verify=True))
    assert "thinking/model.safetensors changed since it was made; it is done again" in seen.said
    assert weights.read_bytes() == kept
    weights.write_bytes(kept[:-1])
    shorter = run_here(config, out, runner)
    assert "6 of 7 stages are done" in shorter.said
    assert weights.read_bytes() == kept


def test_every_flipped_bit_is_found_by_verify_and_by_who_would_read_it(copied: tuple[Path, Path]) -> None:
    """One in each file that a run keeps, and 200 at random places: the stage that reads it refuses, and names it."""
    out, config = copied
    run, chance = prepared(config, out), random.Random(0)
    stages = {run.keys[step.stage]: step.stage for step in run.steps}
    files = [file for key in stages for file in below(run.store.folder(key)) if file.stat().st_size]
    assert {file.name for file in files} >= {"stage.json", "recipe.yml", "log.txt", "model.safetensors"}
    for file in [*files, *chance.choices(files, k=200)]:
        whole, before = file.read_bytes(), file.stat()
        harmed = bytearray(whole)
        harmed[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        key = file.relative_to(run.store.root).parts[0]
        name = str(file.relative_to(run.store.folder(key)))
        file.write_bytes(harmed)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a disk that forgets would
        assert run.store.damaged(key) == [name]
        for stage in stages.values():
            read = [s.path for s in stage.inputs.values() if isinstance(s, Output) and run.keys[s.stage] == key]
            if any(name == "stage.json" or name.startswith(f"{path}/") for path in read):
                with pytest.raises(StageError, match=rf"{key}: {re.escape(name)} changed since it was made"):
                    loop.sound(run, stage)
        file.write_bytes(whole)


def test_scores_are_not_read_from_what_was_written_to(copied: tuple[Path, Path], runner: LocalRunner) -> None:
    out, config = copied
    samples = next(out.glob("stages/evaluate-*/answers/samples_*.jsonl"))
    lines = samples.read_text().splitlines(keepends=True)
    metric = json.loads(lines[0])["metrics"][0]
    other = re.sub(rf'("{metric}": )([01])', lambda found: found[1] + "10"[int(found[2])], lines[0])
    assert other != lines[0]
    samples.write_text("".join([other, *lines[1:]]))
    before = rows_of(out / "small")
    with pytest.raises(
        StageError, match=r"evaluate-\w+: answers/samples_.*jsonl changed since it was made\nrun its com"
    ):
        run_here(config, out, runner)
    again = run_here(config, out, runner, wishes=loop.Wishes(verify=True))
    assert "samples_" in again.said
    assert again.results["rows"] == before


def test_an_input_that_is_written_to_is_another_one(recipes: Path, tmp_path: Path) -> None:
    thinking = Path(shutil.copytree(recipes / "mini/thinking", tmp_path / "thinking"))
    config = small_loop(recipes, tmp_path / "mine", thinking=str(thinking))
    first = prepared(config, tmp_path / "runs")
    weights = thinking / "model.safetensors"
    kept = weights.read_bytes()
    (thinking / ".DS_Store").write_bytes(b"x")
    same = prepared(config, tmp_path / "runs")
    assert [same.keys[s.stage] for s in same.steps] == [first.keys[s.stage] for s in first.steps]
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    other = prepared(config, tmp_path / "runs")
    changed = {
        s.name for s, t in zip(other.steps, first.steps, strict=True) if other.keys[s.stage] != first.keys[t.stage]
    }
    assert changed == {"evaluate_thinking", "generate", "distill", "reconstruct", "evaluate_instruct"}
    key = other.keys[other.steps[1].stage]
    weights.write_bytes(kept)
    with pytest.raises(LoopError, match="was written to while this run used it"):
        loop.perform(other, None, View(), key, {})  # type: ignore[arg-type]


# --- what the loop can be ---


def test_labels_are_the_model_s_own(recipes: Path, tmp_path: Path) -> None:
    """Every gold answer swapped for garbage is the same run, to the key: no stage could read one."""
    config = small_loop(recipes, tmp_path / "mine")
    first = prepared(config, tmp_path / "runs")
    prompts = config.parent / "mine.jsonl"
    swapped = [{**json.loads(line), "answer": f"garbage {n}"} for n, line in enumerate(prompts.open())]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in swapped))
    second = prepared(config, tmp_path / "runs")
    assert [second.keys[s.stage] for s in second.steps] == [first.keys[s.stage] for s in first.steps]
    (generate,) = (step.stage for step in second.steps if step.name == "generate")
    assert "garbage" not in json.dumps([*generate.files.values(), *generate.recipes.values()])
    swapped[0]["problem"] += " "
    prompts.write_text("".join(json.dumps(row) + "\n" for row in swapped))
    third = prepared(config, tmp_path / "runs")
    assert third.keys[third.steps[2].stage] != first.keys[first.steps[2].stage]


def test_on_policy_takes_the_place_of_the_answers(
    copied: tuple[Path, Path], recipes: Path, runner: LocalRunner
) -> None:
    out, config = copied
    ran = run_here(config, out, runner, distill="on-policy", name="on_policy")
    assert "20 prompts" in ran.said
    assert ran.said.count("(made by small)") == 3  # the two evaluations of the pair, and the labels
    recipe = yaml.safe_load((ran.folder / "iter_01/distill/recipe.yml").read_text())
    assert recipe["on_policy_kl"]["teacher"] == str(recipes / "mini/thinking")
    assert (ran.folder / "iter_01/distill/instruct/model.safetensors").is_file()
    assert [row["iteration"] for row in ran.results["rows"]] == [0, 0, 1, 1]


def test_nf4_and_a_recipe_of_its_own_for_the_thinking_checkpoint(
    recipes: Path, tmp_path: Path, runner: LocalRunner
) -> None:
    config = small_loop(recipes, tmp_path / "mine", nf4=True, iterations=0, limit=10)
    written = yaml.safe_load((config.parent / "evaluate.yml").read_text())
    (config.parent / "evaluate_thinking.yml").write_text(yaml.safe_dump({**written, "gen_kwargs": {"max_gen_toks": 2}}))
    settings = yaml.safe_load(config.read_text())
    settings["recipes"]["evaluate_thinking"] = "evaluate_thinking.yml"
    config.write_text(yaml.safe_dump(settings))
    ran = run_here(config, tmp_path / "runs", runner)
    instruct, thinking = ran.results["rows"]
    assert thinking["tokens_per_answer"] <= 2 < 3
    assert thinking["truncated"] == 1
    assert instruct["truncated"] == 0
    stage = ran.folder / "iter_00/evaluate_instruct"
    assert yaml.safe_load((stage / "recipe.yml").read_text())["model_args"]["pretrained"].endswith("/nf4")
    assert not (stage / "nf4").exists()


def test_a_recipe_without_an_adapter_trains_the_whole_checkpoint_on_its_own_data_too(
    copied: tuple[Path, Path], recipes: Path, tmp_path: Path, runner: LocalRunner
) -> None:
    out, config = copied[0], small_loop(recipes, tmp_path / "mine")
    turns = [{"role": "user", "content": "Compute 1+1+1."}, {"role": "assistant", "content": "\\boxed{3}"}]
    (config.parent / "replay.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 8)
    written = yaml.safe_load((config.parent / "instruct_distill.yml").read_text())
    written["datasets"].append({"path": "replay.jsonl", "ds_type": "json", "type": "chat_template"})
    (config.parent / "instruct_distill.yml").write_text(yaml.safe_dump(written))
    changes = ("distill.adapter=null", "distill.load_in_4bit=false", "distill.learning_rate=1e-4")
    ran = run_here(config, out, runner, changes, name="full")
    trained, source = ran.folder / "iter_01/distill/instruct", recipes / "mini/instruct"
    assert digest(trained / "model.safetensors") != digest(source / "model.safetensors")
    assert (trained / "chat_template.jinja").read_text() == (source / "chat_template.jinja").read_text()
    assert not list(trained.glob("checkpoint-*"))
    assert not (ran.folder / "iter_01/distill/adapter").exists()
    assert len(ran.results["rows"]) == 4
    recipe = yaml.safe_load((ran.folder / "iter_01/distill/recipe.yml").read_text())
    assert recipe["datasets"][1]["path"] == str(config.parent / "replay.jsonl")
    assert "2/2 [" in (ran.folder / "iter_01/distill/log.txt").read_text()  # 20 labels and 8 rows, 16 a step


@pytest.mark.slow
def test_a_launcher_is_passed_through_and_its_processes_are_counted(
    copied: tuple[Path, Path], runner: LocalRunner
) -> None:
    out, config = copied
    ran = run_here(config, out, runner, ("launcher=torchrun --nproc_per_node=2",), name="two_processes")
    stage = json.loads((ran.folder / "iter_01/distill/stage.json").read_text())
    assert stage["commands"][0][-4:] == ["--launcher", "torchrun", "--", "--nproc_per_node=2"]
    assert stage["environment"]["OMP_NUM_THREADS"] == str(os.cpu_count())
    assert stage["peak_memory_mb"] > 800  # of both
    assert len(ran.results["rows"]) == 4


def test_a_failed_stage_ends_the_run_and_costs_nothing_already_done(
    copied: tuple[Path, Path], runner: LocalRunner
) -> None:
    out, config = copied
    with pytest.raises(StageError) as caught:
        run_here(config, out, runner, changes=("distill.optimizer=no_such_optimizer",))
    assert caught.value.code == 1
    assert str(caught.value).startswith("axolotl train failed: ")
    log = Path(str(caught.value).partition("the whole log: ")[2])
    assert log.read_text().startswith("$ axolotl train ")
    assert len(rows_of(out / "small")) == 2  # of the pair as it came
    assert not (log.parent / "stage.json").exists()
    said = Console(file=io.StringIO(), width=200)
    run = prepared(config, out, ("distill.optimizer=no_such_optimizer", "retries=1"), view=View(said))
    with pytest.raises(StageError):
        loop.go(run, View(said), runner)
    assert said.file.getvalue().count("tried again; 0 more times at most") == 1  # type: ignore[attr-defined]
    again = run_here(config, out, runner)
    assert "7 of 7 stages" not in again.said
    assert len(again.results["rows"]) == 4


@pytest.mark.slow
def test_labels_none_of_which_closed_end_the_run_and_more_tokens_mend_it(
    copied: tuple[Path, Path], runner: LocalRunner
) -> None:
    out, config = copied
    with pytest.raises(StageError, match=r"closed 0 of 20 traces \(0 %\)") as caught:
        run_here(config, out, runner, changes=("generate.gen_kwargs.max_gen_toks=3",))
    assert "--set generate.gen_kwargs.max_gen_toks=" in str(caught.value)
    run_here(config, out, runner, changes=("generate.gen_kwargs.max_gen_toks=96",))  # the advice can be taken


@pytest.mark.slow
def test_two_runs_at_once_share_what_they_have_in_common(recipes: Path, tmp_path: Path, runner: LocalRunner) -> None:
    config = small_loop(recipes, tmp_path / "mine", limit=8)
    ended: dict[str, Ran | BaseException] = {}

    def begin(label: str, **overrides: Any) -> None:
        try:
            ended[label] = run_here(config, tmp_path / "runs", runner, **overrides)
        except BaseException as error:
            ended[label] = error

    asked = {"one": {}, "same": {}, "other": {"name": "other", "t": 0.3}}
    threads = [threading.Thread(target=begin, args=(label,), kwargs=overrides) for label, overrides in asked.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done = {label: ran for label, ran in ended.items() if isinstance(ran, Ran)}
    assert set(done) == set(asked), ended
    assert done["one"].results["rows"] == done["same"].results["rows"]
    # Each stage was made once: one line with its time in all that was printed.
    said = "".join(ran.said for ran in done.values()).splitlines()
    made = [line for line in said if line.startswith("iteration ") and " s " in line and "reused" not in line]
    keys = {key for ran in done.values() for key in ran.keys.values()}
    assert len(keys) == 9  # the other run rebuilds and tests a thinking checkpoint of its own
    logs = [(done["one"].run.store.folder(key) / "log.txt").read_text() for key in keys]
    assert all(log.count("$ lm_eval") + log.count("$ axolotl train") + log.count("$ mergekit") == 1 for log in logs)
    assert len(made) >= len(keys)


def test_a_kind_of_stage_is_one_module_and_one_line_of_the_plan(
    copied: tuple[Path, Path], runner: LocalRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the module would hold: a kind, and how it becomes commands. The line of the plan: the step."""
    compact = Kind(
        "compact",
        "instruct is put in NF4",
        ("transformers", "bitsandbytes"),
        read=lambda folder, stage, tokenizer: {"mb": sum(p.stat().st_size for p in (folder / "small").iterdir()) / 1e6},
        note=lambda facts: f"{facts['mb']:.1f} MB",
        checkpoint="small",
    )

    def build(distilled: Stage) -> Stage:
        command = ("axolotl", "nf4", slot("instruct"), f"{OWN}/small")
        return Stage(compact, {}, (command,), {"instruct": Output(distilled, "instruct")}, device="cpu")

    def planned(*args: Any) -> list[Step]:
        steps = plan(*args)
        (distilled,) = (step.stage for step in steps if step.name == "distill")
        return [*steps, Step(1, "compact", build(distilled), seed=steps[0].seed)]

    monkeypatch.setattr(loop, "plan", planned)
    out, config = copied
    ran = run_here(config, out, runner)
    assert "7 of 8 stages are done" in ran.said
    assert any("compact" in line and "MB" in line and " s " in line for line in ran.said.splitlines())
    assert (ran.folder / "iter_01/compact/small/model.safetensors").is_file()
    assert "compact" in ran.said.partition("time by stage")[2]
