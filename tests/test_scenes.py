"""The scenes world: the ray caster against closed forms and slow code, texts and boxes against the pictures."""
import functools
import hashlib
import itertools
import math
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import raycaster
import scenes as maker
import texts
import tokenizer
import world

FLAT = functools.partial(raycaster.render, compile=False)
SEEDS = (3, 4, 1 << 32, (1 << 32) + 1, 2 << 32, (2 << 32) + 1, 1 << 52)  # as training and validation sets use them
SLOTS = range(raycaster.MAX_OBJECTS)
CODES = "9f67e7e1d1ada83d 8421638603c29a29"  # sha256 of 200 random scenes and close-ups: the world changes it, no machine
UP = np.array([0.0, 0.0, 1.0])


@pytest.fixture(scope="module")
def rendered():
    """100 scenes with their pictures, object index and facts."""
    scenes = world.build(world.sample_scenes(100, seed=11))
    images, index = FLAT(scenes)
    return scenes, images, index, texts.facts(scenes, index)


def one_object(shape, center, radius=1.0, theta=0.0, camera=(0.1, 0.6, 60.0), lamp=(-0.6, -0.16, 0.784)):
    """A scene with a single object in slot 2, or none for shape -1."""
    scenes = {name: torch.full((1, 3), -1) for name in ("shape", "color", "material", "size")}
    scenes |= {"center": torch.zeros(1, 3, 3), "radius": torch.ones(1, 3), "theta": torch.zeros(1, 3),
               "camera": torch.tensor([camera]), "lamp": torch.tensor([lamp])}
    scenes["shape"][0, 2], scenes["color"][0, 2], scenes["material"][0, 2], scenes["size"][0, 2] = shape, 1, 0, 1
    scenes["center"][0, 2], scenes["radius"][0, 2], scenes["theta"][0, 2] = torch.tensor(center), radius, theta
    return scenes


def camera_of(camera):
    """Eye, right, up, forward of a camera row, in float64 and from angles alone."""
    a, e, distance = np.asarray(camera, np.float64)
    back = np.array([math.sin(a) * math.cos(e), -math.cos(a) * math.cos(e), math.sin(e)])
    right = np.cross(-back, UP) / np.linalg.norm(np.cross(-back, UP))
    return np.array([0, 0, 0.4]) + distance * back, right, np.cross(right, -back), -back


def slow_hit(shape, half, o, d):
    """First hit (t, normal) of one ray with an unrotated object at 0: every surface in turn, the nearest valid one."""
    found = []
    if shape in (0, 2):  # planes: six faces of the cube, two caps of the cylinder
        for axis, sign in itertools.product(range(3) if shape == 0 else [2], (-1, 1)):
            t = (sign * half - o[axis]) / d[axis]
            p = np.delete(o + t * d, axis)
            if np.abs(p).max() < half if shape == 0 else np.linalg.norm(p) < half:
                found.append((t, sign * np.eye(3)[axis]))
    if shape in (1, 2):
        flat = np.array([1, 1, 1 if shape == 1 else 0])
        for t in np.roots([(flat * d) @ d, 2 * (flat * o) @ d, (flat * o) @ o - half ** 2]):
            p = o + t.real * d
            if abs(t.imag) < 1e-12 and (shape == 1 or abs(p[2]) < half):
                found.append((t.real, flat * p / half))
    return min((f for f in found if f[0] > 0), key=lambda f: f[0], default=(math.inf, np.zeros(3)))


# ------------------------------------------------------------------------------------------------------------
# Ray caster

def test_sphere_picture_matches_closed_form():
    camera, center, r, S = (0.1, 0.6, 20.0), np.array([0.0, 0.0, 0.4]), raycaster.HALF[1] * 0.42, 129
    _, z, n, ids = raycaster.render_samples(one_object(1, center.tolist(), 0.42, camera=camera), S)
    middle = S * S // 2
    assert z[0, middle].item() == pytest.approx(20 - r, abs=1e-4)
    assert n[0, :, middle].tolist() == pytest.approx([0, 0, 1], abs=1e-4)
    eye, right, up, forward = camera_of(camera)
    x, y = np.meshgrid(*2 * [((np.arange(S) + 0.5) / S * 2 - 1) * math.tan(math.radians(2.92))])
    d = forward + x.reshape(-1, 1) * right - y.reshape(-1, 1) * up
    d /= np.linalg.norm(d, axis=1, keepdims=True)
    b, c = d @ (eye - center), (eye - center) @ (eye - center) - r * r
    hit = b * b > c
    t = np.where(hit, -b - np.sqrt(np.maximum(b * b - c, 0)), -eye[2] / d[:, 2])
    normal = np.where(hit[:, None], (eye + t[:, None] * d - center) / r, UP) @ np.stack([right, up, -forward], 1)
    clear = np.abs(b * b - c) > 3e-3  # not along the silhouette, where float32 may decide otherwise
    assert hit[clear].sum() > 100 and clear.mean() > 0.99
    assert (ids[0].numpy() == np.where(hit, 2, -1))[clear].all()
    np.testing.assert_allclose(z[0].numpy()[clear], (t * (d @ forward))[clear], atol=1e-3)
    np.testing.assert_allclose(n[0].numpy().T[clear], normal[clear], atol=5e-3)


@pytest.mark.parametrize("shape", [0, 1, 2])
def test_hits_match_a_slow_implementation(shape):
    rng, center, theta, radius = np.random.default_rng(shape), np.array([0.5, -1.0, 0.9]), 0.7, 1.1
    o = center + 6 * rng.normal(size=(600, 3))
    d = center + rng.uniform(-1.1, 1.1, (600, 3)) - o
    d /= np.linalg.norm(d, axis=1, keepdims=True)
    scenes = {name: v.double() if v.is_floating_point() else v
              for name, v in one_object(shape, center.tolist(), radius, theta).items()}
    scenes["center"][0, 2] = torch.from_numpy(center)
    scenes["radius"][0, 2], scenes["theta"][0, 2] = radius, theta
    t, n = raycaster.intersect(raycaster.object_at(scenes, 2), *(tuple(torch.from_numpy(v.T.copy())[:, None]) for v in (o, d)))
    turn = np.array([[math.cos(theta), -math.sin(theta), 0], [math.sin(theta), math.cos(theta), 0], UP])
    half = float(np.float32(raycaster.HALF[shape])) * radius
    outside = [i for i in range(600) if np.linalg.norm(o[i] - center) > 2]
    slow = [slow_hit(shape, half, (o[i] - center) @ turn, d[i] @ turn) for i in outside]
    times, normals = np.array([s[0] for s in slow]), np.array([turn @ s[1] for s in slow])
    hit = np.isfinite(times)
    assert 0.3 < hit.mean() < 0.99
    np.testing.assert_allclose(t[0].numpy()[outside], times, atol=1e-6)
    np.testing.assert_allclose(torch.cat(n).numpy().T[outside][hit], normals[hit], atol=1e-5)
    assert (raycaster.intersect(raycaster.object_at(scenes, 1), *((v,) * 3 for v in (t, t)))[0] == math.inf).all()  # an empty slot


def test_pictures_are_well_formed(rendered):
    scenes, images, index, _ = rendered
    assert set(images) == set(maker.IMAGES) and all(v.shape == (100, 3, 64, 64) for v in images.values())
    assert all(0 <= v.min() and v.max() <= 1 and v.std() > 0.05 for v in images.values())
    assert (((images["normal"] * 2 - 1).norm(dim=1) - 1).abs() < 1e-3).all()
    assert images["depth"].min() > 0 and images["depth"].max() < 1, "a depth was clamped: NEAR and FAR are too close"
    palette = torch.tensor(raycaster.SEG_PALETTE) / 255
    for b, k in itertools.product(range(100), range(-1, 3)):
        kind = 0 if k < 0 else scenes["shape"][b, k] + 1
        assert (images["seg"][b][:, index[b] == k] == palette[kind][:, None]).all()


@pytest.mark.parametrize("lamp_x", [-4.0, 4.0])
@pytest.mark.parametrize("shape", [0, 1, 2])
def test_shadow_darkens_the_ground(shape, lamp_x):
    center, lamp = np.array([0.0, 0.0, 0.8]), np.array([lamp_x, -1.5, 2.0])
    lamp, ground = lamp / np.linalg.norm(lamp), center - lamp * center[2] / lamp[2]
    shaded, bare = (one_object(s, center.tolist(), lamp=tuple(lamp)) for s in (shape, -1))
    x, y, _ = raycaster.project(bare | {"center": torch.tensor(ground, dtype=torch.float32).expand(1, 3, 3)})
    row, column = int(y[0, 0] * 64), int(x[0, 0] * 64)
    dark, light = raycaster.render_batch(shaded, 64), raycaster.render_batch(bare, 64)
    assert dark["index"][0, row, column] == -1
    assert (dark["rgb"][0, :, row, column] < 0.8 * light["rgb"][0, :, row, column]).all()
    far = (63, 0) if lamp_x < 0 else (63, 63)  # a corner that no shadow reaches
    assert torch.equal(dark["rgb"][0, :, far[0], far[1]], light["rgb"][0, :, far[0], far[1]])


def test_canny():
    step = torch.zeros(1, 3, 32, 32)
    step[..., 16:] = 1
    edge = raycaster.canny(step)[0]
    assert (edge.sum(1) == 1).all() and edge[:, 15:17].sum() == 32
    assert torch.equal(raycaster.canny(step.transpose(2, 3))[0], edge.T)
    diagonal = raycaster.canny((torch.arange(32) > torch.arange(32)[:, None]).float().expand(1, 3, 32, 32))[0]
    assert set(diagonal[4:28].sum(1).tolist()) <= {1.0, 2.0}  # both sides of an exact diagonal are equally steep
    assert raycaster.canny(torch.full((1, 3, 32, 32), 0.7)).sum() == 0


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_compiled_render_agrees(rendered):
    scenes, images, index, _ = rendered
    fast, fast_index = raycaster.render({name: v[:50] for name, v in scenes.items()})
    assert (fast_index == index[:50]).float().mean() > 0.9995
    for m in ("rgb", "depth", "normal", "seg", "edge"):
        assert ((fast[m] - images[m][:50]).abs() > 2e-3).float().mean() < 1e-3, m


# ------------------------------------------------------------------------------------------------------------
# Sampling

def test_seeds():
    first, again = world.sample_scenes(20, 3), world.sample_scenes(20, 3)
    assert torch.equal(first, again) and first.shape == (20, 21) and first.dtype == torch.int64
    assert torch.equal(world.sample_close_ups(20, 3), world.sample_close_ups(20, 3))
    for sample in (world.sample_scenes, world.sample_close_ups):
        assert len({sample(20, seed).numpy().tobytes() for seed in SEEDS}) == len(SEEDS), "seeds give the same scenes"


def test_codes_are_the_same_on_any_machine():
    """They are whole numbers: here, and where torch computes as on a CPU without AVX-512."""
    code = ("import hashlib, sys; sys.path.insert(0, 'data'); import world; print(*(hashlib.sha256(codes.numpy()"
            ".astype('<i8').tobytes()).hexdigest()[:16] for codes in (world.sample_scenes(200, 3), "
            "world.sample_close_ups(200, 3))))")
    for capability in ({}, {"ATEN_CPU_CAPABILITY": "avx2"}):
        there = subprocess.run([sys.executable, "-c", code], cwd=maker.ROOT.parent, env=os.environ | capability, check=True,
                               capture_output=True, text=True).stdout
        assert there.strip() == CODES, capability


def test_a_code_is_a_look():
    codes = torch.cat([world.sample_scenes(1000, seed) for seed in SEEDS[:2]])
    looks = world.look(codes)
    assert looks.dtype == np.int64 and looks.min() >= 0
    assert len(np.unique(looks)) == len(torch.unique(codes, dim=0)) > 1700
    assert (world.look(codes.flip(0)) == looks[::-1]).all() and (looks == world.look(codes.numpy())).all()
    for field in range(codes.shape[1]):  # every single number counts
        changed = codes[:200].clone()
        changed[:, field] = torch.where(changed[:, field] > 0, changed[:, field] - 1, changed[:, field] + 1)
        assert (world.look(changed) != looks[:200]).all(), field


def extents(scenes, k, pixels=128):
    """Where object k of every scene is when it is alone: (n, 4) xmin, ymin, xmax, ymax as shares of the frame, and its
    mask (n, pixels, pixels)."""
    alone = {name: value[:, k:k + 1] if value.dim() > 1 and name not in ("camera", "lamp") else value
             for name, value in scenes.items()}
    ids = raycaster.trace(alone, *raycaster.primary_rays(alone, pixels))[1].unflatten(1, (pixels, pixels)) >= 0
    boxes = torch.tensor(texts.pixel_boxes(torch.where(ids, 0, -1)))[:, 0] + torch.tensor([0, 0, 1, 1])
    return boxes / pixels, ids


def test_objects_are_large_apart_visible_and_counted_evenly():
    codes = world.sample_scenes(600, seed=5)
    scenes = world.build(codes)
    exists = scenes["shape"] >= 0
    share = exists.sum(1).bincount(minlength=4) / 600
    assert share[0] == 0 and ((share[1:] - 1 / 3).abs() < 0.07).all() and raycaster.MAX_OBJECTS == 3
    assert torch.equal(exists, torch.arange(3) < exists.sum(1, keepdim=True)), "the first slots are used"
    half = scenes["radius"] * torch.tensor(raycaster.HALF)[scenes["shape"].clamp(min=0)]
    assert (scenes["center"][..., 2] - half)[exists].abs().max() < 1e-5, "it stands on the ground"
    foot = torch.where(scenes["shape"] == 0, half * 2 ** 0.5, half)  # a cube reaches as far as its corners
    for i, j in itertools.combinations(SLOTS, 2):
        gap = (scenes["center"][:, i] - scenes["center"][:, j])[:, :2].norm(dim=1)
        assert (gap > foot[:, i] + foot[:, j] - 0.05)[exists[:, i] & exists[:, j]].all(), "the camera is not infinitely far"
    some = {name: value[:60] for name, value in scenes.items()}
    together = raycaster.trace(some, *raycaster.primary_rays(some, 128))[1].unflatten(1, (128, 128))
    for k in SLOTS:
        there, (boxes, alone) = exists[:60, k], extents(some, k)
        boxes, sizes = boxes[there], alone.sum((1, 2))[there]
        assert (boxes[:, 2] - boxes[:, 0]).min() >= 0.28, "narrower than 28 % of the frame"
        visible = (together == k).sum((1, 2))[there] / sizes
        assert visible.min() >= world.LEAST_VISIBLE - 0.05, "of the 32 x 32 rays that the sampler traces"
        across, up = world.extent(some["shape"][there, k], some["theta"][there, k], some["radius"][there, k])
        x, y, _ = raycaster.project(some)
        for place, reach in ((x, across), (y, up)):
            edge = (place[there, k] - 0.5).abs() + reach
            assert edge.max() <= 0.5 + world.BORDER + 1e-4, "out of the frame"


def test_places_and_order():
    codes = world.sample_scenes(1500, seed=6)
    objects = codes.view(-1, 3, len(world.FIELDS))
    row, column = objects[..., 5], objects[..., 6]
    exists = objects[..., 0] >= 0
    assert (objects[~exists] == -1).all() and (objects[exists] >= 0).all()
    after = exists[:, 1:]
    assert (row[:, 1:] <= row[:, :-1])[after].all(), "nearest first: the lowest row of the picture"
    same = after & (row[:, 1:] == row[:, :-1])
    assert same.sum() > 50 and (column[:, 1:] > column[:, :-1])[same].all(), "and from left to right in a row"
    assert (objects[..., 4][exists & (objects[..., 0] > 0)] == 0).all(), "round shapes have no turn"
    most = (3, 8, 2, 2, world.TURNS, world.PLACES, world.PLACES)
    for field, values in enumerate(most):
        met = objects[..., field][exists].unique()
        assert met.min() >= 0 and met.max() < values and len(met) >= values - 4, world.FIELDS[field]
    for name, values in (("shape", 3), ("color", 8), ("material", 2), ("size", 2)):
        share = objects[..., world.FIELDS.index(name)][exists].bincount(minlength=values) / exists.sum()
        assert (share * values - 1).abs().max() < 0.15, (name, share)
    x, y, _ = raycaster.project(world.build(codes, torch.double))
    middle = (torch.stack([column, row], 2) + 0.5) / world.PLACES
    assert (torch.stack([x, y], 2) - middle)[exists].abs().max() < 1e-6, "an object is in the middle of its cell"


def test_validation_looks_are_kept_out():
    validation = maker.validation_looks("scenes")
    assert maker.validation_looks("qa") is validation and len(validation) == maker.VALIDATION
    again = world.sample_scenes(maker.VALIDATION, maker.VALIDATION_SEED)
    assert np.array_equal(world.look(again), validation), "the frozen scenes follow from their seed"
    free = world.sample_scenes(600, 1 << 32)
    met = np.isin(world.look(free), validation)
    single = (free[:, len(world.FIELDS)] == -1).numpy()
    assert met[single].mean() > 0.05 and met[~single].mean() < 0.005, "scenes of one object meet again by chance"
    codes = maker.sample("qa", 600, 1 << 32, validation)
    assert not np.isin(world.look(codes), validation).any()
    assert (codes[:, len(world.FIELDS)] == -1).sum() == single.sum(), "they are drawn again"
    assert torch.equal(codes[:5], maker.sample("scenes", 600, 1 << 32, validation)[:5])


# ------------------------------------------------------------------------------------------------------------
# Close-ups

def test_close_ups_fill_the_frame():
    codes = world.sample_close_ups(300, seed=5)
    assert codes.shape == (300, 7) and world.close_up(codes) and not world.close_up(world.sample_scenes(2, 1))
    scenes = world.build(codes)
    boxes, _ = extents(scenes, 0)
    width = boxes[:, 2] - boxes[:, 0]
    low, high = world.CLOSE_WIDTH
    assert (low, high) == (0.45, 0.65) and width.min() > low - 0.02, "as wide as that at the object's centre"
    assert width.max() < 1.1 * high, "what is nearer to the camera is larger"
    assert width.quantile(0.1) < low + 0.05 and width.quantile(0.9) > high - 0.04
    margins = torch.cat([boxes[:, :2], 1 - boxes[:, 2:]], 1)
    assert margins.min() >= 0 and margins.median() > 0.05, "inside the frame"
    assert all(len(codes[:, field].unique()) > 290 for field in (3, 4, 5, 6)), "turn, size and place are continuous"
    counts = (codes[:, 0] * 8 + codes[:, 1]).bincount(minlength=24)
    assert len(counts) == len(world.CLASSES) == 24 and counts.min() > 3
    large = width[scenes["size"][:, 0] == 1]
    assert large.min() > width[scenes["size"][:, 0] == 0].max() - 0.08, "size is a name for the width"


def test_no_close_up_is_a_copy_of_a_validation_picture():
    """Of 2,000 and 2,000 the pairs that are the most alike by their codes differ as pictures."""
    ours, theirs = world.sample_close_ups(2000, 1 << 32), world.sample_close_ups(2000, maker.VALIDATION_SEED)
    place = torch.tensor([0, 1, 1, 1]) / world.FINE  # the turn, of a cube alone, is left out: pairs can only be more alike
    distance = torch.cdist(ours[:, 3:] * place, theirs[:, 3:] * place)
    distance += (ours[:, None, :3] != theirs[None, :, :3]).any(2)
    nearest = distance.flatten().topk(20, largest=False).indices
    assert distance.min() < 0.05, "pairs of the same shape, colour and material"
    first, second = (FLAT(world.build(codes))[0]["rgb"] * 255
                     for codes in (ours[nearest // 2000], theirs[nearest % 2000]))
    differ = ((first - second).abs() > 8).float().mean((1, 2, 3))
    assert differ.min() > 0.003, differ


# ------------------------------------------------------------------------------------------------------------
# Texts and boxes

def test_facts_match_the_picture(rendered):
    scenes, _, index, facts = rendered
    for b, objects in enumerate(facts):
        eye, right, up, forward = camera_of(scenes["camera"][b])
        offset = scenes["center"][b].double().numpy() - eye
        depth = offset @ forward
        place = 0.5 + np.stack([offset @ right, -offset @ up], 1) / (2 * math.tan(math.radians(2.92)) * depth[:, None])
        there = [k for k in SLOTS if scenes["shape"][b, k] >= 0]
        assert there == list(range(len(objects)))
        assert (np.diff(place[there, 1]) < 1e-3).all(), "nearest first: from the bottom of the picture to its top"
        for k, o in enumerate(objects):
            scale = 2 * math.tan(math.radians(2.92)) * (offset[k] @ forward)
            assert abs(o["x"] + 0.5 - 100 * (0.5 + offset[k] @ right / scale)) < 0.51
            assert abs(o["y"] + 0.5 - 100 * (0.5 - offset[k] @ up / scale)) < 0.51
            words = [("shape", raycaster.SHAPES), ("color", list(raycaster.COLORS)), ("material", raycaster.MATERIALS),
                     ("size", raycaster.SIZES)]
            assert all(o[name] == names[scenes[name][b, k]] for name, names in words)
            rows, columns = np.nonzero(index[b].numpy() == k)
            assert len(rows) > 100, "hardly visible"
            assert o["box"] == [columns.min(), rows.min(), columns.max(), rows.max()]


def test_texts_name_every_object_and_fit():
    index, encoding = torch.zeros(500, 1, 1, dtype=torch.long), tokenizer.load_text()
    for b, objects in enumerate(texts.facts(world.build(world.sample_scenes(500, seed=6)), index)):
        desc, caption = texts.describe(objects), texts.caption(objects, random.Random(b))
        for m, text in (("desc", desc), ("caption", caption)):
            assert len(tokenizer.text_tokens(encoding, text, texts.LENGTHS[m])) == texts.LENGTHS[m]
        assert len(encoding.encode_ordinary(desc)) == 5 * len(objects), "a token per fact"
        kept = ("x", "y", "shape", "color", "material")
        assert texts.parse_desc(desc) == [{name: o[name] for name in kept} for o in objects]
        nouns = [f"{o['size']} {o['color']} {o['material']} {o['shape']}" for o in objects]
        assert all(caption.lower().count(noun) == nouns.count(noun) for noun in nouns), caption
    assert texts.parse_desc("Object 1 - Position: x=1 y=2 Shape: cube Color: Object 2 - Position: x=3") == []


@pytest.mark.parametrize("size", [64, 128])
def test_boxes_round_trip(rendered, size):
    for objects in rendered[3]:
        objects = [o | {"box": [v * size // 64 for v in o["box"]]} for o in objects]
        row = texts.box_tokens(objects, size)
        assert len(row) == texts.LENGTHS["bbox"] and 0 <= min(row) and max(row) < texts.BBOX_VOCAB
        assert texts.parse_boxes(row) == [(*(v * 64 // size for v in o["box"]), o["shape"]) for o in objects]
    good = [2, 66, 130, 194, 258]
    assert texts.parse_boxes(good + [2, 2, 2, 2, 2] + good) == 2 * [(0, 0, 0, 0, "cube")]
    assert texts.parse_boxes(good[:4] + [300, 1]) == [], "a class that does not exist"
