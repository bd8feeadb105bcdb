"""baselines/train_4m_course.py: the recipe's constants, masks, padding and loss, and a log that can open a track."""
import dataclasses
import inspect
import json
import math
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import eval_masks
import generate_4m
import rules
import runs
import show
import submit
import train_4m
from test_train_4m import tiny  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "baselines" / "train_4m_course.py"
course = show.load_script(SCRIPT)
DIMS = {"dim": 32, "head_dim": 16, "enc_depth": 1, "dec_depth": 1}
CPU = course.CONFIGS["cpu"]


@pytest.fixture(scope="module")
def frozen():
    return course.read_frozen(CPU)


@pytest.fixture(scope="module")
def layout(frozen):
    return course.Layout(frozen[2])


def small_model(layout, head=0.5):
    """A small model; head: the spread of the head, which starts at zero, so that predictions differ."""
    torch.manual_seed(0)
    model = course.Nano4M(dataclasses.replace(CPU, **DIMS), layout)
    course.init_weights(model, std=0.2)
    torch.nn.init.normal_(model.head.weight, std=head)
    return model


# ------------------------------------------------------------------------------------------------------------
# What it shares with train_4m.py

def test_stop_watch_and_evaluation_are_the_tracks():
    sources = [path.read_text() for path in (SCRIPT, ROOT / "train_4m.py")]
    for names in (rules.STOP_WATCH, rules.FROZEN):
        ours, theirs = (rules.block_sha256(source, names) for source in sources)
        assert ours == theirs
    assert not rules.redefined(sources[0], rules.STOP_WATCH + rules.FROZEN)


def test_options_are_those_of_train_4m():
    assert inspect.getsource(course.Options) == inspect.getsource(train_4m.Options)


# ------------------------------------------------------------------------------------------------------------
# The recipe

def test_the_gpu_track_has_the_courses_numbers():
    config = course.CONFIGS["gpu"]
    assert (config.dim, config.head_dim, config.enc_depth, config.dec_depth, config.mlp_ratio) == (512, 64, 6, 6, 4)
    assert (config.batch, config.budget, config.init_std) == (512, 128, 0.02)
    assert config.num_steps == math.ceil(5e9 / (512 * 256)), "5 billion tokens, 256 per scene"
    for config in (config, CPU):
        assert (config.lr, config.lr_min, config.beta1, config.beta2) == (6e-4, 1e-6, 0.9, 0.95)
        assert (config.weight_decay, config.clip, config.warmup, config.budget) == (0.05, 1.0, 0.1, 128)


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 512])
def test_schedule(dim):
    config = dataclasses.replace(CPU, dim=dim, num_steps=200)
    rates = np.array([course.learning_rate(step, config) for step in range(200)])
    peak = 6e-4 * 512 / dim
    assert np.allclose(rates[:20], np.linspace(0, peak, 20)), "a tenth of warm-up, from 0 to the peak"
    assert np.allclose(rates[20:], 1e-6 + (peak - 1e-6) * (1 + np.cos(np.pi * np.arange(180) / 180)) / 2)
    for num_steps in (1, 3):
        few = dataclasses.replace(config, num_steps=num_steps)
        assert all(0 <= course.learning_rate(step, few) <= peak for step in range(num_steps))


def test_optimizer(layout):
    model = small_model(layout)
    adam = course.make_optimizer(model, CPU)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, others = ([names[id(p)] for p in group["params"]] for group in adam.param_groups)
    assert isinstance(adam, torch.optim.AdamW) and sorted(decayed + others) == sorted(names.values())
    assert all("norm" in name or name.endswith("bias") for name in others)
    assert not any("norm" in name or name.endswith("bias") for name in decayed)
    assert [group["weight_decay"] for group in adam.param_groups] == [0.05, 0]
    assert {(*group["betas"], group["eps"]) for group in adam.param_groups} == {(0.9, 0.95, 1e-8)}


def test_initialisation(layout):
    torch.manual_seed(0)
    model = course.Nano4M(CPU, layout)
    course.init_weights(model, CPU.init_std)
    for name, p in model.named_parameters():
        if "norm" in name:
            assert (p == 1).all() and name.endswith("weight")
        elif name in ("head.weight", "context_proj.bias"):
            assert (p == 0).all()
        else:
            assert "bias" not in name and p.std().item() == pytest.approx(0.02, rel=0.1), name
    epsilons = {module.eps for module in model.modules() if isinstance(module, torch.nn.LayerNorm)}
    assert epsilons == {1e-6}


def test_size_is_the_courses(layout):
    """Its parameters, counted by hand."""
    config, blocks = course.CONFIGS["gpu"], 6
    larger = types.SimpleNamespace(kind=layout.kind, offset=layout.offset, vocab=64000)
    with torch.device("meta"):
        model = course.Nano4M(config, larger)
    C = 512
    encoder = blocks * (12 * C * C + 2 * C)
    decoder = blocks * (16 * C * C + 4 * C)
    others = 2 * 64000 * C + 2 * 8 * C + C * C + C + 2 * C
    assert sum(p.numel() for p in model.parameters()) == encoder + decoder + others


def test_masks(frozen, layout):
    tokens = frozen[0][:500]
    enc_pos, visible, dec_pos, counted = course.draw_places(tokens, layout, 128, torch.Generator().manual_seed(0))
    inputs = torch.zeros_like(tokens).scatter(1, enc_pos, visible.long())
    targets = torch.zeros_like(tokens).scatter(1, dec_pos, counted.long())
    assert enc_pos.shape == visible.shape == dec_pos.shape == counted.shape == (500, 128)
    assert torch.equal(inputs.sum(1), visible.sum(1)) and torch.equal(targets.sum(1), counted.sum(1)), "no place twice"
    assert not (inputs & targets).any() and layout.valid(tokens)[(inputs | targets).bool()].all()
    assert visible.any(1).all()


def test_masks_are_those_of_the_frozen_evaluation(frozen, layout):
    """Inputs and targets of each modality, against the plain masking scene by scene; this one rounds the shares."""
    tokens, kind, K = frozen[0], layout.kind.numpy(), len(course.MODALITIES)
    rng = np.random.default_rng(0)
    slow = [eval_masks.draw_roles(valid, kind, rng) for valid in layout.valid(tokens).numpy()]
    enc_pos, visible, dec_pos, counted = course.draw_places(tokens, layout, 128, torch.Generator().manual_seed(0))
    for role, places, seen in (1, enc_pos, visible), (2, dec_pos, counted):
        plain = np.stack([np.bincount(kind[roles == role], minlength=K) for roles in slow])
        drawn = [kind[row[keep]] for row, keep in zip(places.numpy(), seen.numpy())]
        drawn = np.stack([np.bincount(kinds, minlength=K) for kinds in drawn])
        error = np.sqrt((plain.var(0) + drawn.var(0)) / len(tokens))
        assert (np.abs(plain.mean(0) - drawn.mean(0)) < 4.5 * error + 0.15).all(), (plain.mean(0), drawn.mean(0))
        assert np.allclose(plain.std(0), drawn.std(0), rtol=0.1)


def test_budgets_are_uniform():
    limit = torch.full((20000, 8), 1000)
    total = course.split_budget(limit, 128, torch.Generator().manual_seed(0)).sum(1)
    times = torch.bincount(total, minlength=129).double()
    assert len(times) == 129 and times[0] == 0
    assert ((times[1:] - 156.25) ** 2 / 156.25).sum() < 127 + 5 * math.sqrt(2 * 127)
    cut = course.split_budget(limit * 0 + 3, 128, torch.Generator().manual_seed(0))
    assert cut.max() == 3 and cut.min() == 0


# ------------------------------------------------------------------------------------------------------------
# Padding and loss

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_does_not_change_predictions(frozen, layout, dtype):
    tokens, model = frozen[0][:6], small_model(layout)
    enc_pos, visible, dec_pos, counted = course.draw_places(tokens, layout, 32, torch.Generator().manual_seed(0))
    assert not visible.all() and not counted.all()
    other = torch.randint(layout.size, enc_pos.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        one = model(tokens, enc_pos, visible, dec_pos, counted)
        elsewhere = torch.where(visible, enc_pos, other), visible, torch.where(counted, dec_pos, other), counted
        same = model(tokens, *elsewhere)
        more = [torch.cat([part, padding], 1) for part, padding in
                ((enc_pos, other), (visible, other < 0), (dec_pos, other), (counted, other < 0))]
        longer = model(tokens, *more)[:, :32]
        wrong = model(tokens, enc_pos, visible, torch.where(counted, dec_pos, other))
    gaps = [(logs - one)[counted].abs().max().item() for logs in (same, longer, wrong)]
    rounding = {torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    assert gaps[0] < 1e-4 and gaps[1] < rounding
    assert gaps[2] > 2 * rounding, "targets see each other, so one that is not masked matters"


def test_targets_are_not_seen(frozen, layout):
    tokens, model = frozen[0][:6], small_model(layout)
    places = course.draw_places(tokens, layout, 32, torch.Generator().manual_seed(0))
    is_input = torch.zeros_like(tokens).scatter(1, places[0], places[1].long()) > 0
    changed = torch.where(is_input, tokens, (tokens * 7 + 3) % 128)
    with torch.no_grad():
        assert torch.equal(*(model(t, *places)[places[3]] for t in (tokens, changed)))
        assert not torch.equal(*(model(t, *places)[places[3]] for t in (tokens, changed.roll(1, 0))))


def test_a_scene_without_targets(frozen, layout):
    tokens, model = frozen[0][:4], small_model(layout)
    places = list(course.draw_places(tokens, layout, 32, torch.Generator().manual_seed(0)))
    places[3] = places[3].clone()
    places[3][1] = False
    weight = course.target_weights(places[2], places[3], layout)
    course.masked_loss(model, tokens, *places, weight).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_the_head_has_few_shapes():
    for count in (0, 1, 7, 8, 9, 100, 127, 128):
        counted = torch.zeros(4, 32, dtype=torch.bool)
        counted.view(-1)[torch.randperm(128)[:count]] = True
        rows, true = course.head_rows(counted)
        assert len(rows) % 8 == 0 and true == count and len(rows) - count < 8
        assert torch.equal(rows[:count], counted.flatten().nonzero()[:, 0])


def test_the_warm_up_meets_every_shape():
    config = dataclasses.replace(CPU, batch=4, budget=48)
    dummies = [course.dummy_places(n, config, "cpu") for n in range(1, course.HEAD_SHAPES + 1)]
    rows = [len(course.head_rows(places[3])[0]) for places in dummies]
    assert rows == [4 * 48 // 16 * n for n in range(1, 17)]
    assert all([part.shape for part in places] == 4 * [(4, 48)] for places in dummies)


def test_loss_is_the_mean_over_modalities(frozen, layout):
    tokens, model = frozen[0][:8], small_model(layout)
    places = course.draw_places(tokens, layout, 64, torch.Generator().manual_seed(0))
    dec_pos, counted = places[2:]
    weight = course.target_weights(dec_pos, counted, layout)
    with torch.no_grad():
        loss = course.masked_loss(model, tokens, *places, weight)
        halves = [course.masked_loss(model, *(part[rows] for part in (tokens, *places, weight)))
                  for rows in (slice(0, 4), slice(4, 8))]
        nll = -model(tokens, *places).gather(2, tokens.gather(1, dec_pos)[..., None])[..., 0]
    means = [nll[counted & (layout.kind[dec_pos] == k)].mean().item() for k in range(8)]
    assert loss.item() == pytest.approx(sum(means) / 8, abs=1e-4)
    assert sum(halves).item() == pytest.approx(loss.item(), abs=1e-4), "parts of a batch add up"
    alone = course.target_weights(dec_pos, counted & (layout.kind[dec_pos] == 2), layout)
    assert alone.sum().item() == pytest.approx(1 / 8), "a modality without targets counts as zero"


# ------------------------------------------------------------------------------------------------------------
# Evaluation, sampling and whole runs

def test_untrained_model_is_uniform(frozen, layout):
    model = small_model(layout, head=0)
    loss, numbers = course.evaluate(model, frozen[0][:8].clone(), frozen[1][:8], frozen[2], 0, 1)
    assert loss == pytest.approx(math.log(layout.vocab), abs=1e-4) and len(numbers) == 18


def test_evaluation_accepts_it(frozen, layout):
    loss, _ = course.evaluate(small_model(layout), frozen[0][:70].clone(), frozen[1][:70], frozen[2], 0, 1)
    assert math.isfinite(loss)


def test_generation(frozen, layout):
    tokens = frozen[0][:3]
    known = generate_4m.only(layout, tokens, "rgb")
    outputs = [course.Output("desc", temperature=0), course.Output("depth", "roar", steps=3),
               course.Output("normal", steps=3, guidance=2.0)]
    out, seen = generate_4m.generate(course, small_model(layout), layout, tokens, known, outputs)
    for m in ("depth", "normal"):
        assert seen[:, layout.span[m]].all() and (out[:, layout.span[m]] < 4096).all()
    assert (out[:, layout.span["desc"]] < layout.modalities["desc"]["vocab"]).all()
    assert torch.equal(out[:, layout.span["rgb"]], tokens[:, layout.span["rgb"]])


SMALL = ["--track=cpu", *(f"--{key}={value}" for key, value in DIMS.items()), "--batch=4", "--budget=48",
         "--quality_scenes=0", "--precision=fp32"]


def make_root(folder):
    """A folder that a copy of the script can run in, as it does in the repository."""
    (folder / "baselines").mkdir(parents=True)
    (folder / "data").symlink_to(ROOT / "data")
    (folder / "train_4m.py").symlink_to(ROOT / "train_4m.py")
    return folder


def test_the_loss_falls(tiny, tmp_path, monkeypatch):  # noqa: F811
    root = make_root(tmp_path)
    argv = [*SMALL, *tiny[1], "--num_steps=60", "--eval_every=20", "--lr=1e-4"]
    runs.run_here("4m_course", monkeypatch, root, argv)
    losses = runs.losses(root)
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2] and losses[2] < math.log(4096) - 1
    foot, = runs.footers(root)
    assert foot["tokens"] < 60 * 4 * 96 and foot["recompiles"] == 0
    runs.run_here("4m_course", monkeypatch, root, argv)
    assert runs.footers(root)[1]["val_loss"] == foot["val_loss"], "the same seed, the same run"


def test_resumed_run_is_the_whole_run(tiny, tmp_path, monkeypatch):  # noqa: F811
    root = make_root(tmp_path)
    argv = [*SMALL, *tiny[1], "--num_steps=20", "--save_every=15", "--lr=1e-4"]
    runs.keep_states(monkeypatch.setattr)
    runs.run_here("4m_course", monkeypatch, root, argv)
    runs.run_here("4m_course", monkeypatch, root, [*argv, f"--resume={root}/checkpoints/15.pt"])
    whole, resumed = runs.footers(root)
    assert resumed["val_loss"] == whole["val_loss"] and resumed["tokens"] == whole["tokens"]


@pytest.mark.parametrize("argv, message", [
    (["--dim=96", "--head_dim=64"], "not even and a multiple of --head_dim=64"), (["--budget=40"], "multiple of 16"),
    (["--budget=4800"], "up to the")])
def test_refusals(tiny, tmp_path, monkeypatch, argv, message):  # noqa: F811
    with pytest.raises(course.Fault, match=message):
        runs.run_here("4m_course", monkeypatch, make_root(tmp_path), [*SMALL, *tiny[1], "--num_steps=1", *argv])


def with_defaults(source, **fields):
    """A script's source with other defaults in its Config and Options."""
    for key, value in fields.items():
        source, times = re.subn(rf"(?m)^(    {key}: \w+ = )[^#\n]*", lambda m: f"{m[1]}{value!r}  ", source)
        assert times == 1, key
    return source


def test_its_log_opens_a_track(tiny, tmp_path):  # noqa: F811
    """A whole run as its user starts it, without overrides, and samples at the end; then submit.py files it."""
    root = make_root(tmp_path / "repository")
    path = root / "baselines" / SCRIPT.name
    fields = {**DIMS, "batch": 4, "budget": 48, "num_steps": 3, "eval_every": 2, "target": 1.0, "quality_scenes": 4,
              **{key[2:]: value for key, value in (word.split("=") for word in tiny[1])}}
    path.write_text(with_defaults(SCRIPT.read_text(), **fields))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, path.relative_to(root)], cwd=root, env=env, capture_output=True, text=True,
                          timeout=600)
    assert done.returncode == 0, done.stderr
    log, = (root / "logs").iterdir()
    foot = rules.parse_log(log)["footer"]
    numbers = "depth_l1 normal_degrees desc_f1 desc_object_f1 rgb_from_desc_f1 rgb_from_caption_f1 fidelity".split()
    assert all(math.isfinite(foot[f"quality_{name}"]) for name in numbers)
    assert foot["script"] == SCRIPT.name and foot["overrides"] == "none" and (root / "samples/4m.png").exists()
    args = types.SimpleNamespace(logs=[log], baseline="the course's nano4M", data="300 scenes", name="CourseRecipe",
                                 note="The course's nano4M", floor=["quality_desc_f1>=0.9"], device=None, eval_file=[])
    folder = submit.submit(args, root)
    track = json.loads((folder.parent / "track.json").read_text())
    assert track["baseline"]["recipe"] == "the course's nano4M" and track["baseline"]["reached"] is False
    assert track["eval_sha256"] == [foot["eval_sha256"]] and (folder / SCRIPT.name).exists()
