"""A script without data/ beside it: it trains, evaluates and files its result, and refuses what it then cannot do."""
import pytest

import ranks
import rules
import runs
import test_resume
from test_resume import MODULES, arguments

tiny_4m, tiny_flow, tiny_gpt = test_resume.tiny_4m, test_resume.tiny_flow, test_resume.tiny_gpt
tiny_maskgit, tiny_vlm, frozen = test_resume.tiny_maskgit, test_resume.tiny_vlm, test_resume.frozen


@pytest.mark.parametrize("task", MODULES)
def test_trains_alone(task, request, tmp_path):
    argv = [*MODULES[task].SMALL, *arguments(task, request), "--num_steps=4", "--eval_every=2"]
    losses = []
    for name, spy in ("beside", None), ("alone", ranks.stand_alone):
        root = runs.make_root(task, tmp_path / name)
        runs.run(task, argv, root, spy=spy)
        log, = (root / "logs").iterdir()
        footer = rules.parse_log(log)["footer"]
        losses.append((footer["val_loss"], runs.losses(root)))
        assert (footer["data_sha256"] == "none") == (spy is not None)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("option", ["save=true", "save_every=2", "load=one.safetensors", "resume=one.state.pt",
                                    "log_to=tensorboard"])
def test_refuses_options_that_need_more(option, request, tmp_path):
    root = runs.make_root("gpt", tmp_path / "root")
    argv = [*MODULES["gpt"].SMALL, *arguments("gpt", request), "--num_steps=2", f"--{option}"]
    world = runs.start("gpt", argv, root, spy=ranks.stand_alone)
    assert world.wait() == [1] and "which is not beside this script" in world.err
    assert len(world.err.strip().splitlines()) == 1 and not (root / "logs").exists()
