"""Questions asked in a process of their own: what is kept of the answers, and that none outlives who asks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from harness.costs import aside
from harness.errors import LoopError

UNKNOWN = {"questions": None, "tokens": None}  # of a question that names no task, and that is an answer
ASKS = (
    "import sys; from pathlib import Path; from harness.costs import aside; aside.ask('floor', [{}], Path(sys.argv[1]))"
)


def asked(cache: Path, *questions: dict) -> bool:
    """Ask; whether anything was asked anew."""
    before = cache.stat().st_ino if cache.exists() else None
    assert aside.ask("questions", questions, cache) == [UNKNOWN] * len(questions)
    return cache.stat().st_ino != before  # a cache is written beside itself and put in its place


def test_what_was_asked_is_not_asked_again(tmp_path: Path):
    cache = tmp_path / "stages" / ".plan.json"
    assert [asked(cache, {"n": 1}, {"n": 2}), asked(cache, {"n": 1}, {"n": 2}), asked(cache, {"n": 3})] == [1, 0, 1]


def test_an_answer_that_is_not_as_it_was_written_is_asked_again(tmp_path: Path):
    cache, wrong = (
        tmp_path / ".plan.json",
        [None, 7, [], {}, {"bytes": None}, {"answer": None}, {"answer": 1, "seal": "0"}],
    )
    questions = [{"n": number} for number in range(len(wrong))]
    asked(cache, *questions)
    cache.write_text(json.dumps(dict(zip(json.loads(cache.read_text()), wrong, strict=True))))
    assert asked(cache, *questions)
    kept = json.loads(cache.read_text())
    first, *_ = kept
    cache.write_text(json.dumps({**kept, first: {**kept[first], "answer": {"questions": 3, "tokens": None}}}))
    assert asked(cache, *questions)


@pytest.mark.parametrize("text", ["null", "[1, 2]", "{"])
def test_a_cache_that_is_none_is_written_anew(tmp_path: Path, text: str):
    cache = tmp_path / ".plan.json"
    cache.write_text(text)
    assert [asked(cache, {}), asked(cache, {})] == [True, False]


def test_what_cannot_be_answered_is_said_in_a_line(tmp_path: Path):
    with pytest.raises(LoopError, match=r"plan: rows could not tell: KeyError: 'recipe'") as refused:
        aside.ask("rows", [{}], tmp_path / ".plan.json")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_nothing_outlives_who_asks(tmp_path: Path, number: int):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    asks = subprocess.Popen(
        [sys.executable, "-c", ASKS, tmp_path / ".plan.json"], env=environment, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while len(below := psutil.Process(asks.pid).children(recursive=True)) < 2:  # floor, and its keeper
            assert time.monotonic() < deadline
            time.sleep(0.05)
        asks.send_signal(number)
        asks.wait(20)
        _, alive = psutil.wait_procs(below, timeout=20)
        assert not alive
        assert not list(tmp_path.iterdir()), "what it began is put away"
    finally:
        asks.kill()
