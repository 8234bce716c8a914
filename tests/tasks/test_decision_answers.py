"""Grading of yes, no and maybe as models write them; which tasks ask for one, `test_task_runs.py` knows."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

DECISIONS = ["yes", "no", "maybe"]

# Each is read as the given decision, or as none.
READ = [
    ("yes", "yes"),
    ("no", "no"),
    ("maybe", "maybe"),
    ("Yes.", "yes"),
    ("NO", "no"),
    ("  Maybe\n", "maybe"),
    ("**No**", "no"),
    ("*Yes*", "yes"),
    ("`maybe`", "maybe"),
    ('"Yes"', "yes"),
    ("“No.”", "no"),
    ("(yes)", "yes"),
    ("✅ Yes", "yes"),
    ("> No", "no"),
    ("- maybe", "maybe"),
    (r"\boxed{yes}", "yes"),
    (r"\boxed{\text{No}}", "no"),
    (r"$\boxed{\textbf{Maybe}}$", "maybe"),
    (r"\boxed{\text{yes.}}", "yes"),
    (r"Yes, one might think, but \boxed{no}.", "no"),
    (r"\boxed{no}, although others would say yes. The answer is yes.", "no"),
    (r"\boxed{\text{no difference}}", None),
    (r"\boxed{yes/no}", None),
    (r"\boxed{not sure}. Yes.", None),
    (r"The answer is yes, so \boxed{ye", None),
    ("Answer: yes", "yes"),
    ("answer:no", "no"),
    ("Answer - the final one: maybe", "maybe"),
    ("**Answer:** No", "no"),
    ("**Answer: Yes**", "yes"),
    ("**Answer**: *maybe*.", "maybe"),
    ("The answer is: maybe", "maybe"),
    ("The answer is yes.", "yes"),
    ('The answer is "no".', "no"),
    ("The answer is 'yes'.", "yes"),
    ("'Maybe'", "maybe"),
    ("No's are rare.", None),
    ("The answer is **no**, because the groups did not differ.", "no"),
    ("The answer is therefore most likely maybe.", "maybe"),
    ("The answer is a clear yes.", "yes"),
    ("The answer is a simple yes.", "yes"),
    ("The answer to the question is no.", "no"),
    ("The correct answer would be yes", "yes"),
    ("My final decision is maybe.", "maybe"),
    ("Final answer: Yes\n", "yes"),
    ("Conclusion: no", "no"),
    ("### Final Answer\n\nMaybe", "maybe"),
    ("### Answer\n**yes**\n\nThe abstract shows no harm.", "yes"),
    ("Answer (yes/no/maybe): no", "no"),
    ("(Yes/no/maybe) No, because the trial was small.", "no"),
    ("Of yes, no, or maybe, the answer is: maybe.", "maybe"),
    ('{"answer": "yes"}', "yes"),
    ("The answer is yes. On reflection, the answer is no.", "no"),
    ("Yes, the abstract says so at first. But in the end:\n\nAnswer: maybe", "maybe"),
    ("No. Some would say yes.\nAnswer: no\nI hope this helps.", "no"),
    ("The study found no significant difference (p = 0.4).\n\nNo", "no"),
    ("The evidence is weak.\n\n**Maybe**\n\nMore trials with no bias are needed.", "maybe"),
    ("Yes, mitochondria play a role.", "yes"),
    ("Yes mitochondria play a role.", "yes"),
    ("Yes: no other cause was found.", "yes"),
    ("No, because yes-saying was not measured.", "no"),
    ("no, because yes-…", "no"),
    ("No – the trial found no effect.", "no"),
    ("No\nThe study found a difference.", "no"),
    ("No because the interval includes 1.", "no"),
    ("Maybe, the sample is too small for a yes or no.", "maybe"),
    ("Maybe not.", "maybe"),
    ("Based on the abstract, I would say yes.", "yes"),
    ("The results are mixed, so maybe.", "maybe"),
    ("The groups did not differ; therefore, no.", "no"),
    ("The evidence is mixed: maybe.", "maybe"),
    ("I am leaning towards no, given the small sample.", "no"),
    ("The results suggest “yes”.", "yes"),
    ("Thus it is no.", "no"),
    ("No significant difference was found.", None),
    ("*No* difference was found.", None),
    ("There was no difference between groups.", None),
    ("The answer is no difference.", None),
    ("Not necessarily.", None),
    ("It is not known.", None),
    ("Nothing changed. None of it mattered, I know.", None),
    ("The answer is not yes.", None),
    ("The answer is uncertain.", None),
    ("Unclear.", None),
    ("It may be so.", None),
    ("This is maybe due to chance, or it explains nothing.", "maybe"),
    ("Maybe larger trials would tell.", None),
    ("Yes and no.", None),
    ("yes/no", None),
    ("Answer yes, no or maybe.", None),
    ("Yesterday, no-one knew.", None),
    ("A yes-man; a no-brainer.", None),
    ("", None),
    ("I cannot answer this question.", None),
]


def grade(answers, gold: str, text: str | None, opened: bool) -> dict[str, int]:
    return answers.grade_decision({"answer": gold, "trace_opened": opened}, [text])


@pytest.mark.parametrize(("text", "decision"), READ)
def test_a_decision_is_read_as_a_person_would(answers, text: str, decision: str | None) -> None:
    right = {gold for gold in DECISIONS if grade(answers, gold, text, False)["exact_match"]}
    assert right == ({decision} if decision else set())


# (gold, text, whether the template opened the trace, exact_match, closed_trace, truncated)
TRACED = [
    ("no", "Hm, yes? No.</think>\n\nno", True, 1, 1, 0),
    ("no", "<think>Yes?</think>no", False, 1, 1, 0),
    ("no", "The answer is no.</think>The answer is yes.", True, 0, 1, 0),
    ("no", "The answer is no.</think>I cannot tell.", True, 0, 1, 0),
    ("no", "no", True, 0, 0, 1),
    ("no", "The answer is no. But wait", True, 0, 0, 1),
    ("no", "<think>The answer is no. But wait", False, 0, 0, 1),
    ("no", "no</think>", True, 0, 0, 0),
    ("no", "", True, 0, 0, 1),
    ("no", "", False, 0, 0, 0),
    ("no", "no", False, 1, 0, 0),
]


@pytest.mark.parametrize(("gold", "text", "opened", "exact_match", "closed", "truncated"), TRACED)
def test_only_what_follows_the_trace_counts(
    answers, gold: str, text: str, opened: bool, exact_match: int, closed: int, truncated: int
) -> None:
    expected = {"exact_match": exact_match, "closed_trace": closed, "truncated": truncated}
    assert grade(answers, gold, text, opened) == expected


MARKUP = st.sampled_from(
    ["yes", "no", "maybe", "answer", "is", "not", "or", ":", ",", "/", ".", "**", "{", "}", "\n", " "],
)
PROSE = st.one_of(st.text(), st.lists(MARKUP).map("".join), st.lists(MARKUP).map(" ".join))


@given(text=PROSE)
def test_reading_never_raises(answers, text: str) -> None:
    assert answers.read_decision(text) in {*DECISIONS, None}


@given(before=PROSE, boxed=st.sampled_from(DECISIONS), after=PROSE)
def test_the_last_box_wins(answers, before: str, boxed: str, after: str) -> None:
    assert answers.read_decision(f"{before} \\boxed{{{boxed}}} {after}") == boxed


@given(before=PROSE, stated=st.sampled_from(DECISIONS))
def test_what_the_task_asks_to_end_with_is_read(answers, before: str, stated: str) -> None:
    assert answers.read_decision(f"{before}\nAnswer: {stated}") == stated


@given(gold=st.sampled_from(DECISIONS), form=st.sampled_from(["{}", "{}.", "**{}**", "\\boxed{{{}}}", "Answer: {}"]))
def test_a_reference_graded_against_itself_is_right(answers, gold: str, form: str) -> None:
    for text in (form.format(gold), form.format(gold.upper()), form.format(gold.title())):
        assert grade(answers, gold, text, False)["exact_match"] == 1


def test_a_server_that_returned_nothing_is_wrong(answers) -> None:
    for gold in DECISIONS:
        assert grade(answers, gold, None, False) == {"exact_match": 0, "closed_trace": 0, "truncated": 0}


REPEATED = [
    "yes, ",
    "no ",
    "yes or no ",
    "answer is ",
    "answer\n",
    "answer is a ",
    "so is ",
    "!",
    " ",
    "---\n",
    '"',
    "\n",
    "\\\\",
    "\\,\n",
]


@pytest.mark.parametrize("piece", REPEATED)
def test_a_model_that_repeats_itself_is_read_in_linear_time(answers, piece: str) -> None:
    start = time.process_time()
    answers.read_decision("answer:" + piece * (200_000 // len(piece)))
    assert time.process_time() - start < 5
