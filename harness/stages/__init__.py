"""What a stage is: native commands on recipes, what they read, and the key that names it all.

A stage is built before it is known where anything lies: in its recipes and commands `<<stage>>` stands for its own
folder and `<<NAME>>` for its input of that name. So the same work reads the same wherever it is done, and **a stage's
key is the hash of everything it reads**: kind, recipes, commands, the inputs' identities, the versions of the tools
that run it, the definitions of the tasks it asks. An input that another stage leaves is identified by that stage's key:
all keys are known before anything runs (as derivations in Nix).

The modules of this package are the kinds of stage, one each; none imports another.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

Recipe = dict[str, Any]
Facts = dict[str, Any]

OWN = "<<stage>>"
RECIPE = "recipe.yml"  # the recipe's name in a stage's folder
STAND_IN = re.compile(r"<<(\w+)>>")
KEY_HEX = 20  # of SHA-256: 80 bits, of which no two works of one store share all


def slot(name: str) -> str:
    """What stands for an input in recipes and commands."""
    return f"<<{name}>>"


@dataclass(frozen=True)
class External:
    """Something that was there before the run: a checkpoint, a file.

    Attributes:
        path: where the tools find it.
        identity: what it is, wherever it lies.
    """

    path: str
    identity: str


@dataclass(frozen=True, eq=False)
class Output:
    """Something that another stage leaves, inside its folder."""

    stage: Stage
    path: str


Source = External | Output


def _nothing(folder: Path, stage: Stage, tokenizer: Path | None = None) -> Facts:
    return {}


def _no_note(facts: Facts) -> str:
    return ""


def _no_start(folder: Path) -> list[Path]:
    return []


def _no_outcomes(folder: Path, stage: Stage, tokenizer: Path | None) -> list[Any]:
    return []


@dataclass(frozen=True)
class Kind:
    """What all stages of a kind share; each module of this package makes one.

    Attributes:
        name: of the kind, and of the beginning of its keys.
        title: what it does, said to a person.
        tools: distributions whose versions decide what comes out.
        phases: what a tool's own progress bar calls it → what it counts, said to a person; the first that fits.
        read: what is kept in the record of what it left, tokens counted with a checkpoint's tokenizer; raises
            `StageError` where the loop cannot go on with that. `per_task` of it, by task, goes into the rows of
            `results.json`.
        note: the one line of those facts.
        outcomes: one `outcomes.Outcome` a question that it asked, tokens counted with a checkpoint's tokenizer.
        checkpoint: the folder inside it that holds a whole checkpoint, which can be made again from the rest.
        limited_as: the kind whose limit of time it has, if that is another's.
        resumes: what a try that was stopped left whole in the stage's folder, from which the next one goes on.
    """

    name: str
    title: str
    tools: tuple[str, ...]
    phases: Mapping[str, str] = field(default_factory=dict)
    read: Callable[[Path, Stage, Path | None], Facts] = _nothing
    note: Callable[[Facts], str] = _no_note
    outcomes: Callable[[Path, Stage, Path | None], list[Any]] = _no_outcomes
    checkpoint: str | None = None
    resumes: Callable[[Path], list[Path]] = _no_start
    limited_as: str = ""


@dataclass(frozen=True, eq=False)
class Stage:
    """One piece of work.

    Attributes:
        kind: what it has in common with its like.
        recipes: file name inside its folder → what the recipe says.
        commands: what a person would type, one after the other.
        inputs: name → what it reads; `<<NAME>>` stands for its path.
        files: file name inside its folder → text that a recipe refers to.
        tasks: lm-eval task → the digest of its definition.
        renames: inside the folder, once the commands are done: from, to.
        scratch: inside the folder, removed once the commands are done.
        device: whether it wants an accelerator where there is one.
        wide: whether it takes all devices at once.
        whole_cpu: whether it takes all cores where it does not run on an accelerator.
        versions: of the tools, where its commands run in another environment than this one.
        reports: what its `RECIPE` says besides of where the tool reports to, which changes nothing that comes out.
    """

    kind: Kind
    recipes: Mapping[str, Recipe]
    commands: tuple[tuple[str, ...], ...]
    inputs: Mapping[str, Source]
    files: Mapping[str, str] = field(default_factory=dict)
    tasks: Mapping[str, str] = field(default_factory=dict)
    renames: tuple[tuple[str, str], ...] = ()
    scratch: tuple[str, ...] = ()
    device: Literal["gpu", "cpu"] = "gpu"
    wide: bool = False
    whole_cpu: bool = False
    versions: Mapping[str, str] | None = None
    reports: Mapping[str, Any] = field(default_factory=dict)

    def needs(self) -> list[Stage]:
        """The stages whose outputs it reads."""
        return [source.stage for source in self.inputs.values() if isinstance(source, Output)]


class Keys:
    """The key of each stage, and what went into it."""

    def __init__(self, versions: Mapping[str, str]):
        """`versions`: distribution → version, for every tool that a kind names."""
        self.versions = versions
        self._keys: dict[int, str] = {}
        self._kept: list[Stage] = []  # a key is found by the stage's id, which only a living stage owns

    def __getitem__(self, stage: Stage) -> str:
        """KIND-HASH."""
        if id(stage) not in self._keys:
            self._keys[id(stage)] = f"{stage.kind.name}-{hashed(self.material(stage))[:KEY_HEX]}"
            self._kept.append(stage)
        return self._keys[id(stage)]

    def material(self, stage: Stage) -> dict[str, Any]:
        """Everything that a stage reads, as plain data: what its key is the hash of."""
        versions = self.versions if stage.versions is None else stage.versions
        return {
            "kind": stage.kind.name,
            "recipes": dict(stage.recipes),
            "commands": [list(command) for command in stage.commands],
            "inputs": {name: self._identity(source) for name, source in stage.inputs.items()},
            "files": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in stage.files.items()},
            "tasks": dict(stage.tasks),
            "tools": {name: versions[name] for name in stage.kind.tools if name in versions},
        }

    def _identity(self, source: Source) -> str:
        return source.identity if isinstance(source, External) else f"{self[source.stage]}/{source.path}"


def hashed(value: Any) -> str:
    """SHA-256 of plain data, whatever the order of its mappings: the same for the same."""
    said = json.dumps(_sortable(value), sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(said.encode()).hexdigest()


def _sortable(value: Any) -> Any:
    """Plain data whose mappings have texts for keys: YAML's may be numbers, too (`max_memory: {0: 20GiB, cpu: …}`)."""
    if isinstance(value, dict):
        return {key if isinstance(key, str) else json.dumps(key, default=str): _sortable(v) for key, v in value.items()}
    return [_sortable(inner) for inner in value] if isinstance(value, list | tuple) else value


def placed(value: Any, paths: Mapping[str, str]) -> Any:
    """A recipe, command or text with the stand-ins replaced by paths, by name (`stage` is the stage's own folder)."""
    if isinstance(value, str):
        return STAND_IN.sub(lambda found: paths.get(found[1], found[0]), value)
    if isinstance(value, dict):
        return {key: placed(inner, paths) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [placed(inner, paths) for inner in value]
    return value


def dump(recipe: Recipe) -> str:
    """A recipe as YAML, keys in the order the author wrote them."""
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=120)


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """What differs between two recipes, a line each: "learning_rate 0.002 → 0.001"."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in dict.fromkeys([*old, *new]):
            inner = f"{name}.{key}" if name else str(key)
            lines += differences(old.get(key), new.get(key), inner)
        return lines
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for i, pair in enumerate(zip(old, new, strict=True)) for line in differences(*pair, f"{name}.{i}")]
    # As keys see them: 1, 1.0 and true are three.
    return [] if (type(old), old) == (type(new), new) else [f"{name} {short(old)} → {short(new)}"]


def short(value: Any) -> str:
    """A value as a line can bear it."""
    text = "nothing" if value is None else json.dumps(value, default=str, ensure_ascii=False)
    return text.strip('"') if len(text) <= 60 else text[:57] + "..."
