"""nano4M as EPFL's course COM-304 trains it: the public baseline of the tracks of train_4m.py.

The recipe (github.com/EPFL-VILAB/com-304-FM-project-2026, after 4M, arXiv:2312.06647), written afresh: a pre-norm
encoder-decoder with LayerNorm, GELU and sine-cosine positions, one vocabulary that all modalities share, two budgets of
tokens that Dirichlet(1) draws split over the modalities, everything padded to 128; AdamW, warm-up and a cosine.
The course's own numbers are those of the gpu track. What the cpu track has instead, and why:

    size      dim 64 and 3 + 3 blocks, not 512 and 6 + 6: of dim 64, 96, 128 and 192 what came furthest in nine minutes
    heads     of 32 channels, not 64, of which so narrow a model would have one
    rate      6e-4 at dim 512, at others times 512 / dim, as width asks for (muP, arXiv:2203.03466)
    batch     32 scenes, not 512: sixteen times as many steps in the same time
    steps     40,000, 1.3 million scenes, not 19.5 million: a baseline has two hours
    samples   by the sampler of train_4m.py, with that model's steps and temperatures, so that their quality compares

On both tracks a text's padding is neither input nor target. The course counts it, but the frozen evaluation does not
ask for it. Only true targets go through the head, which is the same loss at half the price.

    python baselines/train_4m_course.py             # the cpu track, data from `python data/scenes.py`
    python baselines/train_4m_course.py --help      # every field and what it may be
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
    data: str = "data/scenes64/train"  # aligned shards, made by data/scenes.py
    frozen: str = "data/frozen/scenes64.npz"  # validation scenes
    frozen_masks: str = "data/frozen/eval_4m_64.npz"  # their inputs and targets
    # model
    dim: int = 64  # channels
    head_dim: int = 32  # channels per attention head
    enc_depth: int = 3  # encoder blocks
    dec_depth: int = 3  # decoder blocks
    mlp_ratio: int = 4  # hidden channels of an MLP per channel
    init_std: float = 0.02  # of all matrices and embeddings but the head, which starts at zero
    # optim
    lr: float = 6e-4  # peak at the course's width of 512; at other widths times 512 / dim
    lr_min: float = 1e-6  # at the end of the cosine
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.95
    weight_decay: float = 0.05  # of matrices and embeddings, not of norms and biases
    clip: float = 1.0  # norm of the gradient at most
    # schedule
    num_steps: int = 40000  # training steps
    warmup: float = 0.1  # share of the steps over which the learning rate rises from 0
    batch: int = 32  # scenes per step, over all processes
    budget: int = 128  # input tokens per scene at most, and as many targets; the rest is padding
    # eval
    target: float = 1.7  # validation loss to reach; 0: the track has not been opened
    eval_every: int = 4000  # steps between evaluations; the clock is paused


@dataclass
class Options:
    """What a run is asked to do, beside the tuned numbers."""
    precision: str = "auto"  # of matrix products; auto measures which is faster
    load: str = ""  # checkpoint to start from, or hf:owner/name[@revision]; paths are relative to the repository
    save: bool = False  # write checkpoints/<run id>.safetensors at the end
    save_every: int = 0  # steps between saved states to resume from; 0: only at SIGTERM and Ctrl-C
    resume: str = ""  # saved state to resume from
    log_to: str = "none"  # where losses go at evaluations as well: trackio, wandb or tensorboard
    quality_scenes: int = 1000  # frozen scenes that the quality numbers are taken on; 0: none


CONFIGS = {
    "cpu": Config(),
    # the course's numbers: 38,147 steps of 512 scenes are 5 billion tokens, as it counts 256 per scene
    "gpu": Config(track="gpu", data="data/scenes128/train", frozen="data/frozen/scenes128.npz",
                  frozen_masks="data/frozen/eval_4m_128.npz", dim=512, head_dim=64, enc_depth=6, dec_depth=6, batch=512,
                  num_steps=38147, target=0.0, eval_every=2000),
}
COURSE_DIM = 512  # width that the learning rate is meant for
HEAD_SHAPES = 16  # numbers of rows that the head may have in a step: a CPU builds kernels for each
ARCHITECTURE = ("dim", "head_dim", "enc_depth", "dec_depth", "mlp_ratio")  # what a checkpoint must agree on
LIMITS = {  # what a field may be: least and most, or choices; data/options.py has those that scripts share
    "dim": (2, 8192), "head_dim": (1, 256), "enc_depth": (1, 96), "dec_depth": (1, 96), "warmup": (0, 1),
    "batch": (1, math.inf), "budget": (16, math.inf), "quality_scenes": (0, 2000),
}


def check_config(config, run, layout):
    """What fields may be together. Raises Fault for what they may not."""
    run.slice(config.batch)  # can it be divided among the processes?
    if config.dim % config.head_dim or config.dim % 2:
        raise Fault(f"--dim={config.dim} is not even and a multiple of --head_dim={config.head_dim}")
    if config.budget > layout.size or config.budget % HEAD_SHAPES:
        raise Fault(f"--budget={config.budget} is not a multiple of {HEAD_SHAPES} up to the {layout.size} places of a "
                    "scene")


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

IMAGES, TEXTS = ("rgb", "depth", "normal", "seg", "edge"), ("desc", "caption", "bbox")
MODALITIES = IMAGES + TEXTS


# --- copied: layout ---
class Layout:
    """All of a scene's tokens side by side in one row of `size` places, a span per modality that the data have.

    kind (size,): modality of a place; offset (size,): its place inside the modality; end: id that ends a text;
    first_text: where texts begin.
    """

    def __init__(self, modalities, device="cpu"):
        self.modalities = {m: modalities[m] for m in MODALITIES if m in modalities}
        self.names = list(self.modalities)
        self.span, start = {}, 0
        for m, about in self.modalities.items():
            self.span[m] = slice(start, start + about["length"])
            start += about["length"]
        self.size, self.vocab = start, max(about["vocab"] for about in self.modalities.values())
        length = torch.tensor([about["length"] for about in self.modalities.values()])
        self.kind = torch.repeat_interleave(length).to(device)
        self.offset = torch.cat([torch.arange(n) for n in length.tolist()]).to(device)
        self.start = (length.cumsum(0) - length).to(device)
        self.pads = torch.tensor([about["pad"] for about in self.modalities.values()]).to(device)
        self.end = {m: about.get("end", about["vocab"] - 2) for m, about in self.modalities.items() if m in TEXTS}
        self.end["bbox"] = 1
        self.first_text = min(self.span[m].start for m in TEXTS if m in self.span)

    def valid(self, tokens):
        """True where a row holds a token and not padding: (B, size)."""
        return tokens != self.pads[self.kind]
# --- end: layout ---


# --- copied: shards ---
def read_shards(config, modalities):
    """The training tokens, a memory map (scenes, length) per modality, and their sha256."""
    digest = "none"
    if not STANDALONE:
        digest = import_ours("checks").check_scenes(sys.modules[__name__], config, modalities)
    names = [m for m in MODALITIES if m in modalities]
    return [np.load(ROOT / config.data / f"{m}.npy", mmap_mode="r") for m in names], digest
# --- end: shards ---


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


def split_budget(limit, budget, rng):
    """How many tokens of each modality a scene has as inputs, or as targets: (B, K), at most limit (B, K).

    A budget of U{1..budget}, times a Dirichlet(1) draw, rounded down. Each token that rounding leaves over goes to the
    largest of another such draw, which is any modality alike.
    """
    B, K = limit.shape
    total = torch.randint(1, budget + 1, (B, 1), generator=rng, device=limit.device)
    share = -torch.rand(B, K, generator=rng, device=limit.device).clamp(min=1e-12).log()  # normalised: Dirichlet(1)
    count = (share / share.sum(1, keepdim=True) * total).long()
    left = total - count.sum(1, keepdim=True)  # fewer than K
    lucky = torch.randint(K, (B, K), generator=rng, device=limit.device)
    count.scatter_add_(1, lucky, (torch.arange(K, device=limit.device) < left).long())
    return torch.minimum(count, limit)


def pad_places(chosen, width):
    """Places where chosen (B, size) is True, padded to a width: (B, width), and which of them are no padding."""
    places = chosen.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]
    return places, chosen.gather(1, places)


def draw_places(tokens, layout, budget, rng):
    """4M's masks: enc_pos and visible, dec_pos and counted, all (B, budget), disjoint.

    Places inside a modality are uniform without replacement. visible and counted are False on padding.
    """
    valid = layout.valid(tokens)
    available = torch.zeros(len(tokens), len(MODALITIES), dtype=torch.long, device=tokens.device)
    available.index_add_(1, layout.kind, valid.long())
    inputs = split_budget(available, budget, rng)[:, layout.kind]
    targets = split_budget(available - inputs[:, layout.start], budget, rng)[:, layout.kind]
    # a random rank of every token among the valid ones of its modality
    score = torch.rand(tokens.shape, generator=rng, device=tokens.device) + 2.0 * ~valid + 4.0 * layout.kind
    rank = score.argsort(1).argsort(1) - layout.start[layout.kind]
    is_input = rank < inputs
    is_target = ~is_input & (rank < inputs + targets)
    enc_pos, visible = pad_places(is_input, budget)
    dec_pos, counted = pad_places(is_target, budget)
    return enc_pos, visible, dec_pos, counted


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
    """AdamW, without decay of norms and biases."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
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
        self.q = Linear(dim, dim)
        self.kv = Linear(dim, 2 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x, context, visible):
        k, v = self.kv(context).chunk(2, -1)
        q, k, v = (split_heads(part, self.head_dim) for part in (self.q(x), k, v))
        return self.proj(attend(q, k, v, visible).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, dim, ratio):
        super().__init__()
        self.up = Linear(dim, ratio * dim)
        self.down = Linear(ratio * dim, dim)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class EncoderBlock(nn.Module):
    """Pre-norm block: self-attention, MLP."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = LayerNorm(config.dim)
        self.attention = Attention(config.dim, config.head_dim)
        self.norm2 = LayerNorm(config.dim)
        self.mlp = MLP(config.dim, config.mlp_ratio)

    def forward(self, x, visible):
        h = self.norm1(x)
        x = x + self.attention(h, h, visible)
        return x + self.mlp(self.norm2(x))


class DecoderBlock(nn.Module):
    """Pre-norm block: self-attention of the targets, cross-attention to the inputs, MLP."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = LayerNorm(config.dim)
        self.attention = Attention(config.dim, config.head_dim)
        self.query_norm = LayerNorm(config.dim)
        self.context_norm = LayerNorm(config.dim)
        self.cross_attention = Attention(config.dim, config.head_dim)
        self.norm2 = LayerNorm(config.dim)
        self.mlp = MLP(config.dim, config.mlp_ratio)

    def forward(self, y, counted, context, visible):
        h = self.norm1(y)
        y = y + self.attention(h, h, counted)
        y = y + self.cross_attention(self.query_norm(y), self.context_norm(context), visible)
        return y + self.mlp(self.norm2(y))


def sincos(length, dim):
    """Fixed sine-cosine embeddings of 1-D positions (length, dim), arXiv:1706.03762."""
    frequency = 10000 ** (-torch.arange(dim // 2) / (dim // 2))
    angle = torch.arange(length)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)


class Nano4M(nn.Module):
    """Encoder-decoder over places. A target is known by its modality and position alone; targets see each other.

    All modalities share one vocabulary and one table of positions; only modality embeddings tell them apart.
    """

    def __init__(self, config, layout):
        super().__init__()
        C = config.dim
        self.kind, self.offset = layout.kind, layout.offset
        self.embed_token = nn.Embedding(layout.vocab, C)
        self.embed_enc_kind = nn.Embedding(len(MODALITIES), C)
        self.embed_dec_kind = nn.Embedding(len(MODALITIES), C)
        self.register_buffer("position", sincos(int(layout.offset.max()) + 1, C), persistent=False)
        self.encoder = nn.ModuleList(EncoderBlock(config) for _ in range(config.enc_depth))
        self.decoder = nn.ModuleList(DecoderBlock(config) for _ in range(config.dec_depth))
        self.enc_norm = LayerNorm(C)
        self.dec_norm = LayerNorm(C)
        self.context_proj = nn.Linear(C, C)  # the one layer with a bias, as in 4M
        self.head = Linear(C, layout.vocab)

    def hidden(self, tokens, enc_pos, visible, dec_pos, counted):
        """Final states (B, M, C) at the places dec_pos (B, M), from the tokens (B, size) at the places enc_pos (B, N).

        visible (B, N) and counted (B, M) are False on padding; None where there is none.
        """
        enc_position = self.position[self.offset[enc_pos]]
        x = self.embed_token(tokens.gather(1, enc_pos))
        x = x + self.embed_enc_kind(self.kind[enc_pos]) + enc_position  # (B, N, C)
        for block in self.encoder:
            x = block(x, visible)
        context = self.context_proj(self.enc_norm(x)) + enc_position
        y = self.embed_dec_kind(self.kind[dec_pos]) + self.position[self.offset[dec_pos]]  # (B, M, C)
        for block in self.decoder:
            y = block(y, counted, context, visible)
        return self.dec_norm(y)

    def forward(self, tokens, enc_pos, visible, dec_pos, counted=None):
        """Log-probabilities (B, M, vocab) of all tokens at the places dec_pos (B, M)."""
        y = self.hidden(tokens, enc_pos, visible, dec_pos, counted)
        return self.head(y).float().log_softmax(-1)


def init_weights(model, std):
    for name, p in model.named_parameters():
        if "norm" in name:
            nn.init.ones_(p)
        elif "head" in name or "bias" in name:
            nn.init.zeros_(p)
        elif p.ndim == 2:
            nn.init.normal_(p, std=std)
        else:
            raise AssertionError(f"no initialisation for {name}")


# ------------------------------------------------------------------------------------------------------------
# Loss

def head_rows(counted):
    """Which of the targets counted (B, M) are no padding, as rows of (B * M,), and how many these are.

    Filled up with row 0 to one, two .. or all sixteenths of all rows, for which the warm-up has built the kernels.
    """
    rows = counted.flatten().nonzero()[:, 0]
    return F.pad(rows, (0, -len(rows) % (counted.numel() // HEAD_SHAPES))), len(rows)


def masked_loss(model, tokens, enc_pos, visible, dec_pos, counted, weight):
    """Sum over these scenes of weight (B, M) * cross-entropy in nats at the targets dec_pos (B, M)."""
    y = model.hidden(tokens, enc_pos, visible, dec_pos, counted)
    rows, count = head_rows(counted)
    logits = model.head(y.flatten(0, 1)[rows]).float()
    nll = F.cross_entropy(logits, tokens.gather(1, dec_pos).flatten()[rows], reduction="none")
    return (nll * weight.flatten()[rows])[:count].sum()


def target_weights(dec_pos, counted, layout):
    """Loss weight per target (B, M): over all ranks the weighted sum is the mean over modalities of each one's mean.

    A modality without a target in a batch counts as zero. Weights are 0 on padding.
    """
    kind = layout.kind[dec_pos]
    count = torch.zeros(len(MODALITIES), device=dec_pos.device)
    count.index_add_(0, kind.flatten(), counted.flatten().float())
    share = 1 / len(MODALITIES) / count.clamp(min=1)
    return share[kind] * counted


def train_step(step, batch, places, model, adam, layout, config, run):
    """One step on a global batch (B, size) and its draw_places: this rank's part of the loss, tokens, and FLOPs."""
    enc_pos, visible, dec_pos, counted = places
    mine = run.slice(config.batch)
    parts = (batch, *places, target_weights(dec_pos, counted, layout))
    with run.autocast():
        loss = masked_loss(model, *(part[mine] for part in parts))
    loss.backward()
    sum_gradients(adam, run.world)
    nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    for group in adam.param_groups:
        group["lr"] = learning_rate(step, config)
    adam.step()
    adam.zero_grad(set_to_none=True)
    return loss.detach(), visible.sum() + counted.sum(), config.batch * flops_per_scene(model, config)


# ------------------------------------------------------------------------------------------------------------
# Sampling

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


# --- copied: sampling ---
@dataclass
class Output:
    """One modality to generate and how: scheme roar (random order), maskgit (most confident first) or ar (in order).

    data/generate_4m.py generates one after another, and texts in order.
    """
    modality: str
    scheme: str = ""  # "": maskgit for images, ar for texts
    steps: int = 8  # ar takes one step per token
    temperature: float = 1.0  # 0: always the likeliest token
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    guidance: float = 1.0  # classifier-free: logits u + guidance * (c - u), u seeing only this modality's own tokens


def predict(model, tokens, known, dec_pos):
    """Log-probabilities (B, M, vocab) at the places dec_pos (B, M), given the known (B, size) tokens; float32."""
    enc_pos, visible = gather_places(known)
    return model(tokens, enc_pos, visible, dec_pos).float()


def draw_tokens(model, layout, tokens, known, dec_pos, output, rng):
    """Sample ids (B, M) of a modality at dec_pos (B, M) given what is known (B, size), with their log-probabilities."""
    about = layout.modalities[output.modality]
    logits = predict(model, tokens, known, dec_pos)
    own = known & (layout.kind == layout.names.index(output.modality))
    if output.guidance != 1 and bool(own.any(1).all()):
        base = predict(model, tokens, own, dec_pos)
        logits = base + output.guidance * (logits - base)
    logits[..., about["vocab"]:] = -math.inf
    if output.modality in layout.end:  # padding is never drawn
        logits[..., about["pad"]] = -math.inf
    scores = sharpen(logits, output.temperature, output.top_k, output.top_p)
    if output.temperature > 0:  # the Gumbel trick: argmax(logits / T + Gumbel noise) is a draw from the softmax
        noise = torch.rand(scores.shape, generator=rng, device=scores.device).clamp(1e-20, 1 - 1e-7)
        scores = scores - (-noise.log()).log()
    ids = scores.argmax(-1)
    return ids, logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def fill(tokens, known, places, ids, chosen):
    """Write ids (B, M) at the places (B, M) that are chosen (B, M); changes tokens and known."""
    tokens.scatter_(1, places, torch.where(chosen, ids, tokens.gather(1, places)))
    known.scatter_(1, places, known.gather(1, places) | chosen)


def generate_masked(model, layout, tokens, known, output, scheme, rng):
    """Fill a modality in random order (roar) or the most confident tokens first (maskgit); changes tokens and known."""
    in_modality = layout.kind == layout.names.index(output.modality)
    priority = torch.rand(tokens.shape, generator=rng, device=tokens.device)
    total = (~known & in_modality).sum(1, keepdim=True)
    steps = min(output.steps, int(total.max()))
    for step in range(steps):
        unknown = ~known & in_modality
        share_left = math.cos(math.pi / 2 * (step + 1) / steps)  # few tokens at first and ever more
        left = (total * share_left + 1e-6).long()
        num_now = (unknown.sum(1, keepdim=True) - left).clamp(min=1)
        if scheme == "roar":
            first = priority.masked_fill(~unknown, math.inf).argsort(1).argsort(1) < num_now
            places, chosen = gather_places(unknown & first)
            ids, _ = draw_tokens(model, layout, tokens, known, places, output, rng)
        else:
            places, is_unknown = gather_places(unknown)
            ids, confidence = draw_tokens(model, layout, tokens, known, places, output, rng)
            order = confidence.masked_fill(~is_unknown, -math.inf).argsort(1, descending=True)
            chosen = is_unknown & (order.argsort(1) < num_now)
        fill(tokens, known, places, ids, chosen)
# --- end: sampling ---


# ------------------------------------------------------------------------------------------------------------
# Evaluation

# --- frozen: eval ---
EVAL_BATCH = 64  # scenes that the model sees at once; each rank's first predictions are checked


def eval_sha256(*paths):
    """One hash of this block and of the files that it reads."""
    code = HERE.read_text().partition("# --- " "frozen:")[2].partition("# --- " "end:")[0]
    return hashlib.sha256(b"".join([code.encode(), *(Path(path).read_bytes() for path in paths)])).hexdigest()


def read_frozen(config):
    """Validation tokens (n, size), roles of their places (n, size), the modalities, and the sha256 of it all.

    roles: 1 input, 2 target, 0 neither; in even rows as the course masks, in odd ones whole modalities are inputs.
    """
    paths = [ROOT / config.frozen, ROOT / config.frozen_masks]
    for name in (config.frozen, config.frozen_masks):
        if not (ROOT / name).exists():
            raise Fault(f"{ROOT / name} is missing: it belongs to the repository (`git checkout {name}`)")
    try:
        with np.load(paths[0], allow_pickle=False) as arrays:
            modalities = json.loads(bytes(arrays["modalities"]))
            tokens = np.concatenate([arrays[m] for m in modalities], 1).astype(np.int64)
        with np.load(paths[1], allow_pickle=False) as arrays:
            roles = arrays["roles"]
        if roles.shape != tokens.shape:
            raise ValueError(f"masks {roles.shape} for tokens {tokens.shape}")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise Fault(f"the frozen validation set is damaged ({error}): `git checkout data/frozen`") from None
    return torch.from_numpy(tokens), torch.from_numpy(roles), modalities, eval_sha256(*paths)


def gather_places(chosen):
    """Places where chosen (B, size) is True: (B, most of any row), and which of them count and are not padding."""
    width = int(chosen.sum(1).max())
    places = chosen.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]
    return places, chosen.gather(1, places)


def predict_targets(model, tokens, role, vocab):
    """Log-probabilities (B, M, vocab) at the targets' places (B, M), and which of these count; all else is blanked."""
    enc_pos, visible = gather_places(role == 1)
    places, counted = gather_places(role == 2)
    log_probs = model(tokens.masked_fill(role != 1, 0), enc_pos, visible, places, counted)
    if log_probs.shape != (*places.shape, vocab) or log_probs.dtype != torch.float32:
        raise Fault(f"the model must return float32 log-probabilities {(*places.shape, vocab)}, not "
                    f"{log_probs.dtype} {tuple(log_probs.shape)}")
    return log_probs, places, counted


def check_predictions(model, tokens, role, log_probs, counted):
    """Fault unless the probabilities of a place sum to 1, and stay what they are when the targets change."""
    error = (log_probs.exp().sum(-1)[counted] - 1).abs().max().item()
    if not error <= 1e-3:
        raise Fault(f"the model's probabilities sum to 1 +- {error:.4f} at a place")
    kept = tokens.clone()
    tokens.copy_(torch.where(role == 2, kept.roll(1, 0), kept))  # in the memory of whoever holds on to them
    changed = predict_targets(model, tokens, role, log_probs.size(-1))[0]
    tokens.copy_(kept)
    if not torch.allclose(changed.exp()[counted], log_probs.exp()[counted], atol=1e-3):
        raise Fault("the model's predictions change with the targets, which it must not see")


def fingerprint(model):
    """Shape, sum and absolute sum of every parameter and buffer."""
    tensors = [tensor.double() for tensor in (*model.parameters(), *model.buffers())]
    return [(tensor.shape, tensor.sum().item(), tensor.abs().sum().item()) for tensor in tensors]


@torch.no_grad()
def evaluate(model, tokens, roles, modalities, rank, world):
    """The validation loss in nats and further numbers for the footer: of both halves of the scenes, of each modality.

    A half's loss is the mean over modalities of the mean cross-entropy at its targets, each predicted from the inputs
    alone; the validation loss is the mean of both. Ranks share the scenes, and all get the result. Fault if what the
    model returns is not what it should be, or if it changes meanwhile.
    """
    before = fingerprint(model)
    K, vocab = len(modalities), max(about["vocab"] for about in modalities.values())
    kind = torch.repeat_interleave(torch.tensor([about["length"] for about in modalities.values()])).to(tokens.device)
    total = torch.zeros(2, 2 * K, dtype=torch.float64, device=tokens.device)  # nats and targets, by half and modality
    for i in range(rank * EVAL_BATCH, len(tokens), world * EVAL_BATCH):
        part, role = tokens[i:i + EVAL_BATCH], roles[i:i + EVAL_BATCH]
        log_probs, places, counted = predict_targets(model, part, role, vocab)
        if i == rank * EVAL_BATCH:
            check_predictions(model, part, role, log_probs, counted)
        nll = -log_probs.gather(2, part.gather(1, places)[..., None])[..., 0][counted].double()
        half = torch.arange(len(part), device=tokens.device)[:, None].expand_as(places) % 2  # EVAL_BATCH is even
        group = (half * K + kind[places])[counted]
        total.index_add_(1, group, torch.stack([nll, torch.ones_like(nll)]))
    if world > 1:
        dist.all_reduce(total)
    targets = (roles == 2).long()
    asked = torch.stack([torch.zeros(K, device=kind.device).index_add_(0, kind, targets[h::2].sum(0).float())
                         for h in (0, 1)])
    if not torch.equal(total[1], asked.flatten().double()) or not bool(total.isfinite().all()):
        raise Fault("the model's predictions are not finite at every target")
    if fingerprint(model) != before:
        raise Fault("the model's parameters or buffers changed during the evaluation")
    means = (total[0] / total[1]).view(2, K)
    numbers = {}
    for half, by_modality in zip(("course", "whole"), means):
        numbers[f"val_loss_{half}"] = round(by_modality.mean().item(), 4)
        numbers |= {f"val_loss_{half}_{m}": round(value, 4) for m, value in zip(modalities, by_modality.tolist())}
    return means.mean().item(), numbers
# --- end: eval ---


# ------------------------------------------------------------------------------------------------------------
# Training

def flops_per_scene(model, config):
    """Matmul FLOPs of a training step for one scene, padding included but for the head; backward is twice forward."""
    C, T = config.dim, config.budget  # inputs, and targets
    attention = 4 * C * C + 2 * T * C  # per token
    mlp = 2 * config.mlp_ratio * C * C
    blocks = config.enc_depth * (attention + mlp) + config.dec_depth * (2 * attention + mlp)
    head = model.head.weight.numel() / 2  # about half of the targets are padding
    return 6 * T * (blocks + C * C + head)


def dummy_places(sixteenths, config, device):
    """Places as of draw_places, for a warm-up in which the head has so many sixteenths of its rows."""
    zeros = torch.zeros(config.batch, config.budget, dtype=torch.long, device=device)
    counted = torch.arange(config.budget, device=device) < sixteenths * config.budget // HEAD_SHAPES
    return zeros, zeros == 0, zeros, counted.expand_as(zeros)


def main(argv):
    keep_memory()
    run = Run("4m", argv)
    config = run.config
    val_tokens, val_roles, modalities, digest = read_frozen(config)
    layout = Layout(modalities, run.device)
    check_config(config, run, layout)
    if config.num_steps:
        arrays, run.data_sha256 = read_shards(config, modalities)
    run.choose_precision(config.batch // run.world * config.budget, config.dim, config.mlp_ratio * config.dim)
    torch.manual_seed(config.seed)
    model = Nano4M(config, layout).to(run.device)
    init_weights(model, config.init_std)
    run.prepare(model, layout=layout, tokens=val_tokens)
    val_tokens, val_roles = val_tokens.to(run.device), val_roles.to(run.device)

    if config.num_steps:
        with run.warm_up(model):
            adam = make_optimizer(model, config)
            dummy = torch.zeros(config.batch, layout.size, dtype=torch.long, device=run.device)
            for sixteenths in range(1, HEAD_SHAPES + 1):  # every shape
                places = dummy_places(sixteenths, config, run.device)
                train_step(0, dummy, places, model, adam, layout, config, run)
    adam = make_optimizer(model, config)

    run.start()
    if config.num_steps:
        tokens = torch.from_numpy(np.concatenate(arrays, 1).astype(np.int16))
        loader = Loader([tokens], config.batch, config.seed, run.device)
    if run.options.resume:
        import_ours("checkpoints").load_state(run, model, None, adam, loader)
    while True:
        last = run.step == config.num_steps
        if last or (run.step and run.step % config.eval_every == 0):
            with run.paused(), run.autocast():
                val_loss, numbers = evaluate(model, val_tokens, val_roles, modalities, run.rank, run.world)
                run.evaluation(val_loss)
        if last:
            break
        batch = loader()[0].long()
        places = draw_places(batch, layout, config.budget, loader.rng)
        run.progress(*train_step(run.step, batch, places, model, adam, layout, config, run))
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
