"""Sets of aligned arrays on disk, and the one place that decides whether such a folder is what it should be.

A set is a folder with meta.json and <array>.npy: row i of every array is about example i. meta.json says how it was
made, how many rows there are (num), each token array's length and vocabulary (modalities) and every file's sha256.
A Fault says in one sentence what is true of the folder at hand, be it one that our scripts made or the user's own.
"""
import hashlib
import json
import os
import re
import sys
import warnings
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent
FROZEN = ROOT / "frozen"
SCRIPTS = ROOT  # wherever sets are made
TAKEN = ("bytes", "gpt2", "frozen", "noise", "packages")  # encodings, and folders of data/ that are no sets
# arrays that are equal on any machine
EXACT = ("answer", "bbox", "caption", "desc", "family", "label", "pose", "qa", "scene", "timing", "voice")
OURS = {  # folders below data/ that our scripts make without the user's files: how
    r"scenes64": "scenes.py", r"scenes(\d+)": r"scenes.py --size=\1",
    r"objects64": "scenes.py --objects", r"objects(\d+)": r"scenes.py --objects --size=\1",
    r"qa64": "scenes.py --qa", r"qa64-large": "scenes.py --qa --num=200000", r"qa(\d+)": r"scenes.py --qa --size=\1",
    r"audio64": "scenes.py --audio", r"audio(\d+)": r"scenes.py --audio --size=\1",
    r"rich64": "scenes.py --rich", r"rich(\d+)": r"scenes.py --rich --size=\1",
    r"fine64": "scenes.py --fine", r"fine(\d+)": r"scenes.py --fine --size=\1",
    r"(scenes\d+)-([a-z]+\d+)": r"join.py \1 \2", r"(scenes\d+)-([a-z]+\d+)-([a-z]+\d+)": r"join.py \1 \2 \3",
    r"cifar10": "cifar10.py", r"mnist": "cifar10.py --mnist",  # or mnist.py, a sixth of them
    r"mnist14": "mnist.py", r"easy_vqa": "easy_vqa.py",
}


class Fault(Exception):
    """What went wrong, in one sentence."""


def first_line(error):
    """The first line of an error's message, or its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def printable(text, most=1000):
    """A text, which may quote a file, as one line for the terminal: cut where it is too long to be read, with escapes
    in the place of what would move the cursor or cannot be printed."""
    line = " ".join(text.split())
    if len(line) > most:
        line = line[:most] + " .."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def sha256(path):
    with open(path, "rb") as file:
        if sys.version_info >= (3, 11):
            return hashlib.file_digest(file, "sha256").hexdigest()
        return hashlib.sha256(file.read()).hexdigest()


def content_sha256(folder):
    """One hash of what a set is about: of every array but pictures and their tokens, which machines round differently."""
    digest = hashlib.sha256()
    for name in EXACT:
        path = Path(folder) / f"{name}.npy"
        if path.exists():
            array = np.load(path, allow_pickle=False)
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def command_for(folder):
    """The command that makes a folder data/<name>/train, None if it is none of ours."""
    folder = Path(os.path.realpath(folder))  # resolve() would raise for a link to itself
    if folder.parent.parent != ROOT or folder.name != "train":
        return None
    for pattern, command in OURS.items():
        if match := re.fullmatch(pattern, folder.parent.name):
            return f"python data/{match.expand(command)}"
    return None


def plain_name(path):
    """The name that a set of the user's own has by default: that of its file or folder, without endings."""
    return re.sub(r"[^\w-]+", "_", path.name.partition(".")[0])


def check_name(name):
    """Raises Fault unless a set of the user's own may have this name: a plain one, and none of a script, set or encoding
    of ours, whatever the case of its letters, which some file systems do not tell apart."""
    plain = name.lower()
    ours = plain in TAKEN or any(re.fullmatch(pattern, plain) for pattern in OURS)
    if not re.fullmatch(r"\w[\w-]*", name) or ours or (SCRIPTS / f"{plain}.py").exists():
        raise Fault(f"--name={name}: give a name of letters, digits, _ and -, and none that is used here")


# ------------------------------------------------------------------------------------------------------------
# Reading

def check_file(path):
    """Raises ValueError for a folder, and for a pipe or device, which may never come to an end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{os.path.basename(path)} is not a file")


def read_json(path):
    """What a JSON file says. Raises OSError or ValueError, whatever is in the file."""
    check_file(path)
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("brackets are nested too deeply in it") from None


def open_array(path):
    """The array of a .npy file, a read-only memory map. Raises OSError or ValueError, whatever is in the file."""
    check_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of shapes that overflow
            return np.lib.format.open_memmap(path, "r")
    except OSError:
        raise
    except Exception as error:  # numpy evaluates the header as Python, with errors of several kinds
        raise ValueError(f"no .npy file that can be read: {first_line(error)}") from None


def read_meta(folder):
    """What meta.json says, a dict with at least num and modalities. Fault if the folder has none that can be read."""
    path = Path(folder) / "meta.json"
    command = command_for(folder)
    if not path.exists():
        what = f"{folder} has no meta.json" if Path(folder).exists() else f"there is no {folder}"
        raise Fault(f"{what}: make it with `{command}`" if command else what)
    try:
        meta = read_json(path)
    except (OSError, ValueError) as error:
        raise Fault(f"{path} is damaged ({first_line(error)})") from None
    if not isinstance(meta, dict) or not isinstance(meta.get("num"), int):
        raise Fault(f"{path} does not say how many rows there are (num)")
    kinds = meta.get("modalities")
    if not isinstance(kinds, dict) or not all(map(is_modality, kinds.values())):
        raise Fault(f"{path} does not say the length and the vocabulary of every modality (modalities)")
    return meta


def is_modality(about):
    return isinstance(about, dict) and all(isinstance(about.get(key), int) for key in ("length", "vocab"))


def read(folder, names, modalities=None):
    """The named arrays as read-only memory maps, {name: (num, ...)}, and meta.json. Fault if any is not as that says.

    modalities: the part of meta.json that the caller asks for; Fault if the folder was made with another one.
    """
    meta = read_meta(folder)
    for name, kind in (modalities or {}).items():
        if name in names and meta["modalities"].get(name) != kind:
            raise Fault(f"{folder} was made with another vocabulary or length of {name}: "
                        f"{meta['modalities'].get(name)} and not {kind}")
    return {name: read_array(folder, name, meta) for name in names}, meta


def read_array(folder, name, meta):
    """One array of a set. Fault if it is missing, damaged, or not of the dtype, shape and range of meta.json."""
    path = Path(folder) / f"{name}.npy"
    try:
        array = open_array(path)
    except FileNotFoundError:
        raise Fault(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise Fault(f"{path} is damaged ({first_line(error)})") from None
    found = f"{array.dtype} of shape {array.shape}"
    kind = meta["modalities"].get(name)
    if kind is None:
        if array.ndim < 1 or len(array) != meta["num"]:
            raise Fault(f"{path} holds {found} and meta.json speaks of {meta['num']} rows")
        return array
    shape = (meta["num"], kind["length"])
    if array.dtype != np.uint16 or array.shape != shape:
        raise Fault(f"{path} holds {found} and meta.json speaks of uint16 of shape {shape}")
    if array.size and int(array.max()) >= kind["vocab"]:
        raise Fault(f"{path} holds token {array.max()} of a vocabulary of {kind['vocab']}")
    return array


# ------------------------------------------------------------------------------------------------------------
# Verifying

def changed_file(folder, hashes):
    """The first file, path relative to the folder, that is missing or not what was written; None if all are."""
    for name, digest in hashes.items():
        path = Path(folder) / (name if "." in name else f"{name}.npy")
        if not path.is_file() or sha256(path) != digest:
            return path.name
    return None


def verify(folder, identity):
    """Whether a set is there. Fault if it is, and damaged or made with something else in meta.json than identity has.

    For the script that makes the set: the Fault tells its user what to do for it to be made.
    """
    if not folder.exists():
        return False
    try:
        meta = read_meta(folder)
    except Fault as fault:
        raise Fault(f"{fault}; move {folder} away and run this again") from None
    if meta.get("name") != identity["name"] or not isinstance(meta.get("sha256"), dict):
        raise Fault(f"{folder} was not made by this script; move it away and run this again")
    if different := [key for key in identity if meta.get(key) != identity[key]]:
        raise Fault(f"{folder} was made with another {', '.join(different)}; delete it to make this one")
    if name := changed_file(folder, meta["sha256"]):
        raise Fault(f"{folder} is damaged ({name} is not what was written); delete it and run this again")
    return True
