"""The model against the slow, obvious computation, and every way of running it against every other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_tah import backbone, obvious, padded_batch

from thinkswitch_plugin.tah import TaHConfig, TaHForCausalLM, attention

Build = Callable[..., Any]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_prefill_is_the_obvious_computation(build: Build, depth: int, side: str, kind: str) -> None:
    model, batch = build(max_depth=depth, kind=kind), padded_batch(side)
    with torch.no_grad():
        out = model(**batch)
    for row in range(3):
        real = batch["attention_mask"][row].bool()
        logits, depths = obvious(model, batch["input_ids"][row][real])
        assert out.depth[row][real].tolist() == depths.tolist()
        torch.testing.assert_close(out.logits[row][real], logits, **TOLERANCE)
        assert out.depth[row][~real].tolist() == [0] * int((~real).sum())
    if depth > 1:
        assert len(out.depth.unique()) > 2


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_decoding_is_the_full_forward_at_every_position(build: Build, depth: int, side: str) -> None:
    model, batch = build(max_depth=depth), padded_batch(side)
    if side == "none":
        batch = {"input_ids": batch["input_ids"][2:].repeat(2, 1)}
        batch["input_ids"][1] = batch["input_ids"][1].flip(0)
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    with torch.no_grad():
        full = model(**batch)
        for cut in (1, 4):
            out = model(ids[:, :cut], attention_mask=None if mask is None else mask[:, :cut], use_cache=True)
            logits, depths = [out.logits], [out.depth]
            for at in range(cut, ids.shape[1]):
                out = model(
                    ids[:, at : at + 1],
                    attention_mask=None if mask is None else mask[:, : at + 1],
                    past_key_values=out.past_key_values,
                    use_cache=True,
                )
                logits.append(out.logits)
                depths.append(out.depth)
            real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
            assert torch.equal(torch.cat(depths, 1)[real], full.depth[real])
            torch.testing.assert_close(torch.cat(logits, 1)[real], full.logits[real], **TOLERANCE)


@settings(max_examples=25, deadline=None)
@given(
    pieces=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    depths=st.lists(st.integers(1, 3), min_size=30, max_size=30),
    rows=st.integers(1, 3),
    spare=st.sampled_from([0, 3, 16]),
)
def test_any_way_of_cutting_a_sequence_gives_the_same(
    pieces: list[int], depths: list[int], rows: int, spare: int
) -> None:
    model = _oracle_model()
    with patch.object(attention, "SPARE_SLOTS", spare):  # buffers that grow at every turn, or seldom
        _cut_anyhow(model, pieces, depths, rows)


def _cut_anyhow(model: Any, pieces: list[int], depths: list[int], rows: int) -> None:
    length = sum(pieces)
    torch.manual_seed(length)
    ids = torch.randint(1, 61, (rows, length))
    wanted = torch.tensor([depths[(7 * row + at) % 30] for row in range(rows) for at in range(length)]).view(rows, -1)
    with torch.no_grad():
        full = model(ids, target_depth=wanted)
        cache, logits, start = None, [], 0
        for piece in pieces:
            now = slice(start, start + piece)
            out = model(ids[:, now], target_depth=wanted[:, now], past_key_values=cache, use_cache=True)
            cache, start = out.past_key_values, start + piece
            logits.append(out.logits)
    assert torch.equal(full.depth, wanted)
    torch.testing.assert_close(torch.cat(logits, 1), full.logits, **TOLERANCE)


_MODELS: dict[str, Any] = {}


def _oracle_model() -> Any:
    if "oracle" not in _MODELS:
        # The whole vocabulary is mixed: which are the likeliest jumps where two are alike, and rounding then shows.
        model = TaHForCausalLM.from_backbone(
            backbone(), max_depth=3, mix_top_k=61, lora_r=3, lora_alpha=6.0, decider="oracle"
        )
        for name, parameter in model.named_parameters():
            if name.endswith(".lora_B"):
                torch.nn.init.normal_(parameter, std=0.3)
        # In float64: random layers make rounding in float32 as large as what the tests are to see.
        _MODELS["oracle"] = model.double().eval()
    return _MODELS["oracle"]


@pytest.mark.parametrize("padded", [False, True])
def test_depth_one_is_the_backbone_bit_for_bit(build: Build, padded: bool) -> None:
    plain = backbone()
    for model in (build(max_depth=1), build(max_depth=2, decider="never")):
        batch = padded_batch("left") if padded else {"input_ids": torch.arange(1, 13).view(2, 6)}
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        with torch.no_grad():
            assert torch.equal(model(**batch).logits[real], plain(**batch).logits[real])
            sure = {"do_sample": False, "max_new_tokens": 10, "output_logits": True, "return_dict_in_generate": True}
            ours, theirs = model.generate(**batch, **sure), plain.generate(**batch, **sure)
        assert torch.equal(ours.sequences, theirs.sequences)
        assert torch.equal(torch.stack(ours.logits), torch.stack(theirs.logits))


def test_depth_one_never_depends_on_deeper_passes(build: Build) -> None:
    model = build(max_depth=3, decider="oracle")
    ids = padded_batch()["input_ids"][2:]
    with torch.no_grad():
        easy = model(ids, target_depth=torch.ones_like(ids)).logits
        some = torch.ones_like(ids)
        some[:, ::3] = 3
        mixed = model(ids, target_depth=some).logits
    assert torch.allclose(mixed[some == 1], easy[some == 1], atol=1e-6)
    assert not torch.allclose(mixed[some == 3], easy[some == 3], atol=1e-2)


@pytest.mark.parametrize("sampling", [False, True])
def test_generation_in_a_left_padded_batch_is_each_row_by_itself(build: Build, sampling: bool) -> None:
    model, batch = build(), padded_batch("left")
    how = {"max_new_tokens": 12, "do_sample": sampling}
    if sampling:
        how.update(temperature=1e-4)  # sampled, from so sharp a distribution that the same tokens come out
    together = model.generate(**batch, **how)[:, 12:]
    for row in range(3):
        alone = model.generate(batch["input_ids"][row][batch["attention_mask"][row].bool()][None], **how)
        assert alone[0, -12:].tolist() == together[row].tolist()


def test_a_reordered_cache_is_that_of_the_reordered_rows() -> None:
    model = _oracle_model()
    batch = padded_batch("left")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    wanted = torch.arange(36).view(3, 12) % 3 + 1
    order = torch.tensor([2, 2, 0])
    with torch.no_grad():
        out = model(ids[:, :9], attention_mask=mask[:, :9], target_depth=wanted[:, :9], use_cache=True)
        for at in (9, 10):
            new = slice(at, at + 1)
            out = model(
                ids[:, new],
                attention_mask=mask[:, : at + 1],
                target_depth=wanted[:, new],
                past_key_values=out.past_key_values,
                use_cache=True,
            )
        out.past_key_values.reorder_cache(order)
        last = model(
            ids[order, 11:],
            attention_mask=mask[order],
            target_depth=wanted[order, 11:],
            past_key_values=out.past_key_values,
        )
        full = model(ids[order], attention_mask=mask[order], target_depth=wanted[order])
    torch.testing.assert_close(last.logits[:, 0], full.logits[:, -1], **TOLERANCE)


def test_beam_search_reorders_every_depth(build: Build) -> None:
    model, batch = build(), padded_batch("left")
    beams = model.generate(**batch, num_beams=3, max_new_tokens=6, do_sample=False)
    greedy = model.generate(**batch, max_new_tokens=6, do_sample=False)

    def log_likelihood(rows: torch.Tensor) -> torch.Tensor:
        mask = torch.cat([batch["attention_mask"], torch.ones(3, 6, dtype=torch.int64)], dim=1)
        with torch.no_grad():
            said = torch.log_softmax(model(rows, attention_mask=mask).logits[:, 11:-1], dim=-1)
        return said.gather(2, rows[:, 12:, None]).sum((1, 2))

    assert bool((log_likelihood(beams) >= log_likelihood(greedy) - 1e-4).all())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("mixed", [7, 20])  # rows picked, and products with all of them
def test_stage_one_loss_and_gradients_are_the_obvious_ones(
    build: Build, tied: bool, depth: int, checkpointed: bool, mixed: int
) -> None:
    model, batch = build(tied, max_depth=depth, decider="oracle", mix_top_k=mixed), padded_batch()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :2] = -100
    torch.manual_seed(3)
    wanted = torch.randint(1, depth + 1, labels.shape)

    losses, items = [], 0
    for row in range(3):
        real = batch["attention_mask"][row].bool()
        logits, _ = obvious(model, batch["input_ids"][row][real], wanted[row][real])
        losses.append(
            torch.nn.functional.cross_entropy(logits[:-1], labels[row][real][1:], ignore_index=-100, reduction="sum")
        )
        items += int((labels[row][1:] != -100).sum())
    expected = torch.stack(losses).sum() / items
    expected.backward()
    slow = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    model.train()
    if checkpointed:
        model.gradient_checkpointing_enable()
    out = model(**batch, labels=labels, target_depth=wanted)
    out.loss.backward()
    assert out.logits is None
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-6)
    quick = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert {name for name in slow if slow[name].abs().max() > 0} <= set(quick)
    for name, grad in quick.items():
        scale = float(slow[name].abs().max())
        torch.testing.assert_close(grad, slow[name], rtol=1e-4, atol=1e-4 * scale + 1e-9)
    if depth > 1:
        assert any(name.endswith(".lora_B") and grad.abs().max() > 0 for name, grad in quick.items())


@pytest.mark.parametrize("depth", [2, 3])
def test_stage_two_loss_and_gradients_are_the_obvious_ones(build: Build, depth: int) -> None:
    model, batch = build(max_depth=depth, decider="oracle", decider_hidden=[]), padded_batch()
    model.begin_decider(
        2.5, decider="learned", decider_layers=[1, 3], decider_hidden=[12, 8], decider_dropout=0.0, threshold=0.5
    )
    assert {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"decider"}
    wanted = torch.randint(1, depth + 1, batch["input_ids"].shape).masked_fill(batch["attention_mask"] == 0, -100)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model.train()
    out = model(**batch, labels=labels, target_depth=wanted)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert set(grads) == {f"decider.{name}" for name, _ in model.decider.named_parameters()}

    model.zero_grad()
    said, right = [], []
    hook = model.decider.register_forward_hook(lambda _m, _i, value: said.append(value))
    for row in range(3):
        real = batch["attention_mask"][row].bool()
        before = len(said)
        _, depths = obvious(model, batch["input_ids"][row][real])
        asked = [(p, d) for p, taken in enumerate(depths.tolist()) for d in range(1, min(taken, depth - 1) + 1)]
        right += [float(wanted[row][real][p] > d) for p, d in asked]
        assert len(said) - before == len(asked)
    hook.remove()
    logits, truth = torch.cat(said), torch.tensor(right)
    # Written out: -w y log σ(x) - (1 - y) log (1 - σ(x)).
    p = torch.sigmoid(logits)
    expected = -(2.5 * truth * p.log() + (1 - truth) * (1 - p).log()).mean()
    expected.backward()
    torch.testing.assert_close(out.loss, expected, rtol=1e-4, atol=1e-6)
    assert int(out.decided) == len(right)
    assert int(out.right) == int(((p > 0.5) == truth.bool()).sum())
    for name, q in model.named_parameters():
        if q.requires_grad:
            torch.testing.assert_close(grads[name], q.grad, rtol=1e-3, atol=1e-4 * float(q.grad.abs().max()) + 1e-9)


def test_accumulated_losses_add_up_to_the_loss_of_the_whole_batch(build: Build) -> None:
    model, batch = build(decider="oracle"), padded_batch()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    wanted = torch.randint(1, 3, labels.shape)
    items = (labels[:, 1:] != -100).sum()
    whole = model(**batch, labels=labels, target_depth=wanted).loss
    parts = [
        model(
            **{key: value[row : row + 1] for key, value in batch.items()},
            labels=labels[row : row + 1],
            target_depth=wanted[row : row + 1],
            num_items_in_batch=items,
        ).loss
        for row in range(3)
    ]
    torch.testing.assert_close(torch.stack(parts).sum(), whole, rtol=1e-5, atol=1e-6)


def test_the_decider_s_accumulated_losses_and_gradients_are_those_of_the_whole_batch(build: Build) -> None:
    model, batch = build(decider="oracle", decider_hidden=[]), padded_batch()
    model.begin_decider(2.5, decider="learned", decider_layers=[1, 3], decider_hidden=[12], decider_dropout=0.0)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :2] = -100  # a prompt, whose tokens are decided about too
    wanted = torch.randint(1, 3, labels.shape).masked_fill(batch["attention_mask"] == 0, -100)
    given = {**batch, "labels": labels, "target_depth": wanted}
    items = (labels[:, 1:] != -100).sum()
    model.train()
    whole = model(**given, num_items_in_batch=items)
    whole.loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    parts = [
        model(**{key: value[row : row + 1] for key, value in given.items()}, num_items_in_batch=items)
        for row in range(3)
    ]
    loss = torch.stack([part.loss for part in parts]).sum()
    loss.backward()
    torch.testing.assert_close(loss, whole.loss, rtol=1e-5, atol=1e-6)
    assert sum(int(part.decided) for part in parts) == int(whole.decided)
    assert set(expected) == {f"decider.{name}" for name, _ in model.decider.named_parameters()}
    for name, grad in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", [1, 2])
def test_dropout_of_adapter_and_decider_is_off_in_evaluation(build: Build, stage: int) -> None:
    dropping = build(lora_dropout=0.5, decider_dropout=0.5)
    if stage == 2:
        settings = {"decider": "learned", "decider_layers": [0, 2, 3], "decider_hidden": [16, 24]}
        dropping.begin_decider(1.0, **settings, decider_dropout=0.5)
    plain = build()
    plain.load_state_dict(dropping.state_dict())
    batch = padded_batch()
    with torch.no_grad():
        assert torch.equal(dropping.eval()(**batch).logits, plain(**batch).logits)
        odds, expected = (model(**batch).continue_logits[batch["attention_mask"].bool()] for model in (dropping, plain))
        assert torch.equal(odds, expected)
        dropping.train()
        again = dropping(**batch, target_depth=torch.ones_like(batch["input_ids"])).continue_logits
        if stage == 2:  # else the decider is asked only when it is no training
            assert not torch.allclose(again[batch["attention_mask"].bool()], expected, atol=1e-2)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_in_bfloat16_is_near_that_in_float32(build: Build, stage: int) -> None:
    torch.manual_seed(4)
    batch = padded_batch()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    wanted = torch.randint(1, 3, labels.shape).masked_fill(batch["attention_mask"] == 0, -100)
    losses, gradients = [], []
    for dtype in (torch.float32, torch.bfloat16):
        # The whole vocabulary is mixed: which are the likeliest jumps with rounding.
        model = build(decider="oracle", decider_hidden=[], mix_top_k=61).to(dtype)
        if stage == 2:
            torch.manual_seed(5)
            model.begin_decider(2.5, decider="learned", decider_layers=[1, 3], decider_hidden=[12], decider_dropout=0.0)
            assert {p.dtype for p in model.decider.parameters()} == {torch.float32}
        out = model.train()(**batch, labels=labels, target_depth=wanted)
        out.loss.backward()
        assert out.loss.dtype == torch.float32
        losses.append(float(out.loss.detach()))
        gradients.append(torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None]))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert float(gradients[1].norm()) == pytest.approx(float(gradients[0].norm()), rel=0.1)
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.95


def test_only_tokens_that_continue_are_computed_again(build: Build) -> None:
    model = build(decider="oracle")
    ids = torch.arange(1, 41).view(2, 20)
    wanted = torch.ones_like(ids)
    wanted[0, 3] = wanted[0, 9] = wanted[1, 4] = 2
    sizes: list[tuple[int, ...]] = []
    model.backbone.model.layers[0].mlp.register_forward_hook(lambda _m, args, _o: sizes.append(tuple(args[0].shape)))
    with torch.no_grad():
        model(ids, target_depth=wanted)
    assert sizes == [(2, 20, 32), (2, 2, 32)]


# --- checkpoints ---


def test_what_is_saved_loads_by_stock_classes_and_is_no_pickle(build: Build, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, batch = build(), padded_batch()
    model.save_pretrained(tmp_path)
    kinds = {path.suffix for path in tmp_path.iterdir()}
    assert kinds == {".json", ".safetensors", ".py"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, threshold=0.123).config.threshold == 0.123
    again.save_pretrained(tmp_path / "twice")
    assert {path.name for path in (tmp_path / "twice").iterdir()} == {
        path.name for path in tmp_path.iterdir() if path.is_file()
    }


def test_a_pickle_among_the_weights_is_refused(build: Build, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    (tmp_path / "iter_decider.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"iter_decider\.bin is a pickle"):
        TaHForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "iter_decider.bin").rename(tmp_path / "training_args.bin")  # what a trainer leaves is not read
    TaHForCausalLM.from_pretrained(tmp_path)


def test_weights_that_a_checkpoint_does_not_hold_are_not_made_up(build: Build, tmp_path: Path) -> None:
    build(decider="oracle", decider_layers=[], decider_hidden=[]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds no decider\."):
        TaHForCausalLM.from_pretrained(tmp_path, decider="learned", decider_layers=[1], decider_hidden=[8])


def test_a_batch_without_hard_tokens_gives_every_parameter_a_gradient(build: Build) -> None:
    model = build(decider="oracle", decider_layers=[], decider_hidden=[]).train()
    ids = torch.arange(1, 11).view(2, 5)
    model(ids, labels=ids, target_depth=torch.ones_like(ids)).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_vocabulary_can_be_resized(build: Build) -> None:
    for tied in (True, False):
        model = build(tied, decider="always")
        model.resize_token_embeddings(64)
        with torch.no_grad():
            assert model(torch.tensor([[1, 63]])).logits.shape == (1, 2, 64)


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"max_depth": 0}, "max_depth is 0"),
        ({"mix_top_k": 62}, "mix_top_k is 62; the backbone's vocabulary has 61 tokens"),
        ({"decider_layers": [4]}, "decider_layers has 4; the backbone has 3 layers"),
        ({"decider_layers": [-1]}, "decider_layers has -1"),
        ({"decider": "sometimes"}, "decider is 'sometimes'"),
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"lora_r": 0}, "lora_r is 0"),
        ({"decider_hidden": [0]}, "decider_hidden is [0]"),
    ],
)
def test_a_value_outside_its_limits_is_one_line(wrong: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=r"^tah: ") as error:
        TaHConfig(text_config=backbone().config, **{"mix_top_k": 7, **wrong})
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_a_backbone_of_another_build_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    other = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=61))
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no layers where Qwen3 and Llama have them"):
        TaHForCausalLM.from_backbone(other, mix_top_k=7)


def test_a_backbone_without_an_embedding_is_refused() -> None:
    model = backbone()
    model.set_input_embeddings(torch.nn.Linear(3, 3))
    with pytest.raises(ValueError, match="no embedding layer where one is expected"):
        TaHForCausalLM.from_backbone(model, mix_top_k=7)


def test_a_policy_that_cannot_be_followed_says_what_to_do(build: Build) -> None:
    ids = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="decider=always or decider=never"):
        build(decider="oracle")(ids)
    with pytest.raises(ValueError, match="stage: decider"):
        build(decider="learned", decider_hidden=[])(ids)
