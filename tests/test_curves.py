"""records/curves.py: what it measures at every evaluation of a run, and what it draws."""
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "records"), str(ROOT / "data")]
import curves

SCRIPT = '''
import torch, types
class Fault(Exception): pass
class Run:
    def __init__(self, argv):
        self.argv, self.step, self.seconds, self.device, self.precision = argv, 0, 0.0, torch.device("cpu"), "fp32"
        self.task = "gpt" if "--task=gpt" in argv else "flow"
        self.config = types.SimpleNamespace(track="cpu")
    def prepare(self, model, **data):
        quality = lambda model: {"quality_share": model["share"], "quality_none": None, "table": 3}
        self.samples = types.SimpleNamespace(task_show=types.SimpleNamespace(quality=quality))
def evaluate(model, rank): return (5.0 - model["share"], {"more": 1}) if rank == 0 else None
def main(argv):
    if "--bad=1" in argv: raise Fault("no such field")
    run, model = Run(argv), {"share": 0.0}
    run.prepare(model, tokens=None)
    for step in (0, 2, 4):
        run.step, run.seconds, model["share"] = step, step * 1.26, step / 4
        assert evaluate(model, 0)[1] == {"more": 1}, "the script gets what its own evaluation returns"
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "FOLDER", tmp_path / "curves")
    path = tmp_path / "toy_script.py"
    path.write_text(SCRIPT)
    return path


def test_points_and_plot(toy, tmp_path):
    curves.measure(toy, ["--eval_every=2"])
    found = json.loads((tmp_path / "curves/toy_script.json").read_text())
    assert found["script"] == "toy_script.py" and found["fields"] == ["--eval_every=2"] and " cores of " in found["hardware"]
    assert found["points"] == [{"step": 0, "seconds": 0.0, "val_loss": 5.0, "quality_share": 0.0},
                               {"step": 2, "seconds": 2.5, "val_loss": 4.5, "quality_share": 0.5},
                               {"step": 4, "seconds": 5.0, "val_loss": 4.0, "quality_share": 1.0}]
    curves.plot()
    assert (tmp_path / "curves/flow.png").read_bytes().startswith(b"\x89PNG")


def test_a_fault_of_the_script_is_one_sentence(toy, tmp_path):
    for field, sentence in ("--bad=1", "no such field$"), ("--task=gpt", "there is no judge for gpt, only for 4m, maskg"):
        with pytest.raises(SystemExit, match=f"toy_script.py: {sentence}"):
            curves.measure(toy, [field])
    assert not (tmp_path / "curves").exists()


def test_rules_say_what_was_measured():
    text = " ".join((ROOT / "docs/RULES.md").read_text().split())
    points = {script: points[-1] for script, points in curves.read_curves()["4m"]}
    course, ours = points["train_4m_course.py"], points["train_4m.py"]
    assert (f"has {course['val_loss']:.2f} nats after {course['seconds'] / 60:.0f} minutes on one core, and what it draws "
            f"from a description has an object F1 of {course['quality_rgb_from_desc_f1']:.2f}; ours has "
            f"{ours['val_loss']:.2f} after {ours['seconds'] / 60:.0f} minutes, and "
            f"{ours['quality_rgb_from_desc_f1']:.2f}") in text


def test_committed_plots_show_what_was_measured():
    by_task = curves.read_curves()
    assert "4m" in by_task
    for task, found in by_task.items():
        digest = curves.leaderboard.plot_digest(curves.draw_curves, found)
        assert digest.encode() in (curves.FOLDER / f"{task}.png").read_bytes(), "python records/curves.py --plot"
