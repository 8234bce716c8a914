"""What the tools say of their recipes before any of them runs: a training would be refused after hours of labels.

    python -m harness.natives ASKED.json ANSWER.json

Each recipe is read as its tool reads it at its start: Axolotl's config with its plugins' settings, mergekit's plan of
the merge, lm-eval's config; and each checkpoint's config, tokenizer and template as transformers reads them. The tools
take seconds to import, so it is done in a process of its own, or in a fork of one that has them; what a tool has taken
once is kept beside the store. Leaves to others what a loop needs of a recipe besides (the stages' `build`).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_type_hints

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from harness.checks import tensor_shapes
from harness.errors import LoopError, StageError
from harness.files import digest, disk_errors, read_json, read_json_or_none, write_json
from harness.stages import OWN, RECIPE, Stage, dump, hashed, placed
from thinkswitch_plugin.cli import on_one_line

TOOLS = {
    "generate": "lm_eval",
    "answer": "lm_eval",
    "evaluate": "lm_eval",
    "distill": "axolotl",
    "reconstruct": "mergekit",
}  # by the kind of stage
LIKE = {"instruct": "instruct", "thinking": "thinking", "anchor": "thinking"}  # inputs that may not be made yet
LONGEST = 400  # characters of what a tool says
Ask = Callable[[list[str]], object]
# What lm-eval takes beside the types that its config names; the settings that are mappings may be left empty.
ALSO_TAKES: dict[str, Any] = {
    "batch_size": int | Annotated[str, Field(pattern=r"^(auto(:\d+)?|\d+)$")],
    "gen_kwargs": dict[str, Any] | str | None,
    "metadata": dict[str, Any] | None,
}
Token = Annotated[int, Field(ge=-1, lt=2**31)]
TOKENS = Token | Annotated[list[Token], Field(min_length=1)] | None


@cache
def own_code() -> str:
    """A hash of this module: what it has taken is to be looked at again by another one."""
    return digest(Path(__file__))


class Asked(NamedTuple):
    """A stage whose recipe is to be taken.

    Attributes:
        stage: of a run.
        pair: the checkpoints "instruct" and "thinking" as they came, which stand for those that are not made yet.
        depends: what the answer depends on beside the recipe, as plain data: tools, shape of the pair, devices.
    """

    stage: Stage
    pair: Mapping[str, Path]
    depends: Any

    @property
    def tool(self) -> str:
        """Whose recipe it is; empty if there is none here to ask, or it is one of another environment."""
        return TOOLS.get(self.stage.kind.name, "") if self.stage.versions is None else ""

    @property
    def title(self) -> str:
        """What it is called in an error."""
        return f"{self.stage.kind.name} recipe"

    @property
    def recipe(self) -> dict[str, Any]:
        """What the tool will read, paths aside."""
        return {**self.stage.recipes[RECIPE], **self.stage.reports}

    @property
    def name(self) -> str:
        """A hash of all that the answer depends on."""
        return hashed([self.tool, self.recipe, self.depends, own_code()])

    def written(self) -> str:
        """The recipe as YAML, with the pair in place of what is not made yet."""
        inputs = self.stage.inputs.items()
        lie = {name: str(self.pair[LIKE[name]]) if name in LIKE else source.path for name, source in inputs}
        return dump(placed(self.recipe, {name: path for name, path in lie.items() if os.path.isabs(path)}))


class Came(NamedTuple):
    """A checkpoint that was there before the run.

    Attributes:
        role: "instruct" or "thinking", for what is said of it.
        folder: where it is.
        depends: what it is, and what else an answer depends on, as plain data.
    """

    role: str
    folder: Path
    depends: Any
    tool: str = "transformers"

    @property
    def name(self) -> str:
        """As `Asked.name`."""
        return hashed([self.tool, self.depends, own_code()])

    @property
    def title(self) -> str:
        """What it is called in an error."""
        return f"--{self.role} {self.folder}"

    def written(self) -> str:
        """Its folder."""
        return str(self.folder)


def check(work: Iterable[Asked | Came], cache: Path, ask: Ask | None = None) -> None:
    """See that the tool of every stage takes its recipe, and transformers every checkpoint.

    Args:
        work: the stages and checkpoints.
        cache: a JSON file that keeps what was taken.
        ask: runs a command to its end; None for a plain process.

    Raises:
        LoopError: naming the first recipe that its tool refuses, and what the tool says.
        StageError: if the tools could not be asked.
    """
    kept = _kept(cache)
    new = {name: one for one in work if one.tool and (name := one.name) not in kept}
    if not new:
        return
    asked = {name: {"tool": one.tool, "recipe": one.written()} for name, one in new.items()}
    for name, why in _answers(asked, ask or _process).items():
        if why:
            raise LoopError(f"{new[name].title}: {new[name].tool} refuses it: {why}")
    with disk_errors(cache):
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_json(cache, sorted({*_kept(cache), *new}))


def _kept(cache: Path) -> set[str]:
    kept = read_json_or_none(cache)  # it only saves time
    return set(map(str, kept)) if isinstance(kept, list) else set()


def _answers(asked: Mapping[str, Mapping[str, str]], ask: Ask) -> dict[str, str]:
    with tempfile.TemporaryDirectory(prefix="recipes-") as folder, disk_errors(Path(folder), "TMPDIR"):
        question, answer = Path(folder) / "asked.json", Path(folder) / "answer.json"
        write_json(question, asked)
        ask(["python", "-m", "harness.natives", str(question), str(answer)])
        found: dict[str, str] = read_json(answer)
        return found


def _process(command: list[str]) -> None:
    said = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True, errors="replace", check=False)
    if said.returncode:
        last = [line for line in said.stderr.splitlines() if line.strip()][-1:]
        raise StageError(f"the recipes could not be shown to their tools: {on_one_line(' '.join(last))[:LONGEST]}")


# --- in the process that has the tools ---


def refusal(tool: str, text: str) -> str:
    """Why a tool would not start with a recipe, or a checkpoint's folder, in one line; empty if it would."""
    readers = {"axolotl": _axolotl, "mergekit": _mergekit, "lm_eval": _lm_eval, "transformers": _transformers}
    try:
        readers[tool](text)
    except (Exception, SystemExit) as error:  # a validator raises whatever it likes
        return on_one_line(_said(error))[:LONGEST] or type(error).__name__
    return ""


def _said(error: BaseException) -> str:
    """What an error says: of pydantic's, the first thing."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        return f"{place}: {first['msg']} (got {repr(first['input'])[:100]})" if place else first["msg"]
    plain = isinstance(error, ValueError | RuntimeError) and str(error)
    return str(error) if plain else f"{type(error).__name__}: {error}"


def _axolotl(text: str) -> None:
    from axolotl.cli.config import gpu_capabilities, normalize_config, prepare_plugins, validate_config
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.dict import DictDefault

    config = DictDefault(yaml.safe_load(text))
    prepare_plugins(config)
    for name in config.plugins or []:
        if name not in PluginManager.get_instance().plugins:  # it goes on without one that it cannot import
            raise ValueError(f"plugins: {name}: cannot be imported")
    card, environment = (None, None) if config.use_ray else gpu_capabilities()
    normalize_config(validate_config(config, capabilities=card, env_capabilities=environment))


def _mergekit(text: str) -> None:
    from mergekit import merge_methods
    from mergekit.architecture import get_architecture_info
    from mergekit.common import dtype_from_name
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner

    config, options = MergeConfiguration.model_validate(yaml.safe_load(text)), MergeOptions()
    merge_methods.get(config.merge_method)
    for name in filter(None, (config.dtype, config.out_dtype)):
        dtype_from_name(name)
    models = config.referenced_models()
    if not all(os.path.isdir(model.model.path) for model in models):
        return  # of one on the hub its weights would be fetched
    LoaderCache().setup(options=options)
    like = (config.base_model or models[0]).config()
    MergePlanner(config, get_architecture_info(config, options), options, like).plan_to_disk(OWN)  # writes nothing


def _lm_eval(text: str) -> None:
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.models import MODEL_MAPPING

    types = {**get_type_hints(EvaluatorConfig), **ALSO_TAKES}
    for key, value in yaml.safe_load(text).items():
        if key not in types:
            raise ValueError(f"{key}: is no setting of lm-eval's")
        try:
            TypeAdapter(types[key]).validate_python(value, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise ValueError(f"{key}: {first['msg']} (got {repr(first['input'])[:100]})") from None
    with tempfile.NamedTemporaryFile("w", suffix=".yml", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        model = EvaluatorConfig.from_config(file.name).model
    if model not in MODEL_MAPPING:
        raise ValueError(f"model: {model}: lm-eval has none of that name")


def _transformers(folder: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    question = [{"role": "user", "content": "Hello"}]
    if not tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False):
        raise ValueError("its chat template renders nothing")
    with torch.device("meta"):  # sizes without weights
        said = AutoModelForCausalLM.from_config(config).state_dict()
    for name, there in tensor_shapes(Path(folder)).items():
        if name in said and list(said[name].shape) != there:
            raise ValueError(f"{name} is {there}, and by config.json {list(said[name].shape)}")
    if os.path.isfile(os.path.join(folder, "generation_config.json")):
        how = GenerationConfig.from_pretrained(folder, local_files_only=True)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            TypeAdapter(TOKENS).validate_python(getattr(how, key), strict=True)


def main() -> None:
    """The command: see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.natives", description="Which recipes their tools would refuse, and why, as JSON."
    )
    parser.add_argument("asked", type=Path, metavar="ASKED", help='{NAME: {"tool": axolotl, "recipe": its YAML}}')
    parser.add_argument("answer", type=Path, metavar="ANSWER", help="where {NAME: why} goes; empty where it is taken")
    given = parser.parse_args()
    asked = read_json(given.asked)
    write_json(given.answer, {name: refusal(one["tool"], one["recipe"]) for name, one in asked.items()})


if __name__ == "__main__":
    main()
