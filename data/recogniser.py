"""The judge of speech: a small convolutional net that writes down the words it hears, to measure spoken captions.

It hears some 0.4 s around each moment and knows nothing of how captions are built: some of its training texts are words in
random order. tests/pocket.py compares it with pocketsphinx.

    recogniser = recogniser.load()
    recogniser.hear(wave)                        # the words of a wave (n,) at 16 kHz: "a large red metal cube ..".split()

    python data/recogniser.py train              # 6 minutes of one core -> data/frozen/recogniser.safetensors
    python data/recogniser.py hear a.wav         # the words of a WAV file
"""
import argparse
import random

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

import codec
import mel
import speech
import wav
from hub import sentences
from shards import FROZEN, Fault
from tokenizer import save_half

WEIGHTS = FROZEN / "recogniser.safetensors"
WORDS = tuple(speech.WORDS)  # label 0 of CTC (Graves et al., 2006) is none of them
CHANNELS = 96


class Recogniser(nn.Module):
    """Log-mel spectra (B, T, 32) -> logits (B, T, 1 + words)."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(mel.BANDS, CHANNELS, 3, padding=1),
                                  *(codec.Block(CHANNELS, dilation) for dilation in (1, 2, 1, 2, 1)), nn.SiLU())
        self.head = nn.Conv1d(CHANNELS, 1 + len(WORDS), 1)

    def forward(self, spectra):
        return self.head(self.body((spectra.mT - codec.MIDDLE) / codec.SPREAD)).mT

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)  # whatever the precision of the model that speaks
    def hear(self, wave):
        """The words of a wave (n,) at 16 kHz, a list of strings."""
        wave = np.pad(np.asarray(wave, np.float32), (0, -len(wave) % mel.HOP))
        labels = self(torch.from_numpy(mel.log_mel(wave))[None])[0].argmax(-1)
        return [WORDS[label - 1] for label in labels.unique_consecutive().tolist() if label]


def load(path=WEIGHTS):
    """The trained recogniser, frozen, in float32 on the CPU."""
    model = Recogniser()
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.requires_grad_(False).eval()


def training_set(num, seed):
    """Log-mel spectra (num, 192, 32) of texts read aloud, half of them from their tokens; and their labels, lists."""
    rng, coder, spectra, labels = random.Random(seed), codec.load(), [], []
    for i in tqdm(range(num), "speech"):
        text = codec.random_caption(rng)
        wave = codec.speak(text, i % len(speech.VOICES), [seed, i])
        if i // len(speech.VOICES) % 2:
            wave = coder.sound(coder.tokens(wave), rounds=16)
        spectra.append(mel.log_mel(wave))
        labels.append([1 + WORDS.index(word) for word in speech.words_of(text)])
    return torch.from_numpy(np.stack(spectra)), labels


def train(steps=700, num=1600, batch=32, peak=3e-3, seed=1):
    """Train by CTC; what it hears in texts it was not trained on is printed."""
    torch.manual_seed(seed)
    spectra, labels = training_set(num, seed)
    model, rng = Recogniser(), np.random.default_rng(seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01)
    for step in (bar := tqdm(range(steps), "recogniser")):
        optimizer.param_groups[0]["lr"] = peak * min(1, (step + 1) / 100, 1.02 - step / steps)
        rows = rng.integers(num, size=batch)
        x = spectra[rows]
        x = x + 0.5 * torch.rand(batch, 1, 1) * torch.randn_like(x)  # as of a poor decoder
        told = [torch.tensor(labels[row]) for row in rows]
        log_probs = model(x).log_softmax(-1).transpose(0, 1)
        loss = F.ctc_loss(log_probs, torch.cat(told), torch.full((batch,), len(log_probs)),
                          torch.tensor([len(row) for row in told]), zero_infinity=True)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    save_half(model, WEIGHTS)


@sentences("recogniser.py")
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("train", "hear"))
    parser.add_argument("wav", nargs="?", help="a WAV file of up to a minute")
    arguments = parser.parse_args()
    if arguments.task == "train":
        train()
    elif not arguments.wav:
        raise Fault("name the WAV file to hear")
    else:
        print(" ".join(load().hear(wav.read(arguments.wav))))


if __name__ == "__main__":
    main()
