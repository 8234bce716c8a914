"""The stages of a run: in which order, what reads what, and what the run's settings reach."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from made_runs import VERSIONS, inputs_for, planned, task, toy

from harness.config import ARMS, LoopConfig, load, read_recipes, recipes_folder
from harness.errors import LoopError
from harness.interpreters import Interpreter
from harness.plan import GRID, PROMPTS, Step, commands, pinned, plan, untried
from harness.stages import External, Keys, Output, Recipe, distill, generate
from harness.store import Known


def recipe_of(step: Step) -> Recipe:
    (recipe,) = step.stage.recipes.values()
    return recipe


def left_by(source: Any) -> tuple[Any, str]:
    assert isinstance(source, Output)
    return source.stage, source.path


# --- what follows what ---


def test_the_order_of_a_run(shipped: LoopConfig) -> None:
    tests = ["evaluate_instruct", "evaluate_thinking"]
    assert list(planned(shipped)) == [
        *[(0, name) for name in tests],
        *[(k, name) for k in (1, 2) for name in ("generate", "distill", "reconstruct", *tests)],
    ]


def test_with_no_iterations_the_pair_is_evaluated_as_it_came(shipped: LoopConfig) -> None:
    steps = planned(shipped.model_copy(update={"iterations": 0}))
    assert list(steps) == [(0, "evaluate_instruct"), (0, "evaluate_thinking")]
    inputs = inputs_for(shipped)
    assert steps[0, "evaluate_instruct"].stage.inputs == {"checkpoint": inputs.instruct}
    assert steps[0, "evaluate_thinking"].stage.inputs == {"checkpoint": inputs.thinking}


def test_each_stage_comes_after_all_it_reads(shipped: LoopConfig) -> None:
    seen = []
    for step in planned(shipped.model_copy(update={"iterations": 4})).values():
        assert all(needed in seen for needed in step.stage.needs())
        seen.append(step.stage)


def test_each_iteration_builds_on_the_last(shipped: LoopConfig) -> None:
    steps, inputs = planned(shipped), inputs_for(shipped)
    stages = {place: step.stage for place, step in steps.items()}
    assert stages[1, "generate"].inputs["checkpoint"] == inputs.thinking
    assert stages[1, "distill"].inputs["instruct"] == inputs.instruct
    assert left_by(stages[1, "distill"].inputs["labels"]) == (stages[1, "generate"], "answers")
    assert left_by(stages[1, "reconstruct"].inputs["instruct"]) == (stages[1, "distill"], "instruct")
    assert left_by(stages[2, "generate"].inputs["checkpoint"]) == (stages[1, "reconstruct"], "thinking")
    assert left_by(stages[2, "distill"].inputs["instruct"]) == (stages[1, "distill"], "instruct")
    for k in (1, 2):
        for who, made in (("instruct", "distill"), ("thinking", "reconstruct")):
            assert steps[k, f"evaluate_{who}"].checkpoint == who
            assert left_by(stages[k, f"evaluate_{who}"].inputs["checkpoint"]) == (stages[k, made], who)


def test_a_checkpoint_is_left_where_its_kind_says(shipped: LoopConfig) -> None:
    for step in planned(shipped).values():
        for needed in step.stage.inputs.values():
            if isinstance(needed, Output) and needed.stage.kind.checkpoint:
                assert needed.path == needed.stage.kind.checkpoint


@pytest.mark.parametrize("anchor", ["original", "previous"])
def test_the_anchor_of_the_second_reconstruction(shipped: LoopConfig, anchor: str) -> None:
    steps = planned(shipped.model_copy(update={"anchor": anchor}))
    inputs = inputs_for(shipped)
    assert steps[1, "reconstruct"].stage.inputs["anchor"] == inputs.thinking
    found = steps[2, "reconstruct"].stage.inputs["anchor"]
    if anchor == "original":
        assert found == inputs.thinking
    else:
        assert left_by(found) == (steps[1, "reconstruct"].stage, "thinking")


def test_more_iterations_leave_the_keys_of_the_first_as_they_are(shipped: LoopConfig) -> None:
    keys = Keys(VERSIONS)
    few, many = (planned(shipped.model_copy(update={"iterations": k})) for k in (1, 3))
    assert all(keys[few[place].stage] == keys[many[place].stage] for place in few)
    assert len({keys[step.stage] for step in many.values()}) == len(many)


# --- what the settings reach ---


def test_the_thinking_checkpoint_may_be_evaluated_by_a_recipe_of_its_own() -> None:
    config = load(recipes_folder() / "qwen3_4b/loop.yml", {"iterations": 1})
    steps = planned(config)
    for k in (0, 1):
        assert recipe_of(steps[k, "evaluate_instruct"])["gen_kwargs"]["temperature"] == 0.7
        assert recipe_of(steps[k, "evaluate_thinking"])["gen_kwargs"]["temperature"] == 0.6


def test_one_recipe_evaluates_both_unless_there_is_another(shipped: LoopConfig) -> None:
    steps = planned(shipped)
    assert recipe_of(steps[1, "evaluate_instruct"]) == recipe_of(steps[1, "evaluate_thinking"])


@pytest.mark.parametrize("nf4", [True, False])
def test_nf4_reaches_whatever_answers_and_nothing_that_learns(shipped: LoopConfig, nf4: bool) -> None:
    for (_, name), step in planned(shipped.model_copy(update={"nf4": nf4})).items():
        answers = name == "generate" or name.startswith("evaluate")
        assert (("axolotl", "nf4") in [command[:2] for command in step.stage.commands]) == (nf4 and answers)


def test_every_seed_is_the_run_s(shipped: LoopConfig) -> None:
    for (_, name), step in planned(shipped.model_copy(update={"seed": 7})).items():
        if name != "reconstruct":
            assert recipe_of(step)["seed"] == (7 if name == "distill" else [7, 7, 7, 7])


def test_a_limit_reaches_prompts_and_questions(shipped: LoopConfig) -> None:
    for (_, name), step in planned(shipped.model_copy(update={"limit": 5})).items():
        assert recipe_of(step).get("limit") == (None if name in ("distill", "reconstruct") else 5)


@pytest.mark.parametrize(("t", "expected"), [(None, 0.1), (0.0, 0.0), (0.35, 0.35)])
def test_t_is_the_run_s_or_else_the_recipe_s(shipped: LoopConfig, t: float | None, expected: float) -> None:
    steps = planned(shipped.model_copy(update={"t": t}))
    assert [recipe_of(steps[k, "reconstruct"])["parameters"]["t"] for k in (1, 2)] == [expected, expected]


def test_the_launcher_is_the_training_s_alone(shipped: LoopConfig) -> None:
    for (_, name), step in planned(shipped.model_copy(update={"launcher": "torchrun --nproc_per_node=2"})).items():
        told = any("torchrun" in word for command in step.stage.commands for word in command)
        assert told == step.stage.wide == (name == "distill")


def test_the_name_the_jobs_and_the_price_are_in_no_key(shipped: LoopConfig) -> None:
    keys = Keys(VERSIONS)
    other = shipped.model_copy(update={"name": "other", "jobs": 7, "usd_per_hour": 2.0})
    ours, theirs = planned(shipped), planned(other)
    assert [keys[step.stage] for step in ours.values()] == [keys[step.stage] for step in theirs.values()]


def test_what_the_author_wrote_in_a_recipe_stays(shipped: LoopConfig) -> None:
    written = read_recipes(shipped)
    ours = {"output_path", "output_dir", "dataset_prepared_path", "datasets", "model_args", "tasks", "seed"}
    ours |= {"base_model", "models", "parameters", *distill.SAVED}
    for (_, name), step in planned(shipped).items():
        recipe = written[name.partition("_")[0]]
        kept = {key: value for key, value in recipe.items() if key not in ours}
        assert {key: recipe_of(step)[key] for key in kept} == kept


# --- t: auto ---


def auto(shipped: LoopConfig, **changes: Any) -> LoopConfig:
    return shipped.model_copy(update={"t": "auto", **changes})


def test_auto_rebuilds_and_tries_each_t_and_goes_on_with_what_is_chosen(shipped: LoopConfig) -> None:
    steps, inputs = planned(auto(shipped)), inputs_for(shipped)
    stages = {place: step.stage for place, step in steps.items()}
    for k in (1, 2):
        names = [name for iteration, name in steps if iteration == k]
        each = [f"{what}_t{t:g}" for t in GRID for what in ("reconstruct", "answer")]
        tests = ["evaluate_instruct", "evaluate_thinking"]
        assert names == ["generate", "distill", "answer_t0", *each, "choose", *tests]
        for t in GRID:
            assert recipe_of(steps[k, f"reconstruct_t{t:g}"])["parameters"]["t"] == t
            rebuilt = left_by(stages[k, f"answer_t{t:g}"].inputs["checkpoint"])
            assert rebuilt == (stages[k, f"reconstruct_t{t:g}"], "thinking")
        assert left_by(stages[k, "evaluate_thinking"].inputs["checkpoint"]) == (stages[k, "choose"], "thinking")
        choice = stages[k, "choose"]
        tried = recipe_of(steps[k, "choose"])["tried"]
        assert [one["t"] for one in tried] == [0.0, *GRID]
        assert set(tried[3]) == {"t", "checkpoint", "answers"}
        assert left_by(choice.inputs["checkpoint_3"])[0] is stages[k, "reconstruct_t0.3"]
        assert left_by(choice.inputs["answers_3"]) == (stages[k, "answer_t0.3"], "answers")
        assert recipe_of(steps[k, "choose"])["tasks"] == shipped.prompt_tasks
        # With the first answers of the checkpoint that is interpolated with, which labelled the first iteration.
        assert left_by(choice.inputs["labels"]) == (stages[1, "generate"], "answers")
        assert choice.inputs["checkpoint_0"] == inputs.thinking
    assert left_by(stages[2, "generate"].inputs["checkpoint"]) == (stages[1, "choose"], "thinking")


def test_a_t_that_is_tried_is_the_rebuilding_that_a_run_with_it_has(shipped: LoopConfig) -> None:
    keys = Keys(VERSIONS)
    tried = planned(auto(shipped))
    for t in (0.1, 0.7):
        fixed = planned(shipped.model_copy(update={"t": t}))
        assert keys[tried[1, f"reconstruct_t{t:g}"].stage] == keys[fixed[1, "reconstruct"].stage]


def test_each_t_answers_few_prompts_under_another_seed_sampled_as_the_anchor_is(shipped: LoopConfig) -> None:
    steps, keys = planned(auto(shipped, seed=7)), Keys(VERSIONS)
    recipes = [recipe_of(steps[1, f"answer_t{t:g}"]) for t in (0.0, *GRID)]
    assert all(recipe == recipes[0] for recipe in recipes)
    assert (recipes[0]["seed"], recipes[0]["limit"]) == ([8, 8, 8, 8], PROMPTS // 2)
    assert recipes[0]["gen_kwargs"] == {"do_sample": True, "temperature": 1.0}
    assert "gen_kwargs" not in recipe_of(steps[1, "generate"]), "labels are as the recipe says"
    assert recipe_of(planned(auto(shipped, limit=5))[1, "answer_t0"])["limit"] == 5
    warm = read_recipes(shipped)
    warm["generate"]["gen_kwargs"] = {"do_sample": True, "temperature": 0.6, "max_gen_toks": 9}
    sampled = planned(auto(shipped), recipes=warm)
    assert recipe_of(sampled[1, "answer_t0.1"])["gen_kwargs"] == warm["generate"]["gen_kwargs"]
    assert keys[steps[1, "answer_t0"].stage] == keys[steps[2, "answer_t0"].stage], "the anchor is asked again once"


@pytest.mark.parametrize(("tasks", "each"), [(1, 200), (3, 66), (400, 1)])
def test_all_tasks_share_the_prompts_by_which_a_t_is_tried(shipped: LoopConfig, tasks: int, each: int) -> None:
    steps = planned(auto(shipped, iterations=1), prompt_tasks=[task(f"prompts_{n}") for n in range(tasks)])
    assert recipe_of(steps[1, "answer_t0.5"])["limit"] == each


def test_a_t_that_closes_no_trace_ends_no_run(shipped: LoopConfig) -> None:
    steps = planned(auto(shipped))
    assert steps[1, "generate"].stage.kind is generate.KIND
    assert steps[1, "answer_t0.9"].stage.kind is generate.TRIAL


def test_the_anchor_that_is_previous_is_what_was_chosen(shipped: LoopConfig) -> None:
    steps = planned(auto(shipped, anchor="previous"))
    choice = steps[2, "choose"].stage
    assert left_by(choice.inputs["checkpoint_0"]) == (steps[1, "choose"].stage, "thinking")
    assert left_by(choice.inputs["labels"]) == (steps[2, "generate"].stage, "answers")


def test_t_may_be_chosen_by_a_task_that_is_no_test(shipped: LoopConfig) -> None:
    steps = planned(auto(shipped, limit=5), validate_tasks=[task("held_out", grades_traces=False)])
    names = [name for iteration, name in steps if iteration == 1]
    assert "answer_t0" not in names
    assert [name for name in names if name.startswith("validate")] == [f"validate_t{t:g}" for t in (0.0, *GRID)]
    asked = steps[1, "validate_t0.3"]
    assert (recipe_of(asked)["tasks"], recipe_of(asked)["limit"], asked.checkpoint) == (["held_out"], 5, "")
    choice = steps[1, "choose"].stage
    assert "labels" not in choice.inputs
    for number, t in enumerate((0.0, *GRID)):
        validated = steps[1, f"validate_t{t:g}"].stage
        assert left_by(choice.inputs[f"graded_{number}"]) == (validated, "graded.jsonl")  # its grader knows no traces
        assert validated.inputs["checkpoint"] == choice.inputs[f"checkpoint_{number}"]
    assert recipe_of(steps[1, "choose"])["tasks"] == ["held_out"]


def test_what_validates_a_t_is_asked_as_a_test_of_thinking_is(shipped: LoopConfig) -> None:
    """With the user's own tasks, in 4 bits, with TaH's code, by the recipe that thinking has of its own."""
    config = auto(shipped, iterations=1, nf4=True, include_path=Path("/my/tasks"), seed=3)
    recipes = read_recipes(shipped)
    recipes["evaluate_thinking"] = {**recipes["evaluate"], "batch_size": 5}
    changes = {"recipes": recipes, "tah": frozenset({"thinking"}), "validate_tasks": [task("held_out")]}
    steps = planned(config, **changes)
    tested, tried = steps[1, "evaluate_thinking"].stage, steps[1, "validate_t0"].stage
    assert recipe_of(steps[1, "validate_t0"])["batch_size"] == 5
    assert recipe_of(steps[1, "evaluate_instruct"]).get("batch_size") != 5
    assert recipe_of(steps[1, "validate_t0"]) == {**recipe_of(steps[1, "evaluate_thinking"]), "tasks": ["held_out"]}
    assert tried.inputs.keys() == tested.inputs.keys() == {"checkpoint", "include_path"}
    assert [command[:2] for command in tried.commands] == [command[:2] for command in tested.commands]


def test_a_prompt_that_tries_a_t_is_asked_as_a_label_is(shipped: LoopConfig) -> None:
    steps = planned(auto(shipped, iterations=1, nf4=True, include_path=Path("/my/tasks")))
    label, tried = steps[1, "generate"], steps[1, "answer_t0"]
    assert tried.stage.inputs == label.stage.inputs
    assert tried.stage.commands == label.stage.commands
    changed = {"seed", "limit", "gen_kwargs"}
    assert {key: value for key, value in recipe_of(tried).items() if key not in changed} == {
        key: value for key, value in recipe_of(label).items() if key not in changed
    }


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_chooses_a_t_of_its_own(shipped: LoopConfig, arm: str) -> None:
    steps = planned(auto(shipped, arms=[arm]), gold=External("/came/gold.jsonl", "right"))
    choice, labels = steps[1, "choose"].stage, steps[1, "generate"].stage
    assert left_by(choice.inputs["labels"])[0] is labels
    assert labels.inputs["checkpoint"] == inputs_for(shipped).thinking
    assert {step.stage.kind.name for step in steps.values()} >= {"reconstruct", "answer", "choose", "evaluate"}


def test_auto_needs_one_t(shipped: LoopConfig) -> None:
    recipes = read_recipes(shipped)
    recipes["reconstruct"]["parameters"] = {"t": [{"filter": "mlp", "value": 0.1}, {"value": 0.5}]}
    with pytest.raises(LoopError, match="--t auto: the reconstruct recipe has a t of its own for each part"):
        planned(auto(shipped), recipes=recipes)


def test_a_step_s_name_without_its_t() -> None:
    names = {"reconstruct_t0.1": "reconstruct", "answer_t0": "answer", "evaluate_thinking": "evaluate_thinking"}
    assert {name: untried(name) for name in (*names, "evaluate_t0.1_x")} == {
        **names,
        "evaluate_t0.1_x": "evaluate_t0.1_x",
    }


# --- who is asked ---


def test_a_recipe_s_questions_are_asked_by_the_python_that_is_named_for_it(shipped: LoopConfig) -> None:
    recipes = read_recipes(shipped)
    recipes["evaluate_thinking"] = dict(recipes["evaluate"])
    named = {recipe: Interpreter(f"/{recipe}/python", "3.12", {}) for recipe in ("generate", "evaluate_thinking")}
    for validate in ([], [task("held_out")]):
        changes = {"recipes": recipes, "interpreters": named, "validate_tasks": validate}
        for (_, name), step in planned(auto(shipped, iterations=1), **changes).items():
            of = untried(name).replace("answer", "generate").replace("validate", "evaluate_thinking")
            python = step.stage.inputs.get("python")
            assert getattr(python, "path", None) == (named[of].path if of in named else None), name


@pytest.mark.parametrize(
    ("servers", "asked"),
    [
        ({"generate": "one"}, {"generate": "one", "answer": "one"}),
        ({"evaluate": "two"}, dict.fromkeys(("evaluate_instruct", "evaluate_thinking", "validate"), "two")),
        ({"evaluate_thinking": "three"}, dict.fromkeys(("evaluate_thinking", "validate"), "three")),
    ],
)
def test_a_recipe_s_questions_are_asked_of_the_server_that_is_named_for_it(
    shipped: LoopConfig, servers: dict[str, str], asked: dict[str, str]
) -> None:
    recipes = read_recipes(shipped)
    recipes["evaluate_thinking"] = dict(recipes["evaluate"])
    config = auto(shipped, iterations=1, servers={of: f"{name} {{checkpoint}}" for of, name in servers.items()})
    for validate in ([], [task("held_out")]):
        for (_, name), step in planned(config, recipes=recipes, validate_tasks=validate).items():
            started = step.stage.recipes.get("service.yml", {}).get("command")
            expected = asked.get(untried(name))
            assert started == (f"{expected} <<checkpoint>>" if expected else None), name


def test_a_server_for_both_is_thinking_s_unless_it_has_its_own(shipped: LoopConfig) -> None:
    recipes = read_recipes(shipped)
    recipes["evaluate_thinking"] = dict(recipes["evaluate"])
    config = shipped.model_copy(
        update={"servers": {"evaluate": "a {checkpoint}", "evaluate_thinking": "b {checkpoint}"}}
    )
    steps = planned(config, recipes=recipes)
    found = [steps[1, f"evaluate_{who}"].stage.recipes["service.yml"]["command"] for who in ("instruct", "thinking")]
    assert found == ["a <<checkpoint>>", "b <<checkpoint>>"]


@pytest.mark.parametrize("t", [0.2, "auto"])
def test_the_pair_is_told_from_a_third_model_by_its_names_in_loop_yml(shipped: LoopConfig, t: float | str) -> None:
    recipes = read_recipes(shipped)
    names = ("them/thinking", "them/third", "them/instruct")
    layers = [{"model": name, "layer_range": [0, 2]} for name in names]
    recipes["reconstruct"] |= {"base_model": names[0], "slices": [{"sources": layers}]}
    del recipes["reconstruct"]["models"]
    config = shipped.model_copy(update={"t": t, "iterations": 1, "written_pair": (names[2], names[0])})
    name = "reconstruct_t0.2" if t == "auto" else "reconstruct"
    (slices,) = recipe_of(planned(config, recipes=recipes)[1, name])["slices"]
    assert [source["model"] for source in slices["sources"]] == ["<<anchor>>", "them/third", "<<instruct>>"]


# --- the user's own ---


def test_own_prompts_reach_the_labels_and_what_learns_them(shipped: LoopConfig) -> None:
    own = shipped.model_copy(update={"prompts": ["/mine/p.jsonl"], "tasks": ["my_test"]})
    rows = [{"id": "1", "messages": [{"role": "user", "content": "1+1?"}]}]
    steps = planned(own, prompts=rows)
    generate, distill = steps[1, "generate"], steps[1, "distill"]
    assert recipe_of(generate)["tasks"] == ["prompts_file"]
    assert recipe_of(generate)["metadata"]["prompts_file"] == "<<stage>>/prompts.jsonl"
    assert [json.loads(line) for line in generate.stage.files["prompts.jsonl"].splitlines()] == rows
    (dataset,) = recipe_of(distill)["datasets"]
    assert "samples_prompts_file_" in dataset["data_files"][0]
    assert dataset["type"] == "thinkswitch_plugin.trace_stripping"
    assert recipe_of(steps[2, "evaluate_thinking"])["tasks"] == ["my_test"]
    assert "/mine" not in json.dumps([recipe_of(step) for step in steps.values()])  # it is read, and comes along


def test_other_prompts_are_other_labels_and_leave_the_first_evaluation_alone(shipped: LoopConfig) -> None:
    own = shipped.model_copy(update={"prompts": ["/mine/p.jsonl"]})
    keys = Keys(VERSIONS)
    first, second = (planned(own, prompts=[{"id": str(n), "messages": []}]) for n in (1, 2))
    same = {place for place in first if keys[first[place].stage] == keys[second[place].stage]}
    assert same == {(0, "evaluate_instruct"), (0, "evaluate_thinking")}


def test_a_group_asks_and_learns_all_its_members(shipped: LoopConfig) -> None:
    members = [task(name, conversations=True) for name in ("sums", "products")]
    steps = planned(shipped, prompt_tasks=members, test_tasks=members)
    assert recipe_of(steps[1, "generate"])["tasks"] == ["sums", "products"]
    files = [entry["data_files"][0] for entry in recipe_of(steps[1, "distill"])["datasets"]]
    assert [file.partition("samples_")[2].partition("_")[0] for file in files] == ["sums", "products"]


def test_own_tasks_are_found_wherever_they_are_asked_and_their_folder_is_in_no_key(shipped: LoopConfig) -> None:
    keys = Keys(VERSIONS)
    here, moved = (planned(shipped.model_copy(update={"include_path": Path(p)})) for p in ("/my/tasks", "/moved"))
    for (_, name), step in here.items():
        if name in ("distill", "reconstruct"):
            assert "include_path" not in step.stage.inputs
        else:
            assert recipe_of(step)["include_path"] == "<<include_path>>"
            assert step.stage.inputs["include_path"].path == "/my/tasks"  # type: ignore[union-attr]
    assert all(keys[here[place].stage] == keys[moved[place].stage] for place in here)


def test_a_task_s_definition_is_in_the_keys_of_those_that_ask_it(shipped: LoopConfig) -> None:
    keys = Keys(VERSIONS)
    changed = [task(shipped.tasks[0], definition="another"), *map(task, shipped.tasks[1:])]
    before, after = planned(shipped), planned(shipped, test_tasks=changed)
    other = {place[1] for place in before if keys[before[place].stage] != keys[after[place].stage]}
    assert other == {"evaluate_instruct", "evaluate_thinking"}


def test_a_tah_checkpoint_is_told_from_its_twin() -> None:
    config = load(recipes_folder() / "loop.yml", {"iterations": 0})
    steps = planned(config, tah=frozenset({"instruct"}))
    assert recipe_of(steps[0, "evaluate_instruct"])["model_args"]["trust_remote_code"] is True
    assert "trust_remote_code" not in recipe_of(steps[0, "evaluate_thinking"])["model_args"]


# --- on-policy ---


def test_on_policy_takes_the_place_of_distillation_with_this_iteration_s_teacher() -> None:
    config = load(recipes_folder() / "loop.yml", {"iterations": 2, "distill": "on-policy"})
    steps, inputs = planned(config), inputs_for(config)
    stages = {place: step.stage for place, step in steps.items()}
    for k in (1, 2):
        recipe = recipe_of(steps[k, "distill"])
        assert recipe["plugins"] == ["thinkswitch_plugin.on_policy_kl.OnPolicyKLPlugin"]
        assert recipe["on_policy_kl"]["teacher"] == "<<thinking>>"
        assert recipe["base_model"] == "<<instruct>>"
        assert {entry["type"] for entry in recipe["datasets"]} == {"thinkswitch_plugin.on_policy_kl"}
    assert stages[1, "distill"].inputs["thinking"] == inputs.thinking
    assert left_by(stages[2, "distill"].inputs["thinking"]) == (stages[1, "reconstruct"], "thinking")


# --- files that a recipe names ---


@pytest.fixture
def identify(tmp_path: Path) -> Callable[[str, str], str | None]:
    """What a local file is, by its content; read anew each time."""

    def identity(key: str, text: str) -> str | None:
        known = Known(tmp_path / "known.json")
        return known.path(Path(text)) if text.startswith("/") and Path(text).exists() else None

    return identity


def with_replay(path: Path) -> Any:
    entry = {"path": str(path), "ds_type": "json", "type": "chat_template"}
    return toy("learns", recipes={"recipe.yml": {"datasets": [{"path": "<<labels>>"}, entry, entry], "lr": 0.1}})


def test_a_file_that_a_recipe_names_is_known_by_what_it_holds(
    tmp_path: Path, identify: Callable[[str, str], str | None]
) -> None:
    keys = Keys(VERSIONS)
    file, moved = tmp_path / "replay.jsonl", tmp_path / "elsewhere.jsonl"
    file.write_text('{"messages": []}\n')
    stage = pinned(with_replay(file), identify)
    name, source = next(iter(stage.inputs.items()))
    assert source == External(str(file), identify("path", str(file)) or "")
    assert len(stage.inputs) == 1  # however often it is named
    datasets = stage.recipes["recipe.yml"]["datasets"]
    assert [entry["path"] for entry in datasets] == ["<<labels>>", f"<<{name}>>", f"<<{name}>>"]
    assert str(tmp_path) not in json.dumps(keys.material(stage))
    before = keys[stage]
    moved.write_bytes(file.read_bytes())
    assert keys[pinned(with_replay(moved), identify)] == before
    file.write_text('{"messages": [1]}\n')
    assert keys[pinned(with_replay(file), identify)] != before


def test_a_folder_that_a_recipe_names_is_known_by_all_that_is_in_it(
    tmp_path: Path, identify: Callable[[str, str], str | None]
) -> None:
    keys = Keys(VERSIONS)
    (tmp_path / "data/deep").mkdir(parents=True)
    (tmp_path / "data/deep/a.jsonl").write_text("1")
    before = keys[pinned(with_replay(tmp_path / "data"), identify)]
    (tmp_path / "data").rename(tmp_path / "moved")
    assert keys[pinned(with_replay(tmp_path / "moved"), identify)] == before
    (tmp_path / "moved/deep/a.jsonl").write_text("2")
    assert keys[pinned(with_replay(tmp_path / "moved"), identify)] != before


def test_two_files_that_change_places_are_another_stage(
    tmp_path: Path, identify: Callable[[str, str], str | None]
) -> None:
    keys = Keys(VERSIONS)
    for name in "ab":
        (tmp_path / name).write_text(name)
    paths = [str(tmp_path / name) for name in "ab"]
    ours, theirs = (
        pinned(toy("x", recipes={"r": {"one": one, "two": two}}), identify) for one, two in (paths, paths[::-1])
    )
    assert keys[ours] != keys[theirs]


def test_a_file_is_asked_for_by_the_key_it_stands_under() -> None:
    asked = []
    recipe = {"datasets": [{"path": "a", "data_files": ["b", "c"]}], "chat_template_jinja": "d", "n": 1}
    pinned(toy("x", recipes={"r": recipe}), lambda key, text: asked.append((key, text)))
    assert asked == [("path", "a"), ("data_files", "b"), ("data_files", "c"), ("chat_template_jinja", "d")]


def test_a_stage_that_names_no_file_stays_as_it_is(identify: Callable[[str, str], str | None]) -> None:
    stage = toy("x", recipes={"r": {"a": "<<stage>>/out", "b": "owner/name", "c": "/no/such/file", "d": [1, None]}})
    assert pinned(stage, identify) is stage


def test_what_a_recipe_in_the_user_s_folder_names_beside_it_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, identify: Callable[[str, str], str | None]
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "replay.jsonl").write_text("{}")
    loop = yaml.safe_load((recipes_folder() / "loop.yml").read_text())
    files = {name: str(recipes_folder() / file) for name, file in loop["recipes"].items()}
    train = yaml.safe_load(Path(files["distill"]).read_text())
    train["datasets"].append({"path": "./replay.jsonl", "type": "chat_template", "ds_type": "json"})
    (mine / "train.yml").write_text(yaml.safe_dump(train))
    loop["recipes"] = {**files, "distill": "train.yml"}
    (mine / "loop.yml").write_text(yaml.safe_dump(loop))
    monkeypatch.chdir(tmp_path)
    config = load(Path("mine/loop.yml"), {"iterations": 1})
    stage = planned(config, identify=identify)[1, "distill"].stage
    (name,) = (name for name, source in stage.inputs.items() if getattr(source, "path", "").endswith("replay.jsonl"))
    assert stage.inputs[name].path == str(mine / "replay.jsonl")  # type: ignore[union-attr]
    assert stage.recipes["recipe.yml"]["datasets"][-1]["path"] == f"<<{name}>>"


# --- as a person would type it ---


def test_commands_have_every_path_in_its_place(shipped: LoopConfig) -> None:
    for step in planned(shipped.model_copy(update={"nf4": True})).values():
        paths = {"stage": "/out/stages/x-01"} | {name: f"/in/{name}" for name in step.stage.inputs}
        for command in commands(step.stage, paths):
            assert "<<" not in " ".join(command)
        assert len(commands(step.stage, paths)) == len(step.stage.commands)
    moved = replace(toy("x"), commands=(("toy", "<<a>>", "--out=<<stage>>/b"),))
    assert commands(moved, {"stage": "/s", "a": "/in put"}) == [["toy", "/in put", "--out=/s/b"]]


def test_a_stage_that_reads_a_pinned_one_reads_that_one(shipped: LoopConfig) -> None:
    steps = planned(shipped, identify=lambda key, text: "data" if key == "ds_type" else None)
    every = {id(step.stage) for step in steps.values()}
    assert all(id(needed) in every for step in steps.values() for needed in step.stage.needs())
    assert "file_1" in steps[1, "distill"].stage.inputs


def arms(shipped: LoopConfig, *names: str, seeds: tuple[int, ...] = (), iterations: int = 2) -> list[Step]:
    config = shipped.model_copy(update={"arms": list(names), "seeds": list(seeds), "iterations": iterations})
    return plan(config, inputs_for(config, gold=External("/came/gold.jsonl", "right answers")), iterations)


def test_arms_share_every_stage_that_reads_the_same(shipped: LoopConfig) -> None:
    steps = arms(shipped, "thinkswitch", "merge_only", "gold", "untouched")
    keys = Keys(VERSIONS)
    by = {(step.arm, step.iteration, step.name): keys[step.stage] for step in steps}
    for arm in ("merge_only", "gold", "untouched"):
        for who in ("instruct", "thinking"):
            assert by[arm, 0, f"evaluate_{who}"] == by["thinkswitch", 0, f"evaluate_{who}"]
    assert by["untouched", 1, "generate"] == by["thinkswitch", 1, "generate"]
    assert by["untouched", 1, "distill"] != by["thinkswitch", 1, "distill"]
    assert by["merge_only", 1, "evaluate_instruct"] == by["thinkswitch", 0, "evaluate_instruct"], "it learnt nothing"
    alone = arms(shipped, "thinkswitch")
    assert [keys[s.stage] for s in steps if s.arm == "thinkswitch"] == [keys[s.stage] for s in alone]


def test_each_arm_puts_one_stage_otherwise(shipped: LoopConfig) -> None:
    steps = arms(shipped, "thinkswitch", "merge_only", "gold", "untouched", "on_policy")
    names = {arm: [s.name for s in steps if s.arm == arm and s.iteration == 2 and not s.checkpoint] for arm in ARMS}
    assert names["thinkswitch"] == names["untouched"] == names["on_policy"] == ["generate", "distill", "reconstruct"]
    assert names["gold"] == ["distill", "reconstruct"]
    assert names["merge_only"] == []
    learnt = {s.arm: s for s in steps if s.name == "distill" and s.iteration == 1}
    assert recipe_of(learnt["untouched"])["trace_stripping"]["strip"] is False
    assert "strip" not in recipe_of(learnt["thinkswitch"])["trace_stripping"]
    assert recipe_of(learnt["gold"])["datasets"][0]["data_files"] == ["<<labels>>"]
    assert learnt["gold"].stage.inputs["labels"] == External("/came/gold.jsonl", "right answers")
    assert "on_policy_kl" in recipe_of(learnt["on_policy"])
    (merged,) = [s.stage for s in steps if s.arm == "merge_only" and s.name == "reconstruct"]
    assert merged.inputs["instruct"] == External("/came/instruct", "identity of instruct")


def test_places_of_arms_and_seeds_never_meet(shipped: LoopConfig) -> None:
    steps = arms(shipped, "thinkswitch", "untouched", seeds=(0, 1))
    assert len({step.place for step in steps}) == len(steps)
    assert steps[0].place == "iter_00/evaluate_instruct"
    assert {step.part for step in steps} == {"", "untouched-0", "thinkswitch-1", "untouched-1"}
    seeds = {s.seed: recipe_of(s)["seed"] for s in steps if s.name == "distill" and s.arm == "thinkswitch"}
    assert seeds == {0: 0, 1: 1}
