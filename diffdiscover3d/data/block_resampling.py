"""Resampling of volumes on disk in blocks of planes, in bounded memory, equal to [`resize_volume`] up to rounding.

Anti-aliasing and interpolation are separable. Within its planes a block is resampled by [`resize_volume`]; across them,
the planes on either side that the Gaussian filter and the interpolation need are read along with it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from diffdiscover3d.data.formats.nifti.raw_grid import SLAB_VOXELS, RawGrid, Region
from diffdiscover3d.data.formats.nifti.slabs import SlabScan
from diffdiscover3d.data.transforms import anti_aliasing_sigma, gaussian_kernel, resize_volume
from diffdiscover3d.utils.files import Scratch


def resample_scan(scan: SlabScan, grid: Sequence[int], scratch: Scratch) -> SlabScan:
    """A scan on another grid of the same extent, on disk.

    Args:
        scan: the open scan.
        grid: (h, w, d) along the canonical axes.
        scratch: with room for 4 bytes per voxel of `grid`.

    Returns:
        The resampled scan: float32, on the axes of the file, with its own minimum and maximum.
    """
    axes, across = scan.grid.axes, scan.grid.axes[2]
    stored = RawGrid(scratch.raw, [grid[axis] for axis in axes], np.dtype(np.float32), scan.grid.orientation)
    voxels = scan.shape[across] / grid[across] * scan.grid.shape[0] * scan.grid.shape[1]  # of the scan in a plane
    step = max(1, int(SLAB_VOXELS / voxels))
    low, high = np.inf, -np.inf
    for start in range(0, grid[across], step):
        stop = min(start + step, grid[across])
        block = resample_block(scan.read, scan.shape, grid, start, stop, across).numpy()
        low, high = min(low, block.min()), max(high, block.max())
        with scratch.writing():
            write_block(stored, start, stop, block)
    ratios = np.divide(scan.shape, grid)
    coarser = np.block([[np.diag(ratios), (ratios[:, None] - 1) / 2], [np.zeros((1, 3)), np.ones((1, 1))]])
    changes = {"grid": stored, "affine": scan.affine @ coarser, "scaling": None, "private": True}
    return replace(scan, low=np.float32(low), high=np.float32(high), **changes)


def resample_block(
    read: Callable[[Region], np.ndarray], shape: Sequence[int], grid: Sequence[int], start: int, stop: int, across: int
) -> torch.Tensor:
    """Some planes of a volume that is resampled to another grid of the same extent.

    Args:
        read: gives the (h, w, d) values in a region of the volume.
        shape: of the volume.
        grid: to which it is resampled.
        start, stop: first and last plane (exclusive) of the grid.
        across: the axis on which these are counted.

    Returns:
        float32 values, complete along the other two axes.
    """
    length, count = shape[across], grid[across]
    sigma = anti_aliasing_sigma(length, count)
    kernel = gaussian_kernel(sigma) if sigma > 0 else torch.ones(1)
    radius = len(kernel) // 2
    below, above, share = _between(start, stop, length, count)
    first, last = int(below[0]), int(above[-1]) + 1
    begin, end = max(0, first - radius), min(length, last + radius)
    region = tuple(slice(begin, end) if axis == across else slice(0, n) for axis, n in enumerate(shape))
    planes = torch.from_numpy(np.ascontiguousarray(read(region), dtype=np.float32))
    size = [end - begin if axis == across else n for axis, n in enumerate(grid)]
    planes = resize_volume(planes[None, None], size)[0, 0].movedim(across, -1)
    lines = planes.reshape(-1, 1, end - begin)
    if radius:  # beyond the ends of the volume its border is repeated, as for the whole volume
        lines = F.pad(lines, (begin - first + radius, last + radius - end), mode="replicate")
        lines = F.conv1d(lines, kernel[None, None])
    mixed = lines[..., below - first] * (1 - share) + lines[..., above - first] * share
    return mixed.reshape(*planes.shape[:2], stop - start).movedim(-1, across)


def write_block(stored: RawGrid, start: int, stop: int, values: np.ndarray) -> None:
    """Write values in canonical orientation to complete planes of a file.

    Args:
        stored: the file.
        start, stop: first and last plane (exclusive), counted along the canonical axis that lies across the planes.
        values: (h, w, d), complete along the other axes.
    """
    turned = np.transpose(values, tuple(reversed(stored.axes)))
    turned = np.flip(turned, [axis for axis, flipped in enumerate(reversed(stored.flipped)) if flipped])
    plane = stored.shape[2] - stop if stored.flipped[2] else start
    stored.write_rows(plane, 0, turned.reshape(-1, turned.shape[-1]))


def _between(start: int, stop: int, length: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The planes between which planes `start` to `stop` of a resampled volume are interpolated, and the second's share.

    In the single precision of `torch.nn.functional.interpolate` without aligned corners, which for far planes is more
    than rounding.
    """
    places = (torch.arange(start, stop, dtype=torch.float32) + 0.5) * np.float32(length / count) - 0.5
    places = places.clamp(min=0)
    below = places.long().clamp(max=length - 1)
    return below, (below + 1).clamp(max=length - 1), places - below
