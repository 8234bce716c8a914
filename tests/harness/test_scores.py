"""From lm-eval's files to the rows of results.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import scores
from harness.errors import LoopError


def lm_eval_output(folder: Path, task: str, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results_2026-01-01T00-00-00.json").write_text(json.dumps({"configs": {task: {}}}))
    lines = (json.dumps(row) + "\n" for row in rows)
    (folder / f"samples_{task}_2026-01-01T00-00-00.jsonl").write_text("".join(lines))


def sample(text: str, score: float, prompt: str = "<|im_start|>assistant\n", **more: Any) -> dict[str, Any]:
    return {
        "doc": {},
        "arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": {}}},
        "resps": [[text]],
        "filter": "none",
        "metrics": ["exact_match", "closed_trace"],
        "exact_match": score,
        **more,
    }


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_holds_the_share_and_solves_wilson_s_equation(counts: tuple[int, int]) -> None:
    correct, n = counts
    low, high = scores.wilson(correct, n)
    p, z = correct / n, 1.959964
    assert 0 <= low <= p <= high <= 1
    for bound in (low, high):  # the two shares whose own standard error puts p at z: (p - b)^2 = z^2 b (1 - b) / n
        assert (p - bound) ** 2 == pytest.approx(z * z * bound * (1 - bound) / n, abs=1e-9)


def test_an_interval_of_nothing() -> None:
    with pytest.raises(ValueError, match="at least one"):
        scores.wilson(0, 0)


def test_an_unclosed_trace_is_wrong_whatever_the_task_says(tmp_path: Path) -> None:
    opened = "<|im_start|>assistant\n<think>\n"
    lm_eval_output(
        tmp_path,
        "mine",
        [
            sample("2+2=4\n</think>\n\n4", 1.0, opened),
            sample("2+2=4, so the answer is 4", 1.0, opened),  # right number, unfinished reasoning
            sample("4", 1.0),  # an instruct checkpoint's whole answer
            sample("<think>it is 4", 1.0),  # opened by the model itself
            sample("5", 0.0, trace_opened=True),
        ],
    )
    (row,) = scores.read(tmp_path, 2, "thinking", "owner/name")
    assert (row["iteration"], row["checkpoint"], row["task"]) == (2, "thinking", "mine")
    assert (row["n"], row["correct"], row["accuracy"]) == (5, 2, 0.4)
    assert (row["closed_traces"], row["truncated"]) == (0.2, 0.4)
    assert row["tokens_per_answer"] is None  # a hub id has no tokenizer at hand


def test_the_task_s_own_word_on_an_opened_trace_counts_first(tmp_path: Path) -> None:
    lm_eval_output(tmp_path, "mine", [sample("4", 1.0, doc={"trace_opened": True})])
    assert scores.read(tmp_path, 0, "thinking", "owner/name")[0]["correct"] == 0


def test_one_filter_counts_once(tmp_path: Path) -> None:
    lm_eval_output(tmp_path, "mine", [sample("4", 1.0), {**sample("4", 0.0), "filter": "other"}])
    assert scores.read(tmp_path, 0, "instruct", "owner/name")[0]["n"] == 1


def test_a_task_named_as_another_s_beginning(tmp_path: Path) -> None:
    lm_eval_output(tmp_path, "mini_prompts", [sample("</think>x", 0.0)])
    lm_eval_output(tmp_path, "mini", [sample("</think>x", 1.0), sample("y", 1.0)])
    assert len(list(scores.samples(tmp_path, "mini"))) == 2
    assert scores.closed_share(tmp_path, ["mini", "mini_prompts"]) == (2, 3)


def test_missing_output_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoopError, match="left no results"):
        scores.read(tmp_path, 0, "instruct", "owner/name")
    lm_eval_output(tmp_path, "mine", [sample("4", 1.0) | {"exact_match": [1, 2]}])
    with pytest.raises(LoopError, match="exact_match, is not a number"):
        scores.read(tmp_path, 0, "instruct", "owner/name")
