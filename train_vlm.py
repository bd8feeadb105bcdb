"""A vision-language model: a picture and a question in, an answer out.

Record: vlm-cpu, val_loss <= 0.06, accuracy_questions >= 0.9, accuracy_count >= 0.8, accuracy_exist >= 0.8,
    accuracy_attribute >= 0.8, accuracy_compare >= 0.8, accuracy_spatial >= 0.8, quality_describe_f1 >= 0.9 in 172.5 s
    on 1 x 2 cores of Intel(R) Xeon(R) Processor (AMX), torch 2.13.0+cpu (n=5).

After nanoVLM (github.com/huggingface/nanoVLM): a SigLIP-like vision encoder, pixel shuffle, a linear projector and a
Llama-like language model; made fast: conversations packed into rows without padding, words and image tokens asked in
training for the objects that they refer to and for what stands beside these, rotary rows and columns, Muon,
zero-initialised projections, compiled blocks. Times against the baseline, record #1, are in records/README.md.

    python train_vlm.py                                         # cpu track, data from `python data/scenes.py --qa`
    python train_vlm.py --load=checkpoints/vlm.safetensors --num_steps=0 --chat=photo.png    # ask about a picture
    python train_vlm.py --vit=google/siglip-base-patch16-224 --lm=HuggingFaceTB/SmolLM2-135M   # pretrained backbones
    python train_vlm.py --help                                  # every field and what it may be
"""
import base64
import contextlib
import copy
import ctypes
import functools
import hashlib
import importlib
import json
import math
import os
import platform
import re
import sys
import time
import zipfile
import zlib
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
    seed: int = 0  # of weights and order
    data: str = "data/qa64/train"  # made by data/scenes.py --qa
    frozen: str = "data/frozen/qa64.npz"  # validation pictures, questions and answers
    # vision encoder
    vit: str = ""  # pretrained SigLIP on the hub, or a folder; empty: from scratch, in this size
    side: int = 64  # pixels across, pictures are resized to it
    patch: int = 8  # pixels across a patch
    vit_dim: int = 128  # channels
    vit_depth: int = 2  # blocks
    vit_heads: int = 4  # attention heads
    vit_mlp: int = 512  # hidden channels of an MLP
    shuffle: int = 2  # patches across that one token of the language model holds
    # language model
    lm: str = ""  # pretrained Llama on the hub, or a folder; empty: from scratch, in this size
    lora: int = 0  # rank of what is trained of both, beside frozen matrices (arXiv:2106.09685); 0: they are trained
    lm_dim: int = 128  # channels
    lm_depth: int = 4  # blocks
    lm_heads: int = 4  # attention heads
    lm_kv_heads: int = 2  # heads of keys and values, which several attention heads share
    lm_mlp: int = 384  # hidden channels of an MLP
    rope_theta: float = 10000.0  # longest wavelength of the rotary positions, divided by 2 pi
    # optim
    muon_lr: float = 0.015  # of hidden matrices
    momentum: float = 0.9  # of Muon
    adam_lr: float = 0.005  # of embeddings, gains and biases
    backbone_lr: float = 1e-5  # AdamW's of both backbones, if any is pretrained
    projector_lr: float = 1e-3  # AdamW's of the projector, then
    # loss
    grounding: float = 1.0  # weight of what words and image tokens refer to, asked of their states in training alone
    grounded_at: int = 2  # blocks of the language model before these states
    related_at: int = 3  # and before those that are asked what stands left of an object, right, behind or in front
    question_weight: float = 5.0  # of an answer's tokens, where those of a description weigh 1
    described: float = 0.33  # share of conversations that keep their description: without it more of them fit in a step
    singles: float = 0.4  # share of conversations about a single object that are drawn: they have the least to tell
    # schedule
    num_steps: int = 750  # training steps
    batch: int = 40  # rows per step, over all processes
    micro_batch: int = 512  # of them that a process computes at a time
    seq_len: int = 128  # tokens per row, of several conversations
    cooldown: float = 0.7  # share of the steps over which the learning rates fall to 0
    # eval
    target: float = 0.06  # validation loss to reach; 0: the track has not been opened
    eval_every: int = 150  # steps between evaluations; the clock is paused


@dataclass
class Options:
    """What a run is asked to do, beside the tuned numbers."""
    precision: str = "auto"  # of matrix products; auto measures which is faster
    load: str = ""  # checkpoint to start from, or hf:owner/name[@revision]; paths are relative to the repository
    save: bool = False  # write checkpoints/<run id>.safetensors at the end
    save_every: int = 0  # steps between saved states to resume from; 0: only at SIGTERM and Ctrl-C
    resume: str = ""  # saved state to resume from
    log_to: str = "none"  # where losses go at evaluations as well: trackio, wandb or tensorboard
    samples: int = 12  # validation pictures on the sheet; 0: no sheet
    quality_pictures: int = 1000  # validation pictures that are described for the quality number; 0: none
    chat: str = ""  # picture to ask about in the terminal, after training
    max_tokens: int = 48  # tokens per answer at most
    temperature: float = 0.0  # of drawn tokens; 0: always the likeliest
    top_k: int = 0  # likeliest tokens to draw from; 0: all
    top_p: float = 1.0  # draw from the fewest tokens that hold this probability


CONFIGS = {
    "cpu": Config(),
    "gpu": Config(track="gpu", data="data/qa64-large/train", vit_dim=384, vit_depth=8, vit_heads=6, vit_mlp=1536,
                  patch=4, lm_dim=512, lm_depth=8, lm_heads=8, lm_kv_heads=4, lm_mlp=1408, batch=64, seq_len=1024,
                  grounded_at=4, related_at=6, num_steps=3000, target=0.0, eval_every=250),
}
ARCHITECTURE = ("side", "patch", "shuffle", "vit_dim", "vit_depth", "vit_heads", "vit_mlp", "lm_dim", "lm_depth",
                "lm_heads", "lm_kv_heads", "lm_mlp", "rope_theta")  # what a checkpoint must agree on
LIMITS = {  # what a field may be: least and most, or choices; data/options.py has those that scripts share
    "side": (1, 2048), "patch": (1, 256), "vit_dim": (1, 8192), "vit_depth": (1, 96), "vit_heads": (1, 256),
    "vit_mlp": (1, 65536), "shuffle": (1, 64), "lm_dim": (2, 8192), "lm_depth": (1, 96), "lm_heads": (1, 256),
    "lm_kv_heads": (1, 256), "lm_mlp": (1, 65536), "rope_theta": (1, math.inf), "lora": (0, 1024), "batch": (1, 4096),
    "grounding": (0, 1000), "grounded_at": (1, 96), "related_at": (1, 96), "question_weight": (0.001, 1000),
    "described": (0, 1), "singles": (0.01, 1),
    "seq_len": (1, 65536), "max_tokens": (1, 4096), "temperature": (0, 100), "top_p": (0.001, 1),
    "quality_pictures": (0, 2000),
}


def check_config(config, run):
    """What fields may be together. Raises Fault for what they may not."""
    run.slice(config.batch)  # can it be divided among the processes?
    if config.side % (config.patch * config.shuffle):
        raise Fault(f"--shuffle={config.shuffle} patches of --patch={config.patch} pixels do not tile pictures of "
                    f"--side={config.side} pixels")
    if config.vit_dim % config.vit_heads:
        raise Fault(f"--vit_dim={config.vit_dim} is not a multiple of --vit_heads={config.vit_heads}")
    if config.lm_dim % (2 * config.lm_heads):
        raise Fault(f"--lm_dim={config.lm_dim} is not a multiple of twice --lm_heads={config.lm_heads}")
    if config.lm_heads % config.lm_kv_heads:
        raise Fault(f"--lm_heads={config.lm_heads} is not a multiple of --lm_kv_heads={config.lm_kv_heads}")
    for name in ("grounded_at", "related_at"):
        if config.num_steps and config.grounding and not config.lm and getattr(config, name) > config.lm_depth:
            raise Fault(f"--{name}={getattr(config, name)} is beyond the last of --lm_depth={config.lm_depth} blocks")
    if config.lora and not (config.vit and config.lm):
        raise Fault(f"--lora={config.lora} leaves both backbones as they are: it needs --vit= and --lm=")


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

IMAGE, PAD = -1, -2  # stand in token rows where a picture's tokens go, and after a row of a pretrained model's tokens


def read_conversations(config, about):
    """Training pictures, a memory map (N, 3, S, S) uint8, tokens (N, L), answer marks (N, L), and
    their sha256. about: what the validation set says of its tokens."""
    digest = "none"
    if not STANDALONE:
        digest = import_ours("checks").check_conversations(sys.modules[__name__], config, about)
    pixels, qa, answer = (np.load(ROOT / config.data / f"{m}.npy", "r") for m in ("pixels", "qa", "answer"))
    return pixels, torch.from_numpy(qa.astype(np.int64)), torch.from_numpy(np.array(answer)), digest


def measure(tokens, pad, config):
    """How many tokens each conversation of tokens (N, L) takes, its picture's included: a list."""
    image_tokens = (config.side // config.patch // config.shuffle) ** 2
    lengths = (image_tokens + (tokens != pad).sum(1)).tolist()
    if max(lengths) > config.seq_len:
        raise Fault(f"--seq_len={config.seq_len} is too short: a conversation has {max(lengths)} tokens, "
                    f"{image_tokens} of them its picture's")
    return lengths


VALUES = "small large gray red blue green brown purple cyan yellow rubber metal cube sphere cylinder".split()
SHAPES, THINGS = set(VALUES[-3:]), {"thing", "object"}  # the nouns: one of them ends a phrase
KNOWN = set(VALUES)
PLACE = re.compile(r"x=(\d\d?) y=(\d\d?)")  # in percent; before it stand an object's four values and "at"
CELLS, OBJECTS = 8, 3  # columns and rows of places there are, objects of a scene at most
SIDES = {"left": (0, -1), "right": (0, 1), "behind": (1, -1), "front": (1, 1)}  # along x or y, down or up
MARGIN = 100 / CELLS / 2  # percent by which an object must be on a side
TOLD = len(VALUES) + 2 * CELLS + OBJECTS + 1  # what is told: values, columns, rows, how many objects
# what a state is asked for: what is referred to, what is on each side of it, what on the side that was spoken of
ASKED = np.array([1, *[0.5 / len(SIDES)] * len(SIDES), 0.5])  # and how much that weighs
REFERS = 1 << OBJECTS  # bit that a place refers to something, if only to no object


def read_words():
    """{token: word} of our encoding of conversations."""
    pairs = [line.split() for line in (ROOT / "data" / "frozen" / "qa.tiktoken").read_text().splitlines()]
    return {int(rank): base64.b64decode(token).decode(errors="replace").strip() for token, rank in pairs}


def find_referents(tokens, answer, words, image_tokens):
    """What is referred to in conversations of tokens (N, L), each a word or a part of one, with answer marks (N,
    L), as their own descriptions tell: objects (N, 3, 6), the values, column and row of each; refers (N,
    image_tokens + L, len(ASKED)), 0 where a place is not asked, else REFERS and a bit for each object; described (N,),
    the number of the turn that is a description, 0 where there is none or no other.

    An image token refers to the object that stands there and is asked for all four sides of it; a word of a phrase
    such as "left of the large red cube" refers to all objects that fit the phrase so far, and if that is one, the last
    word is asked for the side. Conversations without a description, such as users' own, refer to nothing.
    """
    across = math.isqrt(image_tokens)
    objects = np.zeros((len(tokens), OBJECTS, 6), np.int64)
    refers = np.zeros((len(tokens), image_tokens + tokens.size(1), len(ASKED)), np.uint8)
    described = np.zeros(len(tokens), np.int64)
    for row, (ids, marks) in enumerate(zip(tokens.tolist(), answer.tolist())):
        said = [words.get(i, "") for i in ids]
        ends = [i for i in range(5, len(said))
                if marks[i] and PLACE.fullmatch(said[i]) and KNOWN.issuperset(said[i - 5:i - 1])][:OBJECTS]
        known = [set(said[i - 5:i - 1]) for i in ends]
        places = [[int(number) for number in PLACE.fullmatch(said[i]).groups()] for i in ends]

        def beside(k, axis, sign):
            away = [sign * (place[axis] - places[k][axis]) for place in places]
            return REFERS + sum(1 << j for j in range(len(places)) if away[j] > MARGIN)

        for k, (i, (x, y)) in enumerate(zip(ends, places)):
            objects[row, k] = [*map(VALUES.index, said[i - 5:i - 1]), len(VALUES) + x * CELLS // 100,
                               len(VALUES) + CELLS + y * CELLS // 100]
            here = refers[row, y * across // 100 * across + x * across // 100]
            here[0] |= REFERS | 1 << k
            here[1:-1] = [beside(k, *side) for side in SIDES.values()]
        if ends and len({0, *marks}) > 2:
            described[row] = marks[ends[0]]
        phrase, side = set(), None
        for here, word, mark in zip(refers[row, image_tokens:], said if known else (), marks):
            word = word.removesuffix("s")
            side = None if mark else SIDES.get(word, side)
            if mark or word not in VALUES and word not in THINGS:
                phrase = set()
                continue
            phrase |= {word} - THINGS
            fits = [k for k, values in enumerate(known) if phrase <= values]
            here[0] = REFERS + sum(1 << k for k in fits)
            if word in SHAPES | THINGS:
                phrase = set()
                if side and len(fits) == 1:
                    here[-1] = beside(*fits, *side)
    return objects, refers, described


class Loader:
    """Endless steps of shuffled conversations, packed into rows without padding between them, the same on every rank.

    A step is a dict: tokens (rows, T), IMAGE where a picture's tokens go and the pad at a row's end; answer (rows, T);
    document (rows, T), which conversation of the step a token belongs to; places (m,) of answer tokens in all rows of a
    micro-batch, one after another, and their weights (m,); grounded (g,), where what is asked: place * len(ASKED) +
    which; refers (g,) to which of the objects (g, 3, 6), as find_referents gives them, and shares (g,), what it weighs:
    ASKED divided by how often that is asked in the whole step; pixels (n, 3, S, S) in reading order; part_answers,
    part_grounded and part_pictures, how many of the places, grounded ones and pixels a micro-batch has; and of all
    ranks together the sum of the weights and how many pictures there are.
    The CPU puts rows together, so that no step has to wait for a GPU to say how many of what there are.
    """

    def __init__(self, pixels, tokens, answer, pad, config, run):
        self.batch, self.seq_len, self.rows = config.batch, config.seq_len, run.slice(config.batch)
        self.micro_batch = config.micro_batch
        self.pad, self.device = pad, run.device
        lengths = measure(tokens, pad, config)
        image_tokens = lengths[0] - int((tokens[0] != pad).sum())
        self.pixels = pixels.to(run.device)
        words = {} if config.lm else read_words()  # a pretrained model's tokens are not ours
        self.objects, self.refers, described = find_referents(tokens, answer, words, image_tokens)
        self.tokens = F.pad(tokens, (image_tokens, 0), value=IMAGE).numpy()
        self.answer = F.pad(answer, (image_tokens, 0)).numpy()
        answered = (self.answer[:, :-1] > 0) & (self.answer[:, 1:] != self.answer[:, :-1])
        turn = 1 + np.pad(answered.cumsum(1), ((0, 0), (1, 0)))  # (N, image_tokens + L), that a place belongs to
        describes = turn == described[:, None]
        describes[:, :image_tokens] = False
        self.weights = np.where(describes, 1, config.question_weight).astype(np.float32) * (self.answer > 0)
        kept = np.concatenate([np.ones_like(describes), ~describes])  # (2 N, ..), all, then all without descriptions
        self.places = [np.flatnonzero(row[:length]) for row, length in zip(kept, 2 * lengths)]
        self.weight_sums = (np.tile(self.weights, (2, 1)) * kept).sum(1)
        self.asked = (np.tile(self.refers > 0, (2, 1, 1)) & kept[..., None]).sum(1)  # (2 N, len(ASKED)), how often
        single = (self.objects > 0).any(2).sum(1) == 1
        self.drawn = torch.from_numpy(np.where(single, config.singles, 1))
        self.described = config.described
        self.rng = torch.Generator().manual_seed(config.seed)
        self.pending = []  # conversations to come, the next one last
        self.pictures = 0  # so far

    def plan(self):
        """Conversations of a step and where they begin, [(conversation, row, start)]: of the next 16 always the longest
        that fits. From N on they are those without their description."""
        plan = []
        row, start = 0, 0
        while row < self.batch:
            while len(self.pending) < 16:
                order = torch.randperm(len(self.tokens), generator=self.rng)
                order = order[torch.rand(len(order), generator=self.rng) < self.drawn[order]]
                order += len(self.tokens) * (torch.rand(len(order), generator=self.rng) >= self.described)
                self.pending = order.tolist() + self.pending
            fits = [i for i in range(-16, 0) if start + len(self.places[self.pending[i]]) <= self.seq_len]
            if fits:
                longest = max(fits, key=lambda i: len(self.places[self.pending[i]]))
                chosen = self.pending.pop(longest)
                plan.append((chosen, row, start))
                start += len(self.places[chosen])
            else:
                row += 1
                start = 0
        return plan

    def send(self, array):
        """An array on the device; from pinned memory, so that Python goes on meanwhile."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor

    def __call__(self):
        plan = self.plan()
        self.pictures += len(plan)
        own = [step for step in plan if self.rows.start <= step[1] < self.rows.stop]
        packed = np.empty((3, self.rows.stop - self.rows.start, self.seq_len), np.int64)
        packed[:] = np.array([self.pad, 0, -1])[:, None, None]
        weights = np.zeros(packed.shape[1:], np.float32)
        refers = np.zeros((*packed.shape[1:], len(ASKED)), np.uint8)
        for i, (chosen, row, start) in enumerate(own):
            kept = self.places[chosen]
            inside = row - self.rows.start, slice(start, start + len(kept))
            taken = chosen % len(self.tokens), kept
            packed[0][inside] = self.tokens[taken]
            packed[1][inside] = self.answer[taken]
            packed[2][inside] = i
            refers[inside] = self.refers[taken]
            weights[inside] = self.weights[taken]
        tokens, answer, document = packed
        (part, places), (grounded_part, grounded) = (
            np.divmod(np.flatnonzero(marked), self.micro_batch * marked[0].size) for marked in (answer, refers))
        picture_part = [(row - self.rows.start) // self.micro_batch for _, row, _ in own]
        parts = -(-len(tokens) // self.micro_batch)
        chosen = np.array([chosen for chosen, _, _ in own]) % len(self.tokens)
        row, place, asked = refers.nonzero()
        whole = [chosen for chosen, _, _ in plan]
        shares = ASKED / self.asked[whole].sum(0).clip(1)
        arrays = {"tokens": tokens, "answer": answer, "document": document, "places": places,
                  "weights": weights[answer > 0], "grounded": grounded, "refers": refers[row, place, asked],
                  "objects": self.objects[chosen[document[row, place]]], "shares": shares[asked].astype(np.float32)}
        return {**{name: self.send(array) for name, array in arrays.items()},
                "pixels": self.pixels[self.send(chosen)],
                "part_answers": np.bincount(part, minlength=parts).tolist(),
                "part_grounded": np.bincount(grounded_part, minlength=parts).tolist(),
                "part_pictures": np.bincount(picture_part, minlength=parts).tolist(),
                "weight": self.weight_sums[whole].sum().item(), "pictures": len(plan)}

    def state_dict(self):
        return {"rng": self.rng.get_state(), "pending": list(self.pending), "pictures": self.pictures}

    def load_state_dict(self, state):
        self.rng.set_state(state["rng"])
        self.pending, self.pictures = state["pending"], state["pictures"]


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


def make_optimizers(model, config, run):
    """Muon for the blocks' matrices and the projector, Adam for the rest; of pretrained backbones AdamW for all."""
    if config.vit or config.lm:
        return None, import_ours("backbones").make_adamw(model, config)
    hidden, rest = [], []
    for name, p in model.named_parameters():
        is_hidden = p.ndim == 2 and ("layers" in name or name.startswith("project"))
        (hidden if is_hidden else rest).append(p)
    muon = Muon(hidden, config.momentum, run.rank, run.world, PRECISIONS[run.precision])
    return muon, torch.optim.Adam([{"params": rest, "peak": config.adam_lr}], betas=(0.9, 0.95), fused=True)


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


def may_see(doc_ids, b, q, k):
    """Whether place q of row b sees place k: what came before it in its document, and of a picture all. doc_ids (B, T):
    twice the document, plus 1 at a picture's tokens."""
    q_id, k_id = doc_ids[b, q], doc_ids[b, k]
    same_doc = q_id >> 1 == k_id >> 1
    causal = k <= q
    both_image = q_id & k_id & 1 > 0
    return same_doc & (causal | both_image)


# --- copied: rotary ---
def apply_rotary(x, cos, sin):
    """Rotary positions (arXiv:2104.09864): pairs of channels of x (B, H, T, D) turn by angles; cos, sin (.., D / 2)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
# --- end: rotary ---


# ------------------------------------------------------------------------------------------------------------
# Model

def split_heads(x, n):
    return x.unflatten(-1, (n, -1)).transpose(1, 2)  # (B, T, C) -> (B, H, T, D)


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
        q = split_heads(self.q_proj(y), self.heads)
        k = split_heads(self.k_proj(y), self.heads)
        v = split_heads(self.v_proj(y), self.heads)
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
        C, kv_dim = config.lm_dim, config.lm_dim // config.lm_heads * config.lm_kv_heads
        Linear = functools.partial(nn.Linear, bias=False)
        self.heads, self.kv_heads = config.lm_heads, config.lm_kv_heads
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(C, eps=1e-5), nn.RMSNorm(C, eps=1e-5)
        self.q_proj, self.o_proj = Linear(C, C), Linear(C, C)
        self.k_proj, self.v_proj = Linear(C, kv_dim), Linear(C, kv_dim)
        self.gate_proj, self.up_proj = Linear(C, config.lm_mlp), Linear(C, config.lm_mlp)
        self.down_proj = Linear(config.lm_mlp, C)

    def forward(self, x, cos, sin, mask, append):
        """x (B, T, C); append: from the new keys and values (B, H, T, D) to all there are."""
        y = self.input_layernorm(x)
        q = apply_rotary(split_heads(self.q_proj(y), self.heads), cos, sin)
        k = apply_rotary(split_heads(self.k_proj(y), self.kv_heads), cos, sin)
        k, v = append(k, split_heads(self.v_proj(y), self.kv_heads))
        k = k.repeat_interleave(self.heads // self.kv_heads, 1)
        v = v.repeat_interleave(self.heads // self.kv_heads, 1)
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

    def forward(self, x, mask, positions, appends=None):
        """States (B, T, C) after each block, the last ones normed, of embeddings x (B, T, C) at positions (B, T, 2).
        appends: one per block."""
        rate = self.theta ** -torch.linspace(0, 1, self.head_dim // 2 + 1, device=x.device)[:-1]
        turns = positions.repeat(1, 1, len(rate))[..., :len(rate)]  # row, column, row, column ..
        angle = (turns * rate)[:, None]  # (B, 1, T, D / 2)
        cos, sin = angle.cos(), angle.sin()
        states = []
        for layer, append in zip(self.layers, appends or [no_cache] * len(self.layers)):
            x = layer(x, cos, sin, mask, append)
            states.append(x)
        return [*states[:-1], self.norm(x)]

    def logits(self, y):
        """float32 logits (..., vocab) from final states (..., C)."""
        return F.linear(y, self.embed_tokens.weight).float()


class VLM(nn.Module):
    def __init__(self, config, vocab):
        super().__init__()
        self.side, self.shuffle = config.side, config.shuffle
        self.mask_cache = {}  # of block_mask
        self.grid = config.side // config.patch  # patches across
        self.image_tokens = (self.grid // config.shuffle) ** 2
        self.vit, self.lm = Vit(config), Llama(config, vocab)
        self.project = nn.Linear(config.vit_dim * config.shuffle ** 2, config.lm_dim, bias=False)
        self.ground = nn.Linear(config.lm_dim, len(ASKED) * TOLD, bias=False)  # in training alone
        self.pretrained = bool(config.lm)

    def encode_images(self, pixels):
        """Tokens (n, image_tokens, C) of pictures (n, 3, S, S) of bytes, whatever their size."""
        pictures = pixels.float() / 127.5 - 1
        if pictures.size(-1) != self.side:
            pictures = F.interpolate(pictures, (self.side, self.side), mode="bicubic", antialias=True)
        states = self.vit(pictures).mT.unflatten(2, (self.grid, self.grid))  # (n, C, grid, grid)
        return self.project(F.pixel_unshuffle(states, self.shuffle).flatten(2).mT)

    def embed(self, tokens, pixels):
        """Embeddings (B, T, C) of tokens (B, T), the tokens of pixels (n, 3, S, S) in order where they say IMAGE."""
        x = self.lm.embed_tokens(tokens.clamp(min=0))
        images = self.encode_images(pixels).flatten(0, 1).type_as(x)
        # as many places as tokens of images: masked_scatter would wait for the device to count them, in its backward
        places = (tokens == IMAGE).flatten().int().argsort(descending=True, stable=True)[:len(images)]
        return x.flatten(0, 1).index_copy(0, places, images).view_as(x)

    def mask(self, document, image, start=0, mask_cache=None):
        """For attend, of the places from start on of documents (B, T), image (B, T) True at a picture's tokens."""
        return make_mask(may_see, 2 * document.long() + image, start, mask_cache)

    def positions(self, image):
        """Rotary positions (B, T, 2) of rows with image (B, T) True at a picture's tokens: the place in the row, twice;
        of a picture's token the place of its first plus row and column (after M-RoPE, arXiv:2409.12191). A pretrained
        language model knows places alone."""
        place = torch.arange(image.size(1), device=image.device).expand_as(image)
        if self.pretrained:
            return torch.stack([place, place], 2)
        inside = (image.cumsum(1) - 1) % self.image_tokens * image
        across = self.grid // self.shuffle
        return torch.stack([place - inside + inside // across, place - inside + inside % across], 2)

    def forward(self, tokens, document, pixels):
        """States (B, T, C) after each block for tokens (B, T) of documents (B, T) with pictures pixels (n, 3, S, S)."""
        image = tokens == IMAGE
        mask = self.mask(document, image, mask_cache=self.mask_cache)
        return self.lm(self.embed(tokens, pixels), mask, self.positions(image))

    def log_probs(self, pixels, tokens):
        """float32 (B, L, vocab): at each place of tokens (B, L), of the token there, given those before it and, before
        them all, a picture of pixels (B, 3, S, S)."""
        tokens = F.pad(tokens, (self.image_tokens, 0), value=IMAGE)
        document = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(tokens)
        return self.lm.logits(self(tokens, document, pixels)[-1][:, self.image_tokens - 1:-1]).log_softmax(-1)


def init_weights(model):
    for name, p in model.named_parameters():
        if "norm" in name:
            nn.init.constant_(p, 0.0 if "bias" in name else 1.0)
        elif "bias" in name or "o_proj" in name or "fc2" in name or "down_proj" in name:
            nn.init.zeros_(p)
        elif "position_embedding" in name:
            nn.init.normal_(p, std=0.2)  # about as much as patches; 0.02: 0.407 instead of 0.392 after 200 steps
        elif "embed_tokens" in name or "ground" in name:
            nn.init.normal_(p, std=0.02)
        elif "proj" in name or "fc1" in name or "patch_embedding" in name:
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
        else:
            raise AssertionError(f"no initialisation for {name}")


# ------------------------------------------------------------------------------------------------------------
# Loss

def answer_loss(model, states, tokens, places, weights):
    """Cross-entropy, each times its weight, summed over the tokens at some places (n,) of tokens (B, T), row after row:
    each is predicted from the final states (B, T, C) at the place before it."""
    logits = model.lm.logits(states.flatten(0, 1).index_select(0, places - 1))
    return (F.cross_entropy(logits, tokens.flatten()[places], reduction="none") * weights).sum()


def grounding_loss(model, states, related, grounded, refers, objects, shares):
    """Cross-entropy, weighed by shares (n,), of what is asked at grounded (n,) of states (B, T, C), and of later states
    related (B, T, C) the last of ASKED: how many objects, and values, column and row of each, all of these equally
    likely. refers (n,) and objects (n, 3, 6) as the Loader gives them."""
    place, asked = grounded // len(ASKED), grounded[:, None] % len(ASKED)
    early, late = (each.flatten(0, 1).index_select(0, place) for each in (states, related))
    states = torch.where(asked == len(ASKED) - 1, late, early)  # (n, C)
    told = model.ground(F.rms_norm(states, states.shape[-1:])).unflatten(1, (len(ASKED), TOLD))
    logs = told.take_along_dim(asked[..., None], 1)[:, 0].float().log_softmax(-1)  # (n, TOLD)
    fits = refers[:, None] >> torch.arange(OBJECTS, device=refers.device) & 1  # (n, 3)
    number = fits.sum(1, keepdim=True)
    nats = -logs.gather(1, objects.flatten(1)).unflatten(1, (OBJECTS, -1)).sum(2)  # (n, 3)
    nats = (nats * fits).sum(1) - logs.gather(1, len(VALUES) + 2 * CELLS + number)[:, 0]
    return (nats / (objects.size(2) * number[:, 0] + 1) * shares).sum()


def train_step(step, batch, model, muon, adam, config, run):
    """One step on this rank's rows: its part of the loss."""
    total = 0.0
    sizes = {"tokens": config.micro_batch, "document": config.micro_batch, "pixels": batch["part_pictures"],
             "places": batch["part_answers"], "weights": batch["part_answers"], "grounded": batch["part_grounded"],
             "refers": batch["part_grounded"], "objects": batch["part_grounded"],
             "shares": batch["part_grounded"]}  # of the parts of each tensor
    parts = zip(*(batch[name].split(size) for name, size in sizes.items()))
    for tokens, document, pixels, places, weights, *grounding in parts:
        with run.autocast():
            states = model(tokens, document, pixels)
            loss = answer_loss(model, states[-1], tokens, places, weights) / batch["weight"]
            if config.grounding and sum(batch["part_grounded"]):
                middle = states[config.grounded_at - 1], states[config.related_at - 1]
                loss = loss + config.grounding * grounding_loss(model, *middle, *grounding)
        loss.backward()
        total += loss.detach()
    sum_gradients(adam, run.world)
    factor = schedule(step, config)
    if muon:
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


# --- copied: no cache ---
def no_cache(k, v):
    """For a block where nothing was read before: the new keys and values are all there are."""
    return k, v
# --- end: no cache ---


def next_logits(model, x, cache=None):
    """Logits (B, V) of what follows embeddings x (B, T, C), a picture's first. What a cache holds is not computed."""
    B, T, _ = x.shape
    image = (torch.arange(T, device=x.device) < model.image_tokens).expand(B, T)
    start = cache.length if cache else 0
    appends = cache.appends(len(model.lm.layers)) if cache else None
    mask = model.mask(torch.zeros_like(image, dtype=torch.long), image, start)
    return model.lm.logits(model.lm(x[:, start:], mask, model.positions(image)[:, start:], appends)[-1][:, -1])


# --- copied: answer ---
@torch.no_grad()
def generate(model, pixels, tokens, stop, options, seed=0, cache=None):
    """Answer tokens (a list, without the stop) to a picture (3, S, S) of bytes and the tokens (a list) of questions.

    cache: with a KVCache of data/kv_cache.py every token is read once, without one all of them for every new one.
    """
    device = model.project.weight.device
    rng = torch.Generator(device).manual_seed(seed)
    row = torch.tensor([[IMAGE] * model.image_tokens + tokens], device=device)
    x = model.embed(row, pixels[None].to(device))  # (1, T, C)
    answer = []
    for _ in range(options.max_tokens):
        logits = next_logits(model, x, cache)
        if options.temperature == 0:
            new = logits.argmax(-1, keepdim=True)
        else:
            drawn = sharpen(logits, options.temperature, options.top_k, options.top_p).softmax(-1)
            new = torch.multinomial(drawn, 1, generator=rng)
        if new.item() == stop:
            break
        answer.append(new.item())
        x = torch.cat([x, model.lm.embed_tokens(new).type_as(x)], 1)
    return answer
# --- end: answer ---


# ------------------------------------------------------------------------------------------------------------
# Evaluation

# --- frozen: eval ---
FAMILIES = ("count", "exist", "attribute", "compare", "spatial", "describe")  # numbered from 1 on
EVAL_BATCH, EVAL_VALUES = 100, 2 ** 26  # conversations at a time, fewer if that makes more log-probabilities


def eval_sha256(*paths):
    """One hash of this block and of the files that it reads."""
    code = HERE.read_text().partition("# --- " "frozen:")[2].partition("# --- " "end:")[0]
    return hashlib.sha256(b"".join([code.encode(), *(Path(path).read_bytes() for path in paths)])).hexdigest()


def read_frozen(config):
    """Validation pictures (n, 3, S, S) uint8, tokens (n, L), answer marks (n, L), which are 0 or the number of the turn
    that is answered, families (n, turns), what is known of the tokens, and the sha256 of it all."""
    path = ROOT / config.frozen
    if not path.exists():
        raise Fault(f"{path} is missing: it belongs to the repository (`git checkout {config.frozen}`)")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            about = json.loads(bytes(arrays["modalities"]))["qa"]
            pixels, tokens, answer, family = (torch.from_numpy(arrays[m].astype(kind)) for m, kind in (
                ("pixels", np.uint8), ("qa", np.int64), ("answer", np.uint8), ("family", np.uint8)))
        if answer.max() > family.size(1) or family.max() > len(FAMILIES) or not answer.any(1).all():
            raise ValueError("answers without a turn, turns of unknown families or conversations without answers")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise Fault(f"the frozen validation set is damaged ({error}): `git checkout data/frozen`") from None
    return pixels, tokens, answer, family, about, eval_sha256(path)


def fingerprint(model):
    """Shape, sum and absolute sum of every parameter and buffer."""
    tensors = [tensor.double() for tensor in (*model.parameters(), *model.buffers())]
    return [(tensor.shape, tensor.sum().item(), tensor.abs().sum().item()) for tensor in tensors]


def target_log_probs(model, pixels, tokens, targets, counted, vocab):
    """What the model gives the N targets (B, L) where counted (B, L), each after its picture and the tokens (B, L)
    before it: log-probabilities (N,), and whether it is the likeliest token (N,). Raises Fault for another shape or
    dtype, for a log-probability that is not finite, and where a place's do not sum to 1."""
    logs = model.log_probs(pixels.clone(), tokens.clone())
    if logs.shape != (*tokens.shape, vocab) or logs.dtype != torch.float32:
        raise Fault(f"log_probs gives {logs.dtype} {tuple(logs.shape)}, not float32 {(*tokens.shape, vocab)}")
    logs, targets = logs[counted], targets[counted]  # (N, vocab), (N,)
    found = logs.gather(1, targets[:, None])[:, 0]
    if not found.isfinite().all():
        raise Fault("a log-probability that counts is not finite")
    if ((logs.exp().sum(1) - 1).abs() > 1e-3).any():
        raise Fault("the probabilities of a place do not sum to 1")
    return found, logs.argmax(1) == targets


def check_again(model, pixels, tokens, counted, nats, part, vocab):
    """Predict a part of the conversations, of known nats (n, L), a second time. Meanwhile every token of the set is
    another one, and so are the inputs of every second conversation from a random answer token on, which no place up to
    it and no other conversation may notice: else raises Fault."""
    kept, marks, place = tokens.clone(), counted[part], torch.arange(tokens.size(1), device=tokens.device)
    tokens.add_(1).remainder_(vocab)
    rng = torch.Generator().manual_seed(0)
    first_changed = torch.multinomial(marks.float().cpu(), 1, generator=rng).to(tokens.device)  # (B, 1)
    first_changed[1::2] = len(place)
    inputs = torch.where(place < first_changed, kept[part], tokens[part])
    logs, _ = target_log_probs(model, pixels[part], inputs, kept[part], marks, vocab)
    if ((logs + nats[part][marks]).abs() > 1e-3)[(place <= first_changed)[marks]].any():
        raise Fault("a prediction is another one where only tokens differ that it may not depend on")
    tokens.copy_(kept)


@torch.no_grad()
def evaluate(model, pixels, tokens, answer, family, vocab, rank, world):
    """Mean cross-entropy in nats over answer tokens, of a vocabulary, each given its picture and the tokens before it:
    over those of descriptions and over all others, half and half. And further numbers for the footer: both halves, and
    for each family, and for all but descriptions, the share of answers whose every token is the likeliest one.

    model.log_probs(pixels (B, 3, S, S), tokens (B, L)) has one conversation in each row and gives float32
    (B, L, vocab): at each place, of the token there. It is checked by target_log_probs and check_again; the model's
    tensors must be the same afterwards. Ranks share the conversations; all get the result.
    """
    before, (n, L), counted = fingerprint(model), tokens.shape, answer > 0
    batch = max(1, min(EVAL_BATCH, EVAL_VALUES // (L * vocab)))
    parts = [slice(i, i + batch) for i in range(rank * batch, n, world * batch)]
    total = torch.zeros(3, n, L, dtype=torch.float64, device=tokens.device)  # of each token: nats, wrong, predicted
    for part in parts:
        logs, right = target_log_probs(model, pixels[part], tokens[part], tokens[part], counted[part], vocab)
        total[:, part][:, counted[part]] += torch.stack([-logs, ~right, torch.ones_like(logs)])
    for part in parts[:1]:
        check_again(model, pixels, tokens, counted, total[0], part, vocab)
    if fingerprint(model) != before:
        raise Fault("the model's parameters or buffers are not what they were before the evaluation")
    if world > 1:
        dist.all_reduce(total)
    nats, wrong, predicted = total
    if (predicted != counted).any():
        raise Fault(f"{int(predicted.sum())} answer tokens were predicted, and there are {int(counted.sum())}")
    described = family.long().gather(1, (answer.long() - 1).clamp(min=0)) == len(FAMILIES)  # (n, L)
    halves = {"questions": counted & ~described, "describe": counted & described}
    losses = {name: nats[half].mean().item() for name, half in halves.items() if half.any()}
    numbers = {f"val_loss_{name}": round(loss, 5) for name, loss in losses.items()}
    wrong_in_turn = wrong.new_zeros(n, 1 + family.size(1)).scatter_add(1, answer.long(), wrong)[:, 1:]
    for number, name in enumerate(FAMILIES, 1):
        solved = wrong_in_turn[family == number] == 0
        numbers[f"accuracy_{name}"] = round(solved.double().mean().item(), 4) if len(solved) else 0.0
    asked = (family > 0) & (family < len(FAMILIES))
    if asked.any():
        numbers["accuracy_questions"] = round((wrong_in_turn == 0)[asked].double().mean().item(), 4)
    numbers |= {"eval_targets": int(counted.sum())}
    return sum(losses.values()) / len(losses), numbers
# --- end: eval ---


# ------------------------------------------------------------------------------------------------------------
# Training

def flops_per_step(model, config, pictures):
    """Matmul FLOPs of a training step with so many pictures; backward is twice forward."""
    C, D, patches = config.vit_dim, config.lm_dim, model.grid ** 2
    vit_block = 4 * C * C + 2 * C * config.vit_mlp + 2 * patches * C
    vit = patches * (config.vit_depth * vit_block + 3 * config.patch ** 2 * C + C * D)
    kv_dim = D * config.lm_kv_heads // config.lm_heads
    lm = config.lm_depth * (2 * D * D + 2 * D * kv_dim + 3 * D * config.lm_mlp + 2 * config.seq_len * D)
    return 6 * (pictures * vit + config.batch * config.seq_len * lm)


def main(argv):
    run = Run("vlm", argv)
    config = run.config
    keep_memory()
    backbones = None
    if config.vit or config.lm:
        backbones = import_ours("backbones").Backbones(run.script, config)
        config = run.config = backbones.config  # in their sizes
    check_config(config, run)
    if not STANDALONE:
        import_ours("checks").check_archives(run.script, config.frozen)
    *frozen, about, digest = read_frozen(config)
    vocab, pad = about["vocab"], about["pad"]
    if config.num_steps:
        pixels, tokens, answer, run.data_sha256 = read_conversations(config, about)
    if config.lm:  # its own tokens
        vocab, pad = backbones.vocab, PAD
        frozen[1:3] = backbones.convert(*frozen[1:3])
        if config.num_steps:
            tokens, answer = backbones.convert(tokens, answer)
    if config.num_steps:
        measure(tokens, pad, config)
    rows = min(config.micro_batch, config.batch // run.world)
    run.choose_precision(rows * config.seq_len, config.lm_dim, config.lm_mlp)
    torch.manual_seed(config.seed)
    model = VLM(config, vocab).to(run.device)
    init_weights(model)
    if backbones:
        backbones.load(model)
    run.prepare(model, frozen=frozen, backbones=backbones)
    if config.lora:
        import_ours("backbones").add_lora(model, config.lora)
    # 465 ms per step instead of 526, in float32 on 2 cores with AVX512
    if STANDALONE or import_ours("machine").compiler_works(run):
        for block in (*model.vit.layers, *model.lm.layers):
            block.compile(fullgraph=True)
    frozen = [part.to(run.device) for part in frozen]

    if config.num_steps:
        with run.warm_up(model):
            muon, adam = make_optimizers(model, config, run)
            dummy = torch.zeros(len(tokens[:1000]), *pixels.shape[1:], dtype=torch.uint8)
            loader = Loader(dummy, tokens[:1000], answer[:1000], pad, config, run)
            for step in range(5):
                batch = loader()
                batch["tokens"] = batch["tokens"].clamp(max=0)  # no token but the first
                train_step(step, batch, model, muon, adam, config, run)
            if run.device.type == "cuda":  # its shapes are compiled too
                with run.autocast():
                    evaluate(model, *frozen, vocab, run.rank, run.world)
    muon, adam = make_optimizers(model, config, run)

    run.start()
    loader = None
    if config.num_steps:
        loader = Loader(torch.from_numpy(np.array(pixels)), tokens, answer, pad, config, run)
    if run.options.resume:
        import_ours("checkpoints").load_state(run, model, muon, adam, loader)
    while True:
        last = run.step == config.num_steps
        if last or (run.step and run.step % config.eval_every == 0):
            with run.paused(), run.autocast():
                val_loss, numbers = evaluate(model, *frozen, vocab, run.rank, run.world)
                run.evaluation(val_loss)
        if last:
            break
        batch = loader()
        loss = train_step(run.step, batch, model, muon, adam, config, run)
        run.progress(loss, config.batch * config.seq_len, flops_per_step(model, config, batch["pictures"]))
        if run.saver:
            run.saver.after_step(model, muon, adam, loader)

    if config.lora:
        import_ours("backbones").merge_lora(model)
    run.result(model, digest, {"pictures": loader.pictures if loader else 0, **numbers})
    run.show(model)


# --- copied: start ---
if __name__ == "__main__":
    try:
        record(main)(sys.argv[1:])
    except Fault as fault:
        sys.exit(f"{HERE.name}: {fault}")
# --- end: start ---
