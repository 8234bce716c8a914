"""What the task tests share: the tasks as lm-eval loads them, tiny checkpoints, and where the real questions lie."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TASKS = Path(__file__).resolve().parents[2] / "tasks"
HUB = TASKS.parents[1] / "shared" / "data" / "hub"

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# After Qwen3-4B-Thinking-2507: the prompt itself opens the trace.
THINKING_TEMPLATE = TEMPLATE.replace("assistant\n", "assistant\n<think>\n")

Grade = Callable[[int | str, str, bool], dict[str, int]]


@pytest.fixture(scope="session")
def tasks_folder() -> Path:
    return TASKS


@pytest.fixture(scope="session")
def task_module() -> Callable[[str], ModuleType]:
    """A module of the tasks folder, which is no package: lm-eval loads its files by path, and so do the tests."""

    def load(path: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(Path(path).stem, TASKS / path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def answers(task_module: Callable[[str], ModuleType]) -> ModuleType:
    return task_module("answers.py")


@pytest.fixture(scope="session")
def dataset(task_module: Callable[[str], ModuleType]) -> ModuleType:
    return task_module("dataset.py")


@pytest.fixture(scope="session")
def grader(tasks_folder: Path) -> Callable[[str], Grade]:
    """The grader that a task's YAML names: grader("aime26")(277, text, opened) gives the metrics of one answer."""
    from lm_eval.utils import load_yaml_config

    def of_task(task: str) -> Grade:
        (path,) = tasks_folder.glob(f"*/{task}.yaml")
        process_results = load_yaml_config(str(path), mode="full")["process_results"]
        return lambda gold, text, opened: process_results({"answer": gold, "trace_opened": opened}, [text])

    return of_task


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory from which `datasets` finds the real questions offline."""
    if not HUB.is_dir():
        pytest.skip("the real questions are third-party data and not beside this checkout")
    monkeypatch.chdir(HUB)
    return HUB


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random Qwen3 checkpoint with a byte-level tokenizer: checkpoint("thinking") or checkpoint("instruct")."""
    made: dict[str, Path] = {}

    def of_kind(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            _save_checkpoint(made[kind], THINKING_TEMPLATE if kind == "thinking" else TEMPLATE)
        return made[kind]

    return of_kind


def _save_checkpoint(folder: Path, template: str) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = _byte_tokenizer(template)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


def _byte_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with Qwen's chat tokens, the tags of a trace being ordinary (not special) ones as there."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    tokenizer.chat_template = template
    return tokenizer
