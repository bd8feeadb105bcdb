"""A vision-language model: a picture and a question in, an answer out.

nanoVLM's recipe (github.com/huggingface/nanoVLM) from scratch: a SigLIP-like vision encoder, pixel shuffle, a linear
projector, a Llama-like language model, AdamW with two learning rates, every conversation padded to full length. This is
record #1, the public baseline. Its final frozen validation loss defines the track's target.

    python train_vlm.py                                         # cpu track, data from `python data/scenes.py --qa`
"""
import copy
import dataclasses
import functools
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
    side: int = 64  # pixels across
    patch: int = 8  # pixels across a patch
    vit_dim: int = 128  # channels
    vit_depth: int = 2  # blocks
    vit_heads: int = 2
    vit_mlp: int = 512
    shuffle: int = 2  # patches across that one token of the language model holds
    # language model
    lm_dim: int = 128
    lm_depth: int = 3
    lm_heads: int = 2
    lm_kv_heads: int = 1
    lm_mlp: int = 384
    rope_theta: float = 10000.0
    # schedule
    num_steps: int = 4800
    batch: int = 32  # conversations a step, over all processes
    warmup: float = 0.03  # share of the steps
    lr_min: float = 0.1  # of the peak rates, where the cosine ends
    # optimizer
    backbone_lr: float = 5e-4  # AdamW, for the two backbones; nanoVLM's are pretrained and take 1e-5
    projector_lr: float = 1e-3  # for the projector
    clip: float = 1.0  # gradient norm
    # evaluation and output
    target: float = 0.0  # validation loss in nats an answer token, record #1's
    eval_every: int = 600  # steps between evaluations; the clock stands still
    eval_batch: int = 100
    samples: int = 12  # validation pictures on the sheet
    load: str = ""  # checkpoint to start from
    save: bool = False  # write checkpoints/<run id>.safetensors at the end
    # sampling
    max_tokens: int = 24  # of an answer
    temperature: float = 0.0  # 0: always the likeliest token
    top_k: int = 0  # 0: all
    top_p: float = 1.0


CONFIGS = {
    "cpu": Config(),
    "gpu": Config(track="gpu", vit_dim=384, vit_depth=8, vit_heads=6, vit_mlp=1536, patch=4, lm_dim=512, lm_depth=8,
                  lm_heads=8, lm_kv_heads=4, lm_mlp=1408, batch=256, num_steps=6000, backbone_lr=5e-4),
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

IMAGE = -1  # stands in token rows where a picture's tokens go


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
    """Endless shuffled batches of conversations, padded to full length, the same on every rank.

    A batch is a dict: pixels (B, 3, S, S); tokens (B, T), a picture's places first, IMAGE there; answer (B, T).
    """

    def __init__(self, pixels, tokens, answer, image_tokens, config, device):
        self.batch, lead = config.batch, (image_tokens, 0)
        if self.batch > len(pixels):
            raise Fault(f"a batch of {self.batch} is more than the {len(pixels)} training examples there are")
        self.parts = {"pixels": pixels, "tokens": F.pad(tokens, lead, value=IMAGE), "answer": F.pad(answer, lead)}
        self.parts = {name: part.to(device) for name, part in self.parts.items()}
        self.rng = torch.Generator(device).manual_seed(config.seed)
        self.order, self.next = torch.empty(0, dtype=torch.long, device=device), 0

    def __call__(self):
        if self.next + self.batch > len(self.order):
            rows, device = len(self.parts["pixels"]), self.order.device
            self.order, self.next = torch.randperm(rows, generator=self.rng, device=device), 0
        self.next += self.batch
        rows = self.order[self.next - self.batch:self.next]
        return {name: part[rows] for name, part in self.parts.items()}


# ------------------------------------------------------------------------------------------------------------
# Attention

# --- copied: masks ---
flex, block_mask = torch.compile(flex_attention), torch.compile(create_block_mask)


def make_mask(mask_mod, B, M, N, device, dense=False):
    """A FlexAttention mask_mod(b, h, q, k) in the form attend takes: a BlockMask on CUDA, elsewhere or if dense the
    whole (B, 1, M, N), True where k may be seen."""
    if device.type == "cuda" and not dense:
        return block_mask(mask_mod, B, None, M, N, device=device)
    index = lambda n, *shape: torch.arange(n, device=device).view(shape)
    return mask_mod(index(B, -1, 1, 1, 1), 0, index(M, -1, 1), index(N, -1)).expand(B, 1, M, N)


def attend(q, k, v, mask=None):
    """Softmax attention of q (B, H, M, D) over k, v (B, H, N, D), mask from make_mask; None: all is seen."""
    if isinstance(mask, BlockMask):
        return flex(q, k, v, block_mask=mask)
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.size(-1) ** -0.5) @ k.mT  # written out: torch 2.13's fused kernel is 3x slower on a CPU with AMX
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
        self.side, self.shuffle = config.side, config.shuffle
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

    def mask(self, T, start=0, dense=False):
        """For attend: a token sees what came before it. What pads a row comes last: nothing that counts sees it."""
        device = self.project.weight.device
        return make_mask(lambda b, h, q, k: k <= q + start, 1, T - start, T, device, dense)

    def forward(self, tokens, pixels):
        """Final states (B, T, C) for tokens (B, T) with pictures pixels (n, 3, S, S)."""
        return self.lm(self.embed(tokens, pixels), self.mask(tokens.size(1)))


def init_weights(model):
    for name, p in model.named_parameters():
        if "norm" in name and "weight" in name:
            nn.init.ones_(p)
        elif "bias" in name:
            nn.init.zeros_(p)
        else:
            nn.init.normal_(p, std=0.02)


# ------------------------------------------------------------------------------------------------------------
# Loss

def answer_logits(model, tokens, answer, pixels):
    """Logits (n, V) of the n answer tokens that answer (B, T) marks, and these tokens (n,): each is predicted from the
    place before it."""
    marked = answer[:, 1:] > 0
    states = model(tokens, pixels)[:, :-1]
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
        cut = ranked.cumsum(-1) - ranked >= top_p  # the likeliest token always stays
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
        lm, T = self.model.lm, x.size(1)
        memories = [functools.partial(self.remember, i) for i in range(len(lm.layers))] if self.cached else None
        states = lm(x[:, self.read:], self.model.mask(T, self.read, dense=True), self.read, memories)
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


class Words:
    """Text to tokens and back, and the template."""

    def __init__(self):
        sys.path.insert(0, str(ROOT / "data"))
        import tokenizer
        ours = tokenizer.load_text(tokenizer.QA)
        self.encode, self.decode = ours.encode_ordinary, lambda ids: tokenizer.decode_text(ours, ids)
        self.stop = self.encode("\n")[-1]  # ends every answer

    def question(self, text):
        return self.encode(f"Question: {text} Answer:")


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
    lead = (model.image_tokens, 0)
    logits, truth = answer_logits(model, F.pad(tokens, lead, value=IMAGE), F.pad(answer, lead), pixels)
    return F.cross_entropy(logits, truth, reduction="none"), logits.argmax(-1) == truth


# ------------------------------------------------------------------------------------------------------------
# Optimizers

def make_optimizer(model, config):
    """AdamW with two learning rates: one for the backbones, one for the projector."""
    named = list(model.named_parameters())
    backbones, projector = ([p for name, p in named if name.startswith("project") == new] for new in (False, True))
    return torch.optim.AdamW([{"params": backbones, "peak": config.backbone_lr},
                              {"params": projector, "peak": config.projector_lr}], fused=True)


def rate(step, config):
    """Share of the peak learning rates: a linear warm-up, then a cosine down to lr_min."""
    warmup = config.warmup * config.num_steps
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / (config.num_steps - warmup)
    return config.lr_min + (1 - config.lr_min) * (1 + math.cos(math.pi * progress)) / 2


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

def flops(model, config, tokens, pictures, row):
    """Matmul FLOPs of training on so many tokens in rows of this length and pictures; backward is twice forward."""
    C, D, T = config.vit_dim, config.lm_dim, model.grid ** 2
    vit = T * (config.vit_depth * (4 * C * C + 2 * C * config.vit_mlp + 2 * T * C) + 3 * config.patch ** 2 * C + C * D)
    kv = D * config.lm_kv_heads // config.lm_heads
    lm = config.lm_depth * (2 * D * D + 2 * D * kv + 3 * D * config.lm_mlp + 2 * row * D)
    return 6 * (pictures * vit + tokens * lm)


def main(argv):
    config, overrides = read_config(argv)
    if config.num_steps < 0 or min(config.batch, config.eval_every, config.eval_batch) < 1:
        raise Fault("num_steps must be at least 0, batch, eval_every and eval_batch at least 1")
    if config.side % (config.patch * config.shuffle):
        raise Fault(f"{config.shuffle} patches of {config.patch} pixels do not tile pictures of {config.side} pixels")
    if config.vit_dim % config.vit_heads or config.lm_dim % (2 * config.lm_heads):
        raise Fault("vit_heads must divide vit_dim, and lm_heads half of lm_dim")
    if config.lm_heads % config.lm_kv_heads:
        raise Fault(f"{config.lm_kv_heads} key and value heads do not divide {config.lm_heads} heads")
    rank, world, device = setup()
    if config.batch % world:
        raise Fault(f"a batch of {config.batch} conversations cannot be divided among {world} processes")
    *frozen, about, eval_sha256 = read_frozen(config)
    pixels, tokens, answer, found, data_sha256 = read_conversations(config) if config.num_steps else \
        (None, None, None, about, "none")
    if found["vocab"] != about["vocab"]:
        raise Fault(f"{ROOT / config.data} has another vocabulary than the frozen validation set")
    frozen = [part.to(device) for part in frozen]
    torch.manual_seed(config.seed)
    model = VLM(config, about["vocab"]).to(device)
    init_weights(model)
    if config.load:
        load_checkpoint(config.load, model, config)
    log = Log("vlm", config, overrides, rank, device)
    peak = matmul_peak(device)
    adamw = make_optimizer(model, config)
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    autocast = lambda: torch.autocast(device.type, torch.bfloat16)

    mine = slice(rank * config.batch // world, (rank + 1) * config.batch // world)

    def train_step(batch, step):
        """One step on a global batch: this rank's part of its loss."""
        answers = (batch["answer"] > 0).sum()
        with autocast():
            logits, truth = answer_logits(model, **{name: part[mine] for name, part in batch.items()})
            loss = F.cross_entropy(logits, truth, reduction="sum") / answers
        loss.backward()
        sum_gradients(model, world)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for group in adamw.param_groups:
            group["lr"] = group["peak"] * rate(step, config)
        adamw.step()
        model.zero_grad(set_to_none=True)
        return loss.detach()

    # Warm-up on dummy data, untimed, then everything back to where it was.
    start = time.perf_counter()
    if config.num_steps:
        before = copy.deepcopy(model.state_dict())
        zeros = torch.zeros_like(pixels[:config.batch]), tokens[:config.batch] * 0, answer[:config.batch]
        dummy = Loader(*zeros, model.image_tokens, config, device)
        for i in range(5):
            train_step(dummy(), i)
        model.load_state_dict(before)
        adamw = make_optimizer(model, config)
    sync()
    compile_seconds = time.perf_counter() - start

    # The clock starts here.
    train_seconds, step = 0.0, 0
    start = time.perf_counter()
    loader = Loader(pixels, tokens, answer, model.image_tokens, config, device) if config.num_steps else None
    bar = tqdm(total=config.num_steps, disable=rank > 0, unit="step", dynamic_ncols=True)
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
        loss = train_step(loader(), step)
        step += 1
        if step % 10 == 0:
            value = finite(loss.item() * world, step)
            bar.set_postfix(loss=f"{value:.3f}", seconds=f"{train_seconds + time.perf_counter() - start:.0f}")
        bar.update()
    bar.close()
    finite(val_loss, step)

    # The result.
    pictures, row = step * config.batch, model.image_tokens + about["length"]
    seen = pictures * row
    work = flops(model, config, seen, pictures, row)
    footer = {"script": HERE.name, "task": "vlm", "track": config.track, "seed": config.seed,
              "world_size": world, "hardware": hardware(device), "steps": step,
              "parameters": sum(p.numel() for p in model.parameters()), "tokens": seen, "pictures": pictures,
              "val_loss": round(val_loss, 5),
              **{f"accuracy_{name}": round(value, 4) for name, value in accuracy.items()},
              "target": config.target, "reached": val_loss <= config.target,
              "train_seconds": round(train_seconds, 3), "compile_seconds": round(compile_seconds, 1),
              "tokens_per_second": round(seen / max(train_seconds, 1e-9)),
              "mfu": round(work / max(train_seconds, 1e-9) / peak / world, 4),
              "matmul_peak_tflops": round(peak / 1e12, 2), "peak_memory_mib": round(peak_memory_mib(device)),
              "data_sha256": data_sha256, "eval_sha256": eval_sha256}
    if rank == 0:
        if config.save:
            save_checkpoint(ROOT / "checkpoints" / f"{log.run_id}.safetensors", model, config)
        words = Words()
        with autocast():
            footer.update(write_samples(model, config, words, frozen, ROOT / "samples"))
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
