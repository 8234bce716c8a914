"""A stage beside a server: the same answers as without one, the right checkpoint, and nothing left when it ends."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from small import small_loop, ts_loop

from thinkswitch_plugin.kept_answers import whole
from thinkswitch_plugin.trace_stripping import split_trace

# A server of one name: its arguments are the port, the name, and the seconds after which it dies, if it is to.
SERVER = """
import json, os, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    def say(self, code, value):
        text = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
    def do_GET(self):
        self.say(200, {})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked["model"] != sys.argv[2] and sys.argv[2] != "any":
            self.say(404, {"error": "no model " + asked["model"]})
        else:
            self.say(200, {"model": asked["model"], "choices": [{"index": 0, "message": {"content": "Hi"}}]})
    def log_message(self, *said): pass
if len(sys.argv) > 3:
    threading.Timer(float(sys.argv[3]), lambda: (print("out of memory", flush=True), os._exit(3))).start()
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def program(tmp_path: Path) -> str:
    (tmp_path / "server.py").write_text(SERVER)
    return f"{sys.executable} {tmp_path / 'server.py'} {{port}}"


def beside(tmp_path: Path, service: dict[str, Any], *command: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "service.yml").write_text(yaml.safe_dump(service))
    asked = [sys.executable, "-m", "harness.serving", str(tmp_path / "service.yml"), "--", *command]
    return subprocess.run(asked, capture_output=True, text=True, timeout=60, check=False)


def test_a_command_runs_beside_a_server_which_ends_with_it(tmp_path: Path, program: str) -> None:
    before = {process.pid for process in psutil.process_iter()}
    service = {"model": "mine", "command": f"{program} mine"}
    for code in (0, 7):
        said = beside(tmp_path, service, sys.executable, "-c", f"print('{{url}}'); raise SystemExit({code})")
        assert said.returncode == code
        assert said.stdout.startswith("http://127.0.0.1:")
    left = [p for p in psutil.process_iter() if p.pid not in before and "server.py" in " ".join(p.cmdline())]
    assert left == []


@pytest.mark.parametrize(
    ("rest", "said"),
    [
        ("other", "does not serve mine: 404"),
        ("mine 0", "the server ended before it answered (exit code 3): out of memory"),
        ("mine 2", "the server ended while it was asked (exit code 3): out of memory"),
    ],
)
def test_a_server_that_serves_another_or_dies(tmp_path: Path, program: str, rest: str, said: str) -> None:
    began = time.monotonic()
    ended = beside(tmp_path, {"model": "mine", "command": f"{program} {rest}"}, "sleep", "50")
    assert ended.returncode == 1
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("service", "said"),
    [
        ({"model": "m", "command": "none_such --port {port}"}, "server none_such: cannot be started"),
        ({"model": "m", "command": "true --port 8000"}, "its command has no {port}"),
        ({"model": "m", "command": "true {port}"}, "the server ended before it answered (exit code 0)"),
        ({"model": "m", "command": "sh -c 'sleep 60' {port}", "start_s": 0.5}, "did not answer within 0.5 s"),
        ({"model": "m", "url": "http://127.0.0.1:9/v1"}, "http://127.0.0.1:9/v1 does not answer"),
        ({"model": "m"}, "give a command that starts the server, or the url"),
        ({"name": "m"}, "cannot be read as a service"),
    ],
)
def test_a_service_that_is_none(tmp_path: Path, service: dict[str, Any], said: str) -> None:
    ended = beside(tmp_path, service, "true")
    assert ended.returncode == 1
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_trace_that_a_server_took_apart_is_put_back() -> None:
    def choice(content: str | None, reason: str, **message: str) -> dict[str, Any]:
        return {"index": 0, "finish_reason": reason, "message": {"content": content, **message}}

    assert whole(choice("4", "stop")) == "4"
    assert whole(choice(None, "stop")) is None
    for name in ("reasoning_content", "reasoning"):
        for thought in ("2+2\n", "<think>\n2+2\n"):
            for opened in (False, True):
                closed = split_trace(whole(choice("4", "stop", **{name: thought})) or "", opened=opened)
                assert (closed.status, closed.answer, closed.reasoning) == ("closed", "4", "2+2")
                cut = split_trace(whole(choice("", "length", **{name: thought})) or "", opened=opened)
                assert (cut.status, cut.answer) == ("unclosed", None)
                silent = split_trace(whole(choice("", "stop", **{name: thought})) or "", opened=opened)
                assert silent.status == "empty_answer"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_labels_and_scores_are_the_same_through_a_server(recipes: Path, tmp_path: Path) -> None:
    """Greedy, question by question: transformers' own server beside transformers in the evaluator."""
    config = small_loop(recipes, tmp_path / "mine", limit=20)
    greedy = ["--set", "generate.gen_kwargs={do_sample: false, max_gen_toks: 256}"]
    greedy += ["--set", "evaluate.gen_kwargs={do_sample: false, max_gen_toks: 256}"]
    ts_loop("--config", config, "--out", tmp_path / "hf", *greedy)
    served = ["--set", "servers.generate=transformers", "--set", "servers.evaluate=transformers"]
    ts_loop("--config", config, "--out", tmp_path / "served", *greedy, *served)
    rows = [
        [json.loads(line) for line in (tmp_path / name / "small/outcomes.jsonl").open()] for name in ("hf", "served")
    ]
    assert len(rows[0]) == len(rows[1]) == 80
    differ = [pair for pair in zip(*rows, strict=True) if pair[0]["answers"] != pair[1]["answers"]]
    assert not differ
