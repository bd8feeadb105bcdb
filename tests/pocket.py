"""pocketsphinx, a recogniser of English that knows of ours how captions are built and nothing else."""
import re

import numpy as np
import pytest

GRAMMAR = """#JSGF V1.0; grammar caption;
<noun> = a (small | large) (gray | red | blue | green | brown | purple | cyan | yellow) (rubber | metal)
    (cube | sphere | cylinder);
<side> = left | middle | right;
<place> = at the (back | front) <side> | in the middle | on the (left | right);
<placed> = <noun> <place> [<noun> <place>] [and <noun> <place>];
<turned> = <place> <noun> [<place> <noun>] [and <place> <noun>];
<start> = there is | a picture of | (one object | two objects | three objects) on the floor;
public <caption> = [<start>] <placed> | <turned>;
"""


def recogniser():
    """A pocketsphinx.Decoder of captions; the test is skipped where it is not installed."""
    pocketsphinx = pytest.importorskip("pocketsphinx")
    model = pocketsphinx.get_model_path() + "/en-us/"
    decoder = pocketsphinx.Decoder(hmm=model + "en-us", dict=model + "cmudict-en-us.dict", lm=None, loglevel="FATAL",
                                   beam=1e-80, wbeam=1e-60, pbeam=1e-80)
    decoder.add_jsgf_string("captions", GRAMMAR)
    decoder.activate_search("captions")
    return decoder


def hear(decoder, wave):
    """The words of a wave (n,) at 16 kHz, with the silence around it that the recogniser needs."""
    wave = np.concatenate([np.zeros(6400), wave, np.zeros(8000)])
    wave += 1e-4 * np.random.default_rng(0).standard_normal(len(wave))
    decoder.start_utt()
    decoder.process_raw((wave * 32767).clip(-32768, 32767).astype(np.int16).tobytes(), full_utt=True)
    decoder.end_utt()
    hypothesis = decoder.hyp()
    return re.findall("[a-z]+", hypothesis.hypstr) if hypothesis else []
