"""The frozen evaluations: an honest model's loss is that of a plain loop, and each way of cheating is noticed."""
import ast
import hashlib
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train_flow
import train_gpt
import train_maskgit
import train_vlm

ROOT = Path(__file__).resolve().parent.parent
V, LABELS = 16, 3  # vocabulary, labels
SCRIPTS = {"gpt": train_gpt, "maskgit": train_maskgit, "flow": train_flow, "vlm": train_vlm}


# ------------------------------------------------------------------------------------------------------------
# Validation sets and honest models, as small as can be

def draw(*shape, below=V):
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(sum(shape)))


class Gpt(nn.Module):
    """Bigrams. Row i of a call is window i of the stream."""
    fault, num = train_gpt.Fault, 78

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.data = [draw(10_001)]
        self.table = nn.Parameter(torch.randn(V, V))

    def evaluate(self):
        return train_gpt.evaluate(self, *self.data, V, train_gpt.Config(), 0, 1)

    def scores(self, tokens):
        return self.table[tokens]

    def log_probs(self, tokens):
        return self.scores(tokens).log_softmax(-1)

    def targets(self, rows):
        """What is to be predicted, of the validation set itself."""
        starts = (128 * rows).clamp(max=10_000 - 256)
        return self.data[0][starts[:, None] + torch.arange(1, 257)]

    def plain(self):
        stream, = self.data
        return [-self.table[a].log_softmax(0)[b].item() for a, b in zip(stream, stream[1:])]


class Maskgit(nn.Module):
    """Scores by label and by how many tokens are visible."""
    fault, num = train_maskgit.Fault, 130

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.data = [draw(self.num, 20), draw(self.num, below=LABELS), draw(self.num, 20, below=2).bool()]
        self.table, self.visible = nn.Parameter(torch.randn(LABELS, V)), nn.Parameter(torch.randn(V))

    def evaluate(self):
        return train_maskgit.evaluate(self, *self.data, V, 0, 1)

    def scores(self, tokens, labels, masked):
        rows = self.table[labels] + tokens.float().mean(1, keepdim=True) * self.visible
        return rows[:, None].expand(-1, 20, -1)[masked]

    def log_probs(self, tokens, labels, masked):
        assert not tokens[masked].any(), "blanked"
        return self.scores(tokens, labels, masked).log_softmax(-1)

    def targets(self, rows):
        return self.data[0][rows][self.data[2][rows]]

    def plain(self):
        nats = []
        for tokens, label, masked in zip(*self.data):
            mean = tokens[~masked].sum() / 20
            logs = (self.table[label] + mean * self.visible).log_softmax(0)
            nats += (-logs[tokens[masked]]).tolist()
        return nats


class Flow(nn.Module):
    """A velocity that is linear in z, and a shift by label."""
    fault, num = train_flow.Fault, 130

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        times = (torch.arange(self.num) + 0.5) / self.num
        pictures, noise = torch.randn(2, self.num, 3, 4, 4)
        self.data = [pictures, times, noise, draw(self.num, below=LABELS)]
        self.table = nn.Parameter(torch.randn(LABELS))

    def evaluate(self):
        return train_flow.evaluate(self, *self.data, 0, 1)

    def forward(self, z, t, labels):
        return 0.7 * z + (t * self.table[labels])[:, None, None, None]

    def plain(self):
        return [(0.7 * ((1 - t) * x + t * noise) + t * self.table[label] - (noise - x)).square().mean().item()
                for x, t, noise, label in zip(*self.data)]


class Vlm(nn.Module):
    """Bigrams and the picture's brightness. A row: five tokens of a question, three of its answer, twice; and a pad."""
    fault, num = train_vlm.Fault, 130

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        answer = torch.tensor([0] * 5 + [1] * 3 + [0] * 5 + [2] * 3 + [0], dtype=torch.uint8).expand(self.num, -1)
        family = torch.zeros(self.num, 5, dtype=torch.uint8)
        family[:, :2] = 1 + draw(self.num, 2, below=6)
        self.data = [draw(self.num, 3, 4, 4, below=256).byte(), draw(self.num, 17), answer.contiguous(), family]
        self.table, self.bright = nn.Parameter(torch.randn(V, V)), nn.Parameter(torch.randn(V))

    def evaluate(self):
        return train_vlm.evaluate(self, *self.data, V, 0, 1)

    def scores(self, pixels, tokens):
        before = F.pad(tokens, (1, 0))[:, :-1]
        return self.table[before] + pixels.float().mean((1, 2, 3))[:, None, None] / 255 * self.bright

    def log_probs(self, pixels, tokens):
        return self.scores(pixels, tokens).log_softmax(-1)

    def targets(self, rows):
        return self.data[1][rows]

    def plain(self):
        halves = {True: [], False: []}
        for pixels, tokens, answer, family in zip(*self.data):
            for place in answer.nonzero()[:, 0].tolist():
                scores = self.table[tokens[place - 1]] + pixels.float().mean() / 255 * self.bright
                described = family[int(answer[place]) - 1].item() == 6
                halves[described].append(-scores.log_softmax(0)[tokens[place]].item())
        return [sum(part) / len(part) for part in halves.values()]


MODELS = {"gpt": Gpt, "maskgit": Maskgit, "flow": Flow, "vlm": Vlm}


@pytest.mark.parametrize("model", MODELS.values())
def test_an_honest_model_has_the_loss_of_a_plain_loop(model):
    model = model()
    before = [part.clone() for part in model.data]
    loss, numbers = model.evaluate()
    nats = model.plain()
    assert loss == pytest.approx(sum(nats) / len(nats), rel=1e-4)
    assert model.evaluate()[0] == loss
    counted = {Gpt: 10_000, Flow: 130, Vlm: 130 * 6, Maskgit: len(nats)}[type(model)]
    assert numbers["eval_targets"] == counted
    assert all(map(torch.equal, before, model.data)), "the validation set is what it was"


# ------------------------------------------------------------------------------------------------------------
# Models that are not honest

class Counting:
    """Knows which rows of the validation set a call is about: they come in order, and the first ones come again."""
    next_row = 0

    def rows(self, B):
        rows = torch.arange(self.next_row, self.next_row + B)
        self.next_row = 0 if rows[-1] + 1 == self.num else self.next_row + B
        return rows


def peeking(honest):
    class Peeks(Counting, honest):
        """Looks a target up in the validation set, which it has at hand."""
        def scores(self, *inputs):
            return super().scores(*inputs) + 5 * F.one_hot(self.targets(self.rows(len(inputs[0]))), V)

        def forward(self, z, t, labels):  # the flow's
            pictures, _, noise, _ = self.data
            rows = self.rows(len(z))
            return 0.5 * super().forward(z, t, labels) + 0.5 * (noise[rows] - pictures[rows])
    return Peeks


def changing(honest, change):
    """A model whose results go through change(results, model, inputs)."""
    class Changes(honest):
        def __init__(self):
            super().__init__()
            self.register_buffer("memory", torch.zeros(V))

        def log_probs(self, *inputs):
            return change(super().log_probs(*inputs), self, inputs)

        def forward(self, *inputs):  # the flow's
            return change(super().forward(*inputs), self, inputs)
    return Changes


def drop_row(found, model, inputs):
    return found[:-1]


def forget_hard_ones(found, model, inputs):
    """Nothing is said of what is unlikely."""
    return found.where(found > found.amin(-1, keepdim=True), torch.nan)


def rule_out(found, model, inputs):
    return found.where(found > found.amin(-1, keepdim=True), -math.inf)


def halve(found, model, inputs):
    return found.bfloat16()


def exaggerate(found, model, inputs):
    return found + 0.1


def favour_some(found, model, inputs):
    """All but the first rows of a call are too likely."""
    return torch.cat([found[:2], found[2:] + 0.1])


def learn(found, model, inputs):
    with torch.no_grad():
        model.table += 1e-4
    return found


def memorise(found, model, inputs):
    """In a buffer, without any use of it so far."""
    model.memory += 1
    return found


def remember(found, model, inputs):
    """Outside of all tensors of the model, for the sake of what comes after."""
    model.calls = getattr(model, "calls", 0) + 1
    softened = found * (1 - 0.05 * model.calls)
    return softened if isinstance(model, Flow) else softened.log_softmax(-1)


def prefer(found, tokens):
    return (found + 3 * F.one_hot(tokens, V)).log_softmax(-1)


def look_ahead(found, model, inputs):
    """At the very token that is to be predicted, which is further on in the row."""
    tokens = inputs[-1]
    return prefer(found, tokens if isinstance(model, Vlm) else tokens.roll(-1, 1))


def look_far_ahead(found, model, inputs):
    tokens = inputs[-1]
    return prefer(found, tokens.roll(-4, 1))


def look_aside(found, model, inputs):
    """At the row below, which in a stream has what is to be predicted."""
    return prefer(found, inputs[-1].roll(-1, 0))


SHAPE, FINITE, SUM = "not float32", "is not finite", "do not sum to 1"
AGAIN, TENSORS = "is another one where", "parameters or buffers are not what they were"
ALL, LOSSES, CAUSAL = ("gpt", "maskgit", "flow", "vlm"), ("gpt", "maskgit", "vlm"), ("gpt", "vlm")
CHANGES = [(ALL, drop_row, SHAPE), (ALL, forget_hard_ones, FINITE), (LOSSES, rule_out, FINITE), (ALL, halve, SHAPE),
           (LOSSES, exaggerate, SUM), (LOSSES, favour_some, SUM), (ALL, learn, AGAIN + "|" + TENSORS),
           (ALL, memorise, TENSORS), (ALL, remember, AGAIN), (CAUSAL, look_ahead, AGAIN),
           (CAUSAL, look_far_ahead, AGAIN), (CAUSAL, look_aside, AGAIN)]


@pytest.mark.parametrize("task,change,message", [(task, *rest) for tasks, *rest in CHANGES for task in tasks])
def test_a_doctored_model_is_noticed(task, change, message):
    model = changing(MODELS[task], change)()
    with pytest.raises(model.fault, match=message):
        model.evaluate()


@pytest.mark.parametrize("task", ALL)
def test_a_model_that_has_the_validation_set_is_noticed(task):
    model = peeking(MODELS[task])()
    assert torch.equal(model.rows(model.num), torch.arange(model.num)) and model.next_row == 0
    with pytest.raises(model.fault, match=AGAIN):
        model.evaluate()


# ------------------------------------------------------------------------------------------------------------
# The block itself

def names(source):
    """What a module's source defines."""
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (part.id for part in ast.walk(node.targets[0]) if isinstance(part, ast.Name))


@pytest.mark.parametrize("task", ALL)
def test_the_block_calls_nothing_that_a_record_may_change(task):
    source = (ROOT / f"train_{task}.py").read_text()
    block = re.search(r"# --- frozen: eval ---\n(.*)# --- end: eval ---\n", source, re.S)[1]
    run = re.search(r"# --- copied: run ---\n(.*)# --- end: run ---\n", source, re.S)[1]
    free = set(names(source.replace(block, "").replace(run, "")))
    assert {"main", "train_step", "make_optimizers"} < free
    nodes = list(ast.walk(ast.parse(block)))
    used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    own = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    own |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    assert used & {"Fault", "HERE", "ROOT"} and not (used - own) & free


@pytest.mark.parametrize("task", ALL)
def test_the_hash_is_that_of_the_block_and_its_files(task, tmp_path, monkeypatch):
    script, path = SCRIPTS[task], tmp_path / "frozen"
    path.write_bytes(b"data")
    block = (ROOT / f"train_{task}.py").read_text().partition("# --- frozen:")[2].partition("# --- end:")[0]
    found = script.eval_sha256(path)
    assert found == hashlib.sha256(block.encode() + b"data").hexdigest()
    path.write_bytes(b"other data")
    assert script.eval_sha256(path) != found
    monkeypatch.setattr(script, "HERE", tmp_path / "copy.py")
    path.write_bytes(b"data")
    source = (ROOT / f"train_{task}.py").read_text()
    (tmp_path / "copy.py").write_text(source.replace("def evaluate(", "def  evaluate("))
    assert script.eval_sha256(path) != found
