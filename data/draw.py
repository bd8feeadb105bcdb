"""Contact sheets: rows of labelled pictures and texts in one PNG; animations, and a plot."""
import textwrap
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

CELL, GAP, LABEL = 128, 6, 14  # pixels: a picture's side, the space around, a label's height
TEXT, LINE = 250, 12  # a text's width and the height of one of its lines
INK, PALE, PAPER = (30, 32, 38), (110, 114, 124), (255, 255, 255)


def write(path, save, **settings):
    """save(a temporary path, **settings), then rename: nobody sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    save(part, **settings)
    part.replace(path)


def image_of(picture):
    """A PIL image of a picture (3, H, W) of floats in [0, 1]."""
    return Image.fromarray((picture.detach().float().cpu().clamp(0, 1).permute(1, 2, 0) * 255).round().byte().numpy())


def tile(picture, side=CELL):
    """A PIL image of a picture (3, H, W), enlarged without smoothing."""
    return image_of(picture).resize((side, side), Image.NEAREST)


def strip(pictures, path):
    """Write a PNG of pictures (3, H, W) side by side, twice as large: what a slider goes through."""
    image = image_of(torch.cat(list(pictures), 2))
    write(path, image.resize((2 * image.width, 2 * image.height), Image.NEAREST).save, format="PNG")


def sheet(rows, path, side=CELL):
    """Write a PNG of rows. A row is a heading (str) or a list of cells; a cell is a picture (3, H, W), a pair
    (picture, label), a text (str) or None for an empty place. side: of pictures, in pixels."""
    small, large = ImageFont.load_default(11), ImageFont.load_default(17)

    def width_of(cell):
        return TEXT if isinstance(cell, str) else side

    width = max(sum(width_of(c) + GAP for c in row) for row in rows if not isinstance(row, str)) + GAP
    height = sum(36 if isinstance(row, str) else side + LABEL + GAP for row in rows) + GAP
    image = Image.new("RGB", (width, height), PAPER)
    draw, y = ImageDraw.Draw(image), GAP
    for row in rows:
        if isinstance(row, str):
            draw.text((GAP, y + 8), row, INK, large)
            y += 36
            continue
        x = GAP
        for cell in row:
            if isinstance(cell, str):
                lines = [line for part in cell.split("\n") for line in textwrap.wrap(part, 44) or [""]]
                draw.multiline_text((x, y + LABEL), "\n".join(lines[:side // LINE]), INK, small, spacing=1)
            elif cell is not None:
                picture, label = cell if isinstance(cell, tuple) else (cell, "")
                draw.text((x, y), label, PALE, small)
                image.paste(tile(picture, side), (x, y + LABEL))
            x += width_of(cell) + GAP
        y += side + LABEL + GAP
    write(path, image.save, format="PNG")


def animation(frames, path, columns=8, hold=10):
    """Write a GIF. A frame is pictures (B, 3, H, W), drawn as a grid; the last one stays `hold` times as long."""
    images = []
    for pictures in frames:
        rows = -(-len(pictures) // columns)
        image = Image.new("RGB", (columns * (CELL // 2 + GAP) + GAP, rows * (CELL // 2 + GAP) + GAP), PAPER)
        for i, picture in enumerate(pictures):
            corner = [GAP + n * (CELL // 2 + GAP) for n in (i % columns, i // columns)]
            image.paste(tile(picture, CELL // 2), corner)
        images.append(image.quantize(128))  # a palette of its own each, or colours shift
    write(path, images[0].save, format="GIF", save_all=True, append_images=images[1:], loop=0,
          duration=[200] * (len(images) - 1) + [200 * hold])


def order_of_places(steps, path):
    """Write a PNG of the steps (B, L) at which the places of some rows were filled in: how often, and their mean."""
    steps = steps.cpu()
    B, L = steps.shape
    figure = Figure(figsize=(5, 4.4), layout="constrained")
    ax = figure.subplots()
    edges = torch.arange(L + 1).numpy() + 0.5
    ax.hist2d((1 + torch.arange(L)).repeat(B).numpy(), steps.flatten().numpy(), bins=(edges, edges), cmap="Blues")
    ax.plot(1 + torch.arange(L).numpy(), steps.float().mean(0).numpy(), color="#c44e52", label=f"mean of {B} rows")
    ax.set(xlabel="place", ylabel="step at which it is filled in", title="one token per step, the surest first")
    ax.legend(loc="upper center")
    write(path, figure.savefig, format="png", dpi=130)
