"""Checkpoints with a bent config, tokenizer or header: refused in a line or two, or what every loader takes."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import mutation
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from harness import checks
from harness.errors import LoopError
from harness.natives import refusal

FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors")
HEADER = 4096  # bytes of the weights' file that say what is in it, and more


def bent(chance: random.Random, name: str, whole: bytes) -> bytes:
    """A file of a checkpoint, changed as plain data or as bytes; of weights, more often their header."""
    if not name.endswith(".safetensors"):
        if chance.random() < 0.7:
            return json.dumps(mutation.bent(chance, json.loads(whole))).encode()
        return mutation.some_bytes(chance, whole)
    end = 8 + int.from_bytes(whole[:8], "little")
    match chance.randrange(3):
        case 0:
            return mutation.some_bytes(chance, whole, HEADER)
        case 1:
            header = json.dumps(mutation.bent(chance, json.loads(whole[8:end]))).encode()
            return len(header).to_bytes(8, "little") + header + whole[end:]
        case _:  # a number among the weights, which no header tells
            at = chance.randrange(end, len(whole) - 4)
            return whole[:at] + chance.randbytes(4) + whole[at + 4 :]


def looked_at(number: int, pair: tuple[Path, Path], kept: dict[str, bytes]) -> bool:
    """Whether a pair with a bent file passes the checks; what passes is loaded."""
    chance = random.Random(number)
    name = FILES[number % len(FILES)]
    content = bent(chance, name, kept[name])
    both = chance.random() < 0.3  # or else the pair differs
    written = [pair[0] / name] + ([pair[1] / name] if both and name.endswith(".json") else [])
    said = ""
    where = f"{number}, {name}{' of both' * both}: {content!r:.1500}"
    try:
        for file in written:
            file.write_bytes(content)
        try:
            with mutation.in_time(where):
                checks.check_checkpoint(pair[0], "instruct")
                checks.check_pair(*pair)
        except LoopError as error:
            said = str(error)
        if said:
            assert str(pair[0].parent) in said, where
            assert len(said.splitlines()) <= 2, where
            assert len(said) < 2_000, where
            return False
        with mutation.in_time(where, 2.0):
            why = refusal("transformers", str(pair[0]))
        assert len(why.splitlines()) <= 1, where
        if why:
            return False
        try:
            model = AutoModelForCausalLM.from_pretrained(pair[0])
            tokenizer = AutoTokenizer.from_pretrained(pair[0])
            GenerationConfig.from_pretrained(pair[0])
            asked = tokenizer.apply_chat_template([{"role": "user", "content": "1+1"}], return_tensors="pt")
            model.generate(**asked, max_new_tokens=1)
        except Exception as error:
            raise AssertionError(f"a wrong ok: {type(error).__name__}: {error}\n{where}") from error
        return True
    finally:
        for file in written:
            file.write_bytes(kept[name])


@pytest.mark.parametrize("count", [25, pytest.param(2_000, marks=pytest.mark.slow)])
def test_checkpoints(recipes: Path, tmp_path: Path, count: int) -> None:
    pair = (tmp_path / "instruct", tmp_path / "thinking")
    for copy in pair:
        shutil.copytree(recipes / "mini" / copy.name, copy)
    kept = {name: (pair[0] / name).read_bytes() for name in FILES}
    found = [looked_at(number, pair, kept) for number in range(count)]
    assert 0 < sum(found) < count, "some pass, some do not"
