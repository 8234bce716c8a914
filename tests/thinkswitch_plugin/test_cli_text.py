"""What a model wrote is shown, and no terminal obeys it."""

from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from thinkswitch_plugin.cli import visible


@given(st.text())
def test_no_control_character_is_left(text: str) -> None:
    shown = visible(text)
    assert len(shown) == len(text)
    assert not [c for c in shown if unicodedata.category(c) == "Cc" and c not in "\n\t"]
    assert not set("‪‫‬‭‮⁦⁧⁨⁩") & set(shown)
    assert visible(shown) == shown


def test_of_a_log_colours_alone_go_through() -> None:
    hostile = "\x1b[1;31mred\x1b[0m\x1b]0;title\x07\x1b[2J\x1b[31"
    assert visible(hostile, coloured=True) == "\x1b[1;31mred\x1b[0m␛]0;title␇␛[2J␛[31"
    assert visible(hostile) == "␛[1;31mred␛[0m␛]0;title␇␛[2J␛[31"
