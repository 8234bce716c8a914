"""What a person sees at the terminal: lines, the live view, the closing tables."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_runs import a_run, finished, printed, row
from rich.console import Console
from tqdm import tqdm

from harness import runner
from harness.config import LoopConfig
from harness.loop import Run
from harness.plan import Step
from harness.stages import Stage, reconstruct
from harness.stats import interval
from harness.view import (
    SLOW_BYTES,
    View,
    by_kind,
    change,
    choice_cells,
    choices,
    clock,
    kind_table,
    pass_cells,
    table,
)

ROWS = [
    row(0, "instruct", "mini_math", 70),
    row(0, "thinking", "mini_math", 180),
    row(1, "instruct", "mini_math", 121),
    row(1, "thinking", "mini_math", 176),
    row(0, "instruct", "mini_qa", 100),
    row(1, "instruct", "mini_qa", 100),
]


# --- the table of scores ---


def lines_of(text: str) -> dict[tuple[str, str], list[str]]:
    """The cells of each row, by task and checkpoint."""
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    return {(line[0], line[1]): line for line in cells}


def test_a_row_is_a_checkpoint_on_a_task_and_a_column_an_iteration() -> None:
    text = printed(table(ROWS))
    heads = re.findall(r"[\w%][\w% ]*\w|\d", next(line for line in text.splitlines() if "task" in line))
    assert heads == ["task", "checkpoint", "questions", "0", "1", "change", "95 % interval", "tokens", "closed"]
    low, high = interval([1.0] * 121 + [0.0] * 79)
    lines = lines_of(text)
    assert list(lines) == [("mini_math", "instruct"), ("mini_math", "thinking"), ("mini_qa", "instruct")]
    interval_said = f"{100 * low:.1f}–{100 * high:.1f}"
    assert lines["mini_math", "instruct"][2:] == ["200", "35.0%", "60.5%", "+25.5", interval_said, "9.5", "0%"]
    thinking = lines["mini_math", "thinking"]
    assert thinking[3:6] == ["90.0%", "88.0%", "-2.0"]
    assert thinking[7:] == ["", "98%"]  # nobody counted its tokens
    assert lines["mini_qa", "instruct"][3:6] == ["50.0%", "50.0%", "+0.0"]


def test_iteration_0_alone_has_not_changed() -> None:
    assert lines_of(printed(table(ROWS[:2])))["mini_math", "instruct"][3:5] == ["35.0%", ""]


def test_an_iteration_that_is_not_tested_yet_is_left_blank() -> None:
    lines = lines_of(printed(table([*ROWS[:3], row(2, "instruct", "mini_math", 130)])))
    assert lines["mini_math", "instruct"][3:7] == ["35.0%", "60.5%", "65.0%", "+30.0"]
    assert lines["mini_math", "thinking"][3:7] == ["90.0%", "", "", ""]


def test_the_table_holds_for_many_iterations_and_for_none() -> None:
    many = [row(k, "instruct", "mini_math", 70 + k) for k in range(9)]
    assert lines_of(printed(table(many)))["mini_math", "instruct"][3] == "35.0%"
    assert "checkpoint" in printed(table([]))


def test_better_is_green_and_worse_is_red() -> None:
    console = Console(file=io.StringIO(), width=160, force_terminal=True, color_system="standard")
    console.print(table(ROWS))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"\x1b\[32m *\+25\.5", text)
    assert re.search(r"\x1b\[31m *-2\.0", text)
    assert not re.search(r"\x1b\[\d+m *\+0\.0", text)


def test_a_change_is_in_points_since_iteration_0_of_the_same_checkpoint_and_task() -> None:
    assert change(ROWS[2], ROWS) == pytest.approx(25.5)
    assert change(ROWS[0], ROWS) is None
    assert change(row(1, "thinking", "mini_qa", 5), ROWS) is None  # it has no beginning to compare with


def test_passes_are_shown_of_tah_checkpoints_alone() -> None:
    passes = {"mean_depth": 1.0625, "skip_rate": 0.9375, "flops_per_token": 2.5e6}
    passes |= {"flops_per_token_single": 2e6, "flops_per_token_always": 5e6}
    assert pass_cells(ROWS) == []
    assert pass_cells([ROWS[0], row(0, "thinking", "mini_qa", 1, **passes)]) == [
        ["0", "thinking", "mini_qa", "1.062", "93.8%", "2.50", "1.25", "0.50"]
    ]


# --- where the time went ---


@pytest.fixture
def run(shipped: LoopConfig, tmp_path: Path) -> Run:
    """A run of one iteration, of which nothing is done."""
    return a_run(shipped.model_copy(update={"iterations": 1, "name": "mine"}), tmp_path)


def place(run: Run, iteration: int, name: str) -> Step:
    return next(step for step in run.steps if (step.iteration, step.name) == (iteration, name))


def key_of(run: Run, iteration: int, name: str) -> str:
    return run.keys[place(run, iteration, name).stage]


def done(run: Run, iteration: int, name: str, **facts: Any) -> dict[str, Any]:
    key = key_of(run, iteration, name)
    finished(run.store, key, {"log.txt": b""}, **{"made_by": "mine", "wall_s": 3.25, **facts})
    record = run.store.record(key)
    assert record
    return record


def test_time_is_summed_up_by_kind_and_a_stage_of_two_steps_counts_once(run: Run) -> None:
    records = [
        done(run, 0, "evaluate_instruct", wall_s=2.0, cpu_s=3.0, peak_memory_mb=700),
        done(run, 0, "evaluate_thinking", wall_s=4.0, cpu_s=5.0, peak_memory_mb=900),
        done(run, 1, "distill", wall_s=1.0, cpu_s=1.0, peak_memory_mb=100),
    ]
    twice = [records[0], *records]
    assert by_kind(twice) == [("evaluate", 2, 6.0, 8.0, 900), ("distill", 1, 1.0, 1.0, 100)]
    assert by_kind([]) == []
    assert "6.0" in printed(kind_table(twice))


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (60, "1 min 00 s"), (3599.6, "60 min 00 s")],
)
def test_a_clock_a_person_reads(seconds: float, said: str) -> None:
    assert clock(seconds) == said


# --- lines, where nobody watches ---


def plain(**options: Any) -> View:
    return View(Console(file=io.StringIO(), width=80, highlight=False), **options)


def text_of(view: View) -> str:
    return view.console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def todo_of(run: Run) -> dict[str, Stage]:
    return {run.keys[step.stage]: step.stage for step in run.steps}


def tell(view: View, run: Run) -> None:
    """One evaluation from beginning to end."""
    view.begin(run, todo_of(run))
    step = place(run, 1, "evaluate_instruct")
    view.command(run.keys[step.stage], step.stage, 0, ["lm_eval", "run", "--config", "x"])
    view.progress(run.keys[step.stage], step.stage, runner.Progress("", 3, 10))
    view.finished(step, done(run, 1, "evaluate_instruct"), ROWS[2:3])


def test_a_line_for_each_event_and_nothing_a_log_cannot_hold(run: Run) -> None:
    view = plain()
    tell(view, run)
    lines = text_of(view).splitlines()
    assert lines[0] == f"new run in {run.folder.root}"
    assert lines[1] == "iteration 1/1  evaluate instruct: instruct is tested  lm_eval"
    assert re.fullmatch(r"iteration 1/1  evaluate instruct\s+3\.2 s  mini_math 60\.5%", lines[2])
    assert len(lines) == 3
    assert "\x1b" not in text_of(view)
    assert view.live is None


def test_a_long_line_is_not_broken(run: Run) -> None:
    view = plain()
    view.say("x" * 500)
    view.say("[not] a [markup]")
    assert text_of(view).splitlines() == ["x" * 500, "[not] a [markup]"]


def test_verbose_shows_each_native_command(run: Run) -> None:
    view = plain(verbose=True)
    tell(view, run)
    assert "\n$ lm_eval run --config x\n" in text_of(view)
    view.verifying("distill-01")
    assert text_of(view).endswith("comparing distill-01\n")


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_shows_the_scores_and_nothing_else(run: Run, terminal: bool) -> None:
    console = Console(file=io.StringIO(), width=140, highlight=False, force_terminal=terminal)
    view = View(console, quiet=True, verbose=True)
    run.causes = ["distill: seed 42 → 7"]
    tell(view, run)
    view.preloading(True)
    view.elsewhere(key_of(run, 1, "distill"))
    view.hashing("model.safetensors", SLOW_BYTES, SLOW_BYTES)
    assert text_of(view) == ""
    assert view.live is None
    view.end(run, {"rows": ROWS, "verdict": ["instruct is better"], "wall_s": 65.0, "cost_usd": None})
    assert "60.5%" in text_of(view)
    assert "time by stage" not in text_of(view)
    assert str(run.folder.root) not in text_of(view)


def test_the_end_has_scores_times_cost_and_where_to_look(run: Run) -> None:
    view = plain()
    done(run, 1, "distill")
    view.end(run, {"rows": ROWS, "verdict": ["instruct is better"], "wall_s": 65.0, "cost_usd": 0.02})
    text = text_of(view)
    assert (
        text.index("scores")
        < text.index("instruct is better")
        < text.index("time by stage")
        < text.index("1 min 05 s, 0.02 US dollars in all")
    )
    assert f"checkpoints, logs and scores: {run.folder.root}" in text
    assert f"to look at: {run.folder.report}" in text
    assert "TaH" not in text


def test_the_end_without_a_price_names_none(run: Run) -> None:
    view = plain()
    view.end(run, {"rows": [], "verdict": [], "wall_s": 5.0, "cost_usd": None})
    assert "\n5 s in all\n" in text_of(view)


def test_a_run_that_goes_on_says_how_much_is_done(run: Run) -> None:
    view = plain()
    todo = todo_of(run)
    del todo[key_of(run, 0, "evaluate_instruct")]
    view.begin(run, todo)
    assert text_of(view) == f"continuing {run.folder.root}: 1 of {len(run.steps)} stages are done\n"


def test_a_run_that_changed_says_what_and_how_much_runs_again(run: Run) -> None:
    view = plain()
    run.causes = ["distill: learning_rate 0.002 → 0.001"]
    view.begin(run, dict(list(todo_of(run).items())[3:]))
    assert text_of(view).splitlines() == [
        "distill: learning_rate 0.002 → 0.001",
        f"{len(run.steps) - 3} of {len(run.steps)} stages are to be run",
    ]


def test_what_another_run_made_is_said_to_be_reused(run: Run) -> None:
    view = plain()
    todo = todo_of(run)
    begun = len(todo)
    del todo[key_of(run, 0, "evaluate_instruct")]
    view.begin(run, todo)
    view.finished(place(run, 0, "evaluate_instruct"), done(run, 0, "evaluate_instruct", made_by="other"), ROWS[:1])
    # While this run waited, another one left it.
    labels = {"labels": {"closed": 9, "total": 10}}
    view.finished(place(run, 1, "generate"), done(run, 1, "generate", made_by="other", facts=labels), [])
    first, second = text_of(view).splitlines()[1:]
    assert re.fullmatch(r"iteration 0/1  evaluate instruct\s+reused  mini_math 35\.0%  \(made by other\)", first)
    closed = "9 of 10 answers closed their trace"
    assert re.fullmatch(rf"iteration 1/1  generate\s+reused  {closed}  \(made by other\)", second)
    assert view.done == 2
    assert view.stages == begun


def test_what_this_run_made_before_is_not_said_again(run: Run) -> None:
    view = plain()
    todo = todo_of(run)
    del todo[key_of(run, 1, "generate")]
    view.begin(run, todo)
    before = text_of(view)
    view.finished(place(run, 1, "generate"), done(run, 1, "generate", facts={"labels": {"closed": 1, "total": 1}}), [])
    assert text_of(view) == before


def test_waiting_for_another_process_is_said_once(run: Run) -> None:
    view = plain()
    view.begin(run, todo_of(run))
    key, step = key_of(run, 1, "distill"), place(run, 1, "distill")
    for _ in range(3):
        view.elsewhere(key)
    said = "distill: another ts-loop is at it; waiting for what it leaves"
    assert text_of(view).splitlines()[1:] == [said]
    view.command(key, step.stage, 0, ["axolotl", "train"])
    view.elsewhere(key)  # and later again
    assert text_of(view).splitlines().count(said) == 2


def test_a_stage_of_several_commands_says_which_one_runs(run: Run) -> None:
    view = plain()
    view.begin(run, todo_of(run))
    step = place(run, 1, "distill")
    for number, command in enumerate(step.stage.commands):
        view.command(run.keys[step.stage], step.stage, number, command)
    assert text_of(view).splitlines()[1:] == [
        "iteration 1/1  distill (1/2): instruct learns the answers  axolotl",
        "iteration 1/1  distill (2/2): instruct learns the answers  axolotl",
    ]
    view.command(run.keys[step.stage], step.stage, 0, ["python", "-m", "harness.grading", "x"])
    assert text_of(view).endswith("python -m harness.grading\n")


def test_only_a_file_that_takes_long_to_read_is_named(run: Run) -> None:
    view = plain()
    view.hashing("config.json", 10, 10)
    assert text_of(view) == ""
    for done_bytes in (SLOW_BYTES // 2, SLOW_BYTES):
        view.hashing("model.safetensors", done_bytes, SLOW_BYTES)
    assert text_of(view) == "reading model.safetensors\n"
    assert not view.running


# --- live, on a terminal ---


@pytest.fixture
def watched_run(run: Run) -> Any:
    """A live view of a run that has begun, and the run."""
    view = View(Console(file=io.StringIO(), width=160, force_terminal=True, highlight=False))
    view.begin(run, todo_of(run))
    yield view, run
    view.close()


def picture(view: View) -> str:
    assert view.live is not None
    return printed(view.live.get_renderable())


def begin(view: View, run: Run, iteration: int, name: str) -> tuple[str, Stage]:
    step = place(run, iteration, name)
    view.command(run.keys[step.stage], step.stage, 0, step.stage.commands[0])
    return run.keys[step.stage], step.stage


# What bars are called in the logs of lm-eval 0.4.11, Axolotl 0.19.0 and mergekit 0.1.5, and what they count.
PHASES = [
    ("generate", "Loading weights", "weights loaded"),
    ("generate", "", "questions written out"),
    ("generate", "Running generate_until requests", "questions answered"),
    ("evaluate_thinking", "", "questions written out"),
    ("evaluate_thinking", "Running generate_until requests", "questions answered"),
    ("distill", "Stripping traces", "rows stripped"),
    ("distill", "Tokenizing Prompts", "rows tokenised"),
    ("distill", "Dropping Invalid Sequences (<None or >256) (num_proc=1)", "rows filtered"),
    ("distill", "Saving the dataset (1/1 shards)", "rows saved"),
    ("distill", "Map (num_proc=2)", "Map (num_proc=2)"),  # whatever else comes keeps its own name
    ("distill", "", "steps trained"),
    ("reconstruct", "Warmup loader cache", reconstruct.PHASES["Warmup"]),
    ("reconstruct", "Executing graph", reconstruct.PHASES["Executing"]),
]


def drawn(name: str, done_so_far: int, total: int) -> str:
    """A bar as tqdm draws it anew."""
    return "\r" + tqdm.format_meter(done_so_far, total, elapsed=1.5, prefix=f"{name}: " if name else "", ncols=None)


@pytest.mark.parametrize(("name", "called", "said"), PHASES)
def test_the_bar_says_what_it_counts(
    watched_run: tuple[View, Run], tmp_path: Path, name: str, called: str, said: str
) -> None:
    view, run = watched_run
    key, stage = begin(view, run, 1, name)
    log = tmp_path / "log.txt"
    bars = [drawn("Another", 7, 7), "\n[INFO] done with that\n", drawn(called, 0, 80), drawn(called, 42, 80)]
    log.write_text(f"$ tool recipe.yml\n{''.join(bars)}")
    now = runner.progress(log, 0)
    assert now is not None
    view.progress(key, stage, now)
    (shown,) = [text for text in picture(view).splitlines() if "42/80" in text]
    assert said in shown
    assert name.replace("_", " ") in shown
    assert "7/7" not in picture(view)


def test_the_phases_of_one_command_follow_each_other_on_one_bar(watched_run: tuple[View, Run], tmp_path: Path) -> None:
    view, run = watched_run
    key, stage = begin(view, run, 1, "distill")
    log = tmp_path / "log.txt"
    seen = []
    with log.open("a") as file:
        for number, called, said in [(n, *phase[1:]) for n, phase in enumerate(PHASES) if phase[0] == "distill"]:
            file.write(f"{drawn(called, number, 100)}{drawn(called, 100, 100)}\n{drawn(called, number, 100)}")
            file.flush()
            now = runner.progress(log, 0)
            assert now is not None
            view.progress(key, stage, now)
            (line,) = [text for text in picture(view).splitlines() if f"{number}/100" in text]
            seen.append(said in line)
    assert all(seen)
    assert len(seen) == 6


def test_stages_side_by_side_have_a_bar_each(watched_run: tuple[View, Run]) -> None:
    view, run = watched_run
    key, stage = begin(view, run, 0, "evaluate_instruct")
    other, other_stage = begin(view, run, 1, "generate")
    view.progress(key, stage, runner.Progress("Running generate_until requests", 3, 10))
    view.progress(other, other_stage, runner.Progress("Running generate_until requests", 5, 20))
    text = picture(view)
    assert "3/10" in next(line for line in text.splitlines() if "evaluate instruct" in line)
    assert "5/20" in next(line for line in text.splitlines() if "generate:" in line)
    view.finished(place(run, 1, "generate"), done(run, 1, "generate", facts={"labels": {"closed": 9, "total": 9}}), [])
    text = picture(view)
    assert "3/10" in text
    assert "5/20" not in text
    assert "9 of 9 answers closed their trace" in text_of(view)


def test_the_picture_says_how_far_the_run_is_and_how_it_goes(watched_run: tuple[View, Run]) -> None:
    view, run = watched_run
    assert f"stage 1 of {len(run.steps)}" in picture(view)
    assert "scores so far" not in picture(view)
    begin(view, run, 1, "evaluate_instruct")
    view.finished(place(run, 1, "evaluate_instruct"), done(run, 1, "evaluate_instruct"), ROWS[2:3])
    assert f"stage 2 of {len(run.steps)}" in picture(view)
    assert "scores so far" in picture(view)
    assert "60.5%" in picture(view)


def test_the_time_so_far_goes_on_while_a_stage_runs(watched_run: tuple[View, Run]) -> None:
    view, run = watched_run
    begin(view, run, 1, "distill")
    view.begun -= 3600
    assert "60 min 0" in picture(view)


def test_a_new_command_begins_a_new_bar(watched_run: tuple[View, Run]) -> None:
    view, run = watched_run
    key, stage = begin(view, run, 1, "distill")
    view.progress(key, stage, runner.Progress("", 4, 4))
    view.command(key, stage, 1, stage.commands[1])
    assert "4/4" not in picture(view)
    assert "(2/2)" in picture(view)


def test_the_imports_have_a_bar_until_the_first_command(watched_run: tuple[View, Run]) -> None:
    view, run = watched_run
    view.preloading(True)
    assert "importing" in picture(view)
    begin(view, run, 1, "generate")
    assert "importing" not in picture(view)
    view.preloading(False)
    assert "importing" not in picture(view)


def test_a_bar_of_a_stage_that_ended_moves_nothing(watched_run: tuple[View, Run]) -> None:
    view, run = watched_run
    key, stage = begin(view, run, 1, "distill")
    view.finished(place(run, 1, "distill"), done(run, 1, "distill"), [])
    view.progress(key, stage, runner.Progress("", 3, 10))  # a last look at its log
    assert "3/10" not in picture(view)


def test_the_live_view_is_gone_when_it_is_closed(watched_run: tuple[View, Run]) -> None:
    view, run = watched_run
    view.close()
    assert view.live is None
    view.close()
    view.end(run, {"rows": ROWS, "verdict": ["instruct is better"], "wall_s": 65.0, "cost_usd": None})
    assert "60.5%" in text_of(view)


def test_which_t_was_chosen_is_said_with_its_reason_at_the_end(run: Run) -> None:
    view = plain()
    about = {"arm": "thinkswitch", "seed": 42, "iteration": 1}
    chosen = [{**about, "why": "t = 0.1, and why"}, {**about, "seed": 43, "why": "t = 0, for once"}]
    view.end(run, {"rows": ROWS, "verdict": [], "wall_s": 1.0, "cost_usd": None, "chosen": chosen})
    said = text_of(view)
    assert "iteration 1 (thinkswitch, seed 42): t = 0.1, and why" in said
    assert "iteration 1 (thinkswitch, seed 43): t = 0, for once" in said
    assert choices(chosen[:1]) == ["iteration 1: t = 0.1, and why"]


def test_what_was_tried_is_a_row_a_t() -> None:
    tried = [{"t": 0.0, "closed": 1.0, "agreement": 0.8, "passes": True}]
    tried += [{"t": 0.1, "closed": 0.5, "agreement": 0.2, "passes": False}]
    assert choice_cells([{"iteration": 2, "t": 0.0, "candidates": tried}]) == [
        ["2", "0", "100.0%", "80.0%", "", "chosen"],
        ["2", "0.1", "50.0%", "20.0%", "", "falls short"],
    ]
    scored = [{"t": t, "accuracy": {"a": 0.5, "b": 0.25}, "passes": t == 0.5} for t in (0.0, 0.5)]
    cells = choice_cells([{"iteration": 1, "t": 0.5, "candidates": scored}])
    assert cells[1] == ["1", "0.5", "", "", "a 50.0%, b 25.0%", "chosen"]


def test_nothing_left_to_do_needs_no_live_view(run: Run) -> None:
    view = View(Console(file=io.StringIO(), width=140, force_terminal=True))
    view.begin(run, {})
    assert view.live is None


def test_two_steps_of_one_stage_are_one_stage(run: Run) -> None:
    """The same checkpoint twice: what is tested once is counted once."""
    twin = replace(place(run, 0, "evaluate_instruct").stage)
    steps = [step._replace(stage=twin) if step.name == "evaluate_thinking" else step for step in run.steps[:2]]
    run = Run(run.config, run.folder, run.store, steps, steps, run.keys, run.pair)
    view = plain()
    view.begin(run, todo_of(run))
    assert view.stages == 1
    record = done(run, 0, "evaluate_instruct")
    for step in steps:
        view.finished(step, record, [])
    assert view.done == 1
