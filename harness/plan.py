"""Which stages a run has. Runs nothing: what there is to read was found out before, what is done the store knows.

    iteration 0   evaluate the pair as it came
    iteration k   generate → distill → reconstruct → evaluate

The thinking checkpoint of iteration k-1 labels the prompts, the instruct checkpoint of iteration k-1 learns from the
answers, and a thinking checkpoint is rebuilt between the anchor and the new instruct one (ThinkSwitch, arXiv
2606.01080).

With `t: auto` a thinking checkpoint is rebuilt at each t of `GRID`, each is tried, and `choose` says which one goes on:

    iteration k   generate → distill → reconstruct_t0.1 … → answer_t0.1 … → choose → evaluate

Each t answers some of the training prompts under another seed than the labels', as the anchor does (`answer_t0`), whose
first answers are its labels; or, where the user names tasks to validate by, those (`validate_t0.1`). A rebuilding is
the one that a run with that t would have, and a dial. All is planned before anything runs, so nothing is left out for
what a smaller t came to: a bisection would ask four checkpoints instead of nine, but at a t that no key could name,
which no other run could share.

An *arm* is this with one stage put otherwise, so that a gain has something to be held against:

    thinkswitch   as above                                   on_policy     the teacher judges instruct's own answers
    merge_only    nothing is learnt, only merged             gold          right answers of the user's are learnt
    untouched     the answers are learnt with their traces

Arms and seeds share every stage that reads the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from harness.asking import Settings
from harness.config import ARMS, LoopConfig
from harness.interpreters import Interpreter
from harness.stages import (
    OWN,
    External,
    Output,
    Recipe,
    Source,
    Stage,
    choose,
    distill,
    evaluate,
    generate,
    placed,
    reconstruct,
    slot,
)
from harness.tasks import Task

GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # what `t: auto` tries
PROMPTS = 200  # that each of them answers, at most, all tasks together: a point of a share is two of them


class Step(NamedTuple):
    """A stage and its place in a run.

    Attributes:
        iteration: from 0.
        name: of its link in the iteration's folder.
        stage: what is done; two runs, or two steps, may have the same.
        checkpoint: whose outcomes it has, "instruct" or "thinking"; empty for a stage that has none.
        arm: which it is of.
        seed: of sampling and training.
        part: the folder of its arm and seed inside the run's; empty for the first of them.
    """

    iteration: int
    name: str
    stage: Stage
    checkpoint: str = ""
    arm: str = ARMS[0]
    seed: int = 0
    part: str = ""

    @property
    def place(self) -> str:
        """Where its link is inside the run's folder: "iter_02/distill", "gold-1/iter_02/distill"."""
        return "/".join(filter(None, [self.part, f"iter_{self.iteration:02d}", self.name]))


class Inputs(NamedTuple):
    """What a run reads, all of it looked at.

    Attributes:
        recipes: the native recipes, by the name they have in loop.yml.
        instruct: the pair as it came.
        thinking: the same.
        tah: which of "instruct" and "thinking" are TaH checkpoints.
        prompt_tasks: lm-eval's tasks that ask the prompts.
        test_tasks: those that are scored.
        prompts: the user's own prompts, None where tasks bring theirs.
        interpreters: whose lm-eval asks, by the name of the recipe; this environment's where there is none.
        identify: what a local file that a recipe names, under a key, is; None for what is none.
        gold: the user's right answers, for the arm that learns them.
        validate_tasks: tasks by which t is chosen, in place of the training prompts.
    """

    recipes: Mapping[str, Recipe]
    instruct: External
    thinking: External
    tah: frozenset[str]
    prompt_tasks: list[Task]
    test_tasks: list[Task]
    prompts: list[dict[str, Any]] | None
    identify: Callable[[str, str], str | None]
    interpreters: Mapping[str, Interpreter] = {}
    gold: External | None = None
    validate_tasks: Sequence[Task] = ()


def plan(config: LoopConfig, inputs: Inputs, iterations: int) -> list[Step]:
    """Every stage of the run, in an order in which each comes after what it reads; the first arm and seed first."""
    steps: list[Step] = []
    for seed in config.every_seed:
        for arm in config.every_arm:
            part = f"{arm}-{seed}" if steps else ""
            seeded = config.model_copy(update={"seed": seed})
            steps += [step._replace(arm=arm, seed=seed, part=part) for step in _steps(seeded, inputs, iterations, arm)]
    return steps


def _steps(config: LoopConfig, inputs: Inputs, iterations: int, arm: str) -> Iterator[Step]:
    recipes, identify = inputs.recipes, inputs.identify
    names = [task.name for task in inputs.prompt_tasks]
    instruct: Source = inputs.instruct
    thinking: Source = inputs.thinking
    answered: list[tuple[Source, Stage]] = []  # which checkpoint's labels these are

    def tests(k: int) -> Iterator[Step]:
        for who, checkpoint in (("instruct", instruct), ("thinking", thinking)):
            yield Step(k, f"evaluate_{who}", _tested(config, inputs, inputs.test_tasks, who, checkpoint), who)

    yield from tests(0)
    for k in range(1, (min(1, iterations) if arm == "merge_only" else iterations) + 1):
        if arm != "merge_only":
            if inputs.gold and arm == "gold":
                labels: Stage | External = inputs.gold
            else:
                labels = _answered(config, inputs, thinking)
                answered.append((thinking, labels))
                yield Step(k, "generate", labels)
            recipe = recipes.get("on_policy", recipes["distill"]) if arm == "on_policy" else recipes["distill"]
            if arm == "untouched":
                recipe = distill.untouched(recipe)
            learnt = distill.build(recipe, config.seed, config.launcher, instruct, thinking, labels, names)
            learnt = pinned(learnt, identify)
            yield Step(k, "distill", learnt)
            instruct = Output(learnt, distill.CHECKPOINT)
        anchor = inputs.thinking if config.anchor == "original" else thinking
        if config.t != "auto":
            rebuilt = reconstruct.build(recipes["reconstruct"], config.t, anchor, instruct, config.written_pair)
            rebuilt = pinned(rebuilt, identify)
            yield Step(k, "reconstruct", rebuilt)
            thinking = Output(rebuilt, reconstruct.CHECKPOINT)
        else:
            first = next((stage for checkpoint, stage in answered if checkpoint is anchor), None)
            if first is None and not inputs.validate_tasks:  # an arm that learns no labels
                first = _answered(config, inputs, anchor)
                answered.append((anchor, first))
                yield Step(k, "generate", first)
            thinking = yield from _choice(config, inputs, k, anchor, instruct, first)
        yield from tests(k)


def _choice(
    config: LoopConfig, inputs: Inputs, k: int, anchor: Source, instruct: Source, first: Stage | None
) -> Generator[Step, None, Source]:
    """The steps that rebuild a thinking checkpoint at each t and choose one, which is returned.

    Args:
        config: of the run.
        inputs: what it reads.
        k: the iteration.
        anchor: the thinking checkpoint that is interpolated with.
        instruct: the distilled one.
        first: the anchor's own labels, with which answers are compared; None where tasks are named to validate by.
    """
    by_score = inputs.validate_tasks
    each = max(1, PROMPTS // max(1, len(inputs.prompt_tasks)))
    few = each if config.limit is None else min(each, config.limit)
    another = config.model_copy(update={"seed": config.seed + 1, "limit": few})

    tried: list[choose.Tried] = []
    for t in (0.0, *GRID):
        checkpoint = anchor
        if t:
            recipe = inputs.recipes["reconstruct"]
            rebuilt = reconstruct.build(recipe, t, anchor, instruct, config.written_pair, "auto")
            rebuilt = pinned(rebuilt, inputs.identify)
            yield Step(k, f"reconstruct_t{t:g}", rebuilt)
            checkpoint = Output(rebuilt, reconstruct.CHECKPOINT)
        if by_score:
            answers = _tested(config, inputs, by_score, "thinking", checkpoint)
        else:
            answers = _answered(another, inputs, checkpoint, labels=False)
        yield Step(k, f"{'validate' if by_score else 'answer'}_t{t:g}", answers)
        tried.append(choose.Tried(t, checkpoint, answers, evaluate.graded(answers)))
    names = [task.name for task in by_score or inputs.prompt_tasks]
    choice = choose.build(tried, names, None if by_score else first)
    yield Step(k, "choose", choice)
    return Output(choice, choose.CHECKPOINT)


def _answered(config: LoopConfig, inputs: Inputs, checkpoint: Source, labels: bool = True) -> Stage:
    """A thinking checkpoint answers the training prompts: for labels, or as it is tried."""
    recipe, how, asks = inputs.recipes["generate"], served("generate", config), inputs.interpreters.get("generate")
    stage = generate.build(recipe, how, inputs.prompt_tasks, checkpoint, inputs.prompts, asks, labels)
    return pinned(stage, inputs.identify)


def _tested(config: LoopConfig, inputs: Inputs, tasks: Sequence[Task], who: str, checkpoint: Source) -> Stage:
    """An "instruct" or a "thinking" checkpoint answers the questions of tasks, by its own recipe if there is one."""
    name = f"evaluate_{who}" if f"evaluate_{who}" in inputs.recipes else "evaluate"
    how, asks = served(name, config), inputs.interpreters.get(name)
    stage = evaluate.build(inputs.recipes[name], how, tasks, checkpoint, who in inputs.tah, asks)
    return pinned(stage, inputs.identify)


def served(recipe: str, config: LoopConfig) -> Settings:
    """How the checkpoints are asked that a recipe is for: beside a server, if loop.yml names one."""
    named = {str(name): server for name, server in config.servers.items()}
    servers = {"evaluate_thinking": named.get("evaluate", ""), **named}
    return Settings(config.seed, config.nf4, config.limit, config.include_path, servers.get(recipe, ""))


def untried(name: str) -> str:
    """A step's name without the t that it is tried at: of "reconstruct_t0.1", "reconstruct"."""
    return re.sub(r"_t[\d.]+$", "", name)


def pinned(stage: Stage, identify: Callable[[str, str], str | None]) -> Stage:
    """A stage whose recipes' own local files (replay data, a chat template) are inputs too, known by what they hold."""
    found: dict[str, External] = {}

    def walk(value: Any, under: str = "") -> Any:
        if isinstance(value, dict):
            return {key: walk(inner, str(key)) for key, inner in value.items()}
        if isinstance(value, list):
            return [walk(inner, under) for inner in value]
        if isinstance(value, str) and OWN not in value and (identity := identify(under, value)):
            name = next((n for n, source in found.items() if source.path == value), f"file_{len(found) + 1}")
            found[name] = External(value, identity)
            return slot(name)
        return value

    recipes = {name: walk(recipe) for name, recipe in stage.recipes.items()}
    return replace(stage, recipes=recipes, inputs={**stage.inputs, **found}) if found else stage


def commands(stage: Stage, paths: Mapping[str, str]) -> list[list[str]]:
    """A stage's commands as a person would type them, its folder and inputs lying where `paths` says."""
    return [placed(list(command), paths) for command in stage.commands]
