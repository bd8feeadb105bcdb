"""train_4m.py: masking, model, loss, evaluation, sampling, Muon, and whole runs on a tiny data set."""
import collections
import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

import checkpoints
import eval_masks
import generate_4m
import rules
import judge
import ranks
import runs
import scenes
import show_4m
import studio
import texts
import tokenizer
import train_4m
from train_4m import TEXTS, Fault, Output

ROOT = Path(__file__).resolve().parent.parent
IMAGES, MODALITIES = scenes.IMAGES, [*scenes.modalities(64)]
LINKS = train_4m.known_links(train_4m.Layout(scenes.modalities(64)))
DIMS = {"dim": 64, "head_dim": 32, "enc_depth": 1, "dec_depth": 1}
SMALL = ["--track=cpu", *(f"--{key}={value}" for key, value in DIMS.items()), "--batch=8",
         "--quality_scenes=0", "--precision=fp32", "--word_steps=0"]  # a short run would have no others
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def write_shards(folder, tokens):
    """Training shards of rows {modality: array}, as data/scenes.py writes them."""
    folder.mkdir(parents=True)
    for m, rows in tokens.items():
        np.save(folder / f"{m}.npy", rows.astype(np.uint16))
    identity = {"name": "scenes64", "version": scenes.VERSION, "size": 64, "num": len(rows), "seed": 1,
                "tokenizer": scenes.sha256(tokenizer.WEIGHTS), "text": scenes.sha256(tokenizer.TEXT)}
    hashes = {m: scenes.sha256(folder / f"{m}.npy") for m in tokens}
    meta = {**identity, "modalities": scenes.modalities(64), "sha256": hashes}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with 300 training scenes, 100 validation scenes and their masks, and the overrides that point there."""
    folder = tmp_path_factory.mktemp("tiny")
    with np.load(ROOT / "data/frozen/scenes64.npz") as arrays:
        tokens, about = {m: arrays[m] for m in MODALITIES}, arrays["modalities"]
    with np.load(ROOT / "data/frozen/eval_4m_64.npz") as arrays:
        roles = arrays["roles"]
    write_shards(folder / "train", {m: rows[:300] for m, rows in tokens.items()})
    np.savez(folder / "scenes.npz", modalities=about, **{m: rows[:100] for m, rows in tokens.items()})
    np.savez(folder / "masks.npz", roles=roles[:100])
    return folder, [f"--data={folder}/train", f"--frozen={folder}/scenes.npz", f"--frozen_masks={folder}/masks.npz"]


make_root, run_here = functools.partial(runs.make_root, "4m"), functools.partial(runs.run_here, "4m")


@pytest.fixture(scope="module")
def frozen():
    return train_4m.read_frozen(train_4m.CONFIGS["cpu"])


@pytest.fixture(scope="module")
def layout(frozen):
    return train_4m.Layout(frozen[2])


def small_model(layout, heads=0.5, **fields):
    """A small model in float32; heads: the spread of what starts at zero, so that predictions differ."""
    torch.manual_seed(0)
    model = train_4m.Nano4M(dataclasses.replace(train_4m.CONFIGS["cpu"], **{**DIMS, **fields}), layout)
    train_4m.init_weights(model)
    for p in model.parameters():
        if heads and not p.any():
            torch.nn.init.normal_(p, std=heads)
    return model


@pytest.fixture(scope="module")
def model(layout):
    return small_model(layout)


# ------------------------------------------------------------------------------------------------------------
# Data and masking

def test_layout(frozen, layout):
    tokens, _, modalities, _ = frozen
    assert json.loads(json.dumps(scenes.modalities(64))) == modalities
    assert layout.size == tokens.shape[1] == sum(about["length"] for about in modalities.values())
    for k, m in enumerate(MODALITIES):
        assert (layout.kind[layout.span[m]] == k).all() and (layout.kind == k).sum() == modalities[m]["length"]
        assert layout.offset[layout.span[m]].tolist() == list(range(modalities[m]["length"]))
        part = tokens[:, layout.span[m]]
        assert torch.equal(layout.valid(tokens)[:, layout.span[m]], part != modalities[m]["pad"])
        if m in layout.end:  # one end token a text, and nothing after it
            assert ((part == layout.end[m]).sum(1) == 1).all()
            assert torch.equal((part == layout.end[m]).int().argmax(1) + 1, (part != modalities[m]["pad"]).sum(1))


def test_loader(tiny, frozen):
    arrays, digest = train_4m.read_shards(dataclasses.replace(train_4m.CONFIGS["cpu"], data=str(tiny[0] / "train")), frozen[2])
    assert len(digest) == 64
    rows = torch.from_numpy(np.concatenate(arrays, 1).astype(np.int64))
    loader, again, other = (train_4m.Loader([rows], 50, seed, torch.device("cpu")) for seed in (3, 3, 4))
    epoch = torch.cat([loader()[0] for _ in range(6)])
    assert torch.equal(epoch, torch.cat([again()[0] for _ in range(6)])) and not torch.equal(epoch[:50], other()[0])
    key = lambda rows: sorted(map(tuple, rows.tolist()))
    assert key(epoch) == key(frozen[0][:300]), "an epoch is every scene once"
    assert key(torch.cat([loader()[0] for _ in range(6)])) == key(epoch) and not torch.equal(loader()[0], epoch[:50])


def draw(tokens, layout, inputs, seed=0, **fields):
    """Inputs, targets and which of these count, as in a course step."""
    config = dataclasses.replace(train_4m.CONFIGS["cpu"], **fields)
    rng = torch.Generator().manual_seed(seed)
    enc_pos, visible, dec_pos, counted = train_4m.course_positions(tokens, layout, inputs, config, rng)
    assert visible is None, "no input is padding"
    return enc_pos, dec_pos, counted


@pytest.mark.parametrize("inputs", [1, 40, 128])
def test_drawn_places_are_valid_and_disjoint(frozen, layout, inputs):
    tokens, images = frozen[0][:500], train_4m.CONFIGS["cpu"].image_targets
    chosen, targets, counted = draw(tokens, layout, inputs)
    valid, rest = layout.valid(tokens), layout.valid(tokens).scatter(1, chosen, False)
    words = train_4m.CONFIGS["cpu"].text_targets
    assert chosen.shape == (500, inputs) and targets.shape == counted.shape == (500, images + words)
    assert valid.gather(1, chosen).all() and rest.gather(1, targets)[counted].all()
    for places in (chosen, targets):
        assert (places.sort(1).values.diff(dim=1) > 0).all()
    split = layout.span["desc"].start
    assert (targets[:, :images] < split).all() and (targets[:, images:] >= split).all()
    assert torch.equal(counted[:, :images].sum(1), rest[:, :split].sum(1).clamp(max=images))
    assert torch.equal(counted[:, images:].sum(1), rest[:, split:].sum(1).clamp(max=words)), "all the text there is counts"
    assert torch.equal(chosen, draw(tokens, layout, inputs)[0])
    assert not torch.equal(chosen, draw(tokens, layout, inputs, seed=1)[0])


class FixedBudget(np.random.Generator):
    """A numpy generator whose integers are all the same."""
    budget = 0

    def integers(self, *_):
        return self.budget


@pytest.mark.parametrize("inputs", [16, 100])
def test_inputs_follow_the_per_scene_masking(frozen, layout, inputs):
    tokens, kind, K = frozen[0], layout.kind.numpy(), len(MODALITIES)
    rng, slow = FixedBudget(np.random.PCG64(1)), []
    rng.budget = inputs
    for valid in layout.valid(tokens).numpy():
        seen = eval_masks.draw_roles(valid, kind, rng) == 1
        spare = rng.permutation(np.flatnonzero(valid & ~seen))[:inputs - seen.sum()]  # others step in
        seen[spare] = True
        slow.append(np.bincount(kind[seen], minlength=K))
    slow = np.array(slow)
    fast = np.array([np.bincount(row, minlength=K) for row in layout.kind[draw(tokens, layout, inputs)[0]].numpy()])
    error = np.sqrt((slow.var(0) + fast.var(0)) / len(slow))
    assert (np.abs(slow.mean(0) - fast.mean(0)) < 4.5 * error).all(), (slow.mean(0), fast.mean(0))
    assert np.allclose(slow.std(0), fast.std(0), rtol=0.1), "the spread of a Dirichlet draw, not of an even split"
    bins = np.arange(0, inputs + 8, max(1, inputs // 16))
    histograms = [np.histogram(counts[:, :5], bins)[0] / counts[:, :5].size for counts in (slow, fast)]
    assert np.abs(np.subtract(*histograms)).sum() / 2 < 0.05


def counts(places, layout):
    """How many of the places are of each modality: (B, K)."""
    return (layout.kind[places][..., None] == torch.arange(len(MODALITIES))).sum(1)


def test_places_inside_a_modality_are_uniform(frozen, layout):
    chosen, targets, counted = draw(frozen[0], layout, 16)
    for places in (chosen.flatten(), targets[counted]):
        for m in IMAGES:
            hits = torch.bincount(places[layout.kind[places] == MODALITIES.index(m)], minlength=layout.size)
            hits = hits[layout.span[m]].double()
            assert hits.sum() > 1500
            assert ((hits - hits.mean()) ** 2 / hits.mean()).sum() < 63 + 5 * math.sqrt(2 * 63), m


def test_targets_take_every_modality_alike(frozen, layout):
    _, targets, counted = draw(frozen[0], layout, 1, image_targets=1, text_targets=1)  # one of each: none runs out
    share = counts(targets, layout).double().mean(0)
    assert counted.all()
    assert (share[:5] - 1 / 5).abs().max() < 4.5 * math.sqrt(0.2 * 0.8 / 2000), share
    assert (share[5:] - 1 / 3).abs().max() < 4.5 * math.sqrt(0.33 * 0.67 / 2000) + 0.01, share
    _, targets, _ = draw(frozen[0], layout, 64, image_targets=16)
    share = counts(targets[:, :16], layout).double().mean(0)
    assert (share[:5] - 3.2).abs().max() < 0.2, share


@pytest.mark.parametrize("share", [0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("given, asked", dict.fromkeys(link for link in LINKS if link))
def test_a_link_gives_one_modality_and_asks_for_others(frozen, layout, given, asked, share):
    tokens, rows = frozen[0][:300], 300
    ask = lambda seed: train_4m.link_positions(tokens, layout, given, asked, share, torch.Generator().manual_seed(seed))
    enc_pos, visible, dec_pos, counted = ask(0)
    places = torch.cat([torch.arange(layout.size)[layout.span[m]] for m in (*given, *asked)]).sort().values
    met = torch.cat([enc_pos, dec_pos], 1).sort(1).values
    assert torch.equal(met, places.expand(rows, -1)), "each place of these modalities is an input or a target, not both"
    valid = layout.valid(tokens)
    assert torch.equal(visible, valid.gather(1, enc_pos)) and torch.equal(counted, valid.gather(1, dec_pos))
    assert set(given) <= set(IMAGES) or not visible.all(), "some texts are padded"
    assert asked[0] in IMAGES or not counted.all()
    known = torch.zeros_like(valid).scatter(1, enc_pos, True)
    assert all(known[:, layout.span[m]].all() for m in given)
    assert not any(known[:, layout.span[m]].any() for m in asked[1:])
    first, size = known[:, layout.span[asked[0]]], layout.modalities[asked[0]]["length"]
    assert (first.sum(1) == share * size).all()
    if asked[0] in TEXTS:
        assert torch.equal(first, (torch.arange(size) < share * size).expand(rows, -1)), "the beginning of a text"
    elif share:  # places of a picture as likely as each other, in every scene others
        error = (first.sum(0) - share * rows).square() / (rows * share * (1 - share))
        assert error.sum() < 63 + 5 * math.sqrt(2 * 63) and len(first.unique(dim=0)) == rows
    assert all(torch.equal(a, b) for a, b in zip(ask(0), ask(0)))
    assert torch.equal(enc_pos, ask(1)[0]) == (share == 0 or asked[0] in TEXTS)


def test_links_are_of_pictures_or_of_texts():
    """As the loss has it, in which the first targets are pictures' and all others texts'."""
    for given, asked in filter(None, train_4m.LINKS):
        assert not {*given} & {*asked} and len({m in TEXTS for m in asked}) == 1
    asked = {m for link in train_4m.LINKS if link for m in link[1]}
    assert asked == set(train_4m.MODALITIES) and None in LINKS, "everything is learned, and any from any"


def test_links_take_turns(layout):
    config = dataclasses.replace(train_4m.CONFIGS["cpu"], word_steps=600)
    shapes = [train_4m.step_shape(step, config, layout) for step in range(600 + 7200)]
    words, mixed = shapes[:600], shapes[600:]
    for steps, links in ((words, LINKS[:train_4m.WORD_LINKS]), (mixed, LINKS)):
        for i in range(0, len(steps) - len(links), 7):  # each once in any row of so many steps
            assert collections.Counter(link for link, _ in steps[i:i + len(links)]) == collections.Counter(links)
        for link in set(links):
            shares = collections.Counter(share for other, share in steps if other == link)
            expected = {0: 5 / 8, 0.25: 1 / 8, 0.5: 1 / 8, 0.75: 1 / 8} if link else {k / 8: 1 / 8 for k in range(1, 9)}
            if link == ((), ("rgb",)):  # there is always something to start from
                expected = {0.25: 6 / 8, 0.5: 1 / 8, 0.75: 1 / 8}
            assert set(shares) == set(expected), link
            for share, part in expected.items():
                assert abs(shares[share] - part * shares.total()) <= 8, (link, share)
    assert all({*given, *asked} <= {"rgb", *TEXTS} for (given, asked), _ in words)


@pytest.mark.parametrize("word_steps, num_steps", [(0, 5), (5, 5), (30, 200)])
def test_the_warm_up_meets_every_shape(tiny, layout, tmp_path, monkeypatch, word_steps, num_steps):
    """What a shape costs the first time, kernels on a CPU and graphs on a GPU, it costs before the clock runs."""
    warm_up, training = [], []

    def no_loss(model, tokens, enc_pos, visible, dec_pos, weight, images):
        kind = training if tokens.any() else warm_up
        kind.append((enc_pos.size(1), visible is None, dec_pos.size(1), images))
        return 0 * sum(p.sum() for p in model.parameters())

    monkeypatch.setattr(train_4m, "masked_loss", no_loss)
    argv = [*SMALL[:-1], f"--word_steps={word_steps}", *tiny[1], f"--num_steps={num_steps}", "--eval_every=1000"]
    run_here(monkeypatch, make_root(tmp_path / "root"), argv)
    assert len(training) == num_steps and set(warm_up) == set(training)
    config = dataclasses.replace(train_4m.CONFIGS["cpu"], word_steps=word_steps)
    assert len(warm_up) == len({train_4m.step_shape(step, config, layout) for step in range(num_steps)}), "each once"
    assert num_steps < 200 or (len(warm_up) == 35 and len(set(warm_up)) == 31), "all there are; two links are alike"


@pytest.mark.parametrize("dec_self", [False, True])
def test_a_step_is_what_its_shape_says(layout, frozen, monkeypatch, dec_self):
    """Its inputs, targets and tokens; and its FLOPs are three times those that torch counts in the forward pass."""
    config = dataclasses.replace(train_4m.CONFIGS["cpu"], **DIMS, batch=4, word_steps=3, dec_self=dec_self)
    tokens, valid = frozen[0][:4], layout.valid(frozen[0][:4])
    model, run, asked, links = small_model(layout, dec_self=dec_self), runs.fake_run(), [], set()
    run.slice = lambda batch: slice(0, batch)
    run.autocast = lambda: torch.autocast("cpu", torch.bfloat16)  # attention is written out: torch counts its products
    optimizers = train_4m.make_optimizers(model, config, run)

    plain = train_4m.masked_loss

    def counted(model, *arguments):
        with FlopCounterMode(display=False) as counter:
            loss = plain(model, *arguments)
        asked.append((*arguments, counter.get_total_flops()))
        return loss

    monkeypatch.setattr(train_4m, "masked_loss", counted)
    rng = torch.Generator().manual_seed(0)
    for step in range(21):
        link, share = train_4m.step_shape(step, config, layout)
        loss, count, flops = train_4m.train_step(step, tokens, rng, model, *optimizers, layout, config, run)
        batch, enc_pos, visible, dec_pos, weight, images, forward_flops = asked[-1]
        links.add(link)
        if link:
            given, (first, *others) = link
            length = lambda *names: sum(layout.modalities[m]["length"] for m in names)
            known = int(share * length(first))
            assert enc_pos.shape == visible.shape == (4, length(*given) + known)
            assert dec_pos.shape == (4, length(first, *others) - known)
            assert set(layout.kind[dec_pos].flatten().tolist()) == {MODALITIES.index(m) for m in (first, *others)}
            assert images == dec_pos.size(1) * (first in IMAGES)
            assert torch.equal(weight > 0, valid.gather(1, dec_pos))
            assert torch.equal(visible, valid.gather(1, enc_pos))
        else:
            assert enc_pos.shape == (4, share * config.budget) and visible is None
            assert dec_pos.shape == (4, config.image_targets + config.text_targets) and images == config.image_targets
        assert torch.equal(batch, tokens) and weight.sum().item() == pytest.approx(1) and loss.isfinite()
        assert count == (weight > 0).sum() + (enc_pos.numel() if visible is None else visible.sum())
        assert flops == 3 * forward_flops
    assert links == set(LINKS)


def digest_of(*paths):
    """The sha256 of the frozen evaluation code and of the files that it reads, recomputed."""
    code = Path(train_4m.__file__).read_text().split("# --- frozen:")[1].split("# --- end: eval")[0]
    assert code.startswith(" eval ---\nEVAL_BATCH = ") and "def read_frozen(" in code and "def evaluate(" in code
    return hashlib.sha256(code.encode() + b"".join(path.read_bytes() for path in paths)).hexdigest()


@pytest.mark.parametrize("track", ["cpu", "gpu"])
def test_frozen_masks(track):
    config = train_4m.CONFIGS[track]
    tokens, roles, modalities, digest = train_4m.read_frozen(config)
    layout = train_4m.Layout(modalities)
    paths = [ROOT / config.frozen, ROOT / config.frozen_masks]
    assert digest == digest_of(*paths)
    assert roles.dtype == torch.uint8 and set(roles.unique().tolist()) == {0, 1, 2}
    assert layout.valid(tokens)[roles > 0].all()
    course, whole = roles[::2], roles[1::2]
    for role in (1, 2):  # as the course masks
        count = (course == role).sum(1)
        assert count.min() >= 1 and count.max() <= 128 and 45 < count.float().mean() < 66
    valid, given = layout.valid(tokens[1::2]), []
    for k in range(len(MODALITIES)):  # one to three whole modalities, and up to 16 targets of every other one
        there, inputs, targets = ((mask & (layout.kind == k)).sum(1) for mask in (valid, whole == 1, whole == 2))
        given.append(inputs > 0)
        assert (inputs[given[k]] == there[given[k]]).all() and (targets[given[k]] == 0).all()
        assert (targets[~given[k]] == there[~given[k]].clamp(max=16)).all()
    count = torch.stack(given).sum(0).bincount(minlength=4)
    assert len(count) == 4 and count[0] == 0 and count[1:].min() > 270, "as often one, two and three"
    assert torch.stack(given).float().mean(1).sub(0.25).abs().max() < 0.05, "every modality as often"


# ------------------------------------------------------------------------------------------------------------
# Model and loss

def test_padding_does_not_leak(model, layout, frozen):
    tokens, roles = frozen[0][:6], frozen[1][:6]
    targets = draw(tokens, layout, 8)[1]
    places, seen = train_4m.gather_places(roles == 1)
    assert torch.equal(torch.zeros_like(roles, dtype=torch.bool).scatter(1, places, seen), roles == 1)
    with torch.no_grad():
        short = model(tokens, places, seen, targets)
        more = torch.randint(layout.size, (6, 50), generator=torch.Generator().manual_seed(0))
        long = model(tokens, torch.cat([places, more], 1), torch.cat([seen, more < 0], 1), targets)
        wrong = model(tokens, torch.cat([places, more], 1), torch.cat([seen, more >= 0], 1), targets)
    assert torch.equal(short.isfinite(), long.isfinite())
    gap = lambda a, b: (a - b)[a.isfinite()].abs().max().item()
    assert gap(short, long) < 1e-3 and gap(short, wrong) > 1e-2, "50 more inputs must matter once they are seen"


def test_log_probabilities_are_normalised(model, layout, frozen):
    tokens = frozen[0][:4]
    with torch.no_grad():
        places = torch.arange(layout.size).expand(4, -1)
        logits = train_4m.predict(model, tokens, frozen[1][:4] == 1, places)
    assert logits.shape == (4, layout.size, layout.vocab) and logits.dtype == torch.float32
    for m, about in layout.modalities.items():
        part = logits[:, layout.span[m]]
        assert part[..., :about["vocab"]].isfinite().all() and (part[..., about["vocab"]:] == -math.inf).all()
        total = part.logsumexp(-1)
        assert total.max() < 1e-3, "more than all probability"
        if m in IMAGES:
            assert total.abs().max() < 1e-3
        assert part.argmax(-1).unique().numel() > 3, "predictions do not depend on the place"


def test_targets_are_predicted_from_inputs_alone(model, layout, frozen):
    tokens, known = frozen[0][:6], frozen[1][:6] == 1
    targets = draw(tokens, layout, 8)[1]
    other = torch.where(known, tokens, (tokens * 7 + 3) % 128)
    changed = torch.where(known, (tokens * 7 + 3) % 128, tokens)
    with torch.no_grad():
        logits, same, different = (train_4m.predict(model, t, known, targets) for t in (tokens, other, changed))
    assert torch.equal(logits, same) and not torch.equal(logits, different)
    with torch.no_grad():  # nor from which other places are asked for
        few = train_4m.predict(model, tokens, known, targets[:, ::12])
    assert torch.allclose(few.softmax(-1), logits[:, ::12].softmax(-1), atol=1e-4)


def test_loss_is_the_mean_over_modalities(model, layout, frozen):
    tokens = frozen[0][:8]
    inputs, targets, counted = draw(tokens, layout, 20)
    weight, goal = train_4m.target_weights(targets, counted, layout), tokens.gather(1, targets)
    images = train_4m.CONFIGS["cpu"].image_targets

    def loss_of(rows=slice(None)):
        return train_4m.masked_loss(model, tokens[rows], inputs[rows], None, targets[rows], weight[rows], images)
    with torch.no_grad():
        loss, halves = loss_of(), [loss_of(rows) for rows in (slice(0, 4), slice(4, 8))]
        with torch.autocast("cpu", torch.bfloat16):
            rough = loss_of()
        nats = -model(tokens, inputs, None, targets).gather(2, goal[..., None])[..., 0]
    means = [nats[counted & (layout.kind[targets] == k)].mean().item() for k in range(len(MODALITIES))]
    assert not counted.all() and loss.item() == pytest.approx(sum(means) / 8, abs=2e-4)
    assert sum(halves).item() == pytest.approx(loss.item(), abs=2e-4), "parts of a batch add up"
    assert rough.dtype == torch.float32 and rough.item() == pytest.approx(loss.item(), rel=0.05)


@pytest.mark.parametrize("given, asked, share", [
    (("rgb",), ("desc", "bbox", "caption"), 0.5), (("caption",), ("rgb",), 0.25), (("caption",), ("desc", "bbox"), 0.75),
    (("rgb",), ("seg", "edge"), 0), (("depth", "desc"), ("rgb",), 0.5)])
def test_loss_of_a_link(model, layout, frozen, given, asked, share):
    """The mean over what it asks for, whatever is in the padding, which it has among inputs and targets."""
    tokens, rng = frozen[0][:8], torch.Generator().manual_seed(0)
    enc_pos, visible, dec_pos, counted = train_4m.link_positions(tokens, layout, given, asked, share, rng)
    weight = train_4m.target_weights(dec_pos, counted, layout)
    images = dec_pos.size(1) if asked[0] in IMAGES else 0
    among = {"inputs": False, "targets": False}
    with torch.no_grad():
        loss = train_4m.masked_loss(model, tokens, enc_pos, visible, dec_pos, weight, images)
        noise = torch.randint(200, tokens.shape, generator=rng)
        noisy = torch.where(layout.valid(tokens), tokens, noise)
        same = train_4m.masked_loss(model, noisy, enc_pos, visible, dec_pos, weight, images)
        nats = {m: [] for m in asked}
        for b in range(len(tokens)):  # one scene after another, without its padding
            seen, wanted = enc_pos[b, visible[b]][None], dec_pos[b, counted[b]][None]
            among["inputs"] |= seen.size(1) < enc_pos.size(1)
            among["targets"] |= wanted.size(1) < dec_pos.size(1)
            log_probs = model(tokens[b:b + 1], seen, None, wanted)
            for place, row in zip(wanted[0], log_probs[0]):
                nats[MODALITIES[layout.kind[place]]].append(-row[tokens[b, place]].item())
    mean = sum(sum(part) / len(part) for part in nats.values()) / len(asked)
    assert loss.item() == pytest.approx(mean, abs=2e-4)
    assert not torch.equal(noisy, tokens) and same.item() == pytest.approx(loss.item(), abs=1e-5)
    assert among == {"inputs": given != ("rgb",) or asked[0] == "desc", "targets": asked[0] == "desc"}


def test_targets_may_see_their_modality(layout, frozen):
    """With 4M's decoder a target depends on which others of its modality are asked for and are no padding; by default
    on none; and never on what the others are."""
    tokens, enc_pos = frozen[0][:2], torch.tensor([[1, 2, 70]] * 2)
    depth, desc = layout.span["depth"].start, layout.span["desc"].start
    dec_pos = torch.tensor([[depth, depth + 1, depth + 2, desc, desc + 1]] * 2)
    another, noisy = dec_pos.clone(), tokens.clone()
    another[:, 2] = depth + 9
    noisy[:, dec_pos[0]] = 5
    ones = torch.ones(2, 5)
    padding = torch.tensor([[1, 1, 0, 1, 1]] * 2)
    for dec_self in (False, True):
        model = small_model(layout, dec_self=dec_self)
        y = model.hidden(tokens, enc_pos, None, dec_pos, ones)
        assert torch.equal(y, model.hidden(noisy, enc_pos, None, dec_pos, ones))
        moved = (y - model.hidden(tokens, enc_pos, None, another, ones)).abs().amax((0, 2)) > 1e-4
        assert moved.tolist() == [dec_self, dec_self, True, False, False]
        y, other = (model.hidden(tokens, enc_pos, None, places, padding) for places in (dec_pos, another))
        assert torch.allclose(y[:, [0, 1, 3, 4]], other[:, [0, 1, 3, 4]], atol=1e-5)


def test_a_run_with_4ms_decoder(tiny, layout, tmp_path, monkeypatch):
    """Trains, is evaluated, is loaded as what it is; a checkpoint from before the option had a decoder without it."""
    root, words = make_root(tmp_path / "root"), [*SMALL, *tiny[1]]
    run_here(monkeypatch, root, [*words, "--dec_self=true", "--num_steps=4", "--save=true"])
    weights, = (root / "checkpoints").iterdir()
    run_here(monkeypatch, root, [*words, f"--load={weights}", "--num_steps=0"])
    trained, loaded = runs.footers(root)
    assert trained["val_loss"] == pytest.approx(loaded["val_loss"], abs=1e-3)
    with pytest.raises(Fault, match="was trained with --dec_self=True"):
        run_here(monkeypatch, root, [*words, f"--load={weights}", "--num_steps=0", "--dec_self=false"])
    config = {key: value for key, value in {**vars(train_4m.CONFIGS["cpu"]), **DIMS}.items() if key != "dec_self"}
    save_file(small_model(layout).state_dict(), weights, {"config": json.dumps(config)})
    run_here(monkeypatch, root, [*words, f"--load={weights}", "--num_steps=0"])


def test_place_words_share_the_embedding_of_the_grid(model, layout):
    """A word that names a place moves with the embeddings of that row and column of the pictures' grid, others do not."""
    place, asked = layout.span["caption"].start + 3, layout.span["caption"].start + 4
    words = torch.tensor(layout.modalities["desc"]["places"])
    assert len(words[:, 1:].unique(dim=0)) == len(words) > 20
    for word, row, column in [*words[::9].tolist(), [int(words[:, 0].max()) + 9, None, None]]:
        tokens = torch.zeros(1, layout.size, dtype=torch.long)
        tokens[0, place] = word
        y = model.hidden(tokens, torch.tensor([[place]]), None, torch.tensor([[asked]]))
        grads = torch.autograd.grad((y * torch.arange(y.size(-1))).sum(), (model.embed_major.weight, model.embed_minor.weight))
        moved = [set(grad.abs().sum(1).nonzero()[:, 0].tolist()) for grad in grads]
        cells = [set() if cell is None else {cell} for cell in (row, column)]
        own = [{index[p].item() for p in (place, asked)} for index in (model.major, model.minor)]
        assert moved == [a | b for a, b in zip(own, cells)], (word, row, column)
    for word, row, column in words[::9].tolist():
        said = tokenizer.decode_text(tokenizer.load_text(), [word])
        x, y = (int(said.partition(f"{axis}=")[2].split()[0]) for axis in "xy")
        assert (y * 8 // 100, x * 8 // 100) == (row, column), said


def test_targets_start_from_what_is_in_their_cell(model, layout, frozen):
    """The sum of the states of inputs at the place of a picture's target, in any picture, or whose word names it."""
    rng = torch.Generator().manual_seed(0)
    tokens = frozen[0][:6]
    enc_pos = torch.rand(tokens.shape, generator=rng).argsort(1)[:, :300]
    dec_pos = torch.rand(tokens.shape, generator=rng).argsort(1)[:, :200]
    x = torch.randn(6, 300, 8, generator=rng)
    ids = tokens.gather(1, enc_pos) + model.token_offset[enc_pos]
    cell_of_word = {word: 8 * row + column for word, row, column in layout.modalities["desc"]["places"]}  # 8 x 8 cells
    texts_with_places = {MODALITIES.index("desc"), MODALITIES.index("caption")}

    def cell(b, place):
        """Of a place and the token there; None: in no cell."""
        if layout.kind[place] < len(IMAGES):
            return layout.offset[place].item()
        if layout.kind[place].item() in texts_with_places:
            return cell_of_word.get(tokens[b, place].item())
        return None

    valid = layout.valid(tokens).gather(1, enc_pos)
    alone = 0
    for visible in (valid, valid & (torch.rand(valid.shape, generator=rng) < 0.25), None):
        expected, words = torch.zeros(6, 200, 8), 0
        for b in range(6):
            by_cell = collections.defaultdict(list)
            for n, place in enumerate(enc_pos[b]):
                if visible is None or visible[b, n]:
                    by_cell[cell(b, place)].append(x[b, n])
                    words += cell(b, place) is not None and bool(layout.kind[place] >= len(IMAGES))
            for m, place in enumerate(dec_pos[b]):
                if layout.kind[place] < len(IMAGES) and by_cell[layout.offset[place].item()]:
                    expected[b, m] = sum(by_cell[layout.offset[place].item()])
        found = model.at_cells(x, ids, enc_pos, visible, dec_pos)
        assert torch.allclose(found, expected, atol=1e-5) and words
        is_text = layout.kind[dec_pos] >= len(IMAGES)
        assert (found[is_text] == 0).all() and (found != 0).any()
        alone += int((found[~is_text] == 0).all(-1).sum())
    assert alone, "cells with nothing in them"


def test_a_target_moves_with_the_tokens_of_its_cell_alone(layout):
    """In a model that attends to nothing, as one is before its first step, nothing else reaches it."""
    model = small_model(layout, heads=0)
    rgb, depth, caption = (layout.span[m].start for m in ("rgb", "depth", "caption"))
    word, row, column = next(place for place in layout.modalities["desc"]["places"] if min(place[1:]) > 1)
    here, other, pad = 8 * row + column, 8 * row + column - 1, layout.modalities["caption"]["pad"]
    tokens = torch.zeros(1, layout.size, dtype=torch.long)
    enc_pos = torch.tensor([[rgb + here, rgb + other, depth + here, caption, caption + 1, caption + 2, caption + 3]])
    tokens[0, enc_pos[0]] = torch.tensor([11, 22, 33, word, word, pad, word])
    visible = torch.tensor([[True, True, True, True, False, False, True]])
    edge, desc = layout.span["edge"].start, layout.span["desc"].start
    asked = {"here": edge + here, "other": edge + other, "far": edge, "text": desc + 1}
    for what, place in asked.items():
        y = model.hidden(tokens, enc_pos, visible, torch.tensor([[place]]))
        x = (y * torch.arange(y.size(-1))).sum()
        pairs, words = (set(grad.abs().sum(1).nonzero()[:, 0].tolist()) for grad in
                        torch.autograd.grad(x, (model.embed_pair.weight, model.embed_word.weight)))
        expected = {"here": ({11, 33}, {word}), "other": ({22}, set())}.get(what, (set(), set()))
        assert (pairs, words) == expected, what
    y, shown = model.hidden(tokens, enc_pos, visible, torch.tensor([[asked["here"]]])), visible.clone()
    for hidden, moves in ((1, False), (0, True), (2, True), (3, True), (6, True)):
        shown[0, hidden] = False
        assert torch.equal(y, model.hidden(tokens, enc_pos, shown, torch.tensor([[asked["here"]]]))) != moves, hidden
        shown[0, hidden] = True


def test_gpu_model_on_the_meta_device():
    config = train_4m.CONFIGS["gpu"]
    with np.load(ROOT / config.frozen) as arrays:
        layout = train_4m.Layout(json.loads(bytes(arrays["modalities"])))
    with torch.device("meta"):
        model = train_4m.Nano4M(config, layout)
        for name, value in vars(model).items():
            if torch.is_tensor(value):
                setattr(model, name, value.to("meta"))
        train_4m.init_weights(model)
        tokens, inputs, targets = (torch.zeros(4, n, dtype=torch.long) for n in (layout.size, 128, 84))
        loss = train_4m.masked_loss(model, tokens, inputs, inputs >= 0, targets, torch.ones(4, 84), 60)
    assert loss.shape == () and model.hidden(tokens, inputs, None, targets).shape == (4, 84, 512)
    C, count = config.dim, {"encoder": 0, "local": 0, "decoder": 0, "rest": 0}
    for name, p in model.named_parameters():
        count[name.split(".")[0] if name.split(".")[0] in count else "rest"] += p.numel()
    assert count["encoder"] == config.enc_depth * (4 + 2 * config.mlp_ratio) * C * C
    attentions = len([name for name in model.state_dict() if name.startswith("decoder.0.") and ".q." in name])
    assert count["decoder"] == config.dec_depth * (4 * attentions + 2 * config.mlp_ratio) * C * C
    assert count["local"] == C * C
    assert 0 < count["rest"] < 0.25 * (count["encoder"] + count["decoder"])


# ------------------------------------------------------------------------------------------------------------
# Evaluation

def test_untrained_model_is_uniform(layout, frozen):
    loss, numbers = train_4m.evaluate(small_model(layout, heads=0), frozen[0][:8].clone(), frozen[1][:8], frozen[2], 0, 1)
    uniform = {m: math.log(about["vocab"]) for m, about in layout.modalities.items()}
    mean = sum(uniform.values()) / 8
    expected = {f"val_loss_{half}{m}": value for half in ("course", "whole")
                for m, value in {"": mean, **{f"_{m}": nats for m, nats in uniform.items()}}.items()}
    assert numbers == pytest.approx(expected, abs=1e-3)
    assert loss == pytest.approx(mean, abs=1e-3)


# ------------------------------------------------------------------------------------------------------------
# Sampling

def generate(model, layout, frozen, outputs, source="rgb", hide=None, seed=0, n=3):
    """Tokens and known after generating from a modality of n scenes; hide: (modality, places to leave open in it)."""
    tokens = frozen[0][:n]
    known = generate_4m.only(layout, tokens, source, *([hide[0]] if hide else []))
    if hide:
        known[:, layout.span[hide[0]]] &= ~hide[1]
    outputs = outputs if isinstance(outputs, list) else [outputs]
    out, seen = generate_4m.generate(train_4m, model, layout, tokens, known, outputs, seed)
    assert torch.equal(tokens, frozen[0][:n]), "the caller's tokens changed"
    assert torch.equal(out[known], tokens[known]) and seen[known].all(), "what was given changed"
    return out, seen


@pytest.mark.parametrize("scheme", ["roar", "maskgit", "ar"])
@pytest.mark.parametrize("steps", [1, 8, 200])
def test_generation_fills_a_modality(model, layout, frozen, scheme, steps):
    for modality in ("depth", "bbox") if steps == 8 else ("edge",):
        output = Output(modality, scheme=scheme, steps=steps, temperature=1.0)
        out, seen = generate(model, layout, frozen, output)
        again, other = (generate(model, layout, frozen, output, seed=seed)[0] for seed in (0, 1))
        span, about = layout.span[modality], layout.modalities[modality]
        assert torch.equal(out, again) and not torch.equal(out, other)
        assert (out[:, span] < about["vocab"]).all() and (out[:, span] >= 0).all()
        outside = torch.ones(layout.size, dtype=torch.bool)
        outside[span] = False
        assert torch.equal(out[:, outside], frozen[0][:3, outside])
        assert torch.equal(seen[:, outside], generate_4m.only(layout, frozen[0][:3], "rgb")[:, outside])
        if modality in IMAGES:
            assert seen[:, span].all() and not torch.equal(out[0, span], out[1, span])


def test_temperature_comes_before_top_k_and_that_before_top_p():
    """In any other order two tokens would be left of these."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    sharp = train_4m.sharpen(logits, temperature=0.5, top_k=3, top_p=0.54)
    assert sharp.isfinite().tolist() == [True, False, False, False] and sharp[0] == logits[0] / 0.5
    assert train_4m.sharpen(logits, 0.5, 0, 0.54).isfinite().sum() == 2, "top_p of all four"
    assert train_4m.sharpen(logits, 1.0, 3, 0.54).isfinite().sum() == 2, "as if it were not sharpened yet"


def test_cold_sampling_leaves_one_choice(model, layout, frozen):
    for modality in ("bbox", "edge"):
        cold = generate(model, layout, frozen, Output(modality, "ar", temperature=0))[0]
        for seed, settings in enumerate(({"temperature": 0}, {"top_k": 1}, {"top_p": 1e-6}), start=1):
            assert torch.equal(cold, generate(model, layout, frozen, Output(modality, "ar", **settings), seed=seed)[0])


@pytest.mark.parametrize("scheme", ["roar", "maskgit"])
def test_one_step_is_the_likeliest_token_everywhere(model, layout, frozen, scheme):
    tokens, span = frozen[0][:3], layout.span["seg"]
    places = torch.arange(span.start, span.stop).expand(3, -1)
    with torch.no_grad():
        best = train_4m.predict(model, tokens, generate_4m.only(layout, tokens, "rgb"), places).argmax(-1)
    for settings in ({"temperature": 0}, {"top_k": 1}, {"temperature": 1e-6}):
        out, _ = generate(model, layout, frozen, Output("seg", scheme, steps=1, **settings))
        assert torch.equal(out[:, span], best), settings


@pytest.mark.parametrize("scheme", ["roar", "maskgit"])
@pytest.mark.parametrize("steps", [1, 5, 40, 64, 200])
def test_unmasking_schedule(layout, frozen, monkeypatch, steps, scheme):
    """Of rows with 64, 40, 5 and no places open, each by its own schedule."""
    span, open_places = layout.span["normal"], torch.tensor([64, 40, 5, 0])
    tokens = frozen[0][:4]
    known = generate_4m.only(layout, tokens, "rgb")
    known[:, span] = torch.arange(64).flip(0) >= open_places[:, None]
    counts, asked = [], []

    def left(t):
        return math.cos(math.pi / 2 * t)

    def predict(model, tokens, known, targets):
        counts.append(known[:, span].sum(1))
        is_open = ~known.gather(1, targets)
        asked.append(is_open.sum(1))
        assert (layout.kind[targets[is_open]] == MODALITIES.index("normal")).all()
        assert targets.size(1) == asked[-1].max(), "as few as the row with most has"
        return torch.zeros(*targets.shape, layout.vocab)

    monkeypatch.setattr(train_4m, "predict", predict)
    _, seen = generate_4m.generate(train_4m, None, layout, tokens, known, [Output("normal", scheme, steps=steps)])
    assert seen[:, span].all()
    made, asked = torch.stack([*counts, seen[:, span].sum(1)]) - counts[0], torch.stack(asked)
    steps = min(steps, 64)
    assert len(made) == steps + 1
    assert torch.equal(asked, made.diff(dim=0) if scheme == "roar" else open_places - made[:-1])
    for row, total in zip(made.T.tolist(), open_places.tolist()):
        for step, count in enumerate(row):
            assert count >= total * (1 - left(step / steps)) - 1e-6
            assert count <= max(total * (1 - left(step / steps)) + 1 + 1e-6, step), "no faster than the schedule"
            assert step == 0 or count > row[step - 1] or count == total
    assert (made[-1] == open_places).all()


def test_maskgit_keeps_the_most_confident(model, layout, frozen):
    tokens, span = frozen[0][:1].clone(), layout.span["edge"]
    known = generate_4m.only(layout, tokens, "rgb")
    places = torch.arange(span.start, span.stop)[None]
    with torch.no_grad():
        logits = train_4m.predict(model, tokens, known, places)
        first = places[0, logits.max(-1).values[0].topk(64 - int(64 * math.cos(math.pi / 4))).indices]
        tokens[:, span] = logits.argmax(-1)
        known[:, first] = True
        rest = places[:, ~known[0, span]]
        tokens[:, rest[0]] = train_4m.predict(model, tokens, known, rest).argmax(-1)
    out, _ = generate(model, layout, frozen, Output("edge", "maskgit", steps=2, temperature=0), n=1)
    assert torch.equal(out[:, span], tokens[:, span])


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.6}, {"temperature": 0.5},
                                      {"temperature": 0.5, "top_p": 0.6}])
def test_draws_follow_the_distribution(layout, monkeypatch, settings):
    """The temperature first, then top_k and top_p: what is drawn, and the log-probability of each draw."""
    logits = torch.randn(12, generator=torch.Generator().manual_seed(1)) * 1.5
    monkeypatch.setattr(train_4m, "predict", lambda model, tokens, known, places: logits.repeat(*places.shape, 1))
    output = Output("rgb", **settings)
    p = (logits.double() / output.temperature).softmax(0)
    order = p.argsort(descending=True)
    nucleus = order[:1 + int((p[order].cumsum(0) < output.top_p).sum())]
    allowed = order[:output.top_k] if output.top_k else nucleus
    expected = torch.zeros_like(p)
    expected[allowed] = p[allowed] / p[allowed].sum()
    tokens, rng = torch.zeros(100, layout.size, dtype=torch.long), torch.Generator().manual_seed(0)
    places = torch.arange(64).expand(100, -1)
    drawn = [train_4m.draw_tokens(None, layout, tokens, tokens > 0, places, output, rng) for _ in range(3)]
    ids, confidence = (torch.cat(part) for part in zip(*drawn))
    share = torch.bincount(ids.flatten(), minlength=12) / ids.numel()
    assert (share - expected).abs().max() < 0.015
    assert set(ids.unique().tolist()) <= set(allowed[expected[allowed] > 0].tolist())
    assert torch.allclose(confidence.double(), logits.double().log_softmax(0)[ids], atol=1e-4)


def test_a_query_that_sees_nothing_gets_zeros():
    q, k, v = torch.randn(3, 2, 2, 5, 16).unbind()
    visible = torch.ones(2, 5, dtype=torch.bool)
    visible[1] = False
    for dtype in (torch.float32, torch.bfloat16):
        parts = [part.to(dtype).detach().clone().requires_grad_() for part in (q, k, v)]
        out = train_4m.attend(*parts, visible)
        out.float().sum().backward()
        assert (out[1] == 0).all() and (out[0] != 0).any() and all(part.grad.isfinite().all() for part in parts)
        whole = train_4m.attend(*parts)
        assert torch.allclose(whole[0].float(), out[0].float(), atol=0.02)


def test_guidance(model, layout, frozen):
    half = torch.arange(64) < 32
    tokens, span = frozen[0][:3], layout.span["depth"]
    known = generate_4m.only(layout, tokens, "rgb", "depth")
    known[:, span] &= ~half
    own = known.clone()
    own[:, :span.start] = False
    places = torch.arange(span.start, span.start + 32).expand(3, -1)
    with torch.no_grad():
        full, base = (train_4m.predict(model, tokens, k, places) for k in (known, own))
    found = {}
    for guidance in (1.0, 3.0):
        output = Output("depth", steps=1, temperature=0, guidance=guidance)
        found[guidance] = generate(model, layout, frozen, output, hide=("depth", half))[0][:, span][:, :32]
        assert torch.equal(found[guidance], (base + guidance * (full - base)).argmax(-1))
    assert not torch.equal(found[1.0], found[3.0])
    for modality in ("rgb", "caption"):  # from nothing of its own; many steps; logits stay numbers
        output = Output(modality, steps=6, guidance=2.0)
        out, _ = generate(model, layout, frozen, output, source="depth")
        assert (out[:, layout.span[modality]] < layout.modalities[modality]["vocab"]).all()


def test_given_parts_are_completed_and_kept(model, layout, frozen):
    hidden = torch.rand(64, generator=torch.Generator().manual_seed(0)) < 0.4
    for scheme in ("roar", "maskgit", "ar"):  # generate asserts that the given part stays
        out, seen = generate(model, layout, frozen, Output("rgb", scheme, steps=7), "depth", ("rgb", hidden))
        assert seen[:, layout.span["rgb"]].all()
        assert not torch.equal(out[:, :64][:, hidden], frozen[0][:3, :64][:, hidden])
    out, seen = generate(model, layout, frozen, Output("desc"), "depth", ("desc", torch.arange(16) >= 6))
    assert seen[:, layout.span["desc"]][:, :7].all()
    for scheme in ("roar", "maskgit", "ar"):  # nothing left to do
        assert torch.equal(generate(model, layout, frozen, Output("rgb", scheme), "rgb")[0], frozen[0][:3])


@pytest.mark.parametrize("modality, scheme", [("rgb", "roar"), ("rgb", "maskgit"), ("rgb", "ar"), ("caption", "ar"),
                                              ("bbox", "ar"), ("desc", "roar"), ("desc", "maskgit")])
def test_a_row_is_generated_as_if_alone(model, layout, frozen, modality, scheme):
    """Whatever the other rows leave open; roar's random order is that of a batch of as many rows."""
    tokens, span = frozen[0][:6], layout.span[modality]
    size = span.stop - span.start
    open_places = torch.tensor([0, 1, 3, size // 2, size - 2, size])
    order = torch.rand(6, size, generator=torch.Generator().manual_seed(1)).argsort(1)
    known = generate_4m.only(layout, tokens, "depth")
    known[:, span] = order.argsort(1) >= open_places[:, None]
    output = Output(modality, scheme, steps=6, temperature=0)
    out, seen = generate_4m.generate(train_4m, model, layout, tokens, known, [output])
    assert torch.equal(out[known], tokens[known]) and seen[known].all(), "what was given changed"
    outside = torch.ones(layout.size, dtype=torch.bool)
    outside[span] = False
    assert torch.equal(out[:, outside], tokens[:, outside]) and torch.equal(seen[:, outside], known[:, outside])
    for i, count in enumerate(open_places):
        rows, place = ([i] * 6, i) if scheme == "roar" else ([i], 0)
        alone, alone_seen = generate_4m.generate(train_4m, model, layout, tokens[rows], known[rows], [output])
        assert torch.equal(out[i], alone[place]) and torch.equal(seen[i], alone_seen[place]), int(count)
        assert count < 3 or not torch.equal(out[i], tokens[i])
        if scheme != "ar" or modality in IMAGES:
            assert seen[i, span].all() and (out[i, span] < layout.modalities[modality]["vocab"]).all()


def test_chained_outputs_see_each_other(model, layout, frozen):
    cold = [Output(m, steps=4, temperature=0) for m in ("depth", "normal")]
    out, seen = generate(model, layout, frozen, cold)
    assert seen[:, layout.span["depth"]].all() and seen[:, layout.span["normal"]].all()
    tokens = frozen[0][:3]
    first = generate_4m.generate(train_4m, model, layout, tokens, generate_4m.only(layout, tokens, "rgb"), cold[:1])
    second = generate_4m.generate(train_4m, model, layout, *first, cold[1:])
    assert torch.equal(out, second[0]) and torch.equal(seen, second[1])
    assert not torch.equal(out, generate(model, layout, frozen, cold[1:])[0])


@pytest.mark.parametrize("modality", ["desc", "caption", "bbox"])
def test_texts_end(layout, frozen, monkeypatch, modality):
    end, span, about = layout.end[modality], layout.span[modality], layout.modalities[modality]
    lengths = []

    def predict(model, tokens, known, targets):
        lengths.append(known[:, span].sum(1))
        logits = torch.zeros(*targets.shape, layout.vocab)
        logits[..., end] = math.log(0.15 * about["vocab"])
        logits[..., about["pad"]] = -20.0  # a trained model never writes it: it is no target
        return logits

    monkeypatch.setattr(train_4m, "predict", predict)
    out, seen = generate(None, layout, frozen, Output(modality), n=8)
    part, seen = out[:, span], seen[:, span]
    assert (part == end).any(1).float().mean() > 0.7
    for row, visible, grown in zip(part.tolist(), seen.tolist(), torch.stack(lengths, 1).tolist()):
        n = row.index(end) + 1 if end in row else len(row)
        assert all(visible[:n]) and not any(visible[n:]) and set(row[n:]) <= {about["pad"]}
        assert about["pad"] not in row[:n]
        assert grown == [min(step, n) for step in range(len(grown))], "the model saw tokens after the end"
    assert len({row.index(end) for row in part.tolist() if end in row}) > 2, "rows end on their own"


def test_generate_refuses(model, layout, frozen):
    for output, message in ((Output("audio"), "no modality 'audio'"), (Output("rgb", "best"), "scheme 'best'"),
                            (Output("rgb", steps=0), "0 steps"), (Output("rgb", top_k=-1), "top_k is at least 0"),
                            (Output("rgb", temperature=-0.5), "a temperature of -0.5: it is a number of at least 0"),
                            (Output("rgb", temperature=math.nan), "a temperature of nan"),
                            (Output("desc", top_p=0), "top_p is above 0"), (Output("rgb", top_p=1.5), "at most 1")):
        with pytest.raises(Fault, match=message):
            generate(model, layout, frozen, output, source="depth")
    tokens = frozen[0][:2]
    known = generate_4m.only(layout, tokens, "rgb")
    known[1] = False
    with pytest.raises(Fault, match="at least one known"):
        generate_4m.generate(train_4m, model, layout, tokens, known, [Output("depth")])


def test_true_pictures_are_rendered_as_they_are(monkeypatch):
    """Compiling the ray caster takes longer than what it saves."""
    asked, render = [], studio.render

    def spy(scenes, size, compile=True):
        asked.append((size, compile))
        return render(scenes, size, compile)
    monkeypatch.setattr(studio, "render", spy)
    true = studio.Studio().truth(64, 3)
    assert asked == [(64, False)]
    assert {name: picture.shape for name, picture in true.items()} == {name: (3, 3, 64, 64) for name in IMAGES}


class Oracle:
    """A judge that sees in the pictures what it is told, and finds them half as good as can be."""

    def __init__(self, objects):
        self.objects = objects

    def read(self, pictures):
        assert pictures.shape[1:] == (3, 64, 64) and 0 <= pictures.min() and pictures.max() <= 1
        return self.objects[:len(pictures)]

    def fidelity(self, pictures, objects):
        assert objects == self.objects[:len(pictures)]
        return 0.5


def test_quality_numbers(layout, frozen, tmp_path, monkeypatch):
    """A model that generates the truth has the best there are; and a sheet says what the judge sees."""
    tokens, asked = frozen[0][:12], []
    described = [texts.parse_desc(tokenizer.decode_text(tokenizer.load_text(), row[layout.span["desc"]])) for row in tokens]

    def made(script, model, layout, rows, known, outputs, seed=0):
        asked.append((len(rows), seed, *(output.modality for output in outputs)))
        return rows.clone(), known

    monkeypatch.setattr(generate_4m, "generate", made)
    monkeypatch.setattr(judge, "load", lambda device: Oracle(described))
    monkeypatch.setattr(show_4m, "PART", 5)
    monkeypatch.setattr(show_4m, "TRUTH_SCENES", 6)
    run = runs.fake_run()
    run.options = train_4m.Options(quality_scenes=12)
    shown = show_4m.Show(train_4m, run, layout, frozen[0])
    numbers = shown.show(None, tmp_path)
    assert set(numbers) == {f"quality_{name}" for name in ("depth_l1", "normal_degrees", "desc_f1", "desc_object_f1",
                                                           "rgb_from_desc_f1", "rgb_from_caption_f1", "fidelity")}
    assert numbers["quality_normal_degrees"] < 8 and numbers["quality_depth_l1"] < 0.15, "what the tokenizer loses"
    assert [numbers[f"quality_{name}"] for name in ("desc_f1", "desc_object_f1", "rgb_from_desc_f1",
                                                    "rgb_from_caption_f1", "fidelity")] == [1, 1, 1, 1, 0.5]
    assert asked[:2] == [(5, 0, "depth"), (1, 1, "depth")] and asked[4:7] == [(5, 0, "desc"), (5, 1, "desc"), (2, 2, "desc")]
    assert (tmp_path / "4m.png").exists() and shown.bar.n == shown.bar.total == 9
    shown.judge = Oracle(described[1:] + described[:1])
    assert shown.labels(judge.object_f1, torch.zeros(2, 3, 64, 64), tokens[:2]) == ["rgb, judged F1: 0.00"] * 2


# ------------------------------------------------------------------------------------------------------------
# Muon

@pytest.mark.parametrize("shape", [(3, 96, 32), (3, 32, 96), (3, 64, 64)])
def test_orthogonalise(shape):
    rng = torch.Generator().manual_seed(0)
    U, _, V = torch.linalg.svd(torch.randn(shape, generator=rng), full_matrices=False)
    spectrum = torch.logspace(0, -2, U.shape[2]) * torch.tensor([1.0, 1e-3, 1e3])[:, None]
    G = U * spectrum[:, None] @ V
    X = train_4m.orthogonalise(G)
    assert X.shape == G.shape and X.dtype == torch.bfloat16 and train_4m.orthogonalise(G, G.dtype).dtype == G.dtype
    X = X.float()
    values = torch.linalg.svdvals(X)
    assert 0.7 < values.min() and values.max() < 1.3
    assert (X - U @ V).norm(dim=(1, 2)).max() < 0.2 * U.shape[2] ** 0.5, "not the nearest orthogonal matrix"
    alone = torch.cat([train_4m.orthogonalise(g[None]) for g in G]).float()
    assert torch.allclose(X, alone, atol=0.03), "matrices of a stack depend on each other"


def test_every_parameter_has_one_optimizer(model):
    muon, adam = train_4m.make_optimizers(model, train_4m.CONFIGS["cpu"], runs.fake_run())
    matrices = [id(p) for params, _ in muon.stacks for p in params]
    rest = [id(p) for group in adam.param_groups for p in group["params"]]
    assert sorted(matrices + rest) == sorted(map(id, model.parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(p.ndim == 2 for params, _ in muon.stacks for p in params)
    assert not [names[i] for i in matrices if any(word in names[i] for word in ("embed", "head", "position", "kind"))]
    assert not [names[i] for i in rest if names[i].startswith(("encoder", "local", "decoder", "mix"))]


def test_muon_descends():
    rng = torch.Generator().manual_seed(0)
    goals = [0.5 * torch.randn(shape, generator=rng) for shape in ((24, 8), (8, 24), (24, 8))]
    params = [torch.nn.Parameter(torch.zeros_like(goal)) for goal in goals]
    loss = lambda: sum((p - goal).square().sum() for p, goal in zip(params, goals))
    muon, losses = train_4m.Muon(params, 0.9), []
    for step in range(60):
        for p in params:
            p.grad = None
        losses.append(loss())
        losses[-1].backward()
        muon.step(0.2 * (1 - step / 60))
    assert losses[1] < losses[0] and loss() < 0.1 * losses[0]
    before = [p.detach().clone() for p in params]
    muon.step(0.0)
    assert all(torch.equal(p, b) for p, b in zip(params, before))


# ------------------------------------------------------------------------------------------------------------
# Whole runs

@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A finished run of the script: (its folder, the overrides, the completed process)."""
    root = make_root(tmp_path_factory.mktemp("run"))
    argv = [*SMALL[:-1], "--word_steps=4", *tiny[1], "--num_steps=20", "--eval_every=8", "--seed=5", "--save=true"]
    done = subprocess.run([sys.executable, "train_4m.py", *argv], cwd=root, env=ENV, capture_output=True, text=True,
                          timeout=600)
    assert done.returncode == 0, done.stderr
    return root, argv, done


def test_log(finished, tiny):
    root, argv, done = finished
    path, = (root / "logs").iterdir()
    log = rules.parse_log(path)
    assert log["source"].strip() == Path(train_4m.__file__).read_text().strip()
    settings, foot = json.loads(log["config"]), log["footer"]
    assert settings["argv"] == argv and settings["config"]["num_steps"] == 20 and settings["config"]["dim"] == 64
    assert {"python", "torch", "hardware", "git"} <= set(settings) and settings["torch"] == torch.__version__
    assert [step for step, _, _ in log["steps"]] == [8, 16, 20]
    required = """script task track seed world_size hardware steps parameters tokens val_loss target reached
        train_seconds compile_seconds tokens_per_second mfu peak_memory_mib data_sha256 eval_sha256 overrides"""
    assert set(required.split()) <= set(foot)
    assert (foot["script"], foot["task"], foot["track"], foot["seed"]) == ("train_4m.py", "4m", "cpu", 5)
    assert 8 * 20 * 80 < foot["tokens"] <= 8 * 20 * (128 + 64) and foot["peak_memory_mib"] > 50
    assert foot["tokens_per_second"] == pytest.approx(foot["tokens"] / foot["train_seconds"], rel=0.01)
    assert foot["eval_sha256"] == digest_of(tiny[0] / "scenes.npz", tiny[0] / "masks.npz")
    assert int(foot["recompiles"]) == 0
    assert foot["overrides"].split() == argv and foot["reached"] in (False, "False")
    for half in ("course", "whole"):
        by_modality = [foot[f"val_loss_{half}_{m}"] for m in MODALITIES]
        assert foot[f"val_loss_{half}"] == pytest.approx(sum(by_modality) / 8, abs=1e-3)
    assert foot["val_loss"] == pytest.approx((foot["val_loss_course"] + foot["val_loss_whole"]) / 2, abs=1e-3)
    uniform = sum(math.log(about["vocab"]) for m, about in scenes.modalities(64).items()) / 8
    assert foot["val_loss"] < uniform - 0.5, "20 steps must learn something"
    assert foot["precision"] == settings["precision"] == "fp32" and settings["options"]["save"] is True
    for line in path.read_text().split(rules.RULE + "\n")[-1].splitlines():
        assert line in done.stdout, "the console shows what the log holds"


def test_outputs(finished, layout):
    root, _, _ = finished
    line, = (root / "records/runs.jsonl").read_text().splitlines()
    path, = (root / "checkpoints").iterdir()
    run, foot = json.loads(line), rules.parse_log(root / "logs" / f"{path.stem}.txt")["footer"]
    assert run["run_id"] == path.stem and run["val_loss"] == foot["val_loss"] and set(foot) - {"samples"} <= set(run)
    assert (root / "samples/4m.png").read_bytes().startswith(b"\x89PNG")
    assert (root / "samples" / path.stem / "4m.png").read_bytes() == (root / "samples/4m.png").read_bytes()
    with safe_open(path, "pt") as file:  # no pickle: safetensors holds tensors and text only
        assert json.loads(file.metadata()["config"])["dim"] == 64
        assert len(file.metadata()["model_sha256"]) == 64
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    model = small_model(layout)
    assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert foot["parameters"] == sum(p.numel() for p in model.parameters())
    assert not list(root.glob("*/*.part"))


def test_loading_reproduces_the_loss(finished, tiny, tmp_path, monkeypatch):
    """The checkpoint knows its architecture: nothing of it is passed."""
    checkpoint, = (finished[0] / "checkpoints").iterdir()
    root = make_root(tmp_path / "again")
    argv = ["--track=cpu", "--quality_scenes=0", "--precision=fp32", *tiny[1],
            f"--load={checkpoint}", "--num_steps=0", f"--data={tmp_path}/none"]
    run_here(monkeypatch, root, argv, samples=True)
    foot, before = (json.loads((r / "records/runs.jsonl").read_text()) for r in (root, finished[0]))
    assert foot["val_loss"] == pytest.approx(before["val_loss"], abs=0.02)
    assert foot["eval_sha256"] == before["eval_sha256"] and foot["tokens"] == 0
    assert (root / "samples/4m.png").exists() and not list((root / "checkpoints").iterdir())


def test_a_result_outlives_its_samples(tiny, tmp_path, monkeypatch, capsys):
    """Whatever happens while samples are drawn: footer, weights and line are there, one sentence, exit code 1."""
    root = make_root(tmp_path / "root")
    monkeypatch.setattr(generate_4m, "generate", lambda *_, **__: 1 / 0)
    with pytest.raises(SystemExit) as stopped:
        run_here(monkeypatch, root, [*SMALL, *tiny[1], "--num_steps=2", "--save=true"], samples=True)
    assert stopped.value.code == 1 and len(list((root / "checkpoints").iterdir())) == 1
    log, = (root / "logs").iterdir()
    assert rules.parse_log(log)["footer"]["steps"] == 2 and len(runs.footers(root)) == 1
    said = [line for line in capsys.readouterr().out.splitlines() if "no samples" in line]
    assert said == ["no samples (ZeroDivisionError: division by zero); the result above is filed"]


def test_code_is_the_model_section(tmp_path):
    text, path = train_4m.HERE.read_text(), tmp_path / "train_4m.py"

    def digest(of):
        path.write_text(text.replace(f"\n{of}", f"\n# another\n{of}", 1))
        return checkpoints.model_sha256(types.SimpleNamespace(HERE=path))
    whole = checkpoints.model_sha256(train_4m)
    assert digest("no such line") == whole == digest("def masked_loss") == digest("class Muon")
    assert whole != digest("class Nano4M") != digest("def init_weights") != whole


def test_a_checkpoint_of_other_code_is_named(finished, tiny, tmp_path, monkeypatch, capsys):
    checkpoint, = (finished[0] / "checkpoints").iterdir()
    monkeypatch.setattr(checkpoints, "model_sha256", lambda script: "another")
    run_here(monkeypatch, make_root(tmp_path / "root"), [*SMALL, *tiny[1], f"--load={checkpoint}", "--num_steps=0"])
    said = "was written by another Model section than this one"
    assert capsys.readouterr().out.count(said) == 1
    log, = (tmp_path / "root/logs").iterdir()
    assert said in log.read_text().split(rules.RULE + "\n")[-1]
    monkeypatch.setenv("RANK", "1")
    checkpoints.read_checkpoint(train_4m, checkpoint, train_4m.CONFIGS["cpu"])
    assert capsys.readouterr().out == "", "one process says it"


def test_a_batch_in_parts_is_the_same_run(tiny, tmp_path, monkeypatch):
    """Also in parts of which the last one is smaller."""
    losses = []
    for rows in (8, 3):
        root = make_root(tmp_path / str(rows))
        run_here(monkeypatch, root, [*SMALL[:-1], "--word_steps=4", *tiny[1], "--num_steps=12", f"--micro_batch={rows}"])
        losses.append(runs.footers(root)[-1]["val_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_two_processes_are_the_same_run(tiny, tmp_path):
    # low rates: at the record's, rounding can grow to more than is tolerated when words end and all else is new
    argv = [*SMALL[:-1], "--word_steps=4", *tiny[1], "--num_steps=20", "--eval_every=10", "--muon_lr=0.01",
            "--adam_lr=0.001"]
    roots = runs.assert_same_on_two_processes("4m", argv, tmp_path, ranks.spy_on_scenes)
    (all_rows,), halves = ([json.loads(path.read_text()) for path in root.glob("rows*.json")] for root in roots)
    assert len(set(all_rows)) == len(all_rows) == 160
    assert [len(rows) for rows in halves] == [80, 80], "each process computes half of the batch"
    assert set(halves[0]).isdisjoint(halves[1]) and set(halves[0] + halves[1]) == set(all_rows)


def test_two_processes_report_a_fault(tiny, tmp_path):
    root = make_root(tmp_path / "two")
    world = runs.start("4m", [*SMALL, *tiny[1], "--batch=7"], root, 2)
    assert world.wait() == [1, 1] and not (root / "logs").exists()
    for rank in (0, 1):
        assert world.printed(2, rank) == "train_4m.py: a batch of 7 cannot be divided among 2 processes\n"
