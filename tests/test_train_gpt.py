"""train_gpt.py: streams, masks, model, evaluation, sampling with cache and draft, whole runs on tiny data."""
import dataclasses
import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import leaderboard
import runs
import streams
import train_gpt
from train_gpt import Fault

ROOT = Path(__file__).resolve().parent.parent
DIMS = {"dim": 64, "head_dim": 32, "depth": 2, "window": 16, "orders": 3, "grams": 64}
SMALL = ["--track=cpu", *(f"--{key}={value}" for key, value in DIMS.items()), "--batch=8", "--context=32",
         "--eval_tokens=2000", "--eval_context=64", "--eval_stride=48", "--sample_tokens=20", "--precision=fp32"]
META = {"vocab": 256, "document_start": None, "encoding": "bytes"}
RAW = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}


def small_config(**fields):
    return dataclasses.replace(train_gpt.CONFIGS["cpu"], **{**DIMS, **RAW, **fields})


def small_model(meta=META, seed=0, **fields):
    """A small model in float32 whose predictions differ: what starts at zero is drawn at random."""
    torch.manual_seed(seed)
    model = train_gpt.GPT(small_config(**fields), meta)
    train_gpt.init_weights(model)
    for name, p in model.named_parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.5 if p.dim() > 1 else 0.2)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A byte stream with some structure in a folder of its own."""
    folder = tmp_path_factory.mktemp("tiny")
    text = b"the quick brown fox jumps over the lazy dog; " * 400
    streams.write_bin(folder / "train.bin", np.frombuffer(text, np.uint8))
    streams.write_bin(folder / "val.bin", np.frombuffer(text[7:7007], np.uint8))
    streams.finish(folder, {"name": "tiny"}, 256, document_start=None, encoding="bytes")
    return folder


make_root, run_here = functools.partial(runs.make_root, "gpt"), functools.partial(runs.run_here, "gpt")


# ------------------------------------------------------------------------------------------------------------
# Data

def test_loader(tiny):
    tokens, meta, digest = train_gpt.read_streams(small_config(data=str(tiny)))
    assert len(tokens) == 18000 and meta["vocab"] == 256 and len(digest) == 64
    loader, again, other = (train_gpt.Loader(torch.arange(5000), small_config(batch=4, context=32, seed=seed), "cpu")
                            for seed in (3, 3, 4))
    inputs, targets = loader()
    assert inputs.shape == targets.shape == (4, 32) and torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, again()[0]) and not torch.equal(inputs, other()[0])
    assert not torch.equal(inputs, loader()[0])


# ------------------------------------------------------------------------------------------------------------
# Masks and the model

def test_nothing_looks_ahead(model):
    tokens = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(0))
    before = model.logits(model(tokens, model.mask(tokens)))
    for place in (1, 20, 39):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % 256
        after = model.logits(model(changed, model.mask(changed)))
        assert torch.equal(before[:, :place], after[:, :place])
        assert not torch.allclose(before[:, place], after[:, place])


def test_window_and_documents():
    model = small_model({**META, "document_start": 255}, window=4)
    tokens = torch.zeros(1, 12, dtype=torch.long)
    tokens[0, [5, 9]] = 255
    mask = model.mask(tokens)[0, 0]
    document = [0] * 5 + [1] * 4 + [2] * 3
    expected = [[k <= q and q - k < 4 and document[q] == document[k] for k in range(12)] for q in range(12)]
    assert mask.tolist() == expected
    assert torch.equal(model.mask(tokens, 7)[0, 0], mask[7:]), "the rows from a place on"


@pytest.mark.parametrize("document_start", [250, None])
def test_block_mask_is_the_dense_mask(document_start):
    """Flex attention with the BlockMask against attend with the dense mask, forward; nothing is compiled twice."""
    model = small_model({**META, "document_start": document_start})
    rng, kept = torch.Generator().manual_seed(1), {}
    for i in range(3):
        tokens = torch.randint(256, (2, 256), generator=rng)
        dense = model.mask(tokens)
        documents = (tokens >= 250).cumsum(1) if document_start else torch.zeros_like(tokens[:1])
        with torch._dynamo.config.patch(error_on_recompile=i > 0), torch.no_grad():
            block = train_gpt.block_mask(model.may_see, documents, kept)
            q, k, v = (torch.randn(2, 2, 256, 32, generator=rng) for _ in range(3))
            found = train_gpt.attend(q, k, v, block)
        assert torch.allclose(train_gpt.attend(q, k, v, dense), found, atol=1e-5)
        assert not torch.allclose(train_gpt.attend(q, k, v, torch.ones_like(dense)), found, atol=1e-2)
    assert len(kept) == 1
    with torch.no_grad():  # as under autocast
        rough = train_gpt.attend(q, k, v.bfloat16(), block)
    assert rough.dtype == torch.bfloat16 and torch.allclose(rough.float(), found, atol=0.05)


def test_rotary_scores_depend_on_distance_alone():
    model, rng = small_model(), torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 32, generator=rng) for _ in range(2))
    turned = lambda x, place: train_gpt.rotate(x, model.turn(place, place + 1, "cpu"))
    score = lambda i, j: (turned(q, i) * turned(k, j)).sum().item()
    assert score(7, 3) == pytest.approx(score(107, 103), abs=1e-3) != pytest.approx(score(7, 4), abs=1e-3)
    assert turned(q, 50).norm().item() == pytest.approx(q.norm().item(), rel=1e-5)


def test_untrained_model_is_uniform():
    model = train_gpt.GPT(small_config(), META)
    train_gpt.init_weights(model)
    stream = torch.randint(256, (501,), generator=torch.Generator().manual_seed(0))
    config = small_config(eval_context=64, eval_stride=40)
    assert train_gpt.evaluate(model, stream, config, 0, 1) == pytest.approx(np.log(256), abs=1e-3)


def test_gpu_model_on_the_meta_device():
    config = train_gpt.CONFIGS["gpu"]
    with torch.device("meta"):
        model = train_gpt.GPT(config, {"vocab": 50257, "document_start": 50256})
        tokens = torch.zeros(2, 1024, dtype=torch.long)
        mask = model.mask(tokens)
        logits = model.logits(model(tokens, mask))
    assert logits.shape == (2, 1024, 50257) and mask.shape == (2, 1, 1024, 1024)
    hidden = sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)
    assert hidden == 12 * 12 * 768 ** 2


def test_every_parameter_has_one_optimizer(model):
    muon, adam = train_gpt.make_optimizers(model, small_config(), 0, 1, "fp32")
    taken = [p for params, _ in muon.stacks for p in params] + adam.param_groups[0]["params"]
    assert len(taken) == len({id(p) for p in taken}) == len(list(model.parameters()))
    assert all(p.dim() == 2 for params, _ in muon.stacks for p in params)


# ------------------------------------------------------------------------------------------------------------
# Evaluation

@pytest.mark.parametrize("context,stride,world", [(64, 64, 1), (64, 40, 1), (100, 7, 2), (5000, 5000, 1), (64, 1, 3)])
def test_evaluation_counts_every_token_once(monkeypatch, context, stride, world):
    """With the stream 0, 1, 2 ... a token is its own place: sums of squares tell a double from a missing one."""
    seen = []

    def spy(model, tokens, targets):
        assert torch.equal(targets, tokens + 1) and (tokens.diff(dim=1) == 1).all()
        seen.append(tokens.shape[1])
        return targets.double() ** 2

    monkeypatch.setattr(train_gpt, "token_nats", spy)
    monkeypatch.setattr(train_gpt.dist, "all_reduce", lambda total: None)
    config = small_config(eval_context=context, eval_stride=stride, eval_batch=3)
    parts = [train_gpt.evaluate(None, torch.arange(1001), config, rank, world) for rank in range(world)]
    assert sum(parts) == pytest.approx(sum(i * i for i in range(1, 1001)) / 1000)
    assert max(seen) <= context


def test_evaluation_against_a_plain_loop(model):
    stream = torch.randint(256, (151,), generator=torch.Generator().manual_seed(0))
    config = small_config(eval_context=60, eval_stride=25)
    total = 0.0
    for i in range(150):  # the window that first holds input i ends at 60, 85, 110, 135 or 150
        end = next(e for e in (60, 85, 110, 135, 150) if i < e)
        window = stream[None, end - 60:end]
        logits = model.logits(model(window, model.mask(window)))[0, i - (end - 60)]
        total -= logits.log_softmax(-1)[stream[i + 1]].item()
    assert train_gpt.evaluate(model, stream, config, 0, 1) == pytest.approx(total / 150, abs=1e-5)


# ------------------------------------------------------------------------------------------------------------
# Sampling

def test_probabilities():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    p = train_gpt.probabilities(logits, small_config())
    assert torch.allclose(p, logits.softmax(-1))
    assert torch.allclose(train_gpt.probabilities(logits, small_config(temperature=0.5)), (2 * logits).softmax(-1))
    assert train_gpt.probabilities(logits, small_config(temperature=0.0)).tolist() == [[1, 0, 0, 0]]
    two = torch.tensor([[2.0, 1.0]]).softmax(-1)
    assert torch.allclose(train_gpt.probabilities(logits, small_config(top_k=2))[:, :2], two)
    assert train_gpt.probabilities(logits, small_config(top_k=2))[0, 2:].tolist() == [0, 0]
    # 0.644 and 0.237 are the two likeliest: 0.7 needs both, 0.6 the first alone
    assert (train_gpt.probabilities(logits, small_config(top_p=0.7)) > 0).tolist() == [[True, True, False, False]]
    assert (train_gpt.probabilities(logits, small_config(top_p=0.6)) > 0).tolist() == [[True, False, False, False]]


@pytest.mark.parametrize("documents", [False, True])
def test_cache_gives_the_same_tokens(documents):
    model = small_model({**META, "document_start": 200 if documents else None})
    start = torch.randint(256, (3, 5), generator=torch.Generator().manual_seed(0))
    config = small_config(temperature=0.0, sample_tokens=40)  # beyond the window of 16
    cached, plain = (torch.cat(list(train_gpt.generate(model, start, config, cached=c)), 1) for c in (True, False))
    assert torch.equal(cached, plain) and cached.shape == (3, 40)
    assert len(set(cached.flatten().tolist())) > 5, "a model that repeats itself proves nothing"


def test_cache_reads_every_token_once(model, monkeypatch):
    places = []
    plain = train_gpt.GPT.forward
    monkeypatch.setattr(train_gpt.GPT, "forward", lambda self, tokens, mask, start=0, memories=None:
                        places.append(tokens.shape[1] - start) or plain(self, tokens, mask, start, memories))
    list(train_gpt.generate(model, torch.zeros(1, 7, dtype=torch.long), small_config(sample_tokens=5)))
    assert places == [7, 1, 1, 1, 1]


@pytest.mark.parametrize("ahead", [1, 4])
def test_speculation_is_exact_when_greedy(model, ahead):
    config = small_config(temperature=0.0, sample_tokens=50, ahead=ahead)
    start, draft = torch.tensor([[10, 65, 66]]), small_model(seed=1, dim=32, depth=1)
    plain = torch.cat(list(train_gpt.generate(model, start, config)), 1)
    for guesser, most in ((draft, 50), (model, -(-50 // (ahead + 1)))):  # its own draft is always right
        runs = list(train_gpt.speculate(model, guesser, start, config))
        assert torch.equal(torch.cat(runs, 1), plain) and len(runs) <= most


def test_speculation_follows_the_distribution(model):
    """The second and third token of many speculative draws against the model's own probabilities, a chi-square each."""
    draft = small_model(seed=1, dim=32, depth=1)
    config = small_config(sample_tokens=2, ahead=2, top_k=4, temperature=0.7)
    start = torch.tensor([[10, 65, 66]])
    logits = lambda tokens: model.logits(model(tokens, model.mask(tokens)))[0, -1]
    exact = {}
    with torch.no_grad():
        for a, p in enumerate(train_gpt.probabilities(logits(start)[None], config)[0].tolist()):
            if p > 0:
                after = train_gpt.probabilities(logits(torch.cat([start, torch.tensor([[a]])], 1))[None], config)[0]
                exact.update({(a, b): p * q for b, q in enumerate(after.tolist()) if q > 0})
    n, counts = 600, dict.fromkeys(exact, 0)
    for seed in range(n):
        a, b = torch.cat(list(train_gpt.speculate(model, draft, start, config, seed)), 1)[0].tolist()
        counts[a, b] += 1
    chi = sum((counts[pair] - n * p) ** 2 / (n * p) for pair, p in exact.items())
    assert chi < len(exact) - 1 + 4 * (2 * (len(exact) - 1)) ** 0.5, (chi, len(exact))


# ------------------------------------------------------------------------------------------------------------
# Whole runs

@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A finished run that saved its weights: its folder and its log."""
    root = make_root(tmp_path_factory.mktemp("run") / "root")
    with pytest.MonkeyPatch.context() as patch:
        argv = [*SMALL, f"--data={tiny}", "--num_steps=40", "--eval_every=20", "--save=true"]
        run_here(patch, root, argv, samples=True)
    log, = (root / "logs").iterdir()
    return root, leaderboard.parse_log(log)


def test_run(finished):
    root, log = finished
    assert log["footer"]["val_loss"] < 2.0 and [step for step, _, _ in log["steps"]] == [20, 40]
    assert log["footer"]["tokens"] == 40 * 8 * 32 and log["footer"]["task"] == "gpt"
    assert set(leaderboard.FOOTER_KEYS) <= set(log["footer"])
    assert len((root / "samples/gpt.txt").read_bytes()) == 21, "the prompt and 20 bytes"
    line, = (root / "records/runs.jsonl").read_text().splitlines()
    assert json.loads(line)["val_loss"] == log["footer"]["val_loss"]


def test_load_and_draft(finished, tiny, monkeypatch, tmp_path, capsys):
    weights, = (finished[0] / "checkpoints").iterdir()
    root = make_root(tmp_path / "again")
    argv = [*SMALL, f"--data={tiny}", "--num_steps=0", f"--load={weights}", f"--draft={weights}", "--temperature=0"]
    run_here(monkeypatch, root, argv, samples=True)
    log, = (root / "logs").iterdir()
    footer = leaderboard.parse_log(log)["footer"]
    assert footer["val_loss"] == pytest.approx(finished[1]["footer"]["val_loss"], abs=0.02), "half precision"
    assert footer["tokens_per_check"] == pytest.approx(5.0), "a model that drafts for itself is never refused"
    assert footer["sampled_per_second"] > 0 and footer["speculated_per_second"] > 0


@pytest.mark.parametrize("argv,message", [
    (["--data=nowhere"], "make it with `python data/nowhere.py`"),
    (["--data=scenes"], "python data/scenes.py --objects"),
    (["--num_steps=-1"], "num_steps must be at least 0"),
    (["--head_dim=24"], "not a multiple of head_dim"),
    (["--eval_stride=65"], "eval_stride must be"),
    (["--eval_tokens=999999"], "is more than the"),
    (["--draft=none.safetensors", "--num_steps=0"], "is not a checkpoint of this script"),
    (["--windows=3"], "unknown override"),
])
def test_bad_arguments(tiny, monkeypatch, tmp_path, argv, message):
    root = tmp_path / "root"
    (root / "data").mkdir(parents=True)
    (root / "data/streams.py").write_text("")
    with pytest.raises(Fault, match="(?s).*" + message):
        run_here(monkeypatch, root, [*SMALL, f"--data={tiny}", *argv], samples=True)  # a draft is read for those


@pytest.mark.parametrize("damage", ["cut", "foreign", "vocabulary"])
def test_damaged_streams(tiny, monkeypatch, tmp_path, damage):
    folder = shutil.copytree(tiny, tmp_path / "data")
    path = folder / "train.bin"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "foreign":
        path.write_bytes(b"\x93NUMPY" + path.read_bytes())
    else:
        streams.write_bin(path, np.full(1000, 300))
    with pytest.raises(Fault, match="is damaged .*delete it and run"):
        run_here(monkeypatch, tmp_path / "root", [*SMALL, f"--data={folder}"])
    assert not (tmp_path / "root").exists()


def test_a_batch_in_parts_is_the_same_run(tiny, tmp_path, monkeypatch):
    losses = []
    for rows in (8, 2):
        root = make_root(tmp_path / str(rows))
        run_here(monkeypatch, root, [*SMALL, f"--data={tiny}", "--num_steps=4", f"--rows={rows}"])
        losses.append(json.loads((root / "records/runs.jsonl").read_text())["val_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and losses[0] < np.log(256) - 0.5
    with pytest.raises(Fault, match="3 rows at a time do not divide a process's 8 rows"):
        run_here(monkeypatch, tmp_path / "2", [*SMALL, f"--data={tiny}", "--rows=3"])


def test_two_processes_are_the_same_run(tiny, tmp_path):
    argv = [*SMALL, f"--data={tiny}", "--num_steps=20", "--eval_every=10"]
    runs.assert_same_on_two_processes("gpt", argv, tmp_path)
