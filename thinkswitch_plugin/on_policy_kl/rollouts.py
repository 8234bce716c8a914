"""The student's own answers: what it samples, here or at a server, and how they are laid out for the loss.

Knows generation, the completions protocol and padding. Leaves to others: which prompts (`strategy`), what the teacher
reads (`scoring`), the loss.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import requests
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from thinkswitch_plugin.on_policy_kl.args import SERVER_KEY, OnPolicyKLConfig

SERVER_TIMEOUT_S = 3600  # a batch of long answers takes its time


class Rollout(NamedTuple):
    """One answer.

    Attributes:
        prompt: token ids as the student read them.
        answer: token ids it wrote, with the end token where it wrote one.
        truncated: it was cut at `max_new_tokens`.
        log_probs: the sampler's log-probability of each answer token, in nats; None where it is the student itself at
            temperature 1.
    """

    prompt: list[int]
    answer: list[int]
    truncated: bool
    log_probs: list[float] | None = None


class Sequences(NamedTuple):
    """Prompts and answers as one batch, padded on the right.

    Attributes:
        input_ids: int64 [B, T].
        attention_mask: int64 [B, T]; no model reads it, see `answer_states`.
        places: int64 [N], where the answer tokens lie in `input_ids` laid out as [B · T]; rows one after the other.
    """

    input_ids: Tensor
    attention_mask: Tensor
    places: Tensor

    @property
    def answers(self) -> Tensor:
        """bool [B, T], true on answer tokens."""
        flat = torch.zeros(self.input_ids.numel(), dtype=torch.bool, device=self.input_ids.device)
        return flat.index_fill_(0, self.places, True).view_as(self.input_ids)

    def cut(self, rows: int) -> list[Sequences]:
        """The same in parts of at most so many rows, each as wide as its own longest."""
        if rows >= len(self.input_ids):
            return [self]
        parts = []
        for ids, real, answers in zip(*(part.split(rows) for part in (*self[:2], self.answers)), strict=True):
            width = int(real.sum(1).max())
            places = answers[:, :width].flatten().nonzero().squeeze(1)
            parts.append(Sequences(ids[:, :width], real[:, :width], places))
        return parts


def end_tokens(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """The ids that end an answer: the tokenizer's first, then what the generation config adds."""
    more = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = [tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])]
    return [end for end in dict.fromkeys(ends) if end is not None]


def put_to_answer(model: nn.Module) -> None:
    """Dropout off, cache allowed.

    Layers in NF4 stay in training mode, which means nothing else to them: on some CPUs (AVX512-BF16) bitsandbytes 0.50
    packs such a layer anew the first time it runs in evaluation mode, for good, and backward then reads it wrongly.
    """
    model.eval()
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.train()


@contextmanager
def answering(model: nn.Module) -> Iterator[None]:
    """A model as it answers; afterwards as it was."""
    training = model.training
    put_to_answer(model)
    try:
        yield
    finally:
        model.train(training)


class Unpacked(nn.Linear):
    """A layer in NF4 as its product sees it: its weights unpacked, once for many tokens, in what it computes in."""

    def __init__(self, packed: Linear4bit):
        """Unpack [out · in / 2] bytes into [out, in]; the bias is shared."""
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = packed.in_features, packed.out_features, packed.bias
        held: Any = packed.weight
        weight = dequantize_4bit(held.data, held.quant_state)
        self.weight = nn.Parameter(weight.to(packed.compute_dtype or weight.dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] to [..., out], in x's dtype, as bitsandbytes casts."""
        bias = self.bias if self.bias is None else self.bias.to(self.weight.dtype)
        return nn.functional.linear(x.to(self.weight.dtype), self.weight, bias).to(x.dtype)


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """A model whose layers in NF4 lie there unpacked, to decode faster; afterwards as it was. The same policy.

    In NF4 each token of an answer unpacks every layer anew, unless one row alone is answered on a GPU.
    """
    packed = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, Linear4bit)
    ]
    try:
        for parent, name, layer in packed:
            setattr(parent, name, Unpacked(layer))
        yield
    finally:
        for parent, name, layer in packed:
            setattr(parent, name, layer)


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """A float32 LoRA student on a CPU with its adapter added to the weights, to decode faster; afterwards as it was.

    The same policy up to float32's rounding. Weights in less are left alone: rounded to bfloat16 or NF4, the sum would
    be another policy's. So are an accelerator's: for a while there are two copies of the layers. What was `unpacked`
    for the while is added to in place.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    fits = all(
        type(layer) in (lora.Linear, lora.Linear4bit)
        and (layer.weight.dtype, layer.weight.device.type) == (torch.float32, "cpu")
        and not (layer.lora_variant or layer.merged or layer.disable_adapters)
        for layer in layers
    )
    own = [layer.weight.data for layer in layers] if fits else []
    try:
        for layer, weight in zip(layers, own, strict=False):
            delta: Callable[[str], Tensor] = layer.get_delta_weight  # type: ignore[assignment]
            if not isinstance(layer.get_base_layer(), Unpacked):
                layer.weight.data = weight.clone()
            for adapter in layer.active_adapters:
                layer.weight.data += delta(adapter)
            layer.merged_adapters.extend(layer.active_adapters)
        yield
    finally:
        for layer, weight in zip(layers, own, strict=False):
            layer.weight.data = weight
            layer.merged_adapters.clear()


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 [B, T], the rows' ends in line."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def sequences(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], pad: int) -> Sequences:
    """Lay prompts and their answers side by side, padded on the right, on the CPU."""
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    width = max(map(len, rows))
    places = [
        row * width + at
        for row, (prompt, ids) in enumerate(zip(prompts, rows, strict=True))
        for at in range(len(prompt), len(ids))
    ]
    return Sequences(
        torch.tensor([ids + [pad] * (width - len(ids)) for ids in rows]),
        (torch.arange(width) < torch.tensor([[len(ids)] for ids in rows])).long(),
        torch.tensor(places, dtype=torch.int64),
    )


@torch.inference_mode()
def generate(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], settings: GenerationConfig, pad: int
) -> tuple[list[list[int]], list[bool]]:
    """Let a model continue prompts of mixed lengths, in one padded batch with its cache.

    Args:
        model: in evaluation mode.
        prompts: token ids.
        settings: with `eos_token_id` and `max_new_tokens`.
        pad: the id to pad with.

    Returns:
        The new tokens of each, up to and with the first end token, and whether each was cut before one.
    """
    ids, mask = left_padded(prompts, pad, model.device)
    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)  # type: ignore[operator]
    ends = set(settings.eos_token_id or [])
    answers, cut = [], []
    for row in out[:, ids.shape[1] :].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in ends), None)
        answers.append(row[:end])
        cut.append(end is None)
    return answers, cut


def sample(
    model: PreTrainedModel, prompts: Sequence[list[int]], config: OnPolicyKLConfig, ends: list[int], pad: int
) -> list[Rollout]:
    """Let the student answer each prompt `rollouts_per_prompt` times; rollouts of one prompt are neighbours."""
    drawn = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
    # `generate` fills what is left out from the checkpoint's own generation config, which is made for other ends. A
    # `min_p` of zero sorts the vocabulary at every token and takes nothing away, so it is not said without need.
    if getattr(model.generation_config, "min_p", None) is not None:
        drawn["min_p"] = 0.0
    settings = GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        do_sample=config.temperature > 0,
        repetition_penalty=1.0,
        eos_token_id=ends,
        pad_token_id=pad,
        use_cache=True,
        **(drawn if config.temperature > 0 else {}),
    )
    repeated = [prompt for prompt in prompts for _ in range(config.rollouts_per_prompt)]
    answers, cut = generate(model, repeated, settings, pad)
    return [Rollout(*row) for row in zip(repeated, answers, cut, strict=True)]


def from_server(
    prompts: Sequence[list[int]], config: OnPolicyKLConfig, ends: list[int], tokenizer: Any
) -> list[Rollout]:
    """As `sample`, by an OpenAI-compatible server (vLLM, SGLang), which gets token ids and all prompts in one request.

    Where the server does not give token ids back, its text is tokenised again. It answers with the weights it was
    started with: the `sampled` estimator's importance weight accounts for that, the other divergences do not.

    Raises:
        ValueError: the server does not answer, or not with completions; one line.
    """
    url = f"{str(config.server).rstrip('/').removesuffix('/v1')}/v1/completions"
    body = {
        "model": config.server_model,
        "prompt": list(prompts),
        "n": config.rollouts_per_prompt,
        "max_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k or -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "logprobs": 1,
        "return_token_ids": True,
    }
    key = os.environ.get(SERVER_KEY)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        reply = requests.post(url, json=body, headers=headers, timeout=SERVER_TIMEOUT_S)
        reply.raise_for_status()
        choices = sorted(reply.json()["choices"], key=lambda choice: choice["index"])
        repeated = [prompt for prompt in prompts for _ in range(config.rollouts_per_prompt)]
        return [_rollout(*pair, ends, tokenizer) for pair in zip(repeated, choices, strict=True)]
    except (requests.RequestException, KeyError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"on_policy_kl: server {url}: no completions ({type(error).__name__}: {why})") from None


def _rollout(prompt: list[int], choice: dict[str, Any], ends: list[int], tokenizer: Any) -> Rollout:
    answer = choice.get("token_ids") or tokenizer(choice["text"], add_special_tokens=False)["input_ids"]
    cut = choice["finish_reason"] == "length"
    known = (choice.get("logprobs") or {}).get("token_logprobs")
    known = known if known and len(known) == len(answer) else None
    if not cut and ends and (not answer or answer[-1] not in ends):  # servers swallow the end token
        answer, known = [*answer, ends[0]], known and [*known, math.nan]
    return Rollout(prompt, answer, cut, known)
