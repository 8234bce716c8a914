"""The tasks inside lm-eval: prompts as the model gets them, scores as the user gets them."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import made_hub
import pytest

MINI_PROMPTS = ["mini_math_prompts", "mini_qa_prompts"]
PROMPTS = ["aime_prompts15", "pubmedqa_prompts15", *MINI_PROMPTS, "prompts_file"]
# For each reader of answers a right and a wrong answer to the gold {}, which no other reader takes for the same.
READERS = {
    "integer": ("The answer is {}.", r"\boxed{{{}/1}}"),
    "decision": ("**Answer:** {}!", r"\boxed{{{} or so}}"),
    "expression": (r"\boxed{{\frac{{2({})}}{{2}}}}", "The answer is {}."),
}
GRADED = {
    "aime26": "integer",
    "mini_math": "integer",
    "pubmedqa30": "decision",
    "mini_qa": "decision",
    **dict.fromkeys(["tah_aime25", "tah_amc23", "tah_gsm8k", "tah_math500", "tah_olympiadbench"], "expression"),
}
TRACES = {"closed_trace": ("mean", True), "truncated": ("mean", False)}
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi {{ name }}"},
    {"role": "assistant", "content": "[1, 2]"},
    {"role": "user", "content": "More."},
]


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    file = tmp_path / "mine.jsonl"
    rows = [{"problem": "Why?"}, {"messages": CONVERSATION}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.mark.parametrize(("task", "reader"), GRADED.items())
def test_a_graded_task_asks_its_question_and_reads_its_kind_of_answer(hub, load_task, task: str, reader: str) -> None:
    loaded = load_task(task)
    row = loaded.eval_docs[1 % len(loaded.eval_docs)]
    question = row["problem"] if "problem" in row else row["question"]
    assert question in loaded.doc_to_text(row)
    assert loaded.doc_to_target(row) == row["answer"]
    right, wrong = (text.format(row["answer"]) for text in READERS[reader])
    assert loaded.process_results(row, [right]) == {"exact_match": 1, "closed_trace": 0, "truncated": 0}
    assert loaded.process_results(row, [wrong]) == {"exact_match": 0, "closed_trace": 0, "truncated": 0}
    assert loaded.process_results(row, [f"Hm.</think>{right}"]) == {"exact_match": 1, "closed_trace": 1, "truncated": 0}
    assert metrics_of(loaded) == {"exact_match": ("mean", True), **TRACES}


@pytest.mark.parametrize("task", PROMPTS)
def test_a_prompt_task_has_no_gold_answer_and_counts_traces(hub, load_task, prompts_file, task: str) -> None:
    loaded = load_task(task, trace_opened=True, prompts_file=str(prompts_file))
    for row in loaded.eval_docs.select(range(2)):
        assert set(row) == {"id", "messages", "trace_opened"}
        assert loaded.doc_to_text(row) == row["messages"][-1]["content"]
        assert loaded.doc_to_target(row) == ""
    assert loaded.process_results(row, ["Hm.</think>Yes."]) == {"closed_trace": 1, "truncated": 0}
    assert loaded.process_results(row, ["Hm."]) == {"closed_trace": 0, "truncated": 1}
    assert metrics_of(loaded) == TRACES


def metrics_of(task: Any) -> dict[str, tuple[str, bool]]:
    """Each metric that lm-eval reports of a task: how answers become a number, and whether more of it is better."""
    better = task.higher_is_better()
    return {name: (aggregate.__name__, better[name]) for name, aggregate in task.aggregation().items()}


def evaluate(lm: Any, tasks: list[str], tasks_folder: Path, metadata: dict[str, Any], **settings: Any) -> Any:
    """`lm_eval` on a model object or a name, with the metadata that the command line would have merged."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    with pytest.MonkeyPatch.context() as patch:
        # It asks pip for a list of packages, for seconds.
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        return lm_eval.simple_evaluate(
            lm,
            tasks=tasks,
            task_manager=TaskManager(include_path=str(tasks_folder), include_defaults=False, metadata=metadata),
            apply_chat_template=True,
            bootstrap_iters=0,
            **settings,
        )


def rendered(thinks: bool) -> str:
    """The conversation as a checkpoint is asked."""
    return (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi {{ name }}<|im_end|>\n"
        "<|im_start|>assistant\n[1, 2]<|im_end|>\n<|im_start|>user\nMore.<|im_end|>\n<|im_start|>assistant\n"
        + ("<think>\n" if thinks else "")
    )


def test_the_command_line_runs_every_task(hub, checkpoint, prompts_file, tasks_folder, tmp_path, monkeypatch) -> None:
    """`lm_eval run --config`, in this process, on a checkpoint that thinks."""
    import yaml
    from lm_eval.__main__ import cli_evaluate

    config = {
        "model": "hf",
        "model_args": {"pretrained": str(checkpoint("thinking"))},
        "tasks": [*GRADED, *PROMPTS],
        "include_path": str(tasks_folder),
        "metadata": {"prompts_file": str(prompts_file)},
        "gen_kwargs": {"max_gen_toks": 4},
        "apply_chat_template": True,
        "log_samples": True,
        "device": "cpu",
        "batch_size": 16,
        "limit": 2,
        "output_path": str(tmp_path / "out"),
    }
    (tmp_path / "run.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    monkeypatch.setattr(sys, "argv", ["lm_eval", "run", "--config", str(tmp_path / "run.yml")])
    cli_evaluate()
    (file,) = (tmp_path / "out").glob("*/results_*.json")
    results = json.loads(file.read_text(encoding="utf-8"))["results"]
    assert set(results) == {*GRADED, *PROMPTS}
    for task, scores in results.items():
        # Four random tokens close no trace.
        assert scores["truncated,none"] == 1
        assert scores["closed_trace,none"] == 0
        assert scores.get("exact_match,none") == (0 if task in GRADED else None)
        (samples,) = file.parent.glob(f"samples_{task}_2*.jsonl")
        lines = samples.read_text(encoding="utf-8").splitlines()
        assert len(lines) == (1 if task == "tah_amc23" else 2)
        if task == "prompts_file":
            sample = json.loads(lines[1])
            assert sample["doc"] == {"id": "2", "messages": CONVERSATION, "trace_opened": True}
            assert sample["arguments"]["gen_args_0"]["arg_0"] == rendered(thinks=True)
            assert len(sample["resps"][0][0]) > 0


def test_an_instruct_checkpoint_needs_no_trace(checkpoint, prompts_file, tasks_folder) -> None:
    tasks = ["mini_math", "mini_qa", *MINI_PROMPTS, "prompts_file"]
    model = {"pretrained": str(checkpoint("instruct")), "device": "cpu", "batch_size": 16}
    metadata = {**model, "prompts_file": str(prompts_file)}
    run = evaluate("hf", tasks, tasks_folder, metadata, model_args=model, gen_kwargs="max_gen_toks=4", limit=2)
    for task in tasks:
        assert run["results"][task]["truncated,none"] == 0
        assert run["results"][task]["closed_trace,none"] == 0
    _, conversation = run["samples"]["prompts_file"]
    assert conversation["doc"] == {"id": "2", "messages": CONVERSATION, "trace_opened": False}
    assert conversation["arguments"][0][0] == rendered(thinks=False)
    assert len(conversation["resps"][0][0]) > 0


def test_predict_only_leaves_texts_and_no_scores(checkpoint, prompts_file, tasks_folder) -> None:
    tasks = [*MINI_PROMPTS, "prompts_file"]
    model = {"pretrained": str(checkpoint("thinking")), "device": "cpu", "batch_size": 16}
    metadata = {**model, "prompts_file": str(prompts_file)}
    run = evaluate(
        "hf", tasks, tasks_folder, metadata, model_args=model, gen_kwargs="max_gen_toks=4", limit=2, predict_only=True
    )
    for task in tasks:
        assert not {"closed_trace,none", "truncated,none", "exact_match,none"} & set(run["results"][task])
        assert len(run["samples"][task]) == 2
        for sample in run["samples"][task]:
            assert set(sample["doc"]) == {"id", "messages", "trace_opened"}
            assert sample["doc"]["trace_opened"]
            assert sample["target"] == ""
            assert len(sample["resps"][0][0]) > 0


def scripted(script: Callable[[dict[str, Any]], str], checkpoint: Path | None) -> Any:
    """A model that answers each row as `script` says; without a checkpoint it takes messages, as a chat server does."""
    from lm_eval.api.model import LM
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint) if checkpoint else None

    class Scripted(LM):
        asked: Sequence[Any] = ()

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            if tokenizer is None:
                return json.dumps(chat_history)
            return tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
            )

        @property
        def tokenizer_name(self) -> str:
            return "scripted"

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            self.asked = [request.args[0] for request in requests]
            return [script(request.doc) for request in requests]

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
            raise AssertionError("the tasks are generative")

        loglikelihood_rolling = loglikelihood

    return Scripted()


# What each checkpoint writes for the gold answer, and the metrics of it: (exact_match, closed_trace, truncated).
SCRIPTS = {
    "thinking": [
        ("Let me see.</think>\n\n{}", (1, 1, 0)),
        ("It is {}.</think>I cannot say.", (0, 1, 0)),
        ("Let me see. It is {}", (0, 0, 1)),
        ("{}", (0, 0, 1)),
    ],
    "instruct": [
        ("{}", (1, 0, 0)),
        ("<think>Let me see. It is {}", (0, 0, 1)),
        ("<think>Let me see.</think>{}", (1, 1, 0)),
        ("I cannot say.", (0, 0, 0)),
    ],
}


@pytest.mark.parametrize("kind", SCRIPTS)
def test_an_unclosed_trace_is_wrong_and_counted_end_to_end(kind, checkpoint, tasks_folder) -> None:
    turns = itertools.cycle(SCRIPTS[kind])
    model = scripted(lambda doc: next(turns)[0].format(doc["answer"]), checkpoint(kind))
    tasks = ["mini_math", "mini_qa"]
    run = evaluate(model, tasks, tasks_folder, {"pretrained": str(checkpoint(kind))}, limit=8)
    names = ("exact_match", "closed_trace", "truncated")
    for task in tasks:
        graded = [tuple(sample[name] for name in names) for sample in run["samples"][task]]
        assert graded == [metrics for _, metrics in SCRIPTS[kind]] * 2
        means = [sum(column) / 8 for column in zip(*graded, strict=True)]
        assert [run["results"][task][f"{name},none"] for name in names] == means


def test_a_chat_server_gets_the_messages_as_they_are(prompts_file, tasks_folder) -> None:
    server = scripted(lambda doc: "…", None)
    metadata = {"model": "served", "trace_opened": True, "prompts_file": str(prompts_file)}
    evaluate(server, ["prompts_file"], tasks_folder, metadata)
    assert [json.loads(asked) for asked in server.asked] == [[{"role": "user", "content": "Why?"}], CONVERSATION]


def test_the_paper_s_group_weighs_every_question_alike(enter_hub, tasks_folder, tmp_path) -> None:
    # All ten of AIME right, none of the thirty of PubMedQA answered.
    enter_hub(made_hub.write(tmp_path, aime_2026_size=10))
    model = scripted(lambda doc: f"</think>{doc['answer']}" if "problem" in doc else "I wonder", None)
    run = evaluate(model, ["thinkswitch"], tasks_folder, {"trace_opened": True})
    assert scores(run["results"]["aime26"]) == (1, 1, 0)
    assert scores(run["results"]["pubmedqa30"]) == (0, 0, 1)
    assert scores(run["groups"]["thinkswitch"]) == (10 / 40, 10 / 40, 30 / 40)


def test_think_at_hard_s_group_weighs_every_benchmark_alike(hub, tasks_folder) -> None:
    # The one question of AMC and the thirty of AIME right, the others cut off: 31 of 40 questions, 2 of 5 benchmarks.
    def script(doc: dict[str, Any]) -> str:
        solved = doc["answer"] == "27" or "in base ten" in doc["problem"]
        return rf"</think>\boxed{{{doc['answer']}}}" if solved else "I wonder"

    model = scripted(script, None)
    run = evaluate(model, ["tah_math"], tasks_folder, {"trace_opened": True})
    assert run["n-samples"]["tah_aime25"]["effective"] == 30
    assert scores(run["results"]["tah_gsm8k"]) == (0, 0, 1)
    assert scores(run["results"]["tah_aime25"]) == (1, 1, 0)
    assert scores(run["groups"]["tah_math"]) == pytest.approx((2 / 5, 2 / 5, 3 / 5))


def scores(of: dict[str, float]) -> tuple[float, ...]:
    return tuple(of[f"{name},none"] for name in ("exact_match", "closed_trace", "truncated"))


def test_every_task_is_generative_zero_shot_and_under_its_own_name(tasks_folder) -> None:
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import load_yaml_config

    manager = TaskManager(include_path=str(tasks_folder), include_defaults=False)
    assert manager.all_groups == ["tah_math", "thinkswitch"]
    assert manager.all_subtasks == sorted([*GRADED, *PROMPTS])
    for task in manager.all_subtasks:
        config = load_yaml_config(manager.task_index[task]["yaml_path"], mode="full")
        assert config["output_type"] == "generate_until"
        assert config["generation_kwargs"]["until"] == []
        assert config["generation_kwargs"]["do_sample"] is False
        assert config["num_fewshot"] == (task == "prompts_file")
