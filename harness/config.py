"""What a run is asked to do: `loop.yml`, read and checked.

Knows the fields, their defaults and where the shipped recipes lie. Leaves every tool's own settings to the tool's own
recipe, and the command line's overrides to `cli`.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from harness.errors import LoopError

OPTIONS = {"iterations": "iters", "include_path": "include-path"}  # fields whose option has another name


class Recipes(BaseModel):
    """Which native recipe is which stage; paths are relative to `loop.yml`.

    `on_policy` stands in for `distill` where the run asks for it. `evaluate` is for both checkpoints, unless
    `evaluate_thinking` has other settings for the thinking one (a card that says another temperature, say).
    """

    model_config = ConfigDict(extra="forbid")

    generate: Path
    distill: Path
    on_policy: Path | None = None
    reconstruct: Path
    evaluate: Path
    evaluate_thinking: Path | None = None


class LoopConfig(BaseModel):
    """One run of the ThinkSwitch loop (arXiv 2606.01080).

    `t` is the slerp weight of the distilled instruct checkpoint in the reconstructed thinking one: 0 keeps the anchor
    as it is, 1 is the instruct checkpoint. `anchor` is the thinking checkpoint it is interpolated with: `original`
    (the one the run began with) or `previous` (the one reconstructed an iteration ago). `distill` says what the
    instruct checkpoint learns from: the thinking one's `answers`, or, `on-policy`, its judgement of the instruct one's
    own. With 0 `iterations` the pair is evaluated as it came. `nf4` answers prompts and questions with the checkpoints'
    linear layers in NF4, where bfloat16 does not fit the GPU. `jobs` is how many stages may run side by side where none
    reads what the other writes (an evaluation and the next iteration's labels): 1 where they would share one GPU.
    """

    model_config = ConfigDict(extra="forbid")

    name: str = Field(default="loop", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    instruct: str
    thinking: str
    prompts: list[str] = Field(min_length=1)
    tasks: list[str] = Field(min_length=1)
    include_path: Path | None = None
    iterations: int = Field(default=3, ge=0)
    t: float = Field(default=0.1, ge=0.0, le=1.0)
    anchor: Literal["original", "previous"] = "original"
    distill: Literal["answers", "on-policy"] = "answers"
    seed: int = Field(default=42, ge=0)
    nf4: bool = False
    jobs: int = Field(default=1, ge=1)
    usd_per_hour: float | None = Field(default=None, ge=0.0)
    recipes: Recipes

    @property
    def prompts_file(self) -> Path | None:
        """The user's own prompts file, if `prompts` names one rather than lm-eval tasks."""
        return Path(self.prompts[0]) if self.prompts[0].endswith(".jsonl") else None

    @property
    def prompt_tasks(self) -> list[str]:
        """The lm-eval tasks that ask the prompts."""
        return ["prompts_file"] if self.prompts_file else self.prompts


def recipes_folder() -> Path:
    """The folder of the shipped recipes: beside this package in a checkout, else where pip installed them.

    Raises:
        LoopError: if neither is there.
    """
    checkout = Path(__file__).resolve().parent.parent / "recipes"
    if (checkout / "loop.yml").is_file():
        return checkout
    try:
        for file in distribution("thinkswitch").files or []:
            if file.parts[-2:] == ("thinkswitch_recipes", "loop.yml"):
                return Path(str(file.locate())).resolve().parent
    except PackageNotFoundError:
        pass
    raise LoopError("the shipped recipes are missing: install thinkswitch again, or name your own loop.yml by --config")


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file.

    Raises:
        LoopError: if the file is missing, unreadable, not YAML, or not a mapping.
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LoopError(f"{path}: no such file; check the path in --config or in loop.yml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise LoopError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise LoopError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise LoopError(f"{path}: must be a mapping of settings, not {type(value).__name__}")
    return value


def load(path: Path, overrides: dict[str, Any]) -> LoopConfig:
    """Read `loop.yml`, lay the command line's overrides on it, and make its paths absolute.

    A path in the file is relative to the file; one on the command line, to the working folder.

    Raises:
        LoopError: with the file and the field, if either has a wrong or unknown setting.
    """
    settings = read_yaml(path)
    here = path.resolve().parent
    for key in ("instruct", "thinking"):
        if isinstance(settings.get(key), str):
            settings[key] = local_or_hub(settings[key], here)
    if isinstance(settings.get("prompts"), list):
        settings["prompts"] = [
            str(here / p) if isinstance(p, str) and p.endswith(".jsonl") else p for p in settings["prompts"]
        ]
    if settings.get("include_path"):
        settings["include_path"] = here / str(settings["include_path"])
    if isinstance(settings.get("recipes"), dict):
        settings["recipes"] = {key: here / str(value) for key, value in settings["recipes"].items()}
    for key in ("instruct", "thinking"):
        if overrides.get(key) is not None:
            overrides = {**overrides, key: local_or_hub(overrides[key], Path.cwd())}
    given = {key: value for key, value in overrides.items() if value is not None}
    try:
        config = LoopConfig.model_validate({**settings, **given})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        source = f"--{OPTIONS.get(field, field)}" if field in given else f"{path}: {field}"
        raise LoopError(f"{source}: {first['msg'].lower()} (got {first['input']!r})") from None
    if config.prompts_file and len(config.prompts) > 1:
        raise LoopError(f"{path}: prompts: name either one .jsonl file or lm-eval tasks, not both")
    return config


def local_or_hub(name: str, base: Path) -> str:
    """An absolute path where `name` is a folder (seen from `base`), else `name` itself, taken as a hub id."""
    folder = (base / name).expanduser()
    return str(folder.resolve()) if folder.is_dir() else name
