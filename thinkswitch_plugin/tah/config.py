"""What a Think-at-Hard checkpoint is: its backbone's config, how deep it goes, its adapter and its decider.

Knows the keys of `config.json` and their limits. Leaves to others: what they do (`model`), and what a recipe may say
(`args`).
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from transformers import AutoConfig, PreTrainedConfig

from thinkswitch_plugin.scaling import OF_EMBEDDINGS, OF_LOGITS, scaled

Policy = Literal["learned", "oracle", "always", "never"]


class TaHConfig(PreTrainedConfig):
    """Config of `TaHForCausalLM` (TaH, arXiv 2511.08577).

    Args:
        text_config: the backbone's own config, or its dictionary.
        max_depth: most passes a token may take; 1 is the backbone alone.
        mix_top_k: how many predictions are mixed into the next pass's input, and how many logits the decider reads.
        lora_r, lora_alpha, lora_dropout: of the adapter that is on from depth 2, on every linear layer.
        decider: who says that a token continues: `learned`, `oracle` (the caller's `target_depth`), `always`, `never`.
        threshold: a token continues if the learned decider's probability is above it.
        decider_layers: which hidden states it reads: 0 is the embedding, i what layer i leaves, the last one normed.
        decider_hidden: widths of its blocks; empty while no decider was trained.
        decider_expansion, decider_dropout: of its blocks.

    Raises:
        ValueError: a value outside its limits; one line that says which.
    """

    model_type = "tah"
    sub_configs = {"text_config": AutoConfig}  # type: ignore[dict-item]  # noqa: RUF012 (transformers reads it)
    has_no_defaults_at_init = True

    def __init__(
        self,
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        max_depth: int = 2,
        mix_top_k: int = 100,
        lora_r: int = 32,
        lora_alpha: float = 64.0,
        lora_dropout: float = 0.1,
        decider: Policy = "learned",
        threshold: float = 0.9,
        decider_layers: list[int] | None = None,
        decider_hidden: list[int] | None = None,
        decider_expansion: int = 4,
        decider_dropout: float = 0.1,
        **kwargs: Any,
    ):
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        if text_config is None:
            raise ValueError("tah: text_config is missing: the config of the backbone")
        self.text_config = text_config
        self.max_depth = max_depth
        self.mix_top_k = mix_top_k
        self.lora_r, self.lora_alpha, self.lora_dropout = lora_r, lora_alpha, lora_dropout
        self.decider, self.threshold = decider, threshold
        self.decider_layers = list(decider_layers or [])
        self.decider_hidden = list(decider_hidden or [])
        self.decider_expansion, self.decider_dropout = decider_expansion, decider_dropout
        self.check()
        # What readers of any config look for at its top.
        for key in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
            kwargs.setdefault(key, getattr(text_config, key, None))
        super().__init__(**kwargs)

    def check(self) -> None:
        """Raise `ValueError` where a value is outside its limits; one line that says which."""
        text = self.text_config
        if not isinstance(self.max_depth, int) or self.max_depth < 1:
            raise ValueError(f"tah: max_depth is {self.max_depth!r}; it counts passes, so 1 or more")
        if not 1 <= self.mix_top_k <= text.vocab_size:
            raise ValueError(
                f"tah: mix_top_k is {self.mix_top_k}; the backbone's vocabulary has {text.vocab_size} tokens"
            )
        if self.lora_r < 1:
            raise ValueError(f"tah: lora_r is {self.lora_r}; an adapter has a rank of 1 or more")
        if self.decider not in get_args(Policy):
            raise ValueError(f"tah: decider is {self.decider!r}; one of {', '.join(get_args(Policy))}")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"tah: threshold is {self.threshold}; a probability, from 0 to 1")
        layers = text.num_hidden_layers
        wrong = [index for index in self.decider_layers if not 0 <= index <= layers]
        if wrong:
            raise ValueError(
                f"tah: decider_layers has {wrong[0]}; the backbone has {layers} layers: 0 (the embedding) to {layers}"
            )
        if any(width < 1 for width in self.decider_hidden):
            raise ValueError(f"tah: decider_hidden is {self.decider_hidden}; widths are 1 or more")
        if scaling := scaled(text, (*OF_EMBEDDINGS, *OF_LOGITS)):
            raise ValueError(f"tah: the backbone's config sets {scaling[0]}, which deeper passes do not know")
        if getattr(text, "sliding_window", None) and not getattr(text, "layer_types", None):
            raise ValueError("tah: the backbone has sliding_window set; duo-causal attention is full")
        sliding = set(getattr(text, "layer_types", None) or ["full_attention"]) - {"full_attention"}
        if sliding:
            raise ValueError(
                f"tah: the backbone has {sorted(sliding)[0]} layers; duo-causal attention is full attention"
            )
