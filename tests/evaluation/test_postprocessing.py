"""Mask post-processing, step by step."""

import numpy as np
import pytest
from scipy import ndimage

from diffdiscover3d.evaluation.postprocessing import clean_mask


def test_largest_component_without_holes():
    mask = np.zeros((20, 18, 16), bool)
    mask[3:12, 3:12, 3:12] = True
    mask[6:8, 6:8, 6:8] = False  # a hole
    mask[15:18, 14:17, 12:15] = True  # a smaller component
    cleaned = clean_mask(mask)
    expected = np.zeros_like(mask)
    expected[3:12, 3:12, 3:12] = True
    inside = np.zeros_like(mask)
    inside[4:11, 4:11, 4:11] = True
    assert cleaned[inside].all() and not (cleaned & ~expected).any()


@pytest.mark.parametrize("seed", range(4))
def test_against_the_steps_on_the_whole_volume(seed):
    rng = np.random.default_rng(seed)
    mask = ndimage.gaussian_filter(rng.standard_normal((19, 23, 14)), 1.5) > 0.08
    labels, count = ndimage.label(mask, np.ones((3, 3, 3)))
    largest = labels == 1 + np.argmax([(labels == k).sum() for k in range(1, count + 1)])
    padded = np.pad(ndimage.binary_fill_holes(largest), 1)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3, 3)).reshape(*mask.shape, 27)
    np.testing.assert_array_equal(clean_mask(mask), np.median(windows, axis=-1) > 0)


def test_diagonal_neighbours_belong_together_and_empty_stays_empty():
    mask = np.zeros((9, 9, 9), np.uint8)
    mask[1:4, 1:4, 1:4] = mask[4:7, 4:7, 4:7] = 3
    mask[8, 0, 0] = 1
    cleaned = clean_mask(mask)
    assert cleaned[2, 2, 2] and cleaned[5, 5, 5] and not cleaned[8, 0, 0]
    assert not clean_mask(np.zeros((4, 5, 6))).any()
