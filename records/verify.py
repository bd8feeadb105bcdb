"""
Check every committed record again, from the logs alone; exit 1 and one sentence for each thing that is wrong.

    python records/verify.py

Logs: finished, all steps, one source, its own Config, the track's device and data, the repository's stop-watch and
evaluation, nothing copied. Rules: target, floors, seeds, p, parameters and buffers, faster than the record before in
alternation with it. Then names, links, tables and plots. What it cannot see is rules.UNSEEN, which it prints.
"""

import re
import sys
from pathlib import Path

from leaderboard import ROOT, TRIALS, page, show_loss, show_speedup, show_time, stale, table, trials_table
from rules import UNSEEN, check_record, read_track

def anchors(text):
    """The anchors that GitHub gives the headings of a Markdown text."""
    return {re.sub(r"[^\w\- ]", "", line.strip("# \n").lower()).replace(" ", "-")
            for line in text.splitlines() if line.startswith("#")}

def check_links(path):
    """The links and pictures of a Markdown file that lead to no file or heading here; the web is not tried."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if re.match(r"\w+:", link):
            continue
        if not target.exists():
            yield f"{path}: its link {link} leads nowhere"
        elif anchor and target.suffix == ".md" and anchor not in anchors(target.read_text(encoding="utf-8")):
            yield f"{path}: {target.name} has no heading for its link {link}"

def check_readme(record):
    """The tables of trials in a record's README.md, where submit.py wrote them."""
    text = (record["path"] / "README.md").read_text(encoding="utf-8")
    tables = [trials_table(record[part]) for part in ("logs", "rerun") if record[part]]
    if text.count(table(TRIALS, [])) and (text.count(table(TRIALS, [])) != len(tables) or
                                          not all(part in text for part in tables)):
        raise ValueError(f"{record['path']}/README.md: its table of trials is not what the logs say")

def verify(root=ROOT, say=print):
    """All faults found under root, one sentence each; `say` gets a line for each record that holds."""
    faults, root = [], Path(root)
    for folder in sorted(path for path in (root / "records").iterdir() if path.is_dir() and path.name[0] not in "._"):
        try:
            track, records = read_track(folder)
        except (ValueError, OSError) as error:
            faults.append(str(error))
            continue
        if folder.name != f"{track['task']}-{track['track']}":
            faults.append(f"{folder}: its track.json is of {track['task']}-{track['track']}")
        for r in records:
            try:
                check_record(r, records, track, root)
                check_readme(r)
            except (ValueError, OSError) as error:
                faults.append(str(error))
            else:
                say(f"{folder.name} #{r['number']} {r['title']}: loss {show_loss(r['losses'])}, p {r['p']:.2g}, "
                    f"{show_time(r, track)} s, {show_speedup(r)}")
    for path in [root / "README.md", *sorted((root / "records").rglob("*.md")), *sorted((root / "docs").rglob("*.md"))]:
        faults += check_links(path)
    try:
        faults += [f"{path} is not what the logs say: run python records/leaderboard.py" for path in stale(root)]
    except (ValueError, OSError) as error:
        faults += [str(error)] * (str(error) not in faults)
    return faults + [f"{root / 'docs'} is out of date: run python docs/page.py"] * bool(page(root, "--check"))

if __name__ == "__main__":
    found = verify()
    print("\n".join(found) or f"all records hold. {UNSEEN}", file=sys.stderr if found else sys.stdout)
    sys.exit(bool(found))
