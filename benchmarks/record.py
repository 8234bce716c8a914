"""What a benchmark leaves: one JSON of its figures, with all that is needed to judge them and to have them again.

    python benchmarks/NAME.py … --record            writes docs/results/NAME.json, which `make results` renders
    python benchmarks/NAME.py … --record FILE       writes another file; without --record, none

Knows versions, the commit and the machine. Leaves what the figures mean to the benchmark and to `results.py`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs/results"
TOOLS = ("torch", "transformers", "trl", "peft", "liger-kernel", "bitsandbytes", "axolotl", "lm_eval", "mergekit")
LIST = re.compile(r"\[[^][{}]*\]")  # of plain values: one line of the file
DIGITS = 6  # significant, of a figure: more than a machine repeats


class Recorder:
    """Begun with the work, so that it knows how long that took."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        """Adds `--record` to a benchmark's options."""
        parser.add_argument(
            "--record", nargs="?", type=Path, const=Path(), metavar="FILE", help="keep the figures in docs/results/"
        )
        self.begun, self.load, self.commit = time.time(), os.getloadavg()[0], commit()

    def keep(self, asked: argparse.Namespace, name: str, figures: dict[str, Any], **versions: Any) -> None:
        """Print the figures as a line of JSON, and keep them if that was asked for.

        Args:
            asked: the options as they were read.
            name: of docs/results/NAME.json.
            figures: plain data; every round's, not only their median.
            versions: of what was measured beside it, if it is none of `TOOLS`.
        """
        figures = plain(figures)
        print(json.dumps(figures))
        if asked.record is None:
            return
        file = FOLDER / f"{name}.json" if asked.record == Path() else asked.record
        facts = {
            "command": command(),
            **self.commit,
            "date": datetime.datetime.fromtimestamp(self.begun, datetime.timezone.utc).date().isoformat(),
            "seconds": round(time.time() - self.begun),
            "machine": {**machine(), "load": round(self.load, 1)},
            "versions": {"python": platform.python_version(), **tools(), **versions},
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**facts, "figures": figures}, indent=1, ensure_ascii=False)
        file.write_text(LIST.sub(lambda found: " ".join(found[0].split()), text) + "\n", encoding="utf-8")


def plain(value: Any) -> Any:
    """JSON's own types, numbers of a few significant digits; what is no number is null."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if abs(value) < float("inf") else None
    return value


def command() -> str:
    """What was typed, without where this machine keeps things: of a path from the root only the name is left."""
    words = shown(sys.argv[1:])
    threads = [f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}"] if "OMP_NUM_THREADS" in os.environ else []
    script = Path(sys.argv[0]).resolve().relative_to(ROOT)
    return " ".join([*threads, "python", str(script), *words])


def shown(words: Iterable[str]) -> list[str]:
    """Words of a command; of a path from the root, only its name."""
    return [f"…/{Path(word).name}" if word.startswith("/") else word for word in words]


def commit(folder: Path = ROOT) -> dict[str, Any]:
    """`commit` of a checkout, null without git, and whether anything but the docs was changed since."""
    said = git(folder, "rev-parse", "HEAD")
    changed = git(folder, "status", "--porcelain", "-uno", "--", ".", ":!docs", ":!README.md")
    return {"commit": said, "dirty": bool(changed)}


def git(folder: Path, *words: str) -> str | None:
    """What git says, None if it cannot."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def machine() -> dict[str, Any]:
    """Processor, cores, GiB of memory and the accelerator: no name, no path."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    memory = round(psutil.virtual_memory().total / 2**30)
    return {"cpu": processor(), "cores": os.cpu_count(), "memory_gib": memory, "gpu": gpu}


def processor() -> str:
    """The model's name, as Linux has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def tools() -> dict[str, str]:
    """The versions of what is installed of `TOOLS`."""
    found = {}
    for name in TOOLS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
