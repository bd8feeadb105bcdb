"""The validation loss as the course computes it, beside that of the frozen evaluation: for train_4m.py --track=course.

Its masks are those of the course's own code, drawn once by course.py (course_roles): of four modalities, captions left
out, and with the padding of a text among inputs and targets. Its loss is the mean over modalities of each one's mean.
"""
import numpy as np
import torch
import torch.distributed as dist

from shards import check_file, printable


class CourseLoss:
    """Opened before the clock. Raises the script's Fault for a validation set that course.py has not made."""

    def __init__(self, run):
        self.run, self.script = run, run.script
        path, make = self.script.ROOT / run.config.frozen, "`python data/course.py ROOT`"
        try:
            check_file(path)
            with np.load(path, allow_pickle=False) as arrays:
                self.roles = torch.from_numpy(arrays["course_roles"])
        except FileNotFoundError:
            raise self.script.Fault(f"no validation data at {path}: {make} makes them of the course's folder") from None
        except Exception as error:  # numpy, zipfile and zlib have many kinds
            reason = printable(f"{type(error).__name__}: {error}", 300)
            raise self.script.Fault(f"{path} cannot be evaluated on ({reason}): the track needs what {make} "
                                    "writes") from None

    @torch.no_grad()
    def measure(self, model, tokens, layout):
        """Say the loss of validation tokens (n, size); its numbers for the footer. Ranks share the scenes."""
        rank, world, batch = self.run.rank, self.run.world, self.script.EVAL_BATCH
        total = torch.zeros(2, len(layout.modalities), dtype=torch.float64, device=tokens.device)  # nats and targets
        for i in range(rank * batch, len(tokens), world * batch):
            part, role = tokens[i:i + batch], self.roles[i:i + batch].to(tokens.device)
            log_probs, places, counted = self.script.predict_targets(model, part, role, layout.vocab)
            nll = -log_probs.gather(2, part.gather(1, places)[..., None])[..., 0][counted].double()
            total.index_add_(1, layout.kind[places][counted], torch.stack([nll, torch.ones_like(nll)]))
        if world > 1:
            dist.all_reduce(total)
        nats, targets = total.tolist()
        means = {m: nats[k] / targets[k] for k, m in enumerate(layout.modalities) if targets[k]}
        loss, of_all = sum(means.values()) / len(means), sum(nats) / sum(targets)
        self.run.say(f"as the course counts, padding included: {loss:.4f}, and {of_all:.4f} over all targets alike")
        numbers = {"course_loss": loss, "course_loss_all": of_all, **{f"course_loss_{m}": means[m] for m in means}}
        return {name: round(value, 4) for name, value in numbers.items()}
