"""What lm-eval knows of the tasks a run names: their members, how they are scored, and a digest of what defines them.

    python -m harness.tasks [--include-path FOLDER] NAME …      prints JSON

Knows lm-eval's index of tasks and which files a task's YAML draws on. Asks lm-eval in a process of its own, as it takes
seconds to read all task files; the answer is kept beside the store for as long as none of those files changes.
"""

from __future__ import annotations

import argparse
import ast
import fnmatch
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from harness.errors import LoopError
from harness.files import digest, disk_errors, read_json, write_json

FUNCTION = re.compile(r"!function\s+([\w./-]+)\.\w+")
GRADES_ITSELF = "thinkswitch"  # the folder of lm-eval's that holds our tasks, whose graders know of traces


@dataclass(frozen=True)
class Task:
    """One lm-eval task whose questions are asked.

    Attributes:
        name: as lm-eval knows it.
        definition: digest of its YAML, what that includes, the Python it names and the data beside it.
        output_type: how lm-eval asks it, `generate_until` where a text is written.
        repeats: answers to each question.
        grades_traces: whether its own grader looks at what follows the trace.
        conversations: whether its rows are conversations to be answered, as training prompts are.
    """

    name: str
    definition: str
    output_type: str
    repeats: int
    grades_traces: bool
    conversations: bool


def find(names: Sequence[str], include_path: Path | None, cache: Path) -> dict[str, list[Task]]:
    """The tasks behind each name: a task, a group, a tag or a pattern such as `tah_*`.

    Args:
        names: as a person gave them.
        include_path: a folder with tasks of the user's.
        cache: a JSON file that keeps the answer.

    Raises:
        LoopError: if lm-eval knows none of a name, or cannot read its files.
    """
    asked = json.dumps([list(names), str(include_path), version("lm_eval")])
    kept = _kept(cache)
    answer = kept.get(asked, {})
    if not answer or answer["stamp"] != _stamp(answer["files"], include_path):
        answer = _ask(names, include_path)
        answer["stamp"] = _stamp(answer["files"], include_path)
        with disk_errors(cache):
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_json(cache, {**_kept(cache), asked: answer})
    unknown = [name for name in names if not answer["tasks"].get(name)]
    if unknown:
        raise LoopError(
            f"lm-eval knows no task {', '.join(unknown)}: see `lm_eval ls tasks`, "
            "or name your tasks' folder by --include-path"
        )
    return {name: [Task(**task) for task in answer["tasks"][name]] for name in names}


def _kept(cache: Path) -> dict[str, Any]:
    try:
        return read_json(cache) or {}
    except LoopError:
        return {}  # it only saves time


def _stamp(files: Sequence[str], include_path: Path | None) -> str:
    """Size and time of every file: if this is the same, so is the answer."""
    more = sorted(include_path.rglob("*.yaml")) if include_path else []
    seen = []
    for path in [*map(Path, files), *more]:
        stat = path.stat() if path.is_file() else None
        seen.append((str(path), stat and (stat.st_size, stat.st_mtime_ns)))
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def _ask(names: Sequence[str], include_path: Path | None) -> dict[str, Any]:
    """Ask lm-eval, in a process of its own."""
    where = ["--include-path", str(include_path)] if include_path else []
    command = [sys.executable, "-m", "harness.tasks", *where, "--", *names]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    if said.returncode:
        lines = [line for line in said.stderr.splitlines() if line.strip()] or ["no reason given"]
        raise LoopError(f"lm-eval could not read its task files: {lines[-1]}\ncheck --include-path {include_path}")
    answer: dict[str, Any] = json.loads(said.stdout.splitlines()[-1])
    return answer


# --- in the process that has lm-eval ---


def described(names: Sequence[str], include_path: str | None) -> dict[str, Any]:
    """What lm-eval's index says of names: `{"tasks": {name: [Task as JSON]}, "files": [paths]}`."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path)
    roots = [Path(folder).resolve() for folder in (include_path, _own_folder()) if folder]
    tasks: dict[str, list[dict[str, Any]]] = {}
    used: set[str] = set()
    for name in names:
        leaves = list(dict.fromkeys(leaf for known in manager.match_tasks([name]) for leaf in members(manager, known)))
        tasks[name] = []
        for leaf, overrides in leaves:
            path = Path(manager.task_index[leaf]["yaml_path"])
            files = sorted(drawn_on(path, roots))
            used.update(map(str, files))
            text = "".join(f"{file.name}\0{digest(file)}\n" for file in files) + overrides
            tasks[name].append(asdict(_task(leaf, path, hashlib.sha256(text.encode()).hexdigest())))
    return {"tasks": tasks, "files": sorted(used)}


def members(manager: Any, name: str) -> Iterator[tuple[str, str]]:
    """The tasks behind a name of lm-eval's index, each with what its group says of it.

    Raises:
        SystemExit: for a member that has no name of its own, whose samples nobody could find.
    """
    entry = manager.task_index[name]
    if entry["type"] in ("task", "python_task"):
        yield name, ""
    elif entry["type"] == "tag":
        for member in entry["task"]:
            yield from members(manager, member)
    else:
        for member in yaml_of(Path(entry["yaml_path"])).get("task", []):
            inner = member.get("task") if isinstance(member, dict) else member
            if not isinstance(inner, str) or inner not in manager.task_index:
                raise SystemExit(f"{name}: its member {inner} is no task of its own; name its tasks instead")
            more = json.dumps(member, sort_keys=True, default=str) if isinstance(member, dict) else ""
            yield from ((leaf, overrides + more) for leaf, overrides in members(manager, inner))


def _task(name: str, path: Path, definition: str) -> Task:
    from lm_eval import utils

    config = utils.load_yaml_config(str(path), mode="simple")
    return Task(
        name=name,
        definition=definition,
        output_type=str(config.get("output_type", "generate_until")),
        repeats=int(config.get("repeats", 1) or 1),
        grades_traces=(_own_folder() / GRADES_ITSELF) in path.resolve().parents,
        conversations="messages" in str(config.get("doc_to_text", "")),
    )


def _own_folder() -> Path:
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).resolve().parent


class _Loader(yaml.SafeLoader):
    """YAML whose `!function` tags are names, and name the files they lie in."""


_Loader.add_constructor("!function", lambda loader, node: f"!function {node.value}")


def yaml_of(path: Path) -> dict[str, Any]:
    """A task's YAML as it is written, functions unread."""
    found = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    return found if isinstance(found, dict) else {}


def drawn_on(path: Path, roots: Sequence[Path]) -> set[Path]:
    """Every file that decides what a task asks and how it is graded.

    Args:
        path: its YAML.
        roots: folders that names in it may be relative to, beside its own.

    Returns:
        The YAML and those it includes, the Python they name with what that imports from beside it, and the data files
        they name.
    """
    found: set[Path] = set()
    todo = [path.resolve()]
    while todo:
        file = todo.pop()
        if file in found or not file.is_file():
            continue
        found.add(file)
        if file.suffix == ".py":
            todo += _imported(file)
            continue
        if file.suffix not in ("", ".yaml", ".yml") and not file.name.endswith("_yaml"):
            continue
        try:
            values = list(_strings(yaml_of(file)))
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
            continue  # data, or lm-eval's to complain of
        inside = [root for root in roots if root in file.parents]
        below = [folder for root in inside for folder in file.parents if folder == root or root in folder.parents]
        for value in values:
            if module := FUNCTION.fullmatch(value):
                todo.append((file.parent / f"{module[1]}.py").resolve())
            elif 0 < len(value) < 512 and "\n" not in value:
                todo += [(folder / value).resolve() for folder in dict.fromkeys([file.parent, *below])]
    return found


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _imported(file: Path) -> list[Path]:
    """The modules that a task's Python imports from beside it, or names as a file."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return []
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and fnmatch.fnmatch(node.value, "*.??*"):
            names += [node.value]
    folders = (file.parent, file.parent.parent)
    texts = [name for name in names if len(name) < 256 and "\0" not in name and "\n" not in name]
    candidates = [folder / f"{name.replace('.', '/')}.py" for folder in folders for name in texts]
    candidates += [folder / name for folder in folders for name in texts if "." in name]
    return [path.resolve() for path in candidates if path.is_file()]


def main() -> None:
    """The command: see the module."""
    parser = argparse.ArgumentParser(description="What lm-eval knows of tasks, as JSON.")
    parser.add_argument("--include-path", help="a folder with tasks of your own")
    parser.add_argument("names", nargs="+", help="tasks, groups, tags or patterns")
    options = parser.parse_args()
    print(json.dumps(described(options.names, options.include_path)))


if __name__ == "__main__":
    main()
