"""
Rebuild the leaderboards and plots from the logs. No number in them is typed by hand.

    python records/leaderboard.py            # write records/README.md, the block in README.md, the plots and docs/
    python records/leaderboard.py --check    # write nothing; exit 1 if one on disk is not what the logs say

Reads records/<task>-<track>/track.json and records/<task>-<track>/YYYY-MM-DD_CamelCase/{README.md, <script>, *.log}.
A record's baseline/ or previous/ holds logs of record #1 or of the record before, re-run in alternation with its own.
"""

import hashlib
import math
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np

from rules import ALPHA, FOOTER_KEYS, MIN_TRIALS, ROOT, RULE, mean_seconds, p_value, parse_log, read_track  # noqa: F401

PROVISIONAL = f"† provisional: a record needs at least {MIN_TRIALS} trials and p < {ALPHA}."
COLUMNS = ">#|>time (s, mean)|>speed-up|>loss mean ± std (n)|>p|>lines (± vs previous)|description|date|hardware|logs"
TRIALS = ">seed|>validation loss|>train time (s)"
FRONT_COLUMNS = "track|record|>time (s, mean)|>speed-up|>loss mean ± std (n)|>target|hardware|date"
START, END = "<!-- leaderboard:start -->", "<!-- leaderboard:end -->"
GREY = "#797979"  # of text and axes: as far from white as from black, so that plots read on either
COLOURS = "#3b82f6 #d9700d #2f9e4f #e5484d #9a5fd6 #a8742f #d6409f #0f97a8".split()

# -----------------------------------------------------------------------------
# Tables

def show_loss(losses):
    spread = f" ± {np.std(losses, ddof=1):.4f}" if len(losses) > 1 else ""
    return f"{np.mean(losses):.4f}{spread} ({len(losses)})"

def show_seconds(seconds):
    return f"{seconds:.1f}" if seconds >= 10 else f"{seconds:.3f}"

def no_record(track):
    return "no record yet" + (" – not yet run on a GPU" if track["track"] == "gpu" else "")

def table(columns, rows):
    """Markdown. `columns` are names between |; one that starts with > is right-aligned."""
    head = columns.split("|")
    rows = [[name.lstrip(">") for name in head], ["--:" if name[0] == ">" else "---" for name in head]] + rows
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)

def track_section(folder, track, records):
    """The part of records/README.md about one track: its rules, table, notes and plot."""
    out = [f"## {folder.name}", f"{track['data']}; {track['hardware_class']}. Baseline: {track['baseline']}. "
           f"Target: validation loss ≤ {track['target'] or 'not set yet'}."]
    if not records:
        command = track.get("command", f"./run.sh {track['task']} --track={track['track']}")
        return "\n\n".join(out + [f"{no_record(track)}. To run it:", f"```\n{command}\n```"])
    rows, notes = [], []
    for r in records:
        p = "–" if math.isnan(r["p"]) else f"{r['p']:.2g}"
        lines = str(r["lines"]) + (f" ({r['lines'] - records[r['number'] - 2]['lines']:+d})" if r["number"] > 1 else "")
        link = f"[logs]({folder.name}/{r['path'].name})"
        rows.append([f"{r['number']}{r['mark']}", show_seconds(r["seconds"]), f"{r['speedup']:.2f}x",
                     show_loss(r["losses"]), p, lines, r["title"], r["date"], r["hardware"], link])
        number, rerun = r["number"], r["baseline"] or r["previous"]
        if rerun:
            whose = "over the baseline" if r["baseline"] else f"that of #{number - 1} times its own over #{number - 1}"
            notes.append(f"The speed-up of #{number} is {whose} re-run in alternation with it on the same machine: "
                         f"{show_seconds(mean_seconds(rerun))} s, mean of {len(rerun)}.")
        elif r["hardware"] != r["rival"][0]["footer"]["hardware"]:
            notes.append(f"#{number} ran on other hardware than #{number - 1}: its speed-up is not like for like.")
    out.append(table(COLUMNS, rows))
    notes += [PROVISIONAL] * any(r["mark"] for r in records)
    return "\n\n".join(out + notes + [f"![validation loss against train time]({folder.name}/loss.png)"])

def trials_table(logs):
    """The trials in the README.md of a record's folder."""
    feet = sorted((log["footer"] for log in logs), key=lambda foot: foot["seed"])
    return table(TRIALS, [[f["seed"], f"{f['val_loss']:.5f}", f"{f['train_seconds']:.3f}"] for f in feet])

def summary(tracks):
    """The block in the front page: of every track the fastest record that is not provisional."""
    rows, empty = [], []
    for folder, track, records in tracks:
        name = f"[{folder.name}](records/README.md#{folder.name})"
        if not records:
            empty.append(name)
            continue
        r = max(records, key=lambda r: (not r["mark"], r["speedup"]))
        title = f"[#{r['number']}{r['mark']} {r['title']}](records/{folder.name}/{r['path'].name})"
        rows.append([name, title, show_seconds(r["seconds"]), f"{r['speedup']:.2f}x", show_loss(r["losses"]),
                     track["target"], r["hardware"], r["date"]])
    text = table(FRONT_COLUMNS, rows)
    if any("†" in row[1] for row in rows):
        text += f"\n\n{PROVISIONAL}"
    if empty:
        text += f"\n\nNobody has run {', '.join(empty)} yet."
    return text

def read_tracks(root=ROOT):
    """All tracks: [(folder, track.json, its records)]. ValueError if a log is amiss."""
    return [(path.parent, *read_track(path.parent)) for path in sorted(Path(root, "records").glob("*/track.json"))]

def build(root=ROOT, tracks=None):
    """Everything this script writes but the plots: {path relative to root: text}."""
    tracks = tracks or read_tracks(root)
    head = f"""# Records

Written by `python records/leaderboard.py` from the logs in this folder: do not edit. Time is training time, without
start-up and evaluation. Speed-up is over record #1, the baseline. p is that of a one-sided t-test that the mean loss
reaches the target: a record needs at least {MIN_TRIALS} trials and p < {ALPHA}. Lines count the training script."""
    if any(len(records) > 1 for _, _, records in tracks):
        head += "\n\n![speed-up over the baseline, record by record](history.png)"
    files = {"records/README.md": "\n\n".join([head] + [track_section(*track) for track in tracks]) + "\n"}
    if (front := Path(root, "README.md")).is_file():
        before, start, rest = front.read_text(encoding="utf-8").partition(START)
        _, end, after = rest.partition(END)
        if not end:
            raise ValueError(f"{front}: needs a line {START} and, below it, a line {END}")
        files["README.md"] = f"{before}{start}\n{summary(tracks)}\n{end}{after}"
    return files

# -----------------------------------------------------------------------------
# Plots

def draw_losses(ax, title, target, curves):
    """Loss against train time. curves: [(label, [trial's steps as parse_log gives them])], a colour for each."""
    ends = [steps[-1][1] for _, trials in curves for steps in trials]
    for k, (label, trials) in enumerate(curves):
        label = textwrap.shorten(label, 46, placeholder=" …")
        for j, steps in enumerate(trials):
            points = [(seconds, loss) for _, seconds, loss in steps if seconds > 0]  # log axis: no 0
            ax.plot(*zip(*points), color=COLOURS[k % len(COLOURS)], linewidth=1, marker=".", markersize=3,
                    label="" if j else label)
    if target:
        ax.axhline(target, color=GREY, linestyle="--", linewidth=1, label=f"target {target}")
    ax.set(xscale="log" if max(ends) > 4 * min(ends) else "linear", xlabel="train time (s)", ylabel="validation loss",
           title=title)
    ax.xaxis.set_major_formatter("{x:g}")

def draw_history(ax, history):
    """Speed-up by record, a line for each track. history: [(track, [(speed-up, seconds) of each record])]."""
    for k, (name, records) in enumerate(history):
        colour = COLOURS[k % len(COLOURS)]
        ax.plot(range(1, len(records) + 1), [gain for gain, _ in records], color=colour, marker="o", label=name)
        for i, (gain, seconds) in enumerate(records[1:], 2):
            ax.annotate(f"{show_seconds(seconds)} s", (i, gain), (6, 4), textcoords="offset points", color=colour)
    ax.set(yscale="log", xlabel="record", ylabel="speed-up over the baseline", title="record history",
           xticks=range(1, 1 + max(len(records) for _, records in history)))
    ax.yaxis.set_major_formatter("{x:g}x")
    ax.margins(x=0.12, y=0.12)

def save_plot(path, draw, *arguments):
    """A PNG of draw(axes, *arguments) on a transparent ground, with a digest of what it shows."""
    from matplotlib import figure, rc_context  # here, so that the tables need no plots
    parts = "text.color axes.edgecolor axes.labelcolor xtick.color ytick.color"
    with rc_context({part: GREY for part in parts.split()} | {"font.size": 11}):
        ax = figure.Figure(figsize=(8, 5), layout="constrained").subplots()
        draw(ax, *arguments)
        ax.grid(color=GREY, alpha=0.2)
        ax.figure.legend(loc="outside lower center", ncols=2, frameon=False)
        ax.figure.savefig(path, dpi=150, transparent=True,
                          metadata={"Software": None, "Description": plot_digest(draw, *arguments)})

def plot_digest(draw, *arguments):
    return hashlib.sha256(repr((draw.__name__, GREY, COLOURS, arguments)).encode()).hexdigest()

def plots(root, tracks):
    """The plots that belong beside the tables: {path: arguments of save_plot}."""
    found, history = {}, []
    for folder, track, records in tracks:
        curves = [(f"#{r['number']} {r['title']}", [log["steps"] for log in r["logs"]]) for r in records]
        if records:
            found[folder / "loss.png"] = draw_losses, folder.name, track["target"], curves
        if len(records) > 1:
            history.append((folder.name, [(round(r["speedup"], 4), round(r["seconds"], 4)) for r in records]))
    return found | ({Path(root, "records", "history.png"): (draw_history, history)} if history else {})

def stale(root=ROOT):
    """What on disk is not as the logs say: {path: the right text, or the arguments of save_plot}."""
    tracks = read_tracks(root)
    texts = {Path(root, name): text for name, text in build(root, tracks).items()}
    old = {path: text for path, text in texts.items() if not path.is_file() or path.read_text("utf-8") != text}
    return old | {path: plot for path, plot in plots(root, tracks).items()
                  if not path.is_file() or plot_digest(*plot).encode() not in path.read_bytes()}

def page(root, *argv):
    """Run docs/page.py, if there is one: its exit status."""
    script = Path(root, "docs", "page.py")
    return subprocess.run([sys.executable, str(script), *argv]).returncode if script.is_file() else 0

def main(argv, root=ROOT):
    """Returns the exit status."""
    if set(argv) - {"--check"}:
        print(__doc__.strip(), file=sys.stderr)
        return 2
    try:
        old = stale(root)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    for path, content in old.items():
        if "--check" in argv:
            print(f"{path} is not what the logs say: run python records/leaderboard.py", file=sys.stderr)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        else:
            save_plot(path, *content)
    return int("--check" in argv and bool(old)) or page(root, *argv)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
