"""What is found out before anything loads: each mistake on a copy of the embedded pair."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_runs import task

from harness import checks
from harness.cli.plan import totals
from harness.costs.estimate import Estimate
from harness.errors import LoopError, StageError

CHECKPOINT = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
)


@pytest.fixture
def pair(recipes: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A pair to break."""
    copies = (tmp_path / "instruct", tmp_path / "thinking")
    for copy in copies:
        shutil.copytree(recipes / "mini" / copy.name, copy)
    return copies


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


# --- a checkpoint and its twin ---


def test_the_embedded_pair_fits(pair: tuple[Path, Path]) -> None:
    for folder, role in zip(pair, ("instruct", "thinking"), strict=True):
        assert checks.local_checkpoint(str(folder), role) == (folder, "")
        checks.check_checkpoint(folder, role)
        assert not checks.is_tah(folder)
    checks.check_pair(*pair)


@pytest.mark.parametrize(
    "key",
    [
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "tie_word_embeddings",
    ],
)
def test_another_shape(pair: tuple[Path, Path], key: str) -> None:
    edit(pair[1] / "config.json", lambda config: config.update({key: "other"}))
    with pytest.raises(LoopError, match=f"^the pair does not fit: {key} is .* and other in {pair[1]}\n"):
        checks.check_pair(*pair)
    edit(pair[1] / "config.json", lambda config: config.pop(key))
    with pytest.raises(LoopError, match=f"^the pair does not fit: {key} is .* and None in "):
        checks.check_pair(*pair)


@pytest.mark.parametrize("key", ["_name_or_path", "transformers_version", "use_cache", "eos_token_id"])
def test_what_is_no_shape_may_differ(pair: tuple[Path, Path], key: str) -> None:
    edit(pair[1] / "config.json", lambda config: config.update({key: "other"}))
    checks.check_pair(*pair)


def test_another_tokenizer(pair: tuple[Path, Path]) -> None:
    def swap(tokenizer: dict[str, Any]) -> None:
        vocabulary = tokenizer["model"]["vocab"]
        a, b = list(vocabulary)[-2:]
        vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]

    edit(pair[0] / "tokenizer.json", swap)
    with pytest.raises(LoopError, match="the pair's tokenizers differ in 4 entries"):
        checks.check_pair(*pair)


@pytest.mark.parametrize("content", ["", "{}", '{"version": "1.0"', "[1]"])
def test_a_tokenizer_that_is_none(pair: tuple[Path, Path], content: str) -> None:
    (pair[1] / "tokenizer.json").write_text(content)
    with pytest.raises(LoopError, match="not a tokenizer") as caught:
        checks.check_pair(*pair)
    assert str(caught.value).startswith(str(pair[1] / "tokenizer.json"))
    assert len(str(caught.value).splitlines()) == 1


def test_weights_of_another_shape_under_the_same_config(pair: tuple[Path, Path]) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(pair[1] / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1].copy()
    save_file(weights, pair[1] / "model.safetensors")
    with pytest.raises(LoopError, match=r"model\.norm\.weight is \[128\] .* and \[127\]"):
        checks.check_pair(*pair)


def test_weights_in_several_files_are_the_same_weights_and_a_missing_file_is_missed(pair: tuple[Path, Path]) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(pair[1] / "model.safetensors")
    (pair[1] / "model.safetensors").unlink()
    halves = [dict(list(weights.items())[start::2]) for start in (0, 1)]
    for number, half in enumerate(halves, start=1):
        save_file(half, pair[1] / f"model-{number:05d}-of-00002.safetensors")
    checks.check_checkpoint(pair[1], "thinking")
    checks.check_pair(*pair)
    (pair[1] / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(LoopError, match=r"and missing in .*thinking"):
        checks.check_pair(*pair)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors", "chat_template.jinja"])
def test_a_checkpoint_with_a_file_missing(pair: tuple[Path, Path], file: str) -> None:
    (pair[0] / file).unlink()
    with pytest.raises(LoopError, match=r"^--instruct ") as caught:
        checks.check_checkpoint(pair[0], "instruct")
    assert str(pair[0]) in str(caught.value)


def test_a_chat_template_may_lie_in_the_tokenizer_s_config(pair: tuple[Path, Path]) -> None:
    (pair[0] / "chat_template.jinja").unlink()
    edit(pair[0] / "tokenizer_config.json", lambda config: config.update(chat_template="{{ messages }}"))
    checks.check_checkpoint(pair[0], "instruct")


@pytest.mark.parametrize("content", [b"", b"\x08", b"\xff" * 8, b"\x10\x00\x00\x00\x00\x00\x00\x00{broken"])
def test_weights_cut_off(pair: tuple[Path, Path], content: bytes) -> None:
    (pair[0] / "model.safetensors").write_bytes(content)
    with pytest.raises(LoopError, match="not a whole safetensors file"):
        checks.check_pair(*pair)


def test_what_a_desktop_leaves_beside_the_weights_is_no_weights(pair: tuple[Path, Path]) -> None:
    for folder in pair:
        (folder / "._model.safetensors").write_bytes(b"\x00\x05\x16\x07")
        (folder / ".DS_Store").write_bytes(b"\x00")
    checks.check_pair(*pair)


@pytest.mark.parametrize("content", ["[]", "3", "null", "{"])
def test_a_config_that_is_none(pair: tuple[Path, Path], content: str) -> None:
    (pair[1] / "config.json").write_text(content)
    with pytest.raises(LoopError) as caught:
        checks.check_pair(*pair)
    assert str(pair[1] / "config.json") in str(caught.value)


# --- where a checkpoint is ---


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/no/such/place", "~/nowhere/x", "a/b/c", "nowhere@v1"])
def test_no_such_checkpoint(name: str) -> None:
    with pytest.raises(LoopError, match=f"^--thinking {name}: no such folder, and not a hub id"):
        checks.local_checkpoint(name, "thinking")


@pytest.mark.parametrize("name", ["no-such-owner/no-such-model", "no-such-owner/no-such-model@v1.0"])
def test_a_hub_that_does_not_answer(name: str) -> None:
    with pytest.raises(LoopError, match=r"the hub did not give it") as caught:
        checks.local_checkpoint(name, "instruct")
    assert len(str(caught.value).splitlines()) == 2
    assert name in str(caught.value)


COMMIT, OLDER = "c0ffee" + "0" * 34, "0ddba11" + "0" * 33


def lay_down(repository: Path, commit: str, reference: str, files: dict[str, bytes]) -> None:
    """A snapshot of a repository as the hub's client leaves it: a reference, and links to blobs."""
    snapshot = repository / "snapshots" / commit
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / reference).write_text(commit)
    for name, content in files.items():
        blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))


@pytest.fixture(scope="module")
def hub(recipes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A HF_HOME with the embedded instruct checkpoint in it, in two versions, and once with a file written over."""
    home = tmp_path_factory.mktemp("hub")
    files = {name: (recipes / "mini/instruct" / name).read_bytes() for name in CHECKPOINT}
    lay_down(home / "hub/models--owner--name", COMMIT, "main", files)
    lay_down(home / "hub/models--owner--name", OLDER, "v1.0", {**files, "chat_template.jinja": b"{{ older }}"})
    lay_down(home / "hub/models--owner--other", COMMIT, "main", {**files, "chat_template.jinja": b"{{ other }}"})
    return home


@pytest.fixture(scope="module")
def of_the_hub(hub: Path) -> dict[str, list[str]]:
    """Folder, name on the hub and identity of each, as a process finds them that has this HF_HOME and no network."""
    code = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from harness import checks, loop\n"
        "from harness.store import Known\n"
        "found = {}\n"
        "for name in sys.argv[1:]:\n"
        "    folder, on_hub = checks.local_checkpoint(name, 'instruct')\n"
        "    checks.check_checkpoint(folder, 'instruct')\n"
        "    known = Known(Path('/nowhere'), lambda *read: sys.exit(f'read {read}'))\n"
        "    found[name] = [str(folder), on_hub, loop.identified(folder, on_hub, known).identity]\n"
        "print(json.dumps(found))\n"
    )
    unset = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment |= {"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"}
    names = ["owner/name", "owner/name@v1.0", f"owner/name@{COMMIT}", "owner/other"]
    said = subprocess.run(
        [sys.executable, "-c", code, *names], capture_output=True, text=True, check=False, env=environment
    )
    assert said.returncode == 0, said.stderr
    return json.loads(said.stdout)  # type: ignore[no-any-return]


def test_a_checkpoint_of_the_hub_is_its_commit_and_nothing_of_it_is_read(
    hub: Path, of_the_hub: dict[str, list[str]]
) -> None:
    folder, on_hub, identity = of_the_hub["owner/name"]
    assert folder == str(hub / "hub/models--owner--name/snapshots" / COMMIT)
    assert on_hub == f"owner/name@{COMMIT}"
    assert identity.startswith(on_hub)
    assert of_the_hub[f"owner/name@{COMMIT}"] == of_the_hub["owner/name"]


def test_a_revision_of_the_hub_is_another_checkpoint(hub: Path, of_the_hub: dict[str, list[str]]) -> None:
    folder, on_hub, identity = of_the_hub["owner/name@v1.0"]
    assert folder == str(hub / "hub/models--owner--name/snapshots" / OLDER)
    assert on_hub == f"owner/name@{OLDER}"
    assert identity != of_the_hub["owner/name"][2]


def test_a_commit_with_a_file_written_over_is_another_checkpoint(of_the_hub: dict[str, list[str]]) -> None:
    ours, theirs = (of_the_hub[name][2].partition(COMMIT) for name in ("owner/name", "owner/other"))
    assert ours[1] == theirs[1] == COMMIT
    assert ours[2] != theirs[2]


# --- prompts, tasks, room ---


def test_a_prompts_file_is_checked_to_the_line(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"problem": "1+1?"}\n{"problem": "2+2?"\n')
    with pytest.raises(LoopError, match=rf"^--prompts {file}:2: "):
        checks.checked_prompts(file)
    with pytest.raises(LoopError, match=r"^--prompts .*none\.jsonl: cannot be read"):
        checks.checked_prompts(tmp_path / "none.jsonl")
    file.write_text('{"problem": "1+1?", "answer": "2"}\n{"id": "b", "prompt": "2+2?"}\n')
    assert checks.checked_prompts(file) == [
        {"id": "1", "messages": [{"role": "user", "content": "1+1?"}]},
        {"id": "b", "messages": [{"role": "user", "content": "2+2?"}]},
    ]


PROMPTS, TEST = task("mini_prompts", conversations=True), task("mini_math", conversations=False)


def test_tasks_that_let_a_checkpoint_write_will_do() -> None:
    checks.check_tasks([PROMPTS], [TEST, task("often", repeats=8), task("theirs", grades_traces=False)])
    checks.check_tasks([], [TEST])


@pytest.mark.parametrize("output_type", ["multiple_choice", "loglikelihood", "loglikelihood_rolling"])
def test_a_task_that_compares_likelihoods_is_refused_wherever_it_is_named(output_type: str) -> None:
    compares = task("hellaswag", output_type=output_type)
    for prompts, tests in (([compares], [TEST]), ([PROMPTS], [TEST, compares])):
        with pytest.raises(LoopError, match=rf"^task hellaswag is {output_type}: .*\n.*generate_until") as caught:
            checks.check_tasks(prompts, tests)
        assert len(str(caught.value).splitlines()) == 2


def test_prompts_that_are_no_conversations_are_refused() -> None:
    with pytest.raises(LoopError, match=r"^task mini_math asks no prompts that can be learnt from"):
        checks.check_tasks([PROMPTS, TEST], [TEST])


def test_t_is_not_chosen_by_the_test() -> None:
    held_out = task("held_out")
    checks.check_tasks([PROMPTS], [TEST], [held_out])
    with pytest.raises(LoopError, match=r"^validate: mini_math is scored, too: .* that is not in tasks:$"):
        checks.check_tasks([PROMPTS], [TEST], [held_out, TEST])
    with pytest.raises(LoopError, match=r"^task mini_prompts asks training prompts"):
        checks.check_tasks([PROMPTS], [TEST], [PROMPTS])
    with pytest.raises(LoopError, match=r"^task hellaswag is multiple_choice"):
        checks.check_tasks([PROMPTS], [TEST], [task("hellaswag", output_type="multiple_choice")])


def test_training_prompts_have_no_answers_to_score() -> None:
    with pytest.raises(LoopError, match=r"^task mini_prompts asks training prompts"):
        checks.check_tasks([PROMPTS], [TEST, PROMPTS])


# --- what a tool left ---


def test_a_checkpoint_that_a_tool_left_whole_lacks_nothing(pair: tuple[Path, Path]) -> None:
    assert checks.lost(pair[0], pair[1]) == []


@pytest.mark.parametrize("name", CHECKPOINT)
@pytest.mark.parametrize("kept", [0, 0.5])
def test_what_a_tool_left_half_written_is_named(pair: tuple[Path, Path], name: str, kept: float) -> None:
    file = pair[0] / name
    file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    # Half a text is a text: that mergekit could not copy one, `reconstruct` is told by its log.
    assert checks.lost(pair[0], pair[1]) == ([] if kept and name == "chat_template.jinja" else [name])


@pytest.mark.parametrize("name", CHECKPOINT)
def test_what_a_tool_did_not_leave_is_named(pair: tuple[Path, Path], name: str) -> None:
    (pair[0] / name).unlink()
    assert checks.lost(pair[0], pair[1]) == ([] if name == "generation_config.json" else [name])  # not all have one


def test_a_shard_that_the_index_names_is_missed(pair: tuple[Path, Path]) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (pair[0] / "model.safetensors.index.json").write_text(json.dumps(index))
    assert checks.lost(pair[0]) == ["model-2.safetensors"]


@pytest.mark.parametrize(("number", "mend"), [(errno.EACCES, "set HF_HOME to a folder"), (errno.ENOSPC, "free some")])
def test_a_hub_s_checkpoint_that_cannot_be_kept(number: int, mend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), "/home/me/.cache/huggingface")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refused)
    with pytest.raises(LoopError, match=f"^--instruct owner/name: .*{mend}") as caught:
        checks.local_checkpoint("owner/name", "instruct")
    assert "network" not in str(caught.value)


# --- the disk ---


def disk(free: int) -> Callable[[object], Any]:
    found = shutil.disk_usage("/")._replace(free=free)
    return lambda place: found


def test_room_for_all_checkpoints_and_a_merge_under_way(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (pair[0] / "model.safetensors").stat().st_size
    root = tmp_path / "runs" / "new" / "stages"  # which is not there yet
    checks.check_disk(root, pair[0], 3)
    monkeypatch.setattr(shutil, "disk_usage", disk(4 * size))
    checks.check_disk(root, pair[0], 2)
    with pytest.raises(
        LoopError, match=r"^no disk space: 4 checkpoints need 0\.0 GB, .* has 0\.0 GB\n.*gc.*--out"
    ) as caught:
        checks.check_disk(root, pair[0], 4)
    assert str(tmp_path) in str(caught.value)
    assert not isinstance(caught.value, StageError)  # nothing has been run


def test_a_run_is_refused_where_its_plan_says_that_the_disk_is_too_small(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (pair[0] / "model.safetensors").stat().st_size
    lines = [Estimate(name, "", (1, 2), 0.0, leaves=2.0 * size) for name in ("distill", "reconstruct")]
    most = totals(lines, None)["disk_peak"] or 0.0
    monkeypatch.setattr(shutil, "disk_usage", disk(round(most) + 1))
    checks.check_disk(tmp_path, pair[0], 4)
    monkeypatch.setattr(shutil, "disk_usage", disk(round(most) - 1))
    with pytest.raises(LoopError, match="no disk space: 4 checkpoints"):
        checks.check_disk(tmp_path, pair[0], 4)


def test_a_run_that_writes_no_checkpoint_needs_no_room_for_one(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", disk(0))
    checks.check_disk(tmp_path, pair[0], 0)


def test_what_is_needed_is_said_in_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(8_000_000_000)  # a hole
    monkeypatch.setattr(shutil, "disk_usage", disk(3_000_000_000))
    with pytest.raises(LoopError, match=r"1 checkpoints? needs? 16\.8 GB, .* has 3\.0 GB"):
        checks.check_disk(tmp_path, tmp_path, 1)


# --- several processes, and none of the devices that a recipe asks for ---

SHARES = {"fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}, "save_strategy": "no"}


@pytest.mark.parametrize(
    ("recipe", "launcher", "said"),
    [
        ({"fsdp_config": {"x": 1}}, "python", r"fsdp_config: shares a model out .*--set 'launcher=torchrun"),
        ({"deepspeed": "zero2.json"}, "python", r"deepspeed: shares a model out"),
        ({"deepspeed": "zero2.json"}, "torchrun --nproc_per_node=2", r"deepspeed: zero2\.json: no such file here or"),
        ({"deepspeed": {"bf16": {}}}, "torchrun --nproc_per_node=2", r"deepspeed: is not installed; pip install"),
        (SHARES, "torchrun", r"in shares, which .*--set distill\.fsdp_config\.final_state_dict_type=FULL_STATE_DICT"),
    ],
)
def test_what_several_processes_would_not_end_well_is_refused(recipe: dict[str, Any], launcher: str, said: str) -> None:
    with pytest.raises(LoopError, match=said):
        checks.check_processes(recipe, launcher)


@pytest.mark.parametrize(
    ("recipe", "launcher"),
    [
        ({}, "python"),
        ({"adapter": "qlora"}, "torchrun --nproc_per_node=2"),
        ({**SHARES, "adapter": "lora"}, "torchrun"),  # saved whole
        ({**SHARES, "save_strategy": "epoch"}, "torchrun"),  # put together by Axolotl
        ({"fsdp_config": {**SHARES["fsdp_config"], "final_state_dict_type": "FULL_STATE_DICT"}}, "accelerate"),
    ],
)
def test_and_what_would_is_not(recipe: dict[str, Any], launcher: str) -> None:
    checks.check_processes(recipe, launcher)


@pytest.mark.parametrize(
    ("recipes", "said"),
    [
        ({"distill": {"bf16": True}}, r"^distill recipe: bf16: true: no accelerator .*--set distill\.bf16=false"),
        (
            {"distill": {}, "generate": {"device": "cuda:0"}},
            r"^generate recipe: device: cuda:0: .*device=cpu",
        ),
    ],
)
def test_a_recipe_made_for_a_card_is_refused_where_there_is_none_such(recipes: dict[str, Any], said: str) -> None:
    with pytest.raises(LoopError, match=said):
        checks.check_accelerator(recipes, there=False)
    checks.check_accelerator(recipes, there=True)
    checks.check_accelerator({"distill": {"bf16": "auto"}}, there=True, bf16=False)
    with pytest.raises(LoopError, match=r"bf16: true: this card is older .*--set distill\.bf16=auto"):
        checks.check_accelerator({"distill": {"bf16": True}}, there=True, bf16=False)
    checks.check_accelerator({"distill": {"bf16": False}, "generate": {"device": "cpu"}}, there=False)
