"""A server of one checkpoint, for as long as a command runs that asks it.

    python -m harness.serving service.yml -- COMMAND …        {url} in COMMAND is the server's

The server is whatever speaks OpenAI's chat completions: vLLM, SGLang, `transformers serve`, a command of the user's in
an environment of its own. It is started on a free port, waited for, asked one token by the checkpoint's name, so that
its weights are loaded and are the right ones, and ended with all that it started when the command has ended. One that
dies takes the command with it, which then need not run into its time-outs. Knows processes and HTTP, nothing of stages.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import yaml

START_S = 1800.0  # to load a large checkpoint from a slow disk and compile for it
ASK_S = 300.0  # for the first token
LOOK_S = 0.2  # between two looks at a server that starts
PATIENCE_S = 10.0  # between asking a server to end and killing it
LOG = "server.log"  # beside the service's file
KEY = "OPENAI_API_KEY"  # whose value, if any, a server is asked with, as by lm-eval


class Service(NamedTuple):
    """How a checkpoint is served.

    Attributes:
        model: the name by which it is asked for.
        command: what starts the server; `{port}` in it is a free one. Empty where it runs already.
        url: of a server that runs already, up to /v1.
        start_s: seconds that it may take to answer.
    """

    model: str
    command: str = ""
    url: str = ""
    start_s: float = START_S


class ServerError(Exception):
    """A server that cannot be used; one line."""


@contextlib.contextmanager
def serving(service: Service, log: Path) -> Iterator[tuple[str, psutil.Popen | None]]:
    """The URL of a server that answers with the right checkpoint, and its process; None if it is somebody else's.

    Raises:
        ServerError: if it does not start, serves another checkpoint, or its port is taken.
    """
    if not service.command:
        check(service.url.rstrip("/"), service.model)
        yield service.url.rstrip("/"), None
        return
    port = free_port()
    words = [word.replace("{port}", str(port)) for word in shlex.split(service.command)]
    if words == shlex.split(service.command):
        raise ServerError(f"server {words[0]}: its command has no {{port}}; write one, a free one is put there")
    url = f"http://127.0.0.1:{port}/v1"
    with log.open("ab") as sink:
        try:
            process = psutil.Popen(words, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink)
        except OSError as error:
            raise ServerError(f"server {words[0]}: cannot be started ({error.strerror}); check its command") from None
    try:
        wait(process, url, service.start_s, log)
        check(url, service.model)
        yield url, process
    finally:
        end(process)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait(process: psutil.Popen, url: str, within_s: float, log: Path) -> None:
    """Block until a server answers: that it is well, or that it knows no such question.

    Raises:
        ServerError: if it ends before, or takes longer.
    """
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if (code := process.poll()) is not None:
            raise ServerError(f"the server ended before it answered (exit code {code}){last_words(log)}")
        try:
            with urllib.request.urlopen(f"{url.removesuffix('/v1')}/health", timeout=5.0):
                return
        except urllib.error.HTTPError as error:
            if error.code != 503:  # which says that it is loading
                return
        except OSError:
            pass
        time.sleep(LOOK_S)
    raise ServerError(f"the server did not answer within {within_s:g} s{last_words(log)}")


def check(url: str, model: str) -> None:
    """Ask a server for one token of a checkpoint.

    Raises:
        ServerError: if it has none of that name, or does not answer.
    """
    asked = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1, "temperature": 0}
    try:
        said = ask(f"{url}/chat/completions", asked)
    except urllib.error.HTTPError as error:
        why = " ".join(error.read().decode(errors="replace").split())[:200]
        raise ServerError(f"{url} does not serve {model}: {error.code} {why}") from None
    except (OSError, ValueError) as error:
        raise ServerError(f"{url} does not answer ({error}); is the server up?") from None
    answered = str(said.get("model") or model)
    if not same(answered, model):
        raise ServerError(f"{url} serves {answered}, not {model}; start it with that")


def same(name: str, model: str) -> bool:
    """Whether two names are of one checkpoint: `@main` and the like are a revision's."""
    return name == model or name.partition("@")[0] == model or os.path.realpath(name) == os.path.realpath(model)


def ask(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """What a server says, as JSON."""
    key = os.environ.get(KEY)
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    with urllib.request.urlopen(
        urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=ASK_S
    ) as reply:
        said = json.load(reply)
    if not isinstance(said, dict) or not said.get("choices"):
        raise ValueError("no choices in what it says")
    return said


def end(process: psutil.Popen) -> None:
    """End a server and all that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        started = [*process.children(recursive=True), process]
        process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(started, PATIENCE_S)
        for one in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()


def last_words(log: Path) -> str:
    """The last line of a server's log, and where the rest is."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f": {lines[-1].strip()}\nits log: {log}" if lines else f"\nits log, which is empty: {log}"


def beside(service: Service, log: Path, command: Sequence[str]) -> int:
    """Run a command beside a server; its exit code.

    Raises:
        ServerError: as `serving`, or if the server ends while the command runs.
    """
    with serving(service, log) as (url, server):
        asker = psutil.Popen([word.replace("{url}", url) for word in command])
        while (code := asker.poll()) is None:
            if server is not None and (died := server.poll()) is not None:
                end(asker)
                raise ServerError(f"the server ended while it was asked (exit code {died}){last_words(log)}")
            time.sleep(LOOK_S)
        return int(code)


def read(file: Path) -> Service:
    """A service as its file says.

    Raises:
        ServerError: if it says something else.
    """
    try:
        service = Service(**yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError) as error:
        raise ServerError(f"{file}: cannot be read as a service: {' '.join(str(error).split())}") from None
    if bool(service.command) == bool(service.url):
        raise ServerError(f"{file}: give a command that starts the server, or the url of one that runs")
    return service


def main() -> None:
    """The command: see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.serving",
        usage="python -m harness.serving [-h] service.yml -- COMMAND ...",
        description="Run a command beside a server of a checkpoint; {url} in the command is the server's.",
        epilog="service.yml: model: NAME, and command: vllm serve NAME --port {port}, or url: http://127.0.0.1:8000/v1",
    )
    parser.add_argument("service", type=Path)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    asked = parser.parse_args()
    command = asked.command[1:] if asked.command[:1] == ["--"] else asked.command
    if not command:
        parser.error("name a command after --")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # so that the server is ended
    try:
        sys.exit(beside(read(asked.service), asked.service.with_name(LOG), command))
    except ServerError as error:
        sys.exit(f"ServerError: {error}")


if __name__ == "__main__":
    main()
