"""The report of a scan that is not in memory: what the page shows of it is read slab by slab."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from diffdiscover3d.data.formats.nifti.raw_grid import RawGrid
from diffdiscover3d.data.formats.nifti.slabs import SlabScan
from diffdiscover3d.reporting.page import ShownLevel, shown_grid, shown_voxels, write_page
from diffdiscover3d.reporting.parts import PartStatistics


def write_streamed_report(
    path: str | Path,
    scan: SlabScan,
    name: str,
    labels: Mapping[int | None, tuple[RawGrid, Callable[[np.ndarray], np.ndarray]]],
    parts: Mapping[int | None, Sequence[PartStatistics]],
    provenance: Mapping[int | None, dict],
    links: Sequence[dict],
) -> None:
    """Write the report of an open scan.

    Args:
        path, name: as for [`write_report`].
        scan: as [`open_slabs`] opens it.
        labels: of each level the part numbers on disk, and what turns them into those of the results.
        parts, provenance: of each level its parts with components and neighbours, and its sidecar.
        links: as for [`write_page`].

    Raises:
        OutputError: if it cannot be written.
    """
    grid = shown_grid(scan.shape)
    levels = [
        ShownLevel(
            level if len(labels) > 1 else None,
            provenance[level],
            parts[level],
            renumbered(pick_voxels(stored, shown_voxels(scan.shape, grid))),
        )
        for level, (stored, renumbered) in labels.items()
    ]
    write_page(path, name, scan.shape, scan.affine, shrink(scan, grid), levels, links, scan.notes)


def shrink(scan: SlabScan, grid: Sequence[int]) -> np.ndarray:
    """The mean of the scan's voxels that each voxel of a coarser grid covers, (h, w, d) float32; its own: unchanged."""
    shown = np.empty(tuple(grid), np.float32)
    axis = scan.grid.axes[2]  # along which the file's planes follow each other
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


def pick_voxels(stored: RawGrid, picks: Sequence[np.ndarray]) -> np.ndarray:
    """The numbers at the crossings of some planes along each canonical axis, (h, w, d)."""
    axis = stored.axes[2]
    shape = stored.canonical_shape
    planes = []
    for place in picks[axis]:
        region = [slice(0, n) for n in shape]
        region[axis] = slice(int(place), int(place) + 1)
        across = [np.zeros(1, int) if a == axis else pick for a, pick in enumerate(picks)]
        planes.append(stored.read(tuple(region))[np.ix_(*across)])
    return np.concatenate(planes, axis=axis)
