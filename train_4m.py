"""nano4M: one encoder-decoder learns to predict any subset of eight modalities from any other.

After 4M (arXiv:2312.06647) and the course's nano4M (EPFL COM-304), made fast: Muon, one input budget a step instead of
padding, image tokens embedded and predicted as two digits, QK-norm, ReLU^2, zero-initialised projections. Times against
the baseline, record #1, are in records/README.md.

    python train_4m.py                                          # the cpu track, data from `python data/scenes.py`
    torchrun --standalone --nproc_per_node=8 train_4m.py        # the gpu track (not yet run on a GPU)
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------------
# Config

@dataclass
class Config:
    # data
    track: str = "cpu"
    seed: int = 0
    data: str = "data/scenes64/train"  # aligned shards, made by data/scenes.py
    frozen: str = "data/frozen/scenes64.npz"  # validation scenes
    frozen_masks: str = "data/frozen/eval_4m_64.npz"  # their inputs and targets
    # model
    dim: int = 192  # channels
    head_dim: int = 64
    enc_depth: int = 3  # blocks
    dec_depth: int = 3
    mlp_ratio: int = 4
    # schedule
    num_steps: int = 450
    batch: int = 32  # scenes a step, over all processes
    budget: int = 128  # most input tokens of a scene
    image_targets: int = 60  # target tokens of a scene
    text_targets: int = 24
    cooldown: float = 0.7  # share of the steps over which the learning rates fall to 0
    shard: bool = False  # divide the blocks among the processes by FSDP2: for what one GPU cannot hold
    # optimizer
    muon_lr: float = 0.03  # hidden matrices
    momentum: float = 0.95
    adam_lr: float = 0.01  # embeddings and heads
    # evaluation and output
    target: float = 1.49  # validation loss in nats, record #1's
    eval_every: int = 50  # steps between evaluations; the clock stands still
    eval_batch: int = 125
    quality_scenes: int = 200  # frozen scenes the quality numbers are taken on
    load: str = ""  # checkpoint to start from
    precision: str = "auto"  # of matrix products: auto (measured), fp32 or bf16
    save: bool = False  # write checkpoints/<run id>.safetensors at the end
    save_every: int = 0  # steps between states that --resume can go on from; 0: only at SIGTERM
    resume: str = ""  # state to go on from


CONFIGS = {
    "cpu": Config(),
    # the course's size: dim 512, 6 + 6 blocks, global batch 512, 256-token images
    "gpu": Config(track="gpu", data="data/scenes128/train", frozen="data/frozen/scenes128.npz",
                  frozen_masks="data/frozen/eval_4m_128.npz", dim=512, enc_depth=6, dec_depth=6, batch=512,
                  num_steps=1500, eval_every=250, target=0.0),
}
# 4M's L and XL, for which a model's weights, gradients and momentum are divided among the GPUs
for name, dim in ("gpu-l", 1024), ("gpu-xl", 2048):
    CONFIGS[name] = dataclasses.replace(CONFIGS["gpu"], track=name, dim=dim, enc_depth=24, dec_depth=24, shard=True)
ARCHITECTURE = ("dim", "head_dim", "enc_depth", "dec_depth", "mlp_ratio")  # what a checkpoint must agree on


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

IMAGES, TEXTS = ("rgb", "depth", "normal", "seg", "edge"), ("desc", "caption", "bbox")
MODALITIES = IMAGES + TEXTS


class Layout:
    """All of a scene's tokens side by side in one row of `size` places, a span per modality.

    kind (size,): modality of a place; offset (size,): its place inside the modality; end: id that ends a text.
    """

    def __init__(self, modalities, device="cpu"):
        self.modalities = {m: modalities[m] for m in MODALITIES}
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
        self.end = {"desc": modalities["desc"]["vocab"] - 2, "caption": modalities["caption"]["vocab"] - 2, "bbox": 1}

    def valid(self, tokens):
        """True where a row holds a token and not padding: (B, size)."""
        return tokens != self.pads[self.kind]


def read_shards(folder, modalities):
    """The training tokens, a memory map (scenes, length) a modality, and the sha256 of how they were made."""
    folder, size = ROOT / folder, int(math.sqrt(modalities["rgb"]["length"])) * 8
    make = "python data/scenes.py" + ("" if size == 64 else f" --size={size} --num=200000")
    if not (folder / "meta.json").exists():
        raise Fault(f"no training data in {folder}: make it with `{make}`")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta["modalities"] != modalities:
            raise Fault(f"{folder} has another vocabulary or length than the frozen validation set: "
                        f"delete it and run `{make}`")
        arrays = [np.load(folder / f"{m}.npy", mmap_mode="r", allow_pickle=False) for m in MODALITIES]
        for m, array in zip(MODALITIES, arrays):
            if array.dtype != np.uint16 or array.shape != (meta["num"], modalities[m]["length"]):
                raise ValueError(f"{m}.npy holds {array.dtype} {array.shape}")
            if int(array.max()) >= modalities[m]["vocab"]:
                raise ValueError(f"{m}.npy holds token {array.max()} of a vocabulary of {modalities[m]['vocab']}")
        recipe = {key: meta[key] for key in ("name", "version", "size", "num", "seed", "tokenizer", "text")}
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise Fault(f"{folder} is damaged ({error}): delete it and run `{make}`") from None
    return arrays, hashlib.sha256(json.dumps(recipe).encode()).hexdigest()  # not of the tokens: rounding differs


class Loader:
    """Endless shuffled batches of rows (batch, size), the same on every rank, all data on the device."""

    def __init__(self, arrays, batch, seed, device):
        self.rows = torch.from_numpy(np.concatenate(arrays, 1).astype(np.int16)).to(device)
        if batch > len(self.rows):
            raise Fault(f"a batch of {batch} scenes is more than the {len(self.rows)} there are")
        self.batch, self.rng = batch, torch.Generator(device).manual_seed(seed)
        self.order, self.next = torch.empty(0, dtype=torch.long, device=device), 0

    def __call__(self):
        if self.next + self.batch > len(self.order):
            self.order, self.next = torch.randperm(len(self.rows), generator=self.rng, device=self.rows.device), 0
        self.next += self.batch
        return self.rows[self.order[self.next - self.batch:self.next]].long()


def draw_places(tokens, layout, inputs, images, texts, rng):
    """Draw inputs and targets for every scene: places (B, inputs), places (B, images + texts), where a target counts.

    4M's masking with one budget for all scenes, so nothing is padded: a Dirichlet(1) draw splits the inputs over the
    modalities, places inside a modality are uniform without replacement, and where a modality has fewer tokens than its
    part any others step in. Targets, image tokens first, are drawn from the rest, every modality as likely; where too
    few are left, one is padding and does not count.
    """
    B, K, device = tokens.shape[0], len(MODALITIES), tokens.device
    valid = layout.valid(tokens)
    uniform = lambda *shape: torch.rand(shape, generator=rng, device=device).clamp(1e-12, 1 - 1e-7)
    available = torch.zeros(B, K, device=device).index_add_(1, layout.kind, valid.float())
    share = -uniform(B, K).log()  # normalised: Dirichlet(1)
    edges = (share.cumsum(1) / share.sum(1, keepdim=True) * inputs).round()
    count = edges.diff(dim=1, prepend=torch.zeros(B, 1, device=device))
    # a random rank of every token among the valid ones of its modality; those below the modality's count come first
    score = uniform(B, layout.size) + 2.0 * ~valid + 4.0 * layout.kind
    rank = score.argsort(1).argsort(1) - layout.start[layout.kind]
    later = (rank >= count[:, layout.kind]) + 2.0 * ~valid
    chosen = (later + uniform(B, layout.size)).topk(inputs, 1, largest=False).indices
    # an exponential race: the smallest of Exp(1) / weight are a draw by weight without replacement
    left = available.scatter_add(1, layout.kind[chosen], -torch.ones(chosen.shape, device=device))
    race = -uniform(B, layout.size).log() * left[:, layout.kind]
    race = race.masked_fill(~valid, math.inf).scatter(1, chosen, math.inf)
    split = layout.span["desc"].start
    image, text = race[:, :split].topk(images, 1, largest=False), race[:, split:].topk(texts, 1, largest=False)
    counted = torch.cat([image.values, text.values], 1) < math.inf
    return chosen, torch.cat([image.indices, text.indices + split], 1), counted


def gather_places(chosen, width):
    """The places where chosen (B, size) is True, padded to width: places (B, width) and which of them count."""
    order = chosen.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]
    return order, chosen.gather(1, order)


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

    def forward(self, x, context, seen):
        heads = lambda y: y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
        q, k, v = norm(heads(self.q(x))), norm(heads(self.k(context))), heads(self.v(context))
        return self.proj(attend(q, k, v, seen).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm block: attention to a context, the tokens themselves if there is none, then a ReLU^2 MLP."""

    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config.dim, config.head_dim)
        self.up = Linear(config.dim, config.mlp_ratio * config.dim)
        self.down = Linear(config.mlp_ratio * config.dim, config.dim)

    def forward(self, x, seen, context=None):
        h = norm(x)
        x = x + self.attention(h, h if context is None else context, seen)
        return x + self.down(F.relu(self.up(norm(x))).square())


class Nano4M(nn.Module):
    """Encoder-decoder over places. Targets see the inputs alone: the decoder has no self-attention.

    An image token is a pair of digits (a, b), two levels of FSQ each: embedded as the sum of both and of the pair,
    predicted as p(a) p(b | a), so that codes which look alike share what is learned and no softmax has 4096 classes.
    """

    def __init__(self, config, layout):
        super().__init__()
        C, side = config.dim, layout.modalities["rgb"]["length"]
        self.kind, self.vocab, self.split = layout.kind, layout.vocab, layout.span["desc"].start
        self.digit, self.letters = math.isqrt(layout.vocab), layout.modalities["desc"]["vocab"]
        assert self.digit ** 2 == layout.vocab
        words, boxes = self.letters + layout.modalities["bbox"]["vocab"], MODALITIES.index("bbox")
        # one position table: the grid that all pictures share, then every place of the texts
        texts = torch.arange(layout.size - self.split, device=layout.kind.device)
        self.position = torch.cat([layout.offset[:self.split], side + texts])
        # one token table: image tokens, words of desc and caption, bbox tokens
        self.shift = (layout.kind >= len(IMAGES)) * layout.vocab + (layout.kind == boxes) * self.letters
        self.embed_a, self.embed_b = nn.Embedding(self.digit, C), nn.Embedding(self.digit, C)
        self.embed_pair, self.embed_word = nn.Embedding(layout.vocab, C), nn.Embedding(words, C)
        self.embed_position = nn.Embedding(side + len(texts), C)
        self.embed_enc_kind, self.embed_dec_kind = nn.Embedding(len(MODALITIES), C), nn.Embedding(len(MODALITIES), C)
        self.encoder = nn.ModuleList(Block(config) for _ in range(config.enc_depth))
        self.decoder = nn.ModuleList(Block(config) for _ in range(config.dec_depth))
        self.head_a, self.head_b, self.head_word = Linear(C, self.digit), Linear(C, self.digit), Linear(C, words)
        self.embed_first, self.mix = nn.Embedding(self.digit, C), Linear(C, C)  # p(b | a) is a small MLP of both

    def hidden(self, tokens, inputs, seen, targets):
        """Final states (B, M, C) at the places targets (B, M), from the tokens (B, size) at the places inputs (B, N).

        seen (B, N) is False on padding; None where there is none.
        """
        pairs = (self.embed_b.weight[:, None] + self.embed_a.weight).flatten(0, 1)  # id = a + digit * b
        table = torch.cat([pairs + self.embed_pair.weight, self.embed_word.weight])
        x = F.embedding(tokens.gather(1, inputs) + self.shift[inputs], table) + self.embed_enc_kind(self.kind[inputs])
        x = norm(x + self.embed_position(self.position[inputs]))  # (B, N, C)
        for block in self.encoder:
            x = block(x, seen)
        x = norm(x)
        y = norm(self.embed_dec_kind(self.kind[targets]) + self.embed_position(self.position[targets]))  # (B, M, C)
        for block in self.decoder:
            y = block(y, seen, x)
        return norm(y)

    def second_digit(self, y, a):
        """Logits of b given states y (..., C) and first digits a (...)."""
        return self.head_b(F.relu(self.mix(y) + self.embed_first(a)).square())

    def picture_nats(self, y, ids):
        """Cross-entropy (N,) of image tokens ids (N,) given states y (N, C)."""
        a, b = ids % self.digit, ids // self.digit
        first = F.cross_entropy(self.head_a(y).float(), a, reduction="none")
        return first + F.cross_entropy(self.second_digit(y, a).float(), b, reduction="none")

    def word_nats(self, y, places, ids):
        """Cross-entropy (N,) of text and bbox tokens ids (N,), each among those of its kind, given states y (N, C)."""
        box, column = self.shift[places] > self.vocab, torch.arange(self.head_word.out_features, device=y.device)
        logits = self.head_word(y).float().masked_fill((column < self.letters) == box[:, None], -math.inf)
        return F.cross_entropy(logits, ids + self.shift[places] - self.vocab, reduction="none")

    def forward(self, tokens, inputs, seen, targets):
        """Log-probabilities (B, M, vocab) of all tokens at the places targets (B, M), for sampling."""
        y, image = self.hidden(tokens, inputs, seen, targets), targets < self.split
        out = torch.full((*targets.shape, self.vocab), -math.inf, device=y.device)
        a = torch.arange(self.digit, device=y.device)
        log = lambda logits: F.log_softmax(logits.float(), -1)
        if bool(image.any()):
            joint = [log(self.second_digit(rows[:, None], a)).transpose(1, 2) + log(self.head_a(rows))[:, None]
                     for rows in y[image].split(512)]  # (rows, b, a)
            out[image] = torch.cat(joint).flatten(1)
        if not bool(image.all()):
            words, box = self.head_word(y[~image]), self.shift[targets[~image]] > self.vocab
            rows = torch.full((len(words), self.vocab), -math.inf, device=y.device)
            rows[~box, :self.letters] = log(words[~box][:, :self.letters])
            rows[box, :words.shape[1] - self.letters] = log(words[box][:, self.letters:])
            out[~image] = rows
        return out


def init_weights(model):
    for name, p in model.named_parameters():
        if "proj" in name or "down" in name or "head" in name:
            nn.init.zeros_(p)
        elif "embed" in name:
            nn.init.normal_(p, std=0.02)
        elif "encoder" in name or "decoder" in name or "mix" in name:
            nn.init.normal_(p, std=p.shape[1] ** -0.5)
        else:
            raise AssertionError(f"no initialisation for {name}")


# ------------------------------------------------------------------------------------------------------------
# Loss

def masked_loss(model, tokens, inputs, targets, counted, share, images):
    """Sum over these scenes of share * cross-entropy at the targets (B, M), in nats.

    The first `images` targets of a scene are image tokens. share (modalities,): what a target counts, so that over all
    ranks the sum is the mean over modalities of the modality's mean; counted (B, M) is False on padding.
    """
    y, ids = model.hidden(tokens, inputs, None, targets), tokens.gather(1, targets)
    weight = share[model.kind[targets]] * counted
    picture, word = slice(images), slice(images, None)
    flat = lambda x, part: x[:, part].flatten(0, 1)
    loss = model.picture_nats(flat(y, picture), flat(ids, picture)) @ flat(weight, picture)
    return loss + model.word_nats(flat(y, word), flat(targets, word), flat(ids, word)) @ flat(weight, word)


def target_shares(targets, counted, layout):
    """What one target of each modality counts: 1 / (its number of targets * the modalities that have any), (K,)."""
    count = torch.zeros(len(MODALITIES), device=targets.device)
    count.index_add_(0, layout.kind[targets].flatten(), counted.flatten().float())
    return (count > 0) / (count.clamp(min=1) * (count > 0).sum())


# ------------------------------------------------------------------------------------------------------------
# Sampling

@dataclass
class Output:
    """One modality to generate and how: scheme roar (random order), maskgit (most confident first) or ar (in order)."""
    modality: str
    scheme: str = ""  # "": maskgit for images, ar for texts
    steps: int = 8  # ar takes one step a token
    temperature: float = 1.0  # 0: always the likeliest token
    anneal: str = "constant"  # or linear: the temperature falls to 0 at the last step
    unmasking: str = "cosine"  # or linear: how many tokens are placed when
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    guidance: float = 1.0  # classifier-free: logits u + guidance * (c - u), u seeing only this modality's own tokens


def predict(model, tokens, known, targets):
    """Logits (B, M, vocab) at the places targets (B, M), given the known (B, size) tokens; float32."""
    inputs, seen = gather_places(known, int(known.sum(1).max()))
    return model(tokens, inputs, seen, targets).float()


def log_likelihood(model, tokens, known, targets):
    """Log-probabilities (B, M) of the tokens at the places targets (B, M), given the known (B, size) tokens alone."""
    inputs, seen = gather_places(known, int(known.sum(1).max()))
    y, ids, image = model.hidden(tokens, inputs, seen, targets), tokens.gather(1, targets), targets < model.split
    result = torch.empty(targets.shape, device=y.device)
    result[image] = -model.picture_nats(y[image], ids[image])
    result[~image] = -model.word_nats(y[~image], targets[~image], ids[~image])
    return result


def draw_tokens(logits, output, temperature, rng):
    """Sample ids (B, M) from logits (B, M, V); with them the log-probability of each."""
    if output.top_k:
        logits = logits.masked_fill(logits < logits.topk(min(output.top_k, logits.shape[-1]))[0][..., -1:], -math.inf)
    if output.top_p < 1:
        ranked, order = logits.softmax(-1).sort(-1, descending=True)
        cut = ranked.cumsum(-1) - ranked >= output.top_p  # the likeliest token always stays
        logits = logits.masked_fill(torch.zeros_like(cut).scatter(-1, order, cut), -math.inf)
    scores = logits
    if temperature > 0:  # the Gumbel trick: argmax(logits / T + Gumbel noise) is a draw from the softmax
        noise = torch.rand(logits.shape, generator=rng, device=logits.device).clamp(1e-20, 1 - 1e-7)
        scores = logits / temperature - (-noise.log()).log()
    ids = scores.argmax(-1)
    return ids, logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]


@torch.no_grad()
def generate(model, layout, tokens, known, outputs, seed=0):
    """Fill the modalities of outputs one after another; each result is an input of the next.

    tokens int64 (B, size), known bool (B, size): what is given. A given part of an output modality stays as it is.
    Returns new tokens and known. Raises Fault for a modality or scheme there is not, or when a row has nothing known.
    """
    tokens, known, given = tokens.clone(), known.clone(), known
    if not bool(known.any(1).all()):
        raise Fault("generate needs at least one known token in every row")
    rng = torch.Generator(tokens.device).manual_seed(seed)
    for output in outputs:
        if output.modality not in layout.span:
            raise Fault(f"there is no modality {output.modality!r}; there are {', '.join(layout.span)}")
        scheme = output.scheme or ("maskgit" if output.modality in IMAGES else "ar")
        if scheme not in ("roar", "maskgit", "ar") or output.steps < 1:
            raise Fault(f"scheme {scheme!r}, {output.steps} steps: schemes are roar, maskgit and ar, steps at least 1")
        span, own = layout.span[output.modality], torch.zeros_like(known)
        own[:, span] = True
        open_places = own & ~known  # (B, size)
        counts = open_places.sum(1)
        if not bool((counts == counts[0]).all()):
            raise Fault("every row must leave the same number of tokens of a modality open")
        total = int(counts[0])
        steps = total if scheme == "ar" else min(output.steps, total)
        priority = torch.arange(layout.size, device=tokens.device).expand_as(tokens).float()
        if scheme == "roar":
            priority = torch.rand(tokens.shape, generator=rng, device=tokens.device)
        running = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)  # no end token yet
        left = total
        for step in range(steps):
            progress = (step + 1) / steps
            goal = math.cos(math.pi / 2 * progress) if output.unmasking == "cosine" else 1 - progress
            place_now = 1 if scheme == "ar" else max(1, left - int(total * goal + 1e-9)) if step + 1 < steps else left
            order = priority.masked_fill(~open_places, math.inf).argsort(1)
            places = order[:, :left if scheme == "maskgit" else place_now]
            logits = predict(model, tokens, known, places)
            if output.guidance != 1 and bool((known & own).any(1).all()):
                base = predict(model, tokens, known & own, places)
                logits = base + output.guidance * (logits - base)
            logits[..., layout.modalities[output.modality]["vocab"]:] = -math.inf
            if output.modality in layout.end:  # padding is never drawn
                logits[..., layout.modalities[output.modality]["pad"]] = -math.inf
            temperature = output.temperature * (1 - progress if output.anneal == "linear" else 1)
            ids, confidence = draw_tokens(logits, output, temperature, rng)
            if scheme == "maskgit" and place_now < left:
                best = confidence.topk(place_now, 1).indices
                places, ids = places.gather(1, best), ids.gather(1, best)
            tokens.scatter_(1, places, ids)
            known.scatter_(1, places, running[:, None].expand_as(places) if scheme == "ar" else True)
            open_places.scatter_(1, places, False)
            left -= place_now
            if scheme == "ar" and output.modality in layout.end:
                running &= ids[:, 0] != layout.end[output.modality]
                if not bool(running.any()):
                    break
        if output.modality in layout.end:  # whatever follows the end token is padding
            part = tokens[:, span]
            ended = (part == layout.end[output.modality]).cumsum(1) - (part == layout.end[output.modality]).long() > 0
            ended = (ended | ~known[:, span]) & ~given[:, span]
            tokens[:, span] = part.masked_fill(ended, int(layout.pads[MODALITIES.index(output.modality)]))
            known[:, span] = ~ended
    return tokens, known


def only(layout, tokens, *names):
    """The mask (B, size) that knows exactly these modalities."""
    known = torch.zeros_like(tokens, dtype=torch.bool)
    for name in names:
        known[:, layout.span[name]] = layout.valid(tokens)[:, layout.span[name]]
    return known


def quality(model, layout, studio, metrics, tokens, size):
    """Numbers a reader can picture, on validation scenes tokens (B, size) against their true renderings."""
    true, part = studio.truth(size, len(tokens)), lambda out, m: out[0][:, layout.span[m]]
    make = lambda source, output: part(generate(model, layout, tokens, only(layout, tokens, source), [output]),
                                       output.modality)
    sharp = dict(steps=8, temperature=0.3)
    depth, normal = (studio.pictures(make("rgb", Output(m, **sharp))) for m in ("depth", "normal"))
    desc = studio.texts(make("rgb", Output("desc", temperature=0)))
    rgb = studio.pictures(make("desc", Output("rgb", "roar", steps=16, temperature=0.5)))
    return {"rgb_to_depth_l1": metrics.standardised_l1(depth, true["depth"]),
            "rgb_to_normal_degrees": metrics.mean_angle(normal, true["normal"]),
            "rgb_to_desc_f1": metrics.attribute_f1(desc, studio.texts(part((tokens,), "desc"))),
            "desc_to_rgb_l1": (rgb - true["rgb"]).abs().mean().item()}


def draw_samples(model, layout, studio, draw, tokens, size, path):
    """The labelled grid: what the model makes of validation scenes (tokens: 8 rows or more), the truth beside it."""
    true = studio.truth(size, len(tokens))
    pictures = lambda out, *names: {m: studio.pictures(out[:, layout.span[m]]) for m in names}
    texts = lambda out, m: studio.texts(out[:, layout.span[m]])

    rows, first = ["rgb in  >  depth, normal, seg, edge, desc out (chained)"], tokens[:4]
    chain = [Output(m, temperature=0.4) for m in IMAGES[1:]] + [Output("desc", temperature=0)]
    out, _ = generate(model, layout, first, only(layout, first, "rgb"), chain)
    made = pictures(out, *IMAGES[1:])
    for b, (said, meant) in enumerate(zip(texts(out, "desc"), texts(first, "desc"))):
        rows.append([(true["rgb"][b], "input"), *((made[m][b], m) for m in made), said])
        rows.append([None, *((true[m][b], f"true {m}") for m in made), "TRUE: " + meant])

    rows.append("desc in  >  rgb, depth, normal out (chained)")
    some = tokens[4:7]
    chain = [Output("rgb", "roar", steps=24, temperature=0.7, guidance=2.0), Output("depth", temperature=0.4),
             Output("normal", temperature=0.4)]
    out, _ = generate(model, layout, some, only(layout, some, "desc"), chain)
    made = pictures(out, "rgb", "depth", "normal")
    for b, text in enumerate(texts(some, "desc")):
        rows.append([*((made[m][b], m) for m in made), *((true[m][4 + b], f"true {m}") for m in made), text])

    rows.append("caption in  >  rgb out (four draws)")
    for b in (7, 1):
        same = tokens[b:b + 1].expand(4, -1)
        out, _ = generate(model, layout, same, only(layout, same, "caption"), chain[:1])
        draws = [(p, "rgb") for p in pictures(out, "rgb")["rgb"]]
        rows.append([*draws, (true["rgb"][b], "true rgb"), None, texts(same[:1], "caption")[0]])

    rows.append("half of rgb in  >  the whole rgb out (four draws)")
    span, side = layout.span["rgb"], size // 8
    rng = torch.Generator(tokens.device).manual_seed(0)
    hidden = torch.rand(side * side, generator=rng, device=tokens.device).argsort() < side * side // 2
    cover = F.interpolate(hidden.view(1, 1, side, side).float(), scale_factor=8)[0].cpu()
    for b in (2, 5):
        same = tokens[b:b + 1].expand(4, -1)
        known = only(layout, same, "rgb")
        known[:, span] &= ~hidden
        out, _ = generate(model, layout, same, known, [Output("rgb", steps=12, temperature=0.6)])
        draws = [(p, "rgb") for p in pictures(out, "rgb")["rgb"]]
        rows.append([(true["rgb"][b] * (1 - cover) + 0.15 * cover, "input"), *draws, (true["rgb"][b], "true rgb")])
    draw.sheet(rows, path)


# ------------------------------------------------------------------------------------------------------------
# Evaluation

# --- frozen: eval ---
def read_frozen(config):
    """The validation tokens (scenes, size), their input and target masks, the modalities, and the sha256 of it all."""
    paths = [ROOT / config.frozen, ROOT / config.frozen_masks]
    for name in (config.frozen, config.frozen_masks):
        if not (ROOT / name).exists():
            raise Fault(f"{ROOT / name} is missing: it belongs to the repository (`git checkout {name}`)")
    try:
        with np.load(paths[0], allow_pickle=False) as arrays:
            modalities = json.loads(bytes(arrays["modalities"]))
            tokens = np.concatenate([arrays[m] for m in MODALITIES], 1).astype(np.int64)
        with np.load(paths[1], allow_pickle=False) as arrays:
            roles = arrays["roles"]  # (scenes, size) uint8: 1 input, 2 target
        if roles.shape != tokens.shape:
            raise ValueError(f"masks {roles.shape} for tokens {tokens.shape}")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise Fault(f"the frozen validation set is damaged ({error}): `git checkout data/frozen`") from None
    return torch.from_numpy(tokens), torch.from_numpy(roles), modalities, frozen_sha256(*paths)


@torch.no_grad()
def evaluate(model, layout, tokens, roles, config, rank, world):
    """Mean over modalities of the mean cross-entropy in nats at the frozen targets, each predicted from the frozen
    inputs alone; and the mean of each modality. Ranks share the scenes; all get the result."""
    total = torch.zeros(2, len(MODALITIES), dtype=torch.float64, device=tokens.device)
    for i in range(rank * config.eval_batch, len(tokens), world * config.eval_batch):
        part, role = tokens[i:i + config.eval_batch], roles[i:i + config.eval_batch]
        places, counted = gather_places(role == 2, int((role == 2).sum(1).max()))
        nats = -log_likelihood(model, part, role == 1, places)
        kinds = layout.kind[places][counted]
        total[0].index_add_(0, kinds, nats[counted].double())
        total[1].index_add_(0, kinds, torch.ones_like(kinds, dtype=torch.float64))
    if world > 1:
        dist.all_reduce(total)
    means = (total[0] / total[1]).tolist()
    return sum(means) / len(means), dict(zip(MODALITIES, means))
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


def shard_blocks(model, world, device, precision):
    """Divide the weights of all blocks by rows among the ranks with FSDP2, which gathers a block while it is computed.
    Embeddings and heads stay whole: they are a few percent. Gradients are summed, not averaged."""
    outside = {p for name, p in model.named_parameters() if not name.startswith(("encoder", "decoder", "mix"))}
    weights = PRECISIONS[precision] if device.type == "cuda" else None  # what is gathered; autocast rounds them too
    policy = MixedPrecisionPolicy(weights, torch.float32, cast_forward_inputs=False)
    wrap = dict(mesh=init_device_mesh(device.type, (world,)), mp_policy=policy)
    for part in (*model.encoder, *model.decoder, model.mix):
        if device.type == "cuda" and part is not model.mix:
            part.compile(fullgraph=True, dynamic=False)
        fully_shard(part, **wrap)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo can do nothing else
    fully_shard(model, ignored_params=outside, **wrap)
    register_fsdp_forward_method(model, "hidden")


class ShardedMuon(Muon):
    """Muon for matrices that FSDP2 divides: each rank orthogonalises whole matrices, its share of every stack."""

    @torch.no_grad()
    def step(self, lr):
        for params, momentum in self.stacks:
            mine, first = torch.zeros_like(momentum), self.rank * len(momentum)
            for i, p in enumerate(params):
                grad = p.grad.full_tensor()
                if first <= i < first + len(mine):
                    mine[i - first] = grad
            momentum.lerp_(mine, 1 - self.momentum)
            update, _ = self.gather(orthogonalise(mine.lerp_(momentum, self.momentum), self.dtype, self.gram))
            rows, columns = params[0].shape
            start = min(self.rank * -(-rows // self.world), rows)  # of this rank's rows
            for p, whole in zip(params, update):
                local = p.to_local()
                local.add_(whole[start:start + len(local)], alpha=-lr * max(1, rows / columns) ** 0.5)


def make_optimizers(model, config, rank, world, precision):
    """Muon for hidden matrices, Adam for embeddings and heads; every parameter is in exactly one."""
    hidden, rest = [], []
    for name, p in model.named_parameters():
        (rest if "embed" in name or "head" in name else hidden).append(p)
    return ((ShardedMuon if config.shard else Muon)(hidden, config.momentum, rank, world, PRECISIONS[precision]),
            torch.optim.Adam(rest, lr=config.adam_lr, betas=(0.9, 0.95), fused=True))


# --- copied: schedule ---
def schedule(step, config):
    """Share of the peak learning rates: 1, then linearly down to 0."""
    return min(1.0, (1 - step / config.num_steps) / config.cooldown)
# --- end: schedule ---


def input_budget(step, config):
    """Input tokens of a scene at this step: 8, 24, .. or 120 of 128, in the golden-ratio order, which is even at every
    length. Eight lengths stand for U{1..budget}, because a CPU builds kernels for each.
    """
    return config.budget * (2 * int((step * 0.618034 + 0.5) % 1 * 8) + 1) // 16


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

def flops_per_scene(model, config, inputs, targets):
    """Matmul FLOPs of a training step for one scene with so many input and target tokens; backward is twice forward."""
    C, mlp = config.dim, 2 * config.mlp_ratio * config.dim ** 2
    encoder = config.enc_depth * inputs * (4 * C * C + mlp + 2 * inputs * C)
    decoder = config.dec_depth * (targets * (2 * C * C + mlp + 2 * inputs * C) + inputs * 2 * C * C)
    heads = config.image_targets * (2 * model.digit + C) * C + config.text_targets * model.head_word.out_features * C
    return 6 * (encoder + decoder + heads)


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
        raise Fault(f"a batch of {config.batch} scenes cannot be divided among {world} processes")
    if config.shard and world == 1:
        raise Fault("--shard=true divides the model among processes: start several with torchrun")
    val_tokens, val_roles, modalities, eval_sha256 = read_frozen(config)
    if config.shard and -(-len(val_tokens) // config.eval_batch) % world:
        raise Fault(f"--shard=true needs as many evaluation batches on every process: {world} processes cannot share "
                    f"{len(val_tokens)} scenes in batches of {config.eval_batch} evenly, change --eval_batch")
    val_tokens, val_roles = val_tokens.to(device), val_roles.to(device)
    arrays, data_sha256 = read_shards(config.data, modalities) if config.num_steps else ([], "none")
    layout = Layout(modalities, device)
    shape = config.batch // world * config.budget // 2, config.dim, config.mlp_ratio * config.dim  # of a matrix product
    precision, peak = choose_precision(config.precision, device, world, *shape)
    torch.manual_seed(config.seed)
    model = Nano4M(config, layout).to(device)
    init_weights(model)
    if config.load:
        load_checkpoint(config.load, model, config)
    if config.shard:
        shard_blocks(model, world, device, precision)
    state, progress = read_state(config, data_sha256) if config.resume else (None, {})
    log = Log("4m", config, overrides, rank, device, precision)
    muon, adam = make_optimizers(model, config, rank, world, precision)
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    loss_of = masked_loss
    if device.type == "cuda" and not config.shard:
        torch._dynamo.config.recompile_limit = 16  # one graph an input length
        loss_of = torch.compile(masked_loss, fullgraph=True, dynamic=False)

    mine = slice(rank * config.batch // world, (rank + 1) * config.batch // world)

    def train_step(batch, rng, step):
        """One step on a global batch (batch, size): its loss, and how many tokens it had."""
        inputs, targets, counted = draw_places(batch, layout, input_budget(step, config), config.image_targets,
                                               config.text_targets, rng)
        share = target_shares(targets, counted, layout)
        with autocast():
            loss = loss_of(model, batch[mine], inputs[mine], targets[mine], counted[mine], share,
                           config.image_targets)
        loss.backward()
        sum_gradients(adam, world)
        factor = schedule(step, config)
        muon.step(config.muon_lr * factor)
        adam.param_groups[0]["lr"] = config.adam_lr * factor
        adam.step()
        model.zero_grad(set_to_none=True)
        return loss.detach(), inputs.numel() + counted.sum()

    # Warm-up on dummy data, untimed, then everything back to where it was.
    start = time.perf_counter()
    if config.num_steps:
        before = copy.deepcopy(model.state_dict())
        rng = torch.Generator(device).manual_seed(0)
        dummy = torch.zeros(config.batch, layout.size, dtype=torch.long, device=device)
        for i in range(9):  # every input length
            train_step(dummy, rng, i)
        model.load_state_dict(before)
        muon, adam = make_optimizers(model, config, rank, world, precision)
    sync()
    compile_seconds, compiled = time.perf_counter() - start, graphs()

    # The clock starts here.
    train_seconds, waited, step, tokens_seen, flops = 0.0, 0.0, 0, 0, 0.0
    start = time.perf_counter()
    loader = Loader(arrays, config.batch, config.seed, device) if config.num_steps else None
    if config.resume:
        load_state(state, model, muon, adam, loader)
        step, train_seconds, waited, tokens_seen, flops = (
            progress[name] for name in ("step", "seconds", "waited", "tokens", "flops"))
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
                val_loss, by_modality = evaluate(model, layout, val_tokens, val_roles, config, rank, world)
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
        loss, count = train_step(batch, loader.rng, step)
        tokens_seen = tokens_seen + count
        flops += config.batch * flops_per_scene(model, config, input_budget(step, config),
                                                config.image_targets + config.text_targets)
        step += 1
        if step % 10 == 0 or device.type == "cpu":
            value = finite(loss.item() * world, step)
            bar.set_postfix(loss=f"{value:.3f}", seconds=f"{train_seconds + time.perf_counter() - start:.0f}")
        bar.update()
        if why := due(step, config, world, device):
            sync()
            train_seconds += time.perf_counter() - start
            progress = {"data_sha256": data_sha256, "step": step, "seconds": train_seconds, "waited": waited,
                        "tokens": int(tokens_seen), "flops": flops}
            save_state(log, why, progress, config, rank, model, muon, adam, loader)
            start = time.perf_counter()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    bar.close()
    finite(val_loss, step)

    # The result.
    footer = {"script": HERE.name, "task": "4m", "track": config.track, "seed": config.seed,
              "world_size": world, "hardware": hardware(device), "precision": precision, "steps": step,
              "parameters": sum(p.numel() for p in model.parameters()), "tokens": int(tokens_seen),
              "val_loss": round(val_loss, 5), "target": config.target, "reached": val_loss <= config.target,
              "train_seconds": round(train_seconds, 3), "compile_seconds": round(compile_seconds, 1),
              "recompiles": graphs() - compiled, "loader_share": round(waited / max(train_seconds, 1e-9), 4),
              "tokens_per_second": round(int(tokens_seen) / max(train_seconds, 1e-9)),
              "mfu": round(flops / max(train_seconds, 1e-9) / peak / world, 4),
              "matmul_peak_tflops": round(peak / 1e12, 2),
              "peak_memory_mib": round(peak_memory_mib(device)), "data_sha256": data_sha256, "eval_sha256": eval_sha256,
              **{f"val_loss_{m}": round(value, 4) for m, value in by_modality.items()}}
    if config.shard:  # sampling is rank 0's alone
        whole = get_model_state_dict(model, options=WHOLE)
        model = Nano4M(config, layout).to(device)
        model.load_state_dict(whole)
    if rank == 0:
        with autocast():
            sys.path.insert(0, str(ROOT / "data"))  # helpers that turn tokens into pictures, not needed while training
            import draw
            import studio as metrics
            studio, size = metrics.Studio(device), 8 * math.isqrt(modalities["rgb"]["length"])
            model.eval()
            if config.quality_scenes:
                numbers = quality(model, layout, studio, metrics, val_tokens[:config.quality_scenes], size)
                footer.update({name: round(value, 4) for name, value in numbers.items()})
            draw_samples(model, layout, studio, draw, val_tokens[:8], size, ROOT / "samples" / "4m.png")
        if config.save:
            save_checkpoint(ROOT / "checkpoints" / f"{log.run_id}.safetensors", model, config)
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
