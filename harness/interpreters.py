"""Another Python whose lm-eval asks the questions: what is installed there, found out before anything runs.

vLLM and SGLang pin a torch of their own, so they live in an environment of their own. Knows what such an environment
must have to stand in for this one. Leaves to others which stage uses it (`config`) and how (`asking`).
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from packaging.version import Version

from harness.errors import LoopError
from harness.files import below, digest

PATIENCE_S = 60  # what is asked takes a second, or ten from a slow disk; a program that is no Python may wait forever
TOO_NEW = {"vllm": "0.22"}  # engine → the release from which lm-eval 0.4.11 cannot import it
PROBE = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

def folder(name):
    found = find_spec(name)
    return next(iter(found.submodule_search_locations), "") if found else ""

versions = {}
for name in sys.argv[1:]:
    try:
        versions[name] = version(name)
    except PackageNotFoundError:
        pass
folders = [folder("thinkswitch_plugin"), folder("lm_eval") + "/tasks/thinkswitch"]
print(json.dumps({"python": sys.version.split()[0], "versions": versions, "folders": folders}))
"""


@dataclass(frozen=True)
class Interpreter:
    """A Python with the tools of one kind of stage.

    Attributes:
        path: of the program.
        python: its version.
        versions: of the tools it has, and digests of our own code, which is the same as here.
    """

    path: str
    python: str
    versions: Mapping[str, str]


def look(path: Path, where: str, tools: tuple[str, ...], own: Mapping[str, str]) -> Interpreter:
    """Ask a Python what it has.

    Args:
        path: of the program, or its name in PATH.
        where: the setting that names it, for what is said of it.
        tools: distributions whose versions decide what comes out.
        own: digests of our own code.

    Raises:
        LoopError: if it is no Python, or one that could not ask our tasks' questions.
    """
    program = str(path) if path.parent != Path() else shutil.which(str(path))
    instead = "name the bin/python of the environment that has the tool"
    if not program or not Path(program).is_file():
        raise LoopError(f"{where}: {path}: no such program; {instead}")
    pip = f"{shlex.quote(program)} -m pip install"
    command = [program, "-c", PROBE, *tools]
    try:
        said = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise LoopError(f"{where}: {program}: did not say in {PATIENCE_S} s what is installed; {instead}") from None
    except OSError as error:
        raise LoopError(f"{where}: {program}: cannot be started ({error.strerror}); {instead}") from None
    try:
        found = json.loads(said.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        why = "".join(said.stderr.splitlines()[-1:]) or f"exit code {said.returncode}"
        raise LoopError(f"{where}: {program}: does not work as a Python ({why})") from None
    versions = found["versions"]
    wanted = version("lm_eval")
    if versions.get("lm_eval") != wanted:  # the tasks' `!function ../dataset.…` is read by this one, and not by 0.4.13
        has = f"lm_eval {versions['lm_eval']}" if "lm_eval" in versions else "no lm_eval"
        raise LoopError(f"{where}: {program}: has {has}, and the tasks need {wanted}; {pip} lm_eval=={wanted}")
    if int(versions.get("transformers", "0").split(".")[0]) < 5:
        # It would read `rope_parameters` as transformers 5 writes them, find no `rope_theta` and take 10,000.
        raise LoopError(
            f"{where}: {program}: has transformers {versions.get('transformers')}, which misreads the rotary base of "
            f"the checkpoints written here; {pip} 'transformers>=5', and a release of the recipe's model that takes it"
        )
    for folder, ours in zip(found["folders"], _own_folders(), strict=True):
        if _content(folder) != _content(ours):
            state = "is another version" if Path(folder).is_dir() and folder else "is not installed"
            raise LoopError(
                f"{where}: {program}: thinkswitch {state} there, and the tasks need it; {pip} --no-deps with what was "
                "installed here"
            )
    return Interpreter(program, found["python"], {**versions, **own})


def check_model(model: str, where: str, versions: Mapping[str, str]) -> None:
    """See that the engine which a recipe names is installed where the recipe is to run.

    Raises:
        LoopError: if it is not.
    """
    if model not in versions:
        raise LoopError(
            f"{where} recipe: model: {model}: not installed in the environment it is to run in; make one with it and "
            f"lm_eval, and name its bin/python in loop.yml (python: {{{where}: …}})"
        )
    if (first := TOO_NEW.get(model)) and Version(versions[model]) >= Version(first):
        raise LoopError(
            f"{where} recipe: model: {model}: lm_eval {versions.get('lm_eval')} cannot import {model} "
            f"{versions[model]}; install '{model}<{first}' there"
        )


def _own_folders() -> list[str]:
    """Where this environment has what our tasks are made of."""
    plugin, harness = (find_spec(name) for name in ("thinkswitch_plugin", "lm_eval"))
    roots = [next(iter(spec.submodule_search_locations or [""])) if spec else "" for spec in (plugin, harness)]
    return [roots[0], f"{roots[1]}/tasks/thinkswitch"]


@cache
def _content(folder: str) -> frozenset[tuple[str, str]]:
    """Name and digest of every file below a folder that is no compiled one; nothing where there is no folder."""
    if not folder or not Path(folder).is_dir():
        return frozenset()
    files = [path for path in below(Path(folder)) if "__pycache__" not in path.parts]
    return frozenset((str(path.relative_to(folder)), digest(path)) for path in files)
