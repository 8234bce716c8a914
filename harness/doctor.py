"""Whether this machine can do what a run asks: what is here is looked at, and the tools are tried.

The trial is a loop on the embedded pair with two prompts and two questions, by recipes for the device at hand: a real
QLoRA training, a merge, a slerp and scores, in a folder that goes again. Knows what can be wrong with a machine; what
can be wrong with a run is `loop.prepare`'s to say.
"""

from __future__ import annotations

import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil

from harness import card, loop, own
from harness.config import LoopConfig, load, read_recipes, read_yaml, recipes_folder
from harness.errors import LoopError
from harness.files import free_disk
from harness.runner import has_accelerator, opened_gpus
from harness.stages import Recipe
from harness.view import View

State = Literal["ok", "warning", "failing"]
ROOM = 10e9  # bytes of disk and of memory under which a run of any use gets tight
SMALL_GB = 8.0  # a GPU of which nobody knows how large it is
SLOW_S = 20.0  # for one stage of the trial
SKEW_S = 300.0  # between this clock and the hub's
PATIENCE_S = 5.0  # for the hub to answer
STACK = ("transformers", "peft", "trl", "bitsandbytes", "lm_eval", "datasets")  # what the tools above stand on
REPORT = "please report this: ts-loop doctor --json"
URLS, QUOTED = re.compile(r"\w+://[^\s,;'\"()]+"), re.compile(r"'[^']*'|\"[^\"]*\"")
PATHS = re.compile(r"[^\s:,;()]*/[^\s:,;()]+")


class Finding(NamedTuple):
    """One thing that was looked at.

    Attributes:
        what: it is.
        state: of it.
        said: what was found.
        mend: what to do, where it is not ok.
    """

    what: str
    state: State
    said: str
    mend: str = ""


def look(config: Path | None, out: Path, view: View) -> Iterator[Finding]:
    """Everything, in the order in which it is best mended.

    Args:
        config: a loop.yml that is to be run here, too; None for none.
        out: where its runs go.
        view: is told how the trial goes.
    """
    sections: dict[str, Callable[[], Iterable[Finding]]] = {
        "packages": packages,
        "device": device,
        "memory": lambda: [memory()],
        "hub": hub,
        **({"loop.yml": lambda: asked(config, out, view)} if config else {"disk": lambda: [disk(out)]}),
        "tools": lambda: trial(view),
    }
    for name, section in sections.items():
        try:
            yield from section()
        except Exception as error:  # what cannot even be looked at is a finding
            yield Finding(name, "failing", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", REPORT)


def packages() -> Iterator[Finding]:
    """Python, and what thinkswitch asks for at the versions it asks for."""
    from packaging.requirements import Requirement

    python = platform.python_version()
    fits = (3, 10) <= tuple(map(int, python.split(".")[:2])) <= (3, 12)
    yield Finding("python", "ok" if fits else "failing", python, "" if fits else "install Python 3.10 to 3.12")
    try:
        wanted = [Requirement(line) for line in requires("thinkswitch") or []]
    except PackageNotFoundError:
        yield Finding("thinkswitch", "failing", "not installed", "pip install -c constraints.txt .")
        return
    found = []
    for one in (one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})):
        try:
            has = version(one.name)
        except PackageNotFoundError:
            has = ""
        if not has or not one.specifier.contains(has, prereleases=True):
            yield Finding(one.name, "failing", has or "not installed", f"pip install '{one.name}{one.specifier}'")
        found.append(f"{one.name} {has}")
    for name in STACK:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            yield Finding(name, "failing", "not installed", "pip install -c constraints.txt .")
    yield Finding("thinkswitch", "ok", f"{version('thinkswitch')} with {', '.join(found)}")


def device() -> Iterator[Finding]:
    """The accelerator, its driver, and whether torch was built for it."""
    built = version("torch")
    if broken := driver_says():
        yield Finding("device", "failing", broken, "nvidia-smi says the same: the driver, or the machine, started anew")
        return
    try:
        at_hand = card.at_hand()
    except LoopError as error:
        yield Finding("device", "warning", str(error), "its memory is not watched; say --vram where it is asked for")
        return
    if not at_hand.gpu:
        yield Finding("device", "ok", f"{at_hand.name}, torch {built}")
        return
    if built.endswith("+cpu"):
        mend = "install the CUDA build of this torch, as pytorch.org says"
        yield Finding("device", "failing", f"{at_hand.name}, and torch {built} cannot use it", mend)
        return
    import pynvml
    import torch

    driver, cuda = pynvml.nvmlSystemGetDriverVersion(), int(pynvml.nvmlSystemGetCudaDriverVersion())
    knows, needs = (cuda // 1000, cuda % 1000 // 10), tuple(map(int, (torch.version.cuda or "0.0").split(".")))
    said = f"{at_hand.name}, {at_hand.memory / 1e9:.1f} GB, driver {driver} (CUDA {knows[0]}.{knows[1]}), torch {built}"
    state: State = "failing" if knows[0] < needs[0] else "warning" if knows < needs else "ok"
    yield Finding("device", state, said, "" if state == "ok" else f"a driver for CUDA {torch.version.cuda}")
    if not at_hand.bf16:
        yield Finding("bfloat16", "warning", "this GPU does not compute in it", "ts-loop init writes float16 recipes")


def driver_says() -> str:
    """What is wrong with NVIDIA's driver; empty where it answers, or where there is none and no GPU of theirs."""
    import pynvml

    try:
        opened_gpus()
    except pynvml.NVMLError as error:
        absent = isinstance(error, pynvml.NVMLError_LibraryNotFound | pynvml.NVMLError_DriverNotLoaded)
        if not absent or list(Path("/dev").glob("nvidia[0-9]*")):
            return f"NVIDIA's driver does not answer: {error}"
    return ""


def memory() -> Finding:
    """Main memory."""
    found = psutil.virtual_memory()
    said = f"{found.available / 1e9:.1f} of {found.total / 1e9:.1f} GB free"
    short = found.available < ROOM
    return Finding("memory", "warning" if short else "ok", said, "a merge holds a checkpoint in it" if short else "")


def disk(out: Path, needed: float = ROOM) -> Finding:
    """Room where runs go."""
    _, free = free_disk(out)
    said = f"{free / 1e9:.1f} GB free where runs go"
    return Finding(
        "disk", "ok" if free >= needed else "warning", said, "" if free >= needed else "another disk by --out"
    )


def hub() -> Iterator[Finding]:
    """Whether checkpoints can be fetched, and whether the clock is right: a wrong one breaks TLS and signed links."""
    import requests
    from huggingface_hub import constants, get_token

    token = "with a token" if get_token() else "without a token: what is gated is refused"
    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", "ok", "HF_HUB_OFFLINE: local folders and what was fetched before")
        return
    try:
        reply = requests.head(constants.ENDPOINT, timeout=PATIENCE_S)
    except requests.RequestException as error:
        mend = "local folders need none; else the network, or HF_ENDPOINT for a mirror"
        yield Finding("hub", "warning", f"no answer ({type(error).__name__})", mend)
        return
    yield Finding("hub", "ok", f"answers, {token}")
    try:
        skew = abs((datetime.now(timezone.utc) - parsedate_to_datetime(reply.headers["Date"])).total_seconds())
    except (KeyError, TypeError, ValueError):
        return
    late = skew > SKEW_S
    yield Finding("clock", "warning" if late else "ok", f"{skew:.0f} s from the hub's", "set it" if late else "")


def asked(file: Path, out: Path, view: View) -> Iterator[Finding]:
    """A run that is to go here: whether it is refused, and whether what it writes has room."""
    try:
        config = load(file, {})
        recipes = read_recipes(config)
        run = loop.prepare(config, recipes, out, view)
        todo = loop.pending(run)
        loop.check_machine(run, todo)
        loop.check_recipes([(run, stage) for stage in todo.values()])
        yield Finding("loop.yml", "ok", f"{len(run.steps)} stages, {len(todo)} of them to be run")
        yield disk(out, 0)
    except LoopError as error:
        first, _, mend = str(error).partition("\n")
        yield Finding("loop.yml", "failing", first, mend)


def trial(view: View) -> Iterator[Finding]:
    """The tools, tried: a finding a stage, and of one that failed what it said."""
    with tempfile.TemporaryDirectory(prefix="ts-loop-doctor-") as name:
        try:
            config, recipes = small(Path(name))
            run = loop.prepare(config, recipes, Path(name) / "runs", view)
            loop.go(run, view, told=False)
        except LoopError as error:
            yield Finding("tools", "failing", str(error).partition("\n")[0], "mend what is failing above first")
            return
        finally:
            view.close()
        seconds: dict[str, list[float]] = {}
        for step in run.steps:
            if record := run.record(step):
                seconds.setdefault(step.stage.kind.name, []).append(record["wall_s"])
        for kind, took in seconds.items():
            slow = max(took) > SLOW_S
            mend = "the first run on a machine is slower; else a busy or throttled device" if slow else ""
            yield Finding(kind, "warning" if slow else "ok", f"works, in {max(took):.1f} s at most", mend)


def at_hand() -> card.Card:
    """The device here; one that does not tell its memory is taken for a small one."""
    try:
        return card.at_hand()
    except LoopError:
        return card.of_size(SMALL_GB)


def small(folder: Path) -> tuple[LoopConfig, dict[str, Recipe]]:
    """The embedded pair's loop for the device at hand, two prompts and questions; `folder` is for its files."""
    shipped = recipes_folder()
    file, more = shipped / "loop.yml", {}
    if has_accelerator():
        instruct, thinking = (str(shipped / "mini" / role) for role in ("instruct", "thinking"))
        wanted = own.Wanted(str(folder), instruct, thinking, prompts=["mini_math_prompts"], tasks=["mini_math"])
        for name, text in own.prepared(wanted, at_hand()).texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        file = folder / "loop.yml"
    else:
        more = {"prompts": ["mini_math_prompts"], "tasks": ["mini_math"]}
    config = load(file, {"name": "trial", "iterations": 1, "limit": 2, **more}, ("jobs=1", "report_to=[]"))
    return config, read_recipes(config)


def scrubbed(text: str, names: Iterable[str] = ()) -> str:
    """A text without paths, the user's name, or `names` of theirs: for a report that others read."""
    for name in sorted({*names, Path.home().name, os.environ.get("USER", ""), platform.node()}, key=len, reverse=True):
        if len(name) > 2:
            text = text.replace(name, "…")
    return PATHS.sub("PATH", QUOTED.sub("…", URLS.sub("URL", text)))


def names_of(file: Path | None) -> list[str]:
    """Every text that a loop.yml and its recipes hold."""
    found: list[str] = []

    def walk(value: Any) -> None:
        if isinstance(value, dict | list):
            for inner in value.values() if isinstance(value, dict) else value:
                walk(inner)
        elif isinstance(value, str):
            found.append(value)

    if file:
        with suppress(LoopError):
            written = read_yaml(file)
            walk(written)
            for name in (written.get("recipes") or {}).values():
                walk(read_yaml(file.parent / str(name)))
    return found


def stamp() -> str:
    """When it was looked, to the minute."""
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime()) + " UTC"
