"""A window slides over a volume that is not in memory, and what it leaves behind is finished at once.

The windows lie, and are blended, as in [`StructureDiscoveryModel.segment`]. They are visited slab by slab along the
axis along which the file stores its planes, in each slab row by row. So only two sums are kept: of the row of windows
at hand, and of those planes that the next slab of windows covers as well.
"""

import itertools
from collections.abc import Callable

import numpy as np
import torch

from diffdiscover3d.data.formats.nifti.raw_grid import RawGrid
from diffdiscover3d.data.formats.nifti.slabs import SlabScan
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.models.window_layout import shared_planes, window_starts

Sink = Callable[[int, int, torch.Tensor], None]


def count_windows(grid: RawGrid, window: int) -> int:
    """How many windows of this side a volume needs."""
    columns, rows, slabs = (len(window_starts(n, window)) for n in grid.shape)
    return columns * rows * slabs


def stream_parts(
    network: StructureDiscoveryModel,
    scan: SlabScan,
    window: int,
    sink: Sink,
    *,
    parents: RawGrid | None = None,
    moments: torch.Tensor | None = None,
    on_window: Callable[[], None] = lambda: None,
) -> None:
    """Divide a scan into soft parts, of which no more is in memory than windows still to come will change.

    Args:
        network: in evaluation mode.
        scan: as [`open_slabs`] opens it.
        window: side of the windows, in voxels.
        sink: is given, for every row of every plane of the file once, the plane's number, the first row's number and
            (K, rows, nx) weighted sums of probabilities; they become probabilities when divided by their sum over K.
        parents: where the network has a parent, its parts on the same grid.
        moments: where it has one, the whole volume's mean and standard deviation in each of its parts, as for
            [`StructureDiscoveryModel.segment_window`].
        on_window: called after each window.
    """
    width, height, depth = scan.grid.shape
    columns, rows, slabs = (_file_starts(scan.grid, axis, window) for axis in range(3))
    w, h, d = min(window, width), min(window, height), min(window, depth)
    weight = _importance(scan.grid, (w, h, d), network.device)
    parts = network.config.num_parts
    band = torch.zeros(d, parts, h, width)  # the row of windows at hand
    shared = torch.zeros(shared_planes(slabs, d), parts, height, width)  # what the slab before adds to this one
    added = 0  # planes of it
    for z, next_z in itertools.pairwise([*slabs, depth]):
        for y, next_y in itertools.pairwise([*rows, height]):
            for x in columns:
                region = scan.grid.region(((x, x + w), (y, y + h), (z, z + d)))
                # 32 bits, because torch compares no 16-bit ones without a sign
                above = None if parents is None else _as_batch(parents.read(region).astype(np.int32), network)
                soft = network.segment_window(_as_batch(scan.normalized(region), network), above, moments)
                band[..., x : x + w] += _to_file(soft[0].mul_(weight), scan.grid).cpu().transpose(0, 1)
                on_window()
            done = next_y - y  # rows that no further window of this slab covers
            for plane in range(d):
                finished = band[plane, :, :done]
                if plane < added:
                    finished += shared[plane, :, y:next_y]
                if z + plane < next_z:
                    sink(z + plane, y, finished)
                else:  # its place in `shared` was read for this row already: it lies further down
                    shared[plane - (next_z - z), :, y:next_y] = finished
                band[plane, :, : h - done] = band[plane, :, done:].clone()
                band[plane, :, h - done :] = 0
        added = d - (next_z - z)


def _file_starts(grid: RawGrid, axis: int, window: int) -> list[int]:
    """Where windows begin along an axis of the file, in its direction; they are laid out in the canonical one."""
    length = grid.shape[axis]
    starts = window_starts(length, window)
    return [length - s - min(window, length) for s in reversed(starts)] if grid.flipped[axis] else starts


def _importance(grid: RawGrid, box: tuple[int, int, int], device: torch.device) -> torch.Tensor:
    """The weights of a window's voxels in canonical orientation, for a window of that size on the file's axes."""
    from monai.data.utils import compute_importance_map  # several seconds: a network that is made has imported it

    shape = tuple(box[grid.axes.index(axis)] for axis in range(3))
    return compute_importance_map(shape, mode="gaussian", sigma_scale=0.125, device=device)


def _as_batch(box: np.ndarray, network: StructureDiscoveryModel) -> torch.Tensor:
    # negative strides and other byte orders do not exist in torch
    return torch.from_numpy(box.astype(box.dtype.newbyteorder("="), order="C"))[None, None].to(network.device)


def _to_file(soft: torch.Tensor, grid: RawGrid) -> torch.Tensor:
    """(K, h, w, d) in canonical orientation to (K, planes, rows, columns) of the file."""
    turned = soft.permute(0, *(1 + axis for axis in reversed(grid.axes)))
    if against := [1 + i for i, flipped in enumerate(reversed(grid.flipped)) if flipped]:
        turned = turned.flip(against)
    return turned.contiguous()  # adding it up as it lies in memory would take ten times as long
