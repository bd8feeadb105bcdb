"""pocketsphinx, a recogniser of English that knows of ours how captions are built and nothing else.

    python tests/pocket.py [60]       # the share of words that it and data/recogniser.py hear wrong, of so many
                                      # validation captions; and how many impacts impacts.read does
"""
import re
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))
from texts import edits  # noqa: E402

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
    """A pocketsphinx.Decoder of captions. Raises ImportError where there is none."""
    import pocketsphinx
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


def main(count=60):
    import codec
    import impacts
    import recogniser as own
    import scenes
    import speech
    with np.load(codec.FROZEN / "audio64.npz") as arrays:
        captions = bytes(arrays["caption_text"]).decode().split("\n")[:count]
        codes, sounds = torch.from_numpy(arrays["scene"][:count]).long(), arrays["sound"][:count]
    decoder, listener, model = recogniser(), own.load(), codec.load()
    told = [speech.words_of(text) for text in captions]
    forms = {"normal speed": lambda i, text: speech.say(text, i % 3, [i]),
             "as fast as fits 96 tokens": lambda i, text: codec.speak(text, i % 3, [i]),
             "the same from its tokens": lambda i, text: model.sound(model.tokens(codec.speak(text, i % 3, [i])))}
    for name, say in forms.items():
        waves, words = [say(i, text) for i, text in enumerate(captions)], sum(map(len, told))
        cells = []
        for listen in (lambda wave: hear(decoder, wave)), listener.hear:
            wrong = sum(edits(listen(wave), row) for wave, row in zip(waves, told))
            cells.append(f"{wrong} of {words:,}, {100 * wrong / words:.2f} %")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    told = [[(o["shape"], o["material"], o["size"]) for o in sorted(objects, key=lambda o: o["x"])]
            for objects in scenes.facts(scenes.build(codes), scenes.NO_INDEX.expand(count, 1, 1))]
    wrong = sum(edits(impacts.read(model.sound(ids)), row) for ids, row in zip(sounds, told))
    print(f"impacts.read hears {wrong} of {sum(map(len, told))} impacts of these scenes wrong from their tokens")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
