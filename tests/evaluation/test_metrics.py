"""Scores against hand-computed cases and brute force."""

import itertools
import warnings

import numpy as np
import pytest
from scipy import ndimage

from diffdiscover3d.evaluation.metrics import (
    binary_dice,
    dataset_dice,
    dice_matrix,
    hausdorff_95,
    match_parts,
    matched_dice,
)


def test_dice_by_hand():
    predicted, true = np.array([0, 0, 1, 1, 2]), np.array([1, 1, 1, 0, 0])
    expected = [[0, 4 / 5], [2 / 4, 2 / 5], [2 / 3, 0]]
    np.testing.assert_allclose(dice_matrix(predicted, true, 3, 2), expected)


def test_absent_parts_score_nothing():
    matrix = dice_matrix(np.zeros((2, 3, 4), int), np.zeros((2, 3, 4), int), 2, 2)
    np.testing.assert_array_equal(matrix, [[1, 0], [0, 0]])
    assert matched_dice(matrix) == 0.5


def test_matching_is_the_best_of_all_permutations():
    scores = np.random.default_rng(0).random((5, 5))
    best = max(sum(scores[i, p[i]] for i in range(5)) for p in itertools.permutations(range(5)))
    assert np.isclose(scores[match_parts(scores)].sum(), best)
    assert np.isclose(matched_dice(scores), best / 5)


def test_renumbering_parts_changes_nothing():
    rng = np.random.default_rng(1)
    true = rng.integers(0, 4, (6, 5, 7))
    matrix = dice_matrix(np.array([2, 0, 3, 1])[true], true, 4, 4)
    assert matched_dice(matrix) == 1


def test_one_matching_sees_wandering_parts():
    true = np.array([0, 0, 1, 1])
    matrices = np.stack([dice_matrix(true, true, 2, 2), dice_matrix(1 - true, true, 2, 2)])
    scores = dataset_dice(matrices)
    assert scores["dice"] == 1 and scores["dice_std"] == 0 and scores["dice_one_matching"] == 0.5


@pytest.mark.parametrize(("predicted", "message"), [([0, 3], "0..1"), ([-1, 0], "0..1"), ([0, 1, 1], "same shape")])
def test_bad_labels_are_named(predicted, message):
    with pytest.raises(ValueError, match=message):
        dice_matrix(np.array(predicted), np.array([0, 1]), 2, 2)


def blobs(seed, shape=(21, 17, 13)):
    """Two overlapping random masks with several components each."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.standard_normal((2, *shape)), (0, 2, 2, 2))
    return smooth[0] > 0.02, smooth[1] > 0.03


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 2.0, 3.5)])
@pytest.mark.parametrize("seed", range(3))
def test_hausdorff_95_against_all_pairs_of_surface_voxels(seed, spacing):
    masks = blobs(seed)
    six = ndimage.generate_binary_structure(3, 1)
    surfaces = [np.argwhere(m & ~ndimage.binary_erosion(m, six)) * np.array(spacing) for m in masks]
    pairs = np.linalg.norm(surfaces[0][:, None] - surfaces[1][None], axis=-1)
    expected = max(np.percentile(pairs.min(axis=1), 95), np.percentile(pairs.min(axis=0), 95))
    assert hausdorff_95(*masks, spacing) == pytest.approx(expected)
    assert hausdorff_95(*masks[::-1], spacing) == pytest.approx(expected)


def test_hausdorff_95_of_views_and_at_the_border():
    """Masks that are no contiguous arrays, and that fill the volume; nothing is printed."""
    one, two = blobs(5)
    expected = hausdorff_95(one, two, (0.5, 2.0, 3.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hausdorff_95(one[::-1], two[::-1], np.array([0.5, 2, 3.5])) == pytest.approx(expected)
        assert hausdorff_95(one.T.astype(int), two.T, (3.5, 2, 0.5)) == pytest.approx(expected)
    full, slab = np.ones((6, 5, 9), bool), np.zeros((6, 5, 9), bool)
    slab[:, :, 0] = True
    assert hausdorff_95(full, full) == 0
    # 30 of the 186 surface voxels of the full volume are 8 voxels away, which is more than 5%
    assert hausdorff_95(full, slab, (1, 1, 2.5)) == hausdorff_95(slab, full, (1, 1, 2.5)) == 20


def test_hausdorff_95_by_hand():
    one, two = np.zeros((12, 9, 8), bool), np.zeros((12, 9, 8), bool)
    one[2, 3, 4] = two[7, 3, 4] = True
    assert hausdorff_95(one, two, (2.0, 1.0, 1.0)) == 10
    assert hausdorff_95(one, one) == 0
    assert binary_dice(one, two) == 0 and binary_dice(one, one) == 1
    two[2, 3, 4] = True
    assert binary_dice(one, two) == pytest.approx(2 / 3)


def test_hausdorff_95_of_empty_masks():
    """A missed structure has the diagonal of the volume as distance, 373.13 mm for BraTS; two empty masks have 0."""
    empty, full = np.zeros((240, 240, 155), bool), np.zeros((240, 240, 155), bool)
    full[100:110, 90:95, 70] = True
    assert hausdorff_95(empty, full) == hausdorff_95(full, empty) == pytest.approx(373.13, abs=0.005)
    assert hausdorff_95(empty, empty) == 0 and binary_dice(empty, empty) == 1 and binary_dice(empty, full) == 0
    with pytest.raises(ValueError, match="same shape"):
        hausdorff_95(empty, full[1:])
