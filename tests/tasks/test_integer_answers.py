"""Grading of integers as models write them; which tasks ask for one, `test_task_runs.py` knows."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

# All for the gold answer 277, after no trace or a closed one.
RIGHT = [
    r"\boxed{277}",
    r"\boxed{277}.",
    r"$\boxed{277}$",
    r"**Final Answer:** $\boxed{277}$",
    r"\[\boxed{277}\]",
    r"\boxed{ 277 }",
    "\\boxed{\n277\n}",
    r"\boxed 277.",
    r"\boxed 277 out of 1000",
    r"\fbox{277}",
    "boxed{277}",
    r"\boxed{0277}",
    r"\boxed{277.0}",
    r"\boxed{277.}",
    r"\boxed{+277}",
    r"\boxed{$277$}",
    r"\boxed{**277**}",
    r"\boxed{(277)}",
    r"\boxed{\text{277}}",
    r"\boxed{\mathbf{277}}",
    r"\boxed{\textbf{\text{277}}}",
    r"\boxed{\displaystyle 277}",
    r"\boxed{277^\circ}",
    r"\boxed{277^{\circ}}",
    r"\boxed{277°}",
    r"\boxed{277\%}",
    r"\boxed{277 \text{ cm}}",
    r"\boxed{277\,\text{degrees}}",
    r"\boxed{m+n=277}",
    r"\boxed{m + n = 100 + 177 = 277}",
    r"\boxed{N \equiv 277 \pmod{1000}}",
    r"\boxed{277 \pmod{1000}}",
    r"\boxed{277 \bmod 1000}",
    r"\boxed{277\pmod{1000}}",
    r"\boxed{\boxed{277}}",
    r"\boxed{{277}}",
    r"\boxed{{\bf 277}}",
    r"\boxed{\Large 277}",
    r"\boxed{\left( 277 \right)}",
    r"\boxed{a_{10} = 277}",
    r"First $\boxed{5}$, then $\boxed{277}$.",
    r"\boxed{277}, which is 5 more than 272. The answer is not 272.",
    r"The box \boxed{} is for the answer: \boxed{277}, not for \boxed{}",
    r"\boxed{277} ✓",
    "277",
    "277.",
    "$277$",
    "**277**",
    "`277`",
    "277.0",
    "0277",
    "The answer is 277.",
    "The answer is: 277",
    "Answer: 277",
    "**Answer:** 277",
    "**Answer**: $277$",
    "### Final Answer\n\n277",
    "### Final Answer:\n\n$$277$$",
    "The final answer is\n\\[\n277\n\\]",
    "The final answer is $\\mathbf{277}$. I hope it is correct.",
    "The answer to the problem is therefore **277**.",
    "The answer (an integer from 0 to 999) is 277.",
    "The answer is 277, since there are 3 cases.",
    "The answer is $m+n = 77 + 200 = 277$.",
    "The answer is 200 + 77 = 277.",
    "The answer is not 276 but 277.",
    "At first it seems that the answer is 276. Correcting for 0, the answer is 277.",
    "Therefore $m+n = 277$.",
    "So we get p + q = 260 + 17 = 277.",
    "1. There are 200 of the first kind.\n2. There are 77 of the second.\n\nIn total 277.",
    "Hence there are 277 such integers.",
    "x = 277\n\n",
    r"Thus $N \equiv 277 \pmod{1000}$.",
    "So 277 is the remainder when N is divided by 1000.",
    "Total:\n- 277",
    "Result → 277",
    "So N = 277, which has 3 digits.",
    r"$N \equiv 277\pmod{1000}$",
    "Total:\n1. 277",
    "It is 277.\n1. By symmetry.",
]
WRONG = [
    r"\boxed{2770}",
    r"\boxed{27}",
    r"\boxed{-277}",
    "\\boxed{−277}",
    r"\boxed{277.5}",
    r"\boxed{2.77}",
    r"\boxed{277/2}",
    r"\boxed{\frac{277}{1}}",
    r"\boxed{\dfrac{1}{277}}",
    r"\boxed{277x}",
    r"\boxed{n277}",
    r"\boxed{x_{277}}",
    r"\boxed{10^{277}}",
    r"\boxed{200 + 77}",
    r"\boxed{\pm 277}",
    r"\boxed{2^{277}}",
    r"\boxed{277!}",
    r"\boxed{\sqrt{277}}",
    r"\boxed{276, 277}",
    r"\boxed{277 \text{ or } 278}",
    r"\boxed{m = 200, n = 277}",
    r"\boxed{277 3rds}",
    r"\boxed{\text{no such integer}}",
    r"\boxed{277}, wait, no: \boxed{278}",
    r"The answer is 277, so \boxed{278}",
    r"\boxed{277",
    r"The first part is \boxed{277}, so the second is \boxed{2",
    "2770",
    "-277",
    "−277",
    "The answer is -277.",
    "The answer is 2770.",
    "x = -277",
    "The answer is 277.5.",
    "The answer is not 277.",
    "The answer is 276. One might think of 277.",
    "I cannot solve this problem.",
    "",
    "two hundred seventy-seven",
]


def grade(answers, gold: int | str, text: str | None, opened: bool) -> dict[str, int]:
    return answers.grade_integer({"answer": gold, "trace_opened": opened}, [text])


@pytest.mark.parametrize("text", RIGHT)
def test_right_answers_count(answers, text: str) -> None:
    assert grade(answers, 277, text, False) == {"exact_match": 1, "closed_trace": 0, "truncated": 0}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_answers_do_not_count(answers, text: str) -> None:
    assert grade(answers, 277, text, False) == {"exact_match": 0, "closed_trace": 0, "truncated": 0}


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        (73, r"\boxed{073}"),
        (73, "The answer is 073."),
        (7, r"\boxed{007}"),
        (0, r"\boxed{0}"),
        (0, r"\boxed{000}"),
        (1024, r"\boxed{1,024}"),
        (1024, r"\boxed{1{,}024}"),
        (1024, r"\boxed{1\,024}"),
        (1024, "The answer is 1,024."),
        ("-17", r"\boxed{-17}"),
        ("-17", "\\boxed{−17}"),
        ("-17", r"\boxed{- 17}"),
        ("-17", "55-72 = -17"),
        ("-17", "The answer is -17."),
        ("-17", "-17"),
        ("144", "57+33=90, 90+54=144, so \\boxed{144}"),
        ("144", "144"),
    ],
)
def test_other_golds(answers, gold: int | str, text: str) -> None:
    assert grade(answers, gold, text, False)["exact_match"] == 1


def test_forty_digits_are_a_number_and_more_are_none(answers) -> None:
    assert answers.read_integer("7" * 40) == int("7" * 40)
    assert answers.read_integer("7" * 41) is None


# (text, what the task is asked about, the grade where it accepts anything)
BOXED = [
    (r"\boxed{a+1}, or rather \boxed{b}", ["b"], 1),
    (r"\boxed{b} and \boxed{ }", ["b"], 1),
    (r"\boxed{b} and \boxed{c", [], 0),
    (r"\boxed{}", [], 0),
    ("b", [], 0),
    (r"\boxed{a}</think>\boxed{b}", ["b"], 1),
    (r"<think>\boxed{a}", [], 0),
]


@pytest.mark.parametrize(("text", "asked", "right"), BOXED)
def test_what_a_box_holds_is_judged_by_the_task(answers, text: str, asked: list[str], right: int) -> None:
    seen: list[str] = []
    grades = answers.grade_boxed({"trace_opened": False}, [text], lambda box: seen.append(box) is None)
    assert grades["exact_match"] == right
    assert seen == asked
    assert answers.grade_boxed({"trace_opened": False}, [text], lambda box: False)["exact_match"] == 0


# (text, whether the template opened the trace, exact_match, closed_trace, truncated)
TRACED = [
    (r"It is 277.</think>\boxed{277}", True, 1, 1, 0),
    ("It is 277.\n</think>\n\nThe answer is 277.", True, 1, 1, 0),
    (r"<think>It is 277.</think>\boxed{277}", False, 1, 1, 0),
    (r"<think>Repeated by the model.</think>\boxed{277}", True, 1, 1, 0),
    (r"\boxed{5}? No.</think>\boxed{277}", True, 1, 1, 0),
    (r"\boxed{277}? No.</think>\boxed{278}", True, 0, 1, 0),
    (r"\boxed{277} is what I think.</think>I cannot say.", True, 0, 1, 0),
    (r"<THINK>It is 5.</THINK>\boxed{277}", False, 1, 1, 0),
    (r"\boxed{277}", True, 0, 0, 1),
    (r"So the answer is \boxed{277}. But wait", True, 0, 0, 1),
    (r"<think>So the answer is \boxed{277}. But wait", False, 0, 0, 1),
    (r"<think>So the answer is \boxed{277}. But wait", True, 0, 0, 1),
    (r"\boxed{277}</thin", True, 0, 0, 1),
    (r"\boxed{277}</think>", True, 0, 0, 0),
    ("\\boxed{277}</think>\n \n", True, 0, 0, 0),
    ("", True, 0, 0, 1),
    (r"\boxed{277}", False, 1, 0, 0),
]


@pytest.mark.parametrize(("text", "opened", "exact_match", "closed", "truncated"), TRACED)
def test_only_what_follows_the_trace_counts(
    answers, text: str, opened: bool, exact_match: int, closed: int, truncated: int
) -> None:
    expected = {"exact_match": exact_match, "closed_trace": closed, "truncated": truncated}
    assert grade(answers, 277, text, opened) == expected


MARKUP = st.one_of(
    st.sampled_from(["\\boxed{", "\\text{", "\\frac", "\\pmod{1000}", "{", "}", "$", "**", "(", ")", "\n", " "]),
    st.sampled_from(["277", "-3", "1,024", "=", "≡", "/", "^", ".", ",", "answer", "is", "not", "or"]),
)
PROSE = st.one_of(st.text(), st.lists(MARKUP).map("".join), st.lists(MARKUP).map(" ".join))


@given(text=PROSE)
def test_reading_never_raises(answers, text: str) -> None:
    assert answers.read_integer(text) is None or isinstance(answers.read_integer(text), int)


@given(before=PROSE, boxed=st.integers(-(10**9), 10**9), after=PROSE)
def test_the_last_box_wins(answers, before: str, boxed: int, after: str) -> None:
    after = after.replace("box", "")
    assert answers.read_integer(f"{before} \\boxed{{{boxed}}} {after}") == boxed


@given(
    gold=st.integers(0, 999),
    form=st.sampled_from(["{}", "{:03d}", "\\boxed{{{}}}", "The answer is {}.", "**{}**", "${}$"]),
)
def test_a_reference_graded_against_itself_is_right(answers, gold: int, form: str) -> None:
    assert grade(answers, gold, form.format(gold), False)["exact_match"] == 1


@given(reasoning=PROSE, gold=st.integers(0, 999))
def test_a_trace_that_never_closes_is_wrong_whatever_it_holds(answers, reasoning: str, gold: int) -> None:
    text = f"{reasoning.replace('>', '')} \\boxed{{{gold}}}"
    assert grade(answers, gold, text, True) == {"exact_match": 0, "closed_trace": 0, "truncated": 1}


def test_a_server_that_returned_nothing_is_wrong(answers) -> None:
    assert grade(answers, 0, None, False) == {"exact_match": 0, "closed_trace": 0, "truncated": 0}


REPEATED = [
    "\\boxed{",
    "\\boxed{}",
    "\\text{",
    "answer is ",
    "answer\n",
    "= ",
    ",111",
    "1",
    "(",
    " ",
    "mod ",
    "not 1 ",
    "\\\\",
    "\\,\n",
]


@pytest.mark.parametrize("piece", REPEATED)
def test_a_model_that_repeats_itself_is_read_in_linear_time(answers, piece: str) -> None:
    start = time.process_time()
    answers.read_integer("answer:" + piece * (200_000 // len(piece)))
    assert time.process_time() - start < 5
