"""Divide structures by intensity and space without training: clustering, a Potts model, connected pieces."""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage
from sklearn.cluster import KMeans

_ITERATIONS = 25  # of the mean-field updates
_CLUSTERS = 3  # of the intensities at most: what surrounds, and inclusions that are darker and brighter than it
POTTS_STRENGTH = 0.6  # per pair of neighbours by a face
_LOCAL_SIGMA = 2.0  # voxels over which local means are taken
_LEAST_SHARE = 0.002  # of a structure's voxels that a piece must have to count


def divide_structure(
    raw: np.ndarray,
    clean: np.ndarray,
    within: np.ndarray,
    count: int,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    alike: bool = False,
    strength: float = POTTS_STRENGTH,
    seed: int = 0,
) -> np.ndarray:
    """Divide a structure into what surrounds its inclusions and the inclusions.

    The intensities of the clean prediction are clustered; a Potts model smooths the clusters on the raw volume, whose
    resolution is finer. Of two and three clusters those are taken that explain the raw volume better, at the price of
    their boundaries. The largest cluster surrounds the inclusions. Pieces of the others that hold at least 0.2 % of
    the structure are inclusions, which are divided by k-means on position and intensity.

    Args:
        raw, clean: (H, W, D) intensities.
        within: (H, W, D) bool, the structure.
        count: number of parts, 2 or more.
        spacing: edge lengths of a voxel in mm.
        alike: divide the inclusions by intensity alone, piece by piece, so that a part may be many structures of one
            kind; default: compact parts.
        strength: of the Potts model's attraction; 0 leaves the clusters as they are.
        seed: of the clustering.

    Returns:
        (H, W, D) int64: 0 for what surrounds and outside of the structure, 1 to count - 1 the inclusions, the largest
        first.
    """
    labels = np.zeros(raw.shape, dtype=np.int64)
    if within.sum() < 2 * _CLUSTERS:
        return labels
    box = ndimage.find_objects(within.astype(np.uint8))[0]
    raw, clean, inside = raw[box], clean[box], within[box]
    number, clusters = _cluster(raw, clean, inside, count, spacing, strength, seed)
    around = np.bincount(clusters[inside], minlength=number).argmax()
    pieces = np.zeros(inside.shape, dtype=np.int64)
    for cluster in range(number):
        if cluster != around:
            found, _ = ndimage.label(inside & (clusters == cluster))
            sizes = np.bincount(found.ravel())
            kept = np.flatnonzero(sizes >= max(2, _LEAST_SHARE * inside.sum()))
            for piece in kept[kept > 0]:
                pieces[found == piece] = pieces.max() + 1
    if count > 1 and (pieces > 0).sum() >= count:
        split = _split_alike if alike else _split_compact
        labels[box] = largest_first(split(raw, pieces, count - 1, spacing, seed), count)
    return labels


def potts_clusters(
    raw: np.ndarray,
    within: np.ndarray,
    clusters: np.ndarray,
    count: int,
    strength: float = POTTS_STRENGTH,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
) -> np.ndarray:
    """Smooth clusters of intensities by a Potts model: Gaussians of one variance, neighbours by a face attract.

    Mean-field updates; means and variance are estimated again in each. Where voxels are anisotropic, the attraction is
    in proportion to the area of the shared face and its mean over the axes is `strength`.

    Args:
        raw: (H, W, D) intensities.
        within: (H, W, D) bool, the structure; voxels outside attract nothing.
        clusters: (H, W, D) the clusters to start from.
        count: number of clusters.
        strength: of the attraction, for voxels of equal edges.
        spacing: edge lengths of a voxel in mm.

    Returns:
        (H, W, D) int64, the most probable cluster; 0 outside of the structure.
    """
    area = _face_weights(strength, spacing)
    q = np.stack([(clusters == k) & within for k in range(count)]).astype(np.float32)
    x = raw[within].astype(np.float32)
    for _ in range(_ITERATIONS):
        weights = q[:, within]
        means = weights @ x / np.maximum(weights.sum(axis=1), 1e-6)
        distance = (x - means[:, None]) ** 2
        variance = max((weights * distance).sum() / len(x), 1e-12)
        energy = _attraction(q, area)[:, within] - distance / (2 * variance)
        energy = np.exp(energy - energy.max(axis=0))
        q[:, within] = energy / energy.sum(axis=0)
    return q.argmax(axis=0)


def refine_boundaries(
    raw: np.ndarray, probabilities: np.ndarray, within: np.ndarray, spacing: Sequence[float] = (1.0, 1.0, 1.0)
) -> np.ndarray:
    """Move the boundaries of soft parts to where the intensities change.

    Mean-field updates of a Potts model whose means are local: a voxel is compared with the Gaussian-weighted mean of
    each part around it (2 voxels), so that shading and inclusions elsewhere do not matter, and a part that is not near
    is impossible. The given probabilities are the prior. Half of the evidence of a voxel counts, since the noise of
    neighbours is correlated.

    Args:
        raw: (H, W, D) intensities.
        probabilities: (K, H, W, D), summing to 1 over K within the structure.
        within: (H, W, D) bool, the structure that the parts divide.
        spacing: edge lengths of a voxel in mm.

    Returns:
        (K, H, W, D) float32, zero outside of the structure.
    """
    area = _face_weights(POTTS_STRENGTH, spacing)
    edge = float(np.prod(spacing)) ** (1 / 3)
    sigma = [_LOCAL_SIGMA * edge / step for step in spacing]
    prior = np.log(np.clip(probabilities, 1e-4, 1.0))
    q = (probabilities * within).astype(np.float32)

    def smooth(values: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(values, sigma, mode="constant", truncate=3.0)

    for iteration in range(8):
        if iteration % 2 == 0:
            weights = np.stack([smooth(part) for part in q])
            means = np.stack([smooth(part * raw) for part in q]) / np.maximum(weights, 1e-6)
            distance = (raw - means) ** 2
            variance = max(float((q * distance).sum() / max(q.sum(), 1e-6)), 1e-12)
            evidence = -0.5 * distance / (2 * variance)
            evidence[weights < 0.02] = -50.0
        energy = evidence + _attraction(q, area) + prior
        energy = np.exp(energy - energy.max(axis=0))
        q = (energy / energy.sum(axis=0) * within).astype(np.float32)
    return q


def clean_pieces(
    labels: np.ndarray, families: Sequence[Sequence[int]], spacing: Sequence[float] = (1.0, 1.0, 1.0), one: bool = True
) -> np.ndarray:
    """Drop stray pieces of parts; their voxels go to the part of the nearest voxel that was kept in the same family.

    Args:
        labels: (H, W, D) parts.
        families: groups of parts that divide one structure between them.
        spacing: edge lengths of a voxel in mm.
        one: keep only the largest piece of each part; otherwise every piece with at least 0.2 % of the structure.

    Returns:
        (H, W, D) of the type of `labels`.
    """
    out = labels.copy()
    for family in families:
        within = np.isin(labels, family)
        kept = np.zeros(labels.shape, dtype=bool)
        for part in family:
            found, number = ndimage.label(labels == part)
            if number:
                sizes = np.bincount(found.ravel(), minlength=number + 1)
                sizes[0] = 0
                large = sizes == sizes.max() if one else sizes >= _LEAST_SHARE * within.sum()
                large[sizes.argmax()] = True
                large[0] = False
                kept |= large[found]
        stray = within & ~kept
        if stray.any():
            nearest = ndimage.distance_transform_edt(
                ~kept, sampling=spacing, return_distances=False, return_indices=True
            )
            out[stray] = labels[tuple(axis[stray] for axis in nearest)]
    return out


def count_pieces(labels: np.ndarray, families: Sequence[Sequence[int]]) -> int:
    """How many pieces the inclusions of all families have, those under 0.2 % of their structure left out.

    Args:
        labels: (H, W, D) parts.
        families: groups of parts that divide one structure between them, the part that surrounds the others first.
    """
    count = 0
    for family in families:
        least = max(2, _LEAST_SHARE * np.isin(labels, family).sum())
        for part in family[1:]:
            found, _ = ndimage.label(labels == part)
            count += int((np.bincount(found.ravel())[1:] >= least).sum())
    return count


def largest_first(labels: np.ndarray, count: int) -> np.ndarray:
    """Renumber the parts 1 to count - 1 by size, the largest first; 0 stays."""
    sizes = np.bincount(labels.ravel(), minlength=count)[1:]
    rank = np.zeros(count, dtype=np.int64)
    rank[1 + np.argsort(-sizes, kind="stable")] = np.arange(1, count)
    return rank[labels]


def face_areas(spacing: Sequence[float], faces: Sequence[int] = (1, 1, 1)) -> np.ndarray:
    """The area in mm² of voxel faces across each axis, (3,) float64.

    Args:
        spacing: edge lengths of a voxel in mm.
        faces: how many there are across each axis.
    """
    return np.asarray(faces) * np.prod(spacing) / np.asarray(spacing, dtype=np.float64)


def _face_weights(strength: float, spacing: Sequence[float]) -> np.ndarray:
    """The attraction along each axis, in proportion to the area of the faces; their mean is `strength`."""
    area = face_areas(spacing)
    return (strength * area / area.mean()).astype(np.float32)


def _attraction(q: np.ndarray, area: np.ndarray) -> np.ndarray:
    """The sum over the neighbours by a face of their probabilities, weighted: of the shape of `q`, (K, H, W, D)."""
    field = np.zeros_like(q)
    for axis in range(3):
        there, back = [slice(None)] * 4, [slice(None)] * 4
        there[axis + 1], back[axis + 1] = slice(1, None), slice(None, -1)
        field[tuple(there)] += area[axis] * q[tuple(back)]
        field[tuple(back)] += area[axis] * q[tuple(there)]
    return field


def _cluster(raw, clean, inside, count, spacing, strength, seed) -> tuple[int, np.ndarray]:
    """The number of clusters and the clusters, (H, W, D), with the lowest energy of those with two to `count`."""
    found = []
    for number in range(2, max(2, min(count, _CLUSTERS)) + 1):
        clusters = np.zeros(inside.shape, dtype=np.int64)
        clusters[inside] = _kmeans(clean[inside][:, None], number, seed)
        if strength > 0:
            clusters = potts_clusters(raw, inside, clusters, number, strength, spacing)
        found.append((_energy(raw, inside, clusters, strength, spacing), number, clusters))
    return min(found, key=lambda one: one[0])[1:]


def _energy(raw, inside, clusters, strength, spacing) -> float:
    """Negative log-likelihood of Gaussians of one variance, plus the boundaries at half the attraction."""
    labels, values = clusters[inside], raw[inside]
    sizes = np.maximum(np.bincount(labels), 1)
    rest = values - (np.bincount(labels, weights=values) / sizes)[labels]
    boundary = 0.0
    for axis, area in enumerate(_face_weights(strength, spacing)):
        moved, within = np.moveaxis(clusters, axis, 0), np.moveaxis(inside, axis, 0)
        boundary += area * ((moved[1:] != moved[:-1]) & within[1:] & within[:-1]).sum()
    return 0.5 * len(values) * np.log(max(rest.var(), 1e-12)) + 0.5 * boundary


def _split_compact(raw, pieces, count, spacing, seed) -> np.ndarray:
    """Inclusions by k-means on position and intensity, each of unit variance."""
    inside = pieces > 0
    position = np.argwhere(inside) * np.asarray(spacing)
    position = position - position.mean(axis=0)
    colour = raw[inside] - raw[inside].mean()
    features = np.column_stack([position / max(position.std(), 1e-6), colour / max(colour.std(), 1e-6)])
    labels = np.zeros(raw.shape, dtype=np.int64)
    labels[inside] = 1 + _kmeans(features, count, seed)
    return labels


def _split_alike(raw, pieces, count, spacing, seed) -> np.ndarray:
    """Inclusions piece by piece, by k-means on their mean intensities, each piece weighted by its size."""
    numbers = np.arange(1, pieces.max() + 1)
    means = ndimage.mean(raw, pieces, numbers)[:, None]
    sizes = np.bincount(pieces.ravel(), minlength=len(numbers) + 1)[1:]
    labels = np.zeros(len(numbers) + 1, dtype=np.int64)
    labels[1:] = 1 + _kmeans(means, min(count, len(numbers)), seed, sizes)
    return labels[pieces]


def _kmeans(features: np.ndarray, count: int, seed: int, weights: np.ndarray | None = None) -> np.ndarray:
    count = min(count, len(np.unique(features, axis=0)))
    return KMeans(count, n_init=3, random_state=seed).fit_predict(features, sample_weight=weights)
