"""train_maskgit.py: masks, model, evaluation, sampling, whole runs on tiny data."""
import dataclasses
import functools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import leaderboard
import runs
import scenes
import streams
import train_maskgit
from train_maskgit import Fault, generate

ROOT = Path(__file__).resolve().parent.parent
DIMS = {"dim": 64, "head_dim": 32, "depth": 1}
SMALL = ["--track=cpu", *(f"--{key}={value}" for key, value in DIMS.items()), "--batch=16", "--eval_batch=30",
         "--quality_pictures=0", "--precision=fp32"]
ABOUT = {"rgb": {"length": 64, "vocab": 4096}, "label": {"length": 1, "vocab": 24}}


@pytest.fixture(scope="module")
def model():
    """A small model in float32 whose predictions differ: what starts at zero is drawn at random."""
    torch.manual_seed(0)
    model = train_maskgit.MaskGIT(dataclasses.replace(train_maskgit.CONFIGS["cpu"], **DIMS), ABOUT)
    train_maskgit.init_weights(model)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.fixture(scope="module")
def frozen():
    return train_maskgit.read_frozen(train_maskgit.CONFIGS["cpu"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, frozen):
    """A folder with 300 training pictures and 100 validation pictures, and the overrides that point there."""
    folder = tmp_path_factory.mktemp("tiny")
    with np.load(ROOT / "data/frozen/objects64.npz") as arrays:
        tokens, about = {m: arrays[m] for m in ("rgb", "label")}, arrays["modalities"]
    (folder / "train").mkdir()
    for m, rows in tokens.items():
        np.save(folder / "train" / f"{m}.npy", rows[:300].astype(np.uint16))
    meta = {"name": "objects64", "version": 1, "size": 64, "num": 300, "seed": 1, "tokenizer": "", "text": "",
            "modalities": json.loads(bytes(about))}
    (folder / "train/meta.json").write_text(json.dumps(meta))
    np.savez(folder / "objects.npz", modalities=about, **{m: rows[:100] for m, rows in tokens.items()})
    np.savez(folder / "masks.npz", masked=frozen[2][:100].numpy())
    return folder, [f"--data={folder}/train", f"--frozen={folder}/objects.npz", f"--frozen_masks={folder}/masks.npz"]


make_root, run_here = functools.partial(runs.make_root, "maskgit"), functools.partial(runs.run_here, "maskgit")


# ------------------------------------------------------------------------------------------------------------
# Masks and the model

def test_masks():
    counts, rng = [], torch.Generator().manual_seed(0)
    where = torch.zeros(64)
    for _ in range(200):
        masked = train_maskgit.draw_masks(32, 64, rng)
        counts.append(masked.sum(1))
        where += masked.sum(0)
        halves = (counts[-1] > 32).sum()
        assert 15 <= halves <= 17, "every batch has as many heavily masked rows as lightly masked ones"
    counts = torch.cat(counts)
    assert counts.min() == 1 and counts.max() == 64 and counts.float().mean().item() == pytest.approx(32.5, abs=0.5)
    share = counts.bincount(minlength=65)[1:] / len(counts)
    assert (share - 1 / 64).abs().max() < 0.006
    assert (where / where.mean() - 1).abs().max() < 0.1


def test_masked_tokens_are_not_seen(model, frozen):
    tokens, labels, masked = (part[:8] for part in frozen[:3])
    y = model(tokens, labels, masked)
    other = tokens.where(~masked, (tokens + 7) % 4096)
    assert torch.equal(y, model(other, labels, masked))
    other = tokens.where(masked, (tokens + 7) % 4096)
    assert not torch.allclose(y, model(other, labels, masked))
    assert not torch.allclose(y, model(tokens, (labels + 1) % 24, masked))


def test_log_probabilities(model, frozen):
    tokens, labels, masked = (part[:8] for part in frozen[:3])
    y = model(tokens, labels, masked)[masked]
    logs = model.log_probabilities(y)
    assert logs.shape == (len(y), 4096) and torch.allclose(logs.exp().sum(-1), torch.ones(len(y)), atol=1e-4)
    nats = train_maskgit.masked_nats(model, tokens, labels, masked)
    assert torch.allclose(nats, -logs.gather(1, tokens[masked][:, None])[:, 0], atol=1e-3)


def test_evaluation_against_a_plain_loop(model, frozen):
    tokens, labels, masked = (part[:50] for part in frozen[:3])
    config = dataclasses.replace(train_maskgit.CONFIGS["cpu"], eval_batch=20)
    nats = torch.cat([train_maskgit.masked_nats(model, *(part[i:i + 1] for part in (tokens, labels, masked)))
                      for i in range(50)])
    with torch.no_grad():
        found = train_maskgit.evaluate(model, tokens, labels, masked, config, 0, 1)
    assert found == pytest.approx(nats.mean().item(), abs=1e-4) and len(nats) == masked.sum()


def test_every_parameter_has_one_optimizer(model):
    muon, adam = train_maskgit.make_optimizers(model, train_maskgit.CONFIGS["cpu"], 0, 1, "fp32")
    taken = [p for params, _ in muon.stacks for p in params] + adam.param_groups[0]["params"]
    assert len(taken) == len({id(p) for p in taken}) == len(list(model.parameters()))


# ------------------------------------------------------------------------------------------------------------
# Sampling

@pytest.mark.parametrize("schedule", ["constant", "cosine", "exponential"])
@pytest.mark.parametrize("order", ["confidence", "random", "halton"])
def test_history(model, schedule, order):
    labels = torch.arange(6)
    tokens, history = generate(model, labels, steps=8, schedule=schedule, order=order, return_history=True)
    left = [hidden.sum(1) for _, hidden in history]
    assert all((n == n[0]).all() for n in left) and left[-1][0] == 0
    share = {"constant": lambda t: 1 - t, "cosine": lambda t: math.cos(math.pi / 2 * t),
             "exponential": lambda t: 1 - (math.exp(3 * t) - 1) / (math.exp(3) - 1)}[schedule]
    expected, before = [], 64
    for step in range(1, 9):
        before = 0 if step == 8 else min(before - 1, int(64 * share(step / 8)))
        expected.append(before)
    assert [n[0].item() for n in left] == expected
    for (earlier, hidden), (later, _) in zip(history, history[1:]):
        assert torch.equal(earlier[~hidden], later[~hidden]), "a token that is placed stays"
    assert torch.equal(history[-1][0], tokens) and tokens.max() < 4096
    again = generate(model, labels, steps=8, schedule=schedule, order=order)
    other = generate(model, labels, steps=8, schedule=schedule, order=order, seed=1)
    assert torch.equal(tokens, again) and not torch.equal(tokens, other)


def test_halton_order_is_even():
    order = train_maskgit.halton_order(8)
    assert sorted(order.tolist()) == list(range(64))
    quarters = (order[:16] // 8 // 4 * 2 + order[:16] % 8 // 4).bincount(minlength=4)
    assert quarters.min() >= 3 and quarters.max() <= 5
    _, history = generate_first(order="halton")
    assert torch.equal((~history[0][1]).nonzero()[:, 1].sort().values, order[:8].sort().values)


def generate_first(**settings):
    torch.manual_seed(0)
    model = train_maskgit.MaskGIT(dataclasses.replace(train_maskgit.CONFIGS["cpu"], **DIMS), ABOUT)
    train_maskgit.init_weights(model)
    return generate(model, torch.zeros(1, dtype=torch.long), steps=8, schedule="constant", return_history=True,
                    **settings)


def test_confidence_order_places_the_likeliest(model):
    labels, hidden = torch.zeros(20, dtype=torch.long), torch.ones(20, 64, dtype=torch.bool)
    with torch.no_grad():
        logs = model.log_probabilities(model(torch.zeros(20, 64, dtype=torch.long), labels, hidden)[hidden])
    mean = {}
    for order, noise in (("confidence", 0.0), ("confidence", 100.0), ("random", 0.0)):
        _, history = generate(model, labels, steps=8, schedule="constant", order=order, noise=noise,
                              return_history=True)
        tokens, left = history[0]
        placed = logs.view(20, 64, -1).gather(-1, tokens[..., None])[..., 0][~left]
        assert len(placed) == 20 * 8
        mean[order, noise] = placed.mean().item()
    assert mean["confidence", 0.0] > mean["random", 0.0] + 1
    assert mean["confidence", 100.0] == pytest.approx(mean["random", 0.0], abs=0.7), "all noise is no order"


def test_draws_follow_the_distribution(model):
    labels = torch.full((1500,), 3)
    tokens, hidden = torch.zeros(1500, 64, dtype=torch.long), torch.zeros(1500, 64, dtype=torch.bool)
    hidden[:, 5] = True
    drawn = generate(model, labels, tokens, hidden, steps=1, top_k=5, temperature=0.5)[:, 5]
    with torch.no_grad():
        logs = model.log_probabilities(model(tokens[:1], labels[:1], hidden[:1])[hidden[:1]])[0]
    best = logs.topk(5)
    p = (best.values / 0.5).softmax(-1)
    counts = torch.tensor([(drawn == i).sum().item() for i in best.indices.tolist()])
    assert counts.sum() == 1500
    chi = ((counts - 1500 * p) ** 2 / (1500 * p)).sum().item()
    assert chi < 4 + 4 * 8 ** 0.5


def test_inpainting_keeps_what_is_given(model, frozen):
    tokens, labels, masked = (part[:10] for part in frozen[:3])
    out = generate(model, labels, tokens, masked, steps=6)
    assert torch.equal(out[~masked], tokens[~masked]) and not torch.equal(out[masked], tokens[masked])


def test_guidance(model):
    labels, free = torch.arange(24), torch.full((24,), 24)
    plain = generate(model, labels, steps=4)
    assert not torch.equal(plain, generate(model, labels, steps=4, guidance=3.0))
    assert torch.equal(generate(model, free, steps=4), generate(model, free, steps=4, guidance=3.0)), "u + g (u - u)"


def test_generate_refuses(model):
    for settings in ({"order": "spiral"}, {"schedule": "linear"}, {"steps": 0}):
        with pytest.raises(Fault, match="schedules are constant, cosine, exponential"):
            generate(model, torch.arange(2), **settings)


# ------------------------------------------------------------------------------------------------------------
# Whole runs

def test_run_and_load(tiny, tmp_path, monkeypatch):
    root = make_root(tmp_path / "root")
    monkeypatch.setattr(train_maskgit, "generate", lambda *words, **settings: generate(*words, **settings | {"steps": 2}))
    argv = [*SMALL, *tiny[1], "--num_steps=30", "--eval_every=10", "--save=true"]
    run_here(monkeypatch, root, argv, samples=True)
    log, = (root / "logs").iterdir()
    log = leaderboard.parse_log(log)
    assert [step for step, _, _ in log["steps"]] == [10, 20, 30] and log["footer"]["val_loss"] < math.log(4096) - 1
    assert {p.name for p in (root / "samples").iterdir()} == {"maskgit.png", "maskgit_steps.gif"}
    weights, = (root / "checkpoints").iterdir()
    again = make_root(tmp_path / "again")
    run_here(monkeypatch, again, [*SMALL, *tiny[1], "--num_steps=0", f"--load={weights}"])
    log2, = (again / "logs").iterdir()
    assert leaderboard.parse_log(log2)["footer"]["val_loss"] == pytest.approx(log["footer"]["val_loss"], abs=0.02)


def test_text(tmp_path, monkeypatch):
    text = np.frombuffer(b"the quick brown fox jumps over the lazy dog; " * 400, np.uint8)
    (tmp_path / "data/shakespeare").mkdir(parents=True)
    for split in ("train", "val"):
        streams.write_bin(tmp_path / f"data/shakespeare/{split}.bin", text)
    run_here(monkeypatch, tmp_path, [*SMALL, "--data=text", "--num_steps=30", "--eval_every=30"], samples=True)
    lines = (tmp_path / "samples/maskgit.txt").read_text().splitlines()
    given, filled = (next(line[14:] for line in lines if line.startswith(name)) for name in ("given", "filled"))
    assert len(lines) > 20 and all(a == b for a, b in zip(given, filled) if a != "_") and "_" not in filled


@pytest.mark.parametrize("argv,message", [
    (["--data=nowhere"], "python data/scenes.py --objects"),
    (["--frozen=none.npz"], "is missing: it belongs to the repository"),
    (["--batch=301"], "more than the 300 training examples there are"),
    (["--head_dim=24"], "not a multiple of head_dim"),
    (["--load=none.safetensors"], "is not a checkpoint of this script"),
])
def test_bad_arguments(tiny, monkeypatch, tmp_path, argv, message):
    root = make_root(tmp_path / "root")
    with pytest.raises(Fault, match=message):
        run_here(monkeypatch, root, [*SMALL, *tiny[1], "--num_steps=10", *argv])
    assert not list(root.glob("samples/*"))


def test_damaged_shards(tiny, monkeypatch, tmp_path):
    folder = shutil.copytree(tiny[0] / "train", tmp_path / "train")
    np.save(folder / "label.npy", np.full((300, 1), 24, np.uint16))
    with pytest.raises(Fault, match="of a vocabulary of 24"):
        run_here(monkeypatch, make_root(tmp_path / "root"), [*SMALL, *tiny[1], f"--data={folder}"])
    (folder / "rgb.npy").write_bytes((folder / "rgb.npy").read_bytes()[:-10])
    with pytest.raises(Fault, match="is damaged .*delete it and run"):
        run_here(monkeypatch, tmp_path / "root", [*SMALL, *tiny[1], f"--data={folder}"])


def test_gpu_track():
    config = train_maskgit.CONFIGS["gpu"]
    tokens, labels, masked, modalities, digest = train_maskgit.read_frozen(config)
    assert tokens.shape == masked.shape == (2000, 256) and len(labels) == 2000 and len(digest) == 64
    assert masked.any(1).all() and masked.float().mean().item() == pytest.approx(0.5, abs=0.03)
    with torch.device("meta"):
        model = train_maskgit.MaskGIT(config, modalities)
        y = model(*(torch.empty(shape, dtype=torch.long) for shape in ((2, 256), (2,))),
                  torch.empty(2, 256, dtype=torch.bool))
    assert y.shape == (2, 256, 512) and sum(p.numel() for p in model.blocks.parameters()) == 8 * 12 * 512 ** 2
    with pytest.raises(Fault, match="make it with `python data/scenes.py --objects --size=128`"):
        train_maskgit.read_rows(dataclasses.replace(config, data="data/none"))


def test_two_processes_are_the_same_run(tiny, tmp_path):
    runs.assert_same_on_two_processes("maskgit", [*SMALL, *tiny[1], "--num_steps=20", "--eval_every=10"], tmp_path)
