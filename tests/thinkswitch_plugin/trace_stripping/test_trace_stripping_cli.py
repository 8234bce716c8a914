"""The recipe through Axolotl's own commands: the log line, the prepared set, and what training makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ASK = {"role": "user", "content": "What is 12 + 30?"}
ROWS = [
    {"doc": {"messages": [ASK], "trace_opened": True, "answer": 42}, "target": "42", "resps": [[text]]}
    for text in ("I add.</think>\n\nIt is 42.", "I add and add", "<think>So</think>42", "Hm.</think>")
]
LINE = "trace stripping: {path}: kept 2 of 4 rows, dropped 2 (empty_answer 1, unclosed 1); removed "


def shown(log: str, path: Path) -> list[str]:
    return [line for line in log.splitlines() if LINE.format(path=path) in line]


def prepared(folder: Path, tokenizer: Any) -> set[str]:
    from datasets import load_from_disk

    (path,) = folder.glob("prepared/*/dataset_info.json")
    labels = load_from_disk(str(path.parent))["labels"]
    return {tokenizer.decode([label for label in row if label != -100]) for row in labels}


def test_prepared_then_trained_on_then_changed(
    recipe: Any, axolotl: Any, write_rows: Any, tokenizer: Any, tmp_path: Path
) -> None:
    path = write_rows(ROWS)
    run = axolotl("preprocess", recipe(path))
    assert run.returncode == 0, run.stderr[-2000:]
    assert len(shown(run.stdout + run.stderr, path)) == 1
    assert prepared(tmp_path, tokenizer) == {"It is 42.<|im_end|>", "42<|im_end|>"}
    assert not (tmp_path / "out/trace_stripping.json").exists()  # it is no training

    run = axolotl("train", recipe(path), "--launcher", "python")
    assert run.returncode == 0, run.stderr[-2000:]
    assert "Loading prepared dataset from disk" in run.stdout + run.stderr
    assert len(shown(run.stdout + run.stderr, path)) == 1
    (counts,) = json.loads((tmp_path / "out/trace_stripping.json").read_text())["datasets"]
    assert (counts["path"], counts["rows"], counts["kept"]) == (str(path), 4, 2)
    assert counts["dropped"] == {"empty_answer": 1, "unclosed": 1}

    write_rows([*ROWS, ROWS[0]])  # a changed file is trained on without being asked to
    run = axolotl("train", recipe(path), "--launcher", "python")
    assert run.returncode == 0, run.stderr[-2000:]
    (counts,) = json.loads((tmp_path / "out/trace_stripping.json").read_text())["datasets"]
    assert (counts["rows"], counts["kept"]) == (5, 3)
    assert len(list(tmp_path.glob("prepared/*/dataset_info.json"))) == 2
