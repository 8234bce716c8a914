"""Charts: better is higher, later is to the right, and what is written in them is text."""

from __future__ import annotations

import re
from typing import Any

from harness.charts import angles, by_iteration, curve, frontier


def at(picture: str, label: str) -> tuple[float, float]:
    """Where a point lies, from the left and from the top."""
    found = re.search(rf'aria-label="{label}"[^>]*"point" transform="translate\(([\d.]+),([\d.]+)\)"', picture)
    assert found, re.findall(r'aria-label="([^"]*)"', picture)
    return float(found[1]), float(found[2])


def point(iteration: int, who: str, accuracy: float, **more: Any) -> dict[str, Any]:
    place = {"iteration": iteration, "checkpoint": who, "accuracy": accuracy}
    return {
        **place,
        "low": accuracy - 0.1,
        "high": accuracy + 0.1,
        "tokens": 10.0 if who == "instruct" else 100.0,
        **more,
    }


ROWS = [point(0, "instruct", 0.35), point(1, "instruct", 0.6), point(0, "thinking", 0.9), point(1, "thinking", 0.85)]


def test_better_is_higher_and_later_is_to_the_right() -> None:
    drawn = by_iteration("sums", ROWS)
    before = at(drawn, "iteration: 0; accuracy: 35%; checkpoint: instruct")
    after = at(drawn, "iteration: 1; accuracy: 60%; checkpoint: instruct")
    best = at(drawn, "iteration: 0; accuracy: 90%; checkpoint: thinking")
    assert after[0] > before[0] == best[0]
    assert best[1] < after[1] < before[1]
    assert "sums by iteration" in drawn


def test_more_tokens_are_to_the_right() -> None:
    drawn = frontier("sums", ROWS)
    places = [
        (float(x), float(y))
        for x, y in re.findall(r'aria-roledescription="point"[^>]*translate\(([\d.]+),([\d.]+)', drawn)
    ]
    assert len(places) == 4
    assert max(x for x, _ in places[:2]) < min(x for x, _ in places[2:])


def test_wider_angles_are_higher_and_later_layers_to_the_right() -> None:
    rows = [("attention", 0, 5.0), ("attention", 1, 10.0), ("mlp", 0, 20.0)]
    drawn = angles("angles", [{"part": part, "layer": layer, "angle": angle} for part, layer, angle in rows])
    near, wide, other = (at(drawn, f"layer: {layer}; °: {angle:g}; part: {part}") for part, layer, angle in rows)
    assert near[0] == other[0] < wide[0]
    assert other[1] < wide[1] < near[1]


def test_a_picture_takes_the_page_s_colour_and_brings_no_code() -> None:
    drawn = curve(
        "<script>x</script>", [{"step": 1, "value": 0.5, "iteration": 1}, {"step": 2, "value": 0.4, "iteration": 1}]
    )
    assert "currentColor" in drawn
    assert "<script" not in drawn
    assert "href" not in re.sub(r"xmlns:xlink", "", drawn)
