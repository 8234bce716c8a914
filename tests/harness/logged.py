"""What lm-eval leaves of an evaluation, made up: the results and the logged samples of one or more tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DATE = "2026-01-01T00-00-00.000000"
OPENED = "<|im_start|>assistant\n<think>\n"


def sample(
    *texts: str | None, score: Any = 1.0, prompt: Any = "<|im_start|>assistant\n", **more: Any
) -> dict[str, Any]:
    """One question and the texts that were written to it."""
    return {
        "doc_id": 0,
        "doc": {"question": "2+2"},
        "arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": {}}},
        "resps": [list(texts)],
        "filter": "none",
        "metrics": ["exact_match", "closed_trace"],
        "exact_match": score,
        **more,
    }


def lm_eval_output(folder: Path, counts: dict[str, int] | None = None, **tasks: list[dict[str, Any]]) -> Path:
    """Write the samples of tasks, numbered in their order; `counts` of questions where lm-eval says other ones."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, rows in tasks.items():
        lines = (json.dumps({**row, "doc_id": row["doc_id"] or i}) + "\n" for i, row in enumerate(rows))
        (folder / f"samples_{task}_{DATE}.jsonl").write_text("".join(lines), encoding="utf-8")
    asked = {task: (counts or {}).get(task, len(rows)) for task, rows in tasks.items()}
    results = {
        "configs": {task: {} for task in asked},
        "n-samples": {task: {"original": 1000, "effective": count} for task, count in asked.items()},
    }
    (folder / f"results_{DATE}.json").write_text(json.dumps(results), encoding="utf-8")
    return folder
