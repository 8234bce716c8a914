"""The dial: the thinking checkpoint of a finished run rebuilt at other t, and tested; nothing is trained.

Merges of a thinking and an instruct checkpoint stop closing their traces somewhere, abruptly (arXiv 2510.10977): t is a
dial with a cliff, and this shows where. A dial is a run of its own, RUN.dial, whose stages are the run's last
reconstruct and evaluate with another t: what a run with that t would do has the same keys and is done once. Beside
them the angles between the weights that are interpolated, and between those of the pair as it came.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import asking
from harness.config import LoopConfig
from harness.errors import LoopError
from harness.loop import Run, check_pair, identified, undamaged, versions
from harness.plan import Step, untried
from harness.rundir import RunDir, place_of
from harness.stages import RECIPE, External, Keys, Output, Source, Stage, angles, evaluate, reconstruct
from harness.store import Known, Store, stamp
from harness.view import View

MOST = 101  # values


def values(text: str) -> list[float]:
    """ "0:1:0.25" as [0, 0.25, 0.5, 0.75, 1], "0.1,0.3" as it stands.

    Raises:
        LoopError: if it is neither, or a t is outside 0 to 1.
    """
    try:
        if ":" in text:
            low, high, step = map(float, text.split(":"))
            count = round((high - low) / step) if step else 0
            if not 0 < count < MOST or abs(low + count * step - high) > 1e-9:
                raise ValueError
            found = [round(low + number * step, 6) for number in range(count + 1)]
        else:
            found = [float(part) for part in text.split(",")]
    except (ValueError, OverflowError):
        raise LoopError(
            f"--t {text}: write FROM:TO:STEP, such as 0:1:0.1, or values with commas between them"
        ) from None
    if outside := [t for t in found if not 0 <= t <= 1]:
        raise LoopError(f"--t {text}: {outside[0]:g} is outside 0 (thinking) to 1 (instruct)")
    return list(dict.fromkeys(found))


def prepare(out: Path, name: str, ts: Sequence[float], view: View) -> Run:
    """Plan the dial of a run; what it was turned to before is kept.

    Raises:
        LoopError: the run has rebuilt nothing yet, by a recipe that has no one t, or of what is not here any more.
    """
    store, noted = Store(out / "stages"), RunDir(out / name).noted()
    if not noted:
        raise LoopError(f"{out / name}: no such run; see ts-loop status")
    try:
        config = LoopConfig.model_validate(noted["asked"])
    except (KeyError, ValueError):  # made by another version
        raise LoopError(f"{out / name}: what was asked of it cannot be read; run its command again") from None
    steps = [step for step in noted["steps"] if place_of(step).startswith("iter_") and store.record(step["key"])]
    # With `t: auto` there is one rebuilding for each t that was tried: but for t they are the same.
    done = {(untried(step["name"]), step["iteration"]): step for step in steps}
    last = max((iteration for step, iteration in done if step == "reconstruct"), default=0)
    if not last or ("evaluate_thinking", last) not in done:
        raise LoopError(f"{name}: no iteration of it is whole yet; a dial turns the last one's t")
    pair, on_hub = check_pair(config)
    known = Known(store.root / ".known.json", view.hashing)
    came = {role: identified(folder, on_hub[role], known) for role, folder in pair.items()}
    known.save()
    here = {"anchor": came["thinking"], **came}
    watched = {str(folder): stamp(folder) for folder in pair.values()}

    def inputs(step: Mapping[str, Any], leave: str = "") -> dict[str, Source]:
        found: dict[str, Source] = {}
        for what, identity in step["reads"]["inputs"].items():
            key, _, inside = identity.partition("/")
            if what == leave:
                continue
            if inside and store.record(key):
                path = store.folder(key) / inside
                if not path.exists():
                    again = f"--from iter_{last:02d}/distill"
                    raise LoopError(
                        f"{name}: {key} has no {inside} any more (gc): run its command with {again}, then dial"
                    )
                undamaged(store, key, inside)
                found[what] = External(str(path), identity)
            elif what in here:
                if here[what].identity != identity:
                    raise LoopError(f"{name}: {here[what].path} is another checkpoint than the run read as {what}")
                found[what] = here[what]
            else:
                place = step.get("paths", {}).get(what)
                if not place or not Path(place).exists():
                    where = place or "nobody noted where it was"
                    raise LoopError(f"{name}: what it read as {what} is not here any more ({where})")
                found[what], watched[place] = External(place, identity), stamp(Path(place))
        return found

    rebuilt, tested = done["reconstruct", last], done["evaluate_thinking", last]
    merged, asked = rebuilt["reads"], tested["reads"]
    recipe, asks = merged["recipes"][RECIPE], asked["recipes"][RECIPE]
    elsewhere = asked["tools"] if {"evaluate", "evaluate_thinking"} & set(config.python) else None
    parameters = recipe.get("parameters") or {}
    if recipe.get("merge_method") not in reconstruct.HAS_T or not isinstance(parameters.get("t"), int | float):
        raise LoopError(f"{name}: its reconstruct recipe has no one t to turn")
    before = RunDir(out / f"{name}.dial").noted().get("steps", [])
    turned = [float(step["arm"].removeprefix("t=")) for step in before if str(step.get("arm")).startswith("t=")]
    read, asked_of = inputs(rebuilt), inputs(tested, "checkpoint")
    plan: dict[float, list[Step]] = {}
    for t in sorted({*ts, *turned}):
        merge = Stage(
            reconstruct.KIND,
            {RECIPE: {**recipe, "parameters": {**parameters, "t": t}}},
            tuple(map(tuple, merged["commands"])),
            read,
            device="cpu",
        )
        test = Stage(
            evaluate.KIND,
            {RECIPE: asks},
            tuple(map(tuple, asked["commands"])),
            {"checkpoint": Output(merge, reconstruct.CHECKPOINT), **asked_of},
            tasks=asked["tasks"],
            scratch=(asking.NF4_COPY,),
            device=asking.device_of(asks),
            wide=asking.is_wide(asks),
            versions=elsewhere,
        )
        where = (f"t={t:g}", config.seed, f"t_{t:g}")
        plan[t] = [
            Step(last, "reconstruct", merge, "", *where),
            Step(last, "evaluate_thinking", test, "thinking", *where),
        ]
    weights = {
        "angles": angles.build(read["anchor"], read["instruct"]),
        "angles_came": angles.build(came["thinking"], came["instruct"]),
    }
    compared = [Step(last, called, stage, "", "angles", config.seed, "angles") for called, stage in weights.items()]
    named = config.model_copy(update={"name": f"{name}.dial"})
    every = [*compared, *(step for steps in plan.values() for step in steps)]
    keys = Keys(versions(tuple(dict.fromkeys(tool for step in every for tool in step.stage.kind.tools))))
    wanted = [*compared, *(step for t in plan if t in ts for step in plan[t])]
    kept = [step for step in every if step in wanted or store.record(keys[step.stage])]
    return Run(named, RunDir(out / named.name), store, kept, wanted, keys, pair, watched)
