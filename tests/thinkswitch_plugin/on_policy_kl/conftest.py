"""The embedded pair as models, and recipes of a few steps on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

PLUGIN = "thinkswitch_plugin.on_policy_kl.OnPolicyKLPlugin"

Recipe = Callable[..., Path]


@pytest.fixture(scope="session")
def pair(recipes: Path) -> dict[str, Any]:
    """The embedded checkpoints, loaded once, by role."""
    from transformers import AutoModelForCausalLM

    return {
        who: AutoModelForCausalLM.from_pretrained(recipes / "mini" / who).eval() for who in ("instruct", "thinking")
    }


@pytest.fixture(scope="session")
def tokenizer(recipes: Path) -> Any:
    """The instruct checkpoint's."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(recipes / "mini/instruct")


@pytest.fixture
def recipe(recipes: Path, tmp_path: Path) -> Recipe:
    """Write the shipped recipe, made short, with changes; a change of None takes a key out."""

    def write(name: str = "on_policy", block: dict[str, Any] | None = None, **changes: Any) -> Path:
        shipped = yaml.safe_load((recipes / "on_policy_kl.yml").read_text())
        mine = {"teacher": str(recipes / "mini/thinking"), "show_every": 0, **(block or {})}
        settings = {
            **shipped,
            "base_model": str(recipes / "mini/instruct"),
            "datasets": [{"path": str(recipes / "mini/labels.jsonl"), "type": "thinkswitch_plugin.on_policy_kl"}],
            "on_policy_kl": {**shipped["on_policy_kl"], **mine},
            "dataset_prepared_path": str(tmp_path / "prepared"),
            "output_dir": str(tmp_path / name),
            "adapter": "lora",
            "load_in_4bit": False,
            "micro_batch_size": 8,
            "max_steps": 2,
            "warmup_steps": 0,
            "lr_scheduler": "constant",
            **changes,
        }
        file = tmp_path / f"{name}.yml"
        file.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
        return file

    return write


@pytest.fixture
def train(recipe: Recipe, tool: Callable[..., str]) -> Callable[..., str]:
    """What `axolotl train` says of such a recipe, in one process or by torchrun in several."""

    def run(name: str = "on_policy", processes: int = 1, **changes: Any) -> str:
        launcher = ["torchrun", "--", f"--nproc_per_node={processes}"] if processes > 1 else ["python"]
        return tool("axolotl", "train", recipe(name, **changes), "--launcher", *launcher, ACCELERATE_USE_CPU="true")

    return run
