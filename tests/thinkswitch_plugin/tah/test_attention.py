"""The cache's memory beside stock generation's, masks where they are needed, how often a token waits for the device.

Memory is counted: every tensor that an operation makes, from its making until it is dropped.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
from slow_tah import backbone, padded_batch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from thinkswitch_plugin.tah.attention import TaHCache
from thinkswitch_plugin.tah.model import count

Build = Callable[..., Any]
LAYERS, HEADS, WIDTH = 12, 2, 4


class Bytes(TorchDispatchMode):
    """How many bytes the tensors made in here hold, and the most they ever did."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.held: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if (at := storage._cdata) not in self.held:
                    self.held.add(at)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._drop, at, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def _drop(self, at: int, size: int) -> None:
        self.held.discard(at)
        self.now -= size


def keys(tokens: int) -> Tensor:
    return torch.zeros(1, HEADS, tokens, WIDTH)


def ours(prompt: int, new: int, every: int | None) -> int:
    """The most bytes that a cache of ours had while it was filled; of every so manyth new token a deeper key too."""
    with torch.inference_mode(), Bytes() as counted:
        cache = TaHCache()
        for at in range(new + 1):
            tokens = 1 if at else prompt
            run = cache.first(torch.ones(1, tokens, dtype=torch.bool), "none")
            for layer in range(LAYERS):
                run.extend(layer, keys(tokens), keys(tokens))
            if at and every and at % every == 0:
                run = cache.deeper_rows(2, [0], torch.device("cpu"))
                for layer in range(LAYERS):
                    run.extend(layer, keys(1), keys(1))
        return counted.most


def stock(prompt: int, new: int) -> int:
    """The same of transformers' own."""
    with torch.inference_mode(), Bytes() as counted:
        cache = DynamicCache()
        for at in range(new + 1):
            for layer in range(LAYERS):
                cache.update(keys(1 if at else prompt), keys(1 if at else prompt), layer)
        return counted.most


@pytest.mark.parametrize("every", [None, 16])
def test_the_cache_grows_a_layer_at_a_time(every: int | None) -> None:
    prompt, new = 2000, 200
    mine, theirs = ours(prompt, new, every), stock(prompt, new)
    # An eighth that lies idle, the layer that is being copied, and the deeper keys that stock caches have not.
    deeper = 64 + new // (every or new + 1)
    assert theirs > 2 * LAYERS * keys(prompt + new).nbytes
    assert mine < (1 + 1 / 8 + 1.5 / LAYERS + deeper / (prompt + new)) * theirs


def test_padding_behind_a_row_needs_no_mask(build: Build) -> None:
    for side, masks in (("right", [False, True]), ("left", [True, True])):
        model, batch, masked = build(decider="oracle"), padded_batch(side), []
        for module in model.modules():
            if hasattr(module, "q_proj"):
                module.register_forward_pre_hook(
                    lambda _m, _a, kwargs, seen=masked: seen.append(kwargs["attention_mask"] is not None),
                    with_kwargs=True,
                )
        wanted = torch.ones_like(batch["input_ids"])
        wanted[2, 4] = 2
        model(**batch, target_depth=wanted)
        assert masked == [mask for mask in masks for _ in range(3)]


class Waits(TorchFunctionMode):
    """Calls whose answer the host needs: on a GPU each waits until all that was asked before is done."""

    ASKING = (
        *(Tensor.tolist, Tensor.item, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__),
        *(Tensor.__len__, Tensor.nonzero, torch.nonzero, torch.bincount, Tensor.cpu, Tensor.numpy, torch.unique),
    )

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        index = args[1] if func in (Tensor.__getitem__, Tensor.__setitem__) else None
        picks = any(isinstance(part, Tensor) and part.dtype == torch.bool for part in tree_leaves(index))
        if picks or (func in self.ASKING and func is not Tensor.__len__):
            self.asked.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("decider", "depth", "most"), [("never", 2, 0), ("always", 3, 0), ("learned", 2, 1)])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_generated_token_waits_for_its_decision_alone(
    build: Build, decider: str, depth: int, most: int, rows: int
) -> None:
    model = build(max_depth=depth, decider=decider)
    batch = {key: value[-rows:] for key, value in padded_batch("left").items()}
    seen: list[list[str]] = []
    forward = model.forward

    @wraps(forward)
    def counted(*args: Any, **kwargs: Any) -> Any:
        with Waits() as waits:
            out = forward(*args, **kwargs)
        seen.append(waits.asked)
        return out

    model.forward = counted
    model.generate(**batch, max_new_tokens=8, do_sample=False)
    # The prompt asks once what its mask holds, and the first token where the prompt's deeper keys lie.
    assert len(seen) == 8
    assert all(len(asked) <= most for asked in seen[2:]), seen
    if decider == "learned":
        assert any(seen[2:])


def test_a_training_step_whose_counts_are_known_waits_for_nothing(build: Build) -> None:
    batch = padded_batch()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    wanted = torch.arange(36).view(3, 12) % 3 + 1
    for stage, depth in ((1, 3), (2, 2)):
        model = build(max_depth=depth, decider="oracle", decider_hidden=[])
        if stage == 2:
            model.begin_decider(2.5, decider="learned", decider_layers=[1, 3], decider_hidden=[12])
        model.train()
        given = {**batch, "labels": labels, "target_depth": wanted}
        counts = count(labels.shape, batch["attention_mask"], labels, wanted, depth)
        with Waits() as waits:
            known = model(**given, counts=counts).loss
        assert waits.asked == []
        torch.manual_seed(0)
        assert torch.equal(known, model(**given).loss)


@pytest.mark.parametrize("side", ["left", "right"])
def test_counts_are_those_of_the_rows_one_by_one(side: str) -> None:
    batch = padded_batch(side)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :7] = -100
    wanted = torch.arange(36).view(3, 12) % 3 + 1
    counts = count(labels.shape, batch["attention_mask"], labels, wanted, 3)
    assert counts.lengths == (9, 5, 12)
    assert counts.padding == {"left": "mixed", "right": "right"}[side]
    assert counts.labelled == sum(int(label != -100) for row in labels.tolist() for label in row[1:])
    real = batch["attention_mask"].bool()
    assert counts.deeper == tuple(
        tuple(sum(int(w > d) for w in wanted[row][real[row]]) for row in range(3)) for d in (1, 2)
    )
    assert count(labels.shape, None, None, None, 3).lengths == (12, 12, 12)


def test_a_loss_in_evaluation_makes_no_logits_of_all_tokens(build: Build) -> None:
    ids = torch.randint(1, 61, (2, 300))
    model = build(decider="oracle")
    wanted = torch.ones_like(ids)
    with torch.no_grad():
        asked = model(ids, labels=ids, target_depth=wanted)
        whole = model(ids, labels=ids, target_depth=wanted, logits_to_keep=0)
    assert asked.logits is None
    assert whole.logits.shape == (2, 300, backbone().config.vocab_size)
    shifted = torch.nn.functional.cross_entropy(whole.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(asked.loss, shifted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_whose_counts_are_known_runs_on_fake_tensors(stage: int) -> None:
    """So can a planner see what a step takes before there are weights."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from thinkswitch_plugin.tah.model import Counts, TaHForCausalLM

    with FakeTensorMode():
        model = TaHForCausalLM.from_backbone(backbone(), mix_top_k=7, lora_r=3, decider="oracle")
        if stage == 1:
            model.begin_backbone()
            model.gradient_checkpointing_enable()
        else:
            model.begin_decider(2.5, decider="learned", decider_layers=[1, 3], decider_hidden=[12])
        ids = torch.zeros(2, 10, dtype=torch.int64)
        with torch.autocast("cpu", torch.bfloat16):
            given = {"attention_mask": torch.ones_like(ids), "labels": ids, "target_depth": ids}
            out = model.train()(ids, **given, counts=Counts((10, 8), "right", 12, ((3, 1),)))
        out.loss.backward()
        learnt = {name.partition(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert learnt == {"backbone" if stage == 1 else "decider"}
