"""data/course.py both ways, and train_4m.py on what it makes of tiny folders in the course's layout."""
import dataclasses
import json
import math
import shutil
import sys
import types

import numpy as np
import pytest
import tiktoken
import torch

import course
import eval_masks
import runs
import scenes
import shards
import streams
import train_4m
from course_loss import CourseLoss
from train_4m import Fault

BYTES = tiktoken.Encoding("bytes", pat_str=streams.PATTERN, mergeable_ranks={bytes([i]): i for i in range(256)},
                          special_tokens={"<|endoftext|>": 256})  # in the place of GPT-2, which comes from a network
SMALL = {"LENGTH": 16, "DIGITS": (32, 12), "PAD": 257, "START": 258, "END": 259, "TEXT_VOCAB": 320}
DIMS = {"dim": 32, "head_dim": 16, "enc_depth": 1, "dec_depth": 1}
ARGV = ["--track=course", "--precision=fp32", *(f"--{key}={value}" for key, value in DIMS.items()),
        "--batch=8", "--micro_batch=4", "--budget=16", "--image_targets=8", "--text_targets=8", "--word_steps=0"]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder that stands in for data/."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setattr(course, "ROOT", folder)
    monkeypatch.setattr(course, "load_gpt2", lambda: BYTES)
    return folder


@pytest.fixture
def small(monkeypatch):
    """Shorter texts and pictures, and fewer tokens."""
    for name, value in SMALL.items():
        monkeypatch.setattr(course, name, value)


def write_folder(root, **splits):
    """The course's folder with so many samples in each split: its path."""
    rng = np.random.default_rng(0)
    for split, count in splits.items():
        for i in range(count):
            for m in course.FOLDERS:
                path = course.file_of(root, split, m, f"{i:05d}")
                path.parent.mkdir(parents=True, exist_ok=True)
                if m in course.TEXTS:
                    path.write_text(json.dumps([f"{m} {i} {crop}" for crop in range(10)]))
                else:
                    np.save(path, rng.integers(0, math.prod(course.DIGITS), (10, course.LENGTH)))
    return root


def convert(root, name="course", splits=("train", "val")):
    course.convert(root, name, list(splits))


def refusal(*arguments):
    """The sentence with which course.py refuses."""
    with pytest.raises(SystemExit) as stopped:
        convert(*arguments)
    message = str(stopped.value.code)
    assert message.startswith("course.py: ") and "\n" not in message
    return message


# ------------------------------------------------------------------------------------------------------------
# From the course's folder to shards

def test_every_crop_is_an_example(small, data, tmp_path, capsys):
    root = write_folder(tmp_path / "root", train=3, val=24)
    convert(root)
    arrays, meta = shards.read(data / "course/train", course.FOLDERS, course.kinds())
    assert meta["num"] == 30
    with np.load(data / "course/val.npz") as file:
        val = dict(file)
    assert json.loads(bytes(val["modalities"])) == meta["modalities"] == course.kinds()
    for i in range(24):
        for m in course.FOLDERS:
            path = course.file_of(root, "val", m, f"{i:05d}")
            if m in course.TEXTS:
                text = list(f"{m} {i} 0".encode())
                expected = [258, *text, 259] + [257] * (14 - len(text))
            else:
                expected = np.load(path)[0]
            assert val[m].dtype == np.uint16 and val[m][i].tolist() == list(expected)
            if i < 3 and m not in course.TEXTS:
                rows = np.load(course.file_of(root, "train", m, f"{i:05d}"))
                assert (arrays[m][10 * i:10 * i + 10] == rows).all()
            elif i < 3:
                told = [bytes(row[1:row.index(259)]).decode() for row in arrays[m][10 * i:10 * i + 10].tolist()]
                assert told == [f"{m} {i} {crop}" for crop in range(10)]
    convert(root)
    assert "is there and whole" in capsys.readouterr().out
    course.file_of(root, "train", "desc", "00001").write_text(json.dumps(["another"] * 10))
    assert "was made with another source; delete it" in refusal(root)


def test_tokens_that_were_made_again_are_noticed(small, data, tmp_path):
    """Of the same names and sizes."""
    root = write_folder(tmp_path / "root", train=1, val=24)
    convert(root)
    path = course.file_of(root, "train", "rgb", "00000")
    np.save(path, np.load(path)[::-1])
    assert "was made with another source; delete it" in refusal(root)


def test_masks_of_the_validation_rows(small, data, tmp_path):
    convert(write_folder(tmp_path / "root", train=1, val=24))
    with np.load(data / "course/val.npz") as file:
        roles, course_roles, desc = file["roles"], file["course_roles"], file["desc"]
        tokens = np.concatenate([file[m] for m in course.FOLDERS], 1)
    assert roles.shape == course_roles.shape == tokens.shape == (24, 80)
    assert not roles[:, 48:][tokens[:, 48:] == 257].any(), "no padding in ours"
    assert course_roles[:, 48:64][desc == 257].any() and not course_roles[:, 64:].any(), "in the course's, no caption"
    assert set(np.unique(roles)) == set(np.unique(course_roles)) == {0, 1, 2}


def test_long_texts_are_cut():
    row = course.text_row(BYTES, "x" * 999)
    assert row == [50258] + [ord("x")] * 254 + [50259]
    assert course.text_row(BYTES, "") == [50258, 50259] + [50257] * 254


def save(array):
    return lambda path: np.save(path, array)


def write(value):
    return lambda path: path.write_text(value)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


DAMAGE = {
    "a missing modality": ("tok_depth@256", shutil.rmtree, "is missing: every split has tok_rgb@256"),
    "an empty modality": ("caption", lambda path: [file.unlink() for file in path.iterdir()], "has no *.json"),
    "a sample less": ("caption/00001.json", lambda path: path.unlink(), "is missing: there is"),
    "a sample more": ("tok_normal@256/00007.npy", save(np.zeros(3)), "is missing: there is"),
    "another shape": ("tok_depth@256/00001.npy", save(np.zeros((9, 16), int)), "(9, 16), not integers (10, 16)"),
    "fractions": ("tok_depth@256/00001.npy", save(np.zeros((10, 16))), "holds float64 (10, 16), not integers"),
    "a high token": ("tok_rgb@256/00000.npy", save(np.full((10, 16), 384)), "holds token 384, and they go from 0 to"),
    "a negative token": ("tok_rgb@256/00000.npy", save(np.full((10, 16), -1, np.int8)), "holds token -1"),
    "a truncated file": ("tok_rgb@256/00001.npy", truncate, "is damaged ("),
    "an empty file": ("tok_rgb@256/00001.npy", write(""), "is damaged ("),
    "objects": ("tok_rgb@256/00001.npy", save(np.full((10, 16), None)), "is damaged ("),
    "broken JSON": ("scene_desc/00000.json", write('["a", '), "is damaged ("),
    "nine texts": ("scene_desc/00000.json", write(json.dumps(["a"] * 9)), "does not hold a list of 10 texts"),
    "numbers": ("scene_desc/00000.json", write(json.dumps([1] * 10)), "does not hold a list of 10 texts"),
    "no list": ("caption/00000.json", write('"ten texts."'), "does not hold a list of 10 texts"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders(small, data, tmp_path, damage):
    name, spoil, what = DAMAGE[damage]
    root = write_folder(tmp_path / "root", train=1, val=2)
    spoil(root / "val" / name)
    message = refusal(root)
    assert str(root / "val" / name) in message and what in message and not list(data.iterdir())


def test_other_refusals(small, data, tmp_path, monkeypatch):
    root = write_folder(tmp_path / "root", train=1, val=2)
    assert f"{root}/test/tok_rgb@256 is missing" in refusal(root, "course", ("train", "test"))
    assert "--splits=train: give two" in refusal(root, "course", ("train",))
    assert "--splits=val,val: give two" in refusal(root, "course", ("val", "val"))
    assert "--name=../x is not a name" in refusal(root, "../x")
    assert "2 validation samples are too few" in refusal(root)
    assert not list(data.iterdir())
    (data / "other").mkdir()
    (data / "other" / "train.bin").touch()
    assert "has other things in it, such as train.bin" in refusal(root, "other")


# ------------------------------------------------------------------------------------------------------------
# Our scenes as the course's folder

def test_export_and_back(data, tmp_path):
    with np.load(shards.FROZEN / "scenes128.npz") as file:
        arrays = {m: file[m][:24] for m in course.FOLDERS}
        texts = {m: bytes(file[f"{m}_text"]).decode().split("\n")[:24] for m in course.TEXTS}
        modalities = json.loads(bytes(file["modalities"]))
    train = tmp_path / "train"
    train.mkdir()
    for m, array in arrays.items():
        np.save(train / f"{m}.npy", array[:4])
    (train / "meta.json").write_text(json.dumps({"num": 4, "modalities": modalities}))
    np.savez(tmp_path / "val.npz", **arrays)
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="has 4 scenes, not 5: delete it"):
        course.export(out, 5, train, tmp_path / "val.npz")
    course.export(out, 3, train, tmp_path / "val.npz")
    assert sorted(path.name for path in out.iterdir()) == ["train", "val"]
    file = np.load(out / "train/tok_rgb@256/00002.npy")
    assert file.dtype == np.int16 and file.shape == (10, 256), "what any version of torch takes"
    convert(out, "back")
    again, meta = shards.read(data / "back/train", course.FOLDERS)
    with np.load(data / "back/val.npz") as file:
        val = {m: file[m] for m in course.FOLDERS}
    assert meta["num"] == 30
    for rows, count, crops in (again, 3, 10), (val, 24, 1):
        for m, array in rows.items():
            if m in course.TEXTS:
                told = [bytes(row[1:row.index(50259)]).decode() for row in array.tolist()]
                assert told == [text for text in texts[m][:count] for _ in range(crops)]
            else:
                assert (array == arrays[m][:count].repeat(crops, 0)).all()


def test_scenes_course(data, tmp_path, monkeypatch):
    """data/scenes.py --course makes scenes where there are none, and exports those that there are."""
    made, written = [], []
    monkeypatch.setattr(scenes, "ROOT", data)
    monkeypatch.setattr(scenes, "make_shards", lambda size, num, *rest: made.append((size, num)))
    monkeypatch.setattr(course, "export", lambda *arguments: written.append(arguments))

    def command(*options):
        monkeypatch.setattr(sys, "argv", ["scenes.py", *options])
        scenes.main()

    out = tmp_path / "out"
    command(f"--course={out}", "--num=5")
    (data / "scenes128" / "train").mkdir(parents=True)
    command(f"--course={out}")
    assert made == [(128, 5)] and written == [(out, 5), (out, None)]
    with pytest.raises(SystemExit, match="is there already"):
        command(f"--course={tmp_path}")


def test_export_refuses(tmp_path):
    for out, message in ((tmp_path, "is there already"), (tmp_path / "new", "there is no")):
        with pytest.raises(SystemExit) as stopped:
            course.export(out, None, tmp_path / "none")
        assert message in stopped.value.code and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------
# The course's masks and loss

def course_rule(lengths, rng, budget=128):
    """The course's masking: of two budgets of U{1..budget} each modality gets the floor of its Dirichlet share; what
    is left over goes where draws have their maximum; clamped to what a modality has, as targets to what it has left."""
    left, counts = list(lengths), []
    for _ in range(2):
        total = int(rng.integers(1, budget + 1))
        count = [math.floor(share * total) for share in rng.dirichlet([1.0] * len(lengths))]
        for draw in rng.dirichlet([1.0] * len(lengths), total - sum(count)).tolist():
            count[draw.index(max(draw))] += 1
        counts.append([min(pair) for pair in zip(count, left)])
        left = [a - b for a, b in zip(left, counts[-1])]
    roles = []
    for inputs, targets, rest in zip(*counts, left):
        roles += rng.permutation(np.array([1] * inputs + [2] * targets + [0] * rest, np.uint8)).tolist()
    return roles


@pytest.mark.parametrize("lengths", [(256,) * 4, (16,) * 4])
def test_course_roles_follow_the_rule(lengths):
    ours, theirs = np.random.default_rng(3), np.random.default_rng(3)
    clamped = 0
    for _ in range(50):
        roles = eval_masks.draw_course_roles(lengths, ours)
        assert roles.dtype == np.uint8 and roles.tolist() == course_rule(lengths, theirs)
        clamped += (roles[:lengths[0]] > 0).all()
    assert (clamped > 0) == (lengths[0] == 16)


@pytest.fixture
def model_on_rows(small, data, tmp_path):
    """A small model whose predictions differ, its layout, validation tokens and what a CourseLoss needs of a Run."""
    convert(write_folder(tmp_path / "root", train=1, val=24))
    path = str(data / "course/val.npz")
    config = dataclasses.replace(train_4m.CONFIGS["course"], frozen=path, frozen_masks=path, **DIMS)
    tokens, _, modalities, _ = train_4m.read_frozen(config)
    layout = train_4m.Layout(modalities)
    torch.manual_seed(0)
    model = train_4m.Nano4M(config, layout)
    train_4m.init_weights(model)
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.5)
    run = types.SimpleNamespace(script=train_4m, config=config, rank=0, world=1, said=[])
    run.say = run.said.append
    return model, layout, tokens, run


@torch.no_grad()
def test_loss_is_the_courses(model_on_rows):
    """On the same draws: one row after another, without padding of the batch, in plain steps."""
    model, layout, tokens, run = model_on_rows
    names, rng = ["rgb", "depth", "normal", "desc"], np.random.default_rng(5)
    nats = {m: [] for m in names}
    for row in tokens:
        roles = course_rule([16] * 4, rng)
        inputs, targets = ([place for place, role in enumerate(roles) if role == wanted] for wanted in (1, 2))
        if targets:
            log_probs = model(row[None], torch.tensor([inputs]), None, torch.tensor([targets]))[0]
            for place, scores in zip(targets, log_probs):
                nats[names[place // 16]].append(-scores[row[place]].item())
    loss = CourseLoss(run)
    rng = np.random.default_rng(5)
    assert loss.roles.shape == tokens.shape
    roles = np.stack([eval_masks.draw_course_roles([16] * 4, rng) for _ in tokens])
    loss.roles = torch.from_numpy(np.pad(roles, ((0, 0), (0, 16))))
    numbers = loss.measure(model, tokens, layout)
    means = {m: sum(nats[m]) / len(nats[m]) for m in names}
    assert numbers["course_loss"] == pytest.approx(sum(means.values()) / 4, abs=1e-4)
    every = sum(nats.values(), [])
    assert numbers["course_loss_all"] == pytest.approx(sum(every) / len(every), abs=1e-4)
    assert {m: numbers[f"course_loss_{m}"] for m in names} == pytest.approx(means, abs=1e-4)
    assert "course_loss_caption" not in numbers and numbers["course_loss"] != numbers["course_loss_all"]
    assert run.said == [f"as the course counts, padding included: {numbers['course_loss']:.4f}, and "
                        f"{numbers['course_loss_all']:.4f} over all targets alike"]


# ------------------------------------------------------------------------------------------------------------
# train_4m.py

@torch.no_grad()
def test_digits_need_not_be_equal(model_on_rows):
    model, layout, tokens, _ = model_on_rows
    assert model.head_a.weight.shape == (32, 32) and model.head_b.weight.shape == (12, 32)
    places = torch.arange(layout.size).expand(len(tokens), -1)
    inputs, targets = places[:, ::3], places[:, 1::3]
    log_probs, goal = model(tokens, inputs, None, targets), tokens.gather(1, targets)
    assert log_probs.exp().sum(-1).sub(1).abs().max() < 1e-4
    y, is_image = model.hidden(tokens, inputs, None, targets), targets[0] < 48
    nll = model.image_nll(y[:, is_image].flatten(0, 1), goal[:, is_image].flatten())
    told = log_probs[:, is_image].gather(2, goal[:, is_image, None])
    assert torch.allclose(nll, -told.flatten(), atol=1e-4)
    assert goal[:, is_image].max() > 12 * 12, "ids beyond the smaller square"
    words = model.word_nll(y[:, ~is_image].flatten(0, 1), targets[:, ~is_image].flatten(), goal[:, ~is_image].flatten())
    told = log_probs[:, ~is_image].gather(2, goal[:, ~is_image, None])
    assert torch.allclose(words, -told.flatten(), atol=1e-4)


def test_model_of_the_track():
    """Of the course's own sizes, without memory."""
    config, layout = train_4m.CONFIGS["course"], train_4m.Layout(course.kinds())
    assert (config.dim, config.head_dim, config.enc_depth, config.dec_depth) == (512, 64, 6, 6)
    assert (config.batch, config.budget, config.image_targets + config.text_targets) == (512, 128, 128)
    assert layout.size == 5 * 256 and layout.end["desc"] == layout.end["caption"] == 50259
    with torch.device("meta"):
        model = train_4m.Nano4M(config, layout)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if name.startswith(("embed", "head"))}
    assert shapes["head_a.weight"] == shapes["embed_first.weight"] == (512, 512)
    assert shapes["head_b.weight"] == (125, 512)
    assert shapes["embed_pair.weight"] == (64000, 512) and shapes["embed_b.weight"] == (125, 512)
    assert shapes["head_word.weight"] == shapes["embed_word.weight"] == (50304, 512)


def test_links_are_of_what_there_is(small):
    links = train_4m.known_links(train_4m.Layout(course.kinds()))
    modalities = train_4m.read_frozen(train_4m.CONFIGS["cpu"])[2]
    ours = train_4m.known_links(train_4m.Layout(modalities))
    without_boxes = {("desc", "bbox"): ("desc",), ("desc", "bbox", "caption"): ("desc", "caption")}
    assert links == [link and (link[0], without_boxes.get(link[1], link[1])) for link in ours
                     if link != (("rgb",), ("seg", "edge"))] and len(links) == 9 == len(ours) - 1


def test_inputs_are_shared_among_what_there_is(model_on_rows):
    """A Dirichlet draw over five modalities; padding is a token."""
    _, layout, tokens, run = model_on_rows
    layout.pads.fill_(-1)
    config, tokens = dataclasses.replace(run.config, image_targets=8, text_targets=8), tokens.repeat(100, 1)
    rng = torch.Generator().manual_seed(0)
    enc_pos, _, dec_pos, counted = train_4m.course_positions(tokens, layout, 10, config, rng)
    kind, own = layout.kind[enc_pos], [layout.names.index(m) for m in course.FOLDERS]
    counts = (kind[..., None] == torch.tensor(own)).sum(1).double()  # (rows, 5)
    assert (counts.sum(1) == 10).all() and (counts.mean(0) - 2).abs().max() < 0.15
    assert counts.std(0).mean() > 1.5, "1.35 if what is not there had a share, 1.67 without"
    assert counted.all() and (dec_pos[:, :8] < layout.first_text).all() and (dec_pos[:, 8:] >= layout.first_text).all()
    assert ((tokens.gather(1, enc_pos) == 257) & (enc_pos >= layout.first_text)).any()


def paths(data):
    return [f"--data={data}/course/train", f"--frozen={data}/course/val.npz", f"--frozen_masks={data}/course/val.npz"]


def test_a_run(small, data, tmp_path, monkeypatch, capsys):
    convert(write_folder(tmp_path / "root", train=3, val=24))
    root = runs.make_root("4m", tmp_path / "run")
    argv = [*ARGV, *paths(data), "--num_steps=10", "--eval_every=5", "--quality_scenes=0"]
    runs.run_here("4m", monkeypatch, root, argv, samples=True)
    foot, out = runs.footers(root)[-1], capsys.readouterr().out
    assert foot["track"] == "course" and foot["steps"] == 10 and 0 < foot["val_loss"] < 10
    for name in ("course_loss", "course_loss_all", *(f"course_loss_{m}" for m in ("rgb", "depth", "normal", "desc"))):
        assert 0 < foot[name] < 10, name
    assert out.count("as the course counts, padding included: ") == 2, "at each evaluation"
    assert "pictures and quality numbers need our own tokenizer, judge and scenes" in out
    told = (root / "samples/4m.txt").read_text().splitlines()
    assert len(told) == 8 * 5 and told[10] == "validation row 2, from rgb"
    assert told[12] == "    true desc: desc 2 0" and told[14] == "    true caption: caption 2 0"
    assert sorted(path.name for path in (root / "samples").iterdir() if path.is_file()) == ["4m.txt"]


def test_every_id_reaches_the_model(data, tmp_path, monkeypatch):
    """Ids above 32767 as well."""
    monkeypatch.setattr(course, "LENGTH", 16)
    convert(write_folder(tmp_path / "root", train=2, val=24))
    rows = np.concatenate([np.load(data / f"course/train/{m}.npy") for m in course.FOLDERS], 1).tolist()
    seen = []

    def train_step(step, batch, *_):
        if batch.any():  # the warm-up's are all zero
            seen.extend(batch.tolist())
        return torch.tensor(1.0), 1, 1

    monkeypatch.setattr(train_4m, "train_step", train_step)
    monkeypatch.setattr(train_4m, "evaluate", lambda *_: (1.0, {}))
    monkeypatch.setattr(CourseLoss, "measure", lambda *_: {})
    root = runs.make_root("4m", tmp_path / "run")
    runs.run_here("4m", monkeypatch, root, [*ARGV, *paths(data), "--batch=20", "--num_steps=1"])
    assert sorted(seen) == sorted(rows) and max(map(max, seen)) > 60000


def test_training_refuses(small, data, tmp_path, monkeypatch):
    root = runs.make_root("4m", tmp_path / "run")

    def fault(*argv):
        with pytest.raises(Fault) as caught:
            runs.run_here("4m", monkeypatch, root, [*ARGV, *argv])
        assert "\n" not in str(caught.value) and not (root / "logs").exists()
        return str(caught.value)

    said = fault(*paths(data))
    assert f"no validation data at {data}/course/val.npz: `python data/course.py ROOT`" in said
    said = fault("--frozen=data/frozen/scenes64.npz", "--frozen_masks=data/frozen/eval_4m_64.npz")
    assert "scenes64.npz cannot be evaluated on (KeyError" in said
    convert(write_folder(tmp_path / "root", train=1, val=24))
    said = fault(*paths(data), "--data=data/none")
    assert "no training data in" in said and "`python data/course.py ROOT`" in said
    assert "--batch=16 is more than the 10 training scenes" in fault(*paths(data), "--batch=16")
    assert "up to the 48 image tokens of a scene" in fault(*paths(data), "--budget=64")
