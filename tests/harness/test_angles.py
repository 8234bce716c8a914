"""Angles between weights: the math against vectors written out, and against mergekit's own slerp."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from harness import angles
from harness.angles import Apart, by_layer, main, measured, sentences, summed_up
from harness.errors import LoopError
from harness.stages import angles as stage

degrees = st.floats(0.01, 179.99)
lengths = st.floats(1e-3, 1e3)
ts = st.floats(0, 1)


def between(theta: float, a: float, b: float) -> Apart:
    """Two vectors in the plane at an angle of `theta` degrees, as far apart as they are."""
    x, y = b * math.cos(math.radians(theta)), b * math.sin(math.radians(theta))
    return Apart("w", a, b, math.hypot(x - a, y))


def merged(one: torch.Tensor, other: torch.Tensor, t: float) -> torch.Tensor:
    """mergekit's own slerp of two tensors."""
    from mergekit.merge_methods.slerp import slerp

    return slerp(torch.tensor([t], dtype=one.dtype), one[None], other[None])[0]


@given(degrees, lengths, lengths)
def test_the_angle_is_that_of_the_vectors(theta: float, a: float, b: float) -> None:
    assert math.degrees(between(theta, a, b).angle) == pytest.approx(theta, rel=1e-6, abs=1e-4)


@given(degrees, lengths, lengths, ts)
def test_slerp_and_lerp_differ_as_in_the_plane(theta: float, a: float, b: float, t: float) -> None:
    radians = math.radians(theta)
    one, other = (a, 0.0), (b * math.cos(radians), b * math.sin(radians))
    if abs(math.cos(radians)) > angles.STRAIGHT:
        expected = 0.0
    else:
        weights = [math.sin((1 - t) * radians) / math.sin(radians), math.sin(t * radians) / math.sin(radians)]
        arc = [weights[0] * x + weights[1] * y for x, y in zip(one, other, strict=True)]
        line = [(1 - t) * x + t * y for x, y in zip(one, other, strict=True)]
        expected = math.dist(arc, line) / math.dist(one, other)
    if abs(abs(math.cos(radians)) - angles.STRAIGHT) > 1e-6:
        assert between(theta, a, b).differ(t) == pytest.approx(expected, rel=1e-5, abs=1e-7)


@given(degrees, lengths, lengths, ts)
def test_they_meet_at_both_ends_and_differ_alike_from_either(theta: float, a: float, b: float, t: float) -> None:
    pair, turned = between(theta, a, b), between(theta, b, a)
    assert pair.differ(0) == pytest.approx(0, abs=1e-12)
    assert pair.differ(1) == pytest.approx(0, abs=1e-12)
    assert pair.differ(t) == pytest.approx(turned.differ(1 - t), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("scale", [0.02, 0.05, 0.3, 1.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_mergekit_merges(scale: float, dtype: torch.dtype, tmp_path: Path) -> None:
    drawn = torch.Generator().manual_seed(0)
    one = torch.randn(37, 11, generator=drawn)
    other = (one + scale * torch.randn(37, 11, generator=drawn)).to(dtype)
    one = one.to(dtype)
    for name, weights in (("one", one), ("other", other)):
        (tmp_path / name).mkdir()
        save_file({"w": weights}, tmp_path / name / "model.safetensors")
    (found,) = measured(tmp_path / "one", tmp_path / "other")
    a, b = one.double(), other.double()
    cosine = float((a * b).sum() / a.norm() / b.norm())
    assert found.angle == pytest.approx(math.acos(cosine), rel=1e-6)
    for t in (0.1, 0.5, 0.9):
        differ = float((merged(a, b, t) - ((1 - t) * a + t * b)).norm() / (b - a).norm())
        assert found.differ(t) == pytest.approx(differ, rel=1e-6, abs=1e-9)
    assert found.straight == (scale < 0.03)


def test_equal_tensors_are_not_apart_to_the_last_bit_and_zeros_are_at_a_right_angle(tmp_path: Path) -> None:
    weights = {"w": torch.randn(3, 1000), "zero": torch.zeros(4), "one": torch.tensor(2.0)}
    other = {**weights, "zero": torch.ones(4), "one": torch.tensor(-2.0), "more": torch.ones(1)}
    for name, tensors in (("one", weights), ("other", other)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    found = {one.name: one for one in measured(tmp_path / "one", tmp_path / "other")}
    assert set(found) == {"w", "zero", "one"}  # what both have
    assert (found["w"].angle, found["w"].differ(0.5), found["w"].straight) == (0.0, 0.0, True)
    # mergekit's slerp of zeros and ones gives sin(π/4) of these, lerp half of them.
    assert (found["zero"].angle, found["zero"].straight) == (math.pi / 2, False)
    assert found["zero"].differ(0.5) == pytest.approx(math.sin(math.pi / 4) - 0.5)
    assert (found["one"].angle, found["one"].straight) == (pytest.approx(math.pi), True)


def test_what_is_read_in_pieces_is_the_same(tmp_path: Path, monkeypatch: Any) -> None:
    for number, name in enumerate(("one", "other")):
        (tmp_path / name).mkdir()
        drawn = torch.Generator().manual_seed(number)
        save_file({"w": torch.randn(101, 7, 3, generator=drawn)}, tmp_path / name / "model.safetensors")
    (whole,) = measured(tmp_path / "one", tmp_path / "other")
    monkeypatch.setattr(angles, "PIECE", 64)
    (pieces,) = measured(tmp_path / "one", tmp_path / "other")
    assert list(pieces[1:]) == pytest.approx(list(whole[1:]), rel=1e-12)


NAMES = {
    "model.embed_tokens.weight": ("embeddings", None),
    "lm_head.weight": ("embeddings", None),
    "model.norm.weight": ("norms", None),
    "model.layers.3.self_attn.q_proj.weight": ("attention", 3),
    "model.layers.3.self_attn.q_norm.weight": ("norms", 3),
    "model.layers.12.mlp.down_proj.weight": ("mlp", 12),
    "model.layers.0.post_attention_layernorm.weight": ("norms", 0),
    "rotary.inv_freq": ("other", None),
}


@pytest.mark.parametrize(("name", "place"), NAMES.items())
def test_where_a_tensor_belongs(name: str, place: tuple[str, int | None]) -> None:
    one = Apart(name, 1, 1, 0)
    assert (one.part, one.layer) == place


def test_parts_are_summed_up_and_said() -> None:
    found = [between(theta, 1, 2)._replace(name=f"model.layers.{at}.mlp.w") for at, theta in enumerate((1, 10, 40))]
    found.append(between(90, 1, 1)._replace(name="model.embed_tokens.weight"))
    every, embeddings, mlp = summed_up(found, [0.0, 0.1, 0.5])
    assert (every.part, every.tensors, every.straight) == ("all", 4, 0.25)
    assert [mlp.least, mlp.median, mlp.most] == pytest.approx([1, 10, 40])
    assert (embeddings.differ, embeddings.at) == (pytest.approx((math.sqrt(0.5) - 0.5) / 1, rel=1e-6), 0.5)
    assert [(row["layer"], row["angle"]) for row in by_layer(found)] == [
        (0, pytest.approx(1)),
        (1, pytest.approx(10)),
        (2, pytest.approx(40)),
    ]
    (line,) = sentences({"the pair": [every]})
    assert line.startswith(
        "the pair: 1.00° to 90.00° apart, half of 4 tensors below 25.00°; mergekit takes lerp for 25%"
    )
    (line,) = sentences({"the pair": summed_up(found[:1], [0.5])[:1]})
    assert line.endswith("slerp and lerp differ nowhere")


def test_the_command_measures_the_shipped_pair(recipes: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    out = tmp_path / "angles.json"
    monkeypatch.setattr(
        sys, "argv", ["angles", *(str(recipes / "mini" / n) for n in ("thinking", "instruct")), "--out", str(out)]
    )
    main()
    facts = stage.read(tmp_path, None)  # type: ignore[arg-type]
    assert facts == json.loads(out.read_text())
    every, *parts = summed_up(angles.of_json(facts), [0.5])
    assert [one.part for one in parts] == ["embeddings", "attention", "mlp", "norms"]
    assert sum(one.tensors for one in parts) == every.tensors == 46
    assert stage.note(facts) == f"{every.least:.2f}° to {every.most:.2f}° over 46 tensors"
    assert json.loads(capsys.readouterr().out)[0]["part"] == "all"


def test_what_cannot_be_compared_is_refused_in_a_line(tmp_path: Path, monkeypatch: Any) -> None:
    for name, shape in (("one", (2, 3)), ("other", (3, 2)), ("none", ())):
        (tmp_path / name).mkdir()
        if shape:
            save_file({"w": torch.ones(shape)}, tmp_path / name / "model.safetensors")
    with pytest.raises(LoopError, match=r"w: is \[2, 3\] in"):
        list(measured(tmp_path / "one", tmp_path / "other"))
    with pytest.raises(LoopError, match=r"has no .*safetensors weights"):
        list(measured(tmp_path / "one", tmp_path / "none"))
    (tmp_path / "none/model.safetensors").write_bytes(b"half")
    monkeypatch.setattr(
        sys, "argv", ["angles", str(tmp_path / "one"), str(tmp_path / "none"), "--out", str(tmp_path / "a")]
    )
    with pytest.raises(SystemExit, match="not a whole safetensors file"):
        main()
