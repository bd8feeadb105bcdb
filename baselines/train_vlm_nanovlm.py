"""nanoVLM from scratch: the public baseline of the tracks of train_vlm.py.

The recipe (github.com/huggingface/nanoVLM), written afresh: SigLIP's vision encoder, pixel shuffle and one linear layer
to a Llama with tied embeddings, which reads a picture's tokens and then its conversation, each place seeing those
before it; every conversation is padded to full length; mean cross-entropy of the answers' tokens; AdamW with one rate
for both backbones and another for the projector, warm-up and a cosine down to a tenth.
What the tracks have instead of its own numbers, and why:

    start     at random, as nanoVLM's code does it without pretrained backbones: a track has its own data alone; and by
              width (cpu), which is better: 0.239 instead of 0.298 nats after equal steps, some six minutes of one core
    rate      5e-4 for the backbones; nanoVLM's 5e-5 is for pretrained ones
    pixels    from -1 to 1, for which SigLIP is made; nanoVLM's are from 0 to 1
    size      2 blocks of dim 128 and 3 of 128 (cpu), 8 of 384 and 8 of 512 (gpu), not 12 of 768 and 30 of 576: what can
              be trained from scratch in the time
    heads     of 32 channels (cpu), not 64, of which so narrow a model would have two
    batch     32 conversations (cpu), not 256: eight times as many steps in the same time
    steps     16,000 (cpu), 25 passes over the conversations, where nanoVLM makes one to five: the loss is lowest after
              7,000, at 0.105 nats, and 0.230 at the end; a cosine of 7,000 or 4,000 steps ends at 0.13 with fewer
              answers right

Only answers' tokens go through the head, which is the same loss at a lower price.

    python baselines/train_vlm_nanovlm.py             # the cpu track, data from `python data/scenes.py --qa`
    python baselines/train_vlm_nanovlm.py --help      # every field and what it may be
"""
import contextlib
import copy
import ctypes
import functools
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
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------------
# Config

@dataclass
class Config:
    # data
    track: str = "cpu"  # task and hardware that losses and times are compared on
    seed: int = 0  # of weights and order
    data: str = "data/qa64/train"  # made by data/scenes.py --qa
    frozen: str = "data/frozen/qa64.npz"  # validation pictures, questions and answers
    # vision encoder
    side: int = 64  # pixels across, pictures are resized to it
    patch: int = 8  # pixels across a patch
    vit_dim: int = 128  # channels
    vit_depth: int = 2  # blocks
    vit_heads: int = 4  # attention heads
    vit_mlp: int = 512  # hidden channels of an MLP, four times as many
    shuffle: int = 2  # patches across that one token of the language model holds; 2: 16 tokens per picture, 1: 64
    # language model
    lm_dim: int = 128  # channels
    lm_depth: int = 3  # blocks
    lm_heads: int = 4  # attention heads
    lm_kv_heads: int = 2  # heads of keys and values, which several attention heads share
    lm_mlp: int = 384  # hidden channels of an MLP, 8/3 times as many, rounded up
    rope_theta: float = 100000.0  # longest wavelength of the rotary positions, divided by 2 pi
    # start
    init_std: float = 0.02  # of all matrices and embeddings but positions, which are uniform from 0 to 1
    init_by_width: bool = True  # vit_dim ** -0.5 and lm_dim ** -0.5 instead of 0.02, which is meant for wider models
    # optim
    backbone_lr: float = 5e-4  # peak, of vision encoder and language model
    projector_lr: float = 1e-3  # peak, of the layer between them
    weight_decay: float = 0.01  # of all parameters
    clip: float = 1.0  # norm of the gradient at most
    # schedule
    num_steps: int = 16000  # training steps
    warmup: float = 0.03  # share of the steps over which the learning rates rise from 0
    lr_min: float = 0.1  # share of the peaks where the cosine ends
    batch: int = 32  # conversations per step, over all processes
    # eval
    target: float = 0.06  # validation loss to reach; 0: the track has not been opened
    eval_every: int = 1000  # steps between evaluations; the clock is paused

    @property
    def image_tokens(self):
        """Places of the language model that a picture takes."""
        return (self.side // self.patch // self.shuffle) ** 2


@dataclass
class Options:
    """What a run is asked to do, beside the tuned numbers."""
    precision: str = "auto"  # of matrix products; auto measures which is faster
    load: str = ""  # checkpoint to start from, or hf:owner/name[@revision]; paths are relative to the repository
    save: bool = False  # write checkpoints/<run id>.safetensors at the end
    save_every: int = 0  # steps between saved states to resume from; 0: only at SIGTERM and Ctrl-C
    resume: str = ""  # saved state to resume from
    log_to: str = "none"  # where losses go at evaluations as well: trackio, wandb or tensorboard
    samples: int = 12  # validation pictures on the sheet; 0: no sheet
    quality_pictures: int = 1000  # validation pictures that are described for the quality number; 0: none
    chat: str = ""  # picture to ask about in the terminal, after training
    max_tokens: int = 48  # tokens per answer at most
    temperature: float = 0.0  # of drawn tokens; 0: always the likeliest
    top_k: int = 0  # likeliest tokens to draw from; 0: all
    top_p: float = 1.0  # draw from the fewest tokens that hold this probability


CONFIGS = {
    "cpu": Config(),
    # nanoVLM's proportions at a size that one GPU trains from scratch: heads of 64, a batch of 256
    "gpu": Config(track="gpu", data="data/qa64-large/train", patch=4, vit_dim=384, vit_depth=8, vit_heads=6,
                  vit_mlp=1536, lm_dim=512, lm_depth=8, lm_heads=8, lm_kv_heads=4, lm_mlp=1408, batch=256,
                  init_by_width=False, num_steps=6000, eval_every=600),
}
ARCHITECTURE = ("side", "patch", "shuffle", "vit_dim", "vit_depth", "vit_heads", "vit_mlp", "lm_dim", "lm_depth",
                "lm_heads", "lm_kv_heads", "lm_mlp", "rope_theta")  # what a checkpoint must agree on
LIMITS = {  # what a field may be: least and most, or choices; data/options.py has those that scripts share
    "side": (1, 2048), "patch": (1, 256), "vit_dim": (1, 8192), "vit_depth": (1, 96), "vit_heads": (1, 256),
    "vit_mlp": (1, 65536), "shuffle": (1, 64), "lm_dim": (2, 8192), "lm_depth": (1, 96), "lm_heads": (1, 256),
    "lm_kv_heads": (1, 256), "lm_mlp": (1, 65536), "rope_theta": (1, math.inf), "warmup": (0, 1), "lr_min": (0, 1),
    "batch": (1, math.inf), "max_tokens": (1, 4096), "temperature": (0, 100), "top_p": (0.001, 1),
    "quality_pictures": (0, 2000),
}


def check_config(config, run):
    """What fields may be together. Raises Fault for what they may not."""
    run.slice(config.batch)  # can it be divided among the processes?
    if config.side % (config.patch * config.shuffle):
        raise Fault(f"--shuffle={config.shuffle} patches of --patch={config.patch} pixels do not tile pictures of "
                    f"--side={config.side} pixels")
    if config.vit_dim % config.vit_heads:
        raise Fault(f"--vit_dim={config.vit_dim} is not a multiple of --vit_heads={config.vit_heads}")
    if config.lm_dim % (2 * config.lm_heads):
        raise Fault(f"--lm_dim={config.lm_dim} is not a multiple of twice --lm_heads={config.lm_heads}")
    if config.lm_heads % config.lm_kv_heads:
        raise Fault(f"--lm_heads={config.lm_heads} is not a multiple of --lm_kv_heads={config.lm_kv_heads}")


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

IMAGE = -1  # stands in token rows where a picture's tokens go


def read_conversations(config, about):
    """Training pictures, a memory map (N, 3, S, S) uint8, tokens (N, L), answer marks (N, L), and their sha256. about:
    what the validation set says of its tokens."""
    digest = "none"
    if not STANDALONE:
        digest = import_ours("checks").check_conversations(sys.modules[__name__], config, about)
    pixels, qa, answer = (np.load(ROOT / config.data / f"{m}.npy", "r") for m in ("pixels", "qa", "answer"))
    if config.batch > len(qa):
        raise Fault(f"--batch={config.batch} is more than the {len(qa)} training conversations there are")
    return pixels, torch.from_numpy(qa.astype(np.int64)), torch.from_numpy(np.array(answer)), digest


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


def learning_rate(step, peak, config):
    """Linear warm-up from 0, then a cosine down to lr_min of the peak."""
    warm = config.warmup * config.num_steps
    if step < warm:
        return peak * min(1, (step + 1) / warm)
    progress = (step - warm) / (config.num_steps - warm)
    return peak * (config.lr_min + (1 - config.lr_min) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model, config):
    """AdamW, with PyTorch's own numbers otherwise: one rate for the backbones and one for the projector."""
    projector = [p for name, p in model.named_parameters() if name.startswith("project")]
    backbones = [p for name, p in model.named_parameters() if not name.startswith("project")]
    groups = [{"params": backbones, "peak": config.backbone_lr}, {"params": projector, "peak": config.projector_lr}]
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)


# ------------------------------------------------------------------------------------------------------------
# Attention

# --- copied: masks ---
compiled_flex_attention = torch.compile(flex_attention, dynamic=False)
compiled_create_block_mask = torch.compile(create_block_mask, dynamic=False)


def dense_mask(mask_mod, doc_ids, start=0):
    """The mask (B, 1, T - start, T) that attend takes, True where a place from start on may see a place.

    mask_mod(doc_ids, b, q, k) decides by the numbers of row, query and key, and by what doc_ids (B, T) say of them.
    """
    B, T = doc_ids.shape
    rows = torch.arange(B, device=doc_ids.device).view(-1, 1, 1, 1)
    places = torch.arange(T, device=doc_ids.device)
    return mask_mod(doc_ids, rows, places[start:, None], places).expand(B, 1, T - start, T)


def block_mask(mask_mod, doc_ids, mask_cache):
    """The same for all places, as a FlexAttention BlockMask.

    doc_ids go into a tensor of this shape that stays in mask_cache together with the one function over it: for a new
    function everything would be compiled again.
    """
    if doc_ids.shape not in mask_cache:
        own_ids = torch.empty_like(doc_ids)

        def own_mask_mod(b, h, q, k):
            return mask_mod(own_ids, b % len(own_ids), q, k)  # one row of ids may stand for all

        mask_cache[doc_ids.shape] = own_ids, own_mask_mod
    own_ids, own_mask_mod = mask_cache[doc_ids.shape]
    own_ids.copy_(doc_ids)
    B, T = doc_ids.shape
    return compiled_create_block_mask(own_mask_mod, B, None, T, T, device=doc_ids.device)


def make_mask(mask_mod, doc_ids, start=0, mask_cache=None):
    """block_mask on CUDA; dense_mask elsewhere, without a mask_cache, and for lengths that do not fill its blocks."""
    if doc_ids.is_cuda and mask_cache is not None and doc_ids.size(1) % 128 == 0:
        return block_mask(mask_mod, doc_ids, mask_cache)
    return dense_mask(mask_mod, doc_ids, start)


def attend(q, k, v, mask=None):
    """Softmax attention of q (B, H, M, D) over k, v (B, H, N, D), mask from make_mask; None: all is seen.

    A query that may see nothing gets zeros.
    """
    if isinstance(mask, BlockMask):
        return compiled_flex_attention(q.type_as(v), k.type_as(v), v, block_mask=mask)  # autocast: norms are float32
    if q.is_cuda or v.dtype == torch.float32:
        return F.scaled_dot_product_attention(q.type_as(v), k.type_as(v), v, attn_mask=mask)
    # written out: in bfloat16 on a CPU torch 2.13's fused kernel takes 3 to 6 times as long, in float32 0.8 times
    scores = (q * q.size(-1) ** -0.5) @ k.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -3e4)
    weights = scores.softmax(-1).type_as(v)
    return (weights if mask is None else weights * mask.any(-1, keepdim=True)) @ v
# --- end: masks ---


def causal(doc_ids, b, q, k):
    """Whether place q sees place k: itself and what came before it. A row's padding comes last: no answer sees it."""
    return k <= q


# --- copied: rotary ---
def apply_rotary(x, cos, sin):
    """Rotary positions (arXiv:2104.09864): pairs of channels of x (B, H, T, D) turn by angles; cos, sin (.., D / 2)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
# --- end: rotary ---


# ------------------------------------------------------------------------------------------------------------
# Model

def split_heads(x, n):
    return x.unflatten(-1, (n, -1)).transpose(1, 2)  # (B, T, C) -> (B, H, T, D)


class VitBlock(nn.Module):
    """SigLIP's: pre-norm attention over all patches, then a GELU MLP."""

    def __init__(self, dim, heads, mlp):
        super().__init__()
        self.heads = heads
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(dim, mlp), nn.Linear(mlp, dim)

    def forward(self, x):
        y = self.layer_norm1(x)
        q = split_heads(self.q_proj(y), self.heads)
        k = split_heads(self.k_proj(y), self.heads)
        v = split_heads(self.v_proj(y), self.heads)
        x = x + self.o_proj(attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.layer_norm2(x)), approximate="tanh"))


class Vit(nn.Module):
    """SigLIP's vision encoder (arXiv:2303.15343): pictures (B, 3, S, S) in [-1, 1] -> states (B, patches, C)."""

    def __init__(self, config):
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.vit_dim, config.patch, config.patch)
        self.position_embedding = nn.Embedding((config.side // config.patch) ** 2, config.vit_dim)
        self.layers = nn.ModuleList(VitBlock(config.vit_dim, config.vit_heads, config.vit_mlp)
                                    for _ in range(config.vit_depth))
        self.post_layernorm = nn.LayerNorm(config.vit_dim, eps=1e-6)

    def forward(self, pictures):
        x = self.patch_embedding(pictures).flatten(2).mT + self.position_embedding.weight
        for layer in self.layers:
            x = layer(x)
        return self.post_layernorm(x)


class LlamaBlock(nn.Module):
    """Llama's: pre-norm attention with grouped queries and rotary positions, then a SwiGLU MLP."""

    def __init__(self, config):
        super().__init__()
        C, kv_dim = config.lm_dim, config.lm_dim // config.lm_heads * config.lm_kv_heads
        Linear = functools.partial(nn.Linear, bias=False)
        self.heads, self.kv_heads = config.lm_heads, config.lm_kv_heads
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(C, eps=1e-5), nn.RMSNorm(C, eps=1e-5)
        self.q_proj, self.o_proj = Linear(C, C), Linear(C, C)
        self.k_proj, self.v_proj = Linear(C, kv_dim), Linear(C, kv_dim)
        self.gate_proj, self.up_proj = Linear(C, config.lm_mlp), Linear(C, config.lm_mlp)
        self.down_proj = Linear(config.lm_mlp, C)

    def forward(self, x, cos, sin, mask, append):
        """x (B, T, C); append: from the new keys and values (B, H, T, D) to all there are."""
        y = self.input_layernorm(x)
        q = apply_rotary(split_heads(self.q_proj(y), self.heads), cos, sin)
        k = apply_rotary(split_heads(self.k_proj(y), self.kv_heads), cos, sin)
        k, v = append(k, split_heads(self.v_proj(y), self.kv_heads))
        k = k.repeat_interleave(self.heads // self.kv_heads, 1)
        v = v.repeat_interleave(self.heads // self.kv_heads, 1)
        x = x + self.o_proj(attend(q.type_as(v), k.type_as(v), v, mask).transpose(1, 2).flatten(2))
        y = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


class Llama(nn.Module):
    """Llama (arXiv:2302.13971) with tied embeddings."""

    def __init__(self, config, vocab):
        super().__init__()
        self.head_dim, self.theta = config.lm_dim // config.lm_heads, config.rope_theta
        self.embed_tokens = nn.Embedding(vocab, config.lm_dim)
        self.layers = nn.ModuleList(LlamaBlock(config) for _ in range(config.lm_depth))
        self.norm = nn.RMSNorm(config.lm_dim, eps=1e-5)

    def forward(self, x, start=0, appends=None):
        """Final states (B, T, C) of embeddings x (B, T, C) of the places from start on. appends: one per block."""
        end = start + x.size(1)
        rate = self.theta ** -torch.linspace(0, 1, self.head_dim // 2 + 1, device=x.device)[:-1]
        angle = torch.arange(start, end, device=x.device)[:, None] * rate  # (T, D / 2)
        cos, sin = angle.cos(), angle.sin()
        mask = make_mask(causal, torch.zeros(1, end, device=x.device), start)
        for layer, append in zip(self.layers, appends or [no_cache] * len(self.layers)):
            x = layer(x, cos, sin, mask, append)
        return self.norm(x)

    def logits(self, y):
        """float32 logits (..., vocab) from final states (..., C)."""
        return F.linear(y, self.embed_tokens.weight).float()


class VLM(nn.Module):
    def __init__(self, config, vocab):
        super().__init__()
        self.side, self.shuffle = config.side, config.shuffle
        self.grid = config.side // config.patch  # patches across
        self.image_tokens = config.image_tokens
        self.vit, self.lm = Vit(config), Llama(config, vocab)
        self.project = nn.Linear(config.vit_dim * config.shuffle ** 2, config.lm_dim, bias=False)

    def encode_images(self, pixels):
        """Tokens (n, image_tokens, C) of pictures (n, 3, S, S) of bytes, whatever their size."""
        pictures = pixels.float() / 127.5 - 1
        if pictures.size(-1) != self.side:
            pictures = F.interpolate(pictures, (self.side, self.side), mode="bicubic", antialias=True)
        states = self.vit(pictures).mT.unflatten(2, (self.grid, self.grid))  # (n, C, grid, grid)
        return self.project(F.pixel_unshuffle(states, self.shuffle).flatten(2).mT)

    def embed(self, tokens, pixels):
        """Embeddings (B, T, C) of tokens (B, T), which begin with the places of a picture of pixels (B, 3, S, S)."""
        text = self.lm.embed_tokens(tokens[:, self.image_tokens:])
        return torch.cat([self.encode_images(pixels).type_as(text), text], 1)

    def forward(self, pixels, tokens):
        """States (B, L, C) that predict tokens (B, L) after pictures pixels (B, 3, S, S): of the place before each, for
        the first one the picture's last."""
        row = F.pad(tokens, (self.image_tokens, 0), value=IMAGE)
        return self.lm(self.embed(row, pixels))[:, self.image_tokens - 1:-1]

    def log_probs(self, pixels, tokens):
        """float32 (B, L, vocab): at each place of tokens (B, L), of the token there, given those before it and, before
        them all, a picture of pixels (B, 3, S, S)."""
        return self.lm.logits(self(pixels, tokens)).log_softmax(-1)


def init_weights(model, config):
    for name, p in model.named_parameters():
        width = config.vit_dim if name.startswith("vit") else config.lm_dim
        if "bias" in name:
            nn.init.zeros_(p)
        elif "norm" in name:
            nn.init.ones_(p)
        elif "position_embedding" in name:
            nn.init.uniform_(p)  # as nanoVLM has them before it loads SigLIP's
        elif p.ndim > 1:
            nn.init.normal_(p, std=width ** -0.5 if config.init_by_width else config.init_std)
        else:
            raise AssertionError(f"no initialisation for {name}")


# ------------------------------------------------------------------------------------------------------------
# Loss

def answer_nats(model, pixels, tokens, answer):
    """Cross-entropy (n,) in nats of the n tokens of (B, L) that answer (B, L) marks, each given its picture of pixels
    (B, 3, S, S) and all tokens before it."""
    marked = answer > 0
    logits = model.lm.logits(model(pixels, tokens)[marked])  # (n, vocab)
    return F.cross_entropy(logits, tokens[marked], reduction="none")


def train_step(step, batch, model, adam, config, run):
    """One step on a global batch, [pixels, tokens, answer]: this rank's part of the mean over all its answer tokens."""
    shard = run.slice(config.batch)
    pixels, tokens, answer = (part[shard] for part in batch)
    with run.autocast():
        loss = answer_nats(model, pixels, tokens, answer).sum() / (batch[2] > 0).sum()
    loss.backward()
    sum_gradients(adam, run.world)
    nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    for group in adam.param_groups:
        group["lr"] = learning_rate(step, group["peak"], config)
    adam.step()
    adam.zero_grad(set_to_none=True)
    return loss.detach()


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


# --- copied: no cache ---
def no_cache(k, v):
    """For a block where nothing was read before: the new keys and values are all there are."""
    return k, v
# --- end: no cache ---


def next_logits(model, x, cache=None):
    """Logits (B, V) of what follows embeddings x (B, T, C), a picture's first. What a cache holds is not computed."""
    start = cache.length if cache else 0
    appends = cache.appends(len(model.lm.layers)) if cache else None
    return model.lm.logits(model.lm(x[:, start:], start, appends)[:, -1])


# --- copied: answer ---
@torch.no_grad()
def generate(model, pixels, tokens, stop, options, seed=0, cache=None):
    """Answer tokens (a list, without the stop) to a picture (3, S, S) of bytes and the tokens (a list) of questions.

    cache: with a KVCache of data/kv_cache.py every token is read once, without one all of them for every new one.
    """
    device = model.project.weight.device
    rng = torch.Generator(device).manual_seed(seed)
    row = torch.tensor([[IMAGE] * model.image_tokens + tokens], device=device)
    x = model.embed(row, pixels[None].to(device))  # (1, T, C)
    answer = []
    for _ in range(options.max_tokens):
        logits = next_logits(model, x, cache)
        if options.temperature == 0:
            new = logits.argmax(-1, keepdim=True)
        else:
            drawn = sharpen(logits, options.temperature, options.top_k, options.top_p).softmax(-1)
            new = torch.multinomial(drawn, 1, generator=rng)
        if new.item() == stop:
            break
        answer.append(new.item())
        x = torch.cat([x, model.lm.embed_tokens(new).type_as(x)], 1)
    return answer
# --- end: answer ---


# ------------------------------------------------------------------------------------------------------------
# Evaluation

# --- frozen: eval ---
FAMILIES = ("count", "exist", "attribute", "compare", "spatial", "describe")  # numbered from 1 on
EVAL_BATCH, EVAL_VALUES = 100, 2 ** 26  # conversations at a time, fewer if that makes more log-probabilities


def eval_sha256(*paths):
    """One hash of this block and of the files that it reads."""
    code = HERE.read_text().partition("# --- " "frozen:")[2].partition("# --- " "end:")[0]
    return hashlib.sha256(b"".join([code.encode(), *(Path(path).read_bytes() for path in paths)])).hexdigest()


def read_frozen(config):
    """Validation pictures (n, 3, S, S) uint8, tokens (n, L), answer marks (n, L), which are 0 or the number of the turn
    that is answered, families (n, turns), what is known of the tokens, and the sha256 of it all."""
    path = ROOT / config.frozen
    if not path.exists():
        raise Fault(f"{path} is missing: it belongs to the repository (`git checkout {config.frozen}`)")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            about = json.loads(bytes(arrays["modalities"]))["qa"]
            pixels, tokens, answer, family = (torch.from_numpy(arrays[m].astype(kind)) for m, kind in (
                ("pixels", np.uint8), ("qa", np.int64), ("answer", np.uint8), ("family", np.uint8)))
        if answer.max() > family.size(1) or family.max() > len(FAMILIES) or not answer.any(1).all():
            raise ValueError("answers without a turn, turns of unknown families or conversations without answers")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise Fault(f"the frozen validation set is damaged ({error}): `git checkout data/frozen`") from None
    return pixels, tokens, answer, family, about, eval_sha256(path)


def fingerprint(model):
    """Shape, sum and absolute sum of every parameter and buffer."""
    tensors = [tensor.double() for tensor in (*model.parameters(), *model.buffers())]
    return [(tensor.shape, tensor.sum().item(), tensor.abs().sum().item()) for tensor in tensors]


def target_log_probs(model, pixels, tokens, targets, counted, vocab):
    """What the model gives the N targets (B, L) where counted (B, L), each after its picture and the tokens (B, L)
    before it: log-probabilities (N,), and whether it is the likeliest token (N,). Raises Fault for another shape or
    dtype, for a log-probability that is not finite, and where a place's do not sum to 1."""
    logs = model.log_probs(pixels.clone(), tokens.clone())
    if logs.shape != (*tokens.shape, vocab) or logs.dtype != torch.float32:
        raise Fault(f"log_probs gives {logs.dtype} {tuple(logs.shape)}, not float32 {(*tokens.shape, vocab)}")
    logs, targets = logs[counted], targets[counted]  # (N, vocab), (N,)
    found = logs.gather(1, targets[:, None])[:, 0]
    if not found.isfinite().all():
        raise Fault("a log-probability that counts is not finite")
    if ((logs.exp().sum(1) - 1).abs() > 1e-3).any():
        raise Fault("the probabilities of a place do not sum to 1")
    return found, logs.argmax(1) == targets


def check_again(model, pixels, tokens, counted, nats, part, vocab):
    """Predict a part of the conversations, of known nats (n, L), a second time. Meanwhile every token of the set is
    another one, and so are the inputs of every second conversation from a random answer token on, which no place up to
    it and no other conversation may notice: else raises Fault."""
    kept, marks, place = tokens.clone(), counted[part], torch.arange(tokens.size(1), device=tokens.device)
    tokens.add_(1).remainder_(vocab)
    rng = torch.Generator().manual_seed(0)
    first_changed = torch.multinomial(marks.float().cpu(), 1, generator=rng).to(tokens.device)  # (B, 1)
    first_changed[1::2] = len(place)
    inputs = torch.where(place < first_changed, kept[part], tokens[part])
    logs, _ = target_log_probs(model, pixels[part], inputs, kept[part], marks, vocab)
    if ((logs + nats[part][marks]).abs() > 1e-3)[(place <= first_changed)[marks]].any():
        raise Fault("a prediction is another one where only tokens differ that it may not depend on")
    tokens.copy_(kept)


@torch.no_grad()
def evaluate(model, pixels, tokens, answer, family, vocab, rank, world):
    """Mean cross-entropy in nats over answer tokens, of a vocabulary, each given its picture and the tokens before it:
    over those of descriptions and over all others, half and half. And further numbers for the footer: both halves, and
    for each family, and for all but descriptions, the share of answers whose every token is the likeliest one.

    model.log_probs(pixels (B, 3, S, S), tokens (B, L)) has one conversation in each row and gives float32
    (B, L, vocab): at each place, of the token there. It is checked by target_log_probs and check_again; the model's
    tensors must be the same afterwards. Ranks share the conversations; all get the result.
    """
    before, (n, L), counted = fingerprint(model), tokens.shape, answer > 0
    batch = max(1, min(EVAL_BATCH, EVAL_VALUES // (L * vocab)))
    parts = [slice(i, i + batch) for i in range(rank * batch, n, world * batch)]
    total = torch.zeros(3, n, L, dtype=torch.float64, device=tokens.device)  # of each token: nats, wrong, predicted
    for part in parts:
        logs, right = target_log_probs(model, pixels[part], tokens[part], tokens[part], counted[part], vocab)
        total[:, part][:, counted[part]] += torch.stack([-logs, ~right, torch.ones_like(logs)])
    for part in parts[:1]:
        check_again(model, pixels, tokens, counted, total[0], part, vocab)
    if fingerprint(model) != before:
        raise Fault("the model's parameters or buffers are not what they were before the evaluation")
    if world > 1:
        dist.all_reduce(total)
    nats, wrong, predicted = total
    if (predicted != counted).any():
        raise Fault(f"{int(predicted.sum())} answer tokens were predicted, and there are {int(counted.sum())}")
    described = family.long().gather(1, (answer.long() - 1).clamp(min=0)) == len(FAMILIES)  # (n, L)
    halves = {"questions": counted & ~described, "describe": counted & described}
    losses = {name: nats[half].mean().item() for name, half in halves.items() if half.any()}
    numbers = {f"val_loss_{name}": round(loss, 5) for name, loss in losses.items()}
    wrong_in_turn = wrong.new_zeros(n, 1 + family.size(1)).scatter_add(1, answer.long(), wrong)[:, 1:]
    for number, name in enumerate(FAMILIES, 1):
        solved = wrong_in_turn[family == number] == 0
        numbers[f"accuracy_{name}"] = round(solved.double().mean().item(), 4) if len(solved) else 0.0
    asked = (family > 0) & (family < len(FAMILIES))
    if asked.any():
        numbers["accuracy_questions"] = round((wrong_in_turn == 0)[asked].double().mean().item(), 4)
    numbers |= {"eval_targets": int(counted.sum())}
    return sum(losses.values()) / len(losses), numbers
# --- end: eval ---


# ------------------------------------------------------------------------------------------------------------
# Training

def flops_per_row(model, config, seq_len):
    """Matmul FLOPs of a training step for one picture and its conversation, seq_len tokens together; backward is twice
    forward."""
    C, D, patches = config.vit_dim, config.lm_dim, model.grid ** 2
    vit_block = 4 * C * C + 2 * C * config.vit_mlp + 2 * patches * C
    vit = patches * (config.vit_depth * vit_block + 3 * config.patch ** 2 * C + C * D)
    kv_dim = D * config.lm_kv_heads // config.lm_heads
    lm = config.lm_depth * (2 * D * D + 2 * D * kv_dim + 3 * D * config.lm_mlp + 2 * seq_len * D)
    return 6 * (vit + seq_len * lm)


def main(argv):
    keep_memory()
    run = Run("vlm", argv)
    config = run.config
    check_config(config, run)
    *frozen, about, digest = read_frozen(config)
    vocab, seq_len = about["vocab"], config.image_tokens + about["length"]
    if config.num_steps:
        pixels, tokens, answer, run.data_sha256 = read_conversations(config, about)
        seq_len = config.image_tokens + tokens.size(1)
    run.choose_precision(config.batch // run.world * seq_len, config.lm_dim, config.lm_mlp)
    torch.manual_seed(config.seed)
    model = VLM(config, vocab).to(run.device)
    init_weights(model, config)
    run.prepare(model, frozen=frozen, backbones=None)
    frozen = [part.to(run.device) for part in frozen]

    if config.num_steps:
        with run.warm_up(model):
            adam = make_optimizer(model, config)
            dummy = [torch.zeros(config.batch, *pixels.shape[1:], dtype=torch.uint8),
                     torch.zeros_like(tokens[:config.batch]), answer[:config.batch]]
            dummy = [part.to(run.device) for part in dummy]
            for _ in range(5):
                train_step(0, dummy, model, adam, config, run)
    adam = make_optimizer(model, config)

    run.start()
    loader = None
    if config.num_steps:
        tensors = [torch.from_numpy(np.array(pixels)), tokens, answer]
        loader = Loader(tensors, config.batch, config.seed, run.device)
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
        loss = train_step(run.step, loader(), model, adam, config, run)
        run.progress(loss, config.batch * seq_len, config.batch * flops_per_row(model, config, seq_len))
        if run.saver:
            run.saver.after_step(model, None, adam, loader)

    run.result(model, digest, {"pictures": run.step * config.batch, **numbers})
    run.show(model)


# --- copied: start ---
if __name__ == "__main__":
    try:
        record(main)(sys.argv[1:])
    except Fault as fault:
        sys.exit(f"{HERE.name}: {fault}")
# --- end: start ---
