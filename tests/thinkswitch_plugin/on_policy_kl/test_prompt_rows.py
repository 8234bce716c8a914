"""Rows as the student and the teacher read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from axolotl.utils.dict import DictDefault

from thinkswitch_plugin.facts import attached
from thinkswitch_plugin.on_policy_kl import strategy
from thinkswitch_plugin.on_policy_kl.report import sentence

PLUGIN = "thinkswitch_plugin.on_policy_kl.OnPolicyKLPlugin"
ASK = [{"role": "user", "content": "Compute 24+26-13."}]


def prepared(rows: list[dict[str, Any]], tokenizer: Any, recipes: Path, longest: int = 256, **block: Any) -> Any:
    """The rows, as the strategy leaves them."""
    config = {"teacher": str(recipes / "mini/thinking"), "context": "trace", "max_new_tokens": 16, **block}
    cfg = DictDefault({"plugins": [PLUGIN], "on_policy_kl": config, "sequence_len": longest})
    return strategy.load(tokenizer, cfg, {"path": "mine.jsonl"}).wrap_dataset(rows)


def test_a_sample_row_gives_the_teacher_its_trace_and_the_student_the_question(tokenizer: Any, recipes: Path) -> None:
    texts = ["24+26=50\n50-13=37\n</think>\n\n\\boxed{37}", "24+26=50\n50", "24+26=51\n</think>\\boxed{38}"]
    rows = [{"doc": {"messages": ASK, "trace_opened": True, "answer": "gold"}, "resps": [texts]}]
    found = prepared(rows, tokenizer, recipes)
    opening = "<|im_start|>user\nCompute 24+26-13.<|im_end|>\n<|im_start|>assistant\n"
    assert [tokenizer.decode(ids) for ids in found["input_ids"]] == [opening, opening]
    assert [tokenizer.decode(ids) for ids in found["teacher_input_ids"]] == [
        f"{opening}<think>\n24+26=50\n50-13=37\n</think>\n\n",
        f"{opening}<think>\n24+26=51\n</think>",
    ]
    assert found["teacher_thinks"] == [False, False]
    assert found["labels"] == found["input_ids"]


@pytest.mark.parametrize(
    ("text", "opened", "trace"),
    [
        ("r</THINK >\n\n37", True, "r</THINK >\n\n"),
        ("<think>r <think>s</think> t</think>37", False, "<think>r <think>s</think> t</think>"),
        ("I end with </think>, then\n</think>37", True, "I end with </think>, then\n</think>"),
        ("r <think>s</think> and on", True, None),
        ("37", False, None),
    ],
)
def test_the_trace_in_a_row_is_what_trace_stripping_takes_out(text: str, opened: bool, trace: str | None) -> None:
    assert strategy.trace_of(text, opened, [("<think>", "</think>")]) == trace


def test_what_the_rows_gave_is_counted(tokenizer: Any, recipes: Path) -> None:
    doc = {"messages": ASK, "trace_opened": True}
    rows = [{"doc": doc, "resps": [["r</think>37", "s</think>38"]]}, {"doc": doc, "resps": [["cut off"]]}]
    (counts,) = attached(prepared([*rows, {"problem": "1+1"}], tokenizer, recipes), "on_policy_kl")
    assert counts == {"path": "mine.jsonl", "prompts": 3, "with_trace": 2, "unclosed": 1, "too_long": 0}
    assert sentence({"datasets": [counts, counts]}) == (
        "6 prompts, 4 with a trace for the teacher; left out 2 whose trace never closed"
    )
    assert sentence({"datasets": [{"path": "x", "prompts": 5, "with_trace": 0, "unclosed": 0}]}) == "5 prompts"


def test_a_row_s_own_trace_is_no_longer_than_the_teacher_may_write(tokenizer: Any, recipes: Path) -> None:
    doc = {"messages": ASK, "trace_opened": True}
    traces = ["24+26=50\n</think>", "24+26=50\n50-13=37\n</think>"]
    rows = [{"doc": doc, "resps": [traces]}, {"doc": doc, "resps": [traces[1:]]}]
    longest = len(tokenizer(traces[0], add_special_tokens=False)["input_ids"])
    found = prepared(rows, tokenizer, recipes, trace_max_new_tokens=longest, max_dropped_fraction=1)
    assert [tokenizer.decode(ids).partition("<think>\n")[2] for ids in found["teacher_input_ids"]] == traces[:1]
    (counts,) = attached(found, "on_policy_kl")
    assert counts == {"path": "mine.jsonl", "prompts": 1, "with_trace": 1, "unclosed": 0, "too_long": 2}
    assert sentence({"datasets": [counts, {**counts, "unclosed": 1}]}) == (
        "2 prompts, 2 with a trace for the teacher; left out 1 whose trace never closed and 4 whose trace has more "
        "than trace_max_new_tokens"
    )
    with pytest.raises(ValueError, match=r"no prompt is left; 3 traces have more than \d+ tokens: raise trace_max_new"):
        prepared(rows, tokenizer, recipes, trace_max_new_tokens=longest - 1)


@pytest.mark.parametrize(
    ("texts", "block", "said"),
    [
        (
            ["short</think>37", *["a trace of more</think>37"] * 2],
            {},
            r"2 traces have more than \d+ tokens: raise trace_max",
        ),
        (["short</think>37", "cut off", "cut off too"], {}, "give the model more tokens to close its traces"),
        (
            ["short</think>37", "cut off"],
            {"max_dropped_fraction": 0.4},
            "give the model more tokens to close its traces",
        ),
        (["short</think>37", "cut off"], {}, None),  # a half is let go
    ],
)
def test_a_dataset_of_which_too_little_is_left_is_refused(
    tokenizer: Any, recipes: Path, texts: list[str], block: dict[str, Any], said: str | None
) -> None:
    rows = [{"doc": {"messages": ASK, "trace_opened": True}, "resps": [[text]]} for text in texts]
    longest = len(tokenizer(texts[0].removesuffix("37"), add_special_tokens=False)["input_ids"])
    block = {**block, "trace_max_new_tokens": longest}
    if said is None:
        assert len(prepared(rows, tokenizer, recipes, **block)) == 1
        return
    counts = r"1 prompts, 1 with a trace for the teacher; left out \d whose trace [a-z_ ]+"
    bound = rf", over max_dropped_fraction {block.get('max_dropped_fraction', 0.5)}; {said}"
    with pytest.raises(
        ValueError, match=f"^on_policy_kl: mine.jsonl: {counts}{bound}.*, or raise on_policy_kl: max_"
    ) as e:
        prepared(rows, tokenizer, recipes, **block)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("row", [{"problem": ASK[0]["content"]}, {"prompt": ASK[0]["content"]}, {"messages": ASK}])
def test_a_prompt_alone_leaves_the_thinking_to_the_teacher(tokenizer: Any, recipes: Path, row: dict[str, Any]) -> None:
    found = prepared([{**row, "answer": "37"}], tokenizer, recipes, trace_max_new_tokens=50)
    assert found["teacher_thinks"] == [True]
    assert tokenizer.decode(found["teacher_input_ids"][0]).endswith("assistant\n<think>\n")
    assert "37" not in tokenizer.decode(found["teacher_input_ids"][0] + found["input_ids"][0])


def test_without_a_trace_both_read_the_same(tokenizer: Any, recipes: Path) -> None:
    rows = [{"doc": {"messages": ASK}, "resps": [["never closed"]]}]
    found = prepared(rows, tokenizer, recipes, context="prompt")
    assert found["teacher_input_ids"] == found["input_ids"]
    assert found["teacher_thinks"] == [False]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"problem": "1+1"}, {"topic": "1+1"}], r"row 2: the row has no prompt \(its keys: topic\)"),
        ([{"problem": " "}], "row 1: `problem` is empty"),
        ([{"doc": {"messages": ASK}, "resps": [["a trace that never closes"]]}], "no prompt is left"),
        (
            [{"problem": "1+1"}, {"problem": "1+" * 120}],
            r"row 2: the prompt has \d+ tokens and the answer may have 16: ",
        ),
    ],
)
def test_bad_rows_are_one_line_with_their_number(tokenizer: Any, recipes: Path, rows: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"^on_policy_kl: mine.jsonl: {said}") as caught:
        prepared(rows, tokenizer, recipes)
    assert "\n" not in str(caught.value)


def test_the_type_needs_the_plugin(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="needs `plugins: "):
        strategy.load(tokenizer, DictDefault({"sequence_len": 8}), {"path": "mine.jsonl"})
