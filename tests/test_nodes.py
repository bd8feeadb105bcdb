"""run.sh nodes and run.sh slurm: bad input, two machines that are this one, and a job on a SLURM that is made up."""
import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import rules
from test_train_4m import ENV, ROOT, SMALL, make_root, tiny  # noqa: F401: tiny is a fixture

# What a SLURM job calls. They write it down; sbatch runs the script as SLURM does, elsewhere and under another name.
STUBS = {
    "sbatch": """cp "$1" "$FAKE/slurm_script"; shift
        cd / && SLURM_SUBMIT_DIR=$OLDPWD SLURM_JOB_ID=17 SLURM_NNODES=2 SLURM_JOB_NODELIST='node[1-2]' \\
            exec bash "$FAKE/slurm_script" "$@" """,
    "scontrol": """case "$*" in
        "show hostnames node[1-2]") printf 'node1\\nnode2\\n';;
        *) echo "scontrol $*" >> "$FAKE/calls";; esac""",
    "srun": 'echo "srun $*" >> "$FAKE/calls"; [ -x run.sh ] || exit 9; exit "$SRUN_EXIT"',
    "squeue": 'echo "$TIME_LEFT"',
}
STARTED = "srun --ntasks=2 --ntasks-per-node=1 --cpu-bind=none ./run.sh nodes node1:29500 2 4m --save_every=100"


@pytest.fixture
def root(tmp_path):
    """A folder that run.sh can run in, with this Python for its .venv."""
    root = make_root(tmp_path / "root")
    for name in "run.sh", "requirements.txt":
        shutil.copy(ROOT / name, root / name)
    (root / ".venv/bin").mkdir(parents=True)
    python = root / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    pins = hashlib.sha256((root / "requirements.txt").read_bytes()).hexdigest()
    (root / ".venv/installed").write_text(f"{pins} {sys.version_info[0]} {sys.version_info[1]}\n")
    return root


@pytest.mark.parametrize("words, said", [
    ("nodes", "nodes needs HOST:PORT first"), ("nodes 10.0.0.1 2 4m", "such as 10.0.0.1:29500, not '10.0.0.1'"),
    ("nodes h:29500 4m", "the number of machines, after HOST:PORT, not '4m'"), ("nodes h:29500 0 4m", "not '0'"),
    ("nodes h:29500 2", "nodes needs a TASK after HOST:PORT and COUNT; there is: 4m"),
    ("nodes h:29500 2 5m", "train_5m.py is not here yet; there is: 4m"),
    ("nodes no-such-host.invalid:29500 2 4m --data=none", "no way from this machine to a host 'no-such-host.invalid'"),
    ("slurm 4m", "slurm is for a SLURM job: sbatch run.sh slurm TASK"),
])
def test_bad_input(root, words, said):
    env = {key: value for key, value in ENV.items() if not key.startswith("SLURM_")}
    done = subprocess.run(["./run.sh", *words.split()], cwd=root, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0 and done.stderr.startswith("run.sh: ") and said in done.stderr
    assert done.stderr.count("\n") == 1


def test_two_machines(root, tiny):  # noqa: F811
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["./run.sh", "nodes", f"127.0.0.1:{port}", "2", "4m", *SMALL, *tiny[1], "--num_steps=8"]
    both = [subprocess.Popen(command, cwd=root, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(2)]
    try:
        said = [process.communicate(timeout=600) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], said
    log, = (root / "logs").glob("*.txt")
    foot = rules.parse_log(log)["footer"]
    assert foot["world_size"] == 2 and foot["steps"] == 8
    assert sum("world_size: 2" in out for out, _ in said) == 1, "one machine speaks"


@pytest.fixture
def sbatch(root, tmp_path):
    """A function (SRUN_EXIT, TIME_LEFT) -> the completed job and the calls it made."""
    fake = tmp_path / "fake"
    fake.mkdir()
    for name, body in STUBS.items():
        (fake / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (fake / name).chmod(0o755)

    def submit(srun_exit, time_left="1:23:45", more=()):
        (fake / "calls").write_text("")
        env = {**os.environ, "PATH": f"{fake}:{os.environ['PATH']}", "FAKE": str(fake), "SRUN_EXIT": str(srun_exit),
               "TIME_LEFT": time_left}
        done = subprocess.run(["sbatch", "run.sh", "slurm", "4m", "--save_every=100", *more], cwd=root, env=env,
                              capture_output=True, text=True, timeout=600)
        return done, (fake / "calls").read_text().splitlines()

    return submit


def test_slurm_job(root, sbatch):
    began = root / "checkpoints/slurm-17"

    def state(run, seconds):
        """A state file that was written so long after the job first began."""
        path = root / "checkpoints" / f"{run}.state.pt"
        path.touch()
        os.utime(path, (began.stat().st_mtime + seconds,) * 2)

    done, calls = sbatch(1, "2:31")
    assert done.returncode == 0, done.stderr
    assert calls == [STARTED, "scontrol requeue 17"], "a job out of time goes back into the queue"
    state("20260101-000000-4m-gpu-0", -60)
    state("20260102-000000-4m-gpu-1", 9)
    state("20260102-000001-gpt-gpu-0", 9)
    assert sbatch(1, "0:59")[1][0] == STARTED, "not from an older run's state, another seed's or another task's"
    state("20260102-000000-4m-gpu-0", 5)
    state("20260102-000002-4m-gpu-0", 7)
    resumed = " --resume=checkpoints/20260102-000002-4m-gpu-0.state.pt"
    done, calls = sbatch(1, "1:00:00")
    assert calls == [STARTED + resumed] and done.returncode == 1, "a run that fails early does not come back"
    assert done.stderr == "run.sh: the run failed before its time was over\n"
    _, calls = sbatch(1, "3:59", ["--seed=1"])
    assert calls[0].endswith("--seed=1 --resume=checkpoints/20260102-000000-4m-gpu-1.state.pt")
    done, calls = sbatch(0, "0:10")
    assert done.returncode == 0 and calls == [STARTED + resumed] and not began.exists()


def test_slurm_options():
    head = re.match(r"(#.*\n)+", (ROOT / "run.sh").read_text())[0]  # SLURM stops reading at the first command
    options = re.findall(r"(?m)^#SBATCH (\S+)$", head)
    assert {"--nodes=2", "--ntasks-per-node=1", "--gres=gpu:8", "--requeue"} <= set(options)
    assert len(options) == head.count("#SBATCH"), "one option a line, nothing behind it"
    seconds, = [int(option.partition("@")[2]) for option in options if option.startswith("--signal=TERM@")]
    assert seconds + 60 <= 5 * 60, "run.sh takes a run that ends in its last five minutes for one that was stopped"


@pytest.mark.parametrize("gpus, words, expected", [
    (1, "1 4m --track=gpu", 1), (8, "1 4m --track=gpu", 8), (6, "1 4m --track=gpu", 4), (3, "1 maskgit --track=gpu", 2),
    (6, "1 4m --track=gpu --batch=36", 6), (6, "3 4m --track=gpu --batch=36", 6), (8, "3 4m --track=gpu --batch=36", 6),
    (6, "1 4m --no_such_field=1", 6), (6, "5 4m --track=gpu", 6)])
def test_as_many_gpus_as_share_the_batch(root, gpus, words, expected):
    """run.sh's function on its own: what cannot be shared by any number is left to the script, which says so."""
    text = (root / "run.sh").read_text()
    function = text[text.index("even() {"):text.index("\ntrain() {")]
    script = f'set -eu; PY={sys.executable}; gpus={gpus}; cd {ROOT}; {function}\neven {words}; echo "$gpus"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=100)
    said = "" if gpus == expected else f"run.sh: {expected} of {gpus} GPUs here, which share the batch evenly\n"
    assert done.returncode == 0 and done.stdout == f"{said}{expected}\n", done.stderr
