"""baselines/train_flow_course.py: the course's recipe against the same written out here, and whole tiny runs."""
import dataclasses
import itertools
import functools
import inspect
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

import rules
import runs
import show
import show_flow
import submit
import train_flow

ROOT = Path(__file__).resolve().parent.parent
course = show.load_script(ROOT / "baselines" / "train_flow_course.py")
CPU, GPU = course.CONFIGS["cpu"], course.CONFIGS["gpu"]
DIMS = {"dim": 64, "head_dim": 16, "depth": 1}
SMALL = ["--track=cpu", *(f"--{key}={value}" for key, value in DIMS.items()), "--batch=16", "--quality_pictures=0",
         "--precision=fp32"]
SIDE, CLASSES = 32, 24
run_here = functools.partial(runs.run_here, "flow_course")


def make_model(**fields):
    torch.manual_seed(0)
    model = course.Flow(dataclasses.replace(CPU, **DIMS | fields), CLASSES, SIDE)
    course.init_weights(model)
    return model


@pytest.fixture(scope="module")
def model():
    """A small model in float32 whose predictions differ: all weights are moved at random, zeros and gains as well."""
    model = make_model(depth=2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module")
def frozen():
    return course.read_frozen(CPU)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with 300 training images and 100 validation draws, and the fields that point there."""
    folder = tmp_path_factory.mktemp("tiny")
    with np.load(ROOT / CPU.frozen) as arrays:
        parts, about = {m: arrays[m] for m in ("pixels32", "label")}, arrays["modalities"]
    (folder / "train").mkdir()
    for m, rows in parts.items():
        np.save(folder / "train" / f"{m}.npy", rows[:300])
    meta = {"num": 300, "modalities": json.loads(bytes(about))}
    (folder / "train/meta.json").write_text(json.dumps(meta))
    np.savez(folder / "objects.npz", modalities=about, **{m: rows[:100] for m, rows in parts.items()})
    times = (np.arange(100) + 0.5) / 100
    np.savez(folder / "draws.npz", index=np.arange(100), t=times, seed=np.arange(100))
    return {"data": f"{folder}/train", "frozen": f"{folder}/objects.npz", "frozen_draws": f"{folder}/draws.npz"}


def make_root(folder):
    folder.mkdir()
    (folder / "data").symlink_to(ROOT / "data")
    return folder


def arguments(fields):
    return [f"--{key}={value}" for key, value in fields.items()]


def make_run(rank=0, world=1):
    run = runs.fake_run(rank, world)
    run.slice = functools.partial(course.Run.slice, run)
    run.autocast = functools.partial(course.Run.autocast, run)
    return run


# ------------------------------------------------------------------------------------------------------------
# The recipe's numbers

def test_the_courses_numbers():
    for config in (CPU, GPU):
        assert (config.lr, config.patch) == (5e-4, 2)
        assert (config.label_drop, config.times) == (0.1, "logit-normal")
    assert (CPU.batch, GPU.batch) == (64, 256)
    assert (CPU.dim, CPU.depth, CPU.dim // CPU.head_dim) == (128, 6, 4), "MNIST, twice as wide"
    assert (GPU.dim, GPU.depth, GPU.dim // GPU.head_dim) == (256, 10, 8), "CIFAR-10"
    assert GPU.num_steps * GPU.batch == pytest.approx(100 * 50_000, rel=0.01)


@pytest.mark.parametrize("config,side,hidden", [(CPU, 32, 512), (GPU, 64, 768)])
def test_size_is_the_courses(config, side, hidden):
    """Its parameters, counted by hand."""
    with torch.device("meta"):
        model = course.Flow(config, CLASSES, side)
        v = model(torch.empty(2, 3, side, side), torch.empty(2), torch.zeros(2, dtype=torch.long))
    assert v.shape == (2, 3, side, side)
    C, half = config.dim, config.dim // 2
    stem = 25 * (3 * half + half * half) + 2 * half + 2 * 2 * half
    embeddings = (4 * half * C + C) + (256 * C + C + C * C + C) + 25 * C
    block = (4 * C * C + 4 * C) + 3 * C * hidden + 4 * C + 6 * (C * C + C)
    end = 2 * (C * C + C) + 12 * C + 12
    assert sum(p.numel() for p in model.parameters()) == stem + embeddings + config.depth * block + end
    assert not list(model.buffers())


def test_start():
    """Torch's own initialisation, a head of zeros, and so a velocity of zero for whatever it is given."""
    model = make_model()
    for name, module in model.named_modules():
        if name == "head":
            assert not module.weight.any() and not module.bias.any()
        elif isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            bound = module.weight[0].numel() ** -0.5
            assert module.weight.std().item() == pytest.approx(bound / 3 ** 0.5, rel=0.1), name
            assert module.weight.abs().max() <= 1.0001 * bound, name
            if name == "embed_patch":
                assert not module.bias.any()
            elif module.bias is not None:
                assert 0 < module.bias.abs().max() <= 1.0001 * bound, name
        elif isinstance(module, torch.nn.Embedding):
            assert module.weight.std().item() == pytest.approx(1, rel=0.1)
        elif isinstance(module, (torch.nn.LayerNorm, torch.nn.GroupNorm)):
            assert module.eps == (1e-6 if name == "norm" else 1e-5), name
            assert name == "norm" or ((module.weight == 1).all() and not module.bias.any()), name
    x, noise = torch.randn(2, 3, 3, SIDE, SIDE)
    t, labels = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 5, CLASSES])
    assert not model((1 - t[:, None, None, None]) * x, t, labels).any()
    with torch.no_grad():
        errors = course.velocity_errors(model, x, t, noise, labels)
    assert torch.allclose(errors, (noise - x).square().mean((1, 2, 3)))


def test_optimizer(model):
    """Torch's Adam over every parameter, without decay."""
    adam = course.make_optimizer(model, CPU)
    group, = adam.param_groups
    assert type(adam) is torch.optim.Adam
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (5e-4, (0.9, 0.999), 1e-8, 0)
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]


# ------------------------------------------------------------------------------------------------------------
# The model, written out

def layer_norm(x, weight=1.0, bias=0.0, eps=1e-5):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def silu(x):
    return x * x.sigmoid()


def neighbours(rows, heads):
    """Rows (C, ...) of a weight in the course's order: what turns with a channel of a head comes right after it."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def turned(x, heads):
    """Rotary positions of x (B, T, C): neighbouring channels of a head are a complex number. (B, T, H, D)."""
    T, D = x.size(1), x.size(2) // heads
    rates = torch.tensor([10000 ** (-2 * i / D) for i in range(D // 2)])
    turns = torch.polar(torch.ones(T, D // 2), torch.arange(T)[:, None] * rates)
    pairs = torch.view_as_complex(x.unflatten(-1, (heads, D // 2, 2)).contiguous())
    return torch.view_as_real(pairs * turns[:, None]).flatten(-2)


def attention(y, w, name, heads, order):
    """One head after another, on y (B, T, C); order: what is done to the rows of the queries' and keys' weights."""
    def normed_and_turned(part):
        x = y @ order(w[f"{name}.{part}.weight"], heads).mT
        gain, bias = (order(w[f"{name}.{part}_norm.{kind}"], heads) for kind in ("weight", "bias"))
        return turned(layer_norm(x, gain, bias), heads)

    q, k = normed_and_turned("q"), normed_and_turned("k")
    v = (y @ w[f"{name}.v.weight"].mT).unflatten(-1, (heads, -1))
    out = []
    for h in range(heads):
        scores = q[:, :, h] @ k[:, :, h].mT / q.size(-1) ** 0.5
        out.append(scores.softmax(-1) @ v[:, :, h])
    return torch.cat(out, -1) @ w[f"{name}.proj.weight"].mT


@torch.no_grad()
def written_out(model, z, t, labels, heads=4, order=neighbours):
    """The velocity that the recipe's model of two blocks has, from weights by name and nothing else of the script."""
    w = dict(model.named_parameters())

    def linear(x, name):
        return x @ w[f"{name}.weight"].mT + w[f"{name}.bias"]

    def normed(x, name):
        return layer_norm(x, w[f"{name}.weight"], w[f"{name}.bias"])

    x = z
    for i in (0, 3):
        x = silu(F.conv2d(x, w[f"stem.{i}.weight"], w[f"stem.{i}.bias"], padding=2))
        grouped = layer_norm(x.reshape(len(x), 32, -1)).view_as(x)
        x = grouped * w[f"stem.{i + 2}.weight"][:, None, None] + w[f"stem.{i + 2}.bias"][:, None, None]
    places = [(i, j) for i in range(0, z.size(2), 2) for j in range(0, z.size(3), 2)]
    x = linear(torch.stack([x[:, :, i:i + 2, j:j + 2].flatten(1) for i, j in places], 1), "embed_patch")
    angle = t[:, None] * torch.tensor([10000 ** (-i / 128) for i in range(128)])
    time = linear(silu(linear(torch.cat([angle.cos(), angle.sin()], 1), "embed_time.0")), "embed_time.2")
    condition = silu(time + w["embed_label.weight"][labels])
    for name in ("blocks.0", "blocks.1"):
        parts = linear(condition, f"{name}.modulate").unflatten(1, (6, 1, -1))
        shift1, scale1, gate1, shift2, scale2, gate2 = parts.unbind(1)  # (B, 1, C)
        y = normed(x, f"{name}.norm1") * (1 + scale1) + shift1
        x = x + gate1 * attention(y, w, f"{name}.attention", heads, order)
        y = normed(x, f"{name}.norm2") * (1 + scale2) + shift2
        hidden = silu(y @ w[f"{name}.mlp.gate.weight"].mT) * (y @ w[f"{name}.mlp.up.weight"].mT)
        x = x + gate2 * (hidden @ w[f"{name}.mlp.down.weight"].mT)
    shift, scale = linear(condition, "modulate").unflatten(1, (2, 1, -1)).unbind(1)
    patches = linear(layer_norm(x, eps=1e-6) * (1 + scale) + shift, "head")
    v = torch.empty_like(z)
    for n, (i, j) in enumerate(places):
        v[:, :, i:i + 2, j:j + 2] = patches[:, n].unflatten(1, (3, 2, 2))
    return v


def test_model_is_the_recipes(model):
    """Stem, times, AdaLN, normed and turned queries and keys, SwiGLU, patches: as they are written out above."""
    z, t = torch.randn(3, 3, SIDE, SIDE), torch.tensor([0.02, 0.5, 0.97])
    labels = torch.tensor([3, 17, CLASSES])
    with torch.no_grad():
        v = model(z, t, labels)
    assert v.std() > 0.1 and torch.allclose(v, written_out(model, z, t, labels), atol=5e-4)
    unordered = written_out(model, z, t, labels, order=lambda rows, heads: rows)
    assert not torch.allclose(v, unordered, atol=5e-3), "channels half a head apart are the pairs"


def test_compiled_it_is_one_graph_and_the_same(model):
    x, noise = torch.randn(2, 4, 3, SIDE, SIDE)
    t, labels = torch.rand(4), torch.arange(4)
    compiled = torch.compile(course.velocity_errors, fullgraph=True, dynamic=False, backend="aot_eager")
    losses = [errors_of(model, x, t, noise, labels).mean() for errors_of in (compiled, course.velocity_errors)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for ours, plain in zip(*(torch.autograd.grad(loss, list(model.parameters())) for loss in losses)):
        assert torch.allclose(ours, plain, atol=1e-4, rtol=1e-3)


# ------------------------------------------------------------------------------------------------------------
# The loss and what it is drawn with

def test_path_and_loss():
    """On the line from an image, t = 0, to noise, t = 1, the squared error of the way between them."""
    x, noise, guess = torch.randn(3, 5, 3, 8, 8)
    t, labels, given = torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0]), torch.arange(5), []

    def model(*parts):
        given.extend(parts)
        return guess
    errors = course.velocity_errors(model, x, t, noise, labels)
    z, times, classes = given
    assert torch.equal(times, t) and torch.equal(classes, labels)
    for i, share in enumerate(t.tolist()):
        assert torch.allclose(z[i], x[i] + share * (noise[i] - x[i]), atol=1e-5)
        assert errors[i].item() == pytest.approx(np.mean((guess[i] - noise[i] + x[i]).numpy() ** 2), rel=1e-5)


def given_to_the_loss(B=20_000, **fields):
    """What a training step gives its loss: images and labels of a global batch, and floats, times, noise, labels."""
    rng, given = torch.Generator().manual_seed(0), []
    images = torch.randint(256, (B, 3, 2, 2), generator=rng, dtype=torch.uint8)
    labels = torch.arange(B) % CLASSES

    def errors_of(model, *parts):
        given.extend(parts)
        return torch.zeros(B, requires_grad=True)
    adam = types.SimpleNamespace(step=lambda: None, zero_grad=lambda **_: None)
    config = dataclasses.replace(CPU, batch=B, **fields)
    model = types.SimpleNamespace(classes=CLASSES)
    course.train_step((images, labels), rng, errors_of, model, adam, config, make_run())
    return images, labels, *given


def normal_of_logit(t):
    return stats.norm.cdf(np.log(t / (1 - t)))


@pytest.mark.parametrize("kind,cdf", [("uniform", stats.uniform.cdf), ("logit-normal", normal_of_logit)])
def test_times_and_noise(kind, cdf):
    images, _, x, t, noise, _ = given_to_the_loss(times=kind)
    assert stats.kstest(t.double().numpy(), cdf).statistic < 0.02, "the other kind is 0.11 away"
    assert torch.allclose(x, images / 127.5 - 1) and noise.shape == x.shape
    assert stats.kstest(noise.flatten().numpy(), stats.norm.cdf).statistic < 0.01
    assert abs(np.corrcoef(t.numpy(), noise[:, 0, 0, 0].numpy())[0, 1]) < 0.05


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_labels_left_out(share):
    _, labels, *_, kept = given_to_the_loss(label_drop=share)
    dropped = kept == CLASSES
    assert dropped.float().mean().item() == pytest.approx(share, abs=0.01)
    assert torch.equal(kept[~dropped], labels[~dropped])
    by_class = torch.stack([dropped[labels == c].float().mean() for c in range(CLASSES)])
    assert (by_class - share).abs().max() < 0.06, "of every class as many"


def test_ranks_share_the_work(model, frozen, monkeypatch):
    """The ranks' losses and gradients add up to the whole batch's."""
    images = ((frozen[0][:8] + 1) * 127.5).round().byte()
    config = dataclasses.replace(CPU, batch=8)
    gradients, losses = [], []
    monkeypatch.setattr(course, "sum_gradients", lambda *_: gradients.append(model.head.weight.grad.clone()))
    adam = types.SimpleNamespace(step=lambda: None, zero_grad=lambda **_: model.zero_grad())
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        rng, run = torch.Generator().manual_seed(0), make_run(rank, world)
        loss = course.train_step((images, frozen[3][:8]), rng, course.velocity_errors, model, adam, config, run)
        losses.append(loss.item())
    assert losses[0] == pytest.approx(sum(losses[1:]), rel=1e-5) and losses[1] != losses[2]
    assert torch.allclose(gradients[0], gradients[1] + gradients[2], atol=1e-5)


# ------------------------------------------------------------------------------------------------------------
# The model as samples and the evaluation use it

@torch.no_grad()
def test_sampling_is_the_courses(model):
    """Euler's steps from t = 1 to 0 along u + s (c - u), u with the label that stands for none; s counts in the middle
    of the way alone and steps are shorter near noise, which the course does not have: its samples are drawn as
    train_flow.py's."""
    labels, noise = torch.tensor([3, 20]), torch.randn(2, 3, SIDE, SIDE)
    z, times = noise, (1, 0.9, 0.75, 0.5, 0)
    for time, next_time in itertools.pairwise(times):
        t = torch.full((2,), time)
        c, u = model(z, t, labels), model(z, t, torch.full((2,), CLASSES))
        z = z - (u + 2 * (c - u) if time in (0.75, 0.5) else c) * (time - next_time)
    found, path = course.sample(model, labels, 4, "euler", guidance=2.0, noise=noise, return_trajectory=True)
    assert torch.allclose(path[-1][1], z, atol=1e-4) and torch.equal(found, path[-1][1].clamp(-1, 1))
    plain = course.sample(model, labels, 4, "euler", noise=noise)
    assert plain.shape == (2, 3, SIDE, SIDE) and plain.dtype == torch.float32
    assert not torch.allclose(plain, found, atol=1e-2)
    assert course.sample(model, torch.arange(5), 2).shape == (5, 3, SIDE, SIDE)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluation_accepts_it(model, frozen, precision):
    """A float32 velocity in either precision, the same whenever it is asked for."""
    pictures, times, noise, labels = (part[:20].clone() for part in frozen[:4])
    with torch.no_grad():
        expected = course.velocity_errors(model, pictures, times, noise, labels).mean().item()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        found, numbers = course.evaluate(model, pictures, times, noise, labels, 0, 1)
    assert found == pytest.approx(expected, rel=0.03 if precision == "bf16" else 1e-4)
    assert numbers["eval_targets"] == 20


# ------------------------------------------------------------------------------------------------------------
# Whole runs

def test_same_stopwatch_and_evaluation_as_the_fast_script():
    fast, slow = (Path(module.__file__).read_text() for module in (train_flow, course))
    for names in rules.STOP_WATCH, rules.FROZEN:
        assert rules.block_sha256(slow, names) == rules.block_sha256(fast, names)
    assert not rules.redefined(slow, rules.STOP_WATCH + rules.FROZEN)
    for name in ("Options", "to_floats", "velocity_errors"):
        assert inspect.getsource(getattr(course, name)) == inspect.getsource(getattr(train_flow, name)), name


def test_same_evaluation_fields_as_the_fast_script():
    for track, config in course.CONFIGS.items():
        for key in ("track", "data", "pixels", "frozen", "frozen_draws"):
            assert getattr(config, key) == getattr(train_flow.CONFIGS[track], key)


def test_run(tiny, tmp_path, monkeypatch):
    """It learns, and its log ends with the quality numbers."""
    root = make_root(tmp_path / "root")
    monkeypatch.setattr(show_flow, "STEPS", (1,))
    monkeypatch.setattr(show_flow, "SHEET_STEPS", 2)
    own = {key: tiny[key] for key in ("frozen", "frozen_draws")}  # a track's own images are judged
    monkeypatch.setitem(course.CONFIGS, "cpu", dataclasses.replace(CPU, **own))
    argv = [*SMALL, f"--data={tiny['data']}", "--num_steps=60", "--eval_every=15", "--save=true"]
    argv += ["--quality_pictures=24"]
    run_here(monkeypatch, root, argv, samples=True)
    path, = (root / "logs").iterdir()
    log = rules.parse_log(path)
    foot, losses = log["footer"], [loss for _, _, loss in log["steps"]]
    assert len(losses) == 4 and losses == sorted(losses, reverse=True) and losses[-1] < 1 < foot["constant_loss"]
    assert foot["tokens"] == 60 * 16 * 256 and foot["script"] == "train_flow_course.py"
    assert 0 <= foot["quality_class_accuracy"] <= 1 and foot["quality_frechet"] > 0
    weights, = (root / "checkpoints").iterdir()
    assert {p.name for p in (root / "samples" / weights.stem).iterdir()} == {"flow.png", "flow.gif"}
    again = make_root(tmp_path / "again")
    run_here(monkeypatch, again, [*SMALL, *arguments(tiny), "--num_steps=0", f"--load={weights}"])
    assert runs.footers(again)[0]["val_loss"] == pytest.approx(foot["val_loss"], abs=0.005)


def test_the_rate_is_constant(tiny, tmp_path, monkeypatch):
    rates, make_optimizer = [], course.make_optimizer

    def spied(model, config):
        adam = make_optimizer(model, config)
        adam.register_step_pre_hook(lambda adam, *_: rates.append(adam.param_groups[0]["lr"]))
        return adam
    monkeypatch.setattr(course, "make_optimizer", spied)
    run_here(monkeypatch, make_root(tmp_path / "root"), [*SMALL, *arguments(tiny), "--num_steps=6"])
    assert rates == [5e-4] * (5 + 6), "of the warm-up and of the run"


def test_resume(tiny, tmp_path, monkeypatch):
    argv = [*SMALL, *arguments(tiny), "--num_steps=6"]
    roots = [make_root(tmp_path / name) for name in ("whole", "resumed")]
    runs.keep_states(monkeypatch.setattr)
    run_here(monkeypatch, roots[0], [*argv, "--save_every=4"])
    run_here(monkeypatch, roots[1], [*argv, f"--resume={roots[0]}/checkpoints/4.pt"])
    (whole,), (resumed,) = map(runs.footers, roots)
    assert resumed["val_loss"] == whole["val_loss"] and resumed["tokens"] == whole["tokens"]


def test_its_log_opens_a_track(tiny, tmp_path, monkeypatch):
    root = make_root(tmp_path / "root")
    (root / "train_flow.py").write_text((ROOT / "train_flow.py").read_text())
    fields = {**DIMS, "batch": 16, "num_steps": 2, "target": 9.0, "data": tiny["data"]}
    words = ", ".join(f"{key}={value!r}" for key, value in fields.items())
    script = root / "train_flow_course.py"
    script.write_text(course.HERE.read_text().replace('"cpu": Config(),', f'"cpu": Config({words}),'))
    monkeypatch.setattr(course, "HERE", script)
    monkeypatch.setitem(course.CONFIGS, "cpu", course.Config(**fields))
    monkeypatch.setattr(sys, "argv", [script.name, "--seed=0", "--precision=fp32"])
    run_here(monkeypatch, root, ["--seed=0", "--track=cpu", "--precision=fp32"])
    path, = (root / "logs").iterdir()
    words = types.SimpleNamespace(logs=[path], baseline="the course's", data="some close-ups", name="CourseRecipe",
                                  floor=["quality_class_accuracy>=0.9"], device=None, eval_file=[],
                                  note="The course's rectified flow\n\nIt is small.")
    folder = submit.submit(words, root)
    assert (folder / script.name).exists() and (folder / "0.log").exists()
    track = json.loads((folder.parent / "track.json").read_text())
    assert not track["baseline"]["reached"], "one trial is no record"
    assert track["eval_files"] == ["data/frozen/objects64.npz", "data/frozen/eval_flow.npz"]


@pytest.mark.parametrize("argv,message", [
    (["--dim=96"], "--dim=96 is not a multiple of 64"),
    (["--head_dim=24"], "--head_dim=24 is not an even divisor of --dim=64"),
    (["--head_dim=1"], "--head_dim=1 is not an even divisor of --dim=64"),
    (["--patch=3"], "patches of 3 pixels do not tile images of 32"),
    (["--batch=301"], "more than the 300 training images there are"),
    (["--data=nowhere"], "python data/scenes.py --objects"),
    (["--times=cosine"], "is not one of uniform, logit-normal"),
    (["--label_drop=2"], "is not a number from 0 to 1"),
    (["--quality_pictures=1"], "a Frechet distance needs at least 2"),
    (["--reflow=100"], "there is no field --reflow"),
])
def test_bad_arguments(tiny, monkeypatch, tmp_path, argv, message):
    root = make_root(tmp_path / "root")
    with pytest.raises(course.Fault, match=message):
        run_here(monkeypatch, root, [*SMALL, *arguments(tiny), "--num_steps=10", *argv])
    assert not (root / "logs").exists(), "nothing has been started"
