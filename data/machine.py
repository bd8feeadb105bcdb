"""What a training script says of the machine that it runs on, and whether torch.compile works there."""
import os
import platform
import re
import sys
import tempfile
import time
from pathlib import Path

import torch


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
