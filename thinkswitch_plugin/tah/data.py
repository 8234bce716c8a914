"""`axolotl tah-data`: of every problem the shortest solution that was found right, as the paper's authors train on.

Knows the columns of open-r1/OpenR1-Math-220k. Leaves to others: training on the rows (the recipes), and which of their
tokens are hard (`oracle`). TaH, arXiv 2511.08577, section 4.1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from thinkswitch_plugin.cli import one_line

COLUMNS = ("problem", "generations", "correctness_math_verify", "correctness_llama")
KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}


@click.command("tah-data")
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--dataset",
    default="open-r1/OpenR1-Math-220k",
    show_default=True,
    help="A data set of the hub, or a .parquet or .jsonl file with its columns.",
)
@click.option("--split", default="train", show_default=True, help="Of a data set of the hub.")
@click.option("--tokenizer", default="Qwen/Qwen3-0.6B", show_default=True, help="Whose tokens are counted.")
@click.option(
    "--below", default=8192, show_default=True, type=click.IntRange(1), help="Tokens that a solution stays below."
)
def command(out: Path, dataset: str, split: str, tokenizer: str, below: int) -> None:
    """Write OUT, a JSONL file of `messages`: each problem with its shortest right solution.

    Right is what math-verify found so, or, where it found none, the judge of the data set (`correctness_llama`).
    Problems without a right solution, or with none below so many tokens, are left out.
    """
    with one_line():
        found = write(out, dataset, split, tokenizer, below)
    click.echo(
        f"{out}: {found['kept']:,} of {found['problems']:,} problems; {found['none_right']:,} have no right solution, "
        f"{found['too_long']:,} none below {below:,} tokens"
    )


def write(out: Path, dataset: str, split: str, tokenizer: str, below: int) -> dict[str, int]:
    """Read the data set, choose, and put the file where it belongs in one piece.

    Returns:
        How many `problems` there were, how many were `kept`, had `none_right`, or were `too_long`.

    Raises:
        ValueError: the data set lacks a column, or nothing is left of it; one line.
        OSError: it or the tokenizer cannot be read.
    """
    from datasets import load_dataset
    from transformers import AutoTokenizer

    file = Path(dataset)
    if file.suffix in KINDS:
        if not file.is_file():
            raise FileNotFoundError(f"{dataset}: no such file")
        rows: Any = load_dataset(KINDS[file.suffix], data_files=str(file), split="train")
    else:
        rows = load_dataset(dataset, split=split)
    if missing := [name for name in COLUMNS[:2] if name not in rows.column_names]:
        raise ValueError(f"{dataset}: has no column {missing[0]}; its rows are not those of open-r1/OpenR1-Math-220k")
    encode: Any = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    found = dict.fromkeys(("problems", "kept", "none_right", "too_long"), 0)
    beside = out.with_name(f".{out.name}.part")
    out.parent.mkdir(parents=True, exist_ok=True)
    with beside.open("w", encoding="utf-8") as lines:
        for row in rows:
            found["problems"] += 1
            right = right_ones(row["generations"], *(row.get(name) for name in COLUMNS[2:]))
            if not right:
                found["none_right"] += 1
                continue
            solution = shortest(right, lambda text: len(encode(text, add_special_tokens=False)["input_ids"]), below)
            if solution is None:
                found["too_long"] += 1
                continue
            found["kept"] += 1
            turns = (("user", row["problem"]), ("assistant", solution))
            messages = [{"role": role, "content": content} for role, content in turns]
            lines.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    if not found["kept"]:
        beside.unlink()
        raise ValueError(f"{dataset}: none of {found['problems']} problems has a right solution below {below} tokens")
    beside.replace(out)
    return found


def right_ones(generations: Sequence[str], verified: Sequence[bool] | None, judged: Sequence[bool] | None) -> list[str]:
    """The generations that `verified` calls right, or, where it calls none so, those that `judged` does."""
    for verdicts in (verified, judged):
        if right := [text for text, yes in zip(generations, verdicts or [], strict=False) if yes]:
            return right
    return []


def shortest(texts: Sequence[str], tokens: Callable[[str], int], below: int) -> str | None:
    """The first of the texts with the fewest tokens; None if that has `below` or more."""
    fewest, at = min((tokens(text), at) for at, text in enumerate(texts))
    return texts[at] if fewest < below else None
