"""A run's figures for trackers: TensorBoard's files beside the run, trackio, wandb, MLflow, by the field's own names.

    eval/mini_math/instruct/accuracy, …/tokens_per_answer, …/closed_traces    step: the iteration
    reconstruct/t, run/wall_s, run/cost_usd

Each arm and seed is a run of the tracker's, with the loop's settings as its hyperparameters. What a tracker has is
noted in `trackers.json`: a run that goes on adds to it, one whose figures changed begins anew, so that no point shows
twice.

TensorBoard's files are written as the run goes. The others take seconds to import, print, and may wait for a network:
they are told once, when the run is over, by a process of its own (`python -m harness.trackers`). Nothing leaves the
machine but to a wandb that has a key, or to a server or Space that the recipe or the environment names. Knows nothing
of stages.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock

from harness.config import SECRET, LoopConfig
from harness.errors import LoopError
from harness.files import read_json_or_none, write_json

Points = dict[str, dict[int, float]]  # a figure's name → step → value

AWAIT_S = 120.0  # for trackers that are told at the end: a network may be slow
OF_ROWS = ("accuracy", "tokens_per_answer", "closed_traces")
PROJECT = "thinkswitch"
# Where a training recipe's own trainer reports to, of Axolotl's keys: this run's figures go there, too.
RECIPE_KEYS = {
    "wandb": {"project": "wandb_project", "entity": "wandb_entity", "mode": "wandb_mode"},
    "trackio": {"project": "trackio_project_name", "space_id": "trackio_space_id"},
    "mlflow": {"project": "mlflow_experiment_name", "uri": "mlflow_tracking_uri"},
}


def check(names: Iterable[str]) -> None:
    """See that every tracker can be told, before anything runs.

    Raises:
        LoopError: naming the first that is not installed.
    """
    for name in names:
        if find_spec(name) is None:
            raise LoopError(
                f"report_to: {name}: is not installed: pip install {name}, or leave it out (none: no tracker)"
            )


def figures(rows: Sequence[Mapping[str, Any]], wall_s: float, cost_usd: float | None) -> dict[str, Points]:
    """The points of each arm and seed, by "ARM-SEED".

    Args:
        rows: of results.json.
        wall_s: seconds that the whole run took; noted once, at its last iteration.
        cost_usd: of those.
    """
    found: dict[str, Points] = {}
    for row in rows:
        points = found.setdefault(f"{row['arm']}-{row['seed']}", {})
        for what in OF_ROWS:
            if row[what] is not None:
                points.setdefault(f"eval/{row['task']}/{row['checkpoint']}/{what}", {})[row["iteration"]] = row[what]
        if row.get("t") is not None:
            points.setdefault("reconstruct/t", {})[row["iteration"]] = row["t"]
    if rows and wall_s:
        first, last = next(iter(found.values())), max(row["iteration"] for row in rows)
        first["run/wall_s"] = {last: wall_s}
        if cost_usd is not None:
            first["run/cost_usd"] = {last: cost_usd}
    return found


def settings(config: LoopConfig, recipes: Mapping[str, Mapping[str, Any]]) -> dict[str, bool | int | float | str]:
    """A run's settings as a tracker's hyperparameters, flat: `t`, `distill.learning_rate`; no paths and no secrets.

    Args:
        config: of the run.
        recipes: of its stages, by what loop.yml calls them.
    """
    ours = config.model_dump(mode="json", exclude={"name", "recipes", "python", "report_to", "arms", "seeds", "seed"})
    found: dict[str, bool | int | float | str] = {}

    def walk(value: Any, name: str) -> None:
        if SECRET.fullmatch(name.rpartition(".")[2]):
            return
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(inner, f"{name}.{key}" if name else str(key))
        elif isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            walk(", ".join(Path(item).name if item.startswith("/") else item for item in value), name)
        elif isinstance(value, str) and value.startswith(("/", "~")):
            found[name] = Path(value).name
        elif isinstance(value, bool | int | float) or (isinstance(value, str) and "<<" not in value):
            found[name] = value

    walk(ours, "")
    walk(recipes, "")
    return found


def told(recipe: Mapping[str, Any], name: str) -> dict[str, str]:
    """Where a tracker is, as the training recipe says it to its own trainer."""
    keys = RECIPE_KEYS.get(name, {})
    return {"project": PROJECT, **{ours: str(recipe[key]) for ours, key in keys.items() if recipe.get(key)}}


class Trackers:
    """The trackers of one run."""

    def __init__(
        self,
        config: LoopConfig,
        folder: Path,
        recipes: Mapping[str, Mapping[str, Any]],
        say: Callable[[str], None],
    ):
        """`folder` is the run's, `recipes` its stages' by what loop.yml calls them; `say` tells a person."""
        self.name, self.names, self.folder, self.say = config.name, list(config.report_to), folder, say
        self.settings = settings(config, recipes)
        self.recipe = recipes.get("distill", {})

    def write(self, every: Mapping[str, Points], at_end: bool) -> None:
        """Tell trackers what they do not have yet; that one cannot be told is said once, and ends nothing."""
        try:
            with FileLock(self.folder / ".trackers.lock"):  # two commands may be at one run
                self._write(self.folder / "trackers.json", every, at_end)
        except OSError as error:
            self.say(f"no tracker was told how it went ({error}); the run's own files have it all")

    def _write(self, file: Path, every: Mapping[str, Points], at_end: bool) -> None:
        kept = read_json_or_none(file)  # after half a note all is told anew
        had: dict[str, Any] = kept if isinstance(kept, dict) else {}
        for name in list(self.names):
            if name != "tensorboard" and not at_end:
                continue
            mine = had.get(name, {})
            if name == "tensorboard":  # somebody may have taken its files away
                mine = {line: noted for line, noted in mine.items() if (self.folder / name / line).is_dir()}
            # Of what was being told when it was stopped nobody knows how much is there: that line begins anew.
            mine = {line: noted for line, noted in mine.items() if not noted.get("telling")}
            now = {line: _added(mine.get(line), points, name == "tensorboard") for line, points in every.items()}
            news = {line: found for line, found in now.items() if found[1]}
            if not news:
                continue
            lines = [
                {"run": run, "line": line, "settings": self._of(line), "new": new, "anew": anew}
                for line, (run, new, anew) in news.items()
            ]
            try:
                for told_of in lines:  # each noted by itself: what was told of one is not told again if the next fails
                    line, run = str(told_of["line"]), told_of["run"]
                    before = {} if told_of["anew"] else mine.get(line, {}).get("points", {})
                    had.setdefault(name, {})[line] = {"run": run, "points": before, "telling": True}
                    write_json(file, had)
                    if name == "tensorboard":
                        tensorboard(self.folder / "tensorboard", [told_of])
                    else:
                        self._apart(name, [told_of])
                    had.setdefault(name, {})[line] = {"run": run, "points": _both(before, every[line])}
                    write_json(file, had)
            except Exception as error:
                self.names.remove(name)
                why = " ".join(str(error).split())[:200] or type(error).__name__
                self.say(f"{name} was not told how it went ({why}); the run's own files have it all")

    def _of(self, line: str) -> dict[str, Any]:
        arm, _, seed = line.rpartition("-")
        return {"arm": arm, "seed": int(seed), **self.settings}

    def _apart(self, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        """Tell a tracker in a process of its own, whose words go to a log."""
        log = self.folder / "logs" / "trackers.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        what = {
            "tracker": name,
            "name": self.name,
            "folder": str(self.folder),
            "lines": lines,
            **told(self.recipe, name),
        }
        with log.open("ab") as said:
            start = said.tell()
            child = subprocess.Popen(
                [sys.executable, "-m", "harness.trackers"],
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                child.communicate(json.dumps(what).encode(), timeout=AWAIT_S)
            except subprocess.TimeoutExpired:
                raise TimeoutError(f"it did not answer within {AWAIT_S:.0f} s; see {log}") from None
            finally:
                with contextlib.suppress(ProcessLookupError):  # what it started goes with it, however this ends
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        if child.returncode:
            last = log.read_bytes()[start:].decode(errors="replace").strip().splitlines()[-1:] or ["it ended by itself"]
            raise RuntimeError(f"{last[0]}; see {log}")


def _added(noted: Mapping[str, Any] | None, points: Points, whole: bool) -> tuple[str, Points, bool]:
    """A tracker's name for a run, the points it has not, and whether it begins anew: others changed, or it has none.

    How long a run took may change without anything else; only where `whole`, that begins it anew too.
    """
    known = noted["points"] if noted else {}
    counted = {name: by for name, by in known.items() if whole or not name.startswith("run/")}
    same = all(
        points.get(n, {}).get(int(step), value) == value for n, by in counted.items() for step, value in by.items()
    )
    known = known if same else {}
    new = {
        name: {step: value for step, value in by.items() if str(step) not in known.get(name, {})}
        for name, by in points.items()
    }
    run = noted["run"] if noted and same else uuid.uuid4().hex[:8]
    return run, {name: by for name, by in new.items() if by}, noted is None or not same


def _both(noted: Mapping[str, Any], points: Points) -> dict[str, dict[str, float]]:
    """What a tracker has, once it has these too."""
    now = {name: {str(step): value for step, value in by.items()} for name, by in points.items()}
    return {
        name: {**noted.get(name, {}), **now.get(name, {})} for name in [*noted, *(n for n in now if n not in noted)]
    }


def tensorboard(folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write TensorBoard's files: a folder an arm and seed, the first of its files with the settings."""
    import time

    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    for line in lines:
        where = folder / line["line"]
        for file in where.glob("events.out.tfevents.*") if line["anew"] else []:
            file.unlink()
        writer = EventFileWriter(str(where))
        if line["anew"]:
            writer.add_event(Event(wall_time=time.time(), summary=hparams_pb(line["settings"], line["line"])))
        for name, by_step in line["new"].items():
            for step, value in by_step.items():
                summary = Summary(value=[Summary.Value(tag=name, simple_value=value)])
                writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
        writer.close()


# --- in a process of its own ---


def rows_of(new: Mapping[str, Mapping[Any, float]]) -> list[tuple[int, dict[str, float]]]:
    """Points by step, in order: what is logged at once."""
    found: dict[int, dict[str, float]] = {}
    for name, by_step in new.items():
        for step, value in by_step.items():
            found.setdefault(int(step), {})[name] = value
    return sorted(found.items())


def trackio(what: Mapping[str, Any]) -> None:
    """Log to trackio's database of this machine, or to the Space that the recipe names."""
    import trackio as library

    for line in what["lines"]:
        run = library.init(
            project=what["project"],
            name=f"{what['name']}-{line['line']}-{line['run']}",
            group=what["name"],
            config=line["settings"],
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            space_id=what.get("space_id"),
        )
        for step, values in rows_of(line["new"]):
            run.log(values, step=step)
        library.finish()


def wandb(what: Mapping[str, Any]) -> None:
    """Log to wandb; without a key, to files in the run's folder that `wandb sync` takes."""
    import wandb as library

    said = bool(os.environ.get("WANDB_MODE"))
    for line in what["lines"]:
        run = library.init(
            project=what["project"],
            entity=what.get("entity"),
            id=line["run"],
            name=f"{what['name']}-{line['line']}",
            group=what["name"],
            config=line["settings"],
            dir=what["folder"],
            resume="allow",
            mode=what.get("mode") or (None if said or library.login(prompt=False) else "offline"),
            settings=library.Settings(console="off", disable_git=True, x_disable_stats=True),
        )
        run.define_metric("iteration")
        run.define_metric("*", step_metric="iteration")
        for step, values in rows_of(line["new"]):
            run.log({"iteration": step, **values})
        run.finish()


def mlflow(what: Mapping[str, Any]) -> None:
    """Log to MLflow: to the server that the recipe or MLFLOW_TRACKING_URI names, else a file in the run's folder."""
    import mlflow as library

    if uri := what.get("uri") or (
        "" if os.environ.get("MLFLOW_TRACKING_URI") else f"sqlite:///{what['folder']}/mlflow.db"
    ):
        library.set_tracking_uri(uri)
    library.set_experiment(what["project"])
    for line in what["lines"]:
        name = f"{what['name']}-{line['line']}"
        known = library.search_runs(filter_string=f"tags.ts_loop = '{line['run']}'", output_format="list")
        with library.start_run(known[0].info.run_id if known else None, run_name=name, tags={"ts_loop": line["run"]}):
            if not known:
                library.log_params({key: str(value)[:500] for key, value in line["settings"].items()})
            for step, values in rows_of(line["new"]):
                library.log_metrics({re.sub(r"[^\w./ -]", "_", key): value for key, value in values.items()}, step=step)


def main() -> None:
    """Tell the tracker that standard input names; an error's last line is for the log."""
    what = json.load(sys.stdin)
    {"trackio": trackio, "wandb": wandb, "mlflow": mlflow}[what["tracker"]](what)


if __name__ == "__main__":
    main()
