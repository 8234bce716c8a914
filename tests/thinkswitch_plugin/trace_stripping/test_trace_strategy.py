"""The dataset type through Axolotl's own classes: labels, columns, counts, errors and the cache's hash."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from thinkswitch_plugin.facts import attached
from thinkswitch_plugin.trace_stripping import TraceStrippingConfig, split_trace
from thinkswitch_plugin.trace_stripping.args import PLUGIN
from thinkswitch_plugin.trace_stripping.report import sentence

datasets.disable_progress_bars()
TYPE = "thinkswitch_plugin.trace_stripping"
ASK = {"role": "user", "content": "What is 12 + 30?"}
SECRET = "§"


def said(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def chat(*contents: str, **more: Any) -> dict[str, Any]:
    """A conversation in which each content answers the same question."""
    return {"messages": [turn for content in contents for turn in (ASK, said(content))], **more}


def sample(*texts: str, opened: bool = True, **doc: Any) -> dict[str, Any]:
    return {"doc": {"messages": [ASK], "trace_opened": opened, **doc}, "resps": [list(texts)], "target": "gold"}


@pytest.fixture(scope="session")
def prepare(tokenizer: Any) -> Callable[..., datasets.Dataset]:
    """Rows to a tokenised dataset, as Axolotl does it for a recipe."""
    from axolotl.prompt_strategies import load
    from axolotl.utils.dict import DictDefault

    def prepare(
        rows: list[dict[str, Any]], block: dict[str, Any] | None = None, processes: int | None = None, **entry: Any
    ) -> datasets.Dataset:
        cfg = DictDefault({"plugins": [PLUGIN], "trace_stripping": block, "sequence_len": 4096})
        strategy = load(TYPE, tokenizer, cfg, DictDefault({"path": "rows.jsonl", "type": TYPE, **entry}))
        return strategy.wrap_dataset(datasets.Dataset.from_list(rows), process_count=processes)

    return prepare


def trained(tokenizer: Any, row: dict[str, Any]) -> list[str]:
    """What a row trains on: the text of each run of unmasked labels."""
    runs = [list(run) for masked, run in groupby(row["labels"], lambda label: label == -100) if not masked]
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


def shown(tokenizer: Any, row: dict[str, Any]) -> str:
    return tokenizer.decode(row["input_ids"], skip_special_tokens=False)


# --- labels ----------------------------------------------------------------------------------------------------------


def test_the_label_is_the_answer_and_its_end(tokenizer: Any, prepare: Any) -> None:
    (row,) = prepare([sample("I add them.</think>\n\nIt is 42.")])
    assert shown(tokenizer, row) == (
        "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\nIt is 42.<|im_end|>\n"
    )
    assert trained(tokenizer, row) == ["It is 42.<|im_end|>"]
    assert row["attention_mask"] == [1] * len(row["input_ids"])


answer = st.text(min_size=1, max_size=20).map(lambda text: split_trace(text).answer).filter(bool)
slow = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@slow
@given(conversations=st.lists(st.lists(answer, min_size=1, max_size=3), min_size=1, max_size=8))
def test_labels_are_masked_exactly_outside_the_answers(tokenizer: Any, prepare: Any, conversations: Any) -> None:
    prepared = prepare([chat(*(f"<think>{SECRET}</think>{text}" for text in texts)) for texts in conversations])
    for row, texts in zip(prepared, conversations, strict=True):
        assert trained(tokenizer, row) == [f"{text}<|im_end|>" for text in texts]
        assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))


soup = st.lists(st.sampled_from(["<think>", "</think>", "</THINK >", "<think", SECRET, "a", "\n"]), max_size=8)


@slow
@given(texts=st.lists(soup.map("".join), min_size=1, max_size=10), quote=soup.map("".join), opened=st.booleans())
def test_no_tag_survives_and_the_users_text_is_never_changed(
    tokenizer: Any, prepare: Any, texts: list[str], quote: str, opened: bool
) -> None:
    user = {"role": "user", "content": quote}
    rows = [{"doc": {"messages": [user], "trace_opened": opened}, "resps": [[text]]} for text in texts]
    rows.append({"doc": {"messages": [user], "trace_opened": opened}, "resps": [[f"{SECRET}</think>ok"]]})
    prepared = prepare(rows, {"max_dropped_fraction": 1.0})
    expected = [split_trace(text, opened).answer for text in [*texts, "</think>ok"]]
    assert [trained(tokenizer, row) for row in prepared] == [[f"{a}<|im_end|>"] for a in expected if a is not None]
    assert all(shown(tokenizer, row).startswith(f"<|im_start|>user\n{quote}<|im_end|>") for row in prepared)


def test_a_reasoning_field_reaches_neither_label_nor_prompt(tokenizer: Any, prepare: Any) -> None:
    turns = [ASK, said("a", reasoning_content=SECRET), ASK, said("b", thinking=SECRET, reasoning_content=SECRET)]
    (row,) = prepare([{"messages": turns}])
    assert SECRET not in shown(tokenizer, row)
    assert trained(tokenizer, row) == ["a<|im_end|>", "b<|im_end|>"]


def test_turns_that_came_with_the_prompt_are_not_trained_on(tokenizer: Any, prepare: Any) -> None:
    messages = [ASK, said("<think>r</think>human's"), ASK]
    (row,) = prepare([{"doc": {"messages": messages, "trace_opened": True}, "resps": [["r</think>own"]]}])
    assert "human's" in shown(tokenizer, row)
    assert trained(tokenizer, row) == ["own<|im_end|>"]


def test_the_entry_says_what_it_would_say_for_chat_template(tokenizer: Any, prepare: Any) -> None:
    rows = [{"chat": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": f"<t>{SECRET}</t>a", "why": SECRET}]}]
    entry = {
        "field_messages": "chat",
        "message_property_mappings": {"role": "from", "content": "value"},
        "field_thinking": "why",
        "train_on_eos": "none",
        "chat_template": "jinja",
        "chat_template_jinja": tokenizer.chat_template.replace("<|im_start|>", ""),
    }
    (row,) = prepare(rows, {"tags": [["<t>", "</t>"]]}, **entry)
    assert shown(tokenizer, row) == "user\nHi<|im_end|>\nassistant\na<|im_end|>\n"
    assert trained(tokenizer, row) == ["a"]


def test_a_role_of_ones_own_that_is_trained_on_is_stripped(tokenizer: Any, prepare: Any) -> None:
    rows = [{"messages": [ASK, {"role": "solver", "content": f"<think>{SECRET}</think>a"}]}]
    (row,) = prepare(rows, roles_to_train=["solver"])
    assert trained(tokenizer, row) == ["a<|im_end|>"]


def test_system_and_tools_columns_stay_and_others_go(tokenizer: Any, prepare: Any) -> None:
    (row,) = prepare([chat("<think>r</think>a", system="Be brief.", answer="gold")])
    assert shown(tokenizer, row).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert "gold" not in shown(tokenizer, row)


# --- rows ------------------------------------------------------------------------------------------------------------


def test_order_is_kept_over_batches_and_processes(tokenizer: Any, prepare: Any) -> None:
    rows = [sample(f"r</think>{index}a", "r", f"r</think>{index}b") for index in range(150)]
    one, two = prepare(rows), prepare(rows, processes=2)
    assert [trained(tokenizer, row)[0] for row in one] == [f"{i}{x}<|im_end|>" for i in range(150) for x in "ab"]
    assert one.to_dict() == two.to_dict()


def test_labels_are_the_models_own(prepare: Any) -> None:
    texts = ["r</think>42", "s</think>43"]
    sets = [
        prepare([{**sample(text, answer=gold, question=gold), "target": gold} for text in texts])
        for gold in ("42", "garbage")
    ]
    assert sets[0].to_dict() == sets[1].to_dict()


def test_the_log_ends_with_one_line(prepare: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), _propagating("axolotl"):
        prepared = prepare([sample("r</think>a"), sample("r</think>b", "r</think>c"), sample("r")])
    lines = _logged(caplog)
    assert lines[-1].startswith("trace stripping: rows.jsonl: kept 3 of 4 rows, dropped 1 (unclosed 1); removed ")
    assert sum(line.startswith("trace stripping") for line in lines) == 1
    (counts,) = attached(prepared, "trace_stripping")
    assert lines[-1] == f"trace stripping: rows.jsonl: {sentence({'datasets': [counts]})}"


def _logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Each record once: where another test has configured Axolotl's logging, one record passes two handlers."""
    return [record.getMessage() for record in {id(record): record for record in caplog.records}.values()]


@contextmanager
def _propagating(name: str) -> Iterator[None]:
    """Axolotl's logger keeps its records from the root logger, where caplog listens."""
    logger = logging.getLogger(name)
    before, logger.propagate = logger.propagate, True
    yield
    logger.propagate = before


def test_tokens_are_counted_by_the_tokenizer(tokenizer: Any, prepare: Any) -> None:
    texts = ["Let me think.</think>The answer is 42.", "cut off"]
    prepared = prepare([sample(text) for text in texts])
    read, kept = (sum(len(tokenizer(text).input_ids) for text in some) for some in (texts, ["The answer is 42."]))
    (counts,) = attached(prepared, "trace_stripping")
    assert (counts["tokens_read"], counts["tokens_kept"]) == (read, kept)
    share = f"removed {(read - kept) / read:.1%} of the assistant tokens ({read - kept} of {read})"
    assert sentence({"datasets": [counts]}).endswith(share)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "block", "says"),
    [
        (
            [sample("r"), sample("r"), sample("r</think>a")],
            None,
            r"kept 1 of 3 rows, dropped 2 \(unclosed 2\), over .* 0.5",
        ),
        ([sample("r"), sample("r</think>a")], {"max_dropped_fraction": 0.1}, r"over max_dropped_fraction 0.1; give"),
        ([sample("r"), sample("r</think>")], {"max_dropped_fraction": 1.0}, "nothing is left to train on"),
        ([chat("<think>r")], None, "nothing is left to train on"),
        (
            [sample("r</think>a"), {"doc": {"messages": [ASK]}, "resps": [["a"]]}],
            None,
            "row 2: doc.trace_opened is None",
        ),
        ([{"messages": "no"}], None, "row 1: messages is not a list"),
        ([{"prompt": "x", "completion": "y"}], None, "only prompt, completion; set field_messages or log samples"),
        ([], None, "the dataset has no rows"),
    ],
)
def test_bad_data_is_one_clear_line(prepare: Any, rows: Any, block: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        prepare(rows, block)
    assert str(error.value).startswith("trace stripping: rows.jsonl: ")
    assert "\n" not in str(error.value)


def test_a_stream_is_one_clear_line(tokenizer: Any) -> None:
    from axolotl.utils.dict import DictDefault

    from thinkswitch_plugin.trace_stripping import load

    strategy = load(tokenizer, DictDefault({"plugins": [PLUGIN], "sequence_len": 64}), {"path": "rows.jsonl"})
    with pytest.raises(ValueError, match="a stream cannot be counted"):
        strategy.wrap_dataset(datasets.IterableDataset.from_generator(lambda: iter([chat("a")])))


@pytest.mark.parametrize(
    ("recipe", "entry", "says"),
    [
        ({}, {}, r"not the plugin.* add `plugins: \[thinkswitch_plugin.trace_stripping.TraceStrippingPlugin\]`"),
        ({"plugins": [PLUGIN]}, {"message_field_training_detail": "x"}, "message_field_training_detail counts"),
    ],
)
def test_a_bad_recipe_is_one_clear_line(tokenizer: Any, recipe: Any, entry: Any, says: str) -> None:
    from axolotl.utils.dict import DictDefault

    from thinkswitch_plugin.trace_stripping import load

    with pytest.raises(ValueError, match=says):
        load(tokenizer, DictDefault(recipe), {"path": "rows.jsonl", **entry})


# --- the plugin and the cache ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "says"),
    [
        (
            {"max_droped": 1},
            r"^trace_stripping.max_droped: Extra inputs .* \(keys: tags, max_dropped_fraction, strip\)$",
        ),
        ({"max_dropped_fraction": 1.5}, "^trace_stripping.max_dropped_fraction: .* less than or equal to 1"),
        ({"tags": [["<think>", "<think>"]]}, "^trace_stripping.tags: .* is not a pair of different tags"),
        ({"tags": "think"}, "^trace_stripping.tags: "),
        ([1], "^trace_stripping: "),
    ],
)
def test_a_bad_block_is_one_clear_line(block: Any, says: str, write_rows: Any) -> None:
    with pytest.raises(ValueError, match=says) as error:
        register({"plugins": [PLUGIN], "datasets": [{"path": "x", "type": TYPE}], "trace_stripping": block})
    assert "\n" not in str(error.value)


def register(recipe: dict[str, Any]) -> Any:
    from axolotl.utils.dict import DictDefault

    from thinkswitch_plugin.trace_stripping import TraceStrippingPlugin

    cfg = DictDefault(recipe)
    TraceStrippingPlugin().register(cfg)
    return cfg


def prepared_set(recipe: dict[str, Any]) -> str:
    """The name under which Axolotl keeps the recipe's prepared dataset."""
    from axolotl.utils.data.shared import generate_dataset_hash_from_config
    from axolotl.utils.schemas.datasets import SFTDataset

    cfg = register(recipe)
    entries = [SFTDataset(**dict(entry)) for entry in cfg.datasets]
    return generate_dataset_hash_from_config(cfg, entries, "tokenizer")


def test_a_prepared_set_is_found_again_only_for_the_same_content_and_block(write_rows: Any) -> None:
    path = write_rows([chat("a")])
    recipe = {"plugins": [PLUGIN], "datasets": [{"path": str(path), "type": TYPE}]}
    first = prepared_set(recipe)
    defaults = TraceStrippingConfig().model_dump()
    assert prepared_set(recipe) == prepared_set({**recipe, "trace_stripping": defaults}) == first
    block = prepared_set({**recipe, "trace_stripping": {"max_dropped_fraction": 0.4}})
    write_rows([chat("b")])
    content = prepared_set(recipe)
    assert len({first, block, content}) == 3


def test_files_in_a_folder_and_in_data_files_count(write_rows: Any, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    entries = [
        {"path": str(tmp_path / "folder"), "type": TYPE},
        {"path": "json", "data_files": [str(tmp_path / "folder" / "*.jsonl")], "type": TYPE},
    ]
    for entry in entries:
        recipe = {"plugins": [PLUGIN], "datasets": [entry]}
        write_rows([chat("a")], "folder/rows.jsonl")
        first = prepared_set(recipe)
        write_rows([chat("b")], "folder/rows.jsonl")
        assert prepared_set(recipe) != first


def test_counts_are_written_when_training_starts_and_shown_of_a_set_prepared_before(
    prepare: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from axolotl.utils.dict import DictDefault

    from thinkswitch_plugin.trace_stripping import TraceStrippingPlugin

    fresh = prepare([sample("r</think>a"), sample("r</think>b"), sample("r")])
    fresh.save_to_disk(str(tmp_path / "prepared" / "hash"))
    read_back = datasets.load_from_disk(str(tmp_path / "prepared" / "hash")).shuffle(seed=1)
    cfg = DictDefault({"plugins": [PLUGIN], "dataset_prepared_path": str(tmp_path / "prepared")})
    caplog.clear()
    with caplog.at_level(logging.INFO), _propagating("axolotl"):
        for name, dataset in (("fresh", fresh), ("read_back", read_back)):
            trainer = SimpleNamespace(
                train_dataset=dataset,
                is_world_process_zero=lambda: True,
                args=SimpleNamespace(world_size=1, gradient_accumulation_steps=1),
            )
            TraceStrippingPlugin().post_trainer_create(cfg | {"output_dir": str(tmp_path / name)}, trainer)
    facts = [json.loads((tmp_path / name / "trace_stripping.json").read_text()) for name in ("fresh", "read_back")]
    assert facts[0] == facts[1]
    (counts,) = facts[0]["datasets"]
    tokens = {"tokens_read": counts["tokens_read"], "tokens_kept": counts["tokens_kept"]}
    assert counts == {"path": "rows.jsonl", "rows": 3, "kept": 2, "dropped": {"unclosed": 1}, **tokens}
    assert _logged(caplog) == [f"trace stripping: rows.jsonl: {sentence(facts[1])}"]


def test_a_training_of_another_recipe_gets_no_file(tmp_path: Path) -> None:
    from axolotl.utils.dict import DictDefault

    from thinkswitch_plugin.trace_stripping import TraceStrippingPlugin

    TraceStrippingPlugin().post_trainer_create(DictDefault({"output_dir": str(tmp_path)}), None)
    assert not list(tmp_path.iterdir())


def test_several_datasets_are_one_sentence() -> None:
    first = {"path": "a", "rows": 4, "kept": 2, "dropped": {"unclosed": 2}, "tokens_read": 90, "tokens_kept": 10}
    other = {"path": "b", "rows": 4, "kept": 1, "dropped": {"empty_answer": 3}, "tokens_read": 10, "tokens_kept": 10}
    assert sentence({"datasets": [first, other]}) == (
        "kept 3 of 8 rows, dropped 5 (empty_answer 3, unclosed 2); removed 80.0% of the assistant tokens (80 of 100)"
    )
    assert sentence({"datasets": []}).startswith("kept 0 of 0 rows, dropped 0; removed 0.0% ")


def test_evaluation_sets_are_fingerprinted_as_well_and_other_types_left_alone(write_rows: Any) -> None:
    path = str(write_rows([chat("a")]))
    other = {"path": path, "type": "chat_template"}
    cfg = register({"plugins": [PLUGIN], "datasets": [other], "test_datasets": [{"path": path, "type": TYPE}]})
    assert "input_transform" not in cfg.datasets[0]
    assert cfg.test_datasets[0].input_transform.startswith("trace stripping ")


def test_a_plugin_without_a_dataset_is_one_clear_line() -> None:
    with pytest.raises(ValueError, match=r"the plugin is listed but no dataset uses it; set `type: .*` on a dataset"):
        register({"plugins": [PLUGIN], "datasets": [{"path": "x", "type": "chat_template"}]})


def test_a_recipe_that_does_not_list_the_plugin_is_left_alone() -> None:
    recipe = {"plugins": ["other.Plugin"], "datasets": [{"path": "x", "type": "chat_template"}]}
    assert register(recipe) == recipe


def test_the_block_passes_axolotls_own_validation() -> None:
    from thinkswitch_plugin.trace_stripping import TraceStrippingArgs

    assert TraceStrippingArgs().model_dump() == {
        "trace_stripping": {"tags": [("<think>", "</think>")], "max_dropped_fraction": 0.5, "strip": True}
    }
    assert TraceStrippingArgs(trace_stripping=None).trace_stripping is None
