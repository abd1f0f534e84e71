"""Estimates of the memory that segmenting a volume takes."""

import math
from collections.abc import Mapping, Sequence

from diffdiscover3d.data.formats.nifti.raw_grid import SLAB_VOXELS
from diffdiscover3d.models.window_layout import activation_bytes, choose_window, fits_window


def segmentation_bytes(shape: Sequence[int], network: Mapping) -> float:
    """The memory for segmenting a volume in memory on a CPU, fitted to `benchmarks/results/memory.json`.

    It holds the activations of one window and, with a sliding window, the sums of the parts over the whole volume. See
    [`streaming_bytes`] for segmenting it slab by slab.

    Args:
        shape: of the volume, in voxels; only the first three axes count.
        network: the configuration of the discovery network.
    """
    if fits_window(shape, network):
        return 2**26 + activation_bytes(shape, max(shape[:3]), network)
    sums = math.prod(map(float, shape[:3])) * (8 * network["num_parts"] + 20)
    return 2**26 + activation_bytes(shape, network["window_size"], network) + sums


def resampling_bytes(reading: float, shape: Sequence[int], grid: Sequence[int], network: Mapping) -> float:
    """The memory for segmenting a volume on a coarser grid: it is read whole, and its soft parts are upsampled.

    Args:
        reading: bytes that reading the volume takes.
        shape: of the volume, in voxels; only the first three axes count.
        grid: the coarser grid.
        network: the configuration of the discovery network.
    """
    voxels = math.prod(map(float, shape[:3]))
    soft = voxels * (4 * network["num_parts"] + 13)  # plus the volume, and the labels as uint8 and int64
    return max(reading, 4 * voxels + segmentation_bytes(grid, network), 2**26 + soft)


def block_resampling_bytes(shape: Sequence[int], grid: Sequence[int], network: Mapping) -> float:
    """The memory for resampling a volume on disk to another grid, and its soft parts back, in blocks of planes.

    A block of the volume has 4 Mi voxels, or the planes that one plane of the grid is computed from; the filter reads
    as many on either side. A block of the soft parts has as many voxels of all parts together.

    Args:
        shape: of the volume, in voxels; only the first three axes count.
        grid: the other grid.
        network: the configuration of the discovery network.
    """
    ratios = [max(1.0, n / m) for n, m in zip(shape[:3], grid, strict=True)]
    plane = math.prod(map(float, shape[:3])) / min(shape[:3])  # the largest, whichever axis is across
    block = max(float(SLAB_VOXELS), plane * max(ratios)) + plane * 4 * max(ratios)
    soft = max(float(SLAB_VOXELS), plane * network["num_parts"])
    return 2**26 + 12 * (block + soft)


def soft_window_bytes(grid: Sequence[int], network: Mapping) -> float:
    """The memory for two copies of the soft parts of one window, which are kept for the way back to the scan's grid.

    With it, the estimate for 512 x 512 x 400 voxels at half the resolution is 3.4 GiB; 3.2 GiB are used
    (`benchmarks/results/large-volume-resampled.json`).
    """
    side = choose_window(grid, network)
    return 8 * network["num_parts"] * math.prod(min(float(n), side) for n in grid[:3])
