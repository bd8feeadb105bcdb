"""
Race training scripts against one another: the ablation tool.

    python records/compare.py train_4m.py my_4m.py --seeds=8
    python records/compare.py train_4m.py "train_4m.py --muon_lr=0.02" "train_4m.py --muon_lr=0.05" --jobs=4

Runs them in turn, A B A B ..., a round for each seed, so that drift of the machine hits all alike; then prints a table
and a verdict, and writes them with the difference of the scripts, the loss curves and the logs to logs/compare/.
The same command again carries on where it was interrupted: a log that is there is not run again.
"""

import argparse
import difflib
import hashlib
import json
import math
import os
import queue
import re
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
from rules import ALPHA, MIN_TRIALS, ROOT, p_value, paired, parse_log, read_settings, welch

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
    for i, (path, *overrides) in enumerate(word.split() or [""] for word in words):
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
    """The log of one run, from `folder` if it is there. The script runs in a folder of its own, beside the data."""
    path = folder / f"{Path(entry.script).stem}-{entry.key}-{seed}.log"
    if path.exists():
        return parse_log(path)
    words = [f"--seed={seed}", *entry.overrides]
    with tempfile.TemporaryDirectory(dir=folder, prefix="run-") as work:
        work = Path(work)
        (work / entry.script).write_text(entry.source, encoding="utf-8")
        (work / "data").symlink_to(Path(root, "data").resolve())
        env = os.environ | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
        done = subprocess.run([sys.executable, work / entry.script, *words], env=env, capture_output=True, text=True)
        logs = list((work / "logs").glob("*.txt"))
        if done.returncode or len(logs) != 1:
            last = (done.stderr.strip().splitlines() or ["it wrote no log"])[-1]
            raise ValueError(f"{entry.script} {' '.join(words)} failed: {last.replace(f'{work}/', '')}")
        log = parse_log(logs[0])
        logs[0].rename(path)
        return log | {"path": path}

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
    """ValueError if two entries' losses are not of one evaluation."""
    first = logs[entries[0].name][0]
    for entry in entries:
        log = logs[entry.name][0]
        keys = "task", "track", "eval_sha256", "hardware", "world_size"
        pairs = [(key, first["footer"][key], log["footer"][key]) for key in keys]
        pairs += [(key, *(read_settings(one)["config"].get(key) for one in (first, log)))
                  for key in track.get("eval_config", {})]
        if not log["footer"]["train_seconds"]:
            raise ValueError(f"{entry} did not train: there is no time to compare")
        for key, mine, other in pairs:
            if mine != other:
                raise ValueError(f"{entries[0]} and {entry} cannot be compared: {key} is {mine} and {other}")

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

def change(a, b, to):
    """How much more time b takes than a, in per cent with the 95 % interval: (for a table, in words).

    Runs are paired by seed, since those of one seed follow one another.
    """
    middle, half = paired(np.log(a), np.log(b))
    cell = f"{100 * math.expm1(middle):+.1f} %"
    if math.isnan(half):
        return cell, f"time to {to} {cell}"
    spread = f"± {50 * (math.exp(middle + half) - math.exp(middle - half)):.1f} %"
    words = f"{cell[1:]} {spread} {'faster' if middle < 0 else 'slower'} to {to}"
    return f"{cell} {spread}", words if abs(middle) > half else f"time to {to} within noise ({cell} {spread})"

def judge(entries, logs, target):
    """(rows of the table, sentences of the verdict) from {entry name: [log of each seed]}."""
    rows, verdicts, base = [], [], measure(logs[entries[0].name], target)
    n = len(base["losses"])
    for entry in entries:
        it = measure(logs[entry.name], target)
        loss, half = welch(base["losses"], it["losses"])
        end, end_words = change(base["seconds"], it["seconds"], "the end")
        hits, reached = [int(np.isfinite(x["reach"]).sum()) for x in (base, it)], "–"
        aim, aim_words = "–", f"target {target} reached in {hits[1]} of {n} runs, by {entries[0].name} in {hits[0]}"
        if target and hits[1]:
            reached = show_seconds(np.nanmean(it["reach"])) + f" ({hits[1]} of {n})" * (hits[1] < n)
        if target and min(hits) == n:
            aim, aim_words = change(base["reach"], it["reach"], f"the target {target}")
        spread = f" ± {half:.4f}" if n > 1 else ""
        cells = ["–"] * 3 if entry is entries[0] else [f"{loss:+.4f}{spread}", end, aim]
        rows.append([entry, show_loss(it["losses"]), cells[0], show_seconds(np.mean(it["seconds"])), cells[1], reached,
                     cells[2], round(it["rate"]), len(entry.source.strip().split("\n"))])
        if entry is not entries[0]:
            said = "within noise" if abs(loss) <= half else "lower" if loss < 0 else "higher"
            said = f"loss {said} ({loss:+.4f}{spread})" if n > 1 else f"loss {loss:+.4f}, noise unknown: one seed"
            verdicts.append("; ".join([f"{entry}: {end_words}"] + [aim_words] * bool(target) + [said]) + ".")
            if not entry.overrides and target and n >= MIN_TRIALS and p_value(it["losses"], target) < ALPHA:
                stem = logs[entry.name][0]["path"].with_name(f"{Path(entry.script).stem}-{entry.key}-")
                files = f"{os.path.relpath(stem)}*.log"
                verdicts[-1] += (f" It meets the target at p < {ALPHA}; to file it: python records/submit.py {files} "
                                 "--name CamelCase --note 'Title'")
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
        target = args.target

        def estimate(logs):
            nonlocal target
            foot = logs[entries[0].name][0]["footer"]
            path = Path(root, "records", f"{foot['task']}-{foot['track']}", "track.json")
            track = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            check_comparable(entries, logs, track)
            target = target or track.get("target") or foot["target"]
            rows, _ = judge(entries, logs, target)
            return ", ".join(f"{entry.name} loss {row[2]} time {row[4]}" for entry, row in zip(entries[1:], rows[1:]))

        logs = race(entries, range(args.seeds), folder, find_devices(args.jobs), root, estimate)
    except (ValueError, OSError) as error:
        sys.exit(f"compare.py: {error}")
    except KeyboardInterrupt:
        sys.exit("compare.py: interrupted; the same command carries on where it stopped")
    rows, verdicts = judge(entries, logs, target)
    (folder / "report.md").write_text(report(entries, rows, verdicts, logs), encoding="utf-8")
    save_plot(folder / "loss.png", draw_losses, "validation loss", target,
              [(str(entry), [log["steps"] for log in logs[entry.name]]) for entry in entries])
    print("", table(COLUMNS, rows), *verdicts, sep="\n\n")
    print(f"\nWith the difference of the scripts and a plot: {os.path.relpath(folder)}/report.md")

if __name__ == "__main__":
    main(sys.argv[1:])
