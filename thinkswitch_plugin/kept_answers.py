"""lm-eval with every answer kept as it comes: what was stopped and is asked again goes on where it was.

    python -m thinkswitch_plugin.kept_answers recipe.yml        as lm_eval run --config recipe.yml
    python -m thinkswitch_plugin.kept_answers recipe.yml --server http://127.0.0.1:8000/v1

lm-eval writes nothing before the last question is answered, and its own cache knows neither whose answers it holds nor
any that were sampled. Here questions are answered a batch after another, in lm-eval's own order and of its size; what
came of one is on the disk before the next begins, in a file beside the recipe, and each has random numbers of its own.
So it ends in the same answers, however often it was stopped. Of engines with a batch of their own (vLLM, SGLang, a
server), whose random numbers are theirs, what is kept stays as it is and the rest is drawn anew: they get twice as many
questions as they answer at a time. At the end the file is taken away, unless `--keep` leaves that to whoever knows that
what lm-eval wrote is whole. Where lm-eval says no more than a warning of what it could not save, this ends.

A server may hand a trace over beside its answer, as a reasoning parser does, and lm-eval would drop it: it is put back
before the answer, so that who reads that can tell whether the trace closed.

Knows lm-eval's registry and what it asks of a model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import yaml

from thinkswitch_plugin.trace_stripping import DEFAULT_TAGS

AT_ONCE = 32  # questions that an engine with a batch of its own gets, where nobody says how many it answers at a time
QUEUED = 2  # requests for each that it answers at a time: the last of them leave it idle, and all are lost at a stop
SLOTS = ("max_num_seqs", "max_running_requests", "num_concurrent")  # what lm-eval's model_args call those
SERVED = "served.yml"  # the recipe with a server's address, after the recipe's name
SUFFIX = ".answered.jsonl"  # of the file, after the recipe's name and the process's number


class Kept:
    """Batches of answers on the disk, in order; one that was half written, or is of other questions, ends them."""

    def __init__(self, file: Path, what: str):
        """`what` names who is asked: kept answers of another are none."""
        self.file, self.what = file, what
        self.lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
        self.size = 0  # bytes of those that were found to fit

    def answers(self, number: int, asked: Sequence[Any]) -> list[str] | None:
        """What was answered to batch `number`, from 0; None if that, or an earlier one, was not."""
        if number >= len(self.lines):
            return None
        line = self.lines[number]
        try:
            row = json.loads(line) if line.endswith(b"\n") else {}
        except ValueError:
            row = {}
        if row.get("asked") != self.named(asked):
            self.lines = self.lines[:number]
            return None
        self.size += len(line)
        answers: list[str] = row["answers"]
        return answers

    def keep(self, asked: Sequence[Any], answers: list[str]) -> None:
        """Add a batch, on the disk when this returns."""
        with self.file.open("r+b" if self.file.exists() else "wb") as file:
            file.truncate(self.size)
            file.seek(self.size)
            line = json.dumps({"asked": self.named(asked), "answers": answers}).encode() + b"\n"
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.size += len(line)

    def named(self, asked: Sequence[Any]) -> str:
        """A hash of who is asked and what."""
        return hashlib.sha256(json.dumps([self.what, asked], default=str).encode()).hexdigest()


def keeping(model: type, file: Path, seed: Any, what: str, at_once: int = AT_ONCE) -> type:
    """A class of lm-eval's models whose answers are kept.

    Args:
        model: answers `generate_until(requests, disable_tqdm)`.
        file: where they are kept, before `SUFFIX`.
        seed: of all batches; with a batch's number it is that batch's.
        what: names who is asked.
        at_once: questions that go to a model which makes batches by itself.
    """
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import Collator
    from tqdm import tqdm
    from transformers import set_seed

    class Keeping(model):
        """See the module."""

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            """As the model's own: an answer a request, in their order."""
            kept = Kept(file.with_name(f"{file.name}.{self.rank}{SUFFIX}"), what)
            batches = isinstance(self, HFLM) and isinstance(self.batch_size, int)  # made here, and not by an engine
            size = self.batch_size if batches else at_once

            def longest_first(request: Any) -> tuple[int, str]:
                text = request.args[0]
                return (-len(self.tok_encode(text)), text) if batches else (0, "")

            order = Collator(requests, longest_first, lambda request: request.args[1], "gen_kwargs")
            answers: list[str] = []
            whole = True  # so far
            hidden = disable_tqdm or self.rank != 0
            with tqdm(total=len(requests), desc="Running generate_until requests", disable=hidden) as bar:
                for number, batch in enumerate(order.get_batched(n=size)):
                    asked = [request.args for request in batch]
                    found = kept.answers(number, asked)
                    if found is None:
                        digest = hashlib.sha256(f"{seed} {number}".encode()).digest()
                        set_seed(int.from_bytes(digest[:4], "big"))
                        found = super().generate_until(batch, disable_tqdm=True)
                        if whole := whole and None not in found:  # a server may give none; that is to be asked again
                            kept.keep(asked, found)
                    answers += found
                    bar.update(len(batch))
            back: list[str] = order.get_original(answers)
            return back

    return Keeping


def whole(choice: Mapping[str, Any]) -> str | None:
    """What a checkpoint wrote, of one of a server's choices: its trace, if that was taken apart, and its answer."""
    message = choice["message"]
    answer: str | None = message.get("content")
    trace = message.get("reasoning_content") or message.get("reasoning")
    if not trace:
        return answer
    opening, closing = DEFAULT_TAGS[0]
    text = str(trace) if str(trace).lstrip().startswith(opening) else f"{opening}{trace}"
    return text if not answer and choice.get("finish_reason") == "length" else f"{text}{closing}{answer or ''}"


def of_server(model: type) -> type:
    """A class of lm-eval's models for chat servers, which gives whole texts."""

    class Whole(model):
        """See the module."""

        @staticmethod
        def parse_generations(outputs: Any, **_: Any) -> list[str | None]:
            """The text of every choice, in order."""
            replies = outputs if isinstance(outputs, list) else [outputs]
            return [whole(one) for reply in replies for one in sorted(reply["choices"], key=itemgetter("index"))]

        def _create_payload(self, *said: Any, eos: str | None = None, **more: Any) -> dict[str, Any]:
            # Of several questions at once lm-eval does not say where an answer ends, and a server may fail of that.
            payload: dict[str, Any] = super()._create_payload(*said, eos=eos or self.eos_string, **more)
            return payload

    return Whole


def addressed(settings: dict[str, Any], server: str) -> dict[str, Any]:
    """An lm-eval config whose questions go to a server, up to /v1, of the checkpoint that it names."""
    from transformers import AutoTokenizer

    arguments = {**settings["model_args"], "base_url": f"{server}/chat/completions"}
    # lm-eval stops an answer where this stands, and a server may refuse what its tokenizer does not know.
    arguments.setdefault("eos_string", AutoTokenizer.from_pretrained(arguments["pretrained"]).eos_token)
    return {**settings, "model_args": arguments}


class Unsaved(logging.Handler):
    """Ends lm-eval when it says that it could not save what came of it, which it would go on from and exit with 0."""

    def emit(self, record: logging.LogRecord) -> None:
        """End, with what went wrong, at such a warning; let all others be."""
        if record.getMessage().startswith("Could not save"):
            raise SystemExit(f"lm-eval: {record.getMessage()}: {sys.exc_info()[1]!r}")


def main() -> None:
    """The command: see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m thinkswitch_plugin.kept_answers",
        description="lm_eval run --config RECIPE, which goes on where it was stopped.",
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="an lm-eval config")
    parser.add_argument("--server", metavar="URL", help="up to /v1, of the checkpoint that the recipe names: ask that")
    parser.add_argument("--keep", action="store_true", help="leave the answers that were kept where they are")
    asked = parser.parse_args()
    recipe: Path = asked.recipe
    try:
        text = recipe.read_text(encoding="utf-8")
        settings = yaml.safe_load(text)
        name = str(settings.get("model") or "hf")
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError) as error:
        raise SystemExit(f"{recipe}: cannot be read: {' '.join(str(error).split())}") from None
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import get_model, register_model
    from lm_eval.loggers import evaluation_tracker
    from lm_eval.utils import simple_parse_args_string

    kept = f"{name}-kept"
    arguments = settings.get("model_args") or {}
    arguments = simple_parse_args_string(arguments) if isinstance(arguments, str) else arguments
    slots = max((int(arguments[key]) for key in SLOTS if arguments.get(key)), default=0)
    at_once = QUEUED * slots or AT_ONCE
    model = get_model(name)
    model = of_server(model) if hasattr(model, "parse_generations") else model
    config = recipe
    if asked.server:
        config = recipe.with_name(f"{recipe.stem}.{SERVED}")
        config.write_text(yaml.safe_dump(addressed(settings, asked.server), sort_keys=False), encoding="utf-8")
    register_model(kept)(keeping(model, recipe.with_suffix(""), settings.get("seed"), text, at_once))
    logging.getLogger(evaluation_tracker.__name__).addHandler(Unsaved(logging.WARNING))
    sys.argv = ["lm_eval", "run", "--config", str(config), "--model", kept]
    cli_evaluate()
    for file in [] if asked.keep else recipe.parent.glob(f"{recipe.stem}.*{SUFFIX}"):
        file.unlink(missing_ok=True)  # another process of the same run may have been quicker


if __name__ == "__main__":
    main()
