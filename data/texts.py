"""What is written about a scene of the world: descriptions, captions and boxes as tokens, and how to read them back."""
import re

import torch

from raycaster import COLORS, MATERIALS, MAX_OBJECTS, SHAPES, SIZES, project

BBOX_BINS = 64  # coordinate tokens per side, one set for each of xmin, ymin, xmax, ymax, as in 4M
BBOX_PAD, BBOX_EOS, BBOX_VOCAB = 0, 1, 2 + 4 * BBOX_BINS + len(SHAPES)
LENGTHS = {"desc": 5 * MAX_OBJECTS + 1, "caption": 40, "bbox": 5 * MAX_OBJECTS + 1,  # tokens with the end token
           "qa": 120}  # four of the longest questions and a description fit
WORDS = {"shape": SHAPES, "color": tuple(COLORS), "material": MATERIALS, "size": SIZES}
NUMBERS = ("one object", "two objects", "three objects")


def facts(scenes, index):
    """Per scene a list of objects, as sample_scenes orders them: dicts of words, x, y in percent, and box in pixels."""
    x, y, _ = project(scenes)
    percent_x, percent_y = (x * 100).long().tolist(), (y * 100).long().tolist()
    boxes = pixel_boxes(index)
    values = {name: scenes[name].tolist() for name in WORDS}
    lists = []
    for b in range(len(boxes)):
        objects = []
        for k in range(len(values["shape"][b])):
            if values["shape"][b][k] < 0:
                continue
            words = {name: WORDS[name][values[name][b][k]] for name in WORDS}
            objects.append({**words, "x": percent_x[b][k], "y": percent_y[b][k], "box": boxes[b][k]})
        lists.append(objects)
    return lists


def pixel_boxes(index):
    """The objects' boxes as lists (B, 3, 4) of xmin, ymin, xmax, ymax, from the object index (B, S, S)."""
    S = index.shape[-1]

    def first(line):
        return line.float().argmax(1)

    def last(line):
        return S - 1 - line.flip(1).float().argmax(1)

    boxes = []
    for k in range(MAX_OBJECTS):
        inside = index == k
        columns, rows = inside.any(1), inside.any(2)  # (B, S)
        boxes.append(torch.stack([first(columns), first(rows), last(columns), last(rows)], 1))
    return torch.stack(boxes, 1).tolist()


# ------------------------------------------------------------------------------------------------------------
# Descriptions and captions

def describe(objects):
    """The course's scene description, e.g. `Object 1 - Position: x=77 y=51 Shape: cube Color: blue Material: metal.`"""
    return " ".join(f"Object {i} - Position: x={o['x']} y={o['y']} Shape: {o['shape']} Color: {o['color']} "
                    f"Material: {o['material']}." for i, o in enumerate(objects, 1))


DESC = re.compile(r"Object (\d+) - Position: x=(\d+) y=(\d+) Shape: (\w+) Color: (\w+) Material: (\w+)\.")


def parse_desc(text):
    """The objects of a description, those that are well formed: list of dicts x, y, shape, color, material."""
    return [{"x": int(x), "y": int(y), "shape": shape, "color": color, "material": material}
            for _, x, y, shape, color, material in DESC.findall(text)]


def noun(o):
    return f"a {o['size']} {o['color']} {o['material']} {o['shape']}"


def side(o):
    if o["x"] < 40:
        return "left"
    return "right" if o["x"] > 60 else "middle"


def place(o):
    """Roughly where an object is: `at the back left`, `on the right`, `in the middle`."""
    if o["y"] < 42:
        return f"at the back {side(o)}"
    if o["y"] > 58:
        return f"at the front {side(o)}"
    return "in the middle" if side(o) == "middle" else f"on the {side(o)}"


def enumerate_parts(parts):
    """`a`, `a and b`, `a, b and c`."""
    if len(parts) == 1:
        return parts[0]
    return ", ".join(parts[:-1]) + " and " + parts[-1]


def caption(objects, rng):
    """One natural sentence that names every object and roughly where it is; rng (random.Random) picks the template."""
    order = rng.sample(objects, len(objects))
    placed = enumerate_parts([f"{noun(o)} {place(o)}" for o in order])
    turned = enumerate_parts([f"{place(o)} {noun(o)}" for o in order])
    text = rng.choice((f"{placed}.", f"there is {placed}.", f"a picture of {placed}.",
                       f"{NUMBERS[len(order) - 1]} on the floor: {placed}.", f"{turned}."))
    return text[0].upper() + text[1:]


# ------------------------------------------------------------------------------------------------------------
# Boxes

def box_tokens(objects, size):
    """4M-style boxes, nearest first: xmin ymin xmax ymax class per object, then the end token, padded."""
    row = []
    for o in objects:
        row += [2 + kind * BBOX_BINS + v * BBOX_BINS // size for kind, v in enumerate(o["box"])]
        row.append(2 + 4 * BBOX_BINS + SHAPES.index(o["shape"]))
    return row + [BBOX_EOS] + [BBOX_PAD] * (LENGTHS["bbox"] - len(row) - 1)


def parse_boxes(row):
    """The boxes of a token row, those that are well formed: list of (xmin, ymin, xmax, ymax in bins, shape)."""
    row = [int(v) for v in row]
    boxes = []
    for i in range(0, len(row) - 4, 5):
        if row[i] <= BBOX_EOS:
            break
        kinds = [(v - 2) // BBOX_BINS for v in row[i:i + 5]]
        if kinds == [0, 1, 2, 3, 4] and row[i + 4] < BBOX_VOCAB:
            corners = [(v - 2) % BBOX_BINS for v in row[i:i + 4]]
            boxes.append((*corners, SHAPES[row[i + 4] - 2 - 4 * BBOX_BINS]))
    return boxes


def edits(heard, told):
    """The least number of words inserted, left out or replaced between two lists (Levenshtein)."""
    row = list(range(len(told) + 1))
    for i, word in enumerate(heard, 1):
        above, row = row, [i]
        for j, other in enumerate(told, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (word != other)))
    return row[-1]
