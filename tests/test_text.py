"""Your own text: data/text.py, and train_gpt.py and train_maskgit.py on what it makes. Without a network."""
import dataclasses
import gzip
import json
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken

import checks
import runs
import show_maskgit
import streams
import text
import text_rows
import train_gpt
import train_maskgit

DOCUMENTS = [f"Chapter {i:02}\n" + "word after word " * 6 for i in range(20)]
DIMS = ["--track=cpu", "--dim=64", "--head_dim=32", "--depth=1", "--batch=4", "--precision=fp32", "--num_steps=2"]


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder that stands in for data/."""
    folder = tmp_path / "data"
    folder.mkdir()
    for module in (text, streams):
        monkeypatch.setattr(module, "ROOT", folder)
    return folder


def write(folder, documents=DOCUMENTS):
    """A file of each document: their paths."""
    folder.mkdir()
    for i, document in enumerate(documents):
        (folder / f"{i:02}.md").write_bytes(document.encode())
    return sorted(folder.iterdir())


def refusal(*arguments, **options):
    """The sentence that main ends with."""
    with pytest.raises(SystemExit) as caught:
        text.main(*arguments, **options)
    message = str(caught.value)
    assert message.startswith("text.py: ") and "\n" not in message
    return message


def read_set(folder):
    """What meta.json says, and the documents for training and for validation."""
    meta = json.loads((folder / "meta.json").read_text())
    decode, documents = streams.codec(meta)[1], {}
    for name in ("train", "val"):
        tokens = streams.read_bin(folder / f"{name}_000000.bin").tolist()
        if meta["document_start"] is None:
            documents[name] = decode(tokens).decode().split("\n\n")
            continue
        starts = [i for i, token in enumerate(tokens) if token == meta["document_start"]]
        assert starts[0] == 0
        documents[name] = [decode(tokens[a + 1:b]).decode() for a, b in zip(starts, [*starts[1:], len(tokens)])]
    return meta, documents["train"], documents["val"]


def names(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# ------------------------------------------------------------------------------------------------------------
# Vocabularies

def test_bytes(root, tmp_path):
    paths = write(tmp_path / "book")
    paths[3].write_bytes(b"\xef\xbb\xbf" + DOCUMENTS[3].encode())
    paths[4].write_bytes(DOCUMENTS[4].replace("\n", "\r\n").encode())
    text.main(paths, name="mine")
    assert names(root) == {"mine"} | {f"mine/{name}" for name in ("train_000000.bin", "val_000000.bin", "meta.json")}
    meta, train, val = read_set(root / "mine")
    assert (meta["vocab"], meta["document_start"], meta["encoding"]) == (256, None, "bytes")
    assert len(val) == 2 and sorted(train + val) == DOCUMENTS and (train, val) == (sorted(train), sorted(val))
    assert val != DOCUMENTS[-2:], "drawn"
    text.main(paths, name="again")
    assert read_set(root / "again")[1:] == (train, val), "with a seed"


def test_learnt(root, tmp_path, capsys):
    documents = [*DOCUMENTS[1:], DOCUMENTS[0] + "<|endoftext|> is text here"]
    text.main(write(tmp_path / "book", documents), vocab="265", name="mine")
    meta, train, val = read_set(root / "mine")
    assert (meta["vocab"], meta["document_start"], meta["encoding"]) == (265, 264, "mine")
    assert sorted(train + val) == sorted(documents) and "mine/mine.tiktoken" in names(root)
    assert "too short for more" not in capsys.readouterr().out
    text.main(sorted((tmp_path / "book").iterdir()), vocab="2048", name="more")
    meta, train, val = read_set(root / "more")
    assert 265 < meta["vocab"] < 2048 and meta["document_start"] == meta["vocab"] - 1
    assert sorted(train + val) == sorted(documents)
    assert f"too short for more than {meta['vocab']:,} tokens" in capsys.readouterr().out
    assert streams.codec(meta)[1](list(range(meta["vocab"]))), "every id is a token"


def test_gpt2(root, tmp_path, monkeypatch):
    paths, ranks = write(tmp_path / "book"), {bytes([i]): i for i in range(256)}
    merges = tiktoken.Encoding("gpt2", pat_str=streams.PATTERN, mergeable_ranks=ranks,
                               special_tokens={"<|endoftext|>": 50256})
    for module in (text, streams):
        monkeypatch.setattr(module, "load_gpt2", lambda: merges)
    text.main(paths, name="mine", vocab="gpt2")
    meta, train, val = read_set(root / "mine")
    assert (meta["vocab"], meta["document_start"], meta["encoding"]) == (50257, 50256, "gpt2")
    assert sorted(train + val) == DOCUMENTS


# ------------------------------------------------------------------------------------------------------------
# Files

def write_parquet(path, **columns):
    pq.write_table(pa.table(columns), path, row_group_size=1)


def test_every_kind_of_file(root, tmp_path, capsys):
    files = ("notes.jsonl", "b.jsonl.gz", "c.parquet", "d.TXT.gz", "e.rst")
    a, b, c, d, e = paths = [tmp_path / name for name in files]
    a.write_text(json.dumps({"id": 1, "body": DOCUMENTS[0]}) + '\r\n\n{"body": null}\n')
    b.write_bytes(gzip.compress(json.dumps({"body": "é" + DOCUMENTS[1]}).encode()))
    write_parquet(c, id=[1, 2, 3], story=[DOCUMENTS[2], None, DOCUMENTS[3]])
    d.write_bytes(gzip.compress(DOCUMENTS[4].encode()))
    e.touch()
    text.main([*paths, a], field="body", column="story")
    meta, train, val = read_set(root / "notes")
    longest = "é" + DOCUMENTS[1]  # its last tenth is for validation
    assert sorted(train) == sorted([DOCUMENTS[0], longest[:-len(val[0])], *DOCUMENTS[2:5]])
    assert val == [longest[-(len(longest) // 10):]]
    assert "warning: 3 of 8 documents are empty" in capsys.readouterr().out


@pytest.mark.parametrize("name, data, message", [
    ("a.txt", "née".encode("latin-1"), "a.txt is not UTF-8 text at byte 1:"),
    ("a.txt.gz", gzip.compress(b"abc\xff", mtime=0), "a.txt.gz is not UTF-8 text at byte 3:"),
    ("a.txt.gz", b"no gzip", "is damaged or not packed by gzip"),
    ("a.txt.gz", gzip.compress(b"abc" * 99, mtime=0)[:-9], "is damaged or not packed by gzip"),
    ("a.jsonl", b'{"text": "x"}\n{"text": ', "a.jsonl, line 2, is not JSON"),
    ("a.jsonl", b'\n{"body": "x", "id": 1}', "a.jsonl, line 2, has no field 'text' but body, id: pass one by --field="),
    ("a.jsonl", b"[1]", "line 1, is no record with fields"),
    ("a.jsonl", b'{"text": 3}', "line 1, field 'text' is no text but of type int"),
    ("a.jsonl", b'{"text": "a\\ud800"}', "line 1, field 'text' has half of a character, at character 1"),
    ("a.parquet", b"PAR1", "is damaged or no .parquet file"),
    ("a.parquet.gz", b"", "unpack it first"),
    ("a.txt", b"short", "too short to train on"),
    ("a.txt", b"still short", "too short to train on"),
    ("a.txt", b" \n", "there is no text in these files"),
])
def test_files_that_cannot_be_used(root, tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    assert message in refusal([path]) and not names(root)


def test_columns_that_cannot_be_used(root, tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, story=["x"], number=[3])
    assert "a.parquet has no column 'text' but story, number: pass one by --column=" in refusal([path])
    assert "row 1, column 'number' is no text but of type int" in refusal([path], column="number") and not names(root)


def test_no_files(root, tmp_path):
    assert f"{tmp_path} is a folder: name the files in it, for example {tmp_path}/*.txt" in refusal([tmp_path])
    assert f"there is no file {tmp_path}/*.md" in refusal([tmp_path / "*.md"])


@pytest.mark.parametrize("options, message", [
    ({"name": "mine", "vocab": "70000"}, "--vocab=70000 is too large: tokens have 16 bits, so there are 65,536"),
    ({"name": "mine", "vocab": "256"}, "--vocab=256 is too small"),
    ({"name": "mine", "vocab": "many"}, "--vocab=many is not bytes, gpt2 or a number"),
    ({"name": "Scenes128"}, "--name=Scenes128: give a name of letters, digits, _ and -, and none that is used here"),
    ({"name": "mnist"}, "none that is used here"),
    ({"name": "text"}, "none that is used here"),
    ({"name": "../x"}, "none that is used here"),
    ({}, "--name=shakespeare: give a name"),
])
def test_options_that_cannot_be_used(root, tmp_path, options, message):
    path = tmp_path / "shakespeare.part.txt"
    path.write_text(DOCUMENTS[0])
    assert message in refusal([path], **options) and not names(root)


def test_a_set_is_made_once(root, tmp_path, capsys):
    paths = write(tmp_path / "book")
    text.main(paths, name="mine")
    before = {path: path.stat().st_mtime_ns for path in (root / "mine").iterdir()}
    text.main(paths, name="mine")
    assert "mine is there and whole" in capsys.readouterr().out
    for options in ({"vocab": "300"}, {"field": "body"}):
        assert "choose another --name or delete it" in refusal(paths, name="mine", **options)
    assert "choose another --name or delete it" in refusal(paths[1:], name="mine")
    assert before == {path: path.stat().st_mtime_ns for path in (root / "mine").iterdir()}
    (root / "mine/val_000000.bin").write_bytes(b"damaged")
    assert "or damaged: choose another --name or delete it" in refusal(paths, name="mine")
    assert not (root / "mine.part").exists()


def test_split(monkeypatch):
    note, book = "a note", "a long book " * 100
    assert text.split([book]) == ([book[:1080]], [book[1080:]]), "its last tenth"
    assert text.split([note, book]) == ([book[:1080]], [note, book[1080:]]), "a note alone would be too little"
    train, val = text.split(DOCUMENTS[:3])
    assert train[1:] == DOCUMENTS[1:3] and [train[0] + val[0]] == DOCUMENTS[:1], "a third would be too much"
    many = [f"{i:03}" for i in range(1000)]
    train, val = text.split(many)
    assert len(val) == 100 and sorted(train + val) == many
    monkeypatch.setattr(text, "MOST_VALIDATION", 60)
    assert len(text.split(many)[1]) == 20
    assert text.split([book]) == ([book[:-60]], [book[-60:]])


# ------------------------------------------------------------------------------------------------------------
# Training

def test_gpt_on_a_short_text(root, tmp_path, monkeypatch, capsys):
    path = tmp_path / "note.txt"
    path.write_text(("the quick brown fox " * 3)[:60])
    text.main([path])
    runs.run_here("gpt", monkeypatch, tmp_path, [*DIMS, "--grams=64", "--orders=2", "--data=note"])
    said = "train_gpt.py: 54 training and 6 validation tokens are few: this run takes --eval_tokens=5 --context=52\n"
    assert capsys.readouterr().out.count(said) == 1
    footer, = runs.footers(tmp_path)
    assert footer["eval_targets"] == 5 and footer["tokens"] == 2 * 4 * 52


def test_only_short_texts_change_a_run(monkeypatch, capsys):
    script = types.SimpleNamespace(HERE=Path("train_gpt.py"))

    def fit(*tokens, **fields):
        config = dataclasses.replace(train_gpt.CONFIGS["cpu"], context=64, eval_tokens=100, **fields)
        checks.fit_short_text(script, config, *tokens)
        return config.context, config.eval_tokens

    assert fit(66, 101) == (64, 100) and not capsys.readouterr().out
    assert fit(65, 100) == (63, 99) and fit(4, 2) == (2, 1)
    assert fit(0, 101, num_steps=0) == (64, 100), "the context is the checkpoint's"
    capsys.readouterr()
    monkeypatch.setenv("RANK", "1")
    assert fit(65, 100) == (63, 99) and not capsys.readouterr().out
    for tokens in ((3, 101), (66, 1)):
        with pytest.raises(ValueError, match="are too few"):
            fit(*tokens)


def test_shards_of_modded_nanogpt(root, tmp_path, monkeypatch):
    (root / "web").mkdir()
    for name, first in (("train_000001", 50000), ("train_000002", 10), ("val_000000", 7)):
        streams.write_bin(root / f"web/fineweb_{name}.bin", first + np.arange(200))
    monkeypatch.setattr(train_gpt, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    config = dataclasses.replace(train_gpt.CONFIGS["cpu"], data="web", eval_tokens=10)
    for _ in range(2):
        shards, meta, _ = train_gpt.read_streams(config)
        assert [shard[0] for shard in shards] == [50000, 10] and train_gpt.read_validation(config)[0][0] == 7
        assert meta == {"vocab": 50257, "document_start": 50256, "encoding": "gpt2"}
    streams.write_bin(root / "web/fineweb_train_000003.bin", np.arange(50))
    assert [len(shard) for shard in train_gpt.read_streams(config)[0]] == [200, 200, 50]


def test_maskgit(root, tmp_path, monkeypatch):
    monkeypatch.setattr(show_maskgit, "TEXT_STEPS", (1, 4))
    monkeypatch.setattr(show_maskgit, "TEXT_ROWS", 4)
    text.main(write(tmp_path / "book", DOCUMENTS * 2), name="mine", vocab="265")
    runs.run_here("maskgit", monkeypatch, tmp_path, [*DIMS, "--data=mine"], samples=True)
    tokens, _, _, modalities, _ = text_rows.read_frozen(train_maskgit, types.SimpleNamespace(data="mine"))
    assert modalities["rgb"]["vocab"] == 17 ** 2 and tokens.max() == 264
    first = streams.codec(modalities["text"])[1](tokens[0].tolist()).decode().replace("\n", "~")
    assert first.startswith("<|endoftext|>Chapter ")
    lines = (tmp_path / "samples/maskgit.txt").read_text(encoding="utf-8").split("\n")
    assert f"true          {first}" in lines
    text.main(write(tmp_path / "other", [*DOCUMENTS, "another one"] * 2), name="other", vocab="265")
    runs.run_here("maskgit", monkeypatch, tmp_path, [*DIMS, "--data=other", "--seed=1"])
    for key in "data_sha256", "eval_sha256":
        mine, other = (footer[key] for footer in runs.footers(tmp_path))
        assert mine != other and len(mine) == len(other) == 64, "a state of the one is none of the other"


def test_maskgit_on_a_page(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(show_maskgit, "TEXT_STEPS", (1, 4))
    monkeypatch.setattr(show_maskgit, "TEXT_ROWS", 4)
    path = tmp_path / "page.txt"
    path.write_text("word after word " * 50)
    text.main([path])
    argv = [argument for argument in DIMS if not argument.startswith("--batch")]
    runs.run_here("maskgit", monkeypatch, tmp_path, [*argv, "--data=page"], samples=True)
    said = "train_maskgit.py: 11 training rows of 64 tokens are few: this run takes --batch=11\n"
    assert capsys.readouterr().out.count(said) == 1
    footer, = runs.footers(tmp_path)
    assert footer["tokens"] == 2 * 11 * 64 and (tmp_path / "samples/maskgit.txt").exists()


def test_only_short_texts_change_the_batch(monkeypatch, capsys):
    script = types.SimpleNamespace(HERE=Path("train_maskgit.py"))

    def fit(rows):
        config = types.SimpleNamespace(batch=8)
        text_rows.fit_batch(script, config, rows)
        return config.batch

    assert fit(8) == 8 and fit(9) == 8 and not capsys.readouterr().out
    assert fit(7) == 7
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert fit(7) == 4 and "takes --batch=4\n" in capsys.readouterr().out
    assert fit(3) == 8, "not one for each process: a sentence follows"
    monkeypatch.setenv("RANK", "1")
    assert fit(7) == 4 and not capsys.readouterr().out


def test_maskgit_on_ids_of_16_bits(root, tmp_path, monkeypatch):
    (root / "high").mkdir()
    for name in ("train", "val"):
        streams.write_bin(root / f"high/{name}.bin", np.full(6 * 64, 50000))
    streams.finish(root / "high", {"name": "high"}, 50257, document_start=50256, encoding="gpt2")
    runs.run_here("maskgit", monkeypatch, tmp_path, [*DIMS, "--data=high"])
    assert runs.footers(tmp_path)[0]["val_loss"] < np.log(50257)
