"""Your own pictures as a set for train_flow.py and train_maskgit.py.

    python data/pictures.py holiday/                          # -> data/holiday; every subfolder is a class
    python data/pictures.py holiday/ --labels=none            # all pictures are of one class
    python data/pictures.py holiday/ --size=64 --fit=pad      # pixels64; nothing cut off, but white beside the picture
    python data/pictures.py holiday/ --tokenizer=10           # tokens of a tokenizer that learns for ten minutes from them
    python train_flow.py --data=data/holiday/train --frozen=data/holiday/val.npz
    python train_maskgit.py --data=data/holiday/train --frozen=data/holiday/val.npz

PNG, JPEG and WebP files are known by what they hold and found in any depth. A set of pictures as hub.py has it, with
the arrays of `scenes.py --objects`: pixels32 (N, 3, 32, 32) or pixels64 (N, 3, 64, 64) uint8, label (N, 1) uint16, rgb
(N, 64) uint16, tokens of the pictures at 64 pixels. A tenth of every class, 2,000 pictures at most, is for validation:
val.npz repeats them up to the 2,000 rows that the times, noise and masks in data/frozen are for.
"""
import argparse
import functools
import hashlib
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

import tokenizer
from hub import finish, sentences, told, verified
from image_files import FORMATS, is_picture, open_picture, sha256_of_all
from shards import ROOT, Fault, check_name, first_line, plain_name, sha256
from studio import psnr

VERSION, SEED = 1, 0  # of what is made of a picture, and of the choice and order of pictures
FEWEST = 8  # pictures in a set
VALIDATION = 2000  # rows of val.npz
TOKEN_SIDE, TOKENS = 64, 64  # pixels across of a picture that is encoded, and its tokens
PART = 500  # pictures encoded at once
RECONSTRUCTED = 20  # pictures that show how much the tokens keep
FITS = {"crop": ImageOps.fit, "pad": functools.partial(ImageOps.pad, color="white")}


# ------------------------------------------------------------------------------------------------------------
# Files

def relative(path, folder):
    """A file as messages name it."""
    return repr(str(path.relative_to(folder)))


def find_files(folder, left_out):
    """Yield every file below a folder, in order, but no hidden ones. Where links lead back, a folder comes once."""
    def missed(error):
        left_out["folders that cannot be opened"].append(first_line(error))

    seen = set()
    for here, folders, names in os.walk(folder, onerror=missed, followlinks=True):
        place = os.path.realpath(here)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(here, name) for name in sorted(names) if not name.startswith("."))


def find_pictures(folder, labels, left_out):
    """The files below a folder that may be pictures of the set: a list of paths."""
    paths = []
    for path in find_files(folder, left_out):
        if is_picture(path):
            paths.append(path)
        else:
            left_out["not readable as PNG, JPEG or WebP"].append(relative(path, folder))
    inside = [path for path in paths if path.parent != folder]
    if labels == "none" or not inside:
        return paths
    for path in paths:
        if path.parent == folder:
            left_out["in no subfolder, so of no class"].append(relative(path, folder))
    return inside


def class_of(path, folder, labels):
    """The name of a picture's class."""
    name = folder.name if labels == "none" or path.parent == folder else path.relative_to(folder).parts[0]
    return os.fsencode(name).decode(errors="replace")


def read(path, size, fit):
    """The picture in a file, square, once for tokens and once of size pixels: two arrays (3, S, S) uint8."""
    image = open_picture(path, FORMATS, least=2 * TOKEN_SIDE)
    squares = [FITS[fit](image, (side, side), method=Image.LANCZOS) for side in (TOKEN_SIDE, size)]
    return [np.array(square).transpose(2, 0, 1) for square in squares]


def usable(paths, folder, size, fit, left_out):
    """Yield (path, *what read returns) of the files that can be read and are not equal to one before."""
    seen = set()
    for path in tqdm(paths, folder.name, unit=" pictures"):
        name = relative(path, folder)
        try:
            large, small = read(path, size, fit)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            left_out["too large, of more than 89 megapixels"].append(name)
            continue
        except Exception as error:  # Pillow's decoders raise what they like
            left_out["broken"].append(f"{name}: {first_line(error)}")
            continue
        digest = hashlib.sha256(large.tobytes() + small.tobytes()).digest()
        if digest in seen:
            left_out["equal to another"].append(name)
            continue
        seen.add(digest)
        yield path, large, small


# ------------------------------------------------------------------------------------------------------------
# The set

def collect(pictures, left_out):
    """Paths, pixels (N, 3, 64, 64) and pixels (N, 3, S, S) of what `usable` yields."""
    paths, large, small = [], [], []
    for path, *both in pictures:
        paths.append(path)
        large.append(both[0])
        small.append(both[1])
    if len(paths) < FEWEST:
        without = f"; left out: {told(left_out)}" if left_out else ""
        raise Fault(f"{len(paths)} pictures are too few, {FEWEST} are the least{without}")
    return paths, np.stack(large), np.stack(small)


def fit_tokenizer(large, minutes, path):
    """Train the scenes' tokenizer on for some minutes on pictures (N, 3, 64, 64), half of them mirrored, and write its
    weights."""
    from fit_tokenizer import optimise  # here, as it imports all that the scenes are made of
    images = torch.from_numpy(large)
    rng = torch.Generator().manual_seed(SEED)

    def draw_batch(step):
        rows = images[torch.randint(len(images), (80,), generator=rng)]
        return torch.cat([rows[:40], rows[40:].flip(3)])

    coder = tokenizer.load_tokenizer().train().requires_grad_()
    optimise(coder, draw_batch, minutes, 1e-3, torch.ones(()), bf16=False)  # which is slow on many CPUs
    tokenizer.save_half(coder, path)


def encode(coder, large):
    """Tokens (N, 64) uint16 of pictures (N, 3, 64, 64) of bytes."""
    return np.concatenate([coder.encode_flat(part.float() / 255) for part in torch.from_numpy(large).split(PART)])


def split(label, rng):
    """Rows for training and rows for validation, both in random order: a tenth of each label (N,), VALIDATION rows at
    most and one at least."""
    order = rng.permutation(len(label))
    share = min(0.1, VALIDATION / len(label))
    by_label = [order[label[order] == value] for value in np.unique(label)]
    held = np.concatenate([rows[:int(share * len(rows))] for rows in by_label])
    if not len(held):
        held = max(by_label, key=len)[:1]
    is_held = np.isin(order, held)
    return order[~is_held], order[is_held]


def commands(name, size, num, classes):
    """How to train on a set of num training pictures: a list of lines."""
    more = ""
    if num < 64:  # MaskGIT's batch
        more += f" --batch={num}"
    if classes == 1:
        more += " --label_drop=0"
    files = f"--data=data/{name}/train --frozen=data/{name}/val.npz"
    return [f"python train_flow.py {files} --pixels=pixels{size}{more}",
            f"python train_maskgit.py {files} --frozen_masks=data/frozen/eval_maskgit_64.npz{more}"]


@sentences("pictures.py")
def main(folder, name, size, labels, fit, minutes):
    """Make data/<name> of the pictures in a folder, or verify it."""
    source = Path(os.path.realpath(folder))  # resolve() would raise for a link to itself
    name = name or plain_name(source)
    out, left_out = ROOT / name, defaultdict(list)
    if not source.is_dir():
        raise Fault(f"{folder} is not a folder")
    check_name(name)
    if source == Path(os.path.realpath(out)):
        raise Fault(f"{folder} is where the set itself would be: give it another --name")
    found = find_pictures(source, labels, left_out)
    identity = {"name": name, "version": VERSION, "size": size, "seed": SEED, "labels": labels, "fit": fit,
                "tokenizer": sha256(tokenizer.WEIGHTS), "minutes": minutes, "content": sha256_of_all(found, source)}
    if verified(out, identity):
        return
    paths, large, pixels = collect(usable(found, source, size, fit, left_out), left_out)
    class_names = [class_of(path, source, labels) for path in paths]
    classes = sorted(set(class_names))
    number = {class_name: i for i, class_name in enumerate(classes)}
    label = np.array([number[class_name] for class_name in class_names])
    train, held = split(label, np.random.default_rng(SEED))
    out.mkdir(exist_ok=True)
    weights = tokenizer.WEIGHTS
    if minutes:
        weights = out / "tokenizer.safetensors"
        fit_tokenizer(large[train], minutes, weights)
    coder = tokenizer.load_tokenizer(path=weights)
    some = torch.from_numpy(large[held[:RECONSTRUCTED]]).float() / 255
    kept = psnr(coder.decode(coder.encode(some)), some)
    arrays = {f"pixels{size}": pixels, "label": label.astype(np.uint16)[:, None], "rgb": encode(coder, large)}
    kinds = {"label": {"length": 1, "vocab": len(classes), "pad": -1, "names": classes},
             "rgb": {"length": TOKENS, "vocab": tokenizer.VOCAB, "pad": -1}}
    if minutes:
        kinds["rgb"]["decoder"] = f"{name}/{weights.name}"
    counts = {reason: len(files) for reason, files in left_out.items()}
    meta = {**identity, "num": len(train), "validation": len(held), "left_out": counts}
    finish(out, meta, kinds, {m: array[train] for m, array in arrays.items()},
           {m: array[np.resize(held, VALIDATION)] for m, array in arrays.items()})
    print(f"{out}: {len(train):,} pictures for training and {len(held):,} for validation, classes: {len(classes)}")
    if left_out:
        print(f"left out: {told(left_out)}")
    if len(classes) == 1:
        print("one class: guidance has nothing to tell apart and is off")
    print(f"MaskGIT's tokens keep {kept:.1f} dB (PSNR) of pictures held out; what they keep of the scenes is in "
          "data/frozen/README.md")
    print(*commands(name, size, len(train), len(classes)), sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the pictures are, in any depth")
    parser.add_argument("--name", help="of the set; default: the folder's")
    parser.add_argument("--size", type=int, choices=(32, 64), default=32, help="pixels across, for the flow")
    parser.add_argument("--labels", choices=("subfolders", "none"), default="subfolders",
                        help="classes: the first-level subfolders; with none, or without subfolders, there is one")
    parser.add_argument("--fit", choices=tuple(FITS), default="crop",
                        help="how pictures become square: by cutting off, or by adding white")
    parser.add_argument("--tokenizer", type=float, default=0, dest="minutes", metavar="MINUTES",
                        help="for MaskGIT: have the tokenizer learn from these pictures for so long")
    arguments = parser.parse_args()
    if not 0 <= arguments.minutes <= 1440:
        parser.error("--tokenizer is from 0 to 1440 minutes")
    main(**vars(arguments))
