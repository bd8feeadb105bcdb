"""train_vlm.py: packing, masks, model, backbones of the hub, evaluation, generation, whole runs on tiny data."""
import dataclasses
import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import leaderboard
import runs
import tokenizer
import train_vlm
from train_vlm import IMAGE, PAD, Fault, generate

ROOT = Path(__file__).resolve().parent.parent
DIMS = {"vit_dim": 32, "vit_depth": 1, "vit_heads": 2, "vit_mlp": 64, "lm_dim": 32, "lm_depth": 2, "lm_heads": 4,
        "lm_kv_heads": 2, "lm_mlp": 48}
SMALL = ["--track=cpu", *(f"--{key}={value}" for key, value in DIMS.items()), "--rows=4", "--eval_batch=30",
         "--samples=2", "--precision=fp32"]


def small_config(**changes):
    return dataclasses.replace(train_vlm.CONFIGS["cpu"], **DIMS, **changes)


@pytest.fixture(scope="module")
def frozen():
    return train_vlm.read_frozen(train_vlm.CONFIGS["cpu"])


@pytest.fixture(scope="module")
def model():
    """A small model in float32 whose predictions differ: everything is drawn at random."""
    torch.manual_seed(0)
    model = train_vlm.VLM(small_config(), 512)
    train_vlm.init_weights(model)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with 200 training conversations and 60 for validation, and the overrides that point there."""
    folder = tmp_path_factory.mktemp("tiny")
    with np.load(ROOT / "data/frozen/qa64.npz") as arrays:
        parts, about = {m: arrays[m] for m in ("pixels", "qa", "answer", "family")}, arrays["modalities"]
    (folder / "train").mkdir()
    for m, rows in parts.items():
        np.save(folder / "train" / f"{m}.npy", rows[:200])
    meta = {"name": "qa64", "version": 1, "size": 64, "num": 200, "seed": 1, "text": "",
            "modalities": json.loads(bytes(about))}
    (folder / "train/meta.json").write_text(json.dumps(meta))
    np.savez(folder / "val.npz", modalities=about, **{m: rows[:60] for m, rows in parts.items()})
    return folder, [f"--data={folder}/train", f"--frozen={folder}/val.npz"]


make_root, run_here = functools.partial(runs.make_root, "vlm"), functools.partial(runs.run_here, "vlm")


# ------------------------------------------------------------------------------------------------------------
# Packing and masks

def make_loader(frozen, rank=0, world=1, **changes):
    pixels, tokens, answer = (part[:50] for part in frozen[:3])
    config = small_config(**({"rows": 4, "row": 192} | changes))
    return train_vlm.Loader(pixels, tokens, answer, 16, frozen[4]["pad"], config, rank, world, torch.device("cpu"))


def conversations(batch, pad):
    """The parts of a packed step: a list of (tokens, answer, picture)."""
    parts, used = [], 0
    for tokens, answer, document in zip(batch["tokens"], batch["answer"], batch["document"]):
        for d in document.unique_consecutive():
            inside = document == d
            if d >= 0:
                assert (tokens[inside][:16] == IMAGE).all() and (tokens[inside][16:] >= 0).all()
                parts.append((tokens[inside][16:], answer[inside][16:], batch["pixels"][used]))
                used += 1
            else:
                assert (tokens[inside] == pad).all() and (answer[inside] == 0).all()
                assert inside.nonzero().min() > (~inside).nonzero().max(), "padding comes last"
    assert used == len(batch["pixels"])
    return parts


def test_packing_keeps_every_conversation_whole(frozen):
    loader, seen, pad = make_loader(frozen), [], frozen[4]["pad"]
    known = {tuple(row[row != pad].tolist()): i for i, row in enumerate(frozen[1][:50])}
    for _ in range(6):
        batch = loader()
        for tokens, answer, picture in conversations(batch, pad):
            i = known[tuple(tokens.tolist())]
            assert torch.equal(answer, frozen[2][i][:len(answer)].long()) and torch.equal(picture, frozen[0][i])
            seen.append(i)
        assert batch["answers"] == (batch["answer"] > 0).sum()
    counts = np.bincount(seen, minlength=50)
    assert counts.max() - counts.min() <= 2 and len(seen) > 50
    share = (batch["tokens"] != pad).float().mean()
    assert share > 0.85, f"only {share:.0%} of a step is no padding"


def test_ranks_share_the_rows_of_one_step(frozen):
    whole, pad = make_loader(frozen), frozen[4]["pad"]
    ranks = [make_loader(frozen, rank, 2) for rank in (0, 1)]
    for _ in range(3):
        batch, parts = whole(), [loader() for loader in ranks]
        assert torch.equal(batch["tokens"], torch.cat([part["tokens"] for part in parts]))
        assert torch.equal(batch["answer"], torch.cat([part["answer"] for part in parts]))
        assert torch.equal(batch["pixels"], torch.cat([part["pixels"] for part in parts]))
        assert {part["answers"] for part in parts} == {batch["answers"]}
        for part in parts:
            conversations(part, pad)


def test_a_row_too_short(frozen):
    with pytest.raises(Fault, match="a row of 40 tokens is too short"):
        make_loader(frozen, row=40)


def test_mask_against_a_plain_loop(model):
    document = torch.tensor([[0, 0, 0, 0, 1, 1, 1, -1], [2, 2, 2, 2, 2, 2, 2, 2]])
    image = torch.tensor([[1, 1, 0, 0, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]]).bool()
    mask = model.mask(document, image)
    for b in range(2):
        for q in range(8):
            for k in range(8):
                same = document[b, q] == document[b, k]
                assert mask[b, 0, q, k] == (same and (k <= q or image[b, q] and image[b, k]))
    assert torch.equal(model.mask(document, image, 5), mask[:, :, 5:])


def test_block_mask_is_the_dense_mask(model, frozen):
    """Flex attention with the BlockMask against attend with the dense mask, forward; nothing is compiled twice."""
    loader, kept = make_loader(frozen, rows=2, row=256), {}
    for i in range(3):
        batch = loader()
        document, image = batch["document"], batch["tokens"] == IMAGE
        q, k, v = torch.randn(3, 2, 2, 256, 16).unbind(0)
        with torch._dynamo.config.patch(error_on_recompile=i > 0), torch.no_grad():
            found = train_vlm.attend(q, k, v, train_vlm.block_mask(model.may_see, 2 * document + image, kept))
        dense = model.mask(document, image)
        assert torch.allclose(train_vlm.attend(q, k, v, dense), found, atol=1e-5)
        assert not torch.allclose(train_vlm.attend(q, k, v, torch.ones_like(dense)), found, atol=1e-2)
    assert len(kept) == 1


def test_a_packed_conversation_is_alone(model, frozen):
    """Its loss is that of the conversation by itself, whatever stands beside it in the row."""
    batch, pad = make_loader(frozen)(), frozen[4]["pad"]
    with torch.no_grad():
        parts = (batch["tokens"], batch["answer"], batch["document"], batch["pixels"])
        logits, truth = train_vlm.answer_logits(model, *parts)
        packed, alone = F.cross_entropy(logits, truth, reduction="none"), []
        for tokens, answer, picture in conversations(batch, pad):
            alone.append(train_vlm.answer_nats(model, picture[None], tokens[None], answer[None])[0])
    assert torch.allclose(packed, torch.cat(alone), atol=1e-4)


def test_answers_do_not_leak(model, frozen):
    pixels, tokens, answer = (part[:1] for part in frozen[:3])
    first = (answer[0] > 0).nonzero()[0, 0].item()
    lead = lambda value, part: F.pad(part, (16, 0), value=value)
    document = torch.zeros_like(lead(0, tokens))

    def logits(tokens, pixels=pixels):
        with torch.no_grad():
            return model.lm.logits(model(lead(IMAGE, tokens), document, pixels))[0, 16:]
    changed = tokens.clone()
    changed[0, first] = (changed[0, first] + 1) % 500
    one, other = logits(tokens), logits(changed)
    assert torch.equal(one[:first], other[:first]) and not torch.equal(one[first], other[first])
    assert not torch.allclose(one[first - 1], logits(tokens, 255 - pixels)[first - 1], atol=1e-3), "the picture counts"


# ------------------------------------------------------------------------------------------------------------
# Evaluation and optimizers

def test_evaluation_against_a_plain_loop(model, frozen):
    parts = [part[:40] for part in frozen[:4]]
    with torch.no_grad():
        loss, accuracy = train_vlm.evaluate(model, *parts, small_config(eval_batch=15), 0, 1)
        nats, right, asked = [], dict.fromkeys(range(1, 6), 0), dict.fromkeys(range(1, 6), 0)
        for pixels, tokens, answer, family in zip(*parts):
            each, hit = train_vlm.answer_nats(model, pixels[None], tokens[None], answer[None])
            nats += each.tolist()
            marks = answer[answer > 0]
            for turn, number in enumerate(family.tolist(), 1):
                if number:
                    asked[number] += 1
                    right[number] += bool(hit[marks == turn].all())
    assert loss == pytest.approx(np.mean(nats), rel=1e-4)
    assert list(accuracy) == list(train_vlm.FAMILIES)
    assert list(accuracy.values()) == pytest.approx([right[n] / asked[n] for n in range(1, 6)], abs=1e-6)


def test_accuracy_of_a_model_that_knows(model, frozen, monkeypatch):
    """All right but what is said about turn 2: the families of second turns lose exactly those."""
    parts = [part[:40] for part in frozen[:4]]

    def knows(model, pixels, tokens, answer):
        marks = answer[answer > 0]
        return torch.zeros(len(marks)), marks != 2
    monkeypatch.setattr(train_vlm, "answer_nats", knows)
    loss, accuracy = train_vlm.evaluate(model, *parts, small_config(), 0, 1)
    family = parts[3]
    for n, name in enumerate(train_vlm.FAMILIES, 1):
        second = (family[:, 1] == n).sum().item() / (family == n).sum().item()
        assert accuracy[name] == pytest.approx(1 - second, abs=1e-6)
    assert loss == 0


def test_every_parameter_has_one_optimizer(model):
    for changes in ({}, {"vit": "x"}, {"lm": "x"}):
        muon, adam = train_vlm.make_optimizers(model, small_config(**changes), 0, 1, "fp32")
        taken = [p for params, _ in (muon.stacks if muon else []) for p in params]
        taken += [p for group in adam.param_groups for p in group["params"]]
        assert len(taken) == len({id(p) for p in taken}) == len(list(model.parameters()))
        rates = {group["peak"] for group in adam.param_groups}
        assert rates == ({1e-5, 1e-3} if changes else {small_config().adam_lr})


# ------------------------------------------------------------------------------------------------------------
# Generation

def test_the_cache_changes_nothing(model, frozen):
    pixels, tokens, answer = (part[:12] for part in frozen[:3])
    config = small_config(max_tokens=20)
    lengths = set()
    for picture, row, marks in zip(pixels, tokens.tolist(), answer.tolist()):
        question = row[:marks.index(1)]
        made = [generate(model, picture, question, 3, config, cached=cached) for cached in (True, False)]
        assert made[0] == made[1] and 3 not in made[0]
        lengths.add(tuple(made[0]))
    assert len(lengths) > 3, "answers differ from picture to picture"
    hot = dataclasses.replace(config, temperature=1.0, top_k=50, top_p=0.9)
    drawn = [generate(model, picture, question, None, hot, seed, cached) for seed in (0, 1) for cached in (True, False)]
    assert drawn[0] == drawn[1] and drawn[2] == drawn[3] != drawn[0] and len(drawn[0]) == 20


def test_generation_is_what_evaluation_sees(model, frozen):
    """The first token said is the one that the evaluation holds for the likeliest."""
    for picture, row, marks in zip(*(part[:10] for part in frozen[:3])):
        first = (marks == 1).nonzero()[0, 0].item()
        _, right = train_vlm.answer_nats(model, picture[None], row[None], marks[None])
        said = generate(model, picture, row[:first].tolist(), None, small_config(max_tokens=1))[0]
        assert (said == row[first].item()) == right[0].item()


def test_chat(model, tmp_path, monkeypatch, capsys):
    Image.new("L", (50, 70), 128).save(tmp_path / "grey.png")
    config, lines = small_config(chat=str(tmp_path / "grey.png")), iter(["How many objects are there?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    train_vlm.chat(model, config, train_vlm.Words(""))
    assert len(capsys.readouterr().out.splitlines()) == 2
    (tmp_path / "text.png").write_text("no picture")
    for name in ("text.png", "missing.png"):
        with pytest.raises(Fault, match="is not a picture"):
            train_vlm.chat(model, small_config(chat=str(tmp_path / name)), train_vlm.Words(""))


# ------------------------------------------------------------------------------------------------------------
# Pretrained backbones

@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """Tiny random models of transformers saved as the hub has them, with a tokenizer: two folders."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    vision = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3, image_size=64, patch_size=16))
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=400, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, rope_theta=50000.0, rms_norm_eps=1e-5, tie_word_embeddings=True))
    for module in (vision, llama):  # nothing at its neutral value
        for p in module.parameters():
            torch.nn.init.normal_(p, std=0.2) if p.ndim > 1 else torch.nn.init.uniform_(p, 0.5, 1.5)
    vision.save_pretrained(folder / "vit"), llama.save_pretrained(folder / "lm")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer, bpe.decoder = tokenizers.pre_tokenizers.ByteLevel(False), tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(["Question: How many red cubes are there? Answer: 3\n"] * 9, tokenizers.trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    bpe.save(str(folder / "lm/tokenizer.json"))
    return folder, vision.eval(), llama.eval()


def load(backbones):
    config, vocab = train_vlm.backbone_config(small_config(vit=str(backbones[0] / "vit"), lm=str(backbones[0] / "lm")))
    model = train_vlm.VLM(config, vocab)
    train_vlm.load_backbone(model.vit, config.vit), train_vlm.load_backbone(model.lm, config.lm)
    return model, config


def test_siglip_parity(backbones):
    model, config = load(backbones)
    pictures = torch.rand(3, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        expected = backbones[1](pictures).last_hidden_state
        assert torch.allclose(model.vit(pictures), expected, atol=1e-4)


def test_llama_parity(backbones):
    model, config = load(backbones)
    tokens = torch.randint(0, 400, (2, 70))
    document, image = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        states = model.lm(model.lm.embed_tokens(tokens), model.mask(document, image))
        expected = backbones[2](tokens).logits
    assert expected.std() > 0.1 and torch.allclose(model.lm.logits(states), expected, atol=1e-4)


def test_backbones_that_do_not_fit(backbones, tmp_path):
    with pytest.raises(Fault, match="cannot read the model"):
        train_vlm.fetch_backbone(str(tmp_path / "none"))
    with pytest.raises(Fault, match="only plain Llamas"):
        train_vlm.backbone_config(small_config(lm=str(backbones[0] / "vit")))
    model, config = load(backbones)
    with pytest.raises(Fault, match="has no weight that fits"):
        train_vlm.load_backbone(model.vit, config.lm)
    folder = shutil.copytree(backbones[0] / "lm", tmp_path / "lm")
    state = load_file(folder / "model.safetensors")
    save_file({key: value for key, value in state.items() if "layers.1" not in key}, folder / "model.safetensors")
    with pytest.raises(Fault, match="has no weight that fits layers.1"):
        train_vlm.load_backbone(model.lm, str(folder))


def test_the_other_models_words(backbones, frozen):
    words = train_vlm.Words(str(backbones[0] / "lm"))
    tokens, answer = words.convert(frozen[1][:20], frozen[2][:20])
    ours = tokenizer.load_text(tokenizer.QA)
    for row, marks, old, old_marks in zip(tokens, answer, frozen[1], frozen[2]):
        row, marks = row[row != PAD], marks[row != PAD]
        assert words.decode(row.tolist()) == tokenizer.decode_text(ours, old.tolist())
        for turn in range(1, old_marks.max() + 1):
            said = words.decode(row[marks == turn].tolist())
            assert said == tokenizer.decode_text(ours, old[old_marks == turn].tolist()) and said.endswith("\n")


def test_run_with_backbones(backbones, tiny, tmp_path, monkeypatch):
    root = make_root(tmp_path / "root")
    run_here(monkeypatch, root, [
        "--track=cpu", f"--vit={backbones[0]}/vit", f"--lm={backbones[0]}/lm", *tiny[1], "--row=900", "--rows=2",
        "--num_steps=4", "--eval_batch=30", "--samples=2", "--max_tokens=4"])
    log, = (root / "logs").iterdir()
    assert leaderboard.parse_log(log)["footer"]["steps"] == 4


# ------------------------------------------------------------------------------------------------------------
# Whole runs

def test_run_and_load(tiny, tmp_path, monkeypatch):
    root = make_root(tmp_path / "root")
    argv = [*SMALL, *tiny[1], "--num_steps=30", "--eval_every=10", "--save=true"]
    run_here(monkeypatch, root, argv, samples=True)
    log, = (root / "logs").iterdir()
    log = leaderboard.parse_log(log)
    assert [step for step, _, _ in log["steps"]] == [10, 20, 30] and log["footer"]["val_loss"] < 2.5
    assert {p.name for p in (root / "samples").iterdir()} == {"vlm.png"}
    weights, = (root / "checkpoints").iterdir()
    again = make_root(tmp_path / "again")
    run_here(monkeypatch, again, [*SMALL, *tiny[1], "--num_steps=0", f"--load={weights}"])
    log2, = (again / "logs").iterdir()
    assert leaderboard.parse_log(log2)["footer"]["val_loss"] == pytest.approx(log["footer"]["val_loss"], abs=0.01)


@pytest.mark.parametrize("argv,message", [
    (["--data=nowhere"], "python data/scenes.py --qa"),
    (["--frozen=none.npz"], "is missing: it belongs to the repository"),
    (["--row=30"], "is too short"),
    (["--patch=12"], "do not tile pictures of 64"),
    (["--lm_heads=5"], "lm_heads half of lm_dim"),
    (["--lm_kv_heads=3"], "do not divide"),
    (["--load=none.safetensors"], "is not a checkpoint of this script"),
    (["--num_steps=-1"], "num_steps must be at least 0"),
])
def test_bad_arguments(tiny, monkeypatch, tmp_path, argv, message):
    root = make_root(tmp_path / "root")
    with pytest.raises(Fault, match=message):
        run_here(monkeypatch, root, [*SMALL, *tiny[1], "--num_steps=10", *argv])
    assert not list(root.glob("samples/*"))


def test_damaged_shards(tiny, monkeypatch, tmp_path):
    folder = shutil.copytree(tiny[0] / "train", tmp_path / "train")
    np.save(folder / "qa.npy", np.full_like(np.load(folder / "qa.npy"), 512))
    with pytest.raises(Fault, match="is damaged .*delete it and run"):
        run_here(monkeypatch, make_root(tmp_path / "root"), [*SMALL, *tiny[1], f"--data={folder}"])
    (folder / "pixels.npy").write_bytes((folder / "pixels.npy").read_bytes()[:-10])
    with pytest.raises(Fault, match="is damaged .*delete it and run"):
        run_here(monkeypatch, tmp_path / "root", [*SMALL, *tiny[1], f"--data={folder}"])


def test_two_processes_are_the_same_run(tiny, tmp_path):
    runs.assert_same_on_two_processes("vlm", [*SMALL, *tiny[1], "--num_steps=20", "--eval_every=10"], tmp_path)


def test_gpu_track_shapes():
    with torch.device("meta"):
        model = train_vlm.VLM(train_vlm.CONFIGS["gpu"], 512)
        seen = model.see(torch.empty(2, 3, 64, 64, dtype=torch.uint8))
    assert seen.shape == (2, 64, 512)
