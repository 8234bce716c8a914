"""What users install: a wheel and an sdist built from this checkout, in an environment of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def built(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel made from what is in the sdist alone."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-d", folder, "-t"]
    subprocess.run([*build, "sdist"], cwd=repository, check=True, capture_output=True)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    subprocess.run([*build, "wheel"], cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def test_the_sdist_holds_what_the_tests_need_and_nothing_built(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in (
        "tests/conftest.py",
        "recipes/mini/thinking/model.safetensors",
        "Makefile",
        "constraints.txt",
        "LICENSE",
    ):
        assert name in names
    assert not [name for name in names if "/build/" in name or name.startswith("runs/") or name.endswith(".pyc")]


def test_the_wheel_puts_everything_where_its_tool_looks(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as archive:
        names = set(archive.namelist())
        assert max(info.file_size for info in archive.infolist()) < 4e6
    for name in (
        "harness/cli/__init__.py",
        "harness/stages/distill.py",
        "thinkswitch_plugin/tah/plugin.py",
        "lm_eval/tasks/thinkswitch/aime/aime26.yaml",
        "thinkswitch_recipes/loop.yml",
        "thinkswitch_recipes/mini/instruct/model.safetensors",
    ):
        assert name in names
    assert not [name for name in names if name.startswith("tests/")]


def test_an_installed_wheel_works_from_any_folder(built: tuple[Path, Path], tmp_path: Path) -> None:
    """In an environment beside this one, whose other packages it sees and whose checkout it does not."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "env"), "platbase": str(tmp_path / "env")}))
    install = [sys.executable, "-m", "pip", "--python", tmp_path / "env/bin/python", "install", "-q", "--no-deps"]
    subprocess.run([*install, "--no-index", built[1]], check=True, capture_output=True)
    (site / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {**os.environ, "PATH": f"{tmp_path / 'env/bin'}{os.pathsep}{os.environ['PATH']}"}
    said = subprocess.run(
        [tmp_path / "env/bin/ts-loop", "--dry-run", "--iters", "1"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("python -m thinkswitch_plugin.kept_answers ") == 5
    recipes = [file.read_text() for file in (tmp_path / "runs/stages").glob("evaluate-*/recipe.yml")]
    assert (
        sum(f"pretrained: {site}/thinkswitch_recipes/mini/" in recipe for recipe in recipes) == 2
    )  # the pair as it came
