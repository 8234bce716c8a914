"""`axolotl nf4`: a checkpoint that stock loaders read, smaller, and that answers as before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from safetensors import safe_open

BIN = Path(sys.executable).parent


def test_a_copy_in_nf4_is_read_by_stock_lm_eval(recipes: Path, tmp_path: Path) -> None:
    source, copy = recipes / "mini" / "thinking", tmp_path / "nf4"
    subprocess.run([BIN / "axolotl", "nf4", source, copy], check=True, capture_output=True, timeout=300)
    assert (copy / "chat_template.jinja").read_text() == (source / "chat_template.jinja").read_text()
    assert not list(copy.glob("*.bin"))
    with safe_open(copy / "model.safetensors", "pt") as weights:
        assert str(weights.get_tensor("model.layers.0.mlp.up_proj.weight").dtype) == "torch.uint8"
        assert "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4" in weights.keys()  # noqa: SIM118
    model = ["--model", "hf", "--model_args", f"pretrained={copy},dtype=float32", "--device", "cpu"]
    task = ["--tasks", "mini_math", "--limit", "20", "--batch_size", "20", "--apply_chat_template"]
    said = subprocess.run(
        [BIN / "lm_eval", *model, *task], capture_output=True, text=True, check=True, timeout=300
    ).stdout
    score = next(float(line.split("|")[7]) for line in said.splitlines() if "exact_match" in line)
    assert score > 0.3
