"""Sound as log-mel spectra, which the codec, the word recogniser and the impacts share; in numpy, 16 kHz mono."""
import functools

import numpy as np

RATE = 16000  # Hz
BANDS, LOWEST, HIGHEST = 32, 60.0, 7600.0  # bands, and Hz at the ends of the first and the last one
WINDOW, HOP = 640, 320  # samples: 40 ms every 20 ms
TOKEN = 2 * HOP  # samples of one token of codec.py: 40 ms
LENGTHS = {"speech": 96, "sound": 32}  # tokens of a scene: 3.84 s and 1.28 s
FLOOR = 1e-3  # added to a band's power: what is quieter than this is silence


def mel(hertz):
    return 2595 * np.log10(1 + hertz / 700)


@functools.cache
def filters(size=WINDOW):
    """Triangles (size // 2 + 1, BANDS) float32 from the powers of an FFT to bands, equally spaced in mel."""
    frequency = mel(np.fft.rfftfreq(size, 1 / RATE))[:, None]
    edges = np.linspace(mel(LOWEST), mel(HIGHEST), BANDS + 2)
    rising = (frequency - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequency) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


def frames(wave, window=WINDOW, hop=HOP):
    """Windows (.., n / hop, window) of a wave (.., n), each with its hop in the middle; n is a multiple of hop."""
    if wave.shape[-1] % hop:
        raise ValueError(f"{wave.shape[-1]} samples are no multiple of {hop}")
    around = [(0, 0)] * (wave.ndim - 1) + [((window - hop) // 2,) * 2]
    return np.lib.stride_tricks.sliding_window_view(np.pad(wave, around), window, axis=-1)[..., ::hop, :]


@functools.cache
def hann(window):
    return np.hanning(window + 1)[:-1].astype(np.float32)


def log_mel(wave, window=WINDOW, hop=HOP):
    """Natural log of the power in each band, (.., n / hop, BANDS) float32, of a wave (.., n), n a multiple of hop."""
    spectrum = np.fft.rfft(frames(np.asarray(wave, np.float32), window, hop) * hann(window))
    power = np.square(spectrum.real) + np.square(spectrum.imag)
    return np.log(power.astype(np.float32) @ filters(window) + FLOOR)
