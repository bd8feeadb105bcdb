"""baselines/train_maskgit_course.py: the course's recipe, its blocks, and whole runs on tiny data."""
import dataclasses
import functools
import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import rules
import runs
import show
import show_maskgit
import submit
import train_maskgit

ROOT = Path(__file__).resolve().parent.parent
course = show.load_script(ROOT / "baselines" / "train_maskgit_course.py")
generate = course.generate
DIMS = {"dim": 64, "head_dim": 32, "depth": 1}
SMALL = ["--track=cpu", *(f"--{key}={value}" for key, value in DIMS.items()), "--batch=16", "--quality_pictures=0",
         "--precision=fp32"]
ABOUT = {"rgb": {"length": 64, "vocab": 4096}, "label": {"length": 1, "vocab": 24}}
run_here = functools.partial(runs.run_here, "maskgit_course")


def make_model(**fields):
    torch.manual_seed(0)
    config = dataclasses.replace(course.CONFIGS["cpu"], **fields)
    model = course.MaskGIT(config, ABOUT)
    course.init_weights(model, config.init_std)
    return model


@pytest.fixture(scope="module")
def model():
    """A small model in float32 whose predictions differ: what starts at zero is drawn at random."""
    model = make_model(**DIMS)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.fixture(scope="module")
def frozen():
    return course.read_frozen(course.CONFIGS["cpu"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, frozen):
    """A folder with 300 training pictures and 100 validation pictures, and the fields that point there."""
    folder = tmp_path_factory.mktemp("tiny")
    tokens, labels, masked, modalities, _ = frozen
    arrays = {"rgb": tokens.numpy().astype(np.uint16), "label": labels[:, None].numpy().astype(np.uint16)}
    (folder / "train").mkdir()
    for m, rows in arrays.items():
        np.save(folder / "train" / f"{m}.npy", rows[:300])
    (folder / "train/meta.json").write_text(json.dumps({"num": 300, "modalities": modalities}))
    about = np.frombuffer(json.dumps(modalities).encode(), np.uint8)
    np.savez(folder / "objects.npz", modalities=about, **{m: rows[:100] for m, rows in arrays.items()})
    np.savez(folder / "masks.npz", masked=masked[:100].numpy())
    return {"data": f"{folder}/train", "frozen": f"{folder}/objects.npz", "frozen_masks": f"{folder}/masks.npz"}


def make_root(folder):
    folder.mkdir()
    (folder / "data").symlink_to(ROOT / "data")
    return folder


def arguments(fields):
    return [f"--{key}={value}" for key, value in fields.items()]


# ------------------------------------------------------------------------------------------------------------
# The recipe

def test_the_courses_numbers():
    for config in course.CONFIGS.values():
        assert (config.lr, config.lr_min, config.warmup, config.clip) == (3e-4, 1e-6, 0.1, 1.0)
        assert (config.beta1, config.beta2, config.weight_decay) == (0.9, 0.95, 0.05)
        assert (config.init_std, config.mlp_ratio) == (0.02, 4)
    gpu = course.CONFIGS["gpu"]
    assert (gpu.dim, gpu.depth, gpu.head_dim, gpu.batch) == (512, 8, 64, 256)
    assert gpu.num_steps * gpu.batch * 256 == pytest.approx(1e9, rel=0.001)
    with torch.device("meta"):
        model = course.MaskGIT(gpu, course.read_frozen(gpu)[3])
        ids = torch.zeros(2, 257, dtype=torch.long)
        assert model(ids, ids == 0).shape == (2, 257, 512)
    assert sum(p.numel() for p in model.blocks.parameters()) == 8 * (12 * 512 ** 2 + 2 * 512)


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 512])
def test_schedule(dim):
    """As numpy.linspace(0, peak, 10 %) and then a cosine give it."""
    config = dataclasses.replace(course.CONFIGS["cpu"], dim=dim, num_steps=1000)
    rates = [course.learning_rate(step, config) for step in range(1000)]
    peak = 3e-4 * 512 / dim
    assert rates[:100] == pytest.approx(np.linspace(0, peak, 100))
    i = np.arange(900)
    assert rates[100:] == pytest.approx(1e-6 + (peak - 1e-6) * (1 + np.cos(np.pi * i / 900)) / 2)
    assert dim % config.head_dim == 0


def test_optimizer(model):
    adam = course.make_optimizer(model, course.CONFIGS["cpu"])
    decayed, kept = adam.param_groups
    assert type(adam) is torch.optim.AdamW and decayed["betas"] == kept["betas"] == (0.9, 0.95)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.05, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in kept["params"]} == {"norm.weight", "blocks.0.norm1.weight", "blocks.0.norm2.weight"}
    taken = [id(p) for group in adam.param_groups for p in group["params"]]
    assert len(taken) == len(set(taken)) == len(names)


def test_start(frozen):
    """Normal weights of 0.02, no biases, gains of 1, and a head that gives every token of the vocabulary the same."""
    model = make_model(**DIMS)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == 3 and all(norm.eps == 1e-6 and (norm.weight == 1).all() for norm in norms)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            std = 0.0 if name == "head.weight" else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.2), name
    assert not any("bias" in name for name, _ in model.named_parameters())
    ids = model.sequence(frozen[0][:4], frozen[1][:4])
    nats = course.masked_nats(model, ids, torch.ones_like(ids, dtype=torch.bool))
    assert torch.allclose(nats, torch.full((4 * 65,), math.log(4096 + 24)))


def test_masks():
    rng, T = torch.Generator().manual_seed(0), 65
    masked = torch.cat([course.draw_masks(64, T, rng) for _ in range(200)])
    counts = masked.sum(1).bincount(minlength=T + 1)
    assert counts[0] == 0 and len(counts) == T + 1
    expected = len(masked) / T
    chi = ((counts[1:] - expected) ** 2 / expected).sum().item()
    assert chi < T + 4 * (2 * T) ** 0.5, "as many rows of every count"
    where = masked.float().mean(0)
    assert (where - (T + 1) / (2 * T)).abs().max() < 0.02, "the label's place as often as any other"


def test_loss_is_the_recipes(model, frozen):
    """Cross-entropy of all logits at all masked places, whatever rows the head has; its gradients, too."""
    tokens, labels = (part[:16] for part in frozen[:2])
    ids = model.sequence(tokens, labels)
    masked = course.draw_masks(*ids.shape, torch.Generator().manual_seed(0))
    assert masked[:, 0].any() and not masked[:, 0].all()
    losses = [course.masked_nats(model, ids, masked).sum() / masked.sum()]
    logits = model.head(model(ids, masked))
    losses.append(F.cross_entropy(logits.flatten(0, 1), ids.masked_fill(~masked, -100).flatten(), ignore_index=-100))
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for ours, plain in zip(*(torch.autograd.grad(loss, list(model.parameters())) for loss in losses)):
        assert torch.allclose(ours, plain, atol=1e-5)


@pytest.mark.parametrize("world", [1, 2])
def test_the_head_has_few_shapes(world):
    """All of which are met in the warm-up."""
    rng, ids = torch.Generator().manual_seed(0), torch.zeros(8, 65, dtype=torch.long)
    parts = ids.chunk(world)
    warm = set()
    for sixteenths in range(1, course.HEAD_SHAPES + 1):
        masked = course.dummy_masks(sixteenths, ids, world)
        rows, = {len(course.head_rows(part)[0]) for part in masked.chunk(world)}  # the same on every rank
        warm.add(rows)
    assert len(warm) == 16
    for _ in range(200):
        masked = course.draw_masks(*parts[0].shape, rng)
        rows, count = course.head_rows(masked)
        assert count == masked.sum() and len(rows) in warm and len(rows) - count < min(warm)
        assert torch.equal(rows[:count], masked.flatten().nonzero()[:, 0]) and not rows[count:].any()


def test_ranks_share_the_work(model, frozen, monkeypatch):
    """The ranks' losses and gradients add up to the whole batch's."""
    ids = model.sequence(frozen[0][:8], frozen[1][:8])
    masked = course.draw_masks(*ids.shape, torch.Generator().manual_seed(0))
    config = dataclasses.replace(course.CONFIGS["cpu"], batch=8, clip=math.inf, **DIMS)
    gradients, losses = [], []
    monkeypatch.setattr(course, "sum_gradients", lambda *_: gradients.append(model.head.weight.grad.clone()))
    adam = types.SimpleNamespace(step=lambda: None, zero_grad=lambda **_: model.zero_grad(), param_groups=[])
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        run = runs.fake_run(rank, world)
        run.slice = functools.partial(course.Run.slice, run)
        run.autocast = functools.partial(course.Run.autocast, run)
        losses.append(course.train_step(0, ids, masked, model, adam, config, run).item())
    assert losses[0] == pytest.approx(sum(losses[1:]), rel=1e-5)
    assert torch.allclose(gradients[0], gradients[1] + gradients[2], atol=1e-6)


# ------------------------------------------------------------------------------------------------------------
# The model as the evaluation and the samples use it

def test_masked_tokens_are_not_seen(model, frozen):
    tokens, labels, masked = (part[:8] for part in frozen[:3])
    logs = model.log_probs(tokens, labels, masked)
    assert logs.shape == (masked.sum(), 4096) and logs.dtype == torch.float32
    assert torch.allclose(logs.exp().sum(-1), torch.ones(len(logs)), atol=1e-4)
    assert torch.equal(logs, model.log_probs(tokens.where(~masked, (tokens + 7) % 4096), labels, masked))
    assert not torch.allclose(logs, model.log_probs(tokens.where(masked, (tokens + 7) % 4096), labels, masked))
    assert not torch.allclose(logs, model.log_probs(tokens, (labels + 1) % 24, masked))


def test_a_label_may_be_masked(model, frozen):
    """The last one stands for none: what the model has at a label's place is then the mask's vector."""
    tokens, labels, masked = (part[:8] for part in frozen[:3])
    ids, hidden = model.sequence(tokens, labels), F.pad(masked, (1, 0), value=True)
    logits = model.head(model(ids, hidden)[:, 1:][masked])[:, :4096]
    assert torch.allclose(model.log_probs(tokens, torch.full_like(labels, 24), masked), logits.log_softmax(-1))
    assert not torch.equal(generate(model, labels, steps=2), generate(model, labels, steps=2, guidance=3.0))


def test_evaluation_accepts_it(model, frozen):
    tokens, labels, masked = (part[:20] for part in frozen[:3])
    found, numbers = course.evaluate(model, tokens, labels, masked, 4096, 0, 1)
    with torch.no_grad():
        logs = model.log_probs(tokens, labels, masked)
    assert found == pytest.approx(-logs.gather(1, tokens[masked][:, None]).mean().item(), rel=1e-5)
    assert numbers == {"eval_targets": int(masked.sum())}


# ------------------------------------------------------------------------------------------------------------
# Whole runs

def test_same_stopwatch_and_evaluation_as_the_fast_script():
    fast, slow = (Path(module.__file__).read_text() for module in (train_maskgit, course))
    for names in rules.STOP_WATCH, rules.FROZEN, ["copied: loader"]:
        assert rules.block_sha256(slow, names) == rules.block_sha256(fast, names)
    assert not rules.redefined(slow, rules.STOP_WATCH + rules.FROZEN)


def test_same_evaluation_fields_as_the_fast_script():
    fast, slow = (vars(module.CONFIGS["cpu"]) | vars(module.Options()) for module in (train_maskgit, course))
    for key in ("track", "data", "frozen", "frozen_masks", "quality_pictures"):
        assert slow[key] == fast[key]


def test_run(tiny, tmp_path, monkeypatch):
    """It learns, and its log ends with the quality numbers."""
    root = make_root(tmp_path / "root")
    monkeypatch.setattr(show_maskgit, "STEPS", (1,))
    monkeypatch.setattr(show_maskgit, "FLOOR_STEPS", 2)
    monkeypatch.setattr(course, "generate", lambda *words, **rest: generate(*words, **rest | {"steps": 2}))
    argv = [*SMALL, *arguments(tiny), "--num_steps=30", "--eval_every=10", "--quality_pictures=24", "--save=true"]
    run_here(monkeypatch, root, argv, samples=True)
    path, = (root / "logs").iterdir()
    log = rules.parse_log(path)
    losses = [loss for _, _, loss in log["steps"]]
    assert losses == sorted(losses, reverse=True) and losses[-1] < math.log(4096) - 1
    assert log["footer"]["tokens"] == 30 * 16 * 65 and log["footer"]["script"] == "train_maskgit_course.py"
    assert 0 <= log["footer"]["quality_class_accuracy"] <= 1 and log["footer"]["quality_frechet"] > 0
    assert log["footer"]["quality_guidance"] == 2.0
    weights, = (root / "checkpoints").iterdir()
    assert {p.name for p in (root / "samples" / weights.stem).iterdir()} == {"maskgit.png", "maskgit_steps.gif"}
    again = make_root(tmp_path / "again")
    run_here(monkeypatch, again, [*SMALL, *arguments(tiny), "--num_steps=0", f"--load={weights}"])
    assert runs.footers(again)[0]["val_loss"] == pytest.approx(log["footer"]["val_loss"], abs=0.02)


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
    (root / "train_maskgit.py").write_text((ROOT / "train_maskgit.py").read_text())
    fields = {**DIMS, "batch": 16, "num_steps": 2, "target": 9.0, "data": tiny["data"]}
    words = ", ".join(f"{key}={value!r}" for key, value in fields.items())
    script = root / "train_maskgit_course.py"
    script.write_text(course.HERE.read_text().replace('"cpu": Config(),', f'"cpu": Config({words}),'))
    monkeypatch.setattr(course, "HERE", script)
    monkeypatch.setitem(course.CONFIGS, "cpu", course.Config(**fields))
    monkeypatch.setattr(sys, "argv", [script.name, "--seed=0", "--precision=fp32"])
    run_here(monkeypatch, root, ["--seed=0", "--track=cpu", "--precision=fp32"])
    path, = (root / "logs").iterdir()
    words = types.SimpleNamespace(logs=[path], baseline="the course's", data="some close-ups", name="CourseRecipe",
                                  floor=["quality_class_accuracy>=0.9"], device=None, eval_file=[],
                                  note="The course's nanoMaskGIT\n\nIt is small.")
    folder = submit.submit(words, root)
    assert (folder / script.name).exists() and (folder / "0.log").exists()
    track = json.loads((folder.parent / "track.json").read_text())
    assert not track["baseline"]["reached"], "one trial is no record"
    assert track["eval_files"] == ["data/frozen/objects64.npz", "data/frozen/eval_maskgit_64.npz"]


@pytest.mark.parametrize("argv,message", [
    (["--head_dim=24"], "--dim=64 is not a multiple of --head_dim=24"),
    (["--batch=301"], "more than the 300 training examples there are"),
    (["--data=nowhere"], "python data/scenes.py --objects"),
    (["--label_drop=0.1"], "there is no field --label_drop"),
    (["--warmup=2"], "is not a number from 0 to 1"),
    (["--lr=-1"], "is not a number from 0 to inf"),
])
def test_bad_arguments(tiny, monkeypatch, tmp_path, argv, message):
    root = make_root(tmp_path / "root")
    with pytest.raises(course.Fault, match=message):
        run_here(monkeypatch, root, [*SMALL, *arguments(tiny), "--num_steps=10", *argv])
    assert not (root / "logs").exists(), "nothing has been started"
