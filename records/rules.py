"""
What the logs say and the rules a record must meet. leaderboard.py, verify.py, submit.py and compare.py all read logs,
take statistics and judge records with these functions. Every fault is a ValueError of one sentence that names the file.
"""

import ast
import hashlib
import itertools
import json
import math
import operator
import re
from pathlib import Path

import numpy as np
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
RULE = "=" * 100
# precision: of the machine, what is faster on its CPU; save: weights are written once all is measured
FREE_OVERRIDES = ("seed", "track", "precision", "save")
ALPHA, MIN_TRIALS = 0.01, 5
MAX_GROWTH = 4  # parameters and buffers over the baseline's
MAX_EVALUATION = 10  # seconds of an evaluation over the baseline's
BASELINE_SECONDS = 7200  # that a baseline may train
STOP_WATCH = ("copied: run", "copied: start")  # blocks that measure: a record has the repository's
FROZEN = ("frozen: eval",)
ANY_NAME = ("globals", "locals", "vars", "setattr", "delattr", "exec")  # with which any name can be written
DEVICES = {"cpu": r"^\d+ x \d+ cores of ", "cuda": r"^\d+ x (?!\d+ cores of )"}  # other patterns are themselves
CLAIMS = re.compile(r"\A(.*\n)\n(?:Record: .*\n(?: .*\n)*)+")  # below the title of a docstring, see leaderboard.py
COMPARE = {">=": operator.ge, "<=": operator.le}
TRACK_KEYS = """task track data data_sha256 eval_sha256 run_sha256 frozen_sha256 target floors device
    baseline""".split()
BASELINE_KEYS = "recipe reached seconds loss parameters_and_buffers eval_seconds".split()
FOOTER_KEYS = """script task track seed world_size hardware steps parameters tokens val_loss target reached
    train_seconds compile_seconds tokens_per_second mfu peak_memory_mib data_sha256 eval_sha256 overrides""".split()
RECORD_KEYS = "precision buffers eval_seconds start_time".split()  # of a record's footers besides
UNSEEN = ("No log shows that it was written by the run it tells of, that no target leaks into a prediction, that the "
          "clock runs whenever training goes on, that the judge is the repository's, or that no statistics of the "
          "training text but learned weights are used: the source is in the log to be read and run again.")

# -----------------------------------------------------------------------------
# Logs

def need(holds, where, what):
    if not holds:
        raise ValueError(f"{where}: {what}")

def parse_value(key, text):
    """A footer value as bool, int or float where it is one; hashes stay text."""
    try:
        return text if "sha" in key else json.loads({"True": "true", "False": "false"}.get(text, text))
    except ValueError:
        return text

def parse_steps(lines):
    """What is below the settings -> (steps and averages as parse_log has them, footer, number of steps).

    The footer is what follows the last step line. ValueError for a key that it has twice.
    """
    steps, averages, footer, num_steps = [], [], {}, None
    for line in lines:
        if m := re.match(r"step:(\d+)/(\d+) val_loss:(\S+) train_time:([\d.]+)ms(?: step_avg:([\d.]+)ms)?", line):
            steps.append((int(m[1]), float(m[4]) / 1000, float(m[3])))
            averages.append(float(m[5] or "nan"))
            num_steps, footer = int(m[2]), {}
        elif m := re.match(r"([a-z]\w*): ?(.*)$", line):
            if m[1] in footer:
                raise ValueError(f"its footer has {m[1]} twice")
            footer[m[1]] = parse_value(m[1], m[2].strip())
    return steps, averages, footer, num_steps

def parse_log(path):
    """One training log -> {"path", "source": str, "config": str, "steps": [(step, train seconds, val_loss)],
    "averages": [milliseconds per step], "footer": dict}.
    The script printed on top may itself hold rules and footers, so the log is split at its last two rules.
    ValueError says what is wrong with a file that is not the log of a finished run.
    """
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    rules = [i for i, line in enumerate(lines) if line == RULE]
    need(len(rules) >= 2, path, f"not a training log: it has {len(rules)} rule lines, and a log has 2 or more")
    top, bottom = rules[-2:]
    try:
        steps, averages, footer, num_steps = parse_steps(lines[bottom + 1:])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    missing = [key for key in FOOTER_KEYS if key not in footer]
    need(not missing, path, f"truncated log: its footer lacks {', '.join(missing)}")
    numbers = """seed world_size steps parameters tokens val_loss target train_seconds tokens_per_second buffers
        eval_seconds start_time""".split()
    for key in numbers + [key for key in footer if key.startswith("val_loss_")]:
        need(type(footer.get(key, 0)) in (int, float), path, f"its {key} is no number: {footer.get(key)}")
    need(re.fullmatch(r"\w[\w.-]*\.py", str(footer["script"])), path,
         f"its script is no file name that ends in .py: {footer['script']}")
    need(steps and steps[-1][0] == num_steps == footer["steps"], path,
         f"its step lines do not end at {footer['steps']}, the footer's number of steps")
    _, seconds, loss = steps[-1]
    need(abs(loss - footer["val_loss"]) < 1e-4 and abs(seconds - footer["train_seconds"]) < 0.002, path,  # rounding
         "its last step line and its footer disagree on val_loss or train_seconds")
    return dict(path=Path(path), source="\n".join(lines[:top]), config="\n".join(lines[top + 1:bottom]), steps=steps,
                averages=averages, footer=footer)

def without_claim(source):
    """A script's source without the lines that leaderboard.py writes into its docstring."""
    return CLAIMS.sub("\\1", source).strip()

def machine(foot):
    """What a run had, as world x name."""
    return f"{foot['world_size']} x " + re.sub(r"^\d+ ?x ", "", str(foot["hardware"]))

def read_logs(paths, track, source=None, whose="the record's script"):
    """The logs of one script's trials by seed, each checked against its track and `source`, or the script beside it."""
    logs = {}
    for path in sorted(paths):
        log = parse_log(path)
        foot = log["footer"]
        for key in "task", "track", "data_sha256", "target":
            need(foot[key] == track[key], path, f"its {key} is {foot[key]}, and the track's is {track[key]}")
        need(foot["eval_sha256"] in track["eval_sha256"], path,
             f"its eval_sha256 is {foot['eval_sha256']}, which is not the track's")
        words = set(re.findall(r"(\w+)\W*[=:]", str(foot["overrides"])))
        need(words <= set(FREE_OVERRIDES), path,
             f"a record runs with no override but {', '.join(FREE_OVERRIDES)}: {foot['overrides']}")
        script = source or path.with_name(foot["script"]).read_text(encoding="utf-8")
        need(without_claim(log["source"]) == without_claim(script), path, f"its source is not that of {whose}")
        need(foot["seed"] not in logs, path, f"another log has the same seed, {foot['seed']}")
        logs[foot["seed"]] = log
    feet = [log["footer"] for log in logs.values()]
    for values, what in ({machine(foot) for foot in feet}, "on one kind of hardware with one number of processes"), \
            ({foot.get("precision") for foot in feet}, "of one precision, --precision sets it"):
        need(len(values) < 2, path.parent if logs else "", f"its trials must be {what}: {', '.join(map(str, values))}")
    return [logs[seed] for seed in sorted(logs)]

def read_settings(log):
    """The settings that a training script logged: {"config", "argv", "overrides", "torch", ...}."""
    try:
        settings = json.loads(log["config"])
        return settings if settings.keys() >= {"config", "argv", "overrides"} else {}[""]
    except (ValueError, AttributeError, KeyError):
        raise ValueError(f"{log['path']}: its settings are not JSON with config, argv and overrides") from None

def read_fields(log):
    """What a run was set to: its tuned numbers and its options, {field: value}."""
    settings = read_settings(log)
    return settings["config"] | settings.get("options", {})

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

# -----------------------------------------------------------------------------
# Blocks of a source that a record may not change

def block_lines(source, names):
    """The first and last line numbers of blocks such as "copied: run", in order."""
    lines, spans = source.split("\n"), []
    for name in names:
        kind, _, title = name.partition(": ")
        starts, ends = ([i for i, line in enumerate(lines, 1) if line == f"# --- {word}: {title} ---"]
                        for word in (kind, "end"))
        if len(starts) != 1 or len(ends) != 1 or starts > ends:
            raise ValueError(f"its source needs one block marked {name}")
        spans.append((starts[0] + 1, ends[0] - 1))
    return spans

def block_sha256(source, names):
    """One hash of blocks such as "copied: run" in a source."""
    lines = source.split("\n")
    text = "".join(line + "\n" for first, last in block_lines(source, names) for line in lines[first - 1:last])
    return hashlib.sha256(text.encode()).hexdigest()

def bound_names(tree):
    """(name, line number) of all that a module defines, assigns, takes as a parameter or writes a part of; methods are
    no names. "*" is any name: a star import's, or what ANY_NAME can write."""
    methods = {method for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for method in node.body}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node not in methods:
            yield node.name, node.lineno
        elif isinstance(node, ast.Name):
            if isinstance(node.ctx, (ast.Store, ast.Del)) or node.id in ANY_NAME:
                yield "*" if node.id in ANY_NAME else node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)):
            yield node.name, node.lineno
        elif isinstance(node, ast.MatchMapping):
            yield node.rest, node.lineno
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((alias.asname or alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, (ast.Attribute, ast.Subscript)) and isinstance(node.ctx, (ast.Store, ast.Del)):
            while isinstance(node, (ast.Attribute, ast.Subscript)):
                node = node.value
            if isinstance(node, ast.Name):
                yield node.id, node.lineno

def redefined(source, names):
    """What blocks define at the top level and code outside of them defines anew or writes into. ValueError for a block
    that is no code of the module's top level, as in a string."""
    spans, tree = block_lines(source, names), ast.parse(source)
    for (first, last), name in zip(spans, names):
        if any(node.lineno <= last and node.end_lineno >= first and not first <= node.lineno <= node.end_lineno <= last
               for node in tree.body):
            raise ValueError(f"its block {name} is a part of something else")
    inside = {line for first, last in spans for line in range(first, last + 1)}
    own = {"*"}
    for node in tree.body:
        if node.lineno in inside and isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif node.lineno in inside and isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            own |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return sorted({name for name, line in bound_names(tree) if line not in inside} & own)

def check_blocks(log, track, root=ROOT):
    """The stop-watch and the frozen evaluation are the repository's, and nothing takes their place."""
    source, foot, where = log["source"], log["footer"], log["path"]
    try:
        for key, names in ("run_sha256", STOP_WATCH), ("frozen_sha256", FROZEN):
            need(block_sha256(source, names) in track[key], where,
                 f"its block {' and '.join(names)} is not the repository's, as track.json has it")
        changed = redefined(source, STOP_WATCH + FROZEN)
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from None
    need(not changed, where, f"its source redefines {', '.join(changed)} outside the block it belongs to"
         + (f"; * is any name, by import * or one of {', '.join(ANY_NAME)}" if "*" in changed else ""))
    files = [Path(root, name) for name in track.get("eval_files", [])]
    if files and all(file.exists() for file in files):
        need(eval_sha256(source, files) == foot["eval_sha256"], where,
             "its eval_sha256 is not that of its source and frozen files")

def eval_sha256(source, files):
    """What a script's frozen_sha256 says of its frozen block and of the files that it reads."""
    code = source.partition("# --- " "frozen:")[2].partition("# --- " "end:")[0]
    return hashlib.sha256(b"".join([code.encode(), *(Path(file).read_bytes() for file in files)])).hexdigest()

# -----------------------------------------------------------------------------
# One trial

def check_settings(log, track):
    """It ran as its source says, from the beginning and with the track's evaluation."""
    where, foot, settings, fields = log["path"], log["footer"], read_settings(log), read_fields(log)
    config = settings["config"]
    try:
        written = source_config(log["source"], foot["track"])
    except (ValueError, KeyError, TypeError, AttributeError, SyntaxError) as error:
        raise ValueError(f"{where}: cannot read the Config in its source: {error!r}") from None
    given = [word for word in settings["argv"] if not re.match(f"--({'|'.join(FREE_OVERRIDES)})=", word)]
    given += sorted(set(settings["overrides"]) - set(FREE_OVERRIDES))
    need(not given, where, f"a record runs with no override but {', '.join(FREE_OVERRIDES)}: {', '.join(given)}")
    for key in sorted((written.keys() | config.keys()) - {"seed", "precision"}):
        need(written.get(key) == config.get(key), where,
             f"it ran with {key} {config.get(key)}, and its source says {written.get(key)}")
    for key, value in track.get("eval_config", {}).items():
        need(fields.get(key) == value, where, f"its {key} is {fields.get(key)}, and the track's evaluation has {value}")
    need(not fields.get("load") and not fields.get("resume"), where,
         "it starts from a checkpoint, and a record trains from the beginning")
    for key, said in dict(seed=config, target=config, track=config, hardware=settings, precision=settings).items():
        need(foot.get(key) == said.get(key), where,
             f"its footer has {key} {foot.get(key)}, and its settings {said.get(key)}")

def check_steps(log):
    """It ran to the end, and its times are of one piece."""
    where, foot, config = log["path"], log["footer"], read_settings(log)["config"]
    N, every = config.get("num_steps"), config.get("eval_every")
    need(foot["steps"] == N and foot["steps"] > 0, where, f"early exit: it made {foot['steps']} of num_steps {N}")
    if every:
        need([step for step, _, _ in log["steps"]] == [*range(every, N, every), N], where,
             f"its step lines are not at every {every} steps and the last")
    times = [seconds for _, seconds, _ in log["steps"]]
    need(all(a < b for a, b in itertools.pairwise([0, *times])), where, "its train times do not rise")
    for (step, seconds, _), average in zip(log["steps"], log["averages"]):
        need(abs(1000 * seconds / max(1, step) - average) < 0.006 + 1 / max(1, step), where,
             f"train_time and step_avg disagree at step {step}")
    rate, slack = foot["tokens"] / foot["train_seconds"], 0.001 / foot["train_seconds"]
    need(abs(foot["tokens_per_second"] - rate) < 1 + slack * rate, where,
         "train_seconds and tokens_per_second disagree")

def check_losses(log):
    """Its loss is what it says of it: val_loss the mean of val_loss_a and val_loss_b, and this of val_loss_a_c .."""
    where, foot = log["path"], log["footer"]
    need(foot["reached"] == (foot["val_loss"] <= foot["target"]), where, "val_loss and reached disagree")
    keys = [key for key in foot if key.startswith("val_loss")]
    for whole in keys:
        below = [key for key in keys if key.startswith(f"{whole}_")]
        parts = [foot[key] for key in below if not any(key.startswith(f"{other}_") for other in below)]
        need(not parts or abs(np.mean(parts) - foot[whole]) < 2e-4, where, f"{whole} is not the mean of its parts")

def check_log(log, track, root=ROOT):
    """What a trial must be besides read_logs' checks."""
    missing = [key for key in RECORD_KEYS if key not in log["footer"]]
    need(not missing, log["path"], f"a record's footer needs {', '.join(missing)}")
    need(re.search(DEVICES.get(track["device"], track["device"]), machine(log["footer"])), log["path"],
         f"it ran on {machine(log['footer'])}, and the track's device is {track['device']}")
    check_settings(log, track)
    check_steps(log)
    check_losses(log)
    check_blocks(log, track, root)

# -----------------------------------------------------------------------------
# Statistics

def p_value(losses, target):
    """One-sided one-sample t-test: how likely are losses this low if their true mean is the target? nan for one."""
    if len(losses) < 2 or not np.all(np.isfinite(losses)):
        return math.nan
    if np.std(losses) == 0:
        return 0.5 * (1 - float(np.sign(target - losses[0])))
    return float(stats.ttest_1samp(losses, target, alternative="less").pvalue)

def p_faster(times, rival):
    """One-sided Welch's t-test: how likely are times this much below the rival's if the true means are equal?

    Welch's and not Mann-Whitney's: times of a fixed number of steps are close to normal, spreads differ with the
    length of a run, and ranks of five against five cannot say less than 0.004 however far apart they are.
    """
    if min(len(times), len(rival)) < 2:
        return math.nan
    if np.ptp(times) == np.ptp(rival) == 0:
        return 0.5 * (1 - float(np.sign(rival[0] - times[0])))
    return float(stats.ttest_ind(times, rival, equal_var=False, alternative="less").pvalue)

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
    return float(np.mean(d)), half_interval(np.std(d, ddof=1), len(d)) if len(d) > 1 else math.nan

def half_interval(spread, n):
    """Half of the 95 % interval of a mean of n values with this standard deviation."""
    return float(spread / n ** 0.5 * stats.t.ppf(0.975, n - 1))

def seeds_needed(gaps, width, most=1000):
    """How many pairs make half of the interval of `gaps`' mean at most `width`, at this spread; 0: more than `most`."""
    spread = np.std(gaps, ddof=1)
    return next((n for n in range(len(gaps), most + 1) if half_interval(spread, n) <= width), 0)

# -----------------------------------------------------------------------------
# Tracks and records

def seconds_of(logs):
    return [log["footer"]["train_seconds"] for log in logs]

def mean_seconds(logs):
    return float(np.mean(seconds_of(logs)))

def size(log):
    """Numbers that a model keeps, learned or not."""
    return log["footer"]["parameters"] + log["footer"].get("buffers", 0)

def evaluation_seconds(logs):
    """Of one evaluation, mean over all."""
    return sum(log["footer"]["eval_seconds"] for log in logs) / sum(len(log["steps"]) for log in logs)

def quality(logs, key):
    """Mean over the trials of a number in their footers; nan if one has none."""
    values = [log["footer"].get(key) for log in logs]
    return float(np.mean(values)) if all(type(value) in (int, float) for value in values) else math.nan

def missed(logs, track):
    """The floors that the trials' means do not hold, as sentences; nan holds none."""
    for key, (sign, bound) in track["floors"].items():
        if not COMPARE[sign](quality(logs, key), bound):
            yield f"its {key} of {quality(logs, key):.4f} misses the floor {sign} {bound}"

def shortfalls(logs, track):
    """What keeps trials from having reached the track's target, as sentences."""
    losses = [log["footer"]["val_loss"] for log in logs]
    p = p_value(losses, track["target"])
    if not p < ALPHA:
        yield (f"its mean loss of {np.mean(losses):.4f} is not below the target {track['target']} at p < {ALPHA}: "
               f"p = {p:.2g}")
    yield from missed(logs, track)

def describe_baseline(recipe, logs, track):
    """What track.json says of record #1, from its logs."""
    loss = float(np.mean([log["footer"]["val_loss"] for log in logs]))
    return {"recipe": recipe, "reached": len(logs) >= MIN_TRIALS and not any(shortfalls(logs, track)),
            "seconds": round(mean_seconds(logs), 3), "loss": round(loss, 4),
            "parameters_and_buffers": max(map(size, logs)), "eval_seconds": round(evaluation_seconds(logs), 4)}

def read_record(path, track):
    """A record's folder -> {"path", "date", "title", "logs", "seconds", "losses", ...}."""
    need(re.fullmatch(r"\d{4}-\d\d-\d\d_[A-Z]\w*", path.name), path,
         "a record's folder is named YYYY-MM-DD_CamelCase")
    title = (path / "README.md").read_text(encoding="utf-8").strip().partition("\n")[0].strip("# ")
    logs = read_logs(path.glob("*.log"), track)
    need(logs, path, "it has no <seed>.log")
    return dict(path=path, date=path.name[:10], title=title, logs=logs, seconds=mean_seconds(logs),
                hardware=machine(logs[0]["footer"]), losses=[log["footer"]["val_loss"] for log in logs],
                lines=len(logs[0]["source"].strip().split("\n")))

def read_track_file(path):
    """track.json as a dict. ValueError for what it lacks."""
    track = json.loads(path.read_text(encoding="utf-8"))
    missing = [key for key in TRACK_KEYS if key not in track]
    missing += [f"baseline {key}" for key in BASELINE_KEYS if key not in track.get("baseline", {})]
    need(not missing, path, f"it lacks {', '.join(missing)}")
    need(all(sign in COMPARE for sign, _ in track["floors"].values()), path,
         f"its floors are like [\">=\", 0.9], with one of {' '.join(COMPARE)}")
    return track

def read_track(folder, candidate=None):
    """records/<task>-<track> -> (track.json as a dict, its records as dicts: by date, on one date the slower first, and
    last a candidate that is to become one).

    A record's rival/ holds logs of the record before it, run again in turn with its own; without it the filed logs of
    the record before are the rival. The speed-up is each record's gain on its rival, multiplied up; "more" if the
    baseline did not reach the target, so that it would be larger.
    """
    track = read_track_file(folder / "track.json")
    paths = [path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."]
    records = sorted((read_record(path, track) for path in paths), key=lambda r: (r["date"], -r["seconds"], r["path"]))
    records += [read_record(candidate, track)] if candidate else []
    for i, r in enumerate(records):
        before = records[max(i - 1, 0)]
        r["number"], r["more"] = i + 1, i > 0 and not track["baseline"]["reached"]
        r["rerun"] = read_logs((r["path"] / "rival").glob("*.log"), track, before["logs"][0]["source"],
                               f"record #{i}'s script")
        r["rival"] = r["rerun"] or before["logs"]
        r["speedup"] = before["speedup"] * mean_seconds(r["rival"]) / r["seconds"] if i > 0 else 1.0
        r["p"] = p_value(r["losses"], track["target"])
        r["p_time"] = p_faster(seconds_of(r["logs"]), seconds_of(r["rival"])) if i > 0 else math.nan
    return track, records

def check_files(record, records):
    """A record's folder has what it should, and no log is a copy of another."""
    logs, where = record["logs"], record["path"]
    known = {"README.md", "rival", logs[0]["footer"]["script"]} | {log["path"].name for log in logs}
    strange = {path.name for path in where.iterdir()} - known - {"__pycache__"}  # who imports an archived script leaves it
    need(not strange, where, f"{', '.join(sorted(strange))} is no part of a record")
    trials = [log for r in records[:record["number"]] for log in r["logs"] + r["rerun"]]
    for a, b in itertools.combinations(trials, 2):
        need(a["steps"] != b["steps"], where, f"{b['path'].name} has the losses and times of {a['path']}: a copy")
    need(re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])", record["date"]), where, "there is no such date")
    need(record["title"], where, "its README.md needs a title in the first line")

def check_seeds(logs, where):
    seeds = [log["footer"]["seed"] for log in logs]
    need(seeds == [*range(len(seeds))], where,
         f"the seeds of its trials are {', '.join(map(str, seeds))}, and they have to be 0 to {len(seeds) - 1}")

def check_baseline(record, track):
    """Record #1: up to two hours, and track.json says of it what its logs do."""
    where, logs = record["path"], record["logs"]
    need(record["seconds"] <= BASELINE_SECONDS, where,
         f"{record['seconds']:.0f} s is more than the {BASELINE_SECONDS} that a baseline may train")
    told = describe_baseline(track["baseline"].get("recipe"), logs, track)
    for key in told:
        need(track["baseline"].get(key) == told[key], where,
             f"track.json has {key} {track['baseline'].get(key)} of the baseline, and its logs {told[key]}")
    below = np.mean(record["losses"]) <= track["target"] and not any(missed(logs, track))
    need(len(logs) >= MIN_TRIALS or not below, where,
         f"it seems to reach the target: showing that takes {MIN_TRIALS} trials, and it has {len(logs)}")

def check_alternation(record):
    """Its trials and its rival's took turns on one machine, one at a time: the start times say so."""
    where, runs = record["path"], []
    for whose, logs in (0, record["logs"]), (1, record["rival"]):
        for foot in (log["footer"] for log in logs):
            runs.append((foot["start_time"], foot["start_time"] + foot["train_seconds"] + foot["eval_seconds"], whose))
    runs.sort()
    turns = [{a[2], b[2]} for a, b in zip(runs[::2], runs[1::2])]
    need(len(runs) % 2 == 0 and all(turn == {0, 1} for turn in turns), where,
         f"its trials and those of record #{record['number'] - 1} did not take turns, as their start times have it: "
         "submit.py --against runs both")
    need(all(a[1] <= b[0] for a, b in itertools.pairwise(runs)), where,
         "some of its trials and its rival's ran at the same time, as their start times have it")

def check_faster(record, track):
    """It is faster than the record before, run in turn with it; a baseline that never arrived need not run again."""
    where, logs, rival = record["path"], record["logs"], record["rival"]
    number = record["number"] - 1
    mine, other = ((machine(one[0]["footer"]), one[0]["footer"]["precision"]) for one in (logs, rival))
    need(mine == other, where, f"it ran on {' in '.join(mine)}, and record #{number} on {' in '.join(other)}: that has "
         "to be run again beside it, submit.py --against does so")
    if number == 1 and not track["baseline"]["reached"] and not record["rerun"]:
        need(max(seconds_of(logs)) < min(seconds_of(rival)), where, f"a trial took {max(seconds_of(logs)):.3f} s, no "
             f"less than the {min(seconds_of(rival)):.3f} s in which the baseline did not reach the target")
        return
    check_alternation(record)
    check_seeds(rival, where)
    need(len(rival) >= MIN_TRIALS, where, f"its rival needs at least {MIN_TRIALS} trials, and it has {len(rival)}")
    need(record["p_time"] < ALPHA, where, f"{record['seconds']:.3f} s is not faster than record #{number}, "
         f"{mean_seconds(rival):.3f} s, at p < {ALPHA}: p = {record['p_time']:.2g}")

def check_record(record, records, track, root=ROOT):
    """All rules for one of read_track's records."""
    where, logs, number = record["path"], record["logs"], record["number"]
    for log in logs + record["rerun"]:
        check_log(log, track, root)
        need(log["path"].name == f"{log['footer']['seed']}.log", log["path"], "it should be named after its seed")
    check_files(record, records)
    check_seeds(logs, where)
    if number == 1:
        check_baseline(record, track)
        return
    need(len(logs) >= MIN_TRIALS, where, f"a record needs at least {MIN_TRIALS} trials, and it has {len(logs)}")
    for what in shortfalls(logs, track):
        need(False, where, what)
    allowed, largest = MAX_GROWTH * track["baseline"]["parameters_and_buffers"], max(map(size, logs))
    need(largest <= allowed, where, f"it has {largest} parameters and buffers, more than {MAX_GROWTH} times the "
         f"baseline's {allowed // MAX_GROWTH}")
    slowest, usual = evaluation_seconds(logs), track["baseline"]["eval_seconds"]
    need(slowest <= MAX_EVALUATION * usual, where, f"its evaluation takes {slowest:.3f} s, more than "
         f"{MAX_EVALUATION} times the baseline's {usual:.3f}")
    check_faster(record, track)
