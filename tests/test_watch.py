"""--log_to: what a run sends at its evaluations, to stand-ins for packages that are not installed."""
import contextlib
import sys
import types

import pytest

import runs
import train_gpt
from test_train_gpt import SMALL, make_root, run_here, tiny  # noqa: F401
from train_gpt import Fault


def arguments(tiny, *more):  # noqa: F811
    return [*SMALL, f"--data={tiny}", "--num_steps=12", "--eval_every=4", *more]


@pytest.fixture
def package(monkeypatch):
    """Stands in for wandb, trackio and TensorBoard: .opened, what was given to it at first; .sent, {step: numbers}."""
    fake = types.ModuleType("fake")
    fake.opened, fake.sent = [], {}
    fake.init = lambda **words: fake.opened.append(words)
    fake.log = lambda numbers, step: fake.sent.setdefault(step, {}).update(numbers)

    class SummaryWriter:
        def __init__(self, folder):
            fake.opened.append({"folder": folder})

        def add_scalar(self, name, value, step):
            fake.log({name: value}, step)

        def flush(self):
            """All is there."""

    fake.SummaryWriter = SummaryWriter
    for name in ("wandb", "trackio", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, fake)
    return fake


def test_off_by_default(tiny, tmp_path, monkeypatch, package):  # noqa: F811
    monkeypatch.delitem(sys.modules, "watch", raising=False)
    run_here(monkeypatch, make_root(tmp_path / "root"), arguments(tiny))
    assert "watch" not in sys.modules and not package.opened


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_losses_are_sent_while_the_clock_is_paused(name, tiny, tmp_path, monkeypatch, package):  # noqa: F811
    clock, plain, send = ["running"], train_gpt.Run.paused, package.log

    @contextlib.contextmanager
    def paused(run):
        with plain(run):
            clock.append("paused")
            yield
            clock.append("running")

    def log(numbers, step):
        send({**numbers, "clock": clock[-1]}, step)

    monkeypatch.setattr(train_gpt.Run, "paused", paused)
    monkeypatch.setattr(package, "log", log)
    root = make_root(tmp_path / "root")
    run_here(monkeypatch, root, arguments(tiny, f"--log_to={name}"))
    footer, = runs.footers(root)
    assert list(package.sent) == [4, 8, 12]
    assert [round(numbers["val_loss"], 4) for numbers in package.sent.values()] == runs.losses(root)
    assert ["loss" in numbers for numbers in package.sent.values()] == [False, False, True], "of step 10"
    assert 0 < package.sent[12]["loss"] < 10 and {numbers["clock"] for numbers in package.sent.values()} == {"paused"}
    seconds = [numbers["train_seconds"] for numbers in package.sent.values()]
    assert seconds == sorted(seconds) and round(seconds[-1], 3) == footer["train_seconds"]
    opened, = package.opened
    if name == "tensorboard":
        assert opened == {"folder": str(root / "logs" / footer["run_id"])}
    else:
        assert opened["name"] == footer["run_id"] and opened["config"]["num_steps"] == 12


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_missing_package_is_named_before_anything_is_written(name, tiny, tmp_path, monkeypatch):  # noqa: F811
    for module in (name, "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    root = make_root(tmp_path / "root")
    with pytest.raises(Fault) as caught:
        run_here(monkeypatch, root, arguments(tiny, f"--log_to={name}"))
    assert f"`pip install {name}`" in str(caught.value) and "\n" not in str(caught.value)
    assert {path.name for path in root.iterdir()} == {"data", "train_gpt.py"}


def test_what_else_can_go_wrong(tiny, tmp_path, monkeypatch, package, capsys):  # noqa: F811
    """What cannot be opened stops a run before it starts, what cannot be sent does not stop it."""
    def fails(*_, **__):
        raise ConnectionError("no route to host\nand more lines")

    monkeypatch.setattr(package, "log", fails)
    root = make_root(tmp_path / "root")
    run_here(monkeypatch, root, arguments(tiny, "--log_to=wandb"))
    assert len(runs.footers(root)) == 1
    assert "step 4 was not sent to wandb (ConnectionError: no route to host and more lines)" in capsys.readouterr().out
    monkeypatch.setattr(package, "init", fails)
    root = make_root(tmp_path / "again")
    with pytest.raises(Fault, match="--log_to=wandb could not be opened .ConnectionError: no route to host"):
        run_here(monkeypatch, root, arguments(tiny, "--log_to=wandb"))
    with pytest.raises(Fault, match="--log_to=mlflow is not one of none, trackio, wandb, tensorboard"):
        run_here(monkeypatch, root, arguments(tiny, "--log_to=mlflow"))
    assert {path.name for path in root.iterdir()} == {"data", "train_gpt.py"}
