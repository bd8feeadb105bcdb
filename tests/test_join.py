"""Sets joined to one, and nano4M on all modalities that there are."""
import dataclasses
import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tqdm import tqdm

import hub
import join
import runs
import shards
import show_4m
import show_more
import train_4m
from eval_masks import FROZEN, draw_all_roles, draw_roles
from test_train_4m import SMALL, make_root, run_here, small_model

SETS = "scenes64", "rich64", "audio64", "fine64"
ROWS = 120


def frozen_arrays(name):
    return join.read_frozen(name)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data folder with training sets of validation scenes."""
    folder = tmp_path_factory.mktemp("data")
    for name in SETS:
        arrays, kinds = frozen_arrays(name)
        (folder / name).mkdir()
        train = {m: arrays[m][:ROWS] for m in (*kinds, "scene")}
        hub.finish(folder / name, {"name": name, "num": ROWS, "content_sha256": name}, kinds, train, {})
    return folder


@pytest.fixture
def make(root, monkeypatch):
    monkeypatch.setattr(join, "ROOT", root)
    return lambda *names: join.main(list(names))


@pytest.fixture(scope="module")
def joined(root):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(join, "ROOT", root)
        join.main(list(SETS))
    folder = root / "-".join(SETS)
    path = f"{folder}/val.npz"
    with np.load(path) as arrays:  # an evaluation of all scenes takes a minute
        few = {name: array[:100] if len(array) == 2000 else array for name, array in arrays.items()}
    np.savez(folder / "few.npz", **few)
    argv = [f"--data={folder}/train", f"--frozen={folder}/few.npz", f"--frozen_masks={folder}/few.npz"]
    frozen = train_4m.read_frozen(SimpleNamespace(frozen=path, frozen_masks=path))
    return SimpleNamespace(folder=folder, argv=argv, frozen=frozen)


def test_all_is_kept(joined):
    tokens, roles, kinds, _ = joined.frozen
    assert list(kinds) == list(train_4m.MODALITIES), "all there are, in the script's order"
    layout = train_4m.Layout(kinds)
    meta = shards.read_meta(joined.folder / "train")
    assert meta["modalities"] == kinds and meta["num"] == ROWS
    for name in SETS:
        arrays, about = frozen_arrays(name)
        for m in about:
            assert np.array_equal(tokens[:, layout.span[m]], arrays[m]), m
            assert np.array_equal(np.load(joined.folder / "train" / f"{m}.npy"), arrays[m][:ROWS])
    valid, kind = layout.valid(tokens).numpy(), layout.kind.numpy()
    assert (roles > 0).any() and valid[roles.numpy() > 0].all(), "no role for padding"
    assert np.array_equal(roles[0], draw_roles(valid[0], kind, np.random.default_rng(0)))
    whole = roles[1::2]
    for k, m in enumerate(layout.names):
        part, there = whole[:, layout.span[m]], layout.valid(tokens)[1::2][:, layout.span[m]]
        given = (part == 1).any(1)
        assert torch.equal(part[given] == 1, there[given]) and ((part == 2).sum(1) <= 16).all(), m


def test_frozen_roles_are_drawn_again():
    """Those of the scenes' own eight modalities come from the same draws."""
    arrays, kinds = frozen_arrays("scenes64")
    with np.load(FROZEN / "eval_4m_64.npz") as frozen:
        assert np.array_equal(draw_all_roles(arrays, kinds), frozen["roles"])


def test_what_cannot_be_joined(root, make, monkeypatch, tmp_path):
    for names, said in ((["scenes64"], "takes two sets or more"), (["rich64", "rich64"], "each once"),
                        (["scenes64", "elsewhere64"], "no validation scenes"),
                        (["scenes64", "objects64"], "no modality label")):
        with pytest.raises(SystemExit) as stop:
            make(*names)
        assert said in str(stop.value) and "\n" not in str(stop.value)
    monkeypatch.setattr(join, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="there is no .*scenes64"):
        join.main(["scenes64", "rich64"])


def test_other_scenes_are_noticed(root, make, monkeypatch, tmp_path):
    other = tmp_path / "data"
    for name in ("scenes64", "rich64"):
        arrays, kinds = frozen_arrays(name)
        (other / name).mkdir(parents=True)
        rows = slice(0, 20) if name == "scenes64" else slice(1, 21)
        hub.finish(other / name, {"name": name, "num": 20}, kinds, {m: arrays[m][rows] for m in (*kinds, "scene")}, {})
    monkeypatch.setattr(join, "ROOT", other)
    with pytest.raises(SystemExit, match="rich64 is not about the scenes of scenes64"):
        join.main(["scenes64", "rich64"])
    assert not (other / "scenes64-rich64/train").exists()


def test_validation_scenes_alone(joined, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(join, "ROOT", tmp_path)
    join.main(list(SETS), val_only=True)
    assert f"--frozen=data/{'-'.join(SETS)}/val.npz" in capsys.readouterr().out
    name = f"{tmp_path}/{'-'.join(SETS)}/val.npz"
    again = train_4m.read_frozen(SimpleNamespace(frozen=name, frozen_masks=name))
    assert all(torch.equal(a, b) for a, b in zip(again[:2], joined.frozen)) and again[2] == joined.frozen[2]


def test_once_more(joined, make, capsys):
    make(*SETS)
    said = capsys.readouterr().out
    assert "is there and whole" in said and f"--frozen=data/{'-'.join(SETS)}/val.npz" in said


def test_sets_that_were_made_again_are_noticed(joined, root, make, monkeypatch, tmp_path):
    meta = root / SETS[1] / "train/meta.json"
    before = meta.read_text()
    meta.write_text(json.dumps(json.loads(before) | {"sha256": {"palette": "another"}}))
    try:
        with pytest.raises(SystemExit, match="was made with another content; delete it"):
            make(*SETS)
    finally:
        meta.write_text(before)
    for name in SETS:
        (tmp_path / f"{name}.npz").write_bytes((shards.FROZEN / f"{name}.npz").read_bytes())
    arrays, kinds = frozen_arrays(SETS[1])
    hub.write_val(tmp_path / f"{SETS[1]}.npz", arrays | {"palette": arrays["palette"][::-1]}, kinds)
    monkeypatch.setattr(shards, "FROZEN", tmp_path)
    with pytest.raises(SystemExit, match="was made with another frozen; delete it"):
        make(*SETS)


@pytest.fixture(scope="module")
def layout(joined):
    return train_4m.Layout(joined.frozen[2])


def test_loss_is_of_the_probabilities(joined, layout):
    """Of every modality: what the loss says of its targets is what forward gives them, and a place's sum to 1."""
    model, tokens = small_model(layout), joined.frozen[0][:3]
    rng = torch.Generator().manual_seed(0)
    enc_pos = torch.rand(tokens.shape, generator=rng).argsort(1)[:, :40]
    digits = (torch.arange(layout.size) < layout.first_text).long()
    for m in layout.names:
        places = torch.arange(layout.size)[layout.span[m]][:6].expand(3, -1)
        log_probs = model(tokens, enc_pos, None, places)
        assert torch.allclose(log_probs.exp().sum(-1), torch.ones(places.shape), atol=1e-5), m
        assert (log_probs[..., layout.modalities[m]["vocab"]:] == -torch.inf).all()
        found = log_probs.gather(2, tokens.gather(1, places)[..., None]).sum()
        images = places.size(1) * bool(digits[places[0, 0]])
        loss = train_4m.masked_loss(model, tokens, enc_pos, None, places, torch.ones(places.shape), images)
        assert loss.item() == pytest.approx(-found.item(), rel=1e-4), m


def test_words_have_rows_of_their_own(layout):
    """Of one table of embeddings: but for descriptions and captions, which have the same words."""
    model, rows = small_model(layout), {}
    for m in layout.names:
        start = model.token_offset[layout.span[m]].unique().item()
        rows[m] = range(start, start + layout.modalities[m]["vocab"])
    pictures = {m for m in layout.names if rows[m].start == 0}
    assert pictures == set(train_4m.IMAGES) and rows["desc"] == rows["caption"]
    others = sorted((rows[m] for m in layout.names if m not in pictures and m != "caption"), key=lambda r: r.start)
    assert others[0].start == layout.vocab and others[-1].stop == layout.vocab + len(model.embed_word.weight)
    assert all(a.stop == b.start for a, b in zip(others, others[1:]))
    assert model.head_word.out_features == min(rows[m].start for m in train_4m.CODES) - layout.vocab


def test_positions_tell_places_apart(layout):
    """Pairs of numbers are a place's own within its modality; objects of texts share theirs."""
    major, minor, num_major, num_minor = train_4m.split_positions(layout)
    assert major.max() == num_major - 1 and minor.max() == num_minor - 1
    for m in layout.names:
        pairs = {*zip(major[layout.span[m]].tolist(), minor[layout.span[m]].tolist())}
        assert len(pairs) == layout.modalities[m]["length"], m
    pairs = [{*zip(major[layout.span[m]].tolist(), minor[layout.span[m]].tolist())} for m in ("rgb", "fine_rgb", "feat")]
    assert pairs[0] == pairs[2] and not pairs[0] & pairs[1]
    second = [major[layout.span[m]][facts].item() for m, facts in train_4m.FACTS.items()]
    assert len({*second}) == 1, "the second object of each text"


def test_fine_pictures_have_four_tokens_in_a_cell(layout):
    model = small_model(layout)
    cells = model.cell[layout.span["fine_rgb"]].view(16, 16)
    assert torch.equal(cells[::2, ::2].flatten(), model.cell[layout.span["rgb"]])
    assert all(torch.equal(cells[i::2, j::2], cells[::2, ::2]) for i in (0, 1) for j in (0, 1))


def test_targets_of_speech_start_from_the_word_that_is_said(layout):
    """The one after as many places as those before it last; of targets elsewhere, or later, none, nor from the first
    word on whose time is not known. In whatever order they are given."""
    model = small_model(layout)
    row, start = layout.span["timing"], layout.span["speech"].start
    tokens = torch.zeros(1, layout.size, dtype=torch.long)
    tokens[0, row.start:row.start + 4] = train_4m.FIRST_TIME + torch.tensor([3, 4, 0, 89])  # over before 3, 7, 7 and 96
    order = torch.tensor([[2, 0, 3, 1]])
    enc_pos = row.start + order
    ids = tokens.gather(1, enc_pos) + model.token_offset[enc_pos]
    x = torch.randn(1, 4, model.embed_left.embedding_dim)
    of_word = x[0, order[0].argsort()]
    dec_pos = torch.tensor([[start, start + 2, start + 3, start + 6, start + 7, start + 95, layout.span["rgb"].start]])
    without = {word: order != word for word in (1, 3)}
    for visible, words in ((None, (0, 0, 1, 1, 3, 3, None)), (without[3], (0, 0, 1, 1, None, None, None)),
                           (without[1], (0, 0, None, None, None, None, None))):
        state = model.at_times(x, ids, enc_pos, visible, dec_pos)[0]
        for found, word, left in zip(state, words, (3, 1, 4, 1, 89, 1, 0)):
            wanted = torch.zeros_like(found) if word is None else of_word[word] + model.embed_left.weight[left]
            assert torch.allclose(found, wanted)


def test_a_model_without_weights_knows_the_times(layout):
    """As it is made where the blocks are to be divided among processes."""
    model = small_model(layout)
    with torch.device("meta"):
        empty = train_4m.Nano4M(dataclasses.replace(train_4m.CONFIGS["cpu"], dim=32), layout)
    assert empty.local.weight.is_meta and not empty.cell.is_meta
    for name in ("time", "lasts", "timed_place", "cell", "word_cell"):
        assert torch.equal(getattr(empty, name), getattr(model, name)), name


def test_a_divided_model_of_all_modalities(joined, tmp_path):
    """--shard=true: every matrix that Muon moves is in a divided block."""
    root = make_root(tmp_path / "root")
    runs.run("4m", [*SMALL, *joined.argv, "--num_steps=2", "--eval_every=9", "--shard=true"], root, 2)
    assert runs.footers(root)[0]["world_size"] == 2


def test_every_link_is_trained(joined, layout, tmp_path, monkeypatch):
    links = train_4m.known_links(layout)
    assert links == list(train_4m.LINKS)
    root = make_root(tmp_path / "root")
    run_here(monkeypatch, root, [*SMALL, *joined.argv, f"--num_steps={len(links)}", "--eval_every=1000"])
    foot = json.loads((root / "records/runs.jsonl").read_text())
    assert all(foot[f"val_loss_{half}_{m}"] > 0 for half in ("course", "whole") for m in layout.names)


@functools.cache
def tracks():
    return [name for name, config in train_4m.CONFIGS.items() if "-" in config.data.split("/")[1]]


@pytest.mark.parametrize("track", tracks())
def test_tracks_of_joined_sets_say_how_to_make_them(track, tmp_path, monkeypatch):
    config = train_4m.CONFIGS[track]
    name = config.data.split("/")[1]
    assert shards.command_for(shards.ROOT / name / "train") == f"python data/join.py {name.replace('-', ' ')}"


def test_numbers_of_the_truth_are_the_bounds(joined, layout, monkeypatch):
    """A model that says what is true of every scene, and one that says what is true of the next one."""
    run = SimpleNamespace(device=torch.device("cpu"), options=SimpleNamespace(quality_scenes=24))
    shown = show_4m.Show(train_4m, run, layout, joined.frozen[0][:24])
    shown.bar = tqdm(disable=True, total=0)
    found = []
    for shift in (0, 1):
        monkeypatch.setattr(shown, "generate", lambda model, tokens, known, outputs: tokens.roll(shift, 0))
        found.append(show_more.measure(shown, None))
    right, wrong = found
    assert right["pose_class"] == right["pose_turn"] == right["metadata_accuracy"] == right["palette_number"] == 1
    assert right["palette_error"] < 1 and right["pose_corner"] < 0.06
    assert all(right[f"fine_{m}_gain"] > 2 for m in ("rgb", "depth", "normal", "seg"))
    assert right["fine_rgb_psnr"] == right["fine_rgb_with_caption_psnr"] > 34 and right["fine_rgb_from_caption_f1"] > 0.95
    assert right["inst_iou"] > 0.94 and right["polygon_iou"] > 0.9 and right["rgb_from_pose_f1"] > 0.95
    assert right["caption_from_speech_word_errors"] == 0 and right["desc_from_sound_impacts"] == 1
    assert right["speech_from_caption_word_errors"] < 0.05 and right["speech_from_timing_word_errors"] < 0.05
    assert right["speech_from_rgb_f1"] > 0.93 and right["voice_from_speech"] == 1
    assert right["sound_from_rgb_impacts"] > 0.97 and right["rgb_from_speech_f1"] > 0.95
    assert right["rgb_from_speech_by_caption_f1"] > 0.95 and right["rgb_from_speech_by_desc_f1"] > 0.95
    for name in right:
        less = name.endswith(("error", "errors", "corner"))
        assert wrong[name] > right[name] if less else wrong[name] < right[name], name


def test_word_errors():
    rows = [text.split() for text in ("a red cube", "a", "a red cube", "a blue cone")]
    assert show_more.word_errors(rows[:2], rows[2:]) == pytest.approx(2 / 6)
    objects = [[{"color": "red", "material": "metal", "shape": "cube"}], []]
    heard = [show_more.words(text) for text in ("A small red metal cube and a red metal cube.", "blue metal sphere")]
    assert show_more.named_f1(heard, objects) == pytest.approx(2 * 1 / (3 + 1))
    assert show_more.share_right([["a", "b"], []], [["a", "c", "d"], ["e"]]) == 1 / 4
