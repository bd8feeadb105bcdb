"""nano4M: one encoder-decoder learns to predict any subset of eight modalities from any other.

Record: 4m-cpu, val_loss <= 1.7, quality_normal_degrees <= 3.0, quality_desc_f1 >= 0.9, quality_rgb_from_desc_f1 >= 0.8,
    quality_rgb_from_caption_f1 >= 0.7 in 164.9 s on 1 x 2 cores of AMD EPYC (AVX512-BF16), torch 2.13.0+cpu (n=5).

After 4M (arXiv:2312.06647) and the nano4M of EPFL's course COM-304, made fast: a step links one modality to others, all
of whose tokens it asks for; targets start from what is known of their cell; Muon, image tokens embedded and predicted
as two digits, QK-norm, ReLU^2, zero-initialised projections.

    python train_4m.py                                          # the cpu track, data from `python data/scenes.py`
    torchrun --standalone --nproc_per_node=8 train_4m.py        # the gpu track
    python train_4m.py --help                                   # every field and what it may be
"""
import contextlib
import copy
import dataclasses
import hashlib
import importlib
import json
import math
import os
import platform
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
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------------
# Config

@dataclass
class Config:
    # data
    track: str = "cpu"  # task and hardware that losses and times are compared on
    seed: int = 0  # of weights, order and masks
    data: str = "data/scenes64/train"  # aligned shards, made by data/scenes.py
    frozen: str = "data/frozen/scenes64.npz"  # validation scenes
    frozen_masks: str = "data/frozen/eval_4m_64.npz"  # their inputs and targets
    pads: bool = False  # in training the padding of a text is input and target like its tokens, as in the course
    # model
    dim: int = 96  # channels
    head_dim: int = 32  # channels per attention head
    enc_depth: int = 2  # encoder blocks
    dec_depth: int = 2  # decoder blocks
    mlp_ratio: int = 4  # hidden channels of an MLP per channel
    dec_self: bool = False  # in the decoder the targets of a modality attend to each other too, as in 4M
    shard: bool = False  # divide the blocks among the processes by FSDP2: for what one GPU cannot hold
    recompute: bool = False  # of a divided block keep what enters it alone; the backward pass computes the rest again
    # optim
    muon_lr: float = 0.02  # of hidden matrices
    momentum: float = 0.9  # of Muon
    adam_lr: float = 0.01  # of embeddings and heads
    # schedule
    num_steps: int = 1500  # training steps
    word_steps: int = 300  # of them the first, in which only words and rgb are linked
    batch: int = 64  # scenes per step, over all processes
    micro_batch: int = 512  # of them that a process computes at a time
    budget: int = 128  # input tokens per scene of a course step at most: it has 1/8, 2/8 .. 8/8 of it
    image_targets: int = 32  # target tokens of pictures per scene of a course step
    text_targets: int = 32  # target tokens of texts and boxes per scene of a course step
    cooldown: float = 0.7  # share of the steps over which the learning rates fall to 0
    # eval
    target: float = 1.7  # validation loss to reach; 0: the track has not been opened
    eval_every: int = 500  # steps between evaluations; the clock is paused


@dataclass
class Options:
    """What a run is asked to do, beside the tuned numbers."""
    precision: str = "auto"  # of matrix products; auto measures which is faster
    load: str = ""  # checkpoint to start from, or hf:owner/name[@revision]; paths are relative to the repository
    save: bool = False  # write checkpoints/<run id>.safetensors at the end
    save_every: int = 0  # steps between saved states to resume from; 0: only at SIGTERM and Ctrl-C
    resume: str = ""  # saved state to resume from
    log_to: str = "none"  # where losses go at evaluations as well: trackio, wandb or tensorboard
    quality_scenes: int = 1000  # frozen scenes that the quality numbers are taken on; 0: none


CONFIGS = {
    "cpu": Config(),
    # the course's size: dim 512, 6 + 6 blocks, global batch 512, 256-token images
    "gpu": Config(track="gpu", data="data/scenes128/train", frozen="data/frozen/scenes128.npz",
                  frozen_masks="data/frozen/eval_4m_128.npz", dim=512, enc_depth=6, dec_depth=6, batch=512,
                  micro_batch=256, adam_lr=0.005, target=0.0, eval_every=250),
    # the course's own data, of data/course.py; links to texts ask for 512 of 50,304 words per scene: few at a time
    "course": Config(track="course", data="data/course/train", frozen="data/course/val.npz",
                     frozen_masks="data/course/val.npz", pads=True, dim=512, head_dim=64, enc_depth=6, dec_depth=6,
                     batch=512, micro_batch=32, image_targets=64, text_targets=64, num_steps=38147, adam_lr=0.005,
                     target=0.0, eval_every=2000),
}
# What steps teach in turn: modalities given and asked, or None, any tokens from any others, as the course masks. A link
# costs 10,000 to 20,000 scenes that ask for all of it, whatever else is learned. Word steps take the first ones alone:
# beside normals and depth, which teach where objects are, nothing teaches hue.
LINKS = ((("rgb",), ("desc", "bbox", "caption")), (("desc",), ("rgb",)), (("caption",), ("rgb",)),
         (("rgb",), ("normal", "depth")), (("caption",), ("desc", "bbox")), ((), ("rgb",)), (("rgb",), ("seg", "edge")),
         (("caption",), ("rgb",)), (("rgb",), ("normal", "depth")),
         # more modalities, where a set has them
         (("rgb",), ("inst",)), (("rgb",), ("feat", "feat_global")), (("rgb",), ("pose", "polygon")),
         (("rgb",), ("palette", "metadata")), (("pose",), ("rgb",)), (("palette",), ("rgb",)), (("metadata",), ("rgb",)),
         (("feat_global",), ("rgb",)), (("caption",), ("feat_global",)), (("depth",), ("feat_global",)),
         (("rgb",), ("fine_rgb",)), (("depth",), ("fine_depth",)), (("normal",), ("fine_normal",)),
         (("caption", "rgb"), ("fine_rgb",)), (("seg",), ("fine_seg",)),
         (("speech",), ("caption",)), (("caption", "timing", "voice"), ("speech",)), (("caption",), ("timing",)),
         (("speech",), ("timing", "voice")), (("speech",), ("desc",)), (("desc", "voice"), ("caption",)),
         (("speech",), ("caption",)), (("caption", "timing", "voice"), ("speech",)), (("rgb",), ("sound",)),
         (("desc",), ("sound",)), (("sound",), ("desc",)), None)
WORD_LINKS = 3
# 4M's L and XL, for which weights, gradients and momentum are divided among the GPUs. L has as many scenes at a time as
# leave dim x blocks x scenes, and with it the memory of activations, what it is for gpu; XL would have 16
CONFIGS["gpu-l"] = dataclasses.replace(CONFIGS["gpu"], track="gpu-l", dim=1024, enc_depth=24, dec_depth=24, shard=True,
                                       micro_batch=32)
CONFIGS["gpu-xl"] = dataclasses.replace(CONFIGS["gpu-l"], track="gpu-xl", dim=2048, recompute=True, micro_batch=64)
for name in "rich", "audio", "fine":  # more modalities of the same scenes, joined by data/join.py
    folder = f"data/scenes64-{name}64"
    CONFIGS[f"cpu-{name}"] = Config(track=f"cpu-{name}", data=f"{folder}/train", frozen=f"{folder}/val.npz",
                                    frozen_masks=f"{folder}/val.npz", num_steps=3000, target=0.0)
ARCHITECTURE = ("dim", "head_dim", "enc_depth", "dec_depth", "mlp_ratio", "dec_self")  # what a checkpoint must agree on
LIMITS = {  # what a field may be: least and most, or choices; data/options.py has those that scripts share
    "dim": (1, 8192), "head_dim": (1, 256), "enc_depth": (1, 96), "dec_depth": (1, 96), "batch": (1, math.inf),
    "budget": (16, math.inf), "image_targets": (1, math.inf), "text_targets": (1, math.inf),
    "quality_scenes": (0, 2000),
}


def check_config(config, run, layout, valid_scenes):
    """What fields may be together. Raises Fault for what they may not."""
    run.slice(config.batch)  # can it be divided among the processes?
    images, texts = layout.first_text, layout.size - layout.first_text
    if config.dim % config.head_dim:
        raise Fault(f"--dim={config.dim} is not a multiple of --head_dim={config.head_dim}")
    if config.budget > images or config.budget % 16:
        raise Fault(f"--budget={config.budget} is not a multiple of 16 up to the {images} image tokens of a scene")
    if config.image_targets > images or config.text_targets > texts:
        raise Fault(f"--image_targets={config.image_targets}, --text_targets={config.text_targets}: a scene has places "
                    f"for {images} and {texts}")
    if config.recompute and not config.shard:
        raise Fault("--recompute=true is for divided blocks: pass --shard=true")
    if config.shard:
        import_ours("sharding").check(run, valid_scenes)


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

# pictures share a grid and the tokenizer, fine ones have a token for each quarter of its cells; codes are tokens of two
# digits like theirs. Of all of them a set has some
IMAGES = ("rgb", "depth", "normal", "seg", "edge", "inst", "fine_rgb", "fine_depth", "fine_normal", "fine_seg")
CODES = ("feat", "feat_global", "speech", "sound")
TEXTS = ("desc", "caption", "bbox", "polygon", "pose", "palette", "metadata", "timing", "voice")
MODALITIES = IMAGES + CODES + TEXTS
FACTS = {"desc": 5, "bbox": 5, "polygon": 8, "pose": 8}  # tokens per object; of the others every place is its own
PLACES = 8  # rows and columns of the grid that texts name places of
FIRST_TIME = 2  # id of timing's 0: it says of each token of a caption for how many places of speech it is being said


# --- copied: layout ---
class Layout:
    """All of a scene's tokens side by side in one row of `size` places, a span per modality that the data have.

    kind (size,): modality of a place; offset (size,): its place inside the modality; end: id that ends a text;
    first_text: where texts begin.
    """

    def __init__(self, modalities, device="cpu"):
        self.modalities = {m: modalities[m] for m in MODALITIES if m in modalities}
        self.names = list(self.modalities)
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
        self.end = {m: about.get("end", about["vocab"] - 2) for m, about in self.modalities.items() if m in TEXTS}
        self.end["bbox"] = 1
        self.first_text = min(self.span[m].start for m in TEXTS if m in self.span)

    def valid(self, tokens):
        """True where a row holds a token and not padding: (B, size)."""
        return tokens != self.pads[self.kind]
# --- end: layout ---


# --- copied: shards ---
def read_shards(config, modalities):
    """The training tokens, a memory map (scenes, length) per modality, and their sha256."""
    digest = "none"
    if not STANDALONE:
        digest = import_ours("checks").check_scenes(sys.modules[__name__], config, modalities)
    names = [m for m in MODALITIES if m in modalities]
    return [np.load(ROOT / config.data / f"{m}.npy", mmap_mode="r") for m in names], digest
# --- end: shards ---


# --- copied: loader ---
class Loader:
    """Endless shuffled batches of rows of some tensors (N, ...), the same on every rank, all on the device."""

    def __init__(self, tensors, batch, seed, device):
        self.tensors, self.batch = [tensor.to(device) for tensor in tensors], batch
        self.rng = torch.Generator(device).manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.long, device=device)
        self.next = 0

    def __call__(self):
        if self.next + self.batch > len(self.order):
            self.order = torch.randperm(len(self.tensors[0]), generator=self.rng, device=self.order.device)
            self.next = 0
        self.next += self.batch
        rows = self.order[self.next - self.batch:self.next]
        return [tensor[rows] for tensor in self.tensors]

    def state_dict(self):
        return {"rng": self.rng.get_state(), "order": self.order, "next": self.next}

    def load_state_dict(self, state):
        self.rng.set_state(state["rng"])
        self.order, self.next = state["order"].to(self.order.device), state["next"]
# --- end: loader ---


def uniform(shape, rng):
    """Random numbers above 0 and below 1."""
    return torch.rand(shape, generator=rng, device=rng.device).clamp(1e-12, 1 - 1e-7)


def course_positions(tokens, layout, inputs, config, rng):
    """Inputs and targets of any modalities, as 4M's masks draw them: enc_pos (B, inputs), dec_pos (B, image + text
    targets), and for which of each there is a token (None: for all inputs).

    One budget for all scenes, so that no input is padding, is split over the modalities by a Dirichlet(1) draw. Places
    inside a modality are uniform without replacement; where it has fewer tokens than its part any others step in.
    Targets, image tokens first, are drawn from the rest, every modality as likely; where too few are left, one is
    padding.
    """
    B, K, device = tokens.shape[0], len(layout.names), tokens.device
    valid = layout.valid(tokens)
    available = torch.zeros(B, K, device=device).index_add_(1, layout.kind, valid.float())
    share = -uniform((B, K), rng).log() * (available > 0)  # normalised: Dirichlet(1) of the modalities there are
    edges = (share.cumsum(1) / share.sum(1, keepdim=True) * inputs).round()
    count = edges.diff(dim=1, prepend=torch.zeros_like(edges[:, :1]))
    # a rank of every token among the valid ones of its modality; those below the modality's count come first
    score = uniform((B, layout.size), rng) + 2.0 * ~valid + 4.0 * layout.kind
    rank = score.argsort(1).argsort(1) - layout.start[layout.kind]
    later = (rank >= count[:, layout.kind]) + 2.0 * ~valid
    enc_pos = (later + uniform((B, layout.size), rng)).topk(inputs, 1, largest=False).indices
    # an exponential race: the smallest of Exp(1) / weight are a draw by weight without replacement
    left = available.scatter_add(1, layout.kind[enc_pos], -torch.ones(enc_pos.shape, device=device))
    race = -uniform((B, layout.size), rng).log() * left[:, layout.kind]
    race = race.masked_fill(~valid, math.inf).scatter(1, enc_pos, math.inf)
    image = race[:, :layout.first_text].topk(config.image_targets, 1, largest=False)
    text = race[:, layout.first_text:].topk(config.text_targets, 1, largest=False)
    counted = torch.cat([image.values, text.values], 1) < math.inf
    return enc_pos, None, torch.cat([image.indices, text.indices + layout.first_text], 1), counted


def link_positions(tokens, layout, given, asked, share, rng):
    """Inputs and targets of a link: enc_pos (B, N), dec_pos (B, M), and for which of each there is a token.

    The modalities given are known as a whole, and all of those asked are targets, but for a share of the first of them
    that is known too, as while it is generated: any places of a picture, the first ones of a text.
    """
    places = torch.arange(layout.size, device=tokens.device).expand(len(tokens), -1)
    whole = [places[:, layout.span[m]] for m in given]
    first, *others = [places[:, layout.span[m]] for m in asked]
    if asked[0] not in TEXTS:
        first = first.gather(1, uniform(first.shape, rng).argsort(1))
    known = int(share * first.size(1))
    enc_pos = torch.cat([*whole, first[:, :known]], 1)
    dec_pos = torch.cat([first[:, known:], *others], 1)
    valid = layout.valid(tokens)
    return enc_pos, valid.gather(1, enc_pos), dec_pos, valid.gather(1, dec_pos)


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


def known_links(layout):
    """The links between modalities that the data have."""
    there = [link and tuple(tuple(m for m in part if m in layout.span) for part in link) for link in LINKS]
    return [link for link, whole in zip(there, LINKS) if link is None or link[0] == whole[0] and link[1]]


def step_shape(step, config, layout):
    """The link of a step and how much is known: of what it asks first 0, 1/4, 1/2 or 3/4, mostly 0, or 1/4 where
    nothing else is given; without a link 1/8, 2/8 .. 8/8 of the budget.

    In the golden-ratio order, which is even at every length. Few lengths stand for all: a CPU builds kernels for each.
    """
    links = known_links(layout)[:WORD_LINKS if step < config.word_steps else None]
    link = links[step % len(links)]
    eighth = int((step * 0.618034 + 0.5) % 1 * 8)
    if link is None:
        return link, (eighth + 1) / 8
    given, _ = link
    least = 0 if given else 1
    return link, max(least, eighth - 4) / 4


def make_optimizers(model, config, run):
    """Muon for hidden matrices, Adam for embeddings and heads; every parameter is in exactly one."""
    hidden, rest = [], []
    for name, p in model.named_parameters():
        (rest if "embed" in name or "head" in name else hidden).append(p)
    muon_class = import_ours("sharding").sharded(Muon, orthogonalise) if config.shard else Muon
    muon = muon_class(hidden, config.momentum, run.rank, run.world, PRECISIONS[run.precision])
    return muon, torch.optim.Adam(rest, lr=config.adam_lr, betas=(0.9, 0.95), fused=True)


# ------------------------------------------------------------------------------------------------------------
# Attention

# --- copied: attend ---
def attend(q, k, v, visible=None):
    """Softmax attention of q (B, H, M, D) over k, v (B, H, N, D); visible (B, N): keys that may be seen, None: all;
    visible (B, M, N): by each query.

    A query that may see nothing gets zeros.
    """
    mask = visible
    if visible is not None:
        mask = visible[:, None] if visible.ndim == 3 else visible[:, None, None]
    if q.is_cuda or v.dtype == torch.float32:
        return F.scaled_dot_product_attention(q.type_as(v), k.type_as(v), v, attn_mask=mask)
    # written out: in bfloat16 on a CPU torch 2.13's fused kernel takes 3 to 6 times as long, in float32 0.8 times
    scores = (q * q.size(-1) ** -0.5) @ k.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -3e4)
    weights = scores.softmax(-1).type_as(v)
    return (weights if mask is None else weights * mask.any(-1, keepdim=True)) @ v
# --- end: attend ---


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


class Attention(nn.Module):
    def __init__(self, dim, head_dim):
        super().__init__()
        self.head_dim = head_dim
        self.q, self.k, self.v, self.proj = (Linear(dim, dim) for _ in range(4))

    def forward(self, x, context, visible):
        q = norm(split_heads(self.q(x), self.head_dim))
        k = norm(split_heads(self.k(context), self.head_dim))
        v = split_heads(self.v(context), self.head_dim)
        return self.proj(attend(q, k, v, visible).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm block: attention to a context, the tokens themselves if there is none, then a ReLU^2 MLP. Before that,
    if it has it, attention of the tokens to their peers."""

    def __init__(self, config, self_attention=False):
        super().__init__()
        self.self_attention = Attention(config.dim, config.head_dim) if self_attention else None
        self.attention = Attention(config.dim, config.head_dim)
        self.up = Linear(config.dim, config.mlp_ratio * config.dim)
        self.down = Linear(config.mlp_ratio * config.dim, config.dim)

    def forward(self, x, visible, context=None, peers=None):
        if self.self_attention is not None:
            h = norm(x)
            x = x + self.self_attention(h, h, peers)
        h = norm(x)
        x = x + self.attention(h, h if context is None else context, visible)
        return x + self.down(F.relu(self.up(norm(x))).square())


def on_grid(layout):
    """Of modalities with a token for each cell of the pictures' grid, or for each quarter of one: {name: (row, column,
    quarter)} of its places; quarter is 0 where cells are whole, then 1 to 4."""
    side, found = math.isqrt(layout.modalities["rgb"]["length"]), {}
    for m in layout.names:
        place = layout.offset[layout.span[m]]
        for n in (1, 2):  # tokens across a cell
            row, column = place // (n * side), place % (n * side)
            if m not in TEXTS and len(place) == (n * side) ** 2:
                found[m] = row // n, column // n, (n - 1) * (1 + row % n * n + column % n)
    return found


def split_positions(layout):
    """Places of a scene as pairs of numbers, major and minor (size,), and how many there are of each.

    Row and column of a picture's grid, or column and quarter; object and fact, so that what is learned of one object
    holds of all; otherwise the place alone, which a timing shares with its caption.
    """
    side, grid = math.isqrt(layout.modalities["rgb"]["length"]), on_grid(layout)
    facts = {m: FACTS[m] for m in layout.names if m in FACTS}
    rest = side + max(facts.values())  # the minor number of a place alone
    num_major = side + max(-(-layout.modalities[m]["length"] // n) for m, n in facts.items())
    major, minor = [], []
    for m in layout.names:
        place = layout.offset[layout.span[m]]
        if m in grid:
            row, column, quarter = grid[m]
            major.append(row)
            minor.append(column + (quarter > 0) * (rest + 1 + side * (quarter - 1)))
        elif m in facts:
            major.append(side + place // facts[m])
            minor.append(side + place % facts[m])
        elif m == "timing":
            major.append(major[layout.names.index("caption")])
            minor.append(torch.full_like(place, rest))
        else:
            major.append(num_major + place)
            minor.append(torch.full_like(place, rest))
            num_major += len(place)
    minor = torch.cat(minor)
    return torch.cat(major), minor, num_major, int(minor.max()) + 1


def split_words(layout):
    """Where the words of each text and code, (first, last + 1), are in one table of all: texts' first, and a caption's
    are the description's. And how many words texts have."""
    spans, end, of_texts = {}, 0, 0
    for m in (*TEXTS, *CODES):
        if m == "caption" and "desc" in spans:
            spans[m] = spans["desc"]
        elif m in layout.span:
            spans[m] = end, end + layout.modalities[m]["vocab"]
            end = spans[m][1]
            of_texts = end if m in TEXTS else of_texts
    return {m: span for m, span in spans.items() if m in layout.span}, of_texts


class Nano4M(nn.Module):
    """Encoder-decoder over places. Targets see the inputs alone: the decoder has no self-attention by default.

    All pictures of a scene share a grid, and so do words that name a cell of it. What the encoder makes of a cell is
    added to the target there, so that attention is left with what is elsewhere.

    An image token is a pair of digits (a, b), two levels of FSQ each: embedded as the sum of both and of the pair,
    predicted as p(a) p(b | a), so that codes which look alike share what is learned and no softmax has 4096 classes.
    Data of other tokens say how many a and b there are.
    """

    def __init__(self, config, layout):
        super().__init__()
        C = config.dim
        device = layout.kind.device
        self.num_cells = layout.modalities["rgb"]["length"]
        self.kind, self.vocab, self.first_text = layout.kind, layout.vocab, layout.first_text
        root = math.isqrt(layout.vocab)
        self.base, num_b = layout.modalities["rgb"].get("digits", (root, root))  # how many a and b there are
        assert self.base * num_b == layout.vocab
        words, text_words = split_words(layout)
        self.text_columns = sorted({words[m] for m in layout.names if m in TEXTS})
        self.words = torch.tensor([words.get(m, (0, 0)) for m in layout.names], device=device)  # (names, 2)
        num_words = int(self.words.max())
        self.major, self.minor, num_major, num_minor = split_positions(layout)
        # words that name a cell of the grid share its embedding
        side = math.isqrt(self.num_cells)
        places = layout.modalities["desc"].get("places", [])  # lists of word, row, column
        named = torch.tensor(places, dtype=torch.long, device=device).view(-1, 3)
        self.place_words = layout.vocab + named[:, 0]
        self.place_cells = named[:, 1:] * side // PLACES
        # the cell of a place and of a word; num_cells: none
        self.cell = torch.full((layout.size,), self.num_cells, device=device)
        for m, (row, column, _) in on_grid(layout).items():
            self.cell[layout.span[m]] = row * side + column
        self.word_cell = torch.full((layout.vocab + num_words,), self.num_cells, device=device)
        self.word_cell[self.place_words] = self.place_cells[:, 0] * side + self.place_cells[:, 1]
        # one token table: image tokens, then words
        self.token_offset = (self.words[:, 0] + layout.vocab * (self.words[:, 1] > 0))[layout.kind]
        self.embed_a, self.embed_b = nn.Embedding(self.base, C), nn.Embedding(num_b, C)
        self.embed_pair, self.embed_word = nn.Embedding(layout.vocab, C), nn.Embedding(num_words, C)
        self.embed_major, self.embed_minor = nn.Embedding(num_major, C), nn.Embedding(num_minor, C)
        self.embed_enc_kind, self.embed_dec_kind = (nn.Embedding(len(layout.names), C) for _ in range(2))
        self.encoder = nn.ModuleList(Block(config) for _ in range(config.enc_depth))
        self.local = Linear(C, C)
        self.timed = "timing" in words
        if self.timed:  # the place of speech of a target, and for how many a word of timing lasts; inf: none
            self.time = torch.where(layout.kind == layout.names.index("speech"), layout.offset, math.inf)
            self.lasts = torch.full((layout.vocab + num_words,), math.inf, device=device)
            first, end = words["timing"]
            self.lasts[layout.vocab + first + FIRST_TIME:layout.vocab + end] = torch.arange(
                end - first - FIRST_TIME, device=device).float()
            self.num_timed = layout.modalities["timing"]["length"]
            of_timing = layout.kind == layout.names.index("timing")
            self.timed_place = torch.where(of_timing, layout.offset, self.num_timed)
            self.embed_left, self.local_word = nn.Embedding(end - first, C), Linear(C, C)
        self.decoder = nn.ModuleList(Block(config, config.dec_self) for _ in range(config.dec_depth))
        self.dec_self = config.dec_self
        self.head_a, self.head_b, self.head_word = Linear(C, self.base), Linear(C, num_b), Linear(C, text_words)
        self.embed_first, self.mix = nn.Embedding(self.base, C), Linear(C, C)  # p(b | a) is a small MLP of both

    def position(self, places):
        return self.embed_major(self.major[places]) + self.embed_minor(self.minor[places])

    def peers(self, dec_pos, counted):
        """Which targets (B, M, M) each target may see: those of its modality that are not padding."""
        if not self.dec_self:
            return None
        kind = self.kind[dec_pos]
        same = kind[:, :, None] == kind[:, None]
        return same if counted is None else same & (counted > 0)[:, None]

    def hidden(self, tokens, enc_pos, visible, dec_pos, counted=None):
        """Final states (B, M, C) at the places dec_pos (B, M), from the tokens (B, size) at the places enc_pos (B, N).

        visible (B, N) is False on padding, and counted (B, M) False or 0; None where there is none.
        """
        pairs = (self.embed_b.weight[:, None] + self.embed_a.weight).flatten(0, 1)  # id = a + base * b
        table = torch.cat([pairs + self.embed_pair.weight, self.embed_word.weight])
        if len(self.place_words):
            cells = self.embed_major(self.place_cells[:, 0]) + self.embed_minor(self.place_cells[:, 1])
            table = table.index_add(0, self.place_words, cells)
        ids = tokens.gather(1, enc_pos) + self.token_offset[enc_pos]
        x = F.embedding(ids, table) + self.embed_enc_kind(self.kind[enc_pos])
        x = norm(x + self.position(enc_pos))  # (B, N, C)
        for block in self.encoder:
            x = block(x, visible)
        x = norm(x)
        y = norm(self.embed_dec_kind(self.kind[dec_pos]) + self.position(dec_pos))  # (B, M, C)
        y = y + self.local(self.at_cells(x, ids, enc_pos, visible, dec_pos))
        if self.timed:
            y = y + self.local_word(self.at_times(x, ids, enc_pos, visible, dec_pos))
        peers = self.peers(dec_pos, counted)
        for block in self.decoder:
            y = block(y, visible, x, peers)
        return norm(y)

    def at_cells(self, x, ids, enc_pos, visible, dec_pos):
        """Sum (B, M, C) of the encoder's states x (B, N, C) in the cell of each target; 0 for words."""
        cell = torch.minimum(self.cell[enc_pos], self.word_cell[ids])
        if visible is not None:
            cell = cell.masked_fill(~visible, self.num_cells)
        x = x.masked_fill((cell == self.num_cells)[..., None], 0)
        grid = x.new_zeros(len(x), self.num_cells + 1, x.size(-1))
        grid = grid.scatter_add(1, cell[..., None].expand_as(x), x)
        return grid.gather(1, self.cell[dec_pos][..., None].expand(-1, -1, x.size(-1)))

    def at_times(self, x, ids, enc_pos, visible, dec_pos):
        """The encoder's state (B, M, C) of the timing of the word that is said at each target of speech, and how much is
        left of it; 0 for other targets, and from the first word on whose timing is not known."""
        place = self.timed_place[enc_pos]
        if visible is not None:
            place = place.masked_fill(~visible, self.num_timed)
        lasts = x.new_full((len(x), self.num_timed + 1), math.inf, dtype=torch.float32)
        end = lasts.scatter(1, place, self.lasts[ids])[:, :-1].cumsum(1)  # inf from the first unknown one on
        states = x.new_zeros(len(x), self.num_timed + 1, x.size(-1))
        states = states.scatter(1, place[..., None].expand_as(x), x)
        left = end[:, None] - self.time[dec_pos][..., None]  # (B, M, words)
        left, which = left.masked_fill(~(left > 0), math.inf).min(-1)
        state = states.gather(1, which[..., None].expand(-1, -1, x.size(-1)))
        none = left == math.inf
        return (state + self.embed_left(left.masked_fill(none, 0).long())).masked_fill(none[..., None], 0)

    def logits_b(self, mixed, a):
        """Logits of the second digit given mix(states) (..., C) and first digits a (...)."""
        return self.head_b(F.relu(mixed + self.embed_first(a)).square())

    def image_nll(self, y, ids):
        """Cross-entropy (N,) of image tokens ids (N,) given states y (N, C)."""
        a, b = ids % self.base, ids // self.base
        first = F.cross_entropy(self.head_a(y).float(), a, reduction="none")
        return first + F.cross_entropy(self.logits_b(self.mix(y), a).float(), b, reduction="none")

    def word_nll(self, y, places, ids):
        """Cross-entropy (N,) of texts' tokens ids (N,), each among those of its kind, given states y (N, C)."""
        first, end = self.words[self.kind[places]].unbind(1)
        column = torch.arange(self.head_word.out_features, device=y.device)
        other_kind = (column < first[:, None]) | (column >= end[:, None])
        logits = self.head_word(y).float().masked_fill(other_kind, -math.inf)
        return F.cross_entropy(logits, ids + first, reduction="none")

    def forward(self, tokens, enc_pos, visible, dec_pos, counted=None):
        """Log-probabilities (B, M, vocab) of all tokens at the places dec_pos (B, M); no target's token is seen."""
        y = self.hidden(tokens, enc_pos, visible, dec_pos, counted)
        is_image = dec_pos < self.first_text  # or code
        out = torch.full((*dec_pos.shape, self.vocab), -math.inf, device=y.device)
        images, a, joint = y[is_image], torch.arange(self.base, device=y.device), []
        for rows, mixed in zip(images.split(512), self.mix(images).split(512)):
            log_b = self.logits_b(mixed[:, None], a).float().log_softmax(-1)  # (rows, a, b)
            log_a = self.head_a(rows).float().log_softmax(-1)
            joint.append(log_b.transpose(1, 2) + log_a[:, None])  # (rows, b, a)
        out[is_image] = torch.cat(joint).flatten(1)
        words = self.head_word(y).float()
        for first, end in self.text_columns:
            chosen = ~is_image & (self.words[self.kind[dec_pos], 0] == first)
            log_probs = words[chosen][:, first:end].log_softmax(-1)
            out[chosen] = F.pad(log_probs, (0, self.vocab - log_probs.size(1)), value=-math.inf)
        return out


def init_weights(model):
    for name, p in model.named_parameters():
        if "proj" in name or "down" in name or "head" in name:
            nn.init.zeros_(p)
        elif "embed" in name:
            nn.init.normal_(p, std=0.02)
        elif any(part in name for part in ("encoder", "decoder", "local", "mix")):
            nn.init.normal_(p, std=p.shape[1] ** -0.5)
        else:
            raise AssertionError(f"no initialisation for {name}")


# ------------------------------------------------------------------------------------------------------------
# Loss

def masked_loss(model, tokens, enc_pos, visible, dec_pos, weight, images):
    """Sum over these scenes of weight (B, M) * cross-entropy in nats at the targets dec_pos (B, M).

    The first `images` targets of a scene are image tokens.
    """
    y = model.hidden(tokens, enc_pos, visible, dec_pos, weight)
    ids = tokens.gather(1, dec_pos)
    image_nll = model.image_nll(y[:, :images].flatten(0, 1), ids[:, :images].flatten())
    word_places = dec_pos[:, images:].flatten()
    word_nll = model.word_nll(y[:, images:].flatten(0, 1), word_places, ids[:, images:].flatten())
    image_loss = (image_nll * weight[:, :images].flatten()).sum()
    word_loss = (word_nll * weight[:, images:].flatten()).sum()
    return image_loss + word_loss


def target_weights(dec_pos, counted, layout):
    """Loss weight per target (B, M): over all ranks the weighted sum is the mean over modalities of each one's mean. 0
    on padding.
    """
    kind = layout.kind[dec_pos]
    count = torch.zeros(len(layout.names), device=dec_pos.device)
    count.index_add_(0, kind.flatten(), counted.flatten().float())
    share = 1 / count.clamp(min=1) / (count > 0).sum()
    return share[kind] * counted


def train_step(step, batch, rng, model, muon, adam, layout, config, run):
    """One step on a global batch (B, size): this rank's part of its loss, how many tokens it had, and its FLOPs."""
    link, share = step_shape(step, config, layout)
    if link:
        enc_pos, visible, dec_pos, counted = link_positions(batch, layout, *link, share, rng)
        _, asked = link  # either texts or none
        images = 0 if asked[0] in TEXTS else dec_pos.size(1)
    else:
        inputs = int(share * config.budget)
        images = config.image_targets
        enc_pos, visible, dec_pos, counted = course_positions(batch, layout, inputs, config, rng)
    weight = target_weights(dec_pos, counted, layout)
    num_tokens = counted.sum() + (enc_pos.numel() if visible is None else visible.sum())
    mine = run.slice(config.batch)
    total = 0.0
    for start in range(mine.start, mine.stop, config.micro_batch):
        rows = slice(start, min(start + config.micro_batch, mine.stop))
        shown = None if visible is None else visible[rows]
        with run.autocast():
            loss = masked_loss(model, batch[rows], enc_pos[rows], shown, dec_pos[rows], weight[rows], images)
        loss.backward()
        total += loss.detach()
    sum_gradients(adam, run.world)
    factor = schedule(step, config)
    muon.step(config.muon_lr * factor)
    adam.param_groups[0]["lr"] = config.adam_lr * factor
    adam.step()
    model.zero_grad(set_to_none=True)
    flops = config.batch * flops_per_scene(model, config, enc_pos.size(1), images, dec_pos.size(1) - images)
    return total, num_tokens, flops


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


# --- copied: sampling ---
@dataclass
class Output:
    """One modality to generate and how: scheme roar (random order), maskgit (most confident first) or ar (in order).

    data/generate_4m.py generates one after another, and texts in order.
    """
    modality: str
    scheme: str = ""  # "": maskgit for images, ar for texts
    steps: int = 8  # ar takes one step per token
    temperature: float = 1.0  # 0: always the likeliest token
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    guidance: float = 1.0  # classifier-free: logits u + guidance * (c - u), u seeing only this modality's own tokens


def predict(model, tokens, known, dec_pos):
    """Log-probabilities (B, M, vocab) at the places dec_pos (B, M), given the known (B, size) tokens; float32."""
    enc_pos, visible = gather_places(known)
    return model(tokens, enc_pos, visible, dec_pos).float()


def draw_tokens(model, layout, tokens, known, dec_pos, output, rng):
    """Sample ids (B, M) of a modality at dec_pos (B, M) given what is known (B, size), with their log-probabilities."""
    about = layout.modalities[output.modality]
    logits = predict(model, tokens, known, dec_pos)
    own = known & (layout.kind == layout.names.index(output.modality))
    if output.guidance != 1 and bool(own.any(1).all()):
        base = predict(model, tokens, own, dec_pos)
        logits = base + output.guidance * (logits - base)
    logits[..., about["vocab"]:] = -math.inf
    if output.modality in layout.end:  # padding is never drawn
        logits[..., about["pad"]] = -math.inf
    scores = sharpen(logits, output.temperature, output.top_k, output.top_p)
    if output.temperature > 0:  # the Gumbel trick: argmax(logits / T + Gumbel noise) is a draw from the softmax
        noise = torch.rand(scores.shape, generator=rng, device=scores.device).clamp(1e-20, 1 - 1e-7)
        scores = scores - (-noise.log()).log()
    ids = scores.argmax(-1)
    return ids, logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def fill(tokens, known, places, ids, chosen):
    """Write ids (B, M) at the places (B, M) that are chosen (B, M); changes tokens and known."""
    tokens.scatter_(1, places, torch.where(chosen, ids, tokens.gather(1, places)))
    known.scatter_(1, places, known.gather(1, places) | chosen)


def generate_masked(model, layout, tokens, known, output, scheme, rng):
    """Fill a modality in random order (roar) or the most confident tokens first (maskgit); changes tokens and known."""
    in_modality = layout.kind == layout.names.index(output.modality)
    priority = torch.rand(tokens.shape, generator=rng, device=tokens.device)
    total = (~known & in_modality).sum(1, keepdim=True)
    steps = min(output.steps, int(total.max()))
    for step in range(steps):
        unknown = ~known & in_modality
        share_left = math.cos(math.pi / 2 * (step + 1) / steps)  # few tokens at first and ever more
        left = (total * share_left + 1e-6).long()
        num_now = (unknown.sum(1, keepdim=True) - left).clamp(min=1)
        if scheme == "roar":
            first = priority.masked_fill(~unknown, math.inf).argsort(1).argsort(1) < num_now
            places, chosen = gather_places(unknown & first)
            ids, _ = draw_tokens(model, layout, tokens, known, places, output, rng)
        else:
            places, is_unknown = gather_places(unknown)
            ids, confidence = draw_tokens(model, layout, tokens, known, places, output, rng)
            order = confidence.masked_fill(~is_unknown, -math.inf).argsort(1, descending=True)
            chosen = is_unknown & (order.argsort(1) < num_now)
        fill(tokens, known, places, ids, chosen)
# --- end: sampling ---


# ------------------------------------------------------------------------------------------------------------
# Evaluation

# --- frozen: eval ---
EVAL_BATCH = 64  # scenes that the model sees at once; each rank's first predictions are checked


def eval_sha256(*paths):
    """One hash of this block and of the files that it reads."""
    code = HERE.read_text().partition("# --- " "frozen:")[2].partition("# --- " "end:")[0]
    return hashlib.sha256(b"".join([code.encode(), *(Path(path).read_bytes() for path in paths)])).hexdigest()


def read_frozen(config):
    """Validation tokens (n, size), roles of their places (n, size), the modalities, and the sha256 of it all.

    roles: 1 input, 2 target, 0 neither; in even rows as the course masks, in odd ones whole modalities are inputs.
    """
    paths = [ROOT / config.frozen, ROOT / config.frozen_masks]
    for name in (config.frozen, config.frozen_masks):
        if not (ROOT / name).exists():
            raise Fault(f"{ROOT / name} is missing: it belongs to the repository (`git checkout {name}`)")
    try:
        with np.load(paths[0], allow_pickle=False) as arrays:
            modalities = json.loads(bytes(arrays["modalities"]))
            tokens = np.concatenate([arrays[m] for m in modalities], 1).astype(np.int64)
        with np.load(paths[1], allow_pickle=False) as arrays:
            roles = arrays["roles"]
        if roles.shape != tokens.shape:
            raise ValueError(f"masks {roles.shape} for tokens {tokens.shape}")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise Fault(f"the frozen validation set is damaged ({error}): `git checkout data/frozen`") from None
    return torch.from_numpy(tokens), torch.from_numpy(roles), modalities, eval_sha256(*paths)


def gather_places(chosen):
    """Places where chosen (B, size) is True: (B, most of any row), and which of them count and are not padding."""
    width = int(chosen.sum(1).max())
    places = chosen.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]
    return places, chosen.gather(1, places)


def predict_targets(model, tokens, role, vocab):
    """Log-probabilities (B, M, vocab) at the targets' places (B, M), and which of these count; all else is blanked."""
    enc_pos, visible = gather_places(role == 1)
    places, counted = gather_places(role == 2)
    log_probs = model(tokens.masked_fill(role != 1, 0), enc_pos, visible, places, counted)
    if log_probs.shape != (*places.shape, vocab) or log_probs.dtype != torch.float32:
        raise Fault(f"the model must return float32 log-probabilities {(*places.shape, vocab)}, not "
                    f"{log_probs.dtype} {tuple(log_probs.shape)}")
    return log_probs, places, counted


def check_predictions(model, tokens, role, log_probs, counted):
    """Fault unless the probabilities of a place sum to 1, and stay what they are when the targets change."""
    error = (log_probs.exp().sum(-1)[counted] - 1).abs().max().item()
    if not error <= 1e-3:
        raise Fault(f"the model's probabilities sum to 1 +- {error:.4f} at a place")
    kept = tokens.clone()
    tokens.copy_(torch.where(role == 2, kept.roll(1, 0), kept))  # in the memory of whoever holds on to them
    changed = predict_targets(model, tokens, role, log_probs.size(-1))[0]
    tokens.copy_(kept)
    if not torch.allclose(changed.exp()[counted], log_probs.exp()[counted], atol=1e-3):
        raise Fault("the model's predictions change with the targets, which it must not see")


def fingerprint(model):
    """Shape, sum and absolute sum of every parameter and buffer."""
    tensors = [tensor.double() for tensor in (*model.parameters(), *model.buffers())]
    return [(tensor.shape, tensor.sum().item(), tensor.abs().sum().item()) for tensor in tensors]


@torch.no_grad()
def evaluate(model, tokens, roles, modalities, rank, world):
    """The validation loss in nats and further numbers for the footer: of both halves of the scenes, of each modality.

    A half's loss is the mean over modalities of the mean cross-entropy at its targets, each predicted from the inputs
    alone; the validation loss is the mean of both. Ranks share the scenes, and all get the result. Fault if what the
    model returns is not what it should be, or if it changes meanwhile.
    """
    before = fingerprint(model)
    K, vocab = len(modalities), max(about["vocab"] for about in modalities.values())
    kind = torch.repeat_interleave(torch.tensor([about["length"] for about in modalities.values()])).to(tokens.device)
    total = torch.zeros(2, 2 * K, dtype=torch.float64, device=tokens.device)  # nats and targets, by half and modality
    for i in range(rank * EVAL_BATCH, len(tokens), world * EVAL_BATCH):
        part, role = tokens[i:i + EVAL_BATCH], roles[i:i + EVAL_BATCH]
        log_probs, places, counted = predict_targets(model, part, role, vocab)
        if i == rank * EVAL_BATCH:
            check_predictions(model, part, role, log_probs, counted)
        nll = -log_probs.gather(2, part.gather(1, places)[..., None])[..., 0][counted].double()
        half = torch.arange(len(part), device=tokens.device)[:, None].expand_as(places) % 2  # EVAL_BATCH is even
        group = (half * K + kind[places])[counted]
        total.index_add_(1, group, torch.stack([nll, torch.ones_like(nll)]))
    if world > 1:
        dist.all_reduce(total)
    targets = (roles == 2).long()
    asked = torch.stack([torch.zeros(K, device=kind.device).index_add_(0, kind, targets[h::2].sum(0).float())
                         for h in (0, 1)])
    if not torch.equal(total[1], asked.flatten().double()) or not bool(total.isfinite().all()):
        raise Fault("the model's predictions are not finite at every target")
    if fingerprint(model) != before:
        raise Fault("the model's parameters or buffers changed during the evaluation")
    means = (total[0] / total[1]).view(2, K)
    numbers = {}
    for half, by_modality in zip(("course", "whole"), means):
        numbers[f"val_loss_{half}"] = round(by_modality.mean().item(), 4)
        numbers |= {f"val_loss_{half}_{m}": round(value, 4) for m, value in zip(modalities, by_modality.tolist())}
    return means.mean().item(), numbers
# --- end: eval ---


# ------------------------------------------------------------------------------------------------------------
# Training

def flops_per_scene(model, config, inputs, images, texts):
    """Matmul FLOPs of a training step for one scene with so many inputs and targets; backward is twice forward."""
    C, mlp, targets = config.dim, 2 * config.mlp_ratio * config.dim ** 2, images + texts
    encoder = config.enc_depth * inputs * (4 * C * C + mlp + 2 * inputs * C)
    decoder = config.dec_depth * (targets * (2 * C * C + mlp + 2 * inputs * C) + inputs * 2 * C * C)
    if config.dec_self:
        decoder += config.dec_depth * targets * (4 * C * C + 2 * targets * C)
    digits = model.head_a.out_features + model.head_b.out_features
    heads = targets * C * C + images * (digits + C) * C + texts * model.head_word.out_features * C
    return 6 * (encoder + decoder + heads)


def main(argv):
    run = Run("4m", argv)
    config = run.config
    course = import_ours("course_loss").CourseLoss(run) if config.track == "course" else None
    if not STANDALONE:
        import_ours("checks").check_archives(run.script, config.frozen, config.frozen_masks)
    val_tokens, val_roles, modalities, digest = read_frozen(config)
    layout = Layout(modalities, run.device)
    if config.pads:
        layout.pads.fill_(-1)  # an id that no token has: none is padding
    check_config(config, run, layout, len(val_tokens))
    if config.num_steps:
        arrays, run.data_sha256 = read_shards(config, modalities)
    run.choose_precision(config.batch // run.world * config.budget // 2, config.dim, config.mlp_ratio * config.dim)
    torch.manual_seed(config.seed)
    with torch.device("meta" if config.shard else "cpu"):
        model = Nano4M(config, layout)
    if run.device.type == "cuda":  # block by block and for any lengths: few graphs, made in half a minute
        torch.fx.experimental._config.use_duck_shape = False  # or lengths that happen to be equal have to stay so
        for block in (*model.encoder, *model.decoder):
            block.compile(fullgraph=True, dynamic=True)
    if config.shard:
        blocks = [*model.encoder, model.local, *model.decoder, model.mix, *([model.local_word] if model.timed else ())]
        import_ours("sharding").shard_blocks(model, blocks, run, init_weights)
    else:
        init_weights(model.to(run.device))
    run.prepare(model, layout=layout, tokens=val_tokens)
    val_tokens, val_roles = val_tokens.to(run.device), val_roles.to(run.device)

    if config.num_steps:
        with run.warm_up(model):
            muon, adam = make_optimizers(model, config, run)
            rng = torch.Generator(run.device).manual_seed(0)
            dummy = torch.zeros(config.batch, layout.size, dtype=torch.long, device=run.device)
            shapes = {step_shape(step, config, layout): step for step in range(config.num_steps)}
            for step in shapes.values():
                train_step(step, dummy, rng, model, muon, adam, layout, config, run)
            if run.device.type == "cuda":  # without gradients its graphs are others
                with run.autocast():
                    evaluate(model, val_tokens, val_roles, modalities, run.rank, run.world)
    muon, adam = make_optimizers(model, config, run)

    run.start()
    if config.num_steps:
        tokens = torch.cat([torch.from_numpy(array.astype(np.int16)).to(run.device) for array in arrays], 1)
        loader = Loader([tokens], config.batch, config.seed, run.device)
    if run.options.resume:
        import_ours("checkpoints").load_state(run, model, muon, adam, loader)
    while True:
        last = run.step == config.num_steps
        if last or (run.step and run.step % config.eval_every == 0):
            with run.paused(), run.autocast():
                val_loss, numbers = evaluate(model, val_tokens, val_roles, modalities, run.rank, run.world)
                run.evaluation(val_loss)
                if course:
                    numbers |= course.measure(model, val_tokens, layout)
        if last:
            break
        batch = loader()[0].long() & 0xFFFF  # ids above 32767 are negative in 16 bits
        run.progress(*train_step(run.step, batch, loader.rng, model, muon, adam, layout, config, run))
        if run.saver:
            run.saver.after_step(model, muon, adam, loader)

    if config.shard:
        model = import_ours("sharding").whole_on_rank_0(model, run, layout)
    run.result(model, digest, numbers)
    run.show(model)


# --- copied: start ---
if __name__ == "__main__":
    try:
        record(main)(sys.argv[1:])
    except Fault as fault:
        sys.exit(f"{HERE.name}: {fault}")
# --- end: start ---
