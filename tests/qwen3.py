"""Qwen3-4B as its config describes it, without weights, and what a CPU cannot do of the recipes that are its."""

from __future__ import annotations

QWEN3_4B = {
    "model_type": "qwen3",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 262144,
    "dtype": "bfloat16",
}
# No bf16 or tf32 kernels, no Triton, no paged optimizer; and nothing else is changed.
ON_A_CPU = {
    "bf16": False,
    "tf32": False,
    "optimizer": "adamw_torch",
    "liger_fused_linear_cross_entropy": False,
    "liger_rms_norm": False,
    "lora_mlp_kernel": False,
    "lora_qkv_kernel": False,
    "lora_o_kernel": False,
}
