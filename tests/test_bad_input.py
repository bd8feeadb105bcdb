"""train_4m.py on bad input: one clear sentence, an exit code, and nothing half-written."""
import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import checkpoints
import runs
import scenes
import train_4m
from test_train_4m import DIMS, SMALL, make_root, run_here, small_model, tiny, write_shards  # noqa: F401
from train_4m import Fault


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
    ("--nope=1", "there is no field --nope"),
    ("--__class__=1", "there is no field --__class__"),
    ("--dim=wide", "--dim=wide is not of type int"),
    ("--batch=8.5", "--batch=8.5 is not of type int"),
    ("--adam_lr=", "--adam_lr= is not of type float"),
    ("--adam_lr=nan", "--adam_lr=nan is not a number from 0 to inf"),
    ("--adam_lr=inf", "--adam_lr=inf is not a number from 0 to inf"),
    ("--save=perhaps", "--save=perhaps is not of type bool"),
    ("--precision=fp16", "--precision=fp16 is not one of auto, fp32, bf16"),
    ("num_steps=3", "not 'num_steps=3'"),
    ("--save", "not '--save'"),
    ("--track=tpu", "--track=tpu is not one of cpu, gpu"),
    ("--num_steps=-1", "--num_steps=-1 is not a number from 0 to inf"),
    ("--batch=0", "--batch=0 is not a number from 1 to inf"),
    ("--eval_every=0", "--eval_every=0 is not a number from 1 to inf"),
    ("--cooldown=0", "--cooldown=0 is not a number from 0.001 to 1"),
    ("--head_dim=0", "--head_dim=0 is not a number from 1 to 256"),
    ("--head_dim=7", "--dim=64 is not a multiple of --head_dim=7"),
    ("--budget=8", "--budget=8 is not a number from 16 to inf"),
    ("--budget=500", "--budget=500 is not a multiple of 16 up to the 320 image tokens of a scene"),
    ("--image_targets=400", "a scene has places for 320 and 72"),
    ("--text_targets=73", "a scene has places for 320 and 72"),
])
def test_arguments(monkeypatch, root, tiny, argument, message):
    assert message in fault(monkeypatch, root, *tiny[1], argument)
    assert untouched(root)


def test_help_names_every_field(capsys):
    with pytest.raises(SystemExit) as stopped:
        train_4m.read_options(["--help"])
    said = capsys.readouterr().out
    assert not stopped.value.code and train_4m.__doc__ in said
    for field in (*dataclasses.fields(train_4m.Config), *dataclasses.fields(train_4m.Options)):
        assert f"\n    {field.name}: " in said, field.name
    assert "cooldown in (0.001, 1)" in said and "precision in ('auto', 'fp32', 'bf16')" in said
    assert "is not a multiple of --head_dim" in said


def test_overrides_are_typed():
    before = dataclasses.asdict(train_4m.CONFIGS["cpu"])
    config, options, given = train_4m.read_options("--save=True --dim=48 --adam_lr=1e-3 --load=a=b".split())
    assert (options.save, config.dim, config.adam_lr, options.load) == (True, 48, 1e-3, "a=b")
    assert given == {"save": "True", "dim": "48", "adam_lr": "1e-3", "load": "a=b"}
    assert before["dim"] != 48 and dataclasses.asdict(train_4m.CONFIGS["cpu"]) == before, "the defaults themselves changed"
    assert train_4m.Options().load == ""


@pytest.mark.parametrize("argv, message", [
    (["--num_steps=many"], "--num_steps=many is not of type int"),
    (["--data=nowhere"], "our own is made with `python data/scenes.py`"),
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
    "a truncated shard": (lambda folder: truncate(folder / "depth.npy"), "cannot be trained on"),
    "an empty shard": (lambda folder: (folder / "seg.npy").write_bytes(b""), "cannot be trained on"),
    "a shard that is text": (lambda folder: (folder / "seg.npy").write_text("hello, world\n" * 9), "cannot be trained on"),
    "a shard of objects": (lambda folder: change(folder / "rgb.npy", lambda a: a.astype(object)), "cannot be trained on"),
    "another type": (
        lambda folder: change(folder / "rgb.npy", lambda a: a.astype(np.float32)), "rgb.npy holds float32"),
    "another length": (
        lambda folder: change(folder / "desc.npy", lambda a: a[:, :-1]), "desc.npy holds uint16 (300, 15)"),
    "fewer scenes": (
        lambda folder: change(folder / "bbox.npy", lambda a: a[:-1]), "bbox.npy holds uint16 (299, 16)"),
    "a high token": (
        lambda folder: change(folder / "edge.npy", high), "edge.npy holds token 4096 of a vocabulary of 4096"),
    "a missing shard": (lambda folder: (folder / "edge.npy").unlink(), "edge.npy"),
    "broken meta": (lambda folder: (folder / "meta.json").write_text('{"name": '), "cannot be trained on"),
    "another vocabulary": (lambda folder: (folder / "meta.json").write_text(
        (folder / "meta.json").read_text().replace('"vocab": 4096', '"vocab": 1024')), "another vocabulary"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_shards(monkeypatch, root, tiny, tmp_path, damage):
    spoil, message = DAMAGE[damage]
    write_shards(tmp_path / "shards", {m: np.load(tiny[0] / "train" / f"{m}.npy") for m in scenes.modalities(64)})
    config = dataclasses.replace(train_4m.CONFIGS["cpu"], data=str(tmp_path / "shards"))
    train_4m.read_shards(config, train_4m.read_frozen(config)[2])  # all is well so far
    spoil(tmp_path / "shards")
    found = fault(monkeypatch, root, *tiny[1], f"--data={tmp_path}/shards")
    assert message in found and "made again with `python data/scenes.py`" in found and untouched(root)


def test_missing_shards_name_the_command(monkeypatch, root, tiny):
    found = fault(monkeypatch, root, *tiny[1], "--data=data/nowhere")
    assert "no training data in" in found and "our own is made with `python data/scenes.py`" in found
    frozen = ["--frozen=data/frozen/scenes128.npz", "--frozen_masks=data/frozen/eval_4m_128.npz"]
    found = fault(monkeypatch, root, "--data=data/nowhere", *frozen)
    assert "`python data/scenes.py --size=128`" in found and untouched(root)


def test_batch_larger_than_the_data(monkeypatch, root, tiny):
    found = fault(monkeypatch, root, *tiny[1], "--batch=304", "--num_steps=2", "--save=true")
    assert "--batch=304 is more than the 300 training scenes there are" in found


def test_frozen_set(monkeypatch, root, tiny, tmp_path):
    masks = tmp_path / "masks.npz"
    for content in (b"", b"PK\x03\x04 not really", (tiny[0] / "masks.npz").read_bytes()[:-300]):
        masks.write_bytes(content)
        found = fault(monkeypatch, root, *tiny[1], f"--frozen_masks={masks}")
        assert "frozen validation set is damaged" in found
        assert "no part of the repository but made with its training data" in found and "git checkout" not in found
    with np.load(tiny[0] / "masks.npz") as arrays:
        np.savez(masks, roles=arrays["roles"][:-1])
    assert "masks (99, 392)" in fault(monkeypatch, root, *tiny[1], f"--frozen_masks={masks}")
    np.savez(masks, roles_of_others=np.zeros(3))
    assert "frozen validation set is damaged" in fault(monkeypatch, root, *tiny[1], f"--frozen_masks={masks}")
    found = fault(monkeypatch, root, *tiny[1], f"--frozen_masks={tmp_path}/none.npz")
    assert "none.npz is missing: it is no part of the repository" in found and "git checkout" not in found
    found = fault(monkeypatch, root, *tiny[1], "--frozen=data/frozen/none.npz")
    assert "none.npz is missing" in found and "git checkout data/frozen/none.npz" in found and untouched(root)


# ------------------------------------------------------------------------------------------------------------
# Checkpoints

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The weights of an untrained small model."""
    layout = train_4m.Layout(train_4m.read_frozen(train_4m.CONFIGS["cpu"])[2])
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    weights = {name: p.half() for name, p in small_model(layout).state_dict().items()}
    config = dataclasses.replace(train_4m.CONFIGS["cpu"], **DIMS)
    save_file(weights, path, {"config": json.dumps(vars(config))})
    found, again = checkpoints.read_checkpoint(train_4m, path, train_4m.CONFIGS["cpu"])
    assert again == config and all(torch.equal(found[name], weights[name].float()) for name in weights)
    return path


def test_checkpoint_of_another_model(monkeypatch, root, tiny, checkpoint):
    load = f"--load={checkpoint}"
    found = fault(monkeypatch, root, *tiny[1], load, "--dim=128")
    assert "was trained with --dim=64: leave it out, the checkpoint has its own" in found
    frozen = ["--frozen=data/frozen/scenes128.npz", "--frozen_masks=data/frozen/eval_4m_128.npz"]
    found = fault(monkeypatch, root, *frozen, load, "--num_steps=0")
    assert "does not fit this model" in found and "embed_major" in found, "weights for other picture sizes"
    assert untouched(root)


def test_the_track_of_a_checkpoint(monkeypatch, checkpoint):
    """It is what a checkpoint is of, not what the machine would take by default, unless a track is asked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for words, track, frozen in (("", "cpu", "scenes64"), ("--track=gpu", "gpu", "scenes128")):
        config, _, given = train_4m.read_options([*words.split(), "--batch=32", f"--load={checkpoint}"])
        assert config.track == "gpu"
        _, config = checkpoints.read_checkpoint(train_4m, checkpoint, config, given)
        assert config.track == track and config.frozen == f"data/frozen/{frozen}.npz"
        assert config.batch == 32 and config.dim == DIMS["dim"]


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
    assert "does not fit this model" in fault(monkeypatch, root, *tiny[1], f"--load={path}")
    assert "is not a checkpoint" in fault(monkeypatch, root, *tiny[1], f"--load={tmp_path}") and untouched(root)


# ------------------------------------------------------------------------------------------------------------
# While running

@pytest.mark.parametrize("rate", ["--adam_lr=1e30", "--muon_lr=1e30"])
def test_loss_that_is_no_number(monkeypatch, root, tiny, rate):
    found = fault(monkeypatch, root, *tiny[1], rate, "--num_steps=12", "--save=true")
    assert "at step 10: lower the learning rate" in found and ("nan" in found or "inf" in found)
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


def test_no_place_for_the_line_of_a_run(monkeypatch, root, tiny):
    """Found before the clock, whatever it is that keeps runs.jsonl from growing."""
    (root / "records/runs.jsonl").mkdir(parents=True)
    with pytest.raises(Fault, match="cannot write .*/records/runs.jsonl: it is read-only or not a file"):
        run_here(monkeypatch, root, [*SMALL, *tiny[1], "--num_steps=2"], samples=True)
    assert not (root / "logs").exists()


def test_log_without_git(monkeypatch, tmp_path):
    monkeypatch.setattr(train_4m, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", "")
    run = train_4m.Run("4m", ["--track=cpu"])
    run.precision = "fp32"
    monkeypatch.setattr(run, "prepare_show", lambda: None)
    run.prepare(None)
    log, = (tmp_path / "logs").iterdir()
    assert json.loads(log.read_text().split(train_4m.RULE + "\n")[-2])["git"] is None
