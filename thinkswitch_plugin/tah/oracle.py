"""Which tokens are hard: those whose next token a frozen reference model predicts wrong, or is not sure of.

Knows tokenised rows, a reference checkpoint and the file its verdict is kept in. Leaves to others: where rows come from
(Axolotl's own datasets) and what becomes of hard tokens (`model`). TaH, arXiv 2511.08577, section 3.4.

A label belongs to the position that predicts, as logits do: position t is hard if the reference, having read the row up
to t, puts another token first than the one at t + 1. Only tokens that carry a loss are looked at; everything else, the
prompt above all, is easy.

Such a label tells something of the answer: that the reference's first choice is not the one. A second pass learns to
use that, and what the decider sends on in vain is then mostly lost. With `unsure_below` a position is hard if the
reference's first choice has less than that probability, right or wrong, of which nothing can be read about the answer.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from filelock import FileLock
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from thinkswitch_plugin.recipe import add_files
from thinkswitch_plugin.tah.batches import batches
from thinkswitch_plugin.tah.model import count, tokens_at_a_head

IGNORED = -100


def hard_tokens(
    model: PreTrainedModel, dataset: Dataset, tokens_at_once: int, unsure_below: float | None = None
) -> list[Tensor]:
    """Ask the reference for every row, those of like lengths together.

    Args:
        model: the reference.
        dataset: with columns `input_ids` and `labels`, equally long in a row; a label is -100 where a token carries
            no loss. Rows are read as they are needed.
        tokens_at_once: how many tokens a batch may have, padding included; one row at least.
        unsure_below: hard is where the first choice has less than this probability; None for where it is wrong.

    Returns:
        bool [length of the row] each.
    """
    verdicts: list[Tensor] = [torch.empty(0)] * len(dataset)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    lengths = _lengths(dataset)
    todo = list(batches(lengths, tokens_at_once))
    readable = _readable(dataset)
    for batch in track(todo, description="hard tokens", disable=len(todo) < 8, transient=True):
        width = max(lengths[index] for index in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        wanted = torch.full((len(batch), width), IGNORED)
        mask = torch.zeros(len(batch), width, dtype=torch.int64)
        rows = readable[batch]
        for at, (row, labels) in enumerate(zip(rows["input_ids"], rows["labels"], strict=True)):
            ids[at, : len(row)] = torch.tensor(row)
            wanted[at, : len(row) - 1] = torch.tensor(labels[1:])
            mask[at, : len(row)] = 1
        device = model.device
        with torch.no_grad():
            hidden = decoder(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)[0]
            asked = (wanted != IGNORED).nonzero(as_tuple=True)
            at_a_head = tokens_at_a_head(head.weight.shape[0])
            pieces = zip(hidden[asked].split(at_a_head), wanted[asked].to(device).split(at_a_head), strict=True)
            verdict = [_is_hard(head(piece), tokens, unsure_below) for piece, tokens in pieces]
        hard = torch.zeros(len(batch), width, dtype=torch.bool)
        hard[asked] = torch.cat(verdict).cpu()
        for at, index in enumerate(batch):
            verdicts[index] = hard[at, : lengths[index]].clone()
    return verdicts


def _is_hard(logits: Tensor, tokens: Tensor, unsure_below: float | None) -> Tensor:
    """Logits [N, V] and the tokens that follow, int64 [N], to bool [N]."""
    if unsure_below is None:
        return logits.argmax(-1) != tokens
    return logits.float().softmax(-1).amax(-1) < unsure_below


def _readable(dataset: Dataset) -> Dataset:
    """The two columns, read from disk a batch at a time, as arrays: lists take forty bytes a token."""
    return dataset.select_columns(["input_ids", "labels"]).with_format("numpy")


def _lengths(dataset: Dataset) -> list[int]:
    parts = dataset.select_columns(["input_ids"]).with_format("arrow").iter(1000)
    return [length for part in parts for length in pc.list_value_length(part["input_ids"]).to_pylist()]


def label(
    dataset: Dataset,
    reference: str,
    max_depth: int,
    tokens_at_once: int,
    folder: Path,
    unsure_below: float | None = None,
) -> tuple[Dataset, dict[str, float]]:
    """Add the column `target_depth`: `max_depth` at hard tokens, 1 elsewhere.

    The verdict is kept in `folder` under a hash of the rows, of the reference's weights and of `unsure_below`, and read
    from there when all are the same.

    Args:
        dataset: with the columns `input_ids` and `labels`.
        reference: a checkpoint, folder or hub id.
        max_depth: passes of a hard token.
        tokens_at_once: as for `hard_tokens`.
        folder: of the files kept.
        unsure_below: as for `hard_tokens`.

    Returns:
        The dataset, and `tokens` that carry a loss, `hard` ones among them, their `share`, and `cached` (0 or 1).
    """
    digest, tokens = _fingerprint(dataset, reference, unsure_below)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{digest}.safetensors"
    # Of several processes the first to come labels. A lock and no barrier: it is let go of by whoever fails or is
    # killed, so that the others need not wait for it until a collective's timeout.
    with FileLock(file.with_suffix(".lock")):
        cached = file.exists()
        if not cached:
            _write(file, dataset, reference, tokens_at_once, unsure_below)
    flat = load_file(file)["hard"].bool()
    hard = int(flat.sum())
    depths = pa.array((1 + (max_depth - 1) * flat.short()).numpy())
    offsets = np.concatenate([[0], np.cumsum(_lengths(dataset), dtype=np.int64)])
    column: Any = pa.LargeListArray.from_arrays(pa.array(offsets), depths)
    share = hard / tokens if tokens else 0.0
    labelled = dataset.add_column("target_depth", column)
    return labelled, {"tokens": tokens, "hard": hard, "share": share, "cached": int(cached)}


def _write(file: Path, dataset: Dataset, reference: str, tokens_at_once: int, unsure_below: float | None) -> None:
    """Ask the reference and put its verdict, uint8 [all tokens], in a file that is there whole or not at all."""
    model = AutoModelForCausalLM.from_pretrained(reference, dtype="auto", use_safetensors=True).eval()
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    flat = torch.cat([torch.empty(0, dtype=torch.bool), *hard_tokens(model, dataset, tokens_at_once, unsure_below)])
    beside = file.with_suffix(f".{os.getpid()}")
    save_file({"hard": flat.to(torch.uint8)}, beside)
    beside.replace(file)


def _fingerprint(dataset: Dataset, reference: str, unsure_below: float | None) -> tuple[str, int]:
    """A SHA-256 of the rows, the reference's weights and what hard means, and how many tokens carry a loss."""
    digest = hashlib.sha256(f"4\n{unsure_below}\n".encode())
    folder = Path(reference)
    if folder.is_dir():
        add_files(digest, sorted(folder.glob("*.safetensors")))
    else:
        commit = getattr(AutoConfig.from_pretrained(reference), "_commit_hash", None)
        digest.update(f"{reference}@{commit}".encode())
    tokens = 0
    for part in _readable(dataset).iter(1000):
        for ids, labels in zip(part["input_ids"], part["labels"], strict=True):
            digest.update(b"\n%d\n" % len(ids) + ids.tobytes() + labels.tobytes())
            tokens += int((labels[1:] != IGNORED).sum())
    return digest.hexdigest(), tokens


def collate(tokenizer: Any, max_depth: int = 2, **kwargs: Any) -> Any:
    """Axolotl's usual collator (`DataCollatorForSeq2Seq`) for rows that also have `target_depth`, with their `Counts`.

    Args:
        tokenizer: pads; on either side.
        max_depth: of the model.
        kwargs: of that collator.
    """
    from transformers import DataCollatorForSeq2Seq

    usual = DataCollatorForSeq2Seq(tokenizer, **kwargs)

    def pad(rows: list[dict[str, Any]]) -> Any:
        depths = [row.pop("target_depth") for row in rows]
        batch = usual(rows)
        width = batch["input_ids"].shape[1]
        left = tokenizer.padding_side == "left"
        padded = torch.full((len(depths), width), IGNORED)
        for at, depth in enumerate(depths):
            where = slice(width - len(depth), None) if left else slice(len(depth))
            padded[at, where] = torch.as_tensor(depth)
        batch["target_depth"] = padded
        given = (batch.get("attention_mask"), batch["labels"], padded)
        batch["counts"] = count(batch["input_ids"].shape, *given, max_depth)
        return batch

    return pad
