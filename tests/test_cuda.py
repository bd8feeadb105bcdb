"""What only a GPU can show: FlexAttention backward, no graph compiled after the warm-up, whole runs of every script."""
import json
import subprocess
import sys

import pytest
import torch

import test_resume
import train_gpt
import train_vlm
from test_resume import MODULES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
tiny_4m, tiny_flow, tiny_gpt = test_resume.tiny_4m, test_resume.tiny_flow, test_resume.tiny_gpt
tiny_maskgit, tiny_vlm, frozen = test_resume.tiny_maskgit, test_resume.tiny_vlm, test_resume.frozen


@pytest.mark.parametrize("script", [train_gpt, train_vlm])
def test_flex_attention_forward_and_backward(script):
    """With a BlockMask against SDPA with the dense mask of the same rule: outputs and gradients."""
    def rule(ids, b, q, k):
        return (k <= q) & (ids[b, q] == ids[b, k])
    rng, mask_cache = torch.Generator("cuda").manual_seed(0), {}
    for i in range(3):
        ids = torch.randint(2, (4, 384), generator=rng, device="cuda").cumsum(1) // 40
        q, k, v, out = torch.randn(4, 4, 6, 384, 64, generator=rng, device="cuda", dtype=torch.bfloat16)
        grads = []
        for mask in (script.make_mask(rule, ids, mask_cache=mask_cache), script.make_mask(rule, ids)):
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                y = script.attend(*leaves, mask)
            y.backward(out)
            grads.append([y, *(leaf.grad for leaf in leaves)])
        assert type(script.make_mask(rule, ids, mask_cache=mask_cache)).__name__ == "BlockMask"
        for a, b in zip(*grads):
            assert torch.allclose(a, b, atol=0.05, rtol=0.05)
    odd = torch.zeros(1, 104, dtype=torch.long, device="cuda")
    assert torch.is_tensor(script.make_mask(rule, odd, mask_cache=mask_cache)), "odd lengths are dense"


@pytest.mark.parametrize("task", MODULES)
def test_nothing_is_compiled_after_the_warm_up(task, request, tmp_path):
    module, data = MODULES[task], request.getfixturevalue(f"tiny_{task}")
    root = module.make_root(tmp_path / "root")
    argv = [*module.SMALL, *([f"--data={data}"] if task == "gpt" else data[1]), "--num_steps=40", "--eval_every=10"]
    argv += {"gpt": ["--context=256"], "vlm": ["--seq_len=256"]}.get(task, [])
    done = subprocess.run([sys.executable, f"train_{task}.py", *argv], cwd=root, capture_output=True, text=True,
                          timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    run = json.loads((root / "records/runs.jsonl").read_text())
    assert "NVIDIA" in run["hardware"] and run["recompiles"] == 0
