"""records/leaderboard.py on small made-up trees of records, and on this repository's own."""

import json
import math

import pytest
from scipy import stats

import leaderboard as lb
import rules

SCRIPT = "import torch\nprint('hello')\n"
# A script as awkward as can be: it holds rules, step lines and a footer of its own, and a form feed.
NASTY = f'text = """\n{rules.RULE}\nstep:9/9 val_loss:0.1 train_time:1ms\n{rules.RULE}\nval_loss: 0.1\n"""\n\x0c\n'
TRACK = dict(task="4m", track="cpu", data="scenes, 64 px", data_sha256="ab12", eval_sha256=["cd34"], run_sha256=["11"],
             frozen_sha256=["22"], target=3.0, floors={"quality_f1": [">=", 0.9]}, device="cpu",
             baseline=dict(recipe="the course's nano4M", reached=True, seconds=100.0, loss=2.9,
                           parameters_and_buffers=1000, eval_seconds=0.1))
SETTINGS = json.dumps({"config": {"width": 8}, "argv": ["x"], "overrides": {}, "torch": "2.13.0"}, indent=1)
BASE, FAST = "2026-01-01_Baseline", "2026-01-02_Muon"


def log_text(seed=0, loss=2.9, seconds=100.0, script=SCRIPT, **changes):
    footer = dict(script="train_4m.py", task="4m", track="cpu", seed=seed, world_size=1, hardware="2 cores of Some CPU",
                  steps=20, parameters=1000, tokens=5000, val_loss=f"{loss:.6f}", target=3.0, reached=loss <= 3.0,
                  train_seconds=f"{seconds:.3f}", compile_seconds=0.0, tokens_per_second=50, mfu=0.25,
                  peak_memory_mib=300, data_sha256="ab12", eval_sha256="cd34", overrides=f"--seed={seed}",
                  val_loss_rgb=3.5, quality_f1=0.95, buffers=0, eval_seconds=0.3, start_time=1e9) | changes
    steps = "".join(f"step:{i}/20 val_loss:{loss + 20 - i:.4f} train_time:{seconds * i * 50:.0f}ms step_avg:1.0ms\n"
                    for i in (0, 10, 20))
    lines = "".join(f"{key}: {value}\n" for key, value in footer.items())
    return f"{script}{rules.RULE}\n{SETTINGS}\n{rules.RULE}\n{steps}{lines}"


def add_record(root, name=BASE, losses=(2.89, 2.90, 2.91, 2.90, 2.90), title="# A title\n\nMore.", script=SCRIPT, **kw):
    folder = root / "records" / "4m-cpu" / name
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(title)
    (folder / "train_4m.py").write_text(script)
    for seed, loss in enumerate(losses):
        (folder / f"{seed}.log").write_text(log_text(seed, loss, script=script, **kw))
    return folder


@pytest.fixture
def root(tmp_path):
    """A tree with one track and its baseline: 5 trials of 100 s."""
    add_record(tmp_path, title="# The baseline\n\nMore.")
    (tmp_path / "records/4m-cpu/track.json").write_text(json.dumps(TRACK))
    (tmp_path / "README.md").write_text(f"# Hi\n\n{lb.START}\nold\n{lb.END}\n\nbye\n")
    return tmp_path


def rows(text):
    """The cells of every table row in a text."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


# -----------------------------------------------------------------------------
# Logs

def test_parse_log(tmp_path):
    path = tmp_path / "0.log"
    path.write_text(log_text(seed=7, loss=2.9, seconds=100.0))
    log = rules.parse_log(path)
    assert log["source"] + "\n" == SCRIPT
    assert log["config"] == SETTINGS and rules.read_settings(log)["torch"] == "2.13.0"
    assert log["steps"] == [(0, 0.0, 22.9), (10, 50.0, 12.9), (20, 100.0, 2.9)]
    foot = log["footer"]
    assert foot["seed"] == 7 and foot["val_loss"] == 2.9 and foot["val_loss_rgb"] == 3.5 and foot["reached"] is True
    assert foot["hardware"] == "2 cores of Some CPU" and foot["overrides"] == "--seed=7" and "width" not in foot


def test_source_with_rules_and_footers(tmp_path):
    path = tmp_path / "0.log"
    path.write_text(log_text(script=NASTY))
    log = rules.parse_log(path)
    assert log["source"] + "\n" == NASTY
    assert log["footer"]["val_loss"] == 2.9 and len(log["steps"]) == 3


def test_hash_of_digits_stays_text(tmp_path):
    path = tmp_path / "0.log"
    path.write_text(log_text(data_sha256="1234", eval_sha256="12e45"))
    assert rules.parse_log(path)["footer"]["data_sha256"] == "1234"
    assert rules.parse_log(path)["footer"]["eval_sha256"] == "12e45"


def test_bad_logs(tmp_path):
    path, good = tmp_path / "0.log", log_text()
    cases = {"just text\n": "not a training log: it has 0 rule",
             SCRIPT + rules.RULE + "\nwidth: 8\n": "not a training log: it has 1 rule",
             good[:good.index("peak_memory")]: "truncated log: its footer lacks peak_memory_mib, data_sha256",
             good[:good.index("step:20/20")]: "truncated log: its footer lacks script",
             good.replace("step:20/20", "step:19/20"): "do not end at 20",
             good.replace("steps: 20", "steps: 30"): "do not end at 30",
             log_text(val_loss=2.8): "disagree",
             log_text(train_seconds=90.0): "disagree"}
    for text, message in cases.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            rules.parse_log(path)


# -----------------------------------------------------------------------------
# Statistics

def test_p_value():
    assert rules.p_value([2.89, 2.90, 2.91], 2.90) == pytest.approx(0.5)
    t2 = 300  # t squared of 0.1 below the target at std 0.01, n 3
    assert rules.p_value([2.89, 2.90, 2.91], 3.0) == pytest.approx((1 - (t2 / (2 + t2))**0.5) / 2, rel=1e-6)
    assert rules.p_value([2.89, 2.90, 2.91], 2.8) > 0.99
    assert math.isnan(rules.p_value([2.9], 3.0)) and math.isnan(rules.p_value([2.9, math.nan], 3.0))
    assert [rules.p_value([2.9, 2.9], target) for target in (3.0, 2.9, 2.8)] == [0, 0.5, 1]


# -----------------------------------------------------------------------------
P = f"{stats.t.sf(0.1 / (0.00005**0.5 / 5**0.5), 4):.2g}"  # of the five losses below and the target


def test_p_faster():
    a, b = [10.0, 10.1, 10.2], [11.0, 11.5, 11.2, 11.3]
    assert rules.p_faster(a, b) == pytest.approx(stats.ttest_ind(a, b, equal_var=False).pvalue / 2)
    assert rules.p_faster(b, a) > 0.99 and math.isnan(rules.p_faster([1.0], b))
    assert [rules.p_faster([1.0, 1.0], [x, x]) for x in (2.0, 1.0, 0.5)] == [0, 0.5, 1]


def test_machine():
    foot = dict(world_size=8, hardware="8x NVIDIA H100")
    assert rules.machine(foot) == rules.machine(foot | {"hardware": "8 x NVIDIA H100"}) == "8 x NVIDIA H100"
    assert rules.machine(dict(world_size=1, hardware="2 cores of Some CPU")) == "1 x 2 cores of Some CPU"


# -----------------------------------------------------------------------------
# Tables and files

def test_baseline_alone(root):
    cells = rows(lb.build(root)["records/README.md"])[2]
    assert cells == ["1", "100.0", "1.00x", "2.9000 ± 0.0071 (5)", f"{P}, –", "f1 0.95", "2", "The baseline",
                     "2026-01-01", "1 x 2 cores of Some CPU", f"[logs](4m-cpu/{BASE})"]
    assert len(rows(lb.build(root)["README.md"])) == 3  # the baseline is the best: it stands there once


def test_baseline_not_reached(root):
    about = TRACK["baseline"] | dict(reached=False, seconds=7200.4, loss=3.4)
    (root / "records/4m-cpu/track.json").write_text(json.dumps(TRACK | dict(baseline=about)))
    add_record(root, FAST, seconds=40.0, title="# Muon\n\nWhy.", quality_f1=0.85)
    files = lb.build(root)
    text = files["records/README.md"]
    assert "Target: val_loss <= 3.0, quality_f1 >= 0.9. Baseline: the course's nano4M; target not reached in 7200 s " \
           "(loss 3.4)." in text
    assert rows(text)[2][1:3] == ["not reached in 100.0", "1.00x"] and rows(text)[3][1:3] == ["40.0", "> 2.50x"]
    assert rows(text)[3][5] == "f1 0.85 (not >= 0.9)" and "A speed-up of > x is one over" in text
    assert rows(files["README.md"])[2][3] == "> 2.50x"


def test_no_records_and_no_tracks(tmp_path):
    """Nothing there is one line on the front page; season 1 stays where it is."""
    (tmp_path / "records").mkdir()
    (tmp_path / "README.md").write_text(f"{lb.START}\n{lb.END}\n")
    (tmp_path / "records/README.md").write_text("old\n\n## Season 1\n\n| a table |\n")
    files = lb.build(tmp_path)
    assert files["README.md"] == f"{lb.START}\n{lb.NO_RECORDS}\n{lb.END}\n" and lb.plots(tmp_path, []) == {}
    assert files["records/README.md"].endswith("training script.\n\n## Season 1\n\n| a table |\n")
    assert lb.main([], tmp_path) == 0 == lb.main(["--check"], tmp_path)
    (tmp_path / "records/4m-cpu").mkdir()
    (tmp_path / "records/4m-cpu/track.json").write_text(json.dumps(TRACK))
    assert lb.build(tmp_path)["README.md"] == files["README.md"]
    assert "no record yet. To run it:\n\n```\n./run.sh 4m --track=cpu\n```" in lb.build(tmp_path)["records/README.md"]
    assert lb.main([], tmp_path) == 0 == lb.main(["--check"], tmp_path)


def test_claims():
    text = '"""A title.\n\nMore.\n"""\ncode\n'
    claimed = lb.with_claims(text, ["Record: a.\n", "Record: b.\n"])
    assert claimed == '"""A title.\n\nRecord: a.\nRecord: b.\n\nMore.\n"""\ncode\n'
    assert lb.with_claims(claimed, ["Record: a.\n", "Record: b.\n"]) == claimed
    assert lb.with_claims(claimed, []) == text == lb.with_claims(text, [])
    assert rules.without_claim(claimed) == rules.without_claim(text)
    with pytest.raises(ValueError, match="more than its title"):
        lb.with_claims('"""A title."""\ncode\n', ["Record: a.\n"])


def test_scripts_without_a_record_have_no_claim(root):
    (root / "train_4m.py").write_text('"""A title.\n\nRecord: 4m-cpu, old.\n\nMore.\n"""\n')
    (root / "train_gpt.py").write_text('"""Another."""\n')
    files = lb.build(root)
    assert "Record" not in files["train_4m.py"], "a baseline is no claim"
    assert files["train_gpt.py"] == '"""Another."""\n'
    add_record(root, FAST, seconds=40.0)
    assert lb.build(root)["train_4m.py"] == (
        '"""A title.\n\nRecord: 4m-cpu, val_loss <= 3.0, quality_f1 >= 0.9 in 40.0 s on 1 x 2 cores of Some CPU, '
        'torch 2.13.0 (n=5).\n\nMore.\n"""\n')


def test_record_row_and_front_page(root):
    add_record(root, FAST, seconds=40.0, script=SCRIPT + "# two\n# more\n", title="# Muon | for all\n\nWhy.")
    files = lb.build(root)
    section = files["records/README.md"]
    line = next(line for line in section.splitlines() if line.startswith("| 2 "))
    assert line == (f"| 2 | 40.0 | 2.50x | 2.9000 ± 0.0071 (5) | {P}, 0 | f1 0.95 | 4 (+2) | Muon \\| for all "
                    f"| 2026-01-02 | 1 x 2 cores of Some CPU | [logs](4m-cpu/{FAST}) |")
    assert "![validation loss against train time](4m-cpu/loss.png)" in section
    front = files["README.md"]
    assert front.startswith(f"# Hi\n\n{lb.START}\n| track") and front.endswith(f"history.png)\n{lb.END}\n\nbye\n")
    best, = [line for line in front.splitlines() if line.startswith("| 4m-cpu |")]
    assert "#2 Muon" in best and "2.50x" in best
    lb.main([], root)
    assert lb.build(root)["README.md"] == front  # rebuilding over its own output changes nothing


def test_speedup_over_rival_run_again(root):
    folder = add_record(root, FAST, seconds=40.0, hardware="4 cores of Other CPU")
    (folder / "rival").mkdir()
    for seed in range(2):
        (folder / "rival" / f"{seed}.log").write_text(log_text(seed, seconds=60.0, hardware="4 cores of Other CPU"))
    text = lb.build(root)["records/README.md"]
    assert rows(text)[3][2] == "1.50x" and rows(text)[3][3].endswith("(5)")
    assert "The speed-up of #2 is that of #1 times its own over #1, run again in turn with it" in text
    assert "60.0 s, mean of 2" in text


def test_order_on_one_date_is_slower_first(root):
    add_record(root, "2026-01-02_Alpha", seconds=30.0)
    add_record(root, "2026-01-02_Beta", seconds=50.0)
    _, records = rules.read_track(root / "records/4m-cpu")
    assert [r["path"].name for r in records] == [BASE, "2026-01-02_Beta", "2026-01-02_Alpha"]


def test_track_without_record(root):
    folder = root / "records" / "4m-gpu"
    folder.mkdir()
    command = "torchrun --nproc_per_node=8 train_4m.py --track=gpu"
    (folder / "track.json").write_text(json.dumps(TRACK | dict(track="gpu", command=command)))
    files = lb.build(root)
    assert f"no record yet. To run it:\n\n```\n{command}\n```" in files["records/README.md"]
    assert "Nobody has run [4m-gpu](records/README.md#4m-gpu) yet." in files["README.md"]
    assert lb.main([], root) == 0 and not (folder / "loss.png").exists()


def test_records_that_break_the_rules(root):
    cases = [(dict(data_sha256="ffff"), "data_sha256 is ffff"), (dict(eval_sha256="ffff"), "eval_sha256 is ffff"),
             (dict(track="gpu"), "track is gpu"), (dict(target=3.5), "its target is 3.5"),
             (dict(overrides="--seed=0 --num_steps=5"), "no override but"),
             (dict(overrides='{"lr": 0.1}'), "no override but"), (dict(seed=3), "same seed, 3")]
    for i, (changes, message) in enumerate(cases):
        folder = add_record(root, f"2026-01-03_Case{i}")
        for seed in range(5):
            (folder / f"{seed}.log").write_text(log_text(**{"seed": seed} | changes))
        with pytest.raises(ValueError, match=message):
            lb.build(root)
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def test_script_hardware_and_folder_name(root):
    folder = add_record(root, FAST)
    (folder / "train_4m.py").write_text("something else\n")
    with pytest.raises(ValueError, match="source is not that of the record's script"):
        lb.build(root)
    (folder / "train_4m.py").write_text(SCRIPT)
    (folder / "4.log").write_text(log_text(4, hardware="a GPU"))
    with pytest.raises(ValueError, match="one kind of hardware"):
        lb.build(root)
    folder.rename(folder.with_name("muon"))
    with pytest.raises(ValueError, match="YYYY-MM-DD_CamelCase"):
        lb.build(root)


def test_front_page_needs_its_markers(root):
    (root / "README.md").write_text(f"{lb.END}\n{lb.START}\n")
    with pytest.raises(ValueError, match="leaderboard:start"):
        lb.build(root)


def test_main_writes_and_checks(root, capsys):
    assert lb.main(["--check"], root) == 1
    assert "README.md is not what the logs say" in capsys.readouterr().err
    assert not (root / "records/README.md").exists()
    assert lb.main([], root) == 0
    assert (root / "records/4m-cpu/loss.png").read_bytes().startswith(b"\x89PNG")
    assert lb.main(["--check"], root) == 0
    text = (root / "records/README.md").read_text()
    (root / "records/README.md").write_text(text.replace("100.0", "90.0"))
    assert lb.main(["--check"], root) == 1
    assert lb.main(["--chekc"], root) == 2
    (root / f"records/4m-cpu/{BASE}/2.log").write_text("x")
    capsys.readouterr()
    assert lb.main([], root) == 1
    assert "2.log: not a training log" in capsys.readouterr().err


def test_this_repository_is_up_to_date():
    assert lb.main(["--check"]) == 0
