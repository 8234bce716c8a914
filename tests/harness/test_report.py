"""What a person sees: plain lines, the closing table, the page."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from harness import report
from harness.scores import wilson
from harness.stages import Stage


def row(iteration: int, who: str, task: str, correct: int, n: int = 200) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "checkpoint": who,
        "task": task,
        "n": n,
        "correct": correct,
        "accuracy": correct / n,
        "ci95": list(wilson(correct, n)),
        "tokens_per_answer": 9.5 if who == "instruct" else None,
        "closed_traces": 0.0 if who == "instruct" else 0.985,
        "truncated": 0.0,
    }


ROWS = [
    row(0, "instruct", "mini_math", 70),
    row(0, "thinking", "mini_math", 180),
    row(1, "instruct", "mini_math", 121),
    row(1, "thinking", "mini_math", 176),
]
STAGES = [
    {"stage": "evaluate", "wall_s": 2.0, "cpu_s": 3.0, "peak_memory_mb": 700, "commands": [["lm_eval", "run"]]},
    {"stage": "evaluate", "wall_s": 4.0, "cpu_s": 5.0, "peak_memory_mb": 900, "commands": [["lm_eval", "<x>"]]},
]


def printed(thing: object) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(thing)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_table_has_counts_intervals_and_the_change_from_the_start() -> None:
    text = printed(report.table(ROWS))
    low, high = wilson(121, 200)
    line = next(line for line in text.splitlines() if "121/200" in line)
    for cell in ("60.5%", f"{100 * low:.1f}–{100 * high:.1f}", "9.5", "+25.5"):
        assert cell in line
    assert "-2.0" in next(line for line in text.splitlines() if "176/200" in line)
    first = next(line for line in text.splitlines() if "70/200" in line)
    assert not re.search(r"[+-]\d", first)


def test_time_is_summed_by_stage() -> None:
    assert report.by_stage([*STAGES, {}]) == [("evaluate", 2, 6.0, 8.0, 900)]


class Page(HTMLParser):
    """Collects what a browser would fetch, and checks that tags balance."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.points: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.fetched += [str(values[key]) for key in ("src", "href") if key in values]
        if tag == "polyline":
            self.points.append(str(values["points"]))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_whole_and_fetches_nothing() -> None:
    noted = {"asked": {"t": 0.5, "recipes": {"secret": 1}, "prompts": ["<b>"]}, "versions": {"torch": "2.13.0"}}
    html = report.page("a<b", ROWS, STAGES, {"rows": ROWS, "wall_s": 65.0, "cost_usd": 0.02}, noted)
    page = Page()
    page.feed(html)
    assert page.fetched == []
    assert "http" not in html
    text = " ".join(page.text)
    for said in ("a<b", "121/200", "1 min 05 s, 0.02 US dollars", "torch: 2.13.0", "lm_eval <x>"):
        assert said in text
    instruct = [tuple(map(float, point.split(","))) for point in page.points[0].split()]
    assert instruct[1][0] > instruct[0][0]  # time to the right
    assert instruct[1][1] < instruct[0][1]  # better is higher


def test_plain_lines_when_not_on_a_terminal(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=140, highlight=False)
    view = report.View(console)
    stage = Stage(1, "evaluate", tmp_path, {}, [["lm_eval", "run", "--config", "x"]], {})
    view.begin(tmp_path, 3, 13, 0, False)
    view.command(stage, 0, stage.commands[0])
    view.progress(stage, 3, 10)
    view.finished(stage, {"stage": "evaluate", "wall_s": 3.21, "rows": ROWS[2:3]})
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in text
    assert "iteration 1/3  evaluate        3.2 s  instruct mini_math 60.5%" in text


def test_one_live_view_on_a_terminal(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=140, force_terminal=True)
    view = report.View(console)
    stage = Stage(1, "evaluate", tmp_path, {}, [["lm_eval", "run", "--config", "x"]], {})
    view.begin(tmp_path, 3, 13, 0, False)
    try:
        view.command(stage, 0, stage.commands[0])
        view.progress(stage, 3, 10)
        other = stage._replace(name="generate", folder=stage.folder / "beside")
        view.command(other, 0, stage.commands[0])
        both = printed(view._picture())
        for said in ("stage 1 of 13", "evaluate", "3/10", "generate"):
            assert said in both
        view.finished(other, {"stage": "generate", "wall_s": 3.2, "labels": {"closed": 9, "total": 9}})
        view.finished(stage, {"stage": "evaluate", "wall_s": 3.2, "rows": ROWS[2:3]})
        assert view.live is not None
        picture = printed(view._picture())
        for said in ("stage 3 of 13", "last scores", "121/200"):
            assert said in picture
        assert "3/10" not in picture
    finally:
        view.close()
    assert view.live is None


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (3599.6, "60 min 00 s")]
)
def test_a_clock_a_person_reads(seconds: float, said: str) -> None:
    assert report._clock(seconds) == said
