"""Where the time of a script's training steps goes: how long they take, what the device waits for, which kernels run.

    python records/profile_run.py train_4m.py [--steps=30] [--out=profile.json] [--field=value ...]

Trains on the script's own data (under torchrun on several GPUs), past its warm-up, then measures so many steps as they
are and a third as many under torch's profiler, and ends before the evaluation: nothing is filed. Counts per step:

    launches    kernels that are started; on a CPU, which starts none, operators of torch
    syncs       times that Python waits for a number of the device, or would wait for it on a GPU
    busy        share of a step in which the device computes; the rest of it waits for Python or for messages
"""
import argparse
import json
import re
import sys
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from rules import ROOT

# what item(), bool() and boolean indexing come down to, and masked_scatter in its backward
SYNCS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")
LAUNCH = re.compile(r"^(cuda|cu)(LaunchKernel|GraphLaunch)")
WARM = 5  # steps before those that are measured
sys.path.insert(0, str(ROOT / "data"))


class Enough(Exception):
    """All steps that were asked for have been measured."""


def is_sync(event):
    """Whether an event of the profiler waits for the device. Adam's on a CPU, which counts its steps there, do not."""
    if event.name not in SYNCS:
        return False
    while event is not None and not event.name.startswith("Optimizer.step"):
        event = event.cpu_parent
    return event is None


def table_of(profiler, steps, device):
    """Launches, syncs and milliseconds of kernels per step, and the kernels that take most of the time."""
    events = profiler.key_averages()
    on_gpu = device.type == "cuda"
    kernels = [e for e in events if e.device_type == DeviceType.CUDA] if on_gpu else events
    spent = {e.key: e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in kernels}
    launches = sum(e.count for e in events if (LAUNCH.match(e.key) if on_gpu else e.key.startswith("aten::")))
    top = sorted(spent, key=spent.get, reverse=True)[:12]
    return {"launches": round(launches / steps, 1),
            "syncs": round(sum(is_sync(event) for event in profiler.events()) / steps, 2),
            "kernel_ms": round(sum(spent.values()) / steps / 1000, 3),
            "top": {key[:90]: round(spent[key] / steps / 1000, 3) for key in top}}


def measure(path, fields, steps):
    """Profile a script's steps: what is written to --out."""
    import machine
    import show

    script = show.load_script(path)
    counted = max(1, steps // 3)
    needed, found = WARM + steps + counted, {}
    if short := [field for field in fields if re.fullmatch(r"--(num_steps|eval_every)=\d+", field)
                 and int(field.partition("=")[2]) <= needed]:
        sys.exit(f"profile_run.py: {short[0]} ends the run, or has it evaluated, before {needed} steps are measured")

    class Run(script.Run):
        def prepare_show(self, **data):
            """Nothing will be shown."""

        def progress(self, *numbers):
            super().progress(*numbers)
            if self.step == WARM:
                self.before, self.flops_before = self.now(), self.flops
            if self.step == WARM + steps:
                seconds = (self.now() - self.before) / steps
                found.update(milliseconds=round(1000 * seconds, 3), precision=self.precision, world_size=self.world,
                             mfu=round((self.flops - self.flops_before) / steps / seconds / self.peak / self.world, 4),
                             peak_tflops=round(self.peak / 1e12, 1),
                             peak_memory_mib=machine.peak_memory_mib(self.device),
                             compile_seconds=round(self.compile_seconds, 1), graphs=self.graphs,
                             hardware=machine.hardware(self.device), rank=self.rank)
                activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
                self.profiler = profile(activities=activities)
                self.profiler.start()
            if self.step == needed:
                self.now()
                self.profiler.stop()
                found.update(table_of(self.profiler, counted, self.device))
                raise Enough

    script.Run = Run
    try:
        script.main([f"--num_steps={max(2000, 2 * needed)}", "--eval_every=1000000", *fields])
    except Enough:
        pass
    except script.Fault as fault:
        sys.exit(f"profile_run.py: {path}: {fault}")
    on_cpu = " cores of " in found["hardware"]
    busy = 1.0 if on_cpu else round(min(1.0, found["kernel_ms"] / found["milliseconds"]), 3)
    return {"script": Path(path).name, "fields": fields, "steps": steps, "busy": busy, **found}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", help="a training script, or a copy of one")
    parser.add_argument("--steps", type=int, default=30, help="that are timed")
    parser.add_argument("--out", help="write the result, JSON, to this file")
    arguments, fields = parser.parse_known_args()
    if not Path(arguments.script).is_file():
        sys.exit(f"profile_run.py: there is no {arguments.script}")
    if arguments.steps < 1:
        sys.exit("profile_run.py: --steps must be at least 1")
    result = measure(arguments.script, fields, arguments.steps)
    if result.pop("rank") == 0:
        text = json.dumps(result, indent=1)
        print(text)
        if arguments.out:
            Path(arguments.out).write_text(text + "\n")


if __name__ == "__main__":
    main()
