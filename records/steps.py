"""How good a flow's samples are by the number of Euler's steps, of several runs: before and after reflow, say.

    python records/steps.py docs/flow.log docs/flow_reflow.log records/flow-cpu/<record>/0.log

Writes docs/flow_steps.png: the judge's class accuracy and Frechet distance as the logs have them, a line per log.
"""
import argparse
import re
from pathlib import Path

import leaderboard
from orders import draw_orders
from rules import ROOT, parse_log

PLOT = ROOT / "docs" / "flow_steps.png"


def read(path):
    """What a log's run is called in the plot, and its {steps: [class accuracy, Frechet distance]}."""
    numbers = parse_log(path)["footer"]
    steps = sorted(int(key.split("_")[1]) for key in numbers if re.fullmatch(r"accuracy_\d+_steps", key))
    if not steps:
        raise ValueError(f"{path} has no accuracy by steps, as logs of train_flow.py have")
    fields = " ".join(re.findall(r"--reflow=\d+", str(numbers.get("overrides", ""))))
    name = f"{numbers['script']} {fields}".strip()
    return name, {n: [numbers[f"accuracy_{n}_steps"], numbers[f"frechet_{n}_steps"]] for n in steps}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", type=Path)
    args = parser.parse_args()
    try:
        found = {}
        for name, numbers in map(read, args.logs):
            found[f"{name} ({len(found) + 1})" if name in found else name] = numbers
    except (ValueError, OSError) as error:
        parser.error(str(error))
    leaderboard.save_plot(PLOT, draw_orders, found, panels=(1, 2))
    print(PLOT)
