"""What every test shares: quiet, offline tools, where the repository's own files lie, and one preloaded runner."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers share two cores: threads would wait for one another

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def recipes(repository: Path) -> Path:
    """The shipped recipes."""
    return repository / "recipes"


@pytest.fixture(scope="session")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """A runner that has imported the tools: ten seconds once, and not for each command."""
    from harness.runner import LocalRunner

    with LocalRunner(tmp_path_factory.mktemp("runner") / "preload.log", preloaded=True) as started:
        yield started


@pytest.fixture
def tool(runner: object, tmp_path: Path) -> Callable[..., str]:
    """Run a tool's command as typed and get what it printed; `ok=False` expects it to fail.

    tool("axolotl", "train", file, cwd=folder)
    """
    from harness.runner import LocalRunner, ToolError

    assert isinstance(runner, LocalRunner)

    def run(*command: object, ok: bool = True, **environment: str) -> str:
        log = tmp_path / "tool.log"
        start = log.stat().st_size if log.exists() else 0
        threads = {"OMP_NUM_THREADS": "1"}
        try:
            runner.run([str(word) for word in command], {**threads, **environment}, log)
            failed = False
        except ToolError:
            failed = True
        said = log.read_bytes()[start:].decode(errors="replace")
        assert failed != ok, said
        return said

    return run
