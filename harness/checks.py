"""Whether a run can work, found out before anything is loaded.

Each check looks at files only (configs, headers, tokenizers) and raises `LoopError` with what, where and what to do.
The one that needs lm-eval, `check_tasks`, runs in a child of the preloaded server.
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

from harness.errors import LoopError
from harness.rundir import read_json
from thinkswitch_plugin.prompts import read_prompts
from thinkswitch_plugin.recipe import may_be_hub_id

SHAPE_KEYS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
)
PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]  # what a checkpoint needs; never a pickle


def local_checkpoint(name: str, role: str) -> Path:
    """The folder of a checkpoint: the path itself, or the hub's snapshot, downloaded if it is not here yet.

    Raises:
        LoopError: if there is no such folder and the hub has or gives none.
    """
    if Path(name).is_dir():
        return Path(name)
    if not may_be_hub_id(name):
        raise LoopError(f"--{role} {name}: no such folder, and not a hub id (owner/name) either")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=PATTERNS))
    except Exception as error:
        raise LoopError(
            f"--{role} {name}: no such folder, and the hub did not give it ({type(error).__name__})"
            "\ncheck the name and the network (HF_TOKEN for a gated one), or name a local folder"
        ) from None


def check_checkpoint(folder: Path, role: str) -> None:
    """A checkpoint the tools can load: config, tokenizer, chat template, safetensors weights.

    Raises:
        LoopError: naming what is missing.
    """
    for file in ("config.json", "tokenizer.json"):
        if not (folder / file).is_file():
            raise LoopError(f"--{role} {folder}: has no {file}; name the folder of a Hugging Face checkpoint")
    if not list(folder.glob("*.safetensors")):
        raise LoopError(f"--{role} {folder}: has no .safetensors weights (pickles are not read); convert it first")
    in_config = (read_json(folder / "tokenizer_config.json") or {}).get("chat_template")
    if not in_config and not (folder / "chat_template.jinja").is_file():
        raise LoopError(f"--{role} {folder}: its tokenizer has no chat template; add chat_template.jinja")


def check_pair(instruct: Path, thinking: Path) -> None:
    """Two checkpoints of one shape and one tokenizer: the precondition of interpolating their weights.

    Raises:
        LoopError: with the first difference.
    """
    why = "a ThinkSwitch pair must share one pretraining: use two finetunes of the same base"
    ours, theirs = (read_json(folder / "config.json") for folder in (instruct, thinking))
    for key in SHAPE_KEYS:
        if ours.get(key) != theirs.get(key):
            raise LoopError(
                f"the pair does not fit: {key} is {ours.get(key)} in {instruct} and {theirs.get(key)} in {thinking}"
                f"\n{why}"
            )
    mine, other = _vocabulary(instruct), _vocabulary(thinking)
    if mine != other:
        differing = sorted(mine.items() ^ other.items())
        raise LoopError(
            f"the pair's tokenizers differ in {len(differing)} entries, such as {differing[0][0]!r}: "
            f"{instruct} and {thinking}\n{why}"
        )
    mine_shapes, other_shapes = tensor_shapes(instruct), tensor_shapes(thinking)
    for name in sorted({*mine_shapes, *other_shapes}):
        if mine_shapes.get(name) != other_shapes.get(name):
            raise LoopError(
                f"the pair does not fit: {name} is {mine_shapes.get(name, 'missing')} in {instruct} "
                f"and {other_shapes.get(name, 'missing')} in {thinking}\n{why}"
            )


def _vocabulary(folder: Path) -> dict[str, int]:
    """Every token a tokenizer knows, with its id."""
    tokenizer: dict[str, Any] = read_json(folder / "tokenizer.json")
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):  # a unigram model lists [token, score]
        vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}}


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """Tensor shapes by name, from the safetensors headers alone.

    Raises:
        LoopError: if a file is not whole.
    """
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with file.open("rb") as stream:
                (size,) = struct.unpack("<Q", stream.read(8))
                header = json.loads(stream.read(size))
        except (struct.error, ValueError, OSError, OverflowError, MemoryError):
            raise LoopError(f"{file}: not a whole safetensors file; copy or download it again") from None
        shapes.update({name: value["shape"] for name, value in header.items() if name != "__metadata__"})
    return shapes


def check_prompts(file: Path) -> None:
    """A prompts file every row of which can be asked.

    Raises:
        LoopError: with the file and the line of the first that cannot.
    """
    try:
        read_prompts(file)
    except ValueError as error:
        raise LoopError(f"--prompts {error}") from None


def check_disk(root: Path, checkpoint: Path, iterations: int) -> None:
    """Room for what the run will write: an instruct and a thinking checkpoint an iteration, and a merge under way.

    Raises:
        LoopError: with what is needed and what is free, in GB.
    """
    weights = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    needed = int(weights * (2 * iterations + 1) * 1.05)
    place = next(folder for folder in (root, *root.resolve().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise LoopError(
            f"no disk space: {iterations} iterations need {needed / 1e9:.1f} GB, {place} has {free / 1e9:.1f} GB"
            "\nfree some, choose another disk with --out, or fewer iterations with --iters"
        )


def check_tasks(tasks: list[str], include_path: str | None) -> None:
    """Ask lm-eval whether it knows the tasks. Runs in a child; its exit message is the complaint.

    Raises:
        SystemExit: naming the unknown ones.
    """
    from lm_eval.tasks import TaskManager

    known = TaskManager(include_path=include_path)
    unknown = [task for task in tasks if not known.match_tasks([task])]
    if unknown:
        raise SystemExit(
            f"lm-eval knows no task {', '.join(unknown)}: see `lm_eval ls tasks`, "
            "or name your tasks' folder by --include-path"
        )
