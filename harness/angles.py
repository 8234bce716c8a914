"""How far two checkpoints' weights point apart, tensor by tensor, and where slerp and lerp between them differ.

    python -m harness.angles THINKING INSTRUCT --out angles.json

A tensor counts as mergekit's slerp takes it: one vector, whatever its shape. With a and b of lengths |a|, |b| at an
angle θ, slerp is sin((1−t)θ)/sin θ · a + sin(tθ)/sin θ · b, lerp (1−t)·a + t·b; mergekit takes lerp for both where
|cos θ| > 0.9995, which is below 1.81°, or above 178.19°. All the rest follows from three numbers a tensor: |a|, |b| and
|b − a|. Pure, but for `measured`, which reads weights a piece at a time: an embedding of gigabytes is never whole in
memory.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from harness.errors import LoopError
from harness.files import write_json

STRAIGHT = 0.9995  # of |cos θ|, above which mergekit's slerp is its lerp
PIECE = 1 << 22  # numbers of a tensor that are read at once
PARTS = ("embeddings", "attention", "mlp", "norms", "other")
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


class Apart(NamedTuple):
    """One tensor of two checkpoints.

    Attributes:
        name: of the tensor.
        a: its length in the first, |a|, the root of the sum of squares over all its numbers.
        b: in the second.
        apart: |b − a|.
    """

    name: str
    a: float
    b: float
    apart: float

    @property
    def angle(self) -> float:
        """θ in radians, 0 to π; of zeros and another tensor π/2, as mergekit has it, of two of zeros 0."""
        if not self.a or not self.b:
            return math.pi / 2 if self.a or self.b else 0.0
        # |b − a|² = (|b| − |a|)² + 4 |a| |b| sin²(θ/2): exact near 0, where the cosine is 1 to all digits.
        half = (self.apart**2 - (self.b - self.a) ** 2) / (4 * self.a * self.b)
        return 2 * math.asin(math.sqrt(min(1.0, max(0.0, half))))

    @property
    def straight(self) -> bool:
        """Whether mergekit interpolates it linearly."""
        return not (self.a or self.b) or abs(math.cos(self.angle)) > STRAIGHT

    def differ(self, t: float) -> float:
        """‖slerp − lerp‖ / ‖b − a‖ at weight `t` of the second, as mergekit merges; 0 for equal tensors."""
        if self.straight or not self.apart:
            return 0.0
        angle = self.angle
        of_a = math.sin((1 - t) * angle) / math.sin(angle) - (1 - t)
        of_b = math.sin(t * angle) / math.sin(angle) - t
        inner = self.a * self.b * math.cos(angle)
        square = (of_a * self.a) ** 2 + 2 * of_a * of_b * inner + (of_b * self.b) ** 2
        return math.sqrt(max(0.0, square)) / self.apart

    @property
    def part(self) -> str:
        """Of the network: one of `PARTS`."""
        name = self.name.lower()
        if "norm" in name or ".ln_" in name:
            return "norms"
        if any(word in name for word in ("embed", "lm_head", "wte", "wpe")):
            return "embeddings"
        return "attention" if "attn" in name or "attention" in name else "mlp" if "mlp" in name else "other"

    @property
    def layer(self) -> int | None:
        """Which, from 0; None for a tensor of none."""
        found = LAYER.search(self.name)
        return int(found[1]) if found else None


class Summary(NamedTuple):
    """The tensors of one part.

    Attributes:
        part: of the network, or "all".
        tensors: how many.
        least: angle, degrees.
        median: of them.
        most: of them.
        straight: share that mergekit interpolates linearly.
        differ: the largest ‖slerp − lerp‖ / ‖b − a‖ over its tensors and the t asked for.
        at: that t.
    """

    part: str
    tensors: int
    least: float
    median: float
    most: float
    straight: float
    differ: float
    at: float


def summed_up(found: Sequence[Apart], ts: Sequence[float]) -> list[Summary]:
    """All tensors, then each part that has any; `ts` in [0, 1]."""
    by_part = [(part, [one for one in found if one.part == part]) for part in PARTS]
    return [_summary(part, mine, ts) for part, mine in [("all", list(found)), *by_part] if mine]


def _summary(part: str, mine: Sequence[Apart], ts: Sequence[float]) -> Summary:
    angles = sorted(math.degrees(one.angle) for one in mine)
    differ, at = max((max(one.differ(t) for one in mine), t) for t in ts)
    middle = (angles[(len(angles) - 1) // 2] + angles[len(angles) // 2]) / 2
    straight = sum(one.straight for one in mine) / len(mine)
    return Summary(part, len(mine), angles[0], middle, angles[-1], straight, differ, at)


def sentences(found: Mapping[str, Sequence[Summary]]) -> list[str]:
    """Whether it matters how weights are interpolated, a line for each two checkpoints, by what they are called."""
    said = []
    for whose, (every, *_) in found.items():
        differ = f"by at most {every.differ:.1%} of the way, at t = {every.at:g}" if every.differ else "nowhere"
        said.append(
            f"{whose}: {every.least:.2f}° to {every.most:.2f}° apart, half of {every.tensors} tensors below "
            f"{every.median:.2f}°; mergekit takes lerp for {every.straight:.0%} of them; slerp and lerp differ {differ}"
        )
    return said


def by_layer(found: Sequence[Apart]) -> list[dict[str, Any]]:
    """The mean angle of each part in each layer: rows of layer, part, angle in degrees; without what is in no layer."""
    inside = sorted((one for one in found if one.layer is not None), key=_place)
    rows = []
    for (layer, part), mine in groupby(inside, key=_place):
        angles = [math.degrees(one.angle) for one in mine]
        rows.append({"layer": layer, "part": part, "angle": math.fsum(angles) / len(angles)})
    return rows


def _place(one: Apart) -> tuple[int, str]:
    return one.layer or 0, one.part


# --- the weights ---


def measured(first: Path, second: Path) -> Iterator[Apart]:
    """Every tensor that two checkpoints both have, in the order of their names; sums are in float64.

    Of a TaH checkpoint its backbone counts, by its twin's names.

    Raises:
        LoopError: they have none in common, or one has another shape, or a file is not whole.
    """
    ours, theirs = files_of(first), files_of(second)
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        raise LoopError(f"{first} and {second} have no tensor in common")
    for name in shared:
        yield Apart(name, *_lengths(name, ours[name], theirs[name]))


def files_of(folder: Path) -> dict[str, tuple[Path, str]]:
    """Where each tensor lies: its name → file and name in it.

    Raises:
        LoopError: there is none, or a file is not whole.
    """
    from safetensors import SafetensorError, safe_open

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as weights:
                found.update({name.removeprefix("backbone."): (file, name) for name in weights.keys()})  # noqa: SIM118
        except (SafetensorError, OSError):
            raise LoopError(f"{file}: not a whole safetensors file; copy or download it again") from None
    if not found:
        raise LoopError(f"{folder}: has no .safetensors weights; name the folder of a checkpoint")
    return found


def _lengths(name: str, one: tuple[Path, str], other: tuple[Path, str]) -> tuple[float, float, float]:
    from safetensors import safe_open

    with safe_open(one[0], framework="pt") as ours, safe_open(other[0], framework="pt") as theirs:
        a, b = ours.get_slice(one[1]), theirs.get_slice(other[1])
        shape = a.get_shape()
        if b.get_shape() != shape:
            raise LoopError(f"{name}: is {shape} in {one[0]} and {b.get_shape()} in {other[0]}: no pair to interpolate")
        squares = [0.0, 0.0, 0.0]
        for rows in _pieces(shape):
            x, y = a[rows].double().flatten(), b[rows].double().flatten()
            squares[0] += float(x @ x)
            squares[1] += float(y @ y)
            squares[2] += float((y - x) @ (y - x))
        return math.sqrt(squares[0]), math.sqrt(squares[1]), math.sqrt(squares[2])


def _pieces(shape: Sequence[int]) -> Iterator[Any]:
    if not shape:
        yield ...
        return
    rows = max(1, PIECE // max(1, math.prod(shape[1:])))
    yield from (slice(start, min(shape[0], start + rows)) for start in range(0, shape[0], rows))


def as_json(found: Sequence[Apart]) -> dict[str, Any]:
    """For a file."""
    return {"tensors": [list(one) for one in found]}


def of_json(said: Mapping[str, Any]) -> list[Apart]:
    """What `as_json` gave."""
    return [Apart(*one) for one in said["tensors"]]


def main() -> None:
    """The command: see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.angles",
        description="The angle between two checkpoints' weights, tensor by tensor, as mergekit's slerp sees it.",
        epilog="for example:\n  python -m harness.angles mini/thinking mini/instruct --out angles.json\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("first", type=Path, metavar="THINKING", help="the folder of a checkpoint")
    parser.add_argument("second", type=Path, metavar="INSTRUCT", help="that of another of its shape")
    parser.add_argument("--out", type=Path, required=True, help="the .json to write: |a|, |b|, |b − a| of each tensor")
    options = parser.parse_args()
    try:
        found = list(measured(options.first, options.second))
        write_json(options.out, as_json(found))
    except (LoopError, OSError) as error:
        raise SystemExit(f"harness.angles: {error}") from None
    print(json.dumps([one._asdict() for one in summed_up(found, [0.5])], indent=1))


if __name__ == "__main__":
    main()
