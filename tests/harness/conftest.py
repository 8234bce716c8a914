"""What the harness's tests share; the stages they are made of are in `made_runs`."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from harness.config import LoopConfig, load, recipes_folder
from harness.store import Store

settings.register_profile("shared machine", deadline=None)  # which may pause for a second in the middle of an example
settings.load_profile("shared machine")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store of stages."""
    return Store(tmp_path / "stages")


@pytest.fixture(scope="session")
def shipped() -> LoopConfig:
    """The shipped loop, of two iterations."""
    return load(recipes_folder() / "loop.yml", {"iterations": 2})
