"""CIFAR-10 and MNIST as sets of pictures with labels, from the Hugging Face hub.

    python data/cifar10.py            # 50,000 pictures for training, 2,000 for validation, 140 MB -> data/cifar10
    python data/cifar10.py --mnist    # 60,000 and 2,000, 28 pixels on black ground of 32      -> data/mnist
    python train_flow.py --data=data/cifar10/train --frozen=data/cifar10/val.npz

An interrupted download goes on where it stopped; hub.py says what a set of pictures is. Arrays: pixels32 (N, 3, 32, 32)
uint8 and label (N, 1) uint16.
"""
import argparse
import io
import shutil

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from hub import Source, finish, sentences, verified
from shards import ROOT

VERSION, SIZE, CLASSES = 1, 32, 10
VALIDATION = 2000  # of the test pictures, the first ones
SETS = {  # repository, commit, column of the pictures, file and sha256 of each split
    "cifar10": ("uoft-cs/cifar10", "0b2714987fa478483af9968de7c934580d0bb9a2", "img", {
        "train": ("plain_text/train-00000-of-00001.parquet",
                  "8428b53a88a11ac374111006708df51469e315a22ac6d66470afd9c78d2ae883"),
        "test": ("plain_text/test-00000-of-00001.parquet",
                 "841389e6f2d64f28bf17310e430aebac20ec3ba611a3c5e231dc93c645ce84de")}),
    "mnist": ("ylecun/mnist", "77f3279092a1c1579b2250db8eafed0ad422088c", "image", {
        "train": ("mnist/train-00000-of-00001.parquet",
                  "f2c01285a9f89399335b00ee4e8d499dc4e46db5e39c74903ce5618d895eb3bf"),
        "test": ("mnist/test-00000-of-00001.parquet",
                 "d49fcf556ce25b002b302e318ce4a11098bbfe5d4499c3f35d7c72297c52374b")}),
}


def read(path, column, most=None):
    """The pictures and labels of a parquet file, of its first `most` rows: {pixels32, label}.

    Smaller pictures are put in the middle of black ones, grey ones get three equal channels.
    """
    table = pq.read_table(path, columns=[column, "label"]).slice(0, most)
    pixels = np.zeros((len(table), 3, SIZE, SIZE), np.uint8)
    for i, data in enumerate(tqdm(pc.struct_field(table[column], "bytes"), path.name, unit=" pictures")):
        picture = np.asarray(Image.open(io.BytesIO(data.as_py())).convert("RGB")).transpose(2, 0, 1)
        edge = (SIZE - picture.shape[-1]) // 2
        pixels[i, :, edge:SIZE - edge, edge:SIZE - edge] = picture
    return {"pixels32": pixels, "label": table["label"].to_numpy().astype(np.uint16)[:, None]}


@sentences("cifar10.py")
def main(name):
    """Make data/<name>, a set of SETS, or verify it."""
    repo, revision, column, files = SETS[name]
    folder = ROOT / name
    identity = {"name": name, "version": VERSION, "size": SIZE, "seed": 0, "repo": repo, "revision": revision}
    if verified(folder, identity):
        return
    source = Source(repo, revision)
    path = {split: source.fetch(*file, folder / "work" / f"{split}.parquet") for split, file in files.items()}
    train, val = read(path["train"], column), read(path["test"], column, VALIDATION)
    kinds = {"label": {"length": 1, "vocab": CLASSES, "pad": -1}}
    finish(folder, {**identity, "num": len(train["label"])}, kinds, train, val)
    shutil.rmtree(folder / "work")
    print(f"{folder}: {len(train['label']):,} pictures for training, {len(val['label']):,} for validation")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", action="store_true", help="MNIST in the place of CIFAR-10")
    main("mnist" if parser.parse_args().mnist else "cifar10")
