"""What the ready nano4M is worth for tasks that it was not made for: heads on its encoder's states of rgb, taught by 100
and by 20,000 labels, frozen, by LoRA, whole and from scratch; and a modality that it is taught afterwards.
capabilities.py writes it down; both need the training scenes, `data/scenes64-rich64`.
"""
import copy
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from tqdm import tqdm

import lessons
import raycaster
import shards
import tokenizer
import world
from ready import train_4m

LABELS = (100, 20000)
WAYS = {"frozen, linear": 1e-2, "LoRA, rank 8": 3e-3, "all of it": 1e-3, "from scratch": 1e-3}  # and their learning rates
STEPS, BATCH, RANK = 200, 64, 8  # of training, and of LoRA's matrices
VALID = 1000  # validation scenes
ADDED_STEPS, ADDED_SCENES = 600, 5000  # for a modality that is added


# ------------------------------------------------------------------------------------------------------------
# What is asked

def labels_of(codes):
    """The labels of scenes, by task: count (n,), the number of objects less one; exist (n, 24), whether there is one of a
    colour and shape; relation (n, 9), whether one of a shape is left of one of another; shadow (n, 64, 64) and height
    (n, 64, 64) in world units, cell by cell, what is in the dark and how far above the ground the surface is."""
    parts = []
    for part in codes.split(250):
        scenes = world.build(part)
        there, shape = scenes["shape"] >= 0, scenes["shape"].clamp(min=0)
        of_kind = F.one_hot(shape * len(raycaster.COLORS) + scenes["color"].clamp(min=0), len(world.CLASSES))
        column = part.unflatten(1, (-1, len(world.FIELDS)))[..., world.FIELDS.index("column")]
        left = (column[:, :, None] < column[:, None]) & there[:, :, None] & there[:, None]
        pair = F.one_hot(shape[:, :, None] * len(raycaster.SHAPES) + shape[:, None], len(raycaster.SHAPES) ** 2)
        o, d = raycaster.primary_rays(scenes, 64)
        t, _, n = raycaster.trace(scenes, o, d)
        point, lamp, lit = raycaster.leave_surface(scenes, o, d, t, n)
        for solid in raycaster.occupied(scenes):
            lit = raycaster.shade_slot(solid, point, lamp, lit)
        parts.append({"count": there.sum(1) - 1, "exist": (of_kind * there[..., None]).amax(1).float(),
                      "relation": (pair * left[..., None]).amax((1, 2)).float(), "shadow": by_cells(1 - lit),
                      "height": by_cells(point[2])})
    return {task: torch.cat([part[task] for part in parts]) for task in parts[0]}


def by_cells(x):
    """Values of pixels (B, 64 * 64) as (B, 64 cells, 64 pixels)."""
    return F.pixel_unshuffle(x.view(-1, 1, 64, 64), 8).flatten(2).mT


def loss_of(task, output, label):
    if task == "count":
        return F.cross_entropy(output, label)
    return F.l1_loss(output, label) if task == "height" else F.binary_cross_entropy_with_logits(output, label)


def score(task, output, label):
    """Accuracy of count, F1 of exist and relation, IoU of shadows, mean error of heights."""
    if task == "count":
        return (output.argmax(1) == label).float().mean().item()
    if task == "height":
        return (output - label).abs().mean().item()
    told, meant = output > 0, label > 0
    both = (told & meant).sum().item()
    either = (told | meant).sum().item()
    return both / max(1, either) if task == "shadow" else 2 * both / max(1, both + either)


NAMES = {"count": "count, accuracy", "exist": "exist, F1", "relation": "relation, F1", "shadow": "shadow, IoU",
         "height": "height, error"}


# ------------------------------------------------------------------------------------------------------------
# Heads on the encoder

class LowRank(nn.Module):
    """What LoRA (arXiv:2106.09685) adds to a weight (rows, columns)."""

    def __init__(self, rows, columns):
        super().__init__()
        self.up = nn.Parameter(torch.zeros(rows, RANK))
        self.down = nn.Parameter(torch.randn(RANK, columns) * columns ** -0.5)

    def forward(self, weight):
        return weight + self.up @ self.down


class Head(nn.Module):
    """A linear layer on the encoder's states of rgb, of each cell for maps and of their mean otherwise."""

    def __init__(self, ready, model, way, label, seed=0):
        super().__init__()
        outputs = int(label.max()) + 1 if label.ndim == 1 else label.shape[-1]
        torch.manual_seed(seed)
        self.linear = nn.Linear(ready.config.dim, outputs)
        self.model, self.maps = copy.deepcopy(model), label.ndim == 3
        self.model.requires_grad_(way in ("all of it", "from scratch"))
        if way.startswith("LoRA"):
            for layer in self.model.encoder.modules():
                if isinstance(layer, train_4m.Linear):
                    parametrize.register_parametrization(layer, "weight", LowRank(*layer.weight.shape))
        self.places = torch.arange(ready.layout.size)[ready.layout.span["rgb"]]
        self.model.encoder[-1].register_forward_hook(lambda block, given, state: setattr(self, "state", state))

    def forward(self, tokens):
        """tokens (B, size) -> (B, outputs), of maps (B, 64, outputs)."""
        places = self.places.expand(len(tokens), -1)
        self.model.hidden(tokens, places, None, places[:, :1])  # the encoder's last block is overheard
        state = train_4m.norm(self.state).float()
        return self.linear(state if self.maps else state.mean(1))


def teach(ready, model, way, task, tokens, labels):
    """A Head that has learned a task from tokens (n, size) and labels (n, ..)."""
    head = Head(ready, model, way, labels)
    params = [p for p in head.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=WAYS[way], weight_decay=0.01)
    rng = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = WAYS[way] * min(1, (step + 1) / 20, 1.02 - step / STEPS)
            rows = torch.randint(len(tokens), (BATCH,), generator=rng)
            with ready.autocast():
                output = head(tokens[rows].long() & 0xFFFF)
            optimizer.zero_grad()
            loss_of(task, output, labels[rows]).backward()
            optimizer.step()
    return head


def training_codes(ready):
    return torch.from_numpy(np.load(shards.ROOT / ready.set / "train" / "scene.npy").astype(np.int64))


def valid_codes(n):
    with np.load(shards.FROZEN / "scenes64.npz") as arrays:
        return torch.from_numpy(arrays["scene"][:n].astype(np.int64))


def same_answer(labels, truth):
    """{task: score} of one answer to all: the commonest number, the mean height; of yes and no, to all that is asked, the
    better one."""
    answers = {task: [torch.ones_like(label[:1]), -torch.ones_like(label[:1])] for task, label in truth.items()}
    answers["count"] = [F.one_hot(labels["count"]).float().mean(0, keepdim=True)]
    answers["height"] = [labels["height"].mean(0, keepdim=True)]
    return {NAMES[task]: max(score(task, one.expand(len(truth[task]), *one.shape[1:]), truth[task]) for one in each)
            for task, each in answers.items()}


def transfer(ready):
    """{way and number of labels: {task: score}} on VALID validation scenes."""
    tokens, valid = lessons.training_tokens(ready), ready.tokens[:VALID]
    labels = labels_of(training_codes(ready)[:LABELS[-1]])
    truth = labels_of(valid_codes(VALID))
    found = {"the same answer to all": same_answer(labels, truth)}
    jobs = [(way, n, task) for n in LABELS for way in WAYS for task in labels]
    for way, n, task in tqdm(jobs, "transfer", unit=" heads"):
        model = lessons.fresh(ready) if way == "from scratch" else ready.model
        head = teach(ready, model, way, task, tokens[:n], labels[task][:n])
        with ready.autocast():
            output = torch.cat([head(part) for part in valid.split(250)])
        found.setdefault(f"{way}, {n:,} labels", {})[NAMES[task]] = score(task, output, truth[task])
    return found


# ------------------------------------------------------------------------------------------------------------
# A modality added

NEW = ("rgb",), ("shadow",)
OLD = {"rgb > normal": (("rgb",), "normal"), "rgb > desc": (("rgb",), "desc"), "caption > rgb": (("caption",), "rgb")}
RATES = {"muon_lr": 0.005, "adam_lr": 0.002}  # a quarter and a fifth of those it was trained with


def grow(ready, name, rows):
    """A ready.Ready of the same weights that knows one more picture, of whose tokens (n, 64) rows are."""
    grown, modalities = copy.copy(ready), (*train_4m.IMAGES, name, *train_4m.CODES, *train_4m.TEXTS)
    with patch.object(train_4m, "MODALITIES", modalities):
        grown.layout = train_4m.Layout({**ready.layout.modalities, name: ready.layout.modalities["rgb"]})
    grown.model = lessons.fresh(grown)
    old = ready.model.state_dict()
    for key, p in grown.model.named_parameters():
        if p.shape == old[key].shape:
            p.data.copy_(old[key])
        else:  # a row for each modality; the new one begins as the mean of all
            p.data.copy_(old[key].mean(0).expand_as(p))
            p.data[[grown.layout.names.index(m) for m in ready.layout.names]] = old[key]
    grown.tokens = with_rows(ready.tokens[:len(rows)], ready.layout, grown.layout, name, rows)
    return grown


def with_rows(tokens, layout, new_layout, name, rows):
    """Tokens (n, size) with those of one more modality, as a larger layout has them."""
    return torch.cat([rows if m == name else tokens[:, layout.span[m]] for m in new_layout.names], 1)


def shadows(codes, coder):
    """Masks (n, 64, 64) of what is in the dark, and the tokens (n, 64) of their pictures."""
    masks = F.pixel_shuffle(labels_of(codes)["shadow"].mT.unflatten(2, (8, 8)), 8)  # (n, 1, 64, 64)
    rows = [coder.encode_flat(part.expand(-1, 3, -1, -1)) for part in masks.split(250)]
    return masks[:, 0], torch.from_numpy(np.concatenate(rows).astype(np.int16))


def added(ready, steps=ADDED_STEPS, scenes=ADDED_SCENES, valid=250):
    """{taught how: {..}}: how well it draws shadows, and what it has lost meanwhile of the rest, in nats a token."""
    coder, codes = tokenizer.load_tokenizer("cpu"), training_codes(ready)[:scenes]
    truth, true_rows = shadows(valid_codes(valid), coder)
    grown = grow(ready, "shadow", true_rows.long())
    _, rows = shadows(codes, coder)
    tokens = with_rows(lessons.training_tokens(ready)[:scenes], ready.layout, grown.layout, "shadow", rows)
    in_turn = tuple(link for old in train_4m.LINKS for link in (NEW, old) if link)
    found, before = {}, grown.model
    for name, start, links in (("before", before, ()), ("from scratch", lessons.fresh(grown), (NEW,)),
                               ("the new link alone", before, (NEW,)), ("in turn with the old links", before, in_turn)):
        grown.model = copy.deepcopy(start).requires_grad_(True)
        if links:
            rates = {} if name == "from scratch" else RATES
            lessons.learn(grown, grown.model, links, steps * len(links[:2]), tokens, **rates)
        grown.model.requires_grad_(False)
        rows = grown.generate(grown.tokens, ("rgb",), [ready.output("shadow", steps=8, temperature=0.3)])
        lost = {of: -grown.likelihood(grown.tokens, *pair).mean().item() for of, pair in OLD.items()}
        found[name] = {"shadow, IoU": shadow_iou(ready, rows[:, grown.layout.span["shadow"]], truth), **lost}
    return found | {"bound: the true tokens": {"shadow, IoU": shadow_iou(ready, true_rows.long(), truth)}}


def shadow_iou(ready, rows, masks):
    return score("shadow", ready.show.studio.pictures(rows).mean(1) - 0.5, masks)
