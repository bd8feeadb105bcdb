"""What a trained model can do: samples, quality numbers, texts and chat. All of it happens after a training clock.

A training script opens this before its clock starts, so that what is missing is noticed then, and uses it once the
result is filed. It is a command as well, which evaluates a checkpoint and shows what it can do:

    python data/show.py train_4m.py --load=checkpoints/4m.safetensors [--quality_scenes=50 ...]

The samples of a run are in samples/<run id>/, those of the latest run in samples/ itself as well.
"""
import importlib
import importlib.util
import os
import shutil
import sys
from pathlib import Path

import torch

from shards import first_line, printable


class Prepared:
    """show_<task>.Show of a run, and where its samples go."""

    def __init__(self, task_show, run):
        self.task_show, self.samples, self.run = task_show, run.script.ROOT / "samples", run
        self.drawn = []  # paths

    def show(self, model):
        """Draw samples and measure their quality: whatever fails here is one sentence, the result is filed."""
        model.eval()
        try:
            with self.run.autocast(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
                self.draw(model)
                if hasattr(self.task_show, "chat"):  # what needs somebody at the terminal comes last
                    self.task_show.chat(model)
        except (Exception, KeyboardInterrupt) as error:
            reason = printable(f"{type(error).__name__}: {first_line(error)}")
            said = "samples end here" if self.drawn else "no samples"
            self.run.say(f"{said} ({reason}); the result above is filed")
            self.run.failed = True

    def draw(self, model):
        """Samples into the run's folder and beside it, and quality numbers into the log."""
        folder = self.samples / self.run.run_id
        folder.mkdir(parents=True, exist_ok=True)
        try:
            numbers = self.task_show.show(model, folder)
        finally:  # what there is when a quality number fails has been drawn as well
            self.drawn = sorted(folder.iterdir())
            for path in self.drawn:
                shutil.copy(path, self.samples / path.name)
            if self.drawn:
                self.run.say(f"samples: {', '.join(map(str, self.drawn))}")
        for key, value in numbers.items():
            self.run.say(f"{key}: {value}")


def check_run_list(run):
    """The run block sees to the folders that are written into, but not to this file in one of them."""
    path = run.script.ROOT / "records" / "runs.jsonl"
    if run.rank == 0 and path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
        raise run.script.Fault(f"cannot write {path}: it is read-only or not a file")


def prepare(run, **data):
    """Open what comes after the clock. Raises the script's Fault for what is not there or cannot be written."""
    check_run_list(run)
    module = importlib.import_module(f"show_{run.task}")
    open_show = getattr(module, "open_show", module.Show)  # what it is may depend on the data
    return Prepared(open_show(run.script, run, **data), run)


def load_script(path):
    """A training script as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    return script


if __name__ == "__main__":
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file() or "--help" in sys.argv[2:]:
        sys.exit(__doc__)
    script = load_script(sys.argv[1])
    try:
        script.main(["--num_steps=0", *sys.argv[2:]])
    except script.Fault as fault:
        sys.exit(f"show.py: {fault}")
