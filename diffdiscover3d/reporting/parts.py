"""Statistics of parts: sizes, intensities, positions, components and neighbours; and how levels are nested."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage


@dataclass(frozen=True)
class PartStatistics:
    """The statistics of one part of one scan; those that an empty part does not have are NaN.

    Attributes:
        index: the part's number in the label map.
        voxels: number of voxels.
        volume_ml: their volume in millilitres.
        mean_intensity, std_intensity: of the scan's intensities in it (population standard deviation).
        centroid_mm: mean position of its voxels in the scan's world space (right, anterior, superior).
        components: number of components connected through voxel faces; `None` if not measured.
        neighbours: indices of the parts that share voxel faces with it; `None` if not measured.
    """

    index: int
    voxels: int
    volume_ml: float
    mean_intensity: float
    std_intensity: float
    centroid_mm: tuple[float, float, float]
    components: int | None = None
    neighbours: tuple[int, ...] | None = None


def measure_parts(
    labels: np.ndarray, intensities: np.ndarray, affine: np.ndarray, num_parts: int, *, topology: bool = False
) -> list[PartStatistics]:
    """Measure every part of a label map.

    Args:
        labels: (H, W, D) part numbers below `num_parts`.
        intensities: (H, W, D), of the scan.
        affine: (4, 4), voxels to millimetres.
        num_parts: K; parts without a voxel are listed too.
        topology: also count components and find neighbours, which is slower.

    Raises:
        ValueError: if the shapes differ or a label is not below `num_parts`.
    """
    if labels.shape != intensities.shape:
        raise ValueError(f"`labels` {labels.shape} and `intensities` {intensities.shape} must have one shape.")
    if labels.max() >= num_parts:
        raise ValueError(f"`labels` must lie below {num_parts}, got {labels.max()}.")
    flat = labels.ravel()
    voxels = np.bincount(flat, minlength=num_parts)
    divisor = np.where(voxels > 0, voxels, np.nan)
    mean = np.bincount(flat, weights=intensities.ravel(), minlength=num_parts) / divisor
    # a second pass avoids the cancellation of a difference of squares
    deviations = (intensities.ravel().astype(np.float64) - mean[flat]) ** 2
    std = np.sqrt(np.bincount(flat, weights=deviations, minlength=num_parts) / divisor)
    return describe_parts(
        voxels,
        mean,
        std,
        _centroids(labels, num_parts, divisor),
        affine,
        _components(labels, num_parts) if topology else None,
        _neighbours(labels, num_parts) if topology else None,
    )


def describe_parts(
    voxels: np.ndarray,
    mean: np.ndarray,
    std: np.ndarray,
    centroids: np.ndarray,
    affine: np.ndarray,
    components: Sequence[int] | None = None,
    neighbours: Sequence[tuple[int, ...]] | None = None,
) -> list[PartStatistics]:
    """The statistics of K parts, with volumes and positions in physical units.

    Args:
        voxels, mean, std: (K,) sizes, and mean and standard deviation of the intensities.
        centroids: (3, K) mean voxel indices.
        affine: (4, 4), voxels to millimetres.
        components, neighbours: of each part, if they were measured.
    """
    voxel_ml = abs(np.linalg.det(affine[:3, :3])) / 1000
    centroids = (affine[:3, :3] @ centroids + affine[:3, 3:]).T
    return [
        PartStatistics(
            k,
            int(voxels[k]),
            float(voxels[k] * voxel_ml),
            float(mean[k]),
            float(std[k]),
            tuple(map(float, centroids[k])),
            None if components is None else components[k],
            None if neighbours is None else neighbours[k],
        )
        for k in range(len(voxels))
    ]


def number_by_size(labels: np.ndarray, num_parts: int) -> np.ndarray:
    """The order of parts by size: largest first, ties by centroid (first axis first).

    Returns:
        (num_parts,) the old number of each new part; empty parts come last, by their old number.
    """
    voxels = np.bincount(labels.ravel(), minlength=num_parts)
    return order_by_size(voxels, _centroids(labels, num_parts, np.maximum(voxels, 1)))


def order_by_size(voxels: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """The order of [`number_by_size`] from (K,) sizes and (3, K) mean voxel indices; empty parts come last."""
    return np.lexsort((np.arange(len(voxels)), centroids[2], centroids[1], centroids[0], -voxels))


def nest_levels(levels: Mapping[int, np.ndarray], num_parts: Mapping[int, int]) -> list[dict]:
    """The tree of parts: for each finer part, the coarser part that holds most of it.

    Args:
        levels: label map of each level, all of one shape; a lower number is coarser.
        num_parts: of each level.

    Returns:
        For every part of every level but the coarsest one dict: `level`, `part`, `parent_level` (the next coarser
        level present), `parent` (its part that holds most of the voxels, the lower number in a tie), `overlap` (the
        share of the part's voxels in it) and `overlaps` (the same for all parts of that level). An empty part has no
        parent, and `None` for it.
    """
    tree = []
    for coarse, fine in itertools.pairwise(sorted(levels)):
        counts = count_pairs(levels[fine], levels[coarse], num_parts[fine], num_parts[coarse])
        tree += nest_counts(fine, coarse, counts)
    return tree


def count_pairs(fine: np.ndarray, coarse: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """(rows, columns) numbers of voxels for every pair of parts of two label maps."""
    pairs = fine.ravel().astype(np.int64) * columns + coarse.ravel()
    return np.bincount(pairs, minlength=rows * columns).reshape(rows, columns)


def nest_counts(fine: int, coarse: int, counts: np.ndarray) -> list[dict]:
    """The links of [`nest_levels`] from one level to the next coarser one, from the counts of [`count_pairs`]."""
    links = []
    for part, row in enumerate(counts):
        total = int(row.sum())
        shares = [float(n / total) for n in row] if total else None
        parent = int(row.argmax()) if total else None
        links.append(
            {
                "level": fine,
                "part": part,
                "parent_level": coarse,
                "parent": parent,
                "overlap": shares[parent] if total else None,
                "overlaps": shares,
            }
        )
    return links


def _centroids(labels: np.ndarray, num_parts: int, divisor: np.ndarray) -> np.ndarray:
    """(3, K) mean voxel indices."""
    means = []
    for axis in range(3):
        size = labels.shape[axis]
        # counting voxels by plane is faster than weighting every voxel
        planes = np.moveaxis(labels, axis, 0).reshape(size, -1)
        counts = np.stack([np.bincount(plane, minlength=num_parts) for plane in planes], axis=1)
        means.append(counts @ np.arange(size) / divisor)
    return np.stack(means)


def _components(labels: np.ndarray, num_parts: int) -> list[int]:
    boxes = ndimage.find_objects(labels.astype(np.int32) + 1, max_label=num_parts)
    return [0 if box is None else ndimage.label(labels[box] == k)[1] for k, box in enumerate(boxes)]


def _neighbours(labels: np.ndarray, num_parts: int) -> list[tuple[int, ...]]:
    touching: list[set[int]] = [set() for _ in range(num_parts)]
    for axis in range(3):
        low = np.moveaxis(labels, axis, 0)[:-1]
        high = np.moveaxis(labels, axis, 0)[1:]
        border = low != high
        pairs = np.unique(low[border].astype(np.int64) * num_parts + high[border])
        for one, other in zip((pairs // num_parts).tolist(), (pairs % num_parts).tolist(), strict=True):
            touching[one].add(other)
            touching[other].add(one)
    return [tuple(sorted(others)) for others in touching]
