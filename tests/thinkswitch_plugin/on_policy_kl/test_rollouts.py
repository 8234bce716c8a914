"""Rollouts: one padded batch answers as each prompt alone would, and is laid out for the loss."""

from __future__ import annotations

from typing import Any

import torch

from thinkswitch_plugin.on_policy_kl.args import OnPolicyKLConfig
from thinkswitch_plugin.on_policy_kl.rollouts import end_tokens, left_padded, sample, sequences


def prompt(tokenizer: Any, question: str) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return ids


def test_a_batch_of_mixed_lengths_answers_as_each_prompt_alone(pair: Any, tokenizer: Any) -> None:
    model, ends = pair["instruct"], end_tokens(pair["instruct"], tokenizer)
    prompts = [prompt(tokenizer, f"Compute {'1+' * extra}24+26.") for extra in (0, 9, 3)]
    config = OnPolicyKLConfig(teacher="self", temperature=0.0, max_new_tokens=16)
    together = sample(model, prompts, config, ends, tokenizer.pad_token_id)
    for ids, rollout in zip(prompts, together, strict=True):
        (alone,) = sample(model, [ids], config, ends, tokenizer.pad_token_id)
        assert rollout == alone
        assert rollout.prompt == ids
        assert rollout.truncated == (rollout.answer[-1] not in ends)
    assert not together[0].truncated


def test_several_rollouts_of_a_prompt_are_neighbours_and_differ(pair: Any, tokenizer: Any) -> None:
    torch.manual_seed(0)
    prompts = [prompt(tokenizer, f"Compute {n}+26-13.") for n in (24, 31)]
    config = OnPolicyKLConfig(teacher="self", temperature=3.0, rollouts_per_prompt=8, max_new_tokens=8)
    rollouts = sample(pair["instruct"], prompts, config, end_tokens(pair["instruct"], tokenizer), 0)
    assert [rollout.prompt for rollout in rollouts] == [ids for ids in prompts for _ in range(8)]
    assert len({tuple(rollout.answer) for rollout in rollouts[:8]}) > 1


def test_an_answer_cut_by_max_new_tokens_is_marked(pair: Any, tokenizer: Any) -> None:
    config = OnPolicyKLConfig(teacher="self", temperature=0.0, max_new_tokens=2)
    (rollout,) = sample(pair["instruct"], [prompt(tokenizer, "Compute 24+26.")], config, [2], 0)
    assert rollout.truncated
    assert len(rollout.answer) == 2


def test_greedy_and_top_k_one_are_the_most_likely_tokens(pair: Any, tokenizer: Any) -> None:
    ids = prompt(tokenizer, "Compute 24+26-13.")
    answers = [
        sample(pair["instruct"], [ids], OnPolicyKLConfig(teacher="self", max_new_tokens=12, **how), [2], 0)[0].answer
        for how in ({"temperature": 0.0}, {"temperature": 5.0, "top_k": 1})
    ]
    assert answers[0] == answers[1]
    with torch.no_grad():
        logits = pair["instruct"](torch.tensor([ids + answers[0]])).logits[0]
    assert logits[len(ids) - 1 : -1].argmax(-1).tolist() == answers[0]


def test_layout() -> None:
    batch = sequences([[5, 6], [7]], [[8], [9, 9, 9]], pad=0)
    assert batch.input_ids.tolist() == [[5, 6, 8, 0], [7, 9, 9, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.answers.tolist() == [[False, False, True, False], [False, True, True, True]]
    ids, mask = left_padded([[5, 6], [7]], 0, torch.device("cpu"))
    assert (ids.tolist(), mask.tolist()) == ([[5, 6], [0, 7]], [[1, 1], [0, 1]])
