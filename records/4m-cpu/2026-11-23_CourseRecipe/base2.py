"""nano4M: one encoder-decoder learns to predict any subset of eight modalities from any other.

The course's recipe (EPFL COM-304 nano4M, after 4M, arXiv:2312.06647): pre-norm encoder-decoder, AdamW, cosine schedule.
This is record #1, the public baseline. Its final frozen validation loss defines the track's target.

    python train_4m.py                                          # the cpu track, data from `python data/scenes.py`
    torchrun --standalone --nproc_per_node=8 train_4m.py        # the gpu track
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
    data: str = "data/scenes64/train"  # aligned shards, made by data/scenes.py
    frozen: str = "data/frozen/scenes64.npz"  # validation scenes
    frozen_masks: str = "data/frozen/eval_4m_64.npz"  # their inputs and targets
    # model
    dim: int = 128  # channels
    head_dim: int = 64
    enc_depth: int = 2  # blocks
    dec_depth: int = 2
    mlp_ratio: int = 4
    # schedule
    num_steps: int = 7000
    batch: int = 32  # scenes a step, over all processes
    budget: int = 128  # most input tokens and most target tokens of a scene
    warmup: float = 0.1  # share of the steps
    # optimizer
    lr: float = 2.4e-3  # the course's 6e-4 at dim 512, scaled by width (arXiv:2203.03466)
    lr_min: float = 1e-6
    weight_decay: float = 0.05
    clip: float = 1.0  # gradient norm
    # evaluation and output
    target: float = 0.0  # validation loss in nats; 0: this run is the one that defines it
    eval_every: int = 700  # steps between evaluations; the clock stands still
    eval_batch: int = 125
    quality_scenes: int = 200  # frozen scenes the quality numbers are taken on
    load: str = ""  # checkpoint to start from
    save: bool = False  # write checkpoints/<run id>.safetensors at the end


CONFIGS = {
    "cpu": Config(),
    # the course's size: dim 512, 6 + 6 blocks, global batch 512, 256-token images
    "gpu": Config(track="gpu", data="data/scenes128/train", frozen="data/frozen/scenes128.npz",
                  frozen_masks="data/frozen/eval_4m_128.npz", dim=512, enc_depth=6, dec_depth=6, batch=512, lr=6e-4,
                  num_steps=6000),
}
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
    if sys.platform == "linux":  # keep freed memory: glibc gives large blocks back, and every step pays for new pages
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0), libc.mallopt(-1, 2 ** 31 - 1)  # M_MMAP_MAX, M_TRIM_THRESHOLD
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


def draw_masks(tokens, layout, budget, rng):
    """4M's masking: which tokens are inputs and which are targets, two disjoint bool (B, size).

    Each scene draws an input and a target budget from U{1..budget}; a Dirichlet(1) draw splits each over the
    modalities, cut to what the modality has (left); places inside a modality are uniform without replacement.
    """
    B, K, device = tokens.shape[0], len(MODALITIES), tokens.device
    valid = layout.valid(tokens)
    kind = layout.kind.expand(B, -1)
    available = torch.zeros(B, K, dtype=torch.long, device=device).scatter_add_(1, kind, valid.long())

    def split(limit):
        total = torch.randint(1, budget + 1, (B, 1), generator=rng, device=device)
        share = -torch.rand(B, K, generator=rng, device=device).clamp(min=1e-12).log()  # normalised: Dirichlet(1)
        edges = (share.cumsum(1) / share.sum(1, keepdim=True) * total).round().long()
        return torch.minimum(edges.diff(dim=1, prepend=torch.zeros_like(total)), limit)

    inputs = split(available)
    targets = split(available - inputs)
    # a random rank of every token among the valid ones of its modality
    score = torch.rand(tokens.shape, generator=rng, device=device) + 2.0 * ~valid + 4.0 * layout.kind
    rank = score.argsort(1).argsort(1) - layout.start[layout.kind]
    below = inputs.gather(1, kind)
    return rank < below, (rank >= below) & (rank < below + targets.gather(1, kind))


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
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.size(-1) ** -0.5) @ k.mT  # written out: torch 2.13's fused kernel is 3x slower on a CPU with AMX
    if mask is not None:
        scores = scores.masked_fill(~mask, -3e4)
    return scores.softmax(-1).type_as(v) @ v
# --- end: attend ---


# ------------------------------------------------------------------------------------------------------------
# Model

class Attention(nn.Module):
    def __init__(self, dim, head_dim):
        super().__init__()
        self.head_dim = head_dim
        self.q, self.kv, self.proj = (nn.Linear(dim, n * dim, bias=False) for n in (1, 2, 1))

    def forward(self, x, context, visible):
        heads = lambda y: y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
        k, v = self.kv(context).chunk(2, -1)
        y = attend(heads(self.q(x)), heads(k), heads(v), visible)
        return self.proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, dim, ratio):
        super().__init__()
        self.up, self.down = nn.Linear(dim, ratio * dim, bias=False), nn.Linear(ratio * dim, dim, bias=False)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


def layer_norm(dim):
    return nn.LayerNorm(dim, eps=1e-6, bias=False)


class Block(nn.Module):
    """Pre-norm Transformer block; with cross-attention to a context in the decoder."""

    def __init__(self, config, cross):
        super().__init__()
        dim = config.dim
        self.norm1, self.attention = layer_norm(dim), Attention(dim, config.head_dim)
        if cross:
            self.norm_x, self.norm_context = layer_norm(dim), layer_norm(dim)
            self.cross = Attention(dim, config.head_dim)
        self.norm2, self.mlp = layer_norm(dim), MLP(dim, config.mlp_ratio)

    def forward(self, x, seen, context=None, context_seen=None):
        h = self.norm1(x)
        x = x + self.attention(h, h, seen)
        if context is not None:
            x = x + self.cross(self.norm_x(x), self.norm_context(context), context_seen)
        return x + self.mlp(self.norm2(x))


def sincos(length, dim):
    """Fixed 1-D sine-cosine position embedding (length, dim), arXiv:1706.03762."""
    frequency = 10000 ** (-torch.arange(dim // 2) / (dim // 2))
    angle = torch.arange(length)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)


class Nano4M(nn.Module):
    def __init__(self, config, layout):
        super().__init__()
        dim = config.dim
        self.kind, self.offset = layout.kind, layout.offset  # modality and position of a place
        self.embed = nn.Embedding(layout.vocab, dim)
        self.enc_modality, self.dec_modality = nn.Embedding(len(MODALITIES), dim), nn.Embedding(len(MODALITIES), dim)
        self.register_buffer("position", sincos(int(layout.offset.max()) + 1, dim), persistent=False)
        self.encoder = nn.ModuleList(Block(config, cross=False) for _ in range(config.enc_depth))
        self.decoder = nn.ModuleList(Block(config, cross=True) for _ in range(config.dec_depth))
        self.enc_norm, self.dec_norm = layer_norm(dim), layer_norm(dim)
        self.context_proj = nn.Linear(dim, dim, bias=False)
        self.head = nn.Linear(dim, layout.vocab, bias=False)

    def forward(self, tokens, inputs, inputs_seen, targets, targets_seen):
        """Final states (B, M, C) at the places targets (B, M) from the tokens (B, size) at the places inputs (B, N).

        inputs_seen (B, N) and targets_seen (B, M) are False on padding.
        """
        position = self.position[self.offset]
        x = self.embed(tokens.gather(1, inputs)) + self.enc_modality(self.kind[inputs]) + position[inputs]  # (B, N, C)
        for block in self.encoder:
            x = block(x, inputs_seen)
        context = self.context_proj(self.enc_norm(x)) + position[inputs]
        y = self.dec_modality(self.kind[targets]) + position[targets]  # (B, M, C)
        for block in self.decoder:
            y = block(y, targets_seen, context, inputs_seen)
        return self.dec_norm(y)


def init_weights(model):
    for name, p in model.named_parameters():
        if "norm" in name:
            nn.init.ones_(p)
        elif name == "head.weight":
            nn.init.zeros_(p)
        else:
            nn.init.normal_(p, std=0.02)


# ------------------------------------------------------------------------------------------------------------
# Loss

def masked_loss(model, tokens, inputs, targets, width, share):
    """Sum over this rank's scenes of share * cross-entropy at the targets, in nats.

    inputs, targets: bool (B, size), at most width of each a scene; share (modalities,): what a target counts, so that
    over all ranks the sum is the mean over modalities of the modality's mean.
    """
    place_in, seen_in = gather_places(inputs, width)
    place_out, seen_out = gather_places(targets, width)
    rows = seen_out.flatten().nonzero()[:, 0]
    weight = F.pad(share[model.kind[place_out]].flatten()[rows], (0, -len(rows) % 256))
    rows = F.pad(rows, (0, -len(rows) % 256))  # of no weight: a CPU builds kernels for every new shape
    logits = model.head(model(tokens, place_in, seen_in, place_out, seen_out).flatten(0, 1)[rows])
    loss = F.cross_entropy(logits.float(), tokens.gather(1, place_out).flatten()[rows], reduction="none")
    return (loss * weight).sum()


def target_shares(targets, layout):
    """What one target of each modality counts: 1 / (its number of targets * the modalities that have any), (K,)."""
    count = torch.zeros(len(MODALITIES), device=targets.device).index_add_(0, layout.kind, targets.sum(0).float())
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
    return model.head(model(tokens, inputs, seen, targets, torch.ones_like(targets, dtype=torch.bool))).float()


def log_likelihood(model, tokens, known, targets):
    """Log-probabilities (B, M) of the tokens at the places targets (B, M), given the known (B, size) tokens alone."""
    logits = predict(model, tokens, known, targets)
    return -F.cross_entropy(logits.mT, tokens.gather(1, targets), reduction="none")


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

def make_optimizer(model, config):
    return torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay,
                             fused=True)


def learning_rate(step, config):
    """Linear warm-up, then cosine down to lr_min."""
    warm = max(1, round(config.warmup * config.num_steps))
    if step < warm:
        return config.lr * (step + 1) / warm
    progress = (step - warm) / max(1, config.num_steps - warm)
    return config.lr_min + 0.5 * (config.lr - config.lr_min) * (1 + math.cos(math.pi * progress))


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

def flops_per_scene(model, config, inputs, targets):
    """Matmul FLOPs of a training step for one scene with so many input and target tokens; backward is twice forward."""
    C, ratio = config.dim, config.mlp_ratio
    encoder = config.enc_depth * inputs * ((4 + 2 * ratio) * C * C + 2 * inputs * C)
    own = targets * ((4 + 2 * ratio) * C * C + 2 * targets * C)
    cross = targets * (2 * C * C + 2 * inputs * C) + inputs * 2 * C * C
    return 6 * (encoder + config.dec_depth * (own + cross) + inputs * C * C + targets * C * model.head.weight.shape[0])


def main(argv):
    config, overrides = read_config(argv)
    if config.num_steps < 0 or min(config.batch, config.eval_every, config.eval_batch) < 1:
        raise Fault("num_steps must be at least 0, batch, eval_every and eval_batch at least 1")
    if config.dim % config.head_dim:
        raise Fault(f"dim {config.dim} is not a multiple of head_dim {config.head_dim}")
    rank, world, device = setup()
    if config.batch % world:
        raise Fault(f"a batch of {config.batch} scenes cannot be divided among {world} processes")
    val_tokens, val_roles, modalities, eval_sha256 = read_frozen(config)
    val_tokens, val_roles = val_tokens.to(device), val_roles.to(device)
    arrays, data_sha256 = read_shards(config.data, modalities) if config.num_steps else ([], "none")
    layout = Layout(modalities, device)
    torch.manual_seed(config.seed)
    model = Nano4M(config, layout).to(device)
    init_weights(model)
    if config.load:
        load_checkpoint(config.load, model, config)
    log = Log("4m", config, overrides, rank, device)
    peak = matmul_peak(device)
    optimizer = make_optimizer(model, config)
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    autocast = lambda: torch.autocast(device.type, torch.bfloat16)

    def train_step(batch, inputs, targets, share, step):
        mine = slice(rank * config.batch // world, (rank + 1) * config.batch // world)
        with autocast():
            loss = masked_loss(model, batch[mine], inputs[mine], targets[mine], config.budget, share)
        loss.backward()
        sum_gradients(model, world)
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    # Warm-up on dummy data, untimed, then everything back to where it was.
    start = time.perf_counter()
    if config.num_steps:
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        rng = torch.Generator(device).manual_seed(0)
        dummy = torch.zeros(config.batch, layout.size, dtype=torch.long, device=device)
        for _ in range(2):
            masks = draw_masks(dummy, layout, config.budget, rng)
            train_step(dummy, *masks, target_shares(masks[1], layout), 0)
        model.load_state_dict(before[0])
        optimizer = make_optimizer(model, config)
    sync()
    compile_seconds = time.perf_counter() - start

    # The clock starts here.
    train_seconds, step, tokens_seen, flops = 0.0, 0, 0, 0.0
    start = time.perf_counter()
    loader = Loader(arrays, config.batch, config.seed, device) if config.num_steps else None
    bar = tqdm(total=config.num_steps, disable=rank > 0, unit="step", dynamic_ncols=True)
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
        batch = loader()
        inputs, targets = draw_masks(batch, layout, config.budget, loader.rng)
        loss = train_step(batch, inputs, targets, target_shares(targets, layout), step)
        tokens_seen = tokens_seen + inputs.sum() + targets.sum()
        flops += config.batch * flops_per_scene(model, config, config.budget, config.budget)
        step += 1
        if step % 10 == 0 or device.type == "cpu":
            value = finite(loss.item() * world, step)
            bar.set_postfix(loss=f"{value:.3f}", seconds=f"{train_seconds + time.perf_counter() - start:.0f}")
        bar.update()
    bar.close()
    finite(val_loss, step)

    # The result.
    footer = {"script": HERE.name, "task": "4m", "track": config.track, "seed": config.seed,
              "world_size": world, "hardware": hardware(device), "steps": step,
              "parameters": sum(p.numel() for p in model.parameters()), "tokens": int(tokens_seen),
              "val_loss": round(val_loss, 5), "target": config.target, "reached": val_loss <= config.target,
              "train_seconds": round(train_seconds, 3), "compile_seconds": round(compile_seconds, 1),
              "tokens_per_second": round(int(tokens_seen) / max(train_seconds, 1e-9)),
              "mfu": round(flops / max(train_seconds, 1e-9) / peak / world, 4),
              "matmul_peak_tflops": round(peak / 1e12, 2),
              "peak_memory_mib": round(peak_memory_mib(device)), "data_sha256": data_sha256, "eval_sha256": eval_sha256,
              **{f"val_loss_{m}": round(value, 4) for m, value in by_modality.items()}}
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


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Fault as fault:
        sys.exit(f"{HERE.name}: {fault}")
