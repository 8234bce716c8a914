"""Another environment's Python: what is said of one that cannot ask, and that one that can is started as a program."""

from __future__ import annotations

import json
import os
import site
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
from small import run_here, small_loop

from harness import asking, interpreters, loop
from harness.config import load, read_recipes
from harness.errors import LoopError
from harness.interpreters import check_model, look
from harness.runner import LocalRunner
from harness.stages import External, Keys, generate
from harness.tasks import Task

OWN = {"thinkswitch_plugin": "123", "grading": "456"}
WHERE = "loop.yml: python: generate"


def environment(folder: Path, like_this: bool = True) -> Path:
    """A virtual environment of its own, and whether it has all that this one has; its interpreter."""
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
    if like_this:
        (packages(folder) / "this.pth").write_text(f"import site; site.addsitedir({site.getsitepackages()[0]!r})\n")
    return folder / "bin/python"


def packages(folder: Path) -> Path:
    (found,) = folder.glob("lib/python*/site-packages")
    return found


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("other") / "venv")


def test_it_is_asked_for_its_own_versions(other: Path) -> None:
    found = look(other, WHERE, asking.TOOLS, OWN)
    assert found.path == str(other)  # the link itself: what it points to is another environment
    assert found.python == sys.version.split()[0]
    assert found.versions["lm_eval"] == "0.4.11"
    assert found.versions["thinkswitch_plugin"] == "123"
    assert "vllm" not in found.versions


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ("missing", r"missing/bin/python: no such program; name the bin/python"),
        ("no Python", r"tool: does not work as a Python \(exit code 0\)"),
        ("empty", r"has no lm_eval, and the tasks need 0\.4\.11; .*bin/python -m pip install lm_eval==0\.4\.11"),
        ("transformers 4", r"has transformers 4\.57\.1, which misreads the rotary base"),
        ("lm_eval 0.4.13", r"has lm_eval 0\.4\.13, and the tasks need 0\.4\.11"),
        ("another thinkswitch", r"thinkswitch is another version there"),
    ],
)
def test_one_that_cannot_ask_is_refused_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)  # what lies in the working folder comes first, as for the tool itself
    program = tmp_path / "missing/bin/python"
    if made == "no Python":
        program = tmp_path / "tool"
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    elif made != "missing":
        program = environment(tmp_path / "venv", like_this=made != "empty")
    name, _, number = {"transformers 4": "transformers 4.57.1"}.get(made, made).partition(" ")
    if number[:1].isdigit():  # as pip leaves it
        folder = packages(tmp_path / "venv") / f"{name}-{number}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
    if made == "another thinkswitch":
        (packages(tmp_path / "venv") / "thinkswitch_plugin").mkdir()
        (packages(tmp_path / "venv") / "thinkswitch_plugin/__init__.py").write_text("")
    with pytest.raises(LoopError, match=rf"^loop\.yml: python: generate: .*{said}") as caught:
        look(program, WHERE, asking.TOOLS, OWN)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("typed")
@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        ("#!/bin/sh\nexec sleep 30\n", 0o755, r"tool: did not say in 0\.3 s what is installed; name the bin/python"),
        (
            "#!/bin/sh\nexec cat\n",
            0o755,
            r"tool: does not work as a Python \(exit code 0\)",
        ),  # which reads what we type
        ("print()\n", 0o755, r"tool: cannot be started \(Exec format error\); name the bin/python"),
        ("#!/bin/sh\n", 0o644, r"tool: cannot be started \(Permission denied\); name the bin/python"),
    ],
)
def test_a_program_that_never_answers_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, mode: int, said: str
) -> None:
    monkeypatch.setattr(interpreters, "PATIENCE_S", 0.3)
    program = tmp_path / "tool"
    program.write_text(text)
    program.chmod(mode)
    with pytest.raises(LoopError, match=rf"^loop\.yml: python: generate: .*{said}") as caught:
        look(program, WHERE, asking.TOOLS, OWN)
    assert "\n" not in str(caught.value)


@pytest.fixture
def typed() -> Iterator[None]:
    """A standard input that is open and silent, as a terminal's."""
    read, write = os.pipe()
    kept = os.dup(0)
    os.dup2(read, 0)
    yield
    os.dup2(kept, 0)
    for end in (read, write, kept):
        os.close(end)


def test_an_engine_that_is_not_installed_is_refused() -> None:
    check_model("vllm", "evaluate", {"vllm": "0.21.0"})
    with pytest.raises(LoopError, match=r"lm_eval 0\.4\.11 cannot import vllm 0\.33\.0; install 'vllm<0\.22' there"):
        check_model("vllm", "evaluate", {"vllm": "0.33.0", "lm_eval": "0.4.11"})
    with pytest.raises(LoopError, match=r"evaluate recipe: model: vllm: not installed .*python: \{evaluate: …\}"):
        check_model("vllm", "evaluate", {"lm_eval": "0.4.11"})


def test_the_loop_says_so_before_anything_runs(recipes: Path, tmp_path: Path) -> None:
    config = load(small_loop(recipes, tmp_path / "loop"), {}, ("python.evaluate=no/such/python",))
    assert config.python == {"evaluate": Path.cwd() / "no/such/python"}  # of the command line, so of the working folder
    with pytest.raises(LoopError, match=r"loop\.yml: python: evaluate: .*no such program"):
        loop.interpreters_of(config, read_recipes(config))
    config = load(tmp_path / "loop/loop.yml", {})
    with pytest.raises(LoopError, match=r"generate recipe: model: vllm: not installed"):
        loop.interpreters_of(config, {"generate": {"model": "vllm"}})


def test_a_setting_s_path_is_of_its_file_and_its_name_a_recipe_s(recipes: Path, tmp_path: Path) -> None:
    file = small_loop(recipes, tmp_path / "loop", python={"generate": "../vllm/bin/python", "evaluate": "python3.11"})
    assert load(file, {}).python == {"generate": tmp_path / "vllm/bin/python", "evaluate": Path("python3.11")}
    with pytest.raises(LoopError, match=r"loop\.yml: python\.distill"):
        load(small_loop(recipes, tmp_path / "loop", python={"distill": "python3.11"}), {})


def test_what_asks_is_in_the_key_and_where_it_lies_is_not(other: Path) -> None:
    task = Task("mine", "digest", "generate_until", 1, False, True)
    came = External("/thinking", "identity")

    def key(path: str, **changed: str) -> str:
        found = look(other, WHERE, asking.TOOLS, OWN)
        moved = type(found)(path, found.python, {**found.versions, **changed})
        stage = generate.build({"model": "hf"}, asking.Settings(7), [task], came, None, moved)
        kept = ("-m", "thinkswitch_plugin.kept_answers", "<<stage>>/recipe.yml", "--keep")
        assert stage.commands == (("<<python>>", *kept),)
        assert stage.inputs["python"] == External(path, f"python {found.python}")
        return Keys({"torch": "not this one's"})[stage]

    assert key("/here/python") == key("/there/python")
    assert key("/here/python") != key("/here/python", torch="2.9.1")


def test_a_preloaded_runner_starts_it_as_a_program(other: Path, runner: LocalRunner, tmp_path: Path) -> None:
    says = "import os, sys; print(sys.prefix, 'torch' in sys.modules, os.environ['PATH'].split(':')[0])"
    runner.run([str(other), "-c", says], {}, tmp_path / "log.txt")
    assert (tmp_path / "log.txt").read_text().split() == [str(other.parent.parent), "False", str(other.parent)]


@pytest.mark.slow
def test_a_loop_whose_questions_are_asked_from_another_environment(
    other: Path, recipes: Path, runner: LocalRunner, tmp_path: Path
) -> None:
    file = small_loop(recipes, tmp_path / "loop", python={"generate": str(other), "evaluate": str(other)})
    ran = run_here(file, tmp_path / "runs", runner)
    assert len(ran.results["rows"]) == 4
    for step in ("iter_01/generate", "iter_00/evaluate_thinking"):
        record = json.loads((ran.folder / step / "stage.json").read_text())
        assert record["commands"][0][:3] == [str(other), "-m", "thinkswitch_plugin.kept_answers"]
        assert record["reads"]["inputs"]["python"] == f"python {sys.version.split()[0]}"
    here = run_here(small_loop(recipes, tmp_path / "here"), tmp_path / "runs", runner, name="here")
    assert here.results["rows"] == ran.results["rows"]  # the same tools asked the same questions
