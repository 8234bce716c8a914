"""The loop itself: the order of the stages, and nothing of how any of them works.

    iteration 0   evaluate the pair as it came
    iteration k   generate → distill → reconstruct → evaluate

The thinking checkpoint of iteration k-1 labels the prompts, the instruct checkpoint of iteration k-1 learns from the
answers, and a thinking checkpoint is rebuilt between the anchor and the new instruct one (ThinkSwitch, arXiv
2606.01080).
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from harness import checks, report, scores, stages
from harness.config import LoopConfig, read_yaml
from harness.errors import LoopError
from harness.rundir import RunDir, digest, read_json, write_json
from harness.stages import Recipe, Stage
from harness.tools import ToolError, Tools, Usage, last_words
from thinkswitch_plugin.trace_stripping.report import PREFIX

STAGES = ("generate", "distill", "reconstruct", "evaluate")
PREPARED = (f"] {PREFIX}: ", "] on_policy_kl: ")  # how the plugins' lines on their data look in Axolotl's log
STACK = ("thinkswitch", "axolotl", "torch", "transformers", "peft", "bitsandbytes", "mergekit", "lm_eval", "datasets")


def plan(config: LoopConfig, recipes: dict[str, Recipe], run: RunDir) -> Iterator[Stage]:
    """Every stage of the run in order, each with the recipe and the commands of its iteration."""
    instruct, thinking = config.instruct, config.thinking
    tests = {"instruct": recipes["evaluate"], "thinking": recipes.get("evaluate_thinking", recipes["evaluate"])}
    for who, checkpoint in (("instruct", instruct), ("thinking", thinking)):
        if checks.is_tah(Path(checkpoint)):
            tests[who] = stages.trusting(tests[who])
    yield stages.evaluate(config, tests, 0, run.stage(0, "evaluate"), instruct, thinking)
    for k in range(1, config.iterations + 1):
        generate, distill, reconstruct, evaluate = (run.stage(k, name) for name in STAGES)
        yield stages.generate(config, recipes["generate"], k, generate, thinking)
        yield stages.distill(config, recipes["distill"], k, distill, instruct, thinking, generate / "samples")
        instruct = str(distill / "instruct")
        anchor = config.thinking if config.anchor == "original" else thinking
        yield stages.reconstruct(config, recipes["reconstruct"], k, reconstruct, anchor, instruct)
        thinking = str(reconstruct / "thinking")
        yield stages.evaluate(config, tests, k, evaluate, instruct, thinking)


def read_recipes(config: LoopConfig) -> dict[str, Recipe]:
    """The native recipes by the name of their stage, with what each tool needs of them present.

    Raises:
        LoopError: if a file is missing, is no mapping, or names a data file that is missing.
    """
    files: dict[str, Path | None] = dict(config.recipes)
    on_policy = files.pop("on_policy")
    if config.distill == "on-policy":
        if not on_policy:
            raise LoopError("--distill on-policy: loop.yml names no such recipe; add on_policy: under recipes:")
        files["distill"] = on_policy
    recipes = {name: read_yaml(file) for name, file in files.items() if file}
    for name, key in (("distill", "datasets"), ("reconstruct", "base_model")):
        if not recipes[name].get(key):
            raise LoopError(f"{files[name]}: has no {key}; the {name} stage needs it")
    return recipes


def check(config: LoopConfig, run: RunDir) -> LoopConfig:
    """Everything that can be known before a tool is loaded; the config with its checkpoints made local.

    Raises:
        LoopError: with the first thing that will not work.
    """
    pair = {}
    for role in ("instruct", "thinking"):
        folder = checks.local_checkpoint(getattr(config, role), role)
        checks.check_checkpoint(folder, role)
        pair[role] = folder
    for role, folder in pair.items():
        if checks.is_tah(folder):
            if config.iterations or config.nf4:
                what = "distilled or merged; evaluate it by --iters 0" if config.iterations else "put in NF4"
                raise LoopError(f"--{role} {folder}: a TaH checkpoint cannot be {what}")
            checks.check_tah(folder, role)
    checks.check_pair(pair["instruct"], pair["thinking"])
    if config.prompts_file:
        checks.check_prompts(config.prompts_file)
    if config.include_path and not config.include_path.is_dir():
        raise LoopError(f"--include-path {config.include_path}: no such folder")
    if not (run.root / "run.json").exists():
        checks.check_disk(run.root, pair["thinking"], config.iterations)
    return config.model_copy(update={role: str(folder) for role, folder in pair.items()})


def asked(config: LoopConfig, recipes: dict[str, Recipe]) -> dict[str, Any]:
    """What the run is asked to do, as `run.json` keeps it: settings, recipes, and the inputs' fingerprints."""
    inputs = {role: digest(Path(getattr(config, role))) for role in ("instruct", "thinking")}
    if config.prompts_file:
        inputs["prompts"] = digest(config.prompts_file)
    settings = config.model_dump(mode="json", exclude={"name", "recipes", "usd_per_hour", "jobs"})
    return {**settings, "recipes": recipes, "inputs": inputs}


def versions() -> dict[str, str]:
    """The versions of Python and the stack; a package that is not installed is left out."""
    found = {"python": sys.version.split()[0]}
    for name in STACK:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def perform(stage: Stage, run: RunDir, tools: Tools, view: report.View, threads: int | None) -> None:
    """Run one stage to its end in its folder, and mark it done; `threads` as in `Tools.run`.

    Raises:
        LoopError: if a command fails or leaves what the loop cannot go on with; the folder stays for a look.
    """
    begun = time.monotonic()
    log = stage.folder / "log.txt"
    with run.working(stage.folder) as facts:
        for name, recipe in stage.recipes.items():
            (stage.folder / name).write_text(stages.dump(recipe), encoding="utf-8")
        used = []
        for number, command in enumerate(stage.commands):
            view.command(stage, number, command)
            with log.open("a", encoding="utf-8") as file:
                file.write(f"$ {' '.join(command)}\n")
            used.append(tools.run(command, log, partial(view.progress, stage), threads))
        if stage.name == "evaluate":
            used += count_passes(stage, tools, view, log, threads)
        for source, target in stage.renames:
            (stage.folder / source).rename(stage.folder / target)
        for name in stage.scratch:
            shutil.rmtree(stage.folder / name, ignore_errors=True)
        facts.update(
            iteration=stage.iteration,
            stage=stage.name,
            commands=stage.commands,
            inputs={name: run.fingerprint(Path(path)) for name, path in stage.inputs.items()},
            wall_s=time.monotonic() - begun,
            body_s=sum(usage.wall_s for usage in used),
            cpu_s=sum(usage.cpu_s for usage in used),
            peak_memory_mb=max(usage.peak_mb for usage in used),
            exit=0,
        )
        if stage.name == "generate":
            facts["labels"] = check_labels(stage)
        if stage.name == "distill":
            said = log.read_text(encoding="utf-8", errors="replace").splitlines()
            facts["prepared"] = [line.partition(mark)[2] for line in said for mark in PREPARED if mark in line]
        if stage.name == "evaluate":
            passes = {who: read_json(stage.folder / f"{who}_passes.json") or {} for who in ("instruct", "thinking")}
            facts["rows"] = [
                {**row, **passes[who].get(row["task"], {})}
                for who in passes
                for row in scores.read(stage.folder / who, stage.iteration, who, stage.inputs[who])
            ]


def count_passes(stage: Stage, tools: Tools, view: report.View, log: Path, threads: int | None) -> Iterator[Usage]:
    """Count the passes of the answers that an evaluation's TaH checkpoints gave, if it has any."""
    for who in ("instruct", "thinking"):
        if checks.is_tah(Path(stage.inputs[who])):
            view.counting(stage)
            files = str(stage.folder / who), str(stage.folder / f"{who}_passes.json")
            recipe = stage.recipes[f"{who}.yml"]
            yield tools.call(scores.count_passes, recipe, *files, log=log, preloaded=True, threads=threads)


def check_labels(stage: Stage) -> dict[str, int]:
    """How many of the labels have an answer to learn from.

    Raises:
        LoopError: if the thinking checkpoint closed no trace at all.
    """
    closed, total = scores.closed_share(stage.folder / "samples", stage.recipes["recipe.yml"]["tasks"])
    if not closed:
        raise LoopError(
            f"the thinking checkpoint {stage.inputs['thinking']} closed 0 of {total} traces (0 %): there is nothing to "
            f"distill\nraise max_gen_toks in the generate recipe, lower --t, or see {stage.folder / 'samples'}"
        )
    return {"closed": closed, "total": total}


def side_by_side(wave: list[Stage], run: RunDir, tools: Tools, view: report.View) -> Iterator[Stage]:
    """Run stages that need nothing of one another at once; yields each as it ends.

    Raises:
        LoopError: of the first that failed, once the others have ended. Anything else, Ctrl-C above all, ends them.
    """
    threads = None if len(wave) == 1 else max(1, (os.cpu_count() or 1) // len(wave))
    failed = None
    with ThreadPoolExecutor(len(wave)) as pool:
        try:
            begun = {pool.submit(perform, stage, run, tools, view, threads): stage for stage in wave}
            for ended in as_completed(begun):
                try:
                    ended.result()
                except LoopError as error:
                    failed = failed or error
                else:
                    yield begun[ended]
        except BaseException:
            tools.stop()
            raise
    if failed:
        raise failed


def run(config: LoopConfig, recipes: dict[str, Recipe], folder: RunDir, view: report.View) -> list[scores.Row]:
    """Run, or continue, the whole loop; returns the rows of `results.json`.

    Raises:
        LoopError: with what went wrong; what was finished stays finished.
    """
    begun = time.monotonic()
    config = check(config, folder)
    continued = folder.open(asked(config, recipes))
    todo = list(plan(config, recipes, folder))
    pending = [stage for stage in todo if not folder.finished(stage.folder)]
    view.begin(folder.root, config.iterations, len(todo), len(todo) - len(pending), continued)
    if pending:
        folder.note(versions=versions(), command=sys.argv)
        with Tools(folder.logs / "preload.log") as tools:
            view.preloading()
            log = folder.logs / "tasks.log"
            log.unlink(missing_ok=True)
            include = str(config.include_path) if config.include_path else None
            names = config.tasks + ([] if config.prompts_file else config.prompts)
            try:
                tools.call(checks.check_tasks, names, include, log=log)
            except ToolError:
                raise LoopError(" ".join(last_words(log))) from None
            tools.wait()
            for wave in stages.waves(pending, config.jobs):
                for stage in side_by_side(wave, folder, tools, view):
                    view.finished(stage, folder.finished(stage.folder) or {})
                    publish(config, folder, todo)
            folder.note(preload_s=tools.preload_s, busy_s=tools.busy_s)
    folder.note(wall_s=(read_wall(folder) + time.monotonic() - begun))
    rows = publish(config, folder, todo)
    view.end(rows, [folder.finished(stage.folder) or {} for stage in todo], folder)
    return rows


def read_wall(folder: RunDir) -> float:
    """Wall seconds of earlier sittings of this run."""
    return float(folder.noted().get("wall_s", 0.0))


def publish(config: LoopConfig, folder: RunDir, todo: list[Stage]) -> list[scores.Row]:
    """Write `results.json` and `report.html` from the stages that are done."""
    done = [facts for stage in todo if (facts := folder.finished(stage.folder))]
    rows: list[scores.Row] = [row for facts in done for row in facts.get("rows", [])]
    wall = read_wall(folder) or sum(facts["wall_s"] for facts in done)
    cost = None if config.usd_per_hour is None else round(wall / 3600 * config.usd_per_hour, 4)
    results = {"rows": rows, "wall_s": round(wall, 3), "cost_usd": cost}
    write_json(folder.results, results)
    folder.report.write_text(report.page(folder.root.name, rows, done, results, folder.noted()), encoding="utf-8")
    return rows
