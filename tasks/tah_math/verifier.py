r"""Whether two answers to a mathematical problem are the same thing, decided by math-verify.

Knows how answers are put together: several of them, tuples and intervals, names before an equals sign, units, per cent,
thousands separators, words. Leaves what a single expression means to math-verify, and where the answer stands in a text
to `answers.py`.

The parts are taken apart here because math-verify reads them as SymPy objects, in which `(2,1)` and `(5,3)` are both an
empty interval, a unit may be a variable and a word a product of letters.

Runs as a process of its own, a JSON object a line in and `true` or `false` a line out. SymPy computes what a model
writes, so an answer like `10^{10^{10}}` takes all time and memory there are. math-verify's own limits are no help: they
need the main thread and cannot interrupt one long multiplication of integers. Here the kernel ends the process, and
whoever asked starts another.
"""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from fractions import Fraction

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy import Basic, MatrixBase

# For one pair of answers. Seconds of CPU, so that no grade depends on how busy the machine is.
CPU_SECONDS = 5
MEMORY_BYTES = 2 * 2**30
# The longest reference answer of the five benchmarks has some 170 characters.
LONGEST_ANSWER = 2000


def same(gold: str, answer: str, tolerance: float = 0) -> bool:
    r"""Whether `answer` is the same thing as `gold`.

    - Several answers are the same in any order, written as a list, a set or with \pm; a tuple or an interval has an
      order and its kind of brackets.
    - A name (`x =`, `f(x) =`, `x \in`), a unit, a degree sign and the sign of a currency may be missing on either side.
      So may a per cent sign; where both numbers stand without one, 50 is not 0.5.
    - Words are compared as words, numbers and expressions by value: a decimal that is rounded is not the fraction.

    Args:
        gold: The reference answer: a number or LaTeX, without a box.
        answer: What the model's box holds.
        tolerance: How far a number may be off.

    Returns:
        False also for what cannot be read.
    """
    if len(answer) > LONGEST_ANSWER:
        return False
    gold, answer = _plain(gold), _plain(answer)
    if not answer:
        return False
    # "1,024" is one number or two: both readings are tried.
    readings = dict.fromkeys([(gold, answer), (_without_separators(gold), _without_separators(answer))])
    return any(_same_list(*reading, tolerance) for reading in readings)


# --- markup ---

_REPLACED = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"[−–‐‑]", "-"),
        # Not the end of a line of a matrix, which is two backslashes.
        (r"\s+|~|(?<!\\)\\(?:[;: ]|q?quad(?![a-zA-Z]))", " "),
        # What separates thousands; elsewhere these are spaces.
        (r"(?<=\d)(?:\{,\}|\\,|,\s*\\!)\s*(?=\d{3})", ","),
        (r"(?<!\\)\\[,!]", " "),
        (r"\\?\$|€|£|\*\*|`", ""),
        (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|limits|boldsymbol|bf|rm)(?![a-zA-Z])", ""),
        (r"\\lbrace(?![a-zA-Z])", r"\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\}"),
        (r"\\langle(?![a-zA-Z])", "("),
        (r"\\rangle(?![a-zA-Z])", ")"),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(leq|geq)slant(?![a-zA-Z])", r"\\\1"),
        (r"\\varnothing(?![a-zA-Z])", r"\\emptyset"),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-zA-Z])|°", ""),
        (r"\\%|\\text\s*\{\s*(?:%|percent)\s*\}|(?<=[\d}])\s*percent\b", "%"),
        (r"\\(?:text|math|mbox)(?:rm|bf|it|sf|tt|normal)?\s*\{", r"\\text{"),
        (r"\\text\{\s*([-+.]?\d[^{}]*|[ei])\s*\}", r" \1 "),
        (r"^\s*\\approx(?![a-zA-Z])", ""),
        (r"\s*,?\s*(?:\\text\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![\\a-zA-Z])(?:and|or)(?![a-zA-Z]))\s*", ", "),
    )
]


def _plain(text: str) -> str:
    """The text with one spelling for what LaTeX can say in several ways."""
    for pattern, replacement in _REPLACED:
        text = pattern.sub(replacement, text)
    return _ungrouped(text.rstrip(" .,;:").strip())


def _ungrouped(text: str) -> str:
    while text.startswith("{") and _closes(text) == len(text) - 1:
        text = text[1:-1].strip()
    return text


def _without_separators(text: str) -> str:
    return re.sub(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)", lambda number: number[0].replace(",", ""), text)


_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|.", re.DOTALL)
_OPENING = {"(", "[", "{", r"\{", r"\lfloor", r"\lceil"}
_CLOSING = {")", "]", "}", r"\}", r"\rfloor", r"\rceil"}


def _closes(text: str) -> int | None:
    """Where the bracket that begins the text closes; any kind of bracket closes any other, as in `[1, 2)`."""
    depth = 0
    for token in _TOKEN.finditer(text):
        depth += (token[0] in _OPENING) - (token[0] in _CLOSING)
        if depth <= 0:
            return token.start()
    return None


def _split(text: str, separators: str) -> list[str]:
    """The text's parts between separators that stand outside all brackets."""
    parts, depth, start = [], 0, 0
    for token in _TOKEN.finditer(text):
        depth += (token[0] in _OPENING) - (token[0] in _CLOSING)
        if depth == 0 and token[0] in separators:
            parts.append(text[start : token.start()])
            start = token.end()
    return [part.strip() for part in [*parts, text[start:]]]


# --- several answers ---


def _same_list(gold: str, answer: str, tolerance: float) -> bool:
    if _compact(gold) == _compact(answer):
        return True
    golds, answers = _listed(gold), _listed(answer)
    if len(golds) == len(answers) == 1:
        return _same_item(golds[0], answers[0], tolerance)
    if len(golds) == 1 and _bracketed(golds[0]):
        # "x=3, y=2" for (3,2)
        inside = _split(golds[0][1:-1], ",")
        return len(inside) == len(answers) and all(
            _same_item(*pair, tolerance) for pair in zip(inside, answers, strict=True)
        )
    # A repeated root may be repeated or not.
    if len(answers) > 2 * len(golds):
        return False

    def among(one: str, others: list[str], same_item: Callable[[str, str], bool]) -> bool:
        return any(same_item(one, other) for other in others)

    def agree(gold: str, answer: str) -> bool:
        names = {_name(gold), _name(answer)} - {None}
        return len(names) < 2 and _same_item(gold, answer, tolerance)

    return all(among(gold, answers, agree) for gold in golds) and all(
        among(answer, golds, lambda answer, gold: agree(gold, answer)) for answer in answers
    )


def _listed(text: str) -> list[str]:
    r"""The elements of a list or a set, "x = 1 \pm 2" being two."""
    if text.startswith(r"\{") and _closes(text) == len(text) - 2:
        text = text[2:-2].strip()
    elements = []
    for element in filter(None, _split(text, ",;")):
        if re.search(r"\\(?:pm|mp)(?![a-zA-Z])", element):
            for plus, minus in ("+-", "-+"):
                one = re.sub(r"\\pm(?![a-zA-Z])", plus, element)
                elements.append(re.sub(r"^(\(?)\+", r"\1", re.sub(r"\\mp(?![a-zA-Z])", minus, one)))
        else:
            elements.append(element)
    return [_ungrouped(element) for element in elements] or [text]


def _bracketed(text: str) -> bool:
    return text[:1] in ("(", "[") and _closes(text) == len(text) - 1 and len(_split(text[1:-1], ",")) > 1


# --- one answer ---

_EQUALS = re.compile(r"(?<![<>!:\\=])=(?!=)")
_SUBSCRIPT = re.compile(r"_\s*(?:\{[^{}]*\}|\\?\w)")
_NAMED = re.compile(r"(?:\\[a-zA-Z]+(?![a-zA-Z])|[a-zA-Z']|\s)*(?:\([a-zA-Z\s,]*\))?\s*")
_ELEMENT = re.compile(r"^[a-zA-Z]\s*\\in(?![a-zA-Z])\s*")


def _same_item(gold: str, answer: str, tolerance: float) -> bool:
    gold, answer = _ELEMENT.sub("", gold), _ELEMENT.sub("", answer)
    gold_sides, answer_sides = _EQUALS.split(gold), _EQUALS.split(answer)
    if len(gold_sides) == 1 or (_name(gold) is not None and _name(answer) is not None):
        gold, answer = gold_sides[-1].strip(), answer_sides[-1].strip()
    elif _name(gold) is not None and len(answer_sides) == 1:
        gold = gold_sides[-1].strip()
    if _compact(gold) == _compact(answer) != "":
        return True
    if _bracketed(gold) or _bracketed(answer):
        golds, answers = (_split(side[1:-1], ",") for side in (gold, answer))
        return (
            (gold[:1], gold[-1:], len(golds)) == (answer[:1], answer[-1:], len(answers))
            and _bracketed(answer)
            and all(_same_list(*pair, tolerance) for pair in zip(golds, answers, strict=True))
        )
    if gold.startswith(r"\text{"):
        # To math-verify a word is the product of its letters.
        return _words(gold) == _words(answer)
    return _same_expression(gold, answer, tolerance)


def _name(text: str) -> str | None:
    """What an equation defines: "x", "f(x)"; None if there is no equals sign, or an expression before it."""
    sides = _EQUALS.split(text)
    if len(sides) == 1 or not _NAMED.fullmatch(_SUBSCRIPT.sub("", sides[0])):
        return None
    return _compact(sides[0])


def _compact(text: str) -> str:
    return re.sub(r"\s+", "", text)


_WORDS = re.compile(r"\\text\{\s*([^{}]*[a-zA-Z][^{}]*)\}|\(?([a-zA-Z])\)?|([a-zA-Z]{2,}(?:[ -][a-zA-Z]+)*)")


def _words(text: str) -> str:
    """An answer in words, or the letter of a choice, without an article; otherwise the text as it stands."""
    match = _WORDS.fullmatch(text)
    return re.sub(r"^(?:an?|the) |[^a-z]", "", match[match.lastindex].lower()) if match else text


# --- one expression ---

_UNIT = re.compile(r"(?<=[\d})!%])\s*\\text\{[^{}]*\}(?:\s*\^\s*\{?\d\}?)?$")
_BARE_UNIT = re.compile(r"(?<=[\d})!%])\s+[a-zA-Z]{2,}(?: [a-zA-Z]{2,}|/[a-zA-Z]+)*(?:\s*\^\s*\{?\d\}?)?$")
_LETTER = re.compile(r"(?<![a-zA-Z\\])[a-zA-Z]")
_IN_BASE = re.compile(r"(\d[\dA-F]*)_\s*\{?\s*(\d+)\s*\}?")
_LATEX = LatexExtractionConfig(
    # Its units include single letters, which are variables here.
    normalization_config=NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
    )
)


def _same_expression(gold: str, answer: str, tolerance: float) -> bool:
    gold, answer = _UNIT.sub("", gold), _UNIT.sub("", answer)
    if not _LETTER.search(gold):
        # Two letters may be two variables, but not where the reference is a number.
        answer = _BARE_UNIT.sub("", answer)
    bases = [_IN_BASE.fullmatch(text) for text in (gold, answer)]
    if any(bases):
        # math-verify ignores the base.
        digits = [base[1] if base else text for base, text in zip(bases, (gold, answer), strict=True)]
        return digits[0] == digits[1] and (not all(bases) or bases[0][2] == bases[1][2])
    per_cent = [text.endswith("%") for text in (gold, answer)]
    numbers = [text.removesuffix("%").strip() for text in (gold, answer)]
    if _same_value(*numbers, tolerance):
        return True
    # 62.5% is also 0.625 or 5/8.
    if per_cent == [True, False]:
        return _same_value(rf"\frac{{{numbers[0]}}}{{100}}", numbers[1], tolerance / 100)
    if per_cent == [False, True]:
        return _same_value(numbers[0], rf"\frac{{{numbers[1]}}}{{100}}", tolerance)
    return False


def _same_value(gold: str, answer: str, tolerance: float) -> bool:
    numbers = [Fraction(text) for text in (gold, answer) if re.fullmatch(r"[-+]?(?:\d+\.?\d*|\.\d+)", text)]
    if len(numbers) == 2:
        # A little more than the tolerance, which is no exact binary number.
        return abs(numbers[0] - numbers[1]) <= Fraction(tolerance) * Fraction(101, 100)
    golds, answers = _parsed(gold), _parsed(answer)
    if verify(golds, answers, timeout_seconds=None):
        return True
    return bool(tolerance and golds and answers and _within(golds[0], answers[0], tolerance))


# Not the argument of a function: \log_2(8), \sin^2(x).
_PRODUCT = re.compile(r"((?<![\w^])\d+|\))\s*(?=\()")


def _parsed(text: str) -> list[Basic | MatrixBase]:
    # math-verify reads 2(35) as the mixed number 2 + 35.
    text = _PRODUCT.sub(r"\1\\cdot", text)
    return parse(f"${text}$", extraction_config=[_LATEX], fallback_mode="no_fallback", parsing_timeout=None)


def _within(gold: Basic | MatrixBase, answer: Basic | MatrixBase, tolerance: float) -> bool:
    try:
        return bool(abs(gold.evalf() - answer.evalf()) <= tolerance * 1.01)
    except (AttributeError, TypeError):
        # No numbers.
        return False


# --- the process ---


def _serve() -> None:
    """Answer questions until there are no more."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    # Nothing that a library prints may pass for a reply.
    sys.stdout = sys.stderr
    # It warns that its own limits are off.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    # Its default action ends the process without asking Python, which would first finish the multiplication.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            verdict = same(**json.loads(line))
        except Exception:
            # SymPy raises whatever it likes on what it cannot compute, a RecursionError and a MemoryError among them.
            verdict = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(verdict), file=replies, flush=True)


if __name__ == "__main__":
    _serve()
