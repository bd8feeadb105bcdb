"""
What the logs say and the rules a record must meet. leaderboard.py, verify.py, submit.py and compare.py all read logs,
take statistics and judge records with these functions. Every fault is a ValueError of one sentence that names the file.
"""

import ast
import hashlib
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
RULE = "=" * 100
FREE_OVERRIDES = ("seed", "track", "precision")  # precision: of the machine, what is faster on its CPU
ALPHA, MIN_TRIALS, MAX_GROWTH = 0.01, 5, 4  # p, trials, and parameters over the baseline's
TRACK_KEYS = "task track data data_sha256 eval_sha256 target hardware_class baseline".split()
FOOTER_KEYS = """script task track seed world_size hardware steps parameters tokens val_loss target reached
    train_seconds compile_seconds tokens_per_second mfu peak_memory_mib data_sha256 eval_sha256 overrides""".split()

# -----------------------------------------------------------------------------
# Logs

def parse_value(key, text):
    """A footer value as bool, int or float where it is one; hashes stay text."""
    try:
        return text if "sha" in key else json.loads({"True": "true", "False": "false"}.get(text, text))
    except ValueError:
        return text

def parse_log(path):
    """One training log -> {"path", "source": str, "config": str, "steps": [(step, train seconds, val_loss)],
    "averages": [milliseconds a step], "footer": dict}.
    The script printed on top may itself hold rules and footers, so the log is split at its last two rules.
    ValueError says what is wrong with a file that is not the log of a finished run.
    """
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    rules = [i for i, line in enumerate(lines) if line == RULE]
    if len(rules) < 2:
        raise ValueError(f"{path}: not a training log: it has {len(rules)} rule lines, and a log has 2 or more")
    top, bottom = rules[-2:]
    steps, averages, footer, num_steps = [], [], {}, None
    for line in lines[bottom + 1:]:
        if m := re.match(r"step:(\d+)/(\d+) val_loss:(\S+) train_time:([\d.]+)ms(?: step_avg:([\d.]+)ms)?", line):
            steps.append((int(m[1]), float(m[4]) / 1000, float(m[3])))
            averages.append(float(m[5] or "nan"))
            num_steps = int(m[2])
        elif m := re.match(r"([a-z]\w*): ?(.*)$", line):
            footer[m[1]] = parse_value(m[1], m[2].strip())
    if missing := [key for key in FOOTER_KEYS if key not in footer]:
        raise ValueError(f"{path}: truncated log: its footer lacks {', '.join(missing)}")
    numbers = "seed world_size steps parameters tokens val_loss target train_seconds tokens_per_second".split()
    if odd := [key for key in numbers if type(footer[key]) not in (int, float)]:
        raise ValueError(f"{path}: its {odd[0]} is no number: {footer[odd[0]]}")
    if not re.fullmatch(r"\w[\w.-]*\.py", str(footer["script"])):
        raise ValueError(f"{path}: its script is no file name that ends in .py: {footer['script']}")
    if not steps or not steps[-1][0] == num_steps == footer["steps"]:
        raise ValueError(f"{path}: its step lines do not end at {footer['steps']}, the footer's number of steps")
    _, seconds, loss = steps[-1]
    if not (abs(loss - footer["val_loss"]) < 1e-4 and abs(seconds - footer["train_seconds"]) < 0.002):  # rounding
        raise ValueError(f"{path}: its last step line and its footer disagree on val_loss or train_seconds")
    return dict(path=Path(path), source="\n".join(lines[:top]), config="\n".join(lines[top + 1:bottom]), steps=steps,
                averages=averages, footer=footer)

def read_logs(paths, track, source=None, whose="the record's script"):
    """The logs of one script's trials by seed, each checked against its track and `source`, or the script beside it."""
    logs = {}
    for path in sorted(paths):
        log = parse_log(path)
        foot = log["footer"]
        for key in "task", "track", "data_sha256", "eval_sha256":
            if foot[key] != track[key]:
                raise ValueError(f"{path}: its {key} is {foot[key]}, and the track's is {track[key]}")
        if set(re.findall(r"(\w+)\W*[=:]", str(foot["overrides"]))) - set(FREE_OVERRIDES):
            raise ValueError(f"{path}: a record runs with no override but {', '.join(FREE_OVERRIDES)}: "
                             f"{foot['overrides']}")
        if log["source"].strip() != (source or path.with_name(foot["script"]).read_text(encoding="utf-8")).strip():
            raise ValueError(f"{path}: its source is not that of {whose}")
        if foot["seed"] in logs:
            raise ValueError(f"{path}: another log has the same seed, {foot['seed']}")
        logs[foot["seed"]] = log
    for key, what in ("hardware", "on one kind of hardware"), ("precision", "of one precision, --precision sets it"):
        if len({log["footer"].get(key) for log in logs.values()}) > 1:  # the first season's logs name no precision
            raise ValueError(f"{path.parent}: its trials must be {what}")
    return [logs[seed] for seed in sorted(logs)]

def read_settings(log):
    """The settings that a training script logged: {"config", "argv", "overrides", "torch", ...}."""
    try:
        settings = json.loads(log["config"])
        return settings if settings.keys() >= {"config", "argv", "overrides"} else {}[""]
    except (ValueError, AttributeError, KeyError):
        raise ValueError(f"{log['path']}: its settings are not JSON with config, argv and overrides") from None

def literal(node):
    """The value of a constant expression, as JSON would hold it."""
    parts = (ast.Constant, ast.Tuple, ast.List, ast.Dict, ast.UnaryOp, ast.BinOp, ast.operator, ast.unaryop, ast.Load)
    if not all(isinstance(part, parts) for part in ast.walk(node)):
        raise ValueError(f"{ast.unparse(node)} is not a constant")
    return json.loads(json.dumps(eval(compile(ast.Expression(node), "Config", "eval"), {})))

def source_config(source, track):
    """The Config that a script has for a track, read from its text without running it: {field: value}."""
    fields, changes = {}, {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            fields = {line.target.id: literal(line.value) for line in node.body if isinstance(line, ast.AnnAssign)}
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CONFIGS":
            call = {literal(key): value for key, value in zip(node.value.keys, node.value.values)}[track]
            changes = {word.arg: literal(word.value) for word in call.keywords}
    return fields | changes

def frozen_block(source):
    return source.partition("# --- " "frozen:")[2].partition("# --- " "end:")[0]

def check_log(log, track, root=ROOT):
    """What a trial must be besides read_logs' checks: run as its source says, to the end, and of one piece."""
    def need(holds, what):
        if not holds:
            raise ValueError(f"{log['path']}: {what}")

    foot, source, settings = log["footer"], log["source"], read_settings(log)
    config = settings["config"]
    try:
        written = source_config(source, foot["track"])
    except (ValueError, KeyError, TypeError, AttributeError, SyntaxError) as error:
        raise ValueError(f"{log['path']}: cannot read the Config in its source: {error!r}") from None
    given = [word for word in settings["argv"] if not re.match(f"--({'|'.join(FREE_OVERRIDES)})=", word)]
    given += sorted(set(settings["overrides"]) - set(FREE_OVERRIDES))
    need(not given, f"a record runs with no override but {', '.join(FREE_OVERRIDES)}: {', '.join(given)}")
    for key in sorted((written.keys() | config.keys()) - {"seed", "precision"}):
        need(written.get(key) == config.get(key),
             f"it ran with {key} {config.get(key)}, and its source says {written.get(key)}")
    for key, value in track.get("eval_config", {}).items():
        need(config.get(key) == value, f"its {key} is {config.get(key)}, and the track's evaluation has {value}")
    need(not (config | settings.get("options", {})).get("load"), "it starts from a checkpoint, and a record trains from the beginning")
    for key, where in dict(seed=config, target=config, track=config, hardware=settings, precision=settings).items():
        need(foot.get(key) == where.get(key),
             f"its footer has {key} {foot.get(key)}, and its settings {where.get(key)}")
    N, every = config.get("num_steps"), config.get("eval_every")
    need(foot["steps"] == N and foot["steps"] > 0, f"early exit: it made {foot['steps']} of num_steps {N}")
    if every:
        need([step for step, _, _ in log["steps"]] == [*range(every, N, every), N],
             f"its step lines are not at every {every} steps and the last")
    times = [seconds for _, seconds, _ in log["steps"]]
    need(all(a < b for a, b in zip([0, *times], times)), "its train times do not rise")
    for (step, seconds, _), average in zip(log["steps"], log["averages"]):
        need(abs(1000 * seconds / max(1, step) - average) < 0.006 + 1 / max(1, step),
             f"train_time and step_avg disagree at step {step}")
    rate, slack = foot["tokens"] / foot["train_seconds"], 0.001 / foot["train_seconds"]
    need(abs(foot["tokens_per_second"] - rate) < 1 + slack * rate, "train_seconds and tokens_per_second disagree")
    need(foot["reached"] == (foot["val_loss"] <= foot["target"]), "val_loss and reached disagree")
    parts = [value for key, value in foot.items() if key.startswith("val_loss_")]
    need(not parts or abs(np.mean(parts) - foot["val_loss"]) < 2e-4, "val_loss is not the mean of its parts")
    need(source.count("# --- " "frozen: eval ---") == 1, "its source needs one block marked frozen: eval")
    files = [Path(root, name) for name in track.get("eval_files", [])]
    if files and all(file.exists() for file in files):
        digest = hashlib.sha256(b"".join([frozen_block(source).encode(), *(file.read_bytes() for file in files)]))
        need(digest.hexdigest() == foot["eval_sha256"], "its eval_sha256 is not that of its source and frozen files")

# -----------------------------------------------------------------------------
# Statistics

def p_value(losses, target):
    """One-sided one-sample t-test: how likely are losses this low if their true mean is the target? nan for one."""
    if len(losses) < 2 or not np.all(np.isfinite(losses)):
        return math.nan
    if np.std(losses) == 0:
        return 0.5 * (1 - float(np.sign(target - losses[0])))
    return float(stats.ttest_1samp(losses, target, alternative="less").pvalue)

def welch(a, b):
    """How much more b is than a on average, and half of Welch's 95 % interval of it, nan for one value."""
    half = math.nan
    if min(len(a), len(b)) > 1:
        low, high = stats.ttest_ind(b, a, equal_var=False).confidence_interval() if np.ptp(a) or np.ptp(b) else (0, 0)
        half = float(high - low) / 2
    return float(np.mean(b) - np.mean(a)), half

def paired(a, b):
    """The same for values that belong together one by one, by Student's t of their differences."""
    d = np.subtract(b, a)
    half = float(stats.sem(d) * stats.t.ppf(0.975, len(d) - 1)) if len(d) > 1 else math.nan
    return float(np.mean(d)), half

# -----------------------------------------------------------------------------
# Tracks and records

def mean_seconds(logs):
    return float(np.mean([log["footer"]["train_seconds"] for log in logs]))

def read_record(path, track):
    """A record's folder -> {"path", "date", "title", "logs", "seconds", "losses", ...}."""
    if not re.fullmatch(r"\d{4}-\d\d-\d\d_[A-Z]\w*", path.name):
        raise ValueError(f"{path}: a record's folder is named YYYY-MM-DD_CamelCase")
    title = (path / "README.md").read_text(encoding="utf-8").strip().partition("\n")[0].strip("# ")
    logs = read_logs(path.glob("*.log"), track)
    if not logs:
        raise ValueError(f"{path}: it has no <seed>.log")
    return dict(path=path, date=path.name[:10], title=title, logs=logs, seconds=mean_seconds(logs),
                hardware=logs[0]["footer"]["hardware"], losses=[log["footer"]["val_loss"] for log in logs],
                lines=len(logs[0]["source"].strip().split("\n")))

def read_track(folder, candidate=None):
    """records/<task>-<track> -> (track.json as a dict, its records as dicts: by date, on one date the slower first, and
    last a candidate that is to become one).

    A record's baseline/ or previous/ holds logs of record #1 or of the record before it, re-run in alternation with it
    on its machine. The speed-up over #1 is each record's gain on the one before, multiplied up, or that over baseline/.
    """
    track = json.loads((folder / "track.json").read_text(encoding="utf-8"))
    if missing := [key for key in TRACK_KEYS if key not in track]:
        raise ValueError(f"{folder}/track.json lacks {', '.join(missing)}")
    paths = [path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."]
    records = sorted((read_record(path, track) for path in paths), key=lambda r: (r["date"], -r["seconds"], r["path"]))
    records += [read_record(candidate, track)] if candidate else []
    for i, r in enumerate(records):
        if i > 0 and any(log["footer"]["target"] != track["target"] for log in r["logs"]):  # #1 is what defines it
            raise ValueError(f"{r['path']}: its logs have another target than the track's {track['target']}")
        first, before, r["number"] = records[0], records[max(i - 1, 0)], i + 1
        r["baseline"] = read_logs((r["path"] / "baseline").glob("*.log"), track, first["logs"][0]["source"],
                                  "the baseline's script")
        r["previous"] = read_logs((r["path"] / "previous").glob("*.log"), track, before["logs"][0]["source"],
                                  "the previous record's script")
        r["rival"] = r["previous"] or (r["baseline"] if i == 1 else []) or before["logs"]
        gain = before["speedup"] * mean_seconds(r["rival"]) / r["seconds"] if i > 0 else 1.0
        r["speedup"] = mean_seconds(r["baseline"]) / r["seconds"] if r["baseline"] else gain
        r["p"] = p_value(r["losses"], track["target"]) if i > 0 else math.nan
        r["mark"] = "" if i == 0 or len(r["logs"]) >= MIN_TRIALS and r["p"] < ALPHA else "†"
    return track, records

def check_record(record, records, track, root=ROOT):
    """All rules for one of read_track's records."""
    def need(holds, what):
        if not holds:
            raise ValueError(f"{record['path']}: {what}")

    first, logs, number = records[0], record["logs"], record["number"]
    sizes = [[log["footer"]["parameters"] for log in r["logs"]] for r in (first, record)]
    for log in logs + record["baseline"] + record["previous"]:
        check_log(log, track, root)
        need(log["path"].name == f"{log['footer']['seed']}.log", f"{log['path'].name} should be named after its seed")
        need(frozen_block(log["source"]) == frozen_block(first["logs"][0]["source"]),
             "its frozen evaluation is not that of record #1")
    known = {"README.md", "baseline", "previous"} | {logs[0]["footer"]["script"]} | {log["path"].name for log in logs}
    strange = {path.name for path in record["path"].iterdir()} - known
    need(not strange, f"{', '.join(sorted(strange))} is no part of a record")
    trials = [log for r in records[:number] for log in r["logs"] + r["baseline"] + r["previous"]]
    for a, b in itertools.combinations(trials, 2):
        need(a["steps"] != b["steps"], f"{b['path'].name} has the losses and times of {a['path']}: a copy")
    need(re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])", record["date"]), "there is no such date")
    need(record["title"], "its README.md needs a title in the first line")
    if number == 1:
        step = track.get("target_step", 0.01)
        target = round(math.ceil(round(np.mean(record["losses"]) / step, 6)) * step, 6)
        need(target == track["target"], f"the target is {track['target']}, and record #1's mean rounded up {target}")
        return
    rival = record["rival"]
    need(len(logs) >= MIN_TRIALS, f"a record needs at least {MIN_TRIALS} trials, and it has {len(logs)}")
    need(record["p"] < ALPHA, f"its mean loss of {np.mean(record['losses']):.4f} is not below the target "
         f"{track['target']} at p < {ALPHA}: p = {record['p']:.2g}")
    need(max(sizes[1]) <= MAX_GROWTH * min(sizes[0]), f"it has {max(sizes[1])} parameters, more than {MAX_GROWTH} "
         f"times the baseline's {min(sizes[0])}")
    need(not record["previous"] or len(rival) >= MIN_TRIALS, f"its previous/ needs at least {MIN_TRIALS} logs")
    need(rival[0]["footer"]["hardware"] == record["hardware"], f"it ran on other hardware than record #{number - 1}: "
         "that has to be re-run beside it, submit.py --against does so")
    need(record["seconds"] < mean_seconds(rival), f"{record['seconds']:.3f} s is no faster than record #{number - 1}, "
         f"{mean_seconds(rival):.3f} s")
