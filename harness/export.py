"""One checkpoint of a run as a folder to publish: weights, tokenizer, a card, and the recipes that make it again.

Knows files, and the hub. Which checkpoint it is, `lineage` says; what the card says, `model_card`. Nothing that is
exported names a place on this machine: what names one is replaced or left out, and what would still do so is refused.
"""

from __future__ import annotations

import fcntl
import fnmatch
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from harness import model_card
from harness.checks import is_hub_id
from harness.config import ARMS, SECRET
from harness.errors import LoopError, StageError
from harness.files import below, digest, disk_errors, sync, write_json, write_text
from harness.lineage import Chosen, Parent, Step
from harness.model_card import AGAIN, Licence
from harness.stages import RECIPE, STAND_IN, dump
from harness.stages.distill import ADAPTER, SAVED
from thinkswitch_plugin.prompts import FILES as PROMPT_FILES

CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json", "adapter_config.json")
LOADED_BY = ("config.json", "adapter_config.json")  # of them, those without which a folder is no checkpoint
TOKENIZER = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model")
TEMPLATES = ("chat_template.*",)
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
OWN_NAME = ("_name_or_path", "name_or_path")  # where a file was loaded from
UNFINISHED = ".unfinished"  # what is exported, until it is whole
GONE = object()  # what is left out of a recipe


def licence(parents: Sequence[Parent], said: str | None) -> Licence:
    """The licence to publish under: what is said, or what both parents' cards agree on.

    Raises:
        LoopError: they name none, or two.
    """
    if said:
        return Licence(said)
    found = {parent.role: _licence_of(parent) for parent in parents}
    for parent in parents:
        if found[parent.role] is None:
            raise LoopError(
                f"{parent.role}, {parent.name}: its card names no licence; say what this may be published under: "
                "--license apache-2.0, as the hub calls it"
            )
    ours, theirs = (found[parent.role] for parent in parents)
    # Each parent's card may link to its own copy of one licence; only "other" is known by its link.
    alike = ours == theirs if ours and ours.id == "other" else (ours and ours.id) == (theirs and theirs.id)
    if ours is None or not alike:
        both = ", ".join(f"{role} {one.id if one else 'none'}" for role, one in found.items())
        raise LoopError(f"the parents' licences differ ({both}): say which both allow by --license ID")
    return ours


def _licence_of(parent: Parent) -> Licence | None:
    from huggingface_hub import ModelCard

    if not (card := parent.file("README.md")):
        return None
    try:
        data = ModelCard.load(card, ignore_metadata_errors=True).data
    except Exception:  # what is no YAML, in one of its parser's ways
        return None
    if not isinstance(data.license, str):
        return None
    return Licence(data.license, data.license_name, data.license_link)


def write(chosen: Chosen, to: Path, licensed: Licence, name: str, adapter_only: bool = False) -> None:
    """Write a checkpoint's folder, the card last.

    Args:
        chosen: the checkpoint.
        to: the folder, new or empty.
        licensed: what it is published under.
        name: what it is to be called, `owner/name` where it goes to the hub.
        adapter_only: the adapter in place of the whole weights.

    Raises:
        LoopError: the folder has something in it, the checkpoint is not there or not what it was, or something of it
            would name a place on this machine.
    """
    sources = adapters(chosen) if adapter_only else [_weights(chosen)]
    with disk_errors(to, "--to"), _unfinished(to) as work:
        names = _places(chosen)
        if adapter_only:
            _write_adapter(chosen, sources, work, names)
        else:
            _write_whole(chosen, sources[0], work, names)
        for file, text in again(chosen, names).items():
            (work / AGAIN).mkdir(exist_ok=True)
            write_text(work / AGAIN / file, text)
        for place, text in model_card.files(chosen, licensed, name, adapter_only).items():
            (work / place).parent.mkdir(exist_ok=True)
            write_text(work / place, text)
        check_named(work, names)


@contextmanager
def _unfinished(to: Path) -> Iterator[Path]:
    """A folder to fill, inside `to`, whose files are moved up once they are all there and on the disk.

    Without its config no loader takes a folder for a checkpoint: that is moved last, and what a machine that loses
    power leaves is none, or whole. What an export that was killed has left is written anew.

    Raises:
        LoopError: `to` has something else in it, or another export is at it.
    """
    work, new = to / UNFINISHED, not to.exists()
    if not new and (not to.is_dir() or any(path != work for path in to.iterdir())):
        raise LoopError(f"--to {to}: is there already, and not empty; name a new folder")
    to.mkdir(parents=True, exist_ok=True)
    lock = os.open(to, os.O_RDONLY)
    moved: list[Path] = []
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LoopError(f"--to {to}: another export is at it; name a new folder") from None
        try:
            if work.exists():
                shutil.rmtree(work)
            work.mkdir()
            yield work
            for path in work.rglob("*"):
                sync(path)
            sync(work)
            for path in sorted(work.iterdir(), key=lambda path: path.name in LOADED_BY):
                if path.name in LOADED_BY:
                    sync(to)
                os.replace(path, to / path.name)
                moved.append(to / path.name)
            work.rmdir()
            sync(to)
        except BaseException:
            for left in [work, *moved]:
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
            if new:
                with suppress(OSError):
                    to.rmdir()
            raise
    finally:
        os.close(lock)


def _weights(chosen: Chosen) -> Path:
    key = chosen.step["key"]
    folder: Path = chosen.folder(chosen.step) / chosen.who.checkpoint
    if chosen.store.lacks(key):
        raise LoopError(
            f"{chosen.who}: ts-loop gc took its weights away; run {chosen.base}'s command again with --from "
            f"iter_{chosen.who.iteration:02d}/{chosen.step['name']}, or export --adapter-only"
        )
    if not any(folder.glob("*.safetensors")):
        raise LoopError(f"{folder}: has no weights; run {chosen.base}'s command again with --verify")
    return folder


def adapters(chosen: Chosen) -> list[Path]:
    """The folders of the adapters that were trained one upon the other, the first iteration's first.

    Raises:
        LoopError: the checkpoint has none.
    """
    if chosen.who.checkpoint != "instruct":
        raise LoopError(f"{chosen.who}: thinking is a merge of two checkpoints, it has no adapter: export it whole")
    found = [chosen.folder(step) / ADAPTER for step in chosen.of_kind("distill")]
    if not all((folder / "adapter_model.safetensors").is_file() for folder in found):
        raise LoopError(f"{chosen.who}: was trained without an adapter; leave --adapter-only out")
    if len(found) > 1 and any(model_card.quantised(step) for step in chosen.of_kind("distill")):
        raise LoopError(
            f"{chosen.who}: its adapter is upon the checkpoint of iteration {chosen.who.iteration - 1}, whose weights "
            "were rounded to NF4 when that one's was merged: they are not one; export it whole, or instruct@1's adapter"
        )
    return found


def _write_whole(chosen: Chosen, source: Path, to: Path, places: re.Pattern[str]) -> None:
    for file in _matching(source, (*WEIGHTS, *TOKENIZER, *TEMPLATES)):
        copied(_unharmed(chosen, file), to / file.name)
    for file in _matching(source, CONFIGS):
        write_json(to / file.name, cleaned(json.loads(_unharmed(chosen, file).read_text(encoding="utf-8")), places))


def _write_adapter(chosen: Chosen, sources: Sequence[Path], to: Path, places: re.Pattern[str]) -> None:
    last = sources[-1]
    for file in _matching(last, (*TOKENIZER, *TEMPLATES)):
        copied(_unharmed(chosen, file), to / file.name)
    parent = chosen.parent("instruct")
    based = {"base_model_name_or_path": parent.name, "revision": parent.commit or None}
    for file in _matching(last, ("tokenizer_config.json",)):
        write_json(to / file.name, cleaned(json.loads(_unharmed(chosen, file).read_text(encoding="utf-8")), places))
    for folder in sources:
        for file in _matching(folder, ("adapter_config.json", "adapter_model.safetensors")):
            _unharmed(chosen, file)
    configs = [json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")) for folder in sources]
    if len(sources) == 1:
        copied(last / "adapter_model.safetensors", to / "adapter_model.safetensors")
        config = configs[0]
    else:
        config = stacked(sources, configs, to / "adapter_model.safetensors")
    write_json(to / "adapter_config.json", {**cleaned({**config, "base_model_name_or_path": ""}, places), **based})


def stacked(folders: Sequence[Path], configs: Sequence[Mapping[str, Any]], to: Path) -> dict[str, Any]:
    """Write LoRA adapters that were merged one after the other as a single one, and return its config.

    W + Σ sᵢ BᵢAᵢ = W + [s₁B₁ … sₙBₙ][A₁; …; Aₙ], with sᵢ = αᵢ/rᵢ (αᵢ/√rᵢ of rank-stabilised ones): rank Σ rᵢ, α the
    same, so that its own scale is 1. A is (r, inputs), B (outputs, r).

    Raises:
        LoopError: one of them is more than plain LoRA.
    """
    import torch
    from safetensors.torch import load_file, save_file

    more = (
        "use_dora",
        "modules_to_save",
        "rank_pattern",
        "alpha_pattern",
        "trainable_token_indices",
        "target_parameters",
    )
    loaded = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    names = loaded[0].keys()
    odd = [key for config in configs for key in more if config.get(key)] or [
        name for one in loaded for name in one.keys() ^ names or {n for n in one if ".lora_" not in n}
    ]
    if odd or any(config.get("bias", "none") != "none" for config in configs):
        raise LoopError(
            f"--adapter-only: the adapters of {len(folders)} iterations are more than plain LoRA "
            f"({odd[0] if odd else 'bias'}) and cannot be made one; export the whole checkpoint"
        )
    scales = [c["lora_alpha"] / (c["r"] ** 0.5 if c.get("use_rslora") else c["r"]) for c in configs]
    joined = {}
    for name in names:
        parts = [one[name] for one in loaded]
        inner = ".lora_A." in name or ".lora_embedding_A" in name
        scaled = parts if inner else [scale * part for scale, part in zip(scales, parts, strict=True)]
        joined[name] = torch.cat(scaled, dim=0 if inner else 1).contiguous()
    save_file(joined, to, metadata={"format": "pt"})
    rank = sum(config["r"] for config in configs)
    return {**configs[-1], "r": rank, "lora_alpha": rank, "use_rslora": False}


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return [path for path in files if any(fnmatch.fnmatch(path.name, like) for like in patterns)]


def _unharmed(chosen: Chosen, file: Path) -> Path:
    """A file of a stage that is what it was when the stage ended.

    Raises:
        LoopError: it is not.
    """
    inside = file.relative_to(chosen.store.root)
    record = chosen.store.record(inside.parts[0]) or {"outputs": {}}
    _, value = record["outputs"].get("/".join(inside.parts[1:]), (0, ""))
    if digest(file) != value:
        raise LoopError(f"{file}: changed since it was made; run {chosen.base}'s command again with --verify")
    return file


def copied(source: Path, target: Path) -> None:
    """Copy a file; on a file system that can, its blocks are shared until either is written to."""
    try:
        with source.open("rb") as read, target.open("wb") as written:
            while os.copy_file_range(read.fileno(), written.fileno(), 1 << 30):
                pass
    except OSError:  # an old kernel, or two file systems: what cannot be written says so again
        shutil.copyfile(source, target)


def _places(chosen: Chosen) -> re.Pattern[str]:
    """What nothing that is exported may hold: places on this machine, and the token of the hub."""
    from huggingface_hub import get_token

    said = chosen.noted["asked"]
    folders = [chosen.out.resolve(), Path.home(), Path.cwd(), Path(tempfile.gettempdir())]
    folders += [Path(str(said[role])) for role in ("instruct", "thinking") if Path(str(said[role])).is_absolute()]
    folders += [Path(file).parent for file in said.get("recipes", {}).values() if file]
    found = [str(folder) for folder in folders if len(folder.parts) > 1]
    either = "|".join(re.escape(text) for text in dict.fromkeys([*found, *filter(None, [get_token()])]))
    return re.compile(rf"(?<![\w.@-])(?:{either})(?![\w-])")  # /tmp, and not the model owner/tmp-2


def cleaned(value: Any, places: re.Pattern[str]) -> Any:
    """JSON or YAML data without what names a place on this machine, says where it was loaded from, or is a secret."""
    if isinstance(value, Mapping):
        kept = {
            key: cleaned(inner, places)
            for key, inner in value.items()
            if key not in OWN_NAME and not (SECRET.fullmatch(str(key)) and isinstance(inner, str))
        }
        return {key: inner for key, inner in kept.items() if inner is not GONE}
    if isinstance(value, list):
        return [inner for inner in (cleaned(item, places) for item in value) if inner is not GONE]
    return GONE if isinstance(value, str) and places.search(value) else value


def check_named(folder: Path, places: re.Pattern[str]) -> None:
    """See that nothing a person or a config says in a folder names a place on this machine.

    Raises:
        LoopError: naming the file.
    """
    for file in below(folder):
        if any(fnmatch.fnmatch(file.name, like) for like in TOKENIZER):
            continue  # a vocabulary has all kinds of words
        with file.open("rb") as read:
            head = read.read(8)
            of_weights = file.suffix == ".safetensors"
            text = read.read(int.from_bytes(head, "little")) if of_weights else head + read.read()
        if places.search(text.decode(errors="replace")):
            where = file.relative_to(folder)
            raise LoopError(f"{where}: would name a place on this machine, or a secret of yours; nothing is exported")


def again(chosen: Chosen, places: re.Pattern[str]) -> dict[str, str]:
    """What makes the checkpoint again, by file name: loop.yml and its recipes, as the run resolved them.

    Empty where the run has no recipe of a stage that every loop has: one that merges alone.
    """
    # Of a stage that it did not come from (a dial, an arm that only merges), what the run has; of several t, any.
    every = {kind: chosen.of_kind(kind) or [] for kind in ("generate", "distill", "reconstruct")}
    if chosen.base != chosen.who.run:
        every["reconstruct"] = []
    kinds = {kind: [s for s in chosen.noted["steps"] if s["reads"]["kind"] == kind] for kind in every}
    steps = {kind: next(iter([*reversed(mine), *kinds[kind]]), None) for kind, mine in every.items()}
    steps |= {"evaluate": chosen.find("evaluate_instruct"), "evaluate_thinking": chosen.find("evaluate_thinking")}
    found: dict[str, Any] = {}
    for name, step in steps.items():
        if step is None:
            return {}
        found[name] = _recipe(chosen, name, step, places)
    if _but_for_model(found["evaluate_thinking"]) == _but_for_model(found["evaluate"]):
        del found["evaluate_thinking"]
    return {
        "loop.yml": dump(_loop(chosen, list(found), places)),
        **{f"{name}.yml": dump(recipe) for name, recipe in found.items()},
    }


def _but_for_model(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {**recipe, "model_args": {k: v for k, v in recipe.get("model_args", {}).items() if k != "pretrained"}}


def _recipe(chosen: Chosen, name: str, step: Step, places: re.Pattern[str]) -> dict[str, Any]:
    """A stage's recipe as a person would have written it."""
    instruct, thinking = chosen.parent("instruct").spec, chosen.parent("thinking").spec
    names = {"anchor": thinking, "thinking": thinking, "instruct": instruct}
    names["checkpoint"] = instruct if name == "evaluate" else thinking
    names |= {key: Path(path).name for key, path in step.get("paths", {}).items() if key.startswith("file_")}

    def named(value: Any) -> Any:
        if isinstance(value, Mapping):
            kept = {key: named(inner) for key, inner in value.items()}
            return {key: inner for key, inner in kept.items() if inner is not GONE}
        if isinstance(value, list):
            return [inner for inner in map(named, value) if inner is not GONE]
        if isinstance(value, str) and (found := STAND_IN.search(value)):
            return names.get(found[1], GONE) if found[0] == value else GONE
        if isinstance(value, str) and value.startswith("/"):
            return Path(value).name
        return value

    recipe = dict(step["reads"]["recipes"][RECIPE])
    if name == "distill":  # the first entry stands for the labels, of which there is one a task
        like, *others = recipe["datasets"]
        further = [entry for entry in others if entry.get("path") != like.get("path")]
        kept = {k: v for k, v in like.items() if k not in ("path", "data_files", "ds_type", "split")}
        recipe["datasets"] = [kept, *further]
        recipe.pop("auto_resume_from_checkpoints", None)
        if SAVED.items() <= recipe.items():  # the loop's own, where the recipe keeps none
            recipe = {**{key: value for key, value in recipe.items() if key not in SAVED}, "save_strategy": "no"}
    result: dict[str, Any] = cleaned(named(recipe), places)
    return {key: value for key, value in result.items() if value not in ({}, [])}


def _loop(chosen: Chosen, recipes: Sequence[str], places: re.Pattern[str]) -> dict[str, Any]:
    asked = dict(chosen.noted["asked"])
    here = ("recipes", "python", "jobs", "usd_per_hour", "limits", "retries", "report_to")  # of the machine
    for key in (*here, "arms", "seeds", "include_path"):
        asked.pop(key, None)
    if validate := asked.pop("validate_by", None):
        asked["validate"] = validate
    if not isinstance(asked.get("t"), str):
        asked.pop("t", None)  # the recipe has it
    arm = next((s.get("arm", ARMS[0]) for s in chosen.steps if s["iteration"]), ARMS[0])
    asked |= {
        "name": chosen.base,
        "instruct": chosen.parent("instruct").spec,
        "thinking": chosen.parent("thinking").spec,
        "prompts": [Path(p).name if p.endswith(PROMPT_FILES) else p for p in asked["prompts"]],
        "iterations": max(chosen.who.iteration, 1),
        "seed": chosen.seed,
        "recipes": {name: f"{name}.yml" for name in recipes},
    }
    if arm == "on_policy":
        asked |= {"distill": "on-policy"}
        asked["recipes"]["on_policy"] = "distill.yml"
    elif arm != ARMS[0]:
        asked |= {"arms": [arm]}
    if asked.get("gold"):
        asked["gold"] = Path(asked["gold"]).name
    if arm != "gold":
        asked.pop("gold", None)
    kept: dict[str, Any] = cleaned({key: value for key, value in asked.items() if value is not None}, places)
    return kept


def check_push(name: str) -> None:
    """See that a name is one that the hub can give.

    Raises:
        LoopError: it is not.
    """
    if not is_hub_id(name):
        raise LoopError(f"--push {name}: write ORG/NAME, as the hub calls it")


def push(folder: Path, name: str, private: bool) -> str:
    """Put a folder on the hub as a new model; returns its address.

    Raises:
        StageError: one line with the hub's refusal; the folder stays as it is.
    """
    import httpx
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    token = get_token()
    later = f"{folder} is whole; then: hf upload {name} {folder}"
    if not token:
        raise StageError(f"--push {name}: no token of the hub is here: set HF_TOKEN, or hf auth login; {later}")
    hub = HfApi(token=token)
    try:
        address = hub.create_repo(name, private=private or None, exist_ok=False)
        hub.upload_folder(repo_id=name, folder_path=folder, commit_message="Exported by ts-loop")
    except HfHubHTTPError as error:
        why = {
            401: "the hub does not know this token",
            403: f"this token may not write to {name.partition('/')[0]}",
            409: "the hub has a model of that name already: choose another, or upload into it",
        }.get(error.response.status_code, f"the hub refused ({error.response.status_code}: {_one_line(error, token)})")
    except (httpx.HTTPError, OSError) as error:
        why = f"the hub cannot be reached ({_one_line(error, token)})"
    except ValueError as error:  # metadata that it does not take
        why = f"the hub refused ({_one_line(error, token)})"
    else:
        return str(address)
    raise StageError(f"--push {name}: {why}; {later}")


def _one_line(error: Exception, secret: str) -> str:
    return " ".join(str(error).replace(secret, "…").split())[:200] or type(error).__name__
