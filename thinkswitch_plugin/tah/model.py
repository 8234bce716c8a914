"""Think-at-Hard: a causal language model that reads the tokens it finds hard more than once.

Knows the passes: which tokens a pass is made of, what it is fed, how its predictions add up, and the two losses.
Leaves to others: what a pass sees (`attention`), its adapters (`lora`), who decides (`decider`), and where the labels
come from (`oracle`). TaH, arXiv 2511.08577.

With W the head, E the embedding and h_d the normed last hidden state of a token at depth d:

    logits after depth d      W h_1 + … + W h_d  =  W (h_1 + … + h_d)
    input of depth d + 1      Σ_k softmax(top-k of these logits)_k · E_k

The head is linear, so the sum is kept in the hidden width, and a token's logits are made once its depth is known.
The backbone's layers run as they are; this module calls them one by one to keep the hidden states that the decider
reads and no others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import LinearCrossEntropyOptions
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from thinkswitch_plugin.tah import LOADER
from thinkswitch_plugin.tah.attention import EMPTY, NAME, Padding, Pass, TaHCache
from thinkswitch_plugin.tah.config import TaHConfig
from thinkswitch_plugin.tah.decider import Decider
from thinkswitch_plugin.tah.lora import DepthLinear, add_adapters

LOGITS_AT_ONCE = 40_000_000  # numbers, where many tokens are looked at: 160 MB in float32
GATHER_RATIO = 8  # vocabulary over mix_top_k, from which on gathering rows of the embedding pays
LOADER_TEXT = '''"""Lets stock loaders find the classes of this checkpoint; needs the package `thinkswitch`."""

from thinkswitch_plugin.tah.config import TaHConfig
from thinkswitch_plugin.tah.model import TaHForCausalLM

__all__ = ["TaHConfig", "TaHForCausalLM"]
'''


@dataclass
class TaHOutput(ModelOutput):
    """What a forward pass returns.

    Attributes:
        loss: scalar, with `labels`.
        logits: [B, kept, V], summed over depths; None where a loss is asked and they are not.
        past_key_values: the cache, with `use_cache`.
        depth: int64 [B, T], passes each token took, 0 at padding.
        continue_logits: [B, T], the learned decider's log-odds after depth 1, NaN where it was not asked; None without
            a learned decider.
        decided: int64 scalar, how many supervised decisions the decider's loss sums over; None without one.
        right: int64 scalar, how many of them were right at the threshold.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    depth: Tensor | None = None
    continue_logits: Tensor | None = None
    decided: Tensor | None = None
    right: Tensor | None = None


class _Top(NamedTuple):
    """The largest logits of N positions: values [N, k], largest first, and the ids of their tokens, int64 [N, k]."""

    values: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Counts:
    """Sizes that a batch's tensors hold: who knows them beforehand need not wait for the device to tell.

    Attributes:
        lengths: tokens of each row, without padding.
        padding: where rows are padded.
        labelled: how many predictions carry a loss; None where there are no labels.
        deeper: for each depth from 2 on, how many tokens of each row `target_depth` sends there; None without it.
    """

    lengths: tuple[int, ...]
    padding: Padding
    labelled: int | None = None
    deeper: tuple[tuple[int, ...], ...] | None = None


def count(
    shape: tuple[int, int] | torch.Size,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    target_depth: Tensor | None,
    max_depth: int,
) -> Counts:
    """Count what a batch of this shape [B, T] holds; on a device it is asked once, and not at all of bare tokens.

    Args:
        shape: of `input_ids`.
        attention_mask, labels, target_depth: as `TaHForCausalLM.forward` has them.
        max_depth: of the model.
    """
    size, length = shape
    asked, deeper = [], 0
    valid = None if attention_mask is None else attention_mask[:, -length:].bool()
    if valid is not None:
        asked += [valid.sum(1), (valid[:, 1:] & ~valid[:, :-1]).any(1).long()]
    if labels is not None:
        asked.append((labels[:, 1:] != -100).sum(1))
    if target_depth is not None:
        reached = [target_depth > d for d in range(1, max_depth)]
        asked += [(far if valid is None else far & valid).sum(1) for far in reached]
        deeper = len(reached)
    told = torch.stack(asked).tolist() if asked else []
    lengths = (length,) * size
    padding: Padding = "none"
    if valid is not None:
        found, behind, *told = told
        lengths = tuple(found)
        padding = "mixed" if any(behind) else "none" if min(lengths) == length else "right"
    labelled = sum(told.pop(0)) if labels is not None else None
    assert len(told) == deeper
    return Counts(lengths, padding, labelled, None if target_depth is None else tuple(map(tuple, told)))


def _picked(values: Tensor, index: Tensor | None) -> Tensor:
    return values if index is None else values[index]


def _where(mask: Tensor, many: int) -> Tensor:
    """Where a bool [N] is True, int64 [many]."""
    return torch.nonzero_static(mask, size=many).squeeze(1)


def tokens_at_a_head(vocabulary: int) -> int:
    """How many positions are taken to logits over a vocabulary of so many tokens at once."""
    return max(1, LOGITS_AT_ONCE // vocabulary)


def refuse_pickles(folder: Path) -> None:
    """Raise `ValueError` if a folder holds weights that are a pickle; a trainer's own settings are never read."""
    pickles = sorted(path for path in folder.glob("*.bin") if path.name != "training_args.bin")
    if pickles:
        raise ValueError(f"tah: {pickles[0]} is a pickle, which runs code when read; use safetensors")


class TaHForCausalLM(PreTrainedModel, GenerationMixin):
    """A backbone of the Qwen3/Llama family, a depth-specific adapter and a decider.

    `objective` says what `labels` and `target_depth` train: `tokens` (stage 1: cross-entropy of the summed logits) or
    `decider` (stage 2: weighted binary cross-entropy of the decider, everything else without a graph).
    """

    config_class = TaHConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    # At the paper's rate bfloat16 loses most of its updates, and a decision near the threshold is one of digits.
    _keep_in_fp32_modules_strict = {"decider"}  # noqa: RUF012 (a name that transformers reads)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012 (a name that transformers reads)
    config: TaHConfig

    def __init__(self, config: TaHConfig, backbone: PreTrainedModel | None = None):
        """Build around `backbone`, or around one with random weights; see `from_backbone` and `from_pretrained`."""
        super().__init__(config)
        self.backbone = AutoModelForCausalLM.from_config(config.text_config) if backbone is None else backbone
        self._check_backbone()
        self.backbone.set_attn_implementation(NAME)
        self.objective = "tokens"
        self.pos_weight = 1.0
        self._stored: torch.dtype | None = None  # what weights are saved in, where it is not what they are trained in
        self._switch = add_adapters(self._decoder.layers, config.lora_r, config.lora_alpha, config.lora_dropout)
        self.decider = self._new_decider() if config.decider_hidden else None
        self.post_init()

    def _new_decider(self) -> Decider:
        config = self.config
        with self._embedding.weight.device:
            return Decider(
                config.text_config.hidden_size,
                len(config.decider_layers),
                config.mix_top_k,
                config.decider_hidden,
                config.decider_expansion,
                config.decider_dropout,
            )

    def begin_backbone(self) -> None:
        """Start stage 1: gradients for backbone and adapter, which are kept in float32 while they learn.

        bfloat16 has 8 bits: a weight of more than 2⁻⁶ does not move by 4e-5 at all. Run it under autocast, which
        multiplies in bfloat16; what is saved has the dtype that the backbone had.
        """
        if self.dtype != torch.float32:
            self._stored = self.dtype
        self.requires_grad_(True)
        for parameter in self.parameters():
            parameter.data = parameter.data.float()

    def begin_decider(self, pos_weight: float, **settings: Any) -> None:
        """Start stage 2: a new decider as `settings` (of `TaHConfig`) say, and gradients for nothing else.

        Args:
            pos_weight: weight of the tokens that should continue in the decider's loss.
            settings: its layers, widths and threshold.

        Raises:
            ValueError: a setting is wrong.
        """
        self.config.update(settings)
        self.config.check()
        self.decider = self._new_decider()
        self.requires_grad_(False)
        self.decider.requires_grad_(True)
        self.objective, self.pos_weight = "decider", pos_weight

    def added_parameters(self) -> int:
        """How many parameters the adapter and the decider add to the backbone."""
        decider = self.decider.parameters() if self.decider is not None else ()
        return sum(p.numel() for p in (*self._adapter(), *decider))

    # --- loading and saving ---

    @classmethod
    def from_backbone(cls, backbone: PreTrainedModel, **settings: Any) -> TaHForCausalLM:
        """Wrap a loaded causal language model, whose weights are kept; `settings` are those of `TaHConfig`.

        Raises:
            ValueError: the backbone is not built as those of the Qwen3/Llama family are, or a setting is wrong.
        """
        config = TaHConfig(text_config=backbone.config, **settings)
        for parameter in backbone.parameters():
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        model = cls(config, backbone)
        model.generation_config = backbone.generation_config
        return model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint; keys of `TaHConfig` among the arguments (`threshold`, `decider`, …) replace its own.

        Raises:
            ValueError: the folder is no TaH checkpoint, or holds weights that are a pickle.
        """
        refuse_pickles(Path(str(pretrained_model_name_or_path)))
        if kwargs.get("quantization_config") is not None:
            raise ValueError(
                "tah: quantized loading would leave the backbone whole and quantize the decider; remove it"
            )
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs.update(use_safetensors=True, output_loading_info=True)
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model, info = loaded
        # Stock loading would go on with whatever was in memory.
        if lost := sorted(info["missing_keys"]):
            raise ValueError(
                f"tah: {pretrained_model_name_or_path} holds no {lost[0]}: the checkpoint and its settings do not "
                "belong together"
            )
        return (model, info) if wants_info else model

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write weights (safetensors), config and the few lines by which stock loaders find the classes.

        What was trained in float32 for its sake alone is written in the dtype it had before (not within `as_trained`);
        the decider in float32.
        """
        self.config.auto_map = {
            "AutoConfig": f"{Path(LOADER).stem}.TaHConfig",
            "AutoModelForCausalLM": f"{Path(LOADER).stem}.TaHForCausalLM",
        }
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / LOADER).write_text(LOADER_TEXT, encoding="utf-8")
        if self._stored is None:
            super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
            return
        cast: dict[int, Tensor] = {}  # tied weights stay one tensor
        state_dict = {
            name: value if name.startswith("decider.") else cast.setdefault(value.data_ptr(), value.to(self._stored))
            for name, value in (state_dict or self.state_dict()).items()
        }
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
        self.config.dtype = self._stored  # loaders that ask for `auto` take it
        if is_main_process:
            self.config.save_pretrained(save_directory)

    @contextmanager
    def as_trained(self) -> Iterator[None]:
        """Have `save_pretrained` write each weight as it is trained: rounded, a run would go on from other weights."""
        stored, self._stored = self._stored, None
        try:
            yield
        finally:
            self._stored = stored

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing: saving must not copy this package's source into the checkpoint (`LOADER` imports it)."""

    def _init_weights(self, module: nn.Module) -> None:
        # The backbone initialises itself; a checkpoint holds the rest, or it was drawn when it was built.
        pass

    def _check_backbone(self) -> None:
        head = self.backbone.get_output_embeddings()
        decoder = self.backbone.get_decoder()
        missing = [name for name in ("layers", "norm", "rotary_emb") if not hasattr(decoder, name)]
        name = type(self.backbone).__name__
        if type(self.backbone.get_input_embeddings()) is not nn.Embedding:
            raise ValueError(f"tah: {name} has no embedding layer where one is expected (get_input_embeddings)")
        if missing:
            raise ValueError(f"tah: {name} has no {missing[0]} where Qwen3 and Llama have them; use one of that family")
        if head is None or getattr(head, "bias", None) is not None:
            raise ValueError(f"tah: {name} has no linear head without a bias; logits of depths could not be added up")

    @property
    def _decoder(self) -> Any:
        return self.backbone.get_decoder()

    @property
    def _embedding(self) -> Any:
        return self.backbone.get_input_embeddings()

    @property
    def _head(self) -> Any:
        return self.backbone.get_output_embeddings()

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's."""
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The backbone's."""
        return self.backbone.get_output_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """The backbone's, as resizing the vocabulary asks."""
        self.backbone.set_input_embeddings(value)

    def set_output_embeddings(self, value: nn.Module) -> None:
        """The backbone's, as resizing the vocabulary asks."""
        self.backbone.set_output_embeddings(value)

    def get_decoder(self) -> nn.Module:
        """The backbone's."""
        return self._decoder

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # generation leaves the cache to `forward`

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Recompute layers in the backward pass, each at the depth it ran at."""
        kwargs = {**dict(zip(["gradient_checkpointing_kwargs"], args, strict=False)), **kwargs}
        # A deeper pass reads the keys of earlier ones, which only the non-reentrant kind sees.
        kwargs["gradient_checkpointing_kwargs"] = {
            **(kwargs.get("gradient_checkpointing_kwargs") or {}),
            "use_reentrant": False,
        }
        super().gradient_checkpointing_enable(**kwargs)
        if not getattr(self, "_told", False):
            self._told = True
            for layer in self._decoder.layers:
                layer.register_forward_pre_hook(self._at_its_depth, with_kwargs=True)

    def _at_its_depth(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if "duo" in kwargs:
            self._switch.now = kwargs["duo"].depth

    # --- forward ---

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: TaHCache | None = None,
        labels: Tensor | None = None,
        target_depth: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        counts: Counts | None = None,
        **kwargs: Any,
    ) -> TaHOutput:
        """Read tokens, the hard ones more than once.

        Args:
            input_ids: int64 [B, T]; with a cache, the tokens after those it holds.
            attention_mask: [B, T] or [B, cached + T], 0 at padding, on either side.
            position_ids: int64 [B, T]; columns, counted from 0, where missing. All depths of a token share one.
            past_key_values: the cache that an earlier call returned.
            labels: int64 [B, T], -100 where a token carries no loss; shifted here, as in any causal model.
            target_depth: int64 [B, T], how many passes each token should take to predict its next: the oracle's policy,
                and the decider's labels; -100 is no label.
            use_cache: return a cache.
            logits_to_keep: logits of the last so many tokens; 0: of all. None: of all without `labels`, of none with
                them, as [B, T, V] is the largest tensor there would be.
            num_items_in_batch: what the loss is divided by, the mean where missing.
            counts: what `count` says of these tensors; counted here where missing.

        Returns:
            `TaHOutput`.

        Raises:
            ValueError: the policy is `oracle` without `target_depth`, a decider is asked that is not there, or a
                graph is asked of tokens after a cache.
        """
        cache = TaHCache() if past_key_values is None else past_key_values
        if labels is None and input_ids.shape[1] == 1 and cache.get_seq_length():
            given = (input_ids, attention_mask, position_ids, cache, target_depth)
            read: Any = self._read_one
        else:
            keep = logits_to_keep if logits_to_keep is not None or labels is not None else 0
            given = (input_ids, attention_mask, position_ids, cache, labels, target_depth, keep)  # type: ignore[assignment]
            read = partial(self._read, num_items=num_items_in_batch, counts=counts)
        if cache.get_seq_length() == 0:
            output = read(*given)
        elif torch.is_grad_enabled():
            raise ValueError("tah: tokens after those of a cache are read without a graph; use torch.no_grad()")
        else:
            # A small model's decoding is bound by what each operation costs beside its work, and this saves a tenth.
            with torch.inference_mode():
                output = read(*given)
            if output.logits is not None:
                output["logits"] = output.logits.clone()  # an ordinary tensor again
        if use_cache:
            output["past_key_values"] = cache
        return output

    def prepare_inputs_for_generation(self, *args: Any, is_first_iteration: bool | None = False, **kwargs: Any) -> Any:
        """As ever, but of a token that was generated nobody need ask whether it is padding."""
        stock: Any = super().prepare_inputs_for_generation  # type: ignore[misc]
        given = stock(*args, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration and given["input_ids"].shape[1] == 1:
            given["attention_mask"] = None  # the cache knows the prompt's
        return given

    def _read(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: TaHCache,
        labels: Tensor | None,
        target_depth: Tensor | None,
        keep: int | None,
        num_items: Tensor | int | None,
        counts: Counts | None,
    ) -> TaHOutput:
        """Every pass over some tokens, then logits or a loss; the arguments are `forward`'s.

        Between passes all B·T positions are one axis: `total` [B·T, H] holds h_1 + … + h_d in the model's dtype,
        `depth` int64 [B·T] the passes so far, `live` int64 [n] those positions that the next decision is about.
        """
        config = self.config
        size, length = input_ids.shape
        max_depth, threshold, policy = config.max_depth, config.threshold, self._policy(target_depth)
        start = cache.get_seq_length()
        if counts is None:
            counts = count(input_ids.shape, attention_mask, labels, target_depth, max_depth)
        valid, position_ids = self._places(input_ids, attention_mask, position_ids, start)
        supervised = self.objective == "decider" and labels is not None
        reads = config.decider_layers if policy == "learned" else []
        # Only the decider has a graph at stage 2.
        graph = torch.is_grad_enabled() and not supervised

        with torch.set_grad_enabled(graph):
            duo = cache.first(valid, counts.padding)
            hidden, states = self._run(self._embedding(input_ids), position_ids, duo, reads)
        total = hidden.reshape(size * length, -1)
        depth = valid.long().view(-1)
        # The tokens that a decision is about, as flat indices; None: all of them.
        live = None if counts.padding == "none" else _where(valid.reshape(-1), sum(counts.lengths))
        states = [_picked(state.reshape(size * length, -1), live) for state in states]
        continue_logits: Tensor | None = None
        targets = None if target_depth is None else target_depth.reshape(-1)
        decisions: list[tuple[Tensor, Tensor]] = []

        for d in range(1, max_depth if policy != "never" else 1):
            top = None
            if policy == "learned":
                assert self.decider is not None
                top = self._top(total, live)
                log_odds = self.decider(states, top.values)
                continues = torch.sigmoid(log_odds.float()) > threshold
                if d == 1:
                    continue_logits = log_odds.detach()
                    if live is not None:
                        nowhere = continue_logits.new_full((size * length,), torch.nan)
                        continue_logits = nowhere.index_copy(0, live, continue_logits)
                if supervised and targets is not None:
                    decisions.append((log_odds, _picked(targets, live)))
                    if d == max_depth - 1:  # the last pass would decide nothing any more
                        every = torch.arange(len(depth), device=depth.device)
                        depth = depth.index_add(0, _picked(every, live), continues.long())
                        break
                chosen = continues.nonzero().squeeze(1)
                live = _picked(live, chosen) if live is not None else chosen
                top = _Top(*(part[chosen] for part in top))
                rows = tuple(torch.bincount(live // length, minlength=size).tolist()) if len(live) else ()
            else:
                if policy == "oracle":
                    assert targets is not None
                    assert counts.deeper is not None
                    rows, far = counts.deeper[d - 1], (targets > d) & valid.reshape(-1)
                else:
                    rows, far = counts.lengths, valid.reshape(-1)
                live = _where(far, sum(rows))
            if not any(rows):
                break
            top = self._top(total, live) if top is None else top
            with torch.set_grad_enabled(graph):
                mixed = self._mix(total[live], top)
                hidden, states = self._deeper(cache, d + 1, live, rows, mixed, position_ids, start, reads)
                total = total.index_add(0, live, hidden.to(total.dtype))
            depth[live] += 1

        output = TaHOutput(
            depth=depth.view(size, length),
            continue_logits=None if continue_logits is None else continue_logits.view(size, length),
        )
        if keep is not None and not supervised:
            output["logits"] = self._head(total.view(size, length, -1)[:, -keep:])
        if supervised:
            self._decider_loss(output, decisions, num_items)
        elif labels is not None:
            output["loss"] = self._token_loss(total.view(size, length, -1), labels, counts.labelled, num_items)
            if self.training and max_depth > 1 and cache.deepest == 1:
                # No token went deeper. Data-parallel training waits for every gradient, so the adapter's are zero.
                output["loss"] = output["loss"] + 0.0 * torch.stack([p.sum() for p in self._adapter()]).sum()
        return output

    def _read_one(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: TaHCache,
        target_depth: Tensor | None,
    ) -> TaHOutput:
        """Every pass over one token a row, behind those of a cache; the arguments are `forward`'s.

        The device is asked once a decision which rows continue, and for a fixed policy not at all: of a GPU each
        question is a wait. `which` are those rows, `scores` [B, 1, V] the logits of `total` [B, H].
        """
        config, policy = self.config, self._policy(target_depth)
        size, start = input_ids.shape[0], cache.get_seq_length()
        valid, position_ids = self._places(input_ids, attention_mask, position_ids, start)
        reads = config.decider_layers if policy == "learned" else []
        # Nothing that this token's row reads at depth 1 depends on whether it is padding itself, so that may wait.
        unsure = attention_mask is not None and cache.valid is None
        duo = cache.first(valid, "none" if cache.valid is None else "mixed")
        hidden, states = self._run(self._embedding(input_ids), position_ids, duo, reads)
        scores = self._head(hidden)
        total, states = hidden[:, 0], [state[:, 0] for state in states]
        depth = valid[:, 0].long()
        which, live = list(range(size)), None
        continue_logits: Tensor | None = None

        for d in range(1, config.max_depth if policy != "never" else 1):
            top = None
            continues = _picked(valid[:, 0], live)
            if policy == "learned":
                assert self.decider is not None
                top = _Top(*_picked(scores[:, 0], live).topk(config.mix_top_k))
                log_odds = self.decider(states, top.values)
                continues = continues & (torch.sigmoid(log_odds.float()) > config.threshold)
                if d == 1:
                    continue_logits = log_odds[:, None].masked_fill(~valid, torch.nan)
            elif policy == "oracle":
                assert target_depth is not None
                continues = continues & (_picked(target_depth[:, 0], live) > d)
            if policy == "always" and (d > 1 or attention_mask is None):
                told = [True] * len(which)
            elif unsure:
                told, real = torch.stack([continues, valid[:, 0]]).tolist()
                unsure = self._note(cache, valid, real)
            else:
                told = continues.tolist()
            if not any(told):
                break
            if not all(told):
                chosen = torch.tensor([at for at, yes in enumerate(told) if yes], device=depth.device)
                which = [row for row, yes in zip(which, told, strict=True) if yes]
                live = chosen if live is None else live[chosen]
                top = None if top is None else _Top(*(part[chosen] for part in top))
            top = top or _Top(*_picked(scores[:, 0], live).topk(config.mix_top_k))
            mixed = self._mix(_picked(total, live), top)
            duo = cache.deeper_rows(d + 1, which, depth.device)
            hidden, states = self._run(mixed[:, None], _picked(position_ids, live), duo, reads)
            states = [state[:, 0] for state in states]
            if live is None:
                total, depth = total + hidden[:, 0], depth + 1
                scores = self._head(total)[:, None]
            else:
                total = total.index_add(0, live, hidden[:, 0])
                depth[live] += 1
                scores[live] = self._head(total[live])[:, None]
        if unsure:
            self._note(cache, valid, valid[:, 0].tolist())
        return TaHOutput(depth=depth[:, None], logits=scores, continue_logits=continue_logits)

    @staticmethod
    def _note(cache: TaHCache, valid: Tensor, real: list[bool]) -> bool:
        """Tell the cache of the newest token's padding, bool [B, 1], if there is any; what is still unsure: nothing."""
        if not all(real):
            cache.pad_last(valid)
        return False

    def _adapter(self) -> list[nn.Parameter]:
        return [p for m in self.modules() if isinstance(m, DepthLinear) for p in (m.lora_A, m.lora_B)]

    def _policy(self, target_depth: Tensor | None) -> str:
        if self.config.max_depth == 1:
            return "never"
        policy = "learned" if self.objective == "decider" and target_depth is not None else self.config.decider
        if policy == "oracle" and target_depth is None:
            raise ValueError(
                "tah: the decider is `oracle`, which needs target_depth: this checkpoint has no trained decider yet; "
                "train one (stage: decider), or load it with decider=always or decider=never"
            )
        if policy == "learned" and self.decider is None:
            raise ValueError(
                "tah: the decider is `learned`, and this checkpoint holds none; train one (stage: decider)"
            )
        return policy

    def _places(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, start: int
    ) -> tuple[Tensor, Tensor]:
        """Which tokens are no padding (bool [B, T]), and where each stands (int64 [B, T])."""
        size, length = input_ids.shape
        if attention_mask is None:
            valid = torch.ones_like(input_ids, dtype=torch.bool)
        else:
            valid = attention_mask[:, -length:].bool()
        if position_ids is None:
            position_ids = torch.arange(start, start + length, device=input_ids.device)
        return valid, position_ids.expand(size, length)

    def _run(
        self, embeds: Tensor, position_ids: Tensor, duo: Pass, reads: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """One pass: [R, A, H] to the normed last hidden state and the hidden states named by `reads`."""
        decoder = self._decoder
        self._switch.now = duo.depth
        try:
            hidden = embeds
            rope = decoder.rotary_emb(hidden, position_ids)
            kept = {}
            for index, layer in enumerate(decoder.layers):
                if index in reads:
                    kept[index] = hidden
                hidden = layer(
                    hidden, attention_mask=duo.mask, position_ids=position_ids, position_embeddings=rope, duo=duo
                )
            hidden = decoder.norm(hidden)
        finally:
            self._switch.now = 1
        kept[len(decoder.layers)] = hidden
        return hidden, [kept[index] for index in reads]

    def _deeper(
        self,
        cache: TaHCache,
        depth: int,
        live: Tensor,
        rows: Sequence[int],
        mixed: Tensor,
        position_ids: Tensor,
        start: int,
        reads: Sequence[int],
    ) -> tuple[Tensor, list[Tensor]]:
        """A pass over the tokens `live` (flat indices, int64 [N]) with inputs `mixed` [N, H]; results [N, H].

        `rows` says how many of them each row has.
        """
        size, length = position_ids.shape
        row = live // length
        before = torch.tensor([0, *accumulate(rows)][:-1], device=live.device)
        slot = torch.arange(len(live), device=live.device) - before[row]
        widest = max(rows)
        columns = torch.full((size, widest), EMPTY, device=live.device)
        columns[row, slot] = live % length + start
        places = position_ids.new_zeros(size, widest)
        places[row, slot] = position_ids.reshape(-1)[live]
        embeds = mixed.new_zeros(size, widest, mixed.shape[1]).index_put((row, slot), mixed)
        duo = cache.deeper(depth, row, slot, columns, list(rows))
        hidden, states = self._run(embeds, places, duo, reads)
        return hidden[row, slot], [state[row, slot] for state in states]

    @torch.no_grad()
    def _top(self, total: Tensor, live: Tensor | None) -> _Top:
        """The largest logits of the tokens `live`, of sums `total` [B·T, H]."""
        k = self.config.mix_top_k
        chunk = tokens_at_a_head(self.config.text_config.vocab_size)
        parts = [self._head(piece).topk(k) for piece in _picked(total, live).split(chunk)]
        return _Top(torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts]))

    def _mix(self, total: Tensor, top: _Top) -> Tensor:
        """The probability-weighted mean of the embeddings of the likeliest tokens, [N, H], of sums `total` [N, H].

        With a graph, the top-k logits are made again for it. Of a large vocabulary only their rows are read, the others
        having no part in them; of a small one products with all rows are faster than picking (and, in the backward
        pass, adding up) rows.
        """
        if torch.is_grad_enabled() and self._embedding.num_embeddings <= GATHER_RATIO * self.config.mix_top_k:
            logits = self._head(total).float()
            kept = torch.full_like(logits, -torch.inf).scatter(1, top.tokens, logits.gather(1, top.tokens))
            return (torch.softmax(kept, dim=-1).to(total.dtype) @ self._embedding.weight).to(total.dtype)
        embedded = self._embedding.weight[top.tokens]
        values = top.values
        if torch.is_grad_enabled():
            head = self._head.weight
            rows = embedded if head is self._embedding.weight else head[top.tokens]
            values = (rows @ total[:, :, None])[:, :, 0]
        # Autocast multiplies in fewer bits; between layers there are as many as at depth 1.
        return (torch.softmax(values.float(), dim=-1).to(embedded.dtype)[:, None] @ embedded)[:, 0].to(total.dtype)

    # --- losses ---

    def _token_loss(
        self, total: Tensor, labels: Tensor, labelled: int | None, num_items: Tensor | int | None
    ) -> Tensor:
        """Cross-entropy of the summed logits over labelled tokens; the whole [tokens, V] is never held.

        Args:
            total: [B, T, H], h_1 + … + h_depth, in the model's dtype.
            labels: int64 [B, T], -100 where a token carries no loss; shifted here.
            labelled: how many do.
            num_items: what the sum is divided by; None for the number of labelled tokens.

        Returns:
            A float32 scalar with a gradient, in nats; zero where no token is labelled.
        """
        wanted = labels[:, 1:].reshape(-1)
        assert labelled is not None
        kept = _where(wanted != -100, labelled)
        hidden, head = total[:, :-1].reshape(len(wanted), -1)[kept], self._head.weight
        if labelled == 0:
            return hidden.sum()
        chunk = tokens_at_a_head(self.config.text_config.vocab_size)
        if torch.is_autocast_enabled(hidden.device.type):  # which does not look into the call in chunks
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, head = hidden.to(dtype), head.to(dtype)
        options = LinearCrossEntropyOptions(batch_chunk_size=chunk, chunking_method=None) if len(kept) > chunk else None
        # A sum in bfloat16 has two digits.
        reduction = "sum" if hidden.dtype == torch.float32 else "none"
        loss = F.linear_cross_entropy(hidden, head, wanted[kept], reduction=reduction, options=options)
        return loss.float().sum() / (len(kept) if num_items is None else num_items)

    def _decider_loss(
        self, output: TaHOutput, decisions: list[tuple[Tensor, Tensor]], num_items: Tensor | int | None
    ) -> None:
        """Binary cross-entropy of every supervised decision, positives weighted by `pos_weight`, into `output`.

        Args:
            output: gets `loss`, a float32 scalar in nats, and `decided` and `right`, int64 scalars.
            decisions: after each depth d, from 1 on, the decider's log-odds [n] in its own dtype and the tokens'
                target depths, int64 [n], -100 where a decision is not supervised.
            num_items: what the sum is divided by, the step's count of answer tokens, so that accumulated batches add
                up to what one batch gives; prompts are decided about too, so it is no mean. None for the mean over
                decisions.
        """
        device = self.device
        total = torch.zeros((), device=device)
        decided = right = torch.zeros((), dtype=torch.int64, device=device)
        weight = torch.tensor(self.pos_weight, device=device)
        for d, (log_odds, target) in enumerate(decisions, start=1):
            # Weights and not an index of those that count: how many they are is known to the device alone.
            log_odds, wanted, kept = log_odds.float(), target > d, target != -100
            total = total + F.binary_cross_entropy_with_logits(
                log_odds, wanted.float(), weight=kept.float(), pos_weight=weight, reduction="sum"
            )
            decided = decided + kept.sum()
            right = right + (((torch.sigmoid(log_odds) > self.config.threshold) == wanted) & kept).sum()
        output["loss"] = total / (decided.clamp(min=1) if num_items is None else num_items)
        output["decided"], output["right"] = decided, right


AutoConfig.register("tah", TaHConfig, exist_ok=True)
AutoModel.register(TaHConfig, TaHForCausalLM, exist_ok=True)
AutoModelForCausalLM.register(TaHConfig, TaHForCausalLM, exist_ok=True)
