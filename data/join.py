"""Sets about the same scenes as one, of whose modalities train_4m.py learns any from any others.

    python data/scenes.py && python data/scenes.py --rich
    python data/join.py scenes64 rich64      # -> data/scenes64-rich64; what it says then trains on it
    python data/join.py scenes64 rich64 --val    # the validation scenes alone, for a model that is trained

scene.npy of every set has to say that row i is about the same scene in all of them. val.npz has the validation scenes
of the sets, and roles, which of their tokens are inputs and targets, drawn as data/eval_masks.py does.
"""
import argparse
import json
import sys

import numpy as np

import shards
from eval_masks import draw_all_roles
from hub import finish, sentences, verified, write_val
from shards import ROOT, Fault

sys.path.insert(0, str(ROOT.parent))
from train_4m import MODALITIES  # noqa: E402  their order

VERSION = 1


def read_frozen(name):
    """The validation scenes of a set: {array: (n, ...)}, and its modalities."""
    path = shards.FROZEN / f"{name}.npz"
    if not path.exists():
        raise Fault(f"{name} has no validation scenes in {shards.FROZEN}")
    with np.load(path, allow_pickle=False) as arrays:
        arrays = dict(arrays)
    return arrays, json.loads(bytes(arrays.pop("modalities")))


def join(names, parts):
    """Arrays of sets [{array: (n, ...)}] as those of one: all their modalities in order, and the scenes."""
    for name, part in zip(names, parts):
        if not np.array_equal(part["scene"], parts[0]["scene"]):
            raise Fault(f"{name} is not about the scenes of {names[0]}: make both with the same --num and --seed")
    joined = {m: part[m] for part in parts for m in part}
    return {m: joined[m] for m in (*MODALITIES, "scene") if m in joined}


def validation(names):
    """The validation scenes of sets as those of one, {array: (n, ...)} with roles, and their modalities."""
    parts, kinds = zip(*(read_frozen(name) for name in names))
    kinds = {m: about for part in kinds for m, about in part.items()}
    if unknown := kinds.keys() - set(MODALITIES):
        raise Fault(f"train_4m.py knows no modality {', '.join(sorted(unknown))}")
    kinds = {m: kinds[m] for m in MODALITIES if m in kinds}
    arrays = join(names, [{m: part[m] for m in (*kinds, "scene") if m in part} for part in parts])
    return {**arrays, "roles": draw_all_roles(arrays, kinds)}, kinds


@sentences("join.py")
def main(names, val_only=False):
    if len(set(names)) < len(names) or len(names) < 2:
        raise Fault(f"join takes two sets or more, each once, not {' '.join(names)}")
    folder = ROOT / "-".join(names)
    val, kinds = validation(names)
    sets, content = [], []
    for name in () if val_only else names:
        own = list(read_frozen(name)[1])
        arrays, meta = shards.read(ROOT / name / "train", [*own, "scene"], {m: kinds[m] for m in own})
        sets.append(arrays)
        content.append(shards.sha256(ROOT / name / "train" / "meta.json"))  # has the sha256 of every array
    frozen = [shards.sha256(shards.FROZEN / f"{name}.npz") for name in names]
    identity = {"name": folder.name, "version": VERSION, "content": content, "frozen": frozen}
    place = f"data/{folder.name}"
    if val_only:
        folder.mkdir(exist_ok=True)
        write_val(folder / "val.npz", val, kinds)
        print(f"python data/show.py train_4m.py --frozen={place}/val.npz --frozen_masks={place}/val.npz --load=..")
        return
    if not verified(folder, identity):
        folder.mkdir(exist_ok=True)
        train = join(names, sets)
        finish(folder, {**identity, "num": len(train["scene"])}, kinds, train, val)
        print(f"{folder}: {len(train['scene']):,} scenes with {', '.join(kinds)}")
    print(f"python train_4m.py --data={place}/train --frozen={place}/val.npz --frozen_masks={place}/val.npz")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="SET", help="of a folder in data/, such as scenes64")
    parser.add_argument("--val", action="store_true", help="the validation scenes alone, for a model that is trained")
    arguments = parser.parse_args()
    main(arguments.names, arguments.val)
