"""Rectified flow as EPFL's course COM-304 trains it: the public baseline of the tracks of train_flow.py.

The recipe (nanoFlowMatching of github.com/EPFL-VILAB/com-304-FM-project-2026, after github.com/cloneofsimo/minRF),
written afresh: a LLaMA-like DiT (arXiv:2212.09748) learns the velocity of a rectified flow (arXiv:2209.03003). Two
convolutions of 5 x 5, then patches of 2 pixels; blocks of attention, with LayerNorm on queries and keys over all heads
and rotary positions in one dimension, and of SwiGLU, both shifted, scaled and gated by time and label; torch's
initialisation, but a head of zeros. Adam at a constant rate; 256 images per step, a tenth of them without their label.

Time runs from the data, t = 0, to noise, t = 1: z = (1 - t) x + t noise, and the velocity is noise - x.

The cpu tracks have the course's 6 blocks of 4 heads for MNIST, cpu-mnist its dim 64 and 30 epochs as well; the gpu
track has its CIFAR-10 size, dim 256 and 10 blocks of 8 heads. What differs from the course elsewhere, and why:

    size      cpu: dim 128, not 64: on one core the loss is 0.107 after 163 s, with dim 64 0.122 after 204 s; dim 192
              is behind dim 128 as well
    images    close-ups in colour, 24 classes, 32 or 64 pixels, instead of MNIST or CIFAR-10: the tracks' data;
              cpu-mnist: 9,000 digits, not 60,000
    batch     cpu, cpu-mnist: 64 images, not 256: four times as many steps in the same time; of digits the loss is
              0.201 after 302 s of one core with 64 at dim 64, 1.145 after 309 s with 256, with 64 at dim 128 1.121
              after 187 s and above 0.5 in training after 350 s
    steps     cpu: 5,000 instead of 30 epochs of MNIST, which are 7,000 of 256 images: a baseline has two hours
              gpu: as many as 100 epochs of CIFAR-10
    rotary    a pair of channels are half a head apart instead of side by side: the same model in another order
    samples   by the solvers of train_flow.py, guided where those are, so that their quality compares

The loss is compiled where a compiler works, which changes no result.

    python baselines/train_flow_course.py             # the cpu track, data from `python data/scenes.py --objects`
    python baselines/train_flow_course.py --help      # every field and what it may be
"""
import contextlib
import copy
import ctypes
import hashlib
import importlib
import json
import math
import os
import platform
import sys
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # now: imported later, its functions' defaults would keep the process group to the end
import torch.nn.functional as F
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
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
    # model
    dim: int = 128  # channels
    head_dim: int = 32  # channels per attention head
    depth: int = 6  # blocks
    patch: int = 2  # pixels across a token
    # optim
    lr: float = 5e-4  # of Adam, from the first step to the last
    # schedule
    num_steps: int = 5000  # training steps
    batch: int = 64  # images per step, over all processes
    times: str = "logit-normal"  # (arXiv:2403.03206), as the evaluation's roughly are; or uniform, the course has both
    label_drop: float = 0.1  # share of images without their label, for classifier-free guidance
    # eval
    target: float = 0.035  # validation loss to reach; 0: the track has not been opened
    eval_every: int = 500  # steps between evaluations; the clock is paused


@dataclass
class Options:
    """What a run is asked to do, beside the tuned numbers."""
    precision: str = "auto"  # of matrix products; auto measures which is faster
    load: str = ""  # checkpoint to start from, or hf:owner/name[@revision]; paths are relative to the repository
    save: bool = False  # write checkpoints/<run id>.safetensors at the end
    save_every: int = 0  # steps between saved states to resume from; 0: only at SIGTERM and Ctrl-C
    resume: str = ""  # saved state to resume from
    log_to: str = "none"  # where losses go at evaluations as well: trackio, wandb or tensorboard
    quality_pictures: int = 1000  # samples that each quality number is taken on; 0: none


CONFIGS = {
    "cpu": Config(),
    # 4,219 steps are the course's 30 epochs
    "cpu-mnist": Config(track="cpu-mnist", data="data/mnist/train", frozen="data/frozen/mnist32.npz", target=0.083,
                        dim=64, head_dim=16, num_steps=4219, eval_every=703),
    # the course's numbers: 19,500 steps of 256 images are 100 epochs of CIFAR-10's 50,000
    "gpu": Config(track="gpu", data="data/objects128/train", pixels="pixels64", frozen="data/frozen/objects128.npz",
                  dim=256, head_dim=32, depth=10, batch=256, num_steps=19500, target=0.0, eval_every=1950),
}
ARCHITECTURE = ("dim", "head_dim", "depth", "patch")  # what a checkpoint must agree on
LIMITS = {  # what a field may be: least and most, or choices; data/options.py has those that scripts share
    "dim": (1, 8192), "head_dim": (1, 256), "depth": (1, 96), "patch": (1, 128), "batch": (1, math.inf),
    "times": ("uniform", "logit-normal"), "quality_pictures": (0, 10 ** 5),
}


def check_config(config, run, side):
    """What fields may be together, for images of side pixels. Raises Fault for what they may not."""
    run.slice(config.batch)  # can it be divided among the processes?
    if config.dim % 64:
        raise Fault(f"--dim={config.dim} is not a multiple of 64: half the channels are in 32 groups in the stem")
    if config.head_dim % 2 or config.dim % config.head_dim:
        raise Fault(f"--head_dim={config.head_dim} is not an even divisor of --dim={config.dim}")
    if side % config.patch:
        raise Fault(f"patches of {config.patch} pixels do not tile images of {side}")
    if run.options.quality_pictures == 1:
        raise Fault("--quality_pictures=1: a Frechet distance needs at least 2, or 0 for no quality numbers")


# ------------------------------------------------------------------------------------------------------------
# Run

# --- copied: run ---
# The track's stop-watch: options, processes, clock, log, checkpoints and states. A record may not change it.
HERE = Path(__file__).resolve()  # the repository is wherever data/frozen is: archived scripts run from their folder
ROOT = next((folder for folder in HERE.parents if (folder / "data" / "frozen").exists()), HERE.parent)
STANDALONE = not (ROOT / "data" / "show.py").exists()  # it trains and files its result without any other file of ours
RULE = "=" * 100
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Fault(Exception):
    """User error, reported in one line without a traceback."""

    def __str__(self):
        return " ".join(super().__str__().split())[:500]  # libraries' errors, which it may quote, can be pages long


def import_ours(name):
    """A module of data/, for checks and samples and for what some options ask for."""
    if STANDALONE:
        raise Fault(f"this needs data/{name}.py, which is not beside this script")
    sys.path.insert(0, str(ROOT / "data"))
    return importlib.import_module(name)


def read_options(argv):
    """--field=value arguments -> the track's Config, the Options, and {field: value} as given."""
    if not STANDALONE:
        import_ours("options").check(sys.modules[__name__], argv)
    given = dict(argument.removeprefix("--").split("=", 1) for argument in argv)
    config = copy.copy(CONFIGS[given.get("track", "gpu" if torch.cuda.is_available() else "cpu")])
    options = Options()
    for key, text in given.items():
        part = options if key in vars(options) else config
        kind = type(getattr(part, key))
        setattr(part, key, text.lower() == "true" if kind is bool else kind(text))
    return config, options, given


class Run:
    """Everything around the model: processes, device, precision, clock, log, progress bar, checkpoints, states."""

    def __init__(self, task, argv):
        self.task = task
        self.script = sys.modules[__name__]
        self.config, self.options, self.given = read_options(argv)
        if STANDALONE and (self.options.save or self.options.save_every):
            raise Fault("--save and --save_every need data/checkpoints.py, which is not beside this script")
        if self.options.load:
            read_checkpoint = import_ours("checkpoints").read_checkpoint
            self.weights, self.config = read_checkpoint(self.script, self.options.load, self.config, self.given)
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device("cpu")
        backend = {"backend": "gloo"}
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
            backend = {"backend": "nccl", "device_id": self.device}  # NCCL would guess, and warn
        if self.world > 1:
            dist.init_process_group(**backend)
        self.step = self.tokens = self.flops = 0  # so far
        self.seconds = self.eval_seconds = 0  # of training alone, and of evaluations and saved states
        self.compile_seconds = self.graphs = 0  # of the warm-up
        self.data_sha256 = "none"
        self.file = None  # the log, of rank 0
        self.failed = False  # weights or samples
        self.loss = None  # of the last step that was looked at
        self.watch = None  # what --log_to opened, on rank 0

    def slice(self, batch):
        """This rank's part of a global batch."""
        if batch % self.world:
            raise Fault(f"a batch of {batch} cannot be divided among {self.world} processes")
        return slice(self.rank * batch // self.world, (self.rank + 1) * batch // self.world)

    def choose_precision(self, rows, dim, hidden):
        """Set precision and the peak in FLOP/s that MFU is relative to. A product of the model is (rows, dim, hidden).

        auto is what multiplies such matrices faster: on most CPUs without AMX bf16 takes up to seven times as long.
        """
        decision = ["bf16" if self.device.type == "cuda" else "fp32", 0]
        if not STANDALONE:
            decision = import_ours("machine").time_products(self.device, PRECISIONS, rows, dim, hidden)
        if self.world > 1:  # one run, one precision
            dist.broadcast_object_list(decision)
        self.precision, self.peak = decision
        if self.options.precision != "auto":
            self.precision = self.options.precision

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def prepare(self, model, **show_data):
        """Before the clock: load weights, open what samples will need and the state to resume from, and the log."""
        if self.options.load:
            import_ours("checkpoints").load_weights(self.script, model, self.weights, self.options.load)
        self.samples = self.prepare_show(**show_data)
        if self.options.resume:
            self.state = import_ours("checkpoints").read_state(self)
        self.run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{self.task}-{self.config.track}-{self.config.seed}"
        self.about = {"torch": torch.__version__, "hardware": f"{platform.machine()}, {self.device.type}"}
        if not STANDALONE:
            self.about = import_ours("machine").describe(self.device, ROOT)
        if self.rank > 0:
            return
        if self.options.log_to != "none":
            self.watch = import_ours("watch").Watch(self)
        try:
            for folder in ("logs", "samples", "records", "checkpoints"):
                (ROOT / folder).mkdir(exist_ok=True)
                if not os.access(ROOT / folder, os.W_OK):
                    raise OSError(f"no write access to {ROOT / folder}")
            self.file = open(ROOT / "logs" / f"{self.run_id}.txt", "x", buffering=1)
        except OSError as error:
            raise Fault(f"cannot write the log: {error}") from None
        settings = {"config": vars(self.config), "options": vars(self.options), "argv": sys.argv[1:],
                    "overrides": self.given, "precision": self.precision, **self.about}
        self.file.write(f"{HERE.read_text()}\n{RULE}\n{json.dumps(settings, indent=1)}\n{RULE}\n")

    def prepare_show(self, **data):
        return None if STANDALONE else import_ours("show").prepare(self, **data)

    def say(self, line):
        """A line in the log and on the console, by rank 0."""
        if self.file:
            self.file.write(line + "\n")
            tqdm.write(line)

    @contextlib.contextmanager
    def warm_up(self, model):
        """For untimed steps on dummy data: afterwards the weights are what they were before."""
        self.say(f"warming up in {self.precision} on {self.about['hardware']}")
        start = time.perf_counter()
        weights = copy.deepcopy(model.state_dict())
        yield
        model.load_state_dict(weights)
        self.compile_seconds = time.perf_counter() - start
        self.graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]  # that torch.compile has made so far

    def start(self):
        """Start the clock and the bar. From here on SIGTERM and Ctrl-C save the state."""
        self.saver = None if STANDALONE else import_ours("checkpoints").Saver(self)
        self.bar = tqdm(total=self.config.num_steps, disable=self.rank > 0, unit="step", dynamic_ncols=True)
        self.start_time = time.time()
        self.started = self.now()

    def now(self):
        """Seconds, once the device has done all that it was given."""
        torch.get_device_module(self.device).synchronize()
        return time.perf_counter()

    @contextlib.contextmanager
    def paused(self):
        """For evaluations and saved states, which the clock does not count."""
        stopped = self.now()
        self.seconds += stopped - self.started
        yield
        self.started = self.now()
        self.eval_seconds += self.started - stopped

    def progress(self, loss, tokens, flops):
        """Count a step of so many tokens and FLOPs. Each tenth loss, this rank's part of it, is looked at."""
        self.step += 1
        self.tokens = self.tokens + tokens  # new on each step, as it may be a tensor
        self.flops += flops
        self.bar.update()
        if self.step % 10 == 0:
            self.loss = loss.item() * self.world
            self.check(self.loss)
            self.bar.set_postfix(loss=f"{self.loss:.3f}")

    def check(self, loss):
        """Abort on a non-finite loss."""
        if not math.isfinite(loss):
            raise Fault(f"the loss is {loss} at step {self.step}: lower the learning rate")

    def evaluation(self, val_loss):
        self.val_loss = val_loss
        milliseconds = 1000 * self.seconds
        self.say(f"step:{self.step}/{self.config.num_steps} val_loss:{val_loss:.4f} train_time:{milliseconds:.0f}ms "
                 f"step_avg:{milliseconds / max(1, self.step):.2f}ms")
        if self.watch:
            self.watch.log(self)

    def result(self, model, eval_sha256, numbers):
        """Weights, footer and a line in runs.jsonl: from here on nothing can be lost. Ends the process group."""
        if self.saver:
            self.saver.close()
        self.bar.close()
        self.check(self.val_loss)
        tokens = int(self.tokens)
        speed = {"tokens_per_second": round(tokens / max(self.seconds, 1e-9)), "mfu": 0, "peak_memory_mib": 0}
        if not STANDALONE:
            speed = import_ours("machine").speed(self)
        footer = {"script": HERE.name, "task": self.task, "track": self.config.track, "seed": self.config.seed,
                  "world_size": self.world, "hardware": self.about["hardware"], "precision": self.precision,
                  "steps": self.step, "parameters": sum(p.numel() for p in model.parameters()),
                  "buffers": sum(b.numel() for b in model.buffers()), "tokens": tokens,
                  "val_loss": round(self.val_loss, 5), **numbers, "target": self.config.target,
                  "reached": self.val_loss <= self.config.target, "start_time": round(self.start_time, 1),
                  "train_seconds": round(self.seconds, 3), "eval_seconds": round(self.eval_seconds, 3),
                  "compile_seconds": round(self.compile_seconds, 1), **speed,
                  "data_sha256": self.data_sha256, "eval_sha256": eval_sha256,
                  "overrides": " ".join(f"--{key}={value}" for key, value in self.given.items()) or "none"}
        if self.rank == 0:
            if self.options.save:
                self.failed = not import_ours("checkpoints").save_weights(self, model)
            for key, value in footer.items():
                self.say(f"{key}: {value}")
            with open(ROOT / "records" / "runs.jsonl", "a") as file:
                file.write(json.dumps({"run_id": self.run_id, **footer}) + "\n")
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()

    def show(self, model):
        """Draw samples and measure their quality, by rank 0. Exit code 1 if that, or saving the weights, failed."""
        if self.samples and self.rank == 0:
            self.samples.show(model)
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


# ------------------------------------------------------------------------------------------------------------
# Data

# --- copied: images ---
def read_images(config, classes, side):
    """Training images (N, 3, S, S) uint8, a memory map, labels (N,) int64 and their sha256."""
    digest = "none"
    if not STANDALONE:
        digest = import_ours("checks").check_images(sys.modules[__name__], config, classes, side)
    images = np.load(ROOT / config.data / f"{config.pixels}.npy", mmap_mode="r")
    labels = np.load(ROOT / config.data / "label.npy")[:, 0].astype(np.int64)
    return images, labels, digest
# --- end: images ---


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


def draw_times(B, kind, rng):
    """Times (B,) from 0 to 1: uniform, or logit-normal, which are rarely near either end."""
    if kind == "uniform":
        return torch.rand(B, generator=rng, device=rng.device)
    return torch.randn(B, generator=rng, device=rng.device).sigmoid()


# ------------------------------------------------------------------------------------------------------------
# Optimizer

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


def make_optimizer(model, config):
    """Adam as torch has it: betas 0.9 and 0.999, no decay. Nothing changes its rate."""
    return torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)


# ------------------------------------------------------------------------------------------------------------
# Attention

# --- copied: attend ---
def attend(q, k, v, visible=None):
    """Softmax attention of q (B, H, M, D) over k, v (B, H, N, D); visible (B, N): keys that may be seen, None: all;
    visible (B, M, N): by each query.

    A query that may see nothing gets zeros.
    """
    mask = visible
    if visible is not None:
        mask = visible[:, None] if visible.ndim == 3 else visible[:, None, None]
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

TIME_FREQUENCIES = 128  # each with a cosine and a sine


def split_heads(x, head_dim):
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)  # (B, T, C) -> (B, H, T, D)


def frequencies(count, device):
    """Radians per unit of time or place (count,): 1, and on by equal factors towards 1 / 10,000."""
    return 10000 ** (-torch.arange(count, device=device) / count)


def rotary_angles(T, head_dim, device):
    """Cosine and sine (T, D / 2) of the rotary angles of T tokens one after another, row by row of the image."""
    angle = torch.arange(T, device=device)[:, None] * frequencies(head_dim // 2, device)
    return angle.cos(), angle.sin()


# --- copied: rotary ---
def apply_rotary(x, cos, sin):
    """Rotary positions (arXiv:2104.09864): pairs of channels of x (B, H, T, D) turn by angles; cos, sin (.., D / 2)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
# --- end: rotary ---


class Attention(nn.Module):
    def __init__(self, dim, head_dim):
        super().__init__()
        self.head_dim = head_dim
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.q_norm = nn.LayerNorm(dim)  # over all heads at once
        self.k_norm = nn.LayerNorm(dim)

    def forward(self, x, cos, sin):
        q = apply_rotary(split_heads(self.q_norm(self.q(x)), self.head_dim), cos, sin)
        k = apply_rotary(split_heads(self.k_norm(self.k(x)), self.head_dim), cos, sin)
        v = split_heads(self.v(x), self.head_dim)
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


def hidden_channels(dim):
    """Of SwiGLU: two thirds of 4 dim, so that its three matrices are as large as an MLP's two; rounded up to 256s."""
    return math.ceil(8 * dim // 3 / 256) * 256


class SwiGLU(nn.Module):
    def __init__(self, dim):
        super().__init__()
        hidden = hidden_channels(dim)
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Pre-norm block: attention, then SwiGLU, both shifted, scaled and gated as the condition says (AdaLN)."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim)
        self.attention = Attention(config.dim, config.head_dim)
        self.norm2 = nn.LayerNorm(config.dim)
        self.mlp = SwiGLU(config.dim)
        self.modulate = nn.Linear(config.dim, 6 * config.dim)

    def forward(self, x, condition, cos, sin):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulate(condition)[:, None].chunk(6, -1)  # (B, 1, C)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1, cos, sin)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Flow(nn.Module):
    """Predicts the velocity of noisy images (B, 3, S, S)."""

    def __init__(self, config, classes, side):
        super().__init__()
        C, p = config.dim, config.patch
        half = C // 2
        self.side, self.patch, self.head_dim, self.classes = side, p, config.head_dim, classes
        self.stem = nn.Sequential(nn.Conv2d(3, half, 5, padding=2), nn.SiLU(), nn.GroupNorm(32, half),
                                  nn.Conv2d(half, half, 5, padding=2), nn.SiLU(), nn.GroupNorm(32, half))
        self.embed_patch = nn.Linear(half * p * p, C)
        self.embed_time = nn.Sequential(nn.Linear(2 * TIME_FREQUENCIES, C), nn.SiLU(), nn.Linear(C, C))
        self.embed_label = nn.Embedding(classes + 1, C)  # the last one: no label
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(C, eps=1e-6, elementwise_affine=False)
        self.modulate = nn.Linear(C, 2 * C)
        self.head = nn.Linear(C, 3 * p * p)

    def forward(self, z, t, labels):
        """Velocity (B, 3, S, S) at noisy images z (B, 3, S, S), times t (B,) and labels (B,)."""
        angle = t[:, None] * frequencies(TIME_FREQUENCIES, t.device)
        condition = self.embed_time(torch.cat([angle.cos(), angle.sin()], 1)) + self.embed_label(labels)
        condition = F.silu(condition)  # (B, C), as every AdaLN begins
        patches = F.pixel_unshuffle(self.stem(z), self.patch)  # (B, C p^2 / 2, S / p, S / p)
        x = self.embed_patch(patches.flatten(2).mT)  # (B, T, C)
        cos, sin = rotary_angles(x.size(1), self.head_dim, x.device)
        for block in self.blocks:
            x = block(x, condition, cos, sin)
        shift, scale = self.modulate(condition)[:, None].chunk(2, -1)  # (B, 1, C)
        x = self.head(self.norm(x) * (1 + scale) + shift).mT  # (B, 3 p^2, T)
        cells = self.side // self.patch
        return F.pixel_shuffle(x.unflatten(2, (cells, cells)), self.patch).float()


def init_weights(model):
    """Torch's own, as modules have it when they are made, but for zeros in the head and in the bias of patches."""
    for p in (model.embed_patch.bias, model.head.weight, model.head.bias):
        nn.init.zeros_(p)


# ------------------------------------------------------------------------------------------------------------
# Loss

def velocity_errors(model, x, t, noise, labels):
    """Mean squared error (B,) of the velocity of images x (B, 3, S, S) in [-1, 1] at times t (B,), noise like x."""
    t_ = t[:, None, None, None]
    return (model((1 - t_) * x + t_ * noise, t, labels) - (noise - x)).square().mean((1, 2, 3))


def train_step(batch, rng, errors_of, model, adam, config, run):
    """One step on a global batch: images (B, 3, S, S) of bytes, labels (B,). Returns this rank's part of its loss."""
    images, labels = batch
    B, device = config.batch, run.device
    t = draw_times(B, config.times, rng)
    noise = torch.randn(images.shape, generator=rng, device=device)
    dropped = torch.rand(B, generator=rng, device=device) < config.label_drop
    labels = labels.masked_fill(dropped, model.classes)
    mine = run.slice(B)
    with run.autocast():
        loss = errors_of(model, to_floats(images[mine]), t[mine], noise[mine], labels[mine]).sum() / B
    loss.backward()
    sum_gradients(adam, run.world)
    adam.step()
    adam.zero_grad(set_to_none=True)
    return loss.detach()


# ------------------------------------------------------------------------------------------------------------
# Sampling

# --- copied: sample ---
GUIDED = (0.3, 0.8)  # the times between which guidance counts (arXiv:2404.07724): nearer to noise it shifts all images
SHIFT = 3  # of steps towards noise (arXiv:2403.03206), where an object's size and place are decided


@torch.no_grad()
def sample(model, labels, steps=25, solver="heun", guidance=1.0, churn=0.0, noise=None, seed=0,
           return_trajectory=False):
    """Images (B, 3, S, S) in [-1, 1] for labels (B,), by following the velocity from noise, t = 1, to t = 0.

    labels: model.classes is no label. solver: heun evaluates the network twice per step, euler once. guidance:
    v = u + guidance * (c - u) at times in GUIDED, u not knowing the label. churn: by which share of its length a step
    first goes back towards noise, with new noise, so that errors are forgotten (arXiv:2206.00364). noise (B, 3, S, S):
    where to start. return_trajectory: also the list of (t, z) on the way. Raises Fault for a solver or label there is
    not.
    """
    if solver not in ("euler", "heun") or steps < 1:
        raise Fault(f"solver {solver!r}, {steps} steps: solvers are euler and heun, steps at least 1")
    if bool(((labels < 0) | (labels > model.classes)).any()):
        raise Fault(f"labels are from 0 to {model.classes}, which is no label")
    rng = torch.Generator().manual_seed(seed)
    if noise is None:
        noise = torch.randn(len(labels), 3, model.side, model.side, generator=rng)

    def velocity(z, t):
        times = torch.full((len(z),), t, device=z.device)
        v = model(z, times, labels)
        if guidance == 1 or not GUIDED[0] < t < GUIDED[1]:
            return v
        u = model(z, times, torch.full_like(labels, model.classes))
        return u + guidance * (v - u)

    z = noise.to(labels.device)
    trajectory = [(1.0, z)]
    times = [SHIFT * i / (steps + (SHIFT - 1) * i) for i in range(steps, -1, -1)]
    for t, next_t in zip(times, times[1:]):
        if churn and 0 < next_t and t < 1:
            start = min(t + churn * (t - next_t), 0.999)
            shrunk = (1 - start) / (1 - t)  # of the image that is in z
            fresh = torch.randn(z.shape, generator=rng).to(z.device)
            z = shrunk * z + (start ** 2 - (shrunk * t) ** 2) ** 0.5 * fresh
            t = start
        v = velocity(z, t)
        if solver == "heun" and next_t > 0:  # at t = 0 there is no noise to be seen: the last step is Euler's
            v = (v + velocity(z + (next_t - t) * v, next_t)) / 2
        z = z + (next_t - t) * v
        trajectory.append((next_t, z))
    z = z.clamp(-1, 1)
    return (z, trajectory) if return_trajectory else z
# --- end: sample ---


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
    the same of each quarter of the draws, from the earliest to the latest.

    Whatever a model predicts in training, here model(z (B, 3, S, S), t (B,), labels (B,)) is a velocity, checked by
    predict_velocity. The first batch is predicted again at the end, while every picture and noise is another one but z
    is not: its error must be the same but for rounding, which in bf16 is not always the same, and the model's tensors
    must be. Ranks share the draws; all get the result.
    """
    before = fingerprint(model)
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
    again = [predict_velocity(model, z[part], times[part], labels[part]) for part in parts[:1]]
    pictures.copy_(kept[0])
    noise.copy_(kept[1])
    for part, velocity in zip(parts, again):
        error, first = (velocity - (noise[part] - pictures[part])).square().mean().item(), errors[0, part].mean().item()
        if abs(error - first) > 0.002 * first:
            raise Fault("an error is another one where z, t and label are the same")
    if fingerprint(model) != before:
        raise Fault("the model's parameters or buffers are not what they were before the evaluation")
    if world > 1:
        dist.all_reduce(errors)
    if not (errors[1] == 1).all():
        raise Fault(f"{int(errors[1].sum())} draws were predicted, and there are {len(times)}")
    by_quarter = [errors[0, part].mean().item() for part in times.argsort().chunk(4)]
    numbers = {f"val_loss_quarter_{q}": round(value, 5) for q, value in enumerate(by_quarter, 1)}
    return errors[0].mean().item(), {**numbers, "eval_targets": len(times)}
# --- end: eval ---


# ------------------------------------------------------------------------------------------------------------
# Training

def flops_per_image(T, config):
    """FLOPs of a training step's products and convolutions for one image of T tokens; backward is twice forward."""
    C, p = config.dim, config.patch
    half = C // 2
    stem = 25 * p * p * (3 + half) * half  # multiplications per token, in both convolutions
    ends = p * p * (half + 3) * C
    block = 4 * C * C + 3 * hidden_channels(C) * C + 2 * T * C
    condition = 2 * TIME_FREQUENCIES * C + C * C + (6 * config.depth + 2) * C * C  # once per image
    return 6 * (T * (stem + ends + config.depth * block) + condition)


def main(argv):
    keep_memory()
    run = Run("flow", argv)
    config = run.config
    if not STANDALONE:
        import_ours("checks").check_frozen_images(run.script, config)
    *frozen, classes, digest = read_frozen(config)
    side = frozen[0].shape[-1]
    check_config(config, run, side)
    if config.num_steps:
        *arrays, run.data_sha256 = read_images(config, classes, side)
    T = (side // config.patch) ** 2
    run.choose_precision(config.batch // run.world * T, config.dim, hidden_channels(config.dim))
    torch.manual_seed(config.seed)
    model = Flow(config, classes, side).to(run.device)
    init_weights(model)
    run.prepare(model, classes=classes)
    frozen = [part.to(run.device) for part in frozen]

    errors_of = velocity_errors
    if config.num_steps:
        if STANDALONE or import_ours("machine").compiler_works(run):
            errors_of = torch.compile(velocity_errors, fullgraph=True, dynamic=False)
        with run.warm_up(model):
            adam = make_optimizer(model, config)
            rng = torch.Generator(run.device).manual_seed(0)
            dummy = (torch.zeros(config.batch, 3, side, side, dtype=torch.uint8, device=run.device),
                     torch.zeros(config.batch, dtype=torch.long, device=run.device))
            for _ in range(5):
                train_step(dummy, rng, errors_of, model, adam, config, run)
    adam = make_optimizer(model, config)

    run.start()
    if config.num_steps:
        tensors = [torch.from_numpy(np.array(array)) for array in arrays]
        loader = Loader(tensors, config.batch, config.seed, run.device)
    if run.options.resume:
        import_ours("checkpoints").load_state(run, model, None, adam, loader)
    while True:
        last = run.step == config.num_steps
        if last or (run.step and run.step % config.eval_every == 0):
            with run.paused(), run.autocast():
                val_loss, numbers = evaluate(model, *frozen, run.rank, run.world)
                run.evaluation(val_loss)
        if last:
            break
        loss = train_step(loader(), loader.rng, errors_of, model, adam, config, run)
        run.progress(loss, config.batch * T, config.batch * flops_per_image(T, config))
        if run.saver:
            run.saver.after_step(model, None, adam, loader)

    velocity = frozen[2] - frozen[0]
    constant = (velocity - velocity.mean(0)).square().mean().item()  # the best image that ignores what it is given
    run.result(model, digest, {"constant_loss": round(constant, 4), **numbers})
    run.show(model)


# --- copied: start ---
if __name__ == "__main__":
    try:
        record(main)(sys.argv[1:])
    except Fault as fault:
        sys.exit(f"{HERE.name}: {fault}")
# --- end: start ---
