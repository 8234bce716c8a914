"""The command as a person meets it: a process, its two streams and its exit code."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TS_LOOP = str(Path(sys.executable).with_name("ts-loop"))


def ts_loop(folder: Path, *options: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run([TS_LOOP, *options], cwd=folder, capture_output=True, text=True, timeout=timeout, check=False)


def test_help_teaches(tmp_path: Path) -> None:
    said = ts_loop(tmp_path, "--help")
    assert said.returncode == 0
    options = (
        "--iters --config --name --instruct --thinking --prompts --tasks --include-path --t --seed --out --dry-run"
    )
    for word in (*options.split(), "Examples", "continues where it stopped"):
        assert word in said.stdout


def test_a_dry_run_prints_commands_and_leaves_nothing(tmp_path: Path) -> None:
    said = ts_loop(tmp_path, "--iters", "2", "--dry-run")
    assert (said.returncode, said.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []
    commands = [shlex.split(line) for line in said.stdout.splitlines() if not line.startswith("#")]
    assert [command[0] for command in commands] == ["lm_eval"] * 2 + [
        *(["lm_eval", "axolotl", "axolotl", "mergekit-yaml", "lm_eval", "lm_eval"] * 2)
    ]
    assert all(shutil.which(command[0], path=str(Path(sys.executable).parent)) for command in commands)


def write(folder: Path, name: str, text: str) -> str:
    file = folder / name
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--t", "1.5"], "--t: "),
        (["--t", "abc"], "Invalid value for '--t'"),
        (["--iters", "-1"], "--iters"),
        (["--anchor", "last"], "--anchor: "),
        (["--config", "missing.yml"], "missing.yml: no such file"),
        (["--instruct", "missing"], "--instruct missing: no such folder"),
        (["--prompts", "missing.jsonl"], "missing.jsonl: cannot be read"),
        (["--include-path", "missing"], "missing: no such folder"),
        (["--no-such-option"], "No such option"),
    ],
)
def test_bad_options_get_one_or_two_lines_and_no_run(tmp_path: Path, options: list[str], says: str) -> None:
    said = ts_loop(tmp_path, *options)
    assert said.returncode != 0
    assert says in said.stderr
    assert "Traceback" not in said.stderr + said.stdout
    assert len(said.stderr.strip().splitlines()) <= (4 if "Invalid" in says or "No such option" in says else 2)
    assert not (tmp_path / "runs").exists()


def test_a_prompts_file_with_a_broken_row(tmp_path: Path) -> None:
    file = write(tmp_path, "p.jsonl", '{"problem": "1+1?"}\n\n{"problem": "2+2?"}\n')
    said = ts_loop(tmp_path, "--prompts", file)
    assert said.returncode == 1
    assert f"{file}:2: the row is empty" in said.stderr
    assert not (tmp_path / "runs").exists()


def test_a_recipe_that_names_a_missing_file(tmp_path: Path, recipes: Path) -> None:
    text = (recipes / "loop.yml").read_text().replace("slerp_thinking.yml", "nowhere.yml")
    for name in ("generate_labels", "instruct_distill", "evaluate"):
        shutil.copy(recipes / f"{name}.yml", tmp_path)
    for who in ("instruct", "thinking"):
        text = text.replace(f"mini/{who}", str(recipes / "mini" / who))
    said = ts_loop(tmp_path, "--config", write(tmp_path, "loop.yml", text))
    assert said.returncode == 1
    assert f"{tmp_path / 'nowhere.yml'}: no such file" in said.stderr


def test_an_unknown_task_is_named_before_any_stage(tmp_path: Path) -> None:
    said = ts_loop(tmp_path, "--tasks", "mini_math,mini_maths", timeout=180)
    assert said.returncode == 1
    assert "lm-eval knows no task mini_maths" in said.stderr
    assert "Traceback" not in said.stderr
    assert not (tmp_path / "runs" / "mini" / "iter_00").exists()


def test_ctrl_c_ends_in_one_line_and_leaves_no_process(tmp_path: Path) -> None:
    running = subprocess.Popen(
        [TS_LOOP, "--iters", "1", "--name", "stopped"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    log = tmp_path / "runs" / "stopped" / "iter_00" / "evaluate" / "log.txt"
    deadline = time.monotonic() + 120
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert log.exists()
    os.killpg(running.pid, 2)
    _, said = running.communicate(timeout=30)
    assert running.returncode == 130
    assert said.strip().splitlines() == [
        "ts-loop: stopped; what is finished is kept, run the same command again to continue"
    ]
    assert not (log.parent / "stage.json").exists()
    assert json.loads((tmp_path / "runs" / "stopped" / "run.json").read_text())["asked"]["iterations"] == 1
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in processes
