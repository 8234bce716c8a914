"""Grade what a model wrote: cut the trace off, read the final answer, compare it with the gold one.

Knows how models state an integer or a decision (yes, no, maybe), and where a boxed answer stands. Leaves the tags of a
trace to `split_trace`, which model wrote a text to the column `trace_opened` (see `dataset.py`), and what a box holds,
where that is neither, to the task that asked for it.

What follows the trace is all that is graded, and a trace that never closes is a wrong answer, whatever number the
unfinished reasoning holds. A reader returns None where it finds no answer, or one it cannot read: never a guess.

A grader says by its attribute `reads` what it reads of an answer without its trace: where a question is asked several
times, answers that read the same agree (maj@k).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from thinkswitch_plugin.trace_stripping import split_trace

# --- one answer, graded ---


def grade_integer(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, int]:
    """Grade one answer whose gold is an integer.

    Args:
        doc: The row; `answer` is an integer or its digits, `trace_opened` says whether the template opened the trace.
        results: The model's text, first in the list, as lm-eval's `process_results` gets it.

    Returns:
        The metrics of `count_traces` and `exact_match`, each 0 or 1.
    """
    gold = int(doc["answer"])
    return _grade(doc, results, lambda answer: read_integer(answer) == gold)


def grade_decision(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, int]:
    """Grade one answer whose gold is yes, no or maybe; otherwise as `grade_integer`."""
    return _grade(doc, results, lambda answer: read_decision(answer) == doc["answer"])


def grade_boxed(doc: Mapping[str, Any], results: Sequence[str], is_right: Callable[[str], bool]) -> dict[str, int]:
    r"""Grade one answer by what its last `\boxed{}` with content holds; without one it is wrong.

    Args:
        doc: The row; `trace_opened` says whether the template opened the trace.
        results: As for `grade_integer`.
        is_right: Whether the content of the box is the gold answer.

    Returns:
        As `grade_integer`.
    """
    return _grade(doc, results, lambda answer: bool(box := _last_box(answer)) and is_right(box))


def count_traces(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, int]:
    """Say how the trace of one answer ended, for prompts that have no gold answer.

    Args:
        doc: The row; `trace_opened` says whether the template opened the trace.
        results: As for `grade_integer`.

    Returns:
        `closed_trace` (a trace that closed, then an answer) and `truncated` (a trace that never closed), each 0 or 1;
        both 0 where there was no trace, and where nothing but white space was left for the answer.
    """
    status = _trace(doc, results).status
    return {"closed_trace": int(status == "closed"), "truncated": int(status == "unclosed")}


def _grade(doc: Mapping[str, Any], results: Sequence[str], is_right: Callable[[str], bool]) -> dict[str, int]:
    answer = _trace(doc, results).answer
    return {"exact_match": int(answer is not None and is_right(answer)), **count_traces(doc, results)}


def _trace(doc: Mapping[str, Any], results: Sequence[str]) -> Any:
    # A server that returned nothing at all gives None.
    return split_trace(results[0] or "", opened=bool(doc["trace_opened"]))


# --- markup ---

_BOX = re.compile(r"\\?\b(?:boxed|fbox)\s*\{|\\(?:boxed|fbox)\s*(?=[^\s{])")
_BARE = re.compile(r"[^\s$]*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_WRAPPER = re.compile(r"(?:\\(?:text|math|bold|mbox|underline)[a-z]*\s*|(?<![\w}^_\\]))\{([^{}]*)\}")
_SPACING = re.compile(
    r"\\(?:[,;:! \\()\[\]]|(?:q?quad|left|right|displaystyle|[lL]arge|[hH]uge|bf)(?![a-z]))"
    r"|[~\u00a0\u2000-\u200b\u202f]"
)
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:,|\\[,!]|\{,\}|,\\!)\d{3})+(?![\d,])")
_DROPPED = re.compile(r"\*\*|__|`|\\?\$|\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\(?:circ|degree)(?![a-z])|°|\\?%")
_DASHES = str.maketrans("−–‐‑", "----")


def read_box(text: str) -> str | None:
    r"""Read what the last `\boxed{}` with content holds, without markup and white space.

    Args:
        text: An answer without its trace.

    Returns:
        The content, or None where there is no box or it never closes.
    """
    return "".join(_plain(_last_box(text) or "").split()) or None


def _last_box(text: str) -> str | None:
    """The content of the last box that has any; None where there is no box, "" where the last one never closes."""
    for box in reversed(list(_BOX.finditer(text))):
        if box[0].endswith("{"):
            end = _closing_brace(text, box.end())
            if end is None:
                return ""
        else:
            end = _BARE.match(text, box.end()).end()
        if text[box.end() : end].strip():
            return text[box.end() : end]
    return None


def _closing_brace(text: str, start: int) -> int | None:
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if not depth:
            return brace.start()
    return None


def _plain(text: str) -> str:
    """The text without markdown emphasis, LaTeX styling, typographic variants, blank lines and runs of white space."""
    text = _tidy(text.translate(_DASHES))
    text = _THOUSANDS.sub(lambda number: re.sub(r"\D", "", number[0]), text)
    # Styles nest two or three deep at most; a fixed number of passes keeps hostile nesting linear.
    for _ in range(4):
        text = _WRAPPER.sub(r" \1 ", text)
    return _tidy(_DROPPED.sub("", _SPACING.sub(" ", text)))


def _tidy(text: str) -> str:
    """The text without blank lines and runs of white space, over which the patterns below would be quadratic."""
    return "\n".join(" ".join(line.split()) for line in text.splitlines() if line.strip())


# --- integers ---

# A minus sign touches its digits and no operand before it: "-277" and "is -277", but not "1-277" or the bullet "- 277".
# A digit in a power, an index, a fraction or a LaTeX group is part of something else than a stated number; "not 277"
# states none.
_NUMBER = r"(?<!\bnot )(?:(?<![\w)\]}])[-+]|(?<![\w.^/_{]))\d+(?:\.\d+)?(?!\w|\.\d|\s*\^|\s*/\s*\d)"
_NUMBERS = re.compile(_NUMBER)
_LEADING = re.compile(rf"[\s(\[\"'“]*({_NUMBER})(?!\s*(?:[-+*/×·]\s*[\w(\\]|[=<>≡≈]|\\[a-z]))")
_MODULUS = re.compile(r"\(?\s*\\?\b[pb]?mod(?:ulo)?\s*(?:\{\s*)?\d+\s*\}?\s*\)?|\bdivided by\s+\d+", re.IGNORECASE)
_EQUALS = re.compile(r"=|≡|≈|→|⇒|\\(?:equiv|approx|to|implies|[Rr]ightarrow)(?![a-z])")
_OPERATOR = re.compile(r"[-+*/^_<>|!\\×·÷√{}]")
_SEVERAL = re.compile(r"[,;]\s*\S|\b(?:and|or)\b")
_ANSWER = re.compile(
    r"\banswers?\b(?:[^.\n=:]{0,80}?(?:\b(?:is|are|be|equals)\b|[=:])|[^\w\n]*\n)[\s:]*", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"\n|[.;](?=\s|$)")
_LIST_MARKER = re.compile(r"^\s*\d+[.)]\s+(?=\S)")


def read_integer(text: str) -> int | None:
    r"""Read the final integer: what the last `\boxed{}` holds, else what is last said to be the answer.

    Without a box that is the last "the answer is …" with a number, else the last line with a number: there what the
    last equals sign gives, else its last number. Leading zeros, thousands separators, a fraction of zeros, units and a
    modulus are looked through; "277.5", "277/2" and a box with two numbers are no integers.

    Args:
        text: An answer without its trace.

    Returns:
        The integer, or None.
    """
    box = _last_box(text)
    if box is not None:
        return _boxed_integer(_MODULUS.sub(" ", _plain(box)).strip())
    return _as_integer(_stated_number(_MODULUS.sub(" ", _plain(text))))


def _boxed_integer(content: str) -> int | None:
    if _SEVERAL.search(content):
        return None
    for side in reversed(_EQUALS.split(re.sub(r"^-\s+", "-", content))):
        numbers = list(_NUMBERS.finditer(side))
        if len(numbers) == 1:
            around = side[: numbers[0].start()] + side[numbers[0].end() :]
            if not _OPERATOR.search(around) and not re.search(r"\d", around):
                return _as_integer(numbers[0][0])
    return None


def _stated_number(text: str) -> str | None:
    for statement in reversed(list(_ANSWER.finditer(text))):
        said = _SENTENCE_END.split(text[statement.end() : statement.end() + 300])[0]
        number = _leading_number(said) or _concluded_number(said)
        if number:
            return number
    for line in reversed(text.splitlines()):
        number = _concluded_number(_LIST_MARKER.sub("", line))
        if number:
            return number
    return None


def _concluded_number(said: str) -> str | None:
    for side in reversed(_EQUALS.split(said)[1:]):
        number = _leading_number(side)
        if number:
            return number
    return next((number[0] for number in reversed(list(_NUMBERS.finditer(said)))), None)


def _leading_number(said: str) -> str | None:
    number = _LEADING.match(said)
    return number[1] if number else None


def _as_integer(number: str | None) -> int | None:
    whole, _, fraction = (number or "").partition(".")
    # Nothing asks for more digits, and Python refuses to convert thousands of them.
    return int(whole) if 0 < len(whole) <= 40 and not fraction.strip("0") else None


# --- decisions ---

# "No" before a noun is a determiner ("no difference"), "maybe" before a verb an adverb: neither decides the question.
# Before one of these words, or any punctuation, they do.
_AFTER_DECISION = (
    "according|although|and|as|at|based|because|but|due|for|from|given|however|i|if|in|is|it|not|on|since|that|the|there"
    "|therefore|these|they|this|though|to|was|we|when|while|with"
)
_DECISION = rf"(?<![\w/-])(yes|(?:no|maybe)(?![^\S\n]+(?!(?:{_AFTER_DECISION})\b)[a-z]))(?![\w/-]|['’]\w)"
_OPTION = r"[\"'“]?\b(?:yes|no|maybe)\b[\"'”]?"
_OPTIONS = re.compile(rf"{_OPTION}(?:, ?{_OPTION}){{0,2}}(?:,? ?(?:[/|]|\bor\b|\band\b) ?{_OPTION}){{1,2}}")
_HEDGE = (
    r"(?:(?:a|an|clear|clearly|definite|definitely|indeed|just|likely|most|probably|qualified|simple|simply|still|tentative"
    r"|then|therefore|thus)\s+)*"
)
_DECIDED = [
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        # "the answer is yes", "Final decision: no", a heading "Answer" with the decision below it
        rf"\b(?:answer|conclusion|decision|prediction|response|verdict)\b[^.\n]{{0,60}}?(?:\b(?:is|be)\b|[:=→]|\n)"
        rf"\s*{_HEDGE}[^\w\n]*{_DECISION}",
        # the decision alone on its line
        rf"^[^\w\n]*{_DECISION}[^\w\n]*$",
    )
]
_OPENING = re.compile(rf"\W*{_DECISION}")
_CLOSING = [
    # "…, so no", "I would say yes", "leaning towards maybe"
    re.compile(
        r"\b(?:say|conclude|conclusion|lean(?:s|ing)?|towards?|suggests?|supports?|hence|overall|so|therefore|thus|is|be)\b"
        rf"[\s:,-]*[\"'“]?{_DECISION}"
    ),
    # "The evidence is mixed: maybe."
    re.compile(rf"[:,;.\n-]\s*[\"'“]?{_DECISION}\W*\Z"),
]


def read_decision(text: str) -> str | None:
    r"""Read the final decision of an answer: yes, no or maybe, said in these words.

    The last `\boxed{}` decides; else the last "the answer is …"; else the last line with nothing but a decision; else
    the first word; else the last "so …" or "I would say …"; else the last word. What only looks like a decision is
    looked past: "not", "no difference", a list of the options. "Unclear" is not "maybe": the prompt names the words.

    Args:
        text: An answer without its trace.

    Returns:
        "yes", "no" or "maybe", or None.
    """
    box = _last_box(text)
    if box is not None:
        boxed = re.fullmatch(r"\W*(yes|no|maybe)\W*", _plain(box).lower())
        return boxed[1] if boxed else None
    text = _OPTIONS.sub(" ", re.sub(r"[*#>]", "", _plain(text)).lower()).strip()
    for pattern in _DECIDED:
        if decisions := pattern.findall(text):
            return decisions[-1]
    if opening := _OPENING.match(text):
        return opening[1]
    for pattern in _CLOSING:
        if decisions := pattern.findall(text):
            return decisions[-1]
    return None


grade_integer.reads = read_integer
grade_decision.reads = read_decision
