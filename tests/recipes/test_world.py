"""The mini world: its splits never meet, its answers are right, and the shipped files are what it writes."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DOMAINS = ("mini_math", "mini_qa")


@pytest.fixture(scope="module")
def world(recipes: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("world", recipes / "mini" / "world.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["world"] = module
    spec.loader.exec_module(module)
    return module


def questions(repository: Path, domain: str, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (repository / "tasks" / domain / f"{name}.jsonl").open(encoding="utf-8")]


@pytest.mark.parametrize("domain", DOMAINS)
def test_training_prompts_and_test_questions_never_meet(world: ModuleType, repository: Path, domain: str) -> None:
    test = {row["question"] for row in questions(repository, domain, "test")}
    prompts = {row["question"] for row in questions(repository, domain, "prompts")}
    drawn = {split: {i.question for i in world.take(domain, split, 3000)} for split in ("prompts", "train")}
    assert len(test) == len(questions(repository, domain, "test")) >= 200
    assert not test & (prompts | drawn["prompts"] | drawn["train"])
    assert not (prompts | drawn["prompts"]) & drawn["train"]
    assert {world.split_of(question) for question in test} == {"test"}
    assert {world.split_of(question) for question in prompts} == {"prompts"}


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_shipped_files_are_what_the_world_writes(world: ModuleType, repository: Path, domain: str) -> None:
    test = world.take(domain, "test", world.TEST)
    assert [row["question"] for row in questions(repository, domain, "test")] == [item.question for item in test]
    prompts = world.take(domain, "prompts", world.PROMPTS[domain])
    assert questions(repository, domain, "prompts") == [{"question": item.question} for item in prompts]


def test_math_answers_and_traces_are_right(world: ModuleType, repository: Path) -> None:
    for row in questions(repository, "mini_math", "test"):
        expression = row["question"].removeprefix("Compute ").removesuffix(".")
        assert re.fullmatch(r"\d+[+-]\d+[+-]\d+", expression)
        assert int(row["answer"]) == eval(expression)
    for item in world.take("mini_math", "train", 500):
        steps = [step.split("=") for step in item.trace.split("\n")]
        assert all(eval(left) == int(right) for left, right in steps)
        assert item.answer == f"\\boxed{{{steps[-1][1]}}}"


def test_qa_answers_follow_from_the_context(world: ModuleType, repository: Path) -> None:
    pattern = r"Better-worse: drug (\d+)-(\d+), placebo (\d+)-(\d+)\. Does the drug (help|harm)\?"
    seen: Counter[str] = Counter()
    for row in questions(repository, "mini_qa", "test"):
        found = re.fullmatch(pattern, row["question"])
        assert found
        a, b, c, d = map(int, found.groups()[:4])
        lead = ((a - b) - (c - d)) * (1 if found[5] == "help" else -1)
        assert row["answer"] == ("yes" if lead >= world.MARGIN else "no" if lead <= -world.MARGIN else "maybe")
        seen[row["answer"]] += 1
    assert min(seen.values()) > 0.2 * seen.total()  # no class to win by guessing
    for item in world.take("mini_qa", "train", 500):
        steps = re.findall(r"(\d+)-(\d+)=(\d+)", item.trace)
        assert len(steps) == 3
        assert all(int(x) - int(y) == int(z) for x, y, z in steps)


def test_the_pair_is_small_shared_and_safe(repository: Path) -> None:
    mini = repository / "recipes" / "mini"
    files = [file for who in ("instruct", "thinking") for file in (mini / who).iterdir()]
    assert sum(file.stat().st_size for file in files) < 10 * 2**20
    assert {file.suffix for file in files} <= {".json", ".jinja", ".safetensors"}
    one, other = ((mini / who / "tokenizer.json").read_text() for who in ("instruct", "thinking"))
    assert one == other
    for who in ("instruct", "thinking"):
        assert (mini / who / "chat_template.jinja").read_text().strip() == (mini / f"{who}.jinja").read_text().strip()
