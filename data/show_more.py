"""How well a nano4M tells and draws the modalities that sets have beside the scenes' eight: those of the rich set, of
which rgb is given, pictures with twice as many pixels across, and what is heard."""
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
import studio as metrics
import texts
import world
from rich import DRAWN
from texts import edits

RICH = (*DRAWN, "pose")
CODED = ("inst", "feat", "feat_global")  # of which any place may come first
SCENES, FINE_SCENES = 250, 100  # that each number is of at most
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
    if "fine_rgb" in names:
        numbers |= finer(show, model)
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


def finer(show, model):
    """PSNR in dB of pictures with twice as many pixels across that it makes of tokens, against what is rendered there; how
    much more that is than of the same tokens' pictures enlarged; and what the judge sees where they were drawn too."""
    tokens, Output, numbers = show.tokens[:min(FINE_SCENES, show.quality_scenes)], show.script.Output, {}
    fine = [m.removeprefix("fine_") for m in show.layout.names if m.startswith("fine_")]
    show.bar.total += len(fine) + 2
    true = show.studio.truth(2 * show.size, len(tokens))
    for name, given in (*((m, (m,)) for m in fine), ("rgb_with_caption", ("caption", "rgb"))):
        m = given[-1]
        rows = show.generate(model, tokens, show.only(tokens, *given), [Output(f"fine_{m}", **CAREFUL)])
        found = metrics.psnr(show.pictures(rows, f"fine_{m}"), true[m])
        numbers[f"fine_{name}_psnr"] = found
        numbers[f"fine_{name}_gain"] = found - metrics.psnr(enlarged(show.pictures(tokens, m)), true[m])
    chain = [show.drawing, Output("fine_rgb", **CAREFUL)]
    drawn = show.pictures(show.generate(model, tokens, show.only(tokens, "caption"), chain), "fine_rgb")
    return numbers | {"fine_rgb_from_caption_f1": judges.caption_f1(show.judged(drawn), show.described(tokens))}


def enlarged(pictures):
    """Pictures (B, 3, S, S) with twice as many pixels across, bicubic."""
    return F.interpolate(pictures, scale_factor=2, mode="bicubic").clamp(0, 1)


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
    show.bar.total += 15
    caption, timing, desc = (Output(m, temperature=0) for m in ("caption", "timing", "desc"))
    speech, sound = (Output(m, **LISTENING) for m in ("speech", "sound"))

    def made(rows, given, *outputs):  # of nothing but what is given, as links have it
        return show.generate(model, rows, show.only(rows, *given), outputs)

    understood = made(tokens, ["speech"], caption)
    voices = made(tokens, ["speech"], timing, Output("voice", temperature=0))
    named = made(tokens, ["sound"], desc)
    struck = made(tokens, ["rgb"], sound)[:, span["sound"]]
    drawn = {name: show.pictures(made(rows, [given], show.drawing), "rgb")
             for name, rows, given in (("speech", tokens, "speech"), ("speech_by_caption", understood, "caption"),
                                       ("speech_by_desc", made(tokens, ["speech"], desc), "desc"))}
    few = tokens[:SPOKEN]
    told_of_rgb = made(made(few, ["rgb"], desc), ["desc"], Output("voice"), caption)
    coder, listener, spoken = codec.load(), recogniser.load(), {}
    for name, rows in (("caption", few), ("rgb", told_of_rgb)):
        spoken[name] = made(made(rows, ["caption"], timing, Output("voice")), ["caption", "timing", "voice"], speech)
    spoken["timing"] = made(few, ["caption", "timing", "voice"], speech)
    spoken = {name: [listener.hear(coder.sound(row)) for row in rows[:, span["speech"]].cpu()]
              for name, rows in spoken.items()}
    rung, true = ([impacts.read(coder.sound(row)) for row in rows.cpu()] for rows in (struck, tokens[:, span["sound"]]))
    written, told = ([words(text) for text in show.texts(part, "caption")] for part in (understood, tokens))
    objects = show.described(tokens)
    return {"caption_from_speech_word_errors": word_errors(written, told),
            **{f"speech_from_{name}_word_errors": word_errors(spoken[name], told[:SPOKEN])
               for name in ("caption", "timing")},
            "voice_from_speech": (voices == tokens)[:, span["voice"]].double().mean().item(),
            "speech_from_rgb_f1": named_f1(spoken["rgb"], objects[:SPOKEN]),
            "desc_from_sound_impacts": share_right(map(in_turn, show.described(named)), list(map(in_turn, objects))),
            "sound_from_rgb_impacts": share_right(rung, true),
            **{f"rgb_from_{name}_f1": judges.caption_f1(show.judged(some), objects) for name, some in drawn.items()}}
