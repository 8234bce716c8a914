"""The page is what the records say: rendering it again changes nothing, and every number in it is one of theirs."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# What is to be recorded yet on a quiet machine: a block that has its record is taken out of here.
AWAITED = {"embedded_other", "embedded_on_policy", "on_policy_loss", "tah_speed", "docs/tah_cost.svg"}
SAID = ("command", "commit", "dirty", "date", "seconds", "machine", "versions", "figures")
HAND_WRITTEN = ("transcribed",)


@pytest.fixture(scope="module")
def results(repository: Path) -> Iterator[Any]:
    sys.path.insert(0, str(repository / "benchmarks"))
    yield importlib.import_module("results")
    sys.path.remove(str(repository / "benchmarks"))


def test_rendering_again_changes_nothing(results: Any, repository: Path) -> None:
    texts, missing = results.everything(results.records())
    assert {line.partition(":")[0] for line in missing} == AWAITED
    for name, text in texts.items():
        assert (repository / name).read_text(encoding="utf-8") == text, f"{name}: run make results"


def test_every_block_of_the_pages_is_known_and_every_known_one_is_shown(results: Any, repository: Path) -> None:
    pages = [(repository / page).read_text(encoding="utf-8") for page in results.PAGES]
    found = [block for text in pages for _, block, _ in results.BLOCK.findall(text)]
    assert sorted(found) == sorted(results.BLOCKS)
    assert sum(text.count("<!-- results:") for text in pages) == len(found)


def test_a_record_says_how_to_have_it_again_and_nothing_of_where_it_was_made(results: Any) -> None:
    kept = results.records()
    assert kept
    for name, record in kept.items():
        assert set(record) - set(HAND_WRITTEN) == set(SAID), name
        assert "python benchmarks/" in record["command"], name
        assert re.fullmatch(r"[0-9a-f]{40}", record["commit"]), name
        said = json.dumps(record)
        assert not re.search(r'[" =](/|~)\w', said), f"{name}: a path"


def test_another_figure_is_another_page(results: Any) -> None:
    """Each figure of a record that a block shows stands in it: turned into another, it stands there no more."""
    kept = results.records()
    shown = results.BLOCKS["forgetting"](kept)
    record = json.loads(json.dumps(kept["forgetting"]))
    record["figures"]["seeds"][1]["won"]["mini_qa"] = 0.123
    changed = results.BLOCKS["forgetting"]({**kept, "forgetting": record})
    assert "12.3 %" in changed
    assert "12.3 %" not in shown


def test_a_block_without_its_record_is_left_and_said(results: Any) -> None:
    page = "<!-- results: forgetting -->\nas it was\n<!-- end -->\n"
    text, missing = results.rendered(page, results.Kept())
    assert text == page
    assert missing == ["forgetting: no docs/results/forgetting.json"]


def test_medians_come_with_the_spread(results: Any) -> None:
    assert results.spread([0.9, 0.5, 0.7]) == "**0.70** (0.50 to 0.90, 3 rounds)"
    assert results.spread([0.9]) == "**0.90** (one round)"
    assert results.spread([0.25, 0.75], 2, most=0.5) == "**0.50** (0.25 to 0.75, 2 rounds; at most 0.5)"
    assert results.spread([1.5], 1, least=2) == "**1.5** (one round; at least 2: **missed**)"


def test_a_command_is_told_without_the_folders_of_this_machine(
    results: Any, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = importlib.import_module("record")
    script = repository / "benchmarks/tah_speed.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--reference-python", "/there/bin/python", "--record"])
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    said = "OMP_NUM_THREADS=2 python benchmarks/tah_speed.py --reference-python …/python --record"
    assert record.command() == said
    assert record.plain({"a": [float("inf"), 0.123456789], 1: (2, None)}) == {"a": [None, 0.123457], "1": [2, None]}
