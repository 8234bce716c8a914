"""`split_trace` clause by clause, against an obvious reference, and on long texts."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkswitch_plugin.trace_stripping import Trace, split_trace, template_opens_trace, trace, trace_end

THINK_AND_REASON = (("<think>", "</think>"), ("<reasoning>", "</reasoning>"))


@pytest.fixture(autouse=True)
def tags_are_compiled_anew() -> None:
    """For each test, as in a process of its own: which tests see a change of a tag's pattern is not chance then."""
    trace._compile.cache_clear()


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        # One block, then the answer.
        ("<think>r</think>a", False, Trace("r", "a", "closed")),
        ("<think>\nr\n</think>\n\na\n", False, Trace("r", "a", "closed")),
        ("<think></think>a", False, Trace("", "a", "closed")),
        # The template opened the trace: only the closing tag is there.
        ("r</think>a", False, Trace("r", "a", "closed")),
        ("r</think>a", True, Trace("r", "a", "closed")),
        ("</think>a", True, Trace("", "a", "closed")),
        # No tag.
        ("a", False, Trace(None, "a", "no_trace")),
        (" a b\n", False, Trace(None, "a b", "no_trace")),
        ("a", True, Trace("a", None, "unclosed")),
        ("", True, Trace("", None, "unclosed")),
        # Never closed.
        ("<think>r", False, Trace("r", None, "unclosed")),
        ("<think>r", True, Trace("r", None, "unclosed")),
        ("a<think>r", False, Trace("r", None, "unclosed")),
        ("<think>r</think>a<think>s", False, Trace("r\ns", None, "unclosed")),
        ("r</think>a<think>s", True, Trace("r\ns", None, "unclosed")),
        # Several blocks; text before and between them.
        ("<think>r</think>a<think>s</think>b", False, Trace("r\ns", "ab", "closed")),
        ("a <think>r</think>b", False, Trace("r", "a b", "closed")),
        ("a<think>r</think>", False, Trace("r", "a", "closed")),
        # Nested.
        ("<think>r<think>s</think>t</think>a", False, Trace("r\ns\nt", "a", "closed")),
        ("<think><think>r</think></think>a", False, Trace("r", "a", "closed")),
        ("<think>r<think>s</think>t", False, Trace("r\ns\nt", None, "unclosed")),
        ("r<think>s</think>t</think>a", True, Trace("r\ns\nt", "a", "closed")),
        ("r<think>s</think>t", True, Trace("r\ns\nt", None, "unclosed")),
        # The model repeats the template's tag.
        ("<think>r</think>a", True, Trace("r", "a", "closed")),
        ("\n <think>r</think>a", True, Trace("r", "a", "closed")),
        # More closing tags than opening ones: the last one ends the trace.
        ("<think>r</think>s</think>a", False, Trace("r\ns", "a", "closed")),
        ("r</think>s</think>a", True, Trace("r\ns", "a", "closed")),
        ("</think>a<think>r</think>b", False, Trace("r", "ab", "closed")),
        # Nothing but white space.
        ("", False, Trace(None, None, "empty_answer")),
        (" \n\t", False, Trace(None, None, "empty_answer")),
        ("<think>r</think>", False, Trace("r", None, "empty_answer")),
        ("<think>r</think> \n ", False, Trace("r", None, "empty_answer")),
        ("r</think>", True, Trace("r", None, "empty_answer")),
        # Upper case, attributes, white space.
        ("<THINK>r</Think>a", False, Trace("r", "a", "closed")),
        ('<think type="deep"\n level=3>r</think >a', False, Trace("r", "a", "closed")),
        ("<think/>r</think>a", False, Trace("r", "a", "closed")),
        # Cut off inside a tag.
        ("<think", False, Trace("", None, "unclosed")),
        ("<think a=", False, Trace("", None, "unclosed")),
        ("<think>r</think", False, Trace("r", None, "unclosed")),
        ("r</think", False, Trace("r", None, "unclosed")),
        ("r</think s</think>a", False, Trace("r", "a", "closed")),
        # Not tags.
        ("<thinking>a</thinking>", False, Trace(None, "<thinking>a</thinking>", "no_trace")),
        ("1 < 2 > 0", False, Trace(None, "1 < 2 > 0", "no_trace")),
        ("think /think", False, Trace(None, "think /think", "no_trace")),
        # What removing a block would join into a tag.
        ("<thi<think>r</think>nk>s", False, Trace("r", None, "unclosed")),
    ],
)
def test_clause(text: str, opened: bool, expected: Trace) -> None:
    assert split_trace(text, opened) == expected


@pytest.mark.parametrize(
    ("text", "tags", "expected"),
    [
        ("<reasoning>r</reasoning>a", [["<reasoning>", "</reasoning>"]], Trace("r", "a", "closed")),
        ("<think>a", [["<reasoning>", "</reasoning>"]], Trace(None, "<think>a", "no_trace")),
        ("[THINK]r[/think]a", [["[THINK]", "[/THINK]"]], Trace("r", "a", "closed")),
        (
            "<|begin_of_thought|>r<|end_of_thought|>a",
            [["<|begin_of_thought|>", "<|end_of_thought|>"]],
            Trace("r", "a", "closed"),
        ),
        ("◁think▷r◁/think▷a", [["◁think▷", "◁/think▷"]], Trace("r", "a", "closed")),
        ("<think>r</think>a<reasoning>s</reasoning>b", THINK_AND_REASON, Trace("r\ns", "ab", "closed")),
        ("<think>r<reasoning>s</think>t", THINK_AND_REASON, Trace("r\ns\nt", None, "unclosed")),
        ("<think>r</reasoning>s", THINK_AND_REASON, Trace("r\ns", None, "unclosed")),
        ("(r)a", [["(", ")"]], Trace("r", "a", "closed")),
        ("<t>r<tt>s</tt>a", [["<tt", "</tt>"], ["<t", "</t>"]], Trace("r\n>s", None, "unclosed")),
    ],
)
def test_other_tags(text: str, tags: Any, expected: Trace) -> None:
    split = split_trace(text, tags=tags)
    assert (split.answer, split.status) == (expected.answer, expected.status)


@pytest.mark.parametrize(
    ("tags", "bad"),
    [
        ([], []),
        ("<think>", "<think>"),
        (["<think>"], "<think>"),
        ([["<think>"]], ["<think>"]),
        ([["<think>", "</think>"], ["a", "A"]], ["a", "A"]),
        ([["", "b"]], ["", "b"]),
        ([["b", " "]], ["b", " "]),
        ([[1, 2]], [1, 2]),
        ([["a", 2]], ["a", 2]),
    ],
)
def test_bad_tags_are_one_clear_line(tags: Any, bad: object) -> None:
    with pytest.raises(ValueError, match=r"^tags: .* write them as \[\[\"<think>\", \"</think>\"\]\]$") as error:
        split_trace("a", tags=tags)
    assert str(error.value).startswith(f"tags: {bad!r} is not a pair of different tags")


@pytest.mark.parametrize(
    ("text", "opened", "trace"),
    [
        ("r</think>a", False, "r</think>"),
        ("r</THINK >a", True, "r</THINK >"),
        ('<think type="deep">r</think>\n\na', False, '<think type="deep">r</think>'),
        ("<think>r<think>s</think>t</think>a", False, "<think>r<think>s</think>t</think>"),
        ("r<think>s</think>t</think>a", True, "r<think>s</think>t</think>"),
        # A trace that speaks of the tags.
        ("it ends with </think>, then\n</think>a", True, "it ends with </think>, then\n</think>"),
        (
            "<think>between <think> and </think> I add</think>a",
            False,
            "<think>between <think> and </think> I add</think>",
        ),
        ("<think>r</think>a<think>s</think>b", False, "<think>r</think>a<think>s</think>"),
        ("r</think>", True, "r</think>"),
        # Not over, or none.
        ("r<think>s</think>t", True, None),
        ("r</think>a<think>s", False, None),
        ("r</think", False, None),
        ("a", False, None),
        ("a", True, None),
        ("", False, None),
    ],
)
def test_where_a_trace_is_over(text: str, opened: bool, trace: str | None) -> None:
    end = trace_end(text, opened)
    assert (None if end is None else text[:end]) == trace


def test_where_a_trace_is_over_that_no_template_opened() -> None:
    assert trace_end("a<think>b</think>c") == len("a<think>b</think>")


def test_where_a_trace_of_other_tags_is_over() -> None:
    reason = [["<reasoning>", "</reasoning>"]]
    assert trace_end("a<reasoning>b</reasoning>c", False, reason) == len("a<reasoning>b</reasoning>")
    assert trace_end("r</reasoning>a<reasoning>s", False, reason) is None
    assert trace_end("r</think>a", False, reason) is None


# --- properties ------------------------------------------------------------------------------------------------------

FRAGMENTS = [
    *("<think>", "</think>", "<THINK a='b'>", "</Think >", "<reasoning>", "</reasoning>", "<thinking>", "</thinking>"),
    *("<think", "</think", "<thi", "nk>", "</", "<", ">", "/", "think", " ", "\n", "a", "b"),
]
soup = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=14).map("".join)


def reference(text: str, opened: bool, names: tuple[str, ...]) -> tuple[str | None, str]:
    """The rules of the module's docstring, one character at a time, without a thought for speed."""
    events: list[tuple[int, int, str, str]] = []  # from, to, kind, name
    at = 0
    while at < len(text):
        for name in names:
            for kind, begin in (("close", f"</{name}"), ("open", f"<{name}")):
                after = at + len(begin)
                if text[at:after].lower() != begin or re.match(r"[\w:.-]", text[after : after + 1]):
                    continue
                end = after
                while end < len(text) and text[end] not in "<>":
                    end += 1
                complete = text[end : end + 1] == ">"
                end += complete
                events.append((at, end, kind if complete or kind == "open" else "cut", name))
        at = events[-1][1] if events and events[-1][0] == at else at + 1

    template = opened
    if opened and events and events[0][2] == "open" and not text[: events[0][0]].strip():
        template = False
    reasoning = [False] * len(text)
    open_now = dict.fromkeys(names, 0)
    position = 0
    for start, end, kind, name in [*events, (len(text), len(text), "end", "")]:
        for index in range(position, start):
            reasoning[index] = template or any(open_now.values())
        for index in range(start, end):
            reasoning[index] = True
        if kind == "open":
            open_now[name] += 1
        elif kind in ("close", "cut") and open_now[name]:
            open_now[name] -= kind == "close"
        elif kind in ("close", "cut"):
            reasoning[:end] = [True] * end
            template = kind == "cut"
        position = end
    answer = "".join(char for char, hidden in zip(text, reasoning, strict=True) if not hidden).strip()
    joined = any(re.search(rf"</?{name}(?![\w:.-])", answer, re.IGNORECASE) for name in names)
    if template or any(open_now.values()) or joined:
        return None, "unclosed"
    if not answer:
        return None, "empty_answer"
    return answer, "closed" if events else "no_trace"


@given(soup, st.booleans(), st.booleans())
def test_parity_with_the_reference(text: str, opened: bool, two_pairs: bool) -> None:
    tags = THINK_AND_REASON if two_pairs else THINK_AND_REASON[:1]
    names = ("think", "reasoning") if two_pairs else ("think",)
    split = split_trace(text, opened, tags)
    assert (split.answer, split.status) == reference(text, opened, names)


@given(soup | st.text(), st.booleans())
def test_stripping_twice_changes_nothing(text: str, opened: bool) -> None:
    answer = split_trace(text, opened).answer
    if answer is not None:
        assert split_trace(answer) == Trace(None, answer, "no_trace")


@given(soup)
def test_an_answer_holds_no_tag_and_status_says_whether_there_is_one(text: str) -> None:
    split = split_trace(text)
    assert (split.answer is not None) == (split.status in ("closed", "no_trace"))
    assert split.answer is None or (split.answer.strip() and "<think>" not in split.answer.lower())


@given(soup, st.booleans())
def test_a_trace_is_over_before_an_answer_and_behind_every_tag(text: str, opened: bool) -> None:
    end, split = trace_end(text, opened), split_trace(text, opened)
    assert (end is None) == (split.status in ("unclosed", "no_trace") or not text.strip())
    if end is not None:
        assert split_trace(text[:end], opened).reasoning == split.reasoning
        assert split_trace(text[end:]).status in ("no_trace", "empty_answer")
        assert (split.answer or "").endswith(text[end:].strip())


opening = st.sampled_from(["<think>", "<THINK>", '<think a="1">'])
closing = st.sampled_from(["</think>", "</Think>", "</think >"])
# All reasoning is made of this character, and nothing else is.
SECRET = "§"
secrets = st.text(alphabet=SECRET + "\n ", max_size=5)
blocks = st.recursive(
    st.builds(lambda a, r, b: a + r + b, opening, secrets, closing),
    lambda inner: st.builds(lambda a, r, x, s, b: a + r + x + s + b, opening, secrets, inner, secrets, closing),
    max_leaves=4,
)
spoken = st.text(alphabet="ab1. \n", max_size=5)
traced = st.lists(st.tuples(spoken, blocks), min_size=1, max_size=3)


@given(traced, spoken, st.integers(0, 200))
def test_no_reasoning_survives_wherever_the_text_is_cut(turns: list[tuple[str, str]], end: str, cut: int) -> None:
    text = "".join(said + block for said, block in turns) + end
    whole = split_trace(text)
    assert whole.answer == (("".join(said for said, _ in turns) + end).strip() or None)
    assert whole.status == ("closed" if whole.answer else "empty_answer")
    assert SECRET not in (split_trace(text[:cut]).answer or "")


@given(secrets, st.lists(st.tuples(secrets, blocks), max_size=2), closing, spoken, st.integers(0, 200))
def test_no_reasoning_survives_where_the_template_opened_the_trace(
    first: str, nested: list[tuple[str, str]], close: str, end: str, cut: int
) -> None:
    text = SECRET + first + "".join(said + block for said, block in nested) + close + end
    whole = split_trace(text, opened=True)
    assert whole == split_trace(text), "a closing tag shows by itself that the template opened the trace"
    assert whole.answer == (end.strip() or None)
    assert SECRET not in (split_trace(text[:cut], opened=True).answer or "")


# --- long texts ------------------------------------------------------------------------------------------------------

SIZE = 10_000_000


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "unit",
    [
        "<think>",
        "</think>",
        "<think></think>",
        "<think",
        "</think",
        "<",
        "< ",
        "<think a b c",
        "</think ",
        "<thinking>",
    ],
)
def test_ten_megabytes_are_read_in_linear_time(unit: str) -> None:
    split_trace(unit * (SIZE // len(unit)))


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "text",
    [
        "<think " + 'a="b" ' * (SIZE // 6),
        "<think" + " " * SIZE,
        "<think>" * (SIZE // 15) + "</think>" * (SIZE // 15) + "a",
    ],
    ids=["attributes", "spaces", "nested"],
)
def test_ten_megabytes_of_one_construct_are_read_in_linear_time(text: str) -> None:
    assert split_trace(text).status == ("closed" if text.endswith("a") else "unclosed")


# --- templates -------------------------------------------------------------------------------------------------------


class Template:
    """The two calls `template_opens_trace` makes of a tokenizer."""

    def __init__(self, system: str, generation: str) -> None:
        self.chat_template = "set"
        self.system, self.generation = system, generation

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        if not {turn["role"] for turn in messages} <= {"user", "assistant"}:
            raise ValueError("as many a template says of a role that it does not know")
        asked = self.system + "".join(f"<{turn['role']}>{turn['content']}" for turn in messages)
        return asked + self.generation * add_generation_prompt


@pytest.mark.parametrize(
    ("system", "generation", "opens"),
    [
        ("", "<assistant>\n", False),
        ("", "<assistant>\n<think>\n", True),
        ("", "<assistant>\n<THINK>\nOkay,", True),
        ("", "<assistant>\n<think>\n\n</think>\n\n", False),
        ("Put your thoughts after <think>.", "<assistant>\n", False),
        ("Put your thoughts before </think>.", "<assistant>\n<think>", True),
    ],
)
def test_what_a_template_opens(system: str, generation: str, opens: bool) -> None:
    assert template_opens_trace(Template(system, generation)) is opens


def test_a_template_may_open_other_tags_and_what_has_none_opens_nothing() -> None:
    template = Template("", "<assistant>\n<reasoning>\n")
    assert template_opens_trace(template, [["<reasoning>", "</reasoning>"]])
    assert not template_opens_trace(template)
    assert not template_opens_trace(object())


def test_a_real_tokenizer_opens_what_its_template_opens(tokenizer: Any) -> None:
    thinking = copy.copy(tokenizer)
    thinking.chat_template = tokenizer.chat_template.replace(
        "'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\n'"
    )
    bare = copy.copy(tokenizer)
    bare.chat_template = None
    assert [template_opens_trace(one) for one in (tokenizer, thinking, bare)] == [False, True, False]


def test_importing_it_stays_light() -> None:
    code = (
        "import sys; from thinkswitch_plugin.trace_stripping import split_trace, template_opens_trace; "
        "print([m for m in ('axolotl', 'torch', 'transformers', 'datasets', 'pydantic') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
