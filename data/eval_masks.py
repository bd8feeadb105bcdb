"""Freeze what the training scripts' evaluations draw: which tokens of every validation scene are targets, and for
train_flow.py times and noise.

4M's are drawn once. In even rows from the course's own masking (two budgets from U{1..128}, each split over the
modalities by a Dirichlet(1) draw, places uniform without replacement, disjoint), here scene by scene in numpy, the plain
way that the vectorised masking of the training scripts is tested against; in odd rows one to three modalities are inputs
as a whole, and up to 16 places of every other one are targets, as in generation. MaskGIT's are a uniform number of the 64 rgb tokens at
uniform places, so that every stage of its sampling counts, from all tokens hidden to one. The flow's are one time and
the seed of one noise per picture. Logits of times are normal around 0.5, where objects take their shapes and colours,
as evenly spread as that allows: of uniform times the last sixteenth, which the eye does not see, would decide, and
models that draw better had higher losses (records/NEGATIVE.md).

    python data/eval_masks.py   # maintainers only -> data/frozen/eval_{4m_64,4m_128,maskgit_64,maskgit_128,flow}.npz
"""
import json
from pathlib import Path

import numpy as np
from scipy.special import expit, ndtri

FROZEN = Path(__file__).resolve().parent / "frozen"
BUDGET = 128


def draw_roles(valid, kind, rng, budget=BUDGET):
    """Roles (size,) uint8 of one scene's places: 1 input, 2 target, 0 neither.

    valid (size,): places that hold a token; kind (size,): modality of a place. Both budgets are cut to what the
    modalities drawn have (left), so a few scenes have fewer tokens than their budget.
    """
    K, roles = kind.max() + 1, np.zeros(len(kind), np.uint8)
    shuffled = [rng.permutation(np.flatnonzero(valid & (kind == k))) for k in range(K)]
    taken = np.zeros(K, int)
    for role in (1, 2):
        total = rng.integers(1, budget + 1)
        edges = np.round(np.cumsum(rng.dirichlet(np.ones(K))) * total).astype(int)
        for k, count in enumerate(np.diff(edges, prepend=0)):
            places = shuffled[k][taken[k]:taken[k] + count]
            roles[places] = role
            taken[k] += len(places)
    if (roles == 2).any():
        return roles
    return draw_roles(valid, kind, rng, budget)  # a small budget can fall on a modality with nothing left: once more


def draw_whole(valid, kind, rng, most=3, targets=16):
    """Roles as above: one to `most` modalities are inputs as a whole, at most `targets` places of each other targets."""
    K, roles = kind.max() + 1, np.zeros(len(kind), np.uint8)
    given = rng.permutation(K)[:rng.integers(1, most + 1)]
    for k in range(K):
        places = rng.permutation(np.flatnonzero(valid & (kind == k)))
        if k in given:
            roles[places] = 1
        else:
            roles[places[:targets]] = 2
    return roles


def draw_course_roles(lengths, rng, budget=BUDGET):
    """Roles as above, as the course's own code draws them, to which padding is no less than a token: lengths (K,) are
    those of whole modalities.

    Of a budget of U{1..budget} a modality gets its share of a Dirichlet(1) draw, rounded down; a token left over goes
    to the largest share of one more draw; what is more than a modality has (left) is dropped.
    """
    left, counts = np.array(lengths), []
    for _ in ("inputs", "targets"):
        total = rng.integers(1, budget + 1)
        count = np.floor(rng.dirichlet(np.ones(len(left))) * total).astype(int)
        lucky = rng.dirichlet(np.ones(len(left)), total - count.sum()).argmax(1)
        count = np.minimum(count + np.bincount(lucky, minlength=len(left)), left)
        left = left - count
        counts.append(count)
    roles = np.array([1, 2, 0], np.uint8)
    return np.concatenate([rng.permutation(np.repeat(roles, parts)) for parts in zip(*counts, left)])


def draw_masked(n, length, rng):
    """Masks (n, length) bool: in every row m of U{1..length} places, uniform without replacement."""
    ranks = rng.permuted(np.tile(np.arange(length), (n, 1)), axis=1)
    return ranks < rng.integers(1, length + 1, (n, 1))


def draw_all_roles(arrays, modalities):
    """Roles (n, size) of n scenes, {modality: their tokens}: in even rows by draw_roles, in odd ones by draw_whole."""
    tokens = np.concatenate([arrays[m] for m in modalities], 1)
    kind = np.repeat(np.arange(len(modalities)), [about["length"] for about in modalities.values()])
    valid = tokens != np.array([about["pad"] for about in modalities.values()])[kind]
    rng, draws = np.random.default_rng(0), (draw_roles, draw_whole)
    return np.stack([draws[i % 2](row, kind, rng) for i, row in enumerate(valid)])


if __name__ == "__main__":
    for size in (64, 128):
        with np.load(FROZEN / f"scenes{size}.npz", allow_pickle=False) as arrays:
            roles = draw_all_roles(arrays, json.loads(bytes(arrays["modalities"])))
        path = FROZEN / f"eval_4m_{size}.npz"
        np.savez_compressed(path, roles=roles)
        inputs, targets = ((roles == role).sum(1).mean() for role in (1, 2))
        print(f"{path}: {inputs:.1f} inputs and {targets:.1f} targets per scene, {path.stat().st_size / 1e6:.2f} MB")
        with np.load(FROZEN / f"objects{size}.npz", allow_pickle=False) as arrays:
            masked = draw_masked(*arrays["rgb"].shape, np.random.default_rng(0))
        path = FROZEN / f"eval_maskgit_{size}.npz"
        np.savez_compressed(path, masked=masked)
        print(f"{path}: {masked.sum(1).mean():.1f} masked tokens per picture, {path.stat().st_size / 1e6:.2f} MB")
    rng, n = np.random.default_rng(0), len(masked)
    times = expit(0.5 + ndtri((rng.permutation(n) + rng.random(n)) / n))
    path = FROZEN / "eval_flow.npz"
    np.savez_compressed(path, index=np.arange(n), t=times.astype(np.float32), seed=rng.permutation(n).astype(np.uint32))
    print(f"{path}: times around {times.mean():.3f}, {path.stat().st_size / 1e6:.2f} MB")
