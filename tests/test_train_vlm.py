"""train_vlm.py: packing, masks, model, backbones of the hub, evaluation, generation, whole runs on tiny data."""
import contextlib
import copy
import dataclasses
import functools
import json
import math
import os
import random
import re
import shutil
import signal
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import backbones as hub
import checkpoints
import questions
import rules
import runs
import show_vlm
import tokenizer
import train_vlm
from kv_cache import KVCache
from train_vlm import IMAGE, PAD, Fault, Options, generate

ROOT = Path(__file__).resolve().parent.parent
VOCAB = tokenizer.TEXT_VOCAB
DIMS = {"vit_dim": 32, "vit_depth": 1, "vit_heads": 2, "vit_mlp": 64, "lm_dim": 32, "lm_depth": 2, "lm_heads": 4,
        "lm_kv_heads": 2, "lm_mlp": 48, "grounded_at": 1, "related_at": 2}
SMALL = ["--track=cpu", *(f"--{key}={value}" for key, value in DIMS.items()), "--batch=4",
         "--samples=2", "--quality_pictures=4", "--precision=fp32"]


def small_config(**changes):
    return dataclasses.replace(train_vlm.CONFIGS["cpu"], **DIMS, **changes)


class FakeRun(types.SimpleNamespace):
    """What the functions of the script read of a Run."""
    slice = train_vlm.Run.slice

    def __init__(self, rank=0, world=1, **options):
        super().__init__(rank=rank, world=world, device=torch.device("cpu"), precision="fp32")
        self.options, self.config = Options(**options), small_config()


def answer_nats(model, pixels, tokens, answer):
    """Cross-entropy (N,), and whether it is the likeliest one (N,), of the N tokens (L,) that answer (L,) marks."""
    with torch.no_grad():
        logs = model.log_probs(pixels[None], tokens[None])[0][answer > 0]
    truth = tokens[answer > 0]
    return F.nll_loss(logs, truth, reduction="none"), logs.argmax(-1) == truth


@pytest.fixture(scope="module")
def frozen():
    return train_vlm.read_frozen(train_vlm.CONFIGS["cpu"])


@pytest.fixture(scope="module")
def model():
    """A small model in float32 whose predictions differ: everything is drawn at random."""
    torch.manual_seed(0)
    model = train_vlm.VLM(small_config(), VOCAB)
    train_vlm.init_weights(model)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with 200 training conversations and 60 for validation, and the overrides that point there."""
    folder = tmp_path_factory.mktemp("tiny")
    with np.load(ROOT / "data/frozen/qa64.npz") as arrays:
        parts, about = {m: arrays[m] for m in ("pixels", "qa", "answer", "family")}, arrays["modalities"]
    (folder / "train").mkdir()
    for m, rows in parts.items():
        np.save(folder / "train" / f"{m}.npy", rows[:200])
    meta = {"name": "qa64", "version": 1, "size": 64, "num": 200, "seed": 1, "text": "",
            "modalities": json.loads(bytes(about))}
    (folder / "train/meta.json").write_text(json.dumps(meta))
    np.savez(folder / "val.npz", modalities=about, **{m: rows[:60] for m, rows in parts.items()})
    return folder, [f"--data={folder}/train", f"--frozen={folder}/val.npz"]


make_root, run_here = functools.partial(runs.make_root, "vlm"), functools.partial(runs.run_here, "vlm")


# ------------------------------------------------------------------------------------------------------------
# Packing and masks

def make_loader(frozen, rank=0, world=1, num=50, **changes):
    pixels, tokens, answer = (part[:num] for part in frozen[:3])
    config = small_config(**({"batch": 4, "seq_len": 192} | changes))
    return train_vlm.Loader(pixels, tokens, answer, frozen[4]["pad"], config, FakeRun(rank, world))


def conversations(batch, pad):
    """The parts of a packed step: a list of (tokens, answer, picture)."""
    parts, used = [], 0
    for tokens, answer, document in zip(batch["tokens"], batch["answer"], batch["document"]):
        for d in document.unique_consecutive():
            inside = document == d
            if d >= 0:
                assert (tokens[inside][:16] == IMAGE).all() and (tokens[inside][16:] >= 0).all()
                parts.append((tokens[inside][16:], answer[inside][16:], batch["pixels"][used]))
                used += 1
            else:
                assert (tokens[inside] == pad).all() and (answer[inside] == 0).all()
                assert inside.nonzero().min() > (~inside).nonzero().max(), "padding comes last"
    assert used == len(batch["pixels"])
    return parts


def test_packing_keeps_every_conversation_whole(frozen):
    loader, seen, shares, pad = make_loader(frozen, described=1.0, singles=1.0), [], [], frozen[4]["pad"]
    known = {tuple(row[row != pad].tolist()): i for i, row in enumerate(frozen[1][:50])}
    for _ in range(6):
        batch = loader()
        for tokens, answer, picture in conversations(batch, pad):
            i = known[tuple(tokens.tolist())]
            assert torch.equal(answer, frozen[2][i][:len(answer)].long()) and torch.equal(picture, frozen[0][i])
            seen.append(i)
        shares.append((batch["tokens"] != pad).float().mean().item())
        assert len(batch["weights"]) == (batch["answer"] > 0).sum() and batch["pictures"] == len(batch["pixels"])
        assert batch["weight"] == batch["weights"].sum() and len(batch["grounded"]) == len(batch["refers"]) > 0
        share = np.bincount(batch["grounded"] % len(train_vlm.ASKED), batch["shares"], len(train_vlm.ASKED))
        assert share == pytest.approx(train_vlm.ASKED), "what is asked weighs the same in every step"
    assert loader.pictures == len(seen)
    counts = np.bincount(seen, minlength=50)
    assert counts.max() - counts.min() <= 2 and len(seen) > 40
    assert np.mean(shares) > 0.85, f"only {np.mean(shares):.0%} of the steps is no padding"


def test_some_conversations_lose_their_description(frozen):
    """Half of them here, and those about a single object are drawn 0.4 times as often as others."""
    loader, pad = make_loader(frozen, num=200, batch=32, described=0.5, singles=0.4), frozen[4]["pad"]
    _, all_tokens, all_answer, family, _, _ = frozen
    known, singles = {}, []
    for i in range(200):
        tokens = all_tokens[i][all_tokens[i] != pad]
        answer = all_answer[i][:len(tokens)].long()
        number = family[i].tolist().index(6) + 1
        places = (answer == number).nonzero()[:, 0].tolist()
        start = max((answer[:places[0]] > 0).nonzero()[:, 0].tolist(), default=-1) + 1  # after the answer before it
        rest = [*range(start), *range(places[-1] + 1, len(tokens))]
        known[tuple(tokens.tolist())] = i, True, answer, number
        known[tuple(tokens[rest].tolist())] = i, False, answer[rest], number
        singles.append(len(places) < 10)  # seven words and the line's end for each object
    assert len(known) == 400 and 30 < sum(singles) < 120
    draws, described = np.zeros(200), []
    for _ in range(20):
        batch, weights = loader(), []
        for tokens, answer, picture in conversations(batch, pad):
            i, whole, wanted, number = known[tuple(tokens.tolist())]
            assert torch.equal(answer, wanted) and torch.equal(picture, frozen[0][i])
            weights += [1.0 if mark == number else small_config().question_weight for mark in answer.tolist() if mark]
            draws[i] += 1
            described.append(whole)
        assert batch["weights"].tolist() == weights and batch["weight"] == sum(weights)
        share = np.bincount(batch["grounded"] % len(train_vlm.ASKED), batch["shares"], len(train_vlm.ASKED))
        assert share == pytest.approx(train_vlm.ASKED)
    singles = np.array(singles)
    assert np.mean(described) == pytest.approx(0.5, abs=0.06)
    assert draws[singles].mean() / draws[~singles].mean() == pytest.approx(0.4, abs=0.1)


def test_ranks_share_the_rows_of_one_step(frozen):
    whole, pad = make_loader(frozen), frozen[4]["pad"]
    ranks = [make_loader(frozen, rank, 2) for rank in (0, 1)]
    for _ in range(3):
        batch, parts = whole(), [loader() for loader in ranks]
        assert torch.equal(batch["tokens"], torch.cat([part["tokens"] for part in parts]))
        assert torch.equal(batch["answer"], torch.cat([part["answer"] for part in parts]))
        assert torch.equal(batch["pixels"], torch.cat([part["pixels"] for part in parts]))
        for name in ("weight", "pictures"):
            assert {part[name] for part in parts} == {batch[name]}
        for name in ("weights", "refers", "objects", "shares"):
            assert torch.equal(batch[name], torch.cat([part[name] for part in parts]))
        for part in parts:
            conversations(part, pad)


@pytest.mark.parametrize("rank, world", [(0, 1), (1, 2)])
def test_micro_batches_share_the_work(model, frozen, monkeypatch, rank, world):
    """Loss and gradients are the whole batch's, to the last bit where one part is all."""
    run, seen, plain = FakeRun(rank, world), [], train_vlm.VLM.forward
    run.autocast = contextlib.nullcontext

    def spy(model, *part):
        seen.append(part)
        return plain(model, *part)
    monkeypatch.setattr(train_vlm.VLM, "forward", spy)

    def parts_of(micro_batch):
        batch = make_loader(frozen, rank, world, batch=8, micro_batch=micro_batch)()
        config = small_config(batch=8, micro_batch=micro_batch)
        seen.clear()
        return batch, *runs.step_gradients(monkeypatch, train_vlm, model, lambda muon, adam: train_vlm.train_step(
            0, batch, model, muon, adam, config, run))
    batch, loss, gradients = parts_of(512)
    names = ("tokens", "document", "pixels")
    assert all(torch.equal(part, batch[name]) for part, name in zip(seen[0], names)) and len(seen) == 1
    assert torch.equal(batch["places"], batch["answer"].flatten().nonzero()[:, 0])
    states = plain(model, *seen[0])
    answers = train_vlm.answer_loss(model, states[-1], batch["tokens"], batch["places"], batch["weights"])
    grounding = [batch[name] for name in ("grounded", "refers", "objects", "shares")]
    wanted = answers / batch["weight"] + 1.0 * train_vlm.grounding_loss(model, *states, *grounding)
    assert loss == wanted.item()
    whole = torch.autograd.grad(wanted, list(model.parameters()))
    assert torch.equal(gradients, torch.cat([g.flatten() for g in whole]))
    for micro_batch in (2, 3):
        batch, again, summed = parts_of(micro_batch)
        assert again == pytest.approx(loss, rel=1e-5) and torch.allclose(summed, gradients, atol=1e-5)
        assert len(seen) == -(-8 // world // micro_batch) and len(seen[0][0]) == micro_batch
        pictures = torch.cat([part[2] for part in seen])
        assert torch.equal(pictures, batch["pixels"])
        assert all((part[0] == IMAGE).sum() == 16 * len(part[2]) for part in seen)


def test_a_row_too_short(frozen):
    with pytest.raises(Fault, match="--seq_len=40 is too short: a conversation has"):
        make_loader(frozen, seq_len=40)


@pytest.mark.parametrize("num", [1, 5, 15])
def test_sets_of_few_conversations(frozen, num):
    loader, pad = make_loader(frozen, num=num, described=1.0, singles=1.0), frozen[4]["pad"]
    parts = [part for _ in range(8) for part in conversations(loader(), pad)]
    found = {tuple(tokens.tolist()) for tokens, _, _ in parts}
    assert found <= {tuple(row[row != pad].tolist()) for row in frozen[1][:num]} and len(found) > 0.7 * num


def test_a_loader_goes_on_where_it_was(frozen):
    loader, other = make_loader(frozen), make_loader(frozen, seed=3)
    for _ in range(4):
        loader()
    other.load_state_dict(loader.state_dict())
    for _ in range(4):
        assert torch.equal(loader()["tokens"], other()["tokens"]) and loader.pictures == other.pictures


def test_mask_against_a_plain_loop(model):
    document = torch.tensor([[0, 0, 0, 0, 1, 1, 1, -1], [2, 2, 2, 2, 2, 2, 2, 2]])
    image = torch.tensor([[1, 1, 0, 0, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]]).bool()
    mask = model.mask(document, image)
    for b in range(2):
        for q in range(8):
            for k in range(8):
                same = document[b, q] == document[b, k]
                assert mask[b, 0, q, k] == (same and (k <= q or image[b, q] and image[b, k]))
    assert torch.equal(model.mask(document, image, 5), mask[:, :, 5:])


def test_block_mask_is_the_dense_mask(model, frozen):
    """Flex attention with the BlockMask against attend with the dense mask, forward; nothing is compiled twice."""
    loader, mask_cache = make_loader(frozen, batch=2, seq_len=256), {}
    for i in range(3):
        batch = loader()
        document, image = batch["document"], batch["tokens"] == IMAGE
        q, k, v = torch.randn(3, 2, 2, 256, 16).unbind(0)
        with torch._dynamo.config.patch(error_on_recompile=i > 0), torch.no_grad():
            found = train_vlm.attend(q, k, v, train_vlm.block_mask(train_vlm.may_see, 2 * document + image, mask_cache))
        dense = model.mask(document, image)
        assert torch.allclose(train_vlm.attend(q, k, v, dense), found, atol=1e-5)
        assert not torch.allclose(train_vlm.attend(q, k, v, torch.ones_like(dense)), found, atol=1e-2)
    assert len(mask_cache) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_that_may_see_nothing_gets_zeros(dtype):
    q, k, v = torch.randn(3, 2, 4, 6, 8, generator=torch.Generator().manual_seed(0)).to(dtype).unbind(0)
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    mask[1, :, 2] = False
    out = train_vlm.attend(q, k, v, mask)
    assert (out[1, :, 2] == 0).all() and out.isfinite().all()
    assert torch.allclose(out[:, :, 0], v[:, :, 0], atol=1e-2), "others see what they may"


def test_what_words_and_image_tokens_refer_to():
    """Two objects: a large red rubber cube on the left, a small red metal sphere on the right."""
    encoding = tokenizer.load_text(tokenizer.QA)
    told = ("a large red rubber cube at x=18 y=31", "a small red metal sphere at x=81 y=68")
    turns = [(1, "How many red things are there?", "2"), (2, "Is the large metal cube left of a sphere?", "no"),
             (6, "What is there?", ", ".join(told))]
    rows = [questions.encode(encoding, turns, 90), questions.encode(encoding, turns[:2], 90)]
    tokens, answer = (torch.tensor(part) for part in zip(*rows))
    objects, refers, described = train_vlm.find_referents(tokens, answer, train_vlm.read_words(), 16)
    values, mark = train_vlm.VALUES, train_vlm.REFERS
    assert [values[i] for i in objects[0, 0, :4]] == ["large", "red", "rubber", "cube"]
    assert [values[i] for i in objects[0, 1, :4]] == ["small", "red", "metal", "sphere"]
    cells = objects[0, :2, 4:] - len(values) - np.array([0, train_vlm.CELLS])
    assert cells.tolist() == [[1, 2], [6, 5]]  # columns and rows of eight
    grid = refers[0, :16].reshape(4, 4, -1)
    assert list(train_vlm.SIDES) == ["left", "right", "behind", "front"]
    assert grid[1, 0].tolist() == [mark + 1, mark, mark + 2, mark, mark + 2, 0], "the other one is right and in front"
    assert grid[2, 3].tolist() == [mark + 2, mark + 1, mark, mark + 1, mark, 0] and (grid > 0).sum() == 10
    said = [encoding.decode([i]).strip() for i in tokens[0].tolist() if i < VOCAB - 2]
    found = [(word, bits - mark) for word, bits in zip(said, refers[0, 16:, 0]) if bits]
    assert found == [("red", 3), ("things", 3), ("large", 1), ("metal", 0), ("cube", 0), ("sphere", 2)]
    found = [(word, bits - mark) for word, bits in zip(said, refers[0, 16:, -1]) if bits]
    assert found == [("sphere", 1)], "what is left of the sphere, and nothing of the cube that there is not"
    assert not refers[0, 16:, 1:-1].any()
    assert described.tolist() == [3, 0]
    assert not refers[1].any(), "nothing is told of the second one"
    assert not train_vlm.find_referents(tokens, answer, {}, 16)[1].any(), "tokens of another model"


def test_sides_are_those_of_the_questions():
    assert train_vlm.MARGIN == questions.MARGIN
    axes = {word: (["x", "y"].index(axis), sign) for relation, (axis, sign) in questions.RELATIONS.items()
            for word in relation.split() if word in train_vlm.SIDES}
    assert axes == train_vlm.SIDES


@pytest.mark.parametrize("told", [
    "meet at x=31 y=43", "a red dog by a tree at x=31 y=43", "x=31 y=43",
    ", ".join(f"a small {color} metal cube at x=31 y=43" for color in ("red", "blue", "green", "gray"))])
def test_users_own_answers_refer_to_what_they_can(told):
    """Places without an object before them, and more objects than a scene has."""
    row = questions.encode(tokenizer.load_text(tokenizer.QA), [(6, "What is there?", told)], 90)
    tokens, answer = (torch.tensor([part]) for part in row)
    refers = train_vlm.find_referents(tokens, answer, train_vlm.read_words(), 16)[1]
    assert (refers > 0).any(2).sum() == ("cube" in told)


def test_grounding_asks_for_all_that_fits(model):
    """How many objects, and values, columns and rows, have equal shares; a place of no object has the number alone.
    Each is asked of its own state and by its own rows of the matrix."""
    objects = torch.tensor([[[1, 3, 10, 12, 17, 25], [0, 2, 11, 13, 20, 28], [0] * 6]] * 3)
    refers = torch.tensor([train_vlm.REFERS + bits for bits in (0, 1, 3)])
    kinds, told = len(train_vlm.ASKED), train_vlm.TOLD
    states, related = torch.randn(2, 1, 5, DIMS["lm_dim"], generator=torch.Generator().manual_seed(0))
    places, asked, shares = torch.tensor([0, 2, 4]), torch.tensor([0, 3, kinds - 1]), torch.tensor([0.5, 1.0, 2.0])
    with torch.no_grad():
        loss = train_vlm.grounding_loss(model, states, related, places * kinds + asked, refers, objects, shares)
        normed = F.rms_norm(torch.stack([states[0, 0], states[0, 2], related[0, 4]]), states.shape[-1:])
        logs = [model.ground(state)[told * k:told * (k + 1)].log_softmax(-1) for state, k in zip(normed, asked)]
    number = len(train_vlm.VALUES) + 2 * train_vlm.CELLS
    wanted = [[number], [1, 3, 10, 12, 17, 25, number + 1],
              [1, 3, 10, 12, 17, 25, 0, 2, 11, 13, 20, 28, number + 2]]
    nats = [-log[each].mean().item() for log, each in zip(logs, wanted)]
    assert loss.item() == pytest.approx(np.dot(nats, shares.numpy()), rel=1e-5)


def test_positions_of_image_tokens_are_rows_and_columns(model):
    """Of two conversations in a row, with 16 image tokens each; a pretrained language model's are places."""
    image = (torch.arange(60) % 30 < 16).expand(2, 60)
    rows, columns = model.positions(image).unbind(2)
    place = torch.arange(60)
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0][~image[0]], place[~image[0]])
    for start in (0, 30):
        inside = torch.arange(16)
        assert torch.equal(rows[0, start:start + 16], start + inside // 4)
        assert torch.equal(columns[0, start:start + 16], start + inside % 4)
    assert torch.equal(columns[0, 16:30], place[16:30])
    hub = copy.copy(model)
    hub.pretrained = True
    assert torch.equal(hub.positions(image), place[None, :, None].expand(2, 60, 2))


def test_a_packed_conversation_is_alone(model, frozen):
    """Its loss is that of the conversation by itself, whatever stands beside it in the row."""
    batch, pad = make_loader(frozen)(), frozen[4]["pad"]
    with torch.no_grad():
        states = model(batch["tokens"], batch["document"], batch["pixels"])[-1]
        one = torch.ones(1)
        packed = [train_vlm.answer_loss(model, states, batch["tokens"], place, one) for place in batch["places"].split(1)]
        packed, alone = torch.stack(packed), []
        for tokens, answer, picture in conversations(batch, pad):
            alone.append(answer_nats(model, picture, tokens, answer)[0])
    assert torch.allclose(packed, torch.cat(alone), atol=1e-4)


def test_answers_do_not_leak(model, frozen):
    pixels, tokens, answer = (part[:1] for part in frozen[:3])
    first = (answer[0] > 0).nonzero()[0, 0].item()
    lead = lambda value, part: F.pad(part, (16, 0), value=value)
    document = torch.zeros_like(lead(0, tokens))

    def logits(tokens, pixels=pixels):
        with torch.no_grad():
            return model.lm.logits(model(lead(IMAGE, tokens), document, pixels)[-1])[0, 16:]
    changed = tokens.clone()
    changed[0, first] = (changed[0, first] + 1) % 500
    one, other = logits(tokens), logits(changed)
    assert torch.equal(one[:first], other[:first]) and not torch.equal(one[first], other[first])
    assert not torch.allclose(one[first - 1], logits(tokens, 255 - pixels)[first - 1], atol=1e-3), "the picture counts"


# ------------------------------------------------------------------------------------------------------------
# Evaluation and optimizers

def test_evaluation_against_a_plain_loop(model, frozen, monkeypatch):
    monkeypatch.setattr(train_vlm, "EVAL_BATCH", 15)
    parts = [part[:40] for part in frozen[:4]]
    loss, numbers = train_vlm.evaluate(model, *parts, VOCAB, 0, 1)
    nats, right, asked = {"questions": [], "describe": []}, dict.fromkeys(range(1, 7), 0), dict.fromkeys(range(1, 7), 0)
    for pixels, tokens, answer, family in zip(*parts):
        row = F.pad(tokens, (16, 0), value=IMAGE)[None]
        with torch.no_grad():
            logits = model.lm.logits(model(row, torch.zeros_like(row), pixels[None])[-1])[0, 15:-1]
        for turn, number in enumerate(family.tolist(), 1):
            places = (answer == turn).nonzero()[:, 0].tolist()
            each = [logits[place].log_softmax(-1)[tokens[place]].item() for place in places]
            nats["describe" if number == 6 else "questions"] += each
            if number:
                asked[number] += 1
                right[number] += all(logits[place].argmax() == tokens[place] for place in places)
    halves = {name: -np.mean(values) for name, values in nats.items()}
    assert loss == pytest.approx((halves["questions"] + halves["describe"]) / 2, rel=1e-4)
    assert numbers["eval_targets"] == sum(map(len, nats.values())) and asked[6] == 40
    for name, value in halves.items():
        assert numbers[f"val_loss_{name}"] == pytest.approx(value, rel=1e-4)
    for number, name in enumerate(train_vlm.FAMILIES, 1):
        assert numbers[f"accuracy_{name}"] == pytest.approx(right[number] / asked[number], abs=1e-4)
    together = [sum(known[number] for number in range(1, 6)) for known in (right, asked)]
    assert numbers["accuracy_questions"] == pytest.approx(together[0] / together[1], abs=1e-4)


def test_accuracy_of_a_model_that_knows(model, frozen, monkeypatch):
    """All right but what is said about turn 2: the families of second turns lose exactly those."""
    parts = [part[:40] for part in frozen[:4]]
    marks = parts[2][parts[2] > 0]
    monkeypatch.setattr(train_vlm, "target_log_probs", lambda *_: (torch.zeros(len(marks)), marks != 2))
    monkeypatch.setattr(train_vlm, "check_again", lambda *_: None)
    loss, numbers = train_vlm.evaluate(model, *parts, VOCAB, 0, 1)
    family = parts[3]
    for n, name in enumerate(train_vlm.FAMILIES, 1):
        second = (family[:, 1] == n).sum().item() / (family == n).sum().item()
        assert numbers[f"accuracy_{name}"] == pytest.approx(1 - second, abs=1e-4)
    assert loss == 0


def test_every_parameter_has_one_optimizer(model):
    for changes in ({}, {"vit": "x"}, {"lm": "x"}):
        muon, adam = train_vlm.make_optimizers(model, small_config(**changes), FakeRun())
        taken = [p for params, _ in (muon.stacks if muon else []) for p in params]
        taken += [p for group in adam.param_groups for p in group["params"]]
        assert len(taken) == len({id(p) for p in taken}) == len(list(model.parameters()))
        rates = {group["peak"] for group in adam.param_groups}
        assert rates == ({1e-5, 1e-3} if changes else {small_config().adam_lr})


# ------------------------------------------------------------------------------------------------------------
# Generation

def test_the_cache_changes_nothing(model, frozen):
    pixels, tokens, answer = (part[:12] for part in frozen[:3])
    options = Options(max_tokens=20)
    lengths = set()
    for picture, row, marks in zip(pixels, tokens.tolist(), answer.tolist()):
        question = row[:marks.index(1)]
        made = [generate(model, picture, question, 3, options, cache=cache) for cache in (KVCache(), None)]
        assert made[0] == made[1] and 3 not in made[0]
        lengths.add(tuple(made[0]))
    assert len(lengths) > 3, "answers differ from picture to picture"
    hot = dataclasses.replace(options, temperature=1.0, top_k=50, top_p=0.9)
    drawn = [generate(model, picture, question, None, hot, seed, cache)
             for seed in (0, 1) for cache in (KVCache(), None)]
    assert drawn[0] == drawn[1] and drawn[2] == drawn[3] != drawn[0] and len(drawn[0]) == 20


def test_generation_is_what_evaluation_sees(model, frozen):
    """The first token said is the one that the evaluation holds for the likeliest."""
    for picture, row, marks in zip(*(part[:10] for part in frozen[:3])):
        first = (marks == 1).nonzero()[0, 0].item()
        _, right = answer_nats(model, picture, row, marks)
        said = generate(model, picture, row[:first].tolist(), None, Options(max_tokens=1))[0]
        assert (said == row[first].item()) == right[0].item()


def test_descriptions(model, frozen, tmp_path, monkeypatch):
    """They are the greedy answers to a question of no conversation, and judged by the truth, sizes included."""
    monkeypatch.setattr(show_vlm, "PART", 3)
    show = show_vlm.Show(train_vlm, FakeRun(samples=0, quality_pictures=7), frozen[:4], None)
    said = show.describe(model, frozen[0][:3])
    question, options = show.codec.question("What is there?"), Options(max_tokens=show_vlm.DESCRIBE_TOKENS)
    answers = [generate(model, picture, question, show.codec.stop, options) for picture in frozen[0][:3]]
    assert said == [show.codec.decode(answer) for answer in answers]
    truth = [re.findall(r"Answer: (a .*)\n", show.codec.decode(row.tolist()))[-1] for row in frozen[1][:7]]
    parts = iter((truth[:3], truth[3:6], truth[6:]))
    monkeypatch.setattr(show, "describe", lambda model, pixels: next(parts))
    assert show.show(model, tmp_path) == {"quality_describe_f1": 1.0}
    others = iter((["a cube"] * 3, ["no"] * 3, truth[6:]))
    monkeypatch.setattr(show, "describe", lambda model, pixels: next(others))
    told, all_of_them = (sum(text.count(" at x=") for text in part) for part in (truth[6:], truth))
    assert show.show(model, tmp_path)["quality_describe_f1"] == pytest.approx(2 * told / (told + all_of_them), abs=1e-4)


def test_exact_answers(model, frozen, tmp_path):
    """Where no conversation describes: the share of turns that greedy decoding answers to the letter."""
    question, options, rows, marks = show_vlm.TextCodec().question("What?"), Options(max_tokens=5), [], []
    for picture, wrong, turns in zip(frozen[0], (False, True, True), (1, 1, 2)):
        row, own_marks = [], []
        for turn in range(1, turns + 1):
            row += question
            row += generate(model, picture, row, None, options)
            own_marks += [0] * len(question) + [turn] * 5
            if wrong and turn == 1:
                row[-3] = (row[-3] + 1) % VOCAB
        rows.append(torch.tensor(row))
        marks.append(torch.tensor(own_marks, dtype=torch.uint8))
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=VOCAB - 1)
    answer = torch.nn.utils.rnn.pad_sequence(marks, batch_first=True)
    parts = frozen[0][:3], tokens, answer, torch.zeros(3, 2, dtype=torch.uint8)
    show = show_vlm.Show(train_vlm, FakeRun(samples=0, quality_pictures=3), parts, None)
    assert show.show(model, tmp_path) == {"quality_exact_answers": 0.5}, "the first and, after a wrong one, the last of 4"


def test_chat(model, frozen, tmp_path, monkeypatch, capsys):
    Image.new("L", (50, 70), 128).save(tmp_path / "grey.png")
    show = show_vlm.Show(train_vlm, FakeRun(chat=str(tmp_path / "grey.png"), samples=0, quality_pictures=0),
                         frozen[:4], None)
    for ending in ("", EOFError, KeyboardInterrupt):
        lines = iter(["How many objects are there?", ending])

        def typed(prompt):
            line = next(lines)
            if isinstance(line, str):
                return line
            raise line
        monkeypatch.setattr("builtins.input", typed)
        assert show.show(model, tmp_path) == {}
        show.chat(model)
        warning, greeting, *answer = capsys.readouterr().out.splitlines()
        assert "not of the world" in warning and greeting.startswith("Ask about the picture") and answer


def test_pictures_are_read_as_training_reads_them(tmp_path):
    left = np.zeros((64, 64, 3), np.uint8)
    left[:, :32] = 200, 100, 50
    exif = Image.Exif()
    exif[0x112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(left).save(tmp_path / "turned.png", exif=exif)
    picture = show_vlm.read_picture(tmp_path / "turned.png", 64)
    assert picture.shape == (3, 64, 64) and picture.dtype == torch.uint8
    assert picture[:, 16, 40].tolist() == [200, 100, 50] and not picture[:, 48].any(), "left is up"
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (show_vlm.read_picture(tmp_path / "clear.png", 64) == 255).all(), "white where it is transparent"
    Image.fromarray(np.full((32, 32), 32896, np.uint16)).save(tmp_path / "deep.png")
    assert (show_vlm.read_picture(tmp_path / "deep.png", 64) == 128).all(), "16 bits"


def test_chat_pictures_that_are_none(tiny, tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("no picture")
    Image.new("L", (200, 70), 128).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10000)
    root = make_root(tmp_path / "root")
    for name in ("text.png", "missing.png", "bomb.png", "."):
        with pytest.raises(Fault, match="is not a picture that can be read") as caught:
            argv = [*SMALL, *tiny[1], "--num_steps=2", f"--chat={tmp_path / name}"]
            run_here(monkeypatch, root, argv, samples=True)
        assert "\n" not in str(caught.value) and not (root / "logs").exists(), "noticed before the clock"


# ------------------------------------------------------------------------------------------------------------
# Pretrained backbones

@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """Tiny random models of transformers saved as the hub has them, with a tokenizer: two folders."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    vision = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3, image_size=64, patch_size=16))
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=400, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, rope_theta=50000.0, rms_norm_eps=1e-5, tie_word_embeddings=True))
    for module in (vision, llama):  # nothing at its neutral value
        for p in module.parameters():
            torch.nn.init.normal_(p, std=0.2) if p.ndim > 1 else torch.nn.init.uniform_(p, 0.5, 1.5)
    vision.save_pretrained(folder / "vit"), llama.save_pretrained(folder / "lm")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer, bpe.decoder = tokenizers.pre_tokenizers.ByteLevel(False), tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(["Question: How many red cubes are there? Answer: 3\n"] * 9, tokenizers.trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    bpe.save(str(folder / "lm/tokenizer.json"))
    return folder, vision.eval(), llama.eval()


def open_backbones(vit="", lm=""):
    return hub.Backbones(train_vlm, dataclasses.replace(train_vlm.CONFIGS["cpu"], vit=str(vit), lm=str(lm)))


def load(backbones):
    found = open_backbones(backbones[0] / "vit", backbones[0] / "lm")
    model = train_vlm.VLM(found.config, found.vocab)
    found.load(model)
    return model, found


def test_siglip_parity(backbones):
    model, _ = load(backbones)
    pictures = torch.rand(3, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        expected = backbones[1](pictures).last_hidden_state
        assert torch.allclose(model.vit(pictures), expected, atol=1e-4)


def test_llama_parity(backbones):
    model, _ = load(backbones)
    tokens = torch.randint(0, 400, (2, 70))
    document, image = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        states = model.lm(model.lm.embed_tokens(tokens), model.mask(document, image), model.positions(image))[-1]
        expected = backbones[2](tokens).logits
    assert expected.std() > 0.1 and torch.allclose(model.lm.logits(states), expected, atol=1e-4)


def test_backbones_that_do_not_fit(backbones, tmp_path):
    with pytest.raises(Fault, match="cannot read the model"):
        open_backbones(vit=tmp_path / "none")
    with pytest.raises(Fault, match="only plain Llamas"):
        open_backbones(lm=backbones[0] / "vit")
    model, found = load(backbones)
    with pytest.raises(Fault, match="has no weight that fits"):
        found.load_part(model.vit, found.folders["lm"])
    folder = shutil.copytree(backbones[0] / "lm", tmp_path / "lm")
    state = load_file(folder / "model.safetensors")
    save_file({key: value for key, value in state.items() if "layers.1" not in key}, folder / "model.safetensors")
    with pytest.raises(Fault, match="has no weight that fits layers.1"):
        found.load_part(model.lm, folder)
    about = json.loads((folder / "config.json").read_text())
    del about["intermediate_size"]
    (folder / "config.json").write_text(json.dumps(about))
    with pytest.raises(Fault, match="without 'intermediate_size'"):
        open_backbones(lm=folder)
    plain = json.loads((backbones[0] / "lm/config.json").read_text())
    for more in ({"rope_scaling": {"rope_type": "llama3", "factor": 32}}, {"attention_bias": True},
                 {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32}}):
        (folder / "config.json").write_text(json.dumps(plain | more))
        with pytest.raises(Fault, match="without scaled positions or biases"):
            open_backbones(lm=folder)
    for field, value, part in ("side", 32, "vit"), ("lm_depth", 9, "lm"):
        config = dataclasses.replace(train_vlm.CONFIGS["cpu"], **{field: value, part: str(backbones[0] / part)})
        with pytest.raises(Fault, match=f"--{field}={value}: --{part}=.* has .*, leave it out"):
            hub.Backbones(train_vlm, config)
    shutil.copy(backbones[0] / "lm/config.json", folder / "config.json")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(Fault, match="tokenizer.json cannot be read"):
        open_backbones(lm=folder)


def test_the_other_models_tokens(backbones, frozen):
    found = open_backbones(lm=backbones[0] / "lm")
    tokens, answer = found.convert(frozen[1][:20], frozen[2][:20])
    codec, ours = found.codec, tokenizer.load_text(tokenizer.QA)
    for row, marks, old, old_marks in zip(tokens, answer, frozen[1], frozen[2]):
        row, marks = row[row != PAD], marks[row != PAD]
        assert codec.decode(row.tolist()) == tokenizer.decode_text(ours, old.tolist())
        for turn in range(1, old_marks.max() + 1):
            said = codec.decode(row[marks == turn].tolist())
            assert said == tokenizer.decode_text(ours, old[old_marks == turn].tolist()) and said.endswith("\n")


def test_run_with_backbones(backbones, tiny, tmp_path, monkeypatch):
    root = make_root(tmp_path / "root")
    run_here(monkeypatch, root, [
        "--track=cpu", f"--vit={backbones[0]}/vit", f"--lm={backbones[0]}/lm", *tiny[1], "--seq_len=900", "--batch=2",
        "--num_steps=4", "--samples=2", "--quality_pictures=4", "--max_tokens=4"], samples=True)
    log, = (root / "logs").iterdir()
    assert rules.parse_log(log)["footer"]["steps"] == 4


def test_a_strange_picture_is_told(model, frozen, tmp_path, monkeypatch, capsys):
    noise = np.random.default_rng(0).integers(0, 256, (3, 64, 64)).astype(np.uint8)
    pictures = {"scene": frozen[0][0].numpy(), "noise": noise, "gray": np.full((3, 64, 64), 110, np.uint8)}
    run = FakeRun(chat="picture.png", samples=0, quality_pictures=0)
    monkeypatch.setattr("builtins.input", lambda prompt: "")
    for name, picture in pictures.items():
        Image.fromarray(picture.transpose(1, 2, 0)).save(tmp_path / "picture.png")
        script = types.SimpleNamespace(ROOT=tmp_path, Fault=Fault)
        show_vlm.Show(script, run, frozen[:4], None).chat(model)
        assert ("not of the world" in capsys.readouterr().out) == (name != "scene")


def test_lora(backbones, tiny, tmp_path, monkeypatch):
    model, found = load(backbones)
    before = {name: p.clone() for name, p in model.named_parameters()}
    hub.add_lora(model, 4)
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    blocks = len(model.vit.layers) + len(model.lm.layers)
    assert len(learns) == 1 + 2 * 4 * blocks and "project.weight" in learns
    adam = hub.make_adamw(model, small_config(num_steps=100))
    tokens, pixels = torch.full((2, 90), IMAGE), torch.randint(0, 256, (2, 3, 64, 64))
    tokens[:, model.image_tokens:] = 5
    document = torch.tensor([[0], [1]]).expand_as(tokens)
    rates = []
    for _ in range(4):
        for group in adam.param_groups:
            group["lr"] = group["peak"]
        (1e6 * model(tokens, document, pixels)[-1].square().mean()).backward()
        adam.step()
        norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
        assert norm <= 1 + 1e-4  # clipped
        rates.append(adam.param_groups[0]["lr"] / adam.param_groups[0]["peak"])
        adam.zero_grad()
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 1])  # 3 of 100 steps to warm up
    moved = model(tokens, document, pixels)[-1]
    hub.merge_lora(model)
    assert torch.allclose(model(tokens, document, pixels)[-1], moved, atol=1e-4)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 1 + 4 * blocks and all(name.endswith("proj.weight") or "project" in name for name in changed)
    root = make_root(tmp_path / "root")
    run_here(monkeypatch, root, [
        "--track=cpu", f"--vit={backbones[0]}/vit", f"--lm={backbones[0]}/lm", *tiny[1], "--seq_len=900", "--batch=2",
        "--num_steps=2", "--lora=2", "--save=true"])
    weights, = (root / "checkpoints").iterdir()
    assert load_file(weights).keys() == model.state_dict().keys()


# ------------------------------------------------------------------------------------------------------------
# Whole runs

def test_run_and_load(tiny, tmp_path, monkeypatch):
    root = make_root(tmp_path / "root")
    argv = [*SMALL, *tiny[1], "--num_steps=30", "--eval_every=10", "--save=true"]
    run_here(monkeypatch, root, argv, samples=True)
    log, = (root / "logs").iterdir()
    run_id, log = log.stem, rules.parse_log(log)
    assert [step for step, _, _ in log["steps"]] == [10, 20, 30] and log["footer"]["val_loss"] < 3.2
    assert {str(p.relative_to(root / "samples")) for p in (root / "samples").rglob("*.png")} == {
        "vlm.png", f"{run_id}/vlm.png"}
    assert log["footer"]["pictures"] > 30 and log["footer"]["sampled_per_second"] > 0
    assert 0 <= log["footer"]["quality_describe_f1"] <= 1
    weights, = (root / "checkpoints").iterdir()
    again, argv = make_root(tmp_path / "again"), ["--track=cpu", *tiny[1], "--num_steps=0", f"--load={weights}"]
    run_here(monkeypatch, again, [*argv, "--save=true"])  # the checkpoint has the architecture
    log2, = (again / "logs").iterdir()
    assert rules.parse_log(log2)["footer"]["val_loss"] == pytest.approx(log["footer"]["val_loss"], abs=0.01)
    copied, = (again / "checkpoints").iterdir()
    run_here(monkeypatch, make_root(tmp_path / "copied"), [*argv[:-1], f"--load={copied}"])  # and so has its copy
    with pytest.raises(Fault, match="was trained with --lm_depth=2: leave it out"):
        run_here(monkeypatch, again, [*argv, "--lm_depth=3"])


BAD_ARGUMENTS = [
    (["--data=nowhere"], "python data/scenes.py --qa"),
    (["--frozen=none.npz"], "none.npz is missing: it is no part of the repository"),
    (["--frozen=data/frozen/none.npz"], "it belongs to the repository (`git checkout data/frozen/none.npz`)"),
    (["--seq_len=30"], "--seq_len=30 is too short"),
    (["--patch=12"], "do not tile pictures of --side=64"),
    (["--patch=64"], "do not tile pictures of --side=64"),
    (["--lm_heads=5"], "is not a multiple of twice --lm_heads=5"),
    (["--lm_kv_heads=3"], "is not a multiple of --lm_kv_heads=3"),
    (["--vit_heads=3"], "is not a multiple of --vit_heads=3"),
    (["--grounded_at=3"], "--grounded_at=3 is beyond the last of --lm_depth=2 blocks"),
    (["--related_at=3"], "--related_at=3 is beyond the last of --lm_depth=2 blocks"),
    (["--lora=2"], "--lora=2 leaves both backbones as they are: it needs --vit= and --lm="),
    (["--load=none.safetensors"], "is not a checkpoint of this script"),
    (["--resume=none.pt"], "is not the state of a run"),
    (["--resume=none.pt", "--num_steps=0"], "continues a run: pass its --num_steps"),
    (["--rows=4"], "there is no field --rows"),
    (["--precision=fp16"], "--precision=fp16 is not one of auto, fp32, bf16"),
    *(([f"--{key}={value}"], f"--{key}={value} is not a number {allowed}") for key, value, allowed in (
        ("num_steps", -1, "from 0"), ("batch", 0, "from 1"), ("batch", 10 ** 9, "from 1 to 4096"),
        ("seq_len", 0, "from 1"), ("seq_len", 10 ** 9, "from 1 to 65536"), ("eval_every", 0, "from 1"),
        ("side", 0, "from 1"), ("patch", 0, "from 1"), ("shuffle", 0, "from 1"),
        ("vit_dim", 0, "from 1"), ("vit_depth", 0, "from 1"), ("vit_heads", 0, "from 1"), ("vit_mlp", 0, "from 1"),
        ("lm_dim", 0, "from 2"), ("lm_depth", 0, "from 1"), ("lm_heads", 0, "from 1"), ("lm_kv_heads", 0, "from 1"),
        ("lm_mlp", 0, "from 1"), ("rope_theta", 0, "from 1"), ("momentum", 1, "from 0 to 0.9999"),
        ("seed", -1, "from 0"),
        ("cooldown", 0, "from 0.001 to 1"), ("cooldown", 2, "from 0.001 to 1"), ("muon_lr", "nan", "from 0"),
        ("adam_lr", "inf", "from 0"), ("backbone_lr", -1, "from 0"), ("samples", -1, "from 0"), ("top_k", -1, "from 0"),
        ("top_p", 0, "from 0.001 to 1"), ("top_p", 1.5, "from 0.001 to 1"), ("temperature", -0.5, "from 0 to 100"),
        ("max_tokens", 0, "from 1"), ("save_every", -1, "from 0"))),
]


@pytest.mark.parametrize("argv,message", BAD_ARGUMENTS)
def test_bad_arguments(tiny, monkeypatch, tmp_path, argv, message):
    root = make_root(tmp_path / "root")
    with pytest.raises(Fault) as caught:
        run_here(monkeypatch, root, [*SMALL, *tiny[1], "--num_steps=10", *argv])
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (root / "logs").exists()


SIZES = ("side", "patch", "shuffle", "vit_dim", "vit_depth", "vit_heads", "vit_mlp", "lm_dim", "lm_depth", "lm_heads",
         "lm_kv_heads", "lm_mlp", "batch")


def make_or_refuse(sizes):
    """Whether a Config of these sizes makes a model; else it has to be refused in one sentence."""
    try:
        config, _, _ = train_vlm.read_options(["--track=cpu", *(f"--{key}={value}" for key, value in sizes.items())])
        train_vlm.check_config(config, FakeRun())
    except Fault as fault:
        assert "\n" not in str(fault)
        return False
    with torch.device("meta"):
        model = train_vlm.VLM(config, VOCAB)
        tokens = torch.full((2, 5 + model.image_tokens), IMAGE)
        states = model(tokens, torch.zeros_like(tokens), torch.empty(2, 3, 64, 64, dtype=torch.uint8))[-1]
    assert states.shape == (*tokens.shape, config.lm_dim)
    return True


def test_any_sizes_make_a_model_or_one_sentence():
    rng, made = random.Random(0), []
    for _ in range(300):
        fields = rng.sample(SIZES, rng.randint(1, 5))
        made.append(make_or_refuse({key: rng.choice((-1, 0, 1, 2, 3, 4, 6, 8, 12)) for key in fields}))
    assert 10 < sum(made) < 290


def test_damaged_shards(tiny, monkeypatch, tmp_path):
    root = make_root(tmp_path / "root")

    def refuses(folder, message):
        with pytest.raises(Fault, match=f"cannot be trained on .*{message}.*once it is moved away"):
            run_here(monkeypatch, root, [*SMALL, *tiny[1], f"--data={folder}"])
        return shutil.copytree(tiny[0] / "train", tmp_path / "train", dirs_exist_ok=True)

    folder = shutil.copytree(tiny[0] / "train", tmp_path / "train")
    for name, edit, message in (
            ("qa", lambda a: np.full_like(a, VOCAB), f"holds token {VOCAB} of a vocabulary of {VOCAB}"),
            ("qa", lambda a: a.astype(np.float32), "qa.npy holds float32"),
            ("qa", lambda a: a[:, :-1], "qa.npy holds uint16"),
            ("answer", lambda a: a[:-1], "answer.npy holds uint8"),
            ("answer", np.zeros_like, "conversation 0 has no answer"),
            ("pixels", lambda a: a[:, :1], "pixels.npy holds uint8"),
            ("pixels", lambda a: a[0, 0], "pixels.npy holds uint8")):
        np.save(folder / f"{name}.npy", edit(np.load(folder / f"{name}.npy")))
        folder = refuses(folder, message)
    (folder / "pixels.npy").write_bytes((folder / "pixels.npy").read_bytes()[:-10])
    folder = refuses(folder, "")
    (folder / "answer.npy").unlink()
    folder = refuses(folder, "answer.npy")
    meta = json.loads((folder / "meta.json").read_text())
    meta["modalities"]["qa"]["vocab"] = 400
    (folder / "meta.json").write_text(json.dumps(meta))
    refuses(folder, "another vocabulary than the frozen validation set")


def footer(root):
    return runs.footers(root)[-1]


class CutOff(BaseException):
    """Nothing in a script catches it."""


def test_resume(tiny, tmp_path, monkeypatch, capsys):
    """Cut off after the state of step 14 of 20 and resumed, evaluated at other steps: the same run to the last digit.
    With more steps it is trained on."""
    argv = [*SMALL, *tiny[1], "--num_steps=20", "--eval_every=9", "--save=true", "--save_every=7"]
    whole, cut = make_root(tmp_path / "whole"), make_root(tmp_path / "cut")
    run_here(monkeypatch, whole, argv)
    plain = checkpoints.Saver.save

    def save(saver, *rest):
        plain(saver, *rest)
        if saver.run.step == 14:
            raise CutOff
    with monkeypatch.context() as patch, pytest.raises(CutOff):
        patch.setattr(checkpoints.Saver, "save", save)
        run_here(patch, cut, argv)
    assert not (cut / "records/runs.jsonl").exists()
    state, = (cut / "checkpoints").glob("*.state.*")
    kept, root = state.read_bytes(), make_root(tmp_path / "resumed")
    run_here(monkeypatch, root, [*argv, f"--resume={state}", "--eval_every=4"])
    for key in ("val_loss", "steps", "tokens", "pictures"):
        assert footer(root)[key] == footer(whole)[key], key
    one, two = (load_file(next((r / "checkpoints").glob("*.safetensors"))) for r in (whole, root))
    assert all(torch.equal(one[name], two[name]) for name in one)
    state.write_bytes(kept)
    capsys.readouterr()
    on = make_root(tmp_path / "on")
    run_here(monkeypatch, on, [*argv, f"--resume={state}", "--num_steps=24"])
    assert "20 steps were planned, 24 are now" in capsys.readouterr().out
    assert footer(on)["steps"] == 24
    with pytest.raises(Fault, match="is of a run with --muon_lr=0.015: pass the same"):
        run_here(monkeypatch, on, [*argv, f"--resume={state}", "--muon_lr=0.01"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_the_state(tiny, tmp_path, monkeypatch, capsys, number):
    handlers, plain = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)], train_vlm.Run.progress

    def progress(run, *step):
        plain(run, *step)
        if run.step == 3:
            os.kill(os.getpid(), number)
    root, argv = make_root(tmp_path / "root"), [*SMALL, *tiny[1], "--num_steps=6"]
    try:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
            patch.setattr(train_vlm.Run, "progress", progress)
            run_here(patch, root, argv)
    finally:
        for n, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
            signal.signal(n, handler)
    state, = (root / "checkpoints").iterdir()
    assert caught.value.code == 0 and not (root / "records/runs.jsonl").exists()
    assert f"continue with the same command and --resume={state}" in capsys.readouterr().out
    on = make_root(tmp_path / "on")
    run_here(monkeypatch, on, [*argv, f"--resume={state}"])
    assert footer(on)["steps"] == 6


def test_samples_that_fail_leave_the_result(tiny, tmp_path, monkeypatch, capsys):
    def show(*_):
        raise ValueError("no paper")
    monkeypatch.setattr(show_vlm.Show, "show", show)
    root = make_root(tmp_path / "root")
    with pytest.raises(SystemExit) as caught:
        run_here(monkeypatch, root, [*SMALL, *tiny[1], "--num_steps=2", "--save=true"], samples=True)
    assert caught.value.code == 1 and "no samples (ValueError: no paper)" in capsys.readouterr().out
    assert math.isfinite(footer(root)["val_loss"]) and len(list((root / "checkpoints").glob("*.safetensors"))) == 1


def test_two_processes_are_the_same_run(tiny, tmp_path):
    runs.assert_same_on_two_processes("vlm", [*SMALL, *tiny[1], "--num_steps=20", "--eval_every=10"], tmp_path)


def test_gpu_track_shapes():
    with torch.device("meta"):
        model = train_vlm.VLM(train_vlm.CONFIGS["gpu"], VOCAB)
        tokens = model.encode_images(torch.empty(2, 3, 64, 64, dtype=torch.uint8))
    assert tokens.shape == (2, 64, 512)
