"""Models pushed to the Hugging Face hub and loaded from it: the hub's own client against a small server of its API."""
import base64
import hashlib
import json
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import card
import checkpoints
import hub
import runs
import train_flow
import train_gpt
from test_train_gpt import DIMS, SMALL, finished, make_root, run_here, tiny  # noqa: F401


class Server(BaseHTTPRequestHandler):
    """What of the hub's API it takes to create a model, commit files to it and download them.

    Of its server: repos, {owner/name: {"private": bool, "commits": [{path: bytes}]}}; cut, bytes missing at the end of
    a download. A commit's id is its number in 40 digits. The one token that may do anything is "right".
    """

    def log_message(self, *words):
        """Nothing is printed."""

    def answer(self, status, data=b"", **headers):
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in {**headers, "Content_Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def parts(self):
        return unquote(urlsplit(self.path).path).strip("/").split("/")

    def allowed(self):
        return self.headers["Authorization"] == "Bearer right"

    def do_GET(self):
        parts = self.parts()
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        repo = self.server.repos.get(name)
        if repo is None or (repo["private"] and not self.allowed()):
            return self.answer(404 if self.allowed() else 401, X_Error_Code="RepoNotFound")
        if parts[0] == "api":
            return self.answer(200, {"id": name, "private": repo["private"]})
        commits = {f"{number:040}": files for number, files in enumerate(repo["commits"])}
        commit = max(commits) if parts[3] == "main" else parts[3]
        if commit not in commits:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        if parts[4] not in commits[commit]:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        data = commits[commit][parts[4]]
        about = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X_Repo_Commit": commit}
        self.answer(200, data[:-self.server.cut] if self.server.cut and self.command == "GET" else data, **about)

    do_HEAD = do_GET

    def do_POST(self):
        parts, body = self.parts(), self.rfile.read(int(self.headers["Content-Length"]))
        if parts == ["api", "validate-yaml"]:
            return self.answer(200, {"errors": [], "warnings": []})
        if not self.allowed():
            return self.answer(401, {"error": "Invalid username or password."})
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            status = 409 if name in self.server.repos else 200
            self.server.repos.setdefault(name, {"private": asked.get("visibility") == "private", "commits": []})
            return self.answer(status, {"url": f"{self.server.url}/{name}"})
        name = "/".join(parts[2:4])
        if parts[4] == "preupload":
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]
            return self.answer(200, {"files": modes})
        lines = map(json.loads, body.splitlines())
        files = [line["value"] for line in lines if line["key"] == "file"]
        commits = self.server.repos[name]["commits"]
        commits.append({file["path"]: base64.b64decode(file["content"]) for file in files})
        oid = f"{len(commits) - 1:040}"
        self.answer(200, {"commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}"})


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub on this machine, which the client of this process talks to, without a login and with an empty cache."""
    found = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    found.repos, found.cut, found.url = {}, 0, f"http://127.0.0.1:{found.server_port}"
    threading.Thread(target=found.serve_forever, daemon=True).start()
    files = found.url + "/{repo_id}/resolve/{revision}/{filename}"
    settings = {"ENDPOINT": found.url, "HUGGINGFACE_CO_URL_TEMPLATE": files, "HF_HUB_CACHE": str(tmp_path / "cache"),
                "HF_TOKEN_PATH": str(tmp_path / "token"), "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_TELEMETRY": True}
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    yield found
    found.shutdown()
    found.server_close()


@pytest.fixture
def weights(finished, monkeypatch):  # noqa: F811
    """The checkpoint of a run whose log and samples the card can find."""
    monkeypatch.setattr(card, "REPOSITORY", finished[0])
    path, = (finished[0] / "checkpoints").iterdir()
    return path


@pytest.fixture
def no_plot(monkeypatch):
    """Drawing the loss curve takes longer than all else."""
    monkeypatch.setattr(card, "curve", lambda log, folder: "a curve")


def command(monkeypatch, *words):
    """Do as `python data/hub.py <words>` does."""
    monkeypatch.setattr(sys, "argv", ["hub.py", *map(str, words)])
    runpy.run_path(hub.__file__, run_name="__main__")


def refusal(monkeypatch, *words):
    """The one sentence that a command ends with."""
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, *words)
    text = str(caught.value)
    assert text.startswith("hub.py: ") and "\n" not in text
    return text


def load(name, script=train_gpt, given=()):
    return checkpoints.read_checkpoint(script, name, script.CONFIGS["cpu"], given)


def fault(name, script=train_gpt, given=()):
    """The one sentence that --load=<name> ends with."""
    with pytest.raises(script.Fault) as caught:
        load(name, script, given)
    text = str(caught.value)
    assert name in text and "\n" not in text
    return text


# ------------------------------------------------------------------------------------------------------------
# The card

def test_card(finished, tiny, weights, monkeypatch, capsys):  # noqa: F811
    footer, (*_, (step, seconds, loss)) = finished[1]["footer"], finished[1]["steps"]
    command(monkeypatch, "card", weights)
    text = capsys.readouterr().out
    assert yaml.safe_load(text.split("---\n")[1]) == {
        "license": "mit", "library_name": "modded-nano4M", "pipeline_tag": "text-generation",
        "tags": ["gpt", "language-model"]}
    assert "\n# GPT\n\nA decoder-only Transformer learns" in text
    assert f"python train_gpt.py --track=cpu --data={tiny} --load=hf:owner/name --num_steps=0\n" in text
    assert f"| val_loss | {footer['val_loss']} |" in text and f"| data_sha256 | {footer['data_sha256']} |" in text
    assert "(loss.png)" in text
    said = (finished[0] / "samples" / weights.stem / "gpt.txt").read_text("utf-8", "replace").strip("\n")
    assert said.strip() and text.rstrip().endswith("## Sample\n\n" + textwrap.indent(said, "    ").rstrip())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    command(monkeypatch, "card", weights)
    text = capsys.readouterr().out
    assert "loss.png" not in text and f"| {step} | {seconds:.1f} | {loss:.4f} |" in text


def test_card_of_other_files(weights, no_plot, monkeypatch, tmp_path, capsys):
    """A checkpoint knows its run by whatever name it has; without that run's log there is no card."""
    renamed = tmp_path / "best.safetensors"
    shutil.copy(weights, renamed)
    command(monkeypatch, "card", renamed)
    assert "# GPT" in capsys.readouterr().out
    monkeypatch.setattr(card, "REPOSITORY", tmp_path)
    assert f"there is no {tmp_path}/logs/{weights.stem}.txt" in refusal(monkeypatch, "card", renamed)
    save_file({"a": torch.zeros(3)}, renamed)
    for path in (renamed, tmp_path / "none.safetensors"):
        assert f"{path} is not a checkpoint of ours" in refusal(monkeypatch, "card", path)


def test_pictures_and_missing_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(card, "REPOSITORY", tmp_path)
    assert card.sample("run", tmp_path) == ""
    (tmp_path / "samples" / "run").mkdir(parents=True)
    for name, data in (("4m.png", b"picture"), ("4m.txt", b"```\n# \xff\n"), ("4m.npy", b"numbers")):
        (tmp_path / "samples" / "run" / name).write_bytes(data)
    assert card.sample("run", tmp_path) == "## Sample\n\n![Sample](4m.png)\n\n    ```\n    # \ufffd"
    assert {path.name for path in tmp_path.iterdir()} == {"samples", "4m.png"}


# ------------------------------------------------------------------------------------------------------------
# There and back

def test_there_and_back(finished, tiny, weights, server, monkeypatch, tmp_path, capsys):  # noqa: F811
    """One commit has it all; --load=hf: of a script, which finds the hub by HF_ENDPOINT, has the same weights."""
    monkeypatch.setenv("HF_TOKEN", "right")
    command(monkeypatch, "push", weights, "me/model")
    assert f"is now {server.url}/me/model/commit/" in capsys.readouterr().out
    files, = server.repos["me/model"]["commits"]
    assert set(files) == {"model.safetensors", "config.json", "README.md", "loss.png"}
    assert files["model.safetensors"] == weights.read_bytes() and files["loss.png"].startswith(b"\x89PNG")
    assert "--load=hf:me/model " in files["README.md"].decode()
    about = json.loads(files["config.json"])
    assert about["run_id"] == weights.stem and about["script"] == "train_gpt.py"
    assert DIMS.items() <= about["config"].items() and not server.repos["me/model"]["private"]

    root = make_root(tmp_path / "root")
    rest = [word for word in SMALL if word.partition("=")[0][2:] not in DIMS]
    argv = [*rest, f"--data={tiny}", "--num_steps=0", "--save=true", "--load=hf:me/model"]
    runs.run("gpt", argv, root, env={"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": ""})
    again, = (root / "checkpoints").iterdir()
    found, expected = load_file(again), load_file(weights)
    assert found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in found)


def test_only_what_asks_for_the_hub_brings_its_client():
    """It takes a while to import, and reads its settings then."""
    paths = [str(runs.ROOT), str(runs.ROOT / "data")]
    code = f"import sys; sys.path[:0] = {paths}; import scenes, train_4m, studio; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_revisions(weights, server):
    commits = [{"model.safetensors": weights.read_bytes()}, {"README.md": b"without weights"}]
    server.repos["me/model"] = {"private": False, "commits": commits}
    config = load(f"hf:me/model@{0:040}")[1]
    assert {key: getattr(config, key) for key in DIMS} == DIMS
    assert "hf:me/model has no model.safetensors" in fault("hf:me/model")
    assert "me/model has no revision nope" in fault("hf:me/model@nope")


def test_private(weights, no_plot, server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "right")
    command(monkeypatch, "push", weights, "me/secret", "--private")
    assert server.repos["me/secret"]["private"]
    monkeypatch.delenv("HF_TOKEN")
    assert "`hf auth login`" in fault("hf:me/secret")
    monkeypatch.setenv("HF_TOKEN", "right")
    assert load("hf:me/secret")[0].keys() == load(weights)[0].keys()


# ------------------------------------------------------------------------------------------------------------
# What can go wrong

def test_what_cannot_be_loaded(weights, server, monkeypatch, tmp_path):
    server.repos["me/model"] = {"private": False, "commits": [{"model.safetensors": weights.read_bytes()}]}
    assert "is not on the Hugging Face hub, or private" in fault("hf:me/none")
    assert "was trained with --depth=2: leave it out" in fault("hf:me/model", given={"depth"})
    assert "is not a checkpoint of this script (KeyError: 'patch')" in fault("hf:me/model", train_flow)
    for name in ("", "gpt2", "me/model/more", "me/mo del"):
        with pytest.raises(train_gpt.Fault, match="is not the name of a model on the Hugging Face hub: owner/name"):
            load(f"hf:{name}")
    root = make_root(tmp_path / "root")
    with pytest.raises(train_gpt.Fault, match="hf:me/none is not on"):
        run_here(monkeypatch, root, [*SMALL, "--num_steps=2", "--load=hf:me/none"])
    assert {path.name for path in root.iterdir()} == {"data", "train_gpt.py"}


def test_a_cut_download_is_not_kept(weights, server, tmp_path):
    server.repos["me/model"] = {"private": False, "commits": [{"model.safetensors": weights.read_bytes()}]}
    server.cut = 9
    assert re.search(r"nothing of it was kept; run this again \(\w+: Consistency check failed", fault("hf:me/model"))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size > 1000]
    server.cut = 0
    found, expected = load("hf:me/model")[0], load(weights)[0]
    assert all(found[name].equal(expected[name]) for name in expected)
    server.repos.clear()  # from now on the cache has it
    assert load("hf:me/model")[0].keys() == expected.keys()


def test_without_a_network(monkeypatch):
    def no_network(*_, **__):
        raise ConnectionError("[Errno -2] Name or service not known\nand more lines")
    monkeypatch.setattr(hub, "hf_hub_download", no_network)
    assert fault("hf:me/model").endswith("(ConnectionError: [Errno -2] Name or service not known)")


def test_what_cannot_be_pushed(weights, no_plot, server, monkeypatch, tmp_path):
    assert "`hf auth login`" in refusal(monkeypatch, "push", weights, "me/model")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert "may not write to me/model: `hf auth login`" in refusal(monkeypatch, "push", weights, "me/model")
    monkeypatch.setenv("HF_TOKEN", "right")
    assert "owner/name" in refusal(monkeypatch, "push", weights, "model")
    assert "is not a checkpoint" in refusal(monkeypatch, "push", tmp_path / "none.safetensors", "me/model")
    assert server.repos == {}, "nothing was made for what could not be pushed"
    server.repos["me/public"] = {"private": False, "commits": []}
    assert "exists and is public: nothing was pushed" in refusal(monkeypatch, "push", weights, "me/public", "--private")
    assert server.repos["me/public"]["commits"] == []
