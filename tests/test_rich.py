"""data/scenes.py --rich: what its tokens say of the scenes set's scenes, against closed forms and the pictures."""
import json
import math

import numpy as np
import pytest
import torch

import previews
import raycaster
import rich
import rich_report
import scenes as maker
import tokenizer
import world
from shards import FROZEN, Fault, content_sha256, read

NUM, CHUNK = 9, 5


@pytest.fixture(scope="module")
def frozen():
    """200 validation scenes in float64, with their pictures and object index."""
    with np.load(FROZEN / "scenes64.npz") as arrays:
        codes = torch.from_numpy(arrays["scene"][:200]).long()
    images, index = raycaster.render(world.build(codes), compile=False)
    return world.build(codes, torch.double), images, index


def one_object(shape, color=0, size=1, turn=0, row=4, column=4):
    """Codes (1, 21) of a scene of one object."""
    return torch.tensor([[shape, color, 0, size, turn, row, column] + [-1] * 14])


# ------------------------------------------------------------------------------------------------------------
# The set

def test_it_is_the_scenes_set(tmp_path, monkeypatch):
    monkeypatch.setattr(maker, "ROOT", tmp_path)
    monkeypatch.setattr(maker, "CHUNK", CHUNK)
    monkeypatch.setattr(maker, "validation_looks", lambda kind: ())
    for module in (maker, previews):  # compiling takes longer than these few scenes
        monkeypatch.setattr(module, "render", lambda scenes, size=64: raycaster.render(scenes, size, compile=False))
    maker.make_shards(64, NUM, 1, "cpu", "rich")
    assert "inst 100.00 %" in maker.check_shards(64, NUM, 1, "cpu", "rich")
    folder, names = tmp_path / "rich64" / "train", ["scene", *maker.modalities(64, "rich")]
    arrays, meta = read(folder, names, maker.modalities(64, "rich"))
    assert {path.name for path in folder.iterdir()} == {"meta.json", *(f"{name}.npy" for name in arrays)}
    assert meta["content_sha256"] == content_sha256(folder) and meta["rich"] == rich.VERSION
    rows = {"pad": 0, "end": 1}
    assert meta["modalities"] == {
        "inst": {"length": 64, "vocab": 4096, "pad": -1}, "feat": {"length": 64, "vocab": 4096, "pad": -1},
        "feat_global": {"length": 8, "vocab": 4096, "pad": -1},
        "polygon": {"length": 25, "vocab": 2 + 4 * 64 + 37 ** 2, **rows},
        "pose": {"length": 25, "vocab": 2 + 3 + 8 + 2 + 2 + 3 * 64 + 5, **rows},
        "palette": {"length": 14, "vocab": 2 + 3 * 256 + 4, **rows},
        "metadata": {"length": 19, "vocab": 2 + 9 + 32, **rows, "pair": 2}}
    scenes = [maker.make("scenes", n, 64, (1 << 32) + chunk, "cpu")[0] for chunk, n in enumerate((CHUNK, NUM - CHUNK))]
    assert np.array_equal(arrays["scene"], np.concatenate([part["scene"] for part in scenes])), "the same rows"
    boxes = np.concatenate([part["bbox"] for part in scenes])[:, :15].reshape(NUM, 3, 5)[..., :4]
    assert np.array_equal(arrays["polygon"][:, :24].reshape(NUM, 3, 8)[..., :4], np.where(boxes > 1, boxes, 0) +
                          ((boxes == 1).any(2, keepdims=True) & (np.arange(4) == 0))), "the boxes are those of bbox"
    previews.draw_rich(arrays, tokenizer.load_tokenizer(), tmp_path / "rich.png")
    assert (tmp_path / "rich.png").stat().st_size > 10000


def test_no_other_set_has_changed():
    for kind in ("scenes", "objects", "qa", "audio"):
        assert not set(rich.modalities(64)) & set(maker.array_forms(64, kind))
        assert "rich" not in maker.identity_of(64, 5, 1, kind)


def test_frozen_set(frozen):
    scenes, images, index = frozen
    with np.load(FROZEN / "rich64.npz") as arrays, np.load(FROZEN / "scenes64.npz") as others:
        assert json.loads(arrays["modalities"].tobytes()) == maker.modalities(64, "rich")
        assert np.array_equal(arrays["scene"], others["scene"])
        assert np.array_equal(arrays["pose"][:200], rich.pose_tokens(scenes))
        some = {name: value[:20].float() if value.is_floating_point() else value[:20] for name, value in scenes.items()}
        drawn = rich.drawn(some, {"rgb": images["rgb"][:20]}, index[:20], tokenizer.load_tokenizer())
        assert set(drawn) == set(rich.DRAWN)
        for name, rows in drawn.items():
            assert (rows == arrays[name][:20]).mean() >= maker.SAME_TOKENS - 0.01, name


# ------------------------------------------------------------------------------------------------------------
# Features

def test_features_are_those_of_the_judge(frozen):
    _, images, _ = frozen
    coder, pictures = rich.feature_coder("cpu"), images["rgb"]
    cells, whole = coder.see(pictures)
    inner = coder.judge[0].look(pictures)[0]
    assert torch.allclose(whole * coder.mean_deviation + coder.mean_mean, inner, atol=1e-4)
    plain = cells * coder.cell_deviation + coder.cell_mean
    assert torch.allclose(plain.mean(1), inner, atol=1e-3), "the mean of the cells"
    assert cells.mean((0, 1)).abs().max() < 0.1 and whole.std(0).sub(1).abs().median() < 0.1, "whitened"
    words, ids = rich_report.words_of(frozen[0]), coder.encode(pictures)
    assert rich_report.feat(ids["feat"], cells)["cosine"] > 0.78
    told = rich_report.feat_global(ids["feat_global"], whole, words)
    with torch.autocast("cpu", torch.bfloat16):
        assert rich_report.feat_global(ids["feat_global"], whole, words) == told
        assert torch.equal(coder.see(pictures[:3])[0], coder.see(pictures[:3])[0].float())
    assert told["cosine"] > 0.96 and told["recall"] > 0.97
    wrong = rich_report.feat_global(np.roll(ids["feat_global"], 1, 0), whole, words)
    assert wrong["cosine"] < 0.3 and wrong["recall"] < 0.03 and wrong["words_f1"] < told["words_f1"] - 0.1


def test_vote_of_neighbours():
    """Of five pictures the first two and the last three are alike: each is told the others' words."""
    bank = torch.zeros(5, 80)
    bank[:2, 0] = bank[2:, 1] = 1
    words = torch.zeros(5, 11, dtype=torch.bool)
    words[:2, 0] = words[2:, 1] = True

    class Coder:
        def whole(self, ids):
            return bank
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rich, "feature_coder", lambda device: Coder())
        told = rich_report.feat_global(np.zeros((5, 8)), bank, words)
    assert told == {"cosine": 1.0, "recall": 2 / 5, "words_f1": 1.0}, "the nearest of equals is the first"


# ------------------------------------------------------------------------------------------------------------
# Instances and outlines

def test_instances_and_outlines_of_validation_scenes(frozen):
    _, _, index = frozen
    coder = tokenizer.load_tokenizer()
    assert torch.equal(rich.inst_index(rich.inst_picture(index)), index)
    some = index[:40]
    ids = torch.from_numpy(coder.encode_flat(rich.inst_picture(some)).astype(np.int64)).view(-1, 8, 8)
    assert rich_report.inst(coder.decode(ids), some)["iou"] > 0.95
    rows = rich.polygon_tokens(index)
    told = rich_report.polygon(rows, index)
    assert told["iou"] > 0.92 and told["ap"] > 0.86
    masks, boxes = rich.polygon_masks(rows, 64)
    assert torch.equal(masks, rich.polygon_masks(rows, 64, rich.edges_of(rich.box_bins_of(index)))[0])
    there = rich.masks_of(index).any(3).any(2)
    assert torch.equal(masks.any(3).any(2), there)
    iou = (masks & rich.masks_of(index)).sum((2, 3)) / (masks | rich.masks_of(index)).sum((2, 3)).clamp(min=1)
    assert iou[there].min() > 0.8


def test_an_outline_of_whole_cells_is_kept():
    cells = torch.ones(8, 8, dtype=torch.bool)
    cells[:4, :4] = False  # an object in front hides a corner
    index = torch.full((1, 64, 64), -1)
    index[0, 8:40, 16:48] = torch.where(cells.repeat_interleave(4, 0).repeat_interleave(4, 1), 0, -1)
    rows = rich.polygon_tokens(index)
    right, whole = (rich.RUNS.tolist().index(row) for row in ([0.0] * 4 + [1.0] * 4, [1.0] * 8))
    assert rows[0, :9].tolist() == [2 + 16, 66 + 8, 130 + 47, 194 + 39, *2 * [258 + right * 37 + right],
                                    *2 * [258 + whole * 37 + whole], rich.END]
    masks, boxes = rich.polygon_masks(rows, 64)
    assert boxes[0, 0].tolist() == [0.25, 0.125, 0.75, 0.625]
    assert (masks[0, 0] != (index[0] == 0)).sum() <= 4, "but for the rounded corner"


def test_masks_report():
    index = torch.full((1, 8, 8), -1)
    index[0, :4, :4], index[0, 4:, 4:] = 0, 1
    true = rich.masks_of(index)
    assert rich_report.masks(true, true) == {"iou": 1.0, "ap": 1.0}
    assert rich_report.masks(true[:, [2, 1, 0]], true) == {"iou": 1.0, "ap": 1.0}, "in any order"
    assert rich_report.masks(torch.zeros_like(true), true) == {"iou": 0.0, "ap": 0.0}
    half = true.clone()
    half[0, 1, 6:] = False  # IoU 1/2: right at one of ten thresholds
    told = rich_report.masks(half, true)
    assert told["iou"] == pytest.approx(0.75) and told["ap"] == pytest.approx(0.1 + 0.9 * 0.25)


# ------------------------------------------------------------------------------------------------------------
# Poses

def test_corners_are_those_of_the_renderer():
    """The outline of a cube spans what its projected corners span."""
    codes = torch.cat([one_object(0, size=size, turn=turn, row=row, column=3)
                       for size, turn, row in ((0, 0, 3), (1, 1, 4), (1, 2, 4), (0, 3, 4))])
    scenes = world.build(codes, torch.double)
    o, d = raycaster.primary_rays(scenes, 256)
    ids = raycaster.trace(scenes, o, d)[1].unflatten(1, (256, 256))
    for made, reach in ((scenes, 1 / 256), (rich.pose_scenes(rich.pose_tokens(scenes)), 0.02)):
        x, y, _ = raycaster.project(made | {"center": rich.corners(made)[:, 0]})  # (4, 8)
        for b in range(4):
            rows, columns = np.nonzero(ids[b].numpy() == 0)
            for place, pixels in ((x[b], columns), (y[b], rows)):
                assert place.min().item() == pytest.approx(pixels.min() / 256, abs=reach)
                assert place.max().item() == pytest.approx((pixels.max() + 1) / 256, abs=reach)


def test_poses_round_trip(frozen):
    scenes, _, _ = frozen
    told = rich.pose_scenes(rich.pose_tokens(scenes))
    there = scenes["shape"] >= 0
    for name in ("shape", "color", "material", "size"):
        assert torch.equal(told[name], scenes[name])
    assert (told["theta"] - scenes["theta"])[there].abs().max() < 1e-9
    assert (told["radius"] - scenes["radius"])[there].abs().max() < 1e-9
    step = [(high - low) / rich.BINS for low, high in rich.REACH.values()]
    assert (told["center"] - scenes["center"])[there].norm(dim=1).max() < math.dist((0, 0, 0), step) / 2
    report = rich_report.pose(rich.pose_tokens(scenes), scenes)
    assert report["corner"] < 0.04 and all(report[name] == 1 for name in ("objects", "class", "turn"))


def test_no_machine_rounds_a_pose_differently():
    """All places in which an object can stand lie within the bins, and none on their edges."""
    codes = [one_object(shape, size=size, row=row, column=column) for shape in range(3) for size in range(2)
             for row in range(1, 7) for column in range(1, 7)]
    scenes = world.build(torch.cat(codes), torch.double)
    x, y, depth = (values[:, 0] for values in raycaster.project(scenes))
    across = 2 * math.tan(raycaster.FOV / 2) * depth
    for name, place in (("x", (x - 0.5) * across), ("y", (0.5 - y) * across), ("depth", depth)):
        low, high = rich.REACH[name]
        bins = (place - low) / (high - low) * rich.BINS
        assert 0 < bins.min() and bins.max() < rich.BINS and (bins - bins.round()).abs().max() > 0
        assert (bins - bins.round()).abs().min() > 1e-6, name
    fields = world.sample_scenes(500, 3).view(-1, len(world.FIELDS))
    assert 1 <= fields[fields[:, 0] >= 0, 5:].min() and fields[:, 5:].max() <= 6, "no object stands in an outer cell"


def test_pose_report_sees_what_is_wrong():
    scenes = world.build(torch.cat([one_object(0), one_object(1)]), torch.double)
    rows = rich.pose_tokens(scenes)
    best = rich_report.pose(rows, scenes)
    step = (rich.REACH["x"][1] - rich.REACH["x"][0]) / rich.BINS
    aside, turned, other, none = (rows.clone() for _ in range(4))
    aside[:, 4] += 10
    assert abs(rich_report.pose(aside, scenes)["corner"] - 10 * step) < best["corner"] + 1e-9
    turned[0, 7] += 1
    report, half = rich_report.pose(turned, scenes), raycaster.HALF[0] * world.RADIUS[1]
    chord = 2 * math.sqrt(2) * half * math.sin(math.pi / 16)  # of a corner that moves by 22.5 degrees
    assert report["turn"] == 0 and report["corner"] == pytest.approx(chord / 2, abs=0.05) and report["class"] == 1
    other[1, 1] += 1
    assert rich_report.pose(other, scenes)["class"] == 0.5
    none[1, 0] = rich.END
    assert rich_report.pose(none, scenes)["objects"] == 0.5 and rich_report.pose(none, scenes)["class"] == 0.5


# ------------------------------------------------------------------------------------------------------------
# Palettes and metadata

def test_palettes():
    red, blue = (list(raycaster.COLORS.values())[i] for i in (1, 2))
    three = torch.tensor([[1, 1, 0, 0, 0, 5, 2, 0, 1, 1, 1, 0, 4, 5, 1, 2, 0, 1, 0, 2, 2]])  # two of them red
    codes = torch.cat([one_object(2, color=2), one_object(0, color=2), three])
    scenes = world.build(codes)
    images, index = raycaster.render(scenes, compile=False)
    rows = rich.palette_tokens(scenes["color"], index)
    colors, present, number = rich.palette_colors(rows)
    assert number.tolist() == [2, 2, 3] == present.sum(1).tolist()
    assert colors[0, :2].tolist() == [[133] * 3, list(blue)], "the floor has the larger area"
    floor, first, second, third = torch.bincount(index[2].flatten() + 1, minlength=4).tolist()
    area = {(133,) * 3: floor, red: first + second, blue: third}
    assert [tuple(color) for color in colors[2, :3].tolist()] == sorted(area, key=area.get, reverse=True)
    albedo = images["rgb"][0, :, 63, 0] / (0.58 + 0.12 + 0.46 * math.sin(world.LAMP[1]))  # Lambert's law in open light
    assert albedo.tolist() == pytest.approx([133 / 255] * 3, abs=1 / 255)
    other = rows.clone()
    other[0, 1] += 30
    assert rich_report.palette(other, rows) == {"number": 1, "error": pytest.approx(30 / 7)}
    other[0, 0] += 1
    assert rich_report.palette(other, rows)["number"] == pytest.approx(2 / 3)


def test_picture_values_match_closed_forms():
    pictures = torch.zeros(3, 3, 8, 8)
    pictures[0] = 0.5
    pictures[1, 0] = 1  # red
    pictures[2, :, :4] = 1  # half white, half black
    told = rich.picture_values(pictures)
    expected = {"brightness": [0.5, 0.299, 0.5], "contrast": [0, 0, 0.5], "saturation": [0, 1, 0],
                "colourfulness": [0, 0.3 * math.hypot(1, 0.5), 0], "entropy": [0, 0, 1]}
    for name, values in expected.items():
        assert told[name].tolist() == pytest.approx(values, abs=1e-6), name


def test_metadata_of_validation_scenes(frozen):
    scenes, images, index = frozen
    scenes = {name: value.float() if value.is_floating_point() else value for name, value in scenes.items()}
    values = rich.metadata_of(scenes, images["rgb"], index)
    told = dict(zip(rich.META, values.unbind(1)))
    single = (scenes["shape"] >= 0).sum(1) == 1
    assert told["hidden"][single].abs().max() < 1e-9 < told["hidden"].max() <= 1 - world.LEAST_VISIBLE + 0.05
    assert torch.equal(told["objects"].long(), (scenes["shape"] >= 0).sum(1))
    assert (told["kinds"] <= told["objects"]).all() and told["kinds"].max() == 3
    rows = rich.metadata_tokens(values)
    again = rich.metadata_values(rows)
    for i, (name, (low, high)) in enumerate(rich.META.items()):
        half = 0 if name in rich.NUMBERS else (high - low) / rich.META_BINS / 2
        assert (again - values)[:, i].abs().max() <= half + 1e-9, (name, "beyond what its bins span")
    assert set(rich_report.metadata(rows, values).values()) == {1.0}
    pairs = rows[:, :-1].view(-1, len(rich.META), 2)
    mixed = torch.cat([pairs.flip(1).flatten(1), rows[:, -1:]], 1)
    assert torch.equal(rich.metadata_values(mixed), again), "in any order"
    far = rows.clone()
    far[:, 9] += torch.where(far[:, 9] < 2 + 9 + 16, 2, -2)  # the value of the fifth pair, brightness, two bins away
    report = rich_report.metadata(far, values)
    assert report["brightness"] == 0 and report["contrast"] == 1
    assert rich_report.metadata(rows.new_tensor([[rich.END] + [rich.PAD] * 18]), values[:1])["objects"] == 0


# ------------------------------------------------------------------------------------------------------------
# Bad input

@pytest.mark.parametrize("records", [rich.POLYGON, rich.POSE, rich.PALETTE, rich.METADATA])
def test_bad_rows(records):
    for rows, said in ((np.zeros((2, 5), int), "of shape"), (np.zeros((2, records.length)), "whole numbers"),
                       (np.full((1, records.length), records.vocab), f"0 to {records.vocab - 1}"),
                       (np.full((1, records.length), -1), "not -1")):
        with pytest.raises(Fault) as fault:
            records.unpack(rows)
        assert records.name in str(fault.value) and said in str(fault.value)
    values, present = records.unpack(np.zeros((0, records.length), np.uint16))
    assert len(values) == len(present) == 0
    swapped = torch.zeros(1, records.most, len(records.fields), dtype=torch.long)
    rows = records.pack(swapped, torch.ones(1, records.most, dtype=torch.bool))
    rows[0, records.numbered + len(records.fields)] = rich.END  # the second record begins with an end token
    assert records.unpack(rows)[1].tolist() == [[True] + [False] * (records.most - 1)]
