"""data/scenes.py --audio: the scenes set's own scenes and captions, heard."""
import functools
import json

import numpy as np
import pytest
import torch

import codec
import impacts
import previews
import scenes as maker
import texts
import world
from shards import FROZEN, content_sha256, read

NUM, CHUNK = 9, 5


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a small set and data/'s stand-in, of two chunks."""
    root = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maker, "ROOT", root)
        patch.setattr(maker, "CHUNK", CHUNK)
        patch.setattr(maker, "validation_looks", lambda kind: ())
        maker.make_shards(64, NUM, 1, "cpu", "audio")
        checked = maker.check_shards(64, NUM, 1, "cpu", "audio")
    return root / "audio64" / "train", checked


@functools.cache
def captions_of(n, seed):
    """Codes and captions as the scenes set has them."""
    codes = world.sample_scenes(n, seed)
    return codes, maker.write("scenes", codes, seed, maker.load_coders("scenes", "cpu")[1], 0)[1]["caption"]


def test_it_is_the_scenes_set_heard(made):
    folder, checked = made
    arrays, meta = read(folder, ["scene", "speech", "sound", "timing", "voice"], maker.modalities(64, "audio"))
    assert {path.name for path in folder.iterdir()} == {"meta.json", *(f"{name}.npy" for name in arrays)}
    assert meta["content_sha256"] == content_sha256(folder) and meta["sounds"] == codec.VERSION
    assert meta["modalities"] == {"speech": {"length": 96, "vocab": 4096, "pad": -1},
                                  "sound": {"length": 32, "vocab": 4096, "pad": -1},
                                  "timing": {"length": 40, "vocab": 99, "pad": 0, "end": 1},
                                  "voice": {"length": 1, "vocab": 3, "pad": -1, "end": -1}}
    assert "speech 100.00 %" in checked and "sound 100.00 %" in checked
    model, row = codec.load(), 0
    for chunk, n in enumerate((CHUNK, NUM - CHUNK)):
        seed = (1 << 32) + chunk
        codes, captions = captions_of(n, seed)
        objects = texts.facts(world.build(codes), maker.NO_INDEX.expand(n, 1, 1))
        for i in range(n):
            voice = int(arrays["voice"][row, 0])
            assert np.array_equal(arrays["scene"][row], codes[i])
            assert np.array_equal(arrays["speech"][row], model.tokens(codec.speak(captions[i], voice, [seed, 1, i])))
            assert arrays["timing"][row].tolist() == codec.timing_row(captions[i])
            assert np.array_equal(arrays["sound"][row], model.tokens(impacts.ring(objects[i], [seed, 2, i])))
            row += 1


def test_timing_is_about_the_tokens_of_captions():
    """As many as tokens before the end; what they add up to is when the speech ends, and after it there is silence."""
    encoding = maker.load_coders("scenes", "cpu")[1]
    codes, captions = captions_of(CHUNK, 7)
    for i, text in enumerate(captions):
        row, tokens = codec.timing_row(text), encoding.encode_ordinary(text)
        lasts = np.array(row[:len(tokens)]) - codec.FIRST_TIME
        assert row[len(tokens)] == codec.END and not any(row[len(tokens) + 1:])
        end = lasts.sum()
        assert (lasts >= 0).all() and 0 < lasts[0] and end <= 96
        loud = np.square(codec.speak(text, 0, i)).reshape(96, -1).mean(1)
        assert loud[end + 2:].max(initial=0) < 1e-6 < loud[end - 2:end].max()


def test_no_other_set_has_changed():
    """What the scenes and qa sets say of themselves: their forms and identities have nothing of sound in them."""
    for kind in ("scenes", "objects", "qa"):
        assert not {"speech", "sound", "timing", "voice"} & set(maker.array_forms(64, kind))
        assert not {"sounds", "codec"} & set(maker.identity_of(64, 5, 1, kind))


def test_frozen_set():
    with np.load(FROZEN / "audio64.npz") as arrays, np.load(FROZEN / "scenes64.npz") as scenes:
        assert json.loads(arrays["modalities"].tobytes()) == maker.modalities(64, "audio")
        assert np.array_equal(arrays["scene"], scenes["scene"])
        assert np.array_equal(arrays["caption_text"], scenes["caption_text"])
        codes, captions = torch.from_numpy(arrays["scene"]).long(), bytes(arrays["caption_text"]).decode().split("\n")
        assert np.bincount(arrays["voice"][:, 0]).min() > 600
        rows = [0, 999, 1999]
        heard = maker.hear(codes, captions, maker.VALIDATION_SEED, codec.load(), rows)
        for name in ("speech", "sound"):
            assert (heard[name] == arrays[name][rows]).mean() >= maker.SAME_TOKENS - 0.01
    assert (FROZEN / "audio64.npz").stat().st_size < 1e6


def test_samples_are_written(tmp_path):
    arrays, texts = maker.make("audio", 1, 64, 7, "cpu")
    previews.write_sounds(arrays, texts, codec.load(), tmp_path / "audio")
    names = {path.name for path in (tmp_path / "audio").iterdir()}
    assert names == {"speech_0.wav", "sound_0.wav", "captions.txt"}
