"""All that a run's page shows, read from its folder: whether it is over, goes on, or was stopped.

Knows where a run keeps what. Leaves the numbers to `evidence`, the pictures to `charts`, the look to `page`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from harness import asking, evidence, outcomes
from harness.angles import Apart, of_json
from harness.costs.kept import Against, against
from harness.errors import LoopError, StageError
from harness.evidence import Arm, Comparison, Figures, Point
from harness.files import disk_errors, read_json, write_text
from harness.rundir import RunDir, place_of
from harness.store import Store
from thinkswitch_plugin.trace_stripping import split_trace

LOGGED = re.compile(rb"\{'loss': [^{}]*\}")  # as the trainers print it
CURVES = {"loss": "loss", "opd/kl": "KL to the teacher, nats a token"}
WEIGHTS = {"angles": "what is merged", "angles_came": "the pair at first"}  # by a dial's steps
SHOWN = 10  # questions side by side
SIDES = (("instruct", 0), ("instruct", None), ("thinking", 0))  # None: the last iteration


class Answer(NamedTuple):
    """What one checkpoint wrote to a question.

    Attributes:
        who: "instruct, iteration 0".
        trace: its reasoning; empty where there is none.
        answer: the rest.
        score: in [0, 1].
    """

    who: str
    trace: str
    answer: str
    score: float


class Question(NamedTuple):
    """A question with what several checkpoints wrote: `fate` is gained, lost or same."""

    task: str
    asked: str
    fate: str
    answers: list[Answer]


@dataclass(frozen=True)
class Report:
    """What there is to say of a run.

    Attributes:
        name: of the run.
        rows: of results.json; of several seeds, those of the first arm with the seeds taken together.
        seeds: how many.
        comparisons: the last iteration against the pair as it came.
        arms: what came of each, where there are several arms or seeds.
        dial: the thinking checkpoint at other t, where `ts-loop dial` was run.
        figures: transfer ratio and tokens for each right answer.
        stages: (iteration, name, record) of what is done, in the plan's order.
        missing: "iter_02/distill" of what is not.
        curves: what the trainers logged: its name → rows of step, value, iteration.
        questions: some, side by side.
        noted: run.json.
        wall_s: of all sittings.
        cost_usd: of those, None without a price.
        by_arm: rows as `rows`, of every arm.
        planned: what device was planned for, and what stages took against it; see `costs.kept`.
        at_k: as `comparisons`, by pass@k and maj@k, where questions were asked k times.
        apart: the weights that the dial interpolates, and those of the pair as it came, by what they are called.
        chosen: which t each iteration went on with, and why, where the run chose it; of the first arm and seed.
    """

    name: str
    rows: list[dict[str, Any]]
    seeds: int
    comparisons: list[Comparison]
    arms: list[Arm]
    dial: list[Point]
    figures: list[Figures]
    stages: list[tuple[int, str, dict[str, Any]]]
    missing: list[str]
    curves: dict[str, list[dict[str, Any]]]
    questions: list[Question]
    noted: dict[str, Any]
    wall_s: float
    cost_usd: float | None
    by_arm: list[dict[str, Any]] = field(default_factory=list)
    at_k: list[Comparison] = field(default_factory=list)
    apart: dict[str, list[Apart]] = field(default_factory=dict)
    chosen: list[dict[str, Any]] = field(default_factory=list)
    planned: tuple[str, list[Against]] = ("", [])


def gather(out: Path, name: str) -> Report:
    """Read a run.

    Raises:
        LoopError: there is no such run, or nothing of it is evaluated yet.
    """
    folder, store = RunDir(out / name), Store(out / "stages")
    noted = folder.noted()
    if not noted:
        raise LoopError(f"{out / name}: no such run; see ts-loop status")
    results = read_json(folder.results)
    if not isinstance(results, dict) or not isinstance(results.get("rows"), list) or not results["rows"]:
        raise LoopError(f"{out / name}: nothing of it is evaluated yet; there is nothing to report")
    asked = evidence.read(folder.root)
    seeds = len({row["seed"] for row in asked})
    records = [(step, store.record(step["key"])) for step in noted["steps"]]
    done = [(step["iteration"], step["name"], record) for step, record in records if record]
    first = [step for step in noted["steps"] if place_of(step).startswith("iter_")]
    about = (asked[0]["arm"], asked[0]["seed"])
    turned = dial_of(out, name, asked)
    return Report(
        name=name,
        rows=evidence.pooled(asked) if seeds > 1 else results["rows"],
        seeds=seeds,
        comparisons=evidence.gains(asked),
        arms=evidence.arms(asked),
        dial=turned,
        apart=apart_of(out, name) if turned else {},
        chosen=[one for one in results.get("chosen", []) if (one["arm"], one["seed"]) == about],
        figures=evidence.figures(asked),
        stages=done,
        missing=[place_of(step) for step, record in records if not record],
        curves=curves(store, first),
        questions=list(side_by_side(store, first, evidence.first_seed(asked))),
        noted=noted,
        wall_s=results["wall_s"],
        cost_usd=results["cost_usd"],
        by_arm=evidence.by_arm(asked),
        at_k=evidence.gains(evidence.of_several(asked)),
        planned=against(folder.plan, [(step, record) for step, record in records if record]),
    )


def write(out: Path, names: Sequence[str], to: Path | None = None) -> Path:
    """Write the page of some runs; returns where it is.

    Args:
        out: where runs are.
        names: theirs.
        to: the page; None for the run's own folder, or `out` where there are several.

    Raises:
        LoopError: as `gather`, or it cannot be written.
    """
    from harness.page import page

    file = to or (RunDir(out / names[0]).report if len(names) == 1 else out / "report.html")
    text = page([gather(out, name) for name in dict.fromkeys(names)])
    with disk_errors(file.parent, "--to" if to else "--out"):
        write_text(file, text)
    return file


def dial_of(out: Path, name: str, asked: Sequence[evidence.Row]) -> list[Point]:
    """The dial of a run, as far as it is; none of an earlier iteration than the run's last."""

    def merged(run: str) -> set[str]:
        steps = [step for step in RunDir(out / run).noted().get("steps", []) if "reconstruct" in step["name"]]
        mine = [step for step in steps if not place_of(step).startswith("merge_only")]
        last = max((step["iteration"] for step in mine), default=0)
        return {step["reads"]["inputs"]["instruct"] for step in mine if step["iteration"] == last}

    turned = out / f"{name}.dial"
    try:
        if (turned / "outcomes.jsonl").is_file() and merged(turned.name) & merged(name):
            return evidence.dial(evidence.read(turned), asked)
    except (LoopError, KeyError):
        pass  # one that was stopped early is none yet
    return []


def apart_of(out: Path, name: str) -> dict[str, list[Apart]]:
    """How far weights point apart, tensor by tensor, as the dial of a run found it; by whose they are."""
    store, found = Store(out / "stages"), {}
    for step in RunDir(out / f"{name}.dial").noted().get("steps", []):
        if (called := WEIGHTS.get(step["name"])) and (record := store.record(step["key"])):
            found[called] = of_json(record["facts"])
    return found


def curves(store: Store, steps: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What the trainers printed as they went, by what it is."""
    found: dict[str, list[dict[str, Any]]] = {}
    for step in steps:
        if step["name"] == "distill":
            for number, logged in enumerate(_logged(store.folder(step["key"]) / "log.txt"), start=1):
                for key, title in CURVES.items():
                    if (value := logged.get(key)) is not None:
                        row = {"step": number, "value": value, "iteration": step["iteration"]}
                        found.setdefault(title, []).append(row)
    return found


def _logged(log: Path) -> Iterator[dict[str, float]]:
    try:
        text = log.read_bytes()
    except OSError:
        return
    for line in LOGGED.findall(text):
        try:
            values = ast.literal_eval(line.decode())
            yield {key: float(value) for key, value in values.items()}
        except (ValueError, SyntaxError):
            continue


def side_by_side(store: Store, steps: Sequence[Mapping[str, Any]], rows: Sequence[evidence.Row]) -> Iterator[Question]:
    """Some questions with the answers of the pair as it came and of the distilled checkpoint: first those that were
    gained and lost, in turn, then others, each in the order they were asked."""
    last = max((row["iteration"] for row in rows if row["checkpoint"] == "instruct"), default=0)
    sides = [(who, last if iteration is None else iteration) for who, iteration in SIDES]
    keys = {(step.get("checkpoint"), step["iteration"]): step["key"] for step in steps if step.get("checkpoint")}
    asked = {(row["checkpoint"], row["iteration"], row["task"], row["question"]): row for row in rows}
    scores = {place: row["score"] for place, row in asked.items()}
    before, after = sides[0], sides[1]
    if before == after or not all(side in keys for side in sides):
        return
    fates: dict[str, list[tuple[str, str]]] = {"gained": [], "lost": [], "same": []}
    for who, iteration, task, question in scores:
        first = (*before, task, question)
        if (who, iteration) == after and first in scores:
            change = scores[who, iteration, task, question] - scores[first]
            fates["gained" if change > 0 else "lost" if change < 0 else "same"].append((task, question))
    changed = [
        (fate, *place)
        for pair in zip(_padded(fates["gained"], SHOWN), _padded(fates["lost"], SHOWN), strict=True)
        for fate, place in zip(("gained", "lost"), pair, strict=True)
        if place
    ]
    chosen = [*changed[: SHOWN - 2], *(("same", *place) for place in fates["same"])][:SHOWN]
    wanted = {(task, question) for _, task, question in chosen}
    written = {side: _written(store.folder(keys[side]) / asking.ANSWERS, wanted) for side in sides}
    for fate, task, question in chosen:
        if all((task, question) in written[side] for side in sides):
            yield Question(
                task,
                written[before][task, question][0],
                fate,
                [
                    Answer(_by_whom(row), *written[who, iteration][task, question][1:], row["score"])
                    for who, iteration in sides
                    if (row := asked.get((who, iteration, task, question)))
                ],
            )


def _by_whom(row: evidence.Row) -> str:
    """Whose answer it is; of several the first one is shown, beside the score of all."""
    several = f", the first of {row['answers']} answers" if row["answers"] > 1 else ""
    return f"{row['checkpoint']}, iteration {row['iteration']}{several}"


def _padded(places: list[tuple[str, str]], length: int) -> list[tuple[str, str] | None]:
    return [*places[:length], *[None] * (length - len(places[:length]))]


def _written(folder: Path, wanted: set[tuple[str, str]]) -> dict[tuple[str, str], tuple[str, str, str]]:
    """What was asked, the trace and the answer, of wanted (task, question)s; what cannot be read is left out."""
    found = {}
    for task in dict.fromkeys(task for task, _ in wanted):
        try:
            for sample in asking.samples(folder, task):
                place = (task, outcomes.question(sample))
                if place in wanted:
                    text = asking.texts(sample, task)[0]
                    trace = split_trace(text, asking.opened_trace(sample))
                    answer = asking.after_trace(text, trace)
                    found[place] = (asked_text(sample), trace.reasoning or "", answer)
        except (StageError, KeyError, OSError):
            continue
    return found


def asked_text(sample: Mapping[str, Any]) -> str:
    """A question as a person reads it: its row's own, else what the model was given."""
    row = sample["doc"]
    if isinstance(messages := row.get("messages"), list) and messages:
        return str(messages[-1].get("content", ""))
    own = next((row[key] for key in ("question", "problem", "prompt") if isinstance(row.get(key), str)), None)
    return own or str(asking.prompt_of(sample))
