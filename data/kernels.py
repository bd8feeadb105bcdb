"""Triton kernels for a GPU, each with its PyTorch reference: cross-entropy, and X X^T for Muon. No script uses them.

    python data/kernels.py    # are they right and faster here, at the shapes of train_gpt.py --track=gpu

One goes into train_gpt.py once a log of a GPU has shown that it pays. tests/test_kernels.py holds them against their
references on any machine, by Triton's interpreter.
"""
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # it comes with torch for CUDA, and is for Linux alone
    triton = None


# ------------------------------------------------------------------------------------------------------------
# References

def cross_entropy(logits, targets):
    """Cross-entropy (N,) in nats, float32, of targets (N,) under logits (N, V)."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def xxt(X):
    """X X^T of a stack of matrices (K, m, n)."""
    return X @ X.mT


# ------------------------------------------------------------------------------------------------------------
# Kernels

if triton:  # else the references above are all there is
    @triton.jit
    def nll_kernel(logits, targets, nll, sums, V, BLOCK: tl.constexpr):
        """One program per row: its log-sum-exp, in blocks, the sum rescaled as its maximum grows (arXiv:1805.02867)."""
        row = tl.program_id(0).to(tl.int64)  # there can be more than 2^31 logits
        logits += row * V
        top = tl.full((), -1e30, tl.float32)
        total = tl.full((), 0.0, tl.float32)
        for start in range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)
            z = tl.load(logits + column, column < V, 0.0).to(tl.float32)
            z = tl.where(column < V, z, float("-inf"))
            higher = tl.maximum(top, tl.max(z, 0))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher), 0)
            top = higher
        log_sum = top + tl.log(total)
        tl.store(sums + row, log_sum)
        tl.store(nll + row, log_sum - tl.load(logits + tl.load(targets + row)).to(tl.float32))

    @triton.jit
    def nll_gradient_kernel(logits, targets, sums, gradient, out, V, BLOCK: tl.constexpr):
        """One program per block of a row: softmax less one-hot, times the row's gradient. out may be logits."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        z = tl.load(logits + row * V + column, column < V, 0.0).to(tl.float32)
        slope = tl.exp(z - tl.load(sums + row)) - tl.where(column == tl.load(targets + row), 1.0, 0.0)
        tl.store(out + row * V + column, slope * tl.load(gradient + row), column < V)

    @triton.jit
    def symmetric_kernel(X, out, m, n, matrix, row, column, TILE: tl.constexpr, DEPTH: tl.constexpr):
        """One program per tile of X X^T on or below the diagonal, which it stores mirrored, too.

        After github.com/nil0x9/flash-muon. matrix, row, column: strides of X.
        """
        i, j, k = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
        if j > i:
            return
        r = i * TILE + tl.arange(0, TILE)
        c = j * TILE + tl.arange(0, TILE)
        d = tl.arange(0, DEPTH)
        tile = tl.zeros((TILE, TILE), tl.float32)
        for start in range(0, n, DEPTH):
            at = X + k * matrix + (start + d) * column
            a = tl.load(at[None] + r[:, None] * row, (r[:, None] < m) & (start + d[None] < n), 0.0)
            b = tl.load(at[:, None] + c[None] * row, (c[None] < m) & (start + d[:, None] < n), 0.0)
            tile = tl.dot(a, b, tile)
        out += k * m * m
        tl.store(out + r[:, None] * m + c[None], tile, (r[:, None] < m) & (c[None] < m))
        if j < i:
            tl.store(out + c[:, None] * m + r[None], tl.trans(tile), (c[:, None] < m) & (r[None] < m))


class FusedCrossEntropy(torch.autograd.Function):
    """Keeps the logits and one number per row; backward puts their gradient in their place (arXiv:2410.10989)."""

    @staticmethod
    def forward(ctx, logits, targets):
        N, V = logits.shape
        nll = torch.empty(N, device=logits.device)
        sums = torch.empty_like(nll)
        ctx.block = min(4096, triton.next_power_of_2(V))
        nll_kernel[(N,)](logits, targets, nll, sums, V, ctx.block, num_warps=8)
        owner = logits if logits._base is None else logits._base
        ctx.reuse = not owner.is_leaf  # whose values must stay
        ctx.save_for_backward(logits, targets, sums)
        return nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        logits, targets, sums = ctx.saved_tensors
        N, V = logits.shape
        out = logits if ctx.reuse else torch.empty_like(logits)
        grid = (N, triton.cdiv(V, ctx.block))
        nll_gradient_kernel[grid](logits, targets, sums, gradient.contiguous(), out, V, ctx.block, num_warps=8)
        if ctx.reuse:  # whoever else needs them for a gradient of their own gets an error
            torch.autograd.graph.increment_version(logits)
        return out, None


def fused_cross_entropy(logits, targets):
    """cross_entropy without a float32 copy of the logits. Backward overwrites them, unless they are a leaf's."""
    return FusedCrossEntropy.apply(logits.contiguous(), targets.contiguous())


def symmetric(X):
    """xxt, X X^T of a stack (K, m, n), at half the work; X may have any strides."""
    K, m, n = X.shape
    tiles = triton.cdiv(m, 128)
    out = X.new_empty(K, m, m)
    symmetric_kernel[tiles, tiles, K](X, out, m, n, *X.stride(), 128, 64, num_warps=8)
    return out


# ------------------------------------------------------------------------------------------------------------
# Benchmark

def measure(function, examples, tries=10):
    """Of a function on CUDA and its backward: median seconds, most MiB beside its inputs, result and gradients."""
    seconds = []
    for _ in range(3 + tries):  # 3: it compiles first
        results = None
        inputs = [x.clone() for x in examples]  # they may be overwritten
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        results = [function(*inputs)]
        wanted = [x for x in inputs if x.requires_grad]
        if wanted:
            results += torch.autograd.grad(results[0].sum(), wanted)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    mib = (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    return np.median(seconds[3:]), mib, [x.detach() for x in results]


def faster(kernel, reference, *examples):
    """Whether a kernel is right and faster than its reference on examples, and a line that says so."""
    reference_seconds, reference_mib, expected = measure(reference, examples)
    try:
        seconds, mib, found = measure(kernel, examples)
    except Exception as error:  # Triton's own kinds: this GPU has too little of something, or is unknown
        return False, f"{kernel.__name__} failed ({type(error).__name__})"
    right = all((a - b).norm() <= 0.01 * b.norm() for a, b in zip(found, expected))  # bfloat16 rounds by 0.002
    verdict = "wrong"
    if right:
        verdict = "yes" if seconds < reference_seconds else "no"
    speed = reference_seconds / seconds
    return verdict == "yes", f"{kernel.__name__} {verdict} {speed:.2f}x {mib:.0f} MiB for {reference_mib:.0f}"


def main(rows=8192, vocab=50257, dim=768, depth=12):
    """Cross-entropy of a micro-batch's part, and X X^T of the attention's and of the MLP's stacks in Muon."""
    logits = torch.randn(rows, vocab, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    _, line = faster(fused_cross_entropy, cross_entropy, logits, torch.randint(vocab, (rows,), device="cuda"))
    print(f"({rows}, {vocab}): {line}")
    for shape in ((4 * depth, dim, dim), (depth, dim, 4 * dim)):
        _, line = faster(symmetric, xxt, torch.randn(shape, device="cuda", dtype=torch.bfloat16))
        print(f"{shape}: {line}")


if __name__ == "__main__":
    if sys.argv[1:] or triton is None or not torch.cuda.is_available():
        sys.exit(__doc__)
    main()
