"""Questions about scenes: a slow oracle that reads the text, balance, tokens, shards and the frozen set."""
import functools
import hashlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

import questions
import raycaster
import reports
import scenes as maker
import show
import texts
import tokenizer
import train_vlm
import world
from shards import Fault, command_for

TABLE = {"size": "small large", "color": "gray red blue green brown purple cyan yellow", "material": "rubber metal",
         "shape": "cube sphere cylinder"}
TABLE = {name: words.split() for name, words in TABLE.items()}
LENGTH = texts.LENGTHS["qa"]


@pytest.fixture(scope="module")
def encoding():
    return tokenizer.load_text(tokenizer.QA)


@pytest.fixture(scope="module")
def frozen():
    with np.load(tokenizer.FROZEN / "qa64.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def asked():
    """Four chunks of 1,000 scenes as training sets have them: the oracle's objects and the turns of every scene."""
    objects, dialogues = [], []
    for seed in range(4):
        scenes = world.build(world.sample_scenes(1000, seed))
        objects += plain(scenes)
        dialogues += questions.ask(texts.facts(scenes, torch.zeros(1000, 1, 1, dtype=torch.long)), random.Random(seed))
    return objects, dialogues


# ------------------------------------------------------------------------------------------------------------
# The oracle: it reads a question's text and answers from the scene's tensors

def plain(scenes):
    """Per scene the objects as dicts of words and exact places in the frame."""
    x, y, _ = raycaster.project(scenes)
    words = lambda b, k: {name: table[scenes[name][b, k]] for name, table in TABLE.items()}
    return [[words(b, k) | {"x": x[b, k].item(), "y": y[b, k].item()} for k in range(3) if scenes["shape"][b, k] >= 0]
            for b in range(len(x))]


def fitting(objects, phrase):
    """The objects that a phrase like `small red cubes` fits."""
    *words, noun = phrase.split()
    words += [] if noun.rstrip("s") in ("object", "thing") else [noun.rstrip("s")]
    assert all(any(word in names for names in TABLE.values()) for word in words), phrase
    return [o for o in objects if all(word in o.values() for word in words)]


def the(objects, phrase):
    found = fitting(objects, phrase)
    assert len(found) == 1, f"`the {phrase}` is {len(found)} objects"
    return found[0]


def is_beside(a, b, relation):
    """Whether a is left of b, ...; it must be clear."""
    axis = "x" if "left" in relation or "right" in relation else "y"
    assert abs(a[axis] - b[axis]) > 1 / 16, "less than half a place apart"
    return a[axis] < b[axis] if "left" in relation or relation == "behind" else a[axis] > b[axis]


def beside(objects, relation, phrase):
    target = the(objects, phrase)
    return [o for o in objects if o is not target and is_beside(o, target, relation)]


def others(objects, q, phrase):
    return [o for o in objects if o is not the(objects, phrase) and o[q] == the(objects, phrase)[q]]


def only(found, q):
    assert len(found) == 1, "`the object` is not one object"
    return found[0][q]


def number(objects, phrase):
    return len(fitting(objects, phrase))


def size(objects, phrase):
    return TABLE["size"].index(the(objects, phrase)["size"])


def same(objects, q, a, b):
    assert the(objects, a) is not the(objects, b)
    return the(objects, a)[q] == the(objects, b)[q]


def both(objects, a, b):
    assert a != b
    return number(objects, a), number(objects, b)


def listed(objects):
    """Every object, from the top of the picture to its bottom, those in a row from right to left."""
    order = sorted(objects, key=lambda o: (round(o["y"] * 8 - 0.5), -o["x"]))
    return ", ".join(f"a {o['size']} {o['color']} {o['material']} {o['shape']} at x={int(100 * o['x'])} y={int(100 * o['y'])}"
                     for o in order)


N = "((?:(?:{}) )*(?:{}))".format("|".join(w for q in ("size", "color", "material") for w in TABLE[q]),
                                  "|".join([*TABLE["shape"], "object", "thing"]))
R = "((?:to the )?left of|(?:to the )?right of|behind|in front of)"
T, Q, MANY = "(?:object|thing)", "(size|color|material|shape)", "(?:How many|What number of)"
RULES = [(family, re.compile(pattern.format(N=N, R=R, T=T, Q=Q, MANY=MANY)), answer) for family, pattern, answer in (
    (1, r"{MANY} {N}s (?:are there|can you see)\?", lambda s, a: number(s, a)),
    (1, r"{MANY} other {T}s have the {Q} of the {N}\?", lambda s, q, a: len(others(s, q, a))),
    (2, r"(?:Is there|Can you see) a {N}\?", lambda s, a: number(s, a) > 0),
    (2, r"Are there any {N}s\?", lambda s, a: number(s, a) > 0),
    (2, r"Does another {T} have the {Q} of the {N}\?", lambda s, q, a: others(s, q, a) != []),
    (2, r"Are there other {T}s that have the {Q} of the {N}\?", lambda s, q, a: others(s, q, a) != []),
    (3, r"What {Q} is the {N}\?", lambda s, q, a: the(s, a)[q]),
    (3, r"What is the {Q} of the {N}\?", lambda s, q, a: the(s, a)[q]),
    (3, r"The {N} has what {Q}\?", lambda s, a, q: the(s, a)[q]),
    (4, r"Are there more {N}s than {N}s\?", lambda s, a, b: int.__gt__(*both(s, a, b))),
    (4, r"Is the number of {N}s greater than the number of {N}s\?", lambda s, a, b: int.__gt__(*both(s, a, b))),
    (4, r"Are there fewer {N}s than {N}s\?", lambda s, a, b: int.__lt__(*both(s, a, b))),
    (4, r"Is the number of {N}s less than the number of {N}s\?", lambda s, a, b: int.__lt__(*both(s, a, b))),
    (4, r"Are there exactly as many {N}s as {N}s\?", lambda s, a, b: int.__eq__(*both(s, a, b))),
    (4, r"Is the number of {N}s the same as the number of {N}s\?", lambda s, a, b: int.__eq__(*both(s, a, b))),
    (4, r"Does the {N} have the same {Q} as the {N}\?", lambda s, a, q, b: same(s, q, a, b)),
    (4, r"Do the {N} and the {N} have the same {Q}\?", lambda s, a, b, q: same(s, q, a, b)),
    (4, r"Is the {Q} of the {N} the same as the {Q} of the {N}\?", lambda s, q, a, p, b: p == q and same(s, q, a, b)),
    (4, r"Is the {N} larger than the {N}\?", lambda s, a, b: size(s, a) > size(s, b)),
    (4, r"Is the {N} smaller than the {N}\?", lambda s, a, b: size(s, a) < size(s, b)),
    (5, r"Is the {N} {R} the {N}\?", lambda s, a, r, b: is_beside(the(s, a), the(s, b), r)),
    (5, r"Does the {N} stand {R} the {N}\?", lambda s, a, r, b: is_beside(the(s, a), the(s, b), r)),
    (5, r"(?:Is there any {T}|Are there any {T}s) {R} the {N}\?", lambda s, r, a: beside(s, r, a) != []),
    (5, r"How many {T}s (?:are|can you see) {R} the {N}\?", lambda s, r, a: len(beside(s, r, a))),
    (5, r"What {Q} is the {T} {R} the {N}\?", lambda s, q, r, a: only(beside(s, r, a), q)),
    (5, r"The {T} {R} the {N} has what {Q}\?", lambda s, r, a, q: only(beside(s, r, a), q)),
    (6, r"What is there\?|What do you see\?|What is in the picture\?", lambda s: listed(s)),
)]


def oracle(objects, question):
    """The family of a question by its form, the index of that form, and the answer."""
    found = [(family, i, answer(objects, *match.groups())) for i, (family, pattern, answer) in enumerate(RULES)
             if (match := pattern.fullmatch(question))]
    assert len(found) == 1, f"{len(found)} readings of {question!r}"
    family, form, answer = found[0]
    return family, form, {True: "yes", False: "no"}[answer] if isinstance(answer, bool) else str(answer)


def check(objects, dialogues):
    """Every turn against the oracle; how often each form was met."""
    forms = Counter()
    for scene, turns in zip(objects, dialogues, strict=True):
        for family, question, answer in turns:
            assert (family, answer) == oracle(scene, question)[::2], f"{question} {answer}: {scene}"
            forms[oracle(scene, question)[1]] += 1
    return forms


def test_answers_agree_with_the_oracle(asked):
    forms = check(*asked)
    assert sum(forms.values()) > 13_000 and set(forms) == set(range(len(RULES))) and min(forms.values()) > 50, forms


def test_oracle_notices_faults():
    cube, ball = ({"size": "large", "color": color, "material": "metal", "shape": shape, "x": x, "y": 0.5}
                  for color, shape, x in (("red", "cube", 0.2), ("blue", "sphere", 0.3)))
    assert oracle([cube, ball], "Is the red thing to the left of the large sphere?") == (5, 20, "yes")
    assert oracle([cube, ball], "How many metal objects are there?") == (1, 0, "2")
    for question in ("What shape is the metal thing?", "What color is the cylinder?", "Is the cube behind the sphere?",
                     "The thing right of the sphere has what size?", "What now?", "Is there a wooden cube?"):
        with pytest.raises(AssertionError):
            oracle([cube, ball], question)


# ------------------------------------------------------------------------------------------------------------
# Balance

def short(turns):
    """The turns with answers of one word."""
    return [turn for turn in turns if turn[0] != 6]


def test_turns_and_families(asked):
    objects, dialogues = asked
    lengths = np.bincount([len(short(turns)) for turns in dialogues], minlength=5) / len(dialogues)
    assert len(lengths) == 5 and lengths[:2].sum() < 0.02 and lengths[2:].min() > 0.15
    assert all(len({family for family, _, _ in turns}) == len(turns) for turns in dialogues)
    counts = np.bincount([family for turns in dialogues for family, _, _ in turns])
    assert counts[0] == 0 and counts[6] == len(dialogues)
    assert counts[1:6].max() - counts[1:6].min() < 0.02 * counts[1:6].sum(), counts
    for place in range(3):  # no family has a place of its own
        share = np.bincount([short(turns)[place][0] for turns in dialogues if len(turns) == 5], minlength=6)[1:]
        assert share.min() > 0.6 * share.mean() and share.max() < 1.4 * share.mean()


def test_describe_is_last_or_first(asked):
    """Asked last it gives no answer away; in about a quarter of the training conversations it is the first turn."""
    places = Counter("first" if turns[0][0] == 6 else "last" if turns[-1][0] == 6 else "" for turns in asked[1])
    assert set(places) == {"first", "last"} and 0.22 < places["first"] / places.total() < 0.28
    assert set(questions.PHRASES["describe"]["describe"]) == {question for turns in asked[1] for family, question, _ in turns
                                                              if family == 6}
    facts = texts.facts(world.build(world.sample_scenes(300, 7)), torch.zeros(300, 1, 1, dtype=torch.long))
    frozen = questions.ask(facts, random.Random(7), describe_first=0)
    assert all(turns[-1][0] == 6 and all(family < 6 for family, _, _ in turns[:-1]) for turns in frozen)


def test_descriptions_are_read_back(asked, encoding):
    """Eight tokens an object, with the comma before the next one or the line's end."""
    for objects, turns in zip(*(part[:1000] for part in asked)):
        answer, = (answer for family, _, answer in turns if family == 6)
        told = questions.parse_description(answer)
        assert [(o["x"], o["y"]) for o in told] == [(int(100 * o["x"]), int(100 * o["y"])) for o in reversed(objects)]
        assert [{name: o[name] for name in TABLE} for o in told] == [{name: o[name] for name in TABLE}
                                                                     for o in reversed(objects)]
        assert len(encoding.encode_ordinary(f" {answer}\n")) == 8 * len(objects)
    whole = "a large red metal cube at x=31 y=43"
    assert questions.parse_description(f"{whole}, a large red cube at x=1 y=2, the small, {whole}") == 2 * [
        {"x": 31, "y": 43, "size": "large", "color": "red", "material": "metal", "shape": "cube"}]
    assert questions.parse_description("") == questions.parse_description("a red cube") == []


def test_no_turn_speaks_of_a_part_of_another(asked):
    for turns in map(short, asked[1]):
        said = [[set(phrase.split()) - {"object", "thing"} for phrase in re.findall(N, question)]
                + [{answer} & set(sum(TABLE.values(), []))] for _, question, answer in turns]
        for first, second in itertools.combinations(said, 2):
            assert not any(a and b and (a <= b or b <= a) for a in first for b in second), turns


def test_answers_are_balanced(asked):
    turns = [turn for dialogue in asked[1] for turn in short(dialogue)]
    answers = defaultdict(Counter)
    for family, question, answer in turns:
        form = next(i for i, rule in enumerate(RULES) if rule[1].fullmatch(question))
        asks = next((q for q in TABLE if answer in TABLE[q]), None) or ("yes" if answer in ("yes", "no") else "number")
        answers[form if asks == "yes" else (family, asks)][answer] += 1
    for key, counts in answers.items():
        share = {answer: n / counts.total() for answer, n in counts.items()}
        if {"yes", "no"} & set(counts):
            assert max(share.values()) < 0.64, (RULES[key][1].pattern, share)
        elif key[1] == "number":
            assert max(share.values()) < 0.45 and min(share.values()) > 0.02, share
            assert sorted(share) == list("0123" if key[0] == 1 else "012")
        else:
            assert len(share) == len(TABLE[key[1]]) and max(share.values()) - min(share.values()) < 0.1, share


def test_blind_guesses_are_poor(asked, frozen):
    known = [turn for dialogue in asked[1] for turn in dialogue]
    found = questions.blind(known, questions.decode(frozen["qa"], frozen["family"]))
    assert list(found) == [1, 2, 3, 4, 5, 6] and max(found[6][1:]) < 0.02
    #                 count, exist, attribute, compare, spatial
    for family, bound in enumerate((0.45, 0.56, 0.42, 0.56, 0.47), 1):
        assert max(found[family][1:]) < bound, (questions.FAMILIES[family - 1], found[family])


def test_blind_guesser():
    known = [(1, "How many red cubes are there?", "2"), (1, "How many blue cubes are there?", "1"),
             (1, "How many red cubes are there?", "2"), (1, "How many spheres are there?", "0"),
             (1, "How many small spheres are there?", "0"), (1, "How many cylinders are there?", "0")]
    turns = [(1, "How many blue cubes are there?", "1"),  # known by its words alone
             (1, "How many green spheres are there?", "2"),  # by its template
             (1, "What number of cubes are there?", "0"),  # by its family
             (2, "Is there a cube?", "yes")]  # by nothing
    assert questions.blind(known, turns) == {1: (3, 1 / 3, 2 / 3, 1.0), 2: (1, 0.0, 0.0, 0.0)}
    lines = questions.table(known, turns).split("\n")
    assert lines[2:] == ["| count | 3 | 33.3 % | 66.7 % | 100.0 % |", "| exist | 1 | 0.0 % | 0.0 % | 0.0 % |"]


def test_a_scene_of_equal_objects():
    """Two objects that nothing tells apart: only questions that need no `the`."""
    twin = {"shape": "cube", "color": "red", "material": "metal", "size": "small", "box": [0, 0, 1, 1]}
    facts = [[twin | {"x": 31, "y": 43}, twin | {"x": 68, "y": 43}]] * 50
    for turns in questions.ask(facts, random.Random(0)):
        assert not any(" the " in question for family, question, _ in turns if family in (1, 2, 3, 5))


def test_same_on_every_run():
    """Here and in a process in which strings have other hashes."""
    code = ("import hashlib, random, sys; sys.path.insert(0, 'data'); import questions, texts, torch, world; "
            "f = texts.facts(world.build(world.sample_scenes(100, 5)), torch.zeros(100, 1, 1, dtype=torch.long)); "
            "print(hashlib.sha256(repr(questions.ask(f, random.Random(5))).encode()).hexdigest())")
    env = os.environ | {"PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"}
    there = subprocess.run([sys.executable, "-c", code], cwd=Path(maker.__file__).parents[1], env=env, check=True,
                           capture_output=True, text=True).stdout
    facts = texts.facts(world.build(world.sample_scenes(100, 5)), torch.zeros(100, 1, 1, dtype=torch.long))
    here = hashlib.sha256(repr(questions.ask(facts, random.Random(5))).encode()).hexdigest()
    assert there.strip() == here


# ------------------------------------------------------------------------------------------------------------
# Tokens

def test_encoding(encoding):
    assert encoding.n_vocab == tokenizer.TEXT_VOCAB and encoding.decode([*range(256)], errors="ignore")
    words = {word for phrases in questions.PHRASES.values() for group in phrases.values() for phrase in group
             for word in re.findall(r"(?<![\w{])\w+(?!})", phrase) if word != "s"}
    words |= {*questions.KIND, *TABLE, *(f"{noun}s" for noun in (*TABLE["shape"], "object", "thing"))}
    words |= {"object", "thing", "yes", "no", *"0123", *"to the left of right behind in front".split()}
    split = [word for word in words if len(encoding.encode_ordinary(f" {word}")) != 1]
    assert not split, f"not one token: {split}"
    for text, row in (("Question:", 1), (" Answer:", 1), ("\n", 1)):
        assert len(encoding.encode_ordinary(text)) == row


def test_tokens_and_marks(asked, encoding):
    end, pad = tokenizer.TEXT_VOCAB - 2, tokenizer.TEXT_VOCAB - 1
    for turns in asked[1][:500]:
        row, marks = questions.encode(encoding, turns, LENGTH)
        assert len(row) == len(marks) == LENGTH
        n = row.index(end)
        assert set(row[n + 1:]) <= {pad} and not any(marks[n:])
        assert encoding.decode(row[:n]) == "".join(f"Question: {q} Answer: {a}\n" for _, q, a in turns)
        for i, (_, question, answer) in enumerate(turns, 1):
            assert encoding.decode([v for v, mark in zip(row, marks) if mark == i]) == f" {answer}\n"
            before = encoding.decode(row[:marks.index(i)])
            assert before.endswith(f"Question: {question} Answer:")
            assert marks.count(i) == (8 * (answer.count(",") + 1) if turns[i - 1][0] == 6 else 2)
        assert sorted(set(marks)) == list(range(len(turns) + 1))
        family = [f for f, _, _ in turns] + [0] * (5 - len(turns))
        assert questions.decode([row], [family]) == turns
    with pytest.raises(ValueError, match="does not fit 20"):
        questions.encode(encoding, asked[1][0], 20)


def test_the_longest_questions_fit(encoding):
    thing = "large gray rubber thing"  # no description is longer
    slots = {"a": thing, "b": thing, "q": "material", "r": "to the left of", "t": "thing"}
    *longest, describe = [max(len(encoding.encode_ordinary(f"Question: {phrase.format(**slots)} Answer: no\n"))
                              for group in phrases.values() for phrase in group) for phrases in questions.PHRASES.values()]
    assert sum(sorted(longest)[1:]) + describe - 2 + 8 * raycaster.MAX_OBJECTS + 1 <= LENGTH


# ------------------------------------------------------------------------------------------------------------
# Shards and the frozen set

@pytest.fixture
def shards(tmp_path, monkeypatch):
    """Makes 12 scenes with questions, 5 a chunk, in a folder of its own."""
    monkeypatch.setattr(maker, "CHUNK", 5)
    monkeypatch.setattr(raycaster, "RENDER_BATCH", {"cpu": 5})
    monkeypatch.setattr(maker, "render", functools.partial(raycaster.render, compile=False))
    monkeypatch.setattr(maker, "looks_of_validation", tuple)

    def make(name, num=12):
        monkeypatch.setattr(maker, "ROOT", tmp_path / name)
        maker.make_shards(64, num, 1, "cpu", "qa")
        return tmp_path / name / "qa64" / "train"
    return make


def test_interrupted_shards_continue(shards, monkeypatch, capsys):
    whole, make, calls = shards("whole"), maker.make, []
    maker.report_questions(whole)
    assert "| describe |" in capsys.readouterr().out

    def interrupted(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return make(*arguments, **keywords)
    monkeypatch.setattr(maker, "make", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shards("same")
    files = {p.name: p.read_bytes() for p in shards("same").iterdir()}
    assert len(calls) == 4, "the first chunk was made again"
    assert files == {p.name: p.read_bytes() for p in whole.iterdir()}
    arrays = {name: np.load(whole / f"{name}.npy") for name in ("pixels", "qa", "answer", "family", "scene")}
    assert set(files) == {*(f"{name}.npy" for name in arrays), "meta.json"}
    assert {name: (a.shape, a.dtype.name) for name, a in arrays.items()} == {
        "pixels": ((12, 3, 64, 64), "uint8"), "qa": ((12, LENGTH), "uint16"), "answer": ((12, LENGTH), "uint8"),
        "family": ((12, 5), "uint8"), "scene": ((12, 21), "int32")}
    meta = json.loads((whole / "meta.json").read_text())
    assert meta["modalities"] == maker.modalities(64, "qa") == {"qa": {"length": LENGTH, "vocab": 576, "pad": 575}}
    assert meta["sha256"] == {name: hashlib.sha256(files[f"{name}.npy"]).hexdigest() for name in arrays}
    assert (meta["name"], meta["text"]) == ("qa64", hashlib.sha256(tokenizer.QA.read_bytes()).hexdigest())
    codes = torch.cat([world.sample_scenes(n, (1 << 32) + chunk) for chunk, n in enumerate((5, 5, 2))])  # the scenes set's
    assert np.array_equal(arrays["scene"], codes)
    objects = plain(world.build(codes))
    check(objects, [questions.decode([row], [families]) for row, families in zip(arrays["qa"], arrays["family"])])
    rgb = raycaster.render(world.build(codes), compile=False)[0]["rgb"]
    assert np.abs(arrays["pixels"] - rgb.numpy() * 255).max() < 0.51
    assert maker.check_shards(64, 12, 1, "cpu", "qa").endswith("of pictures pixels 100.00 %")


def test_finished_shards_are_verified(shards, capsys, monkeypatch):
    folder = shards("a")
    times = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    shards("a")
    assert "verified" in capsys.readouterr().out and times == {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    with pytest.raises(Fault, match="another num"):
        shards("a", 13)
    with monkeypatch.context() as patch, pytest.raises(Fault, match="another questions"):
        patch.setattr(questions, "VERSION", questions.VERSION + 1)
        shards("a")
    data = bytearray((folder / "answer.npy").read_bytes())
    data[-7] ^= 4
    (folder / "answer.npy").write_bytes(data)
    with pytest.raises(Fault, match="answer.npy is not what was written"):
        shards("a")


def test_frozen_set(frozen, encoding):
    assert json.loads(frozen["modalities"].tobytes()) == maker.modalities(64, "qa")
    assert set(frozen) == {"pixels", "qa", "answer", "family", "modalities", "scene"}
    assert {name: (frozen[name].shape, frozen[name].dtype.name) for name in set(frozen) - {"modalities"}} == {
        "pixels": ((2000, 3, 64, 64), "uint8"), "qa": ((2000, LENGTH), "uint16"), "answer": ((2000, LENGTH), "uint8"),
        "family": ((2000, 5), "uint8"), "scene": ((2000, 21), "int32")}
    with np.load(tokenizer.FROZEN / "scenes64.npz") as arrays:
        assert np.array_equal(frozen["scene"], arrays["scene"]), "not the scenes of scenes64.npz"
    scenes = world.load_frozen_scenes(64, 2000, "qa")
    dialogues = [questions.decode([row], [family]) for row, family in zip(frozen["qa"], frozen["family"])]
    check(plain(scenes), dialogues)
    assert all(turns[-1][0] == 6 and len(turns) > 1 for turns in dialogues), "everything is asked for last"
    facts = texts.facts(scenes, torch.zeros(2000, 1, 1, dtype=torch.long))
    assert questions.ask(facts, random.Random(maker.VALIDATION_SEED), describe_first=0) == dialogues
    rows, marks = zip(*(questions.encode(encoding, turns, LENGTH) for turns in dialogues))
    assert np.array_equal(rows, frozen["qa"]) and np.array_equal(marks, frozen["answer"])
    assert (frozen["family"] > 0).sum(1).tolist() == frozen["answer"].max(1).tolist()
    rgb = raycaster.render(world.load_frozen_scenes(64, 50, "qa"), compile=False)[0]["rgb"] * 255
    assert ((torch.from_numpy(frozen["pixels"][:50]) - rgb).abs() > 0.6).float().mean() < 1e-3
    assert (tokenizer.FROZEN / "qa64.npz").stat().st_size < 6e6


def test_sections_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.setattr(reports, "FROZEN", tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text("# Top\n\nold\n\n## One\n\n1\n\n## Two\n\n2\n")
    reports.write_sections("## Two\n\nnew\n")
    assert readme.read_text() == "# Top\n\nold\n\n## One\n\n1\n\n## Two\n\nnew\n"
    reports.write_sections("# Top\n\nnew\n\n## One\n\n3\n")
    reports.write_sections("## Three\n\n4\n")
    assert readme.read_text() == "# Top\n\nnew\n\n## One\n\n3\n\n## Two\n\nnew\n\n## Three\n\n4\n"


@pytest.mark.parametrize("track, name", [("cpu", "qa64"), ("gpu", "qa64-large")])
def test_every_track_has_its_own_set(track, name, monkeypatch):
    """What run.sh makes for it, and the hint where that is missing, is the folder that the scripts train on."""
    prepare = 'eval "$(sed -n "/^prepare()/,/^}/p" run.sh)"; PY=echo; prepare vlm ' + track
    root = tokenizer.FROZEN.parents[1]
    said = subprocess.run(["bash", "-c", prepare], cwd=root, capture_output=True, text=True, check=True).stdout.split()
    assert said[:2] == ["-u", "data/scenes.py"]
    made = []
    monkeypatch.setattr(maker, "make_shards", lambda *arguments: made.append(maker.identity_of(*arguments[:3], "qa")))
    monkeypatch.setattr(maker, "report_questions", made.append)
    monkeypatch.setattr(sys, "argv", said[1:])
    maker.main()
    identity, folder = made
    assert identity["name"] == name and folder == root / "data" / name / "train"
    for script in (train_vlm, show.load_script(root / "baselines" / "train_vlm_nanovlm.py")):
        assert root / script.CONFIGS[track].data == folder
    assert command_for(folder) == " ".join(["python", *said[1:]])


def test_command_line_refuses_two_kinds(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scenes.py", "--qa", "--objects"])
    with pytest.raises(SystemExit):
        maker.main()
    assert "not allowed with" in capsys.readouterr().err
