"""What is known of lm-eval's tasks: members, how they are asked, and a digest of what defines them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from harness import tasks
from harness.errors import LoopError
from harness.tasks import Task, described, drawn_on, find, main, members

SUMS = """
include: _base_yaml
task: my_sums
doc_to_text: !function utils.question
process_results: !function graders/near.near
tag: mine
"""
BASE = """
dataset_path: json
dataset_kwargs: {data_files: {test: data/sums.jsonl}}
test_split: test
output_type: generate_until
doc_to_target: answer
repeats: 2
"""
FILES = {
    "sums.yaml": SUMS,
    "_base_yaml": BASE,
    "utils.py": "from . import wording\nimport json\nHINTS = open('hints.txt')\n",
    "wording.py": "import shared.words as words\n",
    "shared/words.py": "",
    "shared/__init__.py": "",
    "hints.txt": "",
    "graders/near.py": "def near(doc, results):\n    return {}\n",
    "data/sums.jsonl": "{}\n",
    "choice.yaml": "task: my_choice\ndataset_path: json\noutput_type: multiple_choice\ntag: [mine, others]\n",
    "chat.yaml": 'task: my_chat\ndataset_path: json\ndoc_to_text: "{{ messages[-1].content }}"\n',
    "README.md": "",
    "unused.py": "",
    "other.jsonl": "",
}
DEFINES = ["sums.yaml", "_base_yaml", "utils.py", "wording.py", "shared/words.py", "shared/__init__.py", "hints.txt"]
DEFINES += ["graders/near.py", "data/sums.jsonl"]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with tasks of the user's, seen from the folder beside it that data files are named from."""
    folder = tmp_path / "my tasks"
    for name, text in FILES.items():
        file = (tmp_path if name.startswith("data/") else folder) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No index of lm-eval's own 13,000 task files."""
    import lm_eval.tasks

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))


@pytest.fixture
def asked(quick: None, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would have been processes, each of them run in this one."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        assert command[:3] == [sys.executable, "-m", "harness.tasks"]
        monkeypatch.setattr(sys, "argv", command[2:])
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else 1
        return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())

    monkeypatch.setattr(tasks, "subprocess", SimpleNamespace(run=run))
    return commands


@pytest.fixture
def index(quick: None, own: Path) -> Callable[..., Any]:
    """lm-eval's index of the user's tasks, with more YAML files: index(all={"group": …})."""

    def read(**files: dict[str, Any]) -> Any:
        from lm_eval.tasks import TaskManager

        for name, value in files.items():
            (own / f"{name}.yaml").write_text(yaml.safe_dump(value))
        return TaskManager(include_path=str(own))

    return read


# --- how a task is asked ---


def test_a_task_is_told_by_its_yaml_and_what_that_includes(quick: None, own: Path) -> None:
    answer = described(["my_sums", "my_choice", "my_chat"], str(own))
    sums, choice, chat = (Task(**rows[0]) for rows in answer["tasks"].values())
    assert (sums.output_type, sums.repeats, sums.grades_traces, sums.conversations) == (
        "generate_until",
        2,
        False,
        False,
    )
    assert (choice.output_type, choice.repeats) == ("multiple_choice", 1)
    assert (chat.output_type, chat.conversations) == ("generate_until", True)
    assert {str(own / name) for name in FILES if name.endswith((".yaml", "_yaml"))} <= set(answer["files"])


def test_how_a_task_decodes_is_told(quick: None, own: Path) -> None:
    (own / "sums.yaml").write_text(f"{SUMS}generation_kwargs: {{do_sample: true, temperature: 0.7}}\n")
    answer = described(["my_sums", "my_choice"], str(own))
    sums, choice = (Task(**rows[0]) for rows in answer["tasks"].values())
    assert (sums.do_sample, sums.temperature) == (True, 0.7)
    assert (choice.do_sample, choice.temperature) == (None, 0.0)


@pytest.mark.parametrize("often", ["0", "-1", "2.0", "two", "true", "null", "[2]"])
def test_repeats_that_are_no_number_of_answers(asked: list[list[str]], own: Path, often: str) -> None:
    (own / "sums.yaml").write_text(f"{SUMS}repeats: {often}\n")
    with pytest.raises(LoopError) as error:
        find(["my_sums"], own, own / "cache.json")
    said = str(error.value)
    assert said.endswith("write how often each question is asked, a whole number from 1 on")
    assert f"{own / 'sums.yaml'}: repeats: " in said
    assert len(said.splitlines()) == 1


def test_our_own_tasks_take_traces_away_themselves_where_pip_put_them(
    quick: None, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["mini_math", "mini_math_prompts"]
    math, prompts = (Task(**rows[0]) for rows in described(names, str(repository / "tasks"))["tasks"].values())
    assert (math.conversations, prompts.conversations) == (False, True)
    assert not math.grades_traces  # whoever wrote what lies in a folder of the user's
    monkeypatch.setattr(tasks, "_own_folder", lambda: repository)
    monkeypatch.setattr(tasks, "OURS", "tasks")
    again = Task(**described(["mini_math"], str(repository / "tasks"))["tasks"]["mini_math"][0])
    assert again.grades_traces


# --- members ---


def test_tasks_tags_groups_and_groups_in_groups(index: Callable[..., Any]) -> None:
    inner = {"group": "inner", "task": ["my_chat", "my_sums"], "aggregate_metric_list": []}
    in_place = {"group": "in_place", "task": ["my_chat"], "group_alias": "words"}
    whole = {"group": "whole", "task": ["inner", {"task": "my_choice", "task_alias": "c"}, "mine", in_place]}
    manager = index(inner=inner, whole={**whole, "metadata": {"version": 1}})
    assert list(members(manager, "my_sums")) == ["my_sums"]
    assert sorted(members(manager, "mine")) == ["my_choice", "my_sums"]
    assert list(members(manager, "inner")) == ["my_chat", "my_sums"]
    assert list(members(manager, "whole"))[:3] == ["my_chat", "my_sums", "my_choice"]
    assert list(members(manager, "whole"))[-1] == "my_chat"


def test_a_group_s_members_may_stand_in_what_it_includes(index: Callable[..., Any], own: Path) -> None:
    (own / "_members_yaml").write_text("task: [my_sums]\n")
    assert list(members(index(group={"include": "_members_yaml", "group": "ours"}), "ours")) == ["my_sums"]


@pytest.mark.parametrize(
    ("group", "said"),
    [
        ({"task": [{"task": "nameless", "dataset_path": "json"}]}, "ours: its member nameless is no task of its own"),
        ({"task": ["my_sums", {"dataset_path": "json"}]}, "ours: its member None is no task of its own"),
        ({"task": [{"task": "my_sums", "num_fewshot": 5}]}, "ours: it changes num_fewshot of my_sums"),
        ({"task": ["my_sums"], "doc_to_text": "{{x}}"}, "ours: it changes doc_to_text of my_sums"),
        ({"task": [{"group": "in", "task": ["my_sums"], "repeats": 3}]}, "in: it changes repeats of my_sums"),
        ({"task": [{"group": "in", "task": ["my_sums"]}], "repeats": 3}, "in: it changes repeats of my_sums"),
        ({"task": ["coded"]}, "task coded is a Python class"),
    ],
)
def test_what_nobody_could_ask_as_its_group_does_is_refused_in_a_line(
    index: Callable[..., Any], own: Path, group: dict[str, Any], said: str
) -> None:
    (own / "coded.yaml").write_text("task: coded\nclass: !function utils.Coded\n")
    with pytest.raises(LoopError) as error:
        list(members(index(group={"group": "ours", **group}), "ours"))
    assert said in str(error.value)
    assert len(str(error.value).splitlines()) == 1


# --- what defines a task ---


def definition(own: Path, name: str = "my_sums") -> str:
    text: str = described([name], str(own))["tasks"][name][0]["definition"]
    return text


@pytest.mark.parametrize("name", DEFINES)
def test_a_definition_is_another_one_when_a_file_it_draws_on_changes(quick: None, own: Path, name: str) -> None:
    before = definition(own)
    file = (own.parent if name.startswith("data/") else own) / name
    file.write_text(file.read_text() + "\n# changed\n")
    assert definition(own) != before


def test_and_the_same_when_another_file_does_or_it_all_lies_elsewhere(
    quick: None, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = definition(own)
    for name in set(FILES) - set(DEFINES):
        (own / name).write_text("task: another\ndataset_path: json\n")
    (own.parent / "data" / "more.jsonl").write_text("{}")
    assert definition(own) == before
    elsewhere = own.parent / "elsewhere"
    elsewhere.mkdir()
    for folder in (own, own.parent / "data"):
        folder.rename(elsewhere / folder.name)
    monkeypatch.chdir(elsewhere)
    assert definition(elsewhere / own.name) == before


def test_what_a_yaml_draws_on(own: Path) -> None:
    expected = {(own.parent if name.startswith("data/") else own) / name for name in DEFINES}
    assert drawn_on(own / "sums.yaml", [own]) == expected


@pytest.mark.parametrize(
    "said",
    [
        {"dataset_path": "my data"},
        {"dataset_path": "json", "dataset_kwargs": {"data_dir": "my data"}},
        {"dataset_path": "json", "dataset_kwargs": {"data_files": "my data/**/*.jsonl"}},
        {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": ["my data/a.jsonl", "my data/b/c.jsonl"]}}},
        {"dataset_path": "my data", "dataset_kwargs": {"data_files": ["a.jsonl", "b/c.jsonl"]}},
    ],
)
def test_data_are_found_as_datasets_finds_them(own: Path, said: dict[str, Any]) -> None:
    data = own.parent / "my data"
    (data / "b").mkdir(parents=True)
    for name in ("a.jsonl", "b/c.jsonl"):
        (data / name).write_text("{}")
    (own / "data.yaml").write_text(yaml.safe_dump({"task": "data", **said}))
    found = drawn_on(own / "data.yaml", [own])
    assert {path for path in found if path.is_file()} == {own / "data.yaml", data / "a.jsonl", data / "b" / "c.jsonl"}
    patterns = "*" in str(said) or "data_files" not in str(said)
    assert {path for path in found if path.is_dir()} == ({data, data / "b"} if patterns else set())


@pytest.mark.parametrize("text", ["task: [", "task: a\nx: !function\n", "- a\n", "", "a: &a [*a]\n", "\x00", "é: ü"])
def test_a_yaml_that_cannot_be_read_is_lm_eval_s_to_complain_of(own: Path, text: str) -> None:
    (own / "odd.yaml").write_text(text)
    assert drawn_on(own / "odd.yaml", [own]) == {own / "odd.yaml"}


def test_python_that_cannot_be_parsed_is_python_s_to_complain_of(own: Path) -> None:
    (own / "utils.py").write_text("def (")
    assert own / "utils.py" in drawn_on(own / "sums.yaml", [own])


# --- names ---


def test_names_patterns_tags_and_what_lm_eval_does_not_know(asked: list[Any], own: Path, tmp_path: Path) -> None:
    cache = tmp_path / "stages" / ".tasks.json"
    found = find(["my_sums", "my_c*", "mine", "my_sums"], own, cache)
    assert {name: [task.name for task in rows] for name, rows in found.items()} == {
        "my_sums": ["my_sums"],
        "my_c*": ["my_chat", "my_choice"],
        "mine": ["my_choice", "my_sums"],
    }
    for names in (["nope"], ["my_sums", "nope", "no_*"]):
        with pytest.raises(LoopError) as error:
            find(names, own, cache)
        assert len(str(error.value).splitlines()) == 1
        assert f"knows no task {', '.join(names[-2:] if len(names) > 1 else names)}: see" in str(error.value)


def test_a_name_that_begins_with_a_dash(asked: list[Any], own: Path, tmp_path: Path) -> None:
    (own / "dash.yaml").write_text("task: --help\ndataset_path: json\n")
    assert [task.name for task in find(["--help"], own, tmp_path / "kept")["--help"]] == ["--help"]
    with pytest.raises(LoopError, match="knows no task -x: see"):
        find(["-x"], own, tmp_path / "kept")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"task: [unclosed\n", "while parsing"),
        (b"task: a\ninclude: _nowhere_yaml\n", "_nowhere_yaml"),
        (b"task: \xff\n", "position 6"),
        (b"", "it is no mapping"),
    ],
)
def test_a_broken_yaml_is_a_line_that_names_it(
    asked: list[Any], own: Path, tmp_path: Path, text: bytes, said: str
) -> None:
    (own / "broken.yaml").write_bytes(text)
    with pytest.raises(LoopError) as error:
        find(["my_sums"], own, tmp_path / "kept")
    assert str(error.value).startswith(f"{own / 'broken.yaml'}: lm-eval cannot read it (")
    assert said in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_whatever_else_lm_eval_says_is_its_last_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = SimpleNamespace(returncode=1, stdout="", stderr="Traceback\n  File\nKeyError: 'group'\n\n")
    monkeypatch.setattr(tasks, "subprocess", SimpleNamespace(run=lambda *_, **__: said))
    with pytest.raises(LoopError, match=r"^lm-eval could not read its tasks: KeyError: 'group'$"):
        find(["my_sums"], None, tmp_path / "kept")


# --- an answer is kept ---


def test_an_answer_is_kept_while_no_file_changes(asked: list[Any], own: Path, tmp_path: Path) -> None:
    cache = tmp_path / "stages" / ".tasks.json"
    first = find(["my_sums", "mine"], own, cache)
    assert find(["my_sums", "mine"], own, cache) == first
    assert len(asked) == 1
    (own / "README.md").write_text("nothing to do with it")
    (own.parent / "data" / "more.jsonl").write_text("{}")
    assert find(["my_sums", "mine"], own, cache) == first
    assert len(asked) == 1
    find(["my_sums"], own, cache)  # another question, beside the first one
    find(["my_sums", "mine"], own, cache)
    assert len(asked) == 2


@pytest.mark.parametrize("name", [*DEFINES, "choice.yaml"])
def test_and_dropped_when_one_did(asked: list[Any], own: Path, tmp_path: Path, name: str) -> None:
    first = find(["my_sums"], own, tmp_path / "kept")
    file = (own.parent if name.startswith("data/") else own) / name
    file.write_text(file.read_text() + "\n")
    second = find(["my_sums"], own, tmp_path / "kept")
    assert len(asked) == 2
    assert (first != second) == (name in DEFINES)


def test_or_when_a_yaml_turns_up_or_goes(asked: list[Any], own: Path, tmp_path: Path) -> None:
    find(["my_c*"], own, tmp_path / "kept")
    (own / "sub").mkdir()
    (own / "sub" / "new.yaml").write_text("task: my_cats\ndataset_path: json\n")
    assert [task.name for task in find(["my_c*"], own, tmp_path / "kept")["my_c*"]] == [
        "my_cats",
        "my_chat",
        "my_choice",
    ]
    (own / "sub" / "new.yaml").unlink()
    assert len(find(["my_c*"], own, tmp_path / "kept")["my_c*"]) == 2
    assert len(asked) == 3


def test_or_one_more_file_of_data(asked: list[Any], own: Path, tmp_path: Path) -> None:
    (own / "_base_yaml").write_text(BASE.replace("data/sums.jsonl", "data/*.jsonl"))
    first = find(["my_sums"], own, tmp_path / "kept")
    (own.parent / "data" / "more.jsonl").write_text("{}")
    os.utime(own.parent / "data", ns=(1, 1))  # within one tick of a coarse clock
    assert find(["my_sums"], own, tmp_path / "kept") != first
    assert len(asked) == 2


def test_or_one_of_ours_that_pip_puts_among_lm_eval_s(
    asked: list[Any], own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = SimpleNamespace(submodule_search_locations=[str(tmp_path / "lm_eval")])
    monkeypatch.setattr(tasks, "find_spec", lambda name: package)
    (tmp_path / "lm_eval" / "tasks" / "thinkswitch").mkdir(parents=True)
    find(["my_sums"], own, tmp_path / "kept")
    (tmp_path / "lm_eval" / "tasks" / "thinkswitch" / "new.yaml").write_text("task: new\n")
    find(["my_sums"], own, tmp_path / "kept")
    assert len(asked) == 2


def test_what_lm_eval_did_not_know_is_asked_again(asked: list[Any], own: Path, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(LoopError, match="knows no task nope"):
            find(["nope"], own, tmp_path / "kept")
    assert len(asked) == 2
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": 1}'])
def test_a_cache_that_cannot_be_read_only_costs_time(asked: list[Any], own: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "kept").write_text(text)
    assert find(["my_sums"], own, tmp_path / "kept")
    assert find(["my_sums"], own, tmp_path / "kept")
    assert len(asked) == 1


# --- the command, as a process ---


def test_its_help_teaches() -> None:
    said = subprocess.run([sys.executable, "-m", "harness.tasks", "--help"], capture_output=True, text=True, check=True)
    for word in ("python -m harness.tasks mini_math thinkswitch 'tah_*'", "--include-path", '"files"', "pattern"):
        assert word in said.stdout
    assert max(map(len, said.stdout.splitlines())) <= 120


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept") / "tasks.json"


def test_lm_eval_s_own_index_knows_ours(kept: Path) -> None:
    found = find(["mini_*_prompts", "thinkswitch", "arc_easy"], None, kept)
    assert {name: [task.name for task in rows] for name, rows in found.items()} == {
        "mini_*_prompts": ["mini_math_prompts", "mini_qa_prompts"],
        "thinkswitch": ["aime26", "pubmedqa30"],
        "arc_easy": ["arc_easy"],
    }
    ours = [*found["mini_*_prompts"], *found["thinkswitch"]]
    assert all(task.grades_traces and task.output_type == "generate_until" for task in ours)
    assert found["arc_easy"][0].output_type == "multiple_choice"
    (answer,) = json.loads(kept.read_text()).values()
    assert {Path(file).name for file in answer["files"]} >= {
        "answers.py",
        "dataset.py",
        "prompts.jsonl",
        "arc_easy.yaml",
    }


def test_a_broken_yaml_is_a_line_from_the_process_too(own: Path, kept: Path) -> None:
    (own / "broken.yaml").write_text("task: {\n")
    with pytest.raises(
        LoopError, match=r"^/.*/broken\.yaml: lm-eval cannot read it \(.*\); mend it, or move it out of"
    ):
        find(["my_sums"], own, kept)
