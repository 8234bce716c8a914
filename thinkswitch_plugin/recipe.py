"""What a recipe asks of a plugin, what every plugin refuses or sets in it, and a fingerprint of the files it reads.

Knows: the names a recipe uses, and which files a dataset entry reads. Leaves to others: Axolotl's hooks (`plugin` of
each folder) and what a block's keys mean (`args`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from glob import glob
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

Block = TypeVar("Block", bound=BaseModel)


def checked(name: str, model: type[Block], block: Mapping[str, Any] | None) -> Block:
    """Read a plugin's block of a recipe.

    Args:
        name: the block's key in the recipe.
        model: what it may say.
        block: as YAML gave it, None where the recipe has none.

    Returns:
        The checked block, with defaults for what it leaves out.

    Raises:
        ValueError: one line that names every key that is wrong, and why.
    """
    try:
        return model.model_validate({} if block is None else block)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, (name, *fault['loc'])))}: {fault['msg']}" for fault in error.errors())
        raise ValueError(f"{faults} (keys: {', '.join(model.model_fields)})") from None


def may_be_hub_id(name: str) -> bool:
    """Say whether a name that is no folder can be a hub's (owner/name), rather than a path to something missing."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def is_there(name: str) -> bool:
    """Say whether a checkpoint is a folder of this machine, or can be one of the hub."""
    return Path(name).is_dir() or may_be_hub_id(name)


def refuse(name: str, cfg: Mapping[str, Any], refused: Mapping[str, str]) -> None:
    """Refuse settings that do not go with a plugin.

    Args:
        name: the plugin's block.
        cfg: the recipe.
        refused: for each setting, why it does not go with it and what to do.

    Raises:
        ValueError: one is set; one line.
    """
    for key, why in refused.items():
        if cfg.get(key) and not (key.endswith("_size") and cfg[key] == 1):  # one is as good as none
            raise ValueError(f"{name}: {key} is set: {why}")


def send_no_reports() -> None:
    """Turn Axolotl's usage reports off, unless the user asked for them by AXOLOTL_DO_NOT_TRACK=0.

    What is sent before it asks a plugin only that variable (=1) can stop.
    """
    from axolotl.telemetry.manager import TelemetryManager

    if not os.environ.get("AXOLOTL_DO_NOT_TRACK"):
        TelemetryManager.get_instance().enabled = False


def seed_adapter(cfg: Any, plugin: str) -> None:
    """Set the seed of a recipe that lists the plugin: Axolotl draws an adapter's weights before its trainer does."""
    if is_listed(cfg, plugin) and cfg.seed is not None:
        from transformers import set_seed

        set_seed(cfg.seed)


def name_the_cpu(cfg: Any) -> None:
    """Call a CPU one: Axolotl puts a process's rank where a distributed run's device belongs, which no CPU has."""
    import torch

    if not torch.accelerator.is_available():
        cfg.device_map = {"": "cpu"}


def spreads(device_map: Any) -> bool:
    """Say whether a device map may put layers of one model on several devices: by a strategy, or by naming several."""
    if isinstance(device_map, Mapping):
        return len({str(device).rpartition(":")[2] for device in device_map.values()}) > 1  # 0 is also cuda:0
    return isinstance(device_map, str) and device_map.startswith(("auto", "balanced", "sequential"))


def leave_lora_kernels_off(cfg: Any) -> None:
    """Say false for each of Axolotl's LoRA kernels that a recipe leaves open: in 4 bits it turns them on by itself."""
    for kernel in ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel"):
        if cfg.get(kernel) is None:
            cfg[kernel] = False


def add_files(digest: Any, files: Iterable[Path]) -> None:
    """Add files to a digest of `hashlib`: each one's name, size in bytes, and content, a piece at a time."""
    for file in files:
        digest.update(f"{file.name}\n{file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)


def is_listed(cfg: Mapping[str, Any], plugin: str) -> bool:
    """Say whether the recipe lists a plugin, by either of its import paths (`FOLDER.Name`, `FOLDER.plugin.Name`)."""
    folder, _, name = plugin.rpartition(".")
    return bool({plugin, f"{folder}.plugin.{name}"} & set(cfg.get("plugins") or []))


def entries_of(cfg: Mapping[str, Any], dataset_type: str) -> list[Any]:
    """The recipe's dataset entries, for training and for evaluation, that have a type of ours."""
    entries = [*(cfg.get("datasets") or []), *(cfg.get("test_datasets") or [])]
    types = {dataset_type, f"{dataset_type}.load"}
    return [entry for entry in entries if isinstance(entry, Mapping) and entry.get("type") in types]


def fingerprint(entry: Mapping[str, Any], config: BaseModel, version: int) -> str:
    """Hash what decides the rows of a dataset entry and Axolotl does not look at.

    Args:
        entry: the dataset's entry; a path that is not on this machine is left to Axolotl (`revision:` pins it).
        config: the plugin's block of the recipe.
        version: of the method.

    Returns:
        A hexadecimal SHA-256 over the files' content, the block and the version of the method.
    """
    digest = hashlib.sha256(f"{version}\n{config.model_dump_json()}\n".encode())
    add_files(digest, _files(entry))
    return digest.hexdigest()


def _files(entry: Mapping[str, Any]) -> Iterator[Path]:
    data_files = entry.get("data_files") or []
    patterns = [data_files] if isinstance(data_files, str) else list(data_files)
    for name in (entry.get("path"), *patterns):
        for found in sorted(glob(str(name), recursive=True)) if name else []:
            path = Path(found)
            yield from [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
