"""Hidden states at the answers' positions, of student and teacher, and the teacher's traces.

Knows models: decoders, heads, adapters. Leaves to others: the loss on the hidden states (`loss`), when to score
(`trainer`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from thinkswitch_plugin.nf4 import nf4
from thinkswitch_plugin.on_policy_kl.args import SELF, OnPolicyKLConfig
from thinkswitch_plugin.on_policy_kl.rollouts import Sequences, answering, end_tokens, generate, put_to_answer
from thinkswitch_plugin.scaling import OF_LOGITS, scaled
from thinkswitch_plugin.trace_stripping.trace import TagPairs, template_opens_trace, trace_end

TEACHER_TOKENS = 16_384  # tokens that the teacher reads at once, padding included


def head_weight(model: PreTrainedModel) -> Tensor:
    """The output weights [V, H] of a causal model, in their own dtype, under an adapter or not.

    Raises:
        ValueError: if its logits are more than hidden states times a matrix, or the head itself has an adapter.
    """
    head = model.get_output_embeddings()
    saved = getattr(head, "modules_to_save", None)
    if isinstance(saved, nn.ModuleDict):  # peft keeps a trained copy of a whole layer
        head = head.original_module if head.disable_adapters else saved[head.active_adapters[0]]
    config = model.config.get_text_config()
    more = [*scaled(config, OF_LOGITS), *(["a bias"] if getattr(head, "bias", None) is not None else [])]
    if more:
        raise ValueError(
            f"on_policy_kl: the logits of {model.config.model_type} have {more[0]} beside a matrix; use another family"
        )
    if hasattr(head, "base_layer"):
        raise ValueError("on_policy_kl: the output layer has a LoRA adapter: take lm_head out of lora_target_modules")
    weight: Tensor = head.weight
    return weight


def answer_states(model: nn.Module, bare: PreTrainedModel, batch: Sequences) -> Tensor:
    """Run a model and keep its last hidden states at the positions that predict answer tokens.

    No mask goes with it: padding stands on the right, where nothing that counts looks in a causal model, and a mask of
    16,384 tokens is half a gigabyte and rules flash attention out.

    Args:
        model: what is called: the model itself, or the wrapper that a distributed run puts around it.
        bare: the model inside, with its adapter if it has one.
        batch: prompts and answers.

    Returns:
        [N, H], rows in the order of `batch.places`.
    """
    seen: list[Tensor] = []
    # The wrapper has to be called, and it ends in logits; the decoder's output is taken on the way.
    hook = bare.get_decoder().register_forward_hook(lambda _, __, out: seen.append(out.last_hidden_state))
    try:
        model(input_ids=batch.input_ids[:, :-1], use_cache=False, logits_to_keep=1)  # the last predicts nothing
    finally:
        hook.remove()
    (states,) = seen
    rows = batch.places // batch.input_ids.shape[1]  # each is a token shorter now
    return states.flatten(0, 1)[batch.places - rows - 1]


class Teacher:
    """A frozen model that scores the student's answers, and where asked thinks first."""

    def __init__(self, config: OnPolicyKLConfig, student: PreTrainedModel, tokenizer: Any, dtype: torch.dtype):
        """Load the teacher, or borrow the student's base.

        Args:
            config: the recipe's block.
            student: with its adapter; the teacher goes to its device.
            tokenizer: the student's, which is also that of `self`.
            dtype: of the teacher's weights.

        Raises:
            ValueError: `self` without an adapter to turn off.
        """
        self.config = config
        self._off: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.traces: dict[tuple[int, ...], list[int] | None] = {}  # by prompt; None where one never closed
        if config.teacher == SELF:
            if not hasattr(student, "disable_adapter"):
                raise ValueError("on_policy_kl: teacher self is the student without its adapter; set adapter: lora")
            self.model, self.tokenizer, self._off = student, tokenizer, cast(PeftModel, student).disable_adapter
            return
        self.model = AutoModelForCausalLM.from_pretrained(
            config.teacher,
            dtype=dtype,
            device_map={"": student.device},
            quantization_config=nf4(dtype) if config.teacher_load_in_4bit else None,
            use_safetensors=True,
        )
        put_to_answer(self.model.requires_grad_(False))  # for good
        self.tokenizer = AutoTokenizer.from_pretrained(config.teacher)

    @contextmanager
    def _awake(self) -> Iterator[PreTrainedModel]:
        """The teacher's model as it is to be called: adapter and dropout off, no gradient."""
        borrowed = self.config.teacher == SELF
        with torch.no_grad(), self._off(), answering(self.model) if borrowed else nullcontext():
            yield self.model

    @property
    def head(self) -> Tensor:
        """Its output weights [V, K]."""
        with self._off():
            return head_weight(self.model).detach()

    def states(self, batch: Sequences) -> Tensor:
        """Its last hidden states [N, K] at the positions that predict answer tokens."""
        rows = max(1, TEACHER_TOKENS // batch.input_ids.shape[1])  # a trace may be long, and comes with every rollout
        with self._awake() as model:
            return torch.cat([answer_states(model, model, part) for part in batch.cut(rows)])

    def think(self, prompts: Sequence[Sequence[int]]) -> dict[tuple[int, ...], list[int] | None]:
        """Let the teacher write a trace after each prompt that has none in `traces` yet, and give the new ones.

        Sampling is as its own generation config says. The trace keeps what lies between its end and the answer; one
        that never closes is None.
        """
        opened = template_opens_trace(self.tokenizer, self.config.tags)
        new = list(dict.fromkeys(tuple(prompt) for prompt in prompts if tuple(prompt) not in self.traces))
        settings = GenerationConfig(
            max_new_tokens=self.config.trace_max_new_tokens,
            eos_token_id=end_tokens(self.model, self.tokenizer),
            pad_token_id=self.tokenizer.pad_token_id,
            use_cache=True,
        )
        size = self.config.traces_at_once(len(new))
        for batch in (new[start : start + size] for start in range(0, len(new), size)):
            with self._awake() as model:
                written, _ = generate(model, batch, settings, self.tokenizer.pad_token_id)
            for prompt, tokens in zip(batch, written, strict=True):
                self.traces[prompt] = trace_tokens(tokens, self.tokenizer, opened, self.config.tags)
        return {prompt: self.traces[prompt] for prompt in new}


def trace_tokens(tokens: list[int], tokenizer: Any, opened: bool, tags: TagPairs) -> list[int] | None:
    """The tokens up to where their trace is over, with the white space that follows; None where it is not.

    Args:
        tokens: what the teacher wrote.
        tokenizer: its own.
        opened: its prompt had opened the trace.
        tags: as for `trace_end`.
    """
    text = tokenizer.decode(tokens)
    end = trace_end(text, opened, tags)
    if end is None:
        return None
    few, enough = 0, len(tokens)  # the fewest tokens whose text holds the whole trace
    while enough - few > 1:
        middle = (few + enough) // 2
        if tokenizer.decode(tokens[:middle]).startswith(text[:end]):
            enough = middle
        else:
            few = middle
    special = set(tokenizer.all_special_ids)
    while enough < len(tokens) and tokens[enough] not in special and not tokenizer.decode([tokens[enough]]).strip():
        enough += 1
    return tokens[:enough]
