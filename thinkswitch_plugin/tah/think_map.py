"""See a TaH model think: an answer with each token's depth and how sure the decider was, as text and as a page.

Knows tokens of one answer and how they look in Rich and in HTML. Leaves to others: the command line, and what many
answers cost (`cost`).

Colour says the decider's probability; that a token iterated is also said without colour, by a line under it or, where
nothing can be underlined, by brackets around it.
"""

from __future__ import annotations

import html
import math
from typing import Any, NamedTuple

import torch
from rich.text import Text
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from thinkswitch_plugin.cli import visible
from thinkswitch_plugin.tah.model import TaHForCausalLM

BANDS = (0.1, 0.5, 0.9, 1.0)  # up to which probability of another pass a colour holds
# The last colour is for a token that iterated with no decider to say how likely.
ON_TERMINAL = ("default", "yellow", "dark_orange", "bold red", "cyan")
ON_PAGE = ("inherit", "#fef3c7", "#fdba74", "#fca5a5", "#a5f3fc")


class ThinkMap(NamedTuple):
    """One answer, token by token.

    Attributes:
        tokens: the text of each, which add up to the answer; of the tokens that share a character, the last has it.
        depths: passes that it took to predict each.
        probabilities: the learned decider's, that another pass is needed after the first; NaN where it was not asked.
    """

    tokens: list[str]
    depths: list[int]
    probabilities: list[float]

    @property
    def mean_depth(self) -> float:
        """Passes a token; NaN for an empty answer."""
        return sum(self.depths) / len(self.depths) if self.depths else math.nan

    @property
    def iterated(self) -> int:
        """How many tokens took more than one pass."""
        return sum(depth > 1 for depth in self.depths)


def load(folder: str, device: str | None = None, **settings: Any) -> tuple[TaHForCausalLM, Any]:
    """A TaH checkpoint in evaluation mode, by this package's own classes, and its tokenizer.

    Args:
        folder: of the checkpoint.
        device: where to; the accelerator if there is one.
        settings: of `from_pretrained`: `dtype`, `threshold`, `decider`, ….

    Raises:
        ValueError: it is no TaH checkpoint, a setting is wrong, or weights are missing.
        OSError: a file is missing.
    """
    model: Any
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **{"dtype": "auto", **settings})
    except SafetensorError as error:
        raise ValueError(f"tah: the weights are not whole ({error}); copy or train the checkpoint again") from None
    if not isinstance(model, TaHForCausalLM):
        raise ValueError(f"tah: not a TaH checkpoint but a {model.config.model_type} one")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if device is None and torch.accelerator.is_available():
        device = str(torch.accelerator.current_accelerator())
    placed: Any = model
    return placed.to(device or model.device).eval(), tokenizer


@torch.no_grad()
def answer(model: TaHForCausalLM, tokenizer: Any, prompt: str, max_new_tokens: int) -> tuple[Tensor, Tensor]:
    """What the model answers greedily, in the checkpoint's chat template.

    Returns:
        Token ids of the rendered prompt and of the answer without the token that ended it, int64 [P] and [A].

    Raises:
        ValueError: the checkpoint has no trained decider, or no chat template.
    """
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
    writer: Any = model
    written = writer.generate(asked["input_ids"], attention_mask=asked["attention_mask"], **settings)[0]
    start = asked["input_ids"].shape[1]
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    stop = len(written) - 1 if len(written) > start and int(written[-1]) in ends else len(written)
    return written[:start], written[start:stop]


@torch.no_grad()
def think_map(model: TaHForCausalLM, tokenizer: Any, prompt: Tensor, answered: Tensor) -> ThinkMap:
    """Depths and probabilities of an answer's tokens, from one forward over prompt and answer.

    Args:
        model: in evaluation mode.
        tokenizer: its own.
        prompt: int64 [P], one token at least.
        answered: int64 [A].

    Raises:
        ValueError: the checkpoint has no trained decider.
    """
    out = model(torch.cat([prompt, answered])[None], logits_to_keep=1)
    # What a position does is for the prediction it makes, of the token after it.
    made = slice(len(prompt) - 1, len(prompt) + len(answered) - 1)
    depths = out.depth[0, made].tolist()
    asked = None if out.continue_logits is None else torch.sigmoid(out.continue_logits[0, made].float()).tolist()
    return ThinkMap(texts(tokenizer, answered.tolist()), depths, asked or [math.nan] * len(depths))


def texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text of each token; a character that several tokens share is the last one's, the others are empty.

    The texts add up to what the tokenizer makes of all ids. Each stretch is decoded behind the one before it, as some
    tokenizers drop the space a text begins with.
    """

    def decoded(part: list[int]) -> str:
        return tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    pieces = [""] * len(ids)
    before = begun = 0
    for end in range(1, len(ids) + 1):
        text = decoded(ids[before:end])
        if text.endswith("\ufffd") and end < len(ids):  # perhaps the first bytes of a character
            continue
        pieces[end - 1] = text[len(decoded(ids[before:begun])) :]
        before, begun = begun, end
    return pieces


class _Piece(NamedTuple):
    """Tokens that are shown as one: a token, or those that share a character; the deepest and likeliest counts."""

    text: str
    depth: int
    probability: float
    tokens: int


def _pieces(shown: ThinkMap) -> list[_Piece]:
    result, begun = [], 0
    for at, text in enumerate(shown.tokens):
        if text:
            part = slice(begun, at + 1)
            result.append(_Piece(text, max(shown.depths[part]), max(shown.probabilities[part]), at + 1 - begun))
            begun = at + 1
    return result


def _marked(text: str, depth: int) -> str:
    text = visible(text)
    return text.replace("\n", "⏎\n") if depth > 1 else text  # else a line's end could not be seen to iterate


def _colour(depth: int, probability: float) -> int:
    if math.isnan(probability):
        return 0 if depth == 1 else len(BANDS)
    return next(index for index, limit in enumerate(BANDS) if probability <= limit)


def facts(shown: ThinkMap) -> str:
    """The mean depth and the share that iterated, in a line."""
    n = len(shown.depths)
    if not n:
        return "the answer is empty"
    noun = "token" if n == 1 else "tokens"
    return f"{n} {noun}, mean depth {shown.mean_depth:.3f}, {shown.iterated / n:.1%} iterated ({shown.iterated} of {n})"


def text_of(shown: ThinkMap, styled: bool) -> Text:
    """The answer, then what its looks mean, for a terminal; brackets do what they can where text cannot be `styled`."""
    result = Text()
    for text, depth, probability, _ in _pieces(shown):
        said = _marked(text, depth)
        if styled:
            line = {1: "", 2: " underline"}.get(depth, " underline2")
            result.append(said, ON_TERMINAL[_colour(depth, probability)] + line)
        else:
            result.append(f"{'‹' * (depth - 1)}{said}{'›' * (depth - 1)}")
    result.append("\n\n")
    if not styled:
        return result.append("‹bracketed›: took another pass (‹‹twice››: two)")
    result.append("underlined", "underline")
    result.append(": took another pass (twice: two or more)", "dim")
    if _judged(shown):
        result.append("; colour: the decider's probability of needing one, ", "dim")
        for limit, style in zip(BANDS, ON_TERMINAL, strict=False):
            result.append(f" ≤ {limit} ", style)
    return result


def _judged(shown: ThinkMap) -> bool:
    return any(not math.isnan(probability) for probability in shown.probabilities)


STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1f2937}
pre{background:#f9fafb;border:1px solid #e5e7eb;padding:1rem;white-space:pre-wrap;overflow-wrap:anywhere;font-size:15px}
b{font-weight:inherit;text-decoration:underline;text-decoration-thickness:2px;text-underline-offset:3px}
b.more{text-decoration-style:double}
"""


def page(shown: ThinkMap, prompt: str, title: str) -> str:
    """The same as one HTML page with nothing outside it; pointing at a token shows its depth and probability.

    Args:
        shown: the answer.
        prompt: what was asked.
        title: of the page.
    """
    body = []
    for text, depth, probability, tokens in _pieces(shown):
        hint = f"depth {depth}" + ("" if math.isnan(probability) else f", probability {probability:.3f}")
        hint += "" if tokens == 1 else f", {tokens} tokens"
        tag, more = ("span" if depth == 1 else "b"), (' class="more"' if depth > 2 else "")
        style, said = ON_PAGE[_colour(depth, probability)], html.escape(_marked(text, depth))
        body.append(f'<{tag}{more} style="background:{style}" title="{hint}">{said}</{tag}>')
    colours = zip(BANDS, ON_PAGE, strict=False)
    scale = " ".join(f'<span style="background:{colour}">&nbsp;≤ {limit}&nbsp;</span>' for limit, colour in colours)
    legend = "<b>Underlined</b>: the token took another pass (twice: two or more)."
    legend += f" Colour: the decider's probability of needing one: {scale}." if _judged(shown) else ""
    name, asked = html.escape(title), html.escape(visible(prompt))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name} – think map</title><style>{STYLE}</style>'
        f"<h1>{name}</h1><h2>Prompt</h2><pre>\n{asked}</pre><h2>Answer</h2><pre>\n{''.join(body)}</pre>"
        f"<p>{facts(shown)}.</p><p>{legend}</p></html>\n"
    )
