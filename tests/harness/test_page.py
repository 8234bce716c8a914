"""The page: whole, well formed, safe to open, and with nothing outside it."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_runs import a_run, row

from harness.config import LoopConfig
from harness.page import page
from harness.plan import Step

VOID = {"meta", "br", "hr", "img", "input", "link"}
FETCHING = {"src", "href", "srcset", "action", "data", "poster", "background", "xlink:href"}
ROWS = [
    row(0, "instruct", "mini_math", 70),
    row(0, "thinking", "mini_math", 180),
    row(1, "instruct", "mini_math", 121),
    row(1, "thinking", "mini_math", 176),
]


class Page(HTMLParser):
    """Reads a page as strictly as a browser does not: what is opened is closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.fetched: list[str] = []
        self.points: list[str] = []
        self.styles: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], "never closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.look(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID or "svg" in self.open, f"<{tag}/> closes nothing"
        self.look(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> was never opened"
        assert self.open.pop() == tag

    def look(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        assert len(values) == len(attrs), "an attribute twice"
        self.seen.append(tag)
        self.fetched += [str(values[key]) for key in values if key in FETCHING]
        self.styles += [str(values["style"])] if "style" in values else []
        assert not [key for key in values if key.startswith("on")], "runs code"
        if tag == "polyline":
            self.points.append(str(values["points"]))

    def handle_data(self, data: str) -> None:
        (self.styles if self.open[-1:] == ["style"] else self.text).append(data)

    @property
    def words(self) -> str:
        return " ".join(self.text)


def test_the_reader_of_these_tests_sees_what_is_wrong() -> None:
    Page("<p>a<b>b</b><meta x><svg><line x1=1 /><circle r=1><title>t</title></circle></svg></p>")
    wrong = ["<p>a<b>b</p></b>", "<p>", "</p>", "<p/>", "<svg><line></svg>", "<p a=1 a=2></p>", "<p onclick=x></p>"]
    for broken in wrong:
        with pytest.raises(AssertionError):
            Page(broken)


@pytest.fixture
def steps(shipped: LoopConfig, tmp_path: Path) -> list[tuple[Step, dict[str, Any]]]:
    """Two evaluations that are done, each with its record."""
    run = a_run(shipped, tmp_path)
    record = {"kind": "evaluate", "cpu_s": 3.0, "peak_memory_mb": 700.0}
    return [
        (run.steps[0], {**record, "key": "evaluate-01", "wall_s": 2.0, "commands": [["lm_eval", "run"]]}),
        (run.steps[1], {**record, "key": "evaluate-02", "wall_s": 4.0, "commands": [["lm_eval", "<x>", "&y"]]}),
    ]


def made(
    steps: list[tuple[Step, dict[str, Any]]],
    rows: list[dict[str, Any]] = ROWS,
    name: str = "mine",
    cost: float | None = 0.02,
    noted: dict[str, Any] | None = None,
) -> str:
    return page(name, rows, steps, {"rows": rows, "wall_s": 65.0, "cost_usd": cost}, noted or {})


def test_the_page_is_whole_and_fetches_nothing(steps: list[tuple[Step, dict[str, Any]]]) -> None:
    noted = {"asked": {"t": 0.5, "recipes": {"secret": 1}, "prompts": ["p"]}, "versions": {"torch": "2.13.0"}}
    text = made(steps, noted=noted)
    assert text.startswith("<!doctype html>")
    read = Page(text)
    assert read.fetched == []
    assert "script" not in read.seen
    assert not [style for style in read.styles if "url(" in style or "@import" in style]
    assert "http" not in text
    for said in ("mine", "121/200", "60.5%", "1 min 05 s, 0.02 US dollars", "torch: 2.13.0", "t: 0.5", "lm_eval run"):
        assert said in read.words
    assert "secret" not in text  # the recipes are in their stages
    assert "evaluate" in read.words
    assert "6.0" in read.words  # seconds, of both


def test_each_score_is_there_with_its_change(steps: list[tuple[Step, dict[str, Any]]]) -> None:
    text = made(steps)
    scores = text[text.index("<h2>Scores") : text.index("<h2>Time")]
    lines = [[cell.partition("</td>")[0] for cell in line.split("<td>")[1:]] for line in scores.split("<tr>")[2:]]
    assert [(line[0], line[1], line[3], line[8]) for line in lines] == [
        ("0", "instruct", "70/200", ""),
        ("1", "instruct", "121/200", "+25.5"),
        ("0", "thinking", "180/200", ""),
        ("1", "thinking", "176/200", "-2.0"),
    ]


def test_better_is_higher_and_later_is_to_the_right(steps: list[tuple[Step, dict[str, Any]]]) -> None:
    instruct, thinking = (
        [tuple(map(float, point.split(","))) for point in points.split()] for points in Page(made(steps)).points
    )
    assert instruct[1][0] > instruct[0][0]
    assert instruct[1][1] < instruct[0][1]
    assert thinking[1][1] > thinking[0][1]
    assert [point[0] for point in instruct] == [point[0] for point in thinking]
    assert thinking[0][1] < instruct[0][1]


def test_a_chart_for_each_task(steps: list[tuple[Step, dict[str, Any]]]) -> None:
    more = [*ROWS, row(0, "instruct", "mini_qa", 100), row(1, "instruct", "mini_qa", 100)]
    assert Page(made(steps, more)).seen.count("svg") == 2


@pytest.mark.parametrize(
    "rows",
    [
        [],
        ROWS[:1],
        [row(0, "thinking", "x", 3)],
        [row(0, "instruct", "x", 2.5, n=4), row(12, "instruct", "x", 0, n=4)],
        [row(0, "instruct", "x", 0, n=1), row(0, "thinking", "x", 1, n=1)],
    ],
)
def test_a_run_that_has_only_begun_has_a_page_too(
    steps: list[tuple[Step, dict[str, Any]]], rows: list[dict[str, Any]]
) -> None:
    read = Page(made(steps, rows, cost=None))
    assert "dollars" not in read.words
    assert "nan" not in " ".join(read.points)
    assert Page(made([], rows)).words


def test_names_are_text_and_never_markup(steps: list[tuple[Step, dict[str, Any]]]) -> None:
    bad = "<b>&\"'</b><script>x</script>"
    rows = [row(0, bad, bad, 5)]
    noted = {"asked": {bad: bad, "prompts": [bad]}, "versions": {bad: bad}}
    plain, read = Page(made(steps, ROWS[:1])), Page(made(steps, rows, bad, noted=noted))
    assert "script" not in read.seen
    assert read.seen.count("b") == plain.seen.count("b")
    assert bad in read.words
    assert "lm_eval <x> &y" in read.words


def test_passes_are_shown_of_tah_checkpoints_alone(steps: list[tuple[Step, dict[str, Any]]]) -> None:
    passes = {"mean_depth": 1.0625, "skip_rate": 0.9375, "flops_per_token": 2.5e6}
    passes |= {"flops_per_token_single": 2e6, "flops_per_token_always": 5e6}
    assert "Passes" not in Page(made(steps)).words
    read = Page(made(steps, [row(0, "instruct", "x", 5, **passes)]))
    assert "Passes of TaH checkpoints" in read.words
    assert "1.062" in read.words
