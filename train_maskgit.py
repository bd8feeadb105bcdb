"""MaskGIT: an encoder learns to fill in masked tokens, of pictures of one class or of text, and draws from nothing.

After MaskGIT (arXiv:2202.04200) and the course's nanoMaskGIT (EPFL COM-304), made fast: Muon, image tokens embedded and
predicted as two digits, QK-norm, ReLU^2, zero-initialised projections. Times against the baseline, record #1, are in
records/README.md.

    python train_maskgit.py                                     # cpu track, data from `python data/scenes.py --objects`
    python train_maskgit.py --data=text                         # bytes of text instead of pictures
"""
import copy
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
    data: str = "data/objects64/train"  # made by `python data/scenes.py --objects`; "text": data/shakespeare
    frozen: str = "data/frozen/objects64.npz"  # validation pictures
    frozen_masks: str = "data/frozen/eval_maskgit_64.npz"  # which of their tokens are masked
    # model
    dim: int = 128  # channels
    head_dim: int = 64
    depth: int = 2  # blocks
    mlp_ratio: int = 4
    # schedule
    num_steps: int = 600
    batch: int = 64  # rows a step, over all processes
    label_drop: float = 0.1  # share of rows without their label, for classifier-free guidance
    cooldown: float = 0.7  # share of the steps over which the learning rates fall to 0
    # optimizer
    muon_lr: float = 0.03  # hidden matrices
    momentum: float = 0.95
    adam_lr: float = 0.02  # embeddings and heads
    # evaluation and output
    target: float = 1.01  # validation loss in nats a masked token, record #1's
    eval_every: int = 200  # steps between evaluations; the clock stands still
    eval_batch: int = 250
    quality_pictures: int = 48  # the quality numbers are taken on as many, two of each class
    load: str = ""  # checkpoint to start from
    precision: str = "auto"  # of matrix products: auto (measured), fp32 or bf16
    save: bool = False  # write checkpoints/<run id>.safetensors at the end
    save_every: int = 0  # steps between states that --resume can go on from; 0: only at SIGTERM
    resume: str = ""  # state to go on from


CONFIGS = {
    "cpu": Config(),
    # the course's size on pictures of 256 tokens
    "gpu": Config(track="gpu", data="data/objects128/train", frozen="data/frozen/objects128.npz",
                  frozen_masks="data/frozen/eval_maskgit_128.npz", dim=512, depth=8, batch=256, num_steps=4000,
                  muon_lr=0.02, adam_lr=0.005, target=0.0, quality_pictures=480),
}
ARCHITECTURE = ("dim", "head_dim", "depth", "mlp_ratio")  # what a checkpoint must agree on


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

def read_rows(config):
    """Training tokens (N, L) int16, labels (N,), what meta.json says of both, and the sha256 of how they were made."""
    folder, make = ROOT / config.data, "python data/scenes.py --objects" + " --size=128" * (config.track == "gpu")
    if not (folder / "meta.json").exists():
        raise Fault(f"no training data in {folder}: make it with `{make}`")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        arrays = {m: np.load(folder / f"{m}.npy", allow_pickle=False) for m in ("rgb", "label")}
        for m, array in arrays.items():
            if array.dtype != np.uint16 or array.shape != (meta["num"], meta["modalities"][m]["length"]):
                raise ValueError(f"{m}.npy holds {array.dtype} {array.shape}")
            if int(array.max()) >= meta["modalities"][m]["vocab"]:
                raise ValueError(f"{m}.npy holds {array.max()} of a vocabulary of {meta['modalities'][m]['vocab']}")
        recipe = {key: meta[key] for key in ("name", "version", "size", "num", "seed", "tokenizer")}
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise Fault(f"{folder} is damaged ({error}): delete it and run `{make}`") from None
    tokens, labels = (torch.from_numpy(arrays[m].astype(np.int16)) for m in ("rgb", "label"))
    return tokens, labels[:, 0], meta["modalities"], hashlib.sha256(json.dumps(recipe).encode()).hexdigest()


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


def read_text(length=64, rows=2000):
    """The same for a text: a byte stream cut into rows without labels; and validation rows with seeded masks."""
    folder = ROOT / "data" / "shakespeare"
    if not (folder / "train.bin").exists():
        raise Fault(f"no data in {folder}: make it with `python data/{folder.name}.py`")
    try:
        train, val = (torch.from_numpy(read_bin(folder / f"{name}.bin").astype(np.int16)) for name in ("train", "val"))
    except (OSError, ValueError) as error:
        raise Fault(f"{folder} is damaged ({error}): delete it and run `python data/{folder.name}.py`") from None
    train, val = (part[:len(part) // length * length].view(-1, length) for part in (train, val))
    modalities = {"rgb": {"length": length, "vocab": 256}, "label": {"length": 1, "vocab": 1}}
    labels = lambda part: torch.zeros(len(part), dtype=torch.long)
    masked = draw_masks(len(val[:rows]), length, torch.Generator().manual_seed(0))
    frozen = val[:rows].long(), labels(val[:rows]), masked[torch.randperm(len(masked))]
    return (train, labels(train), modalities, "none"), (*frozen, modalities, "none")


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


def draw_masks(B, L, rng):
    """m ~ U{1..L} of L places masked at random in each of B rows: (B, L) bool. The rows' m are spread evenly over 1..L,
    which makes a batch's loss less of a gamble than independent draws do."""
    even = (torch.arange(B, device=rng.device) + torch.rand(1, generator=rng, device=rng.device)) / B
    count = 1 + (even * L).long().clamp(max=L - 1)[:, None]
    return torch.rand(B, L, generator=rng, device=rng.device).argsort(1).argsort(1) < count


# ------------------------------------------------------------------------------------------------------------
# Attention

# --- copied: attend ---
def attend(q, k, v, visible=None):
    """Softmax attention of q (B, H, M, D) over k, v (B, H, N, D); visible (B, N): keys that may be seen, None: all."""
    mask = None if visible is None else visible[:, None, None]
    if q.is_cuda or v.dtype == torch.float32:
        return F.scaled_dot_product_attention(q.type_as(v), k.type_as(v), v, attn_mask=mask)
    # written out: in bfloat16 on a CPU torch 2.13's fused kernel takes 3 to 6 times as long, in float32 0.8 times
    scores = (q * q.size(-1) ** -0.5) @ k.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -3e4)
    return scores.softmax(-1).type_as(v) @ v
# --- end: attend ---


# ------------------------------------------------------------------------------------------------------------
# Model

# --- copied: norm ---
def norm(x):
    return F.layer_norm(x, (x.size(-1),))  # one kernel on a CPU, rms_norm is many: in 4M 0.146 s a step, not 0.171


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
    """A token is a pair of digits (a, b): embedded as the sum of both and of the pair, predicted as p(a) p(b | a), so
    that codes which look alike share what is learned and no softmax has 4096 classes."""

    def __init__(self, config, modalities):
        super().__init__()
        C, self.vocab, self.length = config.dim, modalities["rgb"]["vocab"], modalities["rgb"]["length"]
        self.labels, self.digit = modalities["label"]["vocab"], math.isqrt(self.vocab)
        assert self.digit ** 2 == self.vocab
        self.embed_a, self.embed_b = nn.Embedding(self.digit, C), nn.Embedding(self.digit, C)
        self.embed_pair, self.embed_mask = nn.Embedding(self.vocab, C), nn.Embedding(1, C)
        self.embed_position = nn.Embedding(self.length, C)
        self.embed_label = nn.Embedding(self.labels + 1, C)  # the last one: no label
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_a, self.head_b = Linear(C, self.digit), Linear(C, self.digit)
        self.embed_first, self.mix = nn.Embedding(self.digit, C), Linear(C, C)  # p(b | a) is a small MLP of both

    def forward(self, tokens, labels, masked):
        """Final states (B, L, C) for tokens (B, L), those where masked (B, L) hidden, and labels (B,)."""
        pairs = (self.embed_b.weight[:, None] + self.embed_a.weight).flatten(0, 1)  # id = a + digit * b
        table = torch.cat([pairs + self.embed_pair.weight, self.embed_mask.weight])
        x = F.embedding(tokens.masked_fill(masked, self.vocab), table)
        x = norm(x + self.embed_position.weight + self.embed_label(labels)[:, None])
        for block in self.blocks:
            x = block(x)
        return norm(x)

    def second_digit(self, y, a):
        """Logits of b given states y (..., C) and first digits a (...)."""
        return self.head_b(F.relu(self.mix(y) + self.embed_first(a)).square())

    def nats(self, y, ids):
        """Cross-entropy (n,) of ids (n,) given states y (n, C)."""
        a, b = ids % self.digit, ids // self.digit
        first = F.cross_entropy(self.head_a(y).float(), a, reduction="none")
        return first + F.cross_entropy(self.second_digit(y, a).float(), b, reduction="none")

    def log_probabilities(self, y):
        """Of all tokens, (n, vocab), given states y (n, C)."""
        a, log = torch.arange(self.digit, device=y.device), lambda logits: F.log_softmax(logits.float(), -1)
        joint = [log(self.second_digit(rows[:, None], a)).transpose(1, 2) + log(self.head_a(rows))[:, None]
                 for rows in y.split(512)]  # (rows, b, a)
        return torch.cat(joint).flatten(1)


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
    """Cross-entropy (n,) in nats of the n tokens (B, L) that masked (B, L) marks, given all others and labels (B,)."""
    return model.nats(model(tokens, labels, masked)[masked], tokens[masked])


# ------------------------------------------------------------------------------------------------------------
# Sampling

SCHEDULES = {"constant": lambda t: 1 - t, "cosine": lambda t: math.cos(math.pi / 2 * t),
             "exponential": lambda t: 1 - math.expm1(3 * t) / math.expm1(3)}  # share still masked at progress t


def halton_order(side):
    """The cells of a grid (side * side,) in the order of the 2-D Halton sequence, which spreads them evenly
    (arXiv:2503.17076)."""
    def radical_inverse(i, base):
        value, scale = 0.0, 1.0
        while i:
            scale, (i, digit) = scale / base, divmod(i, base)
            value += digit * scale
        return value

    cells, i = {}, 1  # a dict keeps the first time of each
    while len(cells) < side * side:
        cells.setdefault(int(radical_inverse(i, 2) * side) * side + int(radical_inverse(i, 3) * side))
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
        cut = ranked.cumsum(-1) - ranked >= top_p  # the likeliest token always stays
        logits = logits.masked_fill(torch.zeros_like(cut).scatter(-1, order, cut), -math.inf)
    return logits
# --- end: sharpen ---


@torch.no_grad()
def generate(model, labels, tokens=None, masked=None, steps=12, schedule="cosine", order="halton", noise=4.5,
             temperature=1.0, top_k=0, top_p=1.0, guidance=1.0, seed=0, return_history=False):
    """Fill in tokens (B, L) where masked (B, L), everywhere if they are None, for labels (B,): new tokens (B, L).

    order: "confidence" keeps the likeliest draws, their log-probabilities blurred by Gumbel noise times `noise`, which
    falls to 0; "random" and "halton" fix the places beforehand. guidance: logits u + guidance * (c - u), u not knowing
    the label. return_history: also a list of (tokens, masked) after each. Fault for an order or schedule there is not.
    """
    if schedule not in SCHEDULES or order not in ("confidence", "random", "halton") or steps < 1:
        raise Fault(f"schedule {schedule!r}, order {order!r}, {steps} steps: schedules are {', '.join(SCHEDULES)}, "
                    "orders are confidence, random and halton, steps at least 1")
    B, L, device = len(labels), model.length, labels.device
    rng = torch.Generator(device).manual_seed(seed)
    uniform = lambda *shape: torch.rand(shape, generator=rng, device=device).clamp(1e-20, 1 - 1e-7)
    gumbel = lambda *shape: -(-uniform(*shape).log()).log()
    tokens = torch.zeros(B, L, dtype=torch.long, device=device) if tokens is None else tokens.clone()
    masked = torch.ones(B, L, dtype=torch.bool, device=device) if masked is None else masked.clone()
    total, history = masked.sum(1, keepdim=True), []
    rank = uniform(B, L).argsort(1).argsort(1).float()  # in which order places are due, unless confidence decides
    if order == "halton" and math.isqrt(L) ** 2 == L:
        rank = halton_order(math.isqrt(L)).argsort().to(device).float().expand(B, L)
    for step in range(steps):
        progress = (step + 1) / steps
        y = model(tokens, labels, masked)[masked]  # (n, C) of all masked places
        logits = model.log_probabilities(y)
        if guidance != 1:
            free = model.log_probabilities(model(tokens, torch.full_like(labels, model.labels), masked)[masked])
            logits = free + guidance * (logits - free)
        logits = sharpen(logits, temperature, top_k, top_p)
        ids = (logits + gumbel(*logits.shape)).argmax(-1)  # the Gumbel trick: a draw from the softmax
        tokens = tokens.masked_scatter(masked, ids)
        priority = rank
        if order == "confidence":
            sure = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0] + noise * (1 - progress) * gumbel(len(ids))
            priority = torch.zeros(B, L, device=device).masked_scatter(masked, -sure)
        left = (total * SCHEDULES[schedule](progress)).long().clamp(max=masked.sum(1, keepdim=True) - 1)
        left = left if step + 1 < steps else torch.zeros_like(left)
        due = priority.masked_fill(~masked, -math.inf)  # the last `left` of a row stay masked
        masked = due.argsort(1).argsort(1) >= L - left
        history.append((tokens.masked_fill(masked, 0), masked))
    return (tokens, history) if return_history else tokens


def write_samples(model, config, frozen, folder):
    """Draw samples/maskgit.png and maskgit_steps.gif, or write maskgit.txt: the quality numbers for the footer."""
    tokens, labels, masked = (part[:12] for part in frozen)
    if config.data == "text":
        made = generate(model, labels, steps=model.length, schedule="constant")
        filled = generate(model, labels, tokens, masked, steps=model.length, schedule="constant")
        text = lambda row: bytes(row.tolist()).decode("utf-8", "replace").replace("\n", "~")
        lines = [f"from nothing  {text(row)}" for row in made]
        for row, hidden, result in zip(tokens, masked, filled):
            shown = row.masked_fill(hidden, ord("_"))
            lines += ["", f"given         {text(shown)}", f"filled in     {text(result)}", f"true          {text(row)}"]
        (folder / "maskgit.txt").write_text("\n".join(lines) + "\n")
        print("\n".join(lines))
        return {}
    import classifier
    import draw
    import studio
    judge, pictures = classifier.load(tokens.device), studio.Studio(tokens.device).pictures
    classes = torch.arange(model.labels, device=tokens.device)
    sample = lambda labels, steps=16, **rest: generate(model, labels, steps=steps, guidance=2.0, **rest)
    numbers, grid, side = {}, classes.repeat_interleave(4), math.isqrt(model.length)
    rows = ["four draws of every class"]
    cells = [(picture, classifier.world.CLASSES[i // 4]) for i, picture in enumerate(pictures(sample(grid)))]
    rows += [cells[i:i + 8] for i in range(0, len(cells), 8)]
    rows.append("half of the tokens in  >  the whole picture out (four draws)")
    half = torch.rand(model.length, generator=torch.Generator().manual_seed(0)).argsort() < model.length // 2
    cover = F.interpolate(half.view(1, 1, side, side).float(), scale_factor=8)[0]
    hidden = half.to(tokens.device).expand(4, -1)
    for row, label, true in zip(tokens[:3], labels, pictures(tokens[:3])):
        made = pictures(generate(model, label.expand(4), row.expand(4, -1), hidden))
        rows.append([(true * (1 - cover) + 0.15 * cover, "given"), *((p, "filled in") for p in made), (true, "true")])
    draw.sheet(rows, folder / "maskgit.png")
    tokens, history = sample(classes, return_history=True)
    made, frames = pictures(tokens), []  # a token that is placed stays: of the final picture show what there is
    for _, hidden in history:
        cover = F.interpolate(hidden.view(-1, 1, side, side).float(), scale_factor=8).cpu()
        frames.append(made * (1 - cover) + 0.5 * cover)
    draw.animation(frames, folder / "maskgit_steps.gif")
    wanted = classes.repeat(config.quality_pictures // model.labels)
    for steps in (1, 4, 8, 16, 32, 64) if len(wanted) else ():
        made = F.avg_pool2d(pictures(sample(wanted, steps)), side // 8)  # the judge knows pictures of 64 pixels
        numbers[f"accuracy_{steps}_steps"] = round(judge.accuracy(made, wanted), 4)
        numbers[f"frechet_{steps}_steps"] = round(judge.frechet_distance(made, "decoded"), 3)
    return numbers


# ------------------------------------------------------------------------------------------------------------
# Evaluation

# --- frozen: eval ---
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
        if masked.shape != tokens.shape:
            raise ValueError(f"masks {tuple(masked.shape)} for tokens {tuple(tokens.shape)}")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise Fault(f"the frozen validation set is damaged ({error}): `git checkout data/frozen`") from None
    return tokens, labels[:, 0], masked, modalities, frozen_sha256(*paths)


@torch.no_grad()
def evaluate(model, tokens, labels, masked, config, rank, world):
    """Mean cross-entropy in nats over all masked tokens, each given its picture's other tokens and label alone.

    Ranks share the pictures; all get the result.
    """
    total = torch.zeros((), dtype=torch.float64, device=tokens.device)
    for i in range(rank * config.eval_batch, len(tokens), world * config.eval_batch):
        part = slice(i, i + config.eval_batch)
        total += masked_nats(model, tokens[part], labels[part], masked[part]).double().sum()
    if world > 1:
        dist.all_reduce(total)
    return total.item() / int(masked.sum())
# --- end: eval ---


# ------------------------------------------------------------------------------------------------------------
# Optimizers

# --- copied: muon ---
POLAR = ((8.1566, -22.4833, 15.8788), (4.0429, -2.8089, 0.5000), (3.8917, -2.7725, 0.5061), (3.2858, -2.3681, 0.4645),
         (2.3465, -1.7098, 0.4232))  # Polar Express (arXiv:2505.16932), five steps


def gram(X):
    """X X^T of a stack of matrices (K, rows, columns)."""
    return X @ X.mT


def orthogonalise(G, dtype=torch.bfloat16, gram=gram):
    """The nearest semi-orthogonal matrices of a stack (K, rows, columns), roughly; computed in dtype."""
    X = G.to(dtype)
    X = X.mT if G.size(1) > G.size(2) else X
    X = X / (1.02 * X.norm(dim=(1, 2), keepdim=True) + 1e-6)
    for a, b, c in POLAR:
        A = gram(X)
        X = a * X + (b * A + c * gram(A)) @ X  # A is symmetric: A A is A A^T
    return (X.mT if G.size(1) > G.size(2) else X).to(G.dtype)


class Muon:
    """Nesterov momentum, then an orthogonalised step, for matrices (kellerjordan.github.io/posts/muon).

    Matrices of one shape are a stack, divided among the ranks: each adds up the gradients of its own matrices, keeps
    their momentum and sends their update to all. Messages of one stack travel while another is computed.
    """

    def __init__(self, params, momentum, rank=0, world=1, dtype=torch.bfloat16, gram=gram):
        self.momentum, self.rank, self.world, self.dtype, self.gram = momentum, rank, world, dtype, gram
        by_shape = {}
        for p in params:
            by_shape.setdefault(p.shape, []).append(p)
        each = lambda ps: -(-len(ps) // world)  # matrices a rank, the last one's filled up with zeros
        self.stacks = [(ps, torch.zeros(each(ps), *shape, device=ps[0].device)) for shape, ps in by_shape.items()]

    def gather(self, mine, wait=True):
        """The parts of all ranks (k, rows, columns), one after another, and what to wait for before they are read."""
        if self.world == 1:
            return mine, None
        whole = mine.new_empty(self.world * len(mine), *mine.shape[1:])
        return whole, dist.all_gather_into_tensor(whole, mine.contiguous(), async_op=not wait)

    @torch.no_grad()
    def step(self, lr):
        """Move the parameters by their gradients, summed over the ranks; one without a gradient has a zero one."""
        sent = []
        for params, momentum in self.stacks:
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            grads += [torch.zeros_like(params[0])] * (self.world * len(momentum) - len(params))
            mine, job = torch.stack(grads), None
            if self.world > 1:
                grads, mine = mine, torch.empty_like(momentum)
                job = dist.reduce_scatter_tensor(mine, grads, async_op=True)
            sent.append((mine, job, grads))  # grads must live until they are sent
        updates = []
        for (_, momentum), (mine, job, _) in zip(self.stacks, sent):
            if job:
                job.wait()
            momentum.lerp_(mine, 1 - self.momentum)
            mine = orthogonalise(mine.lerp_(momentum, self.momentum), self.dtype, self.gram)
            updates.append((*self.gather(mine, wait=False), mine))  # so must mine
        for (params, _), (update, job, _) in zip(self.stacks, updates):
            if job:
                job.wait()
            rows, columns = params[0].shape
            torch._foreach_add_(params, list(update[:len(params)].unbind()), alpha=-lr * max(1, rows / columns) ** 0.5)

    def momenta(self):
        """The momentum of each stack, gathered: (matrices, rows, columns)."""
        return [self.gather(momentum)[0][:len(params)] for params, momentum in self.stacks]

    def load_momenta(self, momenta):
        for (params, mine), whole in zip(self.stacks, momenta):
            first, last = (min(r * len(mine), len(params)) for r in (self.rank, self.rank + 1))
            mine[:last - first] = whole[first:last].to(mine.device)
# --- end: muon ---


def make_optimizers(model, config, rank, world, precision):
    """Muon for the blocks' matrices, Adam for embeddings and heads; every parameter is in exactly one."""
    hidden, rest = [], []
    for name, p in model.named_parameters():
        (hidden if "blocks" in name or "mix" in name else rest).append(p)
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

def flops_per_row(model, config):
    """Matmul FLOPs of a training step for one row; backward is twice forward, half the places go to the heads."""
    L, C = model.length, config.dim
    block = 4 * C * C + 2 * config.mlp_ratio * C * C + 2 * L * C
    return 6 * L * (config.depth * block + (2 * model.digit + C) * C / 2)


def main(argv):
    config, overrides = read_config(argv)
    if config.resume and not config.num_steps:
        raise Fault("--resume goes on with a run: pass its --num_steps, or --load to evaluate a checkpoint")
    if config.num_steps < 0 or min(config.batch, config.eval_every, config.eval_batch) < 1:
        raise Fault("num_steps must be at least 0, batch, eval_every and eval_batch at least 1")
    if config.dim % config.head_dim:
        raise Fault(f"dim {config.dim} is not a multiple of head_dim {config.head_dim}")
    rank, world, device = setup()
    if config.batch % world:
        raise Fault(f"a batch of {config.batch} pictures cannot be divided among {world} processes")
    if config.data == "text":
        train, (*frozen, modalities, eval_sha256) = read_text()
    else:
        *frozen, modalities, eval_sha256 = read_frozen(config)
        train = read_rows(config) if config.num_steps else (None, None, modalities, "none")
    tokens, labels, found, data_sha256 = train
    if found != modalities:
        raise Fault(f"{ROOT / config.data} has another vocabulary or length than the frozen validation set")
    frozen = [part.to(device) for part in frozen]
    shape = config.batch // world * modalities["rgb"]["length"], config.dim, config.mlp_ratio * config.dim
    precision, peak = choose_precision(config.precision, device, world, *shape)
    torch.manual_seed(config.seed)
    model = MaskGIT(config, modalities).to(device)
    init_weights(model)
    if config.load:
        load_checkpoint(config.load, model, config)
    state, progress = read_state(config, data_sha256) if config.resume else (None, {})
    log = Log("maskgit", config, overrides, rank, device, precision)
    muon, adam = make_optimizers(model, config, rank, world, precision)
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    if device.type == "cuda":
        model.compile(fullgraph=True, dynamic=False)

    mine = slice(rank * config.batch // world, (rank + 1) * config.batch // world)

    def train_step(tokens, labels, rng, step):
        """One step on a global batch (batch, L): this rank's part of its loss."""
        tokens, labels = tokens.long(), labels.long()
        masked = draw_masks(*tokens.shape, rng)
        dropped = torch.rand(len(labels), generator=rng, device=device) < config.label_drop
        labels = labels.masked_fill(dropped, model.labels)
        with autocast():
            loss = masked_nats(model, tokens[mine], labels[mine], masked[mine]).sum() / masked.sum()
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
        dummy = torch.zeros(config.batch, model.length, dtype=torch.long, device=device)
        for i in range(5):
            train_step(dummy, dummy[:, 0], rng, i)
        if device.type == "cuda":  # its shapes are compiled too
            with autocast():
                evaluate(model, *frozen, config, rank, world)
        model.load_state_dict(before)
        muon, adam = make_optimizers(model, config, rank, world, precision)
    sync()
    compile_seconds, compiled = time.perf_counter() - start, graphs()

    # The clock starts here.
    train_seconds, waited, step = 0.0, 0.0, 0
    start = time.perf_counter()
    loader = Loader((tokens, labels), config.batch, config.seed, device) if config.num_steps else None
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
                val_loss = evaluate(model, *frozen, config, rank, world)
            log.say(f"step:{step}/{config.num_steps} val_loss:{val_loss:.4f} train_time:{1000 * train_seconds:.0f}ms "
                    f"step_avg:{1000 * train_seconds / max(1, step):.2f}ms")
            if last:
                break
            sync()
            start = time.perf_counter()
        asked = time.perf_counter()
        batch = loader()
        waited += time.perf_counter() - asked
        loss = train_step(*batch, loader.rng, step)
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
    seen = step * config.batch * model.length
    flops = step * config.batch * flops_per_row(model, config)
    footer = {"script": HERE.name, "task": "maskgit", "track": config.track, "seed": config.seed,
              "world_size": world, "hardware": hardware(device), "precision": precision, "steps": step,
              "parameters": sum(p.numel() for p in model.parameters()), "tokens": seen,
              "val_loss": round(val_loss, 5), "target": config.target, "reached": val_loss <= config.target,
              "train_seconds": round(train_seconds, 3), "compile_seconds": round(compile_seconds, 1),
              "recompiles": graphs() - compiled, "loader_share": round(waited / max(train_seconds, 1e-9), 4),
              "tokens_per_second": round(seen / max(train_seconds, 1e-9)),
              "mfu": round(flops / max(train_seconds, 1e-9) / peak / world, 4),
              "matmul_peak_tflops": round(peak / 1e12, 2), "peak_memory_mib": round(peak_memory_mib(device)),
              "data_sha256": data_sha256, "eval_sha256": eval_sha256}
    if rank == 0:
        if config.save:
            save_checkpoint(ROOT / "checkpoints" / f"{log.run_id}.safetensors", model, config)
        sys.path.insert(0, str(ROOT / "data"))  # turns tokens into pictures, not needed while training
        with autocast(), torch.compiler.set_stance("force_eager"):  # samples come in other shapes
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
        main(sys.argv[1:])
    except Fault as fault:
        sys.exit(f"{HERE.name}: {fault}")
    except RuntimeError as error:  # NCCL and gloo have no kind of their own for a process that is gone
        if not re.search(r"gloo|NCCL|[Cc]onnection (closed|reset)", str(error)):
            raise
        print(f"{HERE.name}: another process of this run has ended, see its message ({str(error).splitlines()[0]}); "
              "--resume goes on from a saved state", file=sys.stderr, flush=True)
        os._exit(1)  # the usual way out waits for the other process
# --- end: start ---
