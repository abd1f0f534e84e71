"""Out-of-core sliding-window inference that emits each row of voxels as soon as it is complete.

Window positions and blending weights are those of [`StructureDiscoveryModel.segment`]. Windows are visited slab by slab
along the last axis of the file, and row by row within a slab. Only two accumulators are kept in memory: one for the
current row of windows and one for the planes shared with the next slab. While a GPU computes a window, the next one is
read and the one before is copied to the host and added.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from diffdiscover3d.data.formats.nifti.raw_grid import RawGrid, Region
from diffdiscover3d.data.formats.nifti.slabs import SlabScan
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.models.window_layout import shared_planes, window_starts

Sink = Callable[[int, int, torch.Tensor], None]


def count_windows(grid: RawGrid, window: int) -> int:
    """The number of windows of this side length that cover a volume."""
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
    """Compute the soft parts of a scan, keeping only rows in memory that later windows still contribute to.

    Args:
        network: discovery network in evaluation mode.
        scan: scan opened by [`stream_volume`].
        window: side length of the windows, in voxels.
        sink: called with the index of a plane, the index of its first row and the (K, rows, nx) weighted sums of
            probabilities, exactly once for every row of the file. Dividing the sums by their sum over K gives
            probabilities.
        parents: part labels of the parent on the same grid; required if the network has a parent.
        moments: mean and standard deviation of the whole volume in each part of the parent, as for
            [`StructureDiscoveryModel.segment_window`]; required if the network has a parent.
        on_window: called after each window.
    """
    width, height, depth = scan.grid.shape
    columns, rows, slabs = (_file_starts(scan.grid, axis, window) for axis in range(3))
    w, h, d = min(window, width), min(window, height), min(window, depth)
    weight = _importance(scan.grid, (w, h, d), network.device)
    parts = network.config.num_parts
    band = torch.zeros(d, parts, h, width)  # current row of windows
    shared = torch.zeros(shared_planes(slabs, d), parts, height, width)  # contribution of the previous slab
    added = 0  # planes shared with the previous slab
    regions = [
        scan.grid.region(((x, x + w), (y, y + h), (z, z + d))) for z, y, x in itertools.product(slabs, rows, columns)
    ]
    with contextlib.closing(_soft_windows(network, scan, parents, regions, weight, moments)) as windows:
        for z, next_z in itertools.pairwise([*slabs, depth]):
            for y, next_y in itertools.pairwise([*rows, height]):
                for x in columns:
                    band[..., x : x + w] += next(windows)
                    on_window()
                done = next_y - y  # rows not covered by later windows of this slab
                for plane in range(d):
                    finished = band[plane, :, :done]
                    if plane < added:
                        finished += shared[plane, :, y:next_y]
                    if z + plane < next_z:
                        sink(z + plane, y, finished)
                    else:  # the plane of `shared` overwritten here was already read for this row
                        shared[plane - (next_z - z), :, y:next_y] = finished
                    band[plane, :, : h - done] = band[plane, :, done:].clone()
                    band[plane, :, h - done :] = 0
            added = d - (next_z - z)


def _soft_windows(
    network: StructureDiscoveryModel,
    scan: SlabScan,
    parents: RawGrid | None,
    regions: Sequence[Region],
    weight: torch.Tensor,
    moments: torch.Tensor | None,
) -> Iterator[torch.Tensor]:
    """Weighted probabilities (planes, K, rows, columns) of each region, on the axes of the file and in host memory.

    On a GPU a region is yielded when the next one is being computed.
    """
    on_gpu = network.device.type == "cuda"
    waiting = None
    with contextlib.closing(_read_boxes(scan, parents, regions, on_gpu)) as boxes:
        for box in boxes:
            inputs = [None if x is None else x.to(network.device, non_blocking=on_gpu) for x in box]
            soft = network.segment_window(*inputs, moments)
            copied = _begin_copy(_to_file(soft[0].mul_(weight), scan.grid))
            if waiting is not None:
                yield waiting().transpose(0, 1)
            if on_gpu:
                waiting = copied
            else:
                yield copied().transpose(0, 1)
            del box, inputs, soft, copied  # their memory is needed for the next window
    if waiting is not None:
        yield waiting().transpose(0, 1)


def _read_boxes(
    scan: SlabScan, parents: RawGrid | None, regions: Sequence[Region], ahead: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """The normalised values of each region and the parts of its parent, (1, 1, h, w, d).

    Args:
        ahead: read each region in a thread while the one before is in use, into pinned memory.
    """

    def read(region: Region) -> tuple[torch.Tensor, torch.Tensor | None]:
        # int32, because torch does not compare uint16 tensors
        above = None if parents is None else _as_batch(parents.read(region).astype(np.int32))
        values = _as_batch(scan.normalized(region))
        if not ahead:
            return values, above
        return values.pin_memory(), None if above is None else above.pin_memory()

    if not ahead:
        yield from map(read, regions)
        return
    with ThreadPoolExecutor(max_workers=1) as pool:
        following = pool.submit(read, regions[0])
        for region in [*regions[1:], None]:
            box = following.result()
            if region is not None:
                following = pool.submit(read, region)
            yield box


def _begin_copy(x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Begin to copy a tensor to the host; the function that is returned waits for the copy."""
    if x.device.type != "cuda":
        return x.cpu
    copied, done = x.to("cpu", non_blocking=True), torch.cuda.Event()  # PyTorch pins the memory of such copies
    done.record()

    def wait() -> torch.Tensor:
        done.synchronize()
        return copied

    return wait


def _file_starts(grid: RawGrid, axis: int, window: int) -> list[int]:
    """First voxels of the windows along a file axis; window positions are defined in canonical orientation."""
    length = grid.shape[axis]
    starts = window_starts(length, window)
    return [length - s - min(window, length) for s in reversed(starts)] if grid.flipped[axis] else starts


def _importance(grid: RawGrid, box: tuple[int, int, int], device: torch.device) -> torch.Tensor:
    """Gaussian blending weights in canonical orientation, for a window of size `box` on the file's axes."""
    from monai.data.utils import compute_importance_map  # slow import, already done by the network

    shape = tuple(box[grid.axes.index(axis)] for axis in range(3))
    return compute_importance_map(shape, mode="gaussian", sigma_scale=0.125, device=device)


def _as_batch(box: np.ndarray) -> torch.Tensor:
    # torch supports neither negative strides nor non-native byte orders
    return torch.from_numpy(box.astype(box.dtype.newbyteorder("="), order="C"))[None, None]


def _to_file(soft: torch.Tensor, grid: RawGrid) -> torch.Tensor:
    """Permute (K, h, w, d) in canonical orientation to (K, planes, rows, columns) of the file."""
    turned = soft.permute(0, *(1 + axis for axis in reversed(grid.axes)))
    if flipped_dims := [1 + i for i, flipped in enumerate(reversed(grid.flipped)) if flipped]:
        turned = turned.flip(flipped_dims)
    return turned.contiguous()  # adding a strided tensor is ten times slower
