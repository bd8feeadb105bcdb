"""The frozen evaluation of train_4m.py: what it computes, and doctored models that it must catch."""
import pytest
import torch
from torch import nn

import train_4m

MODALITIES = {m: {"length": n, "vocab": v, "pad": p} for m, n, v, p in
              (("rgb", 9, 16, -1), ("depth", 9, 16, -1), ("desc", 5, 12, 11), ("bbox", 4, 16, 0))}
KIND = torch.repeat_interleave(torch.arange(4), torch.tensor([9, 9, 5, 4]))
N, SIZE, VOCAB = 70, 27, 16  # more scenes than a batch has


@pytest.fixture
def frozen():
    rng = torch.Generator().manual_seed(0)
    return torch.randint(1, 11, (N, SIZE), generator=rng), torch.randint(3, (N, SIZE), generator=rng)


class Honest(nn.Module):
    """Predicts from the mean embedding of the inputs and from the place."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.place, self.head = nn.Embedding(VOCAB, 8), nn.Embedding(SIZE, 8), nn.Linear(8, VOCAB)

    def forward(self, tokens, enc_pos, visible, dec_pos, counted):
        x = self.embed(tokens.gather(1, enc_pos)) * visible[..., None]
        mean = x.sum(1, keepdim=True) / visible.sum(1)[:, None, None]
        return self.head(mean + self.place(dec_pos)).log_softmax(-1)


class Peeks(Honest):
    """Holds on to the validation tokens and finds its row by the inputs."""

    def __init__(self, tokens):
        super().__init__()
        self.held = [tokens]

    def forward(self, tokens, enc_pos, visible, dec_pos, counted):
        known = tokens > 0
        row = (((tokens[:, None] == self.held[0]) & known[:, None]).sum(2)).argmax(1)
        sure = nn.functional.one_hot(self.held[0][row].gather(1, dec_pos), VOCAB).float()
        return (0.98 * sure + 0.02 / VOCAB).log()


class DropsHardTargets(Honest):
    def forward(self, *inputs):
        return super().forward(*inputs)[:, :-1]


class SaysNothing(Honest):
    """Of the hard targets: infinite surprise would be honest, nan is not."""

    def forward(self, tokens, enc_pos, visible, dec_pos, counted):
        return super().forward(tokens, enc_pos, visible, dec_pos, counted).masked_fill(dec_pos[..., None] == 3, torch.nan)


class Unnormalised(Honest):
    def forward(self, *inputs):
        return super().forward(*inputs) + 0.1


class Memorises(Honest):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(VOCAB))

    def forward(self, tokens, *places):
        self.seen += tokens.flatten().bincount(minlength=VOCAB)
        return super().forward(tokens, *places)


def evaluate(model, frozen):
    return train_4m.evaluate(model, *frozen, MODALITIES, 0, 1)


def test_the_loss_is_that_of_a_plain_loop(frozen):
    model, (tokens, roles) = Honest(), frozen
    nll = {(half, kind): [] for half in (0, 1) for kind in range(4)}
    for b in range(N):  # one scene after another, without padding
        enc_pos, dec_pos = ((roles[b] == role).nonzero().T for role in (1, 2))
        log_probs = model(tokens[b:b + 1], enc_pos, torch.ones_like(enc_pos), dec_pos, None)[0]
        for place, row in zip(dec_pos[0].tolist(), log_probs.tolist()):
            nll[b % 2, KIND[place].item()].append(-row[tokens[b, place]])
    means = torch.tensor([[sum(nll[half, kind]) / len(nll[half, kind]) for kind in range(4)] for half in (0, 1)])
    loss, numbers = evaluate(model, frozen)
    assert loss == pytest.approx(means.mean().item(), abs=1e-4)
    assert [numbers["val_loss_course"], numbers["val_loss_whole"]] == pytest.approx(means.mean(1).tolist(), abs=1e-4)
    parts = [[numbers[f"val_loss_{half}_{m}"] for m in MODALITIES] for half in ("course", "whole")]
    assert sum(parts, []) == pytest.approx(means.flatten().tolist(), abs=1e-4)


@pytest.mark.parametrize("doctored, what", [
    (Peeks, "change with the targets"), (DropsHardTargets, "must return float32 log-probabilities"),
    (SaysNothing, "sum to 1|not finite"), (Unnormalised, "sum to 1"), (Memorises, "changed during the evaluation")])
def test_doctored_models_are_caught(frozen, doctored, what):
    model = doctored(frozen[0]) if doctored is Peeks else doctored()
    before = frozen[0].clone()
    with pytest.raises(train_4m.Fault, match=what):
        evaluate(model, frozen)
    assert torch.equal(frozen[0], before)


def test_no_model_sees_anything_but_the_inputs(frozen):
    class Looks(Honest):
        def forward(self, tokens, enc_pos, visible, dec_pos, counted):
            assert (tokens.gather(1, dec_pos) * counted == 0).all()
            assert ((tokens > 0).sum(1) == visible.sum(1)).all()
            return super().forward(tokens, enc_pos, visible, dec_pos, counted)
    evaluate(Looks(), frozen)
