"""Training steps on tensors without numbers: they hold what the same code holds with numbers."""

import gc
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM

from harness.config import read_yaml
from harness.costs.fake import Peak, config_of, held, model_of
from harness.costs.footprint import Question, extrapolated
from harness.costs.traces import traced


class Counted(TorchDispatchMode):
    """The slow obvious reference: after every operation, the bytes of all storages that are still there."""

    def __init__(self, *given: Tensor):
        """`given` are there from the beginning."""
        super().__init__()
        self.storages = WeakIdKeyDictionary()
        self.most = 0
        for tensor in given:
            self.storages[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """One operation."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                self.storages[leaf.untyped_storage()] = True
        self.most = max(self.most, sum(storage.nbytes() for storage in self.storages))
        return result


@pytest.fixture
def config(recipes: Path) -> dict:
    return json.loads((recipes / "mini" / "instruct" / "config.json").read_text())


def test_a_step_on_fake_tensors_holds_what_a_real_one_holds(config: dict):
    ids = torch.ones(4, 24, dtype=torch.int64)
    real = AutoModelForCausalLM.from_config(config_of(config, 2)).train()
    peak = Peak()
    fake = peak.made(lambda: model_of(config, 2, torch.float32, nf4=False).train())

    def step(model):
        model(input_ids=ids, labels=ids).loss.backward()

    gc.collect()
    with Counted(*real.parameters(), *real.buffers()) as counted:
        step(real)
    assert peak.of(lambda: step(fake), fake) == pytest.approx(counted.most, rel=0.02)
    assert held(fake) == (sum(t.nbytes for t in (*real.parameters(), *real.buffers())), real.num_parameters())


def test_a_real_mask_picks_as_many_of_fake_tensors_as_it_says():
    peak = Peak()
    states = peak.tensor(3, 8, 16, dtype=torch.float32, device=torch.device("cpu"))
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[1, 2:7] = True
    seen = []
    peak.of(lambda: seen.append(states[mask].shape), states)
    assert seen == [(5, 16)]


def test_weights_in_nf4_take_half_a_byte_and_their_scales(config: dict):
    peak = Peak()
    whole, packed = (peak.made(lambda nf4=nf4: model_of(config, 2, torch.float32, nf4)) for nf4 in (False, True))
    linear = sum(m.weight.numel() for m in whole.model.layers.modules() if isinstance(m, torch.nn.Linear))
    saved = held(whole)[0] - held(packed)[0]
    assert saved == pytest.approx(linear * (4 - 0.5 - 1 / 64), rel=0.001)


@pytest.mark.parametrize(
    "name",
    [
        "instruct_distill.yml",
        pytest.param("on_policy_kl.yml", marks=pytest.mark.slow),
        pytest.param("tah_backbone.yml", marks=pytest.mark.slow),
    ],
)
def test_layers_are_alike(recipes: Path, config: dict, name: str):
    recipe = read_yaml(recipes / name)
    teacher = config if recipe.get("on_policy_kl") else None
    asked = Question(recipe, config, teacher, rows=2, prompt=6, answer=4, context=9, hard=0.5, gpu=False)
    two, three, four = (traced(asked, layers) for layers in (2, 3, 4))
    straight = extrapolated(two, four, 3)
    for what in ("weights", "states", "step", "loss", "answering"):
        assert getattr(straight, what) == pytest.approx(getattr(three, what), rel=0.01), what
    assert two.weights < two.step < four.step


def test_answers_of_unpacked_layers_hold_these_too(recipes: Path, config: dict):
    recipe = read_yaml(recipes / "on_policy_kl.yml")
    packed = {**recipe, "on_policy_kl": {**recipe["on_policy_kl"], "unpack_rollouts": False}}
    asked = [Question(it, config, config, rows=2, prompt=6, answer=4, context=9, gpu=False) for it in (packed, recipe)]
    few, more = (traced(question, 2) for question in asked)
    linear = Peak().made(lambda: model_of(config, 2, torch.float32, False)).model.layers
    whole = sum(4 * m.weight.numel() for m in linear.modules() if isinstance(m, torch.nn.Linear))
    assert (more.answering - few.answering, more.reading - few.reading) == (whole, whole)
    assert (more.step, more.loss, more.weights) == (few.step, few.loss, few.weights)


def test_checkpoints_of_layers_hold_less_than_activations(recipes: Path, config: dict):
    recipe = read_yaml(recipes / "instruct_distill.yml")
    rows = {"rows": 16, "prompt": 20, "answer": 12, "gpu": False}
    without = traced(Question(recipe, config, None, **rows), 4)
    thrifty = traced(Question({**recipe, "gradient_checkpointing": True}, config, None, **rows), 4)
    assert thrifty.weights == without.weights
    assert thrifty.step < 0.7 * without.step
