"""train_flow.py: the velocity, evaluation, samplers, whole runs on tiny data."""
import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import itertools
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
from scipy import stats

import checkpoints
import checks
import hub
import rules
import ranks
import reflow
import runs
import show_flow
import train_flow
from train_flow import Fault, sample

ROOT = Path(__file__).resolve().parent.parent
DIMS = {"dim": 32, "head_dim": 16, "depth": 1, "components": 4}
SMALL = ["--track=cpu", *(f"--{key}={value}" for key, value in DIMS.items()), "--batch=16",
         "--quality_pictures=0", "--precision=fp32"]
SIDE, CLASSES = 32, 24


def small_model(std=0.0):
    """A small model in float32; with std what starts at zero is drawn at random."""
    torch.manual_seed(0)
    model = train_flow.Flow(dataclasses.replace(train_flow.CONFIGS["cpu"], **DIMS), CLASSES, SIDE)
    train_flow.init_weights(model)
    if std:
        for p in model.parameters():
            torch.nn.init.normal_(p, std=std)
    model.mean.uniform_(-0.5, 0.5)
    model.components.copy_(torch.linalg.qr(torch.randn_like(model.components))[0])
    model.variances.copy_(torch.tensor([9.0, 4.0, 1.0, 0.5, 0.09]))
    return model


def gaussian_model():
    """Its images are normal around 0 with a standard deviation of 0.3."""
    model = small_model()
    model.mean.zero_()
    model.variances.fill_(0.09)
    return model


def draw_images(model, n):
    """Images (n, 3, SIDE, SIDE), normal with the model's mean, components and variances."""
    amounts = model.variances[:-1].sqrt() * torch.randn(n, 4)
    other = torch.randn(n, len(model.mean)) * model.variances[-1].sqrt()
    other -= other @ model.components @ model.components.T
    return (model.mean + amounts @ model.components.T + other).view(n, 3, SIDE, SIDE)


@pytest.mark.parametrize("rank, world", [(0, 1), (1, 2)])
def test_micro_batches_share_the_work(monkeypatch, rank, world):
    """Loss and gradients are the whole batch's, to the last bit where one part is all, and so are times and noise."""
    model = small_model(0.1)
    images = torch.randint(256, (12, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    labels, given = torch.arange(12), []
    run = runs.fake_run(rank, world)
    run.slice, run.autocast = functools.partial(train_flow.Run.slice, run), contextlib.nullcontext

    def errors_of(model, *parts):
        given.append(parts)
        return train_flow.velocity_errors(model, *parts)

    def parts_of(micro_batch):
        config = dataclasses.replace(train_flow.CONFIGS["cpu"], **DIMS, batch=12, micro_batch=micro_batch)
        rng = torch.Generator().manual_seed(5)
        given.clear()
        return runs.step_gradients(monkeypatch, train_flow, model, lambda muon, adam: train_flow.train_step(
            0, (images, labels), rng, errors_of, model, muon, adam, config, run))
    loss, gradients = parts_of(512)
    (whole,) = given
    errors = train_flow.velocity_errors(model, *whole)
    wanted = torch.autograd.grad(errors.sum() / 12, list(model.parameters()))
    assert torch.equal(gradients, torch.cat([g.flatten() for g in wanted])) and gradients.abs().max() > 1e-3
    assert loss == (errors.sum() / 12).item() and len(whole[0]) == 12 // world
    for micro_batch in (4, 5):
        again, summed = parts_of(micro_batch)
        assert again == pytest.approx(loss, rel=1e-5) and torch.allclose(summed, gradients, atol=1e-5)
        assert len(given) == -(-12 // world // micro_batch) and len(given[0][0]) == micro_batch
        assert all(torch.equal(torch.cat(parts), all_of) for parts, all_of in zip(zip(*given), whole))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("reflow_images", [0, 4096])
def test_times(monkeypatch, share, reflow_images):
    """A share of them is uniform, of the rest the logits are normal; on straight paths all are uniform, or 1."""
    config = dataclasses.replace(train_flow.CONFIGS["cpu"], **DIMS, batch=4096, reflow=reflow_images,
                                 uniform_times=share)
    model, given, run = small_model(), [], runs.fake_run(0, 1)
    run.slice, run.autocast = functools.partial(train_flow.Run.slice, run), contextlib.nullcontext
    images = torch.zeros(4096, 3, SIDE, SIDE, dtype=torch.uint8)

    def errors_of(model, x, t, noise, labels):
        given.append(t)
        return 0.3 + 0 * model.head.weight.sum() + 0 * t
    runs.step_gradients(monkeypatch, train_flow, model, lambda muon, adam: train_flow.train_step(
        0, (images, torch.zeros(4096, dtype=torch.long)), torch.Generator().manual_seed(5), errors_of, model, muon,
        adam, config, run))
    t = torch.cat(given).double().numpy()
    assert len(t) == 4096
    if reflow_images:
        assert (t == 1).mean() == pytest.approx(1 / 11, abs=0.002)
        share, t = 1.0, t[t < 1]
    found = stats.kstest(t, lambda t: share * t + (1 - share) * stats.norm.cdf(np.log(t / (1 - t)))).statistic
    assert found < 0.02, "all uniform and all normal are 0.11 apart"


@pytest.fixture(scope="module")
def frozen():
    return train_flow.read_frozen(train_flow.CONFIGS["cpu"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with 300 training pictures and 100 validation draws, and the overrides that point there."""
    folder = tmp_path_factory.mktemp("tiny")
    with np.load(ROOT / "data/frozen/objects64.npz") as arrays:
        parts, about = {m: arrays[m] for m in ("pixels32", "label")}, arrays["modalities"]
    (folder / "train").mkdir()
    for m, rows in parts.items():
        np.save(folder / "train" / f"{m}.npy", rows[:300])
    meta = {"name": "objects64", "version": 1, "size": 64, "num": 300, "seed": 1,
            "modalities": json.loads(bytes(about))}
    (folder / "train/meta.json").write_text(json.dumps(meta))
    np.savez(folder / "objects.npz", modalities=about, **{m: rows[:100] for m, rows in parts.items()})
    with np.load(ROOT / "data/frozen/eval_flow.npz") as arrays:
        np.savez(folder / "draws.npz", index=np.arange(100), t=(np.arange(100) + 0.5) / 100, seed=arrays["seed"][:100])
    return folder, [f"--data={folder}/train", f"--frozen={folder}/objects.npz", f"--frozen_draws={folder}/draws.npz"]


make_root, run_here = functools.partial(runs.make_root, "flow"), functools.partial(runs.run_here, "flow")


# ------------------------------------------------------------------------------------------------------------
# Frozen draws and the velocity

def test_frozen_draws(frozen):
    pictures, times, noise, labels = frozen[:4]
    assert pictures.shape == noise.shape == (2000, 3, SIDE, SIDE) and labels.max() < CLASSES == frozen[4]
    assert -1 <= pictures.min() and pictures.max() <= 1
    places = 2000 * torch.special.ndtr(times.double().logit() - 0.5).sort().values
    assert (places - torch.arange(2000) - 0.5).abs().max() < 0.51, "one time in every 2,000th of their distribution"
    assert noise.mean().abs() < 0.002 and abs(noise.std() - 1) < 0.002
    assert (noise[0] - noise[1]).std() > 1


def test_an_untrained_model_is_the_best_linear_guess():
    """Its error is what is expected of the best predictor of normal images, any other guess has more."""
    model, n = small_model(), 400
    torch.manual_seed(1)
    x = draw_images(model, n)
    for t in (0.05, 0.3, 0.7, 0.95):
        times, noise, labels = torch.full((n,), t), torch.randn_like(x), torch.zeros(n, dtype=torch.long)
        with torch.no_grad():
            found = train_flow.velocity_errors(model, x, times, noise, labels).mean().item()
        missed = model.variances / ((1 - t) ** 2 * model.variances + t ** 2)
        expected = (missed[:-1].sum() + (len(model.mean) - 4) * missed[-1]).item() / len(model.mean)
        assert found == pytest.approx(expected, rel=0.01)
        z = (1 - t) * x + t * noise
        _, centred, image, scale = model.linear(z.flatten(1), times[:, None])
        assert scale[0].item() == pytest.approx(expected ** 0.5, rel=1e-4)
        assert centred.std().item() == pytest.approx(1, rel=0.02) and image.std().item() < 1.02
        mean = model.mean.view(x[0].shape)
        for factor in (0.97, 1.03):
            worse = factor * (model(z, times, labels) + mean) - mean
            assert (worse - (noise - x)).square().mean().item() > found


def test_on_straight_paths_a_step_is_exact():
    """After reflow an image is its noise, stretched along the components: one step of the untrained model is there."""
    model, labels = small_model(), torch.zeros(8, dtype=torch.long)
    model.straight.fill_(True)
    noise = torch.randn(8, len(model.mean))
    amounts = noise @ model.components
    std = model.variances.sqrt()
    other = std[-1] * (noise - amounts @ model.components.T)
    image = model.mean + other + (std[:-1] * amounts) @ model.components.T
    for t in (0.05, 0.5, 1.0):
        z = ((1 - t) * image + t * noise).view(8, 3, SIDE, SIDE)
        with torch.no_grad():
            velocity = model(z, torch.full((8,), t), labels)
        assert torch.allclose(velocity.flatten(1), noise - image, atol=1e-4)


def test_fit():
    """Components and variances are those of the images, and together all of their variance."""
    model, true = small_model(), small_model()
    true.mean.div_(4)
    true.components.copy_(torch.linalg.qr(torch.randn_like(true.components))[0])
    true.variances.copy_(torch.tensor([9.0, 4.0, 1.0, 0.25, 0.001]))
    images = ((draw_images(true, 2000) + 1) * 127.5).round().clamp(0, 255).byte()
    model.fit(images)
    x = train_flow.to_floats(images).flatten(1)
    assert torch.allclose(model.mean, x.mean(0), atol=1e-5)
    assert torch.allclose(model.variances, true.variances, rtol=0.1)
    assert (model.components * true.components).sum(0).abs().min() > 0.95
    assert torch.allclose(model.components.T @ model.components, torch.eye(4), atol=1e-4)
    total = (model.variances * model.shares).sum() * len(model.mean)
    assert total.item() == pytest.approx((x - x.mean(0)).square().sum().item() / len(x), rel=1e-3)


@pytest.mark.parametrize("count", [1, 3, 16])
def test_fit_of_few_images(count):
    """Fewer images than components, or all alike: velocities are numbers all the same."""
    model = small_model()
    model.fit(torch.full((count, 3, SIDE, SIDE), 7, dtype=torch.uint8))
    z, labels = torch.randn(2, 3, SIDE, SIDE), torch.zeros(2, dtype=torch.long)
    with torch.no_grad():
        assert model(z, torch.tensor([1.0, 0.01]), labels).isfinite().all()


def test_a_patch_lands_where_it_was_seen():
    """Changing one patch of the input changes the network's part there the most."""
    model = small_model()
    torch.nn.init.normal_(model.head.weight)
    z, t, labels = torch.zeros(1, 3, SIDE, SIDE), torch.full((1,), 0.5), torch.zeros(1, dtype=torch.long)
    changed = z.clone()
    changed[:, :, 8:12, 20:24] += 3.0
    with torch.no_grad():
        far = (model(changed, t, labels) - model(z, t, labels)).abs().mean((0, 1))
    blocks = far.view(8, 4, 8, 4).mean((1, 3))
    assert blocks.argmax().item() == 2 * 8 + 5


def test_conditions_matter():
    model = small_model(std=0.2)
    z, t = torch.randn(2, 3, SIDE, SIDE), torch.full((2,), 0.5)
    same = model(z, t, torch.tensor([3, 3]))
    assert not torch.allclose(same, model(z, t, torch.tensor([4, 4])), atol=1e-3)
    assert not torch.allclose(same, model(z, t + 0.1, torch.tensor([3, 3])), atol=1e-3)


def test_evaluation_against_a_plain_loop(frozen, monkeypatch):
    model, parts = small_model(std=0.1), [part[:50] for part in frozen[:4]]
    monkeypatch.setattr(train_flow, "EVAL_BATCH", 20)
    errors = []
    with torch.no_grad():
        for x, t, n, label in zip(*parts):
            v = model(((1 - t) * x + t * n)[None], t[None], label[None])[0]
            errors.append((v - (n - x)).square().mean().item())
        found, numbers = train_flow.evaluate(model, *parts, 0, 1)
    assert found == pytest.approx(np.mean(errors), rel=1e-4)
    by_time = [error for _, error in sorted(zip(parts[1].tolist(), errors))]
    for q, quarter in enumerate((by_time[:13], by_time[13:26], by_time[26:39], by_time[39:]), 1):
        assert numbers[f"val_loss_quarter_{q}"] == pytest.approx(np.mean(quarter), rel=1e-3)
    assert numbers["eval_targets"] == 50


def test_every_parameter_has_one_optimizer():
    model = small_model()
    muon, adam = train_flow.make_optimizers(model, train_flow.CONFIGS["cpu"], runs.fake_run())
    hidden = [p for params, _ in muon.stacks for p in params]
    taken = hidden + adam.param_groups[0]["params"]
    assert len(taken) == len({id(p) for p in taken}) == len(list(model.parameters()))
    assert id(model.blocks[0].modulate.weight) not in {id(p) for p in hidden}, "AdaLN stays on Adam"


# ------------------------------------------------------------------------------------------------------------
# Sampling

class Point:
    """The exact velocity towards one picture a class: v = (z - x) / t."""
    side, classes = 8, 2

    def __init__(self):
        self.pictures = torch.stack([torch.full((3, 8, 8), value) for value in (-0.5, 0.5, 0.0)])
        self.asked = []

    def __call__(self, z, t, labels):
        self.asked.append(t[0].item())
        return (z - self.pictures[labels]) / t[:, None, None, None]


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_solvers_reach_a_point(solver):
    model, labels = Point(), torch.tensor([0, 1, 1])
    for steps in (1, 7):
        assert torch.allclose(sample(model, labels, steps, solver), model.pictures[labels], atol=1e-5)
    assert min(model.asked) > 0, "the velocity is never asked for where there is no noise"


def test_solvers_and_their_order(monkeypatch):
    """On Gaussian pictures the path is known: from noise n to mean + sigma n; a solver of order 2 is closer to it."""
    monkeypatch.setattr(train_flow, "SHIFT", 1)  # with even steps: else the last one, which is always Euler's, is long
    model, labels = gaussian_model(), torch.zeros(8, dtype=torch.long)
    noise = torch.randn(8, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    gap = {(solver, steps): (sample(model, labels, steps, solver, noise=noise) - 0.3 * noise).abs().mean().item()
           for solver in ("euler", "heun") for steps in (10, 20, 40)}
    assert math.log2(gap["euler", 20] / gap["euler", 40]) == pytest.approx(1, abs=0.35)
    assert gap["heun", 20] < gap["euler", 20] / 3


def test_churn():
    """New noise on the way: other images with the same spread, the same ones each time; a point is reached, too."""
    model, labels = gaussian_model(), torch.zeros(8, dtype=torch.long)
    plain = sample(model, labels)
    assert sample(model, labels, 80, "heun", churn=0.5).std().item() == pytest.approx(0.3, rel=0.01)
    for solver in ("euler", "heun"):
        made = sample(model, labels, 40, solver, churn=0.5)
        assert made.std().item() == pytest.approx(sample(model, labels, 40, solver).std().item(), rel=0.07)
        assert torch.corrcoef(torch.stack([made.flatten(), plain.flatten()]))[0, 1] < 0.9
        assert torch.equal(made, sample(model, labels, 40, solver, churn=0.5))
        point = Point()
        assert torch.allclose(sample(point, labels, 5, solver, churn=1.0), point.pictures[labels], atol=1e-5)


def test_trajectory():
    model, labels = small_model(std=0.1), torch.arange(2)
    made, path = sample(model, labels, 4, "euler", return_trajectory=True)
    assert [t for t, _ in path] == [1, 9 / 10, 3 / 4, 1 / 2, 0]  # 3 u / (1 + 2 u) of 1, 3/4, 1/2, 1/4, 0
    assert torch.equal(made, path[-1][1].clamp(-1, 1))
    assert torch.equal(made, sample(model, labels, 4, "euler"))
    assert not torch.equal(made, sample(model, labels, 4, "euler", seed=1))


def test_guidance():
    """Between its times a step heads beyond the class, away from no class, and before and after them for the class."""
    model, labels = Point(), torch.tensor([0, 1])
    _, path = sample(model, labels, 10, "euler", guidance=1.5, return_trajectory=True)
    for (t, z), (next_t, next_z) in itertools.pairwise(path):
        heads_for = z - t * (z - next_z) / (t - next_t)
        reach = 1.5 if 0.3 < t < 0.8 else 1
        assert torch.allclose(heads_for, reach * model.pictures[labels], atol=1e-4), t


def test_sample_refuses():
    for settings in ({"solver": "rk4"}, {"steps": 0}):
        with pytest.raises(Fault, match="solvers are euler and heun"):
            sample(Point(), torch.zeros(1, dtype=torch.long), **settings)
    for label in (-1, 3):
        with pytest.raises(Fault, match="labels are from 0 to 2, which is no label"):
            sample(Point(), torch.tensor([0, label]), guidance=2.0)
    assert sample(Point(), torch.tensor([2]), 1, guidance=2.0).shape == (1, 3, 8, 8), "drawn without a label"


# ------------------------------------------------------------------------------------------------------------
# Whole runs

def test_run_and_load(tiny, tmp_path, monkeypatch):
    root = make_root(tmp_path / "root")
    argv = [*SMALL, *tiny[1], "--num_steps=30", "--eval_every=10", "--save=true"]
    run_here(monkeypatch, root, argv, samples=True)
    log, = (root / "logs").iterdir()
    log = rules.parse_log(log)
    assert [step for step, _, _ in log["steps"]] == [10, 20, 30]
    assert log["footer"]["val_loss"] < 0.5 < 1 < log["footer"]["constant_loss"]
    path, = (root / "checkpoints").iterdir()
    assert {p.name for p in (root / "samples").iterdir()} == {"flow.png", "flow.gif", path.stem}
    for name in ("flow.png", "flow.gif"):
        assert (root / "samples" / name).read_bytes() == (root / "samples" / path.stem / name).read_bytes()
    weights, = (root / "checkpoints").iterdir()
    again = make_root(tmp_path / "again")
    run_here(monkeypatch, again, [*SMALL, *tiny[1], "--num_steps=0", f"--load={weights}"])
    log2, = (again / "logs").iterdir()
    assert rules.parse_log(log2)["footer"]["val_loss"] == pytest.approx(log["footer"]["val_loss"], abs=0.005)


def show(monkeypatch, model, folder, fields=None, loaded=None, **options):
    """What show_flow does with a model of the cpu track's images: (numbers, Show). loaded: a checkpoint's label_drop."""
    config = dataclasses.replace(train_flow.CONFIGS["cpu"], **(fields or {}))
    run = runs.fake_run()
    run.script, run.config, run.options = train_flow, config, train_flow.Options(**options)
    if loaded is not None:
        run.options.load = "some"
        run.weights = checkpoints.Weights({}, {"label_drop": loaded}, False)
    shown = show_flow.Show(train_flow, run, model.classes)
    return shown.show(model, folder), shown


def test_quality_numbers(frozen, tmp_path, monkeypatch):
    """The judge gets what was drawn: a sampler that returns the validation pictures themselves is near perfect."""
    pictures, labels = frozen[0], frozen[3]
    first = torch.stack([pictures[labels == c][0] for c in range(CLASSES)])
    asked = []

    def made(model, labels, steps, solver, return_trajectory=False, **settings):
        asked.append((len(labels), steps, solver))
        return (first[labels], [(1.0, first[labels]), (0.0, first[labels])]) if return_trajectory else first[labels]
    monkeypatch.setattr(train_flow, "sample", made)
    numbers, shown = show(monkeypatch, small_model(), tmp_path, quality_pictures=CLASSES)
    assert {numbers[f"accuracy_{steps}_steps"] for steps in (1, 2, 4, 8, 16)} == {1.0}
    assert {f"frechet_{steps}_steps" for steps in (1, 2, 4, 8, 16)} < set(numbers)
    assert asked[0] == (96, 25, "heun") and asked[-1] == (24, 25, "heun")
    assert asked[-6:-1] == [(24, steps, "euler") for steps in (1, 2, 4, 8, 16)]
    assert numbers["quality_class_accuracy"] == 1 and numbers["quality_frechet"] == numbers["frechet_16_steps"]
    assert [numbers[f"quality_{name}"] for name in ("steps", "solver", "guidance")] == [25, "heun", 1.5]
    assert shown.bar.n == shown.bar.total == sum(n * steps for n, steps, _ in asked), "the bar ends full"
    assert {path.name for path in tmp_path.iterdir()} == {"flow.png", "flow.gif"}


def test_digits_have_a_judge_of_their_own(tmp_path, monkeypatch):
    """Validation digits in the place of drawn ones are read as what they are, and drawn with guidance of their own."""
    config = train_flow.CONFIGS["cpu-mnist"]
    pictures, _, _, labels, classes, _ = train_flow.read_frozen(config)
    rows = torch.stack([(labels == c).nonzero()[:20, 0] for c in range(classes)], 1).flatten()  # 0 .. 9, twenty times

    def made(model, labels, *_, return_trajectory=False, **settings):
        found = pictures[rows[:len(labels)]]
        return (found, [(1.0, found), (0.0, found)]) if return_trajectory else found
    monkeypatch.setattr(train_flow, "sample", made)
    fields = {"frozen": config.frozen, "data": config.data}
    numbers, shown = show(monkeypatch, types.SimpleNamespace(classes=classes), tmp_path, fields, quality_pictures=200)
    assert numbers["quality_class_accuracy"] > 0.97 and numbers["quality_frechet"] < 10
    assert numbers["quality_guidance"] == 3.0 and shown.names == [str(i) for i in range(10)]


def test_guidance_is_shown_where_it_was_learned(tmp_path, monkeypatch):
    """A model trained without --label_drop has never seen an image without a label, whatever the config of a run that
    loads it says; one class needs no guidance."""
    asked = []

    def made(model, labels, steps, solver, return_trajectory=False, guidance=1.0, **settings):
        asked.append(guidance)
        z = torch.zeros(len(labels), 3, SIDE, SIDE)
        return (z, [(1.0, z), (0.0, z)]) if return_trajectory else z
    monkeypatch.setattr(train_flow, "sample", made)
    about = {"label": {"length": 1, "vocab": 2, "pad": -1}}
    np.savez(tmp_path / "own.npz", modalities=np.frombuffer(json.dumps(about).encode(), np.uint8))
    no, both = {1.0}, {1.0, 1.5}
    for label_drop, loaded, num_steps, classes, expected in (
            (0.0, None, 9, 2, no), (1.0, None, 9, 2, no), (0.1, None, 9, 2, both), (0.1, 0.1, 0, 1, no),
            (0.0, 0.1, 0, 2, both), (0.1, 0.0, 0, 2, no), (0.1, 0.0, 9, 2, both), (0.0, 0.1, 9, 2, both)):
        asked.clear()
        fields = {"label_drop": label_drop, "num_steps": num_steps, "frozen": str(tmp_path / "own.npz")}
        _, shown = show(monkeypatch, types.SimpleNamespace(classes=classes), tmp_path, fields, loaded)
        assert set(asked) == expected and shown.names == ["0", "1"][:classes]


@pytest.mark.parametrize("label_drop, guidance, track", [("0.0", 1.0, "cpu"), ("0.1", 1.5, "cpu"), ("1.0", 1.0, "cpu"),
                                                         ("0.1", 3.0, "cpu-mnist")])
def test_pairs_of_reflow(label_drop, guidance, track):
    """They are drawn as samples are: guided, if the model knows images with and without a label."""
    model = small_model(std=0.1)
    config = dataclasses.replace(train_flow.CONFIGS[track], reflow=300)
    run = types.SimpleNamespace(script=train_flow, config=config, device=torch.device("cpu"),
                                autocast=contextlib.nullcontext,
                                weights=types.SimpleNamespace(config={"label_drop": label_drop}))
    pictures, labels, noise = reflow.draw_pairs(run, model)
    assert pictures.dtype == torch.uint8 and len(pictures) == len(labels) == len(noise) == 300
    again = sample(model, labels[250:], guidance=guidance, noise=noise[250:])
    assert (train_flow.to_floats(pictures[250:]) - again).abs().max() <= 1 / 127


def test_reflow_of_a_model_of_the_hub(tiny, tmp_path, monkeypatch):
    """Its images stand for the data: the hash is of the file that came from there."""
    root = make_root(tmp_path / "root")
    argv = [*SMALL, *tiny[1], "--num_steps=2", "--save=true"]
    run_here(monkeypatch, root, argv)
    path, = (root / "checkpoints").iterdir()
    monkeypatch.setattr(hub, "fetch_model", {"owner/name": path}.__getitem__)
    run_here(monkeypatch, root, [*argv, "--seed=1", "--load=hf:owner/name", "--reflow=16", "--data=nowhere"])
    assert runs.footers(root)[1]["data_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_reflow_straightens(tiny, tmp_path, monkeypatch):
    """Trained on its own pairs, a model's single Euler step comes closer to what its many steps draw."""
    root, gaps = make_root(tmp_path / "root"), []
    # the first one does not learn one step from noise by itself; at a rate of 0.04 it would depend on the rounding
    argv = [*SMALL, *tiny[1], "--num_steps=300", "--muon_lr=0.02", "--uniform_times=0", "--save=true"]
    run_here(monkeypatch, root, argv)
    first, = (root / "checkpoints").iterdir()
    run_here(monkeypatch, root, [*argv, "--seed=1", f"--load={first}", "--reflow=200", "--label_drop=0",
                                 "--data=nowhere"])
    with pytest.raises(train_flow.Fault, match="--reflow=10 images are fewer than a batch of 16"):
        run_here(monkeypatch, root, [*SMALL, *tiny[1], f"--load={first}", "--reflow=10"])
    assert runs.footers(root)[1]["data_sha256"] == hashlib.sha256(first.read_bytes()).hexdigest()
    for path in (first, *(set((root / "checkpoints").iterdir()) - {first})):
        model = small_model()
        model.load_state_dict(checkpoints.read_checkpoint(train_flow, path, train_flow.CONFIGS["cpu"])[0])
        labels = torch.arange(CLASSES)
        gaps.append((sample(model, labels, 1, "euler") - sample(model, labels, 25)).square().mean().item())
    assert gaps[1] < 0.8 * gaps[0]
    assert model.straight and show_flow.churn_of(model, "heun") == show_flow.churn_of(small_model(), "euler") == 0
    assert show_flow.churn_of(small_model(), "heun") > 0


@pytest.mark.parametrize("argv,message", [
    (["--reflow=10"], "--reflow needs a model"),
    (["--data=nowhere"], "no training data in .* our own is made with `python data/scenes.py --objects`"),
    (["--frozen=none.npz"], "none.npz is missing: it is no part of the repository .* `python data/cifar10.py`"),
    (["--frozen=data/frozen/none.npz"], "it belongs to the repository .`git checkout data/frozen/none.npz`"),
    (["--frozen_draws=none.npz"], "none.npz is missing: it is no part of the repository"),
    (["--batch=301"], "--batch=301 is more than the 300 training images there are"),
    (["--head_dim=24"], "--dim=32 is not a multiple of --head_dim=24"),
    (["--head_dim=0"], "--head_dim=0 is not a number from 1 to 256"),
    (["--patch=5"], "do not tile images of 32"),
    (["--patch=64"], "do not tile images of 32"),
    (["--patch=0"], "--patch=0 is not a number from 2 to 128"),
    (["--pixels=label"], "--pixels=label is not in .*objects.npz: it has pixels32"),
    (["--pixels=pixels64"], "--pixels=pixels64 is not in .*objects.npz: it has pixels32"),
    (["--load=none.safetensors"], "is not a checkpoint of this script"),
    (["--num_steps=-1"], "--num_steps=-1 is not a number from 0 to inf"),
    (["--cooldown=0"], "--cooldown=0 is not a number from 0.001 to 1"),
    (["--label_drop=1.5"], "--label_drop=1.5 is not a number from 0 to 1"),
    (["--label_drop=nan"], "--label_drop=nan is not a number from 0 to 1"),
    (["--eval_every=0"], "--eval_every=0 is not a number from 1 to inf"),
    (["--momentum=1"], "--momentum=1 is not a number from 0 to 0.9999"),
    (["--quality_pictures=1"], "a Frechet distance needs at least 2"),
    (["--quality_pictures=-1"], "--quality_pictures=-1 is not a number from 0 to"),
    (["--precision=fp16"], "not one of auto, fp32, bf16"),
    (["--solver=rk4"], "there is no field --solver"),
])
def test_bad_arguments(tiny, monkeypatch, tmp_path, argv, message):
    root = make_root(tmp_path / "root")
    monkeypatch.setattr(train_flow.Run, "start", lambda run: pytest.fail("the clock was started"))
    with pytest.raises(Fault, match=message) as caught:
        run_here(monkeypatch, root, [*SMALL, *tiny[1], "--num_steps=10", *argv])
    assert "\n" not in str(caught.value) and not (root / "logs").exists()


def high(labels):
    labels[7] = 24
    return labels


def change(path, edit):
    np.save(path, edit(np.load(path)))


@pytest.mark.parametrize("name,spoil,message", [
    ("label.npy", lambda path: change(path, high), "the labels go from 0 to 24, but there are 24 classes"),
    ("label.npy", lambda path: change(path, lambda a: a.astype(float)), "the labels are float64"),
    ("label.npy", lambda path: change(path, lambda a: a[:-1]), r"the labels are uint16 \(299, 1\)"),
    ("label.npy", lambda path: path.unlink(), "label.npy"),
    ("pixels32.npy", lambda path: path.write_bytes(path.read_bytes()[:-10]), ""),
    ("pixels32.npy", lambda path: path.write_bytes(b""), ""),
    ("pixels32.npy", lambda path: change(path, lambda a: a[..., :-1]), "not uint8 .N, 3, S, S"),
    ("pixels32.npy", lambda path: change(path, lambda a: a[0, 0, 0, 0]), "not uint8 .N, 3, S, S"),
    ("meta.json", lambda path: path.write_text("[1]"), ""),
    ("meta.json", lambda path: path.write_text(path.read_text().replace('"num": 300', '"num": 301')), "speaks of 301"),
])
def test_damaged_shards(tiny, monkeypatch, tmp_path, name, spoil, message):
    folder = shutil.copytree(tiny[0] / "train", tmp_path / "train")
    spoil(folder / name)
    with pytest.raises(Fault, match=f"cannot be trained on .*{message}.* made again with `python data/scenes.py"):
        run_here(monkeypatch, make_root(tmp_path / "root"), [*SMALL, *tiny[1], f"--data={folder}"])


def test_damaged_validation_sets(tiny, monkeypatch, tmp_path):
    """Whose file it is decides what is said: nothing of a user's own can be checked out."""
    def refused(key, **changes):
        name = {"frozen": "objects.npz", "frozen_draws": "draws.npz"}[key]
        with np.load(tiny[0] / name) as arrays:
            np.savez(tmp_path / "own.npz", **{**arrays, **changes})
        with pytest.raises(Fault) as caught:
            checks.check_frozen_images(train_flow, dataclasses.replace(config, **{key: str(tmp_path / "own.npz")}))
        assert f"{tmp_path}/own.npz cannot be evaluated on" in str(caught.value)
        assert "no part of the repository" in str(caught.value) and "git checkout" not in str(caught.value)
        return str(caught.value)

    paths = {"frozen": f"{tiny[0]}/objects.npz", "frozen_draws": f"{tiny[0]}/draws.npz"}
    config = dataclasses.replace(train_flow.CONFIGS["cpu"], **paths)
    checks.check_frozen_images(train_flow, config)
    checks.check_frozen_images(train_flow, train_flow.CONFIGS["gpu"])
    assert "the images are int64" in refused("frozen", pixels32=np.zeros((100, 3, 32, 32), int))
    assert "the labels go from 30 to 30" in refused("frozen", label=np.full((100, 1), 30))
    assert "draws are not of these 100 images" in refused("frozen_draws", index=np.full(100, 100))
    assert "draws are not of these 100 images" in refused("frozen_draws", t=np.zeros(99))
    assert "each from 0 to 1" in refused("frozen_draws", t=np.full(100, 1.1))
    assert "zero-size" in refused("frozen_draws", **{key: np.zeros(0, int) for key in ("index", "t", "seed")})
    for content in (b"", b"PK\x03\x04 not really", (tiny[0] / "draws.npz").read_bytes()[:-300]):
        (tmp_path / "own.npz").write_bytes(content)
        with pytest.raises(Fault, match="own.npz cannot be evaluated on .* no part of the repository"):
            checks.check_frozen_images(train_flow, dataclasses.replace(config, frozen=str(tmp_path / "own.npz")))


def test_other_data_than_the_validation_set(tiny, monkeypatch, tmp_path):
    folder = shutil.copytree(tiny[0] / "train", tmp_path / "train")
    (folder / "meta.json").write_text((folder / "meta.json").read_text().replace('"vocab": 24', '"vocab": 25'))
    with pytest.raises(Fault, match="has other classes or another size than the frozen validation set"):
        run_here(monkeypatch, make_root(tmp_path / "root"), [*SMALL, *tiny[1], f"--data={folder}"])


def test_one_class(tiny, monkeypatch, tmp_path):
    """Trained without dropping labels, drawn and saved."""
    folder = shutil.copytree(tiny[0], tmp_path / "one")
    change(folder / "train/label.npy", np.zeros_like)
    meta = json.loads((folder / "train/meta.json").read_text())
    meta["modalities"]["label"]["vocab"] = 1
    (folder / "train/meta.json").write_text(json.dumps(meta))
    with np.load(folder / "objects.npz") as arrays:
        parts = {**arrays, "label": np.zeros((100, 1), np.uint16)}
    parts["modalities"] = np.frombuffer(json.dumps(meta["modalities"]).encode(), np.uint8)
    np.savez(folder / "objects.npz", **parts)
    root = make_root(tmp_path / "root")
    argv = [*SMALL, *(part.replace(str(tiny[0]), str(folder)) for part in tiny[1]), "--num_steps=3", "--label_drop=0"]
    run_here(monkeypatch, root, argv, samples=True)
    assert (root / "samples/flow.png").exists() and runs.footers(root)[0]["steps"] == 3


def test_loading_takes_the_architecture_from_the_checkpoint(tiny, monkeypatch, tmp_path):
    root = make_root(tmp_path / "root")
    run_here(monkeypatch, root, [*SMALL, *tiny[1], "--num_steps=2", "--save=true"])
    first, = (root / "checkpoints").iterdir()
    bare = ["--track=cpu", *tiny[1], "--quality_pictures=0", "--precision=fp32", f"--load={first}"]
    other = make_root(tmp_path / "other")
    run_here(monkeypatch, other, [*bare, "--num_steps=0", "--save=true"])
    again, = (other / "checkpoints").iterdir()
    for path in (first, again):
        weights, config = checkpoints.read_checkpoint(train_flow, path, train_flow.CONFIGS["cpu"])
        assert {key: getattr(config, key) for key in DIMS} == DIMS and weights["blocks.0.up.weight"].shape == (128, 32)
    log, = (other / "logs").iterdir()
    assert json.loads(rules.parse_log(log)["config"])["config"]["dim"] == 32, "the log says what was run"
    with pytest.raises(Fault, match="was trained with --dim=32: leave it out"):
        run_here(monkeypatch, other, [*bare, "--num_steps=0", "--dim=64"])


def test_a_result_outlives_its_samples(tiny, monkeypatch, tmp_path, capsys):
    root = make_root(tmp_path / "root")
    monkeypatch.setattr(train_flow, "sample", lambda *_, **__: 1 / 0)
    with pytest.raises(SystemExit) as stopped:
        run_here(monkeypatch, root, [*SMALL, *tiny[1], "--num_steps=2", "--save=true"], samples=True)
    assert stopped.value.code == 1 and len(list((root / "checkpoints").iterdir())) == 1
    assert len(runs.footers(root)) == 1
    assert "no samples (ZeroDivisionError: division by zero); the result above is filed" in capsys.readouterr().out


def test_train_on(tiny, monkeypatch, tmp_path):
    """A saved state goes on for more steps than planned, evaluated more often; the same steps are the same run."""
    argv, root = [*SMALL, *tiny[1], "--batch=100"], make_root(tmp_path / "root")
    runs.keep_states(monkeypatch.setattr)
    run_here(monkeypatch, root, [*argv, "--num_steps=4", "--eval_every=4", "--save_every=2", "--save=true"])
    state = root / "checkpoints/2.pt"
    weights, = (root / "checkpoints").glob("*.safetensors")
    again = make_root(tmp_path / "again")
    run_here(monkeypatch, again, [*argv, "--num_steps=4", "--eval_every=1", f"--resume={state}"])
    assert len(runs.losses(again)) == 3 and runs.losses(again)[-1] == runs.losses(root)[-1]
    assert runs.footers(again)[0]["val_loss"] == runs.footers(root)[0]["val_loss"]
    longer = make_root(tmp_path / "longer")
    run_here(monkeypatch, longer, [*argv, "--num_steps=8", "--eval_every=3", f"--resume={state}"])
    found, = runs.footers(longer)
    assert found["steps"] == 8 and found["tokens"] == 8 * 100 * 64 and len(runs.losses(longer)) == 3
    for more, message in ((["--num_steps=1"], "is at step 2, beyond --num_steps=1"),
                          (["--reflow=200", f"--load={weights}"], "is of a run with --reflow=0: pass the same"),
                          (["--muon_lr=0.01"], "is of a run with --muon_lr=0.04: pass the same")):
        with pytest.raises(Fault, match=message):
            run_here(monkeypatch, longer, [*argv, "--num_steps=4", f"--resume={state}", *more])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_state(tiny, tmp_path, number):
    """Ctrl-C as SIGTERM: the state is saved, the exit code is 0, and what is said to continue with does."""
    argv, root = [*SMALL, *tiny[1], "--num_steps=60", "--eval_every=60"], make_root(tmp_path / "root")
    world = runs.start("flow", argv, root, spy=ranks.wait_for_a_signal)
    world.wait_for_steps()
    world.kill(number)
    out = world.succeed().out
    step, path = re.search(r"state of step (\d+) in (\S+)", out).groups()
    assert f"stopped: continue with the same command and --resume={path}" in out
    assert 0 < int(step) < 60 and not (root / "records/runs.jsonl").exists()
    resumed = make_root(tmp_path / "resumed")
    runs.run("flow", [*argv, f"--resume={path}"], resumed)
    assert runs.footers(resumed)[0]["steps"] == 60


def test_memory_is_kept_where_the_c_library_can(monkeypatch):
    """musl has no mallopt, and not every system has a C library to open."""
    def missing(name):
        raise OSError
    for library in (lambda name: types.SimpleNamespace(), missing):
        monkeypatch.setattr(ctypes, "CDLL", library)
        train_flow.keep_memory()


def test_two_processes_are_the_same_run(tiny, tmp_path):
    runs.assert_same_on_two_processes("flow", [*SMALL, *tiny[1], "--num_steps=20", "--eval_every=10"], tmp_path)


def test_gpu_track_shapes():
    config = train_flow.CONFIGS["gpu"]
    with torch.device("meta"):
        model = train_flow.Flow(config, CLASSES, 64)
        v = model(torch.empty(2, 3, 64, 64), torch.empty(2), torch.zeros(2, dtype=torch.long))
    assert v.shape == (2, 3, 64, 64)
