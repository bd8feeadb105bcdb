"""
What more processes do to a training step of train_4m.py: measured on this machine, computed for larger ones.

    python records/scaling.py             # writes docs/SCALING.md and docs/scaling.png; about ten minutes on 2 cores
    python records/scaling.py --counted   # all but what is timed here, which stays as it is; a minute on any machine

The global batch stays the same, so w processes have 1/w of it each. A step then takes

    t(w) = compute / w + replicated + sent(w) / bandwidth

where `replicated` is what every process does for the whole batch or the whole model, and sent(w) are the bytes that a
process passes on. Compute and replicated are measured with one process, the bandwidth with two; sent(w) follows from
the shapes of the parameters and is compared with what was sent. The machine should do nothing else meanwhile.
"""

import argparse
import collections
import dataclasses
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import width
from leaderboard import COLOURS, GREY, save_plot, table
from rules import ROOT, parse_log, read_settings

WORLDS = (1, 2, 3, 4)  # processes
# a batch that all of WORLDS divide; no word steps, which would be all that a short run has
ARGV = ["--track=cpu", "--batch=48", "--quality_scenes=0", "--word_steps=0"]
FLOAT = 4  # bytes; all messages are float32 but Muon's updates
UPDATE = {"fp32": FLOAT, "bf16": 2}  # of these, by precision
REPLICATED = {"loader": "the loader's global batch", "masking": "its inputs and targets",
              "adam": "Adam of embeddings and heads"}
# One H100 and its neighbours as the maker's data sheets have them, per direction.
GPU = dict(flops=989e12, memory=3.35e12, nvlink=450e9, card=50e9, per_machine=8)
GPUS = (1, 8, 64)
GPU_LOG = ROOT / "docs" / "gpu" / "4m.txt"  # of one H100: ways to compile the gpu track, 512 scenes per step
COMPILED = "blocks any length, 128 scenes at a time,"  # the way that came closest to main's
GPU_STEP = re.compile(rf"(?m)^{COMPILED} (.*), (\S+)\) compile \S+ step (\S+)ms (\S+) TF/s$")
WHOLE_MEMORY = re.compile(r"(?m)^blocks static muon .* mem (\d+)$")  # MiB at most, all 512 scenes at a time
# 4M's (arXiv:2312.06647) and ours: channels, blocks of encoder and of decoder, whether they are divided among the GPUs
# dim, blocks of encoder and of decoder, divided among the GPUs, with activations computed again
SIZES = {"gpu": (512, 6, False, False), "4M-B": (768, 12, False, False), "4M-L, gpu-l": (1024, 24, True, False),
         "4M-XL, gpu-xl": (2048, 24, True, True)}
TIMED = "<!-- timed -->"  # in docs/SCALING.md before what only a whole run of this script may change
ADAM_PASSES = 7  # over a parameter: reads it, its gradient and two moments, writes all but the gradient
# over the global batch, 8 bytes per place: random numbers, sorts and comparisons of a course step, counted roughly
MASKING_PASSES = 100
POLAR_STEPS = 5

# -----------------------------------------------------------------------------
# The formula

def parameters(model):
    """({shape: number of Muon's matrices}, how many other parameters there are)."""
    stacks, rest = collections.Counter(), 0
    for name, p in model.named_parameters():
        if "embed" in name or "head" in name:
            rest += p.numel()
        else:
            stacks[tuple(p.shape)] += 1
    return dict(stacks), rest

def share(count, world):
    """How many of `count` matrices of one shape each process orthogonalises; zeros fill up what is left."""
    return -(-count // world)

def volume(world, stacks, rest, sharded, precision="fp32"):
    """Bytes that a process sends in a step, by what they are.

    In a ring it passes on (w-1)/w of a message, twice for all_reduce. sharded: the gradients of Muon's matrices are
    reduced to the process that orthogonalises them, not to all.
    """
    ring = (world - 1) / world * FLOAT
    size = {shape: math.prod(shape) for shape in stacks}
    padded = sum(share(count, world) * world * size[shape] for shape, count in stacks.items())
    plain = sum(count * size[shape] for shape, count in stacks.items())
    return {"gradients of Muon's matrices": ring * padded if sharded else 2 * ring * plain,
            "their updates": ring * padded * UPDATE[precision] / FLOAT, "gradients of the rest": 2 * ring * rest}

def step_seconds(world, compute, replicated, sent, bandwidth, cores=math.inf):
    """The formula; where processes share cores, each is slower by as many as share one."""
    return max(1, world / cores) * (compute / world + replicated) + sent / bandwidth

def polar_flops(stacks, world):
    """FLOPs of Muon's orthogonalisation on one process."""
    total = 0
    for shape, count in stacks.items():
        short, long = sorted(shape)
        total += share(count, world) * POLAR_STEPS * (4 * short ** 2 * long + 2 * short ** 3)
    return total

def project(world, stacks, rest, sharded, flops, places, reached):
    """A step on `world` GPUs by the data sheet: {part: seconds}, and bytes sent.

    flops: of the global batch without Muon; places: of the global batch, all modalities; reached: of a GPU's peak.
    """
    machines = -(-world // GPU["per_machine"])
    sent = sum(volume(world, stacks, rest, sharded, "bf16").values())
    # a ring leaves a machine on one card, but there are as many rings as cards, each with its part of the message
    bandwidth = GPU["nvlink"] if machines == 1 else min(GPU["nvlink"], GPU["card"] * GPU["per_machine"])
    return {"sent": sent, "compute": (flops / world + polar_flops(stacks, world)) / (GPU["flops"] * reached),
            "replicated": (ADAM_PASSES * FLOAT * rest + MASKING_PASSES * 8 * places) / GPU["memory"],
            "messages": sent / bandwidth}

def state_bytes(world, stacks, rest, divided):
    """Bytes of weights, gradients, momentum and Adam's two moments on one of `world` GPUs. divided: FSDP2 leaves it its
    part of the matrices and of their gradients; their momentum always is divided, in whole matrices."""
    matrices = sum(count * math.prod(shape) for shape, count in stacks.items())
    momentum = sum(share(count, world) * math.prod(shape) for shape, count in stacks.items())
    return FLOAT * (2 * matrices / (world if divided else 1) + momentum + 4 * rest)

# -----------------------------------------------------------------------------
# Measuring

def work(out, argv):
    """One process: train_4m.py of this folder, with the time of its parts and its messages written to `out`."""
    sys.path.insert(0, os.getcwd())
    import torch
    import torch.distributed as dist
    import train_4m
    seconds, sent, calls = collections.Counter(), collections.Counter(), collections.Counter()
    world = int(os.environ["WORLD_SIZE"])

    def nbytes(argument):
        tensors = argument if isinstance(argument, (list, tuple)) else [argument]
        return sum(t.nbytes for t in tensors if torch.is_tensor(t))

    class Waited:
        """An asynchronous message: what counts is how long it is waited for."""

        def __init__(self, message):
            self.message = message

        def wait(self):
            start = time.perf_counter()
            self.message.wait()
            seconds["messages"] += time.perf_counter() - start

    def timed(owner, name, part, message=0):
        """Time owner.name; message: how often a ring passes its largest argument on."""
        original = getattr(owner, name)

        def wrapper(*arguments, **named):
            start = time.perf_counter()
            result = original(*arguments, **named)
            seconds[part] += time.perf_counter() - start
            calls[part] += 1
            if message:
                largest = max(map(nbytes, [*arguments, *named.values()]))
                sent[name] += message * (world - 1) / world * largest
            return Waited(result) if hasattr(result, "wait") else result
        setattr(owner, name, wrapper)

    for name in "all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor":
        timed(dist, name, "messages", 1)
    timed(dist, "all_reduce", "messages", 2)
    timed(train_4m.Loader, "__call__", "loader")
    for name in "link_positions", "course_positions", "target_weights":
        timed(train_4m, name, "masking")
    timed(torch.optim.Adam, "step", "adam")
    start_clock = train_4m.Loader.__init__

    def begin(*arguments):  # the loader is made when the clock starts: what was before is warm-up
        for counter in (seconds, sent, calls):
            counter.clear()
        start_clock(*arguments)

    def evaluate(*_):  # the clock is paused there, and nothing here is about the loss
        return 0.0, {}

    def prepare_show(*_, **__):
        """No samples."""
    train_4m.Loader.__init__ = begin
    train_4m.evaluate = evaluate
    train_4m.Run.prepare_show = prepare_show
    train_4m.main(argv)
    if int(os.environ["RANK"]) == 0:
        steps = calls["loader"]
        found = {"steps": steps}
        for name, counter in (("seconds", seconds), ("sent", sent)):
            found[name] = {part: value / steps for part, value in counter.items()}
        Path(out).write_text(json.dumps(found))

def measure(folder, world, threads, argv):
    """One run of `world` processes in a folder with train_4m.py and its data: seconds per step, of its parts, bytes."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    out, before = Path(folder, "parts.json"), set(Path(folder).glob("logs/*.txt"))
    out.unlink(missing_ok=True)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}",
                           __file__, "--work", out, *argv], cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode or not out.exists():
        raise ValueError(f"{world} processes failed: {done.stderr.strip()[-8000:]}")
    path, = set(Path(folder).glob("logs/*.txt")) - before
    log = parse_log(path)
    if log["footer"]["world_size"] != world:
        raise ValueError(f"{path}: its world_size is {log['footer']['world_size']}, not {world}")
    return {**json.loads(out.read_text()), "world": world, "threads": threads, "step": log["averages"][-1] / 1000,
            "torch": read_settings(log)["torch"], "precision": log["footer"]["precision"],
            "hardware": str(log["footer"]["hardware"]).partition(" cores of ")[2]}

def make_folder(folder, scenes):
    """A folder with the script, its data scripts and so many training scenes: seconds that making these took."""
    shutil.copy(ROOT / "train_4m.py", folder)
    Path(folder, "data").mkdir()
    for path in (ROOT / "data").glob("*.py"):
        shutil.copy(path, Path(folder, "data"))
    Path(folder, "data/frozen").symlink_to(ROOT / "data/frozen")
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "data/scenes.py", f"--num={scenes}"], cwd=folder, capture_output=True,
                          text=True)
    if done.returncode:
        raise ValueError(f"data/scenes.py failed: {done.stderr.strip()[-2000:]}")
    return time.perf_counter() - start

# -----------------------------------------------------------------------------
# Reporting

def median(runs, read):
    return statistics.median(map(read, runs))

def part(name):
    """Reads the seconds per step of one part from a run's results."""
    return lambda run: run["seconds"].get(name, 0.0)

def fit(runs, stacks, rest, sharded, cores):
    """The formula's constants from the runs {(processes, threads): [measure's results]}."""
    replicated = {name: median(runs[1, 1], part(name)) for name in REPLICATED}
    compute = median(runs[1, 1], lambda run: run["step"]) - sum(replicated.values())
    precision = runs[1, 1][0]["precision"]
    sent = {world: sum(volume(world, stacks, rest, sharded, precision).values()) for world in WORLDS}
    bandwidth = sent[2] / median(runs[2, 1], part("messages"))
    line = {world: step_seconds(world, compute, sum(replicated.values()), sent[world], bandwidth, cores)
            for world in WORLDS}
    return {"replicated": replicated, "compute": compute, "sent": sent, "bandwidth": bandwidth, "line": line}

def draw_scaling(ax, points, line, cores):
    """Measured step times, one point per run, over the formula's line. points: [(processes, milliseconds)]."""
    ax.plot(*zip(*line), color=COLOURS[1], label="formula")
    ax.scatter(*zip(*points), color=COLOURS[0], zorder=3, label="measured, one thread per process")
    if cores < line[-1][0]:
        ax.axvspan(cores + 0.5, line[-1][0] + 0.5, color=GREY, alpha=0.12, linewidth=0, label="processes share cores")
    ax.set(xlabel="processes", ylabel="milliseconds per step", title="one step of train_4m.py, the same global batch",
           xticks=[world for world, _ in line], ylim=(0, None), xlim=(line[0][0] - 0.5, line[-1][0] + 0.5))

def measured_table(runs, found):
    """A row for each number of processes and threads: times in ms, bytes in MB."""
    rows = []
    for (world, threads), group in sorted(runs.items()):
        steps = [1000 * run["step"] for run in group]
        step, formula = statistics.median(steps), 1000 * found["line"][world]
        fits = [f"{formula:.1f}", f"{100 * (step / formula - 1):+.0f} %"] if threads == 1 else ["–", "–"]
        parts = [1000 * median(group, part(name)) for name in (*REPLICATED, "messages")]
        sent = [median(group, lambda run: sum(run["sent"].values())), found["sent"][world]]
        rows.append([world, threads, f"{step:.1f} ({min(steps):.1f} to {max(steps):.1f})", *fits,
                     *(f"{value:.1f}" for value in parts), *(f"{value / 1e6:.2f}" for value in sent)])
    return table(">processes|>threads each|>step|>formula|>step over formula|>loader|>masking|>Adam|>messages|"
                 ">sent|>sent by formula", rows)

def projected_table(stacks, rest, sharded, flops, places, batch, reached):
    rows, first = [], None
    for world in GPUS:
        times = project(world, stacks, rest, sharded, flops, places, reached)
        sent, total = times.pop("sent"), sum(times.values())
        first = first or total
        rows.append([world, -(-world // GPU["per_machine"]), batch // world, f"{sent / 1e6:.0f}",
                     *(f"{1000 * value:.2f}" for value in (*times.values(), total)), f"{first / total:.1f}x",
                     f"{100 * first / total / world:.0f} %"])
    return table(">GPUs|>machines|>scenes each|>MB sent|>compute (ms)|>replicated (ms)|>messages (ms)|>step (ms)|"
                 ">speed-up|>efficiency", rows)

def bytes_table(stacks, rest, sharded):
    """MB that a GPU sends in a step, by what they are."""
    rows = []
    for world in GPUS[1:]:
        parts = volume(world, stacks, rest, sharded, "bf16")
        rows.append([world, *(f"{value / 1e6:.1f}" for value in (*parts.values(), sum(parts.values())))])
    return table(">GPUs|>" + "|>".join(volume(1, stacks, rest, sharded)) + "|>all", rows)

def sizes_table(script, layout, activations):
    """Parameters and memory of train_4m.py's gpu track in 4M's sizes. activations: bytes per dim x block x scene."""
    rows, gpu = [], script.CONFIGS["gpu"]
    for name, (dim, depth, divided, recompute) in SIZES.items():
        config = dataclasses.replace(gpu, dim=dim, enc_depth=depth, dec_depth=depth)
        blocks, memory = [], {}
        for dec_self in (False, True):
            model = make_model(script, dataclasses.replace(config, dec_self=dec_self), layout)
            blocks.append(sum(p.numel() for block in (*model.encoder, *model.decoder) for p in block.parameters()))
            memory[dec_self] = [state_bytes(world, *parameters(model), divided and world > 1) for world in GPUS]
            if not dec_self:
                total = sum(p.numel() for p in model.parameters())
        at_a_time = gpu.micro_batch * gpu.dim * gpu.enc_depth // (dim * depth)
        kept = activations * dim * 2 * depth * at_a_time
        if recompute:  # what enters blocks, in float32 and at most all places of a scene, and the inside of one
            at_a_time = script.CONFIGS["gpu-xl"].micro_batch
            kept = (4 * layout.size * 2 * depth + activations) * dim * at_a_time
        states = [f"{plain / 1e9:.1f} / {more / 1e9:.1f}" for plain, more in zip(*memory.values())]
        rows.append([name, dim, f"{depth} + {depth}", f"{total / 1e6:,.0f}",
                     *(f"{count / 1e6:,.0f}" for count in blocks), *states, at_a_time, f"{kept / 1e9:.0f}"])
    worlds = "|>".join(f"GB of states, {world} GPU{'s' * (world > 1)}" for world in GPUS)
    return table(f"size|>dim|>blocks|>M parameters|>M in blocks|>M in blocks, dec_self|>{worlds}|>scenes at a time|"
                 ">GB of activations", rows)

def gpu_steps():
    """[(link, share known, milliseconds, TFLOP/s)] of the steps that were timed on one H100."""
    steps = []
    for link, share, milliseconds, rate in GPU_STEP.findall(GPU_LOG.read_text()):
        sides = [", ".join(re.findall(r"\w+", side)) for side in re.findall(r"\(('[^)]*)\)", link)]
        steps.append((" -> ".join(sides) or "any tokens -> any others", share, float(milliseconds), float(rate)))
    return steps

COUNTED = """# Scaling

Written by `python records/scaling.py`: do not edit; every number is counted, computed or measured there, or stands in a
log of [gpu](gpu). What is timed on CPUs is the last part; `--counted` writes all before it again.

## Counted: bytes per step

A step of the `gpu` track of train_4m.py ({gpu_parameters:,} parameters, global batch {gpu_batch}), MB that each GPU
passes on in rings of w GPUs, of P_m parameters in Muon's matrices and P_a others:
{reduced}, all_gather of their updates (w-1)/w 2 P_m, in bfloat16,
all_reduce of the other gradients 2 (w-1)/w 4 P_a. Matrices of one shape are divided among the GPUs; where that leaves a
remainder, zeros fill it up. tests/test_scaling.py holds the formula against what two processes send.

{sent}

## Counted: operators per step

Operators of a step of the `gpu` track that compute something, counted on a CPU in float32 with nothing compiled and all
scenes of a process at a time. On a GPU each is a launch, and bfloat16 adds casts; but blocks are compiled there, which
leaves a part of theirs. All else is not, and as much on any number of GPUs: every process draws inputs and targets for
the whole batch, and orthogonalises its share of each stack. Operators and waits of all five scripts may not grow:
tests/test_gpu_day.py.

{operators}

## Counted: parameters and memory per GPU

Parameters in millions, those of the blocks also with `--dec_self=true`, 4M's decoder, whose targets attend to each
other within their modality: 198 M, 705 M and 2.8 B are the paper's. States are weights, gradients, momentum and Adam's
two moments, all float32, counted from the shapes, without and with it; gpu-l and gpu-xl divide them among several
GPUs. Activations are computed: {memory_mib:,} MiB at most were measured on one H100 for 512 scenes at a time at dim
512, 6 + 6 blocks; what is beyond the states is taken to grow with dim x blocks x scenes at a time. gpu-xl keeps what
enters its blocks alone (`--recompute=true`) and computes the rest again, a third more to compute: otherwise it would
have room for 16 scenes. A divided block that is gathered, and buffers of messages, come on top.

{sizes}

## Measured on one H100

The `gpu` track, {gpu_batch} scenes per step, blocks compiled for any length, 128 scenes at a time (the track takes 256
now): milliseconds of a step by what it teaches, and TFLOP/s of its matrix products ([log](gpu/4m.txt)).

{steps}

## Computed for H100, not measured

The same track on more GPUs by the formula below: **nobody has run this table**. It assumes {flops:.0f} TFLOP/s in
bfloat16, of which {reached:.1f} % are reached, the median of the steps above, and {memory:.2f} TB/s of memory;
{per_machine} GPUs per machine with {nvlink:.0f} GB/s of NVLink each and direction; between machines an InfiniBand
card of {card:.0f} GB/s for each GPU, over all of which the rings are spread. Replicated is the memory traffic of Adam
({adam} passes over its parameters) and of masking (some {masking} over the batch). Left out are the start of kernels
and of messages, and that a GPU with few scenes reaches less of its peak: with many GPUs the truth is slower than the
table.

{projected}

## Learning rates and width

What is confirmed at dim 64, 128 and 256: Muon's rate may stay as it is when the width changes. Adam's has to fall with
it. As 1 / width would fit, but is not confirmed: at 128 and 256 the best rate is at the edge of what has been tried.
The rates of the gpu tracks, whose batches are larger as well, stand in their Configs and follow no rule; none of these
tracks has been run.

{width}
"""

REPORT = """
## Timed on CPUs

At commit {commit}. {hardware}, {cores} cores; gloo over loopback; torch {torch}.
`train_4m.py --track=cpu` with a global batch of {batch} whatever the number of processes, {steps} steps; medians of
{repeats} runs that took turns, lowest and highest in parentheses. Times are milliseconds and bytes MB of a step, on
process 0; waiting for the others counts as messages.
{crowd}

{measured}

![milliseconds per step against processes: measured, and by formula](scaling.png)

Data: {scenes} scenes were rendered and coded in {scene_seconds:.1f} s, start included, {scene_rate:.0f} per second. The
loader gives {loader_rate:,.0f} rows per second, and training takes {train_rate:.0f}.

## Formula

    t(w) = compute / w + replicated + sent(w) / bandwidth

- compute, {compute:.1f} ms: forward, backward and Muon's matrices, which the processes divide.
- replicated, {replicated:.1f} ms: what each process does in full: {parts}.
- sent(w), the bytes a process passes on, as counted above, for P_m = {matrices:,} and P_a = {rest:,}; in float32
  updates are 4 P_m instead of 2 P_m.
- bandwidth, {bandwidth:.2f} GB/s: sent(2) over the time that two processes spent on messages, waiting included.

Compute and replicated come from one process with one thread, the bandwidth from two; the other rows test the formula.
It leaves out that smaller matrices are slower for their size, that gradients are copied into messages and back, and
what processes lose that take turns on a core.
"""

def counted_report(large):
    """The part of docs/SCALING.md that is the same on any machine. large: what read_model gives of gpu."""
    import launches
    script, layout = open_script("gpu")
    stacks, rest, sharded, *_, batch = large
    steps = gpu_steps()
    reached = statistics.median(rate for *_, rate in steps) * 1e12 / GPU["flops"]
    gpu = script.CONFIGS["gpu"]
    few = script.read_frozen(gpu)[0][:2]
    memory_mib = int(WHOLE_MEMORY.search(GPU_LOG.read_text())[1])
    beyond = (memory_mib << 20) - state_bytes(1, stacks, rest, False)
    activations = beyond / (batch * gpu.dim * (gpu.enc_depth + gpu.dec_depth))
    return COUNTED.format(
        gpu_parameters=sum(count * math.prod(shape) for shape, count in stacks.items()) + rest, gpu_batch=batch,
        sent=bytes_table(stacks, rest, sharded), operators=launches.report(script, layout, few),
        memory_mib=memory_mib, sizes=sizes_table(script, layout, activations),
        steps=table("given -> asked|>known of the first|>milliseconds|>TFLOP/s", steps), flops=GPU["flops"] / 1e12,
        reached=100 * reached, memory=GPU["memory"] / 1e12, per_machine=GPU["per_machine"], nvlink=GPU["nvlink"] / 1e9,
        card=GPU["card"] / 1e9, adam=ADAM_PASSES, masking=MASKING_PASSES,
        projected=projected_table(*large, reached), width=width.report(width.load()),
        reduced=("reduce_scatter of the matrices' gradients (w-1)/w 4 P_m" if sharded else
                 "all_reduce of the matrices' gradients 2 (w-1)/w 4 P_m"))

def report(runs, cores, scenes, scene_seconds, model):
    """The timed part of docs/SCALING.md, and the plot's arguments. model: what read_model gives of cpu."""
    stacks, rest, sharded, _, _, _ = model
    found, some = fit(runs, stacks, rest, sharded, cores), runs[1, 1][0]
    batch = int(dict(word.split("=") for word in ARGV)["--batch"])
    shared, crowd = [str(world) for world in WORLDS if world > cores], ""
    if shared:
        crowd = (f"With {cores} cores, {' and '.join(shared)} processes share them: those rows show what crowding "
                 "costs, not scaling; in the formula a core's time then counts for each process on it.")
    commit = subprocess.run("git rev-parse --short HEAD", shell=True, cwd=ROOT, capture_output=True, text=True).stdout
    text = REPORT.format(
        commit=commit.strip(),
        hardware=some["hardware"], cores=cores, torch=some["torch"], batch=batch, steps=some["steps"],
        repeats=len(runs[1, 1]), crowd=crowd, measured=measured_table(runs, found), scenes=scenes,
        scene_seconds=scene_seconds, scene_rate=scenes / scene_seconds,
        loader_rate=batch / found["replicated"]["loader"], train_rate=batch / found["line"][1],
        compute=1000 * found["compute"], replicated=1000 * sum(found["replicated"].values()),
        parts=", ".join(f"{what} ({1000 * found['replicated'][name]:.1f})" for name, what in REPLICATED.items()),
        matrices=sum(number * math.prod(shape) for shape, number in stacks.items()), rest=rest,
        bandwidth=found["bandwidth"] / 1e9)
    points = [(world, round(1000 * run["step"], 3)) for world in WORLDS for run in runs[world, 1]]
    line = [(world, round(1000 * seconds, 3)) for world, seconds in found["line"].items()]
    return text, (draw_scaling, points, line, cores)

def step_sizes(script, step, tokens, layout, config):
    """Inputs, image targets and text targets per scene of a step of train_4m.py; tokens (B, size): of any scenes."""
    import torch
    link, share = script.step_shape(step, config, layout)
    if link is None:
        return int(share * config.budget), config.image_targets, config.text_targets
    enc_pos, _, dec_pos, _ = script.link_positions(tokens, layout, *link, share, torch.Generator())
    inputs, targets = enc_pos.size(1), dec_pos.size(1)
    return (inputs, 0, targets) if link[1][0] in script.TEXTS else (inputs, targets, 0)

def open_script(track):
    """train_4m.py as a module, and the layout of a track's scenes."""
    sys.path.insert(0, str(ROOT))
    import train_4m
    return train_4m, train_4m.Layout(train_4m.read_frozen(train_4m.CONFIGS[track])[2])

def make_model(script, config, layout):
    """A model without weights: shapes alone."""
    import torch
    with torch.device("meta"):
        return script.Nano4M(config, layout)

def read_model(track):
    """(stacks, rest, sharded, FLOPs of a global batch, its places, batch) of a track of train_4m.py."""
    train_4m, layout = open_script(track)
    config = train_4m.CONFIGS[track]
    tokens = train_4m.read_frozen(config)[0]
    model = make_model(train_4m, config, layout)
    sizes = [step_sizes(train_4m, step, tokens[:1], layout, config) for step in range(config.num_steps)]
    flops = statistics.mean(train_4m.flops_per_scene(model, config, *size) for size in sizes)
    sharded = "reduce_scatter" in (ROOT / "train_4m.py").read_text()
    return *parameters(model), sharded, config.batch * flops, config.batch * layout.size, config.batch

def main(argv):
    if argv[:1] == ["--work"]:
        return work(argv[1], argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="of a run; ten kinds take turns")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each number of processes")
    parser.add_argument("--scenes", type=int, default=2000, help="training scenes to make")
    parser.add_argument("--counted", action="store_true", help="keep the timed part as it is")
    options = parser.parse_args(argv)
    path = ROOT / "docs" / "SCALING.md"
    if options.counted:
        _, marker, timed = path.read_text(encoding="utf-8").partition(TIMED)
        path.write_text(counted_report(read_model("gpu")) + "\n" + marker + timed, encoding="utf-8")
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # one thread per process, so that a process is a core; and, to compare, one process with a thread on every core
    settings = [(world, 1) for world in WORLDS] + [(1, cores)] * (cores > 1)
    runs = {setting: [] for setting in settings}
    with tempfile.TemporaryDirectory() as folder:
        seconds = make_folder(folder, options.scenes)
        for _ in range(options.repeats):  # in turn, so that a machine that slows down slows all
            for world, threads in settings:
                words = [*ARGV, f"--num_steps={options.steps}", "--eval_every=1000000"]
                run = measure(folder, world, threads, words)
                runs[world, threads].append(run)
                print(f"processes: {world}, threads each: {threads}, {1000 * run['step']:.1f} ms per step", flush=True)
    text, plot = report(runs, cores, options.scenes, seconds, read_model("cpu"))
    path.write_text(counted_report(read_model("gpu")) + f"\n{TIMED}\n" + text, encoding="utf-8")
    save_plot(ROOT / "docs" / "scaling.png", *plot)

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"scaling.py: {error}")
