"""What a recipe asks of trace stripping, and a fingerprint of all that decides the outcome.

Knows: the names a recipe uses, and which files a dataset entry reads. Leaves to others: Axolotl's hooks (`plugin`) and
what the block's keys mean (`args`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from glob import glob
from pathlib import Path
from typing import Any

from thinkswitch_plugin.trace_stripping.args import TraceStrippingConfig

DATASET_TYPE = "thinkswitch_plugin.trace_stripping"
PLUGIN = f"{DATASET_TYPE}.TraceStrippingPlugin"

# Part of every fingerprint: raise it when the same rows come out differently, so that no prepared set outlives that.
OUTCOME_VERSION = 1


def is_listed(cfg: Mapping[str, Any]) -> bool:
    """Say whether the recipe lists the plugin, by either of its import paths."""
    return bool({PLUGIN, f"{DATASET_TYPE}.plugin.TraceStrippingPlugin"} & set(cfg.get("plugins") or []))


def stripped_entries(cfg: Mapping[str, Any]) -> list[Any]:
    """The recipe's dataset entries, for training and for evaluation, that have our type."""
    entries = [*(cfg.get("datasets") or []), *(cfg.get("test_datasets") or [])]
    types = {DATASET_TYPE, f"{DATASET_TYPE}.load"}
    return [entry for entry in entries if isinstance(entry, Mapping) and entry.get("type") in types]


def fingerprint(entry: Mapping[str, Any], config: TraceStrippingConfig) -> str:
    """Hash what decides the stripped rows of a dataset entry and Axolotl does not look at.

    Args:
        entry: the dataset's entry; a path that is not on this machine is left to Axolotl (`revision:` pins it).
        config: the recipe's `trace_stripping:` block.

    Returns:
        A hexadecimal SHA-256 over the files' content, the block and the version of the method.
    """
    digest = hashlib.sha256(f"{OUTCOME_VERSION}\n{config.model_dump_json()}\n".encode())
    for file in _files(entry):
        digest.update(f"{file.name}\n{file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _files(entry: Mapping[str, Any]) -> Iterator[Path]:
    data_files = entry.get("data_files") or []
    patterns = [data_files] if isinstance(data_files, str) else list(data_files)
    for name in (entry.get("path"), *patterns):
        for found in sorted(glob(str(name), recursive=True)) if name else []:
            path = Path(found)
            yield from [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
