"""What a stage is: its key, its stand-ins, and what each kind makes of the recipe it is given."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from made_runs import VERSIONS, planned, task, toy

from harness.asking import Settings
from harness.config import LoopConfig, load, read_recipes, read_yaml, recipes_folder
from harness.errors import LoopError, StageError
from harness.stages import (
    External,
    Keys,
    Output,
    Recipe,
    Stage,
    differences,
    distill,
    dump,
    evaluate,
    generate,
    placed,
    reconstruct,
)

INSTRUCT, THINKING = External("/came/I", "identity of I"), External("/came/T", "identity of T")
ASKED = Settings(seed=7)


# --- stand-ins ---


def test_stand_ins_become_paths_at_any_depth_and_nothing_else_changes() -> None:
    recipe = {
        "base_model": "<<checkpoint>>",
        "datasets": [{"data_files": ["<<labels>>/samples_*.jsonl", "own.jsonl"]}],
        "output_dir": "<<stage>>/adapter",
        "text": "<stage> << stage >> <<other>>",
        "seed": 7,
        "on": True,
        "none": None,
    }
    before = copy.deepcopy(recipe)
    paths = {"stage": "/out/stages/distill-01", "checkpoint": "/came/I", "labels": "/out/stages/generate-01/answers"}
    assert placed(recipe, paths) == {
        **recipe,
        "base_model": "/came/I",
        "datasets": [{"data_files": ["/out/stages/generate-01/answers/samples_*.jsonl", "own.jsonl"]}],
        "output_dir": "/out/stages/distill-01/adapter",
    }
    assert recipe == before
    assert placed(("axolotl", "train", "<<stage>>/recipe.yml"), {"stage": "/s"}) == [
        "axolotl",
        "train",
        "/s/recipe.yml",
    ]


def test_a_path_that_looks_like_a_stand_in_is_a_path() -> None:
    paths = {"checkpoint": "/models/<<labels>>", "labels": "/out/answers", "stage": "/out/<<checkpoint>>"}
    assert placed("<<checkpoint>>", paths) == "/models/<<labels>>"
    assert placed("<<stage>>/recipe.yml", paths) == "/out/<<checkpoint>>/recipe.yml"


def test_a_recipe_on_disk_keeps_its_order_and_its_letters() -> None:
    recipe = {"z": 1, "a": {"y": "é", "b": [1e-4, "1e-4", None]}}
    text = dump(recipe)
    assert text.index("z:") < text.index("a:")
    assert "é" in text
    assert yaml.safe_load(text) == recipe


# --- differences ---


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"learning_rate": 0.002}, {"learning_rate": 0.001}, ["learning_rate 0.002 → 0.001"]),
        ({"a": {"b": {"c": "x"}}}, {"a": {"b": {"c": "y"}}}, ["a.b.c x → y"]),
        ({"a": [1, 2]}, {"a": [1, 3]}, ["a.1 2 → 3"]),
        ({"a": [1, 2]}, {"a": [1]}, ["a [1, 2] → [1]"]),
        ({}, {"adapter": "qlora"}, ["adapter nothing → qlora"]),
        ({"a": {"x": 1}}, {"a": 1}, ['a {"x": 1} → 1']),
        ({"a": 1, "b": 1}, {"b": 2, "a": 2}, ["a 1 → 2", "b 1 → 2"]),
        ({"bf16": True}, {"bf16": False}, ["bf16 true → false"]),
        ({"alpha": 1}, {"alpha": 1.0}, ["alpha 1 → 1.0"]),
        ({"flash": 1}, {"flash": True}, ["flash 1 → true"]),
        ({"a": "x" * 100}, {"a": "y"}, [f'a "{"x" * 56}... → y']),
    ],
)
def test_what_differs_is_said_a_line_each(old: Recipe, new: Recipe, said: list[str]) -> None:
    assert differences(old, new) == said


# --- keys ---

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
NAMES = st.text(max_size=6)
MATERIAL = st.dictionaries(
    NAMES,
    st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3)),
    min_size=1,
    max_size=4,
)


def leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of everything in a recipe that holds nothing further."""
    inside = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for name, inner in inside:
        yield from leaves(inner, (*place, name))
    if not inside:
        yield place


def changed(value: Any, place: Sequence[Any], leaf: Any) -> Any:
    if not place:
        return leaf
    result = copy.copy(value)
    result[place[0]] = changed(value[place[0]], place[1:], leaf)
    return result


def in_other_order(value: Any) -> Any:
    """The same material, as another file may have it: mappings have no order, lists have."""
    if isinstance(value, dict):
        return {key: in_other_order(value[key]) for key in reversed(value)}
    return [in_other_order(inner) for inner in value] if isinstance(value, list) else copy.copy(value)


def key_of(recipe: Recipe) -> str:
    return Keys(VERSIONS)[toy("any", recipes={"recipe.yml": recipe})]


@settings(max_examples=50)
@given(MATERIAL)
def test_the_same_material_has_the_same_key(recipe: Recipe) -> None:
    assert key_of(in_other_order(recipe)) == key_of(recipe)
    assert key_of(json.loads(json.dumps(recipe))) == key_of(recipe)


@settings(max_examples=50)
@given(st.data())
def test_any_changed_leaf_is_another_key(data: st.DataObject) -> None:
    recipe = data.draw(MATERIAL)
    place = data.draw(st.sampled_from(list(leaves(recipe))))
    leaf = data.draw(LEAVES)
    other = changed(recipe, place, leaf)
    assume(json.dumps(other, sort_keys=True) != json.dumps(recipe, sort_keys=True))
    assert key_of(other) != key_of(recipe)


def test_a_key_names_its_kind_and_fits_a_folder() -> None:
    kind, _, rest = key_of({}).partition("-")
    assert kind == "toy"
    assert len(rest) == 20
    assert int(rest, 16) >= 0


READS = toy("reads", inputs={"checkpoint": External("/a", "A")}, files={"p.jsonl": "1"}, tasks={"mini": "defined"})


@pytest.mark.parametrize(
    "other",
    [
        replace(READS, recipes={"recipe.yml": {"name": "other"}}),
        replace(READS, recipes={"another.yml": {"name": "reads"}}),
        replace(READS, commands=(("toy", "play", "--again"),)),
        replace(READS, commands=(*READS.commands, *READS.commands)),
        replace(READS, commands=(("toy play", "<<stage>>/recipe.yml"),)),
        replace(READS, inputs={"checkpoint": External("/a", "B")}),
        replace(READS, inputs={"anchor": External("/a", "A")}),
        replace(READS, inputs={}),
        replace(READS, files={"p.jsonl": "2"}),
        replace(READS, files={"q.jsonl": "1"}),
        replace(READS, tasks={"mini": "defined otherwise"}),
        replace(READS, tasks={}),
        replace(READS, kind=replace(READS.kind, name="game")),
    ],
)
def test_all_that_a_stage_reads_is_in_its_key(other: Stage) -> None:
    keys = Keys(VERSIONS)
    assert keys[other] != keys[READS]


@pytest.mark.parametrize(
    "other",
    [
        replace(READS, inputs={"checkpoint": External("/moved", "A")}),
        replace(READS, device="cpu"),
        replace(READS, wide=True),
        replace(READS, scratch=("prepared",)),
    ],
)
def test_where_a_thing_lies_and_what_does_the_work_is_not_in_a_key(other: Stage) -> None:
    keys = Keys(VERSIONS)
    assert keys[other] == keys[READS]


def test_a_tool_s_version_is_in_the_keys_of_the_kinds_it_runs() -> None:
    assert Keys({**VERSIONS, "torch": "2.14.0"})[READS] != Keys(VERSIONS)[READS]
    assert Keys({**VERSIONS, "mergekit": "9"})[READS] == Keys(VERSIONS)[READS]
    assert Keys({})[READS] == Keys({"mergekit": "9"})[READS]  # a tool that is not installed has none


def chain(first: str) -> tuple[Stage, Stage, Stage]:
    one = toy(first)
    two = toy("two", one)
    return one, two, toy("three", two)


def test_a_change_goes_through_all_the_stages_that_depend_on_it() -> None:
    keys = Keys(VERSIONS)
    ours, theirs, same = chain("one"), chain("other"), chain("one")
    assert [keys[stage] for stage in ours] == [keys[stage] for stage in same]
    assert all(keys[a] != keys[b] for a, b in zip(ours, theirs, strict=True))
    assert keys.material(ours[1])["inputs"] == {"input_0": f"{keys[ours[0]]}/out"}
    assert ours[2].needs() == [ours[1]]


def test_another_place_inside_a_stage_is_another_input() -> None:
    keys, one = Keys(VERSIONS), toy("one")
    ours, theirs = (toy("two", inputs={"x": Output(one, place)}) for place in ("instruct", "adapter"))
    assert keys[ours] != keys[theirs]


def test_keys_hold_for_stages_that_are_gone() -> None:
    keys = Keys(VERSIONS)
    names = [f"{number}" for number in range(200)]
    assert len({keys[toy(name)] for name in names}) == len(names)  # no stage answers to a dead one's place in memory


def closure(steps: dict[tuple[int, str], Any], name: str) -> set[tuple[int, str]]:
    """The places of the stages of a kind and of all that read what these leave, by the graph alone."""
    stale = {place for place, step in steps.items() if step.stage.kind.name == name}
    while more := {
        place
        for place, step in steps.items()
        if place not in stale and any(steps[other].stage in step.stage.needs() for other in stale)
    }:
        stale |= more
    return stale


@pytest.mark.parametrize("name", ["generate", "distill", "reconstruct", "evaluate"])
@pytest.mark.parametrize("anchor", ["original", "previous"])
def test_a_change_in_one_recipe_changes_the_keys_of_what_depends_on_it_and_no_others(
    shipped: LoopConfig, name: str, anchor: str
) -> None:
    config = shipped.model_copy(update={"anchor": anchor})
    recipes = read_recipes(config)
    before = planned(config, recipes=recipes)
    after = planned(config, recipes={**recipes, name: {**recipes[name], "another": "setting"}})
    keys = Keys(VERSIONS)
    other = {place for place in before if keys[before[place].stage] != keys[after[place].stage]}
    assert other == closure(before, name)
    assert 0 < len(other) < len(before)


# --- generate ---

ASK: Recipe = {
    "model": "hf",
    "model_args": {"pretrained": "somewhere/else", "dtype": "float32"},
    "tasks": ["what_it_says_alone"],
    "device": "cuda:0",
    "batch_size": 250,
    "gen_kwargs": {"temperature": 0.6, "max_gen_toks": 16384},
    "metadata": {"own": 1},
    "output_path": "runs/alone/results.json",
}
PROMPTS = [task("mini_math_prompts"), task("mini_qa_prompts")]


def test_generate_asks_the_thinking_checkpoint_the_prompts_without_reading_an_answer() -> None:
    stage = generate.build(ASK, ASKED, PROMPTS, THINKING, None)
    recipe = stage.recipes["recipe.yml"]
    assert recipe["model_args"] == {"pretrained": "<<checkpoint>>", "dtype": "float32"}
    assert recipe["tasks"] == ["mini_math_prompts", "mini_qa_prompts"]
    assert recipe["predict_only"] is True
    assert recipe["log_samples"] is True
    assert recipe["seed"] == [7, 7, 7, 7]
    assert recipe["output_path"] == "<<stage>>/answers/results.json"
    assert "limit" not in recipe
    assert {key: recipe[key] for key in ("model", "batch_size", "gen_kwargs", "metadata")} == {
        key: ASK[key] for key in ("model", "batch_size", "gen_kwargs", "metadata")
    }
    assert stage.inputs == {"checkpoint": THINKING}
    assert stage.commands == (("python", "-m", "thinkswitch_plugin.kept_answers", "<<stage>>/recipe.yml", "--keep"),)
    assert stage.tasks == {t.name: t.definition for t in PROMPTS}
    assert stage.files == {}


def test_generate_brings_the_user_s_own_prompts_along() -> None:
    rows = [{"id": "1", "messages": [{"role": "user", "content": "wie groß?"}]}, {"id": "2", "messages": []}]
    stage = generate.build(ASK, ASKED, [task("prompts_file")], THINKING, rows)
    assert stage.recipes["recipe.yml"]["metadata"] == {"own": 1, "prompts_file": "<<stage>>/prompts.jsonl"}
    (text,) = stage.files.values()
    assert [json.loads(line) for line in text.splitlines()] == rows
    other = generate.build(ASK, ASKED, [task("prompts_file")], THINKING, rows[:1])
    keys = Keys(VERSIONS)
    assert keys[other] != keys[stage]


@pytest.mark.parametrize(("said", "wanted"), [("cpu", "cpu"), ("cuda:0", "gpu"), (None, "gpu")])
def test_a_recipe_that_wants_no_accelerator_gets_none(said: str | None, wanted: str) -> None:
    recipe = {key: value for key, value in {**ASK, "device": said}.items() if value}
    assert generate.build(recipe, ASKED, PROMPTS, THINKING, None).device == wanted
    assert evaluate.build(recipe, ASKED, PROMPTS, THINKING).device == wanted


def test_a_limit_and_a_folder_of_tasks_reach_every_question() -> None:
    asked = Settings(seed=7, limit=3, include_path=Path("/my/tasks"))
    for stage in (
        generate.build(ASK, asked, PROMPTS, THINKING, None),
        evaluate.build(ASK, asked, [task("mine")], THINKING),
    ):
        recipe = stage.recipes["recipe.yml"]
        assert recipe["limit"] == 3
        assert placed(recipe["include_path"], {"include_path": "/my/tasks"}) == "/my/tasks"
        moved = replace(stage, inputs={**stage.inputs, "include_path": External("/moved", "tasks")})
        assert Keys(VERSIONS)[moved] == Keys(VERSIONS)[stage]  # the tasks' definitions are in it


def test_nf4_answers_with_a_copy_that_does_not_stay() -> None:
    for stage in (
        generate.build(ASK, Settings(seed=7, nf4=True), PROMPTS, THINKING, None),
        evaluate.build(ASK, Settings(seed=7, nf4=True), [task("mine")], THINKING),
    ):
        assert stage.commands[0] == ("axolotl", "nf4", "<<checkpoint>>", "<<stage>>/nf4")
        assert stage.commands[1][2] == "thinkswitch_plugin.kept_answers"
        assert stage.recipes["recipe.yml"]["model_args"] == {"pretrained": "<<stage>>/nf4", "dtype": "float32"}
        assert stage.scratch == ("nf4", "*.answered.jsonl")
        assert stage.inputs["checkpoint"] == THINKING


def test_model_args_that_say_nothing_name_the_checkpoint_all_the_same() -> None:
    for recipe in ({**ASK, "model_args": None}, {key: ASK[key] for key in ASK if key != "model_args"}):
        stage = generate.build(recipe, ASKED, PROMPTS, THINKING, None)
        assert stage.recipes["recipe.yml"]["model_args"] == {"pretrained": "<<checkpoint>>"}


def test_model_args_in_which_no_checkpoint_can_be_put_are_refused() -> None:
    with pytest.raises(LoopError, match="model_args: must be a mapping"):
        generate.build({**ASK, "model_args": "pretrained=x,dtype=float32"}, ASKED, PROMPTS, THINKING, None)


def lm_eval_left(
    folder: Path, task_name: str, texts: list[str], prompt: str = "<|im_start|>assistant\n<think>\n"
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    results = {"configs": {task_name: {}}, "n-samples": {task_name: {"effective": len(texts)}}}
    (folder / "results_2026-01-01T00-00-00.json").write_text(json.dumps(results))
    rows = [
        {"doc_id": n, "doc": {}, "arguments": {"gen_args_0": {"arg_0": prompt}}, "resps": [[text]], "filter": "none"}
        for n, text in enumerate(texts)
    ]
    lines = "".join(json.dumps({**row, "metrics": ["bypass"], "bypass": 0}) + "\n" for row in rows)
    (folder / f"samples_{task_name}_2026-01-01T00-00-00.jsonl").write_text(lines)


def test_generate_says_how_many_answers_can_be_learnt_from(tmp_path: Path) -> None:
    stage = generate.build(ASK, ASKED, PROMPTS[:1], THINKING, None)
    lm_eval_left(tmp_path / "answers", "mini_math_prompts", ["2+2\n</think>\n\n4", "it goes on and on", "3</think>3"])
    facts = stage.kind.read(tmp_path, stage)
    assert facts == {"labels": {"closed": 2, "total": 3}}
    assert stage.kind.note(facts) == "2 of 3 answers closed their trace"


def test_answers_that_used_up_their_tokens_are_told(tmp_path: Path, recipes: Path) -> None:
    """Of lm-eval's own 256, of the recipe's, of the task's: the nearest word counts; a token of slack, no more."""
    tokenizer = recipes / "mini/instruct"
    stage = generate.build(ASK, ASKED, PROMPTS[:1], THINKING, None)
    written = ["1" * 256, "1" * 254 + "</think>3", "1" * 250 + "</think>3", "3</think>3"]
    lm_eval_left(tmp_path / "answers", "mini_math_prompts", written)
    facts = stage.kind.read(tmp_path, stage, tokenizer)
    assert facts["cut_off"] == {"cut": 2, "answers": 4, "budget": 256}
    said = "3 of 4 answers closed their trace; 2 of 4 answers were cut off at 256 tokens (max_gen_toks)"
    assert stage.kind.note(facts) == said
    assert "cut_off" not in stage.kind.read(tmp_path, stage, None)
    roomy = generate.build({**ASK, "model_args": {"max_gen_toks": 512}}, ASKED, PROMPTS[:1], THINKING, None)
    assert "cut_off" not in roomy.kind.read(tmp_path, roomy, tokenizer)


def test_nothing_to_learn_from_ends_the_run_with_what_to_do(tmp_path: Path) -> None:
    stage = generate.build(ASK, ASKED, PROMPTS[:1], THINKING, None)
    lm_eval_left(tmp_path / "answers", "mini_math_prompts", ["it goes on", "and on"])
    with pytest.raises(StageError, match=r"closed 0 of 2 traces.*nothing to distill\n.*max_gen_toks.*--t") as caught:
        stage.kind.read(tmp_path, stage)
    assert str(tmp_path / "answers") in str(caught.value)


# --- distill ---

TRAIN: Recipe = {
    "base_model": "somewhere/else",
    "plugins": ["thinkswitch_plugin.trace_stripping.TraceStrippingPlugin"],
    "datasets": [
        {
            "path": "runs/alone/labels",
            "ds_type": "json",
            "data_files": ["runs/alone/labels/samples_*.jsonl"],
            "split": "train[:10]",
            "type": "thinkswitch_plugin.trace_stripping",
            "shards": 2,
        },
        {"path": "owner/replay", "type": "chat_template", "split": "train"},
        {"path": "/data/more.jsonl", "ds_type": "json", "type": "chat_template"},
    ],
    "output_dir": "runs/alone/distill",
    "dataset_prepared_path": "runs/alone/prepared",
    "adapter": "qlora",
    "learning_rate": "2e-3",
    "seed": 1,
}
LABELS = generate.build(ASK, ASKED, PROMPTS, THINKING, None)


def built(recipe: Recipe, launcher: str = "python") -> Stage:
    tasks = [t.name for t in PROMPTS]
    return distill.build(recipe, 7, launcher, INSTRUCT, THINKING, LABELS, tasks)


def test_distill_learns_the_labels_of_each_prompt_task_beside_the_recipe_s_further_data() -> None:
    stage = built(TRAIN)
    recipe = stage.recipes["recipe.yml"]
    *learnt, replay, more = recipe["datasets"]
    for entry, name in zip(learnt, ("mini_math_prompts", "mini_qa_prompts"), strict=True):
        assert entry["path"] == "<<labels>>"
        assert entry["ds_type"] == "json"
        assert entry["split"] == "train"
        assert entry["type"] == "thinkswitch_plugin.trace_stripping"
        assert entry["shards"] == 2
        (pattern,) = entry["data_files"]
        assert pattern.startswith(f"<<labels>>/samples_{name}_")
    assert [replay, more] == TRAIN["datasets"][1:]
    assert recipe["base_model"] == "<<instruct>>"
    assert recipe["seed"] == 7
    assert recipe["learning_rate"] == "2e-3"  # the tool's to read
    assert stage.inputs["instruct"] == INSTRUCT
    assert "thinking" not in stage.inputs
    assert stage.needs() == [LABELS]


def test_the_labels_of_one_task_are_not_those_of_another_whose_name_begins_the_same(tmp_path: Path) -> None:
    stage = distill.build(TRAIN, 7, "python", INSTRUCT, THINKING, LABELS, ["math"])
    (pattern,) = stage.recipes["recipe.yml"]["datasets"][0]["data_files"]
    for name in ("math", "math_hard", "math_2"):
        (tmp_path / f"samples_{name}_2026-01-01T00-00-00.000001.jsonl").touch()
    found = tmp_path.glob(pattern.removeprefix("<<labels>>/"))
    assert [file.name for file in found] == ["samples_math_2026-01-01T00-00-00.000001.jsonl"]


def test_an_adapter_is_trained_merged_and_becomes_the_checkpoint() -> None:
    stage = built(TRAIN)
    assert stage.recipes["recipe.yml"]["output_dir"] == "<<stage>>/adapter"
    assert stage.recipes["recipe.yml"]["dataset_prepared_path"] == "<<stage>>/prepared"
    assert stage.commands == (
        ("axolotl", "train", "<<stage>>/recipe.yml", "--launcher", "python"),
        ("axolotl", "merge-lora", "<<stage>>/recipe.yml", "--lora-model-dir", "<<stage>>/adapter"),
    )
    assert stage.renames == (("adapter/merged", "instruct"),)
    assert stage.kind.checkpoint == "instruct"
    assert stage.scratch == ("prepared", "adapter/checkpoint-*")


def test_a_training_can_go_on_where_it_was_stopped(tmp_path: Path) -> None:
    assert built(TRAIN).recipes["recipe.yml"]["auto_resume_from_checkpoints"] is True
    ours = built({**TRAIN, "save_strategy": "no"})
    assert {key: ours.recipes["recipe.yml"][key] for key in distill.SAVED} == distill.SAVED
    assert ours.scratch == ("prepared", "adapter/checkpoint-*")
    own = built({**TRAIN, "save_strategy": "epoch"})
    assert own.recipes["recipe.yml"]["save_strategy"] == "epoch"
    assert own.scratch == ("prepared",)  # who asked for checkpoints keeps them
    assert built({**TRAIN, "adapter": None, "save_strategy": "no"}).recipes["recipe.yml"]["save_strategy"] == "no"
    assert built({**TRAIN, "save_steps": 7}).recipes["recipe.yml"]["save_steps"] == 7


def spoilt(whole: Path, how: str) -> None:
    """Harm one thing of a trainer's checkpoint."""
    file, _, what = how.partition(" ")
    content = (whole / file).read_bytes()
    (whole / file).unlink() if what == "is gone" else (whole / file).write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    "how",
    [
        *("", "trainer_state.json is cut", "trainer_state.json is gone", "optimizer.pt is gone", "optimizer.pt is cut"),
        *("scheduler.pt is gone", "rng_state.pth is cut", "rng_state.pth is gone", "adapter_model.safetensors is cut"),
    ],
)
def test_a_training_goes_on_from_a_checkpoint_that_is_whole(tmp_path: Path, how: str) -> None:
    import torch
    from safetensors.torch import save_file

    whole = tmp_path / "adapter/checkpoint-10"
    whole.mkdir(parents=True)
    (whole / "trainer_state.json").write_text('{"global_step": 10}')
    save_file({"w": torch.ones(9)}, whole / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"x": torch.ones(100)}, whole / name)
    if how:
        spoilt(whole, how)
    assert distill.resumes(tmp_path) == ([] if how else [whole])


@pytest.mark.parametrize("adapter", [None, ""])
def test_without_an_adapter_the_whole_checkpoint_is_trained_in_its_place(adapter: str | None) -> None:
    stage = built({**TRAIN, "adapter": adapter})
    assert stage.recipes["recipe.yml"]["output_dir"] == "<<stage>>/instruct"
    assert [command[1] for command in stage.commands] == ["train"]
    assert stage.renames == ()
    assert stage.scratch == ("prepared", "instruct/checkpoint-*")


@pytest.mark.parametrize("adapter", ["tah", "llama-adapter", "QLORA"])
def test_an_adapter_that_cannot_be_merged_is_refused(adapter: str) -> None:
    with pytest.raises(LoopError, match=f"adapter: {adapter} cannot be merged; use one of lora, qlora, or none"):
        built({**TRAIN, "adapter": adapter})


@pytest.mark.parametrize(
    ("launcher", "train", "wide"),
    [
        ("python", ["--launcher", "python"], False),
        ("accelerate", ["--launcher", "accelerate"], True),
        ("torchrun --nproc_per_node=2", ["--launcher", "torchrun", "--", "--nproc_per_node=2"], True),
        (
            "torchrun --rdzv-conf 'a=1,b=2' -n 2",
            ["--launcher", "torchrun", "--", "--rdzv-conf", "a=1,b=2", "-n", "2"],
            True,
        ),
    ],
)
def test_a_launcher_gets_what_it_is_given_and_all_gpus(launcher: str, train: list[str], wide: bool) -> None:
    stage = built(TRAIN, launcher)
    assert list(stage.commands[0][3:]) == train
    assert stage.wide is wide
    assert "--" not in stage.commands[1]


@pytest.mark.parametrize(
    ("settings", "teacher"),
    [
        (None, None),
        ({"teacher": "self", "max_new_tokens": 16}, "self"),
        ({"teacher": "somewhere/else", "max_new_tokens": 16}, "<<thinking>>"),
    ],
)
def test_the_teacher_is_the_thinking_checkpoint_unless_it_is_the_student_itself(
    settings: Recipe | None, teacher: str | None
) -> None:
    stage = built({**TRAIN, **({"on_policy_kl": settings} if settings else {})})
    recipe = stage.recipes["recipe.yml"]
    assert recipe.get("on_policy_kl", {}).get("teacher") == teacher
    assert ("thinking" in stage.inputs) == (teacher == "<<thinking>>")
    if settings:
        assert recipe["on_policy_kl"]["max_new_tokens"] == 16


def test_distill_says_what_the_plugins_noted_beside_the_checkpoint(tmp_path: Path) -> None:
    stage = built(TRAIN)
    assert stage.kind.read(tmp_path, stage) == {}
    assert stage.kind.note({}) == ""
    entry = {"path": "x", "rows": 40, "kept": 38, "dropped": {"unclosed": 2}, "tokens_read": 900, "tokens_kept": 300}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/trace_stripping.json").write_text(json.dumps({"datasets": [entry, entry]}))
    facts = stage.kind.read(tmp_path, stage)
    assert set(facts) == {"trace_stripping"}
    assert "kept 76 of 80 rows" in stage.kind.note(facts)


# --- reconstruct ---

SLERP: Recipe = {
    "merge_method": "slerp",
    "base_model": "T",
    "models": [{"model": "T"}, {"model": "I"}],
    "parameters": {"t": 0.1},
    "dtype": "bfloat16",
}
SLICES: Recipe = {
    "merge_method": "slerp",
    "base_model": "T",
    "slices": [
        {"sources": [{"model": "T", "layer_range": [0, 2]}, {"model": "I", "layer_range": [0, 2]}]},
        {"sources": [{"model": "I", "layer_range": [2, 4]}, {"model": "T", "layer_range": [2, 4]}]},
    ],
    "parameters": {"t": 0.1},
}
TIES: Recipe = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [
        {"model": "T", "parameters": {"weight": 0.7, "density": 0.5}},
        {"model": "I", "parameters": {"weight": 0.3}},
        {"model": "T", "parameters": {"weight": 0.1}},
    ],
    "tokenizer_source": "base",
}


def rebuilt(recipe: Recipe, t: float | None = None, written: tuple[str, str] | None = None) -> Recipe:
    stage = reconstruct.build(recipe, t, THINKING, INSTRUCT, written)
    assert stage.inputs == {"anchor": THINKING, "instruct": INSTRUCT}
    return stage.recipes["recipe.yml"]


def test_reconstruct_puts_the_anchor_where_the_base_is_and_instruct_where_the_other_is() -> None:
    assert rebuilt(SLERP) == {
        **SLERP,
        "base_model": "<<anchor>>",
        "models": [{"model": "<<anchor>>"}, {"model": "<<instruct>>"}],
    }
    stage = reconstruct.build(SLERP, None, THINKING, INSTRUCT)
    assert stage.commands == (
        ("mergekit-yaml", "<<stage>>/recipe.yml", "<<stage>>/thinking", "--out-shard-size", "1B"),
    )
    assert stage.kind.checkpoint == "thinking"
    assert stage.device == "cpu"


def test_slices_and_their_layers_stay_as_they_are_written() -> None:
    result = rebuilt(SLICES, 0.25)
    assert [[source["model"] for source in part["sources"]] for part in result["slices"]] == [
        ["<<anchor>>", "<<instruct>>"],
        ["<<instruct>>", "<<anchor>>"],
    ]
    assert [part["sources"][0]["layer_range"] for part in result["slices"]] == [[0, 2], [2, 4]]
    assert result["parameters"] == {"t": 0.25}


def test_t_left_out_is_the_recipe_s_own_whatever_its_shape() -> None:
    nested = [{"filter": "self_attn", "value": [0, 0.5, 0.3]}, {"value": 0.5}]
    assert rebuilt({**SLERP, "parameters": {"t": nested}})["parameters"] == {"t": nested}
    assert rebuilt(SLERP)["parameters"] == {"t": 0.1}


@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("own", [{"parameters": {"t": 0.1, "embed_slerp": True}}, {"parameters": {"t": 1}}, {}])
def test_t_is_set_where_there_is_one_place_for_it(t: float, own: Recipe) -> None:
    recipe = {key: value for key, value in SLERP.items() if key != "parameters"}
    result = rebuilt({**recipe, **own}, t)
    assert result["parameters"] == {**own.get("parameters", {}), "t": t}


@pytest.mark.parametrize(
    "recipe",
    [
        {**SLERP, "parameters": {"t": [0, 0.5, 1]}},
        {**SLERP, "parameters": {"t": [{"filter": "mlp", "value": 0.2}, {"value": 0.5}]}},
        # mergekit takes the innermost one: what --t says would change nothing.
        {**SLICES, "slices": [{**SLICES["slices"][0], "parameters": {"t": 0.9}}, SLICES["slices"][1]]},
        {**SLERP, "models": None, "modules": {"default": {"slices": SLICES["slices"], "parameters": {"t": 0.9}}}},
    ],
    ids=["a gradient", "a filter", "a slice's own", "a module's own"],
)
def test_a_recipe_with_a_t_of_its_own_for_each_part_cannot_be_given_one(recipe: Recipe) -> None:
    with pytest.raises(LoopError, match=r"^--t 0\.3: the reconstruct recipe has a t of its own for each part"):
        rebuilt(recipe, 0.3)
    rebuilt(recipe)


def weighted(method: str) -> Recipe:
    models = [{"model": "T", "parameters": {"weight": 0.9}}, {"model": "I", "parameters": {"weight": 0.1}}]
    return {"merge_method": method, "base_model": "T", "models": models}


@pytest.mark.parametrize("method", ["linear", "ties", "task_arithmetic", "passthrough", "nuslerp", "multislerp"])
def test_a_method_that_has_no_t_cannot_be_given_one(method: str) -> None:
    with pytest.raises(LoopError, match=r"^--t 0\.3: the reconstruct recipe has no t; .*leave --t"):
        rebuilt(weighted(method), 0.3)


@pytest.mark.parametrize("method", ["linear", "ties", "task_arithmetic", "nuslerp", "multislerp"])
def test_any_method_of_mergekit_will_do_without_t(method: str) -> None:
    result = rebuilt(weighted(method))
    assert result["merge_method"] == method
    assert [model["model"] for model in result["models"]] == ["<<anchor>>", "<<instruct>>"]
    assert [model["parameters"] for model in result["models"]] == [{"weight": 0.9}, {"weight": 0.1}]
    assert "parameters" not in result


def test_of_three_models_the_two_that_loop_yml_names_are_the_pair() -> None:
    result = rebuilt(TIES, written=("I", "T"))
    assert result["base_model"] == "base"
    assert [model["model"] for model in result["models"]] == ["<<anchor>>", "<<instruct>>", "<<anchor>>"]
    assert [model["parameters"]["weight"] for model in result["models"]] == [0.7, 0.3, 0.1]
    assert result["tokenizer_source"] == "base"


def test_a_loop_and_a_recipe_that_name_the_pair_alike_fit_wherever_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for who in ("instruct", "thinking", "base"):
        (tmp_path / "mine/pair" / who).mkdir(parents=True)
    models = [{"model": "pair/thinking"}, {"model": "pair/instruct"}]
    (tmp_path / "mine/merge.yml").write_text(
        yaml.safe_dump({"merge_method": "ties", "base_model": "pair/base", "models": models})
    )
    loop = read_yaml(recipes_folder() / "loop.yml")
    files = {name: str(recipes_folder() / file) for name, file in loop["recipes"].items()}
    loop |= {"instruct": "pair/instruct", "thinking": "pair/thinking", "recipes": {**files, "reconstruct": "merge.yml"}}
    (tmp_path / "mine/loop.yml").write_text(yaml.safe_dump(loop))
    monkeypatch.chdir(tmp_path)
    # Another pair is asked for than the one that is written: what stands for it is told by what is written.
    config = load(Path("mine/loop.yml"), {"iterations": 1, "instruct": "owner/other", "thinking": "owner/another"})
    (recipe,) = planned(config)[1, "reconstruct"].stage.recipes.values()
    assert recipe["base_model"] == str(tmp_path / "mine/pair/base")
    assert [model["model"] for model in recipe["models"]] == ["<<anchor>>", "<<instruct>>"]


@pytest.mark.parametrize("written", [None, ("I", "other"), ("other", "T")])
def test_three_models_of_which_nobody_says_which_two_are_refused(written: tuple[str, str] | None) -> None:
    with pytest.raises(LoopError, match=r"names 3 models \(base, T, I\): it must name the pair as loop\.yml does"):
        rebuilt(TIES, written=written)


def test_one_model_is_no_pair() -> None:
    with pytest.raises(LoopError, match=r"names 1 models? \(T\)"):
        rebuilt({"merge_method": "passthrough", "base_model": "T", "models": [{"model": "T"}]})


# --- evaluate ---


def test_evaluate_asks_the_tests_and_grades_what_lm_eval_cannot() -> None:
    tasks = [task("ours"), task("theirs", grades_traces=False), task("often", repeats=4, temperature=0.7)]
    stage = evaluate.build(ASK, ASKED, tasks, INSTRUCT)
    assert stage.recipes["recipe.yml"]["tasks"] == ["ours", "theirs", "often"]
    assert "predict_only" not in stage.recipes["recipe.yml"]
    assert "trust_remote_code" not in stage.recipes["recipe.yml"]["model_args"]
    asked, graded = stage.commands
    assert asked == ("python", "-m", "thinkswitch_plugin.kept_answers", "<<stage>>/recipe.yml", "--keep")
    assert graded[:3] == ("python", "-m", "harness.grading")
    assert graded[-2:] == ("theirs", "often")
    assert graded[3:-2] == ("<<stage>>/answers", "--recipe", "<<stage>>/recipe.yml", "--out", "<<stage>>/graded.jsonl")


@pytest.mark.parametrize(
    ("said", "of_task"),
    [
        (None, {}),
        (None, {"do_sample": False, "temperature": 0.7}),
        ({"max_gen_toks": 9}, {"do_sample": True}),  # lm-eval's temperature is 0 where nobody says one
        ({"temperature": 0.0}, {"do_sample": True, "temperature": 0.7}),
        ({"temperature": 0.7}, {"do_sample": False}),
        ("do_sample=false,temperature=0.7", {"do_sample": True, "temperature": 0.7}),
    ],
)
def test_a_question_is_not_asked_several_times_for_the_same_answer(said: Any, of_task: dict[str, Any]) -> None:
    recipe = {**ASK, "gen_kwargs": said}
    with pytest.raises(LoopError) as error:
        evaluate.build(recipe, ASKED, [task("often", repeats=4, **of_task)], INSTRUCT)
    assert "task often asks each question 4 times (repeats), and greedy decoding" in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    evaluate.build(recipe, ASKED, [task("once", **of_task)], INSTRUCT)


@pytest.mark.parametrize("said", [{"do_sample": True, "temperature": 0.7}, "do_sample=true,temperature=0.7"])
def test_a_question_is_asked_several_times_of_who_samples(said: Any) -> None:
    often = task("often", repeats=4, do_sample=False)
    evaluate.build({**ASK, "gen_kwargs": said}, ASKED, [often], INSTRUCT)
    served = {**ASK, "gen_kwargs": said, "model_args": {"base_url": "http://here"}}
    with pytest.raises(LoopError, match=r"the server the same seed each time.*gen_kwargs\.seed=null"):
        evaluate.build(served, ASKED, [often], INSTRUCT)
    if isinstance(said, dict):
        evaluate.build({**served, "gen_kwargs": {**said, "seed": None}}, ASKED, [often], INSTRUCT)


def test_tasks_that_know_of_traces_are_not_graded_again() -> None:
    assert len(evaluate.build(ASK, ASKED, [task("ours"), task("ours_too")], INSTRUCT).commands) == 1


def test_a_tah_checkpoint_is_trusted_and_its_passes_are_counted() -> None:
    stage = evaluate.build(ASK, ASKED, [task("ours")], INSTRUCT, tah=True)
    assert stage.recipes["recipe.yml"]["model_args"]["trust_remote_code"] is True
    assert [command[:2] for command in stage.commands] == [("python", "-m"), ("axolotl", "tah-passes")]
    assert stage.commands[1][-1] == "<<stage>>/passes.json"


def test_what_an_evaluation_says_of_each_task_is_kept(tmp_path: Path) -> None:
    stage = evaluate.build(ASK, ASKED, [task("ours")], INSTRUCT)
    lm_eval_left(tmp_path / "answers", "ours", ["4"], prompt="<|im_start|>\n")
    assert stage.kind.read(tmp_path, stage) == {"per_task": {}}
    (tmp_path / "passes.json").write_text('{"ours": {"mean_depth": 1.25}}')
    assert stage.kind.read(tmp_path, stage) == {"per_task": {"ours": {"mean_depth": 1.25}}}


def test_answers_that_cannot_be_read_do_not_count_as_an_evaluation(tmp_path: Path) -> None:
    stage = evaluate.build(ASK, ASKED, [task("ours")], INSTRUCT)
    with pytest.raises(StageError, match="left no results"):
        stage.kind.read(tmp_path, stage)


# --- all kinds ---


@settings(max_examples=20)
@given(nf4=st.booleans(), limit=st.none() | st.integers(1, 9), t=st.none() | st.floats(0, 1))
def test_a_recipe_as_it_was_read_is_never_changed(nf4: bool, limit: int | None, t: float | None) -> None:
    asked = Settings(3, nf4, limit, Path("/tasks"))
    read = [{**ASK}, {**TRAIN, "on_policy_kl": {"teacher": "x"}}, {**SLICES}, {**TIES}]
    before = copy.deepcopy(read)
    ask, train, slerp, ties = read
    generate.build(ask, asked, PROMPTS, THINKING, [])
    evaluate.build(ask, asked, [task("theirs", grades_traces=False)], INSTRUCT, tah=True)
    built(train)
    reconstruct.build(slerp, t, THINKING, INSTRUCT)
    reconstruct.build(ties, None, THINKING, INSTRUCT, ("I", "T"))
    assert read == before


@pytest.mark.parametrize("entries", [None, [], "mine.jsonl", ["mine.jsonl"]])
def test_a_distillation_needs_an_entry_that_stands_for_the_labels(entries: Any) -> None:
    came = External("/came", "what came")
    with pytest.raises(LoopError, match="datasets: must be a list, whose first entry stands for the labels"):
        distill.build({"datasets": entries}, 7, "python", came, came, toy("labels"), ["mine"])


def test_the_pair_is_found_by_its_names_whichever_is_the_base() -> None:
    anchor, new = External("/a", "a"), External("/i", "i")
    recipe = {"merge_method": "slerp", "base_model": "I", "models": [{"model": "I"}, {"model": "T"}]}
    with pytest.raises(LoopError, match="thinking would never open a trace"):
        reconstruct.build(recipe, None, anchor, new, ("I", "T"))
    linear = {"merge_method": "linear", "models": [{"model": "T"}, {"model": "I"}], "parameters": None}
    stage = reconstruct.build(linear, None, anchor, new, ("I", "T"))
    assert [model["model"] for model in stage.recipes["recipe.yml"]["models"]] == ["<<anchor>>", "<<instruct>>"]
    with pytest.raises(LoopError, match="names 2 models"):
        reconstruct.build(linear, None, anchor, new, None)


# --- settings of another kind than their tools know ---


@pytest.mark.parametrize("name", ["trace_stripping", "on_policy_kl"])
@pytest.mark.parametrize("value", [3.5, ["teacher"], "self", True])
def test_a_plugin_s_settings_that_are_no_mapping_are_refused(name: str, value: object) -> None:
    recipe = distill.untouched({"datasets": [{"type": "x"}], name: value})
    with pytest.raises(LoopError, match=rf"^distill recipe: {name}: must be a mapping of that plugin's settings$"):
        built(recipe)


def test_parameters_of_a_merge_that_are_no_mapping_are_refused() -> None:
    recipe = {"merge_method": "slerp", "base_model": "T", "models": [{"model": "T"}, {"model": "I"}]}
    with pytest.raises(LoopError, match=r"^reconstruct recipe: parameters: must be a mapping"):
        reconstruct.build({**recipe, "parameters": ["t"]}, 0.5, THINKING, THINKING)
    parts = [{"model": "T", "parameters": 3}, {"model": "I"}]
    assert reconstruct.build({**recipe, "models": parts}, 0.5, THINKING, THINKING).recipes["recipe.yml"]["parameters"]


def test_a_mapping_may_have_numbers_among_its_keys() -> None:
    mixed = {"max_memory": {0: "20GiB", "cpu": "10GiB"}}
    assert key_of(mixed) == key_of({"max_memory": {"cpu": "10GiB", 0: "20GiB"}})
    assert key_of(mixed) != key_of({"max_memory": {1: "20GiB", "cpu": "10GiB"}})
