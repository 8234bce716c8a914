"""One training step: the student answers, the teacher scores, the divergence goes down.

    rollouts  = the student's answers to the step's prompts   (rollouts)
    for each micro-batch of rollouts, `update_batch_size` of them at once:
        states = the teacher's hidden states on them          (scoring)
        loss   = Σ divergence / answer tokens of the step     (loss), and its backward

On-policy distillation (GKD, arXiv 2306.13649; Thinking Machines Lab 2025); with the teacher reading a trace that the
student does not see, as OPSD (arXiv 2601.18734) does with gold solutions: here the trace is the teacher's own.

Knows the order of things and the Hugging Face trainer's hooks. Leaves the math and the models to the modules above.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import gather_object
from axolotl.core.trainers.base import AxolotlTrainer
from safetensors.torch import save_file
from torch import Tensor

from thinkswitch_plugin.on_policy_kl.args import OnPolicyKLConfig
from thinkswitch_plugin.on_policy_kl.loss import Samples, TokenLoss, token_loss
from thinkswitch_plugin.on_policy_kl.rollouts import (
    Rollout,
    Sequences,
    answering,
    end_tokens,
    from_server,
    left_padded,
    merged,
    sample,
    sequences,
    unpacked,
)
from thinkswitch_plugin.on_policy_kl.scoring import Teacher, answer_states, head_weight
from thinkswitch_plugin.on_policy_kl.view import show

SHOWN_ROLLOUTS = 3
TRACES = "teacher_traces.json"  # in a checkpoint: what the teacher has drawn is not drawn again after a resume

COLUMNS = ("input_ids", "teacher_input_ids", "teacher_thinks")  # of the prompt dataset

Batch = dict[str, Any]
Scored = tuple[Rollout, list[int]]  # an answer, and what the teacher reads before it


@dataclass(frozen=True)
class Prompts:
    """Rows of the prompt dataset, as lists: the rollouts are padded later, prompts and answers together.

    A class of its own, so that nobody looks through their tokens one by one for tensors to be moved to a device.
    """

    columns: Batch


def collate(rows: list[Batch]) -> Prompts:
    """Rows of the prompt dataset as one batch."""
    return Prompts({key: [row[key] for row in rows] for key in COLUMNS})


def cut(batch: Batch, rows: int | None) -> list[Batch]:
    """A micro-batch in parts of at most so many rollouts, each as wide as its own longest; None leaves it whole.

    On the CPU, before anything is copied to a device: no device has to be waited for.
    """
    if rows is None:
        return [batch]
    ours, theirs = (of(batch, whose).cut(rows) for whose in ("", "teacher_"))
    known = batch["log_probs"].split([len(part.places) for part in ours])
    return [laid_out(*part) for part in zip(ours, theirs, known, strict=True)]


def laid_out(ours: Sequences, theirs: Sequences, log_probs: Tensor) -> Batch:
    """What a micro-batch holds: the fields of both `Sequences`, the teacher's under `teacher_…`."""
    return {
        **ours._asdict(),
        **{f"teacher_{key}": value for key, value in theirs._asdict().items()},
        "log_probs": log_probs,
    }


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the CPU's generator and the device's; `torch.manual_seed` takes 2 ms for the kinds that are not there."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def of(batch: Batch, whose: str) -> Sequences:
    """The student's `Sequences` of a micro-batch (`whose` is empty), or the `teacher_`'s."""
    return Sequences(*(batch[f"{whose}{key}"] for key in Sequences._fields))


class IntervalMetrics:
    """Sums over a logging interval, from all micro-batches of this process; the first process's are logged."""

    def __init__(self) -> None:
        """Start at zero."""
        self.sums: dict[str, float] = {}

    def add(self, **values: float) -> None:
        """Add to the sums."""
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, 0.0) + value

    def means(self) -> dict[str, float]:
        """What is logged: nats a token, shares of rollouts, tokens a rollout, seconds a step."""
        s = self.sums
        tokens, rollouts, steps = (max(1.0, s.get(key, 0.0)) for key in ("tokens", "rollouts", "steps"))
        per = {"kl": tokens, "loss": tokens, "student_entropy": tokens, "teacher_entropy": tokens}
        per |= {"truncated": rollouts, "length": rollouts, "rollout_s": steps, "teacher_s": steps, "update_s": steps}
        result = {f"opd/{key}": s.get(key, 0.0) / by for key, by in per.items()}
        return {**result, "opd/empty": s.get("empty", 0.0), "opd/unclosed": s.get("unclosed", 0.0)}


class OnPolicyKLTrainer(AxolotlTrainer):
    """Axolotl's trainer with rollouts in place of labels; `begin` gives it the teacher."""

    def __init__(self, *args: Any, **kwargs: Any):
        """As Axolotl's."""
        super().__init__(*args, **kwargs)
        # The loss is divided by the step's tokens here, not by the number of micro-batches there.
        self.model_accepts_loss_kwargs = True

    def begin(self, config: OnPolicyKLConfig, teacher: Teacher, tokenizer: Any) -> None:
        """Get ready to train.

        Args:
            config: the recipe's block.
            teacher: loaded.
            tokenizer: the student's.
        """
        self.opd, self.teacher, self.tokenizer = config, teacher, tokenizer
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        student = self.accelerator.unwrap_model(self.model)
        head_weight(student)  # refuses what it cannot score, before the first rollout
        self.ends = end_tokens(student, tokenizer)
        self.metrics = IntervalMetrics()
        self._thinks = any(self.train_dataset["teacher_thinks"])  # in whichever process
        self._shown = 0  # the last step whose rollouts were shown
        self._to_show: list[tuple[Sequences, Tensor]] = []

    def get_batch_samples(
        self, epoch_iterator: Iterator[Prompts], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """The micro-batches of one step with their rollouts, and the answer tokens in all of them, on all processes."""
        prompts = [batch.columns for batch in islice(epoch_iterator, num_batches)]
        begun = self.now()
        pairs = self.roll_out({key: [row for batch in prompts for row in batch[key]] for key in COLUMNS})
        batches = self.split(pairs, len(prompts), prompts[0]["input_ids"][0]) if prompts else []
        self.metrics.add(rollout_s=self.now() - begun, steps=1)
        local = torch.tensor(sum(len(batch["places"]) for batch in batches), device=device)
        return batches, self.accelerator.gather(local).sum()

    def roll_out(self, rows: Batch) -> list[Scored]:
        """Let the student answer all of a step's prompts, and pair each answer with what the teacher reads before it.

        Decoding is bound by latency and holds no gradients, so it takes the whole step at once, or
        `rollout_batch_size`. Rollouts without a token and, where the teacher should think and does not come to an end,
        all of a prompt's are left out and counted.
        """
        student = self.accelerator.unwrap_model(self.model)
        if not bool(torch.stack([p.isfinite().all() for p in student.parameters() if p.requires_grad]).all()):
            ids, mask = left_padded(rows["input_ids"], self.pad, torch.device("cpu"))
            self.fail("the student's weights are not numbers", {"input_ids": ids, "attention_mask": mask})
        rollouts: list[Rollout] = []
        # Streams of random numbers of this step's and this process's own, the same after a resume: one for the traces,
        # one for the answers, which are then the same whether or not a trace is still to be drawn.
        seed = (self.args.seed * 1_000_003 + self.state.global_step) * 1_009 + self.args.process_index
        device = self.args.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            seed_generators(seed, device)
            contexts = self.contexts(rows)
            asked = [(ids, context) for ids, context in zip(rows["input_ids"], contexts, strict=True) if context]
            size = self.opd.prompts_at_once(len(asked))
            seed_generators(seed, device)
            parts = [[ids for ids, _ in asked[start : start + size]] for start in range(0, len(asked), size)]
            if self.opd.server:
                for prompts in parts:
                    rollouts += from_server(prompts, self.opd, self.ends, self.tokenizer)
            else:
                whole = unpacked(student) if self.opd.unpack_rollouts else nullcontext()
                with answering(student), whole, merged(student):
                    for prompts in parts:
                        rollouts += sample(student, prompts, self.opd, self.ends, self.pad)
        theirs = [context for _, context in asked for _ in range(self.opd.rollouts_per_prompt)]
        pairs = zip(rollouts, theirs, strict=True)
        kept = [(roll, context) for roll, context in pairs if set(roll.answer) - set(self.ends)]
        self.metrics.add(
            rollouts=len(rollouts),
            truncated=sum(roll.truncated for roll in rollouts),
            length=sum(len(roll.answer) for roll in rollouts),
            empty=len(rollouts) - len(kept),
            unclosed=sum(context is None for context in contexts),
        )
        return kept

    def split(self, pairs: list[Scored], count: int, spare: list[int]) -> list[Batch]:
        """Lay rollouts out in `count` micro-batches, of like lengths each: the step's loss is one sum, however cut.

        Every process has to take part in every backward, so a micro-batch that would be empty gets a row without an
        answer, the prompt `spare`.
        """
        pairs = sorted(pairs, key=lambda pair: (len(pair[1]) + len(pair[0].answer), len(pair[0].prompt)))
        size = max(1, math.ceil(len(pairs) / count))
        batches = []
        for start in range(0, count * size, size):
            mine = pairs[start : start + size] or [(Rollout(spare, [], False), spare)]
            answers = [roll.answer for roll, _ in mine]
            ours = sequences([roll.prompt for roll, _ in mine], answers, self.pad)
            theirs = sequences([context for _, context in mine], answers, self.pad)
            known = [roll.log_probs or [math.nan] * len(roll.answer) for roll, _ in mine]
            batches.append(laid_out(ours, theirs, torch.tensor([value for values in known for value in values])))
        random.Random(self.state.global_step).shuffle(batches)  # the first one is shown, and should not be the shortest
        return batches

    def contexts(self, rows: Batch) -> list[list[int] | None]:
        """What the teacher reads before each answer; None where it should have thought and came to no end."""
        contexts: list[list[int] | None] = list(rows["teacher_input_ids"])
        if not self._thinks:
            return contexts
        open_ = [row for row, thinks in enumerate(rows["teacher_thinks"]) if thinks]
        drawn = self.teacher.think([rows["teacher_input_ids"][row] for row in open_])
        for elsewhere in gather_object([drawn]):  # another epoch brings a prompt to another process
            self.teacher.traces.update(elsewhere)
        for row in open_:
            prompt = rows["teacher_input_ids"][row]
            trace = self.teacher.traces[tuple(prompt)]
            contexts[row] = None if trace is None else [*prompt, *trace]
        return contexts

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The micro-batch's share of the step's token mean.

        Raises:
            ValueError: the loss is not a number; the batch is saved beside the checkpoints first.
        """
        batch = of(inputs, "")
        begun = self.now()
        theirs = self.teacher.states(of(inputs, "teacher_"))
        teacher_head = self.teacher.head
        scored = self.now()
        student = self.accelerator.unwrap_model(model)
        ours = answer_states(model, student, batch)
        tokens = batch.input_ids.flatten()[batch.places]
        loss = token_loss(
            ours,
            head_weight(student),
            theirs,
            teacher_head,
            self.opd.divergence,
            self.opd.beta,
            Samples(tokens, inputs["log_probs"], self.opd.importance_cap or math.inf)
            if self.opd.estimator == "sampled"
            else None,
            self.opd.loss_chunk_tokens,
        )
        if not self.note(batch, loss, scored - begun):
            self.fail("the loss is not a number", inputs)
        count = torch.as_tensor(num_items_in_batch if num_items_in_batch is not None else len(tokens)).clamp(min=1)
        # A distributed run takes the mean over processes; the count is over all of them.
        return loss.total * self.accelerator.num_processes / count.to(loss.total.device)

    def training_step(
        self, model: torch.nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As the trainer's for `update_batch_size` rollouts after another: their gradients add up, so do their losses.

        Timed: what is not the teacher's is the update.
        """
        begun, teacher = self.now(), self.metrics.sums.get("teacher_s", 0.0)
        parts, losses = cut(inputs, self.opd.update_batch_size), []
        for number, part in enumerate(parts, start=1):
            # Processes may have different numbers of parts: they exchange gradients with each one's last.
            with self.accelerator.no_sync(model) if number < len(parts) else nullcontext():
                losses.append(super().training_step(model, part, num_items_in_batch))
        self.metrics.add(update_s=self.now() - begun - (self.metrics.sums["teacher_s"] - teacher))
        if self._to_show:
            self._shown = self.state.global_step + 1
            show(self.tokenizer, self._to_show, self._shown, Path(self.args.output_dir), SHOWN_ROLLOUTS)
            self._to_show = []
        return torch.stack(losses).sum()

    def now(self) -> float:
        """Seconds, when all that was asked of the device is done."""
        if self.args.device.type != "cpu":
            torch.accelerator.synchronize(self.args.device)
        return time.monotonic()

    def note(self, batch: Sequences, loss: TokenLoss, teacher_s: float) -> bool:
        """Keep what is logged and, when it is time, what is shown; say whether the loss is a number."""
        names = ("loss", "kl", "student_entropy", "teacher_entropy")
        sums = torch.stack([part.detach().sum() for part in loss]).tolist()  # one look at the device for all of them
        self.metrics.add(tokens=loss.reverse_kl.numel(), teacher_s=teacher_s, **dict(zip(names, sums[1:], strict=True)))
        step = self.state.global_step + 1
        if (
            self.opd.show_every
            and step % self.opd.show_every == 0
            and step != self._shown
            and self.is_world_process_zero()
        ):
            self._to_show.append((batch, loss.reverse_kl))
        return math.isfinite(sums[0])

    def fail(self, what: str, batch: dict[str, Tensor]) -> NoReturn:
        """Save a batch beside the checkpoints, and stop the run."""
        step = self.state.global_step + 1
        path = Path(self.args.output_dir) / f"bad_batch_step_{step}_rank_{self.args.process_index}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.detach().cpu().contiguous() for key, value in batch.items()}, path)
        raise ValueError(f"on_policy_kl: {what} at step {step}; its batch is in {path}")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the interval's means to what is logged, and its peak of a GPU's memory: Axolotl starts that anew."""
        if "loss" in logs:
            logs.update({key: round(value, 5) for key, value in self.metrics.means().items()})
            if self.args.device.type == "cuda":
                logs["opd/peak_gb"] = round(torch.cuda.max_memory_allocated(self.args.device) / 1e9, 3)
            self.metrics = IntervalMetrics()
        super().log(logs, start_time)

    def _save_rng_state(self, output_dir: str) -> None:
        """The teacher's traces too: all processes hold the same, and the first writes them."""
        super()._save_rng_state(output_dir)
        if self._thinks and self.is_world_process_zero():
            Path(output_dir, TRACES).write_text(json.dumps(list(self.teacher.traces.items())), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """The teacher's traces too."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        file = Path(resume_from_checkpoint, TRACES)
        if file.exists():
            traces = json.loads(file.read_text(encoding="utf-8"))
            self.teacher.traces.update((tuple(prompt), trace) for prompt, trace in traces)
