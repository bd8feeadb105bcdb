"""What a training step of train_4m.py asks of a device: operators, each a launch on a GPU where nothing is compiled.

    python records/scaling.py --counted          # writes the table into docs/SCALING.md
"""
import collections
import contextlib
import dataclasses
import types
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from leaderboard import table

FREE = {"empty", "empty_like", "new_empty", "_unsafe_view", "_local_scalar_dense"}  # start no kernel; nor do views
PARTS = ("inputs and targets", "blocks", "rest of the model", "Muon", "Adam")


class Operators(TorchDispatchMode):
    """How many operators have computed something so far."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, arguments=(), named=None):
        aliases = [value.alias_info for value in operator._schema.returns]
        is_view = any(alias and not alias.is_write for alias in aliases)
        if not is_view and operator.overloadpacket.__name__ not in FREE:
            self.count += 1
        return operator(*arguments, **(named or {}))


def count(script, config, layout, tokens, step):
    """{part: operators} of one step on tokens (B, size), a batch that is computed at once."""
    model = script.Nano4M(config, layout)
    script.init_weights(model)
    run = types.SimpleNamespace(rank=0, world=1, precision="fp32", autocast=contextlib.nullcontext,
                                slice=lambda batch: slice(0, batch))
    muon, adam = script.make_optimizers(model, config, run)
    found, rng = collections.Counter(), torch.Generator()

    def train_step():
        script.train_step(step, tokens, rng, model, muon, adam, layout, config, run)

    train_step()  # Adam's first one makes its moments
    with Operators() as operators, contextlib.ExitStack() as patches:
        def counted(owner, name, part):
            plain = getattr(owner, name)

            def wrapper(*arguments):
                before = operators.count
                result = plain(*arguments)
                found[part] += operators.count - before
                return result
            patches.enter_context(mock.patch.object(owner, name, wrapper))

        for name in ("link_positions", "course_positions", "target_weights"):
            counted(script, name, "inputs and targets")
        counted(muon, "step", "Muon")
        counted(adam, "step", "Adam")
        train_step()
        found["model"] = operators.count - sum(found.values())
    return found


def report(script, layout, tokens):
    """The operators of steps of the gpu track by what they teach, as a Markdown table: those of the blocks are what a
    model without blocks does not have. How many there are is the same for any channels and scenes: few will do."""
    config = dataclasses.replace(script.CONFIGS["gpu"], dim=32, head_dim=32, batch=len(tokens))
    bare = dataclasses.replace(config, enc_depth=0, dec_depth=0)
    rows, links = [], {}
    for step in range(config.num_steps):
        links.setdefault(script.step_shape(step, config, layout)[0], step)
    for link, step in links.items():
        found = count(script, config, layout, tokens, step)
        found["rest of the model"] = count(script, bare, layout, tokens, step)["model"]
        found["blocks"] = found.pop("model") - found["rest of the model"]
        name = " -> ".join(", ".join(side) or "nothing" for side in link) if link else "any tokens -> any others"
        rows.append([name, *(found[part] for part in PARTS), sum(found.values())])
    return table("given -> asked|>" + "|>".join(PARTS) + "|>all", rows)
