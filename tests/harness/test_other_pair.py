"""Another pair, unchanged software: other weights, another vocabulary, one's own prompts and one's own task."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from small import run_here

from harness.runner import LocalRunner

OWN_TASK = {  # that knows nothing of traces: lm-eval's own score of a thinking checkpoint is 0
    "task": "my_sums",
    "dataset_path": "json",
    "test_split": "train",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "\\boxed{ {{- answer -}} }",
    "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": 64},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def renumbered(source: Path, target: Path, order: list[int]) -> None:
    """The same checkpoint with its tokens under other ids, three unused ids, and every weight a little off."""
    shutil.copytree(source, target)
    weights = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    changed = {name: w * (1 + 1e-3 * torch.randn(w.shape, generator=generator)) for name, w in weights.items()}
    table = changed["model.embed_tokens.weight"]
    new = torch.zeros(len(order), table.shape[1])
    new[torch.tensor(order[: table.shape[0]])] = table
    save_file({**changed, "model.embed_tokens.weight": new}, target / "model.safetensors", metadata={"format": "pt"})

    def edit(name: str, change: Any) -> None:
        value = json.loads((target / name).read_text())
        change(value)
        (target / name).write_text(json.dumps(value))

    def tokens(tokenizer: dict[str, Any]) -> None:
        vocabulary = tokenizer["model"]["vocab"]
        tokenizer["model"]["vocab"] = {token: order[index] for token, index in vocabulary.items()}
        for added in tokenizer["added_tokens"]:
            added["id"] = order[added["id"]]

    def ids(config: dict[str, Any]) -> None:
        for key in ("eos_token_id", "pad_token_id"):
            value = config.get(key)
            config[key] = [order[v] for v in value] if isinstance(value, list) else order[value]
        if "vocab_size" in config:
            config["vocab_size"] = len(order)

    edit("tokenizer.json", tokens)
    edit("config.json", ids)
    edit("generation_config.json", ids)


@pytest.fixture(scope="module")
def pair(recipes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("other")
    size = json.loads((recipes / "mini/instruct/config.json").read_text())["vocab_size"]
    # The tags are added tokens, which must come after all others.
    others = len(json.loads((recipes / "mini/instruct/tokenizer.json").read_text())["model"]["vocab"])
    order = [*random.Random(7).sample(range(others), others), *range(others, size + 3)]
    for who in ("instruct", "thinking"):
        renumbered(recipes / "mini" / who, folder / who, order)
    return folder / "instruct", folder / "thinking"


def test_own_pair_prompts_and_task(
    pair: tuple[Path, Path], recipes: Path, repository: Path, tmp_path: Path, runner: LocalRunner
) -> None:
    math = repository / "tasks" / "mini_math"
    prompts = [json.loads(line)["question"] for line in (math / "prompts.jsonl").open()][:30]
    rows: list[dict[str, Any]] = [{"problem": text} for text in prompts[:10]]
    rows += [{"prompt": text} for text in prompts[10:20]]
    rows += [{"messages": [{"role": "user", "content": text}]} for text in prompts[20:]]
    mine = tmp_path / "mine, all of them.jsonl"
    mine.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    task = tmp_path / "tasks" / "my_sums.yaml"
    task.write_text(yaml.safe_dump({**OWN_TASK, "dataset_kwargs": {"data_files": {"train": str(math / "test.jsonl")}}}))
    instruct, thinking = map(str, pair)
    asked: dict[str, Any] = {
        "instruct": instruct,
        "thinking": thinking,
        "prompts": [str(mine)],
        "tasks": ["my_sums"],
        "include_path": tmp_path / "tasks",
        "name": "own",
        "iterations": 1,
        "limit": 60,
    }
    ran = run_here(recipes / "loop.yml", tmp_path / "runs", runner, **asked)
    start = {row["checkpoint"]: row for row in ran.results["rows"] if row["iteration"] == 0}
    assert start["instruct"]["n"] == 60
    assert 0.15 < start["instruct"]["accuracy"] < 0.5
    assert start["thinking"]["accuracy"] > 0.75  # by lm-eval, which compares the trace too, 0
    (said,) = (ran.folder / "iter_00/evaluate_thinking/answers").glob("results_*.json")
    assert json.loads(said.read_text())["results"]["my_sums"]["exact_match,none"] == 0
    assert start["thinking"]["closed_traces"] > 0.95
    assert len(ran.results["rows"]) == 4

    # A task that is changed is another one: what asks it runs again, and nothing else.
    task.write_text(task.read_text().replace("max_gen_toks: 64", "max_gen_toks: 63"))
    changed = run_here(recipes / "loop.yml", tmp_path / "runs", runner, **asked)
    assert "evaluate_thinking: my_sums: its definition changed" in changed.said
    stale = {name for name, key in changed.keys.items() if key != ran.keys[name]}
    assert stale == {f"{k}/evaluate_{who}" for k in (0, 1) for who in ("instruct", "thinking")}
