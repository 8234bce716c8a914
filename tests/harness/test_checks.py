"""What is found out before anything loads: each mistake on a copy of the embedded pair."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import checks
from harness.errors import LoopError


@pytest.fixture
def pair(recipes: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A pair to break."""
    copies = (tmp_path / "instruct", tmp_path / "thinking")
    for copy in copies:
        shutil.copytree(recipes / "mini" / copy.name, copy)
    return copies


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def test_the_embedded_pair_fits(pair: tuple[Path, Path]) -> None:
    for folder, role in zip(pair, ("instruct", "thinking"), strict=True):
        assert checks.local_checkpoint(str(folder), role) == folder
        checks.check_checkpoint(folder, role)
    checks.check_pair(*pair)


@pytest.mark.parametrize("key", checks.SHAPE_KEYS)
def test_another_shape(pair: tuple[Path, Path], key: str) -> None:
    edit(pair[1] / "config.json", lambda config: config.update({key: "other"}))
    with pytest.raises(LoopError, match=f"^the pair does not fit: {key} is .* and other in {pair[1]}\n"):
        checks.check_pair(*pair)


def test_another_tokenizer(pair: tuple[Path, Path]) -> None:
    def swap(tokenizer: dict[str, Any]) -> None:
        vocabulary = tokenizer["model"]["vocab"]
        a, b = list(vocabulary)[-2:]
        vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]

    edit(pair[0] / "tokenizer.json", swap)
    with pytest.raises(LoopError, match="the pair's tokenizers differ in 4 entries"):
        checks.check_pair(*pair)


def test_weights_of_another_shape_under_the_same_config(pair: tuple[Path, Path]) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(pair[1] / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1].copy()
    save_file(weights, pair[1] / "model.safetensors")
    with pytest.raises(LoopError, match=r"model\.norm\.weight is \[128\] .* and \[127\]"):
        checks.check_pair(*pair)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors", "chat_template.jinja"])
def test_a_checkpoint_with_a_file_missing(pair: tuple[Path, Path], file: str) -> None:
    (pair[0] / file).unlink()
    with pytest.raises(LoopError, match=r"^--instruct ") as caught:
        checks.check_checkpoint(pair[0], "instruct")
    assert str(pair[0]) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x08", b"\xff" * 8, b"\x10\x00\x00\x00\x00\x00\x00\x00{broken"])
def test_weights_cut_off(pair: tuple[Path, Path], content: bytes) -> None:
    (pair[0] / "model.safetensors").write_bytes(content)
    with pytest.raises(LoopError, match="not a whole safetensors file"):
        checks.check_pair(*pair)


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/no/such/place", "~/nowhere/x"])
def test_no_such_checkpoint(name: str) -> None:
    with pytest.raises(LoopError, match=f"^--thinking {name}: no such folder"):
        checks.local_checkpoint(name, "thinking")


def test_a_hub_that_does_not_answer() -> None:
    with pytest.raises(LoopError, match=r"the hub did not give it") as caught:
        checks.local_checkpoint("no-such-owner/no-such-model", "instruct")
    assert len(str(caught.value).splitlines()) == 2


def test_a_prompts_file_is_checked_to_the_line(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"problem": "1+1?"}\n{"problem": "2+2?"\n')
    with pytest.raises(LoopError, match=rf"^--prompts {file}:2: "):
        checks.check_prompts(file)
    file.write_text('{"problem": "1+1?"}\n')
    checks.check_prompts(file)


def test_room_on_the_disk(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks.check_disk(tmp_path / "runs" / "new", pair[0], 3)
    size = (pair[0] / "model.safetensors").stat().st_size
    free = shutil.disk_usage(tmp_path)._replace(free=6 * size)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    checks.check_disk(tmp_path / "runs" / "new", pair[0], 2)
    with pytest.raises(LoopError, match="no disk space: 3 iterations need"):
        checks.check_disk(tmp_path / "runs" / "new", pair[0], 3)
