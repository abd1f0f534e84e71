"""Free memory of the machine or container, and the check of an estimate against it."""

from collections.abc import Sequence
from pathlib import Path

from diffdiscover3d.errors import MemoryLimitError

LARGE = 2 * 2**30  # bytes from which on the estimate is printed before the work starts
_CGROUP = Path("/sys/fs/cgroup")  # the limit of a Linux container


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
