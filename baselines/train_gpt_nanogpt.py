"""nanoGPT (github.com/karpathy/nanoGPT): the public baseline of the tracks of train_gpt.py.

The recipe, written afresh: GPT-2's pre-norm blocks with LayerNorm, GELU and learned positions, without biases; a head
tied to the embedding; smaller initial weights the more projections add to the residual stream; AdamW, warm-up and a
cosine down to a tenth of the peak; rows from anywhere in the stream, whose documents see each other.
nanoGPT's numbers for the cpu track are those of config/train_shakespeare_char.py at the size that its README has for a
CPU, 4 blocks of 4 heads and dim 128 without dropout, and for the gpu track those of its GPT-2 (124M). What is different
here, and why:

    cpu   data      bytes of 42 texts, 4.6 MB, not characters of 1 MB: the track's
          size      after eight and a half minutes on one core dim 128 and 4 blocks have 1.58 nats, dim 192 and 6 blocks
                    1.71, dim 256 and 6 blocks with rows of 256 tokens 2.08
          rows      16 of 128 tokens, not 12 of 64: the validation loss has up to 256 tokens to look back on
          steps     10,000, not 2,000: it reaches the target
    cpu-code        the same model on 8,192 tokens of Python; after 340 to 395 s on one of two busy cores dim 64 and
                    4 blocks have 5.72 nats, dim 128 and 4 blocks 5.59, dim 192 and 6 blocks 5.97; not a record yet
    gpu   data      FineWeb, not OpenWebText: the track's
          head      the 50,257 tokens that there are, not filled up to 50,304: the evaluation asks for no others
          steps     20,000, not 600,000: 10 billion tokens and not 300

Learned positions end at the context. A longer row, such as the cpu tracks' windows of 256 tokens, is read in windows of
the context that overlap by half, and a token is predicted in the first one that holds it: from all tokens before it as
long as these fit, and from no fewer than half a context of them further on. Samples are drawn without a cache, as
nanoGPT draws them: once the context is full, every token moves to another position.

    python baselines/train_gpt_nanogpt.py             # the cpu track, data from `python data/shakespeare.py`
    torchrun --standalone --nproc_per_node=8 baselines/train_gpt_nanogpt.py     # the gpu track, data/fineweb.py
    python baselines/train_gpt_nanogpt.py --help      # every field and what it may be
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
    seed: int = 0  # of weights, batches and dropout
    data: str = "shakespeare"  # token streams in data/<name>, made by data/<name>.py; scenes: by scenes.py --objects
    # model
    dim: int = 128  # channels
    head_dim: int = 32  # channels per attention head
    depth: int = 4  # blocks
    mlp_ratio: int = 4  # hidden channels of an MLP per channel
    context: int = 128  # tokens per row, and positions that there are
    dropout: float = 0.0  # share left out of embeddings, attention weights and what a block adds
    init_std: float = 0.02  # of all matrices and embeddings; projections into the residual stream have less
    # optim
    lr: float = 1e-3  # peak
    lr_end: float = 0.1  # share of it that is left at the last step
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.99  # higher than usual, because a step has few tokens
    weight_decay: float = 0.1  # of matrices and embeddings, not of gains
    clip: float = 1.0  # norm of the gradient at most
    # schedule
    num_steps: int = 10000  # training steps
    warmup: int = 100  # of them that the learning rate rises over
    batch: int = 16  # rows per step, over all processes
    micro_batch: int = 512  # of them that a process computes at a time
    # eval
    target: float = 1.5  # validation loss to reach; 0: the track has not been opened
    eval_tokens: int = 327680  # of the validation stream
    eval_every: int = 2000  # steps between evaluations; the clock is paused


@dataclass
class Options:
    """What a run is asked to do, beside the tuned numbers."""
    precision: str = "auto"  # of matrix products; auto measures which is faster
    load: str = ""  # checkpoint to start from, or hf:owner/name[@revision]; paths are relative to the repository
    save: bool = False  # write checkpoints/<run id>.safetensors at the end
    save_every: int = 0  # steps between saved states to resume from; 0: only at SIGTERM and Ctrl-C
    resume: str = ""  # saved state to resume from
    log_to: str = "none"  # where losses go at evaluations as well: trackio, wandb or tensorboard
    prompt: str = "\n"  # what the samples continue
    sample_tokens: int = 500  # tokens to draw
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int = 0  # draw from so many likeliest tokens; 0: all
    top_p: float = 1.0  # of them the fewest that hold this probability
    quality_tokens: int = 20000  # drawn to count the words that the training text knows; 0: none

    @property
    def draft(self):
        """No smaller model guesses ahead: that is for models with a cache."""
        return ""


CONFIGS = {
    "cpu": Config(),
    "cpu-code": Config(track="cpu-code", data="pycode", num_steps=7000, target=0.0, eval_tokens=163840,
                       eval_every=3500),
    # GPT-2 (124M): 480 rows of 1,024 tokens, nanoGPT's 0.5M per step, can be divided among 1, 2, 4 and 8 GPUs
    "gpu": Config(track="gpu", data="fineweb", dim=768, head_dim=64, depth=12, context=1024, lr=6e-4, beta2=0.95,
                  num_steps=20000, warmup=2000, batch=480, micro_batch=30, target=3.28, eval_tokens=10485760,
                  eval_every=1000),
}
ARCHITECTURE = ("dim", "head_dim", "depth", "mlp_ratio", "context")  # what a checkpoint must agree on
LIMITS = {  # what a field may be: least and most, or choices; data/options.py has those that scripts share
    "dim": (1, 8192), "head_dim": (1, 256), "depth": (1, 96), "context": (2, 2 ** 16), "dropout": (0, 0.99),
    "lr_end": (0, 1), "batch": (1, 2 ** 16), "micro_batch": (1, 2 ** 16), "eval_tokens": (1, 2 ** 40),
    "sample_tokens": (1, math.inf), "top_p": (1e-6, 1),
}


def check_config(config, run):
    """What fields may be together. Raises Fault for what they may not."""
    if config.dim % config.head_dim:
        raise Fault(f"--dim={config.dim} is not a multiple of --head_dim={config.head_dim}")
    shard = run.slice(config.batch)
    rows = shard.stop - shard.start
    if rows % min(config.micro_batch, rows):
        raise Fault(f"--micro_batch={config.micro_batch} does not divide a process's {rows} rows of the batch")


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

# --- copied: streams ---
def read_streams(config):
    """The training tokens, memory maps (N,) uint16 of modded-nanogpt's .bin files, what meta.json says of them, and
    their sha256."""
    digest = "none"
    if not STANDALONE:
        digest = import_ours("checks").check_streams(sys.modules[__name__], config)
    folder = ROOT / "data" / config.data
    meta = json.loads((folder / "meta.json").read_text())
    paths = sorted(folder.glob("train*.bin"))
    return [np.memmap(path, np.uint16, "r", offset=1024) for path in paths], meta, digest


class Loader:
    """Endless batches at random offsets: inputs and targets (batch, context), the same on every rank."""

    def __init__(self, shards, config, device):
        self.tokens = torch.cat([torch.from_numpy(shard.astype(np.int16)).to(device) for shard in shards])
        self.batch = config.batch
        self.window = torch.arange(config.context + 1, device=device)
        self.rng = torch.Generator(device).manual_seed(config.seed)

    def __call__(self):
        last = len(self.tokens) - len(self.window)
        start = torch.randint(last, (self.batch, 1), generator=self.rng, device=self.tokens.device)
        rows = self.tokens[start + self.window].long() & 0xFFFF  # ids above 32767 are negative in 16 bits
        return rows[:, :-1], rows[:, 1:]

    def state_dict(self):
        return {"rng": self.rng.get_state()}

    def load_state_dict(self, state):
        self.rng.set_state(state["rng"])
# --- end: streams ---


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
    """Linear warm-up, then a cosine from lr down to lr_end of it at the last step."""
    if step < config.warmup:
        return config.lr * (step + 1) / (config.warmup + 1)
    progress = (step - config.warmup) / max(1, config.num_steps - 1 - config.warmup)
    share = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.lr_end + (1 - config.lr_end) * share)


def make_optimizer(model, config):
    """AdamW, without decay of the norms' gains; embeddings decay, as in nanoGPT."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    gains = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


# ------------------------------------------------------------------------------------------------------------
# Attention

def attend(q, k, v, dropout):
    """Causal softmax attention of q over k, v (B, H, T, D); dropout: share of its weights that is left out."""
    if q.is_cuda or v.dtype == torch.float32:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    # written out: in bfloat16 on a CPU torch 2.13's fused kernel takes 3 to 6 times as long, in float32 0.8 times
    T = q.size(2)
    later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    scores = (q * q.size(-1) ** -0.5) @ k.mT
    weights = scores.masked_fill(later, -math.inf).softmax(-1).type_as(v)
    return F.dropout(weights, dropout) @ v


# ------------------------------------------------------------------------------------------------------------
# Model

class LayerNorm(nn.LayerNorm):
    def __init__(self, dim):
        super().__init__(dim, eps=1e-5, bias=False)


class Linear(nn.Linear):
    def __init__(self, inside, outside):
        super().__init__(inside, outside, bias=False)


def split_heads(x, head_dim):
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)  # (B, T, C) -> (B, H, T, D)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim, self.dropout = config.head_dim, config.dropout
        self.qkv = Linear(config.dim, 3 * config.dim)
        self.proj = Linear(config.dim, config.dim)

    def forward(self, x):
        q, k, v = (split_heads(part, self.head_dim) for part in self.qkv(x).chunk(3, -1))
        y = attend(q, k, v, self.dropout if self.training else 0.0)
        return self.proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm block: attention, then a GELU MLP."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = LayerNorm(config.dim)
        self.attention = Attention(config)
        self.norm2 = LayerNorm(config.dim)
        self.up = Linear(config.dim, config.mlp_ratio * config.dim)
        self.down = Linear(config.mlp_ratio * config.dim, config.dim)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x):
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))


class GPT(nn.Module):
    """Tokens in, logits of the next token out; positions are learned, and the head's weights are the embedding's."""

    def __init__(self, config, meta):
        super().__init__()
        self.context = config.context
        self.embed = nn.Embedding(meta["vocab"], config.dim)
        self.embed_position = nn.Embedding(config.context, config.dim)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = LayerNorm(config.dim)

    def forward(self, tokens):
        """Final states (B, T, C) of tokens (B, T); T is at most the context."""
        x = self.drop(self.embed(tokens) + self.embed_position.weight[:tokens.size(1)])
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def logits(self, y):
        """float32 logits (..., vocab) from final states (..., C)."""
        return F.linear(y, self.embed.weight).float()

    def log_probs(self, tokens):
        """float32 (B, T, vocab): at each place of tokens (B, T), of the next token.

        A row longer than the context is read in windows that overlap by half; each place is of the first that holds it.
        """
        T, context = tokens.size(1), self.context
        parts = [self(tokens[:, :context])]
        for start in range(context, T, context // 2):
            stop = min(start + context // 2, T)
            y = self(tokens[:, stop - context:stop])
            parts.append(y[:, start - stop:])
        return self.logits(torch.cat(parts, 1)).log_softmax(-1)


def init_weights(model, std):
    for name, p in model.named_parameters():
        if "norm" in name:
            nn.init.ones_(p)
        elif "proj" in name or "down" in name:  # the residual stream adds up two of them per block
            nn.init.normal_(p, std=std / math.sqrt(2 * len(model.blocks)))
        elif "embed" in name or "qkv" in name or "up" in name:
            nn.init.normal_(p, std=std)
        else:
            raise AssertionError(f"no initialisation for {name}")


# ------------------------------------------------------------------------------------------------------------
# Loss

def token_nats(model, tokens, targets):
    """Cross-entropy (B, T) in nats of targets (B, T), each given the tokens (B, T) up to its place."""
    logits = model.logits(model(tokens))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def train_step(step, inputs, targets, model, adam, config, run):
    """One step on a global batch (batch, context): this rank's part of its loss."""
    model.train()  # with dropout, as evaluation and samples are without
    # what dropout draws depends on seed, step and rank alone: a state to resume from need not hold it
    torch.manual_seed((1_000_000 * config.seed + step) * run.world + run.rank)
    shard = run.slice(config.batch)
    total = 0.0
    for x, y in zip(inputs[shard].split(config.micro_batch), targets[shard].split(config.micro_batch)):
        with run.autocast():
            loss = token_nats(model, x, y).sum() / inputs.numel()
        loss.backward()
        total += loss.detach()
    sum_gradients(adam, run.world)
    nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    for group in adam.param_groups:
        group["lr"] = learning_rate(step, config)
    adam.step()
    adam.zero_grad(set_to_none=True)
    return total


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


# --- copied: probabilities ---
def probabilities(logits, options):
    """What is drawn from, (..., V); at temperature 0 everything is on the likeliest."""
    if options.temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.size(-1)).float()
    return sharpen(logits, options.temperature, options.top_k, options.top_p).softmax(-1)
# --- end: probabilities ---


@torch.no_grad()
def generate(model, tokens, options, seed=0):
    """Continue tokens (B, T): yields the next token (B, 1) of every row, options.sample_tokens times, each drawn given
    the last `context` tokens."""
    rng = torch.Generator(tokens.device).manual_seed(seed)
    for _ in range(options.sample_tokens):
        y = model(tokens[:, -model.context:])
        logits = model.logits(y[:, -1])
        new = torch.multinomial(probabilities(logits, options), 1, generator=rng)
        tokens = torch.cat([tokens, new], 1)
        yield new


# ------------------------------------------------------------------------------------------------------------
# Evaluation

# --- frozen: eval ---
EVAL_BATCH = 64  # windows at a time; so many are predicted a second time
# tokens of a window, how far on the next one is, and of how many log-probabilities a batch is at most
EVAL_WINDOWS = {"cpu": (256, 128, 2 ** 26), "cpu-code": (256, 128, 2 ** 26), "gpu": (1024, 1024, 2 ** 29)}


def eval_sha256(*paths):
    """One hash of this block and of the files that it reads."""
    code = HERE.read_text().partition("# --- " "frozen:")[2].partition("# --- " "end:")[0]
    return hashlib.sha256(b"".join([code.encode(), *(Path(path).read_bytes() for path in paths)])).hexdigest()


def read_validation(config):
    """The first eval_tokens + 1 tokens of the validation stream, a tensor (N + 1,), and the sha256 of it all."""
    folder, parts = ROOT / "data" / config.data, []
    paths = sorted(folder.glob("val*.bin"))
    if not paths:
        raise Fault(f"no validation stream in {folder}: the script that makes the training stream makes it too")
    try:
        for path in paths:
            header, tokens = np.fromfile(path, np.int32, 256), np.fromfile(path, np.uint16, offset=1024)
            if header[:3].tolist() != [20240520, 1, len(tokens)]:
                raise ValueError(f"{path.name} is not a whole .bin token file")
            parts.append(tokens)
    except (OSError, ValueError) as error:
        raise Fault(f"{folder} is damaged ({error}): delete it and make it again") from None
    stream = np.concatenate(parts)[:config.eval_tokens + 1].astype(np.int64)
    if len(stream) <= config.eval_tokens:
        raise Fault(f"--eval_tokens={config.eval_tokens} is more than the {len(stream) - 1} there are in {config.data}")
    return torch.from_numpy(stream), eval_sha256(*paths)


def fingerprint(model):
    """Shape, sum and absolute sum of every parameter and buffer."""
    tensors = [tensor.double() for tensor in (*model.parameters(), *model.buffers())]
    return [(tensor.shape, tensor.sum().item(), tensor.abs().sum().item()) for tensor in tensors]


def target_log_probs(model, tokens, targets, vocab):
    """What the model gives targets (B, T), each after the tokens (B, T) up to its place: log-probabilities (B, T).
    Raises Fault for another shape or dtype, for one that is not finite, and where a place's do not sum to 1."""
    logs = model.log_probs(tokens)
    if logs.shape != (*tokens.shape, vocab) or logs.dtype != torch.float32:
        raise Fault(f"log_probs gives {logs.dtype} {tuple(logs.shape)}, not float32 {(*tokens.shape, vocab)}")
    found = logs.gather(-1, targets[..., None])[..., 0]
    if not found.isfinite().all():
        raise Fault("a log-probability that counts is not finite")
    if ((logs.exp().sum(-1) - 1).abs() > 1e-3).any():
        raise Fault("the probabilities of a place do not sum to 1")
    return found


def check_again(model, stream, seen, vocab):
    """Predict windows a second time, seen: [(places (B, T), log-probabilities (B, T))]. Meanwhile every token of the
    stream is another one, and so are the inputs of every second window from a random place on, which no earlier place
    and no other window may notice: else raises Fault."""
    kept, rng = stream.clone(), torch.Generator().manual_seed(0)
    stream.add_(1).remainder_(vocab)
    for at, before in seen:
        B, T = at.shape
        first_changed = torch.randint(T, (B, 1), generator=rng).to(at.device)
        first_changed[1::2] = T
        same = torch.arange(T, device=at.device) < first_changed
        after = target_log_probs(model, torch.where(same, kept[at], stream[at]), kept[at + 1], vocab)
        if ((after - before).abs() > 1e-3)[same].any():
            raise Fault("a prediction is another one where only tokens differ that it may not depend on")
    stream.copy_(kept)


@torch.no_grad()
def evaluate(model, stream, vocab, config, rank, world):
    """Mean cross-entropy in nats of stream[1:] (N,), tokens of a vocabulary, and further numbers for the footer.

    Windows may overlap; a token counts in the first one that holds it. model.log_probs(tokens (B, T)) has one window in
    each row and gives float32 (B, T, vocab): at each place, of the next token. It is checked by target_log_probs and
    check_again; the model's tensors must be the same afterwards. Ranks share the windows; all get the result.
    """
    before, N = fingerprint(model), len(stream) - 1
    T, stride, values = EVAL_WINDOWS[config.track]
    T = min(T, N)
    batch = max(1, min(EVAL_BATCH, values // (T * vocab)))
    ends = torch.tensor([*range(T, N, stride), N], device=stream.device)[:, None]
    fresh = ends.diff(dim=0, prepend=torch.zeros_like(ends[:1]))  # tokens that a window is the first to hold
    place = torch.arange(T, device=stream.device)
    total, seen = torch.zeros(2, dtype=torch.float64, device=stream.device), []  # nats, tokens
    for i in range(rank * batch, len(ends), world * batch):
        at = ends[i:i + batch] - T + place  # (B, T)
        logs = target_log_probs(model, stream[at], stream[at + 1], vocab)
        counted = place >= T - fresh[i:i + batch]
        total += torch.stack([-logs[counted].double().sum(), counted.sum()])
        if len(seen) * batch < EVAL_BATCH:
            seen.append((at, logs))
    check_again(model, stream, seen, vocab)
    if fingerprint(model) != before:
        raise Fault("the model's parameters or buffers are not what they were before the evaluation")
    if world > 1:
        dist.all_reduce(total)
    if total[1] != N:
        raise Fault(f"{int(total[1])} tokens were predicted, and there are {N}")
    return total[0].item() / N, {"eval_targets": N}
# --- end: eval ---


# ------------------------------------------------------------------------------------------------------------
# Training

def flops_per_token(model, config):
    """Matmul FLOPs of a training step per token, backward being twice forward; causal attention counts half."""
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)
    return 6 * (matrices + config.depth * config.context * config.dim + model.embed.weight.numel())


def main(argv):
    keep_memory()
    run = Run("gpt", argv)
    config = run.config
    check_config(config, run)
    shards, meta, run.data_sha256 = read_streams(config)
    val_tokens, digest = read_validation(config)
    rows = min(config.micro_batch, config.batch // run.world)
    run.choose_precision(rows * config.context, config.dim, config.mlp_ratio * config.dim)
    torch.manual_seed(config.seed)
    model = GPT(config, meta).to(run.device)
    init_weights(model, config.init_std)
    if run.device.type == "cuda":  # block by block: all are one graph, made in seconds
        for block in model.blocks:
            block.compile(fullgraph=True, dynamic=False)
    run.prepare(model, meta=meta)
    val_tokens = val_tokens.to(run.device)

    if config.num_steps:
        with run.warm_up(model):
            adam = make_optimizer(model, config)
            dummy = torch.zeros(config.batch, config.context, dtype=torch.long, device=run.device)
            for step in range(3):
                train_step(step, dummy, dummy, model, adam, config, run)
            if run.device.type == "cuda":  # the evaluation's shapes are compiled too
                model.eval()
                with run.autocast():
                    evaluate(model, val_tokens, meta["vocab"], config, run.rank, run.world)
    adam = make_optimizer(model, config)

    run.start()
    if config.num_steps:
        loader = Loader(shards, config, run.device)
        step_flops = config.batch * config.context * flops_per_token(model, config)
    if run.options.resume:
        import_ours("checkpoints").load_state(run, model, None, adam, loader)
    while True:
        last = run.step == config.num_steps
        if last or (run.step and run.step % config.eval_every == 0):
            with run.paused(), run.autocast():
                model.eval()
                val_loss, numbers = evaluate(model, val_tokens, meta["vocab"], config, run.rank, run.world)
                run.evaluation(val_loss)
        if last:
            break
        inputs, targets = loader()
        loss = train_step(run.step, inputs, targets, model, adam, config, run)
        run.progress(loss, inputs.numel(), step_flops)
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
