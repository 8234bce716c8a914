"""Rows of both shapes: what is stripped, what is left alone, what is dropped and why."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkswitch_plugin.trace_stripping.report import count
from thinkswitch_plugin.trace_stripping.rows import Layout, strip_chat_row, strip_sample_row

LAYOUT = Layout()
ASK = {"role": "user", "content": "Is <think>this</think> mine?"}


def said(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def answers(messages: list[dict[str, Any]]) -> list[Any]:
    return [turn["content"] for turn in messages if turn["role"] == "assistant"]


# --- chat rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "left", "dropped"),
    [
        ({"messages": [ASK, said("<think>r</think>a")]}, ["a"], None),
        ({"messages": [ASK, said("a")]}, ["a"], None),
        ({"messages": [ASK, said("<think>r</think>a"), ASK, said("s</think>b")]}, ["a", "b"], None),
        ({"messages": [ASK, said("<think>r"), ASK, said("<think>s</think>")]}, ["", ""], "unclosed"),
        ({"messages": [ASK, said("a"), ASK, said("<think>s</think>\n")]}, ["a", ""], "empty_answer"),
        ({"messages": [ASK, said("a")], "trace_opened": True}, [""], "unclosed"),
        ({"messages": [ASK, said("r</think>a")], "trace_opened": True}, ["a"], None),
        ({"messages": [ASK, said("a")], "trace_opened": None}, ["a"], None),
        # A field of its own for the trace: whoever wrote it has split the turn.
        ({"messages": [ASK, said("a", reasoning_content="r")]}, ["a"], None),
        ({"messages": [ASK, said("a", reasoning_content="r")], "trace_opened": True}, ["a"], None),
        ({"messages": [ASK, said("<think>r</think>a", reasoning_content="s")]}, ["a"], None),
        ({"messages": [ASK, said(None, reasoning_content="r")]}, [""], "empty_answer"),
        ({"messages": [ASK, said("a", reasoning_content="")], "trace_opened": True}, [""], "unclosed"),
        # A call is an answer.
        ({"messages": [ASK, said(None, tool_calls=[{"id": "1"}])]}, [""], None),
        ({"messages": [ASK, said("<think>r", tool_calls=[{"id": "1"}])]}, [""], "unclosed"),
        ({"messages": [ASK]}, [], "no_response"),
        ({"messages": []}, [], "no_response"),
    ],
)
def test_chat_row(row: dict[str, Any], left: list[str], dropped: str | None) -> None:
    stripped = strip_chat_row(row, LAYOUT)
    assert (answers(stripped.messages), stripped.dropped) == (left, dropped)


def test_an_assistant_turn_keeps_nothing_that_may_be_reasoning_under_another_name() -> None:
    turn = said("a", reasoning_content="r", thinking="r", reasoning="r", tool_calls=[1], name="x", train=False)
    stripped = strip_chat_row({"messages": [ASK, turn]}, Layout(train_flag="train"))
    assert stripped.messages[1] == said("a", tool_calls=[1], train=False)


def test_names_come_from_the_layout() -> None:
    layout = Layout("chat", "from", "value", ("thought",), "train", frozenset({"bot"}))
    row = {
        "chat": [{"from": "human", "value": "<think>"}, {"from": "bot", "value": "<think>r</think>a", "thought": "s"}]
    }
    stripped = strip_chat_row(row, layout)
    assert stripped.messages == [{"from": "human", "value": "<think>"}, {"from": "bot", "value": "a"}]
    assert stripped.read == ["s", "<think>r</think>a"]
    assert stripped.kept == ["a"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": None}, "messages is not a list of messages"),
        ({"messages": "[]"}, "messages is not a list of messages"),
        ({"messages": ["hi"]}, "messages is not a list of messages"),
        ({"messages": [ASK], "trace_opened": "yes"}, "trace_opened is 'yes'"),
        ({"messages": [said([{"type": "text", "text": "a"}])]}, "an assistant turn's content is a list, not text"),
        ({"messages": [said("a", reasoning_content=["r"])]}, "an assistant turn's reasoning_content is a list"),
    ],
)
def test_a_broken_chat_row_is_one_clear_line(row: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        strip_chat_row(row, LAYOUT)
    assert "\n" not in str(error.value)


turns = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "system", "tool", "assistant"]),
        "content": st.lists(st.sampled_from(["<think>", "</think>", "</THINK >", "§", " ", "x"]), max_size=6).map(
            "".join
        ),
    },
    optional={"reasoning_content": st.just("§")},
)


@given(st.lists(turns, max_size=6), st.booleans())
def test_other_turns_are_never_touched_and_order_is_kept(messages: list[dict[str, str]], opened: bool) -> None:
    stripped = strip_chat_row({"messages": messages, "trace_opened": opened}, LAYOUT)
    assert [turn["role"] for turn in stripped.messages] == [turn["role"] for turn in messages]
    for before, after in zip(messages, stripped.messages, strict=True):
        assert before["role"] == "assistant" or before == after


@given(st.lists(turns, max_size=6), st.booleans())
def test_a_kept_row_stripped_again_is_the_same(messages: list[dict[str, str]], opened: bool) -> None:
    once = strip_chat_row({"messages": messages, "trace_opened": opened}, LAYOUT)
    if once.dropped is None:
        assert strip_chat_row({"messages": once.messages}, LAYOUT).messages == once.messages


# --- sample rows -----------------------------------------------------------------------------------------------------


def sample(resps: Any, opened: Any = True, messages: Any = (ASK,), **doc: Any) -> dict[str, Any]:
    return {"doc": {"messages": list(messages), "trace_opened": opened, **doc}, "resps": resps}


def test_every_text_makes_one_conversation_in_order() -> None:
    stripped = list(strip_sample_row(sample([["r</think>a", "r"], ["s</think> "]]), LAYOUT))
    assert [row.dropped for row in stripped] == [None, "unclosed", "empty_answer"]
    assert stripped[0].messages == [ASK, said("a")]
    assert (stripped[0].read, stripped[0].kept) == (["r</think>a"], ["a"])


def test_an_instruct_checkpoints_answer_needs_no_trace() -> None:
    (stripped,) = strip_sample_row(sample([["a"]], opened=False), LAYOUT)
    assert (answers(stripped.messages), stripped.dropped) == (["a"], None)


def test_a_baseline_learns_the_answers_as_they_came_from_the_same_rows() -> None:
    doc = {"messages": [{"role": "user", "content": "q"}], "trace_opened": True}
    texts = ["so</think>\n\na", "<think>so</think>b", "cut off"]
    left = list(strip_sample_row({"doc": doc, "resps": [texts]}, Layout(), strip=False))
    assert [row.messages[-1]["content"] for row in left[:2]] == ["<think>\nso</think>\n\na", "<think>so</think>b"]
    assert [row.dropped for row in left] == [None, None, "unclosed"]
    assert left[0].kept == left[0].read == ["so</think>\n\na"]
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>so</think>a"}]}
    assert strip_chat_row(chat, Layout(), strip=False).messages == chat["messages"]
    cut = {"messages": [{"role": "assistant", "content": "<think>so"}]}
    assert strip_chat_row(cut, Layout(), strip=False).dropped == "unclosed"


@pytest.mark.parametrize("resps", [[], [[]], None])
def test_a_prompt_without_a_text_is_counted(resps: Any) -> None:
    assert [row.dropped for row in strip_sample_row(sample(resps), LAYOUT)] == ["no_response"]


def test_turns_that_came_with_the_prompt_are_stripped_but_not_trained_on() -> None:
    row = sample([["r</think>b"]], messages=[ASK, said("<think>r</think>a", reasoning_content="r"), ASK])
    (stripped,) = strip_sample_row(row, LAYOUT)
    assert stripped.messages == [ASK, said("a", thinkswitch_train=False), ASK, said("b")]
    assert stripped.kept == ["b"]


def test_a_prompt_without_an_answer_in_an_earlier_turn_drops_the_row() -> None:
    (stripped,) = strip_sample_row(sample([["r</think>b"]], messages=[ASK, said("<think>r"), ASK]), LAYOUT)
    assert stripped.dropped == "unclosed"


def test_messages_get_the_names_of_the_layout() -> None:
    layout = Layout("chat", "from", "value")
    (stripped,) = strip_sample_row(sample([["r</think>a"]]), layout)
    assert stripped.messages == [{"from": "user", "value": ASK["content"]}, {"from": "assistant", "value": "a"}]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"doc": {"question": "?"}, "resps": [["a"]]}, "doc.messages is missing or empty"),
        ({"doc": None, "resps": [["a"]]}, "doc.messages is missing or empty"),
        (sample([["a"]], messages=[]), "doc.messages is missing or empty"),
        (sample([["a"]], opened=None), "doc.trace_opened is None; say true or false"),
        (sample([["a"]], opened="false"), "doc.trace_opened is 'false'; say true or false"),
    ],
)
def test_a_broken_sample_row_is_one_clear_line(row: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        list(strip_sample_row(row, LAYOUT))


# --- the report ------------------------------------------------------------------------------------------------------


def test_the_line_names_rows_reasons_and_tokens() -> None:
    reasons = [None, "unclosed", None, "empty_answer", "unclosed"]
    report = count("x.jsonl", reasons, [10, 20, 10, 5, 5], [2, 0, 3, 0, 9])
    assert report.line() == (
        "kept 2 of 5 rows, dropped 3 (unclosed 2, empty_answer 1); removed 90.0% of the assistant tokens (45 of 50)"
    )


def test_the_line_without_drops_or_tokens() -> None:
    assert count("x", [None], [0], [0]).line() == (
        "kept 1 of 1 rows, dropped 0; removed 0.0% of the assistant tokens (0 of 0)"
    )


@pytest.mark.parametrize(
    ("dropped", "limit", "fine"), [(5, 0.5, True), (6, 0.5, False), (1, 0.0, False), (9, 1.0, True)]
)
def test_too_many_dropped_is_one_clear_line(dropped: int, limit: float, fine: bool) -> None:
    report = count("x.jsonl", ["unclosed"] * dropped + [None] * (10 - dropped), [1] * 10, [1] * 10)
    if fine:
        report.check(limit)
        return
    with pytest.raises(
        ValueError, match=rf"^trace stripping: x.jsonl: kept .*unclosed {dropped}.*max_dropped_fraction"
    ) as error:
        report.check(limit)
    assert "\n" not in str(error.value)


def test_nothing_left_is_an_error_whatever_the_limit() -> None:
    with pytest.raises(ValueError, match=r"x.jsonl: kept 0 of 2 rows, dropped 2 .*: nothing is left to train on; give"):
        count("x.jsonl", ["unclosed", "empty_answer"], [1, 1], [0, 0]).check(1.0)
