"""Loss and quality against seconds of training: what a run can do after how long.

    python records/curves.py train_4m.py baselines/train_4m_course.py --every=250 [--quality_scenes=200 ...]
    python records/curves.py --plot              # draw the plots again from what is there

Trains the scripts one after another and measures the numbers that a track has floors for at every evaluation, while
the clock is paused. Writes docs/curves/<script>.json and, for all scripts of one task, docs/curves/<task>.png. The
fields go to all of them. A run like that is no record: it is evaluated more often, and nothing is filed.
"""
import argparse
import json
import re
import sys
from pathlib import Path

from tqdm import tqdm

import leaderboard
from rules import ROOT

FOLDER = ROOT / "docs" / "curves"
TASKS = ("4m", "maskgit", "flow")  # whose samples are judged
sys.path.insert(0, str(ROOT / "data"))


def measure(path, fields):
    """Train a script and write {task, hardware, points: [{seconds, val_loss, quality_..}]}."""
    import machine
    import show

    script = show.load_script(path)
    evaluate = script.evaluate
    found = {"points": []}

    class Run(script.Run):
        def prepare(self, model, **show_data):
            if self.task not in TASKS:
                raise script.Fault(f"there is no judge for {self.task}, only for {', '.join(TASKS)}")
            found["run"] = self
            super().prepare(model, **show_data)

    def evaluate_and_judge(model, *arguments):
        result = evaluate(model, *arguments)
        run = found["run"]
        shown = run.samples.task_show
        with tqdm(disable=True) as shown.bar:
            numbers = shown.quality(model)
        quality = {key: value for key, value in numbers.items() if key.startswith("quality_") and value is not None}
        loss = result[0] if isinstance(result, tuple) else result
        point = {"step": run.step, "seconds": round(run.seconds, 1), "val_loss": round(loss, 4)}
        found["points"].append(point | quality)
        return result

    script.Run, script.evaluate = Run, evaluate_and_judge
    try:
        script.main(fields)
    except script.Fault as fault:
        sys.exit(f"curves.py: {path}: {fault}")
    run = found["run"]
    FOLDER.mkdir(exist_ok=True)
    about = {"script": Path(path).name, "task": run.task, "track": run.config.track, "fields": fields,
             "hardware": machine.hardware(run.device), "precision": run.precision}
    text = json.dumps(about | {"points": found["points"]}, indent=1)
    (FOLDER / f"{Path(path).stem}.json").write_text(re.sub(r"\n\s{2,}", " ", text) + "\n")


def draw_curves(axes, curves):
    """A panel per number, a line per script. curves: [(script, [points])], whose points have the same numbers."""
    values = {key: {point[key] for _, points in curves for point in points} for key in curves[0][1][0]}
    numbers = [key for key in values if key not in ("step", "seconds") and len(values[key]) > 1]
    for ax, key in zip(axes, numbers):
        for k, (name, points) in enumerate(curves):
            ax.plot([point["seconds"] for point in points], [point[key] for point in points], marker=".",
                    color=leaderboard.COLOURS[k], label=name if ax is axes[0] else "")
        ax.set(xlabel="train time (s)", title=key.removeprefix("quality_").replace("_", " "))
    for ax in axes[len(numbers):]:
        ax.axis("off")


def read_curves():
    """What has been measured: {task: [(script, [points])]}."""
    by_task = {}
    for path in sorted(FOLDER.glob("*.json")):
        found = json.loads(path.read_text())
        by_task.setdefault(found["task"], []).append((found["script"], found["points"]))
    return by_task


def plot():
    """A plot per task of all curves that there are."""
    for task, curves in read_curves().items():
        leaderboard.save_plot(FOLDER / f"{task}.png", draw_curves, curves, panels=(2, 4))
        print(FOLDER / f"{task}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", help="training scripts")
    parser.add_argument("--every", type=int, default=100, metavar="STEPS", help="steps between measurements")
    parser.add_argument("--plot", action="store_true", help="draw the plots alone")
    args, rest = parser.parse_known_args()
    if not args.scripts and not args.plot:
        parser.error("no script given; --plot draws what there is")
    for missing in [path for path in args.scripts if not Path(path).is_file()]:
        parser.error(f"there is no {missing}")
    for path in args.scripts:
        measure(path, [f"--eval_every={args.every}", *rest])
    plot()
