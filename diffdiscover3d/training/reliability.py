"""How far the assigned inclusions of a structure can be trusted, without labels."""

from collections.abc import Sequence

import numpy as np

from diffdiscover3d.training.spatial_split import face_areas

_TOUCHING = 0.15  # share of the smaller surface from which on two inclusions are compared


def contrasts(raw: np.ndarray, labels: np.ndarray, family: Sequence[int]) -> np.ndarray:
    """|mean of an inclusion - mean of what surrounds it|, in standard deviations of the latter; 0 for an absent one.

    Args:
        raw: (H, W, D) intensities.
        labels: (H, W, D) parts.
        family: the part that surrounds the others first.
    """
    return _contrasts(raw, labels, family)[0]


def _contrasts(raw: np.ndarray, labels: np.ndarray, family: Sequence[int]) -> tuple[np.ndarray, list[float], float]:
    """[`contrasts`], the mean of each inclusion (NaN for an absent one), and the standard deviation around them."""
    around = raw[labels == family[0]]
    if len(around) < 2:
        return np.zeros(len(family) - 1), [np.nan] * (len(family) - 1), np.nan
    mean, spread = around.mean(), max(float(around.std()), 1e-6)
    inside = [raw[labels == part] for part in family[1:]]
    means = [x.mean() if len(x) else np.nan for x in inside]
    found = [abs(float(m - mean)) / spread if len(x) else 0.0 for x, m in zip(inside, means, strict=True)]
    return np.array(found), [float(m) for m in means], spread


def separation(
    raw: np.ndarray,
    labels: np.ndarray,
    family: Sequence[int],
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    alike: bool = False,
) -> float:
    """Contrast times compactness of the inclusion for which the product is lowest.

    The contrast of an inclusion is that with the part that surrounds it ([`contrasts`]), or that with another inclusion
    if it is lower and they touch at more than 15 % of the smaller surface: the halves of a single object have a low
    contrast. The compactness is the surface of a cube of the same volume divided by the inclusion's surface: 1 for a
    cube, less for sheets and scattered voxels.

    Args:
        raw: (H, W, D) intensities.
        labels: (H, W, D) parts.
        family: the part that surrounds the others first.
        spacing: edge lengths of a voxel in mm.
        alike: leave out the compactness, since an inclusion consists of many pieces.

    Returns:
        0 or more; 0 if an inclusion is absent, infinite for a family without inclusions.
    """
    if len(family) == 1:
        return np.inf
    found, means, spread = _contrasts(raw, labels, family)
    if not found.all():
        return 0.0
    masks = [labels == part for part in family[1:]]
    surfaces = [_area(mask, ~mask, spacing) for mask in masks]
    for i in range(len(masks)):
        for j in range(i):
            if _area(masks[i], masks[j], spacing) > _TOUCHING * min(surfaces[i], surfaces[j]):
                found[[i, j]] = np.minimum(found[[i, j]], abs(means[i] - means[j]) / spread)
    if not alike:
        voxel = float(np.prod(spacing))
        cubes = [6 * (voxel * mask.sum()) ** (2 / 3) for mask in masks]
        found = found * [min(1.0, c / max(s, 1e-12)) for c, s in zip(cubes, surfaces, strict=True)]
    return float(found.min(initial=np.inf))


def _area(one: np.ndarray, other: np.ndarray, spacing: Sequence[float]) -> float:
    """The area in mm² of the voxel faces between two masks."""
    faces = []
    for axis in range(3):
        a, b = np.moveaxis(one, axis, 0), np.moveaxis(other, axis, 0)
        faces.append((a[1:] & b[:-1]).sum() + (a[:-1] & b[1:]).sum())
    return float(face_areas(spacing, faces).sum())
