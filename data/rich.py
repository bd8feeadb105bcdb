"""The rich set: instances, features, outlines, poses, palettes and metadata of the scenes set's scenes, as tokens and
back.

All of it is known exactly, because the world is ours. Objects are numbered nearest first, as in desc and bbox.

    inst      the object index as a picture of the shared tokenizer, one colour per number
    feat      what the judge's net makes of each of 8 x 8 cells, see features.py
    feat_global    the mean of these
    polygon   per object its box in 64 bins across, and which cells of an 8 x 8 grid in this box show it
    pose      per object shape, color, material and size, its place in the camera's frame, and how a cube is turned
    palette   how many colours there are, then red, green and blue of each as it is in white light, largest area first
    metadata  pairs of a type and its value in 32 bins, see META

Texts end with END and are filled up with PAD. The camera and the lamp are the same in every scene: no token
tells them. rich_report.py compares predictions with the truth.

    python data/scenes.py --rich                     # the scenes set's scenes -> data/rich64
"""
import functools
import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F

import features
import judge
import raycaster
import tokenizer
import world
from raycaster import COLORS, FOV, HALF, MATERIALS, MAX_OBJECTS, SEG_PALETTE, SHAPES, SIZES
from shards import Fault
from texts import BBOX_BINS, pixel_boxes

VERSION = 2  # of everything that decides the content of these arrays
DRAWN = ("inst", "feat", "feat_global", "polygon", "palette", "metadata")  # what is made from pictures, which machines round differently
PAD, END = 0, 1
GRID = 8  # cells across an object's box, and down it
# in 99 of 100 of its rows the cells that show the object follow each other: all such runs, and none
RUNS = torch.tensor([[first <= cell <= last for cell in range(GRID)] for first in range(GRID)
                     for last in range(first, GRID)] + [[False] * GRID]).float()  # (37, 8)
BINS = 64  # of a coordinate of a pose
REACH = {"x": (-2, 2), "y": (-2, 2), "depth": (55.5, 61.9)}  # world units that bins span, in the camera's frame
FLOOR = round(255 * 0.52)  # what the floor reflects of red, green and blue, see raycaster.shade
ALBEDO = torch.tensor([(FLOOR,) * 3, *COLORS.values()])  # (9, 3) of the floor, then of COLORS
META_BINS = 32
META = {  # what the bins span; values beyond are told as the first or last bin. Numbers are exact
    "objects": (-0.5, META_BINS - 0.5),
    "kinds": (-0.5, META_BINS - 0.5),  # different shapes
    "coverage": (0, 0.8),  # share of the picture that shows objects
    "hidden": (-0.008, 0.504),  # share of the objects' outlines that is behind other objects; the first bin is 0
    "brightness": (0.3, 0.7),  # mean luma of a picture in [0, 1]
    "contrast": (0, 0.25),  # standard deviation of luma
    "saturation": (0, 0.64),  # mean of (max - min) / max of red, green and blue
    "colourfulness": (0, 0.64),  # Hasler and Suesstrunk (2003) of a picture in [0, 1]
    "entropy": (0, 6.4),  # bits, of luma in 256 levels
}
NUMBERS = ("objects", "kinds")


class Records:
    """Token rows of up to `most` records of the same fields: the records, END, then PAD.

    counts: {field: how many values it has}; each has ids of its own. fields: those of a record in order; a field that
    comes several times in a record has the same ids each time. numbered: a row begins with the number of its records.
    """

    def __init__(self, name, most, counts, fields=None, numbered=False):
        self.name, self.most, self.fields = name, most, tuple(fields or counts)
        first = dict(zip(counts, itertools.accumulate(counts.values(), initial=END + 1)))
        self.first = torch.tensor([first[field] for field in self.fields])
        self.count = torch.tensor([counts[field] for field in self.fields])
        self.numbered = int(numbered)
        self.number = END + sum(counts.values())  # a number's id is as much larger than itself
        self.length = self.numbered + most * len(self.fields) + 1
        self.vocab = self.number + 1 + self.numbered * most

    def pack(self, values, present):
        """Rows (B, length) int64 of values (B, most, fields); present (B, most): which records are, the first ones."""
        ids = torch.where(present[..., None], values + self.first, PAD).flatten(1)
        number = present.sum(1, keepdim=True)
        rows = F.pad(ids, (0, 1), value=PAD).scatter(1, number * len(self.fields), END)
        return torch.cat([number + self.number, rows], 1) if self.numbered else rows

    def unpack(self, rows):
        """Values (B, most, fields) int64 of rows (B, length), and which records are there (B, most): those before the
        first that is not well formed. Values of others are 0. Raises Fault as check does."""
        rows = self.check(rows)
        values = rows[:, self.numbered:-1].unflatten(1, (self.most, -1)) - self.first
        good = ((values >= 0) & (values < self.count)).all(2)
        present = good.cumprod(1).bool()
        return values * present[..., None], present

    def check(self, rows):
        """Rows as (B, length) int64. Raises Fault for what are none."""
        rows = np.asarray(rows)
        if rows.dtype.kind not in "iu" or rows.ndim != 2 or rows.shape[1] != self.length:
            raise Fault(f"{self.name} takes whole numbers of shape (n, {self.length}), not {rows.dtype} {rows.shape}")
        if rows.size and not 0 <= rows.min() <= rows.max() < self.vocab:
            raise Fault(f"{self.name} has tokens from 0 to {self.vocab - 1}, not {rows.min()} to {rows.max()}")
        return torch.from_numpy(rows.astype(np.int64))


POLYGON = Records("polygon", MAX_OBJECTS, dict.fromkeys(("xmin", "ymin", "xmax", "ymax"), BBOX_BINS) | {
    "rows": len(RUNS) ** 2}, ("xmin", "ymin", "xmax", "ymax") + ("rows",) * (GRID // 2))
POSE = Records("pose", MAX_OBJECTS, {
    "shape": len(SHAPES), "color": len(COLORS), "material": len(MATERIALS), "size": len(SIZES),
    **dict.fromkeys(REACH, BINS), "turn": world.TURNS + 1})  # in a quarter turn, after which a cube is itself; or round
PALETTE = Records("palette", MAX_OBJECTS + 1, dict.fromkeys(("red", "green", "blue"), 256), numbered=True)
METADATA = Records("metadata", len(META), {"type": len(META), "value": META_BINS})


def modalities(size):
    """Length, vocabulary, pad and end id of each modality, as in meta.json; pair: tokens to be masked together."""
    kinds = {records.name: {"length": records.length, "vocab": records.vocab, "pad": PAD, "end": END}
             for records in (POLYGON, POSE, PALETTE, METADATA)}
    kinds["metadata"]["pair"] = 2
    codes = {"inst": (size // 8) ** 2, **features.LENGTHS}
    return {**{m: {"length": length, "vocab": tokenizer.VOCAB, "pad": -1} for m, length in codes.items()}, **kinds}


@functools.cache  # a worker process loads it once
def feature_coder(device):
    return features.load(device)


def drawn(scenes, images, index, coder):
    """The arrays that are made from pictures, uint16 (n, length), of scenes as raycaster.render returns these."""
    values = metadata_of(scenes, images["rgb"], index).cpu()
    inst, index = coder.encode_flat(inst_picture(index)), index.cpu()
    shown = F.adaptive_avg_pool2d(images["rgb"], judge.SIDE)
    rows = {"polygon": polygon_tokens(index), "palette": palette_tokens(scenes["color"].cpu(), index),
            "metadata": metadata_tokens(values)}
    codes = feature_coder(str(shown.device)).encode(shown)
    return {"inst": inst, **codes, **{name: ids.numpy().astype(np.uint16) for name, ids in rows.items()}}


def to_bins(values, low, high, bins):
    return ((values - low) / (high - low) * bins).floor().long().clamp(0, bins - 1)


def from_bins(ids, low, high, bins):
    return low + (ids + 0.5) * (high - low) / bins


# ------------------------------------------------------------------------------------------------------------
# Instances

def inst_picture(index):
    """Pictures (B, 3, S, S) in [0, 1] of an object index (B, S, S), -1: floor."""
    # the colours of seg: the tokenizer keeps outlines of others less well
    return (torch.tensor(SEG_PALETTE, device=index.device) / 255)[index + 1].movedim(-1, 1).contiguous()


def inst_index(pictures):
    """The object index (B, S, S) of such pictures, as a tokenizer or model draws them: the nearest colour's."""
    palette = (torch.tensor(SEG_PALETTE, device=pictures.device) / 255)[:, :, None, None]
    return (pictures[:, None] - palette).square().sum(2).argmin(1) - 1


def masks_of(index):
    """Where each object is visible, (B, 3, S, S) bool, of an object index (B, S, S)."""
    return index[:, None] == torch.arange(MAX_OBJECTS, device=index.device)[:, None, None]


# ------------------------------------------------------------------------------------------------------------
# Outlines

def edges_of(box_bins):
    """Left, top, right and bottom, (.., 4) as shares of the frame, of boxes' first and last bins (.., 4)."""
    return (box_bins + torch.tensor([0, 0, 1, 1])) / BBOX_BINS


def box_bins_of(index):
    """First and last bins of the visible objects' boxes, (B, 3, 4), of an object index (B, S, S)."""
    return torch.tensor(pixel_boxes(index)) * BBOX_BINS // index.shape[-1]


def polygon_tokens(index):
    """Rows (B, 25) int64 of the objects of an object index (B, S, S) on the CPU."""
    B, S, _ = index.shape
    masks = masks_of(index)
    box_bins = box_bins_of(index)
    left, top, right, bottom = edges_of(box_bins)[..., None].unbind(2)  # (B, 3, 1) each
    fine = (torch.arange(8 * GRID) + 0.5) / (8 * GRID)  # 8 x 8 points of each cell
    row = ((top + (bottom - top) * fine) * S).long()[..., :, None]
    column = ((left + (right - left) * fine) * S).long()[..., None, :]
    points = masks[torch.arange(B)[:, None, None, None], torch.arange(MAX_OBJECTS)[:, None, None], row, column]
    share = F.avg_pool2d(points.float(), 8)  # (B, 3, 8, 8)
    runs = ((share - 0.5) @ RUNS.T).argmax(3)  # the run of which the most points are right
    pairs = runs[..., 0::2] * len(RUNS) + runs[..., 1::2]
    return POLYGON.pack(torch.cat([box_bins, pairs], 2), masks.any(3).any(2))


def polygon_masks(rows, size, boxes=None):
    """Masks (B, 3, size, size) bool of the objects of rows, and their boxes (B, 3, 4) as shares of the frame.

    boxes: the true ones (B, 3, 4), in place of those that the rows tell. No mask is set where there is no object.
    """
    values, present = POLYGON.unpack(rows)
    boxes = edges_of(values[..., :4]) if boxes is None else boxes
    cells = RUNS[torch.stack([values[..., 4:] // len(RUNS), values[..., 4:] % len(RUNS)], 3)]  # (B, 3, 4, 2, 8)
    left, top, right, bottom = boxes[..., None].unbind(2)
    pixel = (torch.arange(size) + 0.5) / size
    x = ((pixel - left) / (right - left).clamp(min=1e-6) * 2 - 1)[..., None, :].expand(-1, -1, size, -1)
    y = ((pixel - top) / (bottom - top).clamp(min=1e-6) * 2 - 1)[..., None].expand(-1, -1, -1, size)
    at = torch.stack([x, y], 4)  # (B, 3, S, S, 2), within [-1, 1] in the box
    cells = cells.reshape(-1, 1, GRID, GRID)
    smooth = F.grid_sample(cells, at.flatten(0, 1), padding_mode="border", align_corners=False)
    inside = (at.abs() <= 1).all(4) & present[..., None, None]
    return (smooth.view_as(inside) >= 0.5) & inside, boxes


# ------------------------------------------------------------------------------------------------------------
# Poses

def pose_tokens(scenes):
    """Rows (B, 25) int64 of scenes of world.build in float64, so that no machine rounds them differently."""
    x, y, depth = raycaster.project(scenes)
    across = 2 * math.tan(FOV / 2) * depth  # world units across the frame, as far away as an object
    place = {"x": (x - 0.5) * across, "y": (0.5 - y) * across, "depth": depth}
    turn = (scenes["theta"] / (math.pi / 2) * world.TURNS).round().long() % world.TURNS
    values = [scenes[name] for name in ("shape", "color", "material", "size")]
    values += [to_bins(place[name], *REACH[name], BINS) for name in REACH]
    values.append(torch.where(scenes["shape"] == 0, turn, world.TURNS))
    return POSE.pack(torch.stack(values, 2), scenes["shape"] >= 0)


def pose_scenes(rows):
    """Scenes of the objects of rows, in float64 and as world.build returns them: they can be drawn."""
    values, present = POSE.unpack(rows)
    told = dict(zip(POSE.fields, values.unbind(2)))
    scenes = world.build(torch.full((len(values), MAX_OBJECTS * len(world.FIELDS)), -1), torch.double)
    for name in ("shape", "color", "material", "size"):
        scenes[name] = told[name].masked_fill(~present, -1)
    scenes["radius"] = torch.tensor(world.RADIUS, dtype=torch.double)[told["size"]]
    scenes["theta"] = told["turn"].double() % world.TURNS / world.TURNS * math.pi / 2
    origin, right, up, forward = (axis[:, None] for axis in raycaster.camera_frame(scenes))
    x, y, depth = (from_bins(told[name].double(), *REACH[name], BINS)[..., None] for name in REACH)
    scenes["center"] = origin + x * right + y * up + depth * forward
    return scenes


def corners(scenes):
    """Corners (B, 3, 8, 3) in world units of the box around each object: four at its top, and those below them."""
    half = scenes["radius"] * torch.tensor(HALF, dtype=scenes["radius"].dtype)[scenes["shape"].clamp(min=0)]
    angle = scenes["theta"][..., None] + math.pi * (torch.arange(8) % 4 * 2 + 1) / 4
    height = torch.tensor([1.0] * 4 + [-1.0] * 4).expand_as(angle)
    offset = torch.stack([math.sqrt(2) * angle.cos(), math.sqrt(2) * angle.sin(), height], 3)
    return scenes["center"][:, :, None] + half[..., None, None] * offset


# ------------------------------------------------------------------------------------------------------------
# Palettes

def palette_tokens(color, index):
    """Rows (B, 14) int64 of the objects' color (B, 3), as in scenes, and an object index (B, S, S)."""
    kinds = F.pad(color, (1, 0), value=-1) + 1  # (B, 4) rows of ALBEDO, of index + 1; those of no object are not seen
    seen = kinds.gather(1, index.flatten(1) + 1)
    area = torch.zeros(len(index), len(ALBEDO), dtype=torch.long).scatter_add(1, seen, torch.ones_like(seen))
    area, order = area.sort(dim=1, descending=True, stable=True)
    present = area[:, :PALETTE.most] > 0
    return PALETTE.pack(ALBEDO[order[:, :PALETTE.most]], present)


def palette_colors(rows):
    """Colours (B, 4, 3) from 0 to 255, which of them are there (B, 4), and how many the rows' first tokens say there
    are (B,), 0 where one says no number."""
    colors, present = PALETTE.unpack(rows)
    return colors, present, (PALETTE.check(rows)[:, 0] - PALETTE.number).clamp(min=0)


# ------------------------------------------------------------------------------------------------------------
# Metadata

def metadata_of(scenes, rgb, index):
    """Values (B, 9) float64 of META, of scenes, pictures (B, 3, S, S) in [0, 1] and their object index."""
    o, d = raycaster.primary_rays(scenes, index.shape[-1])
    outlines = sum((raycaster.intersect(solid, o, d)[0] < math.inf).sum(1) for solid in raycaster.occupied(scenes))
    visible = (raycaster.trace(scenes, o, d)[1] >= 0).sum(1)
    kinds = torch.stack([(scenes["shape"] == shape).any(1) for shape in range(len(SHAPES))], 1).sum(1)
    told = {"objects": (scenes["shape"] >= 0).sum(1), "kinds": kinds, "coverage": (index >= 0).double().mean((1, 2)),
            "hidden": 1 - visible / outlines, **picture_values(rgb)}
    return torch.stack([told[name].double() for name in META], 1)


def picture_values(rgb):
    """{brightness, contrast, saturation, colourfulness, entropy: (B,)} of pictures (B, 3, S, S) in [0, 1], see META."""
    rgb = rgb.flatten(2).double()  # (B, 3, P)
    red, green, blue = rgb.unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    most, least = rgb.amax(1), rgb.amin(1)
    red_green, yellow_blue = red - green, (red + green) / 2 - blue
    spread = torch.hypot(red_green.std(1, correction=0), yellow_blue.std(1, correction=0))
    level = (luma * 255).round().long()
    counts = luma.new_zeros(len(luma), 256).scatter_add(1, level, torch.ones_like(luma))
    share = counts / luma.shape[1]
    return {"brightness": luma.mean(1), "contrast": luma.std(1, correction=0),
            "saturation": ((most - least) / most.clamp(min=1e-6)).mean(1),
            "colourfulness": spread + 0.3 * torch.hypot(red_green.mean(1), yellow_blue.mean(1)),
            "entropy": -torch.xlogy(share, share).sum(1) / math.log(2)}


def metadata_tokens(values):
    """Rows (B, 19) int64 of values (B, 9)."""
    bins = [to_bins(values[:, i], *META[name], META_BINS) for i, name in enumerate(META)]
    types = torch.arange(len(META)).expand(len(values), -1)
    return METADATA.pack(torch.stack([types, torch.stack(bins, 1)], 2), torch.ones_like(types, dtype=torch.bool))


def metadata_values(rows):
    """Values (B, 9) float64 of rows, whose pairs may come in any order; nan where a row does not tell one."""
    pairs, present = METADATA.unpack(rows)
    bins = torch.full((len(pairs), len(META) + 1), math.nan, dtype=torch.double)  # the last column: of no pair
    types = torch.where(present, pairs[..., 0], len(META))
    bins = bins.scatter(1, types, pairs[..., 1].double())[:, :-1]
    return torch.stack([from_bins(bins[:, i], *META[name], META_BINS) for i, name in enumerate(META)], 1)
