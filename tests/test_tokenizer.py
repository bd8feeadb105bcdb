"""The image tokenizer, the text encodings, and the scenes shards and frozen sets made with them, content and check."""
import functools
import hashlib
import json
import random
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import digits
import fit_tokenizer
import judge
import questions
import raycaster
import scenes as maker
import shards as sets
import texts
import tokenizer
import world
from shards import Fault


@pytest.fixture(scope="module")
def coder():
    return tokenizer.load_tokenizer()


@pytest.fixture(scope="module")
def encoding():
    return tokenizer.load_text()


@pytest.fixture(scope="module")
def validation():
    """Pictures of the first 100 validation scenes."""
    return raycaster.render(world.load_frozen_scenes(64, 100), 64, compile=False)[0]


# ------------------------------------------------------------------------------------------------------------
# Image tokens

@pytest.mark.parametrize("height, width", [(64, 64), (128, 128), (16, 40)])
def test_shapes_and_ranges(coder, height, width):
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    ids = coder.encode(images)
    assert ids.shape == (2, height // 8, width // 8) and ids.dtype == torch.int64
    assert 0 <= ids.min() and ids.max() < 4096 == tokenizer.VOCAB
    output = coder.decode(ids)
    assert output.shape == images.shape and 0 <= output.min() and output.max() <= 1 and output.std() > 0


def test_patches_that_repeat_are_encoded_once(coder, validation, monkeypatch):
    images = validation["edge"][:30]
    seen, encode = [], coder.encode
    expected = encode(images).flatten(1).numpy()
    monkeypatch.setattr(coder, "encode", lambda part: seen.append(len(part)) or encode(part))
    ids = coder.encode_flat(images)
    assert (ids.dtype, ids.shape) == (np.uint16, (30, 64)) and (ids == expected).mean() > 0.999  # rounding may differ
    patches = {images[b, :, i:i + 8, j:j + 8].numpy().tobytes()
               for b in range(30) for i in range(0, 64, 8) for j in range(0, 64, 8)}
    assert sum(seen) == len(patches) < 30 * 64 / 2
    wide = torch.rand(2, 3, 16, 40, generator=torch.Generator().manual_seed(0))
    assert (coder.encode_flat(wide) == encode(wide).flatten(1).numpy()).mean() > 0.99


def test_wrong_input_raises(coder):
    for shape in ((3, 64, 64), (1, 1, 64, 64), (1, 3, 60, 64), (1, 3, 64, 60)):
        with pytest.raises(ValueError, match="encode takes"):
            coder.encode(torch.zeros(shape))
    for value in (-1, 4096):
        with pytest.raises(ValueError, match=str(value)):
            coder.decode(torch.tensor([[[5, value]]]))
    for rows in (1, 2, 4):  # rows as the shards hold them are no grid
        with pytest.raises(ValueError, match="decode takes"):
            coder.decode(torch.zeros(rows, 64, dtype=torch.long))


def test_quantise_rounds_and_passes_the_gradient(coder):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    digits = coder.quantise(images)
    assert digits.shape == (2, 4, 4, 4) and (digits - digits.round()).abs().max() < 1e-5
    assert 0 <= digits.round().min() and digits.round().max() <= 7 and digits.round().unique().numel() > 2
    smooth = 7 * torch.sigmoid(coder.encoder(images * 2 - 1))
    assert (digits - smooth).abs().max() <= 0.5 + 1e-5
    weight = torch.rand(digits.shape, generator=torch.Generator().manual_seed(2))
    rounded, unrounded = (torch.autograd.grad((x * weight).sum(), images)[0] for x in (digits, smooth))
    assert rounded.abs().max() > 0
    torch.testing.assert_close(rounded, unrounded)


def test_ids_and_digits_are_a_bijection(monkeypatch):
    model, seen = tokenizer.Tokenizer(fine=4, mid=4, dim=4), []
    monkeypatch.setattr(model, "reconstruct", lambda digits: seen.append(digits) or digits)
    monkeypatch.setattr(model, "quantise", lambda images: seen[0] + 1e-6)
    ids = torch.arange(4096).view(1, 64, 64)
    model.decode(ids)
    digits = seen[0].flatten(2)[0].T
    assert digits.unique(dim=0).shape == (4096, 4) and digits.unique().tolist() == list(range(8))
    assert torch.equal(model.encode(torch.zeros(1, 3, 8, 8)), ids)


def test_weights_are_small_and_finite():
    weights = load_file(tokenizer.WEIGHTS)
    assert tokenizer.WEIGHTS.stat().st_size <= 6e6
    assert all(w.dtype == torch.float16 and w.isfinite().all() for w in weights.values())
    assert set(weights) == set(tokenizer.Tokenizer().state_dict())


def test_reconstruction_quality(coder, validation):
    psnr = fit_tokenizer.mean_psnr(coder, validation)
    assert psnr["rgb"] >= 33 and psnr["depth"] >= 37 and psnr["normal"] >= 31.5 and psnr["edge"] >= 24, psnr


# ------------------------------------------------------------------------------------------------------------
# Text tokens

def test_scene_texts_round_trip(encoding):
    objects = texts.facts(world.build(world.sample_scenes(200, seed=21)), torch.zeros(200, 1, 1, dtype=torch.long))
    for b, o in enumerate(objects):
        for m, text in (("desc", texts.describe(o)), ("caption", texts.caption(o, random.Random(b)))):
            row = tokenizer.text_tokens(encoding, text, texts.LENGTHS[m])
            assert tokenizer.decode_text(encoding, row) == text
            end = row.index(tokenizer.TEXT_VOCAB - 2)
            assert len(row) == texts.LENGTHS[m] and max(row[:end]) < tokenizer.TEXT_VOCAB - 2
            assert set(row[end + 1:]) <= {tokenizer.TEXT_VOCAB - 1}
            assert tokenizer.decode_text(encoding, np.array(row, np.uint16)) == text


def test_a_fact_is_a_token(encoding):
    desc = "Object 1 - Position: x=31 y=81 Shape: cube Color: blue Material: metal. Object 2 - Position: x=68 y=18"
    pieces = [encoding.decode([token]) for token in encoding.encode_ordinary(desc)]
    assert pieces == ["Object 1 - Position:", " x=31 y=81", " Shape: cube", " Color: blue", " Material: metal.",
                      " Object 2 - Position:", " x=68 y=18"]
    for name, words in (("Shape", raycaster.SHAPES), ("Color", raycaster.COLORS), ("Material", raycaster.MATERIALS)):
        assert all(len(encoding.encode_ordinary(f" {name}: {word}{'.' * (name == 'Material')}")) == 1 for word in words)


def test_places_are_tokens(encoding):
    codes = world.sample_scenes(3000, seed=22).view(-1, len(world.FIELDS))
    met = {(row, column) for *_, row, column in codes.tolist() if row >= 0}
    for path in (tokenizer.TEXT, tokenizer.QA):
        places = tokenizer.place_tokens(tokenizer.load_text(path))
        assert {(row, column) for _, row, column in places} >= met and len(met) > 30, path
        assert len({token for token, _, _ in places}) == len(places) and max(places)[0] < tokenizer.TEXT_VOCAB - 2
    for token, row, column in tokenizer.place_tokens(encoding):
        assert encoding.decode([token]) == f" x={int(12.5 * column + 6.25)} y={int(12.5 * row + 6.25)}"
    assert maker.modalities(64)["desc"]["places"] == tokenizer.place_tokens(encoding)


def test_text_edges(encoding):
    assert encoding.n_vocab == tokenizer.TEXT_VOCAB == encoding.encode_single_token("<|pad|>") + 1
    assert encoding.encode_single_token("<|end|>") == tokenizer.TEXT_VOCAB - 2
    foreign = "Größe 12345,\n\tdéjà vu <|end|> 球"  # any text can be written, special tokens never come from text
    row = tokenizer.text_tokens(encoding, foreign, 80)
    assert tokenizer.decode_text(encoding, row) == foreign
    size = row.index(tokenizer.TEXT_VOCAB - 2) + 1
    assert tokenizer.text_tokens(encoding, foreign, size) == row[:size]
    with pytest.raises(ValueError, match=f"{size} tokens does not fit {size - 1}"):
        tokenizer.text_tokens(encoding, foreign, size - 1)
    assert tokenizer.text_tokens(encoding, "", 3) == [574, 575, 575]
    word = encoding.encode_ordinary("A cube")
    assert tokenizer.decode_text(encoding, [575, *word, 700]) == "A cube", "ids of no text are left out"
    assert tokenizer.decode_text(encoding, encoding.encode_ordinary("球")[:1]) == "", "a part of a character"


# ------------------------------------------------------------------------------------------------------------
# Shards

@pytest.fixture
def shards(tmp_path, monkeypatch):
    """Makes 12 scenes, 5 a chunk, in a folder of its own."""
    monkeypatch.setattr(maker, "CHUNK", 5)
    monkeypatch.setattr(raycaster, "RENDER_BATCH", {"cpu": 5})
    monkeypatch.setattr(maker, "render", functools.partial(raycaster.render, compile=False))

    monkeypatch.setattr(maker, "looks_of_validation", tuple)

    def make(name="a", num=12, seed=1):
        monkeypatch.setattr(maker, "ROOT", tmp_path / name)
        maker.make_shards(64, num, seed, "cpu")
        return tmp_path / name / "scenes64" / "train"
    return make


def read(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_interrupted_shards_continue(shards, monkeypatch):
    whole, make, calls = shards("whole"), maker.make, []

    def interrupted(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return make(*arguments, **keywords)
    monkeypatch.setattr(maker, "make", interrupted)
    for name in ("same", "other"):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            shards(name)
    calls[:] = 3 * [None]
    assert read(shards("same")) == read(whole) and len(calls) == 5, "the first chunk was made again, or data differ"
    kinds = maker.modalities(64)
    assert set(read(whole)) == {f"{m}.npy" for m in kinds} | {"scene.npy", "meta.json"}
    arrays = {m: np.load(whole / f"{m}.npy", mmap_mode="r") for m in kinds}
    for m, a in arrays.items():
        assert (a.shape, a.dtype) == ((12, kinds[m]["length"]), np.uint16) and a.max() < kinds[m]["vocab"], m
        assert len(np.unique(a, axis=0)) > 8, m
    shorter = shards("other", num=7)  # a half-made set of another size is not continued
    assert np.load(shorter / "rgb.npy").shape == (7, 64) and not shorter.with_name("train.part").exists()


def test_finished_shards_are_verified(shards, capsys):
    folder = shards()
    times = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    shards()
    assert "verified" in capsys.readouterr().out and times == {p: p.stat().st_mtime_ns for p in folder.iterdir()}

    def refusal(**arguments):
        with pytest.raises(Fault) as stopped:
            shards(**arguments)
        assert "\n" not in str(stopped.value)
        return str(stopped.value)
    assert "num" in refusal(num=13) and "seed" in refusal(seed=2)
    data = bytearray((folder / "depth.npy").read_bytes())
    data[-7] ^= 4
    (folder / "depth.npy").write_bytes(data)
    assert "depth.npy" in refusal()
    (folder / "meta.json").write_text((folder / "meta.json").read_text()[:-9])
    assert "damaged" in refusal()


def test_content(shards):
    """The hash changes with any change of what is exact, and does not with pictures, which machines round otherwise."""
    folder = shards()
    meta = json.loads((folder / "meta.json").read_text())
    content = sets.content_sha256(folder)
    assert content == meta["content_sha256"] != sets.content_sha256(folder.parent)
    parts = []
    for name in ("bbox", "caption", "desc", "scene"):  # in this order
        array = np.load(folder / f"{name}.npy")
        parts += [f"{name} {array.dtype.str} {array.shape}".encode(), array.tobytes()]
    assert content == hashlib.sha256(b"".join(parts)).hexdigest()
    for name in [*maker.IMAGES, "bbox", "caption", "desc", "scene"]:
        data = (folder / f"{name}.npy").read_bytes()
        (folder / f"{name}.npy").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert (sets.content_sha256(folder) == content) == (name in maker.IMAGES), name
        (folder / f"{name}.npy").write_bytes(data)
    array = np.load(folder / "scene.npy")
    np.save(folder / "scene.npy", array.astype(np.int64))
    assert sets.content_sha256(folder) != content
    (folder / "scene.npy").unlink()
    assert sets.content_sha256(folder) != content


def test_check(shards, monkeypatch):
    """A set that this machine would make is recognised; one that differs, in one sentence, is not."""
    folder = shards()
    monkeypatch.setattr(maker, "CHECKED", 8)

    def check(num=12):
        return maker.check_shards(64, num, 1, "cpu", "scenes")

    def refusal(**arguments):
        with pytest.raises(Fault) as stopped:
            check(**arguments)
        assert "\n" not in str(stopped.value)
        return str(stopped.value)

    def spoil(name, edit):
        """Change an array and have meta.json speak of the new one."""
        array, path = np.load(folder / f"{name}.npy"), folder / "meta.json"
        before = array.copy(), path.read_text()
        edit(array)
        np.save(folder / f"{name}.npy", array)
        meta = json.loads(path.read_text())
        meta["sha256"][name], meta["content_sha256"] = sets.sha256(folder / f"{name}.npy"), sets.content_sha256(folder)
        path.write_text(json.dumps(meta))
        found = refusal()
        np.save(folder / f"{name}.npy", before[0])
        path.write_text(before[1])
        return found

    said = check()
    assert said.startswith(f"{folder}: content {sets.content_sha256(folder)[:16]}, all of it the same again") and "\n" not in said
    assert all(f"{m} 100.00 %" in said for m in maker.IMAGES)
    assert "another num" in refusal(num=13)

    def another_token(array):
        array[:, :2] ^= 1  # one in 32
    assert "of rgb made again 96.88 % are the same, and 99.5 % should be" in spoil("rgb", another_token)

    def another_word(array):
        array[5] = array[4]
    assert "of caption made again" in spoil("caption", another_word)

    def another_scene(array):
        array[7, 1] = (array[7, 1] + 1) % 8
    assert "of scene made again" in spoil("scene", another_scene)
    path = folder / "meta.json"
    path.write_text(path.read_text().replace(sets.content_sha256(folder), "0" * 64))
    assert "its content is not that of meta.json" in refusal()
    monkeypatch.setattr(maker, "ROOT", folder)
    assert "there is no" in refusal()


def test_pixels_may_be_rounded_otherwise():
    stored = np.full((2, 3, 4, 4), 100, np.uint8)
    again = stored.copy()
    again[0, 0, 0, :3] = 98, 102, 103
    assert maker.alike("pixels", stored, again) == 1 - 1 / 96 and maker.alike("rgb", stored, again) == 1 - 3 / 96
    assert maker.alike("pixels32", stored, again[:1]) == 0


@pytest.mark.parametrize("argument", ["--size=65", "--num=0"])
def test_command_line_refuses(argument, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scenes.py", argument])
    with pytest.raises(SystemExit, match=argument[:6].strip("=")) as stopped:
        maker.main()
    assert "\n" not in stopped.value.code


@pytest.mark.parametrize("words, num", [("", 20000), ("--size=128", 200000), ("--objects --size=128", 200000),
                                        ("--size=128 --num=7", 7)])
def test_the_gpu_tracks_take_more_scenes(words, num, monkeypatch):
    """By default, so that every hint to make a set again makes the one that the track is about."""
    made = []
    monkeypatch.setattr(maker, "make_shards", lambda size, num, *_: made.append(num))
    monkeypatch.setattr(maker, "write_stream", lambda: None)
    monkeypatch.setattr(sys, "argv", ["scenes.py", *words.split()])
    maker.main()
    assert made == [num]


# ------------------------------------------------------------------------------------------------------------
# Frozen validation sets

def test_report_is_one_section_of_the_readme():
    readme = (tokenizer.FROZEN / "README.md").read_text()
    for text in fit_tokenizer.REPORT, judge.REPORT, digits.REPORT, questions.REPORT:
        assert text.startswith("## ") and "\n#" not in text, "what else is there stays"
        fixed = [line for line in text.splitlines() if line and "{" not in line]
        assert len(fixed) > 1 and not set(fixed) - set(readme.splitlines())


@pytest.mark.parametrize("size", [64, 128])
def test_frozen_set(size, encoding):
    with np.load(tokenizer.FROZEN / f"scenes{size}.npz") as file:
        arrays = dict(file)
    codes, kinds = arrays["scene"], maker.modalities(size)
    assert json.loads(arrays["modalities"].tobytes()) == kinds
    assert set(arrays) == {*kinds, "desc_text", "caption_text", "modalities", "scene"}
    assert (codes.shape, codes.dtype) == ((2000, 21), np.int32)
    with np.load(tokenizer.FROZEN / "scenes64.npz") as file:
        assert np.array_equal(codes, file["scene"]), "the scenes are the same at any size"
    for m, kind in kinds.items():
        assert (arrays[m].shape, arrays[m].dtype) == ((2000, kind["length"]), np.uint16), m
        assert arrays[m].max() < kind["vocab"], m
        assert m == "bbox" or len(np.unique(arrays[m], axis=0)) > 1000, f"{m} hardly varies"
    for m in ("desc", "caption"):
        lines = arrays[f"{m}_text"].tobytes().decode().split("\n")
        assert lines == [tokenizer.decode_text(encoding, row) for row in arrays[m]]
    assert (world.load_frozen_scenes(size, 10)["shape"].numpy() == codes[:10, ::7]).all()
    for b, boxes in enumerate(map(texts.parse_boxes, arrays["bbox"])):
        objects = texts.parse_desc(tokenizer.decode_text(encoding, arrays["desc"][b]))
        assert [box[4] for box in boxes] == [o["shape"] for o in objects]
        assert len(objects) == (codes[b, ::7] >= 0).sum()


def test_frozen_tokens_are_those_of_the_pictures(coder, validation):
    with np.load(tokenizer.FROZEN / "scenes64.npz") as arrays:
        for m in maker.IMAGES:
            ids = coder.encode(validation[m][:50]).flatten(1).numpy()
            assert (ids == arrays[m][:50]).mean() >= maker.SAME_TOKENS, m
