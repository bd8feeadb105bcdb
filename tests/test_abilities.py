"""What the ready models are measured by, against closed forms, and the page that is written of it."""
import contextlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import abilities
import capabilities
import rich
import search
import studio
import train_4m
from guidance import Guided
from join import validation
from test_train_4m import small_model


@pytest.fixture(scope="module")
def rich_set():
    """Layout and tokens of eight validation scenes of the rich set, and a small model that has learned nothing."""
    arrays, kinds = validation(("scenes64", "rich64"))
    layout = train_4m.Layout(kinds)
    tokens = torch.cat([torch.from_numpy(arrays[m][:8].astype(np.int64)) for m in kinds], 1)
    model = small_model(layout)
    torch.manual_seed(0)
    for head in (model.head_a, model.head_b, model.head_word):
        torch.nn.init.normal_(head.weight, std=0.3)
    return SimpleNamespace(layout=layout, tokens=tokens, model=model.requires_grad_(False))


def test_box_iou():
    assert abilities.box_iou((0, 0, 3, 3), (0, 0, 3, 3)) == 1
    assert abilities.box_iou((0, 0, 3, 3), (4, 0, 7, 3)) == 0
    assert abilities.box_iou((0, 0, 3, 3), (2, 0, 5, 3)) == pytest.approx(8 / 24)


def test_boxes_are_right_once_and_with_their_shape():
    def row(*boxes):
        ids = [2 + 64 * k + v for box in boxes for k, v in enumerate(box)]
        return torch.tensor([ids + [1] + [0] * (15 - len(ids))])
    a, b = (0, 0, 9, 9, 0), (20, 20, 29, 29, 1)
    assert abilities.ap50(row(a, b), row(a, b)) == 1 and abilities.ap50(row(b, a), row(a, b)) == 1
    assert abilities.ap50(row(a, a), row(a, b)) == 0.25, "the same box twice: precision and recall are 1/2"
    assert abilities.ap50(row((0, 0, 9, 9, 2), b), row(a, b)) == 0.25, "another shape"
    assert abilities.ap50(row(), row(a)) == 0


def test_mean_iou():
    index = torch.full((1, 8, 8), -1)
    index[0, :4] = 0
    pictures = rich.inst_picture(index)
    other = rich.inst_picture(index.roll(2, 1))
    assert abilities.mean_iou(pictures, pictures) == pytest.approx(0.5), "two of four classes are nowhere"
    assert abilities.mean_iou(other, pictures) == pytest.approx(0.5 / 3)


def test_ranks():
    table = torch.tensor([[0.9, 0.1, 0.2], [0.5, 0.4, 0.6], [0.3, 0.3, 0.3]])
    rank = abilities.ranks(table)
    assert rank.tolist() == [0, 2, 2], "of equals the last"
    assert abilities.told_ranks(rank) == {"R@1": pytest.approx(1 / 3), "R@5": 1.0, "median rank": 3.0}


def test_the_draw_that_others_agree_with():
    pictures = {m: torch.rand(3, 2, 3, 8, 8) for m in abilities.PICTURES}
    rows = torch.tensor([[[1, 2, 3], [4, 4, 4]], [[1, 2, 0], [4, 4, 5]], [[9, 9, 9], [4, 5, 5]]])  # (draws, n, L)
    draws = [{**{m: pictures[m][k] for m in pictures}, **{m: rows[k] for m in abilities.ROWS}} for k in range(3)]
    made = abilities.ensemble(draws)
    assert made["desc"][0].tolist() in ([1, 2, 3], [1, 2, 0]) and made["desc"][1].tolist() == [4, 4, 5]
    assert torch.allclose(made["normal"], pictures["normal"].mean(0))


def log_probs(case, model, known, dec_pos):
    return train_4m.predict(model, case.tokens, known, dec_pos)[..., :4096]


def test_guidance(rich_set):
    """Of one condition with weight 1 it is the model, with 0 what knows the output alone, and sums are sums."""
    layout, model = rich_set.layout, rich_set.model
    span = layout.span
    known = torch.zeros_like(rich_set.tokens, dtype=torch.bool)
    parts = {}
    for name, modalities in (("none", ()), ("depth", ("depth",)), ("normal", ("normal",)), ("both", ("depth", "normal"))):
        some = known.clone()
        some[:, span["rgb"].start:span["rgb"].start + 9] = True
        for m in modalities:
            some[:, span[m]] = True
        parts[name] = some
    dec_pos = torch.arange(20, 30).expand(8, -1)
    plain = {name: log_probs(rich_set, model, some, dec_pos) for name, some in parts.items()}

    def guided(known, *conditions):
        return log_probs(rich_set, Guided(model, layout, "rgb", conditions), known, dec_pos)
    both = parts["both"]
    assert torch.allclose(guided(both, (("depth", "normal"), 1.0)), plain["both"], atol=1e-4)
    assert torch.allclose(guided(both, (("depth",), 1.0)), plain["depth"], atol=1e-4)
    assert torch.allclose(guided(both, (("depth",), 0.0)), plain["none"], atol=1e-4)
    asked = plain["none"] + 2 * (plain["depth"] - plain["none"]) - 0.5 * (plain["normal"] - plain["none"])
    assert torch.allclose(guided(both, (("depth",), 2.0), (("normal",), -0.5)), asked, atol=1e-3)
    first = parts["both"].clone()
    first[:, span["rgb"]] = False  # nothing of the output is known yet
    alone = {m: first & (layout.kind == layout.names.index(m)) for m in ("depth", "normal")}
    mean = sum(w * log_probs(rich_set, model, alone[m], dec_pos) for m, w in (("depth", 0.75), ("normal", 0.25)))
    assert torch.allclose(guided(first, (("depth",), 3.0), (("normal",), 1.0)), mean, atol=1e-4)
    for weight in (0.0, -1.0):
        assert guided(first, (("depth",), weight)).isfinite().all()


def test_a_beam_keeps_the_best(rich_set):
    """Of every round the best by the verifier, of which a third, then two thirds are drawn no more."""
    layout, span, seen = rich_set.layout, rich_set.layout.span["rgb"], []

    def generate(tokens, known, outputs, seed):
        rng = torch.Generator().manual_seed(seed)
        seen.append((tokens.clone(), known.clone()))
        return torch.where(known | (layout.kind != 0), tokens, torch.randint(4096, tokens.shape, generator=rng))

    def total(rows):
        return rows[:, span].float().mean(1)
    stub = SimpleNamespace(layout=layout, generate=generate, output=train_4m.Output,
                           only=lambda tokens, m: layout.valid(tokens) & (layout.kind == layout.names.index(m)))
    rank = search.random_order(rich_set.tokens)
    rows = search.in_rounds(stub, rich_set.tokens, ("desc",), rank, (1 / 3, 2 / 3, 1), (1.0,) * 3, 4, total)
    shares = [known[:, span].float().mean().item() for _, known in seen]
    assert shares == pytest.approx([0] * 4 + [21 / 64] * 4 + [43 / 64] * 4)
    finished = [[generate(*case, [], 1 + i + k) for k in range(4)] for i, case in ((0, seen[0]), (4, seen[4]), (8, seen[8]))]
    best = torch.stack([total(one) for one in finished[2]]).amax(0)
    assert torch.equal(total(rows), best)
    assert torch.equal(total(seen[4][0]), torch.stack([total(one) for one in finished[0]]).amax(0))
    kept = seen[8][1][:, span]
    assert torch.equal(rows[:, span][kept], seen[8][0][:, span][kept])


def test_expected_digits(rich_set, monkeypatch):
    """Of a model that is sure they are those of its tokens; between two tokens the mean of both."""
    layout, span, tokens = rich_set.layout, rich_set.layout.span["rgb"], rich_set.tokens[:2]
    shown = studio.Studio()
    stub = SimpleNamespace(layout=layout, model=None, show=SimpleNamespace(studio=shown), autocast=contextlib.nullcontext,
                           only=lambda rows, m: layout.kind == layout.names.index(m))

    def sure(model, rows, known, places):
        return torch.nn.functional.one_hot(tokens.gather(1, places), 4096).float().log()
    monkeypatch.setattr(train_4m, "predict", sure)
    assert torch.allclose(abilities.expected(stub, tokens, "depth", "rgb"), shown.pictures(tokens[:, span]), atol=1e-5)

    def torn(model, rows, known, places):
        both = [torch.nn.functional.one_hot(ids.gather(1, places), 4096).float() for ids in (tokens, tokens.roll(1, 0))]
        return ((both[0] + both[1]) / 2).log()
    monkeypatch.setattr(train_4m, "predict", torn)
    one, other = abilities.expected(stub, tokens, "depth", "rgb")
    assert torch.allclose(one, other, atol=1e-5)


def test_a_glimpse_is_of_the_nearest_object(rich_set):
    described = [[{"x": 6, "y": 93, "shape": "cube", "color": "red", "material": "metal"}],
                 [{"x": 56, "y": 31, "shape": "cube", "color": "red", "material": "metal"}]]
    stub = SimpleNamespace(layout=rich_set.layout)
    masks = abilities.glimpses_of(stub, rich_set.tokens[:2], described)
    grids = {name: mask[:, rich_set.layout.span["rgb"]].view(2, 8, 8) for name, mask in masks.items()}
    near = grids["9 tokens of rgb around it"]
    assert near.sum((1, 2)).tolist() == [4, 9] and near[0, 6:, :2].all() and near[1, 1:4, 3:6].all()
    half = grids["the half of rgb with it"]
    assert half[0, :, :4].all() and half[1, :, 4:].all() and half.sum() == 64
    assert [int(masks[name].sum()) for name in ("its colour", "its place", "its box", "all of rgb")] == [2, 2, 10, 128]
    other = [{**described[1][0], "shape": "sphere", "x": 31}]
    shares = abilities.nearest_found([described[0], other], described)
    assert shares == {"color": 1, "shape": 0.5, "material": 1, "place": 0.5}


def test_one_attribute_is_changed():
    objects = [{"shape": "cube", "color": "red"}, {"shape": "cone", "color": "red"}]
    assert abilities.changed(objects, "color") == [{"shape": "cube", "color": "blue"}, objects[1]]
    assert abilities.changed([{"color": "yellow"}], "color") == [{"color": "gray"}], "after the last word the first"
    assert objects[0]["color"] == "red"


# ------------------------------------------------------------------------------------------------------------
# The page

def test_table():
    text = capabilities.table({"one_step": {"a": 0.12345, "b": 2.0}, "1.0": {"b": 1234.5678}})
    assert text.split("\n") == ["| | a | b |", "|---|--:|--:|", "| one step | 0.123 | 2 |", "| 1.0 |  | 1.23e+03 |"]


def test_the_page_is_of_the_numbers():
    found = json.loads(capabilities.NUMBERS.read_text())
    assert capabilities.REPORT.read_text() == capabilities.report(found)
    assert list(found) and set(found) == set(capabilities.SECTIONS), "a section that was never measured"


def test_numbers_have_their_bounds():
    found = json.loads(capabilities.NUMBERS.read_text())
    for kind in capabilities.MODELS:
        for name, row in found[kind].items():
            assert set(row) == {"model", "the same answer to all", "another scene's", "bound"}, name


def test_sections_that_train_need_their_set(tmp_path, monkeypatch):
    """It is said before the others take their hours."""
    monkeypatch.setattr(capabilities, "ROOT", tmp_path)
    monkeypatch.setattr(capabilities, "Ready", lambda *_: pytest.fail("too late"))
    with pytest.raises(SystemExit, match="^capabilities.py: there is no .*scenes64-rich64/train"):
        capabilities.main(["tasks", "transfer"])


def test_unknown_sections_are_told():
    import subprocess
    import sys
    done = subprocess.run([sys.executable, capabilities.__file__, "cooking"], capture_output=True, text=True)
    assert done.returncode == 2 and "there is no section cooking" in done.stderr
