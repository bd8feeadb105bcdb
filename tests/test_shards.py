"""The reader of sets, the processes that make them, and which module of data/ imports which."""
import ast
import graphlib
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

import pool
import shards
from shards import Fault

DATA = Path(shards.__file__).parent
KINDS = {"rgb": {"length": 4, "vocab": 10, "pad": -1}}


# ------------------------------------------------------------------------------------------------------------
# Imports

def imported(path, own):
    """The modules of data/ that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found & own


def test_no_module_imports_itself_by_a_detour():
    own = {path.stem for path in DATA.glob("*.py")}
    graph = {name: imported(DATA / f"{name}.py", own) for name in own}
    list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the modules of a cycle
    assert {name for name in own if not graph[name]} >= {"raycaster", "shards", "draw"}
    assert graph["tokenizer"] == graph["streams"] == {"shards"}


# ------------------------------------------------------------------------------------------------------------
# Reading and verifying

@pytest.fixture
def folder(tmp_path):
    """A set of five rows: tokens and pixels."""
    out = tmp_path / "mine" / "train"
    out.mkdir(parents=True)
    np.save(out / "rgb.npy", np.arange(20, dtype=np.uint16).reshape(5, 4) % 10)
    np.save(out / "pixels.npy", np.zeros((5, 3, 2, 2), np.uint8))
    hashes = {name: shards.sha256(out / f"{name}.npy") for name in ("rgb", "pixels")}
    meta = {"name": "mine", "version": 1, "num": 5, "modalities": KINDS, "sha256": hashes}
    (out / "meta.json").write_text(json.dumps(meta))
    return out


def fault(folder, names=("rgb", "pixels"), kinds=None):
    with pytest.raises(Fault) as caught:
        shards.read(folder, names, kinds)
    message = str(caught.value)
    assert "\n" not in message and "delete" not in message and "git" not in message, "it may be the user's own"
    return message


def test_a_whole_set_is_read(folder):
    arrays, meta = shards.read(folder, ["rgb", "pixels"], KINDS)
    assert list(arrays) == ["rgb", "pixels"] and arrays["rgb"].max() == 9 and arrays["pixels"].shape == (5, 3, 2, 2)
    assert meta["num"] == 5 and not arrays["rgb"].flags.writeable
    assert shards.verify(folder, {"name": "mine", "version": 1}) and not shards.verify(folder / "x", {"name": "mine"})


def test_what_is_missing(folder, monkeypatch):
    assert fault(folder.parent / "no") == f"there is no {folder.parent / 'no'}"
    (folder / "rgb.npy").unlink()
    assert fault(folder) == f"{folder / 'rgb.npy'} is missing"
    (folder / "meta.json").unlink()
    assert fault(folder) == f"{folder} has no meta.json"
    monkeypatch.setattr(shards, "ROOT", folder.parents[1])
    for name, command in (("scenes64", "scenes.py"), ("scenes128", "scenes.py --size=128"), ("qa64", "scenes.py --qa"),
                          ("qa64-large", "scenes.py --qa --num=200000"),
                          ("objects64", "scenes.py --objects"), ("objects128", "scenes.py --objects --size=128"),
                          ("mnist", "cifar10.py --mnist")):
        missing = folder.parents[1] / name / "train"
        assert fault(missing) == f"there is no {missing}: make it with `python data/{command}`"
    assert fault(folder) == f"{folder} has no meta.json", "no script of ours makes it"


@pytest.mark.parametrize("array, message", [
    (np.zeros((5, 4), np.int64), r"holds int64 of shape \(5, 4\) and meta.json speaks of uint16 of shape \(5, 4\)"),
    (np.zeros((4, 4), np.uint16), r"holds uint16 of shape \(4, 4\)"),
    (np.full((5, 4), 10, np.uint16), "holds token 10 of a vocabulary of 10")])
def test_arrays_that_are_not_what_meta_says(folder, array, message):
    np.save(folder / "rgb.npy", array)
    with pytest.raises(Fault, match=f"rgb.npy {message}"):
        shards.read(folder, ["rgb"])


@pytest.mark.parametrize("data", [b"", b"x" * 200, None])
def test_damaged_arrays(folder, data):
    path = folder / "rgb.npy"
    path.write_bytes(path.read_bytes()[:-3] if data is None else data)
    assert fault(folder).startswith(f"{path} is damaged (")


@pytest.mark.parametrize("text, message", [
    ("{", "is damaged ("), ("[]", "does not say how many rows"), ('{"num": 5}', "does not say the length and the vocab"),
    ('{"num": 5, "modalities": {"rgb": {"length": 4}}}', "does not say the length and the vocabulary")])
def test_meta_of_another_shape(folder, text, message):
    (folder / "meta.json").write_text(text)
    assert fault(folder).startswith(f"{folder / 'meta.json'} {message}")


def test_another_vocabulary_and_other_rows(folder):
    assert "another vocabulary or length of rgb" in fault(folder, kinds={"rgb": {"length": 4, "vocab": 11, "pad": -1}})
    np.save(folder / "pixels.npy", np.zeros((4, 3, 2, 2), np.uint8))
    assert "pixels.npy holds uint8 of shape (4, 3, 2, 2) and meta.json speaks of 5 rows" in fault(folder)


def test_verify_tells_what_to_do(folder):
    def refusal(**identity):
        with pytest.raises(Fault) as caught:
            shards.verify(folder, {"name": "mine", "version": 1, **identity})
        return str(caught.value)
    assert refusal(version=2) == f"{folder} was made with another version; delete it to make this one"
    assert refusal(name="other") == f"{folder} was not made by this script; move it away and run this again"
    np.save(folder / "rgb.npy", np.zeros((5, 4), np.uint16))
    assert refusal() == f"{folder} is damaged (rgb.npy is not what was written); delete it and run this again"
    (folder / "meta.json").unlink()
    assert refusal() == f"{folder} has no meta.json; move {folder} away and run this again"


# ------------------------------------------------------------------------------------------------------------
# Processes

def work(job, report):
    """A job that can go wrong: run by worker processes."""
    report(1)
    if job == "wrong":
        raise ValueError("no such job\nmore")
    if job == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return job, os.getpid()


def test_results_come_in_order_from_several_processes():
    counted = []
    found = list(pool.results(work, list(range(12)), 2, counted.append))
    assert [job for job, _ in found] == list(range(12)) and sum(counted) == 12
    assert len({pid for _, pid in found} - {os.getpid()}) == 2


@pytest.mark.parametrize("job, message", [("wrong", r"a worker process failed \(ValueError: no such job\)$"),
                                          ("die", "a worker process was killed")])
def test_a_fault_in_a_worker_is_one_sentence(job, message):
    with pytest.raises(Fault, match=message):
        list(pool.results(work, [0, job, 2], 2, lambda count: None))


def test_every_core_is_counted():
    assert 1 <= pool.cores() <= os.cpu_count()
    if sys.platform == "linux":
        assert pool.cores() == len(os.sched_getaffinity(0))
