"""data/pictures.py: whatever a folder holds becomes a set that the flow and MaskGIT train on, or one sentence."""
import dataclasses
import json
import os
import runpy
import sys
from collections import defaultdict

import numpy as np
import pytest
import torch
from PIL import Image

import checks
import image_files
import pictures
import runs
import shards
import show_flow
import show_maskgit
import studio
import tokenizer
import train_flow
import train_maskgit

NOISE = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder that stands in for data/."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setattr(pictures, "ROOT", folder)
    return folder


@pytest.fixture
def holiday(tmp_path):
    """A folder with 12 pictures of cats and, deeper down, 8 of dogs."""
    source = tmp_path / "holiday"
    for i, array in enumerate(NOISE):
        path = source / ("cats" if i < 12 else "dogs/big") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
    return source


def make(source, **options):
    pictures.main(source, **{"name": "holiday", "size": 32, "labels": "subfolders", "fit": "crop", "minutes": 0, **options})


def refusal(source, **options):
    """The one line that it ends with."""
    with pytest.raises(SystemExit) as caught:
        make(source, **options)
    text = str(caught.value)
    assert text.startswith("pictures.py: ") and "\n" not in text
    return text


def names(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


# ------------------------------------------------------------------------------------------------------------
# Sets

def test_pictures_come_out_as_they_went_in(root, holiday, capsys):
    make(holiday)
    said = capsys.readouterr().out
    assert "19 pictures for training and 1 for validation, classes: 2" in said and "left out" not in said
    files = "--data=data/holiday/train --frozen=data/holiday/val.npz"
    assert f"python train_flow.py {files} --pixels=pixels32 --batch=19\n" in said and "label_drop" not in said
    assert names(root) == {f"holiday/{name}" for name in (
        "val.npz", "train/meta.json", "train/pixels32.npy", "train/label.npy", "train/rgb.npy")}
    train = {m: np.load(root / f"holiday/train/{m}.npy") for m in ("pixels32", "label", "rgb")}
    with np.load(root / "holiday/val.npz", allow_pickle=False) as arrays:
        val = dict(arrays)
    meta = json.loads((root / "holiday/train/meta.json").read_text())
    assert meta["num"] == 19 and meta["modalities"] == json.loads(bytes(val.pop("modalities"))) == {
        "label": {"length": 1, "vocab": 2, "pad": -1, "names": ["cats", "dogs"]},
        "rgb": {"length": 64, "vocab": 4096, "pad": -1}}
    for arrays, n in ((train, 19), (val, 2000)):
        assert {m: (array.shape, array.dtype) for m, array in arrays.items()} == {
            "pixels32": ((n, 3, 32, 32), np.uint8), "label": ((n, 1), np.uint16), "rgb": ((n, 64), np.uint16)}
    assert (val["pixels32"] == val["pixels32"][0]).all() and not val["label"].any(), "the one cat, again and again"
    found = {picture.tobytes(): label for picture, label in zip(train["pixels32"], train["label"][:, 0])}
    found[val["pixels32"][0].tobytes()] = 0
    assert found == {array.transpose(2, 0, 1).tobytes(): int(i >= 12) for i, array in enumerate(NOISE)}
    assert (np.diff(train["label"][:, 0].astype(int)) < 0).any(), "classes are mixed"
    large = [np.array(Image.fromarray(p.transpose(1, 2, 0)).resize((64, 64), Image.LANCZOS)) for p in train["pixels32"]]
    floats = torch.from_numpy(np.stack(large)).permute(0, 3, 1, 2).contiguous().float() / 255
    assert (tokenizer.load_tokenizer().encode_flat(floats) == train["rgb"]).mean() > 0.99

    before = times(root)
    make(holiday)
    assert "is there and whole" in capsys.readouterr().out
    for options in ({"size": 64}, {"fit": "pad"}, {"labels": "none"}):
        assert f"was made with another {', '.join(options)};" in refusal(holiday, **options)
    Image.fromarray(255 - NOISE[0]).save(holiday / "cats/0.png")
    assert "was made with another content;" in refusal(holiday)
    assert times(root) == before


def test_a_tokenizer_learns_from_them(root, holiday, monkeypatch):
    """It is another one than the scenes', the tokens are its own, and what decodes them takes it."""
    make(holiday, minutes=0.02)
    about = shards.read_meta(root / "holiday/train")["modalities"]["rgb"]
    assert about["decoder"] == "holiday/tokenizer.safetensors"
    own = tokenizer.load_tokenizer(path=root / about["decoder"])
    monkeypatch.setattr(studio, "ROOT", root)
    tokens = np.load(root / "holiday/train/rgb.npy")
    ids = torch.from_numpy(tokens.astype(np.int64))
    made = studio.Studio(decoder=about["decoder"]).pictures(ids)
    assert torch.equal(made, own.decode(ids.unflatten(1, (8, 8))))
    assert not torch.equal(made, studio.Studio().pictures(ids))
    large = [np.array(Image.fromarray(picture.transpose(1, 2, 0)).resize((64, 64), Image.LANCZOS))
             for picture in np.load(root / "holiday/train/pixels32.npy")]
    floats = torch.from_numpy(np.stack(large)).permute(0, 3, 1, 2).contiguous().float() / 255
    assert (own.encode_flat(floats) == tokens).mean() > 0.99
    assert "was made with another minutes" in refusal(holiday)


def test_both_scripts_take_it(root, holiday, monkeypatch):
    """With the frozen times, noise and masks that there are."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    make(holiday)
    files = {"data": f"{root}/holiday/train", "frozen": f"{root}/holiday/val.npz", "batch": 8}
    run = runs.fake_run()
    run.config, run.options = dataclasses.replace(train_flow.CONFIGS["cpu"], **files), train_flow.Options()
    checks.check_frozen_images(train_flow, run.config)
    validation, _, _, _, classes, _ = train_flow.read_frozen(run.config)
    images, labels, _ = train_flow.read_images(run.config, classes, 32)
    assert validation.shape == (2000, 3, 32, 32) and images.shape == (19, 3, 32, 32) and set(labels) == {0, 1}
    shown = show_flow.Show(train_flow, run, classes)
    assert shown.names == ["cats", "dogs"] and shown.guidances == (1.0, 1.5)

    run.config, run.options = dataclasses.replace(train_maskgit.CONFIGS["cpu"], **files), train_maskgit.Options()
    *frozen, modalities, _ = train_maskgit.read_frozen(run.config)
    checks.check_frozen_objects(train_maskgit, run.config, modalities, *frozen)
    tokens, labels, _ = train_maskgit.read_shards(run.config, modalities)
    assert tokens.shape == (19, 64) and set(labels) == {0, 1}
    shown = show_maskgit.Show(train_maskgit, run, modalities=modalities, frozen=frozen)
    assert shown.names == ["cats", "dogs"] and shown.guidance == 2.0
    assert shown.per_class == 0, "the judge knows nothing of cats"


def test_one_class_from_the_command_line(root, holiday, monkeypatch, capsys):
    monkeypatch.setattr(shards, "ROOT", root)
    source = holiday.rename(holiday.with_name("my photos"))
    monkeypatch.setattr(sys, "argv", ["pictures.py", str(source), "--labels=none", "--size=64"])
    runpy.run_path(pictures.__file__, run_name="__main__")
    said = capsys.readouterr().out
    assert "18 pictures for training and 2 for validation, classes: 1" in said
    assert "one class: guidance has nothing to tell apart and is off\n" in said
    assert said.count("--batch=18 --label_drop=0\n") == 2 and "--pixels=pixels64" in said
    assert np.load(root / "my_photos/train/pixels64.npy").shape == (18, 3, 64, 64)
    modalities = json.loads((root / "my_photos/train/meta.json").read_text())["modalities"]
    assert modalities["label"]["names"] == ["my photos"]
    flat = source / "cats"
    assert pictures.class_of(flat / "1.png", flat, "subfolders") == "cats", "there are no subfolders"
    run = runs.fake_run()
    run.options = train_flow.Options()
    run.config = dataclasses.replace(train_flow.CONFIGS["cpu"], frozen=f"{root}/my_photos/val.npz")
    assert show_flow.Show(train_flow, run, 1).guidances == (1.0,) and run.config.label_drop > 0
    run.config, run.options = train_maskgit.CONFIGS["cpu"], train_maskgit.Options()
    assert show_maskgit.Show(train_maskgit, run, modalities=modalities, frozen=[None] * 3).guidance == 1.0


def test_a_tenth_of_every_class_is_held_out(monkeypatch):
    label = np.random.default_rng(1).permutation(np.repeat([0, 1, 2], [1000, 30, 5]))
    train, held = pictures.split(label, np.random.default_rng(0))
    assert np.bincount(label[held], minlength=3).tolist() == [100, 3, 0]
    assert sorted([*train, *held]) == list(range(1035))
    assert np.array_equal(held, pictures.split(label, np.random.default_rng(0))[1])
    train, held = pictures.split(np.arange(8), np.random.default_rng(0))
    assert (len(train), len(held)) == (7, 1), "at least one"
    monkeypatch.setattr(pictures, "VALIDATION", 20)
    assert 15 < len(pictures.split(label, np.random.default_rng(0))[1]) <= 20


def test_an_interruption_leaves_no_half_a_set(root, holiday, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hub.np.savez_compressed", interrupt)
        assert "interrupted" in refusal(holiday)
    assert not {"train", "val.npz"} & {path.name for path in (root / "holiday").iterdir()}
    make(holiday)
    assert {path.name for path in (root / "holiday").iterdir()} == {"train", "val.npz"}


# ------------------------------------------------------------------------------------------------------------
# Files

def test_what_becomes_of_unusual_pictures(tmp_path):
    path = tmp_path / "picture.txt"  # what a name says does not matter
    color, gray = NOISE[0], NOISE[0][..., 0]
    alpha = np.full((32, 32, 1), 255, np.uint8)
    alpha[:, :16] = 0
    palette = Image.fromarray(color // 64 * 64).quantize(200)
    exif = Image.Exif()
    exif[0x112] = 6  # to be turned by a quarter
    flat = np.full((32, 32, 3), 90, np.uint8)
    cases = [  # image, format, options, and the picture expected
        (Image.fromarray(color), "PNG", {}, color),
        (Image.fromarray(color), "WEBP", {"lossless": True}, color),
        (Image.fromarray(color), "PNG", {"exif": exif}, color.transpose(1, 0, 2)[:, ::-1]),
        (Image.fromarray(np.concatenate([color, alpha], 2)), "PNG", {}, np.where(alpha, color, 255)),
        (Image.fromarray(gray), "PNG", {}, gray[..., None].repeat(3, 2)),
        (palette, "PNG", {}, np.asarray(palette.convert("RGB"))),
        (Image.fromarray(np.full((32, 32), 32896, np.uint16)), "PNG", {}, np.full((32, 32, 3), 128)),
        (Image.fromarray(flat), "JPEG", {}, flat),
        (Image.fromarray(flat).convert("CMYK"), "JPEG", {}, flat)]
    for image, form, options, expected in cases:
        image.save(path, form, **options)
        assert image_files.is_picture(path)
        large, small = pictures.read(path, 32, "crop")
        assert large.shape == (3, 64, 64) and small.dtype == np.uint8
        off = np.abs(small.transpose(1, 2, 0).astype(int) - expected).max()
        assert off <= (4 if form == "JPEG" else 0), (image, form)


def test_pictures_that_are_not_square(tmp_path):
    wide = np.zeros((32, 96, 3), np.uint8)
    for i in range(3):
        wide[:, 32 * i:32 * i + 32, i] = 255  # red, green, blue
    Image.fromarray(wide).save(tmp_path / "wide.png")
    _, cropped = pictures.read(tmp_path / "wide.png", 32, "crop")
    assert (cropped == np.array([0, 255, 0])[:, None, None]).all(), "the middle"
    _, padded = pictures.read(tmp_path / "wide.png", 32, "pad")  # 11 rows high
    assert (padded[:, [0, 9, 21, 31]] == 255).all(), "white above and below"
    for i, column in enumerate((4, 16, 27)):
        assert np.abs(padded[:, 15, column].astype(int) - 255 * np.eye(3)[i]).max() < 3


def test_large_photographs_are_read_at_a_part_of_their_size(tmp_path):
    path = tmp_path / "large.jpg"
    Image.linear_gradient("L").resize((1024, 1024)).convert("RGB").save(path)
    assert image_files.open_picture(path, least=128).size == (128, 128)
    whole = image_files.open_picture(path)
    assert whole.size == (1024, 1024)
    expected = np.array(whole.resize((64, 64), Image.LANCZOS)).transpose(2, 0, 1).astype(int)
    assert np.abs(pictures.read(path, 64, "crop")[1] - expected).max() < 6


def test_what_is_left_out(root, holiday, monkeypatch, capsys):
    """Whatever it is, it stops nothing, and is told about."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    data = (holiday / "cats/0.png").read_bytes()
    (holiday / "cats/broken.jpg").write_bytes(data[:len(data) // 2])
    (holiday / "cats/empty.png").touch()
    (holiday / "cats/gone.png").symlink_to("nowhere.png")
    os.mkfifo(holiday / "cats/pipe.png")
    (holiday / "cats/self").symlink_to("self")
    (holiday / "cats/text.png").write_text("no picture")
    (holiday / "dogs/again.webp").write_bytes(data)
    Image.new("RGB", (200, 100)).save(holiday / "dogs/bomb.png")
    Image.new("RGB", (100, 60)).save(holiday / "dogs/wide.png")
    (holiday / "dogs/loop").symlink_to(holiday)
    Image.new("RGB", (9, 9)).save(holiday / "beside.png")
    for name in (".hidden.png", "cats/.hidden.png", ".thumbnails/0.png"):
        (holiday / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (7, 7)).save(holiday / name)
    make(holiday)
    said = capsys.readouterr().out
    assert "19 pictures for training and 1 for validation, classes: 2" in said
    line, = (line for line in said.splitlines() if line.startswith("left out: "))
    for part in ("5 not readable as PNG, JPEG or WebP ('cats/empty.png', 'cats/gone.png', 'cats/pipe.png', ..)",
                 "1 in no subfolder, so of no class ('beside.png')", "1 broken ('cats/broken.jpg': ",
                 "2 too large, of more than 89 megapixels ('dogs/bomb.png', 'dogs/wide.png')",
                 "1 equal to another ('dogs/again.webp')"):
        assert part in line
    meta = json.loads((root / "holiday/train/meta.json").read_text())
    assert sorted(meta["left_out"].values()) == [1, 1, 1, 2, 5] and "hidden" not in said


def test_what_may_not_be_read(holiday, monkeypatch):
    def denied(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    left_out = defaultdict(list)
    assert image_files.is_picture(holiday / "cats/0.png") and not image_files.is_picture(holiday)
    monkeypatch.setattr(image_files, "open", denied, raising=False)
    assert not image_files.is_picture(holiday / "cats/0.png")
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", denied)
        assert list(pictures.find_files(holiday, left_out)) == []
    assert left_out == {"folders that cannot be opened": [f"[Errno 13] Permission denied: '{holiday}'"]}


def test_what_is_refused(root, holiday, tmp_path, monkeypatch, capsys):
    for i in range(7, 20):
        next(holiday.rglob(f"{i}.png")).unlink()
    assert "pictures.py: 7 pictures are too few, 8 are the least" == refusal(holiday)
    (holiday / "notes.txt").touch()
    assert "; left out: 1 not readable as PNG, JPEG or WebP ('notes.txt')" in refusal(holiday)
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "none", holiday / "notes.txt", tmp_path / "loop"):
        assert refusal(path) == f"pictures.py: {path} is not a folder"
    assert list(root.iterdir()) == []
    assert "is where the set itself would be" in refusal(holiday.rename(root / "holiday"))
    for name in ("../x", "frozen", "Objects64", "scenes", "gpt2", "-x"):
        assert refusal(tmp_path, name=name) == (f"pictures.py: --name={name}: give a name of letters, digits, _ and -, "
                                                "and none that is used here")
    assert "--name=: give a name" in refusal("/", name=None)
    for options in (["x", "--size=48"], ["x", "--fit=squeeze"], []):
        monkeypatch.setattr(sys, "argv", ["pictures.py", *options])
        with pytest.raises(SystemExit):
            runpy.run_path(pictures.__file__, run_name="__main__")
        assert "pictures.py: error: " in capsys.readouterr().err.splitlines()[-1]
