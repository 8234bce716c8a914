"""A run's plan as estimates, a line for all stages that cost the same; and afterwards beside what was used.

Knows what of a stage's recipe costs what, and where a run that is done has its records. The arithmetic is `estimate`'s.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from harness import checks, tasks
from harness.asking import SERVED
from harness.card import SHARE, Card
from harness.config import LoopConfig, read_yaml
from harness.costs import aside
from harness.costs.estimate import (
    PROMPT,
    Estimate,
    Speed,
    answer_tokens,
    asking_memory,
    asking_mend,
    asking_seconds,
    batch_of,
    dtype_of,
    file_bytes,
    lengths,
    mended,
    merging_memory,
    question,
    rollouts_at_once,
    room_of,
    served,
    training_memory,
    training_seconds,
)
from harness.costs.footprint import ask
from harness.costs.shape import Shape, read_shape
from harness.errors import LoopError
from harness.files import below, read_json
from harness.plan import Inputs, Step, plan, untried
from harness.stages import (
    RECIPE,
    External,
    Keys,
    Recipe,
    Stage,
    choose,
    distill,
    evaluate,
    generate,
    placed,
    reconstruct,
)

GUESSED = 30  # questions of a task whose data is not here
IMPORTS = 0.65e9  # bytes that the tools' imports hold, where it is not looked at
OUT_SHARD = 2e9  # bytes of a shard that mergekit is asked for
ESTIMATED = tuple(kind.name for kind in (generate.KIND, generate.TRIAL, distill.KIND, reconstruct.KIND, evaluate.KIND))
ROLES = {"instruct": "instruct", "thinking": "thinking", "anchor": "thinking"}  # a stage's inputs: which of the pair


@dataclass(frozen=True)
class Device:
    """What a run is planned for.

    Attributes:
        card: the device.
        floor: what the tools' imports hold in main memory, bytes.
        given: tokens a second as the user states them, of one answer and of a training; None to look.
        here: the card is this machine's, and can be timed.
        cache: keeps what was traced and timed.
        main: bytes of main memory beside a GPU that a run may count on; None where nobody knows.
    """

    card: Card
    floor: float
    given: tuple[float, float] | None
    here: bool
    cache: Path
    main: float | None = None

    def speed(self, config: dict[str, Any], nf4: bool, dtype: str, batch: int, tokens: int) -> Speed | None:
        """Seconds of a checkpoint, stated or timed while `batch` answers have `tokens`; None where nobody knows."""
        if self.given:
            decode, train = self.given
            return Speed(0.0, 1 / train, 1 / decode)
        if not self.here:
            return None
        asked = {"config": config, "nf4": nf4, "dtype": dtype, "batch": batch, "tokens": tokens}
        asked["device"] = self.card.name
        (found,) = aside.ask("calibrate", [asked], self.cache)
        return Speed(**found)


class Pair(NamedTuple):
    """The checkpoints' folders, of which only the configs need be there."""

    instruct: Path
    thinking: Path

    @property
    def shape(self) -> Shape:
        """Of both."""
        return read_shape(self.thinking)


def device(card: Card, here: bool, given: tuple[float, float] | None, cache: Path) -> Device:
    """A device with its floor, which is seen once."""
    floor = IMPORTS if card.gpu else float(aside.ask("floor", [{}], cache)[0]["bytes"])
    main = psutil.virtual_memory().total * SHARE if card.gpu and here else None
    return Device(card, floor, given, here, cache, main)


def of_run(config: LoopConfig, recipes: Mapping[str, Recipe], on: Device, out: Path) -> list[Estimate]:
    """A line for all stages of the run that cost the same: of one step, by one recipe, whatever the iteration or seed.

    Raises:
        LoopError: with the first thing that cannot be planned.
    """
    pair = Pair(*(checks.described_checkpoint(getattr(config, role), role) for role in ("instruct", "thinking")))
    validated = config.validate_by if config.t == "auto" else []
    asked = [*config.prompt_tasks, *config.tasks, *validated]
    found = tasks.find(asked, config.include_path, out / "stages" / ".tasks.json")
    prompts = checks.checked_prompts(config.own_prompts) if config.own_prompts else None
    sides = [
        list(dict.fromkeys(task for name in names for task in found[name]))
        for names in (config.prompt_tasks, config.tasks, validated)
    ]
    checks.check_tasks(*sides)
    instruct, thinking = (External(str(folder), str(folder)) for folder in pair)
    gold = External(str(config.gold), str(config.gold)) if config.gold and "gold" in config.arms else None
    tah = frozenset(role for role, folder in zip(Pair._fields, pair, strict=True) if checks.is_tah(folder))
    inputs = Inputs(
        recipes, instruct, thinking, tah, sides[0], sides[1], prompts, lambda key, text: None,
        gold=gold, validate_tasks=sides[2],
    )  # fmt: skip
    groups = alike(plan(config, inputs, config.iterations))
    several = {name for name, count in Counter(untried(like[0].name) for like in groups).items() if count > 1}
    counts = questions(config, [task.name for side in sides for task in side], prompts, on.cache)
    means = mean_answers(out / config.name / "results.json")
    learnt = sum(counts[task.name].questions for task in sides[0])
    lines = []
    for like in groups:
        step, stage = like[0], like[0].stage
        recipe = placed(stage.recipes[RECIPE], paths(stage, pair))
        iterations = tuple(each.iteration for each in like)
        whose = recipe_name(step, recipes)
        if stage.kind.name == "distill":
            line = training(whose, recipe, iterations, on, learnt, merges=True)
        elif stage.kind.name == "reconstruct":
            line = merging(whose, recipe, iterations, pair, on)
        else:
            few = int(recipe.get("limit") or sys.maxsize)
            of_tasks = [counts[task]._replace(questions=min(few, counts[task].questions)) for task in stage.tasks]
            mean = means.get(step.checkpoint or "thinking")
            line = asking(whose, recipe, iterations, pair, config.nf4, of_tasks, mean, on)
        named = untried(step.name)
        arms = tuple(dict.fromkeys(each.arm for each in like)) if named in several else ()
        key = work(step.name, stage.kind.name, stage.recipes[RECIPE])
        lines.append(replace(line, name=named, arms=arms, work=key))
    return lines


def alike(steps: Sequence[Step]) -> list[list[Step]]:
    """The stages that a run has to do, each once however many steps are it, with those that cost the same together.

    One that chooses among what others left costs nothing that could be told.
    """
    keys = Keys({})  # versions are the same for all
    groups: dict[str, list[Step]] = {}
    first: dict[str, Step] = {}
    for step in steps:
        first.setdefault(keys[step.stage], step)
    for step in first.values():
        if step.stage.kind is choose.KIND:
            continue
        groups.setdefault(work(step.name, step.stage.kind.name, step.stage.recipes[RECIPE]), []).append(step)
    return list(groups.values())


def work(name: str, kind: str, recipe: Mapping[str, Any]) -> str:
    """What stages that cost the same have in common: a digest of the step and its recipe, at whatever t and seed."""
    said = {key: value for key, value in recipe.items() if (kind, key) != (reconstruct.KIND.name, "parameters")}
    asked = {key: value for key, value in (recipe.get("model_args") or {}).items() if key != "seed"}
    cost = json.dumps([untried(name), {**said, "seed": 0, "model_args": asked}], sort_keys=True, default=str)
    return hashlib.sha256(cost.encode()).hexdigest()[:16]


def recipe_name(step: Step, recipes: Mapping[str, Recipe]) -> str:
    """What `--set` calls the recipe of a step."""
    if step.name == "distill" and step.arm == "on_policy" and "on_policy" in recipes:
        return "on_policy"
    if step.stage.kind is generate.TRIAL:
        return "generate"
    if step.stage.kind is evaluate.KIND and not step.checkpoint:  # a t is tried on tasks to validate by
        return "evaluate_thinking" if "evaluate_thinking" in recipes else "evaluate"
    return step.name if step.name in recipes else step.name.partition("_")[0]


class Questions(NamedTuple):
    """Of one task: how many, how long an answer may be as the task says, and whether anybody counted."""

    questions: int
    tokens: int | None
    counted: bool


def questions(
    config: LoopConfig, names: Sequence[str], prompts: Sequence[Any] | None, cache: Path
) -> dict[str, Questions]:
    """What is known of each task's questions; a task whose data is not here is taken for `GUESSED`."""
    include = str(config.include_path) if config.include_path else None
    told = aside.ask(
        "questions", [{"task": name, "include_path": include, "cwd": str(Path.cwd())} for name in names], cache
    )
    found = {}
    for name, one in zip(names, told, strict=True):
        count = len(prompts) if prompts is not None and name == "prompts_file" else one["questions"]
        some = GUESSED if count is None else int(count)
        found[name] = Questions(min(some, config.limit or some), one["tokens"], count is not None)
    return found


def mean_answers(results: Path) -> dict[str, float]:
    """Tokens of an answer of each checkpoint in the run's own results, where it has some."""
    rows = (read_json(results) or {}).get("rows", [])
    found: dict[str, list[float]] = {}
    for row in rows:
        if (tokens := row.get("tokens_per_answer")) is not None:  # nobody counted those of an earlier version
            found.setdefault(row["checkpoint"], []).append(tokens)
    return {who: sum(values) / len(values) for who, values in found.items()}


def paths(stage: Stage, pair: Pair) -> dict[str, str]:
    """Where what a stage reads lies; of a checkpoint still to be made, one of its shape."""
    found = {name: source.path for name, source in stage.inputs.items() if isinstance(source, External)}
    return {**found, **{name: str(getattr(pair, role)) for name, role in ROLES.items() if name in stage.inputs}}


def training(
    name: str,
    recipe: dict[str, Any],
    iterations: tuple[int, ...],
    on: Device,
    rows: int | None = None,
    merges: bool = False,
) -> Estimate:
    """Of a training recipe of Axolotl's whose models are folders.

    Args:
        name: of the recipe, for what is typed to mend it.
        recipe: resolved.
        iterations: in which it is done.
        on: the device.
        rows: how many rows it will have, where its data is not here yet.
        merges: its adapter is merged afterwards.
    """
    recipe = {**recipe, **{key: str(local(recipe[key])) for key in ("base_model",)}}
    if (block := recipe.get("on_policy_kl")) and block.get("teacher", "self") != "self":
        recipe["on_policy_kl"] = {**block, "teacher": str(local(block["teacher"]))}
    length = lengths(recipe, on.cache)
    (found,) = ask([question(recipe, length, on.card.gpu)], on.cache)
    parts = training_memory(recipe, found, on.card, on.floor)
    main = 0.0
    if merges and recipe.get("adapter"):
        merge = merging_memory(Path(recipe["base_model"]), on.floor)
        if on.card.gpu:
            main = sum(merge.values())
        else:
            parts = max(parts, merge, key=lambda those: sum(those.values()))
    memory = sum(parts.values())
    fits = memory <= on.card.memory
    mend = "" if fits else mended(recipe, length, on.card, on.floor, on.cache)
    longest = length.prompt + length.answer
    how = "its longest row" if length.measured else "the recipe's longest, so at most"
    notes = [f"rows of {longest:,} tokens ({how})"]
    if length.context:
        notes.append(f"the teacher reads {length.context + length.answer:,}")
    if main:
        notes.append(f"its merge takes {main / 1e9:.2f} GB of main memory")
    count = length.rows or rows
    config = read_json(Path(recipe["base_model"]) / "config.json")
    batch, half = rollouts_at_once(recipe), length.prompt + length.answer // 2
    speed = on.speed(config, bool(recipe.get("load_in_4bit")), trained_in(recipe), batch, half) if count else None
    seconds = tokens = None
    if count:
        took, tokens = training_seconds(recipe, length, count, speed or Speed(0, 0, 0))
        seconds = took * len(iterations) if speed else None
        tokens *= len(iterations)
    merged = file_bytes(Path(recipe["base_model"]))
    adapter = found.trained * 4 if recipe.get("adapter") in ("lora", "qlora") else 0
    leaves = (merged + adapter) * len(iterations)
    kept = 0.0 if recipe.get("save_strategy") == "no" else merged if not adapter else adapter * 3
    return Estimate(
        name, "instruct learns", iterations, memory, parts, tokens, seconds, leaves, kept,
        room=on.card.memory, main=main, main_room=on.main, fits=fits and (on.main is None or main <= on.main),
        mend=typed(name, mend), notes=tuple(notes),
    )  # fmt: skip


def trained_in(recipe: Mapping[str, Any]) -> str:
    """The type that a training recipe computes in."""
    named = {"bf16": "bfloat16", "fp16": "float16"}
    return next((dtype for key, dtype in named.items() if recipe.get(key) not in (None, False)), "float32")


def typed(name: str, mend: str) -> str:
    """A change of a recipe as the command line takes it."""
    words = (word if word.startswith("nf4=") or not name else f"{name}.{word}" for word in mend.split())
    return " ".join(f"--set {word}" for word in words)


def merging(name: str, recipe: dict[str, Any], iterations: tuple[int, ...], pair: Pair, on: Device) -> Estimate:
    """Of a reconstruction, which runs in main memory, a shard at a time."""
    shape, dtype = pair.shape, str(recipe.get("dtype") or pair.shape.dtype)
    merged = shape.weights_bytes(False, dtype)
    memory = on.floor + 3 * min(merged, OUT_SHARD)  # two are read and one is written
    leaves, title = merged * len(iterations), "thinking is rebuilt"
    if not on.card.gpu:
        room = on.card.memory
        return Estimate(name, title, iterations, memory, leaves=leaves, room=room, fits=memory <= room)
    fits, known = (None, ", of which nothing is known here") if on.main is None else (memory <= on.main, "")
    notes = (f"main memory, not the GPU's{known}",)
    return Estimate(name, title, iterations, 0.0, leaves=leaves, main=memory, main_room=on.main, fits=fits, notes=notes)


def asking(
    name: str,
    recipe: dict[str, Any],
    iterations: tuple[int, ...],
    pair: Pair,
    nf4: bool,
    asked: Sequence[Questions],
    mean: float | None,
    on: Device,
) -> Estimate:
    """Of a checkpoint that answers prompts or questions."""
    shape = pair.shape
    budgets = [(one.questions, answer_tokens(recipe, one.tokens)) for one in asked]
    longest = max((tokens for _, tokens in budgets), default=0)
    width = longest + PROMPT
    most = max((count for count, _ in budgets), default=1)
    parts = asking_memory(recipe, shape, width, nf4, on.card, on.floor, most)
    memory, room = sum(parts.values()), room_of(recipe, shape, width, nf4, on.card)
    fits = memory <= room
    mend = "" if fits else asking_mend(recipe, shape, width, nf4, on.card, on.floor)
    by_server = recipe.get("model") in SERVED
    rows = min(most, served(recipe, shape, width, nf4, on.card).rows if by_server else batch_of(recipe))
    config = read_json(pair.thinking / "config.json")
    speed = on.speed(config, nf4, dtype_of(recipe, shape), rows, PROMPT + longest // 2)
    seconds, tokens = asking_seconds(budgets, rows, speed or Speed(0, 0, 0))
    notes = [f"{sum(count for count, _ in budgets):,} questions of at most {longest:,} tokens"]
    if by_server:
        notes.append(f"{recipe['model']}'s cache holds {rows:,} of them at once")
    if not all(one.counted for one in asked):
        notes.append(f"{GUESSED} a task where its data is not here")
    if mean:
        share = min(1.0, mean * sum(count for count, _ in budgets) / tokens) if tokens else 1.0
        notes.append(f"the last run's answers had {mean:,.0f} tokens: {share:.0%} of that")
    title = "thinking answers the prompts" if name == "generate" else "is tested"
    return Estimate(
        name, title, iterations, memory, parts, tokens * len(iterations),
        seconds * len(iterations) if speed else None, beside=shape.weights_bytes(True) if nf4 else 0.0,
        room=room, fits=fits, mend=typed(name, mend), notes=tuple(notes),
    )  # fmt: skip


def local(name: str) -> Path:
    """The folder of a model that a recipe names, of the hub its config alone."""
    return checks.described_checkpoint(name, "base_model")


def downloads(config: LoopConfig) -> float:
    """Bytes of weights still to be fetched."""
    total = 0.0
    for role in ("instruct", "thinking"):
        name = getattr(config, role)
        if not Path(name).is_dir():
            folder = checks.described_checkpoint(name, role)
            if not list(folder.glob("*.safetensors")):
                total += read_shape(folder).weights_bytes(False)
    return total


# --- afterwards ---


class Compared(NamedTuple):
    """One stage of a run that is done: what is predicted of it and what it used.

    Attributes:
        iteration: of the step.
        name: of the step.
        memory: bytes, predicted and used.
        seconds: the same; None where nobody predicts.
        disk: bytes, the same.
    """

    iteration: int
    name: str
    memory: tuple[float, float]
    seconds: tuple[float | None, float]
    disk: tuple[float, float]


def compared(out: Path, name: str, on: Device) -> list[Compared]:
    """Prediction beside use for every stage of a run that is done, its rows as long as they were.

    Raises:
        LoopError: there is no such run, or it does not say of which pair it was.
    """
    noted = read_json(out / name / "run.json")
    if not isinstance(noted, dict) or "steps" not in noted:
        raise LoopError(f"--compare {name}: no such run in {out}; see ts-loop status")
    asked = noted.get("asked")
    if not isinstance(asked, dict) or not {"instruct", "thinking"} <= asked.keys():
        raise LoopError(f"--compare {name}: its run.json does not say of which pair it was; run it again")
    pair = Pair(*(checks.described_checkpoint(asked[role], role) for role in ("instruct", "thinking")))
    found = []
    for step in noted["steps"]:
        folder = out / "stages" / step["key"]
        record = read_json(folder / "stage.json")
        if not record or record["kind"] not in ESTIMATED:
            continue
        guess = _again(step["name"], read_yaml(folder / RECIPE), pair, bool(asked.get("nf4")), on, record)
        used = (
            record["peak_gpu_memory_mb"] if on.card.gpu and record["peak_gpu_memory_mb"] else record["peak_memory_mb"]
        )
        size = float(sum(file.stat().st_size for file in below(folder)))
        found.append(
            Compared(
                step["iteration"],
                step["name"],
                (guess.memory or guess.main, used * 2**20),
                (guess.seconds, record["body_s"]),
                (guess.leaves, size),
            )
        )
    return found


def _again(name: str, recipe: dict[str, Any], pair: Pair, nf4: bool, on: Device, record: Mapping[str, Any]) -> Estimate:
    """The estimate of a stage that is done, from the recipe it was done with."""
    kind = record["kind"]
    if kind == "distill":
        changed = {**recipe, "base_model": str(pair.instruct)}
        block = recipe.get("on_policy_kl") or {}
        if block.get("teacher", "self") != "self":
            changed["on_policy_kl"] = {**block, "teacher": str(pair.thinking)}
        return training(name, changed, (0,), on, merges=True)
    if kind == "reconstruct":
        return merging(name, recipe, (0,), pair, on)
    limit = recipe.get("limit")
    told = aside.ask(
        "questions",
        [
            {"task": task, "include_path": recipe.get("include_path"), "cwd": str(Path.cwd())}
            for task in recipe["tasks"]
        ],
        on.cache,
    )
    asked = [
        Questions(min(one["questions"] or GUESSED, limit or 10**9), one["tokens"], one["questions"] is not None)
        for one in told
    ]
    return asking(name, recipe, (0,), pair, nf4, asked, None, on)
