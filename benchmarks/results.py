"""The tables and plots of docs/results.md and the README, rendered from the records in docs/results/.

    make results                     or: python benchmarks/results.py [--check]

What stands between `<!-- results: NAME -->` and `<!-- end -->` is a block: its numbers come from records and from
nowhere else, and rendering again changes nothing. What no record is there for yet is left as it is, and said. With
`--check` nothing is written, and the exit code says whether all is as it would be rendered. Knows what each benchmark's
figures are called; measures nothing.
"""

from __future__ import annotations

import io
import json
import re
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from record import FOLDER, ROOT

PAGES = ("README.md", "docs/results.md")
BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
Record = dict[str, Any]
Records = Mapping[str, Record]


class Missing(KeyError):
    """A record that is not there."""


class Kept(dict[str, Record]):
    """The records by name; one that is not there is `Missing`."""

    def __missing__(self, name: str) -> Record:
        raise Missing(name)


def records(folder: Path = FOLDER) -> Kept:
    """All that were kept."""
    files = sorted(folder.glob("*.json"))
    return Kept({file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files})


# --- how a number is written ---


def lines(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    body = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in body)


def spread(values: Sequence[float], digits: int = 2, most: float | None = None, least: float | None = None) -> str:
    """The median in bold, the least and the most of the rounds, and what the median was to be at most or at least."""
    middle = statistics.median(values)
    rounds = (
        f"{min(values):.{digits}f} to {max(values):.{digits}f}, {len(values)} rounds"
        if len(values) > 1
        else "one round"
    )
    said = f"**{middle:.{digits}f}** ({rounds}"
    for limit, word, kept in ((most, "most", middle <= (most or 0)), (least, "least", middle >= (least or 0))):
        if limit is not None:
            said += f"; at {word} {limit:.3g}{'' if kept else ': **missed**'}"
    return said + ")"


def percent(pair: Sequence[float], factor: float = 100.0) -> str:
    """A mean and its half-width."""
    return f"{factor * pair[0]:.1f} ± {factor * pair[1]:.1f} %"


def points(estimate: Mapping[str, float | None] | None) -> str:
    """A gain in points with its interval, empty where there is none."""
    if not estimate or estimate["value"] is None:
        return ""
    said = f"{100 * estimate['value']:+.1f}"
    if estimate["low"] is None or estimate["high"] is None:
        return minus(said)
    return minus(f"{said} ({100 * estimate['low']:+.1f} to {100 * estimate['high']:+.1f})")


def minus(text: str) -> str:
    """A minus as print has it."""
    return re.sub(r"-(?=\d)", "−", text)


def clock(seconds: float) -> str:
    """As a person says it."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def para(text: str) -> str:
    """Sentences, broken as the page's are; a number keeps its unit."""
    held = text.replace(" %", "\u00a0%")
    return textwrap.fill(held, 120, break_long_words=False, break_on_hyphens=False).replace("\u00a0", " ") + "\n"


def typed(*kept: Record) -> str:
    """The commands of records, as code."""
    return "".join(f"    {record['command'].removesuffix(' --record')}\n" for record in kept) + "\n"


def made(*kept: Record) -> str:
    """Of which commit, when and on what."""
    said = []
    for record in kept:
        on = record["machine"]
        machine = on["gpu"] or f"{on['cores']} cores of {on['cpu']}, {on['memory_gib']} GiB"
        busy = f", load {on['load']} at the start" if on.get("load") is not None else ""
        took = f", {clock(record['seconds'])}" if record["seconds"] else ""
        state = " and what was not committed" if record["dirty"] else ""
        by_hand = "; copied from this page as it was then" if record.get("transcribed") else ""
        said.append(f"{record['date']}, commit {record['commit'][:7]}{state}, {machine}{busy}{took}{by_hand}")
    return "\n" + "".join(f"*{line}.*\n\n" for line in dict.fromkeys(said)).rstrip("\n") + "\n"


# --- blocks ---


def scores(kept: Records) -> str:
    """What `make loop` ends in, as the terminal shows it."""
    from rich.console import Console

    from harness import view

    run = first_seed(kept["embedded_gains"])
    text = io.StringIO()
    Console(file=text, width=view.PLAIN_WIDTH, highlight=False).print(view.table(run["rows"]))
    return "\n" + "".join(f"    {line.rstrip()}\n" for line in text.getvalue().splitlines()) + "\n"


def verdict(kept: Records) -> str:
    """What it says of it."""
    return "\n" + "".join(f"    {line}\n" for line in first_seed(kept["embedded_gains"])["verdict"]) + "\n"


def first_seed(record: Record) -> Record:
    """The run of the first seed that was asked for."""
    found: Record = next(run for run in record["figures"].values() if "rows" in run)
    return found


def gains(record: Record) -> str:
    """Gains by seed: points, counts by iteration, the paired test; medians below."""
    runs = {seed: run for seed, run in record["figures"].items() if "rows" in run}
    places = list(dict.fromkeys((row["task"], row["checkpoint"]) for run in runs.values() for row in run["rows"]))
    places.sort(key=lambda place: (place[1], place[0]))
    all_gains: dict[tuple[str, str], list[float]] = {place: [] for place in places}
    rows = []
    for seed, run in runs.items():
        cells = [seed]
        tests = {(test["task"], test["after"]["checkpoint"]): test for test in run["gains"]}
        for place in places:
            mine = [row for row in run["rows"] if (row["task"], row["checkpoint"]) == place]
            mine.sort(key=lambda row: row["iteration"])
            test = tests[place]
            all_gains[place].append(100 * test["gain"]["value"])
            counts = ", ".join(f"{row['correct']:g}" for row in mine)
            cells.append(
                minus(f"{all_gains[place][-1]:+.1f}") + f" ({counts}); {test['gained']} gained, {test['lost']} lost, "
                f"p = {test['p_holm']:.2g}"
            )
        cells.append(f"{clock(run['seconds'])}, {run['made']} of {run['stages']} stages")
        rows.append(cells)
    middles = [
        f"**{statistics.median(found):+.1f}** ({min(found):+.1f} to {max(found):+.1f})" for found in all_gains.values()
    ]
    rows.append(["median", *map(minus, middles), ""])
    n = next(iter(runs.values()))["rows"][0]["n"]
    heads = ["seed", *(f"{checkpoint}, `{task}`" for task, checkpoint in places), "took, made"]
    said = "".join(typed(*({"command": run["command"]} for run in runs.values()), record))
    told = para(f"Points gained by the end, of {n} questions a task; in parentheses right answers by iteration.")
    after = ""
    if again := record["figures"].get("again"):
        each = f"{again['made']} of {again['stages']} stages run, {clock(again['seconds'])}."
        after = "\n" + para(f"The first of these again, under another name: {each}")
    return f"\n{said}{told}\n{lines(heads, rows)}{after}{made(record)}\n"


def arms(record: Record) -> str:
    """Every arm at its last iteration."""
    run = record["figures"]["arms"]
    parts = []
    pairs = list(dict.fromkeys((arm["checkpoint"], arm["task"]) for arm in run["arms"]))
    for checkpoint, task in sorted(pairs):
        rows = []
        for arm in run["arms"]:
            if (arm["checkpoint"], arm["task"]) != (checkpoint, task):
                continue
            mine, gain, beside = arm["accuracy"], arm["gain"], arm["beside"]
            low = "" if mine["low"] is None else f" ({100 * mine['low']:.1f} to {100 * mine['high']:.1f})"
            each = arm["tokens_per_answer"]
            rows.append(
                [
                    arm["arm"].replace("_", " "),
                    f"{100 * mine['value']:.1f} %{low}",
                    "" if each is None else f"{each:.1f}",
                    points(gain and gain["gain"]),
                    f"{gain['p_holm']:.2g}" if gain else "",
                    points(beside and beside["gain"]),
                    f"{beside['p_holm']:.2g}" if beside else "",
                    points(beside and beside["seeds"]),
                ]
            )
        heads = [
            f"{checkpoint}, `{task}`",
            "accuracy",
            "tokens",
            "over the pair",
            "p",
            "over thinkswitch",
            "p",
            "over seeds",
        ]
        parts.append(lines(heads, rows))
    n = run["rows"][0]["n"]
    told = para(
        f"{n} questions a task. Accuracy with Student's interval over seeds; points with intervals over questions and, "
        "last, over seeds; p corrected for all arms, tasks and checkpoints (Holm); tokens of an answer. What arms and "
        f"seeds share is done once: {run['steps']} steps are {run['stages']} stages, {run['made']} of them run here in "
        f"{clock(run['seconds'])}."
    )
    said = typed({"command": run["command"]}, record)
    return "\n" + said + told + "\n" + "\n".join(parts) + made(record) + "\n"


WANTED = 0.1  # of what was used, that a prediction may be off


def plan_memory(record: Record) -> str:
    rows = []
    for row in record["figures"]["rows"]:
        used = row["used"]
        each = f" ({', '.join(f'{one:,.0f}' for one in sorted(used))})" if len(used) > 1 else ""
        middle = f"{statistics.median(used):,.0f}{each}"
        off = minus(f"{100 * row['off']:+.0f} %")
        off = off if abs(row["off"]) <= WANTED else f"**{off}**"
        rows.append([row["checkpoint"], row["step"], f"{row['predicted']:,.0f}", middle, off])
    table = lines(["checkpoint", "step", "predicted", "used", "off"], rows)
    floor = record["figures"]["floor"]
    told = para(
        f"MiB; the median of several runs, each in parentheses; what a training holds before a model: {floor:,.0f}."
    )
    return "\n" + typed(record) + told + "\n" + table + made(record) + "\n"


def plan_table(record: Record) -> str:
    found = record["figures"]
    stages = list(next(iter(found["peaks"].values())))
    peaks = [[size, *(f"{peak / 1e9:.1f}" for peak in row.values())] for size, row in found["peaks"].items()]
    fits = []
    for size, row in found["peaks"].items():
        each = [[stage for stage, peak in row.items() if peak <= room] for room in found["cards"].values()]
        fits.append([size, *("all" if there == stages else "; ".join(there) or "none" for there in each)])
    plan = found["plan"]
    hours = {stage["name"]: (stage["seconds"] or 0) / 3600 for stage in plan["stages"]}
    tests = sum(value for name, value in hours.items() if name.startswith("evaluate"))
    notes = next(stage["notes"] for stage in plan["stages"] if stage["name"] == "generate")
    told = para(
        "The paper's setting, three iterations of the 4B pair on a card of 8 GB, at the recipes' ceiling: "
        f"{plan['total']['tokens'] / 1e6:.1f} million tokens, {plan['total']['seconds'] / 3600:.0f} h at 25 tokens a "
        f"second (stated, not measured), of which evaluations {tests:.0f} h, labels {hours['generate']:.0f} h "
        f"({'; '.join(notes)}), distilling {60 * hours['distill']:.0f} min. It leaves "
        f"{plan['total']['disk'] / 1e9:.0f} GB of checkpoints."
    )
    first = lines(["Qwen3", *stages], peaks)
    second = lines(["Qwen3", *(f"{card} GB" for card in found["cards"])], fits)
    return "\n" + typed(record) + first + "\n" + second + "\n" + told + made(record) + "\n"


def loop_overhead(record: Record) -> str:
    found = record["figures"]
    each = found["rounds"]
    rows = [
        ["`ts-loop` over bare commands", spread(each["ratio"], most=0.35)],
        ["`ts-loop`, s", spread(each["ts_loop_s"], 0)],
        ["bare commands, s", spread(each["bare_s"], 0)],
        ["imports, s", spread(each["preload_s"], 1)],
        ["while at least one tool is at work, s", spread(each["body_s"], 0)],
        ["the loop's own, s an iteration", spread(each["orchestration_s_per_iteration"])],
    ]
    return "\n" + typed(record) + lines([f"{found['iterations']} iterations", "median"], rows) + made(record) + "\n"


NAMES = {"ours": "ours", "trl": "TRL, not fused", "liger": "Liger", "liger_compiled": "Liger, compiled"}


def on_policy_loss(record: Record) -> str:
    found = record["figures"]
    rows = []
    for name, title in NAMES.items():
        cells = [title]
        for head in ("frozen", "trained"):
            mine = [one[name] for one in found["rounds"][head]]
            cells.append(f"{statistics.median(one['mb'] for one in mine):,.0f} MB")
            cells.append(f"{statistics.median(one['s'] for one in mine):.1f} s")
        rows.append(cells)
    bounds = {"frozen_mb_over_trl": 1 / 12, "frozen_s_over_trl": 1.0, "trained_mb_over_liger": 1.0}
    bounds["trained_s_over_liger"] = 1.0
    columns = [(f"{head}_{of}", 3 if of == "mb" else 2) for head in ("frozen", "trained") for of in ("mb", "s")]
    for title, peer in (("ours over TRL's", "trl"), ("ours over the better of Liger's", "liger")):
        keys = [(f"{column}_over_{peer}", digits) for column, digits in columns]
        rows.append([title, *(spread(found["ratios"][key], digits, bounds.get(key)) for key, digits in keys)])
    heads = ["", "frozen head: peak extra memory", "time", "trained head: memory", "time"]
    told = para(
        f"{found['tokens']} tokens, {found['vocabulary']:,} words, width {found['width']:,}, float32; medians of "
        f"{len(found['rounds']['frozen'])} rounds."
    )
    return "\n" + typed(record) + told + "\n" + lines(heads, rows) + made(record) + "\n"


def on_policy_step(kept: Records) -> str:
    rows, mine = [], []
    for adapter, title in (("qlora", "NF4"), ("lora", "float32")):
        for parts in (1, 4):
            record = kept[f"on_policy_step_{adapter}_{parts}"]
            mine.append(record)
            found = record["figures"]
            each = found["rounds"]
            took = ", ".join(f"{statistics.median(each[f'{side}_wall_ms']):.0f}" for side in ("ours", "trl"))
            size = f"{title}, {parts} of {found['batch'] // parts}"
            rows.append([size, spread(each["wall_ratio"], most=0.8), spread(each["cpu_ratio"]), took])
    heads = ["student, micro-batches", "ours over TRL's, by the clock", "by the processor", "ms a step: ours, TRL"]
    return "\n" + typed(*mine) + lines(heads, rows) + made(*mine) + "\n"


METHODS = {
    "answer_only": "answer-only distillation",
    "on_policy_jsd": "on-policy, teacher with its trace, JSD (β = 0.5)",
    "warm_jsd": "a third of the updates answer-only, then on-policy JSD",
    "on_policy_trace": "on-policy, teacher with its trace, reverse KL",
    "on_policy_forward": "on-policy, teacher with its trace, forward KL",
    "grpo": "GRPO, exact-match reward, 8 completions a prompt",
    "on_policy_plain": "on-policy, thinking teacher without a trace, reverse KL",
}


def sample_efficiency(kept: Records) -> str:
    long, short, few, one = (
        kept[f"sample_efficiency_{name}"] for name in ("150_1200", "16_1200", "150_256", "150_1200_one_seed")
    )
    found = long["figures"]

    def never(updates: Sequence[float | None]) -> str:
        return ", ".join("never" if one is None else f"{one:.0f}" for one in updates)

    rows = [
        [title, percent(found["final"][name]), never(found["updates_to_target"][name])]
        for name, title in METHODS.items()
        if name in found["final"]
    ]
    start = found["mean_low_high"]["grpo"]["0"][0]
    parts = [
        typed(long, short, few, one),
        "![accuracy by update](sample_efficiency.svg)\n\n",
        para(
            f"Held-out accuracy on `mini_math` ({100 * start:.1f} % at the start), mean, 95 % interval (Student's t) "
            f"over {found['seeds']} seeds, {found['prompts']:,} prompts."
        )
        + "\n",
        lines(
            [
                "method",
                f"after {found['updates']} updates",
                f"updates to {100 * found['target']:.1f} %, GRPO's, by seed",
            ],
            rows,
        ),
    ]
    brief = short["figures"]
    rows = [
        [
            METHODS[name],
            percent(brief["final"][name]),
            never(brief["grpo_is_there_after"][name]),
            f"**1/{ratio:.1f}**" if ratio else "never",
        ]
        for name, ratio in brief["ratio"].items()
    ]
    heads = [
        "method",
        f"after {brief['updates']} updates",
        "GRPO's curve is there after, by seed",
        "ratio of updates, mean",
    ]
    parts += [
        f"\nA schedule that ends after {brief['updates']} updates, with half of them warm-up:\n\n",
        lines(heads, rows),
    ]
    said = [f"{METHODS[name]} {percent(value)}" for name, value in few["figures"]["final"].items()]
    parts.append("\n" + para(f"With {few['figures']['prompts']} prompts: {'; '.join(said)}."))
    said = [f"{METHODS[name]} {100 * value[0]:.1f} %" for name, value in one["figures"]["final"].items()]
    parts.append("\n" + para(f"One seed, {one['figures']['updates']} updates, by divergence: {'; '.join(said)}."))
    return "\n" + "".join(parts) + made(long, short, few, one) + "\n"


def forgetting(record: Record) -> str:
    found = record["figures"]
    before = found["before"]
    rows = [["", "before", *(f"{100 * before[task]:.1f} %" for task in before)]]
    for seed, row in enumerate(found["seeds"]):
        cells = [f"{100 * row['tuned'][task]:.1f} → {100 * row['won'][task]:.1f} %" for task in before]
        rows.append([str(seed), "tuned → won back", *cells])
    missing, share = found["mini_math_points_missing"], found["mini_qa_gain_kept"]
    each = ", ".join(minus(f"{one:.1f}") for one in found["missing"])
    told = para(
        f"`mini_math` is **{missing[0]:.1f} ± {missing[1]:.1f} points** short of where it was ({each}; bound 2), and "
        f"`mini_qa` keeps **{percent(share)}** of its gain (bound 90 %). {found['questions']:,} held-out questions of "
        "each domain."
    )
    return "\n" + typed(record) + lines(["seed", "", *before], rows) + "\n" + told + made(record) + "\n"


def tah_parity(record: Record) -> str:
    found = dict(record["figures"])
    cases, differ, bound = (found.pop(key) for key in ("cases", "depths_that_differ", "bound"))
    table = lines(["largest error", "relative"], [[name, f"{value:.1e}"] for name, value in found.items()])
    by = record["versions"].get("reference", {})
    on = f"transformers {by.get('transformers')}, peft {by.get('peft')}"
    told = para(
        f"Against thu-nics/TaH at {str(by.get('thu-nics/TaH'))[:7]} ({on}): {cases} cases, {differ} depths differ; "
        f"bound {bound:.0e}."
    )
    return "\n" + typed(record) + told + "\n" + table + made(record) + "\n"


def tah_speed(record: Record) -> str:
    found = record["figures"]
    titles = {
        "decode_batch_1": ("4 layers × 128, batch 1", 1.5, None),
        "decode_batch_8": ("4 layers × 128, batch 8", 2, None),
        "decode_0.6b": ("a backbone of Qwen3-0.6B's shape, batch 1", 1, 1.15),
    }
    rows = [
        [
            f"decoding, {title}, {100 * found[name]['share']:.1f} % of tokens continue",
            f"{spread(found[name]['speedup_rounds'], least=least)} × its tokens a second",
            f"{spread(found[name]['over_backbone_rounds'], most=most)} × the time",
            f"{100 * found[name]['same_tokens']:.0f} %",
        ]
        for name, (title, least, most) in titles.items()
    ]
    step = found["training_step"]
    rows.append(
        [
            "stage-1 step, two layers of 1,024 with 151,936 words, 2 × 256 tokens",
            f"{spread(step['over_reference_rounds'], most=0.7)} × its time",
            "",
            f"losses to {step['loss_error']:.0e}",
        ]
    )
    table = lines(["", "against the authors' code", "against the plain backbone", "the same words"], rows)
    cost = found["cost_by_share"]
    shares = list(zip(cost["share"], cost["rounds"], strict=True))
    heads = ["share that continue, 0.6B shape, batch 1", *(f"{100 * share:.1f} %" for share in cost["share"])]
    costs = lines(
        heads, [["time over the backbone's", *(spread(each, 3, None if share else 1.05) for share, each in shares)]]
    )
    by = record["versions"].get("reference", {})
    told = para(f"thu-nics/TaH at {str(by.get('thu-nics/TaH'))[:7]}, threads: {found['threads']}, float32.") + "\n"
    plot = "\n![cost of a token by the share that continue](tah_cost.svg)\n\n"
    return "\n" + typed(record) + told + table + plot + costs + made(record) + "\n"


def tah_quality(record: Record) -> str:
    found = record["figures"]
    titles = {
        "base": "the backbone all start from",
        "single": "single pass",
        "always": "always twice",
        "learned": "Think-at-Hard, learned decider",
        "oracle": "Think-at-Hard, the labels instead of the decider",
    }
    rows = []
    for name, title in titles.items():
        each = [f"{100 * seed[name]['accuracy']:.1f} %" for seed in found["seeds"]]
        passes = found["passes"][name]
        reads = f"{passes[0]:.3f} ± {passes[1]:.3f}" if passes[1] else f"{passes[0]:g}"
        rows.append([title, *each, percent(found["accuracy"][name], 1), reads])
    over = {
        key: minus(f"{found[key][0]:+.1f} ± {found[key][1]:.1f}")
        for key in ("learned_over_single", "learned_over_always")
    }
    told = (
        f"Paired by seed the learned decider is **{over['learned_over_single']} points over a single pass (aim: +4)** "
        f"and **{over['learned_over_always']} over always twice (aim: +8)**. "
    )
    if "recall" in found["seeds"][0]["learned"]:
        finds, right = (
            [f"{100 * seed['learned'][of]:.0f}" for seed in found["seeds"]] for of in ("recall", "precision")
        )
        told += (
            f"The decider finds {', '.join(finds)} % of the hard tokens; of what it sends on {', '.join(right)} % are."
        )
    seeds = [f"seed {number}" for number in range(len(found["seeds"]))]
    heads = ["", *seeds, "mean", "passes a token"]
    size = para(
        f"Exact match on {found['problems']:,} held-out problems; {found['base_updates']:,} updates of the backbone, "
        f"{found['updates']:,} of every arm; mean ± 95 % interval (t)."
    )
    return "\n" + typed(record) + size + "\n" + lines(heads, rows) + "\n" + para(told) + made(record) + "\n"


def of(name: str, render: Callable[[Record], str]) -> Callable[[Records], str]:
    """A block of one record."""
    return lambda kept: render(kept[name])


BLOCKS: dict[str, Callable[[Records], str]] = {
    "scores": scores,
    "verdict": verdict,
    "embedded_gains": of("embedded_gains", gains),
    "embedded_on_policy": of("embedded_on_policy", gains),
    "embedded_arms": of("embedded_arms", arms),
    "embedded_other": of("embedded_other", gains),
    "plan_memory": of("plan_memory", plan_memory),
    "plan_table": of("plan_table", plan_table),
    "loop_overhead": of("loop_overhead", loop_overhead),
    "on_policy_loss": of("on_policy_loss", on_policy_loss),
    "on_policy_step": on_policy_step,
    "sample_efficiency": sample_efficiency,
    "forgetting": of("forgetting", forgetting),
    "tah_parity": of("tah_parity", tah_parity),
    "tah_speed": of("tah_speed", tah_speed),
    "tah_quality": of("tah_quality", tah_quality),
}


# --- plots ---


def drawn(draw: Callable[[Any], None], size: tuple[float, float]) -> str:
    """An SVG that is the same whenever it is drawn."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "results", "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(figsize=size)
        draw(axes)
        text = io.StringIO()
        figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
        pyplot.close(figure)
    return "".join(line.rstrip() + "\n" for line in text.getvalue().splitlines())


def curves(kept: Records) -> str:
    """Accuracy by update, the mean with the range over seeds."""
    found = kept["sample_efficiency_150_1200"]["figures"]["mean_low_high"]

    def draw(axes: Any) -> None:
        for name, by_step in found.items():
            steps = sorted(map(int, by_step))
            mean, low, high = zip(*(by_step[str(step)] for step in steps), strict=True)
            (line,) = axes.plot(steps, mean, marker="o", ms=3, label=name)
            axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15)
        axes.set(xlabel="updates of 64 sequences", ylabel="accuracy on mini_math, held out")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)

    return drawn(draw, (7, 4.2))


def cost(kept: Records) -> str:
    """The cost of a token against the share that continue, with the line that counts passes."""
    found = kept["tah_speed"]["figures"]["cost_by_share"]

    def draw(axes: Any) -> None:
        middle = found["over_backbone"]
        low = [value - min(each) for value, each in zip(middle, found["rounds"], strict=True)]
        high = [max(each) - value for value, each in zip(middle, found["rounds"], strict=True)]
        axes.plot([0, 1], [1, 2], color="0.7", label="1 + share: one backbone pass each")
        axes.errorbar(
            found["share"], middle, yerr=[low, high], fmt="o-", capsize=3, label="measured, median and spread"
        )
        axes.set(xlabel="share of tokens that continue", ylabel="time a token over the backbone's")
        axes.legend(frameon=False)

    return drawn(draw, (5, 3.4))


PLOTS = {"docs/sample_efficiency.svg": curves, "docs/tah_cost.svg": cost}


def rendered(text: str, kept: Records) -> tuple[str, list[str]]:
    """A page with its blocks rendered, and what was left as it is: "BLOCK: no docs/results/NAME.json"."""
    left = []

    def block(found: re.Match[str]) -> str:
        try:
            return found[1] + BLOCKS[found[2]](kept) + found[3]
        except Missing as missing:
            left.append(f"{found[2]}: no docs/results/{missing.args[0]}.json")
            return found[0]

    return BLOCK.sub(block, text), left


def everything(kept: Records, root: Path = ROOT) -> tuple[dict[str, str], list[str]]:
    """Each page and plot as it should be, by its path, and what there is no record for."""
    texts, missing = {}, []
    for page in PAGES:
        texts[page], left = rendered((root / page).read_text(encoding="utf-8"), kept)
        missing += left
    for name, plot in PLOTS.items():
        try:
            texts[name] = plot(kept)
        except Missing as lacks:
            missing.append(f"{name}: no docs/results/{lacks.args[0]}.json")
    return texts, missing


def main() -> None:
    check = sys.argv[1:] == ["--check"]
    texts, missing = everything(records())
    other = [name for name, text in texts.items() if (ROOT / name).read_text(encoding="utf-8") != text]
    for name in other:
        print(f"{name}: {'is not as rendered; run make results' if check else 'rendered'}")
        if not check:
            (ROOT / name).write_text(texts[name], encoding="utf-8")
    for line in missing:
        print(f"left as it is: {line}")
    raise SystemExit(check and bool(other))


if __name__ == "__main__":
    main()
