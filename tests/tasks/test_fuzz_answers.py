"""Answers as nobody would write them, through stripping and the graders: no error, no hang; nothing wrong is right."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import mutation
import pytest

from thinkswitch_plugin.trace_stripping import split_trace, trace_end

TAG = re.compile(r"</?think(?![\w:.-])", re.IGNORECASE)
TRACES = [
    "",
    "<think>\nTwo and two, 13.\n</think>\n\n",
    "so it is 13\n</think>\n",
    "<think>a<think>b</think>c</think>",
    "<think>cut",
]
SAID = [
    *(r"\boxed{277}", r"The answer is \boxed{m+n=277}.", r"$\boxed{\text{277}}$", "Therefore $m+n = 277$.", "277"),
    *("**277**", "The answer is 277, since there are 3 cases.", "1. There are 200.\n2. There are 77.\n\nIn total 277."),
    *(r"\boxed{1,277}", r"\boxed{N \equiv 277 \pmod{1000}}", r"\boxed{\frac{277}{2}}", "Answer: yes", "maybe"),
    *("the decision is **no**", "So, no.", r"\boxed{(1, 2) \cup [3, \infty)}", r"\boxed{x=3, y=\sqrt{2}}"),
    *(r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\boxed{62.5\%}", "No difference was found; the answer is maybe."),
    *("Answer:\n277 cm", "A\n\n- 1\n- 277\n", r"\boxed{}", r"\fbox{277}", "y" * 500),
]
CORPUS = [trace + said for trace in TRACES for said in SAID]
DIGITS = {ord(a): b for a, b in zip("٠١٢٣٤٥٦٧٨٩", "0123456789", strict=True)}


def looked_at(number: int, answers: Any) -> None:
    """All that must hold of one answer, whatever it is."""
    chance = random.Random(number)
    text = mutation.text(chance, CORPUS)
    for opened in (False, True):
        with mutation.in_time((number, text)):
            found = split_trace(text, opened)
            end = trace_end(text, opened)
        where = f"{number}, opened {opened}: {text!r:.2000}"
        assert (found.answer is None) == (found.status in ("unclosed", "empty_answer")), where
        if found.answer is not None:
            assert not TAG.search(found.answer), where
            assert found.answer == found.answer.strip() != "", where
            assert (
                split_trace(found.answer) == (None, found.answer, "no_trace")
                or split_trace(found.answer).answer == found.answer
            )
            if end is not None:
                assert not TAG.search(text[end:]), where
                assert found.answer.endswith(text[end:].strip()), where
        else:
            assert end is None or found.status == "empty_answer" or TAG.search(text), where
        doc = {"answer": "277", "trace_opened": opened}
        with mutation.in_time((number, text)):
            graded = answers.grade_integer(doc, [text])
        assert set(graded.values()) <= {0, 1}, where
        assert graded["truncated"] == (found.status == "unclosed"), where
        if graded["exact_match"]:  # the digits stand together in what was answered, nothing but their marks between
            digits = re.sub(r"[^\w.]|\\[a-z]+|(?<=\d)\.0*(?!\d)", "", (found.answer or "").translate(DIGITS))
            assert "277" in digits, where
        decided = {"yes": 0, "no": 0, "maybe": 0}
        for word in decided:
            with mutation.in_time((number, text)):
                decided[word] = answers.grade_decision({**doc, "answer": word}, [text])["exact_match"]
            assert not decided[word] or word in (found.answer or "").lower(), where
        assert sum(decided.values()) <= 1, where


@pytest.mark.parametrize("numbers", [range(100), pytest.param(range(100_000), marks=pytest.mark.slow)], ids=len)
def test_answers(answers: ModuleType, numbers: range) -> None:
    for number in numbers:
        looked_at(number, answers)


@pytest.mark.parametrize("count", [10, pytest.param(1_000, marks=pytest.mark.slow)])
def test_boxed_mathematics(task_module: Callable[[str], ModuleType], count: int) -> None:
    """By the process that verifies: what it cannot decide takes its few seconds, is wrong, and costs the next none."""
    grading = task_module("tah_math/grading.py")
    golds = [
        "277",
        r"\frac{1}{2}",
        r"(1, 2) \cup [3, \infty)",
        r"3, \sqrt{2}",
        "62.5",
        r"\begin{pmatrix}1\\2\end{pmatrix}",
    ]
    for number in range(count):
        chance = random.Random(number)
        text, gold = mutation.text(chance, CORPUS), chance.choice(golds)
        with mutation.in_time((number, text)):
            graded = grading.grade_boxed({"answer": gold, "trace_opened": False}, [text])
        if graded["exact_match"]:
            assert "box" in (split_trace(text).answer or ""), (number, text)
            assert set(re.findall(r"[1-9]", gold)) & set((split_trace(text).answer or "").translate(DIGITS)), (
                number,
                text,
            )
    assert grading.same("277", "277")
    assert not grading.same("277", "278")
