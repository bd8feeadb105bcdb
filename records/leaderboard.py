"""
Rebuild the leaderboards and loss plots from the logs. No number in them is typed by hand.

    python records/leaderboard.py            # write records/README.md, the block in README.md and every loss.png
    python records/leaderboard.py --check    # write nothing; exit 1 if a table on disk is not what the logs say

Reads records/<task>-<track>/track.json and records/<task>-<track>/YYYY-MM-DD_CamelCase/{README.md, <script>, *.log}.
A record's optional baseline/ holds logs of record #1's script, re-run in alternation with the record on one machine.
"""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RULE = "=" * 100
ALPHA, MIN_TRIALS = 0.01, 5  # a record needs p < ALPHA over at least MIN_TRIALS trials
PROVISIONAL = f"† provisional: a record needs at least {MIN_TRIALS} trials and p < {ALPHA}."
TRACK_KEYS = "task track data data_sha256 eval_sha256 target hardware_class baseline".split()
FOOTER_KEYS = """script task track seed world_size hardware steps parameters tokens val_loss target reached
    train_seconds compile_seconds tokens_per_second mfu peak_memory_mib data_sha256 eval_sha256 overrides""".split()
COLUMNS = ">#|>time (s, mean)|>speed-up|>loss mean ± std (n)|>p|>lines (± vs previous)|description|date|hardware|logs"
FRONT_COLUMNS = "track|record|>time (s, mean)|>speed-up|>loss mean ± std (n)|>target|hardware|date"
START, END = "<!-- leaderboard:start -->", "<!-- leaderboard:end -->"

# -----------------------------------------------------------------------------
# Logs

def parse_value(key, text):
    """A footer value as bool, int or float where it is one; hashes stay text."""
    try:
        return text if "sha" in key else json.loads({"True": "true", "False": "false"}.get(text, text))
    except ValueError:
        return text

def parse_log(path):
    """One training log -> {"source": str, "config": str, "steps": [(step, train seconds, val_loss)], "footer": dict}.
    The script printed on top may itself hold rules and footers, so the log is split at its last two rules.
    ValueError says what is wrong with a file that is not the log of a finished run.
    """
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    rules = [i for i, line in enumerate(lines) if line == RULE]
    if len(rules) < 2:
        raise ValueError(f"{path}: not a training log: it has {len(rules)} rule lines, and a log has 2 or more")
    top, bottom = rules[-2:]
    steps, footer, num_steps = [], {}, None
    for line in lines[bottom + 1:]:
        if m := re.match(r"step:(\d+)/(\d+) val_loss:(\S+) train_time:([\d.]+)ms", line):
            steps.append((int(m[1]), float(m[4]) / 1000, float(m[3])))
            num_steps = int(m[2])
        elif m := re.match(r"([a-z]\w*): ?(.*)$", line):
            footer[m[1]] = parse_value(m[1], m[2].strip())
    if missing := [key for key in FOOTER_KEYS if key not in footer]:
        raise ValueError(f"{path}: truncated log: its footer lacks {', '.join(missing)}")
    if not steps or not steps[-1][0] == num_steps == footer["steps"]:
        raise ValueError(f"{path}: its step lines do not end at {footer['steps']}, the footer's number of steps")
    _, seconds, loss = steps[-1]
    if abs(loss - footer["val_loss"]) > 1e-3 or abs(seconds - footer["train_seconds"]) > 0.1 + 0.001 * seconds:
        raise ValueError(f"{path}: its last step line and its footer disagree on val_loss or train_seconds")
    return dict(source="\n".join(lines[:top]), config="\n".join(lines[top + 1:bottom]), steps=steps, footer=footer)

def read_logs(folder, track, source=None):
    """The logs of a folder by seed, each checked against its track and its script: `source`, or the folder's own."""
    logs = {}
    for path in sorted(folder.glob("*.log")):
        log = parse_log(path)
        foot = log["footer"]
        for key in "task", "track", "data_sha256", "eval_sha256":
            if foot[key] != track[key]:
                raise ValueError(f"{path}: its {key} is {foot[key]}, and the track's is {track[key]}")
        if set(re.findall(r"(\w+)\W*[=:]", str(foot["overrides"]))) - {"seed", "track"}:
            raise ValueError(f"{path}: a record runs with no override but seed and track: {foot['overrides']}")
        if log["source"].strip() != (source or (folder / foot["script"]).read_text(encoding="utf-8")).strip():
            raise ValueError(f"{path}: its source is not that of the {'baseline' if source else 'record'}'s script")
        if foot["seed"] in logs:
            raise ValueError(f"{path}: another log has the same seed, {foot['seed']}")
        logs[foot["seed"]] = log
    if len({log["footer"]["hardware"] for log in logs.values()}) != 1:
        raise ValueError(f"{folder}: its trials must be on one kind of hardware, and at least one")
    return [logs[seed] for seed in sorted(logs)]

# -----------------------------------------------------------------------------
# Statistics

def student_t_sf(t, df):
    """P(T > t) of Student's t: with t = sqrt(df) tan(a) the density is cos(a)^(df-1), integrated by Gauss-Legendre."""
    x, w = np.polynomial.legendre.leggauss(100)
    low = math.atan(t / math.sqrt(df))
    half = (math.pi / 2 - low) / 2
    area = half * np.sum(w * np.cos(low + half * (1 + x)) ** (df - 1))
    return float(area / math.exp(math.lgamma(df / 2) - math.lgamma((df + 1) / 2)) / math.sqrt(math.pi))

def p_value(losses, target):
    """One-sided one-sample t-test: how likely are losses this low if their true mean is the target? nan for one."""
    gap, n = target - np.mean(losses), len(losses)
    error = np.std(losses, ddof=1) / math.sqrt(n) if n > 1 else math.nan
    if error == 0:
        return 0.5 * (1 - float(np.sign(gap)))
    return student_t_sf(gap / error, n - 1) if math.isfinite(error) else math.nan

# -----------------------------------------------------------------------------
# Tracks

def mean_seconds(logs):
    return float(np.mean([log["footer"]["train_seconds"] for log in logs]))

def read_track(folder):
    """records/<task>-<track> -> (track.json as a dict, its records as dicts: by date, on one date the slower first)."""
    track = json.loads((folder / "track.json").read_text(encoding="utf-8"))
    if missing := [key for key in TRACK_KEYS if key not in track]:
        raise ValueError(f"{folder}/track.json lacks {', '.join(missing)}")
    records = []
    for path in filter(Path.is_dir, folder.iterdir()):
        if not re.fullmatch(r"\d{4}-\d\d-\d\d_[A-Z]\w*", path.name):
            raise ValueError(f"{path}: a record's folder is named YYYY-MM-DD_CamelCase")
        title = (path / "README.md").read_text(encoding="utf-8").strip().partition("\n")[0].strip("# ")
        logs = read_logs(path, track)
        records.append(dict(path=path, date=path.name[:10], title=title, logs=logs, seconds=mean_seconds(logs)))
    records.sort(key=lambda r: (r["date"], -r["seconds"], r["path"].name))
    for i, r in enumerate(records):
        feet, again = [log["footer"] for log in r["logs"]], r["path"] / "baseline"
        if i > 0 and any(foot["target"] != track["target"] for foot in feet):  # record #1 is what defines the target
            raise ValueError(f"{r['path']}: its logs have another target than the track's {track['target']}")
        r["number"], r["hardware"], r["losses"] = i + 1, feet[0]["hardware"], [foot["val_loss"] for foot in feet]
        r["lines"] = len(r["logs"][0]["source"].strip().split("\n"))
        r["rerun"] = read_logs(again, track, records[0]["logs"][0]["source"]) if again.is_dir() else None
        r["speedup"] = mean_seconds(r["rerun"] or records[0]["logs"]) / r["seconds"]
        r["p"] = p_value(r["losses"], track["target"]) if i > 0 else math.nan
        r["mark"] = "" if i == 0 or len(feet) >= MIN_TRIALS and r["p"] < ALPHA else "†"  # #1 defines the target
    return track, records

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
        if r["rerun"]:
            notes.append(f"The speed-up of #{r['number']} is over the baseline re-run in alternation with it on the "
                         f"same machine: {mean_seconds(r['rerun']):.1f} s, mean of {len(r['rerun'])}.")
        elif r["hardware"] != records[0]["hardware"]:
            notes.append(f"#{r['number']} ran on other hardware than #1: its speed-up is not like for like.")
    out.append(table(COLUMNS, rows))
    notes += [PROVISIONAL] * any(r["mark"] for r in records)
    return "\n\n".join(out + notes + [f"![validation loss against train time]({folder.name}/loss.png)"])

def summary(tracks):
    """The block in the front page: of every track the fastest record that is not provisional, and the baseline."""
    rows = []
    for folder, track, records in tracks:
        name = f"[{folder.name}](records/README.md#{folder.name})"
        if not records:
            rows.append([name, no_record(track), "–", "–", "–", track["target"] or "–", track["hardware_class"], "–"])
            continue
        best = max(records, key=lambda r: (not r["mark"], r["speedup"]))
        for r in [best] + [records[0]] * (best is not records[0]):
            title = f"[#{r['number']}{r['mark']} {r['title']}](records/{folder.name}/{r['path'].name})"
            rows.append([name, title, show_seconds(r["seconds"]), f"{r['speedup']:.2f}x", show_loss(r["losses"]),
                         track["target"], r["hardware"], r["date"]])
    return table(FRONT_COLUMNS, rows) + f"\n\n{PROVISIONAL}" * any("†" in row[1] for row in rows)

def build(root=ROOT):
    """Everything this script writes but the plots: {path relative to root: text}. ValueError if a log is amiss."""
    tracks = [(path.parent, *read_track(path.parent)) for path in sorted(Path(root, "records").glob("*/track.json"))]
    head = f"""# Records

Written by `python records/leaderboard.py` from the logs in this folder: do not edit. Time is training time, without
start-up and evaluation. Speed-up is over record #1, the baseline. p is that of a one-sided t-test that the mean loss
reaches the target: a record needs at least {MIN_TRIALS} trials and p < {ALPHA}. Lines count the training script."""
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

def plot(folder):
    """Draw <folder>/loss.png. Mid-grey on a transparent ground reads on white and on black."""
    from matplotlib import figure, rc_context  # here, so that the tables need numpy alone
    track, records = read_track(folder)
    parts = "text.color axes.edgecolor axes.labelcolor xtick.color ytick.color"
    with rc_context({part: "#808080" for part in parts.split()}):
        ax = figure.Figure(figsize=(8, 4.5), layout="constrained").subplots()
        for r in records:
            for k, log in enumerate(r["logs"]):
                points = [(seconds, loss) for _, seconds, loss in log["steps"] if seconds > 0]  # log axis: no 0
                label = "" if k else f"#{r['number']} {r['title']}"
                ax.plot(*zip(*points), color=f"C{(r['number'] - 1) % 10}", linewidth=0.8, label=label)
        ax.axhline(track["target"], color="#808080", linestyle="--", linewidth=1, label=f"target {track['target']}")
        ax.set(xscale="log", xlabel="train time (s)", ylabel="validation loss", title=folder.name)
        ax.legend(frameon=False)
        ax.figure.savefig(folder / "loss.png", dpi=150, transparent=True, metadata={"Software": None})

def main(argv, root=ROOT):
    """Returns the exit status."""
    if set(argv) - {"--check"}:
        print(__doc__.strip(), file=sys.stderr)
        return 2
    try:
        files = {Path(root, name): text for name, text in build(root).items()}
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    stale = [path for path, text in files.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if "--check" in argv:
        for path in stale:
            print(f"{path} is not what the logs say: run python records/leaderboard.py", file=sys.stderr)
        return int(bool(stale))
    for path in stale:
        path.write_text(files[path], encoding="utf-8")
    for path in Path(root, "records").glob("*/track.json"):
        if any(path.parent.glob("*/*.log")):
            plot(path.parent)
    return 0

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
