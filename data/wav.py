"""WAV files as the codec hears them, 16 kHz mono, and back. What cannot be read is a Fault of one sentence."""
import math
import warnings
from pathlib import Path

import numpy as np
from scipy.io import wavfile
from scipy.signal import resample_poly

from mel import RATE
from shards import Fault, first_line

LOWEST_RATE, HIGHEST_RATE = 8000, 192000  # Hz
LONGEST = 60  # s
MOST_BYTES = 1 << 28  # of a file that is read at all: a minute at 192 kHz in stereo, 64 bits, is 184 MB
SILENCE = 1e-4  # loudest sample of a file in which there is nothing to hear: -80 dB


def load(path):
    """A WAV file's rate and samples, as scipy has them. Raises Fault."""
    if not path.is_file():
        raise Fault(f"there is no file {path}")
    if path.stat().st_size > MOST_BYTES:
        size, most = (number // 1_000_000 for number in (path.stat().st_size, MOST_BYTES))
        raise Fault(f"{path} is of {size} MB, and files of up to {most} MB are read: cut it, or save it at a lower rate")
    with open(path, "rb") as file:
        head = file.read(12)
    if head[:4] not in (b"RIFF", b"RIFX", b"RF64") or head[8:] != b"WAVE":
        raise Fault(f"{path} is not a WAV file: convert it first, for example with ffmpeg -i {path.name} sound.wav")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", "Reached EOF prematurely")
            return wavfile.read(path)
    except Exception as error:  # scipy raises several kinds on damaged headers
        raise Fault(f"{path} is damaged, or packed in a way that is not read here ({first_line(error)})") from None


def as_floats(samples, path):
    """Samples (n,) or (n, channels) of any WAV format as float64, full scale 1. Raises Fault."""
    if samples.dtype == np.uint8:
        return (samples.astype(np.float64) - 128) / 128
    if samples.dtype.kind == "i":
        return samples / -float(np.iinfo(samples.dtype).min)
    if samples.dtype.kind == "f" and np.isfinite(samples).all():
        return samples.astype(np.float64)
    raise Fault(f"{path} holds samples that are no numbers" if samples.dtype.kind == "f" else
                f"{path} holds samples of type {samples.dtype}, which is not read here")


def read(path):
    """The sound of a WAV file of any usual format, (n,) float32 at 16 kHz within [-1, 1].

    Channels are averaged, other rates resampled. Raises Fault for what is no WAV file, damaged, cut off, silent, longer
    than LONGEST seconds or of a rate that no sound has.
    """
    path = Path(path)
    rate, samples = load(path)
    if not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise Fault(f"{path} has {rate:,} samples per second: {LOWEST_RATE:,} to {HIGHEST_RATE:,} are read")
    if len(samples) > LONGEST * rate:
        raise Fault(f"{path} lasts {len(samples) / rate:.0f} s, and {LONGEST} s at most are read: cut it")
    wave = as_floats(samples, path)
    if wave.ndim == 2:
        wave = wave.mean(1)
    if not len(wave) or np.abs(wave).max() < SILENCE:
        raise Fault(f"{path} is silent: there is nothing to hear in its {len(wave) / rate:.1f} s")
    if rate != RATE:
        common = math.gcd(rate, RATE)
        wave = resample_poly(wave, RATE // common, rate // common)
    return np.clip(wave, -1, 1).astype(np.float32)


def write(path, wave):
    """Write a sound (n,) at 16 kHz as 16 bit mono; what is beyond [-1, 1] is clipped. Raises Fault for what is no
    number."""
    wave = np.asarray(wave, np.float64)
    if wave.ndim != 1:
        raise ValueError(f"a sound is (n,), not {wave.shape}")
    if not np.isfinite(wave).all():
        raise Fault(f"{path} is not written: the sound holds what is no number")
    wavfile.write(path, RATE, np.round(np.clip(wave, -1, 1) * 32767).astype(np.int16))
