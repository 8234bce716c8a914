"""Recipes for a pair of one's own: what they say on which card, and that the tools take them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import foreign
import pytest
import yaml
from small import command_here, ts_loop

from harness import own
from harness.card import Card, of_size
from harness.config import load, read_recipes
from harness.errors import LoopError

QWEN3 = {  # layers, hidden, intermediate, heads, head shared with the embedding
    "0.6B": (28, 1024, 3072, 16, True),
    "4B": (36, 2560, 9728, 32, True),
    "8B": (36, 4096, 12288, 32, False),
    "14B": (40, 5120, 17408, 40, False),
}
CPU = Card("a CPU with 16 GB of memory", int(13e9), False, False)
SAID = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "do_sample": True}


def described(folder: Path, size: str, generation: dict[str, Any] = SAID, card: str = "") -> Path:
    """A Qwen3 as its config describes it; no weights."""
    layers, hidden, intermediate, heads, tied = QWEN3[size]
    folder.mkdir(parents=True)
    config = {
        "model_type": "qwen3",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 262_144,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(generation))
    if card:
        (folder / "README.md").write_text(card)
    return folder


def recipes_for(folder: Path, card: Card, **wanted: Any) -> dict[str, Any]:
    """All that would be written for a pair, read back: file name → settings."""
    asks = own.Wanted("mine", "/there/instruct", "/there/thinking", "mine", **wanted)
    written = own.write(asks, {"instruct": folder, "thinking": folder}, card)
    return {name: yaml.safe_load(text) for name, text in written.texts.items()}


@pytest.mark.parametrize(
    ("size", "gigabytes", "nf4", "tokens", "batch"),
    [
        ("0.6B", 8, False, 32_768, 1),
        ("4B", 8, True, 16_384, 1),
        ("4B", 24, False, 32_768, 2),
        ("8B", 8, True, 4_096, 1),
        ("14B", 80, False, 32_768, 8),
    ],
)
def test_precision_length_and_batch_follow_from_the_card(
    tmp_path: Path, size: str, gigabytes: int, nf4: bool, tokens: int, batch: int
) -> None:
    found = recipes_for(described(tmp_path / size, size), of_size(gigabytes))
    assert found["loop.yml"].get("nf4", False) == nf4
    assert found["generate.yml"]["gen_kwargs"] == {**SAID, "max_gen_toks": tokens}
    assert found["generate.yml"]["batch_size"] == batch
    assert found["generate.yml"]["device"] == "cuda:0"
    assert found["distill.yml"]["bf16"] is True


@pytest.mark.parametrize(("size", "gigabytes"), [("4B", 8), ("8B", 8), ("8B", 12), ("8B", 24), ("0.6B", 4)])
def test_rows_are_as_long_as_a_step_can_hold_and_leave_room_for_the_prompt(
    tmp_path: Path, size: str, gigabytes: int
) -> None:
    found = recipes_for(described(tmp_path / size, size), of_size(gigabytes))
    learnt, judged = found["distill.yml"], found["on_policy.yml"]
    assert (size, gigabytes, learnt["sequence_len"]) in {
        ("4B", 8, 4096),
        ("8B", 8, 1024),
        ("8B", 12, 4096),
        ("8B", 24, 4096),
        ("0.6B", 4, 4096),
    }
    assert judged["on_policy_kl"]["max_new_tokens"] <= judged["sequence_len"] // 4
    assert judged["learning_rate"] == pytest.approx(learnt["learning_rate"] / 2)


def test_a_pair_that_cannot_fit_is_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(LoopError, match=r"in NF4 and what surrounds them take 1\d\.\d GB, a GPU of 8 GB gives 8\.2"):
        recipes_for(described(tmp_path / "14B", "14B"), of_size(8))


def test_a_cpu_gets_float32_and_no_kernels(tmp_path: Path) -> None:
    found = recipes_for(described(tmp_path / "0.6B", "0.6B"), CPU)
    assert "nf4" not in found["loop.yml"]
    assert "jobs" not in found["loop.yml"], "two stages of such a model would take all the memory"
    assert found["evaluate.yml"]["model_args"]["dtype"] == "float32"
    assert (found["distill.yml"]["bf16"], found["distill.yml"]["lora_mlp_kernel"]) == (False, False)
    assert len(found["distill.yml"]["plugins"]) == 1, "Liger's kernels are a GPU's"


@pytest.mark.parametrize(
    ("generation", "card", "sampling", "tokens"),
    [
        ({}, "", {"do_sample": False}, 32_768),
        ({"do_sample": True}, "", {"do_sample": False}, 32_768),
        ({"do_sample": False, "temperature": 0.6}, "", {"do_sample": False}, 32_768),
        ({"temperature": 0.7, "top_k": 20}, "", {"do_sample": True, "temperature": 0.7, "top_k": 20}, 32_768),
        ({"max_new_tokens": 20}, "", {"do_sample": False}, 32_768),
        ({"max_new_tokens": 2048}, "an output length of 9,000 tokens", {"do_sample": False}, 2048),
        ({}, "We recommend using an output length of 16,384 tokens for most.", {"do_sample": False}, 16_384),
    ],
)
def test_sampling_and_length_are_the_checkpoint_s_own(
    tmp_path: Path, generation: dict[str, Any], card: str, sampling: dict[str, Any], tokens: int
) -> None:
    found = recipes_for(described(tmp_path / "0.6B", "0.6B", generation, card), of_size(24))
    for name in ("generate.yml", "evaluate.yml", "evaluate_thinking.yml"):
        assert found[name]["gen_kwargs"] == {**sampling, "max_gen_toks": tokens}


@pytest.mark.parametrize(("count", "rows"), [(1, 4), (15, 4), (64, 8), (512, 64), (100_000, 64)])
def test_few_prompts_get_small_steps(tmp_path: Path, count: int, rows: int) -> None:
    found = recipes_for(described(tmp_path / "4B", "4B"), of_size(24), prompts=["/there/mine.csv"], count=count)
    for name in ("distill.yml", "on_policy.yml"):
        assert found[name]["micro_batch_size"] * found[name]["gradient_accumulation_steps"] == rows
    assert found["generate.yml"]["tasks"] == ["prompts_file"]
    assert found["generate.yml"]["metadata"] == {"prompts_file": "/there/mine.csv"}


@pytest.mark.parametrize(("hidden", "rate"), [(128, 2e-3), (1024, 5e-4), (2560, 2e-4), (5120, 1e-4), (8192, 1e-4)])
def test_the_learning_rate_falls_with_the_width(hidden: int, rate: float) -> None:
    assert own.learning_rate(hidden) == pytest.approx(rate)


def test_names_that_yaml_would_read_otherwise_survive(tmp_path: Path) -> None:
    folder = described(tmp_path / "0.6B", "0.6B")
    odd = own.Wanted("it's: mine", "/a: b/#1", "owner/name@v1", "mine", ["/x, y.csv"], ["a", "b"], Path("/t: t"))
    texts = own.write(odd, {"instruct": folder, "thinking": folder}, CPU).texts
    found = {name: yaml.safe_load(text) for name, text in texts.items()}
    assert found["loop.yml"]["instruct"] == found["distill.yml"]["base_model"] == "/a: b/#1"
    assert found["loop.yml"]["prompts"] == ["/x, y.csv"]
    assert found["loop.yml"]["include_path"] == "/t: t"
    assert found["reconstruct.yml"]["base_model"] == "owner/name@v1"


@pytest.fixture(scope="module")
def grown(recipes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return foreign.grown(recipes, tmp_path_factory.mktemp("grown"))


def options(grown: dict[str, Path], repository: Path) -> list[object]:
    asks = ["--prompts", repository / "tasks/mini_math/prompts.jsonl", "--tasks", "mini_math"]
    return ["--instruct", grown["instruct"], "--thinking", grown["thinking"], *asks]


def test_init_writes_a_folder_that_the_loop_takes(
    grown: dict[str, Path],
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command_here(monkeypatch, "init", "mine", *options(grown, repository)) == 0
    said = capsys.readouterr().out
    assert "320 tokens at most: its card says so" in said
    assert "ts-loop --config mine/loop.yml" in said
    config = load(tmp_path / "mine/loop.yml", {})
    assert (config.name, config.tasks, config.jobs) == ("mine", ["mini_math"], 2)
    recipes = read_recipes(config)
    assert recipes["generate"]["gen_kwargs"] == {"do_sample": True, **foreign.SAMPLING, "max_gen_toks": 320}
    assert recipes["distill"]["sequence_len"] == 768
    assert recipes["reconstruct"]["dtype"] == "bfloat16"
    assert command_here(monkeypatch, "init", "mine", *options(grown, repository)) == 2, "edits would be lost"
    assert "mine/loop.yml: is there already" in capsys.readouterr().err


def test_init_refuses_what_cannot_work_before_it_writes(
    grown: dict[str, Path], recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    pair = ["--instruct", grown["instruct"], "--thinking"]
    for more, says in (
        ([recipes / "mini/thinking"], "the pair does not fit: intermediate_size is 384"),
        (["nowhere"], "no such folder, and not a hub id"),
        (["no/where"], "the hub did not give it"),
        ([grown["thinking"], "--prompts", "none.csv"], "none.csv: cannot be read"),
    ):
        assert command_here(monkeypatch, "init", "mine", *pair, *more) == 2
        said = capsys.readouterr().err
        assert says in said
        assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_without_a_config_a_foreign_pair_gets_recipes_of_its_own_and_is_told(
    grown: dict[str, Path], repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command_here(monkeypatch, *options(grown, repository), "--iters", 1, "--dry-run") == 0
    assert "ts-loop init FOLDER" in capsys.readouterr().err
    (generate,) = tmp_path.glob("runs/stages/generate-*/recipe.yml")
    assert yaml.safe_load(generate.read_text())["gen_kwargs"]["max_gen_toks"] == 320


def test_a_copy_of_the_embedded_pair_keeps_its_recipes(recipes: Path, tmp_path: Path) -> None:
    shutil.copytree(recipes / "mini" / "instruct", tmp_path / "instruct")
    pair = {"instruct": str(tmp_path / "instruct"), "thinking": str(recipes / "mini" / "thinking")}
    assert own.is_embedded(pair)


@pytest.mark.slow
def test_a_foreign_pair_gains_without_a_file_edited(grown: dict[str, Path], repository: Path, tmp_path: Path) -> None:
    ts_loop("init", "mine", *options(grown, repository), cwd=tmp_path)
    ts_loop("--config", "mine/loop.yml", "--iters", 1, "-q", cwd=tmp_path)
    gains(tmp_path / "runs" / "mine" / "results.json")


@pytest.mark.slow
def test_a_pair_of_another_family_gains_without_a_file_edited(
    recipes: Path, repository: Path, tmp_path: Path, tool: Any
) -> None:
    foreign.trained(recipes, tmp_path / "pair", lambda file: tool("axolotl", "train", file, "--launcher", "python"))
    pair = {who: tmp_path / "pair" / who for who in ("instruct", "thinking")}
    ts_loop(*options(pair, repository), "--name", "llama", "--iters", 1, "-q", cwd=tmp_path)
    gains(tmp_path / "runs" / "llama" / "results.json")


def gains(results: Path) -> None:
    """Labels closed, instruct learnt, thinking still closes its traces."""
    rows = {(row["iteration"], row["checkpoint"]): row for row in json.loads(results.read_text())["rows"]}
    assert rows[0, "thinking"]["closed_traces"] > 0.9
    assert rows[1, "thinking"]["closed_traces"] > 0.9
    assert rows[1, "instruct"]["ci95"][0] > rows[0, "instruct"]["ci95"][1]
