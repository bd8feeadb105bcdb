"""What --load and --resume read: the weights that a run saved, and the state that a run was in when it was cut off.

From Python: weights, config = checkpoints.read_checkpoint(train_4m, "data/frozen/4m.safetensors", train_4m.CONFIGS["cpu"])
"""
import dataclasses
import json

import torch
from safetensors import safe_open
from torch.distributed.checkpoint.state_dict import set_model_state_dict


def read_checkpoint(script, path, config, given=()):
    """Weights that a run of a script (a module) saved, and config with the architecture that they are for.

    given: fields of config that were asked for. Raises script.Fault for what cannot be read, or is of other fields.
    """
    try:
        with safe_open(script.ROOT / path, "pt") as file:
            about = file.metadata()
            weights = {name: file.get_tensor(name).float() for name in file.keys()}
        saved = json.loads(about["config"])
        architecture = {key: saved[key] for key in script.ARCHITECTURE}
    except Exception as error:  # safetensors raises its own kinds
        raise script.Fault(f"{path} is not a checkpoint of this script ({type(error).__name__}: {error})") from None
    for key, value in architecture.items():
        if key in given and getattr(config, key) != value:
            raise script.Fault(f"{path} was trained with --{key}={value}: leave it out, the checkpoint has its own")
    if about.get("model_sha256", script.model_sha256()) != script.model_sha256():
        print(f"{script.HERE.name}: {path} was written by another Model section than this one: its results may differ")
    return weights, dataclasses.replace(config, **architecture)


def load_weights(script, model, weights, path):
    """Put the weights of a checkpoint into a model. Raises script.Fault for those of another one."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise script.Fault(f"{path} does not fit this model: {str(error)[:200]}") from None


def read_state(run):
    """What Run.save_state wrote of this run. It may go on for more steps than planned, or be evaluated more often."""
    script, path, config = run.script, run.options.resume, vars(run.config)
    if not run.config.num_steps:
        raise script.Fault("--resume continues a run: pass its --num_steps, or --load to evaluate a checkpoint")
    try:
        state = torch.load(script.ROOT / path, map_location="cpu", weights_only=True)
        saved, step = state["config"], state["counters"]["step"]
    except Exception as error:  # torch.load raises many kinds
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise script.Fault(f"--resume={path} is not the state of a run ({reason})") from None
    fixed = config.keys() - {"num_steps", "eval_every", "target", "shard"}
    if different := [f"--{key}={saved.get(key)}" for key in sorted(fixed) if saved.get(key) != config[key]]:
        raise script.Fault(f"--resume={path} is of a run with {' '.join(different)}: pass the same")
    if step > run.config.num_steps:
        raise script.Fault(f"--resume={path} is at step {step}, beyond --num_steps={run.config.num_steps}")
    if state["data_sha256"] != run.data_sha256:
        raise script.Fault(f"--resume={path} is of a run on other training data")
    return state


def load_momentum(muon, buffers):
    """Give a Muon its rank's part of what Muon.momentum_buffers gathered, of any number of ranks."""
    for (params, shard), whole in zip(muon.stacks, buffers):
        first, last = (min(r * len(shard), len(params)) for r in (muon.rank, muon.rank + 1))
        shard[:last - first] = whole[first:last].to(shard.device)


def load_state(run, model, muon, adam, loader):
    """Put what read_state found back to where it came from. The clock resumes where it was."""
    state = run.state
    set_model_state_dict(model, state["model"], options=run.script.FULL_STATE)
    if muon:
        load_momentum(muon, state["muon"])
    adam.load_state_dict(state["adam"])
    loader.load_state_dict(state["loader"])
    vars(run).update(state["counters"])
    run.bar.update(run.step)
    planned, num_steps = state["config"]["num_steps"], run.config.num_steps
    if planned != num_steps:
        run.say(f"{planned} steps were planned, {num_steps} are now: from step {run.step} on the learning rates are those "
                "of the longer run")
    run.started = run.now()
