"""Text for train_maskgit.py --data=text: rows of bytes from data/shakespeare, in place of pictures and without labels."""
import numpy as np
import torch

from streams import read_bin

LENGTH, VALIDATION_ROWS = 64, 2000  # bytes per row, and rows to evaluate on


def read_rows(script, split):
    """The bytes of a stream as rows (N, L) uint16, a memory map; what is over is left out. Raises script.Fault."""
    folder, make = script.ROOT / "data" / "shakespeare", "python data/shakespeare.py"
    if not (folder / f"{split}.bin").exists():
        raise script.Fault(f"no {split}.bin in {folder}: make it with `{make}`")
    try:
        stream = read_bin(folder / f"{split}.bin")
        rows = stream[:len(stream) // LENGTH * LENGTH].reshape(-1, LENGTH)
        if not len(rows) or int(rows.max()) > 255:
            raise ValueError(f"{split}.bin is shorter than {LENGTH} bytes, or tokens of it are no bytes")
    except (OSError, ValueError) as error:
        raise script.Fault(f"{folder} cannot be used ({error}): our own text is made again with `{make}`, once it is "
                           "moved away") from None
    return rows


def read_train(script, config):
    """What train_maskgit.read_shards returns."""
    tokens = read_rows(script, "train")
    if config.batch > len(tokens):
        raise script.Fault(f"--batch={config.batch} is more than the {len(tokens)} training examples there are")
    return tokens, np.zeros(len(tokens), np.uint16), "none"


def read_frozen(script):
    """What train_maskgit.read_frozen returns, with seeded masks."""
    tokens = torch.from_numpy(read_rows(script, "val")[:VALIDATION_ROWS].astype(np.int64))
    rng = torch.Generator().manual_seed(0)
    masked = script.draw_masks(*tokens.shape, rng)
    masked = masked[torch.randperm(len(masked), generator=rng)]  # rows with few masked tokens come first
    modalities = {"rgb": {"length": LENGTH, "vocab": 256}, "label": {"length": 1, "vocab": 1}}
    return tokens, torch.zeros(len(tokens), dtype=torch.long), masked, modalities, "none"
