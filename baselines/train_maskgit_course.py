"""MaskGIT as EPFL's course COM-304 trains it: the public baseline of the tracks of train_maskgit.py.

The recipe (github.com/EPFL-VILAB/com-304-FM-project-2026, after MaskGIT, arXiv:2202.04200), written afresh: a pre-norm
encoder with LayerNorm and GELU over a label and its picture's tokens, all of one vocabulary; learned positions; one
learned vector where a token is masked; a head over the whole vocabulary. Of all T places m ~ U{1..T} are masked, the
label's as well. AdamW, warm-up and a cosine.
The course's own numbers are those of the gpu track. What the cpu track has instead, and why:

    size      dim 64 and 4 blocks, not 512 and 8: after a quarter of an hour on one core dim 64 has 1.69 nats, dim 96 1.82
              and dim 128 1.96
    heads     of 32 channels, not 64, of which so narrow a model would have one
    rate      3e-4 at dim 512, at others times 512 / dim, as width asks for (muP, arXiv:2203.03466)
    batch     64 pictures, not 256: four times as many steps in the same time
    steps     18,000, 1.2 million pictures, not 10 million rows: a baseline has two hours
    samples   by the sampler of train_maskgit.py, guided as that model's are, so that their quality compares

Only masked places go through the head, which is the same loss at half the price.

    python baselines/train_maskgit_course.py             # the cpu track, data from `python data/scenes.py --objects`
    python baselines/train_maskgit_course.py --help      # every field and what it may be
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
    seed: int = 0  # of weights, order and masks
    data: str = "data/objects64/train"  # aligned shards, made by data/scenes.py --objects
    frozen: str = "data/frozen/objects64.npz"  # validation pictures
    frozen_masks: str = "data/frozen/eval_maskgit_64.npz"  # which of their tokens are masked
    # model
    dim: int = 64  # channels
    head_dim: int = 32  # channels per attention head
    depth: int = 4  # blocks
    mlp_ratio: int = 4  # hidden channels of an MLP per channel
    init_std: float = 0.02  # of all matrices and embeddings but the head, which starts at zero
    # optim
    lr: float = 3e-4  # peak at the course's width of 512; at other widths times 512 / dim
    lr_min: float = 1e-6  # at the end of the cosine
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.95
    weight_decay: float = 0.05  # of all but norms
    clip: float = 1.0  # norm of the gradient at most
    # schedule
    num_steps: int = 18000  # training steps
    warmup: float = 0.1  # share of the steps over which the learning rate rises from 0
    batch: int = 64  # pictures per step, over all processes
    # eval
    target: float = 1.57  # validation loss to reach; 0: the track has not been opened
    eval_every: int = 1800  # steps between evaluations; the clock is paused

    @property
    def label_drop(self):
        """Share of rows without their label, masked as any other place is: so samples can be guided by it."""
        return 0.5


@dataclass
class Options:
    """What a run is asked to do, beside the tuned numbers."""
    precision: str = "auto"  # of matrix products; auto measures which is faster
    load: str = ""  # checkpoint to start from, or hf:owner/name[@revision]; paths are relative to the repository
    save: bool = False  # write checkpoints/<run id>.safetensors at the end
    save_every: int = 0  # steps between saved states to resume from; 0: only at SIGTERM and Ctrl-C
    resume: str = ""  # saved state to resume from
    log_to: str = "none"  # where losses go at evaluations as well: trackio, wandb or tensorboard
    quality_pictures: int = 1008  # drawn for the quality numbers, as many of each class; 0: none


CONFIGS = {
    "cpu": Config(),
    # the course's numbers for rows of 256 tokens: 15,259 steps of 256 rows are a billion tokens
    "gpu": Config(track="gpu", data="data/objects128/train", frozen="data/frozen/objects128.npz",
                  frozen_masks="data/frozen/eval_maskgit_128.npz", dim=512, head_dim=64, depth=8, batch=256,
                  num_steps=15259, target=0.0, eval_every=1526),
}
COURSE_DIM = 512  # width that the learning rate is meant for
ARCHITECTURE = ("dim", "head_dim", "depth", "mlp_ratio")  # what a checkpoint must agree on
LIMITS = {  # what a field may be: least and most, or choices; data/options.py has those that scripts share
    "dim": (1, 8192), "head_dim": (1, 256), "depth": (1, 96), "warmup": (0, 1), "batch": (1, math.inf),
    "quality_pictures": (0, 2000),
}


def check_config(config, run):
    """What fields may be together. Raises Fault for what they may not."""
    run.slice(config.batch)  # can it be divided among the processes?
    if config.dim % config.head_dim:
        raise Fault(f"--dim={config.dim} is not a multiple of --head_dim={config.head_dim}")


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

# --- copied: objects ---
def read_shards(config, modalities):
    """Training tokens (N, L) and labels (N,) uint16, memory maps, and their sha256."""
    digest = "none"
    if not STANDALONE:
        digest = import_ours("checks").check_objects(sys.modules[__name__], config, modalities)
    tokens, labels = (np.load(ROOT / config.data / f"{m}.npy", mmap_mode="r") for m in ("rgb", "label"))
    return tokens, labels[:, 0], digest
# --- end: objects ---


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


def draw_masks(B, T, rng):
    """m ~ U{1..T} of T places masked at random in each of B rows, all independently: (B, T) bool."""
    count = torch.randint(1, T + 1, (B, 1), generator=rng, device=rng.device)
    return torch.rand(B, T, generator=rng, device=rng.device).argsort(1).argsort(1) < count


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


def learning_rate(step, config):
    """Linear warm-up from 0, then a cosine down to lr_min."""
    peak = config.lr * COURSE_DIM / config.dim
    warm = math.ceil(config.warmup * config.num_steps)
    if step < warm:
        return peak * step / max(1, warm - 1)
    progress = (step - warm) / (config.num_steps - warm)
    return config.lr_min + 0.5 * (peak - config.lr_min) * (1 + math.cos(math.pi * progress))


def make_optimizer(model, config):
    """AdamW, without decay of norms; embeddings and the mask's vector decay, as in the course."""
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    others = [p for name, p in model.named_parameters() if "norm" not in name]
    groups = [{"params": others, "weight_decay": config.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), fused=True)


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

class LayerNorm(nn.LayerNorm):
    def __init__(self, dim):
        super().__init__(dim, eps=1e-6, bias=False)


class Linear(nn.Linear):
    def __init__(self, inside, outside):
        super().__init__(inside, outside, bias=False)


def split_heads(x, head_dim):
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)  # (B, T, C) -> (B, H, T, D)


class Attention(nn.Module):
    def __init__(self, dim, head_dim):
        super().__init__()
        self.head_dim = head_dim
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x):
        q, k, v = (split_heads(part, self.head_dim) for part in self.qkv(x).chunk(3, -1))
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm block: attention, then a GELU MLP."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = LayerNorm(config.dim)
        self.attention = Attention(config.dim, config.head_dim)
        self.norm2 = LayerNorm(config.dim)
        self.up = Linear(config.dim, config.mlp_ratio * config.dim)
        self.down = Linear(config.mlp_ratio * config.dim, config.dim)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class MaskGIT(nn.Module):
    """Encoder over sequences of T = 1 + L places, the label and L image tokens; a learned vector stands where one is
    masked. Labels are tokens of the same vocabulary, counted from `vocab` on.
    """

    def __init__(self, config, modalities):
        super().__init__()
        C = config.dim
        self.vocab, self.length = modalities["rgb"]["vocab"], modalities["rgb"]["length"]
        self.num_labels = modalities["label"]["vocab"]
        self.embed_token = nn.Embedding(self.vocab + self.num_labels, C)
        self.embed_mask = nn.Embedding(1, C)
        self.embed_position = nn.Embedding(1 + self.length, C)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = LayerNorm(C)
        self.head = Linear(C, self.vocab + self.num_labels)

    def sequence(self, tokens, labels):
        """Ids (B, T) of labels (B,) and tokens (B, L)."""
        return torch.cat([labels[:, None] + self.vocab, tokens], 1)

    def forward(self, ids, masked):
        """Final states (B, T, C) for ids (B, T), those where masked (B, T) hidden."""
        x = torch.where(masked[..., None], self.embed_mask.weight, self.embed_token(ids)) + self.embed_position.weight
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def log_probs(self, tokens, labels, masked):
        """float32 (n, vocab) of what is at the n places where masked (B, L), given labels (B,) and tokens (B, L).

        A label of num_labels is masked, too. An image token is no label: the head's logits of these are left out.
        """
        unknown = labels == self.num_labels
        ids = self.sequence(tokens, labels.masked_fill(unknown, 0))
        y = self(ids, torch.cat([unknown[:, None], masked], 1))[:, 1:]
        return self.head(y[masked])[:, :self.vocab].float().log_softmax(-1)


def init_weights(model, std):
    for name, p in model.named_parameters():
        if "norm" in name:
            nn.init.ones_(p)
        elif "head" in name:
            nn.init.zeros_(p)
        elif p.ndim == 2:
            nn.init.normal_(p, std=std)
        else:
            raise AssertionError(f"no initialisation for {name}")


# ------------------------------------------------------------------------------------------------------------
# Loss

HEAD_SHAPES = 16  # numbers of rows that the head may have in a step: each is another kernel to build for a CPU


def head_rows(masked):
    """Which places of masked (B, T) are, as rows of (B * T,), and how many these are.

    Filled up with row 0 to a sixteenth of all rows, two sixteenths ..: a CPU builds new kernels for any other number.
    """
    rows = masked.flatten().nonzero()[:, 0]
    unit = -(-masked.numel() // HEAD_SHAPES)
    return F.pad(rows, (0, -len(rows) % unit)), len(rows)


def masked_nats(model, ids, masked):
    """Cross-entropy (n,) in nats of the n tokens of ids (B, T) that masked (B, T) marks, given all others."""
    y = model(ids, masked)
    rows, count = head_rows(masked)
    logits = model.head(y.flatten(0, 1)[rows]).float()
    return F.cross_entropy(logits, ids.flatten()[rows], reduction="none")[:count]


def train_step(step, ids, masked, model, adam, config, run):
    """One step on a global batch (B, T) and its masks: this rank's part of the mean over all masked tokens."""
    shard = run.slice(config.batch)
    with run.autocast():
        loss = masked_nats(model, ids[shard], masked[shard]).sum() / masked.sum()
    loss.backward()
    sum_gradients(adam, run.world)
    nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    for group in adam.param_groups:
        group["lr"] = learning_rate(step, config)
    adam.step()
    adam.zero_grad(set_to_none=True)
    return loss.detach()


# ------------------------------------------------------------------------------------------------------------
# Sampling

def draw_tokens(model, tokens, labels, masked, guidance, temperature, rng):
    """Ids (N,) of the N masked tokens and their log-probabilities; guidance: u + guidance * (c - u), u not knowing the
    label."""
    logits = model.log_probs(tokens, labels, masked)
    if guidance != 1:
        base = model.log_probs(tokens, torch.full_like(labels, model.num_labels), masked)
        logits = base + guidance * (logits - base)
    ids = (logits / max(temperature, 1e-4) + gumbel(logits.shape, rng)).argmax(-1)
    return ids, logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]


# --- copied: generate ---
def gumbel(shape, rng):
    """Gumbel noise: argmax(logits + noise) is a draw from the softmax."""
    uniform = torch.rand(shape, generator=rng, device=rng.device).clamp(1e-20, 1 - 1e-7)
    return -(-uniform.log()).log()


@torch.no_grad()
def generate(model, labels, tokens=None, masked=None, steps=16, order=None, noise=4.5, cosine=True, temperature=1.0,
             last_temperature=0.5, guidance=1.0, seed=0, return_history=False):
    """Fill in tokens (B, L) where masked (B, L), everywhere if they are None, for labels (B,): new tokens (B, L).

    order (L,): the places one after another; None keeps the likeliest draws first, their log-probabilities blurred by
    Gumbel noise times `noise`, which falls to 0. cosine: few places at first and ever more; False: as many each.
    The temperature falls to last_temperature and guidance rises from 1: the first tokens decide where and how large an
    object is, and need variety; the last ones are its details. return_history: also a list of (tokens, masked) after
    each step.
    """
    if steps < 1:
        raise Fault(f"{steps} steps: there is at least 1")
    B, L, device = len(labels), model.length, labels.device
    rng = torch.Generator(device).manual_seed(seed)
    tokens = torch.zeros(B, L, dtype=torch.long, device=device) if tokens is None else tokens.clone()
    masked = torch.ones(B, L, dtype=torch.bool, device=device) if masked is None else masked.clone()
    total = masked.sum(1, keepdim=True)
    history = []
    if order is not None:
        rank = order.argsort().to(device).float().expand(B, L)  # when a place is filled in
    for step in range(steps):
        progress = (step + 1) / steps
        late = step / max(1, steps - 1)  # 0 .. 1
        heat = temperature + (last_temperature - temperature) * late
        ids, confidence = draw_tokens(model, tokens, labels, masked, 1 + (guidance - 1) * late, heat, rng)
        tokens = tokens.masked_scatter(masked, ids)
        if order is None:
            confidence += noise * (1 - progress) * gumbel(ids.shape, rng)
            rank = torch.zeros(B, L, device=device).masked_scatter(masked, -confidence)
        share = math.cos(math.pi / 2 * progress) if cosine else 1 - progress
        left = (total * share).long().clamp(max=masked.sum(1, keepdim=True) - 1)  # at least one place per step
        if step + 1 == steps:
            left = torch.zeros_like(left)
        ranked = rank.masked_fill(~masked, -math.inf)  # the last `left` of a row stay masked
        masked = ranked.argsort(1).argsort(1) >= L - left
        history.append((tokens.masked_fill(masked, 0), masked))
    return (tokens, history) if return_history else tokens
# --- end: generate ---


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
    before = fingerprint(model)
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
    return (total[0] / total[1]).item(), {"eval_targets": int(total[1])}
# --- end: eval ---


# ------------------------------------------------------------------------------------------------------------
# Training

def flops_per_row(model, config):
    """Matmul FLOPs of a training step for one row; backward is twice forward, half the places go to the head."""
    T, C = 1 + model.length, config.dim
    block = 4 * C * C + 2 * config.mlp_ratio * C * C + 2 * T * C
    return 6 * T * (config.depth * block + model.head.weight.numel() / 2)


def dummy_masks(sixteenths, ids, world):
    """Masks of ids (B, T) for a warm-up, in which every rank's head has so many sixteenths of its rows."""
    places = ids.numel() // world
    masked = torch.arange(places, device=ids.device) < sixteenths * -(-places // HEAD_SHAPES)
    return masked.repeat(world).view_as(ids)


def main(argv):
    keep_memory()
    run = Run("maskgit", argv)
    config = run.config
    *frozen, modalities, digest = read_frozen(config)
    check_config(config, run)
    if not STANDALONE:
        import_ours("checks").check_frozen_objects(run.script, config, modalities, *frozen)
    if config.num_steps:
        tokens, labels, run.data_sha256 = read_shards(config, modalities)
    rows = config.batch // run.world * (1 + modalities["rgb"]["length"])
    run.choose_precision(rows, config.dim, config.mlp_ratio * config.dim)
    torch.manual_seed(config.seed)
    model = MaskGIT(config, modalities).to(run.device)
    init_weights(model, config.init_std)
    frozen = [part.to(run.device) for part in frozen]
    vocab = modalities["rgb"]["vocab"]
    run.prepare(model, modalities=modalities, frozen=frozen)

    if config.num_steps:
        with run.warm_up(model):
            adam = make_optimizer(model, config)
            dummy = torch.zeros(config.batch, 1 + model.length, dtype=torch.long, device=run.device)
            for sixteenths in range(1, HEAD_SHAPES + 1):  # every shape
                train_step(0, dummy, dummy_masks(sixteenths, dummy, run.world), model, adam, config, run)
    adam = make_optimizer(model, config)

    run.start()
    if config.num_steps:
        arrays = [torch.from_numpy(array.astype(np.int16)) for array in (tokens, labels)]
        loader = Loader(arrays, config.batch, config.seed, run.device)
    if run.options.resume:
        import_ours("checkpoints").load_state(run, model, None, adam, loader)
    while True:
        last = run.step == config.num_steps
        if last or (run.step and run.step % config.eval_every == 0):
            with run.paused(), run.autocast():
                val_loss, numbers = evaluate(model, *frozen, vocab, run.rank, run.world)
                run.evaluation(val_loss)
        if last:
            break
        tokens, labels = loader()
        ids = model.sequence(tokens.long(), labels.long())
        loss = train_step(run.step, ids, draw_masks(*ids.shape, loader.rng), model, adam, config, run)
        run.progress(loss, ids.numel(), config.batch * flops_per_row(model, config))
        if run.saver:
            run.saver.after_step(model, None, adam, loader)

    run.result(model, digest, numbers)
    run.show(model)


# --- copied: start ---
if __name__ == "__main__":
    try:
        record(main)(sys.argv[1:])
    except Fault as fault:
        sys.exit(f"{HERE.name}: {fault}")
# --- end: start ---
