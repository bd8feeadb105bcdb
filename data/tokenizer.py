"""Tokenizers: one FSQ autoencoder for all image-like modalities, tiktoken encodings for scene texts and for questions.

Image tokens: a small convolutional autoencoder with finite scalar quantisation (arXiv:2309.15505): 8x downsampling,
four digits of eight levels each, so a vocabulary of 4096. A 64 px picture is 8x8 tokens, a 128 px picture 16x16.
fit_tokenizer.py trains both.
"""
import base64

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from shards import FROZEN

WEIGHTS, TEXT, QA = FROZEN / "tokenizer.safetensors", FROZEN / "text.tiktoken", FROZEN / "qa.tiktoken"
LEVELS, DIGITS = 8, 4
VOCAB = LEVELS ** DIGITS
TEXT_VOCAB = 576  # of each encoding
# pieces of text that merges never cross: a turn's headings, every fact of a description, words, digits, single marks
TEXT_PATTERN = (r"Question:| Answer:| ?Object \d - Position:| x=\d+ y=\d+| Shape: \w+| Color: \w+| Material: \w+\.|"
                r" ?[A-Za-z]+| ?\d| ?[^\sA-Za-z\d]|\s")


# ------------------------------------------------------------------------------------------------------------
# Image tokenizer

class Conv(nn.Module):
    """Convolution whose weight is kept as a matrix (out, in * k * k), the form torch.optim.Muon takes."""

    def __init__(self, inside, outside, k=3, stride=1):
        super().__init__()
        self.shape, self.stride = (outside, inside, k, k), stride
        self.weight = nn.Parameter(torch.randn(outside, inside * k * k) * (inside * k * k) ** -0.5)
        self.bias = nn.Parameter(torch.zeros(outside))

    def forward(self, x):
        weight = self.weight.view(self.shape).contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, weight, self.bias, self.stride, padding=self.shape[-1] // 2)


class Block(nn.Module):
    """Residual block without normalisation, as in super-resolution (arXiv:1707.02921): (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, dim, k=3):
        super().__init__()
        self.conv1, self.conv2 = Conv(dim, dim, k), Conv(dim, dim, k)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x):
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


def ids_of(digits, dim):
    """Token ids, int64, of digits 0..7, floats, that lie along a dimension of four."""
    power = LEVELS ** torch.arange(DIGITS, device=digits.device)
    return (digits.round().long().movedim(dim, -1) * power).sum(-1)


def digits_of(ids, dim):
    """The digits, floats, of token ids, along a new dimension. ValueError for ids that are none."""
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < VOCAB:
        raise ValueError(f"tokens lie in 0..{VOCAB - 1}, found {int(ids.min())}..{int(ids.max())}")
    power = LEVELS ** torch.arange(DIGITS, device=ids.device)
    return (ids.long()[..., None] // power % LEVELS).float().movedim(-1, dim).contiguous()


class Tokenizer(nn.Module):
    """FSQ autoencoder of pictures (B, 3, H, W) in [0, 1], H and W multiples of 8."""

    def __init__(self, fine=48, mid=96, dim=160, patch=384):
        super().__init__()
        # The encoder sees one 8x8 patch at a time: equal patches get equal tokens, wherever they are and whatever is next
        # to them. With 3x3 convolutions here, a seg token had 4.0 nats of entropy at its place, with this 2.2 (in a richer world).
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(8), Conv(192, patch, 1), Block(patch, 1), Block(patch, 1), nn.SiLU(), Conv(patch, DIGITS, 1))
        self.decoder = nn.Sequential(
            Conv(DIGITS, dim), Block(dim), Block(dim), Block(dim), Conv(dim, 4 * mid, 1), nn.PixelShuffle(2),
            Block(mid), Block(mid), Conv(mid, 4 * fine, 1), nn.PixelShuffle(2), Block(fine),
            nn.SiLU(), Conv(fine, 12), nn.PixelShuffle(2))

    def quantise(self, images):
        """Digits (B, 4, H/8, W/8), floats holding 0..7; the gradient passes straight through the rounding."""
        x = (LEVELS - 1) * torch.sigmoid(self.encoder(images * 2 - 1).float())
        return x + (x.round() - x).detach()

    def reconstruct(self, digits):
        """Pictures (B, 3, H, W), about [0, 1], of digits (B, 4, H/8, W/8)."""
        return self.decoder(digits * (2 / (LEVELS - 1)) - 1) * 0.5 + 0.5

    @torch.no_grad()
    def encode(self, images):
        """Token ids (B, H/8, W/8), int64 in 0..4095, of pictures (B, 3, H, W) in [0, 1]."""
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % 8 or images.shape[3] % 8:
            raise ValueError(f"encode takes (B, 3, H, W) with H and W multiples of 8, not {tuple(images.shape)}")
        return ids_of(self.quantise(images), 1)

    def encode_flat(self, images, batch=100):
        """Token ids as a uint16 array (n, H/8 * W/8) of pictures (n, 3, H, W).

        On a CPU every patch is encoded once: three quarters of the patches of 250 scenes repeat, floor for the most part.
        """
        n, _, H, W = images.shape
        if images.device.type != "cpu":
            parts = [self.encode(part.contiguous(memory_format=torch.channels_last)) for part in images.split(batch)]
            return torch.cat(parts).flatten(1).cpu().numpy().astype(np.uint16)
        patches = F.pixel_unshuffle(images, 8).permute(0, 2, 3, 1).reshape(-1, 192).numpy()
        rows = patches.view(np.dtype((np.void, patches[0].nbytes)))[:, 0]  # compared byte by byte
        _, first, which = np.unique(rows, return_index=True, return_inverse=True)
        different = F.pixel_shuffle(torch.from_numpy(patches[first])[:, :, None, None], 8)  # (U, 3, 8, 8)
        parts = [self.encode(part.contiguous(memory_format=torch.channels_last)) for part in different.split(64 * batch)]
        return torch.cat(parts).flatten().numpy().astype(np.uint16)[which].reshape(n, -1)

    @torch.no_grad()
    def decode(self, ids):
        """Pictures (B, 3, 8h, 8w) in [0, 1] of token ids (B, h, w)."""
        if ids.ndim != 3:
            raise ValueError(f"decode takes (B, h, w), not {tuple(ids.shape)}")
        return self.reconstruct(digits_of(ids, 1)).float().clamp(0, 1)


def load_tokenizer(device="cpu", path=WEIGHTS):
    """The trained tokenizer, frozen, in float32."""
    model = Tokenizer()
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)


def save_half(model, path):
    """Write a net's weights, in half precision, under a temporary name first."""
    part = path.with_suffix(".part")
    save_file({name: value.half().contiguous() for name, value in model.state_dict().items()}, part)
    part.replace(path)


# ------------------------------------------------------------------------------------------------------------
# Text encodings

def load_text(path=TEXT):
    """The tiktoken.Encoding in a file, vocabulary TEXT_VOCAB with <|end|> and <|pad|> as its last two ids."""
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, path.read_text().splitlines())}
    return tiktoken.Encoding(path.stem, pat_str=TEXT_PATTERN, mergeable_ranks=ranks,
                             special_tokens={"<|end|>": TEXT_VOCAB - 2, "<|pad|>": TEXT_VOCAB - 1})


def place_tokens(encoding, cells=8):
    """[[id, row, column], ..] of the tokens that name a cell of the token grid, e.g. ` x=31 y=43`."""
    told = []
    for row in range(cells):
        for column in range(cells):
            x, y = (int((cell + 0.5) * 100 / cells) for cell in (column, row))
            ids = encoding.encode_ordinary(f" x={x} y={y}")
            if len(ids) == 1:  # objects stand on no others
                told.append([ids[0], row, column])
    return told


def text_tokens(encoding, text, length):
    """Token ids of a text, the end token, padding up to length. Raises ValueError when the text does not fit."""
    row = encoding.encode_ordinary(text) + [TEXT_VOCAB - 2]
    if len(row) > length:
        raise ValueError(f"a text of {len(row)} tokens does not fit {length}: {text!r}")
    return row + [TEXT_VOCAB - 1] * (length - len(row))


def decode_text(encoding, row):
    """The text of a token row up to its end token; unknown ids are left out."""
    row = [int(v) for v in row]
    row = row[:row.index(TEXT_VOCAB - 2)] if TEXT_VOCAB - 2 in row else row
    known = len(encoding.token_byte_values())  # merges may have ended below TEXT_VOCAB - 2
    return encoding.decode([v for v in row if v < known], errors="ignore")
