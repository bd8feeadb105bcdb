"""What tests have forked processes do besides running a script (see runs.py): it has to be found where they import."""
import json
import os
import signal
import time
import types
import zlib

import torch
import torch.distributed as dist

import checkpoints
import runs
import sharding
import train_4m


def spy_on_scenes(script):
    """Have train_4m.py write down, rank by rank, a number for every scene that it trains on."""
    scenes, loss = [], script.masked_loss

    def spy(model, tokens, *rest):
        scenes.extend(zlib.crc32(row.numpy().tobytes()) for row in tokens if row.any())  # the warm-up's are all zero
        (script.ROOT / f"rows{os.environ.get('RANK', 0)}.json").write_text(json.dumps(scenes))
        return loss(model, tokens, *rest)
    script.masked_loss = spy


def kill_rank_1(script):
    """Have the second process of train_4m.py die in its fifth step."""
    steps, loss = [], script.masked_loss

    def dies(model, tokens, *rest):
        steps.extend([1] * bool(tokens.any()))  # the warm-up's are all zero
        if os.environ["RANK"] == "1" and len(steps) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(model, tokens, *rest)
    script.masked_loss = dies


def wait_for_a_signal(script):
    """Have a script wait after its thirtieth step until a signal reaches this process, or another one of the run, which
    says so in a file."""
    next_action = checkpoints.Saver.next_action

    def waits(saver):
        while saver.run.step == 30 and not (saver.signals or (script.ROOT / "signalled").exists()):
            time.sleep(0.01)
        if saver.signals:
            (script.ROOT / "signalled").touch()
        return next_action(saver)
    checkpoints.Saver.next_action = waits


def stand_alone(script):
    """Have a script do as it does without data/ beside it."""
    script.STANDALONE = True


def break_compiler(script):
    """As with CXX=/bin/false in the environment, which is read when torch is imported."""
    torch._inductor.config.cpp.cxx = (None, "/bin/false")


def compile_divided_blocks(script):
    """Have train_4m.py compile its blocks as on CUDA, but with torch's eager backend, before they are divided; how many
    graphs there are at the end in a file."""
    result = script.Run.result

    class Compiled(script.Nano4M):
        def __init__(self, config, layout):
            super().__init__(config, layout)
            for block in (*self.encoder, *self.decoder):
                block.compile(fullgraph=True, dynamic=True, backend="eager")

    def count(run, *rest):
        found = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        (script.ROOT / f"graphs{run.rank}.txt").write_text(str(found))
        result(run, *rest)
    script.Nano4M, script.Run.result = Compiled, count


def seed_weights(script):
    """Have a script draw the same weights whatever was drawn before: a divided model is made without draws."""
    init = script.init_weights

    def seeded(model):
        torch.manual_seed(0)
        init(model)
    script.init_weights = seeded


def keep_states(script):
    """Have a script draw the same weights, and keep every state that it saves."""
    seed_weights(script)
    runs.keep_states(setattr)


def other_state_on_rank_1(script):
    """Have the second process find a state of another step, as on a machine that has kept an older file."""
    read = checkpoints.read_state

    def read_other(run):
        state = read(run)
        state["counters"]["step"] -= run.rank
        return state
    checkpoints.read_state = read_other


def divided_weights(path):
    """Divide a small model among the ranks: how many weights each holds, and what it has of them all, in files."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    world = dist.get_world_size()
    config = train_4m.Config(dim=64, head_dim=32, enc_depth=2, dec_depth=2)
    run = types.SimpleNamespace(world=world, device=torch.device("cpu"), precision="fp32", script=train_4m,
                                config=config)
    layout = train_4m.Layout(train_4m.read_frozen(config)[2])
    with torch.device("meta"):
        model = train_4m.Nano4M(config, layout)
    blocks = (*model.encoder, model.local, *model.decoder, model.mix)
    torch.manual_seed(0)
    sharding.shard_blocks(model, blocks, run, train_4m.init_weights)
    own = sum(p.to_local().numel() for block in blocks for p in block.parameters())
    torch.save((own, sharding.whole_weights(model)), f"{path}.{rank}")
    dist.barrier()
    dist.destroy_process_group()


def muon_steps(path, dtype=torch.float32):
    """Four steps of Muon and Adam on made-up gradients, which the ranks share; the parameters and momenta in a file."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo")
    rng = torch.Generator().manual_seed(0)
    shapes = [(24, 8)] * 5 + [(8, 8)] * 2 + [(8, 24)]  # uneven among 2, 3 or 4 ranks
    params = [torch.nn.Parameter(torch.randn(shape, generator=rng)) for shape in shapes]
    rest = [torch.nn.Parameter(torch.randn(7, generator=rng)) for _ in range(2)]
    muon = train_4m.Muon(params, 0.9, rank, world, dtype)
    adam = torch.optim.Adam(rest, lr=0.1)
    for step in range(4):
        if step == 2 and world > 1:  # a state goes through any number of ranks
            kept = muon.momentum_buffers()
            muon = train_4m.Muon(params, 0.9, rank, world, dtype)
            checkpoints.load_momentum(muon, kept)
        for i, p in enumerate((*params, *rest)):
            whole = torch.randn(p.shape, generator=rng)
            parts = torch.randn(world, *p.shape, generator=torch.Generator().manual_seed(i))
            parts[i % world] += whole - parts.sum(0)
            p.grad = parts[rank].clone()
            if i in (1, 9):  # one parameter has a gradient on the last rank alone
                p.grad = whole if rank == world - 1 else None
            if i == 2:  # and one nowhere
                p.grad = None
        train_4m.sum_gradients(adam, world)
        muon.step(0.02)
        adam.step()
    momenta = muon.momentum_buffers()  # by all ranks
    if rank == 0:
        torch.save([p.data for p in (*params, *rest)] + momenta, path)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
