"""What nano4M is for, measured on validation scenes: the tasks of 4M-21's table, retrieval, guidance by several
conditions, super-resolution, and what follows of a glimpse or a changed word. capabilities.py writes it down.

Every function takes a ready.Ready and gives plain numbers by name.
"""
import math

import torch
import torch.nn.functional as F

import judge as judges
import lessons
import raycaster
import rich
import rich_report
import show_4m
import show_more
import studio
import texts
import tokenizer
from guidance import Guided
from ready import Ready, train_4m
from texts import parse_boxes, parse_desc

PICTURES = ("normal", "depth", "seg", "inst")
ROWS = ("bbox", "desc", "pose", "feat_global")
DRAWS = 10  # of an ensemble
TASK_SCENES, FINE_SCENES = 150, 50  # that numbers are taken on
LESSONS = 1000  # steps of a specialist
FINE = ("rgb", "depth", "normal", "seg")  # that the fine set has with twice as many pixels across
SPECIALIST = ("4m_finer", ("scenes64", "fine64"))  # of rgb > fine_rgb


# ------------------------------------------------------------------------------------------------------------
# What can be told of a picture

class Truth:
    """The first n validation scenes as they are, and what tasks with rgb given are measured against."""

    def __init__(self, ready, n):
        self.tokens, self.layout, self.studio = ready.tokens[:n], ready.layout, ready.show.studio
        self.told = show_more.Truth(64, n, ready.tokens[:, ready.layout.span["feat_global"]])
        self.images = {**self.told.images, "inst": rich.inst_picture(self.told.index)}

    def rows(self, m):
        return self.tokens[:, self.layout.span[m]]

    def measure(self, made):
        """made: {modality: pictures (n, 3, 64, 64) of PICTURES, token rows (n, L) of ROWS} -> {task: number}."""
        true = self.images
        described, meant = ([parse_desc(text) for text in self.studio.texts(rows)]
                            for rows in (made["desc"], self.rows("desc")))
        pose = self.told.report("pose", made["pose"], self.rows("pose"), self.studio)
        features = self.told.report("feat_global", made["feat_global"], self.rows("feat_global"), self.studio)
        return {"normal, degrees": studio.mean_angle(made["normal"], true["normal"]),
                "depth, L1": studio.standardised_l1(made["depth"], true["depth"]),
                "seg, mIoU": mean_iou(made["seg"], true["seg"]), "boxes, AP50": ap50(made["bbox"], self.rows("bbox")),
                "inst, AP": rich_report.inst(made["inst"], self.told.index)["ap"],
                "desc, F1": judges.attribute_f1(described, meant), "pose, corner": pose["corner"],
                "words by kNN, F1": features["words_f1"], "retrieval, R@1": features["recall"]}


def mean_iou(pictures, true):
    """Mean IoU of the ground and the three shapes, of seg pictures (B, 3, S, S), over all of their pixels."""
    told, meant = rich.inst_index(pictures), rich.inst_index(true)  # the same colours
    ious = []
    for label in range(-1, len(raycaster.SHAPES)):
        a, b = told == label, meant == label
        ious.append(((a & b).sum() / (a | b).sum().clamp(min=1)).item())
    return sum(ious) / len(ious)


def box_iou(a, b):
    """IoU of two boxes (xmin, ymin, xmax, ymax) of whole bins, the last ones inside."""
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) + 1 for i in (0, 1))
    both = max(0, width) * max(0, height)
    return both / (sum((c[2] - c[0] + 1) * (c[3] - c[1] + 1) for c in (a, b)) - both)


def ap50(rows, true_rows):
    """Average precision of boxes that are all as sure, precision x recall, right with their shape and an IoU of 1/2."""
    right = told = meant = 0
    for row, true_row in zip(rows.tolist(), true_rows.tolist()):
        boxes, left = parse_boxes(row), parse_boxes(true_row)
        told, meant = told + len(boxes), meant + len(left)
        for box in boxes:
            best = max(left, key=lambda other: (other[4] == box[4], box_iou(box, other)), default=None)
            if best and best[4] == box[4] and box_iou(box, best) >= 0.5:
                left.remove(best)
                right += 1
    return right / max(1, told) * right / max(1, meant)


def told_of_rgb(ready, truth, steps, temperature, guidance=1.0, seed=0, models=None):
    """What the model makes of rgb: pictures of PICTURES and rows of ROWS. models: one for each in its place."""
    made, models = {}, models or {}
    for m in (*PICTURES, *ROWS):
        greedy = m in ready.layout.end
        how = ready.output(m, steps=steps, temperature=0 if greedy and seed == 0 else temperature, guidance=guidance)
        rows = ready.generate(truth.tokens, ("rgb",), [how], seed, models.get(m))[:, ready.layout.span[m]]
        made[m] = ready.show.studio.pictures(rows) if m in PICTURES else rows
    return made


def ensemble(draws):
    """One answer of several: the mean of pictures, and of rows the one that the others agree with most, token by token."""
    made = {m: torch.stack([draw[m] for draw in draws]).mean(0) for m in PICTURES}
    for m in ROWS:
        rows = torch.stack([draw[m] for draw in draws], 1)  # (n, draws, L)
        agreement = (rows[:, :, None] == rows[:, None]).float().mean((2, 3))
        made[m] = rows[torch.arange(len(rows)), agreement.argmax(1)]
    return made


def most_frequent(ready, truth):
    """The same answer to all: mean pictures, and the likeliest token of each place."""
    made = {m: truth.images[m].mean(0, keepdim=True).expand(len(truth.tokens), -1, -1, -1) for m in PICTURES}
    for m in ROWS:
        made[m] = ready.tokens[:, ready.layout.span[m]].mode(0).values.expand(len(truth.tokens), -1)
    return made


def tasks(ready, n=TASK_SCENES):
    """{row: {task: number}}: the table of 4M-21 in our world."""
    truth = Truth(ready, n)
    draws = [told_of_rgb(ready, truth, 8, 1.0, seed=1 + i) for i in range(DRAWS)]
    true = {m: ready.show.studio.pictures(truth.rows(m)) for m in PICTURES} | {m: truth.rows(m) for m in ROWS}
    rows = {"the same answer to all": most_frequent(ready, truth),
            "one step": told_of_rgb(ready, truth, 1, 0.3), "eight steps": told_of_rgb(ready, truth, 8, 0.3),
            "eight steps, guidance 2": told_of_rgb(ready, truth, 8, 0.3, guidance=2.0),
            "one draw": draws[0], "ten draws together": ensemble(draws), "bound: the true tokens": true}
    return {name: truth.measure(made) for name, made in rows.items()}


def specialists(ready, n=TASK_SCENES, steps=LESSONS):
    """The same of models of the same size that have learned one of its columns and nothing else."""
    truth, tokens = Truth(ready, n), lessons.training_tokens(ready)
    models = {m: lessons.learn(ready, lessons.fresh(ready), ((("rgb",), (m,)),), steps, tokens)
              for m in (*PICTURES, *ROWS)}
    return {"specialists, eight steps": truth.measure(told_of_rgb(ready, truth, 8, 0.3, models=models)),
            "the ready model, eight steps": truth.measure(told_of_rgb(ready, truth, 8, 0.3))}


# ------------------------------------------------------------------------------------------------------------
# Retrieval

QUERIES = ("rgb", "depth", "normal", "seg", "edge", "inst", "desc", "caption", "bbox", "polygon", "pose", "palette",
           "metadata")
ASKED, AMONG = 40, 200  # captions, and pictures that each is compared with by likelihood


def ranks(table):
    """The rank, from 0, of scene i among all in row i of a table (B, N) of how alike they are."""
    own = table.diagonal()[:, None]
    return (table > own).sum(1) + ((table == own).sum(1) - 1)  # of equals the worst


def told_ranks(rank):
    return {"R@1": (rank < 1).double().mean().item(), "R@5": (rank < 5).double().mean().item(),
            "median rank": rank.double().median().item() + 1}


def alike(ready, tokens, given, among):
    """How alike pictures' features are to those foretold from a modality of scenes: cosines (B, N).

    tokens (B, size) are those of the scenes, among (N, size) of the pictures.
    """
    coder, span = rich.feature_coder("cpu"), ready.layout.span["feat_global"]
    told = ready.generate(tokens, (given,), [ready.output("feat_global", steps=8, temperature=0)])
    told, bank = (F.normalize(coder.whole(rows[:, span].cpu()), dim=1) for rows in (told, among))
    return told @ bank.T


def retrieval(ready, n=500):
    """{query: {R@1, R@5, median rank}} of the right picture among all 2,000 by the features foretold from a modality."""
    return {m: told_ranks(ranks(alike(ready, ready.tokens[:n], m, ready.tokens))) for m in QUERIES}


def retrieval_by_likelihood(ready):
    """The same of ASKED captions among AMONG pictures: by foretold features, and by log p(caption | rgb) of each."""
    tokens, span = ready.tokens[:AMONG], ready.layout.span["caption"]
    scores = []
    for i in range(ASKED):
        pairs = tokens.clone()
        pairs[:, span] = tokens[i, span]
        scores.append(ready.likelihood(pairs, ("rgb",), "caption"))
    by_features = alike(ready, tokens[:ASKED], "caption", tokens)
    return {"by features": told_ranks(ranks(by_features)), "by likelihood": told_ranks(ranks(torch.stack(scores)))}


# ------------------------------------------------------------------------------------------------------------
# Guidance

WEIGHTS = (0.0, 0.5, 1.0, 2.0, 3.0, 5.0)


def guidance(ready, n=100):
    """{weight: {..}} of pictures drawn from the caption of one scene and the normals of the next, which contradict each
    other: what the judge sees of either, over the weight of the caption, that of the normals being 1."""
    tokens, span = ready.tokens[:n].clone(), ready.layout.span
    tokens[:, span["normal"]] = tokens[:, span["normal"]].roll(-1, 0)
    described = ready.show.described(tokens)
    found = {}
    for weight in WEIGHTS:
        guided = Guided(ready.model, ready.layout, "rgb", [(("caption",), weight), (("normal",), 1.0)])
        how = ready.output("rgb", scheme="roar", steps=16, temperature=0.5)
        drawn = ready.generate(tokens, ("caption", "normal"), [how], model=guided)
        seen = ready.show.judged(ready.show.pictures(drawn, "rgb"))
        found[weight] = {"caption": judges.caption_f1(seen, described),
                         "normals": judges.object_f1(seen, described[1:] + described[:1], ("shape",))}
    return found


# ------------------------------------------------------------------------------------------------------------
# Super-resolution

def finer(ready, n=FINE_SCENES):
    """{how: {modality: dB}} of pictures with twice as many pixels across: PSNR over that of the given tokens' enlarged."""
    tokens, true, found = ready.tokens[:n], ready.show.studio.truth(2 * ready.show.size, n), {}
    ways = {"the likeliest tokens, one step": (1, 1, 0.0), "eight steps": (1, 8, 0.3), "one draw": (1, 1, 1.0),
            "the mean of ten draws": (DRAWS, 1, 1.0)}
    for model, modalities, whose in (ready, FINE, ""), (Ready(*SPECIALIST, n), ("rgb",), ", of a specialist"):
        for m in modalities:
            made, name = {}, f"fine_{m}"
            for how, (draws, steps, temperature) in ways.items():
                output = model.output(name, steps=steps, temperature=temperature)
                drawn = [model.show.pictures(model.generate(tokens, (m,), [output], seed=i), name) for i in range(draws)]
                made[how + whose] = torch.stack(drawn).mean(0)
            made["the expected digits" + whose] = expected(model, tokens, m, name)
            made["bound: the true tokens"] = model.show.pictures(tokens, name)
            base = studio.psnr(show_more.enlarged(model.show.pictures(tokens, m)), true[m])
            for how, pictures in made.items():
                found.setdefault(how, {})[m] = studio.psnr(pictures, true[m]) - base
    return found


def expected(ready, tokens, given, asked):
    """Pictures (B, 3, S, S) of a modality of the digits of its tokens that are expected, fractions, given another one."""
    span, parts = ready.layout.span[asked], []
    places = torch.arange(ready.layout.size)[span]
    digits = tokenizer.digits_of(torch.arange(tokenizer.VOCAB), 1)
    side = math.isqrt(len(places))
    for part in tokens.split(25):
        with ready.autocast():
            known = ready.only(part, given)
            log_probs = train_4m.predict(ready.model, part.masked_fill(~known, 0), known, places.expand(len(part), -1))
        mean = log_probs[..., :tokenizer.VOCAB].exp() @ digits  # (b, places, 4)
        parts.append(ready.show.studio.coder.reconstruct(mean.mT.unflatten(2, (side, side))).clamp(0, 1))
    return torch.cat(parts)


# ------------------------------------------------------------------------------------------------------------
# Probing

LOOKS = ("color", "shape", "material")  # what descriptions say of an object beside its place


def glimpses_of(ready, tokens, described):
    """What a picture is drawn from, {name: which tokens are known (B, size)}: little things about the nearest object."""
    cell = torch.tensor([[objects[0]["y"] * 8 // 100, objects[0]["x"] * 8 // 100] for objects in described])
    row, column = torch.arange(64) // 8, torch.arange(64) % 8
    near = ((row - cell[:, :1]).abs() <= 1) & ((column - cell[:, 1:]).abs() <= 1)

    def known(m, places):
        mask = torch.zeros_like(tokens, dtype=torch.bool)
        mask[:, ready.layout.span[m]] = places
        return mask

    return {"its colour": known("desc", torch.arange(16) == 3), "its place": known("desc", torch.arange(16) == 1),
            "its box": known("bbox", torch.arange(16) < 5), "9 tokens of rgb around it": known("rgb", near),
            "the half of rgb with it": known("rgb", (column < 4) == (cell[:, 1:] < 4)), "all of rgb": known("rgb", True)}


def nearest_found(seen, described):
    """Share of scenes in whose picture something has the nearest object's colour, shape, material, place."""
    shares = {key: sum(any(o[key] == objects[0][key] for o in told) for told, objects in zip(seen, described))
              for key in LOOKS}
    shares["place"] = sum(any(judges.matched(told, objects[:1])) for told, objects in zip(seen, described))
    return {key: count / len(described) for key, count in shares.items()}


def probing(ready, n=200):
    """{what is given: {attribute: share}} of the nearest object, which pictures drawn from it show."""
    tokens = ready.tokens[:n]
    described = ready.show.described(tokens)
    seen = ready.show.judged(ready.show.pictures(tokens.roll(1, 0), "rgb"))
    found = {"nothing: another scene": nearest_found(seen, described)}
    for name, known in glimpses_of(ready, tokens, described).items():
        drawn = ready.generate(tokens, known, [ready.show.drawing])
        found[name] = nearest_found(ready.show.judged(ready.show.pictures(drawn, "rgb")), described)
    return found


def changed(objects, key):
    """The objects with one attribute of the first of them another one, the next of its words."""
    words = texts.WORDS[key]
    value = words[(words.index(objects[0][key]) + 1) % len(words)]
    return [{**objects[0], key: value}, *objects[1:]]


def with_desc(ready, tokens, described):
    """Tokens (B, size) with the descriptions of other objects, lists of dicts."""
    tokens, encoding = tokens.clone(), tokenizer.load_text()
    tokens[:, ready.layout.span["desc"]] = torch.tensor([
        tokenizer.text_tokens(encoding, texts.describe(objects), texts.LENGTHS["desc"]) for objects in described])
    return tokens


def edits(ready, n=200):
    """{attribute: {..}} of pictures drawn from descriptions of which one attribute of the nearest object was changed:
    how many follow, and how many of the attributes of all objects that were not changed stay."""
    tokens, found = ready.tokens[:n], {}
    described = ready.show.described(tokens)
    for key in LOOKS:
        asked = [changed(objects, key) for objects in described]
        rows = ready.generate(with_desc(ready, tokens, asked), ("desc",), [ready.show.drawing])
        follows = stays = count = 0
        for told, meant in zip(ready.show.judged(ready.show.pictures(rows, "rgb")), asked):
            for saw, wanted in judges.matched(told, meant):
                is_changed = wanted is meant[0]
                follows += is_changed and saw[key] == wanted[key]
                stays += sum(saw[k] == wanted[k] for k in LOOKS if not (is_changed and k == key))
            count += len(LOOKS) * len(meant) - 1
        found[key] = {"follows": follows / n, "stays": stays / count}
    return found
