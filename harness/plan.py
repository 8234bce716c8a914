"""Which stages a run has. Runs nothing: what there is to read was found out before, what is done the store knows.

    iteration 0   evaluate the pair as it came
    iteration k   generate → distill → reconstruct → evaluate

The thinking checkpoint of iteration k-1 labels the prompts, the instruct checkpoint of iteration k-1 learns from the
answers, and a thinking checkpoint is rebuilt between the anchor and the new instruct one (ThinkSwitch, arXiv
2606.01080).

An *arm* is this with one stage put otherwise, so that a gain has something to be held against:

    thinkswitch   as above                                   on_policy     the teacher judges instruct's own answers
    merge_only    nothing is learnt, only merged             gold          right answers of the user's are learnt
    untouched     the answers are learnt with their traces

Arms and seeds share every stage that reads the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from harness.asking import Settings
from harness.config import ARMS, LoopConfig
from harness.interpreters import Interpreter
from harness.stages import OWN, External, Output, Recipe, Stage, distill, evaluate, generate, placed, reconstruct, slot
from harness.tasks import Task


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
    settings = Settings(config.seed, config.nf4, config.limit, config.include_path)
    names = [task.name for task in inputs.prompt_tasks]
    instruct: External | Output = inputs.instruct
    thinking: External | Output = inputs.thinking

    def tests(k: int) -> Iterator[Step]:
        for who, checkpoint in (("instruct", instruct), ("thinking", thinking)):
            name = f"evaluate_{who}" if f"evaluate_{who}" in recipes else "evaluate"
            tah, asks = who in inputs.tah, inputs.interpreters.get(name)
            tested = evaluate.build(recipes[name], settings, inputs.test_tasks, checkpoint, tah, asks)
            yield Step(k, f"evaluate_{who}", pinned(tested, identify), who)

    yield from tests(0)
    for k in range(1, (min(1, iterations) if arm == "merge_only" else iterations) + 1):
        if arm != "merge_only":
            if inputs.gold and arm == "gold":
                labels: Stage | External = inputs.gold
            else:
                asks = inputs.interpreters.get("generate")
                labels = generate.build(
                    recipes["generate"], settings, inputs.prompt_tasks, thinking, inputs.prompts, asks
                )
                labels = pinned(labels, identify)
                yield Step(k, "generate", labels)
            recipe = recipes.get("on_policy", recipes["distill"]) if arm == "on_policy" else recipes["distill"]
            if arm == "untouched":
                recipe = distill.untouched(recipe)
            learnt = distill.build(recipe, config.seed, config.launcher, instruct, thinking, labels, names)
            learnt = pinned(learnt, identify)
            yield Step(k, "distill", learnt)
            instruct = Output(learnt, distill.CHECKPOINT)
        anchor = inputs.thinking if config.anchor == "original" else thinking
        rebuilt = reconstruct.build(recipes["reconstruct"], config.t, anchor, instruct, config.written_pair)
        rebuilt = pinned(rebuilt, identify)
        yield Step(k, "reconstruct", rebuilt)
        thinking = Output(rebuilt, reconstruct.CHECKPOINT)
        yield from tests(k)


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
