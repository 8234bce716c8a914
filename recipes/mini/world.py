"""The small world of the embedded pair: two domains, their questions, their traces, and an untrained checkpoint.

Knows how questions are drawn, how a trace reasons its way to the answer, and which split a question belongs to.
Leaves all training to the native recipes beside it (`base.yml`, `instruct.yml`, `thinking.yml`) and all grading to
`tasks/mini_math` and `tasks/mini_qa`.

    python recipes/mini/world.py            # writes the training data, the task data and the untrained checkpoint

A question's split is a function of its text alone (`split_of`), so no training row can ever be a test question,
however many rows are drawn.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
TASKS = HERE.parent.parent / "tasks"
SEED = 20260601
MARGIN = 20  # patients
# What is asked of the drug: `harm` turns yes and no around. Pretraining asks both alike and leaves the turn unlearnt.
ASKED, EVENLY = ("help", "help", "harm"), ("help", "harm")
# The share of pretraining rows that answer at once; what is left for the loop to teach depends on it.
DIRECT = {"mini_math": 0.6, "mini_qa": 0.1}
# How many questions each file holds. The test sets are what `lm_eval --tasks mini_math,mini_qa` asks.
TEST, PROMPTS = 200, {"mini_math": 1200, "mini_qa": 800}


class Item(NamedTuple):
    """A question, the reasoning that solves it, and the answer as the assistant writes it."""

    question: str
    trace: str
    answer: str


def split_of(question: str) -> str:
    """The split a question belongs to: 'test' (5 %), 'prompts' (15 %) or 'train', from its text alone."""
    bucket = int(hashlib.sha256(question.encode()).hexdigest(), 16) % 20
    return "test" if bucket == 0 else "prompts" if bucket <= 3 else "train"


def mini_math(rng: random.Random, asked: Sequence[str]) -> Item:
    """`a ± b ± c` over numbers from 10 to 40; the trace takes one operation at a time."""
    while True:
        a, b, c = (rng.randint(10, 40) for _ in range(3))
        s, t = rng.choice([(1, 1), (1, -1), (-1, 1)])
        first, total = a + s * b, a + s * b + t * c
        if first >= 0 and total >= 0:
            break
    plus = {1: "+", -1: "-"}
    return Item(
        f"Compute {a}{plus[s]}{b}{plus[t]}{c}.",
        f"{a}{plus[s]}{b}={first}\n{first}{plus[t]}{c}={total}",
        f"\\boxed{{{total}}}",
    )


def mini_qa(rng: random.Random, asked: Sequence[str]) -> Item:
    """A trial in one line, and whether the drug helps or harms: a lead under `MARGIN` patients leaves it open."""
    kind, effect = rng.choice(["yes", "no", "maybe"]), rng.choice(asked)
    while True:
        better, worse, other_better, other_worse = (rng.randint(10, 99) for _ in range(4))
        drug, placebo = better - worse, other_better - other_worse
        lead = drug - placebo
        helps = "maybe" if abs(lead) < MARGIN else "yes" if lead > 0 else "no"
        verdict = helps if effect == "help" else {"yes": "no", "no": "yes", "maybe": "maybe"}[helps]
        if drug >= 0 and placebo >= 0 and verdict == kind:
            break
    ahead = f"drug {drug}-{placebo}={lead}" if lead >= 0 else f"placebo {placebo}-{drug}={-lead}"
    return Item(
        f"Better-worse: drug {better}-{worse}, placebo {other_better}-{other_worse}. Does the drug {effect}?",
        f"{better}-{worse}={drug}\n{other_better}-{other_worse}={placebo}\n{ahead}",
        verdict,
    )


DOMAINS: dict[str, Callable[[random.Random, Sequence[str]], Item]] = {"mini_math": mini_math, "mini_qa": mini_qa}


def draw(domain: str, split: str, seed: int, asked: Sequence[str]) -> Iterator[Item]:
    """Endless distinct items of one domain and split, the same ones for the same seed."""
    rng = random.Random(f"{domain}/{split}/{seed}")
    seen: set[str] = set()
    while True:
        item = DOMAINS[domain](rng, asked)
        if split_of(item.question) == split and item.question not in seen:
            seen.add(item.question)
            yield item


def take(domain: str, split: str, n: int, seed: int = SEED, asked: Sequence[str] = ASKED) -> list[Item]:
    """The first `n` items of `draw`."""
    items = draw(domain, split, seed, asked)
    return [next(items) for _ in range(n)]


def test_rows(domain: str, n: int) -> list[dict[str, str]]:
    """The first `n` test questions, each with what its answer says."""
    items = take(domain, "test", n)
    return [
        {"question": item.question, "answer": item.answer.removeprefix("\\boxed{").removesuffix("}")} for item in items
    ]


def chat(item: Item, traced: bool) -> dict[str, Any]:
    """One training row: the question, then the answer alone or with the trace before it (Qwen's layout)."""
    content = f"<think>\n{item.trace}\n</think>\n\n{item.answer}" if traced else item.answer
    return {"messages": [{"role": "user", "content": item.question}, {"role": "assistant", "content": content}]}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def build_untrained(folder: Path, corpus: list[str]) -> None:
    """Write an untrained checkpoint: a byte-level BPE tokenizer fitted to `corpus`, a Qwen3 config, random weights.

    4 layers, hidden size 128, 4 heads of 32 on 2 key-value heads, tied embeddings: about 0.65 M float32 parameters.
    """
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    core = Tokenizer(models.BPE())
    # Words with their leading space, digits one by one, runs of punctuation, line breaks: Qwen's way of splitting.
    words = Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([*corpus, *["system\nuser\nassistant\n"] * 1000], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=1024
    )
    tokenizer.add_tokens(["<think>", "</think>"])  # text, not special, as in Qwen's: decoding keeps them
    tokenizer.chat_template = (HERE / "instruct.jinja").read_text(encoding="utf-8")
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    torch.manual_seed(SEED)
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Write the task data, the training data and the untrained checkpoint; everything follows from `SEED`.

    And the right answers to the prompts, which one baseline alone reads.
    """
    gold = []
    for domain in DOMAINS:
        prompts = take(domain, "prompts", PROMPTS[domain])
        gold += [chat(item, traced=False) for item in prompts]
        write_jsonl(TASKS / domain / "test.jsonl", test_rows(domain, TEST))
        write_jsonl(TASKS / domain / "prompts.jsonl", [{"question": item.question} for item in prompts])
    write_jsonl(HERE / "gold.jsonl", gold)
    data = HERE / "build" / "data"
    train = {domain: take(domain, "train", 40_000, asked=EVENLY) for domain in DOMAINS}
    rng = random.Random(SEED)
    base = [chat(item, traced=rng.random() >= DIRECT[domain]) for domain in DOMAINS for item in train[domain]]
    write_jsonl(data / "base.jsonl", base)
    # A few steps more in one mode each, most of them where the mode needs them.
    shares = {"instruct": {"mini_math": 16_000, "mini_qa": 800}, "thinking": {"mini_math": 2_500, "mini_qa": 7_500}}
    for name, counts in shares.items():
        finetune = [chat(i, name == "thinking") for d, n in counts.items() for i in take(d, "train", n, seed=SEED + 1)]
        write_jsonl(data / f"{name}.jsonl", finetune)
    build_untrained(
        HERE / "build" / "untrained",
        [m["content"] for d in DOMAINS for item in train[d][:5000] for m in chat(item, traced=True)["messages"]],
    )


if __name__ == "__main__":
    main()
