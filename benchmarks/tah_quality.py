"""Does a second pass help? Single-pass, always-twice and Think-at-Hard on the same data, updates and start.

    python benchmarks/tah_quality.py [--seeds 3 --base 800 --steps 1300 --out runs/tah_quality] [--record]

The domain is `a*b+c` with two-digit a and c, answered at once: the answer repeats the problem and gives the number,
whose digits each depend on several steps. From the embedded instruct checkpoint, a backbone is trained until it is
right about a fifth of the time; it is the start of every arm. Then, on problems it has never seen and with the same
updates (`axolotl train` on the shipped recipes, changed where it is said below):

    single    the backbone alone, supervised; then the reference that says what is hard
    always    every token twice           (tah_backbone.yml, policy: always)
    oracle    hard tokens twice           (tah_backbone.yml, unsure_below), scored with the reference's labels
    learned   the same weights after as many updates of tah_decider.yml, scored with the decider

Scores are exact matches on held-out problems, each prediction read after the right tokens before it, which is right
exactly where greedy decoding is. The number of passes is counted over the answer's tokens. Two trainings run side by
side; what is done is kept in the folder, by all it reads, and not made again. Ends with one line of JSON: each seed's
scores, means and 95 % intervals over seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any

from mini_lab import INSTRUCT, LEFT, Lab, mean_and_interval, start_runner
from record import Recorder

from thinkswitch_plugin.trace_stripping.args import PLUGIN as TRACE_STRIPPING

BATCH = 64  # problems an update
TEST = 1000  # problems scored
CORES = BoundedSemaphore(2)  # trainings at once, of any seed
UNSURE = 0.6  # after the paper's labels, what the decider sends on in vain is mostly lost: docs/results.md
DECIDER = {"threshold": 0.7}  # of 0.3 to 0.95, the best on training problems of two seeds


def is_test(question: str) -> bool:
    """A twentieth of all problems, by a hash of the text alone."""
    return hashlib.sha256(question.encode()).digest()[0] < 13


@cache
def problems(seed: int, test: bool) -> list[dict[str, Any]]:
    """Every problem of a split, once, in an order of the seed's own; as conversations."""
    found = []
    for a, b, c in itertools.product(range(10, 100), range(2, 20), range(10, 100)):
        question, answer = f"Compute {a}*{b}+{c}.", f"{a}*{b}+{c}=\\boxed{{{a * b + c}}}"
        if is_test(question) == test:
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            found.append({"messages": turns})
    random.Random(f"tah_quality/{seed}/{test}").shuffle(found)
    return found


class Arms:
    """The trainings of one seed."""

    def __init__(self, lab: Lab, seed: int, base_steps: int, steps: int, rates: dict[str, float]):
        """`lab` keeps what is trained."""
        self.lab, self.seed, self.rates = lab, seed, rates
        self.out = lab.out / f"seed_{seed}"
        self.out.mkdir(parents=True, exist_ok=True)
        self.data = {"base": base_steps, "arms": steps}
        every, first = problems(seed, test=False), BATCH * base_steps
        if len(every) < first + BATCH * steps:
            raise SystemExit(
                f"{len(every):,} problems are too few for {base_steps} and {steps} updates of {BATCH} each"
            )
        for name, count in self.data.items():
            begin = 0 if name == "base" else first
            lines = [json.dumps(row) + "\n" for row in every[begin : begin + BATCH * count]]
            (self.out / f"{name}.jsonl").write_text("".join(lines))

    def train(self, recipe: str, start: Path, data: str, rate: float, **changes: Any) -> Path:
        """`trained`, on this seed's data, an update a batch of fresh problems; the checkpoint it leaves."""
        same = {
            "base_model": str(start),
            "micro_batch_size": BATCH,
            "num_epochs": 1,
            "max_steps": self.data[data],
            "learning_rate": rate,
            "warmup_steps": 20,
            "cosine_min_lr_ratio": 0.1,
            "seed": self.seed,
            "logging_steps": 50,
        }
        files = [self.out / f"{data}.jsonl"]
        with CORES:
            return self.lab.trained(recipe, files, threads=1, **{**same, **changes}) / LEFT

    def run(self) -> dict[str, dict[str, float]]:
        """All arms, then their scores."""
        plain = {"adapter": None, "tah": None, "plugins": [TRACE_STRIPPING]}
        rate = self.rates["arms"]
        base = self.train("tah_backbone", INSTRUCT, "base", self.rates["base"], **plain)
        single = self.train("tah_backbone", base, "arms", rate, **plain)
        # The adapter has a rank for this width, and no dropout on rows that come once.
        tah = {"reference": str(single), "unsure_below": UNSURE, "lora_dropout": 0.0}
        with ThreadPoolExecutor(1) as beside:
            twice = beside.submit(self.train, "tah_backbone", base, "arms", rate, tah={**tah, "policy": "always"})
            oracle = self.train("tah_backbone", base, "arms", rate, tah=tah)
            learned = self.train("tah_decider", oracle, "arms", self.rates["decider"], tah=DECIDER)
            always = twice.result()
        arms = {"base": base, "single": single, "always": always, "oracle": oracle, "learned": learned}
        reads = {name: self.lab.known.checkpoint(folder) for name, folder in arms.items()}
        found: dict[str, dict[str, float]] = self.lab.scored(reads, lambda: score(arms))
        return found


def score(arms: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Exact match and passes of every arm, and how often the learned decider is right; `single` says what is hard."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import thinkswitch_plugin.tah.model  # noqa: F401  (registers the class)
    from thinkswitch_plugin.tah.oracle import hard_tokens

    tokenizer = AutoTokenizer.from_pretrained(arms["single"])
    ids, labels = [], []
    for row in problems(0, test=True)[:TEST]:
        turns = row["messages"]
        prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
        answer = [*tokenizer.encode(turns[1]["content"], add_special_tokens=False), tokenizer.eos_token_id]
        ids.append(prompt + answer)
        labels.append([-100] * len(prompt) + answer)
    width = max(map(len, ids))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    wanted = torch.tensor([row[1:] + [-100] * (width - len(row) + 1) for row in labels])
    oracle = hard_tokens(
        AutoModelForCausalLM.from_pretrained(arms["single"]).eval(),
        Dataset.from_dict({"input_ids": ids, "labels": labels}),
        8192,
        UNSURE,
    )
    depth = torch.ones_like(padded)
    for at, verdict in enumerate(oracle):
        depth[at, : len(verdict)] += verdict.long()
    scores: dict[str, dict[str, float]] = {}
    for name, folder in arms.items():
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        more = {"target_depth": depth} if name == "oracle" else {}
        with torch.no_grad():
            out = model(padded, attention_mask=mask, **more)
        asked = wanted != -100
        right = ((out.logits.argmax(-1) == wanted) | ~asked).all(1)
        passes = out.depth[asked].float().mean() if hasattr(out, "depth") else torch.tensor(1.0)
        scores[name] = {"accuracy": float(right.float().mean()), "passes": float(passes)}
        if name == "learned":
            hard, said = depth[asked] > 1, out.depth[asked] > 1
            scores[name]["recall"] = float((hard & said).sum() / hard.sum())
            scores[name]["precision"] = float((hard & said).sum() / said.sum().clamp(min=1))
    return scores


def main() -> None:
    """Seeds, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--base", type=int, default=800, help="updates of the backbone all arms start from")
    parser.add_argument("--steps", type=int, default=1300, help="updates of every arm")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of every arm")
    parser.add_argument("--out", type=Path, default=Path("runs/tah_quality"))
    recorder = Recorder(parser)
    asked = parser.parse_args()
    rates = {"base": 2e-3, "arms": asked.rate, "decider": 1e-3}
    with start_runner(asked.out) as runner, ThreadPoolExecutor(asked.seeds) as pool:
        lab = Lab(asked.out, runner)

        def one(seed: int) -> dict[str, dict[str, float]]:
            found = Arms(lab, seed, asked.base, asked.steps, rates).run()
            print(f"seed {seed}  {found}", flush=True)
            return found

        seeds = list(pool.map(one, range(asked.seeds)))
    points = {arm: mean_and_interval([100 * seed[arm]["accuracy"] for seed in seeds]) for arm in seeds[0]}

    def over(arm: str, other: str) -> list[float]:
        return mean_and_interval([100 * (seed[arm]["accuracy"] - seed[other]["accuracy"]) for seed in seeds])

    figures = {
        "seeds": seeds,
        "accuracy": points,
        "passes": {arm: mean_and_interval([seed[arm]["passes"] for seed in seeds]) for arm in seeds[0]},
        "learned_over_single": over("learned", "single"),
        "oracle_over_single": over("oracle", "single"),
        "learned_over_always": over("learned", "always"),
        "problems": TEST,
        "base_updates": asked.base,
        "updates": asked.steps,
        "rate": asked.rate,
    }
    recorder.keep(asked, "tah_quality", figures)


if __name__ == "__main__":
    main()
