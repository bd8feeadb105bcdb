"""What the judge's net makes of a picture, as tokens: its features at each cell of the grid, and their mean.

Both are whitened, that is every channel is centred and divided by its deviation, and coded by FSQ as pictures are: a
cell is one token of four digits, the mean eight tokens. 4M-21 has the like of DINOv2 and ImageBind.

    coder = features.load(device)
    coder.see(pictures)             # (B, 64, 80) and (B, 80), whitened features of pictures (B, 3, 64, 64)
    coder.encode(pictures)          # {"feat": (B, 64), "feat_global": (B, 8)} uint16
    coder.cells(ids), coder.whole(ids)      # the features of such tokens

    python data/features.py         # 3 minutes of one core -> data/frozen/features.safetensors
"""
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

import judge as judges
import world
from raycaster import render
from shards import FROZEN
from tokenizer import DIGITS, LEVELS, digits_of, ids_of, save_half

WEIGHTS = FROZEN / "features.safetensors"
LENGTHS = {"feat": judges.CELLS ** 2, "feat_global": 8}  # tokens of a scene of 64 pixels
CHANNELS = judges.CHANNELS


class Coder(nn.Module):
    """An FSQ autoencoder of vectors (.., 80): so many tokens each."""

    def __init__(self, tokens, hidden=256):
        super().__init__()
        self.tokens, digits = tokens, DIGITS * tokens
        self.encoder = nn.Sequential(nn.Linear(CHANNELS, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
                                     nn.Linear(hidden, digits))
        self.decoder = nn.Sequential(nn.Linear(digits, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
                                     nn.Linear(hidden, CHANNELS))

    def quantise(self, x):
        """Digits (.., tokens * 4), floats holding 0..7; the gradient passes straight through the rounding."""
        x = (LEVELS - 1) * torch.sigmoid(self.encoder(x))
        return x + (x.round() - x).detach()

    def reconstruct(self, digits):
        return self.decoder(digits * (2 / (LEVELS - 1)) - 1)

    def encode(self, x):
        """Token ids (.., tokens)."""
        return ids_of(self.quantise(x).unflatten(-1, (self.tokens, DIGITS)), -1)

    def decode(self, ids):
        """Vectors (.., 80) of token ids (.., tokens)."""
        return self.reconstruct(digits_of(ids, -1).flatten(-2))


class Features(nn.Module):
    """The judge's features of pictures, whitened, and both coders."""

    def __init__(self, judge=None):
        super().__init__()
        self.cell, self.mean = Coder(1), Coder(LENGTHS["feat_global"])
        for name in ("cell_mean", "cell_deviation", "mean_mean", "mean_deviation"):
            self.register_buffer(name, torch.ones(CHANNELS))
        self.judge = [judge]  # in a list: its weights are not ours

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)
    def see(self, pictures):
        """Whitened features of the cells (B, 64, 80) and of the whole (B, 80) of pictures (B, 3, 64, 64) in [0, 1]."""
        parts = [self.judge[0].body(part * 2 - 1).flatten(2).mT for part in pictures.split(250)]
        cells = torch.cat(parts)
        whole = cells.mean(1)
        return (cells - self.cell_mean) / self.cell_deviation, (whole - self.mean_mean) / self.mean_deviation

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)
    def encode(self, pictures):
        """The tokens of pictures (B, 3, 64, 64): {"feat": (B, 64), "feat_global": (B, 8)}, uint16 arrays."""
        cells, whole = self.see(pictures)
        ids = {"feat": self.cell.encode(cells).flatten(1), "feat_global": self.mean.encode(whole)}
        return {name: value.cpu().numpy().astype(np.uint16) for name, value in ids.items()}

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)
    def cells(self, ids):
        """Features (B, 64, 80) of the tokens (B, 64) of feat."""
        return self.cell.decode(ids[..., None])

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)
    def whole(self, ids):
        """Features (B, 80) of the tokens (B, 8) of feat_global."""
        return self.mean.decode(ids)


def load(device="cpu", path=WEIGHTS):
    """The trained coders with the judge, frozen, in float32."""
    model = Features(judges.load(device))
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.requires_grad_(False).eval().to(device)


def train(steps=3000, batch=256, peak=2e-3, num=4000, seed=0):
    """Take the moments of features of num scenes' pictures, then train both coders to give them back."""
    torch.manual_seed(seed)
    model, parts = Features(judges.load()), []
    nn.init.zeros_(model.cell_mean), nn.init.zeros_(model.mean_mean)
    for codes in tqdm(world.sample_scenes(num, 1 << 53).split(250), "pictures", unit="x 250"):
        parts.append(model.see(render(world.build(codes), judges.SIDE, compile=False)[0]["rgb"]))
    cells, whole = (torch.cat(part) for part in zip(*parts))
    cells = cells.flatten(0, 1)
    for name, x in ("cell", cells), ("mean", whole):
        model.get_buffer(f"{name}_mean").copy_(x.mean(0))
        model.get_buffer(f"{name}_deviation").copy_(x.std(0).clamp(min=1e-3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01)
    for step in (bar := tqdm(range(steps), "features")):
        optimizer.param_groups[0]["lr"] = peak * min(1, (step + 1) / 100, 1.02 - step / steps)
        losses = []
        for name, x, coder in ("cell", cells, model.cell), ("mean", whole, model.mean):
            x = x[torch.randint(len(x), (batch,))]
            x = (x - model.get_buffer(f"{name}_mean")) / model.get_buffer(f"{name}_deviation")
            losses.append(F.mse_loss(coder.reconstruct(coder.quantise(x)), x))
        optimizer.zero_grad()
        sum(losses).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            bar.set_postfix(cell=f"{losses[0].item():.3f}", mean=f"{losses[1].item():.3f}")
    save_half(model, WEIGHTS)


if __name__ == "__main__":
    train()
