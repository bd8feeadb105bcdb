"""What the Hugging Face hub is shown of a checkpoint: its model card, config.json and loss curve.

For the commands of hub.py. All of it is what the run left behind: the checkpoint says which one saved it, numbers and
losses are those of logs/<run id>.txt, samples those of samples/<run id>/.
"""
import ast
import json
import shlex
import shutil
import sys
import textwrap

from huggingface_hub import ModelCardData
from safetensors import safe_open

from shards import ROOT, Fault, check_file, first_line

REPOSITORY = ROOT.parent
sys.path.append(str(REPOSITORY / "records"))
import leaderboard  # noqa: E402
import rules  # noqa: E402

KINDS = {  # of each task: the hub's name for what it does, if it has one, and tags
    "4m": ("any-to-any", ["4m", "multimodal", "masked-modeling"]),
    "gpt": ("text-generation", ["gpt", "language-model"]),
    "maskgit": (None, ["maskgit", "class-conditional-image-generation"]),
    "flow": (None, ["rectified-flow", "dit", "class-conditional-image-generation"]),
    "vlm": ("image-text-to-text", ["vlm", "visual-question-answering"]),
}
NUMBERS = """val_loss train_seconds steps tokens parameters hardware world_size precision data_sha256
    eval_sha256""".split()  # of a footer; those that begin with the following are shown, too
MORE_NUMBERS = ("val_loss_", "quality_", "accuracy_", "frechet_")
DATA_FIELDS = ("data", "pixels", "frozen", "frozen_masks", "frozen_draws", "vit", "lm")  # that --load needs again
SAMPLE_CHARACTERS = 2000  # of a text
CARD = """---
{front}
---

# {name}

{what}

Trained by `{script}` of modded-nano4M, wall-clock speed runs with one file per model family, in {seconds:.1f} s on
{hardware}: {steps:,} steps, validation loss {loss:.4f}. The weights are in half precision.

## Use

In a copy of modded-nano4M, to evaluate it and to draw samples:

```bash
{command}
```

## Loss

{curve}

## Numbers

{numbers}

{sample}"""


def build(path, folder, repo="owner/name"):
    """Write README.md, config.json and pictures for a checkpoint into a folder: the text of README.md. Raises Fault."""
    about, log, settings = read_run(path)
    try:
        return write(about, log, settings, folder, repo)
    except OSError:
        raise
    except Exception as error:  # of many kinds: whatever somebody has made of a log
        raise Fault(f"{log['path']} is damaged ({type(error).__name__}: {first_line(error)})") from None


def write(about, log, settings, folder, repo):
    """What build does, of what read_run has found."""
    footer, run_id = log["footer"], log["path"].stem
    config = {"library_name": "modded-nano4M", **{key: footer[key] for key in ("script", "task", "track")},
              "run_id": run_id, "git": settings.get("git"), "model_sha256": about.get("model_sha256"),
              "config": json.loads(about["config"])}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    pipeline, tags = KINDS.get(footer["task"], (None, []))
    front = ModelCardData(license="mit", library_name="modded-nano4M", pipeline_tag=pipeline, tags=tags)
    name, _, what = (ast.get_docstring(ast.parse(log["source"])) or "").partition("\n")[0].partition(": ")
    text = CARD.format(front=front.to_yaml(), name=name, what=what[:1].upper() + what[1:], script=footer["script"],
                       seconds=footer["train_seconds"], hardware=footer["hardware"], steps=footer["steps"],
                       loss=footer["val_loss"], command=command(footer, settings, repo), curve=curve(log, folder),
                       numbers=numbers(footer), sample=sample(run_id, folder))
    text = text.strip() + "\n"
    (folder / "README.md").write_text(text, encoding="utf-8")
    return text


def read_run(path):
    """What a checkpoint says of itself, {name: text}, its run's log as rules.parse_log gives it, and the settings."""
    try:
        check_file(path)
        with safe_open(path, "np") as file:
            about = file.metadata()
        json.loads(about["config"])
    except Exception as error:  # safetensors raises its own kinds
        raise Fault(f"{path} is not a checkpoint of ours ({type(error).__name__}: {first_line(error)})") from None
    log_path = REPOSITORY / "logs" / f"{about.get('run_id', path.stem)}.txt"
    try:
        check_file(log_path)
        log = rules.parse_log(log_path)
        return about, log, rules.read_settings(log)
    except FileNotFoundError:
        raise Fault(f"{path} needs the log of the run that saved it, and there is no {log_path}") from None
    except (ValueError, RecursionError) as error:
        raise Fault(f"{log_path} cannot be read ({first_line(error)})") from None


def command(footer, settings, repo):
    """How to load the model: with the track and the data of its run, as the architecture is in the checkpoint."""
    given = {key: value for key, value in settings["overrides"].items() if key in DATA_FIELDS}
    fields = {"track": footer["track"], **given, "load": f"hf:{repo}", "num_steps": 0}
    return shlex.join(["python", footer["script"], *(f"--{key}={value}" for key, value in fields.items())])


def numbers(footer):
    """The table of what the footer has."""
    shown = [key for key in footer if key in NUMBERS or key.startswith(MORE_NUMBERS)]
    return leaderboard.table("number|>value", [[key, footer[key]] for key in shown])


def curve(log, folder):
    """Validation loss against seconds of training: a picture in the folder, or a table where matplotlib is missing."""
    name, steps = log["path"].stem, log["steps"]
    try:
        leaderboard.save_plot(folder / "loss.png", leaderboard.draw_losses, name, log["footer"]["target"],
                              [(name, [steps])])
    except ImportError:
        rows = [[step, f"{seconds:.1f}", f"{loss:.4f}"] for step, seconds, loss in steps]
        return leaderboard.table(">step|>train time (s)|>validation loss", rows)
    return "![Validation loss against seconds of training](loss.png)"


def sample(run_id, folder):
    """The section about a run's samples, "" if there are none: pictures are copied into the folder, texts quoted."""
    parts = []
    for path in sorted((REPOSITORY / "samples" / run_id).glob("*")):
        if path.suffix in (".png", ".gif"):
            shutil.copy(path, folder / path.name)
            parts.append(f"![Sample]({path.name})")
        elif path.suffix == ".txt":
            text = path.read_text(encoding="utf-8", errors="replace")[:SAMPLE_CHARACTERS]
            parts.append(textwrap.indent(text.strip("\n"), "    "))  # indented, no text can end the quotation
    return "\n\n".join(["## Sample", *parts]) if parts else ""
