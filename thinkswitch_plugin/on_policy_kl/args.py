"""What a recipe may say under `on_policy_kl:`, and nothing else.

Knows: the plugin's names, keys, defaults and their limits, and how much they let be decoded at once. Leaves to others:
what the keys do, and whether the teacher fits (`checks`).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from thinkswitch_plugin.recipe import checked
from thinkswitch_plugin.trace_stripping.args import Tags
from thinkswitch_plugin.trace_stripping.trace import DEFAULT_TAGS

BLOCK = "on_policy_kl"  # the key in a recipe, and the name of the file of facts
DATASET_TYPE = "thinkswitch_plugin.on_policy_kl"
PLUGIN = f"{DATASET_TYPE}.OnPolicyKLPlugin"
SELF = "self"
SERVER_KEY = "ON_POLICY_KL_API_KEY"  # not OpenAI's own variable: a recipe names the server, and must not get that key
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def _as_pairs(tags: Any) -> Any:
    return [tags] if isinstance(tags, list | tuple) and all(isinstance(tag, str) for tag in tags) else tags


class OnPolicyKLConfig(BaseModel):
    """The `on_policy_kl:` block of a recipe; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid")

    teacher: str = Field(description="A checkpoint (folder or hub id), or `self`: the student with its adapter off.")
    teacher_load_in_4bit: bool = Field(
        default=False, description="Hold the teacher's linear layers in NF4 (bitsandbytes)."
    )
    context: Literal["prompt", "trace"] = Field(
        default="prompt",
        description="What the teacher reads before the student's answer: the student's own prompt, or its own chat "
        "template's prompt with its own reasoning trace.",
    )
    trace_max_new_tokens: int = Field(
        default=2048,
        ge=1,
        description="Longest trace that the teacher reads: it writes no longer one, and a row that brings one is left "
        "out and counted.",
    )
    max_dropped_fraction: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Stop with an error if a larger share of a dataset's traces is left out.",
    )
    tags: Annotated[Tags, BeforeValidator(_as_pairs)] = Field(
        default=list(DEFAULT_TAGS),
        description="Pairs of opening and closing tag of a trace; one pair may stand by itself.",
    )
    rollouts_per_prompt: int = Field(
        default=1, ge=1, description="Answers the student writes to each prompt of a batch."
    )
    rollout_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="Answers written at once; all of a step's, if their key-value cache fits the memory.",
    )
    unpack_rollouts: bool = Field(
        default=False,
        description="While the student answers, hold its layers in NF4 unpacked too: the same answers, faster, for "
        "their whole size in memory.",
    )
    update_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="Rollouts learnt from in one backward; all of a micro-batch's, if their activations fit the "
        "memory. The step's loss is the same sum, however it is cut.",
    )
    max_new_tokens: int = Field(default=512, ge=1, description="Longest answer, its end token included.")
    temperature: float = Field(default=1.0, ge=0.0, description="Of the student's sampler; 0 is greedy decoding.")
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, description="Nucleus of the student's sampler.")
    top_k: int = Field(default=0, ge=0, description="Tokens the student's sampler may choose from; 0: all.")
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = Field(
        default="reverse_kl", description="KL(student ‖ teacher), KL(teacher ‖ student), or their mixture."
    )
    beta: float = Field(default=0.5, gt=0.0, lt=1.0, description="Weight of the teacher in the mixture of `jsd`.")
    estimator: Literal["full", "sampled"] = Field(
        default="full",
        description="`full` sums over the vocabulary; `sampled` looks at the sampled token alone, importance-weighted.",
    )
    importance_cap: float | None = Field(
        default=2.0,
        ge=1.0,
        description="The most that a token weighs in `sampled` (truncated importance sampling): a server's weights are "
        "older than the student's. null: no limit, and no bias.",
    )
    loss_chunk_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Tokens taken to logits at once, which sets the loss's memory; as many as fit 160 MB on a CPU, and "
        "on an accelerator twice as many, with scratch some 900 MB.",
    )
    server: str | None = Field(
        default=None,
        pattern=r"^https?://",
        description="Base URL of an OpenAI-compatible server (vLLM, SGLang) that writes the rollouts. A key that "
        f"it asks for is read from {SERVER_KEY}.",
    )
    server_plain_http: bool = Field(
        default=False, description="Let a server on another machine be asked without encryption."
    )
    server_model: str | None = Field(default=None, description="The student's name at that server.")
    show_every: int = Field(default=0, ge=0, description="Show three rollouts in colour every so many steps; 0: never.")

    def prompts_at_once(self, prompts: int) -> int:
        """Of so many prompts: to how many answers are written at once."""
        size = self.rollout_batch_size
        return max(1, size // self.rollouts_per_prompt if size else prompts)

    def traces_at_once(self, traces: int) -> int:
        """Of so many traces: how many are written at once; their cache may take as many tokens as the rollouts' may."""
        size = self.rollout_batch_size
        return max(1, size * self.max_new_tokens // self.trace_max_new_tokens if size else traces)

    def longest_wait(self, prompts: int) -> int:
        """Tokens that one process may decode in a step, one after the other, while another has none to decode.

        Args:
            prompts: of a process and step.
        """
        answers = ceil(prompts / self.prompts_at_once(prompts)) * self.max_new_tokens
        traces = ceil(prompts / self.traces_at_once(prompts)) * self.trace_max_new_tokens
        return answers + (traces if self.context == "trace" else 0)

    @model_validator(mode="after")
    def _fits_together(self) -> OnPolicyKLConfig:
        if self.temperature == 0 and (self.top_p < 1 or self.top_k or self.rollouts_per_prompt > 1):
            raise ValueError(
                "temperature 0 is greedy decoding, which leaves top_p, top_k and more than one rollout nothing to do; "
                "set temperature above 0 or remove them"
            )
        if self.rollout_batch_size and self.rollout_batch_size < self.rollouts_per_prompt:
            raise ValueError("rollout_batch_size is less than rollouts_per_prompt, which are written together")
        if self.estimator == "sampled":
            if self.divergence != "reverse_kl":
                raise ValueError("estimator sampled estimates reverse_kl only; remove divergence or set estimator full")
            if self.temperature != 1 or self.top_p < 1 or self.top_k:
                raise ValueError(
                    "estimator sampled needs tokens drawn as the student would: set temperature 1, top_p 1 and top_k 0"
                )
        if self.server:
            url = urlsplit(self.server)
            if url.username or url.password:
                raise ValueError(f"server has a user or password in its URL; give a key by {SERVER_KEY} instead")
            if url.scheme == "http" and url.hostname not in LOOPBACK and not self.server_plain_http:
                raise ValueError(
                    f"server {url.hostname} would be sent prompts without encryption; use https, or say "
                    "server_plain_http: true"
                )
            if not self.server_model:
                raise ValueError("server needs server_model, the student's name there")
        if self.teacher == SELF and self.teacher_load_in_4bit:
            raise ValueError("teacher self has no weights of its own to hold in 4 bits; remove teacher_load_in_4bit")
        return self


class OnPolicyKLArgs(BaseModel):
    """What the plugin adds to Axolotl's own config model."""

    on_policy_kl: OnPolicyKLConfig | None = Field(
        default=None, description="On-policy distillation: per-token KL on the student's own rollouts."
    )


def read_block(block: Mapping[str, Any] | None) -> OnPolicyKLConfig:
    """Read a recipe's `on_policy_kl:` block; raises `ValueError` with one line, as `checked` does."""
    return checked(BLOCK, OnPolicyKLConfig, block)
