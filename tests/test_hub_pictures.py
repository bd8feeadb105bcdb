"""Sets of pictures from the Hugging Face hub, without a network: a fake hub with small parquet files."""
import hashlib
import io
import json
import runpy
import shutil
import sys
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import RemoteEntryNotFoundError
from PIL import Image

import cauldron
import cifar10
import questions
import tokenizer


def sentence(caught):
    """The message of a SystemExit, which is one line."""
    text = str(caught.value)
    assert text and "\n" not in text
    return text


def names(folder):
    """Every file under a folder, relative to it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def file_of(picture, form="PNG", **options):
    """The bytes of an image file of a PIL image or an array (H, W) or (H, W, 3) of bytes."""
    buffer = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(buffer, form, **options)
    return buffer.getvalue()


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def parquet(columns, types):
    """The bytes of a parquet file in several row groups."""
    buffer = io.BytesIO()
    pq.write_table(pa.table({name: pa.array(columns[name], types[name]) for name in columns}), buffer, row_group_size=7)
    return buffer.getvalue()


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder that stands in for data/."""
    folder = tmp_path / "data"
    folder.mkdir()
    for module in (cifar10, cauldron):
        monkeypatch.setattr(module, "ROOT", folder)
    return folder


@pytest.fixture
def hub(monkeypatch):
    """A hub that has .files {(repository, commit, name): bytes}; what .damage has for a name happens to its bytes."""
    fake = types.SimpleNamespace(files={}, damage={}, fetched=[], commits={"main": "c" * 40})

    def download(repo, name, *, repo_type, revision, local_dir):
        assert repo_type == "dataset"
        fake.fetched.append(name)
        path = local_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (local_dir / "incomplete").write_bytes(b"as the hub's client leaves it")
        path.write_bytes(fake.damage.get(name, lambda data: data)(fake.files[repo, revision, name]))

    def repo_info(repo, *, repo_type, revision):
        return types.SimpleNamespace(sha=fake.commits.get(revision, revision))

    def list_repo_tree(repo, folder, *, repo_type, revision):
        assert repo_type == "dataset"
        found = {name: data for (where, commit, name), data in fake.files.items()
                 if (where, commit) == (repo, revision) and name.startswith(f"{folder}/")}
        if not found:
            raise RemoteEntryNotFoundError("404 Client Error.\nEntry Not Found", response=types.SimpleNamespace(
                headers={}, request=None, status_code=404))
        for name, data in reversed(found.items()):
            lfs = types.SimpleNamespace(sha256=hashlib.sha256(data).hexdigest())
            yield types.SimpleNamespace(path=name, lfs=lfs)
        yield types.SimpleNamespace(path=f"{folder}/more")  # a folder

    monkeypatch.setattr("hub.HfApi", lambda: types.SimpleNamespace(repo_info=repo_info, list_repo_tree=list_repo_tree))
    monkeypatch.setattr("hub.hf_hub_download", download)
    return fake


def no_network(*_, **__):
    raise ConnectionError("[Errno -2] Name or service not known\nand more lines")


def interrupt(*_, **__):
    raise KeyboardInterrupt


# ------------------------------------------------------------------------------------------------------------
# CIFAR-10 and MNIST

@pytest.fixture
def pictures(root, hub, monkeypatch):
    """Small files in the place of the real ones; returns {set: {split: (pictures, labels)}}."""
    rng, true, pinned = np.random.default_rng(0), {}, {}
    for name, (repo, revision, column, files) in cifar10.SETS.items():
        pinned[name], true[name] = {}, {}
        for split, count in (("train", 23), ("test", 12)):
            shape = (count, 28, 28) if name == "mnist" else (count, 32, 32, 3)
            array, label = rng.integers(0, 256, shape, np.uint8), rng.integers(0, 10, count)
            data = parquet({column: [{"bytes": file_of(picture), "path": None} for picture in array], "label": label},
                           {column: IMAGE, "label": pa.int64()})
            hub.files[repo, revision, files[split][0]] = data
            pinned[name][split] = files[split][0], hashlib.sha256(data).hexdigest()
            true[name][split] = array, label
    monkeypatch.setattr(cifar10, "SETS", {name: (*about[:3], pinned[name]) for name, about in cifar10.SETS.items()})
    monkeypatch.setattr(cifar10, "VALIDATION", 10)
    return true


@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_pictures_come_out_as_they_went_in(root, hub, pictures, name):
    cifar10.main(name)
    folder, repo = root / name, cifar10.SETS[name][0]
    assert names(root) == {f"{name}/{file}" for file in ("train/pixels32.npy", "train/label.npy", "train/meta.json",
                                                         "val.npz")}
    kinds = {"label": {"length": 1, "vocab": 10, "pad": -1}}
    meta = json.loads((folder / "train" / "meta.json").read_text())
    assert {key: meta[key] for key in ("name", "version", "size", "num", "seed", "repo", "modalities")} == {
        "name": name, "version": 1, "size": 32, "num": 23, "seed": 0, "repo": repo, "modalities": kinds}
    assert set(meta["sha256"]) == {"pixels32.npy", "label.npy", "../val.npz"}
    train = [np.load(folder / "train" / f"{m}.npy", mmap_mode="r") for m in ("pixels32", "label")]
    with np.load(folder / "val.npz", allow_pickle=False) as arrays:
        assert set(arrays) == {"pixels32", "label", "modalities"} and json.loads(bytes(arrays["modalities"])) == kinds
        val = [arrays["pixels32"], arrays["label"]]
    for (pixels, label), split, count in ((train, "train", 23), (val, "test", 10)):
        array, number = pictures[name][split]
        assert pixels.dtype == np.uint8 and pixels.shape == (count, 3, 32, 32)
        assert label.dtype == np.uint16 and (label == number[:count, None]).all()
        if name == "cifar10":
            assert (pixels == array[:count].transpose(0, 3, 1, 2)).all()
        else:
            assert (pixels[:, :, 2:30, 2:30] == array[:count, None]).all()
            assert pixels.sum(dtype=int) == 3 * array[:count].sum(dtype=int)  # black around it
    before = times(folder)
    cifar10.main(name)
    assert times(folder) == before and len(hub.fetched) == 2


def test_a_damaged_download_is_not_kept(root, hub, pictures):
    train, test = (file for file, _ in cifar10.SETS["cifar10"][3].values())
    hub.damage[test] = lambda data: data[:-9]
    with pytest.raises(SystemExit) as caught:
        cifar10.main("cifar10")
    assert sentence(caught).startswith(f"cifar10.py: {test} has sha256 ")
    assert names(root) == {"cifar10/work/train.parquet"}
    hub.damage[test] = no_network
    with pytest.raises(SystemExit) as caught:
        cifar10.main("cifar10")
    assert "did not come from the Hugging Face hub" in sentence(caught) and not (root / "cifar10" / "train").exists()
    hub.damage.clear()
    cifar10.main("cifar10")
    assert hub.fetched == [train, test, test, test] and not (root / "cifar10" / "work").exists()


def test_an_interruption_leaves_no_half_a_set(root, hub, pictures, monkeypatch):
    hub.damage[cifar10.SETS["mnist"][3]["test"][0]] = interrupt
    with pytest.raises(SystemExit) as caught:
        cifar10.main("mnist")
    assert sentence(caught) == "cifar10.py: interrupted; run the same command to continue"
    hub.damage.clear()
    for place in ("cifar10.read", "hub.np.savez_compressed"):
        with monkeypatch.context() as patch:
            patch.setattr(place, interrupt)
            with pytest.raises(SystemExit):
                cifar10.main("mnist")
        assert not {"train", "val.npz"} & {path.name for path in (root / "mnist").iterdir()}
    cifar10.main("mnist")
    assert {path.name for path in (root / "mnist").iterdir()} == {"train", "val.npz"} and len(hub.fetched) == 3


def test_a_set_that_is_there_and_wrong_is_told_about(root, hub, pictures):
    cifar10.main("mnist")
    folder = root / "mnist"
    whole = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    meta = json.loads(whole[folder / "train" / "meta.json"])
    for name, data, message in (
            ("train/label.npy", b"x", "is damaged (label.npy is not"), ("val.npz", b"x", "damaged (val.npz is not"),
            ("train/meta.json", b"{", "is damaged ("), ("train/meta.json", b"[]", "does not say how many rows"),
            ("train/meta.json", json.dumps({**meta, "version": 0}).encode(), "was made with another version")):
        (folder / name).write_bytes(data)
        with pytest.raises(SystemExit) as caught:
            cifar10.main("mnist")
        assert message in sentence(caught)
        assert ("move" if data in (b"{", b"[]") else "delete it") in sentence(caught), "what is not ours stays"
        (folder / name).write_bytes(whole[folder / name])
    (folder / "val.npz").unlink()
    with pytest.raises(SystemExit) as caught:
        cifar10.main("mnist")
    assert "is damaged (" in sentence(caught) and len(hub.fetched) == 2


def test_the_pictures_are_the_pinned_ones():
    pins = {name: (repo, revision, [digest for _, digest in files.values()])
            for name, (repo, revision, _, files) in cifar10.SETS.items()}
    assert pins == {
        "cifar10": ("uoft-cs/cifar10", "0b2714987fa478483af9968de7c934580d0bb9a2",
                    ["8428b53a88a11ac374111006708df51469e315a22ac6d66470afd9c78d2ae883",
                     "841389e6f2d64f28bf17310e430aebac20ec3ba611a3c5e231dc93c645ce84de"]),
        "mnist": ("ylecun/mnist", "77f3279092a1c1579b2250db8eafed0ad422088c",
                  ["f2c01285a9f89399335b00ee4e8d499dc4e46db5e39c74903ce5618d895eb3bf",
                   "d49fcf556ce25b002b302e318ce4a11098bbfe5d4499c3f35d7c72297c52374b"])}
    assert cifar10.VALIDATION == 2000


# ------------------------------------------------------------------------------------------------------------
# The Cauldron

TEXTS = pa.list_(pa.struct([("user", pa.string()), ("assistant", pa.string()), ("source", pa.string())]))
COLUMNS = {"images": pa.list_(IMAGE), "texts": TEXTS}
PICTURES = np.random.default_rng(1).integers(0, 256, (12, 16, 16, 3), np.uint8)


def row(pictures, *turns):
    """A row of The Cauldron: image files, or one array, and turns (question, answer)."""
    files = [file_of(pictures)] if isinstance(pictures, np.ndarray) else pictures
    return {"images": [{"bytes": data, "path": None} for data in files],
            "texts": [{"user": user, "assistant": assistant, "source": "Test"} for user, assistant in turns]}


def turn(i):
    return f"What number is this, {i} or {i + 1}?", f"Number {i}."


def conversations(count, start=0):
    return [row(PICTURES[i], turn(i), ("Sure?", "Yes")) for i in range(start, start + count)]


def write(path, rows):
    path.write_bytes(parquet({name: [r[name] for r in rows] for name in COLUMNS}, COLUMNS))
    return path


def dialogue(tokens, marks):
    """The text of a row of tokens, and the texts that its marks 1 to 4 are at."""
    encoding = tokenizer.load_text(tokenizer.QA)
    decode = lambda ids: tokenizer.decode_text(encoding, ids)
    return decode(tokens), [decode(tokens[marks == k]) for k in range(1, 5) if (marks == k).any()]


def load(folder):
    """{array: (N + n, ...)} of a set, training and validation one after the other."""
    with np.load(folder / "val.npz", allow_pickle=False) as arrays:
        return {m: np.concatenate([np.load(folder / "train" / f"{m}.npy"), arrays[m]])
                for m in ("pixels", "qa", "answer", "family")}


def test_conversations_come_out_as_they_went_in(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cauldron, "VALIDATION", 3)
    paths = [write(tmp_path / "a.parquet", conversations(7)), write(tmp_path / "b.parquet", conversations(5, 7))]
    cauldron.main("mine", 16, 128, paths=paths)
    assert names(root) == {f"mine/{file}" for file in ("train/pixels.npy", "train/qa.npy", "train/answer.npy",
                                                       "train/family.npy", "train/meta.json", "val.npz")}
    assert "of 12 rows 12 whole; the last 3 used are for validation" in capsys.readouterr().out
    meta = json.loads((root / "mine" / "train" / "meta.json").read_text())
    kinds = {"qa": {"length": 128, "vocab": tokenizer.TEXT_VOCAB, "pad": tokenizer.TEXT_VOCAB - 1}}
    assert {key: meta[key] for key in ("name", "size", "num", "seed", "modalities")} == {
        "name": "mine", "size": 16, "num": 9, "seed": 0, "modalities": kinds}
    assert meta["text"] == hashlib.sha256(tokenizer.QA.read_bytes()).hexdigest()
    assert set(meta["sha256"]) == {"pixels.npy", "qa.npy", "answer.npy", "family.npy", "../val.npz"}
    with np.load(root / "mine" / "val.npz", allow_pickle=False) as arrays:
        assert json.loads(bytes(arrays["modalities"])) == kinds and len(arrays["qa"]) == 3
    arrays = load(root / "mine")
    forms = {m: (array.dtype, array.shape) for m, array in arrays.items()}
    assert forms == {"pixels": (np.uint8, (12, 3, 16, 16)), "qa": (np.uint16, (12, 128)),
                     "answer": (np.uint8, (12, 128)), "family": (np.uint8, (12, 4))}
    assert (arrays["pixels"] == PICTURES.transpose(0, 3, 1, 2)).all() and not arrays["family"].any()
    encoding = tokenizer.load_text(tokenizer.QA)
    for i, (tokens, marks) in enumerate(zip(arrays["qa"], arrays["answer"])):
        assert dialogue(tokens, marks) == (f"Question: What number is this, {i} or {i + 1}? Answer: Number {i}.\n"
                                           "Question: Sure? Answer: Yes\n", [f" Number {i}.\n", " Yes\n"])
        encoded = questions.encode(encoding, [(0, *turn(i)), (0, "Sure?", "Yes")], 128)
        assert (tokens == encoded[0]).all() and (marks == encoded[1]).all()
    before = times(root)
    cauldron.main("mine", 16, 128, paths=paths)
    assert times(root) == before and "is there and whole" in capsys.readouterr().out
    for size, length, given, what in ((32, 128, 2, "size"), (16, 64, 2, "length"), (16, 128, 1, "files")):
        with pytest.raises(SystemExit) as caught:
            cauldron.main("mine", size, length, paths=paths[:given])
        assert f"was made with another {what};" in sentence(caught) and times(root) == before


def test_what_becomes_of_unusual_texts(root, tmp_path, capsys):
    long = "Is it so? " * 30
    odd = ("Größe der 猫?", "½ <|end|> <|pad|> 🐈"), ("Question: Is it? Answer: B", "Answer: C")
    rows = [
        row(PICTURES[0], ("Two\nlines,\r\n\u2028 or \tmore?\n", " A.\nB\n\n")),
        row(PICTURES[1], *map(turn, range(6))),  # more than four turns
        row(PICTURES[2], turn(2), turn(2), (long, "Yes"), turn(2)),  # the third does not fit
        row(PICTURES[3], (long, "Yes"), turn(3)),  # not even the first does
        row(PICTURES[4]), row(PICTURES[4], ("", "Nothing"), ("What?", " \n"), (None, "x"), ("x", None)),
        row(PICTURES[5], ("", "x"), *odd),
        row([], turn(6)), {**row([], turn(6)), "images": None}, {**row([], turn(6)), "images": [None]},
        row([None], turn(6)), {**row(PICTURES[6]), "texts": None}]
    cauldron.main("mine", 16, 128, paths=[write(tmp_path / "a.parquet", rows)])
    assert ("of 12 rows 2 whole, 2 shortened, 1 too long, 3 without a question, 4 without a picture; the last 2 used "
            "are for validation") in capsys.readouterr().out
    arrays = load(root / "mine")
    assert (arrays["pixels"] == PICTURES[[0, 1, 2, 5]].transpose(0, 3, 1, 2)).all()
    texts = [dialogue(*pair) for pair in zip(arrays["qa"], arrays["answer"])]
    said = lambda *turns: ("".join(f"Question: {q} Answer: {a}\n" for q, a in turns), [f" {a}\n" for _, a in turns])
    assert texts == [said(("Two lines, or more?", "A. B")), said(*map(turn, range(4))), said(turn(2), turn(2)),
                     said(*odd)]
    assert [marks.max() for marks in arrays["answer"]] == [1, 4, 2, 2]
    meta = json.loads((root / "mine" / "train" / "meta.json").read_text())
    assert meta["num"] == 2 and meta["rows"]["too long"] == 1


def test_what_becomes_of_unusual_pictures(root, tmp_path):
    color, gray = PICTURES[0], PICTURES[0][..., 0]
    alpha = np.zeros((16, 16, 1), np.uint8)
    alpha[:, :8] = 255
    clear = np.where(alpha, color, 255)  # on white
    palette = Image.fromarray(color // 64 * 64).quantize(200)
    hole = Image.fromarray(gray // 2).convert("P")
    hole.putpalette([v for i in range(256) for v in (i, 255 - i, 7)])
    entry = int(gray[0, 0]) // 2
    holed = np.asarray(hole.convert("RGB")).copy()
    holed[gray // 2 == entry] = 255
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter
    flat = np.full((40, 20, 3), 90, np.uint8)
    cases = [  # image files, and the picture expected
        ([file_of(gray)], np.stack([gray] * 3, -1)),
        ([file_of(np.concatenate([gray[..., None], alpha], 2))], np.where(alpha, gray[..., None], 255).repeat(3, 2)),
        ([file_of(Image.fromarray(gray > 99))], (gray > 99)[..., None].repeat(3, 2) * 255),
        ([file_of(palette)], np.asarray(palette.convert("RGB"))),
        ([file_of(hole, transparency=entry)], holed),
        ([file_of(np.concatenate([color, alpha], 2))], clear),
        ([file_of(color), file_of(PICTURES[1]), file_of(gray)], color),  # the first of several
        ([file_of(color), b"not an image"], color),
        ([file_of(color, "WEBP", lossless=True)], color),
        ([file_of(color, exif=exif)], color.transpose(1, 0, 2)[:, ::-1]),
        ([file_of(flat)], flat[:16, :16]),  # made square
        ([file_of(Image.fromarray(flat).convert("CMYK"), "JPEG")], None),
        ([file_of(color, "JPEG")], None)]
    cauldron.main("mine", 16, 128, paths=[write(tmp_path / "a.parquet", [row(files, turn(0)) for files, _ in cases])])
    pixels = load(root / "mine")["pixels"]
    assert len(pixels) == len(cases)
    for found, (_, expected) in zip(pixels, cases):
        assert expected is None or (found == expected.transpose(2, 0, 1)).all()
    assert abs(pixels[-2].astype(int) - 90).max() < 4


@pytest.fixture
def ai2d(root, hub, monkeypatch):
    """A configuration of two files on the hub; their names."""
    monkeypatch.setattr(cauldron, "VALIDATION", 3)
    files = [f"ai2d/train-0000{i}-of-00002-0123456789abcdef.parquet" for i in (0, 1)]
    for file, rows in zip(files, (conversations(7), conversations(5, 7))):
        hub.files[cauldron.REPO, "c" * 40, file] = parquet({m: [r[m] for r in rows] for m in COLUMNS}, COLUMNS)
    return files


def test_a_configuration_comes_from_the_hub(root, hub, ai2d, monkeypatch):
    cauldron.main("ai2d", 16, 128, "ai2d")
    assert {path.name for path in (root / "ai2d").iterdir()} == {"train", "val.npz"} and hub.fetched == ai2d
    meta = json.loads((root / "ai2d" / "train" / "meta.json").read_text())
    assert (meta["repo"], meta["config"], meta["revision"]) == (cauldron.REPO, "ai2d", "c" * 40)
    assert meta["files"] == [hashlib.sha256(hub.files[cauldron.REPO, "c" * 40, file]).hexdigest() for file in ai2d]
    assert (load(root / "ai2d")["pixels"] == PICTURES.transpose(0, 3, 1, 2)).all()
    for revision in ("main", "c" * 40):
        cauldron.main("ai2d", 16, 128, "ai2d", revision)
    hub.commits["main"] = "d" * 40  # it moves on
    with pytest.raises(SystemExit) as caught:
        cauldron.main("ai2d", 16, 128, "ai2d", "main")
    assert "was made with another revision;" in sentence(caught)
    for config in ("ai2d", "no_such"):
        with pytest.raises(SystemExit) as caught:
            cauldron.main("more", 16, 128, config)
        assert f"cauldron.py: {config}: {cauldron.REPO} has no such thing at revision {'d' * 40}" == sentence(caught)
    hub.files[cauldron.REPO, "d" * 40, "ai2d/README.md"] = b"text"
    with pytest.raises(SystemExit) as caught:
        cauldron.main("more", 16, 128, "ai2d")
    assert "has no parquet files there" in sentence(caught)
    monkeypatch.setattr("hub.HfApi", lambda: types.SimpleNamespace(repo_info=no_network))
    cauldron.main("ai2d", 16, 128, "ai2d")  # what is there needs no hub
    with pytest.raises(SystemExit) as caught:
        cauldron.main("more", 16, 128, "ai2d")
    assert "revision main did not come from the Hugging Face hub" in sentence(caught)
    assert hub.fetched == ai2d and not (root / "more").exists()


def test_an_interrupted_conversion_goes_on(root, hub, ai2d, monkeypatch):
    cauldron.main("ai2d", 16, 128, "ai2d")
    whole, square, made = (root / "ai2d" / "val.npz").read_bytes(), cauldron.square, []
    shutil.rmtree(root / "ai2d")
    hub.damage[ai2d[1]] = lambda data: data[:-9]
    with pytest.raises(SystemExit) as caught:
        cauldron.main("ai2d", 16, 128, "ai2d")
    assert f"{ai2d[1]} has sha256" in sentence(caught) and names(root) == {f"ai2d/work/{ai2d[0][5:]}"}
    hub.damage.clear()

    def make(where, data, size):
        made.append(where)
        return interrupt() if len(made) in (6, 9) else square(where, data, size)

    monkeypatch.setattr(cauldron, "square", make)
    with pytest.raises(SystemExit) as caught:
        cauldron.main("ai2d", 16, 128, "ai2d")
    assert sentence(caught) == "cauldron.py: interrupted; run the same command to continue"
    pictures, = (path for path in (root / "ai2d" / "work").iterdir() if len(path.name) == 64)
    pictures.write_bytes(pictures.read_bytes()[:-7])  # as if the last had been cut short
    with pytest.raises(SystemExit):
        cauldron.main("ai2d", 16, 128, "ai2d")
    assert not {"train", "val.npz"} & {path.name for path in (root / "ai2d").iterdir()}
    cauldron.main("ai2d", 16, 128, "ai2d")
    first = [f"row {n} of {ai2d[0][5:]}" for n in range(1, 8)]
    second = [f"row {n} of {ai2d[1][5:]}" for n in range(1, 6)]
    assert made == first[:6] + first[4:] + first[6:] + second
    assert (root / "ai2d" / "val.npz").read_bytes() == whole and len(hub.fetched) == 5
    assert (load(root / "ai2d")["pixels"] == PICTURES.transpose(0, 3, 1, 2)).all()


def test_faults_of_a_file_are_told(root, tmp_path, monkeypatch, capsys):
    good = conversations(3)
    broken = [file_of(PICTURES[0])[:300], b"not an image", file_of(PICTURES[0], "JPEG")[:-300]]
    for data in broken:
        path = write(tmp_path / "a.parquet", [*good, row([data], turn(0))])
        with pytest.raises(SystemExit) as caught:
            cauldron.main("mine", 16, 128, paths=[path])
        assert sentence(caught).startswith("cauldron.py: row 4 of a.parquet: its picture cannot be read (")
    path = tmp_path / "b.parquet"
    columns = {name: [r[name] for r in good] for name in COLUMNS}
    whole = parquet(columns, COLUMNS)
    for data in (b"", b"no parquet", whole[:-20], whole[:20] + b"x" * 400 + whole[420:],
                 parquet({"images": columns["images"]}, COLUMNS),
                 parquet({**columns, "images": [r["images"][0] for r in good]}, {**COLUMNS, "images": IMAGE}),
                 parquet({**columns, "texts": ["text"] * 3}, {**COLUMNS, "texts": pa.string()})):
        path.write_bytes(data)
        with pytest.raises(SystemExit) as caught:
            cauldron.main("mine", 16, 128, paths=[path])
        said = sentence(caught)
        assert f"{path} is damaged or no .parquet file (" in said or f"{path}, row 1, is not of The Cauldron's format (" in said
    with pytest.raises(SystemExit) as caught:
        cauldron.main("mine", 16, 128, paths=[write(path, good[:1])])
    assert sentence(caught) == "cauldron.py: of 1 rows 1 whole: too few for a set"
    with pytest.raises(SystemExit) as caught:
        cauldron.main("mine", 16, 128, paths=[tmp_path / "none.parquet"])
    assert "No such file" in sentence(caught) and not (root / "mine" / "train").exists()
    for options in (["--name=x"], ["--config=ai2d", "a.parquet"], ["a.parquet", "--name=x", "--revision=main"],
                    ["a.parquet"], ["a.parquet", "--name=../x"], ["a.parquet", "--name=frozen"],
                    ["--config=ai2d", "--size=0"], ["--config=ai2d", "--length=many"]):
        monkeypatch.setattr(sys, "argv", ["cauldron.py", *options])
        with pytest.raises(SystemExit):
            runpy.run_path(cauldron.__file__, run_name="__main__")
        assert "cauldron.py: error: " in capsys.readouterr().err.splitlines()[-1]
