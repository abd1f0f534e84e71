"""What all trained baselines have in common."""

import numpy as np
import pytest
import torch

from diffdiscover3d.baselines.supervision import LimitedLabels
from diffdiscover3d.training.checkpoints import list_checkpoints
from tests.baselines.toys import TINY, many_halves


def limited(amount):
    volumes = many_halves(3)
    return LimitedLabels(volumes, lambda i: volumes[i]["labels"], amount, seed=1)


@pytest.mark.parametrize("name", TINY)
def test_the_same_seed_gives_the_same_parts(name, tmp_path):
    if name == "hsu":
        pytest.importorskip("geoopt")
    method, amount, settings = TINY[name]
    volumes = limited(amount)
    first = method(2, seed=3, **settings)
    first.fit(volumes, tmp_path)
    volume = volumes[0]["volume"]
    labels = first.predict(volume)
    assert labels.shape == tuple(volume.shape[1:]) and labels.dtype == np.uint8 and labels.max() < 2
    torch.manual_seed(99)
    again = method(2, seed=3, **settings)
    again.fit(volumes)
    assert np.array_equal(labels, again.predict(volume))
    # loaded from the checkpoints of the first
    written = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    loaded = method(2, seed=3, **settings)
    loaded.fit(volumes, tmp_path)
    assert np.array_equal(labels, loaded.predict(volume))
    assert written == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    assert loaded.training_seconds == first.training_seconds > 0
    assert all(len(list_checkpoints(folder)) == 1 for folder in tmp_path.iterdir())
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix not in (".json", ".safetensors")]


@pytest.mark.parametrize("name", TINY)
def test_presets_can_be_made_for_every_level(name):
    if name == "hsu":
        pytest.importorskip("geoopt")
    method, *_ = TINY[name]
    for preset in ("paper", "small"):
        assert method(8, preset=preset).num_parts == 8
