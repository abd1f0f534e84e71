"""Views of volumes on disk, read slab by slab: slices, a coarser grid, part numbers at picked voxels."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from diffdiscover3d.data.formats.nifti.raw_grid import RawGrid, Region
from diffdiscover3d.data.formats.nifti.slabs import SlabScan


def middle_regions(shape: Sequence[int], read: Callable[[Region], np.ndarray]) -> list[np.ndarray]:
    """The middle slice across each canonical axis.

    Args:
        shape: (H, W, D) of the volume.
        read: returns the values in a region.
    """
    cuts = []
    for axis, length in enumerate(shape):
        thin = [slice(0, n) for n in shape]
        thin[axis] = slice(length // 2, length // 2 + 1)
        cuts.append(np.take(read(tuple(thin)), 0, axis=axis))
    return cuts


def shrink(scan: SlabScan, grid: Sequence[int]) -> np.ndarray:
    """(h, w, d) float32 means of the scan over the voxels of a coarser grid; on its own grid, the scan unchanged."""
    shown = np.empty(tuple(grid), np.float32)
    axis = scan.grid.axes[2]  # the axis across the file's planes
    length, count = scan.shape[axis], grid[axis]
    for place in range(count):
        region = [slice(0, n) for n in scan.shape]
        region[axis] = slice(place * length // count, -(-(place + 1) * length // count))  # as torch's pooling does
        thin = list(grid)
        thin[axis] = 1
        slab = torch.from_numpy(np.ascontiguousarray(scan.read(tuple(region))))
        target = tuple(slice(place, place + 1) if a == axis else slice(None) for a in range(3))
        shown[target] = F.adaptive_avg_pool3d(slab[None], thin)[0].numpy()
    return shown


def spread_values(scan: SlabScan, per_axis: int = 100) -> np.ndarray:
    """(h, w, d) values of the scan at evenly spaced voxels, at most `per_axis` along each axis."""
    steps = [-(-n // per_axis) for n in scan.shape]
    axis = scan.grid.axes[2]
    planes = []
    for place in range(0, scan.shape[axis], steps[axis]):
        region = [slice(0, n) for n in scan.shape]
        region[axis] = slice(place, place + 1)
        thin = tuple(slice(None) if a == axis else slice(None, None, step) for a, step in enumerate(steps))
        planes.append(scan.read(tuple(region))[thin])
    return np.concatenate(planes, axis=axis)


def sample(stored: RawGrid, picks: Sequence[np.ndarray]) -> np.ndarray:
    """(h, w, d) stored numbers where the picked planes along the three canonical axes cross."""
    axis = stored.axes[2]
    shape = stored.canonical_shape
    planes = []
    for place in picks[axis]:
        region = [slice(0, n) for n in shape]
        region[axis] = slice(int(place), int(place) + 1)
        across = [np.zeros(1, int) if a == axis else pick for a, pick in enumerate(picks)]
        planes.append(stored.read(tuple(region))[np.ix_(*across)])
    return np.concatenate(planes, axis=axis)
