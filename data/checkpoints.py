"""Weights and states on disk: what --save, --load, --save_every and --resume do, and what a signal has saved.

From Python: weights, config = checkpoints.read_checkpoint(train_4m, "checkpoints/4m.safetensors", train_4m.CONFIGS["cpu"])
The path may also be a model of the Hugging Face hub, hf:owner/name[@revision].
"""
import dataclasses
import hashlib
import json
import os
import signal
import sys
import zipfile

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

import options
from shards import check_file, first_line, printable

FULL_STATE = StateDictOptions(full_state_dict=True)  # of a model that is sharded, too
ON_RANK_0 = StateDictOptions(full_state_dict=True, cpu_offload=True)
COUNTERS = ("step", "tokens", "flops", "seconds")  # of a Run
# fields of Config that a resumed run may have another of
MAY_CHANGE = {"num_steps", "eval_every", "target", "shard", "recompute"}


def write_safely(path, save, value, *more):
    """save(value, a temporary path, *more), then rename: a full disk leaves what was there. What went wrong, or ""."""
    part = path.with_name(path.name + ".part")
    try:
        save(value, part, *more)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        return f"{path} could not be written ({str(error).splitlines()[0]}); what was there before is kept"
    return ""


# ------------------------------------------------------------------------------------------------------------
# Weights

def model_sha256(script):
    """Hash of a script's Model section: by another one a checkpoint's weights may mean other things."""
    code = script.HERE.read_text().partition("\n# Model\n")[2].partition("\n# Loss\n")[0]
    return hashlib.sha256(code.encode()).hexdigest()


def with_later_fields(script, config):
    """A saved Config and what fields its script did not have yet: what it could not do was off."""
    return {key: value for key, value in vars(script.Config()).items() if value == 0} | config


def save_weights(run, model):
    """Write the weights of a model that is whole, in half precision, with what they need. Returns whether that worked."""
    path = run.script.ROOT / "checkpoints" / f"{run.run_id}.safetensors"
    half = {name: value.half().contiguous().cpu() for name, value in model.state_dict().items()}
    about = {"config": json.dumps(vars(run.config)), "model_sha256": model_sha256(run.script), "run_id": run.run_id}
    problem = write_safely(path, save_file, half, about)
    run.say(problem or f"weights in {path}")
    return not problem


def fetch(script, path):
    """Where a checkpoint is on disk; hf:owner/name[@revision] comes from the Hugging Face hub, once."""
    if not str(path).startswith("hf:"):
        return script.ROOT / path
    import hub  # here, as most runs need none
    try:
        return hub.fetch_model(str(path).removeprefix("hf:"))
    except hub.Fault as fault:
        raise script.Fault(str(fault)) from None


def check_widths(script, architecture, weights, path):
    """Raises script.Fault for a width that no weight has. The model is made before its weights are found to be of
    another one, and one that is much too wide would take all memory."""
    sizes = {size for weight in weights.values() for size in weight.shape}
    for key, width in architecture.items():
        if key in ("dim", "vit_dim", "lm_dim") and width not in sizes:
            raise script.Fault(f"{path} does not fit this model: none of its weights is for --{key}={width}")


class Weights(dict):
    """Tensors by name, with the config of the run that saved them, and whether its Model section was another one."""

    def __init__(self, tensors, config, other_code):
        super().__init__(tensors)
        self.config, self.other_code = config, other_code


def warning(path):
    return f"{path} was written by another Model section than this one: its results may differ"


def read_checkpoint(script, path, config, given=()):
    """Weights that a run of a script (a module) saved, and config with the architecture that they are for.

    given: fields of config that were asked for. Where they are those of a command line, {field: text}, and name no
    track, config becomes that of the checkpoint's track, whatever the machine's default. Raises script.Fault for what
    cannot be read, or is of other fields.
    """
    file_path = fetch(script, path)
    try:
        check_file(file_path)
        with safe_open(file_path, "pt") as file:
            about = file.metadata()
            saved = with_later_fields(script, json.loads(about["config"]))
            # of the fields' types and within their limits
            architecture = {key: options.parse(script, key, str(saved[key]), type(getattr(config, key)))
                            for key in script.ARCHITECTURE}
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}
    except Exception as error:  # safetensors raises its own kinds
        reason = printable(f"{type(error).__name__}: {error}")
        raise script.Fault(f"{path} is not a checkpoint of this script ({reason})") from None
    if isinstance(given, dict) and "track" not in given and saved.get("track") in script.CONFIGS:
        words = {"track": saved["track"], **given}
        config, *_ = script.read_options([f"--{key}={text}" for key, text in words.items()])
    code = model_sha256(script)
    weights = Weights(tensors, saved, about.get("model_sha256", code) != code)
    check_widths(script, architecture, weights, path)
    for key, value in architecture.items():
        if key in given and getattr(config, key) != value:
            raise script.Fault(f"{path} was trained with --{key}={value}: leave it out, the checkpoint has its own")
    if weights.other_code and os.environ.get("RANK", "0") == "0":
        print(f"{script.HERE.name}: {warning(path)}")
    return weights, dataclasses.replace(config, **architecture)


def load_weights(script, model, weights, path):
    """Put the weights of a checkpoint into a model. Raises script.Fault for those of another one."""
    try:
        set_model_state_dict(model, weights, options=FULL_STATE)
    except RuntimeError as error:
        raise script.Fault(f"{path} does not fit this model: {str(error)[:200]}") from None


def loaded_label_drop(run):
    """The share of labels that the model of a checkpoint has learned without."""
    drop = run.weights.config.get("label_drop", run.config.label_drop)
    return options.parse(run.script, "label_drop", str(drop), float)


def label_drops(run):
    """Every share of labels that a run's model has learned without: that of a checkpoint's run and its own."""
    own = run.config.label_drop
    if not run.options.load:
        return {own}
    loaded = loaded_label_drop(run)
    return {loaded, own} if run.config.num_steps else {loaded}


# ------------------------------------------------------------------------------------------------------------
# States

class Saver:
    """Saves the state of a run whenever save_every, which also means its end, or a signal says so.

    SIGTERM, as SLURM sends it, and Ctrl-C also end the run; a second one does so at once, and so does the first where
    nothing is trained.
    """

    def __init__(self, run):
        self.run, self.signals = run, []
        if run.config.num_steps:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self.receive)
        if run.file and run.options.load and run.weights.other_code:  # the log had not been opened when it was read
            run.file.write(warning(run.options.load) + "\n")

    def receive(self, number, frame):
        self.signals.append(number)
        signal.signal(number, signal.default_int_handler)

    def close(self):
        """Signals end the process again."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def after_step(self, model, muon, adam, loader):
        if action := self.next_action():
            self.save(action, model, muon, adam, loader)

    def next_action(self):
        """ "stop" once a signal has reached any rank, "save" every save_every steps and after the last one, else ""."""
        run = self.run
        if run.step == run.config.num_steps:  # too late to stop; from this state the run can be made longer
            return "save" if run.options.save_every else ""
        stop = bool(self.signals) and run.world == 1
        if run.world > 1 and run.step % 10 == 0:  # ranks hear of a signal at different steps: here they agree
            flag = torch.tensor(len(self.signals), device=run.device)
            dist.all_reduce(flag)
            stop = flag.item() > 0
        if stop:
            return "stop"
        due = run.options.save_every and run.step % run.options.save_every == 0
        return "save" if due else ""

    def save(self, action, model, muon, adam, loader):
        """Save all that the rest of the run depends on, for any number of processes. "stop" then ends this one."""
        run = self.run
        with run.paused():
            counters = {name: getattr(run, name) for name in COUNTERS}
            state = {"config": vars(run.config), "precision": run.precision, "data_sha256": run.data_sha256,
                     "counters": counters, "model": get_model_state_dict(model, options=ON_RANK_0),
                     "adam": adam.state_dict(), "muon": muon.momentum_buffers() if muon else [], "loader": loader.state_dict()}
            path = run.script.ROOT / (run.options.resume or f"checkpoints/{run.run_id}.state.pt")
            problem = write_safely(path, torch.save, state) if run.rank == 0 else ""
            run.say(problem or f"state of step {run.step} in {path}")
        if action == "stop":
            run.say(f"stopped: continue with the same command and --resume={path}")
            if run.world > 1:
                dist.destroy_process_group()
            sys.exit(1 if problem else 0)


def check_whole(path):
    """Raises an exception, of any kind, unless every part of a file of torch.save is what was written. torch.load would
    read a changed one all the same."""
    check_file(path)
    with zipfile.ZipFile(path) as parts:
        if name := parts.testzip():
            raise ValueError(f"{name} in it is damaged")


def read_state(run):
    """What a Saver wrote of this run, which goes on in its precision. It may go on for more steps than planned, or be
    evaluated more often."""
    script, path, config = run.script, run.options.resume, vars(run.config)
    if not run.config.num_steps:
        raise script.Fault("--resume continues a run: pass its --num_steps, or --load to evaluate a checkpoint")
    try:
        check_whole(script.ROOT / path)
        state = torch.load(script.ROOT / path, map_location="cpu", weights_only=True)
        saved = with_later_fields(script, dict(state["config"]))
        state["counters"] = {name: state["counters"][name] for name in COUNTERS}
        if missing := {"data_sha256", "model", "muon", "adam", "loader"} - state.keys():
            raise KeyError(missing.pop())
        if not state["model"]:  # which torch would take for one without parameters
            raise ValueError("it has no parameters")
    except Exception as error:  # torch.load raises many kinds
        reason = printable(f"{type(error).__name__}: {first_line(error)}")
        raise script.Fault(f"--resume={path} is not the state of a run ({reason})") from None
    fixed = sorted(config.keys() - MAY_CHANGE)
    if different := [f"--{key}={saved.get(key)}" for key in fixed if saved.get(key) != config[key]]:
        raise script.Fault(f"--resume={path} is of a run with {' '.join(different)}: pass the same")
    if state["data_sha256"] != run.data_sha256:
        raise script.Fault(f"--resume={path} is of a run on other training data")
    if (step := state["counters"]["step"]) > run.config.num_steps:
        raise script.Fault(f"--resume={path} is at step {step}, beyond --num_steps={run.config.num_steps}")
    precision = state.get("precision", run.precision)  # older ones do not say
    if run.options.precision not in ("auto", precision) or precision not in script.PRECISIONS:
        raise script.Fault(f"--resume={path} is of a run with --precision={precision}: pass the same, or none")
    run.precision = precision
    return state


def load_state(run, model, muon, adam, loader):
    """Put what read_state found back to where it came from. The clock resumes where it was. Raises script.Fault."""
    state = run.state
    if run.world > 1:  # each machine may have a file of its own
        everyones = [None] * run.world
        dist.all_gather_object(everyones, (state["counters"]["step"], state["counters"]["seconds"]))
        if len(set(everyones)) > 1:
            steps = ", ".join(str(step) for step, _ in everyones)
            raise run.script.Fault(f"--resume={run.options.resume} is not the same state on all ranks, which have steps "
                                   f"{steps}: copy that of rank 0 to the other machines")
    try:
        set_model_state_dict(model, state["model"], options=FULL_STATE)
        if muon:
            load_momentum(muon, state["muon"])
        adam.load_state_dict(state["adam"])
        loader.load_state_dict(state["loader"])
    except Exception as error:  # of many kinds, for one of other shapes
        reason = printable(f"{type(error).__name__}: {error}")
        raise run.script.Fault(f"--resume={run.options.resume} does not fit this run ({reason})") from None
    vars(run).update(state["counters"])
    run.bar.update(run.step)
    planned, num_steps = state["config"]["num_steps"], run.config.num_steps
    if planned != num_steps:
        run.say(f"{planned} steps were planned, {num_steps} are now: from step {run.step} on the learning rates are those "
                "of the longer run")
    run.started = run.now()


def load_momentum(muon, buffers):
    """Give a Muon its rank's part of what Muon.momentum_buffers gathered, of any number of ranks."""
    for (params, shard), whole in zip(muon.stacks, buffers, strict=True):
        first, last = (min(r * len(shard), len(params)) for r in (muon.rank, muon.rank + 1))
        shard[:last - first] = whole[first:last].to(shard.device)
