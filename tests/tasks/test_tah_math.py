"""Grading of the group `tah_math`: answers as models box them, and the five benchmarks inside lm-eval."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TASKS = ["tah_aime25", "tah_amc23", "tah_gsm8k", "tah_math500", "tah_olympiadbench"]

# What a box holds, by the reference answer that it means.
RIGHT = {
    "18": [
        "18",
        "18.",
        "18.0",
        "18.00",
        "018",
        "+18",
        "$18$",
        "**18**",
        "{18}",
        r"\,18\,",
        r"\mathbf{18}",
        r"\text{18}",
        r"\approx 18",
        "x = 18",
        "10 + 8 = 18",
        r"\$18",
        "$18",
        r"\$18.00",
        "18 dollars",
        r"18\text{ dollars}",
        r"18 \text{ eggs per day}",
        r"\text{18 eggs}",
        "18 km/h",
        "18 cm^2",
        r"18\,\text{cm}^2",
        r"18\ \mathrm{cm}",
        r"18 \text{ square units}",
        r"\frac{36}{2}",
        "2(9)",
        r"\frac{(6)(6)}{2}",
    ],
    "-1": ["-1", "−1", "- 1", r"-1^\circ"],
    "73": ["073"],
    "1,450,000": ["1450000", "1,450,000", r"1{,}450{,}000", r"1\,450\,000", r"\$1,450,000.00", r"1.45 \times 10^6"],
    r"11,\! 111,\! 100": ["11111100", "11,111,100"],
    "58,500": [r"58{,}500"],
    r"\frac{1}{2}": [r"\dfrac{1}{2}", r"\tfrac12", "1/2", "0.5", ".5", r"\frac{2}{4}", r"\frac12 \approx 0.5", r"50\%"],
    r"-\frac{35}{9}": [r"\frac{-35}{9}", "-35/9", r"-3\frac{8}{9}"],
    r"137 \frac{1}{2}": ["137.5", r"\frac{275}{2}"],
    ".0000672": ["0.0000672", r"6.72 \times 10^{-5}"],
    "62.5%": ["62.5", r"62.5\%", r"62.5 \text{ percent}", "0.625", r"\frac{5}{8}"],
    r"90^\circ": ["90", "90°", r"90^{\circ}", r"90 \text{ degrees}", "90 degrees"],
    r"864 \mbox{ inches}^2": ["864", r"864\text{ in}^2"],
    r"\left( 3, \frac{\pi}{2} \right)": [
        r"(3, \pi/2)",
        r"\left(3, \tfrac{\pi}{2}\right)",
        r"(r,\theta) = (3,\frac{\pi}{2})",
    ],
    "(15,-29)": ["(15, -29)", "15, -29", "x = 15, y = -29", r"\langle 15, -29 \rangle"],
    "(3,4]": [r"\left(3, 4\right]", r"x \in (3, 4]"],
    r"x \in [-2,7]": ["[-2, 7]"],
    r"(-\infty, 2) \cup (3, \infty)": [r"(3,+\infty) \cup (-\infty,2)"],
    "1,-2": ["-2, 1", r"\{1,-2\}", r"x=1 \text{ or } x=-2", "1 and -2"],
    "3, 5, 7": [r"3, 5, \text{ and } 7", "{7, 5, 3}", "3; 5; 7"],
    r"1 \pm \sqrt{19}": [r"1-\sqrt{19}, 1+\sqrt{19}", r"x = 1 \pm \sqrt{19}"],
    r"\{1\pm\sqrt{5},-2\}": [r"-2, 1+\sqrt5, 1-\sqrt5"],
    "-2,2": [r"\pm 2"],
    r"\text{Evelyn}": ["Evelyn", r"\textbf{Evelyn}", r"\mathrm{Evelyn}"],
    r"\text{ellipse}": [r"\text{an ellipse}", "Ellipse"],
    r"\text{(C)}": ["C", "(C)", r"\text{C}", r"\textbf{(C)}"],
    "52_8": ["52_{8}", r"52_{\text{8}}", "52"],
    "(a+5)(b+2)": ["(b+2)(a+5)", "ab+2a+5b+10"],
    "5x - 7y + 11z + 4 = 0": ["-5x+7y-11z-4=0"],
    "y = 2x + 3": ["2x+3", "y=3+2x", "2x - y + 3 = 0"],
    "6 - 5i": ["-5i+6", r"6-5\mathrm{i}"],
    r"\frac{\sqrt{3}}{3}": [r"\frac{1}{\sqrt{3}}"],
    r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}": [r"\begin{bmatrix} -\frac{1}{3} \\ \frac{2}{3} \end{bmatrix}"],
    # As OlympiadBench writes them.
    "$(1,8,19), (4,5,7)$": ["(4,5,7), (1,8,19)"],
    "$f(x)=-1$,$f(x)=x+1$": [r"f(x)=x+1 \text{ or } f(x) = -1", "-1, x+1"],
    "$m_{\\max }=n^{2}-n-1$": ["n^2-n-1", "n(n-1)-1"],
    "$a=2$, $a=-6-4 \\sqrt{2}$": [r"a = -6-4\sqrt2, a = 2", r"2, -6-4\sqrt2"],
    "2400, 1350, 864": ["2,400, 1,350, 864"],
    "-2,-2": ["-2"],
    "$k \\geqslant 2$": [r"k \ge 2"],
    "$10^{100}$,$10^{1 / 100}$": [r"10^{100}, \sqrt[100]{10}"],
}
WRONG = {
    "18": [
        "",
        " ",
        "19",
        "-18",
        "180",
        "18.5",
        "1,8",
        "18x",
        "18, 19",
        r"18 \text{ or } 19",
        r"\frac{18}{7}",
        r"x > 18",
    ],
    "1": ["100", "0.01", r"100\%x", r"\text{one of them}", r"\text{cannot be determined}"],
    "50": ["0.5", "0.50"],
    "0.5": ["50"],
    "62.5%": ["6.25", "0.0625", "625"],
    r"\frac{1}{3}": ["0.33", "0.3333", "3"],
    "2125": ["2,1250", "21,25"],
    "1,234": ["1", "234"],
    r"\pi": ["3.14", r"\frac{22}{7}"],
    "2": ["2c", "2ab", "x_2", r"k \geq 2"],
    "6m": ["6", "6n"],
    "3 xy": ["3 ab"],
    "n": ["m", "2n"],
    "(3,2)": ["(2,3)", "[3,2]", "3", "(3,2,1)"],
    # Both are empty intervals to SymPy.
    "(2,1)": ["(5,3)"],
    "(3,4]": ["(3,4)", "[3,4]", "(3,5]"],
    r"(0,9) \cup (9,36)": ["(0,36)", r"(0,9] \cup (9,36)"],
    "1,2": ["1", "1,3", "1,2,3", "(1,2)"],
    "1,-2": ["-1,2"],
    r"1 \pm \sqrt{19}": [r"1+\sqrt{19}"],
    "(1,1),(3,2)": ["(1,1)", "(1,1),(2,3)"],
    "a=2,b=3": ["a=3,b=2"],
    r"\text{Evelyn}": ["Nevely", "Evelyn and Carla"],
    r"\text{(C)}": ["D", r"\text{(B)}"],
    r"\text{even}": ["odd", "neve"],
    "52_8": ["52_9", "42", "53_8"],
    "p - q": ["q - p"],
    "y = 2x + 3": ["y = 3x + 2", "y = 2x - 3"],
    "5x - 7y + 11z + 4 = 0": ["5x - 7y + 11z - 4 = 0"],
    "6 - 5i": ["6 + 5i"],
    r"\begin{pmatrix} -2 \\ -14 \end{pmatrix}": [r"\begin{pmatrix} -2 \\ 14 \end{pmatrix}"],
    r"k \geq 2": ["k > 2", r"k \leq 2"],
    "2^{1009}": ["2^{1008}"],
}


@pytest.fixture(scope="module")
def same(task_module) -> Callable[..., bool]:
    return task_module("tah_math/verifier.py").same


@pytest.fixture(scope="module")
def grading(task_module) -> ModuleType:
    return task_module("tah_math/grading.py")


@pytest.fixture(scope="module")
def grade(grading) -> Callable[[str, str | None, bool], dict[str, int]]:
    return grader_of(grading)


def grader_of(grading: ModuleType) -> Callable[[str, str | None, bool], dict[str, int]]:
    return lambda gold, text, opened: grading.grade_boxed({"answer": gold, "trace_opened": opened}, [text])


def pairs(table: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [pair for gold, answers in table.items() for pair in product([gold], answers)]


@pytest.mark.parametrize(("gold", "box"), pairs(RIGHT))
def test_answers_that_mean_the_reference_are_right(same, gold: str, box: str) -> None:
    assert same(gold, box)


@pytest.mark.parametrize(("gold", "box"), pairs(WRONG))
def test_answers_that_mean_something_else_are_wrong(same, gold: str, box: str) -> None:
    assert not same(gold, box)


def test_a_reference_is_itself_and_not_the_next(same) -> None:
    golds = list(dict.fromkeys([*RIGHT, *WRONG]))
    assert [gold for gold in golds if not same(gold, gold)] == []
    assert [pair for pair in pairwise([*golds, golds[0]]) if same(*pair)] == []


@pytest.mark.parametrize(
    ("box", "right"), [("4.2", True), ("4.15", True), ("4.3", True), ("4.31", False), ("42", False)]
)
def test_a_tolerance_is_granted_where_the_row_has_one(same, box: str, right: bool) -> None:
    assert same("4.2", box, tolerance=0.1) is right
    assert same("4.2", box) is (box == "4.2")
    assert same(r"\sqrt{2}", r"\frac{3}{2}", tolerance=0.1)


# (text, whether the template opened the trace, exact_match, closed_trace, truncated), all for the gold answer 1/2
TEXTS = [
    (r"So it is $\boxed{\frac{1}{2}}$.", False, 1, 0, 0),
    (r"\[\boxed{\dfrac12}\]", False, 1, 0, 0),
    (r"$\boxed{\frac13}$? No: $\boxed{0.5}$", False, 1, 0, 0),
    (r"$\boxed{\frac12}$? No: $\boxed{\frac13}$", False, 0, 0, 0),
    (r"\boxed{\boxed{\frac12}}", False, 1, 0, 0),
    (r"\fbox{0.5}", False, 1, 0, 0),
    (r"\boxed{\frac12} is what goes into \boxed{}", False, 1, 0, 0),
    (r"The answer is $\frac{1}{2}$.", False, 0, 0, 0),
    ("0.5", False, 0, 0, 0),
    (r"\boxed{\frac{1}{2}", False, 0, 0, 0),
    ("", False, 0, 0, 0),
    (r"Let me see.</think>\boxed{\frac12}", True, 1, 1, 0),
    (r"<think>Let me see.</think>\boxed{\frac12}", False, 1, 1, 0),
    (r"\boxed{\frac13}?</think>\boxed{\frac12}", True, 1, 1, 0),
    (r"\boxed{\frac12}?</think>\boxed{\frac13}", True, 0, 1, 0),
    (r"\boxed{\frac12}</think>I cannot say.", True, 0, 1, 0),
    (r"\boxed{\frac12}</think>", True, 0, 0, 0),
    (r"So it is \boxed{\frac12}. But wait", True, 0, 0, 1),
    (r"<think>So it is \boxed{\frac12}. But wait", False, 0, 0, 1),
    ("", True, 0, 0, 1),
]


@pytest.mark.parametrize(("text", "opened", "exact_match", "closed", "truncated"), TEXTS)
def test_the_last_box_after_the_trace_counts(
    grade, text: str, opened: bool, exact_match: int, closed: int, truncated: int
) -> None:
    expected = {"exact_match": exact_match, "closed_trace": closed, "truncated": truncated}
    assert grade(r"\frac{1}{2}", text, opened) == expected


def test_a_server_that_returned_nothing_is_wrong(grade) -> None:
    assert grade("0", None, False) == {"exact_match": 0, "closed_trace": 0, "truncated": 0}


@pytest.fixture
def impatient(task_module, tasks_folder, tmp_path, monkeypatch) -> Callable[[str, str, bool], dict[str, int]]:
    """The grader with a second of CPU for an answer in place of five."""
    patient = (tasks_folder / "tah_math" / "verifier.py").read_text(encoding="utf-8")
    assert patient.count("CPU_SECONDS = 5\n") == 1
    (tmp_path / "verifier.py").write_text(patient.replace("CPU_SECONDS = 5\n", "CPU_SECONDS = 1\n"), encoding="utf-8")
    grading = task_module("tah_math/grading.py")
    monkeypatch.setattr(grading, "FOLDER", tmp_path)
    return grader_of(grading)


# One that takes forever in a single multiplication, and one that takes forever in small steps.
def test_an_answer_that_cannot_be_computed_is_wrong_and_harms_no_other(impatient, caplog) -> None:
    for endless in ("10^{10^{10}}", "(x+1)^{100000}"):
        start = time.perf_counter()
        assert impatient("x^2", rf"\boxed{{{endless}}}", False)["exact_match"] == 0
        assert time.perf_counter() - start < 30
        assert f"No verdict on {endless!r} in time" in caplog.text
        assert impatient("x^2", r"\boxed{x \cdot x}", False)["exact_match"] == 1


@pytest.mark.parametrize(
    "piece", ["(", r"\frac{1}{", r"\text{", r"\alpha", "1,", "1+", "=", "9", "x^{", r"\{", "%", "\x00"]
)
def test_a_model_that_repeats_itself_is_wrong_soon(grade, piece: str) -> None:
    start = time.perf_counter()
    for size in (300, 200_000):
        assert grade("5", rf"\boxed{{{piece * (size // len(piece))}", False)["exact_match"] == 0
        box = piece * (size // len(piece)) + "}" * (size // len(piece) if "{" in piece else 0)
        assert grade("5", rf"\boxed{{{box}}}", False)["exact_match"] == 0
    assert time.perf_counter() - start < 30


def test_threads_may_grade_at_once(grade) -> None:
    def exact_match(number: int) -> int:
        return grade(rf"\frac{{{number}}}{{7}}", rf"\boxed{{{number // 2 * 2}/7}}", False)["exact_match"]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(exact_match, range(64))) == [int(number % 2 == 0) for number in range(64)]


# --- the tasks inside lm-eval ---

# For each question of `made_hub.py` a right answer, written as a model would.
ANSWERS = {
    "tah_gsm8k": [r"\$1200", r"6 \text{ dollars}", "0"],
    "tah_math500": [r"\left(-1, 1\right)", "0.5"],
    "tah_amc23": ["27"],
    "tah_aime25": [f"{number + 3:03d}" for number in range(30)],
    "tah_olympiadbench": [r"\pm 2", r"4.17\%", r"\dfrac n2", r"3\frac{5}{12} \text{ km}"],
}


def test_the_group_holds_the_five_benchmarks(tasks_folder) -> None:
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import load_yaml_config

    manager = TaskManager(include_path=str(tasks_folder), include_defaults=False)
    assert "tah_math" in manager.all_groups
    assert sorted(load_yaml_config(manager.task_index["tah_math"]["yaml_path"], mode="simple")["task"]) == TASKS
    assert set(TASKS) <= set(manager.all_subtasks)


@pytest.mark.parametrize(
    ("task", "own"),
    [
        ("tah_gsm8k", "gsm8k/gsm8k-cot-zeroshot.yaml"),
        ("tah_math500", "hendrycks_math/hendrycks_math500.yaml"),
        ("tah_aime25", "aime/aime25.yaml"),
    ],
)
def test_rows_are_those_of_lm_evals_own_task(tasks_folder, task: str, own: str) -> None:
    import lm_eval.tasks
    from lm_eval.utils import load_yaml_config

    theirs = load_yaml_config(str(Path(lm_eval.tasks.__file__).parent / own), mode="simple")
    ours = load_yaml_config(str(tasks_folder / "tah_math" / f"{task}.yaml"), mode="full")["dataset_kwargs"]["hub"]
    assert (ours["path"], ours.get("name"), ours["split"]) == (
        theirs["dataset_path"],
        theirs.get("dataset_name"),
        theirs["test_split"],
    )


@pytest.mark.parametrize("task", TASKS)
def test_problems_are_asked_whole_and_without_their_solution(hub, load_task, task: str) -> None:
    loaded = load_task(task, trace_opened=True)
    for row in loaded.eval_docs:
        assert row["trace_opened"]
        asked = loaded.doc_to_text(row)
        assert asked.startswith(row["problem"])
        assert not any(of_solution in asked for of_solution in ("####", "<<", "Obvious"))
        if not row.get("is_multiple_answer"):
            assert asked.endswith(r"put your final answer within \boxed{}.")


def test_several_answers_are_asked_for_in_one_box(hub, load_task) -> None:
    loaded = load_task("tah_olympiadbench")
    asked = [loaded.doc_to_text(row) for row in loaded.eval_docs]
    assert [r"within one \boxed{}, separated by commas" in text for text in asked] == [True, False, False, False]
    assert asked[2].startswith("Let $n$ be even.\nWhat is half of $n$?")


@pytest.mark.parametrize("task", TASKS)
def test_right_answers_to_every_benchmark_are_right_and_others_wrong(hub, load_task, task: str) -> None:
    loaded = load_task(task)
    rows = list(loaded.eval_docs)

    def exact_match(row: dict[str, Any], box: str) -> int:
        return loaded.process_results(row, [rf"It is \boxed{{{box}}}."])["exact_match"]

    assert [exact_match(row, box) for row, box in zip(rows, ANSWERS[task], strict=True)] == [1] * len(rows)
    assert [exact_match(row, "12345") for row in rows] == [0] * len(rows)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (r"So $x = \boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{ \frac{1}{2}\, } as I said", r"\frac{1}{2}"),
        (r"\boxed{3} or rather \boxed{**1,024**}", "1024"),
        (r"\boxed{ x + \text{1} }", "x+1"),
        ("The answer is 3.", None),
        (r"\boxed{} and \boxed{ }", None),
        (r"\boxed{3", None),
    ],
)
def test_answers_agree_if_their_boxes_hold_the_same_text(grading: ModuleType, text: str, said: str | None) -> None:
    assert grading.grade_boxed.reads(text) == said
