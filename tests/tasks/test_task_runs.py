"""The tasks inside lm-eval: prompts as the model gets them, scores as the user gets them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

MINI_PROMPTS = ["mini_math_prompts", "mini_qa_prompts"]
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


def lm_eval_run(monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], folder: Path) -> Path:
    """`lm_eval run --config`, in this process; returns the folder with its results."""
    import yaml
    from lm_eval.__main__ import cli_evaluate

    (folder / "run.yml").write_text(yaml.safe_dump({**config, "output_path": str(folder / "out")}), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["lm_eval", "run", "--config", str(folder / "run.yml")])
    cli_evaluate()
    (results,) = (folder / "out").glob("*/results_*.json")
    return results.parent


def samples_of(results: Path, task: str) -> list[dict[str, Any]]:
    (file,) = results.glob(f"samples_{task}_2*.jsonl")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("kind", ["thinking", "instruct"])
def test_lm_eval_runs_them_on_a_checkpoint(kind, checkpoint, prompts_file, tasks_folder, tmp_path, monkeypatch) -> None:
    config = {
        "model": "hf",
        "model_args": {"pretrained": str(checkpoint(kind))},
        "tasks": ["mini_math", "mini_qa", *MINI_PROMPTS, "prompts_file"],
        "include_path": str(tasks_folder),
        "metadata": {"prompts_file": str(prompts_file)},
        "gen_kwargs": {"max_gen_toks": 4},
        "apply_chat_template": True,
        "log_samples": True,
        "device": "cpu",
        "batch_size": 4,
        "limit": 3,
    }
    folder = lm_eval_run(monkeypatch, config, tmp_path)
    (file,) = folder.glob("results_*.json")
    results = json.loads(file.read_text(encoding="utf-8"))["results"]
    thinks = kind == "thinking"
    for task in config["tasks"]:
        # Four random tokens close no trace: cut off for a checkpoint that thinks, an answer for one that does not.
        assert results[task]["truncated,none"] == thinks
        assert results[task]["closed_trace,none"] == 0
    assert results["mini_math"]["exact_match,none"] == 0
    _, conversation = samples_of(folder, "prompts_file")
    assert conversation["doc"] == {"id": "2", "messages": CONVERSATION, "trace_opened": thinks}
    assert conversation["arguments"]["gen_args_0"]["arg_0"] == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi {{ name }}<|im_end|>\n"
        "<|im_start|>assistant\n[1, 2]<|im_end|>\n<|im_start|>user\nMore.<|im_end|>\n<|im_start|>assistant\n"
        + ("<think>\n" if thinks else "")
    )
    assert len(conversation["resps"][0][0]) > 0


def test_predict_only_leaves_texts_and_no_scores(checkpoint, prompts_file, tasks_folder, tmp_path, monkeypatch) -> None:
    config = {
        "model": "hf",
        "model_args": {"pretrained": str(checkpoint("thinking"))},
        "tasks": [*MINI_PROMPTS, "prompts_file"],
        "include_path": str(tasks_folder),
        "metadata": {"prompts_file": str(prompts_file)},
        "gen_kwargs": {"max_gen_toks": 4},
        "apply_chat_template": True,
        "predict_only": True,
        "device": "cpu",
        "batch_size": 4,
        "limit": 2,
    }
    folder = lm_eval_run(monkeypatch, config, tmp_path)
    for task in config["tasks"]:
        for sample in samples_of(folder, task):
            assert set(sample["doc"]) == {"id", "messages", "trace_opened"}
            assert sample["doc"]["trace_opened"]
            assert sample["target"] == ""
            assert isinstance(sample["resps"][0][0], str)


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


def evaluate(lm: Any, tasks: list[str], tasks_folder: Path, **metadata: Any) -> dict[str, Any]:
    """`lm_eval` on a model object, with the metadata that the command line would have merged."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    return lm_eval.simple_evaluate(
        lm,
        tasks=tasks,
        task_manager=TaskManager(include_path=str(tasks_folder), include_defaults=False, metadata=metadata),
        apply_chat_template=True,
        bootstrap_iters=0,
    )


# What each checkpoint writes for the gold answer, and the metrics of it: (exact_match, closed_trace, truncated).
SCRIPTS = [
    ("thinking", "Let me see.</think>\n\n{}", (1, 1, 0)),
    ("thinking", "Let me see. It is {}", (0, 0, 1)),
    ("thinking", "{}", (0, 0, 1)),
    ("instruct", "{}", (1, 0, 0)),
    ("instruct", "<think>Let me see. It is {}", (0, 0, 1)),
    ("instruct", "<think>Let me see.</think>{}", (1, 1, 0)),
]


@pytest.mark.parametrize(("kind", "text", "metrics"), SCRIPTS)
def test_an_unclosed_trace_is_wrong_and_counted_end_to_end(kind, text, metrics, checkpoint, tasks_folder) -> None:
    model = scripted(lambda doc: text.format(doc["answer"]), checkpoint(kind))
    results = evaluate(model, ["mini_math", "mini_qa"], tasks_folder, pretrained=str(checkpoint(kind)))
    for task in ("mini_math", "mini_qa"):
        scores = results["results"][task]
        assert (scores["exact_match,none"], scores["closed_trace,none"], scores["truncated,none"]) == metrics


def test_a_chat_server_gets_the_messages_as_they_are(prompts_file, tasks_folder) -> None:
    server = scripted(lambda doc: "…", None)
    evaluate(server, ["prompts_file"], tasks_folder, model="served", trace_opened=True, prompts_file=str(prompts_file))
    assert [json.loads(asked) for asked in server.asked] == [[{"role": "user", "content": "Why?"}], CONVERSATION]


def test_the_group_weighs_every_question_alike(hub, checkpoint, tasks_folder) -> None:
    # All of AIME right, no question of PubMedQA answered: each has thirty questions.
    def script(doc: dict[str, Any]) -> str:
        return f"</think>\\boxed{{{doc['answer']}}}" if "problem" in doc else "I wonder"

    model = scripted(script, checkpoint("thinking"))
    results = evaluate(model, ["thinkswitch"], tasks_folder, pretrained=str(checkpoint("thinking")))
    assert results["results"]["aime26"]["exact_match,none"] == 1
    assert results["results"]["pubmedqa30"]["truncated,none"] == 1
    group = results["groups"]["thinkswitch"]
    assert (group["exact_match,none"], group["closed_trace,none"], group["truncated,none"]) == (0.5, 0.5, 0.5)
    assert all(asked.endswith("assistant\n<think>\n") for asked in model.asked)


def test_every_task_is_generative_zero_shot_and_under_its_own_name(tasks_folder) -> None:
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import load_yaml_config

    manager = TaskManager(include_path=str(tasks_folder), include_defaults=False)
    assert manager.all_groups == ["tah_math", "thinkswitch"]
    test = ["aime26", "pubmedqa30", "mini_math", "mini_qa"]
    test += ["tah_aime25", "tah_amc23", "tah_gsm8k", "tah_math500", "tah_olympiadbench"]
    prompts = ["aime_prompts15", "pubmedqa_prompts15", *MINI_PROMPTS, "prompts_file"]
    assert manager.all_subtasks == sorted(test + prompts)
    for task in manager.all_subtasks:
        config = load_yaml_config(manager.task_index[task]["yaml_path"], mode="full")
        assert config["output_type"] == "generate_until"
        assert config["generation_kwargs"]["until"] == []
        assert config["generation_kwargs"]["do_sample"] is False
        assert config["num_fewshot"] == (task == "prompts_file")
