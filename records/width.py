"""
Which learning rates are best at which width: what is known about moving a rate from a cpu track to a wider gpu track.

    python records/width.py                      # goes on with docs/width.json; half an hour of one core
    python records/scaling.py --counted          # writes the table into docs/SCALING.md

Trains train_gpt.py for a few steps at every width, one of its rates a power of two times what the cpu track has, all
else as it is, on one core in float32. Losses count, not times: the machine may do other things meanwhile.
"""
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from leaderboard import table
from rules import ROOT, parse_log

RESULTS = ROOT / "docs" / "width.json"  # {"fields": FIELDS, "rates": RATES, "losses": {key: loss, null: not finite}}
WIDTHS = (64, 128, 256)
RATES = {"muon_lr": 0.04, "adam_lr": 0.05}  # the cpu track's
FACTORS = (0.25, 0.5, 1, 2, 4)
# two blocks, and no more than bigrams in tables: so that the matrices, whose rates are asked about, matter
FIELDS = ["--track=cpu", "--seed=0", "--precision=fp32", "--depth=2", "--orders=2", "--num_steps=200",
          "--eval_every=200", "--eval_tokens=32768", "--quality_tokens=0", "--sample_tokens=1"]


def key_of(width, rate, factor):
    """The run at one width with one rate so many times the track's; that at factor 1 is the same for all rates."""
    return f"dim {width}" if factor == 1 else f"dim {width}, {rate} x {factor:g}"


def load():
    """{key: validation loss} of the runs that are done; None where there was no finite one."""
    about = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return about["losses"] if (about.get("fields"), about.get("rates")) == (FIELDS, RATES) else {}


def train(width, rate, factor, fields=FIELDS):
    """Train once in a folder of its own: the validation loss, None if it is not finite."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(ROOT / "train_gpt.py", folder)
        Path(folder, "data").symlink_to(ROOT / "data")
        numbers = {"dim": width, **RATES, rate: factor * RATES[rate]}
        argv = [*fields, *(f"--{name}={value:g}" for name, value in numbers.items())]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "train_gpt.py", *argv]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        if "lower the learning rate" in done.stderr:
            return None
        if done.returncode:
            raise ValueError(f"{' '.join(argv)} failed: {done.stderr.strip()[-1000:]}")
        log, = Path(folder, "logs").iterdir()
        return parse_log(log)["footer"]["val_loss"]


def best(losses, width, rate):
    """The factor with the lowest loss, of those that have been tried."""
    found = {factor: losses.get(key_of(width, rate, factor)) for factor in FACTORS}
    return min((factor for factor in FACTORS if found[factor] is not None), key=found.get, default=None)


def optimum(losses, width, rate):
    """The best factor as text: the lowest point of a parabola through the lowest loss and its neighbours, over the
    logarithm of the factor; at the edge of what has been tried the last factor."""
    least = best(losses, width, rate)
    if least is None:
        return "–"
    at = FACTORS.index(least)
    near = [losses.get(key_of(width, rate, factor)) for factor in FACTORS[max(0, at - 1):at + 2]]
    if len(near) < 3 or None in near:
        return f"x {least:g} or beyond"
    left, middle, right = near
    return f"x {least * 2 ** ((left - right) / 2 / (left - 2 * middle + right)):.2f}"


def report(losses):
    """The sweep as Markdown: the lowest loss of each row in bold."""
    if not losses:
        return "`python records/width.py` tries them at three widths; it has not been run as it is now."
    rows = []
    for rate in RATES:
        for width in WIDTHS:
            cells, least = [], best(losses, width, rate)
            for factor in FACTORS:
                key = key_of(width, rate, factor)
                cell = "–"
                if key in losses:
                    cell = "diverged" if losses[key] is None else f"{losses[key]:.4f}"
                cells.append(f"**{cell}**" if factor == least else cell)
            rows.append([rate, width, *cells])
    heads = "|>".join(f"x {factor:g}" for factor in FACTORS)
    base = " and ".join(f"{rate} {value:g}" for rate, value in RATES.items())
    optima = "; ".join(f"{rate} {', '.join(optimum(losses, width, rate) for width in WIDTHS)}" for rate in RATES)
    return (f"What can be said from CPUs: validation losses of train_gpt.py ({' '.join(FIELDS[2:6])}) by width, one\n"
            f"rate a factor times {base}, all else as it is (`python records/width.py`, one\nseed each, the best of a "
            f"row in bold):\n\n{table(f'rate|>dim|>{heads}', rows)}\n\n"
            f"Best at dim {', '.join(map(str, WIDTHS))}, by a parabola through the lowest loss and its neighbours:\n"
            f"{optima}.")


def main():
    losses = load()
    near = sorted(FACTORS, key=lambda factor: abs(math.log2(factor)))  # first
    points = [(width, rate, factor) for factor in near for width in WIDTHS for rate in RATES]
    points = {key_of(*point): point for point in points}
    for i, (key, point) in enumerate(points.items(), 1):
        if key not in losses:
            losses[key] = train(*point)
            RESULTS.write_text(json.dumps({"fields": FIELDS, "rates": RATES, "losses": losses}, indent=1) + "\n")
        print(f"{i}/{len(points)}: {key}: {losses[key]}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"width.py: {error}")
