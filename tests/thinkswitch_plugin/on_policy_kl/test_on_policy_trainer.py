"""A step of the trainer in this process: what is paired with what, which loss it is, and that it goes down."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from thinkswitch_plugin.on_policy_kl.args import OnPolicyKLConfig
from thinkswitch_plugin.on_policy_kl.trainer import Prompts, cut, of

QUESTIONS = ["Compute 24+26.", "Compute 1+24+26-13.", "Compute 31-10+20-11."]
KINDS: list[dict[str, Any]] = [
    {"divergence": "reverse_kl"},
    {"divergence": "forward_kl"},
    {"divergence": "jsd", "beta": 0.2},
    {"estimator": "sampled"},
]


@pytest.fixture
def build(pair: dict[str, Any], tokenizer: Any, recipes: Path, tmp_path: Path) -> Callable[..., Any]:
    """The trainer on the embedded pair in full float32, as the plugin makes it; the recipe's block, then settings."""
    from axolotl.core.training_args import AxolotlTrainingArguments

    from thinkswitch_plugin.on_policy_kl.scoring import Teacher
    from thinkswitch_plugin.on_policy_kl.trainer import OnPolicyKLTrainer, collate

    def make(rows: dict[str, list[Any]], block: dict[str, Any], lora: Any = None, **settings: Any) -> Any:
        defaults = {"teacher": str(recipes / "mini/thinking"), "max_new_tokens": 12}
        config = OnPolicyKLConfig(**{**defaults, **block})
        args = AxolotlTrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            report_to=[],
            logging_steps=1,
            disable_tqdm=True,
            lr_scheduler_type="constant",
            remove_unused_columns=False,
            seed=1,
            **{
                "per_device_train_batch_size": len(rows["input_ids"]),
                "max_steps": 1,
                "bf16": False,
                "save_strategy": "no",
                **settings,
            },
        )
        student = copy.deepcopy(pair["instruct"])
        student = get_peft_model(student, lora) if lora else student
        trainer = OnPolicyKLTrainer(
            model=student,
            args=args,
            train_dataset=Dataset.from_dict(rows),
            data_collator=collate,
            processing_class=tokenizer,
        )
        trainer.begin(config, Teacher(config, student, tokenizer, torch.float32), tokenizer)
        return trainer

    return make


@pytest.fixture
def rows(tokenizer: Any) -> dict[str, list[Any]]:
    """Three prompts, each with a trace of its own and another length for the teacher."""
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in QUESTIONS
    ]
    traces = [tokenizer(f"<think>\n{'24+26=50 ' * n}\n</think>\n\n")["input_ids"] for n in (1, 3, 2)]
    contexts = [prompt + trace for prompt, trace in zip(prompts, traces, strict=True)]
    return {"input_ids": prompts, "teacher_input_ids": contexts, "teacher_thinks": [False] * 3}


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


# --- pairs ---


@pytest.mark.parametrize("at_once", [None, 4, 8])
def test_every_rollout_of_a_prompt_is_paired_with_that_prompt_s_context(
    build: Any, rows: dict[str, list[Any]], at_once: int | None
) -> None:
    block = {"rollouts_per_prompt": 4, "rollout_batch_size": at_once, "temperature": 3.0, "top_k": 40}
    trainer = build(rows, block)
    scored = trainer.roll_out(rows)
    context_of = {
        tuple(ids): context for ids, context in zip(rows["input_ids"], rows["teacher_input_ids"], strict=True)
    }
    assert [roll.prompt for roll, _ in scored] == [ids for ids in rows["input_ids"] for _ in range(4)]
    assert all(context == context_of[tuple(roll.prompt)] for roll, context in scored)
    assert len({tuple(roll.answer) for roll, _ in scored}) > 6

    batches = trainer.split(scored, 3, rows["input_ids"][0])
    seen = []
    for batch in batches:
        for which in range(len(batch["input_ids"])):
            (prompt, answer), (context, same) = (
                parts(*(part[which] for part in (side.input_ids, side.attention_mask, side.answers)))
                for side in (of(batch, ""), of(batch, "teacher_"))
            )
            assert answer == same
            assert context == context_of[tuple(prompt)]
            seen.append((prompt, answer))
    assert sorted(seen) == sorted((roll.prompt, roll.answer) for roll, _ in scored)


def parts(ids: Tensor, mask: Tensor, answers: Tensor) -> tuple[list[int], list[int]]:
    """What stands before an answer, and the answer."""
    return ids[mask.bool() & ~answers].tolist(), ids[answers].tolist()


def test_a_prompt_whose_teacher_comes_to_no_end_is_left_out_with_all_its_rollouts(
    build: Any, rows: dict[str, list[Any]]
) -> None:
    rows = {**rows, "teacher_input_ids": [*rows["input_ids"]], "teacher_thinks": [False, True, False]}
    trainer = build(rows, {"rollouts_per_prompt": 2, "context": "trace", "trace_max_new_tokens": 1})
    scored = trainer.roll_out(rows)
    assert [roll.prompt for roll, _ in scored] == [rows["input_ids"][at] for at in (0, 0, 2, 2)]
    assert all(context == roll.prompt for roll, context in scored)
    assert trainer.metrics.means()["opd/unclosed"] == 1


def test_a_server_s_rollouts_leave_the_student_s_weights_alone(build: Any, rows: dict[str, list[Any]]) -> None:
    """While it answers they are looked at: nothing is added to them, and none stands beside another."""
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    seen = []

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append([p.data_ptr() for p in trainer.model.parameters()])
            choices = [{"index": i, "finish_reason": "length", "token_ids": [5]} for i in range(len(asked["prompt"]))]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": choices}).encode())

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        block = {"server": f"http://127.0.0.1:{server.server_port}", "server_model": "student", "rollout_batch_size": 2}
        trainer = build(rows, block, lora)
        own = [p.data_ptr() for p in trainer.model.parameters()]
        scored = trainer.roll_out(rows)
        server.shutdown()
    assert [roll.answer for roll, _ in scored] == [[5]] * 3
    assert seen == [own] * 2


# --- the loss ---


def defined(student: Tensor, teacher: Tensor, answer: Tensor, kind: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Each token's loss [A] from whole logits [A, V], by its definition, and what has its gradient."""
    p, q = student.softmax(-1), teacher.softmax(-1)
    if kind.get("estimator") == "sampled":  # the student itself drew the tokens, so their weight is 1
        log_p, log_q = (logits.log_softmax(-1).gather(1, answer[:, None])[:, 0] for logits in (student, teacher))
        return log_p - log_q, (log_p - log_q).detach() * log_p
    if kind["divergence"] == "reverse_kl":
        value = (p * (p.log() - q.log())).sum(-1)
    elif kind["divergence"] == "forward_kl":
        value = (q * (q.log() - p.log())).sum(-1)
    else:
        m = kind["beta"] * q + (1 - kind["beta"]) * p
        value = (kind["beta"] * q * (q / m).log() + (1 - kind["beta"]) * p * (p / m).log()).sum(-1)
    return value, value


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_step_s_loss_and_its_gradient_are_the_divergence_s(
    build: Any, rows: dict[str, list[Any]], kind: dict[str, Any]
) -> None:
    """Over two micro-batches, against a forward a rollout: with its sign, for each parameter."""
    trainer = build(rows, {**kind, "rollouts_per_prompt": 2})
    scored = trainer.roll_out(rows)
    count = sum(len(roll.answer) for roll, _ in scored)
    student, teacher = trainer.model.eval(), trainer.teacher.model
    student.zero_grad()
    batches = trainer.split(scored, 2, rows["input_ids"][0])
    loss = torch.stack(
        [trainer.compute_loss(student, b, num_items_in_batch=torch.tensor(count)) for b in batches]
    ).sum()
    loss.backward()
    ours = {name: p.grad.clone() for name, p in student.named_parameters()}

    student.zero_grad()
    values, surrogates = [], []
    for roll, context in scored:
        answer = torch.tensor(roll.answer)
        read = student(torch.tensor([roll.prompt + roll.answer])).logits[0, len(roll.prompt) - 1 : -1]
        with torch.no_grad():
            theirs = teacher(torch.tensor([context + roll.answer])).logits[0, len(context) - 1 : -1]
        for into, part in zip((values, surrogates), defined(read, theirs, answer, kind), strict=True):
            into.append(part)
    torch.testing.assert_close(loss.detach(), torch.cat(values).mean().detach(), rtol=1e-4, atol=1e-5)
    torch.cat(surrogates).mean().backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None
        error = (ours[name] - parameter.grad).norm()
        assert error < 1e-3 * parameter.grad.norm() + 1e-7, name
    assert any(grad.norm() > 0.01 for grad in ours.values())


@pytest.mark.parametrize("kind", KINDS[:3], ids=str)  # a dozen rollouts are too few for the sampled estimator's noise
def test_the_divergence_goes_down(build: Any, rows: dict[str, list[Any]], kind: dict[str, Any]) -> None:
    """From the start to the end of a dozen updates: by a half at least, on rollouts of the same prompts."""
    rows = {key: values * 4 for key, values in rows.items()}
    trainer = build(rows, kind, max_steps=12, learning_rate=5e-4, optim="adamw_torch")
    trainer.train()
    found = logged(trainer, "opd/loss")
    assert len(found) == 12
    assert sum(found[-3:]) / 3 < 0.5 * found[0]


@pytest.mark.parametrize("at_once", [1, 2, 4, 100])
def test_a_step_s_loss_and_gradients_are_the_same_however_it_is_cut(
    build: Any, rows: dict[str, list[Any]], at_once: int
) -> None:
    """Twelve rollouts in two micro-batches, each learnt from at once or in several backwards."""
    grads, losses = [], []
    for size in (None, at_once):
        block = {"update_batch_size": size, "rollouts_per_prompt": 4, "temperature": 3.0, "divergence": "jsd"}
        trainer = build(rows, block, optim="sgd", per_device_train_batch_size=1, gradient_accumulation_steps=2)
        prompts = [{key: values[part] for key, values in rows.items()} for part in (slice(0, 2), slice(2, 3))]
        batches, count = trainer.get_batch_samples(map(Prompts, prompts), 2, torch.device("cpu"))
        assert sum(len(part["input_ids"]) for batch in batches for part in cut(batch, size)) == 12
        assert all(len(part["input_ids"]) <= (size or 12) for batch in batches for part in cut(batch, size))
        trainer.create_optimizer()
        losses.append([float(trainer.training_step(trainer.model, batch, count)) for batch in batches])
        grads.append({name: p.grad for name, p in trainer.model.named_parameters()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for name, grad in grads[0].items():
        assert (grads[1][name] - grad).norm() < 1e-4 * grad.norm() + 1e-8, name


def test_a_part_is_as_wide_as_its_own_longest(build: Any, rows: dict[str, list[Any]]) -> None:
    trainer = build(rows, {"temperature": 0.0, "update_batch_size": 1})
    (batch,) = trainer.split(trainer.roll_out(rows), 1, rows["input_ids"][0])
    parts = cut(batch, 1)
    for side in ("", "teacher_"):
        assert all(bool(of(part, side).attention_mask.all()) for part in parts)
        assert len({of(part, side).input_ids.shape[1] for part in parts}) > 1


def test_in_bfloat16_a_step_is_near_that_in_float32(build: Any, rows: dict[str, list[Any]]) -> None:
    """The trainer's own autocast on a CPU: float32 weights, which move, and half-precision states."""
    found = []
    for half in (False, True):
        trainer = build(rows, {"temperature": 0.0, "update_batch_size": 2}, bf16=half, learning_rate=1e-3, max_steps=2)
        before = {name: value.clone() for name, value in trainer.model.named_parameters()}
        trainer.train()
        found.append(logged(trainer, "opd/loss"))
        assert all(value.dtype == torch.float32 for value in trainer.model.parameters())
        assert all(not torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())
    assert found[1] == pytest.approx(found[0], rel=0.05)


def test_a_resumed_run_repeats_itself(build: Any, rows: dict[str, list[Any]], recipes: Path, tmp_path: Path) -> None:
    """Traces are drawn in the first epoch and read again in the second, where the run is taken up."""
    thinking = AutoTokenizer.from_pretrained(recipes / "mini/thinking")
    asked = [
        thinking.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, return_dict=False)
        for q in QUESTIONS
    ]
    rows = {**rows, "teacher_input_ids": asked, "teacher_thinks": [True] * 3}
    block = {"context": "trace", "trace_max_new_tokens": 64}
    how = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "sgd"}
    how |= {"per_device_train_batch_size": 2, "learning_rate": 1e-3}

    def trained(resume: str | None) -> Any:
        trainer = build(rows, block, LoraConfig(r=4, target_modules="all-linear"), **how)
        trainer.teacher.model.generation_config.update(do_sample=True, temperature=2.0)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = trained(None)
    assert len({tuple(trace) for trace in whole.teacher.traces.values() if trace}) >= 2
    resumed = trained(str(tmp_path / "checkpoint-2"))
    assert resumed.teacher.traces == whole.teacher.traces
    assert logged(resumed, "opd/loss") == logged(whole, "opd/loss")
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_accumulation_trains_as_one_batch_does(build: Any, rows: dict[str, list[Any]]) -> None:
    """Greedy rollouts of the same twelve prompts a step, in one micro-batch and in four: the same weights."""
    rows = {key: values * 4 for key, values in rows.items()}
    # Adam would turn rounding errors of vanishing gradients into whole steps.
    how = {"optim": "sgd", "learning_rate": 0.01, "max_steps": 2}
    whole = build(rows, {"temperature": 0.0}, **how)
    parts = build(rows, {"temperature": 0.0}, **how, per_device_train_batch_size=3, gradient_accumulation_steps=4)
    before = {name: value.clone() for name, value in whole.model.state_dict().items()}
    for trainer in (whole, parts):
        trainer.train()
    after = parts.model.state_dict()
    for name, value in whole.model.state_dict().items():
        assert (after[name] - value).norm() < 1e-3 * (value - before[name]).norm(), name
    assert logged(parts, "opd/loss") == pytest.approx(logged(whole, "opd/loss"), rel=1e-4)


@pytest.mark.parametrize("at_once", [None, 1])
def test_two_ranks_mean_gradient_is_that_of_one_process(
    build: Any, rows: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch, at_once: int | None
) -> None:
    """Two processes' shares of a step, one after the other: they count both's tokens, and DDP takes the mean."""
    trainer = build(rows, {"temperature": 0.0, "update_batch_size": at_once})
    trainer.create_optimizer()

    losses: dict[int, float] = {}

    def share(which: list[int], elsewhere: int | None = None) -> tuple[int, dict[str, Tensor]]:
        prompts = {key: [values[at] for at in which] for key, values in rows.items()}
        if elsewhere is not None:
            monkeypatch.setattr(type(trainer.accelerator), "num_processes", property(lambda _: 2))
            monkeypatch.setattr(
                trainer.accelerator, "gather", lambda local: torch.stack([local, torch.tensor(elsewhere)])
            )
        trainer.model.zero_grad()
        batches, count = trainer.get_batch_samples(iter([Prompts(prompts)]), 1, torch.device("cpu"))
        for batch in batches:
            losses[len(which)] = float(trainer.training_step(trainer.model, batch, count))
        local = sum(len(batch["places"]) for batch in batches)
        return local, {name: p.grad.clone() for name, p in trainer.model.named_parameters()}

    (one, _), (two, _) = share([0]), share([1, 2])
    assert one != two  # else a mean of each one's mean would do
    _, whole = share([0, 1, 2])
    (_, first), (_, second) = share([0], elsewhere=two), share([1, 2], elsewhere=one)
    for name, grad in whole.items():
        assert ((first[name] + second[name]) / 2 - grad).norm() < 1e-3 * grad.norm() + 1e-7, name
    assert (losses[1] + losses[2]) / 2 == pytest.approx(losses[3], rel=1e-4)


def test_checkpointed_layers_train_as_others_do(build: Any, rows: dict[str, list[Any]]) -> None:
    block = {"estimator": "sampled", "context": "prompt", "rollouts_per_prompt": 2}
    how = {"optim": "sgd", "learning_rate": 0.01}
    plain, checkpointed = build(rows, block, **how), build(rows, block, **how, gradient_checkpointing=True)
    for trainer in (plain, checkpointed):
        trainer.train()
    for (name, one), other in zip(plain.model.named_parameters(), checkpointed.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=name)


def test_self_with_a_new_adapter_starts_at_no_divergence(build: Any, rows: dict[str, list[Any]]) -> None:
    lora = LoraConfig(r=4, target_modules="all-linear")
    rows = {**rows, "teacher_input_ids": rows["input_ids"]}
    trainer = build(rows, {"teacher": "self", "context": "prompt"}, lora, gradient_checkpointing=True)
    trainer.train()
    assert abs(logged(trainer, "opd/kl")[0]) < 1e-5
    assert logged(trainer, "opd/student_entropy") == logged(trainer, "opd/teacher_entropy")


@pytest.mark.parametrize("what", ["the student's weights are not numbers", "the loss is not a number"])
def test_what_is_not_a_number_stops_the_run_and_keeps_the_batch(
    build: Any, rows: dict[str, list[Any]], what: str
) -> None:
    trainer = build(rows, {"temperature": 0.0}, LoraConfig(r=4, target_modules="all-linear"))
    spoilt = trainer.model if "student" in what else trainer.teacher.model
    with torch.no_grad():
        next(p for p in spoilt.parameters() if p.requires_grad == (spoilt is trainer.model)).fill_(torch.nan)
    with pytest.raises(ValueError, match=rf"^on_policy_kl: {what} at step 1; its batch is in \S+$") as error:
        trainer.train()
    batch = load_file(str(error.value).rpartition(" ")[2])
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert len(batch["input_ids"]) == 3
