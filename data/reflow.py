"""Training pairs for train_flow.py --reflow: the images that a loaded model draws, and the noise that each came from."""
import torch
from tqdm import tqdm


@torch.no_grad()
def draw_pairs(run, model):
    """config.reflow images of bytes (n, 3, S, S), their labels (n,) and noise (n, 3, S, S).

    Between the two of a pair the path is to be straight (arXiv:2209.03003).
    """
    n, rng = run.config.reflow, torch.Generator().manual_seed(run.config.seed)
    labels = torch.randint(model.classes, (n,), generator=rng).to(run.device)
    noise = torch.randn(n, 3, model.side, model.side, generator=rng).to(run.device)
    parts = list(zip(labels.split(250), noise.split(250)))
    with run.autocast():
        made = [run.script.sample(model, label, noise=z) for label, z in tqdm(parts, desc="pairs", leave=False)]
    return ((torch.cat(made) + 1) * 127.5).round().byte(), labels, noise
