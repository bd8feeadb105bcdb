"""
Check a record's logs against all rules and file it: a folder in records/<task>-<track>/ and new tables.

    python records/submit.py logs/<a>.txt logs/<b>.txt ... --name CamelCase --note "Title.

    What changed, why, and what each change gave."
    python records/submit.py logs/<a>.txt --name CamelCase --note "..." --against

The logs decide, nothing is typed. A record has to be faster than the one before it on the same machine: the filed logs
of that are taken if they are from equal hardware. With --against nothing old counts: the logs' script and the current
record's are run now, in turn, with the logs' seeds (at least five each), and those logs are filed.
Refuses with one sentence and leaves no trace.
"""

import argparse
import itertools
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import leaderboard
from compare import Entry, fail, race
from rules import MIN_TRIALS, ROOT, check_log, check_record, mean_seconds, parse_log, read_logs, read_track
from verify import check_readme

def rerun(log, before, seeds, root):
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

def write_record(folder, logs, previous, note):
    """README.md, the script, <seed>.log of every trial, and previous/ if the record before was run again."""
    folder.mkdir()
    (folder / logs[0]["footer"]["script"]).write_text(logs[0]["source"], encoding="utf-8")
    parts = [f"# {note.strip().lstrip('# ')}", "The trials:", leaderboard.trials_table(logs)]
    if previous:
        parts += ["The record before, run in turn with them, seed by seed:", leaderboard.trials_table(previous)]
        (folder / "previous").mkdir()
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    for where, group in (folder, logs), (folder / "previous", previous):
        for log in group:
            (where / f"{log['footer']['seed']}.log").write_bytes(log["path"].read_bytes())

def show(record, before, track):
    """What the logs say of a candidate."""
    losses, rival = record["losses"], record["rival"]
    for foot in (log["footer"] for log in record["logs"]):
        print(f"seed {foot['seed']}: loss {foot['val_loss']:.5f}, {foot['train_seconds']:.3f} s")
    faster = 100 * (1 - record["seconds"] / mean_seconds(rival))
    added = record["lines"] - before["lines"]
    print(f"loss {leaderboard.show_loss(losses)}, target {track['target']}, p = {record['p']:.2g}\n"
          f"{record['seconds']:.3f} s against {mean_seconds(rival):.3f} s of record #{before['number']} "
          f"(mean of {len(rival)}): {-faster:+.1f} % time, {record['speedup']:.2f}x over the baseline")
    if added > 20 * max(faster, 0):
        print(f"{added:+d} lines for it: about 20 for each 1 % of time is the most a change should cost")

def submit(args, root=ROOT):
    """File the record, or raise a ValueError that says why not; returns its folder."""
    logs = [parse_log(path) for path in args.logs]
    task = f"{logs[0]['footer']['task']}-{logs[0]['footer']['track']}"
    track_folder = Path(root, "records", task)
    if not (track_folder / "track.json").exists():
        raise ValueError(f"{args.logs[0]}: there is no track {task} in records/")
    track, records = read_track(track_folder)
    if not records:
        raise ValueError(f"{task} has no record #1 yet, which has to define its target first")
    title = args.note.strip().lstrip("# ").partition("\n")[0]
    if not 3 <= len(title) <= 90:
        raise ValueError("the first line of --note is the title in the table: 3 to 90 characters")
    name, before, previous = f"{time.strftime('%Y-%m-%d')}_{args.name}", records[-1], []
    if (track_folder / name).exists():
        raise ValueError(f"{track_folder / name} is there already: take another --name")
    logs = read_logs(args.logs, track, logs[0]["source"], f"{args.logs[0]}")
    for log in logs:
        check_log(log, track, root)
    if args.against:
        seeds = [log["footer"]["seed"] for log in logs]
        seeds += itertools.islice((s for s in itertools.count() if s not in seeds), max(0, MIN_TRIALS - len(seeds)))
        logs, previous = rerun(logs[0], before, seeds, root)
    with tempfile.TemporaryDirectory(dir=track_folder, prefix=".part-") as part:
        write_record(Path(part, name), logs, previous, args.note)
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
    parser.add_argument("--against", action="store_true", help="run it and the current record now, in turn")
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
