"""records/leaderboard.py on small made-up trees of records, and on this repository's own."""

import json
import math

import pytest
from scipy import stats

import leaderboard as lb

SCRIPT = "import torch\nprint('hello')\n"
# A script as awkward as can be: it holds rules, step lines and a footer of its own, and a form feed.
NASTY = f'text = """\n{lb.RULE}\nstep:9/9 val_loss:0.1 train_time:1ms\n{lb.RULE}\nval_loss: 0.1\n"""\n\x0c\n'
TRACK = dict(task="4m", track="cpu", data="scenes, 64 px", data_sha256="ab12", eval_sha256="cd34", target=3.0,
             hardware_class="2 CPU cores", baseline="the course's nano4M")
BASE, FAST = "2026-01-01_Baseline", "2026-01-02_Muon"


def log_text(seed=0, loss=2.9, seconds=100.0, script=SCRIPT, **changes):
    footer = dict(script="train_4m.py", task="4m", track="cpu", seed=seed, world_size=1, hardware="2 x Some CPU",
                  steps=20, parameters=1000, tokens=5000, val_loss=f"{loss:.6f}", target=3.0, reached=loss <= 3.0,
                  train_seconds=f"{seconds:.3f}", compile_seconds=0.0, tokens_per_second=50, mfu=0.25,
                  peak_memory_mib=300, data_sha256="ab12", eval_sha256="cd34", overrides=f"--seed={seed}",
                  val_loss_rgb=3.5) | changes
    steps = "".join(f"step:{i}/20 val_loss:{loss + 20 - i:.4f} train_time:{seconds * i * 50:.0f}ms step_avg:1.0ms\n"
                    for i in (0, 10, 20))
    lines = "".join(f"{key}: {value}\n" for key, value in footer.items())
    return f"{script}{lb.RULE}\nwidth: 8\nargv: x\n{lb.RULE}\n{steps}{lines}"


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
    log = lb.parse_log(path)
    assert log["source"] + "\n" == SCRIPT
    assert log["config"] == "width: 8\nargv: x"
    assert log["steps"] == [(0, 0.0, 22.9), (10, 50.0, 12.9), (20, 100.0, 2.9)]
    foot = log["footer"]
    assert foot["seed"] == 7 and foot["val_loss"] == 2.9 and foot["val_loss_rgb"] == 3.5 and foot["reached"] is True
    assert foot["hardware"] == "2 x Some CPU" and foot["overrides"] == "--seed=7" and "width" not in foot


def test_source_with_rules_and_footers(tmp_path):
    path = tmp_path / "0.log"
    path.write_text(log_text(script=NASTY))
    log = lb.parse_log(path)
    assert log["source"] + "\n" == NASTY
    assert log["footer"]["val_loss"] == 2.9 and len(log["steps"]) == 3


def test_hash_of_digits_stays_text(tmp_path):
    path = tmp_path / "0.log"
    path.write_text(log_text(data_sha256="1234", eval_sha256="12e45"))
    assert lb.parse_log(path)["footer"]["data_sha256"] == "1234"
    assert lb.parse_log(path)["footer"]["eval_sha256"] == "12e45"


def test_bad_logs(tmp_path):
    path, good = tmp_path / "0.log", log_text()
    cases = {"just text\n": "not a training log: it has 0 rule",
             SCRIPT + lb.RULE + "\nwidth: 8\n": "not a training log: it has 1 rule",
             good[:good.index("peak_memory")]: "truncated log: its footer lacks peak_memory_mib, data_sha256",
             good[:good.index("step:20/20")]: "truncated log: its footer lacks script",
             good.replace("step:20/20", "step:19/20"): "do not end at 20",
             good.replace("steps: 20", "steps: 30"): "do not end at 30",
             log_text(val_loss=2.8): "disagree",
             log_text(train_seconds=90.0): "disagree"}
    for text, message in cases.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            lb.parse_log(path)


# -----------------------------------------------------------------------------
# Statistics

def test_p_value():
    assert lb.p_value([2.89, 2.90, 2.91], 2.90) == pytest.approx(0.5)
    t2 = 300  # t squared of 0.1 below the target at std 0.01, n 3
    assert lb.p_value([2.89, 2.90, 2.91], 3.0) == pytest.approx((1 - (t2 / (2 + t2))**0.5) / 2, rel=1e-6)
    assert lb.p_value([2.89, 2.90, 2.91], 2.8) > 0.99
    assert math.isnan(lb.p_value([2.9], 3.0)) and math.isnan(lb.p_value([2.9, math.nan], 3.0))
    assert [lb.p_value([2.9, 2.9], target) for target in (3.0, 2.9, 2.8)] == [0, 0.5, 1]


# -----------------------------------------------------------------------------
# Tables and files

def test_baseline_alone(root):
    cells = rows(lb.build(root)["records/README.md"])[2]
    assert cells == ["1", "100.0", "1.00x", "2.9000 ± 0.0071 (5)", "–", "2", "The baseline", "2026-01-01",
                     "2 x Some CPU", f"[logs](4m-cpu/{BASE})"]
    assert len(rows(lb.build(root)["README.md"])) == 3  # the baseline is the best: it stands there once


def test_record_row_and_front_page(root):
    add_record(root, FAST, seconds=40.0, script=SCRIPT + "# two\n# more\n", title="# Muon | for all\n\nWhy.")
    files = lb.build(root)
    section = files["records/README.md"]
    line = next(line for line in section.splitlines() if line.startswith("| 2 "))
    p = f"{stats.t.sf(0.1 / (0.00005**0.5 / 5**0.5), 4):.2g}"
    assert line == (f"| 2 | 40.0 | 2.50x | 2.9000 ± 0.0071 (5) | {p} | 4 (+2) | Muon \\| for all | 2026-01-02 "
                    f"| 2 x Some CPU | [logs](4m-cpu/{FAST}) |")
    assert "![validation loss against train time](4m-cpu/loss.png)" in section and "†" not in section
    front = files["README.md"]
    assert front.startswith(f"# Hi\n\n{lb.START}\n| track") and front.endswith(f"|\n{lb.END}\n\nbye\n")
    best, = [line for line in front.splitlines() if line.startswith("| [4m-cpu]")]
    assert "#2 Muon" in best and "2.50x" in best
    lb.main([], root)
    assert lb.build(root)["README.md"] == front  # rebuilding over its own output changes nothing


def test_speedup_over_baseline_rerun(root):
    folder = add_record(root, FAST, seconds=40.0, hardware="1 x Other CPU")
    assert "#2 ran on other hardware" in lb.build(root)["records/README.md"]
    (folder / "baseline").mkdir()
    for seed in range(2):
        (folder / "baseline" / f"{seed}.log").write_text(log_text(seed, seconds=60.0, hardware="1 x Other CPU"))
    text = lb.build(root)["records/README.md"]
    assert rows(text)[3][2] == "1.50x" and rows(text)[3][3].endswith("(5)")
    assert "The speed-up of #2 is over the baseline re-run" in text and "60.0 s, mean of 2" in text
    assert "other hardware" not in text


def test_order_on_one_date_is_slower_first(root):
    add_record(root, "2026-01-02_Alpha", seconds=30.0)
    add_record(root, "2026-01-02_Beta", seconds=50.0)
    _, records = lb.read_track(root / "records/4m-cpu")
    assert [r["path"].name for r in records] == [BASE, "2026-01-02_Beta", "2026-01-02_Alpha"]


@pytest.mark.parametrize("losses", [(2.9, 2.91, 2.9, 2.91), (2.9, 3.1, 2.9, 3.1, 2.9), (2.9,)])
def test_few_trials_or_high_p_is_provisional(root, losses):
    add_record(root, FAST, seconds=10.0, losses=losses)
    files = lb.build(root)
    assert rows(files["records/README.md"])[3][0] == "2†" and lb.PROVISIONAL in files["records/README.md"]
    assert "Muon" not in files["README.md"]  # the baseline stays the best


def test_track_without_record(root):
    folder = root / "records" / "4m-gpu"
    folder.mkdir()
    command = "torchrun --nproc_per_node=8 train_4m.py --track=gpu"
    (folder / "track.json").write_text(json.dumps(TRACK | dict(track="gpu", target=None, command=command)))
    files = lb.build(root)
    assert f"no record yet – not yet run on a GPU. To run it:\n\n```\n{command}\n```" in files["records/README.md"]
    assert "Nobody has run [4m-gpu](records/README.md#4m-gpu) yet." in files["README.md"]
    assert lb.main([], root) == 0 and not (folder / "loss.png").exists()


def test_records_that_break_the_rules(root):
    cases = [(dict(data_sha256="ffff"), "data_sha256 is ffff"), (dict(eval_sha256="ffff"), "eval_sha256 is ffff"),
             (dict(track="gpu"), "track is gpu"), (dict(target=3.5), "another target"),
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
    if not any((lb.ROOT / "records").glob("*/track.json")):
        pytest.skip("no track yet")
    assert lb.main(["--check"]) == 0
