"""What the ready nano4Ms can do, measured: docs/capabilities.json and CAPABILITIES.md.

    python data/capabilities.py                     # everything, two hours of one core, of which what trains is one
    python data/capabilities.py tasks search        # these sections anew, the others as they are
"""
import argparse
import copy
import json

import torch

import abilities
import search
import shards
import transfer
from hub import sentences
from ready import Ready
from shards import ROOT

DOCS = ROOT.parent / "docs"
NUMBERS, REPORT = DOCS / "capabilities.json", DOCS / "CAPABILITIES.md"
MODELS = {"scenes": ("4m", ("scenes64",)), **{kind: (f"4m_{kind}", ("scenes64", f"{kind}64"))
                                              for kind in ("rich", "audio", "fine")}}
SCENES = 250
TAUGHT = {"specialists", "transfer", "added"}  # sections that train: they need the rich set's training scenes
LEAST = ("errors", "error", "l1", "degrees", "corner")  # names of numbers that are better when smaller


def numbers(ready):
    """{number: {answers: value}} of what a run's footer says of a model, beside answers that need none."""
    shown = copy.copy(ready.show)
    same = ready.tokens.mode(0).values
    answers = {"model": None, "the same answer to all": lambda tokens: same.expand_as(tokens),
               "another scene's": lambda tokens: tokens.roll(1, 0), "bound": lambda tokens: tokens}
    table = {}
    for name, answer in answers.items():
        if answer:
            shown.generate = lambda model, tokens, known, outputs, answer=answer: answer(tokens)
        with ready.autocast():
            quality = shown.quality(ready.model)
        for number, value in quality.items():
            table.setdefault(number.removeprefix("quality_"), {})[name] = value
    return table


SECTIONS = {  # name: (set, function, heading, what it says)
    "scenes": ("scenes", numbers, "The scenes' own modalities", f"""
What `./run.sh` writes into its footer, of {SCENES} validation scenes, by the ready model of eight modalities: pictures and
texts from rgb where the name does not say otherwise. The bound is what the true tokens would get. Names that end in
{", ".join(LEAST)} are better when smaller. The three tables below begin with the same numbers. What more modalities cost
these they tell roughly: the four models had different numbers of steps, as `docs/4m_rich.log` and its like say."""),
    "rich": ("rich", numbers, "Modalities of the rich set", """
The same of `./run.sh 4m --track=cpu-rich`. Features are compared with those that the true tokens decode to, masks of
polygons are put into the true boxes."""),
    "audio": ("audio", numbers, "Modalities of the audio set", """
The same of `./run.sh 4m --track=cpu-audio`, and of more steps for hearing, as `data/frozen/README.md` has them. Words are
counted by `data/recogniser.py`, impacts by `data/impacts.py`. A picture from speech by caption is drawn from the words
that were understood; directly, no training asked for it."""),
    "fine": ("fine", numbers, "Twice as many pixels across", """
The same of `./run.sh 4m --track=cpu-fine`: pictures of 128 pixels from the tokens of those of 64, and from caption and
rgb. PSNR in dB against what is rendered at 128; gain: over the given tokens' picture enlarged (bicubic). The last number
is of pictures whose 64 pixels were drawn too."""),
    "finer": ("fine", abilities.finer, "Twice as many pixels across, in several ways", f"""
The gain of the table above. Expected digits: the tokenizer decodes the four digits of a token that the model expects,
which are no whole numbers. A draw has to choose where edges are, and PSNR punishes each that is not the true one. The
specialist went on from the same model, 1,200 steps of 64 scenes with rgb given and nothing but fine rgb asked. All of
{abilities.FINE_SCENES} scenes."""),
    "tasks": ("rich", abilities.tasks, "What it tells of a picture", f"""
The table of 4M-21 in this world, of {abilities.TASK_SCENES} scenes: rgb is given. Boxes, description and pose are told word by
word in either number of steps. Ten draws together: the mean of pictures, and of texts and codes the one that the others
agree with most."""),
    "specialists": ("rich", abilities.specialists, "Specialists", f"""
Eight models of the same size, each trained for one column of that table and nothing else, {abilities.LESSONS:,} steps of 64
scenes; the ready model shared its steps among all of its links. They need `data/scenes64-rich64`."""),
    "transfer": ("rich", transfer.transfer, "Transfer", f"""
Tasks that no training asked for, though metadata tell the number of objects, with a linear layer on the encoder's states
of rgb: on the frozen model, with it and LoRA of rank {transfer.RANK}, with all of it trained, and from scratch.
{transfer.STEPS} steps of {transfer.BATCH} each, which meet about half of 20,000 labels, at one learning rate for each way, not
tuned. The same answer is the better one of yes and no. What is in the dark and how high surfaces are (error in world units)
is asked pixel by pixel. 24 kinds of objects, which are rare, are learned by none in so few steps. It needs
`data/scenes64-rich64`."""),
    "added": ("rich", transfer.added, "A modality added", f"""
Shadows as a picture that the ready model is taught after its training, {transfer.ADDED_STEPS} steps of 64 scenes of
{transfer.ADDED_SCENES:,}: how well it draws them, and what it has lost meanwhile of the rest, in nats a token. Alone, they
make it forget everything else and come no sooner than from scratch; in turn with the links it knows, which is as many
steps again, it keeps what it has. It needs `data/scenes64-rich64`."""),
    "retrieval": ("rich", abilities.retrieval, "Retrieval", """
The right one of 2,000 pictures, by the eight tokens of features that the model foretells from a single modality."""),
    "likelihood": ("rich", abilities.retrieval_by_likelihood, "Retrieval by likelihood", f"""
The right one of {abilities.AMONG} pictures for each of {abilities.ASKED} captions: by features foretold from the caption,
which takes a few forward passes in all, and by the mean log-probability of the caption's words, each from rgb
alone, which takes one for every pair."""),
    "guidance": ("rich", abilities.guidance, "Guidance by two conditions", """
A picture from the caption of one scene and the normals of another, which contradict each other, over the weight of the
caption, that of the normals being 1: u + sum of w (c - u). F1 of the caption's objects, and of the normals' shapes."""),
    "search": ("rich", search.best_of_many, "Search at test time", f"""
Pictures from descriptions in few steps at temperature 1, the best of 1 to 16, of {search.SCENES} scenes: an object is about a
hundredth. Cycle: the mean log-probability that the model itself gives the description's words, each from rgb alone, chooses
and the judge tells the F1. Judge: it chooses, and the model's own reading tells. Oracle: the judge does both.
A single draw in one step is nearly always right, and where it is not a likelihood does not know it: search has little
left to win here."""),
    "schedules": ("rich", search.schedules, "Order and temperature", """
Pictures from captions in 16 steps, cosine: the order of cells against how the temperature falls over the tokens."""),
    "beam": ("rich", search.beam, "A beam with look-ahead", f"""
Pictures from descriptions in one step at temperature 1. In each of {search.ROUNDS} rounds {search.WIDTH} whole ones
are drawn, the best keeps a third, then two thirds of its tokens, and the next round draws the rest again; beside it the
best of as many draws at once; of {search.BEAM_SCENES} scenes. Verifiers are those of search."""),
    "chains": ("rich", search.chains, "Chains", """
Pictures from captions, directly and over what is generated on the way."""),
    "probing": ("rich", abilities.probing, "A glimpse", """
Pictures drawn from one word, one box, one patch or half a picture: in how many there is something of the nearest object's
colour, shape and material, and something where it stands."""),
    "edits": ("rich", abilities.edits, "One word changed", """
Pictures from descriptions in which one attribute of the nearest object was changed: how often the picture follows, and
how many of all other attributes are as they were asked for."""),
}


def table(rows):
    """{row: {column: number}} as a Markdown table."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = ["| | " + " | ".join(map(str, columns)) + " |", "|---|" + "--:|" * len(columns)]
    for name, row in rows.items():
        cells = [f"{row[column]:.3g}" if column in row else "" for column in columns]
        lines.append(f"| {str(name).replace('_', ' ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(found):
    parts = ["# What nano4M can do\n\nWritten by `python data/capabilities.py` from the ready weights in `data/frozen`, on\n"
             "validation scenes that no training set of theirs shares. Numbers: `capabilities.json`; pictures and sounds:\n"
             "[gallery](gallery/index.html)."]
    for name, (_, _, heading, text) in SECTIONS.items():
        if name in found:
            parts.append(f"## {heading}\n{text}\n\n{table(found[name])}")
    return "\n\n".join(parts) + "\n"


@sentences("capabilities.py")
def main(names):
    found = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}
    if TAUGHT & set(names):
        shards.read_meta(ROOT / "-".join(MODELS["rich"][1]) / "train")  # or it is said now, not after hours
    for kind, (weights, sets) in MODELS.items():
        chosen = [name for name in names if SECTIONS[name][0] == kind]
        ready = Ready(weights, sets, SCENES) if chosen else None
        for name in chosen:
            with torch.no_grad():
                rows = SECTIONS[name][1](ready)
            # as JSON has it: names are strings
            found[name] = {str(row): {str(column): round(value, 4) for column, value in values.items()}
                           for row, values in rows.items()}
            print(f"{SECTIONS[name][2]}\n{table(found[name])}\n", flush=True)
            NUMBERS.write_text(json.dumps(found, indent=1) + "\n")
    REPORT.write_text(report(found))
    print(REPORT)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; default: all")
    chosen = parser.parse_args().sections or list(SECTIONS)
    if unknown := set(chosen) - set(SECTIONS):
        parser.error(f"there is no section {', '.join(sorted(unknown))}")
    main(chosen)
