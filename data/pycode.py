"""Python code and its documentation: the .py, .md and .rst texts of 15 packages from PyPI, 27 million tokens.

    python data/pycode.py       # -> data/pycode/{train,val}.bin and pycode.tiktoken, half a minute on 2 CPU cores

The packages, 45 MB, come with pip and stay in data/packages/; rustbpe learns the encoding. A document is one file, with
<|endoftext|> before it. The same bytes come out on every machine, and that is checked.
"""
import hashlib
import re
import sys
import zipfile

import numpy as np
from tqdm import tqdm

from hub import sentences
from shards import ROOT, sha256
from streams import fetch_package, finish, finished, learn_encoding, load_encoding, write_bin

VOCAB = 8192  # with <|endoftext|>, the last id
DOCUMENT_START = VOCAB - 1
# Pure Python, permissively licensed, large, of different fields, and written by hand: name==version, sha256, licence.
PACKAGES = (
    ("celery==5.7.0", "18310a9c919f9029e4735367484d93e6a25cdfd30afdc474622cc263d9b35f6e", "BSD-3-Clause"),
    ("dask==2026.8.0", "ccc0c83a189b0398602435189771d28dad7b5773b6089bb8dce14ae732dd782c", "BSD-3-Clause"),
    ("django==6.1.3", "a0530e3fdac55d34ccc5893c36f6c57d7a7083064f3d414537e51473648b3290", "BSD-3-Clause"),
    ("ipython==9.18.1", "997ce9140d374531a61069c70c0f9ef299d6dd3559ea0f94b8af589726e3c1d5", "BSD-3-Clause"),
    ("jax==0.12.0.1", "e9dfd256ba090259b10f97f0755d4fc92535b8cb38c0a40df6488a8c8a7dd8ae", "Apache-2.0"),
    ("mypy==2.4.1", "1784648d6ec8c2b5465e3f26241b845a0b3cb4e56c993c64abe16989e7698999", "MIT"),
    ("networkx==3.7", "e3fd2c13a7814cee3746340d8d7f8598a67f16a58bf47fb7f8793fab6efca1b0", "BSD-3-Clause"),
    ("nltk==3.10.4", "769ba5413f265b7d3e87cd163cc28efa01e29eeef8bb6080bc907949d9fcfb51", "Apache-2.0"),
    ("sqlalchemy==2.1.9", "449fed5c2caa3b278cc57499d09db001fb3f28dc7f18affc48142aee4dcc0cdf", "MIT"),
    ("sqlglot==30.30.0", "06c4c212a7868c7dcff0fd0fda348dd3c5cbad40137b3083a70ecdfe22921cf9", "MIT"),
    ("streamlit==1.67.0", "f29da87c443bfbdfc52738616e3d65745d438e718da8faf69e2be0da1e52ce64", "Apache-2.0"),
    ("sympy==1.14.0", "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5", "BSD-3-Clause"),
    ("textual==8.2.8", "267375fd402dc8d981457212efa71f0e3365fd17bba144ba9bb3ed7563cb374a", "MIT"),
    ("twisted==26.10.0", "3732f42af218925a0fe78d6668db55853f7fb532245a89a2669babe7d3000fa8", "MIT"),
    ("xarray==2026.9.0", "fe349fa871628b1a0a5217af3fe1283a2862d5485156e6eda354fffb81c3bb7c", "Apache-2.0"),
)
# pip takes the wheel for any platform and a late Python: it is read, never run
WHEEL = ("--only-binary=:all:", "--platform=any", "--implementation=py", "--abi=none", "--python-version=3.14")
GENERATED = re.compile(r"do not edit|auto-?generated|automatically generated|generated (by|from)", re.IGNORECASE)
SHA256 = {  # of what comes out
    "pycode.tiktoken": "9531fe0c780d437b562f018cec491058ce6db151e30e8cae1dd64e0f3d794db0",
    "train.bin": "77b90248fb85efb1a2acc9f9aed11d0fd558058ba57e4ce3d2b655eb8943986d",
    "val.bin": "e79dacaae1b520b133379e0b25bad55d1a1453f3904eb0d86071d262b879a13c",
}
IDENTITY = {"name": "pycode", **SHA256}


def stop(message):
    sys.exit(f"pycode.py: {message}")


def handwritten(text):
    """Whether a person wrote the text, for the most part, by rules of the kind of arXiv:2107.03374, section 3.1.

    Tables, serialised data and what compilers of parsers and protocols put out are a few files, and large ones.
    """
    lines = text.split("\n")
    letters = sum(map(str.isalpha, text))
    return (len(text) >= 200 and not GENERATED.search(text[:1000]) and max(map(len, lines)) <= 1000
            and len(text) <= 100 * len(lines) and letters >= 0.4 * len(text))


def read_documents(archives):
    """The different handwritten texts of wheels, in the order of their sha256: a shuffle, the same everywhere."""
    texts = {}
    for archive in tqdm(archives, desc="reading", unit=" packages"):
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if name.endswith((".py", ".md", ".rst")) and ".dist-info/" not in name:  # names and licences
                    data = wheel.read(name).replace(b"\r\n", b"\n")
                    text = data.decode("utf-8-sig", "replace")
                    if handwritten(text) and "\ufffd" not in text:
                        texts[hashlib.sha256(data).digest()] = text
    return [texts[key] for key in sorted(texts)]


def learn(texts, path):
    print(f"learning the encoding's {VOCAB} tokens", flush=True)
    try:
        learn_encoding(texts, path, VOCAB)
    except ImportError:
        stop("rustbpe learns the encoding and is not here: pip install rustbpe==0.1.0")


def encode(encoding, texts, what):
    """All texts as one stream of tokens (N,) uint16, DOCUMENT_START before each."""
    rows = []
    with tqdm(total=len(texts), desc=what, unit=" documents") as bar:
        for i in range(0, len(texts), 100):
            batch = encoding.encode_ordinary_batch(texts[i:i + 100])
            rows += [np.array([DOCUMENT_START, *row], np.uint16) for row in batch]
            bar.update(len(batch))
    return np.concatenate(rows)


def check(path):
    """SystemExit, and the file gone, if it is not the one that every machine should make."""
    if (found := sha256(path)) != SHA256[path.name]:
        path.unlink()
        stop(f"{path.name} came out with sha256 {found}, and {SHA256[path.name]} was expected: it was not kept; are "
             "rustbpe and tiktoken the versions that the requirements ask for?")


@sentences("pycode.py")
def main():
    folder = ROOT / "pycode"
    if finished(folder, IDENTITY):
        print(f"{folder} is there and whole")
        return
    archives = [fetch_package(name, digest, *WHEEL)
                for name, digest, _ in tqdm(PACKAGES, desc="fetching", unit=" packages")]
    texts = read_documents(archives)
    split = len(texts) - len(texts) // 50  # the last 2 % are for validation
    folder.mkdir(exist_ok=True)
    path = folder / "pycode.tiktoken"
    if not path.exists() or sha256(path) != SHA256[path.name]:
        learn(texts[:split], path)
        check(path)
    encoding = load_encoding("pycode", VOCAB)
    for name, part in (("train.bin", texts[:split]), ("val.bin", texts[split:])):
        tokens = encode(encoding, part, name)
        write_bin(folder / name, tokens)
        check(folder / name)
        print(f"{name}: {len(part):,} documents, {len(tokens):,} tokens, "
              f"{sum(len(text.encode()) for text in part) / len(tokens):.2f} bytes per token")
    finish(folder, IDENTITY, VOCAB, document_start=DOCUMENT_START, encoding="pycode")


if __name__ == "__main__":
    main()
