"""Heads on a ready model, and modalities that it is taught afterwards."""
import copy

import pytest
import torch

import lessons
import raycaster
import tokenizer
import train_4m
import transfer
import world
from ready import Ready


@pytest.fixture(scope="module")
def ready():
    found = Ready("4m_rich", ("scenes64", "rich64"), 8)
    found.tokens, found.precision = found.tokens[:40], "fp32"
    return found


@pytest.fixture(scope="module")
def labels():
    return transfer.labels_of(transfer.valid_codes(40))


def test_labels_are_those_of_the_scenes(ready, labels):
    for i, objects in enumerate(ready.show.described(ready.tokens)):
        kinds = {f"{o['color']} {o['shape']}" for o in objects}
        assert labels["count"][i] == len(objects) - 1
        assert {world.CLASSES[k] for k in labels["exist"][i].nonzero()[:, 0]} == kinds
        shapes = raycaster.SHAPES
        left = {(a["shape"], b["shape"]) for a in objects for b in objects if a["x"] < b["x"]}
        assert {(shapes[k // 3], shapes[k % 3]) for k in labels["relation"][i].nonzero()[:, 0].tolist()} == left


def test_heights_and_shadows_of_one_object():
    """What is highest of a sphere is its top, of a cube and a cylinder their flat one; on the ground is most of the
    shadow, on the side that the lamp does not see."""
    codes = torch.full((3, 21), -1)
    codes[:, :7] = torch.tensor([[shape, 0, 0, 1, 0, 4, 3] for shape in range(3)])
    labels = transfer.labels_of(codes)
    top = torch.tensor([2 * half * world.RADIUS[1] for half in raycaster.HALF])
    assert torch.allclose(labels["height"].amax((1, 2)), top, atol=0.02)
    dark, ground = labels["shadow"] > 0, labels["height"] < 0.01
    assert (dark & ground).sum() > 0.5 * dark.sum() > 100
    across = 8 * (torch.arange(64) % 8)[:, None] + torch.arange(64) % 8
    assert across.expand(3, -1, -1)[dark & ground].float().mean() > 8 * 3 + 4, "the lamp is in front on the left"


def test_scores():
    label = torch.tensor([0, 1, 2])
    assert transfer.score("count", torch.eye(3), label) == 1 and transfer.score("height", label.float(), label + 2) == 2
    told, meant = torch.tensor([1.0, 1.0, -1.0]), torch.tensor([1.0, 0.0, 0.0])
    assert transfer.score("exist", told, meant) == pytest.approx(2 / 3)
    assert transfer.score("shadow", told, meant) == 0.5


def test_the_same_answer_may_be_yes(labels):
    """Never saying yes has no F1 at all: what is beaten is the better of both."""
    found = transfer.same_answer(labels, labels)
    for task in "exist", "relation":
        share = labels[task].mean().item()
        assert found[transfer.NAMES[task]] == pytest.approx(2 * share / (1 + share)) and share > 0
    assert found[transfer.NAMES["shadow"]] == pytest.approx(labels["shadow"].mean().item())
    assert found[transfer.NAMES["count"]] == (labels["count"] == labels["count"].mode().values).float().mean().item()


@pytest.mark.parametrize("way", transfer.WAYS)
def test_what_is_trained(ready, labels, way, monkeypatch):
    """The frozen model stays as it is but for what its way may change, and the task is learned."""
    monkeypatch.setattr(transfer, "STEPS", 20)
    label = labels["count"]
    start = transfer.Head(ready, ready.model, way, label)
    before = start(ready.tokens)
    assert before.shape == (40, 3)
    assert torch.equal(before, transfer.Head(ready, ready.model, "frozen, linear", label)(ready.tokens))
    taught = transfer.teach(ready, ready.model, way, "count", ready.tokens, label)
    changed = {name for name, p in taught.named_parameters() if not torch.equal(p, start.get_parameter(name))}
    encoder = {name for name in changed if "encoder" in name}
    assert "linear.weight" in changed and bool(encoder) == (way != "frozen, linear")
    assert way != "LoRA, rank 8" or {name.split(".")[-1] for name in encoder} == {"up", "down"}
    losses = [transfer.loss_of("count", one(ready.tokens), label).item() for one in (start, taught)]
    assert losses[1] < losses[0] - 0.1


def test_a_modality_is_added(ready):
    """A model that knows one more gives what it gave, and learns it."""
    masks, rows = transfer.shadows(transfer.valid_codes(40), tokenizer.load_tokenizer("cpu"))
    grown = transfer.grow(ready, "shadow", rows.long())
    assert grown.layout.names[6] == "shadow" and "shadow" not in ready.layout.names
    assert torch.equal(grown.tokens[:, grown.layout.span["shadow"]], rows.long())
    for given, asked in ((("rgb",), "desc"), (("caption",), "rgb"), (("depth", "pose"), "normal")):
        assert torch.allclose(ready.likelihood(ready.tokens, given, asked), grown.likelihood(grown.tokens, given, asked),
                              atol=1e-4)
    first = grown.likelihood(grown.tokens, ("rgb",), "shadow").mean()
    model = copy.deepcopy(grown.model).requires_grad_(True)
    links = train_4m.LINKS
    grown.model = lessons.learn(grown, model, (transfer.NEW,), 12, grown.tokens, batch=8, **transfer.RATES)
    assert grown.likelihood(grown.tokens, ("rgb",), "shadow").mean() > first + 1 and train_4m.LINKS == links
    assert transfer.shadow_iou(ready, rows.long(), masks) > 0.5


def test_what_is_given_is_blurred(ready, monkeypatch):
    """Where it is given some tokens of a modality are another row's, at most the share asked for; where not, none."""
    tokens, span = torch.arange(40 * ready.layout.size).view(40, -1), ready.layout.span["rgb"]
    found = lessons.blurred(tokens, span, 0.5, torch.Generator().manual_seed(0))
    changed = found != tokens
    share = changed[:, span].float().mean(1)
    assert share.max() < 0.7 and 0.15 < share.mean() < 0.35 and share.min() < 0.1 < share.std()
    assert torch.equal(found[changed], tokens.roll(1, 0)[changed])
    changed[:, span] = False
    assert not changed.any()

    seen = []
    monkeypatch.setattr(train_4m, "train_step", lambda step, batch, *more: seen.append(batch) or (batch.sum(), 0, 0))
    links = ((("rgb",), ("desc",)), (("desc",), ("rgb",)), None)
    for blur in None, ("rgb", 0.5):
        lessons.learn(ready, copy.deepcopy(ready.model).requires_grad_(True), links, 3, ready.tokens, batch=8, blur=blur)
    same = [torch.equal(a, b) for a, b in zip(seen[:3], seen[3:])]
    assert same == [False, True, True]
