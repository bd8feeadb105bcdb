"""Pictures with questions and answers: a set of The Cauldron on the Hugging Face hub, or parquet files of its format.

    python data/cauldron.py --config=ai2d            # 2,445 diagrams with questions, 440 MB -> data/ai2d
    python data/cauldron.py --name=mine a.parquet    # your own: columns images and texts    -> data/mine
    python train_vlm.py --data=data/ai2d/train --frozen=data/ai2d/val.npz

A set of pictures as hub.py has it, with the arrays of `scenes.py --qa`: pixels (N, 3, S, S) uint8, each row's first
picture made square; qa (N, L) uint16, up to four turns as questions.py encodes them; answer (N, L) uint8, the turn's
number at its answer; family (N, 4) uint8, 0: unknown. The last 500 rows are for validation. Can be interrupted.
"""
import argparse
import contextlib
import hashlib
import io
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

import parquet_files
import tokenizer
from hub import Source, finish, sentences, verified
from image_files import open_picture, stretch
from questions import MOST, encode, text
from shards import ROOT, Fault, first_line, sha256

VERSION, REPO = 1, "HuggingFaceM4/the_cauldron"
VALIDATION = 500  # conversations, but no more than half of them


def one_line(said):
    return " ".join((said or "").split())  # a line end would end the turn


def rows(paths):
    """The rows of parquet files: (where it is, bytes of its first image file or None, [(question, answer)])."""
    for path in paths:
        for number, row in parquet_files.read_rows(path, ["images", "texts"]):
            try:
                picture = (row["images"] or [None])[0]
                turns = [(one_line(turn["user"]), one_line(turn["assistant"])) for turn in row["texts"] or ()]
                data = picture and picture["bytes"]
            except (LookupError, TypeError, AttributeError) as error:
                raise Fault(f"{path}, row {number}, is not of The Cauldron's format ({first_line(error)})") from None
            yield f"row {number} of {path.name}", data, list(filter(all, turns))


def fit(encoding, turns, length, most=MOST):
    """As many turns as fit, from the first on: (how many, tokens, marks), or None if not even the first does."""
    longest = length * max(map(len, encoding.token_byte_values()))  # bytes of so many tokens
    kept, tokens = [], 0
    for turn in turns[:most]:
        said = text([(0, *turn)])
        if len(said) > longest:  # megabytes, say, which need not be encoded
            break
        tokens += len(encoding.encode_ordinary(said))
        if tokens > length:
            break
        kept.append((0, *turn))
    for n in range(len(kept), 0, -1):
        with contextlib.suppress(ValueError):  # too long, with the end token
            return n, *encode(encoding, kept[:n], length)


def square(where, data, size):
    """The picture (3, size, size) uint8 in an image file's bytes, white where it is transparent."""
    try:
        return stretch(open_picture(io.BytesIO(data)), size)
    except Exception as error:  # Pillow's decoders raise what they like
        raise Fault(f"{where}: its picture cannot be read ({first_line(error)})") from None


def convert(paths, folder, meta):
    """Make the set that meta is about in a folder from the rows of parquet files."""
    qa, answer, counts, encoding = [], [], Counter(), tokenizer.load_text(tokenizer.QA)
    version = hashlib.sha256(json.dumps(meta).encode()).hexdigest()
    work, size, each = folder / "work", meta["size"], 3 * meta["size"] ** 2
    work.mkdir(parents=True, exist_ok=True)
    with open(work / version, "ab") as file:  # the pictures, one after another; those of an interrupted run are kept
        done = file.truncate(file.tell() // each * each) // each
        for where, data, turns in tqdm(rows(paths), folder.name, unit=" rows"):
            fitting = fit(encoding, turns, meta["length"])
            what = ("without a picture" if not data else "without a question" if not turns else
                    "too long" if not fitting else "shortened" if fitting[0] < len(turns) else "whole")
            counts[what] += 1
            if what in ("shortened", "whole"):
                if len(qa) >= done:
                    file.write(square(where, data, size).tobytes())
                qa.append(np.array(fitting[1], np.uint16)), answer.append(np.array(fitting[2], np.uint8))
    told = f"of {counts.total():,} rows {', '.join(f'{n:,} {what}' for what, n in counts.items()) or 'none'}"
    if len(qa) < 2:
        raise Fault(f"{told}: too few for a set")
    held = min(VALIDATION, len(qa) // 2)
    arrays = {"pixels": np.memmap(work / version, np.uint8, "r").reshape(-1, 3, size, size), "qa": np.stack(qa),
              "answer": np.stack(answer), "family": np.zeros((len(qa), MOST), np.uint8)}
    train, val = ({m: array[part] for m, array in arrays.items()} for part in (slice(-held), slice(-held, None)))
    kind = {"length": meta["length"], "vocab": tokenizer.TEXT_VOCAB, "pad": tokenizer.TEXT_VOCAB - 1}
    finish(folder, {**meta, "version": version, "num": len(qa) - held, "rows": counts}, {"qa": kind}, train, val)
    shutil.rmtree(work)
    print(f"{folder}: {told}; the last {held:,} used are for validation")


@sentences("cauldron.py")
def main(name, size, length, config=None, revision=None, paths=()):
    folder = ROOT / name
    meta = {"name": name, "script": VERSION, "size": size, "seed": 0, "length": length, "text": sha256(tokenizer.QA)}
    meta |= {"repo": REPO, "config": config} if config else {"files": [sha256(path) for path in paths]}
    meta |= {"revision": Source(REPO, revision).commit()} if revision else {}
    if verified(folder, meta):
        return
    if config:
        source = Source(REPO, meta.get("revision") or Source(REPO, "main").commit())
        files = source.files(config)
        meta |= {"revision": source.revision, "files": list(files.values())}
        paths = [source.fetch(file, digest, folder / "work" / Path(file).name) for file, digest in files.items()]
    convert(paths, folder, meta)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, metavar="FILE", nargs="*", help="parquet files, in the place of --config")
    parser.add_argument("--config", help="a configuration of The Cauldron, for example ai2d")
    parser.add_argument("--revision", help="of The Cauldron, a commit or branch; default: main")
    parser.add_argument("--name", help="of the set; default: the configuration's")
    parser.add_argument("--size", type=int, default=224, help="picture width and height in pixels")
    parser.add_argument("--length", type=int, default=512, help="tokens of a conversation at most")
    arguments = parser.parse_args()
    arguments.name = arguments.name or arguments.config or ""
    if bool(arguments.config) == bool(arguments.paths) or arguments.revision and arguments.paths:
        parser.error("either --config, with or without --revision, or parquet files")
    if not arguments.name.isidentifier() or arguments.name == "frozen":
        parser.error(f"--name={arguments.name}: give one of letters, digits and _, and not frozen")
    if not 8 <= arguments.size <= 1024 or not 16 <= arguments.length <= 8192:
        parser.error("--size is from 8 to 1024, --length from 16 to 8192")
    main(**vars(arguments))
