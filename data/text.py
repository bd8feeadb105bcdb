"""Your own text as token streams, which train_gpt.py and train_maskgit.py read: any number of files.

    python data/text.py notes.txt book/*.md                             # bytes -> data/notes/{train,val}_000000.bin
    python data/text.py posts.jsonl.gz --field=body --vocab=gpt2        # GPT-2's tokens
    python data/text.py corpus/*.parquet --name=corpus --vocab=2048     # so many tokens, learnt from the text
    python train_gpt.py --data=notes

A document is a file, a record of a .jsonl file or a row of a .parquet file; a file of any other name is plain text. All
but .parquet may be packed by gzip, with .gz at the end. About a tenth of the documents are for validation. With tokens
<|endoftext|> stands before every document; documents of bytes have an empty line between them. All is held in memory.
"""
import argparse
import gzip
import hashlib
import json
import os
import random
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hub import sentences
from shards import ROOT, Fault, check_name, first_line, plain_name, sha256
from streams import finish, finished, learn_encoding, load_encoding, load_gpt2, pieces, write_bin

LEAST_VOCAB, MOST_VOCAB = 257, 65536  # the bytes and <|endoftext|>; what fits into 16 bits
MOST_VALIDATION = 10_000_000  # bytes, about
MOST_UNPACKED, MOST_GROWTH = 2 ** 27, 250  # bytes of a packed file that are always read, and times its size beyond them
TOO_SHORT = "the text is too short to train on: a page will do"


# ------------------------------------------------------------------------------------------------------------
# What is asked for

def check_files(paths):
    """Raises Fault for what is no file, or none that is read here."""
    for path in paths:
        if path.is_dir():
            raise Fault(f"{path} is a folder: name the files in it, for example {path}/*.txt")
        if not path.is_file():
            raise Fault(f"there is no file {path}")
        if path.name.lower().endswith(".parquet.gz"):
            raise Fault(f"{path}: unpack it first, a .parquet file is packed inside")


def check_vocab(vocab):
    """Raises Fault for what is no vocabulary."""
    if vocab in ("bytes", "gpt2"):
        return
    if not re.fullmatch(r"[0-9]{1,9}", vocab):
        raise Fault(f"--vocab={vocab} is not bytes, gpt2 or a number of tokens")
    if int(vocab) > MOST_VOCAB:
        raise Fault(f"--vocab={vocab} is too large: tokens have 16 bits, so there are {MOST_VOCAB:,} at most")
    if int(vocab) < LEAST_VOCAB:
        raise Fault(f"--vocab={vocab} is too small: the bytes and <|endoftext|> are {LEAST_VOCAB}")


# ------------------------------------------------------------------------------------------------------------
# Reading

def check_growth(path, unpacked, packed):
    """Raises Fault for a file that grows beyond all measure when it is unpacked. So far it has from packed to unpacked
    bytes; texts become 3 to 5 times as large, logs up to 30 times."""
    if unpacked > MOST_UNPACKED and unpacked > MOST_GROWTH * packed:
        raise Fault(f"{path} is more than {MOST_GROWTH} times as large when it is unpacked: no text is, and all is "
                    "held in memory")


def unpack(path):
    """What gzip packed into a file, bytes. Raises Fault."""
    parts, size = [], 0
    try:
        with open(path, "rb") as packed, gzip.GzipFile(fileobj=packed) as file:
            while part := file.read(2 ** 20):
                parts.append(part)
                size += len(part)
                check_growth(path, size, packed.tell())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise Fault(f"{path} is damaged or not packed by gzip ({first_line(error)})") from None
    return b"".join(parts)


def read_text(path):
    """What is in a file of text, unpacked if its name ends in .gz. Raises Fault if it is not UTF-8, and says where."""
    data = unpack(path) if path.suffix.lower() == ".gz" else path.read_bytes()
    try:
        return data.decode().removeprefix("\ufeff")  # which some editors put first
    except UnicodeDecodeError as error:
        raise Fault(f"{path} is not UTF-8 text at byte {error.start}: save it as UTF-8") from None


def read_value(value, where):
    """The text of a record, "" for null. Raises Fault if it is none."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Fault(f"{where} is no text but of type {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Fault(f"{where} has half of a character, at character {error.start}") from None
    return value


def read_jsonl(path, field):
    """A field of every record of a .jsonl file."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise Fault(f"{path}, line {number}, is not JSON") from None
        if not isinstance(record, dict):
            raise Fault(f"{path}, line {number}, is no record with fields")
        if field not in record:
            raise Fault(f"{path}, line {number}, has no field {field!r} but {', '.join(record) or 'none at all'}: "
                        "pass one by --field=")
        yield read_value(record[field], f"{path}, line {number}, field {field!r}")


def read_parquet(path, column):
    """A column of every row of a .parquet file."""
    import parquet_files  # here, as it takes pyarrow, which is slow to import
    names = parquet_files.column_names(path)
    if column not in names:
        found = ", ".join(names) or "none at all"
        raise Fault(f"{path} has no column {column!r} but {found}: pass one by --column=")
    size, packed = 0, path.stat().st_size
    for number, row in parquet_files.read_rows(path, [column]):
        value = read_value(row.get(column), f"{path}, row {number}, column {column!r}")
        size += len(value)
        check_growth(path, size, packed)
        yield value


def read_documents(paths, field, column):
    """Every document of the files; a file without a byte is an empty one."""
    for path in paths:
        kind = path.name.lower().removesuffix(".gz")
        if not path.stat().st_size:
            yield ""
        elif kind.endswith(".jsonl"):
            yield from read_jsonl(path, field)
        elif kind.endswith(".parquet"):
            yield from read_parquet(path, column)
        else:
            yield read_text(path)


def read_all(paths, field, column):
    """The documents that are not empty, a list. Raises Fault where there is none."""
    texts, empty = [], 0
    for text in tqdm(read_documents(paths, field, column), desc="reading", unit=" documents"):
        if text.strip():
            texts.append(text.replace("\r\n", "\n"))
        else:
            empty += 1
    if empty:
        print(f"warning: {empty:,} of {len(texts) + empty:,} documents are empty and were left out")
    if not texts:
        raise Fault("there is no text in these files")
    return texts


# ------------------------------------------------------------------------------------------------------------
# Making

def split(texts):
    """Documents for training and for validation, each list in the order given.

    A seeded draw holds out whole documents, a tenth of the bytes at most. Where those that fit are next to nothing, or
    none, as with a few long ones, the last tenth of the longest is held out as well.
    """
    sizes = [len(text.encode()) for text in texts]
    most, order = min(sum(sizes) // 10, MOST_VALIDATION), list(range(len(texts)))
    random.Random(0).shuffle(order)
    held, used = set(), 0
    for i in order:
        if used + sizes[i] <= most:
            held.add(i)
            used += sizes[i]
    train = [text for i, text in enumerate(texts) if i not in held]
    val = [text for i, text in enumerate(texts) if i in held]
    if used < max(1, most / 10):
        longest = max(train, key=len)
        cut = len(longest) - min(max(1, len(longest) // 10), MOST_VALIDATION)
        train[train.index(longest)] = longest[:cut]
        val.append(longest[cut:])
    return train, val


def make_encoding(name, vocab, texts, path):
    """The tiktoken.Encoding that --vocab asks for, None for bytes; one that is learnt from texts is written to path."""
    if vocab == "bytes":
        return None
    if vocab == "gpt2":
        return load_gpt2()
    print(f"learning the encoding's {int(vocab):,} tokens", flush=True)
    try:
        learn_encoding(texts, path, int(vocab))
    except ImportError:
        raise Fault("rustbpe learns the encoding and is not here: pip install rustbpe==0.1.0") from None
    found = 1 + len(path.read_text().splitlines())
    if found < int(vocab):
        print(f"the text is too short for more than {found:,} tokens")
    return load_encoding(name, found, path)


def encode(texts, encoding, what):
    """All texts as one stream of tokens (N,) uint16, of bytes (N,) uint8 if encoding is None."""
    if encoding is None:
        return np.frombuffer("\n\n".join(texts).encode(), np.uint8)
    start = np.array([encoding.eot_token], np.uint16)
    rows = []
    for text in tqdm(texts, desc=what, unit=" documents"):
        rows.append(start)
        for piece in pieces(text):
            tokens = encoding.encode_to_numpy(piece, disallowed_special=())  # <|endoftext|> in a text is text
            rows.append(tokens.astype(np.uint16))
    return np.concatenate(rows)


def make(folder, identity, texts):
    """Write the set into an empty folder: how many tokens of it are for training and for validation."""
    name, vocab = identity["name"], identity["vocab"]
    train, val = split(texts)
    encoding = make_encoding(name, vocab, train, folder / f"{name}.tiktoken")
    train, val = encode(train, encoding, "training"), encode(val, encoding, "validation")
    if len(train) < 4 or len(val) < 2:  # see checks.fit_short_text
        raise Fault(TOO_SHORT)
    write_bin(folder / "train_000000.bin", train)
    write_bin(folder / "val_000000.bin", val)
    if encoding is None:
        finish(folder, identity, 256, document_start=None, encoding="bytes")
    else:
        # the encoding of a set that learnt it is named after the set
        finish(folder, identity, encoding.n_vocab, document_start=encoding.eot_token, encoding=encoding.name)
    return len(train), len(val)


@sentences("text.py")
def main(paths, name=None, vocab="bytes", field="text", column="text"):
    paths = list(dict.fromkeys(paths))  # a document that comes twice could be in training and validation
    name = name or plain_name(paths[0])
    check_files(paths)
    check_name(name)
    check_vocab(vocab)
    inputs = "".join(f"{sha256(path)} {path.name}\n" for path in paths)
    identity = {"name": name, "inputs": hashlib.sha256(os.fsencode(inputs)).hexdigest(), "vocab": vocab, "field": field,
                "column": column}
    folder, part = ROOT / name, ROOT / f"{name}.part"
    if finished(folder, identity):
        print(f"{folder} is there and whole")
        return
    if folder.exists():
        raise Fault(f"{folder} is there, of other files or options or damaged: choose another --name or delete it")
    texts = read_all(paths, field, column)
    if sum(map(len, texts)) < 10:
        raise Fault(TOO_SHORT)
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        train, val = make(part, identity, texts)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"{folder}: {len(texts):,} documents, {train:,} tokens for training and {val:,} for validation; next\n"
          f"python train_gpt.py --data={name}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, metavar="FILE", nargs="+", help="text, .jsonl or .parquet")
    parser.add_argument("--name", help="of the set; default: the first file's")
    parser.add_argument("--vocab", default="bytes", help="bytes, gpt2, or how many tokens to learn from the text")
    parser.add_argument("--field", default="text", help="of .jsonl records")
    parser.add_argument("--column", default="text", help="of .parquet files")
    main(**vars(parser.parse_args()))
