"""`ts-loop init`: an editable folder with a loop of one's own."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

NEXT = """\b
Then:
  ts-loop plan --config FOLDER/loop.yml                   what it takes: memory, time, disk; nothing is run
  ts-loop --config FOLDER/loop.yml --limit 2 --iters 1 --name smoke
  ts-loop --config FOLDER/loop.yml

\b
Examples:
  ts-loop init mine --instruct Qwen/Qwen3-4B-Instruct-2507 --thinking Qwen/Qwen3-4B-Thinking-2507 \\
          --prompts mine.jsonl --vram 8
  ts-loop init mine --instruct ckpt/instruct --thinking ckpt/thinking --prompts openai/gsm8k:main --tasks gsm8k
"""


@click.command("init", epilog=NEXT)
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--instruct", required=True, help="The instruct checkpoint: a folder or a hub id (owner/name@revision).")
@click.option("--thinking", required=True, help="The thinking checkpoint: a folder or a hub id.")
@click.option(
    "--prompts",
    help="A file (.jsonl, .csv, .parquet) or hub data set (owner/name, owner/name:config; its split train) with a "
    "column `problem`, `prompt`, `question` or `messages`; or lm-eval tasks.  [default: the paper's 15 a domain]",
)
@click.option("--tasks", help="What to score: lm-eval tasks, separated by commas.  [default: aime26,pubmedqa30]")
@click.option("--include-path", type=click.Path(path_type=Path), help="A folder with your own lm-eval tasks.")
@click.option(
    "--vram",
    type=click.FloatRange(min=1),
    metavar="GB",
    help="For a GPU of so many GB (8, 24, 80), here or elsewhere.  [default: the device of this machine]",
)
def command(
    folder: Path,
    instruct: str,
    thinking: str,
    prompts: str | None,
    tasks: str | None,
    include_path: Path | None,
    vram: float | None,
) -> None:
    """Write a loop of your own into FOLDER: `loop.yml` and a native recipe a stage, made for a pair and a card.

    Precision, batch sizes, lengths and sampling follow from what the checkpoints say of themselves and from the card's
    memory. Weights are not read, and those of a hub not downloaded. Every file is yours to edit.
    """
    from rich.console import Console
    from rich.table import Table

    from harness import card, own
    from harness.cli.loop import listed
    from harness.config import local_or_hub
    from harness.errors import LoopError

    wanted = own.Wanted(
        folder=str(folder),
        instruct=local_or_hub(instruct, Path.cwd()),
        thinking=local_or_hub(thinking, Path.cwd()),
        prompts=listed(prompts) if prompts else None,
        tasks=listed(tasks) if tasks else None,
        include_path=include_path.resolve() if include_path else None,
        vram=vram,
    )
    written = own.prepared(wanted, card.of_size(vram) if vram else None)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if there := [name for name in written.texts if (folder / name).exists()]:
            raise LoopError(
                f"{folder / there[0]}: is there already and would be lost; name another folder, or remove it"
            )
        for name, text in written.texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise LoopError(f"{folder}: cannot be written: {error.strerror or error}") from None
    console = Console(highlight=False)
    table = Table.grid(padding=(0, 2))
    for what, value in written.facts:
        table.add_row(f"[bold]{what}[/]", value)
    console.print(table)
    config = shlex.quote(f"{folder}/loop.yml")
    on = f" --vram {vram:g}" if vram else ""
    console.print(
        f"\n{folder}/ has loop.yml and {len(written.texts) - 1} recipes, yours to edit. Next:\n"
        f"  ts-loop plan --config {config}{on}\n"
        f"  ts-loop --config {config} --limit 2 --iters 1 --name smoke\n"
        f"  ts-loop --config {config}",
        markup=False,
        soft_wrap=True,
    )
