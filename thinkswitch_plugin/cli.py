"""What this package's `axolotl …` commands share: an error a user can do something about is one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click


@contextmanager
def one_line() -> Iterator[None]:
    """Turn a `ValueError` or `OSError` into click's own error, of its first line, without a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise click.ClickException((str(error) or type(error).__name__).splitlines()[0]) from None
