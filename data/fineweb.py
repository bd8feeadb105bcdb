"""FineWeb as GPT-2 tokens: the shards that modded-nanogpt trains on, 100M tokens each, from the Hugging Face hub.

    python data/fineweb.py                  # validation and 10 training shards, 2.2 GB -> data/fineweb/*.bin
    python data/fineweb.py --shards=103     # all of them, 20 GB; those already there are checked and kept

An interrupted download goes on where it stopped. Ten shards, a billion tokens, are more than modded-nanogpt's own run
to its target reads (0.73 billion).
"""
import argparse
import json
import shutil
import sys

from huggingface_hub import HfApi, hf_hub_download

from streams import ROOT, finish, finished, read_bin, sha256

REPO, REVISION = "kjj0/fineweb10B-gpt2", "889765ea1f903759787add96995d81171b632d0c"
MAX_SHARDS = 103  # that the repository has
VOCAB, DOCUMENT_START = 50257, 50256  # GPT-2's; <|endoftext|> stands before every document
IDENTITY = {"name": "fineweb", "repo": REPO, "revision": REVISION}


def stop(message):
    sys.exit(f"fineweb.py: {message}")


def ask(what, function, *arguments, **options):
    """What a function of the hub returns. SystemExit in one sentence if it fails."""
    try:
        return function(*arguments, repo_type="dataset", revision=REVISION, **options)
    except Exception as error:  # those of the hub, of HTTP and of its transfer library share no other base
        why = (str(error).strip().splitlines() or ["no message"])[0]
        stop(f"{what} did not come from the Hugging Face hub; run this again, it goes on where it stopped "
             f"({type(error).__name__}: {why})")


def expected_hashes(names):
    """{name: sha256} of files of the repository as the hub states them."""
    infos = ask("the list of files", HfApi().get_paths_info, REPO, names)
    hashes = {info.path: info.lfs.sha256 for info in infos if getattr(info, "lfs", None)}
    if missing := [name for name in names if name not in hashes]:
        stop(f"{REPO} has no file {missing[0]} at revision {REVISION}")
    return hashes


def fetch(name, digest, part, path):
    """Download one file of the repository into the folder part, check it, and only then move it to path."""
    ask(name, hf_hub_download, REPO, name, local_dir=part)
    try:
        if (found := sha256(part / name)) != digest:
            raise ValueError(f"{name} has sha256 {found}, and the hub says {digest}")
        read_bin(part / name)
    except ValueError as error:
        shutil.rmtree(part)  # with what the hub's client noted about it
        stop(f"{error}: it was not kept; run this again")
    (part / name).replace(path)


def main(shards):
    folder = ROOT / "fineweb"
    part = folder / "part"
    names = ["val_000000.bin"] + [f"train_{i:06d}.bin" for i in range(1, shards + 1)]
    if finished(folder, IDENTITY) and json.loads((folder / "meta.json").read_text())["sha256"].keys() >= set(names):
        print(f"{folder} is there and whole")
        return
    # shards beyond those asked for stay in the set: they too are checked
    names += [path.name for path in sorted(folder.glob("train_*.bin")) if path.name not in names]
    hashes = expected_hashes([f"fineweb_{name}" for name in names])
    folder.mkdir(exist_ok=True)
    for name in names:
        path, digest = folder / name, hashes[f"fineweb_{name}"]
        if not path.exists() or sha256(path) != digest:
            fetch(f"fineweb_{name}", digest, part, path)
    shutil.rmtree(part, ignore_errors=True)
    finish(folder, IDENTITY, VOCAB, document_start=DOCUMENT_START, encoding="gpt2")
    print(f"{folder}: {len(names) - 1} training shards and one for validation")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=10, help=f"training shards, 1 to {MAX_SHARDS}")
    arguments = parser.parse_args()
    if not 1 <= arguments.shards <= MAX_SHARDS:
        parser.error(f"--shards={arguments.shards}: there are 1 to {MAX_SHARDS}")
    main(arguments.shards)
