"""How much memory a volume will take, said and compared with what there is before it is taken."""

import math
from collections.abc import Sequence
from pathlib import Path

from diffdiscover3d.errors import MemoryLimitError

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


def check_memory(path: Path, shape: Sequence[int], needed: float) -> None:
    """Refuse what cannot fit.

    Raises:
        MemoryLimitError: if more is needed than is free.
    """
    free = free_memory()
    if needed > free:
        raise MemoryLimitError(
            f"{path}: a volume of shape {tuple(shape)} needs about {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB "
            "of memory are free; resample it or use a larger machine."
        )
