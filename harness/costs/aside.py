"""Questions whose answering takes seconds of imports: asked in a process of their own, and the answers kept.

Knows how such a process is called: JSON in, a list of questions; JSON out, a list of answers. Knows nothing of either.
It does not outlive who asks, however that ends (`harness.keeper` says by which facts of Linux).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import thinkswitch_plugin
from harness.errors import LoopError
from harness.files import below, digest, disk_errors, read_json, write_json
from harness.keeper import PATIENCE_S, PR_SET_PDEATHSIG, prctl
from harness.runner import QUIET

START = "from harness.costs.aside import serve; serve()"
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "axolotl", "lm_eval")
TRACED = ("fake", "footprint")  # modules that the others call


def ask(module: str, questions: Sequence[dict[str, Any]], cache: Path) -> list[dict[str, Any]]:
    """What `python -m harness.costs.MODULE` answers to each question, from the cache where it was asked before.

    Args:
        module: of this package; reads a list of questions from standard input and prints a list of answers.
        questions: plain data, which says all that the answer depends on but the code.
        cache: a JSON file that keeps answers for as long as what answers and the libraries are the same.

    Raises:
        LoopError: it could not answer; its last line.
    """
    code = _code(module)
    cached = _kept(cache)
    keys = [
        hashlib.sha256(f"{code}\n{module}\n{json.dumps(one, sort_keys=True)}".encode()).hexdigest()[:24]
        for one in questions
    ]
    new = {key: one for key, one in zip(keys, questions, strict=True) if key not in cached}
    if new:
        answers = _run(module, list(new.values()))
        cached |= dict(zip(new, answers, strict=True))
        with disk_errors(cache):
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_json(cache, {key: {"answer": answer, "seal": _seal(key, answer)} for key, answer in cached.items()})
    return [cached[key] for key in keys]


def answer_all(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The other side: answer each question of standard input, and print the list last."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was begun is put away
    said = sys.stdout
    sys.stdout = sys.stderr  # what the tools print
    answers = [answer(question) for question in json.load(sys.stdin)]
    print(json.dumps(answers), file=said)


def _kept(cache: Path) -> dict[str, Any]:
    """The answers in a cache; what cannot be read, or is not as it was written, is asked again: it only saves time."""
    try:
        kept = read_json(cache)
    except LoopError:
        return {}
    every = kept.items() if isinstance(kept, dict) else ()
    whole = {key: one["answer"] for key, one in every if isinstance(one, dict) and {"answer", "seal"} <= one.keys()}
    return {key: answer for key, answer in whole.items() if kept[key]["seal"] == _seal(key, answer)}


def _seal(key: str, answer: Any) -> str:
    return hashlib.sha256(f"{key}\n{json.dumps(answer, sort_keys=True)}".encode()).hexdigest()[:24]


def _code(module: str) -> str:
    """A digest of the module, of what it traces, and of the versions of the libraries it calls."""
    ours = [Path(__file__).with_name(f"{name}.py") for name in (module, *TRACED)]
    plugin = [file for file in below(Path(str(thinkswitch_plugin.__file__)).parent) if file.suffix == ".py"]
    return hashlib.sha256(" ".join([*map(digest, [*ours, *plugin]), *map(version, LIBRARIES)]).encode()).hexdigest()


def _run(module: str, questions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    asked = subprocess.Popen(
        [sys.executable, "-c", START, module, str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**QUIET, **os.environ},
    )
    try:
        said, complained = asked.communicate(json.dumps(questions))
    except BaseException:
        asked.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            asked.wait(PATIENCE_S)
        asked.kill()
        raise
    if asked.returncode:
        lines = [line.strip() for line in complained.splitlines() if line.strip()]
        raise LoopError(f"plan: {module} could not tell: {''.join(lines[-1:])[:400]}")
    answers: list[dict[str, Any]] = json.loads(said.splitlines()[-1])
    return answers


def serve() -> None:
    """The process that answers: what is asked ends with who asks, whose id is the second argument."""
    module, parent = sys.argv[1:]
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it died before it could be watched
        return
    sys.argv = [module]
    runpy.run_module(f"harness.costs.{module}", run_name="__main__")
