"""What can be wrong with the data that a training script is pointed to, each found before the clock and said in a sentence.

A script has its data checked here and then reads them without looking back; one that stands alone does without. script
is its module, and what it cannot use raises its Fault.
"""
import contextlib
import hashlib
import json
import math
import os

import numpy as np

from shards import EXACT, changed_file, check_file, command_for, open_array, printable, read_json
from streams import read_bin


@contextlib.contextmanager
def training_data(script, folder, make):
    """Whatever goes wrong with a folder of training data becomes one sentence, with the command that makes it, or the
    track's own if it is none of ours. In the end its arrays are those whose sha256 meta.json has, if it has any."""
    make = command_for(folder) or make
    if not (folder / "meta.json").exists():
        raise script.Fault(f"no training data in {folder}: our own is made with `{make}`")
    try:
        meta = read_json(folder / "meta.json")
        yield meta
        hashes = {name: digest for name, digest in meta.get("sha256", {}).items() if not name.startswith("..")}
        if name := changed_file(folder, hashes):
            raise ValueError(f"{name} is not what was written: its sha256 is another than in meta.json")
    except script.Fault:
        raise
    except Exception as error:  # of many kinds where meta.json is of another shape
        reason = printable(str(error), 200)
        raise script.Fault(f"{folder} cannot be trained on ({reason}): our own set is made again with `{make}`, once "
                           "it is moved away") from None


def load(folder, name):
    return open_array(folder / f"{name}.npy")


def content_sha256(folder, texts, pictures):
    """One hash of the arrays that are read. Of a rendered set its scenes stand for pictures, which machines round."""
    rendered = (folder / "scene.npy").exists()
    digest = hashlib.sha256()
    exact = [name for name in texts if name in EXACT]
    for name in (*exact, "scene") if rendered else (*texts, *pictures):
        array = load(folder, name)
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def check_batch(script, config, num, what):
    if config.batch > num:
        raise script.Fault(f"--batch={config.batch} is more than the {num} training {what} there are")


def origin(script, name, make="as docs/DATA.md says"):
    """What to do about a validation file that cannot be used: of the repository's own and of the user's it differs."""
    # resolve() would raise for a link to itself
    folder = os.path.dirname(os.path.realpath(script.ROOT / name))
    if folder == os.path.realpath(script.ROOT / "data" / "frozen"):
        return f"it belongs to the repository (`git checkout {name}`)"
    return f"it is no part of the repository but made with its training data, {make}"


def check_archives(script, *names):
    """Validation files are archives that can be read: a script's read_frozen, which stays as it is, does not expect every
    kind of error that others raise, and takes each file for the repository's."""
    for name in names:
        path = script.ROOT / name
        try:
            check_file(path)
            with np.load(path, allow_pickle=False) as arrays:
                for key in arrays:
                    arrays[key]
        except FileNotFoundError:
            raise script.Fault(f"{path} is missing: {origin(script, name)}") from None
        except Exception as error:  # numpy, zipfile and zlib have many kinds
            reason = printable(f"{path} cannot be read, {type(error).__name__}: {error}", 300)
            raise script.Fault(f"the frozen validation set is damaged ({reason}): {origin(script, name)}") from None


# ------------------------------------------------------------------------------------------------------------
# 4M and MaskGIT

def check_scenes(script, config, modalities):
    side = math.isqrt(modalities["rgb"]["length"])
    make = "python data/scenes.py" if side == 8 else f"python data/scenes.py --size={8 * side}"
    if "digits" in modalities["rgb"]:
        make = "python data/course.py ROOT"
    texts = [m for m in modalities if m in script.TEXTS]
    others = [m for m in modalities if m not in script.TEXTS]
    return check_tokens(script, config, texts, others, modalities, make, "scenes")


def check_objects(script, config, modalities):
    side = math.isqrt(modalities["rgb"]["length"])
    make = "python data/scenes.py --objects" if side == 8 else f"python data/scenes.py --objects --size={8 * side}"
    return check_tokens(script, config, ("label",), ("rgb",), modalities, make, "examples")


def check_tokens(script, config, texts, pictures, modalities, make, what):
    """Aligned token arrays are whole, and of the validation set's vocabularies and lengths; their sha256."""
    folder = script.ROOT / config.data
    with training_data(script, folder, make) as meta:
        if meta["modalities"] != modalities:
            raise ValueError("another vocabulary or length than the frozen validation set")
        for name in (*pictures, *texts):
            array, about = load(folder, name), modalities[name]
            if array.dtype != np.uint16 or array.shape != (meta["num"], about["length"]):
                raise ValueError(f"{name}.npy holds {array.dtype} {array.shape}")
            if int(array.max()) >= about["vocab"]:
                raise ValueError(f"{name}.npy holds token {array.max()} of a vocabulary of {about['vocab']}")
    check_batch(script, config, meta["num"], what)
    return content_sha256(folder, texts, pictures)


def check_frozen_objects(script, config, modalities, tokens, labels, masked):
    """A validation set is one that a MaskGIT can be evaluated on."""
    length, vocab = modalities["rgb"]["length"], modalities["rgb"]["vocab"]
    if math.isqrt(vocab) ** 2 != vocab:
        raise script.Fault(f"{config.frozen} has a vocabulary of {vocab}, which is not a square: tokens are pairs of "
                           "digits")
    if tokens.shape[1] != length or not masked.any():
        raise script.Fault(f"{config.frozen} has {tuple(tokens.shape)} tokens, {int(masked.sum())} are masked: rows "
                           f"are of {length}, and one at least must be masked")
    if int(tokens.max()) >= vocab or int(labels.max()) >= modalities["label"]["vocab"]:
        raise script.Fault(f"{config.frozen} holds tokens or labels beyond its own vocabularies")


# ------------------------------------------------------------------------------------------------------------
# Flow

def check_images(script, config, classes, side):
    """Training images and labels are whole, and of the validation set's size and classes; their sha256."""
    folder = script.ROOT / config.data
    make = "python data/scenes.py --objects" if side == 32 else "python data/scenes.py --objects --size=128"
    with training_data(script, folder, make) as meta:
        images, labels = load(folder, config.pixels), load(folder, "label")
        own_classes = meta["modalities"]["label"]["vocab"]
        check_labelled(images, labels, own_classes)
        if len(images) != meta["num"]:
            raise ValueError(f"{len(images)} images, but meta.json speaks of {meta['num']}")
    if own_classes != classes or images.shape[-1] != side:
        raise script.Fault(f"{folder} has other classes or another size than the frozen validation set")
    check_batch(script, config, len(images), "images")
    return content_sha256(folder, ("label",), (config.pixels,))


def check_labelled(images, labels, classes):
    """Raises ValueError for arrays that are not images (N, 3, S, S) of bytes and their labels (N, 1) below classes."""
    if images.dtype != np.uint8 or images.shape[1:] != (3, *(2 * images.shape[-1:])):
        raise ValueError(f"the images are {images.dtype} {images.shape}, not uint8 (N, 3, S, S)")
    if labels.dtype.kind not in "iu" or labels.shape != (len(images), 1):
        raise ValueError(f"the labels are {labels.dtype} {labels.shape}, not integers ({len(images)}, 1)")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"the labels go from {labels.min()} to {labels.max()}, but there are {classes} classes")


def check_frozen_images(script, config):
    """Validation files are such as read_frozen can use; says how each comes back."""
    try:
        name = config.frozen
        check_file(script.ROOT / name)
        with np.load(script.ROOT / name, allow_pickle=False) as arrays:
            choices = [key for key in arrays if key.startswith("pixels")]
            if choices and config.pixels not in choices:
                raise script.Fault(f"--pixels={config.pixels} is not in {script.ROOT / name}: it has "
                                   f"{', '.join(choices)}")
            images, classes = arrays[config.pixels], json.loads(bytes(arrays["modalities"]))["label"]["vocab"]
            check_labelled(images, arrays["label"], classes)
        name = config.frozen_draws
        check_file(script.ROOT / name)
        with np.load(script.ROOT / name, allow_pickle=False) as arrays:
            index, times, seeds = (arrays[key] for key in ("index", "t", "seed"))
        if not len(index) == len(times) == len(seeds) or index.min() < 0 or index.max() >= len(images):
            raise ValueError(f"its {len(index)} draws are not of these {len(images)} images")
        if times.min() < 0 or times.max() > 1 or len(times) < 4 or seeds.min() < 0:
            raise ValueError("it takes four times or more, each from 0 to 1, and seeds of at least 0")
    except script.Fault:
        raise
    except Exception as error:  # numpy, zipfile and zlib have many kinds
        path = script.ROOT / name
        reason = printable(f"cannot be evaluated on ({type(error).__name__}: {error})", 300)
        if isinstance(error, FileNotFoundError):
            reason = "is missing"
        make = "for CIFAR-10 by `python data/cifar10.py`, for MNIST by `python data/mnist.py`"
        raise script.Fault(f"{path} {reason}: {origin(script, name, make)}") from None


# ------------------------------------------------------------------------------------------------------------
# VLM

def check_conversations(script, config, about):
    """Pictures, tokens and answer marks are whole, and of the validation set's vocabulary (about); their sha256."""
    folder = script.ROOT / config.data
    make = "python data/scenes.py --qa"
    if config.track.startswith("gpu"):
        make += " --num=200000"
    with training_data(script, folder, make) as meta:
        own, num = meta["modalities"]["qa"], meta["num"]
        if any(own[key] != about[key] for key in ("vocab", "pad")):
            raise ValueError("another vocabulary than the frozen validation set")
        pixels, qa, answer = (load(folder, name) for name in ("pixels", "qa", "answer"))
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape != (num, 3, *2 * pixels.shape[-1:]):
            raise ValueError(f"pixels.npy holds {pixels.dtype} {pixels.shape}")
        if qa.dtype != np.uint16 or qa.shape != (num, own["length"]):
            raise ValueError(f"qa.npy holds {qa.dtype} {qa.shape}")
        if answer.dtype != np.uint8 or answer.shape != qa.shape:
            raise ValueError(f"answer.npy holds {answer.dtype} {answer.shape}")
        if int(qa.max()) >= own["vocab"]:
            raise ValueError(f"qa.npy holds token {qa.max()} of a vocabulary of {own['vocab']}")
        if not (answer > 0).any(1).all():
            raise ValueError(f"conversation {(answer > 0).any(1).argmin()} has no answer")
    return content_sha256(folder, ("qa", "answer"), ("pixels",))


# ------------------------------------------------------------------------------------------------------------
# GPT, and MaskGIT on text

STREAMS = {"scenes": "scenes.py --objects", "mnist14": "mnist.py"}  # where it is not <name>.py that makes one
GPT2 = {"vocab": 50257, "document_start": 50256, "encoding": "gpt2"}  # of modded-nanogpt's shards


def link_fineweb(folder):
    """Have modded-nanogpt's own shards, fineweb_train_*.bin and fineweb_val_*.bin, read as a set of ours: by links to
    them and a meta.json. The files stay as they are; several processes may do so at once."""
    paths = [*folder.glob("fineweb_train_*.bin"), *folder.glob("fineweb_val_*.bin")]
    for path in paths:
        with contextlib.suppress(FileExistsError):
            (folder / path.name.removeprefix("fineweb_")).symlink_to(path.name)
    if paths and not (folder / "meta.json").exists():
        part = folder / f"meta.json.{os.getpid()}.part"
        part.write_text(json.dumps(GPT2))
        part.replace(folder / "meta.json")


@contextlib.contextmanager
def stream_set(script, folder):
    """What meta.json says of a folder of token streams; whatever goes wrong with them becomes one sentence."""
    data = script.ROOT / "data"
    command = STREAMS.get(folder.name, f"{folder.name}.py")
    make = f"python data/{command}"
    ours = folder.parent == data and (data / command.split()[0]).exists()
    try:
        link_fineweb(folder)
        if not (folder / "meta.json").exists():
            mine = "it should hold train*.bin, val*.bin and a meta.json: `python data/text.py` makes them of any text"
            raise script.Fault(f"no data in {folder}: " + (f"make it with `{make}`" if ours else mine))
        meta = read_json(folder / "meta.json")
        vocab, document_start, encoding = (meta[key] for key in ("vocab", "document_start", "encoding"))
        if not (isinstance(vocab, int) and 1 <= vocab <= 1 << 16 and isinstance(encoding, str)
                and (document_start is None or isinstance(document_start, int) and 0 <= document_start < vocab)):
            raise ValueError(f"meta.json says vocab {vocab}, document_start {document_start}, encoding {encoding}")
        yield meta
    except script.Fault:
        raise
    except Exception as error:  # of many kinds, as above
        hint = f": our own set is made again with `{make}`, once it is moved away" if ours else ""
        raise script.Fault(f"{folder} cannot be trained on ({printable(str(error), 200)}){hint}") from None


def check_streams(script, config):
    """Streams are whole and of the vocabulary that meta.json says; config is made to fit those that are short. The sha256
    of those to train on."""
    folder = script.ROOT / "data" / config.data
    with stream_set(script, folder) as meta:
        train, val = (sorted(folder.glob(f"{split}*.bin")) for split in ("train", "val"))
        train, val = (list(map(read_bin, paths)) for paths in (train, val))
        for shard in (*train, *val):
            if int(shard.max()) >= meta["vocab"]:
                raise ValueError(f"token {shard.max()} of a vocabulary of {meta['vocab']}")
        fit_short_text(script, config, sum(map(len, train)), sum(map(len, val)))
    digest = hashlib.sha256()
    for shard in train:
        digest.update(shard)
    return digest.hexdigest()


def fit_short_text(script, config, train, val):
    """Have config.context and config.eval_tokens fit so many tokens, and say so; ValueError where there is no way."""
    if val < 2 or (train < 4 and config.num_steps):
        raise ValueError(f"{train} training and {val} validation tokens are too few")
    most = {"eval_tokens": val - 1}
    if config.num_steps:  # else the context is a checkpoint's
        most["context"] = train - 2
    less = {key: limit for key, limit in most.items() if getattr(config, key) > limit}
    for key, limit in less.items():
        setattr(config, key, limit)
    if less and os.environ.get("RANK", "0") == "0":
        now = " ".join(f"--{key}={limit}" for key, limit in less.items())
        print(f"{script.HERE.name}: {train:,} training and {val:,} validation tokens are few: this run takes {now}")
