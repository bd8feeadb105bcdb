"""--log_to: what a run's evaluations found goes to trackio, wandb or TensorBoard as well, whichever the user installed.

A training script opens this before its clock starts, and has it send while the clock is paused.
"""
import importlib

PROJECT = "modded-nano4M"


def open_tracker(run):
    """A run of wandb or of trackio, which has the same interface: send(numbers, step=step)."""
    package = importlib.import_module(run.options.log_to)
    package.init(project=PROJECT, name=run.run_id, config=vars(run.config))
    return package.log


def open_tensorboard(run):
    """An event file in logs/<run id>/: send(numbers, step=step)."""
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(str(run.script.ROOT / "logs" / run.run_id))

    def send(numbers, step):
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return send


class Watch:
    """What --log_to names, opened for a run. Raises its script's Fault if that is not possible."""

    def __init__(self, run):
        self.name = run.options.log_to
        open_it = open_tensorboard if self.name == "tensorboard" else open_tracker
        try:
            self.send = open_it(run)
        except ImportError as error:
            sentence = f"--log_to={self.name} needs a package that is not here: `pip install {self.name}` ({error})"
            raise run.script.Fault(sentence) from None
        except Exception as error:  # no login, no network, a full disk: each has its own kinds
            reason = f"{type(error).__name__}: {error}"
            raise run.script.Fault(f"--log_to={self.name} could not be opened ({reason})") from None

    def log(self, run):
        """Send what an evaluation found. If that fails the run goes on: its own log has the same numbers."""
        numbers = {"val_loss": run.val_loss, "train_seconds": run.seconds}
        if run.loss is not None:  # each tenth step's is looked at
            numbers["loss"] = run.loss
        try:
            self.send(numbers, step=run.step)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            run.say(f"step {run.step} was not sent to {self.name} ({reason[:300]})")
