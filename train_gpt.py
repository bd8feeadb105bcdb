"""GPT: a decoder-only Transformer learns to predict the next token of a stream: bytes, words, code or image tokens.

After nanoGPT and modded-nanogpt: Muon, rotary positions, QK-norm, ReLU^2, zero-initialised projections, hashed
embeddings of the last few tokens. Times against the baseline, record #1, are in records/README.md.

    python train_gpt.py                                         # the cpu track, data from `python data/shakespeare.py`
    torchrun --standalone --nproc_per_node=8 train_gpt.py       # the gpu track, data/fineweb.py (not yet run on a GPU)
    python train_gpt.py --num_steps=1500 --save=true            # 20 s; then --num_steps=0 --load=<checkpoint>
"""
import codecs
import copy
import dataclasses
import functools
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
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from tqdm import tqdm

try:
    import triton
    import triton.language as tl
except ImportError:  # it comes with torch for CUDA, and is for Linux alone
    triton = None

# ------------------------------------------------------------------------------------------------------------
# Config

@dataclass
class Config:
    # data
    track: str = "cpu"
    seed: int = 0
    data: str = "shakespeare"  # token streams in data/<name>, made by data/<name>.py; scenes: by scenes.py --objects
    # model
    dim: int = 64  # channels
    head_dim: int = 64
    depth: int = 1  # blocks
    mlp_ratio: int = 4
    window: int = 64  # tokens that attention looks back
    orders: int = 5  # the last 2, 3 .. orders tokens have an embedding table each
    grams: int = 8192  # rows of such a table, shared by hashing
    # schedule
    num_steps: int = 45
    batch: int = 32  # rows a step, over all processes
    rows: int = 512  # of them that a process computes at a time
    context: int = 64  # tokens a row
    cooldown: float = 0.7  # share of the steps over which the learning rates fall to 0
    # optimizer
    muon_lr: float = 0.04  # hidden matrices
    momentum: float = 0.95
    adam_lr: float = 0.05  # embeddings and head
    # evaluation and output
    target: float = 1.91  # validation loss in nats a token, record #1's
    eval_tokens: int = 327680  # of the validation stream
    eval_context: int = 256  # tokens in a window
    eval_stride: int = 192  # of them new
    eval_batch: int = 64  # windows
    eval_every: int = 15  # steps between evaluations; the clock stands still
    load: str = ""  # checkpoint to start from
    precision: str = "auto"  # of matrix products: auto (measured), fp32 or bf16
    save: bool = False  # write checkpoints/<run id>.safetensors at the end
    save_every: int = 0  # steps between states that --resume can go on from; 0: only at SIGTERM
    resume: str = ""  # state to go on from
    # sampling
    prompt: str = "\n"
    sample_tokens: int = 500
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    draft: str = ""  # checkpoint of a smaller model that guesses ahead
    ahead: int = 4  # tokens it guesses


CONFIGS = {
    "cpu": Config(),
    # GPT-2 small's size on FineWeb, to modded-nanogpt's target
    "gpu": Config(track="gpu", data="fineweb", dim=768, depth=12, window=1024, orders=2, grams=65536, batch=512,
                  rows=32, context=1024, num_steps=3000, muon_lr=0.02, adam_lr=0.005, target=3.28, eval_tokens=10485760,
                  eval_context=2048, eval_stride=1024, eval_batch=32, eval_every=250),
}
ARCHITECTURE = ("dim", "head_dim", "depth", "mlp_ratio", "window", "orders", "grams")  # what a checkpoint must agree on


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


# ------------------------------------------------------------------------------------------------------------
# Data

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


def read_streams(config):
    """The training tokens, a tensor (N,) int32, what meta.json says of them, and their sha256."""
    folder = ROOT / "data" / config.data
    make = f"python data/{folder.name}.py" + " --objects" * (folder.name == "scenes")
    if not (folder / "meta.json").exists():
        raise Fault(f"no data in {folder}: make it with `{make}`")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        parts = [read_bin(path) for path in sorted(folder.glob("train*.bin"))]
        tokens = torch.from_numpy(np.concatenate(parts).astype(np.int32))
        if int(tokens.max()) >= meta["vocab"]:
            raise ValueError(f"token {tokens.max()} of a vocabulary of {meta['vocab']}")
    except (OSError, ValueError, KeyError) as error:
        raise Fault(f"{folder} is damaged ({error}): delete it and run `{make}`") from None
    return tokens, meta, hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


class Loader:
    """Endless batches at random offsets: inputs and targets (batch, context), the same on every rank."""

    def __init__(self, tokens, config, device):
        self.tokens, self.batch = tokens.to(device), config.batch
        self.window = torch.arange(config.context + 1, device=device)
        self.rng = torch.Generator(device).manual_seed(config.seed)

    def __call__(self):
        last = len(self.tokens) - len(self.window)
        start = torch.randint(last, (self.batch, 1), generator=self.rng, device=self.tokens.device)
        rows = self.tokens[start + self.window].long()
        return rows[:, :-1], rows[:, 1:]


# ------------------------------------------------------------------------------------------------------------
# Attention

# --- copied: masks ---
flex, build = torch.compile(flex_attention, dynamic=False), torch.compile(create_block_mask, dynamic=False)


def dense_mask(rule, ids, start=0):
    """The mask (B, 1, T - start, T) that attend takes, True where a place from start on may see a place.

    rule(ids, b, q, k) decides by the numbers of row and places and by what ids (B, T) say of them, e.g. the document.
    """
    index = lambda first, last, *shape: torch.arange(first, last, device=ids.device).view(shape)
    (B, T), rows = ids.shape, index(0, len(ids), -1, 1, 1, 1)
    return rule(ids, rows, index(start, T, -1, 1), index(0, T, -1)).expand(B, 1, T - start, T)


def block_mask(rule, ids, kept):
    """The same for all places as a FlexAttention BlockMask. ids go into a tensor of this shape that stays in `kept`
    with the one mask_mod over it: for a new one everything would be compiled again."""
    if ids.shape not in kept:
        own = torch.empty_like(ids)
        kept[ids.shape] = own, lambda b, h, q, k: rule(own, b % len(own), q, k)  # one row of ids may stand for all
    own, mask_mod = kept[ids.shape]
    own.copy_(ids)
    return build(mask_mod, len(ids), None, ids.size(1), ids.size(1), device=ids.device)


def make_mask(rule, ids, start=0, kept=None):
    """block_mask on CUDA, dense_mask elsewhere, where nothing is kept, and for lengths that do not fill its blocks."""
    blocks = ids.is_cuda and kept is not None and ids.size(1) % 128 == 0
    return block_mask(rule, ids, kept) if blocks else dense_mask(rule, ids, start)


def attend(q, k, v, mask=None):
    """Softmax attention of q (B, H, M, D) over k, v (B, H, N, D), mask from make_mask; None: all is seen."""
    if isinstance(mask, BlockMask):
        return flex(q.type_as(v), k.type_as(v), v, block_mask=mask)  # autocast leaves norms in float32
    if q.is_cuda or v.dtype == torch.float32:
        return F.scaled_dot_product_attention(q.type_as(v), k.type_as(v), v, attn_mask=mask)
    # written out: in bfloat16 on a CPU torch 2.13's fused kernel takes 3 to 6 times as long, in float32 0.8 times
    scores = (q * q.size(-1) ** -0.5) @ k.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -3e4)
    return scores.softmax(-1).type_as(v) @ v
# --- end: masks ---


# ------------------------------------------------------------------------------------------------------------
# Kernels

def cross_entropy(logits, targets, cap=0.0):
    """Cross-entropy (N,) in nats, float32, of targets (N,) under logits (N, V); a cap above 0 keeps the logits
    within it, cap * tanh(logits / cap) (arXiv:2408.00118)."""
    logits = logits.float()
    return F.cross_entropy(cap * torch.tanh(logits / cap) if cap > 0 else logits, targets, reduction="none")


if triton:  # else the references above are all there is
    @triton.jit
    def capped(x, CAP: tl.constexpr):
        return CAP * (2 * tl.sigmoid(2 * x / CAP) - 1) if CAP > 0 else x  # tanh, of what tl offers

    @triton.jit
    def nats_kernel(logits, targets, nats, sums, V, CAP: tl.constexpr, BLOCK: tl.constexpr):
        """A program a row: its log-sum-exp, in blocks, the sum rescaled as its maximum grows (arXiv:1805.02867)."""
        row = tl.program_id(0).to(tl.int64)  # there can be more than 2^31 logits
        logits += row * V
        top, total = tl.full((), -1e30, tl.float32), tl.full((), 0.0, tl.float32)
        for start in range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)
            z = capped(tl.load(logits + column, column < V, 0.0).to(tl.float32), CAP)
            z = tl.where(column < V, z, float("-inf"))
            higher = tl.maximum(top, tl.max(z, 0))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher), 0)
            top = higher
        log_sum = top + tl.log(total)
        tl.store(sums + row, log_sum)
        tl.store(nats + row, log_sum - capped(tl.load(logits + tl.load(targets + row)).to(tl.float32), CAP))

    @triton.jit
    def nats_gradient_kernel(logits, targets, sums, gradient, out, V, CAP: tl.constexpr, BLOCK: tl.constexpr):
        """A program a block of a row: softmax less one-hot, times the row's gradient. out may be logits."""
        row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        z = capped(tl.load(logits + row * V + column, column < V, 0.0).to(tl.float32), CAP)
        slope = tl.exp(z - tl.load(sums + row)) - tl.where(column == tl.load(targets + row), 1.0, 0.0)
        slope *= tl.load(gradient + row)
        if CAP > 0:
            slope *= 1 - (z / CAP) * (z / CAP)
        tl.store(out + row * V + column, slope, column < V)

    @triton.jit
    def symmetric_kernel(X, out, m, n, matrix, row, column, TILE: tl.constexpr, DEPTH: tl.constexpr):
        """A program a tile of X X^T on or below the diagonal, and its mirror image; after github.com/nil0x9/flash-muon.
        matrix, row, column: strides of X."""
        i, j, k = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
        if j > i:
            return
        r, c, d = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE), tl.arange(0, DEPTH)
        tile = tl.zeros((TILE, TILE), tl.float32)
        for start in range(0, n, DEPTH):
            at = X + k * matrix + (start + d) * column
            a = tl.load(at[None] + r[:, None] * row, (r[:, None] < m) & (start + d[None] < n), 0.0)
            b = tl.load(at[:, None] + c[None] * row, (c[None] < m) & (start + d[:, None] < n), 0.0)
            tile = tl.dot(a, b, tile)
        out += k * m * m
        tl.store(out + r[:, None] * m + c[None], tile, (r[:, None] < m) & (c[None] < m))
        if j < i:
            tl.store(out + c[:, None] * m + r[None], tl.trans(tile), (c[:, None] < m) & (r[None] < m))


class FusedCrossEntropy(torch.autograd.Function):
    """Keeps the logits and a number a row; backward overwrites the logits with their gradient (arXiv:2410.10989)."""

    @staticmethod
    def forward(ctx, logits, targets, cap):
        (N, V), nats = logits.shape, torch.empty(len(logits), device=logits.device)
        sums = torch.empty_like(nats)
        ctx.block, ctx.cap = min(4096, triton.next_power_of_2(V)), float(cap)
        nats_kernel[(N,)](logits, targets, nats, sums, V, ctx.cap, ctx.block, num_warps=8)
        ctx.reuse = not (logits if logits._base is None else logits._base).is_leaf  # whose values must stay
        ctx.save_for_backward(logits, targets, sums)
        return nats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        logits, targets, sums = ctx.saved_tensors
        (N, V), out = logits.shape, logits if ctx.reuse else torch.empty_like(logits)
        nats_gradient_kernel[N, triton.cdiv(V, ctx.block)](logits, targets, sums, gradient.contiguous(), out, V,
                                                           ctx.cap, ctx.block, num_warps=8)
        if ctx.reuse:  # whoever else needs them for a gradient of their own gets an error
            torch.autograd.graph.increment_version(logits)
        return out, None, None


def fused_cross_entropy(logits, targets, cap=0.0):
    """cross_entropy without a float32 copy of the logits. Backward overwrites them, unless they are a leaf's."""
    return FusedCrossEntropy.apply(logits.contiguous(), targets.contiguous(), cap)


def symmetric(X):
    """gram, X X^T of a stack (K, m, n), at half the work; X may have any strides."""
    (K, m, n), tiles = X.shape, triton.cdiv(X.size(1), 128)
    out = X.new_empty(K, m, m)
    symmetric_kernel[tiles, tiles, K](X, out, m, n, *X.stride(), 128, 64, num_warps=8)
    return out


def measure(function, examples, tries=10):
    """Of a function on CUDA and its backward: median seconds, most MiB beside its inputs, result and gradients."""
    seconds = []
    for _ in range(3 + tries):  # 3: it compiles first
        results, inputs = None, [x.clone() for x in examples]  # copies, for they may be overwritten
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        results, wanted = [function(*inputs)], [x for x in inputs if x.requires_grad]
        results += torch.autograd.grad(results[0].sum(), wanted) if wanted else []
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    mib = (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    torch.cuda.reset_peak_memory_stats()  # the run's own peak comes later
    return np.median(seconds[3:]), mib, [x.detach() for x in results]


def faster(kernel, reference, *examples):
    """The faster of two functions on examples, if the kernel's results are right, and a line for the footer."""
    theirs, their_mib, expected = measure(reference, examples)
    try:
        mine, my_mib, found = measure(kernel, examples)
    except Exception as error:  # Triton's own kinds: this GPU has too little of something, or is unknown
        return reference, f"{kernel.__name__} failed ({type(error).__name__})"
    right = all((a - b).norm() <= 0.01 * b.norm() for a, b in zip(found, expected))  # bfloat16 rounds by 0.002
    verdict = "wrong" if not right else "yes" if mine < theirs else "no"
    line = f"{kernel.__name__} {verdict} {theirs / mine:.2f}x {my_mib:.0f} MiB for {their_mib:.0f}"
    return kernel if verdict == "yes" else reference, line


def choose_kernels(model, config, world, device):
    """Implementations of cross_entropy and of X X^T for this run's shapes, and what the footer says about them."""
    if triton is None or device.type != "cuda":
        return cross_entropy, gram, "none"
    rows, V = min(8192, config.batch // world * config.context), model.head.weight.size(0)  # more rows: the same ratio
    logits = torch.randn(rows, V, device=device, dtype=torch.bfloat16, requires_grad=True)
    nats, line = faster(fused_cross_entropy, cross_entropy, logits, torch.randint(V, (rows,), device=device))
    shapes = [p.shape for p in model.blocks.parameters() if p.dim() == 2]
    largest = max(shapes, key=sorted, default=(1, 1))
    K = -(-shapes.count(largest) // world)  # matrices of a rank in Muon
    X = torch.randn(K, *sorted(largest), device=device, dtype=torch.bfloat16)
    product, other = faster(symmetric, gram, X)
    return nats, product, f"{line}, {other}"


# ------------------------------------------------------------------------------------------------------------
# Model

# --- copied: norm ---
def norm(x):
    return F.layer_norm(x, (x.size(-1),))  # one kernel on a CPU, rms_norm is many: in 4M 0.146 s per step, not 0.171


class Linear(nn.Linear):
    def __init__(self, inside, outside):
        super().__init__(inside, outside, bias=False)
# --- end: norm ---


def rotate(x, turn):
    """Rotary positions (arXiv:2104.09864): pairs of channels of x (B, H, T, D) turn by turn = cos, sin (T, D / 2)."""
    (a, b), (cos, sin) = x.chunk(2, -1), turn
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Attention(nn.Module):
    def __init__(self, dim, head_dim):
        super().__init__()
        self.head_dim = head_dim
        self.q, self.k, self.v, self.proj = (Linear(dim, dim) for _ in range(4))

    def forward(self, x, turn, mask, memory):
        heads = lambda y: y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
        q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        q, k = rotate(norm(q), turn), rotate(norm(k), turn)
        return self.proj(attend(q, *memory(k, v), mask).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm block: attention, then a ReLU^2 MLP."""

    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config.dim, config.head_dim)
        self.up = Linear(config.dim, config.mlp_ratio * config.dim)
        self.down = Linear(config.mlp_ratio * config.dim, config.dim)

    def forward(self, x, turn, mask, memory):
        x = x + self.attention(norm(x), turn, mask, memory)
        return x + self.down(F.relu(self.up(norm(x))).square())


class GPT(nn.Module):
    """Tokens in, logits of the next token out. The last 2, 3 .. tokens have embeddings of their own, hashed."""

    def __init__(self, config, meta):
        super().__init__()
        C, vocab = config.dim, meta["vocab"]
        self.window, self.document_start = config.window, meta["document_start"]
        self.grams, self.head_dim, self.kept = config.grams, config.head_dim, {}
        self.embed = nn.Embedding(vocab, C)
        self.embed_grams = nn.ModuleList(nn.Embedding(self.grams, C) for _ in range(1, config.orders))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head = Linear(C, vocab)
        self.cross_entropy = cross_entropy

    def embedding(self, tokens, start):
        """Embeddings (B, T - start, C) of tokens (B, T) from start on."""
        before = lambda n: F.pad(tokens, (n, 0))[:, start:tokens.size(1)]
        x, code = self.embed(before(0)), before(0)
        for n, table in enumerate(self.embed_grams, 1):
            code = (code * 0x5BD1E995 + before(n)) % 0x7FFFFFFF  # of the last n + 1 tokens
            x = x + table(code % self.grams)
        return x

    def may_see(self, documents, b, q, k):
        """Whether place q of row b looks at place k: one of the last `window` tokens of its own document."""
        return (k <= q) & (q - k < self.window) & (documents[b, q] == documents[b, k])

    def mask(self, tokens, start=0, kept=None):
        """For attend, of the places from start on of tokens (B, T); kept: see make_mask.

        A document begins at each token of an id from document_start on; without, a row is one document.
        """
        one = self.document_start is None
        documents = torch.zeros_like(tokens[:1]) if one else (tokens >= self.document_start).cumsum(1)
        return make_mask(self.may_see, documents, start, kept)

    def turn(self, start, stop, device):
        """Cosine and sine (T, D / 2) of the rotary angles of places start .. stop - 1."""
        rate = 1024 ** -torch.linspace(0, 1, self.head_dim // 2, device=device)
        angle = torch.arange(start, stop, device=device)[:, None] * rate
        return angle.cos(), angle.sin()

    def forward(self, tokens, mask, start=0, memories=None):
        """Final states (B, T - start, C) of the places of tokens (B, T) from start on.

        memories: a block's callable each, from new keys and values to all there are; None: the new ones are all.
        """
        x = norm(self.embedding(tokens, start))
        turn = self.turn(start, tokens.size(1), tokens.device)
        for i, block in enumerate(self.blocks):
            x = block(x, turn, mask, memories[i] if memories else lambda k, v: (k, v))
        return norm(x)

    def logits(self, y):
        """float32 logits (..., vocab) from final states (..., C)."""
        return self.head(y).float()


def init_weights(model):
    for name, p in model.named_parameters():
        if "proj" in name or "down" in name or "head" in name or "gram" in name:
            nn.init.zeros_(p)
        elif "embed" in name:
            nn.init.normal_(p)
        elif "attention" in name or "up" in name:
            nn.init.normal_(p, std=p.shape[1] ** -0.5)
        else:
            raise AssertionError(f"no initialisation for {name}")


# ------------------------------------------------------------------------------------------------------------
# Loss

def token_nats(model, tokens, targets):
    """Cross-entropy (B, T) in nats of targets (B, T), each given the tokens (B, T) up to its place."""
    logits = model.head(model(tokens, model.mask(tokens, kept=model.kept)))
    return model.cross_entropy(logits.flatten(0, 1), targets.flatten()).view_as(targets)


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


def probabilities(logits, config):
    """What is drawn from, (..., V); at temperature 0 everything is on the likeliest."""
    if config.temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.size(-1)).float()
    return sharpen(logits, config.temperature, config.top_k, config.top_p).softmax(-1)


class Reader:
    """A model that remembers the keys and values of what it has read, so that every token is computed once."""

    def __init__(self, model, cached=True):
        self.model, self.cached, self.read, self.past = model, cached, 0, {}

    def remember(self, i, k, v):
        """Add keys and values (B, H, T, D) to those of block i: all there are."""
        if i in self.past:
            k, v = torch.cat([self.past[i][0], k], 2), torch.cat([self.past[i][1], v], 2)
        self.past[i] = k, v
        return k, v

    def __call__(self, tokens):
        """Logits (B, new, V) after each of the tokens (B, T) not read yet."""
        memories = [functools.partial(self.remember, i) for i in range(len(self.model.blocks))] if self.cached else None
        mask = self.model.mask(tokens, self.read)
        logits = self.model.logits(self.model(tokens, mask, self.read, memories))
        self.read = tokens.size(1) if self.cached else 0
        return logits

    def forget(self, length):
        """Back to where only the first `length` tokens were read."""
        self.read = min(self.read, length)
        self.past = {i: (k[:, :, :length], v[:, :, :length]) for i, (k, v) in self.past.items()}


@torch.no_grad()
def generate(model, tokens, config, seed=0, cached=True):
    """Continue tokens (B, T): yields the next token (B, 1) of every row, config.sample_tokens times."""
    reader, rng = Reader(model, cached), torch.Generator(tokens.device).manual_seed(seed)
    for _ in range(config.sample_tokens):
        new = torch.multinomial(probabilities(reader(tokens)[:, -1], config), 1, generator=rng)
        tokens = torch.cat([tokens, new], 1)
        yield new


@torch.no_grad()
def speculate(model, draft, tokens, config, seed=0):
    """Continue tokens (1, T) with the same distribution as generate: yields runs (1, n) of config.sample_tokens in all.

    The draft guesses config.ahead tokens, the model checks them in one pass: a guess drawn with probability q is kept
    with probability p / q; where one falls, the model draws from what q left over of p (arXiv:2211.17192).
    """
    checker, guesser, rng = Reader(model), Reader(draft), torch.Generator(tokens.device).manual_seed(seed)
    left = config.sample_tokens
    while left > 0:
        known, q = tokens.size(1), []
        for _ in range(config.ahead):
            q.append(probabilities(guesser(tokens)[0, -1:], config))  # (1, V)
            tokens = torch.cat([tokens, torch.multinomial(q[-1], 1, generator=rng)], 1)
        q, guesses = torch.cat(q), tokens[0, known:, None]  # (ahead, V), (ahead, 1)
        p = probabilities(checker(tokens)[0, -1 - config.ahead:], config)  # (ahead + 1, V)
        chance = torch.rand(config.ahead, generator=rng, device=tokens.device)
        kept = chance < (p[:-1].gather(1, guesses) / q.gather(1, guesses))[:, 0]
        n = int(kept.long().cumprod(0).sum())
        rest = (p[n] - q[n]).clamp(min=0) if n < config.ahead else p[n]
        tokens = torch.cat([tokens[:, :known + n], torch.multinomial(rest[None], 1, generator=rng)], 1)
        checker.forget(known + n), guesser.forget(known + n)
        yield tokens[:, known:][:, :left]
        left -= n + 1


def speak(runs, decode):
    """Print the tokens of runs (1, n) as they come: their ids, and how many came a second."""
    decoder, ids, start = codecs.getincrementaldecoder("utf-8")("replace"), [], time.perf_counter()
    for run in runs:
        ids += run[0].tolist()
        print(decoder.decode(decode(run[0].tolist())), end="", flush=True)
    print()
    return ids, len(ids) / (time.perf_counter() - start)


def write_samples(model, config, meta, device, path):
    """Continue the prompt on the terminal and in path + ".txt", or draw pictures of every label in path + ".png": what
    was measured while doing so, for the footer."""
    sys.path.insert(0, str(ROOT / "data"))  # turns tokens into text and pictures, not needed while training
    if meta["encoding"] == "scenes":
        import draw
        import studio
        labels = torch.arange(meta["document_start"], meta["vocab"], device=device).repeat_interleave(4)[:, None]
        drawn = torch.cat(list(generate(model, labels, dataclasses.replace(config, sample_tokens=64))), 1)
        made = list(studio.Studio(device).pictures(drawn.clamp(max=meta["document_start"] - 1)))
        draw.sheet([made[i:i + 8] for i in range(0, len(made), 8)], path.with_suffix(".png"))
        return {}
    import streams
    encode, decode = streams.codec(meta)
    prompt = encode(config.prompt or "\n")
    if max(prompt) >= meta["vocab"]:
        raise Fault(f"--prompt={config.prompt} has characters that {config.data} does not")
    start = torch.tensor([prompt], device=device)
    ids, speed = speak(generate(model, start, config), decode)
    path.with_suffix(".txt").write_bytes(decode(prompt + ids))
    numbers = {"sampled_per_second": round(speed, 1)}
    if config.draft:
        draft, runs = load_draft(config, meta, device), []
        guessed = (runs.append(run) or run for run in speculate(model, draft, start, config))
        _, speed = speak(guessed, decode)
        numbers.update(speculated_per_second=round(speed, 1),
                       tokens_per_check=round(config.sample_tokens / len(runs), 2))
    return numbers


# ------------------------------------------------------------------------------------------------------------
# Evaluation

# --- frozen: eval ---
def read_validation(config):
    """The first eval_tokens + 1 tokens of the validation stream, a tensor (N + 1,), and the sha256 of it all."""
    folder = ROOT / "data" / config.data
    paths = sorted(folder.glob("val*.bin"))
    if not paths:
        raise Fault(f"no validation stream in {folder}: the script that makes the training stream makes it too")
    try:
        stream = np.concatenate([read_bin(path) for path in paths])[:config.eval_tokens + 1].astype(np.int64)
    except (OSError, ValueError) as error:
        raise Fault(f"{folder} is damaged ({error}): delete it and make it again") from None
    if len(stream) <= config.eval_tokens:
        raise Fault(f"--eval_tokens={config.eval_tokens} is more than the {len(stream) - 1} there are in {config.data}")
    return torch.from_numpy(stream), frozen_sha256(*paths)


@torch.no_grad()
def evaluate(model, stream, config, rank, world):
    """Mean cross-entropy in nats of stream[1:], every token given at most the eval_context tokens before it.

    Windows of eval_context tokens advance by eval_stride; a token counts in the first window that holds it. At place t
    of a window token_nats may look at the window's tokens up to t alone. Ranks share the windows; all get the result.
    """
    N, T = len(stream) - 1, min(config.eval_context, len(stream) - 1)
    ends = torch.tensor([*range(T, N, config.eval_stride), N])
    fresh = ends.diff(prepend=torch.zeros(1, dtype=torch.long))  # tokens that a window is the first to hold
    total, place = torch.zeros((), dtype=torch.float64, device=stream.device), torch.arange(T)
    for part in torch.arange(rank, len(ends), world).split(config.eval_batch):
        at = (ends[part, None] - T + place).to(stream.device)  # (B, T)
        counted = (place >= T - fresh[part, None]).to(stream.device)
        total += token_nats(model, stream[at], stream[at + 1])[counted].double().sum()
    if world > 1:
        dist.all_reduce(total)
    return total.item() / N
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


def make_optimizers(model, config, rank, world, precision, gram=gram):
    """Muon for the blocks' matrices, Adam for the rest; every parameter is in exactly one."""
    hidden, rest = [], []
    for name, p in model.named_parameters():
        (hidden if "blocks" in name and p.dim() == 2 else rest).append(p)
    return (Muon(hidden, config.momentum, rank, world, PRECISIONS[precision], gram),
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

def load_draft(config, meta, device):
    """The smaller model of --draft, whatever its Config was."""
    try:
        with safe_open(config.draft, "pt") as file:
            saved = json.loads((file.metadata() or {})["config"])
        config = dataclasses.replace(config, **{key: saved[key] for key in ARCHITECTURE})
    except Exception as error:  # safetensors raises its own kinds
        why = f"{type(error).__name__}: {error}"
        raise Fault(f"--draft={config.draft} is not a checkpoint of this script ({why})") from None
    draft = GPT(config, meta).to(device).eval()
    load_checkpoint(config.draft, draft, config)
    return draft


def flops_per_token(model, config):
    """Matmul FLOPs of a training step a token, backward being twice forward; causal attention counts half."""
    hidden = sum(p.numel() for p in model.blocks.parameters()) + config.depth * config.context * config.dim
    return 6 * (hidden + model.head.weight.numel())


def main(argv):
    config, overrides = read_config(argv)
    least = min(config.batch, config.context, config.eval_every, config.eval_batch, config.ahead)
    if config.resume and not config.num_steps:
        raise Fault("--resume goes on with a run: pass its --num_steps, or --load to evaluate a checkpoint")
    if config.num_steps < 0 or least < 1:
        raise Fault("num_steps must be at least 0, batch, context, eval_every, eval_batch and ahead at least 1")
    if config.dim % config.head_dim:
        raise Fault(f"dim {config.dim} is not a multiple of head_dim {config.head_dim}")
    if not 1 <= config.eval_stride <= config.eval_context:
        raise Fault("eval_stride must be at least 1 and at most eval_context")
    rank, world, device = setup()
    if config.batch % world:
        raise Fault(f"a batch of {config.batch} rows cannot be divided among {world} processes")
    rows = min(config.rows, config.batch // world)
    if rows < 1 or config.batch // world % rows:
        raise Fault(f"{config.rows} rows at a time do not divide a process's {config.batch // world} rows of the batch")
    tokens, meta, data_sha256 = read_streams(config)
    val_tokens, eval_sha256 = read_validation(config)
    val_tokens = val_tokens.to(device)
    shape = rows * config.context, config.dim, config.mlp_ratio * config.dim  # of a matrix product
    precision, peak = choose_precision(config.precision, device, world, *shape)
    torch.manual_seed(config.seed)
    model = GPT(config, meta).to(device)
    init_weights(model)
    if config.load:
        load_checkpoint(config.load, model, config)
    state, progress = read_state(config, data_sha256) if config.resume else (None, {})
    log = Log("gpt", config, overrides, rank, device, precision)
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    if device.type == "cuda":
        model.compile(fullgraph=True, dynamic=False)

    mine = slice(rank * config.batch // world, (rank + 1) * config.batch // world)

    def train_step(inputs, targets, step):
        """One step on a global batch (batch, context): this rank's part of its loss."""
        loss = 0.0
        for first in range(mine.start, mine.stop, rows):
            part = slice(first, first + rows)
            with autocast():
                nats = token_nats(model, inputs[part], targets[part]).sum() / inputs.numel()
            nats.backward()
            loss += nats.detach()
        sum_gradients(adam, world)
        factor = schedule(step, config)
        muon.step(config.muon_lr * factor)
        adam.param_groups[0]["lr"] = config.adam_lr * factor
        adam.step()
        model.zero_grad(set_to_none=True)
        return loss

    # Warm-up on dummy data, untimed, then everything back to where it was.
    start = time.perf_counter()
    model.cross_entropy, product, kernels = choose_kernels(model, config, world, device)
    muon, adam = make_optimizers(model, config, rank, world, precision, product)
    if config.num_steps:
        before = copy.deepcopy(model.state_dict())
        dummy = torch.zeros(config.batch, config.context, dtype=torch.long, device=device)
        for i in range(3):
            train_step(dummy, dummy, i)
        if device.type == "cuda":  # its shapes are compiled too
            with autocast():
                evaluate(model, val_tokens, config, rank, world)
        model.load_state_dict(before)
        muon, adam = make_optimizers(model, config, rank, world, precision, product)
    sync()
    compile_seconds, compiled = time.perf_counter() - start, graphs()

    # The clock starts here.
    train_seconds, waited, step, val_loss = 0.0, 0.0, 0, math.nan
    start = time.perf_counter()
    loader = Loader(tokens, config, device)
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
            model.eval()
            with autocast():
                val_loss = evaluate(model, val_tokens, config, rank, world)
            model.train()
            log.say(f"step:{step}/{config.num_steps} val_loss:{val_loss:.4f} train_time:{1000 * train_seconds:.0f}ms "
                    f"step_avg:{1000 * train_seconds / max(1, step):.2f}ms")
            if last:
                break
            sync()
            start = time.perf_counter()
        asked = time.perf_counter()
        batch = loader()
        waited += time.perf_counter() - asked
        loss = train_step(*batch, step)
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
    seen = step * config.batch * config.context
    footer = {"script": HERE.name, "task": "gpt", "track": config.track, "seed": config.seed,
              "world_size": world, "hardware": hardware(device), "precision": precision, "steps": step,
              "parameters": sum(p.numel() for p in model.parameters()), "tokens": seen,
              "val_loss": round(val_loss, 5), "target": config.target, "reached": val_loss <= config.target,
              "train_seconds": round(train_seconds, 3), "compile_seconds": round(compile_seconds, 1),
              "recompiles": graphs() - compiled, "loader_share": round(waited / max(train_seconds, 1e-9), 4),
              "tokens_per_second": round(seen / max(train_seconds, 1e-9)),
              "mfu": round(flops_per_token(model, config) * seen / max(train_seconds, 1e-9) / peak / world, 4),
              "matmul_peak_tflops": round(peak / 1e12, 2), "peak_memory_mib": round(peak_memory_mib(device)),
              "kernels": kernels,
              "data_sha256": data_sha256, "eval_sha256": eval_sha256}
    if rank == 0:
        model.eval()
        if config.save:
            save_checkpoint(ROOT / "checkpoints" / f"{log.run_id}.safetensors", model, config)
        with torch.compiler.set_stance("force_eager"):  # every token is another shape
            footer.update(write_samples(model, config, meta, device, ROOT / "samples" / "gpt"))
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
