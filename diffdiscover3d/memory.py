"""How much memory a volume will take, said and compared with what there is before it is taken."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffdiscover3d.errors import MemoryLimitError

LARGE = 2 * 2**30  # bytes from which on a user is told beforehand
_CGROUP = Path("/sys/fs/cgroup")  # where Linux tells a container its limit


def free_memory() -> int:
    """Bytes this process may still take: what the machine has available, or a container's limit leaves."""
    import psutil

    free = psutil.virtual_memory().available
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        free = min(free, max(0, limit - used))
    except (OSError, ValueError):  # no such limit, which is written "max"
        pass
    return free


def reading_bytes(header, shape: Sequence[int]) -> float:
    """The most that reading a NIfTI file takes: its data as stored, beside two float32 copies of one volume."""
    stored = math.prod(map(float, shape)) * header.get_data_dtype().itemsize
    return stored + 8 * math.prod(map(float, shape[:3]))


def taken_at_once(shape: Sequence[int], network: Mapping) -> bool:
    """Whether a network takes a volume at once: if it has no more voxels than one of its windows."""
    return math.prod(map(float, shape[:3])) <= float(network["window_size"]) ** 3


def activation_bytes(shape: Sequence[int], window: int, network: Mapping) -> float:
    """The activations of a discovery network in one window of a volume, fitted to `benchmarks/results/memory.json`."""
    return math.prod(min(float(n), window) for n in shape[:3]) * 21 * network["channels"][0]


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


def check_memory(
    path: Path, shape: Sequence[int], needed: float, remedy: str = "resample it or use a larger machine"
) -> None:
    """Refuse what cannot fit.

    Raises:
        MemoryLimitError: if more is needed than is free.
    """
    free = free_memory()
    if needed > free:
        raise MemoryLimitError(
            f"{path}: a volume of shape {tuple(shape)} needs about {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB "
            f"of memory are free; {remedy}."
        )
