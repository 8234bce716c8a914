"""What the harness's tests share; the stages they are made of are in `made_runs`."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.config import LoopConfig, load, recipes_folder
from harness.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store of stages."""
    return Store(tmp_path / "stages")


@pytest.fixture(scope="session")
def shipped() -> LoopConfig:
    """The shipped loop, of two iterations."""
    return load(recipes_folder() / "loop.yml", {"iterations": 2})
