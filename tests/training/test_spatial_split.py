"""Clustering in space, the Potts model and the cleaning of parts, against shapes that are known."""

import numpy as np
import pytest

from diffdiscover3d.training.spatial_split import (
    clean_pieces,
    count_pieces,
    divide_structure,
    largest_first,
    potts_clusters,
    refine_boundaries,
)

GRID = (20, 24, 18)
WHOLE = np.ones(GRID, dtype=bool)


def boxes(*corners, grid=GRID):
    """Labels 1, 2, ... of boxes given by their slices."""
    labels = np.zeros(grid, dtype=np.int64)
    for number, corner in enumerate(corners, start=1):
        labels[tuple(slice(*c) for c in corner)] = number
    return labels


def noisy(labels, colours, sigma=0.3):
    return np.asarray(colours)[labels] + np.random.default_rng(0).normal(0, sigma, labels.shape)


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_two_inclusions_of_one_colour_are_divided_by_space():
    true = boxes(((2, 9), (2, 10), (2, 8)), ((12, 17), (14, 20), (10, 15)))
    found = divide_structure(noisy(true, (0, 2, 2)), noisy(true, (0, 2, 2), 0.1), WHOLE, 3)
    assert dice(found == 1, true == 1) > 0.97 and dice(found == 2, true == 2) > 0.97  # the larger one comes first


def test_inclusions_that_are_alike_are_one_part():
    """Three bright and two dark boxes: two kinds, many of each, which compact parts would cut across."""
    places = [((1, 6), (1, 6), (1, 6)), ((1, 6), (15, 20), (1, 6)), ((12, 17), (1, 6), (10, 15))]
    dark = [((12, 17), (16, 20), (2, 6)), ((13, 17), (2, 6), (1, 5))]
    true = boxes(*places, *dark)
    colours = (0, 2, 2, 2, -2, -2)
    raw, clean = noisy(true, colours), noisy(true, colours, 0.1)
    alike = divide_structure(raw, clean, WHOLE, 3, alike=True)
    bright = (true >= 1) & (true <= 3)
    assert dice(alike == 1, bright) > 0.97 and dice(alike == 2, true > 3) > 0.97
    compact = divide_structure(raw, clean, WHOLE, 3)
    assert max(dice(compact == k, bright) for k in (1, 2)) < 0.97
    assert count_pieces(alike, [(0, 1, 2)]) == 5


def test_only_the_structure_is_divided():
    true = boxes(((3, 8), (3, 9), (3, 8)), ((14, 19), (4, 9), (3, 8)))
    within = np.zeros(GRID, dtype=bool)
    within[:11] = True
    found = divide_structure(noisy(true, (0, 2, 2)), noisy(true, (0, 2, 2), 0.1), within, 2)
    assert dice(found == 1, true == 1) > 0.97 and not found[11:].any()


def test_a_structure_of_a_few_voxels_stays_whole():
    few = boxes(((3, 4), (3, 5), (3, 4))) == 1
    assert not divide_structure(np.random.rand(*GRID), np.random.rand(*GRID), few, 3).any()


def test_potts_model_removes_noise_and_keeps_the_box():
    true = boxes(((5, 12), (6, 14), (4, 10)))
    raw = noisy(true, (0, 1), 0.5)
    start = (raw > 0.5).astype(np.int64)
    found = potts_clusters(raw, WHOLE, start, 2)
    assert (start != true).mean() > 0.1 and (found != true).mean() < 0.02
    # an oracle without attraction: the nearer of two means, estimated by the same updates
    np.testing.assert_array_equal(potts_clusters(raw, WHOLE, start, 2, strength=0.0) == 1, _gaussian_oracle(raw))


def _gaussian_oracle(raw, iterations=25):
    q = (raw > 0.5).astype(np.float64)
    for _ in range(iterations):
        one, two = ((1 - q) * raw).sum() / (1 - q).sum(), (q * raw).sum() / q.sum()
        variance = ((1 - q) * (raw - one) ** 2 + q * (raw - two) ** 2).mean()
        q = 1 / (1 + np.exp(((raw - two) ** 2 - (raw - one) ** 2) / (2 * variance)))
    return q > 0.5


def test_attraction_follows_the_area_of_the_faces():
    """Two layers 10 mm apart attract each other by hundreds of times less than neighbours within a layer."""
    raw = np.zeros((2, 12, 12))
    raw[0], raw[1] = 1.0, 0.0
    start = np.zeros(raw.shape, dtype=np.int64)
    start[0] = 1
    raw += np.random.default_rng(0).normal(0, 1.0, raw.shape)
    flat = potts_clusters(raw, np.ones(raw.shape, bool), start, 2, 1.0, spacing=(10.0, 1.0, 1.0))
    assert (flat[0] == 1).all() and (flat[1] == 0).all()


@pytest.mark.parametrize("shift", [-1, 1])
def test_boundaries_move_to_the_edges(shift):
    true = boxes(((5, 12), (6, 14), (4, 10)))
    wrong = boxes(((5 - shift, 12 + shift), (6, 14 + shift), (4 - shift, 10))) == 1
    probabilities = np.where(np.stack([~wrong, wrong]), 0.8, 0.2)
    found = refine_boundaries(noisy(true, (0, 2)), probabilities, WHOLE)
    np.testing.assert_allclose(found.sum(axis=0), 1, atol=1e-5)
    assert dice(wrong, true == 1) < 0.9 and dice(found.argmax(axis=0) == 1, true == 1) > 0.99


def test_shading_does_not_move_a_boundary():
    true = boxes(((5, 12), (6, 14), (4, 10)))
    shaded = noisy(true, (0, 1.5), 0.2) + np.linspace(0, 4, GRID[1])[None, :, None]
    probabilities = np.where(np.stack([true == 0, true == 1]), 0.8, 0.2)
    found = refine_boundaries(shaded, probabilities, WHOLE).argmax(axis=0)
    assert dice(found == 1, true == 1) > 0.97


def test_stray_pieces_go_to_the_nearest_part_of_their_structure():
    labels = boxes(((4, 14), (4, 14), (4, 14)))
    labels[8, 8, 8] = 0  # a hole
    labels[1, 1, 1] = 1  # a speck
    expected = boxes(((4, 14), (4, 14), (4, 14)))
    np.testing.assert_array_equal(clean_pieces(labels, [(0, 1)]), expected)
    # pieces of 0.2 % of the structure stay where a part may have many
    labels[16:19, 18:22, 10:14] = 1
    kept = clean_pieces(labels, [(0, 1)], one=False)
    assert (kept[16:19, 18:22, 10:14] == 1).all() and kept[1, 1, 1] == 0 and kept[8, 8, 8] == 1


def test_families_are_cleaned_apart():
    labels = boxes(((0, 20), (0, 12), (0, 18)), ((2, 6), (2, 6), (2, 6)), ((14, 18), (16, 20), (3, 7))) + 1
    labels[10, 6, 10] = 3  # a speck of part 3 in part 2, and part 4 in part 1 next to it
    labels[10, 14, 10] = 4
    cleaned = clean_pieces(labels, [(2, 3), (1, 4)])
    assert cleaned[10, 6, 10] == 2 and cleaned[10, 14, 10] == 1


def test_largest_first():
    labels = np.array([[[0, 2, 2, 1, 3, 3, 3]]])
    np.testing.assert_array_equal(largest_first(labels, 4), [[[0, 2, 2, 3, 1, 1, 1]]])
