"""Which tokens are hard: against asking the reference one row at a time, and the file that keeps the verdict."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_tah import backbone

from thinkswitch_plugin.tah import oracle

REFERENCE = backbone()


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 20), min_size=1, max_size=9),
    at_once=st.integers(1, 80),
    seed=st.integers(0, 1000),
    unsure_below=st.none() | st.floats(0.1, 0.5),
)
def test_batches_of_any_size_say_what_single_rows_say(
    lengths: list[int], at_once: int, seed: int, unsure_below: float | None
) -> None:
    torch.manual_seed(seed)
    rows = [torch.randint(1, 61, (length,)).tolist() for length in lengths]
    labels = [[-100 if torch.rand(()) < 0.4 else token for token in row] for row in rows]
    dataset = Dataset.from_dict({"input_ids": rows, "labels": labels})
    verdicts = oracle.hard_tokens(REFERENCE, dataset, at_once, unsure_below)
    for row, label, verdict in zip(rows, labels, verdicts, strict=True):
        assert len(verdict) == len(row)
        with torch.no_grad():
            odds, said = REFERENCE(torch.tensor([row])).logits[0].softmax(-1).max(-1)
        for at, hard in enumerate(verdict.tolist()):
            if at + 1 == len(row) or label[at + 1] == -100:
                assert not hard
            elif unsure_below is None:
                assert hard == (int(said[at]) != row[at + 1])
            elif abs(float(odds[at]) - unsure_below) > 1e-6:
                assert hard == (float(odds[at]) < unsure_below)


@pytest.fixture
def dataset() -> Dataset:
    torch.manual_seed(5)
    rows = [torch.randint(1, 61, (length,)).tolist() for length in (5, 9, 7)]
    labels = [[-100, -100, *row[2:]] for row in rows]
    return Dataset.from_dict({"input_ids": rows, "labels": labels})


def test_labels_are_kept_and_asked_for_once(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = tmp_path / "reference"
    REFERENCE.save_pretrained(reference)
    first, found = oracle.label(dataset, str(reference), 3, 100, tmp_path / "kept")
    assert found["cached"] == 0
    assert found["tokens"] == sum(len(row) - 2 for row in dataset["input_ids"])
    assert found["hard"] == sum(depth == 3 for row in first["target_depth"] for depth in row)
    assert found["share"] == found["hard"] / found["tokens"] > 0
    assert {depth for row in first["target_depth"] for depth in row} == {1, 3}

    def asked(*_: Any) -> None:
        raise AssertionError("the reference was asked again")

    monkeypatch.setattr(oracle, "hard_tokens", asked)
    again, found = oracle.label(dataset, str(reference), 3, 7, tmp_path / "kept")
    assert found["cached"] == 1
    assert again["target_depth"][:] == first["target_depth"][:]
    with pytest.raises(AssertionError, match="asked again"):  # other rows
        oracle.label(dataset.select([0, 1]), str(reference), 3, 100, tmp_path / "kept")
    with pytest.raises(AssertionError, match="asked again"):  # another meaning of hard
        oracle.label(dataset, str(reference), 3, 100, tmp_path / "kept", unsure_below=0.5)
    REFERENCE.save_pretrained(reference)
    weights = reference / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(AssertionError, match="asked again"):  # other weights
        oracle.label(dataset, str(reference), 3, 100, tmp_path / "kept")


def processes(count: int, work: Callable[[], object]) -> list[int]:
    """Exit codes of so many forks that do the same at once."""
    context = multiprocessing.get_context("fork")
    forks = [context.Process(target=lambda: os._exit(int(work()))) for _ in range(count)]  # type: ignore[call-overload]
    for fork in forks:
        fork.start()
    for fork in forks:
        fork.join(60)
    return [fork.exitcode for fork in forks]


def test_of_several_processes_one_labels(dataset: Dataset, tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    REFERENCE.save_pretrained(reference)
    torch.set_num_threads(1)

    def ask() -> float:
        return oracle.label(dataset, str(reference), 2, 100, tmp_path / "kept")[1]["cached"]

    assert sorted(processes(3, ask)) == [0, 1, 1]


def test_nobody_waits_for_a_process_that_was_killed_as_it_labelled(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = tmp_path / "reference"
    REFERENCE.save_pretrained(reference)
    given = (dataset, str(reference), 2, 100, tmp_path / "kept")
    with monkeypatch.context() as patch:
        patch.setattr(oracle, "hard_tokens", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        assert processes(2, lambda: oracle.label(*given)[1]["cached"]) == [-signal.SIGKILL] * 2
    assert oracle.label(*given)[1]["cached"] == 0


def test_rows_in_another_order_keep_their_labels(dataset: Dataset, tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    REFERENCE.save_pretrained(reference)
    straight, _ = oracle.label(dataset, str(reference), 2, 100, tmp_path / "kept")
    turned, _ = oracle.label(dataset.select([2, 0]), str(reference), 2, 100, tmp_path / "kept")
    assert turned["target_depth"][:] == [straight["target_depth"][2], straight["target_depth"][0]]
    assert turned["input_ids"][:] == [dataset["input_ids"][2], dataset["input_ids"][0]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_collator_pads_depths_where_it_pads_tokens(recipes: Path, side: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(recipes / "mini/instruct", padding_side=side)
    rows = [
        {"input_ids": [5] * n, "attention_mask": [1] * n, "labels": [5] * n, "target_depth": [2] * n} for n in (2, 4)
    ]
    batch = oracle.collate(tokenizer, return_tensors="pt")([dict(row) for row in rows])
    assert torch.equal(batch["target_depth"] == -100, batch["attention_mask"] == 0)
    assert torch.equal(batch["labels"] == -100, batch["attention_mask"] == 0)
    assert batch["counts"].lengths == (2, 4)
    assert batch["counts"].deeper == ((2, 4),)
