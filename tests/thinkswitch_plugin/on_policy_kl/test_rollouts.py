"""Rollouts: one padded batch answers as each prompt alone would, and is laid out for the loss."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from transformers import AutoModelForCausalLM

from thinkswitch_plugin.nf4 import nf4
from thinkswitch_plugin.on_policy_kl.args import OnPolicyKLConfig
from thinkswitch_plugin.on_policy_kl.rollouts import (
    Unpacked,
    answering,
    end_tokens,
    from_server,
    left_padded,
    merged,
    sample,
    sequences,
    unpacked,
)


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


def test_a_merged_student_is_the_same_policy_and_comes_back_bit_by_bit(pair: Any, tokenizer: Any) -> None:
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5, use_rslora=True)
    model = get_peft_model(copy.deepcopy(pair["instruct"]), config).eval()
    ids = torch.tensor([prompt(tokenizer, "Compute 24+26.")])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(ids).logits
        assert (expected - pair["instruct"](ids).logits).abs().max() > 0.1  # an adapter that does something
        with merged(model):
            products: list[Any] = []
            hooks = [layer.register_forward_hook(lambda *_: products.append(1)) for layer in lora_parts(model)]
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
            assert not products
        assert torch.equal(model(ids).logits, expected)
    assert products
    assert len(hooks) == 2 * 28
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


def test_a_student_that_cannot_be_merged_whole_comes_back_too(pair: Any) -> None:
    model = get_peft_model(copy.deepcopy(pair["instruct"]), LoraConfig(r=4, target_modules="all-linear"))
    model.get_submodule("base_model.model.model.layers.2.mlp.up_proj.lora_B.default").weight.data = torch.zeros(3, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    own = {name: p.data_ptr() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="size of tensor"), merged(model):
        pytest.fail("merged with a part that does not fit")
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == own  # where the optimizer knows them
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module.merged for module in model.modules() if isinstance(module, lora.Linear))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unpacked_student_is_the_same_policy_and_comes_back_packed(
    recipes: Path, tokenizer: Any, dtype: torch.dtype
) -> None:
    base = AutoModelForCausalLM.from_pretrained(recipes / "mini/instruct", quantization_config=nf4(dtype), dtype=dtype)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.tensor([prompt(tokenizer, "Compute 24+26.")] * 2)
    with torch.no_grad(), answering(model):
        expected = model(ids).logits
        with unpacked(model):
            assert not any(isinstance(layer, Linear4bit) for layer in model.modules())
            assert torch.equal(model(ids).logits, expected)
            with merged(model):
                exact = dtype == torch.float32
                assert any(layer.merged for layer in model.modules() if isinstance(layer, lora.Linear4bit)) == exact
                torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4 if exact else 0)
        assert torch.equal(model(ids).logits, expected)
    assert not any(isinstance(layer, Unpacked) for layer in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("change", [{"dtype": torch.bfloat16}, {"use_dora": True}])
def test_what_would_be_another_policy_is_not_merged(pair: Any, change: dict[str, Any]) -> None:
    base = copy.deepcopy(pair["instruct"]).to(change.pop("dtype", torch.float32))
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **change))
    own = [p.data_ptr() for p in model.parameters()]
    with merged(model):
        assert [p.data_ptr() for p in model.parameters()] == own


def lora_parts(model: Any) -> list[Any]:
    """The layers A and B of a model's adapters."""
    return [part for name, part in model.named_modules() if name.endswith(("lora_A.default", "lora_B.default"))]


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


class Completions(BaseHTTPRequestHandler):
    """The smallest server of the protocol: the embedded checkpoint, greedy, one prompt after the other."""

    model: Any
    tokenizer: Any
    with_ids: bool
    key = ""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked["model"] != "student":
            self.send_error(404, "no such model")
            return
        if self.key and self.headers["Authorization"] != f"Bearer {self.key}":
            self.send_error(401, "who are you?")
            return
        choices = []
        for ids in [ids for ids in asked["prompt"] for _ in range(asked["n"])]:
            out = self.model.generate(torch.tensor([ids]), max_new_tokens=asked["max_tokens"], do_sample=False)
            answer = out[0, len(ids) :].tolist()
            stopped = answer[-1] == 2
            answer = answer[:-1] if stopped else answer
            choice = {"index": len(choices), "finish_reason": "stop" if stopped else "length"}
            choice["text"] = self.tokenizer.decode(answer)
            choice["logprobs"] = {"token_logprobs": [-0.5] * len(answer)}
            choices.append({**choice, "token_ids": answer} if self.with_ids else choice)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": choices[::-1]}).encode())  # in any order: `index` says which

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture(params=[True, False], ids=["token ids", "text only"])
def server(request: pytest.FixtureRequest, pair: Any, tokenizer: Any) -> Iterator[str]:
    handler = type(
        "Handler", (Completions,), {"model": pair["instruct"], "tokenizer": tokenizer, "with_ids": request.param}
    )
    with HTTPServer(("127.0.0.1", 0), handler) as running:
        Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_a_server_s_rollouts_are_those_of_the_model_it_serves(server: str, pair: Any, tokenizer: Any) -> None:
    prompts = [prompt(tokenizer, f"Compute {n}+26-13.") for n in (24, 31)]
    how = {"teacher": "self", "temperature": 0.0, "max_new_tokens": 12}
    ours = sample(pair["instruct"], prompts, OnPolicyKLConfig(**how), [2], 0)
    theirs = from_server(prompts, OnPolicyKLConfig(**how, server=server, server_model="student"), [2], tokenizer)
    assert [(r.prompt, r.answer, r.truncated) for r in theirs] == [(r.prompt, r.answer, r.truncated) for r in ours]
    for rollout in theirs:
        assert rollout.log_probs is not None
        assert rollout.log_probs[:-1] == [-0.5] * (len(rollout.answer) - 1)
        assert math.isnan(rollout.log_probs[-1])  # the end token, which the server swallowed


@pytest.mark.parametrize(("model", "port"), [("other", None), ("student", 9)])
def test_a_server_that_does_not_serve_is_one_line(server: str, tokenizer: Any, model: str, port: int | None) -> None:
    url = f"http://127.0.0.1:{port}" if port else server
    with pytest.raises(ValueError, match=r"^on_policy_kl: server http://127.0.0.1:\d+/v1/completions: no completions"):
        from_server([[5]], OnPolicyKLConfig(teacher="self", server=url, server_model=model), [2], tokenizer)


def test_a_server_s_key_is_the_environment_s_and_is_never_said(
    server: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = OnPolicyKLConfig(teacher="self", temperature=0.0, max_new_tokens=3, server=server, server_model="student")
    monkeypatch.setattr(Completions, "key", "s3cret")
    for key in ("", "wr0ng"):
        monkeypatch.setenv("ON_POLICY_KL_API_KEY", key)
        with pytest.raises(ValueError, match="401") as error:
            from_server([prompt(tokenizer, "Compute 1+1.")], config, [2], tokenizer)
        assert "wr0ng" not in str(error.value)
    monkeypatch.setenv("ON_POLICY_KL_API_KEY", "s3cret")
    assert len(from_server([prompt(tokenizer, "Compute 1+1.")], config, [2], tokenizer)) == 1


def test_layout() -> None:
    batch = sequences([[5, 6], [7]], [[8], [9, 9, 9]], pad=0)
    assert batch.input_ids.tolist() == [[5, 6, 8, 0], [7, 9, 9, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.answers.tolist() == [[False, False, True, False], [False, True, True, True]]
    assert batch.places.tolist() == [2, 5, 6, 7]
    first, second = batch.cut(1)
    assert (first.input_ids.tolist(), first.places.tolist()) == ([[5, 6, 8]], [2])
    assert (second.input_ids.tolist(), second.places.tolist()) == ([[7, 9, 9, 9]], [1, 2, 3])
    assert batch.cut(2) == [batch]
    ids, mask = left_padded([[5, 6], [7]], 0, torch.device("cpu"))
    assert (ids.tolist(), mask.tolist()) == ([[5, 6], [0, 7]], [[1, 1], [0, 1]])
