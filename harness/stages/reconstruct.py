"""Reconstruct: a thinking checkpoint is rebuilt between the anchor and the distilled instruct one (mergekit).

Any method of mergekit: of the recipe's models, the two that stand for the pair are replaced and nothing else is.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from harness.errors import LoopError, StageError
from harness.stages import OWN, RECIPE, Facts, Kind, Recipe, Source, Stage, short, slot

CHECKPOINT = "thinking"
TOOLS = ("mergekit", "torch", "transformers")
PHASES = {"Warmup": "models read", "Executing": "steps of the merge"}
HAS_T = ("slerp",)
# Weights in a file: mergekit holds one whole before it writes it, and its own 5B are all of a 4B checkpoint.
SHARD = "1B"
NOT_COPIED = "Failed to copy tokenizer"  # what it says of that, and exits with 0


def build(
    recipe: Recipe,
    t: float | None,
    anchor: Source,
    instruct: Source,
    written: tuple[str, str] | None = None,
    asked: str = "",
) -> Stage:
    """The stage.

    Args:
        recipe: mergekit's config as it is written. The two models that `written` names stand for the pair; where it
            names others, its `base_model` stands for the anchor and the one other model for the instruct checkpoint.
            Tokenizer, chat template and generation config come from `base_model`, or else the first model named.
        t: weight of the instruct checkpoint; None leaves the recipe's own.
        anchor: the thinking checkpoint that is interpolated with.
        instruct: the distilled checkpoint.
        written: the pair's names as the recipe may have them: instruct, thinking.
        asked: how `t` was asked for, if not by its value.

    Raises:
        LoopError: if it cannot be told which models stand for the pair, the thinking side would lose its tokenizer, or
            there is no one `t` to set.
    """
    if not isinstance(recipe.get("parameters") or {}, dict):
        raise LoopError("reconstruct recipe: parameters: must be a mapping, as in parameters: {t: 0.1}")
    stand_ins = _stand_ins(recipe, written)
    resolved: Recipe = _replaced(copy.deepcopy(recipe), stand_ins)
    first = resolved.get("base_model") or next(iter(_names(resolved)), None)
    if first == slot("instruct") and not resolved.get("tokenizer_source") and not resolved.get("tokenizer"):
        raise LoopError(
            "reconstruct recipe: mergekit takes tokenizer and chat template from base_model, or the first model, which "
            "is the instruct one here: thinking would never open a trace; name the thinking one there"
        )
    if t is not None:
        further = {key: value for key, value in resolved.items() if key != "parameters"}
        own = (resolved.get("parameters") or {}).get("t", 0.0)
        whole = isinstance(own, int | float) and not _sets_t(further) and first == slot("anchor")
        if recipe.get("merge_method") not in HAS_T or not whole:
            what = "a t of its own for each part" if recipe.get("merge_method") in HAS_T else "no t"
            named = asked or f"{t:g}"
            raise LoopError(
                f"--t {named}: the reconstruct recipe has {what}; change it there, or leave --t (and t:) out"
            )
        resolved["parameters"] = {**(resolved.get("parameters") or {}), "t": t}
    command = ("mergekit-yaml", f"{OWN}/{RECIPE}", f"{OWN}/{CHECKPOINT}", "--out-shard-size", SHARD)
    return Stage(KIND, {RECIPE: resolved}, (command,), {"anchor": anchor, "instruct": instruct}, device="cpu")


def t_of(recipe: Recipe) -> float | None:
    """The one t of a resolved recipe; None where it has none, or one for each part."""
    t = (recipe.get("parameters") or {}).get("t")
    if recipe.get("merge_method") not in HAS_T or not isinstance(t, int | float):
        return None
    parts = _sets_t({key: value for key, value in recipe.items() if key != "parameters"})
    return None if parts else float(t)


def _sets_t(value: Any) -> bool:
    """Whether a part of a recipe has a `t` of its own, which mergekit takes before the whole recipe's."""
    if isinstance(value, dict):
        own = value.get("parameters")
        return (isinstance(own, dict) and "t" in own) or any(map(_sets_t, value.values()))
    return isinstance(value, list) and any(map(_sets_t, value))


def _names(value: Any) -> list[str]:
    """The models that a recipe names, in order."""
    if isinstance(value, dict):
        found = [inner for key, inner in value.items() if key in ("model", "base_model") and isinstance(inner, str)]
        return found + [name for inner in value.values() for name in _names(inner)]
    return [name for inner in value for name in _names(inner)] if isinstance(value, list) else []


def _stand_ins(recipe: Recipe, written: tuple[str, str] | None) -> dict[str, str]:
    named, base = dict.fromkeys(_names(recipe)), recipe.get("base_model")
    if written and set(written) <= set(named):
        instruct, thinking = written
        return {thinking: slot("anchor"), instruct: slot("instruct")}
    others = [name for name in named if name != base]
    if isinstance(base, str) and len(others) == 1:
        return {base: slot("anchor"), others[0]: slot("instruct")}
    raise LoopError(
        f"the reconstruct recipe names {len(named)} models ({short(', '.join(named))}): it must name the pair as "
        "loop.yml does, or two models, base_model the thinking one"
    )


def _replaced(value: Any, stand_ins: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {
            key: stand_ins.get(inner, inner)
            if key in ("model", "base_model") and isinstance(inner, str)
            else _replaced(inner, stand_ins)
            for key, inner in value.items()
        }
    return [_replaced(inner, stand_ins) for inner in value] if isinstance(value, list) else value


def read(folder: Path, stage: Stage, tokenizer: Path | None = None) -> Facts:
    """Nothing: that mergekit could copy all that goes with the weights, though, it says in its log alone.

    Raises:
        StageError: it could not.
    """
    log = folder / "log.txt"
    if NOT_COPIED in log.read_text(encoding="utf-8", errors="replace"):
        raise StageError(
            f"{folder.name}: mergekit could not copy tokenizer, chat template or generation config\n"
            f"see {log}, and run the same command again"
        )
    return {}


KIND = Kind("reconstruct", "thinking is rebuilt", TOOLS, PHASES, read, checkpoint=CHECKPOINT)
