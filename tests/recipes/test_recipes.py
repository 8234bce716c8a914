"""Every recipe with its tool's own command, from a fresh copy of the checkout, on data that ships with it."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import yaml
from qwen3 import ON_A_CPU, QWEN3_4B
from safetensors.torch import load_file

from harness.runner import LocalRunner, ToolError

BIN = Path(sys.executable).parent
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # two commands that take every core wait for one another

MINI = {who: f"recipes/mini/{who}" for who in ("instruct", "thinking")}

Native = Callable[..., str]


@pytest.fixture(scope="module")
def checkout(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipes and the pair, and nothing that a run left behind."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(repository / "recipes", folder / "recipes", ignore=shutil.ignore_patterns("build", "__pycache__"))
    return folder


@pytest.fixture(scope="module")
def native(checkout: Path) -> Iterator[Native]:
    """Run a tool's own command in the checkout and get what it printed, without the seconds that its imports take."""
    with pytest.MonkeyPatch.context() as patch:
        # Recipes have paths relative to the checkout, and a runner's commands start where it did.
        patch.chdir(checkout)
        runner = LocalRunner(checkout / "preload.log", preloaded=True)

    def run(*command: str) -> str:
        log = checkout / "command.log"
        log.unlink(missing_ok=True)
        try:
            runner.run([*command], ONE_THREAD, log)
        except ToolError:
            raise AssertionError(log.read_text()[-3000:]) from None
        return log.read_text()

    with runner:
        yield run


def bare(checkout: Path, *command: str) -> str:
    """The same as a shell does it: the console script in a process of its own."""
    said = subprocess.run(
        [BIN / command[0], *command[1:]],
        cwd=checkout,
        env={**os.environ, **ONE_THREAD},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert said.returncode == 0, said.stderr[-3000:]
    return said.stdout + said.stderr


def changed(one: Path, other: Path) -> set[str]:
    """The names of the weights in which two checkpoints differ."""
    weights, others = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert weights.keys() == others.keys()
    return {name for name in weights if not torch.equal(weights[name], others[name])}


def linear_layers(checkpoint: Path) -> set[str]:
    return {name for name in load_file(checkpoint / "model.safetensors") if name.endswith("_proj.weight")}


def test_labels_are_generated_alone(checkout: Path, native: Native) -> None:
    native("lm_eval", "run", "--config", "recipes/generate_labels.yml", "--limit", "100")
    for task in ("mini_math_prompts", "mini_qa_prompts"):
        (file,) = (checkout / "runs/recipes/labels").glob(f"samples_{task}_*.jsonl")
        rows = [json.loads(line) for line in file.open()]
        assert len(rows) == 100
        for row in rows:
            assert row["doc"]["trace_opened"]
            assert "answer" not in row["doc"]
            assert row["target"] == ""
        # What distillation keeps: a trace that closed, then an answer.
        closed = [re.fullmatch(r"(?s)[^<]+</think>\s*\S+", row["resps"][0][0]) for row in rows]
        assert sum(map(bool, closed)) >= 95


def test_the_shipped_pair_is_evaluated_alone(checkout: Path) -> None:
    bare(checkout, "lm_eval", "run", "--config", "recipes/evaluate.yml")
    (file,) = (checkout / "runs/recipes/evaluate").glob("results_*.json")
    results = json.loads(file.read_text())
    for task in ("mini_math", "mini_qa"):
        assert results["n-samples"][task] == {"original": 200, "effective": 200}
        assert 0.30 <= results["results"][task]["exact_match,none"] <= 0.45


def test_distillation_and_reconstruction_alone(checkout: Path, native: Native) -> None:
    kept = "trace stripping: recipes/mini/labels.jsonl: kept 512 of 512 rows"
    assert kept in native("axolotl", "preprocess", "recipes/instruct_distill.yml")
    assert kept in bare(checkout, "axolotl", "train", "recipes/instruct_distill.yml", "--launcher", "python")
    adapter = "runs/recipes/distill"
    native("axolotl", "merge-lora", "recipes/instruct_distill.yml", "--lora-model-dir", adapter)
    instruct, thinking = (checkout / MINI[who] for who in ("instruct", "thinking"))
    learned = changed(checkout / adapter / "merged", instruct)
    # Axolotl's merge rounds the embedding to NF4 as well, which training did not.
    assert learned - {"model.embed_tokens.weight"} == linear_layers(instruct)
    native("mergekit-yaml", "recipes/slerp_thinking.yml", "runs/recipes/thinking")  # of the shipped pair
    rebuilt = checkout / "runs/recipes/thinking"
    assert (rebuilt / "chat_template.jinja").read_text() == (thinking / "chat_template.jinja").read_text()
    assert linear_layers(thinking) <= changed(rebuilt, thinking) & changed(rebuilt, instruct)


def test_on_policy_distillation_alone(checkout: Path, native: Native) -> None:
    said = native("axolotl", "train", "recipes/on_policy_kl.yml", "--launcher", "python", "--max-steps", "10")
    assert "on_policy_kl: recipes/mini/labels.jsonl: 512 prompts" in said
    adapter = checkout / "runs/recipes/on_policy"
    assert [page.name for page in (adapter / "rollouts").iterdir()] == ["step_000010.html"]
    native("axolotl", "merge-lora", "recipes/on_policy_kl.yml", "--lora-model-dir", str(adapter))
    instruct = checkout / MINI["instruct"]
    assert changed(adapter / "merged", instruct) - {"model.embed_tokens.weight"} == linear_layers(instruct)


@pytest.mark.slow
def test_think_at_hard_alone(checkout: Path, native: Native) -> None:
    said = native("axolotl", "tah-label", "recipes/tah_backbone.yml")
    assert "tokens (17.2%) are hard for recipes/mini/instruct" in said
    for stage in ("backbone", "decider"):
        said = native("axolotl", "train", f"recipes/tah_{stage}.yml", "--launcher", "python")
        # Stage backbone leaves the reference's whole path in the checkpoint, and stage decider reads it there.
        reference = "recipes/mini/instruct" if stage == "backbone" else checkout / "recipes/mini/instruct"
        assert f"are hard for {reference} (kept from before)" in said
    model = f"pretrained={checkout / 'runs/recipes/tah_decider'},trust_remote_code=True"
    said = native(
        *("lm_eval", "--tasks", "mini_math", "--model", "hf", "--model_args", model),
        *("--apply_chat_template", "--batch_size", "64"),
    )
    assert "exact_match" in said


# The layer shapes of Qwen/Qwen3-4B, two layers of its 36.
TWO_LAYERS = {**QWEN3_4B, "num_hidden_layers": 2, "max_position_embeddings": 4096, "rope_theta": 5000000}
A_GPU = {"bf16": True, "fp8": False, "tf32": True, "n_gpu": 1, "n_node": 1, "compute_capability": "sm_86"}


@pytest.fixture(scope="module")
def shapes_of_4b(recipes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What there is of the real checkpoint without its weights, and the embedded pair's tokenizer."""
    from transformers import Qwen3Config

    folder = tmp_path_factory.mktemp("qwen3_4b")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(recipes / "mini" / "instruct" / name, folder)
    Qwen3Config(**TWO_LAYERS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def two_layers_of_4b(shapes_of_4b: Path) -> Path:
    """The same with random weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config.from_pretrained(shapes_of_4b))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(0.01) if tensor.ndim < 2 else tensor.normal_(0, 0.02)
    model.save_pretrained(shapes_of_4b)
    return shapes_of_4b


def short(checkout: Path, base: Path, name: str = "instruct_distill", folder: str = "qwen3_4b", **changes: Any) -> Path:
    """A 4B training recipe on this base and the shipped labels, for one step."""
    recipe = yaml.safe_load((checkout / f"recipes/{folder}/{name}.yml").read_text())
    kind = recipe["datasets"][0]["type"]
    recipe.update(
        base_model=str(base),
        datasets=[{"path": "recipes/mini/labels.jsonl", "type": kind}],
        max_steps=1,
        **changes,
    )
    if "on_policy_kl" in recipe:
        recipe["on_policy_kl"].update(teacher=str(base), max_new_tokens=8)
    file = checkout / "qwen3_4b.yml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def validated(recipe: Path, gpus: int = 1) -> Any:
    """What Axolotl makes of a recipe on a machine whose capabilities are said to be those of GPUs."""
    import axolotl.cli.config  # noqa: F401  (configures Axolotl's logging before anything else)
    from axolotl.cli.config import prepare_plugins
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    cfg = DictDefault(yaml.safe_load(recipe.read_text()))
    prepare_plugins(cfg)
    return validate_config(cfg, capabilities={**A_GPU, "n_gpu": gpus}, env_capabilities={"torch_version": "2.13.0"})


@pytest.mark.parametrize("name", ["instruct_distill", "on_policy_kl", "vllm/on_policy_kl"])
def test_the_4b_recipes_pass_axolotl_s_own_validation(checkout: Path, shapes_of_4b: Path, name: str) -> None:
    checked = validated(short(checkout, shapes_of_4b, name))
    assert checked.adapter == "qlora"
    if name.endswith("on_policy_kl"):
        assert checked.on_policy_kl["context"] == "trace"
    else:
        assert checked.trace_stripping["max_dropped_fraction"] == 0.5
        assert checked.liger_fused_linear_cross_entropy is True


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_the_recipes_for_several_gpus_pass_axolotl_s_own_validation(
    checkout: Path, shapes_of_4b: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Which is all of FSDP2 and ZeRO that a CPU can do. From any folder: a recipe is complete in its file."""
    from axolotl.utils.dict import DictDefault

    monkeypatch.chdir(tmp_path)
    checked = validated(short(checkout, shapes_of_4b, name, folder="several_gpus"), gpus=2)
    assert checked.adapter == ("qlora" if name in ("ddp", "zero2") else "lora")
    assert checked.fsdp_version == (2 if name == "fsdp2" else None)
    if name == "fsdp2":
        assert checked.fsdp_config["state_dict_type"] == "FULL_STATE_DICT"
        assert not checked.lora_mlp_kernel
    elif name != "ddp":
        assert isinstance(checked.deepspeed, DictDefault)  # which Axolotl writes to a file for DeepSpeed
        shared = checked.deepspeed.zero_optimization
        assert shared["stage"] == int(name[-1])
        gathers = shared.get("stage3_gather_16bit_weights_on_model_save")
        assert gathers is (True if name == "zero3" else None)


@pytest.mark.parametrize("folder", ["vllm", "vllm_8gb"])
@pytest.mark.parametrize("name", ["generate_labels", "evaluate_instruct", "evaluate_thinking"])
def test_what_vllm_is_told_is_what_lm_eval_s_model_takes(recipes: Path, folder: str, name: str) -> None:
    """As far as can be seen without vLLM: names it knows, an answer that fits, the cards' own sampling."""
    written = yaml.safe_load((recipes / f"qwen3_4b/{folder}/{name}.yml").read_text())
    arguments = written["model_args"]
    (model,) = Path(lm_eval.__file__).parent.glob("models/vllm_causallms.py")
    taken = {node.arg for node in ast.walk(ast.parse(model.read_text())) if isinstance(node, ast.arg)}
    assert set(arguments) - {"max_num_seqs", "enforce_eager"} <= taken  # those two are vLLM's own
    tokens = written["gen_kwargs"]["max_gen_toks"]
    assert tokens + 1024 <= arguments["max_model_len"]
    assert written["batch_size"] == "auto"
    beside = yaml.safe_load((recipes / f"qwen3_4b/{name}.yml").read_text())
    sampling = {**written["gen_kwargs"], "max_gen_toks": beside["gen_kwargs"]["max_gen_toks"]}
    assert sampling == beside["gen_kwargs"]
    # Weights, one whole sequence and the rest in what vLLM may take of a card.
    nf4 = "nf4" in arguments["pretrained"]
    weights, cache = 2.65 if nf4 else 8.04, 147_456 * arguments["max_model_len"] / 1e9
    given = (8.2 if nf4 else 24.0) * arguments["gpu_memory_utilization"]
    assert weights + cache + 1.0 < given


@pytest.mark.parametrize("loop", ["qwen3_4b", "qwen3_4b/vllm", "qwen3_4b/vllm_8gb"])
def test_the_teacher_reads_traces_as_long_as_stage_one_writes_them(recipes: Path, loop: str) -> None:
    """A longer one is left out: the prompts that are hard to answer would be the ones that are not learnt."""
    named = yaml.safe_load((recipes / loop / "loop.yml").read_text())["recipes"]
    writes, reads = (yaml.safe_load((recipes / loop / named[who]).read_text()) for who in ("generate", "on_policy"))
    assert reads["on_policy_kl"]["trace_max_new_tokens"] == writes["gen_kwargs"]["max_gen_toks"]


@pytest.mark.parametrize(("size", "width"), [("0.6b", 1024), ("1.7b", 2048)])
def test_the_think_at_hard_recipes_pass_axolotl_s_own_validation(
    checkout: Path, tmp_path: Path, size: str, width: int
) -> None:
    """As they are for a GPU, on configs of the real shapes."""
    import axolotl.cli.config  # noqa: F401  (configures Axolotl's logging before anything else)
    from axolotl.cli.config import prepare_plugins
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault
    from transformers import Qwen3Config

    from thinkswitch_plugin.tah import TaHConfig
    from thinkswitch_plugin.tah.args import read_block

    text = Qwen3Config(hidden_size=width, intermediate_size=3 * width, num_hidden_layers=28, vocab_size=151936)
    text.save_pretrained(tmp_path / "plain")
    for stage in ("backbone", "decider"):
        recipe = yaml.safe_load((checkout / f"recipes/qwen3_{size}/tah_{stage}.yml").read_text())
        if stage == "backbone":
            recipe["tah"]["reference"] = str(tmp_path / "plain")  # the hub's is not at hand
        block = read_block(recipe["tah"])
        if stage == "backbone":
            TaHConfig(text_config=text, **block.of_config).save_pretrained(tmp_path / "tah")
        cfg = DictDefault({**recipe, "base_model": str(tmp_path / ("plain" if stage == "backbone" else "tah"))})
        prepare_plugins(cfg)
        checked = validate_config(cfg, capabilities=A_GPU, env_capabilities={"torch_version": "2.13.0"})
        assert checked.adapter == "tah"
        assert checked.tah["stage"] == stage


@pytest.mark.slow
@pytest.mark.parametrize(("name", "left"), [("instruct_distill", "distill"), ("on_policy_kl", "on_policy")])
def test_the_4b_recipes_train_a_step_on_their_real_layer_shapes(
    checkout: Path, native: Native, two_layers_of_4b: Path, name: str, left: str
) -> None:
    file = short(checkout, two_layers_of_4b, name, **ON_A_CPU)
    said = native("axolotl", "train", str(file), "--launcher", "python")
    assert "Training completed" in said or "train_runtime" in said
    assert (checkout / f"runs/qwen3_4b_recipes/{left}/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("distill", ["answers", "on-policy"])
def test_the_4b_stages_fit_the_loop(checkout: Path, native: Native, distill: str) -> None:
    # The hub is not at hand: the embedded pair takes the place of the real one.
    pair = ("--instruct", MINI["instruct"], "--thinking", MINI["thinking"])
    options = ("--iters", "1", "--distill", distill, "--out", distill)
    said = native("ts-loop", "--config", "recipes/qwen3_4b/loop.yml", *pair, *options, "--dry-run")
    stages = [part.splitlines() for part in said.split("# ")[1:]]
    assert [title for title, *_ in stages] == [
        "iteration 0, evaluate_instruct",
        "iteration 0, evaluate_thinking",
        "iteration 1, generate",
        "iteration 1, distill",
        "iteration 1, reconstruct",
        "iteration 1, evaluate_instruct",
        "iteration 1, evaluate_thinking",
    ]
    for title, *commands in stages:
        recipe = yaml.safe_load(Path(re.search(r"\S+/recipe\.yml", "\n".join(commands))[0]).read_text())
        kind = title.partition(", ")[2]
        if kind == "distill":
            assert commands[0].startswith("axolotl train ")
            assert ("on_policy_kl" in recipe) == (distill == "on-policy")
        elif kind == "reconstruct":
            assert commands[0].startswith("mergekit-yaml ")
            assert recipe["merge_method"] == "slerp"
        else:
            # Each answers as its card says, from a copy that leaves 8 GB room for a cache.
            assert commands[0].startswith("axolotl nf4 ")
            assert commands[1].startswith("python -m thinkswitch_plugin.kept_answers ")
            assert recipe["gen_kwargs"]["temperature"] == (0.7 if kind == "evaluate_instruct" else 0.6)
