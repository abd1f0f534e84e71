"""Clusters in space as a baseline, on a cell whose parts are known."""

import numpy as np
import pytest
import torch

from diffdiscover3d.baselines.spatial_kmeans import SpatialKMeans
from diffdiscover3d.evaluation.metrics import dice_matrix, matched_dice

GRID = (28, 30, 26)


class ExactTeacher:
    """Its clean prediction is the volume without noise."""

    def __init__(self, clean):
        self.clean = torch.from_numpy(clean.astype(np.float32))[None, None]

    def __call__(self, volume, timestep, stages, generator, num_noise, denoised):
        assert stages == () and num_noise == 2 and denoised
        return type("Output", (), {"denoised": self.clean + 0.001 * timestep})


def cell():
    """Labels of three levels: a cell, two inclusions in it, two grains in each of them."""
    fine = np.zeros(GRID, dtype=np.int64)
    fine[2:26, 2:28, 2:24] = 1
    fine[3:13, 3:14, 3:13], fine[15:25, 16:27, 12:23] = 2, 3
    fine[4:7, 4:8, 4:7], fine[9:12, 9:13, 9:12] = 4, 5
    fine[16:20, 17:21, 13:17], fine[21:24, 22:26, 18:22] = 6, 7
    return [np.asarray(parts)[fine] for parts in ([0] + [1] * 7, [0, 1, 2, 3, 2, 2, 3, 3], range(8))]


@pytest.mark.parametrize(("level", "least"), [(1, 0.99), (2, 0.97), (3, 0.9)])
def test_levels_are_found_inside_one_another(level, least):
    labels = cell()
    clean = np.array([-6, 0, 1.5, -1.5, 3, 3, -3, -3.0])[labels[2]]
    noisy = clean + np.random.default_rng(0).normal(0, 0.2, GRID)
    baseline = SpatialKMeans(2**level, ExactTeacher(clean))
    found = baseline.predict(torch.from_numpy(noisy.astype(np.float32))[None])
    assert found.dtype == np.uint8 and found.shape == GRID
    assert matched_dice(dice_matrix(found, labels[level - 1], 2**level, 2**level)) > least


def test_other_numbers_of_parts_are_refused():
    with pytest.raises(ValueError, match="2, 4 or 8"):
        SpatialKMeans(3, None)
