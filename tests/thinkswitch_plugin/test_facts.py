"""Facts of a dataset, from where they are counted to the file beside the checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest

from thinkswitch_plugin.facts import attach, attached, publish, write_json


def dataset(path: str, described: str = "", rows: int = 3) -> datasets.Dataset:
    """A prepared dataset with facts, or with a description of somebody else's."""
    made = datasets.Dataset.from_dict({"input_ids": [[at] for at in range(rows)]})
    if described:
        made.info.description = described
    else:
        attach(made, "mine", {"path": path, "rows": rows, "note": "two\nlines"})
    return made


def test_facts_survive_what_axolotl_does_to_a_dataset(tmp_path: Path) -> None:
    from axolotl.utils.data.shared import merge_datasets
    from axolotl.utils.dict import DictDefault

    parts = [dataset("a"), dataset("", "A set of somebody else's."), dataset("b", rows=4)]
    merged = merge_datasets(parts, DictDefault({"shuffle_merged_datasets": True, "seed": 1}))
    merged.filter(lambda row: row["input_ids"] != [0]).save_to_disk(str(tmp_path / "kept"))
    found = attached(datasets.load_from_disk(str(tmp_path / "kept")).train_test_split(0.4)["train"], "mine")
    assert [(facts["path"], facts["rows"], facts["note"]) for facts in found] == [
        ("a", 3, "two\nlines"),
        ("b", 4, "two\nlines"),
    ]
    assert attached(merged, "other") == []


@pytest.mark.parametrize("first", [True, False])
def test_the_first_process_alone_writes_them(tmp_path: Path, first: bool) -> None:
    trainer = SimpleNamespace(train_dataset=dataset("a"), is_world_process_zero=lambda: first)
    publish(trainer, "mine", tmp_path / "out")
    assert [file.name for file in tmp_path.rglob("*.*")] == (["mine.json"] if first else [])
    if first:
        facts = json.loads((tmp_path / "out/mine.json").read_text())
        assert facts == {"datasets": [{"path": "a", "rows": 3, "note": "two\nlines"}]}


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    write_json(tmp_path / "facts.json", {"n": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "facts.json", {"n": object()})
    assert json.loads((tmp_path / "facts.json").read_text()) == {"n": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_reading_facts_stays_light() -> None:
    code = (
        "import sys; from thinkswitch_plugin.trace_stripping.report import sentence; "
        "from thinkswitch_plugin.on_policy_kl.report import sentence; "
        "print([m for m in ('axolotl', 'torch', 'transformers', 'datasets', 'pydantic') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
