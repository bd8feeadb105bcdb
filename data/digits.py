"""The judge of handwritten digits: a small convolutional net that reads them, to measure what models draw.

The interface is judge.py's, for digits of data/mnist.py as pixels and as tokens:

    judge = digits.load(device)
    judge.accuracy(pictures, labels)                # share of pictures that show the digit of their label
    judge.frechet_distance(pictures, "exact")       # from the validation digits; "decoded": as their tokens have them

    python data/digits.py                           # six minutes of one core -> data/frozen/digits.safetensors
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import judge as judges
import shards
from reports import write_sections
from studio import Patches2

SIDE, MARGIN = 32, 2  # pixels across a picture, of them black on each side of a digit
CHANNELS = 64


class Judge(judges.Reader):
    """Pictures (B, 1, 32, 32) in [0, 1] -> features (B, 64), and of them logits (B, 10)."""
    weights, references, channels = shards.FROZEN / "digits.safetensors", ("exact", "decoded"), CHANNELS
    classes, cells = 10, 7  # digits, tokens across one

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 4, 2, 1), nn.SiLU(), nn.Conv2d(32, CHANNELS, 4, 2, 1), judges.Residual(CHANNELS),
            nn.SiLU(), nn.Conv2d(CHANNELS, CHANNELS, 4, 2, 1), judges.Residual(CHANNELS), nn.SiLU())
        self.head = nn.Linear(CHANNELS, self.classes)

    def forward(self, pictures):
        return self.body(pictures * 2 - 1).mean((2, 3))

    @torch.no_grad()
    def look(self, pictures):
        """Features (B, 64) and logits (B, 10), on the CPU, of pictures (B, 3, S, S) in [0, 1]: digits as pixels,
        S = 32, or as studio.Patches2 has them of tokens, S = 56."""
        if pictures.ndim != 4 or pictures.shape[1:] not in ((3, SIDE, SIDE), (3, 56, 56)):
            raise ValueError(f"pictures of digits are (B, 3, S, S) with S 32 or 56, not {tuple(pictures.shape)}")
        features = []
        device = self.head.weight.device
        with torch.autocast(device.type, enabled=False):  # whatever the precision of the model that drew them
            for part in pictures.split(250):
                features.append(self(frame(part.to(device).float().clamp(0, 1).mean(1, keepdim=True))))
            features = torch.cat(features)
            return features.cpu(), self.head(features).cpu()

    def classes_of(self, pictures):
        return self.look(pictures)[1].argmax(1)


def frame(pictures):
    """Grey pictures as the net takes them: those of tokens are scaled to the digits' 28 pixels, black around them."""
    if pictures.shape[-1] == SIDE:
        return pictures
    return F.pad(F.interpolate(pictures, SIDE - 2 * MARGIN, mode="area"), (MARGIN,) * 4)


load = Judge.load


def judge_of_tokens(studio, device):
    """The judge of what a Studio's tokens show, and its name for the validation pictures as tokens have them."""
    if isinstance(studio.coder, Patches2):
        return load(device), "decoded"
    return judges.load(device), "objects_decoded"


# ------------------------------------------------------------------------------------------------------------
# Training

def both_forms(digits, tokens):
    """Grey pictures (2, N, 1, 32, 32) in [0, 1] of digits (N, 28, 28), as pixels and as their tokens (N, 49) have them."""
    exact = F.pad(torch.from_numpy(digits)[:, None] / 255, (MARGIN,) * 4)
    tokens = torch.from_numpy(tokens.astype(np.int64)).view(-1, 7, 7)
    return torch.stack([exact, frame(Patches2().decode(tokens)[:, :1])])


def moved(pictures):
    """Pictures turned by up to 12 degrees, scaled by up to a tenth and moved by up to two pixels."""
    B = len(pictures)
    angle, scale = (torch.rand(2, B) * 2 - 1) * torch.tensor([[math.radians(12)], [0.1]])
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(B, 2, 2)
    shift = (torch.rand(B, 2, 1) * 2 - 1) * 2 * MARGIN / SIDE
    grid = F.affine_grid(torch.cat([turn * (1 + scale[:, None, None]), shift], 2), pictures.shape, align_corners=False)
    return F.grid_sample(pictures, grid, align_corners=False)


def train(steps=2500, batch=128, peak=2e-3, seed=0):
    """Train on the digits that are no validation digits, both forms, a little noise on them; take the moments."""
    import mnist  # with the hub's client, which judging does not need
    torch.manual_seed(seed)
    (train_pictures, train_labels), (val_pictures, val_labels) = (
        (both_forms(digits, mnist.tokens_of(digits)), torch.from_numpy(labels.astype(np.int64)).flatten())
        for digits, labels in mnist.split(*mnist.read_digits(mnist.fetch_digits())))
    model = Judge()
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01)
    for step in tqdm(range(steps)):
        optimizer.param_groups[0]["lr"] = peak * min(1, step / 100, 1.02 - step / steps)
        rows = torch.randint(len(train_labels), (batch,))
        x = moved(train_pictures[torch.randint(2, (batch,)), rows])
        x += 0.05 * torch.rand(batch, 1, 1, 1) * torch.randn_like(x)
        loss = F.cross_entropy(model.head(model(x)), train_labels[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save()
    model, rows, n = load(), [], len(val_labels)  # in half precision
    for name, val, real in zip(model.references, val_pictures, train_pictures):
        val, real = val.expand(-1, 3, -1, -1), real[:n].expand(-1, 3, -1, -1)
        model.take_moments(name, val)
        distance = model.frechet_distance(real, name)
        rows.append(f"| {name} | {100 * model.accuracy(val, val_labels):.1f} % | {distance:.3f} |")
    model.save()
    write_sections(REPORT.format(parameters=sum(p.numel() for p in model.parameters()), n=n, rows="\n".join(rows)))


REPORT = """## Judge of digits

`digits.safetensors`, {parameters:,} parameters in half precision: digits read right of the {n:,} validation digits of
`data/mnist.py`, as pixels (exact) and as their tokens have them (decoded), and the Fréchet distance of as many training
digits from them, as near as a sample of that size comes. Written by `python data/digits.py`.

| digits | read right | distance |
|---|---|---|
{rows}
"""


if __name__ == "__main__":
    train()
