"""What a run's page is made from: read from the run's folder, whatever state it is in."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from made_runs import finished, row
from small import command_here

from harness import outcomes, report
from harness.errors import LoopError
from harness.files import write_json
from harness.store import Store

QUESTIONS = [f"Compute {n}+{n}." for n in range(1, 7)]
PLACES = [(0, "instruct"), (0, "thinking"), (1, "instruct")]
RIGHT = {(0, "instruct"): "110000", (0, "thinking"): "111111", (1, "instruct"): "011100"}
LOG = b"""$ axolotl train
 50%|## | 1/2\r{'loss': '0.5', 'grad_norm': '0.4', 'learning_rate': '1e-3', 'epoch': '1'}
{'loss': '0.25', 'opd/kl': '0.125', 'epoch': '2'}
{'train_runtime': '9', 'train_loss': '0.3'}
{'loss': broken}
"""


def sample(number: int, checkpoint: str, right: bool) -> dict[str, Any]:
    answer = f"\\boxed{{{2 * (number + 1) if right else 0}}}"
    thinks = checkpoint == "thinking"
    return {
        "doc_id": number,
        "doc": {"question": QUESTIONS[number], "answer": str(2 * (number + 1)), "trace_opened": thinks},
        "arguments": {"gen_args_0": {"arg_0": f"<user>{QUESTIONS[number]}<assistant>"}},
        "resps": [[f"let me see</think>\n\n{answer}" if thinks else answer]],
        "filter": "none",
    }


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A run of one iteration, all of it done but the second evaluation of thinking."""
    store = Store(tmp_path / "stages")
    steps, rows, asked = [], [], []
    for iteration, checkpoint in PLACES:
        key = f"evaluate-{iteration}{checkpoint}"
        samples = [sample(n, checkpoint, right == "1") for n, right in enumerate(RIGHT[iteration, checkpoint])]
        lines = "".join(json.dumps(one) + "\n" for one in samples).encode()
        finished(store, key, {"answers/samples_sums_2026-11-25T00.jsonl": lines})
        where = {"iteration": iteration, "checkpoint": checkpoint}
        steps.append({**where, "name": f"evaluate_{checkpoint}", "key": key})
        rows.append(row(iteration, checkpoint, "sums", RIGHT[iteration, checkpoint].count("1"), n=6))
        asked += [
            {
                **where,
                "run": "mine",
                "arm": "answers",
                "seed": 42,
                "task": "sums",
                "answers": 1,
                "closed": 0,
                "truncated": 0,
                "trace_tokens": 0,
                "answer_tokens": 5,
                "score": float(right),
                "question": outcomes.question(one),
            }
            for one, right in zip(samples, RIGHT[iteration, checkpoint], strict=True)
        ]
    finished(store, "distill-1", {"log.txt": LOG})
    steps.append({"iteration": 1, "checkpoint": "", "name": "distill", "key": "distill-1"})
    steps.append({"iteration": 1, "checkpoint": "thinking", "name": "evaluate_thinking", "key": "evaluate-none"})
    folder = tmp_path / "mine"
    folder.mkdir()
    write_json(folder / "run.json", {"steps": steps, "asked": {"seed": 42}})
    write_json(folder / "results.json", {"rows": rows, "wall_s": 65.0, "cost_usd": None})
    (folder / "outcomes.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    return tmp_path


def test_a_run_is_read_from_its_folder(out: Path) -> None:
    found = report.gather(out, "mine")
    assert [one.test.gained for one in found.comparisons] == [2]
    assert found.missing == ["iter_01/evaluate_thinking"]
    assert [name for _, name, _ in found.stages].count("distill") == 1
    assert found.curves == {
        "loss": [{"step": 1, "value": 0.5, "iteration": 1}, {"step": 2, "value": 0.25, "iteration": 1}],
        "KL to the teacher, nats a token": [{"step": 2, "value": 0.125, "iteration": 1}],
    }


def test_gained_and_lost_questions_come_first_with_what_each_wrote(out: Path) -> None:
    questions = report.gather(out, "mine").questions
    assert [(one.asked, one.fate) for one in questions[:3]] == [
        (QUESTIONS[2], "gained"),
        (QUESTIONS[0], "lost"),
        (QUESTIONS[3], "gained"),
    ]
    assert {one.fate for one in questions[3:]} == {"same"}
    before, after, thinking = questions[0].answers
    assert (before.who, before.answer, before.score) == ("instruct, iteration 0", "\\boxed{0}", 0.0)
    assert (after.answer, after.score) == ("\\boxed{6}", 1.0)
    assert (thinking.trace, thinking.answer) == ("let me see", "\\boxed{6}")


def test_of_several_answers_the_first_is_shown_and_said_to_be(out: Path) -> None:
    file = out / "mine" / "outcomes.jsonl"
    rows = [json.loads(line) for line in file.open()]
    file.write_text("".join(json.dumps({**row, "answers": 4, "score": row["score"] / 2}) + "\n" for row in rows))
    before, after, _ = report.gather(out, "mine").questions[0].answers
    assert (before.who, before.score) == ("instruct, iteration 0, the first of 4 answers", 0.0)
    assert (after.who, after.score) == ("instruct, iteration 1, the first of 4 answers", 0.5)


def test_answers_that_are_gone_leave_a_page_without_them(out: Path) -> None:
    for file in (out / "stages").glob("*/answers/*"):
        file.write_text("{")
    assert report.gather(out, "mine").questions == []


def test_a_dial_that_has_nothing_yet_or_is_of_an_earlier_iteration_is_not_shown(out: Path) -> None:
    turned = out / "mine.dial"
    turned.mkdir()
    assert report.gather(out, "mine").dial == []

    def rebuilt(run: Path, learnt: str) -> None:
        noted = json.loads((run / "run.json").read_text()) if (run / "run.json").exists() else {"steps": []}
        step = {
            "iteration": 1,
            "name": "reconstruct",
            "key": "reconstruct-1",
            "reads": {"inputs": {"instruct": learnt}},
        }
        write_json(run / "run.json", {**noted, "steps": [*noted["steps"], step]})

    rows = [json.loads(line) for line in (out / "mine" / "outcomes.jsonl").open()]
    lines = [json.dumps({**row, "arm": "t=0.5"}) + "\n" for row in rows if row["checkpoint"] == "thinking"]
    (turned / "outcomes.jsonl").write_text("".join(lines))
    rebuilt(out / "mine", "distill-1/instruct")
    rebuilt(turned, "distill-0/instruct")
    assert report.gather(out, "mine").dial == []
    write_json(turned / "run.json", {"steps": []})
    rebuilt(turned, "distill-1/instruct")
    assert [point.t for point in report.gather(out, "mine").dial] == [0.5]


def test_a_run_that_chose_t_shows_what_it_chose_from_and_a_dial_how_far_weights_are_apart(out: Path) -> None:
    tried = [{"t": 0.0, "closed": 1.0, "agreement": 0.8, "passes": True}]
    tried += [{"t": 0.1, "closed": 0.5, "agreement": 0.25, "passes": False}]
    about = {"iteration": 1, "arm": "answers", "seed": 42}
    choice = {**about, "t": 0.0, "why": "t = 0, the anchor itself; <others> fall short", "candidates": tried}
    results = json.loads((out / "mine" / "results.json").read_text())
    write_json(out / "mine" / "results.json", {**results, "chosen": [choice, {**choice, "seed": 43}]})
    noted = json.loads((out / "mine" / "run.json").read_text())
    reads = {"inputs": {"instruct": "distill-1/instruct"}}
    rebuilt = {"iteration": 1, "checkpoint": "", "name": "reconstruct_t0.1", "key": "reconstruct-1", "reads": reads}
    write_json(out / "mine" / "run.json", {**noted, "steps": [*noted["steps"], rebuilt]})
    apart = {"tensors": [["model.layers.0.mlp.w", 1.0, 1.0, 1.0], ["model.layers.1.mlp.w", 1.0, 1.0, 0.0]]}
    finished(Store(out / "stages"), "angles-1", {"angles.json": b""}, facts=apart)
    turned = out / "mine.dial"
    turned.mkdir()
    steps = [{**rebuilt, "name": "reconstruct"}, {"iteration": 1, "name": "angles", "key": "angles-1", "reads": {}}]
    write_json(turned / "run.json", {"steps": steps})
    rows = [json.loads(line) for line in (out / "mine" / "outcomes.jsonl").open()]
    lines = [json.dumps({**row, "arm": "t=0.5"}) + "\n" for row in rows if row["checkpoint"] == "thinking"]
    (turned / "outcomes.jsonl").write_text("".join(lines))
    found = report.gather(out, "mine")
    assert found.chosen == [choice]
    ((whose, (one, other)),) = found.apart.items()
    assert (one.angle, other.angle) == (pytest.approx(math.pi / 3), 0.0)
    text = report.write(out, ["mine"]).read_text()
    assert "Iteration 1: t = 0, the anchor itself; &lt;others&gt; fall short." in text
    assert re.search(r"<td>0</td>\s*<td>100.0%</td>\s*<td>80.0%</td>\s*<td></td>\s*<td>chosen</td>", text)
    assert re.search(r"<td>0.1</td>\s*<td>50.0%</td>\s*<td>25.0%</td>\s*<td></td>\s*<td>falls short</td>", text)
    assert f"angles: {whose}" in text
    assert re.search(r"<td class=text>all</td>\s*<td>2</td>\s*<td>0.00</td>\s*<td>30.00</td>\s*<td>60.00</td>", text)


def test_what_is_no_run_or_has_nothing_to_show_is_one_line(out: Path) -> None:
    with pytest.raises(LoopError, match="no such run"):
        report.gather(out, "other")
    write_json(out / "mine" / "results.json", {"rows": [], "wall_s": 0, "cost_usd": None})
    with pytest.raises(LoopError, match="nothing of it is evaluated yet"):
        report.gather(out, "mine")


def test_the_command_writes_the_page(out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert command_here(monkeypatch, "report", "mine", "--out", out) == 0
    assert capsys.readouterr().out.strip() == str(out / "mine" / "report.html")
    assert "Not finished: 1 of" in (out / "mine" / "report.html").read_text()
    assert command_here(monkeypatch, "report", "mine", "mine", "--out", out, "--to", out / "both.html") == 0
    assert (out / "both.html").read_text().count("<h1>") == 1
    assert command_here(monkeypatch, "report", "other", "--out", out) == 2
