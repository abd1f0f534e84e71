"""Estimates of the memory that segmenting a volume takes."""

import math
from collections.abc import Mapping, Sequence

from diffdiscover3d.models.window_layout import activation_bytes, fits_window


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
