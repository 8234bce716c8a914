"""What goes wrong with texts, bytes and settings on their way: cut, doubled, spliced, of another type, too deep.

Everything is drawn from one `random.Random`, so that a failure's number gives its input again.
"""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

ODD = [
    *("", " ", "\n", "\r\n", "\t", "\0", "\x1b[31m", "\x7f", "\ufeff", "\u2028", "\u202e", "\ud800", "😀", "é", "ﬁ"),
    *("٣", "½", "²", "<think>", "</think>", "<think", "</think", "<THINK >", "</ think>", "<|im_end|>", "```", "$$"),
    *("\\", "\\\\", "{", "}", "\\boxed{", "\\boxed", "}}", "\\frac{1}{2}", "-", "−", "=", "answer is ", "yes", "no"),
    *("maybe", "277", "0", "9" * 50, "1e999", "nan", "null", "true", "None", "'", '"', "%s", "{{ x }}", "{% raw %}"),
    *("$(true)", "; true", "../..", "~", "<<stage>>", "!!python/object:os.system x", "&a [*a, *a]", "*a", "- ", ": "),
    *("# ", "---\n", "[", "]", ",", "|\n", ">\n"),
]
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 3.5, -0.0, 1e308, math.inf, math.nan, 2**63, 10**40),
    *("", "x", "0", "nan", " ", "\0", "\ud800", "../..", "/dev/null", "/dev/zero", "~", "a" * 100_000, "<<stage>>"),
    *([], {}, [[]], {"": None}, [None], {"a": {"b": "c"}}),
]
LONGEST = 200_000  # characters


def text(chance: random.Random, corpus: Sequence[str]) -> str:
    """One of a corpus, changed in one to four places."""
    found = chance.choice(corpus)
    for _ in range(chance.randint(1, 4)):
        at, to = sorted(chance.randint(0, len(found)) for _ in range(2))
        match chance.randrange(8):
            case 0:
                found = found[:at] + found[to:]
            case 1:
                found = found[:at] + chance.choice(ODD) + found[at:]
            case 2:
                found = found[:to] + found[at:to] * chance.choice((1, 2, 50)) + found[to:]
            case 3:
                found = found[:at] + chance.choice(corpus) + found[to:]
            case 4:
                found = found[:at] + found[at:to].swapcase() + found[to:]
            case 5:
                found = found[:at] + chr(chance.randrange(chance.choice((128, 0xD000)))) + found[at + 1 :]
            case 6:
                found = found[:at] + chance.choice(ODD) * chance.choice((2, 30, 3000)) + found[to:]
            case _:
                found = found[:at]
        found = found[:LONGEST]
    return found


def some_bytes(chance: random.Random, whole: bytes, first: int | None = None) -> bytes:
    """Bytes with one to four flipped, cut, doubled or overwritten, all of them among the `first` so many."""
    found = bytearray(whole)
    for _ in range(chance.randint(1, 4)):
        end = min(len(found), first or len(found))
        at, to = sorted(chance.randint(0, end) for _ in range(2))
        match chance.randrange(6):
            case 0 if at < len(found):
                found[at] ^= 1 << chance.randrange(8)
            case 1:
                del found[at:to]
            case 2:
                found[at:at] = found[at:to]
            case 3:
                found[at:to] = chance.randbytes(min(to - at, 64))
            case 4:
                found[at:at] = chance.choice(ODD).encode("utf-8", "replace")
            case _:
                del found[at if first is None else to :]
    return bytes(found)


def bent(chance: random.Random, value: Any) -> Any:
    """Plain data with one to three places of another value, key or depth."""
    found = copy.deepcopy(value)
    for _ in range(chance.randint(1, 3)):
        places = list(_places(found))
        if not places:
            return chance.choice(VALUES)
        holder, key = chance.choice(places)
        match chance.randrange(6):
            case 0 | 1 | 2:
                holder[key] = copy.deepcopy(chance.choice(VALUES))
            case 3:
                del holder[key]
            case 4 if isinstance(holder, dict):
                holder[text(chance, [str(key)])[:100]] = holder.pop(key)
            case 4:
                holder[key] = [holder[key]] * chance.choice((2, 20))
            case _:
                for _ in range(chance.choice((1, 3, 100))):
                    holder[key] = chance.choice(([holder[key]], {"a": holder[key]}))
    return found


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


@contextmanager
def in_time(what: object, seconds: float = 1.0) -> Iterator[None]:
    """Fail where something takes a second of this thread's work; `what` is shown, to have it again."""
    begun = time.thread_time()
    yield
    taken = time.thread_time() - begun
    assert taken < seconds, f"{taken:.1f} s for {what!r:.2000}"
