"""train_maskgit.py: masks, model, evaluation, sampling, whole runs on tiny data."""
import contextlib
import dataclasses
import functools
import json
import math
import re
import shutil
import signal
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoints
import rules
import ranks
import runs
import show_maskgit
import streams
import text_rows
import train_maskgit
from train_maskgit import Fault, generate

ROOT = Path(__file__).resolve().parent.parent
DIMS = {"dim": 64, "head_dim": 32, "depth": 1}
SMALL = ["--track=cpu", *(f"--{key}={value}" for key, value in DIMS.items()), "--batch=16",
         "--quality_pictures=0", "--precision=fp32"]
ABOUT = {"rgb": {"length": 64, "vocab": 4096}, "label": {"length": 1, "vocab": 24}}


def small_model(**fields):
    """A small model in float32 whose predictions differ: what starts at zero is drawn at random."""
    torch.manual_seed(0)
    model = train_maskgit.MaskGIT(dataclasses.replace(train_maskgit.CONFIGS["cpu"], **{**DIMS, **fields}), ABOUT)
    train_maskgit.init_weights(model)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.fixture(scope="module")
def model():
    return small_model()


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


def test_evaluation_against_a_plain_loop(model, frozen, monkeypatch):
    tokens, labels, masked = (part[:50] for part in frozen[:3])
    monkeypatch.setattr(train_maskgit, "EVAL_BATCH", 20)
    nats = torch.cat([train_maskgit.masked_nats(model, *(part[i:i + 1] for part in (tokens, labels, masked)))
                      for i in range(50)])
    with torch.no_grad():
        found, numbers = train_maskgit.evaluate(model, tokens, labels, masked, 4096, 0, 1)
    assert numbers["eval_targets"] == len(nats)
    assert found == pytest.approx(nats.mean().item(), abs=1e-4) and len(nats) == masked.sum()


def test_ranks_share_the_work(model, frozen, monkeypatch):
    """Every rank has nearly as many masked tokens, and its loss is an estimate of the whole batch's."""
    tokens, labels = (part[:64] for part in frozen[:2])
    config, seen, losses = train_maskgit.CONFIGS["cpu"], [], []
    masked_nats = train_maskgit.masked_nats

    def spy(model, tokens, labels, masked):
        seen.append(masked)
        return masked_nats(model, tokens, labels, masked)
    monkeypatch.setattr(train_maskgit, "masked_nats", spy)
    monkeypatch.setattr(train_maskgit, "sum_gradients", lambda *_: None)
    still = types.SimpleNamespace(step=lambda *_: None, param_groups=[{}])
    for rank, world in ((0, 1), (0, 4), (1, 4), (2, 4), (3, 4)):
        run = runs.fake_run(rank, world)
        run.autocast = contextlib.nullcontext
        rng = torch.Generator().manual_seed(5)
        losses.append(world * train_maskgit.train_step(0, tokens, labels, rng, model, still, still, config, run).item())
    whole, *parts = seen
    assert sorted(map(tuple, torch.cat(parts).tolist())) == sorted(map(tuple, whole.tolist())), "each row once"
    counts = [int(part.sum()) for part in parts]
    assert max(counts) < 1.1 * min(counts) and sum(counts) == whole.sum()
    weighted = sum(loss * count for loss, count in zip(losses[1:], counts)) / sum(counts)
    assert weighted == pytest.approx(losses[0], rel=1e-4)
    assert losses[1:] == pytest.approx([losses[0]] * 4, rel=0.3), "not by how many are masked"


@pytest.mark.parametrize("rank, world", [(0, 1), (1, 2)])
def test_micro_batches_share_the_work(model, frozen, monkeypatch, rank, world):
    """Loss and gradients are the whole batch's, to the last bit where one part is all; no part has far more to do."""
    tokens, labels = (part[:16] for part in frozen[:2])
    run, seen, plain = runs.fake_run(rank, world), [], train_maskgit.masked_nats
    run.autocast = contextlib.nullcontext

    def spy(model, tokens, labels, masked):
        seen.append(masked)
        return plain(model, tokens, labels, masked)
    monkeypatch.setattr(train_maskgit, "masked_nats", spy)

    def parts_of(micro_batch):
        config = dataclasses.replace(train_maskgit.CONFIGS["cpu"], batch=16, micro_batch=micro_batch, label_drop=0.0)
        rng = torch.Generator().manual_seed(5)
        seen.clear()
        return runs.step_gradients(monkeypatch, train_maskgit, model, lambda muon, adam: train_maskgit.train_step(
            0, tokens, labels, rng, model, muon, adam, config, run))
    loss, gradients = parts_of(512)
    masked = train_maskgit.draw_masks(16, 64, torch.Generator().manual_seed(5))
    rows = slice(rank, None, world)
    nats = plain(model, tokens[rows], labels[rows], masked[rows])
    wanted = torch.autograd.grad(nats.sum() / masked.sum(), list(model.parameters()))
    assert torch.equal(gradients, torch.cat([g.flatten() for g in wanted])) and gradients.abs().max() > 1e-3
    assert loss == pytest.approx(nats.mean().item() / world, rel=1e-6)
    for micro_batch, count in ((4, 4 // world), (3, 6 // world)):
        again, summed = parts_of(micro_batch)
        assert again == pytest.approx(loss, rel=1e-5)
        assert (summed - gradients).abs().max() < 1e-5 * gradients.abs().max()
        assert len(seen) == count and max(map(len, seen)) <= micro_batch
        assert sum(map(len, seen)) == 16 // world and torch.cat(seen).sum() == masked[rows].sum()
    assert len(seen) == 1 or max(part.sum() for part in seen) < 2 * min(part.sum() for part in seen)


def test_every_parameter_has_one_optimizer(model):
    muon, adam = train_maskgit.make_optimizers(model, train_maskgit.CONFIGS["cpu"], runs.fake_run())
    taken = [p for params, _ in muon.stacks for p in params] + adam.param_groups[0]["params"]
    assert len(taken) == len({id(p) for p in taken}) == len(list(model.parameters()))


# ------------------------------------------------------------------------------------------------------------
# Sampling

@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("order", [None, show_maskgit.halton_order(8)], ids=["confidence", "halton"])
def test_history(model, cosine, order):
    labels = torch.arange(6)
    tokens, history = generate(model, labels, steps=8, cosine=cosine, order=order, return_history=True)
    left = [hidden.sum(1) for _, hidden in history]
    assert all((n == n[0]).all() for n in left) and left[-1][0] == 0
    expected, before = [], 64
    for step in range(1, 9):
        share = math.cos(math.pi / 2 * step / 8) if cosine else 1 - step / 8
        before = 0 if step == 8 else min(before - 1, int(64 * share))
        expected.append(before)
    assert [n[0].item() for n in left] == expected
    for (earlier, hidden), (later, _) in zip(history, history[1:]):
        assert torch.equal(earlier[~hidden], later[~hidden]), "a token that is placed stays"
    assert torch.equal(history[-1][0], tokens) and tokens.max() < 4096
    again = generate(model, labels, steps=8, cosine=cosine, order=order)
    other = generate(model, labels, steps=8, cosine=cosine, order=order, seed=1)
    assert torch.equal(tokens, again) and not torch.equal(tokens, other)


def test_halton_order_is_even():
    order = show_maskgit.halton_order(8)
    assert sorted(order.tolist()) == list(range(64))
    quarters = (order[:16] // 8 // 4 * 2 + order[:16] % 8 // 4).bincount(minlength=4)
    assert quarters.min() >= 3 and quarters.max() <= 5
    _, history = generate_first(order=order)
    assert torch.equal((~history[0][1]).nonzero()[:, 1].sort().values, order[:8].sort().values)


def generate_first(**settings):
    torch.manual_seed(0)
    model = train_maskgit.MaskGIT(dataclasses.replace(train_maskgit.CONFIGS["cpu"], **DIMS), ABOUT)
    train_maskgit.init_weights(model)
    return generate(model, torch.zeros(1, dtype=torch.long), steps=8, cosine=False, return_history=True, **settings)


def test_confidence_order_places_the_likeliest(model):
    labels, hidden = torch.zeros(20, dtype=torch.long), torch.ones(20, 64, dtype=torch.bool)
    with torch.no_grad():
        logs = model.log_probabilities(model(torch.zeros(20, 64, dtype=torch.long), labels, hidden)[hidden])
    mean, at_random = {}, torch.randperm(64, generator=torch.Generator().manual_seed(0))
    for order, noise in ((None, 0.0), (None, 100.0), (at_random, 0.0)):
        _, history = generate(model, labels, steps=8, cosine=False, order=order, noise=noise, return_history=True)
        tokens, left = history[0]
        placed = logs.view(20, 64, -1).gather(-1, tokens[..., None])[..., 0][~left]
        assert len(placed) == 20 * 8
        mean[order is None, noise] = placed.mean().item()
    assert mean[True, 0.0] > mean[False, 0.0] + 1
    assert mean[True, 100.0] == pytest.approx(mean[False, 0.0], abs=0.7), "all noise is no order"


def test_draws_follow_the_distribution(model):
    labels = torch.full((1500,), 3)
    tokens, hidden = torch.zeros(1500, 64, dtype=torch.long), torch.zeros(1500, 64, dtype=torch.bool)
    hidden[:, 5] = True
    drawn = generate(model, labels, tokens, hidden, steps=1, temperature=0.5)[:, 5]
    with torch.no_grad():
        logs = model.log_probabilities(model(tokens[:1], labels[:1], hidden[:1])[hidden[:1]])[0]
    best = logs.topk(4)
    p = (logs / 0.5).softmax(-1)[best.indices]
    counts = torch.tensor([(drawn == i).sum().item() for i in best.indices.tolist()])
    p, counts = (torch.cat([part, total - part.sum()[None]]) for part, total in ((p, 1), (counts, 1500)))
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


def test_no_steps(model):
    with pytest.raises(Fault, match="0 steps"):
        generate(model, torch.arange(2), steps=0)


def test_the_likeliest_token_alone(model):
    labels = torch.arange(4)
    order = show_maskgit.halton_order(8)
    certain = [generate(model, labels, steps=2, order=order, temperature=0.0, last_temperature=0.0, seed=seed)
               for seed in (0, 1)]
    assert torch.equal(*certain)


# ------------------------------------------------------------------------------------------------------------
# Whole runs

def test_run_and_load(tiny, tmp_path, monkeypatch):
    root = make_root(tmp_path / "root")
    monkeypatch.setattr(train_maskgit, "generate", lambda *words, **rest: generate(*words, **rest | {"steps": 2}))
    argv = [*SMALL, *tiny[1], "--num_steps=30", "--eval_every=10", "--save=true"]
    run_here(monkeypatch, root, argv, samples=True)
    log, = (root / "logs").iterdir()
    log = rules.parse_log(log)
    assert [step for step, _, _ in log["steps"]] == [10, 20, 30] and log["footer"]["val_loss"] < math.log(4096) - 1
    weights, = (root / "checkpoints").iterdir()
    samples = {"maskgit.png", "maskgit_steps.gif"}
    assert {p.name for p in (root / "samples").iterdir()} == {*samples, weights.stem}
    assert {p.name for p in (root / "samples" / weights.stem).iterdir()} == samples
    again = make_root(tmp_path / "again")
    sizes = {*(f"--{key}={value}" for key, value in DIMS.items())}
    argv = [*(word for word in SMALL if word not in sizes), *tiny[1], f"--load={weights}"]
    run_here(monkeypatch, again, [*argv, "--num_steps=0", "--save=true"])  # the checkpoint has its own architecture
    log2, = (again / "logs").iterdir()
    assert rules.parse_log(log2)["footer"]["val_loss"] == pytest.approx(log["footer"]["val_loss"], abs=0.02)
    copied, = (again / "checkpoints").iterdir()
    _, config = checkpoints.read_checkpoint(train_maskgit, copied, train_maskgit.CONFIGS["cpu"])
    assert {key: getattr(config, key) for key in DIMS} == DIMS, "what is saved says its architecture as well"
    with pytest.raises(Fault, match="was trained with --dim=64: leave it out"):
        run_here(monkeypatch, again, [*argv, "--num_steps=0", "--dim=128"])


def test_a_result_outlives_its_samples(tiny, tmp_path, monkeypatch):
    """Whatever happens while samples are drawn: footer, weights and line are there, one sentence, exit code 1."""
    root = make_root(tmp_path / "root")
    monkeypatch.setattr(train_maskgit, "generate", lambda *_, **__: 1 / 0)
    with pytest.raises(SystemExit) as stopped:
        run_here(monkeypatch, root, [*SMALL, *tiny[1], "--num_steps=2", "--save=true"], samples=True)
    assert stopped.value.code == 1 and runs.footers(root)[0]["steps"] == 2
    assert len(list((root / "checkpoints").iterdir())) == 1
    log, = (root / "logs").iterdir()
    assert "no samples (ZeroDivisionError: division by zero); the result above is filed" in log.read_text()


def test_quality_numbers(model, frozen, tmp_path, monkeypatch):
    """One picture of each class, by number of steps; and what the judge or the tokenizer does not know."""
    def show(modalities=ABOUT, **fields):
        run = runs.fake_run()
        run.config = dataclasses.replace(train_maskgit.CONFIGS["cpu"], label_drop=fields.pop("label_drop", 0.1),
                                         num_steps=fields.pop("num_steps", 1))
        run.script = train_maskgit
        run.weights = checkpoints.Weights({}, {"label_drop": fields.pop("loaded", 0)}, False)
        run.options = train_maskgit.Options(**fields)
        return show_maskgit.Show(train_maskgit, run, modalities=modalities, frozen=frozen[:3])
    monkeypatch.setattr(show_maskgit, "STEPS", (1, 2))
    monkeypatch.setattr(show_maskgit, "FLOOR_STEPS", 2)
    monkeypatch.setattr(show_maskgit, "PART", 10)
    shown = show(quality_pictures=24)
    shown.bar = types.SimpleNamespace(set_postfix_str=lambda *_: None, update=lambda: None)
    numbers = shown.quality(model)
    floors = {"quality_class_accuracy": numbers["accuracy_2_steps"], "quality_frechet": numbers["frechet_2_steps"],
              "quality_steps": 2, "quality_guidance": 2.0}
    assert 0 <= numbers.pop("quality_inpainting_accuracy") <= 1
    table = {f"{name}_{steps}_steps" for name in ("accuracy", "frechet") for steps in (1, 2)}
    assert set(numbers) == table | set(floors) and {name: numbers[name] for name in floors} == floors
    assert all(math.isfinite(value) for value in numbers.values())
    with pytest.raises(Fault, match="is less than one for each of the 24 classes"):
        show(quality_pictures=23)
    one = ABOUT | {"label": {"length": 1, "vocab": 1}}
    with pytest.raises(Fault, match="pass --quality_pictures=0"):
        show(one, quality_pictures=24)
    for rgb in ({"length": 60, "vocab": 4096}, {"length": 64, "vocab": 1024}):
        with pytest.raises(Fault, match="the tokenizer decodes squares of tokens out of 4096"):
            show(ABOUT | {"rgb": rgb}, quality_pictures=0)
    shown = show(one, quality_pictures=0, label_drop=0.0)
    assert shown.guidance == 1.0 and shown.names == ["class 0"] and show(label_drop=1.0).guidance == 1.0
    assert show().guidance == 2.0, "a model that has learned to do without labels"
    assert show(load="some", num_steps=0, loaded=0.0).guidance == 1.0, "of a checkpoint its own run decides"
    assert show(load="some", num_steps=0, label_drop=0.0, loaded=0.1).guidance == 2.0


def test_train_on(tiny, tmp_path, monkeypatch, capsys):
    """More steps than planned, evaluated at others, with other samples."""
    argv = [*SMALL, *tiny[1], "--save_every=4"]
    root, again = make_root(tmp_path / "root"), make_root(tmp_path / "again")
    runs.keep_states(monkeypatch.setattr)
    run_here(monkeypatch, root, [*argv, "--num_steps=6"])
    state = root / "checkpoints/4.pt"
    more = ["--num_steps=10", "--eval_every=5", "--quality_pictures=24", f"--resume={state}"]
    run_here(monkeypatch, again, [*argv, *more])
    assert "6 steps were planned, 10 are now: from step 4 on" in capsys.readouterr().out
    run, = runs.footers(again)
    assert run["steps"] == 10 and run["tokens"] == 10 * 16 * 64 and len(runs.losses(again)) == 2
    with pytest.raises(Fault, match="is of a run with --label_drop=0.1: pass the same"):
        run_here(monkeypatch, again, [*argv, *more, "--label_drop=0.2"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves(tiny, tmp_path, number):
    """Ctrl-C and SLURM's signal: the state is saved, how to continue is said, and that gives the same run."""
    argv = [*SMALL, *tiny[1], "--num_steps=40", "--eval_every=40"]
    roots = [make_root(tmp_path / name) for name in ("stopped", "resumed", "whole")]
    world = runs.start("maskgit", argv, roots[0], spy=ranks.wait_for_a_signal)
    world.wait_for_steps()
    world.kill(number)
    said = re.search(r"stopped: continue with the same command and (--resume=\S+)", world.succeed().out)
    assert not (roots[0] / "records/runs.jsonl").exists()
    runs.run("maskgit", [*argv, said[1]], roots[1])
    runs.run("maskgit", argv, roots[2])
    (resumed,), (whole,) = map(runs.footers, roots[1:])
    assert resumed["val_loss"] == whole["val_loss"] and resumed["tokens"] == whole["tokens"]


def test_rotary_positions_are_relative():
    """A product of two turned vectors depends on how many rows and columns lie between their cells alone."""
    cos, sin = train_maskgit.rotary_angles(8, 32, torch.device("cpu"))
    assert cos.shape == sin.shape == (64, 16)
    q, k = torch.randn(2, 1, 1, 1, 32, generator=torch.Generator().manual_seed(0)).expand(2, 1, 1, 64, 32)
    product = (train_maskgit.apply_rotary(q, cos, sin) @ train_maskgit.apply_rotary(k, cos, sin).mT)[0, 0]
    grid = product.view(8, 8, 8, 8)  # row and column of the query, then of the key
    assert torch.allclose(grid[:5, :5, :5, :5], grid[3:, 3:, 3:, 3:], atol=1e-4)
    assert torch.allclose(grid[2, 1, 2, 1], (q @ k.mT)[0, 0, 0, 0], atol=1e-4)
    assert product.std() > 0.5 and not torch.allclose(grid[0, 0], grid[0, 0].T, atol=0.1), "rows are not columns"


def text_root(folder, text):
    """A folder with a text to train on, and all else that is in data/."""
    (folder / "data/shakespeare").mkdir(parents=True)
    for path in (ROOT / "data").iterdir():
        if path.name != "shakespeare":
            (folder / "data" / path.name).symlink_to(path)
    for split in ("train", "val"):
        streams.write_bin(folder / f"data/shakespeare/{split}.bin", text)
    streams.finish(folder / "data/shakespeare", {"name": "shakespeare"}, 128, document_start=None, encoding="bytes")


def test_text(tmp_path, monkeypatch):
    text = np.frombuffer(b"the quick brown fox jumps over the lazy dog; " * 400, np.uint8)
    text_root(tmp_path, text)
    run_here(monkeypatch, tmp_path, [*SMALL, "--data=text", "--num_steps=30", "--eval_every=30"], samples=True)
    lines = (tmp_path / "samples/maskgit.txt").read_text().splitlines()
    given, filled = (next(line[14:] for line in lines if line.startswith(name)) for name in ("given", "filled"))
    assert len(lines) > 20 and all(a == b for a, b in zip(given, filled) if a != "_") and "_" not in filled
    config = dataclasses.replace(train_maskgit.CONFIGS["cpu"], data="text")
    masked, again = (text_rows.read_frozen(train_maskgit, config)[2] for _ in range(2))
    found = {steps: [line for line in lines if line.startswith(f"{steps} steps ")] for steps in show_maskgit.TEXT_STEPS}
    assert all(len(rows) == 4 and all(50 < len(row) <= 14 + 64 for row in rows) for rows in found.values())
    with Image.open(tmp_path / "samples/maskgit_order.png") as image:
        assert image.width > 500 and len(image.convert("RGB").getcolors(1 << 24)) > 20
    assert torch.equal(masked, again) and not masked.sum(1).diff().ge(0).all(), "seeded, and in no order"


def test_texts_that_cannot_be_used(tmp_path, monkeypatch):
    argv = [*SMALL, "--data=text", "--num_steps=2"]
    text_root(tmp_path, np.arange(63, dtype=np.uint16))
    meta = (tmp_path / "data/shakespeare/meta.json").rename(tmp_path / "meta.json")
    with pytest.raises(Fault, match="no data in .*: make it with `python data/shakespeare.py`"):
        run_here(monkeypatch, tmp_path, argv)
    meta.rename(tmp_path / "data/shakespeare/meta.json")
    with pytest.raises(Fault, match=r"val\*.bin has fewer than the 64 tokens"):
        run_here(monkeypatch, tmp_path, argv)
    streams.write_bin(tmp_path / "data/shakespeare/val.bin", np.zeros(640, np.uint16))
    with pytest.raises(Fault, match=r"train\*.bin has fewer than the 64 tokens"):
        run_here(monkeypatch, tmp_path, argv)
    streams.write_bin(tmp_path / "data/shakespeare/train.bin", np.full(640, 256, np.uint16))
    with pytest.raises(Fault, match="token 256 of a vocabulary of 256"):
        run_here(monkeypatch, tmp_path, argv)
    (tmp_path / "data/shakespeare/train.bin").write_bytes(b"hello")
    with pytest.raises(Fault, match="train.bin is not a .bin token file"):
        run_here(monkeypatch, tmp_path, argv)


@pytest.mark.parametrize("argv,message", [
    (["--data=data/nowhere"], "python data/scenes.py --objects"),
    (["--data=nowhere"], "no data in .*nowhere: it should hold"),
    (["--frozen=none.npz"], "none.npz is missing: it is no part of the repository"),
    (["--frozen=data/frozen/none.npz"], "it belongs to the repository .`git checkout data/frozen/none.npz`"),
    (["--batch=301"], "more than the 300 training examples there are"),
    (["--head_dim=24"], "--dim=64 is not a multiple of --head_dim=24"),
    (["--load=none.safetensors"], "is not a checkpoint of this script"),
    (["--resume=none.pt"], "is not the state of a run"),
    (["--resume=none.pt", "--num_steps=0"], "--resume continues a run"),
    (["--nope=1"], "there is no field --nope"),
    (["--precision=fp16"], "is not one of auto, fp32, bf16"),
    (["--adam_lr=nan"], "is not a number from 0 to inf"),
    (["--muon_lr=-1"], "is not a number from 0 to inf"),
    (["--momentum=1"], "is not a number from 0 to 0.9999"),
    (["--cooldown=0"], "is not a number from 0.001 to 1"),
    (["--label_drop=1.5"], "is not a number from 0 to 1"),
    (["--label_drop=-0.1"], "is not a number from 0 to 1"),
    (["--head_dim=0"], "is not a number from 1 to 256"),
    (["--depth=0"], "is not a number from 1 to 96"),
    (["--mlp_ratio=0"], "is not a number from 1 to 16"),
    (["--dim=0"], "is not a number from 1 to 8192"),
    (["--batch=0"], "is not a number from 1 to inf"),
    (["--eval_every=0"], "is not a number from 1 to inf"),
    (["--quality_pictures=-1"], "is not a number from 0 to 2000"),
    (["--save_every=-1"], "is not a number from 0 to inf"),
    (["--seed=-1"], "is not a number from 0 to"),
])
def test_bad_arguments(tiny, monkeypatch, tmp_path, argv, message):
    root = make_root(tmp_path / "root")
    with pytest.raises(Fault, match=message):
        run_here(monkeypatch, root, [*SMALL, *tiny[1], "--num_steps=10", *argv])
    assert not (root / "logs").exists() and not (root / "samples").exists(), "nothing has been started"


def test_frozen_sets_that_do_not_fit(tiny, tmp_path, monkeypatch, frozen):
    tokens, labels, masked, modalities, _ = frozen
    root = make_root(tmp_path / "root")

    def check(message, tokens=tokens, labels=labels, masked=masked, rgb={}):
        about = {**modalities, "rgb": {**modalities["rgb"], **rgb}}
        arrays = {"rgb": tokens[:100].numpy(), "label": labels[:100, None].numpy()}
        np.savez(tmp_path / "frozen.npz", modalities=np.frombuffer(json.dumps(about).encode(), np.uint8), **arrays)
        np.savez(tmp_path / "masks.npz", masked=masked[:100].numpy())
        files = [f"--frozen={tmp_path}/frozen.npz", f"--frozen_masks={tmp_path}/masks.npz"]
        with pytest.raises(Fault, match=message):
            run_here(monkeypatch, root, [*SMALL, *tiny[1], *files, "--num_steps=0"])
    check("beyond its own vocabularies", tokens=tokens + 4000)
    check("beyond its own vocabularies", labels=labels + 20)
    check("one at least must be masked", masked=masked & False)
    check("rows are of 36", rgb={"length": 36})
    check("rows of 60 tokens are not square pictures", rgb={"length": 60})
    check("which is not a square", rgb={"vocab": 5000})
    check("the frozen validation set is damaged", masked=masked[:, 1:])
    assert not (root / "logs").exists()


@pytest.mark.parametrize("label_drop", [0, 1])
def test_all_labels_or_none(tiny, tmp_path, monkeypatch, label_drop):
    argv = [*SMALL, *tiny[1], "--num_steps=2", f"--label_drop={label_drop}"]
    run_here(monkeypatch, make_root(tmp_path / "root"), argv)
    assert math.isfinite(runs.footers(tmp_path / "root")[0]["val_loss"])


def test_damaged_shards(tiny, monkeypatch, tmp_path):
    folder = shutil.copytree(tiny[0] / "train", tmp_path / "train")
    np.save(folder / "label.npy", np.full((300, 1), 24, np.uint16))
    with pytest.raises(Fault, match="of a vocabulary of 24"):
        run_here(monkeypatch, make_root(tmp_path / "root"), [*SMALL, *tiny[1], f"--data={folder}"])
    (folder / "rgb.npy").write_bytes((folder / "rgb.npy").read_bytes()[:-10])
    with pytest.raises(Fault, match="cannot be trained on .*made again with"):
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
    with pytest.raises(Fault, match="our own is made with `python data/scenes.py --objects --size=128`"):
        train_maskgit.read_shards(dataclasses.replace(config, data="data/none"), modalities)


def test_two_processes_are_the_same_run(tiny, tmp_path):
    runs.assert_same_on_two_processes("maskgit", [*SMALL, *tiny[1], "--num_steps=20", "--eval_every=10"], tmp_path)


def test_two_processes_report_a_fault(tiny, tmp_path):
    root = make_root(tmp_path / "two")
    world = runs.start("maskgit", [*SMALL, *tiny[1], "--batch=7"], root, 2)
    assert world.wait() == [1, 1] and not (root / "logs").exists()
    for rank in (0, 1):
        assert world.printed(2, rank) == "train_maskgit.py: a batch of 7 cannot be divided among 2 processes\n"
