"""What some families of models do to embeddings and logits outside their layers (Granite, Cohere, Gemma, Falcon-H1).

Knows the keys of their configs. Whoever takes embeddings or logits for plain products of a matrix asks here first.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

OF_EMBEDDINGS = ("embedding_multiplier",)
OF_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")


def scaled(config: Any, keys: Iterable[str]) -> list[str]:
    """Which of the keys a model's config sets to something that changes a number."""
    return [key for key in keys if getattr(config, key, None) not in (None, 0, 1)]
