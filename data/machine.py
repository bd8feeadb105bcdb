"""What a training script says of its machine and of how well it uses it; whether torch.compile works there."""
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils import benchmark


def hardware(device):
    """The machine as its user would name it."""
    if device.type == "cuda":
        return f"{torch.cuda.device_count()}x {torch.cuda.get_device_name()}"
    info = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    name = info.partition("model name\t: ")[2].partition("\n")[0] or platform.processor() or platform.machine()
    if "amx_bf16" in info:
        name += " (AMX)"
    elif "avx512_bf16" in info:
        name += " (AVX512-BF16)"
    return f"{torch.get_num_threads()} cores of {name}"


def describe(device, root):
    """What a log says of the machine and of what is installed: {name: value}. root: the repository."""
    git = subprocess.run("git rev-parse HEAD", shell=True, cwd=root, capture_output=True, text=True).stdout.strip()
    return {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
            "threads": torch.get_num_threads(), "hardware": hardware(device), "git": git or None}


def time_products(device, dtypes, rows, dim, hidden):
    """Which of some dtypes, {name: dtype}, multiplies (rows, dim) x (dim, hidden) fastest, and its FLOP/s."""
    if device.type == "cuda":
        rows = dim = hidden = 8192  # smaller ones leave it idle
    flops = {name: matmul_flops(device, dtype, rows, dim, hidden) for name, dtype in dtypes.items()}
    return [max(flops, key=flops.get), max(flops.values())]


def matmul_flops(device, dtype, rows, dim, hidden):
    """Measured FLOP/s of products (rows, dim) x (dim, hidden) in dtype."""
    a = torch.randn(rows, dim, device=device, dtype=dtype)
    b = torch.randn(hidden, dim, device=device, dtype=dtype)
    timer = benchmark.Timer("F.linear(a, b)", globals={"F": F, "a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * rows * dim * hidden / timer.blocked_autorange(min_run_time=0.1).median


def speed(run):
    """What a footer says of how well a run has used the machine: {name: value}."""
    seconds = max(run.seconds, 1e-9)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - run.graphs
    return {"recompiles": graphs, "tokens_per_second": round(int(run.tokens) / seconds),
            "mfu": round(run.flops / seconds / run.peak / run.world, 4),
            "matmul_peak_tflops": round(run.peak / 1e12, 2), "peak_memory_mib": peak_memory_mib(run.device)}


def peak_memory_mib(device):
    """Most memory in use so far: the allocator's on CUDA, the process's on Linux, 0 elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() >> 20
    status = Path("/proc/self/status").read_text() if sys.platform == "linux" else "VmHWM: 0 kB"
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) >> 10


def compiler_works(run):
    """Whether torch.compile can build code here, tried on one line: on a CPU it takes a working C++ compiler."""
    if run.device.type == "cuda":
        return True
    # torch would take up what it compiled for another CPU with this cache, and compute NaN with it
    name = f"torchinductor_{os.environ.get('USER', '')}_{torch.backends.cpu.get_cpu_capability()}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), name)))
    new = time.time_ns()  # in no cache: what is cached needs no compiler

    def add(x):
        return x + new

    try:
        torch.compile(add)(torch.zeros(1))
    except Exception as error:  # torch.compile has many kinds
        run.say(f"torch.compile does not work here ({str(error).splitlines()[0]}): steps take longer without it")
        return False
    return True
