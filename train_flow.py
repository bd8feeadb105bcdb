"""Rectified flow: a Transformer learns the velocity that carries noise into images of one class.

Record: flow-cpu, val_loss <= 0.035, quality_class_accuracy >= 0.9, quality_frechet <= 2.37 in 130.1 s on 1 x 2 cores of
    Intel(R) Xeon(R) Processor (AMX), torch 2.13.0+cpu (n=5).
Record: flow-cpu-mnist, val_loss <= 0.083, quality_class_accuracy >= 0.9, quality_frechet <= 10.0 in 465.5 s on 1 x 2
    cores of AMD EPYC, torch 2.13.0+cpu (n=5).

After rectified flow (arXiv:2209.03003), DiT (arXiv:2212.09748) and the nanoFlowMatching of EPFL's course COM-304, made
fast: a linear predictor in closed form, patches of 4 pixels, rotary rows and columns, logit-normal times, Muon,
QK-norm, ReLU^2.

Time runs from the data, t = 0, to noise, t = 1: z = (1 - t) x + t noise, and the velocity is noise - x.

    python train_flow.py                                        # cpu track, data from `python data/scenes.py --objects`
    python train_flow.py --load=checkpoints/flow.safetensors --reflow=4000 --num_steps=1500      # fewer sampling steps
    python train_flow.py --data=data/cifar10/train --frozen=data/cifar10/val.npz --num_steps=5000      # CIFAR-10
    python train_flow.py --help                                 # every field and what it may be
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
    reflow: int = 0  # train on so many images that the loaded model draws: straighter paths, fewer sampling steps
    # model
    dim: int = 128  # channels
    head_dim: int = 32  # channels per attention head
    depth: int = 2  # blocks
    mlp_ratio: int = 4  # hidden channels of an MLP per channel
    patch: int = 4  # pixels across a token
    components: int = 256  # principal components of the images, for the linear predictor
    # optim
    muon_lr: float = 0.04  # of hidden matrices
    momentum: float = 0.9  # of Muon
    adam_lr: float = 0.01  # of embeddings, modulation and head
    # schedule
    num_steps: int = 3000  # training steps
    batch: int = 64  # images per step, over all processes
    micro_batch: int = 512  # of them that a process computes at a time
    times_std: float = 1.0  # of the times' logits, which are normal (arXiv:2403.03206)
    uniform_times: float = 0.25  # share of the times that are uniform: normal logits leave out where noise is all
    label_drop: float = 0.1  # share of images without their label, for classifier-free guidance
    cooldown: float = 0.7  # share of the steps over which the learning rates fall to 0
    # eval
    target: float = 0.035  # validation loss to reach; 0: the track has not been opened
    eval_every: int = 750  # steps between evaluations; the clock is paused


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
    "cpu-mnist": Config(track="cpu-mnist", data="data/mnist/train", frozen="data/frozen/mnist32.npz", target=0.083,
                        eval_every=750),
    "gpu": Config(track="gpu", data="data/objects128/train", pixels="pixels64", frozen="data/frozen/objects128.npz",
                  dim=384, depth=8, num_steps=4000, batch=256, target=0.0, eval_every=250),
}
ARCHITECTURE = ("dim", "head_dim", "depth", "mlp_ratio", "patch", "components")  # what a checkpoint must agree on
LIMITS = {  # what a field may be: least and most, or choices; data/options.py has those that scripts share
    "dim": (1, 8192), "head_dim": (1, 256), "depth": (1, 96), "patch": (2, 128), "batch": (1, math.inf),
    "components": (1, math.inf), "times_std": (0.01, 100), "uniform_times": (0, 1), "reflow": (0, 10 ** 6),
    "quality_pictures": (0, 10 ** 5),
}


def check_config(config, run, side):
    """What fields may be together, for images of side pixels. Raises Fault for what they may not."""
    run.slice(config.batch)  # can it be divided among the processes?
    if config.dim % config.head_dim or config.head_dim % 4:
        raise Fault(f"--dim={config.dim} is not a multiple of --head_dim={config.head_dim}, or that is none of 4, as "
                    "rotary positions of rows and columns need")
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


# ------------------------------------------------------------------------------------------------------------
# Muon

# --- copied: muon ---
POLAR = ((8.1566, -22.4833, 15.8788), (4.0429, -2.8089, 0.5000), (3.8917, -2.7725, 0.5061), (3.2858, -2.3681, 0.4645),
         (2.3465, -1.7098, 0.4232))  # Polar Express (arXiv:2505.16932), five steps


def orthogonalise(G, dtype=torch.bfloat16):
    """The nearest semi-orthogonal matrices of a stack (K, rows, columns), roughly; computed and given in dtype."""
    tall = G.size(1) > G.size(2)
    X = G.to(dtype)
    X = X.mT if tall else X
    X = X / (1.02 * X.norm(dim=(1, 2), keepdim=True) + 1e-6)
    for a, b, c in POLAR:
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A A: as one operator it takes half the time
        X = torch.baddbmm(X, B, X, beta=a)
    return X.mT if tall else X


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
            update = update[:len(params)].float()  # only now: in bfloat16 it is half as long a message
            torch._foreach_add_(params, update.unbind(), alpha=-lr * max(1, rows / columns) ** 0.5)

    def momentum_buffers(self):
        """The momentum of each stack, gathered: (matrices, rows, columns)."""
        return [self.gather(buffer)[0][:len(params)] for params, buffer in self.stacks]
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

# --- copied: attend to all ---
def attend(q, k, v):
    """Softmax attention of q (B, H, M, D) over k, v (B, H, N, D)."""
    if q.is_cuda or v.dtype == torch.float32:
        return F.scaled_dot_product_attention(q.type_as(v), k.type_as(v), v)
    # written out: in bfloat16 on a CPU torch 2.13's fused kernel takes 3 to 6 times as long, in float32 0.8 times
    scores = (q * q.size(-1) ** -0.5) @ k.mT
    return scores.softmax(-1).type_as(v) @ v
# --- end: attend to all ---


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


# --- copied: grid angles ---
def rotary_angles(side, head_dim, device):
    """Cosine and sine (side^2, D / 2) of the rotary angles of a grid's cells, half of them by row, half by column: 1.5
    to 0.375 per cell, so that neighbours are easily told apart."""
    rate = 1.5 * 4 ** -torch.linspace(0, 1, head_dim // 4, device=device)
    angle = torch.arange(side, device=device)[:, None] * rate
    angle = torch.cat([angle.repeat_interleave(side, 0), angle.repeat(side, 1)], 1)
    return angle.cos(), angle.sin()
# --- end: grid angles ---


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
        self.q, self.k, self.v, self.proj = (Linear(dim, dim) for _ in range(4))

    def forward(self, x, cos, sin):
        q = apply_rotary(norm(split_heads(self.q(x), self.head_dim)), cos, sin)
        k = apply_rotary(norm(split_heads(self.k(x), self.head_dim)), cos, sin)
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

    def forward(self, x, condition, cos, sin):
        scale1, shift1, scale2, shift2 = self.modulate(condition)[:, None].chunk(4, -1)  # (B, 1, C)
        x = x + self.attention(norm(x) * (1 + scale1) + shift1, cos, sin)
        return x + self.down(F.relu(self.up(norm(x) * (1 + scale2) + shift2)).square())


class Flow(nn.Module):
    """Predicts the velocity of noisy images (B, 3, S, S).

    The best linear predictor is computed in closed form, from the images' mean, their principal components, the
    variance along each of them and the mean variance along all others. The network sees the image that it expects
    beside the noisy one and learns the residual, scaled to variance 1 at every time (arXiv:2206.00364).
    """

    def __init__(self, config, classes, side):
        super().__init__()
        C, p, values = config.dim, config.patch, 3 * side ** 2
        self.side, self.patch, self.head_dim, self.classes = side, p, config.head_dim, classes
        self.embed_patch = Linear(2 * 3 * (2 * p) ** 2, C)  # of both images; sees half a patch more on every side
        self.embed_position = nn.Embedding((side // p) ** 2, C)
        self.embed_label = nn.Embedding(classes + 1, C)  # the last one: no label
        self.embed_time = Linear(64, C)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head = Linear(C, 3 * p * p)
        K = min(config.components, values - 1)
        self.register_buffer("mean", torch.zeros(values))
        self.register_buffer("components", torch.zeros(values, K))  # orthonormal columns
        self.register_buffer("variances", torch.ones(K + 1))  # the last one: along all other directions
        self.register_buffer("straight", torch.tensor(False))  # whether an image belongs to its noise, as after reflow
        self.register_buffer("shares", torch.tensor([1.0] * K + [values - K]) / values)  # of all directions

    @torch.no_grad()
    def fit(self, images):
        """Take mean, components and variances from images (N, 3, S, S) of bytes; 4,096 are enough."""
        x = to_floats(images[:4096]).flatten(1)
        self.mean.copy_(x.mean(0))
        x -= self.mean
        K = min(len(x), len(self.variances) - 1)
        _, singular, self.components[:, :K] = torch.svd_lowrank(x, K)
        along = singular.square() / len(x)
        self.variances.fill_((x.square().sum() / len(x) - along.sum()) / (x.size(1) - K))
        self.variances[:K] = along
        self.variances.clamp_(min=1e-6)  # images may be all alike

    def linear(self, z, t):
        """What the linear predictor makes of noisy values z (B, D) at times t (B, 1): velocity (B, D); z without the
        mean and the image that it expects, both (B, D), scaled; standard deviation (B, 1) of what the velocity misses.
        """
        noisy = (1 - t) ** 2 * self.variances + t ** 2  # (B, K + 1), variances of z
        ratio = (t - (1 - t) * self.variances) / noisy
        std = self.variances.sqrt()  # after reflow an image is so many times its noise
        ratio = torch.where(self.straight, (1 - std) / ((1 - t) * std + t), ratio)
        centred = z - (1 - t) * self.mean
        along = (ratio[:, :-1] - ratio[:, -1:]) * (centred @ self.components)
        velocity = ratio[:, -1:] * centred + along @ self.components.T - self.mean
        expected = z - t * velocity - self.mean

        def mean(values):
            return (values * self.shares).sum(-1, keepdim=True)

        missed = mean(self.variances / noisy).sqrt()
        return velocity, centred / mean(noisy).sqrt(), expected / mean(self.variances).sqrt(), missed

    def forward(self, z, t, labels):
        """Velocity (B, 3, S, S) at noisy images z (B, 3, S, S), times t (B,) and labels (B,)."""
        p = self.patch
        velocity, centred, expected, missed = self.linear(z.flatten(1), t[:, None])
        both = torch.cat([centred.view_as(z), expected.view_as(z)], 1)
        windows = F.unfold(both, 2 * p, padding=p // 2, stride=p).mT  # (B, T, 24 p^2)
        frequencies = torch.logspace(-1, 1, 32, device=t.device)
        waves = t.logit(1e-4)[:, None] * frequencies  # log of the ratio of noise to image
        condition = norm(self.embed_time(torch.cat([waves.sin(), waves.cos()], 1)) + self.embed_label(labels))
        x = norm(self.embed_patch(windows) + self.embed_position.weight + condition[:, None])  # (B, T, C)
        cos, sin = rotary_angles(self.side // p, self.head_dim, x.device)
        for block in self.blocks:
            x = block(x, condition, cos, sin)
        residual = F.fold(self.head(norm(x)).float().mT, self.side, p, stride=p)
        return velocity.view_as(z) + missed[:, :, None, None] * residual


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
    if config.reflow:  # straight paths are learnt evenly along their length, and once more where a sample starts
        t = (1.1 * t).clamp(max=1)
    else:
        uniform = torch.rand(B, generator=rng, device=device) < config.uniform_times
        t = torch.where(uniform, t, torch.sigmoid(config.times_std * torch.special.ndtri(t)))
    noise = noise[0] if noise else torch.randn(images.shape, generator=rng, device=device)
    dropped = torch.rand(B, generator=rng, device=device) < config.label_drop
    labels = labels.masked_fill(dropped, model.classes)
    mine = run.slice(B)
    total = 0.0
    for start in range(mine.start, mine.stop, config.micro_batch):
        rows = slice(start, min(start + config.micro_batch, mine.stop))
        with run.autocast():
            loss = errors_of(model, to_floats(images[rows]), t[rows], noise[rows], labels[rows]).sum() / B
        loss.backward()
        total += loss.detach()
    sum_gradients(adam, run.world)
    factor = schedule(step, config)
    muon.step(config.muon_lr * factor)
    adam.param_groups[0]["lr"] = config.adam_lr * factor
    adam.step()
    model.zero_grad(set_to_none=True)
    return total


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
    """Matmul FLOPs of a training step for one image of T tokens; backward is twice forward, for components nothing."""
    C, p = config.dim, config.patch
    block = 4 * C * C + 2 * config.mlp_ratio * C * C + 2 * T * C
    network = T * (config.depth * block + 27 * p * p * C) + 4 * config.depth * C * C
    return 6 * network + 12 * T * p * p * config.components


def main(argv):
    run = Run("flow", argv)
    config = run.config
    keep_memory()
    if not STANDALONE:
        import_ours("checks").check_frozen_images(run.script, config)
    *frozen, classes, digest = read_frozen(config)
    side = frozen[0].shape[-1]
    check_config(config, run, side)
    if config.num_steps and config.reflow:  # its data are what the loaded model draws
        path = import_ours("checkpoints").fetch(run.script, run.options.load)
        run.data_sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    elif config.num_steps:
        *arrays, run.data_sha256 = read_images(config, classes, side)
    T = (side // config.patch) ** 2
    rows = min(config.micro_batch, config.batch // run.world)
    run.choose_precision(rows * T, config.dim, config.mlp_ratio * config.dim)
    torch.manual_seed(config.seed)
    model = Flow(config, classes, side).to(run.device)
    init_weights(model)
    run.prepare(model, classes=classes)
    frozen = [part.to(run.device) for part in frozen]

    errors_of = velocity_errors
    if config.num_steps:
        # 75 ms per step instead of 98, in float32 on 2 cores with AVX512
        if STANDALONE or import_ours("machine").compiler_works(run):
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
            tensors = import_ours("reflow").draw_pairs(run, model)
        else:
            tensors = [torch.from_numpy(np.array(array)) for array in arrays]
        loader = Loader(tensors, config.batch, config.seed, run.device)
        if not run.options.load:
            model.fit(loader.tensors[0])
        model.straight.fill_(config.reflow > 0)
    if run.options.resume:
        import_ours("checkpoints").load_state(run, model, muon, adam, loader)
    while True:
        last = run.step == config.num_steps
        if last or (run.step and run.step % config.eval_every == 0):
            with run.paused(), run.autocast():
                val_loss, numbers = evaluate(model, *frozen, run.rank, run.world)
                run.evaluation(val_loss)
        if last:
            break
        batch = loader()
        loss = train_step(run.step, batch, loader.rng, errors_of, model, muon, adam, config, run)
        run.progress(loss, config.batch * T, config.batch * flops_per_image(T, config))
        if run.saver:
            run.saver.after_step(model, muon, adam, loader)

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
