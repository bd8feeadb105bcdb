"""What a flow draws: every class, the way from noise to image, few steps against many; and quality numbers."""
import json

import numpy as np
import torch
from tqdm import tqdm

import checkpoints
import digits
import draw
import judge as judges
import world

STEPS = (1, 2, 4, 8, 16)  # of Euler's that quality is reported at
SHEET_STEPS = 25  # of Heun's that the sheet's classes are drawn in, and the images of a track's floors
CHURN = 0.5  # of Heun's: Frechet distances of six draws are 1.5 to 2.9, without 1.4 to 3.5, and more classes are right
GUIDANCE = 1.5  # of both, unless the model cannot be guided: after 2,700 steps the judge sees 94 % right, not 89 %
PART = 250  # images drawn at a time
DIGITS = "data/frozen/mnist32.npz", "data/mnist/val.npz"  # which digits.py judges
DIGITS_GUIDANCE = 3.0  # of 500 digits after 3,000 steps 92 % are right and the distance is 8.5, with 1.5 84 % and 12


def guidance_of(config):
    """How much the samples of a run are guided."""
    return DIGITS_GUIDANCE if config.frozen in DIGITS else GUIDANCE


def to_unit(images):
    """Images in [-1, 1] as floats in [0, 1] on the CPU."""
    return (images.float().cpu() + 1) / 2


def class_names(path, classes):
    """The names of the classes that a validation file tells, or else their numbers."""
    with np.load(path, allow_pickle=False) as arrays:
        about = json.loads(bytes(arrays["modalities"]))["label"]
    return about.get("names", [str(i) for i in range(classes)])


def churn_of(model, solver):
    """How much of it a solver's steps have. After reflow an image belongs to its noise, and new noise would mislead."""
    return CHURN if solver == "heun" and not getattr(model, "straight", False) else 0.0


class Show:
    """Opened before the clock starts: the names of the classes, and the judge of our objects or of digits."""

    def __init__(self, script, run, classes):
        self.script, self.seed = script, run.config.seed
        self.judge, self.names = None, class_names(script.ROOT / run.config.frozen, classes)
        if run.config.frozen in DIGITS:
            self.judge, self.reference = digits.load(run.device), "exact"
        elif run.config.frozen in [config.frozen for config in script.CONFIGS.values()]:
            self.judge, self.reference, self.names = judges.load(run.device), "objects_exact", world.CLASSES
        self.classes = torch.arange(classes, device=run.device)
        self.few = self.classes[::max(1, classes // 3)][:3]
        n = run.options.quality_pictures if self.judge else 0
        self.wanted = self.classes.repeat(-(-n // classes))[:n]
        # a model that never, or always, saw labels has nothing to be guided by; one class is all images
        guided = classes > 1 and any(0 < share < 1 for share in checkpoints.label_drops(run))
        self.guidances = (1.0, guidance_of(run.config)) if guided else (1.0,)

    def show(self, model, folder):
        if len(self.classes) == 1:
            tqdm.write("one class: guidance has nothing to tell apart and is off")
        image_steps = 4 * len(self.classes) * SHEET_STEPS
        image_steps += sum(STEPS) * (len(self.few) * len(self.guidances) + len(self.wanted))
        image_steps += SHEET_STEPS * len(self.wanted)
        with tqdm(total=image_steps, desc="samples", unit=" image steps", dynamic_ncols=True) as bar:
            self.bar = bar
            self.sheet(model, folder)
            return self.quality(model)

    def sample(self, model, labels, steps, solver="euler", **settings):
        """What the script's sample returns; counted by the bar."""
        self.bar.set_postfix_str(f"{len(labels)} images in {steps} steps")
        made = self.script.sample(model, labels, steps, solver, churn=churn_of(model, solver), **settings)
        self.bar.update(len(labels) * steps)
        return made

    def sheet(self, model, folder):
        """Write flow.png, the labelled grid, and flow.gif, every class on its way from noise."""
        labels = self.classes.repeat_interleave(4)
        settings = {"guidance": self.guidances[-1], "return_trajectory": True}
        made, trajectory = self.sample(model, labels, SHEET_STEPS, "heun", **settings)
        made = to_unit(made)
        cells = [(image, self.names[label]) for image, label in zip(made, labels.tolist())]
        rows = ["four draws of every class", *(cells[i:i + 8] for i in range(0, len(cells), 8))]
        rows.append("from noise to picture")
        rows += [[(to_unit(z[i]), f"t = {t:.2f}") for t, z in trajectory[::3]] for i in (0, len(labels) // 2)]
        rows += self.few_steps(model)
        draw.sheet(rows, folder / "flow.png")
        draw.animation([*(to_unit(z[::4]) for _, z in trajectory[::2]), made[::4]], folder / "flow.gif")

    def glimpse(self, model):
        """Cells of a sheet: a draw of eight classes each."""
        labels = self.classes[::max(1, len(self.classes) // 8)][:8]
        made = to_unit(self.sample(model, labels, SHEET_STEPS, "heun", guidance=self.guidances[-1]))
        return [(image, self.names[label]) for image, label in zip(made, labels.tolist())]

    def few_steps(self, model):
        """Rows of the sheet: the same noise in ever more steps, without and with guidance."""
        heading = "the same noise in 1, 2, 4, 8 and 16 steps of Euler's"
        if len(self.guidances) > 1:
            heading += f", every second row with guidance {self.guidances[-1]}"
        draws = {}
        for steps in STEPS:
            for guidance in self.guidances:
                draws[steps, guidance] = to_unit(self.sample(model, self.few, steps, guidance=guidance))
        rows = [[(draws[steps, guidance][i], f"{steps}") for steps in STEPS]
                for i in range(len(self.few)) for guidance in self.guidances]
        return [heading, *rows]

    def quality(self, model):
        """How often the judge sees the class that was asked for, and Frechet distances, by number of steps."""
        if not len(self.wanted):
            return {}
        numbers = {}
        for steps in STEPS:
            accuracy, distance = self.judged(model, steps, "euler")
            numbers |= {f"accuracy_{steps}_steps": accuracy, f"frechet_{steps}_steps": distance}
        accuracy, distance = self.judged(model, SHEET_STEPS, "heun")
        return numbers | {"quality_class_accuracy": accuracy, "quality_frechet": distance,
                          "quality_steps": SHEET_STEPS, "quality_solver": "heun",
                          "quality_churn": churn_of(model, "heun"), "quality_guidance": self.guidances[-1]}

    def judged(self, model, steps, solver):
        """Class accuracy and Frechet distance of the wanted images. Each of a run's seeds has other noise: 1,000 real
        pictures have a distance of 0.5, another 1,000 one of 1.3."""
        parts = enumerate(self.wanted.split(PART), 1000 * self.seed)
        made = [self.sample(model, part, steps, solver, guidance=self.guidances[-1], seed=i) for i, part in parts]
        made = to_unit(torch.cat(made))
        return (round(self.judge.accuracy(made, self.wanted), 4),
                round(self.judge.frechet_distance(made, self.reference), 3))
