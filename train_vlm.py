"""A vision-language model: a picture and a question in, an answer out.

After nanoVLM (github.com/huggingface/nanoVLM): a SigLIP-like vision encoder, pixel shuffle, a linear projector and a
Llama-like language model; made fast: conversations packed into rows without padding, Muon, zero-initialised
projections, compiled blocks. Times against the baseline, record #1, are in records/README.md.

    python train_vlm.py                                         # cpu track, data from `python data/scenes.py --qa`
    python train_vlm.py --load=data/frozen/vlm.safetensors --num_steps=0 --chat=photo.png    # ask about a picture
    python train_vlm.py --vit=google/siglip-base-patch16-224 --lm=HuggingFaceTB/SmolLM2-135M   # pretrained backbones
"""
import copy
import ctypes
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
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------------
# Config

@dataclass
class Config:
    # data
    track: str = "cpu"
    seed: int = 0
    data: str = "data/qa64/train"  # made by `python data/scenes.py --qa`
    frozen: str = "data/frozen/qa64.npz"  # validation pictures, questions and answers
    # vision encoder
    vit: str = ""  # pretrained SigLIP on the hub, or a folder; "": from scratch, in this size
    side: int = 64  # pixels across, pictures are resized to it
    patch: int = 8  # pixels across a patch
    vit_dim: int = 128  # channels
    vit_depth: int = 2  # blocks
    vit_heads: int = 2
    vit_mlp: int = 512
    shuffle: int = 2  # patches across that one token of the language model holds
    # language model
    lm: str = ""  # pretrained Llama on the hub, or a folder
    lm_dim: int = 128
    lm_depth: int = 3
    lm_heads: int = 2
    lm_kv_heads: int = 1
    lm_mlp: int = 384
    rope_theta: float = 10000.0
    # schedule
    num_steps: int = 300
    rows: int = 24  # a step, over all processes
    row: int = 256  # tokens, of several conversations
    cooldown: float = 0.7  # share of the steps over which the learning rates fall to 0
    # optimizer
    muon_lr: float = 0.015  # hidden matrices
    momentum: float = 0.95
    adam_lr: float = 0.005  # embeddings, gains and biases
    backbone_lr: float = 1e-5  # AdamW, for the two backbones, if any is pretrained
    projector_lr: float = 1e-3  # AdamW, for the projector, then
    # evaluation and output
    target: float = 0.4  # validation loss in nats an answer token, record #1's
    eval_every: int = 60  # steps between evaluations; the clock stands still
    eval_batch: int = 100
    samples: int = 12  # validation pictures on the sheet
    load: str = ""  # checkpoint to start from
    precision: str = "auto"  # of matrix products: auto (measured), fp32 or bf16
    save: bool = False  # write checkpoints/<run id>.safetensors at the end
    save_every: int = 0  # steps between states that --resume can go on from; 0: only at SIGTERM
    resume: str = ""  # state to go on from
    # sampling
    chat: str = ""  # a picture to ask about in the terminal, after training
    max_tokens: int = 24  # of an answer
    temperature: float = 0.0  # 0: always the likeliest token
    top_k: int = 0  # 0: all
    top_p: float = 1.0


CONFIGS = {
    "cpu": Config(),
    "gpu": Config(track="gpu", vit_dim=384, vit_depth=8, vit_heads=6, vit_mlp=1536, patch=4, lm_dim=512, lm_depth=8,
                  lm_heads=8, lm_kv_heads=4, lm_mlp=1408, rows=64, row=1024, num_steps=3000),
}
ARCHITECTURE = ("side", "patch", "shuffle", "vit_dim", "vit_depth", "vit_heads", "vit_mlp", "lm_dim", "lm_depth",
                "lm_heads", "lm_kv_heads", "lm_mlp", "rope_theta")  # what a checkpoint must agree on


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

# --- copied: keep memory ---
def keep_memory():
    """Have the C library keep freed memory, or a step on a CPU pays for new pages: in the flow 62 ms, with it 52."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0), libc.mallopt(-1, 2 ** 31 - 1)  # M_MMAP_MAX, M_TRIM_THRESHOLD
# --- end: keep memory ---


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


# --- copied: compiler ---
def compiler_works(log, device):
    """Whether torch.compile can build code here, tried on one line: on a CPU it takes a working C++ compiler."""
    if device.type == "cpu":
        try:
            torch.compile(lambda x: x + 1)(torch.zeros(1))
        except Exception as error:  # torch.compile has many kinds
            log.say(f"torch.compile does not work here ({str(error).splitlines()[0]}): steps take longer without it")
            return False
    return True
# --- end: compiler ---


# ------------------------------------------------------------------------------------------------------------
# Data

IMAGE, PAD = -1, -2  # stand in token rows where a picture's tokens go, and after a row of a pretrained model's tokens


def read_conversations(config):
    """Training pictures (N, 3, S, S) uint8, tokens (N, L), answer marks (N, L), what meta.json says of the tokens, and
    the sha256 of how they were made."""
    folder, make = ROOT / config.data, "python data/scenes.py --qa"
    if not (folder / "meta.json").exists():
        raise Fault(f"no training data in {folder}: make it with `{make}`")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        pixels, qa, answer = (np.load(folder / f"{m}.npy", allow_pickle=False) for m in ("pixels", "qa", "answer"))
        about, num = meta["modalities"]["qa"], meta["num"]
        if pixels.dtype != np.uint8 or pixels.shape != (num, 3, *2 * pixels.shape[-1:]):
            raise ValueError(f"pixels.npy holds {pixels.dtype} {pixels.shape}")
        if qa.shape != (num, about["length"]) or answer.shape != qa.shape or int(qa.max()) >= about["vocab"]:
            raise ValueError(f"qa.npy holds {qa.shape} up to {qa.max()}, answer.npy {answer.shape}")
        recipe = {key: meta[key] for key in ("name", "version", "size", "num", "seed", "text")}
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise Fault(f"{folder} is damaged ({error}): delete it and run `{make}`") from None
    return (torch.from_numpy(pixels), torch.from_numpy(qa.astype(np.int64)), torch.from_numpy(answer.astype(np.uint8)),
            about, hashlib.sha256(json.dumps(recipe).encode()).hexdigest())


class Loader:
    """Endless steps of shuffled conversations, packed into rows without padding between them, the same on every rank.

    A step is a dict: tokens (rows, R), IMAGE where a picture's tokens go and the pad at a row's end; answer (rows, R);
    document (rows, R), which conversation of the step a token belongs to; pixels (n, 3, S, S) in reading order.
    """

    def __init__(self, pixels, tokens, answer, image_tokens, pad, config, rank, world, device):
        self.pixels, self.rows, self.row, self.pad = pixels.to(device), config.rows, config.row, pad
        self.length = (image_tokens + (tokens != pad).sum(1)).tolist()
        if max(self.length) > config.row:
            raise Fault(f"a row of {config.row} tokens is too short: a conversation has {max(self.length)}")
        self.tokens, self.answer = (F.pad(part, (image_tokens, 0), value=value).to(device)
                                    for part, value in ((tokens, IMAGE), (answer, 0)))
        self.rng, self.device = torch.Generator().manual_seed(config.seed), device
        self.mine = range(rank * config.rows // world, (rank + 1) * config.rows // world)
        self.pending = []  # conversations to come, the next one last

    def plan(self):
        """Conversations of a step and where they begin, [(row, place)]: of the next 16 always the longest that fits."""
        chosen, at, row, start = [], [], 0, 0
        while row < self.rows:
            if len(self.pending) < 16:
                self.pending = torch.randperm(len(self.length), generator=self.rng).tolist() + self.pending
            fits = [i for i in range(-16, 0) if start + self.length[self.pending[i]] <= self.row]
            if fits:
                chosen.append(self.pending.pop(max(fits, key=lambda i: self.length[self.pending[i]])))
                at.append((row, start))
                start += self.length[chosen[-1]]
            else:
                row, start = row + 1, 0
        return chosen, at

    def __call__(self):
        chosen, at = self.plan()
        answers = int((self.answer[chosen] > 0).sum())  # of all ranks
        chosen, at = zip(*((c, (row - self.mine[0]) * self.row + start)
                           for c, (row, start) in zip(chosen, at) if row in self.mine))
        lengths, size = torch.tensor([self.length[c] for c in chosen]), (len(self.mine), self.row)
        which, place = (torch.arange(int(lengths.max())) < lengths[:, None]).nonzero().to(self.device).unbind(1)
        chosen, to = torch.tensor(chosen, device=self.device), torch.tensor(at, device=self.device)[which] + place
        empty = lambda value: torch.full((math.prod(size),), value, device=self.device)
        put = lambda value, what: empty(value).index_copy_(0, to, what.long()).view(size)
        return {"tokens": put(self.pad, self.tokens[chosen[which], place]), "document": put(-1, which),
                "answer": put(0, self.answer[chosen[which], place]), "pixels": self.pixels[chosen], "answers": answers}


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
# Model

def rotate(x, turn):
    """Rotary positions (arXiv:2104.09864): pairs of channels of x (B, H, T, D) turn by turn = cos, sin (T, D / 2)."""
    (a, b), (cos, sin) = x.chunk(2, -1), turn
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def heads(x, n):
    return x.unflatten(-1, (n, -1)).transpose(1, 2)  # (B, H, T, D)


class VitBlock(nn.Module):
    """SigLIP's: pre-norm attention over all patches, then a GELU MLP. Names of weights are the hub's."""

    def __init__(self, dim, heads, mlp):
        super().__init__()
        self.heads = heads
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(dim, mlp), nn.Linear(mlp, dim)

    def forward(self, x):
        y = self.layer_norm1(x)
        q, k, v = (heads(part(y), self.heads) for part in (self.q_proj, self.k_proj, self.v_proj))
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
    """Llama's: pre-norm attention with grouped queries and rotary positions, then a SwiGLU MLP. Names are the hub's."""

    def __init__(self, config):
        super().__init__()
        C, D = config.lm_dim, config.lm_dim // config.lm_heads
        self.heads, self.kv_heads = config.lm_heads, config.lm_kv_heads
        self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(C, eps=1e-5) for _ in range(2))
        linear = functools.partial(nn.Linear, bias=False)
        self.q_proj, self.o_proj = linear(C, C), linear(C, C)
        self.k_proj, self.v_proj = (linear(C, D * config.lm_kv_heads) for _ in range(2))
        self.gate_proj, self.up_proj = linear(C, config.lm_mlp), linear(C, config.lm_mlp)
        self.down_proj = linear(config.lm_mlp, C)

    def forward(self, x, turn, mask, memory):
        y = self.input_layernorm(x)
        q, k = rotate(heads(self.q_proj(y), self.heads), turn), rotate(heads(self.k_proj(y), self.kv_heads), turn)
        k, v = memory(k, heads(self.v_proj(y), self.kv_heads))
        k, v = (part.repeat_interleave(self.heads // self.kv_heads, 1) for part in (k, v))
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

    def forward(self, x, mask, start=0, memories=None):
        """Final states (B, T, C) of embeddings x (B, T, C) of the places from start on.

        memories: a block's callable each, from new keys and values to all there are; None: the new ones are all.
        """
        rate = self.theta ** -torch.linspace(0, 1, self.head_dim // 2 + 1, device=x.device)[:-1]
        angle = torch.arange(start, start + x.size(1), device=x.device)[:, None] * rate
        turn = angle.cos(), angle.sin()
        for i, layer in enumerate(self.layers):
            x = layer(x, turn, mask, memories[i] if memories else lambda k, v: (k, v))
        return self.norm(x)

    def logits(self, y):
        """float32 logits (..., vocab) from final states (..., C)."""
        return F.linear(y, self.embed_tokens.weight).float()


class VLM(nn.Module):
    def __init__(self, config, vocab):
        super().__init__()
        self.side, self.shuffle, self.kept = config.side, config.shuffle, {}
        self.grid = config.side // config.patch  # patches across
        self.image_tokens = (self.grid // config.shuffle) ** 2
        self.vit, self.lm = Vit(config), Llama(config, vocab)
        self.project = nn.Linear(config.vit_dim * config.shuffle ** 2, config.lm_dim, bias=False)

    def see(self, pixels):
        """Tokens (n, image_tokens, C) of pictures (n, 3, S, S) of bytes, whatever their size."""
        pictures = pixels.float() / 127.5 - 1
        if pictures.size(-1) != self.side:
            pictures = F.interpolate(pictures, (self.side, self.side), mode="bicubic", antialias=True)
        states = self.vit(pictures).mT.unflatten(2, (self.grid, self.grid))
        return self.project(F.pixel_unshuffle(states, self.shuffle).flatten(2).mT)

    def embed(self, tokens, pixels):
        """Embeddings (B, T, C) of tokens (B, T), the tokens of pixels (n, 3, S, S) in order where they say IMAGE."""
        x = self.lm.embed_tokens(tokens.clamp(min=0))
        return x.masked_scatter((tokens == IMAGE)[..., None], self.see(pixels).type_as(x))

    @staticmethod
    def may_see(ids, b, q, k):
        """Whether place q of row b looks at place k: what came before it in its document, and of a picture all."""
        q_id, k_id = ids[b, q], ids[b, k]
        return (q_id >> 1 == k_id >> 1) & ((k <= q) | (q_id & k_id & 1 > 0))

    def mask(self, document, image, start=0, kept=None):
        """For attend, of the places from start on of documents (B, T), image (B, T) True at a picture's tokens."""
        return make_mask(self.may_see, 2 * document.long() + image, start, kept)

    def forward(self, tokens, document, pixels):
        """Final states (B, T, C) for tokens (B, T) of documents (B, T) with pictures pixels (n, 3, S, S)."""
        return self.lm(self.embed(tokens, pixels), self.mask(document, tokens == IMAGE, kept=self.kept))


def init_weights(model):
    for name, p in model.named_parameters():
        if "norm" in name:
            (nn.init.zeros_ if "bias" in name else nn.init.ones_)(p)
        elif "bias" in name or "o_proj" in name or "fc2" in name or "down_proj" in name:
            nn.init.zeros_(p)
        elif "position_embedding" in name:
            nn.init.normal_(p, std=0.2)  # about as much as patches; 0.02: 0.407 instead of 0.392 after 200 steps
        elif "embed_tokens" in name:
            nn.init.normal_(p, std=0.02)
        else:
            nn.init.normal_(p, std=p[0].numel() ** -0.5)


# ------------------------------------------------------------------------------------------------------------
# Pretrained backbones

RENAMES = (("vision_model.", ""), ("model.", ""), ("embeddings.", ""), ("encoder.", ""), ("self_attn.", ""),
           ("mlp.", ""), ("out_proj", "o_proj"))  # from the hub's names to ours
SIGLIP = {"image_size": ("side", 224), "patch_size": ("patch", 16), "hidden_size": ("vit_dim", 768),
          "num_hidden_layers": ("vit_depth", 12), "num_attention_heads": ("vit_heads", 12),
          "intermediate_size": ("vit_mlp", 3072)}  # from its config.json to ours, and what it means to leave it out
LLAMA = {"hidden_size": "lm_dim", "num_hidden_layers": "lm_depth", "num_attention_heads": "lm_heads",
         "num_key_value_heads": "lm_kv_heads", "intermediate_size": "lm_mlp"}


def fetch_backbone(name):
    """The folder of a model on the hub, or of one on disk: (config.json as a dict, folder)."""
    folder = Path(name)
    try:
        if not folder.is_dir():
            from huggingface_hub import snapshot_download
            folder = Path(snapshot_download(name, allow_patterns=["config.json", "tokenizer.json", "*.safetensors"]))
        return json.loads((folder / "config.json").read_text()), folder
    except Exception as error:  # the hub raises many kinds
        raise Fault(f"cannot read the model {name}: {type(error).__name__}: {error}".splitlines()[0]) from None


def backbone_config(config):
    """The Config in the shapes of its pretrained backbones, and their language model's vocabulary, None if ours."""
    config, vocab = copy.copy(config), None
    if config.vit:
        about, _ = fetch_backbone(config.vit)
        about = about.get("vision_config", about)
        for theirs, (ours, default) in SIGLIP.items():
            setattr(config, ours, about.get(theirs, default))
    if config.lm:
        about, _ = fetch_backbone(config.lm)
        if about.get("model_type") != "llama" or about.get("rope_scaling") or not about.get("tie_word_embeddings"):
            raise Fault(f"--lm={config.lm} is a {about.get('model_type')}: only plain Llamas with tied embeddings load")
        for theirs, ours in LLAMA.items():
            setattr(config, ours, about[theirs])
        config.rope_theta = about.get("rope_theta") or about["rope_parameters"]["rope_theta"]
        vocab = about["vocab_size"]
    return config, vocab


def load_backbone(module, name):
    """Fill a Vit or a Llama with the hub's weights: every one of ours must be there, what else there is has no use."""
    _, folder = fetch_backbone(name)
    state = {}
    for path in sorted(folder.glob("*.safetensors")):
        for key, value in load_file(path).items():
            if not key.startswith("text_model."):  # SigLIP's other half
                for theirs, ours in RENAMES:
                    key = key.replace(theirs, ours)
                state[key] = value.float()
    if missing := [key for key, p in module.state_dict().items() if key not in state or state[key].shape != p.shape]:
        raise Fault(f"{name} has no weight that fits {missing[0]}: is it a model of the right kind?")
    module.load_state_dict({key: state[key] for key in module.state_dict()})


class Words:
    """Text to tokens and back, in our encoding or in that of a pretrained language model, and the template."""

    def __init__(self, lm):
        sys.path.insert(0, str(ROOT / "data"))
        import tokenizer
        ours, self.pad = tokenizer.load_text(tokenizer.QA), tokenizer.TEXT_VOCAB - 1
        self.encode, self.ours = ours.encode_ordinary, lambda ids: tokenizer.decode_text(ours, ids)
        self.decode = self.ours
        if lm:
            from tokenizers import Tokenizer
            theirs = Tokenizer.from_file(str(fetch_backbone(lm)[1] / "tokenizer.json"))
            self.encode = lambda text: theirs.encode(text, add_special_tokens=False).ids
            self.decode = theirs.decode
        self.stop = self.encode("\n")[-1]  # ends every answer

    def question(self, text):
        return self.encode(f"Question: {text} Answer:")

    def convert(self, tokens, answer):
        """Rows (N, L) of our tokens and answer marks in the other model's tokens, of the length that takes."""
        rows = []
        for ids, marks in zip(tokens.tolist(), answer.tolist()):
            ids, row, i = ids[:ids.index(self.pad)] if self.pad in ids else ids, [], 0
            while i < len(ids):
                stop = next((j for j in range(i, len(ids)) if marks[j] != marks[i]), len(ids))
                row += [(new, marks[i]) for new in self.encode(self.ours(ids[i:stop]))]
                i = stop
            rows.append(row)
        longest = max(map(len, rows))
        padded = torch.tensor([row + [(PAD, 0)] * (longest - len(row)) for row in rows])
        return padded[..., 0], padded[..., 1].to(torch.uint8)


# ------------------------------------------------------------------------------------------------------------
# Loss

def answer_logits(model, tokens, answer, document, pixels):
    """Logits (n, V) of the n answer tokens that answer (B, T) marks, and these tokens (n,): each is predicted from the
    place before it."""
    marked = answer[:, 1:] > 0
    states = model(tokens, document, pixels)[:, :-1]
    return model.lm.logits(states[marked]), tokens[:, 1:][marked]


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


class Reader:
    """A language model that remembers the keys and values of what it has read: every token is computed once."""

    def __init__(self, model, cached=True):
        self.model, self.cached, self.read, self.past = model, cached, 0, {}

    def remember(self, i, k, v):
        """Add keys and values (B, H, T, D) to those of block i: all there are."""
        if i in self.past:
            k, v = torch.cat([self.past[i][0], k], 2), torch.cat([self.past[i][1], v], 2)
        self.past[i] = k, v
        return k, v

    def __call__(self, x):
        """Logits (B, V) after embeddings x (B, T, C), a picture's tokens first, of which what is new is computed."""
        lm, (B, T) = self.model.lm, x.shape[:2]
        memories = [functools.partial(self.remember, i) for i in range(len(lm.layers))] if self.cached else None
        image = (torch.arange(T, device=x.device) < self.model.image_tokens).expand(B, T)
        mask = self.model.mask(torch.zeros_like(image, dtype=torch.long), image, self.read)
        states = lm(x[:, self.read:], mask, self.read, memories)
        self.read = T if self.cached else 0
        return lm.logits(states[:, -1])


@torch.no_grad()
def generate(model, pixels, tokens, stop, config, seed=0, cached=True):
    """Answer tokens (a list, without the stop) to a picture (3, S, S) of bytes and the tokens (a list) of questions."""
    device = model.project.weight.device
    reader, rng = Reader(model, cached), torch.Generator(device).manual_seed(seed)
    row = torch.tensor([[IMAGE] * model.image_tokens + tokens], device=device)
    x, answer = model.embed(row, pixels[None].to(device)), []
    for _ in range(config.max_tokens):
        logits = reader(x)
        if config.temperature == 0:
            new = logits.argmax(-1, keepdim=True)
        else:
            drawn = sharpen(logits, config.temperature, config.top_k, config.top_p).softmax(-1)
            new = torch.multinomial(drawn, 1, generator=rng)
        if new.item() == stop:
            break
        answer.append(new.item())
        x = torch.cat([x, model.lm.embed_tokens(new).type_as(x)], 1)
    return answer


def write_samples(model, config, words, frozen, folder):
    """Draw samples/vlm.png, pictures with questions, answers and the truth: how fast tokens come with and without the
    cache, for the footer."""
    import draw
    pixels, tokens, answer, family = (part[:config.samples].cpu() for part in frozen)
    cells, counts = [], {True: 0, False: 0}
    for picture, row, marks in zip(pixels, tokens.tolist(), answer.tolist()):
        lines = []
        for turn in range(1, max(marks) + 1):
            first, last = marks.index(turn), len(marks) - marks[::-1].index(turn)
            asked = len(marks) - marks[::-1].index(turn - 1) if turn > 1 else 0
            said = words.decode(generate(model, picture, row[:first], words.stop, config)).strip()
            truth = words.decode(row[first:last]).strip()
            counts[said == truth] += 1
            question = words.decode(row[asked:first]).replace("Question:", "").replace("Answer:", "").strip()
            lines.append(f"{question} {said}" + ("" if said == truth else f"   (true: {truth})"))
        cells += [picture.float() / 255, "\n".join(lines)]
    draw.sheet(["questions, the model's answers, and the true ones where it is wrong",
                *(cells[i:i + 4] for i in range(0, len(cells), 4))], folder / "vlm.png")
    long, speeds = dataclasses.replace(config, max_tokens=200), []
    for cached in (True, False):  # 200 tokens, whatever they say
        start = time.perf_counter()
        made = generate(model, pixels[0], words.question("How many objects are there?"), None, long, cached=cached)
        speeds.append(len(made) / (time.perf_counter() - start))
    return {"sampled_per_second": round(speeds[0], 1), "sampled_per_second_uncached": round(speeds[1], 1)}


def chat(model, config, words):
    """Answer questions about a picture, typed in the terminal, until an empty line."""
    from PIL import Image, UnidentifiedImageError
    try:
        with Image.open(config.chat) as image:
            picture = image.convert("RGB").resize((config.side, config.side), Image.BICUBIC)
    except (OSError, UnidentifiedImageError) as error:
        raise Fault(f"--chat={config.chat} is not a picture: {error}") from None
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    print("Ask about the picture; an empty line ends it.")
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            question = ""
        if not question:
            return
        print(words.decode(generate(model, pixels, words.question(question), words.stop, config)).strip())


# ------------------------------------------------------------------------------------------------------------
# Evaluation

# --- frozen: eval ---
FAMILIES = ("count", "exist", "attribute", "compare", "spatial")  # numbered from 1 on


def read_frozen(config):
    """Validation pictures (n, 3, S, S) uint8, tokens (n, L), answer marks (n, L), families (n, 4) of the turns, what is
    known of the tokens, and the sha256 of it all."""
    path = ROOT / config.frozen
    if not path.exists():
        raise Fault(f"{path} is missing: it belongs to the repository (`git checkout {config.frozen}`)")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            about = json.loads(bytes(arrays["modalities"]))["qa"]
            pixels, tokens, answer, family = (torch.from_numpy(arrays[m].astype(kind)) for m, kind in (
                ("pixels", np.uint8), ("qa", np.int64), ("answer", np.uint8), ("family", np.uint8)))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise Fault(f"the frozen validation set is damaged ({error}): `git checkout data/frozen`") from None
    return pixels, tokens, answer, family, about, frozen_sha256(path)


@torch.no_grad()
def evaluate(model, pixels, tokens, answer, family, config, rank, world):
    """Mean cross-entropy in nats over all answer tokens, each given its picture and the tokens before it; and for each
    family the share of answers whose every token is the likeliest one.

    Ranks share the conversations; all get the result.
    """
    total = torch.zeros(2 + 2 * len(FAMILIES), dtype=torch.float64, device=pixels.device)  # nats, tokens; right, asked
    for i in range(rank * config.eval_batch, len(pixels), world * config.eval_batch):
        part = slice(i, i + config.eval_batch)
        nats, right = answer_nats(model, pixels[part], tokens[part], answer[part])  # (n,) of the n marked tokens
        marks = answer[part].long()
        row = torch.arange(len(marks), device=marks.device)[:, None].expand_as(marks)[marks > 0]
        turn = row * family.size(1) + marks[marks > 0] - 1
        wrong = torch.zeros(family[part].numel(), device=marks.device).index_add_(0, turn, (~right).float())
        asked = family[part].flatten().long()
        tally = torch.zeros(2, len(FAMILIES) + 1, device=marks.device)
        tally[0].index_add_(0, asked, (wrong == 0).float()), tally[1].index_add_(0, asked, torch.ones_like(wrong))
        total += torch.cat([nats.double().sum()[None], marks.gt(0).sum()[None], tally[:, 1:].flatten().double()])
    if world > 1:
        dist.all_reduce(total)
    right, asked = total[2:].view(2, -1)
    return (total[0] / total[1]).item(), dict(zip(FAMILIES, (right / asked.clamp(min=1)).tolist()))
# --- end: eval ---


def answer_nats(model, pixels, tokens, answer):
    """Cross-entropy (n,), and whether it is the likeliest one (n,), of the n tokens (B, L) that answer (B, L) marks."""
    lead = lambda value, like: F.pad(like, (model.image_tokens, 0), value=value)
    document = torch.arange(len(tokens), device=tokens.device)[:, None].expand(-1, model.image_tokens + tokens.size(1))
    logits, truth = answer_logits(model, lead(IMAGE, tokens), lead(0, answer), document, pixels)
    return F.cross_entropy(logits, truth, reduction="none"), logits.argmax(-1) == truth


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


def make_optimizers(model, config, rank, world, precision):
    """Muon for the blocks' matrices and the projector, Adam for the rest. With a pretrained backbone no Muon and AdamW
    for all, at one rate for the backbones and another for the projector, as nanoVLM does it."""
    named = list(model.named_parameters())
    if config.vit or config.lm:
        backbones, projector = ([p for name, p in named if name.startswith("project") == new] for new in (False, True))
        return None, torch.optim.AdamW([{"params": backbones, "peak": config.backbone_lr},
                                        {"params": projector, "peak": config.projector_lr}], fused=True)
    matrix = lambda name, p: p.ndim == 2 and ("layers" in name or name.startswith("project"))
    hidden, rest = ([p for name, p in named if matrix(name, p) == wanted] for wanted in (True, False))
    adam = torch.optim.Adam([{"params": rest, "peak": config.adam_lr}], betas=(0.9, 0.95), fused=True)
    return Muon(hidden, config.momentum, rank, world, PRECISIONS[precision]), adam


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

def flops_per_step(model, config, tokens, pictures):
    """Matmul FLOPs of a training step on so many tokens and pictures; backward is twice forward."""
    C, D, T = config.vit_dim, config.lm_dim, model.grid ** 2
    vit = T * (config.vit_depth * (4 * C * C + 2 * C * config.vit_mlp + 2 * T * C) + 3 * config.patch ** 2 * C + C * D)
    kv = D * config.lm_kv_heads // config.lm_heads
    lm = config.lm_depth * (2 * D * D + 2 * D * kv + 3 * D * config.lm_mlp + 2 * config.row * D)
    return 6 * (pictures * vit + tokens * lm)


def main(argv):
    config, overrides = read_config(argv)
    if config.resume and not config.num_steps:
        raise Fault("--resume goes on with a run: pass its --num_steps, or --load to evaluate a checkpoint")
    if config.num_steps < 0 or min(config.rows, config.row, config.eval_every, config.eval_batch) < 1:
        raise Fault("num_steps must be at least 0, rows, row, eval_every and eval_batch at least 1")
    config, vocab = backbone_config(config)
    if config.side % (config.patch * config.shuffle):
        raise Fault(f"{config.shuffle} patches of {config.patch} pixels do not tile pictures of {config.side} pixels")
    if config.vit_dim % config.vit_heads or config.lm_dim % (2 * config.lm_heads):
        raise Fault("vit_heads must divide vit_dim, and lm_heads half of lm_dim")
    if config.lm_heads % config.lm_kv_heads:
        raise Fault(f"{config.lm_kv_heads} key and value heads do not divide {config.lm_heads} heads")
    keep_memory()
    rank, world, device = setup()
    if config.rows % world:
        raise Fault(f"{config.rows} rows cannot be divided among {world} processes")
    *frozen, about, eval_sha256 = read_frozen(config)
    pixels, tokens, answer, found, data_sha256 = read_conversations(config) if config.num_steps else \
        (None, None, None, about, "none")
    if found["vocab"] != about["vocab"]:
        raise Fault(f"{ROOT / config.data} has another vocabulary than the frozen validation set")
    pad = about["pad"]
    if config.lm:  # the other model's own tokens
        words, pad = Words(config.lm), PAD
        frozen[1:3] = words.convert(*frozen[1:3])
        tokens, answer = words.convert(tokens, answer) if config.num_steps else (None, None)
    frozen = [part.to(device) for part in frozen]
    shape = config.rows // world * config.row, config.lm_dim, config.lm_mlp  # of a matrix product
    precision, peak = choose_precision(config.precision, device, world, *shape)
    torch.manual_seed(config.seed)
    model = VLM(config, vocab or about["vocab"]).to(device)
    init_weights(model)
    for module, name in (model.vit, config.vit), (model.lm, config.lm):
        if name:
            load_backbone(module, name)
    if config.load:
        load_checkpoint(config.load, model, config)
    state, progress = read_state(config, data_sha256) if config.resume else (None, {})
    log = Log("vlm", config, overrides, rank, device, precision)
    if compiler_works(log, device):  # 419 ms per step instead of 469, in float32 on 2 cores
        for block in (*model.vit.layers, *model.lm.layers):
            block.compile(fullgraph=True)
    muon, adam = make_optimizers(model, config, rank, world, precision)
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")

    def train_step(batch, step):
        """One step on this rank's rows: its part of the loss."""
        with autocast():
            logits, truth = answer_logits(model, batch["tokens"], batch["answer"], batch["document"], batch["pixels"])
            loss = F.cross_entropy(logits, truth, reduction="sum") / batch["answers"]
        loss.backward()
        sum_gradients(adam, world)
        factor = schedule(step, config)
        if muon:
            muon.step(config.muon_lr * factor)
        for group in adam.param_groups:
            group["lr"] = group["peak"] * factor
        adam.step()
        model.zero_grad(set_to_none=True)
        return loss.detach()

    # Warm-up on dummy data, untimed, then everything back to where it was.
    start = time.perf_counter()
    make_loader = lambda *parts: Loader(*parts, model.image_tokens, pad, config, rank, world, device)
    if config.num_steps:
        before = copy.deepcopy(model.state_dict())
        dummy = make_loader(torch.zeros_like(pixels[:1000]), tokens[:1000], answer[:1000])
        for i in range(5):
            batch = dummy()
            train_step(batch | {"tokens": batch["tokens"].clamp(max=0)}, i)  # no token but the first
        if device.type == "cuda":  # its shapes are compiled too
            with autocast():
                evaluate(model, *frozen, config, rank, world)
        model.load_state_dict(before)
        muon, adam = make_optimizers(model, config, rank, world, precision)
    sync()
    compile_seconds, compiled = time.perf_counter() - start, graphs()

    # The clock starts here.
    train_seconds, waited, step, pictures = 0.0, 0.0, 0, 0
    start = time.perf_counter()
    loader = make_loader(pixels, tokens, answer) if config.num_steps else None
    if config.resume:
        load_state(state, model, muon, adam, loader)
        step, train_seconds, waited, pictures = (progress[name] for name in ("step", "seconds", "waited", "pictures"))
        start = time.perf_counter()
    signal.signal(signal.SIGTERM, lambda *_: SIGTERM.append(True))
    bar = tqdm(total=config.num_steps, initial=step, disable=rank > 0, unit="step", dynamic_ncols=True)
    while True:
        last = step == config.num_steps
        if last or (step % config.eval_every == 0 and step):
            sync()
            train_seconds += time.perf_counter() - start
            with autocast():
                val_loss, accuracy = evaluate(model, *frozen, config, rank, world)
            log.say(f"step:{step}/{config.num_steps} val_loss:{val_loss:.4f} train_time:{1000 * train_seconds:.0f}ms "
                    f"step_avg:{1000 * train_seconds / max(1, step):.2f}ms")
            if last:
                break
            sync()
            start = time.perf_counter()
        asked = time.perf_counter()
        batch = loader()
        waited += time.perf_counter() - asked
        loss = train_step(batch, step)
        step, pictures = step + 1, pictures + len(batch["pixels"]) * world
        if step % 10 == 0:
            value = finite(loss.item() * world, step)
            bar.set_postfix(loss=f"{value:.3f}", seconds=f"{train_seconds + time.perf_counter() - start:.0f}")
        bar.update()
        if why := due(step, config, world, device):
            sync()
            train_seconds += time.perf_counter() - start
            progress = {"data_sha256": data_sha256, "step": step, "seconds": train_seconds, "waited": waited,
                        "pictures": pictures}
            save_state(log, why, progress, config, rank, model, muon, adam, loader)
            start = time.perf_counter()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    bar.close()
    finite(val_loss, step)

    # The result.
    seen = step * config.rows * config.row
    flops = flops_per_step(model, config, seen, pictures)
    footer = {"script": HERE.name, "task": "vlm", "track": config.track, "seed": config.seed,
              "world_size": world, "hardware": hardware(device), "precision": precision, "steps": step,
              "parameters": sum(p.numel() for p in model.parameters()), "tokens": seen, "pictures": pictures,
              "val_loss": round(val_loss, 5),
              **{f"accuracy_{name}": round(value, 4) for name, value in accuracy.items()},
              "target": config.target, "reached": val_loss <= config.target,
              "train_seconds": round(train_seconds, 3), "compile_seconds": round(compile_seconds, 1),
              "recompiles": graphs() - compiled, "loader_share": round(waited / max(train_seconds, 1e-9), 4),
              "tokens_per_second": round(seen / max(train_seconds, 1e-9)),
              "mfu": round(flops / max(train_seconds, 1e-9) / peak / world, 4),
              "matmul_peak_tflops": round(peak / 1e12, 2), "peak_memory_mib": round(peak_memory_mib(device)),
              "data_sha256": data_sha256, "eval_sha256": eval_sha256}
    if rank == 0:
        if config.save:
            save_checkpoint(ROOT / "checkpoints" / f"{log.run_id}.safetensors", model, config)
        words = Words(config.lm)
        with autocast(), torch.compiler.set_stance("force_eager"):  # every token of an answer is another shape
            footer.update(write_samples(model, config, words, frozen, ROOT / "samples"))
        footer["overrides"] = " ".join(f"--{key}={value}" for key, value in overrides.items()) or "none"
        for key, value in footer.items():
            log.say(f"{key}: {value}")
        with open(ROOT / "records" / "runs.jsonl", "a") as file:
            file.write(json.dumps({"run_id": log.run_id, **footer}) + "\n")
        if config.chat:
            with autocast(), torch.compiler.set_stance("force_eager"):
                chat(model, config, words)
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
