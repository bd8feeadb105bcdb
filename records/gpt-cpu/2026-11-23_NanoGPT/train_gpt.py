"""nanoGPT's recipe for a CPU: a character-level GPT on Shakespeare, next-byte prediction.

Record #1 of gpt-cpu, the public baseline (github.com/karpathy/nanoGPT, README, "I only have a macbook"): LayerNorm
without bias, GELU, learned positions, tied head, AdamW, cosine schedule, random windows of 64 bytes.

    python train_gpt.py                  # data from `python data/shakespeare.py`
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
    data: str = "shakespeare"  # token streams in data/<name>, made by data/<name>.py
    # model
    dim: int = 128  # channels
    head_dim: int = 32
    depth: int = 4  # blocks
    context: int = 64  # tokens
    # schedule
    num_steps: int = 2000
    batch: int = 12  # rows of `context` tokens a step, over all processes
    warmup: int = 100  # steps
    lr: float = 1e-3  # peak
    min_lr: float = 1e-4  # at the end of the cosine
    # optimizer
    beta2: float = 0.99
    weight_decay: float = 0.1
    clip: float = 1.0  # gradient norm
    # evaluation and output
    target: float = 0.0  # validation loss in nats a token; 0: this run is the one that defines it
    eval_tokens: int = 327680  # of the validation stream
    eval_context: int = 64  # tokens a prediction may look back
    eval_stride: int = 64  # tokens scored a window
    eval_batch: int = 256  # windows
    eval_every: int = 250  # steps between evaluations; the clock stands still
    sample_tokens: int = 1000
    load: str = ""  # checkpoint to start from
    save: bool = False  # write checkpoints/<run id>.safetensors at the end


CONFIGS = {"cpu": Config()}
ARCHITECTURE = ("dim", "head_dim", "depth", "context")  # what a checkpoint must agree on


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

# --- copied: streams ---
def read_bin(path):
    """The tokens of a .bin file in modded-nanogpt's format, a memory map (N,) uint16."""
    header = np.fromfile(path, np.int32, 256)
    if len(header) < 256 or header[0] != 20240520 or header[1] != 1:
        raise ValueError(f"{path.name} is not a .bin token file")
    if path.stat().st_size != 1024 + 2 * int(header[2]):
        raise ValueError(f"{path.name} should hold {header[2]} tokens and is {path.stat().st_size} bytes long")
    return np.memmap(path, np.uint16, "r", offset=1024, shape=(int(header[2]),))


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
# --- end: streams ---


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

def attend(q, k, v):
    """Causal softmax attention of q over k, v (B, H, T, D)."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


# ------------------------------------------------------------------------------------------------------------
# Model

class Linear(nn.Linear):
    def __init__(self, inside, outside):
        super().__init__(inside, outside, bias=False)


def layer_norm(dim):
    return nn.LayerNorm(dim, eps=1e-5, bias=False)


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
        self.up, self.proj = Linear(config.dim, 4 * config.dim), Linear(4 * config.dim, config.dim)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.proj(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, config, vocab):
        super().__init__()
        self.embed, self.position = nn.Embedding(vocab, config.dim), nn.Embedding(config.context, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = layer_norm(config.dim)

    def forward(self, tokens):
        """Logits (B, T, vocab) of the token after each of tokens (B, T)."""
        x = self.embed(tokens) + self.position.weight[:tokens.size(1)]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embed.weight)  # the head is tied


def init_weights(model):
    for name, p in model.named_parameters():
        if "norm" in name:
            nn.init.ones_(p)
        elif "proj" in name:
            nn.init.normal_(p, std=0.02 / math.sqrt(2 * len(model.blocks)))
        elif "embed" in name or "position" in name or "qkv" in name or "up" in name:
            nn.init.normal_(p, std=0.02)
        else:
            raise AssertionError(f"no initialisation for {name}")


# ------------------------------------------------------------------------------------------------------------
# Loss

def token_nats(model, tokens, targets):
    """Cross-entropy (B, T) in nats of targets (B, T), each given the tokens (B, T) up to its place."""
    logits = model(tokens).float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


# ------------------------------------------------------------------------------------------------------------
# Sampling

@torch.no_grad()
def generate(model, tokens, new_tokens, context, temperature=1.0, top_k=0, seed=0):
    """Continue tokens (B, T) by new_tokens, one at a time, each given the last `context`; top_k 0: all."""
    rng = torch.Generator(tokens.device).manual_seed(seed)
    for _ in range(new_tokens):
        logits = model(tokens[:, -context:])[:, -1].float() / temperature
        if top_k:
            logits[logits < logits.topk(min(top_k, logits.size(-1)))[0][:, -1:]] = -math.inf
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1, generator=rng)], 1)
    return tokens


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

def make_optimizer(model, config):
    """AdamW; weight decay on matrices and embeddings, not on gains."""
    groups = [{"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": config.weight_decay},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2))


def learning_rate(step, config):
    """Linear warm-up, then a cosine from lr down to min_lr."""
    if step < config.warmup:
        return config.lr * (step + 1) / (config.warmup + 1)
    progress = min(1.0, (step - config.warmup) / max(1, config.num_steps - config.warmup))
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

def flops_per_token(model, config):
    """Matmul FLOPs of a training step a token, backward being twice forward; causal attention counts half."""
    hidden = config.depth * (12 * config.dim ** 2 + config.context * config.dim)
    return 6 * (hidden + model.embed.weight.numel())


def main(argv):
    config, overrides = read_config(argv)
    if config.num_steps < 0 or min(config.batch, config.eval_every, config.eval_batch, config.context) < 1:
        raise Fault("num_steps must be at least 0, batch, context, eval_every and eval_batch at least 1")
    if config.dim % config.head_dim:
        raise Fault(f"dim {config.dim} is not a multiple of head_dim {config.head_dim}")
    if not 1 <= config.eval_stride <= config.eval_context <= config.context:
        raise Fault("1 <= eval_stride <= eval_context <= context must hold: there are no more positions")
    rank, world, device = setup()
    if config.batch % world:
        raise Fault(f"a batch of {config.batch} rows cannot be divided among {world} processes")
    tokens, meta, data_sha256 = read_streams(config)
    val_tokens, eval_sha256 = read_validation(config)
    val_tokens = val_tokens.to(device)
    torch.manual_seed(config.seed)
    model = GPT(config, meta["vocab"]).to(device)
    init_weights(model)
    if config.load:
        load_checkpoint(config.load, model, config)
    log = Log("gpt", config, overrides, rank, device)
    peak = matmul_peak(device)
    optimizer = make_optimizer(model, config)
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    mine = slice(rank * config.batch // world, (rank + 1) * config.batch // world)

    def train_step(inputs, targets, step):
        """One step on a global batch (batch, context): this rank's part of its loss."""
        loss = token_nats(model, inputs[mine], targets[mine]).mean() / world
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
        before = copy.deepcopy(model.state_dict())
        dummy = torch.zeros(config.batch, config.context, dtype=torch.long, device=device)
        for i in range(5):
            train_step(dummy, dummy, i)
        model.load_state_dict(before)
        optimizer = make_optimizer(model, config)
    sync()
    compile_seconds = time.perf_counter() - start

    # The clock starts here.
    train_seconds, step, val_loss = 0.0, 0, math.nan
    start = time.perf_counter()
    loader = Loader(tokens, config, device)
    bar = tqdm(total=config.num_steps, disable=rank > 0, unit="step", dynamic_ncols=True)
    while True:
        last = step == config.num_steps
        if last or (step % config.eval_every == 0 and step):
            sync()
            train_seconds += time.perf_counter() - start
            model.eval()
            val_loss = evaluate(model, val_tokens, config, rank, world)
            model.train()
            log.say(f"step:{step}/{config.num_steps} val_loss:{val_loss:.4f} train_time:{1000 * train_seconds:.0f}ms "
                    f"step_avg:{1000 * train_seconds / max(1, step):.2f}ms")
            if last:
                break
            sync()
            start = time.perf_counter()
        loss = train_step(*loader(), step)
        step += 1
        if step % 10 == 0:
            value = finite(loss.item() * world, step)
            bar.set_postfix(loss=f"{value:.3f}", seconds=f"{train_seconds + time.perf_counter() - start:.0f}")
        bar.update()
    bar.close()
    finite(val_loss, step)

    # The result.
    seen = step * config.batch * config.context
    footer = {"script": HERE.name, "task": "gpt", "track": config.track, "seed": config.seed,
              "world_size": world, "hardware": hardware(device), "steps": step,
              "parameters": sum(p.numel() for p in model.parameters()), "tokens": seen,
              "val_loss": round(val_loss, 5), "target": config.target, "reached": val_loss <= config.target,
              "train_seconds": round(train_seconds, 3), "compile_seconds": round(compile_seconds, 1),
              "tokens_per_second": round(seen / max(train_seconds, 1e-9)),
              "mfu": round(flops_per_token(model, config) * seen / max(train_seconds, 1e-9) / peak / world, 4),
              "matmul_peak_tflops": round(peak / 1e12, 2), "peak_memory_mib": round(peak_memory_mib(device)),
              "data_sha256": data_sha256, "eval_sha256": eval_sha256}
    if rank == 0:
        model.eval()
        start = torch.full((1, 1), 10, device=device)  # a line feed, as nanoGPT's sample.py
        text = generate(model, start, config.sample_tokens, config.context, temperature=0.8, top_k=200)[0].tolist()
        (ROOT / "samples" / "gpt.txt").write_bytes(bytes(text))
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
