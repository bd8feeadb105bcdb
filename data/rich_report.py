"""The rich set's modalities as a model predicts them, against the truth. What the same functions say of the truth's own
rows are the bounds: no model can do better.

    python data/rich_report.py --num=200             # the bounds, of so many validation scenes
"""
import argparse
import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F

import raycaster
import rich
import tokenizer
import world
from raycaster import COLORS, MAX_OBJECTS, SHAPES

THRESHOLDS = torch.arange(10) * 0.05 + 0.5  # of IoU, as in COCO
PAIRINGS = torch.tensor(list(itertools.permutations(range(MAX_OBJECTS))))  # (6, 3)
LOOKS = ("shape", "color", "material", "size")
NEIGHBOURS, TEMPERATURE = 20, 0.07  # of kNN, as DINO (arXiv:2104.14294) has them


def masks(told, true):
    """{"iou", "ap"} of masks (B, 3, S, S) against the true ones, in any order.

    iou: mean over true objects, each with the one that it is paired with. ap: COCO's average precision of predictions
    that are all as sure, which is the mean over THRESHOLDS of precision x recall.
    """
    told_pixels, true_pixels = told.flatten(2).float(), true.flatten(2).float()
    both = torch.einsum("bip,bjp->bij", told_pixels, true_pixels)
    either = told_pixels.sum(2)[:, :, None] + true_pixels.sum(2)[:, None] - both
    iou = both / either.clamp(min=1)
    paired = iou[:, PAIRINGS, torch.arange(MAX_OBJECTS)]  # (B, 6, 3): in every pairing, of the true objects
    best = paired.sum(2).argmax(1)
    matched = paired[torch.arange(len(iou)), best][true_pixels.any(2)]
    hits = (matched[:, None] >= THRESHOLDS).sum(0)
    precision, recall = hits / told_pixels.any(2).sum().clamp(min=1), hits / max(1, len(matched))
    return {"iou": matched.mean().item(), "ap": (precision * recall).mean().item()}


def inst(pictures, index):
    """{"iou", "ap"} of pictures (B, 3, S, S), as decoded from tokens, against the object index (B, S, S)."""
    return masks(rich.masks_of(rich.inst_index(pictures)), rich.masks_of(index))


def polygon(rows, index):
    """{"iou", "ap"} of the masks of rows (B, 25), each put into the true box, against the object index (B, S, S)."""
    boxes = rich.edges_of(rich.box_bins_of(index))
    return masks(rich.polygon_masks(rows, index.shape[-1], boxes)[0], rich.masks_of(index))


def pose(rows, scenes):
    """Rows (B, 25) against scenes of as many slots, object by object in their order.

    objects: share of scenes with the right number; class: share of objects whose LOOKS are all right; corner: mean
    distance in world units between the boxes' corners, of objects that both have; turn: share of cubes turned right.
    """
    told, there = rich.pose_scenes(rows), scenes["shape"] >= 0
    told_there, cubes = told["shape"] >= 0, scenes["shape"] == 0
    right = torch.stack([told[name] == scenes[name] for name in LOOKS]).all(0)
    # a box is itself after a quarter turn
    same = [rich.corners(scenes | {"theta": scenes["theta"] + k * math.pi / 2}) for k in range(4)]
    distance = (rich.corners(told) - torch.stack(same)).norm(dim=4).mean(3).amin(0)  # (B, 3)
    turn = (told["theta"] - scenes["theta"]).abs() < math.pi / 4 / world.TURNS
    turn &= told["shape"] == 0
    shares = {"objects": (told_there == there).all(1), "class": right[there], "turn": turn[cubes]}
    return {"corner": distance[there & told_there].mean().item(),
            **{name: share.double().mean().item() for name, share in shares.items()}}


def palette(rows, true_rows):
    """Rows (B, 14) against the true ones. number: share of rows whose first token is right; error: mean distance in
    levels of 255, over red, green and blue, of colours in the places in which both rows have one."""
    colors, present, number = rich.palette_colors(rows)
    true_colors, true_present, true_number = rich.palette_colors(true_rows)
    distance = (colors - true_colors).double().norm(dim=2)[present & true_present]
    return {"number": (number == true_number).double().mean().item(), "error": distance.mean().item()}


def metadata(rows, values):
    """{type: share of rows (B, 19) that are right}: numbers exactly, others within a bin of the true values (B, 9)."""
    steps = {name: (high - low) / rich.META_BINS for name, (low, high) in rich.META.items()}
    reach = torch.tensor([0 if name in rich.NUMBERS else step for name, step in steps.items()])
    right = ((rich.metadata_values(rows) - values).abs() <= reach).double().mean(0)
    return dict(zip(rich.META, right.tolist()))


@torch.autocast("cpu", enabled=False)  # whatever the precision of the model that told them
def feat(rows, cells):
    """{"cosine"} of rows (B, 64) with whitened features (B, 64, 80) as the pictures' are, mean over cells."""
    told = rich.feature_coder("cpu").cells(as_ids(rows))
    return {"cosine": F.cosine_similarity(told, cells, dim=-1).mean().item()}


@torch.autocast("cpu", enabled=False)
def feat_global(rows, bank, words):
    """Rows (B, 8) against the features (N, 80) of N pictures, the first B of which are those that are meant.

    cosine: with what is meant; recall: share of rows to which it is the nearest of all N; words_f1: of the shapes and
    colours (N, 11) in a picture, as the NEIGHBOURS nearest others say by a vote, each as weighty as e ** (cosine /
    TEMPERATURE).
    """
    told = rich.feature_coder("cpu").whole(as_ids(rows))
    alike = F.normalize(told, dim=1) @ F.normalize(bank, dim=1).T
    own = torch.arange(len(told))
    cosine, first = alike[own, own], alike.argmax(1)
    nearest, which = alike.index_put((own, own), torch.tensor(-math.inf)).topk(min(NEIGHBOURS, len(bank) - 1), 1)
    vote = (nearest / TEMPERATURE).softmax(1)[..., None] * words[which].float()
    named, true = vote.sum(1) > 0.5, words[:len(told)]
    f1 = 2 * (named & true).sum() / (named.sum() + true.sum()).clamp(min=1)
    return {"cosine": cosine.mean().item(), "recall": (first == own).double().mean().item(), "words_f1": f1.item()}


def as_ids(rows):
    return torch.from_numpy(np.asarray(rows).astype(np.int64))


def words_of(scenes):
    """Which shapes, then colours, the objects of scenes have: (B, 11) bool."""
    parts = [("shape", len(SHAPES)), ("color", len(COLORS))]
    return torch.cat([(scenes[name][..., None] == torch.arange(n)).any(1) for name, n in parts], 1)


def bounds(num):
    """{modality: its report} of the truth's own rows, of num validation scenes of 64 px."""
    coder, scenes = tokenizer.load_tokenizer(), world.load_frozen_scenes(64, num)
    images, index = raycaster.render(scenes, compile=False)
    rows = rich.drawn(scenes, images, index, coder)
    exact = {name: value.double() if value.is_floating_point() else value for name, value in scenes.items()}
    values = rich.metadata_of(scenes, images["rgb"], index)
    cells, whole = rich.feature_coder("cpu").see(images["rgb"])
    away = (rich.metadata_values(rows["metadata"]) - values).abs().mean(0)
    return {"inst": inst(coder.decode(torch.from_numpy(rows["inst"].astype(np.int64)).view(num, 8, 8)), index),
            "feat": feat(rows["feat"], cells), "feat_global": feat_global(rows["feat_global"], whole, words_of(scenes)),
            "polygon": polygon(rows["polygon"], index), "pose": pose(rich.pose_tokens(exact), exact),
            "palette": palette(rows["palette"], rows["palette"]), "metadata": metadata(rows["metadata"], values),
            "metadata, mean distance": dict(zip(rich.META, away.tolist()))}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=200, help="validation scenes, 2,000 at most")
    num = parser.parse_args().num
    if not 1 <= num <= 2000:
        parser.error("--num is from 1 to 2,000")
    for kind, report in bounds(num).items():
        print(f"{kind}: " + ", ".join(f"{what} {value:.4f}" for what, value in report.items()))
