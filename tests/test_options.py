"""Any combination of options either runs two steps or ends with one sentence, before anything is trained or written."""
import ast
import dataclasses
import importlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import test_resume
from runs import ROOT
from test_resume import MODULES, arguments

tiny_4m, tiny_flow, tiny_gpt = test_resume.tiny_4m, test_resume.tiny_flow, test_resume.tiny_gpt
tiny_maskgit, tiny_vlm, frozen = test_resume.tiny_maskgit, test_resume.tiny_vlm, test_resume.frozen
# what a run depends on here, files, and what is not about a run of two steps
FIXED = {"track", "data", "frozen", "frozen_masks", "frozen_draws", "pixels", "num_steps", "precision", "load", "save",
         "resume", "log_to", "draft", "chat", "vit", "lm", "reflow", "shard", "recompute", "target", "save_every", "prompt"}
INTS, FLOATS = (-1, 0, 1, 2, 3, 5, 8, 16, 64, 10 ** 9), (-1.0, 0.0, 0.001, 0.5, 0.95, 1.0, 7.0, 1e30, float("inf"))


@pytest.mark.parametrize("task", MODULES)
def test_no_track_inherits_a_target(task):
    """Opening the cpu track, whose numbers are the defaults, must not open another one."""
    tree = ast.parse((ROOT / f"train_{task}.py").read_text())
    configs, = (node.value for node in tree.body if ast.unparse(node).startswith("CONFIGS ="))
    for name, config in zip(configs.keys, configs.values):
        assert name.value == "cpu" or {"target", "eval_every"} <= {field.arg for field in config.keywords}


def overrides(task):
    """Strategy: up to four fields of a script's Config and Options with small, odd and impossible values."""
    script = importlib.import_module(f"train_{task}")
    values = {}
    for field in (*dataclasses.fields(script.Config), *dataclasses.fields(script.Options)):
        kind = type(field.default)
        if field.name not in FIXED and kind in (int, float):
            values[field.name] = st.sampled_from(INTS if kind is int else FLOATS)
    pairs = st.sampled_from(sorted(values)).flatmap(lambda name: st.tuples(st.just(name), values[name]))
    return st.lists(pairs, min_size=1, max_size=4).map(dict)


@pytest.mark.parametrize("task", MODULES)
def test_runs_or_refuses(task, request, tmp_path_factory):
    module = MODULES[task]
    script = importlib.import_module(f"train_{task}")
    argv = [*module.SMALL, *arguments(task, request), "--num_steps=2"]
    ran = []

    @settings(max_examples=12, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))
    @given(overrides(task))
    def runs_or_refuses(fields):
        root = module.make_root(tmp_path_factory.mktemp("root"))
        with pytest.MonkeyPatch.context() as patch:
            try:
                module.run_here(patch, root, [*argv, *(f"--{name}={value}" for name, value in fields.items())])
            except script.Fault as fault:
                assert "\n" not in str(fault) and len(str(fault)) > 10
                assert not (root / "records/runs.jsonl").exists()
                return
        assert (root / "records/runs.jsonl").exists()
        ran.append(fields)

    runs_or_refuses()
    assert ran, "nothing of all this ran"
