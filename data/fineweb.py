"""FineWeb as GPT-2 tokens: the shards that modded-nanogpt trains on, 100M tokens each, from the Hugging Face hub.

    python data/fineweb.py                  # validation and 10 training shards, 2.2 GB -> data/fineweb/*.bin
    python data/fineweb.py --shards=103     # all of them, 20 GB; those already there are checked and kept

An interrupted download goes on where it stopped. Ten shards, a billion tokens, are more than modded-nanogpt's own run
to its target reads (0.73 billion).
"""
import argparse
import json
import shutil

from hub import Source, sentences
from shards import ROOT
from streams import finish, finished, read_bin

REPO, REVISION = "kjj0/fineweb10B-gpt2", "889765ea1f903759787add96995d81171b632d0c"
MAX_SHARDS = 103  # that the repository has
VOCAB, DOCUMENT_START = 50257, 50256  # GPT-2's; <|endoftext|> stands before every document
IDENTITY = {"name": "fineweb", "repo": REPO, "revision": REVISION}


@sentences("fineweb.py")
def main(shards):
    folder = ROOT / "fineweb"
    names = ["val_000000.bin"] + [f"train_{i:06d}.bin" for i in range(1, shards + 1)]
    if finished(folder, IDENTITY) and json.loads((folder / "meta.json").read_text())["sha256"].keys() >= set(names):
        print(f"{folder} is there and whole")
        return
    # shards beyond those asked for stay in the set: they too are checked
    names += [path.name for path in sorted(folder.glob("train_*.bin")) if path.name not in names]
    source = Source(REPO, REVISION)
    hashes = source.hashes([f"fineweb_{name}" for name in names])
    folder.mkdir(exist_ok=True)
    for name in names:
        source.fetch(f"fineweb_{name}", hashes[f"fineweb_{name}"], folder / name, check=read_bin)
    shutil.rmtree(folder / "part", ignore_errors=True)
    finish(folder, IDENTITY, VOCAB, document_start=DOCUMENT_START, encoding="gpt2")
    print(f"{folder}: {len(names) - 1} training shards and one for validation")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=10, help=f"training shards, 1 to {MAX_SHARDS}")
    arguments = parser.parse_args()
    if not 1 <= arguments.shards <= MAX_SHARDS:
        parser.error(f"--shards={arguments.shards}: there are 1 to {MAX_SHARDS}")
    main(arguments.shards)
