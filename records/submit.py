"""
Check a record's logs against all rules and file it: a folder in records/<task>-<track>/ and new tables.

    python records/submit.py logs/<a>.txt logs/<b>.txt ... --name CamelCase --note "Title.

    What changed, why, and what each change gave."
    python records/submit.py <logs> --rival <logs of the record before> --name CamelCase --note "..."
    python records/submit.py logs/<a>.txt --against --name CamelCase --note "..."
    python records/submit.py <logs> --baseline "the course's nano4M: dim 128, AdamW" --data "20,000 scenes at 64 px" \\
        --floor "quality_desc_f1>=0.9" --name CourseRecipe --note "..."

The logs decide, nothing is typed. A record has to be faster than the one before it in trials that took turns with it
on one machine: --rival has those of the record before, as compare.py leaves them; --against runs both scripts now, at
least five times each; with neither, the filed logs of the record before have to have taken turns with these.
--baseline opens a track with its record #1: hashes, target, floors, device and size go into track.json. A baseline
that does not reach the target is filed as that, with as many trials as there are.
Refuses with one sentence and leaves no trace.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import leaderboard
from compare import Entry, fail, race
from rules import (COMPARE, DEVICES, FROZEN, MIN_TRIALS, ROOT, STOP_WATCH, block_sha256, check_log, check_record,
                   describe_baseline, eval_sha256, machine, mean_seconds, need, parse_log, quality, read_fields,
                   read_logs, read_track, shortfalls)
from verify import check_readme

def rerun_both(log, before, seeds, root):
    """Run the script of a log and that of the record before in turn: (its logs, those of the record before)."""
    rival, world = before["logs"][0], log["footer"]["world_size"]
    if world != 1:
        raise ValueError(f"{log['path']}: --against runs one process, and this was run by {world}")
    entries = [Entry(name, one["footer"]["script"], one["source"], [f"--track={one['footer']['track']}"])
               for name, one in (("new", log), ("old", rival))]
    folder = Path(root, "logs", "compare", f"submit-{entries[0].key}-{entries[1].key}")
    print(f"racing it against record #{before['number']}, {before['title']}; the logs go to {os.path.relpath(folder)}")
    logs = race(entries, seeds, folder, root=root)
    return logs["new"], logs["old"]

def write_record(folder, logs, rerun, note):
    """README.md, the script, <seed>.log of every trial, and rival/ if the record before was run again."""
    folder.mkdir()
    (folder / logs[0]["footer"]["script"]).write_text(logs[0]["source"], encoding="utf-8")
    parts = [f"# {note.strip().lstrip('# ')}", "The trials:", leaderboard.trials_table(logs)]
    if rerun:
        parts += ["The record before, run in turn with them, seed by seed:", leaderboard.trials_table(rerun)]
        (folder / "rival").mkdir()
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    for where, group in (folder, logs), (folder / "rival", rerun):
        for log in group:
            (where / f"{log['footer']['seed']}.log").write_bytes(log["path"].read_bytes())

def show_trials(record, track):
    for foot in (log["footer"] for log in record["logs"]):
        print(f"seed {foot['seed']}: loss {foot['val_loss']:.5f}, {foot['train_seconds']:.3f} s")
    print(f"loss {leaderboard.show_loss(record['losses'])}, target {track['target']}, p = {record['p']:.2g}")
    for key, (sign, bound) in track["floors"].items():
        print(f"{key} {quality(record['logs'], key):.4f}, floor {sign} {bound}")

def show(record, before, track):
    """What the logs say of a candidate."""
    show_trials(record, track)
    rival = record["rival"]
    faster = 100 * (1 - record["seconds"] / mean_seconds(rival))
    added = record["lines"] - before["lines"]
    print(f"{record['seconds']:.3f} s against {mean_seconds(rival):.3f} s of record #{before['number']} "
          f"(mean of {len(rival)}), p = {record['p_time']:.2g}: {-faster:+.1f} % time, "
          f"{leaderboard.show_speedup(record)} over the baseline")
    if added > 20 * max(faster, 0):
        print(f"{added:+d} lines for it: about 20 for each 1 % of time is the most a change should cost")

def parse_floors(words):
    """["quality_desc_f1>=0.9"] -> {"quality_desc_f1": [">=", 0.9]}."""
    floors = {}
    for word in words:
        m = re.fullmatch(rf"([a-z]\w*)\s*({'|'.join(COMPARE)})\s*(-?\d+(?:\.\d+)?)", word)
        if not m:
            raise ValueError(f"a floor is like quality_desc_f1>=0.9, not {word!r}")
        floors[m[1]] = [m[2], float(m[3])]
    return floors

def describe_track(args, log, root):
    """track.json for the logs of a baseline, all but what it says of that."""
    foot, fields = log["footer"], read_fields(log)
    script = Path(root, f"train_{foot['task']}.py")
    source = script.read_text(encoding="utf-8")
    hashes = {}
    for key, names in ("run_sha256", STOP_WATCH), ("frozen_sha256", FROZEN):
        hashes[key] = [block_sha256(log["source"], names)]
        need(hashes[key] == [block_sha256(source, names)], log["path"],
             f"its block {' and '.join(names)} is not that of {script.name}")
    need(foot["target"] > 0, log["path"], "its Config has no target")
    device = args.device or next(name for name, pattern in DEVICES.items() if re.search(pattern, machine(foot)))
    fixed = {key: value for key, value in fields.items()
             if key.startswith(("frozen", "quality_", "eval_")) and key != "eval_every"}
    files = args.eval_file or [value for value in fields.values() if isinstance(value, str) and
                               value.startswith("data/") and Path(root, value).is_file()]
    track = {"task": foot["task"], "track": foot["track"], "data": args.data, "data_sha256": foot["data_sha256"],
             "eval_sha256": [foot["eval_sha256"]], **hashes, "target": foot["target"],
             "floors": parse_floors(args.floor), "device": device,
             "command": f"./run.sh {foot['task']} --track={foot['track']}", "eval_config": fixed}
    found = eval_sha256(log["source"], [Path(root, file) for file in files])
    need(not args.eval_file or found == foot["eval_sha256"], log["path"],
         f"its eval_sha256 is not that of its frozen block and {', '.join(args.eval_file)}")
    if found == foot["eval_sha256"]:
        track["eval_files"] = files
    return track

def open_track(args, logs, root):
    """File record #1 and its track, or raise a ValueError that says why not; returns its folder."""
    foot, source = logs[0]["footer"], logs[0]["source"]
    folder = Path(root, "records", f"{foot['task']}-{foot['track']}")
    need(not folder.exists(), folder, "this track is open already, and its baseline stays")
    need(args.data, args.logs[0], "--baseline needs --data, what the track trains on")
    track = describe_track(args, logs[0], root)
    logs = read_logs(args.logs, track, source, f"{args.logs[0]}")
    for log in logs:
        check_log(log, track, root)
    track["baseline"] = describe_baseline(args.baseline, logs, track)
    Path(root, "records").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".part-") as part:
        part, name = Path(part, folder.name), f"{time.strftime('%Y-%m-%d')}_{args.name}"
        part.mkdir()
        (part / "track.json").write_text(json.dumps(track, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        write_record(part / name, logs, [], args.note)
        track, (record,) = read_track(part)
        show_trials(record, track)
        print("the target is reached" if track["baseline"]["reached"] else
              f"not reached in {record['seconds']:.0f} s: {'; '.join(shortfalls(logs, track))}")
        check_record(record, [record], track, root)
        check_readme(record)
        return part.rename(folder) / name

def find_rival(args, logs, before, track, root):
    """The trials, and those of the record before that took turns with them, if they are to be filed: (logs, rerun)."""
    if args.against:
        return rerun_both(logs[0], before, range(max(len(logs), MIN_TRIALS)), root)
    return logs, read_logs(args.rival, track, before["logs"][0]["source"], f"record #{before['number']}'s script")

def submit(args, root=ROOT):
    """File the record, or raise a ValueError that says why not; returns its folder."""
    title = args.note.strip().lstrip("# ").partition("\n")[0]
    if not 3 <= len(title) <= 90:
        raise ValueError("the first line of --note is the title in the table: 3 to 90 characters")
    logs = [parse_log(path) for path in args.logs]
    if args.baseline:
        return open_track(args, logs, root)
    task = f"{logs[0]['footer']['task']}-{logs[0]['footer']['track']}"
    track_folder = Path(root, "records", task)
    if not (track_folder / "track.json").exists():
        raise ValueError(f"{args.logs[0]}: there is no track {task} in records/: --baseline opens one")
    track, records = read_track(track_folder)
    if not records:
        raise ValueError(f"{task} has no record #1")
    name, before = f"{time.strftime('%Y-%m-%d')}_{args.name}", records[-1]
    if (track_folder / name).exists():
        raise ValueError(f"{track_folder / name} is there already: take another --name")
    logs = read_logs(args.logs, track, logs[0]["source"], f"{args.logs[0]}")
    for log in logs:
        check_log(log, track, root)
    logs, rerun = find_rival(args, logs, before, track, root)
    with tempfile.TemporaryDirectory(dir=track_folder, prefix=".part-") as part:
        write_record(Path(part, name), logs, rerun, args.note)
        track, records = read_track(track_folder, Path(part, name))
        record = records[-1]
        show(record, before, track)
        check_record(record, records, track, root)
        check_readme(record)
        if record["date"] == before["date"] and record["seconds"] >= before["seconds"]:
            raise ValueError(f"record #{before['number']} is of today and from a faster machine, and records of one "
                             "date are ordered by time: file this one tomorrow")
        return Path(part, name).rename(track_folder / name)

def main(argv, root=ROOT):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail("submit.py")
    parser.add_argument("logs", nargs="+", type=Path, help="a log of each trial")
    parser.add_argument("--name", required=True, help="CamelCase, for the folder")
    parser.add_argument("--note", required=True, help="what changed and why; its first line is the title")
    parser.add_argument("--rival", nargs="+", type=Path, default=[], help="logs of the record before, run in turn")
    parser.add_argument("--against", action="store_true", help="run it and the current record now, in turn")
    parser.add_argument("--baseline", metavar="RECIPE", help="open a track: what its record #1 is")
    parser.add_argument("--data", help="with --baseline: what the track trains on")
    parser.add_argument("--floor", action="append", default=[], help="with --baseline: as quality_desc_f1>=0.9")
    parser.add_argument("--device", help="with --baseline: cpu, cuda or a pattern of the hardware; else as the logs")
    parser.add_argument("--eval-file", action="append", default=[], help="with --baseline: a file that the evaluation "
                        "reads, in order; else those that Config names")
    args = parser.parse_intermixed_args(argv)
    try:
        folder = submit(args, root)
    except (ValueError, OSError) as error:
        sys.exit("submit.py: " + re.sub(r"/\.part-[^/]*/", "/", str(error)))
    except KeyboardInterrupt:
        sys.exit("submit.py: interrupted; the same command carries on where it stopped")
    print(f"filed {folder}")
    sys.exit(leaderboard.main([], root))

if __name__ == "__main__":
    main(sys.argv[1:])
