"""Kept answers: what was stopped goes on, and ends in the answers of what was not."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from thinkswitch_plugin.kept_answers import SUFFIX, Kept, Unsaved, keeping

STOP = 2  # batches before it is stopped


def asked(count: int = 7, **gen_kwargs: Any) -> list[Instance]:
    """Questions of several lengths, the last as the first."""
    texts = [f"<|im_start|>user\nCompute {'1+' * (n % 4)}{n}.<|im_end|>\n<|im_start|>assistant\n" for n in range(count)]
    how = {"until": [], "max_gen_toks": 6, **gen_kwargs}
    rows = [{"text": text} for text in [*texts, texts[0]]]
    return [Instance("generate_until", row, (row["text"], how), number) for number, row in enumerate(rows)]


@pytest.fixture(scope="module")
def base(recipes: Path) -> dict[str, Any]:
    return {"pretrained": str(recipes / "mini/instruct"), "dtype": "float32", "device": "cpu", "batch_size": 3}


class Stopping(HFLM):
    """Ends in the middle, as by a signal."""

    calls = 0

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        type(self).calls += 1
        if self.calls > STOP:
            raise KeyboardInterrupt
        return super().generate_until(requests, disable_tqdm=disable_tqdm)


class Counting(HFLM):
    """Says how many it was asked."""

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        self.answered = getattr(self, "answered", 0) + len(requests)
        return super().generate_until(requests, disable_tqdm=disable_tqdm)


SAMPLED = {"do_sample": True, "temperature": 1.5}


@pytest.mark.parametrize("how", [{}, SAMPLED])
def test_what_was_stopped_ends_in_the_same_answers(base: dict[str, Any], tmp_path: Path, how: dict[str, Any]) -> None:
    requests = asked(**how)
    whole = keeping(HFLM, tmp_path / "whole", 42, "x")(**base).generate_until(requests)
    Stopping.calls = 0
    with pytest.raises(KeyboardInterrupt):
        keeping(Stopping, tmp_path / "stopped", 42, "x")(**base).generate_until(requests)
    torch.manual_seed(999)  # whatever another process begins with
    later = keeping(Counting, tmp_path / "stopped", 42, "x")(**base)
    assert later.generate_until(requests) == whole
    assert later.answered == len(requests) - STOP * 3
    assert len(set(whole)) > 3
    if how:
        assert keeping(HFLM, tmp_path / "other", 43, "x")(**base).generate_until(requests) != whole
    else:
        assert HFLM(**base).generate_until(requests) == whole  # lm-eval's own, in its own batches


def test_a_question_asked_twice_is_drawn_twice(base: dict[str, Any], tmp_path: Path) -> None:
    once = asked(1, **SAMPLED)[:1]
    answers = keeping(HFLM, tmp_path / "x", 42, "x")(**base).generate_until(once * 8)
    assert len(set(answers)) > 1


@pytest.fixture
def lines(tmp_path: Path) -> Iterator[Path]:
    file = tmp_path / f"recipe.0{SUFFIX}"
    kept = Kept(file, "me")
    for number in range(3):
        assert kept.answers(number, [number]) is None
        kept.keep([number], [f"answer {number}"])
    return file


def test_kept_answers_are_given_in_order(lines: Path) -> None:
    kept = Kept(lines, "me")
    assert [kept.answers(number, [number]) for number in range(4)] == [["answer 0"], ["answer 1"], ["answer 2"], None]


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_batch_that_was_half_written_is_asked_again(lines: Path, cut: int) -> None:
    lines.write_bytes(lines.read_bytes()[:-cut])
    kept = Kept(lines, "me")
    assert [kept.answers(number, [number]) for number in range(3)] == [["answer 0"], ["answer 1"], None]
    kept.keep([2], ["anew"])
    assert [Kept(lines, "me").answers(0, [0]), json.loads(lines.read_text().splitlines()[2])["answers"]] == [
        ["answer 0"],
        ["anew"],
    ]
    assert len(lines.read_text().splitlines()) == 3


def test_answers_to_others_are_none(lines: Path) -> None:
    assert Kept(lines, "somebody else").answers(0, [0]) is None
    kept = Kept(lines, "me")
    assert kept.answers(0, [0]) == ["answer 0"]
    assert kept.answers(1, ["another question"]) is None
    assert kept.answers(2, [2]) is None  # what came after it was of another order
    kept.keep(["another question"], ["answer"])
    assert len(lines.read_text().splitlines()) == 2


@pytest.mark.slow
def test_the_command_leaves_what_lm_eval_leaves(recipes: Path, tool: Any, tmp_path: Path) -> None:
    found = []
    for name, command in (
        ("bare", ["lm_eval", "run", "--config"]),
        ("kept", ["python", "-m", "thinkswitch_plugin.kept_answers"]),
    ):
        recipe = yaml.safe_load((recipes / "evaluate.yml").read_text())
        recipe["model_args"]["pretrained"] = str(recipes / "mini/thinking")
        recipe |= {"output_path": str(tmp_path / name / "results.json"), "limit": 12, "batch_size": 5}
        file = tmp_path / f"{name}.yml"
        file.write_text(yaml.safe_dump(recipe))
        tool(*command, file)
        rows = [json.loads(line) for path in sorted((tmp_path / name).glob("samples_*")) for line in path.open()]
        found.append([(row["doc_id"], row["doc_hash"], row["resps"], row["exact_match"]) for row in rows])
    assert found[0] == found[1]
    assert len(found[0]) == 24
    assert not list(tmp_path.glob(f"*{SUFFIX}"))


def test_a_recipe_that_is_none_is_one_line(tmp_path: Path) -> None:
    from thinkswitch_plugin import kept_answers

    file = tmp_path / "recipe.yml"
    file.write_text("- a list")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["kept_answers", str(file)])
        with pytest.raises(SystemExit, match=r"recipe.yml: cannot be read") as ended:
            kept_answers.main()
    assert "\n" not in str(ended.value)


def test_what_lm_eval_could_not_save_ends_it(tmp_path: Path) -> None:
    """It would say so in a warning, ask on, and exit with 0."""
    from lm_eval.loggers import EvaluationTracker, evaluation_tracker

    (tmp_path / "file").touch()
    tracker = EvaluationTracker(output_path=str(tmp_path / "file" / "results.json"))
    handler, said = Unsaved(logging.WARNING), logging.getLogger(evaluation_tracker.__name__)
    said.addHandler(handler)
    try:
        said.warning("something else")
        with pytest.raises(SystemExit, match=r"^lm-eval: Could not save sample results: FileExistsError"):
            tracker.save_results_samples("task", [])
        with pytest.raises(SystemExit, match=r"^lm-eval: Could not save results aggregated: FileExistsError"):
            tracker.save_results_aggregated({"results": {}, "configs": {}}, {})
    finally:
        said.removeHandler(handler)
