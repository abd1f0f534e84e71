"""Statistics of parts against loops over voxels and cases computed by hand."""

import numpy as np
import pytest

from diffdiscover3d.reporting.parts import measure_parts, nest_levels, number_by_size

AFFINE = np.array([[0, -2.0, 0, 10], [1.5, 0, 0, -4], [0, 0, 3.0, 7], [0, 0, 0, 1]])


def test_statistics_against_a_loop_over_voxels():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, (5, 7, 3)).astype(np.uint8)
    values = rng.normal(1000, 5, labels.shape).astype(np.float32)
    parts = measure_parts(labels, values, AFFINE, 5, topology=True)
    for part in parts[:4]:
        own = labels == part.index
        voxels = values[own].astype(np.float64)
        assert part.voxels == own.sum()
        assert part.volume_ml == pytest.approx(own.sum() * 9 / 1000)
        assert part.mean_intensity == pytest.approx(voxels.mean())
        assert part.std_intensity == pytest.approx(voxels.std())
        world = np.array([AFFINE @ [*index, 1] for index in np.argwhere(own)])[:, :3]
        np.testing.assert_allclose(part.centroid_mm, world.mean(axis=0))
    empty = parts[4]
    assert (empty.voxels, empty.volume_ml, empty.components, empty.neighbours) == (0, 0, 0, ())
    assert np.isnan([empty.mean_intensity, empty.std_intensity, *empty.centroid_mm]).all()


def test_components_and_neighbours_by_hand():
    labels = np.zeros((6, 4, 3), np.uint8)
    labels[0, 0, 0] = labels[2, 0, 0] = labels[5, 3, 2] = 1  # three components
    labels[3, 0, 0] = 2  # touches 0 and the second component of 1
    labels[4, 1, 0] = 3  # shares only an edge with 2
    parts = measure_parts(labels, labels.astype(np.float32), np.eye(4), 4, topology=True)
    assert [p.components for p in parts] == [1, 3, 1, 1]
    assert [p.neighbours for p in parts] == [(1, 2, 3), (0, 2), (0, 1), (0,)]
    plain = measure_parts(labels, labels.astype(np.float32), np.eye(4), 4)
    assert all(p.components is None and p.neighbours is None for p in plain)


def test_misuse():
    labels = np.full((2, 3, 4), 2, np.uint8)
    with pytest.raises(ValueError, match="one shape"):
        measure_parts(labels, np.zeros((4, 3, 2)), np.eye(4), 3)
    with pytest.raises(ValueError, match="below 2, got 2"):
        measure_parts(labels, np.zeros((2, 3, 4)), np.eye(4), 2)


def test_largest_first_and_ties_by_centroid():
    labels = np.zeros((4, 3, 2), np.uint8)
    labels[3, 0], labels[0, 2], labels[2, 1, 0] = 1, 2, 4
    # 0 is largest; 1 and 2 have two voxels, 2 comes first along the first axis; then 4; 3 and 5 are empty
    assert number_by_size(labels, 6).tolist() == [0, 2, 1, 4, 3, 5]


def test_tree_by_hand():
    coarse = np.array([0, 0, 0, 0, 1, 1]).reshape(1, 2, 3)
    middle = np.array([0, 0, 1, 1, 1, 3]).reshape(1, 2, 3)
    fine = np.array([0, 1, 1, 1, 1, 1]).reshape(1, 2, 3)
    tree = nest_levels({3: fine, 1: coarse, 2: middle}, {1: 2, 2: 4, 3: 2})
    found = {(x["level"], x["part"]): (x["parent_level"], x["parent"], x["overlap"]) for x in tree}
    assert found == {
        (2, 0): (1, 0, 1.0),
        (2, 1): (1, 0, pytest.approx(2 / 3)),
        (2, 2): (1, None, None),
        (2, 3): (1, 1, 1.0),
        (3, 0): (2, 0, 1.0),
        (3, 1): (2, 1, pytest.approx(3 / 5)),
    }
    assert tree[1]["overlaps"] == [pytest.approx(2 / 3), pytest.approx(1 / 3)] and tree[2]["overlaps"] is None
