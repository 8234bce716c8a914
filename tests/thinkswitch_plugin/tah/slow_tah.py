"""A small random backbone, and what a TaH model around it computes, written the slow, obvious way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def backbone(tied: bool = True, kind: str = "qwen3", vocabulary: int = 61) -> Any:
    """A random causal model: 3 layers of 32, 4 heads of 8 on 2 key heads."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=vocabulary,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def padded_batch(side: str = "right") -> dict[str, Tensor]:
    """Three rows of 9, 5 and 12 tokens."""
    torch.manual_seed(2)
    lengths = (9, 5, 12)
    ids = torch.zeros(3, 12, dtype=torch.int64)
    mask = torch.zeros(3, 12, dtype=torch.int64)
    for row, length in enumerate(lengths):
        where = slice(12 - length, None) if side == "left" else slice(length)
        ids[row, where] = torch.randint(1, 61, (length,))
        mask[row, where] = 1
    return {"input_ids": ids, "attention_mask": mask}


def obvious(model: Any, ids: Tensor, wanted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One row, token by token and depth by depth, in plain arithmetic on the model's weights.

    A token's keys are put in a list with its position and depth, and a query looks at those entries that the
    duo-causal rule names. TaH, arXiv 2511.08577, section 3.2; Qwen3's own layer otherwise.

    Args:
        model: in evaluation mode.
        ids: [T].
        wanted: [T], passes of each token; without it the model's decider decides.

    Returns:
        logits [T, V] and depths [T].
    """
    config, decoder = model.config, model.backbone.model
    text = config.text_config
    heads, key_heads, width = text.num_attention_heads, text.num_key_value_heads, text.head_dim
    embedding, head = decoder.embed_tokens.weight, model.backbone.lm_head.weight
    held: list[list[tuple[int, int, Tensor, Tensor]]] = [[] for _ in decoder.layers]

    def linear(module: Any, x: Tensor, d: int) -> Tensor:
        weight = module.weight
        if d > 1:
            weight = weight + module.lora_B @ module.lora_A * (config.lora_alpha / config.lora_r)
        return weight @ x

    def norm(module: Any, x: Tensor) -> Tensor:
        return module.weight * x / (x.pow(2).mean(-1, keepdim=True) + text.rms_norm_eps).sqrt()

    def turn(x: Tensor, p: int) -> Tensor:
        half = width // 2
        angle = p / 10000.0 ** (torch.arange(half, dtype=x.dtype) * 2 / width)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)

    def one_pass(x: Tensor, p: int, d: int) -> list[Tensor]:
        states = [x]
        for index, layer in enumerate(decoder.layers):
            h = norm(layer.input_layernorm, x)
            q = linear(layer.self_attn.q_proj, h, d).view(heads, width)
            k = linear(layer.self_attn.k_proj, h, d).view(key_heads, width)
            v = linear(layer.self_attn.v_proj, h, d).view(key_heads, width)
            if hasattr(layer.self_attn, "q_norm"):
                q, k = norm(layer.self_attn.q_norm, q), norm(layer.self_attn.k_norm, k)
            q, k = turn(q, p), turn(k, p)
            held[index].append((p, d, k, v))
            seen = [(k, v) for p2, d2, k, v in held[index] if p2 <= p and d2 <= d]
            out = []
            for n in range(heads):
                group = n // (heads // key_heads)
                weights = torch.softmax(torch.stack([q[n] @ k[group] for k, _ in seen]) / width**0.5, dim=0)
                out.append(sum(w * v[group] for w, (_, v) in zip(weights, seen, strict=True)))
            x = x + linear(layer.self_attn.o_proj, torch.cat(out), d)
            h = norm(layer.post_attention_layernorm, x)
            gate = torch.nn.functional.silu(linear(layer.mlp.gate_proj, h, d))
            x = x + linear(layer.mlp.down_proj, gate * linear(layer.mlp.up_proj, h, d), d)
            states.append(x)
        states[-1] = norm(decoder.norm, x)
        return states

    all_logits, depths = [], []
    for p, token in enumerate(ids.tolist()):
        x, logits, d = embedding[token], torch.zeros(len(head)), 0
        while True:
            d += 1
            states = one_pass(x, p, d)
            logits = logits + head @ states[-1]
            top = logits.topk(config.mix_top_k)
            if d == config.max_depth:
                break
            if wanted is None:
                read = [states[index][None] for index in config.decider_layers]
                if torch.sigmoid(model.decider(read, top.values[None])) <= config.threshold:
                    break
            elif wanted[p] <= d:
                break
            x = torch.softmax(top.values, dim=0) @ embedding[top.indices]
        all_logits.append(logits)
        depths.append(d)
    return torch.stack(all_logits), torch.tensor(depths)
