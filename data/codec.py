"""Sound tokens: an FSQ autoencoder of log-mel spectra, 25 tokens of 12 bits per second, for speech and impacts alike.

A token is 40 ms: two frames of 32 bands through an MLP that sees nothing else, so that equal sounds get equal tokens,
and four digits of eight levels (finite scalar quantisation, arXiv:2309.15505), the vocabulary of the picture tokens. A
convolutional decoder draws the spectrum again, and the algorithm of Griffin and Lim (with the momentum of Perraudin et
al., WASPAA 2013) finds a wave that has it.

    model = codec.load()
    ids = model.tokens(wave)                              # (n / 640,) uint16 of a wave (n,) at 16 kHz, see wav.read
    wave = model.sound(ids)                               # (640 * len(ids),) float32

    python data/codec.py train [--minutes=4.5]            # -> data/frozen/audio.safetensors (maintainers)
    python data/codec.py listen a.wav b.wav               # b.wav is what the tokens of a.wav sound like
    python data/codec.py say "A red cube." b.wav          # a caption read aloud; --voice=0..2
"""
import argparse
import random
import time

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

import impacts
import mel
import speech
import texts
import wav
from hub import sentences
from mel import LENGTHS, TOKEN
from shards import FROZEN, Fault
from tokenizer import DIGITS, LEVELS, digits_of, ids_of, save_half

WEIGHTS = FROZEN / "audio.safetensors"
VERSION = 3  # of what scenes sound like, beside the weights
WINDOW, HOP = 512, 160  # samples, of the spectra that are drawn again: four per token
BINS = WINDOW // 2 + 1
PAD, END, FIRST_TIME, CAPTION = 0, 1, 2, texts.LENGTHS["caption"]  # of rows of timing
FASTEST = 2.7  # times the normal speed of speech: the longest caption there can be takes 2.63
DRAWN_FLOOR = 0.03  # added to the magnitudes whose logarithms are drawn: what is quieter is silence
MIDDLE, SPREAD = -2.0, 4.0  # nats, about the mean and deviation of log-mel spectra


# ------------------------------------------------------------------------------------------------------------
# The net

class Block(nn.Module):
    """Residual block of two convolutions along time: (B, C, T) -> (B, C, T)."""

    def __init__(self, dim, dilation=1):
        super().__init__()
        self.conv1 = nn.Conv1d(dim, dim, 5, padding=2 * dilation, dilation=dilation)
        self.conv2 = nn.Conv1d(dim, dim, 1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x):
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class Codec(nn.Module):
    """Log-mel spectra (B, 2 T, 32) -> T tokens -> log magnitudes (B, 4 T, 257)."""

    def __init__(self, dim=160, fine=128, hidden=256):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(2 * mel.BANDS, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
                                     nn.Linear(hidden, DIGITS))
        self.coarse = nn.Sequential(nn.Conv1d(DIGITS, dim, 3, padding=1), Block(dim), Block(dim, 2), Block(dim))
        self.spread = nn.Conv1d(dim, 4 * fine, 1)  # one token -> four spectra
        self.fine = nn.Sequential(Block(fine), Block(fine, 2), nn.SiLU(), nn.Conv1d(fine, BINS, 1))

    def quantise(self, spectra):
        """Digits (B, T, 4), floats holding 0..7, of (B, 2 T, 32); the gradient passes straight through the rounding."""
        x = (spectra - MIDDLE) / SPREAD
        x = (LEVELS - 1) * torch.sigmoid(self.encoder(x.reshape(len(x), -1, 2 * mel.BANDS)))
        return x + (x.round() - x).detach()

    def reconstruct(self, digits):
        """Log magnitudes (B, 4 T, 257) of digits (B, T, 4)."""
        x = self.coarse((digits * (2 / (LEVELS - 1)) - 1).transpose(1, 2))  # (B, dim, T)
        B, _, T = x.shape
        x = self.spread(x).view(B, -1, 4, T).transpose(2, 3).reshape(B, -1, 4 * T)  # (B, fine, 4 T)
        return self.fine(x).transpose(1, 2) + MIDDLE

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)  # whatever the precision of the model whose tokens these are
    def encode(self, spectra):
        """Token ids (B, T), int64 in 0..4095, of log-mel spectra (B, 2 T, 32)."""
        return ids_of(self.quantise(spectra), 2)

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)
    def decode(self, ids):
        """Log magnitudes (B, 4 T, 257) of token ids (B, T)."""
        if ids.ndim != 2:
            raise ValueError(f"decode takes (B, T), not {tuple(ids.shape)}")
        return self.reconstruct(digits_of(ids, 2))

    def tokens(self, wave):
        """Token ids (.., n / 640) uint16 of waves (.., n), with silence at the end of one that is no whole number."""
        wave = np.asarray(wave, np.float32)
        wave = np.pad(wave, [(0, 0)] * (wave.ndim - 1) + [(0, -wave.shape[-1] % TOKEN)])
        spectra = torch.from_numpy(mel.log_mel(wave)).view(-1, 2 * wave.shape[-1] // TOKEN, mel.BANDS)
        return self.encode(spectra).numpy().astype(np.uint16).reshape(*wave.shape[:-1], -1)

    def sound(self, ids, rounds=32):
        """The wave (640 T,) float32 within [-1, 1] of token ids (T,)."""
        drawn = self.decode(torch.as_tensor(np.asarray(ids, np.int64))[None])[0].numpy()
        return griffin_lim(np.maximum(np.exp(drawn) - DRAWN_FLOOR, 0), rounds)


def load(path=WEIGHTS):
    """The trained codec, frozen, in float32 on the CPU."""
    model = Codec()
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.requires_grad_(False).eval()


# ------------------------------------------------------------------------------------------------------------
# Spectra and waves

def spectrum(wave):
    """Complex spectra (.., n / 160, 257) of waves (.., n)."""
    return np.fft.rfft(mel.frames(wave, WINDOW, HOP) * mel.hann(WINDOW)).astype(np.complex64)


def log_magnitudes(wave):
    """What the decoder draws: (.., n / 160, 257) float32 of waves (.., n)."""
    return np.log(np.abs(spectrum(wave)) + DRAWN_FLOOR)


def wave_of(spectra):
    """The wave (160 F,) whose spectra are nearest to (F, 257), by least squares (Griffin and Lim, 1984)."""
    windowed = np.fft.irfft(spectra, WINDOW).astype(np.float32) * mel.hann(WINDOW)
    return overlap(windowed) / np.maximum(overlap(np.tile(np.square(mel.hann(WINDOW)), (len(spectra), 1))), 1e-3)


def overlap(rows):
    """The sum (160 F,) of windows (F, 512) where `spectrum` cut them out."""
    n, parts = len(rows), -(-WINDOW // HOP)
    columns = np.pad(rows, ((0, 0), (0, parts * HOP - WINDOW))).reshape(n, parts, HOP)
    total = np.zeros((n + parts, HOP), np.float32)
    for part in range(parts):
        total[part:part + n] += columns[:, part]
    start = (WINDOW - HOP) // 2
    return total.reshape(-1)[start:start + n * HOP]


def griffin_lim(magnitude, rounds, momentum=0.99):
    """A wave (160 F,) float32 within [-1, 1] whose spectra have about these magnitudes (F, 257)."""
    angles = 2 * np.pi * np.random.default_rng(0).random(magnitude.shape, np.float32)
    phase, before = np.exp(1j * angles).astype(np.complex64), 0
    for _ in range(rounds):
        found = spectrum(wave_of(magnitude * phase))
        phase = found + momentum * (found - before)
        phase /= np.abs(phase) + 1e-8
        before = found
    return np.clip(wave_of(magnitude * phase), -1, 1)


# ------------------------------------------------------------------------------------------------------------
# What scenes sound like

def speed_of(text):
    """How fast a caption is spoken to fit LENGTHS["speech"] tokens: at normal speed, or as much faster as it must be.

    Raises ValueError for one that would be spoken faster than FASTEST.
    """
    room = LENGTHS["speech"] * TOKEN
    speed = max(1.0, speech.seconds(text) * speech.RATE / (room - 2 * speech.FRAME))
    if speed > FASTEST:
        raise ValueError(f"a text of {speech.seconds(text):.1f} s does not fit {room / speech.RATE:.2f} s: {text!r}")
    return speed


def speak(text, voice, seed):
    """A caption as a wave (61440,) float32, as fast as it has to be. Raises ValueError as speed_of does."""
    wave = speech.say(text, voice, seed, speed_of(text))
    return np.pad(wave, (0, LENGTHS["speech"] * TOKEN - len(wave)))


def timing_row(text):
    """For how many tokens of speech each token of a caption is said: LENGTHS["caption"] ids, FIRST_TIME + 0..96. What
    they add up to is when it has been said, rounded."""
    ends = [round(ms * speech.RATE / 1000 / TOKEN) for ms in speech.timing(text, speed_of(text))]
    lasts = [FIRST_TIME + int(n) for n in np.diff(ends, prepend=0)]
    return lasts + [END] + [PAD] * (CAPTION - len(lasts) - 1)


def heard_arrays(model, objects, captions, seed, rows=None, report=lambda count: None):
    """The arrays of scenes that are heard, uint16: speech (n, 96), sound (n, 32), timing (n, 40), see timing_row, and
    voice (n, 1) of speech.VOICES.

    objects: per scene a list of dicts, of texts.facts; captions: a text per scene. The seed draws the voices, and the
    noise of every scene apart. rows: of which scenes alone; default: all. report(1) is called after each.
    """
    voices = np.random.default_rng([seed, 0]).integers(len(speech.VOICES), size=len(captions))
    rows = range(len(captions)) if rows is None else rows
    told = np.zeros((len(rows), LENGTHS["speech"]), np.uint16)
    struck = np.zeros((len(rows), LENGTHS["sound"]), np.uint16)
    for n, i in enumerate(rows):
        told[n] = model.tokens(speak(captions[i], voices[i], [seed, 1, i]))
        struck[n] = model.tokens(impacts.ring(objects[i], [seed, 2, i]))
        report(1)
    timing = np.array([timing_row(captions[i]) for i in rows], np.uint16)
    return {"speech": told, "sound": struck, "timing": timing, "voice": voices[list(rows), None].astype(np.uint16)}


# ------------------------------------------------------------------------------------------------------------
# Training

def random_caption(rng):
    """The caption of one to three random objects, or words in random order: the codec is not to rely on what captions
    say."""
    from raycaster import COLORS, MATERIALS, SHAPES, SIZES
    from texts import caption
    if rng.random() < 0.3:
        return " ".join(rng.choices(tuple(speech.WORDS), k=rng.randint(3, 20)))
    values = {"shape": SHAPES, "color": tuple(COLORS), "material": MATERIALS, "size": SIZES}
    objects = [{**{name: rng.choice(words) for name, words in values.items()}, "x": rng.randrange(100),
                "y": rng.randrange(100)} for _ in range(rng.randint(1, 3))]
    return caption(objects, rng)


def training_waves(num, seed):
    """Waves (num, 61440) float32: two thirds captions read aloud, the others three scenes' impacts in a row."""
    rng, waves = random.Random(seed), np.zeros((num, LENGTHS["speech"] * TOKEN), np.float32)
    for i in tqdm(range(num), "sounds"):
        if i % 3 < 2:
            waves[i] = speak(random_caption(rng), i % len(speech.VOICES), [seed, i])
        else:
            scenes = [[dict(zip(("shape", "material", "size"), rng.choice(impacts.CLASSES)), x=x)
                       for x in range(rng.randint(1, 3))] for _ in range(3)]
            waves[i] = np.concatenate([impacts.ring(scene, [seed, i, j]) for j, scene in enumerate(scenes)])
    return waves


def train(minutes, num=1200, batch=24, length=32, peak=3e-3, seed=0):
    """Train for a number of minutes on crops of `length` tokens."""
    torch.manual_seed(seed)
    rng, waves, model = np.random.default_rng(seed), training_waves(num, seed), Codec()
    spectra = torch.from_numpy(mel.log_mel(waves))  # (num, 192, 32)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    # what a bin's error counts falls with its frequency as the width of a mel band grows
    weight = 1 / (700 + torch.linspace(0, mel.RATE / 2, BINS))
    weight = weight / weight.mean()
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    start, step, bar = time.process_time(), 0, tqdm(total=round(60 * minutes), desc="codec", unit="s")
    while (progress := (time.process_time() - start) / (60 * minutes)) < 1:
        optimizer.param_groups[0]["lr"] = peak * min(1, (step + 1) / 100, 1.02 - progress)
        rows, firsts = rng.integers(num, size=batch), rng.integers(LENGTHS["speech"] - length + 1, size=batch)
        seen = torch.stack([spectra[row, 2 * first:2 * (first + length)] for row, first in zip(rows, firsts)])
        cuts = np.stack([waves[row, TOKEN * first:TOKEN * (first + length)] for row, first in zip(rows, firsts)])
        target = torch.from_numpy(log_magnitudes(cuts))
        drawn = model.reconstruct(model.quantise(seen))
        inner = slice(4, -4)  # a crop's ends lack what is beyond them
        loss = (weight * (drawn - target).abs())[:, inner].mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 20 == 0:
            bar.n = int(time.process_time() - start)
            bar.set_postfix(step=step, loss=f"{loss.item():.4f}")
    bar.close()
    save_half(model, WEIGHTS)
    print(f"{WEIGHTS}: {WEIGHTS.stat().st_size / 1e6:.1f} MB")


@sentences("codec.py")
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("train", "listen", "say"))
    parser.add_argument("what", nargs="*", help="listen: two WAV files; say: a text and a WAV file")
    parser.add_argument("--minutes", type=float, default=4.5, help="of training, summed over the cores")
    parser.add_argument("--voice", type=int, default=0, choices=range(len(speech.VOICES)))
    arguments = parser.parse_args()
    if arguments.task == "train":
        train(arguments.minutes)
        return
    if len(arguments.what) != 2:
        raise Fault("name what is read and the WAV file to write")
    source, target = arguments.what
    if arguments.task == "listen":
        ids = load().tokens(wav.read(source))
        wav.write(target, load().sound(ids))
        print(f"{target}: {len(ids)} tokens, {len(ids) * TOKEN / speech.RATE:.2f} s")
        return
    try:
        wave = speech.say(source, arguments.voice)
    except ValueError as error:
        raise Fault(str(error)) from None
    wav.write(target, wave)
    print(f"{target}: {len(wave) / speech.RATE:.2f} s")


if __name__ == "__main__":
    main()
