"""Charts of the report, drawn by Vega-Lite (vl-convert) as SVG: no script is needed to look at them.

Knows chart specifications. Is given plain rows and leaves what they mean to `report`. Text and grids take the page's
own colour, so that one picture does for light and dark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COLOURS = {"instruct": "#2563eb", "thinking": "#d97706"}
WIDTH, HEIGHT = 290, 190  # of the plot, so that a whole chart is no wider than a phone
FAINT = {"gridOpacity": 0.15, "domainOpacity": 0.4, "tickOpacity": 0.4}
CONFIG = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {"labelColor": "currentColor", "titleColor": "currentColor", "gridColor": "currentColor", **FAINT},
    "legend": {"labelColor": "currentColor", "title": None, "orient": "bottom"},
    "title": {"color": "currentColor", "anchor": "start", "fontSize": 12},
}
WHO = {
    "field": "checkpoint",
    "type": "nominal",
    "scale": {"domain": list(COLOURS), "range": list(COLOURS.values())},
}
SHARE = {"format": ".0%"}

Row = Mapping[str, Any]


def svg(spec: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """A specification drawn with these rows as its data."""
    import vl_convert

    whole = {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "config": CONFIG,
        "width": WIDTH,
        "height": HEIGHT,
        "data": {"values": [dict(row) for row in rows]},
        **spec,
    }
    drawn: str = vl_convert.vegalite_to_svg(whole, allowed_base_urls=[])  # nothing is fetched
    return drawn


def by_iteration(task: str, rows: Sequence[Row]) -> str:
    """Accuracy by iteration with 95 % intervals; rows: iteration, checkpoint, accuracy, low, high."""
    y = {"field": "accuracy", "type": "quantitative", "title": None, "axis": SHARE}
    bounds = {"y": {"field": "low", "type": "quantitative"}, "y2": {"field": "high"}}
    x = {"field": "iteration", "type": "ordinal", "title": "iteration", "axis": {"labelAngle": 0, "grid": False}}
    layers = [
        {"mark": {"type": "rule", "opacity": 0.45}, "encoding": bounds},
        {"mark": {"type": "line", "point": {"filled": True, "size": 45}}, "encoding": {"y": y}},
    ]
    return svg({"title": f"{task} by iteration", "layer": layers, "encoding": {"x": x, "color": WHO}}, rows)


def arms(title: str, rows: Sequence[Row]) -> str:
    """Accuracy by iteration, a line an arm; rows: iteration, arm, accuracy. A single iteration is a point."""
    x = {"field": "iteration", "type": "ordinal", "title": "iteration", "axis": {"labelAngle": 0, "grid": False}}
    y = {"field": "accuracy", "type": "quantitative", "title": None, "axis": SHARE}
    arm = {"field": "arm", "type": "nominal", "sort": None, "legend": {"columns": 3}}
    mark = {"type": "line", "point": {"filled": True, "size": 45}}
    return svg({"title": title, "mark": mark, "encoding": {"x": x, "y": y, "color": arm}}, rows)


def frontier(task: str, rows: Sequence[Row]) -> str:
    """Accuracy against tokens of an answer; rows: iteration, checkpoint, accuracy, tokens. Left and up is better."""
    x = {
        "field": "tokens",
        "type": "quantitative",
        "title": "tokens an answer",
        "scale": {"type": "log", "nice": False},
    }
    y = {
        "field": "accuracy",
        "type": "quantitative",
        "title": None,
        "axis": SHARE,
        "scale": {"zero": False, "padding": 12},
    }
    label = {"text": {"field": "iteration"}, "color": {"value": "currentColor"}}
    layers = [
        {"mark": {"type": "line", "opacity": 0.35}, "encoding": {"order": {"field": "iteration"}}},
        {"mark": {"type": "point", "filled": True, "size": 60}},
        {"mark": {"type": "text", "dy": -10, "fontSize": 10}, "encoding": label},
    ]
    return svg({"title": f"{task} by tokens", "layer": layers, "encoding": {"x": x, "y": y, "color": WHO}}, rows)


def dial(task: str, rows: Sequence[Row]) -> str:
    """Accuracy and closed traces of the rebuilt thinking checkpoint by t; rows: t, share, what."""
    x = {"field": "t", "type": "quantitative", "title": "t", "axis": {"grid": False}}
    y = {"field": "share", "type": "quantitative", "title": None, "axis": SHARE, "scale": {"domain": [0, 1]}}
    what = {"field": "what", "type": "nominal", "scale": {"range": [COLOURS["thinking"], "#0d9488"]}}
    mark = {"type": "line", "point": {"filled": True, "size": 40}}
    return svg({"title": f"{task}: the dial", "mark": mark, "encoding": {"x": x, "y": y, "color": what}}, rows)


def angles(title: str, rows: Sequence[Row]) -> str:
    """The mean angle between two checkpoints' weights by layer, a line a part; rows: layer, part, angle in degrees."""
    x = {"field": "layer", "type": "quantitative", "title": "layer", "axis": {"grid": False, "tickMinStep": 1}}
    y = {"field": "angle", "type": "quantitative", "title": "°"}
    part = {"field": "part", "type": "nominal", "scale": {"range": ["#2563eb", "#d97706", "#0d9488", "#9333ea"]}}
    mark = {"type": "line", "point": {"filled": True, "size": 25}}
    return svg({"title": title, "mark": mark, "encoding": {"x": x, "y": y, "color": part}}, rows)


def curve(title: str, rows: Sequence[Row]) -> str:
    """What a trainer logged, by step, a line an iteration; rows: step, value, iteration."""
    x = {"field": "step", "type": "quantitative", "title": "step", "axis": {"grid": False}}
    y = {"field": "value", "type": "quantitative", "title": None, "scale": {"zero": False}}
    line = {"field": "iteration", "type": "ordinal", "scale": {"scheme": "viridis"}}
    return svg({"title": title, "mark": "line", "encoding": {"x": x, "y": y, "color": line}}, rows)
