"""What a run is asked to do: `loop.yml` and the recipes it names, read, overridden and checked.

Knows the fields, their defaults and where the shipped recipes lie. Leaves every tool's own settings to the tool's own
recipe.
"""

from __future__ import annotations

import glob
import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from harness.asking import ENGINES
from harness.errors import LoopError
from harness.stages import Recipe
from thinkswitch_plugin.cli import on_one_line
from thinkswitch_plugin.prompts import FILES, is_source

ARMS = ("thinkswitch", "on_policy", "merge_only", "gold", "untouched")
OPTIONS = {"iterations": "iters", "include_path": "include-path"}  # fields whose option has another name
LAUNCHERS = ("python", "accelerate", "torchrun")
NOTHING: Mapping[Path, str] = {}
MOST = 20_000  # values in one file, those that YAML's aliases repeat counted each time
LARGEST = 1_000_000  # characters of all its texts
DEEPEST = 100  # mappings and lists within one another
# A setting that is nobody else's business; `pad_token` and its like are not.
SECRET = re.compile(
    r"(?i)(token|use_auth_token|.*(hub|hf|auth|access|api)_token|.*(secret|passw|api[_-]?key|credential).*|"
    r"authorization|headers?)"
)
IN_URL = re.compile(r"://[^/@\s]*@")  # a user or password
IN_TEXT = re.compile(
    r"(?<![\w-])([\w-]+)=(?!true\b|false\b|none\b)[^\s,]", re.IGNORECASE
)  # an option, as lm-eval takes
# What hubs, trackers and servers give out, wherever it stands.
GIVEN_OUT = re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_|glpat-|AKIA|xox[abp]-)[A-Za-z0-9_-]{16,}")


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, which YAML 1.1 takes for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


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
    as it is, 1 is the instruct checkpoint; left out, it is what the reconstruct recipe says; `auto` tries several in
    each iteration and goes on with the largest that answers the training prompts as the anchor does, or, where
    `validate` names tasks that are no tests, with the best on those. `anchor` is the thinking
    checkpoint it is interpolated with: `original` (the one the run began with) or `previous` (the one reconstructed an
    iteration ago). `distill` says what the instruct checkpoint learns from: the thinking one's `answers`, or,
    `on-policy`, its judgement of the instruct one's own. With 0 `iterations` the pair is evaluated as it came. `nf4`
    answers prompts and questions with the checkpoints' linear layers in NF4, where bfloat16 does not fit the GPU.
    `jobs` is how many stages may run side by side where there is no GPU; where there are, one runs on each. `launcher`
    is Axolotl's, with what it is given (`torchrun --nproc_per_node=2`); other than `python` it gets all GPUs. `limit`
    asks only so many questions and prompts a task. `arms` are baselines that are run beside it (`plan` says which);
    `gold` is a .jsonl of conversations with right answers, which only the arm of that name reads. `seeds` runs all of
    it once with each. `limits` are the hours that a stage of a kind may take (`{generate: 4}`): one that hangs ends
    then; to choose t, or to compare weights, may take what a reconstruction may. `retries` is how often a stage whose
    tool failed, or was ended so, is tried again, from where it was.
    `python` names the interpreter of another environment whose lm-eval runs a recipe
    (`{generate: ../vllm/bin/python}`): vLLM pins a torch of its own. `servers` has a recipe's questions asked of a
    server, which is started for each checkpoint and ended after it: `vllm`, `sglang`, `transformers`, or a command with
    `{checkpoint}` and `{port}` in it (`../vllm/bin/vllm serve {checkpoint} --port {port}`). `report_to` names the
    trackers that are told the run's figures, or `none`; left out, TensorBoard's files are written beside the run.
    """

    model_config = ConfigDict(extra="forbid", validate_by_name=True)

    name: str = Field(default="loop", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    instruct: str
    thinking: str
    prompts: list[str] = Field(min_length=1)
    tasks: list[str] = Field(min_length=1)
    include_path: Path | None = None
    iterations: int = Field(default=3, ge=0, le=1000)
    t: float | Literal["auto"] | None = None
    validate_by: list[str] = Field(default_factory=list, alias="validate")
    anchor: Literal["original", "previous"] = "original"
    distill: Literal["answers", "on-policy"] = "answers"
    arms: list[Literal["thinkswitch", "on_policy", "merge_only", "gold", "untouched"]] = Field(default_factory=list)
    gold: Path | None = None
    seed: int = Field(default=42, ge=0)
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default_factory=list, max_length=100)
    nf4: bool = False
    jobs: int = Field(default=1, ge=1)
    launcher: str = "python"
    limit: int | None = Field(default=None, ge=1)
    usd_per_hour: float | None = Field(default=None, ge=0.0)
    limits: dict[Literal["generate", "distill", "reconstruct", "evaluate"], Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict
    )
    retries: int = Field(default=0, ge=0, le=100)
    python: dict[Literal["generate", "evaluate", "evaluate_thinking"], Path] = Field(default_factory=dict)
    servers: dict[Literal["generate", "evaluate", "evaluate_thinking"], str] = Field(default_factory=dict)
    report_to: list[Literal["tensorboard", "trackio", "wandb", "mlflow"]] = ["tensorboard"]
    recipes: Recipes
    written_pair: tuple[str, str] | None = Field(default=None, exclude=True)  # instruct, thinking as loop.yml has them

    @field_validator("t", mode="plain")
    @classmethod
    def _known_t(cls, value: Any) -> Any:
        if value is None or value == "auto":
            return value
        try:
            t = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            t = math.nan
        if not 0 <= t <= 1:
            raise ValueError("must be from 0 (thinking) to 1 (instruct), or auto")
        return t

    @field_validator("report_to", mode="before")
    @classmethod
    def _named_trackers(cls, value: Any) -> Any:
        named = [value] if isinstance(value, str) else value
        return [] if named in (["none"], None) else named

    @field_validator("launcher")
    @classmethod
    def _known_launcher(cls, value: str) -> str:
        try:
            words = shlex.split(value)
        except ValueError as error:
            raise ValueError(f"cannot be read ({error})") from None
        if not words or words[0] not in LAUNCHERS:
            raise ValueError(f"must begin with one of {', '.join(LAUNCHERS)}")
        return value

    @field_validator("servers")
    @classmethod
    def _known_servers(cls, value: dict[Any, str]) -> dict[Any, str]:
        for command in value.values():
            if command not in ENGINES and not ("{checkpoint}" in command and "{port}" in command):
                raise ValueError(
                    f"must be one of {', '.join(ENGINES)}, or a command with {{checkpoint}} and {{port}} in it"
                )
        return value

    @property
    def own_prompts(self) -> str | None:
        """The user's own prompts, a file or a hub data set, if `prompts` names that rather than lm-eval tasks."""
        return self.prompts[0] if is_source(self.prompts[0]) else None

    @property
    def every_arm(self) -> list[str]:
        """The arms of the run, the one it is about first."""
        return list(dict.fromkeys(self.arms)) or ["on_policy" if self.distill == "on-policy" else "thinkswitch"]

    @property
    def every_seed(self) -> list[int]:
        """The seeds of the run."""
        return list(dict.fromkeys(self.seeds)) or [self.seed]

    @property
    def prompt_tasks(self) -> list[str]:
        """The lm-eval tasks that ask the prompts."""
        return ["prompts_file"] if self.own_prompts else self.prompts


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


def read_yaml(path: Path, texts: Mapping[Path, str] = NOTHING) -> dict[str, Any]:
    """A YAML mapping from a file, or from what stands for it in `texts`.

    Raises:
        LoopError: if the file is missing, unreadable, not YAML, or not a mapping.
    """
    name = shown(path)
    try:
        if path not in texts and path.exists() and not path.is_file():  # a device, or a pipe, may never end
            raise LoopError(f"{name}: cannot be read: it is no file; check the path in --config or in loop.yml")
        text = texts[path] if path in texts else path.read_text(encoding="utf-8")
        if len(text) > LARGEST:
            raise LoopError(f"{name}: is longer than {LARGEST:,} characters; is it a file of settings?")
        value = yaml.safe_load(text)
    except FileNotFoundError:
        raise LoopError(f"{name}: no such file; check the path in --config or in loop.yml") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise LoopError(f"{name}: not valid YAML: {shown(error)}") from None
    except (OSError, ValueError) as error:  # a date that no calendar has is a ValueError of YAML's
        raise LoopError(f"{name}: cannot be read: {shown(error)}") from None
    if not isinstance(value, dict):
        raise LoopError(f"{name}: must be a mapping of settings, not {type(value).__name__}")
    if odd := [key for key in value if not isinstance(key, str)]:
        raise LoopError(f"{name}: {shown(odd[0])}: is no name of a setting; put it in quotes if it is meant")
    plain(value, name)
    return value


def plain(value: Any, where: str) -> None:
    """Settings as every tool can read them: of Unicode, and of a size and depth that a person could write.

    A few lines of YAML can stand for a billion values, or for one within itself.

    Args:
        value: as YAML gave it.
        where: it stands, for what is said of it.

    Raises:
        LoopError: naming what it is not.
    """
    left, seen, letters = [(value, 0)], 0, 0
    while left:
        one, depth = left.pop()
        seen += 1
        letters += len(one) if isinstance(one, str) else 0
        if seen > MOST or letters > LARGEST or depth > DEEPEST:
            raise LoopError(
                f"{where}: more than {MOST:,} values, {LARGEST:,} characters, or {DEEPEST} within one another; "
                "write less, and without aliases"
            )
        if isinstance(one, dict):
            left += [(inner, depth + 1) for pair in one.items() for inner in pair]
        elif isinstance(one, list):
            left += [(inner, depth + 1) for inner in one]
        elif isinstance(one, str) and not one.isascii() and one.encode(errors="replace").decode() != one:
            raise LoopError(f"{where}: {shown(one)} holds half a surrogate pair; write the whole character")
        elif one is not None and not isinstance(one, str | int | float | date):
            raise LoopError(f"{where}: {shown(one)} is {type(one).__name__}; write text, numbers, lists and mappings")


def shown(value: object) -> str:
    """A value, or what a library says, as a line can bear it."""
    text = on_one_line(str(value).encode(errors="backslashreplace").decode())
    return text if len(text) <= 300 else f"{text[:300]}…"


def load(
    path: Path, overrides: Mapping[str, Any], changes: Sequence[str] = (), texts: Mapping[Path, str] = NOTHING
) -> LoopConfig:
    """Read `loop.yml`, lay the command line's overrides on it, and make its paths absolute.

    A path in the file is relative to the file; one on the command line, to the working folder.

    Args:
        path: the file.
        overrides: field → value; None leaves the file's.
        changes: what `--set` says of the loop itself: "jobs=1". What it says of a recipe is `read_recipes`' to read.
        texts: files that are not on the disk, by their absolute paths.

    Raises:
        LoopError: with the file and the field, if either has a wrong or unknown setting.
    """
    settings = rooted(read_yaml(path, texts), path.resolve().parent)
    written = settings.get("instruct"), settings.get("thinking")
    for key in ("instruct", "thinking"):
        if overrides.get(key) is not None:
            overrides = {**overrides, key: local_or_hub(overrides[key], Path.cwd())}
    given = {key: value for key, value in overrides.items() if value is not None}
    no_secret(settings, str(path))
    no_secret(given, "options")
    asked, changed = dict(settings), set()
    for place, value in map(assignment, changes):
        if place[0] not in Recipes.model_fields or len(place) == 1:
            put(asked, place, value)
            no_secret(asked, "--set")
            changed.add(place[0])
    asked |= rooted({key: asked[key] for key in changed}, Path.cwd())
    try:
        config = LoopConfig.model_validate({**asked, **given})
    except ValidationError as error:
        first = error.errors()[0]
        field = shown(".".join(str(part) for part in first["loc"]))
        source = f"{path}: {field}"
        if field in given:
            source = f"--{OPTIONS.get(field, field)}"
        elif first["loc"][0] in changed:
            source = f"--set {field}"
        raise LoopError(
            f"{source}: {first['msg'][:1].lower()}{first['msg'][1:]} (got {shown(repr(first['input']))})"
        ) from None
    if len(config.prompts) > 1 and any(map(is_source, config.prompts)):
        raise LoopError(f"{path}: prompts: name either one file or hub data set, or lm-eval tasks, not both")
    if config.nf4 and config.servers:
        raise LoopError("--nf4 and servers: a server puts weights into 4 bits by an option of its own; leave one out")
    if config.t == "auto" and not config.iterations:
        raise LoopError("--t auto: with 0 iterations nothing is rebuilt; leave --t (and t:) out, or ask for --iters 1")
    if config.arms and config.distill != "answers":
        raise LoopError("--arms and --distill: arms say what is learnt from; leave --distill out")
    if "gold" in config.arms and not config.gold:
        raise LoopError(
            "--arms gold: needs right answers: gold: FILE in loop.yml, a .jsonl of conversations (messages)"
        )
    if "gold" in config.arms and config.gold and not os.path.isfile(config.gold):
        raise LoopError(f"gold: {shown(config.gold)}: no such file")
    pair = (written[0], written[1]) if isinstance(written[0], str) and isinstance(written[1], str) else None
    return config.model_copy(update={"written_pair": pair})


def rooted(settings: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """Settings of loop.yml whose local paths are absolute, seen from a folder."""
    found = dict(settings)
    for key in ("instruct", "thinking"):
        if isinstance(found.get(key), str):
            found[key] = local_or_hub(found[key], base)
    if isinstance(found.get("prompts"), list):
        found["prompts"] = [source(p, base) if isinstance(p, str) else p for p in found["prompts"]]
    for key in ("include_path", "gold"):
        if found.get(key):
            found[key] = base / str(found[key])
    if isinstance(found.get("python"), dict):  # a name alone is found in PATH; a link is not followed: it is the venv's
        programs = {key: str(value) for key, value in found["python"].items()}
        found["python"] = {k: os.path.normpath(base / v) if os.sep in v else v for k, v in programs.items()}
    if isinstance(found.get("recipes"), dict):
        found["recipes"] = {key: base / str(value) for key, value in found["recipes"].items()}
    return found


def read_recipes(
    config: LoopConfig, changes: Sequence[str] = (), texts: Mapping[Path, str] = NOTHING
) -> dict[str, Recipe]:
    """The native recipes by the name of their stage, with what each tool needs of them present.

    A local file, folder or pattern that a recipe names is of the working folder, as for the tool itself, or else of the
    recipe's own.

    Args:
        config: names them.
        changes: what `--set` says of recipes: "distill.learning_rate=1e-4".
        texts: as for `load`.

    Raises:
        LoopError: if a file is missing or is no mapping, or a change names no recipe of the run.
    """
    files: dict[str, Path | None] = {name: getattr(config.recipes, name) for name in Recipes.model_fields}
    on_policy = files.pop("on_policy")
    if "on_policy" in config.every_arm:
        if not on_policy:
            raise LoopError("--distill on-policy: loop.yml names no such recipe; add on_policy: under recipes:")
        files["on_policy" if config.arms else "distill"] = on_policy
    recipes: dict[str, Recipe] = {}
    for name, file in files.items():
        if file:
            recipes[name] = located(read_yaml(file, texts), file.resolve().parent)
    for name, recipe in recipes.items():
        no_secret(recipe, f"{name} recipe")
    for place, value in map(assignment, changes):
        if place[0] in Recipes.model_fields and len(place) > 1:
            name = "distill" if (place[0], config.distill) == ("on_policy", "on-policy") else place[0]
            if name not in recipes:
                raise LoopError(f"--set {'.'.join(place)}: this run has no recipe {name}; it has {', '.join(recipes)}")
            put(recipes[name], place[1:], value)
            no_secret(recipes[name], f"--set {place[0]}")
    return recipes


def no_secret(value: Any, where: str, named: bool = False) -> None:
    """Refuse what is nobody else's business: recipes and settings are kept, shown and published.

    Args:
        value: of a setting.
        where: it stands, for what is said of it; the value itself is not repeated.
        named: whether the setting's name, or that of what it is in, is a secret's.

    Raises:
        LoopError: naming the key.
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            no_secret(inner, f"{where}: {key}", named or bool(SECRET.fullmatch(str(key))))
    elif isinstance(value, list):
        for inner in value:
            no_secret(inner, where, named)
    elif isinstance(value, str):
        found = "a user or password in its URL" if IN_URL.search(value) else ""
        options = (option[1] for option in IN_TEXT.finditer(value))
        if (named and value) or GIVEN_OUT.search(value) or any(map(SECRET.fullmatch, options)):
            found = "a secret in it"
        if found:
            raise LoopError(f"{where}: has {found}; take it out, the environment is for secrets (HF_TOKEN, ...)")


def assignment(text: str) -> tuple[list[str], Any]:
    """ "a.b=1e-4" as (["a", "b"], 0.0001); the value is YAML.

    Raises:
        LoopError: if it is no assignment.
    """
    place, equals, value = text.partition("=")
    names = place.strip().split(".")
    if not equals or not all(names):
        raise LoopError(f"--set {text}: write KEY=VALUE, such as --set distill.learning_rate=1e-4")
    try:
        parsed = yaml.load(value, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, ValueError):
        raise LoopError(f"--set {shown(text)}: the value is not valid YAML") from None
    plain(parsed, f"--set {'.'.join(names)}")
    return names, parsed


def put(settings: Any, place: Sequence[str], value: Any) -> None:
    """Set a value deep inside a mapping; a number on the way is an item of a list.

    Raises:
        LoopError: if there is something on the way that has no such item.
    """
    inside = settings
    for name in place[:-1]:
        try:
            if isinstance(inside, list):
                inside = inside[int(name)]
            else:
                if inside.get(name) is None:
                    inside[name] = {}
                inside = inside[name]
        except (AttributeError, IndexError, ValueError):
            raise LoopError(f"--set {'.'.join(place)}: there is no {name} to set something in") from None
    try:
        inside[int(place[-1]) if isinstance(inside, list) else place[-1]] = value
    except (TypeError, IndexError, ValueError):
        raise LoopError(f"--set {'.'.join(place)}: there is no {place[-1]} to set") from None


def located(value: Any, folder: Path) -> Any:
    """A recipe whose local paths are absolute: of the working folder, or else of the recipe's own."""
    if isinstance(value, dict):
        return {key: located(inner, folder) for key, inner in value.items()}
    if isinstance(value, list):
        return [located(inner, folder) for inner in value]
    if isinstance(value, str) and 1 < len(value) < 512 and re.search(r"[/.]", value) and "\n" not in value:
        for base in (Path.cwd(), folder):
            if os.path.exists(base / value):  # a Path raises for what is too long to be a name
                return str((base / value).resolve())
            if any(sign in value for sign in "*?[") and glob.glob(str(base / value), recursive=True):
                return str(base / value)
    return value


def source(name: str, base: Path) -> str:
    """An absolute path where `name` is that of a prompts file (seen from `base`), else `name` itself."""
    return str(base / name) if name.endswith(FILES) else name


def local_or_hub(name: str, base: Path) -> str:
    """An absolute path where `name` is a folder (seen from `base`), else `name` itself, taken as a hub id."""
    folder = base / os.path.expanduser(name)  # a Path raises for what is too long, or nobody's home
    return str(folder.resolve()) if os.path.isdir(folder) else name
