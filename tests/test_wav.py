"""WAV files in and out: every usual format is read, and what cannot be ends in one sentence."""
import wave as stdlib_wave

import numpy as np
import pytest
from scipy.io import wavfile

import wav
from shards import Fault

TONE = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)


def pitch_of(wave):
    return np.abs(np.fft.rfft(wave)).argmax() * 16000 / len(wave)


def test_a_sound_comes_back_as_it_was_written(tmp_path):
    wav.write(tmp_path / "a.wav", TONE)
    assert np.abs(wav.read(tmp_path / "a.wav") - TONE).max() < 1e-4
    with stdlib_wave.open(str(tmp_path / "a.wav")) as file:
        assert file.getparams()[:4] == (1, 2, 16000, 16000)  # channels, bytes, rate, samples
    wav.write(tmp_path / "loud.wav", 3 * TONE)
    assert np.abs(wav.read(tmp_path / "loud.wav")).max() <= 1


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000])
def test_other_rates_are_resampled(tmp_path, rate):
    time = np.arange(rate) / rate
    wavfile.write(tmp_path / "a.wav", rate, (16000 * np.sin(2 * np.pi * 440 * time)).astype(np.int16))
    sound = wav.read(tmp_path / "a.wav")
    assert abs(len(sound) - 16000) <= 1 and abs(pitch_of(sound) - 440) < 1.1
    assert np.abs(sound[1000:-1000]).max() == pytest.approx(16000 / 32768, rel=0.02)


@pytest.mark.parametrize("kind, scale, middle", [("u1", 127, 128), ("i2", 32767, 0), ("i4", 2147483647, 0),
                                                 ("f4", 1, 0), ("f8", 1, 0)])
def test_all_widths_and_stereo(tmp_path, kind, scale, middle):
    both = np.stack([TONE, np.zeros_like(TONE)], 1) * scale + middle
    wavfile.write(tmp_path / "a.wav", 16000, both.astype(kind))
    assert np.abs(wav.read(tmp_path / "a.wav") - TONE / 2).max() < 0.01


def test_24_bits(tmp_path):
    with stdlib_wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 3, 16000, 0, "NONE", ""))
        file.writeframes(b"".join(int(v * 8388607).to_bytes(3, "little", signed=True) for v in TONE))
    assert np.abs(wav.read(tmp_path / "a.wav") - TONE).max() < 1e-3


def damage(path, kind):
    """Write a file that cannot be read as a sound of the world."""
    def write(rate, samples):
        wavfile.write(path, rate, samples)

    if kind == "silent":
        write(16000, np.zeros(16000, np.int16))
    elif kind == "empty":
        write(16000, np.zeros(0, np.int16))
    elif kind == "ten minutes":
        write(16000, np.ones(600 * 16000, np.int16))
    elif kind == "too large":
        with open(path, "wb") as file:
            file.truncate(wav.MOST_BYTES + 1)
    elif kind == "slow":
        write(100, np.ones(100, np.int16))
    elif kind == "nan":
        write(16000, np.full(1600, np.nan, np.float32))
    elif kind == "cut off":
        wav.write(path, TONE)
        path.write_bytes(path.read_bytes()[:20001])
    elif kind == "header alone":
        wav.write(path, TONE)
        path.write_bytes(path.read_bytes()[:30])
    elif kind == "text":
        path.write_text("RIFF is what this text begins with\n")
    elif kind == "mp3":
        path.write_bytes(b"ID3\x03" + bytes(100))
    elif kind == "no bytes":
        path.write_bytes(b"")
    elif kind == "folder":
        path.mkdir()


SENTENCES = {"silent": "is silent", "empty": "is silent", "ten minutes": "lasts 600 s", "too large": "files of up to 268 MB are read",
             "slow": "100 samples per second", "nan": "no numbers", "cut off": "damaged", "header alone": "damaged",
             "text": "not a WAV file", "mp3": "not a WAV file", "no bytes": "not a WAV file", "folder": "no file",
             "missing": "no file"}


@pytest.mark.parametrize("kind", SENTENCES)
def test_what_cannot_be_read_is_one_sentence(tmp_path, kind):
    path = tmp_path / "a.wav"
    damage(path, kind)
    with pytest.raises(Fault, match=SENTENCES[kind]) as caught:
        wav.read(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_no_number_is_written(tmp_path):
    with pytest.raises(Fault, match="no number"):
        wav.write(tmp_path / "a.wav", np.array([0, np.nan]))
    assert not (tmp_path / "a.wav").exists()
