"""Which rows a task has: training apart from test, no answer in a prompt, and whether the template opens the trace."""

from __future__ import annotations

import json
import logging
from collections import Counter

import pytest

PROMPT_COLUMNS = {"id", "messages", "trace_opened"}


def rows_of(task: str, tasks_folder, **metadata) -> list[dict]:
    """The rows of a task as lm-eval would load them for a model."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks_folder), include_defaults=False, metadata=metadata)
    return list(manager.load_task_or_group(task)[task].eval_docs)


@pytest.mark.parametrize(
    ("kind", "metadata", "opened"),
    [
        ("thinking", {"pretrained": "HERE"}, True),
        ("instruct", {"pretrained": "HERE"}, False),
        ("thinking", {"pretrained": "elsewhere", "tokenizer": "HERE"}, True),
        ("thinking", {"model": "HERE", "base_url": "http://localhost"}, True),
        ("thinking", {"pretrained": "HERE", "trace_opened": False}, False),
        ("instruct", {"pretrained": "HERE", "trace_opened": True}, True),
        ("instruct", {"pretrained": "HERE", "think_end_token": "</think>"}, False),
    ],
)
def test_the_template_says_whether_a_trace_is_opened(dataset, checkpoint, kind, metadata, opened) -> None:
    folder = str(checkpoint(kind))
    metadata = {key: folder if value == "HERE" else value for key, value in metadata.items()}
    assert dataset.trace_opened(metadata) is opened


def test_a_tokenizer_object_is_asked_itself(dataset, checkpoint) -> None:
    from transformers import AutoTokenizer

    assert dataset.trace_opened({"tokenizer": AutoTokenizer.from_pretrained(checkpoint("thinking"))})


@pytest.mark.parametrize(
    "metadata", [{"enable_thinking": True}, {"chat_template_args": {"enable_thinking": True}, "enable_thinking": False}]
)
def test_a_template_that_thinks_on_request_is_asked_as_the_run_asks_it(dataset, checkpoint, metadata) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint("instruct"))
    tokenizer.chat_template += "{% if enable_thinking and add_generation_prompt %}<think>\n{% endif %}"
    assert not dataset.trace_opened({"tokenizer": tokenizer})
    assert dataset.trace_opened({"tokenizer": tokenizer, **metadata})


@pytest.mark.parametrize("metadata", [{}, {"model": "some-server-model"}])
def test_an_unknown_model_is_taken_not_to_think_with_a_warning(dataset, caplog, metadata) -> None:
    with caplog.at_level(logging.WARNING):
        assert dataset.trace_opened(metadata) is False
    assert "trace_opened" in caplog.text


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"pretrained": "no/such-model"}, "pretrained=no/such-model has no tokenizer"),
        ({"trace_opened": "perhaps"}, "write true or false"),
        ({"trace_opened": True, "think_end_token": "</think>"}, "take it out of the model arguments"),
        ({"trace_opened": True, "think_end_token": 0}, "take it out of the model arguments"),
    ],
)
def test_what_would_grade_wrongly_is_an_error(dataset, metadata, says) -> None:
    with pytest.raises(ValueError, match=says) as error:
        dataset.trace_opened(metadata)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("task", ["mini_math", "mini_qa"])
def test_mini_training_prompts_and_test_questions_are_disjoint(task, tasks_folder) -> None:
    test = rows_of(task, tasks_folder, trace_opened=True)
    prompts = rows_of(f"{task}_prompts", tasks_folder, trace_opened=True)
    assert {row["trace_opened"] for row in [*test, *prompts]} == {True}
    asked = {row["messages"][0]["content"] for row in prompts}
    assert len(asked) == len(prompts)
    assert len({row["question"] for row in test}) == len(test) >= 200
    assert asked.isdisjoint(row["question"] for row in test)


@pytest.mark.parametrize(("task", "reader"), [("mini_math", "read_integer"), ("mini_qa", "read_decision")])
def test_every_mini_gold_answer_is_one_that_its_reader_reads(task, reader, tasks_folder, answers) -> None:
    for row in rows_of(task, tasks_folder, trace_opened=False):
        assert str(getattr(answers, reader)(row["answer"])) == row["answer"]


@pytest.mark.parametrize("task", ["mini_math_prompts", "mini_qa_prompts"])
def test_mini_prompts_carry_no_answer(task, tasks_folder) -> None:
    for row in rows_of(task, tasks_folder, trace_opened=False):
        assert set(row) == PROMPT_COLUMNS
        assert [message["role"] for message in row["messages"]] == ["user"]


def test_a_prompts_file_becomes_rows(tasks_folder, tmp_path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"problem": "Why?", "answer": "secret"}\n{"id": 7, "prompt": "How?"}\n', encoding="utf-8")
    assert rows_of("prompts_file", tasks_folder, trace_opened=True, prompts_file=str(file)) == [
        {"id": "1", "messages": [{"role": "user", "content": "Why?"}], "trace_opened": True},
        {"id": "7", "messages": [{"role": "user", "content": "How?"}], "trace_opened": True},
    ]


def test_a_prompts_file_has_to_be_named(tasks_folder) -> None:
    with pytest.raises(ValueError, match="--metadata"):
        rows_of("prompts_file", tasks_folder, trace_opened=True)


def test_aime_asks_thirty_problems_and_trains_on_fifteen_earlier_ones(hub, tasks_folder, answers) -> None:
    test = rows_of("aime26", tasks_folder, trace_opened=True)
    prompts = rows_of("aime_prompts15", tasks_folder, trace_opened=True)
    assert (len(test), len(prompts)) == (30, 15)
    for row in test:
        boxed = f"\\boxed{{{row['answer']:03d}}}"
        assert answers.grade_integer(row, [f"So</think>{boxed}"])["exact_match"] == 1
        assert answers.grade_integer(row, [f"So {boxed}"])["truncated"] == 1
    assert all(set(row) == PROMPT_COLUMNS for row in prompts)
    assert [row["id"] for row in prompts] == [f"aime_2025_i_{number}" for number in range(1, 16)]
    asked = "\n".join(row["messages"][0]["content"] for row in prompts)
    assert not any(row["problem"] in asked for row in test)


def test_pubmedqa_asks_thirty_questions_and_trains_on_fifteen_others(hub, tasks_folder, answers) -> None:
    test = rows_of("pubmedqa30", tasks_folder, trace_opened=False)
    prompts = rows_of("pubmedqa_prompts15", tasks_folder, trace_opened=False)
    assert (len(test), len(prompts)) == (30, 15)
    for row in test:
        assert answers.grade_decision(row, [f"Answer: {row['answer']}"])["exact_match"] == 1
    assert all(set(row) == PROMPT_COLUMNS for row in prompts)
    assert {row["id"] for row in prompts}.isdisjoint(str(row["pubid"]) for row in test)
    asked = "\n".join(row["messages"][0]["content"] for row in prompts)
    assert not any(row["question"] in asked for row in test)
    assert not any(row["long_answer"] in asked for row in test)


def test_pubmedqa_conclusions_are_not_in_the_question(hub, tasks_folder) -> None:
    from datasets import load_dataset
    from lm_eval.utils import load_yaml_config

    question = load_yaml_config(str(tasks_folder / "pubmedqa" / "pubmedqa30.yaml"), mode="full")["doc_to_text"]
    for row in load_dataset("qiaojin/PubMedQA", "pqa_labeled", split="train").select(range(200)):
        assert row["long_answer"] not in question(row)


def test_pubmed_ids_follow_the_documented_rule(hub, tasks_folder, task_module) -> None:
    from datasets import load_dataset

    choice = task_module("pubmedqa/choose_ids.py")
    official = json.loads((hub.parent / "pubmedqa_test_ground_truth.json").read_text(encoding="utf-8"))
    labeled = [str(pubid) for pubid in load_dataset("qiaojin/PubMedQA", "pqa_labeled", split="train")["pubid"]]
    test = (tasks_folder / "pubmedqa" / "test_ids.txt").read_text(encoding="utf-8").split()
    prompts = (tasks_folder / "pubmedqa" / "prompt_ids.txt").read_text(encoding="utf-8").split()
    assert choice.choose_test_ids(official) == test
    assert choice.choose_prompt_ids(labeled, official) == prompts
    assert Counter(official[pubmed_id] for pubmed_id in test) == {"yes": 17, "no": 10, "maybe": 3}
    assert set(prompts) <= set(labeled) - set(official)


def test_the_rule_keeps_proportions_and_ignores_order(task_module) -> None:
    choice = task_module("pubmedqa/choose_ids.py")
    gold = {str(number): "yes" if number % 5 else "no" for number in range(100)}
    chosen = choice.choose_test_ids(gold, size=10)
    assert Counter(gold[pubmed_id] for pubmed_id in chosen) == {"yes": 8, "no": 2}
    assert choice.choose_test_ids(dict(reversed(gold.items())), size=10) == chosen
    assert choice.choose_prompt_ids(["7", "200", "201"], gold, size=5) in (["200", "201"], ["201", "200"])


def test_committed_pubmed_ids_are_disjoint(tasks_folder) -> None:
    test = (tasks_folder / "pubmedqa" / "test_ids.txt").read_text(encoding="utf-8").split()
    prompts = (tasks_folder / "pubmedqa" / "prompt_ids.txt").read_text(encoding="utf-8").split()
    assert (len(set(test)), len(set(prompts)), set(test) & set(prompts)) == (30, 15, set())
