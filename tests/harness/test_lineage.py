"""Which checkpoint of a run is meant, and what it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from exported import COMMIT, INSTRUCT, OTHER, THINKING, made_up

from harness import lineage
from harness.config import LoopConfig
from harness.errors import LoopError
from harness.rundir import RunDir
from harness.store import Store


def steps(chosen: lineage.Chosen) -> list[tuple[int, str]]:
    return [(step["iteration"], step["name"]) for step in chosen.line]


@pytest.fixture(scope="module")
def made(shipped: LoopConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run of a pair of the hub's is, which no test writes to."""
    out = tmp_path_factory.mktemp("made")
    made_up(shipped, out)
    return out


def test_the_last_one_that_is_made_with_all_that_it_came_from(made: Path) -> None:
    chosen = lineage.choose(made, "mine")
    assert str(chosen.who) == "mine:instruct@2"
    whole = [(1, "generate"), (1, "distill"), (1, "reconstruct"), (2, "generate"), (2, "distill")]
    assert sorted(steps(chosen)) == sorted(whole)
    assert steps(chosen)[-1] == (2, "distill")
    assert steps(lineage.choose(made, "mine:instruct@1")) == [(1, "generate"), (1, "distill")]
    thinking = lineage.choose(made, "mine:thinking@2")
    assert steps(thinking)[-1] == (2, "reconstruct")
    assert set(steps(thinking)) == {*whole, (2, "reconstruct")}
    assert chosen.missing == thinking.missing == ["iter_02/evaluate_thinking"]


def test_an_evaluation_is_that_of_the_checkpoint(made: Path) -> None:
    for name, where in (("mine:instruct@1", (1, "evaluate_instruct")), ("mine:thinking@2", (2, "evaluate_thinking"))):
        evaluation = lineage.choose(made, name).evaluation
        assert evaluation is not None
        assert (evaluation["iteration"], evaluation["name"]) == where


def test_parents_are_the_pair_as_it_came(shipped: LoopConfig, made: Path, tmp_path: Path) -> None:
    chosen = lineage.choose(made, "mine")
    assert chosen.parent("instruct") == ("instruct", INSTRUCT, COMMIT, "", None)
    assert chosen.parent("thinking") == ("thinking", THINKING, OTHER, "", None)
    assert chosen.parent("thinking").spec == f"{THINKING}@{OTHER}"
    made_up(shipped, tmp_path, name="local", instruct="/home/me/my_instruct")
    parent = lineage.choose(tmp_path, "local").parent("instruct")
    assert (parent.name, parent.digest, parent.spec) == ("my_instruct", "identity of instruct", "./my_instruct")


def test_an_arm_or_a_seed_is_named_as_its_folder_is(shipped: LoopConfig, tmp_path: Path) -> None:
    made_up(shipped, tmp_path, arms=["thinkswitch", "untouched"], seeds=[0, 1])
    assert lineage.choose(tmp_path, "mine/untouched").seed == 0
    one = lineage.choose(tmp_path, "mine/untouched-1:instruct@2")
    assert (one.who.arm, one.seed) == ("untouched", 1)
    assert len({lineage.choose(tmp_path, f"mine/{arm}").step["key"] for arm in ("thinkswitch-0", "thinkswitch-1")}) == 2
    with pytest.raises(LoopError, match="name one of its arms, as in mine/untouched; it has thinkswitch, untouched"):
        lineage.choose(tmp_path, "mine/gold")


def test_of_several_t_the_chosen_one_is_what_it_came_from(store: Store) -> None:
    def rebuilt(t: float) -> dict[str, Any]:
        inputs = {"anchor": "identity of thinking", "instruct": "distill-x/instruct"}
        reads = {"kind": "reconstruct", "inputs": inputs, "recipes": {"recipe.yml": {"parameters": {"t": t}}}}
        return {"iteration": 1, "name": f"reconstruct_t{t:g}", "key": f"reconstruct-{t:g}", "reads": reads}

    tried = [{"t": t, "checkpoint": f"<<checkpoint_{n}>>"} for n, t in enumerate((0.0, 0.1, 0.2))]
    inputs = {f"checkpoint_{n}": f"reconstruct-{t:g}/thinking" for n, t in enumerate((0.0, 0.1, 0.2)) if n}
    reads = {"kind": "choose", "inputs": inputs, "recipes": {"recipe.yml": {"tried": tried}}}
    choice = {"iteration": 1, "name": "choose", "key": "choose-1", "reads": reads}
    store.clear("choose-1")
    store.finish("choose-1", {"facts": {"t": 0.2}})
    line = lineage.line_of([rebuilt(0.1), rebuilt(0.2), choice], choice, store)
    assert [step["name"] for step in line] == ["reconstruct_t0.2", "choose"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mine:instruct@0", "is the checkpoint as it came, which this run did not make"),
        ("mine:instruct@7", "instruct of iteration 7 is not made; made iterations: 1, 2"),
        ("mine:student@1", "write RUN --checkpoint instruct@3"),
        ("other", "no such run"),
    ],
)
def test_what_a_run_has_not_made_is_one_line(name: str, said: str, made: Path) -> None:
    with pytest.raises(LoopError, match=said) as error:
        lineage.choose(made, name)
    assert "\n" not in str(error.value)


def test_a_tah_checkpoint_is_the_runs_input(shipped: LoopConfig, tmp_path: Path) -> None:
    (tmp_path / "tah").mkdir()
    (tmp_path / "tah" / "config.json").write_text('{"model_type": "tah"}')
    made_up(shipped, tmp_path, instruct=str(tmp_path / "tah"))
    with pytest.raises(LoopError, match="a TaH one, loaded by `pip install thinkswitch` and trust_remote_code"):
        lineage.choose(tmp_path, "mine:instruct@0")


def test_a_run_that_made_nothing_yet_has_none(shipped: LoopConfig, tmp_path: Path) -> None:
    run = made_up(shipped, tmp_path)
    for step in run.steps:
        if step.iteration:
            run.store.remove(run.keys[step.stage])
    with pytest.raises(LoopError, match="no instruct checkpoint of it is made yet"):
        lineage.choose(tmp_path, "mine")
    RunDir(tmp_path / "mine").note(steps=[])
    with pytest.raises(LoopError, match="no such run"):
        lineage.choose(tmp_path, "mine")
