"""The Hugging Face hub: models pushed to it and fetched from it; pinned files, and sets of pictures made of them.

    python data/hub.py push checkpoints/x.safetensors owner/name [--private]     # with card, loss curve and sample
    python data/hub.py card checkpoints/x.safetensors                            # prints the card, without a network

--load=hf:owner/name[@revision] of a training script fetches a model. fineweb.py, cifar10.py and cauldron.py share the
files of datasets and, with pictures.py and conversations.py, the sets of pictures. HF_ENDPOINT, HF_TOKEN and HF_HOME
mean what they mean to the hub's own client.

A set of pictures is data/<name>/train with meta.json and <array>.npy, num rows each, and for validation
data/<name>/val.npz with arrays of the same names, and `modalities`, that part of meta.json as bytes.
"""
import argparse
import contextlib
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from huggingface_hub import CommitOperationAdd, HfApi, get_token, hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from shards import Fault, first_line, printable, sha256, verify


@contextlib.contextmanager
def sentences(script):
    """Around a main function: what goes wrong inside ends the program with one sentence, led by the script's name."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(f"{script}: interrupted; run the same command to continue")
    except Fault as fault:
        sys.exit(f"{script}: {printable(str(fault))}")
    except OSError as error:
        sys.exit(f"{script}: {printable(first_line(error))}")
    except MemoryError:
        sys.exit(f"{script}: there is not enough memory for this")


# ------------------------------------------------------------------------------------------------------------
# Models

def check_name(repo):
    """Fault if a repository's name is none."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise Fault(f"{repo!r} is not the name of a model on the Hugging Face hub: owner/name")


def refused(error):
    """Whether the hub wanted another login; from those who may not see a repository it hides that there is one."""
    response = getattr(error.__cause__ or error, "response", None)
    return isinstance(error, RepositoryNotFoundError) or (response is not None and response.status_code in (401, 403))


def fetch_model(name):
    """Path of the weights of owner/name[@revision], in the cache of the hub's client. Fault if they did not come."""
    repo, _, revision = name.partition("@")
    check_name(repo)
    try:
        return Path(hf_hub_download(repo, "model.safetensors", revision=revision or None))
    except RemoteEntryNotFoundError:
        raise Fault(f"hf:{name} has no model.safetensors") from None
    except RevisionNotFoundError:
        raise Fault(f"hf:{name}: {repo} has no revision {revision}") from None
    except Exception as error:  # those of the hub, of HTTP and of its transfer library share no other base
        if refused(error):
            raise Fault(f"hf:{name} is not on the Hugging Face hub, or private: `hf auth login` as somebody who may "
                        "read it") from None
        raise Fault(f"hf:{name} did not come from the Hugging Face hub, and nothing of it was kept; run this again "
                    f"({type(error).__name__}: {first_line(error)})") from None


def push(path, repo, private):
    """Put a checkpoint into a model repository of the hub, with all that card.py makes of its run, in one commit."""
    import card  # here, as those who fetch need none
    check_name(repo)
    if not get_token():
        raise Fault("there is no login to the Hugging Face hub: `hf auth login`, or set HF_TOKEN")
    with tempfile.TemporaryDirectory() as folder:
        card.build(path, Path(folder), repo)
        files = {"model.safetensors": path} | {file.name: file for file in sorted(Path(folder).iterdir())}
        try:
            address = commit(repo, files, private)
        except Fault:
            raise
        except Exception as error:  # of many kinds, as above
            if refused(error):
                raise Fault(f"this login may not write to {repo}: `hf auth login` with a token that may") from None
            raise Fault(f"{repo} did not reach the Hugging Face hub; run this again "
                        f"({type(error).__name__}: {first_line(error)})") from None
    print(f"{path} is now {address}")


def commit(repo, files, private):
    """Commit {name: path} to a model repository, made if there is none: the commit's address."""
    api = HfApi()
    api.create_repo(repo, private=private or None, exist_ok=True)
    if private and not api.model_info(repo).private:
        raise Fault(f"{repo} exists and is public: nothing was pushed")
    added = [CommitOperationAdd(name, path) for name, path in files.items()]
    return api.create_commit(repo, added, commit_message="Weights, card and loss curve of a run").commit_url


# ------------------------------------------------------------------------------------------------------------
# Files of the hub

class Source:
    """A dataset of the hub at one revision. All methods raise Fault if they fail."""

    def __init__(self, repo, revision):
        self.repo, self.revision = repo, revision

    def ask(self, what, function, *arguments, **options):
        """What a function of the hub returns for this dataset."""
        try:
            return function(self.repo, *arguments, repo_type="dataset", revision=self.revision, **options)
        except (RemoteEntryNotFoundError, RevisionNotFoundError):
            raise Fault(f"{what}: {self.repo} has no such thing at revision {self.revision}") from None
        except Exception as error:  # those of the hub, of HTTP and of its transfer library share no other base
            raise Fault(f"{what} did not come from the Hugging Face hub; run this again, it goes on where it stopped "
                        f"({type(error).__name__}: {first_line(error)})") from None

    def commit(self):
        """The commit that the revision stands for."""
        return self.ask(f"revision {self.revision}", HfApi().repo_info).sha

    def files(self, folder):
        """{path: sha256} of the parquet files in a folder, at least one, in the order of their names."""
        tree = self.ask(folder, lambda *repo, **options: list(HfApi().list_repo_tree(*repo, **options)), folder)
        hashes = {info.path: info.lfs.sha256 for info in tree if getattr(info, "lfs", None)}
        if not (paths := sorted(path for path in hashes if path.endswith(".parquet"))):
            raise Fault(f"{folder}: {self.repo} has no parquet files there at revision {self.revision}")
        return {path: hashes[path] for path in paths}

    def hashes(self, names):
        """{name: sha256} of some files as the hub states them."""
        infos = self.ask("the list of files", HfApi().get_paths_info, names)
        hashes = {info.path: info.lfs.sha256 for info in infos if getattr(info, "lfs", None)}
        if missing := [name for name in names if name not in hashes]:
            raise Fault(f"{self.repo} has no file {missing[0]} at revision {self.revision}")
        return hashes

    def fetch(self, name, digest, path, check=None):
        """Download a file into part/ beside path, check it, then move it to path, which is returned.

        Nothing is downloaded if it is there already; what an interruption leaves in part/ is for the next run.
        check: a function of the downloaded file's path that raises ValueError if the file is not what it should be.
        """
        if path.exists() and sha256(path) == digest:
            return path
        part = path.with_name("part")
        self.ask(name, hf_hub_download, name, local_dir=part)
        try:
            if (found := sha256(part / name)) != digest:
                raise ValueError(f"{name} has sha256 {found}, and {digest} was expected")
            if check:
                check(part / name)
        except ValueError as error:
            shutil.rmtree(part)  # with what the hub's client noted about it
            raise Fault(f"{error}: it was not kept; run this again") from None
        return (part / name).replace(path)


# ------------------------------------------------------------------------------------------------------------
# Sets of pictures

def verified(folder, identity):
    """Whether the set is there. Fault if it is, and damaged or with something else in meta.json than identity has."""
    if verify(folder / "train", identity):
        print(f"{folder} is there and whole")
        return True
    return False


def told(left_out, most=3):
    """One line of what a set is without, {reason: [names]}: how much of it for each reason, and the first few names."""
    parts = []
    for reason, names in left_out.items():
        more = ", .." if len(names) > most else ""
        shown = ", ".join(printable(str(name), 200) for name in names[:most])
        parts.append(f"{len(names):,} {reason} ({shown}{more})")
    return "; ".join(parts)


def write_val(path, arrays, kinds):
    np.savez_compressed(path, **arrays, modalities=np.frombuffer(json.dumps(kinds).encode(), np.uint8))


def finish(folder, meta, kinds, train, val):
    """Write a set: the arrays of train and val, and meta.json with meta and the modalities `kinds`. Where that fails,
    as on a full disk, nothing of it is left."""
    part = folder / "train.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        for name, array in train.items():
            np.save(part / f"{name}.npy", array)
        write_val(part / "val.npz", val, kinds)
        hashes = {path.name: sha256(path) for path in sorted(part.glob("*.npy"))}
        meta = {**meta, "modalities": kinds, "sha256": {**hashes, "../val.npz": sha256(part / "val.npz")}}
        (part / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        (part / "val.npz").replace(folder / "val.npz")
        part.rename(folder / "train")
    finally:
        shutil.rmtree(part, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------
# Commands

@sentences("hub.py")
def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    pushing = commands.add_parser("push", help="put a checkpoint into a model repository")
    showing = commands.add_parser("card", help="print what its model card would be")
    for command in (pushing, showing):
        command.add_argument("checkpoint", type=Path, help="what --save=true wrote")
    pushing.add_argument("repo", help="owner/name on the hub; made if there is none")
    pushing.add_argument("--private", action="store_true", help="make it one that only its owner sees")
    given = parser.parse_args(argv)
    if given.command == "push":
        push(given.checkpoint, given.repo, given.private)
    else:
        import card
        with tempfile.TemporaryDirectory() as folder:
            print(card.build(given.checkpoint, Path(folder)))


if __name__ == "__main__":
    main(sys.argv[1:])
