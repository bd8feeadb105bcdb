"""The scenes world: a procedural, CLEVR-style world of 1-4 objects on a ground plane, a camera and a lamp.

Jitter, turns and places come in steps and the camera looks from afar, so that an object looks alike wherever it stands
on the token grid, and a small model learns the world in minutes. Camera and objects turn by the same step: a cube then
shows four different sides. raycaster.py renders a scene, texts.py and questions.py write about it.
"""
import hashlib
import math

import numpy as np
import torch

from raycaster import (COLORS, HALF, MATERIALS, MAX_OBJECTS, SHAPES, SIZES, primary_rays, project, trace, unproject)
from shards import FROZEN

RADIUS = (0.72, 1.05)  # world units, of a small / large object's footprint
TURN = math.pi / 8  # radians
CAMERA_AZIMUTH, CAMERA_ELEVATION, CAMERA_DISTANCE = (-TURN, 0.0, TURN), (0.62,), (60.0,)
LAMP_AZIMUTH, LAMP_ELEVATION = 2.4, (0.85, 1.0)
PLACES = 8  # across the frame and down it: objects stand in the middle of one, not in those at the border
GAP = 0.5  # world units between the footprints of two objects, at least
MIN_VISIBLE = 0.012  # of the frame's pixels every described object shows at least
ATTEMPTS = 4  # layouts drawn at once for each scene that has none yet
CLASSES = tuple(f"{color} {shape}" for shape in SHAPES for color in COLORS)  # of the objects set: shape * 8 + color
LOOK = (len(SHAPES), len(COLORS), 2, 2, 4, 3, 2, PLACES, PLACES)  # values of what `look` counts, in its order


def generator(seed):
    """A random generator for a seed of any size: torch's reads only 32 bits of one."""
    digest = hashlib.sha256(str(seed).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def sample_scenes(n, seed, device="cpu", most=MAX_OBJECTS, avoid=()):
    """n valid scenes of 1 to `most` objects as a dict of tensors, the same for the same seed.

    shape, color, material, size: (n, 4) indices, -1 where there is no object; center (n, 4, 3) and radius (n, 4) in
    world units; theta (n, 4) rotation about z in radians; camera (n, 3) azimuth, elevation and distance; lamp (n, 3),
    the direction towards it.
    Objects never interpenetrate, lie in the frame and show at least MIN_VISIBLE of it. avoid: looks to leave out.
    """
    rng = generator(seed)
    counts = torch.randint(1, most + 1, (n,), generator=rng)  # fixed first, so that hard layouts do not become rare
    pending = torch.arange(n)
    result = None
    while len(pending):
        layouts, fits = draw_layouts(counts[pending].repeat(ATTEMPTS), rng)
        first = fits.view(ATTEMPTS, -1).float().argmax(0)  # attempt that fits, for every pending scene
        rows = first * len(pending) + torch.arange(len(pending))
        scenes = {name: value[rows] for name, value in layouts.items()}
        done = fits[rows] & all_visible(scenes, device)
        if len(avoid):
            done &= torch.from_numpy(~np.isin(look(scenes), avoid))
        if result is None:
            result = {name: value.new_zeros(n, *value.shape[1:]) for name, value in scenes.items()}
        for name, value in scenes.items():
            result[name][pending[done]] = value[done]
        pending = pending[~done]
    return {name: value.to(device) for name, value in result.items()}


def draw_layouts(counts, rng):
    """Random scenes with counts (B,) objects, and whether all their objects found a place (B,)."""
    B = len(counts)
    exists = torch.arange(MAX_OBJECTS) < counts[:, None]  # (B, 4)

    def index(count):
        return torch.randint(count, (B, MAX_OBJECTS), generator=rng).where(exists, torch.tensor(-1))

    def pick(values):
        return torch.tensor(values)[torch.randint(len(values), (B,), generator=rng)]

    scenes = {"shape": index(len(SHAPES)), "color": index(len(COLORS)), "material": index(len(MATERIALS)),
              "size": index(len(SIZES)), "theta": index(4).clamp(min=0) * TURN}
    scenes["radius"] = torch.tensor(RADIUS)[scenes["size"].clamp(min=0)]
    height = scenes["radius"] * torch.tensor(HALF)[scenes["shape"].clamp(min=0)]
    scenes["camera"] = torch.stack([pick(CAMERA_AZIMUTH), pick(CAMERA_ELEVATION), pick(CAMERA_DISTANCE)], 1)
    scenes["center"], fits = place_objects(scenes, exists, height, rng)
    elevation = pick(LAMP_ELEVATION)
    across = [math.cos(LAMP_AZIMUTH) * elevation.cos(), math.sin(LAMP_AZIMUTH) * elevation.cos()]
    scenes["lamp"] = torch.stack([*across, elevation.sin()], 1)
    return scenes, fits


def place_objects(scenes, exists, height, rng, tries=16):
    """Drop the objects one after another, each at the first of some random places in the frame that is free.

    Returns centres (B, 4, 3) and whether every object found a place (B,).
    """
    B, K = exists.shape
    center = torch.zeros(B, K, 3)
    found = torch.ones(B, dtype=torch.bool)
    radius = scenes["radius"]
    for k in range(K):
        x, y = (torch.randint(1, PLACES - 1, (2, B, tries), generator=rng) + 0.5) / PLACES
        spots = unproject(scenes, x, y, height[:, k, None])
        free = torch.ones(B, tries, dtype=torch.bool)
        for j in range(k):
            distance = (spots[..., :2] - center[:, j, None, :2]).norm(dim=-1)
            free &= distance > (radius[:, k] + radius[:, j] + GAP)[:, None]
        center[:, k] = spots[torch.arange(B), free.float().argmax(1)]
        found &= free.any(1) | ~exists[:, k]
    return center, found


def all_visible(scenes, device):
    """Whether every object shows at least MIN_VISIBLE of the frame, (B,), traced at 32 x 32 pixels on a device."""
    placed = {name: value.to(device) for name, value in scenes.items()}
    ids = trace(placed, *primary_rays(placed, 32))[1]
    share = torch.stack([(ids == k).float().mean(1) for k in range(MAX_OBJECTS)], 1).cpu()
    return ((share > MIN_VISIBLE) | (scenes["shape"] < 0)).all(1)


def look(scenes):
    """A number per one-object scene, (n,) int32 array in the mixed base LOOK: the same for scenes that look the same.

    The world moves in steps, so there are only 41,472 such pictures, and half of the validation scenes would look like
    one of 20,000 training scenes if those did not leave them out.
    """
    x, y, _ = project(scenes)
    shape, color, material, size, theta = (scenes[name][:, 0] for name in
                                           ("shape", "color", "material", "size", "theta"))
    turn = (theta / TURN).round() * (shape == 0)  # round shapes have no sides
    camera = (scenes["camera"][:, 0] / TURN).round() + 1
    lamp = scenes["lamp"][:, 2] > math.sin(sum(LAMP_ELEVATION) / 2)
    row, column = (y[:, 0] * PLACES).floor(), (x[:, 0] * PLACES).floor()
    steps = [shape, color, material, size, turn, camera, lamp, row, column]
    return np.ravel_multi_index([step.long().cpu().numpy() for step in steps], LOOK).astype(np.int32)


def load_frozen_scenes(size, n, name="scenes"):
    """The first n validation scenes, as sample_scenes gives them, to render their true pictures."""
    with np.load(FROZEN / f"{name}{size}.npz") as arrays:
        keys = [key for key in arrays if key.startswith("scene_")]
        return {key.removeprefix("scene_"): torch.from_numpy(arrays[key][:n]) for key in keys}
