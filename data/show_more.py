"""How well a nano4M tells and draws the modalities that sets have beside the scenes' eight: those of the rich set, of
which rgb is given, and what is heard."""
import re
from collections import Counter

import torch
import torch.nn.functional as F

import codec
import impacts
import judge as judges
import raycaster
import recogniser
import rich
import rich_report
import texts
import world
from rich import DRAWN
from texts import edits

RICH = (*DRAWN, "pose")
CODED = ("inst", "feat", "feat_global")  # of which any place may come first
SCENES = 250  # that each number is of at most
CAREFUL = {"steps": 8, "temperature": 0.3}  # how what has one right answer is filled in
LISTENING = {"steps": 16, "temperature": 0.3}
SPOKEN = 100  # sounds that are made of tokens and listened to
NAMED = re.compile("({}) ({}) ({})".format(*("|".join(texts.WORDS[k]) for k in ("color", "material", "shape"))))


class Truth:
    """What is known of the first n validation scenes of so many pixels across, beside their tokens.

    features: the tokens (N, 8) of all validation scenes' feat_global, among which a scene's is looked for.
    """

    @torch.autocast("cpu", enabled=False)  # whatever the precision of the model
    def __init__(self, size, n, features):
        scenes, everything = world.load_frozen_scenes(size, n), world.load_frozen_scenes(size, len(features))
        self.images, self.index = raycaster.render(scenes, size, compile=False)
        coder = rich.feature_coder("cpu")
        self.cells = coder.see(F.adaptive_avg_pool2d(self.images["rgb"], judges.SIDE))[0]
        self.bank = coder.whole(features.cpu()), rich_report.words_of(everything)
        self.exact = {name: part.double() if part.is_floating_point() else part for name, part in scenes.items()}
        self.values = rich.metadata_of(scenes, self.images["rgb"], self.index)

    def report(self, modality, rows, true_rows, studio):
        """{what: value} of a modality's rows (n, L), as a model tells them."""
        if modality == "inst":
            return rich_report.inst(studio.pictures(rows), self.index)
        rows, true_rows = rows.cpu().numpy(), true_rows.cpu().numpy()
        if modality == "feat_global":
            return rich_report.feat_global(rows, *self.bank)
        truth = {"feat": self.cells, "polygon": self.index, "pose": self.exact, "palette": true_rows,
                 "metadata": self.values}[modality]
        return getattr(rich_report, modality)(rows, truth)


def measure(show, model):
    """Numbers of the modalities that the set has beside the eight: {name: value}. show: a show_4m.Show."""
    names, numbers = show.layout.names, {}
    if "inst" in names:
        numbers |= seen(show, model)
    if "sound" in names:
        numbers |= heard(show, model)
    return numbers


def seen(show, model):
    """What it tells of the rich set's modalities, rgb given, and what the judge sees in pictures drawn from poses."""
    tokens, Output = show.tokens[:min(SCENES, show.quality_scenes)], show.script.Output
    show.bar.total += len(RICH) + 1
    features = show.tokens[:, show.layout.span["feat_global"]]
    truth, known, numbers = Truth(show.size, len(tokens), features), show.only(tokens, "rgb"), {}
    for m in RICH:
        how = Output(m, **CAREFUL) if m in CODED else Output(m, temperature=0)
        span = show.layout.span[m]
        told = show.generate(model, tokens, known, [how])[:, span]
        report = truth.report(m, told, tokens[:, span], show.studio)
        if m == "metadata":
            report = {"accuracy": sum(report.values()) / len(report)}
        numbers |= {f"{m}_{what}": value for what, value in report.items()}
    drawn = show.pictures(show.generate(model, tokens, show.only(tokens, "pose"), [show.drawing]), "rgb")
    return numbers | {"rgb_from_pose_f1": judges.object_f1(show.judged(drawn), show.described(tokens))}


# ------------------------------------------------------------------------------------------------------------
# Sound

def words(text):
    return re.findall("[a-z]+", text.lower())


def word_errors(heard, told):
    """Share of the words told, lists per text, that another list has wrong: insertions, omissions and others."""
    return sum(map(edits, heard, told)) / max(1, sum(map(len, told)))


def named_f1(heard, objects):
    """F1 of the objects that lists of words name, `a small red metal cube`, by colour, material and shape."""
    named = [Counter(NAMED.findall(" ".join(row))) for row in heard]
    meant = [Counter((o["color"], o["material"], o["shape"]) for o in some) for some in objects]
    right = sum((a & b).total() for a, b in zip(named, meant))
    return 2 * right / max(1, sum(counts.total() for counts in (*named, *meant)))


def in_turn(objects):
    """What can be heard of a described scene's objects, which are struck from left to right."""
    return [(o["shape"], o["material"]) for o in sorted(objects, key=lambda o: o["x"])]


def share_right(told, meant):
    """Share of what is in lists that others have in the same place."""
    right = sum(a == b for pair in zip(told, meant) for a, b in zip(*pair))
    return right / max(1, sum(map(len, meant)))


def heard(show, model):
    """What it understands of speech and says of captions and pictures, what it takes an impact for, and the impacts that
    it foretells of a picture."""
    tokens, Output, span = show.tokens[:min(SCENES, show.quality_scenes)], show.script.Output, show.layout.span
    show.bar.total += 7
    listened = [Output(m, temperature=0) for m in ("caption", "timing", "voice")]
    understood = show.generate(model, tokens, show.only(tokens, "speech"), listened)
    named = show.generate(model, tokens, show.only(tokens, "sound"), [Output("desc", temperature=0)])
    struck = show.generate(model, tokens, show.only(tokens, "rgb"), [Output("sound", **LISTENING)])[:, span["sound"]]
    drawn = show.pictures(show.generate(model, tokens, show.only(tokens, "speech"), [show.drawing]), "rgb")
    coder, listener = codec.load(), recogniser.load()
    speak, spoken = [Output("timing", temperature=0), Output("voice"), Output("speech", **LISTENING)], {}
    for name, given, chain in (("caption", ["caption"], speak), ("timing", ["caption", "timing", "voice"], speak[2:]),
                               ("rgb", ["rgb"], [Output("caption", temperature=0), *speak])):
        rows = show.generate(model, tokens[:SPOKEN], show.only(tokens[:SPOKEN], *given), chain)[:, span["speech"]]
        spoken[name] = [listener.hear(coder.sound(row)) for row in rows.cpu()]
    rung, true = ([impacts.read(coder.sound(row)) for row in rows.cpu()] for rows in (struck, tokens[:, span["sound"]]))
    written, told = ([words(text) for text in show.texts(part, "caption")] for part in (understood, tokens))
    objects = show.described(tokens)
    return {"caption_from_speech_word_errors": word_errors(written, told),
            **{f"speech_from_{name}_word_errors": word_errors(spoken[name], told[:SPOKEN])
               for name in ("caption", "timing")},
            "voice_from_speech": (understood == tokens)[:, span["voice"]].double().mean().item(),
            "speech_from_rgb_f1": named_f1(spoken["rgb"], objects[:SPOKEN]),
            "desc_from_sound_impacts": share_right(map(in_turn, show.described(named)), list(map(in_turn, objects))),
            "sound_from_rgb_impacts": share_right(rung, true),
            "rgb_from_speech_f1": judges.caption_f1(show.judged(drawn), objects)}
