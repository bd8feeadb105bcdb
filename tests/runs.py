"""Whole runs of the training scripts, each process forked from one that has imported everything: 0.1 s, not 5.

A forked process ends as `python train_x.py` would, with the same messages and exit codes, but it compiles nothing,
draws no samples and does not measure the machine. The tests of the launchers, torchrun and run.sh, start them for real.
"""
import importlib
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
import types
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import pytest
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
SERVER = multiprocessing.get_context("forkserver")
ENV = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # of a forked process, whatever the tests' own has
PRELOAD = ["torch._dynamo", "train_4m", "train_flow", "train_gpt", "train_maskgit", "train_vlm", "draw", "judge",
           "scenes", "streams", "studio", "tokenizer", "runs", "ranks"]
START = "# --- copied: start ---"


# ------------------------------------------------------------------------------------------------------------
# In a forked process

def spare_time(script, set_attribute, samples=False):
    """Have a script's run leave out what takes longer than all the rest of a short run."""
    set_attribute(importlib.import_module("machine"), "matmul_flops", lambda *_: 1e12)
    if hasattr(script, "Run") and not samples:
        set_attribute(script.Run, "prepare_show", lambda *_, **__: None)
    for name in {"write_samples", "draw_samples"} & set(vars(script)):
        if not samples:
            set_attribute(script, name, lambda *_: {})


def be_script(task, argv, root, spy, compiled):
    """Do as `python train_<task>.py <argv>` does in a folder with a copy of the script."""
    module = importlib.import_module(f"train_{task}")
    if not compiled:
        torch.compile = lambda function, **_: function
        torch.nn.Module.compile = lambda module, **_: None
    module.ROOT, module.HERE = Path(root), Path(root) / f"train_{task}.py"
    spare_time(module, setattr)
    if spy:
        spy(module)
    source = module.HERE.read_text()
    start = source.index(START)
    lines = "\n" * source[:start].count("\n")  # so that a traceback has the right ones
    sys.argv = [f"train_{task}.py", *argv]
    exec(compile(lines + source[start:], module.HERE, "exec"), {**vars(module), "__name__": "__main__"})


def be_command(path, argv):
    """Do as `python <path> <argv>` does."""
    sys.argv = [str(path), *argv]
    runpy.run_path(path, run_name="__main__")


def be_child(folder, env, name, function, arguments):
    """Redirect what is printed into files, set the environment, and call the function."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        file = os.open(Path(folder) / f"{name}.{number}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        stream.reconfigure(line_buffering=True)
    os.environ.update(env)
    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    function(*arguments)


# ------------------------------------------------------------------------------------------------------------
# In the tests

def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class World:
    """The processes that call function(*arguments) as the ranks of one run."""

    def __init__(self, function, arguments, world=1, env=()):
        path = os.pathsep.join([*map(str, (ROOT, ROOT / "data", ROOT / "records", ROOT / "tests"))])
        with mock.patch.dict(os.environ, {**ENV, "PYTHONPATH": path}):  # of the process that all others are forked from
            SERVER.set_forkserver_preload(PRELOAD)
            forkserver.ensure_running()
        self.folder = tempfile.TemporaryDirectory()
        place = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} if world > 1 else {}
        self.processes = []
        for rank in range(world):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
            words = (self.folder.name, {**ENV, **place, **ranks, **dict(env)}, str(rank), function, arguments)
            self.processes.append(SERVER.Process(target=be_child, args=words, daemon=True))
        for process in self.processes:
            process.start()

    def printed(self, number, rank=None):
        """What one rank, or all of them, printed so far on stream 1 or 2."""
        ranks = range(len(self.processes)) if rank is None else [rank]
        paths = [Path(self.folder.name) / f"{rank}.{number}" for rank in ranks]
        return "".join(path.read_text() for path in paths if path.exists())

    @property
    def out(self):
        return self.printed(1)

    @property
    def err(self):
        return self.printed(2)

    def wait_for(self, done, seconds=120):
        """Until done() is true; its value."""
        end = time.monotonic() + seconds
        while not (value := done()):
            assert all(process.is_alive() for process in self.processes) and time.monotonic() < end, self.out + self.err
            time.sleep(0.02)
        return value

    def wait_for_steps(self):
        """Until a training script has shown a loss."""
        return self.wait_for(lambda: "loss=" in self.err)

    def kill(self, number=signal.SIGKILL, rank=0):
        os.kill(self.processes[rank].pid, number)

    def wait(self, seconds=300):
        """The ranks' exit codes, once they have ended; the negative of the signal that ended them."""
        end = time.monotonic() + seconds
        try:
            for process in self.processes:
                process.join(max(0, end - time.monotonic()))
                assert process.exitcode is not None, f"still running after {seconds} s: {self.out}{self.err}"
        finally:
            for process in self.processes:
                process.kill()
        return [process.exitcode for process in self.processes]

    def succeed(self):
        """Wait, and see that all went well."""
        assert self.wait() == [0] * len(self.processes), self.out + self.err
        return self


def start(task, argv, root, world=1, spy=None, env=(), compiled=False):
    """Start train_<task>.py in a folder that make_root made."""
    return World(be_script, (task, list(argv), str(root), spy, compiled), world, env)


def run(*words, **settings):
    """The finished World of a script that had to succeed."""
    return start(*words, **settings).succeed()


def refusal(path, *argv):
    """What any script of ours prints when it refuses its command line."""
    world = World(be_command, (str(path), argv))
    assert world.wait() != [0] and world.out == ""
    return world.err


def footers(root):
    """The lines of a folder's runs.jsonl."""
    return [json.loads(line) for line in (root / "records/runs.jsonl").read_text().splitlines()]


def make_root(task, folder):
    """A folder that a copy of a script can run in."""
    folder.mkdir(exist_ok=True)
    name = f"train_{task}.py"
    shutil.copy(ROOT / name, folder / name)
    (folder / "data").symlink_to(ROOT / "data")
    return folder


def run_here(task, monkeypatch, root, argv, samples=False):
    """main in this process, writing into root; nothing is compiled, and the machine is not measured."""
    script = importlib.import_module(f"train_{task}")
    monkeypatch.setattr(script, "ROOT", root)
    spare_time(script, monkeypatch.setattr, samples)
    monkeypatch.setattr(script, "keep_memory", lambda: None, raising=False)  # it would be for good
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: None)
    monkeypatch.setattr(sys, "path", sys.path[:])
    try:
        script.main(argv)
    finally:  # a bar of a run that was cut off would leave tqdm's list when it is collected: at worst while another reads it
        for bar in list(tqdm._instances):
            bar.close()


def fake_run(rank=0, world=1, precision="fp32"):
    """What a script's functions read of a Run."""
    return types.SimpleNamespace(rank=rank, world=world, precision=precision, device=torch.device("cpu"))


def step_gradients(monkeypatch, script, model, take_step):
    """Loss and gradients, one after another, of the step that take_step(muon, adam) takes; nothing is moved."""
    found = []

    def sum_gradients(*_):
        found.extend(p.grad.flatten() for p in model.parameters() if p.grad is not None)
    monkeypatch.setattr(script, "sum_gradients", sum_gradients)
    still = types.SimpleNamespace(step=lambda *_: None, param_groups=[{"peak": 1}])
    loss = take_step(still, still)
    return loss.item(), torch.cat(found)


def keep_states(set_attribute):
    """Have every state that is saved from here on kept as <step>.pt beside the latest one: that is of the last step."""
    checkpoints = importlib.import_module("checkpoints")
    plain = checkpoints.Saver.save

    def save(saver, *rest):
        plain(saver, *rest)
        folder = saver.run.script.ROOT / "checkpoints"
        if saver.run.rank == 0:
            for path in folder.glob("*.state.pt"):
                shutil.copy(path, folder / f"{saver.run.step}.pt")
    set_attribute(checkpoints.Saver, "save", save)


def losses(root):
    """Every validation loss, in order, that the one log in a folder has, to the four digits that are shown."""
    log, = (root / "logs").iterdir()
    return [float(loss) for loss in re.findall(r"(?m)^step:\d+/\d+ val_loss:(\S+)", log.read_text())]


def assert_same_on_two_processes(task, argv, folder, spy=None):
    """A run in float32 by one process and by two differs by rounding alone; the folders of the two runs."""
    roots = [make_root(task, folder / name) for name in ("one", "two")]
    for world in [start(task, argv, root, world, spy) for world, root in enumerate(roots, 1)]:
        world.succeed()
    (one,), (two,) = map(footers, roots)
    assert (one["world_size"], two["world_size"]) == (1, 2) and one["tokens"] == two["tokens"]
    assert two["val_loss"] == pytest.approx(one["val_loss"], abs=1e-4)
    first, second = map(losses, roots)
    assert len(first) > 1 and second == pytest.approx(first, abs=2e-4), "shown to four digits"
    return roots
