"""Choose t: of thinking checkpoints rebuilt at several t, the largest t that still answers as the anchor does.

    python -m harness.choosing recipe.yml FOLDER

t = 0 is the anchor itself, asked again under another seed, and shows what it takes: a larger t passes that closes as
many traces and agrees as often with the anchor's first answers, each to a point, while every smaller t passes too. A
merge breaks down for good beyond some t (arXiv 2510.10977): what passes beyond one that failed did so by chance. All t
are asked under the seed of the anchor's second answers, so that the anchor's twin draws what it drew and chance is on
both sides alike. Where labels are decoded greedily, a seed changes nothing and the anchor would agree with itself on
everything: then all t, the anchor among them, are sampled from what they think likely (temperature 1).
Without `labels` it is instead the t with the best score; of equals the largest.

Knows what two answers to one prompt must share to agree. Leaves to lm-eval what a task's own filters read, to
`outcomes` what an answer is worth. Nothing of the test is read. FOLDER gets `choice.json` and `thinking/`, the chosen
checkpoint.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from harness import outcomes
from harness.asking import after_trace, asked_tasks, opened_trace, samples, texts
from harness.errors import LoopError
from harness.files import read_json, write_json
from harness.grading import manager_of
from harness.stats import mean
from harness.store import loaded
from thinkswitch_plugin.trace_stripping import split_trace

CHOICE, CHECKPOINT = "choice.json", "thinking"
POINT = 0.01  # by which a share may fall short
COMPARABLE = 0.1  # of its prompts, on which an anchor agrees with itself whose answers can be compared at all
EXAMPLE = """\
the recipe names, for each t, a checkpoint and what it answered; t 0 is the anchor, asked under another seed:
  labels: stages/generate-1/answers           # the anchor's first answers
  tasks: [mini_math_prompts]
  tried:
    - {t: 0.0, checkpoint: thinking, answers: stages/answer-1/answers}
    - {t: 0.1, checkpoint: stages/reconstruct-1/thinking, answers: stages/answer-2/answers}
"""
Place = tuple[str, int]  # task, number of the question
Written = dict[Place, list[str | None]]  # what each answer states; None for one without a closed trace


class Tried(NamedTuple):
    """What one t came to.

    Attributes:
        t: weight of the instruct checkpoint, in [0, 1].
        closed: share of answers that closed their trace.
        agreement: share of them that state what the anchor's first answer to the same prompt does.
        n: answers.
    """

    t: float
    closed: float
    agreement: float
    n: int


def chosen(tried: Sequence[Tried]) -> dict[str, Any]:
    """The largest t that passes with all smaller ones, and why; `tried` begins with t = 0, in rising order of t.

    Where the anchor's answers cannot be compared with its own (free text), no other passes: that traces close says
    nothing of what follows them.

    Returns:
        `{"t", "why", "n", "demanded": {"closed", "agreement"}, "candidates": [{"t", "closed", "agreement",
        "passes"}]}`; what agreement is demanded is null where the anchor's answers cannot be compared with its own.
    """
    anchor = tried[0]
    comparable = anchor.agreement >= COMPARABLE
    closed, agreement = anchor.closed - POINT, anchor.agreement - POINT

    def passes(one: Tried) -> bool:
        return not one.t or (comparable and at_least(one.closed, closed) and at_least(one.agreement, agreement))

    best, failed = anchor, None
    for one in tried[1:]:
        if not passes(one):
            failed = one
            break
        best = one
    bounds = f"{closed:.1%} closed and {agreement:.1%} as the anchor are demanded, by its own second answers"
    if not comparable:
        bounds = (
            f"the anchor agrees with itself on {anchor.agreement:.1%} alone: such answers cannot be compared, name a "
            "task by validate: to have them judged"
        )
    if anchor.n * POINT < 1:
        bounds += ", which is less than one answer, so chance weighs much"
    why = f"t = {best.t:g}" + (f" ({_came_to(best)})" if best.t else ", the anchor itself")
    why += f"; t = {failed.t:g} falls short ({_came_to(failed)})" if failed else ", the largest there is"
    return {
        "t": best.t,
        "why": f"{why}; {bounds}; {anchor.n} answers each",
        "n": anchor.n,
        "demanded": {"closed": closed, "agreement": agreement if comparable else None},
        "candidates": [
            {"t": one.t, "closed": one.closed, "agreement": one.agreement, "passes": passes(one)} for one in tried
        ],
    }


def at_least(share: float, bound: float) -> bool:
    """Whether a share of answers is no less than a bound, rounding aside."""
    return share > bound - 1e-9


def _came_to(one: Tried) -> str:
    return f"{one.closed:.1%} closed, {one.agreement:.1%} as the anchor"


def best(scores: Mapping[float, Mapping[str, float]]) -> dict[str, Any]:
    """The t with the best score, the mean over tasks, and why; `scores` has accuracies by t and task.

    Returns:
        `{"t", "why", "candidates": [{"t", "accuracy": {task: …}, "passes"}]}`.
    """
    means = {t: mean(list(by_task.values())) for t, by_task in scores.items()}
    top = max(means.values())
    t = max(t for t, score in means.items() if at_least(score, top))
    named = ", ".join(f"{task} {accuracy:.1%}" for task, accuracy in scores[t].items())
    anchor = f"; the anchor has {means[0.0]:.1%}" if t else ", the anchor itself"
    return {
        "t": t,
        "why": f"t = {t:g}: the best of {len(scores)} on {named}{anchor}",
        "candidates": [
            {"t": one, "accuracy": dict(by), "passes": at_least(means[one], top)} for one, by in scores.items()
        ],
    }


# --- what answers state ---


def agreement(ours: Written, theirs: Written) -> tuple[float, int]:
    """How often two checkpoints' answers to the same prompts state the same, and of how many answers.

    An answer without a closed trace states nothing, and agrees with none.

    Raises:
        LoopError: they were asked nothing in common.
    """
    pairs = [pair for place in ours if place in theirs for pair in zip(ours[place], theirs[place], strict=False)]
    if not pairs:
        raise LoopError("the answers have no prompt in common: they are not of one run")
    return mean([float(mine is not None and mine == other) for mine, other in pairs]), len(pairs)


def closed(written: Written) -> float:
    """Share of answers whose trace closed with an answer after it."""
    every = [stated is not None for answers in written.values() for stated in answers]
    return mean([float(one) for one in every])


def read(folder: Path, names: Sequence[str], recipe: Mapping[str, Any]) -> Written:
    """What every answer to some tasks' prompts states.

    Args:
        folder: what lm-eval filled.
        names: the tasks.
        recipe: with which they were asked.

    Raises:
        StageError: if the answers are missing or not whole.
    """
    written: Written = {}
    counts = asked_tasks(folder)
    for name in names:
        rows = list(samples(folder, name, counts.get(name, -1)))
        traces = [[(text, split_trace(text, opened_trace(row))) for text in texts(row, name)] for row in rows]
        answers = [[after_trace(*pair) if pair[1].status == "closed" else None for pair in each] for each in traces]
        if filters_of(folder, name):
            answers = filtered(name, rows, answers, recipe)
        for row, each in zip(rows, answers, strict=True):
            written[name, row["doc_id"]] = [None if text is None else stated(text) for text in each]
    return written


def filters_of(folder: Path, name: str) -> Any:
    """The filters that a task has in its YAML, as lm-eval noted them; none for most."""
    results = sorted(folder.glob("results_*.json"))[-1]
    return ((read_json(results) or {}).get("configs", {}).get(name) or {}).get("filter_list")


def filtered(
    name: str, rows: Sequence[Mapping[str, Any]], answers: list[list[str | None]], recipe: Mapping[str, Any]
) -> list[list[str | None]]:
    """Answers as a task's first filter reads them; as they are where it finds nothing in them."""
    from lm_eval.api.instance import Instance

    (first, *_) = manager_of(recipe).load_task_or_group(name)[name]._filters
    places = [(i, j) for i, each in enumerate(answers) for j, text in enumerate(each) if text is not None]
    # As often as the prompt was asked: a filter that takes the first k or a vote finds k that agree.
    instances = [
        Instance("generate_until", rows[i]["doc"], ("", {}), 0, resps=[str(answers[i][j])] * len(answers[i]))
        for i, j in places
    ]
    first.apply(instances)
    found = [list(each) for each in answers]
    for (i, j), instance in zip(places, instances, strict=True):
        value = instance.filtered_resps[first.name]
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, str) and value.strip() and value != "[invalid]":
            found[i][j] = value
    return found


def stated(text: str) -> str:
    r"""What an answer states, for comparison with another to the same prompt.

    Prompts have no gold answer, so nobody says what kind of answer there is to read: what the last `\boxed{}` holds, or
    else a decision (yes, no, maybe), or else the integer that is last said to be the answer, or else all of it without
    case, runs of white space and a full stop at its end.
    """
    from lm_eval.tasks.hendrycks_math.utils import last_boxed_only_string, remove_boxed, strip_string
    from lm_eval.tasks.thinkswitch.answers import read_decision, read_integer

    if box := last_boxed_only_string(text):
        try:
            return str(strip_string(remove_boxed(box)))
        except (AssertionError, IndexError, ValueError):  # what LaTeX may be, these two were not written for
            return plain(box)
    decision = read_decision(text)
    number = None if decision else read_integer(text)
    return decision or (plain(text) if number is None else str(number))


def plain(text: str) -> str:
    """A text without case, runs of white space and full stops at its end."""
    return re.sub(r"\s+", " ", text).strip().rstrip(".").casefold()


# --- the command ---


def judged(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Which t a recipe's answers choose, and why.

    Raises:
        StageError: if answers are missing or not whole.
        LoopError: if the recipe does not begin with t = 0 or its answers have nothing in common.
    """
    tried = sorted(recipe["tried"], key=lambda one: one["t"])
    if not tried or tried[0]["t"] != 0:
        raise LoopError("recipe: tried: must have t: 0, the anchor itself, beside which the others are held")
    names = recipe["tasks"]
    if "labels" not in recipe:
        scores: dict[float, dict[str, float]] = {}
        for one in tried:
            graded = Path(one["graded"]) if one.get("graded") else None
            rows = outcomes.summary(outcomes.read(Path(one["answers"]), None, graded))
            scores[one["t"]] = {row["task"]: row["accuracy"] for row in rows if row["task"] in names}
        return best(scores)
    asked = yaml.safe_load(Path(recipe["asked"]).read_text(encoding="utf-8")) if recipe.get("asked") else {}
    labels = read(Path(recipe["labels"]), names, asked)
    found = []
    for one in tried:
        written = read(Path(one["answers"]), names, asked)
        found.append(Tried(one["t"], closed(written), *agreement(written, labels)))
    return chosen(found)


def taken(checkpoint: Path, folder: Path) -> None:
    """Put what a loader reads of a checkpoint into a folder: by link where both lie in one store, which nobody writes
    to, else as a copy, as whose a user's own folder is may be trained on."""
    folder.mkdir()
    ours = folder.parent.parent.resolve()
    for path in loaded(checkpoint):
        if path.resolve().is_relative_to(ours):
            try:
                os.link(path.resolve(), folder / path.name)
                continue
            except OSError:  # a disk that has no links
                pass
        shutil.copy(path, folder / path.name)


def main() -> None:
    """The command: see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.choosing",
        description="Choose the largest t whose rebuilt thinking checkpoint still answers as the anchor does.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="which t was tried, and what came of it")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="gets choice.json and thinking/")
    options = parser.parse_args()
    try:
        recipe = yaml.safe_load(options.recipe.read_text(encoding="utf-8"))
        choice = judged(recipe)
        (winner,) = (one for one in recipe["tried"] if one["t"] == choice["t"])
        taken(Path(winner["checkpoint"]), options.folder / CHECKPOINT)
        write_json(options.folder / CHOICE, choice)
    except KeyError as error:
        raise SystemExit(f"harness.choosing: {options.recipe}: has no {error.args[0]}; see --help") from None
    except (LoopError, OSError, yaml.YAMLError) as error:
        raise SystemExit(f"harness.choosing: {error}") from None
    print(choice["why"])


if __name__ == "__main__":
    main()
