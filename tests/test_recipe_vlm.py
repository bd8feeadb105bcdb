"""baselines/train_vlm_nanovlm.py: nanoVLM's recipe, its blocks against plain equations, and whole runs on tiny data."""
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
import show_vlm
import submit
import tokenizer
import train_vlm
from kv_cache import KVCache

ROOT = Path(__file__).resolve().parent.parent
nanovlm = show.load_script(ROOT / "baselines" / "train_vlm_nanovlm.py")
generate, Options = nanovlm.generate, nanovlm.Options
VOCAB = tokenizer.TEXT_VOCAB
DIMS = {"vit_dim": 32, "vit_depth": 2, "vit_heads": 2, "vit_mlp": 64, "lm_dim": 32, "lm_depth": 2, "lm_heads": 4,
        "lm_kv_heads": 2, "lm_mlp": 48}
SMALL = ["--track=cpu", *(f"--{key}={value}" for key, value in DIMS.items()), "--batch=8", "--samples=2",
         "--quality_pictures=4", "--max_tokens=4", "--precision=fp32"]
run_here = functools.partial(runs.run_here, "vlm_nanovlm")


def make_model(**fields):
    torch.manual_seed(0)
    config = dataclasses.replace(nanovlm.CONFIGS["cpu"], **fields)
    model = nanovlm.VLM(config, VOCAB)
    nanovlm.init_weights(model, config)
    return model


def make_random(**fields):
    """A small model in float32 whose predictions differ: nothing of it is at a neutral value."""
    model = make_model(**DIMS | fields)
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.3)
        else:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return model


def fake_run(rank=0, world=1):
    """What train_step reads of a Run."""
    run = runs.fake_run(rank, world)
    run.slice = functools.partial(nanovlm.Run.slice, run)
    run.autocast = functools.partial(nanovlm.Run.autocast, run)
    return run


@pytest.fixture(scope="module")
def model():
    return make_random()


@pytest.fixture(scope="module")
def frozen():
    return nanovlm.read_frozen(nanovlm.CONFIGS["cpu"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with 200 training conversations and 60 for validation, and the fields that point there."""
    folder = tmp_path_factory.mktemp("tiny")
    with np.load(ROOT / "data/frozen/qa64.npz") as arrays:
        parts, about = {m: arrays[m] for m in ("pixels", "qa", "answer", "family")}, arrays["modalities"]
    (folder / "train").mkdir()
    for m, rows in parts.items():
        np.save(folder / "train" / f"{m}.npy", rows[:200])
    (folder / "train/meta.json").write_text(json.dumps({"num": 200, "modalities": json.loads(bytes(about))}))
    np.savez(folder / "val.npz", modalities=about, **{m: rows[:60] for m, rows in parts.items()})
    return {"data": f"{folder}/train", "frozen": f"{folder}/val.npz"}


def make_root(folder):
    folder.mkdir()
    (folder / "data").symlink_to(ROOT / "data")
    return folder


def arguments(fields):
    return [f"--{key}={value}" for key, value in fields.items()]


# ------------------------------------------------------------------------------------------------------------
# The recipe

def test_nanovlms_numbers():
    for config in nanovlm.CONFIGS.values():
        assert (config.backbone_lr, config.projector_lr, config.weight_decay, config.clip) == (5e-4, 1e-3, 0.01, 1.0)
        assert (config.warmup, config.lr_min, config.shuffle, config.rope_theta) == (0.03, 0.1, 2, 1e5)
        assert (config.init_std, config.init_by_width) == (0.02, config.track == "cpu")
        assert config.vit_mlp == 4 * config.vit_dim
    cpu, gpu = (nanovlm.CONFIGS[track] for track in ("cpu", "gpu"))
    assert cpu.vit_dim // cpu.vit_heads == cpu.lm_dim // cpu.lm_heads == 32
    assert gpu.vit_dim // gpu.vit_heads == gpu.lm_dim // gpu.lm_heads == 64
    assert [dataclasses.replace(cpu, shuffle=n).image_tokens for n in (1, 2, 4)] == [64, 16, 4]
    with torch.device("meta"):
        model = nanovlm.VLM(gpu, VOCAB)
        states = model(torch.empty(2, 3, 64, 64, dtype=torch.uint8), torch.zeros(2, 120, dtype=torch.long))
    assert model.image_tokens == 64 and states.shape == (2, 120, 512)
    block = 2 * 512 ** 2 + 2 * 512 * 256 + 3 * 512 * 1408 + 2 * 512  # queries and output, keys and values, MLP, norms
    assert sum(p.numel() for p in model.lm.parameters()) == 8 * block + VOCAB * 512 + 512, "the head is tied"


@pytest.mark.parametrize("num_steps", [1000, 5000])
def test_schedule(num_steps):
    """1 / warm, 2 / warm .. of the peak, all of it at the end of the warm-up, then a cosine to a tenth."""
    config = dataclasses.replace(nanovlm.CONFIGS["cpu"], num_steps=num_steps)
    rates = [nanovlm.learning_rate(step, 2.0, config) for step in range(num_steps + 1)]
    warm = 3 * num_steps // 100
    assert rates[:warm] == pytest.approx(2 * np.arange(1, warm + 1) / warm)
    progress = np.linspace(0, 1, num_steps - warm + 1)
    assert rates[warm:] == pytest.approx(0.2 + 0.9 * (1 + np.cos(np.pi * progress)))
    assert rates[warm - 1] == rates[warm] == pytest.approx(2) and rates[-1] == pytest.approx(0.2)


def test_optimizer(model):
    adam = nanovlm.make_optimizer(model, nanovlm.CONFIGS["cpu"])
    backbones, projector = adam.param_groups
    assert type(adam) is torch.optim.AdamW and (backbones["peak"], projector["peak"]) == (5e-4, 1e-3)
    for group in adam.param_groups:
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-8, 0.01)
    assert [id(p) for p in projector["params"]] == [id(model.project.weight)]
    taken = [id(p) for group in adam.param_groups for p in group["params"]]
    assert len(taken) == len(set(taken)) == len(list(model.parameters()))


def test_rates_of_a_step(frozen):
    """Adam's first step moves what has a gradient by the rate of its group, here at the end of the warm-up."""
    model = make_random()
    config = dataclasses.replace(nanovlm.CONFIGS["cpu"], batch=4, num_steps=100, **DIMS)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adam = nanovlm.make_optimizer(model, config)
    nanovlm.train_step(2, [part[:4] for part in frozen[:3]], model, adam, config, fake_run())
    for name, p in model.named_parameters():
        if name.endswith("k_proj.bias"):
            continue  # no softmax depends on it
        moved = (p - before[name]).abs().max().item()
        assert moved == pytest.approx(1e-3 if name == "project.weight" else 5e-4, rel=0.05), name


@pytest.mark.parametrize("by_width", [False, True])
def test_start(by_width):
    """Normal weights of 0.02, or of the width to the power of -0.5; norms of 1, biases of 0, positions from 0 to 1."""
    model = make_model(vit_dim=64, init_by_width=by_width)
    names = dict(model.named_parameters())
    for name, p in names.items():
        if name.endswith("bias"):
            assert name.startswith("vit") and not p.any(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        elif name == "vit.position_embedding.weight":
            assert 0 <= p.min() < 0.01 and 0.99 < p.max() <= 1
        else:
            width = 64 if name.startswith("vit") else 128
            std = width ** -0.5 if by_width else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.06) and abs(p.mean()) < std / 8, name
    assert {"vit.layers.0.q_proj.bias", "vit.layers.0.fc2.bias", "vit.patch_embedding.bias"} <= names.keys()


def test_loss_is_nanovlms(model, frozen):
    """The mean over labels that are -100 wherever no answer token comes next, of all logits; its gradients, too."""
    pixels, tokens, answer = (part[:6] for part in frozen[:3])
    nats = nanovlm.answer_nats(model, pixels, tokens, answer)
    assert nats.shape == ((answer > 0).sum(),)
    labels = tokens.masked_fill(answer == 0, -100)
    row = F.pad(tokens, (16, 0), value=nanovlm.IMAGE)
    logits = model.lm.logits(model.lm(model.embed(row, pixels)))[:, 16:]
    plain = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert nats.mean().item() == pytest.approx(plain.item(), rel=1e-5)
    for ours, expected in zip(*(torch.autograd.grad(loss, list(model.parameters())) for loss in (nats.mean(), plain))):
        assert torch.allclose(ours, expected, rtol=1e-3, atol=1e-5)


def test_ranks_share_the_work(frozen, monkeypatch):
    """The ranks' losses and gradients add up to the whole batch's, whose answers are not equally many."""
    model, batch = make_random(), [part[:8] for part in frozen[:3]]
    counts = [(part > 0).sum().item() for part in batch[2].chunk(2)]
    assert counts[0] != counts[1]
    config = dataclasses.replace(nanovlm.CONFIGS["cpu"], batch=8, clip=math.inf, **DIMS)
    gradients, losses = [], []
    monkeypatch.setattr(nanovlm, "sum_gradients", lambda *_: gradients.append(model.project.weight.grad.clone()))
    adam = types.SimpleNamespace(step=lambda: None, zero_grad=lambda **_: model.zero_grad(), param_groups=[])
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        losses.append(nanovlm.train_step(0, batch, model, adam, config, fake_run(rank, world)).item())
    assert losses[0] == pytest.approx(sum(losses[1:]), rel=1e-5)
    assert torch.allclose(gradients[0], gradients[1] + gradients[2], rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------
# The model against plain equations

def plain_layer_norm(x, module):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.weight + module.bias


def plain_rms_norm(x, module):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.weight


def plain_linear(x, module):
    y = x @ module.weight.T
    return y if module.bias is None else y + module.bias


def plain_vit(vit, pictures, patch, heads):
    """SigLIP's equations, patch by patch and head by head."""
    side, D = pictures.size(-1), vit.post_layernorm.weight.numel() // heads
    corners = [(row, column) for row in range(0, side, patch) for column in range(0, side, patch)]
    patches = torch.stack([pictures[:, :, row:row + patch, column:column + patch].flatten(1)
                           for row, column in corners], 1)  # (n, patches, 3 * patch * patch)
    x = patches @ vit.patch_embedding.weight.flatten(1).T + vit.patch_embedding.bias + vit.position_embedding.weight
    for layer in vit.layers:
        y = plain_layer_norm(x, layer.layer_norm1)
        q, k, v = (plain_linear(y, module) for module in (layer.q_proj, layer.k_proj, layer.v_proj))
        found = []
        for head in range(heads):
            own = slice(head * D, (head + 1) * D)
            scores = q[..., own] @ k[..., own].mT / D ** 0.5
            found.append(scores.softmax(-1) @ v[..., own])
        x = x + plain_linear(torch.cat(found, -1), layer.o_proj)
        y = plain_linear(plain_layer_norm(x, layer.layer_norm2), layer.fc1)
        y = 0.5 * y * (1 + torch.tanh((2 / math.pi) ** 0.5 * (y + 0.044715 * y ** 3)))
        x = x + plain_linear(y, layer.fc2)
    return plain_layer_norm(x, vit.post_layernorm)


def plain_llama(lm, x, theta, heads, kv_heads):
    """Llama's equations, head by head; a position turns pairs of channels as complex numbers."""
    T, D = x.size(1), x.size(2) // heads
    angles = torch.arange(T)[:, None] * theta ** (-2 * torch.arange(D // 2) / D)
    turn = torch.polar(torch.ones_like(angles), angles)  # (T, D / 2)
    future = torch.full((T, T), -math.inf).triu(1)

    def turned(part):
        z = torch.complex(part[..., :D // 2], part[..., D // 2:]) * turn
        return torch.cat([z.real, z.imag], -1)

    for layer in lm.layers:
        y = plain_rms_norm(x, layer.input_layernorm)
        q, k, v = (plain_linear(y, module) for module in (layer.q_proj, layer.k_proj, layer.v_proj))
        found = []
        for head in range(heads):
            group = head // (heads // kv_heads)
            own, shared = slice(head * D, (head + 1) * D), slice(group * D, (group + 1) * D)
            scores = turned(q[..., own]) @ turned(k[..., shared]).mT / D ** 0.5 + future
            found.append(scores.softmax(-1) @ v[..., shared])
        x = x + plain_linear(torch.cat(found, -1), layer.o_proj)
        y = plain_rms_norm(x, layer.post_attention_layernorm)
        gate = plain_linear(y, layer.gate_proj)
        x = x + plain_linear(gate * gate.sigmoid() * plain_linear(y, layer.up_proj), layer.down_proj)
    return plain_rms_norm(x, lm.norm)


def test_vision_encoder_against_plain_equations(model):
    pictures = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = plain_vit(model.vit, pictures, 8, DIMS["vit_heads"])
        assert expected.std() > 0.1 and torch.allclose(model.vit(pictures), expected, atol=5e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_language_model_against_plain_equations(kv_heads):
    model = make_random(lm_kv_heads=kv_heads)
    x = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = plain_llama(model.lm, x, 1e5, 4, kv_heads)
        assert expected.std() > 0.1 and torch.allclose(model.lm(x), expected, atol=5e-5)
        assert torch.allclose(model.lm.logits(expected), expected @ model.lm.embed_tokens.weight.T, atol=1e-5)


@pytest.mark.parametrize("shuffle", [1, 2, 4])
def test_pixel_shuffle_against_explicit_indices(shuffle, monkeypatch):
    """Token (row, column) of a picture is of the patches of a square; the encoder is given pixels from -1 to 1."""
    model, given = make_random(shuffle=shuffle), []
    states = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0))

    def encode(pictures):
        given.append(pictures)
        return states

    monkeypatch.setattr(model.vit, "forward", encode)
    pixels = torch.arange(256, dtype=torch.uint8).repeat(2, 3, 64, 1)[..., ::4]
    with torch.no_grad():
        tokens = model.encode_images(pixels)
    assert torch.allclose(given[0], pixels / 255 * 2 - 1, atol=1e-6) and given[0].min() == -1
    across = 8 // shuffle
    assert tokens.shape == (2, across ** 2, 32)
    for row in range(across):
        for column in range(across):
            square = [states[:, (row * shuffle + i) * 8 + column * shuffle + j]
                      for i in range(shuffle) for j in range(shuffle)]
            channels = torch.stack(square, -1).flatten(1)  # a channel of all patches, then the next one
            expected = channels @ model.project.weight.T
            assert torch.allclose(tokens[:, row * across + column], expected, atol=1e-5)


def test_pictures_of_another_size(model):
    """A flat picture stays what it is when it is resized."""
    pixels = torch.tensor([200, 100, 50], dtype=torch.uint8)[None, :, None, None]
    with torch.no_grad():
        small, same = (model.encode_images(pixels.expand(1, 3, side, side)) for side in (48, 64))
    assert torch.allclose(small, same, atol=1e-3)


def test_a_place_sees_what_is_before_it(model, frozen):
    pixels, tokens = (part[:4] for part in frozen[:2])
    with torch.no_grad():
        logs = model.log_probs(pixels, tokens)
        assert logs.shape == (4, 120, VOCAB) and logs.dtype == torch.float32
        assert torch.allclose(logs.exp().sum(-1), torch.ones(4, 120), atol=1e-4)
        for place in (0, 7, 60, 118):
            changed = tokens.clone()
            changed[:, place] = (changed[:, place] + 7) % VOCAB
            other = model.log_probs(pixels, changed)
            assert torch.equal(logs[:, :place + 1], other[:, :place + 1])
            assert not torch.allclose(logs[:, place + 1], other[:, place + 1], atol=1e-2)
        assert not torch.allclose(logs[:, 0], model.log_probs(255 - pixels, tokens)[:, 0], atol=1e-2)


def test_padding_changes_nothing(model, frozen):
    """Neither what stands there nor whether anything does."""
    pixels, tokens, answer = (part[:8] for part in frozen[:3])
    padding = tokens == frozen[4]["pad"]
    lengths = (~padding).sum(1).tolist()
    assert min(lengths) < max(lengths)
    with torch.no_grad():
        nats = nanovlm.answer_nats(model, pixels, tokens, answer)
        assert torch.equal(nats, nanovlm.answer_nats(model, pixels, tokens.masked_fill(padding, 3), answer))
        alone = [nanovlm.answer_nats(model, pixels[i:i + 1], tokens[i:i + 1, :length], answer[i:i + 1, :length])
                 for i, length in enumerate(lengths)]
    assert torch.allclose(nats, torch.cat(alone), atol=1e-4)


# ------------------------------------------------------------------------------------------------------------
# The model as the evaluation and the samples use it

def test_evaluation_accepts_it(model, frozen):
    parts = [part[:20].clone() for part in frozen[:4]]
    loss, numbers = nanovlm.evaluate(model, *parts, VOCAB, 0, 1)
    pixels, tokens, answer, family = parts
    with torch.no_grad():
        nats = -model.log_probs(pixels, tokens).gather(2, tokens[..., None])[..., 0]
        marked = nanovlm.answer_nats(model, pixels, tokens, answer)
    assert torch.allclose(nats[answer > 0], marked, atol=1e-4), "the evaluation's tokens are those that are trained on"
    halves = {"questions": [], "describe": []}
    for row in range(20):
        for place in answer[row].nonzero()[:, 0].tolist():
            kind = family[row, answer[row, place].item() - 1]
            halves["describe" if kind == 6 else "questions"].append(nats[row, place].item())
    assert loss == pytest.approx(np.mean([np.mean(half) for half in halves.values()]), rel=1e-4)
    assert numbers["eval_targets"] == sum(map(len, halves.values()))


def test_the_cache_changes_nothing(model, frozen):
    options = Options(max_tokens=20)
    said = set()
    for picture, row, marks in zip(frozen[0][:8], frozen[1][:8].tolist(), frozen[2][:8].tolist()):
        question = row[:marks.index(1)]
        made = [generate(model, picture, question, 3, options, cache=cache) for cache in (KVCache(), None)]
        assert made[0] == made[1] and 3 not in made[0]
        said.add(tuple(made[0]))
    assert len(said) > 3, "answers differ from picture to picture"


def test_sampling(model, frozen):
    """Seeds differ, the cache does not matter, one token to draw from is the likeliest, and it ends where it should."""
    picture, question = frozen[0][0], frozen[1][0].tolist()[:frozen[2][0].tolist().index(1)]
    hot = Options(max_tokens=20, temperature=1.0, top_k=50, top_p=0.9)
    drawn = [generate(model, picture, question, None, hot, seed, cache)
             for seed in (0, 1) for cache in (KVCache(), None)]
    assert drawn[0] == drawn[1] != drawn[2] == drawn[3] and len(drawn[0]) == len(drawn[2]) == 20
    greedy = generate(model, picture, question, None, Options(max_tokens=20))
    assert generate(model, picture, question, None, dataclasses.replace(hot, top_k=1)) == greedy
    stop = greedy[5]
    assert generate(model, picture, question, stop, Options(max_tokens=20)) == greedy[:greedy.index(stop)]


def test_generation_is_what_evaluation_sees(model, frozen):
    for picture, row, marks in zip(*(part[:6] for part in frozen[:3])):
        first = (marks == 1).nonzero()[0, 0].item()
        with torch.no_grad():
            likeliest = model.log_probs(picture[None], row[None])[0, first].argmax().item()
        assert generate(model, picture, row[:first].tolist(), None, Options(max_tokens=1)) == [likeliest]


def test_descriptions_are_what_it_says(model, frozen):
    """data/show_vlm.py describes several pictures at once, with the script's cache."""
    run = types.SimpleNamespace(options=Options(samples=0, quality_pictures=3))
    shown = show_vlm.Show(nanovlm, run, frozen[:4], None)
    question = shown.codec.question(show_vlm.DESCRIBE)
    options = Options(max_tokens=show_vlm.DESCRIBE_TOKENS)
    answers = [generate(model, picture, question, shown.codec.stop, options) for picture in frozen[0][:3]]
    assert shown.describe(model, frozen[0][:3]) == [shown.codec.decode(answer) for answer in answers]


# ------------------------------------------------------------------------------------------------------------
# Whole runs

def test_same_stopwatch_and_evaluation_as_the_fast_script():
    fast, slow = (Path(module.__file__).read_text() for module in (train_vlm, nanovlm))
    for names in rules.STOP_WATCH, rules.FROZEN, ["copied: masks"]:
        assert rules.block_sha256(slow, names) == rules.block_sha256(fast, names)
    assert not rules.redefined(slow, rules.STOP_WATCH + rules.FROZEN)


def test_same_evaluation_fields_as_the_fast_script():
    fast, slow = (vars(module.CONFIGS["cpu"]) | vars(module.Options()) for module in (train_vlm, nanovlm))
    for key in ("track", "data", "frozen", "quality_pictures", "max_tokens", "temperature"):
        assert slow[key] == fast[key]


def test_run(tiny, tmp_path, monkeypatch):
    """It learns, and its log ends with what it says of pictures; its weights are the same model again."""
    root = make_root(tmp_path / "root")
    argv = [*SMALL, *arguments(tiny), "--backbone_lr=0.003", "--projector_lr=0.003"]
    run_here(monkeypatch, root, [*argv, "--num_steps=45", "--eval_every=15", "--save=true"], samples=True)
    path, = (root / "logs").iterdir()
    log = rules.parse_log(path)
    losses = [loss for _, _, loss in log["steps"]]
    assert losses == sorted(losses, reverse=True) and losses[-1] < math.log(VOCAB) - 1
    foot = log["footer"]
    assert foot["tokens"] == 45 * 8 * (16 + 120) and foot["pictures"] == 45 * 8
    assert foot["script"] == "train_vlm_nanovlm.py" and foot["recompiles"] == 0
    assert 0 <= foot["quality_describe_f1"] <= 1 and foot["sampled_per_second"] > 0
    weights, = (root / "checkpoints").iterdir()
    assert {p.name for p in (root / "samples" / weights.stem).iterdir()} == {"vlm.png"}
    again = make_root(tmp_path / "again")
    run_here(monkeypatch, again, ["--track=cpu", *arguments(tiny), "--num_steps=0", f"--load={weights}"])
    assert runs.footers(again)[0]["val_loss"] == pytest.approx(foot["val_loss"], abs=0.02)


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
    (root / "train_vlm.py").write_text((ROOT / "train_vlm.py").read_text())
    fields = {**DIMS, "batch": 8, "num_steps": 2, "target": 9.0, "data": tiny["data"]}
    words = ", ".join(f"{key}={value!r}" for key, value in fields.items())
    script = root / "train_vlm_nanovlm.py"
    script.write_text(nanovlm.HERE.read_text().replace('"cpu": Config(),', f'"cpu": Config({words}),'))
    monkeypatch.setattr(nanovlm, "HERE", script)
    monkeypatch.setitem(nanovlm.CONFIGS, "cpu", nanovlm.Config(**fields))
    monkeypatch.setattr(sys, "argv", [script.name, "--seed=0", "--precision=fp32"])
    run_here(monkeypatch, root, ["--seed=0", "--track=cpu", "--precision=fp32"])
    path, = (root / "logs").iterdir()
    words = types.SimpleNamespace(logs=[path], baseline="nanoVLM's", data="some questions", name="NanoVlm",
                                  floor=["quality_describe_f1>=0.9"], device=None, eval_file=[],
                                  note="nanoVLM from scratch\n\nIt is small.")
    folder = submit.submit(words, root)
    assert (folder / script.name).exists() and (folder / "0.log").exists()
    track = json.loads((folder.parent / "track.json").read_text())
    assert not track["baseline"]["reached"], "one trial is no record"
    assert track["eval_files"] == ["data/frozen/qa64.npz"]


@pytest.mark.parametrize("argv,message", [
    (["--shuffle=3"], "--shuffle=3 patches of --patch=8 pixels do not tile pictures of --side=64"),
    (["--vit_heads=3"], "--vit_dim=32 is not a multiple of --vit_heads=3"),
    (["--lm_heads=3"], "--lm_dim=32 is not a multiple of twice --lm_heads=3"),
    (["--lm_kv_heads=3"], "--lm_heads=4 is not a multiple of --lm_kv_heads=3"),
    (["--batch=201"], "more than the 200 training conversations there are"),
    (["--data=nowhere"], "python data/scenes.py --qa"),
    (["--vit=google/siglip-base-patch16-224"], "there is no field --vit"),
    (["--warmup=2"], "is not a number from 0 to 1"),
    (["--backbone_lr=-1"], "is not a number from 0 to inf"),
])
def test_bad_arguments(tiny, monkeypatch, tmp_path, argv, message):
    root = make_root(tmp_path / "root")
    with pytest.raises(nanovlm.Fault, match=message):
        run_here(monkeypatch, root, [*SMALL, *arguments(tiny), "--num_steps=10", *argv])
    assert not (root / "logs").exists(), "nothing has been started"
