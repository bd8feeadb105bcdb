"""The objects set (one object a scene), MaskGIT's masks, and the classifier that judges generated pictures of it."""
import functools
import hashlib
import json
import math
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import classifier
import eval_masks
import raycaster
import scenes as maker
import tokenizer
import world
from shards import Fault

SEED = (1 << 52) + (1 << 31)  # of the validation scenes


@pytest.fixture(scope="module")
def frozen():
    with np.load(tokenizer.FROZEN / "objects64.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def judge():
    return classifier.load()


@pytest.fixture(scope="module")
def validation():
    """250 validation pictures, exact and decoded, and their labels."""
    return classifier.validation_set(250)


@pytest.fixture(scope="module")
def rendered():
    """The rgb pictures of the first 50 validation scenes."""
    return raycaster.render(world.load_frozen_scenes(64, 50, "objects"), compile=False)[0]["rgb"]


# ------------------------------------------------------------------------------------------------------------
# Scenes

def test_default_scenes_are_what_they_were():
    scenes = world.sample_scenes(60, seed=3)
    x, y, _ = raycaster.project(scenes)
    turn = math.pi / 8
    steps = [scenes["shape"], scenes["color"], scenes["material"], scenes["size"], scenes["theta"] / turn,
             (x * 8).floor(), (y * 8).floor(), scenes["camera"][:, :1] / turn, scenes["lamp"][:, 2:] * 20]
    rows = torch.cat([step.float().round().long() for step in steps], 1).numpy().astype("<i8")  # safe from rounding
    assert hashlib.sha256(rows.tobytes()).hexdigest()[:16] == "264df0095b25d919"


def test_frozen_scenes_come_from_their_seed(frozen):
    again = world.sample_scenes(2000, SEED, most=1)
    assert {f"scene_{name}" for name in again} == {key for key in frozen if key.startswith("scene_")}
    for name, value in again.items():
        np.testing.assert_allclose(value.numpy(), frozen[f"scene_{name}"], atol=1e-4, err_msg=name)
    other = world.sample_scenes(50, SEED + 1, most=1)["color"][:, 0].numpy()
    assert (other != frozen["scene_color"][:50, 0]).any()


def test_one_object_of_every_kind_everywhere(frozen):
    shape, color = frozen["scene_shape"], frozen["scene_color"]
    assert (shape[:, 0] >= 0).all() and (shape[:, 1:] == -1).all() and (color[:, 1:] == -1).all()
    assert (frozen["label"][:, 0] == shape[:, 0] * 8 + color[:, 0]).all()
    names = [f"{list(raycaster.COLORS)[c]} {raycaster.SHAPES[s]}" for s, c in zip(shape[:, 0], color[:, 0])]
    assert [world.CLASSES[label] for label in frozen["label"][:, 0]] == names
    counts = np.bincount(frozen["label"][:, 0], minlength=24)
    assert len(counts) == len(world.CLASSES) == 24 and counts.min() > 50 and counts.max() < 120
    for name in ("material", "size"):
        assert 0.45 < (frozen[f"scene_{name}"][:, 0] == 1).mean() < 0.55
    digits = np.unravel_index(frozen["look"], world.LOOK)
    assert all(len(np.unique(d)) == n for d, n in zip(digits[:7], world.LOOK))
    places = np.bincount(digits[7] * 8 + digits[8], minlength=64).reshape(8, 8)
    inner = places[1:-1, 1:-1]
    assert inner.sum() == 2000 and inner.min() > 25, "a place in the frame where no object stands"


def test_frozen_arrays(frozen, rendered):
    kinds = maker.modalities(64, "objects")
    assert json.loads(frozen["modalities"].tobytes()) == kinds and list(kinds) == ["label", "rgb"]
    scenes = {key for key in frozen if key.startswith("scene_")}
    assert set(frozen) - scenes == {"label", "rgb", "look", "pixels32", "modalities"}
    for m, kind in kinds.items():
        assert (frozen[m].shape, frozen[m].dtype) == ((2000, kind["length"]), np.uint16)
        assert frozen[m].max() < kind["vocab"]
    coder = tokenizer.load_tokenizer()
    decoded = coder.decode(torch.from_numpy(frozen["rgb"][:50].astype(np.int64)).view(50, 8, 8))
    error = (decoded - rendered).square().mean((1, 2, 3))
    assert -10 * math.log10(error.mean()) > 31 and -10 * math.log10(error.max()) > 27
    assert (coder.encode(rendered).flatten(1).numpy() == frozen["rgb"][:50]).mean() > 0.97
    pixels = rendered.view(50, 3, 32, 2, 32, 2).mean((3, 5)) * 255
    assert ((torch.from_numpy(frozen["pixels32"][:50]) - pixels).abs() > 0.51).float().mean() < 1e-3
    assert (frozen["pixels32"].shape, frozen["pixels32"].dtype) == ((2000, 3, 32, 32), np.uint8)


def test_validation_pictures_are_kept_out_of_training(frozen):
    assert (world.look(world.load_frozen_scenes(64, 2000, "objects")) == frozen["look"]).all()
    pixels = frozen["pixels32"].reshape(2000, -1).astype(np.int16)
    _, first, which = np.unique(frozen["look"], return_index=True, return_inverse=True)
    assert 1800 < len(first) < 2000 and len(np.unique(pixels[first], axis=0)) == len(first)
    assert np.abs(pixels - pixels[first[which]]).mean(1).max() < 0.05, "one look, but two pictures"
    free = world.look(world.sample_scenes(400, 8, most=1))
    kept = world.look(world.sample_scenes(400, 8, most=1, avoid=frozen["look"]))
    assert np.isin(free, frozen["look"]).sum() > 5 and not np.isin(kept, frozen["look"]).any()


# ------------------------------------------------------------------------------------------------------------
# Shards

@pytest.fixture
def shards(tmp_path, monkeypatch):
    """Makes 12 objects, 5 a chunk, in a folder of its own."""
    monkeypatch.setattr(maker, "CHUNK", 5)
    monkeypatch.setattr(raycaster, "RENDER_BATCH", {"cpu": 5})
    monkeypatch.setattr(maker, "render", functools.partial(raycaster.render, compile=False))

    def make(name):
        monkeypatch.setattr(maker, "ROOT", tmp_path / name)
        maker.make_shards(64, 12, 1, "cpu", "objects")
        return tmp_path / name / "objects64" / "train"
    return make


def test_interrupted_shards_continue(shards, monkeypatch, frozen):
    whole, make_objects, calls = shards("whole"), maker.make_objects, []

    def interrupted(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return make_objects(*arguments, **keywords)
    monkeypatch.setattr(maker, "make_objects", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shards("same")
    files = {p.name: p.read_bytes() for p in shards("same").iterdir()}
    assert len(calls) == 4, "the first chunk was made again"
    assert files == {p.name: p.read_bytes() for p in whole.iterdir()}
    assert set(files) == {"label.npy", "rgb.npy", "look.npy", "pixels32.npy", "meta.json"}
    arrays = {name: np.load(whole / f"{name}.npy") for name in ("label", "rgb", "look", "pixels32")}
    assert {name: (a.shape, a.dtype.name) for name, a in arrays.items()} == {
        "label": ((12, 1), "uint16"), "rgb": ((12, 64), "uint16"), "look": ((12,), "int32"),
        "pixels32": ((12, 3, 32, 32), "uint8")}
    shape, color = np.unravel_index(arrays["look"], world.LOOK)[:2]
    assert (arrays["label"][:, 0] == shape * 8 + color).all() and len(np.unique(arrays["look"])) > 10
    assert not np.isin(arrays["look"], frozen["look"]).any()
    decoded = classifier.decode(torch.from_numpy(arrays["rgb"].astype(np.int64)))
    assert (decoded - torch.from_numpy(arrays["pixels32"]) / 255).abs().mean() < 0.02
    meta = json.loads((whole / "meta.json").read_text())
    assert meta["modalities"] == maker.modalities(64, "objects") and meta["name"] == "objects64"


def test_finished_shards_are_verified(shards, capsys):
    folder = shards("a")
    times = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    shards("a")
    assert "verified" in capsys.readouterr().out and times == {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    data = bytearray((folder / "pixels32.npy").read_bytes())
    data[-7] ^= 4
    (folder / "pixels32.npy").write_bytes(data)
    with pytest.raises(Fault, match="pixels32.npy is not what was written"):
        shards("a")


def test_command_line_refuses_other_sizes(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scenes.py", "--objects", "--size=96"])
    with pytest.raises(SystemExit, match="--objects: 64"):
        maker.main()


# ------------------------------------------------------------------------------------------------------------
# Masks

def test_masks(frozen):
    with np.load(tokenizer.FROZEN / "eval_maskgit_64.npz") as arrays:
        assert set(arrays) == {"masked"}
        masked = arrays["masked"]
    assert (masked.shape, masked.dtype) == (frozen["rgb"].shape, bool)
    assert np.array_equal(masked, eval_masks.draw_masked(2000, 64, np.random.default_rng(0)))
    assert hashlib.sha256(np.packbits(masked).tobytes()).hexdigest()[:16] == "d37aef6b7b6ceafe"
    counts = np.bincount(masked.sum(1), minlength=65)
    assert counts[0] == 0 and counts[1:].min() >= 12 and counts.max() <= 55  # 31.25 on average
    assert np.abs(masked.mean(0) - 65 / 128).max() < 0.06, "some places are masked more often"
    together = np.corrcoef(masked[(masked.sum(1) > 16) & (masked.sum(1) < 48)].T)  # places are drawn independently
    assert np.abs(together[~np.eye(64, dtype=bool)]).max() < 0.25


# ------------------------------------------------------------------------------------------------------------
# Classifier

def test_weights_are_small_and_finite(judge):
    weights = load_file(classifier.WEIGHTS)
    assert classifier.WEIGHTS.stat().st_size < 1e6 and sum(p.numel() for p in judge.parameters()) < 300_000
    assert set(weights) == set(judge.state_dict()) and all(w.isfinite().all() for w in weights.values())
    assert {w.dtype for name, w in weights.items() if name.startswith(("body", "head"))} == {torch.float16}


def test_accuracy_and_reference_on_validation_pictures(judge, frozen):
    pixels, labels = torch.from_numpy(frozen["pixels32"]) / 255, torch.from_numpy(frozen["label"].astype(np.int64))
    assert judge.accuracy(pixels[:1000], labels[:1000]) >= 0.98
    assert judge.accuracy(pixels[:250], (labels[:250] + 1) % 24) < 0.02
    assert judge.frechet_distance(pixels, "exact") < 1e-3 * judge.exact_covariance.trace()


def test_decoded_pictures(judge, validation):
    exact, decoded, labels = validation
    assert judge.accuracy(decoded, labels) >= 0.98
    to = {name: judge.frechet_distance(decoded, name) for name in classifier.REFERENCES}
    assert 0 < to["decoded"] < to["exact"]
    assert judge.frechet_distance(exact, "exact") < judge.frechet_distance(exact, "decoded")


def test_faults_raise_the_distance(judge, validation):
    exact, _, labels = validation
    clean = judge.frechet_distance(exact, "exact")
    assert judge.frechet_distance(exact[labels // 8 != 1], "exact") > 1.5 * clean, "no spheres"
    assert judge.frechet_distance(exact.roll(8, 3), "exact") > 1.5 * clean, "objects in the wrong place"
    noisy = exact + 0.3 * torch.randn(exact.shape, generator=torch.Generator().manual_seed(0))
    assert judge.frechet_distance(noisy, "exact") > 3 * clean
    exact = exact[:4].clone()
    exact[0, 0, 0, 0] = math.nan
    assert math.isnan(judge.frechet_distance(exact, "exact"))


def test_larger_pictures_are_averaged(judge, rendered):
    small = torch.from_numpy(np.stack([rendered[..., i::2, j::2].numpy() for i in (0, 1) for j in (0, 1)]).mean(0))
    torch.testing.assert_close(judge.features(rendered), judge.features(small))
    features = judge.features(rendered)
    assert features.shape == (50, 64) and features.std(0).max() > 0


def test_wrong_input_raises(judge):
    for pictures in (torch.zeros(3, 32, 32), torch.zeros(2, 1, 32, 32), torch.zeros(2, 3, 16, 16),
                     torch.zeros(2, 3, 32, 32, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="pictures are"):
            judge.features(pictures)
    with pytest.raises(ValueError, match="not 'real'"):
        judge.frechet_distance(torch.zeros(2, 3, 32, 32), "real")
    with pytest.raises(ValueError, match="2 pictures and 3 labels"):
        judge.accuracy(torch.zeros(2, 3, 32, 32), torch.zeros(3))


def test_frechet_of_gaussians():
    rng = np.random.default_rng(0)
    mean = torch.from_numpy(rng.normal(size=(2, 6)))
    scale = torch.from_numpy(rng.uniform(0.1, 3, (2, 6)))
    basis = torch.from_numpy(np.linalg.qr(rng.normal(size=(6, 6)))[0])
    closed = ((mean[0] - mean[1]).square().sum() + (scale[0] - scale[1]).square().sum()).item()
    for turn in (torch.eye(6, dtype=torch.float64), basis):  # diagonal, then the same distributions turned
        one, two = ((turn @ m, turn @ s.square().diag() @ turn.T) for m, s in zip(mean, scale))
        assert classifier.frechet(*one, *two) == pytest.approx(closed, rel=1e-9)
        assert classifier.frechet(*one, *one) == pytest.approx(0, abs=1e-9)
    # two covariances that do not commute: for 2 x 2 matrices tr M^1/2 = (tr M + 2 det(M)^1/2)^1/2
    a, b = (torch.from_numpy(x @ x.T) for x in rng.normal(size=(2, 2, 2)))
    cross = ((a @ b).trace() + 2 * torch.det(a @ b).sqrt()).sqrt()
    zero = torch.zeros(2, dtype=torch.float64)
    expected = (a.trace() + b.trace() - 2 * cross).item()
    assert expected > 0.01 and classifier.frechet(zero, a, zero, b) == pytest.approx(expected, rel=1e-9)
    # estimated from samples
    draws = mean[0] + torch.from_numpy(rng.normal(size=(100_000, 6))) * scale[0]
    assert classifier.frechet(*classifier.moments(draws), mean[1], scale[1].square().diag()) == pytest.approx(
        closed, rel=0.02)
