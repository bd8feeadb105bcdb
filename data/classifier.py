"""A small classifier of the objects set: a judge of generated pictures of one object.

Two numbers, taken after a training clock has stopped: how often it sees the class that was asked for, and the Frechet
distance of its 64 features between generated and validation pictures (arXiv:1706.08500, with a network of our own in
place of Inception). It looks at 32 x 32 pixels; larger pictures are averaged down first.

    judge = classifier.load(device)
    judge.accuracy(pictures, labels)                       # share of right classes
    judge.frechet_distance(pictures, "decoded")            # token models; "exact" for models of pixels

    python data/scenes.py --objects                        # its training set
    python data/classifier.py train                        # 4 minutes on 2 CPU cores
    python data/classifier.py report                       # its table in data/frozen/README.md
"""
import argparse
import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

import scenes
import shards
import tokenizer
import world
from raycaster import COLORS
from reports import write_sections

WEIGHTS = shards.FROZEN / "classifier.safetensors"
SIDE, FEATURES = 32, 64  # pixels across what it looks at, features in its last hidden layer
REFERENCES = ("exact", "decoded")  # validation pictures as rendered, and from their 64 tokens


# ------------------------------------------------------------------------------------------------------------
# The classifier and its two numbers

class Classifier(nn.Module):
    """Pictures (B, 3, 32, 32) in [0, 1] -> logits (B, 24) of world.CLASSES."""

    def __init__(self):
        super().__init__()
        layers, inside = [], 3
        for outside, stride in ((32, 1), (64, 2), (64, 1), (80, 2), (80, 1), (64, 2)):
            layers += [nn.Conv2d(inside, outside, 3, stride, 1), nn.SiLU()]
            inside = outside
        # No pooling at the end: the features know where the object is. Their mean square is 1, so that distances stay
        # below 4 * 64, whatever the pictures.
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(inside * 16, FEATURES), nn.SiLU(),
                                  nn.LayerNorm(FEATURES, elementwise_affine=False))
        self.head = nn.Linear(FEATURES, len(world.CLASSES))
        for name in REFERENCES:
            self.register_buffer(f"{name}_mean", torch.zeros(FEATURES))
            self.register_buffer(f"{name}_covariance", torch.zeros(FEATURES, FEATURES))

    def forward(self, pictures):
        return self.head(self.body(pictures * 2 - 1))

    @torch.no_grad()
    def features(self, pictures):
        """Features (B, 64), on the CPU, of pictures (B, 3, S, S) in [0, 1], S = 32 or 64; what is beyond is cut off."""
        if pictures.ndim != 4 or pictures.shape[1:] not in ((3, SIDE, SIDE), (3, 2 * SIDE, 2 * SIDE)):
            raise ValueError(f"pictures are (B, 3, S, S) with S 32 or 64, not {tuple(pictures.shape)}")
        if not pictures.is_floating_point():
            raise ValueError(f"pictures are floats in [0, 1], not {pictures.dtype}")
        small = [F.adaptive_avg_pool2d(part.to(self.head.weight.device).float().clamp(0, 1), SIDE)
                 for part in pictures.split(250)]
        return torch.cat([self.body(part * 2 - 1).cpu() for part in small])

    @torch.no_grad()
    def accuracy(self, pictures, labels):
        """Share of pictures, as `features` takes them, whose likeliest class is their label; labels (B,) or (B, 1)."""
        if labels.numel() != len(pictures):
            raise ValueError(f"{len(pictures)} pictures and {labels.numel()} labels")
        guess = self.head(self.features(pictures).to(self.head.weight.device)).argmax(1).cpu()
        return (guess == labels.flatten().cpu()).float().mean().item()

    def frechet_distance(self, pictures, reference):
        """Frechet distance between pictures and the 2,000 validation pictures, "exact" or "decoded".

        A model of tokens is compared with "decoded": what the tokenizer loses is no fault of the model. It falls with
        the number of pictures, so compare like numbers only. nan if a picture holds one.
        """
        if reference not in REFERENCES:
            raise ValueError(f"the reference is one of {', '.join(REFERENCES)}, not {reference!r}")
        mean, covariance = (getattr(self, f"{reference}_{name}").cpu() for name in ("mean", "covariance"))
        return frechet(*moments(self.features(pictures)), mean, covariance)


def load(device="cpu", path=WEIGHTS):
    """The trained classifier, frozen, in float32."""
    model = Classifier()
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.requires_grad_(False).eval().to(device)


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
# Training and report

def training_set():
    """The arrays of data/objects64/train that the classifier reads: pixels32, rgb, label, look."""
    kinds = {"pixels32": np.uint8, "rgb": np.int64, "label": np.int64, "look": np.int64}
    try:
        arrays, _ = shards.read(shards.ROOT / "objects64" / "train", kinds, scenes.modalities(64, "objects"))
    except shards.Fault as fault:
        sys.exit(f"classifier.py: {fault}")
    return [torch.from_numpy(arrays[name].astype(kind)) for name, kind in kinds.items()]


def decode(ids):
    """Pictures (B, 3, 32, 32) in [0, 1] of rgb tokens (B, 64)."""
    coder = tokenizer.load_tokenizer()
    return torch.cat([F.avg_pool2d(coder.decode(part.view(-1, 8, 8)), 2) for part in ids.split(50)])


def validation_set(n=2000):
    """The first n validation pictures (n, 3, 32, 32) in [0, 1], exact and decoded, and their labels (n,)."""
    with np.load(shards.FROZEN / "objects64.npz") as arrays:
        pixels, rgb, label = (torch.from_numpy(arrays[name][:n].astype(kind)) for name, kind in
                              (("pixels32", np.float32), ("rgb", np.int64), ("label", np.int64)))
    return pixels / 255, decode(rgb), label[:, 0]


def train(steps=2500, batch=200, peak=2e-3, decoded=12000, seed=0):
    """Train on exact pictures and decoded ones, a little noise on both; then take the reference moments.

    Besides the class the features have to tell everything else about the picture (`look`: material, size, place, light
    ...), for without it a Frechet distance would not notice if samples got that wrong.
    """
    torch.manual_seed(seed)
    pixels, rgb, label, look = training_set()
    pool = torch.cat([pixels, (decode(rgb[:decoded]) * 255).round().byte()])
    parts = np.stack(np.unravel_index(look.numpy(), world.LOOK), 1)
    targets = torch.cat([label, torch.from_numpy(parts)], 1)
    targets = torch.cat([targets, targets[:decoded]])  # (N, 10): class, then the digits of look
    model, teller = Classifier(), nn.Linear(FEATURES, sum(world.LOOK))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    optimizer = torch.optim.AdamW([*model.parameters(), *teller.parameters()], lr=peak, weight_decay=0.01)
    for step in (bar := tqdm(range(steps))):
        optimizer.param_groups[0]["lr"] = peak * min(1, step / 100, 1.02 - step / steps)
        rows = torch.randint(len(pool), (batch,))
        pictures, target = pool[rows].float() / 255, targets[rows]
        pictures += 0.05 * torch.rand(batch, 1, 1, 1) * torch.randn_like(pictures)
        with torch.autocast("cpu", torch.bfloat16):
            features = model.body(pictures * 2 - 1)
            logits, told = model.head(features), teller(features)
        loss = F.cross_entropy(logits.float(), target[:, 0])
        for i, digit in enumerate(told.float().split(world.LOOK, 1), 1):
            loss = loss + 0.2 * F.cross_entropy(digit, target[:, i])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    save(model)
    model = load()  # the moments are those of the rounded weights
    *pictures, labels = validation_set()
    for name, images in zip(REFERENCES, pictures):
        mean, covariance = moments(model.features(images))
        model.get_buffer(f"{name}_mean").copy_(mean)
        model.get_buffer(f"{name}_covariance").copy_(covariance)
        print(f"accuracy on {name} validation pictures: {100 * model.accuracy(images, labels):.2f} %")
    save(model)


def save(model):
    """Write weights in half precision and moments in single precision, under a temporary name first."""
    part = WEIGHTS.with_suffix(".part")
    moments_of = lambda name: name.startswith(REFERENCES)
    save_file({name: (value.float() if moments_of(name) else value.half()).contiguous()
               for name, value in model.state_dict().items()}, part)
    part.replace(WEIGHTS)


REPORT = """## Judge of the objects set

`classifier.safetensors`, {parameters:,} parameters in half precision: its accuracy over the {classes} classes, and
Fréchet distances to the 2,000 validation pictures as rendered (exact, for models of pixels) and as their tokens give
them back (decoded, for models of tokens). {n:,} new pictures show how good {n:,} samples can be at best, the rows below
them what faults cost. Written by `python data/classifier.py report`.

| pictures | accuracy | distance to exact | to decoded |
|---|---|---|---|
{rows}
"""


def report(n=1000):
    """Replace the classifier's section of data/frozen/README.md."""
    judge, coder = load(), tokenizer.load_tokenizer()
    exact, decoded, labels = validation_set()
    pixels, rgb, label, _ = (array[:n] for array in training_set())
    torch.manual_seed(0)
    cases = [("2,000 validation, exact", exact, labels), ("2,000 validation, decoded", decoded, labels),
             (f"{n:,} training, exact", pixels.float() / 255, label), (f"{n:,} training, decoded", decode(rgb), label)]
    _, fresh, _ = scenes.make_objects(n, 64, (1 << 52) + 1, "cpu", coder)
    pixels, rgb, label = (torch.from_numpy(fresh[name].astype(kind)) for name, kind in
                          (("pixels32", np.float32), ("rgb", np.int64), ("label", np.int64)))
    for name, pictures in (("exact", pixels / 255), ("decoded", decode(rgb))):
        flat = label[:, 0] // len(COLORS) != 1
        cases += [(f"{n:,} new, {name}", pictures, label),
                  ("the same, without spheres", pictures[flat], label[flat])]
    cases += [("the same, a tenth of the tokens random", decode(scramble(rgb, 0.1)), label),
              ("the same, all tokens random", decode(scramble(rgb, 1)), label)]
    rows = [f"| {name} | {100 * judge.accuracy(pictures, labels):.2f} % | "
            + " | ".join(f"{judge.frechet_distance(pictures, reference):.3f}" for reference in REFERENCES) + " |"
            for name, pictures, labels in cases]
    section = REPORT.format(parameters=sum(p.numel() for p in judge.parameters()), classes=len(world.CLASSES), n=n,
                            rows="\n".join(rows))
    write_sections(section)
    print(section)


def scramble(ids, share):
    """Tokens (B, 64) with a share of them replaced by uniformly random ones."""
    return torch.where(torch.rand(ids.shape) < share, torch.randint(tokenizer.VOCAB, ids.shape), ids)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("train", "report"))
    {"train": train, "report": report}[parser.parse_args().job]()
