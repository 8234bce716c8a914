"""The orchestrator and Think-at-Hard checkpoints: evaluated at iteration 0 with their passes counted, and looked at."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from small import TS_LOOP, command_here, prepared, run_here

from harness import checks, loop, view
from harness.cli import think_map
from harness.config import load, recipes_folder
from harness.errors import LoopError
from harness.runner import LocalRunner

FIELDS = ["mean_depth", "skip_rate", "flops_per_token", "flops_per_token_single", "flops_per_token_always"]


@pytest.fixture(scope="module")
def made(recipes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TaH checkpoint around the embedded instruct one, whose random decider lets about half the tokens continue."""
    import torch
    from transformers import AutoModelForCausalLM

    from thinkswitch_plugin.tah.model import TaHForCausalLM

    torch.manual_seed(0)
    model = TaHForCausalLM.from_backbone(
        AutoModelForCausalLM.from_pretrained(recipes / "mini" / "instruct"),
        mix_top_k=5,
        lora_r=2,
        decider_layers=[1, 4],
        decider_hidden=[16],
    ).eval()
    with torch.no_grad():
        odds = model(torch.arange(3, 300)[None], logits_to_keep=1).continue_logits
    model.config.threshold = round(float(torch.sigmoid(odds).median()), 4)
    folder = tmp_path_factory.mktemp("tah") / "checkpoint"
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(recipes / "mini" / "instruct" / name, folder)
    return folder


@pytest.fixture
def checkpoint(made: Path, tmp_path: Path) -> Path:
    """One to change."""
    return Path(shutil.copytree(made, tmp_path / "checkpoint"))


def ts_loop(*options: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [TS_LOOP, *map(str, options)], capture_output=True, text=True, timeout=timeout, check=False, encoding="utf-8"
    )


# --- evaluated ---


def test_the_loop_evaluates_one_at_iteration_0_and_counts_its_passes_once(
    made: Path, recipes: Path, tmp_path: Path, runner: LocalRunner
) -> None:
    asked = {"instruct": str(made), "tasks": ["mini_math"], "name": "tah", "limit": 12, "iterations": 0}
    ran = run_here(recipes / "loop.yml", tmp_path / "runs", runner, **asked)
    assert "mean depth" in ran.said
    rows = {row["checkpoint"]: row for row in ran.results["rows"]}
    assert set(rows["thinking"]) == set(rows["instruct"]) - set(FIELDS)
    tah = rows["instruct"]
    assert tah["n"] == 12
    assert 1 < tah["mean_depth"] < 2
    assert tah["mean_depth"] == pytest.approx(2 - tah["skip_rate"])
    assert tah["flops_per_token_single"] < tah["flops_per_token"] < tah["flops_per_token_always"]
    assert f"<td>{tah['mean_depth']:.3f}</td>" in (ran.folder / "report.html").read_text()
    resolved = {who: yaml.safe_load((ran.folder / f"iter_00/evaluate_{who}/recipe.yml").read_text()) for who in rows}
    assert resolved["instruct"]["model_args"]["trust_remote_code"] is True
    assert "trust_remote_code" not in resolved["thinking"]["model_args"]
    again = run_here(recipes / "loop.yml", tmp_path / "runs", runner, **asked)
    assert "2 of 2 stages are done" in again.said
    assert again.results == ran.results
    assert again.made() == ran.made()


def asked(checkpoint: Path, **changes: Any) -> Any:
    return load(recipes_folder() / "loop.yml", {"instruct": str(checkpoint), "iterations": 0, **changes})


def test_only_a_tah_checkpoint_s_code_is_trusted(made: Path, recipes: Path, tmp_path: Path) -> None:
    for instruct, trusted in ((made, [True, None]), (recipes / "mini/instruct", [None, None])):
        run = prepared(recipes / "loop.yml", tmp_path / "runs", instruct=str(instruct), iterations=0)
        recipe = [step.stage.recipes["recipe.yml"] for step in run.steps]
        assert [resolved["model_args"].get("trust_remote_code") for resolved in recipe] == trusted


def test_what_cannot_be_done_with_one_is_a_line_before_any_stage(made: Path, tmp_path: Path) -> None:
    said = ts_loop("--iters", 1, "--instruct", made, "--out", tmp_path / "runs")
    assert said.returncode == 2
    assert said.stderr == (
        f"ts-loop: --instruct {made}: a TaH checkpoint cannot be distilled or merged; evaluate it by --iters 0\n"
    )
    assert not (tmp_path / "runs").exists()
    with pytest.raises(LoopError, match="cannot be put in NF4"):
        loop.check_pair(asked(made, nf4=True))
    pair = {"instruct": str(recipes_folder() / "mini/instruct"), "thinking": str(made)}
    with pytest.raises(LoopError, match=r"--thinking .* cannot be distilled"):
        loop.check_pair(load(recipes_folder() / "loop.yml", pair))


def test_its_backbone_must_fit_the_other_of_the_pair(checkpoint: Path, recipes: Path) -> None:
    thinking = recipes / "mini/thinking"
    checks.check_pair(checkpoint, thinking)
    assert loop.check_pair(asked(checkpoint))[0]["instruct"] == checkpoint
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"]["hidden_size"] = 64
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoopError, match="the pair does not fit: hidden_size is 64"):
        checks.check_pair(checkpoint, thinking)


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("tah_auto.py", "import os\n"),
        ("tah_auto.py", "from os import getcwd\n"),
        ("tah_auto.py", "from thinkswitch_plugin.tah.config import TaHConfig\nprint(TaHConfig)\n"),
        ("tah_auto.py", "__all__ = [print('run')]\n"),
        ("tah_auto.py", "from .other import TaHConfig\n"),
        ("tah_auto.py", "def f(:\n"),
        ("custom_generate/generate.py", ""),
        ("tokenization_own.py", "x = 1\n"),
    ],
)
def test_code_that_is_not_ours_is_never_trusted(checkpoint: Path, file: str, code: str) -> None:
    checks.check_tah(checkpoint, "instruct")
    (checkpoint / file).parent.mkdir(exist_ok=True)
    (checkpoint / file).write_text(code)
    with pytest.raises(LoopError, match=f"^--instruct .*: {file} would run when it is loaded"):
        checks.check_tah(checkpoint, "instruct")


def test_code_on_the_hub_is_never_trusted(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["someone/else--own.Tokenizer", None]}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(LoopError, match="auto_map in tokenizer_config"):
        checks.check_tah(checkpoint, "instruct")


def test_the_price_is_set_beside_its_two_ends() -> None:
    scored = {"iteration": 0, "checkpoint": "instruct", "task": "a", "correct": 1, "n": 2, "accuracy": 0.5}
    scored |= {"ci95": [0.1, 0.9], "tokens_per_answer": 3.0, "closed_traces": 0.0}
    price = dict(zip(FIELDS, (1.0625, 0.9375, 1.5e9, 1.2e9, 3.0e9), strict=True))
    rows = [{**scored, **price}, {**scored, "checkpoint": "thinking"}, {**scored, **dict.fromkeys(FIELDS), "task": "b"}]
    expected = ["0", "instruct", "a", "1.062", "93.8%", "1,500.00", "1.25", "0.50"]
    assert view.pass_cells(rows) == [expected]


# --- looked at ---


def test_think_map_prints_the_answer_and_writes_the_page(made: Path, tmp_path: Path) -> None:
    page = tmp_path / "map.html"
    said = ts_loop("think-map", made, "--prompt", "Compute 24+26+28.", "--threshold", 0, "--html", page)
    assert (said.returncode, said.stderr) == (0, "")
    answer, _, rest = said.stdout.partition("\n\n")
    legend, line, where = rest.splitlines()
    assert answer.startswith("‹boxed›‹{›")
    assert "bracketed" in legend
    assert "mean depth 2.000" in line
    assert f"<p>{line}.</p>" in page.read_text()
    assert "<pre>\nCompute 24+26+28.</pre>" in page.read_text()
    assert str(page) in where


def here(monkeypatch: pytest.MonkeyPatch, *options: object) -> int:
    """The command in this process, where torch is loaded already; its exit code."""
    monkeypatch.setattr(think_map, "quiet", lambda: None)
    return command_here(monkeypatch, *options)


def test_think_map_stops_where_it_is_told_and_takes_another_decider(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--prompt", "Compute 24+26+28.", "--decider", "always", "--max-new-tokens", 3]
    assert here(monkeypatch, "think-map", made, *options) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "3 tokens, mean depth 2.000, 100.0% iterated (3 of 3)"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["missing", "--prompt", "x"], "missing: no such folder"),
        (["PLAIN", "--prompt", "x"], "not a TaH checkpoint (model_type"),
        (["EMPTY", "--prompt", "x"], "has no config.json"),
        (["UNTRAINED", "--prompt", "x"], "its decider is not trained yet"),
        (["UNTRAINED", "--prompt", "x", "--decider", "learned"], "its decider is not trained yet"),
        (["TAH", "--prompt", "  \n"], "--prompt: is empty"),
        (["TAH", "--prompt", "x", "--html", "no/such/folder.html"], "--html no/such/folder.html: cannot be written"),
        (["TAH", "--prompt", "x", "--html", "/"], "--html /: cannot be written"),
    ],
)
def test_think_map_says_in_a_line_what_is_wrong(
    checkpoint: Path, recipes: Path, tmp_path: Path, options: list[str], says: str
) -> None:
    untrained = Path(shutil.copytree(checkpoint, tmp_path / "untrained"))
    config = json.loads((untrained / "config.json").read_text())
    (untrained / "config.json").write_text(json.dumps({**config, "decider": "oracle", "decider_hidden": []}))
    (tmp_path / "empty").mkdir()
    named = {"PLAIN": recipes / "mini/instruct", "TAH": checkpoint, "UNTRAINED": untrained, "EMPTY": tmp_path / "empty"}
    said = ts_loop("think-map", *(named.get(option, option) for option in options))
    assert (said.returncode, said.stdout) == (2, "")
    assert said.stderr.startswith("ts-loop: ")
    assert says in said.stderr
    assert len(said.stderr.splitlines()) == 1


def test_think_map_of_broken_weights_is_a_line(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert here(monkeypatch, "think-map", checkpoint, "--prompt", "x") == 2
    assert f"ts-loop: {checkpoint}: tah: the weights are not whole" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["think-map"], "Missing argument 'CHECKPOINT'"),
        (["think-map", "somewhere"], "Missing option '--prompt'"),
        (["think-map", "somewhere", "--prompt", "x", "--threshold", "1.5"], "Invalid value for '--threshold'"),
        (["think-map", "somewhere", "--prompt", "x", "--decider", "oracle"], "Invalid value for '--decider'"),
        (["--iters", "2", "think-map", "somewhere", "--prompt", "x"], "--iters is the loop's"),
        (["thinkmap"], "No such command 'thinkmap'"),
    ],
)
def test_wrong_usage_is_told_as_before(options: list[str], says: str) -> None:
    said = ts_loop(*options)
    assert (said.returncode, said.stdout) == (2, "")
    assert says in said.stderr
    assert len(said.stderr.strip().splitlines()) <= 4


def test_the_command_s_help_names_the_subcommand() -> None:
    assert "think-map  See a Think-at-Hard checkpoint think." in ts_loop("--help").stdout
    said = ts_loop("think-map", "--help").stdout
    for option in ("--prompt", "--max-new-tokens", "--threshold", "--decider", "--html"):
        assert option in said
