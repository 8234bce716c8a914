"""A plan that is kept beside its run, and what of it was used: which stages are held against which line, and how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from made_runs import a_run, inputs_for
from small import small_loop, ts_loop

from harness.card import of_size
from harness.config import LoopConfig
from harness.costs.estimate import Estimate
from harness.costs.forecast import alike, work
from harness.costs.kept import Against, against, keep
from harness.loop import described
from harness.plan import plan
from harness.report import gather
from harness.stages import RECIPE

CPU = of_size(16)._replace(name="a CPU", gpu=False)


def lines(config: LoopConfig, seconds: float | None = 10.0, **sizes: float) -> list[Estimate]:
    """A plan of a run, as `forecast.of_run` makes one, all of whose lines have the same figures."""
    found = []
    for like in alike(plan(config, inputs_for(config), config.iterations)):
        step = like[0]
        key = work(step.name, step.stage.kind.name, step.stage.recipes[RECIPE])
        times = tuple(each.iteration for each in like)
        total = None if seconds is None else seconds * len(like)
        found.append(Estimate(step.name, "", times, sizes.get("memory", 1e9), seconds=total, work=key))
    return found


def went(config: LoopConfig, out: Path, **changes: Any) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The run's steps as `run.json` has them, each with a record of its stage."""
    used = {"body_s": 4.0, "wall_s": 5.0, "peak_memory_mb": 700.0, "peak_gpu_memory_mb": 3000.0}
    steps = described(a_run(config, out, **changes))
    return [(step, {**used, "kind": step["reads"]["kind"], "key": step["key"]}) for step in steps]


def test_every_stage_of_a_run_is_held_against_its_own_line(shipped: LoopConfig, tmp_path: Path) -> None:
    keep(lines(shipped), CPU, tmp_path / "mine" / "plan.json")
    device, found = against(tmp_path / "mine" / "plan.json", went(shipped, tmp_path))
    assert device == "a CPU"
    assert {(one.kind, one.runs) for one in found} == {
        ("evaluate", 6),
        ("generate", 2),
        ("distill", 2),
        ("reconstruct", 2),
    }
    evaluated = next(one for one in found if one.kind == "evaluate")
    assert evaluated == Against("evaluate", 6, (60.0, 24.0), (1e9, 700 * 2**20))


def test_a_stage_that_several_steps_share_counts_once(shipped: LoopConfig, tmp_path: Path) -> None:
    keep(lines(shipped), CPU, tmp_path / "plan.json")
    done = went(shipped, tmp_path)
    assert against(tmp_path / "plan.json", [*done, *done]) == against(tmp_path / "plan.json", done)


def test_other_seeds_iterations_and_t_are_what_was_planned_and_another_recipe_is_not(
    shipped: LoopConfig, tmp_path: Path
) -> None:
    keep(lines(shipped), CPU, tmp_path / "plan.json")
    longer = shipped.model_copy(update={"seed": 7, "t": 0.3, "iterations": 3})
    _, found = against(tmp_path / "plan.json", went(longer, tmp_path))
    assert {(one.kind, one.runs) for one in found} == {
        ("evaluate", 8),
        ("generate", 3),
        ("distill", 3),
        ("reconstruct", 3),
    }
    recipes = inputs_for(shipped).recipes
    other = {**recipes, "distill": {**recipes["distill"], "num_epochs": 9}}
    _, found = against(tmp_path / "plan.json", went(shipped, tmp_path, recipes=other))
    assert "distill" not in {one.kind for one in found}
    assert "generate" in {one.kind for one in found}


def test_a_recipe_s_own_files_are_paths_to_a_plan_and_inputs_to_a_run(shipped: LoopConfig, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("")
    recipes = inputs_for(shipped).recipes
    own = {**recipes, "distill": {**recipes["distill"], "chat_template_jinja": str(tmp_path / "chat.jinja")}}
    steps = plan(shipped, inputs_for(shipped, recipes=own), 1)
    (learnt,) = (step for step in steps if step.name == "distill")
    key = work("distill", "distill", learnt.stage.recipes[RECIPE])
    keep([Estimate("distill", "", (1,), 1e9, seconds=1.0, work=key)], CPU, tmp_path / "plan.json")

    def identify(_: str, text: str) -> str | None:
        return "what it holds" if text == str(tmp_path / "chat.jinja") else None

    done = went(shipped, tmp_path, recipes=own, identify=identify)
    assert "<<file_1>>" in json.dumps([step["reads"]["recipes"] for step, _ in done])
    (one,) = against(tmp_path / "plan.json", done)[1]
    assert (one.kind, one.runs) == ("distill", 2)


def test_memory_is_the_gpu_s_where_that_was_planned(shipped: LoopConfig, tmp_path: Path) -> None:
    keep(lines(shipped, memory=5e9), of_size(8), tmp_path / "plan.json")
    _, found = against(tmp_path / "plan.json", went(shipped, tmp_path))
    assert {one.memory for one in found} == {(5e9, 3000 * 2**20)}


def test_time_that_nobody_knew_stays_unknown(shipped: LoopConfig, tmp_path: Path) -> None:
    keep(lines(shipped, seconds=None), CPU, tmp_path / "plan.json")
    _, found = against(tmp_path / "plan.json", went(shipped, tmp_path))
    assert {one.seconds[0] for one in found} == {None}


@pytest.mark.parametrize("text", [None, "{", "[]", '{"device": "x"}', '{"device": "x", "stages": 3}'])
def test_without_a_plan_there_is_nothing_to_hold_anything_against(
    shipped: LoopConfig, tmp_path: Path, text: str | None
) -> None:
    if text is not None:
        (tmp_path / "plan.json").write_text(text)
    assert against(tmp_path / "plan.json", went(shipped, tmp_path)) == ("", [])


@pytest.mark.slow
def test_a_plan_and_then_the_run_meet_on_its_page(recipes: Path, tmp_path: Path) -> None:
    loop, out = small_loop(recipes, tmp_path / "mine"), tmp_path / "runs"
    ts_loop("plan", "--config", loop, "--out", out, "--speed", "1000,9000")
    ts_loop("--config", loop, "--out", out)
    found = {one.kind: one for one in gather(out, "small").planned[1]}
    assert {kind: one.runs for kind, one in found.items()} == {
        "evaluate": 4,
        "generate": 1,
        "distill": 1,
        "reconstruct": 1,
    }
    assert all(one.memory[0] > 0 and one.memory[1] > 0 for one in found.values())
    assert '<table id="plan">' in (out / "small" / "report.html").read_text()
