"""train_4m.py on bad input: one clear sentence, an exit code, and nothing half-written."""
import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import runs
import train_4m
from test_train_4m import DIMS, SMALL, make_root, run_here, small_model, tiny, write_shards  # noqa: F401
from train_4m import MODALITIES, Fault


@pytest.fixture
def root(tmp_path):
    return make_root(tmp_path / "root")


def fault(monkeypatch, root, *argv):
    """The sentence that main stops with; root holds no result afterwards."""
    with pytest.raises(Fault) as caught:
        run_here(monkeypatch, root, [*SMALL, *argv])
    message = str(caught.value)
    assert "\n" not in message and 10 < len(message) < 600
    for folder in ("checkpoints", "samples", "records"):
        assert not (root / folder).exists() or not list((root / folder).iterdir())
    return message


def untouched(root):
    return sorted(path.name for path in root.iterdir()) == ["data", "train_4m.py"]


# ------------------------------------------------------------------------------------------------------------
# Arguments

@pytest.mark.parametrize("argument, message", [
    ("--nope=1", "unknown override --nope"),
    ("--dim=wide", "--dim=wide is not of type int"),
    ("--batch=8.5", "--batch=8.5 is not of type int"),
    ("--adam_lr=", "--adam_lr= is not of type float"),
    ("--adam_lr=nan", "--adam_lr=nan is not a number"),
    ("--save=perhaps", "--save=perhaps is not of type bool"),
    ("num_steps=3", "not 'num_steps=3'"),
    ("--save", "not '--save'"),
    ("--track=tpu", "--track=tpu is not one of cpu, gpu"),
    ("--num_steps=-1", "num_steps must be at least 0"),
    ("--batch=0", "batch, eval_every and eval_batch at least 1"),
    ("--eval_every=0", "batch, eval_every and eval_batch at least 1"),
])
def test_arguments(monkeypatch, root, tiny, argument, message):
    assert message in fault(monkeypatch, root, *tiny[1], argument)
    assert untouched(root)


def test_overrides_are_typed():
    config, overrides = train_4m.read_config("--track=cpu --save=True --dim=128 --adam_lr=1e-3 --load=a=b".split())
    assert (config.save, config.dim, config.adam_lr, config.load) == (True, 128, 1e-3, "a=b")
    assert overrides == {"save": "True", "dim": "128", "adam_lr": "1e-3", "load": "a=b"}
    assert train_4m.CONFIGS["cpu"].save is False and train_4m.CONFIGS["cpu"].load == "", "the track itself changed"


@pytest.mark.parametrize("argv, message", [
    (["--num_steps=many"], "--num_steps=many is not of type int"),
    (["--data=nowhere"], "make it with `python data/scenes.py`"),
])
def test_exit(root, argv, message):
    world = runs.start("4m", ["--track=cpu", *argv], root)
    assert world.wait() == [1] and world.out == ""
    assert "Traceback" not in world.err and len(world.err.strip().splitlines()) == 1
    assert world.err.startswith("train_4m.py: ") and message in world.err
    assert not {path.name for path in root.iterdir()} & {"logs", "samples", "checkpoints", "records"}


# ------------------------------------------------------------------------------------------------------------
# Data

def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def change(path, edit):
    array = np.load(path)
    np.save(path, edit(array))


def high(array):
    array[7, 3] = 4096
    return array


DAMAGE = {
    "a truncated shard": (lambda folder: truncate(folder / "depth.npy"), "is damaged"),
    "an empty shard": (lambda folder: (folder / "seg.npy").write_bytes(b""), "is damaged"),
    "a shard that is text": (lambda folder: (folder / "seg.npy").write_text("hello, world\n" * 9), "is damaged"),
    "a shard of objects": (lambda folder: change(folder / "rgb.npy", lambda a: a.astype(object)), "is damaged"),
    "another type": (
        lambda folder: change(folder / "rgb.npy", lambda a: a.astype(np.float32)), "rgb.npy holds float32"),
    "another length": (
        lambda folder: change(folder / "desc.npy", lambda a: a[:, :-1]), "desc.npy holds uint16 (300, 23)"),
    "fewer scenes": (
        lambda folder: change(folder / "bbox.npy", lambda a: a[:-1]), "bbox.npy holds uint16 (299, 21)"),
    "a high token": (
        lambda folder: change(folder / "edge.npy", high), "edge.npy holds token 4096 of a vocabulary of 4096"),
    "a missing shard": (lambda folder: (folder / "edge.npy").unlink(), "edge.npy"),
    "broken meta": (lambda folder: (folder / "meta.json").write_text('{"name": '), "is damaged"),
    "another vocabulary": (lambda folder: (folder / "meta.json").write_text(
        (folder / "meta.json").read_text().replace('"vocab": 4096', '"vocab": 1024')), "another vocabulary"),
    "no recipe": (lambda folder: (folder / "meta.json").write_text(
        (folder / "meta.json").read_text().replace('"tokenizer"', '"tokeniser"')), "is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_shards(monkeypatch, root, tiny, tmp_path, damage):
    spoil, message = DAMAGE[damage]
    write_shards(tmp_path / "shards", {m: np.load(tiny[0] / "train" / f"{m}.npy") for m in MODALITIES})
    train_4m.read_shards(tmp_path / "shards", train_4m.read_frozen(train_4m.CONFIGS["cpu"])[2])  # all is well so far
    spoil(tmp_path / "shards")
    found = fault(monkeypatch, root, *tiny[1], f"--data={tmp_path}/shards")
    assert message in found and "run `python data/scenes.py`" in found and untouched(root)


def test_missing_shards_name_the_command(monkeypatch, root, tiny):
    found = fault(monkeypatch, root, *tiny[1], "--data=data/nowhere")
    assert "no training data in" in found and "make it with `python data/scenes.py`" in found
    frozen = ["--frozen=data/frozen/scenes128.npz", "--frozen_masks=data/frozen/eval_4m_128.npz"]
    found = fault(monkeypatch, root, "--data=data/nowhere", *frozen)
    assert "`python data/scenes.py --size=128 --num=200000`" in found and untouched(root)


def test_batch_larger_than_the_data(monkeypatch, root, tiny):
    found = fault(monkeypatch, root, *tiny[1], "--batch=304", "--num_steps=2", "--save=true")
    assert "a batch of 304 scenes is more than the 300 there are" in found


def test_frozen_set(monkeypatch, root, tiny, tmp_path):
    masks = tmp_path / "masks.npz"
    for content in (b"", b"PK\x03\x04 not really", (tiny[0] / "masks.npz").read_bytes()[:-300]):
        masks.write_bytes(content)
        assert "frozen validation set is damaged" in fault(monkeypatch, root, *tiny[1], f"--frozen_masks={masks}")
    with np.load(tiny[0] / "masks.npz") as arrays:
        np.savez(masks, roles=arrays["roles"][:-1])
    assert "masks (99, 413)" in fault(monkeypatch, root, *tiny[1], f"--frozen_masks={masks}")
    np.savez(masks, roles_of_others=np.zeros(3))
    assert "frozen validation set is damaged" in fault(monkeypatch, root, *tiny[1], f"--frozen_masks={masks}")
    assert "is missing" in fault(monkeypatch, root, *tiny[1], f"--frozen_masks={tmp_path}/none.npz")
    found = fault(monkeypatch, root, *tiny[1], "--frozen=data/frozen/none.npz")
    assert "none.npz is missing" in found and "git checkout data/frozen/none.npz" in found and untouched(root)


# ------------------------------------------------------------------------------------------------------------
# Checkpoints

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The weights of an untrained small model."""
    layout = train_4m.Layout(train_4m.read_frozen(train_4m.CONFIGS["cpu"])[2])
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    config = dataclasses.replace(train_4m.CONFIGS["cpu"], **DIMS)
    train_4m.save_checkpoint(path, small_model(layout), config)
    assert [p.name for p in path.parent.iterdir()] == ["small.safetensors"]
    again = small_model(layout, heads=0)
    train_4m.load_checkpoint(path, again, config)
    assert all(torch.allclose(a, b, atol=2e-3) for a, b in zip(again.parameters(), small_model(layout).parameters()))
    return path


def test_checkpoint_of_another_model(monkeypatch, root, tiny, checkpoint):
    load = f"--load={checkpoint}"
    assert "was trained with dim 64" in fault(monkeypatch, root, *tiny[1], load, "--dim=128")
    found = fault(monkeypatch, root, *tiny[1], load, "--enc_depth=2", "--mlp_ratio=2", "--num_steps=0")
    assert "enc_depth 1" in found and "mlp_ratio 4" in found and "pass the same as overrides" in found
    frozen = ["--frozen=data/frozen/scenes128.npz", "--frozen_masks=data/frozen/eval_4m_128.npz"]
    assert "--load=" in fault(monkeypatch, root, *frozen, load, "--num_steps=0"), "weights for other picture sizes"
    assert untouched(root)


def test_not_a_checkpoint(monkeypatch, root, tiny, checkpoint, tmp_path):
    assert "none.safetensors" in fault(monkeypatch, root, *tiny[1], f"--load={tmp_path}/none.safetensors")
    path = tmp_path / "bad.safetensors"
    for content in (b"", b"hello " * 100, checkpoint.read_bytes()[:-1000]):
        path.write_bytes(content)
        assert "is not a checkpoint of this script" in fault(monkeypatch, root, *tiny[1], f"--load={path}")
    torch.save({"a": torch.zeros(3)}, path)
    assert "is not a checkpoint of this script" in fault(monkeypatch, root, *tiny[1], f"--load={path}")
    save_file({"a": torch.zeros(3)}, path)
    assert "is not a checkpoint of this script" in fault(monkeypatch, root, *tiny[1], f"--load={path}")
    save_file({"a": torch.zeros(3)}, path, metadata={"config": json.dumps(DIMS | {"mlp_ratio": 4})})
    assert "other weights than this model" in fault(monkeypatch, root, *tiny[1], f"--load={path}")
    assert "is not a checkpoint" in fault(monkeypatch, root, *tiny[1], f"--load={tmp_path}") and untouched(root)


# ------------------------------------------------------------------------------------------------------------
# While running

@pytest.mark.parametrize("rate", ["--adam_lr=inf", "--muon_lr=inf"])
def test_loss_that_is_no_number(monkeypatch, root, tiny, rate):
    found = fault(monkeypatch, root, *tiny[1], rate, "--num_steps=4", "--save=true")
    assert "at step 2: lower the learning rate" in found and ("nan" in found or "inf" in found)
    log, = (root / "logs").iterdir()
    assert "val_loss:" not in log.read_text().split(train_4m.RULE + "\n")[-1], "the log of a broken run has a result"


@pytest.mark.parametrize("folder", ["logs", "samples", "records", "checkpoints"])
def test_no_place_to_write(monkeypatch, root, tiny, folder):
    (root / folder).write_text("a file where a folder should be")
    with pytest.raises(Fault, match="cannot write the log") as caught:
        run_here(monkeypatch, root, [*SMALL, *tiny[1], "--num_steps=2"])
    assert folder in str(caught.value) and "\n" not in str(caught.value)
    assert (root / folder).read_text() == "a file where a folder should be"
    assert folder == "logs" or not list((root / "logs").iterdir())


def test_log_without_git(monkeypatch, tmp_path):
    monkeypatch.setattr(train_4m, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", "")
    train_4m.Log("4m", train_4m.CONFIGS["cpu"], {}, 0, torch.device("cpu"), "fp32")
    log, = (tmp_path / "logs").iterdir()
    assert json.loads(log.read_text().split(train_4m.RULE + "\n")[-2])["git"] is None
