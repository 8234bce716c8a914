"""A checkpoint as a folder to publish: what is in it, what must not be, and what the hub may answer.

That a real run's loads, is scored the same, and is made again by its own recipes is seen in `test_loop`.
The hub that is pushed to is a stand-in: a server of this process that takes a model as the hub's client hands it over.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from exported import COMMIT, INSTRUCT, adapter, made_up
from safetensors.numpy import load_file
from small import TS_LOOP, command_here

from harness import export, lineage
from harness.config import LoopConfig
from harness.errors import LoopError, StageError
from harness.files import below
from harness.model_card import Licence

WHOLE = {
    *("README.md", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("chat_template.jinja", "model.safetensors"),
}
RECIPES = {f"ts_loop/{name}.yml" for name in ("loop", "generate", "distill", "reconstruct", "evaluate")}
APACHE = Licence("apache-2.0")


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in below(folder)}


def written(out: Path, name: str, to: Path, adapter_only: bool = False) -> Path:
    export.write(lineage.choose(out, name), to, APACHE, "me/mine", adapter_only)
    return to


@pytest.fixture(scope="module")
def made(shipped: LoopConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run of a pair of the hub's is, which no test writes to."""
    out = tmp_path_factory.mktemp("made")
    made_up(shipped, out)
    return out


def test_a_loaders_files_go_out_and_a_tools_stay(made: Path, tmp_path: Path) -> None:
    to = written(made, "mine:instruct@2", tmp_path / "there")
    assert names(to) == WHOLE | RECIPES | {".eval_results/aime26.yaml"}
    config = json.loads((to / "config.json").read_text())
    assert config == {"model_type": "qwen3"}
    assert json.loads((to / "tokenizer_config.json").read_text()) == {"pad_token": "<|endoftext|>"}
    source = lineage.choose(made, "mine:instruct@2")
    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert (to / name).read_bytes() == (source.folder(source.step) / "instruct" / name).read_bytes()


def test_an_adapter_names_its_base_as_the_hub_does(made: Path, tmp_path: Path) -> None:
    to = written(made, "mine:instruct@1", tmp_path / "there", adapter_only=True)
    parts = {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert names(to) == parts | RECIPES | {".eval_results/aime26.yaml"}
    config = json.loads((to / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (INSTRUCT, COMMIT)


def delta(weights: dict[str, np.ndarray], scale: float) -> np.ndarray:
    (a,) = (weights[name] for name in weights if "lora_A" in name)
    (b,) = (weights[name] for name in weights if "lora_B" in name)
    return scale * b @ a


@pytest.mark.parametrize("stabilised", [False, True])
def test_adapters_of_several_iterations_are_one_that_adds_the_same(stabilised: bool, tmp_path: Path) -> None:
    scale = 6 / 2**0.5 if stabilised else 6 / 2
    folders, total = [], np.zeros((5, 3))
    for number in (1, 2, 3):
        for name, content in adapter(number, use_rslora=stabilised).items():
            file = tmp_path / str(number) / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        folders.append(tmp_path / str(number) / "adapter")
        total = total + delta(load_file(folders[-1] / "adapter_model.safetensors"), scale)
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in folders]
    config = export.stacked(folders, configs, tmp_path / "one.safetensors")
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (6, 6, False)
    np.testing.assert_allclose(delta(load_file(tmp_path / "one.safetensors"), 1.0), total, rtol=1e-5)
    with pytest.raises(LoopError, match="more than plain LoRA \\(use_dora\\)"):
        export.stacked(folders, [{**config, "use_dora": True} for config in configs], tmp_path / "none")


def test_what_is_not_there_or_not_what_it_was_is_refused(shipped: LoopConfig, tmp_path: Path) -> None:
    run = made_up(shipped, tmp_path)
    chosen = lineage.choose(tmp_path, "mine:instruct@2")
    to = tmp_path / "there"
    with pytest.raises(LoopError, match="thinking is a merge of two checkpoints, it has no adapter"):
        written(tmp_path, "mine:thinking@1", to, adapter_only=True)
    tokenizer = chosen.folder(chosen.step) / "instruct" / "tokenizer.json"
    kept = tokenizer.read_bytes()
    tokenizer.write_bytes(kept[:-1] + b" ")
    with pytest.raises(LoopError, match="changed since it was made"):
        written(tmp_path, "mine:instruct@2", to)
    assert not to.exists()
    tokenizer.write_bytes(kept)
    run.store.prune(chosen.step["key"], "instruct")
    with pytest.raises(
        LoopError, match="gc took its weights away; run mine's command again with --from iter_02/distill"
    ):
        written(tmp_path, "mine:instruct@2", to)
    with pytest.raises(
        LoopError, match="its adapter is upon the checkpoint of iteration 1, whose weights were rounded"
    ):
        written(tmp_path, "mine:instruct@2", to, adapter_only=True)
    assert "adapter_model.safetensors" in names(written(tmp_path, "mine:instruct@1", to, adapter_only=True))
    with pytest.raises(LoopError, match="is there already, and not empty"):
        written(tmp_path, "mine:instruct@1", to)


def test_a_place_or_a_secret_that_a_config_holds_is_left_out(made: Path) -> None:
    places = export._places(lineage.choose(made, "mine"))
    home = str(Path.home())
    value = {"a": f"{home}/x", "b": [f"file://{home}", "kept"], "hub_token": "hf_1", "pad_token": "</s>", "c": {"d": 1}}
    assert export.cleaned(value, places) == {"b": ["kept"], "pad_token": "</s>", "c": {"d": 1}}
    assert export.cleaned({"model": "owner/tmp-2"}, places) == {"model": "owner/tmp-2"}


def test_what_would_name_a_place_all_the_same_is_refused(shipped: LoopConfig, tmp_path: Path) -> None:
    run = made_up(shipped, tmp_path)
    run.folder.note(versions={})
    noted = run.folder.noted()
    for step in noted["steps"]:
        if step["name"] == "reconstruct":
            step["reads"]["recipes"]["recipe.yml"]["merge_method"] = f"slerp of {tmp_path}"
    run.folder.note(steps=noted["steps"])
    to = tmp_path / "there"
    to.mkdir()
    with pytest.raises(LoopError, match=r"README.md: would name a place on this machine"):
        written(tmp_path, "mine:thinking@1", to)
    assert list(to.iterdir()) == []


@pytest.mark.parametrize(
    ("instruct", "thinking", "said"),
    [
        ("license: mit", "license: mit", "mit"),
        (
            "license: other\nlicense_name: own\nlicense_link: LICENSE",
            "license: mit",
            r"differ \(instruct other, thinking mit\)",
        ),
        ("license: mit", "tags: [a]", "thinking, thinking: its card names no licence; say what"),
        ("license: [", "license: mit", "instruct, instruct: its card names no licence"),
    ],
)
def test_a_licence_is_the_parents(instruct: str, thinking: str, said: str, tmp_path: Path) -> None:
    parents = []
    for role, front in (("instruct", instruct), ("thinking", thinking)):
        (tmp_path / role).mkdir()
        (tmp_path / role / "README.md").write_text(f"---\n{front}\n---\n# A card\n")
        parents.append(lineage.Parent(role, role, "", "", tmp_path / role))
    if said == "mit":
        assert export.licence(parents, None) == Licence("mit")
        return
    with pytest.raises(LoopError, match=said):
        export.licence(parents, None)
    assert export.licence(parents, "cc-by-4.0") == Licence("cc-by-4.0")


def test_a_card_that_the_hub_does_not_give_names_no_licence(made: Path) -> None:
    parents = [lineage.choose(made, "mine").parent(role) for role in ("instruct", "thinking")]
    with pytest.raises(LoopError, match=f"instruct, {INSTRUCT}: its card names no licence"):
        export.licence(parents, None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["mine", "--private"], "--private: goes with --push"),
        (["mine", "--push", "mine"], "--push mine: write ORG/NAME"),
        (["mine", "--checkpoint", "instruct@0"], "which this run did not make"),
        (["mine"], "names no licence"),
    ],
)
def test_what_is_refused_is_one_line(
    options: list[str], said: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert command_here(monkeypatch, "export", *options, "--to", tmp_path / "there", "--out", made) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "there").exists()


# --- the hub ---


class Hub(ThreadingHTTPServer):
    """A stand-in for the hub, that takes one model or answers with a status."""

    refuses: int = 0
    asked: list[tuple[str, Any]]
    files: dict[str, bytes]


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
        lines = [json.loads(line) for line in body.splitlines() if line.startswith("{")]
        self.server.asked.append((self.path, lines))
        if self.server.refuses:
            self._say({"error": "no"}, self.server.refuses)
        elif self.path == "/api/repos/create":
            self._say({"url": f"http://{self.headers['Host']}/me/mine", "id": "me/mine"})
        elif self.path.endswith("/preupload/main"):
            files = [{"path": file["path"], "uploadMode": "regular"} for file in lines[0]["files"]]
            self._say({"files": [{**file, "shouldIgnore": False} for file in files]})
        elif self.path.endswith("/commit/main"):
            for line in lines:
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._say(
                {"success": True, "commitOid": "1" * 40, "commitUrl": f"http://{self.headers['Host']}/me/mine/commit/1"}
            )
        else:
            self._say({})

    def do_GET(self) -> None:
        self._say({"sha": "0" * 40, "id": "me/mine", "siblings": []})

    def _say(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *parts: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub(("127.0.0.1", 0), Answer)
    server.asked, server.files = [], {}
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def pushed(made: Path, to: Path, address: str, token: str, *options: str) -> subprocess.CompletedProcess[str]:
    """What `ts-loop export --push` says, with an account of its own."""
    home = to.parent / "home"
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "HF_TOKEN": token}
    command = [TS_LOOP, "export", "mine", "--license", "mit", "--out", made, "--to", to, "--push", "me/mine", *options]
    return subprocess.run(
        [*map(str, command)], env=environment, capture_output=True, text=True, timeout=100, check=False
    )


def test_a_push_gives_the_hub_every_file(made: Path, tmp_path: Path, hub: Hub) -> None:
    to = tmp_path / "there"
    said = pushed(made, to, f"http://127.0.0.1:{hub.server_port}", "hf_mine", "--private")
    assert said.returncode == 0, said.stderr
    assert said.stdout.splitlines()[-1].endswith("/me/mine")
    path, (created,) = hub.asked[0]
    assert path == "/api/repos/create"
    assert (created["name"], created["organization"], created["visibility"]) == ("mine", "me", "private")
    assert hub.files == {name: (to / name).read_bytes() for name in names(to)}
    assert "# mine" in hub.files["README.md"].decode()


@pytest.mark.parametrize(
    ("refuses", "token", "why"),
    [
        (401, "hf_mine", "the hub does not know this token"),
        (403, "hf_mine", "this token may not write to me"),
        (409, "hf_mine", "the hub has a model of that name already"),
        (400, "hf_mine", "the hub refused \\(400: .*no"),
        (0, "", "no token of the hub is here"),
        (-1, "hf_mine", "the hub cannot be reached"),
    ],
)
def test_a_refusal_is_one_line(
    refuses: int, token: str, why: str, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.refuses = max(refuses, 0)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    address = "http://127.0.0.1:9" if refuses < 0 else f"http://127.0.0.1:{hub.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(
        StageError, match=f"^--push me/mine: {why}.*; there is whole; then: hf upload me/mine there$"
    ) as error:
        export.push(Path("there"), "me/mine", private=False)
    assert "hf_mine" not in str(error.value)
    assert not hub.files


def test_after_a_refusal_the_folder_stays(made: Path, tmp_path: Path, hub: Hub) -> None:
    hub.refuses = 403
    to = tmp_path / "there"
    said = pushed(made, to, f"http://127.0.0.1:{hub.server_port}", "hf_mine")
    assert said.returncode == 1
    assert said.stderr.startswith("ts-loop: --push me/mine: this token may not write to me;")
    assert said.stderr.count("\n") == 1
    assert "hf_mine" not in said.stdout + said.stderr
    assert (to / "model.safetensors").is_file()
