"""What a tool would refuse at its start is refused before anything runs, in its words; what it takes is asked once."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from small import TAKEN, prepared, small_loop

from harness import loop, natives
from harness.errors import LoopError, StageError
from harness.runner import LocalRunner
from harness.stages import RECIPE
from harness.view import View

REFUSED = {
    "distill.warmup_steps=many": "warmup_steps: Input should be a valid integer",
    "distill.trace_stripping.strip_all=true": "trace_stripping.strip_all: Extra inputs are not permitted",
    "distill.plugins=[no.such.Plugin]": "plugins: no.such.Plugin: cannot be imported",
    "distill.gradient_accumulation_steps=0": "",
    "distill.lora_r=[16]": "lora_r: Input should be a valid integer (got [16])",
    "reconstruct.merge_method=sleep": "Unimplemented merge method sleep",
    "reconstruct.merge_method=nuslerp": "Merge method requires at least 2 non-base inputs",
    "reconstruct.parameters={}": "Missing required parameter t",
    "reconstruct.parameters.t=far": "Input should be a valid number",
    "reconstruct.dtype=float33": "",
    "reconstruct.models.0.model=[]": "models.0.model: Input should be a valid dictionary",
    "evaluate.batch_siz=20": "batch_siz: is no setting of lm-eval's",
    "evaluate.apply_chat_template=[1]": "apply_chat_template: Input should be a valid boolean (got [1])",
    "generate.model=hugging": "model: hugging: lm-eval has none of that name",
    "generate.batch_size=twenty": "batch_size: Input should be a valid integer",
}
TAKES = (
    *("distill.learning_rate=1e-4", "distill.max_memory={0: 20GiB, cpu: 10GiB}", "distill.wandb_project=mine"),
    *("reconstruct.parameters.t=[0.0, 0.5]", "reconstruct.out_dtype=bfloat16"),
    *("evaluate.batch_size=auto", "generate.gen_kwargs.temperature=0.6", "evaluate.gen_kwargs=do_sample=true"),
)


@pytest.fixture(scope="module")
def small(recipes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_loop(recipes, tmp_path_factory.mktemp("natives") / "mine")


def asked(run: loop.Run) -> list[natives.Asked]:
    return [natives.Asked(step.stage, run.pair, {}) for step in run.steps]


def test_each_tool_says_what_it_does_not_take(small: Path, tmp_path: Path, runner: LocalRunner) -> None:
    questions = {}
    for change in (*REFUSED, *TAKES):
        kind = change.partition(".")[0]
        one = next(one for one in asked(prepared(small, tmp_path, (change,))) if one.stage.kind.name == kind)
        questions[change] = {"tool": one.tool, "recipe": one.written()}
    (tmp_path / "asked.json").write_text(json.dumps(questions))
    names = [str(tmp_path / name) for name in ("asked.json", "answer.json")]
    runner.run(["python", "-m", "harness.natives", *names], {}, tmp_path / "log.txt")
    answer = json.loads((tmp_path / "answer.json").read_text())
    for change, why in REFUSED.items():
        assert answer[change], change
        assert answer[change].startswith(why), answer[change]
        assert len(answer[change].splitlines()) == 1
    assert {change: answer[change] for change in TAKES} == dict.fromkeys(TAKES, "")


@pytest.mark.parametrize("distill", ["answers", "on-policy"])
def test_what_was_taken_is_not_asked_again(small: Path, tmp_path: Path, runner: LocalRunner, distill: str) -> None:
    run = prepared(small, tmp_path, distill=distill)
    cache, asks = tmp_path / "kept.json", []

    def ask(command: list[str]) -> None:
        asks.append(command)
        runner.run(command, {}, tmp_path / "log.txt")

    natives.check(asked(run), cache, ask)
    assert set(json.loads(cache.read_text())) == {one.name for one in asked(run)}
    natives.check(asked(run), cache, ask)
    assert len(asks) == 1
    cache.write_text("[half")
    natives.check(asked(run), cache, ask)
    assert len(asks) == 2
    natives.check(asked(prepared(small, tmp_path, ("evaluate.batch_size=7",), distill=distill)), cache, ask)
    assert len(asks) == 3


def test_a_run_whose_training_would_be_refused_does_not_begin(small: Path, tmp_path: Path, runner: LocalRunner) -> None:
    said = Console(file=io.StringIO(), width=200)
    run = prepared(small, tmp_path, ("distill.warmup_steps=many",))
    before = set(TAKEN)
    with pytest.raises(
        LoopError, match=r"^distill recipe: axolotl refuses it: warmup_steps: Input should be"
    ) as caught:
        loop.go(run, View(said), runner)
    assert caught.value.code == 2  # nothing was run
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "stages").glob("*/stage.json"))
    assert not list((tmp_path / "stages").glob(f"*/{RECIPE}"))
    assert before == TAKEN


def test_tools_that_cannot_be_asked(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepared(small, tmp_path)
    (tmp_path / "harness").mkdir()
    (tmp_path / "harness/__init__.py").write_text("raise SystemExit('no harness here')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StageError, match=r"^the recipes could not be shown to their tools: no harness here$"):
        natives.check(asked(run), tmp_path / "kept.json")
    assert not (tmp_path / "kept.json").exists()
