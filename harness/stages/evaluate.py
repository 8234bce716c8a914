"""Evaluate: one checkpoint answers the test questions (lm-eval), and the answers are graded.

Ours is what lm-eval says of tasks that know of traces; what follows the trace is graded again where a task does not, or
where a question is asked more than once. The passes of a TaH checkpoint are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness import asking, outcomes
from harness.asking import ANSWERS, NF4_COPY, Settings
from harness.errors import LoopError
from harness.files import read_json
from harness.interpreters import Interpreter
from harness.stages import OWN, RECIPE, Facts, Kind, Recipe, Source, Stage
from harness.tasks import Task

GRADED, PASSES = "graded.jsonl", "passes.json"


def build(
    recipe: Recipe,
    settings: Settings,
    tasks: Sequence[Task],
    checkpoint: Source,
    tah: bool = False,
    interpreter: Interpreter | None = None,
) -> Stage:
    """The stage.

    Args:
        recipe: lm-eval's config as it is written.
        settings: how the run asks.
        tasks: whose questions are asked.
        checkpoint: what is tested.
        tah: it is a TaH checkpoint, whose code was looked at.
        interpreter: whose lm-eval asks, if not this environment's.

    Raises:
        LoopError: if the recipe would have the answers not scored, or a question asked several times for one answer.
    """
    resolved, inputs = asking.recipe_for(recipe, settings, [task.name for task in tasks], checkpoint, interpreter)
    if resolved.get("predict_only"):
        raise LoopError("evaluate: predict_only: lm-eval would not score the answers; remove it from the recipe")
    check_repeats(resolved, tasks)
    if tah:
        resolved["model_args"]["trust_remote_code"] = True
    commands = asking.commands_for(resolved, settings, interpreter)
    where = (f"{OWN}/{ANSWERS}", "--recipe", f"{OWN}/{RECIPE}", "--out")
    if again := [task.name for task in tasks if not task.grades_traces or task.repeats > 1]:
        commands.append(("python", "-m", "harness.grading", *where, f"{OWN}/{GRADED}", *again))
    if tah:
        commands.append(("axolotl", "tah-passes", *where, f"{OWN}/{PASSES}"))
    services = asking.service(recipe, settings.server) if settings.server else {}
    return Stage(
        KIND,
        {RECIPE: resolved, **services},
        tuple(commands),
        inputs,
        tasks={task.name: task.definition for task in tasks},
        scratch=(NF4_COPY, asking.KEPT_ANSWERS),
        device=asking.device_of(recipe),
        wide=asking.is_wide(resolved, settings.server),
        versions=interpreter.versions if interpreter else None,
    )


def check_repeats(recipe: Recipe, tasks: Sequence[Task]) -> None:
    """See that a question that is asked several times gets answers of its own each time.

    Raises:
        LoopError: they would be decoded greedily, or a server would be given the same seed for each.
    """
    said = asking.generation(recipe)
    for task in (task for task in tasks if task.repeats > 1):
        often = f"task {task.name} asks each question {task.repeats} times (repeats)"
        if asking.is_greedy(recipe, task):
            raise LoopError(
                f"{often}, and greedy decoding gives the same answer each time; sample, with --set "
                "evaluate.gen_kwargs.do_sample=true and --set evaluate.gen_kwargs.temperature=…, or ask once"
            )
        # lm-eval sends a server its own seed with every question.
        if recipe["model_args"].get("base_url") and said.get("seed", 0) is not None:
            raise LoopError(
                f"{often}, and lm-eval sends the server the same seed each time, which may answer the same: "
                "--set evaluate.gen_kwargs.seed=null"
            )


def read(folder: Path, stage: Stage, tokenizer: Path | None = None) -> Facts:
    """How many answers used up their tokens and, of a TaH checkpoint, what their passes cost.

    The answers themselves are read when they are asked for.
    """
    outcomes_of(folder, stage, None)  # what cannot be read must not count as done
    return {"per_task": read_json(folder / PASSES) or {}, **outcomes.cut_off(folder / ANSWERS, stage, tokenizer)}


def outcomes_of(folder: Path, stage: Stage, tokenizer: Path | None) -> list[outcomes.Outcome]:
    """One row a question."""
    return outcomes.read(folder / ANSWERS, tokenizer, folder / graded(stage) if graded(stage) else None)


def graded(stage: Stage) -> str:
    """The file inside its folder that holds grades of its answers; empty where lm-eval's own are taken."""
    return GRADED if any("harness.grading" in command for command in stage.commands) else ""


KIND = Kind(
    "evaluate",
    "is tested",
    (*asking.TOOLS, "grading"),
    asking.PHASES,
    read,
    note=outcomes.cut_note,
    outcomes=outcomes_of,
    resumes=asking.resumes,
)
