"""train_4m.py: masking, model, loss, evaluation, sampling, Muon, and whole runs on a tiny data set."""
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import checkpoints
import eval_masks
import rules
import judge
import ranks
import runs
import scenes
import show_4m
import texts
import tokenizer
import train_4m
from train_4m import IMAGES, MODALITIES, Fault, Output

ROOT = Path(__file__).resolve().parent.parent
DIMS = {"dim": 64, "head_dim": 32, "enc_depth": 1, "dec_depth": 1}
SMALL = ["--track=cpu", *(f"--{key}={value}" for key, value in DIMS.items()), "--batch=8",
         "--quality_scenes=0", "--precision=fp32", "--naming_steps=0"]  # which a short run would do alone
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
    config = dataclasses.replace(train_4m.CONFIGS["cpu"], **fields)
    return train_4m.draw_positions(tokens, layout, inputs, config, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("inputs", [1, 40, 128])
def test_drawn_places_are_valid_and_disjoint(frozen, layout, inputs):
    tokens, images = frozen[0][:500], 16
    chosen, targets, counted = draw(tokens, layout, inputs)
    valid, rest = layout.valid(tokens), layout.valid(tokens).scatter(1, chosen, False)
    assert chosen.shape == (500, inputs) and targets.shape == counted.shape == (500, images + 48)
    assert valid.gather(1, chosen).all() and rest.gather(1, targets)[counted].all()
    for places in (chosen, targets):
        assert (places.sort(1).values.diff(dim=1) > 0).all()
    split = layout.span["desc"].start
    assert (targets[:, :images] < split).all() and (targets[:, images:] >= split).all()
    assert torch.equal(counted[:, :images].sum(1), rest[:, :split].sum(1).clamp(max=images))
    assert torch.equal(counted[:, images:].sum(1), rest[:, split:].sum(1).clamp(max=48)), "all the text there is counts"
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
    fast = np.array([np.bincount(row, minlength=K) for row in layout.kind[draw(tokens, layout, inputs, whole=0)[0]].numpy()])
    error = np.sqrt((slow.var(0) + fast.var(0)) / len(slow))
    assert (np.abs(slow.mean(0) - fast.mean(0)) < 4.5 * error).all(), (slow.mean(0), fast.mean(0))
    assert np.allclose(slow.std(0), fast.std(0), rtol=0.1), "the spread of a Dirichlet draw, not of an even split"
    bins = np.arange(0, inputs + 8, max(1, inputs // 16))
    histograms = [np.histogram(counts[:, :5], bins)[0] / counts[:, :5].size for counts in (slow, fast)]
    assert np.abs(np.subtract(*histograms)).sum() / 2 < 0.05


def counts(places, layout):
    """How many of the places are of each modality: (B, K)."""
    return (layout.kind[places][..., None] == torch.arange(len(MODALITIES))).sum(1)


@pytest.mark.parametrize("inputs", [80, 100])
def test_modalities_are_given_one_after_another(frozen, layout, inputs):
    tokens = frozen[0][:500]
    chosen = draw(tokens, layout, inputs, whole=1)[0]
    seen = torch.zeros_like(tokens, dtype=torch.bool).scatter(1, chosen, True)
    given, there = counts(chosen, layout), torch.stack(
        [(layout.valid(tokens) & (layout.kind == k)).sum(1) for k in range(len(MODALITIES))], 1)
    in_part = (given > 0) & (given < there)
    assert (in_part.sum(1) <= 1).all() and (given.sum(1) == inputs).all()
    for k, m in enumerate(MODALITIES):
        shown = seen[:, layout.span[m]]
        first = torch.arange(shown.size(1)) < given[:, k:k + 1]
        if m in IMAGES:
            assert not torch.equal(shown, first), "a picture in part: places anywhere"
        else:
            assert torch.equal(shown, first), "a text in part: its beginning"
    assert in_part[:, :5].any() and in_part[:, 5:].any(), "both happen"


def test_which_modality_is_given_first(frozen, layout):
    few = counts(draw(frozen[0], layout, 5, whole=1)[0], layout)  # no modality has fewer tokens
    assert (few.max(1).values == 5).all()
    weight = torch.ones(len(MODALITIES))
    for m, value in (("rgb", "first_rgb"), ("desc", "first_text"), ("caption", "first_text")):
        weight[MODALITIES.index(m)] = getattr(train_4m.CONFIGS["cpu"], value)
    p = weight / weight.sum()
    assert ((few > 0).float().mean(0) - p).abs().lt(4.5 * (p * (1 - p) / len(few)).sqrt()).all()
    mixed = counts(draw(frozen[0], layout, 5, whole=0.25)[0], layout).max(1).values == 5
    assert 0.24 < mixed.float().mean() < 0.40, "a quarter, and what a Dirichlet draw gives to one modality by chance"


@pytest.mark.parametrize("whole", [0, 1])
def test_places_inside_a_modality_are_uniform(frozen, layout, whole):
    chosen, targets, counted = draw(frozen[0], layout, 16, whole=whole)
    for places in (chosen[chosen >= 0], targets[counted]):
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
    _, targets, _ = draw(frozen[0], layout, 64, whole=0)
    share = counts(targets[:, :16], layout).double().mean(0)
    assert (share[:5] - 3.2).abs().max() < 0.2, share


def test_input_budgets_are_even():
    config = train_4m.CONFIGS["cpu"]
    drawn = np.array([train_4m.input_budget(step, config) for step in range(800)])
    values, times = np.unique(drawn, return_counts=True)
    assert values.tolist() == [16, 32, 48, 64, 80, 96, 112, 128] and np.abs(times - 100).max() <= 4
    assert drawn.mean() == pytest.approx(config.budget * 9 / 16, abs=2)


def test_the_warm_up_meets_every_shape(layout):
    for naming_steps in (0, 1, 7, 150):
        config = dataclasses.replace(train_4m.CONFIGS["cpu"], naming_steps=naming_steps)
        warm_up = (0, *range(naming_steps, naming_steps + 9))  # as main has it
        met, every = ({train_4m.step_shape(step, layout, config) for step in steps}
                      for steps in (warm_up, range(naming_steps + 600)))
        assert met == every and len(every) == 8 + (naming_steps > 0)


def test_the_first_steps_ask_for_the_nearest_object(frozen, layout):
    tokens, text = frozen[0][:50], tokenizer.load_text()
    inputs, targets, counted = train_4m.naming_positions(tokens, layout)
    assert torch.equal(inputs, torch.arange(64).expand(50, -1)), "the whole rgb picture"
    desc, bbox = layout.span["desc"], layout.span["bbox"]
    places = [*range(desc.start, desc.start + 5), *range(bbox.start, bbox.start + 5)]
    assert targets.tolist() == [places] * 50 and counted.all() and layout.valid(tokens).gather(1, targets).all()
    for row in tokens:
        objects = texts.parse_desc(tokenizer.decode_text(text, row[desc]))
        assert objects[0]["y"] == max(o["y"] for o in objects)
        assert texts.parse_desc(tokenizer.decode_text(text, row[places[:5]])) == objects[:1]
        assert row[places[5:]].gt(1).all(), "one box, neither padding nor end"


def test_a_step_is_what_its_shape_says(layout, frozen):
    config = dataclasses.replace(train_4m.CONFIGS["cpu"], **DIMS, batch=4, naming_steps=2)
    model, run, asked = small_model(layout), runs.fake_run(), []
    run.precision, run.world, run.rank = "fp32", 1, 0
    run.slice, run.autocast = lambda batch: slice(0, batch), contextlib.nullcontext
    optimizers = train_4m.make_optimizers(model, config, run)

    def loss_of(model, tokens, enc_pos, dec_pos, weight, images):
        asked.append((enc_pos, dec_pos, weight, images))
        return train_4m.masked_loss(model, tokens, enc_pos, dec_pos, weight, images)

    rng = torch.Generator().manual_seed(0)
    for step in range(6):
        inputs, images, words = train_4m.step_shape(step, layout, config)
        loss, count, flops = train_4m.train_step(step, frozen[0][:4], rng, loss_of, model, *optimizers, layout, config, run)
        enc_pos, dec_pos, weight, asked_images = asked[-1]
        assert enc_pos.shape == (4, inputs) and dec_pos.shape == (4, images + words) and asked_images == images
        assert weight.sum().item() == pytest.approx(1) and loss.isfinite()
        assert count == 4 * inputs + (weight > 0).sum()
        assert flops == 4 * train_4m.flops_per_scene(model, config, inputs, images, words)
        if step < 2:
            assert torch.equal(dec_pos, train_4m.naming_positions(frozen[0][:4], layout)[1]) and images == 0


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


def test_loss_is_the_weighted_mean_over_modalities(model, layout, frozen):
    tokens, config = frozen[0][:8], dataclasses.replace(train_4m.CONFIGS["cpu"], word_weight=3.0)
    inputs, targets, counted = draw(tokens, layout, 20)
    weight, goal = train_4m.target_weights(targets, counted, layout, config), tokens.gather(1, targets)
    with torch.no_grad():
        loss = train_4m.masked_loss(model, tokens, inputs, targets, weight, 16)
        halves = [train_4m.masked_loss(model, *(t[rows] for t in (tokens, inputs, targets, weight)), 16)
                  for rows in (slice(0, 4), slice(4, 8))]
        with torch.autocast("cpu", torch.bfloat16):
            rough = train_4m.masked_loss(model, tokens, inputs, targets, weight, 16)
        nats = -model(tokens, inputs, None, targets).gather(2, goal[..., None])[..., 0]
    means = [nats[counted & (layout.kind[targets] == k)].mean().item() for k in range(len(MODALITIES))]
    mean = (sum(means[:5]) + 3 * sum(means[5:])) / (5 + 3 * 3)
    assert not counted.all() and loss.item() == pytest.approx(mean, abs=2e-4)
    assert sum(halves).item() == pytest.approx(loss.item(), abs=2e-4), "parts of a batch add up"
    assert rough.dtype == torch.float32 and rough.item() == pytest.approx(loss.item(), rel=0.05)
    facts = train_4m.naming_positions(tokens, layout)  # no picture is a target: desc and bbox count one half each
    weight = train_4m.target_weights(*facts[1:], layout, config)
    assert torch.allclose(weight, torch.full_like(weight, 1 / weight.numel()))


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
        loss = train_4m.masked_loss(model, tokens, inputs, targets, torch.ones(4, 84), 60)
    assert loss.shape == () and model.hidden(tokens, inputs, None, targets).shape == (4, 84, 512)
    C, count = config.dim, {"encoder": 0, "decoder": 0, "rest": 0}
    for name, p in model.named_parameters():
        count[name.split(".")[0] if name.split(".")[0] in count else "rest"] += p.numel()
    assert count["encoder"] == config.enc_depth * (4 + 2 * config.mlp_ratio) * C * C
    attentions = len([name for name in model.state_dict() if name.startswith("decoder.0.") and ".q." in name])
    assert count["decoder"] == config.dec_depth * (4 * attentions + 2 * config.mlp_ratio) * C * C
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
    known = train_4m.only(layout, tokens, source, *([hide[0]] if hide else []))
    if hide:
        known[:, layout.span[hide[0]]] &= ~hide[1]
    outputs = outputs if isinstance(outputs, list) else [outputs]
    out, seen = train_4m.generate(model, layout, tokens, known, outputs, seed)
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
        assert torch.equal(seen[:, outside], train_4m.only(layout, frozen[0][:3], "rgb")[:, outside])
        if modality in IMAGES:
            assert seen[:, span].all() and not torch.equal(out[0, span], out[1, span])


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
        best = train_4m.predict(model, tokens, train_4m.only(layout, tokens, "rgb"), places).argmax(-1)
    for settings in ({"temperature": 0}, {"top_k": 1}, {"temperature": 1e-6}):
        out, _ = generate(model, layout, frozen, Output("seg", scheme, steps=1, **settings))
        assert torch.equal(out[:, span], best), settings


@pytest.mark.parametrize("steps", [1, 5, 40, 64])
def test_unmasking_schedule(layout, frozen, monkeypatch, steps):
    counts = []

    def left(t):
        return math.cos(math.pi / 2 * t)

    def predict(model, tokens, known, targets):
        counts.append(int(known[:, layout.span["normal"]].sum()))
        assert not known.gather(1, targets).any(), "a token was predicted twice"
        return torch.zeros(*targets.shape, layout.vocab)

    monkeypatch.setattr(train_4m, "predict", predict)
    for scheme in ("roar", "maskgit"):
        counts.clear()
        generate(None, layout, frozen, Output("normal", scheme, steps=steps), n=1)
        counts.append(64)
        assert len(counts) == steps + 1 and counts[0] == 0 and min(np.diff(counts)) >= 1
        for step, count in enumerate(counts):
            assert count >= 64 * (1 - left(step / steps)) - 1e-6
            assert count <= max(64 * (1 - left(step / steps)) + 1 + 1e-6, step), "no faster than the schedule"


def test_maskgit_keeps_the_most_confident(model, layout, frozen):
    tokens, span = frozen[0][:1].clone(), layout.span["edge"]
    known = train_4m.only(layout, tokens, "rgb")
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
    known = train_4m.only(layout, tokens, "rgb", "depth")
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
    whole = generate(model, layout, frozen, Output("rgb"), "rgb")[0]  # nothing left to do
    assert torch.equal(whole, frozen[0][:3])


def test_chained_outputs_see_each_other(model, layout, frozen):
    cold = [Output(m, steps=4, temperature=0) for m in ("depth", "normal")]
    out, seen = generate(model, layout, frozen, cold)
    assert seen[:, layout.span["depth"]].all() and seen[:, layout.span["normal"]].all()
    first = train_4m.generate(model, layout, frozen[0][:3], train_4m.only(layout, frozen[0][:3], "rgb"), cold[:1])
    second = train_4m.generate(model, layout, *first, cold[1:])
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
                            (Output("rgb", steps=0), "0 steps")):
        with pytest.raises(Fault, match=message):
            generate(model, layout, frozen, output, source="depth")
    tokens = frozen[0][:2]
    known = train_4m.only(layout, tokens, "rgb")
    known[1] = False
    with pytest.raises(Fault, match="at least one known"):
        train_4m.generate(model, layout, tokens, known, [Output("depth")])
    known[1, 3] = True
    with pytest.raises(Fault, match="same number"):
        train_4m.generate(model, layout, tokens, known, [Output("rgb")])


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

    def made(model, layout, rows, known, outputs, seed=0):
        asked.append((len(rows), seed, *(output.modality for output in outputs)))
        return rows.clone(), known

    monkeypatch.setattr(train_4m, "generate", made)
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
    assert shown.labels(judge.object_f1, torch.zeros(2, 3, 64, 64), tokens[:2]) == ["rgb, judged F1 0.00"] * 2


# ------------------------------------------------------------------------------------------------------------
# Muon

@pytest.mark.parametrize("shape", [(3, 96, 32), (3, 32, 96), (3, 64, 64)])
def test_orthogonalise(shape):
    rng = torch.Generator().manual_seed(0)
    U, _, V = torch.linalg.svd(torch.randn(shape, generator=rng), full_matrices=False)
    spectrum = torch.logspace(0, -2, U.shape[2]) * torch.tensor([1.0, 1e-3, 1e3])[:, None]
    G = U * spectrum[:, None] @ V
    X = train_4m.orthogonalise(G)
    assert X.shape == G.shape and X.dtype == G.dtype
    values = torch.linalg.svdvals(X)
    assert 0.7 < values.min() and values.max() < 1.3
    assert (X - U @ V).norm(dim=(1, 2)).max() < 0.2 * U.shape[2] ** 0.5, "not the nearest orthogonal matrix"
    alone = torch.cat([train_4m.orthogonalise(g[None]) for g in G])
    assert torch.allclose(X, alone, atol=0.03), "matrices of a stack depend on each other"


def test_every_parameter_has_one_optimizer(model):
    muon, adam = train_4m.make_optimizers(model, train_4m.CONFIGS["cpu"], runs.fake_run())
    matrices = [id(p) for params, _ in muon.stacks for p in params]
    rest = [id(p) for group in adam.param_groups for p in group["params"]]
    assert sorted(matrices + rest) == sorted(map(id, model.parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(p.ndim == 2 for params, _ in muon.stacks for p in params)
    assert not [names[i] for i in matrices if any(word in names[i] for word in ("embed", "head", "position", "kind"))]
    assert not [names[i] for i in rest if names[i].startswith(("encoder", "decoder"))]


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
    argv = [*SMALL[:-1], "--naming_steps=4", *tiny[1], "--num_steps=20", "--eval_every=8", "--seed=5", "--save=true"]
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
    monkeypatch.setattr(train_4m, "generate", lambda *_, **__: 1 / 0)
    with pytest.raises(SystemExit) as stopped:
        run_here(monkeypatch, root, [*SMALL, *tiny[1], "--num_steps=2", "--save=true"], samples=True)
    assert stopped.value.code == 1 and len(list((root / "checkpoints").iterdir())) == 1
    log, = (root / "logs").iterdir()
    assert rules.parse_log(log)["footer"]["steps"] == 2 and len(runs.footers(root)) == 1
    said = [line for line in capsys.readouterr().out.splitlines() if "no samples" in line]
    assert said == ["no samples (ZeroDivisionError: division by zero); the result above is filed"]


def test_a_checkpoint_of_other_code_is_named(finished, tiny, tmp_path, monkeypatch, capsys):
    checkpoint, = (finished[0] / "checkpoints").iterdir()
    monkeypatch.setattr(checkpoints, "model_sha256", lambda script: "another")
    run_here(monkeypatch, make_root(tmp_path / "root"), [*SMALL, *tiny[1], f"--load={checkpoint}", "--num_steps=0"])
    assert "was written by another Model section than this one" in capsys.readouterr().out


def test_two_processes_are_the_same_run(tiny, tmp_path):
    # low rates: at the record's, rounding grows to 0.0006 nats when naming ends and all else is new
    argv = [*SMALL[:-1], "--naming_steps=4", *tiny[1], "--num_steps=20", "--eval_every=10", "--muon_lr=0.01",
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
