"""Rectified flow: a Transformer learns the velocity that carries noise into pictures of one class.

After rectified flow (arXiv:2209.03003), DiT (arXiv:2212.09748) and the course's nanoFlowMatching (EPFL COM-304), made
fast: patches of 4 pixels, Muon, a preconditioned output, QK-norm, ReLU^2. Times against the baseline, record #1, are in
records/README.md.

Time runs from the data, t = 0, to noise, t = 1: z = (1 - t) x + t noise, and the velocity is noise - x.

    python train_flow.py                                        # cpu track, data from `python data/scenes.py --objects`
    python train_flow.py --load=data/frozen/flow.safetensors --reflow=4000 --num_steps=1500      # fewer sampling steps
    python train_flow.py --data=data/cifar10/train --frozen=data/cifar10/val.npz --num_steps=5000      # CIFAR-10
"""
import copy
import ctypes
import dataclasses
import hashlib
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
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------------
# Config

@dataclass
class Config:
    # data
    track: str = "cpu"
    seed: int = 0
    data: str = "data/objects64/train"  # made by `python data/scenes.py --objects`
    pixels: str = "pixels32"  # which array of it
    frozen: str = "data/frozen/objects64.npz"  # validation pictures
    frozen_draws: str = "data/frozen/eval_flow.npz"  # their times and noise
    # model
    dim: int = 128  # channels
    head_dim: int = 64
    depth: int = 2  # blocks
    mlp_ratio: int = 4
    patch: int = 4  # pixels across a token
    # schedule
    num_steps: int = 260
    batch: int = 40  # pictures a step, over all processes
    label_drop: float = 0.1  # share of pictures without their label, for classifier-free guidance
    cooldown: float = 0.7  # share of the steps over which the learning rates fall to 0
    # optimizer
    muon_lr: float = 0.025  # hidden matrices
    momentum: float = 0.9  # 0.95: 0.061 instead of 0.059 after 150 steps
    adam_lr: float = 0.01  # embeddings, modulation and head
    # evaluation and output
    target: float = 0.055  # validation loss, record #1's
    eval_every: int = 80  # steps between evaluations; the clock stands still
    eval_batch: int = 250
    quality_pictures: int = 1000  # samples that a quality number is taken on
    load: str = ""  # checkpoint to start from
    reflow: int = 0  # pictures that the loaded model draws to be trained on, for straighter paths and fewer steps
    precision: str = "auto"  # of matrix products: auto (measured), fp32 or bf16
    save: bool = False  # write checkpoints/<run id>.safetensors at the end
    save_every: int = 0  # steps between states that --resume can go on from; 0: only at SIGTERM
    resume: str = ""  # state to go on from


CONFIGS = {
    "cpu": Config(),
    "gpu": Config(track="gpu", data="data/objects128/train", pixels="pixels64", frozen="data/frozen/objects128.npz",
                  dim=384, depth=8, num_steps=4000, batch=256),
}
ARCHITECTURE = ("dim", "head_dim", "depth", "mlp_ratio", "patch")  # what a checkpoint must agree on


# --- copied: overrides ---
class Fault(Exception):
    """Something the user can put right; printed as one sentence."""


def read_config(argv):
    """The track's Config with the command line's --field=value overrides: (config, overrides)."""
    pairs = {}
    for argument in argv:
        key, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals:
            raise Fault(f"arguments look like --field=value, not {argument!r}")
        pairs[key] = value
    track = pairs.pop("track", "gpu" if torch.cuda.is_available() else "cpu")
    if track not in CONFIGS:
        raise Fault(f"--track={track} is not one of {', '.join(CONFIGS)}")
    config = copy.copy(CONFIGS[track])
    kinds = {field.name: type(getattr(config, field.name)) for field in dataclasses.fields(config)}
    for key, value in pairs.items():
        if key not in kinds:
            raise Fault(f"unknown override --{key}; the fields of Config are {', '.join(kinds)}")
        try:
            parsed = {"true": True, "false": False}[value.lower()] if kinds[key] is bool else kinds[key](value)
        except (ValueError, KeyError):
            raise Fault(f"--{key}={value} is not of type {kinds[key].__name__}") from None
        if parsed != parsed:
            raise Fault(f"--{key}={value} is not a number")
        setattr(config, key, parsed)
    return config, pairs
# --- end: overrides ---


# ------------------------------------------------------------------------------------------------------------
# Setup

# --- copied: keep memory ---
def keep_memory():
    """Have the C library keep freed memory, or a step on a CPU pays for new pages: in the flow 62 ms, with it 52."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0), libc.mallopt(-1, 2 ** 31 - 1)  # M_MMAP_MAX, M_TRIM_THRESHOLD
# --- end: keep memory ---


# --- copied: setup ---
HERE = Path(__file__).resolve()  # the repository is wherever data/frozen is: archived scripts run from their folder
ROOT = next((folder for folder in HERE.parents if (folder / "data" / "frozen").exists()), HERE.parent)
RULE = "=" * 100


def setup():
    """Join the process group if there is one: (rank, world size, device)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    return rank, world, device


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


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def matmul_flops(device, dtype, rows, dim, hidden, seconds=0.1):
    """Measured FLOP/s of products (rows, dim) x (dim, hidden) in dtype."""
    a = torch.randn(rows, dim, device=device, dtype=dtype)
    b = torch.randn(hidden, dim, device=device, dtype=dtype)
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    F.linear(a, b)  # the first call makes its kernel
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        sync()
        start = time.perf_counter()
        F.linear(a, b)
        sync()
        best = min(best, time.perf_counter() - start)
    return 2 * rows * dim * hidden / best


def choose_precision(option, device, world, *shape):
    """The precision of matrix products, "bf16" or "fp32", and the peak in FLOP/s that MFU is relative to.

    "auto" on a CPU is what multiplies matrices of this model's shape (rows, dim, hidden) faster: bf16 with AMX by far,
    fp32 on most others, where bf16 can take seven times as long. On CUDA it is bf16 from compute capability 8.0 on.
    """
    if option not in ("auto", *PRECISIONS):
        raise Fault(f"--precision={option} is not one of auto, {', '.join(PRECISIONS)}")
    if device.type == "cuda":
        chosen = "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp32"
        chosen = chosen if option == "auto" else option
        return chosen, matmul_flops(device, PRECISIONS[chosen], 8192, 8192, 8192, 0.5)  # small ones leave it idle
    measured = {name: matmul_flops(device, dtype, *shape) for name, dtype in PRECISIONS.items()}
    chosen = max(measured, key=measured.get) if option == "auto" else option
    decision = [chosen, max(measured.values())]
    if world > 1:  # one run, one precision
        dist.broadcast_object_list(decision)
    return tuple(decision)


def peak_memory_mib(device):
    """Most memory in use so far: the allocator's on CUDA, the process's elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2 ** 20 if sys.platform == "darwin" else peak / 2 ** 10


def frozen_sha256(*paths):
    """One hash of this script's frozen evaluation code and of the files that it reads."""
    code = HERE.read_text().partition("# --- " "frozen:")[2].partition("# --- " "end:")[0]
    return hashlib.sha256(b"".join([code.encode(), *(Path(path).read_bytes() for path in paths)])).hexdigest()


def graphs():
    """How many graphs torch.compile has made so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


class Log:
    """Rank 0's log file: the source, the settings, then lines that also reach the console through `say`."""

    def __init__(self, task, config, overrides, rank, device, precision):
        self.run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{task}-{config.track}-{config.seed}"
        self.file = None
        if rank:
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
        settings = {"config": dataclasses.asdict(config), "argv": sys.argv[1:], "overrides": overrides,
                    "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
                    "threads": torch.get_num_threads(), "hardware": hardware(device), "precision": precision,
                    "git": git or None}
        self.file.write(f"{HERE.read_text()}\n{RULE}\n{json.dumps(settings, indent=1)}\n{RULE}\n")
        if precision == "fp32" and device.type == "cuda":
            self.say("precision: fp32, this GPU is older than bfloat16 (compute capability 8.0)")

    def say(self, line):
        if self.file:
            self.file.write(line + "\n")
            tqdm.write(line)


def finite(loss, step):
    """Stop at the first loss that is no number: every later one would be none either."""
    if not math.isfinite(loss):
        raise Fault(f"the loss is {loss} at step {step}: lower the learning rate")
    return loss
# --- end: setup ---


# --- copied: compiler ---
def compiler_works(log, device):
    """Whether torch.compile can build code here, tried on one line: on a CPU it takes a working C++ compiler."""
    if device.type == "cpu":
        try:
            torch.compile(lambda x: x + 1)(torch.zeros(1))
        except Exception as error:  # torch.compile has many kinds
            log.say(f"torch.compile does not work here ({str(error).splitlines()[0]}): steps take longer without it")
            return False
    return True
# --- end: compiler ---


# ------------------------------------------------------------------------------------------------------------
# Data

def read_pictures(config):
    """Training pictures (N, 3, S, S) uint8, labels (N,), names of the classes and the sha256 of how they were made."""
    folder, make = ROOT / config.data, "python data/scenes.py --objects"
    if not (folder / "meta.json").exists():
        raise Fault(f"no training data in {folder}: make it with `{make}`")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        pictures, label = (np.load(folder / f"{m}.npy", allow_pickle=False) for m in (config.pixels, "label"))
        classes, num = meta["modalities"]["label"]["vocab"], meta["num"]
        if pictures.dtype != np.uint8 or pictures.shape != (num, 3, *2 * pictures.shape[-1:]):
            raise ValueError(f"{config.pixels}.npy holds {pictures.dtype} {pictures.shape}")
        if label.shape != (num, 1) or int(label.max()) >= classes:
            raise ValueError(f"label.npy holds {label.shape} up to {label.max()}")
        recipe = {key: meta[key] for key in ("name", "version", "size", "num", "seed")}
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise Fault(f"{folder} is damaged ({error}): delete it and run `{make}`") from None
    labels = torch.from_numpy(label[:, 0].astype(np.int64))
    return torch.from_numpy(pictures), labels, classes, hashlib.sha256(json.dumps(recipe).encode()).hexdigest()


def to_floats(pictures):
    """Pictures of bytes as floats in [-1, 1]."""
    return pictures.float() / 127.5 - 1


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


class Attention(nn.Module):
    def __init__(self, dim, head_dim):
        super().__init__()
        self.head_dim = head_dim
        self.q, self.k, self.v, self.proj = (Linear(dim, dim) for _ in range(4))

    def forward(self, x):
        heads = lambda y: y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
        q, k, v = norm(heads(self.q(x))), norm(heads(self.k(x))), heads(self.v(x))
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm block: attention, then a ReLU^2 MLP, both scaled and shifted by what the conditions say (AdaLN)."""

    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config.dim, config.head_dim)
        self.up = Linear(config.dim, config.mlp_ratio * config.dim)
        self.down = Linear(config.mlp_ratio * config.dim, config.dim)
        self.modulate = Linear(config.dim, 4 * config.dim)

    def forward(self, x, condition):
        scale1, shift1, scale2, shift2 = self.modulate(condition)[:, None].chunk(4, -1)
        x = x + self.attention(norm(x) * (1 + scale1) + shift1)
        return x + self.down(F.relu(self.up(norm(x) * (1 + scale2) + shift2)).square())


class Flow(nn.Module):
    """Predicts the velocity of noisy pictures (B, 3, S, S).

    The best linear guess is worked out, and the network learns the rest, scaled to variance 1 at every time
    (arXiv:2206.00364, here for a straight path from pictures with a mean picture and variance sigma^2 around it).
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
    def fit(self, pictures):
        """Take mean and sigma from pictures (N, 3, S, S) of bytes; 4,096 tell enough."""
        x = to_floats(pictures[:4096])
        self.mean.copy_(x.mean(0))
        self.sigma.copy_((x - self.mean).square().mean().sqrt())

    def forward(self, z, t, labels):
        """Velocity (B, 3, S, S) at pictures z (B, 3, S, S), times t (B,) and labels (B,)."""
        t4, p = t[:, None, None, None], self.patch
        around = z - (1 - t4) * self.mean
        spread = ((1 - t4) ** 2 * self.sigma ** 2 + t4 ** 2).sqrt()
        around = around / spread  # variance 1
        windows = F.unfold(around, 2 * p, padding=p // 2, stride=p).mT  # (B, T, 12 p^2)
        frequencies = torch.logspace(-1, 1, 32, device=t.device)
        waves = t.logit(1e-4)[:, None] * frequencies  # log of the ratio of noise to picture
        condition = norm(self.embed_time(torch.cat([waves.sin(), waves.cos()], 1)) + self.embed_label(labels))
        x = norm(self.embed_patch(windows) + self.embed_position.weight + condition[:, None])
        for block in self.blocks:
            x = block(x, condition)
        rest = F.fold(self.head(norm(x)).float().mT, self.side, p, stride=p)
        return (t4 - (1 - t4) * self.sigma ** 2) / spread * around - self.mean + self.sigma / spread * rest


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
    """Mean squared error (B,) of the velocity of pictures x (B, 3, S, S) in [-1, 1] at times t (B,), noise like x."""
    t4 = t[:, None, None, None]
    return (model((1 - t4) * x + t4 * noise, t, labels) - (noise - x)).square().mean((1, 2, 3))


# ------------------------------------------------------------------------------------------------------------
# Sampling

STEPS = (1, 2, 5, 10, 25, 50)  # that quality is reported at
SOLVERS = {"euler": 1, "midpoint": 2, "heun": 2}  # and how often a step asks the model


@torch.no_grad()
def draw_pairs(model, n, seed, device):
    """For reflow (arXiv:2209.03003): n pictures of bytes (n, 3, S, S) that the model draws, their labels (n,), and the
    noise (n, 3, S, S) that each came from. Between the two of a pair the path is to be straight."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(model.classes, (n,), generator=rng).to(device)
    noise = torch.randn(n, 3, model.side, model.side, generator=rng).to(device)
    parts = tqdm(list(zip(labels.split(250), noise.split(250))), desc="pairs", leave=False)
    made = torch.cat([sample(model, label, noise=z) for label, z in parts])
    return ((made + 1) * 127.5).round().byte(), labels, noise


@torch.no_grad()
def sample(model, labels, steps=25, solver="heun", shift=1.0, guidance=1.0, interval=(0.0, 1.0), noise=None, seed=0,
           return_trajectory=False):
    """Pictures (B, 3, S, S) in [-1, 1] for labels (B,), by following the velocity from noise, t = 1, to t = 0.

    shift: above 1 takes smaller steps near noise (arXiv:2403.03206). guidance: v = u + guidance * (c - u), u not
    knowing the label, at times inside `interval` (arXiv:2404.07724). noise (B, 3, S, S): where to start.
    return_trajectory: also the list of (t, z) on the way. Fault for a solver there is not.
    """
    if solver not in SOLVERS or steps < 1 or shift <= 0:
        raise Fault(f"solver {solver!r}, {steps} steps, shift {shift}: solvers are {', '.join(SOLVERS)}, steps at "
                    "least 1, shift above 0")
    rng, shape = torch.Generator().manual_seed(seed), (len(labels), 3, model.side, model.side)
    z = (torch.randn(shape, generator=rng) if noise is None else noise).to(labels.device)
    free = torch.full_like(labels, model.classes)

    def velocity(z, t):
        times = torch.full((len(z),), t, device=z.device)
        v = model(z, times, labels)
        if guidance == 1 or not interval[0] <= t <= interval[1]:
            return v
        u = model(z, times, free)
        return u + guidance * (v - u)

    times = [shift * t / (1 + (shift - 1) * t) for t in (1 - i / steps for i in range(steps + 1))]
    trajectory = [(1.0, z)]
    for t, to in zip(times, times[1:]):
        v = velocity(z, t)
        if solver == "midpoint":
            v = velocity(z + (to - t) / 2 * v, (t + to) / 2)
        elif solver == "heun" and to > 0:  # at t = 0 there is no noise to be seen: the last step is Euler's
            v = (v + velocity(z + (to - t) * v, to)) / 2
        z = z + (to - t) * v
        trajectory.append((to, z))
    z = z.clamp(-1, 1)
    return (z, trajectory) if return_trajectory else z


def write_samples(model, config, frozen, folder):
    """Draw samples/flow.png and flow.gif: the quality numbers for the footer, if the pictures are our objects."""
    import draw
    device, ours = frozen[0].device, config.frozen in (CONFIGS["cpu"].frozen, CONFIGS["gpu"].frozen)
    names, judge = [str(i) for i in range(model.classes)], None
    if ours:
        import classifier
        names, judge = classifier.world.CLASSES, classifier.load(device)
    unit = lambda z: (z.float().cpu() + 1) / 2
    classes = torch.arange(model.classes, device=device)
    grid = classes.repeat_interleave(4)
    made, trajectory = sample(model, grid, return_trajectory=True)
    cells = [(picture, names[label]) for picture, label in zip(unit(made), grid.tolist())]
    rows = ["four draws of every class", *(cells[i:i + 8] for i in range(0, len(cells), 8))]
    rows.append("from noise to picture")
    rows += [[(unit(z[i]), f"t = {t:.2f}") for t, z in trajectory[::3]] for i in (0, len(grid) // 2)]
    rows.append("the same noise in 1, 2, 5, 10, 25 and 50 steps of Euler's, every second row with guidance 2")
    few = classes[::max(1, model.classes // 3)][:3]
    draws = {(steps, guidance): unit(sample(model, few, steps, "euler", guidance=guidance))
             for steps in STEPS for guidance in (1.0, 2.0)}
    rows += [[(draws[steps, guidance][i], f"{steps}") for steps in STEPS]
             for i in range(len(few)) for guidance in (1.0, 2.0)]
    draw.sheet(rows, folder / "flow.png")
    draw.animation([unit(z[::4]) for _, z in trajectory[::2]] + [unit(made[::4])], folder / "flow.gif")
    numbers = {}
    wanted = classes.repeat(-(-config.quality_pictures // model.classes))[:config.quality_pictures]
    for steps in STEPS if judge and len(wanted) else ():
        parts = [sample(model, part, steps, "euler", seed=i) for i, part in enumerate(wanted.split(250))]
        made = unit(torch.cat(parts))
        numbers[f"accuracy_{steps}_steps"] = round(judge.accuracy(made, wanted), 4)
        numbers[f"frechet_{steps}_steps"] = round(judge.frechet_distance(made, "exact"), 3)
    return numbers


# ------------------------------------------------------------------------------------------------------------
# Evaluation

# --- frozen: eval ---
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
    return *floats, torch.from_numpy(labels), classes, frozen_sha256(*paths)


@torch.no_grad()
def evaluate(model, pictures, times, noise, labels, config, rank, world):
    """Mean squared error of the velocity over pixels and frozen draws: of all draws, and of the four quarters of time.

    Whatever a model predicts in training, here it gives a velocity. Ranks share the draws; all get the result.
    """
    errors = torch.zeros(len(times), dtype=torch.float64, device=times.device)
    for i in range(rank * config.eval_batch, len(times), world * config.eval_batch):
        part = slice(i, i + config.eval_batch)
        x, t, n = pictures[part], times[part], noise[part]
        t4 = t[:, None, None, None]
        velocity = model((1 - t4) * x + t4 * n, t, labels[part]).float()
        errors[part] = (velocity - (n - x)).square().mean((1, 2, 3)).double()
    if world > 1:
        dist.all_reduce(errors)
    quarter = (times * 4).long()
    return errors.mean().item(), [errors[quarter == q].mean().item() for q in range(4)]
# --- end: eval ---


# ------------------------------------------------------------------------------------------------------------
# Optimizers

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


def make_optimizers(model, config, rank, world, precision):
    """Muon for the blocks' matrices, Adam for embeddings, modulation and head; every parameter is in exactly one."""
    hidden, rest = [], []
    for name, p in model.named_parameters():
        (hidden if "blocks" in name and "modulate" not in name else rest).append(p)
    return (Muon(hidden, config.momentum, rank, world, PRECISIONS[precision]),
            torch.optim.Adam(rest, lr=config.adam_lr, betas=(0.9, 0.95), fused=True))


# --- copied: schedule ---
def schedule(step, config):
    """Share of the peak learning rates: 1, then linearly down to 0."""
    return min(1.0, (1 - step / config.num_steps) / config.cooldown)
# --- end: schedule ---


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


# --- copied: checkpoint ---
def save_checkpoint(path, model, config):
    """Weights in half precision with the Config in the file's metadata; a temporary name first."""
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(path.name + ".part")
    save_file({name: p.half().contiguous().cpu() for name, p in model.state_dict().items()}, part,
              metadata={"config": json.dumps(dataclasses.asdict(config))})
    part.replace(path)


def load_checkpoint(path, model, config):
    """Load weights that save_checkpoint wrote for the same architecture."""
    try:
        with safe_open(path, "pt") as file:
            saved = json.loads((file.metadata() or {})["config"])
            state = {name: file.get_tensor(name).float() for name in file.keys()}
    except Exception as error:  # safetensors raises its own kinds
        raise Fault(f"--load={path} is not a checkpoint of this script ({type(error).__name__}: {error})") from None
    different = [f"{key} {saved.get(key)}" for key in ARCHITECTURE if saved.get(key) != getattr(config, key)]
    if different:
        raise Fault(f"--load={path} was trained with {', '.join(different)}: pass the same as overrides")
    if missing := set(model.state_dict()) ^ set(state):
        raise Fault(f"--load={path} has other weights than this model, e.g. {sorted(missing)[0]}")
    if other := [name for name, p in model.state_dict().items() if p.shape != state[name].shape]:
        raise Fault(f"--load={path} has another shape of {other[0]} than this model: was it trained on other data?")
    model.load_state_dict(state)
# --- end: checkpoint ---


# --- copied: resume ---
WHOLE = StateDictOptions(full_state_dict=True)  # of a model that is divided among the ranks too
CURSOR = ("order", "next", "pending")  # where a Loader is in its data, besides its rng; not each has all
SIGTERM = []  # filled when the signal arrives: SLURM sends it before it takes a machine back


def due(step, config, world, device):
    """What is to follow a step: "stop" once SIGTERM has reached any rank, "save" every save_every steps, else ""."""
    stop = bool(SIGTERM)
    if world > 1:  # ranks hear of it at different steps: they agree on every tenth
        flag = torch.tensor(float(stop), device=device)
        if step % 10 == 0:
            dist.all_reduce(flag)
        stop = step % 10 == 0 and bool(flag)
    if step == config.num_steps:
        return ""
    return "stop" if stop else "save" if config.save_every and step % config.save_every == 0 else ""


def save_state(log, why, progress, config, rank, model, muon, adam, loader):
    """All that the rest of a run depends on, in one safetensors file, the same for any number of processes; a temporary
    name first, so that a full disk leaves the state before it. Ends the process if `why` is "stop"."""
    state = {f"model.{name}": value for name, value in get_model_state_dict(model, options=WHOLE).items()}
    state |= {f"muon.{i}": value for i, value in enumerate(muon.momenta())} if muon else {}
    for i, moments in adam.state_dict()["state"].items():
        state |= {f"adam.{i}.{name}": value for name, value in moments.items()}
    state |= {f"loader.{name}": torch.as_tensor(getattr(loader, name)) for name in CURSOR if hasattr(loader, name)}
    state["loader.rng"] = loader.rng.get_state()
    path = Path(config.resume or ROOT / "checkpoints" / f"{log.run_id}.state.safetensors")
    part, problem = path.with_name(path.name + ".part"), ""
    if rank == 0:
        try:
            save_file({name: value.detach().cpu().clone() for name, value in state.items()}, part,
                      metadata={"config": json.dumps(dataclasses.asdict(config)), "progress": json.dumps(progress)})
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            part.replace(path)
            log.say(f"state of step {progress['step']} in {path}")
        except (OSError, SafetensorError) as error:
            part.unlink(missing_ok=True)
            problem = f"the state of step {progress['step']} could not be saved ({error}); any before it is kept"
            log.say(problem)
    if why == "stop":
        log.say(f"stopped by SIGTERM: go on with the same command and --resume={path}")
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.exit(1 if problem else 0)


def read_state(config, data_sha256):
    """What save_state wrote of this very run: its tensors by name, and its progress."""
    try:
        with safe_open(config.resume, "pt") as file:
            saved, progress = (json.loads((file.metadata() or {})[name]) for name in ("config", "progress"))
            state = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:  # safetensors raises its own kinds
        raise Fault(f"--resume={config.resume} is not the state of a run ({type(error).__name__}: {error})") from None
    now = dataclasses.asdict(config) | {name: saved.get(name) for name in ("resume", "save_every", "save", "shard")}
    if different := [f"--{name}={saved.get(name)}" for name in now if saved.get(name) != now[name]]:
        raise Fault(f"--resume={config.resume} is of a run with {' '.join(different)}: pass the same")
    if progress["data_sha256"] != data_sha256:
        raise Fault(f"--resume={config.resume} is of a run on other training data")
    return state, progress


def load_state(state, model, muon, adam, loader):
    """Put a state that was read back where it came from."""
    part = lambda start: {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
    set_model_state_dict(model, part("model."), options=WHOLE)
    if muon:
        muon.load_momenta([value for _, value in sorted(part("muon.").items(), key=lambda item: int(item[0]))])
    moments = {}
    for name, value in part("adam.").items():
        moments.setdefault(int(name.partition(".")[0]), {})[name.partition(".")[2]] = value
    adam.load_state_dict({"state": moments, "param_groups": adam.state_dict()["param_groups"]})
    loader.rng.set_state(state["loader.rng"])
    for name in CURSOR:
        if (value := state.get(f"loader.{name}")) is not None:
            now = getattr(loader, name)
            setattr(loader, name, value.to(now.device) if torch.is_tensor(now) else value.tolist())
# --- end: resume ---


# ------------------------------------------------------------------------------------------------------------
# Training

def flops_per_picture(model, config):
    """Matmul FLOPs of a training step for one picture; backward is twice forward."""
    T, C, p = (model.side // model.patch) ** 2, config.dim, config.patch
    block = 4 * C * C + 2 * config.mlp_ratio * C * C + 2 * T * C
    return 6 * (T * (config.depth * block + 15 * p * p * C) + 4 * config.depth * C * C)


def main(argv):
    config, overrides = read_config(argv)
    if config.resume and not config.num_steps:
        raise Fault("--resume goes on with a run: pass its --num_steps, or --load to evaluate a checkpoint")
    if config.num_steps < 0 or min(config.batch, config.eval_every, config.eval_batch) < 1:
        raise Fault("num_steps must be at least 0, batch, eval_every and eval_batch at least 1")
    if config.reflow and not config.load:
        raise Fault("--reflow needs a model to draw the pictures: pass --load=<checkpoint>")
    if config.dim % config.head_dim:
        raise Fault(f"dim {config.dim} is not a multiple of head_dim {config.head_dim}")
    keep_memory()
    rank, world, device = setup()
    if config.batch % world:
        raise Fault(f"a batch of {config.batch} pictures cannot be divided among {world} processes")
    *frozen, classes, eval_sha256 = read_frozen(config)
    pictures, labels, found, data_sha256 = read_pictures(config) if config.num_steps else (None, None, classes, "none")
    side = frozen[0].shape[-1]
    if found != classes or (config.num_steps and pictures.shape[-1] != side):
        raise Fault(f"{ROOT / config.data} has other classes or another size than the frozen validation set")
    if side % config.patch or config.patch % 2:
        raise Fault(f"patches of {config.patch} pixels do not tile pictures of {side}: take an even divisor")
    frozen = [part.to(device) for part in frozen]
    shape = config.batch // world * (side // config.patch) ** 2, config.dim, config.mlp_ratio * config.dim
    precision, peak = choose_precision(config.precision, device, world, *shape)
    torch.manual_seed(config.seed)
    model = Flow(config, classes, side).to(device)
    init_weights(model)
    if config.load:
        load_checkpoint(config.load, model, config)
    state, progress = read_state(config, data_sha256) if config.resume else (None, {})
    log = Log("flow", config, overrides, rank, device, precision)
    muon, adam = make_optimizers(model, config, rank, world, precision)
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    errors_of = velocity_errors
    if compiler_works(log, device):  # 64 ms per step instead of 83, in float32 on 2 cores
        errors_of = torch.compile(velocity_errors, fullgraph=True, dynamic=False)
    mine = slice(rank * config.batch // world, (rank + 1) * config.batch // world)

    def train_step(rng, step, pictures, labels, noise=None):
        """One step on a global batch: this rank's part of its loss."""
        B = config.batch
        t = (torch.randperm(B, generator=rng, device=device) + torch.rand(B, generator=rng, device=device)) / B
        noise = torch.randn(pictures.shape, generator=rng, device=device) if noise is None else noise
        dropped = torch.rand(B, generator=rng, device=device) < config.label_drop
        labels = labels.masked_fill(dropped, classes)
        with autocast():
            loss = errors_of(model, to_floats(pictures[mine]), t[mine], noise[mine], labels[mine]).sum() / B
        loss.backward()
        sum_gradients(adam, world)
        factor = schedule(step, config)
        muon.step(config.muon_lr * factor)
        adam.param_groups[0]["lr"] = config.adam_lr * factor
        adam.step()
        model.zero_grad(set_to_none=True)
        return loss.detach()

    # Warm-up on dummy data, untimed, then everything back to where it was.
    start = time.perf_counter()
    if config.num_steps:
        before, rng = copy.deepcopy(model.state_dict()), torch.Generator(device).manual_seed(0)
        dummy = torch.zeros(config.batch, 3, side, side, dtype=torch.uint8, device=device)
        for i in range(5):
            train_step(rng, i, dummy, torch.zeros(config.batch, dtype=torch.long, device=device))
        model.load_state_dict(before)
        muon, adam = make_optimizers(model, config, rank, world, precision)
    sync()
    compile_seconds, compiled = time.perf_counter() - start, graphs()

    # The clock starts here.
    train_seconds, waited, step, loader = 0.0, 0.0, 0, None
    start = time.perf_counter()
    if config.num_steps:
        with autocast():
            pairs = draw_pairs(model, config.reflow, config.seed, device) if config.reflow else (pictures, labels)
        loader = Loader(pairs, config.batch, config.seed, device)
        if not config.load:
            model.fit(loader.tensors[0])
    if config.resume:
        load_state(state, model, muon, adam, loader)
        step, train_seconds, waited = (progress[name] for name in ("step", "seconds", "waited"))
        start = time.perf_counter()
    signal.signal(signal.SIGTERM, lambda *_: SIGTERM.append(True))
    bar = tqdm(total=config.num_steps, initial=step, disable=rank > 0, unit="step", dynamic_ncols=True)
    while True:
        last = step == config.num_steps
        if last or (step % config.eval_every == 0 and step):
            sync()
            train_seconds += time.perf_counter() - start
            with autocast():
                val_loss, quarters = evaluate(model, *frozen, config, rank, world)
            log.say(f"step:{step}/{config.num_steps} val_loss:{val_loss:.4f} train_time:{1000 * train_seconds:.0f}ms "
                    f"step_avg:{1000 * train_seconds / max(1, step):.2f}ms")
            if last:
                break
            sync()
            start = time.perf_counter()
        asked = time.perf_counter()
        batch = loader()
        waited += time.perf_counter() - asked
        loss = train_step(loader.rng, step, *batch)
        step += 1
        if step % 10 == 0:
            value = finite(loss.item() * world, step)
            bar.set_postfix(loss=f"{value:.3f}", seconds=f"{train_seconds + time.perf_counter() - start:.0f}")
        bar.update()
        if why := due(step, config, world, device):
            sync()
            train_seconds += time.perf_counter() - start
            progress = {"data_sha256": data_sha256, "step": step, "seconds": train_seconds, "waited": waited}
            save_state(log, why, progress, config, rank, model, muon, adam, loader)
            start = time.perf_counter()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    bar.close()
    finite(val_loss, step)

    # The result.
    seen = step * config.batch * (side // config.patch) ** 2
    flops = step * config.batch * flops_per_picture(model, config)
    velocity = frozen[2] - frozen[0]
    constant = (velocity - velocity.mean(0)).square().mean().item()  # the best picture that ignores what it is given
    footer = {"script": HERE.name, "task": "flow", "track": config.track, "seed": config.seed,
              "world_size": world, "hardware": hardware(device), "precision": precision, "steps": step,
              "parameters": sum(p.numel() for p in model.parameters()), "tokens": seen,
              "val_loss": round(val_loss, 5), "constant_loss": round(constant, 4),
              **{f"val_loss_quarter_{q + 1}": round(value, 5) for q, value in enumerate(quarters)},
              "target": config.target, "reached": val_loss <= config.target,
              "train_seconds": round(train_seconds, 3), "compile_seconds": round(compile_seconds, 1),
              "recompiles": graphs() - compiled, "loader_share": round(waited / max(train_seconds, 1e-9), 4),
              "tokens_per_second": round(seen / max(train_seconds, 1e-9)),
              "mfu": round(flops / max(train_seconds, 1e-9) / peak / world, 4),
              "matmul_peak_tflops": round(peak / 1e12, 2), "peak_memory_mib": round(peak_memory_mib(device)),
              "data_sha256": data_sha256, "eval_sha256": eval_sha256}
    if rank == 0:
        if config.save:
            save_checkpoint(ROOT / "checkpoints" / f"{log.run_id}.safetensors", model, config)
        sys.path.insert(0, str(ROOT / "data"))  # the judge of samples, not needed while training
        with autocast():
            footer.update(write_samples(model, config, frozen, ROOT / "samples"))
        footer["overrides"] = " ".join(f"--{key}={value}" for key, value in overrides.items()) or "none"
        for key, value in footer.items():
            log.say(f"{key}: {value}")
        with open(ROOT / "records" / "runs.jsonl", "a") as file:
            file.write(json.dumps({"run_id": log.run_id, **footer}) + "\n")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


# --- copied: start ---
if __name__ == "__main__":
    try:
        record(main)(sys.argv[1:])
    except Fault as fault:
        sys.exit(f"{HERE.name}: {fault}")
# --- end: start ---
