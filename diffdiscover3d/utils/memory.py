"""Free memory of the machine or container, and memory checks."""

from collections.abc import Sequence
from pathlib import Path

from diffdiscover3d.errors import MemoryLimitError

LARGE = 2 * 2**30  # estimates above this number of bytes are printed in advance
_CGROUP = Path("/sys/fs/cgroup")  # memory limit of a Linux container


def free_memory() -> int:
    """Bytes available to this process, limited by the machine and the container."""
    import psutil

    free = psutil.virtual_memory().available
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        free = min(free, max(0, limit - used))
    except (OSError, ValueError):  # no limit ("max") or no cgroup
        pass
    return free


def check_memory(
    path: Path, shape: Sequence[int], needed: float, remedy: str = "resample it or use a larger machine"
) -> None:
    """Check that an estimated memory requirement fits into the free memory.

    Args:
        path: path of the volume, for error messages.
        shape: shape of the volume, for error messages.
        needed: required memory in bytes.
        remedy: remedy to suggest.

    Raises:
        MemoryLimitError: if more memory is required than is free.
    """
    free = free_memory()
    if needed > free:
        raise MemoryLimitError(
            f"{path}: a volume of shape {tuple(shape)} needs about {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB "
            f"of memory are free; {remedy}."
        )
