"""The judge of spoken words: it hears captions that it was not trained on, and nothing where nothing is said."""
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

import codec
import pocket
import recogniser
import speech
import wav
from shards import FROZEN


@pytest.fixture(scope="module")
def listener():
    return recogniser.load()


@pytest.fixture(scope="module")
def captions():
    with np.load(FROZEN / "audio64.npz") as arrays:
        return bytes(arrays["caption_text"]).decode().split("\n")[100:124]


def wrong_share(listener, waves, captions):
    told = [speech.words_of(text) for text in captions]
    return sum(pocket.edits(listener.hear(wave), row) for wave, row in zip(waves, told)) / sum(map(len, told))


def test_it_hears_captions_by_every_voice(listener, captions):
    waves = [codec.speak(text, i % 3, [i]) for i, text in enumerate(captions)]
    assert wrong_share(listener, waves, captions) < 0.02
    coder = codec.load()
    decoded = [coder.sound(coder.tokens(wave)) for wave in waves]
    assert wrong_share(listener, decoded, captions) < 0.03
    assert wrong_share(listener, waves[1:] + waves[:1], captions) > 0.3, "of other captions most words are wrong"


def test_it_knows_nothing_of_how_captions_are_built(listener):
    rng = random.Random(0)
    texts = [" ".join(rng.choices(recogniser.WORDS, k=12)) for _ in range(12)]
    assert wrong_share(listener, [speech.say(text, i % 3, i) for i, text in enumerate(texts)], texts) < 0.1


def test_silence_and_noise_are_no_words(listener):
    assert listener.hear(np.zeros(16001)) == []
    noise = 0.1 * np.random.default_rng(0).standard_normal(32000)
    assert len(listener.hear(noise)) < 5


def test_its_weights_are_small_and_it_is_frozen(listener):
    assert recogniser.WEIGHTS.stat().st_size < 1e6
    assert not any(p.requires_grad for p in listener.parameters())
    spectra = torch.zeros(2, 50, 32)
    assert listener(spectra).shape == (2, 50, 1 + len(speech.WORDS))


def test_the_command(tmp_path):
    path = tmp_path / "a.wav"
    wav.write(path, speech.say("A red cube.", 2))
    done = subprocess.run([sys.executable, recogniser.__file__, "hear", path], capture_output=True, text=True)
    assert done.stdout == "a red cube\n"
    for arguments in (["hear"], ["hear", tmp_path / "none.wav"]):
        done = subprocess.run([sys.executable, recogniser.__file__, *arguments], capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and done.stderr.startswith("recogniser.py: ")
