"""The scenes world: a procedural, CLEVR-style world in which every modality is exact and aligned.

A scene is a camera, a lamp and 1-4 objects on a ground plane. data/raycaster.py renders rgb, depth, normal, seg and
edge; desc, caption and bbox are written from the scene itself, questions and answers by data/questions.py. Image-like
modalities are stored as tokens of data/tokenizer.py (with questions: as pixels), texts as tokens of its encodings.

    python data/scenes.py                            # 20,000 training scenes at 64 px -> data/scenes64/train
    python data/scenes.py --size=128 --num=200000    # the gpu track's set            -> data/scenes128/train
    python data/scenes.py --objects [--size=128]     # 20,000 with one object, labels -> data/objects64, data/scenes
    python data/scenes.py --qa                       # the first set's scenes, pixels and questions -> data/qa64
    python data/scenes.py [--objects|--qa] --preview # a contact sheet      -> samples/{scenes,objects,qa}.png
    python data/scenes.py [--objects|--qa] --frozen  # remake data/frozen/{scenes,objects,qa}<size>.npz (maintainers)
"""
import argparse
import hashlib
import json
import math
import random
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import draw
import questions
import streams
import tokenizer
from raycaster import (COLORS, HALF, MATERIALS, MAX_OBJECTS, SHAPES, SIZES, primary_rays, project, render, trace,
                       unproject)
from streams import sha256

VERSION = 1  # of everything that decides the content of a scene; raise it and every frozen number is void
ROOT = Path(__file__).resolve().parent
RADIUS = (0.72, 1.05)  # world units, of a small / large object's footprint
# Jitter, turns and places come in steps and the camera looks from afar, so that an object looks alike wherever it
# stands on the token grid, and a small model learns the world in minutes. Camera and objects turn by the same step: a
# cube then shows four different sides.
TURN = math.pi / 8  # radians
CAMERA_AZIMUTH, CAMERA_ELEVATION, CAMERA_DISTANCE = (-TURN, 0.0, TURN), (0.62,), (60.0,)
LAMP_AZIMUTH, LAMP_ELEVATION = 2.4, (0.85, 1.0)
PLACES = 8  # across the frame and down it: objects stand in the middle of one, not in those at the border
GAP = 0.5  # world units between the footprints of two objects, at least
MIN_VISIBLE = 0.012  # of the frame's pixels every described object shows at least
IMAGES = ("rgb", "depth", "normal", "seg", "edge")
BBOX_BINS = 64  # coordinate tokens per side, one set for each of xmin, ymin, xmax, ymax, as in 4M
BBOX_PAD, BBOX_EOS, BBOX_VOCAB = 0, 1, 2 + 4 * BBOX_BINS + len(SHAPES)
LENGTHS = {"desc": 24, "caption": 48, "bbox": 5 * MAX_OBJECTS + 1,  # tokens with the end token; images: (size / 8)^2
           "qa": 88}  # four of the longest questions fit
CHUNK = 1000  # scenes made between two points of resumption
CLASSES = tuple(f"{color} {shape}" for shape in SHAPES for color in COLORS)  # of the objects set: shape * 8 + color
LOOK = (len(SHAPES), len(COLORS), 2, 2, 4, 3, 2, PLACES, PLACES)  # values of what `look` counts, in its order


# ------------------------------------------------------------------------------------------------------------
# The world: sampling scenes

def sample_scenes(n, seed, device="cpu", most=MAX_OBJECTS, avoid=()):
    """n valid scenes of 1 to `most` objects as a dict of tensors, the same for the same seed.

    shape, color, material, size: (n, 4) indices, -1 where there is no object; center (n, 4, 3) and radius (n, 4) in
    world units; theta (n, 4) rotation about z in radians; camera (n, 3) azimuth, elevation and distance; lamp (n, 3),
    the direction towards it.
    Objects never interpenetrate, lie in the frame and show at least MIN_VISIBLE of it. avoid: looks to leave out.
    """
    digest = hashlib.sha256(str(seed).encode()).digest()  # torch's CPU generator reads only 32 bits of a seed
    rng, K = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little")), MAX_OBJECTS
    counts = torch.randint(1, most + 1, (n,), generator=rng)  # fixed first, so that hard layouts do not become rare
    pending, result = torch.arange(n), None
    while len(pending):
        B = 4 * len(pending)  # four attempts a scene and round
        exists = torch.arange(K) < counts[pending].repeat(4)[:, None]
        index = lambda count: torch.randint(count, (B, K), generator=rng).where(exists, torch.tensor(-1))
        s = {"shape": index(len(SHAPES)), "color": index(len(COLORS)), "material": index(len(MATERIALS)),
             "size": index(len(SIZES)), "theta": index(4).clamp(min=0) * TURN}
        s["radius"] = torch.tensor(RADIUS)[s["size"].clamp(min=0)]
        height = s["radius"] * torch.tensor(HALF)[s["shape"].clamp(min=0)]
        pick = lambda values: torch.tensor(values)[torch.randint(len(values), (B,), generator=rng)]
        s["camera"] = torch.stack([pick(CAMERA_AZIMUTH), pick(CAMERA_ELEVATION), pick(CAMERA_DISTANCE)], 1)
        s["center"], ok = place_objects(s, exists, height, rng)
        elevation = pick(LAMP_ELEVATION)
        across = [math.cos(LAMP_AZIMUTH) * elevation.cos(), math.sin(LAMP_AZIMUTH) * elevation.cos()]
        s["lamp"] = torch.stack([*across, elevation.sin()], 1)
        rows = ok.view(4, -1).float().argmax(0) * len(pending) + torch.arange(len(pending))  # the first to fit
        s = {name: value[rows] for name, value in s.items()}
        placed = {name: value.to(device) for name, value in s.items()}
        ids = trace(placed, *primary_rays(placed, 32))[1]
        share = torch.stack([(ids == k).float().mean(1) for k in range(K)], 1).cpu()
        done = ok[rows] & ((share > MIN_VISIBLE) | (s["shape"] < 0)).all(1)
        if len(avoid):
            done &= torch.from_numpy(~np.isin(look(s), avoid))
        result = result or {name: value.new_zeros(n, *value.shape[1:]) for name, value in s.items()}
        for name, value in s.items():
            result[name][pending[done]] = value[done]
        pending = pending[~done]
    return {name: value.to(device) for name, value in result.items()}


def place_objects(s, exists, height, rng, tries=16):
    """Drop the objects one after another, each at the first of some random places in the frame that is free.

    Returns centres (B, 4, 3) and whether every object found a place (B,).
    """
    B, K = exists.shape
    center, found = torch.zeros(B, K, 3), torch.ones(B, dtype=torch.bool)
    for k in range(K):
        x, y = (torch.randint(1, PLACES - 1, (2, B, tries), generator=rng) + 0.5) / PLACES
        spots = unproject(s, x, y, height[:, k, None])
        free = torch.ones(B, tries, dtype=torch.bool)
        for j in range(k):
            distance = (spots[..., :2] - center[:, j, None, :2]).norm(dim=-1)
            free &= distance > (s["radius"][:, k] + s["radius"][:, j] + GAP)[:, None]
        center[:, k] = spots[torch.arange(B), free.float().argmax(1)]
        found &= free.any(1) | ~exists[:, k]
    return center, found


def look(scenes):
    """A number a one-object scene, (n,) int32 array in the mixed base LOOK: the same for scenes that look the same.

    The world moves in steps, so there are only 41,472 such pictures, and half of the validation scenes would look like
    one of 20,000 training scenes if those did not leave them out.
    """
    x, y, _ = project(scenes)
    first = lambda values: values[:, 0]
    turn = (first(scenes["theta"]) / TURN).round() * (first(scenes["shape"]) == 0)  # round shapes have no sides
    camera = (first(scenes["camera"]) / TURN).round() + 1
    lamp = scenes["lamp"][:, 2] > math.sin(sum(LAMP_ELEVATION) / 2)
    steps = [*(first(scenes[name]) for name in ("shape", "color", "material", "size")), turn, camera, lamp,
             first(y * PLACES).floor(), first(x * PLACES).floor()]
    return np.ravel_multi_index([step.long().cpu().numpy() for step in steps], LOOK).astype(np.int32)


# ------------------------------------------------------------------------------------------------------------
# Texts and boxes

def facts(scenes, index):
    """Per scene a list of objects, nearest first: dicts of words, x, y in percent of the frame, and box in pixels."""
    x, y, z = project(scenes)
    S = index.shape[-1]
    lists = {name: scenes[name].tolist() for name in ("shape", "color", "material", "size")}
    boxes = []
    for k in range(MAX_OBJECTS):
        inside = index == k
        columns, rows = inside.any(1), inside.any(2)  # (B, S)
        first, last = lambda line: line.float().argmax(1), lambda line: S - 1 - line.flip(1).float().argmax(1)
        boxes.append(torch.stack([first(columns), first(rows), last(columns), last(rows)], 1))
    boxes, names = torch.stack(boxes, 1).tolist(), list(COLORS)
    order, px, py = z.argsort(1).tolist(), (x * 100).long().tolist(), (y * 100).long().tolist()
    return [[{"shape": SHAPES[lists["shape"][b][k]], "color": names[lists["color"][b][k]],
              "material": MATERIALS[lists["material"][b][k]], "size": SIZES[lists["size"][b][k]],
              "x": px[b][k], "y": py[b][k], "box": boxes[b][k]}
             for k in order[b] if lists["shape"][b][k] >= 0] for b in range(len(order))]


def describe(objects):
    """The course's scene description, e.g. `Object 1 - Position: x=77 y=51 Shape: cube Color: blue Material: metal.`"""
    return " ".join(f"Object {i} - Position: x={o['x']} y={o['y']} Shape: {o['shape']} Color: {o['color']} "
                    f"Material: {o['material']}." for i, o in enumerate(objects, 1))


DESC = re.compile(r"Object (\d+) - Position: x=(\d+) y=(\d+) Shape: (\w+) Color: (\w+) Material: (\w+)\.")


def parse_desc(text):
    """The objects of a description, those that are well formed: list of dicts x, y, shape, color, material."""
    return [{"x": int(x), "y": int(y), "shape": shape, "color": color, "material": material}
            for _, x, y, shape, color, material in DESC.findall(text)]


def caption(objects, rng):
    """One natural sentence that names every object and roughly where it is; rng (random.Random) picks the template."""
    def noun(o):
        return f"a {o['size']} {o['color']} {o['material']} {o['shape']}"

    def place(o):
        side = "left" if o["x"] < 40 else "right" if o["x"] > 60 else "middle"
        row = "back" if o["y"] < 42 else "front" if o["y"] > 58 else ""
        return f"at the {row} {side}" if row else f"on the {side}" if side != "middle" else "in the middle"

    join = lambda parts: parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    order = rng.sample(objects, len(objects))
    placed = [f"{noun(o)} {place(o)}" for o in order]
    number = ("one object", "two objects", "three objects", "four objects")[len(order) - 1]
    text = rng.choice((f"{join(placed)}.", f"there is {join(placed)}.", f"a picture of {join(placed)}.",
                       f"{number} on the floor: {join(placed)}.", f"{join([f'{place(o)} {noun(o)}' for o in order])}."))
    return text[0].upper() + text[1:]


def box_tokens(objects, size):
    """4M-style boxes, nearest first: xmin ymin xmax ymax class per object, then the end token, padded."""
    row = []
    for o in objects:
        row += [2 + kind * BBOX_BINS + v * BBOX_BINS // size for kind, v in enumerate(o["box"])]
        row.append(2 + 4 * BBOX_BINS + SHAPES.index(o["shape"]))
    return row + [BBOX_EOS] + [BBOX_PAD] * (LENGTHS["bbox"] - len(row) - 1)


def parse_boxes(row):
    """The boxes of a token row, those that are well formed: list of (xmin, ymin, xmax, ymax in bins, shape)."""
    row, boxes = [int(v) for v in row], []
    for i in range(0, len(row) - 4, 5):
        if row[i] <= BBOX_EOS:
            break
        kinds = [(v - 2) // BBOX_BINS for v in row[i:i + 5]]
        if kinds == [0, 1, 2, 3, 4] and row[i + 4] < BBOX_VOCAB:
            boxes.append((*((v - 2) % BBOX_BINS for v in row[i:i + 4]), SHAPES[row[i + 4] - 2 - 4 * BBOX_BINS]))
    return boxes


# ------------------------------------------------------------------------------------------------------------
# Shards

def stop(message):
    sys.exit(f"scenes.py: {message}")


def modalities(size, kind="scenes"):
    """Length, vocabulary and pad id (-1: none) of each modality of the scenes, objects or qa shards at this size."""
    image = {"length": (size // 8) ** 2, "vocab": tokenizer.VOCAB, "pad": -1}
    text = {"vocab": tokenizer.TEXT_VOCAB, "pad": tokenizer.TEXT_VOCAB - 1}
    if kind == "objects":
        return {"label": {"length": 1, "vocab": len(CLASSES), "pad": -1}, "rgb": image}
    if kind == "qa":
        return {"qa": {"length": LENGTHS["qa"], **text}}
    return {**{m: image for m in IMAGES}, "desc": {"length": LENGTHS["desc"], **text},
            "caption": {"length": LENGTHS["caption"], **text},
            "bbox": {"length": LENGTHS["bbox"], "vocab": BBOX_VOCAB, "pad": BBOX_PAD}}


def image_tokens(coder, images):
    """Tokens (n, length), uint16 array, of pictures (n, 3, size, size)."""
    return torch.cat([coder.encode(part.contiguous(memory_format=torch.channels_last)).flatten(1)
                      for part in images.split(100)]).cpu().numpy().astype(np.uint16)


def make_tokens(n, size, seed, device, coder, encoding):
    """n scenes and their tokens: (scenes, {modality: uint16 array (n, length)}, {desc, caption: list of str})."""
    scenes = sample_scenes(n, seed, device)
    images, index = render(scenes, size)
    tokens = {m: image_tokens(coder, images[m]) for m in IMAGES}
    objects, rng = facts(scenes, index), random.Random(seed)
    texts = {"desc": [describe(o) for o in objects], "caption": [caption(o, rng) for o in objects]}
    for m, lines in texts.items():
        tokens[m] = np.array([tokenizer.text_tokens(encoding, t, LENGTHS[m]) for t in lines], np.uint16)
    tokens["bbox"] = np.array([box_tokens(o, size) for o in objects], np.uint16)
    return scenes, tokens, texts


def make_objects(n, size, seed, device, coder, encoding=None, avoid=()):
    """n one-object scenes in the form of make_tokens: label and rgb tokens, look (n,), bytes of pixels at half size."""
    scenes = sample_scenes(n, seed + (1 << 31), device, 1, avoid)  # other seeds than those of the scenes set
    rgb = render(scenes, size)[0]["rgb"]
    pixels = F.avg_pool2d(rgb, 2)
    label = scenes["shape"][:, :1] * len(COLORS) + scenes["color"][:, :1]
    return scenes, {"label": label.cpu().numpy().astype(np.uint16), "rgb": image_tokens(coder, rgb),
                    "look": look(scenes), f"pixels{size // 2}": (pixels * 255).round().byte().cpu().numpy()}, {}


def make_qa(n, size, seed, device, coder, encoding):
    """n scenes in the form of make_tokens, those it makes with the same seed, and questions about them.

    pixels (n, 3, size, size) uint8; qa tokens; answer (n, length) uint8, 1 to 4 where that turn's answer is; family
    (n, 4) uint8, of questions.FAMILIES counted from 1 on, 0: no such turn.
    """
    scenes = sample_scenes(n, seed, device)
    images, index = render(scenes, size)
    dialogues = questions.ask(facts(scenes, index), random.Random(seed))
    tokens, marks = zip(*(questions.encode(encoding, turns, LENGTHS["qa"]) for turns in dialogues))
    families = [[family for family, _, _ in turns] + [0] * (questions.MOST - len(turns)) for turns in dialogues]
    return scenes, {"pixels": (images["rgb"] * 255).round().byte().cpu().numpy(), "qa": np.array(tokens, np.uint16),
                    "answer": np.array(marks, np.uint8), "family": np.array(families, np.uint8)}, {}


def maker(kind, device):
    """A function (n, size, seed) -> as make_tokens, for a kind of set."""
    make = {"scenes": make_tokens, "objects": make_objects, "qa": make_qa}[kind]
    coder = tokenizer.load_tokenizer(device)
    encoding = tokenizer.load_text(tokenizer.QA if kind == "qa" else tokenizer.TEXT)
    return lambda n, size, seed, **more: make(n, size, seed, device, coder, encoding, **more)


def make_shards(size, num, seed, device, kind="scenes"):
    """Write data/<kind><size>/train: an array of num rows a modality and meta.json. Resumes, or verifies."""
    name = f"{kind}{size}"
    out = ROOT / name / "train"
    part = out.with_name("train.part")
    identity = {"name": name, "version": VERSION, "size": size, "num": num, "seed": seed}
    identity |= ({"questions": questions.VERSION, "text": sha256(tokenizer.QA)} if kind == "qa" else
                 {"tokenizer": sha256(tokenizer.WEIGHTS), "text": sha256(tokenizer.TEXT)})
    if out.exists():
        try:
            meta = json.loads((out / "meta.json").read_text())
            if different := [key for key in identity if meta[key] != identity[key]]:
                stop(f"{out} was made with another {', '.join(different)}; delete it to make this one")
            wrong = [m for m in meta["sha256"] if sha256(out / f"{m}.npy") != meta["sha256"][m]]
        except (OSError, ValueError, KeyError) as error:
            stop(f"{out} is damaged ({error}); delete it and run this again")
        if wrong:
            stop(f"{out} is damaged ({wrong[0]}.npy is not what was written); delete it and run this again")
        print(f"{out}: {num:,} scenes, already there and verified")
        return
    kinds, state, done, more = modalities(size, kind), part / "state.json", 0, {}
    forms = {m: ((about["length"],), np.uint16) for m, about in kinds.items()}
    if kind == "objects":
        forms |= {"look": ((), np.int32), f"pixels{size // 2}": ((3, size // 2, size // 2), np.uint8)}
        more = {"avoid": look(load_frozen_scenes(size, 2000, "objects"))}
    if kind == "qa":
        forms |= {"pixels": ((3, size, size), np.uint8), "answer": ((LENGTHS["qa"],), np.uint8),
                  "family": ((questions.MOST,), np.uint8)}
    if state.exists() and json.loads(state.read_text())["identity"] == identity:
        done = json.loads(state.read_text())["done"]
        arrays = {m: np.lib.format.open_memmap(part / f"{m}.npy", "r+") for m in forms}
    else:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        arrays = {m: np.lib.format.open_memmap(part / f"{m}.npy", "w+", dtype, (num, *shape))
                  for m, (shape, dtype) in forms.items()}
    make = maker(kind, device)
    with tqdm(total=num, initial=done, unit=" scenes", desc=name) as bar:
        while done < num:
            n = min(CHUNK, num - done)
            tokens = make(n, size, (seed << 32) + done // CHUNK, **more)[1]
            for m, array in arrays.items():
                array[done:done + n] = tokens[m]
                array.flush()
            done += n
            write = state.with_suffix(".tmp")
            write.write_text(json.dumps({"identity": identity, "done": done}))
            write.replace(state)
            bar.update(n)
    hashes = {m: sha256(part / f"{m}.npy") for m in forms}
    (part / "meta.json").write_text(json.dumps({**identity, "modalities": kinds, "sha256": hashes}, indent=1))
    state.unlink()
    part.rename(out)
    print(f"{out}: {num:,} scenes")
    if kind == "qa":
        turns = questions.decode(np.load(out / "qa.npy"), np.load(out / "family.npy"))
        print("Answers guessed right without the picture, from every other question:\n"
              + questions.table(turns[::2], turns[1::2]))


def make_frozen(size, device, num=2000, seed=1 << 20, kind="scenes"):
    """Write data/frozen/<kind><size>.npz: the validation set's tokens, texts, pixels and scenes."""
    scenes, tokens, texts = maker(kind, device)(num, size, seed << 32)
    texts = {f"{m}_text": np.frombuffer("\n".join(lines).encode(), np.uint8) for m, lines in texts.items()}
    arrays = {**tokens, **texts, **{f"scene_{name}": value.cpu().numpy() for name, value in scenes.items()},
              "modalities": np.frombuffer(json.dumps(modalities(size, kind)).encode(), np.uint8)}
    path = ROOT / "frozen" / f"{kind}{size}.npz"
    np.savez_compressed(path, **arrays)
    print(f"{path}: {num:,} scenes, {path.stat().st_size / 1e6:.1f} MB")


def load_frozen_scenes(size, n, name="scenes"):
    """The first n validation scenes, as sample_scenes gives them, to render their true pictures."""
    with np.load(tokenizer.FROZEN / f"{name}{size}.npz") as arrays:
        return {key[6:]: torch.from_numpy(arrays[key][:n]) for key in arrays if key.startswith("scene_")}


def preview(path, device, columns=8):
    """A contact sheet: every modality of eight scenes, one column a scene, then three of them with their texts."""
    scenes = sample_scenes(columns, seed=7, device=device)
    images, index = render(scenes, 64)
    objects = facts(scenes, index)
    rows = [[(picture, m if column == 0 else "") for column, picture in enumerate(images[m])] for m in IMAGES]
    texts = [[images["rgb"][b], describe(objects[b]), caption(objects[b], random.Random(b))] for b in range(4)]
    draw.sheet(["Eight scenes, five image-like modalities", *rows, "rgb, desc, caption", *texts], path)
    print(path)


def preview_objects(path, device):
    """A contact sheet: two scenes of every class, and what tokens and 32 pixels keep of the first eight."""
    coder = tokenizer.load_tokenizer(device)
    scenes, arrays, _ = make_objects(600, 64, 7, device, coder)
    rows = np.stack([np.flatnonzero(arrays["label"][:, 0] == c)[:2] for c in range(len(CLASSES))], 1).flatten()
    rgb = render({name: value[torch.from_numpy(rows)] for name, value in scenes.items()})[0]["rgb"]
    cells = [(picture, f"{i % len(CLASSES)} {CLASSES[i % len(CLASSES)]}") for i, picture in enumerate(rgb)]
    decoded = coder.decode(torch.from_numpy(arrays["rgb"][rows[:8]].astype(np.int64)).view(-1, 8, 8).to(device))
    small = torch.from_numpy(arrays["pixels32"][rows[:8]]) / 255
    draw.sheet(["One object: label, colour and shape", *(cells[i:i + 8] for i in range(0, len(cells), 8)),
                "The first row from its 64 tokens", list(decoded), "and in 32 pixels", list(small)], path)
    print(path)


def preview_qa(path, device):
    """A contact sheet: pictures with their questions and answers."""
    scenes, arrays, _ = maker("qa", device)(24, 64, 7)
    cells = []
    for picture, row, families in zip(arrays["pixels"], arrays["qa"], arrays["family"]):
        turns = questions.decode([row], [families])
        cells += [torch.from_numpy(picture) / 255, "\n".join(f"{question}  {answer}" for _, question, answer in turns)]
    draw.sheet(["Questions and answers", *(cells[i:i + 6] for i in range(0, len(cells), 6))], path)
    print(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="picture width and height in pixels, a multiple of 8")
    parser.add_argument("--num", type=int, default=20000, help="training scenes")
    parser.add_argument("--seed", type=int, default=1, help="of the training scenes; validation has its own")
    kinds = parser.add_mutually_exclusive_group()
    for option, about in (("objects", "scenes with one object and its class, 64 px"), ("qa", "scenes with questions")):
        kinds.add_argument(f"--{option}", dest="kind", action="store_const", const=option, default="scenes", help=about)
    parser.add_argument("--preview", action="store_true", help="draw a contact sheet instead")
    parser.add_argument("--frozen", action="store_true", help="remake the frozen validation set instead")
    arguments = parser.parse_args()
    kind, size = arguments.kind, arguments.size
    fits = size in (64, 128) if kind == "objects" else size >= 16 and size % 8 == 0
    if not fits or arguments.num < 1 or not 0 <= arguments.seed < 1 << 20:
        stop("--size must be a multiple of 8 from 16 up (--objects: 64, 128), --num at least 1, --seed 0 to 2^20 - 1")
    chosen = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if arguments.preview:
            drawn = {"scenes": preview, "objects": preview_objects, "qa": preview_qa}[kind]
            drawn(ROOT.parent / "samples" / f"{kind}.png", chosen)
        elif arguments.frozen:
            make_frozen(size, chosen, kind=kind)
        else:
            make_shards(size, arguments.num, arguments.seed, chosen, kind)
            if kind == "objects" and size == 64:
                streams.write_objects()  # train_gpt.py --data=scenes reads it
    except KeyboardInterrupt:
        stop("interrupted; run the same command to continue")
    except OSError as error:
        stop(f"cannot write: {error}")
