"""What a speed-up buys: samples of two scripts or more after the same seconds of training, one below the other.

    python records/side_by_side.py baselines/train_4m_course.py train_4m.py [--at=10,60,300] [--seed=1 ...]

Trains the scripts one after another, each until the last of these seconds or its own end, draws samples whenever one
of them has passed, while the clock is paused, and writes docs/side_by_side/<task>.png. The fields go to all scripts.
"""
import argparse
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from rules import ROOT

FOLDER = ROOT / "docs" / "side_by_side"
sys.path.insert(0, str(ROOT / "data"))
import draw  # noqa: E402


class Seen(Exception):
    """The last sample is drawn: the rest of the run would show nothing more."""


def watch(path, times, fields):
    """Train a script: its task, and the rows of a sheet, a heading and samples for each of the times in seconds."""
    import show

    script = show.load_script(path)
    left, rows, found = sorted(times), [], {}

    class Run(script.Run):
        def prepare(self, model, **show_data):
            found.update(task=self.task, model=model)
            super().prepare(model, **show_data)
            if not getattr(self.samples.task_show, "glimpse", None):
                raise script.Fault(f"there are no samples to draw of a {self.task} in training")

        def progress(self, *step):
            super().progress(*step)
            while left and self.seconds + time.perf_counter() - self.started >= left[0]:
                left.pop(0)
                with self.paused(), self.autocast():
                    glimpse(self)
            if not left:
                self.bar.close()
                self.saver.close()
                raise Seen

        def result(self, model, *footer):
            with self.autocast():
                glimpse(self)
            super().result(model, *footer)

        def show(self, model):
            pass

    @torch.no_grad()
    def glimpse(run):
        shown, model = run.samples.task_show, found["model"]
        training = model.training
        model.eval()
        with tqdm(disable=True) as shown.bar, torch.compiler.set_stance("force_eager"):
            cells = shown.glimpse(model)
        model.train(training)
        how_far = f"after {run.seconds:.0f} s of training"
        if run.step == run.config.num_steps:
            how_far += ", at its end"
        rows.extend([f"{Path(path).name}, {how_far}", cells])

    script.Run = Run
    try:
        script.main(fields)
    except Seen:
        pass
    except script.Fault as fault:
        sys.exit(f"side_by_side.py: {path}: {fault}")
    return found["task"], rows


def main(paths, times, fields):
    seen = [watch(path, times, fields) for path in paths]
    tasks = {task for task, _ in seen}
    if len(tasks) > 1:
        sys.exit(f"side_by_side.py: scripts of one task are compared, not of {', '.join(sorted(tasks))}")
    path = FOLDER / f"{tasks.pop()}.png"
    draw.sheet([row for _, rows in seen for row in rows], path)
    print(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="+", help="training scripts of one task")
    parser.add_argument("--at", default="10,60,300", metavar="S,S,..", help="seconds of training")
    args, rest = parser.parse_known_args()
    for missing in [path for path in args.scripts if not Path(path).is_file()]:
        parser.error(f"there is no {missing}")
    try:
        seconds = [float(word) for word in args.at.split(",")]
    except ValueError:
        parser.error(f"--at={args.at} is not a list of seconds")
    main(args.scripts, seconds, rest)
