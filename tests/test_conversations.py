"""data/conversations.py: pictures with questions and answers become a set that the VLM trains on, or one sentence."""
import dataclasses
import json
import math
import runpy
import sys
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import conversations
import questions
import runs
import show_vlm
import tokenizer
import train_vlm
from test_train_vlm import SMALL, make_root, run_here

PICTURES = np.random.default_rng(0).integers(0, 256, (10, 64, 64, 3), np.uint8)
PAD = tokenizer.TEXT_VOCAB - 1


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder that stands in for data/."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setattr(conversations, "ROOT", folder)
    return folder


@pytest.fixture
def chats(tmp_path):
    """A file of ten conversations beside their pictures."""
    folder = tmp_path / "chats"
    (folder / "photos").mkdir(parents=True)
    for i, array in enumerate(PICTURES):
        Image.fromarray(array).save(folder / f"photos/{i}.png")
    return write(folder / "chats.jsonl", map(row, range(10)))


def turns(i):
    return [(f"Which number is it, {i} or {i + 1}?", f"Größe {i}."), ("Sure?", "Yes")][:1 + i % 2]


def row(i):
    """The row of conversation i, of one turn or of two."""
    if i % 2:
        return {"image": f"photos/{i}.png", "turns": [[question, f"{answer}\n"] for question, answer in turns(i)]}
    (question, answer), = turns(i)
    return {"image": f"photos/{i}.png", "question": question.replace(" ", "\r\n"), "answer": answer}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make(path, **options):
    conversations.main(path, **{"name": "chats", "images": None, "size": 64, "length": 512, **options})


def refusal(path, **options):
    """The one line that it ends with."""
    with pytest.raises(SystemExit) as caught:
        make(path, **options)
    text = str(caught.value)
    assert text.startswith("conversations.py: ") and "\n" not in text
    return text


def load(folder):
    """{array: (N + n, ...)} of a set, training and validation one after the other."""
    with np.load(folder / "val.npz", allow_pickle=False) as arrays:
        return {m: np.concatenate([np.load(folder / "train" / f"{m}.npy"), arrays[m]])
                for m in ("pixels", "qa", "answer", "family")}


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_conversations_come_out_as_they_went_in(root, chats, capsys):
    make(chats)
    said = capsys.readouterr().out
    assert "9 conversations for training and 1 for validation" in said and "left out" not in said
    assert "python train_vlm.py --data=data/chats/train --frozen=data/chats/val.npz\n" in said
    arrays, encoding = load(root / "chats"), tokenizer.load_text(tokenizer.QA)
    length = arrays["qa"].shape[1]
    assert {m: (array.shape, array.dtype) for m, array in arrays.items()} == {
        "pixels": ((10, 3, 64, 64), np.uint8), "qa": ((10, length), np.uint16), "answer": ((10, length), np.uint8),
        "family": ((10, 2), np.uint8)}
    assert (arrays["qa"] != PAD).sum(1).max() == length and not arrays["family"].any()
    meta = json.loads((root / "chats/train/meta.json").read_text())
    assert meta["num"] == 9 and meta["modalities"] == {"qa": {"length": length, "vocab": 576, "pad": PAD}}
    number = {array.transpose(2, 0, 1).tobytes(): i for i, array in enumerate(PICTURES)}
    found = [number[picture.tobytes()] for picture in arrays["pixels"]]
    assert sorted(found) == list(range(10))
    for i, tokens, marks in zip(found, arrays["qa"], arrays["answer"]):
        expected = questions.encode(encoding, [(0, *turn) for turn in turns(i)], length)
        assert tokens.tolist() == expected[0] and marks.tolist() == expected[1] and marks.max() == 1 + i % 2

    before = times(root)
    make(chats)
    assert "is there and whole" in capsys.readouterr().out
    for options in ({"size": 32}, {"length": 99}):
        assert f"was made with another {', '.join(options)};" in refusal(chats, **options)
    Image.fromarray(255 - PICTURES[0]).save(chats.parent / "photos/0.png")
    assert "was made with another content;" in refusal(chats)
    Image.fromarray(PICTURES[0]).save(chats.parent / "photos/0.png")
    write(chats, map(row, range(9)))
    assert "was made with another file, content;" in refusal(chats) and times(root) == before


def test_ten_are_enough_to_train_on(root, chats, tmp_path, monkeypatch):
    make(chats)
    files = {"data": f"{root}/chats/train", "frozen": f"{root}/chats/val.npz"}
    folder = make_root(tmp_path / "root")
    run_here(monkeypatch, folder, [*SMALL, *(f"--{key}={value}" for key, value in files.items()), "--num_steps=2"])
    footer, = runs.footers(folder)
    assert footer["steps"] == 2 and math.isfinite(footer["val_loss"]) and footer["eval_targets"] > 2
    frozen = train_vlm.read_frozen(dataclasses.replace(train_vlm.CONFIGS["cpu"], **files))[:4]
    shown = show_vlm.Show(train_vlm, types.SimpleNamespace(options=train_vlm.Options()), frozen, None)
    assert len(shown.pixels) == 1 == len(shown.wanted[0]), "its answers are compared with the true ones"


def test_rows_that_cannot_be_used(root, chats, capsys):
    """They are counted and named by their lines."""
    good = [json.dumps(row(i)).encode() for i in range(4)]
    (chats.parent / "photos/text.png").write_text("no picture")
    data = (chats.parent / "photos/0.png").read_bytes()
    (chats.parent / "photos/half.png").write_bytes(data[:len(data) // 2])
    about = b'"question": "a", "answer": "b"'
    lines = [
        b"\xef\xbb\xbf" + good[0] + b"\r", b" ", b"{", b"[1]", b'{"image": 7, ' + about + b"}",
        b'{"image": "photos/1.png", "question": "a", "answer": " "}', b'{"image": "photos/1.png", "turns": [["a"]]}',
        b'{"image": "photos/1.png", "turns": "ab"}', b'{"image": "photos/1.png", "turns": [["a", 2]]}',
        b'{"image": "photos/none.png", ' + about + b"}", b'{"image": "photos/text.png", ' + about + b"}",
        b'{"image": "photos/half.png", ' + about + b"}", b'{"image": "photos\\u0000", ' + about + b"}", good[1],
        b'{"image": "\xff", ' + about + b"}", b"[" * 100000, *good[2:]]
    chats.write_bytes(b"\n".join(lines))
    make(chats)
    said = capsys.readouterr().out
    assert "3 conversations for training and 1 for validation" in said
    line, = (line for line in said.splitlines() if line.startswith("left out: "))
    photos = chats.parent / "photos"
    for part in ("3 not JSON (line 3, line 15, line 16)", "2 without the path of an image (line 4, line 5)",
                 "4 without a question and an answer (line 6, line 7, line 8, ..)",
                 f"4 whose picture cannot be read (line 10: '{photos}/none.png' is not readable as PNG, JPEG or WebP, "
                 f"line 11: '{photos}/text.png' is not", f"line 12: '{photos}/half.png': "):
        assert part in line


def test_long_conversations(root, chats, capsys):
    long = "Is it so? " * 60
    rows = [{"image": "photos/0.png", "turns": [["a", "b"], [long, "c"], ["d", "e"]]},
            {"image": "photos/1.png", "question": long, "answer": "b"}, row(2), row(3)]
    make(write(chats, rows), length=64)
    said = capsys.readouterr().out
    assert "2 conversations for training and 1 for validation" in said and "seq_len" not in said
    assert "1 too long (line 2)" in said and "shortened to --length=64 tokens: 1 with more turns (line 1)\n" in said
    make(chats, name="longer", length=1024)
    said, length = capsys.readouterr().out, load(root / "longer")["qa"].shape[1]
    assert 112 < length < 1024 and f"val.npz --seq_len={length + 64}\n" in said and "shortened" not in said
    assert load(root / "longer")["answer"].max() == 3


def test_parquet_and_pictures_elsewhere(root, chats, tmp_path):
    make(chats)
    rows = [{"image": f"{i}.png", "turns": list(map(list, turns(i))), "question": None, "more": i} for i in range(10)]
    path = tmp_path / "mine.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    make(path, name="mine", images=chats.parent / "photos")
    expected, found = load(root / "chats"), load(root / "mine")
    assert all((found[m] == expected[m]).all() for m in expected)
    path.write_bytes(path.read_bytes()[:-9])
    assert f"{path} is damaged or no .parquet file (" in refusal(path, name="more")


def test_no_picture_is_in_both_parts():
    which = np.random.default_rng(1).permutation(np.repeat(np.arange(50), 4))
    train, held = conversations.split(which, np.random.default_rng(0))
    assert sorted([*train, *held]) == list(range(200)) and len(held) == 20
    assert not set(which[train]) & set(which[held])
    for which in (np.zeros(30, int), np.repeat([0, 1], [29, 1]), np.repeat([0, 1], [1, 29])):  # but for too few
        train, held = conversations.split(which, np.random.default_rng(0))
        assert sorted([*train, *held]) == list(range(30)) and 1 <= len(held) <= 3
    assert [len(part) for part in conversations.split(np.arange(2), np.random.default_rng(0))] == [1, 1]


def test_what_is_refused(root, chats, tmp_path, monkeypatch, capsys):
    assert refusal(tmp_path / "none") == f"conversations.py: there is no file {tmp_path / 'none'}"
    (tmp_path / "text").write_text("no JSON\n\nat all\n")
    assert refusal(tmp_path / "text") == ("conversations.py: 0 conversations that can be used are too few, 2 are the "
                                          "least; left out: 2 not JSON (line 1, line 3)")
    (tmp_path / "text").write_text("")
    assert refusal(tmp_path / "text").endswith("0 conversations that can be used are too few, 2 are the least")
    assert "2 are the least; left out: 10 whose picture cannot be read (line 1: " in refusal(chats, images=tmp_path)
    assert list(root.iterdir()) == []
    (tmp_path / "questions.jsonl").touch()
    for path, name in ((chats, "../x"), (chats, "qa64"), (tmp_path / "questions.jsonl", None)):
        assert f"--name={name or 'questions'}: give a name of letters" in refusal(path, name=name)
    for options in (["x", "--size=4"], ["x", "--length=many"], []):
        monkeypatch.setattr(sys, "argv", ["conversations.py", *options])
        with pytest.raises(SystemExit):
            runpy.run_path(conversations.__file__, run_name="__main__")
        assert "conversations.py: error: " in capsys.readouterr().err.splitlines()[-1]
