"""Statistics accumulated slab by slab, against those of the whole label map."""

import itertools

import numpy as np
import pytest

from diffdiscover3d.reporting.parts import measure_parts, number_by_size
from diffdiscover3d.reporting.slab_parts import PartSums, Topology

AFFINE = np.array([[0, -2.0, 0, 10], [1.5, 0, 0, -4], [0, 0, 3.0, 7], [0, 0, 0, 1]])


def gather(labels, values, num_parts, axis, cuts):
    sums, topology = PartSums(num_parts, labels.shape), Topology(num_parts)
    edges = [0, *cuts, labels.shape[axis]]
    for start, stop in itertools.pairwise(edges):
        region = tuple(slice(start, stop) if a == axis else slice(0, n) for a, n in enumerate(labels.shape))
        sums.add(region, labels[region], values[region])
        topology.add(np.moveaxis(labels[region], axis, 0))
    return sums, topology


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_against_the_whole(axis, share):
    """Random parts of many components, some with arms that merge in later slabs, one empty."""
    rng = np.random.default_rng(int(10 * share) + axis)
    labels = (rng.random((11, 9, 13)) < share).astype(np.uint8) * rng.integers(1, 3, (11, 9, 13)).astype(np.uint8)
    values = rng.normal(1e5, 1, labels.shape).astype(np.float32)  # a mean far larger than the spread
    for cuts in ([], [1, 2, 5], list(range(1, labels.shape[axis]))):
        sums, topology = gather(labels, values, 4, axis, cuts)
        expected = measure_parts(labels, values, AFFINE, 4, topology=True)
        for mine, theirs in zip(sums.statistics(AFFINE, range(4), topology), expected, strict=True):
            assert (mine.index, mine.voxels, mine.volume_ml) == (theirs.index, theirs.voxels, theirs.volume_ml)
            assert (mine.components, mine.neighbours) == (theirs.components, theirs.neighbours)
            np.testing.assert_allclose(mine.mean_intensity, theirs.mean_intensity, rtol=1e-12)
            np.testing.assert_allclose(mine.std_intensity, theirs.std_intensity, rtol=1e-6)
            np.testing.assert_allclose(mine.centroid_mm, theirs.centroid_mm)
        assert sums.by_size().tolist() == number_by_size(labels, 4).tolist()


def test_arms_that_merge_late_are_one_component():
    labels = np.zeros((5, 6, 1), np.uint8)
    labels[:4, 0] = labels[:4, 2] = labels[:2, 4] = 1  # three arms, of which the last ends
    labels[3, 1] = 1  # and two of which merge
    labels[4, 5] = 1
    counts = []
    topology = Topology(2)
    for plane in labels[:, None]:
        topology.add(plane)
        counts.append(topology.components[1])
    assert counts == [3, 3, 3, 2, 3]


def test_new_numbers():
    labels = np.array([[[0, 1, 1], [1, 2, 2]]], np.uint8)
    sums, _ = gather(labels, labels.astype(np.float32), 3, 0, [])
    order = sums.by_size()
    assert order.tolist() == [1, 2, 0]
    assert [p.voxels for p in sums.statistics(np.eye(4), order)] == [3, 2, 1]
    assert [p.mean_intensity for p in sums.statistics(np.eye(4), order)] == [1, 2, 0]
    with pytest.raises(ValueError, match="below 3, got 3"):
        sums.add((slice(0, 1),) * 3, np.full((1, 1, 1), 3), np.zeros((1, 1, 1)))
