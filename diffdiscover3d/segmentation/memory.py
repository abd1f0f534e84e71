"""Estimates of the memory that segmenting a volume takes."""

import math
from collections.abc import Mapping, Sequence

from diffdiscover3d.data.formats.nifti.header import reading_bytes
from diffdiscover3d.models.window_layout import activation_bytes, taken_at_once


def segmentation_bytes(shape: Sequence[int], network: Mapping) -> float:
    """What dividing a volume in memory takes on a CPU, fitted to `benchmarks/results/memory.json`.

    The activations of one window, and beside them, where windows slide, the parts' sums over the whole volume. What
    dividing it slab by slab takes says `windows.streaming_bytes`.

    Args:
        shape: of the volume, in voxels; only the first three axes count.
        network: the configuration of the discovery network.
    """
    if taken_at_once(shape, network):
        return 2**26 + activation_bytes(shape, max(shape[:3]), network)
    sums = math.prod(map(float, shape[:3])) * (8 * network["num_parts"] + 20)
    return 2**26 + activation_bytes(shape, network["window_size"], network) + sums


def resampling_bytes(header, shape: Sequence[int], grid: Sequence[int], network: Mapping) -> float:
    """What dividing a volume on a coarser grid takes: it is read whole, and its soft parts come to every voxel."""
    voxels = math.prod(map(float, shape[:3]))
    soft = voxels * (4 * network["num_parts"] + 13)  # beside them the volume, the labels, and these as 64-bit integers
    return max(reading_bytes(header, shape), 4 * voxels + segmentation_bytes(grid, network), 2**26 + soft)
