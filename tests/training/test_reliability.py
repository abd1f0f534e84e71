"""Contrast and compactness of assigned inclusions, against values computed by hand."""

import numpy as np
import pytest

from diffdiscover3d.training.reliability import contrasts, separation

GRID = (20, 24, 18)
CHECKERED = np.where(np.indices(GRID).sum(axis=0) % 2, 0.5, -0.5)  # mean 0, standard deviation 0.5


def boxes(*corners):
    """Labels 1, 2, ... of boxes given by their slices."""
    labels = np.zeros(GRID, dtype=np.int64)
    for number, corner in enumerate(corners, start=1):
        labels[tuple(slice(*c) for c in corner)] = number
    return labels


def coloured(labels, *colours):
    return np.asarray(colours)[labels] + CHECKERED


CUBE, FAR, HALF = ((2, 6),) * 3, ((12, 16),) * 3, ((6, 10), (2, 6), (2, 6))  # HALF touches CUBE at 16 of 96 faces


def test_contrasts_count_in_deviations_of_what_surrounds():
    labels = boxes(CUBE, FAR)
    raw = coloured(labels, 1, 4, 1)
    np.testing.assert_allclose(contrasts(raw, labels, (0, 1, 2)), [6.0, 0.0], atol=0.02)
    np.testing.assert_allclose(contrasts(raw, labels, (0, 1, 3)), [6.0, 0.0], atol=0.02)  # part 3 is not there


@pytest.mark.parametrize(
    ("places", "colours", "expected"),
    [
        ((CUBE, FAR), (1, 4, 4), 6.0),  # of one colour, but apart
        ((CUBE, HALF), (1, 4, 4), 0.0),  # one object in two halves
        ((CUBE, HALF), (1, 4, 5), 2.0),  # a contrast of 6 and 8 with what surrounds them, of 2 with each other
        ((CUBE, HALF), (1, 4, -2), 6.0),  # touching, and unlike
        ((CUBE, ((6, 7), (2, 6), (2, 4))), (1, 4, 4), 0.0),  # 8 of the smaller one's 28 faces
        ((CUBE, ((6, 10), (2, 6), (5, 9))), (1, 4, 4), 6.0),  # 4 of 96 faces: too few to count
        ((CUBE, ((10, 11), (2, 10), (2, 10))), (1, 4, 4), 6.0 * 0.6),  # a sheet: 160 faces in place of 96
    ],
)
def test_the_least_separate_inclusion_counts(places, colours, expected):
    labels = boxes(*places)
    assert separation(coloured(labels, *colours), labels, (0, 1, 2)) == pytest.approx(expected, abs=0.02)


def test_scattered_voxels_are_not_compact():
    labels = boxes(CUBE)
    labels[10:18:2, 2:18:2, 2:10:2] = 2  # 128 voxels apart: 768 faces; a cube of that volume has 152.4
    raw = coloured(labels, 1, 4, 4)
    contrast = contrasts(raw, labels, (0, 1, 2))[1]
    assert separation(raw, labels, (0, 1, 2)) == pytest.approx(contrast * 152.4 / 768, rel=1e-3)
    assert separation(raw, labels, (0, 1, 2), alike=True) == pytest.approx(min(contrast, 6.0), abs=0.05)


def test_surfaces_are_in_millimetres():
    labels = boxes(((2, 6), (2, 6), (2, 3)))  # a cube of 4 mm where voxels measure 1, 1 and 4 mm
    raw = coloured(labels, 1, 4)
    assert separation(raw, labels, (0, 1), (1.0, 1.0, 4.0)) == pytest.approx(6.0, abs=0.02)
    assert separation(raw, labels, (0, 1)) == pytest.approx(6.0 * 6 * 16 ** (2 / 3) / 48, abs=0.02)


def test_absent_inclusions_and_families_of_one_part():
    labels = boxes(CUBE)
    raw = coloured(labels, 1, 4)
    assert separation(raw, labels, (0, 1, 2)) == 0.0
    assert separation(raw, labels, (0,)) == separation(raw, labels, (7,)) == np.inf
