"""What each stage of a plan takes, before it runs: memory, time, tokens, disk, dollars, and whether the device can.

Knows recipes' keys that cost something and what they cost. What a training step holds is traced (`footprint`), how long
rows are, how many questions there are and how fast the device is are asked aside (`rows`, `questions`, `calibrate`).
What cannot be known before it happened is counted as at most: an answer as long as it may be, a row as long as it may.

    peak on a GPU   = CUDA's own + the tensors
    peak on a CPU   = the imports' floor + max(loading, training), loading = weights + the file they are read from
"""

from __future__ import annotations

import glob
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.asking import BUDGETS, LM_EVAL_TOKENS, SERVED
from harness.card import Card
from harness.costs import aside
from harness.costs.footprint import Footprint, Question, ask
from harness.costs.shape import BYTES, Shape, read_shape
from harness.errors import LoopError
from harness.files import read_json

CUDA_BYTES = 0.45e9  # a process's context and its libraries' workspaces
SHORTER = (2, 4, 8, 16)  # parts of an answer, where the whole does not fit
HEAP = 0.75  # of a CPU's small blocks that come and go, what the C library keeps beside them: docs/results.md
TRACED_KEYS = (  # of a training recipe, on which what a step holds depends
    *("adapter", "load_in_4bit", "lora_r", "lora_alpha", "lora_dropout", "lora_target_linear", "lora_target_modules"),
    *("bf16", "fp16", "gradient_checkpointing", "gradient_accumulation_steps", "optimizer"),
    *("liger_fused_linear_cross_entropy", "on_policy_kl", "tah"),
)
SHARD_BYTES = 5e9  # of a checkpoint's files, at most, as they are usually cut
GRAPHS_BYTES = 0.5e9  # vLLM's CUDA graphs, which lie beside what it reserves
READ_AT_ONCE, AT_ONCE = 8192, 256  # vLLM's own on cards below 70 GB: prompt tokens of a pass, answers
PROMPT = 512  # tokens that a question is given


@dataclass(frozen=True)
class Speed:
    """Seconds of a checkpoint on a device.

    Attributes:
        step: of a forward and backward pass of few tokens.
        token: of each further token in it.
        decode: of one more token of every answer of a batch, when they are half as long as they may be.
    """

    step: float
    token: float
    decode: float


@dataclass(frozen=True)
class Length:
    """Tokens of a training recipe's rows.

    Attributes:
        prompt: of the longest, what carries no loss; `answer` what does, `context` what a teacher reads before it.
        answer: see above.
        context: see above.
        hard: share of answer tokens read twice.
        rows: how many there are; None where nobody knows.
        measured: they were looked at; else they are what the recipe lets pass.
    """

    prompt: int
    answer: int
    context: int = 0
    hard: float = 1.0
    rows: int | None = None
    measured: bool = False


@dataclass(frozen=True)
class Estimate:
    """Of one stage.

    Attributes:
        name: of its step.
        title: what it does.
        iterations: in which it is done; once for each seed and arm that do not share it.
        memory: bytes at its peak.
        parts: of that, by name.
        tokens: written and learnt from in all iterations, at most; None where nobody knows.
        seconds: of writing and learning in all iterations, answers and rows as long as they may be; None where nobody
            knows.
        leaves: bytes on the disk when it is done, of all iterations.
        beside: bytes more on the disk while it runs.
        download: bytes fetched before it.
        room: bytes that it may take: the device's, or what vLLM reserves of them.
        main: bytes of main memory, where a machine with a GPU needs some beside it, or instead of it.
        main_room: bytes of main memory that it may take; None where the machine is not here.
        fits: into all of that; None where only main memory is needed, and how much there is nobody knows.
        mend: what makes it fit, as it is typed; empty where it fits or nothing is known.
        notes: what the figures take for granted.
        arms: whose it is, where other arms do it otherwise.
        work: what its stages have in common, `forecast.work`; empty for a recipe alone.
    """

    name: str
    title: str
    iterations: tuple[int, ...]
    memory: float
    parts: dict[str, float] = field(default_factory=dict)
    tokens: float | None = None
    seconds: float | None = None
    leaves: float = 0.0
    beside: float = 0.0
    download: float = 0.0
    room: float = math.inf
    main: float = 0.0
    main_room: float | None = None
    fits: bool | None = True
    mend: str = ""
    notes: tuple[str, ...] = ()
    arms: tuple[str, ...] = ()
    work: str = ""

    @property
    def label(self) -> str:
        """What a person calls it."""
        return (self.name or self.title) + (f" ({', '.join(self.arms)})" if self.arms else "")


# --- training ---


def ceilings(recipe: Mapping[str, Any]) -> Length:
    """The longest rows that a recipe lets pass.

    Raises:
        LoopError: it lets none, as an answer leaves no room for a prompt.
    """
    longest = int(recipe.get("sequence_len") or 2048)
    if block := recipe.get("on_policy_kl"):
        new = int(block.get("max_new_tokens") or 512)
        prompt = longest - new
        if prompt < 1:
            raise LoopError(
                f"on_policy_kl: max_new_tokens: {new} leaves no room for a prompt in sequence_len: {longest}; raise "
                "sequence_len, or lower max_new_tokens"
            )
        trace = int(block.get("trace_max_new_tokens") or 2048) if block.get("context") == "trace" else 0
        return Length(prompt, new, prompt + trace)
    return Length(1, longest - 1)


def lengths(recipe: dict[str, Any], cache: Path) -> Length:
    """The longest rows of a recipe's data where it is here, as Axolotl reads it; else what the recipe lets pass."""
    entries = [entry for entry in recipe.get("datasets") or [] if isinstance(entry, Mapping)]
    found_of = [[Path(file) for file in glob.glob(name)] for entry in entries for name in _named(entry)]
    if not found_of or not all(found_of):
        return ceilings(recipe)
    files = [file for found in found_of for file in found]
    seen = [f"{file} {file.stat().st_mtime_ns}" for file in files]
    (found,) = aside.ask("rows", [{"recipe": recipe, "seen": seen}], cache)
    hard = found["hard"]
    return Length(
        found["prompt"], found["answer"], found["context"], 1.0 if hard is None else hard, found["rows"], True
    )


def _named(entry: Mapping[str, Any]) -> list[str]:
    files = entry.get("data_files")
    return [files] if isinstance(files, str) else list(files) if files else [str(entry.get("path"))]


def question(recipe: dict[str, Any], length: Length, gpu: bool) -> Question:
    """What is to be traced of a recipe whose models are folders with a config.json.

    Raises:
        LoopError: a model's config is not there.
    """
    block, teacher = recipe.get("on_policy_kl") or {}, None
    if block and block.get("teacher", "self") not in ("self", recipe["base_model"]):
        teacher = config_at(block["teacher"])
    rows = int(recipe.get("micro_batch_size") or 1)
    told = {key: recipe[key] for key in TRACED_KEYS if recipe.get(key) is not None}
    student = config_at(recipe["base_model"])
    return Question(told, student, teacher, rows, length.prompt, length.answer, length.context, length.hard, gpu)


def config_at(folder: str) -> dict[str, Any]:
    """A checkpoint's config.json.

    Raises:
        LoopError: there is none.
    """
    config = read_json(Path(folder) / "config.json")
    if not isinstance(config, dict):
        raise LoopError(f"{folder}: has no config.json that can be read; name the folder of a checkpoint")
    return config


def training_memory(recipe: Mapping[str, Any], found: Footprint, card: Card, floor: float) -> dict[str, float]:
    """The parts of a training's peak, bytes; their sum is the peak.

    Args:
        recipe: its models are folders.
        found: its footprint.
        card: the device.
        floor: what the imports hold, on a CPU.
    """
    parts = {"weights": found.weights, "optimizer": found.states, "step": found.peak - found.states - found.weights}
    if card.gpu:
        return {"CUDA": CUDA_BYTES, **parts}
    block = recipe.get("on_policy_kl") or {}
    teacher = str(block.get("teacher", "self"))
    loading = found.weights + file_bytes(Path(recipe["base_model"] if teacher == "self" else teacher))
    training = found.peak + HEAP * found.ragged
    if loading > training:
        return {"imports": floor, "weights": found.weights, "the file they are read from": loading - found.weights}
    return {"imports": floor, **parts, "kept by the heap": HEAP * found.ragged}


def merging_memory(base: Path, floor: float) -> dict[str, float]:
    """The parts of the peak of Axolotl's merge, main memory: a shard before and after it, the embedding in float32."""
    shape, shard = read_shape(base), min(file_bytes(base), SHARD_BYTES)
    return {"imports": floor, "a shard, before and after its merge": 2 * shard, "embedding": 4.0 * shape.embedding}


def file_bytes(folder: Path) -> float:
    """The weights of a checkpoint on the disk, or what its config says they will be."""
    there = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return there or read_shape(folder).weights_bytes(nf4=False)


def mends(recipe: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What makes a training smaller, the mildest first, each on top of those before: as typed, and the recipe then."""
    block = recipe.get("on_policy_kl") or {}
    longest = int(recipe.get("sequence_len") or 2048)
    wanted: list[tuple[str, Any]] = []
    if block:
        wanted += [("on_policy_kl.update_batch_size", 1)]
        wanted += [("on_policy_kl.rollout_batch_size", int(block.get("rollouts_per_prompt") or 1))]
    if block.get("teacher", "self") != "self":
        wanted += [("on_policy_kl.teacher_load_in_4bit", True)]
    wanted += [("micro_batch_size", 1), ("gradient_checkpointing", True)]
    if recipe.get("adapter") in ("lora", "qlora"):
        wanted += [("load_in_4bit", True)]
    wanted += [("sequence_len", longest * part // 8) for part in (7, 6, 5, 4, 3, 2, 1)]
    now, typed = dict(recipe), dict[str, Any]()
    for key, value in wanted:
        first, _, inner = key.partition(".")
        if (now.get(first) or {}).get(inner) == value if inner else now.get(first) == value:
            continue
        now = {**now, first: {**now[first], inner: value} if inner else value}
        typed[key] = value
        yield " ".join(f"{name}={str(to).lower()}" for name, to in typed.items()), now


def mended(recipe: dict[str, Any], length: Length, card: Card, floor: float, cache: Path) -> str:
    """The fewest changes that make a training fit the device, as they are typed; empty where none do."""
    tries: list[tuple[str, dict[str, Any], Length]] = []
    for typed, changed in mends(recipe):
        try:
            tries.append((typed, changed, length if length.measured else ceilings(changed)))
        except LoopError:
            continue
    every = ask([question(changed, now, card.gpu) for _, changed, now in tries], cache)
    for (typed, changed, _), found in zip(tries, every, strict=True):
        if sum(training_memory(changed, found, card, floor).values()) <= card.memory:
            return typed
    return ""


def training_seconds(recipe: Mapping[str, Any], length: Length, rows: int, speed: Speed) -> tuple[float, float]:
    """Seconds and tokens of a training on so many rows, each as long as it may be.

    On-policy steps also write: as many answers at once as the recipe says, each as long as it may be; and their teacher
    reads, a third of what learning takes.
    """
    epochs = float(recipe.get("num_epochs") or 1)
    micro, accumulated = (int(recipe.get(key) or 1) for key in ("micro_batch_size", "gradient_accumulation_steps"))
    passes = math.ceil(rows / micro) * epochs
    if steps := recipe.get("max_steps"):
        passes = min(passes, int(steps) * accumulated)
    width, block = length.prompt + length.answer, recipe.get("on_policy_kl")
    again = 4 / 3 if recipe.get("gradient_checkpointing") else 1.0
    if not block:
        depth = 1 + length.hard * length.answer / width if recipe.get("adapter") == "tah" else 1.0
        return passes * (speed.step + micro * width * speed.token) * again * depth, passes * micro * width
    written = passes * micro * int(block.get("rollouts_per_prompt") or 1)
    at_once = rollouts_at_once(recipe)
    learning = passes * speed.step + written * width * speed.token
    reading = (passes * speed.step + written * (length.context + length.answer) * speed.token) / 3
    decoding = math.ceil(written / at_once) * length.answer * speed.decode
    return learning * again + reading + decoding, written * (width + length.answer)


def rollouts_at_once(recipe: Mapping[str, Any]) -> int:
    """Answers that an on-policy step writes at once; 1 of any other recipe."""
    block = recipe.get("on_policy_kl")
    if not block:
        return 1
    micro, accumulated = (int(recipe.get(key) or 1) for key in ("micro_batch_size", "gradient_accumulation_steps"))
    every = micro * accumulated * int(block.get("rollouts_per_prompt") or 1)
    return min(int(block.get("rollout_batch_size") or every), every)


# --- asking ---


def answer_tokens(recipe: Mapping[str, Any], task_tokens: int | None) -> int:
    """How long an answer may be: the recipe says, or else the task, or lm-eval."""
    said = recipe.get("gen_kwargs") or {}
    return next((int(said[key]) for key in BUDGETS if said.get(key)), task_tokens or LM_EVAL_TOKENS)


def batch_of(recipe: Mapping[str, Any]) -> int:
    """Answers at once; one where lm-eval finds out by itself (`auto`), which takes what memory is left."""
    said = str(recipe.get("batch_size") or 1)
    return int(said) if said.isdigit() else 1


def asking_memory(
    recipe: Mapping[str, Any], shape: Shape, tokens: int, nf4: bool, card: Card, floor: float, most: int | None = None
) -> dict[str, float]:
    """The parts of the peak of a checkpoint that answers, bytes.

    Args:
        recipe: lm-eval's.
        shape: of the checkpoint.
        tokens: of the longest answer and its prompt.
        nf4: it answers as an NF4 copy.
        card: the device.
        floor: what the imports hold, on a CPU.
        most: questions of a task, of which a batch has no more.
    """
    if recipe.get("model") in SERVED:
        return served(recipe, shape, tokens, nf4, card).parts
    dtype = dtype_of(recipe, shape)
    rows = min(batch_of(recipe), most or batch_of(recipe))
    weights, cache = shape.weights_bytes(nf4, dtype), rows * tokens * shape.kv_bytes(dtype)
    layer = cache / max(1, shape.cached_layers) * 2  # one layer's lie there twice, and as each query's
    logits = 3.0 * rows * shape.vocabulary * 4
    parts = {"weights": weights, "cache": cache + layer, "logits": logits}
    if card.gpu:
        return {"CUDA": CUDA_BYTES, **parts}
    # What is used as it lies in the file is not read into memory a second time.
    loading = 0 if dtype == shape.dtype else shape.weights_bytes(nf4)
    if loading > cache + layer + logits:
        return {"imports": floor, "weights": weights, "the file they are read from": loading}
    return {"imports": floor, **parts}


def dtype_of(recipe: Mapping[str, Any], shape: Shape) -> str:
    """In which a checkpoint answers."""
    named = str((recipe.get("model_args") or {}).get("dtype") or "auto").removeprefix("torch.")
    return shape.dtype if named == "auto" else named


@dataclass(frozen=True)
class Served:
    """What vLLM or SGLang makes of a card.

    Attributes:
        parts: bytes by name; the cache takes whatever is left, and at least one whole sequence.
        room: bytes that these may take; with less than that sequence needs they refuse to start.
        rows: answers at once, each as long as it may be.
    """

    parts: dict[str, float]
    room: float
    rows: int


def served(recipe: Mapping[str, Any], shape: Shape, tokens: int, nf4: bool, card: Card) -> Served:
    """How a checkpoint that a server answers with fits a card; arguments as of `asking_memory`.

    A server takes a fixed share of the card: weights and what one pass over prompts holds, and a cache of the rest.
    """
    arguments, dtype = recipe.get("model_args") or {}, dtype_of(recipe, shape)

    def said(*names: str, usual: float) -> float:
        return float(next((arguments[name] for name in names if arguments.get(name)), usual))

    cards = said("tensor_parallel_size", "tp_size", usual=1)
    longest = int(said("max_model_len", "max_length", "context_length", usual=shape.positions or tokens))
    rows = int(said("max_num_seqs", "max_batch_size", "max_running_requests", usual=AT_ONCE))
    reserved = said("gpu_memory_utilization", "mem_fraction_static", usual=0.9) * card.memory
    graphs = 0.0 if arguments.get("enforce_eager") or not card.gpu else GRAPHS_BYTES
    # Of one layer at a time, what each linear layer leaves; the logits once an answer.
    pass_of = min(said("max_num_batched_tokens", usual=READ_AT_ONCE), rows * longest)
    layer = pass_of * shape.linear / max(1, shape.layers) / shape.hidden * BYTES[dtype]
    held = {
        "CUDA": CUDA_BYTES,
        "weights": shape.weights_bytes(nf4, dtype) / cards,
        "a pass over prompts": (layer + 3.0 * rows * shape.vocabulary * 4) / cards,
    }
    each = shape.kv_bytes(dtype) / cards
    cache = reserved - sum(held.values())
    at_once = int(cache // (each * min(tokens, longest)))
    parts = {**held, "cache": max(cache, longest * each), **({"CUDA graphs": graphs} if graphs else {})}
    return Served(parts, min(card.memory, reserved + graphs), max(1, min(rows, at_once)))


def room_of(recipe: Mapping[str, Any], shape: Shape, tokens: int, nf4: bool, card: Card) -> float:
    """Bytes that a checkpoint which answers may take."""
    return served(recipe, shape, tokens, nf4, card).room if recipe.get("model") in SERVED else card.memory


def served_mend(recipe: Mapping[str, Any], shape: Shape, tokens: int, nf4: bool, card: Card) -> str:
    """As `asking_mend`, of a server."""
    arguments = recipe.get("model_args") or {}
    tries: list[tuple[int, bool, bool]] = []  # tokens of a sequence, NF4, no CUDA graphs
    eager = bool(arguments.get("enforce_eager"))
    for part in (1, *SHORTER):
        settings = [(nf4, eager), (True, eager), (nf4, True), (True, True)]
        tries += [(tokens // part, *each) for each in settings if part == 1 or each[0]]
    for longest, packed, no_graphs in tries:
        limits = {"max_length": None, "context_length": None, "max_model_len": longest}
        changed = {**recipe, "model_args": {**arguments, **limits, "enforce_eager": no_graphs}}
        found = served(changed, shape, longest, packed, card)
        if sum(found.parts.values()) > found.room:
            continue
        typed = ["nf4=true"] if packed and not nf4 else []
        typed += ["model_args.enforce_eager=true"] if no_graphs and not eager else []
        name = next((key for key in limits if arguments.get(key)), "max_model_len")
        typed += [f"model_args.{name}={longest}"] if arguments.get(name) != longest else []
        typed += [f"gen_kwargs.max_gen_toks={longest - PROMPT}"] if longest < tokens else []
        if longest > PROMPT:
            return " ".join(typed)
    return ""


def asking_mend(recipe: Mapping[str, Any], shape: Shape, tokens: int, nf4: bool, card: Card, floor: float) -> str:
    """What makes a checkpoint that answers fit the device, as it is typed; empty where nothing does."""
    if recipe.get("model") in SERVED:
        return served_mend(recipe, shape, tokens, nf4, card)
    tries: list[tuple[str, dict[str, Any], int, bool]] = []
    if not nf4:
        tries.append(("nf4=true", dict(recipe), tokens, True))
    if batch_of(recipe) > 1:
        tries.append(("batch_size=1", {**recipe, "batch_size": 1}, tokens, nf4))
        tries.append(("nf4=true batch_size=1", {**recipe, "batch_size": 1}, tokens, True))
    for length in (tokens // part for part in SHORTER if tokens // part > PROMPT):
        shorter = {**recipe, "batch_size": 1}
        tries.append((f"nf4=true batch_size=1 gen_kwargs.max_gen_toks={length - PROMPT}", shorter, length, True))
    for typed, changed, length, packed in tries:
        if sum(asking_memory(changed, shape, length, packed, card, floor).values()) <= card.memory:
            return typed
    return ""


def asking_seconds(asked: Sequence[tuple[int, int]], rows: int, speed: Speed) -> tuple[float, float]:
    """Seconds and tokens of answers as long as they may be; a prompt is read in a third of what learning it takes.

    Args:
        asked: (questions, tokens of an answer) a task.
        rows: answers at once.
        speed: of the checkpoint.
    """
    tokens = float(sum(count * length for count, length in asked))
    reading = sum(count for count, _ in asked) * PROMPT * speed.token / 3
    return reading + sum(math.ceil(count / rows) * length for count, length in asked) * speed.decode, tokens
