"""Recipes for a pair of one's own: what its files and the card it runs on call for, written as native recipes.

Knows what a checkpoint's config, generation config and card say, and rough arithmetic of what fits a card; `plan` looks
closer before anything runs. Leaves to others: whether the pair fits together (`checks`), how a recipe becomes a stage
(`stages`). The recipes themselves are templates, `recipes/own/`.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from harness import checks
from harness.card import Card, at_hand
from harness.config import recipes_folder
from harness.costs.shape import Shape, read_shape
from harness.errors import LoopError
from harness.files import read_json
from thinkswitch_plugin.prompts import is_source

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
SAID = re.compile(r"output length (?:of|to) ([\d,]{3,7})")  # how Qwen's cards say how long an answer may get
LONGEST = 32_768  # tokens of an answer where nothing says more or less
LEAST = 256  # tokens: what a generation config says below that is a library's default, and nobody's answer
OVERHEAD = 0.9e9  # a CUDA context, the allocator's gaps, activations of one token
AT_ONCE = 64  # answers or rows, at most: a batch goes on until its longest one ends
SMALL = 100e6  # parameters, up to which two stages side by side, or weights twice, do no harm on a CPU
PROMPTS, TASKS = ["aime_prompts15", "pubmedqa_prompts15"], ["aime26", "pubmedqa30"]
SPARE = 0.9  # of the room, that several answers at once may fill
TIGHT = 12e9  # bytes of a card, below which the loss's own memory counts
T = 0.2  # of slerp: well before the cliff
USUAL_COUNT = 30  # of prompts, where nobody counted: the paper's 15 a domain
PROMPT = 1024  # tokens that a prompt is given


@dataclass(frozen=True)
class Asked:
    """How a checkpoint is asked.

    Attributes:
        tokens: of an answer, at most.
        length_from: who says so.
        sampling: lm-eval's gen_kwargs.
        sampling_from: who says so.
        batch: answers at once.
    """

    tokens: int
    length_from: str
    sampling: dict[str, Any]
    sampling_from: str
    batch: int


class Written(NamedTuple):
    """A pair's own loop.

    Attributes:
        texts: of the files, by name; `loop.yml` names the others.
        facts: what they were made from, for people: (what, value).
    """

    texts: dict[str, str]
    facts: list[tuple[str, str]]


@dataclass(frozen=True)
class Wanted:
    """What the user says of the run.

    Attributes:
        folder: where the files will lie, as the user writes it.
        instruct: the checkpoint as the recipes are to name it: an absolute path or a hub id.
        thinking: the same.
        name: of the run.
        prompts: a file or hub data set, or lm-eval tasks.
        tasks: lm-eval tasks that are scored.
        include_path: a folder of the user's own tasks.
        count: how many prompts there are, None if nobody knows yet.
        vram: of the card in GB, if it was named.
    """

    folder: str
    instruct: str
    thinking: str
    name: str | None = None
    prompts: list[str] | None = None
    tasks: list[str] | None = None
    include_path: Path | None = None
    count: int | None = None
    vram: float | None = None


def is_embedded(pair: Mapping[str, str]) -> bool:
    """Whether the shipped recipes are made for a pair: its shape and its number of tokens are the embedded pair's.

    Raises:
        LoopError: a checkpoint is not there.
    """
    made_for = checks.sizes(recipes_folder() / "mini" / "instruct")
    return all(checks.sizes(checks.described_checkpoint(name, role)) == made_for for role, name in pair.items())


def prepared(wanted: Wanted, card: Card | None = None) -> Written:
    """`write` for a pair that was looked at first: its configs, cards and tokenizers, and the user's prompts.

    Args:
        wanted: what the user says; the run is named after the folder unless it has a name, and prompts are counted.
        card: what it will run on; None for the device at hand.

    Raises:
        LoopError: with the first thing that will not work.
    """
    pair = {"instruct": wanted.instruct, "thinking": wanted.thinking}
    folders = {role: checks.described_checkpoint(checkpoint, role) for role, checkpoint in pair.items()}
    checks.check_described(folders["instruct"], folders["thinking"])
    prompts = wanted.prompts
    count = len(checks.checked_prompts(prompts[0])) if prompts and is_source(prompts[0]) else None
    after = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(wanted.folder).resolve().name).lstrip("-._")
    return write(replace(wanted, name=wanted.name or after or "own", count=count), folders, card or at_hand())


def write(wanted: Wanted, folders: Mapping[str, Path], card: Card) -> Written:
    """The loop and its recipes for a pair on a card.

    Args:
        wanted: what the user says.
        folders: of "instruct" and "thinking": their configs and cards are read, no weights.
        card: what it will run on.

    Raises:
        LoopError: a config cannot be read, or the weights do not fit the card.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    shape = read_shape(folders["thinking"])
    dtype = ("bfloat16" if card.bf16 else "float16") if card.gpu else "float32"
    whole = shape.weights_bytes(False, dtype)
    # Beside the weights a cache has to fit for one answer of half the usual length.
    nf4 = card.gpu and whole + OVERHEAD + LONGEST // 2 * shape.kv_bytes(dtype) > card.memory
    room = int(card.memory - shape.weights_bytes(nf4, dtype) - OVERHEAD)
    if room < 1024 * shape.kv_bytes(dtype):
        raise LoopError(
            f"{wanted.thinking}: its weights{' in NF4' if nf4 else ''} and what surrounds them take "
            f"{(card.memory - room) / 1e9:.1f} GB, {card.name} gives {card.memory / 1e9:.1f}: take a larger card or a "
            "smaller pair"
        )
    how = {who: asked_how(folders[who], shape, room, dtype) for who in ("instruct", "thinking")}
    rows, sequence = rows_a_step(wanted.count or USUAL_COUNT), row_length(shape, card)
    micro = min(rows, micro_batch(shape, card, sequence))
    prompts, tasks = wanted.prompts or PROMPTS, wanted.tasks or TASKS
    rollouts = 4 if rows < AT_ONCE else 1
    beside = together(shape, card, dtype, rollouts, sequence)
    values = {
        "size": f"{shape.parameters / 1e9:.3g}B" if shape.parameters >= 1e8 else f"{shape.parameters:,}",
        "card": card.name,
        "gpu": card.gpu,
        "bf16": card.bf16,
        "folder": wanted.folder,
        "name": wanted.name,
        "instruct": quoted(wanted.instruct),
        "thinking": quoted(wanted.thinking),
        "prompts": quoted(prompts),
        "tasks": quoted(tasks),
        "tasks_are_usual": wanted.tasks is None,
        "include_path": quoted(str(wanted.include_path)) if wanted.include_path else "",
        "nf4": nf4,
        "whole_gb": whole / 1e9,
        "dtype": dtype,
        "weights_dtype": shape.dtype,
        "vocabulary": f"{shape.vocabulary:,}",
        "device": "cuda:0" if card.gpu else "cpu",
        "jobs": 2 if not card.gpu and shape.parameters < SMALL and (os.cpu_count() or 1) > 1 else 1,
        "sequence_len": sequence,
        "rows": rows,
        "micro_batch": micro,
        "accumulation": rows // micro,
        "learning_rate": learning_rate(shape.hidden),
        "optimizer": "paged_adamw_8bit" if card.gpu else "adamw_torch_fused",
        "liger": card.gpu and has_liger(folders["instruct"]),
        "rollouts": rollouts,
        "together": beside,
        "unpack": not card.gpu and shape.parameters < SMALL,
        "trace_tokens": how["thinking"].tokens,
        "answer_tokens": min(1024, beside.sequence // 4),
        "on": f" --vram {wanted.vram:g}" if wanted.vram else "",
        "config": shlex.quote(f"{wanted.folder}/loop.yml"),
        "tight": card.gpu and card.memory < TIGHT,
        "t": T,
        "labels": f"{wanted.folder}/out/generate",
    }
    environment = Environment(
        loader=FileSystemLoader(recipes_folder() / "own"), undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters["quoted"] = quoted

    def render(file: str, template: str, **more: Any) -> str:
        out = f"{wanted.folder}/out/{file.removesuffix('.yml')}"
        return environment.get_template(template).render({**values, "file": file, "out": out, **more})

    def ask(file: str, who: str, what: str, labels: bool) -> str:
        own = labels and is_source(prompts[0])
        return render(
            file,
            "asked.yml.j2",
            what=what,
            asked=how[who],
            checkpoint=values[who],
            copy=f"{wanted.folder}/out/{who}_nf4",
            labels=labels,
            asks="[prompts_file]" if own else values["prompts" if labels else "tasks"],
            metadata=quoted(prompts[0]) if own else "",
        )

    texts = {
        "loop.yml": render("loop.yml", "loop.yml.j2"),
        "generate.yml": ask("generate.yml", "thinking", "Stage 1: the thinking checkpoint answers the prompts.", True),
        "evaluate.yml": ask("evaluate.yml", "instruct", "Stage 4: the instruct checkpoint is tested.", False),
        "evaluate_thinking.yml": ask(
            "evaluate_thinking.yml", "thinking", "Stage 4, of the thinking checkpoint.", False
        ),
        **{f"{name}.yml": render(f"{name}.yml", f"{name}.yml.j2") for name in ("distill", "on_policy", "reconstruct")},
    }
    vllm = recipes_folder() / "qwen3_4b" / ("vllm_8gb" if nf4 else "vllm")
    facts = [
        ("pair", f"{values['size']} parameters, {shape.weights_bytes(False) / 1e9:.2g} GB each, {shape.dtype}"),
        ("device", f"{card.name}: {card.memory / 1e9:.1f} GB"),
        ("answers", f"{'NF4' if nf4 else dtype} weights, {how['thinking'].batch} at once"),
        ("a trace and its answer", f"{how['thinking'].tokens:,} tokens at most: {how['thinking'].length_from}"),
        ("an answer alone", f"{how['instruct'].tokens:,} tokens at most: {how['instruct'].length_from}"),
        ("sampling", how["thinking"].sampling_from),
        *([("faster", f"vLLM writes many answers at once: README, and {vllm}")] if card.gpu else []),
        (
            "training",
            f"QLoRA, {rows} rows a step, {micro} at once, of {sequence:,} tokens; rate {learning_rate(shape.hidden)}",
        ),
    ]
    return Written(texts, facts)


class Together(NamedTuple):
    """What fits beside student and teacher.

    Attributes:
        fits: anything does.
        sequence: tokens of the student's prompt and answer.
        rollouts: answers written at once.
        update: answers learnt from at once.
    """

    fits: bool
    sequence: int
    rollouts: int
    update: int


def together(shape: Shape, card: Card, dtype: str, rollouts: int, longest: int) -> Together:
    """On-policy training on a card: two models, and beside them the cache of the rollouts of one prompt at least.

    Args:
        shape: of both models.
        card: they are on.
        dtype: of what is not in NF4.
        rollouts: answers to one prompt.
        longest: tokens of a row.
    """
    # The rest is for reading the prompts; the update's own memory is no larger than the cache that is gone then.
    room = 0.7 * (card.memory - 2 * shape.weights_bytes(card.gpu, dtype) - OVERHEAD / 2)
    each = shape.kv_bytes(dtype)
    lengths = [length for length in (longest, 2560, 2048, 1024) if length <= longest]
    sequence = next((length for length in lengths if rollouts * length * each <= room), lengths[-1])
    at_once = int(room // (sequence * each))
    update = micro_batch(
        shape, card._replace(memory=int(card.memory - shape.weights_bytes(True, "bfloat16"))), sequence
    )
    return Together(at_once >= 1, sequence, max(rollouts, min(AT_ONCE, at_once)), update)


def asked_how(folder: Path, shape: Shape, room: int, dtype: str) -> Asked:
    """How a checkpoint wants to be asked, as far as `room` bytes for its cache allow.

    Sampling is as its generation config says, greedy where that names nothing. An answer's length is what that config
    (`max_new_tokens`) or else its card says, cut to what its positions and the room allow.
    """
    config = read_json(folder / "generation_config.json")
    config = config if isinstance(config, dict) else {}
    sampling = {key: config[key] for key in SAMPLING if config.get(key) is not None}
    if sampling and config.get("do_sample", True):
        said = {"do_sample": True, **sampling}, "the checkpoint's generation_config.json"
    else:
        said = {"do_sample": False}, "greedy, as its generation config names none"
    tokens, length_from = wanted_length(folder, config)
    positions = shape.positions or tokens + PROMPT
    prompt = min(PROMPT, positions // 4)
    if positions - prompt < tokens:
        tokens, length_from = positions - prompt, f"what its {positions:,} positions leave beside a prompt"
    if (fits := room // shape.kv_bytes(dtype) - prompt) < tokens:
        length_from = f"what fits, of {tokens:,} ({length_from})"
        tokens = power_of_two(fits)  # which leaves room for what was not counted
    return Asked(tokens, length_from, *said, answers_at_once(shape, room, dtype, tokens + prompt))


def answers_at_once(shape: Shape, room: int, dtype: str, tokens: int) -> int:
    """How many answers are written at once, of so many tokens each with its prompt, in `room` bytes for their cache."""
    return max(1, min(AT_ONCE, int(SPARE * room // (shape.kv_bytes(dtype) * tokens))))


def wanted_length(folder: Path, config: Mapping[str, Any]) -> tuple[int, str]:
    """How long an answer may get, in tokens, and who says so."""
    said = config.get("max_new_tokens")
    if isinstance(said, int) and said >= LEAST:
        return said, "its generation_config.json says so"
    try:
        found = SAID.search((folder / "README.md").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        found = None
    if found:
        return int(found[1].replace(",", "")), "its card says so"
    return LONGEST, "usual where neither card nor config says"


def rows_a_step(prompts: int) -> int:
    """Rows a training step: an eighth of the prompts as a power of two, 4 to 64."""
    return max(4, min(AT_ONCE, power_of_two(prompts // 8)))


def power_of_two(number: float) -> int:
    """The largest that is no more than a number, 1 at least."""
    return 1 << max(0, int(number).bit_length() - 1)


def learning_rate(hidden: int) -> float:
    """QLoRA's usual 2e-4 at Qwen3-4B's width, and in inverse proportion to it (as in muP, arXiv 2203.03466)."""
    return float(f"{max(1e-4, min(2e-3, 2e-4 * 2560 / hidden)):.1e}")


def row_bytes(shape: Shape, sequence: int) -> int:
    """What a row holds in a training step with checkpointed layers, roughly.

    A layer keeps its input; one layer at a time is computed again, some 50 numbers a unit of width.
    """
    return sequence * 2 * shape.hidden * (shape.layers + 50)


def row_length(shape: Shape, card: Card) -> int:
    """Tokens of a row, as many as a step of one row can hold: 4,096 where the card and the positions allow."""
    longest = min(4096, shape.positions or 4096)
    if not card.gpu:
        return longest
    left = card.memory - shape.weights_bytes(True, "bfloat16") - OVERHEAD
    lengths = [length for length in (longest, 2560, 2048, 1024, 512) if length <= longest]
    return next((length for length in lengths if row_bytes(shape, length) <= left), lengths[-1])


def micro_batch(shape: Shape, card: Card, sequence: int) -> int:
    """Rows of full length that fit a training step, roughly: half of what is left for activations, a power of two."""
    if not card.gpu:
        return AT_ONCE if shape.parameters < SMALL else 1
    left = card.memory - shape.weights_bytes(True, "bfloat16") - 2 * OVERHEAD
    return min(AT_ONCE, power_of_two(left / 2 / row_bytes(shape, sequence)))


def has_liger(folder: Path) -> bool:
    """Whether Liger's kernels know the checkpoint's family; without, the loss is Axolotl's usual one."""
    config = read_json(folder / "config.json")
    family = config.get("model_type") if isinstance(config, dict) else None
    try:
        # Looked up in the text: to import it takes ten seconds.
        files = [file for file in distribution("liger-kernel").files or [] if file.name == "monkey_patch.py"]
    except PackageNotFoundError:
        return False
    return any(f'"{family}": apply_liger' in file.read_text() for file in files)


def quoted(value: str | list[str]) -> str:
    """A text, or a list of texts, as YAML writes it on one line."""
    return str(yaml.safe_dump(value, width=10_000, default_flow_style=True)).removesuffix("\n...\n").rstrip("\n")
