"""Impacts: modes against closed forms, and classes that can be told apart."""
import itertools

import numpy as np
import pytest

import impacts
import mel


def scene(*classes):
    return [dict(zip(("shape", "material", "size"), c), x=10 * x) for x, c in enumerate(classes)]


def test_no_two_classes_sound_alike():
    known = impacts.templates()
    assert known.shape == (12, impacts.SLOT // mel.HOP, mel.BANDS) and len(set(impacts.CLASSES)) == 12
    distances = {(a, b): impacts.distance(known[a], known[b]) for a, b in itertools.combinations(range(12), 2)}
    (a, b), least = min(distances.items(), key=lambda item: item[1])
    assert least > 1.0, f"{impacts.CLASSES[a]} and {impacts.CLASSES[b]}: {least:.2f} nats; 0.5 is the least"


@pytest.mark.parametrize("shape, ratios", [("cube", (1, 1.58, 2.24)), ("sphere", (1, 1.28, 1.66)),
                                           ("cylinder", (1, 2.76, 5.4))])
def test_modes_ring_at_their_frequencies_and_decay(shape, ratios):
    for material, size in itertools.product(impacts.DECAY, impacts.PITCH):
        wave = impacts.strike(shape, material, size)[200:]  # after the blow
        time = np.arange(len(wave)) / mel.RATE
        for ratio in ratios:
            hertz = impacts.PITCH[size] * ratio
            near = hertz + np.arange(-60, 61, 2)
            power = [abs(np.exp(-2j * np.pi * f * time) @ wave) for f in near]
            assert near[int(np.argmax(power))] == pytest.approx(hertz, abs=14)
        # the lowest mode falls to 1/e in DECAY seconds: heard alone, through a band around it
        lag = int(impacts.DECAY[material] * mel.RATE)
        carrier = np.exp(-2j * np.pi * impacts.PITCH[size] * time)
        window = np.hanning(400)
        start, end = (abs((carrier * wave)[at:at + 400] @ window) for at in (300, 300 + lag))
        assert end / start == pytest.approx(np.exp(-1), rel=0.25)


def test_order_is_from_left_to_right_and_a_seed_decides():
    a, b, c = (impacts.CLASSES[k] for k in (0, 7, 10))
    objects = scene(a, b, c)
    wave = impacts.ring(objects, 3)
    assert np.array_equal(wave, impacts.ring(objects[::-1], 3)) and not np.array_equal(wave, impacts.ring(objects, 4))
    assert wave.shape == (20480,) and wave.dtype == np.float32 and 0.1 < np.abs(wave).max() < 1
    assert impacts.read(wave) == [a, b, c]
    with pytest.raises(ValueError, match="3 objects at most"):
        impacts.ring(objects + objects)


def test_every_class_is_read_back_wherever_it_is():
    rng = np.random.default_rng(0)
    for seed in range(40):
        classes = [impacts.CLASSES[k] for k in rng.integers(12, size=rng.integers(1, 4))]
        assert impacts.read(impacts.ring(scene(*classes), seed)) == classes
    assert impacts.read(np.zeros(impacts.LENGTH)) == []


def test_log_mel_of_a_tone_is_loudest_in_its_band():
    time = np.arange(6400) / mel.RATE
    for hertz in (300, 1000, 4000):
        spectrum = mel.log_mel(np.sin(2 * np.pi * hertz * time))
        edges = np.linspace(mel.mel(mel.LOWEST), mel.mel(mel.HIGHEST), mel.BANDS + 2)
        nearest = np.abs(edges[1:-1] - mel.mel(hertz)).argmin()
        assert spectrum.shape == (20, mel.BANDS) and abs(spectrum[10].argmax() - nearest) <= 1
    assert np.allclose(mel.log_mel(np.zeros(640)), np.log(mel.FLOOR))
    both = np.stack([np.ones(640), np.zeros(640)])
    assert np.allclose(mel.log_mel(both)[0], mel.log_mel(both[0]))
    with pytest.raises(ValueError, match="multiple"):
        mel.log_mel(np.zeros(641))
