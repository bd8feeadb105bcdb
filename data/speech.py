"""Speech: the captions of the world read aloud by a formant synthesiser of three voices.

A word is a list of phonemes, a phoneme one to three segments with a duration, a source and the resonances of the vocal
tract. As in Klatt's synthesiser (J. Acoust. Soc. Am. 67, 971, 1980), whose tables the numbers start from, the source is
a train of pulses, which holds all harmonics of the pitch, and noise of breath under five resonances; hiss and bursts
are noise in a band of their own. Everything moves in frames of 5 ms, each a filter by FFT, overlapped and added.

    wave = speech.say("A large red metal cube on the left.", voice=0, seed=0)   # (n,) float32 at 16 kHz
"""
import re

import numpy as np

RATE = 16000  # Hz
FRAME, FFT = 80, 512  # samples of 5 ms, and of the filter's reach
VOICES = ((110, 1.0), (180, 1.14), (90, 0.94))  # pitch in Hz, resonances relative to the table's: tract lengths
UPPER = (3500, 4500)  # Hz, the fourth and fifth resonance of every sound
WIDTHS = (70, 90, 140, 250, 300)  # Hz, of the resonances
SHORTEST = 25  # ms of a segment that no speed takes away: long sounds are shortened more than short ones, as people do
LOUDNESS = 0.1  # root mean square of the loudest half of the frames

# One segment a line; a phoneme of several has a line for each. Strengths are relative to a vowel's voice.
#   phoneme, ms, strength of voice, breath, hiss, centre and width of the hiss in Hz, first three resonances in Hz
TABLE = """
    AA   115     1     0     0     0     0    730  1100  2450
    AE   115     1     0     0     0     0    670  1720  2430
    AH    75     1     0     0     0     0    620  1200  2500
    AO   115     1     0     0     0     0    570   860  2450
    AX    50     1     0     0     0     0    500  1450  2500
    EH    90     1     0     0     0     0    540  1830  2500
    ER   105     1     0     0     0     0    480  1270  1640
    IH    70     1     0     0     0     0    400  1950  2580
    IY   105     1     0     0     0     0    280  2270  3000
    UW   115     1     0     0     0     0    310   930  2250
    AY    85     1     0     0     0     0    720  1200  2500
    AY    65     1     0     0     0     0    400  2000  2600
    AW    85     1     0     0     0     0    720  1250  2500
    AW    65     1     0     0     0     0    420   950  2350
    EY    65     1     0     0     0     0    480  1900  2520
    EY    65     1     0     0     0     0    330  2200  2700
    OW    70     1     0     0     0     0    540  1050  2350
    OW    60     1     0     0     0     0    400   820  2300
    L     68   0.6     0     0     0     0    360  1000  2850
    R     60   0.6     0     0     0     0    340  1100  1450
    W     60   0.6     0     0     0     0    300   650  2200
    Y     55   0.6     0     0     0     0    270  2200  3000
    M     65  0.35     0     0     0     0    270  1100  2150
    N     60  0.35     0     0     0     0    270  1600  2600
    F     90     0     0  0.16  6500  5000    340  1100  2100
    V     55   0.4     0  0.06  6500  5000    250  1100  2100
    TH    90     0     0   0.1  7000  3000    320  1350  2600
    DH    40   0.4     0  0.03  7000  3000    280  1350  2600
    S    100     0     0   0.5  6200  1300    320  1500  2600
    Z     70   0.3     0  0.25  6200  1300    250  1500  2600
    P     60     0     0     0     0     0    300   900  2100
    P     10     0     0  0.25  1000  1200    350   900  2100
    P     30     0  0.35     0     0     0    400  1000  2200
    B     50   0.1     0     0     0     0    220   950  2150
    B     10   0.3     0  0.12  1000  1200    300  1000  2150
    T     50     0     0     0     0     0    300  1700  2650
    T     15     0     0   0.5  4600  1600    350  1700  2650
    T     30     0   0.3   0.1  4600  1600    400  1700  2650
    D     40   0.1     0     0     0     0    220  1700  2650
    D     12   0.3     0  0.25  4400  1700    300  1700  2650
    K     55     0     0     0     0     0    300  1950  2500
    K     18     0   0.1   0.4  2100   500    350  1950  2500
    K     35     0  0.35  0.06  2300   800    400  1950  2500
    G     45   0.1     0     0     0     0    220  1900  2400
    G     18   0.2     0  0.22  2000   500    280  1900  2400
    CH    50     0     0     0     0     0    300  1800  2600
    CH    65     0   0.1  0.45  3300   900    320  1850  2650
    JH    40   0.1     0     0     0     0    220  1800  2600
    JH    50  0.25     0   0.3  3300   900    280  1850  2650
    SIL   90     0     0     0     0     0    500  1500  2500
"""
PHONEMES = {}
for name, *numbers in map(str.split, TABLE.strip().splitlines()):
    PHONEMES.setdefault(name, []).append([float(number) for number in numbers])

SPELLED = """
    a AX, and AE N D, at AE T, back B AE K, blue B L UW, brown B R AW N, cube K Y UW B, cyan S AY AE N,
    cylinder S IH L AX N D ER, floor F L AO R, front F R AH N T, gray G R EY, green G R IY N, in IH N, is IH Z,
    large L AA R JH, left L EH F T, metal M EH T AX L, middle M IH D AX L, object AA B JH EH K T,
    objects AA B JH EH K T S, of AH V, on AA N, one W AH N, picture P IH K CH ER, purple P ER P AX L,
    red R EH D, right R AY T, rubber R AH B ER, small S M AO L, sphere S F IH R, the DH AX, there DH EH R,
    three TH R IY, two T UW, yellow Y EH L OW
"""
MARKS = re.compile(r"[a-z]+|[,:.]")  # of a text in lower case: each is a token of a caption
WORDS = {word: phonemes for word, *phonemes in (entry.split() for entry in SPELLED.split(","))}


def words_of(text):
    """The words of a caption in lower case. Raises ValueError for what cannot be pronounced."""
    if mark := re.search(r"[^A-Za-z\s,.:]", text):
        raise ValueError(f"{mark[0]!r} cannot be said: texts are words of captions, commas, colons and full stops")
    words = re.findall(r"[a-z]+", text.lower())
    if not words:
        raise ValueError("there is no word to say")
    if unknown := [word for word in words if word not in WORDS]:
        raise ValueError(f"there is no pronunciation of {unknown[0]!r}")
    return words


def phonemes_of(mark):
    return [] if mark == "." else WORDS.get(mark, ["SIL"])


def segments_of(text):
    """The segments (n, 9) of a text, rows of TABLE; a pause stands for a comma or colon."""
    words_of(text)
    marks = MARKS.findall(text.lower())
    return np.array([row for mark in marks for phoneme in phonemes_of(mark) for row in PHONEMES[phoneme]])


def seconds(text):
    """How long a text takes at normal speed."""
    return segments_of(text)[:, 0].sum() / 1000


def smooth(track, ms):
    """A track of frames (n, ..) blurred over so many milliseconds."""
    width = max(1, round(ms / 5))
    kernel = np.hanning(width + 2)[1:-1].astype(np.float32)
    padded = np.pad(track, [(width // 2, (width - 1) // 2)] + [(0, 0)] * (track.ndim - 1), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, width, axis=0)
    return windows @ (kernel / kernel.sum())


def ends_of(segments, speed):
    """When each segment (n, 9) ends, in ms (n,)."""
    least = np.minimum(segments[:, 0], SHORTEST)
    rest = segments[:, 0] - least
    share = (segments[:, 0].sum() / speed - least.sum()) / max(rest.sum(), 1)
    return np.cumsum(least + share * rest)


def timing(text, speed=1.0):
    """When each word, comma, colon and full stop of a text is over, in ms: a list of floats."""
    ends, place, found = ends_of(segments_of(text), speed), 0, []
    for mark in MARKS.findall(text.lower()):
        place += sum(len(PHONEMES[phoneme]) for phoneme in phonemes_of(mark))
        found.append(float(ends[place - 1]) if place else 0.0)
    return found


def frames_of(segments, speed):
    """What each frame of 5 ms sounds like, float32: strengths (n, 3) of voice, breath and hiss, centre and width (n, 2)
    of the hiss and resonances (n, 3), in Hz."""
    ends = ends_of(segments, speed)
    which = np.searchsorted(ends, 5 * np.arange(int(ends[-1] / 5)) + 2.5)
    frames = segments[which].astype(np.float32)
    return smooth(frames[:, 1:4], 15 / speed), frames[:, 4:6] + 1, smooth(frames[:, 6:9], 60 / speed)


def resonance(frequency, centres, widths):
    """Complex response (n, F) at frequencies (F,) of resonances one after another, centres (n, k), widths (k,), Hz."""
    denominator = np.ones((len(centres), len(frequency)), np.complex64)
    for centre, width in zip(centres.T[:, :, None], widths):
        real = 1 - np.square(frequency / centre)
        denominator *= (real + 1j * width * frequency / np.square(centre)).astype(np.complex64)
    return 1 / denominator


def pulses(pitch):
    """A train of pulses (n,) whose pitch (n,) in Hz may move: all harmonics below 7.6 kHz, of equal strength, in closed
    form (a Dirichlet kernel)."""
    phase = 2 * np.pi / RATE * np.cumsum(pitch, dtype=np.float64)
    count = np.floor(7600 / pitch)
    half = np.sin(phase / 2)
    peak = np.abs(half) < 1e-6  # where the quotient is 0 / 0
    kernel = np.where(peak, 2 * count + 1, np.sin((count + 0.5) * phase) / np.where(peak, 1, half))
    return (kernel - 1) * np.sqrt(0.5 / count)


def overlap_add(frames):
    """The sum (n',) of frames (n, FFT), each FRAME samples after the one before."""
    n, parts = len(frames), -(-FFT // FRAME)
    columns = np.pad(frames, ((0, 0), (0, parts * FRAME - FFT))).reshape(n, parts, FRAME)
    wave = np.zeros((n + parts, FRAME), np.float32)
    for part in range(parts):
        wave[part:part + n] += columns[:, part]
    return wave.reshape(-1)


def say(text, voice=0, seed=0, speed=1.0):
    """A text of WORDS as sound, (n,) float32 at 16 kHz within [-1, 1], by one of VOICES; the seed is of its noise.

    speed: 2 is twice as fast. Raises ValueError for what cannot be pronounced.
    """
    rng = np.random.default_rng(seed)
    pitch, tract = VOICES[voice]
    sources, bands, places = frames_of(segments_of(text), speed)
    n = len(sources)
    frequency = np.fft.rfftfreq(FFT, 1 / RATE).astype(np.float32)
    centres = np.concatenate([places, np.tile(np.float32(UPPER), (n, 1))], 1) * np.float32(tract)
    tilt = (frequency > 40) / np.sqrt(1 + np.square(frequency / 500))  # glottis and lips together: -6 dB per octave
    throat = resonance(frequency, centres, WIDTHS) * tilt
    mouth = np.exp(-0.5 * np.square((frequency - bands[:, :1]) / bands[:, 1:]))

    time = np.arange((n + 1) * FRAME, dtype=np.float32)
    melody = 1.1 - 0.25 * time / len(time) + 0.03 * np.sin(2 * np.pi * 2.7 / RATE * time)
    voiced = pulses(pitch * melody)
    breath, hiss = rng.standard_normal((2, len(time)), np.float32)
    window = np.hanning(2 * FRAME + 1)[:-1].astype(np.float32)
    rows = np.arange(n)[:, None] * FRAME + np.arange(2 * FRAME)
    source = sources[:, :1] * voiced[rows] + 0.5 * sources[:, 1:2] * breath[rows]
    spectrum = np.fft.rfft(source * window, FFT) * throat
    spectrum += np.fft.rfft(sources[:, 2:] * hiss[rows] * window, FFT) * mouth
    wave = overlap_add(np.fft.irfft(spectrum, FFT))[:n * FRAME]
    loud = np.sort(np.square(wave).reshape(n, FRAME).mean(1))[n // 2:]
    return np.clip(wave * LOUDNESS / np.sqrt(loud.mean() + 1e-12), -1, 1).astype(np.float32)
