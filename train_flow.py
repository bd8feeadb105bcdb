"""Rectified flow: a Transformer learns the velocity that carries noise into images of one class.

After rectified flow (arXiv:2209.03003), DiT (arXiv:2212.09748) and the nanoFlowMatching of EPFL's course COM-304, made
fast: patches of 4 pixels, Muon, a preconditioned output, QK-norm, ReLU^2. Times against the baseline, record #1, are in
records/README.md.

Time runs from the data, t = 0, to noise, t = 1: z = (1 - t) x + t noise, and the velocity is noise - x.

    python train_flow.py                                        # cpu track, data from `python data/scenes.py --objects`
    python train_flow.py --load=data/frozen/flow.safetensors --reflow=4000 --num_steps=1500      # fewer sampling steps
    python train_flow.py --data=data/cifar10/train --frozen=data/cifar10/val.npz --num_steps=5000      # CIFAR-10
    python train_flow.py --help                                 # every field and what it may be
"""
import contextlib
import copy
import ctypes
import dataclasses
import hashlib
import inspect
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.elastic.multiprocessing.errors import record
from torch.utils import benchmark
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------------
# Config

@dataclass
class Config:
    # data
    track: str = "cpu"  # task and hardware that losses and times are compared on
    seed: int = 0  # of weights, order, times and noise
    data: str = "data/objects64/train"  # images and labels, made by `python data/scenes.py --objects`
    pixels: str = "pixels32"  # which array of them
    frozen: str = "data/frozen/objects64.npz"  # validation images
    frozen_draws: str = "data/frozen/eval_flow.npz"  # their times and noise
    reflow: int = 0  # train on so many images that the loaded model draws: straighter paths, fewer sampling steps
    # model
    dim: int = 128  # channels
    head_dim: int = 64  # channels per attention head
    depth: int = 2  # blocks
    mlp_ratio: int = 4  # hidden channels of an MLP per channel
    patch: int = 4  # pixels across a token
    # optim
    muon_lr: float = 0.025  # of hidden matrices
    momentum: float = 0.9  # of Muon; 0.95: 0.061 instead of 0.059 after 150 steps
    adam_lr: float = 0.01  # of embeddings, modulation and head
    # schedule
    num_steps: int = 260  # training steps
    batch: int = 40  # images per step, over all processes
    label_drop: float = 0.1  # share of images without their label, for classifier-free guidance
    cooldown: float = 0.7  # share of the steps over which the learning rates fall to 0
    # eval
    target: float = 0.055  # validation loss, record #1's
    eval_every: int = 80  # steps between evaluations; the clock is paused


@dataclass
class Options:
    """What a run is asked to do, beside the tuned numbers."""
    precision: str = "auto"  # of matrix products; auto measures which is faster
    load: str = ""  # checkpoint to start from; paths are relative to the repository
    save: bool = False  # write checkpoints/<run id>.safetensors at the end
    save_every: int = 0  # steps between saved states to resume from; 0: only at SIGTERM and Ctrl-C
    resume: str = ""  # saved state to resume from
    quality_pictures: int = 1000  # samples that each quality number is taken on; 0: none


CONFIGS = {
    "cpu": Config(),
    "gpu": Config(track="gpu", data="data/objects128/train", pixels="pixels64", frozen="data/frozen/objects128.npz",
                  dim=384, depth=8, num_steps=4000, batch=256),
}
ARCHITECTURE = ("dim", "head_dim", "depth", "mlp_ratio", "patch")  # what a checkpoint must agree on
LIMITS = {  # what a field may be: least and most, or choices; any other number is at least 0
    "seed": (0, 2 ** 31), "dim": (1, 8192), "head_dim": (1, 256), "depth": (1, 96), "mlp_ratio": (1, 16),
    "patch": (2, 128), "momentum": (0, 0.9999), "batch": (1, math.inf), "label_drop": (0, 1), "cooldown": (0.001, 1),
    "eval_every": (1, math.inf), "reflow": (0, 10 ** 6), "quality_pictures": (0, 10 ** 5),
    "precision": ("auto", "fp32", "bf16"),
}


def check_config(config, run, side):
    """What fields may be together, for images of side pixels. Raises Fault for what they may not."""
    run.slice(config.batch)  # can it be divided among the processes?
    if config.dim % config.head_dim:
        raise Fault(f"--dim={config.dim} is not a multiple of --head_dim={config.head_dim}")
    if config.patch % 2 or side % config.patch:
        raise Fault(f"patches of {config.patch} pixels do not tile images of {side}: --patch is an even divisor")
    if config.reflow and not run.options.load:
        raise Fault("--reflow needs a model to draw the images: pass --load=<checkpoint>")
    if 0 < config.reflow < config.batch:
        raise Fault(f"--reflow={config.reflow} images are fewer than a batch of {config.batch}")
    if run.options.quality_pictures == 1:
        raise Fault("--quality_pictures=1: a Frechet distance needs at least 2, or 0 for no quality numbers")


# ------------------------------------------------------------------------------------------------------------
# Run

# --- copied: run ---
# The track's stop-watch: options, processes, clock, log, checkpoints and states. A record may not change it.
HERE = Path(__file__).resolve()  # the repository is wherever data/frozen is: archived scripts run from their folder
ROOT = next((folder for folder in HERE.parents if (folder / "data" / "frozen").exists()), HERE.parent)
RULE = "=" * 100
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
FULL_STATE = StateDictOptions(full_state_dict=True)  # of a model that is sharded, too


class Fault(Exception):
    """User error, reported in one line without a traceback."""


def read_options(argv):
    """--field=value arguments -> the track's Config, the Options, and {field: value} as given."""
    if "--help" in argv or "-h" in argv:
        print(__doc__, inspect.getsource(Config), inspect.getsource(Options), inspect.getsource(check_config), sep="\n")
        print("Numbers are at least 0, and", *(f"{key} in {limits}" for key, limits in LIMITS.items()), sep="\n    ")
        sys.exit()
    given = {}
    for argument in argv:
        key, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals:
            raise Fault(f"arguments look like --field=value, not {argument!r}; --help lists the fields")
        given[key] = value
    track = given.get("track", "gpu" if torch.cuda.is_available() else "cpu")
    if track not in CONFIGS:
        raise Fault(f"--track={track} is not one of {', '.join(CONFIGS)}")
    config, options = copy.copy(CONFIGS[track]), Options()
    for key, value in given.items():
        target = next((part for part in (config, options) if key in vars(part)), None)
        if target is None:
            raise Fault(f"there is no field --{key}; --help lists the fields")
        kind = type(getattr(target, key))
        try:
            parsed = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        except (ValueError, KeyError):
            raise Fault(f"--{key}={value} is not of type {kind.__name__}") from None
        if kind is str and parsed not in LIMITS.get(key, [parsed]):
            raise Fault(f"--{key}={value} is not one of {', '.join(LIMITS[key])}")
        if kind in (int, float):
            least, most = LIMITS.get(key, (0, math.inf))
            if not least <= parsed <= most or not math.isfinite(parsed):
                raise Fault(f"--{key}={value} is not a number from {least} to {most}")
        setattr(target, key, parsed)
    if options.resume and not config.num_steps:
        raise Fault("--resume continues a run: pass its --num_steps, or --load to evaluate a checkpoint")
    return config, options, given


def hardware(device):
    """The machine as its user would name it."""
    if device.type == "cuda":
        return f"{torch.cuda.device_count()}x {torch.cuda.get_device_name()}"
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        info = Path("/proc/cpuinfo").read_text()
        name = info.partition("model name\t: ")[2].partition("\n")[0] or name
        name += " (AMX)" if "amx_bf16" in info else " (AVX512-BF16)" if "avx512_bf16" in info else ""
    return f"{torch.get_num_threads()} cores of {name}"


def peak_memory_mib(device):
    """Most memory in use so far: the allocator's on CUDA, the process's elsewhere, 0 where no one counts it."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2 ** 20)
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 2 ** (20 if sys.platform == "darwin" else 10))


def matmul_flops(device, dtype, rows, dim, hidden, seconds=0.1):
    """Measured FLOP/s of products (rows, dim) x (dim, hidden) in dtype."""
    a = torch.randn(rows, dim, device=device, dtype=dtype)
    b = torch.randn(hidden, dim, device=device, dtype=dtype)
    timer = benchmark.Timer("F.linear(a, b)", globals={"F": F, "a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * rows * dim * hidden / timer.blocked_autorange(min_run_time=seconds).median


def frozen_sha256(*paths):
    """One hash of this script's frozen evaluation code and of the files that it reads."""
    code = HERE.read_text().partition("# --- " "frozen:")[2].partition("# --- " "end:")[0]
    return hashlib.sha256(b"".join([code.encode(), *(Path(path).read_bytes() for path in paths)])).hexdigest()


def model_sha256():
    """Hash of this script's Model section: by another one a checkpoint's weights may mean other things."""
    return hashlib.sha256(HERE.read_text().partition("\n# Model\n")[2].partition("\n# Loss\n")[0].encode()).hexdigest()


def write_safely(path, save):
    """save(a temporary path), then rename it: a full disk leaves what was there. Returns what went wrong, or ""."""
    part = path.with_name(path.name + ".part")
    try:
        save(part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        return f"{path} could not be written ({str(error).splitlines()[0]}); what was there before is kept"
    return ""


def read_checkpoint(path, config, given):
    """Weights that a run saved, and config with the architecture that they are for."""
    try:
        with safe_open(ROOT / path, "pt") as file:
            about = file.metadata() or {}
            weights = {name: file.get_tensor(name).float() for name in file.keys()}
        saved = json.loads(about["config"])
        architecture = {key: saved[key] for key in ARCHITECTURE}
    except Exception as error:  # safetensors raises its own kinds
        raise Fault(f"{path} is not a checkpoint of this script ({type(error).__name__}: {error})") from None
    if other := [key for key in ARCHITECTURE if key in given and getattr(config, key) != saved[key]]:
        raise Fault(f"{path} was trained with --{other[0]}={saved[other[0]]}: leave it out, the checkpoint has its own")
    if about.get("model_sha256", model_sha256()) != model_sha256():
        print(f"{HERE.name}: {path} was written by another Model section than this one: its results may differ")
    return weights, dataclasses.replace(config, **architecture)


def load_weights(model, weights, path):
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise Fault(f"{path} does not fit this model: {' '.join(str(error).split())[:200]}") from None


class Clock:
    """Training time in seconds: what passes between go and pause. CUDA is synchronised at both."""

    def __init__(self, device):
        self.seconds = 0.0
        self.sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def go(self):
        self.sync()
        self.start = time.perf_counter()

    def pause(self):
        self.sync()
        self.seconds += time.perf_counter() - self.start


class Run:
    """Everything around the model: processes, device, precision, clock, log, progress bar, checkpoints, states."""

    def __init__(self, task, config, options, given):
        self.task, self.config, self.options, self.given = task, config, options, given
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        if self.world > 1:
            dist.init_process_group("nccl" if cuda else "gloo")
        self.clock = Clock(self.device)
        self.file, self.signals, self.failed = None, [], False
        self.step, self.tokens, self.flops, self.loading, self.val_loss = 0, 0, 0.0, 0.0, math.nan
        self.data_sha256, self.compile_seconds, self.graphs = "none", 0.0, 0

    def slice(self, batch):
        """This rank's part of a global batch."""
        if batch % self.world:
            raise Fault(f"a batch of {batch} cannot be divided among {self.world} processes")
        return slice(self.rank * batch // self.world, (self.rank + 1) * batch // self.world)

    def choose_precision(self, rows, dim, hidden):
        """Set precision and the peak in FLOP/s that MFU is relative to. A product of the model is (rows, dim, hidden).

        auto on a CPU is what multiplies matrices of this shape faster: bf16 with AMX by far, fp32 on most others, where
        bf16 can take seven times as long. On CUDA it is bf16 from compute capability 8.0 on.
        """
        self.precision = self.options.precision
        if self.device.type == "cuda":
            if self.precision == "auto":
                self.precision = "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp32"
            dtype = PRECISIONS[self.precision]
            self.peak = matmul_flops(self.device, dtype, 8192, 8192, 8192, 0.5)  # smaller ones leave it idle
            return
        flops = {name: matmul_flops(self.device, dtype, rows, dim, hidden) for name, dtype in PRECISIONS.items()}
        if self.precision == "auto":
            self.precision = max(flops, key=flops.get)
        decision = [self.precision, max(flops.values())]
        if self.world > 1:  # one run, one precision
            dist.broadcast_object_list(decision)
        self.precision, self.peak = decision

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def open_log(self):
        """Rank 0's log file: the source and the settings, then lines that also reach the console through say."""
        self.run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{self.task}-{self.config.track}-{self.config.seed}"
        if self.rank:
            return
        try:
            for folder in ("logs", "samples", "records", "checkpoints"):
                (ROOT / folder).mkdir(exist_ok=True)
                if not os.access(ROOT / folder, os.W_OK):
                    raise OSError(f"no write access to {ROOT / folder}")
            self.file = open(ROOT / "logs" / f"{self.run_id}.txt", "x", buffering=1)
        except OSError as error:
            raise Fault(f"cannot write the log: {error}") from None
        git = shutil.which("git") and subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True,
                                                     text=True).stdout.strip()
        settings = {"config": vars(self.config), "options": vars(self.options), "argv": sys.argv[1:],
                    "overrides": self.given, "python": platform.python_version(), "torch": torch.__version__,
                    "cuda": torch.version.cuda, "threads": torch.get_num_threads(), "hardware": hardware(self.device),
                    "precision": self.precision, "git": git or None}
        self.file.write(f"{HERE.read_text()}\n{RULE}\n{json.dumps(settings, indent=1)}\n{RULE}\n")
        if self.precision == "fp32" and self.device.type == "cuda":
            self.say("precision: fp32, because bf16 needs a GPU of compute capability 8.0 or was not asked for")

    def say(self, line):
        if self.file:
            self.file.write(line + "\n")
            tqdm.write(line)

    def count_graphs(self):
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]  # that torch.compile has made so far

    @contextlib.contextmanager
    def warm_up(self, model):
        """For untimed steps on dummy data: afterwards the weights are what they were before."""
        if self.rank == 0:
            tqdm.write(f"warming up in {self.precision} on {hardware(self.device)}")
        start, weights = time.perf_counter(), copy.deepcopy(model.state_dict())
        yield
        model.load_state_dict(weights)
        self.compile_seconds = time.perf_counter() - start
        self.graphs = self.count_graphs()

    def start(self):
        """Start the clock and the bar. SIGTERM, as SLURM sends it, and Ctrl-C save the state; a second one ends it."""
        def stop(number, frame):
            self.signals.append(number)
            signal.signal(number, signal.default_int_handler)

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        self.bar = tqdm(total=self.config.num_steps, disable=self.rank > 0, unit="step", dynamic_ncols=True)
        self.clock.go()

    def fetch(self, loader):
        """The loader's next batch. The time it takes is training time, and counted apart as well."""
        start = time.perf_counter()
        batch = loader()
        self.loading += time.perf_counter() - start
        return batch

    def check(self, loss):
        """Abort on a non-finite loss."""
        if not math.isfinite(loss):
            raise Fault(f"the loss is {loss} at step {self.step}: lower the learning rate")

    def progress(self, loss):
        """Count a step whose loss, this rank's part of it, is a tensor. Each tenth is looked at."""
        self.step += 1
        if self.step % 10 == 0:
            self.check(loss.item())
            self.bar.set_postfix(loss=f"{loss.item() * self.world:.3f}")
        self.bar.update(self.step - self.bar.n)

    def pause(self):
        """Pause the clock for an evaluation."""
        self.clock.pause()
        self.bar.set_description("evaluating")

    def go(self):
        self.bar.set_description("")
        self.clock.go()

    def evaluation(self, val_loss):
        self.val_loss, milliseconds = val_loss, 1000 * self.clock.seconds
        self.say(f"step:{self.step}/{self.config.num_steps} val_loss:{val_loss:.4f} train_time:{milliseconds:.0f}ms "
                 f"step_avg:{milliseconds / max(1, self.step):.2f}ms")

    def next_action(self):
        """After a step: "stop" once a signal has reached any rank, "save" every save_every steps, else ""."""
        stop = bool(self.signals)
        if self.world > 1 and self.step % 10:  # ranks hear of it at different steps: they agree on each tenth
            stop = False
        elif self.world > 1:
            flag = torch.tensor(float(stop), device=self.device)
            dist.all_reduce(flag)
            stop = bool(flag)
        if self.step == self.config.num_steps:
            return ""
        due = self.options.save_every and self.step % self.options.save_every == 0
        return "stop" if stop else "save" if due else ""

    def save_state(self, action, model, muon, adam, loader):
        """Save all that the rest of the run depends on, for any number of processes. "stop" then ends this one."""
        self.clock.pause()
        counters = {name: getattr(self, name) for name in ("step", "flops", "loading")}
        state = {"config": vars(self.config), "data_sha256": self.data_sha256, "seconds": self.clock.seconds,
                 "counters": counters | {"tokens": int(self.tokens)}, "adam": adam.state_dict(),
                 "model": get_model_state_dict(model, options=FULL_STATE), "loader": loader.state_dict(),
                 "muon": muon.momentum_buffers() if muon else []}
        path = ROOT / (self.options.resume or f"checkpoints/{self.run_id}.state.pt")
        problem = write_safely(path, lambda part: torch.save(state, part)) if self.rank == 0 else ""
        self.say(problem or f"state of step {self.step} in {path}")
        if action == "stop":
            self.say(f"stopped: continue with the same command and --resume={path}")
            if self.world > 1:
                dist.destroy_process_group()
            sys.exit(1 if problem else 0)
        self.clock.go()

    def read_state(self):
        """What save_state wrote of this run. It may go on for more steps than planned, or be evaluated more often."""
        path, config = self.options.resume, vars(self.config)
        try:
            state = torch.load(ROOT / path, map_location="cpu", weights_only=True)
            saved, step = state["config"], state["counters"]["step"]
        except Exception as error:  # torch.load raises many kinds
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise Fault(f"--resume={path} is not the state of a run ({reason})") from None
        fixed = set(config) - {"num_steps", "eval_every", "target", "shard"}
        if different := [f"--{key}={saved.get(key)}" for key in sorted(fixed) if saved.get(key) != config[key]]:
            raise Fault(f"--resume={path} is of a run with {' '.join(different)}: pass the same")
        if state["data_sha256"] != self.data_sha256:
            raise Fault(f"--resume={path} is of a run on other training data")
        if step > self.config.num_steps:
            raise Fault(f"--resume={path} is at step {step}, beyond --num_steps={self.config.num_steps}")
        return state

    def load_state(self, state, model, muon, adam, loader):
        """Put what read_state found back to where it came from. The clock resumes where it was."""
        set_model_state_dict(model, state["model"], options=FULL_STATE)
        if muon:
            muon.load_momentum_buffers(state["muon"])
        adam.load_state_dict(state["adam"])
        loader.load_state_dict(state["loader"])
        for name, value in state["counters"].items():
            setattr(self, name, value)
        planned, num_steps = state["config"]["num_steps"], self.config.num_steps
        if planned != num_steps:
            self.say(f"{planned} steps were planned, {num_steps} are now: from step {self.step} on the learning rates "
                     "are those of the longer run")
        self.bar.update(self.step)
        self.clock.seconds = state["seconds"]
        self.clock.go()

    def result(self, model, eval_sha256, numbers):
        """Weights, footer and a line in runs.jsonl: from here on nothing can be lost. Ends the process group."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.bar.close()
        self.check(self.val_loss)
        seconds, tokens = max(self.clock.seconds, 1e-9), int(self.tokens)
        weights = get_model_state_dict(model, options=FULL_STATE)
        footer = {"script": HERE.name, "task": self.task, "track": self.config.track, "seed": self.config.seed,
                  "world_size": self.world, "hardware": hardware(self.device), "precision": self.precision,
                  "steps": self.step, "parameters": sum(p.numel() for p in model.parameters()), "tokens": tokens,
                  "val_loss": round(self.val_loss, 5), **numbers, "target": self.config.target,
                  "reached": self.val_loss <= self.config.target, "train_seconds": round(self.clock.seconds, 3),
                  "compile_seconds": round(self.compile_seconds, 1), "recompiles": self.count_graphs() - self.graphs,
                  "loader_share": round(self.loading / seconds, 4), "tokens_per_second": round(tokens / seconds),
                  "mfu": round(self.flops / seconds / self.peak / self.world, 4),
                  "matmul_peak_tflops": round(self.peak / 1e12, 2), "peak_memory_mib": peak_memory_mib(self.device),
                  "data_sha256": self.data_sha256, "eval_sha256": eval_sha256,
                  "overrides": " ".join(f"--{key}={value}" for key, value in self.given.items()) or "none"}
        if self.rank == 0:
            if self.options.save:
                path = ROOT / "checkpoints" / f"{self.run_id}.safetensors"
                half = {name: value.half().contiguous().cpu() for name, value in weights.items()}
                about = {"config": json.dumps(vars(self.config)), "model_sha256": model_sha256()}
                problem = write_safely(path, lambda part: save_file(half, part, about))
                self.failed = bool(problem)
                self.say(problem or f"weights in {path}")
            for key, value in footer.items():
                self.say(f"{key}: {value}")
            with open(ROOT / "records" / "runs.jsonl", "a") as file:
                file.write(json.dumps({"run_id": self.run_id, **footer}) + "\n")
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()

    def prepare_show(self, **data):
        """data/show.py with all it needs to draw samples, opened before the clock starts. None without that file."""
        if not (ROOT / "data" / "show.py").exists():
            return None
        sys.path.insert(0, str(ROOT / "data"))
        import show
        return show.prepare(sys.modules[__name__], self, **data)

    def show(self, prepared, model):
        """Draw samples and measure their quality: whatever fails here is one sentence, the result is filed."""
        if prepared and self.rank == 0:
            try:
                with self.autocast(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
                    for key, value in prepared.show(model).items():
                        self.say(f"{key}: {value}")
                    prepared.chat(model)
            except (Exception, KeyboardInterrupt) as error:
                self.say(f"no samples ({type(error).__name__}: {error}); the result above is filed")
                self.failed = True
        if self.failed:
            sys.exit(1)
# --- end: run ---


# --- copied: keep memory ---
def keep_memory():
    """Have the C library keep freed memory, or a step on a CPU pays for new pages: in the flow 62 ms, with it 52."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # musl has no mallopt
            libc = ctypes.CDLL(None)
            libc.mallopt(-4, 0)  # M_MMAP_MAX
            libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD
# --- end: keep memory ---


# --- copied: compiler ---
def compiler_works(run):
    """Whether torch.compile can build code here, tried on one line: on a CPU it takes a working C++ compiler."""
    if run.device.type == "cuda":
        return True
    # torch would take up what it compiled for another CPU with this cache, and compute NaN with it
    name = f"torchinductor_{os.environ.get('USER', '')}_{torch.backends.cpu.get_cpu_capability()}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), name)))
    try:
        new = time.time_ns()  # in no cache: what is cached needs no compiler
        torch.compile(lambda x: x + new)(torch.zeros(1))
    except Exception as error:  # torch.compile has many kinds
        run.say(f"torch.compile does not work here ({str(error).splitlines()[0]}): steps take longer without it")
        return False
    return True
# --- end: compiler ---


# ------------------------------------------------------------------------------------------------------------
# Data

def check_images(images, labels, classes):
    """Raises ValueError for arrays that are not images (N, 3, S, S) of bytes and their labels (N, 1) below classes."""
    if images.dtype != np.uint8 or images.shape[1:] != (3, *(2 * images.shape[-1:])):
        raise ValueError(f"the images are {images.dtype} {images.shape}, not uint8 (N, 3, S, S)")
    if labels.dtype.kind not in "iu" or labels.shape != (len(images), 1):
        raise ValueError(f"the labels are {labels.dtype} {labels.shape}, not integers ({len(images)}, 1)")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"the labels go from {labels.min()} to {labels.max()}, but there are {classes} classes")


def check_frozen(config):
    """Raises Fault for validation files that read_frozen cannot use, and says how each comes back."""
    try:
        name = config.frozen
        with np.load(ROOT / name, allow_pickle=False) as arrays:
            choices = [key for key in arrays if key.startswith("pixels")]
            if choices and config.pixels not in choices:
                raise Fault(f"--pixels={config.pixels} is not in {ROOT / name}: it has {', '.join(choices)}")
            images, classes = arrays[config.pixels], json.loads(bytes(arrays["modalities"]))["label"]["vocab"]
            check_images(images, arrays["label"], classes)
        name = config.frozen_draws
        with np.load(ROOT / name, allow_pickle=False) as arrays:
            index, times, seeds = (arrays[key] for key in ("index", "t", "seed"))
        if not len(index) == len(times) == len(seeds) or index.min() < 0 or index.max() >= len(images):
            raise ValueError(f"its {len(index)} draws are not of these {len(images)} images")
        if set((4 * times).astype(int)) != {0, 1, 2, 3} or seeds.min() < 0:
            raise ValueError("times must be in all four quarters of 0 to 1, seeds at least 0")
    except Fault:
        raise
    except Exception as error:  # numpy, zipfile and zlib have many kinds
        reason = f"cannot be evaluated on ({type(error).__name__}: {error})".splitlines()[0]
        if isinstance(error, FileNotFoundError):
            reason = "is missing"
        if (ROOT / name).resolve().parent == (ROOT / "data" / "frozen").resolve():
            raise Fault(f"{ROOT / name} {reason}: it belongs to the repository (`git checkout {name}`)") from None
        raise Fault(f"{ROOT / name} {reason}: it is no part of the repository but made with its training data, for "
                    "CIFAR-10 by `python data/cifar10.py`") from None


def read_images(config, classes, side):
    """Training images (N, 3, S, S) uint8, a memory map, labels (N,) int64 and the sha256 of how they were made.

    Raises Fault for other classes or another side than the validation set's, and for fewer images than a batch.
    """
    folder, make = ROOT / config.data, "python data/scenes.py --objects" + " --size=128" * (side == 64)
    if not (folder / "meta.json").exists():
        raise Fault(f"no training data in {folder}: our own is made with `{make}`")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        images = np.load(folder / f"{config.pixels}.npy", mmap_mode="r", allow_pickle=False)
        labels = np.load(folder / "label.npy", allow_pickle=False)
        check_images(images, labels, meta["modalities"]["label"]["vocab"])
        if len(images) != meta["num"]:
            raise ValueError(f"{len(images)} images, but meta.json speaks of {meta['num']}")
        recipe = {key: meta[key] for key in ("name", "version", "size", "num", "seed")}
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise Fault(f"{folder} cannot be trained on ({error}): our own set is made again with `{make}`, once it is "
                    "moved away") from None
    if meta["modalities"]["label"]["vocab"] != classes or images.shape[-1] != side:
        raise Fault(f"{folder} has other classes or another size than the frozen validation set")
    if len(images) < config.batch:
        raise Fault(f"--batch={config.batch} is more than the {len(images)} training images there are")
    return images, labels[:, 0].astype(np.int64), hashlib.sha256(json.dumps(recipe).encode()).hexdigest()


def to_floats(images):
    """Images of bytes as floats in [-1, 1]."""
    return images.float() / 127.5 - 1


# --- copied: loader ---
class Loader:
    """Endless shuffled batches of rows of some tensors (N, ...), the same on every rank, all on the device."""

    def __init__(self, tensors, batch, seed, device):
        self.tensors, self.batch = [tensor.to(device) for tensor in tensors], batch
        self.rng = torch.Generator(device).manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.long, device=device)
        self.next = 0

    def __call__(self):
        if self.next + self.batch > len(self.order):
            self.order = torch.randperm(len(self.tensors[0]), generator=self.rng, device=self.order.device)
            self.next = 0
        self.next += self.batch
        rows = self.order[self.next - self.batch:self.next]
        return [tensor[rows] for tensor in self.tensors]

    def state_dict(self):
        return {"rng": self.rng.get_state(), "order": self.order, "next": self.next}

    def load_state_dict(self, state):
        self.rng.set_state(state["rng"])
        self.order, self.next = state["order"].to(self.order.device), state["next"]
# --- end: loader ---


# ------------------------------------------------------------------------------------------------------------
# Muon

# --- copied: muon ---
POLAR = ((8.1566, -22.4833, 15.8788), (4.0429, -2.8089, 0.5000), (3.8917, -2.7725, 0.5061), (3.2858, -2.3681, 0.4645),
         (2.3465, -1.7098, 0.4232))  # Polar Express (arXiv:2505.16932), five steps


def orthogonalise(G, dtype=torch.bfloat16):
    """The nearest semi-orthogonal matrices of a stack (K, rows, columns), roughly; computed in dtype."""
    tall = G.size(1) > G.size(2)
    X = G.to(dtype)
    X = X.mT if tall else X
    X = X / (1.02 * X.norm(dim=(1, 2), keepdim=True) + 1e-6)
    for a, b, c in POLAR:
        A = X @ X.mT
        X = a * X + (b * A + c * (A @ A.mT)) @ X  # A is symmetric
    return (X.mT if tall else X).to(G.dtype)


class Muon:
    """Nesterov momentum, then an orthogonalised step, for matrices (kellerjordan.github.io/posts/muon).

    Matrices of one shape are a stack, divided among the ranks: each adds up the gradients of its own matrices, keeps
    their momentum and sends their update to all. Messages of one stack travel while another is computed.
    """

    def __init__(self, params, momentum, rank=0, world=1, dtype=torch.bfloat16):
        self.momentum, self.rank, self.world, self.dtype = momentum, rank, world, dtype
        by_shape = {}
        for p in params:
            by_shape.setdefault(p.shape, []).append(p)
        self.stacks = []  # (parameters, this rank's momentum buffers)
        for shape, stack in by_shape.items():
            per_rank = -(-len(stack) // world)  # the last rank's part is filled up with zeros
            self.stacks.append((stack, torch.zeros(per_rank, *shape, device=stack[0].device)))

    def gather(self, shard, wait=True):
        """The parts of all ranks (k, rows, columns) in a row, and a handle to wait for before they are read."""
        if self.world == 1:
            return shard, None
        whole = shard.new_empty(self.world * len(shard), *shard.shape[1:])
        return whole, dist.all_gather_into_tensor(whole, shard.contiguous(), async_op=not wait)

    @torch.no_grad()
    def step(self, lr):
        """Move the parameters by their gradients, summed over the ranks; one without a gradient has a zero one."""
        handles = []
        for params, buffer in self.stacks:
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            grads += [torch.zeros_like(params[0])] * (self.world * len(buffer) - len(params))
            grads = torch.stack(grads)
            if self.world == 1:
                handles.append((grads, None, grads))
            else:
                shard = torch.empty_like(buffer)
                handle = dist.reduce_scatter_tensor(shard, grads, async_op=True)
                handles.append((shard, handle, grads))  # grads must live until they are sent
        updates = []
        for (_, buffer), (shard, handle, _) in zip(self.stacks, handles):
            if handle:
                handle.wait()
            buffer.lerp_(shard, 1 - self.momentum)
            shard = orthogonalise(shard.lerp_(buffer, self.momentum), self.dtype)
            updates.append((*self.gather(shard, wait=False), shard))  # so must the shard
        for (params, _), (update, handle, _) in zip(self.stacks, updates):
            if handle:
                handle.wait()
            rows, columns = params[0].shape
            torch._foreach_add_(params, list(update[:len(params)].unbind()), alpha=-lr * max(1, rows / columns) ** 0.5)

    def momentum_buffers(self):
        """The momentum of each stack, gathered: (matrices, rows, columns)."""
        return [self.gather(buffer)[0][:len(params)] for params, buffer in self.stacks]

    def load_momentum_buffers(self, buffers):
        for (params, shard), whole in zip(self.stacks, buffers):
            first, last = (min(r * len(shard), len(params)) for r in (self.rank, self.rank + 1))
            shard[:last - first] = whole[first:last].to(shard.device)
# --- end: muon ---


# --- copied: sum gradients ---
def sum_gradients(optimizer, world):
    """Add up the gradients of an optimizer's parameters over all ranks, in one flat message. Where a rank has none it
    sends zeros: every rank must take part."""
    if world == 1:
        return
    params = [p for group in optimizer.param_groups for p in group["params"]]
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params])
    dist.all_reduce(flat)
    for p, part in zip(params, flat.split([p.numel() for p in params])):
        p.grad = part.view_as(p)
# --- end: sum gradients ---


# --- copied: schedule ---
def schedule(step, config):
    """Share of the peak learning rates: 1, then linearly down to 0."""
    return min(1.0, (1 - step / config.num_steps) / config.cooldown)
# --- end: schedule ---


def make_optimizers(model, config, run):
    """Muon for the blocks' matrices, Adam for embeddings, modulation and head; every parameter is in exactly one."""
    hidden, rest = [], []
    for name, p in model.named_parameters():
        (hidden if "blocks" in name and "modulate" not in name else rest).append(p)
    muon = Muon(hidden, config.momentum, run.rank, run.world, PRECISIONS[run.precision])
    return muon, torch.optim.Adam(rest, lr=config.adam_lr, betas=(0.9, 0.95), fused=True)


# ------------------------------------------------------------------------------------------------------------
# Attention

# --- copied: attend ---
def attend(q, k, v, visible=None):
    """Softmax attention of q (B, H, M, D) over k, v (B, H, N, D); visible (B, N): keys that may be seen, None: all.

    A query that may see nothing gets zeros.
    """
    mask = None if visible is None else visible[:, None, None]
    if q.is_cuda or v.dtype == torch.float32:
        return F.scaled_dot_product_attention(q.type_as(v), k.type_as(v), v, attn_mask=mask)
    # written out: in bfloat16 on a CPU torch 2.13's fused kernel takes 3 to 6 times as long, in float32 0.8 times
    scores = (q * q.size(-1) ** -0.5) @ k.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -3e4)
    weights = scores.softmax(-1).type_as(v)
    return (weights if mask is None else weights * mask.any(-1, keepdim=True)) @ v
# --- end: attend ---


# ------------------------------------------------------------------------------------------------------------
# Model

# --- copied: norm ---
def norm(x):
    return F.layer_norm(x, (x.size(-1),))  # one kernel on a CPU, rms_norm is many: in 4M 0.146 s per step, not 0.171


class Linear(nn.Linear):
    def __init__(self, inside, outside):
        super().__init__(inside, outside, bias=False)
# --- end: norm ---


def split_heads(x, head_dim):
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)  # (B, T, C) -> (B, H, T, D)


class Attention(nn.Module):
    def __init__(self, dim, head_dim):
        super().__init__()
        self.head_dim = head_dim
        self.q, self.k, self.v, self.proj = (Linear(dim, dim) for _ in range(4))

    def forward(self, x):
        q = norm(split_heads(self.q(x), self.head_dim))
        k = norm(split_heads(self.k(x), self.head_dim))
        v = split_heads(self.v(x), self.head_dim)
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm block: attention, then a ReLU^2 MLP, both scaled and shifted as the condition says (AdaLN)."""

    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config.dim, config.head_dim)
        self.up = Linear(config.dim, config.mlp_ratio * config.dim)
        self.down = Linear(config.mlp_ratio * config.dim, config.dim)
        self.modulate = Linear(config.dim, 4 * config.dim)

    def forward(self, x, condition):
        scale1, shift1, scale2, shift2 = self.modulate(condition)[:, None].chunk(4, -1)  # (B, 1, C)
        x = x + self.attention(norm(x) * (1 + scale1) + shift1)
        return x + self.down(F.relu(self.up(norm(x) * (1 + scale2) + shift2)).square())


class Flow(nn.Module):
    """Predicts the velocity of noisy images (B, 3, S, S).

    The best linear predictor is computed in closed form; the network learns the residual, scaled to variance 1 at every
    time (arXiv:2206.00364, here for a straight path from images of variance sigma^2 around a mean image).
    """

    def __init__(self, config, classes, side):
        super().__init__()
        C, p = config.dim, config.patch
        self.side, self.patch, self.classes = side, p, classes
        self.embed_patch = Linear(3 * (2 * p) ** 2, C)  # sees half a patch more on every side
        self.embed_position = nn.Embedding((side // p) ** 2, C)
        self.embed_label = nn.Embedding(classes + 1, C)  # the last one: no label
        self.embed_time = Linear(64, C)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head = Linear(C, 3 * p * p)
        self.register_buffer("mean", torch.zeros(3, side, side))
        self.register_buffer("sigma", torch.ones(()))

    @torch.no_grad()
    def fit(self, images):
        """Take mean and sigma from images (N, 3, S, S) of bytes; 4,096 are enough."""
        x = to_floats(images[:4096])
        self.mean.copy_(x.mean(0))
        self.sigma.copy_((x - self.mean).square().mean().sqrt())

    def forward(self, z, t, labels):
        """Velocity (B, 3, S, S) at noisy images z (B, 3, S, S), times t (B,) and labels (B,)."""
        t_, p = t[:, None, None, None], self.patch
        std = ((1 - t_) ** 2 * self.sigma ** 2 + t_ ** 2).sqrt()
        centred = (z - (1 - t_) * self.mean) / std  # variance 1
        windows = F.unfold(centred, 2 * p, padding=p // 2, stride=p).mT  # (B, T, 12 p^2)
        frequencies = torch.logspace(-1, 1, 32, device=t.device)
        waves = t.logit(1e-4)[:, None] * frequencies  # log of the ratio of noise to image
        condition = norm(self.embed_time(torch.cat([waves.sin(), waves.cos()], 1)) + self.embed_label(labels))
        x = norm(self.embed_patch(windows) + self.embed_position.weight + condition[:, None])  # (B, T, C)
        for block in self.blocks:
            x = block(x, condition)
        residual = F.fold(self.head(norm(x)).float().mT, self.side, p, stride=p)
        linear = (t_ - (1 - t_) * self.sigma ** 2) / std * centred - self.mean
        return linear + self.sigma / std * residual


def init_weights(model):
    for name, p in model.named_parameters():
        if any(part in name for part in ("proj", "down", "head", "modulate")):
            nn.init.zeros_(p)
        elif "embed_position" in name or "embed_label" in name:
            nn.init.normal_(p, std=0.02)
        elif "attention" in name or "up" in name or "embed" in name:
            nn.init.normal_(p, std=p.shape[1] ** -0.5)
        else:
            raise AssertionError(f"no initialisation for {name}")


# ------------------------------------------------------------------------------------------------------------
# Loss

def velocity_errors(model, x, t, noise, labels):
    """Mean squared error (B,) of the velocity of images x (B, 3, S, S) in [-1, 1] at times t (B,), noise like x."""
    t_ = t[:, None, None, None]
    return (model((1 - t_) * x + t_ * noise, t, labels) - (noise - x)).square().mean((1, 2, 3))


def train_step(step, batch, rng, errors_of, model, muon, adam, config, run):
    """One step on a global batch: images (B, 3, S, S) of bytes, labels (B,) and, for reflow, the noise of each image.
    Returns this rank's part of its loss."""
    images, labels, *noise = batch
    B, device = config.batch, run.device
    t = torch.randperm(B, generator=rng, device=device) + torch.rand(B, generator=rng, device=device)
    t = t / B  # one time in every B-th
    noise = noise[0] if noise else torch.randn(images.shape, generator=rng, device=device)
    dropped = torch.rand(B, generator=rng, device=device) < config.label_drop
    labels = labels.masked_fill(dropped, model.classes)
    mine = run.slice(B)
    with run.autocast():
        loss = errors_of(model, to_floats(images[mine]), t[mine], noise[mine], labels[mine]).sum() / B
    loss.backward()
    sum_gradients(adam, run.world)
    factor = schedule(step, config)
    muon.step(config.muon_lr * factor)
    adam.param_groups[0]["lr"] = config.adam_lr * factor
    adam.step()
    model.zero_grad(set_to_none=True)
    return loss.detach()


# ------------------------------------------------------------------------------------------------------------
# Sampling

SOLVERS = {"euler": 1, "midpoint": 2, "heun": 2}  # network evaluations per step


@torch.no_grad()
def draw_pairs(model, n, seed, device):
    """For reflow (arXiv:2209.03003): n images of bytes (n, 3, S, S) that the model draws, their labels (n,), and the
    noise (n, 3, S, S) that each came from. Between the two of a pair the path is to be straight."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(model.classes, (n,), generator=rng).to(device)
    noise = torch.randn(n, 3, model.side, model.side, generator=rng).to(device)
    parts = list(zip(labels.split(250), noise.split(250)))
    made = [sample(model, label, noise=z) for label, z in tqdm(parts, desc="pairs", leave=False)]
    return ((torch.cat(made) + 1) * 127.5).round().byte(), labels, noise


@torch.no_grad()
def sample(model, labels, steps=25, solver="heun", shift=1.0, guidance=1.0, interval=(0.0, 1.0), noise=None, seed=0,
           return_trajectory=False):
    """Images (B, 3, S, S) in [-1, 1] for labels (B,), by following the velocity from noise, t = 1, to t = 0.

    labels: model.classes is no label. shift: above 1 takes smaller steps near noise (arXiv:2403.03206). guidance:
    v = u + guidance * (c - u), u not knowing the label, at times inside `interval` (arXiv:2404.07724). noise
    (B, 3, S, S): where to start. return_trajectory: also the list of (t, z) on the way. Raises Fault for a solver or
    label there is not.
    """
    if solver not in SOLVERS or steps < 1 or shift <= 0:
        raise Fault(f"solver {solver!r}, {steps} steps, shift {shift}: solvers are {', '.join(SOLVERS)}, steps at "
                    "least 1, shift above 0")
    if bool(((labels < 0) | (labels > model.classes)).any()):
        raise Fault(f"labels are from 0 to {model.classes}, which is no label")
    if noise is None:
        shape = (len(labels), 3, model.side, model.side)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def velocity(z, t):
        times = torch.full((len(z),), t, device=z.device)
        v = model(z, times, labels)
        if guidance == 1 or not interval[0] <= t <= interval[1]:
            return v
        u = model(z, times, torch.full_like(labels, model.classes))
        return u + guidance * (v - u)

    even = [1 - i / steps for i in range(steps + 1)]
    times = [shift * t / (1 + (shift - 1) * t) for t in even]
    z = noise.to(labels.device)
    trajectory = [(1.0, z)]
    for t, next_t in zip(times, times[1:]):
        v = velocity(z, t)
        if solver == "midpoint":
            v = velocity(z + (next_t - t) / 2 * v, (t + next_t) / 2)
        elif solver == "heun" and next_t > 0:  # at t = 0 there is no noise to be seen: the last step is Euler's
            v = (v + velocity(z + (next_t - t) * v, next_t)) / 2
        z = z + (next_t - t) * v
        trajectory.append((next_t, z))
    z = z.clamp(-1, 1)
    return (z, trajectory) if return_trajectory else z


# ------------------------------------------------------------------------------------------------------------
# Evaluation

# --- frozen: eval ---
EVAL_BATCH = 100  # images at a time; the first ones are predicted a second time


def eval_sha256(*paths):
    """One hash of this block and of the files that it reads."""
    code = HERE.read_text().partition("# --- " "frozen:")[2].partition("# --- " "end:")[0]
    return hashlib.sha256(b"".join([code.encode(), *(Path(path).read_bytes() for path in paths)])).hexdigest()


def read_frozen(config):
    """Validation pictures (n, 3, S, S) in [-1, 1], times (n,), noise (n, 3, S, S), labels (n,), the number of classes,
    and the sha256 of it all."""
    paths = [ROOT / config.frozen, ROOT / config.frozen_draws]
    for name in (config.frozen, config.frozen_draws):
        if not (ROOT / name).exists():
            raise Fault(f"{ROOT / name} is missing: it belongs to the repository (`git checkout {name}`)")
    try:
        with np.load(paths[1], allow_pickle=False) as arrays:
            index, times, seeds = (arrays[name] for name in ("index", "t", "seed"))
        with np.load(paths[0], allow_pickle=False) as arrays:
            classes = json.loads(bytes(arrays["modalities"]))["label"]["vocab"]
            pictures, labels = arrays[config.pixels][index], arrays["label"][index, 0].astype(np.int64)
        # RandomState draws the same normals on every machine and in every version of numpy
        noise = np.stack([np.random.RandomState(seed).standard_normal(pictures.shape[1:]) for seed in seeds])
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise Fault(f"the frozen validation set is damaged ({error}): `git checkout data/frozen`") from None
    floats = [torch.from_numpy(part.astype(np.float32)) for part in (pictures / 127.5 - 1, times, noise)]
    return *floats, torch.from_numpy(labels), classes, eval_sha256(*paths)


def fingerprint(model):
    """Shape, sum and absolute sum of every parameter and buffer."""
    tensors = [tensor.double() for tensor in (*model.parameters(), *model.buffers())]
    return [(tensor.shape, tensor.sum().item(), tensor.abs().sum().item()) for tensor in tensors]


def predict_velocity(model, z, t, labels):
    """What the model gives for noisy images z (B, 3, S, S): float32 (B, 3, S, S). Raises Fault for another shape or
    dtype, and for what is not finite."""
    velocity = model(z.clone(), t.clone(), labels.clone())
    if velocity.shape != z.shape or velocity.dtype != torch.float32:
        raise Fault(f"the model gives {velocity.dtype} {tuple(velocity.shape)}, not float32 {tuple(z.shape)}")
    if not velocity.isfinite().all():
        raise Fault("a velocity is not finite")
    return velocity


@torch.no_grad()
def evaluate(model, pictures, times, noise, labels, rank, world):
    """Mean squared error of the velocity over pixels and n frozen draws, and further numbers for the footer, among them
    the same of each quarter of time.

    Whatever a model predicts in training, here model(z (B, 3, S, S), t (B,), labels (B,)) is a velocity, checked by
    predict_velocity. The first batch is predicted again at the end, while every picture and noise is another one but z
    is not, and must be the same, as must the model's tensors. Ranks share the draws; all get the result.
    """
    start, before = time.perf_counter(), fingerprint(model)
    errors = torch.zeros(2, len(times), dtype=torch.float64, device=times.device)  # of each draw; how often it was seen
    t_ = times[:, None, None, None]
    z = (1 - t_) * pictures + t_ * noise
    parts = [slice(i, i + EVAL_BATCH) for i in range(rank * EVAL_BATCH, len(times), world * EVAL_BATCH)]
    velocities = [predict_velocity(model, z[part], times[part], labels[part]) for part in parts]
    for part, velocity in zip(parts, velocities):
        errors[0, part] = (velocity - (noise[part] - pictures[part])).square().mean((1, 2, 3)).double()
        errors[1, part] += 1
    kept = pictures.clone(), noise.clone()
    pictures.neg_()
    noise.neg_()
    for part, velocity in zip(parts[:1], velocities):
        again = predict_velocity(model, z[part], times[part], labels[part])
        if ((again - velocity).abs() > 1e-3).any():
            raise Fault("a velocity is another one where z, t and label are the same")
    pictures.copy_(kept[0])
    noise.copy_(kept[1])
    if fingerprint(model) != before:
        raise Fault("the model's parameters or buffers are not what they were before the evaluation")
    if world > 1:
        dist.all_reduce(errors)
    if not (errors[1] == 1).all():
        raise Fault(f"{int(errors[1].sum())} draws were predicted, and there are {len(times)}")
    by_quarter = [errors[0, (times * 4).long() == q].mean().item() for q in range(4)]
    numbers = {f"val_loss_quarter_{q}": round(value, 5) for q, value in enumerate(by_quarter, 1)}
    seconds = round(time.perf_counter() - start, 3)
    return errors[0].mean().item(), {**numbers, "eval_targets": len(times), "eval_seconds": seconds}
# --- end: eval ---


# ------------------------------------------------------------------------------------------------------------
# Training

def flops_per_image(T, config):
    """Matmul FLOPs of a training step for one image of T tokens; backward is twice forward."""
    C, p = config.dim, config.patch
    block = 4 * C * C + 2 * config.mlp_ratio * C * C + 2 * T * C
    return 6 * (T * (config.depth * block + 15 * p * p * C) + 4 * config.depth * C * C)


def main(argv):
    config, options, given = read_options(argv)
    keep_memory()
    run = Run("flow", config, options, given)
    check_frozen(config)
    *frozen, classes, digest = read_frozen(config)
    side = frozen[0].shape[-1]
    if options.load:
        weights, config = read_checkpoint(options.load, config, given)
        run.config = config
    check_config(config, run, side)
    if config.num_steps and config.reflow:  # its data are what the loaded model draws
        run.data_sha256 = hashlib.sha256((ROOT / options.load).read_bytes()).hexdigest()
    elif config.num_steps:
        *arrays, run.data_sha256 = read_images(config, classes, side)
    T = (side // config.patch) ** 2
    run.choose_precision(config.batch // run.world * T, config.dim, config.mlp_ratio * config.dim)
    torch.manual_seed(config.seed)
    model = Flow(config, classes, side).to(run.device)
    init_weights(model)
    if options.load:
        load_weights(model, weights, options.load)
    samples = run.prepare_show(classes=classes)
    state = run.read_state() if options.resume else None
    run.open_log()
    frozen = [part.to(run.device) for part in frozen]

    errors_of = velocity_errors
    if config.num_steps:
        if compiler_works(run):  # 64 ms per step instead of 83, in float32 on 2 cores
            errors_of = torch.compile(velocity_errors, fullgraph=True, dynamic=False)
        with run.warm_up(model):
            muon, adam = make_optimizers(model, config, run)
            rng = torch.Generator(run.device).manual_seed(0)
            dummy = (torch.zeros(config.batch, 3, side, side, dtype=torch.uint8, device=run.device),
                     torch.zeros(config.batch, dtype=torch.long, device=run.device))
            for step in range(5):
                train_step(step, dummy, rng, errors_of, model, muon, adam, config, run)
    muon, adam = make_optimizers(model, config, run)

    run.start()
    if config.num_steps:
        if config.reflow:
            with run.autocast():
                tensors = draw_pairs(model, config.reflow, config.seed, run.device)
        else:
            tensors = [torch.from_numpy(np.array(array)) for array in arrays]
        loader = Loader(tensors, config.batch, config.seed, run.device)
        if not options.load:
            model.fit(loader.tensors[0])
    if options.resume:
        run.load_state(state, model, muon, adam, loader)
    while True:
        last = run.step == config.num_steps
        if last or (run.step and run.step % config.eval_every == 0):
            run.pause()
            with run.autocast():
                val_loss, numbers = evaluate(model, *frozen, run.rank, run.world)
            run.evaluation(val_loss)
            if last:
                break
            run.go()
        batch = run.fetch(loader)
        loss = train_step(run.step, batch, loader.rng, errors_of, model, muon, adam, config, run)
        run.tokens += config.batch * T
        run.flops += config.batch * flops_per_image(T, config)
        run.progress(loss)
        if action := run.next_action():
            run.save_state(action, model, muon, adam, loader)

    velocity = frozen[2] - frozen[0]
    constant = (velocity - velocity.mean(0)).square().mean().item()  # the best image that ignores what it is given
    run.result(model, digest, {"constant_loss": round(constant, 4), **numbers})
    run.show(samples, model)


# --- copied: start ---
if __name__ == "__main__":
    try:
        record(main)(sys.argv[1:])
    except Fault as fault:
        sys.exit(f"{HERE.name}: {fault}")
# --- end: start ---
