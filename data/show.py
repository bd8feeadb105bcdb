"""What a trained model can do: samples, quality numbers, texts and chat. All of it happens after a training clock.

A training script opens this before its clock starts, so that what is missing is noticed then, and uses it once the
result is filed. It is a command as well, which evaluates a checkpoint and shows what it can do:

    python data/show.py train_4m.py --load=checkpoints/4m.safetensors [--quality_scenes=50 ...]

The samples of a run are in samples/<run id>/, those of the latest run in samples/ itself as well.
"""
import importlib
import importlib.util
import shutil
import sys
from pathlib import Path

import torch


class Prepared:
    """show_<task>.Show of a run, and where its samples go."""

    def __init__(self, task_show, run):
        self.task_show, self.samples, self.run = task_show, run.script.ROOT / "samples", run

    def show(self, model):
        """Draw samples and measure their quality: whatever fails here is one sentence, the result is filed."""
        model.eval()
        try:
            with self.run.autocast(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
                self.draw(model)
                if hasattr(self.task_show, "chat"):  # what needs somebody at the terminal comes last
                    self.task_show.chat(model)
        except (Exception, KeyboardInterrupt) as error:
            self.run.say(f"no samples ({type(error).__name__}: {error}); the result above is filed")
            self.run.failed = True

    def draw(self, model):
        """Samples into the run's folder and beside it, and quality numbers into the log."""
        folder = self.samples / self.run.run_id
        folder.mkdir(parents=True, exist_ok=True)
        numbers = self.task_show.show(model, folder)
        paths = sorted(folder.iterdir())
        for path in paths:
            shutil.copy(path, self.samples / path.name)
        self.run.say(f"samples: {', '.join(map(str, paths))}")
        for key, value in numbers.items():
            self.run.say(f"{key}: {value}")


def prepare(run, **data):
    """Open what showing the model of a run will need. Raises its script's Fault for what is not there."""
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
