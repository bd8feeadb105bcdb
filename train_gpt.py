"""GPT: a decoder-only Transformer learns to predict the next token of a stream: bytes, words, code or image tokens.

Record: gpt-cpu, val_loss <= 1.5, quality_known_words >= 0.9, quality_repeated_8grams <= 0.05 in 39.8 s on 1 x 2 cores
    of Intel(R) Xeon(R) Processor (AMX), torch 2.13.0+cpu (n=5).

After nanoGPT and modded-nanogpt: Muon, rotary positions, QK-norm, ReLU^2, zero-initialised projections, hashed
embeddings of the last few tokens, which row-wise Adagrad moves, and a second head for the token after the next one.
Times against the baseline, record #1, are in records/README.md.

    python train_gpt.py                                         # cpu track, data from `python data/shakespeare.py`
    torchrun --standalone --nproc_per_node=8 train_gpt.py       # the gpu track, data/fineweb.py
    python train_gpt.py --save=true                             # then --num_steps=0 --load=<checkpoint> --prompt=KING
    python train_gpt.py --help                                  # every field and what it may be
"""
import contextlib
import copy
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
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------------
# Config

@dataclass
class Config:
    # data
    track: str = "cpu"  # task and hardware that losses and times are compared on
    seed: int = 0  # of weights and batches
    data: str = "shakespeare"  # token streams in data/<name>, by data/<name>.py or text.py; scenes: scenes.py --objects
    # model
    dim: int = 64  # channels
    head_dim: int = 32  # channels per attention head
    depth: int = 1  # blocks
    mlp_ratio: int = 4  # hidden channels of an MLP per channel
    window: int = 64  # tokens that attention looks back, the current one included
    orders: int = 5  # one hashed embedding table per n-gram order 2..orders
    grams: int = 12288  # rows of such a table, shared by hashing
    frequent: int = 0  # first tokens, whose probabilities are always computed, those of others where needed; 0: all
    # optim
    muon_lr: float = 0.04  # of hidden matrices
    momentum: float = 0.95  # of Muon
    adam_lr: float = 0.05  # of embeddings and head
    table_lr: float = 0.5  # of the n-gram tables
    # schedule
    num_steps: int = 1650  # training steps
    batch: int = 64  # rows per step, over all processes
    micro_batch: int = 512  # of them that a process computes at a time
    context: int = 64  # tokens per row
    cooldown: float = 0.9  # share of the steps over which the learning rates fall to 0
    second_token: float = 0.2  # weight of the loss of the token after the next one; from half of the steps on it falls
    # eval
    target: float = 1.5  # validation loss to reach; 0: the track has not been opened
    eval_tokens: int = 327680  # of the validation stream
    eval_every: int = 550  # steps between evaluations; the clock is paused


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
    draft: str = ""  # checkpoint of a smaller model that guesses ahead
    ahead: int = 4  # tokens it guesses


CONFIGS = {
    "cpu": Config(),
    # Python; of its 8,192 tokens the head would take most of a step
    "cpu-code": Config(track="cpu-code", data="pycode", depth=2, orders=2, grams=65536, frequent=256, muon_lr=0.02,
                       adam_lr=0.1, table_lr=0.25, num_steps=1600, second_token=0.0, target=0.0, eval_tokens=163840,
                       eval_every=800),
    # GPT-2 small's size on FineWeb, to modded-nanogpt's target
    "gpu": Config(track="gpu", data="fineweb", dim=768, depth=12, window=1024, orders=2, grams=65536, batch=512,
                  micro_batch=32, context=1024, num_steps=3000, muon_lr=0.02, adam_lr=0.005, cooldown=0.7,
                  second_token=0.0, table_lr=0.05, head_dim=64, target=3.28, eval_tokens=10485760, eval_every=250),
}
# what a checkpoint must agree on
ARCHITECTURE = ("dim", "head_dim", "depth", "mlp_ratio", "window", "orders", "grams", "frequent")
LIMITS = {  # what a field may be: least and most, or choices; data/options.py has those that scripts share
    "dim": (2, 8192), "head_dim": (2, 256), "depth": (0, 96), "window": (1, 2 ** 31), "orders": (1, 64),
    "grams": (1, 2 ** 24), "frequent": (0, 2 ** 24), "batch": (1, 2 ** 16), "context": (1, 2 ** 16),
    "eval_tokens": (1, 2 ** 40), "sample_tokens": (1, math.inf), "top_p": (1e-6, 1), "ahead": (1, 64),
}


def check_config(config, run):
    """What fields may be together. Raises Fault for what they may not."""
    if config.dim % config.head_dim or config.head_dim % 2:
        raise Fault(f"--dim={config.dim} is not a multiple of --head_dim={config.head_dim}, or that is odd and rotary "
                    "positions turn pairs of channels")
    mine = run.slice(config.batch)
    rows = mine.stop - mine.start
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
# Muon

# --- copied: muon ---
POLAR = ((8.1566, -22.4833, 15.8788), (4.0429, -2.8089, 0.5000), (3.8917, -2.7725, 0.5061), (3.2858, -2.3681, 0.4645),
         (2.3465, -1.7098, 0.4232))  # Polar Express (arXiv:2505.16932), five steps


def orthogonalise(G, dtype=torch.bfloat16):
    """The nearest semi-orthogonal matrices of a stack (K, rows, columns), roughly; computed and given in dtype."""
    tall = G.size(1) > G.size(2)
    X = G.to(dtype)
    X = X.mT if tall else X
    X = X / (1.02 * X.norm(dim=(1, 2), keepdim=True) + 1e-6)
    for a, b, c in POLAR:
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A A: as one operator it takes half the time
        X = torch.baddbmm(X, B, X, beta=a)
    return X.mT if tall else X


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
            update = update[:len(params)].float()  # only now: in bfloat16 it is half as long a message
            torch._foreach_add_(params, update.unbind(), alpha=-lr * max(1, rows / columns) ** 0.5)

    def momentum_buffers(self):
        """The momentum of each stack, gathered: (matrices, rows, columns)."""
        return [self.gather(buffer)[0][:len(params)] for params, buffer in self.stacks]
# --- end: muon ---


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


# --- copied: schedule ---
def schedule(step, config):
    """Share of the peak learning rates: 1, then linearly down to 0."""
    return min(1.0, (1 - step / config.num_steps) / config.cooldown)
# --- end: schedule ---


class AdamWithTables(torch.optim.Adam):
    """Adam, and for the parameters of its last group Adagrad with one sum of squares per row: a step moves only those
    rows that its batch has looked up, and one that is rarely seen moves as far as any other."""

    @torch.no_grad()
    def step(self):
        *_, tables = self.param_groups
        for table in tables["params"]:
            if table.grad is None:  # without n-grams it is empty
                continue
            rows, values = self.looked_up(table.grad)
            if not self.state[table]:  # Adam's code asks for a step when a state is loaded
                self.state[table] = {"step": torch.zeros(()), "sum": torch.full_like(table[:, 0], 1e-12)}
            total = self.state[table]["sum"]
            total.index_add_(0, rows, values.square().mean(1))
            table.index_add_(0, rows, values * total[rows, None].rsqrt(), alpha=-tables["lr"])
            table.grad = None  # Adam passes it over
        super().step()

    @staticmethod
    def looked_up(grad):
        """The rows (N,) that a gradient is about and its values there (N, C)."""
        if grad.is_sparse:
            grad = grad.coalesce()
            return grad.indices()[0], grad.values()
        return torch.arange(len(grad), device=grad.device), grad


def make_optimizers(model, config, run):
    """Muon for the blocks' matrices, row-wise Adagrad for the n-gram tables, Adam for the rest; every parameter is in
    exactly one."""
    hidden, rest = [], []
    for name, p in model.named_parameters():
        if "blocks" in name and p.dim() == 2:
            hidden.append(p)
        elif "ngrams" not in name:
            rest.append(p)
    muon = Muon(hidden, config.momentum, run.rank, run.world, PRECISIONS[run.precision])
    groups = [{"params": rest, "peak": config.adam_lr},
              {"params": list(model.embed_ngrams.parameters()), "peak": config.table_lr}]
    return muon, AdamWithTables(groups, betas=(0.9, 0.95), fused=True)


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


# ------------------------------------------------------------------------------------------------------------
# Model

# --- copied: norm ---
def norm(x):
    return F.layer_norm(x, (x.size(-1),))  # one kernel on a CPU, rms_norm is many: in 4M 0.146 s per step, not 0.171


class Linear(nn.Linear):
    def __init__(self, inside, outside):
        super().__init__(inside, outside, bias=False)
# --- end: norm ---


def split_heads(x, head_dim):
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)  # (B, T, C) -> (B, H, T, D)


# --- copied: rotary ---
def apply_rotary(x, cos, sin):
    """Rotary positions (arXiv:2104.09864): pairs of channels of x (B, H, T, D) turn by angles; cos, sin (.., D / 2)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
# --- end: rotary ---


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        self.q, self.k, self.v, self.proj = (Linear(config.dim, config.dim) for _ in range(4))

    def forward(self, x, cos, sin, mask, append):
        q = apply_rotary(norm(split_heads(self.q(x), self.head_dim)), cos, sin)
        k = apply_rotary(norm(split_heads(self.k(x), self.head_dim)), cos, sin)
        k, v = append(k, split_heads(self.v(x), self.head_dim))
        return self.proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm block: attention, then a ReLU^2 MLP."""

    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config)
        self.up = Linear(config.dim, config.mlp_ratio * config.dim)
        self.down = Linear(config.mlp_ratio * config.dim, config.dim)

    def forward(self, x, cos, sin, mask, append):
        x = x + self.attention(norm(x), cos, sin, mask, append)
        return x + self.down(F.relu(self.up(norm(x))).square())


class Head(Linear):
    """Log-probabilities of a token given states (..., C), and the loss of the true one, which needs few of them.

    From token `frequent` on they are in clusters, each twice as large as the one before: a frequent token or a cluster
    is drawn, then a token of the cluster (adaptive softmax, arXiv:1609.04309). frequent 0: there are no clusters.
    """

    def __init__(self, C, vocab, frequent):
        frequent = frequent or vocab
        self.cuts = [frequent << i for i in range(16) if frequent << i < vocab]  # first tokens of the clusters
        super().__init__(C, len(self.cuts) + vocab)
        ends = [*self.cuts, vocab]
        self.sizes = [len(self.cuts) + ends[0], *(b - a for a, b in zip(ends, ends[1:]))]

    def logits(self, y, part):
        """float32 logits (..., size) of clusters and frequent tokens, part 0, or of the tokens of a cluster."""
        weight = self.weight.split(self.sizes)[part]
        if y.is_cuda:  # rows of 50,257 numbers are not aligned in memory, and GPUs multiply those slowly: 50,304 are
            weight = F.pad(weight, (0, 0, 0, -len(weight) % 128))
        return F.linear(y, weight)[..., :self.sizes[part]].float()

    def log_probs(self, y):
        """float32 (..., vocab) from states (..., C)."""
        first, n = self.logits(y, 0).log_softmax(-1), len(self.cuts)
        clusters = [first[..., i:i + 1] + self.logits(y, i + 1).log_softmax(-1) for i in range(n)]
        return torch.cat([first[..., n:], *clusters], -1)

    def nats(self, y, targets):
        """Cross-entropy, summed, of targets (N,) given states (N, C)."""
        cluster = sum((targets >= cut for cut in self.cuts), torch.zeros_like(targets))  # 0: a frequent token
        choice = torch.where(cluster == 0, len(self.cuts) + targets, cluster - 1)
        total = F.cross_entropy(self.logits(y, 0), choice, reduction="sum")
        for i, cut in enumerate(self.cuts, 1):
            rows = (cluster == i).nonzero()[:, 0]
            total = total + F.cross_entropy(self.logits(y[rows], i), targets[rows] - cut, reduction="sum")
        return total


class GPT(nn.Module):
    """Tokens in, log-probabilities of the next token out. The last 2, 3 .. tokens have embeddings of their own, hashed.

    sparse: gradients of their tables hold the rows that were looked up alone; several processes add up dense ones.
    """

    def __init__(self, config, meta, sparse=True):
        super().__init__()
        C, vocab = config.dim, meta["vocab"]
        self.window, self.document_start = config.window, meta["document_start"]
        self.orders, self.grams = config.orders, config.grams
        self.head_dim, self.mask_cache = config.head_dim, {}
        self.embed = nn.Embedding(vocab, C)
        self.embed_ngrams = nn.EmbeddingBag((self.orders - 1) * self.grams, C, mode="sum", sparse=sparse)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head = Head(C, vocab, config.frequent)
        self.head_second = Head(C, vocab, config.frequent)  # of the token after the next one; in training alone

    def embedding(self, tokens, start):
        """Embeddings (B, T - start, C) of the places of tokens (B, T) from start on."""
        code = tokens[:, start:]
        x = self.embed(code)
        rows = []
        for n in range(1, self.orders):
            earlier = F.pad(tokens, (n, 0))[:, start:tokens.size(1)]  # the token n places before
            code = (code * 0x5BD1E995 + earlier) % 0x7FFFFFFF  # hash of the last n + 1 tokens
            rows.append((n - 1) * self.grams + code % self.grams)
        if rows:
            x = x + self.embed_ngrams(torch.stack(rows, -1).flatten(0, 1)).view_as(x)
        return x

    def mask_mod(self, doc_ids, b, q, k):
        """Whether place q of row b sees place k: one of the last `window` tokens of its own document."""
        return (k <= q) & (q - k < self.window) & (doc_ids[b, q] == doc_ids[b, k])

    def mask(self, tokens, start=0, mask_cache=None):
        """For attend, of the places from start on of tokens (B, T); mask_cache: see make_mask.

        A document begins at each token of an id from document_start on; without, a row is one document.
        """
        if self.document_start is None:
            doc_ids = torch.zeros_like(tokens[:1])
        else:
            doc_ids = (tokens >= self.document_start).cumsum(1)
        return make_mask(self.mask_mod, doc_ids, start, mask_cache)

    def rotary(self, start, stop, device):
        """Cosine and sine (T, D / 2) of the rotary angles of places start .. stop - 1."""
        rate = 1024 ** -torch.linspace(0, 1, self.head_dim // 2, device=device)
        angle = torch.arange(start, stop, device=device)[:, None] * rate
        return angle.cos(), angle.sin()

    def forward(self, tokens, mask, start=0, appends=None):
        """Final states (B, T - start, C) of the places of tokens (B, T) from start on.

        appends: for each block a function from its new keys and values to all there are, those before start included.
        """
        x = norm(self.embedding(tokens, start))
        cos, sin = self.rotary(start, tokens.size(1), tokens.device)
        for block, append in zip(self.blocks, appends or [no_cache] * len(self.blocks)):
            x = block(x, cos, sin, mask, append)
        return norm(x)

    def log_probs(self, tokens):
        """float32 (B, T, vocab): at each place of tokens (B, T), of the next token."""
        return self.head.log_probs(self(tokens, self.mask(tokens, mask_cache=self.mask_cache)))


def init_weights(model):
    for name, p in model.named_parameters():
        if "proj" in name or "down" in name or "head" in name or "ngrams" in name:
            nn.init.zeros_(p)
        elif "embed" in name:
            nn.init.normal_(p)
        elif "attention" in name or "up" in name:
            nn.init.normal_(p, std=p.shape[1] ** -0.5)
        else:
            raise AssertionError(f"no initialisation for {name}")


# ------------------------------------------------------------------------------------------------------------
# Loss

def total_nats(model, tokens, targets, second):
    """Cross-entropy in nats, summed, of targets (B, T), each given the tokens (B, T) up to its place; and of the target
    after it, by a head of its own, times `second`: states that foretell more learn faster (arXiv:2404.19737)."""
    y = model(tokens, model.mask(tokens, mask_cache=model.mask_cache))
    nats = model.head.nats(y.flatten(0, 1), targets.flatten())
    if second == 0:
        return nats
    return nats + second * model.head_second.nats(y[:, :-1].flatten(0, 1), targets[:, 1:].flatten())


def train_step(step, inputs, targets, model, muon, adam, config, run):
    """One step on a global batch (batch, context): this rank's part of its loss."""
    mine = run.slice(config.batch)
    second = config.second_token * min(1.0, 2 - 2 * step / config.num_steps)
    total = 0.0
    for x, y in zip(inputs[mine].split(config.micro_batch), targets[mine].split(config.micro_batch)):
        with run.autocast():
            loss = total_nats(model, x, y, second) / inputs.numel()
        loss.backward()
        total += loss.detach()
    sum_gradients(adam, run.world)
    factor = schedule(step, config)
    muon.step(config.muon_lr * factor)
    for group in adam.param_groups:
        group["lr"] = group["peak"] * factor
    adam.step()
    model.zero_grad(set_to_none=True)
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


# --- copied: no cache ---
def no_cache(k, v):
    """For a block where nothing was read before: the new keys and values are all there are."""
    return k, v
# --- end: no cache ---


def read_tokens(model, tokens, cache=None):
    """Log-probabilities (B, new, V) after each of the tokens (B, T) that are not in the cache yet; then they are."""
    start = cache.length if cache else 0
    appends = cache.appends(len(model.blocks)) if cache else None
    return model.head.log_probs(model(tokens, model.mask(tokens, start), start, appends))


@torch.no_grad()
def generate(model, tokens, options, seed=0, cache=None):
    """Continue tokens (B, T): yields the next token (B, 1) of every row, options.sample_tokens times.

    cache: with a KVCache of data/kv_cache.py every token is read once, without one all of them for every new one.
    """
    rng = torch.Generator(tokens.device).manual_seed(seed)
    for _ in range(options.sample_tokens):
        logits = read_tokens(model, tokens, cache)[:, -1]
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
    """Matmul FLOPs of a training step per token, backward being twice forward; causal attention counts half, and of the
    head's clusters, which only their own tokens are multiplied with, nothing does."""
    hidden = sum(p.numel() for p in model.blocks.parameters()) + config.depth * config.context * config.dim
    heads = model.head.sizes[0] * config.dim * (1 + (config.second_token > 0))
    return 6 * (hidden + heads)


def main(argv):
    run = Run("gpt", argv)
    config = run.config
    check_config(config, run)
    shards, meta, run.data_sha256 = read_streams(config)
    val_tokens, digest = read_validation(config)
    rows = min(config.micro_batch, config.batch // run.world)
    run.choose_precision(rows * config.context, config.dim, config.mlp_ratio * config.dim)
    torch.manual_seed(config.seed)
    model = GPT(config, meta, sparse=run.world == 1).to(run.device)
    init_weights(model)
    if run.device.type == "cuda":  # block by block: all are one graph, made in seconds
        for block in model.blocks:
            block.compile(fullgraph=True, dynamic=False)
    run.prepare(model, meta=meta)
    val_tokens = val_tokens.to(run.device)

    if config.num_steps:
        with run.warm_up(model):
            muon, adam = make_optimizers(model, config, run)
            dummy = torch.zeros(config.batch, config.context, dtype=torch.long, device=run.device)
            for step in range(3):
                train_step(step, dummy, dummy, model, muon, adam, config, run)
            if run.device.type == "cuda":  # the evaluation's shapes are compiled too
                with run.autocast():
                    evaluate(model, val_tokens, meta["vocab"], config, run.rank, run.world)
    muon, adam = make_optimizers(model, config, run)

    run.start()
    if config.num_steps:
        loader = Loader(shards, config, run.device)
        step_flops = config.batch * config.context * flops_per_token(model, config)
    if run.options.resume:
        import_ours("checkpoints").load_state(run, model, muon, adam, loader)
    while True:
        last = run.step == config.num_steps
        if last or (run.step and run.step % config.eval_every == 0):
            with run.paused(), run.autocast():
                val_loss, numbers = evaluate(model, val_tokens, meta["vocab"], config, run.rank, run.world)
                run.evaluation(val_loss)
        if last:
            break
        inputs, targets = loader()
        loss = train_step(run.step, inputs, targets, model, muon, adam, config, run)
        run.progress(loss, inputs.numel(), step_flops)
        if run.saver:
            run.saver.after_step(model, muon, adam, loader)

    run.result(model, digest, numbers)
    run.show(model)


# --- copied: start ---
if __name__ == "__main__":
    try:
        record(main)(sys.argv[1:])
    except Fault as fault:
        sys.exit(f"{HERE.name}: {fault}")
# --- end: start ---
