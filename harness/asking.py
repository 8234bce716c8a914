"""A checkpoint is asked questions by lm-eval: the config for it, and the files that lm-eval leaves.

Knows lm-eval's config keys and its output folder. Leaves to others: which checkpoint and tasks (`plan`), what an answer
is worth (`outcomes`).
"""

from __future__ import annotations

import copy
import glob
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from harness.errors import LoopError, StageError
from harness.interpreters import Interpreter
from harness.stages import OWN, RECIPE, External, Output, Recipe, Source, slot
from thinkswitch_plugin.kept_answers import SUFFIX as KEPT
from thinkswitch_plugin.trace_stripping import DEFAULT_TAGS, Trace

if TYPE_CHECKING:
    from harness.tasks import Task

ANSWERS = "answers"  # the folder inside a stage's that lm-eval fills
NF4_COPY = "nf4"
SERVICE = "service.yml"  # in a stage's folder, of a stage that runs beside a server
KEPT_ANSWERS = f"*{KEPT}"  # files of them, in a stage's folder
DATE = "[0-9][0-9][0-9][0-9]-*"  # how lm-eval ends its file names; a task may be named as another's beginning
TOOLS = ("lm_eval", "transformers", "torch", "datasets", "vllm", "sglang", "math_verify", "thinkswitch_plugin")
SERVED = ("vllm", "sglang")  # models of lm-eval's that take a seed of their own, and not lm-eval's
API = "local-chat-completions"  # lm-eval's name for a server
# How long a trace may take, and that an answer is asked for again once if it is lost: lm-eval gives up after 300 s.
SERVED_BY = {"num_concurrent": 16, "timeout": 86_400, "max_retries": 2, "tokenized_requests": False}
SHARES = re.compile(r"--(tensor|pipeline|data)[-_]parallel|--(tp|dp|pp)\b|-(tp|dp|pp)\b")
# Servers that a loop may name instead of writing their command; the checkpoint and a free port are put in.
ENGINES = {
    "vllm": "vllm serve {checkpoint} --host 127.0.0.1 --port {port}",
    "sglang": "python -m sglang.launch_server --model-path {checkpoint} --host 127.0.0.1 --port {port}",
    "transformers": "transformers serve {checkpoint} --host 127.0.0.1 --port {port}",
}
# What a recipe may say to lm-eval alone but not to a loop, and why.
UNFIT = {
    "use_cache": "lm-eval would give one checkpoint's answers for another's",
    "cache_requests": "lm-eval would ask as it did under other settings",
    "samples": "--limit asks fewer questions",
}
BUDGETS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval's names for one thing
LM_EVAL_TOKENS = 256  # of an answer where nobody says how many
PHASES = {
    "": "questions written out",  # the bar has no name
    "Running generate_until": "questions answered",
    "Generating": "questions answered",
    "Processed prompts": "questions answered",  # vLLM's, whose first bar is of what it was given
    "Adding requests": "questions handed over",
    "Loading": "weights loaded",
}


@dataclass(frozen=True)
class Settings:
    """How every checkpoint of a run is asked.

    Attributes:
        seed: of sampling and of lm-eval's own choices.
        nf4: answer with the linear layers in NF4, of a copy made first.
        limit: only so many questions a task; None for all.
        include_path: a folder with tasks of the user's.
        server: the command of a server of the checkpoint, or one of `ENGINES`, that is asked; empty for none.
    """

    seed: int
    nf4: bool = False
    limit: int | None = None
    include_path: Path | None = None
    server: str = ""


def recipe_for(
    recipe: Recipe,
    settings: Settings,
    tasks: Sequence[str],
    checkpoint: Source,
    interpreter: Interpreter | None = None,
) -> tuple[Recipe, dict[str, Source]]:
    """An lm-eval config for a checkpoint and these tasks, and what it reads; `interpreter` runs it if not this one.

    Raises:
        LoopError: if the recipe has a setting with which the loop could not go on.
    """
    result = served(recipe, settings.seed) if settings.server else copy.deepcopy(recipe)
    inputs: dict[str, Source] = {"checkpoint": checkpoint}
    arguments = result.get("model_args") or {}
    if not isinstance(arguments, dict):
        raise LoopError("lm-eval recipe: model_args: must be a mapping, as in model_args: {dtype: float32}")
    if not isinstance(result.get("metadata") or {}, dict):
        raise LoopError("lm-eval recipe: metadata: must be a mapping")
    generation(result)
    for key in (key for key in UNFIT if result.get(key)):
        raise LoopError(f"lm-eval recipe: {key}: {UNFIT[key]}; take it out of the recipe")
    if arguments.get("think_end_token") is not None:
        raise LoopError(
            "lm-eval recipe: model_args: think_end_token: nobody could tell which traces closed; take it out of the "
            "recipe, traces are taken away before anything is graded"
        )
    if arguments.get("base_url") and isinstance(checkpoint, Output):
        raise LoopError(
            "lm-eval recipe: model_args: base_url: a server answers with the checkpoint it was started with, not with "
            "this iteration's; use it with --iters 0, or model: vllm"
        )
    if result.get("model") in SERVED:
        arguments = {"seed": settings.seed, **arguments}
    result["model_args"] = {**arguments, "pretrained": slot("checkpoint")}
    result["tasks"] = list(tasks)
    result["output_path"] = f"{OWN}/{ANSWERS}/results.json"  # a .json: no further folder named after the model
    result["log_samples"] = True
    result["seed"] = [settings.seed] * 4
    if settings.limit is not None:
        result["limit"] = settings.limit
    if settings.include_path:
        result["include_path"] = slot("include_path")
        inputs["include_path"] = External(str(settings.include_path), "tasks")  # whose definitions the key holds
    if interpreter:
        inputs["python"] = External(interpreter.path, f"python {interpreter.python}")  # wherever it lies
    return result, inputs


def served(recipe: Recipe, seed: int) -> Recipe:
    """A recipe as it is asked of a server, which has its own ways with a device and with batches.

    Raises:
        LoopError: if it names an address of its own.
    """
    own = dict(recipe.get("model_args") or {}) if recipe.get("model") == API else {}
    if "base_url" in own:
        raise LoopError("servers: starts a server; take base_url out of the recipe's model_args, or servers: out")
    result = {key: copy.deepcopy(value) for key, value in recipe.items() if key not in ("device", "batch_size")}
    return {**result, "model": API, "model_args": {**SERVED_BY, "seed": seed, **own}, "apply_chat_template": True}


def service(recipe: Recipe, server: str) -> dict[str, Recipe]:
    """The files, by name, of a stage that runs beside a server: how that is started.

    Args:
        recipe: as it is written.
        server: as in `Settings`.
    """
    command = ENGINES.get(server, server)
    if server == "transformers" and device_of(recipe) == "cpu":
        command += " --device cpu"
    return {SERVICE: {"model": slot("checkpoint"), "command": command.replace("{checkpoint}", slot("checkpoint"))}}


def generation(recipe: Recipe) -> dict[str, Any]:
    """What an lm-eval config says of how answers are written, before which the task's own settings yield.

    Raises:
        LoopError: if it is neither a mapping nor what lm-eval takes for one.
    """
    said = recipe.get("gen_kwargs") or {}
    if isinstance(said, str):
        parts = (part.partition("=") for part in said.split(","))
        try:
            return {key: yaml.safe_load(value) for key, _, value in parts}
        except (yaml.YAMLError, ValueError):
            said = None
    if not isinstance(said, dict):
        raise LoopError("lm-eval recipe: gen_kwargs: must be a mapping, as in gen_kwargs: {temperature: 0.6}")
    return dict(said)


def is_greedy(recipe: Recipe, task: Task) -> bool:
    """Whether a task's answers are the likeliest, the same each time: for lm-eval they are without a temperature."""
    said = generation(recipe)
    cold = said.get("temperature", task.temperature) in (None, 0)
    return cold or said.get("do_sample", task.do_sample) is False


def commands_for(recipe: Recipe, settings: Settings, interpreter: Interpreter | None = None) -> list[tuple[str, ...]]:
    """The commands that ask what a recipe says.

    Args:
        recipe: what `recipe_for` made.
        settings: of an NF4 copy, which is made first, here, and put into the recipe; or beside a server.
        interpreter: whose lm-eval asks; None for this environment's.
    """
    python = slot("python") if interpreter else "python"
    ask = (python, "-m", "thinkswitch_plugin.kept_answers", f"{OWN}/{RECIPE}", "--keep")
    if settings.server:
        return [("python", "-m", "harness.serving", f"{OWN}/{SERVICE}", "--", *ask, "--server", "{url}")]
    if not settings.nf4:
        return [ask]
    recipe["model_args"]["pretrained"] = f"{OWN}/{NF4_COPY}"
    return [("axolotl", "nf4", slot("checkpoint"), f"{OWN}/{NF4_COPY}"), ask]


def resumes(folder: Path) -> list[Path]:
    """The answers that lm-eval had when it was stopped."""
    return sorted(folder.glob(KEPT_ANSWERS))


def device_of(recipe: Recipe) -> Any:
    """ "cpu" where a recipe, as it is written, says that it wants no accelerator."""
    return "cpu" if recipe.get("device") == "cpu" else "gpu"


def is_wide(recipe: Recipe, server: str = "") -> bool:
    """Whether a recipe, or the command of a server, spreads one checkpoint over several devices."""
    if SHARES.search(server):
        return True
    arguments = recipe["model_args"]
    shares = [arguments.get(key) or 1 for key in ("tensor_parallel_size", "data_parallel_size")]
    return any(str(share) != "1" for share in shares) or bool(arguments.get("parallelize"))


def asked_tasks(folder: Path) -> dict[str, int]:
    """The tasks whose questions were asked, with how many there were: a group counts as its members.

    Raises:
        StageError: if lm-eval left no results, or half of them.
    """
    files = sorted(folder.glob("results_*.json"))
    if not files:
        raise StageError(f"{folder}: lm-eval left no results; its log is beside that folder")
    try:
        results = json.loads(files[-1].read_text(encoding="utf-8"))
        counts = results.get("n-samples", {})
        return {task: int(counts.get(task, {}).get("effective", -1)) for task in results["configs"]}
    except (ValueError, KeyError, AttributeError, TypeError):
        raise StageError(f"{files[-1]}: not whole; remove that folder and run the same command again") from None


def samples(folder: Path, task: str, count: int = -1) -> Iterator[dict[str, Any]]:
    """The logged samples of one task, first filter only, in the order of the questions.

    Args:
        folder: what lm-eval filled.
        task: its name.
        count: how many there must be; -1 if nobody says.

    Raises:
        StageError: if lm-eval left none, fewer than it asked, or a line that is not whole.
    """
    files = sorted(folder.glob(f"samples_{glob.escape(task)}_{DATE}.jsonl"))
    if not files:
        raise StageError(f"{folder}: lm-eval left no samples of {task}; its log is beside that folder")
    first = None
    seen = 0
    with files[-1].open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                of_filter = row.get("filter")
            except (ValueError, AttributeError):
                again = "remove that folder and run the same command again"
                raise StageError(f"{files[-1]}:{number}: not whole; {again}") from None
            first = first or of_filter
            if of_filter == first:
                seen += 1
                yield row
    if count not in (-1, seen):
        raise StageError(
            f"{files[-1]}: has {seen} of the {count} questions that were asked; was the disk full? "
            "remove that folder and run the same command again"
        )


def texts(sample: Mapping[str, Any], task: str) -> list[str]:
    """Every answer the model wrote to one question.

    Raises:
        StageError: if there is none, or one that is no text.
    """
    written = sample["resps"][0] if sample["resps"] else []
    if not written or not all(isinstance(text, str) for text in written):
        raise StageError(
            f"{task}: question {sample.get('doc_id')}: the model gave no answer (null); "
            "see that stage's log, and the server's if one answered"
        )
    return list(written)


def prompt_of(sample: Mapping[str, Any]) -> Any:
    """What the model was asked, as it was asked: a text, or messages of a server."""
    return sample["arguments"]["gen_args_0"]["arg_0"]


def opened_trace(sample: Mapping[str, Any]) -> bool:
    """Whether the prompt had opened the answer's trace: the task says so, or else the prompt as it was logged."""
    prompt = prompt_of(sample)
    ends_open = isinstance(prompt, str) and prompt.rstrip().endswith(tuple(opening for opening, _ in DEFAULT_TAGS))
    return bool(sample["doc"].get("trace_opened", ends_open))


def token_budget(sample: Mapping[str, Any], recipe: Recipe) -> int:
    """How many tokens an answer could have: the task says so, or the recipe, or else lm-eval."""
    said = (sample["arguments"]["gen_args_0"].get("arg_1") or {}, recipe.get("model_args") or {})
    named = [settings[name] for settings in said for name in BUDGETS if settings.get(name) is not None]
    return int(named[0]) if named else LM_EVAL_TOKENS


def after_trace(text: str, trace: Trace) -> str:
    """What is graded of a text that was taken apart: as it was written if it has no trace."""
    return text if trace.reasoning is None else trace.answer or ""
