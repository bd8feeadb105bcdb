"""Pictures and sounds of the ready nano4Ms, of validation scenes: docs/gallery/ and the page docs/gallery/index.html.

    python data/gallery.py               # draw everything anew, a minute of one core
    python data/gallery.py --page        # the page alone, from what is there and docs/capabilities.json
"""
import argparse
import html
import json
import re
import sys

import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors import safe_open

import abilities
import capabilities
import codec
import draw
import previews
import search
import show_more
import wav
from guidance import Guided
from hub import sentences
from ready import Ready
from shards import FROZEN, ROOT

sys.path.append(str(ROOT.parent / "docs"))
from page import head, picture  # noqa: E402  what both pages have

FOLDER = ROOT.parent / "docs" / "gallery"
SCENES = (3, 11, 4, 25, 8)  # validation scenes that are shown
GIVEN = ("desc", "caption", "pose", "normal", "depth", "seg", "inst", "edge", "palette", "feat_global")
TOLD = ("desc", "caption", "pose")  # of them those that tell colours and places
STEPS = (1, 2, 4, 8, 16, 32)
SPOKEN = (0, 3, 11, 4)
VOICES = ("110 Hz", "180 Hz", "90 Hz")


def drawn(ready, tokens, given, steps=16, temperature=0.5, model=None, first=()):
    """Pictures (B, 3, 64, 64) of rgb, from the modalities given. first: outputs that come before."""
    how = ready.output("rgb", scheme="roar", steps=steps, temperature=temperature)
    return ready.show.pictures(ready.generate(tokens, given, [*first, how], model=model), "rgb")


# ------------------------------------------------------------------------------------------------------------
# Pictures

def any_to_rgb(ready, tokens):
    """A sheet: what is drawn of every modality alone, of what tells no colours over a description of them."""
    rows = [[(some, "the scene") for some in ready.show.pictures(tokens, "rgb")]]
    for m in GIVEN:
        first, label = ([], f"of {m}") if m in TOLD else ([ready.output("desc", temperature=0.7)], f"{m} > desc")
        rows.append([(some, label) for some in drawn(ready, tokens, (m,), first=first)])
    draw.sheet(rows, FOLDER / "any_to_rgb.png", 112)


def told_of_rgb(ready, tokens, codes):
    """A sheet of the rich set's modalities as the model tells them, rgb given."""
    arrays = {"scene": codes}
    for m in ("inst", "polygon", "pose", "palette", "metadata"):
        how = ready.output(m, steps=8, temperature=0 if m in ready.layout.end else 0.3)
        arrays[m] = ready.generate(tokens, ("rgb",), [how])[:, ready.layout.span[m]].numpy()
    previews.draw_rich(arrays, ready.show.studio.coder, FOLDER / "told_of_rgb.png")


def edits(ready, tokens):
    """A sheet: one attribute of the nearest object changed."""
    described, rows = ready.show.described(tokens), []
    asked = {"as described": described}
    for key in abilities.LOOKS:
        asked[key] = [abilities.changed(objects, key) for objects in described]
    made = {key: drawn(ready, abilities.with_desc(ready, tokens, objects), ("desc",)) for key, objects in asked.items()}
    for b in range(len(tokens)):
        cells = []
        for key, pictures in made.items():
            first = asked[key][b][0]
            cells.append((pictures[b], key if key == "as described" else f"{key}: {first[key]}"))
        o = described[b][0]
        rows.append([*cells, f"{o['color']} {o['material']} {o['shape']} at x={o['x']} y={o['y']}"])
    draw.sheet(rows, FOLDER / "edits.png", 112)


def retrieved(ready, tokens):
    """A sheet: the five pictures of all 2,000 whose features are nearest to what captions foretell."""
    order = abilities.alike(ready, tokens, "caption", ready.tokens).argsort(1, descending=True)[:, :5]
    rows = []
    for text, scene, best in zip(ready.show.texts(tokens, "caption"), SCENES, order):
        pictures = ready.show.pictures(ready.tokens[best], "rgb")
        rows.append([text, *zip(pictures, ["this one" if index == scene else "" for index in best.tolist()])])
    draw.sheet(rows, FOLDER / "retrieved.png", 112)


def finer(ready, specialist, tokens):
    """A sheet: pictures enlarged, drawn with twice as many pixels across from the same tokens, and rendered there; and the
    like of pictures that were drawn from captions."""
    true, rows = ready.show.studio.truth(2 * ready.show.size, max(SCENES) + 1), []
    drawing = [ready.show.drawing, ready.output("normal", temperature=0.3)]
    for given, first in (("rgb", "normal"), []), (("caption",), drawing):
        made = ready.generate(tokens, given, first)
        shown = {m: ready.show.pictures(made, m) for m in ("rgb", "normal")}
        shown |= {f"fine_{m}": abilities.expected(model, made, m, f"fine_{m}")
                  for m, model in (("rgb", specialist), ("normal", ready))}
        for b, text in enumerate(ready.show.texts(tokens, "caption")):
            cells = []
            for m in ("rgb", "normal"):
                cells += [(show_more.enlarged(shown[m][b:b + 1])[0], f"{m}, enlarged"), (shown[f"fine_{m}"][b], f"fine_{m}")]
                cells += [] if first else [(true[m][SCENES[b]], "rendered")]
            rows.append([*cells, "of the caption:\n" + text] if first else cells)
    draw.sheet(rows, FOLDER / "finer.png", 192)


class Recorder:
    """A model that keeps what was known each time that it was asked."""

    def __init__(self, model, layout):
        self.model, self.layout, self.frames = model, layout, []

    def __call__(self, tokens, enc_pos, visible, dec_pos, counted=None):
        known = torch.zeros_like(tokens, dtype=torch.bool).scatter(1, enc_pos, visible)
        self.frames.append((tokens.clone(), known))
        return self.model(tokens, enc_pos, visible, dec_pos, counted)


def decoding(ready, tokens):
    """A GIF of pictures as their tokens are filled in, from descriptions; what is not known yet is grey."""
    span, recorder = ready.layout.span["rgb"], Recorder(ready.model, ready.layout)
    how = ready.output("rgb", scheme="roar", steps=16, temperature=0.5)
    done = ready.generate(tokens, ("desc",), [how], model=recorder)
    frames = []
    for row, known in [*recorder.frames, (done, torch.ones_like(done, dtype=torch.bool))]:
        cover = known[:, span].view(-1, 1, 8, 8).float().repeat_interleave(8, 2).repeat_interleave(8, 3)
        frames.append(ready.show.pictures(row, "rgb") * cover + 0.5 * (1 - cover))
    draw.animation(frames, FOLDER / "decoding.gif", columns=len(tokens))


def sliders(ready, tokens):
    """Strips over the number of steps, and over the weight of a caption against the normals of another scene."""
    by_steps = [drawn(ready, tokens[:3], ("caption",), steps, temperature=0.7) for steps in STEPS]
    mixed, span = tokens[:3].clone(), ready.layout.span["normal"]
    mixed[:, span] = tokens[[3, 4, 0], span]
    by_weight = []
    for weight in abilities.WEIGHTS:
        guided = Guided(ready.model, ready.layout, "rgb", [(("caption",), weight), (("normal",), 1.0)])
        by_weight.append(drawn(ready, mixed, ("caption", "normal"), model=guided))
    for name, pictures in ("steps", by_steps), ("weight", by_weight):
        for b, some in enumerate(zip(*pictures)):
            draw.strip(some, FOLDER / f"{name}_{b}.png")


def curves(found):
    """A plot of search: F1 against the number of draws, for each verifier."""
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    ax = figure.subplots()
    labels = {"cycle": "log p(desc | rgb) chooses, the judge tells", "judge": "the judge chooses, the model tells",
              "oracle": "the judge does both"}
    for color, (name, label) in zip(("#4c72b0", "#dd8452", "#55a868"), labels.items()):
        for line, steps in ("-", "1 step"), ("--", "4 steps"):
            row = found["search"][f"{name}, {steps}"]
            ax.plot([int(n) for n in row], list(row.values()), line, color=color, marker="o", label=f"{label}, {steps}")
    ax.set(xscale="log", xticks=search.COUNTS, xticklabels=search.COUNTS, xlabel="draws", ylabel="object F1")
    ax.minorticks_off()
    ax.legend(fontsize=7)
    draw.write(FOLDER / "search.png", figure.savefig, format="png", dpi=130)


# ------------------------------------------------------------------------------------------------------------
# Sounds

def sounds(ready):
    """WAV files of captions read aloud and of impacts foretold of pictures; captions.json says of what."""
    coder, Output, span, told = codec.load(), ready.output, ready.layout.span, []
    tokens = ready.tokens[list(SPOKEN)]
    speak = [Output("timing", temperature=0), Output("voice"), Output("speech", **show_more.LISTENING)]
    read = ready.generate(tokens, ("caption",), speak)
    struck = ready.generate(tokens, ("rgb",), [Output("sound", **show_more.LISTENING)])
    for i in range(len(SPOKEN)):
        for name, rows, m in (("read", read, "speech"), ("struck", struck, "sound"), ("true_struck", tokens, "sound")):
            wav.write(FOLDER / f"{name}_{i}.wav", coder.sound(rows[i, span[m]]))
        told.append({"caption": ready.show.texts(tokens[i:i + 1], "caption")[0],
                     "voice": VOICES[int(read[i, span["voice"]])]})
        draw.sheet([[ready.show.pictures(tokens[i:i + 1], "rgb")[0]]], FOLDER / f"heard_{i}.png", 112)
    (FOLDER / "captions.json").write_text(json.dumps(told, indent=1) + "\n")


# ------------------------------------------------------------------------------------------------------------
# The page

PAGE = """<h1>Any modality from any other</h1>
<p class="lead">What three small nano4Ms of {parameters} million parameters, trained for {minutes} minutes on one core of a CPU, make of
scenes that they have never seen. One knows pictures, geometry, outlines, poses, palettes and features, one speech and
sounds, which then learned to hear for some more, and one more pixels.</p>
<nav><a href="../index.html">Leaderboard</a> <a href="../CAPABILITIES.md">Every number</a>
<a href="../RICH.md">The modalities</a> <a href="../SOUND.md">The sounds</a></nav>
{sections}
<script src="sliders.js"></script>
<footer class="quiet"><p>Made by <code>python data/gallery.py</code> from the ready weights; numbers are those of
<a href="../capabilities.json">capabilities.json</a>.</p></footer>
</body>
</html>
"""


def figure(name, alt, caption):
    return picture(FOLDER / name, name, alt, caption)


def slider(name, values, start, what, caption):
    strips = "".join(f'<div class="strip"><img src="{name}_{b}.png" alt="{html.escape(what)}" height="128" '
                     f'width="{128 * len(values)}"></div>' for b in range(3))
    numbers = " ".join(f"{value:g}" for value in values)
    return (f'<figure><div class="strips">{strips}</div><label>{what}: <output>{values[start]:g}</output><br>'
            f'<input type="range" min="0" max="{len(values) - 1}" value="{start}" data-values="{numbers}"></label>'
            f'<figcaption>{caption}</figcaption></figure>')


def heard(told):
    parts = []
    for i, about in enumerate(told):
        players = [(f"The caption, by the voice of {about['voice']}: {about['caption']}", f"read_{i}.wav"),
                   ("Its objects struck, as foretold of the picture", f"struck_{i}.wav"),
                   ("and as they are", f"true_struck_{i}.wav")]
        rows = "".join(f'{html.escape(text)}<audio controls preload="none" src="{name}"></audio>' for text, name in players)
        parts.append(f'<div class="heard"><img src="heard_{i}.png" alt="a scene"><div class="quiet">{rows}</div></div>')
    return "\n".join(parts)


def parameters(name):
    with safe_open(FROZEN / f"{name}.safetensors", "pt") as file:
        return sum(file.get_tensor(key).numel() for key in file.keys())


def seconds(name):
    """How long a ready model was trained, by its log."""
    return float(re.findall(r"(?m)^train_seconds: (.+)$", (FOLDER.parent / f"{name}.log").read_text())[-1])


def listed(words):
    *most, last = words
    return f"{', '.join(most)} and {last}"


def page(found):
    """The page as text. found: what capabilities.json holds."""
    def number(section, row, column="model"):
        return f"{found[section][row][column]:.3g}"
    tasks, draws = found["tasks"]["eight steps"], found["search"]["cycle, 1 step"]
    more = [draws[str(count)] for count in search.COUNTS[1:]]
    sections = [
        "<h2>A picture from anything</h2>",
        figure("any_to_rgb.png", "scenes drawn from each modality alone", f"""Each row is drawn from one modality alone: the
first is the scene itself. What tells no colours or no places becomes a description first, and this a picture: the less
a modality says, and the fewer of the training steps were about it, the less of the scene comes back. Of descriptions
the judge reads {number("rich", "rgb_from_desc_f1")} of the objects right (F1), of captions {number("rich", "rgb_from_caption_f1")}, of poses {number("rich", "rgb_from_pose_f1")}."""),
        figure("decoding.gif", "tokens of pictures filled in", "Pictures from descriptions, 64 tokens in 16 steps."),
        "<h2>Anything from a picture</h2>",
        figure("told_of_rgb.png", "instances, outlines, poses, palettes and metadata as told", f"""What is told of a picture:
instances, outlines, poses with a box around each object, colours, numbers. Normals are off by
{tasks["normal, degrees"]:.3g} degrees, corners by {tasks["pose, corner"]:.2g} (a cube is 2.0 or 2.6 across)."""),
        "<h2>Twice as many pixels across</h2>",
        figure("finer.png", "pictures enlarged, drawn finer and rendered", f"""From the tokens of 64 pixels those of 128, decoded
from the digits that a model expects: a specialist's rgb gains
{number("finer", "the expected digits, of a specialist", "rgb")} dB over the same picture enlarged (that of the model of all
modalities {number("finer", "the expected digits", "rgb")}, the true tokens {number("finer", "bound: the true tokens", "rgb")}), normals
{number("finer", "the expected digits", "normal")} ({number("finer", "bound: the true tokens", "normal")}). Below, pictures
that were themselves drawn, from captions."""),
        "<h2>One word changed</h2>",
        figure("edits.png", "pictures with one attribute changed", f"""The nearest object's colour, shape or material is
another one: {number("edits", "color", "follows")} of the pictures follow in colour,
{number("edits", "shape", "follows")} in shape, {number("edits", "material", "follows")} in material."""),
        "<h2>More steps, more guidance</h2>",
        slider("steps", STEPS, 4, "Steps", "Captions become pictures in so many steps: in one, all places are drawn at once "
               "and do not know of each other."),
        slider("weight", abilities.WEIGHTS, 2, "Weight of the caption", "A caption and the normals of another scene, which "
               "contradict each other: at 0 the geometry alone decides."),
        "<h2>Search</h2>",
        figure("search.png", "F1 against the number of draws", f"""Pictures from descriptions in a single hasty step, the best of
several by what the model itself thinks of them: {draws["1"]:.3f} with one, {min(more):.3f} to {max(more):.3f} with 2 to 16."""),
        "<h2>Retrieval</h2>",
        figure("retrieved.png", "captions and the nearest pictures", f"""A caption becomes eight tokens of features, and these
find pictures: the right one of 2,000 comes first for {number("retrieval", "caption", "R@1")} of captions and
{number("retrieval", "desc", "R@1")} of descriptions."""),
        "<h2>Speech and sounds</h2>",
        f"""<p>Of the words of captions read aloud, a recogniser hears {number("audio", "speech_from_caption_word_errors")} wrong,
of those of the true tokens {number("audio", "speech_from_caption_word_errors", "bound")}. Listening to the voices, the model
gets {number("audio", "caption_from_speech_word_errors")} of the words wrong.</p>""",
        heard(json.loads((FOLDER / "captions.json").read_text()))]
    names = [weights for weights, _ in list(capabilities.MODELS.values())[1:]]  # the first one is README's
    sizes = listed(f"{parameters(name) / 1e6:.1f}" for name in names)
    times = listed(f"{seconds(name) / 60:.0f}" for name in names)
    body = PAGE.format(sections="\n".join(sections), parameters=sizes, minutes=times)
    return head("modded-nano4M: any modality from any other", "../page.css") + body


@sentences("gallery.py")
def main(page_only):
    found = json.loads(capabilities.NUMBERS.read_text())
    FOLDER.mkdir(exist_ok=True)
    if not page_only:
        with torch.no_grad():
            ready = Ready(*capabilities.MODELS["rich"])
            tokens = ready.tokens[list(SCENES)]
            with np.load(FROZEN / "scenes64.npz") as arrays:
                codes = arrays["scene"][list(SCENES)]
            any_to_rgb(ready, tokens), told_of_rgb(ready, tokens[:4], codes[:4]), edits(ready, tokens[:4])
            retrieved(ready, tokens), decoding(ready, ready.tokens[:8]), sliders(ready, tokens)
            sounds(Ready(*capabilities.MODELS["audio"]))
            ready = Ready(*capabilities.MODELS["fine"])
            finer(ready, Ready(*abilities.SPECIALIST), ready.tokens[list(SCENES[:2])])
    curves(found)
    (FOLDER / "index.html").write_text(page(found))
    print(FOLDER / "index.html")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="the page alone")
    main(parser.parse_args().page)
