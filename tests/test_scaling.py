"""records/scaling.py: the formula by hand, its bytes against a real run's, the report of made-up measurements."""
import os
import re

import pytest
import torch

import launches
import leaderboard
import scaling
import width
import train_4m
from test_train_4m import DIMS, SMALL, make_root, tiny  # noqa: F401: tiny is a fixture


def test_volume_by_hand():
    stacks = {(2, 3): 3, (4, 4): 1}  # 18 and 16 parameters
    assert set(scaling.volume(1, stacks, 10, True).values()) == {0}
    # two processes: the stack of three is filled up to four, that of one to two
    assert list(scaling.volume(2, stacks, 10, True).values()) == [0.5 * 4 * 56, 0.5 * 4 * 56, 4 * 10]
    assert list(scaling.volume(2, stacks, 10, False).values()) == [4 * 34, 0.5 * 4 * 56, 4 * 10]
    assert scaling.volume(2, stacks, 10, True, "bf16")["their updates"] == 0.5 * 2 * 56
    for sharded in (False, True):  # large worlds, no remainder: (w-1)/w of it all, two or three times
        many = scaling.volume(4, {(2, 3): 4}, 0, sharded)
        assert sum(many.values()) == 0.75 * 4 * 24 * (2 if sharded else 3)


def test_step_by_hand():
    assert scaling.step_seconds(1, 8.0, 1.0, 0, 1e9) == 9
    assert scaling.step_seconds(4, 8.0, 1.0, 2e9, 1e9) == 2 + 1 + 2
    assert scaling.step_seconds(4, 8.0, 1.0, 2e9, 1e9, cores=2) == 2 * (2 + 1) + 2
    assert scaling.polar_flops({(3, 2): 3}, 2) == 2 * 5 * (2 * 2 * 2 * 3 * 2 + 2 * 2 ** 3)


def test_projection():
    large = scaling.read_model("gpu")
    stacks, rest, _, flops, places, batch = large
    assert batch == 512 and places == 512 * (5 * 256 + 72) and stacks[512, 512] == 6 * 4 + 6 * 4 + 2
    one, eight, sixteen = (scaling.project(world, stacks, rest, True, flops, places, 0.4) for world in (1, 8, 16))
    assert one["sent"] == one["messages"] == 0 and one["replicated"] == sixteen["replicated"]
    assert eight["messages"] == pytest.approx(eight["sent"] / 450e9)
    assert sixteen["messages"] == pytest.approx(sixteen["sent"] / 400e9), "InfiniBand between two machines"
    assert one["compute"] / 16 < sixteen["compute"] < one["compute"] / 12, "Muon's matrices leave a remainder"


def test_states_by_hand():
    stacks = {(2, 3): 3, (4, 4): 1}
    assert scaling.state_bytes(1, stacks, 10, False) == 4 * (3 * 34 + 4 * 10)
    assert scaling.state_bytes(2, stacks, 10, False) == 4 * (2 * 34 + 2 * 6 + 16 + 4 * 10)
    assert scaling.state_bytes(2, stacks, 10, True) == 4 * (34 + 2 * 6 + 16 + 4 * 10)


def test_operators_by_hand():
    x = torch.ones(4)
    with launches.Operators() as operators:
        x.view(2, 2).T[0].add_(1)
        torch.add(x, x, out=torch.empty(4))
    assert operators.count == 2, "a view is none, nor is memory"
    tokens, _, modalities, _ = train_4m.read_frozen(train_4m.CONFIGS["cpu"])
    config = train_4m.dataclasses.replace(train_4m.CONFIGS["cpu"], **DIMS, batch=4, word_steps=3)
    layout, steps = train_4m.Layout(modalities), range(3)
    few, many = ([launches.count(train_4m, train_4m.dataclasses.replace(config, enc_depth=depth), layout, tokens[:4], step)
                  for step in steps] for depth in (1, 3))
    for one, three in zip(few, many):
        assert one["Muon"] == three["Muon"] > 3 * len(train_4m.POLAR) and one["Adam"] == three["Adam"] > 0
        assert one["inputs and targets"] == three["inputs and targets"] > 10
        assert three["model"] - one["model"] == many[0]["model"] - few[0]["model"] > 50, "two blocks"


def test_what_is_counted_is_up_to_date():
    """And is what the paper's sizes and the logs of a GPU say."""
    text = scaling.counted_report(scaling.read_model("gpu"))
    document = (scaling.ROOT / "docs/SCALING.md").read_text(encoding="utf-8")
    assert document.split(scaling.TIMED)[0] == text + "\n", "run python records/scaling.py --counted"
    sizes = re.findall(r"(?m)^\| (\S.*?) \| \d+ \| (\d+) \+ \d+ \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|", text)
    assert [row[-1] for row in sizes] == ["44", "198", "705", "2,819"]
    assert [row[1] for row in sizes] == ["6", "12", "24", "24"]
    assert len(scaling.gpu_steps()) == 5 and "rgb" in scaling.gpu_steps()[0][0]
    rows = re.findall(r"(?m)^\| (\d+) \| (\d+) \| (\d+) \| ", text)
    assert rows == [("1", "1", "512"), ("8", "1", "64"), ("64", "8", "8")]


def test_the_timed_part_stays(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    path = tmp_path / "docs/SCALING.md"
    path.write_text(f"old {scaling.TIMED}\nmeasured\n")
    monkeypatch.setattr(scaling, "ROOT", tmp_path)
    monkeypatch.setattr(scaling, "read_model", lambda track: track)
    monkeypatch.setattr(scaling, "counted_report", lambda large: f"new {large}\n")
    scaling.main(["--counted"])
    assert path.read_text() == f"new gpu\n\n{scaling.TIMED}\nmeasured\n"


def test_width(tmp_path, monkeypatch):
    """A sweep goes on where it was, for as long as its runs are the same; the best rate of a width is in bold."""
    monkeypatch.setattr(width, "RESULTS", tmp_path / "width.json")
    asked = []

    def train(dim, rate, factor):
        asked.append((dim, rate, factor))
        if len(asked) == 20:
            raise KeyboardInterrupt
        return None if factor == 4 else 2 + abs(factor - 2 + (rate == "muon_lr")) + 1 / dim
    monkeypatch.setattr(width, "train", train)
    assert "has not been run" in width.report(width.load())
    with pytest.raises(KeyboardInterrupt):
        width.main()
    assert len(width.load()) == 19
    width.main()
    count = len(width.WIDTHS) * (1 + len(width.RATES) * (len(width.FACTORS) - 1))
    assert len(asked) == count + 1 and len(width.load()) == count
    width.main()
    assert len(asked) == count + 1
    text = width.report(width.load())
    assert text.count("diverged") == 6 and text.count("**") == 12 and "| adam_lr | 256 |" in text
    assert text.endswith("muon_lr x 0.45, x 0.45, x 0.45; adam_lr x 2 or beyond, x 2 or beyond, x 2 or beyond.")
    losses = {"dim 64, adam_lr x 0.5": 2.0, "dim 64": 1.0, "dim 64, adam_lr x 2": 1.5}
    assert width.optimum(losses, 64, "adam_lr") == f"x {2 ** (1 / 6):.2f}", "of 3 x^2 / 4 - x / 4 + 1"
    assert width.optimum({}, 64, "adam_lr") == "–"
    monkeypatch.setattr(width, "FIELDS", ["--other"])
    assert not width.load()


def test_step_sizes():
    config = train_4m.CONFIGS["cpu"]
    tokens, _, modalities, _ = train_4m.read_frozen(config)
    layout, made = train_4m.Layout(modalities), {}
    for step in range(config.num_steps):
        sizes = scaling.step_sizes(train_4m, step, tokens[:1], layout, config)
        made.setdefault(train_4m.step_shape(step, config, layout), set()).add(sizes)
    assert all(len(sizes) == 1 for sizes in made.values()), "a shape says it all"
    found = {shape: sizes.pop() for shape, sizes in made.items()}  # by hand: pictures 64, texts 16, 40 and 16
    assert found[(("rgb",), ("desc", "bbox", "caption")), 0] == (64, 0, 72)
    assert found[(("rgb",), ("desc", "bbox", "caption")), 0.75] == (64 + 12, 0, 60)
    assert found[(("desc",), ("rgb",)), 0.25] == (16 + 16, 48, 0)
    assert found[(("rgb",), ("normal", "depth")), 0.5] == (64 + 32, 96, 0)
    assert found[(("caption",), ("desc", "bbox")), 0.25] == (40 + 4, 0, 28)
    assert found[None, 0.375] == (48, config.image_targets, config.text_targets)


# what a process still has running when Python ends: a thread of gloo's that frees a tensor then kills it by SIGABRT
AT_END = """
import atexit, os, pathlib

def write():
    names = [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
    pathlib.Path("threads" + os.environ["RANK"]).write_text("".join(names))

if "RANK" in os.environ:
    atexit.register(write)
"""


def test_bytes_of_a_real_run(tiny, tmp_path, monkeypatch):  # noqa: F811
    root = make_root(tmp_path / "root")
    (tmp_path / "sitecustomize.py").write_text(AT_END)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    run = scaling.measure(root, 2, 1, [*SMALL, *tiny[1], "--num_steps=8"])
    assert run["steps"] == 8 and run["world"] == 2 and run["step"] > sum(run["seconds"].values()) > 0
    assert set(run["seconds"]) == {*scaling.REPLICATED, "messages"} and min(run["seconds"].values()) > 0
    config = train_4m.dataclasses.replace(train_4m.CONFIGS["cpu"], **DIMS)
    modalities = train_4m.read_frozen(config)[2]
    stacks, rest = scaling.parameters(train_4m.Nano4M(config, train_4m.Layout(modalities)))
    sharded = "reduce_scatter" in (root / "train_4m.py").read_text()
    formula = sum(scaling.volume(2, stacks, rest, sharded).values())
    assert sum(run["sent"].values()) == pytest.approx(formula, rel=0.01)
    for rank in range(2):  # where there is no /proc the files are empty
        assert "gloo" not in (root / f"threads{rank}").read_text()


def test_failed_run(tmp_path):
    with pytest.raises(ValueError, match="(?s)1 processes failed: .*no training data"):
        scaling.measure(make_root(tmp_path / "root"), 1, 1, [*SMALL, f"--data={tmp_path}/none"])


def test_report(tmp_path):
    def run(world, step):
        seconds = {"loader": 0.001, "masking": 0.009, "adam": 0.01, **({"messages": 0.05} if world > 1 else {})}
        return {"world": world, "threads": 1, "step": step, "steps": 40, "torch": "2.13.0",
                "precision": "bf16", "hardware": "Some CPU", "seconds": seconds,
                "sent": {"all_reduce": 1e6 * (world - 1)}}
    model = {(10, 10): 4}, 1000, True, 1e9, 1000, 32
    runs = {(world, 1): [run(world, 0.2 / world + 0.02 + k / 1000) for k in range(3)] for world in scaling.WORLDS}
    runs[1, 2] = [run(1, 0.15)]
    found = scaling.fit(runs, *model[:3], 2)
    assert found["compute"] == pytest.approx(0.201) and sum(found["replicated"].values()) == pytest.approx(0.02)
    assert found["line"][1] == pytest.approx(0.221) and found["line"][2] == pytest.approx(0.201 / 2 + 0.02 + 0.05)
    text, plot = scaling.report(runs, 2, 2000, 4.0, model)
    assert "Some CPU, 2 cores" in text and "With 2 cores, 3 and 4 processes share them" in text
    assert re.search(r"At commit [0-9a-f]{7,}\. ", text) and "500 per second" in text
    rows = re.findall(r"(?m)^\| (\d+) \| (\d+) \| (.*) \|$", text)
    assert [row[:2] for row in rows] == [("1", "1"), ("1", "2"), ("2", "1"), ("3", "1"), ("4", "1")]
    assert rows[0][2].startswith("221.0 (220.0 to 222.0) | 221.0 | +0 % | 1.0 | 9.0 | 10.0 | 0.0 | 0.00 | 0.00")
    assert "share them" not in scaling.report(runs, 8, 2000, 4.0, model)[0]
    leaderboard.save_plot(tmp_path / "scaling.png", *plot)
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
