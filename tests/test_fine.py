"""data/scenes.py --fine: the scenes set's own scenes with twice as many pixels across."""
import numpy as np
import pytest
import torch

import scenes as maker
import show_more
import studio
from join import read_frozen
from shards import read


def test_it_is_the_scenes_set(tmp_path, monkeypatch):
    monkeypatch.setattr(maker, "ROOT", tmp_path)
    monkeypatch.setattr(maker, "validation_looks", lambda kind: ())
    for kind in ("scenes", "fine"):
        maker.make_shards(64, 3, 1, "cpu", kind)
    told = maker.check_shards(64, 3, 1, "cpu", "fine")
    scenes, _ = read(tmp_path / "scenes64" / "train", ["scene", "rgb"], maker.modalities(64, "scenes"))
    arrays, meta = read(tmp_path / "fine64" / "train", ["scene", "fine_rgb"], maker.modalities(64, "fine"))
    assert np.array_equal(arrays["scene"], scenes["scene"]) and "fine_seg 100.00 %" in told
    assert set(meta["modalities"]) == {"fine_rgb", "fine_depth", "fine_normal", "fine_seg"}
    fine, coarse = (studio.Studio().pictures(torch.from_numpy(rows.astype(np.int64)))
                    for rows in (arrays["fine_rgb"], scenes["rgb"]))
    assert fine.shape == (3, 3, 128, 128) and studio.psnr(show_more.enlarged(coarse), fine) > 28


@pytest.mark.parametrize("m", ("rgb", "depth", "normal", "seg"))
def test_frozen_set_is_that_of_128_pixels(m):
    """The validation scenes are those of every size: their tokens are the ones that the set of 128 pixels has."""
    fine, kinds = read_frozen("fine64")
    large, _ = read_frozen("scenes128")
    assert kinds[f"fine_{m}"]["length"] == 256 and len(fine["scene"]) == 2000
    assert np.array_equal(fine["scene"], large["scene"])
    assert (fine[f"fine_{m}"] == large[m]).mean() > 0.99
