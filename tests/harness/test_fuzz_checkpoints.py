"""Checkpoints with a bent config, tokenizer or header: refused in a line, or what every loader takes."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import mutation
import pytest
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from harness import checks
from harness.errors import LoopError

FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors")
HEADER = 4096  # bytes of the weights' file that say what is in it, and more


def looked_at(number: int, pair: tuple[Path, Path], kept: dict[str, bytes]) -> bool:
    """Whether a pair with one bent file passes the checks; what passes is loaded."""
    chance = random.Random(number)
    name = FILES[number % len(FILES)]
    file = pair[0] / name
    if name.endswith(".json") and chance.random() < 0.7:
        content = json.dumps(mutation.bent(chance, json.loads(kept[name]))).encode()
    else:
        content = mutation.some_bytes(chance, kept[name], HEADER if name.endswith(".safetensors") else None)
    file.write_bytes(content)
    where = f"{number}, {name}: {content!r:.1500}"
    said = ""
    try:
        with mutation.in_time(where):
            checks.check_checkpoint(pair[0], "instruct")
            checks.check_pair(*pair)
    except LoopError as error:
        said = str(error)
    if said:
        file.write_bytes(kept[name])
        assert str(pair[0]) in said, where
        assert len(said.splitlines()) <= 2, where
        return False
    try:
        AutoConfig.from_pretrained(pair[0])
        AutoTokenizer.from_pretrained(pair[0])
        with safe_open(pair[0] / "model.safetensors", framework="pt") as weights:
            assert sum(weights.get_tensor(key).numel() for key in weights.keys()) > 0, where  # noqa: SIM118
    except Exception as error:
        raise AssertionError(f"a wrong ok: {type(error).__name__}: {error}\n{where}") from error
    finally:
        file.write_bytes(kept[name])
    return True


@pytest.mark.parametrize("count", [40, pytest.param(2_000, marks=pytest.mark.slow)])
def test_checkpoints(recipes: Path, tmp_path: Path, count: int) -> None:
    pair = (tmp_path / "instruct", tmp_path / "thinking")
    for copy in pair:
        shutil.copytree(recipes / "mini" / copy.name, copy)
    kept = {name: (pair[0] / name).read_bytes() for name in FILES}
    found = [looked_at(number, pair, kept) for number in range(count)]
    assert 0 < sum(found) < count, "some pass, some do not"
