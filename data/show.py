"""What a trained model can do: samples, quality numbers, texts and chat. All of it happens after a training clock.

A training script opens this before its clock starts, so that what is missing is noticed then, and uses it once the
result is filed. It is a command as well, which evaluates a checkpoint and shows what it can do:

    python data/show.py train_4m.py --load=data/frozen/4m.safetensors [--quality_scenes=50 ...]

The samples of a run are in samples/<run id>/, those of the latest run in samples/ itself as well.
"""
import importlib
import importlib.util
import shutil
import sys
from pathlib import Path


class Prepared:
    """show_<task>.Show of a run, and where its samples go."""

    def __init__(self, task_show, script, run):
        self.task_show, self.samples, self.run = task_show, script.ROOT / "samples", run

    def show(self, model):
        """Draw samples: numbers for the footer, {name: value}."""
        folder = self.samples / self.run.run_id
        folder.mkdir(parents=True, exist_ok=True)
        model.eval()
        numbers = self.task_show.show(model, folder)
        for path in sorted(folder.iterdir()):
            shutil.copy(path, self.samples / path.name)
            self.run.say(f"samples: {path}")
        return numbers

    def chat(self, model):
        """What needs somebody at the terminal comes last."""
        if hasattr(self.task_show, "chat"):
            self.task_show.chat(model)


def prepare(script, run, **data):
    """Open what showing a model of this script (a module) will need. Raises script.Fault for what is not there."""
    module = importlib.import_module(f"show_{run.task}")
    return Prepared(module.Show(script, run, **data), script, run)


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
