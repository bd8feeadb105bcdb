"""Rectified flow: a Transformer learns the velocity that carries noise into pictures of one class.

The course's recipe (EPFL COM-304 nanoFlowMatching, after minRF): a LLaMA-like DiT (arXiv:2212.09748) in its MNIST size,
trained by rectified flow (arXiv:2209.03003). This is record #1, the public baseline. Its final frozen validation loss
defines the track's target.

Time runs from the data, t = 0, to noise, t = 1: z = (1 - t) x + t noise, and the velocity is noise - x.

    python train_flow.py                                        # cpu track, data from `python data/scenes.py --objects`
"""
import copy
import ctypes
import dataclasses
import hashlib
import json
import math
import os
import platform
import shutil
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
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
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
    dim: int = 64  # channels
    depth: int = 6  # blocks
    heads: int = 4
    patch: int = 2  # pixels across a token
    # schedule
    num_steps: int = 1150
    batch: int = 64  # pictures a step, over all processes; the course's 256 would leave 300 steps
    label_drop: float = 0.1  # share of pictures without their label, for classifier-free guidance
    # optimizer
    lr: float = 5e-4  # Adam, constant
    # evaluation and output
    target: float = 0.0  # validation loss, record #1's
    eval_every: int = 200  # steps between evaluations; the clock stands still
    eval_batch: int = 250
    quality_pictures: int = 1000  # samples that a quality number is taken on
    load: str = ""  # checkpoint to start from
    save: bool = False  # write checkpoints/<run id>.safetensors at the end


CONFIGS = {
    "cpu": Config(),
    # the course's CIFAR-10 size
    "gpu": Config(track="gpu", data="data/objects128/train", pixels="pixels64", frozen="data/frozen/objects128.npz",
                  dim=256, depth=10, heads=8, num_steps=8000),
}
ARCHITECTURE = ("dim", "depth", "heads", "patch")  # what a checkpoint must agree on


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

def keep_memory():
    """Have the C library keep freed memory: else a step on a CPU pays for new pages, 0.59 s instead of 0.46."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0), libc.mallopt(-1, 2 ** 31 - 1)  # M_MMAP_MAX, M_TRIM_THRESHOLD


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


def matmul_peak(device, n=2048, seconds=0.5):
    """Measured bf16 matmul throughput of this machine in FLOP/s, what MFU is relative to."""
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    a @ b
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        sync()
        start = time.perf_counter()
        a @ b
        sync()
        best = min(best, time.perf_counter() - start)
    return 2 * n ** 3 / best


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


class Log:
    """Rank 0's log file: the source, the settings, then lines that also reach the console through `say`."""

    def __init__(self, task, config, overrides, rank, device):
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
                    "threads": torch.get_num_threads(), "hardware": hardware(device), "git": git or None}
        self.file.write(f"{HERE.read_text()}\n{RULE}\n{json.dumps(settings, indent=1)}\n{RULE}\n")

    def say(self, line):
        if self.file:
            self.file.write(line + "\n")
            tqdm.write(line)


def finite(loss, step):
    """Stop at the first loss that is no number: every later one would be none either."""
    if not math.isfinite(loss):
        raise Fault(f"the loss is {loss} at step {step}: lower the learning rate (nothing was saved)")
    return loss
# --- end: setup ---


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
        if batch > len(tensors[0]):
            raise Fault(f"a batch of {batch} is more than the {len(tensors[0])} training examples there are")
        self.rng = torch.Generator(device).manual_seed(seed)
        self.order, self.next = torch.empty(0, dtype=torch.long, device=device), 0

    def __call__(self):
        if self.next + self.batch > len(self.order):
            rows = len(self.tensors[0])
            self.order, self.next = torch.randperm(rows, generator=self.rng, device=self.order.device), 0
        self.next += self.batch
        rows = self.order[self.next - self.batch:self.next]
        return [tensor[rows] for tensor in self.tensors]
# --- end: loader ---


# ------------------------------------------------------------------------------------------------------------
# Attention

# --- copied: attend ---
def attend(q, k, v, visible=None):
    """Softmax attention of q (B, H, M, D) over k, v (B, H, N, D); visible (B, N): keys that may be seen, None: all."""
    mask = None if visible is None else visible[:, None, None]
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.size(-1) ** -0.5) @ k.mT  # written out: torch 2.13's fused kernel is 3x slower on a CPU with AMX
    if mask is not None:
        scores = scores.masked_fill(~mask, -3e4)
    return scores.softmax(-1).type_as(v) @ v
# --- end: attend ---


# ------------------------------------------------------------------------------------------------------------
# Model

def rotate(x):
    """Rotary positions (arXiv:2104.09864), in one dimension, on x (B, H, T, D)."""
    D = x.size(-1)
    speed = 10000 ** (-torch.arange(0, D, 2, device=x.device) / D)
    angle = torch.arange(x.size(2), device=x.device)[:, None] * speed
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # pairs of neighbouring channels
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).type_as(x)


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.q_norm, self.k_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x):
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T, D)
        q, k, v = split(self.q_norm(self.wq(x))), split(self.k_norm(self.wk(x))), split(self.wv(x))
        return self.wo(attend(rotate(q).type_as(v), rotate(k).type_as(v), v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU, its width two thirds of 4 dim, rounded up to 256."""

    def __init__(self, dim):
        super().__init__()
        hidden = -(-int(8 * dim / 3) // 256) * 256
        self.w1, self.w3 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.attention, self.feed_forward = Attention(dim, heads), FeedForward(dim)
        self.attention_norm, self.ffn_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, condition):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(condition).chunk(6, -1)
        x = x + gate1[:, None] * self.attention(modulate(self.attention_norm(x), shift1, scale1))
        return x + gate2[:, None] * self.feed_forward(modulate(self.ffn_norm(x), shift2, scale2))


class Flow(nn.Module):
    """Predicts the velocity of noisy pictures (B, 3, S, S)."""

    def __init__(self, config, classes, side):
        super().__init__()
        C, p = config.dim, config.patch
        self.side, self.patch, self.classes = side, p, classes
        half = C // 2
        self.stem = nn.Sequential(nn.Conv2d(3, half, 5, padding=2), nn.SiLU(), nn.GroupNorm(32, half),
                                  nn.Conv2d(half, half, 5, padding=2), nn.SiLU(), nn.GroupNorm(32, half))
        self.embed_patch = nn.Linear(half * p * p, C)
        self.embed_time = nn.Sequential(nn.Linear(256, C), nn.SiLU(), nn.Linear(C, C))
        self.embed_label = nn.Embedding(classes + 1, C)  # the last one: no label
        self.blocks = nn.ModuleList(Block(C, config.heads) for _ in range(config.depth))
        self.final_norm = nn.LayerNorm(C, eps=1e-6, elementwise_affine=False)
        self.final_adaln = nn.Sequential(nn.SiLU(), nn.Linear(C, 2 * C))
        self.head = nn.Linear(C, 3 * p * p)

    def forward(self, z, t, labels):
        """Velocity (B, 3, S, S) at pictures z (B, 3, S, S), times t (B,) and labels (B,)."""
        angle = t[:, None] * 10000 ** (-torch.arange(128, device=t.device) / 128)
        condition = self.embed_time(torch.cat([angle.cos(), angle.sin()], 1)) + self.embed_label(labels)
        x = self.embed_patch(F.pixel_unshuffle(self.stem(z), self.patch).flatten(2).mT)  # (B, T, C)
        for block in self.blocks:
            x = block(x, condition)
        x = self.head(modulate(self.final_norm(x), *self.final_adaln(condition).chunk(2, -1)))
        g = self.side // self.patch
        return F.pixel_shuffle(x.mT.unflatten(2, (g, g)), self.patch)


def init_weights(model):
    """torch's defaults, but for zeros in the head."""
    nn.init.zeros_(model.embed_patch.bias)
    nn.init.zeros_(model.head.weight), nn.init.zeros_(model.head.bias)


# ------------------------------------------------------------------------------------------------------------
# Loss

def velocity_errors(model, x, t, noise, labels):
    """Mean squared error (B,) of the velocity of pictures x (B, 3, S, S) in [-1, 1] at times t (B,), noise like x."""
    t4 = t[:, None, None, None]
    return (model((1 - t4) * x + t4 * noise, t, labels) - (noise - x)).square().mean((1, 2, 3))


# ------------------------------------------------------------------------------------------------------------
# Sampling

STEPS, QUALITY_STEPS = (1, 2, 5, 10, 25, 50), (25,)  # that are drawn, that quality is reported at
SOLVERS = {"euler": 1, "midpoint": 2, "heun": 2}  # and how often a step asks the model


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
    draw.animation([unit(z[::2]) for _, z in trajectory], folder / "flow.gif")
    numbers = {}
    wanted = classes.repeat(-(-config.quality_pictures // model.classes))[:config.quality_pictures]
    for steps in QUALITY_STEPS if judge and len(wanted) else ():
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

# --- copied: sum gradients ---
def sum_gradients(model, world):
    """Add up the gradients of all ranks, in one flat message."""
    if world == 1:
        return
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    for g, part in zip(grads, flat.split([g.numel() for g in grads])):
        g.copy_(part.view_as(g))
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


# ------------------------------------------------------------------------------------------------------------
# Training

def flops_per_picture(model, config):
    """Matmul FLOPs of a training step for one picture; backward is twice forward."""
    T, C, p = (model.side // model.patch) ** 2, config.dim, config.patch
    stem, ends = 25 * (3 + C // 2) * C // 2 * p * p, p * p * (C // 2 + 3) * C
    hidden = model.blocks[0].feed_forward.w1.out_features
    return 6 * T * (config.depth * (4 * C * C + 3 * hidden * C + 2 * T * C) + stem + ends)


def main(argv):
    config, overrides = read_config(argv)
    if config.num_steps < 0 or min(config.batch, config.eval_every, config.eval_batch) < 1:
        raise Fault("num_steps must be at least 0, batch, eval_every and eval_batch at least 1")
    if config.dim % 64 or config.dim % (4 * config.heads):
        raise Fault(f"dim {config.dim} must be a multiple of 64 and of 4 * heads")
    keep_memory()
    rank, world, device = setup()
    if config.batch % world:
        raise Fault(f"a batch of {config.batch} pictures cannot be divided among {world} processes")
    *frozen, classes, eval_sha256 = read_frozen(config)
    pictures, labels, found, data_sha256 = read_pictures(config) if config.num_steps else (None, None, classes, "none")
    side = frozen[0].shape[-1]
    if found != classes or (config.num_steps and pictures.shape[-1] != side):
        raise Fault(f"{ROOT / config.data} has other classes or another size than the frozen validation set")
    if side % config.patch:
        raise Fault(f"patches of {config.patch} pixels do not tile pictures of {side}")
    frozen = [part.to(device) for part in frozen]
    torch.manual_seed(config.seed)
    model = Flow(config, classes, side).to(device)
    init_weights(model)
    if config.load:
        load_checkpoint(config.load, model, config)
    log = Log("flow", config, overrides, rank, device)
    peak = matmul_peak(device)
    adam = torch.optim.Adam(model.parameters(), lr=config.lr)
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    autocast = lambda: torch.autocast(device.type, torch.bfloat16)

    mine = slice(rank * config.batch // world, (rank + 1) * config.batch // world)

    def train_step(pictures, labels, rng):
        """One step on a global batch: this rank's part of its loss."""
        B = config.batch
        t = torch.rand(B, generator=rng, device=device)
        noise = torch.randn(pictures.shape, generator=rng, device=device)
        dropped = torch.rand(B, generator=rng, device=device) < config.label_drop
        labels = labels.masked_fill(dropped, classes)
        with autocast():
            loss = velocity_errors(model, to_floats(pictures[mine]), t[mine], noise[mine], labels[mine]).sum() / B
        loss.backward()
        sum_gradients(model, world)
        adam.step()
        model.zero_grad(set_to_none=True)
        return loss.detach()

    # Warm-up on dummy data, untimed, then everything back to where it was.
    start = time.perf_counter()
    if config.num_steps:
        before, rng = copy.deepcopy(model.state_dict()), torch.Generator(device).manual_seed(0)
        dummy = torch.zeros(config.batch, 3, side, side, dtype=torch.uint8, device=device)
        for _ in range(5):
            train_step(dummy, torch.zeros(config.batch, dtype=torch.long, device=device), rng)
        model.load_state_dict(before)
        adam = torch.optim.Adam(model.parameters(), lr=config.lr)
    sync()
    compile_seconds = time.perf_counter() - start

    # The clock starts here.
    train_seconds, step = 0.0, 0
    start = time.perf_counter()
    if config.num_steps:
        loader = Loader((pictures, labels), config.batch, config.seed, device)
    bar = tqdm(total=config.num_steps, disable=rank > 0, unit="step", dynamic_ncols=True)
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
        loss = train_step(*loader(), loader.rng)
        step += 1
        if step % 10 == 0:
            value = finite(loss.item() * world, step)
            bar.set_postfix(loss=f"{value:.3f}", seconds=f"{train_seconds + time.perf_counter() - start:.0f}")
        bar.update()
    bar.close()
    finite(val_loss, step)

    # The result.
    seen = step * config.batch * (side // config.patch) ** 2
    flops = step * config.batch * flops_per_picture(model, config)
    velocity = frozen[2] - frozen[0]
    constant = (velocity - velocity.mean(0)).square().mean().item()  # the best picture that ignores what it is given
    footer = {"script": HERE.name, "task": "flow", "track": config.track, "seed": config.seed,
              "world_size": world, "hardware": hardware(device), "steps": step,
              "parameters": sum(p.numel() for p in model.parameters()), "tokens": seen,
              "val_loss": round(val_loss, 5), "constant_loss": round(constant, 4),
              **{f"val_loss_quarter_{q + 1}": round(value, 5) for q, value in enumerate(quarters)},
              "target": config.target, "reached": val_loss <= config.target,
              "train_seconds": round(train_seconds, 3), "compile_seconds": round(compile_seconds, 1),
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


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Fault as fault:
        sys.exit(f"{HERE.name}: {fault}")
