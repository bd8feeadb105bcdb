"""Muon over any number of processes, a model divided among them, graphs without breaks."""
import contextlib
import inspect
import re
import shutil

import pytest
import torch

import ranks
import runs
import test_train_4m
import test_train_gpt
import test_train_maskgit
import train_4m
import train_gpt
import train_maskgit
from test_train_4m import SMALL, make_root

tiny, layout, frozen = test_train_4m.tiny, test_train_4m.layout, test_train_4m.frozen
maskgit_model = test_train_maskgit.model


# ------------------------------------------------------------------------------------------------------------
# Muon and the sums of gradients

@pytest.fixture(scope="module")
def muon_steps(tmp_path_factory):
    """A function: what ranks.muon_steps came to on so many processes."""
    folder = tmp_path_factory.mktemp("muon")

    def steps(processes):
        path = folder / str(processes)
        if not path.exists():
            runs.World(ranks.muon_steps, (str(path),), processes).succeed()
        return torch.load(path, weights_only=True)
    return steps


@pytest.mark.parametrize("processes", [2, 3])
def test_muon_is_the_same_on_any_number_of_processes(processes, muon_steps):
    one, many = muon_steps(1), muon_steps(processes)
    assert len(one) == len(many) == 10 + 3
    for a, b in zip(one, many):
        assert a.shape == b.shape and torch.allclose(a, b, atol=1e-5), "up to the order of a sum"
    start = torch.Generator().manual_seed(0)
    first = torch.randn(24, 8, generator=start)
    assert (one[0] - first).abs().mean() > 0.01, "the steps are larger than what is tolerated"


# ------------------------------------------------------------------------------------------------------------
# FSDP2

def test_a_divided_model_is_the_same_run(tiny, tmp_path):
    """--shard=true on two processes against one process with the whole model, and its state resumed by that one."""
    argv = [*SMALL, *tiny[1], "--enc_depth=2", "--dec_depth=2", "--num_steps=20", "--eval_every=10"]
    roots = [make_root(tmp_path / name) for name in ("whole", "divided")]
    worlds = [runs.start("4m", argv, roots[0]),
              runs.start("4m", [*argv, "--shard=true", "--save_every=10"], roots[1], 2)]
    (whole,), (divided,) = (runs.footers(root) for world, root in zip(worlds, roots) if world.succeed())
    assert divided["val_loss"] == pytest.approx(whole["val_loss"], abs=1e-4)
    assert divided["parameters"] == whole["parameters"] and divided["world_size"] == 2
    assert len(runs.losses(roots[1])) == 2 and runs.losses(roots[1]) == pytest.approx(runs.losses(roots[0]), abs=2e-4)
    state, = (roots[1] / "checkpoints").iterdir()
    runs.run("4m", [*argv, f"--resume={state}"], make_root(tmp_path / "resumed"))
    again, = runs.footers(tmp_path / "resumed")
    assert again["val_loss"] == pytest.approx(whole["val_loss"], abs=1e-4)


def test_dividing_needs_processes(tiny, tmp_path, monkeypatch):
    with pytest.raises(train_4m.Fault, match="start several with torchrun"):
        test_train_4m.run_here(monkeypatch, make_root(tmp_path / "root"), [*SMALL, *tiny[1], "--shard=true"])


@pytest.mark.parametrize("track,millions", [("gpu", 41), ("gpu-l", 613), ("gpu-xl", 2435)])
def test_sizes_of_the_gpu_configs(track, millions, layout):
    """Ours have no self-attention in the decoder: 4M's L has 705 M, its XL 2.8 B parameters."""
    config = train_4m.CONFIGS[track]
    with torch.device("meta"):
        model = train_4m.Nano4M(config, layout)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.05)
    assert config.track == track and config.shard == (track != "gpu")


# ------------------------------------------------------------------------------------------------------------
# Whole graphs: what torch.compile is given on CUDA has no breaks, and is compiled once a shape

BACKEND = "aot_eager_decomp_partition"


def graphs():
    """How many graphs torch.compile has made so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compiled(function, backend=BACKEND):
    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=False)


def test_the_loss_of_4m_is_one_graph_a_shape(layout, frozen):
    """Traced by AOTAutograd for a link and a course step; for the others to see that there is one graph is enough, and
    fast."""
    model, tokens, traced = test_train_4m.small_model(layout), frozen[0], []
    config = train_4m.dataclasses.replace(train_4m.CONFIGS["cpu"], **test_train_4m.DIMS, batch=4, word_steps=3)
    run, rng = runs.fake_run(), torch.Generator().manual_seed(0)
    run.slice, run.autocast = lambda batch: slice(0, batch), contextlib.nullcontext
    optimizers = train_4m.make_optimizers(model, config, run)
    warm_up = {train_4m.step_shape(step, config): step for step in range(config.num_steps)}  # as main has it
    met = set()

    def trace_some(graph, inputs):
        traced.append(graph)
        return torch._dynamo.lookup_backend(BACKEND if len(traced) in (1, 9) else "eager")(graph, inputs)

    def loss_of(*arguments):
        loss = compiled_loss(*arguments)
        _, _, enc_pos, visible, dec_pos, _, images = arguments
        met.add((enc_pos.size(1), visible is None, dec_pos.size(1), images))
        if len(met) % 4 == 1:
            assert loss.item() == pytest.approx(train_4m.masked_loss(*arguments).item(), rel=1e-4)
        return loss

    limit = int(re.search(r"recompile_limit = (\d+)", inspect.getsource(train_4m.main))[1])
    with torch._dynamo.config.patch(recompile_limit=limit):
        compiled_loss, before = compiled(train_4m.masked_loss, trace_some), graphs()
        for i, step in enumerate([*warm_up.values(), *range(100)]):
            with torch._dynamo.config.patch(error_on_recompile=i >= len(warm_up)):
                train_4m.train_step(step, tokens[4 * i:4 * i + 4], rng, loss_of, model, *optimizers, layout, config, run)
    assert graphs() - before == len(traced) == len(met) == 31


def test_the_forward_pass_of_gpt_is_one_graph():
    model, rng = test_train_gpt.small_model({**test_train_gpt.META, "document_start": 250}), torch.Generator()
    forward = compiled(model.forward)
    for step in range(4):
        tokens = torch.randint(256, (2, 64), generator=rng.manual_seed(step))
        mask = model.mask(tokens)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            y = forward(tokens, mask)
        y.sum().backward()
        assert torch.allclose(y, model(tokens, mask), atol=1e-5)


def test_the_forward_pass_of_maskgit_is_one_graph(maskgit_model):
    tokens, labels, masked = (part[:12] for part in train_maskgit.read_frozen(train_maskgit.CONFIGS["cpu"])[:3])
    model = maskgit_model
    forward = compiled(model.forward)
    for step in range(3):
        rows = slice(4 * step, 4 * step + 4)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            y = forward(tokens[rows], labels[rows], masked[rows])
        y.sum().backward()
        assert torch.allclose(y, model(tokens[rows], labels[rows], masked[rows]), atol=1e-5)


@pytest.mark.skipif(not shutil.which("g++"), reason="a CPU compiles with g++")
def test_flex_attention_inside_a_compiled_model():
    """As on CUDA: the whole forward pass compiled, BlockMasks built outside it; no gradients, a CPU has none for it."""
    model = test_train_gpt.small_model({**test_train_gpt.META, "document_start": 250}, window=100, depth=1)
    rng = torch.Generator()
    torch._dynamo.reset()
    forward, mask_cache = torch.compile(model.forward, fullgraph=True, dynamic=False), {}
    for step in range(3):
        tokens = torch.randint(256, (2, 256), generator=rng.manual_seed(step))
        documents = (tokens >= 250).cumsum(1)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=step > 0):
            y = forward(tokens, train_gpt.block_mask(model.mask_mod, documents, mask_cache))
        assert torch.allclose(y, model(tokens, model.mask(tokens)), atol=1e-4)
