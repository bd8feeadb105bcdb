"""records/side_by_side.py: when it draws samples of a run, and the sheet it makes of several."""
import importlib
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "records"), str(ROOT / "data")]
import draw
import side_by_side

SCRIPT = '''
import contextlib, time, types
import torch
class Fault(Exception): pass
class Closed:
    def close(self): self.closed = True
class Show:
    def glimpse(self, model):
        assert not model.training
        return [(torch.full((3, 8, 8), model.bias.item()), "cell")]
class Run:
    task = "TASK"
    def prepare(self, model, **data):
        self.samples = types.SimpleNamespace(task_show=Show() if self.task != "vlm" else None)
        self.step, self.seconds, self.started, self.config = 0, 0.0, time.perf_counter(), types.SimpleNamespace(num_steps=9)
        self.bar, self.saver = Closed(), Closed()
    def progress(self, loss): self.step, self.seconds = self.step + 1, self.seconds + 10
    @contextlib.contextmanager
    def paused(self):
        yield
        self.started = time.perf_counter()
    def autocast(self): return contextlib.nullcontext()
    def result(self, model): RUNS.append("filed")
    def show(self, model): RUNS.append("shown")
RUNS = []
def main(argv):
    if "--bad=1" in argv: raise Fault("no such field")
    run, model = Run(), torch.nn.Linear(1, 1)
    RUNS.append(run)
    run.prepare(model)
    for step in range(9):
        model.train()
        model.bias.data.fill_(step / 10)
        run.progress(0.5)
        assert model.training
    run.result(model)
    run.show(model)
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.setattr(side_by_side, "FOLDER", tmp_path / "out")

    def write(name, task="flow"):
        path = tmp_path / f"{name}.py"
        path.write_text(SCRIPT.replace("TASK", task))
        return path

    return write


def test_samples_after_the_same_seconds(toy):
    """Steps of ten seconds: 15 s have passed after the second, whose weights are drawn; 40 s end the run."""
    task, rows = side_by_side.watch(toy("toy_a"), [40, 15], [])
    run, = sys.modules["toy_a"].RUNS
    assert task == "flow" and rows[::2] == ["toy_a.py, after 20 s of training", "toy_a.py, after 40 s of training"]
    assert [row[0][0].mean().item() for row in rows[1::2]] == [pytest.approx(0.1), pytest.approx(0.3)]
    assert run.step == 4 and run.bar.closed and run.saver.closed


def test_a_run_that_ends_before_is_shown_at_its_end(toy):
    _, rows = side_by_side.watch(toy("toy_b"), [15, 300], [])
    assert rows[2] == "toy_b.py, after 90 s of training, at its end"
    assert rows[3][0][0].mean().item() == pytest.approx(0.8) and sys.modules["toy_b"].RUNS[1:] == ["filed"]


def test_one_sheet(toy, tmp_path):
    side_by_side.main([toy("toy_c"), toy("toy_d")], [20, 50], [])
    with Image.open(tmp_path / "out/flow.png") as sheet:
        assert sheet.height == 4 * (36 + draw.CELL + draw.LABEL + draw.GAP) + draw.GAP


def test_what_cannot_be_compared(toy, tmp_path):
    for paths, fields, sentence in (
            ([toy("toy_e"), toy("toy_f", "gpt")], [], "scripts of one task are compared, not of flow, gpt"),
            ([toy("toy_g", "vlm")], [], "toy_g.py: there are no samples to draw of a vlm in training"),
            ([toy("toy_h")], ["--bad=1"], "toy_h.py: no such field")):
        with pytest.raises(SystemExit, match=sentence):
            side_by_side.main(paths, [20], fields)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("task", ["gpt", "maskgit", "4m", "flow", "vlm"])
def test_every_task_has_samples_to_draw_in_training(task):
    """Of the public recipe as well: a Show is the task's, not the script's."""
    assert callable(importlib.import_module(f"show_{task}").Show.glimpse)
