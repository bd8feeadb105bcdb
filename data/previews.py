"""Contact sheets of the scenes sets."""
import random

import numpy as np
import torch

import draw
import questions
from raycaster import render
from texts import caption, describe, facts
from world import CLASSES


def in_rows(cells, length):
    return [cells[i:i + length] for i in range(0, len(cells), length)]


def draw_scenes(scenes, modalities, path):
    """Every modality of some scenes, one column per scene, then four of them with their texts."""
    images, index = render(scenes, 64)
    objects = facts(scenes, index)
    rows = [[(picture, m if column == 0 else "") for column, picture in enumerate(images[m])] for m in modalities]
    texts = [[images["rgb"][b], describe(objects[b]), caption(objects[b], random.Random(b))] for b in range(4)]
    draw.sheet(["Eight scenes, five image-like modalities", *rows, "rgb, desc, caption", *texts], path)


def draw_objects(scenes, arrays, coder, path):
    """Two scenes of every class of the objects set, and what tokens and 32 pixels keep of the first eight."""
    of_class = [np.flatnonzero(arrays["label"][:, 0] == c)[:2] for c in range(len(CLASSES))]
    rows = np.stack(of_class, 1).flatten()
    rgb = render({name: value[torch.from_numpy(rows)] for name, value in scenes.items()})[0]["rgb"]
    cells = [(picture, f"{i % len(CLASSES)} {CLASSES[i % len(CLASSES)]}") for i, picture in enumerate(rgb)]
    ids = torch.from_numpy(arrays["rgb"][rows[:8]].astype(np.int64)).view(-1, 8, 8)
    decoded = coder.decode(ids.to(rgb.device))
    small = torch.from_numpy(arrays["pixels32"][rows[:8]]) / 255
    draw.sheet(["One object: label, colour and shape", *in_rows(cells, 8),
                "The first row from its 64 tokens", list(decoded), "and in 32 pixels", list(small)], path)


def draw_questions(arrays, path):
    """Pictures with their questions and answers."""
    cells = []
    for picture, row, families in zip(arrays["pixels"], arrays["qa"], arrays["family"]):
        turns = questions.decode([row], [families])
        lines = [f"{question}  {answer}" for _, question, answer in turns]
        cells += [torch.from_numpy(picture) / 255, "\n".join(lines)]
    draw.sheet(["Questions and answers", *in_rows(cells, 6)], path)
