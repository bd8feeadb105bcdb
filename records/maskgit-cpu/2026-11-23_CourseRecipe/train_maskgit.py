"""The course's nanoMaskGIT: an encoder learns to fill in masked image tokens, given a class label.

Record #1 of maskgit-cpu, the public baseline (EPFL COM-304, after arXiv:2202.04200), at a size that trains in about ten
minutes on 2 CPU cores: pre-norm Transformer without biases, one mask vector, learned positions, AdamW, cosine schedule.

    python train_maskgit.py              # data from `python data/scenes.py --objects`
"""
import copy
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
    data: str = "data/objects64/train"  # made by `python data/scenes.py --objects`
    frozen: str = "data/frozen/objects64.npz"  # validation pictures
    frozen_masks: str = "data/frozen/eval_maskgit_64.npz"  # which of their tokens are masked
    # model
    dim: int = 192  # channels
    head_dim: int = 64
    depth: int = 4  # blocks
    # schedule
    num_steps: int = 2600
    batch: int = 64  # pictures a step, over all processes
    warmup: float = 0.1  # share of the steps
    lr: float = 8e-4  # peak: the course's 3e-4 at dim 512, scaled by width (arXiv:2203.03466)
    min_lr: float = 1e-6
    # optimizer
    weight_decay: float = 0.05
    clip: float = 1.0  # gradient norm
    # evaluation and output
    target: float = 0.0  # validation loss in nats a masked token; 0: this run is the one that defines it
    eval_every: int = 260  # steps between evaluations; the clock stands still
    eval_batch: int = 250
    load: str = ""  # checkpoint to start from
    save: bool = False  # write checkpoints/<run id>.safetensors at the end


CONFIGS = {"cpu": Config()}
ARCHITECTURE = ("dim", "head_dim", "depth")  # what a checkpoint must agree on


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

# --- copied: labelled rows ---
def read_rows(config):
    """Training tokens (N, L) int16, labels (N,), what meta.json says of both, and the sha256 of how they were made."""
    folder, make = ROOT / config.data, "python data/scenes.py --objects"
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
# --- end: labelled rows ---


class Loader:
    """Endless shuffled batches of tokens (batch, L) and labels (batch,), the same on every rank, all on the device."""

    def __init__(self, tokens, labels, batch, seed, device):
        self.tokens, self.labels, self.batch = tokens.to(device), labels.to(device), batch
        if batch > len(tokens):
            raise Fault(f"a batch of {batch} pictures is more than the {len(tokens)} there are")
        self.rng = torch.Generator(device).manual_seed(seed)
        self.order, self.next = torch.empty(0, dtype=torch.long, device=device), 0

    def __call__(self):
        if self.next + self.batch > len(self.order):
            self.order, self.next = torch.randperm(len(self.tokens), generator=self.rng, device=self.tokens.device), 0
        self.next += self.batch
        rows = self.order[self.next - self.batch:self.next]
        return self.tokens[rows].long(), self.labels[rows].long()


def draw_masks(B, L, rng):
    """m ~ U{1..L} of L places masked at random in each of B rows: (B, L) bool."""
    count = torch.randint(1, L + 1, (B, 1), generator=rng, device=rng.device)
    return torch.rand(B, L, generator=rng, device=rng.device).argsort(1).argsort(1) < count


# ------------------------------------------------------------------------------------------------------------
# Attention

def attend(q, k, v):
    """Softmax attention of q over k, v (B, H, T, D), all of which are seen."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v)
    # written out: torch 2.13's fused kernel is 3x slower on a CPU with AMX
    return ((q * q.size(-1) ** -0.5) @ k.mT).softmax(-1).type_as(v) @ v


# ------------------------------------------------------------------------------------------------------------
# Model

class Linear(nn.Linear):
    def __init__(self, inside, outside):
        super().__init__(inside, outside, bias=False)


def layer_norm(dim):
    return nn.LayerNorm(dim, eps=1e-6, bias=False)


class Attention(nn.Module):
    def __init__(self, dim, head_dim):
        super().__init__()
        self.head_dim = head_dim
        self.qkv, self.proj = Linear(dim, 3 * dim), Linear(dim, dim)

    def forward(self, x):
        heads = lambda y: y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(attend(heads(q), heads(k), heads(v)).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1, self.norm2 = layer_norm(config.dim), layer_norm(config.dim)
        self.attention = Attention(config.dim, config.head_dim)
        self.up, self.down = Linear(config.dim, 4 * config.dim), Linear(4 * config.dim, config.dim)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class MaskGIT(nn.Module):
    """Sequence: the label, then L image tokens, in one vocabulary; masked places hold a learned vector."""

    def __init__(self, config, modalities):
        super().__init__()
        self.colors, self.labels = modalities["rgb"]["vocab"], modalities["label"]["vocab"]
        self.length = modalities["rgb"]["length"]
        self.embed = nn.Embedding(self.colors + self.labels, config.dim)
        self.mask = nn.Parameter(torch.empty(config.dim))
        self.position = nn.Embedding(1 + self.length, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm, self.head = layer_norm(config.dim), Linear(config.dim, self.colors + self.labels)

    def sequence(self, tokens, labels):
        """Ids (B, 1 + L) of labels (B,) and tokens (B, L)."""
        return torch.cat([labels[:, None] + self.colors, tokens], 1)

    def forward(self, ids, masked):
        """Final states (B, T, C) for ids (B, T), those where masked (B, T) hidden."""
        x = torch.where(masked[..., None], self.mask, self.embed(ids)) + self.position.weight
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def init_weights(model):
    for name, p in model.named_parameters():
        if "norm" in name:
            nn.init.ones_(p)
        elif "head" in name:
            nn.init.zeros_(p)
        elif any(part in name for part in ("embed", "position", "mask", "attention", "up", "down")):
            nn.init.normal_(p, std=0.02)
        else:
            raise AssertionError(f"no initialisation for {name}")


# ------------------------------------------------------------------------------------------------------------
# Loss

def masked_nats(model, tokens, labels, masked):
    """Cross-entropy (n,) in nats of the n tokens (B, L) that masked (B, L) marks, given all others and labels (B,)."""
    ids = model.sequence(tokens, labels)
    y = model(ids, F.pad(masked, (1, 0)))[:, 1:][masked]
    return F.cross_entropy(model.head(y).float(), tokens[masked], reduction="none")


# ------------------------------------------------------------------------------------------------------------
# Sampling

@torch.no_grad()
def generate(model, labels, steps=12, temperature=1.0, seed=0):
    """Tokens (B, L) for labels (B,): all masked at first, the most confident kept, on a cosine schedule."""
    rng, B, L = torch.Generator(labels.device).manual_seed(seed), len(labels), model.length
    tokens, masked = torch.zeros(B, L, dtype=torch.long, device=labels.device), torch.ones(B, L, dtype=torch.bool)
    masked = masked.to(labels.device)
    for step in range(steps):
        left = int(L * math.cos(math.pi / 2 * (step + 1) / steps) + 1e-9) if step + 1 < steps else 0
        logits = model.head(model(model.sequence(tokens, labels), F.pad(masked, (1, 0)))[:, 1:]).float()
        p = (logits[..., :model.colors] / temperature).softmax(-1)
        drawn = torch.multinomial(p.flatten(0, 1), 1, generator=rng).view(B, L)
        confidence = p.gather(-1, drawn[..., None])[..., 0].masked_fill(~masked, math.inf)
        tokens = torch.where(masked, drawn, tokens)
        masked = confidence.argsort(1).argsort(1) < left
    return tokens


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

def make_optimizer(model, config):
    """AdamW; weight decay on matrices and embeddings, not on gains and the mask vector."""
    groups = [{"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": config.weight_decay},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


def learning_rate(step, config):
    """Linear warm-up, then a cosine from lr down to min_lr."""
    warmup = config.warmup * config.num_steps
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.num_steps - warmup)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (config.lr - config.min_lr)


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

def flops_per_picture(model, config):
    """Matmul FLOPs of a training step for one picture; backward is twice forward, half the places go to the head."""
    T, C = 1 + model.length, config.dim
    return 6 * (config.depth * T * (12 * C * C + 2 * T * C) + model.head.weight.numel() * T / 2)


def main(argv):
    config, overrides = read_config(argv)
    if config.num_steps < 0 or min(config.batch, config.eval_every, config.eval_batch) < 1:
        raise Fault("num_steps must be at least 0, batch, eval_every and eval_batch at least 1")
    if config.dim % config.head_dim:
        raise Fault(f"dim {config.dim} is not a multiple of head_dim {config.head_dim}")
    rank, world, device = setup()
    if config.batch % world:
        raise Fault(f"a batch of {config.batch} pictures cannot be divided among {world} processes")
    *frozen, modalities, eval_sha256 = read_frozen(config)
    frozen = [part.to(device) for part in frozen]
    tokens, labels, found, data_sha256 = read_rows(config) if config.num_steps else (None, None, modalities, "none")
    if found != modalities:
        raise Fault(f"{ROOT / config.data} has another vocabulary or length than the frozen validation set")
    torch.manual_seed(config.seed)
    model = MaskGIT(config, modalities).to(device)
    init_weights(model)
    if config.load:
        load_checkpoint(config.load, model, config)
    log = Log("maskgit", config, overrides, rank, device)
    peak = matmul_peak(device)
    optimizer = make_optimizer(model, config)
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    autocast = lambda: torch.autocast(device.type, torch.bfloat16)

    mine = slice(rank * config.batch // world, (rank + 1) * config.batch // world)

    def train_step(tokens, labels, rng, step):
        """One step on a global batch: this rank's part of its loss. The label may be masked too, as in the course."""
        ids = model.sequence(tokens, labels)
        masked = draw_masks(*ids.shape, rng)
        with autocast():
            y = model(ids[mine], masked[mine])[masked[mine]]
            nats = F.cross_entropy(model.head(y).float(), ids[mine][masked[mine]], reduction="sum")
            loss = nats / masked.sum()
        loss.backward()
        sum_gradients(model, world)
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.step()
        model.zero_grad(set_to_none=True)
        return loss.detach()

    # Warm-up on dummy data, untimed, then everything back to where it was.
    start = time.perf_counter()
    if config.num_steps:
        before, rng = copy.deepcopy(model.state_dict()), torch.Generator(device).manual_seed(0)
        dummy = torch.zeros(config.batch, model.length, dtype=torch.long, device=device)
        for i in range(5):
            train_step(dummy, dummy[:, 0], rng, i)
        model.load_state_dict(before)
        optimizer = make_optimizer(model, config)
    sync()
    compile_seconds = time.perf_counter() - start

    # The clock starts here.
    train_seconds, step = 0.0, 0
    start = time.perf_counter()
    loader = Loader(tokens, labels, config.batch, config.seed, device) if config.num_steps else None
    bar = tqdm(total=config.num_steps, disable=rank > 0, unit="step", dynamic_ncols=True)
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
        loss = train_step(*loader(), loader.rng, step)
        step += 1
        if step % 10 == 0:
            value = finite(loss.item() * world, step)
            bar.set_postfix(loss=f"{value:.3f}", seconds=f"{train_seconds + time.perf_counter() - start:.0f}")
        bar.update()
    bar.close()
    finite(val_loss, step)

    # The result.
    seen = step * config.batch * (1 + model.length)
    flops = step * config.batch * flops_per_picture(model, config)
    footer = {"script": HERE.name, "task": "maskgit", "track": config.track, "seed": config.seed,
              "world_size": world, "hardware": hardware(device), "steps": step,
              "parameters": sum(p.numel() for p in model.parameters()), "tokens": seen,
              "val_loss": round(val_loss, 5), "target": config.target, "reached": val_loss <= config.target,
              "train_seconds": round(train_seconds, 3), "compile_seconds": round(compile_seconds, 1),
              "tokens_per_second": round(seen / max(train_seconds, 1e-9)),
              "mfu": round(flops / max(train_seconds, 1e-9) / peak / world, 4),
              "matmul_peak_tflops": round(peak / 1e12, 2), "peak_memory_mib": round(peak_memory_mib(device)),
              "data_sha256": data_sha256, "eval_sha256": eval_sha256}
    if rank == 0:
        if config.save:
            save_checkpoint(ROOT / "checkpoints" / f"{log.run_id}.safetensors", model, config)
        sys.path.insert(0, str(ROOT / "data"))  # helpers that turn tokens into pictures, not needed while training
        import studio
        labels = torch.arange(model.labels, device=device).repeat_interleave(4)
        with autocast():
            made = studio.Studio(device).pictures(generate(model, labels)).cpu()
        import draw
        draw.sheet([list(row) for row in made.split(12)], ROOT / "samples" / "maskgit.png")
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
