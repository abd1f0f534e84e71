"""The statistics of `parts.py` for label maps larger than memory, accumulated slab by slab."""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from diffdiscover3d.reporting.parts import PartStatistics, describe_parts, order_by_size


class PartSums:
    """Size, position and intensity of every part, from regions that together cover a volume once.

    Args:
        num_parts: K.
        shape: (H, W, D) of the volume.
    """

    def __init__(self, num_parts: int, shape: Sequence[int]):
        self.num_parts = num_parts
        self._planes = [np.zeros((n, num_parts), np.int64) for n in shape]  # voxels of each part in each plane
        self._sums = np.zeros(num_parts)
        self._squares = np.zeros(num_parts)  # of the deviations from the mean

    @property
    def voxels(self) -> np.ndarray:
        """(K,) sizes so far."""
        return self._planes[0].sum(axis=0)

    def add(self, region: Sequence[slice], labels: np.ndarray, intensities: np.ndarray) -> None:
        """Add a region's (h, w, d) part numbers and intensities.

        Raises:
            ValueError: if a label is not below K.
        """
        if labels.max() >= self.num_parts:
            raise ValueError(f"`labels` must lie below {self.num_parts}, got {labels.max()}.")
        before = self.voxels
        for axis, part in enumerate(region):
            for place, plane in zip(range(part.start, part.stop), np.moveaxis(labels, axis, 0), strict=True):
                self._planes[axis][place] += np.bincount(plane.ravel(), minlength=self.num_parts)
        flat, values = labels.ravel(), intensities.ravel().astype(np.float64)
        own = self.voxels - before
        sums = np.bincount(flat, weights=values, minlength=self.num_parts)
        mean = sums / np.maximum(own, 1)
        squares = np.bincount(flat, weights=(values - mean[flat]) ** 2, minlength=self.num_parts)
        # Chan's formula combines deviations from two means without cancellation
        apart = mean - self._sums / np.maximum(before, 1)
        self._squares += squares + apart**2 * before * own / np.maximum(before + own, 1)
        self._sums += sums

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """(K,) mean and population standard deviation of the intensities, NaN for empty parts."""
        divisor = np.where(self.voxels > 0, self.voxels, np.nan)
        return self._sums / divisor, np.sqrt(self._squares / divisor)

    def by_size(self) -> np.ndarray:
        """The order of [`number_by_size`]."""
        return order_by_size(self.voxels, self._centroids(np.maximum(self.voxels, 1)))

    def statistics(
        self, affine: np.ndarray, numbers: Sequence[int], topology: "Topology | None" = None
    ) -> list[PartStatistics]:
        """The statistics of [`measure_parts`].

        Args:
            affine: (4, 4), voxels to millimetres.
            numbers: (K,) for each listed part, the label under which it was added.
            topology: of the same label map with its new numbers, if it was measured.
        """
        divisor = np.where(self.voxels > 0, self.voxels, np.nan)
        mean, std = self.moments()
        numbers = np.asarray(numbers)
        figures = (self.voxels[numbers], mean[numbers], std[numbers], self._centroids(divisor)[:, numbers])
        found = () if topology is None else (topology.components, topology.neighbours)
        return describe_parts(*figures, affine, *found)

    def _centroids(self, divisor: np.ndarray) -> np.ndarray:
        return np.stack([np.arange(len(planes)) @ planes / divisor for planes in self._planes])


class Topology:
    """Connected components and neighbours of every part, from consecutive slabs.

    Of the slabs before, only the last plane and the components that reach it are kept: these may grow or merge.

    Args:
        num_parts: K.
    """

    def __init__(self, num_parts: int):
        self._touching = np.zeros((num_parts, num_parts), dtype=bool)
        self._counts = np.zeros(num_parts, dtype=np.int64)
        self._last: np.ndarray | None = None  # part numbers
        self._pieces = np.zeros((0, 0), dtype=np.int32)  # components in it, from 1 within each part

    def add(self, planes: np.ndarray) -> None:
        """Add the next slab, (planes, rows, columns) part numbers."""
        joined = planes if self._last is None else np.concatenate([self._last[None], planes])
        for axis in range(3):
            low, high = (np.moveaxis(joined, axis, 0)[s] for s in (slice(None, -1), slice(1, None)))
            border = low != high
            self._touching[low[border], high[border]] = True
        last_pieces = np.zeros(planes.shape[1:], dtype=np.int32)
        for part in range(len(self._counts)):
            self._count_pieces(part, planes == part, last_pieces)
        self._last, self._pieces = planes[-1].copy(), last_pieces

    @property
    def components(self) -> list[int]:
        """For each part, the number of components connected through voxel faces."""
        return self._counts.tolist()

    @property
    def neighbours(self) -> list[tuple[int, ...]]:
        """For each part, the indices of the parts that share voxel faces with it."""
        return [tuple(map(int, np.flatnonzero(row))) for row in self._touching | self._touching.T]

    def _count_pieces(self, part: int, own: np.ndarray, last_pieces: np.ndarray) -> None:
        """Count the components of a part in a slab, less those that continue or merge earlier ones."""
        found, count = ndimage.label(own)
        self._counts[part] += count
        if self._last is None:
            older = np.zeros(own.shape[1:], dtype=np.int32)
        else:
            older = np.where(self._last == part, self._pieces, 0)
        meet = (older > 0) & (found[0] > 0)
        open_before = int(older.max(initial=0))
        # nodes: the earlier components, then those of the slab; edges: where one continues the other
        edges = (older[meet] - 1, open_before + found[0][meet] - 1)
        size = open_before + count
        graph = coo_matrix((np.ones(len(edges[0]), dtype=bool), edges), shape=(size, size))
        groups, group_of = connected_components(graph, directed=False)
        self._counts[part] -= size - groups
        # renumber the components that reach the last plane, so that numbers do not grow with the volume
        bottom = found[-1] > 0
        last_pieces[bottom] = np.unique(group_of[open_before + found[-1][bottom] - 1], return_inverse=True)[1] + 1
