"""A nano4M that learns some links between modalities alone: specialists of one task, and what a trained one is taught
later. capabilities.py measures them.

    ready = Ready("4m_rich", ("scenes64", "rich64"))
    specialist = learn(ready, fresh(ready), ((("rgb",), ("normal",)),), 2000, training_tokens(ready))
"""
import dataclasses
from types import SimpleNamespace
from unittest.mock import patch

import torch
from tqdm import tqdm

from ready import train_4m
from shards import Fault


def fresh(ready, seed=0):
    """A model of the size of the ready one that has learned nothing."""
    torch.manual_seed(seed)
    model = train_4m.Nano4M(ready.config, ready.layout)
    train_4m.init_weights(model.requires_grad_(True))
    return model.to(ready.tokens.device)


def training_tokens(ready):
    """The tokens (N, size), int16, of the training scenes of a ready model's sets."""
    config = dataclasses.replace(ready.config, data=f"data/{ready.set}/train")
    try:
        arrays, _ = train_4m.read_shards(config, ready.layout.modalities)
    except train_4m.Fault as fault:  # a script's own kind
        raise Fault(str(fault)) from None
    return torch.cat([torch.from_numpy(array.astype("int16")) for array in arrays], 1)


def blurred(tokens, span, most, rng):
    """Tokens (B, size) of which some of a modality's are another row's: of each row another share, up to `most`."""
    part = tokens[:, span]
    share = most * torch.rand(len(part), 1, generator=rng, device=rng.device)
    other = torch.rand(part.shape, generator=rng, device=rng.device) < share
    tokens = tokens.clone()
    tokens[:, span] = torch.where(other, part.roll(1, 0), part)
    return tokens


def learn(ready, model, links, steps, tokens, seed=0, blur=None, **changes):
    """Train a model by steps of train_4m.py on links in turn: pairs of modalities given and asked. The same model.

    tokens (N, size): of training scenes. blur: a modality, and the share of its tokens that is wrong at most where it is
    given, so that it is not learnt by heart. changes: of its Config.
    """
    config = dataclasses.replace(ready.config, num_steps=steps, word_steps=0, **changes)
    device = ready.tokens.device
    run = SimpleNamespace(rank=0, world=1, device=device, precision=ready.precision, autocast=ready.autocast,
                          slice=lambda batch: slice(0, batch))
    loader = train_4m.Loader([tokens], config.batch, seed, device)
    muon, adam = train_4m.make_optimizers(model, config, run)
    name = "all links" if len(links) > 2 else " + ".join(" > ".join(map(",".join, link)) for link in links)
    with patch.object(train_4m, "LINKS", links), torch.enable_grad():
        for step in (bar := tqdm(range(steps), name)):
            batch = loader()[0].long() & 0xFFFF  # as the script has them
            link, _ = train_4m.step_shape(step, config, ready.layout)
            if blur and link and blur[0] in link[0]:
                batch = blurred(batch, ready.layout.span[blur[0]], blur[1], loader.rng)
            loss, _, _ = train_4m.train_step(step, batch, loader.rng, model, muon, adam, ready.layout, config, run)
            if step % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.requires_grad_(False)
