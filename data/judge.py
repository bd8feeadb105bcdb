"""The judge: a small convolutional net that reads a scene back from a picture, to measure generated pictures.

At each cell of the token grid it says whether an object's centre is there, and its shape, colour, material and size.
Of these follow, after a training clock has stopped: F1 of the objects that were asked for, a fidelity score, the class
accuracy of pictures of one object, and a Frechet distance (arXiv:1706.08500, with this net in place of Inception).

    judge = judge.load(device)
    judge.read(pictures)                                   # [{x, y, shape, color, material, size}, ..] per picture
    judge.fidelity(pictures, objects)                      # probability of what was asked, mean over objects
    judge.accuracy(pictures, labels)                       # share of pictures with the right one of world.CLASSES
    judge.frechet_distance(pictures, "objects_decoded")    # for models of tokens; "objects_exact" for models of pixels

    python data/judge.py train                             # 5 minutes on 2 CPU cores -> data/frozen/judge.safetensors
    python data/judge.py report                            # its table in data/frozen/README.md
"""
import argparse
import math
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

import shards
import tokenizer
import world
from raycaster import COLORS, render
from reports import write_sections
from texts import WORDS, facts, place

WEIGHTS = shards.FROZEN / "judge.safetensors"
SIDE, CELLS = 64, world.PLACES  # pixels and cells across
CHANNELS = 80
HEADS = {name: len(WORDS[name]) for name in ("shape", "color", "material", "size")}
REFERENCES = ("scenes_exact", "scenes_decoded", "objects_exact", "objects_decoded")
REACH = 13  # percent of the frame: objects as near are the same, if they look the same; a cell is 12.5


# ------------------------------------------------------------------------------------------------------------
# The net

class Residual(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(dim, dim, 3, padding=1), nn.Conv2d(dim, dim, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x):
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class Reader(nn.Module):
    """A net that measures drawn pictures. look gives features (B, channels) first, classes_of what pictures show; weights
    are the file that holds it, with moments of the features of validation pictures, the references."""
    weights = references = channels = None

    def __init__(self):
        super().__init__()
        for name in self.references:
            self.register_buffer(f"{name}_mean", torch.zeros(self.channels))
            self.register_buffer(f"{name}_covariance", torch.zeros(self.channels, self.channels))

    def accuracy(self, pictures, labels):
        """Share of pictures that show the class of their label; labels (B,) or (B, 1)."""
        if labels.numel() != len(pictures):
            raise ValueError(f"{len(pictures)} pictures and {labels.numel()} labels")
        return (self.classes_of(pictures) == labels.flatten().cpu()).float().mean().item()

    def frechet_distance(self, pictures, reference):
        """Frechet distance between pictures and validation pictures, one of the references.

        A model of tokens is compared with "decoded": what the tokenizer loses is no fault of the model. It falls with
        the number of pictures, so compare like numbers only. nan if a picture holds one.
        """
        if reference not in self.references:
            raise ValueError(f"the reference is one of {', '.join(self.references)}, not {reference!r}")
        mean, covariance = (self.get_buffer(f"{reference}_{name}").cpu() for name in ("mean", "covariance"))
        return frechet(*moments(self.look(pictures)[0]), mean, covariance)

    def take_moments(self, reference, pictures):
        for name, value in zip(("mean", "covariance"), moments(self.look(pictures)[0])):
            self.get_buffer(f"{reference}_{name}").copy_(value)

    def save(self):
        """Write weights in half precision and moments in single precision, under a temporary name first."""
        part = self.weights.with_suffix(".part")
        save_file({name: (value.float() if name.startswith(self.references) else value.half()).contiguous()
                   for name, value in self.state_dict().items()}, part)
        part.replace(self.weights)

    @classmethod
    def load(cls, device="cpu"):
        """The trained net, frozen, in float32."""
        model = cls()
        model.load_state_dict({name: value.float() for name, value in load_file(cls.weights).items()})
        return model.requires_grad_(False).eval().to(device)


class Judge(Reader):
    """Pictures (B, 3, 64, 64) in [0, 1] -> logits (B, 1 + 3 + 8 + 2 + 2, 8, 8): occupied, then HEADS."""
    weights, references, channels = WEIGHTS, REFERENCES, CHANNELS
    classes, cells = len(world.CLASSES), CELLS  # classes of close-ups, cells across them

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 4, 2, 1), nn.SiLU(), nn.Conv2d(32, 48, 4, 2, 1), Residual(48), nn.SiLU(),
            nn.Conv2d(48, CHANNELS, 4, 2, 1), Residual(CHANNELS), Residual(CHANNELS), Residual(CHANNELS), nn.SiLU())
        self.head = nn.Conv2d(CHANNELS, 1 + sum(HEADS.values()), 1)

    def forward(self, pictures):
        return self.head(self.body(pictures * 2 - 1))

    @torch.no_grad()
    def look(self, pictures):
        """Pooled features (B, 80) and probabilities, occupied (B, 8, 8) and {head: (B, values, 8, 8)}, on the CPU.

        pictures: (B, 3, S, S) floats in [0, 1], S = 32 or 64; what is beyond is cut off, 32 px are enlarged.
        """
        if pictures.ndim != 4 or pictures.shape[1:] not in ((3, SIDE, SIDE), (3, SIDE // 2, SIDE // 2)):
            raise ValueError(f"pictures are (B, 3, S, S) with S 32 or 64, not {tuple(pictures.shape)}")
        if not pictures.is_floating_point():
            raise ValueError(f"pictures are floats in [0, 1], not {pictures.dtype}")
        parts = []
        device = self.head.weight.device
        with torch.autocast(device.type, enabled=False):  # whatever the precision of the model that drew them
            for part in pictures.split(250):
                features = self.body(enlarge(part.to(device).float().clamp(0, 1)) * 2 - 1)
                parts.append((features.mean((2, 3)).cpu(), self.head(features).cpu()))
        features, logits = (torch.cat(each) for each in zip(*parts))
        occupied, *values = logits.split([1, *HEADS.values()], 1)
        return features, occupied[:, 0].sigmoid(), {name: v.softmax(1) for name, v in zip(HEADS, values)}

    def read(self, pictures):
        """The objects of every picture: where a cell is likelier occupied than not, and than its neighbours."""
        _, occupied, values = self.look(pictures)
        best = F.max_pool2d(occupied[:, None], 3, 1, 1)[:, 0]
        lists = [[] for _ in occupied]
        words = {name: v.argmax(1) for name, v in values.items()}
        for b, row, column in ((occupied > 0.5) & (occupied == best)).nonzero().tolist():
            told = {name: WORDS[name][words[name][b, row, column]] for name in HEADS}
            lists[b].append({"x": percent(column), "y": percent(row), **told})
        return lists

    def fidelity(self, pictures, objects):
        """Mean probability (0 to 1) that an object asked for is in its cell, of its shape, colour and material.

        objects: per picture a list of dicts x, y (percent), shape, color, material.
        """
        _, occupied, values = self.look(pictures)
        scores = []
        for b, asked in enumerate(objects):
            for o in asked:
                row, column = (min(CELLS - 1, int(o[axis] * CELLS // 100)) for axis in ("y", "x"))
                score = occupied[b, row, column]
                for name in ("shape", "color", "material"):
                    score = score * values[name][b, WORDS[name].index(o[name]), row, column]
                scores.append(score.item())
        return sum(scores) / max(1, len(scores))

    def classes_of(self, pictures):
        """Of pictures of one object the class that their likeliest cell shows, one of world.CLASSES: (B,)."""
        _, occupied, values = self.look(pictures)
        cell = occupied.flatten(1).argmax(1)
        shape, color = (values[name].flatten(2)[torch.arange(len(cell)), :, cell].argmax(1) for name in ("shape", "color"))
        return shape * len(COLORS) + color


def enlarge(pictures):
    return pictures if pictures.shape[-1] == SIDE else F.interpolate(pictures, SIDE, mode="bilinear")


def percent(cell):
    """The middle of a cell in percent of the frame, as texts give it."""
    return int((cell + 0.5) * 100 / CELLS)


load = Judge.load


# ------------------------------------------------------------------------------------------------------------
# Its numbers

def matched(told, meant, reach=REACH):
    """Pairs of objects of two lists (dicts with x, y) one to one, closest first, at most reach percent apart."""
    pairs = sorted((math.dist((a["x"], a["y"]), (b["x"], b["y"])), i, j)
                   for i, a in enumerate(told) for j, b in enumerate(meant))
    used_i, used_j = set(), set()
    for distance, i, j in pairs:
        if distance <= reach and i not in used_i and j not in used_j:
            used_i.add(i)
            used_j.add(j)
            yield told[i], meant[j]


def object_f1(told, meant, keys=("shape", "color", "material")):
    """F1 of objects that are where they should be and right in all keys; told, meant: lists of objects per scene."""
    right = sum(all(a[key] == b[key] for key in keys) for pair in zip(told, meant) for a, b in matched(*pair))
    return 2 * right / max(1, sum(map(len, told)) + sum(map(len, meant)))


def attribute_f1(told, meant, keys=("shape", "color", "material")):
    """F1 of single attributes: an object that has no counterpart in the other list counts all of its own as wrong."""
    right = sum(a[key] == b[key] for pair in zip(told, meant) for a, b in matched(*pair) for key in keys)
    return 2 * right / max(1, len(keys) * (sum(map(len, told)) + sum(map(len, meant))))


def caption_f1(told, meant):
    """F1 of objects as captions tell them: roughly where, and of which shape, colour and material."""
    counts = [[Counter((place(o), o["shape"], o["color"], o["material"]) for o in objects) for objects in lists]
              for lists in (told, meant)]
    right = sum((a & b).total() for a, b in zip(*counts))
    return 2 * right / max(1, sum(map(len, told)) + sum(map(len, meant)))


def moments(features):
    """Mean (D,) and covariance (D, D), float64, of features (B, D)."""
    if len(features) < 2:
        raise ValueError("a covariance needs two pictures at least")
    features = features.double()
    return features.mean(0), torch.cov(features.T)


def frechet(mean1, covariance1, mean2, covariance2):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2), the squared 2-Wasserstein distance of two Gaussians, in float64.

    (C1 C2)^1/2 and the square root of the symmetric C1^1/2 C2 C1^1/2 have the same eigenvalues.
    """
    mean1, covariance1, mean2, covariance2 = (x.double() for x in (mean1, covariance1, mean2, covariance2))
    if not (mean1.isfinite().all() and mean2.isfinite().all()):
        return math.nan
    values, vectors = torch.linalg.eigh(covariance1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance2 @ root).clamp(min=0).sqrt().sum()
    return max(0.0, ((mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * cross).item())


# ------------------------------------------------------------------------------------------------------------
# Training

def decode(ids, coder):
    """Pictures (B, 3, 64, 64) in [0, 1] of rgb tokens (B, 64)."""
    return torch.cat([coder.decode(part.view(-1, 8, 8)) for part in ids.split(50)])


def targets_of(scenes, close_up):
    """What the net should say of scenes: (n, 5, 8, 8) int64, -1 where nothing is to be said."""
    n, grid = len(scenes["lamp"]), torch.full((len(scenes["lamp"]), 1 + len(HEADS), CELLS, CELLS), -1)
    grid[:, 0] = 0
    for b, objects in enumerate(facts(scenes, torch.zeros(n, 1, 1, dtype=torch.long))):
        for o in objects:
            cell = min(CELLS - 1, o["y"] * CELLS // 100), min(CELLS - 1, o["x"] * CELLS // 100)
            grid[(b, 0, *cell)] = 1
            for i, name in enumerate(HEADS, 1):
                if not (close_up and name == "size"):  # a matter of scale, which close-ups do not have
                    grid[(b, i, *cell)] = WORDS[name].index(o[name])
    return grid


def training_set(num, coder, seed=1 << 53):
    """Bytes of pictures and targets: num scenes and num / 2 close-ups, half of each decoded from tokens."""
    parts = []
    for codes in (world.sample_scenes(num, seed), world.sample_close_ups(num // 2, seed)):
        close_up = world.close_up(codes)
        for i, part in enumerate(tqdm(codes.split(250), desc="pictures", unit="x 250")):
            scenes = world.build(part)
            rgb = render(scenes, SIDE)[0]["rgb"]
            if i % 2:
                rgb = coder.decode(coder.encode(rgb))
            elif close_up and i % 4:  # as models of 32 px draw them
                rgb = enlarge(F.avg_pool2d(rgb, 2))
            parts.append(((rgb * 255).round().byte(), targets_of(scenes, close_up)))
    return [torch.cat(each) for each in zip(*parts)]


def loss_of(logits, targets):
    """Cross-entropy of occupancy, mean over cells, and of each head, mean over objects."""
    occupied, *values = logits.float().split([1, *HEADS.values()], 1)
    loss = 16 * F.binary_cross_entropy_with_logits(occupied[:, 0], targets[:, 0].float())  # one cell in 32 is occupied
    return loss + sum(F.cross_entropy(v, targets[:, i], ignore_index=-1) for i, v in enumerate(values, 1))


def train(steps=3000, batch=128, peak=2e-3, num=13000, seed=0):
    """Train on exact and decoded pictures, a little noise on both; then take the reference moments."""
    torch.manual_seed(seed)
    coder = tokenizer.load_tokenizer()
    pictures, targets = training_set(num, coder)
    model = Judge().to(memory_format=torch.channels_last)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01)
    for step in (bar := tqdm(range(steps))):
        optimizer.param_groups[0]["lr"] = peak * min(1, step / 100, 1.02 - step / steps)
        rows = torch.randint(len(pictures), (batch,))
        x = pictures[rows].float() / 255
        x += 0.05 * torch.rand(batch, 1, 1, 1) * torch.randn_like(x)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x.contiguous(memory_format=torch.channels_last))
        loss = loss_of(logits, targets[rows])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    model.save()
    take_moments()


def take_moments():
    """Of the features of the frozen validation pictures, by the saved weights."""
    model = load()
    for name, (images, _) in validation_sets(tokenizer.load_tokenizer()).items():
        model.take_moments(name, images)
    model.save()


# ------------------------------------------------------------------------------------------------------------
# Report

def validation_sets(coder):
    """{reference: (pictures, objects per picture)} of the frozen scenes and close-ups."""
    sets = {}
    for kind in ("scenes", "objects"):
        with np.load(shards.FROZEN / f"{kind}64.npz") as arrays:
            rgb, codes = (torch.from_numpy(arrays[name].astype(np.int64)) for name in ("rgb", "scene"))
        scenes = world.build(codes)
        pictures, index = render(scenes, SIDE, compile=False)
        exact = pictures["rgb"] if kind == "scenes" else F.avg_pool2d(pictures["rgb"], 2)
        objects = facts(scenes, index)
        sets |= {f"{kind}_exact": (exact, objects), f"{kind}_decoded": (decode(rgb, coder), objects)}
    return sets


REPORT = """## Judge

`judge.safetensors`, {parameters:,} parameters in half precision: F1 of the objects that it reads (place within {reach} % of
the frame, shape, colour and material all right), with size as well, accuracy over the {classes} classes of close-ups, and
Fréchet distances to the 2,000 validation pictures as rendered (exact) and as their tokens give them back (decoded).
{n:,} new pictures show what {n:,} samples can have at best, the rows below them what faults cost. The judge's own training
scenes leave none out: some of the validation's and of the new ones with a single object look like one of them. Written by
`python data/judge.py report`.

| pictures | object F1 | with size | class accuracy | distance to exact | to decoded |
|---|---|---|---|---|---|
{rows}
"""


def new_pictures(kind, n, coder):
    """Exact and decoded pictures of n scenes from another seed, their tokens and their objects."""
    codes = {"scenes": world.sample_scenes, "objects": world.sample_close_ups}[kind](n, (1 << 54))
    pictures, index = render(world.build(codes), SIDE, compile=False)
    ids = coder.encode(pictures["rgb"]).flatten(1)
    exact = pictures["rgb"] if kind == "scenes" else F.avg_pool2d(pictures["rgb"], 2)
    return exact, ids, facts(world.build(codes), index)


def scramble(ids, share):
    """Tokens (B, 64) with a share of them replaced by uniformly random ones."""
    return torch.where(torch.rand(ids.shape) < share, torch.randint(tokenizer.VOCAB, ids.shape), ids)


def table_row(judge, name, kind, pictures, objects):
    told = judge.read(pictures)
    f1 = object_f1(told, objects)
    size, accuracy = "", ""
    if kind == "scenes":
        size = f"{object_f1(told, objects, ('shape', 'color', 'material', 'size')):.4f}"
    else:
        labels = [WORDS["shape"].index(o["shape"]) * len(COLORS) + WORDS["color"].index(o["color"]) for o, in objects]
        accuracy = f"{100 * judge.accuracy(pictures, torch.tensor(labels)):.2f} %"
    distances = " | ".join(f"{judge.frechet_distance(pictures, f'{kind}_{form}'):.3f}" for form in ("exact", "decoded"))
    return f"| {name} | {f1:.4f} | {size} | {accuracy} | {distances} |"


def report(n=1000):
    """Replace the judge's section of data/frozen/README.md."""
    judge, coder, rows = load(), tokenizer.load_tokenizer(), []
    torch.manual_seed(0)
    for name, (pictures, objects) in validation_sets(coder).items():
        kind, form = name.split("_")
        rows.append(table_row(judge, f"{kind}, 2,000 validation, {form}", kind, pictures, objects))
    for kind in ("scenes", "objects"):
        exact, ids, objects = new_pictures(kind, n, coder)
        cases = {f"{n:,} new, exact": exact, f"{n:,} new, decoded": decode(ids, coder),
                 "the same, a tenth of the tokens random": decode(scramble(ids, 0.1), coder),
                 "the same, all tokens random": decode(scramble(ids, 1), coder)}
        rows += [table_row(judge, f"{kind}, {name}", kind, pictures, objects) for name, pictures in cases.items()]
    section = REPORT.format(parameters=sum(p.numel() for p in judge.parameters()), reach=REACH, n=n,
                            classes=len(world.CLASSES), rows="\n".join(rows))
    write_sections(section)
    print(section)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("train", "moments", "report"))
    {"train": train, "moments": take_moments, "report": report}[parser.parse_args().job]()
