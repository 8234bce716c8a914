"""What lm-eval knows of the tasks a run names: their members, how they are scored, and a digest of what defines them.

    python -m harness.tasks [--include-path FOLDER] NAME …      prints JSON

Knows lm-eval's index of tasks and which files a task's YAML draws on. Asks lm-eval in a process of its own, as it takes
seconds to read all task files; the answer is kept beside the store for as long as none of those files changes.
"""

from __future__ import annotations

import argparse
import ast
import glob
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from harness.errors import LoopError
from harness.files import below, digest, disk_errors, read_json_or_none, write_json

FILE_NAME = re.compile(r"[^\0\n]{1,200}\.[^\0\n]{2,40}")
FUNCTION = re.compile(r"!function\s+([\w./-]+)\.\w+")
OURS = "thinkswitch"  # the folder of lm-eval's that holds our tasks, whose graders know of traces
GROUP_KEYS = {"group", "group_alias", "task", "task_alias", "aggregate_metric_list", "metadata"}  # change no question
EXAMPLE = """\
printed is {"tasks": {NAME: [tasks]}, "files": [what defines them]}; a name that lm-eval does not know has no tasks

for example:
  python -m harness.tasks mini_math thinkswitch 'tah_*'
  python -m harness.tasks --include-path my_tasks my_sums
"""


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
        do_sample: whether it says itself that answers are sampled; None where it leaves that open.
        temperature: what it says of that; 0 where nothing.
    """

    name: str
    definition: str
    output_type: str
    repeats: int
    grades_traces: bool
    conversations: bool
    do_sample: bool | None = None
    temperature: float = 0.0


def find(names: Sequence[str], include_path: Path | None, cache: Path) -> dict[str, list[Task]]:
    """The tasks behind each name: a task, a group, a tag or a pattern such as `tah_*`.

    Args:
        names: as a person gave them.
        include_path: a folder with tasks of the user's.
        cache: a JSON file that keeps the answer.

    Raises:
        LoopError: if lm-eval knows none of a name, or cannot read its files.
    """
    here = str(Path.cwd())  # data files may be named from there
    asked = json.dumps([list(names), str(include_path), here, version("lm_eval"), [f.name for f in fields(Task)]])
    answer = _kept(cache).get(asked)
    if not answer or answer["stamp"] != _stamp(answer["files"], include_path):
        answer = _ask(names, include_path)
        if unknown := [name for name in names if not answer["tasks"][name]]:
            raise LoopError(
                f"lm-eval knows no task {', '.join(unknown)}: see `lm_eval ls tasks`, "
                "or name your tasks' folder by --include-path"
            )
        answer["stamp"] = _stamp(answer["files"], include_path)
        with disk_errors(cache):
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_json(cache, {**_kept(cache), asked: answer})
    return {name: [Task(**task) for task in answer["tasks"][name]] for name in names}


def _kept(cache: Path) -> dict[str, Any]:
    kept = read_json_or_none(cache)  # it only saves time
    return kept if isinstance(kept, dict) else {}


def _stamp(files: Sequence[str], include_path: Path | None) -> str:
    """Size and time of every file, and of each YAML where new ones may turn up: the same stamp, the same answer."""
    package = find_spec("lm_eval")  # which imports nothing
    found = package.submodule_search_locations if package else None
    folders = [Path(folder) / "tasks" / OURS for folder in found or []] + ([include_path] if include_path else [])
    yamls = sorted(path for folder in folders for path in folder.rglob("*.yaml"))
    seen = []
    for path in [*map(Path, files), *yamls]:
        stat = path.stat() if path.exists() else None
        seen.append((str(path), stat and (stat.st_size, stat.st_mtime_ns)))
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def _ask(names: Sequence[str], include_path: Path | None) -> dict[str, Any]:
    """Ask lm-eval, in a process of its own."""
    where = ["--include-path", str(include_path)] if include_path else []
    command = [sys.executable, "-m", "harness.tasks", *where, "--", *names]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    if said.returncode:
        last = [line for line in said.stderr.splitlines() if line.strip()][-1:]
        refused = said.returncode == LoopError.code
        raise LoopError("".join(last) if refused else f"lm-eval could not read its tasks: {' '.join(last)}")
    answer: dict[str, Any] = json.loads(said.stdout.splitlines()[-1])
    return answer


# --- in the process that has lm-eval ---


def described(names: Sequence[str], include_path: str | None) -> dict[str, Any]:
    """What lm-eval's index says of names: `{"tasks": {name: [Task as JSON]}, "files": [paths]}`.

    Raises:
        LoopError: if a file below `include_path` is no task's, or a name stands for what cannot be asked by itself.
    """
    from lm_eval.tasks import TaskManager

    if include_path:
        check_yamls(Path(include_path))
    manager = TaskManager(include_path=include_path)
    roots = [Path(folder).resolve() for folder in (include_path, _own_folder()) if folder]
    tasks: dict[str, list[dict[str, Any]]] = {}
    used: set[str] = set()
    for name in names:
        leaves = dict.fromkeys(leaf for known in manager.match_tasks([name]) for leaf in members(manager, known))
        tasks[name] = []
        for leaf in leaves:
            path = Path(manager.task_index[leaf]["yaml_path"])
            files = drawn_on(path, roots)
            used.update(map(str, files))
            text = "".join(sorted(f"{file.name}\0{digest(file)}\n" for file in files if file.is_file()))
            tasks[name].append(asdict(_task(leaf, path, hashlib.sha256(text.encode()).hexdigest())))
    return {"tasks": tasks, "files": sorted(used)}


def check_yamls(folder: Path) -> None:
    """Read every YAML below a folder as lm-eval will, which dies of one it cannot read and does not say which.

    Raises:
        LoopError: naming the first that is no task's or group's.
    """
    from lm_eval import utils

    for path in sorted(folder.rglob("*.yaml")):
        try:
            utils.load_yaml_config(str(path), mode="simple")
        except Exception as error:  # it may include whatever there is
            why = "it is no mapping" if isinstance(error, TypeError) else " ".join(str(error).split())
            raise LoopError(
                f"{path}: lm-eval cannot read it ({why}); mend it, or move it out of --include-path"
            ) from None


def members(manager: Any, name: str) -> Iterator[str]:
    """The tasks behind a name of lm-eval's index.

    Raises:
        LoopError: for one that has no name of its own, whose samples nobody could find, or that its group changes.
    """
    from lm_eval import utils

    entry = manager.task_index[name]
    if entry["type"] == "python_task":
        raise LoopError(f"task {name} is a Python class, which does not tell what it asks; name one that YAML defines")
    if entry["type"] == "task":
        yield name
    elif entry["type"] == "tag":
        for member in entry["task"]:
            yield from members(manager, member)
    else:
        yield from _of_group(manager, name, utils.load_yaml_config(entry["yaml_path"], mode="simple"))


def _of_group(manager: Any, name: str, group: dict[str, Any]) -> Iterator[str]:
    """The tasks of a group, which may hold groups of its own in place."""
    of_all = {key: value for key, value in group.items() if key not in GROUP_KEYS}
    for member in group["task"]:
        inner = {**of_all, **(member if isinstance(member, dict) else {"task": member})}
        task: Any = inner.get("task")
        if isinstance(task, list):
            yield from _of_group(manager, inner.get("group", name), inner)
        elif task not in manager.task_index:
            raise LoopError(f"{name}: its member {task} is no task of its own; name its other tasks instead")
        elif changed := sorted(set(inner) - GROUP_KEYS):
            raise LoopError(
                f"{name}: it changes {', '.join(changed)} of {task}; name tasks that are asked as they stand"
            )
        else:
            yield from members(manager, task)


def _task(name: str, path: Path, definition: str) -> Task:
    from lm_eval import utils

    config = utils.load_yaml_config(str(path), mode="simple")
    repeats = config.get("repeats", 1)
    if type(repeats) is not int or repeats < 1:
        raise LoopError(
            f"{path}: repeats: {repeats!r}: write how often each question is asked, a whole number from 1 on"
        )
    sampling = config.get("generation_kwargs") or {}
    return Task(
        name=name,
        definition=definition,
        output_type=str(config.get("output_type", "generate_until")),
        repeats=repeats,
        grades_traces=(_own_folder() / OURS) in path.resolve().parents,
        conversations="messages" in str(config.get("doc_to_text", "")),
        do_sample=sampling.get("do_sample"),
        temperature=float(sampling.get("temperature") or 0.0),
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
        The YAML and those it includes, the Python they name with what that imports from beside it, the data files they
        name, and the folders in which one more file would be one more of those.
    """
    found: set[Path] = set()
    todo = [path.resolve()]
    while todo:
        file = todo.pop()
        if file in found or not os.path.isfile(file):
            continue
        found.add(file)
        if file.suffix == ".py":
            todo += _imported(file)
            continue
        if file.suffix not in ("", ".yaml", ".yml") and not file.name.endswith("_yaml"):
            continue
        try:
            config = yaml_of(file)
            values = list(_strings(config))
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
            continue  # data, or lm-eval's to complain of
        found.update(_data(config))
        inside = [root for root in roots if root in file.parents]
        below = [folder for root in inside for folder in file.parents if folder == root or root in folder.parents]
        for value in values:
            if module := FUNCTION.fullmatch(value):
                todo.append((file.parent / f"{module[1]}.py").resolve())
            elif 0 < len(value) < 512 and "\n" not in value:
                todo += [(folder / value).resolve() for folder in dict.fromkeys([file.parent, *below])]
    return found


def _data(config: dict[str, Any]) -> list[Path]:
    """The local data that a YAML names as `datasets.load_dataset` takes it, seen from the working folder.

    Files, and the folders that hold them where no file but a folder or a pattern was named.
    """
    options = config.get("dataset_kwargs")
    options = options if isinstance(options, dict) else {}
    names = list(_strings(options.get("data_files"))) or list(_strings(options.get("data_dir")))
    patterns = list(names)
    if isinstance(folder := config.get("dataset_path"), str):
        patterns += [f"{folder}/{name}" for name in names] or [folder]
    named = [Path(path).resolve() for pattern in patterns for path in glob.glob(pattern, recursive=True)]
    files = [file for path in named for file in (below(path) if path.is_dir() else [path])]
    plain = {Path(pattern).resolve() for pattern in patterns}
    return [*files, *{file.parent for file in files if file not in plain}]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def _imported(file: Path) -> list[Path]:
    """The modules that a task's Python imports from beside it, or names as a file."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return []
    named: set[str] = set()
    for node in ast.walk(tree):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [".".join(filter(None, (node.module, alias.name))) for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and FILE_NAME.fullmatch(node.value):
            named.add(node.value)
        for parts in (module.split(".") for module in modules):  # `import a.b` runs a/__init__.py, too
            inside = ["/".join(parts[: n + 1]) for n in range(len(parts))]
            named.update(f"{path}{end}" for path in inside for end in (".py", "/__init__.py"))
    candidates = [folder / name for folder in (file.parent, file.parent.parent) for name in named]
    return [path.resolve() for path in candidates if path.is_file()]


def main() -> None:
    """The command: see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.tasks",
        description="What lm-eval knows of tasks, groups, tags and patterns, as JSON.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--include-path", metavar="FOLDER", help="a folder with tasks of your own")
    parser.add_argument("names", nargs="+", metavar="NAME", help="a task, a group, a tag, or a pattern in quotes")
    options = parser.parse_args()
    try:
        print(json.dumps(described(options.names, options.include_path)))
    except LoopError as error:
        parser.exit(error.code, f"{error}\n")


if __name__ == "__main__":
    main()
