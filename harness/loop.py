"""The run: looks at what there is, plans, and sees every stage of the plan done. Knows nothing of how any works."""

from __future__ import annotations

import glob
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from harness import checks, evidence, interpreters, natives, outcomes, report, schedule, tasks, trackers
from harness.asking import SERVED, TOOLS
from harness.config import ARMS, LoopConfig, Recipes, shown
from harness.errors import LoopError, StageError
from harness.files import below, digest, disk_errors, no_room, read_json_if_whole, refusal, write_json, write_text
from harness.interpreters import Interpreter
from harness.plan import Inputs, Step, commands, plan
from harness.rundir import RunDir, why
from harness.runner import Runner, ToolError, Usage, devices, has_bf16, is_full, start
from harness.stages import RECIPE, External, Keys, Output, Recipe, Stage, choose, dump, evaluate, placed, reconstruct
from harness.store import BEGUN, Known, Store, is_checkpoint, loaded, stamp
from harness.view import View


@dataclass(frozen=True)
class Wishes:
    """How a run is to be gone about, beside what it is.

    Attributes:
        again_from: a step (`distill`, `iter_02/distill`) that is done again, with all that reads what it leaves.
        verify: compare the hash of everything that counts as done.
    """

    again_from: str | None = None
    verify: bool = False


@dataclass
class Run:
    """A run as it was planned.

    Attributes:
        config: what was asked.
        folder: of the run.
        store: of all runs beside it.
        steps: in order, of all its iterations: those asked for now and those it has from before.
        wanted: the steps that are to be done now.
        keys: of the steps' stages.
        pair: the folders of the two checkpoints as they came.
        watched: External path → its stamp when it was identified.
        again: keys of stages that are to be done again, whatever the store has of them.
        causes: why stages are other ones than when the run was last asked for.
    """

    config: LoopConfig
    folder: RunDir
    store: Store
    steps: list[Step]
    wanted: list[Step]
    keys: Keys
    pair: dict[str, Path]
    watched: dict[str, str] = field(default_factory=dict)
    again: set[str] = field(default_factory=set)
    causes: list[str] = field(default_factory=list)

    def record(self, step: Step) -> dict[str, Any] | None:
        """What the store has of a step, None if it is not done."""
        return self.store.record(self.keys[step.stage])

    def paths(self, stage: Stage) -> dict[str, str]:
        """Where a stage and what it reads lie, by the names of the stand-ins."""
        found = {"stage": str(self.store.folder(self.keys[stage]))}
        for name, source in stage.inputs.items():
            if isinstance(source, Output):
                found[name] = str(self.store.folder(self.keys[source.stage]) / source.path)
            else:
                found[name] = source.path
        return found


@cache
def versions(tools: tuple[str, ...]) -> dict[str, str]:
    """The versions of tools, and digests of our own code among them; one that is not installed is left out."""
    import thinkswitch_plugin
    from harness import angles, asking, choosing, grading

    found = {}
    for name in tools:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    plugins = [path for path in below(Path(str(thinkswitch_plugin.__file__)).parent) if path.suffix == ".py"]
    ours = {"grading": (asking, grading), "choosing": (choosing,), "angles": (angles,)}
    digests = {name: code_of([Path(str(module.__file__)) for module in modules]) for name, modules in ours.items()}
    return {**found, "thinkswitch_plugin": code_of(plugins), **digests}


def code_of(files: Sequence[Path]) -> str:
    """A short digest of code of ours: a version that a checkout has, too."""
    return sha256("".join(map(digest, files)).encode()).hexdigest()[:12]


def prepare(config: LoopConfig, recipes: Mapping[str, Recipe], out: Path, view: View, wishes: Wishes = Wishes()) -> Run:
    """Look at everything a run reads, and plan it: all keys are known, and nothing has been run.

    Raises:
        LoopError: with the first thing that will not work.
    """
    store, folder = Store(out / "stages"), RunDir(out / config.name)
    noted = folder.noted()
    trackers.check(config.report_to)
    pair, on_hub = check_pair(config)
    if config.iterations:
        checks.check_processes(recipes["distill"], config.launcher)
    prompts = checks.checked_prompts(config.own_prompts) if config.own_prompts else None
    if config.include_path and not os.path.isdir(config.include_path):
        raise LoopError(f"--include-path {shown(config.include_path)}: no such folder")
    known = Known(store.root / ".known.json", view.hashing)
    if wishes.verify:
        known.forget()
    watched = {str(path): stamp(path) for path in pair.values()}
    try:
        externals = {role: identified(path, on_hub[role], known) for role, path in pair.items()}
    finally:
        known.save()  # however this ends: 8 GB are not read twice
    validated = config.validate_by if config.t == "auto" else []
    asked = [*config.prompt_tasks, *config.tasks, *validated]
    found = tasks.find(asked, config.include_path, store.root / ".tasks.json")
    prompt_tasks, test_tasks, validate_tasks = (
        list(dict.fromkeys(task for name in names for task in found[name]))
        for names in (config.prompt_tasks, config.tasks, validated)
    )
    checks.check_tasks(prompt_tasks, test_tasks, validate_tasks)

    def identify(key: str, text: str) -> str | None:
        path = Path(text)
        if not path.is_absolute():
            return None
        if key == "data_files" and any(sign in text for sign in "*?["):
            return " ".join(known.path(Path(found)) for found in sorted(glob.glob(text, recursive=True)))
        # A folder is read where it is a model or a data set names it; else it is a place to write to.
        if not (os.path.isfile(path) or (os.path.isdir(path) and (key == "path" or is_checkpoint(path)))):
            return None
        watched[text] = stamp(path)
        return known.path(path)

    tah = frozenset(role for role, path in pair.items() if checks.is_tah(path))
    inputs = Inputs(
        recipes,
        externals["instruct"],
        externals["thinking"],
        tah,
        prompt_tasks,
        test_tasks,
        prompts,
        identify,
        interpreters_of(config, recipes),
        External(str(config.gold), known.path(config.gold)) if config.gold and "gold" in config.arms else None,
        validate_tasks,
    )
    total = max(config.iterations, *(step["iteration"] for step in noted.get("steps", [])), 0)
    steps = plan(with_earlier(config, noted.get("steps", []), recipes, inputs.gold), inputs, total)
    known.save()
    keys = Keys(versions(tuple(dict.fromkeys(tool for step in steps for tool in step.stage.kind.tools))))
    asked_for = {(arm, seed) for arm in config.every_arm for seed in config.every_seed}
    wanted = [step for step in steps if step.iteration <= config.iterations and (step.arm, step.seed) in asked_for]
    kept = [step for step in steps if step in wanted or store.record(keys[step.stage])]
    run = Run(config, folder, store, kept, wanted, keys, pair, watched)
    run.causes = why(noted.get("steps", []), described(run))
    if wishes.verify:
        run.again |= verify(run, view)
    if wishes.again_from:
        run.again |= from_step(run, wishes.again_from)
    return run


def with_earlier(
    config: LoopConfig, steps: Iterable[Mapping[str, Any]], recipes: Mapping[str, Recipe], gold: External | None
) -> LoopConfig:
    """A run with the arms and seeds that it had before, too: what is done of them stays its own."""
    can = {"on_policy": "on_policy" in recipes, "gold": gold is not None}
    came = [step for step in steps if step.get("arm") in ARMS and can.get(step["arm"], True)]
    arms = dict.fromkeys([*config.every_arm, *(step["arm"] for step in came)])
    seeds = dict.fromkeys([*config.every_seed, *(step["seed"] for step in came)])
    return config.model_copy(update={"arms": list(arms), "seeds": list(seeds)})


def interpreters_of(config: LoopConfig, recipes: Mapping[str, Recipe]) -> dict[str, Interpreter]:
    """Whose lm-eval runs which recipe, where it is not this environment's.

    Raises:
        LoopError: if an environment cannot ask what its recipe says.
    """
    here = versions(TOOLS)
    own = {name: here[name] for name in ("thinkswitch_plugin", "grading")}
    named = {str(name): path for name, path in config.python.items()}
    if "evaluate" in named and "evaluate_thinking" in recipes:
        named.setdefault("evaluate_thinking", named["evaluate"])
    found: dict[str, Interpreter] = {}
    for name in ("generate", "evaluate", "evaluate_thinking"):
        if name in named and name in recipes:
            found[name] = interpreters.look(named[name], f"loop.yml: python: {name}", TOOLS, own)
        model = recipes.get(name, {}).get("model")
        if model in SERVED:
            interpreters.check_model(model, name, found[name].versions if name in found else here)
    return found


def check_pair(config: LoopConfig) -> tuple[dict[str, Path], dict[str, str]]:
    """The folders of the two checkpoints, and what the hub calls them.

    Raises:
        LoopError: if they do not fit each other or the run.
    """
    pair, names = {}, {}
    asked = {"instruct": config.instruct, "thinking": config.thinking}
    if not all(map(os.path.isdir, asked.values())):  # before 16 GB are fetched
        checks.check_described(*(checks.described_checkpoint(name, role) for role, name in asked.items()))
    for role in ("instruct", "thinking"):
        pair[role], names[role] = checks.local_checkpoint(asked[role], role)
        checks.check_checkpoint(pair[role], role)
    for role, folder in pair.items():
        if checks.is_tah(folder):
            if config.iterations or config.nf4:
                what = "distilled or merged; evaluate it by --iters 0" if config.iterations else "put in NF4"
                raise LoopError(f"--{role} {folder}: a TaH checkpoint cannot be {what}")
            checks.check_tah(folder, role)
    checks.check_pair(pair["instruct"], pair["thinking"])
    return pair, names


def identified(folder: Path, on_hub: str, known: Known) -> External:
    """A checkpoint and what it is: the hub's commit and its blobs' own hashes, or a digest of what a loader reads."""
    blobs = {path.name: Path(path).resolve().name for path in loaded(folder) if path.is_symlink()}
    if on_hub and len(blobs) == len(loaded(folder)):
        return External(str(folder), f"{on_hub}+{sha256(str(sorted(blobs.items())).encode()).hexdigest()}")
    return External(str(folder), known.checkpoint(folder))


def described(run: Run) -> list[dict[str, Any]]:
    """The steps as `run.json` keeps them."""
    return [
        {
            "iteration": step.iteration,
            "name": step.name,
            "checkpoint": step.checkpoint,
            "arm": step.arm,
            "seed": step.seed,
            "place": step.place,
            "key": run.keys[step.stage],
            "paths": {name: source.path for name, source in step.stage.inputs.items() if isinstance(source, External)},
            "reads": run.keys.material(step.stage),
        }
        for step in run.steps
    ]


def verify(run: Run, view: View) -> set[str]:
    """Compare the hash of everything that counts as done; returns the keys of what is not what it was."""
    found = set()
    for key in dict.fromkeys(run.keys[step.stage] for step in run.wanted):
        view.verifying(key)
        if damaged := run.store.damaged(key):
            view.say(f"{key}: {', '.join(damaged)} changed since it was made; it is done again")
            found.add(key)
    return found


def from_step(run: Run, name: str) -> set[str]:
    """The keys of a step, and of all that reads what it leaves.

    Raises:
        LoopError: if the run has no such step.
    """
    found = [s for s in run.wanted if name in (s.name, s.stage.kind.name, s.place)]
    if not found:
        every = ", ".join(dict.fromkeys(step.name for step in run.wanted))
        raise LoopError(
            f"--from {name}: this run has no such stage; it has {every}, or iter_01/distill for one of them"
        )
    stale = {run.keys[step.stage] for step in found}
    for step in run.steps:
        if stale & {run.keys[stage] for stage in step.stage.needs()}:
            stale.add(run.keys[step.stage])
    return stale


def pending(run: Run) -> dict[str, Stage]:
    """The stages still to do, by key: not done, or done without a checkpoint that `gc` took and one of these needs."""
    todo: dict[str, Stage] = {}
    for step in reversed(run.wanted):
        key = run.keys[step.stage]
        needed = any(key == run.keys[stage] for other in todo.values() for stage in other.needs())
        if key in run.again or run.store.record(key) is None or (needed and run.store.lacks(key)):
            todo[key] = step.stage
    return dict(reversed(todo.items()))


def perform(run: Run, runner: Runner, view: View, key: str, environment: dict[str, str]) -> bool:
    """Do one stage to its end in its folder and mark it done; False if another process is at it.

    Raises:
        LoopError: if a command fails or leaves what the loop cannot go on with; the folder stays for a look.
    """
    stage = next(step.stage for step in run.wanted if run.keys[step.stage] == key)
    try:
        with run.store.writing(key) as folder:
            if folder is None:
                view.elsewhere(key)
                return False
            if not run.store.record(key) or run.store.lacks(key):  # else another run has done it meanwhile
                anew = key in run.again
                for tries in range(run.config.retries, -1, -1):
                    try:
                        make(run, runner, view, stage, folder, environment, anew)
                        break
                    except ToolError as error:
                        if not tries or runner.stopped:
                            raise
                        view.say(f"{error}\ntried again; {tries - 1} more times at most")
                        anew = False  # from where this try was
        return True
    except StageError:
        raise
    except LoopError as error:
        raise StageError(str(error)) from None  # something has been run
    except OSError as error:
        raise StageError(str(refusal(error, run.store.folder(key)))) from None
    except Exception as error:
        raise StageError(f"{key}: {type(error).__name__}: {error}") from error


def make(
    run: Run, runner: Runner, view: View, stage: Stage, folder: Path, environment: dict[str, str], anew: bool
) -> None:
    """Do one stage in its folder, which is this process's alone, and mark it done.

    It goes on from what an earlier try left, unless it is to be done `anew`, or that try read other files than there
    are now: a stage that was made again has the same key and may have come out another way.

    Raises:
        StageError: if a command fails, leaves no weights where it was to, or what the run reads was written to.
    """
    key = run.keys[stage]
    unchanged(run)
    begun, limit = time.monotonic(), run.config.limits.get(stage.kind.limited_as or stage.kind.name)  # type: ignore[call-overload]
    sound(run, stage)
    reads = {name: run.store.mark(run.keys[s.stage]) for name, s in stage.inputs.items() if isinstance(s, Output)}
    alike = not anew and read_json_if_whole(folder / BEGUN) == reads
    done = stage.kind.resumes(folder) if alike else []
    run.store.clear(key, done)
    if done:
        view.resumed(key, stage)
    with disk_errors(folder):
        write_json(folder / BEGUN, reads, durable=True)
        paths = write_recipes(run, stage)
        log = folder / "log.txt"
        used: list[Usage] = []
        for number, command in enumerate(commands(stage, paths)):
            view.command(key, stage, number, command)
            with log.open("a", encoding="utf-8") as file:
                file.write(f"$ {' '.join(command)}\n")
            told = partial(view.progress, key, stage)
            within = None if limit is None else max(1.0, 3600 * limit - (time.monotonic() - begun))
            used.append(runner.run(command, environment, log, run.store.hold(key), told, within))
        for source, target in stage.renames:
            (folder / source).rename(folder / target)
        scratch = {left for pattern in stage.scratch for left in folder.glob(pattern)}
        # What a next try would go on from stays until this one is marked done.
        last = [folder / BEGUN, *(left for left in stage.kind.resumes(folder) if left in scratch)]
        remove(scratch.difference(last))
        try:
            whole(run, stage, paths)
            facts = stage.kind.read(folder, stage, run.pair["instruct"])
        except StageError:
            if is_full(log):
                raise StageError(no_room(folder)) from None
            raise
    unchanged(run)
    run.store.finish(
        key,
        {
            "kind": stage.kind.name,
            "checkpoint": stage.kind.checkpoint,
            "made_by": run.config.name,
            "reads": run.keys.material(stage),
            "commands": commands(stage, paths),
            "wall_s": time.monotonic() - begun,
            "body_s": sum(usage.wall_s for usage in used),
            "cpu_s": sum(usage.cpu_s for usage in used),
            "peak_memory_mb": max(usage.peak_mb for usage in used),
            "peak_gpu_memory_mb": max(usage.gpu_peak_mb for usage in used),
            "environment": environment,
            "facts": facts,
        },
        but=last,
    )
    remove(last)


def whole(run: Run, stage: Stage, paths: Mapping[str, str]) -> None:
    """See that a stage's commands left its checkpoint whole: some go on from a write that failed, and exit with 0.

    Raises:
        StageError: naming what is missing or half written.
    """
    folder, inside = Path(paths["stage"]), stage.kind.checkpoint
    like = paths.get("anchor") or paths.get("instruct")
    if inside and (lost := checks.lost(folder / inside, Path(like) if like else None)):
        raise StageError(
            f"{run.keys[stage]}: its commands ended well and left {', '.join(lost)} of {folder / inside} missing or "
            f"half written\nsee {folder / 'log.txt'}, and run the same command again"
        )


def remove(paths: Iterable[Path]) -> None:
    """Take files and folders away."""
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def sound(run: Run, stage: Stage) -> None:
    """See that what a stage reads of others is what they left, by its hash: nothing is built on what was written to.

    Raises:
        StageError: naming what is another.
    """
    for source in stage.inputs.values():
        if isinstance(source, Output):
            undamaged(run.store, run.keys[source.stage], source.path)


def undamaged(store: Store, key: str, inside: str = "") -> None:
    """Raise `StageError` if a stage's files, or those `inside` it, are not what they were when it was done."""
    if damaged := store.damaged(key, inside):
        raise StageError(
            f"{key}: {', '.join(damaged)} changed since it was made\nrun its command with --verify: it is made again"
        )


def unchanged(run: Run) -> None:
    """See that nobody wrote to what the run reads since it was looked at.

    Raises:
        StageError: naming what was written to.
    """
    for path, seen in run.watched.items():
        if not os.path.exists(path) or stamp(Path(path)) != seen:
            raise StageError(f"{path} was written to while this run used it; run the same command again")


def write_recipes(run: Run, stage: Stage) -> dict[str, str]:
    """Write a stage's recipes and files into its folder; returns where everything lies."""
    paths = run.paths(stage)
    folder = Path(paths["stage"])
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, recipe in stage.recipes.items():
            more = stage.reports if name == RECIPE else {}
            (folder / name).write_text(dump(placed({**recipe, **more}, paths)), encoding="utf-8")
        for name, text in stage.files.items():
            (folder / name).write_text(text, encoding="utf-8")
    return paths


def go(run: Run, view: View, runner: Runner | None = None, told: bool = True) -> dict[str, Any]:
    """Do what is left of a run; returns what `results.json` holds.

    Args:
        run: as it was prepared.
        view: is told what happens.
        runner: one that was started already; else one is, if there is anything to do.
        told: say at the end how it went, and write the run's page.

    Raises:
        LoopError: with what went wrong; what was finished stays finished.
    """
    with run.folder.alive():
        published = _carried_out(run, view, runner)
        try:
            with disk_errors(run.folder.root):
                results = published.write()
        except LoopError as error:
            raise StageError(str(error)) from None  # something has been run
        if told:
            view.end(run, results, published.arms)
            reported(run, view)
        return results


def check_machine(run: Run, todo: Mapping[str, Stage]) -> None:
    """See that what is still to do can be done here: by the device there is, and with the room for its checkpoints.

    Raises:
        LoopError: with what is missing.
    """
    asked = {stage.kind.name: stage.recipes.get(RECIPE, {}) for stage in todo.values()}
    checks.check_accelerator(asked, bool(devices()), has_bf16())
    # What is chosen of several t is there already.
    written = sum(bool(stage.kind.checkpoint) and stage.kind is not choose.KIND for stage in todo.values())
    checks.check_disk(run.store.root, run.pair["thinking"], written)


def check_recipes(work: Iterable[tuple[Run, Stage]], log: Path | None = None, runner: Runner | None = None) -> None:
    """See that the tools take the recipes of what is still to do, all of one store.

    Args:
        work: stages, each with a run that has it.
        log: a file for what the tools say, by a runner.
        runner: which may have the tools at hand; None for a process that imports them.

    Raises:
        LoopError: naming the first that a tool would not start with.
    """
    ask = partial(runner.run, environment={}, log=log) if runner and log else None
    stages: dict[int, tuple[Run, list[Stage]]] = {}  # by the run's id: what is asked of a pair is asked once
    for run, stage in work:
        stages.setdefault(id(run), (run, []))[1].append(stage)
    asked: list[natives.Asked | natives.Came] = []
    here = devices()
    for run, mine in stages.values():
        depends = {"tools": run.keys.versions, "pair": checks.sizes(run.pair["instruct"]), "devices": here}
        asked += [natives.Asked(stage, run.pair, depends) for stage in mine]
        asked += [
            natives.Came(role, folder, [run.watched.get(str(folder)), run.keys.versions])
            for role, folder in run.pair.items()
            if not checks.is_tah(folder)  # whose code was looked at
        ]
        cache = run.store.root / ".recipes.json"
    if asked:
        natives.check(asked, cache, ask)


def register(run: Run) -> None:
    """Note what a run is, so that nobody takes its stages for nobody's; what is to be done again counts as undone."""
    for key in run.again:
        run.store.forget(key)
    run.folder.note(asked=run.config.model_dump(mode="json"), steps=described(run), versions=run.keys.versions)
    run.folder.unlink_others({step.place for step in run.steps})


def _carried_out(run: Run, view: View, runner: Runner | None) -> Published:
    todo = pending(run)
    if todo:
        check_machine(run, todo)
    register(run)
    published = Published(run, view, todo)
    view.begin(run, todo)
    published.look()
    if todo:
        run.folder.begin()
        with ExitStack() as stack:
            if runner is None:
                runner = start(run.folder.logs / "preload.log")
                stack.callback(runner.close)
            view.preloading(runner.preloaded)
            runner.wait()
            check_recipes([(run, stage) for stage in todo.values()], run.folder.logs / "recipes.txt", runner)
            needs = {key: [run.keys[s] for s in stage.needs() if run.keys[s] in todo] for key, stage in todo.items()}
            free = schedule.slots(devices(), run.config.jobs)
            work = partial(perform, run, runner, view)
            try:
                for key in schedule.run(todo, needs, free, work, run.folder.tick):
                    try:
                        with disk_errors(run.folder.root):
                            published.look(key)
                    except LoopError as error:
                        view.say(f"not published yet: {error}")  # the last word is `write`'s, below
            except LoopError:
                reported(run, view)
                raise
            except BaseException:
                runner.stop()
                raise
            finally:
                run.folder.tick(at_once=True)
                view.close()
            run.folder.note(preload_s=runner.preload_s, busy_s=runner.busy_s)
    return published


def reported(run: Run, view: View) -> None:
    """Write the run's page, if anything was evaluated. That it cannot be written is said, and ends no run."""
    if any(step.checkpoint and run.record(step) for step in run.steps):
        try:
            report.write(run.folder.root.parent, [run.folder.root.name])
        except Exception as error:
            view.say(f"its page could not be written ({type(error).__name__}: {error}); try ts-loop report")


class Published:
    """`outcomes.jsonl`, and `results.json` summed up from it, as far as the run is."""

    def __init__(self, run: Run, view: View, todo: Iterable[str]):
        """Nothing is published yet; `todo` are the keys of stages still to do, whatever the store has of them."""
        self.run, self.view = run, view
        self.todo = set(todo)
        self.outcomes: dict[str, list[outcomes.Outcome]] = {}  # by key
        self.seen: set[str] = set()  # places
        self.arms: list[evidence.Arm] = []  # what came of each, once it was written at the end
        recipes: dict[str, Recipe] = {}
        for step in run.steps:
            recipes.setdefault(step.stage.kind.name, {**step.stage.recipes.get(RECIPE, {}), **step.stage.reports})
        ours = {name: recipe for name, recipe in recipes.items() if name in Recipes.model_fields}
        self.trackers = trackers.Trackers(run.config, run.folder.root, ours, view.say)

    def look(self, ended: str = "") -> None:
        """Link and publish every step that is done and was not so far; `ended` is the key of a stage that has ended."""
        self.todo.discard(ended)
        new = False
        for step in self.run.steps:
            place, key = step.place, self.run.keys[step.stage]
            if place not in self.seen and key not in self.todo and (record := self.run.record(step)):
                self.seen.add(place)
                new = True
                self.run.folder.link(place, self.run.store.folder(key))
                self.view.finished(step, record, self.rows_of(step, record))
        if new:
            self.write(at_end=False)

    def rows_of(self, step: Step, record: dict[str, Any]) -> list[outcomes.Row]:
        """The rows of one step: summed up from its outcomes, with what its stage says of each task."""
        where: outcomes.Row = {"arm": step.arm, "seed": step.seed, "iteration": step.iteration}
        where["checkpoint"] = step.checkpoint
        if (t := self.t_of(step)) is not None:
            where["t"] = t
        more = record["facts"].get("per_task", {})
        return [{**where, **row, **more.get(row["task"], {})} for row in outcomes.summary(self.outcomes_of(step))]

    def t_of(self, step: Step) -> float | None:
        """The t at which the checkpoint that a step tests was rebuilt; None for one that was not, or has no one t."""
        source = step.stage.inputs.get("checkpoint")
        if isinstance(source, Output) and source.stage.kind is reconstruct.KIND:
            return reconstruct.t_of(source.stage.recipes[RECIPE])
        if isinstance(source, Output) and source.stage.kind is choose.KIND:
            made = self.run.store.record(self.run.keys[source.stage])
            return float(made["facts"]["t"]) if made else None
        return None

    def outcomes_of(self, step: Step) -> list[outcomes.Outcome]:
        """One row a question, of one step that is done; none of what a t was only tried on."""
        if not step.checkpoint:
            return []
        key = self.run.keys[step.stage]
        if key not in self.outcomes:
            if step.checkpoint:  # another's are weights, and are not read
                undamaged(self.run.store, key)
            folder = self.run.store.folder(key)
            self.outcomes[key] = step.stage.kind.outcomes(folder, step.stage, self.run.pair["instruct"])
        return self.outcomes[key]

    def chosen(self, step: Step, facts: dict[str, Any]) -> dict[str, Any]:
        """What a choice of t came to, with a warning if it was made by questions that are scored, by whatever name."""
        by = {source.stage for source in step.stage.inputs.values() if isinstance(source, Output)}
        asked: set[str] = set()
        for stage in (stage for stage in by if stage.kind is evaluate.KIND):
            folder = self.run.store.folder(self.run.keys[stage])
            asked |= {outcome.question for outcome in stage.kind.outcomes(folder, stage, None)}
        scored = {
            outcome.question for test in self.run.steps for outcome in self.outcomes.get(self.run.keys[test.stage], [])
        }
        if met := len(asked & scored):
            flattered = f"{met} of the {len(asked)} questions it was chosen by are scored, too: such scores flatter"
            return {**facts, "why": f"{facts['why']}; {flattered}", "met": met}
        return facts

    def questions(self) -> Iterator[dict[str, Any]]:
        """Every outcome with where it belongs: run, arm, seed, iteration, checkpoint."""
        for step in self.run.steps:
            if step.place in self.seen:
                where = {"run": self.run.config.name, "arm": step.arm, "seed": step.seed}
                where |= {"iteration": step.iteration, "checkpoint": step.checkpoint}
                yield from ({**where, **asdict(outcome)} for outcome in self.outcomes_of(step))

    def write(self, at_end: bool = True) -> dict[str, Any]:
        """Write the two files; returns what `results.json` holds: what is tested, when nothing more comes."""
        done = [(step, record) for step in self.run.steps if (record := self.run.record(step))]
        rows = [row for step, record in done for row in self.rows_of(step, record)]
        wall = self.run.folder.wall_s()
        per_hour = self.run.config.usd_per_hour
        cost = None if per_hour is None else round(wall / 3600 * per_hour, 4)
        questions = list(self.questions())
        results: dict[str, Any] = {"rows": rows, "wall_s": round(wall, 3), "cost_usd": cost}
        if picked := [
            {"arm": step.arm, "seed": step.seed, "iteration": step.iteration, **self.chosen(step, record["facts"])}
            for step, record in done
            if step.stage.kind is choose.KIND
        ]:
            results["chosen"] = picked
        if at_end:
            gains = evidence.gains(questions)
            results["verdict"] = evidence.verdict(gains)
            results["comparisons"] = [evidence.as_json(gain) for gain in gains]
            results["at_k"] = [evidence.as_json(gain) for gain in evidence.gains(evidence.of_several(questions))]
            self.arms = evidence.arms(questions)
            results["arms"] = [evidence.arm_json(arm) for arm in self.arms]
            results["figures"] = [evidence.figure_json(figure) for figure in evidence.figures(questions)]
            if len(self.run.config.every_seed) > 1:
                results["pooled"] = evidence.pooled(questions)
        with disk_errors(self.run.folder.root):
            if questions:
                write_text(self.run.folder.outcomes, "".join(json.dumps(question) + "\n" for question in questions))
            write_json(self.run.folder.results, results)
        self.trackers.write(trackers.figures(rows, results["wall_s"] if at_end else 0.0, cost), at_end)
        return results


def dry(run: Run) -> Sequence[str]:
    """Write the recipes of what is left to do, and say what to type: every line can be pasted."""
    import shlex

    todo = pending(run)
    check_recipes([(run, stage) for stage in todo.values()])
    lines = ["export AXOLOTL_DO_NOT_TRACK=1"]
    for key, stage in todo.items():
        step = next(step for step in run.wanted if step.stage is stage)
        paths = write_recipes(run, stage)
        folder = run.store.folder(key)
        lines += [f"# {step.part + ' ' if step.part else ''}iteration {step.iteration}, {step.name}"]
        lines += [shlex.join(command) for command in commands(stage, paths)]
        lines += [shlex.join(["mv", str(folder / source), str(folder / target)]) for source, target in stage.renames]
    return lines
