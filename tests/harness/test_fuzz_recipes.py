"""Settings as people and scripts leave them, through a dry run: refused in a line or two, or what the tools take.

What a dry run asks the tools at its end is asked here of all recipes at once, in a fork of a process that has them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutation
import pytest
import yaml
from small import command_here, prepared, small_loop

from harness import loop, natives
from harness.config import LoopConfig, load, read_recipes
from harness.errors import LoopError
from harness.runner import LocalRunner
from harness.view import View

RECIPES = ("generate", "distill", "reconstruct", "evaluate")
CONTENT = {"prompts", "tasks", "include_path", "validate"}  # what lm-eval is asked about, in a process, for seconds


class Fuzzed:
    """A small loop, one file of which is changed at a time."""

    def __init__(self, recipes: Path, folder: Path):
        """`folder` gets the loop, and the folder of runs that are planned."""
        self.config, self.out = small_loop(recipes, folder / "mine"), folder / "runs"
        self.written: dict[str, Any] = yaml.safe_load(self.config.read_text())
        self.files = {name: self.config.parent / self.written["recipes"][name] for name in RECIPES}
        self.kept = {file: file.read_text() for file in [self.config, *self.files.values()]}
        self.asked: dict[str, dict[str, str]] = {}  # every recipe that was planned, by a hash
        self.said: dict[str, str] = {}  # which number it came of

    def taken(self, runner: LocalRunner) -> dict[str, list[str]]:
        """The planned recipes that their tools take, by tool; each of the others is refused in a line."""
        question, answer = self.out / "asked.json", self.out / "answer.json"
        question.write_text(json.dumps(self.asked))
        runner.run(["python", "-m", "harness.natives", str(question), str(answer)], {}, self.out / "natives.log")
        taken: dict[str, list[str]] = {"axolotl": [], "mergekit": [], "lm_eval": []}
        for name, why in json.loads(answer.read_text()).items():
            assert len(why.splitlines()) <= 1, self.said[name]
            assert len(why) <= natives.LONGEST, self.said[name]
            if not why:
                taken[self.asked[name]["tool"]].append(name)
        return taken

    def changed(self, number: int) -> str:
        """Change a file; what is in it now."""
        chance = random.Random(number)
        for file, text in self.kept.items():
            file.write_text(text)
        file = self.config if number % 2 else self.files[chance.choice(RECIPES)]
        said = yaml.safe_load(self.kept[file])
        if chance.random() < 0.8:
            bent = mutation.bent(chance, {key: value for key, value in said.items() if key not in CONTENT})
            rest = {key: value for key, value in said.items() if key in CONTENT}
            found = yaml.safe_dump({**bent, **rest} if isinstance(bent, dict) else bent, allow_unicode=False)
        else:
            found = mutation.text(chance, [self.kept[file]])
        file.write_text(found, encoding="utf-8", errors="replace")
        return f"{number}, {file.name}: {found!r:.1500}"

    def planned(self, where: str) -> bool:
        """Whether the loop, as it is now, is planned; else it was refused in a line or two."""
        try:
            with mutation.in_time(where):
                config = load(self.config, {})
                recipes = read_recipes(config)
            if not self.asks_as_before(config):
                return False
            with mutation.in_time(where):
                run = loop.prepare(config, recipes, self.out, View(quiet=True))
                todo = loop.pending(run)
                for stage in todo.values():
                    loop.write_recipes(run, stage)
            assert any(stage.kind.name == "distill" for stage in todo.values()) or not config.iterations, where
        except LoopError as error:
            said = str(error)
        else:
            for one in (natives.Asked(stage, run.pair, {}) for stage in todo.values()):
                self.asked[one.name] = {"tool": one.tool, "recipe": one.written()}
                self.said[one.name] = where
            return True
        if not 1 <= len(said.splitlines()) <= 3 or len(said) > 3_000:
            raise AssertionError(f"{said!r:.500}\n{where}")
        return False

    def asks_as_before(self, config: LoopConfig) -> bool:
        """Whether lm-eval knows the answer already; asking it takes seconds, which the command line's test is for."""
        return (config.prompts, config.tasks, config.include_path, config.validate_by) == (
            [str(self.config.parent / "mine.jsonl")],
            self.written["tasks"],
            None,
            [],
        )


@pytest.mark.parametrize("count", [60, pytest.param(10_000, marks=pytest.mark.slow)])
def test_recipes(recipes: Path, tmp_path: Path, runner: LocalRunner, tool: Callable[..., str], count: int) -> None:
    fuzzed = Fuzzed(recipes, tmp_path)
    prepared(fuzzed.config, fuzzed.out)  # lm-eval is asked of the tasks once
    found = [fuzzed.planned(fuzzed.changed(number)) for number in range(count)]
    assert 0 < sum(found) < count, "some are planned, some are refused"
    taken = fuzzed.taken(runner)
    print(f"{sum(found)} of {count} are planned", {name: len(each) for name, each in taken.items()}, len(fuzzed.asked))
    assert 0 < sum(map(len, taken.values())) < len(fuzzed.asked), "some are taken, some are not"
    for name in taken["mergekit"][: count // 20]:  # and the command does it
        print(fuzzed.said[name])
        (tmp_path / "recipe.yml").write_text(fuzzed.asked[name]["recipe"])
        tool("mergekit-yaml", tmp_path / "recipe.yml", tmp_path / "merged")


@pytest.mark.slow
def test_the_command_line(
    recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same through the whole command, where lm-eval is asked anew."""
    fuzzed = Fuzzed(recipes, tmp_path)
    for number in range(36):
        where = fuzzed.changed(number)
        code = command_here(monkeypatch, "--config", fuzzed.config, "--out", fuzzed.out, "--dry-run")
        said = capsys.readouterr().err
        assert code in (0, 1, 2), where
        assert "Traceback" not in said, where
        assert not code or said.startswith(("ts-loop: ", "Usage: ")), where
