"""A sweep: many runs as one plan, what they share done once, each of them a run like any other.

    name: rates                     runs are called rates-…
    config: loop.yml                beside this file; the shipped one where it is left out
    grid:                           every combination
      seed: [0, 1, 2]
      distill.learning_rate: [1e-3, 2e-3]
    runs:                           or, or beside that, one by one
      - {t: 0.3, anchor: previous}

Keys are what `--set` takes. Runs share a store, so a stage that several have is one stage of the plan. One that fails
takes down what reads it and nothing else. Knows which runs there are; what a run is, `loop` knows.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from harness import loop, schedule
from harness.config import LoopConfig, load, read_recipes, read_yaml, recipes_folder
from harness.errors import LoopError, StageError
from harness.files import disk_errors, write_json
from harness.runner import Runner, devices, start
from harness.stages import Stage
from harness.view import View

MOST = 10_000  # runs: more are a mistake in the grid
SAID = re.compile(r"[^A-Za-z0-9._]+")


class SweepConfig(BaseModel):
    """sweep.yml."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(default="sweep", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    config: Path | None = None
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    runs: list[dict[str, Any]] = Field(default_factory=list)


class Planned(NamedTuple):
    """One run of a sweep.

    Attributes:
        name: of the run.
        settings: what it has of its own, by the keys of `--set`.
        run: as it was prepared.
    """

    name: str
    settings: dict[str, Any]
    run: loop.Run


class Came(NamedTuple):
    """What one run came to.

    Attributes:
        name: of it.
        settings: its own.
        rows: of its results.json, as far as it is.
        failed: why it is not whole; empty where it is.
    """

    name: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    failed: str


def read(path: Path) -> SweepConfig:
    """A sweep.yml, its `config` an absolute path.

    Raises:
        LoopError: with the key that is wrong.
    """
    try:
        sweep = SweepConfig.model_validate(read_yaml(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise LoopError(
            f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']} (got {first['input']!r})"
        ) from None
    if sweep.config:
        sweep.config = path.resolve().parent / sweep.config
    for key, values in sweep.grid.items():
        if not values:
            raise LoopError(f"{path}: grid: {key}: has no values; write a list of them, [0, 1, 2]")
    return sweep


def combinations(sweep: SweepConfig) -> list[dict[str, Any]]:
    """The settings of each run, in order: the grid's, the last key turning fastest, then those named one by one.

    Raises:
        LoopError: if there are none, too many, or two are alike.
    """
    count = 1
    for values in sweep.grid.values():
        count *= len(values)
    if count > MOST:
        raise LoopError(f"sweep {sweep.name}: its grid has {count} runs, more than {MOST}; leave some values out")
    found = [dict(zip(sweep.grid, values, strict=True)) for values in itertools.product(*sweep.grid.values())]
    every = [*(found if sweep.grid else []), *sweep.runs]
    if not every:
        raise LoopError(f"sweep {sweep.name}: has no runs; write grid: {{seed: [0, 1]}}, or runs:")
    seen: dict[str, dict[str, Any]] = {}
    for settings in every:
        if seen.setdefault(json.dumps(settings, sort_keys=True, default=str), settings) is not settings:
            raise LoopError(f"sweep {sweep.name}: has {settings} twice; take one out")
    return every


def names(sweep: SweepConfig, every: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each run is called: by its settings, and by its number too where those are not enough."""
    found = []
    for settings in every:
        parts = [f"{key.rpartition('.')[2]}{SAID.sub('_', str(value)).strip('_')}" for key, value in settings.items()]
        found.append("-".join([sweep.name, *parts])[:100])
    return [name if found.count(name) == 1 else f"{name}-{number}" for number, name in enumerate(found, start=1)]


def prepare(path: Path, out: Path, view: View, changes: Sequence[str] = ()) -> tuple[SweepConfig, list[Planned]]:
    """Every run of a sweep, planned; nothing has been run.

    Args:
        path: of sweep.yml.
        out: where runs go.
        view: is told what is read.
        changes: what `--set` says, of all runs; a run's own settings come after.

    Raises:
        LoopError: of the first that will not work, with its name.
    """
    sweep = read(path)
    every = combinations(sweep)
    planned = []
    for name, settings in zip(names(sweep, every), every, strict=True):
        said = [
            *changes,
            *(f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in settings.items()),
        ]
        said = [text.removesuffix("...\n").strip() for text in said]
        try:
            config = load(sweep.config or recipes_folder() / "loop.yml", {"name": name}, said)
            run = loop.prepare(config, read_recipes(config, said), out, view)
        except LoopError as error:
            raise LoopError(f"{name}: {error}") from None
        planned.append(Planned(name, dict(settings), run))
    return sweep, planned


def together(planned: Sequence[Planned]) -> dict[str, tuple[loop.Run, Stage]]:
    """What is still to do of all runs, by key: each stage once, with the first run that has it."""
    todo: dict[str, tuple[loop.Run, Stage]] = {}
    for one in planned:
        for key, stage in loop.pending(one.run).items():
            todo.setdefault(key, (one.run, stage))
    return todo


def go(
    sweep: SweepConfig, planned: Sequence[Planned], out: Path, view: View, runner: Runner | None = None
) -> list[Came]:
    """Do what is left of a sweep; returns what each run came to. Failures are told and cost the other runs nothing."""
    with ExitStack() as stack:
        for one in planned:
            stack.enter_context(one.run.folder.alive())
            loop.register(one.run)
        todo = together(planned)
        stages = {key: stage for key, (_, stage) in todo.items()}
        loop.check_machine(planned[0].run, stages)
        view.begin_many([one.run for one in planned], stages)
        failed = _done(todo, stages, view, out / sweep.name / "logs" / "preload.log", planned[0].run.config, runner)
        view.close()
        found = [_came(one, failed, view) for one in planned]
        with disk_errors(out / sweep.name):
            (out / sweep.name).mkdir(parents=True, exist_ok=True)
            write_json(out / sweep.name / "sweep.json", {"runs": [one._asdict() for one in found]})
    return found


def _done(
    todo: Mapping[str, tuple[loop.Run, Stage]],
    stages: Mapping[str, Stage],
    view: View,
    log: Path,
    config: LoopConfig,
    runner: Runner | None,
) -> dict[str, str]:
    """Do every stage that can be done; returns why the others were not, by key."""
    failed: dict[str, str] = {}
    if not todo:
        return failed
    needs = {key: [run.keys[s] for s in stage.needs() if run.keys[s] in todo] for key, (run, stage) in todo.items()}
    with ExitStack() as stack:
        if runner is None:
            runner = start(log)
            stack.callback(runner.close)
        view.preloading(runner.preloaded)
        runner.wait()
        loop.check_recipes(todo.values(), log.with_name("recipes.txt"), runner)
        at_work = runner

        def work(key: str, environment: dict[str, str]) -> bool:
            if lost := [needed for needed in needs[key] if needed in failed]:
                failed[key] = failed[lost[0]]
                return True
            try:
                return loop.perform(todo[key][0], at_work, view, key, environment)
            except LoopError as error:
                if at_work.stopped:
                    raise
                failed[key] = str(error)
                view.failed(key, str(error))
                return True

        try:
            for key in schedule.run(stages, needs, schedule.slots(devices(), config.jobs), work):
                run, _ = todo[key]
                if key not in failed and (record := run.store.record(key)):
                    view.made(key, record)
        except BaseException:
            at_work.stop()
            raise
    return failed


def _came(one: Planned, failed: Mapping[str, str], view: View) -> Came:
    """A run's results, written as far as it is."""
    keys = [one.run.keys[step.stage] for step in one.run.wanted]
    why = next((failed[key] for key in keys if key in failed), "")
    published = loop.Published(one.run, View(view.console, quiet=True), [key for key in keys if key in failed])
    published.look()
    results = published.write(at_end=not why)
    return Came(one.name, one.settings, results["rows"], why)


def table_rows(found: Sequence[Came]) -> Iterator[tuple[str, ...]]:
    """Name, then task, checkpoint, questions, first and last accuracy, tokens: a row a run, task and checkpoint."""
    for one in found:
        if one.failed:
            yield (one.name, "failed", one.failed.splitlines()[0], "", "", "", "")
        last = {(row["task"], row["checkpoint"]): row for row in sorted(one.rows, key=lambda row: row["iteration"])}
        first = {(row["task"], row["checkpoint"]): row for row in one.rows if row["iteration"] == 0}
        for (task, checkpoint), row in sorted(last.items()):
            before = first.get((task, checkpoint), row)
            tokens = row["tokens_per_answer"]
            yield (
                one.name,
                task,
                checkpoint,
                str(row["n"]),
                f"{before['accuracy']:.1%}",
                f"{row['accuracy']:.1%}",
                "" if tokens is None else f"{tokens:,.1f}",
            )


def check(found: Sequence[Came]) -> None:
    """Raise if a run failed, once all is written.

    Raises:
        StageError: naming how many, and the first.
    """
    if lost := [one for one in found if one.failed]:
        raise StageError(
            f"{len(lost)} of {len(found)} runs failed, the first: {lost[0].name}: {lost[0].failed}\n"
            "what is finished is kept, run the same command again to try the rest"
        )
