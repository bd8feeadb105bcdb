"""Muon over any number of processes, a model divided among them, graphs without breaks."""
import contextlib
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


# ------------------------------------------------------------------------------------------------------------
# Muon and the sums of gradients

@pytest.fixture(scope="module")
def muon_steps(tmp_path_factory):
    """A function: what ranks.muon_steps came to on so many processes."""
    folder = tmp_path_factory.mktemp("muon")

    def steps(processes, dtype):
        path = folder / f"{processes}-{dtype}"
        if not path.exists():
            runs.World(ranks.muon_steps, (str(path), dtype), processes).succeed()
        return torch.load(path, weights_only=True)
    return steps


@pytest.mark.parametrize("processes, dtype, error", [(2, torch.float32, 1e-5), (3, torch.float32, 1e-5),
                                                     (3, torch.bfloat16, 2e-3)])
def test_muon_is_the_same_on_any_number_of_processes(processes, dtype, error, muon_steps):
    one, many = muon_steps(1, dtype), muon_steps(processes, dtype)
    assert len(one) == len(many) == 10 + 3
    for a, b in zip(one, many):
        assert a.shape == b.shape and a.dtype == b.dtype == torch.float32
        assert torch.allclose(a, b, atol=error), "up to the order of a sum"
    start = torch.Generator().manual_seed(0)
    first = torch.randn(24, 8, generator=start)
    assert (one[0] - first).abs().mean() > 0.01, "the steps are larger than what is tolerated"


# ------------------------------------------------------------------------------------------------------------
# FSDP2

def test_a_divided_model_is_the_same_run(tiny, tmp_path):
    """--shard=true on two processes, whose activations are computed again, against one process with the whole model, and
    its state resumed by that one."""
    argv = [*SMALL, *tiny[1], "--enc_depth=2", "--dec_depth=2", "--num_steps=20", "--eval_every=10", "--micro_batch=2"]
    roots = [make_root(tmp_path / name) for name in ("whole", "divided")]
    worlds = [runs.start("4m", [*argv, "--save=true"], roots[0], spy=ranks.seed_weights),
              runs.start("4m", [*argv, "--shard=true", "--recompute=true", "--save_every=10"], roots[1], 2,
                         ranks.keep_states)]
    (whole,), (divided,) = (runs.footers(root) for world, root in zip(worlds, roots) if world.succeed())
    assert divided["val_loss"] == pytest.approx(whole["val_loss"], abs=1e-4)
    assert divided["parameters"] == whole["parameters"] and divided["world_size"] == 2
    assert len(runs.losses(roots[1])) == 2 and runs.losses(roots[1]) == pytest.approx(runs.losses(roots[0]), abs=2e-4)
    runs.run("4m", [*argv, f"--resume={roots[1]}/checkpoints/10.pt"], make_root(tmp_path / "resumed"))
    again, = runs.footers(tmp_path / "resumed")
    assert again["val_loss"] == pytest.approx(whole["val_loss"], abs=1e-4)
    weights, = (roots[0] / "checkpoints").iterdir()
    runs.run("4m", [*argv, f"--load={weights}", "--num_steps=0", "--shard=true"], roots[1], 2)
    assert runs.footers(roots[1])[1]["val_loss"] == pytest.approx(whole["val_loss"], abs=1e-3), "in half precision"


def test_no_process_holds_a_divided_model(layout, tmp_path):
    """The weights are those of a whole model, also where rows do not divide evenly; all of them are on rank 0 alone."""
    config = train_4m.Config(dim=64, head_dim=32, enc_depth=2, dec_depth=2)
    model = train_4m.Nano4M(config, layout)
    torch.manual_seed(0)
    train_4m.init_weights(model)
    blocks = (*model.encoder, model.local, *model.decoder, model.mix)
    hidden = sum(p.numel() for block in blocks for p in block.parameters())
    runs.World(ranks.divided_weights, (str(tmp_path / "divided"),), 3).succeed()
    found = [torch.load(tmp_path / f"divided.{rank}", weights_only=True) for rank in range(3)]
    assert sum(own for own, _ in found) == hidden and max(own for own, _ in found) < 0.36 * hidden
    (_, weights), *others = found
    assert all(rest == {} for _, rest in others) and weights.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert weights[name].equal(value), name


def test_dividing_needs_processes(tiny, tmp_path, monkeypatch):
    with pytest.raises(train_4m.Fault, match="start several with torchrun"):
        test_train_4m.run_here(monkeypatch, make_root(tmp_path / "root"), [*SMALL, *tiny[1], "--shard=true"])
    with pytest.raises(train_4m.Fault, match="--recompute=true is for divided blocks: pass --shard=true"):
        test_train_4m.run_here(monkeypatch, make_root(tmp_path / "more"), [*SMALL, *tiny[1], "--recompute=true"])


@pytest.mark.parametrize("track,millions", [("gpu", 41), ("gpu-l", 613), ("gpu-xl", 2435)])
def test_sizes_of_the_gpu_configs(track, millions, layout):
    """Ours have no self-attention in the decoder: 4M's L has 705 M, its XL 2.8 B parameters."""
    config = train_4m.CONFIGS[track]
    with torch.device("meta"):
        model = train_4m.Nano4M(config, layout)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.05)
    assert config.track == track and config.shard == (track != "gpu")
    assert config.recompute == (track == "gpu-xl")
    assert config.recompute or config.micro_batch * config.dim * (config.enc_depth + config.dec_depth) == 256 * 512 * 12


@pytest.mark.parametrize("dim,depth,millions", [(768, 12, 198), (1024, 24, 705), (2048, 24, 2819)])
def test_with_4ms_decoder_blocks_have_the_papers_sizes(dim, depth, millions, layout):
    fields = {"dim": dim, "enc_depth": depth, "dec_depth": depth, "dec_self": True}
    config = train_4m.dataclasses.replace(train_4m.CONFIGS["gpu"], **fields)
    with torch.device("meta"):
        model = train_4m.Nano4M(config, layout)
    blocks = sum(p.numel() for block in (*model.encoder, *model.decoder) for p in block.parameters())
    assert blocks / 1e6 == pytest.approx(millions, abs=0.5)


# ------------------------------------------------------------------------------------------------------------
# Whole graphs: what torch.compile is given on CUDA has no breaks, and is compiled once a shape

BACKEND = "aot_eager_decomp_partition"


def graphs():
    """How many graphs torch.compile has made so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compile_blocks(blocks, dynamic, backend=BACKEND):
    """As main compiles them on CUDA."""
    torch._dynamo.reset()
    torch.fx.experimental._config.use_duck_shape = not dynamic
    for block in blocks:
        block.compile(fullgraph=True, dynamic=dynamic, backend=backend)
    return graphs()


def test_the_blocks_of_4m_are_two_graphs_for_all_shapes(layout, frozen):
    """With and without padding among the inputs, of encoder and decoder; and as many for evaluations."""
    tokens = frozen[0]
    model, plain = (test_train_4m.small_model(layout, enc_depth=2, dec_depth=2) for _ in range(2))
    config = train_4m.dataclasses.replace(train_4m.CONFIGS["cpu"], **test_train_4m.DIMS, batch=4, word_steps=3)
    run, rng, rng2 = runs.fake_run(), torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    run.slice, run.autocast = lambda batch: slice(0, batch), contextlib.nullcontext
    warm_up = {train_4m.step_shape(step, config, layout): step for step in range(config.num_steps)}  # as main has it
    before = compile_blocks((*model.encoder, *model.decoder), True)
    optimizers, others = (train_4m.make_optimizers(each, config, run) for each in (model, plain))
    for i, step in enumerate([*warm_up.values(), *range(60)]):
        batch = tokens[4 * i:4 * i + 4]
        with torch._dynamo.config.patch(error_on_recompile=i >= len(warm_up)):
            loss, *_ = train_4m.train_step(step, batch, rng, model, *optimizers, layout, config, run)
        if i < 3:
            again, *_ = train_4m.train_step(step, batch, rng2, plain, *others, layout, config, run)
            assert loss.item() == pytest.approx(again.item(), rel=1e-4)
    assert graphs() - before == 4
    with torch.no_grad():
        for n in (8, 12, 8):
            train_4m.predict_targets(model, tokens[:n], frozen[1][:n], layout.vocab)
    assert graphs() - before == 6


def test_a_divided_model_is_compiled_once(tiny, tmp_path):
    """Its blocks are, for any length and on any process: in 20 steps nothing meets a limit of torch.compile."""
    argv = [*SMALL[:-1], "--word_steps=4", *tiny[1], "--enc_depth=2", "--dec_depth=2", "--num_steps=20", "--shard=true",
            "--recompute=true"]
    runs.start("4m", argv, make_root(tmp_path / "root"), 2, ranks.compile_divided_blocks, compiled=True).succeed()
    found = [int(path.read_text()) for path in (tmp_path / "root").glob("graphs*.txt")]
    assert len(found) == 2 and max(found) <= 8


def test_the_blocks_of_gpt_are_one_graph():
    model, rng = test_train_gpt.small_model({**test_train_gpt.META, "document_start": 250}, depth=3), torch.Generator()
    plain = test_train_gpt.small_model({**test_train_gpt.META, "document_start": 250}, depth=3)
    before = compile_blocks(model.blocks, False)
    for step in range(4):
        tokens = torch.randint(256, (2, 64), generator=rng.manual_seed(step))
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            y = model(tokens, model.mask(tokens))
        y.sum().backward()
        assert torch.allclose(y, plain(tokens, model.mask(tokens)), atol=1e-5)
    assert graphs() - before == 1


def test_the_blocks_of_maskgit_are_one_graph():
    tokens, labels, masked = (part[:12] for part in train_maskgit.read_frozen(train_maskgit.CONFIGS["cpu"])[:3])
    model, plain = (test_train_maskgit.small_model(depth=3) for _ in range(2))
    before = compile_blocks(model.blocks, False)
    for step in range(3):
        rows = slice(4 * step, 4 * step + 4)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            y = model(tokens[rows], labels[rows], masked[rows])
        y.sum().backward()
        assert torch.allclose(y, plain(tokens[rows], labels[rows], masked[rows]), atol=1e-5)
    assert graphs() - before == 1


@pytest.mark.skipif(not shutil.which("g++"), reason="a CPU compiles with g++")
def test_flex_attention_inside_compiled_blocks():
    """As on CUDA: blocks compiled, BlockMasks built outside them; no gradients, a CPU has none for it."""
    model, plain = (test_train_gpt.small_model({**test_train_gpt.META, "document_start": 250}, window=100, depth=2)
                    for _ in range(2))
    rng, mask_cache = torch.Generator(), {}
    compile_blocks(model.blocks, False, "inductor")
    for step in range(3):
        tokens = torch.randint(256, (2, 256), generator=rng.manual_seed(step))
        documents = (tokens >= 250).cumsum(1)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=step > 0):
            y = model(tokens, train_gpt.block_mask(model.mask_mod, documents, mask_cache))
        assert torch.allclose(y, plain(tokens, model.mask(tokens)), atol=1e-4)
