"""The objects set (one object per scene), MaskGIT's masks, and the judge of generated pictures."""
import functools
import hashlib
import json
import math
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import eval_masks
import judge as judges
import raycaster
import scenes as maker
import texts
import tokenizer
import world
from shards import Fault


@pytest.fixture(scope="module")
def frozen():
    with np.load(tokenizer.FROZEN / "objects64.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def judge():
    return judges.load()


@pytest.fixture(scope="module")
def coder():
    return tokenizer.load_tokenizer()


@pytest.fixture(scope="module")
def rendered():
    """The rgb pictures of the first 50 validation scenes."""
    return raycaster.render(world.load_frozen_scenes(64, 50, "objects"), compile=False)[0]["rgb"]


# ------------------------------------------------------------------------------------------------------------
# Scenes

def test_one_object_of_every_kind_everywhere(frozen):
    codes = frozen["scene"]
    assert np.array_equal(codes, world.sample_close_ups(2000, maker.VALIDATION_SEED)), "they follow from their seed"
    fields = dict(zip(world.FIELDS, codes.T))
    shape, color = fields["shape"], fields["color"]
    assert (frozen["label"][:, 0] == shape * 8 + color).all()
    names = [f"{list(raycaster.COLORS)[c]} {raycaster.SHAPES[s]}" for s, c in zip(shape, color)]
    assert [world.CLASSES[label] for label in frozen["label"][:, 0]] == names
    counts = np.bincount(frozen["label"][:, 0], minlength=24)
    assert len(counts) == len(world.CLASSES) == 24 and counts.min() > 50 and counts.max() < 120
    assert 0.45 < fields["material"].mean() < 0.55
    for name in ("size", "turn", "row", "column"):
        quarters = np.bincount(fields[name] // (world.FINE // 4), minlength=4)
        assert len(quarters) == 4 and quarters.min() > 430, name


def test_frozen_arrays(frozen, rendered, coder):
    kinds = maker.modalities(64, "objects")
    assert json.loads(frozen["modalities"].tobytes()) == kinds and list(kinds) == ["label", "rgb"]
    assert set(frozen) == {"label", "rgb", "pixels32", "modalities", "scene"}
    assert (frozen["scene"].shape, frozen["scene"].dtype) == ((2000, 7), np.int32)
    for m, kind in kinds.items():
        assert (frozen[m].shape, frozen[m].dtype) == ((2000, kind["length"]), np.uint16)
        assert frozen[m].max() < kind["vocab"]
    decoded = coder.decode(torch.from_numpy(frozen["rgb"][:50].astype(np.int64)).view(50, 8, 8))
    error = (decoded - rendered).square().mean((1, 2, 3))
    assert -10 * math.log10(error.mean()) > 29 and -10 * math.log10(error.max()) > 25
    assert (coder.encode(rendered).flatten(1).numpy() == frozen["rgb"][:50]).mean() > maker.SAME_TOKENS
    pixels = rendered.view(50, 3, 32, 2, 32, 2).mean((3, 5)) * 255
    assert ((torch.from_numpy(frozen["pixels32"][:50]) - pixels).abs() > 0.51).float().mean() < 1e-3
    assert (frozen["pixels32"].shape, frozen["pixels32"].dtype) == ((2000, 3, 32, 32), np.uint8)
    assert len(np.unique(frozen["pixels32"].reshape(2000, -1), axis=0)) == 2000, "no picture twice"


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


def test_interrupted_shards_continue(shards, monkeypatch, coder):
    whole, make, calls = shards("whole"), maker.make, []

    def interrupted(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return make(*arguments, **keywords)
    monkeypatch.setattr(maker, "make", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shards("same")
    files = {p.name: p.read_bytes() for p in shards("same").iterdir()}
    assert len(calls) == 4, "the first chunk was made again"
    assert files == {p.name: p.read_bytes() for p in whole.iterdir()}
    arrays = {name: np.load(whole / f"{name}.npy") for name in ("label", "rgb", "scene", "pixels32")}
    assert set(files) == {*(f"{name}.npy" for name in arrays), "meta.json"}
    assert {name: (a.shape, a.dtype.name) for name, a in arrays.items()} == {
        "label": ((12, 1), "uint16"), "rgb": ((12, 64), "uint16"), "scene": ((12, 7), "int32"),
        "pixels32": ((12, 3, 32, 32), "uint8")}
    assert (arrays["label"][:, 0] == arrays["scene"][:, 0] * 8 + arrays["scene"][:, 1]).all()
    assert len(np.unique(arrays["scene"], axis=0)) == 12
    decoded = judges.decode(torch.from_numpy(arrays["rgb"].astype(np.int64)), coder)
    small = torch.nn.functional.avg_pool2d(decoded, 2)
    assert (small - torch.from_numpy(arrays["pixels32"]) / 255).abs().mean() < 0.02
    assert maker.check_shards(64, 12, 1, "cpu", "objects").endswith("rgb 100.00 %, pixels32 100.00 %")
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
# The judge's weights

@pytest.fixture(scope="module")
def scene_set():
    """300 frozen scenes: exact pictures, decoded ones, and their objects."""
    with np.load(tokenizer.FROZEN / "scenes64.npz") as arrays:
        rgb, lines = arrays["rgb"][:300], arrays["desc_text"].tobytes().decode().split("\n")[:300]
    exact = raycaster.render(world.load_frozen_scenes(64, 300), compile=False)[0]["rgb"]
    decoded = judges.decode(torch.from_numpy(rgb.astype(np.int64)), tokenizer.load_tokenizer())
    return exact, decoded, [texts.parse_desc(line) for line in lines]


def test_weights_are_small_and_finite(judge):
    weights = load_file(judges.WEIGHTS)
    assert judges.WEIGHTS.stat().st_size < 2e6 and sum(p.numel() for p in judge.parameters()) < 1_000_000
    assert set(weights) == set(judge.state_dict()) and all(w.isfinite().all() for w in weights.values())
    assert {w.dtype for name, w in weights.items() if name.startswith(("body", "head"))} == {torch.float16}


def test_it_reads_scenes(judge, scene_set):
    exact, decoded, objects = scene_set
    assert judges.object_f1(judge.read(exact), objects) >= 0.99
    told = judge.read(decoded)
    assert judges.object_f1(told, objects) >= 0.97
    assert judges.caption_f1(told, objects) >= 0.97 and judges.attribute_f1(told, objects) >= 0.98
    assert judge.fidelity(exact, objects) > judge.fidelity(decoded, objects) > 0.9
    others = objects[1:] + objects[:1]
    assert judges.object_f1(told, others) < 0.1 and judge.fidelity(exact, others) < 0.1


def test_it_knows_classes(judge, frozen, coder):
    pixels, labels = torch.from_numpy(frozen["pixels32"]) / 255, torch.from_numpy(frozen["label"].astype(np.int64))
    assert judge.accuracy(pixels[:1000], labels[:1000]) >= 0.98
    decoded = judges.decode(torch.from_numpy(frozen["rgb"][:300].astype(np.int64)), coder)
    assert judge.accuracy(decoded, labels[:300, 0]) >= 0.97
    assert judge.accuracy(decoded, (labels[:300] + 1) % 24) < 0.02


def distances(judge, pictures):
    """{reference: Frechet distance to it}: the net looks once."""
    found = judges.moments(judge.look(pictures)[0])
    return {name: judges.frechet(*found, judge.get_buffer(f"{name}_mean"), judge.get_buffer(f"{name}_covariance"))
            for name in judges.REFERENCES}


def test_distances(judge, frozen, coder, scene_set):
    """Frechet distances to the reference of one's own set are the least, and faults raise them."""
    pixels = torch.from_numpy(frozen["pixels32"]) / 255
    own = distances(judge, pixels)
    assert own["objects_exact"] < 1e-3 * judge.objects_exact_covariance.trace()
    assert own["objects_exact"] == judge.frechet_distance(pixels, "objects_exact") < own["objects_decoded"]
    decoded = judges.decode(torch.from_numpy(frozen["rgb"][:300].astype(np.int64)), coder)
    for pictures, kind in ((pixels[:300], "objects"), (decoded, "objects"), (scene_set[0], "scenes"), (scene_set[1], "scenes")):
        to = distances(judge, pictures)
        assert min(to, key=to.get).startswith(kind) and min(to.values()) > 0, to  # 300 tell no more
    labels, clean = torch.from_numpy(frozen["label"][:300, 0] // 8), judge.frechet_distance(pixels[:300], "objects_exact")
    assert judge.frechet_distance(pixels[:300][labels != 1], "objects_exact") > 1.5 * clean, "no spheres"
    noisy = pixels[:300] + 0.3 * torch.randn(300, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert judge.frechet_distance(noisy, "objects_exact") > 3 * clean


# ------------------------------------------------------------------------------------------------------------
# What it computes

class Seer(judges.Judge):
    """A judge that sees what it is told: logits of given objects, whatever the picture."""

    def __init__(self, *scenes):
        super().__init__()
        self.logits = torch.full((len(scenes), 1 + sum(judges.HEADS.values()), 8, 8), -9.0)
        for b, objects in enumerate(scenes):
            for (row, column, sure), words in objects:
                self.logits[b, 0, row, column] = sure
                start = 1
                for name, count in judges.HEADS.items():
                    self.logits[b, start + texts.WORDS[name].index(words[name]), row, column] = 9
                    start += count

    def look(self, pictures):
        occupied, *values = self.logits.split([1, *judges.HEADS.values()], 1)
        named = {name: v.softmax(1) for name, v in zip(judges.HEADS, values)}
        return torch.zeros(len(pictures), 80), occupied[:, 0].sigmoid(), named


RED = {"shape": "cube", "color": "red", "material": "metal", "size": "large"}
BLUE = {"shape": "sphere", "color": "blue", "material": "rubber", "size": "small"}


def test_reading_takes_the_likeliest_of_neighbours():
    seer = Seer([((2, 3, 4.0), RED), ((2, 4, 3.0), BLUE), ((6, 1, 1.0), BLUE), ((0, 7, -1.0), RED)], [])
    found, empty = seer.read(torch.zeros(2, 3, 64, 64))
    assert empty == [] and found == [{"x": 43, "y": 31, **RED}, {"x": 18, "y": 81, **BLUE}]
    assert [judges.percent(cell) for cell in range(8)] == [6, 18, 31, 43, 56, 68, 81, 93]


def test_fidelity_is_the_probability_of_what_was_asked():
    seer, picture = Seer([((2, 3, 0.0), RED), ((6, 1, 9.0), BLUE)]), torch.zeros(1, 3, 64, 64)
    at = {"x": 43, "y": 31}
    assert seer.fidelity(picture, [[at | RED]]) == pytest.approx(0.5, abs=1e-3)
    assert seer.fidelity(picture, [[at | RED, {"x": 18, "y": 81} | BLUE]]) == pytest.approx(0.75, abs=1e-3)
    for wrong in (at | BLUE, {"x": 43, "y": 18} | RED, at | RED | {"material": "rubber"}, {"x": 99, "y": 99} | RED):
        assert seer.fidelity(picture, [[wrong]]) < 1e-3
    assert seer.fidelity(picture, [[at | RED | {"size": "small"}]]) == pytest.approx(0.5, abs=1e-3), "not of the size"
    assert seer.fidelity(picture, [[]]) == 0


def test_accuracy_is_that_of_the_likeliest_cell():
    seer, pictures = Seer([((2, 3, 1.0), RED), ((6, 1, 2.0), BLUE)], [((4, 4, -3.0), RED)]), torch.zeros(2, 3, 32, 32)
    blue_sphere, red_cube = (world.CLASSES.index(name) for name in ("blue sphere", "red cube"))
    assert seer.accuracy(pictures, torch.tensor([blue_sphere, red_cube])) == 1
    assert seer.accuracy(pictures, torch.tensor([[red_cube], [red_cube]])) == 0.5


def objects(*told):
    return [dict(zip(("x", "y", "shape", "color", "material", "size"), each)) for each in told]


def test_f1_of_objects():
    meant = [objects((31, 31, "cube", "red", "metal", "large"), (68, 68, "sphere", "blue", "rubber", "small"))]
    assert judges.object_f1(meant, meant) == judges.attribute_f1(meant, meant) == judges.caption_f1(meant, meant) == 1
    assert judges.object_f1([[]], meant) == judges.attribute_f1(meant, [[]]) == 0
    assert judges.object_f1([[]], [[]]) == 0
    near = [objects((43, 31, "cube", "red", "metal", "small"), (68, 56, "sphere", "blue", "metal", "small"))]
    assert judges.object_f1(near, meant) == 0.5, "a cell away is near enough, the sphere's material is wrong"
    assert judges.attribute_f1(near, meant) == pytest.approx(5 / 6)
    assert judges.object_f1(near, meant, ("shape", "size")) == 0.5
    far = [objects((43, 43, "cube", "red", "metal", "large"))]
    assert judges.object_f1(far, meant) == 0, "a cell away in both directions is too far"
    extra = [meant[0] + objects((6, 6, "cube", "red", "metal", "large"))]
    assert judges.object_f1(extra, meant) == 0.8 and judges.object_f1(extra + meant, meant + meant) == pytest.approx(8 / 9)
    twice = [objects((31, 31, "cube", "red", "metal", "large"), (32, 31, "cube", "red", "metal", "large"))]
    assert judges.object_f1(twice, [meant[0][:1]]) == pytest.approx(2 / 3), "one to one"


def test_f1_of_captions():
    meant = [objects((18, 31, "cube", "red", "metal", "large"), (31, 81, "sphere", "blue", "rubber", "small"))]
    assert judges.caption_f1([objects((31, 6, "cube", "red", "metal", "large"))], meant) == pytest.approx(2 / 3), "back left"
    assert judges.caption_f1([objects((43, 31, "cube", "red", "metal", "large"))], meant) == 0, "back middle"
    twins = [objects((18, 31, "cube", "red", "metal", "large"), (31, 18, "cube", "red", "metal", "large"))]
    assert judges.caption_f1(twins, meant) == 0.5, "the caption names one of them"


def test_wrong_input_raises():
    judge = judges.Judge()
    for pictures in (torch.zeros(3, 32, 32), torch.zeros(2, 1, 32, 32), torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 128, 128)):
        with pytest.raises(ValueError, match="S 32 or 64"):
            judge.look(pictures)
    with pytest.raises(ValueError, match="floats in"):
        judge.look(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="not 'real'"):
        judge.frechet_distance(torch.zeros(2, 3, 32, 32), "real")
    with pytest.raises(ValueError, match="2 pictures and 3 labels"):
        judge.accuracy(torch.zeros(2, 3, 32, 32), torch.zeros(3))
    with pytest.raises(ValueError, match="two pictures at least"):
        judges.moments(torch.zeros(1, 80))
    broken = torch.zeros(2, 3, 32, 32)
    broken[0, 0, 0, 0] = math.nan
    assert math.isnan(judge.frechet_distance(broken, "objects_exact"))


def test_small_pictures_are_enlarged():
    judge, small = judges.Judge(), torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    large = torch.nn.functional.interpolate(small, 64, mode="bilinear")
    for one, two in zip(judge.look(small)[:2], judge.look(large)[:2]):
        torch.testing.assert_close(one, two)
    beyond = large * 3 - 1
    torch.testing.assert_close(judge.look(beyond)[0], judge.look(beyond.clamp(0, 1))[0])
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(judge.look(large)[0], judge.look(small)[0], atol=1e-5, rtol=1e-5)


def test_targets():
    """What the net should say is in the cells of the objects, and nowhere else."""
    scenes = world.build(world.sample_scenes(20, 5))
    grid = judges.targets_of(scenes, close_up=False)
    assert grid.shape == (20, 5, 8, 8) and (grid[:, 0].sum((1, 2)) == (scenes["shape"] >= 0).sum(1)).all()
    assert ((grid[:, 1:] >= 0) == (grid[:, :1] == 1)).all()
    close = judges.targets_of(world.build(world.sample_close_ups(20, 5)), close_up=True)
    assert (close[:, 0].sum((1, 2)) == 1).all() and (close[:, 4] == -1).all() and (close[:, 1].amax((1, 2)) >= 0).all()


def test_frechet_of_gaussians():
    rng = np.random.default_rng(0)
    mean = torch.from_numpy(rng.normal(size=(2, 6)))
    scale = torch.from_numpy(rng.uniform(0.1, 3, (2, 6)))
    basis = torch.from_numpy(np.linalg.qr(rng.normal(size=(6, 6)))[0])
    closed = ((mean[0] - mean[1]).square().sum() + (scale[0] - scale[1]).square().sum()).item()
    for turn in (torch.eye(6, dtype=torch.float64), basis):  # diagonal, then the same distributions turned
        one, two = ((turn @ m, turn @ s.square().diag() @ turn.T) for m, s in zip(mean, scale))
        assert judges.frechet(*one, *two) == pytest.approx(closed, rel=1e-9)
        assert judges.frechet(*one, *one) == pytest.approx(0, abs=1e-9)
    # two covariances that do not commute: for 2 x 2 matrices tr M^1/2 = (tr M + 2 det(M)^1/2)^1/2
    a, b = (torch.from_numpy(x @ x.T) for x in rng.normal(size=(2, 2, 2)))
    cross = ((a @ b).trace() + 2 * torch.det(a @ b).sqrt()).sqrt()
    zero = torch.zeros(2, dtype=torch.float64)
    expected = (a.trace() + b.trace() - 2 * cross).item()
    assert expected > 0.01 and judges.frechet(zero, a, zero, b) == pytest.approx(expected, rel=1e-9)
    # of equal sets, and estimated from samples
    same = judges.moments(torch.from_numpy(rng.normal(size=(50, 6))))
    assert judges.frechet(*same, *same) == pytest.approx(0, abs=1e-9)
    draws = mean[0] + torch.from_numpy(rng.normal(size=(100_000, 6))) * scale[0]
    assert judges.frechet(*judges.moments(draws), mean[1], scale[1].square().diag()) == pytest.approx(
        closed, rel=0.02)
