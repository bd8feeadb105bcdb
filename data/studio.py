"""From tokens back to what people look at, and numbers for how good it is. Runs after a training clock has stopped."""
import math

import torch
import torch.nn.functional as F

import tokenizer
from raycaster import render
from shards import ROOT
from world import load_frozen_scenes


class Patches2:
    """The way back from tokens that are 2 x 2 patches of black and white pixels, as data/mnist14 has them. A pixel
    comes out as 4 x 4, which makes a picture as large as the tokenizer's of as many tokens."""

    def decode(self, ids):
        """Pictures (B, 3, 8h, 8w) of 0 and 1 of token ids (B, h, w): four bits, the upper left one the highest."""
        shift = torch.tensor([3, 2, 1, 0], device=ids.device).view(1, 4, 1, 1)
        bits = (ids[:, None] >> shift) & 1  # (B, 4, h, w)
        pixels = F.pixel_shuffle(bits.float(), 2)  # (B, 1, 2h, 2w)
        return F.interpolate(pixels, scale_factor=4).expand(-1, 3, -1, -1)


class Studio:
    """Decodes token grids and token rows of the scenes world on a device.

    decoder: what a set says of its picture tokens: None or "scenes", they are the tokenizer's; "patches2", see Patches2;
    or the file in data/ with the weights of a tokenizer of its own.
    """

    def __init__(self, device="cpu", decoder=None):
        self.device, self.encoding = device, tokenizer.load_text()
        self.coder, self.vocab = Patches2(), 16
        if decoder != "patches2":
            path = tokenizer.WEIGHTS if decoder in (None, "scenes") else ROOT / decoder
            self.coder, self.vocab = tokenizer.load_tokenizer(device, path), tokenizer.VOCAB

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


def psnr(output, pictures):
    """In dB, of the mean squared error of pictures in [0, 1]; 100 at most."""
    return -10 * math.log10(max((output - pictures).square().mean().item(), 1e-10))


def standardised_l1(depth, truth):
    """Mean absolute difference of depth pictures (B, 3, H, W), in standard deviations of each true picture."""
    depth, truth = depth.mean(1).flatten(1), truth.mean(1).flatten(1)
    return ((depth - truth).abs().mean(1) / truth.std(1)).mean().item()


def mean_angle(normal, truth):
    """Mean angle in degrees between normal pictures (B, 3, H, W)."""
    cosine = F.cosine_similarity(normal * 2 - 1, truth * 2 - 1, dim=1).clamp(-1, 1)
    return cosine.arccos().rad2deg().mean().item()
