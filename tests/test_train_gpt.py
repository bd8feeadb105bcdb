"""train_gpt.py: options, streams, masks, model, evaluation, sampling with cache and draft, whole runs on tiny data."""
import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

import rules
import runs
import show_gpt
import speculate
import streams
import train_gpt
from kv_cache import KVCache
from train_gpt import Fault

ROOT = Path(__file__).resolve().parent.parent
DIMS = {"dim": 64, "head_dim": 32, "depth": 2, "window": 16, "orders": 3, "grams": 64}
SMALL = ["--track=cpu", *(f"--{key}={value}" for key, value in DIMS.items()), "--batch=8", "--context=32",
         "--eval_tokens=2000", "--sample_tokens=20", "--quality_tokens=0", "--precision=fp32"]
META = {"vocab": 256, "document_start": None, "encoding": "bytes"}


def small_config(**fields):
    return dataclasses.replace(train_gpt.CONFIGS["cpu"], **{**DIMS, **fields})


def sampling(**fields):
    """Options that draw from the model's own distribution."""
    return train_gpt.Options(**{"temperature": 1.0, **fields})


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
    shards, meta, digest = train_gpt.read_streams(small_config(data=str(tiny)))
    assert [len(shard) for shard in shards] == [18000] and meta["vocab"] == 256
    assert digest == hashlib.sha256((tiny / "train.bin").read_bytes()[1024:]).hexdigest()
    shards = [np.arange(3000, dtype=np.uint16), np.arange(3000, 5000, dtype=np.uint16)]
    loader, again, other = (train_gpt.Loader(shards, small_config(batch=4, context=32, seed=seed), "cpu")
                            for seed in (3, 3, 4))
    inputs, targets = loader()
    assert inputs.shape == targets.shape == (4, 32) and torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, again()[0]) and not torch.equal(inputs, other()[0])
    assert not torch.equal(inputs, loader()[0])
    other.load_state_dict(loader.state_dict())
    assert torch.equal(loader()[0], other()[0])


# ------------------------------------------------------------------------------------------------------------
# Masks and the model

def test_nothing_looks_ahead(model):
    tokens = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(0))
    before = model.head.log_probs(model(tokens, model.mask(tokens)))
    for place in (1, 20, 39):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % 256
        after = model.head.log_probs(model(changed, model.mask(changed)))
        assert torch.equal(before[:, :place], after[:, :place])
        assert not torch.allclose(before[:, place], after[:, place])


def test_loss_is_of_both_heads(model):
    """Of the next token, and of the one after it half as much."""
    rng = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(256, (2, 12), generator=rng) for _ in range(2))
    with torch.no_grad():
        y = model(tokens, model.mask(tokens))
        first, second = (head.log_probs(y) for head in (model.head, model.head_second))
        expected = -sum(first[b, t, targets[b, t]].item() for b in range(2) for t in range(12))
        expected -= 0.5 * sum(second[b, t, targets[b, t + 1]].item() for b in range(2) for t in range(11))
        assert train_gpt.total_nats(model, tokens, targets, 0.5).item() == pytest.approx(expected, rel=1e-5)


def test_ngrams_are_of_the_last_tokens():
    """The row of order n + 1 at a place follows from its token and the n before it, and each order has a table of its own."""
    model, seen = small_model(orders=4, grams=1 << 16), []
    model.embed_ngrams.register_forward_pre_hook(lambda module, given: seen.append(given[0].clone()))
    tokens = torch.randint(256, (1, 20), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 9] += 1
    for each in tokens, changed:
        model.embedding(each % 256, 0)
    before, after = seen
    assert before.shape == (20, 3)
    for n in (1, 2, 3):
        assert (before[:, n - 1] // model.grams == n - 1).all() and before[:, n - 1].unique().numel() > 15
        assert (before != after)[:, n - 1].nonzero()[:, 0].tolist() == list(range(9, 10 + n))
    later = torch.cat([model.embedding(tokens, 0)[:, 12:], model.embedding(tokens, 12)])
    assert torch.equal(later[0], later[1]), "also where a cache has the first ones"


def test_window_and_documents():
    model = small_model({**META, "document_start": 255}, window=4)
    tokens = torch.zeros(1, 12, dtype=torch.long)
    tokens[0, [5, 9]] = 255
    mask = model.mask(tokens)[0, 0]
    document = [0] * 5 + [1] * 4 + [2] * 3
    expected = [[k <= q and q - k < 4 and document[q] == document[k] for k in range(12)] for q in range(12)]
    assert mask.tolist() == expected
    assert torch.equal(model.mask(tokens, 7)[0, 0], mask[7:]), "the rows from a place on"


def test_block_mask_is_the_dense_mask():
    """Flex attention with the BlockMask against attend with the dense mask, forward; nothing is compiled twice."""
    model = small_model({**META, "document_start": 250})
    rng, mask_cache = torch.Generator().manual_seed(1), {}
    for i in range(3):
        tokens = torch.randint(256, (2, 256), generator=rng)
        dense = model.mask(tokens)
        documents = (tokens >= 250).cumsum(1)
        with torch._dynamo.config.patch(error_on_recompile=i > 0), torch.no_grad():
            block = train_gpt.block_mask(model.mask_mod, documents, mask_cache)
            q, k, v = (torch.randn(2, 2, 256, 32, generator=rng) for _ in range(3))
            found = train_gpt.attend(q, k, v, block)
        assert torch.allclose(train_gpt.attend(q, k, v, dense), found, atol=1e-5)
        assert not torch.allclose(train_gpt.attend(q, k, v, torch.ones_like(dense)), found, atol=1e-2)
    assert len(mask_cache) == 1
    with torch.no_grad():  # as under autocast
        rough = train_gpt.attend(q, k, v.bfloat16(), block)
    assert rough.dtype == torch.bfloat16 and torch.allclose(rough.float(), found, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_that_sees_nothing_gets_zeros(dtype):
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 8, generator=rng) for _ in range(3))
    mask = torch.rand(2, 1, 5, 5, generator=rng) < 0.5
    mask[0, 0, 3] = False
    out = train_gpt.attend(q, k, v.to(dtype), mask)
    assert not out[0, :, 3].any() and not out.isnan().any() and bool(out[1].any())
    seen = mask.any(-1, keepdim=True).expand(2, 3, 5, 8)
    expected = ((q @ k.mT / 8 ** 0.5).masked_fill(~mask, -1e9).softmax(-1) @ v)[seen]
    assert torch.allclose(out.float()[seen], expected, atol=1e-5 if dtype == torch.float32 else 0.03)


def test_rotary_scores_depend_on_distance_alone():
    model, rng = small_model(), torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 32, generator=rng) for _ in range(2))

    def turned(x, place):
        return train_gpt.apply_rotary(x, *model.rotary(place, place + 1, "cpu"))

    def score(i, j):
        return (turned(q, i) * turned(k, j)).sum().item()

    assert score(7, 3) == pytest.approx(score(107, 103), abs=1e-3) != pytest.approx(score(7, 4), abs=1e-3)
    assert turned(q, 50).norm().item() == pytest.approx(q.norm().item(), rel=1e-5)


def test_untrained_model_is_uniform():
    model = train_gpt.GPT(small_config(), META)
    train_gpt.init_weights(model)
    stream = torch.randint(256, (501,), generator=torch.Generator().manual_seed(0))
    assert train_gpt.evaluate(model, stream, 256, small_config(), 0, 1)[0] == pytest.approx(np.log(256), abs=1e-3)


def test_gpu_model_on_the_meta_device():
    config = train_gpt.CONFIGS["gpu"]
    with torch.device("meta"):
        model = train_gpt.GPT(config, {"vocab": 50257, "document_start": 50256})
        tokens = torch.zeros(2, 1024, dtype=torch.long)
        mask = model.mask(tokens)
        logits = model.head.log_probs(model(tokens, mask))
    assert logits.shape == (2, 1024, 50257) and mask.shape == (2, 1, 1024, 1024)
    hidden = sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)
    assert hidden == 12 * 12 * 768 ** 2


def test_columns_that_fill_up_the_head_change_nothing():
    """On CUDA, which a tensor here pretends to be on, logits are of a whole number of 128 columns, the last ones cut."""
    on_gpu = type("OnGpu", (torch.Tensor,), {"is_cuda": True})
    y = torch.randn(2, 5, DIMS["dim"], generator=torch.Generator().manual_seed(0))
    for vocab, columns in ((200, 256), (256, 256)):
        model, grads = small_model({**META, "vocab": vocab}), []
        for states in (y, y.as_subclass(on_gpu)):
            logits = model.head.logits(states, 0).as_subclass(torch.Tensor)
            found, = torch.autograd.grad(logits.square().sum(), model.head.weight)
            grads.append((logits, found))
        (plain, expected), (padded, found) = grads
        assert plain.shape == padded.shape == (2, 5, vocab)
        assert torch.allclose(plain, padded, atol=1e-5) and torch.allclose(expected, found, atol=1e-4)
        with mock.patch.object(train_gpt.F, "linear", side_effect=F.linear) as linear:
            model.head.logits(y.as_subclass(on_gpu), 0)
        assert linear.call_args[0][1].shape[0] == columns


@pytest.mark.parametrize("frequent, cuts", [(0, []), (1, [1, 2, 4, 8, 16, 32, 64, 128]), (60, [60, 120, 240]),
                                            (128, [128]), (255, [255]), (256, []), (999, [])])
def test_head_of_clusters(frequent, cuts):
    """Probabilities are those of a cluster times those inside it, and the loss is theirs, gradients included."""
    torch.manual_seed(0)
    head, y = train_gpt.Head(8, 256, frequent), torch.randn(2, 256, 8)
    targets = torch.stack([torch.randperm(256), torch.randint(min(cuts, default=256), (256,))])  # then no rare one
    torch.nn.init.normal_(head.weight)
    assert head.cuts == cuts
    logs = head.log_probs(y)
    assert logs.shape == (2, 256, 256) and torch.allclose(logs.exp().sum(-1), torch.ones(2, 256), atol=1e-5)
    choice = F.linear(y, head.weight[:len(cuts) + min([*cuts, 256])]).softmax(-1)
    for i, (cut, end) in enumerate(zip(cuts, [*cuts[1:], 256])):
        inside = F.linear(y, head.weight[len(cuts) + cut:len(cuts) + end]).softmax(-1)
        assert torch.allclose(logs[..., cut:end].exp(), choice[..., i:i + 1] * inside, atol=1e-6)
    for row in range(2):
        nats = head.nats(y[row], targets[row])
        expected = -head.log_probs(y[row]).gather(-1, targets[row][:, None]).sum()
        torch.testing.assert_close(nats, expected)
        grads = [torch.autograd.grad(value, head.weight)[0] for value in (nats, expected)]
        torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)


def test_every_parameter_has_one_optimizer(model):
    muon, adam = train_gpt.make_optimizers(model, small_config(), runs.fake_run())
    taken = [p for params, _ in muon.stacks for p in params] + [p for group in adam.param_groups for p in group["params"]]
    assert len(taken) == len({id(p) for p in taken}) == len(list(model.parameters()))
    assert all(p.dim() == 2 for params, _ in muon.stacks for p in params)


@pytest.mark.parametrize("sparse", [True, False])
def test_tables_move_by_row_wise_adagrad(sparse):
    """Each row that was looked up moves by lr times its gradient over the root of the sum of its mean squares."""
    table = torch.nn.EmbeddingBag(6, 4, mode="sum", sparse=sparse)
    other = torch.nn.Parameter(torch.ones(3))
    adam = train_gpt.AdamWithTables([{"params": [other], "lr": 0.1}, {"params": [table.weight], "lr": 0.5}])
    rng = torch.Generator().manual_seed(0)
    weight, total = table.weight.detach().clone(), torch.zeros(6)
    for step in range(3):
        rows = torch.randint(4, (5, 2), generator=rng)  # the last two are never seen
        slope = torch.randn(5, 4, generator=rng)
        grad = torch.zeros(6, 4).index_add(0, rows.flatten(), slope.repeat_interleave(2, 0))
        total += grad.square().mean(1)
        weight -= 0.5 * grad / total.clamp(min=1e-12).sqrt()[:, None]
        ((table(rows) * slope).sum() + other.sum()).backward()
        adam.step()
        adam.zero_grad()
        assert torch.allclose(table.weight, weight, atol=1e-5)
        assert torch.allclose(other, torch.full((3,), 1 - 0.1 * (step + 1)), atol=1e-5)  # Adam's first steps are of lr


# ------------------------------------------------------------------------------------------------------------
# Evaluation

@pytest.mark.parametrize("context,stride,world", [(64, 64, 1), (64, 40, 1), (100, 7, 2), (5000, 5000, 1), (64, 1, 3)])
def test_evaluation_counts_every_token_once(monkeypatch, context, stride, world):
    """With the stream 0, 1, 2 ... a token is its own place: sums of squares tell a double from a missing one."""
    seen = []

    def spy(model, tokens, targets, vocab):
        assert torch.equal(targets, tokens + 1) and (tokens.diff(dim=1) == 1).all()
        seen.append(tokens.shape[1])
        return -targets.double() ** 2

    monkeypatch.setattr(train_gpt, "target_log_probs", spy)
    monkeypatch.setattr(train_gpt, "check_again", lambda *_: None)
    monkeypatch.setattr(train_gpt, "EVAL_BATCH", 3)
    monkeypatch.setattr(train_gpt, "EVAL_WINDOWS", {"cpu": (context, stride, 10 ** 9)})
    totals = torch.zeros(2)
    monkeypatch.setattr(train_gpt.dist, "all_reduce", lambda total: total.copy_(totals.add_(total)))
    for rank in range(world):
        with pytest.raises(Fault, match=r"predicted, and there are 1000") if rank + 1 < world else nullcontext():
            loss, _ = train_gpt.evaluate(torch.nn.Module(), torch.arange(1001), 1001, small_config(), rank, world)
    assert loss == pytest.approx(sum(i * i for i in range(1, 1001)) / 1000)
    assert max(seen) <= context


def test_evaluation_against_a_plain_loop(model, monkeypatch):
    stream = torch.randint(256, (151,), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(train_gpt, "EVAL_WINDOWS", {"cpu": (60, 25, 10 ** 6)})
    total = 0.0
    for i in range(150):  # the window that first holds input i ends at 60, 85, 110, 135 or 150
        end = next(e for e in (60, 85, 110, 135, 150) if i < e)
        window = stream[None, end - 60:end]
        logits = model.head.log_probs(model(window, model.mask(window)))[0, i - (end - 60)]
        total -= logits.log_softmax(-1)[stream[i + 1]].item()
    loss, numbers = train_gpt.evaluate(model, stream, 256, small_config(), 0, 1)
    assert loss == pytest.approx(total / 150, abs=1e-5) and numbers["eval_targets"] == 150


# ------------------------------------------------------------------------------------------------------------
# Sampling

def test_probabilities():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])

    def probabilities(**fields):
        return train_gpt.probabilities(logits, sampling(**fields))

    assert torch.allclose(probabilities(), logits.softmax(-1))
    assert torch.allclose(probabilities(temperature=0.5), (2 * logits).softmax(-1))
    assert probabilities(temperature=0.0).tolist() == [[1, 0, 0, 0]]
    two = torch.tensor([[2.0, 1.0]]).softmax(-1)
    assert torch.allclose(probabilities(top_k=2)[:, :2], two)
    assert probabilities(top_k=2)[0, 2:].tolist() == [0, 0]
    assert torch.equal(probabilities(top_k=99), probabilities()), "more than there are: all"
    # 0.644 and 0.237 are the two likeliest: 0.7 needs both, 0.6 the first alone
    assert (probabilities(top_p=0.7) > 0).tolist() == [[True, True, False, False]]
    assert (probabilities(top_p=0.6) > 0).tolist() == [[True, False, False, False]]
    assert (probabilities(top_p=1e-6) > 0).tolist() == [[True, False, False, False]], "the likeliest always stays"


def next_log_probs(model, tokens):
    """Log-probabilities (B, V) of the token after tokens (B, T), without a cache."""
    with torch.no_grad():
        return model.head.log_probs(model(tokens, model.mask(tokens)))[:, -1]


@pytest.mark.parametrize("documents", [False, True])
def test_cache_gives_the_same_tokens(documents):
    model = small_model({**META, "document_start": 200 if documents else None})
    start = torch.randint(256, (3, 5), generator=torch.Generator().manual_seed(0))
    options = sampling(temperature=0.0, sample_tokens=40)  # beyond the window of 16
    cached, tokens = torch.cat(list(train_gpt.generate(model, start, options, cache=KVCache())), 1), start
    for _ in range(40):
        tokens = torch.cat([tokens, next_log_probs(model, tokens).argmax(-1, keepdim=True)], 1)
    assert torch.equal(cached, tokens[:, 5:]) and cached.shape == (3, 40)
    assert len(set(cached.flatten().tolist())) > 5, "a model that repeats itself proves nothing"


def test_cache_reads_every_token_once(model, monkeypatch):
    places, plain = [], train_gpt.GPT.forward

    def forward(self, tokens, mask, start=0, appends=None):
        places.append(tokens.shape[1] - start)
        return plain(self, tokens, mask, start, appends)

    monkeypatch.setattr(train_gpt.GPT, "forward", forward)
    list(train_gpt.generate(model, torch.zeros(1, 7, dtype=torch.long), sampling(sample_tokens=5), cache=KVCache()))
    assert places == [7, 1, 1, 1, 1]


def test_cache_without_its_last_tokens(model):
    tokens = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(0))
    cache = KVCache()
    with torch.no_grad():
        whole = train_gpt.read_tokens(model, tokens, cache)
        cache.truncate(12)
        assert cache.length == 12
        assert torch.allclose(train_gpt.read_tokens(model, tokens, cache), whole[:, 12:], atol=1e-5)
    cache.truncate(99)
    assert cache.length == 20


@pytest.mark.parametrize("ahead", [1, 4])
def test_speculation_is_exact_when_greedy(model, ahead):
    options = sampling(temperature=0.0, sample_tokens=50, ahead=ahead)
    start, draft = torch.tensor([[10, 65, 66]]), small_model(seed=1, dim=32, depth=1)
    plain = torch.cat(list(train_gpt.generate(model, start, options)), 1)
    for guesser, most in ((draft, 50), (model, -(-50 // (ahead + 1)))):  # its own draft is always right
        chunks = list(speculate.speculate(train_gpt, model, guesser, start, options))
        assert torch.equal(torch.cat(chunks, 1), plain) and len(chunks) <= most


def test_speculation_follows_the_distribution(model):
    """The second and third token of many speculative draws against the model's own probabilities, a chi-square each."""
    draft = small_model(seed=1, dim=32, depth=1)
    options = sampling(sample_tokens=2, ahead=2, top_k=4, temperature=0.7)
    start, exact = torch.tensor([[10, 65, 66]]), {}
    for a, p in enumerate(train_gpt.probabilities(next_log_probs(model, start), options)[0].tolist()):
        if p > 0:
            logits = next_log_probs(model, torch.cat([start, torch.tensor([[a]])], 1))
            after = train_gpt.probabilities(logits, options)[0].tolist()
            exact.update({(a, b): p * q for b, q in enumerate(after) if q > 0})
    n, counts = 600, dict.fromkeys(exact, 0)
    for seed in range(n):
        a, b = torch.cat(list(speculate.speculate(train_gpt, model, draft, start, options, seed)), 1)[0].tolist()
        counts[a, b] += 1
    chi = sum((counts[pair] - n * p) ** 2 / (n * p) for pair, p in exact.items())
    assert chi < len(exact) - 1 + 4 * (2 * (len(exact) - 1)) ** 0.5, (chi, len(exact))


def test_text_is_printed_as_it_comes(capsys):
    """A character whose bytes come in two chunks is printed once it is whole."""
    ids, count, speed = speculate.speak([torch.tensor([[72, 195]]), torch.tensor([[164, 33]])], bytes)
    assert capsys.readouterr().out == "H\u00e4!\n" and (ids, count) == ([72, 195, 164, 33], 2) and speed > 0


@pytest.mark.parametrize("text, answer", [
    ("def f(x):\n    return x\n", True), ("def f(x,\n      y\n", True), ('def f():\n    """What it\n', True),
    ("def f(x):\n    return 'a\n", False), ("def f(x):\n        y = 1\n    return y\n", False),
    ("def f(x):\n    return 'a", True), ("def f(x)?\n", False), ("", True)])
def test_tokenizes(text, answer):
    """What is still open at the end is no fault, nor is anything in the last line, which may be cut off."""
    assert show_gpt.tokenizes(text) is answer


def test_word_numbers():
    """By hand: `tw` is cut off, and the second text's first run of eight words is the first one's second."""
    known = set(show_gpt.words("A b c d e f g h i don't"))
    texts = ["A b, c d e\nf g h i tw", "B c d e f g h I x9 d\u00f6n't don't z"]
    numbers = show_gpt.word_numbers(texts, known)
    assert numbers == {"quality_known_words": round(18 / 20, 4), "quality_repeated_8grams": round(1 / 6, 4)}
    assert show_gpt.word_numbers(["", "a"], known) == {"quality_known_words": 0.0, "quality_repeated_8grams": 1.0}


# ------------------------------------------------------------------------------------------------------------
# Whole runs

@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A finished run that saved its weights: its folder and its log."""
    root = make_root(tmp_path_factory.mktemp("run") / "root")
    with pytest.MonkeyPatch.context() as patch:
        argv = [*SMALL, f"--data={tiny}", "--num_steps=40", "--eval_every=20", "--quality_tokens=800", "--save=true"]
        run_here(patch, root, argv, samples=True)
    log, = (root / "logs").iterdir()
    return root, rules.parse_log(log)


def test_run(finished):
    root, log = finished
    assert log["footer"]["val_loss"] < 2.0 and [step for step, _, _ in log["steps"]] == [20, 40]
    assert log["footer"]["tokens"] == 40 * 8 * 32 and log["footer"]["task"] == "gpt"
    assert 0 < log["footer"]["quality_known_words"] <= 1 and 0 <= log["footer"]["quality_repeated_8grams"] <= 1
    assert set(rules.FOOTER_KEYS) <= set(log["footer"])
    assert len((root / "samples/gpt.txt").read_bytes()) == 21, "the prompt and 20 bytes"
    folder, = (path for path in (root / "samples").iterdir() if path.is_dir())
    assert (folder / "gpt.txt").read_bytes() == (root / "samples/gpt.txt").read_bytes()
    text, = (root / "logs").iterdir()
    shown = text.read_text().split(rules.RULE + "\n")[-1]
    assert shown.index("\noverrides: ") < shown.index("\nsamples: ") < shown.index("\nsampled_per_second: ")
    line, = (root / "records/runs.jsonl").read_text().splitlines()
    assert json.loads(line)["val_loss"] == log["footer"]["val_loss"]


def test_load_and_draft(finished, tiny, monkeypatch, tmp_path, capsys):
    """The architecture is the checkpoint's, whatever the track's is; what says otherwise is refused."""
    weights, = (finished[0] / "checkpoints").iterdir()
    root = make_root(tmp_path / "again")
    rest = [word for word in SMALL if word.partition("=")[0][2:] not in DIMS]
    argv = [*rest, f"--data={tiny}", "--num_steps=0", f"--load={weights}", f"--draft={weights}", "--temperature=0"]
    run_here(monkeypatch, root, [*argv, "--save=true"], samples=True)
    footer, = runs.footers(root)
    assert footer["val_loss"] == pytest.approx(finished[1]["footer"]["val_loss"], abs=0.02), "half precision"
    numbers = dict(re.findall(r"(?m)^(\w+_per_\w+): (\S+)$", capsys.readouterr().out))
    assert float(numbers["tokens_per_check"]) == 5.0, "a model that drafts for itself is never refused"
    assert float(numbers["sampled_per_second"]) > 0 and float(numbers["speculated_per_second"]) > 0
    again, = (root / "checkpoints").iterdir()
    with safe_open(again, "pt") as file:
        saved = json.loads(file.metadata()["config"])
    assert {key: saved[key] for key in DIMS} == DIMS, "what is saved says its own architecture"
    with pytest.raises(Fault, match="was trained with --depth=2: leave it out"):
        run_here(monkeypatch, root, [*argv, "--depth=1"])


@pytest.mark.parametrize("argv,message", [
    (["--data=nowhere"], "make it with `python data/nowhere.py`"),
    (["--data=scenes"], "python data/scenes.py --objects"),
    (["--data=mine"], "no data in .*mine: it should hold train"),
    (["--num_steps=-1"], "--num_steps=-1 is not a number from 0"),
    (["--window=0"], "--window=0 is not a number from 1"),
    (["--head_dim=0"], "--head_dim=0 is not a number from 2"),
    (["--head_dim=24"], "not a multiple of --head_dim"),
    (["--dim=33", "--head_dim=33"], "or that is odd"),
    (["--eval_tokens=-5"], "--eval_tokens=-5 is not a number from 1"),
    (["--eval_every=0"], "--eval_every=0 is not a number from 1"),
    (["--cooldown=0"], "--cooldown=0 is not a number from 0.001 to 1"),
    (["--top_p=0"], "--top_p=0 is not a number from 1e-06 to 1"),
    (["--top_k=-1"], "--top_k=-1 is not a number from 0"),
    (["--temperature=inf"], "--temperature=inf is not a number from 0"),
    (["--sample_tokens=0"], "--sample_tokens=0 is not a number from 1"),
    (["--ahead=0"], "--ahead=0 is not a number from 1"),
    (["--precision=fp8"], "--precision=fp8 is not one of auto, fp32, bf16"),
    (["--muon_lr=nan"], "--muon_lr=nan is not a number from 0"),
    (["--micro_batch=3"], "--micro_batch=3 does not divide a process's 8 rows"),
    (["--windows=3"], "there is no field --windows"),
    (["--cap=3"], "there is no field --cap"),
])
def test_bad_arguments(tiny, monkeypatch, tmp_path, argv, message):
    root = tmp_path / "root"
    (root / "data").mkdir(parents=True)
    for name in ("nowhere", "scenes"):
        (root / f"data/{name}.py").touch()
    with pytest.raises(Fault, match="(?s).*" + message) as caught:
        run_here(monkeypatch, root, [*SMALL, f"--data={tiny}", *argv])
    assert "\n" not in str(caught.value) and [path.name for path in root.iterdir()] == ["data"]


@pytest.mark.parametrize("argv,message", [
    (["--draft=none.safetensors"], "none.safetensors is not a checkpoint of this script"),
    (["--prompt=\u00e9"], "has characters that .* does not"),
    (["--prompt=\udce9"], "is not text"),
])
def test_samples_are_prepared_before_the_clock(tiny, monkeypatch, tmp_path, argv, message):
    """What they will need is missing: said at once, and nothing is written."""
    folder = shutil.copytree(tiny, tmp_path / "ascii")
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "vocab": 128}))
    root = make_root(tmp_path / "root")
    with pytest.raises(Fault, match=message):
        run_here(monkeypatch, root, [*SMALL, f"--data={folder}", *argv], samples=True)
    assert not (root / "logs").exists()


def test_an_encoding_that_cannot_be_fetched(tiny, monkeypatch, tmp_path):
    def no_network(meta):
        raise ConnectionError("Name or service not known\nand more lines")

    monkeypatch.setattr(streams, "codec", no_network)
    with pytest.raises(Fault, match=r"encoding 'bytes' of samples cannot be opened \(Name or service not known\)$"):
        run_here(monkeypatch, make_root(tmp_path / "root"), [*SMALL, f"--data={tiny}"], samples=True)


SAMPLING = {"temperature": st.floats(), "top_k": st.integers(-2, 300), "top_p": st.floats(-0.5, 1.5),
            "sample_tokens": st.integers(-1, 9), "ahead": st.integers(-1, 9), "prompt": st.text(max_size=3),
            "window": st.integers(-1, 9), "orders": st.integers(-1, 4), "depth": st.integers(-1, 2)}


@settings(max_examples=30, deadline=None, database=None)
@given(st.lists(st.sampled_from(sorted(SAMPLING)), min_size=1, max_size=4, unique=True), st.data())
def test_any_sampling_draws_or_is_refused(tiny, tmp_path_factory, names, data):
    root = make_root(tmp_path_factory.mktemp("any") / "root")
    argv = [*SMALL, f"--data={tiny}", "--num_steps=1", "--eval_tokens=100"]
    argv += [f"--{name}={data.draw(SAMPLING[name], name)}" for name in names]
    with pytest.MonkeyPatch.context() as patch:
        try:
            run_here(patch, root, argv, samples=True)
        except Fault as fault:
            assert "\n" not in str(fault) and not (root / "logs").exists()
        else:
            assert (root / "samples/gpt.txt").exists()


def test_help_shows_every_field(capsys):
    with pytest.raises(SystemExit):
        train_gpt.main(["--help"])
    out = capsys.readouterr().out
    for key in {**vars(train_gpt.Config()), **vars(train_gpt.Options())}:
        assert f"    {key}: " in out, key
    assert "python train_gpt.py" in out and "top_p in (1e-06, 1)" in out


@pytest.mark.parametrize("damage", ["cut", "foreign", "vocabulary", "meta", "fields", "types", "none"])
def test_damaged_streams(tiny, monkeypatch, tmp_path, damage):
    folder = shutil.copytree(tiny, tmp_path / "data")
    path = folder / "train.bin"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "foreign":
        path.write_bytes(b"\x93NUMPY" + path.read_bytes())
    elif damage == "vocabulary":
        streams.write_bin(path, np.full(1000, 300))
    elif damage == "none":
        path.unlink()
    else:
        wrong = {"meta": "[1", "fields": '{"vocab": 256}', "types": json.dumps({**META, "vocab": "many"})}
        (folder / "meta.json").write_text(wrong[damage])
    with pytest.raises(Fault, match="cannot be trained on"):
        run_here(monkeypatch, tmp_path / "root", [*SMALL, f"--data={folder}"])
    assert not (tmp_path / "root").exists()


def test_a_batch_in_parts_is_the_same_run(tiny, tmp_path, monkeypatch):
    losses = []
    for rows in (8, 2):
        root = make_root(tmp_path / str(rows))
        run_here(monkeypatch, root, [*SMALL, f"--data={tiny}", "--num_steps=4", f"--micro_batch={rows}"])
        losses.append(json.loads((root / "records/runs.jsonl").read_text())["val_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and losses[0] < np.log(256) - 0.5


def test_two_processes_are_the_same_run(tiny, tmp_path):
    argv = [*SMALL, f"--data={tiny}", "--num_steps=20", "--eval_every=10"]
    runs.assert_same_on_two_processes("gpt", argv, tmp_path)


# ------------------------------------------------------------------------------------------------------------
# A run that is cut off, goes on longer, or cannot show samples

@pytest.fixture
def keep_signals():
    """Puts the handlers of this process back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def at_step(monkeypatch, step, action):
    """Have train_gpt.py call action once, in this training step after the warm-up's three."""
    calls, plain = [], train_gpt.train_step

    def train_step(number, *rest):
        calls.append(number)
        if len(calls) == step + 4:
            action()
        return plain(number, *rest)

    monkeypatch.setattr(train_gpt, "train_step", train_step)


def result(root):
    """A run's line in runs.jsonl and its weights."""
    run, = runs.footers(root)
    return run, load_file(root / "checkpoints" / f"{run['run_id']}.safetensors")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_resumed_run_is_the_same_run(tiny, tmp_path, monkeypatch, capsys, keep_signals, number):
    argv = [*SMALL, f"--data={tiny}", "--num_steps=12", "--save=true"]
    whole, cut, again = (make_root(tmp_path / name) for name in ("whole", "cut", "again"))
    run_here(monkeypatch, whole, argv)
    with monkeypatch.context() as patch:
        at_step(patch, 6, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as caught:
            run_here(patch, cut, argv)
    state, = (cut / "checkpoints").iterdir()
    assert caught.value.code == 0 and not (cut / "records/runs.jsonl").exists()
    assert f"stopped: continue with the same command and --resume={state}" in capsys.readouterr().out
    run_here(monkeypatch, again, [*argv, f"--resume={state}", "--eval_every=4", "--top_k=3"])
    (expected, weights), (found, same) = result(whole), result(again)
    for key in ("val_loss", "steps", "tokens"):
        assert found[key] == expected[key], key
    assert all(torch.equal(value, same[name]) for name, value in weights.items())
    assert found["train_seconds"] > torch.load(state, weights_only=True)["counters"]["seconds"] > 0


def test_training_on(tiny, tmp_path, monkeypatch, capsys):
    """A run that has ended after 6 steps goes on to step 12, with the learning rates of 12 steps from there on."""
    argv = [*SMALL, f"--data={tiny}", "--save_every=4"]
    first, longer = make_root(tmp_path / "first"), make_root(tmp_path / "longer")
    run_here(monkeypatch, first, [*argv, "--num_steps=6"])
    state, = (first / "checkpoints").iterdir()
    state = state.rename(tmp_path / "state.pt")
    assert torch.load(state, weights_only=True)["counters"]["step"] == 6
    run_here(monkeypatch, longer, [*argv, "--num_steps=12", f"--resume={state}"])
    run, = runs.footers(longer)
    assert run["steps"] == 12 and run["tokens"] == 12 * 8 * 32
    assert run["val_loss"] < runs.footers(first)[0]["val_loss"]
    for more, message in ((["--num_steps=3"], "beyond --num_steps=3"),
                          (["--num_steps=6", "--micro_batch=4"], "is of a run with --micro_batch=512: pass the same")):
        with pytest.raises(Fault, match=message):
            run_here(monkeypatch, longer, [*argv, *more, f"--resume={state}"])


@pytest.mark.skipif(not (runs.ROOT / "data/shakespeare/val.bin").exists(), reason="python data/shakespeare.py makes it")
@pytest.mark.parametrize("name", ["gpt", "gpt_draft"])
def test_ready_weights_read_english(name, tmp_path, monkeypatch):
    """They load, and give what they should: the first bytes are harder than all, on which a record has to reach 1.5."""
    root = make_root(tmp_path / "root")
    argv = ["--track=cpu", f"--load={runs.ROOT}/data/frozen/{name}.safetensors", "--num_steps=0", "--eval_tokens=8192"]
    run_here(monkeypatch, root, argv)
    run, = runs.footers(root)
    assert run["val_loss"] < 1.65


def test_samples_that_fail_leave_the_result(tiny, tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise OSError("no space left")

    monkeypatch.setattr(show_gpt.Show, "text", fails)
    root = make_root(tmp_path / "root")
    with pytest.raises(SystemExit) as caught:
        run_here(monkeypatch, root, [*SMALL, f"--data={tiny}", "--num_steps=2", "--save=true"], samples=True)
    assert caught.value.code == 1 and result(root)[0]["steps"] == 2
    assert "no samples (OSError: no space left); the result above is filed" in capsys.readouterr().out


def test_what_was_drawn_before_a_fault_stays(tiny, tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise ValueError("no words\nin many lines")

    monkeypatch.setattr(show_gpt.Show, "quality", fails)
    root = make_root(tmp_path / "root")
    with pytest.raises(SystemExit):
        run_here(monkeypatch, root, [*SMALL, f"--data={tiny}", "--num_steps=2", "--quality_tokens=80"], samples=True)
    assert (root / "samples/gpt.txt").exists()
    assert "samples end here (ValueError: no words); the result above is filed\n" in capsys.readouterr().out


def test_quality_needs_the_training_text(tiny, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny, tmp_path / "val only")
    for path in folder.glob("train*.bin"):
        path.unlink()
    argv, root = [*SMALL, f"--data={folder}", "--num_steps=0"], make_root(tmp_path / "root")
    with pytest.raises(Fault, match="train.*.bin, and there are none: pass --quality_tokens=0"):
        run_here(monkeypatch, root, [*argv, "--quality_tokens=80"], samples=True)
    assert not (root / "logs").exists()
    run_here(monkeypatch, root, argv, samples=True)
    assert (root / "samples/gpt.txt").exists()


def test_pictures_of_labels(tmp_path, monkeypatch):
    """A stream of picture tokens: the samples are a sheet of four pictures per label."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = np.random.default_rng(0).integers(4096, size=(40, 65))
    rows[:, 0] = 4096 + np.arange(40) % 2
    for name in ("train", "val"):
        streams.write_bin(folder / f"{name}.bin", rows.flatten())
    streams.finish(folder, {"name": "pictures"}, 4098, document_start=4096, encoding="scenes")
    root = make_root(tmp_path / "root")
    run_here(monkeypatch, root, [*SMALL, f"--data={folder}", "--num_steps=1"], samples=True)
    assert (root / "samples/gpt.png").read_bytes().startswith(b"\x89PNG")
    assert not (root / "samples/gpt.txt").exists()
    for option in "--prompt=KING", "--draft=none.safetensors":
        with pytest.raises(Fault, match="is of pictures: --prompt and --draft are for texts"):
            run_here(monkeypatch, root, [*SMALL, f"--data={folder}", "--num_steps=1", option], samples=True)
