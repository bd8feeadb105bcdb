"""
Rebuild the leaderboards and plots from the logs. No number in them is typed by hand.

    python records/leaderboard.py            # write records/README.md, the block in README.md, the plots and docs/
    python records/leaderboard.py --check    # write nothing; exit 1 if one on disk is not what the logs say

Reads records/<task>-<track>/track.json and records/<task>-<track>/YYYY-MM-DD_CamelCase/{README.md, <script>, *.log}.
A record's rival/ holds logs of the record before, run again in turn with its own. A train_<task>.py whose task has
records gets a line `Record: ...` for each track below its docstring's title, from the newest record's logs; what is in
records/README.md from "## Season 1" on stays as it is.
"""

import hashlib
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np

from rules import ALPHA, CLAIMS, MIN_TRIALS, ROOT, mean_seconds, missed, quality, read_settings, read_track

COLUMNS = (">#|>time (s, mean)|>speed-up|>loss mean ± std (n)|>p of loss, of time|quality|>lines (± vs previous)|"
           "description|date|hardware|logs")
TRIALS = ">seed|>validation loss|>train time (s)"
FRONT_COLUMNS = "track|record|>time (s, mean)|>speed-up|>loss mean ± std (n)|>target|quality|hardware"
NO_RECORDS = ("Season 2 has no records yet; those of season 1, on other data and weaker rules, are in "
              "[records/README.md](records/README.md#season-1).")
SEASON = "## Season 1\n"  # from here to its end records/README.md is kept
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

def show_time(r, track):
    """A record's mean time; of a baseline that did not arrive that it did not."""
    reached = r["number"] > 1 or track["baseline"]["reached"]
    return "not reached in " * (not reached) + show_seconds(r["seconds"])

def show_speedup(r):
    return "> " * r["more"] + f"{r['speedup']:.2f}x"

def show_p(r):
    return f"{r['p']:.2g}, {r['p_time']:.2g}".replace("nan", "–")

def show_quality(r, track):
    """The mean of every number that has a floor, and whether the record is below it."""
    below = "; ".join(missed(r["logs"], track))
    names = {key: key.removeprefix("quality_").removeprefix("accuracy_") for key in track["floors"]}
    return "; ".join(f"{names[key]} {quality(r['logs'], key):.4g}" + f" (not {sign} {bound})" *
                     (f"its {key} " in below) for key, (sign, bound) in track["floors"].items()) or "–"

def show_target(track):
    floors = (f"{key} {sign} {bound}" for key, (sign, bound) in track["floors"].items())
    return ", ".join([f"val_loss <= {track['target']}", *floors])

def table(columns, rows):
    """Markdown. `columns` are names between |; one that starts with > is right-aligned."""
    head = columns.split("|")
    rows = [[name.lstrip(">") for name in head], ["--:" if name[0] == ">" else "---" for name in head]] + rows
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)

def track_section(folder, track, records):
    """The part of records/README.md about one track: its rules, table, notes and plot."""
    about, reached = track["baseline"], "reached"
    if not about["reached"]:
        reached = f"target not reached in {about['seconds']:.0f} s (loss {about['loss']})"
    out = [f"## {folder.name}", f"{track['data']}; device: `{track['device']}`. Target: {show_target(track)}. "
           f"Baseline: {about['recipe']}; {reached}."]
    if not records:
        command = track.get("command", f"./run.sh {track['task']} --track={track['track']}")
        return "\n\n".join(out + ["no record yet. To run it:", f"```\n{command}\n```"])
    rows, notes = [], []
    for r in records:
        number = r["number"]
        lines = str(r["lines"]) + (f" ({r['lines'] - records[number - 2]['lines']:+d})" if number > 1 else "")
        rows.append([number, show_time(r, track), show_speedup(r), show_loss(r["losses"]), show_p(r),
                     show_quality(r, track), lines, r["title"], r["date"], r["hardware"],
                     f"[logs]({folder.name}/{r['path'].name})"])
        if r["rerun"]:
            notes.append(f"The speed-up of #{number} is that of #{number - 1} times its own over #{number - 1}, run "
                         f"again in turn with it on the same machine: {show_seconds(mean_seconds(r['rerun']))} s, mean "
                         f"of {len(r['rerun'])}.")
    if records[-1]["more"]:
        notes.append("A speed-up of > x is one over a baseline that did not reach the target in that time.")
    plot = f"![validation loss against train time]({folder.name}/loss.png)"
    return "\n\n".join([*out, table(COLUMNS, rows), *notes, plot])

def trials_table(logs):
    """The trials in the README.md of a record's folder."""
    feet = sorted((log["footer"] for log in logs), key=lambda foot: foot["seed"])
    return table(TRIALS, [[f["seed"], f"{f['val_loss']:.5f}", f"{f['train_seconds']:.3f}"] for f in feet])

def summary(tracks):
    """The block in the front page: the newest record of every track."""
    rows = []
    for folder, track, records in tracks:
        if records:
            r = records[-1]
            title = f"[#{r['number']} {r['title']}](records/{folder.name}/{r['path'].name})"
            rows.append([folder.name, title, show_time(r, track),
                         show_speedup(r), show_loss(r["losses"]), track["target"], show_quality(r, track),
                         re.sub(r"\(R\)| Processor", "", r["hardware"])])
    if not rows:
        return NO_RECORDS
    out = [table(FRONT_COLUMNS, rows)]
    if empty := [f"[{folder.name}](records/README.md#{folder.name})" for folder, _, records in tracks if not records]:
        out.append(f"Nobody has run {', '.join(empty)} yet.")
    if any(len(records) > 1 for _, _, records in tracks):
        out.append("![Speed-up over the baseline, record by record](records/history.png)")
    return "\n\n".join(out)

def claim(folder, track, records):
    """The lines about a track's newest record in the docstring of its script; "" while there is only a baseline."""
    if len(records) < 2:
        return ""
    r = records[-1]
    torch = read_settings(r["logs"][0])["torch"]
    text = (f"Record: {folder.name}, {show_target(track)} in {show_seconds(r['seconds'])} s on {r['hardware']}, "
            f"torch {torch} (n={len(r['logs'])}).")
    return textwrap.fill(text, 120, subsequent_indent="    ") + "\n"

def with_claims(text, claims):
    """A script with these lines, and no others about records, below its docstring's title."""
    title, _, rest = CLAIMS.sub("\\1", text).partition("\n")
    if claims and title.count('"""') != 1:
        raise ValueError(f"a script with a record needs a docstring of more than its title: {title}")
    return title + "\n" + "\n" * bool(claims) + "".join(claims) + rest

def read_tracks(root=ROOT):
    """All tracks: [(folder, track.json, its records)]. ValueError if a log is amiss."""
    return [(path.parent, *read_track(path.parent)) for path in sorted(Path(root, "records").glob("*/track.json"))]

def build(root=ROOT, tracks=None):
    """Everything this script writes but the plots: {path relative to root: text}."""
    tracks = read_tracks(root) if tracks is None else tracks
    head = f"""# Records

Written by `python records/leaderboard.py` from the logs in this folder: do not edit. Time is training time, without
start-up and evaluation. Speed-up is over record #1, the baseline. p of loss is that of a one-sided t-test that the mean
loss reaches the target, p of time that of Welch's one-sided t-test that the record is faster than the one before, run
in turn with it; a record needs at least {MIN_TRIALS} trials and p < {ALPHA} in both. Quality is what a track has
floors for, mean over the trials. Lines count the training script."""
    if any(len(records) > 1 for _, _, records in tracks):
        head += "\n\n![speed-up over the baseline, record by record](history.png)"
    path, kept = Path(root, "records", "README.md"), ""
    if path.is_file():
        _, found, rest = path.read_text(encoding="utf-8").partition(SEASON)
        kept = found and f"\n{found}{rest}"
    files = {"records/README.md": "\n\n".join([head] + [track_section(*track) for track in tracks]) + "\n" + kept}
    if (front := Path(root, "README.md")).is_file():
        before, start, rest = front.read_text(encoding="utf-8").partition(START)
        _, end, after = rest.partition(END)
        if not end:
            raise ValueError(f"{front}: needs a line {START} and, below it, a line {END}")
        files["README.md"] = f"{before}{start}\n{summary(tracks)}\n{end}{after}"
    for script in sorted(Path(root).glob("train_*.py")):
        lines = [claim(*one) for one in tracks if one[1]["task"] == script.stem.removeprefix("train_")]
        files[script.name] = with_claims(script.read_text(encoding="utf-8"), [line for line in lines if line])
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
    """Speed-up by record, a line for each track. history: [(track, [(speed-up, more, seconds) of each record])]."""
    for k, (name, records) in enumerate(history):
        colour = COLOURS[k % len(COLOURS)]
        ax.plot(range(1, len(records) + 1), [gain for gain, _, _ in records], color=colour, marker="o", label=name)
        for i, (gain, more, seconds) in enumerate(records[1:], 2):
            label = f"> {gain:.1f}x, " * more + f"{show_seconds(seconds)} s"
            ax.annotate(label, (i, gain), (6, 4), textcoords="offset points", color=colour)
    ax.set(yscale="log", xlabel="record", ylabel="speed-up over the baseline", title="record history",
           xticks=range(1, 1 + max(len(records) for _, records in history)))
    ax.yaxis.set_major_formatter("{x:g}x")
    ax.margins(x=0.12, y=0.12)

def save_plot(path, draw, *arguments, panels=(1, 1)):
    """A PNG of draw(axes, *arguments) on a transparent ground, with a digest of what it shows. axes: one, or a row of
    as many as rows x columns of panels."""
    from matplotlib import figure, rc_context  # here, so that the tables need no plots
    parts = "text.color axes.edgecolor axes.labelcolor xtick.color ytick.color"
    with rc_context({part: GREY for part in parts.split()} | {"font.size": 11}):
        rows, columns = panels
        sheet = figure.Figure(figsize=(max(8, 3.5 * columns), max(5, 3 * rows)), layout="constrained")
        axes = sheet.subplots(rows, columns, squeeze=False).flatten()
        draw(axes if len(axes) > 1 else axes[0], *arguments)
        for ax in axes:
            ax.grid(color=GREY, alpha=0.2)
        sheet.legend(loc="outside lower center", ncols=2, frameon=False)
        sheet.savefig(path, dpi=150, transparent=True,
                      metadata={"Software": None, "Description": plot_digest(draw, *arguments)})

def plot_digest(draw, *arguments):
    return hashlib.sha256(repr((draw.__name__, GREY, COLOURS, arguments)).encode()).hexdigest()

def plots(root, tracks):
    """The plots that belong beside the tables: {path: arguments of save_plot}."""
    found, history = {}, []
    for folder, track, records in tracks:
        curves = [(f"#{r['number']}, {show_time(r, track)} s: {r['title']}", [log["steps"] for log in r["logs"]])
                  for r in records]
        if records:
            found[folder / "loss.png"] = draw_losses, folder.name, track["target"], curves
        if len(records) > 1:
            history.append((folder.name,
                            [(round(r["speedup"], 4), r["more"], round(r["seconds"], 4)) for r in records]))
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
