"""A training script's command line: --help, and one sentence for whatever it may not say.

A script reads its options itself, in a dozen lines, once they have been checked here; one that stands alone does
without. script is its module, with its Config, Options, CONFIGS and LIMITS.
"""
import inspect
import math
import sys

import torch

LIMITS = {  # what fields of several scripts may be: least and most, or choices; any other number is at least 0
    "seed": (0, 2 ** 31), "mlp_ratio": (1, 16), "momentum": (0, 0.9999), "beta1": (0, 0.9999), "beta2": (0, 0.9999),
    "clip": (1e-9, math.inf), "micro_batch": (1, math.inf), "label_drop": (0, 1), "cooldown": (0.001, 1),
    "eval_every": (1, math.inf), "precision": ("auto", "fp32", "bf16"),
    "log_to": ("none", "trackio", "wandb", "tensorboard"),
}


def check(script, argv):
    """Raises script.Fault for arguments that script.read_options could not use; --help ends the process."""
    if "--help" in argv or "-h" in argv:
        show_help(script)
        sys.exit()
    given = {}
    for argument in argv:
        key, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals:
            raise script.Fault(f"arguments look like --field=value, not {argument!r}; --help lists the fields")
        given[key] = text
    track = given.get("track", "gpu" if torch.cuda.is_available() else "cpu")
    if track not in script.CONFIGS:
        raise script.Fault(f"--track={track} is not one of {', '.join(script.CONFIGS)}")
    fields = vars(script.CONFIGS[track]) | vars(script.Options())
    for key, text in given.items():
        if key not in fields:
            raise script.Fault(f"there is no field --{key}; --help lists the fields")
        parse(script, key, text, type(fields[key]))


def show_help(script):
    fields = vars(script.Config()) | vars(script.Options())
    print(script.__doc__, *map(inspect.getsource, (script.Config, script.Options, script.check_config)), sep="\n")
    limits = [f"{key} in {values}" for key, values in (LIMITS | script.LIMITS).items() if key in fields]
    print("Numbers are at least 0, and", *limits, sep="\n    ")


def parse(script, key, text, kind):
    """A field's value from its text: of its type, and what its limits allow. Raises script.Fault."""
    limits = LIMITS | script.LIMITS
    try:
        value = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise script.Fault(f"--{key}={text} is not of type {kind.__name__}") from None
    if kind is str and value not in limits.get(key, [value]):
        raise script.Fault(f"--{key}={text} is not one of {', '.join(limits[key])}")
    if kind in (int, float):
        least, most = limits.get(key, (0, math.inf))
        if not least <= value <= most or not math.isfinite(value):
            raise script.Fault(f"--{key}={text} is not a number from {least} to {most}")
    return value
