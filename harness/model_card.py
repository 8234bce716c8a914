"""The card of a published checkpoint, and its scores as the hub reads them: facts of a run, in words.

Knows what the hub's front matter and `.eval_results/` hold; `model_card.md.j2` beside this module is the text. Which
checkpoint it is, and what is copied, is `export`'s.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from harness import asking, evidence
from harness.errors import LoopError, StageError
from harness.evidence import Comparison, Who
from harness.files import read_json
from harness.lineage import Chosen, Parent, Step
from harness.outcomes import Row
from harness.report import asked_text
from harness.stages import RECIPE
from harness.store import MARKER
from harness.view import clock
from thinkswitch_plugin.prompts import is_on_hub, is_source

CARD = "README.md"
AGAIN = "ts_loop"  # the folder of recipes that make it again
TRAINING = (
    *("adapter", "load_in_4bit", "load_in_8bit", "lora_r", "lora_alpha", "lora_dropout", "lora_target_linear"),
    *(
        "lora_target_modules",
        "learning_rate",
        "lr_scheduler",
        "warmup_steps",
        "warmup_ratio",
        "num_epochs",
        "max_steps",
    ),
    *("micro_batch_size", "gradient_accumulation_steps", "sequence_len", "optimizer", "weight_decay", "bf16", "seed"),
)


class Licence(NamedTuple):
    """As a card's front matter has it: `link` and `name` go with "other"."""

    id: str
    name: str | None = None
    link: str | None = None


def files(chosen: Chosen, licensed: Licence, name: str, adapter_only: bool) -> dict[str, str]:
    """The card, and a file of scores for each task whose questions are a whole data set of the hub's.

    Args:
        chosen: the checkpoint.
        licensed: what it is published under.
        name: what it is called, `owner/name` or a folder's.
        adapter_only: whether it is the adapter alone.

    Returns:
        Path inside the folder → text.
    """
    from huggingface_hub import ModelCard

    facts = gather(chosen, name, adapter_only)
    data = front_matter(chosen, licensed, name, adapter_only, facts)
    found = {CARD: str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text(facts)}\n"))}
    for row in facts["rows"]:
        if entry := eval_result(row, facts):
            found[f".eval_results/{row['task']}.yaml"] = entry
    return found


def text(facts: Mapping[str, Any]) -> str:
    """The card's text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("model_card.md.j2").render(facts)


def gather(chosen: Chosen, name: str, adapter_only: bool) -> dict[str, Any]:
    """What the card's text says."""
    who, asked = chosen.who, chosen.noted["asked"]
    mine, both, comparisons, over_seeds = scores(chosen)
    instruct, thinking = chosen.parent("instruct"), chosen.parent("thinking")
    asks, distilled = chosen.of_kind("generate"), chosen.of_kind("distill")
    evaluated = chosen.evaluation
    used = [*chosen.line, *filter(None, [evaluated])]
    tools = dict(sorted({k: v for step in used for k, v in step["reads"]["tools"].items()}.items()))
    results = read_json(chosen.out / chosen.base / "results.json") or {}
    return {
        "name": name.rpartition("/")[2],
        "loads": name,
        "who": who,
        "seed": chosen.seed,
        "several": len({(step.get("arm"), step.get("seed")) for step in chosen.steps}) > 1,
        "repeats": max((row.get("repeats", 1) for row in mine), default=1),
        "iterations": max(step["iteration"] for step in chosen.steps),
        "adapter_only": adapter_only,
        "adapters": len(distilled),
        "quantised": bool(distilled) and quantised(distilled[-1]),
        "missing": chosen.missing,
        "parents": [instruct, thinking],
        "rows": mine,
        "table": [row_cells(row) for row in [*both, *mine]],
        "verdict": [
            f"against {one.before.checkpoint} as it came: {said}"
            for one, said in zip(comparisons, evidence.verdict(comparisons), strict=True)
        ],
        "over_seeds": over_seeds,
        "decoding": decoding(chosen, asks[-1]) if asks else {},
        "teacher_config": generation_config(thinking),
        "tested": decoding(chosen, evaluated),
        "prompts": prompts(chosen),
        "labels": [labels(chosen, step) for step in distilled],
        "stripped": stripping(distilled),
        "on_policy": bool(distilled and distilled[-1]["reads"]["recipes"][RECIPE].get("on_policy_kl")),
        "training": settings(distilled[-1], TRAINING) if distilled else {},
        "merges": [merge(step) for step in chosen.of_kind("reconstruct")],
        "choices": [choice(chosen, step, results.get("chosen", [])) for step in chosen.of_kind("choose")],
        "anchor": asked.get("anchor", "original"),
        "met": contamination(chosen),
        "again": again(chosen),
        "folder": AGAIN,
        "own_tasks": bool(asked.get("include_path")),
        "own_prompts": own_prompts(chosen),
        "tools": tools,
        "time": clock(results["wall_s"]) if results.get("wall_s") else "",
        "cost": results.get("cost_usd"),
        "sources": sources(chosen, evaluated),
        "date": tested_on(chosen, evaluated),
    }


def scores(chosen: Chosen) -> tuple[list[Row], list[Row], list[Comparison], list[str]]:
    """Rows of results.json of the checkpoint and of the pair as it came, the paired tests, and what seeds say."""
    who = chosen.who
    try:
        rows = evidence.read(chosen.out / who.run)
        came = rows if chosen.base == who.run else evidence.first_seed(evidence.read(chosen.out / chosen.base))
    except LoopError:
        return [], [], [], []
    arm = who.arm if chosen.base == who.run else came[0]["arm"]
    groups = evidence.by_checkpoint(
        [row for row in rows if (row["run"], row["arm"], row["seed"]) == (who.run, who.arm, chosen.seed)]
        + [r for r in came if (r["arm"], r["seed"], r["iteration"]) == (arm, chosen.seed, 0) and chosen.base != who.run]
    )
    first = {role: Who(chosen.base, arm, 0, role) for role in ("instruct", "thinking")}

    def of(one: Who) -> list[Row]:
        return [
            {"iteration": one.iteration, "checkpoint": one.checkpoint, **evidence.summed_up(by_question.values())}
            for (whose, _), by_question in groups.items()
            if whose == one
        ]

    tasks = [task for whose, task in groups if whose == who]
    sides = [(task, before, groups[before, task], who, groups[who, task])
             for before in first.values() for task in tasks if (before, task) in groups]  # fmt: skip
    compared = evidence.compare(sides)
    over = []
    if len({row["seed"] for row in rows if row["arm"] == who.arm}) > 1:
        every = evidence.by_checkpoint(row for row in rows if row["arm"] == who.arm)
        before = first[who.checkpoint]
        pooled = [(t, before, every[before, t], who, every[who, t]) for t in tasks if (before, t) in every]
        over = [f"{one.task}: {evidence.in_points(one.seeds)}" for one in evidence.compare(pooled) if one.seeds]
    return of(who), [row for one in first.values() for row in of(one)], compared, over


def row_cells(row: Row) -> list[str]:
    """One row of the card's table."""
    low, high = row["ci95"]
    tokens = row["tokens_per_answer"]
    as_it_came = "" if row["iteration"] else ", as it came"
    return [
        f"`{row['task']}`",
        f"{row['checkpoint']}{as_it_came}",
        str(row["n"]),
        f"{row['accuracy']:.1%}",
        f"{100 * low:.1f}–{100 * high:.1f}",
        "" if tokens is None else f"{tokens:,.1f}",
        f"{row['closed_traces']:.0%}",
    ]


def decoding(chosen: Chosen, step: Step | None) -> dict[str, Any]:
    """What lm-eval handed to a checkpoint with the questions: the task's settings with the recipe's over them."""
    if step is None:
        return {}
    recipe = step["reads"]["recipes"][RECIPE]
    given = dict(recipe.get("gen_kwargs") or {}) if isinstance(recipe.get("gen_kwargs"), Mapping) else {}
    for task in recipe["tasks"]:
        try:
            sample = next(asking.samples(chosen.folder(step) / asking.ANSWERS, task))
            given = sample["arguments"]["gen_args_0"].get("arg_1") or given
            break
        except (StageError, StopIteration, KeyError, OSError):
            continue
    return {key: value for key, value in given.items() if key != "until"}


def generation_config(parent: Parent) -> dict[str, Any]:
    """A checkpoint's own sampling, which fills in what it is not told; empty where it is not at hand."""
    file = parent.file("generation_config.json")
    found = (read_json(file) if file else None) or {}
    return {key: found[key] for key in ("do_sample", "temperature", "top_p", "top_k", "min_p") if key in found}


def prompts(chosen: Chosen) -> list[dict[str, Any]]:
    """Where the training prompts came from, and how many there are."""
    if not (asks := chosen.of_kind("generate")):
        return []
    step = asks[0]
    counts = _counts(chosen, step)
    where = sources(chosen, step)
    own = own_prompts(chosen)
    asked = chosen.noted["asked"]["prompts"]
    return [
        {
            "task": own or task,
            "digest": step["reads"]["files"].get("prompts.jsonl", "") if own else "",
            "hub": f"{asked[0]}, split train" if own and is_on_hub(asked[0]) else said_of(where.get(task, {})),
            "n": counts.get(task),
        }
        for task in step["reads"]["recipes"][RECIPE]["tasks"]
    ]


def own_prompts(chosen: Chosen) -> str:
    """The name of the user's own prompts: a hub data set's, or a file's without where it lies."""
    said = str(chosen.noted["asked"]["prompts"][0])
    return said if is_on_hub(said) else Path(said).name if is_source(said) else ""


def _counts(chosen: Chosen, step: Step) -> dict[str, int]:
    try:
        return asking.asked_tasks(chosen.folder(step) / asking.ANSWERS)
    except StageError:
        return {}


def sources(chosen: Chosen, step: Step | None) -> dict[str, dict[str, Any]]:
    """The hub's data sets that a stage's tasks ask, by task: path, name (of the config), split, whole."""
    if step is None:
        return {}
    left = sorted((chosen.folder(step) / asking.ANSWERS).glob("results_*.json"))
    results = (read_json(left[-1]) if left else None) or {}
    found = {}
    for task, config in (results.get("configs") or {}).items():
        kwargs = config.get("dataset_kwargs") or {}
        ours = kwargs.get("hub") or {}
        path = ours.get("path") or config.get("dataset_path")
        if isinstance(path, str) and path.count("/") == 1 and not path.startswith((".", "/")):
            counts = (results.get("n-samples") or {}).get(task) or {}
            found[task] = {
                "path": path,
                "name": ours.get("name") or config.get("dataset_name"),
                "split": ours.get("split") or config.get("test_split"),
                "revision": ours.get("revision") or kwargs.get("revision"),
                "whole": counts.get("original") == counts.get("effective") and not config.get("process_docs"),
            }
    return found


def said_of(source: Mapping[str, Any]) -> str:
    """A data set of the hub's in words; empty for what is none."""
    if not source:
        return ""
    config = f":{source['name']}" if source.get("name") else ""
    return f"{source['path']}{config}, split {source['split']}"


def labels(chosen: Chosen, step: Step) -> dict[str, Any]:
    """What one iteration had to learn from, and what of it was dropped."""
    record = chosen.store.record(step["key"]) or {"facts": {}}
    answers = next((s for s in chosen.line if step["reads"]["inputs"].get("labels", "").startswith(s["key"])), None)
    closed = ((chosen.store.record(answers["key"]) or {}).get("facts", {}) if answers else {}).get("labels", {})
    data = record["facts"].get("trace_stripping", {}).get("datasets", [])
    dropped: dict[str, int] = {}
    for one in data:
        for reason, count in one["dropped"].items():
            dropped[reason] = dropped.get(reason, 0) + count
    return {
        "iteration": step["iteration"],
        "closed": closed.get("closed"),
        "total": closed.get("total"),
        "rows": sum(one["rows"] for one in data),
        "kept": sum(one["kept"] for one in data),
        "dropped": ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none",
        "read": sum(one["tokens_read"] for one in data),
        "left": sum(one["tokens_kept"] for one in data),
    }


def stripping(distilled: Sequence[Step]) -> dict[str, Any]:
    """The rule by which traces were taken away; empty where nothing was learnt, or another plugin read the answers."""
    from thinkswitch_plugin.trace_stripping.args import PLUGIN, TraceStrippingConfig

    if not distilled:
        return {}
    recipe = distilled[-1]["reads"]["recipes"][RECIPE]
    if PLUGIN not in recipe.get("plugins", []):
        return {}
    block = TraceStrippingConfig.model_validate(recipe.get("trace_stripping") or {})
    return {"strip": block.strip, "tags": ["…".join(pair) for pair in block.tags], "most": block.max_dropped_fraction}


def quantised(step: Step) -> bool:
    """Whether a training had its base in NF4; Axolotl rounds the weights so, too, when it merges the adapter."""
    recipe = step["reads"]["recipes"][RECIPE]
    return bool(recipe.get("load_in_4bit")) or recipe.get("adapter") == "qlora"


def settings(step: Step, keys: Sequence[str]) -> dict[str, Any]:
    """Some settings of a stage's recipe, in that order."""
    recipe = step["reads"]["recipes"][RECIPE]
    return {key: recipe[key] for key in keys if recipe.get(key) is not None}


def merge(step: Step) -> dict[str, Any]:
    """How one thinking checkpoint was rebuilt."""
    recipe = step["reads"]["recipes"][RECIPE]
    t = (recipe.get("parameters") or {}).get("t")
    return {
        "iteration": step["iteration"],
        "method": recipe.get("merge_method"),
        "t": f"{t:g}" if isinstance(t, int | float) else json.dumps(t),
        "dtype": recipe.get("dtype") or recipe.get("out_dtype") or "",
    }


def choice(chosen: Chosen, step: Step, said: Sequence[Mapping[str, Any]]) -> str:
    """Which t of several went on, by what, and why; `said` is of results.json, which knows what is scored as well."""
    place = {"arm": step["arm"], "seed": step["seed"], "iteration": step["iteration"]}
    known = (one for one in said if place.items() <= one.items())
    facts = next(known, (chosen.store.record(step["key"]) or {}).get("facts", {}))
    by_labels = "labels" in step["reads"]["recipes"].get(RECIPE, {})
    by = "training prompts" if by_labels else "tasks of its own"
    return f"by {by}, iteration {step['iteration']}: {facts.get('why', 'it is not known why')}"


def contamination(chosen: Chosen) -> dict[str, int]:
    """How many test questions are word for word in the training prompts; empty where they cannot be read.

    A question counts as met if its text, letter case and spaces aside, is anywhere in a prompt's.
    """
    asks, tested = chosen.of_kind("generate"), chosen.find("evaluate_instruct")
    if not asks or tested is None:
        return {}
    try:
        trained = [_plain(asked_text(sample)) for sample in _samples(chosen, asks[0])]
        questions = [_plain(asked_text(sample)) for sample in _samples(chosen, tested)]
    except (StageError, KeyError, OSError):
        return {}
    every = "\n".join(trained)
    met = sum(bool(question) and question in every for question in questions)
    return {"prompts": len(trained), "questions": len(questions), "met": met}


def _samples(chosen: Chosen, step: Step) -> list[dict[str, Any]]:
    folder = chosen.folder(step) / asking.ANSWERS
    return [sample for task in asking.asked_tasks(folder) for sample in asking.samples(folder, task)]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def again(chosen: Chosen) -> list[str]:
    """The commands that make the checkpoint again."""
    who = chosen.who
    if who.run != chosen.base:
        return [f"ts-loop --config {AGAIN}/loop.yml", f"ts-loop dial {chosen.base} --t {who.arm.removeprefix('t=')}"]
    return [f"ts-loop --config {AGAIN}/loop.yml"]


def tested_on(chosen: Chosen, step: Step | None) -> str:
    """The day of an evaluation, as ISO 8601 writes it; empty if it was none."""
    from datetime import datetime, timezone

    mark = chosen.folder(step) / MARKER if step else None
    if mark is None or not mark.is_file():
        return ""
    return datetime.fromtimestamp(mark.stat().st_mtime, timezone.utc).date().isoformat()


def front_matter(chosen: Chosen, licensed: Licence, name: str, adapter_only: bool, facts: Mapping[str, Any]) -> Any:
    """The card's metadata, `model-index` among it. A local parent is no model of the hub's, and not named in it."""
    from huggingface_hub import EvalResult, ModelCardData

    thinking = chosen.who.checkpoint == "thinking"
    on_hub = [
        parent.name for parent in facts["parents"] if not parent.folder and (thinking or parent.role == "instruct")
    ]
    relation = "merge" if thinking else "adapter" if adapter_only else "finetune"
    trained_on = [p["hub"].partition(",")[0].partition(":")[0].partition("@")[0] for p in facts["prompts"] if p["hub"]]
    results = []
    for row in facts["rows"]:
        source = facts["sources"].get(row["task"], {})
        low, high = row["ci95"]
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=source.get("path") or row["task"],
                dataset_name=row["task"],
                dataset_config=source.get("name"),
                dataset_split=source.get("split"),
                dataset_revision=source.get("revision"),
                metric_type="accuracy",
                metric_value=round(row["accuracy"], 4),
                metric_name=f"accuracy (n = {row['n']}, 95 % interval {low:.3f} to {high:.3f})",
            )
        )
    related: dict[str, Any] = {"base_model": on_hub, "base_model_relation": relation} if on_hub else {}
    return ModelCardData(
        license=licensed.id,
        license_name=licensed.name,
        license_link=licensed.link,
        library_name="peft" if adapter_only else "transformers",
        pipeline_tag="text-generation",
        tags=["thinkswitch", *(["mergekit", "merge"] if thinking else ["distillation", "axolotl"])],
        datasets=list(dict.fromkeys(trained_on)) or None,
        model_name=name.rpartition("/")[2],
        eval_results=results or None,
        **related,
    )


def eval_result(row: Row, facts: Mapping[str, Any]) -> str | None:
    """A task's score as `.eval_results/*.yaml` holds it; None where its questions are no whole data set of the hub's.

    The hub shows it where that data set is one of its benchmarks (it has an `eval.yaml`); that names the tasks, and by
    the examples in the hub's documentation they are called as its configs are.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    source = facts["sources"].get(row["task"])
    if not source or not source["whole"] or not math.isfinite(row["accuracy"]):
        return None
    low, high = row["ci95"]
    entry = EvalResultEntry(
        dataset_id=source["path"],
        task_id=source["name"] or "default",
        value=round(100 * row["accuracy"], 2),
        dataset_revision=source["revision"],
        date=facts["date"] or None,
        notes=f"lm-eval {facts['tools'].get('lm_eval', '')} task {row['task']}, n = {row['n']}, 95 % interval "
        f"{100 * low:.1f} to {100 * high:.1f}",
    )
    return yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)
