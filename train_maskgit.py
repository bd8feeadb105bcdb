"""MaskGIT: an encoder learns to fill in masked tokens, of pictures of one class or of text, and draws from nothing.

After MaskGIT (arXiv:2202.04200) and the nanoMaskGIT of EPFL's course COM-304, made fast: Muon, image tokens embedded
and predicted as two digits, QK-norm, ReLU^2, zero-initialised projections. Times against the baseline, record #1, are
in records/README.md.

    python train_maskgit.py                   # the cpu track, data from `python data/scenes.py --objects`
    python train_maskgit.py --data=text       # bytes of text instead of pictures, from `python data/shakespeare.py`
    python train_maskgit.py --help            # every field and what it may be
"""
import contextlib
import copy
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
    seed: int = 0  # of weights, order and masks
    data: str = "data/objects64/train"  # aligned shards, made by data/scenes.py --objects; text: data/shakespeare
    frozen: str = "data/frozen/objects64.npz"  # validation pictures
    frozen_masks: str = "data/frozen/eval_maskgit_64.npz"  # which of their tokens are masked
    # model
    dim: int = 128  # channels
    head_dim: int = 64  # channels per attention head
    depth: int = 2  # blocks
    mlp_ratio: int = 4  # hidden channels of an MLP per channel
    # optim
    muon_lr: float = 0.03  # of hidden matrices
    momentum: float = 0.95  # of Muon
    adam_lr: float = 0.02  # of embeddings and heads
    # schedule
    num_steps: int = 600  # training steps
    batch: int = 64  # rows per step, over all processes
    label_drop: float = 0.1  # share of rows without their label, for classifier-free guidance; 0 or 1: no guidance
    cooldown: float = 0.7  # share of the steps over which the learning rates fall to 0
    # eval
    target: float = 1.01  # validation loss in nats per masked token, record #1's
    eval_every: int = 200  # steps between evaluations; the clock is paused


@dataclass
class Options:
    """What a run is asked to do, beside the tuned numbers."""
    precision: str = "auto"  # of matrix products; auto measures which is faster
    load: str = ""  # checkpoint to start from; paths are relative to the repository
    save: bool = False  # write checkpoints/<run id>.safetensors at the end
    save_every: int = 0  # steps between saved states to resume from; 0: only at SIGTERM and Ctrl-C
    resume: str = ""  # saved state to resume from
    quality_pictures: int = 48  # drawn for the quality numbers, as many of each class; 0: none


CONFIGS = {
    "cpu": Config(),
    # the course's size on pictures of 256 tokens
    "gpu": Config(track="gpu", data="data/objects128/train", frozen="data/frozen/objects128.npz",
                  frozen_masks="data/frozen/eval_maskgit_128.npz", dim=512, depth=8, batch=256, num_steps=4000,
                  muon_lr=0.02, adam_lr=0.005, target=0.0),
}
ARCHITECTURE = ("dim", "head_dim", "depth", "mlp_ratio")  # what a checkpoint must agree on
LIMITS = {  # what a field may be: least and most, or choices; any other number is at least 0
    "seed": (0, 2 ** 31), "dim": (1, 8192), "head_dim": (1, 256), "depth": (1, 96), "mlp_ratio": (1, 16),
    "momentum": (0, 0.9999), "batch": (1, math.inf), "label_drop": (0, 1), "cooldown": (0.001, 1),
    "eval_every": (1, math.inf), "quality_pictures": (0, 2000),
    "precision": ("auto", "fp32", "bf16"),
}


def check_config(config, run, modalities, tokens, labels, masked):
    """What fields may be together, and with the validation set. Raises Fault for what they may not."""
    run.slice(config.batch)  # can it be divided among the processes?
    if config.dim % config.head_dim:
        raise Fault(f"--dim={config.dim} is not a multiple of --head_dim={config.head_dim}")
    length, vocab = modalities["rgb"]["length"], modalities["rgb"]["vocab"]
    if math.isqrt(vocab) ** 2 != vocab:
        raise Fault(f"{config.frozen} has a vocabulary of {vocab}, which is not a square: tokens are pairs of digits")
    if tokens.shape[1] != length or not masked.any():
        raise Fault(f"{config.frozen} has {tuple(tokens.shape)} tokens, {int(masked.sum())} are masked: rows are of "
                    f"{length}, and one at least must be masked")
    if int(tokens.max()) >= vocab or int(labels.max()) >= modalities["label"]["vocab"]:
        raise Fault(f"{config.frozen} holds tokens or labels beyond its own vocabularies")


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


# ------------------------------------------------------------------------------------------------------------
# Data

TEXT_LENGTH, TEXT_ROWS = 64, 2000  # bytes per row of --data=text, and its validation rows


def read_shards(folder, modalities):
    """Training tokens (N, L) and labels (N,) uint16, memory maps, and the sha256 of how they were made."""
    folder = ROOT / folder
    size = 8 * math.isqrt(modalities["rgb"]["length"])
    make = "python data/scenes.py --objects" if size == 64 else f"python data/scenes.py --objects --size={size}"
    if not (folder / "meta.json").exists():
        raise Fault(f"no training data in {folder}: our own is made with `{make}`")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta["modalities"] != modalities:
            raise ValueError("another vocabulary or length than the frozen validation set")
        arrays = {m: np.load(folder / f"{m}.npy", mmap_mode="r", allow_pickle=False) for m in ("rgb", "label")}
        for m, array in arrays.items():
            if array.dtype != np.uint16 or array.shape != (meta["num"], modalities[m]["length"]):
                raise ValueError(f"{m}.npy holds {array.dtype} {array.shape}")
            if int(array.max()) >= modalities[m]["vocab"]:
                raise ValueError(f"{m}.npy holds {array.max()} of a vocabulary of {modalities[m]['vocab']}")
        recipe = {key: meta[key] for key in ("name", "version", "size", "num", "seed", "tokenizer")}
    except (OSError, ValueError, TypeError, KeyError, EOFError) as error:
        raise Fault(f"{folder} cannot be trained on ({error}): our own set is made again with `{make}`, once it is "
                    "moved away") from None
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()  # not of the tokens: rounding differs
    return arrays["rgb"], arrays["label"][:, 0], digest


# --- copied: read bin ---
def read_bin(path):
    """The tokens of a .bin file in modded-nanogpt's format, a memory map (N,) uint16."""
    header = np.fromfile(path, np.int32, 256)
    if len(header) < 256 or header[0] != 20240520 or header[1] != 1:
        raise ValueError(f"{path.name} is not a .bin token file")
    if path.stat().st_size != 1024 + 2 * int(header[2]):
        raise ValueError(f"{path.name} should hold {header[2]} tokens and is {path.stat().st_size} bytes long")
    return np.memmap(path, np.uint16, "r", offset=1024, shape=(int(header[2]),))
# --- end: read bin ---


def read_text(split):
    """The bytes of data/shakespeare as rows (N, L) uint16, a memory map; what is over is left out."""
    folder = ROOT / "data" / "shakespeare"
    if not (folder / f"{split}.bin").exists():
        raise Fault(f"no {split}.bin in {folder}: make it with `python data/shakespeare.py`")
    try:
        stream = read_bin(folder / f"{split}.bin")
        rows = stream[:len(stream) // TEXT_LENGTH * TEXT_LENGTH].reshape(-1, TEXT_LENGTH)
        if not len(rows) or int(rows.max()) > 255:
            raise ValueError(f"{split}.bin is shorter than {TEXT_LENGTH} bytes, or tokens of it are no bytes")
    except (OSError, ValueError) as error:
        raise Fault(f"{folder} cannot be used ({error}): our own text is made again with `python data/shakespeare.py`, "
                    "once it is moved away") from None
    return rows


def read_frozen_text():
    """What read_frozen returns, of a text: rows without labels, and seeded masks."""
    tokens = torch.from_numpy(read_text("val")[:TEXT_ROWS].astype(np.int64))
    rng = torch.Generator().manual_seed(0)
    masked = draw_masks(*tokens.shape, rng)
    masked = masked[torch.randperm(len(masked), generator=rng)]  # rows with few masked tokens come first
    modalities = {"rgb": {"length": TEXT_LENGTH, "vocab": 256}, "label": {"length": 1, "vocab": 1}}
    return tokens, torch.zeros(len(tokens), dtype=torch.long), masked, modalities, "none"


def read_train(config, modalities):
    """Training tokens (N, L), labels (N,) and the sha256 of how they were made."""
    if config.data == "text":
        tokens = read_text("train")
        labels = np.zeros(len(tokens), np.uint16)
        digest = "none"
    else:
        tokens, labels, digest = read_shards(config.data, modalities)
    if config.batch > len(tokens):
        raise Fault(f"--batch={config.batch} is more than the {len(tokens)} training examples there are")
    return tokens, labels, digest


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


def draw_masks(B, L, rng):
    """m ~ U{1..L} of L places masked at random in each of B rows: (B, L) bool. The rows' m, in ascending order, are
    spread evenly over 1..L, which makes a batch's loss less of a gamble than independent draws do."""
    even = (torch.arange(B, device=rng.device) + torch.rand(1, generator=rng, device=rng.device)) / B
    count = 1 + (even * L).long().clamp(max=L - 1)[:, None]
    return torch.rand(B, L, generator=rng, device=rng.device).argsort(1).argsort(1) < count


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
    """Muon for the blocks' matrices, Adam for embeddings and heads; every parameter is in exactly one."""
    hidden, rest = [], []
    for name, p in model.named_parameters():
        (hidden if "blocks" in name or "mix" in name else rest).append(p)
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
    """Pre-norm block: attention, then a ReLU^2 MLP."""

    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config.dim, config.head_dim)
        self.up = Linear(config.dim, config.mlp_ratio * config.dim)
        self.down = Linear(config.mlp_ratio * config.dim, config.dim)

    def forward(self, x):
        x = x + self.attention(norm(x))
        return x + self.down(F.relu(self.up(norm(x))).square())


class MaskGIT(nn.Module):
    """Encoder over all places, masked ones included.

    A token is a pair of digits (a, b): embedded as the sum of both and of the pair, predicted as p(a) p(b | a), so that
    codes which look alike share what is learned and no softmax has 4096 classes.
    """

    def __init__(self, config, modalities):
        super().__init__()
        C = config.dim
        self.vocab, self.length = modalities["rgb"]["vocab"], modalities["rgb"]["length"]
        self.num_labels = modalities["label"]["vocab"]
        self.base = math.isqrt(self.vocab)  # of the digits
        self.embed_a, self.embed_b = nn.Embedding(self.base, C), nn.Embedding(self.base, C)
        self.embed_pair, self.embed_mask = nn.Embedding(self.vocab, C), nn.Embedding(1, C)
        self.embed_position = nn.Embedding(self.length, C)
        self.embed_label = nn.Embedding(self.num_labels + 1, C)  # the last one: no label
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_a, self.head_b = Linear(C, self.base), Linear(C, self.base)
        self.embed_first, self.mix = nn.Embedding(self.base, C), Linear(C, C)  # p(b | a) is a small MLP of both

    def forward(self, tokens, labels, masked):
        """Final states (B, L, C) for tokens (B, L), those where masked (B, L) hidden, and labels (B,)."""
        pairs = (self.embed_b.weight[:, None] + self.embed_a.weight).flatten(0, 1)  # id = a + base * b
        table = torch.cat([pairs + self.embed_pair.weight, self.embed_mask.weight])
        x = F.embedding(tokens.masked_fill(masked, self.vocab), table)
        x = norm(x + self.embed_position.weight + self.embed_label(labels)[:, None])  # (B, L, C)
        for block in self.blocks:
            x = block(x)
        return norm(x)

    def logits_b(self, y, a):
        """Logits of the second digit given states y (..., C) and first digits a (...)."""
        return self.head_b(F.relu(self.mix(y) + self.embed_first(a)).square())

    def nll(self, y, ids):
        """Cross-entropy (N,) of ids (N,) given states y (N, C)."""
        a, b = ids % self.base, ids // self.base
        first = F.cross_entropy(self.head_a(y).float(), a, reduction="none")
        return first + F.cross_entropy(self.logits_b(y, a).float(), b, reduction="none")

    def log_probabilities(self, y):
        """Of all tokens, (N, vocab), given states y (N, C)."""
        a, joint = torch.arange(self.base, device=y.device), []
        for rows in y.split(512):
            log_b = self.logits_b(rows[:, None], a).float().log_softmax(-1)  # (rows, a, b)
            log_a = self.head_a(rows).float().log_softmax(-1)
            joint.append(log_b.transpose(1, 2) + log_a[:, None])  # (rows, b, a)
        return torch.cat(joint).flatten(1)

    def log_probs(self, tokens, labels, masked):
        """float32 (n, vocab) of what is at the n places where masked (B, L), given labels (B,) and tokens (B, L)."""
        return self.log_probabilities(self(tokens, labels, masked)[masked])


def init_weights(model):
    for name, p in model.named_parameters():
        if "proj" in name or "down" in name or "head" in name:
            nn.init.zeros_(p)
        elif "embed" in name:
            nn.init.normal_(p, std=0.02)
        elif "attention" in name or "up" in name or "mix" in name:
            nn.init.normal_(p, std=p.shape[1] ** -0.5)
        else:
            raise AssertionError(f"no initialisation for {name}")


# ------------------------------------------------------------------------------------------------------------
# Loss

def masked_nats(model, tokens, labels, masked):
    """Cross-entropy (N,) in nats of the N tokens (B, L) that masked (B, L) marks, given all others and labels (B,)."""
    return model.nll(model(tokens, labels, masked)[masked], tokens[masked])


def train_step(step, tokens, labels, rng, model, muon, adam, config, run):
    """One step on a global batch (B, L): this rank's part of its loss."""
    masked = draw_masks(*tokens.shape, rng)
    dropped = torch.rand(len(labels), generator=rng, device=labels.device) < config.label_drop
    labels = labels.masked_fill(dropped, model.num_labels)
    shard = slice(run.rank, None, run.world)  # not a run of rows: draw_masks has heavily masked ones last
    with run.autocast():
        nll = masked_nats(model, tokens[shard], labels[shard], masked[shard])
        loss = nll.sum() / masked.sum()
    loss.backward()
    sum_gradients(adam, run.world)
    factor = schedule(step, config)
    muon.step(config.muon_lr * factor)
    adam.param_groups[0]["lr"] = config.adam_lr * factor
    adam.step()
    model.zero_grad(set_to_none=True)
    return nll.detach().mean() / run.world  # ranks have almost, not quite as many masked tokens


# ------------------------------------------------------------------------------------------------------------
# Sampling

SCHEDULES, ORDERS = ("constant", "cosine", "exponential"), ("confidence", "random", "halton")


def share_masked(schedule, progress):
    """Share of the tokens that is still masked at a progress of 0 to 1."""
    if schedule == "constant":
        return 1 - progress
    if schedule == "cosine":
        return math.cos(math.pi / 2 * progress)
    return 1 - math.expm1(3 * progress) / math.expm1(3)


def radical_inverse(i, base):
    """The digits of i in a base, mirrored at the point: a number from 0 to 1."""
    value, scale = 0.0, 1.0
    while i:
        scale /= base
        value += i % base * scale
        i //= base
    return value


def halton_order(side):
    """The cells of a grid (side * side,) in the order of the 2-D Halton sequence, which spreads them evenly
    (arXiv:2503.17076)."""
    cells, i = {}, 1  # a dict keeps the first time of each
    while len(cells) < side * side:
        row, column = int(radical_inverse(i, 2) * side), int(radical_inverse(i, 3) * side)
        cells.setdefault(row * side + column)
        i += 1
    return torch.tensor(list(cells))


# --- copied: sharpen ---
def sharpen(logits, temperature, top_k, top_p):
    """Logits (..., V) of what is drawn: at a temperature, the top_k likeliest, of them the fewest that hold top_p."""
    logits = logits / max(temperature, 1e-4)
    if top_k:
        least = logits.topk(min(top_k, logits.size(-1)))[0][..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1:
        ranked, order = logits.softmax(-1).sort(-1, descending=True)
        cut = ranked.cumsum(-1) - ranked >= top_p
        cut[..., 0] = False  # the likeliest token always stays
        logits = logits.masked_fill(torch.zeros_like(cut).scatter(-1, order, cut), -math.inf)
    return logits
# --- end: sharpen ---


def gumbel(shape, rng):
    """Gumbel noise: argmax(logits + noise) is a draw from the softmax."""
    uniform = torch.rand(shape, generator=rng, device=rng.device).clamp(1e-20, 1 - 1e-7)
    return -(-uniform.log()).log()


def predict(model, tokens, labels, masked, guidance):
    """Logits (N, vocab) of the N masked tokens; guidance: u + guidance * (c - u), u not knowing the label."""
    logits = model.log_probs(tokens, labels, masked)
    if guidance != 1:
        unlabelled = torch.full_like(labels, model.num_labels)
        base = model.log_probs(tokens, unlabelled, masked)
        logits = base + guidance * (logits - base)
    return logits


@torch.no_grad()
def generate(model, labels, tokens=None, masked=None, steps=12, schedule="cosine", order="halton", noise=4.5,
             temperature=1.0, top_k=0, top_p=1.0, guidance=1.0, seed=0, return_history=False):
    """Fill in tokens (B, L) where masked (B, L), everywhere if they are None, for labels (B,): new tokens (B, L).

    order: "confidence" keeps the likeliest draws, their log-probabilities blurred by Gumbel noise times `noise`, which
    falls to 0; "random" and "halton" fix the places beforehand. guidance: logits u + guidance * (c - u), u not knowing
    the label. return_history: also a list of (tokens, masked) after each step. Fault for what a setting may not be.
    """
    if schedule not in SCHEDULES or order not in ORDERS or steps < 1:
        raise Fault(f"schedule {schedule!r}, order {order!r}, {steps} steps: schedules are {', '.join(SCHEDULES)}, "
                    f"orders are {', '.join(ORDERS)}, steps at least 1")
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise Fault(f"temperature {temperature}, top_k {top_k}, top_p {top_p}: temperature and top_k are at least 0, "
                    "top_p is above 0 and at most 1")
    B, L, device = len(labels), model.length, labels.device
    rng = torch.Generator(device).manual_seed(seed)
    tokens = torch.zeros(B, L, dtype=torch.long, device=device) if tokens is None else tokens.clone()
    masked = torch.ones(B, L, dtype=torch.bool, device=device) if masked is None else masked.clone()
    total = masked.sum(1, keepdim=True)
    history = []
    rank = torch.rand(B, L, generator=rng, device=device).argsort(1).argsort(1).float()  # when a place is filled in
    if order == "halton" and math.isqrt(L) ** 2 == L:
        rank = halton_order(math.isqrt(L)).argsort().to(device).float().expand(B, L)
    for step in range(steps):
        progress = (step + 1) / steps
        logits = sharpen(predict(model, tokens, labels, masked, guidance), temperature, top_k, top_p)
        ids = (logits + gumbel(logits.shape, rng)).argmax(-1)
        tokens = tokens.masked_scatter(masked, ids)
        if order == "confidence":
            confidence = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
            confidence += noise * (1 - progress) * gumbel(ids.shape, rng)
            rank = torch.zeros(B, L, device=device).masked_scatter(masked, -confidence)
        left = (total * share_masked(schedule, progress)).long()
        left = left.clamp(max=masked.sum(1, keepdim=True) - 1)  # at least one place per step
        if step + 1 == steps:
            left = torch.zeros_like(left)
        ranked = rank.masked_fill(~masked, -math.inf)  # the last `left` of a row stay masked
        masked = ranked.argsort(1).argsort(1) >= L - left
        history.append((tokens.masked_fill(masked, 0), masked))
    return (tokens, history) if return_history else tokens


# ------------------------------------------------------------------------------------------------------------
# Evaluation

# --- frozen: eval ---
EVAL_BATCH = 100  # pictures at a time; the first ones are predicted a second time


def eval_sha256(*paths):
    """One hash of this block and of the files that it reads."""
    code = HERE.read_text().partition("# --- " "frozen:")[2].partition("# --- " "end:")[0]
    return hashlib.sha256(b"".join([code.encode(), *(Path(path).read_bytes() for path in paths)])).hexdigest()


def read_frozen(config):
    """Validation tokens (N, L), labels (N,), masked places (N, L), the vocabularies, and the sha256 of it all."""
    paths = [ROOT / config.frozen, ROOT / config.frozen_masks]
    for name in (config.frozen, config.frozen_masks):
        if not (ROOT / name).exists():
            raise Fault(f"{ROOT / name} is missing: it belongs to the repository (`git checkout {name}`)")
    try:
        with np.load(paths[0], allow_pickle=False) as arrays:
            modalities = json.loads(bytes(arrays["modalities"]))
            tokens, labels = (torch.from_numpy(arrays[m].astype(np.int64)) for m in ("rgb", "label"))
        with np.load(paths[1], allow_pickle=False) as arrays:
            masked = torch.from_numpy(arrays["masked"])
        if masked.shape != tokens.shape or masked.dtype != torch.bool:
            raise ValueError(f"{masked.dtype} masks {tuple(masked.shape)} for tokens {tuple(tokens.shape)}")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise Fault(f"the frozen validation set is damaged ({error}): `git checkout data/frozen`") from None
    return tokens, labels[:, 0], masked, modalities, eval_sha256(*paths)


def fingerprint(model):
    """Shape, sum and absolute sum of every parameter and buffer."""
    tensors = [tensor.double() for tensor in (*model.parameters(), *model.buffers())]
    return [(tensor.shape, tensor.sum().item(), tensor.abs().sum().item()) for tensor in tensors]


def target_log_probs(model, tokens, labels, masked, vocab):
    """What the model gives the n tokens (B, L) where masked (B, L), which are blanked: log-probabilities (n,).
    Raises Fault for another shape or dtype, for one that is not finite, and where a place's do not sum to 1."""
    targets = tokens[masked]
    logs = model.log_probs(tokens.masked_fill(masked, 0), labels.clone(), masked.clone())
    if logs.shape != (len(targets), vocab) or logs.dtype != torch.float32:
        raise Fault(f"log_probs gives {logs.dtype} {tuple(logs.shape)}, not float32 {(len(targets), vocab)}")
    found = logs.gather(1, targets[:, None])[:, 0]
    if not found.isfinite().all():
        raise Fault("a log-probability that counts is not finite")
    if ((logs.exp().sum(1) - 1).abs() > 1e-3).any():
        raise Fault("the probabilities of a place do not sum to 1")
    return found


@torch.no_grad()
def evaluate(model, tokens, labels, masked, vocab, rank, world):
    """Mean cross-entropy in nats over all masked tokens, of a vocabulary, each given its picture's other tokens and
    label alone; and further numbers for the footer.

    model.log_probs(tokens (B, L), labels (B,), masked (B, L)) gives float32 (n, vocab) of the n masked places, row by
    row. It is checked by target_log_probs; the first batch is predicted again at the end, while every validation token
    is another one, and must be the same, as must the model's tensors. Ranks share the pictures; all get the result.
    """
    start, before = time.perf_counter(), fingerprint(model)
    total = torch.zeros(2, dtype=torch.float64, device=tokens.device)  # nats, tokens
    parts = [slice(i, i + EVAL_BATCH) for i in range(rank * EVAL_BATCH, len(tokens), world * EVAL_BATCH)]
    logs = [target_log_probs(model, tokens[part], labels[part], masked[part], vocab) for part in parts]
    for part, found in zip(parts, logs):
        total += torch.stack([-found.double().sum(), masked[part].sum()])
    kept = tokens.clone()
    tokens.add_(1).remainder_(vocab)  # every token is another one now
    for part, found in zip(parts[:1], logs):
        again = target_log_probs(model, kept[part], labels[part], masked[part], vocab)
        if ((again - found).abs() > 1e-3).any():
            raise Fault("a prediction is another one where only tokens differ that it may not depend on")
    tokens.copy_(kept)
    if fingerprint(model) != before:
        raise Fault("the model's parameters or buffers are not what they were before the evaluation")
    if world > 1:
        dist.all_reduce(total)
    if total[1] != masked.sum():
        raise Fault(f"{int(total[1])} tokens were predicted, and {int(masked.sum())} are masked")
    seconds = round(time.perf_counter() - start, 3)
    return (total[0] / total[1]).item(), {"eval_targets": int(total[1]), "eval_seconds": seconds}
# --- end: eval ---


# ------------------------------------------------------------------------------------------------------------
# Training

def flops_per_row(model, config):
    """Matmul FLOPs of a training step for one row; backward is twice forward, half the places go to the heads."""
    L, C = model.length, config.dim
    block = 4 * C * C + 2 * config.mlp_ratio * C * C + 2 * L * C
    heads = (2 * model.base + C) * C
    return 6 * L * (config.depth * block + heads / 2)


def main(argv):
    config, options, given = read_options(argv)
    run = Run("maskgit", config, options, given)
    *frozen, modalities, digest = read_frozen_text() if config.data == "text" else read_frozen(config)
    if options.load:
        weights, config = read_checkpoint(options.load, config, given)
        run.config = config
    check_config(config, run, modalities, *frozen)
    if config.num_steps:
        tokens, labels, run.data_sha256 = read_train(config, modalities)
    rows = config.batch // run.world * modalities["rgb"]["length"]
    run.choose_precision(rows, config.dim, config.mlp_ratio * config.dim)
    torch.manual_seed(config.seed)
    model = MaskGIT(config, modalities).to(run.device)
    init_weights(model)
    if options.load:
        load_weights(model, weights, options.load)
    if run.device.type == "cuda":
        model.compile(fullgraph=True, dynamic=False)
    frozen = [part.to(run.device) for part in frozen]
    vocab = modalities["rgb"]["vocab"]
    samples = run.prepare_show(modalities=modalities, frozen=frozen)
    state = run.read_state() if options.resume else None
    run.open_log()

    if config.num_steps:
        with run.warm_up(model):
            muon, adam = make_optimizers(model, config, run)
            rng = torch.Generator(run.device).manual_seed(0)
            dummy = torch.zeros(config.batch, model.length, dtype=torch.long, device=run.device)
            for step in range(5):
                train_step(step, dummy, dummy[:, 0], rng, model, muon, adam, config, run)
            if run.device.type == "cuda":  # its shapes are compiled, too
                with run.autocast():
                    evaluate(model, *frozen, vocab, run.rank, run.world)
    muon, adam = make_optimizers(model, config, run)

    run.start()
    if config.num_steps:
        arrays = [torch.from_numpy(array.astype(np.int16)) for array in (tokens, labels)]
        loader = Loader(arrays, config.batch, config.seed, run.device)
    if options.resume:
        run.load_state(state, model, muon, adam, loader)
    while True:
        last = run.step == config.num_steps
        if last or (run.step and run.step % config.eval_every == 0):
            run.pause()
            with run.autocast():
                val_loss, numbers = evaluate(model, *frozen, vocab, run.rank, run.world)
            run.evaluation(val_loss)
            if last:
                break
            run.go()
        tokens, labels = run.fetch(loader)
        loss = train_step(run.step, tokens.long(), labels.long(), loader.rng, model, muon, adam, config, run)
        run.tokens += config.batch * model.length
        run.flops += config.batch * flops_per_row(model, config)
        run.progress(loss)
        if action := run.next_action():
            run.save_state(action, model, muon, adam, loader)

    run.result(model, digest, numbers)
    run.show(samples, model)


# --- copied: start ---
if __name__ == "__main__":
    try:
        record(main)(sys.argv[1:])
    except Fault as fault:
        sys.exit(f"{HERE.name}: {fault}")
# --- end: start ---
