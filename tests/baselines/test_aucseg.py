"""The mixture on FLAIR intensities."""

import numpy as np
import pytest
import torch

from diffdiscover3d.baselines.aucseg import AUCSeg, keep_large_regions
from diffdiscover3d.evaluation.metrics import binary_dice
from tests.helpers.brats_folders import make_case


def test_bright_tumours_are_found():
    images, mask = make_case(3, shape=(40, 44, 36))
    volume = torch.from_numpy(images["flair"] / images["flair"].max()).float()[None]
    labels = AUCSeg().predict(volume)
    assert labels.dtype == np.uint8 and binary_dice(labels == 2, mask > 0) > 0.9
    assert (labels[images["flair"] == 0] == 0).all()
    assert np.array_equal(labels, AUCSeg().predict(volume))


def test_large_regions_are_kept_and_filled():
    mask = np.zeros((20, 16, 18), dtype=bool)
    mask[1:8, 1:8, 1:8] = True  # 343 voxels with a hole
    mask[4, 4, 4] = False
    mask[12:17, 9:14, 9:14] = True  # 125
    mask[12:15, 1:4, 1:4] = True  # 27, less than a fifth of the largest
    mask[18, 14, 16] = True  # a single voxel
    found = keep_large_regions(mask, 0.2)
    assert found[4, 4, 4] and found[14, 11, 11] and not found[13, 2, 2] and not found[18, 14, 16]
    assert not keep_large_regions(np.zeros((3, 4, 5), dtype=bool), 0.2).any()


def test_a_volume_without_contrast_has_no_tumour():
    volume = torch.zeros(1, 6, 7, 5)
    volume[:, 2:4] = 1
    assert np.unique(AUCSeg().predict(volume)).tolist() == [0, 1]


def test_three_parts_only():
    with pytest.raises(ValueError, match="`num_parts` must be 3, got 4"):
        AUCSeg(4)
