"""Steps that torch.compile builds with a C++ compiler on a CPU, and the same without one that works."""
import shutil

import pytest

import ranks
import runs
import test_resume
from test_resume import MODULES

tiny_flow, tiny_vlm = test_resume.tiny_flow, test_resume.tiny_vlm


@pytest.fixture(scope="module", params=["flow", "vlm"])
def eager(request, tmp_path_factory):
    """A run that compiles nothing: (task, overrides, its losses)."""
    task, module = request.param, MODULES[request.param]
    argv = [*module.SMALL, *request.getfixturevalue(f"tiny_{task}")[1], "--num_steps=4", "--eval_every=2"]
    root = runs.make_root(task, tmp_path_factory.mktemp("eager") / "root")
    runs.run(task, argv, root)
    return task, argv, runs.losses(root)


@pytest.mark.skipif(not shutil.which("g++"), reason="a CPU compiles with g++")
def test_compiled_steps_are_the_same(eager, tmp_path):
    task, argv, expected = eager
    root = runs.make_root(task, tmp_path / "root")
    runs.run(task, argv, root, compiled=True)
    assert runs.losses(root) == pytest.approx(expected, abs=2e-4), "shown to four digits"
    assert task == "vlm" or runs.footers(root)[0]["recompiles"] == 0, "steps of the flow are of one shape"


def test_without_a_working_compiler(eager, tmp_path):
    task, argv, expected = eager
    root = runs.make_root(task, tmp_path / "root")
    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}  # what was compiled before needs no compiler
    world = runs.run(task, argv, root, spy=ranks.break_compiler, env=env, compiled=True)
    assert world.out.count("torch.compile does not work here") == 1 and "\n    " not in world.out
    assert runs.losses(root) == expected
