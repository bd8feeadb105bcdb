"""records/orders.py and steps.py: what orders of places and numbers of steps give, and what is drawn of it."""
import contextlib
import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "records"), str(ROOT / "data")]
import orders
import show
import steps


class Show:
    """Of the toy script: its accuracy tells the noise that pictures were drawn with, its distance the first place."""
    per_class, classes, guidance, order = 10, range(24), 2.0, torch.tensor([3, 0, 2, 1])

    def __init__(self, script):
        self.script = script

    def judged(self, model, steps, per_class):
        assert model == "model" and per_class == 10
        return self.script.generate() / steps, -1 if self.order is None else self.order[0].item()


@pytest.fixture
def script(tmp_path, monkeypatch):
    class Run:
        device, precision, autocast = torch.device("cpu"), "fp32", contextlib.nullcontext

        def show(self, model):
            raise AssertionError("samples are not drawn")

    class Fault(Exception):
        pass

    def main(argv):
        if "--bad=1" in argv:
            raise Fault("no such field")
        assert argv == ["--num_steps=0", "--load=x"]
        run = toy.Run()
        run.samples = types.SimpleNamespace(task_show=Show(toy))
        run.show("model")

    toy = types.SimpleNamespace(Run=Run, Fault=Fault, main=main, generate=lambda noise=4.5: noise)
    monkeypatch.setattr(show, "load_script", lambda path: toy)
    monkeypatch.setattr(orders, "DOCS", tmp_path)
    monkeypatch.setattr(orders, "STEPS", (1, 2))


def test_orders_are_permutations():
    named = orders.orders(torch.arange(64).flip(0))
    assert [order is None for order, _ in named.values()].count(True) == 2
    given = [tuple(order.tolist()) for order, _ in named.values() if order is not None]
    assert len(set(given)) == 3 and all(sorted(order) == list(range(64)) for order in given)


def test_measures_every_order(script, tmp_path):
    orders.measure(["--load=x"])
    found = json.loads((tmp_path / "maskgit_orders.json").read_text())
    assert found["pictures"] == 240 and found["guidance"] == 2.0 and " cores of " in found["hardware"]
    table = found["orders"]
    assert table["Halton"] == {"1": [4.5, 3], "2": [2.25, 3]} and table["row by row"]["1"] == [4.5, 0]
    assert table["surest first, as MaskGIT"]["2"] == [2.25, -1] and table["surest first, no noise"]["2"] == [0, -1]
    orders.leaderboard.save_plot(tmp_path / "orders.png", orders.draw_orders, table, panels=(1, 2))
    assert (tmp_path / "orders.png").read_bytes().startswith(b"\x89PNG")


def test_a_fault_of_the_script_is_one_sentence(script, tmp_path):
    with pytest.raises(SystemExit, match=r"^orders.py: no such field$"):
        orders.measure(["--bad=1"])
    assert not (tmp_path / "maskgit_orders.json").exists()


def test_committed_plot_shows_what_was_measured():
    found = json.loads((orders.DOCS / "maskgit_orders.json").read_text())["orders"]
    digest = orders.leaderboard.plot_digest(orders.draw_orders, found)
    assert digest.encode() in (orders.DOCS / "maskgit_orders.png").read_bytes(), "python records/orders.py --plot"


def test_steps_of_a_flow(tmp_path):
    text = (ROOT / "docs" / "flow.log").read_text()
    head, _, foot = text.rpartition("=" * 100)
    again = tmp_path / "again.log"
    again.write_text(f"{head}{'=' * 100}{re.sub('(?m)^overrides:.*$', 'overrides: --load=x --reflow=4000 --seed=1', foot)}")
    (name, numbers), (again_name, again_numbers) = steps.read(ROOT / "docs" / "flow.log"), steps.read(again)
    assert (name, again_name) == ("train_flow.py", "train_flow.py --reflow=4000")
    assert numbers == again_numbers and [len(pair) for pair in numbers.values()] == [2] * 5
    for n, (accuracy, distance) in numbers.items():
        assert f"\naccuracy_{n}_steps: {accuracy}\n" in foot and f"\nfrechet_{n}_steps: {distance}\n" in foot
    orders.leaderboard.save_plot(tmp_path / "steps.png", orders.draw_orders, {name: numbers}, panels=(1, 2))
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="has no accuracy by steps"):
        steps.read(ROOT / "docs" / "gpt.log")


def test_committed_plot_of_steps_is_the_logs():
    baseline, = ROOT.glob("records/flow-cpu/*_CourseRecipe/0.log")
    found = dict(steps.read(path) for path in (steps.PLOT.with_name("flow.log"), steps.PLOT.with_name("flow_reflow.log"), baseline))
    digest = orders.leaderboard.plot_digest(orders.draw_orders, found)
    assert digest.encode() in steps.PLOT.read_bytes(), "python records/steps.py, as docs/USE.md has it"
