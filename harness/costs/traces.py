"""Training steps run on fake tensors: the recipe's own, layer by layer what is alive.

    python -m harness.costs.traces < QUESTIONS.json        prints a list of footprints as JSON

On-policy steps and Think-at-Hard's are those of our plugins, all others Hugging Face's. A trace is on a fake CPU, whose
attention holds as little as a GPU's: neither makes the scores. Knows what recipes of Axolotl make of a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from harness.costs.aside import answer_all
from harness.costs.fake import SMALL, PackedLinear, Peak, held, model_of
from harness.costs.footprint import DEPTHS, Footprint, Question, extrapolated, text_config
from thinkswitch_plugin.on_policy_kl.args import OnPolicyKLConfig
from thinkswitch_plugin.on_policy_kl.args import read_block as read_on_policy
from thinkswitch_plugin.on_policy_kl.loss import Samples, sizes, token_loss
from thinkswitch_plugin.on_policy_kl.rollouts import Sequences, sequences
from thinkswitch_plugin.on_policy_kl.scoring import TEACHER_TOKENS, answer_states, head_weight
from thinkswitch_plugin.tah.args import read_block as read_tah
from thinkswitch_plugin.tah.model import TaHForCausalLM

AT_WORK = 1  # layers whose keys lie there twice while a token is added
STATES = {"8bit": 2, "lion": 4, "adafactor": 0, "sgd": 0}  # bytes of optimizer a trained number; Adam's 8 otherwise


def answer(question: Question) -> Footprint:
    """The footprint of a recipe's step on a whole checkpoint."""
    layers = text_config(question.student)["num_hidden_layers"]
    few, more = DEPTHS
    if layers <= more:
        return traced(question, layers)
    return extrapolated(traced(question, few), traced(question, more), layers)


def traced(question: Question, layers: int) -> Footprint:
    """The footprint with so many layers."""
    recipe = question.recipe
    if recipe.get("on_policy_kl"):
        return on_policy(question, layers)
    return tah(question, layers) if recipe.get("adapter") == "tah" else supervised(question, layers)


def supervised(question: Question, layers: int) -> Footprint:
    """Prompts and answers, cross-entropy over the vocabulary: distilling labels, or any recipe of Axolotl's own."""
    recipe, rows = question.recipe, question.rows
    peak = Peak()
    model = peak.made(lambda: learner(recipe, question.student, layers))
    ids, labels, mask = _batch(question)

    def step() -> None:
        with autocast(recipe):
            if recipe.get("liger_fused_linear_cross_entropy"):
                bare = model.get_base_model() if hasattr(model, "get_base_model") else model
                states = bare.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
                loss = _FusedLoss.apply(states.flatten(0, 1), bare.get_output_embeddings().weight)
            else:
                count = torch.tensor(rows * question.answer)
                loss = model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=count).loss
        loss.backward()

    most = peak.of(step, model)
    weights, trained = held(model)
    return Footprint(weights, states_of(recipe, trained), trained, ragged(peak, model), step=most)


def on_policy(question: Question, layers: int) -> Footprint:
    """The student answers, the teacher scores, the student learns (`thinkswitch_plugin.on_policy_kl`)."""
    recipe, config = question.recipe, read_on_policy(question.recipe["on_policy_kl"])
    rows = question.rows * config.rollouts_per_prompt
    learnt = min(config.update_batch_size or rows, rows)
    peak = Peak()
    student = peak.made(lambda: learner(recipe, question.student, layers))
    teacher, off = student, getattr(student, "disable_adapter", nullcontext)
    if (theirs := question.teacher) is not None:
        nf4 = config.teacher_load_in_4bit
        teacher = peak.made(lambda: model_of(theirs, layers, dtype_of(recipe), nf4).requires_grad_(False).eval())
        off = nullcontext
    models = list(dict.fromkeys([student, teacher]))
    answers = [[1] * question.answer] * learnt
    ours = sequences([[1] * question.prompt] * learnt, answers, 0)
    read = sequences([[1] * question.context] * learnt, answers, 0)
    at_loss = 0

    def update() -> None:
        nonlocal at_loss
        with autocast(recipe):
            with torch.no_grad(), off():
                parts = read.cut(max(1, TEACHER_TOKENS // read.input_ids.shape[1]))
                known = torch.cat([answer_states(teacher, teacher, part) for part in parts])
                head = head_weight(teacher).detach()
            states = answer_states(student, student, ours)
            total = _Scored.apply(states, known, head)
            at_loss = peak.alive
        total.backward()

    step = peak.of(update, *models)
    loss = at_loss + _loss_alone(student, ours, config, question.gpu)
    every = rows * int(recipe.get("gradient_accumulation_steps") or 1)
    written = min(config.rollout_batch_size or every, every)
    small, (weights, trained) = ragged(peak, student), held(*models)
    reading = answering = 0
    if not config.server:
        copies = unpacked_bytes(student) if config.unpack_rollouts else 0
        reading = copies + peak.of(lambda: _read_prompts(student, written, question.prompt), *models)
        cache = written * (question.prompt + question.answer) * cache_bytes(question.student, dtype_of(recipe))
        answering = weights + copies + cache * (layers + AT_WORK + heads_ratio(question.student))
    return Footprint(weights, states_of(recipe, trained), trained, small, step, loss, reading, answering)


def tah(question: Question, layers: int) -> Footprint:
    """Several passes for the hard tokens (`thinkswitch_plugin.tah`)."""
    recipe, block = question.recipe, read_tah(question.recipe["tah"])
    settings = block.of_config
    if "decider_layers" in settings:
        settings["decider_layers"] = [min(layer, layers) for layer in settings["decider_layers"]]
    backbone = text_config(question.student)
    peak = Peak()

    def make() -> Any:
        learns = block.stage == "backbone"
        bare: Any = model_of(backbone, layers, dtype_of(recipe), nf4=False)
        if learns:
            model = TaHForCausalLM.from_backbone(bare, **settings)
            model.requires_grad_(True)
        else:
            kept = ("max_depth", "mix_top_k", "lora_r", "lora_alpha", "lora_dropout")
            model = TaHForCausalLM.from_backbone(
                bare, **{key: question.student[key] for key in kept if key in question.student}
            )
            model.begin_decider(block.pos_weight, **settings)
        if recipe.get("gradient_checkpointing"):
            model.gradient_checkpointing_enable()
        return model.train()

    model = peak.made(make)
    ids, labels, mask = _batch(question)
    depth = torch.ones_like(ids)
    begin = question.prompt - 1
    depth[:, begin : begin + round(question.hard * question.answer)] = 2

    def step() -> None:
        with autocast(recipe):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels, target_depth=depth).loss
        loss.backward()

    most = peak.of(step, model)
    weights, trained = held(model)
    return Footprint(weights, states_of(recipe, trained), trained, ragged(peak, model), step=most)


def ragged(peak: Peak, model: nn.Module) -> int:
    """Bytes of small blocks that come and go, of what was traced last."""
    kept = sum(p.nbytes for p in model.parameters() if p.requires_grad and p.nbytes < SMALL)  # gradients stay
    return max(0, peak.most_small - kept)


def cache_bytes(config: Mapping[str, Any], dtype: torch.dtype) -> int:
    """Keys and values of a token in one layer."""
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return 2 * int(heads) * int(width) * dtype.itemsize


def unpacked_bytes(model: nn.Module) -> int:
    """Of all layers in NF4, in the dtype they compute in."""
    layers = (layer for layer in model.modules() if isinstance(layer, PackedLinear))
    return sum(layer.in_features * layer.out_features * layer.compute_dtype.itemsize for layer in layers)


def heads_ratio(config: Mapping[str, Any]) -> int:
    """Query heads to a key head: a masked attention lays a layer's keys out for each."""
    return int(config["num_attention_heads"]) // int(config.get("num_key_value_heads") or config["num_attention_heads"])


# --- what recipes say ---


def dtype_of(recipe: Mapping[str, Any]) -> torch.dtype:
    """Of the weights, as Axolotl loads them, and of products under autocast."""
    if recipe.get("bf16") not in (None, False):
        return torch.bfloat16
    return torch.float16 if recipe.get("fp16") else torch.float32


def autocast(recipe: Mapping[str, Any]) -> AbstractContextManager[Any]:
    """As the trainer runs a step."""
    dtype = dtype_of(recipe)
    return nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)


def states_of(recipe: Mapping[str, Any], trained: int) -> int:
    """What the optimizer keeps of so many numbers, bytes; paged states count, as they are on the GPU while it steps."""
    name = str(recipe.get("optimizer") or "adamw_torch")
    return trained * next((each for part, each in STATES.items() if part in name), 8)


def learner(recipe: Mapping[str, Any], config: Mapping[str, Any], layers: int) -> Any:
    """The model that learns, with its adapter in float32."""
    nf4 = bool(recipe.get("load_in_4bit"))
    model: Any = model_of(config, layers, dtype_of(recipe), nf4)
    if recipe.get("gradient_checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if recipe.get("adapter") not in ("lora", "qlora"):
        return model.train()
    head = model.get_output_embeddings()
    named = recipe.get("lora_target_modules")
    if recipe.get("lora_target_linear") or not named:
        linear = (name for name, part in model.named_modules() if isinstance(part, nn.Linear) and part is not head)
        named = sorted({name.rpartition(".")[2] for name in linear})
    adapter = LoraConfig(
        r=int(recipe.get("lora_r") or 8),
        lora_alpha=int(recipe.get("lora_alpha") or 16),
        lora_dropout=float(recipe.get("lora_dropout") or 0.0),
        target_modules=named,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, adapter).train()


def _batch(question: Question) -> tuple[Tensor, Tensor, Tensor]:
    """A micro-batch: token ids, labels and mask, int64 [rows, prompt + answer]; of several rows one is shorter."""
    ids = torch.ones(question.rows, question.prompt + question.answer, dtype=torch.int64)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, : question.prompt] = -100
    if question.rows > 1:
        mask[0, -1], labels[0, -1] = 0, -100
    return ids, labels, mask


# --- parts of a step ---


class _FusedLoss(torch.autograd.Function):
    """Liger's product with the head and cross-entropy in one, which fake tensors cannot run: the same chunks."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, head: Tensor) -> Tensor:
        tokens, width = states.shape
        parts = -(-head.shape[0] // width)
        chunk = 1 << (-(-tokens // parts) - 1).bit_length()
        ctx.gradient = torch.empty_like(states)
        for begin in range(0, tokens, chunk):
            logits = states[begin : begin + chunk] @ head.t()
            ctx.gradient[begin : begin + chunk] = logits @ head  # the kernel leaves the gradient where the logits were
        return states.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient * upstream[0], None


class _Scored(torch.autograd.Function):
    """What `token_loss` keeps of its tokens, the gradient; what it holds while it works is `_loss_alone`'s to say."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, known: Tensor, head: Tensor) -> Tensor:
        ctx.gradient = torch.empty_like(states)
        return states.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        return ctx.gradient, None, None


def _loss_alone(student: Any, batch: Sequences, config: OnPolicyKLConfig, gpu: bool) -> int:
    """The most that the divergence holds beside its inputs and the gradient, bytes.

    Seen on as many tokens as it takes at once: more go through the same buffers.
    """
    # No CPU either, and so it takes as many at once as a GPU does.
    peak, head, device = Peak(), head_weight(student), torch.device("meta" if gpu else "cpu")
    width, hidden = head.shape
    tokens, _ = sizes(device, width, len(batch.places), config.loss_chunk_tokens)
    states = peak.tensor(tokens, hidden, dtype=head.dtype, device=device).requires_grad_()
    weight = peak.tensor(width, hidden, dtype=head.dtype, device=device)
    samples = None
    if config.estimator == "sampled":
        samples = Samples(
            torch.zeros(tokens, dtype=torch.int64), torch.zeros(tokens), config.importance_cap or math.inf
        )

    def run() -> None:
        arguments = (states, weight, states.detach(), weight, config.divergence, config.beta)
        token_loss(*arguments, samples, config.loss_chunk_tokens)

    return max(0, peak.of(run, states, weight) - 2 * states.nbytes - weight.nbytes)


@torch.no_grad()
def _read_prompts(student: Any, rows: int, prompt: int) -> None:
    """What generation begins with: prompts read at once, their cache kept."""
    ids = torch.ones(rows, prompt, dtype=torch.int64)
    student.eval()
    student(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1)
    student.train()


if __name__ == "__main__":
    answer_all(lambda asked: asdict(answer(Question(**asked))))
