"""Scores against hand-computed cases and brute force."""

import itertools

import numpy as np
import pytest

from diffdiscover3d.metrics import dataset_dice, dice_matrix, match_parts, matched_dice


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


@pytest.mark.parametrize(("predicted", "message"), [([0, 3], "0..1"), ([-1, 0], "0..1"), ([0, 1, 1], "one shape")])
def test_bad_labels_are_named(predicted, message):
    with pytest.raises(ValueError, match=message):
        dice_matrix(np.array(predicted), np.array([0, 1]), 2, 2)
