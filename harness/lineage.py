"""Which checkpoint of a run is meant, and what it came from: its parents, and the steps that lead to it.

Knows `run.json`, of whatever state a run is in, and of a dial's. What is made of it is `export`'s and `model_card`'s.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from harness import evidence
from harness.checks import is_tah
from harness.config import ARMS
from harness.errors import LoopError
from harness.evidence import Who
from harness.rundir import RunDir, place_of
from harness.stages import RECIPE
from harness.store import Store

Step = Mapping[str, Any]

MADE_BY = {"instruct": ("distill",), "thinking": ("choose", "reconstruct")}  # kinds of stages; the first that a run has
ON_HUB = re.compile(r"(?P<id>[^@+/]+/[^@+/]+)@(?P<commit>[0-9a-f]{40})\b")


class Parent(NamedTuple):
    """A checkpoint of the pair as it came.

    Attributes:
        role: "instruct" or "thinking".
        name: what the hub calls it; of a local one, its folder's name alone.
        commit: the hub's; empty if it is local, or nobody noted it.
        digest: of what a loader reads of it; empty if the commit says it.
        folder: where it lies; None if it is the hub's.
    """

    role: str
    name: str
    commit: str
    digest: str
    folder: Path | None

    @property
    def spec(self) -> str:
        """How loop.yml names it: `owner/name@commit`, or a folder beside it."""
        if self.folder:
            return f"./{self.name}"
        return f"{self.name}@{self.commit}" if self.commit else self.name

    def file(self, name: str) -> Path | None:
        """One of its small files; None where it has none, or the hub gives none now."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import logging

        if self.folder:
            return self.folder / name if (self.folder / name).is_file() else None
        logging.set_verbosity_error()  # of a hub that is not reached, what is missing says enough
        for here_alone in (True, False):
            try:
                revision = self.commit or None
                return Path(hf_hub_download(self.name, name, revision=revision, local_files_only=here_alone))
            except Exception:  # the hub's client has a dozen of them, and all say the same here
                continue
        return None


@dataclass(frozen=True)
class Chosen:
    """A checkpoint of a run.

    Attributes:
        who: run, arm, iteration, and "instruct" or "thinking".
        seed: of its arm.
        step: of run.json, the one that made it.
        line: the steps that it came from, in order, itself the last.
        steps: all of its arm and seed; of a dial, the turned run's too.
        noted: run.json; of a dial, the turned run's.
        base: the run that `noted` is of.
        out: where runs are.
        store: of their stages.
        missing: the places of steps that are not done.
    """

    who: Who
    seed: int
    step: Step
    line: list[Step]
    steps: list[Step]
    noted: Mapping[str, Any]
    base: str
    out: Path
    store: Store
    missing: list[str]

    def folder(self, step: Step) -> Path:
        """Where a step's stage lies."""
        return self.store.folder(step["key"])

    def find(self, name: str) -> Step | None:
        """The first step of that name, the pair's as it came where it is an evaluation."""
        return next((step for step in self.steps if step["name"] == name), None)

    def of_kind(self, kind: str) -> list[Step]:
        """The steps of a kind that it came from, in order."""
        return [step for step in self.line if step["reads"]["kind"] == kind]

    @property
    def evaluation(self) -> Step | None:
        """The step that tested it."""
        keys = [s for s in self.steps if s["name"] == f"evaluate_{self.who.checkpoint}"]
        inside = f"{self.step['key']}/"
        return next((s for s in keys if s["reads"]["inputs"].get("checkpoint", "").startswith(inside)), None)

    def parent(self, role: str) -> Parent:
        """The checkpoint of the pair as it came, by what the run noted of it."""
        said = str(self.noted["asked"][role])
        first = self.find(f"evaluate_{role}")
        identity = first["reads"]["inputs"]["checkpoint"] if first else ""
        local = Path(said).is_absolute()
        found = ON_HUB.match(identity)
        if local:
            return Parent(role, Path(said).name, "", identity, Path(said))
        name, _, revision = said.partition("@")
        return Parent(role, name, found["commit"] if found else revision, "" if found else identity, None)


def choose(out: Path, name: str) -> Chosen:
    """The checkpoint that is meant.

    Args:
        out: where runs are.
        name: as `evidence.chosen` takes it; an arm may be named as its folder in the run is, with its seed.

    Raises:
        LoopError: there is no such run, it has not made that, or it was not this run that made it.
    """
    if not (said := evidence.NAMED.match(name)):
        raise LoopError(f"{name}: write RUN --checkpoint instruct@3, or RUN/untouched for another arm")
    run = said["run"]
    base = run.removesuffix(".dial")
    store, noted = Store(out / "stages"), RunDir(out / run).noted()
    if not noted.get("steps"):
        raise LoopError(f"{out / run}: no such run; see ts-loop status")
    whole = noted if base == run else RunDir(out / base).noted()
    every = list(dict.fromkeys(_line(step, whole) for step in noted["steps"]))
    wanted = said["arm"] or every[0][0]
    fitting = [(arm, seed) for arm, seed in every if wanted in (arm, f"{arm}-{seed}")]
    if not fitting or (every[0][0].startswith("t=") and not said["arm"]):
        has = ", ".join(dict.fromkeys(arm for arm, _ in every))
        raise LoopError(f"{name}: name one of its arms, as in {run}/{every[-1][0]}; it has {has}")
    arm, seed = fitting[0]
    mine = [step for step in noted["steps"] if _line(step, whole) == (arm, seed)]
    steps = mine
    if base != run:
        steps = [*(step for step in whole["steps"] if place_of(step).startswith("iter_")), *mine]
    checkpoint = said["checkpoint"] or ("thinking" if arm.startswith("t=") else "instruct")
    kinds = {step["reads"]["kind"] for step in mine}
    kind = next((kind for kind in MADE_BY[checkpoint] if kind in kinds), "")
    made = {step["iteration"]: step for step in mine if step["reads"]["kind"] == kind}
    done = [iteration for iteration, step in made.items() if store.record(step["key"])]
    iteration = int(said["iteration"]) if said["iteration"] else max(done, default=-1)
    if iteration < 0:
        raise LoopError(f"{name}: no {checkpoint} checkpoint of it is made yet; run its command again, which goes on")
    if not iteration:
        what = f"{checkpoint}@0 is the checkpoint as it came"
        if is_tah(Path(str(whole["asked"][checkpoint]))):
            what += ", a TaH one, loaded by `pip install thinkswitch` and trust_remote_code"
        raise LoopError(f"{name}: {what}, which this run did not make; name another iteration (made: {_listed(done)})")
    if iteration not in done:
        raise LoopError(f"{name}: {checkpoint} of iteration {iteration} is not made; made iterations: {_listed(done)}")
    missing = [place_of(step) for step in whole["steps"] if not store.record(step["key"])]
    step = made[iteration]
    who = Who(run, arm, iteration, checkpoint)
    return Chosen(who, seed, step, line_of(steps, step, store), steps, whole, base, out, store, missing)


def _line(step: Step, noted: Mapping[str, Any]) -> tuple[str, int]:
    return step.get("arm", ARMS[0]), step.get("seed", noted["asked"].get("seed", 0))


def _listed(iterations: Iterable[int]) -> str:
    return ", ".join(map(str, iterations)) or "none"


def line_of(steps: Sequence[Step], last: Step, store: Store) -> list[Step]:
    """The steps that one came from, in order, itself the last; of several t that were tried, the chosen one's."""
    by_key: dict[str, Step] = {}
    for step in steps:
        by_key.setdefault(step["key"], step)
    found: dict[str, Step] = {}

    def walk(step: Step) -> None:
        inputs = step["reads"]["inputs"]
        if step["reads"]["kind"] == "choose":
            t = (store.record(step["key"]) or {"facts": {}})["facts"].get("t")
            tried = [one["t"] for one in step["reads"]["recipes"][RECIPE]["tried"]]
            inputs = {"checkpoint": inputs[f"checkpoint_{tried.index(t)}"]} if t in tried else {}
        for identity in inputs.values():
            key = identity.partition("/")[0]
            if key in by_key and key not in found:
                walk(by_key[key])
        found[step["key"]] = step

    walk(last)
    return list(found.values())
