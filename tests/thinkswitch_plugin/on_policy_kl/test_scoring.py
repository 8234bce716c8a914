"""Hidden states where answers are predicted, and the teachers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen3Config, Qwen3ForCausalLM

from thinkswitch_plugin.on_policy_kl import scoring
from thinkswitch_plugin.on_policy_kl.args import OnPolicyKLConfig
from thinkswitch_plugin.on_policy_kl.loss import token_loss
from thinkswitch_plugin.on_policy_kl.rollouts import Sequences, answering, sequences
from thinkswitch_plugin.on_policy_kl.scoring import Teacher, answer_states, head_weight, trace_tokens


@pytest.fixture
def batch() -> Sequences:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(10, 250, (n,), generator=generator).tolist() for n in (5, 9, 3, 4, 1, 6)]
    return sequences(rows[:3], rows[3:], pad=0)


def with_adapter(model: Any) -> Any:
    """The model with a LoRA adapter that is not zero."""
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5)
    return get_peft_model(copy.deepcopy(model), config)


def test_states_times_head_are_the_logits_that_predict_the_answers(pair: Any, batch: Sequences) -> None:
    model = pair["instruct"]
    with torch.no_grad():
        states = answer_states(model, model, batch)
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    rows = [logits[row, at - 1] for row, at in batch.answers.nonzero().tolist()]
    torch.testing.assert_close(states @ head_weight(model).t(), torch.stack(rows), rtol=1e-5, atol=1e-5)
    assert len(states) == batch.answers.sum()


def test_padding_changes_nothing(pair: Any, batch: Sequences) -> None:
    model = pair["instruct"]
    with torch.no_grad():
        together = answer_states(model, model, batch)
        alone = []
        for row in batch.cut(1):
            assert bool(row.attention_mask.all())
            alone.append(answer_states(model, model, row))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_states_need_no_look_at_the_device() -> None:
    """On fake tensors, as a plan traces them: whatever waits for a value fails there."""
    with FakeTensorMode():
        model = Qwen3ForCausalLM(Qwen3Config(hidden_size=64, intermediate_size=96, num_hidden_layers=2))
        ids, places = torch.zeros((2, 512), dtype=torch.int64), torch.zeros(100, dtype=torch.int64)
        states = answer_states(model, model, Sequences(ids, torch.ones_like(ids), places))
        assert states.shape == (100, 64)
        loss = token_loss(states, head_weight(model), states, head_weight(model))
        loss.total.backward()


@pytest.mark.parametrize("at_once", [1, 40, 10_000])
def test_the_teacher_scores_in_parts_of_their_own_width(
    pair: Any, tokenizer: Any, batch: Sequences, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = with_adapter(pair["instruct"])
    teacher = Teacher(OnPolicyKLConfig(teacher="self"), student, tokenizer, torch.float32)
    expected = teacher.states(batch)
    monkeypatch.setattr(scoring, "TEACHER_TOKENS", at_once)
    widths: list[int] = []
    hook = student.get_decoder().register_forward_hook(lambda _, __, out: widths.append(out[0].shape[1]))
    states = teacher.states(batch)
    hook.remove()
    assert widths == {1: [8, 9, 8], 40: [9], 10_000: [9]}[at_once]
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)


def test_self_is_the_base_without_the_adapter_or_a_second_copy(pair: Any, tokenizer: Any, batch: Sequences) -> None:
    student = with_adapter(pair["instruct"]).train()
    before = sum(parameter.numel() for parameter in student.parameters())
    teacher = Teacher(OnPolicyKLConfig(teacher="self"), student, tokenizer, torch.float32)
    with torch.no_grad():
        expected = answer_states(pair["instruct"], pair["instruct"], batch)
        ours = answer_states(student.eval(), student, batch)
    states = teacher.states(batch)
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)
    assert not states.requires_grad
    assert (ours - expected).abs().max() > 0.01  # with the adapter it is another model
    student.train()
    teacher.states(batch)
    assert student.training
    assert teacher.model is student
    assert sum(parameter.numel() for parameter in student.parameters()) == before


def test_gradients_through_nf4_are_the_same_after_answering(recipes: Path, batch: Sequences) -> None:
    """bitsandbytes packs a layer anew when it runs in evaluation mode on some CPUs, and backward reads it wrongly."""
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(recipes / "mini/instruct", quantization_config=nf4, dtype=torch.float32)
    student = with_adapter(base).train()
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    norms = []
    for _ in range(2):
        student.zero_grad()
        answer_states(student, student, batch).pow(2).sum().backward()
        norms.append(torch.stack([p.grad.norm() for p in student.parameters() if p.grad is not None]).norm())
        with torch.no_grad(), answering(student):
            assert not student.training
            student(input_ids=batch.input_ids)
        assert student.training
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-4, atol=0)


def test_a_trained_head_is_the_student_s_and_the_one_before_the_teacher_s(pair: Any, tokenizer: Any) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    student = get_peft_model(copy.deepcopy(pair["instruct"]), config)
    with torch.no_grad():
        head_weight(student).add_(1.0)
    teacher = Teacher(OnPolicyKLConfig(teacher="self"), student, tokenizer, torch.float32)
    torch.testing.assert_close(teacher.head, pair["instruct"].lm_head.weight.detach())
    torch.testing.assert_close(head_weight(student).detach(), teacher.head + 1.0)


def test_self_needs_an_adapter(pair: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="set adapter: lora"):
        Teacher(OnPolicyKLConfig(teacher="self"), pair["instruct"], tokenizer, torch.float32)


def test_a_checkpoint_in_four_bits_is_near_the_one_in_full(pair: Any, tokenizer: Any, recipes: Path) -> None:
    batch = sequences([tokenizer("Compute 24+26.")["input_ids"]], [tokenizer("50")["input_ids"]], pad=0)
    states = []
    for four_bits in (False, True):
        config = OnPolicyKLConfig(teacher=str(recipes / "mini/thinking"), teacher_load_in_4bit=four_bits)
        teacher = Teacher(config, pair["instruct"], tokenizer, torch.float32)
        assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
        assert teacher.head.shape[0] == pair["instruct"].config.vocab_size
        states.append(teacher.states(batch))
    assert torch.nn.functional.cosine_similarity(*states).min() > 0.8
    assert not torch.equal(*states)


def test_the_teacher_thinks_once_a_prompt(pair: Any, tokenizer: Any, recipes: Path) -> None:
    config = OnPolicyKLConfig(teacher=str(recipes / "mini/thinking"), context="trace", trace_max_new_tokens=96)
    teacher = Teacher(config, pair["instruct"], tokenizer, torch.float32)
    teacher.model.generation_config.do_sample = False
    prompts = [
        teacher.tokenizer.apply_chat_template(
            [{"role": "user", "content": f"Compute {sum_}."}], add_generation_prompt=True, return_dict=False
        )
        for sum_ in ("24+26+28", "38-10+20")
    ]
    first = teacher.think([*prompts, prompts[0]])
    assert list(first) == [tuple(prompt) for prompt in prompts]
    texts = [tokenizer.decode(trace) for trace in first.values() if trace]
    assert len(texts) == 2
    assert texts[0].startswith("24+26=50")
    assert all(text.endswith("</think>\n\n") for text in texts)
    assert teacher.think(prompts) == {}  # a second asking is answered from memory
    assert teacher.traces == first


TAGS = [("<think>", "</think>")]


def test_a_trace_that_never_closes_is_none(tokenizer: Any) -> None:
    ids = tokenizer("24+26=50\n50", add_special_tokens=False)["input_ids"]
    assert trace_tokens(ids, tokenizer, True, TAGS) is None
    assert trace_tokens([], tokenizer, True, TAGS) is None


@pytest.mark.parametrize("after", ["", "\n", "\n\n"])
@pytest.mark.parametrize(
    "trace",
    [
        "24+26=50\n</think>",
        "24+26=50\n</THINK >",
        "it <think a='1'>nests</think> and\n</think>",
        "語 of </think> 😀, then\n</think>",
        "r</denk▷",
    ],
)
def test_a_trace_ends_with_its_last_tag_and_white_space(tokenizer: Any, trace: str, after: str) -> None:
    ids = tokenizer(f"{trace}{after}\\boxed{{50}}", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    kept = trace_tokens(ids, tokenizer, True, [*TAGS, ("◁denk>", "</denk▷")])
    assert kept is not None
    assert tokenizer.decode(kept) == f"{trace}{after}"
    assert ids[: len(kept)] == kept
