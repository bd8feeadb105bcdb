"""The codec: tokens one at a time, Griffin-Lim against closed forms, and speech that is understood from its tokens."""
import itertools
import random
import sys

import numpy as np
import pytest
import torch

import codec
import impacts
import mel
import pocket
import recogniser
import speech
import texts
import wav
from raycaster import COLORS, MATERIALS, SHAPES, SIZES

CAPTIONS = ("A large red metal cube on the left and a small cyan rubber sphere at the back right.",
            "Two objects on the floor: a small gray metal cylinder in the middle and a large red metal cube on the left.",
            "There is a small yellow rubber cube at the front middle and a large green metal sphere on the left.")


@pytest.fixture(scope="module")
def model():
    return codec.load()


@pytest.fixture(scope="module")
def spoken():
    return np.stack([codec.speak(text, i, [i]) for i, text in enumerate(CAPTIONS)])


def test_weights_are_small():
    assert codec.WEIGHTS.stat().st_size < 2e6


def test_a_token_is_of_its_own_40_ms_alone(model, spoken):
    spectra = torch.from_numpy(mel.log_mel(spoken))
    ids = model.encode(spectra)
    assert ids.shape == (3, 96) and 0 <= ids.min() and ids.max() < 4096
    assert torch.equal(model.encode(spectra[:, 20:40]), ids[:, 10:20])
    silence = model.tokens(np.zeros(6400, np.float32))
    assert len(set(silence.tolist())) == 1 and silence.dtype == np.uint16
    assert np.array_equal(model.tokens(spoken)[1], model.tokens(spoken[1]))
    assert len(model.tokens(np.zeros(641, np.float32))) == 2


def test_digits_are_those_of_the_picture_tokens(model, spoken):
    spectra = torch.from_numpy(mel.log_mel(spoken[0]))[None]
    digits = model.quantise(spectra)[0].round().long().tolist()
    assert model.encode(spectra)[0].tolist() == [a + 8 * b + 64 * c + 512 * d for a, b, c, d in digits]
    with pytest.raises(ValueError, match="0..4095"):
        model.decode(torch.tensor([[4096]]))
    with pytest.raises(ValueError, match=r"\(B, T\)"):
        model.decode(torch.tensor([1]))


def test_a_wave_comes_back_from_its_spectra():
    wave = np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    back = codec.wave_of(codec.spectrum(wave))
    np.testing.assert_allclose(back[200:-200], wave[200:-200], atol=1e-3)


def test_griffin_lim_finds_a_tone():
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(8000) / 16000).astype(np.float32)
    found = codec.griffin_lim(np.abs(codec.spectrum(tone)), rounds=16)
    assert found.shape == tone.shape and abs(int(np.abs(np.fft.rfft(found)).argmax()) - 500) <= 4
    assert np.sqrt(np.square(found[800:-800]).mean()) == pytest.approx(0.5 / 2 ** 0.5, rel=0.1)


def test_it_is_the_same_whatever_the_precision_around(model, spoken):
    ids = model.tokens(spoken[0])
    sound, heard = model.sound(ids, rounds=2), recogniser.load().hear(spoken[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(model.tokens(spoken[0]), ids) and np.array_equal(model.sound(ids, rounds=2), sound)
        assert recogniser.load().hear(spoken[0]) == heard == speech.words_of(CAPTIONS[0])


def test_what_is_said_fits_and_too_much_is_told():
    assert codec.speak(CAPTIONS[0], 0, 0).shape == (96 * 640,)
    with pytest.raises(ValueError, match="does not fit 3.84 s"):
        codec.speak("a large red metal cube and " * 20, 0, 0)


def test_the_longest_caption_there_can_be_fits():
    places = [{"x": x, "y": y} for x, y in itertools.product((10, 50, 90), (10, 50, 90))]
    kinds = [dict(zip(("shape", "color", "material", "size"), kind))
             for kind in itertools.product(SHAPES, COLORS, MATERIALS, SIZES)]
    longest = max((kind | place for kind in kinds for place in places),
                  key=lambda o: speech.seconds(f"{texts.noun(o)} {texts.place(o)}"))
    captions = {texts.caption([longest] * 3, random.Random(seed)) for seed in range(50)}
    assert len(captions) == 5, "every template"
    for caption in captions:
        assert codec.speak(caption, 0, 0).shape == (96 * 640,)


def test_impacts_are_told_apart_by_their_tokens(model):
    right = count = 0
    for start in range(12):
        classes = [impacts.CLASSES[(start + step) % 12] for step in (0, 5, 10)]
        scene = [dict(zip(("shape", "material", "size"), c), x=x) for x, c in enumerate(classes)]
        heard = impacts.read(model.sound(model.tokens(impacts.ring(scene, start))))
        right += sum(a == b for a, b in zip(heard, classes))
        count += 3
    assert right >= 0.9 * count, f"{right} of {count}"


def test_another_recogniser_understands_the_tokens(model, spoken):
    pytest.importorskip("pocketsphinx")
    decoder, wrong = pocket.recogniser(), 0
    told = [speech.words_of(text) for text in CAPTIONS]
    for wave, words in zip(spoken, told):
        wrong += pocket.edits(pocket.hear(decoder, model.sound(model.tokens(wave))), words)
    assert wrong <= 0.05 * sum(map(len, told)), f"{wrong} words"


def test_command_line_says_what_is_wrong_in_one_sentence(tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["codec.py", *map(str, arguments)])
        codec.main()

    run("say", "A red cube.", tmp_path / "a.wav", "--voice=2")
    run("listen", tmp_path / "a.wav", tmp_path / "b.wav")
    assert len(wav.read(tmp_path / "b.wav")) % 640 == 0 and "tokens" in capsys.readouterr().out
    for arguments, sentence in ((("say", "A red dog.", "b.wav"), "no pronunciation of 'dog'"),
                                (("say", "a"), "name what is"),
                                (("listen", tmp_path / "c.wav", "b.wav"), "there is no file")):
        with pytest.raises(SystemExit, match=sentence) as caught:
            run(*arguments)
        assert "\n" not in str(caught.value)
