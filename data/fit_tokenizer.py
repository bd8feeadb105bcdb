"""Train the tokenizers of tokenizer.py, and report on the one for pictures. Maintainers only.

    python data/fit_tokenizer.py train               # 30 minutes on 2 CPU cores -> data/frozen/tokenizer.safetensors
    python data/fit_tokenizer.py text                # the encodings (rustbpe) -> data/frozen/{text,qa}.tiktoken
    python data/fit_tokenizer.py report              # PSNR per modality -> data/frozen/README.md, samples/tokenizer.png
"""
import argparse
import base64
import random
import time

import torch
from torch import nn
from tqdm import tqdm

import draw
import judge
import questions
from raycaster import render
from reports import write_sections
from scenes import IMAGES
from shards import FROZEN
from studio import psnr
from texts import caption, describe, facts
from tokenizer import (QA, TEXT, TEXT_PATTERN, TEXT_VOCAB, VOCAB, WEIGHTS, Tokenizer, load_text, load_tokenizer,
                       save_half)
from world import build, load_frozen_scenes, sample_close_ups, sample_scenes


# ------------------------------------------------------------------------------------------------------------
# Text encodings

def train_text():
    """Learn the merges of both encodings on the texts of 20,000 scenes and on questions about them."""
    scenes = build(sample_scenes(20000, seed=1))
    rng = random.Random(0)
    objects = facts(scenes, torch.zeros(20000, 1, 1, dtype=torch.long))
    learn_text(TEXT, [text for o in objects for text in (describe(o), caption(o, rng))])
    learn_text(QA, [questions.text(turns) for turns in questions.ask(objects, rng)])


def learn_text(path, texts):
    """Learn an encoding's merges with rustbpe and write them in tiktoken's format."""
    import rustbpe
    bpe = rustbpe.Tokenizer()
    bpe.train_from_iterator(iter(texts), TEXT_VOCAB - 2, pattern=TEXT_PATTERN)
    ranks = sorted((rank, bytes(token)) for token, rank in bpe.get_mergeable_ranks())
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in ranks))
    encoding = load_text(path)
    lengths = [len(encoding.encode_ordinary(text)) + 1 for text in texts]
    print(f"{path.name}: {len(ranks)} tokens; a text is {sum(lengths) / len(texts):.1f} long, {max(lengths)} at most")


# ------------------------------------------------------------------------------------------------------------
# Training and report

def training_pictures(num, seed, size=64):
    """Bytes of pictures by modality, (n, 3, size, size): num scenes and half as many close-ups."""
    parts = []
    for codes in (sample_scenes(num, seed), sample_close_ups(num // 2, seed)):
        for part in codes.split(250):
            images = render(build(part), size)[0]
            parts.append({m: (images[m] * 255).round().byte() for m in IMAGES})
    return {m: torch.cat([part[m] for part in parts]) for m in IMAGES}


def train(minutes, resume=False, num=6000, batch=80, peak=2e-3, seed=0):
    """Train for a number of minutes on fresh scenes and close-ups, a fifth of the batches as crops of 128 px renderings.

    resume: start from the committed weights, at half the learning rate.
    """
    torch.manual_seed(seed)
    pool = {64: training_pictures(num, 1 << 55), 128: training_pictures(num // 4, (1 << 55) + 1, 128)}
    test = render(build(sample_scenes(500, seed=4)), 64)[0]
    model = load_tokenizer().train().requires_grad_() if resume else Tokenizer().to(memory_format=torch.channels_last)
    peak = peak / 2 if resume else peak
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    # what a modality's squared error counts: less where pictures are flat colours or thin lines that cost many bits
    weight = torch.tensor([6.0, 0.5, 0.6, 0.2, 0.3]).repeat_interleave(batch // 5).view(-1, 1, 1, 1)

    def draw_batch(step):
        source, parts = pool[128 if step % 5 == 0 else 64], []
        for m in IMAGES:
            images = source[m][torch.randint(len(source[m]), (batch // 5,))]
            if step % 5 == 0:
                i, j = (8 * torch.randint(9, (2,))).tolist()
                images = images[:, :, i:i + 64, j:j + 64]
            parts.append(images)
        return torch.cat(parts)

    def report(step, seconds):
        print(f"\nstep {step} {seconds:.0f} s:", mean_psnr(model, test), flush=True)
        save_half(model, WEIGHTS)

    optimise(model, draw_batch, minutes, peak, weight, report)
    save_half(model, WEIGHTS)
    print("final:", mean_psnr(load_tokenizer(), test), flush=True)


def optimise(model, draw_batch, minutes, peak, weight, report=None, bf16=True):
    """Train a tokenizer for a number of minutes on batches of bytes (B, 3, 64, 64), draw_batch(step); weight: of their
    errors, to be multiplied with (B, 3, 64, 64). report(step, seconds) is called each 500 steps."""
    edges = (model.encoder[1].weight, model.encoder[-1].weight, model.decoder[0].weight, model.decoder[-2].weight)
    inner = [p for p in model.parameters() if p.ndim == 2 and all(p is not e for e in edges)]
    others = [p for p in model.parameters() if p.ndim < 2 or any(p is e for e in edges)]
    optimizers = [torch.optim.Muon(inner, lr=peak, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.99), weight_decay=0)]
    start, step, bar = time.time(), 0, tqdm(total=round(minutes * 60), desc="tokenizer", unit="s")
    while (progress := (time.time() - start) / (60 * minutes)) < 1:
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = peak * min(1, (step + 1) / 200, 1.02 - progress)
        images = draw_batch(step).float().div(255).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = model.reconstruct(model.quantise(images))
        error = output.float() - images
        loss = (weight * (error.square() + 0.02 * error.abs())).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if step % 100 == 0:
            bar.n = int(time.time() - start)
            bar.set_postfix(step=step, loss=f"{loss.item():.5f}")
        if report and step % 500 == 0:
            report(step, time.time() - start)
    bar.close()


def mean_psnr(model, images):
    """PSNR of reconstructions by modality."""
    return {m: round(psnr(reconstruct(model, pictures)[1], pictures), 2) for m, pictures in images.items()}


def reconstruct(model, pictures):
    """Tokens (n, S) and decoded pictures (n, 3, H, W) of pictures."""
    ids = torch.cat([model.encode(part) for part in pictures.split(100)])
    return ids.flatten(1), torch.cat([model.decode(part) for part in ids.split(100)])


def entropy_at_place(ids):
    """Nats of a token (n, S) at its place, mean over places: what a model that knows only the place cannot do better."""
    total = 0.0
    for column in ids.unbind(1):
        share = column.unique(return_counts=True)[1] / len(column)
        total -= (share * share.log()).sum().item()
    return total / ids.shape[1]


REPORT = """## Image tokenizer

Reconstruction of validation scenes: PSNR of the mean squared error in dB; Fréchet distance of the judge's features
between pictures and their reconstructions; entropy in nats of a token at its place; share of the {vocab} codes in use.
Objects that the judge reads in the rgb pictures at 64 px: F1 {f1:.4f} (exact), {f1_decoded:.4f} (from their tokens); scenes
that it reads right in full: {right:.2%} and {right_decoded:.2%}. Written by `python data/fit_tokenizer.py report`.

| | {names} |
|---|{rule}|
{rows}
"""


def report():
    """Replace the tokenizer's section of data/frozen/README.md; a sheet of reconstructions in samples/tokenizer.png."""
    model, rows, numbers = load_tokenizer(), [], {}
    for size, n in ((64, 2000), (128, 500)):
        scenes = load_frozen_scenes(size, n)
        images, index = render(scenes, size)
        table = {"PSNR": [], "Fréchet distance": [], "entropy": [], "codes used": []}
        for m, pictures in images.items():
            ids, output = reconstruct(model, pictures)
            table["PSNR"].append(f"{psnr(output, pictures):.1f}")
            table["entropy"].append(f"{entropy_at_place(ids):.2f}")
            table["codes used"].append(f"{100 * ids.unique().numel() / VOCAB:.0f} %")
            if size == 64:
                moments = [judge.moments(judge.load().look(p)[0]) for p in (pictures, output)]
                table["Fréchet distance"].append(f"{judge.frechet(*moments[0], *moments[1]):.2f}")
            if size == 64 and m == "rgb":
                numbers = judged(pictures, output, facts(scenes, index))
        rows += [f"| {size} px, {name} | " + " | ".join(cells) + " |" for name, cells in table.items() if cells]
        if size == 64:
            draw_reconstructions(model, images)
    text = REPORT.format(vocab=VOCAB, rows="\n".join(rows),
                         names=" | ".join(IMAGES), rule="---|" * (len(IMAGES) - 1) + "---", **numbers)
    write_sections(text)
    print(text)


def judged(pictures, output, objects):
    """F1 of the objects that the judge reads in pictures and in their reconstructions, and scenes right in full."""
    numbers = {}
    for suffix, images in (("", pictures), ("_decoded", output)):
        told = judge.load().read(images)
        numbers[f"f1{suffix}"] = judge.object_f1(told, objects)
        right = [judge.object_f1([a], [b]) == 1 for a, b in zip(told, objects)]
        numbers[f"right{suffix}"] = sum(right) / len(right)
    return numbers


def draw_reconstructions(model, images):
    sheet = ["True pictures, and below each what its 64 tokens keep"]
    for m in IMAGES:
        true = images[m][:8]
        sheet += [[(p, m) for p in true], [(p, "") for p in reconstruct(model, true)[1]]]
    draw.sheet(sheet, FROZEN.parents[1] / "samples" / "tokenizer.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("train", "text", "report"))
    parser.add_argument("--minutes", type=float, default=30, help="training time of `train`")
    parser.add_argument("--resume", action="store_true", help="`train` starts from the committed weights")
    arguments = parser.parse_args()
    if arguments.job == "train":
        train(arguments.minutes, arguments.resume)
    elif arguments.job == "text":
        train_text()
    else:
        report()
