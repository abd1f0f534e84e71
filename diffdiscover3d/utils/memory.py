"""Free memory of the machine or container, and memory checks."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from diffdiscover3d.errors import MemoryLimitError

LARGE = 2 * 2**30  # estimates above this number of bytes are printed in advance
_CGROUP = Path("/sys/fs/cgroup")  # memory limits of Linux containers and batch systems, versions 1 and 2
_PROCESS = Path("/proc/self")


def free_memory() -> int:
    """Bytes available to this process, limited by the machine, the container or batch job, and `ulimit -v`."""
    import psutil

    limits = [psutil.virtual_memory().available, *_free_in_cgroups(), *_free_address_space()]
    return max(0, min(limits))


def _free_in_cgroups() -> Iterator[int]:
    """Limit minus use of every control group around this process that has a limit.

    In a container, the folder of its own group is the root of the visible hierarchy.
    """
    for folder, limit, use, cache in _memory_groups():
        try:
            free = int((folder / limit).read_text()) - int((folder / use).read_text())
        except (OSError, ValueError):  # no limit ("max"), or no such group here
            continue
        yield free + _reclaimable(folder / "memory.stat", cache)


def _memory_groups() -> Iterator[tuple[Path, str, str, str]]:
    """Folder of each group, from the own one outwards; names of its limit, its use and its reclaimable cache."""
    second, first = _CGROUP, _CGROUP / "memory"
    own = {second: PurePosixPath("/"), first: PurePosixPath("/")}
    with contextlib.suppress(OSError, ValueError):
        for line in (_PROCESS / "cgroup").read_text().splitlines():
            _, controllers, place = line.split(":", 2)
            if controllers == "":
                own[second] = PurePosixPath(place)
            elif "memory" in controllers.split(","):
                own[first] = PurePosixPath(place)
    files = {
        second: ("memory.max", "memory.current", "inactive_file"),
        first: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    }
    for root, names in files.items():
        for place in (own[root], *own[root].parents):
            if ".." not in place.parts:
                yield (root / place.relative_to(place.anchor or "."), *names)


def _reclaimable(file: Path, name: str) -> int:
    """Bytes of cached files in a group, which the system gives up when memory is needed."""
    try:
        table = dict(line.split(maxsplit=1) for line in file.read_text().splitlines() if " " in line)
        return int(table.get(name, 0))
    except (OSError, ValueError):
        return 0


def _free_address_space() -> Iterator[int]:
    """What `ulimit -v` leaves of the address space."""
    try:
        import resource
    except ImportError:  # not available on Windows
        return
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return
    with contextlib.suppress(OSError, ValueError, IndexError):
        pages = int((_PROCESS / "statm").read_text().split()[0])
        yield limit - pages * resource.getpagesize()


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
