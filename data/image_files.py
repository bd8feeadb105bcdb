"""Image files as training sees them: upright, in RGB, white where they are transparent. Files of the user's own and, in
cauldron.py, those of the hub."""
import hashlib
import os
import warnings

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from shards import sha256

FORMATS = ("PNG", "JPEG", "WEBP")  # that a set of the user's own is made of


def is_picture(path):
    """Whether a file can be read and begins as a PNG, JPEG or WebP does, whatever its name says."""
    if not os.path.isfile(path):  # opening a pipe would wait for whoever writes into it
        return False
    try:
        with open(path, "rb") as file:
            head = file.read(12)
    except OSError:
        return False
    return head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")) or head[:4] + head[8:] == b"RIFFWEBP"


def to_rgb(image):
    """An image as Pillow opens it, upright and in RGB, white where it is transparent."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, which Pillow's own conversion would clip
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def open_picture(path, formats=None, least=None):
    """The image in a file, a path or one that is open, as to_rgb has it. Raises an exception, of any kind, for what is
    no picture, and Pillow's DecompressionBombError or DecompressionBombWarning for one of more than 89 megapixels.

    formats: that it may be in; None: any. least: pixels of the shorter side that are enough; a JPEG is then read at a
    half, a quarter or an eighth of its size, if that leaves so many, which is faster.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what is odd in a file and can be read all the same
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=formats) as file:
            if least:
                file.draft(None, (least, least))
            return to_rgb(file)


def stretch(image, size):
    """An RGB image as a square array (3, size, size) uint8: nothing is cut off that a question may be about."""
    return np.array(image.resize((size, size), Image.BICUBIC)).transpose(2, 0, 1)


def sha256_of_all(paths, folder):
    """One hash of files, of their places relative to a folder and of their content."""
    digest = hashlib.sha256()
    for path in tqdm(paths, "looking for changes", unit=" files", leave=False):
        place = os.fsencode(os.path.relpath(path, folder))
        digest.update(place + b"\0" + sha256(path).encode())
    return digest.hexdigest()
