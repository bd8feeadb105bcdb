"""Impacts: every object of a scene is struck once, from left to right, and sounds as its shape, size and material do.

Modal synthesis: a body that is struck rings in a few modes, each a sine that decays. The shape sets the ratios of their
frequencies, the size the lowest one, the material how long they ring and how hard the blow is. Those of the cylinder
are of a free bar (1, 2.76, 5.4), the others are chosen so that every shape has a chord of its own.

    wave = impacts.ring([{"shape": "cube", "material": "metal", "size": "large", "x": 31}], seed=0)  # (20480,) float32
    impacts.read(wave)                                                  # [("cube", "metal", "large")], left to right
"""
import functools
import itertools

import numpy as np

from mel import BANDS, FLOOR, HOP, LENGTHS, RATE, TOKEN, log_mel

MODES = {"cube": (1, 1.58, 2.24), "sphere": (1, 1.28, 1.66), "cylinder": (1, 2.76, 5.4)}
STRENGTHS = (1.0, 0.7, 0.5)  # of the modes
PITCH = {"small": 900, "large": 520}  # Hz, of the lowest mode
DECAY = {"rubber": 0.03, "metal": 0.16}  # s until the lowest mode has fallen to 1/e; those above it fall faster
CLICK = {"rubber": (0.006, 0.15), "metal": (0.002, 0.4)}  # length in s and strength of the blow's own noise
CLASSES = tuple(itertools.product(MODES, DECAY, PITCH))  # 12 of (shape, material, size)
SLOT, SLOTS = 6400, 3  # samples from one impact to the next: 0.4 s
LENGTH = LENGTHS["sound"] * TOKEN  # samples of a scene: 1.28 s
ONSET = 320  # samples of silence before each impact
LOUDNESS, SPREAD = 0.3, 0.1  # of the lowest mode, and how far the strengths of blows and modes vary, as shares
QUIET = 2.0  # nats above what rings from before that the loudest band must reach: else nothing was struck


def strike(shape, material, size, rng=None):
    """One impact from its blow on, (LENGTH,) float64; without rng the mean one."""
    def vary():
        return 1 + SPREAD * rng.uniform(-1, 1) if rng else 1.0

    time = np.arange(LENGTH) / RATE
    noise = (rng or np.random.default_rng(0)).standard_normal(LENGTH)
    length, strength = CLICK[material]
    wave = strength * vary() * noise * np.exp(-time / length)
    for ratio, level in zip(MODES[shape], STRENGTHS):
        decay = DECAY[material] / ratio ** 0.5
        wave += level * vary() * np.sin(2 * np.pi * PITCH[size] * ratio * time) * np.exp(-time / decay)
    return LOUDNESS * wave * vary()


def ring(objects, seed=0):
    """The sound of a scene, (LENGTH,) float32 within [-1, 1]: its objects, dicts as texts.facts has them, from left to
    right. Objects above each other keep their order. Raises ValueError for more than SLOTS objects."""
    if len(objects) > SLOTS:
        raise ValueError(f"a scene has {SLOTS} objects at most, not {len(objects)}")
    rng = np.random.default_rng(seed)
    wave = np.zeros(LENGTH)
    for slot, o in enumerate(sorted(objects, key=lambda o: o["x"])):
        start = ONSET + slot * SLOT
        wave[start:] += strike(o["shape"], o["material"], o["size"], rng)[:LENGTH - start]
    return np.clip(wave, -1, 1).astype(np.float32)


# ------------------------------------------------------------------------------------------------------------
# Reading them back

@functools.cache
def templates():
    """Log-mel frames (12, SLOT / HOP, bands) of the mean impact of every class, alone."""
    silence = np.zeros(ONSET)
    return np.stack([log_mel(np.concatenate([silence, strike(*c)])[:SLOT]) for c in CLASSES])


def distance(a, b):
    """Log-spectral distance in nats: root mean square over frames and bands, (..) of two arrays (.., frames, bands)."""
    return np.sqrt(np.square(a - b).mean((-2, -1)))


def read(wave):
    """The classes (shape, material, size) that are heard in a scene's sound (n,), at most SLOTS, from left to right."""
    known, frames = templates(), SLOT // HOP
    spectrum = log_mel(np.asarray(wave, np.float64)[:SLOT * SLOTS])
    heard = []
    for slot in range(len(spectrum) // frames):
        part = spectrum[slot * frames:(slot + 1) * frames]
        # what still rings of the impact before, and lies below this one unless nothing was struck
        floor = spectrum[slot * frames - 1] if slot else np.full(BANDS, np.log(FLOOR))
        if part[:6].max() < floor.max() + QUIET:
            break
        scores = [distance(np.maximum(template, floor), part) for template in known]
        heard.append(CLASSES[int(np.argmin(scores))])
    return heard
