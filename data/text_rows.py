"""Text for train_maskgit.py: rows of tokens of a stream in data/<name>, in place of pictures and without labels."""
import hashlib
import math
import os

import numpy as np
import torch

from checks import check_batch, stream_set
from streams import read_bin

LENGTH, VALIDATION_ROWS = 64, 2000  # tokens per row, and rows to evaluate on


def read_rows(script, config, split):
    """A stream as rows (N, L) uint16, what is over left out, and what meta.json says of it. Raises script.Fault.

    --data=text is Shakespeare. Of bytes there are 256, whichever of them a text has.
    """
    folder = script.ROOT / "data" / ("shakespeare" if config.data == "text" else config.data)
    with stream_set(script, folder) as meta:
        if meta["encoding"] == "bytes":
            meta["vocab"] = 256
        shards = [read_bin(path) for path in sorted(folder.glob(f"{split}*.bin"))]
        rows = [shard[:len(shard) // LENGTH * LENGTH].reshape(-1, LENGTH) for shard in shards]
        rows = np.concatenate([np.empty((0, LENGTH), np.uint16), *rows])
        if not len(rows):
            raise ValueError(f"{split}*.bin has fewer than the {LENGTH} tokens of a row")
        if int(rows.max()) >= meta["vocab"]:
            raise ValueError(f"token {rows.max()} of a vocabulary of {meta['vocab']}")
    return rows, meta


def fit_batch(script, config, rows):
    """Have config.batch fit so many rows of a short text, as many to each process, and say so."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    most = rows // world * world
    if most < config.batch and most:
        config.batch = most
        if os.environ.get("RANK", "0") == "0":
            print(f"{script.HERE.name}: {rows:,} training rows of {LENGTH} tokens are few: this run takes "
                  f"--batch={most}")


def read_train(script, config):
    """What train_maskgit.read_shards returns; config is made to fit a text that is short."""
    tokens, _ = read_rows(script, config, "train")
    fit_batch(script, config, len(tokens))
    check_batch(script, config, len(tokens), "examples")
    return tokens, np.zeros(len(tokens), np.uint16), hashlib.sha256(tokens).hexdigest()


def read_frozen(script, config):
    """What train_maskgit.read_frozen returns, with seeded masks; "text" of the vocabularies is what meta.json says."""
    rows, meta = read_rows(script, config, "val")
    tokens = torch.from_numpy(rows[:VALIDATION_ROWS].astype(np.int64))
    rng = torch.Generator().manual_seed(0)
    masked = script.draw_masks(*tokens.shape, rng)
    masked = masked[torch.randperm(len(masked), generator=rng)]  # rows with few masked tokens come first
    digest = hashlib.sha256(tokens.numpy().tobytes() + masked.numpy().tobytes()).hexdigest()
    base = math.isqrt(meta["vocab"] - 1) + 1  # tokens are pairs of digits: the ids above the vocabulary are no token's
    modalities = {"rgb": {"length": LENGTH, "vocab": base ** 2}, "label": {"length": 1, "vocab": 1}, "text": meta}
    return tokens, torch.zeros(len(tokens), dtype=torch.long), masked, modalities, digest
