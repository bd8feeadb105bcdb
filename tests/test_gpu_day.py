"""records/profile_run.py and records/gpu_day.py: counts of a step; stages done, left, resumed, ended."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gpu_day
import profile_run
import show
import test_resume
from test_resume import MODULES, arguments

tiny_4m, tiny_flow, tiny_gpt = test_resume.tiny_4m, test_resume.tiny_flow, test_resume.tiny_gpt
tiny_maskgit, tiny_vlm, frozen = test_resume.tiny_maskgit, test_resume.tiny_vlm, test_resume.frozen
# Operators and waits of a step of each script at its tests' size, an eighth above what they were when this was written:
# on a GPU each operator is a launch, and a wait stops Python from running ahead.
CEILINGS = {"4m": (2510, 0), "flow": (1905, 0), "gpt": (2184, 0), "maskgit": (1660, 1), "vlm": (3975, 0)}


@pytest.mark.parametrize("task", MODULES)
def test_profile(task, request, tmp_path, monkeypatch):
    module = MODULES[task]
    root = module.make_root(tmp_path / "root")
    monkeypatch.setitem(sys.modules, f"train_{task}", sys.modules[f"train_{task}"])  # measure puts a copy there
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: None)
    found = profile_run.measure(str(root / f"train_{task}.py"), [*module.SMALL, *arguments(task, request)], 3)
    assert found["script"] == f"train_{task}.py" and found["busy"] == 1 and 0 < found["mfu"] < 1
    assert 0 < found["kernel_ms"] and 0 < found["milliseconds"] and len(found["top"]) == 12
    launches, syncs = CEILINGS[task]
    assert launches / 2 < found["launches"] <= launches
    assert found["syncs"] <= syncs
    assert not (root / "records" / "runs.jsonl").exists(), "nothing is filed"


def quick(seconds, code=0):
    return [sys.executable, "-c", f"import time, sys; print('said'); time.sleep({seconds}); sys.exit({code})"]


def test_a_day(tmp_path, capsys):
    stages = [gpu_day.Stage("first", quick(0), 1), gpu_day.Stage("bad", quick(0, 3), 1),
              gpu_day.Stage("slow", quick(60), 1, 2), gpu_day.Stage("long", quick(0), 1000)]
    day = gpu_day.Day(tmp_path / "out", 30)
    gpu_day.work(day, stages)
    results = {name: about["result"] for name, about in day.done.items()}
    assert results == {"first": "done", "bad": "failed, exit code 3", "slow": "out of time"}
    assert 2 <= day.done["slow"]["seconds"] < 25 and (tmp_path / "out" / "first.txt").read_text() == "said\n"
    assert "long: needs 1000 s" in capsys.readouterr().out
    again = gpu_day.Day(tmp_path / "out", 2000)
    assert again.done == day.done
    gpu_day.work(again, [gpu_day.Stage("first", quick(0, 1), 1), gpu_day.Stage("bad", quick(0), 1), stages[3]])
    assert {name: about["result"] for name, about in again.done.items()} == results | {"bad": "done", "long": "done"}


def test_a_run_goes_on_from_its_state(tmp_path):
    """Cut off twice, the second time before it can save another state; a new one once it is done or has failed."""
    code = """import signal, sys, time
def stop(*_):
    print("stopped: continue with the same command and --resume=/states of a/4m.pt", flush=True)
    sys.exit()
print(sys.argv[1:], flush=True)
if len(sys.argv) == 1:
    signal.signal(signal.SIGTERM, stop)
time.sleep(60)"""
    command = [sys.executable, "-c", code]
    log = tmp_path / "run.txt"
    for number in range(3):
        day = gpu_day.Day(tmp_path, 60)
        gpu_day.work(day, [gpu_day.Stage("run", command, 1, 3)])
        assert day.done["run"]["result"] == "out of time"
        assert day.done["run"]["resume"] == ["--resume=/states of a/4m.pt"]
        assert log.read_text().splitlines()[0] == str(["--resume=/states of a/4m.pt"] * (number > 0))
    day.run(gpu_day.Stage("run", [sys.executable, "-c", "import sys; sys.exit(len(sys.argv) < 2)"], 1), gpu_day.tqdm())
    assert day.done["run"]["result"] == "done" and day.done["run"]["resume"] == []


def test_stages_are_in_order_of_value():
    names = [stage.name for stage in gpu_day.stages(Path("out"), 8, {})]
    assert len(set(names)) == len(names) and names[:3] == ["kernels", "checks", "data-4m"]
    first = {task: names.index(f"record-{task}-0") for task in gpu_day.TASKS}
    assert list(first) == sorted(first, key=first.get) and "baseline-4m" in names
    commands = {stage.name: stage.command for stage in gpu_day.stages(Path("out"), 8, {})}
    assert "--nproc_per_node=8" in commands["record-4m-0"] and "torch.distributed.run" in commands["profile-gpt"]
    assert not any("torch.distributed.run" in stage.command for stage in gpu_day.stages(Path("out"), 1, {}))
    runs = [stage for stage in gpu_day.stages(Path("out"), 8, {}) if stage.name.startswith(("record-", "baseline-"))]
    assert len(runs) == len(gpu_day.TASKS) * (gpu_day.TRIALS + 1)
    assert all(stage.expected < 540 < stage.limit for stage in runs), "each starts in a call of nine minutes"


def test_as_many_gpus_as_share_every_batch(monkeypatch):
    assert [gpu_day.share_evenly(gpus) for gpus in (1, 2, 3, 6, 7, 8)] == [1, 2, 2, 4, 4, 8]
    for path in [*gpu_day.ROOT.glob("train_*.py"), *gpu_day.ROOT.glob("baselines/train_*.py")]:
        monkeypatch.setitem(sys.modules, path.stem, None)  # load_script puts a copy there
        assert show.load_script(path).CONFIGS["gpu"].batch % 8 == 0, path


def test_a_tiny_day(tiny_4m, tmp_path):
    """End to end at a size that a CPU computes: a profile and a run, and the table of it."""
    root = MODULES["4m"].make_root(tmp_path / "root")
    shutil.copytree(Path(gpu_day.__file__).parent, root / "records", dirs_exist_ok=True)
    command = [sys.executable, "records/gpu_day.py", "--tiny=4m=" + " ".join(["--precision=fp32", *tiny_4m[1]]),
               "--out=out", "--budget=400"]
    done = subprocess.run(command, cwd=root, env=test_resume.ENV, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((root / "out" / "stages.json").read_text())
    assert {name: about["result"] for name, about in results.items()} == {"profile-4m": "done", "record-4m-0": "done"}
    assert "| train_4m.py | " in done.stdout and "| script | milliseconds | mfu | busy |" in done.stdout
    assert len(list((root / "logs").iterdir())) == 2
    listed = subprocess.run([*command, "--list"], cwd=root, env=test_resume.ENV, capture_output=True, text=True)
    assert [line.split()[:2] for line in listed.stdout.splitlines()] == [["profile-4m", "done"], ["record-4m-0", "done"]]


@pytest.mark.parametrize("words, said", [
    (["records/gpu_day.py"], "there is no NVIDIA GPU here"),
    (["records/gpu_day.py", "--tiny=5m"], "--tiny=5m is not one of 4m, maskgit"),
    (["records/profile_run.py", "train_5m.py"], "there is no train_5m.py"),
    (["records/profile_run.py", "train_4m.py", "--steps=0"], "--steps must be at least 1"),
    (["records/profile_run.py", "train_4m.py", "--num_steps=20"], "--num_steps=20 ends the run, or has it evaluated, before 45"),
    (["records/profile_run.py", "train_4m.py", "--track=tpu"], "--track=tpu is not one of"),
])
def test_bad_words(words, said):
    done = subprocess.run([sys.executable, *words], cwd=gpu_day.ROOT, env=test_resume.ENV, capture_output=True, text=True)
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr
