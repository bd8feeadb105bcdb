"""The ready nano4Ms of data/frozen, from Python: any modalities of validation scenes from any others.

    ready = Ready("4m_rich", ("scenes64", "rich64"))
    tokens = ready.generate(ready.tokens[:4], ("caption",), [ready.output("rgb", steps=16, temperature=0.5)])
    ready.show.pictures(tokens, "rgb")              # (4, 3, 64, 64)
"""
import sys
from types import SimpleNamespace

import torch
from tqdm import tqdm

import checkpoints
import generate_4m
import join
import machine
import show_4m
from shards import FROZEN, ROOT

sys.path.insert(0, str(ROOT.parent))
import train_4m  # noqa: E402  the script that they are of


class Ready:
    """A trained model with the validation scenes of its sets. scenes: of the first so many are its numbers."""

    def __init__(self, name, sets, scenes=2000, device="cpu"):
        arrays, kinds = join.validation(sets)
        self.set = "-".join(sets)  # folder below data/ of the training scenes, where they have been made and joined
        self.layout = train_4m.Layout(kinds, device)
        path = FROZEN / f"{name}.safetensors"
        weights, self.config = checkpoints.read_checkpoint(train_4m, path, train_4m.CONFIGS["cpu"])
        self.model = train_4m.Nano4M(self.config, self.layout).to(device)
        checkpoints.load_weights(train_4m, self.model, weights, path)
        self.model.eval().requires_grad_(False)
        rows = [torch.from_numpy(arrays[m].astype("int64")) for m in kinds]
        self.tokens = torch.cat(rows, 1).to(device)
        run = SimpleNamespace(device=device, options=SimpleNamespace(quality_scenes=scenes))
        self.show = show_4m.open_show(train_4m, run, self.layout, self.tokens)
        self.show.bar = tqdm(disable=True, total=0)
        self.output = train_4m.Output
        decision = machine.time_products(torch.device(device), train_4m.PRECISIONS, 4096, self.config.dim,
                                         self.config.mlp_ratio * self.config.dim)
        self.precision = decision[0]  # the faster one, as in training

    def autocast(self):
        return torch.autocast(self.tokens.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def only(self, tokens, *modalities):
        return generate_4m.only(self.layout, tokens, *modalities)

    def generate(self, tokens, given, outputs, seed=0, model=None):
        """New tokens (B, size), made one output after another from what is given: names of modalities, or which tokens
        are known (B, size). model: in place of its own."""
        made = []
        all_known = given if isinstance(given, torch.Tensor) else self.only(tokens, *given)
        for i, (part, known) in enumerate(zip(tokens.split(show_4m.PART), all_known.split(show_4m.PART))):
            with self.autocast():
                made.append(generate_4m.generate(train_4m, model or self.model, self.layout, part, known, outputs,
                                                 seed=seed * 1000 + i)[0])
        return torch.cat(made)

    def likelihood(self, tokens, given, asked):
        """Mean log-probability (B,) in nats of the tokens of the modality asked, each from the modalities given alone."""
        means = []
        for part in tokens.split(show_4m.PART):
            known = self.only(part, *given)
            places = torch.arange(self.layout.size, device=part.device)[self.layout.span[asked]].expand(len(part), -1)
            valid = self.layout.valid(part).gather(1, places)
            with self.autocast():
                log_probs = train_4m.predict(self.model, part.masked_fill(~known, 0), known, places)
            own = log_probs.gather(2, part.gather(1, places)[..., None])[..., 0]
            means.append(own.masked_fill(~valid, 0).sum(1) / valid.sum(1))
        return torch.cat(means)
