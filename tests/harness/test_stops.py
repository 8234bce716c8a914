"""However a run is ended, nothing it started lives on, and the same command ends in the undisturbed run's rows."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from small import TS_LOOP, small_loop, ts_loop

from harness.files import digest

TAG = "TS_LOOP_TEST"  # in the environment of a run, and so of all that it starts
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGKILL: -9}


def started(config: Path, out: Path, tag: str, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [TS_LOOP, "--config", str(config), "--out", str(out), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, TAG: tag},
        # A job in the background ignores it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def tagged(tag: str) -> list[psutil.Process]:
    """Every process that a run has started, whoever is its parent now."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(TAG) == tag and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def ended(running: subprocess.Popen[str], number: signal.Signals, tag: str) -> str:
    """Signal a run; what it said, once it and all it had started are gone, ten seconds later at most."""
    assert len(tagged(tag)) >= 2
    running.send_signal(number)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and tagged(tag):
        time.sleep(0.05)
    assert tagged(tag) == []
    _, said = running.communicate(timeout=10)
    assert running.returncode == CODES[number]
    return said


def when(seen: Callable[[], object], running: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not seen() and time.monotonic() < deadline:
        assert running.poll() is None
        time.sleep(0.02)


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, *(pytest.param(n, marks=pytest.mark.slow) for n in CODES if n != signal.SIGKILL)]
)
def test_a_run_ended_in_the_middle_leaves_no_process(recipes: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Each signal in another stage."""
    config, out, tag = small_loop(recipes, tmp_path / "mine", limit=12), tmp_path / "runs", uuid.uuid4().hex
    kind = {signal.SIGTERM: "generate", signal.SIGKILL: "distill"}.get(number, "evaluate")
    running = started(config, out, tag)
    when(lambda: list((out / "stages").glob(f"{kind}-*/log.txt")), running)
    said = ended(running, number, tag)
    if number != signal.SIGKILL:
        assert said == "ts-loop: stopped; what is finished is kept, run the same command again to continue\n"
    assert json.loads((out / "small/run.json").read_text())["sittings"]


def left(out: Path) -> dict[str, str]:
    """What a run comes to: its rows, its outcomes, and the hash of every checkpoint's weights."""
    found = {"rows": json.loads((out / "small/results.json").read_text())["rows"]}
    found["outcomes"] = (out / "small/outcomes.jsonl").read_text()
    for file in sorted((out / "small").glob("iter_*/*/*/*.safetensors")):
        found[str(file.relative_to(out))] = digest(file)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "begun"), [("generate", "*.answered.jsonl"), ("distill", "adapter/checkpoint-*/trainer_state.json")]
)
def test_a_stage_that_is_killed_goes_on_where_it_was(recipes: Path, tmp_path: Path, kind: str, begun: str) -> None:
    """Labels are sampled, a few at a time; the training has dropout, whose random numbers go on, too."""
    changes = {"generate.batch_size": 4, "generate.gen_kwargs": {"do_sample": True, "temperature": 0.7}}
    changes |= {"distill.lora_dropout": 0.1, "distill.micro_batch_size": 4}
    config = small_loop(recipes, tmp_path / "mine", limit=24)
    more = [word for key, value in changes.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    ts_loop("--config", config, "--out", tmp_path / "undisturbed", *more)
    out, tag = tmp_path / "runs", uuid.uuid4().hex
    running = started(config, out, tag, *more)
    when(lambda: list((out / "stages").glob(f"{kind}-*/{begun}")), running)
    ended(running, signal.SIGKILL, tag)
    (kept,) = (out / "stages").glob(f"{kind}-*/{begun}")
    done = kept.read_text()
    said = ts_loop("--config", config, "--out", out, *more).stdout
    assert f"{kind}: goes on where it was stopped" in said
    assert left(out) == left(tmp_path / "undisturbed")
    assert not kept.exists()
    if kind == "distill":
        log = next((out / "stages").glob("distill-*/log.txt")).read_text()
        assert f"checkpoint-{json.loads(done)['global_step']}" in log


def test_ctrl_c_while_the_tools_are_imported(recipes: Path, tmp_path: Path) -> None:
    config, tag = small_loop(recipes, tmp_path / "mine"), uuid.uuid4().hex
    running = started(config, tmp_path / "runs", tag)
    when(lambda: len(tagged(tag)) >= 2, running)
    time.sleep(0.5)
    assert "stopped" in ended(running, signal.SIGINT, tag)


def marks(out: Path) -> dict[str, int]:
    """When each stage was marked done."""
    return {file.parent.name: file.stat().st_mtime_ns for file in (out / "stages").glob("*/stage.json")}


def worked(out: Path, running: subprocess.Popen[str], tag: str, until: float) -> float:
    """Kill a run that has worked on its stages for so many seconds, or let it end; for how long it has.

    What it takes to import the tools is no work that could be repeated.
    """
    since, begun = time.time(), None
    while running.poll() is None:
        if begun is None and any(log.stat().st_mtime >= since for log in (out / "stages").glob("*/log.txt")):
            begun = time.monotonic()
        if begun and time.monotonic() - begun >= until:
            lasted = time.monotonic() - begun
            ended(running, signal.SIGKILL, tag)
            return lasted
        time.sleep(0.02)
    running.communicate()
    return time.monotonic() - (begun or time.monotonic())


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("distill", ["answers", "on-policy"])
def test_fifty_random_moments(recipes: Path, tmp_path: Path, distill: str) -> None:
    """Runs killed twenty-five times each way, some of them again and again before they get to their end."""
    changes: dict[str, Any] = {"tasks": ["mini_math", "mini_qa"], "prompts": ["mini_math_prompts"], "iterations": 1}
    written = yaml.safe_load((recipes / "loop.yml").read_text())
    recipe = {key: str(recipes / name) for key, name in written["recipes"].items()}
    pair = {who: str(recipes / written[who]) for who in ("instruct", "thinking")}
    (tmp_path / "loop.yml").write_text(
        yaml.safe_dump({**written, **changes, **pair, "recipes": recipe, "name": "small"})
    )
    more = ["--distill", distill]

    def begin(out: Path) -> tuple[subprocess.Popen[str], str]:
        tag = uuid.uuid4().hex
        return started(tmp_path / "loop.yml", out, tag, *more), tag

    lasts = worked(tmp_path / "undisturbed", *begin(tmp_path / "undisturbed"), math.inf)
    wanted = left(tmp_path / "undisturbed")
    chance, kills, repeated, run = random.Random(distill), 0, 0.0, 0
    while kills < 25:
        out, done = tmp_path / f"runs{run}", 0.0
        run += 1
        for _ in range(chance.randint(1, 5)):
            before = marks(out)
            running, tag = begin(out)
            done += worked(out, running, tag, chance.uniform(0.0, lasts))
            assert before.items() <= marks(out).items(), "a finished stage ran again"
            if running.returncode == 0:
                break
            kills += 1
        else:
            before = marks(out)
            done += worked(out, *begin(out), math.inf)
            assert before.items() <= marks(out).items(), "a finished stage ran again"
        assert left(out) == wanted
        repeated += done - lasts
        print(f"{kills} kills: {repeated / kills / lasts:.1%} of {lasts:.0f} s of work is repeated for each")
    assert repeated / kills <= 0.15 * lasts


@pytest.mark.slow
def test_two_commands_at_once_on_one_run_and_on_two_that_share(recipes: Path, tmp_path: Path) -> None:
    config = small_loop(recipes, tmp_path / "mine", limit=12)
    for second in ([], ["--name", "other", "--t", "0.3"]):
        out = tmp_path / f"runs{len(second)}"
        command = [TS_LOOP, "--config", str(config), "--out", str(out)]
        pair = [subprocess.Popen([*command, *more], stdout=subprocess.PIPE, text=True) for more in ([], second)]
        said = [running.communicate(timeout=600)[0] for running in pair]
        assert [running.returncode for running in pair] == [0, 0]
        assert len(list((out / "stages").glob("*/stage.json"))) == (9 if second else 7)
        # Whoever makes a stage says so before it begins.
        begun = [
            line for text in said for line in text.splitlines() if line.endswith(("kept_answers", "axolotl", "-yaml"))
        ]
        assert len(begun) == (9 if second else 7) + 1  # a distillation is two commands
