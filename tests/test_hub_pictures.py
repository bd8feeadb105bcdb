"""Sets of pictures from the Hugging Face hub, without a network: a fake hub with small parquet files."""
import hashlib
import io
import json
import runpy
import sys
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import RemoteEntryNotFoundError
from PIL import Image

import cifar10


def sentence(caught):
    """The message of a SystemExit, which is one line."""
    text = str(caught.value)
    assert text and "\n" not in text
    return text


def names(folder):
    """Every file under a folder, relative to it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def file_of(picture, form="PNG", **options):
    """The bytes of an image file of a PIL image or an array (H, W) or (H, W, 3) of bytes."""
    buffer = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(buffer, form, **options)
    return buffer.getvalue()


def parquet(columns, types):
    """The bytes of a parquet file as the hub's datasets have them, in several row groups."""
    buffer = io.BytesIO()
    pq.write_table(pa.table({name: pa.array(columns[name], types[name]) for name in columns}), buffer, row_group_size=7)
    return buffer.getvalue()


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder that stands in for data/."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setattr(cifar10, "ROOT", folder)
    return folder


@pytest.fixture
def hub(monkeypatch):
    """A hub that has .files {(repository, commit, name): bytes}; what .damage has for a name happens to its bytes."""
    fake = types.SimpleNamespace(files={}, damage={}, fetched=[], commits={"main": "c" * 40})

    def download(repo, name, *, repo_type, revision, local_dir):
        assert repo_type == "dataset"
        fake.fetched.append(name)
        path = local_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (local_dir / "incomplete").write_bytes(b"as the hub's client leaves it")
        path.write_bytes(fake.damage.get(name, lambda data: data)(fake.files[repo, revision, name]))

    def repo_info(repo, *, repo_type, revision):
        return types.SimpleNamespace(sha=fake.commits.get(revision, revision))

    def list_repo_tree(repo, folder, *, repo_type, revision):
        found = {name: data for (where, commit, name), data in fake.files.items()
                 if (where, commit) == (repo, revision) and name.startswith(f"{folder}/")}
        if not found:
            raise RemoteEntryNotFoundError("404 Client Error.\nEntry Not Found", response=types.SimpleNamespace(
                headers={}, request=None, status_code=404))
        for name, data in reversed(found.items()):
            lfs = types.SimpleNamespace(sha256=hashlib.sha256(data).hexdigest())
            yield types.SimpleNamespace(path=name, lfs=lfs)
        yield types.SimpleNamespace(path=f"{folder}/more")  # a folder

    monkeypatch.setattr("hub.HfApi", lambda: types.SimpleNamespace(repo_info=repo_info, list_repo_tree=list_repo_tree))
    monkeypatch.setattr("hub.hf_hub_download", download)
    return fake


def no_network(*_, **__):
    raise ConnectionError("[Errno -2] Name or service not known\nand more lines")


def interrupt(*_, **__):
    raise KeyboardInterrupt


# ------------------------------------------------------------------------------------------------------------
# CIFAR-10 and MNIST

@pytest.fixture
def pictures(root, hub, monkeypatch):
    """Small files in the place of the real ones; returns {set: {split: (pictures, labels)}}."""
    rng, true, pinned = np.random.default_rng(0), {}, {}
    for name, (repo, revision, column, files) in cifar10.SETS.items():
        pinned[name], true[name] = {}, {}
        for split, count in (("train", 23), ("test", 12)):
            shape = (count, 28, 28) if name == "mnist" else (count, 32, 32, 3)
            array, label = rng.integers(0, 256, shape, np.uint8), rng.integers(0, 10, count)
            image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            data = parquet({column: [{"bytes": file_of(picture), "path": None} for picture in array], "label": label},
                           {column: image, "label": pa.int64()})
            hub.files[repo, revision, files[split][0]] = data
            pinned[name][split] = files[split][0], hashlib.sha256(data).hexdigest()
            true[name][split] = array, label
    monkeypatch.setattr(cifar10, "SETS", {name: (*about[:3], pinned[name]) for name, about in cifar10.SETS.items()})
    monkeypatch.setattr(cifar10, "VALIDATION", 10)
    return true


@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_pictures_come_out_as_they_went_in(root, hub, pictures, name):
    cifar10.main(name)
    folder, repo = root / name, cifar10.SETS[name][0]
    assert names(root) == {f"{name}/{file}" for file in ("train/pixels32.npy", "train/label.npy", "train/meta.json",
                                                         "val.npz")}
    kinds = {"label": {"length": 1, "vocab": 10, "pad": -1}}
    meta = json.loads((folder / "train" / "meta.json").read_text())
    assert {key: meta[key] for key in ("name", "version", "size", "num", "seed", "repo", "modalities")} == {
        "name": name, "version": 1, "size": 32, "num": 23, "seed": 0, "repo": repo, "modalities": kinds}
    assert set(meta["sha256"]) == {"pixels32.npy", "label.npy", "../val.npz"}
    train = [np.load(folder / "train" / f"{m}.npy", mmap_mode="r") for m in ("pixels32", "label")]
    with np.load(folder / "val.npz", allow_pickle=False) as arrays:
        assert set(arrays) == {"pixels32", "label", "modalities"} and json.loads(bytes(arrays["modalities"])) == kinds
        val = [arrays["pixels32"], arrays["label"]]
    for (pixels, label), split, count in ((train, "train", 23), (val, "test", 10)):
        array, number = pictures[name][split]
        assert pixels.dtype == np.uint8 and pixels.shape == (count, 3, 32, 32)
        assert label.dtype == np.uint16 and (label == number[:count, None]).all()
        if name == "cifar10":
            assert (pixels == array[:count].transpose(0, 3, 1, 2)).all()
        else:
            assert (pixels[:, :, 2:30, 2:30] == array[:count, None]).all()
            assert pixels.sum(dtype=int) == 3 * array[:count].sum(dtype=int)  # black around it
    before = times(folder)
    cifar10.main(name)
    assert times(folder) == before and len(hub.fetched) == 2


def test_a_damaged_download_is_not_kept(root, hub, pictures):
    train, test = (file for file, _ in cifar10.SETS["cifar10"][3].values())
    hub.damage[test] = lambda data: data[:-9]
    with pytest.raises(SystemExit) as caught:
        cifar10.main("cifar10")
    assert sentence(caught).startswith(f"cifar10.py: {test} has sha256 ")
    assert names(root) == {"cifar10/work/train.parquet"}
    hub.damage[test] = no_network
    with pytest.raises(SystemExit) as caught:
        cifar10.main("cifar10")
    assert "did not come from the Hugging Face hub" in sentence(caught) and not (root / "cifar10" / "train").exists()
    hub.damage.clear()
    cifar10.main("cifar10")
    assert hub.fetched == [train, test, test, test] and not (root / "cifar10" / "work").exists()


def test_an_interruption_leaves_no_half_a_set(root, hub, pictures, monkeypatch):
    hub.damage[cifar10.SETS["mnist"][3]["test"][0]] = interrupt
    with pytest.raises(SystemExit) as caught:
        cifar10.main("mnist")
    assert sentence(caught) == "cifar10.py: interrupted; run the same command to continue"
    hub.damage.clear()
    for place in ("cifar10.read", "hub.np.savez_compressed"):
        with monkeypatch.context() as patch:
            patch.setattr(place, interrupt)
            with pytest.raises(SystemExit):
                cifar10.main("mnist")
        assert not {"train", "val.npz"} & {path.name for path in (root / "mnist").iterdir()}
    cifar10.main("mnist")
    assert {path.name for path in (root / "mnist").iterdir()} == {"train", "val.npz"} and len(hub.fetched) == 3


def test_a_set_that_is_there_and_wrong_is_told_about(root, hub, pictures):
    cifar10.main("mnist")
    folder = root / "mnist"
    whole = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    meta = json.loads(whole[folder / "train" / "meta.json"])
    for name, data, message in (
            ("train/label.npy", b"x", "is damaged (label.npy is not"), ("val.npz", b"x", "damaged (../val.npz is not"),
            ("train/meta.json", b"{", "is damaged ("), ("train/meta.json", b"[]", "is damaged ("),
            ("train/meta.json", json.dumps({**meta, "version": 0}).encode(), "was made with another version")):
        (folder / name).write_bytes(data)
        with pytest.raises(SystemExit) as caught:
            cifar10.main("mnist")
        assert message in sentence(caught) and f"delete {folder}" in sentence(caught)
        (folder / name).write_bytes(whole[folder / name])
    (folder / "val.npz").unlink()
    with pytest.raises(SystemExit) as caught:
        cifar10.main("mnist")
    assert "is damaged (" in sentence(caught) and len(hub.fetched) == 2


def test_the_pictures_are_the_pinned_ones():
    pins = {name: (repo, revision, [digest for _, digest in files.values()])
            for name, (repo, revision, _, files) in cifar10.SETS.items()}
    assert pins == {
        "cifar10": ("uoft-cs/cifar10", "0b2714987fa478483af9968de7c934580d0bb9a2",
                    ["8428b53a88a11ac374111006708df51469e315a22ac6d66470afd9c78d2ae883",
                     "841389e6f2d64f28bf17310e430aebac20ec3ba611a3c5e231dc93c645ce84de"]),
        "mnist": ("ylecun/mnist", "77f3279092a1c1579b2250db8eafed0ad422088c",
                  ["f2c01285a9f89399335b00ee4e8d499dc4e46db5e39c74903ce5618d895eb3bf",
                   "d49fcf556ce25b002b302e318ce4a11098bbfe5d4499c3f35d7c72297c52374b"])}
    assert cifar10.VALIDATION == 2000
