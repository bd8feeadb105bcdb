"""
Race training scripts against one another: the ablation tool.

    python records/compare.py train_4m.py my_4m.py --seeds=8
    python records/compare.py train_4m.py "train_4m.py --muon_lr=0.01" "train_4m.py --muon_lr=0.03" --jobs=4

Runs them in turn, A B A B ..., a round for each seed, so that drift of the machine hits all alike; then prints a table
and a verdict, and writes them with the difference of the scripts, the loss curves and the logs to logs/compare/.
The same command again carries on where it was interrupted: a log that is there is not run again. Beforehand it says
how long all will take and whether the machine is busy; times that spread too far to compare are named as such, with
the likely cause and the number of seeds that would settle it.
"""

import argparse
import difflib
import hashlib
import itertools
import json
import math
import os
import queue
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from leaderboard import draw_losses, save_plot, show_loss, show_seconds, table
from rules import (ALPHA, MIN_TRIALS, ROOT, machine, p_value, paired, parse_log, read_fields, seeds_needed,
                   source_config, welch)

NOISY = 20  # per cent on either side: a wider interval tells nothing
BUSY = 0.25  # load average per core above which something else is running
UNEVEN = 0.25  # standard deviation of a run's step times, over their mean, above which they are not even
START_SECONDS = 10  # imports, reading and hashing data, samples
COLUMNS = ("script|>loss mean ± std (n)|>loss over A's|>time (s)|>time over A's|>time to target (s)|>over A's|"
           ">tokens/s|>lines")

# -----------------------------------------------------------------------------
# Running

@dataclass
class Entry:
    """A script with overrides, as it was when the race began."""
    name: str  # A, B ...
    script: str  # file name
    source: str
    overrides: list

    def __str__(self):
        return " ".join([f"{self.name} {self.script}", *self.overrides])

    @property
    def key(self):
        return hashlib.sha256("\0".join([self.script, self.source, *self.overrides]).encode()).hexdigest()[:12]

def read_entries(words):
    """["train_4m.py", "train_4m.py --muon_lr=0.02"] -> entries."""
    entries = []
    for i, word in enumerate(words):
        path, *overrides = [word] if Path(word).is_file() else shlex.split(word) or [""]
        for override in overrides:
            if not re.match(r"--\w+=.", override) or override.startswith("--seed="):
                raise ValueError(f"{path} {override}: overrides look like --field=value, and --seeds sets the seeds")
        try:
            source = Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read the script {path!r}: {getattr(error, 'strerror', error)}") from None
        entries.append(Entry("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[i % 26], Path(path).name, source, overrides))
        if twin := [entry for entry in entries[:-1] if entry.source == source and entry.overrides == overrides]:
            raise ValueError(f"{twin[0]} and {entries[-1]} are the same: edit one, or give it another --field=value")
    return entries

def run_trial(entry, seed, folder, device=None, root=ROOT):
    """The log of one run, from `folder` if it is there. The script runs in a folder of its own, beside the data and
    checkpoints. What fails after its result is said and costs no more than the numbers it would have added."""
    path = folder / f"{Path(entry.script).stem}-{entry.key}-{seed}.log"
    if path.exists():
        return parse_log(path)
    words = [f"--seed={seed}", *entry.overrides]
    with tempfile.TemporaryDirectory(dir=folder, prefix="run-") as work:
        work = Path(work)
        (work / entry.script).write_text(entry.source, encoding="utf-8")
        for name in "data", "checkpoints":
            if Path(root, name).exists():
                (work / name).symlink_to(Path(root, name).resolve())
        env = os.environ | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
        done = subprocess.run([sys.executable, work / entry.script, *words], env=env, capture_output=True, text=True)
        logs = list((work / "logs").glob("*.txt"))
        last = ((done.stderr if done.returncode else "").strip().splitlines() or ["it wrote no log"])[-1]
        try:
            log = parse_log(logs[0]) if len(logs) == 1 else None
        except ValueError:
            log = None
        if not log:
            raise ValueError(f"{entry.script} {' '.join(words)} failed: {last.replace(f'{work}/', '')}")
        if done.returncode:
            said = [line for line in done.stdout.splitlines() if line.strip()]
            tqdm.write(f"{entry.script} {' '.join(words)} has its result, and then: {said[-1] if said else last}")
        logs[0].rename(path)
        return log | {"path": path}

def busy():
    """The load average of the last minute if the machine is busy before anything of ours runs, else 0."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0  # not on Windows
    return load if load > BUSY * (os.cpu_count() or 1) else 0

def expected_seconds(entry, feet):
    """(seconds of training, seconds with all else) of one run of an entry: the newest of these footers that is of its
    script, or else of another one, scaled to its number of steps; None if nothing is known."""
    given = dict(word[2:].split("=", 1) for word in entry.overrides)
    feet = [foot for foot in feet if foot["track"] == given.get("track", foot["track"]) and foot["steps"]]
    feet = [foot for foot in feet if foot["script"] == entry.script] or feet
    try:
        foot = feet[-1]
        steps = int(given.get("num_steps") or source_config(entry.source, foot["track"])["num_steps"])
    except (ValueError, LookupError, TypeError, AttributeError, SyntaxError):
        return None
    train = foot["train_seconds"] * steps / foot["steps"]
    return train, train + foot["compile_seconds"] + foot.get("eval_seconds", 0) + START_SECONDS

def forecast(entries, count, root=ROOT, jobs=1):
    """What is said before the first run: how long `count` rounds take, `jobs` at a time, and whether the machine is
    busy."""
    path, names = Path(root, "records", "runs.jsonl"), {entry.script for entry in entries}
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    feet = [foot for foot in map(json.loads, lines) if foot["script"] in names]
    runs, expected = count * len(entries), [expected_seconds(entry, feet) for entry in entries]
    if all(expected):
        train, total = (math.ceil(count / jobs) * sum(part) / 60 for part in zip(*expected))
        yield (f"{runs} runs, about {total:.1f} minutes: {train:.1f} of training, the rest start-up, warm-up and "
               "evaluation")
    else:
        yield f"{runs} runs; how long they take shows after the first"
    if load := busy():
        yield f"warning: something else is running (load average {load:.1f}): times will be noisy"

def race(entries, seeds, folder, devices=(None,), root=ROOT, estimate=lambda logs: ""):
    """All entries with all seeds, a round of every entry a seed: {entry name: {seed: log}}. A device runs whole rounds,
    so that a seed's runs meet the same one. `estimate` makes the progress bar's text from the rounds that are complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    logs, free, stop = {entry.name: {} for entry in entries}, queue.SimpleQueue(), threading.Event()
    for device in devices:
        free.put(device)

    def run_round(seed):
        device = free.get()
        for entry in entries:
            if not stop.is_set():
                bar.set_description(f"{entry.name}, seed {seed}")
                found = run_trial(entry, seed, folder, device, root)
                logs[entry.name][seed] = found
                bar.update()
        free.put(device)

    with tqdm(total=len(entries) * len(seeds), unit="run", dynamic_ncols=True) as bar, \
            ThreadPoolExecutor(len(devices)) as pool:
        try:
            for _ in pool.map(run_round, seeds) if len(devices) > 1 else map(run_round, seeds):
                done = [s for s in seeds if all(s in found for found in logs.values())]
                bar.set_postfix_str(estimate({name: [found[s] for s in done] for name, found in logs.items()}))
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {name: [found[seed] for seed in seeds] for name, found in logs.items()}

def find_devices(jobs):
    """The GPUs that `jobs` rounds can run on at once, as CUDA_VISIBLE_DEVICES names them; [None]: whatever there is."""
    if jobs == 1:
        return [None]
    devices = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if not devices and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        devices = subprocess.run(query, capture_output=True, text=True).stdout.split()
    if not 1 <= jobs <= len(devices):
        raise ValueError(f"--jobs={jobs} needs as many NVIDIA GPUs, and there are {len(devices)}: "
                         "runs that share cores or a GPU slow one another down")
    return devices[:jobs]

# -----------------------------------------------------------------------------
# Judging

def check_comparable(entries, logs, track):
    """ValueError if two entries' losses are not of one evaluation, or their times not of one machine."""
    def described(log):
        foot, fields = log["footer"], read_fields(log)
        facts = {key: foot.get(key) for key in ("task", "track", "eval_sha256", "precision")}
        return facts | {"hardware": machine(foot)} | {key: fields.get(key) for key in track.get("eval_config", {})}

    first = described(logs[entries[0].name][0])
    for entry in entries:
        log = logs[entry.name][0]
        if not log["footer"]["train_seconds"]:
            raise ValueError(f"{entry} did not train: there is no time to compare")
        for key, other in described(log).items():
            if first[key] != other:
                raise ValueError(f"{entries[0]} and {entry} cannot be compared: {key} is {first[key]} and {other}")

def seconds_to(steps, target):
    """Train seconds at which a loss curve first reaches the target, on straight lines between evaluations; nan: never.
    Where the first evaluation is below already, its time.
    """
    for (_, start, above), (_, end, loss) in zip([steps[0], *steps], steps):
        if loss <= target:
            return end if above <= target else start + (end - start) * (above - target) / (above - loss)
    return math.nan

def measure(logs, target):
    """What the table and the verdict need of an entry's logs, each a list by seed."""
    feet = [log["footer"] for log in logs]
    return dict(losses=[foot["val_loss"] for foot in feet], seconds=[foot["train_seconds"] for foot in feet],
                reach=[seconds_to(log["steps"], target) for log in logs if target],
                rate=np.mean([foot["tokens_per_second"] for foot in feet]))

def unevenness(logs):
    """Spread of the step times within a run, standard deviation over mean; the worst run's."""
    worst = 0.0
    for log in logs:
        points = [(0, 0.0), *((step, seconds) for step, seconds, _ in log["steps"] if step)]
        times = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(points)]
        worst = max(worst, float(np.std(times) / np.mean(times)))
    return worst

def likely_cause(logs, load):
    """Why times may differ so much, in words. load: the load average before the first run, 0 if not busy."""
    uneven = unevenness(logs)
    causes = [f"something else ran, load average {load:.1f} before the first run"] * bool(load)
    causes += [f"the step times within a run differ by {100 * uneven:.0f} %"] * (uneven > UNEVEN)
    return " and ".join(causes) or "whole runs differ: the machine changes its speed, or runs are too short"

def settled_by(gaps):
    """How many seeds would make the interval narrow enough, in words. gaps: differences of log times."""
    n = seeds_needed(gaps, math.asinh(NOISY / 100 / math.exp(np.mean(gaps))))
    return f"about {n} seeds" if n else "no number of seeds within reach, a quiet machine"

def change(a, b, to, cause):
    """How much more time b takes than a, in per cent with the 95 % interval: (for a table, in words).

    Runs are paired by seed, since those of one seed follow one another.
    """
    middle, half = paired(np.log(a), np.log(b))
    cell = f"{100 * math.expm1(middle):+.1f} %"
    if math.isnan(half):
        return cell, f"time to {to} {cell}"
    width = 100 * math.exp(middle) * math.sinh(half)
    spread = f"± {width:.1f} %" if width < 1000 else "± over 1000 %"
    direction = "faster" if middle < 0 else "slower"
    if width > NOISY:
        known = f"{direction} to {to}, by how much is" if abs(middle) > half else f"time to {to}"
        return f"{cell} {spread}", (f"{known} too noisy to tell ({cell} {spread}): {cause}; "
                                    f"{settled_by(np.log(b) - np.log(a))} would settle it")
    words = f"{cell[1:]} {spread} {direction} to {to}"
    return f"{cell} {spread}", words if abs(middle) > half else f"time to {to} within noise ({cell} {spread})"

def compare_entry(entry, first, it, base, target, cause):
    """An entry's row of the table and sentence of the verdict. it, base: what measure says of it and of the first."""
    loss, half = welch(base["losses"], it["losses"])
    n = len(base["losses"])
    end, end_words = change(base["seconds"], it["seconds"], "the end", cause)
    hits, reached = [int(np.isfinite(x["reach"]).sum()) for x in (base, it)], "–"
    aim, aim_words = "–", f"target {target} reached in {hits[1]} of {n} runs, by {first.name} in {hits[0]}"
    if target and hits[1]:
        reached = show_seconds(np.nanmean(it["reach"])) + f" ({hits[1]} of {n})" * (hits[1] < n)
    if target and min(hits) == n:
        aim, aim_words = change(base["reach"], it["reach"], f"the target {target}", cause)
    spread = f" ± {half:.4f}" if n > 1 else ""
    cells = ["–"] * 3 if entry is first else [f"{loss:+.4f}{spread}", end, aim]
    row = [entry, show_loss(it["losses"]), cells[0], show_seconds(np.mean(it["seconds"])), cells[1], reached, cells[2],
           round(it["rate"]), len(entry.source.strip().split("\n"))]
    said = "within noise" if abs(loss) <= half else "lower" if loss < 0 else "higher"
    said = f"loss {said} ({loss:+.4f}{spread})" if n > 1 else f"loss {loss:+.4f}, noise unknown: one seed"
    return row, "; ".join([f"{entry}: {end_words}"] + [aim_words] * bool(target) + [said]) + "."

def how_to_file(entry, first, logs):
    """The command that files an entry's logs, with the first's as those of the record before."""
    paths = (logs[e.name][0]["path"].with_name(f"{Path(e.script).stem}-{e.key}-") for e in (entry, first))
    mine, rival = (shlex.quote(os.path.relpath(path)) + "*.log" for path in paths)
    return (f" It meets the target at p < {ALPHA}; to file it, if {first} is the record: python records/submit.py "
            f"{mine} --rival {rival} --name CamelCase --note 'Title'")

def judge(entries, logs, target, load=0):
    """(rows of the table, sentences of the verdict) from {entry name: [log of each seed]}."""
    rows, verdicts, first = [], [], entries[0]
    base = measure(logs[first.name], target)
    for entry in entries:
        it = measure(logs[entry.name], target)
        cause = likely_cause(logs[first.name] + logs[entry.name], load)
        row, verdict = compare_entry(entry, first, it, base, target, cause)
        rows.append(row)
        if entry is first:
            continue
        if not entry.overrides and target and len(it["losses"]) >= MIN_TRIALS and p_value(it["losses"], target) < ALPHA:
            verdict += how_to_file(entry, first, logs)
        verdicts.append(verdict)
    return rows, verdicts

def report(entries, rows, verdicts, logs):
    """The report's text: differences first."""
    foot, first, out = logs[entries[0].name][0]["footer"], entries[0], [f"# {' / '.join(map(str, entries))}"]
    for entry in entries[1:]:
        diff = difflib.unified_diff(first.source.splitlines(), entry.source.splitlines(), str(first), str(entry),
                                    lineterm="", n=2)
        text = "\n".join(diff) or "the same file"
        out.append(f"````diff\n{text}\n````")
    out += [table(COLUMNS, rows), *verdicts, "![validation loss against train time](loss.png)",
            f"{foot['task']}-{foot['track']} on {foot['hardware']}, {len(logs[first.name])} seeds, run in turn. "
            "Intervals are of 95 %: Welch's for losses, paired by seed for times. % faster is % less time. The time to "
            "the target is where the straight line between two evaluations crosses it."]
    return "\n\n".join(out) + "\n"

def fail(name):
    """argparse's errors as one sentence."""
    def error(message):
        hint = ": put a script and its --field=value overrides in quotes" if "unrecognized" in message else ""
        sys.exit(f"{name}: {message}{hint}")
    return error

def main(argv, root=ROOT):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail("compare.py")
    parser.add_argument("scripts", nargs="+", help="two or more, with overrides if quoted; the first is compared with")
    parser.add_argument("--seeds", type=int, default=5, help="rounds, with seeds 0, 1 ... (5)")
    parser.add_argument("--jobs", type=int, default=1, help="rounds at a time, each on a GPU of its own (1)")
    parser.add_argument("--target", type=float, help="loss to take the time to; the track's if not given")
    parser.add_argument("--out", type=Path, default=root / "logs" / "compare", help="folder of the reports")
    args = parser.parse_intermixed_args(argv)
    try:
        entries = read_entries(args.scripts)
        if len(entries) < 2 or args.seeds < 1:
            raise ValueError("it takes two or more scripts and one or more --seeds")
        race_key = hashlib.sha256("".join(entry.key for entry in entries).encode()).hexdigest()[:8]
        folder = args.out / "-".join([Path(entry.script).stem for entry in entries[:3]] + [race_key])
        target, load, devices = args.target, busy(), find_devices(args.jobs)
        print(*forecast(entries, args.seeds, root, args.jobs), sep="\n")

        def estimate(logs):
            nonlocal target
            foot = logs[entries[0].name][0]["footer"]
            path = Path(root, "records", f"{foot['task']}-{foot['track']}", "track.json")
            track = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            check_comparable(entries, logs, track)
            target = target or track.get("target") or foot["target"]
            rows, _ = judge(entries, logs, target)
            return ", ".join(f"{entry.name} loss {row[2]} time {row[4]}" for entry, row in zip(entries[1:], rows[1:]))

        logs = race(entries, range(args.seeds), folder, devices, root, estimate)
    except (ValueError, OSError) as error:
        sys.exit(f"compare.py: {error}")
    except KeyboardInterrupt:
        sys.exit("compare.py: interrupted; the same command carries on where it stopped")
    rows, verdicts = judge(entries, logs, target, load)
    (folder / "report.md").write_text(report(entries, rows, verdicts, logs), encoding="utf-8")
    save_plot(folder / "loss.png", draw_losses, "validation loss", target,
              [(str(entry), [log["steps"] for log in logs[entry.name]]) for entry in entries])
    print("", table(COLUMNS, rows), *verdicts, sep="\n\n")
    print(f"\nWith the difference of the scripts and a plot: {os.path.relpath(folder)}/report.md")

if __name__ == "__main__":
    main(sys.argv[1:])
