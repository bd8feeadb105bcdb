"""What every training script does around its steps: learning rates, and what the untimed warm-up leaves behind."""
import contextlib
import dataclasses
import importlib
import inspect
import types

import pytest
import torch

import test_train_4m
import test_train_flow
import test_train_gpt
import test_train_maskgit
import test_train_vlm
import train_flow
import train_gpt
import train_maskgit

MODULES = {"4m": test_train_4m, "flow": test_train_flow, "gpt": test_train_gpt, "maskgit": test_train_maskgit,
           "vlm": test_train_vlm}
tiny_4m, tiny_flow, tiny_gpt = test_train_4m.tiny, test_train_flow.tiny, test_train_gpt.tiny
tiny_maskgit, tiny_vlm = test_train_maskgit.tiny, test_train_vlm.tiny
frozen = test_train_maskgit.frozen
STEPS, COOLDOWN = 8, 0.5


@pytest.mark.parametrize("task", MODULES)
def test_rates_fall_from_a_fresh_start(task, request, tmp_path, monkeypatch):
    """Muon's and Adam's rates are their peaks, then fall linearly to 0. At the first step of the clock neither remembers
    a step of the warm-up."""
    module, script = MODULES[task], importlib.import_module(f"train_{task}")
    data = request.getfixturevalue(f"tiny_{task}")
    plain_step, plain_start, plain_muon = script.train_step, script.Run.start, script.Muon.step
    started, muon_rates, shares = [], [], []

    def start(run):
        plain_start(run)
        started.append(run)

    def muon_step(muon, lr):
        muon_rates.append(lr)
        plain_muon(muon, lr)

    def train_step(*given):
        named = inspect.signature(plain_step).bind(*given).arguments
        muon, adam, config = named["muon"], named["adam"], named["config"]
        if started and not shares:
            assert not any(buffer.any() for _, buffer in muon.stacks)
            assert not any(value.any() for state in adam.state.values() for value in state.values())
        result = plain_step(*given)
        if started:
            peaks = [group.get("peak", getattr(config, "adam_lr", None)) for group in adam.param_groups]
            found = [group["lr"] / peak for group, peak in zip(adam.param_groups, peaks)]
            shares.append([muon_rates[-1] / config.muon_lr, *found])
        return result

    monkeypatch.setattr(script.Run, "start", start)
    monkeypatch.setattr(script.Muon, "step", muon_step)
    monkeypatch.setattr(script, "train_step", train_step)
    argv = [*module.SMALL, *([f"--data={data}"] if task == "gpt" else data[1])]
    argv += [f"--num_steps={STEPS}", f"--eval_every={STEPS}", f"--cooldown={COOLDOWN}"]
    module.run_here(monkeypatch, module.make_root(tmp_path / "root"), argv)
    assert len(shares) == STEPS and all(len(share) > 1 for share in shares)
    for step, share in enumerate(shares):
        assert share == pytest.approx([min(1, (1 - step / STEPS) / COOLDOWN)] * len(share)), step


def still():
    """An optimizer that moves nothing."""
    return types.SimpleNamespace(step=lambda *_: None, param_groups=[{"peak": 1.0}])


RUN = types.SimpleNamespace(rank=0, world=1, device=torch.device("cpu"), autocast=contextlib.nullcontext,
                            slice=lambda batch: slice(0, batch))
CLASSES, ROWS = 24, 8000


def labels_in_a_step(script, monkeypatch, share):
    """The labels of a batch, and those that the loss is given of it."""
    given, zero = [], torch.zeros(1, requires_grad=True)
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (ROWS,), generator=rng)
    config = dataclasses.replace(script.CONFIGS["cpu"], batch=ROWS, micro_batch=ROWS, label_drop=share)
    model = types.SimpleNamespace(num_labels=CLASSES, classes=CLASSES, zero_grad=lambda **_: None)
    monkeypatch.setattr(script, "sum_gradients", lambda *_: None)
    if script is train_maskgit:
        monkeypatch.setattr(script, "masked_nats", lambda model, tokens, labels, masked: given.append(labels) or zero)
        script.train_step(0, torch.zeros(ROWS, 9, dtype=torch.long), labels, rng, model, still(), still(), config, RUN)
    else:
        batch = torch.zeros(ROWS, 3, 2, 2, dtype=torch.uint8), labels
        errors = lambda model, images, t, noise, labels: given.append(labels) or zero
        script.train_step(0, batch, rng, errors, model, still(), still(), config, RUN)
    return labels, given[0]


@pytest.mark.parametrize("script", [train_maskgit, train_flow])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_labels_left_out(script, monkeypatch, share):
    """As many as --label_drop says, of every class; without them nothing could be guided."""
    labels, kept = labels_in_a_step(script, monkeypatch, share)
    dropped = kept == CLASSES
    assert dropped.float().mean().item() == pytest.approx(share, abs=0.01)
    assert torch.equal(kept[~dropped], labels[~dropped])
    by_class = torch.stack([dropped[labels == c].float().mean() for c in range(CLASSES)])
    assert (by_class - share).abs().max() < 0.07


def test_the_second_token_matters_less_and_less(monkeypatch):
    seen, zero = [], torch.zeros((), requires_grad=True)
    monkeypatch.setattr(train_gpt, "total_nats", lambda model, x, y, second: seen.append(second) or zero)
    monkeypatch.setattr(train_gpt, "sum_gradients", lambda *_: None)
    config = dataclasses.replace(train_gpt.CONFIGS["cpu"], batch=2, micro_batch=2, num_steps=8, second_token=0.4)
    tokens = torch.zeros(2, 4, dtype=torch.long)
    for step in range(8):
        train_gpt.train_step(step, tokens, tokens, torch.nn.Linear(1, 1), still(), still(), config, RUN)
    assert seen == pytest.approx([0.4] * 5 + [0.3, 0.2, 0.1])
