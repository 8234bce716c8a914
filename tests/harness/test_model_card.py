"""What a published checkpoint's card says, and its scores as the hub reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from exported import COMMIT, INSTRUCT, OTHER, QUESTIONS, THINKING, checkpoint, made_up
from huggingface_hub import ModelCard, parse_eval_result_entries
from made_runs import finished

from harness import lineage, model_card
from harness.config import LoopConfig
from harness.errors import LoopError
from harness.model_card import Licence
from harness.rundir import RunDir
from harness.stats import interval


@pytest.fixture(scope="module")
def out(shipped: LoopConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run of a pair of the hub's is, which no test writes to."""
    out = tmp_path_factory.mktemp("made")
    made_up(shipped, out)
    return out


def files(out: Path, name: str, adapter_only: bool = False) -> dict[str, str]:
    chosen = lineage.choose(out, name)
    return model_card.files(chosen, Licence("apache-2.0"), "me/mine", adapter_only)


def card(out: Path, name: str, adapter_only: bool = False) -> ModelCard:
    return ModelCard(files(out, name, adapter_only)["README.md"])


@pytest.mark.parametrize(
    ("name", "adapter_only", "library", "base", "relation"),
    [
        ("mine:instruct@2", False, "transformers", [INSTRUCT], "finetune"),
        ("mine:instruct@2", True, "peft", [INSTRUCT], "adapter"),
        ("mine:thinking@1", False, "transformers", [INSTRUCT, THINKING], "merge"),
    ],
)
def test_the_front_matter(
    out: Path, name: str, adapter_only: bool, library: str, base: list[str], relation: str
) -> None:
    data = card(out, name, adapter_only).data.to_dict()
    assert (data["library_name"], data["base_model"], data["base_model_relation"]) == (library, base, relation)
    assert (data["license"], data["pipeline_tag"], data["datasets"]) == (
        "apache-2.0",
        "text-generation",
        ["owner/questions"],
    )


def test_the_model_index_has_each_tasks_score(out: Path) -> None:
    results = {one.dataset_name: one for one in card(out, "mine:instruct@2").data.eval_results}
    assert {task: one.metric_value for task, one in results.items()} == dict.fromkeys(
        ("aime26", "pubmedqa30", "own"), round(10 / QUESTIONS, 4)
    )
    whole, few, own = results["aime26"], results["pubmedqa30"], results["own"]
    assert (whole.dataset_type, whole.dataset_split) == ("MathArena/aime_2026", "train")
    assert (few.dataset_type, few.dataset_config) == ("qiaojin/PubMedQA", "pqa_labeled")
    assert own.dataset_type == "own"
    assert "n = 12" in str(whole.metric_name)


def test_scores_go_to_a_leaderboard_where_the_whole_data_set_of_the_hub_was_asked(out: Path) -> None:
    found = files(out, "mine:instruct@2")
    assert [name for name in found if name.startswith(".eval_results/")] == [".eval_results/aime26.yaml"]
    (entry,) = parse_eval_result_entries(yaml.safe_load(found[".eval_results/aime26.yaml"]))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("MathArena/aime_2026", "default", 83.33)
    assert "n = 12" in str(entry.notes)


def test_the_text_says_what_the_record_does(out: Path) -> None:
    said = card(out, "mine:instruct@2").text
    low, high = interval([1.0] * 10 + [0.0] * 2)
    for words in (
        "iteration 2 of 2, arm `thinkswitch`, seed 42",
        f"| `aime26` | instruct | 12 | 83.3% | {100 * low:.1f}–{100 * high:.1f} | 8.0 | 0% |",
        "| `aime26` | thinking, as it came | 12 | 75.0% |",
        "against instruct as it came: instruct is better on aime26",
        "16.7% → 83.3% of 12 questions (8 gained, 0 lost; p = ",
        f"[{INSTRUCT}](https://huggingface.co/{INSTRUCT}), revision `{COMMIT}`",
        f"[{THINKING}](https://huggingface.co/{THINKING}), revision `{OTHER}`",
        "asked with `temperature: 0.6`",
        "Prompts: `asked` (owner/questions, split train), 12 of them",
        "| 1 | 12 | 11 | 12 | 10 | 1 unclosed, 1 empty_answer | 5000 | 800 |",
        "| 2 | 12 | 11 | 12 | 9 | 1 unclosed, 2 empty_answer | 5000 | 800 |",
        "`lora_r: 16`",
        "t = 0.1",
        "Of the 36 test questions none is word for word in one of the 12 training prompts",
        ", 2.86 US dollars.",
        "ts-loop --config ts_loop/loop.yml",
        "**The run is not finished**: 1 of its stages were still to do (iter_02/evaluate_thinking)",
        'pipeline("text-generation", "me/mine")',
    ):
        assert words in said, words


def test_an_iteration_that_is_not_the_last_may_have_been_chosen(out: Path) -> None:
    assert "if it was chosen by these scores" in card(out, "mine:instruct@1").text
    assert "it was not chosen by these scores" in card(out, "mine:instruct@2").text


def test_a_dials_is_of_the_run_that_was_turned(shipped: LoopConfig, tmp_path: Path) -> None:
    run = made_up(shipped, tmp_path)
    steps = [step for step in run.folder.noted()["steps"] if step["iteration"] == 2]
    rebuilt = next(step for step in steps if step["name"] == "reconstruct")
    recipe = {**rebuilt["reads"]["recipes"]["recipe.yml"], "parameters": {"t": 0.3}}
    reads = {**rebuilt["reads"], "recipes": {"recipe.yml": recipe}}
    turned = {"arm": "t=0.3", "key": "reconstruct-0.3", "place": "t_0.3/iter_02/reconstruct", "reads": reads}
    finished(run.store, "reconstruct-0.3", checkpoint("thinking"), checkpoint="thinking")
    RunDir(tmp_path / "mine.dial").note(asked=run.folder.noted()["asked"], steps=[{**rebuilt, **turned}])
    rows = [json.loads(line) for line in (tmp_path / "mine" / "outcomes.jsonl").open()]
    mine = [row for row in rows if (row["iteration"], row["checkpoint"]) == (1, "thinking")]
    lines = [json.dumps({**row, "run": "mine.dial", "arm": "t=0.3", "iteration": 2}) + "\n" for row in mine]
    (tmp_path / "mine.dial" / "outcomes.jsonl").write_text("".join(lines))
    said = card(tmp_path, "mine.dial/t=0.3").text
    for words in (
        "One t of a dial: if it was chosen by these scores",
        "`slerp`, t = 0.3",
        "| `aime26` | thinking, as it came | 12 | 75.0% |",
        "ts-loop --config ts_loop/loop.yml\nts-loop dial mine --t 0.3",
    ):
        assert words in said, words
    with pytest.raises(LoopError, match=r"name one of its arms, as in mine\.dial/t=0\.3"):
        lineage.choose(tmp_path, "mine.dial")


def test_what_was_not_evaluated_has_no_scores(out: Path) -> None:
    found = card(out, "mine:thinking@2")
    assert "It was not evaluated." in found.text
    assert "model-index" not in found.data.to_dict()


def test_an_adapter_trained_in_nf4_says_what_it_goes_upon(out: Path) -> None:
    said = card(out, "mine:instruct@1", adapter_only=True).text
    assert "quantization_config=nf4)  # fetches owner/instruct-4b" in said
    assert "The merged checkpoint's scores, all of whose matrices were rounded to NF4" in said
    whole = card(out, "mine:instruct@1").text
    assert "quantization_config" not in whole
    assert "which rounds every matrix to NF4 first" in whole


def test_a_local_parent_is_no_model_of_the_hubs(shipped: LoopConfig, tmp_path: Path) -> None:
    made_up(shipped, tmp_path, instruct="/home/me/my_instruct")
    found = card(tmp_path, "mine:instruct@2")
    assert not {"base_model", "base_model_relation"} & found.data.to_dict().keys()
    assert "a local checkpoint, `my_instruct`, of which a loader reads what has the SHA-256" in found.text
    assert "/home/me" not in found.content
    assert card(tmp_path, "mine:thinking@1").data.to_dict()["base_model"] == [THINKING]


def test_test_questions_among_the_prompts_are_counted(shipped: LoopConfig, tmp_path: Path) -> None:
    run = made_up(shipped, tmp_path)
    step = next(step for step in run.steps if step.name == "generate")
    (file,) = run.store.folder(run.keys[step.stage]).glob("answers/samples_*")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[3]["doc"]["question"] = "Answer this.  what is AIME26 7?\nThink."
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = card(tmp_path, "mine:instruct@2").text
    assert "Of the 36 test questions 1 is word for word in one of the 12 training prompts" in said
    assert "**these scores are not of unseen questions alone**" in said


def test_several_seeds_are_told_apart_from_the_one_that_is_published(shipped: LoopConfig, tmp_path: Path) -> None:
    made_up(shipped, tmp_path, seeds=[0, 1], arms=["thinkswitch", "untouched"])
    assert "This is one seed of several." in card(tmp_path, "mine:instruct@2").text
    untouched = card(tmp_path, "mine/untouched-1:instruct@2").text
    assert "arm `untouched`, seed 1" in untouched
    assert "were kept and learnt with the answers: a baseline" in untouched
