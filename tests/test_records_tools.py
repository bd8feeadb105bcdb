"""records/submit.py, compare.py and verify.py on made-up training scripts; verify.py on this repository's records."""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import compare
import leaderboard
import rules
import submit
import verify

# A training script that trains nothing: losses and times follow from its Config and seed, the log is as real ones are.
# All runs in a tree share a clock, so that start times are as if one run had followed the other; runs get slower by
# DRIFT a second, so that none is like another, and differ by up to 97 times NOISE.
SCRIPT = '''"""A script for tests.

It trains nothing.
"""
import copy, dataclasses, hashlib, json, os, sys, time
from dataclasses import dataclass
from pathlib import Path

@dataclass
class Config:
    track: str = "cpu"
    seed: int = 0
    frozen: str = "data/frozen/val.npz"
    layers: tuple = (1, 2)
    num_steps: int = 2 * 20
    eval_every: int = 15
    eval_tokens: int = 1000
    parameters: int = 1000
    final: float = 1.0  # loss at the end
    pace: float = 0.5  # seconds per step
    f1: float = 0.95  # of quality
    target: float = 1.02
    load: str = ""

CONFIGS = {"cpu": Config(), "gpu": Config(track="gpu", num_steps=400)}
# --- copied: run ---
HERE = Path(__file__).resolve()
ROOT = next(folder for folder in HERE.parents if (folder / "data" / "frozen").exists())
class Clock:
    path = (ROOT / "data").resolve().parent / "clock"
    def read(self):
        return float(self.path.exists() and self.path.read_text() or 1e9)
# --- end: run ---
# --- frozen: eval ---
EVAL_BATCH = 10
def evaluate():
    return 1
# --- end: eval ---
config = copy.copy(CONFIGS["cpu"])
overrides = dict(word.lstrip("-").split("=") for word in sys.argv[1:] if "--track" not in word)
config = dataclasses.replace(config, **{key: type(getattr(config, key))(value) for key, value in overrides.items()})
if config.final > 9:
    sys.exit("test.py: the loss is no number")
code = HERE.read_text().partition("# --- " "frozen:")[2].partition("# --- " "end:")[0]
(ROOT / "logs").mkdir(exist_ok=True)
start_time = Clock().read() + 5
machine, drag = os.environ.get("MACHINE", "2 cores of Some CPU"), float(os.environ.get("DRAG", 1))
drag *= 1 + (start_time - 1e9) * float(os.environ.get("DRIFT", 1e-6))
drag *= 1 + int(start_time) * 37 % 97 * float(os.environ.get("NOISE", 0))
file = open(ROOT / "logs" / f"{time.time_ns()}.txt", "x")
settings = {"config": dataclasses.asdict(config), "argv": sys.argv[1:], "overrides": overrides, "torch": "2.13.0",
            "hardware": machine, "precision": "bf16", "gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}
print(f"{HERE.read_text()}\\n{'=' * 100}\\n{json.dumps(settings, indent=1)}\\n{'=' * 100}", file=file)
N, noise = config.num_steps, (config.seed * 7 + config.parameters) % 11 / 1000
for step in [*range(config.eval_every, N, config.eval_every), N]:
    loss, seconds = config.final + noise + 0.03 * (N - step), round(step * config.pace * drag * (1 + noise), 3)
    print(f"step:{step}/{N} val_loss:{loss:.4f} train_time:{1000 * seconds:.0f}ms "
          f"step_avg:{1000 * seconds / step:.2f}ms", file=file)
digest = hashlib.sha256(code.encode() + (ROOT / config.frozen).read_bytes()).hexdigest()
footer = dict(script=HERE.name, task="toy", track="cpu", seed=config.seed, world_size=1, hardware=machine,
              precision="bf16", steps=N, parameters=config.parameters, buffers=24, tokens=100 * N,
              val_loss=round(loss, 5), target=config.target, reached=loss <= config.target, train_seconds=seconds,
              start_time=start_time, eval_seconds=0.3, compile_seconds=0.1,
              tokens_per_second=round(100 * N / seconds), mfu=0.1, peak_memory_mib=10, data_sha256="ab12",
              eval_sha256=digest, val_loss_rgb=round(loss + 0.5, 4), val_loss_desc=round(loss - 0.5, 4),
              quality_f1=config.f1 - noise,
              overrides=" ".join(f"--{key}={value}" for key, value in overrides.items()) or "none")
print("\\n".join(f"{key}: {value}" for key, value in footer.items()), file=file)
Clock.path.write_text(str(start_time + seconds + 5))
# --- copied: start ---
if __name__ == "__main__":
    print("done")
# --- end: start ---
'''
FAST = SCRIPT.replace("pace: float = 0.5", "pace: float = 0.25").replace("final: float = 1.0 ", "final: float = 0.99 ")
FASTER = FAST.replace("0.25", "0.2")
LATE = SCRIPT.replace("final: float = 1.0 ", "final: float = 1.5 ")  # never reaches the target
NOTE = ["--note", "A shorter step\n\nIt is half as long."]
BASELINE = ["--baseline", "a slow recipe", "--data", "toys", "--floor", "quality_f1>=0.9", "--name", "Baseline",
            "--note", "The baseline"]


def make_logs(root, script, seeds=range(5), *overrides, name="train_toy.py"):
    """Logs of a script's runs, as compare.py leaves them."""
    entry = compare.Entry("A", name, script, list(overrides))
    (root / "logs").mkdir(exist_ok=True)
    return [str(compare.run_trial(entry, seed, root / "logs", root=root)["path"]) for seed in seeds]


def take_turns(root, *scripts, seeds=range(5)):
    """The logs of scripts run in turn, a list for each; none is taken from an earlier race."""
    for path in root.glob("logs/*.log"):
        path.unlink()
    rounds = [[make_logs(root, script, [seed])[0] for script in scripts] for seed in seeds]
    return [list(logs) for logs in zip(*rounds)]


def accept(argv, root):
    """submit.py has to file it."""
    with pytest.raises(SystemExit) as done:
        submit.main(argv, root)
    assert done.value.code == 0, done.value.code


def make_tree(root, baseline):
    """A repository with a track, its baseline and a record: the first record's logs took turns with the baseline's."""
    (root / "data/frozen").mkdir(parents=True)
    (root / "records").mkdir()
    (root / "data/frozen/val.npz").write_bytes(b"validation")
    (root / "train_toy.py").write_text(SCRIPT)
    (root / "README.md").write_text(f"# Toy\n\n[records](records/README.md#toy-cpu)\n\n{leaderboard.START}\n"
                                    f"{leaderboard.END}\n")
    slow, fast = take_turns(root, baseline, FAST)
    accept([*(slow if baseline == SCRIPT else slow[:2]), *BASELINE], root)
    accept([*fast, "--name", "Shorter", *NOTE], root)
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("tree"), SCRIPT)


@pytest.fixture
def root(tree, tmp_path):
    return Path(shutil.copytree(tree, tmp_path / "root"))


@pytest.fixture(scope="module")
def late(tmp_path_factory):
    """A tree whose baseline did not reach the target."""
    return make_tree(tmp_path_factory.mktemp("late"), LATE)


def record_of(root, name="Shorter"):
    folder, = (root / "records/toy-cpu").glob(f"*_{name}")
    return folder


def faults(root):
    return verify.verify(root, say=lambda line: None)


def refusal(main, argv, root):
    """The sentence that a tool stops with."""
    with pytest.raises(SystemExit) as done:
        main(argv, root)
    assert isinstance(done.value.code, str) and "\n" not in done.value.code, done.value.code
    return done.value.code


# -----------------------------------------------------------------------------
# verify.py

def test_scripts_of_the_repository_may_race():
    """When their stop-watch changes, tracks that are open have its new hash as well."""
    root = leaderboard.ROOT
    for path in (root / "records").glob("*/track.json"):
        track = json.loads(path.read_text())
        for script in (root / f"train_{track['task']}.py", *(root / "baselines").glob(f"train_{track['task']}_*.py")):
            for key, names in ("run_sha256", rules.STOP_WATCH), ("frozen_sha256", rules.FROZEN):
                assert rules.block_sha256(script.read_text(), names) in track[key], (path, script.name, key)


def test_committed_records():
    assert faults(leaderboard.ROOT) == []


def test_good_tree(root, capsys):
    (record_of(root) / "__pycache__").mkdir()  # as whoever imports an archived script leaves it
    assert verify.verify(root) == []
    said = capsys.readouterr().out
    assert re.search(r"toy-cpu #1 The baseline: loss 1.0064 ± 0.0032 \(5\), p 0.00035, 20.1 s, 1.00x", said)
    assert re.search(r"toy-cpu #2 A shorter step: loss 0.9964 ± 0.0032 \(5\), p 4e-05, 10.1 s, 2.00x", said)
    text = (record_of(root) / "README.md").read_text()
    assert text.startswith("# A shorter step\n\nIt is half as long.\n\nThe trials:\n\n| seed |")
    rows = [line for line in text.splitlines() if re.match(r"\| \d", line)]
    assert len(rows) == 5 and rows[0].startswith("| 0 | 1.00000 | 10.1")


def edit(pattern, new, count=0):
    """A change to a log's text below its source."""
    def change(text):
        if (start := text.rfind(rules.RULE + "\n{")) < 0:
            return text  # a script
        changed = re.sub(pattern, new, text[start:], count=count, flags=re.M)
        assert changed != text[start:], pattern
        return text[:start] + changed
    return change


def both(old, new):
    """A change to a log and to the script, wherever it is."""
    return lambda text: text.replace(old, new)


def footer(**values):
    """Other values in a log's footer."""
    return [edit(rf"^{key}: .*", f"{key}: {value}") for key, value in values.items()]


def doctor(root, which, changes):
    """Change one log of the record, all and its script, or the baseline's."""
    folder = record_of(root, "Baseline" if which == "baseline" else "Shorter")
    paths = [folder / "1.log"] if which == "one" else [*folder.glob("*.log"), folder / "train_toy.py"]
    for path in paths:
        text = path.read_text()
        for change in changes:
            text = change(text)
        path.write_text(text)


ONE = {  # a log that contradicts itself, its script, its track or the other trials
    "loss in the footer": (footer(val_loss=0.9), "disagree on val_loss"),
    "loss in the footer, a little": ([edit(r"^val_loss: 0.996", "val_loss: 0.9958")], "disagree on val_loss"),
    "loss in the last step line": ([edit(r"(step:40/40 val_loss:)\S+", r"\g<1>0.9")], "disagree on val_loss"),
    "loss in both": ([*footer(val_loss=0.9), edit(r"(step:40/40 val_loss:)\S+", r"\g<1>0.9")],
                     "val_loss is not the mean of its parts"),
    "loss of a half": ([edit(r"^val_loss_rgb: (.*)", r"val_loss_rgb: \1\nval_loss_rgb_a: 1.0\nval_loss_rgb_b: 1.1")],
                       "val_loss_rgb is not the mean of its parts"),
    "footer with two losses": ([edit(r"^val_loss: ", "val_loss: 0.9\nval_loss: ")], "its footer has val_loss twice"),
    "time in the footer": (footer(train_seconds=5.0), "disagree on val_loss or train_seconds"),
    "time in both": ([*footer(train_seconds=9.0), edit(r"(step:40/40.*train_time:)\d+", r"\g<1>9000")],
                     "step_avg disagree at step 40"),
    "time and average": ([*footer(train_seconds=9.0),
                          edit(r"(step:40/40.*train_time:).*", r"\g<1>9000ms step_avg:225.00ms")],
                         "tokens_per_second disagree"),
    "target": (footer(target=1.2), "its target is 1.2, and the track's is 1.02"),
    "target in the settings": ([edit(r'"target": 1.02', '"target": 1.2')], "with target 1.2, and its source says 1.02"),
    "reached": (footer(reached=False), "val_loss and reached disagree"),
    "other data": (footer(data_sha256="ffff"), "data_sha256 is ffff"),
    "other evaluation": (footer(eval_sha256="ffff"), "eval_sha256 is ffff"),
    "less evaluated": ([edit(r'"eval_tokens": 1000', '"eval_tokens": 10')], "eval_tokens 10, and its source says 1000"),
    "early exit": ([edit(r"^step:40/40.*\n", ""), *footer(steps=30)], "do not end at 30"),
    "early exit, mended": ([*footer(val_loss="1.2960", train_seconds=7.545, steps=30), edit(r"^step:40/40.*\n", ""),
                            edit(r"^step:30/40.*", "step:30/30 val_loss:1.2960 train_time:7545ms step_avg:251.5ms"),
                            edit(r"^(step:\d+)/40", r"\1/30")], "early exit: it made 30 of num_steps 40"),
    "a step line less": ([edit(r"^step:30/40.*\n", "")], "not at every 15 steps"),
    "seed missing": ([edit(r"^seed: .*\n", "")], "its footer lacks seed"),
    "seed twice": (footer(seed=2), "another log has the same seed, 2"),
    "seed of the footer alone": (footer(seed=7), "footer has seed 7, and its settings 1"),
    "source": ([both("    return 1", "    return 2")], "source is not that of the record's"),
    "override": (footer(overrides="--seed=1 --pace=0.1"), "no override but seed, track, precision"),
    "override in the settings": ([edit(r'"--seed=1"\n', '"--seed=1", "--pace=0.1"\n')], "no override but seed"),
    "override unsaid": ([edit(r'"pace": 0.25', '"pace": 0.1')], "it ran with pace 0.1, and its source says 0.25"),
    "hardware": (footer(hardware="2 cores of Other CPU"), "one kind of hardware"),
    "world size": (footer(world_size=2), "with one number of processes"),
    "precision": (footer(precision="fp32"), "its trials must be of one precision"),
    "from a checkpoint": ([edit(r'^ "argv"', ' "options": {"load": "a.safetensors"},\n "argv"')],
                          "starts from a checkpoint"),
    "no number": (footer(val_loss="low"), "its val_loss is no number: low"),
    "no number for a part": (footer(val_loss_rgb="low"), "its val_loss_rgb is no number: low"),
    "no start time": ([edit(r"^start_time: .*\n", "")], "a record's footer needs start_time"),
    "script elsewhere": (footer(script="../train_toy.py"), "its script is no file name"),
    "settings": ([edit(r'"argv"', '"arguments"')], "its settings are not JSON with config, argv"),
    "truncated": ([lambda text: text[:-200]], "truncated log"),
    "hardware in the settings": ([edit('"hardware": ".*"', '"hardware": "2 cores of Other CPU"')],
                                 "its footer has hardware 2 cores of Some CPU, and its settings 2 cores of Other CPU"),
    "times that fall": ([edit(r"(step:15/40.*train_time:).*", r"\g<1>30000ms step_avg:2000.00ms")],
                        "its train times do not rise"),
    "turns": (footer(start_time=5e9), "did not take turns, as their start times have it"),
    "at the same time": ([edit(r"^start_time: (.*)", lambda m: f"start_time: {float(m[1]) - 10.5}")],
                         "ran at the same time"),
}


OTHER = "2 cores of Other CPU"
ALL = {  # all logs and the script tell the same story, and it breaks a rule
    "frozen block": ([both("    return 1", "    return 2")], "its block frozen: eval is not the repository's"),
    "stop-watch": ([both("or 1e9", "or 2e9")], "its block copied: run and copied: start is not the repository's"),
    "start": ([both('print("done")', 'print("over")')], "its block copied: run and copied: start is not"),
    "no stop-watch": ([both("# --- copied: run ---\n", "")], "its source needs one block marked copied: run"),
    "two evaluations": ([both("config = copy", "# --- frozen: eval ---\n# --- end: eval ---\nconfig = copy")],
                        "its source needs one block marked frozen: eval"),
    "another evaluate": ([both("\nconfig = copy", "\ndef evaluate():\n    return 0\nconfig = copy")],
                         "its source redefines evaluate"),
    "another clock": ([both("\nconfig = copy", "\nClock.read = None\nconfig = copy")], "its source redefines Clock"),
    "star import": ([both("import copy, ", "from tricks import *\nimport copy, ")], "its source redefines *"),
    "another batch": ([both("\nconfig = copy", "\nEVAL_BATCH = 1\nconfig = copy")], "its source redefines EVAL_BATCH"),
    "imported evaluate": ([both("import copy, ", "from math import exp as evaluate\nimport copy, ")],
                          "its source redefines evaluate"),
    "evaluation in a string": ([both("# --- frozen: eval ---\n", 'UNUSED = """\n# --- frozen: eval ---\n'),
                                both("# --- end: eval ---\n", '# --- end: eval ---\n"""\ndef evaluate():\n    return 0\n')],
                               "its block frozen: eval is a part of something else"),
    "parameter": ([both("\nconfig = copy", "\ndef main(evaluate=len):\n    return evaluate()\nconfig = copy")],
                  "its source redefines evaluate"),
    "part of a part": ([both("\nconfig = copy", "\nClock.read.own[0] = 1\nconfig = copy")], "its source redefines Clock"),
    "globals": ([both("\nconfig = copy", "\nglobals()['evaluate'] = len\nconfig = copy")],
                "its source redefines * outside the block it belongs to; * is any name, by import * or one of globals,"),
    "setattr": ([both("\nconfig = copy", "\nsetattr(Clock, 'read', len)\nconfig = copy")], "its source redefines *"),
    "checkpoint": ([both('load: str = ""', 'load: str = "a"'), both('"load": ""', '"load": "a"')],
                   "starts from a checkpoint"),
    "evaluated": ([both("eval_tokens: int = 1000", "eval_tokens: int = 9"),
                   edit('"eval_tokens": 1000', '"eval_tokens": 9')],
                  "its eval_tokens is 9, and the track's evaluation has 1000"),
    "steps": ([edit('"num_steps": 40', '"num_steps": 50')], "it ran with num_steps 50, and its source says 40"),
    "parameters": (footer(parameters=4100), "4124 parameters and buffers, more than 4 times the baseline's 1024"),
    "buffers": (footer(buffers=4000), "5000 parameters and buffers, more than 4 times"),
    "evaluation": (footer(eval_seconds=3.3), "its evaluation takes 1.100 s, more than 10 times the baseline's 0.100"),
    "floor": (footer(quality_f1=0.89), "its quality_f1 of 0.8900 misses the floor >= 0.9"),
    "no quality": ([edit(r"^quality_f1: .*\n", "")], "its quality_f1 of nan misses the floor"),
    "no number for quality": (footer(quality_f1="good"), "its quality_f1 of nan misses the floor"),
    "other hardware": ([*footer(hardware=OTHER), edit('"hardware": ".*"', f'"hardware": "{OTHER}"')],
                       "it ran on 1 x 2 cores of Other CPU in bf16, and record #1 on 1 x 2 cores of Some CPU in bf16"),
    "other precision": ([*footer(precision="fp32"), edit('"precision": ".*"', '"precision": "fp32"')],
                        "Some CPU in fp32, and record #1"),
    "other world size": (footer(world_size=2), "it ran on 2 x 2 cores of Some CPU in bf16"),
    "other device": ([*footer(hardware="NVIDIA H100"), edit('"hardware": ".*"', '"hardware": "NVIDIA H100"')],
                     "it ran on 1 x NVIDIA H100, and the track's device is cpu"),
}


@pytest.mark.parametrize("logs, case", [*(("one", case) for case in ONE), *(("all", case) for case in ALL)])
def test_doctored_logs(root, logs, case):
    changes, message = {"one": ONE, "all": ALL}[logs][case]
    doctor(root, logs, changes)
    assert any(message in fault for fault in faults(root)), faults(root)


def test_frozen_files_are_those_of_the_logs(root):
    (root / "data/frozen/val.npz").write_bytes(b"easier")
    assert any("its eval_sha256 is not that of its source and frozen files" in fault for fault in faults(root))


BASE = {
    "parameters": (footer(parameters=2000), "track.json has parameters_and_buffers 1024 of the baseline"),
    "quality": (footer(quality_f1=0.5), "track.json has reached True of the baseline, and its logs False"),
    "slow evaluation": (footer(eval_seconds=3.0), "track.json has eval_seconds 0.1 of the baseline, and its logs 1.0"),
}


@pytest.mark.parametrize("case", BASE)
def test_doctored_baseline(root, case):
    changes, message = BASE[case]
    doctor(root, "baseline", changes)
    assert any(message in fault for fault in faults(root)), faults(root)


def test_weights_may_be_saved(root):
    """That is done once all is measured; to save states on the way is not."""
    doctor(root, "all", [edit(r'("--seed=\d"\n)', r'"--save=true", \1'), edit(r"^overrides: ", "overrides: --save=true ")])
    assert faults(root) == []
    doctor(root, "all", [edit("--save=true", "--save_every=9")])
    assert any("no override but seed, track, precision, save: --save_every=9" in fault for fault in faults(root)), faults(root)


def test_seeds(root):
    """Trials are those of seeds 0 to n - 1: none may be left out."""
    folder = record_of(root)
    text = edit(r'(^seed: |"seed": "?|--seed=)4', r"\g<1>7")((folder / "4.log").read_text())
    (folder / "4.log").unlink()
    (folder / "7.log").write_text(text)
    assert any("are 0, 1, 2, 3, 7, and they have to be 0 to 4" in fault for fault in faults(root))
    (folder / "7.log").unlink()
    assert any("needs at least 5 trials, and it has 4" in fault for fault in faults(root))


def test_copied_log(root):
    """A second trial that is the first one's log with another seed written into it."""
    folder = record_of(root)
    text = edit(r'(^seed: |"seed": "?|--seed=)0', r"\g<1>1")((folder / "0.log").read_text())
    (folder / "1.log").write_text(text)
    assert any("1.log has the losses and times of" in fault for fault in faults(root))


def test_names_links_tables_and_plots(root):
    folder = record_of(root)
    (folder / "4.log").rename(folder / "9.log")
    assert any("9.log: it should be named after its seed" in fault for fault in faults(root))
    (folder / "9.log").rename(folder / "4.log")
    (folder / "notes").mkdir()
    assert any("notes is no part of a record" in fault for fault in faults(root))
    (folder / "notes").rmdir()
    text = (folder / "README.md").read_text()
    (folder / "README.md").write_text(text.replace("| 10.1", "| 9.1") + "[x](nowhere.md)")
    found = " ".join(faults(root))
    assert "table of trials is not what the logs say" in found and "link nowhere.md leads nowhere" in found
    (folder / "README.md").write_text(text)
    path = root / "records/README.md"
    path.write_text(path.read_text().replace("## toy-cpu", "## toys"))
    (root / "records/toy-cpu/loss.png").unlink()
    found = " ".join(faults(root))
    assert "README.md has no heading for its link records/README.md#toy-cpu" in found
    assert found.count("is not what the logs say") == 2 and "loss.png leads nowhere" in found
    leaderboard.main([], root)
    assert faults(root) == []


def test_docstring_is_held_against_the_log(root, capsys):
    script = root / "train_toy.py"
    line = script.read_text().split("\n")[2]
    assert re.fullmatch(r"Record: toy-cpu, val_loss <= 1.02, quality_f1 >= 0.9 in 10.1 s on 1 x 2 cores of Some CPU, "
                        r"torch 2.13.0 \(n=5\)\.", line), line
    script.write_text(script.read_text().replace(" in 10.1 s", " in 9.1 s"))
    assert leaderboard.main(["--check"], root) == 1
    assert "train_toy.py is not what the logs say" in capsys.readouterr().err
    assert leaderboard.main([], root) == 0 and script.read_text().split("\n")[2] == line
    shutil.rmtree(root / "records/toy-cpu")
    leaderboard.main([], root)
    assert script.read_text() == SCRIPT


# -----------------------------------------------------------------------------
# A baseline that did not reach the target

def test_baseline_not_reached(late, tmp_path, capsys):
    root = Path(shutil.copytree(late, tmp_path / "root"))
    assert faults(root) == []
    track = json.loads((root / "records/toy-cpu/track.json").read_text())
    assert track["baseline"] | {"seconds": 20} == {
        "recipe": "a slow recipe", "reached": False, "seconds": 20, "loss": 1.508, "parameters_and_buffers": 1024,
        "eval_seconds": 0.1}
    text = (root / "records/README.md").read_text()
    assert "a slow recipe; target not reached in 20 s (loss 1.508)" in text
    assert "| not reached in 20.2 | 1.00x |" in text
    assert re.search(r"\| 2 \| 10.1 \| > (1.99|2.00)x \|", text) and "A speed-up of > x is one over a baseline" in text
    assert re.search(r"\| > (1.99|2.00)x \|", (root / "README.md").read_text())
    tracks = leaderboard.read_tracks(root)
    (_, (first, second)), = leaderboard.plots(root, tracks)[root / "records/history.png"][1]
    assert not first[1] and second[1], "the plot says > x"
    new, old = take_turns(root, FASTER, FAST)
    accept([*new, "--rival", *old, "--name", "Faster", *NOTE], root)
    assert "> 2.5" in capsys.readouterr().out and faults(root) == [], "what follows is > x too"


def test_slower_than_a_baseline_that_was_not_reached(late, tmp_path):
    root = Path(shutil.copytree(late, tmp_path / "root"))
    shutil.rmtree(record_of(root))
    logs = make_logs(root, FAST.replace("0.25", "0.51"))
    said = refusal(submit.main, [*logs, "--name", "Slower", *NOTE], root)
    assert "no less than the 20." in said and "in which the baseline did not reach the target" in said


def test_a_baseline_that_runs_again_takes_turns(late, tmp_path):
    """Or one log of it from a busy machine would be what a record is compared with."""
    root = Path(shutil.copytree(late, tmp_path / "root"))
    shutil.rmtree(record_of(root))
    again, logs = make_logs(root, LATE, [5]), make_logs(root, FASTER)
    assert "did not take turns" in refusal(submit.main, [*logs, "--rival", *again, "--name", "Shorter", *NOTE], root)


def test_a_third_record_takes_turns_with_the_second(late, tmp_path):
    root = Path(shutil.copytree(late, tmp_path / "root"))
    logs = make_logs(root, FASTER)
    assert "did not take turns" in refusal(submit.main, [*logs, "--name", "Faster", *NOTE], root)


def test_claims_are_no_part_of_a_source():
    claims = ["Record: toy-cpu, val_loss <= 1.02,\n    quality_f1 >= 0.9 in 10.1 s.\n", "Record: toy-gpu in 1 s.\n"]
    text = leaderboard.with_claims(SCRIPT, claims)
    assert text.count("Record: ") == 2 and "quality_f1 >= 0.9 in" in text
    assert rules.without_claim(text) == rules.without_claim(SCRIPT) == SCRIPT.strip()
    assert leaderboard.with_claims(text, []) == SCRIPT


# -----------------------------------------------------------------------------
# submit.py --baseline

REFUSED_BASELINES = {
    "again": (SCRIPT, range(5), [], "this track is open already"),
    "too long": (SCRIPT.replace("pace: float = 0.5", "pace: float = 185.0"), range(5), [], "more than the 7200"),
    "few": (SCRIPT, range(4), [], "it seems to reach the target: showing that takes 5 trials, and it has 4"),
    "target": (SCRIPT.replace("target: float = 1.02", "target: float = 0.0"), range(5), [], "Config has no target"),
    "stop-watch": (SCRIPT.replace("or 1e9", "or 2e9"), range(5), [], "copied: start is not that of train_toy.py"),
    "evaluation": (SCRIPT.replace("return 1", "return 2"), range(5), [], "frozen: eval is not that of train_toy.py"),
    "seeds": (SCRIPT, (0, 2), [], "the seeds of its trials are 0, 2, and they have to be 0 to 1"),
    "floor": (SCRIPT, range(5), ["--floor", "quality_f1"], "a floor is like quality_desc_f1>=0.9"),
    "eval file": (SCRIPT, range(5), ["--eval-file", "README.md"], "is not that of its frozen block and README.md"),
    "device": (SCRIPT, range(5), ["--device", "H100"], "and the track's device is H100"),
    "override": (SCRIPT, range(5), [], "no override but seed"),
}


@pytest.mark.parametrize("case", REFUSED_BASELINES)
def test_submit_refuses_a_baseline(root, case):
    script, seeds, more, message = REFUSED_BASELINES[case]
    if case != "again":
        shutil.rmtree(root / "records/toy-cpu")
    logs = make_logs(root, script, seeds, *["--pace=0.4"] * (case == "override"))
    before = sorted(root.glob("records/**/*"))
    said = refusal(submit.main, [*logs, *BASELINE, *more], root)
    assert message in said and ".part" not in said, said
    assert sorted(root.glob("records/**/*")) == before


def test_opened_track(root):
    track = json.loads((root / "records/toy-cpu/track.json").read_text())
    assert track["run_sha256"] == [rules.block_sha256(SCRIPT, rules.STOP_WATCH)]
    assert track["frozen_sha256"] == [rules.block_sha256(SCRIPT, rules.FROZEN)]
    assert track["target"] == 1.02 and track["floors"] == {"quality_f1": [">=", 0.9]} and track["device"] == "cpu"
    assert track["eval_files"] == ["data/frozen/val.npz"] and track["data"] == "toys"
    assert track["eval_config"] == {"frozen": "data/frozen/val.npz", "eval_tokens": 1000}
    assert track["baseline"]["reached"] and track["baseline"]["parameters_and_buffers"] == 1024


# -----------------------------------------------------------------------------
# submit.py

REFUSED = {
    "few": (FASTER, range(4), [], "needs at least 5 trials, and it has 4"),
    "high": (FASTER.replace("final: float = 0.99", "final: float = 1.013"), range(5), [], "at p < 0.01: p = "),
    "large": (FASTER.replace("parameters: int = 1000", "parameters: int = 4103"), range(5), [], "more than 4 times"),
    "worse": (FASTER.replace("f1: float = 0.95", "f1: float = 0.9"), range(5), [], "misses the floor >= 0.9"),
    "override": (FASTER, range(5), ["--pace=0.1"], "no override but seed, track, precision"),
    "hardware": (FASTER.replace("Some CPU", "Other CPU"), range(5), [], "submit.py --against does so"),
    "device": (FASTER.replace("2 cores of Some CPU", "GPU"), range(5), [], "and the track's device is cpu"),
    "target": (FASTER.replace("target: float = 1.02", "target: float = 1.5"), range(5), [], "its target is 1.5"),
    "evaluation": (FASTER.replace("return 1", "return 0"), range(5), [], "its eval_sha256 is"),
    "clock": (FASTER.replace("or 1e9", "or 2e9"), range(5), [], "block copied: run and copied: start is not"),
    "track": (FASTER.replace('task="toy"', 'task="toys"'), range(5), [], "no track toys-cpu in records/: --baseline"),
    "exit": (FASTER.replace("N, noise =", "N, noise = 30,").replace("noise = 30, config.num_steps,", "noise = 30,"),
             range(5), [], "early exit: it made 30 of num_steps 40"),
    "turns": (FASTER, range(5), [], "its trials and those of record #2 did not take turns"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_submit_refuses(root, case):
    script, seeds, overrides, message = REFUSED[case]
    before = sorted(root.glob("records/**/*"))
    logs = make_logs(root, script, seeds, *overrides)
    said = refusal(submit.main, [*logs, "--name", "Faster", *NOTE], root)
    assert message in said and ".part" not in said, said
    assert sorted(root.glob("records/**/*")) == before


@pytest.mark.parametrize("pace", ("0.25", "0.2495", "0.3"))
def test_submit_refuses_what_is_not_faster(root, pace):
    new, old = take_turns(root, FAST.replace("0.25", pace).replace("= 0.99 ", "= 0.991 "), FAST)
    said = refusal(submit.main, [*new, "--rival", *old, "--name", "Faster", *NOTE], root)
    assert "is not faster than record #2" in said and "at p < 0.01: p = " in said


def test_submit_rival(root):
    """Logs of compare.py's race against the current record; a script that differs in its claim alone is the same."""
    claimed = leaderboard.with_claims(FAST, ["Record: toy-cpu, whatever.\n"])
    new, old = take_turns(root, FASTER, claimed)
    argv = ["--name", "Faster", *NOTE]
    assert "source is not that of record #2's script" in refusal(submit.main, [*old, "--rival", *new, *argv], root)
    accept([*new, "--rival", *old, *argv], root)
    assert faults(root) == [] and len(list(record_of(root, "Faster").glob("rival/*.log"))) == 5


def test_submit_refuses_chosen_or_copied_rivals(root):
    for path in root.glob("logs/*.log"):
        path.unlink()
    argv = ["--name", "Faster", *NOTE]
    pairs = [(make_logs(root, FASTER, [seed])[0], make_logs(root, FAST, [seed + 1])[0]) for seed in range(5)]
    new, old = zip(*pairs)
    assert "are 1, 2, 3, 4, 5, and they have to be 0 to 4" in refusal(submit.main, [*new, "--rival", *old, *argv], root)
    new, old = take_turns(root, FASTER, FAST)
    shutil.copy(record_of(root) / "1.log", old[1])
    assert "1.log has the losses and times of" in refusal(submit.main, [*new, "--rival", *old, *argv], root)


def test_submit_arguments(root):
    logs = make_logs(root, FASTER)
    assert "same seed, 0" in refusal(submit.main, [*logs, logs[0], "--name", "Faster", *NOTE], root)
    assert "YYYY-MM-DD_CamelCase" in refusal(submit.main, [*logs, "--name", "faster", *NOTE], root)
    assert "is there already" in refusal(submit.main, [*logs, "--name", "Shorter", *NOTE], root)
    assert "3 to 90 characters" in refusal(submit.main, [*logs, "--name", "Faster", "--note", ""], root)
    assert "No such file" in refusal(submit.main, ["no.txt", "--name", "Faster", *NOTE], root)
    assert "--name" in refusal(submit.main, [*logs], root)
    shutil.rmtree(root / "records/toy-cpu")
    assert "--baseline needs --data" in refusal(
        submit.main, [*logs, "--name", "Faster", *NOTE, "--baseline", "a recipe"], root)
    Path(logs[1]).write_text("hello")
    assert "not a training log" in refusal(submit.main, [*logs, "--name", "Faster", *NOTE], root)


def test_submit_against(root, monkeypatch, capsys):
    """On a machine half as fast both are run again, and the speed-up over the baseline is carried on."""
    old = record_of(root)
    old.rename(old.with_name("2000-01-02_Shorter"))
    base = record_of(root, "Baseline")
    base.rename(base.with_name("2000-01-01_Baseline"))
    leaderboard.main([], root)
    monkeypatch.setenv("MACHINE", "2 cores of Other CPU")
    monkeypatch.setenv("DRAG", "2")
    log, slow = (make_logs(root, script, [7])[0] for script in (FASTER, FAST.replace("0.25", "0.26")))
    argv = [log, "--name", "Faster", *NOTE, "--against"]
    assert "is not faster than record #2" in refusal(submit.main, [slow, *argv[1:]], root)
    monkeypatch.setattr(compare, "run_trial", lambda *words: calls.append(words[1]) or real_run_trial(*words))
    calls = []
    accept(argv, root)
    assert calls == [seed for seed in range(5) for _ in "ab"]
    folder = record_of(root, "Faster")
    assert len(list(folder.glob("*.log"))) == len(list(folder.glob("rival/*.log"))) == 5
    assert "20.1" in (folder / "README.md").read_text() and faults(root) == []
    assert re.search(r"-(20.0|19.9|20.1) % time, 2.\d\dx over the baseline", capsys.readouterr().out)
    text = (root / "records/README.md").read_text()
    assert "The speed-up of #3 is that of #2 times its own over #2, run again in turn with it" in text
    kept = (folder / "rival/0.log").read_text()
    shutil.copy(old.with_name("2000-01-02_Shorter") / "0.log", folder / "rival/0.log")  # filed logs are no re-run
    assert any("its trials must be on one kind of hardware" in fault for fault in faults(root))
    (folder / "rival/0.log").write_text(kept)
    (folder / "rival/4.log").unlink()
    assert any("did not take turns" in fault for fault in faults(root))
    shutil.rmtree(folder / "rival")
    assert any("and record #2 on 1 x 2 cores of Some CPU" in fault for fault in faults(root))


# -----------------------------------------------------------------------------
# compare.py

real_run_trial = compare.run_trial


def race(root, *argv):
    """compare.py in a folder; the report."""
    compare.main([*map(str, argv)], root)
    path = max((root / "logs/compare").glob("*/report.md"), key=lambda path: path.stat().st_mtime_ns)
    return path.read_text(), path.parent


@pytest.fixture
def scripts(root, monkeypatch):
    monkeypatch.chdir(root)
    monkeypatch.setenv("DRIFT", "0")
    monkeypatch.setattr(compare.os, "getloadavg", lambda: (0.1, 0.1, 0.1))
    for name, text in dict(a=SCRIPT, b=FAST.replace("0.25", "0.3"), c=FASTER).items():
        Path(f"{name}.py").write_text(text)
    return root


def test_compare(scripts, monkeypatch, capsys):
    order = []
    monkeypatch.setattr(compare, "run_trial", lambda *words: order.append((words[0].name, words[1]))
                        or real_run_trial(*words))
    text, folder = race(scripts, "a.py", "b.py", "--seeds=5")
    assert order == [(name, seed) for seed in range(5) for name in "AB"]
    assert text.index("-    pace: float = 0.5") < text.index("+    pace: float = 0.3") < text.index("| script |")
    sentence = ("B b.py: 40.0 % ± 0.0 % faster to the end; 40.5 % ± 0.0 % faster to the target 1.02; loss lower "
                "(-0.0100 ± 0.0047).")
    out = capsys.readouterr().out
    assert sentence in text and sentence in out
    row = [cell.strip() for cell in text[text.index("| B b.py |"):].split("\n")[0].strip("|").split("|")]
    assert row[:5] == ["B b.py", "0.9964 ± 0.0032 (5)", "-0.0100 ± 0.0047", "12.1", "-40.0 % ± 0.0 %"]
    assert row[5:7] == ["11.8", "-40.5 % ± 0.0 %"] and row[8] == str(len(FAST.splitlines()))
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG") and len(list(folder.glob("*.log"))) == 10
    assert "warning" not in out and "10 runs; how long they take shows after the first" in out


def test_compare_says_how_to_file(scripts, monkeypatch, capsys):
    monkeypatch.setenv("DRIFT", "1e-6")
    Path("b.py").write_text(FAST)  # the record
    race(scripts, "b.py", "c.py", "--seeds=5")
    said = re.search(r"to file it, if A b.py is the record: python records/submit.py (\S+) --rival (\S+) --name",
                     capsys.readouterr().out)
    new, old = (sorted(map(str, scripts.glob(pattern))) for pattern in said.groups())
    accept([*new, "--rival", *old, "--name", "Faster", *NOTE], scripts)
    assert faults(scripts) == []


def test_compare_is_too_noisy_to_tell(scripts, monkeypatch, capsys):
    monkeypatch.setenv("NOISE", "0.01")
    monkeypatch.setattr(compare.os, "getloadavg", lambda: (99.0, 99.0, 99.0))
    text, _ = race(scripts, "a.py", "a.py --final=0.99", "--seeds=3")
    out = capsys.readouterr().out
    assert "warning: something else is running (load average 99.0): times will be noisy" in out
    sentence, = re.findall(r"to the end.*? too noisy to tell \(.*?\): (.*?) would settle it", text)
    m = re.fullmatch(r"something else ran, load average 99.0 before the first run; about (\d+) seeds", sentence)
    assert 4 <= int(m[1]) <= 100, sentence


def test_noisy_words():
    cause, a = "the cat", [10.0, 10.0, 10.0]
    cell, words = compare.change(a, [1.0, 100.0, 1.0], "the end", cause)
    assert cell == "-53.6 % ± over 1000 %" and "time to the end too noisy to tell (-53.6 %" in words
    assert "the cat; about" in words or "no number of seeds within reach, a quiet machine would settle it" in words
    _, words = compare.change(a, [20.0, 25.0, 22.0], "the end", cause)
    assert words.startswith("slower to the end, by how much is too noisy to tell (+122.4 %")
    spread = np.std([0.1, 0.2, 0.4], ddof=1)
    n = rules.seeds_needed([0.1, 0.2, 0.4], 0.1)
    assert rules.half_interval(spread, n) <= 0.1 < rules.half_interval(spread, n - 1)
    assert rules.seeds_needed([-50, 0, 50], 0.1) == 0


def test_causes():
    even = {"steps": [(10, 1.0, 3.0), (20, 2.0, 2.0), (40, 4.0, 1.0)]}
    uneven = {"steps": [(0, 0.0, 4.0), (10, 1.0, 3.0), (20, 4.0, 2.0), (40, 6.0, 1.0)]}
    assert compare.unevenness([even]) == pytest.approx(0) and compare.unevenness([even, uneven]) > 0.5
    assert compare.likely_cause([even], 0).startswith("whole runs differ")
    assert "step times within a run differ by 57 %" in compare.likely_cause([uneven], 3.0)
    assert "load average 3.0" in compare.likely_cause([uneven], 3.0)


def test_forecast(scripts):
    """A race's length from the last runs of the same scripts, scaled to the number of steps."""
    foot = dict(script="a.py", track="cpu", steps=20, train_seconds=30.0, compile_seconds=8.0, eval_seconds=12.0)
    rows = [foot | {"steps": 0}, foot | {"train_seconds": 1e6}, foot, foot | {"script": "z.py"}]
    (scripts / "records/runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entries = compare.read_entries(["a.py", "b.py --num_steps=10"])
    assert [*compare.forecast(entries, 6, scripts)] == [  # 60 s and 15 s of training, 30 s each besides
        "12 runs, about 13.5 minutes: 7.5 of training, the rest start-up, warm-up and evaluation"]
    assert [*compare.forecast(entries, 6, scripts, jobs=4)] == [  # two rounds
        "12 runs, about 4.5 minutes: 2.5 of training, the rest start-up, warm-up and evaluation"]
    assert [*compare.forecast(entries[1:], 6, scripts)] == ["6 runs; how long they take shows after the first"]


def test_compare_resumes(scripts, monkeypatch):
    text, folder = race(scripts, "a.py", "c.py", "--seeds=3")
    logs = {path: path.stat().st_mtime_ns for path in folder.glob("*.log")}
    gone = sorted(logs)[1]
    gone.unlink()
    runs, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *words, **more: runs.append(words) or run(*words, **more))
    again, _ = race(scripts, "a.py", "c.py", "--seeds=3")
    assert len(runs) == 1 and again == text and gone.exists()
    assert all(path.stat().st_mtime_ns == when for path, when in logs.items() if path != gone)
    race(scripts, "a.py", "c.py", "--seeds=4")
    assert len(runs) == 3
    Path("c.py").write_text(FASTER + "# edited\n")  # another race: nothing of the old one counts
    race(scripts, "a.py", "c.py", "--seeds=2")
    assert len(runs) == 7


def test_compare_variants(scripts):
    text, folder = race(scripts, "a.py", "--seeds=3", "a.py --pace=0.6", "a.py --final=1.2", "b.py")
    assert "B a.py --pace=0.6: 20.0 % ± 0.0 % slower to the end" in text and "loss within noise" in text
    assert "C a.py --final=1.2: time to the end within noise (+0.0 % ± 0.0 %); target 1.02 reached in 0 of 3 runs, " \
           "by A in 3; loss higher (+0.2000 ±" in text
    assert text.count("the same file") == 2 and "D b.py: 40.0 %" in text and "submit.py" not in text
    one, _ = race(scripts, "a.py", "b.py", "--seeds=1")
    assert "B b.py: time to the end -40.0 %" in one and "noise unknown: one seed" in one


def test_compare_keeps_a_result_whose_samples_failed(scripts, capsys):
    Path("d.py").write_text(FAST + 'print("\\nno samples (its forward takes no tokens)\\n")\nsys.exit(1)\n')
    text, folder = race(scripts, "a.py", "d.py", "--seeds=2")
    assert "B d.py: 50.0 %" in text and len(list(folder.glob("d-*.log"))) == 2
    out = capsys.readouterr().out
    assert "d.py --seed=1 has its result, and then: no samples (its forward takes no tokens)" in out


def test_compare_has_the_checkpoints(scripts):
    (scripts / "checkpoints").mkdir()
    (scripts / "checkpoints/start").write_text("1")
    Path("e.py").write_text(FAST + '(ROOT / "checkpoints/start").read_text()\n')
    assert "B e.py: 50.0 %" in race(scripts, "a.py", "e.py", "--seeds=2")[0]


def test_compare_in_folders_with_spaces(scripts, capsys):
    Path("my runs").mkdir()
    for name, text in ("a.py", SCRIPT), ("b.py", FAST):
        Path("my runs", name).write_text(text)
    compare.main(["my runs/a.py", "my runs/b.py", "'my runs/b.py' --pace=0.1", "--seeds=5", "--out=my runs"], scripts)
    out = capsys.readouterr().out
    assert "B b.py: 50.0 %" in out and "C b.py --pace=0.1: 80.0 %" in out
    assert re.search(r"submit.py 'my runs/a-b-b-\w+/b-\w+-'\*.log --rival 'my runs/a-b-b-\w+/a-\w+-'\*.log --name", out)


def test_compare_on_several_gpus(scripts, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(compare.shutil, "which", lambda name: None)
    assert "--jobs=2 needs as many NVIDIA GPUs, and there are 0" in refusal(
        compare.main, ["a.py", "b.py", "--jobs=2"], scripts)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    _, folder = race(scripts, "a.py", "b.py", "--seeds=4", "--jobs=2")
    used = {}
    for path in folder.glob("*.log"):
        log = rules.parse_log(path)
        used.setdefault(log["footer"]["seed"], set()).add(rules.read_settings(log)["gpu"])
    assert len(used) == 4 and all(len(devices) == 1 for devices in used.values()), "a seed's runs meet one GPU"
    assert set.union(*used.values()) == {"3", "5"}
    assert "needs as many" in refusal(compare.main, ["a.py", "b.py", "--jobs=3"], scripts)


@pytest.mark.parametrize("argv, message", [
    (["a.py"], "two or more scripts"),
    (["a.py", "b.py", "--seeds=0"], "one or more --seeds"),
    (["a.py", "b.py", "--seeds=x"], "invalid int value: 'x'"),
    (["a.py", "none.py"], "cannot read the script 'none.py': No such file"),
    (["a.py", ""], "cannot read the script ''"),
    (["a.py", "a.py"], "A a.py and B a.py are the same"),
    (["a.py", "a.py", "--pace=0.1"], "put a script and its --field=value overrides in quotes"),
    (["a.py", "a.py pace=0.1"], "overrides look like --field=value"),
    (["a.py", "a.py --seed=3"], "--seeds sets the seeds"),
    (["a.py", "a.py --nope=3"], "failed: AttributeError"),
    (["a.py", "a.py --final=10", "--jobs=1"], "a.py --seed=0 --final=10 failed: test.py: the loss is no number"),
    (["a.py", "e.py"], "cannot be compared: eval_sha256 is"),
    (["a.py", "a.py --eval_tokens=10"], "cannot be compared: eval_tokens is 1000 and 10"),
    (["a.py", "silent.py"], "silent.py --seed=0 failed: it wrote no log"),
])
def test_compare_bad_input(scripts, argv, message):
    Path("e.py").write_text(SCRIPT.replace("    return 1", "    return 2"))
    Path("silent.py").write_text("print('hello')\n")
    assert message in refusal(compare.main, argv, scripts)
    assert not list(Path("logs/compare").glob("*/report.md")) and not list(Path("logs/compare").glob("*/run-*"))


def test_seconds_to_target():
    steps = [(10, 1.0, 3.0), (20, 2.0, 2.0), (30, 3.0, 2.2), (40, 4.0, 1.0)]
    assert [compare.seconds_to(steps, target) for target in (3.5, 3.0, 2.5, 2.0, 1.6, 1.0)] == \
        [1.0, 1.0, 1.5, 2.0, 3.5, 4.0]
    assert math.isnan(compare.seconds_to(steps, 0.9))


def test_intervals():
    a, b = [1.0, 2.0, 4.0], [3.0, 3.5, 5.0, 5.5]
    va, vb = 7 / 3 / 3, np.var(b, ddof=1) / 4  # of the means; below, Welch's and Student's formulas written out
    df = (va + vb) ** 2 / (va ** 2 / 2 + vb ** 2 / 3)
    assert rules.welch(a, b) == pytest.approx((4.25 - 7 / 3, (va + vb) ** 0.5 * stats.t.ppf(0.975, df)))
    gaps = [2.0, 1.5, 1.0]
    assert rules.paired(a, b[:3]) == pytest.approx((1.5, np.std(gaps, ddof=1) / 3 ** 0.5 * stats.t.ppf(0.975, 2)))
    assert rules.welch([1.0, 1.0], [2.0, 2.0]) == (1.0, 0.0) == rules.paired([1.0, 1.0], [2.0, 2.0])
    assert math.isnan(rules.welch([1.0], [2.0])[1])


# -----------------------------------------------------------------------------
# Plots

def luminance(colour):
    parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear))


@pytest.mark.parametrize("ground, text", [("#ffffff", 4.3), ("#0d1117", 4.3), ("#22272e", 3.4)])
def test_plots_read_on_light_and_dark(ground, text):
    """WCAG asks for a contrast of 3 for lines and large text; GitHub's light, dark and dimmed grounds."""
    contrast = lambda colour: (max(luminance(colour), luminance(ground)) + 0.05) / (
        min(luminance(colour), luminance(ground)) + 0.05)
    assert contrast(leaderboard.GREY) > text and min(map(contrast, leaderboard.COLOURS)) > 3.3
