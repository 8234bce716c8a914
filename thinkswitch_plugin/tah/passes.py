"""`axolotl tah-passes`: how many passes the answers took that lm-eval logged of a TaH checkpoint.

Knows lm-eval's config file and its logged samples. Leaves to others: loading (`think_map`), counting and what it costs
(`cost`), and every score.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import yaml

from thinkswitch_plugin.cli import one_line
from thinkswitch_plugin.facts import write_json

SETTINGS = ("dtype", "max_depth", "mix_top_k", "decider", "threshold")  # of the model, that model_args may set
DATE = "[0-9][0-9][0-9][0-9]-*"  # how lm-eval ends its file names; a task may be named as another's beginning


@click.command("tah-passes")
@click.argument("samples", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--recipe",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The lm-eval config that asked for the answers.",
)
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The JSON file to write.")
def command(samples: Path, recipe: Path, out: Path) -> None:
    """Count the passes of the answers in SAMPLES, the folder where lm-eval logged them.

    Writes {task: {"mean_depth": …, "skip_rate": …, "flops_per_token": …, "flops_per_token_single": …,
    "flops_per_token_always": …}}, null where a task has no answer with a token. The checkpoint is the recipe's
    (`pretrained` in its model_args), with the settings it was asked with.
    """
    with one_line():
        write_json(out, count(samples, recipe))


def count(samples: Path, recipe: Path) -> dict[str, dict[str, float | None]]:
    """Load a recipe's model once and count, task by task.

    Args:
        samples: the folder of `samples_TASK_DATE.jsonl` files; of several dates the last counts.
        recipe: the lm-eval config, of whose keys `model_args` and `device` are looked at.

    Returns:
        For each task what `cost.summary` says of its answers.

    Raises:
        ValueError: the folder has no samples, a file is not what lm-eval logs, or the recipe names no TaH checkpoint.
        OSError: a file of the checkpoint is missing.
    """
    logged = sorted(samples.glob(f"samples_*_{DATE}.jsonl"))
    files = {file.name.removeprefix("samples_").rpartition("_")[0]: file for file in logged}
    if not files:
        raise ValueError(f"{samples}: lm-eval logged no samples here; set log_samples: true and name its output folder")
    asked = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    given = _model_args(recipe, asked)
    pairs = {task: list(answers(file)) for task, file in files.items()}  # read before anything heavy is

    from thinkswitch_plugin.tah import cost, think_map

    settings = {key: given[key] for key in SETTINGS if key in given}
    model, tokenizer = think_map.load(given["pretrained"], asked.get("device"), **settings)
    return {task: cost.summary(model.config, cost.count(model, tokenizer, some)) for task, some in pairs.items()}


def answers(file: Path) -> Iterator[tuple[str, str]]:
    """Each prompt as the model saw it, with the first answer it wrote; a task's first filter only.

    What was not answered in text (a choice by its likelihood) is left out.

    Raises:
        ValueError: a line is no sample of lm-eval; one line, with the file and its number.
    """
    first = None
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                first = first or row.get("filter")
                prompt, answer = row["arguments"]["gen_args_0"]["arg_0"], row["resps"][0][0]
            except (ValueError, LookupError, TypeError, AttributeError):
                raise ValueError(f"{file}:{number}: not a sample as lm-eval logs it; evaluate again") from None
            if row.get("filter") == first and isinstance(prompt, str) and isinstance(answer, str):
                yield prompt, answer


def _model_args(recipe: Path, asked: Any) -> dict[str, Any]:
    given = asked.get("model_args") if isinstance(asked, dict) else None
    if isinstance(given, str):
        from lm_eval.utils import simple_parse_args_string

        given = simple_parse_args_string(given)
    if not isinstance(given, dict) or not given.get("pretrained"):
        raise ValueError(f"{recipe}: its model_args name no checkpoint; add pretrained: FOLDER")
    return given
