"""Your own pictures with questions and answers as a set for train_vlm.py.

    python data/conversations.py chats.jsonl                     # -> data/chats; pictures are where the file is
    python data/conversations.py chats.jsonl --images=photos/    # or in this folder
    python train_vlm.py --data=data/chats/train --frozen=data/chats/val.npz

Every line of the file, or row of a .parquet file, is a conversation about one picture, a PNG, JPEG or WebP:

    {"image": "cat.jpg", "question": "What is it?", "answer": "A cat."}
    {"image": "pets/dog.jpg", "turns": [["What is it?", "A dog."], ["Does it sleep?", "No."]]}

The arrays are those of cauldron.py, as long as the longest conversation. Pictures become square as those of
train_vlm.py --chat do. Texts are tokens of the world's questions: words that these do not have are several tokens, down
to single bytes. About a tenth, whole pictures with all of their conversations, is for validation.
"""
import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

import parquet_files
import tokenizer
from cauldron import VALIDATION, fit
from hub import finish, sentences, told, verified
from image_files import FORMATS, is_picture, open_picture, sha256_of_all, stretch
from shards import ROOT, Fault, check_name, first_line, plain_name, sha256

VERSION, SEED = 1, 0  # of what is made of a row, and of the choice and order of rows
MOST_TURNS = 255  # as an answer's mark is a byte
PAD = tokenizer.TEXT_VOCAB - 1


# ------------------------------------------------------------------------------------------------------------
# Rows

def read_rows(path):
    """Yield (where it is, a line's bytes or a dict) of every row of a file."""
    if path.suffix.lower() != ".parquet":
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"line {number}", line
        return
    for number, row in parquet_files.read_rows(path):
        yield f"row {number}", row


def parse(row):
    """The picture's path and the turns, [(question, answer)], of a row. ValueError says what it is without."""
    if isinstance(row, bytes):
        try:
            row = json.loads(row)
        except (ValueError, RecursionError):
            raise ValueError("not JSON") from None
    if not isinstance(row, dict) or not isinstance(row.get("image"), str):
        raise ValueError("without the path of an image")
    turns = row.get("turns") or [[row.get("question"), row.get("answer")]]
    if not isinstance(turns, list) or not all(map(is_turn, turns)):
        raise ValueError("without a question and an answer")
    return row["image"], [(one_line(question), one_line(answer)) for question, answer in turns]


def is_turn(turn):
    """Whether it is a pair of texts that say something."""
    is_pair = isinstance(turn, list) and len(turn) == 2
    return is_pair and all(isinstance(text, str) and text.strip() for text in turn)


def one_line(text):
    return " ".join(text.split())  # a line end would end the turn


def read_picture(path, size):
    """The picture (3, size, size) uint8 in a file, or a sentence (str) that says why it cannot be read."""
    if not is_picture(path):
        return f"{str(path)!r} is not readable as PNG, JPEG or WebP"
    try:
        return stretch(open_picture(path, FORMATS), size)
    except Exception as error:  # Pillow's decoders raise what they like
        return f"{str(path)!r}: {first_line(error)}"


# ------------------------------------------------------------------------------------------------------------
# The set

def collect(rows, size, length, left_out, shortened):
    """What can be used of rows (where, path, turns): {array: (N, ...)}, and the number (N,) of each row's picture."""
    encoding, pictures = tokenizer.load_text(tokenizer.QA), {}
    pixels, qa, answer, which = [], [], [], []
    for where, path, turns in tqdm(rows, "conversations", unit=" rows"):
        fitting = fit(encoding, turns, length, MOST_TURNS)
        if fitting is None:
            left_out["too long"].append(where)
            continue
        if path not in pictures:
            pictures[path] = len(pictures), read_picture(path, size)
        number, picture = pictures[path]
        if isinstance(picture, str):
            left_out["whose picture cannot be read"].append(f"{where}: {picture}")
            continue
        count, tokens, marks = fitting
        if count < len(turns):
            shortened.append(where)
        pixels.append(picture)
        qa.append(tokens)
        answer.append(marks)
        which.append(number)
    if len(qa) < 2:
        without = f"; left out: {told(left_out)}" if left_out else ""
        raise Fault(f"{len(qa)} conversations that can be used are too few, 2 are the least{without}")
    qa, answer = np.array(qa, np.uint16), np.array(answer, np.uint8)
    longest = int((qa != PAD).sum(1).max())
    arrays = {"pixels": np.stack(pixels), "qa": qa[:, :longest], "answer": answer[:, :longest],
              "family": np.zeros((len(qa), int(answer.max())), np.uint8)}  # 0: unknown
    return arrays, np.array(which)


def split(which, rng):
    """Rows for training and rows for validation, a tenth or some more: all that there are of a picture, unless that is
    more than half. which (N,): the picture of each row."""
    place = rng.permutation(int(which.max()) + 1)[which]
    order = np.argsort(place, kind="stable")  # the pictures at random, each with its rows
    held = max(1, min(VALIDATION, len(which) // 10))
    whole = int((place <= place[order[held - 1]]).sum())
    if whole <= len(which) // 2:
        held = whole
    return order[held:], order[:held]


@sentences("conversations.py")
def main(path, name, images, size, length):
    """Make data/<name> of the conversations in a file, or verify it."""
    name = name or plain_name(path)
    folder, out = images or path.parent, ROOT / name
    if not path.is_file():
        raise Fault(f"there is no file {path}")
    check_name(name)
    rows, left_out, shortened = [], defaultdict(list), []
    for where, row in read_rows(path):
        try:
            image, turns = parse(row)
            rows.append((where, folder / image, turns))
        except ValueError as error:
            left_out[str(error)].append(where)
    pictures = sorted(filter(is_picture, {picture for _, picture, _ in rows}))
    identity = {"name": name, "version": VERSION, "size": size, "seed": SEED, "length": length,
                "text": sha256(tokenizer.QA), "file": sha256(path), "content": sha256_of_all(pictures, folder)}
    if verified(out, identity):
        return
    arrays, which = collect(rows, size, length, left_out, shortened)
    longest = arrays["qa"].shape[1]
    train, held = split(which, np.random.default_rng(SEED))
    kinds = {"qa": {"length": longest, "vocab": tokenizer.TEXT_VOCAB, "pad": PAD}}
    counts = {reason: len(places) for reason, places in left_out.items()}
    out.mkdir(exist_ok=True)
    finish(out, {**identity, "num": len(train), "left_out": counts}, kinds,
           {m: array[train] for m, array in arrays.items()}, {m: array[held] for m, array in arrays.items()})
    print(f"{out}: {len(train):,} conversations for training and {len(held):,} for validation, up to {longest} tokens")
    if left_out:
        print(f"left out: {told(left_out)}")
    if shortened:
        print(f"shortened to --length={length} tokens: {told({'with more turns': shortened})}")
    more = f" --seq_len={longest + 64}" if longest > 112 else ""  # of 128 a picture takes 16, in the gpu track 64
    print(f"python train_vlm.py --data=data/{name}/train --frozen=data/{name}/val.npz{more}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, metavar="FILE", help="a .parquet file, or one of JSON lines")
    parser.add_argument("--name", help="of the set; default: the file's")
    parser.add_argument("--images", type=Path, help="folder of the pictures; default: the file's")
    parser.add_argument("--size", type=int, default=64, help="picture width and height in pixels")
    parser.add_argument("--length", type=int, default=512, help="tokens of a conversation at most")
    arguments = parser.parse_args()
    if not 8 <= arguments.size <= 1024 or not 16 <= arguments.length <= 8192:
        parser.error("--size is from 8 to 1024, --length from 16 to 8192")
    main(**vars(arguments))
