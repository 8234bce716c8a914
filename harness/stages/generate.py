"""Generate: the thinking checkpoint answers the training prompts (lm-eval, predict-only). No gold answer is read.

Its answers are labels, without which there is nothing to learn; or, of a checkpoint that is only tried (`t: auto`),
what it is chosen by, where none is an answer too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import asking, outcomes
from harness.asking import ANSWERS, NF4_COPY, Settings
from harness.errors import StageError
from harness.interpreters import Interpreter
from harness.stages import OWN, RECIPE, Facts, Kind, Recipe, Source, Stage
from harness.tasks import Task

PROMPTS = "prompts.jsonl"


def build(
    recipe: Recipe,
    settings: Settings,
    tasks: Sequence[Task],
    thinking: Source,
    prompts: list[dict[str, Any]] | None,
    interpreter: Interpreter | None = None,
    labels: bool = True,
) -> Stage:
    """The stage.

    Args:
        recipe: lm-eval's config as it is written.
        settings: how the run asks.
        tasks: whose prompts are asked.
        thinking: the checkpoint that answers.
        prompts: the user's own, as `read_prompts` gives them, where the task is `prompts_file`.
        interpreter: whose lm-eval asks, if not this environment's.
        labels: its answers are to be learnt from; else it is tried, and sampled at temperature 1 where the recipe is
            greedy, as a seed would change nothing then.
    """
    if not labels and any(asking.is_greedy(recipe, task) for task in tasks):
        said = asking.generation(recipe)
        recipe = {**recipe, "gen_kwargs": {**said, "do_sample": True, "temperature": said.get("temperature") or 1.0}}
    resolved, inputs = asking.recipe_for(recipe, settings, [task.name for task in tasks], thinking, interpreter)
    resolved["predict_only"] = True
    files = {}
    if prompts is not None:
        resolved["metadata"] = {**(resolved.get("metadata") or {}), "prompts_file": f"{OWN}/{PROMPTS}"}
        files[PROMPTS] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in prompts)
    commands = asking.commands_for(resolved, settings, interpreter)
    services = asking.service(recipe, settings.server) if settings.server else {}
    return Stage(
        KIND if labels else TRIAL,
        {RECIPE: resolved, **services},
        tuple(commands),
        inputs,
        files=files,
        tasks={task.name: task.definition for task in tasks},
        scratch=(NF4_COPY, asking.KEPT_ANSWERS),
        device=asking.device_of(recipe),
        wide=asking.is_wide(resolved, settings.server),
        versions=interpreter.versions if interpreter else None,
    )


def read(folder: Path, stage: Stage, tokenizer: Path | None = None) -> Facts:
    """How many of the labels have an answer to learn from, and how many used up their tokens.

    Raises:
        StageError: if the thinking checkpoint closed no trace at all.
    """
    facts = read_any(folder, stage, tokenizer)
    closed, total = facts["labels"]["closed"], facts["labels"]["total"]
    if not closed:
        raise StageError(
            f"the thinking checkpoint closed 0 of {total} traces (0 %): there is nothing to distill\n"
            "give it more tokens (--set generate.gen_kwargs.max_gen_toks=…), lower --t, or see what it wrote in "
            f"{folder / ANSWERS}"
        )
    return facts


def read_any(folder: Path, stage: Stage, tokenizer: Path | None = None) -> Facts:
    """As `read`, of a checkpoint that may close none."""
    closed, total = outcomes.closed_share(folder / ANSWERS, stage.recipes[RECIPE]["tasks"])
    return {"labels": {"closed": closed, "total": total}, **outcomes.cut_off(folder / ANSWERS, stage, tokenizer)}


def note(facts: Facts) -> str:
    """How many answers can be learnt from."""
    closed = f"{facts['labels']['closed']} of {facts['labels']['total']} answers closed their trace"
    return "; ".join(filter(None, (closed, outcomes.cut_note(facts))))


KIND = Kind("generate", "thinking answers the prompts", asking.TOOLS, asking.PHASES, read, note, resumes=asking.resumes)
TRIAL = Kind(
    "answer",
    "a t is tried on the prompts",
    asking.TOOLS,
    asking.PHASES,
    read_any,
    note,
    resumes=asking.resumes,
    limited_as=KIND.name,
)
