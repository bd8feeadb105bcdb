"""Contact sheets of the scenes sets, and WAV files of what is heard."""
import random

import numpy as np
import torch
from PIL import ImageDraw

import draw
import questions
import rich
from mel import LENGTHS
from raycaster import SEG_PALETTE, project, render
from texts import caption, describe, facts
from world import CLASSES, build

SIDE = 192  # of a picture on a sheet: 64 pixels three times as large


def in_rows(cells, length):
    return [cells[i:i + length] for i in range(0, len(cells), length)]


def draw_scenes(scenes, modalities, path):
    """Every modality of the first eight scenes, one column per scene; all of them in rgb; and four with their texts."""
    images, index = render(scenes, 64)
    objects = facts(scenes, index)
    rows = [[(picture, m if column == 0 else "") for column, picture in enumerate(images[m][:8])] for m in modalities]
    texts = [[images["rgb"][b], describe(objects[b]), caption(objects[b], random.Random(b))] for b in range(4)]
    draw.sheet(["Eight scenes, five image-like modalities", *rows, f"{len(objects)} scenes",
                *in_rows(list(images["rgb"]), 8), "rgb, desc, caption", *texts], path, SIDE)


def draw_objects(arrays, coder, path):
    """Two close-ups of every class of the objects set, and what tokens and 32 pixels keep of them."""
    of_class = [np.flatnonzero(arrays["label"][:, 0] == c)[:2] for c in range(len(CLASSES))]
    rows = np.stack(of_class, 1).flatten()
    rgb = render(build(torch.from_numpy(arrays["scene"][rows]).long()))[0]["rgb"]
    cells = [(picture, f"{i % len(CLASSES)} {CLASSES[i % len(CLASSES)]}") for i, picture in enumerate(rgb)]
    ids = torch.from_numpy(arrays["rgb"][rows[:24]].astype(np.int64)).view(-1, 8, 8)
    decoded = coder.decode(ids)
    small = torch.from_numpy(arrays["pixels32"][rows[:24]]) / 255
    draw.sheet(["One object in close-up: label, colour and shape", *in_rows(cells, 8),
                "The first three rows from their 64 tokens", *in_rows(list(decoded), 8),
                "and in 32 pixels", *in_rows(list(small), 8)], path, SIDE)


def draw_rich(arrays, coder, path):
    """Scenes in rgb and what the tokens of the rich set say of them: instances, outlines, boxes, colours, metadata."""
    rgb = render(build(torch.from_numpy(arrays["scene"].astype(np.int64))))[0]["rgb"]
    inst = coder.decode(torch.from_numpy(arrays["inst"].astype(np.int64)).view(-1, 8, 8))
    large = rgb.repeat_interleave(SIDE // 64, 2).repeat_interleave(SIDE // 64, 3)
    masks, _ = rich.polygon_masks(arrays["polygon"], SIDE)
    inner = -torch.nn.functional.max_pool2d(-masks.float(), 5, 1, 2) > 0
    poses = rich.pose_scenes(arrays["pose"])
    corner_x, corner_y, _ = project(poses | {"center": rich.corners(poses).flatten(1, 2)})
    points = torch.stack([corner_x, corner_y], 2).unflatten(1, (-1, 8)) * SIDE  # (B, 3, 8, 2)
    colors, present, _ = rich.palette_colors(arrays["palette"])
    values = rich.metadata_values(arrays["metadata"])
    rows = []
    for b, picture in enumerate(large):
        outlined, boxed = picture.clone(), draw.tile(picture, SIDE)
        for k, color in enumerate(SEG_PALETTE[1:]):
            outlined[:, masks[b, k] & ~inner[b, k]] = torch.tensor(color)[:, None] / 255
            if poses["shape"][b, k] >= 0:
                draw_box(ImageDraw.Draw(boxed), points[b, k].tolist(), color)
        seen = colors[b, present[b]].float() / 255
        swatches = seen[torch.arange(64) * len(seen) // 64].T[:, None].expand(3, 64, 64)
        told = "\n".join(f"{name} {value:.3g}" for name, value in zip(rich.META, values[b].tolist()))
        cells = [picture, inst[b], outlined, torch.from_numpy(np.array(boxed)).movedim(2, 0) / 255, swatches]
        names = ("rgb", "inst", "polygon", "pose", "palette")
        rows.append([(cell, name if b == 0 else "") for cell, name in zip(cells, names)] + [told])
    draw.sheet(["Scenes and what their tokens say of them", *rows], path, SIDE)


def draw_fine(arrays, coder, path):
    """Scenes in rgb at 64 px, and what the tokens of the fine set say of them."""
    rgb = render(build(torch.from_numpy(arrays["scene"].astype(np.int64))))[0]["rgb"]
    rows = [[(picture, "rgb, 64 px" if b == 0 else "") for b, picture in enumerate(rgb)]]
    for name in (name for name in arrays if name != "scene"):
        pictures = coder.decode(torch.from_numpy(arrays[name].astype(np.int64)).view(-1, 16, 16))
        rows.append([(picture, name if b == 0 else "") for b, picture in enumerate(pictures)])
    draw.sheet(["Scenes with twice as many pixels across", *rows], path, SIDE)


def draw_box(canvas, points, color):
    """The edges of a box, of its eight corners as rich.corners has them."""
    for i in range(4):
        for first, second in ((i, (i + 1) % 4), (i + 4, (i + 1) % 4 + 4), (i, i + 4)):
            canvas.line((*points[first], *points[second]), color, 2)


def draw_questions(arrays, path):
    """Pictures with their questions and answers."""
    cells = []
    for picture, row, families in zip(arrays["pixels"], arrays["qa"], arrays["family"]):
        turns = questions.decode([row], [families])
        lines = [f"{question}  {answer}" for _, question, answer in turns]
        cells += [torch.from_numpy(picture) / 255, "\n".join(lines)]
    draw.sheet(["Questions and answers", *in_rows(cells, 6)], path, SIDE)


def write_sounds(arrays, texts, coder, folder):
    """What the tokens of some scenes sound like as WAV files, and their captions, captions.txt."""
    import wav  # here, as no sheet takes it
    folder.mkdir(parents=True, exist_ok=True)
    for name in LENGTHS:
        for i, ids in enumerate(arrays[name]):
            wav.write(folder / f"{name}_{i}.wav", coder.sound(ids))
    (folder / "captions.txt").write_text("".join(f"{i}: {text}\n" for i, text in enumerate(texts["caption"])))
