"""Speech: the synthesiser against closed forms, the words against what captions use, and a recogniser of English."""
from pathlib import Path

import numpy as np
import pytest

import pocket
import speech

FROZEN = Path(__file__).resolve().parent.parent / "data" / "frozen"
CAPTION = "A large red metal cube on the left and a small cyan rubber sphere at the back right."


@pytest.fixture(scope="module")
def captions():
    with np.load(FROZEN / "scenes64.npz") as arrays:
        return bytes(arrays["caption_text"]).decode().split("\n")


def test_every_caption_can_be_said(captions):
    used = {word for text in captions for word in speech.words_of(text)}
    assert used == set(speech.WORDS), "words without a pronunciation, or ones that no caption has"
    assert all(phoneme in speech.PHONEMES for phonemes in speech.WORDS.values() for phoneme in phonemes)
    assert len({tuple(phonemes) for phonemes in speech.WORDS.values()}) == len(speech.WORDS), "two words sound the same"


@pytest.mark.parametrize("text", ["a red dog", "a red cube!", "2 cubes", "", " . "])
def test_what_cannot_be_said_is_told(text):
    with pytest.raises(ValueError) as caught:
        speech.say(text)
    assert "\n" not in str(caught.value)


def test_timing_adds_up():
    """At normal speed a word ends its own length after the mark before; a full stop takes none, and speed divides all."""
    marks = speech.MARKS.findall(CAPTION.lower())
    lengths = [0 if mark == "." else 1000 * speech.seconds(mark) for mark in marks]
    assert speech.timing(CAPTION) == pytest.approx(np.cumsum(lengths).tolist())
    assert len(marks) == 19 and speech.timing("a, a")[1] > speech.timing("a a")[0], "a comma is a pause"
    assert speech.timing(CAPTION, 2.0)[-1] == pytest.approx(speech.timing(CAPTION)[-1] / 2)


def test_edits_are_counted():
    words = "a red cube on the left".split()
    assert pocket.edits(words, words) == 0 and pocket.edits([], words) == 6 and pocket.edits(words, []) == 6
    assert pocket.edits("a red cube left".split(), words) == 2
    assert pocket.edits("red a cube on the the left".split(), words) == 3


def test_pulses_are_a_sum_of_cosines():
    phase = 2 * np.pi * 200 * np.arange(1, 1601) / 16000
    slow = sum(np.cos(k * phase) for k in range(1, 39)) * np.sqrt(2 / 38)
    np.testing.assert_allclose(speech.pulses(np.full(1600, 200.0)), slow, atol=1e-2)


def test_resonances_peak_where_they_should():
    frequency = np.arange(0, 8000, 5, dtype=np.float32)
    centres = np.array([[500, 1500, 2500]], np.float32)
    response = np.abs(speech.resonance(frequency, centres, (60, 60, 60)))[0]
    peaks = frequency[1:-1][(response[1:-1] > response[:-2]) & (response[1:-1] > response[2:])]
    assert peaks == pytest.approx([500, 1500, 2500], abs=10)
    f, exact = 900.0, 1.0
    for centre in (500, 1500, 2500):
        exact *= centre ** 2 / abs(centre ** 2 - f ** 2 + 60j * f)
    assert response[180] == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("voice", range(3))
def test_voices_have_their_pitch_and_vowels_their_resonances(voice):
    pitch, tract = speech.VOICES[voice]
    segments = np.array(speech.PHONEMES["AA"] * 4)
    sources, _, places = speech.frames_of(segments, 1)
    assert np.allclose(sources[10:-10], [1, 0, 0]) and np.allclose(places[10:-10], [730, 1100, 2450])
    wave = speech.say("a " * 30, voice)
    part = wave[800:3200] - wave[800:3200].mean()  # where the pitch is still about a tenth above the voice's
    lags = np.arange(int(16000 / pitch / 1.4), int(16000 / pitch / 0.8))
    best = lags[np.argmax([part[:-lag] @ part[lag:] / (len(part) - lag) for lag in lags])]
    assert 16000 / best == pytest.approx(pitch * 1.08, rel=0.06)
    assert np.isfinite(wave).all() and wave.dtype == np.float32 and 0.2 < np.abs(wave).max() <= 1


def test_a_seed_and_a_speed_decide_a_wave():
    wave = speech.say(CAPTION, 1, 5)
    assert np.array_equal(wave, speech.say(CAPTION, 1, 5)) and not np.array_equal(wave, speech.say(CAPTION, 1, 6))
    assert len(speech.say(CAPTION, 1, 5, 2.0)) == pytest.approx(len(wave) / 2, abs=speech.FRAME)
    assert len(wave) == pytest.approx(speech.seconds(CAPTION) * speech.RATE, abs=speech.FRAME)


@pytest.mark.parametrize("speed", [1.0, 2.0])
def test_another_recogniser_understands(captions, speed):
    pytest.importorskip("pocketsphinx")
    decoder, wrong, count = pocket.recogniser(), 0, 0
    for i, text in enumerate(captions[:9]):
        told = speech.words_of(text)
        wrong += pocket.edits(pocket.hear(decoder, speech.say(text, i % 3, i, speed)), told)
        count += len(told)
    assert wrong <= 0.02 * count, f"{wrong} of {count} words"
