"""Which rows a task has: training apart from test, no answer in a prompt, and whether the template opens the trace."""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Callable

import pytest

PROMPT_COLUMNS = {"id", "messages", "trace_opened"}


@pytest.fixture(scope="session")
def rows_of(load_task) -> Callable[..., list[dict]]:
    """The rows of a task as lm-eval would load them for a model."""
    return lambda task, **metadata: list(load_task(task, **metadata).eval_docs)


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
def test_mini_training_prompts_and_test_questions_are_disjoint(task, rows_of) -> None:
    test = rows_of(task, trace_opened=True)
    prompts = rows_of(f"{task}_prompts", trace_opened=True)
    assert {row["trace_opened"] for row in [*test, *prompts]} == {True}
    asked = {row["messages"][0]["content"] for row in prompts}
    assert len(asked) == len(prompts)
    assert len({row["question"] for row in test}) == len(test) >= 200
    assert asked.isdisjoint(row["question"] for row in test)


@pytest.mark.parametrize(("task", "reader"), [("mini_math", "read_integer"), ("mini_qa", "read_decision")])
def test_every_mini_gold_answer_is_one_that_its_reader_reads(task, reader, rows_of, answers) -> None:
    for row in rows_of(task):
        assert str(getattr(answers, reader)(row["answer"])) == row["answer"]


@pytest.mark.parametrize("task", ["mini_math_prompts", "mini_qa_prompts"])
def test_mini_prompts_carry_no_answer(task, rows_of) -> None:
    for row in rows_of(task):
        assert set(row) == PROMPT_COLUMNS
        assert [message["role"] for message in row["messages"]] == ["user"]


def test_a_prompts_file_becomes_rows(rows_of, tmp_path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"problem": "Why?", "answer": "secret"}\n{"id": 7, "prompt": "How?"}\n', encoding="utf-8")
    assert rows_of("prompts_file", trace_opened=True, prompts_file=str(file)) == [
        {"id": "1", "messages": [{"role": "user", "content": "Why?"}], "trace_opened": True},
        {"id": "7", "messages": [{"role": "user", "content": "How?"}], "trace_opened": True},
    ]


def test_a_prompts_file_has_to_be_named(rows_of) -> None:
    with pytest.raises(ValueError, match="--metadata"):
        rows_of("prompts_file", trace_opened=True)


def test_aime_asks_thirty_problems_and_trains_on_fifteen_earlier_ones(hub, load_task, rows_of) -> None:
    task = load_task("aime26", trace_opened=True)
    test = list(task.eval_docs)
    prompts = rows_of("aime_prompts15", trace_opened=True)
    assert [row["problem_idx"] for row in test] == list(range(1, 31))
    assert {row["trace_opened"] for row in [*test, *prompts]} == {True}
    assert all(set(row) == PROMPT_COLUMNS for row in prompts)
    assert [row["id"] for row in prompts] == [f"aime_2025_i_{number}" for number in range(1, 16)]
    instruction = r"Please reason step by step, and put your final answer within \boxed{}."
    assert [task.doc_to_text(row) for row in test] == [f"{row['problem']}\n\n{instruction}" for row in test]
    # The first of the two exams, as `made_hub.py` words it, and nothing of the answers.
    assert [row["messages"] for row in prompts] == [
        [{"role": "user", "content": f"Find ${number} + 3$ in base ten.\n\n{instruction}"}] for number in range(15)
    ]


def test_pubmedqa_asks_thirty_questions_and_trains_on_fifteen_others(hub, load_task, rows_of, tasks_folder) -> None:
    task = load_task("pubmedqa30", trace_opened=True)
    test, prompts = list(task.eval_docs), rows_of("pubmedqa_prompts15", trace_opened=True)
    assert {row["trace_opened"] for row in [*test, *prompts]} == {True}
    # The rows have an order of their own; the chosen ids' counts.
    assert [str(row["pubid"]) for row in test] == ids(tasks_folder, "test")
    assert [row["id"] for row in prompts] == ids(tasks_folder, "prompt")
    assert all(set(row) == PROMPT_COLUMNS for row in prompts)
    assert {tuple(message["role"] for message in row["messages"]) for row in prompts} == {("user",)}
    asked = [(row["pubid"], task.doc_to_text(row)) for row in test]
    asked += [(row["id"], row["messages"][0]["content"]) for row in prompts]
    for pubmed_id, text in asked:
        # As `made_hub.py` words it: the abstract and the question, and neither its conclusion nor its decision.
        assert re.fullmatch(
            rf"Abstract:\nDrug {pubmed_id} was given to (\d+) patients\.\nOf them \1 got better\.\n\n"
            rf"Question: Does drug {pubmed_id} help\?\n\nAnswer the question from the abstract alone\. "
            'End with one line that says "Answer: yes", "Answer: no" or "Answer: maybe"\.',
            text,
        )


def test_the_rule_keeps_proportions_and_ignores_order(task_module) -> None:
    choice = task_module("pubmedqa/choose_ids.py")
    gold = {str(number): "yes" if number % 5 else "no" for number in range(100)}
    chosen = choice.choose_test_ids(gold, size=10)
    assert Counter(gold[pubmed_id] for pubmed_id in chosen) == {"yes": 8, "no": 2}
    assert choice.choose_test_ids(dict(reversed(gold.items())), size=10) == chosen
    assert choice.choose_prompt_ids(["7", "200", "201", "202"], gold, size=2) == by_hash(["200", "201", "202"])[:2]


def test_committed_pubmed_ids_are_disjoint_and_in_order(tasks_folder) -> None:
    test, prompts = ids(tasks_folder, "test"), ids(tasks_folder, "prompt")
    assert (len(set(test)), len(set(prompts)), set(test) & set(prompts)) == (30, 15, set())
    assert test == by_hash(test)
    assert prompts == by_hash(prompts)


def ids(tasks_folder, kind: str) -> list[str]:
    return (tasks_folder / "pubmedqa" / f"{kind}_ids.txt").read_text(encoding="utf-8").split()


def by_hash(pubmed_ids: list[str]) -> list[str]:
    return sorted(pubmed_ids, key=lambda pubmed_id: hashlib.sha256(pubmed_id.encode()).hexdigest())
