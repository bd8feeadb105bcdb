"""baselines/train_gpt_nanogpt.py: nanoGPT's recipe, its model against one written out, and whole runs on tiny data."""
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
from torch import nn

import rules
import runs
import show
import submit
import test_train_gpt
import train_gpt

ROOT = Path(__file__).resolve().parent.parent
nanogpt = show.load_script(ROOT / "baselines" / "train_gpt_nanogpt.py")
CPU, GPU = nanogpt.CONFIGS["cpu"], nanogpt.CONFIGS["gpu"]
DIMS = {"dim": 64, "head_dim": 32, "depth": 2, "context": 32}
SMALL = ["--track=cpu", *(f"--{key}={value}" for key, value in DIMS.items()), "--batch=8", "--warmup=5", "--lr=3e-3",
         "--eval_tokens=2000", "--sample_tokens=20", "--quality_tokens=0", "--precision=fp32"]
META = {"vocab": 256, "document_start": None, "encoding": "bytes"}
tiny = test_train_gpt.tiny  # a byte stream with some structure
run_here = functools.partial(runs.run_here, "gpt_nanogpt")


def small_config(**fields):
    return dataclasses.replace(CPU, **{**DIMS, **fields})


def fresh_model(meta=META, **fields):
    """A small model as training starts with it."""
    torch.manual_seed(0)
    config = small_config(**fields)
    model = nanogpt.GPT(config, meta)
    nanogpt.init_weights(model, config.init_std)
    return model


def random_model(meta=META, **fields):
    """A small model whose predictions differ, and whose gains do, as it is evaluated."""
    model = fresh_model(meta, **fields)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return random_model()


def draw_tokens(*shape):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(0))


def make_run(rank=0, world=1):
    """What train_step and check_config ask of a Run."""
    run = runs.fake_run(rank, world)
    run.slice = functools.partial(nanogpt.Run.slice, run)
    run.autocast = functools.partial(nanogpt.Run.autocast, run)
    return run


def make_root(folder):
    folder.mkdir()
    (folder / "data").symlink_to(ROOT / "data")
    return folder


# ------------------------------------------------------------------------------------------------------------
# What it shares with train_gpt.py

def test_same_stopwatch_and_evaluation_as_the_fast_script():
    fast, slow = (Path(module.__file__).read_text() for module in (train_gpt, nanogpt))
    for names in rules.STOP_WATCH, rules.FROZEN:
        assert rules.block_sha256(slow, names) == rules.block_sha256(fast, names)
    assert not rules.redefined(slow, rules.STOP_WATCH + rules.FROZEN)


@pytest.mark.parametrize("track", ["cpu", "gpu"])
def test_same_task_as_the_fast_script(track):
    for key in ("track", "data", "target", "eval_tokens"):
        assert getattr(nanogpt.CONFIGS[track], key) == getattr(train_gpt.CONFIGS[track], key)
    fast = vars(train_gpt.Options())
    assert vars(nanogpt.Options()).items() <= fast.items()


# ------------------------------------------------------------------------------------------------------------
# The recipe

def test_nanogpts_numbers():
    assert (CPU.depth, CPU.head_dim, CPU.dim, CPU.lr, CPU.warmup, CPU.beta2) == (4, 32, 128, 1e-3, 100, 0.99)
    assert (GPU.dim, GPU.depth, GPU.head_dim, GPU.context) == (768, 12, 64, 1024)
    assert (GPU.lr, GPU.lr * GPU.lr_end, GPU.warmup, GPU.beta2) == (6e-4, pytest.approx(6e-5), 2000, 0.95)
    assert GPU.batch * GPU.context == 491520
    for config in (CPU, GPU):
        assert (config.mlp_ratio, config.init_std, config.dropout) == (4, 0.02, 0.0)
        assert (config.lr_end, config.beta1, config.weight_decay, config.clip) == (0.1, 0.9, 0.1, 1.0)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_gpus_share_the_batch(world):
    nanogpt.check_config(GPU, make_run(0, world))


@pytest.mark.parametrize("config, vocab, millions", [
    (CPU, 65, 0.80),
    (dataclasses.replace(CPU, dim=384, head_dim=64, depth=6), 65, 10.65),
    (GPU, 50304, 123.59),
])
def test_size_is_nanogpts(config, vocab, millions):
    """What nanoGPT says at its start, which leaves out positions, of its two models and vocabularies."""
    with torch.device("meta"):
        model = nanogpt.GPT(config, {"vocab": vocab})
        logs = model.log_probs(torch.zeros(2, config.context + 1, dtype=torch.long))
    assert logs.shape == (2, config.context + 1, vocab)
    total = sum(p.numel() for p in model.parameters())
    assert round((total - config.context * config.dim) / 1e6, 2) == millions


def test_schedule():
    config = dataclasses.replace(CPU, num_steps=1000)
    rates = [nanogpt.learning_rate(step, config) for step in range(1000)]
    assert rates[:100] == pytest.approx(1e-3 * np.arange(1, 101) / 101)
    assert rates[100:] == pytest.approx(1e-4 + 9e-4 * (1 + np.cos(np.linspace(0, np.pi, 900))) / 2)
    assert rates[100] == pytest.approx(1e-3) and rates[-1] == pytest.approx(1e-4)
    for num_steps in (1, 101, 102):
        few = dataclasses.replace(config, num_steps=num_steps)
        assert all(0 < nanogpt.learning_rate(step, few) <= 1e-3 for step in range(num_steps))


def test_optimizer(model):
    adam = nanogpt.make_optimizer(model, CPU)
    decayed, kept = adam.param_groups
    assert type(adam) is torch.optim.AdamW
    assert {(*group["betas"], group["eps"]) for group in adam.param_groups} == {(0.9, 0.99, 1e-8)}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    gains = {"norm.weight", *(f"blocks.{i}.norm{n}.weight" for i in (0, 1) for n in (1, 2))}
    assert {names[id(p)] for p in kept["params"]} == gains
    taken = [id(p) for group in adam.param_groups for p in group["params"]]
    assert len(taken) == len(set(taken)) == len(names)


@pytest.mark.parametrize("depth", [1, 4])
def test_start(depth):
    """Normal weights of 0.02, less in what is added to the residual stream, gains of 1, and no biases."""
    model = fresh_model(depth=depth)
    for name, p in model.named_parameters():
        assert name.endswith(".weight")
        if "norm" in name:
            assert (p == 1).all()
        else:
            std = 0.02 / (2 * depth) ** 0.5 if "proj" in name or "down" in name else 0.02
            assert p.mean().abs() < 0.1 * std and p.std().item() == pytest.approx(std, rel=0.1), name
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 2 * depth + 1 and all(norm.eps == 1e-5 for norm in norms)
    tokens = draw_tokens(8, 33)
    nats = nanogpt.token_nats(model, tokens[:, :-1], tokens[:, 1:])
    assert nats.mean().item() == pytest.approx(math.log(256), abs=0.1)


def test_the_head_is_the_embedding():
    model = fresh_model()
    embedding = model.embed.weight
    assert [name for name, p in model.named_parameters() if p.shape == (256, 64) and "blocks" not in name] == \
        ["embed.weight"]
    y = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(model.logits(y), y @ embedding.T, atol=1e-6)
    tokens = torch.full((1, 4), 7)  # the head's gradient reaches rows of tokens that were not read
    nanogpt.token_nats(model, tokens, tokens).sum().backward()
    assert embedding.grad[7].any() and embedding.grad[8].any()


def test_flops():
    """Per token of a row of 32: two blocks of 12 matrices of 64 x 64 and half a row's attention, and the head."""
    block = 12 * 64 * 64 + 32 * 64
    assert nanogpt.flops_per_token(fresh_model(), small_config()) == 6 * (2 * block + 256 * 64)


# ------------------------------------------------------------------------------------------------------------
# The model

def plain_layer_norm(x, gain):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain


def plain_attention(x, qkv, proj, head_dim):
    """One head after another; qkv (3 C, C) and proj (C, C) are weights."""
    T, C = x.shape[-2:]
    seen = torch.ones(T, T).tril().bool()
    q, k, v = x @ qkv[:C].T, x @ qkv[C:2 * C].T, x @ qkv[2 * C:].T
    heads = []
    for first in range(0, C, head_dim):
        part = slice(first, first + head_dim)
        scores = q[..., part] @ k[..., part].mT / math.sqrt(head_dim)
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        heads.append(weights @ v[..., part])
    return torch.cat(heads, -1) @ proj.T


def plain_mlp(x, up, down):
    hidden = x @ up.T
    return hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2 @ down.T


def plain_log_probs(model, tokens):
    """What GPT-2 makes of tokens (B, T) with a model's weights, without any of its code: (B, T, vocab)."""
    weights = {name.removesuffix(".weight"): p.detach() for name, p in model.named_parameters()}
    x = weights["embed"][tokens] + weights["embed_position"][:tokens.shape[1]]
    for i in range(DIMS["depth"]):
        norm1, norm2, qkv, proj, up, down = (weights[f"blocks.{i}.{name}"] for name in (
            "norm1", "norm2", "attention.qkv", "attention.proj", "up", "down"))
        x = x + plain_attention(plain_layer_norm(x, norm1), qkv, proj, DIMS["head_dim"])
        x = x + plain_mlp(plain_layer_norm(x, norm2), up, down)
    return (plain_layer_norm(x, weights["norm"]) @ weights["embed"].T).log_softmax(-1)


@pytest.mark.parametrize("T", [1, 20, 32])
def test_forward_is_gpt2s(model, T):
    tokens = draw_tokens(3, T)
    with torch.no_grad():
        logs = model.log_probs(tokens)
    assert logs.shape == (3, T, 256) and logs.dtype == torch.float32
    assert logs.std() > 0.3, "predictions that are all alike prove nothing"
    assert torch.allclose(logs, plain_log_probs(model, tokens), atol=1e-4)


def test_loss_is_of_the_next_token(model):
    tokens = draw_tokens(3, 33)
    nats = nanogpt.token_nats(model, tokens[:, :-1], tokens[:, 1:])
    expected = -plain_log_probs(model, tokens[:, :-1]).gather(-1, tokens[:, 1:, None])[..., 0]
    assert nats.shape == (3, 32) and torch.allclose(nats, expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_in_both_precisions(dtype):
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 20, 16, generator=rng) for _ in range(3))
    seen = torch.ones(20, 20).tril().bool()
    expected = (q @ k.mT / 4).masked_fill(~seen, -math.inf).softmax(-1) @ v
    found = nanogpt.attend(q.to(dtype), k.to(dtype), v.to(dtype), 0.0)
    assert found.dtype == dtype
    assert torch.allclose(found.float(), expected, atol=1e-5 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_of_attention_weights(dtype):
    """The values are an identity, so the weights come out: half of them are left out, the others are doubled."""
    q, k = torch.randn(2, 1, 1, 64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    identity = torch.eye(64, dtype=dtype)[None, None]
    weights = nanogpt.attend(q, k, identity, 0.0).float()
    torch.manual_seed(0)
    dropped = nanogpt.attend(q, k, identity, 0.5).float()
    seen = torch.ones(64, 64).tril().bool()
    assert (weights[0, 0][seen] > 0).all() and not dropped[0, 0][~seen].any()
    assert (dropped[0, 0][seen] == 0).float().mean().item() == pytest.approx(0.5, abs=0.06)
    left = dropped != 0
    assert torch.allclose(dropped[left], 2 * weights[left], rtol=0.02)


def test_dropout_is_where_nanogpt_has_it(monkeypatch):
    """On embeddings, attention weights, and what attention and MLP of each block add; nowhere in evaluation."""
    model, plain = fresh_model(dropout=0.3), nanogpt.attend
    of_weights, of_states = [], []

    def attend(q, k, v, dropout):
        of_weights.append(dropout)
        return plain(q, k, v, dropout)

    monkeypatch.setattr(nanogpt, "attend", attend)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda _, inputs, out: of_states.append((out == 0).float().mean().item()))
    tokens = draw_tokens(8, 32)
    with torch.no_grad():
        model.train()(tokens)
        assert of_weights == [0.3, 0.3] and of_states == [pytest.approx(0.3, abs=0.02)] * 5
        of_weights.clear()
        of_states.clear()
        model.eval()(tokens)
        assert of_weights == [0, 0] and of_states == [0] * 5


@pytest.mark.parametrize("T", [32, 77])
def test_nothing_looks_ahead(model, T):
    """In a row of the context, and in one that is read in windows."""
    tokens = draw_tokens(2, T)
    with torch.no_grad():
        before = model.log_probs(tokens)
        for place in (1, T // 2, T - 1):
            changed = tokens.clone()
            changed[:, place] = (changed[:, place] + 1) % 256
            after = model.log_probs(changed)
            assert torch.allclose(before[:, :place], after[:, :place], atol=1e-5)
            assert not torch.allclose(before[:, place], after[:, place], atol=1e-2)


@pytest.mark.parametrize("context, T", [(32, 77), (32, 64), (32, 33), (5, 78), (2, 9)])
def test_a_row_longer_than_the_context(context, T):
    """Place by place: windows of the context, each half of it further on, a place in the first that holds it."""
    model, tokens = random_model(context=context), draw_tokens(2, T)
    ends = [*range(context, T, context // 2), T]
    with torch.no_grad():
        logs = model.log_probs(tokens)
        assert logs.shape == (2, T, 256)
        for place in range(T):
            end = next(end for end in ends if place < end)
            index = place - (end - context)  # in its window
            assert index >= min(place, context - context // 2), "as much context as that"
            window = model(tokens[:, end - context:end])
            expected = model.logits(window[:, index]).log_softmax(-1)
            assert torch.allclose(logs[:, place], expected, atol=1e-5)


def test_documents_see_each_other():
    model, tokens = random_model({**META, "document_start": 255}), draw_tokens(1, 32) % 255
    tokens[0, 10] = 255
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 255
    with torch.no_grad():
        before, after = (model.log_probs(row)[0, 20] for row in (tokens, changed))
    assert not torch.allclose(before, after, atol=1e-3)


def test_evaluation_accepts_it(model, monkeypatch):
    """Windows longer than the context, and a stream's loss by a plain loop; dropout would be noticed."""
    stream = draw_tokens(151)
    monkeypatch.setattr(nanogpt, "EVAL_WINDOWS", {"cpu": (60, 25, 10 ** 6)})
    total = 0.0
    for i in range(150):  # the evaluation's window that first holds input i ends at 60, 85, 110, 135 or 150
        end = next(end for end in (60, 85, 110, 135, 150) if i < end)
        with torch.no_grad():
            logs = model.log_probs(stream[None, end - 60:end])
        total -= logs[0, i - (end - 60), stream[i + 1]].item()
    found, numbers = nanogpt.evaluate(model, stream, 256, small_config(), 0, 1)
    assert found == pytest.approx(total / 150, abs=1e-4) and numbers == {"eval_targets": 150}
    with pytest.raises(nanogpt.Fault, match="a prediction is another one"):
        nanogpt.evaluate(random_model(dropout=0.5).train(), stream, 256, small_config(), 0, 1)


# ------------------------------------------------------------------------------------------------------------
# A step

def take_step(model, config, run, monkeypatch, step=3):
    """Loss, gradients before clipping and as the optimizer gets them, and the rates that it gets: of one step."""
    found = types.SimpleNamespace()
    adam = nanogpt.make_optimizer(model, config)

    def gradients():
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    def sum_gradients(optimizer, world):
        found.gradients, found.world = gradients(), world

    def optimizer_step():
        found.clipped, found.rates = gradients(), {group["lr"] for group in adam.param_groups}

    monkeypatch.setattr(nanogpt, "sum_gradients", sum_gradients)
    monkeypatch.setattr(adam, "step", optimizer_step)
    rows = draw_tokens(8, 33)
    found.loss = nanogpt.train_step(step, rows[:, :-1], rows[:, 1:], model, adam, config, run).item()
    assert all(p.grad is None for p in model.parameters())
    return found


def test_ranks_and_micro_batches_share_the_work(monkeypatch):
    """Losses and gradients add up to the whole batch's."""
    model = fresh_model()
    whole, parts = (take_step(model, small_config(batch=8, micro_batch=n), make_run(), monkeypatch) for n in (8, 2))
    ranks = [take_step(model, small_config(batch=8), make_run(rank, 2), monkeypatch) for rank in (0, 1)]
    rows = draw_tokens(8, 33)
    expected = F.cross_entropy(model.logits(model(rows[:, :-1])).flatten(0, 1), rows[:, 1:].flatten())
    assert whole.loss == pytest.approx(expected.item(), rel=1e-5)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    assert sum(rank.loss for rank in ranks) == pytest.approx(whole.loss, rel=1e-5)
    assert torch.allclose(parts.gradients, whole.gradients, atol=1e-6)
    assert torch.allclose(sum(rank.gradients for rank in ranks), whole.gradients, atol=1e-6)
    assert whole.gradients.abs().max() > 1e-3 and [rank.world for rank in ranks] == [2, 2]


def test_gradients_are_clipped_and_the_rate_is_set(monkeypatch):
    model = fresh_model()
    config = small_config(batch=8, clip=0.01)
    found = take_step(model, config, make_run(), monkeypatch)
    assert found.gradients.norm() > 0.02 and found.clipped.norm().item() == pytest.approx(0.01, rel=1e-3)
    assert torch.allclose(found.clipped, found.gradients * (0.01 / found.gradients.norm()), atol=1e-6)
    assert found.rates == {nanogpt.learning_rate(3, config)}
    free = take_step(model, small_config(batch=8, clip=1e6), make_run(), monkeypatch)
    assert torch.equal(free.clipped, free.gradients)


def test_dropout_is_drawn_anew_by_seed_step_and_rank(monkeypatch):
    model = fresh_model(dropout=0.2)
    settings = [(0, 3, 0), (0, 3, 0), (0, 4, 0), (1, 3, 0), (0, 3, 1)]
    losses = []
    for seed, step, rank in settings:
        torch.rand(7)  # whatever was drawn before
        run = make_run(rank, 2)
        run.slice = make_run().slice  # the same rows on every rank
        config = small_config(batch=8, dropout=0.2, seed=seed)
        losses.append(take_step(model, config, run, monkeypatch, step).loss)
    assert losses[0] == losses[1] and len(set(losses)) == 4


# ------------------------------------------------------------------------------------------------------------
# Sampling

def test_samples_follow_the_model(model):
    """Each drawn given the last 32 tokens, beyond as many as well."""
    start = draw_tokens(3, 5)
    options = nanogpt.Options(temperature=1.0, sample_tokens=40)
    drawn = list(nanogpt.generate(model, start, options, seed=1))
    assert len(drawn) == 40 and all(new.shape == (3, 1) for new in drawn)
    tokens, rng = start, torch.Generator().manual_seed(1)
    for new in drawn:
        chance = plain_log_probs(model, tokens[:, -32:])[:, -1].exp()
        assert torch.equal(new, torch.multinomial(chance, 1, generator=rng))
        tokens = torch.cat([tokens, new], 1)
    assert len(set(tokens[:, 5:].flatten().tolist())) > 10, "a model that repeats itself proves nothing"


def test_sampling_options_count(model):
    def draw(**fields):
        options = nanogpt.Options(sample_tokens=10, **fields)
        return torch.cat(list(nanogpt.generate(model, draw_tokens(3, 5), options)), 1)

    greedy = draw(temperature=0.0)
    first = plain_log_probs(model, draw_tokens(3, 5))[:, -1].argmax(-1)
    assert torch.equal(greedy[:, 0], first)
    assert torch.equal(draw(temperature=1.0, top_k=1), greedy)
    assert torch.equal(draw(temperature=1.0, top_p=1e-6), greedy)
    assert not torch.equal(draw(temperature=1.0), greedy)


# ------------------------------------------------------------------------------------------------------------
# Whole runs

def test_run(tiny, tmp_path, monkeypatch):
    """It learns, without dropout where it is evaluated; its text is written, and its weights are those that it had."""
    root = make_root(tmp_path / "root")
    argv = [*SMALL, f"--data={tiny}", "--dropout=0.1"]
    run_here(monkeypatch, root, [*argv, "--num_steps=60", "--eval_every=20", "--save=true"], samples=True)
    path, = (root / "logs").iterdir()
    log = rules.parse_log(path)
    losses = [loss for _, _, loss in log["steps"]]
    assert len(losses) == 3 and losses == sorted(losses, reverse=True) and losses[-1] < math.log(256) - 1.5
    assert set(rules.FOOTER_KEYS) <= set(log["footer"]) and log["footer"]["script"] == "train_gpt_nanogpt.py"
    assert log["footer"]["task"] == "gpt" and log["footer"]["tokens"] == 60 * 8 * 32
    assert len((root / "samples/gpt.txt").read_bytes()) == 21, "the prompt and 20 bytes"
    weights, = (root / "checkpoints").iterdir()
    again = make_root(tmp_path / "again")
    rest = [word for word in argv if word.partition("=")[0][2:] not in DIMS]
    run_here(monkeypatch, again, [*rest, "--num_steps=0", f"--load={weights}"])
    assert runs.footers(again)[0]["val_loss"] == pytest.approx(log["footer"]["val_loss"], abs=0.02), "half precision"


def test_a_resumed_run_is_the_same_run(tiny, tmp_path, monkeypatch):
    """With dropout: what it draws after step 4 of 6 is what it drew in the whole run."""
    argv = [*SMALL, f"--data={tiny}", "--num_steps=6", "--dropout=0.2"]
    roots = [make_root(tmp_path / name) for name in ("whole", "resumed", "without")]
    runs.keep_states(monkeypatch.setattr)
    run_here(monkeypatch, roots[0], [*argv, "--save_every=4"])
    run_here(monkeypatch, roots[1], [*argv, f"--resume={roots[0]}/checkpoints/4.pt"])
    run_here(monkeypatch, roots[2], [*argv[:-1], "--dropout=0"])
    (whole,), (resumed,), (without,) = map(runs.footers, roots)
    assert resumed["val_loss"] == whole["val_loss"] and resumed["tokens"] == whole["tokens"]
    assert without["val_loss"] != whole["val_loss"], "dropout that changes nothing proves nothing"


def test_bfloat16(tiny, tmp_path, monkeypatch):
    argv = [word for word in SMALL if not word.startswith("--precision")]
    found = {}
    for precision in ("fp32", "bf16"):
        root = make_root(tmp_path / precision)
        run_here(monkeypatch, root, [*argv, f"--data={tiny}", "--num_steps=10", f"--precision={precision}"])
        found[precision], = runs.footers(root)
        assert found[precision]["precision"] == precision
    losses = {precision: footer["val_loss"] for precision, footer in found.items()}
    assert losses["bf16"] != losses["fp32"] and losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)


def test_its_log_opens_a_track(tiny, tmp_path, monkeypatch):
    root = make_root(tmp_path / "root")
    (root / "train_gpt.py").write_text((ROOT / "train_gpt.py").read_text())
    fields = {**DIMS, "batch": 8, "num_steps": 2, "eval_tokens": 2000, "target": 1.0, "data": str(tiny)}
    words = ", ".join(f"{key}={value!r}" for key, value in fields.items())
    script = root / "train_gpt_nanogpt.py"
    script.write_text(nanogpt.HERE.read_text().replace('"cpu": Config(),', f'"cpu": Config({words}),'))
    monkeypatch.setattr(nanogpt, "HERE", script)
    monkeypatch.setitem(nanogpt.CONFIGS, "cpu", nanogpt.Config(**fields))
    monkeypatch.setattr(sys, "argv", [script.name, "--seed=0", "--precision=fp32"])
    run_here(monkeypatch, root, ["--seed=0", "--track=cpu", "--precision=fp32"])
    path, = (root / "logs").iterdir()
    words = types.SimpleNamespace(logs=[path], baseline="nanoGPT's", data="a quick brown fox", name="NanoGPT", floor=[],
                                  device=None, eval_file=[f"{tiny}/val.bin"], note="nanoGPT's recipe\n\nIt is small.")
    folder = submit.submit(words, root)
    assert (folder / script.name).exists() and (folder / "0.log").exists()
    track = json.loads((folder.parent / "track.json").read_text())
    assert not track["baseline"]["reached"], "one trial is no record"
    assert track["eval_config"] == {"eval_tokens": 2000, "quality_tokens": 20000}
    assert track["eval_files"] == [f"{tiny}/val.bin"]


@pytest.mark.parametrize("argv, message", [
    (["--head_dim=24"], "--dim=64 is not a multiple of --head_dim=24"),
    (["--micro_batch=3"], "--micro_batch=3 does not divide a process's 8 rows"),
    (["--context=1"], "--context=1 is not a number from 2"),
    (["--dropout=1"], "--dropout=1 is not a number from 0 to 0.99"),
    (["--depth=0"], "--depth=0 is not a number from 1"),
    (["--lr=nan"], "--lr=nan is not a number from 0"),
    (["--draft=small.safetensors"], "there is no field --draft"),
    (["--window=64"], "there is no field --window"),
    (["--data=nowhere"], "no data in .*nowhere"),
])
def test_bad_arguments(tiny, tmp_path, monkeypatch, argv, message):
    root = make_root(tmp_path / "root")
    with pytest.raises(nanogpt.Fault, match=message):
        run_here(monkeypatch, root, [*SMALL, f"--data={tiny}", "--num_steps=10", *argv])
    assert not (root / "logs").exists(), "nothing has been started"


def test_help_shows_every_field(capsys, monkeypatch):
    monkeypatch.setattr(nanogpt, "keep_memory", lambda: None)  # it would be for good
    with pytest.raises(SystemExit):
        nanogpt.main(["--help"])
    out = capsys.readouterr().out
    for key in {**vars(nanogpt.Config()), **vars(nanogpt.Options())}:
        assert f"    {key}: " in out, key
