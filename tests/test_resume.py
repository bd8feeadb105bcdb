"""A run that is cut off goes on where it was: saved states, SIGKILL, SIGTERM, a dead process, a full disk."""
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

import test_train_4m
import test_train_flow
import test_train_gpt
import test_train_maskgit
import test_train_vlm
from test_train_4m import ENV, SMALL, TORCHRUN, make_root
from train_4m import Fault

MODULES = {"4m": test_train_4m, "flow": test_train_flow, "gpt": test_train_gpt, "maskgit": test_train_maskgit,
           "vlm": test_train_vlm}
tiny_4m, tiny_flow, tiny_gpt = test_train_4m.tiny, test_train_flow.tiny, test_train_gpt.tiny
tiny_maskgit, tiny_vlm = test_train_maskgit.tiny, test_train_vlm.tiny
frozen = test_train_maskgit.frozen


def result(root):
    """What the last run in a folder came to: (its line in runs.jsonl, its weights)."""
    run = json.loads((root / "records/runs.jsonl").read_text().splitlines()[-1])
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
    module, data = MODULES[task], request.getfixturevalue(f"tiny_{task}")
    script = getattr(module, f"train_{task}")
    argv = [*module.SMALL, *([f"--data={data}"] if task == "gpt" else data[1]), "--num_steps=20", "--eval_every=9",
            "--save=true", "--save_every=7"]
    whole, cut = module.make_root(tmp_path / "whole"), module.make_root(tmp_path / "cut")
    module.run_here(monkeypatch, whole, argv)
    plain, saved = script.save_state, []

    def save_state(log, why, progress, *rest):
        plain(log, why, progress, *rest)
        saved.append(progress["step"])
        if len(saved) == 2:
            raise CutOff
    monkeypatch.setattr(script, "save_state", save_state)
    with pytest.raises(CutOff):
        module.run_here(monkeypatch, cut, argv)
    assert saved == [7, 14] and not (cut / "records/runs.jsonl").exists()
    state, = (cut / "checkpoints").glob("*.state.safetensors")
    time.sleep(1)  # run ids have seconds
    module.run_here(monkeypatch, cut, [*argv, f"--resume={state}"])
    assert_same(result(cut), result(whole))
    assert result(cut)[0]["train_seconds"] > 0


def launch(root, argv, launcher=(sys.executable, "-u")):
    return subprocess.Popen([*launcher, "train_4m.py", *argv], cwd=root, env=ENV, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True)


def wait_for(done, process, seconds=60):
    """Until done() is true; its value."""
    end = time.time() + seconds
    while not (value := done()):
        assert process.poll() is None and time.time() < end, process.communicate()[0]
        time.sleep(0.02)
    return value


def finish(root, argv):
    process = launch(root, argv)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    return out


@pytest.fixture(scope="module")
def uninterrupted(tiny_4m, tmp_path_factory):
    """(the overrides of a run of 400 steps, its result)."""
    argv = [*SMALL, *tiny_4m[1], "--num_steps=400", "--eval_every=400", "--save=true", "--save_every=20"]
    root = make_root(tmp_path_factory.mktemp("uninterrupted"))
    finish(root, argv)
    return argv, result(root)


def test_sigkill(uninterrupted, tmp_path):
    argv, expected = uninterrupted
    root = make_root(tmp_path / "root")
    process, state = launch(root, argv), None
    states = lambda: list((root / "checkpoints").glob("*.state.safetensors"))
    state, = wait_for(states, process)
    time.sleep(0.2 + int.from_bytes(os.urandom(1), "big") / 300)  # anywhere in a step, or in the middle of saving
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (root / "records/runs.jsonl").exists(), "killed before it was done"
    finish(root, [*argv, f"--resume={state}"])
    assert_same(result(root), expected)


def test_sigterm(uninterrupted, tmp_path):
    """SLURM's signal: the state is saved at once, whatever save_every says, and the exit status is 0."""
    argv, expected = uninterrupted
    argv = [argument for argument in argv if not argument.startswith("--save_every")]
    root = make_root(tmp_path / "root")
    process = launch(root, argv)
    line = lambda: any("loss=" in process.stdout.readline() for _ in range(30))
    wait_for(line, process)
    process.terminate()
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0, out
    state, = (root / "checkpoints").iterdir()
    step = int(re.search(r"state of step (\d+)", out)[1])
    assert 0 < step < 400 and f"go on with the same command and --resume={state}" in out
    assert not (root / "records/runs.jsonl").exists()
    finish(root, [*argv, f"--resume={state}"])
    assert_same(result(root), expected)


def test_sigterm_of_two_processes_resumed_by_one(uninterrupted, tmp_path):
    """The launcher passes the signal on; ranks agree on the step; the state does not depend on their number."""
    argv, expected = uninterrupted
    root = make_root(tmp_path / "root")
    argv = [argument for argument in argv if not argument.startswith("--save_every")]
    process = launch(root, argv, TORCHRUN)
    wait_for(lambda: any("loss=" in process.stdout.readline() for _ in range(30)), process)
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert "stopped by SIGTERM" in out, out
    state, = (root / "checkpoints").iterdir()
    finish(root, [*argv, f"--resume={state}"])
    assert result(root)[0]["val_loss"] == pytest.approx(expected[0]["val_loss"], abs=0.05)  # rounding grows


DEAD = """
import os, sys
import train_4m
plain, calls = train_4m.masked_loss, []
def dies(*rest):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 15:
        os.kill(os.getpid(), 9)
    return plain(*rest)
train_4m.masked_loss, train_4m.HERE = dies, train_4m.HERE.with_name("train_4m.py")
source = train_4m.HERE.read_text()
exec(source[source.index("# --- copied: start ---"):], {**vars(train_4m), "__name__": "__main__"})
"""


def test_a_dead_process_ends_the_others(tiny_4m, tmp_path):
    root = make_root(tmp_path / "root")
    (root / "dead.py").write_text(DEAD)
    start = time.time()
    done = subprocess.run([*TORCHRUN, "dead.py", *SMALL, *tiny_4m[1], "--num_steps=5000"], cwd=root, env=ENV,
                          capture_output=True, text=True, timeout=90)
    assert done.returncode != 0 and time.time() - start < 60, "no hang"
    assert "train_4m.py: another process of this run has ended" in done.stderr, done.stderr[-3000:]


def test_a_full_disk_keeps_the_state_before(tiny_4m, tmp_path, monkeypatch, capsys):
    root, script = make_root(tmp_path / "root"), test_train_4m.train_4m
    plain, kept, limits = script.save_state, [], resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_state(*rest):
        if kept:  # no file may grow beyond 100 kB from here on
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            plain(*rest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        path, = (root / "checkpoints").iterdir()
        kept.append(path.read_bytes())
    monkeypatch.setattr(script, "save_state", save_state)
    test_train_4m.run_here(monkeypatch, root, [*SMALL, *tiny_4m[1], "--num_steps=12", "--save_every=4"])
    assert len(kept) == 2 and kept[0] == kept[1], "the first state, and nothing half-written beside it"
    out = capsys.readouterr().out
    assert "the state of step 8 could not be saved" in out and "any before it is kept" in out
    assert result_line(root)["steps"] == 12, "the run itself goes on"


def result_line(root):
    return json.loads((root / "records/runs.jsonl").read_text().splitlines()[-1])


def test_bad_states(tiny_4m, tmp_path, monkeypatch):
    root = make_root(tmp_path / "root")
    argv = [*SMALL, *tiny_4m[1], "--num_steps=6", "--save_every=4", "--save=true"]
    run = lambda *more: test_train_4m.run_here(monkeypatch, root, [*argv, *more])
    run()
    state, = (root / "checkpoints").glob("*.state.safetensors")
    weights, = set((root / "checkpoints").iterdir()) - {state}
    (tmp_path / "half").write_bytes(state.read_bytes()[:-1000])
    for path in (weights, tmp_path / "half", tmp_path / "missing"):
        with pytest.raises(Fault, match="is not the state of a run"):
            run(f"--resume={path}")
    with pytest.raises(Fault, match="is of a run with --muon_lr=0.03: pass the same"):
        run(f"--resume={state}", "--muon_lr=0.01")
    with pytest.raises(Fault, match="--resume goes on with a run"):
        run(f"--resume={state}", "--num_steps=0")
