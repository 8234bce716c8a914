"""The page: whole, well formed, safe to open, and with nothing outside it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_runs import row

from harness import evidence
from harness.costs.kept import Against
from harness.page import page
from harness.report import Answer, Question, Report

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


def reported(rows: list[dict[str, Any]] = ROWS, **changes: Any) -> Report:
    """A run as `gather` would find it."""
    cost = {"wall_s": 2.0, "cpu_s": 3.0, "peak_memory_mb": 700.0, "kind": "evaluate"}
    stages = [
        (0, "evaluate_instruct", {**cost, "key": "evaluate-01", "commands": [["lm_eval", "run"]]}),
        (0, "evaluate_thinking", {**cost, "key": "evaluate-02", "wall_s": 4.0, "commands": [["lm_eval", "<x>", "&y"]]}),
    ]
    made = Report("mine", rows, 1, [], [], [], [], stages, [], {}, [], {}, 65.0, 0.02)
    return replace(made, **changes)


def asked(scores: str, **where: Any) -> list[dict[str, Any]]:
    place = {"run": "mine", "arm": "answers", "seed": 42, "iteration": 0, "checkpoint": "instruct", "task": "mini_math"}
    known = {"answers": 1, "closed": 0, "truncated": 0, "trace_tokens": 0, "answer_tokens": 5}
    return [{**place, "question": str(at), "score": float(s), **known, **where} for at, s in enumerate(scores)]


GAINED = evidence.gains([*asked("0" * 12 + "1" * 8), *asked("1" * 20, iteration=1)])


def test_the_page_is_whole_and_fetches_nothing() -> None:
    noted = {"asked": {"t": 0.5, "recipes": {"secret": 1}, "prompts": ["p"]}, "versions": {"torch": "2.13.0"}}
    text = page([reported(noted=noted, comparisons=GAINED)])
    assert text.startswith("<!doctype html>")
    read = Page(text)
    assert read.fetched == []
    assert "script" not in read.seen
    assert not [style for style in read.styles if "url(" in style or "@import" in style]
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)
    said = ("121/200", "60.5%", "1 min 05 s", "0.02 US dollars", "torch: 2.13.0", "t: 0.5", "lm_eval run", "6.0")
    for words in ("mine", "instruct is better on mini_math", *said):
        assert words in read.words
    assert "secret" not in text  # the recipes are in their stages


def test_each_score_is_there_with_its_change() -> None:
    scores = page([reported()]).partition('<table id="scores">')[2].partition("</table>")[0]
    lines = [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in scores.split("<tr>")[2:]]
    assert [(line[1], line[2], line[3], line[6]) for line in lines] == [
        ("instruct", "0", "70/200", ""),
        ("instruct", "1", "121/200", "+25.5"),
        ("thinking", "0", "180/200", ""),
        ("thinking", "1", "176/200", "-2.0"),
    ]


def test_a_chart_for_each_task() -> None:
    more = [*ROWS, row(0, "instruct", "mini_qa", 100), row(1, "instruct", "mini_qa", 100)]
    assert Page(page([reported(more)])).seen.count("svg") == 4  # by iteration and by tokens


@pytest.mark.parametrize(
    "rows",
    [
        ROWS[:1],
        [row(0, "thinking", "x", 3)],
        [row(0, "instruct", "x", 2.5, n=4), row(12, "instruct", "x", 0, n=4)],
        [row(0, "instruct", "x", 0, n=1), row(0, "thinking", "x", 1, n=1)],
    ],
)
def test_a_run_that_has_only_begun_has_a_page_too(rows: list[dict[str, Any]]) -> None:
    read = Page(page([reported(rows, cost_usd=None, stages=[], missing=["iter_01/distill"])]))
    assert "dollars" not in read.words
    assert "nothing has been learnt yet" in read.words
    assert "1 of 1" in read.words
    assert "iter_01/distill" in read.words


def test_the_page_says_which_checkpoint_to_use_only_if_the_questions_do() -> None:
    stages = [
        (
            1,
            "distill",
            {"commands": [], "peak_memory_mb": 1.0, "kind": "distill", "key": "d", "wall_s": 1.0, "cpu_s": 1.0},
        )
    ]
    same = evidence.gains([*asked("01" * 10), *asked("01" * 10, iteration=1)])
    worse = evidence.gains([*asked("1" * 20), *asked("0" * 12 + "1" * 8, iteration=1)])
    says = {
        "Use mine/iter_01/distill/instruct": GAINED,
        "Nothing here says that the distilled checkpoint is better": same,
        "Keep the instruct checkpoint as it came": worse,
    }
    for words, comparisons in says.items():
        assert words in Page(page([reported(comparisons=comparisons, stages=stages)])).words
    assert (
        "Use mine" not in Page(page([reported(comparisons=GAINED, stages=stages, missing=["iter_02/distill"])])).words
    )


def test_several_runs_are_one_page() -> None:
    read = Page(page([reported(), reported(name="other")]))
    assert read.seen.count("h1") == 2
    assert "mine, other" in read.words


def test_what_models_and_users_write_is_text_and_never_markup() -> None:
    bad = "<b>&\"'</b><script>x</script>"
    plain = Page(page([reported(ROWS[:1])]))
    noted = {"asked": {bad: bad, "prompts": [bad]}, "versions": {bad: bad}}
    question = Question(bad, bad, "gained", [Answer(bad, bad, bad, 1.0)])
    curves = {bad: [{"step": 1, "value": 0.5, "iteration": 1}]}
    read = Page(page([reported([row(0, bad, bad, 5)], name=bad, noted=noted, questions=[question], curves=curves)]))
    assert "script" not in read.seen
    assert read.seen.count("b") == plain.seen.count("b") + 1  # the question's own heading
    assert bad in read.words
    assert "lm_eval <x> &y" in read.words


def test_what_was_planned_stands_beside_what_was_used_or_it_says_how_to_plan() -> None:
    assert "Nothing was planned: ts-loop plan" in Page(page([reported()])).words
    rows = [
        Against("evaluate", 2, (8.0, 6.0), (800 * 2**20, 700 * 2**20)),
        Against("distill", 1, (None, 3.0), (2e9, 1e9)),
    ]
    text = page([reported(planned=("a CPU", rows), noted={"asked": {"usd_per_hour": 3.6}})])
    assert "Nothing was planned" not in text
    shown = text.partition('<table id="plan">')[2].partition("</table>")[0]
    lines = [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in shown.split("<tr>")[2:]]
    assert lines[0] == ["evaluate", "2", "8.0", "6.0", "75%", "800", "700", "88%", "0.0080", "0.0060"]
    assert lines[1][:5] == ["distill", "1", "", "3.0", ""]
    assert lines[1][-2:] == ["", "0.0030"]
    assert "used $" not in page([reported(planned=("a CPU", rows))])


SEVERAL = {
    "repeats": 4,
    "pass_at_k": 0.75,
    "pass_at_k_ci95": [0.6, 0.86],
    "maj_at_k": 0.5,
    "maj_at_k_ci95": [0.35, 0.65],
    "pass_at": {"1": {"value": 0.4, "ci95": [0.3, 0.5]}, "4": {"value": 0.75, "ci95": [0.6, 0.86]}},
}


def test_several_answers_to_a_question_have_a_table_where_there_are_several() -> None:
    assert "pass@" not in Page(page([reported()])).words
    rows = [row(0, "instruct", "often", 16, n=40, **SEVERAL), row(0, "thinking", "often", 16, n=40, **SEVERAL), *ROWS]
    shown = page([reported(rows, at_k=GAINED)]).partition('<table id="repeats">')[2]
    lines = [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in shown.partition("</table>")[0].split("<tr>")[2:]]
    assert [line[:2] for line in lines] == [["often", "instruct"], ["often", "thinking"]]
    assert lines[0][3] == "4"
    assert lines[0][5:] == ["75.0% (60.0–86.0)", "50.0% (35.0–65.0)", "1: 40.0%, 4: 75.0%"]
    assert '<table id="at_k">' in shown


def test_arms_have_a_line_each_in_a_chart_for_each_checkpoint() -> None:
    def of(arm: str, *rows: dict[str, Any]) -> list[dict[str, Any]]:
        return [{**row, "arm": arm} for row in rows]

    alone = Page(page([reported(by_arm=of("thinkswitch", *ROWS))]))
    two = Page(page([reported(by_arm=[*of("thinkswitch", *ROWS), *of("merge_only", *ROWS[:2])])]))
    assert two.seen.count("svg") == alone.seen.count("svg") + 2
    for words in ("mini_math, instruct: arms", "mini_math, thinking: arms", "of every arm by iteration"):
        assert words in two.words
        assert words not in alone.words


def test_arms_of_one_seed_say_nothing_of_seeds() -> None:
    rows = [*asked("01"), *asked("11", iteration=1), *asked("01", arm="gold"), *asked("01", arm="gold", iteration=1)]
    two = [*rows, *[{**row, "seed": 1} for row in rows]]
    for arms, there in ((evidence.arms(rows), False), (evidence.arms(two), True)):
        shown = page([reported(arms=arms)]).partition('<table id="arms">')[2].partition("</table>")[0]
        assert ("over seeds" in shown) is there
        cells = [line.count("<td") for line in shown.split("<tr>")[2:]]
        assert cells == [shown.count("<th")] * 2


def test_passes_are_shown_of_tah_checkpoints_alone() -> None:
    passes = {"mean_depth": 1.0625, "skip_rate": 0.9375, "flops_per_token": 2.5e6}
    passes |= {"flops_per_token_single": 2e6, "flops_per_token_always": 5e6}
    assert "Passes" not in Page(page([reported()])).words
    read = Page(page([reported([row(0, "instruct", "x", 5, **passes)])]))
    assert "Passes of TaH checkpoints" in read.words
    assert "1.062" in read.words


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-quic",
]
MEASURE = """<script>addEventListener("load", () => {
  const wide = [...document.querySelectorAll("body *")].filter((e) => !e.closest(".scroll") && !e.closest("svg")
    && e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.tagName);
  document.title = JSON.stringify({page: document.documentElement.scrollWidth, window: innerWidth, wide});
});</script>"""


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [390, 1440])
def test_nothing_overflows_in_a_browser(tmp_path: Path, width: int) -> None:
    long = "a_task_with_quite_a_long_name_" * 2
    question = Question(
        "mini_math", "x" * 400, "gained", [Answer("instruct, iteration 0", "y " * 400, "z" * 300, 0.0)] * 3
    )
    more = [row(0, "instruct", long, 100), row(1, "instruct", long, 130)]
    text = page([reported([*ROWS, *more], comparisons=GAINED, questions=[question])])
    file = tmp_path / "page.html"
    # A window is no narrower than 500 pixels: the page is looked at in a frame.
    file.write_text(text.replace("</head>", f"{MEASURE}</head>"))
    frame = f'<iframe src="page.html" style="width:{width}px;height:900px;border:0" onload="setTimeout(() => {{'
    frame += 'document.body.dataset.found = this.contentDocument.title}, 200)"></iframe>'
    (tmp_path / "frame.html").write_text(frame)
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    flags = [*FLAGS, "--allow-file-access-from-files", "--virtual-time-budget=3000", "--enable-logging=stderr", profile]
    said = subprocess.run(
        [str(CHROMIUM), *flags, "--window-size=1600,1000", "--dump-dom", (tmp_path / "frame.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in said.stderr
    found = json.loads(html.unescape(re.findall(r'data-found="([^"]*)"', said.stdout)[0]))
    assert found["window"] == width
    assert found["page"] <= width
    assert found["wide"] == []
