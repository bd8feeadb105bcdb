"""Pictures from texts with more forward passes, and what they gain: the best of several draws, a beam with look-ahead,
orders and temperatures, chains over other modalities. capabilities.py writes it down.

Every function takes a ready.Ready and gives plain numbers by name.
"""
import math

import torch

import judge as judges
import show_maskgit

MOST, COUNTS = 16, (1, 2, 4, 8, 16)  # draws
SCENES, BEAM_SCENES = 60, 100  # that they are taken on
CHAINS = ((), ("desc",), ("bbox",), ("seg",), ("depth",), ("normal",), ("edge",), ("desc", "normal"))


def candidates(ready, n, given, steps, temperature=1.0):
    """MOST draws of rgb from a modality of n scenes: token rows (MOST, n, size)."""
    how = ready.output("rgb", scheme="roar", steps=steps, temperature=temperature)
    return torch.stack([ready.generate(ready.tokens[:n], (given,), [how], seed=1 + i) for i in range(MOST)])


def best_of_many(ready, n=SCENES):
    """{verifier and steps: {draws: F1}} of pictures from descriptions, drawn hastily and less so.

    Of 1, 2, 4 .. 16 draws one is chosen: by the model's own log p(desc | rgb) or by the judge's probability of what was
    asked, and the judge's F1 or, where the judge has chosen, the model's own reading are what is told; the oracle
    chooses by the F1 that is told.
    """
    found = {}
    for steps in (1, 2, 4):
        for verifier, row in best_of(ready, n, steps).items():
            found[f"{verifier}, {steps} step{'s' * (steps > 1)}"] = row
    return found


def best_of(ready, n, steps):
    drawn = candidates(ready, n, "desc", steps)
    meant, scores = ready.show.described(ready.tokens[:n]), {"cycle": [], "judge": [], "oracle": []}
    seen, read = [], []
    for rows in drawn:
        pictures = ready.show.pictures(rows, "rgb")
        seen.append(ready.show.judged(pictures))
        told = ready.generate(rows, ("rgb",), [ready.output("desc", temperature=0)])
        read.append(ready.show.described(told))
        scores["cycle"].append(ready.likelihood(rows, ("rgb",), "desc"))
        scores["judge"].append(torch.tensor([ready.show.judge.fidelity(pictures[b:b + 1], meant[b:b + 1])
                                             for b in range(n)]))
        scores["oracle"].append(torch.tensor([judges.object_f1([a], [b]) for a, b in zip(seen[-1], meant)]))
    found = {}
    for verifier, by_draw in scores.items():
        told_by = read if verifier == "judge" else seen
        table = torch.stack(by_draw)  # (MOST, n)
        found[verifier] = {}
        for count in COUNTS:
            best = table[:count].argmax(0).tolist()
            found[verifier][count] = judges.object_f1([told_by[k][b] for b, k in enumerate(best)], meant)
    return found


ROUNDS, WIDTH = 3, 4  # of a beam: rounds, and draws in each


def beam(ready, n=BEAM_SCENES):
    """{how: {verifier: F1}} of pictures from descriptions in one step at temperature 1: one draw, the best of as many as a
    beam takes, and a beam with look-ahead, all chosen by log p(desc | rgb) or by the F1 that is told."""
    tokens, meant = ready.tokens[:n], ready.show.described(ready.tokens[:n])

    def f1s(rows):
        seen = ready.show.judged(ready.show.pictures(rows, "rgb"))
        return torch.tensor([judges.object_f1([a], [b]) for a, b in zip(seen, meant)])

    verifiers = {"cycle": lambda rows: ready.likelihood(rows, ("rgb",), "desc"), "oracle": f1s}
    found = {"one draw": {}, f"best of {ROUNDS * WIDTH}": {}, f"beam, {ROUNDS} rounds of {WIDTH}": {}}
    rank = random_order(tokens)
    for name, verifier in verifiers.items():
        for row, rounds, width in zip(found.values(), (1, 1, ROUNDS), (1, ROUNDS * WIDTH, WIDTH)):
            shares = [(i + 1) / rounds for i in range(rounds)]
            rows = in_rounds(ready, tokens, ("desc",), rank, shares, [1.0] * rounds, width, verifier)
            row[name] = judges.object_f1(ready.show.judged(ready.show.pictures(rows, "rgb")), meant)
    return found


def random_order(tokens, cells=64):
    """When each cell's turn is in each row of tokens (B, size): ranks (B, cells)."""
    return torch.rand(len(tokens), cells, generator=torch.Generator().manual_seed(0)).argsort(1)


def in_rounds(ready, tokens, given, rank, shares, temperatures, width=1, verifier=None):
    """Rows (B, size) with rgb drawn from the modalities given in rounds: in each all that is left, `width` times, of which
    the best by a verifier keeps a share of all cells, those of the lowest rank (B, cells)."""
    known, span = ready.only(tokens, *given), ready.layout.span["rgb"]
    for i, (share, temperature) in enumerate(zip(shares, temperatures)):
        how = ready.output("rgb", scheme="roar", steps=1, temperature=temperature)
        drawn = torch.stack([ready.generate(tokens, known, [how], seed=1 + i * width + k) for k in range(width)])
        best = torch.stack([verifier(rows) for rows in drawn]).argmax(0) if width > 1 else 0
        tokens = drawn[best, torch.arange(len(tokens))]
        known[:, span] = rank < round(share * rank.size(-1))
    return tokens


def schedules(ready, n=150, steps=16):
    """{order: {temperature's schedule: F1}} of pictures from captions in 16 steps. onex falls as 1 / sqrt(x), x from 1 to
    100 over the tokens, as 4M's does."""
    tokens, meant = ready.tokens[:n], ready.show.described(ready.tokens[:n])
    shares = [1 - math.cos(math.pi / 2 * (i + 1) / steps) for i in range(steps)]
    start = [0.0, *shares[:-1]]  # what is known as a step begins
    onex = [((1 + 99 * share) ** -0.5 - 0.1) / 0.9 for share in start]
    falls = {"constant, 1": [1.0] * steps, "constant, 0.5": [0.5] * steps, "constant, 0": [0.0] * steps,
             "linear from 1": [1 - share for share in start], "onex from 1": onex}
    halton = show_maskgit.halton_order(8).argsort().expand(n, -1)
    found = {}
    for name, rank in ("Halton", halton), ("random", random_order(tokens)):
        for schedule, temperatures in falls.items():
            rows = in_rounds(ready, tokens, ("caption",), rank, shares, temperatures)
            seen = ready.show.judged(ready.show.pictures(rows, "rgb"))
            found.setdefault(name, {})[schedule] = judges.caption_f1(seen, meant)
    return found


def chains(ready, n=200):
    """{chain: {F1}} of pictures from captions, directly and over what is drawn of them first."""
    meant, found = ready.show.described(ready.tokens[:n]), {}
    for chain in CHAINS:
        outputs = [ready.output(m, steps=8, temperature=0.5) for m in chain]
        outputs.append(ready.output("rgb", scheme="roar", steps=16, temperature=0.5))
        drawn = ready.generate(ready.tokens[:n], ("caption",), outputs)
        seen = ready.show.judged(ready.show.pictures(drawn, "rgb"))
        name = " > ".join(("caption", *chain, "rgb"))
        found[name] = {"F1": judges.caption_f1(seen, meant)}
    return found
