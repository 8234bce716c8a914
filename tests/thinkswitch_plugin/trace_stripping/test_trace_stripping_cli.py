"""The recipe through Axolotl's own commands: the log line, the prepared set, and what training makes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

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


def bare(*command: Any) -> str:
    """As `tool`, in a process that has imported nothing yet: what a person starts. The suite's one `axolotl train`."""
    command = (Path(sys.executable).with_name(command[0]), *command[1:])
    said = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert said.returncode == 0, said.stdout[-2000:]
    return said.stdout


def test_prepared_then_trained_on_then_changed(
    recipe: Any, tool: Any, write_rows: Any, tokenizer: Any, tmp_path: Path
) -> None:
    path, file = write_rows(ROWS), tmp_path / "recipe.yml"
    file.write_text(yaml.safe_dump(recipe(path)), encoding="utf-8")
    said = tool("axolotl", "preprocess", file)
    assert len(shown(said, path)) == 1
    assert prepared(tmp_path, tokenizer) == {"It is 42.<|im_end|>", "42<|im_end|>"}
    assert not (tmp_path / "out/trace_stripping.json").exists()  # it is no training

    said = bare("axolotl", "train", file, "--launcher", "python")
    assert "Loading prepared dataset from disk" in said
    assert len(shown(said, path)) == 1
    (counts,) = json.loads((tmp_path / "out/trace_stripping.json").read_text())["datasets"]
    assert (counts["path"], counts["rows"], counts["kept"]) == (str(path), 4, 2)
    assert counts["dropped"] == {"empty_answer": 1, "unclosed": 1}

    write_rows([*ROWS, ROWS[0]])  # a changed file is trained on without being asked to
    tool("axolotl", "train", file, "--launcher", "python")
    (counts,) = json.loads((tmp_path / "out/trace_stripping.json").read_text())["datasets"]
    assert (counts["rows"], counts["kept"]) == (5, 3)
    assert len(list(tmp_path.glob("prepared/*/dataset_info.json"))) == 2
