"""The think map: depths where they belong, characters whole, marks without colour, nothing that escapes."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file, save_file

from thinkswitch_plugin.tah import think_map as maps

Build = Callable[..., Any]
MINI = Path(__file__).resolve().parents[3] / "recipes" / "mini" / "instruct"
NAN = math.nan


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MINI)


class Numbers:
    """A tokenizer that writes ids as numbers."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(f"{number} " for number in ids)


@pytest.mark.parametrize("depth", [2, 3])
def test_a_token_has_the_depth_of_the_position_that_predicted_it(build: Build, depth: int) -> None:
    model = build(max_depth=depth)
    ids = torch.arange(5, 29)
    shown = maps.think_map(model, Numbers(), ids[:6], ids[6:])
    depths, probabilities = [], []
    past = None
    with torch.no_grad():  # as generation goes: what is known before each token of the answer is written
        for at in range(5, 23):
            fed = ids[:6] if past is None else ids[at : at + 1]
            out = model(fed[None], past_key_values=past, use_cache=True)
            past = out.past_key_values
            depths.append(int(out.depth[0, -1]))
            probabilities.append(float(torch.sigmoid(out.continue_logits[0, -1])))
    assert shown.depths == depths
    assert len(set(depths)) > 1
    assert shown.probabilities == pytest.approx(probabilities, abs=1e-4)
    assert all((p > 0.5) == (d > 1) for p, d in zip(shown.probabilities, shown.depths, strict=True))
    assert shown.tokens == [f"{number} " for number in range(11, 29)]
    assert shown.mean_depth == sum(depths) / 18
    assert shown.iterated == sum(d > 1 for d in depths)


@pytest.mark.parametrize(("decider", "depth"), [("always", 2), ("never", 1)])
def test_without_a_learned_decider_there_are_depths_and_no_probabilities(
    build: Build, decider: str, depth: int
) -> None:
    shown = maps.think_map(build(decider=decider), Numbers(), torch.tensor([1, 2]), torch.tensor([3, 4, 5]))
    assert shown.depths == [depth] * 3
    assert all(math.isnan(probability) for probability in shown.probabilities)
    assert "probability" not in maps.text_of(shown, styled=True).plain + maps.page(shown, "x", "y")


def test_an_answer_of_no_tokens(build: Build) -> None:
    shown = maps.think_map(build(), Numbers(), torch.tensor([1, 2]), torch.tensor([], dtype=torch.int64))
    assert shown == maps.ThinkMap([], [], [])
    assert maps.facts(shown) == "the answer is empty"
    assert "the answer is empty" in maps.page(shown, "x", "y")


@settings(deadline=None)
@given(st.text(st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"]), max_size=30))
@example("naïve 😀👩‍👩‍👧 語 <|im_end|> é")
def test_characters_of_several_tokens_stay_whole(text: str) -> None:
    ids = tokenizer()(text, add_special_tokens=False)["input_ids"]
    pieces = maps.texts(tokenizer(), ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@settings(deadline=None)
@given(st.lists(st.integers(0, 327), max_size=20))
def test_whatever_a_model_writes_the_pieces_add_up_to_what_the_tokenizer_says(ids: list[int]) -> None:
    assert "".join(maps.texts(tokenizer(), ids)) == tokenizer().decode(ids)


def test_tokens_of_one_character_are_shown_as_their_deepest() -> None:
    ids = tokenizer()("a😀b", add_special_tokens=False)["input_ids"]
    n = len(ids)
    assert n > 4
    shown = maps.ThinkMap(maps.texts(tokenizer(), ids), [1, 2, *[1] * (n - 2)], [0.1, 0.95, *[0.1] * (n - 2)])
    assert maps.text_of(shown, styled=False).plain.startswith("a‹😀›b\n")
    assert f'title="depth 2, probability 0.950, {n - 2} tokens">😀</b>' in maps.page(shown, "x", "y")
    assert maps.facts(shown) == f"{n} tokens, mean depth {1 + 1 / n:.3f}, {1 / n:.1%} iterated (1 of {n})"


NASTY = ["<script>", "[red]", "&amp;", '"x"', "\x1b[31m", "\\[/]", ":smile:", "\n", "  ", "\x9b1m", "</pre>", "\r"]
SHOWN = maps.ThinkMap(NASTY, [1, 2, 3, 1, 2, 1, 1, 2, 2, 1, 2, 1], [0.05, 0.95, 1.0, 0.3, *[0.5] * 8])
CLEAN = "".join(NASTY).replace("\x1b", "␛").replace("\x9b", "\ufffd").replace("\r", "␍").replace("\n", "⏎\n")


class Page(HTMLParser):
    """The text of each `pre`, and of the tokens said to have iterated; fails where tags do not balance."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[str] = []
        self.pre: list[str] = []
        self.iterated: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag != "meta":  # which has no end
            self.inside.append(tag)
        if tag == "pre":
            self.pre.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.inside.pop() == tag

    def handle_data(self, data: str) -> None:
        if "pre" in self.inside:
            self.pre[-1] += data
            if self.inside[-1] == "b":
                self.iterated.append(data)


def test_a_page_shows_text_as_text() -> None:
    page = Page()
    page.feed(maps.page(SHOWN, "a <b> & \x1b c", "<i>"))
    page.close()
    assert page.inside == []
    assert page.pre == ["\na <b> & ␛ c", "\n" + CLEAN]  # browsers drop the first line's end
    assert page.iterated == ["[red]", "&amp;", "␛[31m", "⏎\n", "  ", "</pre>"]
    assert page.tags <= {"html", "meta", "title", "style", "h1", "h2", "pre", "span", "b", "p"}
    assert 'class="more"' in maps.page(SHOWN, "x", "y")


def printed(styled: bool, **how: Any) -> str:
    console = Console(file=io.StringIO(), highlight=False, width=40, **how)
    console.print(maps.text_of(SHOWN, styled), soft_wrap=True)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_pipe_gets_text_as_text_with_brackets_for_colours() -> None:
    said = printed(False)
    assert said.replace("‹", "").replace("›", "").startswith(CLEAN)
    assert said.startswith("<script>‹[red]›‹‹&amp;››")
    assert "bracketed›: took another pass" in said


def test_a_terminal_underlines_what_iterated_whatever_the_colour() -> None:
    said = printed(True, force_terminal=True, color_system="truecolor")
    assert "\x1b[31m" not in said
    plain = printed(True)
    assert plain.startswith(CLEAN)
    text = maps.text_of(SHOWN, styled=True)
    lined = {text.plain[span.start : span.end] for span in text.spans if "underline" in str(span.style)}
    assert lined == {"[red]", "&amp;", "␛[31m", "⏎\n", "  ", "</pre>", "underlined"}
    colours = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert colours["<script>"] == colours[" ≤ 0.1 "]
    assert colours['"x"'] == colours[" ≤ 0.5 "]
    assert colours["&amp;"] == colours[" ≤ 1.0 "] + " underline2"


@pytest.fixture
def saved(build: Build, tmp_path: Path) -> Path:
    build().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_a_checkpoint_is_loaded_by_this_package_s_classes(saved: Path) -> None:
    (saved / "tah_auto.py").write_text("raise SystemExit('its code was run')")
    model, _ = maps.load(str(saved), threshold=0.25, decider="always")
    assert (model.config.threshold, model.config.decider, model.training) == (0.25, "always", False)


def test_weights_that_are_missing_or_broken_are_no_model(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    save_file({name: w for name, w in weights.items() if "decider.out" not in name}, saved / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds no decider\.out\.bias"):
        maps.load(str(saved))
    (saved / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="the weights are not whole"):
        maps.load(str(saved))
    with pytest.raises(ValueError, match="not a TaH checkpoint but a qwen3 one"):
        maps.load(str(MINI))
