"""The folder on which EPFL's course COM-304 trains its nano4M as shards of ours, and our scenes as such a folder.

    python data/course.py ROOT                                    # ROOT/{train,val} -> data/course/{train,val.npz}
    python data/course.py ROOT --name=mine --splits=train,test    # other splits, to data/mine
    python train_4m.py --track=course
    python data/scenes.py --course=DIR [--num=20000]              # our scenes at 128 px -> DIR/{train,val}

Such a folder is ROOT/<split>/<modality>/<sample>: .npy files of (10, 256) picture tokens below 64000 and .json files of
ten texts, for ten crops of a sample that belong together. In training every crop is an example, in validation the first
one of a sample is, of at most 2,000. Texts become GPT-2's tokens between a start and an end token, cut or padded
to 256. val.npz has besides the tokens which of them are inputs and which targets, as our own evaluation draws them
(roles) and as the course's code does (course_roles), and how GPT-2's tokens are spelled (word_bytes, word_edges).
"""
import argparse
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

import shards
import tokenizer
from eval_masks import draw_course_roles, draw_roles, draw_whole
from hub import finish, sentences, verified
from shards import FROZEN, ROOT, Fault, first_line
from streams import load_gpt2

VERSION = 1  # of everything that decides what comes out
FOLDERS = {"rgb": "tok_rgb@256", "depth": "tok_depth@256", "normal": "tok_normal@256", "desc": "scene_desc",
           "caption": "caption"}
TEXTS = ("desc", "caption")
MASKED = 4  # modalities that the course masks, the first ones: it has captions, and leaves them out
CROPS, LENGTH = 10, 256  # per sample, and tokens of a picture or a text
DIGITS = (512, 125)  # of a picture's token, id % 512 and id // 512: the levels 8, 8, 8 and 5, 5, 5 of Cosmos DI16x16
PAD, START, END, TEXT_VOCAB = 50257, 50258, 50259, 50304  # GPT-2 has 50257 tokens
LONGEST = 128  # bytes of a token of GPT-2
VALIDATION = 2000  # samples at most, the first ones


def kinds():
    """Length, vocabulary, pad id (-1: none), digits and end token of each modality, as meta.json has them."""
    picture = {"length": LENGTH, "vocab": DIGITS[0] * DIGITS[1], "pad": -1, "digits": list(DIGITS)}
    text = {"length": LENGTH, "vocab": TEXT_VOCAB, "pad": PAD, "end": END}
    return {m: text if m in TEXTS else picture for m in FOLDERS}


def file_of(root, split, m, name):
    ending = "json" if m in TEXTS else "npy"
    return root / split / FOLDERS[m] / f"{name}.{ending}"


# ------------------------------------------------------------------------------------------------------------
# Reading the course's folder

def find_samples(root, split):
    """The sorted names of a split's samples. Fault unless every modality has one file of each, and no others."""
    names = []
    for m in FOLDERS:
        pattern = file_of(root, split, m, "*")
        if not pattern.parent.is_dir():
            raise Fault(f"{pattern.parent} is missing: every split has {', '.join(FOLDERS.values())}")
        found = {path.stem for path in pattern.parent.glob(pattern.name)}
        if not found:
            raise Fault(f"{pattern.parent} has no {pattern.name}")
        names = names or sorted(found)
        if odd := sorted(found.symmetric_difference(names)):
            reference = file_of(root, split, "rgb", odd[0])
            if odd[0] in found:
                raise Fault(f"{reference} is missing: there is {file_of(root, split, m, odd[0])}")
            raise Fault(f"{file_of(root, split, m, odd[0])} is missing: there is {reference}")
    return names


def fingerprint(root, samples):
    """One hash of the names, sizes and times of change of all files; samples: {split: names}."""
    digest = hashlib.sha256()
    for split, names in samples.items():
        for m in FOLDERS:
            for name in names:
                path = file_of(root, split, m, name)
                about = path.stat()
                digest.update(os.fsencode(f"{path.relative_to(root)} {about.st_size} {about.st_mtime_ns}\n"))
    return digest.hexdigest()


def read_tokens(path):
    """Picture tokens (CROPS, LENGTH) of a .npy file."""
    try:
        tokens = shards.open_array(path)
    except (OSError, ValueError) as error:
        raise Fault(f"{path} is damaged ({first_line(error)})") from None
    if tokens.dtype.kind not in "iu" or tokens.shape != (CROPS, LENGTH):
        raise Fault(f"{path} holds {tokens.dtype} {tokens.shape}, not integers {(CROPS, LENGTH)}")
    vocab = DIGITS[0] * DIGITS[1]
    for token in (int(tokens.min()), int(tokens.max())):
        if not 0 <= token < vocab:
            raise Fault(f"{path} holds token {token}, and they go from 0 to {vocab - 1}")
    return tokens


def read_texts(path):
    """The CROPS texts of a .json file."""
    try:
        texts = shards.read_json(path)
    except (OSError, ValueError) as error:
        raise Fault(f"{path} is damaged ({first_line(error)})") from None
    if not isinstance(texts, list) or len(texts) != CROPS or not all(isinstance(text, str) for text in texts):
        raise Fault(f"{path} does not hold a list of {CROPS} texts")
    return texts


def text_row(encoding, text):
    """Tokens (LENGTH,) of a text: START, the text cut to what fits, END, PAD."""
    text = text[:LENGTH * LONGEST]  # what is behind has no place, however long it is
    row = [START, *encoding.encode_ordinary(text)[:LENGTH - 2], END]
    return row + [PAD] * (LENGTH - len(row))


def read_split(root, split, names, encoding, crops):
    """{modality: tokens (samples * crops, LENGTH) uint16} of the first crops of some samples."""
    arrays = {m: np.empty((len(names), crops, LENGTH), np.uint16) for m in FOLDERS}
    for i, name in enumerate(tqdm(names, split, unit=" samples")):
        for m in FOLDERS:
            path = file_of(root, split, m, name)
            if m in TEXTS:
                arrays[m][i] = [text_row(encoding, text) for text in read_texts(path)[:crops]]
            else:
                arrays[m][i] = read_tokens(path)[:crops]
    return {m: array.reshape(-1, LENGTH) for m, array in arrays.items()}


# ------------------------------------------------------------------------------------------------------------
# Writing our shards

def draw_masks(arrays):
    """Roles (n, size) uint8 of validation rows' places, 1 input, 2 target, 0 neither: as ours are, and as the course's.

    Fault if there are too few rows for a target of every modality in the even and in the odd ones.
    """
    tokens = np.concatenate(list(arrays.values()), 1)
    kind = np.repeat(np.arange(len(FOLDERS)), LENGTH)
    pad = np.array([about["pad"] for about in kinds().values()])
    rng, draws = np.random.default_rng(0), (draw_roles, draw_whole)
    roles = np.stack([draws[i % 2](row != pad[kind], kind, rng) for i, row in enumerate(tokens)])
    for half in (roles[::2], roles[1::2]):
        _, places = np.nonzero(half == 2)
        if len(np.unique(kind[places])) < len(FOLDERS):
            raise Fault(f"{len(tokens)} validation samples are too few: some 20 are enough")
    course_roles = np.zeros_like(roles)
    for row in course_roles:
        row[:MASKED * LENGTH] = draw_course_roles([LENGTH] * MASKED, rng)
    return {"roles": roles, "course_roles": course_roles}


def spelling(encoding):
    """The bytes of all tokens in a row, and where each begins and the last one ends."""
    words = encoding.decode_tokens_bytes(range(encoding.n_vocab))
    edges = np.cumsum([0, *map(len, words)])
    return {"word_bytes": np.frombuffer(b"".join(words), np.uint8), "word_edges": edges}


def check_place(name):
    """The folder data/<name>. Fault if something else than a set of this script is there."""
    folder = ROOT / name
    if not re.fullmatch(r"\w[\w-]*", name):
        raise Fault(f"--name={name} is not a name of letters, digits, _ and -")
    others = [path.name for path in folder.glob("*") if path.name not in ("train", "train.part", "val.npz")]
    if others:
        raise Fault(f"{folder} has other things in it, such as {others[0]}: give another --name")
    return folder


@sentences("course.py")
def convert(root, name, splits):
    """Make data/<name> of two splits of the course's folder, or verify it."""
    folder = check_place(name)
    if len(splits) != 2 or splits[0] == splits[1]:
        raise Fault(f"--splits={','.join(splits)}: give two, the one to train on and the one to validate on")
    samples = {split: find_samples(root, split) for split in splits}
    identity = {"name": "course", "version": VERSION, "source": fingerprint(root, samples)}
    if verified(folder, identity):
        return
    encoding = load_gpt2()
    train_split, val_split = splits
    val = read_split(root, val_split, samples[val_split][:VALIDATION], encoding, 1)
    val |= {**draw_masks(val), **spelling(encoding)}
    train = read_split(root, train_split, samples[train_split], encoding, CROPS)
    folder.mkdir(exist_ok=True)
    num = len(train["rgb"])
    finish(folder, {**identity, "num": num}, kinds(), train, val)
    print(f"{folder}: {num:,} examples for training, {len(val['rgb']):,} for validation")


# ------------------------------------------------------------------------------------------------------------
# Our scenes as the course's folder

def write_split(out, arrays, encoding):
    """Files of scenes, all crops of which are the same; arrays: {modality: tokens (n, length)} of our tokenizers."""
    n = len(arrays["rgb"])
    digits = max(5, len(str(n - 1)))  # so that names are sorted as numbers are
    for m in FOLDERS:
        file_of(out.parent, out.name, m, "").parent.mkdir(parents=True)
    for i in tqdm(range(n), out.name, unit=" scenes"):
        for m in FOLDERS:
            path, row = file_of(out.parent, out.name, m, f"{i:0{digits}d}"), arrays[m][i]
            if m in TEXTS:
                path.write_text(json.dumps([tokenizer.decode_text(encoding, row)] * CROPS), encoding="utf-8")
            else:
                np.save(path, np.tile(row.astype(np.int16), (CROPS, 1)))


@sentences("scenes.py")
def export(out, num, train=ROOT / "scenes128" / "train", frozen=FROZEN / "scenes128.npz"):
    """Write num of our training scenes (None: all) and the frozen validation scenes as the course's folder."""
    if out.exists():
        raise Fault(f"{out} is there already: name a folder that is not")
    arrays, meta = shards.read(train, FOLDERS)
    if num and num > meta["num"]:
        raise Fault(f"{train} has {meta['num']:,} scenes, not {num:,}: delete it to have more made")
    with np.load(frozen, allow_pickle=False) as file:
        validation = {m: file[m] for m in FOLDERS}
    encoding = tokenizer.load_text()
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    write_split(part / "train", {m: array[:num] for m, array in arrays.items()}, encoding)
    write_split(part / "val", validation, encoding)
    part.rename(out)
    print(f"{out}: train and val")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="the course's folder")
    parser.add_argument("--name", default="course", help="of the set: data/<name>")
    parser.add_argument("--splits", default="train,val", help="what to train and what to validate on")
    arguments = parser.parse_args()
    convert(arguments.root, arguments.name, arguments.splits.split(","))
