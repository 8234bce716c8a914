"""Grade a boxed answer to a mathematical problem: right if it is the same thing as the reference answer.

Knows which columns of a row say what is accepted, and how to ask `verifier.py`, which runs beside lm-eval as a process
of its own: `same` may be called from any thread, and an answer that cannot be decided costs a few seconds and is wrong.
Leaves the trace, the box and the metrics to `answers.py`.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent


def grade_boxed(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, int]:
    r"""Grade one answer whose gold is a number or LaTeX; without a `\boxed{}` it is wrong.

    Args:
        doc: The row; `answer` is the reference, `error` (if there is one) how far a number may be off, `trace_opened`
            says whether the template opened the trace.
        results: The model's text, first in the list, as lm-eval's `process_results` gets it.

    Returns:
        `exact_match`, `closed_trace` and `truncated`, each 0 or 1, as `answers.grade_integer`.

    Raises:
        RuntimeError: See `same`.
    """
    tolerance = float(doc.get("error") or 0)
    return _answers.grade_boxed(doc, results, lambda box: same(str(doc["answer"]), box, tolerance))


def same(gold: str, answer: str, tolerance: float = 0) -> bool:
    """Whether `answer` is the same thing as `gold`; see `verifier.same`, which a process of its own is asked.

    Raises:
        RuntimeError: The process does not start, so nothing can be graded.
    """
    return _verifier.ask({"gold": gold, "answer": answer, "tolerance": tolerance})


class _Verifier:
    """`verifier.py` as a process: started when first asked, and again after an answer that was too much for it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        atexit.register(self.stop)

    def ask(self, question: dict[str, Any]) -> bool:
        with self._lock:
            process = self._running()
            try:
                process.stdin.write(json.dumps(question) + "\n")
                process.stdin.flush()
                verdict = process.stdout.readline()
            except BrokenPipeError:
                verdict = ""
            if not verdict:
                self.stop()
                logger.warning("No verdict on %.200r in time, so it is wrong", question["answer"])
            return verdict == "true\n"

    def stop(self) -> None:
        if self._process:
            # An empty input is its sign to end.
            self._process.communicate()
            self._process = None

    def _running(self) -> subprocess.Popen[str]:
        if self._process and self._process.poll() is not None:
            self.stop()
        if not self._process:
            self._process = subprocess.Popen(
                [sys.executable, str(FOLDER / "verifier.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                encoding="utf-8",
                # Ctrl-C is for lm-eval alone.
                start_new_session=True,
            )
            if self._process.stdout.readline() != "ready\n":
                self.stop()
                raise RuntimeError("math-verify does not start, see above; pip install 'math-verify[antlr4_13_2]'")
        return self._process


def _load_answers() -> Any:
    # The tasks are no package: lm-eval loads their files by path.
    spec = importlib.util.spec_from_file_location("answers", FOLDER.parent / "answers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_answers = _load_answers()
grade_boxed.reads = _answers.read_box  # which writes 1/2 and 0.5 apart: these do not agree
_verifier = _Verifier()
