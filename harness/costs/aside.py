"""Questions whose answering takes seconds of imports: asked in a process of their own, and the answers kept.

Knows how such a process is called: JSON in, a list of questions; JSON out, a list of answers. Knows nothing of either.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import thinkswitch_plugin
from harness.errors import LoopError
from harness.files import below, digest, disk_errors, read_json, write_json
from harness.runner import QUIET

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
    keys = [
        hashlib.sha256(f"{code}\n{module}\n{json.dumps(one, sort_keys=True)}".encode()).hexdigest()[:24]
        for one in questions
    ]
    kept = _kept(cache)
    new = {key: one for key, one in zip(keys, questions, strict=True) if key not in kept}
    if new:
        answers = _run(module, list(new.values()))
        kept |= dict(zip(new, answers, strict=True))
        with disk_errors(cache):
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_json(cache, kept)
    return [kept[key] for key in keys]


def answer_all(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The other side: answer each question of standard input, and print the list last."""
    said = sys.stdout
    sys.stdout = sys.stderr  # what the tools print
    answers = [answer(question) for question in json.load(sys.stdin)]
    print(json.dumps(answers), file=said)


def _kept(cache: Path) -> dict[str, Any]:
    try:
        kept = read_json(cache)
    except LoopError:
        kept = None  # it only saves time
    return kept if isinstance(kept, dict) else {}


def _code(module: str) -> str:
    """A digest of the module, of what it traces, and of the versions of the libraries it calls."""
    ours = [Path(__file__).with_name(f"{name}.py") for name in (module, *TRACED)]
    plugin = [file for file in below(Path(str(thinkswitch_plugin.__file__)).parent) if file.suffix == ".py"]
    return hashlib.sha256(" ".join([*map(digest, [*ours, *plugin]), *map(version, LIBRARIES)]).encode()).hexdigest()


def _run(module: str, questions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    ended = subprocess.run(
        [sys.executable, "-m", f"harness.costs.{module}"],
        input=json.dumps(questions),
        capture_output=True,
        text=True,
        check=False,
        env={**QUIET, **os.environ},
    )
    if ended.returncode:
        lines = [line.strip() for line in ended.stderr.splitlines() if line.strip()]
        raise LoopError(f"plan: {module} could not tell: {''.join(lines[-1:])[:400]}")
    answers: list[dict[str, Any]] = json.loads(ended.stdout.splitlines()[-1])
    return answers
