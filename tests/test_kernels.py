"""The Triton kernels of data/kernels.py against their PyTorch references: in Triton's interpreter on a CPU, compiled
for GPUs that need not be there, and on the GPU if there is one.

    TRITON_INTERPRET=1 python tests/test_kernels.py    # what `interpreted` reads: a line of JSON, errors of every case
"""
import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import kernels  # noqa: E402
import train_gpt  # noqa: E402

needs_triton = pytest.mark.skipif(kernels.triton is None, reason="there is no Triton for this platform")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LOGITS = [*itertools.product([(5, 65), (3, 4096), (2, 9001)], ["float32", "bfloat16"]),
          ((2, 1), "float32")]  # (N, V), dtype; a block is 4096 wide at most
MATRICES = [*itertools.product([(1, 64, 64), (3, 130, 70), (2, 257, 33)], ["bfloat16", "float16", "float32"], [False]),
            ((2, 257, 150), "bfloat16", True)]  # (K, m, n), dtype, whether m is what lies together in memory
ERROR = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2}  # relative, of the whole tensor; the interpreter cuts off


def error(found, expected):
    """How far a tensor is off: the norm of the difference over the norm, or 1 if it has another type or shape."""
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return 1.0
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


# ------------------------------------------------------------------------------------------------------------
# Checks, for any device

def check_cross_entropy(device, shape, dtype):
    """Errors of the nats, of the gradient in a buffer of its own and of the one that replaces the logits."""
    rng = torch.Generator().manual_seed(sum(shape))
    made = (8 * torch.randn(shape, generator=rng)).to(device, DTYPES[dtype])
    if shape[1] > 1:
        made[0, :-1] = -torch.inf  # all of a block may be impossible
    targets = torch.randint(shape[1], shape[:1], generator=rng).to(device)
    targets[0], targets[-1] = shape[1] - 1, 0
    weights = torch.rand(shape[0], generator=rng).to(device) + 0.5
    results = []
    for function, leaf in ((kernels.cross_entropy, True), (kernels.fused_cross_entropy, True),
                           (kernels.fused_cross_entropy, False)):
        logits = made.clone().requires_grad_()
        logits = logits if leaf else logits.clone()
        nats = function(logits, targets)
        gradient, = torch.autograd.grad((nats * weights).sum(), logits)
        assert (gradient.data_ptr() == logits.data_ptr()) is (not leaf) and (not leaf or torch.equal(logits, made))
        results.append((nats.detach(), gradient))
    (nats, gradient), (leaf_nats, leaf_gradient), (other_nats, other_gradient) = results
    assert torch.equal(leaf_nats, other_nats)
    return {"float32": error(leaf_nats, nats),
            dtype: max(error(leaf_gradient, gradient), error(other_gradient, gradient))}


def check_symmetric(device, shape, dtype, transposed):
    K, m, n = shape
    made = torch.randn(K, n, m, generator=torch.Generator().manual_seed(m)).to(device, DTYPES[dtype])
    X = made.mT if transposed else made.mT.contiguous()
    assert X.is_contiguous() is not transposed
    found = kernels.symmetric(X)
    below = torch.ones(m, m, device=device).tril(-128).bool()  # of no tile on the diagonal
    assert torch.equal(found.masked_fill(~below, 0), found.mT.masked_fill(~below, 0))
    return {dtype: error(found, (X.double() @ X.double().mT).to(X.dtype))}


def check_safety(device):
    """What is not the kernel's own survives its backward, or an error says so; never a wrong gradient."""
    targets = torch.tensor([1, 2, 0], device=device)
    leaf = torch.randn(1, 3, 7, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    before = leaf.detach().clone()
    kernels.fused_cross_entropy(leaf.flatten(0, 1), targets).sum().backward()  # a view of what somebody made
    assert torch.equal(leaf, before) and leaf.grad.data_ptr() != leaf.data_ptr()
    logits = leaf.flatten(0, 1) * 1
    nats = kernels.fused_cross_entropy(logits, targets).sum()
    nats.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        nats.backward()
    logits = leaf.flatten(0, 1) * 1
    square = logits.square().sum()  # needs the logits for its own gradient, after the kernel's is in their place
    nats = kernels.fused_cross_entropy(logits, targets).sum()
    nats.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()
    wide = torch.randn(3, 14, generator=torch.Generator().manual_seed(1)).to(device)
    for odd in (wide[:, ::2], wide[:, 3:10], wide.T[:7, :3].T):  # not contiguous
        assert error(kernels.fused_cross_entropy(odd, targets), kernels.cross_entropy(odd, targets)) < 2e-6
    return {}


def check_step(device):
    """Loss and gradients of a small GPT in bfloat16 with either cross-entropy."""
    config = dataclasses.replace(train_gpt.CONFIGS["cpu"], dim=64, head_dim=32, depth=1, orders=2, grams=16)
    torch.manual_seed(0)
    model = train_gpt.GPT(config, {"vocab": 300, "document_start": None}, sparse=False).to(device)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    tokens, results = torch.randint(300, (2, 128), device=device), []
    for function in (kernels.cross_entropy, kernels.fused_cross_entropy):
        model.zero_grad()
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            logits = model.head(model(tokens, model.mask(tokens)))
            nats = function(logits.flatten(0, 1), tokens.roll(-1, 1).flatten())
        nats.mean().backward()
        results.append([nats.detach(), *(p.grad for name, p in model.named_parameters() if "second" not in name)])
    expected, found = results
    assert all(g.any() for g in expected)
    return {"float32": error(found[0], expected[0]), "bfloat16": max(map(error, found[1:], expected[1:]))}


CHECKS = {**{f"cross-entropy {case}": (check_cross_entropy, *case) for case in LOGITS},
          **{f"symmetric {case}": (check_symmetric, *case) for case in MATRICES},
          "safety": (check_safety,), "step": (check_step,)}


# ------------------------------------------------------------------------------------------------------------
# Tests

@pytest.fixture(scope="module")
def interpreted():
    """{check: its errors, or what it died of}, from a process in which Triton interprets."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_small(errors):
    assert isinstance(errors, dict), errors
    for dtype, value in errors.items():
        assert value <= ERROR[dtype], errors  # nan is not


@needs_triton
@pytest.mark.parametrize("name", CHECKS)
def test_interpreted(interpreted, name):
    assert_small(interpreted[name])


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", [name for name in CHECKS if "symmetric" not in name or "float32" not in name])  # TF32
def test_cuda(name):
    check, *case = CHECKS[name]
    assert_small(check("cuda", *case))


@needs_triton
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile(monkeypatch, tmp_path, capability):
    """To machine code of GPUs since the A100, within the shared memory of every one of them since the RTX 3090."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = {"targets": "*i64", "nll": "*fp32", "sums": "*fp32", "gradient": "*fp32"}
    bfloat16, sizes = ("logits", "out", "X"), {"BLOCK": 4096, "TILE": 128, "DEPTH": 64, "column": 1}
    for kernel in (kernels.nll_kernel, kernels.nll_gradient_kernel, kernels.symmetric_kernel):
        signature = {name: "*bf16" if name in bfloat16 else "constexpr" if name in sizes else pointers.get(name, "i32")
                     for name in kernel.arg_names}
        constants = {(i,): sizes[name] for i, name in enumerate(kernel.arg_names) if name in sizes}
        attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
                      if name not in sizes and name != "V"}
        source = ASTSource(kernel, signature, constants, attributes)
        made = kernels.triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
        assert len(made.asm["cubin"]) > 1000 and made.metadata.shared <= 99 * 1024
        if kernel is kernels.symmetric_kernel:
            assert "mma" in made.asm["ptx"], "no tensor cores"


@pytest.mark.parametrize("seconds, result, verdict", [(1.0, 1.0, "yes 2.00x 3 MiB for 5"), (1.0, 1.1, "wrong 2.00x"),
                                                      (1.0, float("nan"), "wrong"), (4.0, 1.0, "no 0.50x"),
                                                      (None, None, "failed (ZeroDivisionError)")])
def test_faster(monkeypatch, seconds, result, verdict):
    """With the clock and the GPU replaced: only a kernel that is right and faster gets a yes."""
    class Example:
        device = torch.device("cuda")

    def kernel():
        pass

    def reference():
        pass

    def measure(function, examples):
        if function is reference:
            return 2.0, 5.0, [torch.ones(3), torch.ones(2)]
        return (seconds or 1 / 0), 3.0, [torch.ones(3), torch.tensor([1.0, result])]

    monkeypatch.setattr(kernels, "measure", measure)
    pays, line = kernels.faster(kernel, reference, Example())
    assert line.startswith(f"kernel {verdict}") and pays is verdict.startswith("yes")


def widen_bfloat16():
    """Triton 3.7.1's interpreter keeps bfloat16 as integers, and its tl.dot multiplies those: give it float32."""
    from triton.runtime import interpreter
    import triton.language as tl
    builder, plain = interpreter.InterpreterBuilder, interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (self.cast_impl(x, tl.float32) for x in (a, b))
        return plain(self, a, b, *rest)

    builder.create_dot = create_dot


if __name__ == "__main__":
    widen_bfloat16()
    found = {}
    for title, (check, *case) in CHECKS.items():
        try:
            found[title] = check("cpu", *case)
        except (Exception, pytest.fail.Exception) as fault:  # the others are still of interest
            found[title] = f"{type(fault).__name__}: {fault}"
    print(json.dumps(found))
