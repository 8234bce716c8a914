"""What commands share: an error a user can do something about is one line, and what a model wrote is only shown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import click

# A terminal obeys control characters, and a page may not hold them; what turns the direction of a line hides it.
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
VISIBLE |= dict.fromkeys([*range(0x80, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)
COLOUR = re.compile(r"(\x1b\[[0-9;]*m)")


def visible(text: str, coloured: bool = False) -> str:
    """A text whose control characters are seen and not obeyed; `coloured` lets colours through, as a log has."""
    if not coloured:
        return text.translate(VISIBLE)
    return "".join(part if COLOUR.fullmatch(part) else part.translate(VISIBLE) for part in COLOUR.split(text))


def on_one_line(text: str) -> str:
    """A text of somebody else's as a message can bear it: `visible`, and without its lines."""
    return " ".join(visible(text).split())


@contextmanager
def one_line() -> Iterator[None]:
    """Turn a `ValueError` or `OSError` into click's own error, of its first line, without a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise click.ClickException((str(error) or type(error).__name__).splitlines()[0]) from None
