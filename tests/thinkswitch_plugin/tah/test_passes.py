"""`axolotl tah-passes`: what lm-eval logged, counted under the recipe's own settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from slow_tah import backbone

from thinkswitch_plugin.tah import cost, think_map
from thinkswitch_plugin.tah.passes import answers, command

Build = Callable[..., Any]
FIELDS = ["mean_depth", "skip_rate", "flops_per_token", "flops_per_token_single", "flops_per_token_always"]
PROMPT = "<|im_start|>user\nCompute 24+26+28.<|im_end|>\n<|im_start|>assistant\n"
ANSWERS = ["\\boxed{78}", "\\boxed{12}, or so"]


def row(answer: Any, filter: str = "none") -> dict[str, Any]:
    return {"doc": {}, "arguments": {"gen_args_0": {"arg_0": PROMPT}}, "resps": [[answer]], "filter": filter}


def log(folder: Path, task: str, rows: list[Any], date: str = "2026-01-01T00-00-00.123") -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / f"samples_{task}_{date}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def checkpoint(recipes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TaH checkpoint with the embedded tokenizer, whose decider lets some tokens continue."""
    import torch

    from thinkswitch_plugin.tah import TaHForCausalLM

    folder = tmp_path_factory.mktemp("passes") / "checkpoint"
    torch.manual_seed(1)
    settings = {"mix_top_k": 7, "lora_r": 3, "decider_layers": [0, 3], "decider_hidden": [16]}
    model = TaHForCausalLM.from_backbone(backbone(vocabulary=328), **settings).eval()
    with torch.no_grad():
        odds = model(torch.arange(3, 300)[None], logits_to_keep=1).continue_logits
    model.config.threshold = float(torch.sigmoid(odds).median())
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(recipes / "mini/instruct" / name, folder)
    return folder


def passes(folder: Path, model_args: Any, out: str = "passes.json") -> tuple[Result, Path]:
    recipe = folder.parent / "recipe.yml"
    recipe.write_text(yaml.safe_dump({"model": "hf", "model_args": model_args, "device": "cpu"}))
    file = folder.parent / out
    return CliRunner().invoke(command, [str(folder), "--recipe", str(recipe), "--out", str(file)]), file


def test_each_task_s_answers_are_counted_by_the_checkpoint_itself(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "instruct"
    log(folder, "sums", [row("another"), row("time")], "2025-12-31T00-00-00")  # an earlier evaluation
    log(folder, "sums", [row(ANSWERS[0]), row("7", "strict"), row(ANSWERS[1])])
    log(folder, "sums_2", [row(ANSWERS[0])])
    log(folder, "empty", [row("")])
    log(folder, "choice", [row(["-1.5", "False"])])
    result, file = passes(folder, {"pretrained": str(checkpoint), "dtype": "float32"})
    assert result.exit_code == 0, result.output
    counted = json.loads(file.read_text())
    model, tokenizer = think_map.load(str(checkpoint))
    asked = {"sums": ANSWERS, "sums_2": ANSWERS[:1]}
    for task, texts in asked.items():
        expected = cost.count(model, tokenizer, [(PROMPT, text) for text in texts])
        assert counted[task] == cost.summary(model.config, expected)
        assert list(counted[task]) == FIELDS
    assert 1 < counted["sums"]["mean_depth"] < 2
    assert set(counted) == {*asked, "empty", "choice"}
    assert set(counted["empty"].values()) == set(counted["choice"].values()) == {None}


@pytest.mark.parametrize("text", [False, True])
def test_the_recipe_s_settings_are_the_model_s(checkpoint: Path, tmp_path: Path, text: bool) -> None:
    log(tmp_path / "instruct", "sums", [row(ANSWERS[0])])
    given = {"pretrained": str(checkpoint), "decider": "always", "max_depth": 3, "trust_remote_code": True}
    result, file = passes(
        tmp_path / "instruct", ",".join(f"{key}={value}" for key, value in given.items()) if text else given
    )
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())["sums"]
    assert (found["mean_depth"], found["skip_rate"]) == (3, 0)
    assert found["flops_per_token"] == found["flops_per_token_always"]


@pytest.mark.parametrize(
    ("rows", "model_args", "line"),
    [
        (None, {"pretrained": "x"}, "lm-eval logged no samples here"),
        ([row("a"), {"doc": {}}], {"pretrained": "x"}, ".jsonl:2: not a sample as lm-eval logs it"),
        ([row("a")], {"max_depth": 2}, "its model_args name no checkpoint; add pretrained: FOLDER"),
        ([row("a")], {"pretrained": "recipes/mini/instruct"}, "not a TaH checkpoint but a qwen3 one"),
    ],
)
def test_what_cannot_be_counted_is_one_line(
    repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rows: Any, model_args: Any, line: str
) -> None:
    monkeypatch.chdir(repository)
    (tmp_path / "instruct").mkdir()
    if rows:
        log(tmp_path / "instruct", "sums", rows)
    result, file = passes(tmp_path / "instruct", model_args)
    assert result.exit_code == 1
    said = result.output.splitlines()[-1]  # before it, transformers' bar of the weights that it loaded
    assert said.startswith("Error: ")
    assert line in said
    assert not file.exists()


def test_a_prompt_s_first_filter_is_read_and_order_kept(tmp_path: Path) -> None:
    rows = [row(str(at), name) for at in range(3) for name in ("first", "second")]
    assert list(answers(log(tmp_path, "sums", rows))) == [(PROMPT, str(at)) for at in range(3)]
