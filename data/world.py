"""The scenes world: a procedural, CLEVR-style world of one to three large objects on a floor, a camera and a lamp.

A scene is a row of whole numbers, its codes: of these, pictures, texts and questions follow, and two scenes of the same
codes look the same. In the scenes and qa sets everything moves in steps: objects stand in the middle of a cell of the
token grid, so that an object looks alike wherever it stands, and an empty patch has few tokens. The objects set shows
one object in close-up, which moves, turns and grows as good as continuously.

raycaster.py renders a scene, texts.py and questions.py write about it.
"""
import hashlib
import math

import numpy as np
import torch

from raycaster import (COLORS, FOV, HALF, MATERIALS, MAX_OBJECTS, SHAPES, SIZES, intersect, object_at, primary_rays, trace,
                       unproject)
from shards import FROZEN

FIELDS = ("shape", "color", "material", "size", "turn", "row", "column")  # codes of an object, -1 where there is none
LAMP = (-2.3, 0.85)  # azimuth and elevation in radians: in front on the left
CAMERA = (0.0, 0.62, 60.0)  # azimuth, elevation, distance
RADIUS = (1.3, 1.65)  # world units, of a small / large object
PLACES, TURNS = 8, 4  # cells across the frame and down it; turns of a cube, which then shows different sides
GAP = 0.1  # world units between two objects at least
LARGE = 75  # percent of objects that are drawn large: small ones find a place more often, half and half remain
LEAST_VISIBLE = 0.5  # of an object: as much as that is not behind others
BORDER = 0.015  # of the frame: as far may an object's corner lie beyond it
FINE = 1 << 16  # steps of what moves continuously
CLOSE_WIDTH = (0.45, 0.65)  # of the frame, of an object in close-up
ATTEMPTS = 4  # layouts drawn at once for each scene that has none yet
FRAME = 2 * math.tan(FOV / 2) * CAMERA[2]  # world units across the frame
CLASSES = tuple(f"{color} {shape}" for shape in SHAPES for color in COLORS)  # of the objects set: shape * 8 + color


def generator(seed):
    """A random generator for a seed of any size: torch's reads only 32 bits of one."""
    digest = hashlib.sha256(str(seed).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


# ------------------------------------------------------------------------------------------------------------
# From codes to scenes

def extent(shape, theta, radius):
    """Half width and half height in the picture, as shares of the frame: the bounds of objects' outlines."""
    half = radius * torch.tensor(HALF, dtype=radius.dtype)[shape.clamp(min=0)]
    across = torch.where(shape == 0, half * (theta.cos().abs() + theta.sin().abs()), half)
    box = half * math.cos(CAMERA[1]) + across * math.sin(CAMERA[1])  # from the top's far edge to the bottom's near one
    return across / FRAME, torch.where(shape == 1, half, box) / FRAME


def build(codes, dtype=torch.float32):
    """The scenes of codes (n, 7 K) int64, K = 3 in the scenes and qa sets, 1 in the objects set: a dict of tensors.

    shape, color, material, size: (n, K) indices, -1 where there is no object; center (n, K, 3) and radius (n, K) in
    world units; theta (n, K) rotation about z in radians; camera (n, 3) azimuth, elevation and distance; lamp (n, 3), the
    direction towards it. Computed in float64: rounding is nothing that a set may depend on.
    """
    code = dict(zip(FIELDS, codes.view(len(codes), -1, len(FIELDS)).unbind(2)))
    step = {name: code[name].clamp(min=0).double() for name in FIELDS}
    scenes = {name: code[name] for name in ("shape", "color", "material", "size")}
    if close_up(codes):
        scenes["theta"] = step["turn"] / FINE * math.pi / 2
        width = CLOSE_WIDTH[0] + (CLOSE_WIDTH[1] - CLOSE_WIDTH[0]) * step["size"] / FINE
        scenes["radius"] = width / 2 / extent(code["shape"], scenes["theta"], torch.ones_like(width))[0]
        scenes["size"] = code["size"] * len(SIZES) // FINE
        margin_x, margin_y = extent(code["shape"], scenes["theta"], scenes["radius"])
        x = margin_x + (1 - 2 * margin_x) * step["column"] / FINE
        y = margin_y + (1 - 2 * margin_y) * step["row"] / FINE
    else:
        scenes["theta"] = step["turn"] / TURNS * math.pi / 2
        scenes["radius"] = torch.tensor(RADIUS, dtype=torch.double)[code["size"].clamp(min=0)]
        x, y = (step["column"] + 0.5) / PLACES, (step["row"] + 0.5) / PLACES
    scenes["camera"] = torch.tensor(CAMERA, dtype=torch.double).expand(len(codes), 3)
    azimuth, elevation = LAMP
    lamp = (math.cos(azimuth) * math.cos(elevation), math.sin(azimuth) * math.cos(elevation), math.sin(elevation))
    scenes["lamp"] = torch.tensor(lamp, dtype=torch.double).expand(len(codes), 3)
    height = scenes["radius"] * torch.tensor(HALF, dtype=torch.double)[code["shape"].clamp(min=0)]
    columns = [unproject(scenes, *(value[:, k, None] for value in (x, y, height))) for k in range(x.size(1))]
    scenes["center"] = torch.cat(columns, 1)
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in scenes.items()}


def close_up(codes):
    return codes.shape[1] == len(FIELDS)


def look(codes):
    """A number per scene of the scenes or qa sets, (n,) int64 array, from its codes (n, 21): one for each look."""
    radix = (len(SHAPES), len(COLORS), len(MATERIALS), len(SIZES), TURNS, PLACES, PLACES)
    slots = np.asarray(codes).reshape(len(codes), MAX_OBJECTS, len(FIELDS)) + 1
    number = np.zeros(len(codes), np.int64)
    for k in range(MAX_OBJECTS):
        for field, values in enumerate(radix):
            number = number * (values + 1) + slots[:, k, field]
    return number


# ------------------------------------------------------------------------------------------------------------
# Random codes

def sample_close_ups(n, seed):
    """Codes (n, 7) int64 of n scenes of the objects set, the same for the same seed on any machine."""
    rng = generator(seed)
    most = (len(SHAPES), len(COLORS), len(MATERIALS), FINE, FINE, FINE, FINE)
    return torch.stack([torch.randint(count, (n,), generator=rng) for count in most], 1)


def sample_scenes(n, seed, avoid=()):
    """Codes (n, 21) int64 of n scenes of the scenes and qa sets, the same for the same seed on any machine.

    Objects stand nearest first, on the lowest row of the picture, and from left to right in a row. None touches another
    or leaves the frame, and each shows LEAST_VISIBLE of itself. avoid: looks to leave out.
    """
    rng = generator(seed)
    # how many objects and their shapes are fixed first: three objects and cubes, which need more room, are not rare
    counts = torch.randint(1, MAX_OBJECTS + 1, (n,), generator=rng)
    shapes = torch.randint(len(SHAPES), (n, MAX_OBJECTS), generator=rng)
    result, pending = torch.zeros(n, MAX_OBJECTS * len(FIELDS), dtype=torch.long), torch.arange(n)
    while len(pending):
        layouts, fits = draw_layouts(counts[pending].repeat(ATTEMPTS), shapes[pending].repeat(ATTEMPTS, 1), rng)
        first = fits.view(ATTEMPTS, -1).float().argmax(0)  # attempt that fits, for every pending scene
        rows = first * len(pending) + torch.arange(len(pending))
        codes = layouts[rows]
        done = fits[rows] & all_visible(codes) & torch.from_numpy(~np.isin(look(codes), avoid))
        result[pending[done]] = codes[done]
        pending = pending[~done]
    return result


def draw_layouts(counts, shapes, rng):
    """Codes (B, 21) of random scenes with counts (B,) objects of shapes (B, 3), and whether all found a place (B,)."""
    B, exists = len(counts), torch.arange(MAX_OBJECTS) < counts[:, None]  # (B, 3)
    most = {"color": len(COLORS), "material": len(MATERIALS), "size": 100, "turn": TURNS}
    code = {name: torch.randint(count, (B, MAX_OBJECTS), generator=rng) for name, count in most.items()}
    code["shape"] = shapes
    code["size"] = (code["size"] < LARGE).long()
    code["turn"] *= code["shape"] == 0  # round shapes have no sides
    code["row"], code["column"], found = place_objects(code, exists, rng)
    order = (code["row"] * PLACES - code["column"]).masked_fill(~exists, -PLACES).argsort(1, descending=True)
    fields = torch.stack([code[name].masked_fill(~exists, -1).gather(1, order) for name in FIELDS], 2)
    return fields.flatten(1), found


def place_objects(code, exists, rng, tries=16):
    """Put the objects down one after another, each on the first of some random cells on which it has room.

    Returns rows and columns (B, 3) and whether every object found a cell (B,).
    """
    B, K = exists.shape
    radius = torch.tensor(RADIUS, dtype=torch.double)[code["size"]]
    half = radius * torch.tensor(HALF, dtype=torch.double)[code["shape"]]
    footprint = torch.where(code["shape"] == 0, math.sqrt(2) * half, half)
    across, up = extent(code["shape"], code["turn"].double() / TURNS * math.pi / 2, radius)
    row, column, found = torch.zeros(B, K, dtype=torch.long), torch.zeros(B, K, dtype=torch.long), exists.new_ones(B)
    for k in range(K):
        rows, columns = torch.randint(PLACES, (2, B, tries), generator=rng)
        x, y = (columns + 0.5) / PLACES, (rows + 0.5) / PLACES
        room = torch.maximum((x - 0.5).abs() + across[:, k, None], (y - 0.5).abs() + up[:, k, None]) < 0.5 + BORDER
        for j in range(k):
            # on the floor, which the camera sees foreshortened; a larger object's centre is higher in the picture
            aside = (columns - column[:, j, None]) / PLACES * FRAME
            higher = (row[:, j, None] - rows) / PLACES * FRAME
            behind = (higher - (half[:, k] - half[:, j])[:, None] * math.cos(CAMERA[1])) / math.sin(CAMERA[1])
            room &= torch.hypot(aside, behind) > (footprint[:, k] + footprint[:, j] + GAP)[:, None]
        first = room.float().argmax(1, keepdim=True)
        row[:, k], column[:, k] = rows.gather(1, first)[:, 0], columns.gather(1, first)[:, 0]
        found &= room.any(1) | ~exists[:, k]
    return row, column, found


def all_visible(codes):
    """Whether every object shows LEAST_VISIBLE of itself, (B,), traced at 32 x 32 pixels."""
    if len(codes) > 500:  # what fits the caches
        return torch.cat([all_visible(part) for part in codes.split(500)])
    scenes = build(codes, torch.double)
    o, d = primary_rays(scenes, 32)
    ids = trace(scenes, o, d)[1]
    visible = torch.ones(len(codes), dtype=torch.bool)
    for k in range(MAX_OBJECTS):
        alone = (intersect(object_at(scenes, k), o, d)[0] < math.inf).sum(1)
        visible &= (ids == k).sum(1) >= LEAST_VISIBLE * alone
    return visible


def load_frozen_scenes(size, n, name="scenes"):
    """The first n validation scenes, to render their true pictures."""
    with np.load(FROZEN / f"{name}{size}.npz") as arrays:
        return build(torch.from_numpy(arrays["scene"][:n]).long())
