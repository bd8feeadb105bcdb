"""From tokens back to what people look at, and numbers for how good it is. Runs after a training clock has stopped."""
import math

import torch
import torch.nn.functional as F

import tokenizer
from raycaster import render
from texts import parse_desc
from world import load_frozen_scenes


class Studio:
    """Decodes token grids and token rows of the scenes world on a device."""

    def __init__(self, device="cpu"):
        self.device, self.coder, self.encoding = device, tokenizer.load_tokenizer(device), tokenizer.load_text()

    def pictures(self, ids):
        """Pictures (B, 3, 8s, 8s) in [0, 1], on the CPU, of the tokens (B, s * s) of an image-like modality."""
        side = math.isqrt(ids.shape[1])
        return torch.cat([self.coder.decode(part.unflatten(1, (side, side))).cpu() for part in ids.split(50)])

    def texts(self, ids):
        """Strings of the tokens (B, L) of a text modality."""
        return [tokenizer.decode_text(self.encoding, row) for row in ids.tolist()]

    def truth(self, size, n):
        """True pictures of the first n frozen validation scenes: dict of (n, 3, size, size) by modality, on the CPU.

        Not compiled: of one core 2.4 s for 200 scenes and 8 s for 1,000; compiled 33 and 35 s, from the cache 6.5 s.
        """
        return render(load_frozen_scenes(size, n), size, compile=False)[0]


def standardised_l1(depth, truth):
    """Mean absolute difference of depth pictures (B, 3, H, W), in standard deviations of each true picture."""
    depth, truth = depth.mean(1).flatten(1), truth.mean(1).flatten(1)
    return ((depth - truth).abs().mean(1) / truth.std(1)).mean().item()


def mean_angle(normal, truth):
    """Mean angle in degrees between normal pictures (B, 3, H, W)."""
    cosine = F.cosine_similarity(normal * 2 - 1, truth * 2 - 1, dim=1).clamp(-1, 1)
    return cosine.arccos().rad2deg().mean().item()


def attribute_f1(predicted, truth, reach=12):
    """F1 of shape, colour and material in descriptions (lists of str), objects matched by position.

    Objects match one to one, closest pairs first, at most `reach` percent of the frame apart; an unmatched object of
    either list counts three wrong attributes.
    """
    right = said = real = 0
    for mine, theirs in zip(map(parse_desc, predicted), map(parse_desc, truth)):
        said, real = said + 3 * len(mine), real + 3 * len(theirs)
        pairs = sorted((math.dist((a["x"], a["y"]), (b["x"], b["y"])), i, j)
                       for i, a in enumerate(mine) for j, b in enumerate(theirs))
        used_i, used_j = set(), set()
        for distance, i, j in pairs:
            if distance <= reach and i not in used_i and j not in used_j:
                used_i.add(i)
                used_j.add(j)
                right += sum(mine[i][key] == theirs[j][key] for key in ("shape", "color", "material"))
    return 2 * right / max(1, said + real)
