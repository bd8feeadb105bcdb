"""How good a MaskGIT's pictures are by the number of its network evaluations and the order in which places are filled.

    python records/orders.py --load=checkpoints/<run id>.safetensors [--quality_pictures=240 ...]
    python records/orders.py --plot              # draw the plot again from what is there

Writes docs/maskgit_orders.json and .png: the judge's class accuracy and Frechet distance. All fields of
train_maskgit.py are understood.
"""
import argparse
import functools
import json
import re
import sys

import torch
from tqdm import tqdm

import leaderboard
from rules import ROOT

DOCS = ROOT / "docs"
STEPS = (1, 2, 4, 8, 16, 32, 64)
NOISE = 4.5  # times Gumbel noise on the log-probabilities of the surest, in MaskGIT; it falls to 0
NUMBERS = ("class accuracy", "Frechet distance")


def orders(halton):
    """{name: (order of places (L,) or None for the surest first, noise)}."""
    L, rng = len(halton), torch.Generator().manual_seed(0)
    return {"Halton": (halton, NOISE), "random": (torch.randperm(L, generator=rng), NOISE),
            "row by row": (torch.arange(L), NOISE), "surest first, as MaskGIT": (None, NOISE),
            "surest first, no noise": (None, 0.0)}


def measure(fields):
    """{order: {steps: [class accuracy, Frechet distance]}} of a checkpoint, and where it was measured; written down."""
    sys.path.insert(0, str(ROOT / "data"))
    import machine
    import show

    script = show.load_script(ROOT / "train_maskgit.py")
    generate, found = script.generate, {}

    class Run(script.Run):
        def show(self, model):
            """Instead of samples: the judge's numbers for every order and number of steps."""
            shown = self.samples.task_show
            names = orders(shown.order)
            with self.autocast(), torch.no_grad(), tqdm(total=len(names) * len(STEPS), unit="setting") as bar:
                shown.bar = tqdm(disable=True)
                for name, (shown.order, noise) in names.items():
                    script.generate = functools.partial(generate, noise=noise)
                    found[name] = {}
                    for steps in STEPS:
                        bar.set_postfix_str(f"{name}, {steps} steps")
                        found[name][steps] = shown.judged(model, steps, shown.per_class)
                        bar.update()
            about = {"fields": fields, "pictures": shown.per_class * len(shown.classes), "guidance": shown.guidance,
                     "hardware": machine.hardware(self.device), "precision": self.precision}
            text = json.dumps(about | {"orders": found}, indent=1)
            (DOCS / "maskgit_orders.json").write_text(re.sub(r"\n\s{2,}", " ", text) + "\n")

    script.Run = Run
    try:
        script.main(["--num_steps=0", *fields])
    except script.Fault as fault:
        sys.exit(f"orders.py: {fault}")


def draw_orders(axes, found):
    """A panel per number, a line per order. found: {order: {steps: [numbers]}}."""
    for i, (ax, number) in enumerate(zip(axes, NUMBERS)):
        for k, (name, numbers) in enumerate(found.items()):
            ax.plot([int(steps) for steps in numbers], [values[i] for values in numbers.values()], marker=".",
                    color=leaderboard.COLOURS[k], label=name if i == 0 else "")
        ax.set_xscale("log", base=2)
        ax.set(xlabel="network evaluations", title=number)
    axes[1].set_yscale("log")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", action="store_true", help="draw the plot alone")
    args, fields = parser.parse_known_args()
    if not args.plot and not any(field.startswith("--load=") for field in fields):
        parser.error("no --load=checkpoint given; --plot draws what there is")
    if not args.plot:
        measure(fields)
    found = json.loads((DOCS / "maskgit_orders.json").read_text())["orders"]
    leaderboard.save_plot(DOCS / "maskgit_orders.png", draw_orders, found, panels=(1, 2))
    print(DOCS / "maskgit_orders.png")
