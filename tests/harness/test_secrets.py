"""A secret of the environment is in nothing that a run writes, says or publishes; one in a setting is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small import small_loop, ts_loop

PLANTED = {
    name: f"{prefix}{name.lower()}0123456789abcdef"
    for name, prefix in {
        "HF_TOKEN": "hf_",
        "HUGGING_FACE_HUB_TOKEN": "hf_",
        "WANDB_API_KEY": "",
        "OPENAI_API_KEY": "sk-",
        "ON_POLICY_KL_API_KEY": "sk-",
        "AWS_SECRET_ACCESS_KEY": "",
    }.items()
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("distill", ["answers", "on-policy"])
def test_no_secret_is_kept_said_or_published(
    recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, distill: str
) -> None:
    """A whole run, its page, its plan, what the doctor says, what is exported, and what is said where it goes wrong."""
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    config = small_loop(recipes, tmp_path / "mine", limit=8)
    said = []

    def run(*options: object, code: int = 0) -> None:
        ended = ts_loop(*options, code=code)
        said.append(ended.stdout + ended.stderr)

    where = ["--config", config, "--out", tmp_path / "runs"]
    publish = ["export", "small", "--out", tmp_path / "runs", "--license", "mit"]
    run(*where, "--distill", distill)
    run("plan", *where)
    run("doctor", "--config", config, "--out", tmp_path / "runs", "--json")
    run("logs", "small", "--out", tmp_path / "runs", "-n", 100_000)
    run(*publish, "--to", tmp_path / "published")
    run(*publish, "--to", tmp_path / "pushed", "--push", "me/x", code=1)
    run(*where, "--instruct", "me/gated", code=2)
    run(*where, "--name", "broken", "--set", "generate.model_args.dtype=none_such", code=1)
    run(*where, "--set", f"generate.model_args.token={PLANTED['HF_TOKEN']}", code=2)
    for what in said:
        assert not [name for name, value in PLANTED.items() if value in what]
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} >= {".txt", ".yml", ".json", ".jsonl", ".html", ".md", ".safetensors"}
    found = [(name, file) for file in files for name, value in PLANTED.items() if value.encode() in file.read_bytes()]
    assert found == []
    assert json.loads((tmp_path / "runs/small/results.json").read_text())["rows"]
