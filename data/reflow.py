"""Training pairs for train_flow.py --reflow: the images that a loaded model draws, and the noise that each came from."""
import torch
from tqdm import tqdm

import checkpoints
import show_flow


@torch.no_grad()
def draw_pairs(run, model):
    """config.reflow images of bytes (n, 3, S, S), guided as the samples are, their labels (n,), noise (n, 3, S, S).

    Between the two of a pair the path is to be straight (arXiv:2209.03003).
    """
    n, rng = run.config.reflow, torch.Generator().manual_seed(run.config.seed)
    labels = torch.randint(model.classes, (n,), generator=rng).to(run.device)
    noise = torch.randn(n, 3, model.side, model.side, generator=rng).to(run.device)
    parts = list(zip(labels.split(250), noise.split(250)))
    guided = model.classes > 1 and 0 < checkpoints.loaded_label_drop(run) < 1
    guidance = show_flow.guidance_of(run.config) if guided else 1.0
    with run.autocast():
        made = [run.script.sample(model, label, guidance=guidance, noise=z)
                for label, z in tqdm(parts, desc="pairs", leave=False)]
    return ((torch.cat(made) + 1) * 127.5).round().byte(), labels, noise
