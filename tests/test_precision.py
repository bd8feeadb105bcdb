"""In bfloat16, where rounding alone makes two runs differ: a run of every script ends near the one in float32."""
import pytest

import runs
import test_resume
from test_resume import MODULES

tiny_4m, tiny_flow, tiny_gpt = test_resume.tiny_4m, test_resume.tiny_flow, test_resume.tiny_gpt
tiny_maskgit, tiny_vlm, frozen = test_resume.tiny_maskgit, test_resume.tiny_vlm, test_resume.frozen


@pytest.mark.parametrize("task", MODULES)
def test_bfloat16(task, request, tmp_path):
    module, data = MODULES[task], request.getfixturevalue(f"tiny_{task}")
    argv = [*module.SMALL, *([f"--data={data}"] if task == "gpt" else data[1]), "--num_steps=10"]
    found = {}
    for precision in ("fp32", "bf16"):
        root = module.make_root(tmp_path / precision)
        runs.run(task, [*argv, f"--precision={precision}"], root)
        run, = runs.footers(root)
        assert run["precision"] == precision and run["steps"] == 10
        found[precision] = run["val_loss"]
    assert found["bf16"] != found["fp32"] and found["bf16"] == pytest.approx(found["fp32"], rel=0.05)
