"""All that a GPU should be asked on the day there is one: checks, data, profiles, then the tracks in order of value.

    python records/gpu_day.py [--budget=540] [--only=4m] [--out=gpu_day] [--list] [--tiny=...]

Every stage is a command with a log of its own in the folder --out, and stages.json there says how it went. A stage
starts if the time it is expected to take is left, and ends when the budget does. The same command again goes on with
what is missing or has failed; data in the making goes on where it was, and so does a run, from its saved state. Ends
with a table of the profiles; the logs of the runs are in logs/, for records/submit.py, which takes those of one piece
alone: a baseline that trains for hours needs a --budget of as many.
"""
import argparse
import json
import math
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from rules import ROOT

sys.path.insert(0, str(ROOT / "data"))
import streams  # noqa: E402

TASKS = ("4m", "maskgit", "vlm", "flow", "gpt")  # in order of value
COLUMNS = ("milliseconds", "mfu", "busy", "launches", "syncs", "peak_memory_mib", "compile_seconds", "graphs")
TRIALS = 5
RESUME = re.compile(r"stopped: .* (--resume=.+)")  # what a training script says last that had to stop
GRACE = 40  # seconds that it has for that; torchrun kills its processes after 30
# a short run at a size that a CPU computes in no time, for a test of this file
TINY = {"4m": "--dim=32 --head_dim=16 --enc_depth=1 --dec_depth=1 --batch=8 --word_steps=0 --quality_scenes=0",
        "maskgit": "--dim=32 --head_dim=16 --depth=1 --batch=8 --quality_pictures=0"}


@dataclass
class Stage:
    """A command, the seconds that it should take, and those that it may."""
    name: str
    command: list
    expected: int
    limit: float = 540


def share_evenly(gpus):
    """As many of the GPUs as every track's batch can be divided among: a power of two."""
    return 1 << gpus.bit_length() - 1


def python(*words, gpus=1):
    """A command of this Python, on several GPUs one process for each."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"] if gpus > 1 else []
    return [sys.executable, *launcher, *words]


def stages(out, gpus, tiny):
    """All stages in order. tiny: {task: fields} of short runs on data that is there, instead of the gpu tracks."""
    fields = {task: ["--track=gpu"] for task in TASKS} | tiny
    tasks = tiny or TASKS
    plan = []
    if not tiny:
        plan += [Stage("kernels", python("-m", "pytest", "-q", "tests/test_kernels.py"), 60),
                 Stage("checks", python("-m", "pytest", "-q", "tests/test_cuda.py"), 300),
                 Stage("data-4m", python("data/scenes.py", "--size=128"), 240),
                 Stage("data-objects", python("data/scenes.py", "--objects", "--size=128"), 120),
                 Stage("data-vlm", python("data/scenes.py", "--qa", "--num=200000"), 120),
                 Stage("data-noise", python("records/gpu_day.py", "--noise"), 10)]
    for task in tasks:
        profile = ["records/profile_run.py", f"train_{task}.py", f"--out={out / f'profile-{task}.json'}"]
        noise = ["--data=noise", "--eval_tokens=262144"] if task == "gpt" else []  # FineWeb is a long download
        plan.append(Stage(f"profile-{task}", python(*profile, *fields[task], *noise, gpus=gpus), 60, 180))
    if "gpt" in tasks:
        plan.append(Stage("data-gpt", python("data/fineweb.py"), 300))
    for task in tasks:
        baselines = [f"baselines/{path.name}" for path in (ROOT / "baselines").glob(f"train_{task}_*.py")]
        for seed in range(1 if tiny else TRIALS):
            script = python(f"train_{task}.py", f"--seed={seed}", *fields[task], gpus=gpus)
            plan.append(Stage(f"record-{task}-{seed}", script, 240, math.inf))
        if not tiny:
            commands = [python(path, "--track=gpu", gpus=gpus) for path in baselines]
            plan += [Stage(f"baseline-{task}", command, 240, math.inf) for command in commands]
    return plan


def make_noise():
    """data/noise: a stream of random tokens of GPT-2's vocabulary, for a profile where FineWeb is not at hand."""
    folder = ROOT / "data" / "noise"
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for split, count in (("train", 20_000_000), ("val", 300_000)):
        streams.write_bin(folder / f"{split}.bin", rng.integers(50256, size=count))
    streams.finish(folder, {"name": "noise"}, 50257, document_start=50256, encoding="gpt2")


class Day:
    """What is done and what is left of the budget."""

    def __init__(self, out, budget):
        self.out, self.end = out, time.monotonic() + budget
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / "stages.json"
        self.done = json.loads(self.path.read_text()) if self.path.exists() else {}

    def left(self):
        return self.end - time.monotonic()

    def run(self, stage, bar):
        """Run a stage, its output in its log; what became of it is written at once."""
        began = time.monotonic()
        limit = min(stage.limit, self.left())
        path = self.out / f"{stage.name}.txt"
        resume = self.done.get(stage.name, {}).get("resume", [])
        with open(path, "w") as log:
            process = subprocess.Popen(stage.command + resume, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
            while process.poll() is None and time.monotonic() - began < limit:
                time.sleep(0.5)
                bar.refresh()
            if process.poll() is None:
                process.terminate()  # a training script saves its state
                try:
                    process.wait(GRACE)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                result = "out of time"
                resume = RESUME.findall(path.read_text(errors="replace"))[-1:] or resume
            else:
                result = "done" if process.returncode == 0 else f"failed, exit code {process.returncode}"
                resume = []
        self.done[stage.name] = {"result": result, "seconds": round(time.monotonic() - began, 1), "resume": resume}
        self.path.write_text(json.dumps(self.done, indent=1) + "\n")


def work(day, todo):
    """Run the stages that are not done yet and that there is time for."""
    with tqdm(todo, unit="stage") as bar:
        for stage in bar:
            if day.done.get(stage.name, {}).get("result") == "done":
                continue
            if day.left() < stage.expected:
                tqdm.write(f"{stage.name}: needs {stage.expected} s, and {max(0, day.left()):.0f} are left")
                continue
            bar.set_description(stage.name)
            day.run(stage, bar)
            tqdm.write(f"{stage.name}: {day.done[stage.name]['result']} in {day.done[stage.name]['seconds']} s")


def table(out):
    """What the profiles found, as lines of a Markdown table."""
    found = [json.loads(path.read_text()) for path in sorted(out.glob("profile-*.json"))]
    lines = [f"| script | {' | '.join(COLUMNS).replace('_', ' ')} |", "|---" + "|--:" * len(COLUMNS) + "|"]
    return lines + [f"| {one['script']} | {' | '.join(str(one[name]) for name in COLUMNS)} |" for one in found]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=540, help="seconds that all of it may take this time")
    parser.add_argument("--only", default="", help="regular expression of the stages' names")
    parser.add_argument("--out", type=Path, default=ROOT / "gpu_day", help="folder of the logs and of stages.json")
    parser.add_argument("--list", action="store_true", help="say what there is to do, and end")
    parser.add_argument("--noise", action="store_true", help="make data/noise, and end")
    parser.add_argument("--tiny", action="append", default=[], metavar="TASK[=FIELDS]",
                        help="instead of the gpu tracks a short run of a task, with more fields: to try this file out")
    arguments = parser.parse_args()
    if arguments.noise:
        return make_noise()
    tiny = {}
    for word in arguments.tiny:
        task, _, more = word.partition("=")
        if task not in TINY:
            sys.exit(f"gpu_day.py: --tiny={task} is not one of {', '.join(TINY)}")
        tiny[task] = ["--track=cpu", *TINY[task].split(), "--num_steps=60", *more.split()]
    gpus = torch.cuda.device_count()
    if not gpus and not tiny and not arguments.list:
        sys.exit("gpu_day.py: there is no NVIDIA GPU here; --list says what there is to do, --tiny=4m tries it out")
    day = Day(arguments.out.resolve(), arguments.budget)
    used = share_evenly(max(1, gpus))
    if used < gpus:
        print(f"gpu_day.py: {used} of {gpus} GPUs here, which share every batch evenly")
    plan = stages(day.out, used, tiny)
    todo = [stage for stage in plan if re.search(arguments.only, stage.name)]
    if arguments.list:
        for stage in todo:
            result = day.done.get(stage.name, {}).get("result", f"{stage.expected} s expected")
            print(f"{stage.name:20} {result:20} {' '.join(stage.command)}")
        return
    work(day, todo)
    print("\n".join(table(day.out)))
    failed = [name for name, about in day.done.items() if about["result"].startswith("failed")]
    if failed:
        sys.exit(f"gpu_day.py: failed: {', '.join(failed)}; see their logs in {day.out}")


if __name__ == "__main__":
    main()
