"""A disk that refuses, and commands that die: one message, nothing corrupted, and the next start goes on.

Each fault is followed by the plain command, which has to end in what the undisturbed run ended in: rows, outcomes, and
every file of its checkpoints that a loader reads. A sitting that ends well in spite of a fault has to have that then.

One stage of a run that is done is taken away before each fault, so that a sitting takes as long as that stage. Every
write of `ts-loop` itself and its keeper fails in turn; of the tools, the disk is full from the second call on each kind
of file, the last call on it fails with EIO and the first with EACCES. What a tool does without the C library (a Rust
library's renames) is out of reach.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from exported import made_up
from faults import EXIT_3, HANG, NO_MEMORY, NONE, REFUSALS, Call, Ended, Fault, Faults, Sittings, copied
from small import TS_LOOP, small_loop
from test_stops import left

from harness import export, lineage
from harness.config import LoopConfig
from harness.files import below, digest
from harness.model_card import Licence
from harness.store import loaded

pytestmark = pytest.mark.skipif(not shutil.which("cc"), reason="the library that makes calls fail is compiled by cc")

# What a person is told to do: of a full disk, of a broken one, of a folder that is another's, of a tool.
MENDS = ("free some and run the same command again", "run the same command again", "choose another folder by --out")
TOLD_ANEW = ("/log.txt", "trackers.json", "plan.json", "index.json")  # read for a page, or not there anyway
TOLD = ("was told how it went", "was not told how it went", "its page could not be written", "not published yet")
ASIDE = (
    "sync /small",
    ".known.json",
    ".run.lock",
    "run.json",
    ".tasks.json",
    ".lock",
)  # lost without a word: asked or noted again
NAMES = (
    (r"-[0-9a-f]{20}", "-*"),
    (r"20\d\d-[\dT:.-]+\d", "*"),
    (r"/\.tmp\w+", "/.tmp*"),
    (r"/[0-9a-f]{32}", "/*"),
    (r"\.json\.\d+$", ".json.*"),
    (r"checkpoint-\d+", "checkpoint-*"),
)


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Faults:
    return Faults(tmp_path_factory.mktemp("faults"))


class Undisturbed(NamedTuple):
    """A run that is done: its loop.yml, where its store and its folder are, and what it came to."""

    config: Path
    out: Path
    came_to: dict[str, str]

    def without(self, kind: str, out: Path) -> None:
        """Put it elsewhere, without the last stage of a kind."""
        keys = sorted(folder.name for folder in (self.out / "stages").glob(f"{kind}-*")) if kind else [""]
        copied(self.out, out, keys[-1])


def came_to(out: Path) -> dict[str, str]:
    """What a run comes to, with every file of its checkpoints that is loaded."""
    found = left(out)
    for folder in sorted(path for who in ("instruct", "thinking") for path in (out / "small").glob(f"iter_*/*/{who}")):
        found |= {str(file.relative_to(out)): digest(file) for file in loaded(folder)}
    return found


@pytest.fixture(scope="module")
def sittings(faults: Faults, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sittings]:
    with Sittings(faults, tmp_path_factory.mktemp("sittings") / "log.txt") as started:
        yield started


@pytest.fixture(scope="module")
def undisturbed(recipes: Path, sittings: Sittings, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    config = small_loop(recipes, folder / "mine", limit=8)
    ended = sittings.run(config, folder / "runs")
    assert (ended.code, ended.raised) == (0, ""), ended.said
    return Undisturbed(config, folder / "runs", came_to(folder / "runs"))


class Faulted:
    """What sittings with faults came to: how many there were, which ended well, which did not end as they have to."""

    def __init__(self, sittings: Sittings, wanted: Undisturbed, out: Path):
        """`out` is where the runs are."""
        self.sittings, self.wanted, self.out = sittings, wanted, out
        self.count, self.begun = 0, time.monotonic()
        self.well: list[str] = []
        self.wrong: list[str] = []

    def look(self, ended: Ended, call: str, quiet: tuple[str, ...] = ASIDE, full: bool = False) -> None:
        """See how a sitting with a fault in a call ended; `full`: it has to say that the disk is."""
        if ended.failed:
            self.count += 1
        if ended.raised:
            self._say(call, ended, "a traceback")
        elif ended.code == 0:
            if ended.failed:
                self.well.append(call)
            # Where a folder was there already, nothing is lost.
            silent = not ended.failed or "mkdir" in call or any(name in call for name in quiet)
            if came_to(self.out) != self.wanted.came_to:
                self._say(call, ended, "something is lost")
            elif not silent and not any(words in ended.printed for words in TOLD):
                self._say(call, ended, "nothing is said")
        elif not 0 < len(ended.said.splitlines()) <= 3 or str(self.out) not in ended.said:
            self._say(call, ended, "not a few lines that say where")
        elif not any(mend in ended.said for mend in MENDS) and "the whole log: " not in ended.said:
            self._say(call, ended, "does not say what to do")
        if full and ended.failed and (ended.code != 1 or "no disk space left while writing" not in ended.said):
            self._say(call, ended, "does not say that the disk is full")

    def goes_on(self, call: str) -> None:
        """The plain command ends in what the undisturbed one ended in."""
        ended = self.sittings.run(self.wanted.config, self.out)
        if ended.code or ended.raised:
            self._say(call, ended, "does not go on")
        elif came_to(self.out) != self.wanted.came_to:
            self._say(call, ended, "goes on to something else")

    def _say(self, call: str, ended: Ended, what: str) -> None:
        self.wrong.append(f"{call}: {what} ({ended.code}) {ended.said}{ended.raised[-2000:]}")

    def end(self, what: str, least: int) -> None:
        """Print what there was, and see that it was enough and that nothing went wrong."""
        lasted = time.monotonic() - self.begun
        print(f"{what}: {self.count} faults in {lasted:.0f} s; {len(self.well)} ended well: {'; '.join(self.well)}")
        assert not self.wrong, "\n".join(self.wrong)
        assert self.count >= least


def named(path: str) -> str:
    """A path as others of its kind have it."""
    for like, name in NAMES:
        path = re.sub(like, name, path)
    return path.removeprefix("/")


# --- what is short enough for each time ---


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_an_export_is_whole_or_is_not_there(faults: Faults, shipped: LoopConfig, tmp_path: Path, step: int) -> None:
    """Each `step`th of its writes fails in turn, of all in each way; then it is killed, early and as it ends."""
    made_up(shipped, tmp_path / "made")
    to = tmp_path / "out" / "there"
    to.parent.mkdir()
    count = 0
    with Sittings(faults, tmp_path / "log.txt", preloaded=False) as sittings:
        assert sittings.export(tmp_path / "made", "mine:instruct@2", to).code == 0
        whole = {path.relative_to(to): digest(path) for path in below(to)}
        for turn in range(len(REFUSALS) if step == 1 else 1):
            for number in range(1, 200, step):
                error = REFUSALS[(number + turn) % len(REFUSALS)]
                shutil.rmtree(to, ignore_errors=True)
                ended = sittings.export(tmp_path / "made", "mine:instruct@2", to, Fault(error, number))
                if not ended.failed:
                    break
                count += 1
                if ended.code == 0:  # a copy is tried in a second way where the first fails
                    assert {path.relative_to(to): digest(path) for path in below(to)} == whole
                    continue
                assert (ended.raised, to.exists()) == ("", False)
                assert len(ended.said.splitlines()) <= 2
                assert str(to) in ended.said
                assert "--out" not in ended.said
        assert count >= (120 if step == 1 else 6)
        shutil.rmtree(to, ignore_errors=True)
        killed = Fault(-signal.SIGKILL, 1, like="there/.unfinished/README.md")
        sittings.export(tmp_path / "made", "mine:instruct@2", to, killed)
    assert [path.name for path in to.iterdir()] == [".unfinished"]
    export.write(lineage.choose(tmp_path / "made", "mine:instruct@2"), to, Licence("apache-2.0"), "me/mine")
    assert {path.relative_to(to): digest(path) for path in below(to)} == whole
    if step > 1:
        return
    shutil.rmtree(to)
    with Sittings(faults, tmp_path / "log.txt", preloaded=False) as sittings:
        sittings.export(tmp_path / "made", "mine:instruct@2", to, Fault(-signal.SIGKILL, 1, like="there/config.json"))
    assert not (to / "config.json").exists()
    assert (to / "model.safetensors").exists()


# --- writes ---

KINDS = ("reconstruct", "evaluate", "generate", "distill")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_each_write_of_ours_fails_in_turn(
    kind: str, sittings: Sittings, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """In one way after another: of the whole sitting of a short stage; of a longer one, those for its own folder."""
    seen = Faulted(sittings, undisturbed, tmp_path / "runs")
    like = "" if kind == "reconstruct" else f"stages/*{kind}-*"
    for number in range(1, 1000):
        error = REFUSALS[number % len(REFUSALS)]
        undisturbed.without(kind, seen.out)
        ended = sittings.run(undisturbed.config, seen.out, Fault(error, number, like=like, who="ours"), logged=True)
        if not ended.failed:
            break
        call = told_of(next(one for one in sittings.faults.calls() if one.number == number), error)
        seen.look(ended, call)
        seen.goes_on(call)
    seen.end(f"ours, {kind}", 25)


def told_of(call: Call, error: int) -> str:
    return f"{errno.errorcode.get(error, error)} {call.number} {call.what} {call.path}"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_each_first_write_of_a_new_folder_fails_in_turn(
    sittings: Sittings, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """No run folder, locks or digests yet, and all stages but one."""
    seen = Faulted(sittings, undisturbed, out := tmp_path / "runs")
    for number in range(1, FIRST):
        error = REFUSALS[number % len(REFUSALS)]
        undisturbed.without("reconstruct", out)
        shutil.rmtree(out / "small")
        (out / "stages/.known.json").unlink()
        shutil.rmtree(out / "stages/.locks")
        ended = sittings.run(undisturbed.config, out, Fault(error, number, who="ours"), logged=True)
        call = told_of(next(one for one in sittings.faults.calls() if one.number == number), error)
        seen.look(ended, call)
        seen.goes_on(call)
    seen.end("a new folder", 60)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_writes_of_the_tools_fail(kind: str, sittings: Sittings, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Each kind of file; see the module for which call fails how."""
    seen = Faulted(sittings, undisturbed, out := tmp_path / "runs")
    undisturbed.without(kind, out)
    sittings.run(undisturbed.config, out, Fault(who="theirs"), logged=True)
    by: dict[str, list[Call]] = {}
    for call in sittings.faults.calls():
        by.setdefault(named(call.path), []).append(call)
    for like, calls in by.items():
        for fault in (
            Fault(errno.ENOSPC, min(2, len(calls)), True, like, "theirs"),
            Fault(errno.EIO, len(calls), like=like, who="theirs"),
            Fault(errno.EACCES, 1, like=like, who="theirs"),
        ):
            undisturbed.without(kind, out)
            ended = sittings.run(undisturbed.config, out, fault)
            what = told_of(calls[fault.first - 1]._replace(path=like), fault.error)
            # A line of its own log that a tool could not write has nobody to be told to.
            seen.look(ended, what, quiet=("log.txt", "debug.log", *HARMLESS), full=fault.ever)
            seen.goes_on(what)
    seen.end(f"the tools, {kind}, {len(by)} kinds of file", 3 * len(by) - 6)


FIRST = 70  # writes, after which its stage is under way
HARMLESS = ("process_counter.txt", "datasets_prep.lock", "datasets_ready.flag")  # of the preparation, taken away


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_each_kind_of_file_that_cannot_be_read(sittings: Sittings, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """EIO, in a run whose stages are all looked at (--verify), and of the pair."""
    seen = Faulted(sittings, undisturbed, out := tmp_path / "runs")
    undisturbed.without("reconstruct", out)
    sittings.run(undisturbed.config, out, Fault(who="ours", reads=True), logged=True, verify=True)
    by: dict[str, list[str]] = {}
    for call in sittings.faults.calls():
        by.setdefault(named(call.path), []).append(call.what)
    for like, calls in by.items():
        if reads := [number for number, what in enumerate(calls, start=1) if what in ("read", "read-open")]:
            undisturbed.without("reconstruct", out)
            fault = Fault(errno.EIO, reads[0], like=like, who="ours", reads=True)
            seen.look(sittings.run(undisturbed.config, out, fault, verify=True), f"read {like}", (*ASIDE, *TOLD_ANEW))
            seen.goes_on(like)
    pair = Path(json.loads((out / "small/run.json").read_text())["asked"]["instruct"]).parent
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        fault = Fault(errno.EIO, 1, like=f"instruct/{name}", who="ours", reads=True)
        ended = sittings.run(undisturbed.config, out, fault, below=pair, verify=True)
        assert (ended.failed, ended.raised) == (1, "")
        assert name in ended.said
        assert ended.code != 0
    seen.end("reads", 20)


# --- deaths ---

WAYS = {"SIGKILL": -signal.SIGKILL, "SIGSEGV": -signal.SIGSEGV, "exit 3": EXIT_3, "hang": HANG, "memory": NO_MEMORY}
# A file that a command writes, and no other of its stage.
COMMANDS = {
    "generate": ("generate", "*.answered.jsonl"),
    "train": ("distill", "adapter/adapter_config.json"),
    "merge": ("distill", "adapter/merged/*"),
    "reconstruct": ("reconstruct", "thinking/*"),
    "evaluate": ("evaluate", "*.answered.jsonl"),
}
SAID = {"SIGKILL": "killed by SIGKILL (out of memory?)", "SIGSEGV": "killed by SIGSEGV", "hang": "it took longer than"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_dies_in_turn(command: str, sittings: Sittings, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """In each way; without a second try, then with one, which ends as the undisturbed run did."""
    kind, name = COMMANDS[command]
    seen = Faulted(sittings, undisturbed, out := tmp_path / "runs")
    limit = f"limits={{{kind}: {0.006 if kind == 'distill' else 0.003}}}"
    for way, error in WAYS.items():
        # Of memory it wants more until it begins to answer, and none after it has.
        early = way == "memory" and name.endswith("answered.jsonl")
        fault = Fault(error, 1, like=f"stages/{kind}-*/{'log.txt' if early else name}", who="theirs")
        undisturbed.without(kind, out)
        ended = sittings.run(undisturbed.config, out, fault, changes=[limit])
        assert (ended.failed, ended.code, ended.raised) == (1, 1, ""), f"{way}: {ended.said}"
        assert SAID.get(way, "failed: ") in ended.said, f"{way}: {ended.said}"
        assert len(ended.said.splitlines()) == 2
        seen.look(ended, f"{command} {way}")
        seen.goes_on(f"{command} {way}")
        undisturbed.without(kind, out)
        ended = sittings.run(undisturbed.config, out, fault, changes=[limit, "retries=1"])
        assert (ended.failed, ended.code) == (1, 0), f"{way}: {ended.said}"
        assert "tried again" in ended.printed
        seen.look(ended, f"{command} {way}, a second try", (way,))
    seen.end(f"deaths, {command}", 2 * len(WAYS))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_choosing_and_comparing_die_in_turn(
    recipes: Path, sittings: Sittings, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """The commands of ours: of a run whose t is chosen, and of a dial."""
    done, out, asked = tmp_path / "done", tmp_path / "runs", ["t=auto", "limits={reconstruct: 0.003}"]
    copied(undisturbed.out, done)
    assert sittings.run(undisturbed.config, done, changes=asked).code == 0
    assert sittings.dial(done, "small", 0.5).code == 0
    came = {kind: results(done, run) for kind, run in (("choose", "small"), ("angles", "small.dial"))}
    for kind, name in (("choose", "choice.json*"), ("angles", "*angles.json*")):
        (key, *_) = sorted(folder.name for folder in (done / "stages").glob(f"{kind}-*"))
        for way, error in WAYS.items():
            if way == "memory":
                continue  # they need no more of it when they write
            for again in ((), ("retries=1",)):
                if again and kind == "angles":
                    continue  # a dial asks for what its run asked for
                copied(done, out, key)
                fault = Fault(error, 1, like=f"stages/{kind}-*/*{name}", who="theirs")

                def sit(fault: Fault, kind: str = kind, again: tuple[str, ...] = again) -> Ended:
                    if kind == "angles":
                        return sittings.dial(out, "small", 0.5, fault)
                    return sittings.run(undisturbed.config, out, fault, changes=[*asked, *again])

                ended = sit(fault)
                assert (ended.failed, ended.raised) == (1, "")
                assert (ended.code, bool(ended.said)) == ((0, False) if again else (1, True)), f"{way}: {ended.said}"
                assert sit(NONE).code == 0
                assert results(out, "small.dial" if kind == "angles" else "small") == came[kind]


def results(out: Path, run: str) -> tuple[object, str]:
    return json.loads((out / run / "results.json").read_text())["rows"], (out / run / "outcomes.jsonl").read_text()


@pytest.mark.slow
def test_the_keeper_is_killed(sittings: Sittings, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """As it takes the lock that says that something of a stage is alive."""
    seen = Faulted(sittings, undisturbed, out := tmp_path / "runs")
    for error in (-signal.SIGKILL, -signal.SIGSEGV):
        undisturbed.without("evaluate", out)
        ended = sittings.run(undisturbed.config, out, Fault(error, 1, like="stages/.locks/*.busy", who="ours"))
        assert (ended.failed, ended.code) == (1, 1)
        assert "the process that ran it was killed (out of memory?)" in ended.said
        seen.look(ended, "the keeper")
        seen.goes_on("the keeper")
    seen.end("the keeper", 2)


# --- the command itself ---


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("error", REFUSALS)
def test_the_command_says_it_in_a_few_lines(
    error: int, faults: Faults, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """`ts-loop` as it is typed, on a store that has nothing yet, and where each stage is marked done."""
    command = [TS_LOOP, "--config", str(undisturbed.config), "--out", str(tmp_path / "runs")]
    ever = error == errno.ENOSPC
    for like in (
        "stages/.known.json",
        "small/.alive",
        "stages/evaluate-*/.stage.json*",
        "stages/distill-*/.stage.json*",
    ):
        faults.arm(Fault(error, 1, ever, like), tmp_path / "runs")
        said = subprocess.run(command, env=faults.environment, capture_output=True, text=True, check=False, timeout=300)
        _, failed = faults.counted()
        faults.disarm()
        if said.returncode == 0:
            continue
        assert failed, said.stderr
        assert said.returncode in (1, 2)
        assert "Traceback" not in said.stderr + said.stdout
        assert 0 < len(said.stderr.splitlines()) <= 3
        assert said.stderr.startswith("ts-loop: ")
        assert any(mend in said.stderr for mend in MENDS)
    plain = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert plain.returncode == 0, plain.stderr
    assert came_to(tmp_path / "runs") == undisturbed.came_to


FILLED = """
import subprocess, sys, time
from pathlib import Path
out, *command = sys.argv[1:]
out = Path(out)
out.mkdir()
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", out], check=True)
running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
while not list((out / "stages").glob("distill-*/adapter/checkpoint-*")) and running.poll() is None:
    time.sleep(0.01)
with (out / "of somebody else").open("wb", 0) as file:  # to the last byte
    size = 1 << 20
    while size:
        try:
            file.write(bytes(size))
        except OSError:
            size //= 2
begun = time.monotonic()
said = running.communicate()[1]
print(running.returncode, round(time.monotonic() - begun, 1), said.replace("\\n", " | "), flush=True)
(out / "of somebody else").unlink()
print(subprocess.run(command, stdout=subprocess.DEVNULL).returncode, flush=True)
subprocess.run(["cp", "-a", str(out) + "/.", str(out) + ".kept"], check=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_disk_that_is_really_full(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """A small one, which somebody else fills while instruct is trained; it goes on once there is room."""
    own = ["unshare", "-rm"]
    if subprocess.run([*own, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], check=False).returncode:
        pytest.skip("no file system can be mounted here, not in a namespace of its own either")
    out = tmp_path / "runs"
    command = [TS_LOOP, "--config", str(undisturbed.config), "--out", str(out)]
    ran = subprocess.run(
        [*own, sys.executable, "-c", FILLED, str(out), *command], capture_output=True, text=True, check=False
    )
    first, second = ran.stdout.splitlines()
    code, seconds, said = first.split(" ", 2)
    assert code == "1", ran.stdout + ran.stderr
    assert float(seconds) < 20
    assert "no disk space left while writing" in said
    assert said.count(" | ") <= 3
    assert second == "0"
    shutil.move(f"{out}.kept", tmp_path / "kept")
    assert came_to(tmp_path / "kept") == undisturbed.came_to
