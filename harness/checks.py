"""Whether a run can work, found out before anything is loaded.

Each check looks at files (configs, headers, tokenizers; a hub's are fetched first) and raises `LoopError` with what,
where and what to do.
"""

from __future__ import annotations

import ast
import errno
import json
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harness.config import shown
from harness.errors import LoopError
from harness.files import FULL, free_disk, read_json, read_json_or_none
from harness.stages import short
from harness.store import READ
from harness.tasks import Task
from thinkswitch_plugin.prompts import conversation, read_prompts
from thinkswitch_plugin.tah.args import LOADER

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

SPOKEN_WITH = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
ONE_PRETRAINING = "a ThinkSwitch pair must share one pretraining: use two finetunes of the same base"
DESCRIBING = ["*.json", "*.jinja", "README.md"]  # all that a hub's checkpoint says of itself


def local_checkpoint(name: str, role: str) -> tuple[Path, str]:
    """The folder of a checkpoint: the path itself, or the hub's snapshot, downloaded if it is not here yet.

    Args:
        name: a folder, a hub id (owner/name), or one of its revisions (owner/name@revision).
        role: "instruct" or "thinking", for what is said of it.

    Returns:
        The folder, and `owner/name@commit` if it is the hub's.

    Raises:
        LoopError: if there is no such folder and the hub has or gives none.
    """
    if os.path.isdir(name):
        return Path(name), ""
    folder = _from_hub(name, role, list(READ))
    return folder, f"{name.partition('@')[0]}@{folder.name}"


def described_checkpoint(name: str, role: str) -> Path:
    """As `local_checkpoint`, without weights: a folder with a checkpoint's config, tokenizer and card.

    Raises:
        LoopError: if there is no such folder and the hub has or gives none.
    """
    return Path(name) if os.path.isdir(name) else _from_hub(name, role, DESCRIBING)


def is_hub_id(name: str) -> bool:
    """Whether the hub can have a model of a name: owner/name."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def _from_hub(name: str, role: str, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    if not is_hub_id(repository):
        raise LoopError(
            f"--{role} {shown(name)}: no such folder, and not a hub id (owner/name or owner/name@revision) either"
        )
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=files))
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise LoopError(f"--{role} {name}: no disk space left to fetch it; free some, or set HF_HOME") from None
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            where = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
            raise LoopError(
                f"--{role} {name}: cannot be kept ({where}); set HF_HOME to a folder that can be written"
            ) from None
        raise LoopError(
            f"--{role} {name}: no such folder, and the hub did not give it ({type(error).__name__})"
            "\ncheck the name and the network (HF_TOKEN for a gated one), or name a local folder"
        ) from None


def check_checkpoint(folder: Path, role: str) -> None:
    """A checkpoint the tools can load: config, tokenizer, chat template, safetensors weights.

    Raises:
        LoopError: naming what is missing.
    """
    if lack := _lack(folder):
        raise LoopError(f"--{role} {folder}: {lack}")


def _lack(folder: Path) -> str:
    """What a folder lacks to be a checkpoint the tools can load, empty if nothing."""
    for file in ("config.json", "tokenizer.json"):
        if not (folder / file).is_file():
            return f"has no {file}; name the folder of a Hugging Face checkpoint"
    if not list(folder.glob("*.safetensors")):
        return "has no .safetensors weights (pickles are not read); convert it first"
    in_config = (read_json(folder / "tokenizer_config.json") or {}).get("chat_template")
    if not in_config and not (folder / "chat_template.jinja").is_file():
        return "its tokenizer has no chat template; add chat_template.jinja"
    return ""


def lost(folder: Path, like: Path | None = None) -> list[str]:
    """What a tool left half written of a checkpoint, or did not leave: some say no more than a line in their log.

    Args:
        folder: the checkpoint.
        like: the one it was made from; of its files those that say how it is spoken with must be here, too.

    Returns:
        The names of files that are missing, empty, no whole JSON or no whole safetensors, in order.
    """
    index = read_json_or_none(folder / "model.safetensors.index.json") or {}
    weights = {*index.get("weight_map", {}).values(), *(file.name for file in folder.glob("*.safetensors"))}
    asked = {"config.json", *(name for name in SPOKEN_WITH if like and (like / name).is_file())}
    found = {name for name in asked if not (folder / name).is_file() or not (folder / name).stat().st_size}
    found |= {file.name for file in folder.glob("*.json") if read_json_or_none(file) is None}
    found |= {name for name in weights or ["model.safetensors"] if not _opens(folder / name)}
    return sorted(found)


def _opens(file: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            return True
    except (SafetensorError, OSError):
        return False


def is_tah(folder: Path) -> bool:
    """Whether a folder is a Think-at-Hard checkpoint, by its config."""
    config = read_json(folder / "config.json")
    return isinstance(config, dict) and config.get("model_type") == "tah"


def check_tah(folder: Path, role: str) -> None:
    """A TaH checkpoint that runs no code but this package's when a tool loads it with `trust_remote_code`.

    Raises:
        LoopError: naming the code.
    """
    for file in sorted(folder.rglob("*.py")):
        if file != folder / LOADER or not _only_imports(file):
            raise LoopError(
                f"--{role} {folder}: {file.relative_to(folder)} would run when it is loaded; a TaH checkpoint has one "
                f"file of code, {LOADER}, that imports from thinkswitch_plugin.tah and nothing else"
            )
    for file in sorted(folder.glob("*.json")):
        value = read_json(file)
        named = value.get("auto_map") if isinstance(value, dict) else None
        if named and "--" in json.dumps(named):
            raise LoopError(f"--{role} {folder}: auto_map in {file.name} names code on the hub; remove it")


def _only_imports(file: Path) -> bool:
    """Whether all that a Python file does is import from `thinkswitch_plugin.tah`."""
    try:
        lines = ast.parse(file.read_bytes()).body
    except (SyntaxError, ValueError):
        return False
    for line in lines:
        if isinstance(line, ast.ImportFrom):
            harmless = (line.module or "").startswith("thinkswitch_plugin.tah.") and not line.level
        elif isinstance(line, ast.Assign) and isinstance(line.value, ast.List):
            names = all(isinstance(name, ast.Constant) for name in line.value.elts)
            harmless = names and [ast.unparse(target) for target in line.targets] == ["__all__"]
        else:
            harmless = isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)
        if not harmless:
            return False
    return True


def check_think_map(folder: Path, prompt: str, decider: str | None, page: Path | None) -> None:
    """Whether a think map can be made, as far as files tell.

    Raises:
        LoopError: with what is wrong, in one line.
    """
    if not folder.is_dir():
        raise LoopError(f"{folder}: no such folder; name that of a TaH checkpoint")
    if (folder / "config.json").is_file() and not is_tah(folder):
        raise LoopError(f"{folder}: not a TaH checkpoint (model_type in its config.json is not tah)")
    if lack := _lack(folder):
        raise LoopError(f"{folder}: {lack}")
    config = read_json(folder / "config.json")
    policy = decider or config.get("decider")
    if policy == "oracle" or (policy == "learned" and not config.get("decider_hidden")):
        raise LoopError(
            f"{folder}: its decider is not trained yet; train it (a recipe with stage: decider), "
            "or give --decider always or --decider never"
        )
    try:
        conversation({"prompt": prompt})
    except ValueError:
        raise LoopError("--prompt: is empty, or no text in UTF-8; ask something") from None
    if page and (page.is_dir() or not os.access(page if page.exists() else page.resolve().parent, os.W_OK)):
        raise LoopError(f"--html {page}: cannot be written; name a file in a folder that is there")


def check_described(instruct: Path, thinking: Path) -> None:
    """Two checkpoints whose configs name one shape and whose tokenizers are one; their weights are not looked at.

    Raises:
        LoopError: with the first difference.
    """
    ours, theirs = sizes(instruct), sizes(thinking)
    for key in SHAPE_KEYS:
        if ours[key] != theirs[key]:
            raise LoopError(
                f"the pair does not fit: {key} is {ours[key]} in {instruct} and {theirs[key]} in {thinking}"
                f"\n{ONE_PRETRAINING}"
            )
    mine, other = _vocabulary(instruct), _vocabulary(thinking)
    if mine != other:
        differing = sorted(mine.items() ^ other.items())
        raise LoopError(
            f"the pair's tokenizers differ in {len(differing)} entries, such as {short(differing[0][0])!r}: "
            f"{instruct} and {thinking}\n{ONE_PRETRAINING}"
        )


def check_pair(instruct: Path, thinking: Path) -> None:
    """Two checkpoints of one shape and one tokenizer: the precondition of interpolating their weights.

    Of a TaH checkpoint, its backbone.

    Raises:
        LoopError: with the first difference.
    """
    check_described(instruct, thinking)
    mine_shapes, other_shapes = _backbone_shapes(instruct), _backbone_shapes(thinking)
    for name in sorted({*mine_shapes, *other_shapes}):
        if mine_shapes.get(name) != other_shapes.get(name):
            raise LoopError(
                f"the pair does not fit: {name} is {mine_shapes.get(name, 'missing')} in {instruct} "
                f"and {other_shapes.get(name, 'missing')} in {thinking}\n{ONE_PRETRAINING}"
            )


def sizes(folder: Path) -> dict[str, Any]:
    """What the config of a checkpoint says of its shape (`SHAPE_KEYS`); of a TaH checkpoint, its backbone's.

    Raises:
        LoopError: if there is none.
    """
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise LoopError(f"{folder / 'config.json'}: is no checkpoint's config; copy or download it again")
    described = config["text_config"] if is_tah(folder) else config
    return {key: described.get(key) for key in SHAPE_KEYS}


def _backbone_shapes(folder: Path) -> dict[str, list[int]]:
    """Tensor shapes by name; of a TaH checkpoint those of its backbone, without adapter and decider."""
    shapes = tensor_shapes(folder)
    if not is_tah(folder):
        return shapes
    prefix, adapter = "backbone.", (".lora_A", ".lora_B")
    return {
        name.removeprefix(prefix): shape
        for name, shape in shapes.items()
        if name.startswith(prefix) and not name.endswith(adapter)
    }


def _vocabulary(folder: Path) -> dict[str, int]:
    """Every token a tokenizer knows, with its id.

    Raises:
        LoopError: if its file is no tokenizer's.
    """
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    try:
        vocabulary: dict[str, int] = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises nothing narrower
        why = " ".join(str(error).split())[:300]
        raise LoopError(f"{file}: not a tokenizer ({why}); copy or download it again") from None
    return vocabulary


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """Tensor shapes by name, from the safetensors headers alone.

    Raises:
        LoopError: if a file is not whole.
    """
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, list[int]] = {}
    for file in sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith(".")):
        try:
            with safe_open(file, framework="numpy") as weights:
                shapes.update({name: weights.get_slice(name).get_shape() for name in weights.keys()})  # noqa: SIM118
        except (SafetensorError, OSError):
            raise LoopError(f"{file}: not a whole safetensors file; copy or download it again") from None
    return shapes


def checked_prompts(source: str | Path) -> list[dict[str, Any]]:
    """The rows of a prompts file, or of a hub data set, every one of which can be asked.

    Raises:
        LoopError: with the source and the row of the first that cannot.
    """
    try:
        return read_prompts(source)
    except ValueError as error:
        raise LoopError(f"--prompts {error}") from None


def check_tasks(prompts: Sequence[Task], tests: Sequence[Task], validated: Sequence[Task] = ()) -> None:
    """Tasks whose answers are written, prompts that are conversations, and none that t is chosen by among the tests.

    Raises:
        LoopError: naming the first that is something else.
    """
    for task in [*prompts, *tests, *validated]:
        if task.output_type != "generate_until":
            raise LoopError(
                f"task {task.name} is {task.output_type}: it compares likelihoods of given texts, before which no "
                "checkpoint gets to think\nname one that lets the checkpoint write (output_type: generate_until)"
            )
    for task in [*tests, *validated]:
        if task.conversations and task.grades_traces:
            raise LoopError(f"task {task.name} asks training prompts, which have no right answers; do not score it")
    for task in prompts:
        if not task.conversations:
            raise LoopError(
                f"task {task.name} asks no prompts that can be learnt from: its rows have no messages"
                "\nput your prompts into a file (.jsonl, .csv, .parquet) and name that, or see tasks/README.md"
            )
    if scored := [task.name for task in validated if task.name in {test.name for test in tests}]:
        raise LoopError(
            f"validate: {', '.join(scored)} is scored, too: t would be chosen by the test; name a task that is not in "
            "tasks:"
        )


def check_processes(recipe: Mapping[str, Any], launcher: str) -> None:
    """A training recipe that several processes are to share, as far as can be told before they start.

    Raises:
        LoopError: if one process would be started, a tool is missing, or the weights would be left in shares.
    """
    sharded = "deepspeed" if recipe.get("deepspeed") else "fsdp_config" if recipe.get("fsdp_config") else ""
    if sharded and launcher.split()[:1] == ["python"]:
        raise LoopError(
            f"distill recipe: {sharded}: shares a model out to several processes, and launcher: python starts one; "
            "--set 'launcher=torchrun --nproc_per_node=2'"
        )
    if sharded == "deepspeed":
        if isinstance(recipe["deepspeed"], str) and not os.path.isfile(recipe["deepspeed"]):
            raise LoopError(
                f"distill recipe: deepspeed: {recipe['deepspeed']}: no such file here or beside the recipe; give its "
                "path, or its settings in its place"
            )
        if not find_spec("deepspeed"):
            raise LoopError("distill recipe: deepspeed: is not installed; pip install deepspeed")
    settings = recipe.get("fsdp_config") or {}
    if not isinstance(settings, dict):
        raise LoopError("distill recipe: fsdp_config: must be a mapping, as in fsdp_config: {fsdp_version: 2}")
    left = settings.get("final_state_dict_type") or settings.get("state_dict_type")
    if left == "SHARDED_STATE_DICT" and not recipe.get("adapter") and recipe.get("save_strategy") == "no":
        raise LoopError(
            "distill recipe: fsdp_config: state_dict_type: SHARDED_STATE_DICT leaves a checkpoint in shares, which "
            "Axolotl puts together from the last it saved, and save_strategy: no saves none; "
            "--set distill.fsdp_config.final_state_dict_type=FULL_STATE_DICT"
        )


def check_accelerator(recipes: Mapping[str, Mapping[str, Any]], there: bool, bf16: bool = True) -> None:
    """Recipes made for an accelerator, where there is one that does what they ask for.

    Args:
        recipes: by the name they have in loop.yml.
        there: whether there is an accelerator.
        bf16: whether it computes in bfloat16.

    Raises:
        LoopError: naming the setting of the first that asks for what is not there.
    """
    if there and not bf16 and recipes.get("distill", {}).get("bf16") is True:
        raise LoopError(
            "distill recipe: bf16: true: this card is older than Ampere and has no bfloat16; "
            "--set distill.bf16=auto takes float16"
        )
    for name, recipe in recipes.items() if not there else ():
        asked = ""
        if str(recipe.get("device", "")).startswith("cuda"):
            asked, instead = f"device: {recipe['device']}", "device=cpu"
        elif name == "distill" and recipe.get("bf16") is True:
            asked, instead = "bf16: true", "bf16=false"
        if asked:
            raise LoopError(
                f"{name} recipe: {asked}: no accelerator is here, and what a card does in an hour takes a CPU days; "
                f"see ts-loop plan, or --set {name}.{instead} if that is meant"
            )


def disk_needed(left: float, largest: float) -> float:
    """Bytes that a run takes on the disk at its peak: what `plan` says, and what is asked for before anything runs.

    Args:
        left: bytes of checkpoints that its stages leave.
        largest: the most that one of them writes beside those while it runs; a checkpoint, if it writes one.

    Returns:
        Their sum, and a twentieth of it: adapters, answers, logs.
    """
    return 1.05 * (left + largest)


def check_disk(root: Path, checkpoint: Path, checkpoints: int) -> None:
    """Room for the checkpoints that a run is still to write, and for one under way.

    Args:
        root: where they go.
        checkpoint: one of their size.
        checkpoints: how many.

    Raises:
        LoopError: with what is needed and what is free, in GB.
    """
    weights = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    needed = disk_needed(weights * checkpoints, weights) if checkpoints else 0
    place, free = free_disk(root)
    if free < needed:
        raise LoopError(
            f"no disk space: {checkpoints} checkpoints need {needed / 1e9:.1f} GB, {place} has {free / 1e9:.1f} GB"
            "\nfree some (ts-loop gc), choose another disk with --out, or fewer iterations with --iters"
        )
