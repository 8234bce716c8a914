"""What the task tests share: the tasks as lm-eval loads them, made-up questions, tiny checkpoints."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import made_hub
import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from transformers import PreTrainedTokenizerFast

TASKS = Path(__file__).resolve().parents[2] / "tasks"
REAL_HUB = TASKS.parents[1] / "shared" / "data" / "hub"
# Third-party questions are no part of the repository: where they lie beside the checkout, more can be checked.
collect_ignore = [] if REAL_HUB.is_dir() else ["test_real_rows.py"]

settings.register_profile("shared machine", deadline=None)  # which may pause for a second in the middle of an example
settings.load_profile("shared machine")

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# After Qwen3-4B-Thinking-2507: the prompt itself opens the trace.
THINKING_TEMPLATE = TEMPLATE.replace("assistant\n", "assistant\n<think>\n")


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
def load_task(tasks_folder: Path) -> Callable[..., Task]:
    """A task as lm-eval loads it for a model: load_task("aime26", pretrained="…"), or whatever else is known of it."""

    def load(name: str, **metadata: object) -> Task:
        from lm_eval.tasks import TaskManager

        manager = TaskManager(
            include_path=str(tasks_folder), include_defaults=False, metadata={"trace_opened": False, **metadata}
        )
        return manager.load_task_or_group(name)[name]

    return load


@pytest.fixture(scope="session")
def made_questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_hub.write(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def enter_hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Go into a folder in which `datasets` finds its questions in the place of the hub's."""
    import datasets

    def enter(folder: Path) -> None:
        monkeypatch.chdir(folder)
        # A cache of its own: `datasets` takes what it once read by a relative name for what lies there in any folder.
        cache = tmp_path_factory.getbasetemp() / "datasets" / folder.name
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)

    return enter


@pytest.fixture
def hub(made_questions: Path, enter_hub: Callable[[Path], None]) -> Path:
    """The working directory is one with made-up questions."""
    enter_hub(made_questions)
    return made_questions


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
