"""Which t is chosen: the rule against a plain restatement of it, what two answers share that agree, and the command."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from harness import choosing
from harness.choosing import Tried, Written, agreement, best, chosen, closed, judged, main, read, stated, taken
from harness.errors import LoopError
from harness.stages import External, Keys, Output, choose

shares = st.integers(0, 200).map(lambda count: count / 200)


def tried(*outcomes: tuple[float, float], n: int = 200) -> list[Tried]:
    """Closed and agreement at t = 0, 0.1, …"""
    return [Tried(round(at / 10, 1), *outcome, n) for at, outcome in enumerate(outcomes)]


# --- the rule ---


@given(st.lists(st.tuples(shares, shares), min_size=1, max_size=10))
def test_the_largest_t_below_which_none_falls_short(outcomes: list[tuple[float, float]]) -> None:
    found = tried(*outcomes)
    choice = chosen(found)
    # In whole answers of 200, of which a point is two.
    counts = [(round(200 * one.closed), round(200 * one.agreement)) for one in found]
    compared = counts[0][1] >= 20

    def falls_short(at: int) -> bool:
        return at > 0 and (not compared or counts[at][0] < counts[0][0] - 2 or counts[at][1] < counts[0][1] - 2)

    passing = [at for at in range(len(found)) if not any(falls_short(smaller) for smaller in range(at + 1))]
    assert choice["t"] == found[max(passing)].t
    assert [one["passes"] for one in choice["candidates"]] == [not falls_short(at) for at in range(len(found))]
    assert (choice["demanded"]["agreement"] is None) == (not compared)


def test_a_cliff_of_either_kind_is_where_it_ends_and_is_named() -> None:
    closing = chosen(tried((1, 0.8), (1, 0.79), (0.98, 0.8), (1, 0.8)))
    assert closing["t"] == 0.1
    assert "t = 0.2 falls short (98.0% closed, 80.0% as the anchor)" in closing["why"]
    assert "99.0% closed and 79.0% as the anchor are demanded" in closing["why"]
    agreeing = chosen(tried((1, 0.8), (1, 0.785)))
    assert agreeing["why"].startswith("t = 0, the anchor itself; t = 0.1 falls short (100.0% closed, 78.5%")
    assert chosen(tried((0.5, 0.3), (0.9, 0.9)))["why"].startswith(
        "t = 0.1 (90.0% closed, 90.0% as the anchor), the lar"
    )


def test_answers_that_cannot_be_compared_choose_nothing_and_few_are_said_to_be_few() -> None:
    prose = chosen(tried((1, 0.05), (1, 0.0), (0.9, 0.05)))
    assert prose["t"] == 0.0  # that traces close says nothing of what follows them
    assert [one["passes"] for one in prose["candidates"]] == [True, False, False]
    assert "the anchor agrees with itself on 5.0% alone" in prose["why"]
    assert "validate:" in prose["why"]
    assert "chance weighs much" in chosen(tried((1, 1), (1, 1), n=99))["why"]
    assert "chance weighs much" not in chosen(tried((1, 1), (1, 1), n=100))["why"]


def test_the_best_score_of_equals_the_largest_t() -> None:
    scores = {
        0.0: {"a": 0.5, "b": 0.7},
        0.1: {"a": 0.6, "b": 0.7},
        0.2: {"a": 0.7, "b": 0.6},
        0.3: {"a": 0.6, "b": 0.6},
    }
    choice = best(scores)
    assert choice["t"] == 0.2
    assert choice["why"] == "t = 0.2: the best of 4 on a 70.0%, b 60.0%; the anchor has 60.0%"
    assert [one["passes"] for one in choice["candidates"]] == [False, True, True, False]
    assert best({0.0: {"a": 0.5}, 0.1: {"a": 0.4}})["t"] == 0


# --- what answers state ---


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"So it is \boxed{78}.", r"\boxed{ 78 }"),
        (r"\boxed{\frac12}", r"thus $\boxed{\frac{1}{2}}$"),
        ("yes", "The answer is yes."),
        ("The answer is 277.", "70 + 207 = 277"),
        ("The Battle of  Hastings.", "the battle of\nHastings"),
    ],
)
def test_answers_that_state_the_same(one: str, other: str) -> None:
    assert stated(one) == stated(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\boxed{78}", r"\boxed{79}"),
        (r"78, no: \boxed{79}", r"\boxed{78}"),
        ("yes", "no"),
        ("The answer is 277.", "The answer is 278."),
        ("Hastings", "Stamford Bridge"),
        (r"\boxed{\frac{1}", r"\boxed{2}"),
    ],
)
def test_answers_that_state_something_else(one: str, other: str) -> None:
    assert stated(one) != stated(other)


def test_an_answer_without_a_closed_trace_agrees_with_none() -> None:
    ours: Written = {("a", 0): ["1"], ("a", 1): [None], ("a", 2): ["2"], ("a", 3): ["3"], ("b", 0): ["4", "5"]}
    theirs: Written = {("a", 0): ["1"], ("a", 1): [None], ("a", 2): [None], ("b", 0): ["4", "4"], ("b", 9): ["0"]}
    assert agreement(ours, theirs) == (2 / 5, 5)  # what one of them was not asked does not count
    assert closed(ours) == 5 / 6
    with pytest.raises(LoopError, match="no prompt in common"):
        agreement({("a", 0): ["1"]}, {("a", 1): ["1"]})


# --- what lm-eval left ---


def asked(folder: Path, task: str, texts: list[str], **config: Any) -> Path:
    """A folder as lm-eval leaves it, of prompts that open a trace."""
    folder.mkdir(parents=True)
    results = {"configs": {task: config}, "n-samples": {task: {"original": 9, "effective": len(texts)}}}
    (folder / "results_2026-01-01.json").write_text(json.dumps(results))
    rows = [
        {
            "doc_id": at,
            "doc": {"trace_opened": True},
            "filter": "none",
            "resps": [[text]],
            "arguments": {"gen_args_0": {"arg_0": "asked <think>", "arg_1": {}}},
        }
        for at, text in enumerate(texts)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"samples_{task}_2026-01-01T00.jsonl").write_text(lines)
    return folder


def test_what_follows_a_closed_trace_is_read(tmp_path: Path) -> None:
    texts = [r"78 </think> \boxed{79}", "no end of 78", "thought </think>  ", "</think>yes"]
    found = read(asked(tmp_path / "answers", "mine", texts), ["mine"], {})
    assert found == {("mine", 0): ["79"], ("mine", 1): [None], ("mine", 2): [None], ("mine", 3): ["yes"]}


def test_a_task_s_own_filter_is_asked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import lm_eval.tasks

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    manager = partial(lm_eval.tasks.TaskManager, include_defaults=False)  # no index of lm-eval's own 13,000 task files
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    regex = {"function": "regex", "regex_pattern": r"code ([a-z]+)"}
    filters = [{"name": "code", "filter": [regex, {"function": "take_first"}]}]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/rows.jsonl").write_text('{"q": "?"}\n')
    written = {
        "task": "coded",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"train": str(tmp_path / "tasks/rows.jsonl")}},
        "test_split": "train",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "",
        "filter_list": filters,
    }
    (tmp_path / "tasks/coded.yaml").write_text(yaml.safe_dump(written))
    texts = ["code no </think> It is code abc, 12", "</think> it is code abc of 13", "</think> just 13", "code x"]
    folder = asked(tmp_path / "answers", "coded", texts, filter_list=filters)
    found = read(folder, ["coded"], {"include_path": str(tmp_path / "tasks")})
    assert list(found.values()) == [["abc"], ["abc"], ["13"], [None]]


# --- the command and its stage ---


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Checkpoints and their answers: one that goes past a cliff at t = 0.2."""
    answers = {"labels": "1234", "answers_0": "1235", "answers_1": "1235", "answers_2": "9999"}
    for name, digits in answers.items():
        asked(tmp_path / "stages" / name, "mine", [f"</think>{digit}" for digit in digits])
    for name in ("stages/c1", "stages/c2", "came"):
        (tmp_path / name).mkdir()
        for file in ("config.json", "model.safetensors", "notes.txt"):
            (tmp_path / name / file).write_text(f"{file} of {name}")
    return tmp_path / "stages"


def recipe_in(store: Path) -> dict[str, Any]:
    places = {0.0: store.parent / "came", 0.1: store / "c1", 0.2: store / "c2"}
    lines = [
        {"t": t, "checkpoint": str(place), "answers": str(store / f"answers_{at}")}
        for at, (t, place) in enumerate(places.items())
    ]
    return {"tasks": ["mine"], "labels": str(store / "labels"), "tried": lines}


def test_the_command_leaves_the_choice_and_its_checkpoint(store: Path, monkeypatch: Any, capsys: Any) -> None:
    folder = store / "choose-1"
    folder.mkdir()
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe_in(store)))
    monkeypatch.setattr(sys, "argv", ["choosing", str(folder / "recipe.yml"), str(folder)])
    main()
    facts = choose.read(folder, None)  # type: ignore[arg-type]
    assert facts["t"] == 0.1
    assert facts["candidates"][2] == {"t": 0.2, "closed": 1.0, "agreement": 0.0, "passes": False}
    assert choose.note(facts) == capsys.readouterr().out.strip()
    assert {path.name for path in (folder / "thinking").iterdir()} == {"config.json", "model.safetensors"}
    assert os.path.samefile(folder / "thinking/model.safetensors", store / "c1/model.safetensors"), "no disk is eaten"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tried": []}, "must have t: 0"),
        ({"tasks": None}, "has no tasks"),
        ({"labels": "/nowhere"}, "lm-eval left no results"),
    ],
)
def test_a_recipe_that_cannot_be_judged_is_refused_in_a_line(
    store: Path, monkeypatch: Any, change: dict[str, Any], says: str
) -> None:
    recipe = {key: value for key, value in {**recipe_in(store), **change}.items() if value is not None}
    (store / "recipe.yml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(sys, "argv", ["choosing", str(store / "recipe.yml"), str(store)])
    with pytest.raises(SystemExit, match=says) as refused:
        main()
    assert "\n" not in str(refused.value)
    assert not (store / "thinking").exists()


def test_a_user_s_own_checkpoint_is_copied_not_linked(store: Path) -> None:
    (store / "choose-2").mkdir()
    taken(store.parent / "came", store / "choose-2/thinking")
    copied, own = store / "choose-2/thinking/config.json", store.parent / "came/config.json"
    assert copied.read_text() == own.read_text()
    assert not os.path.samefile(copied, own), "training it in place would change a stage that is done"


def test_with_scores_the_test_s_own_reader_says_which_is_right(store: Path) -> None:
    for name, scores in {"v0": "1100", "v1": "1110", "v2": "1011"}.items():
        folder = asked(store / name, "held_out", ["</think>x"] * 4)
        file = next(folder.glob("samples_*"))
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        lines = [{**row, "metrics": ["right"], "right": int(score)} for row, score in zip(rows, scores, strict=True)]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = [{"t": t, "checkpoint": "", "answers": str(store / f"v{at}")} for at, t in enumerate((0.0, 0.1, 0.2))]
    choice = judged({"tasks": ["held_out"], "tried": lines})
    assert (choice["t"], [one["accuracy"] for one in choice["candidates"]]) == (
        0.2,
        [{"held_out": 0.5}, {"held_out": 0.75}, {"held_out": 0.75}],
    )


def test_the_rule_s_code_and_every_answer_are_in_the_stage_s_key(store: Path) -> None:
    from made_runs import toy

    labels, answers, rebuilt = toy("labels"), toy("answers"), toy("rebuilt")
    lines = [
        choose.Tried(0.0, External("/came", "came"), answers),
        choose.Tried(0.1, Output(rebuilt, "thinking"), answers, "graded.jsonl"),
    ]
    stage = choose.build(lines, ["mine"], labels)
    assert set(stage.needs()) == {labels, answers, rebuilt}
    (recipe,) = stage.recipes.values()
    assert recipe["tried"][1]["graded"] == "<<graded_1>>"
    assert Keys({"choosing": "1"})[stage] != Keys({"choosing": "2"})[stage]
    assert (choosing.CHOICE, choosing.CHECKPOINT) == (choose.CHOICE, choose.CHECKPOINT)
