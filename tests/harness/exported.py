"""A run made up for the tests of what is published: its stages have the files that a card and a loader read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from made_runs import VERSIONS, finished, inputs_for
from safetensors.numpy import save

from harness import loop, outcomes
from harness.config import LoopConfig
from harness.files import write_json
from harness.loop import Run
from harness.plan import plan
from harness.rundir import RunDir
from harness.stages import External, Keys
from harness.store import Store

COMMIT, OTHER = "0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef"
INSTRUCT, THINKING = "owner/instruct-4b", "owner/thinking-4b"
ON_HUB = {"hub": {"path": "MathArena/aime_2026", "split": "train"}}
FEW_OF = {"hub": {"path": "qiaojin/PubMedQA", "name": "pqa_labeled", "split": "train"}}
TESTS: dict[str, dict[str, Any]] = {
    "aime26": {"dataset_kwargs": ON_HUB},
    "pubmedqa30": {"dataset_kwargs": FEW_OF, "process_docs": "def official_test_rows"},
    "own": {"dataset_path": "json"},
}
RIGHT = {(0, "instruct"): 2, (0, "thinking"): 9, (1, "instruct"): 5, (1, "thinking"): 9, (2, "instruct"): 10}
QUESTIONS = 12


def answers(tasks: Mapping[str, dict[str, Any]], **more: Any) -> dict[str, bytes]:
    """What lm-eval leaves of some tasks, by file name inside a stage's folder."""
    counts = {task: {"original": QUESTIONS, "effective": QUESTIONS} for task in tasks}
    found = {"answers/results_2026-11-25T00.json": json.dumps({"configs": tasks, "n-samples": counts}).encode()}
    for task in tasks:
        rows = [
            {
                "doc_id": number,
                "doc": {"question": f"What is {task} {number}?"},
                "arguments": {"gen_args_0": {"arg_0": "", "arg_1": {"temperature": 0.6, "until": [], **more}}},
                "resps": [["…"]],
                "filter": "none",
            }
            for number in range(QUESTIONS)
        ]
        found[f"answers/samples_{task}_2026-11-25T00.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return found


def checkpoint(folder: str) -> dict[str, bytes]:
    """A checkpoint's files as tools leave them, places on this machine in it."""
    weights = {"model.embed_tokens.weight": np.ones((4, 2), np.float32)}
    return {
        f"{folder}/config.json": json.dumps({"model_type": "qwen3", "_name_or_path": "/home/me/instruct"}).encode(),
        f"{folder}/generation_config.json": b'{"temperature": 0.7}',
        f"{folder}/tokenizer.json": b'{"model": {"vocab": {"/tmp": 0}}}',
        f"{folder}/tokenizer_config.json": json.dumps({"name_or_path": "/x", "pad_token": "<|endoftext|>"}).encode(),
        f"{folder}/chat_template.jinja": b"{{ messages }}",
        f"{folder}/model.safetensors": save(weights, metadata={"format": "pt"}),
        f"{folder}/trainer_state.json": b'{"best_model_checkpoint": "/home/me"}',
        f"{folder}/README.md": b"a tool's own card",
    }


def adapter(number: int, **changes: Any) -> dict[str, bytes]:
    """A LoRA adapter's files, of one layer."""
    of = np.random.default_rng(number)
    name = "base_model.model.model.layers.0.mlp.up_proj"
    weights = {
        f"{name}.lora_A.weight": of.normal(size=(2, 3)).astype(np.float32),
        f"{name}.lora_B.weight": of.normal(size=(5, 2)).astype(np.float32),
    }
    config = {"peft_type": "LORA", "base_model_name_or_path": "/home/me/instruct", "r": 2, "lora_alpha": 6, **changes}
    return {
        "adapter/adapter_config.json": json.dumps(config).encode(),
        "adapter/adapter_model.safetensors": save(weights),
        "adapter/tokenizer.json": b"{}",
        "adapter/README.md": b"base_model: /home/me/instruct",
        "adapter/debug.log": b"/home/me",
    }


def facts(iteration: int) -> dict[str, Any]:
    """What trace stripping says of an iteration."""
    dropped = {"unclosed": 1, "empty_answer": iteration}
    data = {"path": "/home/me/answers", "rows": 12, "kept": 11 - iteration, "dropped": dropped}
    return {"trace_stripping": {"datasets": [{**data, "tokens_read": 5000, "tokens_kept": 800}]}}


def made_up(config: LoopConfig, out: Path, **changes: Any) -> Run:
    """A run of two iterations of a pair of the hub's, all of it done but the last evaluation of thinking."""
    named = {"name": "mine", "instruct": INSTRUCT, "thinking": f"{THINKING}@main", "prompts": ["asked"]}
    config = config.model_copy(update={**named, "tasks": list(TESTS), **changes})
    came = {
        "instruct": External("/came/instruct", f"{INSTRUCT}@{COMMIT}+abc"),
        "thinking": External("/came/thinking", f"{THINKING}@{OTHER}+def"),
    }
    on_hub = {who: came[who] for who in came if not Path(str(getattr(config, who))).is_absolute()}
    steps = plan(config, inputs_for(config, **on_hub), config.iterations)
    pair = {who: Path(external.path) for who, external in came.items()}
    run = Run(config, RunDir(out / config.name), Store(out / "stages"), steps, steps, Keys(VERSIONS), pair)
    run.folder.note(asked=config.model_dump(mode="json"), steps=loop.described(run), versions=VERSIONS)
    rows = []
    for step in run.steps:
        key, kind = run.keys[step.stage], step.stage.kind.name
        if (step.iteration, step.checkpoint) == (2, "thinking") or run.store.record(key):
            continue
        if kind == "generate":
            closed = {"labels": {"closed": 11, "total": 12}}
            finished(
                run.store,
                key,
                answers({"asked": {"dataset_path": "owner/questions", "test_split": "train"}}),
                facts=closed,
            )
        elif kind == "distill":
            files = {**checkpoint("instruct"), **adapter(step.iteration)}
            finished(run.store, key, files, checkpoint="instruct", facts=facts(step.iteration))
        elif kind == "reconstruct":
            finished(run.store, key, checkpoint("thinking"), checkpoint="thinking")
        else:
            finished(run.store, key, answers(TESTS, max_gen_toks=4096))
            where = {"run": config.name, "arm": step.arm, "seed": step.seed, "iteration": step.iteration}
            for task in TESTS:
                rows += [
                    {
                        **where,
                        "checkpoint": step.checkpoint,
                        **vars(
                            outcomes.Outcome(
                                task, str(n), float(n < RIGHT[step.iteration, step.checkpoint]), 1, 0, 0, 3, 5
                            )
                        ),
                    }
                    for n in range(QUESTIONS)
                ]
    (run.folder.root / "outcomes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_json(run.folder.results, {"rows": [], "wall_s": 600.0, "cost_usd": 2.86})
    return run
