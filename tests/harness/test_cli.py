"""The command as a person meets it: a process, its two streams and its exit code."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner
from small import TS_LOOP, command_here, prepared, run_here, small_loop, ts_loop

from harness import cli
from harness.cli.loop import listed
from harness.runner import LocalRunner


def test_help_teaches() -> None:
    said = ts_loop("--help")
    options = (
        "--iters --config --name --instruct --thinking --prompts --tasks --include-path --t --seed --out --dry-run "
        "--set --limit --from --json --quiet --verbose --verify"
    )
    words = ("Examples", "continues where it stopped", "Exit codes: 0 done, 1 a stage failed, 2 refused", "Completion")
    for word in (*options.split(), *words, "status", "logs", "gc", "think-map"):
        assert word in said.stdout


@pytest.mark.parametrize("name", ["status", "logs", "gc", "think-map"])
def test_every_command_has_help_of_its_own(name: str) -> None:
    said = CliRunner().invoke(cli.command, [name, "--help"])
    assert said.exit_code == 0
    assert len(said.output.splitlines()) > 5
    assert all(parameter.help for parameter in cli.command.commands[name].params if isinstance(parameter, click.Option))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_can_complete(shell: str) -> None:
    environment = {**os.environ, "_TS_LOOP_COMPLETE": f"{shell}_source"}
    said = subprocess.run([TS_LOOP], env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert "_TS_LOOP_COMPLETE" in said.stdout


def test_names_are_listed_and_a_path_may_hold_commas(tmp_path: Path) -> None:
    assert listed("a, b,,c") == ["a", "b", "c"]
    file = tmp_path / "first, second.jsonl"
    assert listed(str(file)) == [str(file)]


def write(folder: Path, name: str, text: str) -> str:
    file = folder / name
    file.write_text(text)
    return str(file)


def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: object) -> tuple[int, str, str]:
    """The command in this process: its exit code and what it said on either stream."""
    code = command_here(monkeypatch, *options)
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--t", "1.5"], "--t: "),
        (["--t", "abc"], "--t: value error, must be from 0 (thinking) to 1 (instruct), or auto"),
        (["--iters", "-1"], "--iters"),
        (["--limit", "0"], "--limit: "),
        (["--anchor", "last"], "--anchor: "),
        (["--config", "missing.yml"], "missing.yml: no such file"),
        (["--instruct", "missing"], "--instruct missing: no such folder"),
        (["--prompts", "missing.jsonl"], "missing.jsonl: cannot be read"),
        (["--include-path", "missing"], "missing: no such folder"),
        (["--set", "distill"], "--set distill: write KEY=VALUE"),
        (["--set", "no_such=1"], "no_such: extra inputs are not permitted"),
        (["--set", "evaluate_thinking.device=cpu"], "this run has no recipe evaluate_thinking"),
        (["--set", "distill.datasets.7.path=x"], "there is no 7 to set"),
        (["--set", "reconstruct.merge_method=ties", "--t", "0.3"], "--t 0.3: the reconstruct recipe has no t"),
        (["--set", "distill.adapter=tah"], "adapter: tah cannot be merged"),
        (["--set", "launcher=horovod"], "must begin with one of python, accelerate, torchrun"),
        (["--no-such-option"], "No such option"),
        (["--iters", "2", "status"], "--iters is the loop's"),
    ],
)
def test_what_is_refused_gets_a_line_or_two_and_no_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("harness.runner.start", no_runner)
    code, said, complaint = here(monkeypatch, capsys, *options)
    assert (code, said) == (2, "")
    assert says in complaint
    assert "Traceback" not in complaint
    assert len(complaint.strip().splitlines()) <= (4 if "Usage:" in complaint else 2)
    assert not list((tmp_path).glob("runs/*/run.json"))


def no_runner(*_: object) -> Any:
    return SimpleNamespace(close=lambda: None)


def test_a_prompts_file_with_a_broken_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, "p.jsonl", '{"problem": "1+1?"}\n\n{"problem": "2+2?"}\n')
    monkeypatch.setattr("harness.runner.start", no_runner)
    code, _, complaint = here(monkeypatch, capsys, "--prompts", file, "--out", tmp_path / "runs")
    assert code == 2
    assert f"{file}:2: the row is empty" in complaint
    assert not (tmp_path / "runs").exists()


def test_a_recipe_that_names_a_missing_file(
    tmp_path: Path, recipes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_loop(recipes, tmp_path / "mine")
    (tmp_path / "mine/slerp_thinking.yml").unlink()
    code, _, complaint = here(monkeypatch, capsys, "--config", config)
    assert code == 2
    assert f"{tmp_path / 'mine/slerp_thinking.yml'}: no such file" in complaint


def test_an_unknown_task_is_named_before_any_stage(tmp_path: Path) -> None:
    said = ts_loop("--tasks", "mini_math,mini_maths", cwd=tmp_path, code=2)
    assert said.stderr == (
        "ts-loop: lm-eval knows no task mini_maths: see `lm_eval ls tasks`, or name your tasks' folder by "
        "--include-path\n"
    )
    assert not (tmp_path / "runs" / "mini" / "run.json").exists()


def test_a_dry_run_checks_and_prints_commands_that_can_be_pasted(
    tmp_path: Path, recipes: Path, runner: LocalRunner
) -> None:
    config = small_loop(recipes, tmp_path / "mine", limit=8)
    said = ts_loop("--config", config, "--dry-run", cwd=tmp_path)
    assert not (tmp_path / "runs/small").exists()
    lines = said.stdout.splitlines()
    commands = [shlex.split(line) for line in lines if not line.startswith(("#", "export"))]
    assert [command[0] for command in commands] == (
        ["python"] * 3 + ["axolotl", "axolotl", "mv", "mergekit-yaml"] + ["python"] * 2
    )
    for command in commands:
        assert shutil.which(command[0], path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        if command[0] == "mv":
            subprocess.run(command, check=True)
        else:  # what a shell would do, without the imports
            runner.run(command, {"OMP_NUM_THREADS": "1"}, tmp_path / "pasted.log")
    left = [path.name for path in (tmp_path / "runs/stages").glob("evaluate-*/answers/results_*.json")]
    assert len(left) == 4
    again = ts_loop("--config", config, "--dry-run", cwd=tmp_path)
    assert again.stdout == said.stdout  # what was pasted does not count as done


def test_status_logs_and_gc_of_a_run(
    tmp_path: Path,
    recipes: Path,
    runner: LocalRunner,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:

    out = tmp_path / "runs"
    ran = run_here(small_loop(recipes, tmp_path / "mine", limit=8, iterations=0), out, runner)
    monkeypatch.chdir(tmp_path)
    code, said, _ = here(monkeypatch, capsys, "status")
    assert code == 0
    assert "2 of 2" in said
    assert "mini_qa" in said
    code, said, _ = here(monkeypatch, capsys, "status", "small", "--json")
    (seen,) = json.loads(said)
    assert [(step["name"], step["state"]) for step in seen["steps"]] == [
        ("evaluate_instruct", "done"),
        ("evaluate_thinking", "done"),
    ]
    code, said, where = here(monkeypatch, capsys, "logs", "small", "evaluate_instruct", "-n", "2")
    assert len(said.splitlines()) == 2
    assert where.strip() == f"==> runs/stages/{ran.keys['0/evaluate_instruct']}/log.txt"
    assert here(monkeypatch, capsys, "logs", "none")[0] == 2
    shutil.rmtree(out / "small")
    code, said, _ = here(monkeypatch, capsys, "gc", "--dry-run")
    assert said.count("not referred to by any run") == 2
    assert ran.made()
    code, said, _ = here(monkeypatch, capsys, "gc")
    assert "MB  are free" in said
    assert not ran.made()
    assert "no runs in" in here(monkeypatch, capsys, "status")[1]


def test_a_reader_that_has_seen_enough_is_no_traceback(tmp_path: Path) -> None:
    said = subprocess.run(
        f"{shlex.quote(TS_LOOP)} --help | head -n 1", shell=True, capture_output=True, text=True, timeout=60, check=True
    )
    assert said.stderr == ""


def test_a_loop_yml_may_change_what_is_not_of_the_run(recipes: Path, tmp_path: Path) -> None:
    """jobs and usd_per_hour say how a run is gone about: no key depends on them."""
    config = small_loop(recipes, tmp_path / "mine")
    keys = []
    for changes in ((), ("jobs=1", "usd_per_hour=2.5", "name=else")):
        run = prepared(config, tmp_path / "runs", changes)
        keys.append([run.keys[step.stage] for step in run.steps])
    assert keys[0] == keys[1]
    assert yaml.safe_load(config.read_text())["jobs"] == 2
