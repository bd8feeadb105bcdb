"""A run that is cut off goes on where it was: saved states, SIGKILL, SIGTERM, a dead process, a full disk."""
import os
import re
import resource
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from safetensors.torch import load_file

import checkpoints
import machine
import ranks
import runs
import test_train_4m
import test_train_flow
import test_train_gpt
import test_train_maskgit
import test_train_vlm
from test_train_4m import ENV, SMALL, make_root
from train_4m import Fault

MODULES = {"4m": test_train_4m, "flow": test_train_flow, "gpt": test_train_gpt, "maskgit": test_train_maskgit,
           "vlm": test_train_vlm}
tiny_4m, tiny_flow, tiny_gpt = test_train_4m.tiny, test_train_flow.tiny, test_train_gpt.tiny
tiny_maskgit, tiny_vlm = test_train_maskgit.tiny, test_train_vlm.tiny
frozen = test_train_maskgit.frozen


def arguments(task, request):
    """The arguments that point a script to its tiny set."""
    data = request.getfixturevalue(f"tiny_{task}")
    return [f"--data={data}"] if task == "gpt" else data[1]


def result(root):
    """What the last run in a folder came to: (its line in runs.jsonl, its weights)."""
    run = runs.footers(root)[-1]
    return run, load_file(root / "checkpoints" / f"{run['run_id']}.safetensors")


def assert_same(found, expected):
    assert found[0]["val_loss"] == expected[0]["val_loss"], "to the last digit"
    assert found[0]["steps"] == expected[0]["steps"] and found[0]["tokens"] == expected[0]["tokens"]
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        assert found[1][name].equal(value), name


class CutOff(BaseException):
    """Nothing in a script catches it."""


@pytest.mark.parametrize("task", MODULES)
def test_a_resumed_run_is_the_same_run(task, request, tmp_path, monkeypatch):
    """Cut off after the state of step 14 of 20, over an epoch's end, and resumed: the same weights bit by bit."""
    module = MODULES[task]
    argv = [*module.SMALL, *arguments(task, request), "--num_steps=20", "--eval_every=9", "--save=true",
            "--save_every=7"]
    whole, cut = module.make_root(tmp_path / "whole"), module.make_root(tmp_path / "cut")
    module.run_here(monkeypatch, whole, argv)
    plain, saved = checkpoints.Saver.save, []

    def save(saver, *rest):
        plain(saver, *rest)
        saved.append(saver.run.step)
        if len(saved) == 2:
            raise CutOff
    monkeypatch.setattr(checkpoints.Saver, "save", save)
    with pytest.raises(CutOff):
        module.run_here(monkeypatch, cut, argv)
    assert saved == [7, 14] and not (cut / "records/runs.jsonl").exists()
    state, = (cut / "checkpoints").glob("*.state.pt")
    before = torch.load(state, weights_only=True)["counters"]["seconds"]
    root = module.make_root(tmp_path / "resumed")
    module.run_here(monkeypatch, root, [*argv, f"--resume={state}"])
    assert_same(result(root), result(whole))
    assert result(root)[0]["train_seconds"] > before > 0


@pytest.fixture(scope="module")
def uninterrupted(tiny_4m, tmp_path_factory):
    """(the overrides of a run of 60 steps, its result)."""
    # low rates: at the record's, rounding in float32 may have grown to 0.0001 nats by the end
    argv = [*SMALL, *tiny_4m[1], "--num_steps=60", "--eval_every=60", "--save=true", "--muon_lr=0.01", "--adam_lr=0.001"]
    root = make_root(tmp_path_factory.mktemp("uninterrupted"))
    runs.run("4m", argv, root)
    return argv, result(root)


def stopped(world):
    """Where a run that was sent SIGTERM left its state: (the step, the file)."""
    step, path = re.search(r"state of step (\d+) in (\S+)", world.out).groups()
    assert f"stopped: continue with the same command and --resume={path}" in world.out
    return int(step), path


def resumed(argv, state, folder):
    """What a run resumed in a new folder comes to; in the old one its log could have the same name, to the second."""
    root = make_root(folder / "resumed")
    runs.run("4m", [*argv, f"--resume={state}"], root)
    return result(root)


def test_sigkill(uninterrupted, tmp_path):
    argv, expected = uninterrupted
    root = make_root(tmp_path / "root")
    world = runs.start("4m", [*argv, "--save_every=5"], root, spy=ranks.wait_for_a_signal)
    state, = world.wait_for(lambda: list((root / "checkpoints").glob("*.state.pt")))
    time.sleep(int.from_bytes(os.urandom(1), "big") / 1000)  # anywhere in a step, or in the middle of saving
    world.kill()
    assert world.wait() == [-signal.SIGKILL]
    assert not (root / "records/runs.jsonl").exists(), "killed before it was done"
    assert_same(resumed([*argv, "--save_every=5"], state, tmp_path), expected)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves(uninterrupted, tmp_path, number):
    """SLURM's signal and Ctrl-C: the state is saved at once, whatever save_every says, and the exit status is 0."""
    argv, expected = uninterrupted
    root = make_root(tmp_path / "root")
    world = runs.start("4m", argv, root, spy=ranks.wait_for_a_signal)
    world.wait_for_steps()
    world.kill(number)
    step, state = stopped(world.succeed())
    assert 0 < step < 60 and not (root / "records/runs.jsonl").exists()
    assert_same(resumed(argv, state, tmp_path), expected)


def test_sigterm_of_two_processes_resumed_by_one(uninterrupted, tmp_path):
    """One of them is sent it, both stop at the same step; the state does not depend on their number."""
    argv, expected = uninterrupted
    root = make_root(tmp_path / "root")
    world = runs.start("4m", argv, root, 2, spy=ranks.wait_for_a_signal)
    world.wait_for_steps()
    world.kill(signal.SIGTERM, rank=1)
    step, state = stopped(world.succeed())
    assert step % 10 == 0 and 0 < step < 60
    assert resumed(argv, state, tmp_path)[0]["val_loss"] == pytest.approx(expected[0]["val_loss"], abs=1e-4)


def test_two_processes_resumed_by_two(uninterrupted, tmp_path):
    """On the same number of processes it is the same run, bit by bit."""
    argv = [*uninterrupted[0], "--num_steps=20"]
    roots = [make_root(tmp_path / name) for name in ("whole", "resumed")]
    runs.run("4m", [*argv, "--save_every=10"], roots[0], 2, ranks.keep_states)
    runs.run("4m", [*argv, f"--resume={roots[0]}/checkpoints/10.pt"], roots[1], 2, ranks.seed_weights)
    assert_same(result(roots[1]), result(roots[0]))


def test_every_rank_has_the_same_state(uninterrupted, tmp_path):
    """Machines with folders of their own may have states of different steps: one sentence, and no rank waits."""
    argv, root = [*uninterrupted[0], "--num_steps=20"], make_root(tmp_path / "root")
    runs.run("4m", [*argv, "--save_every=10"], root, 2, ranks.keep_states)
    world = runs.start("4m", [*argv, f"--resume={root}/checkpoints/10.pt"], root, 2, ranks.other_state_on_rank_1)
    assert 0 not in world.wait() and world.err.count("is not the same state on all ranks, which have steps 10, 9:") == 2


def test_torchrun_passes_sigterm_on(tiny_4m, tmp_path):
    root, out = make_root(tmp_path / "root"), tmp_path / "out"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_4m.py"]
    with open(out, "w") as file:
        process = subprocess.Popen([*launcher, *SMALL, *tiny_4m[1], "--num_steps=20000"], cwd=root, env=ENV,
                                   stdout=file, stderr=subprocess.STDOUT)
    while process.poll() is None and "loss=" not in out.read_text():
        time.sleep(0.02)
    process.terminate()
    process.wait(300)
    assert "stopped: continue with" in out.read_text(), out.read_text()
    assert len(list((root / "checkpoints").iterdir())) == 1


def test_a_dead_process_ends_the_others(tiny_4m, tmp_path):
    world = runs.start("4m", [*SMALL, *tiny_4m[1], "--num_steps=5000"], make_root(tmp_path / "root"), 2,
                       ranks.kill_rank_1)
    assert world.wait() == [1, -signal.SIGKILL], "no hang"


def test_a_full_disk_keeps_the_state_before(tiny_4m, tmp_path, monkeypatch, capsys):
    root = make_root(tmp_path / "root")
    plain, kept, limits = checkpoints.Saver.save, [], resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(*rest):
        if kept:  # no file may grow beyond 100 kB from here on
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            plain(*rest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        path, = (root / "checkpoints").iterdir()
        kept.append(path.read_bytes())
    monkeypatch.setattr(checkpoints.Saver, "save", save)
    test_train_4m.run_here(monkeypatch, root, [*SMALL, *tiny_4m[1], "--num_steps=12", "--save_every=4"])
    assert len(kept) == 3 and kept[0] == kept[1] == kept[2], "the first state, and nothing half-written beside it"
    out = capsys.readouterr().out
    assert "could not be written" in out and "what was there before is kept" in out
    assert runs.footers(root)[-1]["steps"] == 12, "the run itself goes on"


def test_bad_states(tiny_4m, tmp_path, monkeypatch):
    root = make_root(tmp_path / "root")
    argv = [*SMALL, *tiny_4m[1], "--num_steps=6", "--save_every=4", "--save=true"]
    run = lambda *more: test_train_4m.run_here(monkeypatch, root, [*argv, *more])
    run()
    state, = (root / "checkpoints").glob("*.state.pt")
    weights, = set((root / "checkpoints").iterdir()) - {state}
    (tmp_path / "half").write_bytes(state.read_bytes()[:-1000])
    for path in (weights, tmp_path / "half", tmp_path / "missing"):
        with pytest.raises(Fault, match="is not the state of a run"):
            run(f"--resume={path}")
    with pytest.raises(Fault, match="is of a run with --muon_lr=[0-9.]+: pass the same"):
        run(f"--resume={state}", "--muon_lr=0.0123")
    with pytest.raises(Fault, match="--resume continues a run"):
        run(f"--resume={state}", "--num_steps=0")
    with pytest.raises(Fault, match="is at step 6, beyond --num_steps=3"):
        run(f"--resume={state}", "--num_steps=3")
    with pytest.raises(Fault, match="is of a run with --precision=fp32: pass the same, or none"):
        run(f"--resume={state}", "--precision=bf16")


def test_a_resumed_run_keeps_its_precision(tiny_4m, tmp_path, monkeypatch):
    """On another machine the other one may be faster."""
    argv = [*(word for word in SMALL if "--precision" not in word), *tiny_4m[1]]
    found = {}
    for name, precision, more in ("first", "fp32", ["--num_steps=6", "--save_every=4"]), ("again", "bf16", ["--num_steps=8"]):
        monkeypatch.setattr(machine, "time_products", lambda *_: [precision, 1e9])
        test_train_4m.run_here(monkeypatch, make_root(tmp_path / name), [*argv, *more, *found.values()])
        assert runs.footers(tmp_path / name)[-1]["precision"] == "fp32"
        found = {path: f"--resume={path}" for path in (tmp_path / name / "checkpoints").glob("*.state.pt")}


def test_a_state_from_before_a_field(tiny_4m, tmp_path, monkeypatch):
    """What its script could not do was off."""
    root = make_root(tmp_path / "root")
    argv = [*SMALL, *tiny_4m[1], "--save_every=4"]
    test_train_4m.run_here(monkeypatch, root, [*argv, "--num_steps=6"])
    path, = (root / "checkpoints").glob("*.state.pt")
    state = torch.load(path, weights_only=True)
    for field in "dec_self", "pads":
        del state["config"][field]
    del state["precision"]
    torch.save(state, path)
    test_train_4m.run_here(monkeypatch, root, [*argv, "--num_steps=8", f"--resume={path}"])
    with pytest.raises(Fault, match="is of a run with --pads=False: pass the same"):
        test_train_4m.run_here(monkeypatch, root, [*argv, "--num_steps=9", f"--resume={path}", "--pads=true"])


def test_a_second_signal_ends_the_run_at_once():
    """So does one that comes while samples are drawn."""
    numbers = signal.SIGTERM, signal.SIGINT
    before = [signal.getsignal(number) for number in numbers]
    try:
        saver = checkpoints.Saver(types.SimpleNamespace(config=types.SimpleNamespace(num_steps=1), file=None))
        assert [signal.getsignal(number) for number in numbers] == [saver.receive] * 2
        saver.receive(signal.SIGTERM, None)
        assert saver.signals == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) is signal.default_int_handler
        saver.close()
        assert [signal.getsignal(number) for number in numbers] == [signal.SIG_DFL, signal.default_int_handler]
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


def test_signals_end_what_trains_nothing():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    run = types.SimpleNamespace(config=types.SimpleNamespace(num_steps=0), file=None)
    checkpoints.Saver(run)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_train_on(tiny_4m, tmp_path, monkeypatch, capsys):
    """A run that has ended may be made longer, and evaluated at other steps: clock and steps go on, and it is said."""
    root = make_root(tmp_path / "root")
    argv = [*SMALL, *tiny_4m[1], "--save_every=4"]
    test_train_4m.run_here(monkeypatch, root, [*argv, "--num_steps=6"])
    state, = (root / "checkpoints").glob("*.state.pt")
    before = torch.load(state, weights_only=True)["counters"]["seconds"]
    again = make_root(tmp_path / "again")
    test_train_4m.run_here(monkeypatch, again, [*argv, "--num_steps=10", "--eval_every=5", f"--resume={state}"])
    assert "6 steps were planned, 10 are now: from step 6 on the learning rates are those of the longer run" in \
        capsys.readouterr().out
    assert runs.footers(again)[-1]["steps"] == 10 and runs.footers(again)[-1]["train_seconds"] > before > 0
    assert len(runs.losses(again)) == 1
    capsys.readouterr()
    test_train_4m.run_here(monkeypatch, make_root(tmp_path / "plain"), [*argv[:-1], "--num_steps=6"])
    assert "state of" not in capsys.readouterr().out and not list((tmp_path / "plain/checkpoints").iterdir())
