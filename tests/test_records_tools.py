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
SCRIPT = '''"""A script for tests."""
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
    pace: float = 0.5  # seconds a step
    target: float = 0.0
    load: str = ""

CONFIGS = {"cpu": Config(), "gpu": Config(track="gpu", num_steps=400)}
HERE = Path(__file__).resolve()
ROOT = next(folder for folder in HERE.parents if (folder / "data" / "frozen").exists())
# --- frozen: eval ---
EVALUATION = 1
# --- end: eval ---
config = copy.copy(CONFIGS["cpu"])
overrides = dict(word.lstrip("-").split("=") for word in sys.argv[1:] if "--track" not in word)
for key, value in overrides.items():
    setattr(config, key, type(getattr(config, key))(value))
if config.final > 9:
    sys.exit("test.py: the loss is no number")
code = HERE.read_text().partition("# --- " "frozen:")[2].partition("# --- " "end:")[0]
(ROOT / "logs").mkdir(exist_ok=True)
machine, drag = os.environ.get("MACHINE", "2 cores of Some CPU"), float(os.environ.get("DRAG", 1))
file = open(ROOT / "logs" / f"{time.time_ns()}.txt", "x")
settings = {"config": dataclasses.asdict(config), "argv": sys.argv[1:], "overrides": overrides,
            "hardware": machine, "gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}
print(f"{HERE.read_text()}\\n{'=' * 100}\\n{json.dumps(settings, indent=1)}\\n{'=' * 100}", file=file)
N, noise = config.num_steps, (config.seed * 7 + config.parameters) % 11 / 1000
for step in [*range(config.eval_every, N, config.eval_every), N]:
    loss, seconds = config.final + noise + 0.03 * (N - step), round(step * config.pace * drag * (1 + noise), 3)
    print(f"step:{step}/{N} val_loss:{loss:.4f} train_time:{1000 * seconds:.0f}ms "
          f"step_avg:{1000 * seconds / step:.2f}ms", file=file)
digest = hashlib.sha256(code.encode() + (ROOT / config.frozen).read_bytes()).hexdigest()
footer = dict(script=HERE.name, task="toy", track="cpu", seed=config.seed, world_size=1, hardware=machine, steps=N,
              parameters=config.parameters, tokens=100 * N, val_loss=round(loss, 5), target=config.target,
              reached=loss <= config.target, train_seconds=seconds, compile_seconds=0.1,
              tokens_per_second=round(100 * N / seconds), mfu=0.1, peak_memory_mib=10, data_sha256="ab12",
              eval_sha256=digest, val_loss_rgb=round(loss + 0.5, 4), val_loss_desc=round(loss - 0.5, 4),
              overrides=" ".join(f"--{key}={value}" for key, value in overrides.items()) or "none")
print("\\n".join(f"{key}: {value}" for key, value in footer.items()), file=file)
'''
FAST = SCRIPT.replace("pace: float = 0.5", "pace: float = 0.25").replace("target: float = 0.0", "target: float = 1.01")
FAST = FAST.replace("final: float = 1.0 ", "final: float = 0.99 ")
FASTER = FAST.replace("0.25", "0.2")
NOTE = ["--note", "A shorter step\n\nIt is half as long."]


def make_logs(root, script, seeds=range(5), *overrides, name="train_toy.py"):
    """Logs of a script's runs, as the script itself leaves them in logs/."""
    entry = compare.Entry("A", name, script, list(overrides))
    (root / "logs").mkdir(exist_ok=True)
    return [str(compare.run_trial(entry, seed, root / "logs", root=root)["path"]) for seed in seeds]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A repository with a track, its baseline and a record."""
    root = tmp_path_factory.mktemp("tree")
    (root / "data/frozen").mkdir(parents=True)
    (root / "data/frozen/val.npz").write_bytes(b"validation")
    (root / "README.md").write_text(f"# Toy\n\n[records](records/README.md#toy-cpu)\n\n{leaderboard.START}\n"
                                    f"{leaderboard.END}\n")
    base = root / "records/toy-cpu/2026-01-01_Baseline"
    base.mkdir(parents=True)
    (base / "README.md").write_text("# The baseline\n")
    (base / "train_toy.py").write_text(SCRIPT)
    for seed, path in enumerate(make_logs(root, SCRIPT, range(3))):
        shutil.copy(path, base / f"{seed}.log")
    foot = rules.parse_log(base / "0.log")["footer"]
    (root / "records/toy-cpu/track.json").write_text(json.dumps(dict(
        task="toy", track="cpu", data="toys", data_sha256="ab12", eval_sha256=foot["eval_sha256"], target=1.01,
        hardware_class="a CPU", baseline="slow", eval_files=["data/frozen/val.npz"],
        eval_config={"eval_tokens": 1000})))
    with pytest.raises(SystemExit) as done:
        submit.main([*make_logs(root, FAST), "--name", "Shorter", *NOTE], root)
    assert done.value.code == 0
    return root


@pytest.fixture
def root(tree, tmp_path):
    return Path(shutil.copytree(tree, tmp_path / "root"))


def record_of(root):
    folder, = (root / "records/toy-cpu").glob("*_Shorter")
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

def test_committed_records():
    assert faults(leaderboard.ROOT) == []


def test_good_tree(root, capsys):
    assert verify.verify(root) == []
    assert "toy-cpu #2 A shorter step: loss 0.9964 ± 0.0032 (5), p 0.00035, 10.1 s, 2.00x" in capsys.readouterr().out
    text = (record_of(root) / "README.md").read_text()
    assert text.startswith("# A shorter step\n\nIt is half as long.\n\nThe trials:\n\n| seed |")
    rows = [line for line in text.splitlines() if re.match(r"\| \d", line)]
    assert len(rows) == 5 and rows[0] == "| 0 | 1.00000 | 10.100 |"


def edit(pattern, new, count=0):
    """A change to a log's text below its source."""
    def change(text):
        source, rest = text[:text.rindex(rules.RULE + "\n{")], text[text.rindex(rules.RULE + "\n{"):]
        changed = re.sub(pattern, new, rest, count=count, flags=re.M)
        assert changed != rest, pattern
        return source + changed
    return change


DOCTORED = {
    "loss in the footer": (edit(r"^val_loss: .*", "val_loss: 0.9"), "disagree on val_loss"),
    "loss in the footer, a little": (edit(r"^val_loss: 0.996", "val_loss: 0.9958"), "disagree on val_loss"),
    "loss in the last step line": (edit(r"(step:40/40 val_loss:)\S+", r"\g<1>0.9"), "disagree on val_loss"),
    "loss in both": (lambda text: edit(r"^val_loss: .*", "val_loss: 0.9")(
        edit(r"(step:40/40 val_loss:)\S+", r"\g<1>0.9")(text)), "not the mean of its parts"),
    "time in the footer": (edit(r"^train_seconds: .*", "train_seconds: 5.0"), "disagree on val_loss or train_seconds"),
    "time in both": (lambda text: edit(r"^train_seconds: .*", "train_seconds: 9.0")(
        edit(r"(step:40/40.*train_time:)\d+", r"\g<1>9000")(text)), "step_avg disagree at step 40"),
    "time and average": (lambda text: edit(r"^train_seconds: .*", "train_seconds: 9.0")(
        edit(r"(step:40/40.*train_time:).*", r"\g<1>9000ms step_avg:225.00ms")(text)), "tokens_per_second disagree"),
    "target": (edit(r"^target: .*", "target: 1.2"), "another target"),
    "target in the settings": (edit(r'"target": 1.01', '"target": 1.2'), "with target 1.2, and its source says 1.01"),
    "reached": (edit(r"^reached: .*", "reached: False"), "val_loss and reached disagree"),
    "other data": (edit(r"^data_sha256: .*", "data_sha256: ffff"), "data_sha256 is ffff"),
    "other evaluation": (edit(r"^eval_sha256: .*", "eval_sha256: ffff"), "eval_sha256 is ffff"),
    "less evaluated": (edit(r'"eval_tokens": 1000', '"eval_tokens": 10'), "eval_tokens 10, and its source says 1000"),
    "early exit": (lambda text: edit(r"^step:40/40.*\n", "")(
        edit(r"^steps: 40", "steps: 30")(text)), "do not end at 30"),
    "early exit, mended": (lambda text: edit(r"^(step:\d+)/40", r"\1/30")(edit(r"^step:40/40.*\n", "")(
        edit(r"^val_loss: .*", "val_loss: 1.2960")(edit(r"^train_seconds: .*", "train_seconds: 7.5450")(
            edit(r"^steps: 40", "steps: 30")(text))))), "early exit: it made 30 of num_steps 40"),
    "a step line less": (edit(r"^step:30/40.*\n", ""), "not at every 15 steps"),
    "seed missing": (edit(r"^seed: .*\n", ""), "its footer lacks seed"),
    "seed twice": (edit(r"^seed: .*", "seed: 2"), "another log has the same seed, 2"),
    "seed of the footer alone": (edit(r"^seed: .*", "seed: 7"), "footer has seed 7, and its settings 1"),
    "source": (lambda text: text.replace("EVALUATION = 1", "EVALUATION = 2", 1), "source is not that of the record's"),
    "override": (edit(r"^overrides: .*", "overrides: --seed=1 --pace=0.1"), "no override but seed, track, precision"),
    "override in the settings": (edit(r'"--seed=1"\n', '"--seed=1", "--pace=0.1"\n'), "no override but seed"),
    "override unsaid": (edit(r'"pace": 0.25', '"pace": 0.1'), "it ran with pace 0.1, and its source says 0.25"),
    "hardware": (edit(r"^hardware: .*", "hardware: a GPU"), "one kind of hardware"),
    "precision": (edit(r"^seed: ", "precision: fp32\nseed: "), "its trials must be of one precision"),
    "from a checkpoint": (edit(r'^ "argv"', ' "options": {"load": "a.safetensors"},\n "argv"'), "starts from a checkpoint"),
    "no number": (edit(r"^val_loss: .*", "val_loss: low"), "its val_loss is no number: low"),
    "script elsewhere": (edit(r"^script: .*", "script: ../train_toy.py"), "its script is no file name"),
    "settings": (edit(r'"argv"', '"arguments"'), "its settings are not JSON with config, argv"),
    "truncated": (lambda text: text[:-200], "truncated log"),
}


@pytest.mark.parametrize("case", DOCTORED)
def test_doctored_log(root, case):
    change, message = DOCTORED[case]
    path = record_of(root) / "1.log"
    path.write_text(change(path.read_text()))
    assert any(message in fault for fault in faults(root)), faults(root)


def doctor_all(root, *edits, script=None):
    """The same change in all of the record's logs, and in its script."""
    for path in record_of(root).glob("*.log"):
        for change in edits:
            path.write_text(change(path.read_text()))
    if script:
        path = record_of(root) / "train_toy.py"
        path.write_text(script(path.read_text()))


def everywhere(old, new):
    return lambda text: text.replace(old, new)


@pytest.mark.parametrize("case", "frozen checkpoint evaluated steps parameters".split())
def test_doctored_everywhere(root, case):
    """All logs and the script tell the same story, and it breaks a rule."""
    if case == "frozen":
        doctor_all(root, everywhere("EVALUATION = 1", "EVALUATION = 2"), script=everywhere("N = 1\n", "N = 2\n"))
        message = "eval_sha256 is not that of its source"
    elif case == "checkpoint":
        changes = everywhere('load: str = ""', 'load: str = "a"'), everywhere('"load": ""', '"load": "a"')
        doctor_all(root, *changes, script=changes[0])
        message = "starts from a checkpoint"
    elif case == "evaluated":
        changes = everywhere("eval_tokens: int = 1000", "eval_tokens: int = 9"), everywhere('s": 1000', 's": 9')
        doctor_all(root, *changes, edit('"parameters": 9', '"parameters": 1000'), script=changes[0])
        message = "its eval_tokens is 9, and the track's evaluation has 1000"
    elif case == "steps":
        doctor_all(root, edit('"num_steps": 40', '"num_steps": 50'), script=None)
        message = "it ran with num_steps 50, and its source says 40"
    else:
        changes = everywhere("parameters: int = 1000", "parameters: int = 4001"), everywhere('rs": 1000', 'rs": 4001')
        doctor_all(root, *changes, edit(r"^parameters: .*", "parameters: 4001"), script=changes[0])
        message = "4001 parameters, more than 4 times the baseline's 1000"
    assert any(message in fault for fault in faults(root)), faults(root)


def test_copied_log(root):
    """A second trial that is the first one's log with another seed written into it."""
    folder = record_of(root)
    text = edit(r'(^seed: |"seed": "?|--seed=)0', r"\g<1>1")((folder / "0.log").read_text())
    (folder / "1.log").write_text(text)
    assert any("1.log has the losses and times of" in fault for fault in faults(root))


def test_names_links_tables_and_plots(root):
    folder = record_of(root)
    (folder / "4.log").rename(folder / "9.log")
    assert any("9.log should be named after its seed" in fault for fault in faults(root))
    (folder / "9.log").rename(folder / "4.log")
    (folder / "notes").mkdir()
    assert any("notes is no part of a record" in fault for fault in faults(root))
    (folder / "notes").rmdir()
    text = (folder / "README.md").read_text()
    (folder / "README.md").write_text(text.replace("10.100", "9.100") + "[x](nowhere.md)")
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
    path = root / "records/toy-cpu/track.json"
    path.write_text(path.read_text().replace('"target": 1.01', '"target": 1.02'))
    assert any("another target than the track's 1.02" in fault for fault in faults(root))
    shutil.rmtree(folder)
    assert any("the target is 1.02, and record #1's mean rounded up 1.01" in fault for fault in faults(root))


# -----------------------------------------------------------------------------
# submit.py

REFUSED = {
    "few": (FASTER, range(4), [], "needs at least 5 trials, and it has 4"),
    "slow": (FAST.replace("0.25", "0.26"), range(5), [], "is no faster than record #2"),
    "slow today": (FAST.replace("0.25", "0.3"), range(5), [], "is no faster than record #2"),
    "high": (FASTER.replace("final: float = 0.99", "final: float = 1.0"), range(5), [], "at p < 0.01: p = "),
    "large": (FASTER.replace("parameters: int = 1000", "parameters: int = 4004"), range(5), [], "more than 4 times"),
    "override": (FASTER, range(5), ["--pace=0.1"], "no override but seed, track, precision"),
    "hardware": (FASTER.replace("Some CPU", "Other CPU"), range(5), [], "submit.py --against does so"),
    "target": (FASTER.replace("target: float = 1.01", "target: float = 1.5"), range(5), [], "another target"),
    "evaluation": (FASTER.replace("EVALUATION = 1", "EVALUATION = 0"), range(5), [], "its eval_sha256 is"),
    "track": (FASTER.replace('task="toy"', 'task="toys"'), range(5), [], "no track toys-cpu"),
    "exit": (FASTER.replace("N, noise =", "N, noise = 30,").replace("noise = 30, config.num_steps,", "noise = 30,"),
             range(5), [], "early exit: it made 30 of num_steps 40"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_submit_refuses(root, case):
    script, seeds, overrides, message = REFUSED[case]
    before = sorted(root.glob("records/**/*"))
    logs = make_logs(root, script, seeds, *overrides)
    said = refusal(submit.main, [*logs, "--name", "Faster", *NOTE], root)
    assert message in said and ".part" not in said, said
    assert sorted(root.glob("records/**/*")) == before


def test_submit_arguments(root):
    logs = make_logs(root, FASTER)
    assert "same seed, 0" in refusal(submit.main, [*logs, logs[0], "--name", "Faster", *NOTE], root)
    assert "YYYY-MM-DD_CamelCase" in refusal(submit.main, [*logs, "--name", "faster", *NOTE], root)
    assert "is there already" in refusal(submit.main, [*logs, "--name", "Shorter", *NOTE], root)
    assert "3 to 90 characters" in refusal(submit.main, [*logs, "--name", "Faster", "--note", ""], root)
    assert "No such file" in refusal(submit.main, ["no.txt", "--name", "Faster", *NOTE], root)
    assert "--name" in refusal(submit.main, [*logs], root)
    Path(logs[1]).write_text("hello")
    assert "not a training log" in refusal(submit.main, [*logs, "--name", "Faster", *NOTE], root)
    logs = make_logs(root, FASTER + "# another\n", [1]) + logs[2:] + [logs[0]]
    assert "source is not that of" in refusal(submit.main, [*logs, "--name", "Faster", *NOTE], root)


def test_submit_against(root, monkeypatch, capsys):
    """On a machine half as fast both are run again, and the speed-up over the baseline is carried on."""
    old = record_of(root)
    old.rename(old.with_name("2026-01-02_Shorter"))
    leaderboard.main([], root)
    monkeypatch.setenv("MACHINE", "2 cores of Other CPU")
    monkeypatch.setenv("DRAG", "2")
    log, slow = (make_logs(root, script, [7])[0] for script in (FASTER, FAST.replace("0.25", "0.26")))
    argv = [log, "--name", "Faster", *NOTE, "--against"]
    assert "is no faster than record #2" in refusal(submit.main, [slow, *argv[1:]], root)
    monkeypatch.setattr(compare, "run_trial", lambda *words: calls.append(words[1]) or real_run_trial(*words))
    calls = []
    with pytest.raises(SystemExit) as done:
        submit.main(argv, root)
    assert done.value.code == 0 and calls == [seed for seed in (7, 0, 1, 2, 3) for _ in "ab"]
    folder, = (root / "records/toy-cpu").glob("*_Faster")
    assert len(list(folder.glob("*.log"))) == len(list(folder.glob("previous/*.log"))) == 5
    assert "20.0" in (folder / "README.md").read_text() and faults(root) == []
    assert "-20.0 % time, 2.50x over the baseline" in capsys.readouterr().out
    text = (root / "records/README.md").read_text()
    assert "The speed-up of #3 is that of #2 times its own over #2 re-run in alternation" in text
    for path in folder.glob("previous/*.log"):  # filed logs are no re-run
        shutil.copy(old.with_name("2026-01-02_Shorter") / "0.log", path)
        break
    assert any("has the losses and times of" in f or "should be named" in f or "same seed" in f for f in faults(root))
    for path in folder.glob("previous/*.log"):
        path.unlink()
    assert any("ran on other hardware than record #2" in fault for fault in faults(root))


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
    sentence = ("B b.py: 40.0 % ± 0.0 % faster to the end; 40.5 % ± 0.0 % faster to the target 1.01; loss lower "
                "(-0.0100 ± 0.0047).")
    out = capsys.readouterr().out
    assert sentence in text and sentence in out
    row = [cell.strip() for cell in text[text.index("| B b.py |"):].split("\n")[0].strip("|").split("|")]
    assert row[:5] == ["B b.py", "0.9964 ± 0.0032 (5)", "-0.0100 ± 0.0047", "12.1", "-40.0 % ± 0.0 %"]
    assert row[5:7] == ["11.9", "-40.5 % ± 0.0 %"] and row[8] == str(len(FAST.splitlines()))
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG") and len(list(folder.glob("*.log"))) == 10
    file, = re.findall(r"to file it: python (records/submit.py) (\S+)", out)
    with pytest.raises(SystemExit) as done:  # the race's logs are a record's; this one is no faster than today's
        submit.main([*map(str, scripts.glob(file[1])), "--name", "Faster", *NOTE], scripts)
    assert "no faster than record #2" in done.value.code


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
    assert "C a.py --final=1.2: time to the end within noise (+0.0 % ± 0.0 %); target 1.01 reached in 0 of 3 runs, " \
           "by A in 3; loss higher (+0.2000 ±" in text
    assert text.count("the same file") == 2 and "D b.py: 40.0 %" in text and "submit.py" not in text
    one, _ = race(scripts, "a.py", "b.py", "--seeds=1")
    assert "B b.py: time to the end -40.0 %" in one and "noise unknown: one seed" in one


def test_compare_on_several_gpus(scripts, monkeypatch):
    assert "--jobs=2 needs as many NVIDIA GPUs, and there are" in refusal(
        compare.main, ["a.py", "b.py", "--jobs=2"], scripts) or shutil.which("nvidia-smi")
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
    Path("e.py").write_text(SCRIPT.replace("EVALUATION = 1", "EVALUATION = 2"))
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
